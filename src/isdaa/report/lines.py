"""Which runs belong together, what each group is called, which colour it has, and which groups share a panel."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from isdaa.errors import UserError
from isdaa.evaluation.requests import run_folder
from isdaa.evaluation.trajectory import Study, Trajectory
from isdaa.files import read_json
from isdaa.report.style import PALETTE

METHOD, BETA = "objective.method", "objective.beta"
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
    labels = _labels(first)
    colours = _colours([(labels[name], (run.method or labels[name]).removeprefix("is_")) for name, run in first.items()])
    return [
        Line(name, labels[name], runs[0].method, runs[0].beta, tuple(runs), colours[labels[name]], grids.get(name, ()))
        for name, runs in groups.items()
    ]


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


def baseline(line: Line, lines: Sequence[Line]) -> Line | None:
    """The same method without weights at the same β, where there is one; `line` itself has none."""
    same = [other for other in lines if other.beta == line.beta and other.family == line.family and other is not line]
    plain = [other for other in same if other.method == other.family]
    return plain[0] if plain and line.method != line.family else None


def file_of(run: Trajectory, name: str) -> Path | None:
    """A file of the run's folder; where that was moved since it was evaluated, of the folder around its evaluation."""
    recorded = run_folder(run.paths[-1]) if len(run.paths) else None
    if recorded is None:
        return None
    around = run.evaluation.resolve().parent if run.evaluation is not None else None
    moved = [around] if around is not None and around.name == recorded.name else []
    return next((folder / name for folder in [recorded, *moved] if (folder / name).is_file()), None)


def training_settings(run: Trajectory) -> dict[str, Any]:
    """Dotted settings that the run's alignment was started with; empty where its folder keeps none."""
    record = file_of(run, "run.json")
    if record is None:
        return {}
    try:
        content = read_json(record)
    except UserError:  # a run that was cut off says nothing of its settings
        return {}
    values = ((content.get("stages") or {}).get("align") or {}).get("values")
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
        settings = {k: v for k, v in training_settings(run).items() if k not in PRIVATE and not k.startswith("data.")}
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


def _labels(first: Mapping[str, Trajectory]) -> dict[str, str]:
    """Cell -> method and, where another cell of the same method and β exists, the settings that tell it from that."""
    labels = {}
    for name, run in first.items():
        if run.method is None:
            labels[name] = name
            continue
        rivals = [other for cell, other in first.items() if cell != name and (other.method, other.beta) == (run.method, run.beta)]
        extra = [key for key in run.settings if key not in (METHOD, BETA) and any(_differs(run, other, key) for other in rivals)]
        words = [f"{key.rpartition('.')[2]} {_word(run.settings[key])}" for key in extra]
        labels[name] = ", ".join([run.method, *words])
    seen: dict[tuple[str, float | None], int] = {}
    for name, run in first.items():
        key = (labels[name], run.beta)
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 1:
            labels[name] = f"{labels[name]} ({seen[key]})"
    return labels


def _differs(run: Trajectory, other: Trajectory, key: str) -> bool:
    return key not in other.settings or other.settings[key] != run.settings[key]


def _word(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _colours(labels: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Label -> colour, the same in every chart. Beyond eight labels, those of one family differ and families repeat."""
    families = dict(labels)
    if len(families) <= len(PALETTE):
        return dict(zip(families, PALETTE, strict=False))
    colours: dict[str, str] = {}
    for family in dict.fromkeys(families.values()):
        members = [label for label in families if families[label] == family]
        members.sort(key=lambda label: (label != family, label != f"is_{family}"))
        colours |= {label: PALETTE[place % len(PALETTE)] for place, label in enumerate(members)}
    return colours


def history(path: Path | None) -> list[dict[str, Any]]:
    """Whole lines of a run's `metrics.jsonl`; a half line that a live run is writing is left out."""
    if path is None or not path.is_file():
        return []
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        if line.strip():
            try:
                lines.append(json.loads(line))
            except ValueError:
                raise UserError(f"{path}: not valid JSON Lines; mend the line or move the file away") from None
    return [line for line in lines if isinstance(line, dict)]
