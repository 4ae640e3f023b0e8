"""The table that an evaluation prints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from rich import box
from rich.table import Table

from isdaa.errors import shown
from isdaa.evaluation.fragments import is_fragmentary, percent, warnings_of
from isdaa.evaluation.left_out import endings
from isdaa.evaluation.left_out import lines as left_out
from isdaa.evaluation.verdict.fall_statistics import MARGIN
from isdaa.evaluation.verdict.overoptimization import NONE_BETTER
from isdaa.terminal import terminal_for

Column = tuple[str, Callable[[Mapping[str, Any]], str]]  # header, and what stands in a row's cell
FLIPS = "contradicts itself"  # of a judge
FRAGMENTS = "!"  # beside a win rate of fragments


def print_table(
    metrics: Mapping[str, Any],
    file: IO[str] | None = None,
    width: int | None = None,
    worded: Callable[[str], str] = str,
) -> None:
    """Print the table, its legend and the note; ASCII rules and no colour where `file` (stdout) is no terminal.

    worded: rewrites each line of the legend.
    """
    console = terminal_for(file, width)
    for line in endings(metrics.get("ended", {}), len({**metrics.get("verdicts", {}), **metrics.get("ended", {})})):
        console.print(shown(line))
    console.print(evaluation_table(metrics, plain=not console.is_terminal))
    for line in legend(metrics):
        console.print(shown(worded(line)), style="dim" if console.is_terminal else None)


def evaluation_table(metrics: Mapping[str, Any], plain: bool = False) -> Table:
    """One row a checkpoint after one of the reference. Columns that no row has a value for are left out."""
    models, reference = metrics["models"], metrics["reference"]

    def win_rate(model: Mapping[str, Any]) -> str:
        told = pm(model["win_rate"], 3)
        return f"{told} {FRAGMENTS}" if told and is_fragmentary(metrics, model) else told

    def held_out(model: Mapping[str, Any], key: str) -> Any:
        return (model.get("held_out") or {}).get(key)

    columns: list[Column] = [
        ("KL (nats)", lambda m: fine(m["kl"], 2)),
        ("length", lambda m: mean(m["length"], 1)),
        ("cut", lambda m: percent(m["truncated"])),
    ]
    if metrics["scorer"] is not None:
        columns[1:1] = [("win rate", win_rate), ("reward", lambda m: mean(m["reward"], 2))]
    else:
        columns += [
            ("accuracy", lambda m: pm(held_out(m, "accuracy"), 3)),
            ("drift chosen", lambda m: fine(held_out(m, "chosen_drift"), 1, bare=True)),
            ("rejected", lambda m: fine(held_out(m, "rejected_drift"), 1, bare=True)),
        ]
    columns += [("weight", lambda m: number(m.get("weight_mean"), 3)), ("ESS", lambda m: number(m.get("ess"), 2))]
    columns = filled(columns, [reference, *models])
    table = Table(box=box.ASCII2 if plain else box.SIMPLE_HEAD, title_justify="left", pad_edge=False, collapse_padding=True)
    table.add_column("checkpoint", justify="left", overflow="fold", min_width=10)
    for header, _ in columns:
        table.add_column(header, justify="right", no_wrap=True)
    table.add_row("reference", *(cell(reference) for _, cell in columns), style=None if plain else "dim")
    before = None
    for model in models:
        group = (model["method"], model["beta"], model["seed"], model["label"].rpartition("/")[0])
        if group != before:
            table.add_section()
        before = group
        table.add_row(shown(short(model["label"])), *(cell(model) for _, cell in columns))
    return table


def filled(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns in which some row has a value."""
    return [(header, cell) for header, cell in columns if any(cell(row).strip() for row in rows)]


def legend(metrics: Mapping[str, Any]) -> list[str]:
    """What the columns mean, and what the table does not say."""
    settings, scorer = metrics["settings"], metrics["scorer"]
    level = f"{settings['confidence'] * 100:g} %"
    prompts = "1 held-out prompt" if metrics["prompts"] == 1 else f"{metrics['prompts']} held-out prompts"
    lines = [
        f"{prompts}; ± is half of a {level} bootstrap interval over prompts; cut: ended by the length limit.",
    ]
    if scorer is None and any("held_out" in model for model in metrics["models"]):
        lines.append(
            "accuracy and drift (log π − log π_ref, nats), with their intervals: over the prompts of the held-out pairs."
        )
    if any(model.get("ess") is not None for model in metrics["models"]):
        lines.append("weight and ESS (a share of the batch): means over the training steps since the previous checkpoint.")
    if scorer is not None:
        opponent = "the reference's samples" if metrics["opponent"] == "reference" else "the data's chosen responses"
        at = f"temperature {settings['temperature']:g}, top-p {settings['top_p']:g}"
        lines.append(f"Win rate by {scorer['name']} against {opponent} ({at}); KL at temperature 1.")
        twice = any(FLIPS in note for note in (metrics.get("judged") or {}).get("notes", []))  # in more words
        lines += [f"{scorer['name']}: {line}." for line in scorer.get("about", ()) if not (twice and line.startswith(FLIPS))]
    lines += [] if (line := unmoved(metrics["models"])) is None else [line]
    lines += (metrics.get("judged") or {}).get("notes", [])
    lines += (metrics.get("thinking") or {}).get("notes", [])
    lines += [f"{FRAGMENTS} {line}." for line in warnings_of(metrics)]
    lines += left_out(metrics.get("left_out", ()))
    verdicts = {name: found["sentence"] for name, found in metrics.get("verdicts", {}).items() if found is not None}
    # A run of one or two checkpoints has no verdict, but they may be compared with the reference.
    none = f"{NONE_BETTER[:1].upper()}{NONE_BETTER[1:]}."
    verdicts |= {name: none for name, better in metrics.get("better", {}).items() if better is False and name not in verdicts}
    if scorer is None:
        lines.append(metrics["note"])
    several = len(metrics.get("verdicts", verdicts)) > 1
    told = [f"{name}: {sentence}" if several else sentence for name, sentence in verdicts.items()]
    whose: dict[str, list[str]] = {}
    for name, why in metrics.get("no_verdict", {}).items():
        if why is not None and scorer is not None:
            whose.setdefault(why, []).append(name)
    told += [f"{'; '.join(names)}: {why}" if several else why for why, names in whose.items()]
    return [*lines, "", *told] if told else lines


def pm(interval: Mapping[str, Any] | None, digits: int) -> str:
    """`0.61 ± 0.04`; the number alone where it is exact or one prompt gave it; empty where there is none."""
    if interval is None:
        return ""
    if interval["low"] is None or interval["low"] == interval["high"]:
        return f"{interval['mean']:z.{digits}f}"
    return f"{interval['mean']:z.{digits}f} ± {(interval['high'] - interval['low']) / 2:.{digits}f}"


def fine(interval: Mapping[str, Any] | None, digits: int, bare: bool = False) -> str:
    """As `pm` (bare: the mean alone); where that would show as 0, two significant digits: 1e-05 and 0.004 differ."""
    if interval is None or round(abs(interval["mean"]), digits) or abs(interval["mean"]) < 1e-9:
        return mean(interval, digits) if bare else pm(interval, digits)
    told = f"{interval['mean']:.2g}"
    if bare or interval["low"] is None or interval["low"] == interval["high"]:
        return told
    return f"{told} ± {(interval['high'] - interval['low']) / 2:.1g}"


def unmoved(models: Sequence[Mapping[str, Any]]) -> str | None:
    """A sentence where every model's KL is so small that no win rate could tell it from its reference.

    Distributions of that KL differ by √(KL/2) at most in the probability of anything (Pinsker), winning included.
    """
    measured = [model["kl"] for model in models if model.get("kl")]
    bounds = [kl["mean"] if kl.get("high") is None else kl["high"] for kl in measured]
    if len(bounds) < len(models) or not bounds or not all(math.sqrt(max(bound, 0.0) / 2) < MARGIN for bound in bounds):
        return None
    most = max(*bounds, 0.0)
    return (
        f"Training has hardly changed the model: at a KL of {most:.1g} or less a win rate differs by {math.sqrt(most / 2):.1g} "
        "or less from the reference's own. More steps or a larger learning rate teach more."
    )


def short(label: str) -> str:
    """`dpo/30` for `dpo/checkpoint-30`: the table has to fit 80 columns."""
    run, _, name = label.rpartition("/")
    return f"{run}/{name.removeprefix('checkpoint-')}" if run else name


def mean(interval: Mapping[str, Any] | None, digits: int) -> str:
    """The mean of an interval, or nothing."""
    return number(interval["mean"] if interval is not None else None, digits)


def number(value: float | None, digits: int) -> str:
    """A number, never -0.00, or nothing."""
    return "" if value is None else f"{value:z.{digits}f}"
