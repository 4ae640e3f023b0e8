"""What cells are called, and which colour each name has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from isdaa.evaluation.checkpoints.trajectory import Trajectory
from isdaa.report.charts.style import PALETTE

METHOD, BETA = "objective.method", "objective.beta"
# Settings that say when something is written or looked at, not how the run is trained.
SILENT = ("align.save_steps", "align.save_total_limit", "align.eval_steps", "align.logging_steps")
# Settings whose value says enough in fewer words than `key value`.
SHORT = {
    "objective.implicit_reward": "{}",
    "objective.loss": "{} loss",
    "objective.weight": "weights {}",
    "objective.clip_eps": "ε {}",
    "align.optimizer": "{}",
    "align.lr_scheduler": "{}",
    "align.learning_rate": "lr {}",
    "align.epochs": "{} epochs",
}


def labels_of(first: Mapping[str, Trajectory], cells: Sequence[Mapping[str, Any]] = ()) -> dict[str, str]:
    """Cell -> method and every setting that its grid sets and that not all cells share.

    first: a run of each cell. cells: settings of all cells of the study, those without a run included.
    """
    every = [*cells, *(run.settings for run in first.values())]
    labels = {name: name if run.method is None else ", ".join([run.method, *_words(run, every)]) for name, run in first.items()}
    keys = [(labels[name], run.beta) for name, run in first.items()]
    seen: dict[tuple[str, float | None], int] = {}
    for (name, run), key in zip(first.items(), keys, strict=True):
        seen[key] = seen.get(key, 0) + 1
        if keys.count(key) > 1:  # runs of no sweep are told apart by their names
            labels[name] = f"{labels[name]} ({run.name if not cells else seen[key]})"
    return labels


def _words(run: Trajectory, every: Sequence[Mapping[str, Any]]) -> list[str]:
    own = {key: value for key, value in run.settings.items() if key not in (METHOD, BETA, *SILENT)}
    different = [key for key, value in own.items() if any(key not in other or other[key] != value for other in every)]
    return [SHORT.get(key, key.rpartition(".")[2] + " {}").format(_word(own[key])) for key in different]


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def colours_of(labels: Sequence[tuple[str, str]], together: Sequence[Sequence[str]] = ()) -> dict[str, str]:
    """Label -> colour, the same in every chart, from (label, family of methods). together: labels that share a panel.

    Beyond eight labels families repeat, and a label whose colour a neighbour in some panel has takes another.
    """
    families = dict(labels)
    if len(families) <= len(PALETTE):
        return dict(zip(families, PALETTE, strict=False))
    wanted: dict[str, str] = {}
    for family in dict.fromkeys(families.values()):
        members = [label for label in families if families[label] == family]
        members.sort(key=lambda label: (label != family, label != f"is_{family}"))
        wanted |= {label: PALETTE[place % len(PALETTE)] for place, label in enumerate(members)}
    colours: dict[str, str] = {}
    for label, first in wanted.items():
        neighbours = {other for members in together if label in members for other in members}
        taken = [colours[other] for other in neighbours if other in colours]
        colours[label] = min([first, *PALETTE], key=taken.count)
    return colours
