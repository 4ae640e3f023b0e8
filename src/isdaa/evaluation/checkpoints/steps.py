"""Checkpoints of other programs: at which training step each was written, and so in which order they stand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from isdaa.errors import UserError
from isdaa.evaluation.checkpoints.run_groups import FINAL, NUMBERED, UNKNOWN, homes_of
from isdaa.evaluation.model_digest import same_weights
from isdaa.foreign import read_json

STATE = "trainer_state.json"  # of transformers' Trainer, and so of TRL, Axolotl and LLaMA-Factory
TRAILING = re.compile(r"(?P<stem>.*?)[-_. ]*(?P<number>\d+(?:\.\d+)?)")
EPOCH = re.compile(r"(?P<run>.*?)[-_. ]*epoch[-_. ]*(?P<number>\d+(?:\.\d+)?)", re.IGNORECASE)
NAMED = 6  # checkpoints in a sentence


@dataclass(frozen=True)
class Order:
    """Models as they are to be evaluated. steps: by path, where known. told: what was found, a sentence each; doubts: what a
    reader must know before believing the order, a sentence each."""

    paths: Sequence[str]
    steps: dict[str, int] = field(default_factory=dict)
    told: Sequence[str] = ()
    doubts: Sequence[str] = ()


def ordered(paths: Sequence[str], foreign: Sequence[str], as_one_run: bool, given_order: bool = False) -> Order:
    """The order of training of models that isdaa did not train; all others keep their places.

    A step is that of `trainer_state.json` in the model's folder, else the number at the end of its name. Models of one run
    (`run_groups.homes_of`) stand by their steps; where some have none, in the order given. A final model with the weights of a
    checkpoint is left out. foreign: those of `paths` without a record. given_order: all are one run in the order given.
    """
    homes = homes_of([(path, UNKNOWN) for path in foreign], as_one_run)
    runs: dict[Path, list[str]] = {}
    for home, path in zip(homes, foreign, strict=True):
        runs.setdefault(Path() if given_order else home, []).append(path)
    found = [_run(home, members, given_order) for home, members in runs.items()]
    moved = {old: new for one, members in zip(found, runs.values(), strict=True) for old, new in _places(members, one.paths)}
    kept = {path for one in found for path in one.paths}
    return Order(
        [moved.get(path, path) for path in paths if path not in foreign or moved.get(path) in kept],
        {path: step for one in found for path, step in one.steps.items()},
        [line for one in found for line in one.told],
        [line for one in found for line in one.doubts],
    )


def _places(members: Sequence[str], order: Sequence[str]) -> list[tuple[str, str]]:
    """Which model now stands where which stood; of those that fell away, at the end, none."""
    return list(zip(members, [*order, *[""] * (len(members) - len(order))], strict=True))


def _run(home: Path, members: Sequence[str], given_order: bool) -> Order:
    """The order within one run."""
    if len(members) == 1 and _state_of(members[0]) is None and NUMBERED.fullmatch(_folder(members[0]).name) is None:
        return Order(members)  # nothing to order
    members, told = _without_copies(members)
    names, states = _named(members), {path: _state_of(path) for path in members}
    steps, doubts = dict(names), []
    for path, state in states.items():
        step = None if state is None else state["global_step"]
        if step is None:
            continue
        if path in names and names[path] != step:
            doubts.append(f"{path}: its {STATE} says step {step:,}, its name {names[path]:,}; taken is {STATE}’s")
        steps[path] = step
    last = [path for path in members if path not in steps]
    planned = max((state["max_steps"] for state in states.values() if state and type(state.get("max_steps")) is int), default=0)
    if len(last) == 1 and _is_final(last[0], members) and planned > max(steps.values(), default=planned):
        steps[last[0]] = planned
        doubts.append(f"{last[0]}: taken to be of step {planned:,}, the last that its run planned (max_steps)")
    lines = {path: steps[path] for path in members if path in steps}
    if given_order:
        known = [steps.get(path) for path in members]
        if None in known or any(a >= b for a, b in pairwise(filter(None, known))):
            which = "not known for all" if None in known else f"{_listed(lines.values())}, which do not rise"
            doubts.append(f"--one_run: the models stand in the order given; their steps are {which}")
        return Order(members, steps, told, doubts)
    without = [path for path in members if path not in steps]
    if not steps or (without and not (len(without) == 1 and _is_final(without[0], members))):
        if len(members) > 1:
            epochs = _epochs(members)
            if epochs is not None:
                return Order(epochs, {}, told, doubts)
            which = " and ".join(Path(path).name for path in without[:2]) + (" and others" if len(without) > 2 else "")
            doubts.append(
                f"{which}: neither {STATE} nor a number at the end of the name says the step; the models stand in the order given"
            )
        return Order(members, {}, told, doubts)
    if without:
        doubts.append(f"{without[0]}: nothing says the step of this last model, so it is taken to be the end of the run")
    order = sorted(members, key=lambda path: steps.get(path, float("inf")))
    same = [(a, b) for a, b in pairwise(order) if a in steps and steps[a] == steps.get(b)]
    doubts += [f"{a} and {b} are both of step {steps[a]:,}: they stand in the order given" for a, b in same]
    if len(order) > 1:
        by = STATE if any(state is not None for state in states.values()) else "the numbers in their names"
        told.append(f"{home}: one run, by {by}: step{'s' * (len(lines) > 1)} {_listed(sorted(lines.values()))}")
    return Order(order, steps, told, doubts)


def _listed(steps: Any) -> str:
    shown = [f"{step:,}" for step in steps]
    return ", ".join(shown if len(shown) <= NAMED else [*shown[: NAMED - 1], "…", shown[-1]])


def _folder(path: str) -> Path:
    """The folder whose name tells the step: `checkpoint-100` of `checkpoint-100/model`."""
    folder = Path(path).absolute()
    return folder.parent if folder.name in FINAL and NUMBERED.fullmatch(folder.parent.name) is not None else folder


def _is_final(path: str, members: Sequence[str]) -> bool:
    """Whether a model is a run's last one by its place: the folder around the checkpoints, or a name without a number."""
    folder = _folder(path)
    return any(_folder(other).parent == folder for other in members if other != path) or TRAILING.fullmatch(folder.name) is None


def _state_of(path: str) -> dict[str, Any] | None:
    """What `trainer_state.json` says; None where there is none that has a step."""
    for folder in dict.fromkeys((Path(path).absolute(), _folder(path))):
        with suppress(UserError):
            state = read_json(folder / STATE, finite=False)
            if isinstance(state, dict) and type(state.get("global_step")) is int and state["global_step"] >= 0:
                return state
    return None


def _named(members: Sequence[str]) -> dict[str, int]:
    """Steps by the numbers at the end of names, where these are alike but for it; epochs are no steps."""
    found = {path: NUMBERED.fullmatch(_folder(path).name) for path in members}
    words = {match["word"].lower() for match in found.values() if match is not None}
    if words:
        one = len(words) == 1 and "epoch" not in words
        return {path: int(match["number"]) for path, match in found.items() if match is not None and one}
    bare = {path: TRAILING.fullmatch(_folder(path).name) for path in members}
    stems = {match["stem"] for match in bare.values() if match is not None}
    whole = all(match["number"].isdecimal() for match in bare.values() if match is not None)  # others are settings, or epochs
    return {path: int(match["number"]) for path, match in bare.items() if match is not None} if len(stems) == 1 and whole else {}


def _epochs(members: Sequence[str]) -> list[str] | None:
    """Models in the order of their epochs, a last one without a number behind them; None where they have none."""
    numbers = {path: float(match["number"]) for path in members if (match := EPOCH.fullmatch(_folder(path).name)) is not None}
    without = [path for path in members if path not in numbers]
    return None if not numbers or len(without) > 1 else [*sorted(numbers, key=lambda path: numbers[path]), *without]


def _without_copies(members: Sequence[str]) -> tuple[list[str], list[str]]:
    """The models without a final one whose weights are a checkpoint's (the last, or the best where a trainer went back to it)."""
    kept, told = list(members), []
    for path in members:
        others = [other for other in kept if other != path]
        if not (others and _is_final(path, members)):
            continue
        twin = next((other for other in reversed(others) if same_weights(path, other)), None)
        if twin is not None:
            kept.remove(path)
            told.append(f"{path}: has the weights of {Path(twin).name}, so it is not counted again")
    return kept, told
