"""Which runs belong together in one line, and which lines share a panel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from isdaa.errors import UserError
from isdaa.evaluation.checkpoints.trajectory import Study, Trajectory
from isdaa.foreign import read_object, readable_jsonl
from isdaa.record import run_folder
from isdaa.report.charts.labels import colours_of, labels_of
from isdaa.report.charts.style import PALETTE

# What differs between runs of one cell, and says nothing of how they were trained.
PRIVATE = ("seed", "align.seed", "model.path", "model.tokenizer", "reference.path", "behaviour.model_path", "align.eval_steps")
MOST = 6  # lines in one panel


@dataclass(frozen=True, eq=False)
class Line:
    """One cell: a method with its settings, over its seeds. label: what tells it from others at its β."""

    cell: str
    label: str
    method: str | None
    beta: float | None
    runs: Sequence[Trajectory]
    colour: str = PALETTE[0]
    grids: Sequence[str] = ()

    @property
    def family(self) -> str:
        """The method without its weights: `dpo` of `is_dpo`."""
        return (self.method or self.label).removeprefix("is_")

    @property
    def title(self) -> str:
        """Label and β."""
        return self.label if self.beta is None else f"{self.label}, β = {self.beta:g}"


@dataclass(frozen=True, eq=False)
class Panel:
    """Lines that are drawn together."""

    title: str
    lines: Sequence[Line]

    @property
    def beta(self) -> float | None:
        """The β of all its lines."""
        return self.lines[0].beta


def lines_of(study: Study) -> list[Line]:
    """One line a cell, in the order in which cells first occur; runs of no sweep are grouped by what they were trained with."""
    grids = {cell["name"]: tuple(cell.get("grids") or ()) for cell in study.cells}
    groups: dict[str, list[Trajectory]] = {}
    names = _cell_names(study.runs)
    for run, name in zip(study.runs, names, strict=True):
        groups.setdefault(name, []).append(replace(run, cell=name, metrics=_entries(run)))
    first = {name: runs[0] for name, runs in groups.items()}
    labels = labels_of(first, [cell.get("settings") or {} for cell in study.cells])
    return coloured(
        [
            Line(name, labels[name], runs[0].method, runs[0].beta, tuple(runs), grids=grids.get(name, ()))
            for name, runs in groups.items()
        ]
    )


def coloured(lines: Sequence[Line], together: Sequence[Sequence[Line]] = ()) -> list[Line]:
    """The lines in colours that tell them apart, one a label, whatever its β. together: lines that share a panel."""
    sets = [list(dict.fromkeys(line.label for line in members)) for members in together]
    colours = colours_of([(line.label, line.family) for line in lines], sets)
    return [replace(line, colour=colours[line.label]) for line in lines]


def panels_of(lines: Sequence[Line], most: int = MOST) -> list[Panel]:
    """One panel a β, by rising β; where a β has more than `most` lines, one a β and family of methods."""
    betas: dict[float | None, list[Line]] = {}
    for line in lines:
        betas.setdefault(line.beta, []).append(line)
    order = sorted(betas, key=lambda beta: (beta is None, beta or 0.0))
    words = {beta: "β not known" if beta is None else f"β = {beta:g}" for beta in order}
    if all(len(members) <= most for members in betas.values()):
        alone = len(order) == 1 and order[0] is None
        return [Panel("" if alone else words[beta], betas[beta]) for beta in order]
    panels = []
    for family in dict.fromkeys(line.family for line in lines):
        for beta in order:
            members = [line for line in betas[beta] if line.family == family]
            parts = [members[i : i + most] for i in range(0, len(members), most)]
            for number, part in enumerate(parts, start=1):
                more = f" ({number} of {len(parts)})" if len(parts) > 1 else ""
                panels.append(Panel(f"{family}, {words[beta]}{more}", part))
    return panels


def grids_of(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Grid of the sweep -> its lines; empty where there is only one grid."""
    grids = dict.fromkeys(grid for line in lines for grid in line.grids)
    return {grid: [line for line in lines if grid in line.grids] for grid in grids} if len(grids) > 1 else {}


def file_of(run: Trajectory, name: str) -> Path | None:
    """A file of the run's folder; where that was moved since it was evaluated, of the folder around its evaluation."""
    recorded = run_folder(run.paths[-1]) if len(run.paths) else None
    if recorded is None:
        return None
    around = run.evaluation.resolve().parent if run.evaluation is not None else None
    moved = [around] if around is not None and around.name == recorded.name else []
    return next((folder / name for folder in [recorded, *moved] if (folder / name).is_file()), None)


def alignment(run: Trajectory) -> dict[str, Any]:
    """What the run's folder records of its alignment: `values`, `pinned`; empty where it keeps none."""
    record = file_of(run, "run.json")
    if record is None:
        return {}
    try:
        content = read_object(record)
    except UserError:  # a run that was cut off says nothing of its settings
        return {}
    stages = content.get("stages")
    stage = stages.get("align") if isinstance(stages, Mapping) else None
    return dict(stage) if isinstance(stage, Mapping) else {}


def training_settings(run: Trajectory) -> dict[str, Any]:
    """Dotted settings that the run's alignment was started with; empty where its folder keeps none."""
    values = alignment(run).get("values")
    return dict(values) if isinstance(values, Mapping) else {}


def _entries(run: Trajectory) -> Sequence[Mapping[str, Any]]:
    """The run's entries of `metrics.json`; of a run that has none, means without intervals."""
    if len(run.metrics) == len(run.steps):
        return run.metrics
    means = {"kl": run.kl, "win_rate": run.wins, "reward": run.rewards, "length": run.lengths}
    rows = {key: values.mean(axis=1) for key, values in means.items() if values is not None}
    bounds = {"low": None, "high": None}
    return [
        {"step": int(step), **{key: {"mean": float(values[i]), **bounds} for key, values in rows.items()}}
        for i, step in enumerate(run.steps)
    ]


def _cell_names(runs: Sequence[Trajectory]) -> list[str]:
    """The cell of each run; one that no sweep names is told by method, β and settings."""
    names: list[str] = []
    known: dict[str, list[Any]] = {}
    taken: set[tuple[str, Any]] = set()
    for run in runs:
        if run.cell is not None:
            names.append(run.cell)
            continue
        told = {k: v for k, v in training_settings(run).items() if k not in PRIVATE}
        settings = {k: v for k, v in told.items() if k == "data.limit" or not k.startswith("data.")}
        kind = repr((run.method, run.beta, sorted(settings.items(), key=str), None if run.method else run.name))
        base = run.name if run.method is None else run.method + ("" if run.beta is None else f", β = {run.beta:g}")
        number = 1
        while True:
            name = base if number == 1 else f"{base} ({number})"
            # The same seed twice is no second seed, whatever the settings say.
            if known.setdefault(name, [kind]) == [kind] and (name, run.seed) not in taken:
                break
            number += 1
        taken.add((name, run.seed))
        names.append(name)
    return names


def history(path: Path | None) -> list[dict[str, Any]]:
    """Whole lines of a run's `metrics.jsonl`; a half line that a live run is writing is left out."""
    if path is None or not path.is_file():
        return []
    return [line for line in readable_jsonl(path) if isinstance(line.get("step"), int | float)]
