"""Memory by part, hours and disk of a stage, before it runs. What a step needs is counted by `rehearsal`."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from isdaa.config import Config, OptimisationConfig
from isdaa.models.layout import Layout
from isdaa.models.loading import torch_dtype
from isdaa.training.batches import GlobalBatchSampler
from isdaa.training.devices import PRESETS, Speed, assumed_speed, measured_speed, product_speed
from isdaa.training.examine import Examined
from isdaa.training.rehearsal import Kind, Rows, Setting, Stage, layout_of

Sharding = Literal["ddp", "fsdp2", "zero2", "zero3"]
SHARDINGS = ("ddp", "fsdp2", "zero2", "zero3")
REFERENCE_TOKENS = 16_384  # of a pass of `training.reference`
STATES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "rmsprop": 4, "sgd": 0}  # bytes a trained weight
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, and constants of blocks, themselves quantised
# The C library's allocator hands memory on in pieces that do not quite fit, in layers' worth of activations (plan-check.json).
SCATTERED_LAYERS = 3
CUDA = 600e6  # bytes of a CUDA context with its kernels, assumed
CUDA_SCATTERED = 0.06  # of the memory in use, lost between pieces, assumed
SAMPLING_STEP = 0.03  # seconds that a GPU needs for a token of each row, assumed


@dataclass(frozen=True)
class Phase:
    """Part of a stage, with its memory in bytes by part at the worst moment."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.parts.values())


@dataclass
class Plan:
    """What a stage needs on each device. seconds: by activity, for the whole run; disk: bytes of all that is kept.

    tokens: of an epoch, on all devices, as the model sees them; plain: were every response a row of its own.
    """

    stage: str
    device: str
    phases: list[Phase]
    speed: Speed
    parameters: int
    trainable: int
    seconds: dict[str, float] = field(default_factory=dict)
    epoch_seconds: float | None = None
    step_seconds: float | None = None
    available: float | None = None
    tokens: int = 0
    plain: int | None = None
    checkpoint: float = 0.0
    disk: float = 0.0
    disk_free: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)

    def facts(self) -> dict[str, Any]:
        """Plain data for a file. Bytes and seconds."""
        names = ("device", "parameters", "trainable", "seconds", "epoch_seconds", "step_seconds", "available", "tokens", "plain")
        found = {name: getattr(self, name) for name in (*names, "checkpoint", "disk", "disk_free", "notes")}
        phases = [{"name": p.name, "parts": p.parts, "total": p.total} for p in self.phases]
        return {**found, "phases": phases, "peak": self.peak.total, "speed": asdict(self.speed)}


def plan(
    examined: Examined,
    config: Config,
    architecture: Any,
    *,
    device: str = "cpu",
    processes: int = 1,
    sharding: Sharding = "ddp",
    program: float = 0.0,
    steps: int | None = None,
    checkpoints: int | None = None,
    speed: Speed | None = None,
) -> Plan:
    """The plan of a stage.

    architecture: a transformers configuration. device: `cpu`, this machine's, or one of `devices.PRESETS`. program: bytes of
    this process with its libraries and data. steps, checkpoints: of the run. speed: given, nothing is measured.
    """
    if examined.stage == "label":
        return _label_plan(examined, config, architecture, device, processes, program)
    settings: OptimisationConfig = getattr(config, examined.stage)
    kinds: dict[str, Kind] = {"align": "pairs", "sft": "sft", "reward": "reward"}
    setting = Setting(
        kind=kinds[examined.stage],
        architecture=architecture,
        dtype=_dtype(config, architecture),
        precision=settings.precision,
        lora=config.lora if examined.stage != "reward" else None,
        checkpointing=settings.gradient_checkpointing,
        on_cpu=device == "cpu",
    )
    setting = replace(setting, architecture=copy.deepcopy(architecture))
    batches = batches_of(examined, config, settings, processes)
    stage = Stage(setting)
    memory = stage.memory(batches.heaviest, accumulating=settings.gradient_accumulation_steps > 1)
    a_step = stage.operations(batches.typical) / batches.typical.tokens  # operations a token
    if speed is None:
        speed = _speed(setting, batches.typical, device, architecture)

    weights = float(stage.weight_bytes)
    if config.model.quantization is not None:
        weights += stage.linear * NF4 - stage.linear * setting.dtype.itemsize
    states = float(STATES[settings.optimizer] * stage.trainable_parameters)
    trained = float(sum(p.numel() * p.element_size() for p in stage.trainable))
    parts = {
        "weights": weights,
        "adapter": float(stage.adapter_bytes),
        "optimiser states": states,
        "gradients": float(memory.gradients),
        "weights cast by autocast": float(memory.casts),
        "activations": float(memory.activations),
        "logits": float(memory.logits),
    }
    if config.model.quantization is not None:
        parts["weights taken out of 4 bits"] = float(stage.largest_linear * setting.dtype.itemsize)
    if processes > 1:
        parts |= _shared(parts, sharding, processes, trained, float(stage.largest_layer))
    layers = max(1, int(getattr(architecture.get_text_config(), "num_hidden_layers", 1) or 1))
    kept = 0.0
    if device == "cpu" and setting.kind == "pairs":
        whole = memory if not setting.checkpointing else Stage(replace(setting, checkpointing=False)).memory(batches.heaviest)
        kept = SCATTERED_LAYERS * whole.activations / layers
    phases = [Phase("training", _around(parts, device, program, kept))]
    result = Plan(examined.stage, device, phases, speed, stage.parameters, stage.trainable_parameters)
    result.tokens, result.plain = batches.tokens, batches.plain

    steps = steps or batches.steps
    share = result.tokens / processes
    epoch = share * a_step / speed.operations + batches.steps * stage.trainable_parameters / speed.parameters
    result.epoch_seconds, result.step_seconds = epoch, epoch / batches.steps
    result.seconds["training"] = result.step_seconds * steps
    if examined.stage == "align":
        _add_passes(result, examined, config, stage, batches, steps, processes, program, weights)
    result.checkpoint = (float(stage.adapter_bytes) or float(stage.weight_bytes)) + states
    result.disk = result.checkpoint * (checkpoints or 0) + float(stage.weight_bytes)
    result.disk_free = _free_disk(Path(config.output_dir))
    result.available = _memory_of(device)
    return result


def _add_passes(
    result: Plan,
    examined: Examined,
    config: Config,
    stage: Stage,
    batches: Batches,
    steps: int,
    processes: int,
    program: float,
    weights: float,
) -> None:
    """Reference logps before training, and held-out figures during it: passes without gradients."""
    forward = stage.operations(batches.typical, train=False) / batches.typical.tokens
    memory = stage.memory(batches.reference, train=False)
    parts = {"weights": weights, "activations": float(memory.activations), "logits": float(memory.logits)}
    result.phases.insert(0, Phase("reference logps", _around(parts, result.device, program, 0.0)))
    held = int(examined.held_lengths.sum()) if examined.held_lengths is not None else 0
    rate = result.speed.operations * processes
    result.seconds = {"reference logps": (result.tokens + held) * forward / rate, **result.seconds}
    if held:
        every = config.align.eval_steps or config.align.save_steps or max(1, -(-steps // 10))
        result.seconds["held-out pairs"] = -(-steps // every) * held * forward / rate


def _shared(parts: dict[str, float], sharding: Sharding, processes: int, trained: float, layer: float) -> dict[str, float]:
    """The parts that lie in shards, and what a process has beside its own."""
    changed: dict[str, float] = {}
    if sharding == "ddp":
        return {"gradients on their way": trained}
    changed["optimiser states"] = parts["optimiser states"] / processes
    changed["gradients"] = trained / processes
    if sharding in ("fsdp2", "zero3"):
        changed["weights"] = parts["weights"] / processes
        changed["layers gathered"] = 3 * layer  # one in use, the next on its way, the gradients of one
    else:
        changed["gradients on their way"] = layer
    return changed


def _around(parts: dict[str, float], device: str, program: float, kept: float) -> dict[str, float]:
    """The parts, with what a device needs whatever runs on it; those that are nothing left out."""
    if device == "cpu":
        parts = {"program and data": program, **parts, "between pieces": kept}
    else:
        parts = {"CUDA": CUDA, **parts, "between pieces": CUDA_SCATTERED * sum(parts.values())}
    return {name: size for name, size in parts.items() if size > 0}


def _speed(setting: Setting, batch: Layout | Rows, device: str, architecture: Any) -> Speed:
    if device != "cpu":
        both = (str(setting.dtype).removeprefix("torch."), setting.precision)
        return assumed_speed(PRESETS[device], "bfloat16" if "bfloat16" in both else "float32")
    text = architecture.get_text_config()
    hidden, vocabulary = int(getattr(text, "hidden_size", 1024)), int(getattr(text, "vocab_size", 0))
    if hidden * vocabulary > 2e8:  # the embedding alone would need gigabytes
        return product_speed(hidden, int(getattr(text, "intermediate_size", 4 * hidden)), setting.dtype)
    return measured_speed(setting, batch)


def _dtype(config: Config, architecture: Any) -> torch.dtype:
    """Of the weights in memory; `auto` is the file's."""
    return torch_dtype(config.model.dtype) or getattr(architecture, "dtype", None) or torch.float32


def _memory_of(device: str) -> float | None:
    if device != "cpu":
        return PRESETS[device].memory
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024.0 + own_memory()
        return None
    except OSError:
        return None


def own_memory() -> float:
    """Bytes that this process has in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * float(os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError):
        return 0.0


def _free_disk(folder: Path) -> float | None:
    for place in (folder.absolute(), *folder.absolute().parents):
        if place.is_dir():
            return float(shutil.disk_usage(place).free)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@dataclass(frozen=True)
class Batches:
    """Micro-batches of an epoch on one device. tokens: of the epoch on all of them; plain: were nothing shared."""

    heaviest: Layout | Rows
    typical: Layout | Rows
    reference: Layout | Rows
    tokens: int
    plain: int | None
    steps: int


def batches_of(examined: Examined, config: Config, settings: OptimisationConfig, processes: int) -> Batches:
    """The batches that training will see in its first epoch (of SFT, some that are as likely)."""
    size = len(examined.lengths)
    steps = -(-size // (settings.batch_size * settings.gradient_accumulation_steps * processes))
    if examined.stage != "align":
        return _padded(examined, config, settings, steps)
    groups = examined.groups
    assert groups is not None
    sampler = GlobalBatchSampler(
        size,
        settings.batch_size,
        settings.gradient_accumulation_steps,
        processes,
        0,
        config.seed if settings.seed is None else settings.seed,
        lengths=examined.lengths.sum(1),
        groups=groups if config.align.group_by_prompt else None,
    )
    micro = [[i for i in batch if i >= 0] for batch in sampler]
    budget = config.align.batch_tokens
    pieces = micro if budget is None else [piece for batch in micro for piece in _pieces(examined, batch, budget)]
    tokens = np.array([_tokens(examined, piece) for piece in pieces])
    ordinary = [i for i, piece in enumerate(pieces) if len(piece) >= np.median([len(p) for p in pieces])]
    typical = min(ordinary, key=lambda i: abs(float(tokens[i]) - float(tokens[ordinary].mean())))
    longest = np.lexsort((groups, -_longest_of_group(examined)[groups]))
    plain = int((2 * examined.lengths[:, 0] + examined.lengths[:, 1:].sum(1)).sum())
    return Batches(
        heaviest=_layout(examined, pieces[int(tokens.argmax())]),
        typical=_layout(examined, pieces[typical]),
        reference=_layout(examined, _pieces(examined, longest.tolist(), REFERENCE_TOKENS, stop=True)[0]),
        tokens=int(tokens.sum()) * processes,
        plain=plain,
        steps=steps,
    )


def _longest_of_group(examined: Examined) -> np.ndarray:
    assert examined.groups is not None
    longest = np.zeros(int(examined.groups.max()) + 1, dtype=np.int64)
    np.maximum.at(longest, examined.groups, examined.lengths.sum(1))
    return longest


def _tokens(examined: Examined, pairs: Sequence[int]) -> int:
    """Of a packed row, every prompt once."""
    assert examined.groups is not None
    _, first = np.unique(examined.groups[pairs], return_index=True)
    return int(examined.lengths[pairs, 1:].sum() + examined.lengths[np.asarray(pairs)[first], 0].sum())


def _pieces(examined: Examined, pairs: Sequence[int], budget: int, stop: bool = False) -> list[list[int]]:
    """Consecutive pieces of at most so many tokens, prompts counted with every pair; only the first one where `stop`."""
    pieces: list[list[int]] = [[]]
    used = 0
    for i in pairs:
        cost = int(examined.lengths[i].sum())
        if pieces[-1] and used + cost > budget:
            if stop:
                break
            pieces.append([])
            used = 0
        pieces[-1].append(i)
        used += cost
    return pieces


def _layout(examined: Examined, pairs: Sequence[int]) -> Layout:
    assert examined.groups is not None
    prompts: dict[int, tuple[int, list[tuple[int, int]]]] = {}
    for i in pairs:
        prompt, chosen, rejected = (int(n) for n in examined.lengths[i])
        prompts.setdefault(int(examined.groups[i]), (prompt, []))[1].append((chosen, rejected))
    return layout_of(list(prompts.values()))


def _padded(examined: Examined, config: Config, settings: OptimisationConfig, steps: int) -> Batches:
    """Rows in a random order, padded to the longest of a micro-batch; a reward model reads a pair as two rows."""
    pair = examined.stage == "reward"
    lengths = examined.lengths
    rows = np.concatenate([lengths[:, :1] + lengths[:, 1:2], lengths[:, :1] + lengths[:, 2:]], 1) if pair else lengths
    order = np.random.default_rng(config.seed).permutation(len(rows))
    size = min(settings.batch_size, len(rows))
    longest = np.array([rows[order[i : i + size]].max() for i in range(0, len(rows) - size + 1, size)])
    per = size * (2 if pair else 1)

    def batch(length: float) -> Rows:
        return Rows(per, round(length), 1 if pair else round(length * (examined.learnt or 1.0)))

    heaviest, mean = batch(float(longest.max())), batch(float(longest.mean()))
    count = len(rows) / size
    return Batches(heaviest, mean, mean, round(count * per * float(longest.mean())), None, steps)


def _label_plan(examined: Examined, config: Config, architecture: Any, device: str, processes: int, program: float) -> Plan:
    """Sampling: memory of weights and keys and values; time where it can be said at all."""
    settings, text = config.label, architecture.get_text_config()
    dtype = _dtype(config, architecture)
    stage = Stage(Setting("pairs", copy.deepcopy(architecture), dtype=dtype, on_cpu=device == "cpu"))
    heads: Any = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", 1)
    size: Any = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width = int(examined.lengths.max()) + settings.max_new_tokens
    cache = 2.0 * text.num_hidden_layers * heads * size * width * settings.batch_size * dtype.itemsize
    logits = 3.0 * settings.batch_size * stage.vocabulary * 4
    parts = {"weights": float(stage.weight_bytes), "keys and values": cache, "logits": logits}
    precision = "bfloat16" if dtype.itemsize == 2 else "float32"
    if device == "cpu":
        batch = layout_of([(int(examined.lengths.mean()), [(16, 16)])] * 8)
        speed = _speed(stage.setting, batch, device, architecture)
    else:
        speed = assumed_speed(PRESETS[device], precision)
    result = Plan("label", device, [Phase("sampling", _around(parts, device, program, 0.0))], speed, stage.parameters, 0)
    responses = settings.samples * len(examined.lengths)
    batches = -(-responses // (settings.batch_size * processes))
    tokens = int(examined.lengths.sum()) + responses * settings.max_new_tokens
    seconds = 2.0 * stage.parameters * tokens / processes / speed.operations
    if device != "cpu":
        seconds = max(seconds, SAMPLING_STEP * batches * settings.max_new_tokens)
    result.seconds["sampling, at most"] = seconds
    result.tokens, result.available = tokens, _memory_of(device)
    result.notes.append("the scorer, and behaviour logps of the samples, come on top")
    return result
