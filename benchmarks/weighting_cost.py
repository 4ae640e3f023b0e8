"""What an objective's own arithmetic takes, from logps to their gradient, with each kind of weight: microseconds a step.

    python benchmarks/weighting_cost.py --out docs/results/weighting-cost.json

A training step of IS-DPO differs from DPO's in this arithmetic alone; two timed steps differ by more from one to the next. The
objectives take turns on the same pairs, in a shuffled order; the table holds medians over rounds, and the median and range of
each round's difference from plain DPO. A weight over the global batch that needs several forward passes also costs one more
pass without gradients, which is not in here.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from isdaa.files import write_json
from isdaa.objectives.objective import Objective, PairLogps
from isdaa.objectives.presets import resolve
from isdaa.objectives.weights import batch_weights
from isdaa.record import versions

BASE = "dpo"
OBJECTIVES: dict[str, dict[str, Any]] = {
    BASE: resolve("dpo"),
    "is_dpo": resolve("is_dpo"),
    "is_dpo, normalize: batch": resolve("is_dpo", normalize="batch"),
    "is_dpo, weight: shuffled": resolve("is_dpo", weight="shuffled"),
}


def make_pairs(count: int) -> PairLogps:
    """Pairs whose policy has moved away from its reference by some nats."""
    rng = torch.Generator().manual_seed(0)
    reference = -60 * torch.rand(2, count, generator=rng)
    policy = (reference + torch.randn(2, count, generator=rng)).requires_grad_()
    lengths = torch.randint(20, 60, (2, count), generator=rng)
    return PairLogps(*policy, *reference, *lengths)  # type: ignore[arg-type]


def step(objective: Objective, pairs: PairLogps) -> None:
    """What the trainer does of it in one forward and backward pass."""
    raw = objective.raw_weights(pairs)[1]
    weights = batch_weights(raw, objective.weight, objective.normalize, 0, 0) if objective.needs_batch else raw
    torch.autograd.grad(objective(pairs, weights).losses.mean(), [pairs.policy_chosen_logps, pairs.policy_rejected_logps])


def measure(count: int, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """Microseconds of each objective, and beyond plain DPO's in the same round."""
    pairs, shuffled = make_pairs(count), random.Random(0)
    objectives = {name: Objective(**settings) for name, settings in OBJECTIVES.items()}
    taken: dict[str, list[float]] = {name: [] for name in objectives}
    for number in range(rounds + 1):
        order = list(objectives)
        shuffled.shuffle(order)
        for name in order:
            started = time.perf_counter()
            for _ in range(repeats):
                step(objectives[name], pairs)
            if number:  # the first round warms up
                taken[name].append((time.perf_counter() - started) / repeats * 1e6)
    found = []
    for name, times in taken.items():
        beyond = [a - b for a, b in zip(times, taken[BASE], strict=True)]
        told = {"median": statistics.median(times), "beyond_dpo": statistics.median(beyond)}
        found.append({"objective": name, "pairs": count, **told, "least": min(beyond), "largest": max(beyond)})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints a table, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[4, 64])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--out", type=Path, help="JSON to write")
    arguments = parser.parse_args(argv)
    found = [row for count in arguments.pairs for row in measure(count, arguments.rounds, arguments.repeats)]
    print("| pairs | objective | µs | µs beyond DPO's |\n|---|---|---|---|")
    for row in found:
        beyond = f"{row['beyond_dpo']:.0f} ({row['least']:.0f} … {row['largest']:.0f})"
        print(f"| {row['pairs']} | {row['objective']} | {row['median']:.0f} | {'–' if row['objective'] == BASE else beyond} |")
    if arguments.out is not None:
        write_json(arguments.out, {"results": found, "threads": torch.get_num_threads(), "versions": versions()})


if __name__ == "__main__":
    main()
