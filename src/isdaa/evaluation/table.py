"""The table that an evaluation prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO, Any

from rich import box
from rich.table import Table

from isdaa.errors import shown
from isdaa.terminal import terminal_for


def print_table(metrics: Mapping[str, Any], file: IO[str] | None = None, width: int | None = None) -> None:
    """Print the table, its legend and the note; ASCII rules and no colour where `file` (stdout) is no terminal."""
    console = terminal_for(file, width)
    console.print(evaluation_table(metrics, plain=not console.is_terminal))
    for line in legend(metrics):
        console.print(shown(line), style="dim" if console.is_terminal else None)


def evaluation_table(metrics: Mapping[str, Any], plain: bool = False) -> Table:
    """One row a checkpoint after one of the reference. Columns that no row has a value for are left out."""
    models, reference = metrics["models"], metrics["reference"]
    scored = metrics["scorer"] is not None
    table = Table(box=box.ASCII2 if plain else box.SIMPLE_HEAD, title_justify="left", pad_edge=False, collapse_padding=True)
    columns: list[tuple[str, Any]] = [("KL (nats)", lambda m: pm(m["kl"], 2))]
    if scored:
        columns.append(("win rate", lambda m: pm(m["win_rate"], 3)))
        columns.append(("reward", lambda m: number(m["reward"]["mean"] if m["reward"] else None, 2)))
    columns.append(("length", lambda m: number(m["length"]["mean"], 1)))
    columns.append(("cut", lambda m: percent(m["truncated"])))
    if not scored and any("held_out" in m for m in models):
        columns.append(("accuracy", lambda m: pm(m["held_out"]["accuracy"], 3) if "held_out" in m else ""))
        columns.append(("drift chosen", lambda m: number(m["held_out"]["chosen_drift"]["mean"], 1) if "held_out" in m else ""))
        columns.append(("rejected", lambda m: number(m["held_out"]["rejected_drift"]["mean"], 1) if "held_out" in m else ""))
    for header, key, digits in (("weight", "weight_mean", 3), ("ESS", "ess", 2)):
        if any(model.get(key) is not None for model in models):
            columns.append((header, lambda m, key=key, digits=digits: number(m.get(key), digits)))
    table.add_column("checkpoint", justify="left", overflow="fold", min_width=10)
    for header, _ in columns:
        table.add_column(header, justify="right", no_wrap=True)
    table.add_row("reference", *(cell(reference) for _, cell in columns), style=None if plain else "dim")
    before = None
    for model in models:
        group = (model["method"], model["beta"], model["seed"])
        if group != before:
            table.add_section()
        before = group
        table.add_row(shown(short(model["label"])), *(cell(model) for _, cell in columns))
    return table


def legend(metrics: Mapping[str, Any]) -> list[str]:
    """What the columns mean, and what the table does not say."""
    settings, scorer = metrics["settings"], metrics["scorer"]
    level = f"{settings['confidence'] * 100:g} %"
    prompts = "1 held-out prompt" if metrics["prompts"] == 1 else f"{metrics['prompts']} held-out prompts"
    lines = [
        f"{prompts}; ± is half of a {level} bootstrap interval over prompts; cut: ended by the length limit.",
    ]
    if scorer is None and any("held_out" in model for model in metrics["models"]):
        lines.append("accuracy, drift (log π − log π_ref, nats): over the prompts of the held-out pairs, intervals too.")
    if any(model.get("ess") is not None for model in metrics["models"]):
        lines.append("weight, ESS (a share of the batch): means over the training steps since the checkpoint before.")
    if scorer is not None:
        opponent = "the reference's samples" if metrics["opponent"] == "reference" else "the data's chosen responses"
        at = f"temperature {settings['temperature']:g}, top-p {settings['top_p']:g}"
        lines.append(f"Win rate by {scorer['name']} against {opponent} ({at}); KL at temperature 1.")
    verdicts = {name: found["sentence"] for name, found in metrics.get("verdicts", {}).items() if found is not None}
    if not verdicts:
        return [*lines, metrics["note"]]
    return [*lines, "", *(f"{name}: {sentence}" if len(verdicts) > 1 else sentence for name, sentence in verdicts.items())]


def pm(interval: Mapping[str, Any] | None, digits: int) -> str:
    """`0.61 ± 0.04`; the number alone where it is exact or one prompt gave it; empty where there is none."""
    if interval is None:
        return ""
    if interval["low"] is None or interval["low"] == interval["high"]:
        return f"{interval['mean']:.{digits}f}"
    return f"{interval['mean']:.{digits}f} ± {(interval['high'] - interval['low']) / 2:.{digits}f}"


def short(label: str) -> str:
    """`dpo/30` for `dpo/checkpoint-30`, `dpo/final` for `dpo/model`: the table has to fit 80 columns."""
    run, _, name = label.rpartition("/")
    name = "final" if run and name == "model" else name.removeprefix("checkpoint-") if run else name
    return f"{run}/{name}" if run else name


def number(value: float | None, digits: int) -> str:
    """A number, or nothing."""
    return "" if value is None else f"{value:.{digits}f}"


def percent(share: float) -> str:
    """`3 %`; `<1 %` where it is small but not zero."""
    return "<1 %" if 0 < share < 0.01 else f"{100 * share:.0f} %"
