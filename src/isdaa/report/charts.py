"""Charts of evaluations, drawn offline: one specification gives PNG and SVG.

Input is a list of plain records, one a checkpoint:
`{"method", "beta", "seed", "step", "kl", "win_rate", "low", "high"}`, where all but method, KL and win rate may be
null; further keys are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from isdaa.report.style import FONT, GRID, INK, MUTED, PALETTE, save_chart

if TYPE_CHECKING:
    import altair as alt

__all__ = ["PALETTE", "save_chart", "win_rate_chart"]

Record = Mapping[str, Any]
Domain = tuple[float, float]
Path_ = Sequence[dict[str, Any]]  # the rows of one line, in the order of training

LABEL_HEIGHT, LETTER_WIDTH = 17.0, 7.6  # pixels, at the labels' font size
ARROW = "M0,-1.5L1,1.1L0,0.45L-1,1.1Z"  # pointing up; the built-in triangle has three tips alike


def win_rate_chart(
    records: Sequence[Record],
    *,
    title: str = "Did the run over-optimise?",
    opponent: str = "the reference",
    start: float | None = 0.5,
    confidence: float = 0.95,
    width: int = 560,
    height: int = 360,
) -> alt.TopLevelMixin:
    """Win rate against √KL: one line a (method, seed) through its checkpoints in the order of training, one panel a β.

    start: win rate of the untrained policy, drawn at KL 0 as the common origin of all lines; null: none is drawn.
    Arrowheads point along training, bars are the records' intervals, the ringed dot is the last checkpoint.
    Raises ValueError where no record has both KL and win rate.
    """
    import altair as alt

    usable = [_point(r) for r in records if r.get("kl") is not None and r.get("win_rate") is not None]
    if not usable:
        raise ValueError("no record has both a KL and a win rate")
    seeds = len({(r["method"], r["beta"], r["seed"]) for r in usable}) > len({(r["method"], r["beta"]) for r in usable})
    if seeds:  # bars of many seeds would be a thicket; there the spread of the lines says more
        usable = [r | {"low": None, "high": None} for r in usable]
    methods = list(dict.fromkeys(r["method"] for r in usable))
    colours = {method: PALETTE[i % len(PALETTE)] for i, method in enumerate(methods)}
    betas = sorted({r["beta"] for r in usable}, key=lambda beta: (beta is None, beta))
    width = width if len(betas) == 1 else max(300, round(width * 0.62))
    domains = _domains(usable, start, methods, width)
    panels = []
    for index, beta in enumerate(betas):
        inside = [r for r in usable if r["beta"] == beta]
        panel = _panel(inside, colours, domains, start, opponent, width, height, first=index == 0)
        if len(betas) > 1:
            text = "β not known" if beta is None else f"β = {beta:g}"
            panel = panel.properties(title=alt.TitleParams(text, anchor="start", fontSize=13, color=INK, offset=8))
        panels.append(panel)
    chart = panels[0] if len(panels) == 1 else alt.hconcat(*panels, spacing=28)
    spread = "each line is a seed." if seeds else f"bars are {confidence * 100:g} % intervals over prompts."
    subtitle = [
        f"Win rate against {opponent} as the policy moves away from where it started. Each dot is a checkpoint,",
        f"arrows point along training, the ringed dot is the last one; {spread}",
    ]
    header = alt.TitleParams(
        title, subtitle=subtitle, anchor="start", fontSize=18, fontWeight="bold", color=INK, offset=18,
        subtitleFontSize=12, subtitleColor=MUTED, subtitlePadding=6, subtitleLineHeight=16,
    )  # fmt: skip
    return (
        chart.properties(title=header, background="white", padding={"left": 14, "right": 18, "top": 14, "bottom": 12})
        .configure(font=FONT)
        .configure_view(stroke=None)
        .configure_axis(
            grid=True, gridColor=GRID, domainColor="#BBBBBB", tickColor="#BBBBBB", labelColor=MUTED, titleColor=INK,
            labelFontSize=12, titleFontSize=13, titleFontWeight="normal", titlePadding=10,
        )
    )  # fmt: skip


def _point(record: Record) -> dict[str, Any]:
    point = {key: record.get(key) for key in ("method", "beta", "seed", "step", "win_rate", "low", "high")}
    point["method"] = str(point["method"] if point["method"] is not None else "model")
    # A Rao–Blackwell estimate is never negative, a Monte-Carlo one may be.
    return point | {"kl": record["kl"], "root_kl": math.sqrt(max(0.0, float(record["kl"])))}


def _domains(points: Sequence[Record], start: float | None, methods: Sequence[str], width: int) -> tuple[Domain, Domain]:
    """Axis ranges, with room on the right for the labels of the last checkpoints."""
    right = max(r["root_kl"] for r in points) or 1.0
    room = min(0.45, (7.5 * (max(map(len, methods)) + 6) + 16) / width)
    values = [v for r in points for v in (r["win_rate"], r["low"], r["high"]) if v is not None]
    values += [start] if start is not None else []
    low, high = min(values), max(values)
    margin = max(0.03, 0.06 * (high - low))
    x_high = right / (1 - room)
    return (-0.022 * x_high, x_high), (max(0.0, low - margin), min(1.0, high + margin))


def _ticks(high: float) -> list[float]:
    """Round numbers from 0 on, at most eight: the axis begins left of 0, so that the origin's dot hides no label."""
    step = next(s for e in range(-4, 5) for s in (10.0**e, 2 * 10.0**e, 5 * 10.0**e) if high / s <= 8)
    return [round(i * step, 6) for i in range(int(high / step) + 1)]


def _panel(
    points: list[dict[str, Any]],
    colours: Mapping[str, str],
    domains: tuple[Domain, Domain],
    start: float | None,
    opponent: str,
    width: int,
    height: int,
    first: bool,
) -> Any:
    import altair as alt

    (x_low, x_high), (y_low, y_high) = domains
    x_axis = alt.Axis(title="√KL from the reference  (√nats)", values=_ticks(x_high), grid=False)
    y_axis = alt.Axis(
        title=f"Win rate against {opponent}" if first else None, tickCount=6, format=".2f", domain=False, ticks=False
    )
    x = alt.X("root_kl:Q", scale=alt.Scale(domain=[x_low, x_high], nice=False), axis=x_axis)
    y = alt.Y("win_rate:Q", scale=alt.Scale(domain=[y_low, y_high], nice=False), axis=y_axis)
    names = sorted({r["method"] for r in points}, key=list(colours).index)
    colour = alt.Color("method:N", scale=alt.Scale(domain=names, range=[colours[n] for n in names]), legend=None)

    paths = _paths(points, start)
    rows = [row for path in paths for row in path]
    trained = [row for row in rows if not row["origin"]]
    many = len(paths) > len(names)
    bars = [row for row in trained if row["low"] is not None and row["high"] is not None]
    arrows = _arrows(paths, domains, width, height)
    labels = _labels(paths, domains, width, height)

    layers: list[Any] = []

    def draw(values: list[dict[str, Any]], mark: dict[str, Any], **encoding: Any) -> None:
        """One layer: rows, a mark with its looks, and what depends on the rows beside their place and colour."""
        if values:
            chart = alt.Chart(alt.Data(values=values), mark=alt.MarkDef(**mark))
            layers.append(chart.encode(**{"x": x, "y": y, "color": colour} | encoding))

    if start is not None:
        rule: dict[str, Any] = {"type": "rule", "color": "#9A9A9A", "strokeDash": [4, 4], "strokeWidth": 1}
        layers.append(alt.Chart(alt.Data(values=[{"win_rate": start}]), mark=alt.MarkDef(**rule)).encode(y=y))
        note = {"type": "text", "align": "right", "dy": -7, "dx": -2, "color": MUTED, "fontSize": 11}
        words = {"win_rate": start, "root_kl": x_high, "text": "the reference itself"}
        draw([words], note, text="text:N", color=alt.value(MUTED))
    low = alt.Y("low:Q", title=y_axis.title)
    draw(bars, {"type": "rule", "strokeWidth": 2, "opacity": 0.32}, y=low, y2=alt.Y2("high:Q"))
    line = {"type": "line", "strokeWidth": 1.5 if many else 2.2, "opacity": 0.6 if many else 0.9, "strokeJoin": "round"}
    draw(rows, line, detail="path:N", order="order:Q")
    head = {"type": "point", "shape": ARROW, "filled": True, "size": 42, "opacity": 1}
    draw(arrows, head, angle=alt.Angle("angle:Q", scale=alt.Scale(domain=[0, 360], range=[0, 360])))
    draw([r for r in trained if not r["last"]], {"type": "circle", "size": 30 if many else 46, "opacity": 1})
    if start is not None:
        ring = {"type": "point", "filled": True, "size": 75, "stroke": INK, "strokeWidth": 1.6, "opacity": 1}
        draw([{"root_kl": 0.0, "win_rate": start}], ring, color=alt.value("white"))
    last = [r for r in trained if r["last"]]
    draw(last, {"type": "point", "filled": False, "size": 190, "strokeWidth": 2, "fill": "white", "opacity": 1})
    draw(last, {"type": "circle", "size": 62, "opacity": 1})
    letters = {"type": "text", "align": "left", "baseline": "middle", "fontSize": 13, "fontWeight": "bold"}
    draw(labels, letters | {"stroke": "white", "strokeWidth": 4, "strokeJoin": "round"}, text="text:N")  # a halo
    draw(labels, letters, text="text:N")
    return alt.layer(*layers).properties(width=width, height=height)


def _paths(points: Sequence[Mapping[str, Any]], start: float | None) -> list[list[dict[str, Any]]]:
    """Lines in the order of training, each from the common origin."""
    groups: dict[tuple[str, Any], list[Mapping[str, Any]]] = {}
    for point in points:
        groups.setdefault((point["method"], point["seed"]), []).append(point)
    paths = []
    for index, ((method, _), group) in enumerate(groups.items()):
        group = sorted(group, key=lambda r: (r["step"] is None, r["step"] or 0))
        rows = [{**r, "origin": False, "last": r is group[-1]} for r in group]
        if start is not None:
            origin = {
                "method": method,
                "root_kl": 0.0,
                "kl": 0.0,
                "win_rate": start,
                "step": 0,
                "low": None,
                "high": None,
            }
            rows.insert(0, {**origin, "origin": True, "last": False})
        paths.append([{**row, "path": f"{method} {index}", "order": order} for order, row in enumerate(rows)])
    return paths


def _pixels(row: Mapping[str, Any], domains: tuple[Domain, Domain], width: int, height: int) -> tuple[float, float]:
    (x_low, x_high), (y_low, y_high) = domains
    x = (row["root_kl"] - x_low) / (x_high - x_low) * width
    return x, (y_high - row["win_rate"]) / (y_high - y_low) * height


def _arrows(paths: Sequence[Path_], domains: tuple[Domain, Domain], width: int, height: int) -> list[dict[str, Any]]:
    """Arrowheads at the middle of the segments that are long enough to carry one, turned along the line."""
    found = []
    for path in paths:
        for before, after in pairwise(path):
            (x0, y0), (x1, y1) = _pixels(before, domains, width, height), _pixels(after, domains, width, height)
            if math.hypot(x1 - x0, y1 - y0) < 34:
                continue
            found.append(
                {
                    "method": after["method"],
                    "root_kl": (before["root_kl"] + after["root_kl"]) / 2,
                    "win_rate": (before["win_rate"] + after["win_rate"]) / 2,
                    # The triangle points up; angles run clockwise, pixels downwards.
                    "angle": math.degrees(math.atan2(x1 - x0, y0 - y1)) % 360,
                }
            )
    return found


def _labels(paths: Sequence[Path_], domains: tuple[Domain, Domain], width: int, height: int) -> list[dict[str, Any]]:
    """One label a method beside its last checkpoint, at the place around it that covers the least of the drawing.

    Where a method has several seeds, the label says their mean and stands at the outermost.
    """
    taken = [point for path in paths for point in _trace(path, domains, width, height)]
    taken += [(width - 110 + 10 * i, _pixels(path[0], domains, width, height)[1] - 8) for path in paths[:1] for i in range(12)]
    for path in paths:  # the ringed dots are what the picture is about
        x, y = _pixels(path[-1], domains, width, height)
        taken += [(x + i, y + j) for i in (-7, 0, 7) for j in (-7, 0, 7)] * 4
    lasts: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        lasts.setdefault(path[-1]["method"], []).append(path[-1])
    labels = []
    boxes: list[tuple[float, float, float, float]] = []
    for method, ends in lasts.items():
        end = max(ends, key=lambda row: row["root_kl"])
        mean = sum(row["win_rate"] for row in ends) / len(ends)
        text = f"{method}  {mean:.2f}"
        x, y = _pixels(end, domains, width, height)
        long = LETTER_WIDTH * len(text)
        costs = []
        for rank, (dx, dy) in enumerate(_places(long)):
            box = (x + dx - 3, x + dx + long + 3, y + dy - LABEL_HEIGHT / 2, y + dy + LABEL_HEIGHT / 2)
            outside = box[0] < 0 or box[1] > width + 15 or box[2] < 0 or box[3] > height
            covered = sum(box[0] < a < box[1] and box[2] < b < box[3] for a, b in taken)
            # Letters over letters cannot be read, over a line they can.
            clashes = sum(box[0] < b[1] and b[0] < box[1] and box[2] < b[3] and b[2] < box[3] for b in boxes)
            costs.append((covered + 0.5 * rank + 1000 * clashes + 500 * outside, box))
        _, box = min(costs)
        boxes.append(box)
        (x_low, x_high), (y_low, y_high) = domains
        labels.append(
            {
                "method": method,
                "root_kl": x_low + (box[0] + 3) / width * (x_high - x_low),
                "win_rate": y_high - (box[2] + box[3]) / 2 / height * (y_high - y_low),
                "text": text,
            }
        )
    return labels


def _places(long: float) -> list[tuple[float, float]]:
    """Offsets of a label's left middle from its dot, in pixels, the best looking first."""
    near = [(14.0, 0.0), (11.0, -13.0), (11.0, 13.0), (-long / 2, -22.0), (-long / 2, 22.0), (-long - 14, 0.0)]
    return near + [(14.0, sign * step * LABEL_HEIGHT) for step in range(1, 15) for sign in (-1, 1)]


def _trace(path: Path_, domains: tuple[Domain, Domain], width: int, height: int) -> list[tuple[float, float]]:
    """Pixels along a line and its bars, a few apart."""
    trace: list[tuple[float, float]] = []
    for before, after in pairwise(path):
        (x0, y0), (x1, y1) = _pixels(before, domains, width, height), _pixels(after, domains, width, height)
        steps = max(1, int(math.hypot(x1 - x0, y1 - y0) / 4))
        trace += [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)]
    for row in path:
        if row["low"] is not None and row["high"] is not None:
            x, low = _pixels({**row, "win_rate": row["low"]}, domains, width, height)
            _, high = _pixels({**row, "win_rate": row["high"]}, domains, width, height)
            trace += [(x, high + i) for i in range(0, int(low - high), 12)]
    return trace
