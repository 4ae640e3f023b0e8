"""The look that all charts share, and how a chart becomes PNG, SVG, or a drawing inside a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isdaa.errors import shown
from isdaa.files import write_atomically
from isdaa.report.charts.render import painter

if TYPE_CHECKING:
    import altair as alt

# Okabe & Ito 2008, told apart with every common colour blindness; black is left to the axes, yellow too pale for lines.
PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6A51A3", "#7F7F7F")
INK, MUTED, GRID, AXIS, PAPER = "#222222", "#6B6B6B", "#E9E9E9", "#BBBBBB", "#FFFFFF"
FONT = "Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif"
LETTER = 6.3  # pixels, mean width of a letter at 12 px

# What a dark page shows in place of each colour of a drawing: lighter where the light page's colour would sink.
DARK = {
    INK: "#E6E8EB",
    MUTED: "#A3A9B1",
    GRID: "#2C3138",
    AXIS: "#596069",
    PAPER: "#16191D",
    "#D55E00": "#F0813A",
    "#0072B2": "#4FA8E0",
    "#009E73": "#2CC297",
    "#CC79A7": "#DD92BC",
    "#56B4E9": "#8CCFF5",
    "#6A51A3": "#A994E0",
    "#7F7F7F": "#A0A0A0",
}


@dataclass(frozen=True)
class Drawing:
    """A finished Vega-Lite specification. `save_chart` takes it as it takes an Altair chart; `altair` makes it one."""

    specification: dict[str, Any]

    def to_dict(self, validate: bool = True) -> dict[str, Any]:
        """The specification, checked against Vega-Lite's schema if so wanted."""
        if validate:
            self.altair()
        return self.specification

    def altair(self) -> Any:
        """As an Altair chart, to go on working with it."""
        import altair as alt

        return alt.Chart.from_dict(self.specification)


def layer(values: list[dict[str, Any]], mark: dict[str, Any], **encoding: Any) -> dict[str, Any]:
    """One layer of a panel: rows, a mark with its looks, and Altair channels of what it shows.

    Layers, panels and pages of panels are put together as plain data: Altair copies all there is whenever something is added,
    which takes minutes for the charts of a sweep.
    """
    import altair as alt

    shown = {name: channel for name, channel in encoding.items() if channel is not alt.Undefined}
    context = {"data": alt.Data(values=[]), "datasets": {}}
    channels = {name: c if isinstance(c, dict) else c.to_dict(validate=False, context=context) for name, c in shown.items()}
    return {"data": {"values": values}, "mark": mark, "encoding": channels}


def field(name: str) -> dict[str, str]:
    """A channel in Altair's shorthand, `order:Q`, without scale or axis."""
    key, _, kind = name.partition(":")
    return {"field": key, "type": {"Q": "quantitative", "N": "nominal"}[kind]}


def frame(layers: Sequence[dict[str, Any]], width: int, height: Any, title: str = "") -> dict[str, Any]:
    """Layers in one frame of that inner size, with a title where there is one."""
    return {"layer": list(layers), "width": width, "height": height} | ({"title": title} if title else {})


def configured(panels: Sequence[dict[str, Any]], columns: int = 1, font_size: int = 12) -> Drawing:
    """Panels in rows of `columns`, each with its own scales and legend, in the house's fonts and colours."""
    import altair as alt

    body: dict[str, Any] = dict(panels[0])
    if len(panels) > 1:
        independent = {"scale": {"color": "independent", "stroke": "independent"}}
        body = {"concat": list(panels), "columns": columns, "spacing": {"row": 26, "column": 14}, "resolve": independent}
    config = {
        "font": FONT,
        "view": {"stroke": None},
        "title": {"anchor": "start", "fontSize": font_size + 1, "fontWeight": "bold", "color": INK, "offset": 8},
        "axis": {
            "gridColor": GRID, "domainColor": AXIS, "tickColor": AXIS, "labelColor": MUTED, "titleColor": INK, "titlePadding": 8,
            "labelFontSize": font_size, "titleFontSize": font_size, "titleFontWeight": "normal", "labelLimit": 0, "titleLimit": 0,
        },
        "legend": {
            "title": None, "labelFontSize": font_size, "labelColor": INK, "labelLimit": 0, "symbolLimit": 0, "orient": "top",
            "direction": "horizontal", "offset": 6, "padding": 0, "symbolType": "stroke", "symbolStrokeWidth": 3,
            "symbolOpacity": 1, "columnPadding": 12, "rowPadding": 3,
        },
    }  # fmt: skip
    return Drawing({"$schema": alt.SCHEMA_URL, "background": PAPER, "padding": 6, "config": config} | body)


def legend_columns(labels: Sequence[str], width: int) -> int:
    """How many legend entries stand beside each other in `width` pixels."""
    longest = max(map(len, labels), default=1) * LETTER + 32
    return max(1, min(len(labels), int(width / longest)))


def save_chart(chart: alt.TopLevelMixin | Drawing, path: str | Path, scale: float = 2.0) -> list[Path]:
    """Write a chart as .png and .svg, each atomically and without a network.

    Args:
        chart: of this package, or an Altair chart.
        path: without a suffix.
        scale: of the .png.

    Returns:
        Both paths, the .png first.

    Raises:
        PictureError: the chart library cannot draw it; of an earlier chart's files none is left then.
    """
    png, vector = (Path(path).with_name(Path(path).name + suffix) for suffix in (".png", ".svg"))
    for old in (png, vector):
        old.unlink(missing_ok=True)
    svg = svg_of(chart.to_dict(validate=False))
    write_atomically(vector, svg)
    write_atomically(png, painter.png(svg, scale))
    return [png, vector]


def svg_of(specification: dict[str, Any]) -> str:
    """A Vega-Lite specification as an SVG document; control characters in its texts are shown as escapes.

    Raises PictureError where the chart library cannot draw it.
    """
    return painter.svg(_drawable(specification), _version(specification))


def _drawable(value: Any) -> Any:
    """A specification whose texts hold nothing that an SVG cannot: the library would abort on it."""
    if isinstance(value, str):
        return re.sub("[\ufffe\uffff]", lambda found: f"\\u{ord(found.group()):x}", shown(value, lines=True))
    if isinstance(value, dict):
        return {_drawable(key): _drawable(inner) for key, inner in value.items()}
    return [_drawable(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _version(specification: dict[str, Any]) -> str:
    """`6.1` of the specification's schema: the language that altair wrote it in."""
    found = re.search(r"/v(\d+\.\d+)", specification.get("$schema", ""))
    assert found is not None, "altair names the schema of every chart"
    return found.group(1)


def inline_svg(svg: str, name: str, description: str) -> str:
    """An SVG document as an element of a page: ids of its own, as wide as there is room, one spoken description.

    name: letters, digits and hyphens; unlike that of any other drawing of the page.
    """
    found = re.search(r"<svg\b([^>]*)>(.*)</svg>\s*$", svg, re.DOTALL)
    assert found is not None, "vl-convert writes one <svg> element"
    head, body = found.groups()
    box = re.search(r'viewBox="([^"]+)"', head)
    assert box is not None
    width = box.group(1).split()[2]
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    # One description says more than a thousand spoken dots.
    body = re.sub(r' (?:aria-[a-z]+|role)="[^"]*"', "", body)
    # Hundredths of a pixel are enough; what stands between the tags is text, and stays.
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag.group(0)), body)
    return (
        f'<svg class="drawing" xmlns="http://www.w3.org/2000/svg" role="img" viewBox="{box.group(1)}" '
        f'style="max-width:{float(width):g}px" aria-label="{escape(shown(description), quote=True)}">{body}</svg>'
    )
