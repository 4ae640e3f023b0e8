"""The evaluation in the model card of a checkpoint that isdaa trained: it is made later than the card, and put in its place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isdaa.evaluation.table import fine, pm
from isdaa.files import write_atomically
from isdaa.record import read_record, run_folder, without_places
from isdaa.terminal import say

CARD = "README.md"
BEGIN, END = "<!-- evaluation by isdaa -->", "<!-- end of the evaluation -->"
_VERSIONS = re.compile(r"^## Versions$", re.MULTILINE)
_SECTION = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}\n+", re.DOTALL)


def write_sections(metrics: Mapping[str, Any]) -> list[Path]:
    """Put the evaluation into the cards of the models in `metrics` that are this user's own; says so, and returns the cards.

    A run keeps some of its models twice: `model/` and `best/` are checkpoints, too, and each card is of the same weights.
    """
    words: dict[Path, str] = {}
    for model in metrics["models"]:
        words |= {card: section(model, metrics) for card in _cards(Path(model["path"]))}
    for card, told in words.items():
        write_atomically(card, with_section(card.read_text(encoding="utf-8"), told))
    if words:
        first = next(iter(words))
        say(f"the figures are in the model card: {first}" + (f" (and {len(words) - 1} more)" if len(words) > 1 else ""))
    return list(words)


def _cards(folder: Path) -> list[Path]:
    """The cards, where they are this user's own, of a model and of its run's others of the same step."""
    record, run = read_record(folder), run_folder(folder)
    if record is None or not record.own or not folder.is_dir():
        return []
    found = [folder]
    if run is not None and record.step is not None:
        alike = [run / "model", run / "best", run / "checkpoints" / f"checkpoint-{record.step}"]
        twins = [(other, read_record(other)) for other in alike if other.is_dir() and not other.samefile(folder)]
        found += [
            other for other, its in twins if its is not None and its.own and (its.kind, its.step) == (record.kind, record.step)
        ]
    return [other / CARD for other in found if (other / CARD).is_file()]


def with_section(card: str, words: str) -> str:
    """The card with the section in the place of an earlier one, else before `## Versions`, else at its end."""
    bare = _SECTION.sub("", card)
    place = _VERSIONS.search(bare)
    before, after = (bare, "") if place is None else (bare[: place.start()], bare[place.start() :])
    return f"{before.rstrip()}\n\n{BEGIN}\n{words}\n{END}\n\n{after}"


def section(model: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """What was measured of a model, and what its run's checkpoints say together, as Markdown."""
    scorer = (metrics.get("scorer") or {}).get("name")
    rows = [
        ("reference", f"`{without_places(metrics['reference']['path'])}`"),
        ("KL from the reference", fine(model["kl"], 2)),
        ("win rate", pm(model["win_rate"], 3)),
        ("score", pm(model["reward"], 3)),
    ]
    lines = ["## Evaluation", "", "| measured by `isdaa evaluate` | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows if value]
    data = metrics.get("data")
    lines.append(f"| prompts | {metrics['prompts']}" + (f", of `{Path(data).name}` |" if data else " |"))
    if model["win_rate"] is not None:
        against = "the reference's samples" if metrics["opponent"] == "reference" else "the chosen responses"
        lines.append(f"| won against | {against}, as `{Path(scorer).name if scorer else 'a judge'}` scores |")
    lines += ["", "± is half of a 95 % bootstrap interval over prompts."]
    sentence = _verdict(model, metrics)
    return "\n".join([*lines, *(["", f"**Verdict on its run:** {sentence}"] if sentence else [])])


def _verdict(model: Mapping[str, Any], metrics: Mapping[str, Any]) -> str | None:
    """The sentence on the run that a model is a checkpoint of."""
    verdicts = {name: found for name, found in (metrics.get("verdicts") or {}).items() if found is not None}
    run = run_folder(model["path"])
    found = [] if run is None else [verdict for name, verdict in verdicts.items() if Path(name).name == run.name]
    return str(found[0]["sentence"]) if len(found) == 1 else None
