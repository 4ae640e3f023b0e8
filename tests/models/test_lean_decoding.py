"""The lean forward against the model's own, and the models that it must leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forward_helpers import tiny as any_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from isdaa.models.loading import add_lora
from isdaa.models.packed.forward import prepare
from isdaa.models.sampling import decoding, sampling
from isdaa.models.sampling.lean import lean_parts
from isdaa.models.sampling.lean_decoding import LeanRun, lean_sampler
from isdaa.models.sampling.sampling import Sample, SamplingSettings, sample

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
    lean = lean_sampler(model, PROMPTS[0])
    assert lean is not None
    groups = [(tuple(prompt), list(range(i % 3 + 1))) for i, prompt in enumerate(PROMPTS)]
    rows = [list(prompt) for prompt, numbers in groups for _ in numbers]
    run = LeanRun(lean, groups, with_states=True, chunk=chunk)
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
    monkeypatch.setattr(sampling, "lean_sampler", lambda *_: None)
    assert lean == drawn(model) and greedy == drawn(model, temperature=0.0)


def test_prepared_models_and_adapters_too() -> None:
    model = tiny()
    expected = drawn(model)
    prepare(model)
    assert lean_parts(model) is not None and drawn(model) == expected
    adapted = add_lora(tiny(), rank=2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        lean = lean_sampler(adapted.eval(), PROMPTS[0])
        assert lean is not None
        run = LeanRun(lean, [((5, 6, 7), [0])])
        torch.testing.assert_close(run.logits, decoding.plain_logits(adapted, torch.tensor([[5, 6, 7]])), rtol=1e-4, atol=1e-4)
    assert drawn(adapted) != expected


def test_other_models_are_left_alone() -> None:
    assert lean_parts(tiny()) is not None
    assert lean_parts(any_tiny("gpt2", 0)) is None and lean_parts(any_tiny("gemma2", 0)) is None
    assert lean_parts(tiny().to(torch.bfloat16)) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lean_parts(tiny()) is None
    in_front, moved, mixed = tiny(), tiny(), tiny()
    own = in_front.forward
    in_front.forward = lambda *args, **given: own(*args, **given)
    assert lean_parts(in_front) is None
    prepare(in_front)
    moved.model.layers[0]._hf_hook = object()
    mixed.model.norm.to(torch.float64)
    assert lean_parts(in_front) is None and lean_parts(moved) is None and lean_parts(mixed) is None


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_windows_are_left_alone(kind: str) -> None:
    window = {"sliding_window": 40, "use_sliding_window": True, "max_window_layers": 1}  # longer than what the probe tries
    assert lean_parts(tiny(kind)) is not None and lean_parts(tiny(kind, **window)) is None


def test_what_a_short_probe_cannot_see_is_left_alone() -> None:
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}}
    assert lean_parts(tiny("llama", **dynamic)) is None
    patched, subclassed, foreign = tiny(), tiny(), tiny()
    attention = patched.model.layers[1].self_attn
    attention.forward = attention.forward.__func__.__get__(attention)  # its own, bound to the instance: nothing is changed
    assert lean_parts(patched) is not None
    attention.forward = lambda **given: type(attention).forward(attention, **given)
    assert lean_parts(patched) is None
    mlp = subclassed.model.layers[0].mlp
    mlp.__class__ = type("Other", (type(mlp),), {})
    assert lean_parts(subclassed) is None
    foreign.config._attn_implementation_internal = "of_somebody"
    assert lean_parts(foreign) is None


def test_fewer_layers_as_the_config_says() -> None:
    model = tiny()
    model.config.num_hidden_layers = 1
    lean = lean_sampler(model, PROMPTS[0])
    assert lean is not None and len(lean.layers) == 1


def test_only_lora_among_adapters() -> None:
    peft = pytest.importorskip("peft")
    tokens = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert lean_parts(peft.get_peft_model(tiny(), tokens)) is None
    assert lean_parts(add_lora(tiny(), rank=2)) is not None
    late = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], alora_invocation_tokens=[3, 4])
    assert lean_parts(peft.get_peft_model(tiny(), late)) is None


def test_a_layer_with_a_forward_of_its_own_keeps_it() -> None:
    model = tiny()
    layer = model.model.layers[0].mlp.down_proj
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight) * 2
    with torch.no_grad():
        lean = lean_parts(model)
        assert lean is not None
        run = LeanRun(lean, [((5, 6, 7), [0])])
        torch.testing.assert_close(run.logits, decoding.plain_logits(model, torch.tensor([[5, 6, 7]])), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_room_grows_and_double_precision() -> None:
    model = tiny("qwen3", max_position_embeddings=128).double()
    lean = lean_parts(model)
    assert lean is not None
    rows = [[5, 6, 7], [9]]
    run = LeanRun(lean, [(tuple(row), [0]) for row in rows])
    for step in range(70):
        run.step(torch.tensor([step % 40, 3]))
        rows = [[*rows[0], step % 40], [*rows[1], 3]]
    expected = torch.cat([decoding.plain_logits(model, torch.tensor([row])) for row in rows])
    torch.testing.assert_close(run.logits, expected, rtol=1e-5, atol=1e-5)


def test_an_architecture_that_only_looks_the_same_is_noticed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    expected = drawn(model)
    kind = type(model.model.layers[1].self_attn)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, **given: (own(self, **given)[0] * 2, None))
    assert drawn(tiny()) != expected
    assert "not those of its architecture" in caplog.text and "slow" not in caplog.text
