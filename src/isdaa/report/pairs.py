"""Which cells are the same but for the weights of their pairs, and are therefore compared with each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isdaa.evaluation.verdict.comparison import MatchedKl, at_matched_kl
from isdaa.objectives.presets import PRESETS
from isdaa.report.charts.lines import MOST, PRIVATE, Line, alignment, training_settings

WEIGHT = "objective.weight"
WEIGHT_KEYS = ("objective.method", WEIGHT, "objective.clip", "objective.clip_eps", "objective.normalize")
DATA = ("data.limit", "data.eval_fraction")  # of the settings of the data, those that are no places


@dataclass(frozen=True, eq=False)
class Group:
    """Cells to compare: a method without weights, and those that are trained as it is but for weights or method."""

    title: str
    baseline: Line
    others: Sequence[Line]

    def matched(self, confidence: float) -> MatchedKl | None:
        """The group at matched KL; None where no range is common to any two cells."""
        runs = [run for line in [self.baseline, *self.others] for run in line.runs if run.wins is not None]
        return at_matched_kl(runs, self.baseline.cell, confidence=confidence) if runs else None


@dataclass(frozen=True, eq=False)
class _Recipe:
    """How a cell is trained but for its weights: what its grid sets; outside a sweep, what each seed's run was started with."""

    plain: bool  # a method without weights
    told: int  # settings of weights that the cell sets, whether or not they change anything
    grid: Mapping[str, Any] | None
    seeds: Mapping[int | None, Mapping[str, Any]]

    def same(self, other: _Recipe) -> bool:
        if self.grid is not None or other.grid is not None:
            return self.grid == other.grid
        both = self.seeds.keys() & other.seeds.keys()
        return bool(both) and all(self.seeds[seed] and self.seeds[seed] == other.seeds[seed] for seed in both)


def baselines(lines: Sequence[Line]) -> dict[str, Line]:
    """Cell with weights -> the same method without, all else being equal; cells for which there is none are not in it."""
    recipes = {line.cell: _recipe(line) for line in lines}
    plain = [line for line in lines if recipes[line.cell].plain]
    found = {}
    for line in lines:
        own = recipes[line.cell]
        alike = [other for other in plain if (other.family, other.beta) == (line.family, line.beta)]
        alike = [other for other in alike if own.same(recipes[other.cell])]
        if alike and not own.plain:
            found[line.cell] = min(alike, key=lambda other: recipes[other.cell].told)
    return found


def weighted_groups(lines: Sequence[Line], most: int = MOST) -> list[Group]:
    """Each method without weights with its own weighted cells, at most `most` cells in one group."""
    found = baselines(lines)
    groups = []
    for plain in lines:
        others = [line for line in lines if found.get(line.cell) is plain]
        parts = [others[i : i + most - 1] for i in range(0, len(others), most - 1)]
        for number, part in enumerate(parts, start=1):
            more = f" ({number} of {len(parts)})" if len(parts) > 1 else ""
            groups.append(Group(plain.title + more, plain, part))
    return groups


def drawn_groups(lines: Sequence[Line], most: int = MOST) -> list[Group]:
    """Groups to look at: all methods that are trained alike where those are at most `most` cells, else one a family."""
    recipes = {line.cell: _recipe(line) for line in lines}
    betas = {line.beta for line in lines}
    groups: list[Group] = []
    done: set[str] = set()
    for plain in lines:
        if plain.cell in done or not recipes[plain.cell].plain:
            continue
        members = [x for x in lines if x.beta == plain.beta and (x is plain or recipes[plain.cell].same(recipes[x.cell]))]
        done |= {line.cell for line in members}
        if len(members) > most:
            groups += weighted_groups(members, most)
        elif len(members) > 1:
            groups.append(Group(_title(plain, members, len(betas) > 1), plain, [line for line in members if line is not plain]))
    return groups


def _title(plain: Line, members: Sequence[Line], several: bool) -> str:
    """What the members share: their family, or at least how they are trained, and β where the study has several."""
    shared = plain.label if len({line.family for line in members}) == 1 else plain.label.partition(", ")[2]
    beta = f"β = {plain.beta:g}" if several and plain.beta is not None else ""
    return ", ".join(filter(None, (shared, beta)))


def _recipe(line: Line) -> _Recipe:
    run = line.runs[0]
    started = training_settings(run)
    settings = run.settings or started
    weight = started.get(WEIGHT, settings.get(WEIGHT, "preset"))
    if weight == "preset":
        weight = PRESETS[line.family].settings.get("weight", "none") if line.family in PRESETS else "none"
    return _Recipe(
        plain=line.method == line.family and weight == "none",
        told=sum(key in settings for key in WEIGHT_KEYS),
        grid={key: value for key, value in run.settings.items() if key not in WEIGHT_KEYS} if run.settings else None,
        seeds={} if run.settings else {run.seed: _started(alignment(run)) for run in line.runs},
    )


def _started(stage: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of one run without weights and places; what lay in those places is told by its digest."""
    values = stage.get("values") or {}
    kept = {k: v for k, v in values.items() if k not in (*WEIGHT_KEYS, *PRIVATE) and (k in DATA or not k.startswith("data."))}
    pinned = stage.get("pinned") or {}
    return kept | {name: pinned[name] for name in ("weights", "pairs") if name in pinned} if kept else {}
