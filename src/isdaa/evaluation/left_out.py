"""Checkpoints whose weights are not finite: named and left out before the first sample, with a line for a run that ends so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isdaa.errors import DoneInPart, UserError
from isdaa.evaluation.checkpoint import Checkpoint
from isdaa.evaluation.model_digest import model_digest
from isdaa.evaluation.records import Record
from isdaa.terminal import say, working

NOT_FINITE = "weights are not finite"


def broken_weights(path: str, trust_remote_code: bool = False, revision: str | None = None, *, scorer: bool = False) -> list[str]:
    """Names of a model's weights that are not finite, read from its files; a model of the Hub is loaded.

    Raises UserError, naming the file, where it is damaged or incomplete.
    """
    from isdaa.models.finite_weights import NotFiniteError, loaded_not_finite
    from isdaa.models.loading import check_complete
    from isdaa.models.places import adapter_config, base_of, local_folder

    folder = local_folder(path)
    if folder is None:
        try:
            model_digest(path, trust_remote_code, revision)  # once a process
        except NotFiniteError as error:
            return error.names
        return []
    adapter = adapter_config(path, folder, revision)
    found = loaded_not_finite(folder, adapter=adapter is not None)
    if adapter is not None:
        base = base_of(adapter, path)
        return found + (loaded_not_finite(base) if Path(base).is_dir() else [])
    if not found and not trust_remote_code:
        check_complete(path, classifier=scorer)
    return found


def check_weights(
    models: Sequence[Checkpoint], reference: str, trust_remote_code: bool = False, revision: str | None = None
) -> list[Record]:
    """The checkpoints to be left out, as records say it: each with the `reason`, and the path of the model that came before it.

    Raises UserError where the reference is one of them, or nothing else is left, or a model is damaged.
    """
    from isdaa.models.finite_weights import listed

    paths = list(dict.fromkeys([reference, *(model.path for model in models)]))
    with working("weights of the models' files"):
        broken = {path: broken_weights(path, trust_remote_code, revision if path == reference else None) for path in paths}
    if broken[reference]:
        raise UserError(
            f"{reference}: {NOT_FINITE} ({listed(broken[reference])}), so it is no reference; name another with --reference"
        )
    found = [
        {
            **model.to_json(),
            "after": models[place - 1].path if place else None,
            "reason": f"{NOT_FINITE} ({listed(broken[model.path])})",
        }
        for place, model in enumerate(models)
        if broken[model.path]
    ]
    if len(found) == len(models):
        names = ", ".join(entry["label"] for entry in found)
        raise UserError(f"no checkpoint is left to evaluate: {names}: {found[0]['reason']}; the run has diverged")
    for entry in found:
        say(f"{entry['path']}: left out: its {entry['reason']}")
    return found


def ending(run: str, label: str, alone: bool) -> str:
    """What is said first of a run whose last checkpoint was left out. alone: there is no other run."""
    return f"{'The run' if alone else run} ended in weights that are not finite ({label})."


def endings(ended: Mapping[str, str], runs: int) -> list[str]:
    """`ending` of each run (name -> label of its last checkpoint), of so many in all."""
    return [ending(name, label, runs == 1) for name, label in ended.items()]


def lines(left_out: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which checkpoints were left out, and why, a line each."""
    return [f"{entry['label']} is left out: its {entry['reason']}." for entry in left_out]


def check_done(metrics: Mapping[str, Any]) -> None:
    """Raises DoneInPart, the end of a command that has shown its numbers, where checkpoints were left out."""
    left = metrics.get("left_out") or []
    if left:
        count = f"{len(left)} checkpoint{'s were' if len(left) > 1 else ' was'} left out"
        named = ", ".join(f"{entry['label']}: {entry['reason']}" for entry in left)
        raise DoneInPart(f"{count}: {named}; the others are evaluated")
