"""Tables of a sweep: `python benchmarks/study_tables.py runs/study --out docs/results/study`.

Writes OUT.md (one table a grid, then the questions that pair cells by seed), OUT.csv (a row a checkpoint), OUT.json (a row a
cell, every seed's values), and three figures: win rate against √KL, every cell's end, and cells at matched KL. Nothing in them
is typed by hand.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isdaa.evaluation.checkpoints.trajectory import SWEEP, Study, read_study
from isdaa.evaluation.verdict.comparison import (
    CellSummary,
    SeedMean,
    at_matched_kl,
    difference,
    paired_bootstrap,
    summarise,
    to_json,
)
from isdaa.evaluation.verdict.overoptimization import fit_law
from isdaa.files import csv_text, write_atomically, write_json
from isdaa.foreign import read_json

COLUMNS = ("cell", "method", "beta", "seed", "step", "kl", "win_rate", "win_low", "win_high", "reward", "length", "truncated")
AGAINST = "is_dpo-beta0.01"  # what the cells of its grids are compared with
MAIN = ("dpo", "is_dpo", "chi_po")  # drawn at every β
# Is it the weights, or only smaller steps? Drawn at matched KL, one panel an optimiser.
SMALLER = {
    "AdamW": "{}-beta0.01{}",
    "SGD": "{}-beta0.01{}-optimizersgd-max_grad_norm0-learning_rate1",
}


def main() -> None:
    """Read the sweep, write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a sweep's folder")
    parser.add_argument("--out", required=True, help="path of the files, without their suffixes")
    parser.add_argument("--against", default=AGAINST, metavar="CELL", help="cell that the others are compared with")
    arguments = parser.parse_args()
    study = read_study(arguments.folder)
    summaries = summarise(study.runs)
    out = Path(arguments.out)
    rows = [_record(study, summary) for summary in summaries]
    write_json(out.with_suffix(".json"), {"title": study.title, "against": arguments.against, "cells": rows})
    write_atomically(out.with_suffix(".csv"), _csv(study))
    text = _page(study, summaries, arguments.against, arguments.folder)
    write_atomically(out.with_suffix(".md"), text)
    _figures(study, summaries, out)
    print(out.with_suffix(".md"))


def _figures(study: Study, summaries: Sequence[CellSummary], out: Path) -> None:
    from isdaa.report.charts.lines import lines_of
    from isdaa.report.charts.style import save_chart
    from isdaa.report.charts.win_rate_curves import final_chart, matched_charts, study_chart

    names = {summary.cell for summary in summaries}
    main = [cell for cell in dict.fromkeys(run.cell for run in study.runs) if cell and _is_main(cell)]
    save_chart(study_chart(study, cells=main), out)
    first = [summary for summary in summaries if "-beta0.01" in summary.cell]
    titles = {line.cell: line.label for line in lines_of(study)}
    save_chart(final_chart(first, titles=titles), out.with_name(f"{out.name}-final"))
    groups = []
    for title, pattern in SMALLER.items():
        cells = [
            pattern.format(*which)
            for which in (("dpo", ""), ("is_dpo", ""), ("is_dpo", "-weightshuffled"), ("is_dpo", "-weightmean"))
        ]
        found = [cell for cell in cells if cell in names]
        if cells[1] in found and len(found) > 1:
            matched = at_matched_kl([run for run in study.runs if run.cell in found], cells[1])
            groups += [(title, matched)] if matched is not None else []
    if groups:
        labels = {cell: _short(cell) for _, group in groups for cell in group.cells}
        save_chart(matched_charts(groups, labels=labels), out.with_name(f"{out.name}-matched-kl"))


def _is_main(cell: str) -> bool:
    method, _, beta = cell.partition("-beta")
    return method in MAIN and beta in ("0.01", "0.05", "0.1")


def _short(cell: str) -> str:
    """The method, and what its weight is where that is no preset's."""
    method, _, rest = cell.partition("-")
    return method + next((f", weights {word}" for word in ("shuffled", "mean") if f"weight{word}" in rest), "")


def _record(study: Study, summary: CellSummary) -> dict[str, Any]:
    law = fit_law(summary.runs) if summary.runs[0].wins is not None else None
    cell = next((cell for cell in study.cells if cell["name"] == summary.cell), {})
    weights = [entry["weight_mean"] for run in summary.runs for entry in run.metrics if entry.get("weight_mean") is not None]
    return {
        **to_json(summary),
        "settings": cell.get("settings"),
        "grids": cell.get("grids"),
        "law": to_json(law),
        "mean_weight": float(np.mean(weights)) if weights else None,
        "length": to_json([float(run.lengths[-1].mean()) for run in summary.runs if run.lengths is not None]),
    }


def _csv(study: Study) -> str:
    rows: list[list[Any]] = []
    for run in study.runs:
        for entry in run.metrics:
            win, reward = entry["win_rate"], entry["reward"]
            numbers = [entry["kl"]["mean"], *((win["mean"], win["low"], win["high"]) if win else (None,) * 3)]
            numbers += [reward["mean"] if reward else None, entry["length"]["mean"], entry["truncated"]]
            told = [None if number is None else float(f"{number:.5g}") for number in numbers]  # no text, which is guarded
            rows.append([run.cell or run.name, run.method, run.beta, run.seed, entry["step"], *told])
    return csv_text(COLUMNS, rows)


def _page(study: Study, summaries: Sequence[CellSummary], against: str, folder: str) -> str:
    content = read_json(study.folder / SWEEP)
    seconds = [row["cpu_seconds"] for row in [*content["runs"], *content["shared"]] if row["cpu_seconds"]]
    seeds = sorted({run.seed for run in study.runs if run.seed is not None})
    settings = study.metrics["settings"]
    lines = [f"# {study.title}: numbers", ""]
    lines += [
        f"Made by `python benchmarks/study_tables.py {folder} --out …` from the records of {len(study.runs)} runs "
        f"(seeds {', '.join(map(str, seeds))}); revision "
        f"`{', '.join(_revisions(study, content))}`, torch {content['versions']['torch']}, "
        f"transformers {content['versions']['transformers']}.",
        f"{study.metrics['prompts']} held-out prompts, temperature {settings['temperature']:g}, win rate by "
        f"`{settings['scorer']}` against {settings['opponent_samples']} samples of the reference a prompt. Together the "
        f"runs took {sum(seconds) / 3600:.2f} hours of CPU time.",
        "",
        "Means over seeds with 95 % t-intervals.",
        "",
        "- *best*: the highest checkpoint's win rate; *fall*: from the verdict's peak to the last checkpoint. Both are chosen by "
        "the numbers that measure them, so both are a little too large.",
        "- *found*: number of seeds over-optimised / worse / underpowered / not detected.",
        "- *d\\**: the law's peak in √KL, if one is named; *past*: share of bootstrap draws with the last checkpoint beyond it.",
        "",
    ]
    if study.missing:
        counts = Counter(name.rpartition("/")[0] for name in study.missing)
        missing = ", ".join(f"{count} of `{cell}`" for cell, count in counts.items())
        lines += [f"**{len(study.missing)} runs of the sweep are missing here**: {missing}.", ""]
    by_cell = {summary.cell: summary for summary in summaries}
    for grid in dict.fromkeys(name for cell in study.cells for name in cell["grids"]):
        cells = [by_cell[c["name"]] for c in study.cells if grid in c["grids"] and c["name"] in by_cell]
        lines += [f"## Grid `{grid}`", "", *_table(cells), ""]
    if against in by_cell:
        lines += _differences(study, by_cell, against)
    return "\n".join(lines)


def _revisions(study: Study, content: dict[str, Any]) -> list[str]:
    """Of the code that trained the runs, as their own records say."""
    states = [study.folder / row["folder"] / "run.json" for row in content["runs"]]
    return sorted({str(read_json(path)["git_revision"]) for path in states if path.is_file()})


def _table(cells: Sequence[CellSummary]) -> list[str]:
    head = ["cell", "seeds", "best", "final", "each seed's final", "final KL", "fall", "found", "d*", "past"]
    rows = []
    for cell in sorted(cells, key=lambda c: -c.final.mean):
        found = "/".join(str(cell.findings.get(name, 0)) for name in ("over-optimised", "worse", "underpowered", "not detected"))
        law = fit_law(cell.runs)
        peak = "" if law is None or law.peak is None else f"{law.peak:.2f}"
        past = "" if law is None or law.past_peak is None else f"{law.past_peak:.2f}"
        each = " ".join(f"{value:.2f}" for value in cell.final.values)
        means = [_pm(cell.best), _pm(cell.final), each, _pm(cell.final_kl, 1), _pm(cell.fall)]
        rows.append([f"`{cell.cell}`", str(cell.final.seeds), *means, found, peak, past])
    keep = [place for place in range(len(head)) if any(row[place] for row in rows)]
    lines = [[row[place] for place in keep] for row in (head, ["---"] * len(head), *rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _differences(study: Study, by_cell: dict[str, CellSummary], against: str) -> list[str]:
    """Cells against one, paired by seed: at the end (t over seeds; bootstrap over seeds and prompts) and at matched KL."""
    base = by_cell[against]
    lines = [
        f"## Against `{against}`, paired by seed",
        "",
        "*end*: difference of the last checkpoints' win rates, t-interval over seeds, then bootstrap over seeds and prompts; "
        "*matched*: difference at equal √KL (each cell with this one alone, over the range that both reach on every seed), its "
        "mean over that range, and at the range's end. Positive: the cell is better.",
        "",
        "| cell | end | end, bootstrap | matched, mean over range | at the range's end | range of √KL |",
        "|" + "---|" * 6,
    ]
    for name, cell in by_cell.items():
        if name == against:
            continue
        gap = difference(cell, base)
        common = sorted({run.seed for run in cell.runs} & {run.seed for run in base.runs}, key=str)
        rows = [[next(r.wins[-1] for r in c.runs if r.seed == seed) for seed in common] for c in (cell, base)]
        boot = paired_bootstrap(np.array(rows[0]), np.array(rows[1])) if common else None
        shown = f"{boot.mean:+.3f} [{boot.low:+.3f}, {boot.high:+.3f}]" if boot is not None and boot.low is not None else ""
        matched = at_matched_kl([run for run in study.runs if run.cell in (name, against)], against)
        columns = ["", "", "not both reach a range"]
        if matched is not None and name in matched.differences:
            gaps = matched.differences[name]
            mean = _seed_average([g.values for g in gaps])
            columns = [_signed(mean), _signed(gaps[-1]), f"{matched.root_kl[0]:.2f} to {matched.root_kl[-1]:.2f}"]
        lines.append(f"| `{name}` | {_signed(gap)} | {shown} | {' | '.join(columns)} |")
    return [*lines, ""]


def _seed_average(values: Sequence[tuple[float, ...]]) -> SeedMean:
    from isdaa.evaluation.verdict.comparison import seed_mean

    return seed_mean(np.mean(np.array(values), axis=0).tolist())


def _pm(value: SeedMean, digits: int = 3) -> str:
    if value.seeds == 0:
        return ""
    text = f"{value.mean:.{digits}f}"
    return text if value.low is None else f"{text} ± {(value.high - value.low) / 2:.{digits}f}"  # type: ignore[operator]


def _signed(value: SeedMean) -> str:
    if value.seeds == 0:
        return ""
    return f"{value.mean:+.3f}" + ("" if value.low is None else f" [{value.low:+.3f}, {value.high:+.3f}]")


if __name__ == "__main__":
    main()
