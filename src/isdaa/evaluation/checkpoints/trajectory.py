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
from isdaa.evaluation.checkpoints.analysis import win_table
from isdaa.evaluation.checkpoints.run_groups import UNKNOWN, Identity, homes_of, in_order, names_of
from isdaa.evaluation.checkpoints.sample_and_kl import PLAN, SAMPLES
from isdaa.evaluation.records import METRICS, Record, blocks_of, fitting, read_metrics, read_plan
from isdaa.foreign import check_shape, read_json
from isdaa.manifest import HISTORY

SWEEP = "sweep.json"  # what a sweep leaves: its runs and where each one's evaluation lies
CONTENT = {
    "cells": [{"name": str, "settings": dict, "grids": [str], "seeds": [int]}],
    "runs": [{"name": str, "cell": str, "seed": int, "evaluation": str, "folder": str}],
    "title?": (str, None), "base?": str, "config?": str,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One run: C checkpoints, measured on the same N prompts.

    Attributes:
        name: of the run.
        steps: (C,) int, rising; 1 to C where no record says the steps.
        labels: names of the checkpoints.
        paths: folders of the checkpoints.
        kl: (C, N), Rao–Blackwell KL from the reference, nats.
        wins: (C, N), win rate of each prompt in [0, 1]; None without a scorer or judge.
        start: the reference's own win rate, ½ where ties count half; None where `wins` are.
        rewards: (C, N), the scorer's points; None without one, and of a judge model, which gives none.
        lengths: (C, N), tokens of the sample that was judged.
        method: preset of the objective.
        beta: β of the objective.
        seed: of the run.
        cell: the sweep's cell: runs of one cell differ by their seed alone.
        settings: what the cell sets, dotted.
        evaluation: folder of the records.
        metrics: the checkpoints' entries of `metrics.json`, with means and intervals.
        history: `metrics.jsonl` of the run.
        start_wins: (N,), the reference's own win rate prompt by prompt.
        ended: label of the run's last checkpoint, where that was left out: its weights are not finite.
    """

    name: str
    steps: np.ndarray
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
    cell: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Path | None = None
    metrics: Sequence[Mapping[str, Any]] = ()
    history: Path | None = None
    start_wins: np.ndarray | None = None
    ended: str | None = None

    @property
    def steps_known(self) -> bool:
        """Whether `steps` are training steps, and no mere numbers."""
        told = [entry.get("step") for entry in self.metrics]
        return not told or told == [int(step) for step in self.steps]

    @property
    def root_kl(self) -> np.ndarray:
        """(C,) d = √(mean KL over prompts)."""
        return np.sqrt(np.maximum(self.kl.mean(axis=1), 0.0))


@dataclass(frozen=True, eq=False)
class Study:
    """Runs that are looked at together, with what they share: prompts, scorer, reference, sampling.

    Attributes:
        runs: one trajectory each.
        metrics: `metrics.json` of the (first) evaluation: scorer, settings, opponent, reference, versions.
        title: of the study.
        folder: of the study.
        cells: of a sweep; dictionaries with `name`, `grids`, `settings`.
        missing: runs of a sweep that have no evaluation yet.
        notes: what else a reader must know, each a sentence.
        ended: run -> label of its last checkpoint, where that was left out.
    """

    runs: Sequence[Trajectory]
    metrics: Mapping[str, Any]
    title: str
    folder: Path
    cells: Sequence[Mapping[str, Any]] = ()
    missing: Sequence[str] = ()
    notes: Sequence[str] = ()
    ended: Mapping[str, str] = field(default_factory=dict)

    @property
    def scored(self) -> bool:
        """Whether there are win rates."""
        return self.metrics["scorer"] is not None


def read_study(path: str | Path, as_one_run: bool = False) -> Study:
    """The study in a sweep's folder, a run's folder or an evaluation's folder.

    Args:
        path: the folder.
        as_one_run: of an evaluation, whether models whose names say nothing of their run are checkpoints of one.

    Returns:
        Its runs, each with its checkpoints in the order of training, and what they share.

    Raises:
        UserError: there is none, or no run of a sweep has been evaluated yet.
    """
    folder = Path(path)
    if (folder / SWEEP).is_file():
        return _sweep(folder)
    evaluation = folder if (folder / PLAN).is_file() else folder / "evaluation"
    if not (evaluation / METRICS).is_file():
        raise UserError(f"{folder}: no evaluation ({METRICS}) here; run `isdaa evaluate --model_path {folder}` first")
    metrics = read_metrics(evaluation / METRICS)
    with fitting(evaluation):
        runs, ended = _trajectories(evaluation, as_one_run)
    told = [note for key in ("judged", "thinking") for note in (metrics.get(key) or {}).get("notes", [])]
    notes = [*(metrics.get("doubts") or []), *told]
    return Study(runs, metrics, folder.resolve().name, folder, notes=notes, ended=ended)


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
    """The runs of one evaluation, each with its checkpoints in the order of training.

    Models are of one run where they lie in one run's folder or, of other programs, where their names differ by a step's number
    alone (`out/checkpoint-100`, `out/checkpoint-200`, and `out` itself), and where records name the same method, β and seed.
    as_one_run: models of one folder whose names say nothing of that are one run, in the order given, unless some differ by a
    number alone and others by more (`dpo-100`, `dpo-200`, `ipo-100`); else each is a run of its own.
    An evaluation that was asked for as one run (`--one_run`) is one, in the order given.
    Names are unique: a run's folder, with the folders around it where several runs' folders have the same name.
    """
    with fitting(Path(folder)):
        return _trajectories(Path(folder), as_one_run)[0]


def runs_ended(folder: str | Path, as_one_run: bool = False) -> dict[str, str]:
    """The runs of one evaluation whose last checkpoint was left out -> its label; also of those of which nothing is left."""
    with fitting(Path(folder)):
        return _trajectories(Path(folder), as_one_run)[1]


def with_left_out(models: Sequence[tuple[Record, Record]], left_out: Sequence[Record]) -> list[tuple[Record, Record]]:
    """The models as (entry of the plan, entry of the metrics), and those that were left out, which have no numbers, each behind
    the one that it was asked for behind."""
    found = list(models)
    for entry in left_out:
        paths = [planned["path"] for planned, _ in found]
        known = entry["after"] in paths
        place = 0 if entry["after"] is None else paths.index(entry["after"]) + 1 if known else len(found)
        planned = {key: entry[key] for key in ("path", "place") if key in entry} | {"digest": entry["path"]}
        found.insert(place, (planned, entry))
    return found


def _trajectories(folder: Path, as_one_run: bool) -> tuple[list[Trajectory], dict[str, str]]:
    plan, metrics = read_plan(folder / PLAN), read_metrics(folder / METRICS)
    if plan["scorer"] is None and metrics["scorer"] is not None:
        raise UserError(f"{folder}: its last evaluation was cut off before there were win rates; run the same command again")
    settings = EvaluationConfig(**{k: v for k, v in metrics["settings"].items() if k in EvaluationConfig.model_fields})
    samples = blocks_of(folder, SAMPLES, plan)
    table = win_table(folder, plan, samples[plan["prompts"]], settings) if plan["scorer"] is not None else None
    kept = slice(None) if table is None else table.kept
    start, start_wins = metrics["reference"]["win_rate"], table.reference_rows() if table is not None else None
    models = with_left_out(list(zip(plan["models"], metrics["models"], strict=True)), metrics.get("left_out") or [])
    identities: list[Identity] = [(e.get("method"), e.get("beta"), e.get("seed")) for _, e in models]
    given_order = bool(plan.get("one_run"))
    if given_order:
        identities = [identities[0] if len(set(identities)) == 1 else UNKNOWN] * len(identities)
        homes = [folder.absolute().parent] * len(identities)
    else:
        named = [(model["path"], identity) for (model, _), identity in zip(models, identities, strict=True)]
        homes = homes_of(named, as_one_run)
    groups: dict[tuple[Path, Identity], list[tuple[Record, Record]]] = {}
    for key, model in zip(zip(homes, identities, strict=True), models, strict=True):
        groups.setdefault(key, []).append(model)
    found, ended = [], {}
    for ((home, identity), unordered), name in zip(groups.items(), names_of(groups), strict=True):
        members = unordered if given_order else in_order(unordered)
        last = members[-1][1]["label"] if "samples" not in members[-1][0] else None
        members = [(planned, entry) for planned, entry in members if "samples" in planned]
        if last is not None:
            ended[name] = last
        if not members:
            continue
        entries = [entry for _, entry in members]
        steps = [entry["step"] for entry in entries]
        known = None not in steps and all(a < b for a, b in pairwise(steps))
        kl = np.array([[r["kl"] for r in samples[p["kl"]]] for p, _ in members])[:, kept]
        lengths = np.array([[float(r["tokens"]) for r in samples[p["samples"]]] for p, _ in members])[:, kept]
        judged = [table.policy_rows(p["samples"]) for p, _ in members] if table is not None else []
        found.append(
            Trajectory(
                name=name,
                steps=np.array(steps if known else range(1, len(members) + 1), dtype=np.int64),
                labels=[entry["label"] for entry in entries],
                paths=[entry["path"] for entry in entries],
                kl=kl,
                wins=np.stack([wins for wins, _ in judged]) if judged else None,
                start=start["mean"] if start is not None else None,
                rewards=np.stack(rewards) if (rewards := [points for _, points in judged if points is not None]) else None,
                lengths=lengths,
                method=identity[0],
                beta=identity[1],
                seed=identity[2],
                evaluation=folder,
                metrics=entries,
                history=home / HISTORY if (home / HISTORY).is_file() else None,
                start_wins=start_wins,
                ended=last,
            )
        )
    return found, ended
