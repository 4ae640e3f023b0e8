"""Whether the disks have room for what a stage will write: asked before days of work end at a full one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from isdaa.config import LoraConfig, OptimisationConfig
from isdaa.disk import check_room, in_units
from isdaa.distributed import once, world_size
from isdaa.training.run_folder import Run
from isdaa.training.stage_inputs import cache_folder
from isdaa.training.trainer.checkpoints import checkpoints, step_of
from isdaa.training.trainer.training_arguments import STATES, save_steps, total_steps

LOGPS = 8  # bytes a pair: two float32
ID, CHARACTERS = 6, 4  # bytes of a token id in JSON, and of a token's text
ADAPTER_BYTES = 4  # a weight of an adapter, which peft keeps in float32


def check_training(
    run: Run,
    stage: str,
    model: nn.Module,
    settings: OptimisationConfig,
    rows: int,
    *,
    folder: Path,
    limit: int | None,
    lora: LoraConfig | None = None,
    best: bool = False,
    logps: int = 0,
) -> None:
    """Raises UserError where a stage that trains `model` on `rows` rows will not find the room for its files.

    folder: of its checkpoints, of which `limit` stay (None: all). lora: of the adapter, which is then what they hold.
    best: a best model is kept, too. logps: pairs of which some will be computed, each once.
    """
    weights = float(sum(p.numel() * p.element_size() for p in model.parameters()))
    trained = [p for p in model.parameters() if p.requires_grad] or list(model.parameters())
    count, size = sum(p.numel() for p in trained), float(sum(p.numel() * p.element_size() for p in trained))
    if lora is not None and lora.rank:
        count = count if hasattr(model, "peft_config") else adapter_weights(model, lora)
        size = float(ADAPTER_BYTES * count)
    tensors, beside = STATES[settings.optimizer]
    checkpoint = (size if lora is not None and lora.rank else weights) + tensors * size + beside * count
    steps = total_steps(settings, rows, world_size())
    to_come = checkpoints_to_come(folder, steps, save_steps(settings, steps), limit)
    models = 3 if best else 1  # the last best one stays until the next is whole
    needs = {folder: checkpoint * to_come + models * weights}
    needs[cache_folder(run)] = float(LOGPS * logps)
    parts = f"{_several(to_come, 'checkpoint')} of {in_units(checkpoint)}, {_several(models, 'model')} of {in_units(weights)}"
    how = f"or choose another output_dir{', or keep fewer checkpoints (--align.save_total_limit)' if stage == 'align' else ''}"
    once(lambda: check_room(f"the {stage} stage", needs, how, parts))


def _several(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def checkpoints_to_come(folder: Path, steps: int, every: int, limit: int | None) -> int:
    """How many checkpoints a run will hold at a time, beside those that are there; one is whole before an old one goes."""
    most = -(-steps // every) if limit is None else min(-(-steps // every), limit + 1)
    there = [path for path in checkpoints(folder) if (path / "trainer_state.json").is_file()]
    left = -(-(steps - step_of(there[-1])) // every) if there else most  # none after the last one: the model alone is missing
    return max(min(left, max(most - len(there), 1)), 0)


def adapter_weights(model: nn.Module, lora: LoraConfig) -> int:
    """Weights of a low-rank adapter on the linear layers that it names; on all but the head for `all-linear`."""
    names = lora.target_modules
    ends: Iterable[str] = () if names == "all-linear" else ([names] if isinstance(names, str) else names)
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    layers = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head and (not ends or any(name.endswith(end) for end in ends))
    ]
    return sum(lora.rank * (layer.in_features + layer.out_features) for layer in layers)


def check_labels(run: Run, rows: Sequence[Any]) -> None:
    """Raises UserError where responses to `rows`, and the pairs of them, find no room.

    Nobody knows how long responses will be: an eighth of what they may be is counted, less what is there already. Where that is
    too little, the stage ends at a full disk and goes on when there is room.
    """
    settings = run.config.label
    folder = run.folder / "pairs"
    response = settings.max_new_tokens / 8 * ID
    size, there = 0.0, folder / "responses.jsonl"
    for row in rows:
        prompt = len(row["prompt_ids"]) * (ID + CHARACTERS)
        pairs = 1 if settings.pairing == "best_worst" else settings.samples // 2
        size += settings.samples * response + pairs * (prompt + 2 * response * (1 + CHARACTERS / ID))
    written = min(there.stat().st_size if there.is_file() else 0, len(rows) * settings.samples * response)
    once(lambda: check_room("the label stage", {folder: size - written}, "or choose another output_dir"))
