"""The main job on the embedded world, as a small sweep: SFT, gold labels, one alignment per method, the report."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isdaa.config import Config
from isdaa.errors import UserError, shown
from isdaa.evaluation.records import METRICS
from isdaa.experiments.grid import SweepConfig
from isdaa.experiments.sweep import run_sweep
from isdaa.foreign import read_json
from isdaa.objectives.presets import PRESETS

# Seconds on two idle cores, a thread a run; the estimate starts from them.
SHARED_SECONDS, RUN_SECONDS = 115.0, 65.0
TITLE = "The embedded experiment: does the run over-optimise?"


def run_demo(config: Config, methods: Sequence[str]) -> Path:
    """Run or finish the experiment in `config.output_dir`. Returns the report's path.

    `shared/` holds the SFT model and the pairs that all methods share, `runs/METHOD/seed-S` one run each with its
    evaluation, `report/` the report. Raises UserError for unknown methods.
    """
    for method in methods:
        if method not in PRESETS:
            raise UserError(f"--methods: unknown method {method!r}; `isdaa methods` lists the presets")
    started = time.monotonic()
    sweep = SweepConfig.model_validate(
        {
            "title": TITLE,
            "base": "demo",
            "output_dir": config.output_dir,
            "seeds": [config.seed],
            "grids": {"demo": {"objective.method": list(dict.fromkeys(methods))}},
            "jobs": max(1, min(len(methods), os.cpu_count() or 1)),
            "keep": "all",
        }
    )
    folder = run_sweep(sweep, config, "demo", expected=(SHARED_SECONDS, RUN_SECONDS))

    from isdaa.evaluation.checkpoints.trajectory import read_study
    from isdaa.report.page import write_report

    study = read_study(folder)
    page = write_report(study, folder / "report")
    show(study, page, time.monotonic() - started)
    return page


def show(study: Any, page: Path, seconds: float) -> None:
    """The table of all checkpoints with the verdict on each run, and where everything is."""
    from isdaa.evaluation.table import print_table

    print_table(merged(study))
    print(f"\nreport:  {shown(page)}\nrecords: {shown(study.folder / 'runs')}\n{seconds:.0f} s in this call")


def merged(study: Any) -> Mapping[str, Any]:
    """The checkpoints and verdicts of all runs as one evaluation's metrics."""
    found = {run.cell: read_json(run.evaluation / METRICS) for run in study.runs}
    said = {
        key: {cell: next(iter(each.get(key, {}).values()), None) for cell, each in found.items()}
        for key in ("verdicts", "no_verdict", "better")
    }
    return {**study.metrics, **said, "models": [entry for run in study.runs for entry in _labelled(run)]}


def _labelled(run: Any) -> list[dict[str, Any]]:
    """Entries labelled by the run's cell: every folder is called by its seed."""
    return [{**entry, "label": f"{run.cell or run.name}/{Path(entry['path']).name}"} for entry in run.metrics]
