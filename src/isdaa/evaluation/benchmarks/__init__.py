"""Instruction-following benchmarks by a judge: data and pure functions; who generates and judges is elsewhere."""

from __future__ import annotations

from isdaa.errors import UserError, nearest
from isdaa.evaluation.benchmarks.sets.alpaca_eval import ALPACA_EVAL
from isdaa.evaluation.benchmarks.sets.arena_hard import ARENA_HARD
from isdaa.evaluation.benchmarks.sets.benchmark import Benchmark
from isdaa.evaluation.benchmarks.sets.mt_bench import MT_BENCH
from isdaa.evaluation.benchmarks.sets.preference_sets import HH, TLDR

BENCHMARKS: dict[str, Benchmark] = {one.name: one for one in (ALPACA_EVAL, MT_BENCH, ARENA_HARD, HH, TLDR)}


def benchmark(name: str) -> Benchmark:
    """The benchmark of that name. Raises UserError, which names the nearest, where there is none."""
    if name not in BENCHMARKS:
        raise UserError(f"benchmark '{name}' is unknown{nearest(name, BENCHMARKS)}; known are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
