"""Which charts the report has, in which order, and what a reader is told beside each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isdaa.evaluation.fragments import is_fragmentary
from isdaa.report.charts.lines import Line, Panel, grids_of, panels_of, training_settings
from isdaa.report.charts.training_curves import (
    NUMBER,
    STEP,
    Quantity,
    course_chart,
    has,
    in_sight,
    logged_weights,
    quantile_chart,
    weights_chart,
)  # fmt: skip
from isdaa.report.charts.win_rate_curves import final_chart, laws_of, matched_charts, mean_path, panels_chart
from isdaa.report.content import Findings
from isdaa.report.pairs import drawn_groups
from isdaa.report.words import percent

CAPTIONS = {
    "path, start": (
        "Read along a line from the open circle, which is the untrained reference (dashed: its own win rate): each dot "
        "is a checkpoint, the ring the last one. "
    ),
    "path": "Read along a line from left to right: each dot is a checkpoint, the ring the last one. ",
    "path, fall": "A line that falls while it still moves right shows over-optimisation.",
    "path, means": " Thick lines are means over seeds, thin lines the seeds.",
    "path, seeds": " Thin lines are seeds.",
    "path, bars": " Bars are {level} intervals over prompts.",
    "path, kept": " The diamond is the checkpoint to keep.",
    "path, law": (
        " Dashed: the fitted law R(d) = d·(a − b·log d); the triangle at the foot marks its peak d*, the bar the peak's "
        "95 % interval."
    ),
    "path, no law": " The fitted law R(d) = d·(a − b·log d) is not drawn, and no peak named: {why}.",
    "fragments": " These win rates are of fragments: many responses were cut, see above.",
    "final": (
        "Win rate at the end of training, best first. {discs}; the hollow square is the best checkpoint, so the gap to it is "
        "what was lost."
    ),
    "final, seeds": "Discs are means over seeds with their {level} t-intervals, small dots the seeds",
    "final, both": (
        "Discs are means over seeds with their {level} t-intervals, small dots the seeds; a disc without an interval is one run"
    ),
    "final, one": "A disc is a run",
    "matched": "The same runs compared at equal distance from the reference, over the range that all reach. ",
    "matched, seeds": "Lines are means over seeds, bands their {level} t-intervals.",
    "matched, one": "A line is a run.",
    "matched, groups": " Cells in one panel were trained alike but for method and weights.",
    "matched, left": " Groups without a common range are left out.",
    "quantiles": (
        "Logarithm of the importance weight before the clip: median, middle half (dark) and middle nine tenths (pale) of the "
        "pairs of a batch. The further it sinks, the fewer pairs still teach."
    ),
    "quantiles, clip": " Dashed: the joint clip.",
}
WEIGHTS = {
    "mean": "mean weight of the pairs of a batch",
    "ess": (
        "ESS / N, the effective sample size as a share of the batch (1: all pairs count alike, near 0: a handful of pairs decide)"
    ),
    "clip_fraction": "share of pairs whose weight the clip cut",
}
NAMED = 6  # cells that a caption names
FOLDED = 9  # a figure of more panels is folded until the reader opens it
WIN = Quantity("win_rate", "Win rate", "win rate", "How often the judge prefers the policy's answer.")
REWARD = Quantity("reward", "Mean score (points)", "score", "Mean points that the scorer gives the policy's answers.", ".2~f")
KL = Quantity("kl", "KL from the reference (nats)", "distance", "How far the policy has moved from the reference.", ".2~f")
TEXTS = (
    Quantity("length", "Length (tokens)", "length", "A policy often games its judge with longer and longer answers.", ".2~f"),
    Quantity(
        "truncated", "Share cut at the limit", "truncation",
        "Share of answers that did not end before the limit on new tokens.", ".3~f",
    ),
    Quantity(
        "repetition", "Share of repeated 4-grams", "repetition",
        "Share of an answer's 4-grams that occurred in it before.", ".3~f",
    ),
)  # fmt: skip
HELD_OUT = (
    Quantity(
        "held_out.accuracy", "Implicit-reward accuracy", "accuracy",
        "Share of held-out pairs that the policy ranks as labelled; 0.5 is guessing.",
    ),
    Quantity(
        "held_out.chosen_drift", "Chosen drift (nats)", "drift of the chosen",
        "How far the log-probability of the chosen responses has moved from the reference's.", ".2~f",
    ),
    Quantity(
        "held_out.rejected_drift", "Rejected drift (nats)", "drift of the rejected responses",
        "How far the log-probability of the rejected responses has moved from the reference's.", ".2~f",
    ),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Figure:
    """One chart. draw: total width in pixels -> chart. caption: how to read it, for people."""

    name: str  # of its files, and unique on the page
    section: str
    title: str
    caption: str
    draw: Callable[[int], Any]
    panels: int = 1

    @property
    def folded(self) -> bool:
        """Whether the page shows it only on request."""
        return self.panels > FOLDED and self.section != "win"


def figures_of(found: Findings) -> list[Figure]:
    """All charts that this study has numbers for."""
    figures = [*_win_rates(found), *_ends(found)] if found.study.scored else []
    figures += _courses(found)
    return figures + _weights(found)


def _win_rates(found: Findings) -> list[Figure]:
    """Win rate against √KL, one figure a grid of the sweep."""
    keep = _kept(found)
    grids = grids_of(found.lines)
    groups: list[tuple[str, str, Sequence[Panel]]] = [("win-rate-kl", "Win rate as the policy moves away", found.panels)]
    if grids:
        groups = [
            (f"win-rate-kl-{number}", f"Win rate as the policy moves away: {grid}", panels_of(lines))
            for number, (grid, lines) in enumerate(grids.items(), start=1)
        ]

    def drawing(panels: Sequence[Panel]) -> Callable[[int], Any]:
        return lambda width: panels_chart(panels, width=width, laws=found.laws, keep=keep, named=len(found.lines) > 1)

    return [
        Figure(
            name,
            "win",
            title,
            _marks_of(found, panels, keep) + _laws(found, panels) + _fragments(found),
            drawing(panels),
            len(panels),
        )
        for name, title, panels in groups
        if any(run.wins is not None for panel in panels for line in panel.lines for run in line.runs)
    ]


def _marks_of(found: Findings, panels: Sequence[Panel], keep: Mapping[str, int]) -> str:
    """How to read the marks that these panels have."""
    lines = [(line, runs) for panel in panels for line in panel.lines if (runs := [r for r in line.runs if r.wins is not None])]
    told = CAPTIONS["path, start" if any(run.start is not None for _, runs in lines for run in runs) else "path"]
    told += CAPTIONS["path, fall"]
    several = [runs for _, runs in lines if len(runs) > 1]
    if several:
        told += CAPTIONS["path, means" if any(mean_path(runs) is not None for runs in several) else "path, seeds"]
    alone = [(line.cell, runs[0]) for line, runs in lines if len(runs) == 1]
    if any((entry.get("win_rate") or {}).get("low") is not None for _, run in alone for entry in run.metrics):
        told += CAPTIONS["path, bars"].format(level=_level(found))
    return told + CAPTIONS["path, kept"] * any(cell in keep for cell, _ in alone)


def _laws(found: Findings, panels: Sequence[Panel]) -> str:
    """What the caption says of the laws: that they are drawn, and of those that are not, why."""
    lines = [line for panel in panels for line in panel.lines]
    drawn = [line for panel in panels for line in laws_of(panel, found.laws)]
    told = CAPTIONS["path, law"] if drawn else ""
    doubts: dict[str, list[str]] = {}
    for line in lines:
        law = found.laws[line.cell]
        if law is not None and law.doubt is not None:
            doubts.setdefault(law.doubt, []).append(line.title)
    if not doubts:
        return told
    if len(lines) == 1:
        return told + CAPTIONS["path, no law"].format(why=next(iter(doubts)))
    if (many := sum(map(len, doubts.values()))) > NAMED:
        return told + f" For {many} of {len(lines)} cells no law is drawn and no peak named; the table of the laws says why."
    each = "; ".join(f"{', '.join(names)} ({why})" for why, names in doubts.items())
    return told + f" No law is drawn and no peak named for {each}."


def _fragments(found: Findings) -> str:
    """Said beside every win rate, where so many responses were cut that it is one of fragments."""
    return CAPTIONS["fragments"] if any(is_fragmentary(found.evaluated, entry) for entry in found.evaluated["models"]) else ""


def _kept(found: Findings) -> dict[str, int]:
    """Cell -> index of the recommended checkpoint, for cells of one run."""
    kept = {}
    for line in found.lines:
        verdict = found.verdicts[id(line.runs[0])]
        if len(line.runs) == 1 and verdict is not None and not verdict.keeps_reference:
            kept[line.cell] = verdict.recommended
    return kept


def _ends(found: Findings) -> list[Figure]:
    """The cells side by side: at the end of training, and where they are equally far from the reference."""
    titles = {line.cell: line.title for line in found.lines}
    labels = {line.cell: line.label for line in found.lines}
    colours = {line.cell: line.colour for line in found.lines}
    scored = [summary for summary in found.summaries.values() if summary.final.seeds]
    start = next((run.start for run in found.runs if run.start is not None), None)
    groups = found.drawn
    level = _level(found)
    opponent = "the chosen responses" if found.study.metrics.get("opponent") == "chosen" else "the reference"

    seeds = {len(summary.runs) > 1 for summary in scored}
    discs = "final, both" if len(seeds) > 1 else "final, seeds" if True in seeds else "final, one"
    how = CAPTIONS["final"].format(discs=CAPTIONS[discs].format(level=level)) + " Dashed: the reference." * (start is not None)

    def final(width: int) -> Any:
        return final_chart(scored, width=width, titles=titles, colours=colours, start=start, opponent=opponent)

    def matched(width: int) -> Any:
        return matched_charts(groups, width=width, labels=labels, colours=colours, opponent=opponent)

    figures = [Figure("final", "compare", "At the end of training", how + _fragments(found), final)] if len(scored) > 1 else []
    if groups:
        bands = any(mean.low is not None for _, group in groups for means in group.cells.values() for mean in means)
        caption = CAPTIONS["matched"] + CAPTIONS["matched, seeds" if bands else "matched, one"].format(level=level)
        caption += CAPTIONS["matched, groups"] * (len(groups) > 1)
        caption += CAPTIONS["matched, left"] * (len(groups) < len(drawn_groups(found.lines))) + _fragments(found)
        figures.append(Figure("matched-kl", "compare", "At matched KL", caption, matched, len(groups)))
    return figures


def _level(found: Findings) -> str:
    return percent(found.confidence)


def _courses(found: Findings) -> list[Figure]:
    """Numbers of the checkpoints over training: side by side where there is one panel, a figure each where there are many."""
    sections = {"training": (WIN, REWARD, KL), "texts": TEXTS, "held_out": HELD_OUT}
    figures = []
    for section, named in sections.items():
        quantities = [quantity for quantity in named if has(found.panels, quantity)]
        groups: list[Sequence[Quantity]] = [(quantity,) for quantity in quantities]
        if len(found.panels) == 1 and len(quantities) > 1:
            groups = [quantities]
        for group in groups:
            alone = len(groups) > 1
            title = group[0].title if len(group) == 1 else _and([quantity.short for quantity in group])
            caption = " ".join(quantity.caption for quantity in group) + _marks(found, group)
            caption += _fragments(found) if WIN in group and found.study.scored else ""
            name = group[0].name if alone else section.replace("_", "-")
            figures.append(Figure(name, section, title, caption, _course(found, group), len(found.panels)))
    return figures


def _and(names: Sequence[str]) -> str:
    told = ", ".join(names[:-1]) + " and " + names[-1]
    return told[:1].upper() + told[1:]


def _course(found: Findings, group: Sequence[Quantity]) -> Callable[[int], Any]:
    """Draws the quantities over training."""

    def draw(width: int) -> Any:
        step = STEP if found.steps_known else NUMBER
        return course_chart(found.panels, group, width=width, reference=found.reference, step=step)

    return draw


def _marks(found: Findings, group: Sequence[Quantity]) -> str:
    seeds = " Thin lines are seeds." if any(len(line.runs) > 1 for line in found.lines) else ""
    return seeds + (" Dashed: the reference." if any(q.of(found.reference) is not None for q in group) else "")


def _weights(found: Findings) -> list[Figure]:
    weighted = [(line, found.weights[line.cell]) for line in found.lines if line.cell in found.weights]
    quantiles = [(line, columns) for line, columns in weighted if "log_weight_p05" in columns]
    limits = {line.cell: _limit(line) for line, _ in weighted}
    cells = {line.cell for line, _ in weighted}
    members = [(panel, [(x, found.weights[x.cell]) for x in panel.lines if x.cell in cells]) for panel in found.panels]
    alone = len(found.panels) == 1
    groups = [("" if alone else panel.title, lines) for panel, lines in members if lines]

    def spread(width: int) -> Any:
        return quantile_chart(quantiles, width=width, limits=limits)

    def after(width: int) -> Any:
        return weights_chart(groups, width=width)

    figures = []
    if quantiles:
        title = "Log-weights before the clip"
        spreads = [columns for _, columns in quantiles]
        drawn = [limit for line, _ in quantiles if (limit := limits[line.cell]) is not None and in_sight(limit, spreads)]
        clip = CAPTIONS["quantiles, clip"] if drawn else ""
        figures.append(Figure("log-weights", "weights", title, CAPTIONS["quantiles"] + clip, spread, len(quantiles)))
    if groups:
        names = [key for key, _ in logged_weights(groups)]
        caption = "; ".join(WEIGHTS[key] for key in names) + "."
        caption = caption[:1].upper() + caption[1:]
        figures.append(Figure("weights", "weights", "Weights after the clip", caption, after, len(names) * len(groups)))
    return figures


def _limit(line: Line) -> float | None:
    """The log-weight at which the cell's clip cuts, where the run says it: 2ε of both responses together.

    A clip per response cuts each response's part, so no one log-weight of a pair is its limit.
    """
    settings = training_settings(line.runs[0])
    clip = settings.get("objective.clip_eps")
    joint = settings.get("objective.weight") == "importance" and settings.get("objective.clip") == "joint"
    return 2 * float(clip) if joint and isinstance(clip, (int, float)) else None
