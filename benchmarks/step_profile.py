"""Where the time of isdaa's training step goes, by PyTorch's profiler, and how fast the matrix products in it are.

    python benchmarks/step_profile.py
    python benchmarks/step_profile.py --shape short --vocabulary 128256

The pairs, model, loss and optimiser are those of preference_step.py's bare loop. The profiler gives every operation the time
that it spent itself, operations inside it left out; shares are of their sum, which is compared with the wall clock.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import peers
import torch
from shapes import SHAPES, Size, draw_pairs
from torch.profiler import ProfilerActivity, profile

from isdaa.files import write_json
from isdaa.record import versions

# Parts of a step, and the beginnings of the operators that belong to them; the first that fits counts.
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm"),
    "attention": ("aten::_scaled_dot_product", "aten::bmm", "aten::baddbmm", "aten::_softmax"),
    "optimiser": ("aten::_fused_adamw", "aten::_foreach_norm", "aten::_foreach_mul", "aten::linalg_vector_norm"),
}
OTHER = "everything else"


class Window:
    """A `peers.Gate` that lets a profiler see all steps but the first ones."""

    def __init__(self, profiler: Any, warmup: int) -> None:
        self.profiler, self.left, self.steps, self.started, self.seconds = profiler, warmup, 0, 0.0, 0.0

    def ready(self) -> None:
        """Nothing to wait for."""
        self._begin()

    def step(self, loss: float) -> None:
        """A step is done."""
        self.left -= 1
        self.steps += self.left < 0
        self._begin()

    def _begin(self) -> None:
        if self.left == 0:
            self.profiler.start()
            self.started = time.perf_counter()

    def end(self) -> None:
        """All steps are done."""
        self.seconds = time.perf_counter() - self.started
        self.profiler.stop()


def part_of(operator: str) -> str:
    """Name of the part that an operator belongs to."""
    return next((part for part, begins in PARTS.items() if operator.startswith(begins)), OTHER)


def shares(operators: Iterable[tuple[str, float]]) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """Shares of the parts, largest first, and of the single operators among everything else; from (name, own time)."""
    parts: Counter[str] = Counter()
    rest: Counter[str] = Counter()
    for name, own in operators:
        parts[part_of(name)] += own
        if part_of(name) == OTHER:
            rest[name] += own
    total = sum(parts.values())
    return {name: own / total for name, own in parts.most_common()}, [(name, own / total) for name, own in rest.most_common()]


def measure(shape: str, vocabulary: int, batch_size: int, steps: int, warmup: int) -> dict[str, Any]:
    """Profile some steps of the bare loop."""
    size = Size(vocabulary)
    rows = draw_pairs(SHAPES[shape], vocabulary, (steps + warmup) * batch_size, 0, size.positions)
    profiler = profile(activities=[ProfilerActivity.CPU])
    window = Window(profiler, warmup)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "initial"
        peers.make_model(size, model)
        peers.isdaa_bare(peers.Job("isdaa_bare", model, Path(folder), rows, batch_size, vocabulary), window)
        window.end()
    operators = [(event.key, event.self_cpu_time_total) for event in profiler.key_averages()]
    parts, rest = shares(operators)
    return {
        "seconds": window.seconds / window.steps,
        "seen": sum(own for _, own in operators) / 1e6 / window.seconds,
        "parts": parts,
        "rest": rest[:12],
        "settings": {"shape": shape, "vocabulary": vocabulary, "batch_size": batch_size, "steps": window.steps},
        "machine": {"threads": torch.get_num_threads(), "versions": versions()},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="tldr")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--batch_size", type=int, default=4, help="pairs of a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON to write")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(arguments.threads)
    found = measure(arguments.shape, arguments.vocabulary, arguments.batch_size, arguments.steps, arguments.warmup)
    print(f"{found['seconds']:.2f} s a step under the profiler, which saw {found['seen']:.0%} of it. Shares of what it saw:")
    for name, share in found["parts"].items():
        print(f"{share:6.1%}  {name}")
    print("of everything else, most:")
    for name, share in found["rest"]:
        print(f"{share:6.1%}  {name}")
    if arguments.out is not None:
        write_json(arguments.out, found)


if __name__ == "__main__":
    main()
