"""What an earlier evaluation in a folder holds is not lost to a narrower one: its models stay, or the call is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isdaa.errors import UserError
from isdaa.evaluation.analysis import METRICS
from isdaa.evaluation.collect import PLAN, SAMPLES
from isdaa.evaluation.identity import model_digest
from isdaa.evaluation.records import Record, blocks_of, read_metrics, read_plan
from isdaa.ownership import completed
from isdaa.terminal import say

SAME = ("prompts", "tokenization", "template", "tokenizer", "one_run")  # of two plans whose models can stand together


class Replaces(UserError):
    """The evaluation in the folder would be replaced by another one, or by less of it."""


def kept_models(folder: Path, plan: Record, prompts: Sequence[Record], scorer: str | None) -> tuple[list[Record], list[str]]:
    """The models of the evaluation in `folder` that `plan` does not name, as they were planned: they stay beside those of it; and
    the paths of all of that evaluation's.

    Raises Replaces where the folder's evaluation has other or more prompts, another reference or scorer, or, if some models would
    be lost, other settings.
    """
    if not (folder / PLAN).is_file() or not (folder / METRICS).is_file():
        return [], []
    before, scored = read_plan(folder / PLAN), read_metrics(folder / METRICS)["scorer"]
    new = {Path(model["path"]).absolute() for model in plan["models"]}
    others = [model for model in before["models"] if Path(model["path"]).absolute() not in new]
    alike = [_shared(before), scored["name"] if scored else None] == [_shared(plan), scorer]
    lost = _differences(folder, before, plan, prompts, scored, scorer)
    if others and not alike and not lost:
        lost = ["other settings"]
    changed = next((m["path"] for m in others if Path(m["path"]).is_dir() and model_digest(m["path"]) != m["digest"]), None)
    if others and changed is not None and not lost:
        lost = [f"{Path(changed).name} as it was before its files changed"]
    if lost:
        number = len(before["models"])
        raise Replaces(
            f"{folder}: holds an evaluation of {number} checkpoint{'s' * (number != 1)}, with {' and '.join(lost)}, which is "
            "not replaced; name another folder:",
            completed(["isdaa", "evaluate"], {"--output": f"{folder.parent / 'other-evaluation'}"}),
        )
    if others:
        say(f"{folder}: its evaluation of {len(others)} other checkpoint{'s' * (len(others) != 1)} stays; these are added to it")
    return others, [model["path"] for model in before["models"]]


def _shared(plan: Record) -> list[Any]:
    """What all models of an evaluation have in common."""
    settings = {key: value for key, value in plan["settings"].items() if key != "scorer"}
    return [settings, [plan.get(key) for key in SAME], {key: v for key, v in plan["reference"].items() if key != "path"}]


def _differences(
    folder: Path, before: Record, plan: Record, prompts: Sequence[Record], scored: Mapping[str, Any] | None, scorer: str | None
) -> list[str]:
    """What the evaluation in the folder has that the planned one has not."""
    found = []
    if before["reference"]["digest"] != plan["reference"]["digest"]:
        found.append(f"another reference ({before['reference']['path']})")
    if scored is not None and scored["name"] != scorer:
        found.append(f"a scorer ({scored['name']})" if scorer is None else f"another scorer ({scored['name']})")
    if before["prompts"] != plan["prompts"]:
        texts = [row["prompt"] for row in prompts]
        gone = sum(row["prompt"] not in texts for row in blocks_of(folder, SAMPLES, before)[before["prompts"]])
        if gone:
            found.append(f"{gone} prompts that this one has not")
    return found
