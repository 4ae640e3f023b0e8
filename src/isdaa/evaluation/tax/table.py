"""The alignment tax as flat rows, for reports, and as the table that the terminal shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO, Any

from rich import box
from rich.table import Table

from isdaa.errors import shown
from isdaa.evaluation.statistics import fewest
from isdaa.evaluation.table import Column, filled, pm, short
from isdaa.evaluation.tax.scores import clear, signed
from isdaa.terminal import terminal_for

MEAN = "mean of tasks"
FEW = 50  # items, below which a percentile bootstrap covers less than it says (statistics.mean_interval)


def tax_rows(tax: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a task and model, the reference's first: all that a table or chart needs of `tax.json`.

    Keys: task, metric (`acc,none`; None of the mean), model (label), path, shots, items, score and difference
    (`{"mean", "low", "high", "n"}`; None for the reference), higher (whether more of the metric is better), clear (-1: lost
    beyond chance, 1: gained, 0).
    """
    confidence = tax["statistics"]["confidence"]
    everyone = [tax["reference"] | {"label": "reference"}, *tax["models"]]
    tasks = enumerate(tax["reference"]["tasks"])
    entries = [(task["task"], model, model["tasks"][place]) for place, task in tasks for model in everyone]
    for model in everyone:
        if model["mean"] is not None:
            mean = {"metric": None, "shots": None, "items": model["mean"]["score"]["n"], "higher_is_better": True}
            entries.append((MEAN, model, mean | model["mean"]))
    return [
        {"task": task, "model": model["label"], "path": model["path"]}
        | {key: entry[key] for key in ("metric", "shots", "items", "score", "difference")}
        | {"higher": entry["higher_is_better"], "clear": clear(entry, confidence)}
        for task, model, entry in entries
    ]


def tax_notes(tax: Mapping[str, Any]) -> list[str]:
    """What the table means, and what it does not say."""
    confidence = tax["statistics"]["confidence"]
    lines = [
        "Alignment tax: score minus the reference's on the same items; below zero, alignment cost ability.",
        f"± is half of a {confidence * 100:g} % bootstrap interval over items; *: zero lies outside of it, and the two models "
        f"differ on at least {fewest(confidence)} items.",
    ]
    entries = [entry for model in (tax["reference"], *tax["models"]) for entry in model["tasks"]]
    part = list(dict.fromkeys(entry["task"] for entry in entries if entry["items"] < entry["of"]))
    if part:
        lines.append(f"Not every item was asked (`isdaa tax --limit`): {', '.join(part)}.")
    small = list(dict.fromkeys(entry["task"] for entry in entries if entry["items"] < FEW))
    if small:
        lines.append(f"Under {FEW} items, where intervals are somewhat too narrow: {', '.join(small)}.")
    cut = list(dict.fromkeys(entry["task"] for entry in entries if entry["truncated"]))
    if cut:
        lines.append(
            f"Prompts longer than a model's context lost their beginning: {', '.join(cut)}; give fewer examples with --shots."
        )
    return [*lines, "", *(model["sentence"] for model in tax["models"])]


def print_tax(tax: Mapping[str, Any], file: IO[str] | None = None, width: int | None = None) -> None:
    """Print the table and its notes; ASCII rules and no colour where `file` (stdout) is no terminal."""
    console = terminal_for(file, width)
    plain = not console.is_terminal
    table = Table(box=box.ASCII2 if plain else box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("task", overflow="fold", min_width=8)
    table.add_column("model", overflow="fold", min_width=9)
    columns: list[Column] = [
        ("score", lambda row: pm(row["score"], 3)),
        ("difference", lambda row: signed(row["difference"]) + (" *" if row["clear"] else "  " if row["difference"] else "")),
        ("items", lambda row: str(row["items"])),
        ("shots", examples_of),
    ]
    rows = tax_rows(tax)
    columns = filled(columns, rows)
    for header, _ in columns:
        table.add_column(header, justify="right", no_wrap=True)
    before = None
    for row in rows:
        first = row["task"] != before
        if first:
            table.add_section()
        before = row["task"]
        table.add_row(
            shown(task_name(row)) if first else "",
            shown(short(row["model"])),
            *(cell(row) for _, cell in columns),
            style=None if plain or row["difference"] else "dim",
        )
    console.print(table)
    for line in tax_notes(tax):
        console.print(shown(line), style=None if plain else "dim", soft_wrap=True)


def examples_of(row: Mapping[str, Any]) -> str:
    """How many examples a prompt held: `5`; `0 to 5` of a group whose tasks differ."""
    shots = row["shots"]
    if isinstance(shots, list):
        return f"{shots[0]} to {shots[-1]}"
    return "" if shots is None else str(shots)


def task_name(row: Mapping[str, Any]) -> str:
    """`gsm8k (exact_match, strict-match)`; the filter only where there is a choice of filters."""
    if row["metric"] is None:
        return row["task"]
    metric, _, name = row["metric"].partition(",")
    return f"{row['task']} ({metric})" if name == "none" else f"{row['task']} ({metric}, {name})"
