"""From a path to a report: evaluates what has not been evaluated, then writes the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from isdaa.errors import UserError
from isdaa.evaluation.checkpoints.provenance import check_stays
from isdaa.evaluation.checkpoints.sample_and_kl import PLAN
from isdaa.evaluation.checkpoints.trajectory import SWEEP, read_study
from isdaa.evaluation.model_digest import model_digest, stat_of
from isdaa.evaluation.records import METRICS, read_metrics, read_plan
from isdaa.files import located
from isdaa.foreign import read_json
from isdaa.manifest import check_manifest
from isdaa.terminal import say


def report_on(
    paths: Sequence[str | Path],
    overrides: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    as_one_run: bool = False,
    one_run: bool = False,
) -> tuple[Path, list[str]]:
    """Report on a sweep's folder, on runs, or on models in the order of training. Returns the page and what it says first:
    warnings, if there are any, and the sentence at its top.

    overrides: as `what_to_evaluate.requests` takes them; a sweep is read as it is, and takes none. A run that has been evaluated,
    however that was asked for, is read as it is, too, where nothing else is asked for now.
    output: folder of the report; null: `report` beside the evaluation. Where the evaluation that lies beside the models would be
    replaced by another one, the new one goes into `output`, too; without one the call is refused.
    as_one_run: the paths are models, and those of one folder are one run's. one_run: all of them are, in the order given.
    Raises UserError.
    """
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    first = Path(located(paths[0]))
    if not as_one_run and not first.exists():
        raise UserError(f"{first}: no such folder; name that of a run or of a sweep, or models with --checkpoints")
    if (first / SWEEP).is_file():
        if len(paths) > 1 or given.keys() - {"trust_remote_code"}:
            raise UserError(f"{first}: a sweep's report takes neither other paths nor evaluation options; give its folder alone")
        study, home = read_study(first), first
    else:
        from isdaa.evaluation.checkpoints.what_to_evaluate import requests

        folder = first / "evaluation"
        if output is not None and (Path(located(output)) / "evaluation" / METRICS).is_file():
            folder = Path(located(output)) / "evaluation"  # an earlier call's, which could not go beside the models
            _check_own(folder, [Path(located(path)) for path in paths])
            given = {"output_dir": str(folder)} | given if given.keys() - {"trust_remote_code"} else given
        if given.keys() - {"trust_remote_code"} or len(paths) > 1 or one_run or not _is_evaluated(first, folder):
            request = requests(paths, given, as_runs=not as_one_run, as_one_run=as_one_run, one_run=one_run)
            if output is not None:
                _check_page(Path(located(output)), [model.path for model in request.models])
            from isdaa.evaluation.checkpoints.kept import Replaces
            from isdaa.evaluation.evaluate import evaluate_request

            try:
                evaluate_request(request)
            except Replaces:
                if output is None or Path(request.output_dir) == folder != first / "evaluation":
                    raise
                own = Path(located(output)) / "evaluation"
                say(f"{request.output_dir}: holds another evaluation, which stays; this one goes into {own}")
                request = replace(request, output_dir=str(own), shared=request.output_dir)
                evaluate_request(request)
            folder = Path(request.output_dir)
        home = folder.parent if folder.name == "evaluation" else folder
        study = read_study(folder, as_one_run)
        names = ", ".join(run.name for run in study.runs)
        several = f"these models belong to {len(study.runs)} runs ({names}), each with its own curve"
        notes = [several] if as_one_run and len(study.runs) > 1 else []
        study = replace(study, title=home.resolve().name, notes=[*notes, *study.notes])
    if output is not None:
        _check_page(Path(located(output)), [str(path) for run in study.runs for path in run.paths], study.metrics)
    else:
        check_stays(home / "report")
    from isdaa.report.page import write_report  # libraries for charts, which a mistyped path does not wait for

    page = write_report(study, Path(located(output)) if output is not None else home / "report")
    said = written(page)
    rest = [*said["notes"], *said["warnings"]]
    return page, [said["headline"], *rest] if said.get("ended") else [*rest, said["headline"]]


def written(page: Path) -> dict[str, Any]:
    """`report.json` beside a page."""
    from isdaa.report.page import DATA

    found: dict[str, Any] = read_json(page.parent / DATA)
    return found


def _check_page(folder: Path, models: Sequence[str], metrics: Mapping[str, Any] | None = None) -> None:
    """Raises UserError where a report of models that the new one does not have, or by another scorer, lies in the folder."""
    from isdaa.report.page import DATA

    if not (folder / DATA).is_file():
        return
    report = read_json(folder / DATA)
    before = [row["path"] for run in report["runs"] for row in run["checkpoints"]]
    gone = {Path(path).resolve() for path in before} - {Path(path).resolve() for path in models}
    what = f"of which {len(gone)} (such as {min(gone).name}) are not in this one" if gone else ""
    if metrics is not None and not gone:
        names = [(one.get("scorer") or {}).get("name") for one in (report, metrics)]
        what = f"scored by {names[0]} and not by {names[1]}" if names[0] not in (None, names[1]) else ""
    if what:
        raise UserError(
            f"{folder}: holds a report on {len(before)} checkpoints, {what}; it is not replaced: name another folder with "
            "--output"
        )


def _is_evaluated(run: Path, evaluation: Path) -> bool:
    """Whether an evaluation with verdicts covers every checkpoint in a run's folder. Raises UserError for a damaged one."""
    from isdaa.evaluation.checkpoints.what_to_evaluate import models_of

    if not (evaluation / METRICS).is_file():
        return False
    metrics, plan = read_metrics(evaluation / METRICS), read_plan(evaluation / PLAN)
    named = [*plan["models"], *plan.get("left_out", [])]
    covered, here = {Path(model["path"]).resolve(): model for model in named}, models_of(run)
    for path in here:
        check_manifest(Path(path))  # of which the page would speak as it was
    missing = [path for path in here if Path(path).resolve() not in covered]
    if missing and evaluation.parent != run:
        raise UserError(f"{evaluation}: does not have {missing[0]}; evaluate it, too, as the others were:", _again(evaluation))
    if "verdicts" not in metrics or missing:
        return False
    changed = [path for path in here if not _as_it_was(path, covered[Path(path).resolve()])]
    if changed:
        raise UserError(
            f"{changed[0]}: has changed since it was evaluated, so the numbers in {evaluation} are of other weights; evaluate "
            "again:",
            _again(evaluation),
        )
    return True


def _as_it_was(path: str, model: Mapping[str, Any]) -> bool:
    """Whether a model's files are those that were evaluated."""
    return stat_of(path) == model.get("stat") or model_digest(path) == model.get("digest")


def _again(evaluation: Path) -> str:
    """The command that makes an evaluation again."""
    from isdaa.report.reproduce import commands

    return next(line for line in commands(read_study(evaluation)) if not line.startswith("#"))


def _check_own(folder: Path, paths: Sequence[Path]) -> None:
    """Raises UserError where an evaluation in `--output` is of none of the models."""
    given = {path.resolve() for path in paths}
    models = [Path(model["path"]).resolve() for model in read_plan(folder / PLAN)["models"]]
    if not any(given & {model, *model.parents} for model in models):
        raise UserError(f"{folder}: holds an evaluation of other models; choose another folder with --output")
