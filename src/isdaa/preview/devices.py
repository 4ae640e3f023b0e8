"""How fast a device trains: measured where it is here, assumed where it is not."""

from __future__ import annotations

import copy
import functools
import os
import re
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from isdaa.errors import UserError, nearest
from isdaa.models.attention.layout import Layout
from isdaa.models.hub_access import quiet
from isdaa.preview.fake_step import Rows, Setting, Stage, layout_of

# Of a GPU's peak, what is done again under gradient checkpointing counted as work. As benchmarks/cost_estimate.py: 0.30 of
# the operations that are needed is 0.40 of those that are done where the forward pass is done twice.
ASSUMED_SHARE = {"bfloat16": 0.40, "float32": 0.60}
SHARE_OF_GPU_PRODUCT = {"bfloat16": 0.55, "float32": 0.70}  # the same, of what one large product reaches on a GPU
SHARE_OF_PRODUCT = 0.7  # of a large matrix product's speed, that a step reaches (docs/performance.md: 0.48 to 0.83)
BUDGET = 1.5e11  # operations of a step that is done to measure the speed
SECONDS = 3.0  # spent on such steps


@dataclass(frozen=True)
class Device:
    """A device by its data sheet. memory: bytes; bf16, fp32: dense peak operations a second (fp32 without TF32); measured: they
    are what one large product reaches here."""

    name: str
    memory: float
    bf16: float
    fp32: float
    measured: bool = False


PRESETS = {
    "h100": Device("H100 SXM 80 GB", 80e9, 989e12, 67e12),
    "h200": Device("H200 SXM 141 GB", 141e9, 989e12, 67e12),
    "b200": Device("B200 180 GB", 180e9, 2250e12, 75e12),
    "a100": Device("A100 80 GB", 80e9, 312e12, 19.5e12),
    "a100-40": Device("A100 40 GB", 40e9, 312e12, 19.5e12),
    "l40s": Device("L40S 48 GB", 48e9, 362e12, 91.6e12),
    "l4": Device("L4 24 GB", 24e9, 121e12, 30.3e12),
    "a6000": Device("RTX A6000 48 GB", 48e9, 154.8e12, 38.7e12),
    "rtx5090": Device("GeForce RTX 5090 32 GB", 32e9, 209.5e12, 104.8e12),
    "rtx4090": Device("GeForce RTX 4090 24 GB", 24e9, 165.2e12, 82.6e12),
    "rtx3090": Device("GeForce RTX 3090 24 GB", 24e9, 71e12, 35.6e12),
}
NAMES = ("auto", "cpu", *PRESETS)
PRESENT = "gpu"  # the GPU of this machine, where the table does not have it
OTHERS = {"pcie", "nvl", "laptop", "mig"}  # words in the names of GPUs that share a name with a faster one


@dataclass(frozen=True)
class Speed:
    """operations: a second; parameters: that the optimiser updates a second; how: where the figures come from; elsewhere:
    share of the cores that other programs had while it was measured."""

    operations: float
    parameters: float
    how: str
    measured: bool
    elsewhere: float = 0.0


def check_name(name: str) -> None:
    """Raises UserError for a device that nobody knows."""
    if name not in NAMES:
        raise UserError(f"--device {name}: one of {', '.join(NAMES)}{nearest(name, NAMES)}")


def here() -> str:
    """This machine's device: the preset of its GPU, `PRESENT` for a GPU that the table does not have, or `cpu`."""
    if not torch.cuda.is_available():
        return "cpu"
    return preset_of(torch.cuda.get_device_name(), float(torch.cuda.get_device_properties(0).total_memory)) or PRESENT


def preset_of(name: str, memory: float) -> str | None:
    """The preset of a GPU by its name and its bytes of memory; None where the table has no such one."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if words & OTHERS:
        return None
    for preset, device in PRESETS.items():
        if preset.removeprefix("rtx").partition("-")[0] in words and abs(memory / device.memory - 1) < 0.15:
            return preset
    return None


@functools.cache
def device_of(name: str) -> Device:
    """A GPU by its name in `PRESETS`, or this machine's (`PRESENT`), whose speed is then taken from one large product."""
    if name in PRESETS:
        return PRESETS[name]
    half, single = (product_on_gpu(dtype) for dtype in (torch.bfloat16, torch.float32))
    return Device(
        torch.cuda.get_device_name(), float(torch.cuda.get_device_properties(0).total_memory), half, single, measured=True
    )


def product_on_gpu(dtype: torch.dtype) -> float:
    """Operations a second of a product of two matrices of 4096 × 4096."""
    side, times = 4096, []
    a, b = (torch.randn(side, side, dtype=dtype, device="cuda") for _ in range(2))
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        _ = a @ b
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


def assumed_speed(device: Device, precision: str) -> Speed:
    """Of a GPU, by its data sheet or by one product."""
    peak = device.bf16 if precision == "bfloat16" else device.fp32
    share = (SHARE_OF_GPU_PRODUCT if device.measured else ASSUMED_SHARE)[precision]
    rate = f"{peak / 1e12:.4g} TFLOP/s"
    source = f"the {rate} that one product reaches here" if device.measured else f"the data sheet's {rate}"
    how = f"assumed: {share:.0%} of {source} in {precision}"
    return Speed(share * peak, 5e10, how, False)


def measured_speed(setting: Setting, batch: Layout | Rows) -> Speed:
    """Of this machine's CPU: a few real steps of the model with random weights.

    A large model is cut to as many of its layers, and a large batch to as many of its rows, as take about a second.
    """
    small, batch = _cut(setting, batch)
    operations = Stage(small).operations(batch)
    stage = Stage(small, real=True)
    optimiser = torch.optim.AdamW(stage.trainable, lr=0.0, fused=True)
    steps: list[float] = []
    updates: list[float] = []
    began, worked = time.perf_counter(), _work_of_others()
    while len(steps) < 3 or (time.perf_counter() - began < SECONDS and len(steps) < 50):
        start = time.perf_counter()
        stage.compute(batch)
        middle = time.perf_counter()
        optimiser.step()
        optimiser.zero_grad()
        steps.append(middle - start)
        updates.append(time.perf_counter() - middle)
    elsewhere = (_work_of_others() - worked) / (time.perf_counter() - began) / (os.cpu_count() or 1)
    seconds, update = statistics.median(steps[1:]), statistics.median(updates[1:])
    layers = _layers(small.architecture)
    whole = layers == _layers(setting.architecture)
    model = "the model" if whole else f"the model cut to {layers} layers"
    rate, threads = operations / seconds, torch.get_num_threads()
    how = f"measured: {len(steps)} steps of {model} with random weights, {rate / 1e9:.0f} GFLOP/s on {threads} threads"
    return Speed(rate, stage.trainable_parameters / update, how, True, max(0.0, elsewhere))


def _work_of_others() -> float:
    """Seconds that all cores have worked for other processes than this one, from some moment on."""
    times = psutil.cpu_times()
    return float(times.user + times.system + getattr(times, "nice", 0.0)) - time.process_time()


def product_speed(hidden: int, intermediate: int, dtype: torch.dtype) -> Speed:
    """Of this machine's CPU, by one matrix product of the model's widths."""
    a, b = torch.randn(512, hidden, dtype=dtype), torch.randn(hidden, intermediate, dtype=dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        _ = a @ b
        times.append(time.perf_counter() - start)
    rate = SHARE_OF_PRODUCT * 2 * 512 * hidden * intermediate / statistics.median(times[1:])
    how = f"{SHARE_OF_PRODUCT:.0%} of a matrix product's measured speed, {rate / 1e9:.0f} GFLOP/s"
    return Speed(rate, 2e8, how, True)


def _layers(architecture: Any) -> int:
    return int(getattr(architecture.get_text_config(), "num_hidden_layers", 0) or 0)


def _cut(setting: Setting, batch: Layout | Rows) -> tuple[Setting, Layout | Rows]:
    """Setting and batch within `BUDGET`."""
    if isinstance(batch, Layout):
        keep = max(1, min(len(batch.groups), int(len(batch.groups) * 4096 / batch.tokens)))
        batch = layout_of([(p, list(zip(r[0::2], r[1::2], strict=True))) for p, r in batch.groups[:keep]])
    elif batch.tokens > 4096:
        batch = replace(batch, rows=max(2, 4096 // batch.length // 2 * 2))
    architecture = copy.deepcopy(setting.architecture)
    with quiet():
        operations = Stage(replace(setting, architecture=copy.deepcopy(architecture))).operations(batch)
    layers = _layers(architecture)
    wanted = max(1, min(layers, round(layers * BUDGET / operations)))
    if wanted < layers:
        text = architecture.get_text_config()
        text.num_hidden_layers = wanted
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:wanted]
    return replace(setting, architecture=architecture), batch
