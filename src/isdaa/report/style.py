"""The look that all charts share, and how a chart becomes PNG, SVG, or a drawing inside a page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isdaa.files import write_atomically

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


def configured(chart: Any, font_size: int = 12) -> Any:
    """The chart with the house's fonts, axes and legends."""
    return (
        chart.properties(background=PAPER, padding=6)
        .configure(font=FONT)
        .configure_view(stroke=None)
        .configure_title(anchor="start", fontSize=font_size + 1, fontWeight="bold", color=INK, offset=8)
        .configure_axis(
            gridColor=GRID, domainColor=AXIS, tickColor=AXIS, labelColor=MUTED, titleColor=INK, labelFontSize=font_size,
            titleFontSize=font_size, titleFontWeight="normal", titlePadding=8, labelLimit=0, titleLimit=0,
        )
        .configure_legend(
            title=None, labelFontSize=font_size, labelColor=INK, labelLimit=0, symbolLimit=0, orient="top",
            direction="horizontal",
            offset=6, padding=0, symbolType="stroke", symbolStrokeWidth=3, columnPadding=12, rowPadding=3,
        )
    )  # fmt: skip


def layer(values: list[dict[str, Any]], mark: Mapping[str, Any], **encoding: Any) -> Any:
    """One layer of a chart: rows, a mark with its looks, and what its channels show."""
    import altair as alt

    data = alt.Data(values=values)
    # Altair copies a chart whenever something is added to it; copying the rows each time would take most of the drawing.
    object.__setattr__(data, "__deepcopy__", lambda _: data)
    return alt.Chart(data, mark=alt.MarkDef(**mark)).encode(**encoding)


def legend_columns(labels: Sequence[str], width: int) -> int:
    """How many legend entries stand beside each other in `width` pixels."""
    longest = max(map(len, labels), default=1) * LETTER + 32
    return max(1, min(len(labels), int(width / longest)))


def save_chart(chart: alt.TopLevelMixin, path: str | Path, scale: float = 2.0) -> list[Path]:
    """Write `path` with the suffixes .png (at `scale`) and .svg, each atomically; returns both paths."""
    specification = chart.to_dict(validate=False)
    written = []
    for suffix, content in ((".png", png_of(specification, scale)), (".svg", svg_of(specification))):
        target = Path(path).with_name(Path(path).name + suffix)
        write_atomically(target, content)
        written.append(target)
    return written


def png_of(specification: dict[str, Any], scale: float = 2.0) -> bytes:
    """A Vega-Lite specification as a picture, drawn without a network."""
    import vl_convert

    return bytes(vl_convert.vegalite_to_png(specification, vl_version=_version(specification), scale=scale))


def svg_of(specification: dict[str, Any]) -> str:
    """A Vega-Lite specification as an SVG document."""
    import vl_convert

    return str(vl_convert.vegalite_to_svg(specification, vl_version=_version(specification)))


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
        f'style="max-width:{float(width):g}px" aria-label="{escape(description, quote=True)}">{body}</svg>'
    )
