"""The page of a benchmark's result: one sentence, the table, the charts, answers to read; it needs no network and no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isdaa.errors import UserError
from isdaa.evaluation.answer_notes import meanings, thinking_remarks
from isdaa.evaluation.benchmarks.outcome import (
    LENGTH_CONTROLLED,
    bounded,
    decided_of,
    gap_between,
    is_share,
    judged_by,
    name_of,
    ranked,
    told_apart,
)
from isdaa.evaluation.benchmarks.run import EXAMPLES
from isdaa.evaluation.benchmarks.table import characters, cut_notes, few, raw_mark, signed
from isdaa.evaluation.fragments import percent
from isdaa.evaluation.records import METRICS
from isdaa.files import write_atomically
from isdaa.foreign import read_json, read_object, readable
from isdaa.report import words
from isdaa.report.benchmark_charts import benchmark_figures, categories_of, colours_of
from isdaa.report.figures import Figure
from isdaa.report.page import CHARTS, PAGE, drawings_of, fill, plain
from isdaa.report.tax import tax_figure, tax_of, tax_table
from isdaa.report.words import MINUS


def write_benchmark_report(folder: str | Path) -> Path:
    """Write `report.html` and `charts/` beside the metrics of a benchmark; returns the page's path. Raises UserError.

    The alignment tax of its models is on it, where `isdaa tax` measured that in the same folder or the one around.
    """
    folder = Path(folder)
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder}: no {METRICS} of a benchmark there; run `isdaa benchmark` first")
    metrics = read_object(folder / METRICS)
    if not _current(metrics):
        raise UserError(
            f"{folder / METRICS}: its length-controlled win rate is from an older isdaa and not the leaderboard's figure; run "
            "`isdaa benchmark` again (it reuses all replies)"
        )
    read = read_json(folder / EXAMPLES) if (folder / EXAMPLES).is_file() else []
    with readable(folder, "its records are not those of a benchmark or tax of this isdaa", "run `isdaa benchmark` again"):
        figures = benchmark_figures(metrics)
        tax = tax_of(folder, metrics)
        if tax is not None and (chart := tax_figure(tax, metrics)) is not None:
            figures.append(chart)
        drawings = drawings_of(figures, folder / CHARTS)
        page = render(metrics, read, figures, drawings, tax)
    write_atomically(folder / PAGE, page)
    return folder / PAGE


def _current(metrics: Mapping[str, Any]) -> bool:
    """Whether figures mean what they are called: before format 2 another fit had the name of AlpacaEval's own."""
    old = metrics.get("format", 1) == 1
    return not (old and any(LENGTH_CONTROLLED in model.get("figures", ()) for model in metrics.get("models", ())))


def renew_benchmark_reports(folder: Path) -> list[Path]:
    """Write those benchmarks' pages again, in a folder and directly below it, that show the tax which it holds now."""
    pages = []
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        if (place / METRICS).is_file() and (place / PAGE).is_file():
            metrics = read_object(place / METRICS)
            judged = metrics.get("benchmark") and metrics.get("judge") is not None and _current(metrics)
            if judged and tax_of(place, metrics) is not None:
                pages.append(write_benchmark_report(place))
    return pages


def render(
    metrics: Mapping[str, Any],
    read: Sequence[Mapping[str, Any]],
    figures: list[Figure],
    drawings: Mapping[str, str],
    tax: Mapping[str, Any] | None = None,
) -> str:
    """The page."""
    share = is_share(metrics["headline"])
    filters: dict[str, Any] = {"percent": percent, "plain": plain, "level": words.percent}
    filters["figure"] = lambda value: figure(value, share)
    filters["signed"] = lambda value: signed(value, share).translate(MINUS)
    order = [model["model"] for model in ranked(metrics)]
    models = sorted(metrics["models"], key=lambda model: order.index(model["model"]) if model["model"] in order else len(order))
    return fill(
        "benchmarks.html",
        drawings,
        filters,
        metrics=metrics,
        models=models,
        columns=columns_of(metrics),
        categories=categories_of(metrics),
        prefix="win_rate/" if share else "category/",
        pairs=_pairs(metrics, order),
        examples=read,
        share=share,
        headline=name_of(metrics["headline"], metrics),
        judge=judged_by(metrics["judge"]),
        characters={model["model"]: characters(model) for model in models},
        tone=tone(metrics),
        few=few(metrics["questions"]["judged"]),
        notes=[
            *metrics.get("notes", ()),
            *(f"{metrics['judge']['name']}: {line}" for line in (metrics["judge"] or {}).get("about", ())),
            *(f"{model['model']}: {note}" for model in models for note in model["notes"]),
            *(f"{metrics['opponent']}: {note}" for note in thinking_remarks(metrics.get("opponent_answers"))),
        ],
        lacks=[model for model in models if model.get("lacks")],
        meanings=meanings(models),
        thinking=any((model["answers"] or {}).get("thinking") for model in models),
        cut=cut_notes(metrics),
        colours=colours_of(metrics),
        figures=figures,
        tax=tax_table(tax) if tax is not None else None,
    )


def figure(value: Mapping[str, Any] | None, share: bool) -> dict[str, str] | None:
    """`61.3 %` and `[57.0, 65.1]`; a grade `6.42` and its interval."""
    if value is None:
        return None
    scale, digits = (100, 1) if share else (1, 2)
    bounds = "" if value["low"] is None else f"[{scale * value['low']:.{digits}f}, {scale * value['high']:.{digits}f}]"
    return {"mean": f"{scale * value['mean']:.{digits}f}{' %' if share else ''}", "range": bounds}


def columns_of(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(figure, header) of the table: all but those by category."""
    names = dict.fromkeys(name for model in metrics["models"] for name in model["figures"] if "/" not in name)
    return [(name, _capital(name_of(name, metrics))) for name in names]


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def tone(metrics: Mapping[str, Any]) -> str:
    """The sentence's colour: green where something is told apart, grey-yellow where not."""
    if not metrics["headline"]:
        return "none"
    confidence = metrics["confidence"]
    best, *others = [model["model"] for model in ranked(metrics)]
    if others:
        gaps = [gap_between(metrics, best, other) for other in others]
        first = all(gap is not None and told_apart(gap, 0, confidence, gap["decided"]) > 0 for gap in gaps)
        return "not" if first else "under"
    if not is_share(metrics["headline"]):
        return "none"
    model = ranked(metrics)[0]
    figure = model["figures"][metrics["headline"]]
    return ("under", "not", "over")[told_apart(bounded(model, figure), 0.5, confidence, decided_of(model, figure))]


def _pairs(metrics: Mapping[str, Any], order: Sequence[str]) -> list[dict[str, Any]]:
    """Every two models, the better one first, in the order of the table."""
    place = {name: number for number, name in enumerate(order)}
    rows = []
    for row in metrics["comparisons"]:
        first, second = row["first"], row["second"]
        swap = place.get(first, 0) > place.get(second, 0)
        names = (second, first) if swap else (first, second)
        better, worse = (row["worse"], row["better"]) if swap else (row["better"], row["worse"])
        gap = gap_between(metrics, *names, raw=True)
        rows.append(
            {
                "first": names[0],
                "second": names[1],
                "gap": gap,
                "raw": raw_mark(row, metrics["headline"]),
                "better": better,
                "worse": worse,
                "equal": row["equal"],
            }
        )
    return sorted(rows, key=lambda row: (place.get(row["first"], 0), place.get(row["second"], 0)))
