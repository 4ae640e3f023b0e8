"""The report: one HTML page that needs no network, its charts as PNG and SVG, and all it says as JSON and CSV.

The page holds no script at all, and its policy forbids any: what a model wrote is text, whatever it looks like.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from isdaa.data.conversation import turns_of
from isdaa.errors import UserError, shown
from isdaa.evaluation.checkpoints.trajectory import Study
from isdaa.files import write_atomically, write_json
from isdaa.report.answers import answer_turns
from isdaa.report.charts.render import PictureError
from isdaa.report.charts.style import DARK, inline_svg, save_chart, svg_of
from isdaa.report.content import Findings, find, report_of, table_of
from isdaa.report.figures import FOLDED, Figure, figures_of
from isdaa.report.samples import FROM_WORST
from isdaa.report.tables import pruned
from isdaa.report.words import interval, number, percent
from isdaa.terminal import progress, say

PAGE, DATA, TABLE, CHARTS = "report.html", "report.json", "report.csv", "charts"
WIDE, NARROW = 1000, 356  # pixels that a drawing fills on a wide screen and on a telephone
HERE = Path(__file__).parent


def write_report(study: Study, folder: Path) -> Path:
    """Write `report.html`, `report.json`, `report.csv` and `charts/` (docs/report.md).

    Args:
        study: of `isdaa.evaluation.read_study`.
        folder: where to.

    Returns:
        The page's path.

    Raises:
        UserError: the study has no run, or the folder cannot be written.
    """
    if not study.runs:
        raise UserError(f"{study.folder}: no run to report on")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose another folder for the report with --output")
    found = find(study)
    report = report_of(found)
    figures = figures_of(found)
    drawings = drawings_of(figures, folder / CHARTS)
    report["charts"] = [{"name": f.name, "title": f.title, "files": files_of(f, folder)} for f in figures]
    write_json(folder / DATA, report)
    write_atomically(folder / TABLE, table_of(report))
    write_atomically(folder / PAGE, render(report, figures, drawings, found))
    return folder / PAGE


def render(report: Mapping[str, Any], figures: list[Figure], drawings: Mapping[str, str], found: Findings) -> str:
    """The page."""
    filters = {"number": number, "interval": interval, "percent": percent, "plain": plain, "turns": turns_of}
    filters |= {"answer": answer_turns, "options": options}
    by_section: dict[str, list[Figure]] = {}
    for figure in figures:
        by_section.setdefault(figure.section, []).append(figure)
    return fill(
        "page.html",
        drawings,
        filters,
        report=report,
        sections=by_section,
        colours={line.cell: line.colour for line in found.lines},
        single=len(report["runs"]) == 1,
        seeds=any(run["seed"] is not None for run in report["runs"]) or len(report["cells"]) < len(report["runs"]),
        logged=found.histories,
        opponent="the data’s chosen responses" if report["opponent"] == "chosen" else "the reference",
    )


def fill(template: str, drawings: Mapping[str, str], filters: Mapping[str, Any], **values: Any) -> str:
    """A page by its template's name. Everything but the style and the drawings, which are ours, is escaped; tables have no
    columns of dashes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: shown(value, lines=True) if type(value) is str else value,
    )
    environment.filters |= {"sentence": sentence} | dict(filters)
    environment.tests["fallen"] = lambda why: why.startswith(FROM_WORST)
    style = (HERE / "page.css").read_text(encoding="utf-8") + dark_rules()
    marked = {name: Markup(drawing) for name, drawing in drawings.items()}
    return pruned(environment.get_template(template).render(style=Markup(style), drawings=marked, **values))


def sentence(text: str) -> str:
    """A line with a full stop at its end, once."""
    return text if text.rstrip().endswith((".", "!", "?")) else f"{text}."


def options(text: str) -> Any:
    """A sentence whose options are set as code, and never broken after their dashes."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"(--[\w.]+(?: \d+)?)", r"<code>\1</code>", str(escape(shown(text, lines=True)))))


def plain(value: Any) -> str:
    """A setting as people read it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return (
        value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False)
        if isinstance(value, (list, dict))
        else str(value)
    )


def files_of(figure: Figure, folder: Path) -> list[str]:
    """The files of a chart that were written, as seen from the report's folder."""
    names = [f"{CHARTS}/{figure.name}.{kind}" for kind in ("png", "svg")]
    return [name for name in names if (folder / name).is_file()]


def drawings_of(figures: list[Figure], folder: Path) -> dict[str, str]:
    """Write each chart's files; returns the two drawings of each for the page, wide and narrow.

    What the chart library cannot draw is said, on the terminal and in the picture's place.
    """
    drawings = {}
    with progress("drawing", len(figures)) as bar:
        for figure in figures:
            try:
                drawings[figure.name] = _drawing_of(figure, folder)
            except PictureError as error:
                say(f"chart {figure.name}: not drawn: {error}")
                drawings[figure.name] = f'<p class="note">This chart could not be drawn: {escape(str(error))}.</p>'
            bar.update(1)
    return drawings


def _drawing_of(figure: Figure, folder: Path) -> str:
    wide = figure.draw(WIDE)
    try:
        save_chart(wide, folder / figure.name, 2.0 if figure.panels <= FOLDED else 1.4)
    except PictureError as error:
        if not (folder / f"{figure.name}.svg").is_file():
            raise
        say(f"chart {figure.name}: written without {figure.name}.png: {error}")
    svg = folder / f"{figure.name}.svg"
    both = {"wide": svg.read_text(encoding="utf-8"), "narrow": svg_of(figure.draw(NARROW).to_dict(validate=False))}
    told = f"{figure.title}. {figure.caption}"
    return "".join(f'<div class="{kind}">{inline_svg(text, f"{figure.name}-{kind}", told)}</div>' for kind, text in both.items())


def dark_rules() -> str:
    """Rules that turn the drawings' colours into those of a dark page."""
    rules = []
    for light, dark in DARK.items():
        for name in ("fill", "stroke"):
            rules.append(f'.drawing [{name}="{light}" i]{{{name}:{dark}}}')
    swatches = [f'.swatch[data-colour="{light}"]{{background-color:{dark}!important}}' for light, dark in DARK.items()]
    return "@media (prefers-color-scheme: dark){" + "".join(rules + swatches) + "}\n"
