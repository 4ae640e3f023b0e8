"""Sentences and numbers for people."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from isdaa.evaluation.checkpoints.analysis import no_measure
from isdaa.evaluation.left_out import endings
from isdaa.evaluation.verdict.comparison import FEW
from isdaa.evaluation.verdict.overoptimization import NONE_BETTER

MINUS = str.maketrans("-", "−")  # of a number
MOST_NAMED = 4  # cells in a sentence
REFERENCE = "the reference"  # what is kept where no checkpoint is
OVER, WORSE, UNDER, DIVERGED = "over-optimised", "worse", "underpowered", "diverged"
UNBOUNDED = "[–]"  # for an interval over seeds
TOO_FEW = "No verdict: it needs at least three checkpoints of one run."


def number(value: Any, digits: int = 2) -> str:
    """A number with a real minus sign; a dash where there is none."""
    if value is None:
        return "–"
    return f"{float(value):z.{digits}f}".replace("-", "−")


def percent(confidence: float) -> str:
    """`95 %`."""
    return f"{confidence * 100:g} %"


def interval(value: Mapping[str, Any] | None, digits: int = 2) -> str:
    """`0.61 [0.57, 0.65]`, without brackets where there are no bounds, `0.61 [–]` where seeds are too few for them."""
    if not value or value.get("mean") is None:
        return "–"
    text = number(value["mean"], digits)
    if value.get("low") is None or value.get("high") is None:
        return f"{text} {UNBOUNDED}" if value.get("seeds", 1) > 1 else text
    return f"{text} [{number(value['low'], digits)}, {number(value['high'], digits)}]"


def headline(report: Mapping[str, Any]) -> dict[str, Any]:
    """`{"headline", "tone", "summary", "keep"}`: the verdict in one sentence, its colour, what the sentence rests on, and the
    checkpoint that it says to keep (label, path, step), or None.

    What comes first of all: which runs ended in weights that are not finite.
    """
    found, ended = {"keep": None} | _headline(report), report.get("ended") or {}
    if not ended:
        return found
    more = len(ended.keys() - {run["name"] for run in report["runs"]})  # of which nothing is left
    alone = len(report["runs"]) + more == 1 and (report["runs"][0]["verdict"] or {}).get("finding") == DIVERGED
    first = [] if alone else endings(ended, len(report["runs"]) + more)  # a lone run's verdict says it itself
    return found | {"headline": " ".join([*first, found["headline"]]), "tone": "over"}


def _headline(report: Mapping[str, Any]) -> dict[str, Any]:
    runs, cells = report["runs"], report["cells"]
    judged = [run for run in runs if run["verdict"] is not None]
    basis = _basis(report)
    if not report["scored"]:
        which = "this run was" if len(runs) == 1 else "these runs were"
        measured = any(row["accuracy"] is not None for run in runs for row in run["checkpoints"])
        words = f"No verdict: {which} evaluated without a scorer, and {no_measure(measured)}"
        return {"headline": words, "tone": "none", "summary": basis}
    nothing = all(run["better"] is False for run in runs)  # a run that gained nothing is no good news
    if not judged:
        none = f" {NONE_BETTER[:1].upper()}{NONE_BETTER[1:]}." if nothing else ""
        return {"headline": TOO_FEW + none, "tone": "none", "summary": basis}
    found = {run["verdict"]["finding"] for run in judged}
    tone = "over" if found & {OVER, WORSE} else "under" if UNDER in found or nothing else "not"
    if all(cell["final"]["mean"] is None for cell in cells) and len(runs) > 1:
        sentences = [f"{_cell(run)}: {run['verdict']['sentence']}" for run in judged]
        return {"headline": " ".join(sentences), "tone": tone, "summary": basis}
    if len(runs) == 1:
        only = runs[0]["recommended"]
        keep = None if only is None or only["label"] == REFERENCE else only
        return {"headline": runs[0]["verdict"]["sentence"], "tone": tone, "summary": basis, "keep": keep}
    keeps = "" if nothing else f"; {_who_keeps(cells, report['confidence'])}"
    words, keep = _to_keep(report)
    return {
        "headline": f"{_who_fell(cells, opponent_of(report))}{keeps}{words}{_not_better(report)}.",
        "keep": keep,
        "tone": "mixed" if len(found) > 1 else tone,
        "summary": basis,
    }


def opponent_of(report: Mapping[str, Any]) -> str:
    """Whom the win rates are against, in words."""
    return "the data's chosen responses" if report["opponent"] == "chosen" else "the reference"


def _who_fell(cells: Sequence[Mapping[str, Any]], opponent: str) -> str:
    falling = [cell for cell in cells if cell["findings"].get(OVER)]
    falling.sort(key=lambda cell: -(cell["fall"]["mean"] or 0.0))
    judged = [cell for cell in cells if cell["findings"]]
    if not falling:
        seeds = sum(sum(cell["findings"].values()) for cell in judged)
        told = {WORSE: "worse at the end", UNDER: "with too little data to tell", DIVERGED: "diverged"}
        counts = {words: sum(cell["findings"].get(finding, 0) for cell in judged) for finding, words in told.items()}
        doubts = ", ".join(f"{count} of {seeds} {words}" for words, count in counts.items() if count)
        return f"No run is shown to have over-optimised ({doubts})" if doubts else "No run over-optimised"
    if len(judged) <= MOST_NAMED:
        seeds = any(sum(cell["findings"].values()) > 1 for cell in judged)
        parts = [
            f"{_cell(cell)} over-optimised{f' on {_count(cell)}' if seeds else ''} "
            f"({f'win rate against {opponent} ' * (cell is falling[0])}down {number(cell['fall']['mean'])}){_worse(cell)}"
            for cell in falling
        ]
        worse = [cell for cell in judged if cell not in falling and _worse(cell)]
        parts += [f"{_cell(cell)}{f' on none{_worse(cell)}' if seeds else ' is worse at the end'}" for cell in worse]
        spared = [_cell(cell) for cell in judged if cell not in falling and cell not in worse]
        return ", ".join(parts) + (f", {_and(spared)} {'on none' if seeds else 'did not'}" if spared else "")
    always = [cell for cell in falling if cell["findings"][OVER] == sum(cell["findings"].values())]
    worst = falling[0]
    return (
        f"{len(falling)} of {len(judged)} cells over-optimised on some seed, {len(always) or 'none'} on every seed, "
        f"worst {_cell(worst)} ({_count(worst)}, win rate against {opponent} down {number(worst['fall']['mean'])})"
    )


def _cell(named: Mapping[str, Any]) -> str:
    """A cell's or a run's label within a sentence, whose commas must not be taken for those of a list: `dpo (β = 0.01)`."""
    method, comma, settings = str(named["label"]).partition(", ")
    return f"{method} ({settings})" if comma and named["method"] is not None else str(named["label"])


def _worse(cell: Mapping[str, Any]) -> str:
    """How many of its seeds end worse than they were without being over-optimised for sure."""
    count = cell["findings"].get(WORSE, 0)
    return f" (worse at the end on {count})" if count else ""


def _count(cell: Mapping[str, Any]) -> str:
    total = sum(cell["findings"].values())
    return f"{cell['findings'].get(OVER, 0)} of {total} seed{'s' * (total != 1)}"


def _who_keeps(cells: Sequence[Mapping[str, Any]], confidence: float) -> str:
    """The cell with the highest final win rate; where seeds are few, others may be as good, and the sentence says so."""
    best, *others = [cell for cell in cells if cell["final"]["mean"] is not None]
    final = best["final"]
    spread = ""
    if final["low"] is not None:
        spread = f" ({percent(confidence)} interval {number(final['low'])} to {number(final['high'])})"
    gaps = [cell["below_best"] for cell in others if "below_best" in cell]
    # Two seeds tell nothing apart, and saying so of every cell would say nothing.
    alike = sum(gap["seeds"] >= FEW and (gap["low"] is None or gap["low"] <= 0) for gap in gaps)
    cannot = f", though {alike} other{'s' * (alike != 1)} cannot be told from it with these seeds" if alike else ""
    return f"{_cell(best)} ends highest, with a win rate of {number(final['mean'])}{spread}{cannot}"


def _to_keep(report: Mapping[str, Any]) -> tuple[str, Mapping[str, Any] | None]:
    """What to keep, in words, and the checkpoint: of the best cell, of its run that ends highest; the page lists every run's."""
    best = next(cell for cell in report["cells"] if cell["final"]["mean"] is not None)
    runs = [run for run in report["runs"] if run["cell"] == best["cell"] and run["recommended"] is not None]
    runs = [run for run in runs if run["verdict"]["finding"] != DIVERGED]
    if all(run["better"] is False for run in report["runs"]):
        return f"; {NONE_BETTER}: keep the reference", None
    if not runs:
        return "", None
    top = max(runs, key=lambda run: run["checkpoints"][-1]["win_rate"]["mean"])  # judged, so it has one
    other = max(report["runs"], key=lambda run: _kept(run)["mean"])
    if other["cell"] != best["cell"] and (_kept(other)["low"] or 0.0) > _kept(top)["mean"]:
        where = _cell(other) if sum(run["cell"] == other["cell"] for run in report["runs"]) == 1 else other["name"]
        rate = number(_kept(other)["mean"])
        return f"; but the best of all is {_name(other['recommended'])} of {where}, with {rate}: keep that", other["recommended"]
    if top["recommended"]["label"] == REFERENCE:
        whose = "of it" if len(runs) == 1 else f"of {top['name']}, its run that ends highest,"
        return f"; but no checkpoint {whose} is shown to be better than the reference", None
    what = _name(top["recommended"])
    words = f"; keep its {what}" if len(runs) == 1 else f"; of its runs {top['name']} ends highest: keep {what} of it"
    return words, top["recommended"]


def keep_lines(report: Mapping[str, Any]) -> list[str]:
    """The folder of the checkpoint that the headline says to keep, and what puts it on the Hub; no line where it names none."""
    kept = report.get("keep")
    if kept is None:
        return []
    upload = [f"upload: hf upload OWNER/NAME {shlex.quote(kept['path'])}"] if Path(kept["path"]).is_dir() else []
    return [f"keep: {kept['path']}", *upload]


def _name(checkpoint: Mapping[str, Any]) -> str:
    return PurePath(checkpoint["label"]).name if checkpoint["step"] is None else f"step {checkpoint['step']}"


def _kept(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """Win rate of the checkpoint that is to be kept of a run; 0 where none is."""
    return next((row["win_rate"] for row in run["checkpoints"] if row["recommended"]), {"mean": 0.0, "low": 0.0})


def _not_better(report: Mapping[str, Any]) -> str:
    """The other cells of which no checkpoint is shown to be better than the reference, where there are few."""
    better: dict[str, list[Any]] = {}
    for run in report["runs"]:
        better.setdefault(run["cell"], []).append(run["better"])
    best, *others = [cell for cell in report["cells"] if cell["final"]["mean"] is not None]
    names = [_cell(cell) for cell in others if all(found is False for found in better[cell["cell"]])]
    if not names or (len(others) == len(names) and all(found is False for found in better[best["cell"]])):
        return ""  # none at all, which is said
    which = _and(names) if len(names) <= MOST_NAMED else f"{len(names)} other cells"
    return f"; no checkpoint of {which} is shown to be better than the reference (95 %)"


def _basis(report: Mapping[str, Any]) -> str:
    runs = report["runs"]
    checkpoints = sum(len(run["checkpoints"]) for run in runs)
    counts = [(len(runs), "run"), (checkpoints, "checkpoint"), (report["prompts"], "held-out prompt")]
    if len(report["cells"]) != len(runs):
        counts.insert(0, (len(report["cells"]), "cell"))
    words = ", ".join(f"{count} {what}{'s' * (count != 1)}" for count, what in counts)
    if not report["scored"]:
        return f"{words}."
    scorer = report["scorer"]
    about = f" ({scorer['about'][1]})" if len(scorer.get("about", ())) > 1 else ""
    how = "judged" if scorer.get("kind") == "judge" else "scored"
    words += f", win rate against {opponent_of(report)}, {how} by {scorer['name']}{about}."
    theirs = "the chosen one" if report["opponent"] == "chosen" else "the reference's"
    return f"{words} Win rate: how often a checkpoint's answer is preferred to {theirs}."


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
