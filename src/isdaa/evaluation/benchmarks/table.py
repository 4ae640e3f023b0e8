"""What `isdaa benchmark` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import IO, Any

from rich import box
from rich.table import Table

from isdaa.errors import shown
from isdaa.evaluation.answer_notes import meanings, thinking_remarks
from isdaa.evaluation.benchmarks.outcome import (
    LENGTH_ADJUSTED,
    LENGTH_CONTROLLED,
    RAW,
    WORDS,
    is_share,
    judged_by,
    name_of,
    ranked,
)
from isdaa.evaluation.benchmarks.sets.benchmark import counted
from isdaa.evaluation.fragments import many, percent, warning
from isdaa.evaluation.table import FRAGMENTS, Column, filled, number
from isdaa.terminal import terminal_for

# Figures that the table has room for, in this order; the others are in the report and in metrics.json.
SHOWN = (LENGTH_CONTROLLED, "equal_style_win_rate", "win_rate", LENGTH_ADJUSTED, "score", "turn_1", "turn_2")
ENOUGH = 50  # questions from which on a bootstrap interval covers about as often as it says
EVERY_PAIR = 3  # models of which every two are compared in the terminal
HEADERS = {LENGTH_CONTROLLED: "LC win rate", "equal_style_win_rate": "at equal style", LENGTH_ADJUSTED: "length-adjusted"}


def print_outcome(metrics: Mapping[str, Any], file: IO[str] | None = None, width: int | None = None) -> None:
    """The table, the models compared, what a reader must know, the sentence; plain where `file` (stdout) is no terminal."""
    console = terminal_for(file, width)
    plain = not console.is_terminal
    console.print(_table(columns_of(metrics), metrics["models"], plain))
    if metrics["comparisons"]:
        console.print(_table(_pair_columns(metrics), pairs_of(metrics), plain))
    for line in legend(metrics):
        console.print(shown(line), style=None if plain else "dim")
    if metrics["sentence"]:
        console.print(shown(metrics["sentence"]))


def _table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], plain: bool) -> Table:
    table = Table(box=box.ASCII2 if plain else box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    columns = filled(columns, rows)
    for place, (header, _) in enumerate(columns):
        left = place == 0
        table.add_column(
            header, justify="left" if left else "right", overflow="fold", no_wrap=not left, min_width=10 if left else None
        )
    for row in rows:
        table.add_row(*(shown(cell(row)) for _, cell in columns))
    return table


def columns_of(metrics: Mapping[str, Any]) -> list[Column]:
    """Columns that some model has a value for."""
    models = metrics["models"]
    columns: list[Column] = [("model", lambda m: m["model"])]
    for name in SHOWN:
        if any(name in model.get("figures", {}) for model in models):
            header = HEADERS.get(name, WORDS.get(name, name))
            columns.append((header, lambda m, name=name: _marked(metrics, m, name)))  # type: ignore[misc]
    if any("flip_rate" in model.get("details", {}) for model in models):
        columns.append(("flips", lambda m: percent(m["details"]["flip_rate"]) if "flip_rate" in m["details"] else ""))
    if any(model.get("counts", {}).get("unparsed") for model in models):
        columns.append(("unread", lambda m: str(m["counts"]["unparsed"])))
    if any(characters(model) is not None for model in models):
        columns.append(("characters", lambda m: number(characters(m), 0)))
    if any((model["answers"] or {}).get("thinking") for model in models):
        columns.append(("thinking", lambda m: percent(t["share"]) if (t := (m["answers"] or {}).get("thinking")) else ""))
    if any((model["answers"] or {}).get("truncated") is not None for model in models):
        columns.append(("cut", lambda m: _cut(m["answers"])))
    return columns


def characters(model: Mapping[str, Any]) -> float | None:
    """Mean length of a model's answers, as the benchmark counts it where it does."""
    return model.get("details", {}).get("length", (model["answers"] or {}).get("mean_characters"))


def _marked(metrics: Mapping[str, Any], model: Mapping[str, Any], name: str) -> str:
    """A figure, marked where it is one of fragments."""
    told = spread(model["figures"].get(name), is_share(name))
    opponent = cut_share(metrics.get("opponent_answers")) if is_share(name) else None
    return f"{told} {FRAGMENTS}" if told and (many(cut_share(model["answers"])) or many(opponent)) else told


def cut_share(answers: Mapping[str, Any] | None) -> float | None:
    """The share of answers that ended at the limit; None where isdaa did not draw them."""
    return None if answers is None or answers["truncated"] is None else float(answers["truncated"] / answers["turns"])


def cut_notes(metrics: Mapping[str, Any]) -> list[str]:
    """A sentence for each model, and for their opponent, of whose answers many were cut."""
    limit = (metrics.get("generation") or {}).get("max_new_tokens")
    asked = [(model["model"], model["answers"], "its figures are of fragments") for model in metrics["models"]]
    what = "the figures of all models are wins over fragments"
    asked.append((metrics["opponent"] or "the opponent", metrics.get("opponent_answers"), what))
    return [
        warning({f"the answers of {name}": [share]}, what, "max_new_tokens", limit)
        for name, answers, what in asked
        if (share := cut_share(answers)) is not None and many(share)
    ]


def _cut(answers: Mapping[str, Any] | None) -> str:
    share = cut_share(answers)
    return "" if share is None else percent(share)


def pairs_of(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every two models; of many models, each with the best alone."""
    rows, order = list(metrics["comparisons"]), ranked(metrics)
    if len(metrics["models"]) <= EVERY_PAIR or not order:
        return rows
    best = order[0]["model"]
    return [row for row in rows if best in (row["first"], row["second"])]


def _pair_columns(metrics: Mapping[str, Any]) -> list[Column]:
    share = is_share(metrics["headline"])
    headline = HEADERS.get(metrics["headline"]) or WORDS.get(metrics["headline"], metrics["headline"])
    return [
        ("compared", lambda row: f"{row['first']} − {row['second']}"),
        (
            headline,
            lambda row: signed(row["headline_difference"] or row["difference"], share) + raw_mark(row, metrics["headline"]),
        ),
        ("better", lambda row: str(row["better"])),
        ("equal", lambda row: str(row["equal"])),
        ("worse", lambda row: str(row["worse"])),
    ]


def raw_mark(row: Mapping[str, Any], headline: str) -> str:
    """Says where two models have no difference of the headline, so that the raw figure's stands in its place."""
    return " raw" if row["headline_difference"] is None and headline not in RAW else ""


def spread(figure: Mapping[str, Any] | None, share: bool) -> str:
    """`61.3 ± 4.2 %`; a grade `6.42 ± 0.31`."""
    if figure is None:
        return ""
    scale, digits, unit = (100, 1, " %") if share else (1, 2, "")
    if figure["low"] is None:
        return f"{scale * figure['mean']:.{digits}f}{unit}"
    return f"{scale * figure['mean']:.{digits}f} ± {scale * (figure['high'] - figure['low']) / 2:.{digits}f}{unit}"


def signed(figure: Mapping[str, Any], share: bool) -> str:
    """`+4.1 [+1.2, +7.0]`, in points of a percentage or of a grade."""
    scale, digits = (100, 1) if share else (1, 2)
    values = [figure["mean"], figure["low"], figure["high"]]
    mean, *bounds = ["" if value is None else f"{scale * value:+.{digits}f}" for value in values]
    return f"{mean} [{', '.join(bounds)}]" if all(bounds) else mean


def legend(metrics: Mapping[str, Any]) -> list[str]:
    """What the columns mean, who judged, what it cost, and what the table does not say."""
    questions, judge = metrics["questions"], metrics["judge"]
    cut = [f"{FRAGMENTS} {note}." for note in cut_notes(metrics)]
    if judge is None:
        thoughts = [f"{m['model']}: {note}." for m in metrics["models"] for note in thinking_remarks(m["answers"])]
        return [
            f"{questions['count']} questions of {metrics['title']}; cut: share of answers that ended at the limit on new tokens.",
            *thoughts,
            *cut,
        ]
    level = f"{metrics['confidence'] * 100:g} %"
    count, of = questions["judged"], questions["count"]
    said = f"{count:,} of {counted(of, 'question')}" if count < of else counted(count, "question")
    lines = [f"{said}; ± is half of a {level} bootstrap interval over questions{few(count)}."]
    against = f" against {metrics['opponent']}" if metrics["opponent"] else ""
    lines.append(f"{metrics['title']}{against}, judged by {judged_by(judge)}{_cost(judge)}.")
    named = [
        name for name in (LENGTH_CONTROLLED, LENGTH_ADJUSTED) if any(name in model["figures"] for model in metrics["models"])
    ]
    lines += [f"{HEADERS[name].partition(' ')[0]}: {name_of(name, metrics).removeprefix('length-adjusted ')}." for name in named]
    lines += [f"{note}." for note in metrics.get("notes", ())]
    lines += [f"{judge['name']}: {line}." for line in judge.get("about", ())]
    lines += [f"{model['model']}: {note}." for model in metrics["models"] for note in model["notes"]]
    lines += [f"{metrics['opponent']}: {note}." for note in thinking_remarks(metrics.get("opponent_answers"))]
    lines += [f"{meaning}." for meaning in meanings(metrics["models"])]
    return lines + cut


def few(questions: int) -> str:
    """A warning about intervals over few questions (`statistics.mean_interval`); empty for many."""
    return ", somewhat too narrow for so few" if questions < ENOUGH else ""


def _cost(judge: Mapping[str, Any]) -> str:
    usage = judge.get("usage")
    if usage is None:
        return ""
    kept = "reply" if usage["cached"] == 1 else "replies"
    words = [counted(usage["requests"], "request"), f"{usage['cached']:,} {kept} kept from before"]
    words.append(f"{usage['prompt_tokens']:,} tokens read and {usage['completion_tokens']:,} written")
    words += [f"cost {usage['cost']:.2f}"] if usage["cost"] is not None else []
    return f" ({', '.join(words)})"
