"""Which precision a CPU trains in: fp32, or products in bf16 from fp32 weights (autocast). Measured, not assumed.

Processors with instructions for bf16 multiply it two to five times as fast as fp32; others emulate it and are slower, and where a
model is narrow or a batch tiny, casting costs what the products win. `choose` times the products of one model on this machine,
for about a second, and keeps the answer.
"""

from __future__ import annotations

import fcntl
import platform
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isdaa.errors import UserError
from isdaa.files import digest, own_file, write_json
from isdaa.foreign import read_json
from isdaa.terminal import working

AUTO, FLOAT32, BFLOAT16 = "auto", "float32", "bfloat16"
FORMAT = 1
SECONDS = 1.0  # of the probe
ONE_PRODUCT = 1e10  # operations of a timed product at most, so that a probe of a large model ends, too
# Inputs and outputs of a layer's largest product from which bf16 is tried: below, casts cost what it wins (docs/performance.md).
NARROWEST = 384
# Of fp32's time in products and casts: what is no product gains nothing, so that a step at 0.5 takes 0.7 of its time.
GAIN = 0.7


def numerics(precision: str, device: str | None = None) -> AbstractContextManager[Any]:
    """Forward passes as training makes them: under autocast where `precision` is bfloat16. device: None is this machine's."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == BFLOAT16)


@dataclass(frozen=True)
class Choice:
    """precision: float32 or bfloat16; why: in words; ratio: time of its products in bf16 over that in fp32, None: not timed."""

    precision: str
    why: str
    ratio: float | None = None


def choose(model: nn.Module, rows: int, cache_dir: Path | None, shared: bool = False) -> Choice:
    """What `auto` is for a model that is trained on `rows` tokens a forward pass.

    cache_dir: where the answer is kept for this machine, number of threads, version of torch, model and number of rows. shared:
    one answer for all that share the folder, whatever their machine and rows.
    """
    shapes = linear_shapes(model)
    known = _of_the_model(model, shapes)
    if known is not None:
        return known
    rows = 1 << max(0, rows - 1).bit_length()
    key: dict[str, Any] = {"format": FORMAT, "shapes": sorted([*both, n] for both, n in shapes.items())}
    if not shared:
        key |= {"rows": rows, "threads": torch.get_num_threads(), "processor": processor(), "torch": str(torch.__version__)}
    if cache_dir is None:
        return _of_the_machine(shapes, rows)
    path = cache_dir / f"precision-{digest(key)}.json"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with open(own_file(cache_dir / f".{path.name}.lock"), "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of runs that begin at once, one measures
        found = _kept(path, key)
        if found is None:
            found = _of_the_machine(shapes, rows)
            write_json(path, {"key": key, **asdict(found)})
    return found


def _kept(path: Path, key: dict[str, Any]) -> Choice | None:
    with suppress(UserError, OSError, KeyError, TypeError, AttributeError):
        kept = read_json(path)
        if kept.pop("key") == key and kept["precision"] in (FLOAT32, BFLOAT16):
            return Choice(**kept)
    return None


def linear_shapes(model: nn.Module) -> Counter[tuple[int, int]]:
    """(inputs, outputs) of a model's plain linear layers, and how many layers have them; those of adapters left out."""
    layers = (module for name, module in model.named_modules() if type(module) is nn.Linear and "lora_" not in name)
    return Counter((layer.in_features, layer.out_features) for layer in layers)


def _of_the_model(model: nn.Module, shapes: Counter[tuple[int, int]]) -> Choice | None:
    """The answer where no machine's speed matters."""
    # A model that is trained on a GPU may still lie in the host's memory.
    if torch.cuda.is_available() or next(model.parameters()).device.type != "cpu":
        return Choice(FLOAT32, "auto measures on a CPU alone; give --align.precision bfloat16 for autocast")
    half = {m.weight.dtype for m in model.modules() if type(m) is nn.Linear} - {torch.float32}
    if half:
        return Choice(FLOAT32, f"weights are in {str(half.pop()).removeprefix('torch.')} themselves")
    if not all(type(p.data) is torch.Tensor for p in model.parameters()):
        return Choice(FLOAT32, "the weights are in pieces")
    if not shapes or max(min(both) for both in shapes) < NARROWEST:
        return Choice(FLOAT32, "the model is narrow: bf16 would win nothing")
    return None


def _of_the_machine(shapes: Counter[tuple[int, int]], rows: int) -> Choice:
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if supported is None or not supported():
        return Choice(FLOAT32, "this processor has no instructions for bf16")
    with working("timing products in bf16 and fp32"):
        ratio = products_ratio(shapes, rows)
    precision = BFLOAT16 if ratio <= GAIN else FLOAT32
    return Choice(precision, f"this model's layers take {ratio:.2f} of fp32's time in bf16 here", ratio)


def products_ratio(shapes: Counter[tuple[int, int]], rows: int, seconds: float = SECONDS) -> float:
    """Time of a model's linear layers in bf16 over that in fp32, forward and backward, casts included: the median over turns in
    which both are timed one after the other, layers weighted by their operations."""
    costly = sorted(shapes, key=lambda both: -shapes[both] * both[0] * both[1])[:3]
    timed, end = {both: _Timed(*both, rows) for both in costly}, time.perf_counter() + seconds
    turns = 0
    while turns < 3 or time.perf_counter() < end:
        for one in timed.values():
            one.turn()
        turns += 1
    total = [sum(shapes[both] * one.median(kind) for both, one in timed.items()) for kind in (0, 1)]
    return total[1] / total[0]


class _Timed:
    """One linear layer in both precisions."""

    def __init__(self, inputs: int, outputs: int, rows: int) -> None:
        wanted, rows = rows, max(1, min(rows, int(ONE_PRODUCT / (2 * inputs * outputs))))
        self.times = wanted / rows
        generator = torch.Generator().manual_seed(0)
        self.x, self.weight, self.grad = (
            torch.randn(shape, generator=generator) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
        )
        self.half_grad = self.grad.bfloat16()
        self.seconds: list[tuple[float, float]] = []
        self._single(), self._half()

    def turn(self) -> None:
        """Once in each, one right after the other."""
        self.seconds.append((_seconds(self._single), _seconds(self._half)))

    def median(self, kind: int) -> float:
        """Seconds for all rows that were asked for. kind: 0 is fp32, 1 bf16."""
        return self.times * sorted(pair[kind] for pair in self.seconds)[len(self.seconds) // 2]

    def _single(self) -> Any:
        return self.x @ self.weight.T, self.grad @ self.weight, self.grad.T @ self.x

    def _half(self) -> Any:
        x, weight = self.x.bfloat16(), self.weight.bfloat16()
        return x @ weight.T, (self.half_grad @ weight).float(), (self.half_grad.T @ x).float()


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def processor() -> str:
    """Name of this machine's processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
