"""The alignment tax on a benchmark's page: what `isdaa tax` measured of the models that the page shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isdaa.evaluation.table import pm
from isdaa.evaluation.tax.scores import sentence, signed
from isdaa.evaluation.tax.table import examples_of, task_name, tax_notes, tax_rows
from isdaa.evaluation.tax.tax import ITEMS, TAX
from isdaa.foreign import read_json
from isdaa.report.benchmark_charts import colours_of, dots, row_of
from isdaa.report.figures import Figure
from isdaa.report.words import MINUS

MARGIN = 0.005  # of a score: where all differences are one value


def tax_of(folder: Path, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """The tax in the benchmark's folder, or in the one around it, of those models alone that the benchmark has, by its names.

    Models are the same where their weights are. None where none of the benchmark's was asked lm-eval's tasks.
    """
    for place in (folder, folder.absolute().parent):
        if (place / TAX).is_file() and (place / ITEMS).is_file():
            tax = read_json(place / TAX)
            confidence = tax["statistics"]["confidence"]
            measured = {model["digest"]: model for model in tax["models"]}
            names = {model["model"]: model.get("digest") for model in metrics["models"]}
            models = [
                measured[digest] | {"label": name, "sentence": sentence(name, measured[digest], confidence)}
                for name, digest in names.items()
                if digest in measured
            ]
            if models:
                return tax | {"models": models}
    return None


def tax_table(tax: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows beside the chart: rows of text, one a task and model, the reference's first; notes; sentences."""
    rows: list[dict[str, Any]] = []
    before = None
    for row in tax_rows(tax):
        rows.append(
            {
                "task": task_name(row) if row["task"] != before else "",
                "model": row["model"],
                "reference": row["difference"] is None,
                "score": pm(row["score"], 3),
                "difference": signed(row["difference"]).translate(MINUS) + (" *" if row["clear"] else ""),
                "count": row["items"],
                "examples": examples_of(row),
            }
        )
        before = row["task"]
    told = [model["sentence"] for model in tax["models"]]
    notes = [line for line in tax_notes(tax) if line and line not in told]
    sentences = [f"{line[:1].upper()}{line[1:]}." for line in told]
    return {"models": [model["label"] for model in tax["models"]], "rows": rows, "notes": notes, "sentences": sentences}


def tax_figure(tax: Mapping[str, Any], metrics: Mapping[str, Any]) -> Figure | None:
    """The differences from the reference, task by task; None where no task has one with an interval."""
    colours = colours_of(metrics)
    rows: list[Mapping[str, Any]] = []
    for row in tax_rows(tax):
        # Of a metric of which less is better, right would not be better; it stands in the table alone.
        if row["difference"] is not None and row["difference"]["low"] is not None and row["higher"]:
            rows.append(row_of(row["task"], row["difference"], colours[row["model"]]) | {"model": row["model"]})
    if not rows:
        return None
    level = f"{tax['statistics']['confidence'] * 100:g} %"
    caption = f"Score minus the reference’s on the same items; bars are {level} intervals over items. Left of zero is a loss."

    def draw(width: int) -> Any:
        return dots(rows, width, "Score minus the reference’s", False, even=0.0, within=None, offset=_several(rows), least=MARGIN)

    return Figure("tax", "tax", "Difference from the reference", caption, draw, 1)


def _several(rows: Sequence[Mapping[str, Any]]) -> bool:
    return len({row["model"] for row in rows}) > 1
