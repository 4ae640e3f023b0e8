"""The tables of docs/performance.md, as Markdown: `python benchmarks/performance_tables.py docs/results/preference_step*.json`.

Every number comes from the files that `preference_step.py` wrote; several files are put together, cell by cell.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from _summary import LABELS
from scipy.stats import binom

from isdaa.errors import UserError
from isdaa.foreign import read_json

BASE = "isdaa_dpo"
TRL = ("trl_best", "trl_whole")


def main() -> None:
    """Print the tables."""
    files = [Path(name) for name in sys.argv[1:]]
    try:
        if not files:
            raise UserError("name one or more files that preference_step.py wrote")
        cells = [cell for file in files for cell in _cells(file)]
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print("\n".join([*overview(cells), "", *costs(cells), "", *together(cells), "", *by_precision(cells)]))


def _cells(file: Path) -> list[dict[str, Any]]:
    found = read_json(file)
    if not isinstance(found, Mapping) or found.get("benchmark") != "preference_step" or not found.get("finished"):
        raise UserError(f"{file}: not the finished result of preference_step.py; run that first")
    settings = found["settings"]
    return [{**cell, "batch_size": settings["batch_size"], "rounds": settings["rounds"]} for cell in found["cells"]]


def overview(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A row for every arm of every cell."""
    columns = (
        "shape",
        "arm",
        "s / step",
        "time / isdaa",
        "peak MiB",
        "memory / isdaa",
        "matmul share",
        "of those done",
        "Δ weight / update",
    )
    yield f"| {' | '.join(columns)} |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for cell in cells:
        name = f"{cell['name']}, {cell['batch_size']} pairs, {cell['rounds']} rounds"
        for arm, label in LABELS.items():
            if arm not in cell["arms"]:
                continue
            found = cell["arms"][arm]
            share, done = found["matmul_share"], found.get("matmul_share_done")
            done = "–" if done is None else f"{done['median']:.0%}"
            yield (
                f"| {name} | {label} | {_spread(found['step'], 2)} | {_spread(found['time_ratio'], 2)} | {found['peak']:.0f} "
                f"| {found['memory_ratio']:.2f} | {share['median']:.0%} | {done} | {_same(found)} |"
            )
            name = ""
        for arm, why in {**(cell.get("left_out") or {}), **(cell.get("failed") or {})}.items():
            yield f"| {name} | {LABELS[arm]} | {why.split(' (')[0]} | | | | | | |"
            name = ""


def _same(found: Mapping[str, Any]) -> str:
    """The last column; what forbids to trust a ratio is part of it."""
    comparison = found.get("comparison")
    if comparison is None or "weight_difference" not in comparison:
        return "–"
    difference = comparison["weight_difference"]  # None: not a number
    text = f"{'∞' if difference is None else f'{difference:.1e}'} / {comparison['largest_update']:.1e}"
    return f"{text}, NOT the same work" if comparison.get("same_work") is False else text


def costs(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What weighting and the Trainer cost, cell by cell."""
    yield "| shape | rounds | is_dpo / dpo | Trainer and collation / bare loop |"
    yield "|---|---|---|---|"
    pairs = (("isdaa_is_dpo", "isdaa_dpo"), ("isdaa_dpo", "isdaa_bare"))
    for cell in cells:
        arms = cell["arms"]
        if all(arm in arms for pair in pairs for arm in pair):
            found = [_median([a / b for a, b in zip(*(arms[arm]["seconds"] for arm in pair), strict=True)]) for pair in pairs]
            yield f"| {cell['name']} | {cell['rounds']} | " + " | ".join(found) + " |"


def together(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """TRL's time over isdaa's, the rounds of all cells of one shape and batch size put together."""
    rounds: dict[tuple[str, int, str], list[float]] = {}
    for cell in cells:
        shape = cell["name"].split(", part")[0]
        for arm in (arm for arm in TRL if arm in cell["arms"]):
            ratios = [a / b for a, b in zip(*(cell["arms"][name]["seconds"] for name in (arm, BASE)), strict=True)]
            rounds.setdefault((shape, cell["batch_size"], arm), []).extend(ratios)
    yield "| shape | pairs | rounds in all | arm | time / isdaa |"
    yield "|---|---|---|---|---|"
    for (shape, pairs, arm), ratios in rounds.items():
        yield f"| {shape} | {pairs} | {len(ratios)} | {LABELS[arm]} | {_median(ratios)} |"


def by_precision(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """TRL's fastest arm over isdaa's fastest, in each precision and of any; and isdaa's fp32 over its bf16."""
    yield "| shape | pairs | rounds | precision | slower | faster | time of the slower / the faster |"
    yield "|---|---|---|---|---|---|---|"
    for cell in cells:
        name, arms = f"| {cell['name']} | {cell['batch_size']} | {cell['rounds']}", cell["arms"]
        for kind, found in (cell.get("fastest") or {}).items():
            yield f"{name} | {kind} | {LABELS[found['trl']]} | {LABELS[found['isdaa']]} | {_median(found['rounds'])} |"
        if BASE in arms and BASE + "_bf16" in arms:
            ratios = [a / b for a, b in zip(*(arms[arm]["seconds"] for arm in (BASE, BASE + "_bf16")), strict=True)]
            yield f"{name} | fp32, bf16 | {LABELS[BASE]} | {LABELS[BASE + '_bf16']} | {_median(ratios)} |"


def _median(ratios: Sequence[float]) -> str:
    """The median of independent ratios, and the order statistics between which it lies with 95 % or more."""
    ordered = sorted(ratios)
    outside = max((k for k in range(len(ordered) // 2) if 2 * binom.cdf(k, len(ordered), 0.5) <= 0.05), default=-1)
    if outside < 0:
        return f"{median(ordered):.3f} (too few rounds for an interval)"
    return f"{median(ordered):.3f} [{ordered[outside]:.3f}, {ordered[-outside - 1]:.3f}]"


def _spread(found: Mapping[str, float], digits: int) -> str:
    return f"{found['median']:.{digits}f} ({found['least']:.{digits}f} … {found['largest']:.{digits}f})"


if __name__ == "__main__":
    main()
