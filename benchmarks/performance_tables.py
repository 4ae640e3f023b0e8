"""The tables of docs/performance.md, as Markdown: `python benchmarks/performance_tables.py docs/results/preference_step*.json`.

Every number comes from the files that `preference_step.py` wrote; several files are put together, cell by cell.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from _summary import LABELS

from isdaa.errors import UserError
from isdaa.files import read_json

BASE, BEST = "isdaa_dpo", "trl_best"


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
    print("\n".join([*overview(cells), "", *costs(cells)]))


def _cells(file: Path) -> list[dict[str, Any]]:
    found = read_json(file)
    if not isinstance(found, Mapping) or found.get("benchmark") != "preference_step" or not found.get("finished"):
        raise UserError(f"{file}: not the finished result of preference_step.py; run that first")
    settings = found["settings"]
    return [{**cell, "batch_size": settings["batch_size"], "rounds": settings["rounds"]} for cell in found["cells"]]


def overview(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A row for every arm of every cell."""
    yield "| shape | arm | s / step | time / isdaa | peak MiB | memory / isdaa | matmul share | Δ weight / update |"
    yield "|---|---|---|---|---|---|---|---|"
    for cell in cells:
        name = f"{cell['name']}, {cell['batch_size']} pairs"
        for arm, label in LABELS.items():
            if arm not in cell["arms"]:
                continue
            found = cell["arms"][arm]
            share = found["matmul_share"]
            yield (
                f"| {name} | {label} | {_spread(found['step'], 2)} | {_spread(found['time_ratio'], 2)} | {found['peak']:.0f} "
                f"| {found['memory_ratio']:.2f} | {share['median']:.0%} | {_same(found)} |"
            )
            name = ""
        for arm, why in (cell.get("left_out") or {}).items():
            yield f"| {name} | {LABELS[arm]} | {why} | | | | | |"


def _same(found: Mapping[str, Any]) -> str:
    comparison = found.get("comparison")
    if comparison is None or "weight_difference" not in comparison:
        return "–"
    return f"{comparison['weight_difference']:.1e} / {comparison['largest_update']:.1e}"


def costs(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What weighting and the Trainer cost, cell by cell."""
    yield "| shape | is_dpo / dpo | Trainer and collation / bare loop |"
    yield "|---|---|---|"
    for cell in cells:
        both = (cell.get("cost_of_weighting"), cell.get("cost_of_trainer"))
        yield f"| {cell['name']} | " + " | ".join("–" if cost is None else _spread(cost, 3) for cost in both) + " |"


def _spread(found: Mapping[str, float], digits: int) -> str:
    return f"{found['median']:.{digits}f} ({found['least']:.{digits}f} … {found['largest']:.{digits}f})"


if __name__ == "__main__":
    main()
