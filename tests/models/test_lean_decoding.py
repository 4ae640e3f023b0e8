"""The lean forward against the model's own, and the models that it must leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forward_helpers import tiny as any_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from isdaa.models import decoding, sampling
from isdaa.models.forward import prepare
from isdaa.models.lean_decoding import lean_forward
from isdaa.models.loading import add_lora
from isdaa.models.sampling import Sample, SamplingSettings, sample

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 40, "max_position_embeddings": 64}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4},
    "llama, grouped": {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True},
    "llama, one layer": {"model_type": "llama", "num_attention_heads": 2, "num_hidden_layers": 1, "tie_word_embeddings": True},
    "llama, scaled": {
        "model_type": "llama",
        "num_attention_heads": 2,
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 100.0},
    },
    "qwen2": {"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"model_type": "mistral", "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None},
}
PROMPTS = [[5, 6, 7, 8, 9, 3, 1, 4], [9, 9, 4], [7, 7, 1], [5], [5], [3, 3, 8, 1]]


def tiny(kind: str = "llama, grouped", **changes: Any) -> Any:
    torch.manual_seed(0)
    options = SHAPE | KINDS[kind] | changes
    config = AutoConfig.for_model(options.pop("model_type"), **options, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(8.0) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.3)
            assert not name.endswith("bias") or parameter.abs().max() > 0
    return model


def drawn(model: Any, **settings: Any) -> list[Sample]:
    keys = [f"{i}/{k}" for i in range(len(PROMPTS)) for k in range(3)]
    return sample(model, PROMPTS, SamplingSettings(max_new_tokens=12, **settings), {2, 4, 8}, 0, 0, keys, 7, n=3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 12, 1000])
@torch.no_grad()
def test_logits_and_states_are_the_models_own(kind: str, chunk: int) -> None:
    model = tiny(kind)
    assert decoding.lean_works(model, PROMPTS[0])
    groups = [(tuple(prompt), list(range(i % 3 + 1))) for i, prompt in enumerate(PROMPTS)]
    rows = [list(prompt) for prompt, numbers in groups for _ in numbers]
    run = decoding.CachedRun(model, groups, 0, with_states=True, chunk=chunk, lean=True)
    assert run.lean is not None
    for step in range(5):
        expected = torch.stack([decoding.plain_logits(model, torch.tensor([row]))[0] for row in rows])
        torch.testing.assert_close(run.logits, expected, rtol=1e-4, atol=1e-4)
        assert run.states is not None
        torch.testing.assert_close(model.lm_head(run.states), run.logits)
        if step == 2:
            run.keep(torch.tensor([0, 11, 2, 3, 4]))
            rows = [rows[i] for i in (0, 11, 2, 3, 4)]
        tokens = torch.arange(len(rows)) + step
        run.step(tokens)
        rows = [[*row, int(token)] for row, token in zip(rows, tokens, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_the_models_own_forward(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(kind)
    lean, greedy = drawn(model), drawn(model, temperature=0.0)
    assert len({tuple(s.ids) for s in lean}) > 8 and len({len(s.ids) for s in lean}) > 2
    monkeypatch.setattr(sampling, "lean_works", lambda *_: False)
    assert lean == drawn(model) and greedy == drawn(model, temperature=0.0)


def test_prepared_models_and_adapters_too() -> None:
    model = tiny()
    expected = drawn(model)
    prepare(model)
    assert lean_forward(model) is not None and drawn(model) == expected
    adapted = add_lora(tiny(), rank=2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        assert decoding.lean_works(adapted.eval(), PROMPTS[0])
        run = decoding.CachedRun(adapted, [((5, 6, 7), [0])], 0, lean=True)
        torch.testing.assert_close(run.logits, decoding.plain_logits(adapted, torch.tensor([[5, 6, 7]])), rtol=1e-4, atol=1e-4)
    assert drawn(adapted) != expected


def test_other_models_are_left_alone() -> None:
    assert not decoding.lean_works(tiny("mistral", sliding_window=4), PROMPTS[0])
    assert lean_forward(any_tiny("gpt2", 0)) is None and lean_forward(any_tiny("gemma2", 0)) is None
    assert lean_forward(tiny().to(torch.bfloat16)) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lean_forward(tiny()) is None
    in_front, moved = tiny(), tiny()
    own = in_front.forward
    in_front.forward = lambda *args, **given: own(*args, **given)
    assert lean_forward(in_front) is None
    prepare(in_front)
    moved.model.layers[0]._hf_hook = object()
    assert lean_forward(in_front) is None and lean_forward(moved) is None


def test_an_architecture_that_only_looks_the_same_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model, other = tiny(), tiny()
    own = type(other.model.layers[1].self_attn).forward
    other.model.layers[1].self_attn.forward = lambda **given: (own(other.model.layers[1].self_attn, **given)[0] * 2, None)
    assert drawn(other) != drawn(model)
    assert "not those of its architecture" in caplog.text and "slow" not in caplog.text
