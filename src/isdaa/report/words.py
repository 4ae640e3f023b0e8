"""Sentences and numbers for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MINUS = str.maketrans("-", "−")  # of a number
OVER, NOT, UNDER = "over-optimised", "not detected", "underpowered"
NO_SCORER = (
    "No verdict: these runs were evaluated without a scorer, and KL, drift and held-out accuracy do not tell better from worse."
)
TOO_FEW = "No verdict: it takes at least three checkpoints of a run to tell a fall from noise."


def number(value: Any, digits: int = 2) -> str:
    """A number with a real minus sign; a dash where there is none."""
    if value is None:
        return "–"
    text = f"{float(value):.{digits}f}"
    if float(text) == 0:
        text = text.removeprefix("-")
    return text.replace("-", "−")


def percent(confidence: float) -> str:
    """`95 %`."""
    return f"{confidence * 100:g} %"


def interval(value: Mapping[str, Any] | None, digits: int = 2) -> str:
    """`0.61 [0.57, 0.65]`, without brackets where there are no bounds."""
    if not value or value.get("mean") is None:
        return "–"
    text = number(value["mean"], digits)
    if value.get("low") is None or value.get("high") is None:
        return text
    return f"{text} [{number(value['low'], digits)}, {number(value['high'], digits)}]"


def headline(report: Mapping[str, Any]) -> dict[str, str]:
    """`{"headline", "tone", "summary"}`: the verdict in one sentence, its colour, and what the sentence rests on."""
    runs, cells = report["runs"], report["cells"]
    judged = [run for run in runs if run["verdict"] is not None]
    basis = _basis(report)
    if not report["scored"]:
        return {"headline": NO_SCORER, "tone": "none", "summary": basis}
    if not judged:
        return {"headline": TOO_FEW, "tone": "none", "summary": basis}
    found = {run["verdict"]["finding"] for run in judged}
    tone = "over" if OVER in found else "under" if UNDER in found else "not"
    if len(runs) == 1:
        return {"headline": runs[0]["verdict"]["sentence"], "tone": tone, "summary": basis}
    return {
        "headline": f"{_who_fell(cells)}; {_who_keeps(cells, report['confidence'])}{_to_keep(report)}.",
        "tone": "mixed" if len(found) > 1 else tone,
        "summary": basis,
    }


def _who_fell(cells: Sequence[Mapping[str, Any]]) -> str:
    falling = [cell for cell in cells if cell["findings"].get(OVER)]
    falling.sort(key=lambda cell: -(cell["fall"]["mean"] or 0.0))
    judged = [cell for cell in cells if cell["findings"]]
    if not falling:
        unsure = sum(cell["findings"].get(UNDER, 0) for cell in judged)
        seeds = sum(sum(cell["findings"].values()) for cell in judged)
        return (
            f"No run over-optimised beyond doubt ({unsure} of {seeds} could not be decided)"
            if unsure
            else "No run over-optimised"
        )
    if len(judged) <= 4:
        parts = [f"{cell['label']} over-optimised on {_count(cell)}" for cell in falling]
        spared = [cell["label"] for cell in judged if cell not in falling]
        return ", ".join(parts) + (f", {_and(spared)} on none" if spared else "")
    always = [cell for cell in falling if cell["findings"][OVER] == sum(cell["findings"].values())]
    worst = falling[0]
    return (
        f"{len(falling)} of {len(judged)} cells over-optimised on some seed, {len(always) or 'none'} on every seed, "
        f"worst {worst['label']} ({_count(worst)}, win rate down {number(worst['fall']['mean'])})"
    )


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
    # From two seeds a t-interval tells nothing apart, and saying so of every cell would say nothing.
    alike = sum(gap["seeds"] > 2 and gap["low"] <= 0 for gap in gaps)
    cannot = f", though {alike} other{'s' * (alike != 1)} cannot be told from it with these seeds" if alike else ""
    return f"{best['label']} keeps most, with a final win rate of {number(final['mean'])}{spread}{cannot}"


def _to_keep(report: Mapping[str, Any]) -> str:
    """The checkpoint to keep of the best cell's run that ends highest; the page lists every run's."""
    best = next(cell for cell in report["cells"] if cell["final"]["mean"] is not None)
    runs = [run for run in report["runs"] if run["cell"] == best["cell"] and run["recommended"] is not None]
    if not runs:
        return ""
    top = max(runs, key=lambda run: run["checkpoints"][-1]["win_rate"]["mean"])  # judged, so it has one
    what = "the reference" if top["recommended"]["step"] == 0 else f"step {top['recommended']['step']}"
    return f"; keep its {what}" if len(runs) == 1 else f"; of its runs {top['name']} ends highest: keep {what} of it"


def _basis(report: Mapping[str, Any]) -> str:
    runs = report["runs"]
    checkpoints = sum(len(run["checkpoints"]) for run in runs)
    words = [f"{len(runs)} run{'s' * (len(runs) != 1)}", f"{checkpoints} checkpoints", f"{report['prompts']} held-out prompts"]
    if len(report["cells"]) != len(runs):
        words.insert(0, f"{len(report['cells'])} cells")
    if report["scored"]:
        opponent = "the data's chosen responses" if report["opponent"] == "chosen" else "the reference"
        words.append(f"win rate against {opponent}, scored by {report['scorer']['name']}")
    return ", ".join(words) + "."


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
