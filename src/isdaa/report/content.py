"""What the report says, as plain data: `report.json` is this; the page and `report.csv` show it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from isdaa.evaluation import fragments, left_out
from isdaa.evaluation.checkpoints.trajectory import Study, Trajectory
from isdaa.evaluation.table import unmoved
from isdaa.evaluation.verdict.comparison import WHAT, CellSummary, MatchedKl, difference, summarise, to_json
from isdaa.evaluation.verdict.overoptimization import Law, Verdict, fit_law, judge, places_of, shown_better
from isdaa.files import csv_text
from isdaa.manifest import HISTORY
from isdaa.record import versions
from isdaa.report.charts.lines import Line, Panel, coloured, file_of, grids_of, history, lines_of, panels_of, training_settings
from isdaa.report.charts.training_curves import thin, weights_of
from isdaa.report.charts.win_rate_curves import within
from isdaa.report.pairs import baselines, drawn_groups, weighted_groups
from isdaa.report.reproduce import commands
from isdaa.report.samples import representative, samples_of
from isdaa.report.words import REFERENCE, headline

FORMAT = 2  # raise it when a figure or a recommendation comes to mean something else
OVER = "over-optimised"
COLUMNS = (
    "cell", "method", "beta", "seed", "step", "path", "kl", "kl_low", "kl_high", "win_rate", "low", "high", "reward", "length",
    "truncated", "repetition", "accuracy", "chosen_drift", "rejected_drift", "weight_mean", "ess", "finding", "recommended",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Findings:
    """All that was computed of a study, for charts and text. verdicts: by run, in the order of the lines' runs."""

    study: Study
    lines: Sequence[Line]
    panels: Sequence[Panel]
    summaries: Mapping[str, CellSummary]
    verdicts: Mapping[int, Verdict | None]  # id(run) -> verdict; names of runs need not be unique
    laws: Mapping[str, Law | None]
    drawn: Sequence[tuple[str, MatchedKl]]  # (title, cells that are trained alike), to be looked at together
    matched: Sequence[tuple[str, MatchedKl]]  # (title, a method and its weighted cells), whose differences are weights alone
    weights: Mapping[str, Mapping[str, Any]]  # cell -> columns over steps; cells without weights are not in it
    histories: int  # runs that kept a training log

    @property
    def runs(self) -> list[Trajectory]:
        """Every run, line by line."""
        return [run for line in self.lines for run in line.runs]

    @property
    def reference(self) -> Mapping[str, Any]:
        """The reference's entry of `metrics.json`."""
        return self.study.metrics.get("reference") or {}

    @property
    def confidence(self) -> float:
        """Of every interval, as the evaluation was asked for."""
        return _confidence(self.study)

    @property
    def steps_known(self) -> bool:
        """Whether every checkpoint says at which training step it was written."""
        return all(run.steps_known for run in self.runs)

    @cached_property
    def evaluated(self) -> Mapping[str, Any]:
        """`metrics.json` as if all runs had been evaluated together; numbers that bare arrays lack are none."""
        entries = [{"truncated": None, "kl": {}} | dict(entry) for run in self.runs for entry in run.metrics]
        reference = {"truncated": None} | dict(self.reference)
        return {"settings": {}, "opponent": "reference"} | dict(self.study.metrics) | {"models": entries, "reference": reference}


def find(study: Study) -> Findings:
    """Everything that the report needs, computed once."""
    confidence = _confidence(study)
    lines = lines_of(study)
    lines = coloured(lines, _together(lines))
    runs = [run for line in lines for run in line.runs]
    drawn, matched = (
        [(group.title, found) for group in groups if (found := group.matched(confidence)) is not None]
        for groups in (drawn_groups(lines), weighted_groups(lines))
    )
    weights, logs = {}, 0
    for line in lines:
        histories = {run.name: history(run.history or file_of(run, HISTORY)) for run in line.runs}
        logs += sum(bool(lines_) for lines_ in histories.values())
        if columns := weights_of(line.runs, histories):
            weights[line.cell] = columns
    return Findings(
        study, lines, panels_of(lines),
        {summary.cell: summary for summary in summarise(runs, confidence=confidence)},
        {id(run): judge(run, opponent=study.metrics.get("opponent", "reference")) for run in runs},
        {line.cell: fit_law(line.runs) for line in lines},
        drawn, matched, weights, logs,
    )  # fmt: skip


def _together(lines: Sequence[Line]) -> list[Sequence[Line]]:
    """Lines that share a panel of some chart."""
    panels = [panel for members in (lines, *grids_of(lines).values()) for panel in panels_of(members)]
    return [panel.lines for panel in panels] + [[group.baseline, *group.others] for group in drawn_groups(lines)]


def _confidence(study: Study) -> float:
    return float((study.metrics.get("settings") or {}).get("confidence", 0.95))


def report_of(found: Findings) -> dict[str, Any]:
    """`report.json`."""
    study, metrics = found.study, found.study.metrics
    settings = dict(metrics.get("settings") or {})
    cells = [_cell(found, line) for line in found.lines]
    if study.scored:
        cells.sort(key=lambda cell: -(cell["final"]["mean"] if cell["final"]["mean"] is not None else -math.inf))
        best = found.summaries[cells[0]["cell"]]
        for cell in cells[1:]:
            cell["below_best"] = asdict(difference(best, found.summaries[cell["cell"]], confidence=found.confidence))
    still = unmoved(found.evaluated["models"])
    report: dict[str, Any] = {
        "format": FORMAT,
        "title": study.title,
        "scored": study.scored,
        "scorer": metrics.get("scorer"),
        "opponent": metrics.get("opponent", "reference"),
        "confidence": found.confidence,
        "prompts": metrics.get("prompts", int(found.runs[0].kl.shape[1])),
        "reference": dict(found.reference),
        "cells": cells,
        "runs": [_run(found, line, run) for line in found.lines for run in line.runs],
        "missing": list(study.missing),
        "notes": [*study.notes, *left_out.lines(metrics.get("left_out") or ()), *filter(None, [still])],
        **({"judged": dict(judged)} if (judged := metrics.get("judged") or {}).get("lacks") and not study.cells else {}),
        "left_out": list(metrics.get("left_out") or ()),
        "ended": dict(study.ended),
        "warnings": fragments.warnings_of(found.evaluated),
        "comparison": {"end": _at_end(found), "matched_kl": [_matched(found, *group) for group in found.matched]},
        "weights": {cell: _thinned(columns) for cell, columns in found.weights.items()},
        "samples": _samples(found),
        "settings": settings,
        "training": _training(found),
        **{key: metrics.get(key) for key in ("tokenization", "template", "tokenizer", "git_revision")},
        "versions": {"evaluation": metrics.get("versions") or {}, "report": versions()},
    }
    report |= headline(report)
    report["reproduce"] = commands(study)
    return _finite(to_json(report))


def table_of(report: Mapping[str, Any]) -> str:
    """`report.csv`: one row a checkpoint."""
    rows = []
    for run in report["runs"]:
        for row in run["checkpoints"]:
            win, kl = row["win_rate"] or {}, row["kl"] or {}
            cells = {key: run[key] for key in ("cell", "method", "beta", "seed")} | {key: row[key] for key in ("step", "path")}
            cells |= {"kl": kl.get("mean"), "kl_low": kl.get("low"), "kl_high": kl.get("high")}
            cells |= {"win_rate": win.get("mean"), "low": win.get("low"), "high": win.get("high")}
            for key in ("reward", "length", "accuracy", "chosen_drift", "rejected_drift"):
                cells[key] = (row[key] or {}).get("mean")
            cells |= {key: row[key] for key in ("truncated", "repetition", "weight_mean", "ess", "recommended")}
            cells["finding"] = run["verdict"]["finding"] if run["verdict"] else None
            rows.append([cells[key] for key in COLUMNS])
    return csv_text(COLUMNS, rows)


def _run(found: Findings, line: Line, run: Trajectory) -> dict[str, Any]:
    verdict = found.verdicts[id(run)]
    kept = None if verdict is None or verdict.keeps_reference else verdict.recommended
    rows = [_checkpoint(found, run, index, index == kept) for index in range(len(run.steps))]
    recommended = None
    if verdict is not None:
        recommended = {"label": REFERENCE, "path": found.reference.get("path"), "step": 0}
        if kept is not None:
            recommended = {key: rows[kept][key] for key in ("label", "path", "step")}
    names = ("method", "beta", "seed")
    return {
        "name": run.name,
        "cell": line.cell,
        "label": line.title,
        **{key: getattr(run, key) for key in names},
        "verdict": asdict(verdict) if verdict is not None else None,
        "better": shown_better(run),
        "recommended": recommended,
        "checkpoints": rows,
    }


def _checkpoint(found: Findings, run: Trajectory, index: int, recommended: bool) -> dict[str, Any]:
    entry = run.metrics[index]
    held_out = entry.get("held_out") or {}
    row = {
        "label": run.labels[index],
        "name": places_of(run.labels)[index],
        "path": str(run.paths[index]),
        "step": entry.get("step"),
        "root_kl": float(run.root_kl[index]),
    }
    row |= {
        key: entry.get(key) for key in ("kl", "win_rate", "reward", "length", "truncated", "repetition", "weight_mean", "ess")
    }
    row |= {key: held_out.get(key) for key in ("accuracy", "chosen_drift", "rejected_drift")} | {"recommended": recommended}
    return row | {"fragments": fragments.is_fragmentary(found.evaluated, {"truncated": None} | dict(entry))}


def _cell(found: Findings, line: Line) -> dict[str, Any]:
    summary, law = found.summaries[line.cell], found.laws[line.cell]
    runs = list(summary.runs)
    cell: dict[str, Any] = {
        "cell": line.cell,
        "label": line.title,
        "method": line.method,
        "beta": line.beta,
        "grids": list(line.grids),
    }
    cell |= {key: asdict(getattr(summary, key)) for key in ("best", "final", "final_kl", "fall")}
    for key in ("best", "final", "final_kl", "fall"):  # of no seed at all: of a run whose last checkpoint was left out
        cell[key] |= {"mean": None} if cell[key]["mean"] is not None and math.isnan(cell[key]["mean"]) else {}
    for key in ("best", "final"):
        cell[key] |= {bound: within(cell[key][bound]) for bound in ("low", "high")}
    if cell["final_kl"]["low"] is not None:
        cell["final_kl"]["low"] = max(cell["final_kl"]["low"], 0.0)
    cell["over"] = "seeds"
    if len(runs) == 1:
        _over_prompts(cell, runs[0], found.verdicts[id(line.runs[0])])
    by_seed = sorted(line.runs, key=lambda run: -1 if run.seed is None else run.seed)
    judged = [(run, found.verdicts[id(run)]) for run in by_seed]
    cell["seeds"] = [
        {
            "seed": run.seed,
            "run": run.name,
            "finding": v.finding if v else None,
            "fall": v.fall if v and run.ended is None else None,
        }
        for run, v in judged
    ]
    cell["findings"] = dict(summary.findings)
    cell["law"] = asdict(law) if law is not None else None
    cell["furthest"] = max(float(run.root_kl.max()) for run in runs)
    return cell


def _over_prompts(cell: dict[str, Any], run: Trajectory, verdict: Verdict | None) -> None:
    """One seed has no spread over seeds: its intervals are those over prompts, and the cell says so."""
    cell["over"] = "prompts"
    if run.ended is not None:
        return
    last = run.metrics[-1]
    for key, entry in (("final", last.get("win_rate")), ("final_kl", last.get("kl"))):
        cell[key] |= {bound: (entry or {}).get(bound) for bound in ("low", "high")}
    if verdict is not None:
        cell["fall"] |= {"low": verdict.lower, "high": verdict.upper}


def _at_end(found: Findings) -> list[dict[str, Any]]:
    """Each cell with weights against the same method without them, all else being equal, seed by seed."""
    rows = []
    against = baselines(found.lines)
    for line in found.lines:
        plain = against.get(line.cell)
        if plain is None:
            continue
        pair = found.summaries[line.cell], found.summaries[plain.cell]
        row = {"cell": line.cell, "label": line.title, "baseline": plain.cell, "baseline_label": plain.title}
        differences = {what: difference(*pair, what, confidence=found.confidence) for what in WHAT}
        rows.append(row | {what: asdict(value) for what, value in differences.items()})
    return rows


def _matched(found: Findings, title: str, group: MatchedKl) -> dict[str, Any]:
    """Matched KL of one group, with the differences over the common range."""
    titles = {line.cell: line.title for line in found.lines}
    return {"title": title, "baseline_label": titles[group.baseline], "labels": titles_of(group, titles)} | to_json(group)


def titles_of(group: MatchedKl, titles: Mapping[str, str]) -> dict[str, str]:
    """Names for people of a group's cells."""
    return {cell: titles[cell] for cell in [*group.cells, *group.excluded]}


def _samples(found: Findings) -> list[dict[str, Any]]:
    picked = representative(found.runs, list(found.summaries.values()), {})
    titles = {id(run): line.title for line in found.lines for run in line.runs}
    by_name = {(run.name, run.cell, run.seed): run for run in found.runs}
    blocks = []
    for run, why in picked:
        run = by_name[(run.name, run.cell, run.seed)]
        content = samples_of(run, found.verdicts[id(run)], found.evaluated["opponent"])
        if content is not None:
            blocks.append({"run": run.name, "label": titles[id(run)], "seed": run.seed, "why": why} | content)
    return blocks


def _training(found: Findings) -> dict[str, Any]:
    """Settings that all runs share, and by cell those that differ; empty where the runs keep none."""
    each = {line.cell: settings for line in found.lines if (settings := training_settings(line.runs[0]))}
    if not each:
        return {"shared": {}, "different": {}}
    keys = list(dict.fromkeys(key for settings in each.values() for key in settings if key not in ("seed", "align.seed")))
    first = next(iter(each.values()))
    same = {key for key in keys if all(key in settings and settings[key] == first.get(key) for settings in each.values())}
    different = {cell: {k: v for k, v in settings.items() if k in keys and k not in same} for cell, settings in each.items()}
    return {"shared": {key: first[key] for key in keys if key in same}, "different": different if len(each) > 1 else {}}


def _thinned(columns: Mapping[str, Any]) -> dict[str, Any]:
    keep = [row["i"] for row in thin([{"i": i} for i in range(len(columns["steps"]))])]
    return {name: [values[i] for i in keep] for name, values in columns.items()}


def _finite(value: Any) -> Any:
    """Plain data without NaN and infinities, which no JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        return _finite(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
