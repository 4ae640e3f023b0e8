"""A sweep: many runs as independent processes, what they share computed once, resumable at any moment, one overview."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isdaa.config import Config
from isdaa.config.settings_text import dump_settings
from isdaa.errors import DoneInPart, UserError
from isdaa.evaluation.checkpoints.trajectory import SWEEP, read_sweep
from isdaa.evaluation.records import locked
from isdaa.experiments.grid import Cell, SweepConfig, Task, cells_of, tasks_of
from isdaa.experiments.overview import Overview
from isdaa.experiments.worker import RESULT, STATUS, ClusterJobs, Job, Launcher, LocalJobs, Work, died, outcome_of, status_of
from isdaa.files import write_atomically, write_json
from isdaa.foreign import read_object
from isdaa.record import versions
from isdaa.terminal import say

POLL = 0.25  # seconds between two looks at the running processes


@dataclass
class _Running:
    task: Task
    logs: Path
    job: Job
    started: float
    slot: int


def run_sweep(
    sweep: SweepConfig,
    base: Config,
    where: str = "sweep",
    only: Sequence[str] | None = None,
    expected: tuple[float, float] | None = None,
) -> Path:
    """Run what is not finished yet, of all grids or `only` of some; returns the sweep's folder.

    expected: seconds that a shared world and a run are known to take, which the estimate of the time left starts from.
    Finished runs are skipped, killed ones resume. A run that fails does not stop the others; at the end a UserError
    names the first one and its log: `DoneInPart` where others are finished.
    """
    cells = cells_of(sweep, base, where)
    everything, tasks = tasks_of(sweep, base, cells, where), tasks_of(sweep, base, cells, where, only)
    root = Path(sweep.output_dir)
    if root.is_dir() and any(p.name[0] != "." for p in root.iterdir()) and not (root / SWEEP).is_file():
        raise UserError(f"{root}: not empty and not a sweep of isdaa; choose another folder with --output_dir")
    with locked(root):
        earlier = read_sweep(root / SWEEP) if (root / SWEEP).is_file() else {}
        write_json(root / SWEEP, _content(sweep, cells, everything, where, earlier))
        write_atomically(root / "sweep.yaml", dump_settings(sweep.model_dump()))
        for task in tasks:
            if finished(root, task) and not task.evaluates_alone:
                _check_unchanged(task)
        if expected is None and sweep.expected_minutes is not None:
            expected = (60 * sweep.expected_minutes[0], 60 * sweep.expected_minutes[1])
        failed = _Scheduler(sweep, tasks, expected).run()
        write_json(root / SWEEP, _content(sweep, cells, everything, where, earlier))
    if failed:
        name, error = next(iter(failed.items()))
        log = logs_of(root, name) / "log.txt"
        some = any(finished(root, task) for task in tasks if task.cell is not None)
        kind = DoneInPart if some else UserError
        raise kind(f"{len(failed)} of {len(tasks)} runs failed; the first is {name}: {error} (see {log})")
    return root


def _check_unchanged(task: Task) -> None:
    """Raises UserError where a finished run read data or models that have changed since: the others would read the new ones."""
    from isdaa.training.run_folder import Run

    for line in Run(task.config).finished_before().changes(outputs=False):
        say(f"{task.name}: {line}")


def logs_of(root: Path, name: str) -> Path:
    """Folder of a task's log, status and result."""
    return root / "logs" / name


def finished(root: Path, task: Task) -> bool:
    """Whether a task was done with the very settings that it has now, and its records are there."""
    outcome = outcome_of(logs_of(root, task.name))
    if outcome is None or not outcome["done"] or outcome["key"] != task.key:
        return False
    left = task.folder / "run.json" if task.cell is None and not task.evaluates_alone else task.evaluation / "metrics.json"
    return left.is_file()


def _content(
    sweep: SweepConfig, cells: Sequence[Cell], tasks: Sequence[Task], where: str, earlier: dict[str, Any]
) -> dict[str, Any]:
    """What `sweep.json` says. Finished runs of an earlier call with other seeds or cells stay in it."""
    root = Path(sweep.output_dir)
    runs: list[dict[str, Any]] = []
    for task in tasks:
        outcome = outcome_of(logs_of(root, task.name)) or {}
        row = {
            "name": task.name,
            "cell": task.cell,
            "seed": task.seed,
            "folder": os.path.relpath(task.folder, root),
            "evaluation": os.path.relpath(task.evaluation, root),
            "seconds": outcome.get("seconds"),
            "cpu_seconds": outcome.get("cpu_seconds"),
        }
        runs.append(row)
    known, named = {task.name for task in tasks}, {cell.name for cell in cells}
    for row in earlier.get("runs", []):
        if row["name"] not in known and (root / row["evaluation"] / "metrics.json").is_file():
            runs.append(row)
    kept = {row["cell"] for row in runs}
    before = [cell for cell in earlier.get("cells", []) if cell["name"] in kept and cell["name"] not in named]
    made = [read_object(root / row["folder"] / "run.json") for row in runs if (root / row["folder"] / "run.json").is_file()]
    return {
        "title": sweep.title,
        "base": sweep.base,
        "config": where,
        "cells": [*(cell.to_json() for cell in cells), *before],
        "runs": [row for row in runs if row["cell"] is not None],
        "shared": [row for row in runs if row["cell"] is None],
        "versions": versions(),
        "git_revisions": sorted({str(state.get("git_revision")) for state in made}),
    }


class _Scheduler:
    """Starts tasks in their order, at most `jobs` at a time, each after the one that it needs."""

    def __init__(self, sweep: SweepConfig, tasks: Sequence[Task], expected: tuple[float, float] | None = None) -> None:
        self.sweep, self.root, self.expected = sweep, Path(sweep.output_dir), expected
        self.tasks = tasks
        self.done = {task.name for task in tasks if finished(self.root, task)}
        self.failed: dict[str, str] = {}
        self.running: list[_Running] = []
        needed = {task.needs for task in tasks if task.name not in self.done}
        # A shared world whose runs are all finished is not made again, not even where it was tidied away.
        self.queue = [t for t in tasks if t.name not in self.done and (t.cell is not None or t.name in needed)]
        local = sweep.cluster == "none"
        self.threads = (sweep.threads or max(1, (os.cpu_count() or 1) // sweep.jobs)) if local else None
        self.launch: Launcher | None = None

    def run(self) -> dict[str, str]:
        """Everything; returns the failed tasks with their errors."""
        if not self.queue:
            return {}
        if self.sweep.cluster == "none":
            self.launch = LocalJobs(self.threads)
        else:
            self.launch = ClusterJobs(self.sweep.cluster, self.root, self.sweep.slurm)
        kinds = [(task.name, task.cell is None, task.name in self.done) for task in self.tasks if self._counts(task)]
        with Overview(kinds, self.sweep.jobs, self.expected) as overview:
            for task in self.tasks:
                if task.name in self.done and (outcome := outcome_of(logs_of(self.root, task.name))) is not None:
                    overview.took[task.cell is None].append(float(outcome["seconds"]))
            try:
                while self.queue or self.running:
                    self._start(overview)
                    self._collect(overview)
                    overview.show([(r.task.name, time.monotonic() - r.started, status_of(r.logs)) for r in self.running])
                    time.sleep(POLL)
            finally:
                for one in self.running:
                    one.job.stop()
        return self.failed

    def _counts(self, task: Task) -> bool:
        return task.cell is not None or task in self.queue

    def _start(self, overview: Overview) -> None:
        """As many tasks as there are places, in the order of the queue, but for those that wait for another."""
        assert self.launch is not None
        for task in list(self.queue):
            if len(self.running) >= self.sweep.jobs:
                return
            if task.needs in self.failed:
                self.queue.remove(task)
                self.failed[task.name] = error = f"it needs {task.needs}, which failed: {self.failed[task.needs]}"
                overview.ended(task.name, {"done": False, "error": error}, 0.0)
            elif task.needs is None or task.needs in self.done:
                self.queue.remove(task)
                self._begin(task)

    def _begin(self, task: Task) -> None:
        assert self.launch is not None
        logs = logs_of(self.root, task.name)
        logs.mkdir(parents=True, exist_ok=True)
        for name in (RESULT, STATUS):
            (logs / name).unlink(missing_ok=True)
        slot = min(set(range(self.sweep.jobs)) - {one.slot for one in self.running})
        threads = self.threads if task.cell is not None else self.sweep.shared_threads or self.threads
        work = Work(task, logs, threads, _device(slot) if self.sweep.cluster == "none" else None, self.sweep.keep)
        self.running.append(_Running(task, logs, self.launch(work), time.monotonic(), slot))

    def _collect(self, overview: Overview) -> None:
        for one in [one for one in self.running if not one.job.running()]:
            self.running.remove(one)
            outcome = outcome_of(one.logs) or died(one.logs)
            if outcome["done"]:
                self.done.add(one.task.name)
            else:
                self.failed[one.task.name] = outcome["error"]
            overview.ended(one.task.name, outcome, time.monotonic() - one.started)


def _device(slot: int) -> str | None:
    """One of several GPUs for each place; None where there is at most one."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    return devices[slot % len(devices)] if len(devices) > 1 else None
