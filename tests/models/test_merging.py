"""Adapters merged into weights compute what they computed beside them; what differs is neither saved nor loaded."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import GenerationConfig
from words_model import CONFIG, words

from isdaa.errors import UserError
from isdaa.manifest import MANIFEST
from isdaa.models import merging
from isdaa.models.loading import load_model, random_model, save_model
from isdaa.models.lora import add_lora, merged_copy
from isdaa.models.merging import settle_ties
from isdaa.models.packed.forward import prepare

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft's own, of tied weights
TIED = CONFIG | {"tie_word_embeddings": True, "initializer_range": 0.3}
GPT2 = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": 2, "initializer_range": 0.3}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "DoRA": {"target_modules": ["lm_head", "q_proj"], "use_dora": True},
    "rsLoRA": {"target_modules": ["lm_head"], "use_rslora": True},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "both saved, tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
        "ensure_weight_tying": True,
    },
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "tokens of the head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 5]}},
    "tokens of either": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 5], "embed_tokens": [4]}},
    "parameters": {"target_modules": [], "target_parameters": ["lm_head.weight"]},
}
STILL_TIED = ("biases", "both saved, tied", "tokens")
ROW = torch.tensor([[1, 3, 5, 7, 9, 11, 2, 30, 31, 4]])


def logps(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ROW).logits.float().log_softmax(-1)


def adapted(model: Any, **settings: Any) -> Any:
    settings = copy.deepcopy(settings)
    model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape).to(parameter.dtype)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_of_tied_weights_is_what_was_trained(kind: str, tmp_path: Path) -> None:
    model = adapted(random_model(TIED, 0), **KINDS[kind])
    wanted = logps(model)
    with model.disable_adapter():
        assert float((logps(model) - wanted).abs().max()) > 0.1
    save_model(model, words(), tmp_path / "merged")
    assert torch.equal(logps(model), wanted), "the model itself is as it was"
    loaded = load_model(tmp_path / "merged")
    assert torch.allclose(logps(loaded), wanted, atol=1e-4)
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == (kind in STILL_TIED) == loaded.config.tie_word_embeddings
    # The adapter's folder, as made elsewhere, and another adapter on top of it.
    random_model(TIED, 0).save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert torch.allclose(logps(load_model(tmp_path / "adapter")), wanted, atol=1e-4)
    unmerged = PeftModel.from_pretrained(random_model(TIED, 0), tmp_path / "adapter")
    assert torch.allclose(logps(add_lora(unmerged, rank=2)), wanted, atol=1e-4)


@pytest.mark.parametrize("targets", [["lm_head"], ["wte"], ["lm_head", "c_attn"]])
def test_gpt2_is_untied_as_well(targets: list[str]) -> None:
    model = adapted(random_model(GPT2, 0), target_modules=targets, fan_in_fan_out="c_attn" in targets)
    merged: Any = merged_copy(model)
    assert torch.allclose(logps(merged), logps(model), atol=1e-4) and not merged.config.tie_word_embeddings


def test_a_larger_vocabulary_with_an_adapter_on_its_head_comes_with_it(tmp_path: Path) -> None:
    random_model(TIED, 0).save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base")
    base.resize_token_embeddings(40)
    model = adapted(base, target_modules=["lm_head", "q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    assert torch.allclose(logps(load_model(tmp_path / "adapter")), logps(model), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_right_merge_passes_in_every_dtype_and_a_wrong_one_does_not(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(random_model(TIED | {"num_hidden_layers": 4}, 0, dtype=dtype), target_modules="all-linear")
    merged_copy(model)
    parted = adapted(random_model(TIED, 0, dtype=dtype), target_modules=["lm_head"])
    merged_copy(parted)
    monkeypatch.setattr(merging, "_part", lambda model: [])  # as peft does it
    with pytest.raises(UserError, match=r"the adapter computes something else \(logps differ by .*--lora.merge false"):
        merged_copy(parted)


def test_right_merges_of_reward_models_pass_though_each_gives_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of a single number is next to nothing now and then, and a rounding then looked like an error (7 of 60)."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    small = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
    }
    config = LlamaConfig(vocab_size=32, num_labels=1, pad_token_id=0, initializer_range=0.2, **small)
    for seed in range(20):
        torch.manual_seed(seed)
        model: Any = LlamaForSequenceClassification(config).to(torch.bfloat16)
        model = get_peft_model(model, LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear"))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape) if parameter.requires_grad else 0.0
        merged_copy(model)
    original: Any = LoraLinear.get_delta_weight
    monkeypatch.setattr(LoraLinear, "get_delta_weight", lambda self, adapter: 2 * original(self, adapter))
    with pytest.raises(UserError, match="the adapter computes something else"):
        merged_copy(model)


def test_what_differs_is_neither_saved_nor_loaded_nor_built_upon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_model(CONFIG, 0).save_pretrained(tmp_path / "base")
    words().save_pretrained(tmp_path / "base")
    model = adapted(load_model(tmp_path / "base"), target_modules=["q_proj", "down_proj"])
    model.save_pretrained(tmp_path / "adapter")
    original: Any = LoraLinear.get_delta_weight
    monkeypatch.setattr(LoraLinear, "get_delta_weight", lambda self, adapter: 1.01 * original(self, adapter))
    with pytest.raises(UserError, match="the trained adapter: merged into its base model's weights, the adapter computes"):
        save_model(model, words(), tmp_path / "merged")
    with pytest.raises(UserError, match=r"adapter: merged into .*; load it unmerged \(merge_adapter=False\)"):
        load_model(tmp_path / "adapter")
    with pytest.raises(UserError, match="the adapter that the model carries: merged into"):
        add_lora(copy.deepcopy(model), rank=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"], "nothing is left half written"
    assert isinstance(load_model(tmp_path / "adapter", merge_adapter=False), PeftModel)


def test_what_peft_cannot_merge_is_one_line() -> None:
    model = adapted(random_model(TIED, 0), target_modules=["q_proj"], lora_bias=True)  # of layers without a bias
    with pytest.raises(UserError, match=r"the trained adapter: peft cannot merge this adapter .*lora_bias.*; --lora.merge false"):
        merged_copy(model)
    with pytest.raises(UserError, match="ensure_weight_tying with target_modules"):
        prepare(adapted(random_model(TIED, 0), target_modules=["lm_head"], ensure_weight_tying=True))


def test_adapters_of_other_kinds_are_merged_and_compared() -> None:
    model: Any = get_peft_model(random_model(TIED, 0), IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "lm_head"],
                                                                 feedforward_modules=[]))  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape) if parameter.requires_grad else 0.0
    assert torch.allclose(logps(merged_copy(model)), logps(model), atol=1e-4)


def test_a_prepared_model_in_training_is_compared_as_its_class_computes() -> None:
    model = adapted(random_model(TIED, 0), target_modules=["lm_head", "v_proj"])
    prepare(model)
    model.train()
    merged = merged_copy(model)
    assert "forward" not in merged.__dict__ and model.training
    assert torch.allclose(logps(merged), logps(model), atol=1e-4)


def test_a_change_that_half_precision_rounds_away_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = random_model(CONFIG, 0, dtype="bfloat16")
    for size, told in ((1e-5, True), (1.0, False)):
        lora: Any = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]))
        for name, parameter in lora.named_parameters():
            parameter.data += size * torch.randn(parameter.shape) if "lora_B" in name else 0.0
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            merged_copy(lora)
        assert ("bfloat16 weights hold" in caplog.text) == told


def test_a_model_that_does_not_run_here_is_saved_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(random_model(CONFIG, 0), target_modules=["q_proj"])

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no kernel for this device")

    model.get_base_model().model.layers[0].register_forward_pre_hook(fail)
    with caplog.at_level(logging.WARNING):
        merged_copy(model)
    assert "cannot be seen: the model does not run here (RuntimeError: no kernel for this device)" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# What a configuration says of tied weights


def test_weights_that_have_parted_are_not_called_tied(tmp_path: Path) -> None:
    model: Any = random_model(TIED, 0)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 0.3)
    save_model(model, words(), tmp_path / "parted")
    assert not json.loads((tmp_path / "parted/config.json").read_text())["tie_word_embeddings"]
    assert torch.equal(logps(load_model(tmp_path / "parted")), logps(model))
    # A folder that some other program has written so.
    settings = json.loads((tmp_path / "parted/config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "parted/config.json").write_text(json.dumps(settings))
    (tmp_path / "parted" / MANIFEST).unlink()
    assert not load_model(tmp_path / "parted").config.tie_word_embeddings


def test_weights_that_a_script_has_tied_are_called_so(tmp_path: Path) -> None:
    model: Any = random_model(CONFIG, 0)
    model.lm_head.weight = model.model.embed_tokens.weight
    save_model(model, words(), tmp_path / "tied")
    loaded: Any = load_model(tmp_path / "tied")
    assert loaded.config.tie_word_embeddings and torch.equal(logps(loaded), logps(model))


def test_of_several_tied_pairs_all_are_parted_or_none() -> None:
    model: Any = random_model(TIED, 0)
    first, second = (model.model.layers[i].mlp.up_proj for i in (0, 1))
    model._tied_weights_keys = {
        "lm_head.weight": "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
    }
    second.weight = first.weight
    settle_ties(model)
    assert model.config.tie_word_embeddings and second.weight is first.weight
    merged: Any = merged_copy(adapted(model, target_modules=["lm_head"]))
    first, second = (merged.model.layers[i].mlp.up_proj.weight for i in (0, 1))
    assert not merged.config.tie_word_embeddings and first is not second and torch.equal(first, second)


# ---------------------------------------------------------------------------------------------------------------------
# The generation config


def test_the_generation_config_is_the_sources_own_with_every_stop_token(tmp_path: Path) -> None:
    own = {
        "temperature": 0.6,
        "top_k": 20,
        "do_sample": True,
        "max_length": 33,
        "repetition_penalty": 1.1,
        "eos_token_id": [9, 2],
    }
    random_model(CONFIG, 0).save_pretrained(tmp_path / "source")
    (tmp_path / "source/generation_config.json").write_text(json.dumps(own))
    model = load_model(tmp_path / "source")
    before = model.generation_config.to_dict()
    for number, kept in enumerate((model, adapted(model, target_modules=["q_proj"]))):
        save_model(kept, words(), tmp_path / f"saved{number}", stop_ids={7})
        found = json.loads((tmp_path / f"saved{number}/generation_config.json").read_text())
        assert {key: found[key] for key in own} == own | {"eos_token_id": [2, 7, 9]}
        assert (found["pad_token_id"], found["bos_token_id"]) == (0, 1)
    assert model.generation_config.to_dict() == before


def test_padding_and_bos_of_the_sources_generation_config_stay(tmp_path: Path) -> None:
    model: Any = random_model(CONFIG, 0)
    model.generation_config.update(pad_token_id=5, bos_token_id=6)
    save_model(model, words(), tmp_path / "saved")
    found = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert (found["pad_token_id"], found["bos_token_id"], found["eos_token_id"]) == (5, 6, 2)


def test_a_new_model_is_greedy_as_transformers_has_it(tmp_path: Path) -> None:
    save_model(random_model(CONFIG, 0), words(), tmp_path / "new")
    found = GenerationConfig.from_pretrained(tmp_path / "new")
    assert not found.do_sample and (found.eos_token_id, found.pad_token_id, found.bos_token_id) == (2, 0, 1)


def test_a_generation_config_that_transformers_refuses_to_write_loses_no_model(tmp_path: Path) -> None:
    model: Any = random_model(CONFIG, 0)
    model.generation_config.update(temperature=0.3, do_sample=False)
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "refused")
    save_model(model, words(), tmp_path / "saved")
    assert json.loads((tmp_path / "saved/generation_config.json").read_text())["temperature"] == 0.3
    assert load_model(tmp_path / "saved").generation_config.temperature == 0.3
