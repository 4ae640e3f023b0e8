"""The chart of `cost_growth.py`: one panel an axis, time and memory as multiples of the smallest point, log against log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from isdaa.report.charts.style import INK, MUTED, PALETTE, PAPER, Drawing, configured, field, frame, layer

TIME, MEMORY = PALETTE[0], PALETTE[1]
WIDTH, HEIGHT, MARGIN, COLUMNS = 1020, 220, 66, 3
DASHES: dict[str, list[int]] = {"counted": [2, 3], "proportional": [6, 4]}
KEY = (
    ("Time of a step; bars: range over rounds", TIME, None),
    ("Arithmetic that the step needs, counted", TIME, "counted"),
    ("Memory that training adds, at its peak", MEMORY, None),
    ("In proportion: exponent 1", MUTED, "proportional"),
)


def growth_chart(found: Sequence[Mapping[str, Any]]) -> Drawing:
    """All axes in small multiples of one vertical scale, so that steepness can be compared, and a key."""
    import altair as alt

    drawn = [_multiples(axis) for axis in found]
    values = [row[name] for rows in drawn for row in rows for name in ("time", "most", "least", "arithmetic", "memory")]
    domain = [0.9 * min([1.0, *values]), 1.15 * max(values)]
    inner = WIDTH // COLUMNS - MARGIN
    panels = [_panel(alt, axis, rows, domain, inner) for axis, rows in zip(found, drawn, strict=True)]
    return configured([*panels, _key(alt, inner)], min(COLUMNS, len(panels) + 1))


def _multiples(axis: Mapping[str, Any]) -> list[dict[str, float]]:
    points = axis["points"]
    first = points[0]
    return [
        {
            "x": point["x"],
            "time": point["seconds"] / first["seconds"],
            "least": min(point["rounds"]) / first["seconds"],
            "most": max(point["rounds"]) / first["seconds"],
            "arithmetic": point["flops"] / first["flops"],
            "memory": point["above_start"] / first["above_start"],
        }
        for point in points
    ]


def _panel(alt: Any, axis: Mapping[str, Any], rows: list[dict[str, float]], domain: list[float], width: int) -> dict[str, Any]:
    xs = [row["x"] for row in rows]
    low, high = xs[0], xs[-1]
    room = (high / low) ** 0.04
    ticks = [value for value in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if domain[0] <= value <= domain[1]]
    x_axis = alt.Axis(
        title=axis["title"],
        values=xs,
        format="d" if high < 10_000 else ".3~s" if axis["name"] == "vocabulary" else ".2~s",
        grid=False,
        labelOverlap=False,
    )
    y_axis = alt.Axis(title="× the smallest point", values=ticks, format="~g", domain=False, ticks=False)
    x = alt.X("x:Q", scale=alt.Scale(type="log", domain=[low / room, high * room], nice=False), axis=x_axis)
    scale = alt.Scale(type="log", domain=domain, nice=False)

    def y(name: str) -> Any:
        return alt.Y(f"{name}:Q", scale=scale, axis=y_axis)

    end = min(high / low, domain[1])
    proportional = [{"x": low, "y": 1.0}, {"x": low * end, "y": end}]
    plain = {"type": "line", "aria": False, "clip": True}
    dot = {"type": "point", "shape": "circle", "size": 46, "filled": True, "opacity": 1, "stroke": PAPER, "strokeWidth": 1}
    layers = [
        layer(proportional, plain | {"strokeDash": DASHES["proportional"], "color": MUTED, "strokeWidth": 1}, x=x, y=y("y")),
        layer(rows, plain | {"strokeDash": DASHES["counted"], "color": TIME, "strokeWidth": 1.6}, x=x, y=y("arithmetic")),
        layer(rows, plain | {"color": MEMORY, "strokeWidth": 2}, x=x, y=y("memory")),
        layer(rows, plain | {"color": TIME, "strokeWidth": 2}, x=x, y=y("time")),
        layer(rows, {"type": "rule", "color": TIME, "strokeWidth": 3, "opacity": 0.4}, x=x, y=y("least"), y2=alt.Y2("most:Q")),
        layer(rows, dot | {"color": MEMORY}, x=x, y=y("memory")),
        layer(rows, dot | {"color": TIME}, x=x, y=y("time")),
    ]
    return frame(layers, width, HEIGHT) | {"title": _title(axis)}


def _title(axis: Mapping[str, Any]) -> dict[str, Any]:
    time, memory = axis["time"], axis["memory"]
    lines = [
        f"{what}: exponent {found['whole']['exponent']:.2f}, upper half {found['upper']['exponent']:.2f}"
        for what, found in (("Time", time), ("Memory", memory))
    ]
    return {"text": axis["heading"], "subtitle": lines, "subtitleColor": INK, "subtitleFontSize": 12, "subtitlePadding": 4}


def _key(alt: Any, width: int) -> dict[str, Any]:
    """Where a sixth panel would be: what each line is."""
    rows = [
        {"y": -number, "x": 0, "end": 0.12, "word": 0.15, "text": text, "colour": colour, "dash": dash or "solid"}
        for number, (text, colour, dash) in enumerate(KEY)
    ]
    x_scale, y_scale = alt.Scale(domain=[0, 1], nice=False), alt.Scale(domain=[-HEIGHT / 30, 0.8], nice=False)
    y = alt.Y("y:Q", scale=y_scale, axis=None)
    colour = alt.Color("colour:N", scale=None)
    layers = []
    for row in rows:
        dash = DASHES.get(str(row["dash"]), [1, 0])
        rule = {"type": "rule", "strokeWidth": 2, "strokeDash": dash, "aria": False}
        layers.append(layer([row], rule, x=alt.X("x:Q", scale=x_scale, axis=None), x2=alt.X2("end:Q"), y=y, color=colour))
    text = {"type": "text", "align": "left", "baseline": "middle", "fontSize": 12, "color": INK, "clip": False}
    layers.append(layer(rows, text, x=alt.X("word:Q", scale=x_scale, axis=None), y=y, text=field("text:N")))
    return frame(layers, width, HEIGHT)
