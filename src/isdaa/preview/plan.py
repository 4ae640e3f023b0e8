"""Memory by part, hours and disk of a stage, before it runs. What a step needs is counted by `rehearsal`."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from isdaa.config import Config, OptimisationConfig
from isdaa.models.attention.attention_choice import AUTO
from isdaa.models.attention.layout import Layout
from isdaa.models.loading import torch_dtype
from isdaa.models.packed.forward import PASS_TOKENS, cpu_pass_tokens
from isdaa.models.quantised import quantisation
from isdaa.models.sampling.decoding import PROMPT_TOKENS
from isdaa.models.sampling.kv_cache import room_of
from isdaa.objectives.objective import Objective
from isdaa.preview.devices import Speed, assumed_speed, device_of, measured_speed, product_speed
from isdaa.preview.fake_step import Kind, Rows, Setting, Stage, layout_of
from isdaa.preview.plan_batches import Batches, batches_of
from isdaa.preview.rows_seen import Examined
from isdaa.training.trainer.training_arguments import STATES

Sharding = Literal["ddp", "fsdp2", "zero2", "zero3"]
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, and constants of blocks, themselves quantised
# Memory lost to fragmentation by the C library's allocator, as a number of layers' activations (plan-check.json).
SCATTERED_LAYERS = 3
CUDA = 600e6  # bytes of a CUDA context with its kernels, assumed
CUDA_SCATTERED = 0.06  # of the memory in use, lost to fragmentation, assumed
SAMPLING_STEP = 0.03  # seconds that a GPU needs for a token of each row, assumed


@dataclass(frozen=True)
class Phase:
    """Part of a stage, with its memory in bytes by part at its peak."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.parts.values())


@dataclass
class Plan:
    """What a stage needs on each device. seconds: by activity, for the whole run; disk: bytes of all that is kept.

    tokens: of an epoch, on all devices, as the model sees them; plain: if every response were a separate row.
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
    others: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan of a stage.

    architecture: a transformers configuration. device: `cpu`, this machine's, or a name that `devices.device_of` knows. program:
    bytes of this process with its libraries and data. steps, checkpoints: of the run. speed: given, nothing is measured. others:
    configurations of `reference`, `behaviour` and `scorer`, where these are models of their own.
    """
    others = others or {}
    if examined.stage == "label":
        return _label_plan(examined, config, architecture, device, processes, program, speed, others.get("scorer"))
    settings: OptimisationConfig = getattr(config, examined.stage)
    kinds: dict[str, Kind] = {"align": "pairs", "sft": "sft", "reward": "reward"}
    setting = Setting(
        kind=kinds[examined.stage],
        architecture=architecture,
        dtype=dtype_of(config, architecture),
        precision=settings.precision,
        lora=config.lora if examined.stage != "reward" else None,
        checkpointing=settings.gradient_checkpointing,
        on_cpu=device == "cpu",
        attention=getattr(settings, "attention", AUTO),
    )
    setting = replace(setting, architecture=copy.deepcopy(architecture))
    stage = Stage(setting)
    passes = cpu_pass_tokens(stage.parameters) if setting.on_cpu else PASS_TOKENS
    split = setting.on_cpu and processes == 1 and not Objective(**config.objective.arguments()).needs_batch
    batches = batches_of(examined, config, settings, processes, passes, passes if split else None)
    memory = stage.memory(batches.heaviest, accumulating=settings.gradient_accumulation_steps > 1 or batches.pieces)
    a_step = stage.operations(batches.typical) / batches.typical.tokens  # operations a token
    if speed is None:
        speed = _speed(setting, batches.typical, device, architecture)

    weights = _weights(stage, config)
    trained = float(sum(p.numel() * p.element_size() for p in stage.trainable))
    tensors, beside = STATES[settings.optimizer]
    states = tensors * trained + beside * stage.trainable_parameters
    parts = {
        "weights": weights,
        "adapter": float(stage.adapter_bytes),
        "optimiser states": states,
        "gradients": float(memory.gradients),
        "weights cast by autocast": float(memory.casts),
        "activations": float(memory.activations),
        "logits": float(memory.logits),
    }
    if _is_quantised(stage, config):
        parts["dequantised weights"] = float(stage.largest_linear * setting.dtype.itemsize)
    if processes > 1:
        rest = stage.rest_bytes * (1 if stage.adapter_bytes else 2)  # its gradients, too, are whole for a moment
        parts |= _shared(parts, sharding, processes, trained, float(stage.largest_layer), float(rest))
    layers = max(1, int(getattr(architecture.get_text_config(), "num_hidden_layers", 1) or 1))
    kept = 0.0
    if device == "cpu" and setting.kind == "pairs":
        whole = memory if not setting.checkpointing else Stage(replace(setting, checkpointing=False)).memory(batches.heaviest)
        kept = SCATTERED_LAYERS * whole.activations / layers
    phases = [Phase("training", _around(parts, device, program, kept))]
    if examined.stage == "sft" and processes > 1 and sharding in ("fsdp2", "zero3"):
        phases.insert(0, Phase("loading the model", _around({"weights": weights}, device, program, 0.0)))  # before it is divided
    result = Plan(examined.stage, device, phases, speed, stage.parameters, stage.trainable_parameters)
    result.tokens, result.plain = batches.tokens, batches.plain

    steps = steps or batches.steps
    share = result.tokens / _at_once(device, processes)
    epoch = share * a_step / speed.operations + batches.steps * stage.trainable_parameters / speed.parameters
    result.epoch_seconds, result.step_seconds = epoch, epoch / batches.steps
    result.seconds["training"] = result.step_seconds * steps
    if examined.stage == "align":
        _add_passes(result, examined, config, stage, batches, steps, processes, program, others)
    result.checkpoint = (float(stage.adapter_bytes) or float(stage.weight_bytes)) + states
    models = 2 if examined.stage == "align" and config.guard.keep == "best" else 1  # the final one, and the best
    lies = _is_quantised(stage, config) and config.model.quantization is None
    alone = stage.adapter_bytes and (config.lora.merge is False or (lies and config.lora.merge is None))
    result.disk = result.checkpoint * (checkpoints or 0) + float(models * (stage.adapter_bytes if alone else stage.weight_bytes))
    result.disk_free = _free_disk(Path(config.output_dir))
    result.available = _memory_of(device, processes)
    if device == "cpu" and processes > 1:
        result.notes.append(f"{processes} processes share this CPU's speed and memory; the plan is for one of them")
    return result


def _is_quantised(stage: Stage, config: Config) -> bool:
    return _bytes_of_linear(stage, config) is not None


def _bytes_of_linear(stage: Stage, config: Config) -> float | None:
    """Bytes of a weight of a linear layer, where these are quantised: by this run, or in their folder."""
    if stage.setting.kind == "reward":
        return None
    lies = quantisation(stage.setting.architecture) or ""
    return NF4 if config.model.quantization is not None or lies.endswith("4 bits") else 1.0 if lies.endswith("8 bits") else None


def _weights(stage: Stage, config: Config) -> float:
    """Bytes of a policy's weights, an adapter's left out."""
    size = _bytes_of_linear(stage, config)
    return stage.weight_bytes + (0.0 if size is None else stage.linear * (size - stage.setting.dtype.itemsize))


def _at_once(device: str, processes: int) -> int:
    """How many processes compute at the speed of one alone: on a CPU they share what there is."""
    return 1 if device == "cpu" else processes


def _add_passes(
    result: Plan,
    examined: Examined,
    config: Config,
    stage: Stage,
    batches: Batches,
    steps: int,
    processes: int,
    program: float,
    others: Mapping[str, Any],
) -> None:
    """Logps of reference and behaviour policy before training, and held-out figures during it: passes without gradients."""
    held = int(examined.held_lengths.sum()) if examined.held_lengths is not None else 0
    rate = result.speed.operations * _at_once(result.device, processes)
    before: dict[str, float] = {}
    for number, name in enumerate(("reference", *(name for name in ("behaviour",) if name in others))):
        model = stage if name not in others else _another(stage, config, others[name])
        memory = model.memory(batches.reference, train=False)
        parts = {"weights": _weights(stage, config)}  # the policy is there already
        if model is not stage:
            parts["weights of the other model"] = float(model.weight_bytes)
        parts |= {"weights cast by autocast": float(memory.casts), "activations": float(memory.activations)}
        parts["logits"] = float(memory.logits)
        result.phases.insert(number, Phase(f"{name} logps", _around(parts, result.device, program, 0.0)))
        before[f"{name} logps"] = (result.tokens + held) * _forward(model, batches) / rate
    result.seconds = {**before, **result.seconds}
    if held:
        every = config.align.eval_steps or config.align.save_steps or max(1, -(-steps // 10))
        result.seconds["held-out pairs"] = -(-steps // every) * held * _forward(stage, batches) / rate
    if config.guard.steps is not None:
        beside = "" if stage.adapter_bytes else f" and its reference model ({stage.weight_bytes / 1e9:.2f} GB)"
        result.notes.append(f"not included: the guard's samples and scores{beside}")


def _another(stage: Stage, config: Config, architecture: Any) -> Stage:
    """A reference or behaviour model of its own, loaded as the policy is."""
    dtype = dtype_of(config, architecture)
    return Stage(replace(stage.setting, architecture=copy.deepcopy(architecture), dtype=dtype, lora=None, checkpointing=False))


def _forward(stage: Stage, batches: Batches) -> float:
    """Operations a token without gradients."""
    return stage.operations(batches.typical, train=False) / batches.typical.tokens


def _shared(
    parts: dict[str, float], sharding: Sharding, processes: int, trained: float, layer: float, rest: float
) -> dict[str, float]:
    """The parts that lie in shards, and what a process has beside its own. rest: embedding, head and last norm, gathered
    together and for as long as a micro-batch takes."""
    changed: dict[str, float] = {}
    if sharding == "ddp":
        return {"gradients being reduced": trained}
    changed["optimiser states"] = parts["optimiser states"] / processes
    changed["gradients"] = trained / processes
    if sharding in ("fsdp2", "zero3"):
        changed["weights"] = parts["weights"] / processes
        changed["gathered layers"] = 3 * layer + rest  # one in use, the next on its way, the gradients of one
    else:
        changed["gradients being reduced"] = layer
    return changed


def _around(parts: dict[str, float], device: str, program: float, kept: float) -> dict[str, float]:
    """The parts, with what a device needs whatever runs on it; those that are nothing left out."""
    if device == "cpu":
        parts = {"program and data": program, **parts, "fragmentation": kept}
    else:
        parts = {"CUDA": CUDA, **parts, "fragmentation": CUDA_SCATTERED * sum(parts.values())}
    return {name: size for name, size in parts.items() if size > 0}


def _speed(setting: Setting, batch: Layout | Rows, device: str, architecture: Any) -> Speed:
    if device != "cpu":
        both = (str(setting.dtype).removeprefix("torch."), setting.precision)
        return assumed_speed(device_of(device), "bfloat16" if "bfloat16" in both else "float32")
    text = architecture.get_text_config()
    hidden, vocabulary = int(getattr(text, "hidden_size", 1024)), int(getattr(text, "vocab_size", 0))
    if hidden * vocabulary > 2e8:  # the embedding alone would need gigabytes
        return product_speed(hidden, int(getattr(text, "intermediate_size", 4 * hidden)), setting.dtype)
    return measured_speed(setting, batch)


def dtype_of(config: Config, architecture: Any) -> torch.dtype:
    """Of the weights in memory; `auto` is the file's."""
    return torch_dtype(config.model.dtype) or getattr(architecture, "dtype", None) or torch.float32


def _memory_of(device: str, processes: int) -> float | None:
    """Bytes for one process."""
    if device != "cpu":
        return device_of(device).memory
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return (int(line.split()[1]) * 1024.0 + own_memory()) / processes
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
# Sampling


def _label_plan(
    examined: Examined,
    config: Config,
    architecture: Any,
    device: str,
    processes: int,
    program: float,
    speed: Speed | None,
    scorer: Any,
) -> Plan:
    """Sampling: memory of weights, keys and values, and a scorer's weights; time where it can be said at all."""
    settings, dtype = config.label, dtype_of(config, architecture)
    stage = Stage(Setting("pairs", copy.deepcopy(architecture), dtype=dtype, on_cpu=device == "cpu"))
    if speed is None:
        batch = layout_of([(int(examined.lengths.mean()), [(16, 16)])] * 8)
        speed = _speed(stage.setting, batch, device, architecture)
    held = {"weights": _weights(stage, config)}
    if scorer is not None:
        held["weights of the scorer"] = float(Stage(Setting("reward", copy.deepcopy(scorer))).weight_bytes)
    longest, rows = int(examined.lengths.max()), settings.batch_size
    width = room_of(longest, longest + settings.max_new_tokens)
    prompts = min(len(examined.lengths), -(-rows // settings.samples))  # of a batch, each computed once
    together = max(1, min(prompts, PROMPT_TOKENS.get("cpu" if device == "cpu" else "cuda", 2**16) // longest))
    memory = stage.memory(layout_of([(max(1, longest - 2), [(1, 1)])] * together), train=False)
    reading = {"keys and values": _cached(architecture, prompts * longest, dtype), "activations": float(memory.activations)}
    writing = {"keys and values": _cached(architecture, rows * width, dtype), "logits": 3.0 * rows * stage.vocabulary * 4}
    both = (("prompts", reading), ("sampling", writing))
    phases = [Phase(name, _around({**held, **parts}, device, program, 0.0)) for name, parts in both]
    result = Plan("label", device, phases, speed, stage.parameters, 0)
    responses = settings.samples * len(examined.lengths)
    tokens = int(examined.lengths.sum()) + responses * settings.max_new_tokens
    seconds = 2.0 * stage.parameters * tokens / _at_once(device, processes) / speed.operations
    if device != "cpu":
        batches = -(-responses // (rows * processes))
        seconds = max(seconds, SAMPLING_STEP * batches * settings.max_new_tokens)
    result.seconds["sampling, at most"] = seconds
    result.tokens, result.available = tokens, _memory_of(device, processes)
    what = "scoring" if scorer is not None or settings.scorer == "gold" else "the scorer, whose size is not known yet,"
    result.notes.append(f"not included: {what} and the behaviour logps of the samples")
    return result


def _cached(architecture: Any, tokens: int, dtype: torch.dtype) -> float:
    """Bytes of the keys and values of so many tokens."""
    text = architecture.get_text_config()
    heads: Any = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", 1)
    size: Any = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2.0 * text.num_hidden_layers * heads * size * tokens * dtype.itemsize
