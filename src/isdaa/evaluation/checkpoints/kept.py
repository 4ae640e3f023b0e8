"""What an earlier evaluation in a folder holds is not lost to a narrower one: its models stay, or the call is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isdaa.errors import UserError
from isdaa.evaluation.checkpoints.sample_and_kl import PLAN, SAMPLES
from isdaa.evaluation.checkpoints.what_to_evaluate import labels_of
from isdaa.evaluation.model_digest import model_digest
from isdaa.evaluation.records import METRICS, Record, blocks_of, read_metrics, read_plan
from isdaa.ownership import completed
from isdaa.terminal import say

SAME = ("prompts", "tokenization", "template", "tokenizer", "one_run")  # of two plans whose models can stand together


class Replaces(UserError):
    """The evaluation in the folder would be replaced by another one, or by less of it."""


def merged(folder: Path, plan: Record, prompts: Sequence[Record], scorer: str | None, digests: Sequence[str] = ()) -> Record:
    """What becomes of `plan` where the evaluation in `folder` has other models, too: `models`, with those, `left_out`, and
    `doubts`; nothing where it has none.

    scorer: name of the scorer, judge model or file of scores; digests: of the last two, whose name says less than
    that of a model, and what an earlier version called it.
    Raises Replaces where the folder's evaluation has other or more prompts, another reference or scorer, or, if some models would
    be lost, other settings.
    """
    if not (folder / PLAN).is_file() or not (folder / METRICS).is_file():
        return {}
    before, scored = read_plan(folder / PLAN), read_metrics(folder / METRICS)["scorer"]
    asked = {Path(model["path"]).resolve() for model in [*plan["models"], *plan.get("left_out", [])]}
    others = [model for model in before["models"] if _place(model) not in asked]
    left_out = [model for model in before.get("left_out", []) if _place(model) not in asked]
    lost = _lost(folder, before, plan, prompts, scored, scorer, digests)
    if others and not lost:
        lost = _unlike(before, plan, scored["name"] if scored else None, scorer, others)
    if lost:
        number = len(before["models"])
        raise Replaces(
            f"{folder}: holds an evaluation of {number} checkpoint{'s' * (number != 1)}, with {' and '.join(lost)}, which is "
            "not replaced; name another folder:",
            completed(["isdaa", "evaluate"], {"--output": f"{folder.parent / 'other-evaluation'}"}),
        )
    found: Record = {}
    if others:
        say(f"{folder}: its evaluation of {len(others)} other checkpoint{'s' * (len(others) != 1)} stays; these are added to it")
        models = _inserted(plan["models"], others, before["models"])
        spelled = [Path(model["path"]) for model in plan["models"]]
        models = [model | {"path": _alike(Path(model["path"]), spelled)} if model in others else model for model in models]
        labels = labels_of([model["path"] for model in models])
        found["models"] = [model | {"label": label} for model, label in zip(models, labels, strict=True)]
    if left_out:
        found["left_out"] = [*plan.get("left_out", []), *left_out]
    names = {word for model in [*others, *left_out] for word in (model["path"], model["label"], Path(model["path"]).name)}
    told = re.compile(rf"(?<![\w/.-])(?:{'|'.join(map(re.escape, names))})(?![\w/-])")
    doubts = [line for line in before.get("doubts", []) if names and told.search(line)]
    if doubts:
        found["doubts"] = list(dict.fromkeys([*plan.get("doubts", []), *doubts]))
    return found


def _alike(path: Path, others: Sequence[Path]) -> str:
    """A path as others are spelled that lie in the same run, which a link may lead to under another name."""
    for other in others:
        for mine in list(path.parents)[:2]:
            for theirs in list(other.parents)[:2]:
                if mine.absolute() != theirs.absolute() and mine.resolve() == theirs.resolve():
                    return str(theirs / path.relative_to(mine))
    return str(path)


def _place(model: Record) -> Path:
    return Path(model["path"]).resolve()


def _inserted(new: Sequence[Record], others: Sequence[Record], before: Sequence[Record]) -> list[Record]:
    """The new models in their order, each other one behind the one that it stood behind."""
    found, place = list(new), {Path(model["path"]).resolve(): model for model in new}
    last: Record | None = None
    for model in before:
        if model in others:
            found.insert(0 if last is None else found.index(last) + 1, model)
            last = model
        else:
            last = place.get(_place(model), last)
    return found


def _unlike(before: Record, plan: Record, scored: str | None, scorer: str | None, others: Sequence[Record]) -> list[str]:
    """Why the other models cannot stand beside those of the plan; nothing where they can."""
    if plan.get("one_run") or before.get("one_run"):
        return ["other checkpoints of one run, whose order only a call with all of them can give"]
    settings = [{key: value for key, value in one["settings"].items() if key != "scorer"} for one in (before, plan)]
    other = [f"{key} {value}" for key, value in settings[0].items() if value != settings[1].get(key)]
    other += [key for key in SAME if before.get(key) != plan.get(key)]
    if scored != scorer:
        other.append(f"scorer {scored or 'none'}")
    references = [
        {key: value for key, value in one["reference"].items() if key not in ("path", "digest")} for one in (before, plan)
    ]
    if not other and references[0] != references[1]:
        other.append("held-out pairs, dtype or rows of embeddings")
    if other:
        return [f"other settings ({', '.join(other)})"]
    here = [model for model in others if Path(model["path"]).is_dir()]
    changed = [Path(model["path"]).name for model in here if model_digest(model["path"]) != model["digest"]]
    return [f"{changed[0]} as it was before its files changed"] if changed else []


def _lost(
    folder: Path,
    before: Record,
    plan: Record,
    prompts: Sequence[Record],
    scored: Mapping[str, Any] | None,
    scorer: str | None,
    digests: Sequence[str],
) -> list[str]:
    """What the evaluation in the folder has that the planned one has not."""
    found = []
    if before["reference"]["digest"] != plan["reference"]["digest"]:
        found.append(f"another reference ({before['reference']['path']})")
    if scored is not None and scored["name"] != scorer:
        found.append(f"a scorer ({scored['name']})" if scorer is None else f"another scorer ({scored['name']})")
    elif scored is not None and digests and scored["digest"] not in digests:
        found.append(f"{scored['name']} with other settings or scores ({' '.join(scored.get('options', []))})")
    if before["prompts"] != plan["prompts"]:
        texts = [row["prompt"] for row in prompts]
        gone = sum(row["prompt"] not in texts for row in blocks_of(folder, SAMPLES, before)[before["prompts"]])
        if gone:
            found.append(f"{gone} prompts that this one has not")
    return found
