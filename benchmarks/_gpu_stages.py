"""What `gpu_stages.py` runs: its cells, the model and data they share, and each cell's configuration, made from the recipes.

Legend: B rows of one forward pass. A row is a pair for `align` and `reward`, an example for `sft`, a response for `label` and
`evaluate`.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _gpu_model import LLAMA_3B, make_model
from shapes import SHAPES, TINY_SHAPE, TINY_VOCABULARY, Lengths, Shape, Size, draw_pairs, lengths_of, tiny

from isdaa.config import Config, load_config
from isdaa.files import write_json, write_jsonl
from isdaa.foreign import read_json
from isdaa.manifest import MANIFEST

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SEED = 0
TRAINING = ("sft", "reward", "align")
NEEDS_TRL = ("sft", "reward", "embedded")  # the experiment begins with `sft`
JUDGE, POLICY, BASE = "judge", "policy", "base"  # model folders
RANK = 16
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Cell:
    """One process's work."""

    stage: str
    lora: bool = False
    checkpointing: bool = False
    saves: bool = False  # whether checkpoints and the final model are written

    @property
    def name(self) -> str:
        """As the option --cells takes it."""
        if self.stage not in TRAINING:
            return self.stage
        return f"{self.stage}-{'lora' if self.lora else 'full'}{'-checkpointing' if self.checkpointing else ''}"


# The most telling first: time may run out.
CELLS = [
    Cell("align", checkpointing=True),
    Cell("align", lora=True, checkpointing=True, saves=True),
    Cell("label"),
    Cell("evaluate"),
    Cell("sft", checkpointing=True),
    Cell("reward", checkpointing=True),
    Cell("align"),
    Cell("align", lora=True),
    Cell("sft", lora=True, checkpointing=True),
    Cell("sft"),
    Cell("sft", lora=True),
    Cell("reward"),
    Cell("embedded"),
]


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    size: Size
    shape: Shape
    longest: int  # no prompt and no response has more than half of it
    steps: int  # optimiser steps of a training cell
    rows_a_step: int
    batches: tuple[int, ...]  # B of training; the next one is tried where memory does not suffice
    prompts: int  # of `label` and `evaluate`
    new_tokens: int
    embedded: dict[str, Any]  # over configs/mini/demo.yaml


# About 50 million parameters in the layers. Learning rates by the width, from the demo's; nobody has tuned them.
EMBEDDED = {
    "model.tokenizer": "world:medium", "data.sft": "world:medium", "data.prompts": "world:medium",
    "data.evaluation": "world:medium",
    "model.random.hidden_size": 640, "model.random.intermediate_size": 1728, "model.random.num_hidden_layers": 10,
    "model.random.num_attention_heads": 10, "model.random.num_key_value_heads": 10, "model.random.initializer_range": 0.04,
    "sft.learning_rate": 5e-4, "align.learning_rate": 3e-5,
}  # fmt: skip
TINY_EMBEDDED = {
    "model.random.hidden_size": 16, "model.random.intermediate_size": 24, "model.random.num_hidden_layers": 1,
    "model.random.num_attention_heads": 2, "model.random.num_key_value_heads": 1,
    "data.limit": 32, "sft.max_steps": 2, "align.max_steps": 4, "align.save_steps": 1, "align.batch_size": 4,
    "sft.batch_size": 8, "label.max_new_tokens": 6, "evaluation.max_new_tokens": 6, "evaluation.prompts": 8,
    "evaluation.bootstrap": 100,
}  # fmt: skip
SCALES = {
    "3b": Scale(LLAMA_3B, SHAPES["tldr"], 1024, 8, 32, (16, 4), 128, 128, EMBEDDED),
    "tiny": Scale(tiny(TINY_VOCABULARY), TINY_SHAPE, 64, 4, 8, (4, 2), 6, 5, TINY_EMBEDDED),
}
WARMUP = 2  # steps that do not count


# ---------------------------------------------------------------------------------------------------------------------
# What all cells share


def prepared(folder: Path, scale: Scale) -> bool:
    """Whether `prepare` has finished there, for this scale."""
    found = folder / "prepared.json"
    return found.is_file() and read_json(found) == {"parameters": scale.size.parameters}


def prepare(folder: Path, scale: Scale, device: str) -> None:
    """Random weights in fp32 with their tokenizer, a policy and a reward model made of the same files, and the data."""
    import torch
    from _words import as_text, word_tokenizer

    from isdaa.models.saving import save_model

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = word_tokenizer(scale.size.vocabulary)
    model = make_model(scale.size, torch.float32, device, "sdpa")
    save_model(model, tokenizer, folder / BASE)
    norm = 1.02 * model.model.norm.weight.detach().cpu()
    score = torch.randn(1, scale.size.hidden, generator=torch.Generator().manual_seed(SEED)) / scale.size.hidden**0.5
    _variant(folder, POLICY, {"model.norm.weight": norm}, {})
    _variant(
        folder,
        JUDGE,
        {"score.weight": score},
        {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
    )
    pairs = _pairs(scale, rows_needed(scale))
    texts = [as_text(pair) for pair in pairs]
    write_jsonl(folder / "pairs.jsonl", texts)
    write_jsonl(folder / "sft.jsonl", ({"prompt": t["prompt"], "completion": t["chosen"]} for t in texts))
    write_jsonl(folder / "prompts.jsonl", ({"id": str(i), "prompt": t["prompt"]} for i, t in enumerate(texts)))
    write_json(folder / "prepared.json", {"parameters": scale.size.parameters})


def rows_needed(scale: Scale) -> int:
    """Rows for all steps, and a few that `align` holds out."""
    return max(scale.steps * scale.rows_a_step, scale.prompts) + 16


def _variant(folder: Path, name: str, tensors: dict[str, Any], config: dict[str, Any]) -> None:
    """The base with some tensors replaced or added, its large files linked and not copied."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    base, new, own = folder / BASE, folder / name, "own.safetensors"
    new.mkdir()
    where = {}
    for file in base.iterdir():
        if file.suffix == ".safetensors":
            linked = f"linked-{file.name}"
            (new / linked).symlink_to(os.path.relpath(file, new))
            with safe_open(file, framework="pt") as shard:
                where |= dict.fromkeys(shard.keys(), linked)
        elif file.name not in ("config.json", INDEX, MANIFEST):
            shutil.copy(file, new / file.name)
    save_file(tensors, new / own, metadata={"format": "pt"})
    write_json(new / INDEX, {"metadata": {}, "weight_map": where | dict.fromkeys(tensors, own)})
    write_json(new / "config.json", read_json(base / "config.json") | config)


def _pairs(scale: Scale, count: int) -> list[dict[str, list[int]]]:
    return draw_pairs(scale.shape, scale.size.vocabulary, count, SEED, scale.longest)


# ---------------------------------------------------------------------------------------------------------------------
# One cell


def config_of(cell: Cell, scale: Scale, folder: Path, run: Path, batch: int, precision: str) -> Config:
    """The recipe of the cell's stage with this model, this data, and a few steps.

    folder: of `prepare`; run: where the stage works. precision: the recipes' is bfloat16; a CPU test takes float32.
    """
    recipe, stage = {"reward": "gold", "evaluate": "align"}.get(cell.stage, cell.stage), cell.stage
    given: dict[str, Any] = {"output_dir": str(run), "model.path": str(folder / BASE), "reference.cache_dir": str(run / "cache")}
    if stage in TRAINING:
        given |= {
            f"{stage}.max_steps": scale.steps,
            f"{stage}.batch_size": batch,
            f"{stage}.gradient_accumulation_steps": scale.rows_a_step // batch,
            f"{stage}.gradient_checkpointing": cell.checkpointing,
            f"{stage}.precision": precision,
            f"{stage}.warmup_steps": 1,
            f"{stage}.logging_steps": 1,
            "lora.rank": RANK if cell.lora else 0,
        }
    pairs, prompts = str(folder / "pairs.jsonl"), str(folder / "prompts.jsonl")
    if stage == "sft":
        given |= {"data.sft": str(folder / "sft.jsonl")}
    elif stage == "reward":
        given |= {"data.pairs": pairs, "data.eval_pairs": pairs}
    elif stage == "label":
        given |= {"data.prompts": prompts, "data.limit": scale.prompts, "label.scorer": str(folder / JUDGE)}
        given |= {"label.max_new_tokens": scale.new_tokens, "align.precision": precision}
    else:
        given |= {"data.pairs": pairs, "data.evaluation": prompts, "evaluation.scorer": str(folder / JUDGE)}
        given |= {"align.save_steps": scale.steps, "align.eval_steps": 1000}
        given |= {"evaluation.prompts": scale.prompts, "evaluation.max_new_tokens": scale.new_tokens}
        given |= {"evaluation.opponent_samples": 1, "evaluation.bootstrap": 100}
    return load_config(CONFIGS / "tldr" / f"{recipe}.yaml", given)


def embedded_config(scale: Scale, folder: Path) -> Config:
    """The embedded experiment with a larger model."""
    return load_config(CONFIGS / "mini" / "demo.yaml", {**scale.embedded, "output_dir": str(folder)})


def lengths(cell: Cell, scale: Scale) -> list[Lengths]:
    """(prompt, response, other response) tokens of the rows that a training cell reads, as `flops_of` counts them: where the
    head or the sharing of the prompt is not needed, tokens stand where they cost the same.
    """
    drawn = lengths_of(_pairs(scale, rows_needed(scale)))
    if cell.stage == "sft":
        return [(p, c, 0) for p, c, _ in drawn]
    if cell.stage == "reward":
        return [one for p, c, r in drawn for one in ((p + c, 0, 0), (p + r, 0, 0))]
    return drawn


def tokens_a_row(cell: Cell, scale: Scale) -> float:
    """Mean tokens of a row, a pair's prompt once for `align` and twice for `reward`; padding not counted."""
    found = lengths(cell, scale)
    return sum(map(sum, found)) / rows_needed(scale)
