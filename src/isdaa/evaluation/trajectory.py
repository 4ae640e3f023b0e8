"""What analysis and report read: a run's checkpoints in the order of training, measured on the same prompts.

Legend: C checkpoints, N held-out prompts, K reference samples a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from isdaa.config import EvaluationConfig
from isdaa.errors import UserError
from isdaa.evaluation.analysis import METRICS, WinTable
from isdaa.evaluation.collect import PLAN, SAMPLES
from isdaa.evaluation.records import Record, blocks_of, fitting, read_metrics, read_plan
from isdaa.evaluation.requests import METRICS as HISTORY
from isdaa.evaluation.scoring import SCORES
from isdaa.foreign import check_shape, read_json
from isdaa.record import run_folder

SWEEP = "sweep.json"  # what a sweep leaves: its runs and where each one's evaluation lies
CONTENT = {
    "cells": [{"name": str, "settings": dict, "grids": [str], "seeds": [int]}],
    "runs": [{"name": str, "cell": str, "seed": int, "evaluation": str, "folder": str}],
    "title?": (str, None), "base?": str, "config?": str,
}  # fmt: skip
LONE = "checkpoints"  # name of the models that lie in no run's folder


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One run. Every (C, N) array has a row a checkpoint and a column a prompt; prompts are the same for all rows.

    kl: Rao–Blackwell KL from the reference, nats. wins: win rate of the prompt in [0, 1]; None without a scorer.
    rewards: the scorer's points; None without one. lengths: tokens of the sample that was judged.
    start: the reference's own win rate (½ with ties at half), None without a scorer.
    metrics: the checkpoints' entries of `metrics.json`, with means and intervals. history: the run's `metrics.jsonl`.
    """

    name: str
    steps: np.ndarray  # (C,) int, rising; 1..C where no record says a step
    labels: Sequence[str]
    paths: Sequence[str]
    kl: np.ndarray
    wins: np.ndarray | None
    start: float | None = None
    rewards: np.ndarray | None = None
    lengths: np.ndarray | None = None
    method: str | None = None
    beta: float | None = None
    seed: int | None = None
    cell: str | None = None  # the sweep's cell: runs of one cell differ by their seed alone
    settings: Mapping[str, Any] = field(default_factory=dict)  # what the cell sets, dotted
    evaluation: Path | None = None  # folder of the records
    metrics: Sequence[Mapping[str, Any]] = ()
    history: Path | None = None

    @property
    def root_kl(self) -> np.ndarray:
        """(C,) d = √(mean KL over prompts)."""
        return np.sqrt(np.maximum(self.kl.mean(axis=1), 0.0))


@dataclass(frozen=True, eq=False)
class Study:
    """Trajectories that are looked at together, with what they share: prompts, scorer, reference, sampling."""

    runs: Sequence[Trajectory]
    metrics: Mapping[str, Any]  # `metrics.json` of the (first) evaluation: scorer, settings, opponent, reference, versions
    title: str
    folder: Path
    cells: Sequence[Mapping[str, Any]] = ()  # of a sweep: {"name", "grids", "settings"}
    missing: Sequence[str] = ()  # runs of a sweep that have no evaluation yet

    @property
    def scored(self) -> bool:
        """Whether there are win rates."""
        return self.metrics["scorer"] is not None


def read_study(path: str | Path, as_one_run: bool = False) -> Study:
    """The study in a sweep's folder, a run's folder or an evaluation's folder.

    as_one_run: of an evaluation, all models are one run, in the order given.
    Raises UserError where there is none, or where a sweep has no evaluated run yet.
    """
    folder = Path(path)
    if (folder / SWEEP).is_file():
        return _sweep(folder)
    evaluation = folder if (folder / PLAN).is_file() else folder / "evaluation"
    if not (evaluation / METRICS).is_file():
        raise UserError(f"{folder}: no evaluation ({METRICS}) here; run `isdaa evaluate --model_path {folder}` first")
    return Study(trajectories(evaluation, as_one_run), read_metrics(evaluation / METRICS), folder.resolve().name, folder)


def read_sweep(path: Path) -> dict[str, Any]:
    """What a sweep's `sweep.json` says. Raises UserError for one that isdaa did not write."""
    content: dict[str, Any] = read_json(path)
    check_shape(content, CONTENT, str(path))
    names = {cell["name"] for cell in content["cells"]}
    strange = next((run["cell"] for run in content["runs"] if run["cell"] not in names), None)
    if strange is not None:
        raise UserError(f"{path}: its runs are of a cell {strange!r} that it does not list")
    return content


def _sweep(folder: Path) -> Study:
    content = read_sweep(folder / SWEEP)
    runs: list[Trajectory] = []
    missing: list[str] = []
    metrics: Mapping[str, Any] | None = None
    cells = {cell["name"]: cell for cell in content["cells"]}
    for run in content["runs"]:
        evaluation = folder / run["evaluation"]
        if not (evaluation / METRICS).is_file():
            missing.append(run["name"])
            continue
        found = trajectories(evaluation)
        if len(found) != 1:
            raise UserError(f"{evaluation}: holds {len(found)} runs, expected the one of {run['name']}")
        cell = cells[run["cell"]]
        fields = {**vars(found[0]), "name": run["name"], "cell": run["cell"], "seed": run["seed"], "settings": cell["settings"]}
        runs.append(Trajectory(**fields))
        metrics = metrics or read_metrics(evaluation / METRICS)
    if metrics is None:
        raise UserError(f"{folder}: no run of this sweep has been evaluated yet")
    return Study(runs, metrics, content.get("title") or folder.resolve().name, folder, content["cells"], missing)


def trajectories(folder: str | Path, as_one_run: bool = False) -> list[Trajectory]:
    """The runs of one evaluation, each a run's folder; models outside any run's folder are one run, in the order given.

    as_one_run: all models are one run, in the order given, wherever they lie.
    Names are unique: a run's folder, with the folders around it where several runs' folders have the same name.
    """
    with fitting(Path(folder)):
        return _trajectories(Path(folder), as_one_run)


def _trajectories(folder: Path, as_one_run: bool) -> list[Trajectory]:
    plan, metrics = read_plan(folder / PLAN), read_metrics(folder / METRICS)
    settings = EvaluationConfig(**{k: v for k, v in metrics["settings"].items() if k in EvaluationConfig.model_fields})
    samples, scores = (blocks_of(folder, name, plan) for name in (SAMPLES, SCORES))
    table = WinTable(plan, samples[plan["prompts"]], scores, settings) if plan["scorer"] is not None else None
    groups: dict[str, list[tuple[Record, Record]]] = {}
    for planned, entry in zip(plan["models"], metrics["models"], strict=True):
        run = run_folder(planned["path"]) if not as_one_run else None
        groups.setdefault(str(run) if run is not None else LONE, []).append((planned, entry))
    found = []
    names = _names([Path(key) for key in groups])
    for name, members in groups.items():
        entries = [entry for _, entry in members]
        steps = [entry["step"] for entry in entries]
        known = None not in steps and all(a < b for a, b in pairwise(steps))
        kl = np.array([[r["kl"] for r in samples[p["kl"]]] for p, _ in members])
        lengths = np.array([[float(r["tokens"]) for r in samples[p["samples"]]] for p, _ in members])
        judged = [table.policy_rows(p["samples"]) for p, _ in members] if table is not None else []
        run = Path(name) if name != LONE else None
        history = run / HISTORY if run is not None and (run / HISTORY).is_file() else None
        start = metrics["reference"]["win_rate"]
        found.append(
            Trajectory(
                name=names[Path(name)],
                steps=np.array(steps if known else range(1, len(members) + 1), dtype=np.int64),
                labels=[entry["label"] for entry in entries],
                paths=[entry["path"] for entry in entries],
                kl=kl,
                wins=np.stack([wins for wins, _ in judged]) if judged else None,
                start=start["mean"] if start is not None else None,
                rewards=np.stack([rewards for _, rewards in judged]) if judged else None,
                lengths=lengths,
                **{key: _common(entries, key) for key in ("method", "beta", "seed")},
                evaluation=folder,
                metrics=entries,
                history=history,
            )
        )
    return found


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """Each folder's name, with as many of the folders around it as tell it from the others."""

    def tail(folder: Path, depth: int) -> tuple[str, ...]:
        return folder.parts[-depth:]

    names = {}
    for folder in folders:
        others = [other for other in folders if other != folder]
        depths = range(1, len(folder.parts) + 1)
        depth = next((d for d in depths if tail(folder, d) not in [tail(other, d) for other in others]), len(folder.parts))
        names[folder] = str(Path(*tail(folder, depth)))
    return names


def _common(entries: Sequence[Mapping[str, Any]], key: str) -> Any:
    """The value that all entries share, else None."""
    values = {entry.get(key) for entry in entries}
    return values.pop() if len(values) == 1 else None
