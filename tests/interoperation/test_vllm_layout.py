"""Folders that isdaa writes hold what vLLM looks for (`vllm_layout.py` says what, and from where that is known)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from vllm_layout import adapter_defects, model_defects

from isdaa.models.loading import load_model, load_tokenizer, save_model

TURN_END = "<|im_end|>"


@pytest.mark.parametrize("run", ["full", "lora"])
def test_a_final_model_is_one_that_vllm_loads(home: Path, run: str) -> None:
    assert model_defects(home / run / "model", TURN_END) == []  # of `lora` the merged one


def test_a_checkpoint_is_one_but_for_the_states_beside_it(home: Path) -> None:
    found = model_defects(home / "full" / "checkpoints" / "checkpoint-2", TURN_END)
    # vLLM passes over the optimiser's files: it takes `*.safetensors` where there are any.
    assert found == ["pickles lie beside the weights"]


def test_shards_come_with_an_index(home: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(home / "full" / "model"), load_tokenizer(home / "full" / "model")
    original = model.save_pretrained
    model.save_pretrained = lambda folder: original(folder, max_shard_size="20KB")  # type: ignore[method-assign]
    save_model(model, tokenizer, tmp_path / "sharded", stop_ids=[tokenizer.convert_tokens_to_ids(TURN_END)])
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert model_defects(tmp_path / "sharded", TURN_END) == []


def test_a_checkpoint_of_lora_is_an_adapter_that_vllm_serves(home: Path) -> None:
    assert adapter_defects(home / "lora" / "checkpoints" / "checkpoint-2", home / "my_model") == []


def _renamed(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({f"base_model.{name}": tensor for name, tensor in weights.items()}, folder / "model.safetensors")


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _edited(name: str, **changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | changes))

    return edit


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (_renamed, "does not have"),
        (_without("tokenizer.json"), "tokenizer.json"),
        (_without("generation_config.json"), "generation_config"),
        (_without("chat_template.jinja"), "chat template"),
        (_edited("config.json", architectures=None), "architecture"),
        (_edited("generation_config.json", eos_token_id=1), "stops at"),
    ],
)
def test_the_list_sees_a_damaged_model(home: Path, tmp_path: Path, damage: Callable[[Path], None], word: str) -> None:
    folder = Path(shutil.copytree(home / "full" / "model", tmp_path / "model"))
    damage(folder)
    assert any(word in line for line in model_defects(folder, TURN_END))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (_without("adapter_model.safetensors"), "adapter_model"),
        (_edited("adapter_config.json", use_dora=True), "use_dora"),
        (_edited("adapter_config.json", modules_to_save=["lm_head"]), "modules_to_save"),
        (_edited("adapter_config.json", rank_pattern={"q_proj": 2}), "rank_pattern"),
        (_edited("adapter_config.json", r=8), "shape"),
    ],
)
def test_the_list_sees_a_damaged_adapter(home: Path, tmp_path: Path, damage: Callable[[Path], None], word: str) -> None:
    folder = Path(shutil.copytree(home / "lora" / "checkpoints" / "checkpoint-2", tmp_path / "adapter"))
    damage(folder)
    assert any(word in line for line in adapter_defects(folder, home / "my_model"))


def test_the_list_sees_an_adapter_on_the_embeddings(home: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(load_model(home / "my_model"), LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    assert any("no linear layer" in line for line in adapter_defects(tmp_path, home / "my_model"))
