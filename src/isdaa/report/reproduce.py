"""The commands that make a report again, from what its evaluation or its sweep recorded."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from isdaa.config import EvaluationConfig
from isdaa.data.encoder import TokenizationSettings
from isdaa.errors import UserError
from isdaa.evaluation.checkpoints.trajectory import SWEEP, Study, read_sweep
from isdaa.evaluation.checkpoints.what_to_evaluate import EvaluationRequest, expand, requests
from isdaa.record import run_folder

DEMO = "demo"  # what a sweep of `isdaa demo` calls its file
PROMPTS = "PROMPTS"  # stands for data that no record names


def commands(study: Study) -> list[str]:
    """Lines for a shell, in the order in which they are run from the folder in which the evaluation was."""
    return _sweep(study) if study.cells else _evaluation(study)


def _sweep(study: Study) -> list[str]:
    file, folder = study.folder / SWEEP, str(study.folder)
    content = read_sweep(file) if file.is_file() else {}
    if content.get("base") == DEMO and content.get("config", DEMO) == DEMO:
        methods = dict.fromkeys(run.method for run in study.runs if run.method is not None)
        seed = next((["--seed", str(run.seed)] for run in study.runs if run.seed is not None), [])
        return [shlex.join(["isdaa", "demo", "--methods", *methods, "--output_dir", folder, *seed])]
    config = content.get("config") or study.folder / "sweep.yaml"
    again = shlex.join(["isdaa", "sweep", "--config", str(config), "--output_dir", folder])
    return [again, shlex.join(["isdaa", "report", folder])]


def _evaluation(study: Study) -> list[str]:
    metrics = study.metrics
    models = [str(path) for run in study.runs for path in run.paths] + [left["path"] for left in metrics.get("left_out") or []]
    names = _names(models, study)
    options = _options(names, metrics)
    note = [f"# {PROMPTS}: the held-out prompts that were evaluated; the evaluation does not record their name"]
    note = note if PROMPTS in options else []
    if len(names) == 1 and names != models:
        return [
            *note,
            shlex.join(["isdaa", "evaluate", "--model_path", *names, *options]),
            shlex.join(["isdaa", "report", *names]),
        ]
    joined = ["--one_run"] if metrics.get("one_run") else []
    return [*note, shlex.join(["isdaa", "report", "--checkpoints", *names, *joined, *options])]


def _names(models: Sequence[str], study: Study) -> list[str]:
    """Run folders in place of their checkpoints, where all that a folder holds was evaluated; other models as they are."""
    groups: dict[str, list[str]] = {}
    for path in models:
        found = run_folder(path)
        spelled = Path(path).parents[1] if Path(path).parent.name == "checkpoints" else Path(path).parent
        groups.setdefault(str(spelled) if found is not None else path, []).append(path)
    places = {run.evaluation.parent.name: run.evaluation.parent for run in study.runs if run.evaluation is not None}
    return [name for folder, paths in groups.items() for name in _name(Path(folder), paths, places)]


def _name(run: Path, paths: list[str], places: Mapping[str, Path]) -> list[str]:
    """One run's folder, also where it was moved together with its evaluation, or its models one by one."""
    if paths == [str(run)]:
        return paths
    for folder in (run, places.get(run.name)):
        if folder is not None and folder.is_dir() and _held(folder) == {Path(path).name for path in paths}:
            return [str(folder)]
    return paths if all(Path(path).exists() for path in paths) else [str(run)]


def _held(folder: Path) -> set[str]:
    try:
        return {Path(path).name for path in expand(folder)}
    except UserError:  # a folder whose checkpoints are gone
        return set()


def _options(names: Sequence[str], metrics: Mapping[str, Any]) -> list[str]:
    """What the models' own records do not say, or say otherwise."""
    reference, data = (metrics.get("reference") or {}).get("path"), metrics.get("data")
    recorded = _asked(names, {})
    asked = recorded or _asked(names, {"reference": reference or PROMPTS, "data": data or PROMPTS})
    options: list[str] = []
    if reference is not None and (recorded is None or not _same(recorded.reference, reference)):
        options += ["--reference", str(reference)]
    if metrics.get("tokenizer_path") is not None:
        options += ["--tokenizer", str(metrics["tokenizer_path"])]
    if recorded is None or (data is not None and not _same(recorded.data, data)):
        options += ["--data", str(data or PROMPTS)]
    scorer = (metrics.get("scorer") or {}).get("name")
    known = asked.scorer if asked is not None else None
    if told := (metrics.get("scorer") or {}).get("options"):  # a judge model, or scores of the user's own
        options += told
    elif scorer != known and not (scorer and known and _same(scorer, known)):
        options += ["--scorer", str(scorer or "none")]
    position = (metrics.get("scorer") or {}).get("position", "auto")
    if not told and position != (asked.position if asked is not None else "auto"):
        options += ["--scorer.position", position]
    label = (metrics.get("scorer") or {}).get("label")
    if label is not None and label != (asked.label if asked is not None else None):
        options += ["--scorer.label", label]
    own = asked.settings if asked is not None else EvaluationConfig.model_validate({})
    cut = asked.tokenization if asked is not None else TokenizationSettings()
    for section, values in (("evaluation", own.model_dump()), ("tokenization", asdict(cut))):
        for key, value in (metrics.get("settings" if section == "evaluation" else section) or {}).items():
            if key in values and key != "scorer" and value != values[key]:
                options += [f"--{section}.{key}", value if isinstance(value, str) else json.dumps(value)]
    return options


def _asked(names: Sequence[str], given: Mapping[str, Any]) -> EvaluationRequest | None:
    try:
        return requests(names, given)
    except UserError:  # models that are gone, or whose records do not say what is asked for
        return None


def _same(one: str, other: str) -> bool:
    return one == other or os.path.realpath(one) == os.path.realpath(other)
