"""Charts over the course of training: any measured number, and the importance weights of the training batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isdaa.evaluation.checkpoints.trajectory import Trajectory
from isdaa.report.charts.lines import Line, Panel
from isdaa.report.charts.style import MUTED, Drawing, configured, field, frame, layer
from isdaa.report.charts.win_rate_curves import MARGIN, Rows, colour_of, fitting

WEIGHTS = "weights/"
QUANTILES = ("p05", "p25", "p50", "p75", "p95")
STEP, NUMBER = "Training step", "Checkpoint, in the order of training"
POINTS = 80  # of a line through the history


@dataclass(frozen=True)
class Quantity:
    """A number of each checkpoint: where it stands in an entry of `metrics.json`, how its axis is called, how to read it."""

    key: str  # dotted
    title: str
    short: str  # in a heading
    caption: str
    format: str = ".2f"

    @property
    def name(self) -> str:
        """As a part of a file's name."""
        return self.key.rpartition(".")[2].replace("_", "-")

    def of(self, entry: Mapping[str, Any]) -> float | None:
        """Its value in an entry; of an interval, the mean."""
        value: Any = entry
        for part in self.key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping):
            value = value.get("mean")
        return float(value) if isinstance(value, (int, float)) else None


def course_chart(
    panels: Sequence[Panel],
    quantities: Sequence[Quantity],
    *,
    width: int = 980,
    height: int | None = None,
    reference: Mapping[str, Any] | None = None,
    step: str = STEP,
) -> Drawing | None:
    """Numbers of the checkpoints over training steps: one panel a quantity and β, means over seeds with the seeds behind.

    reference: the entry of the reference, drawn as a dashed rule. None where no checkpoint has any of the numbers.
    """
    import altair as alt

    drawn = []
    pairs = [(p, q) for p in panels for q in quantities if has([p], q)]
    if not pairs:
        return None
    columns = (
        fitting(len(pairs), width)
        if len(panels) > 1 or len(quantities) == 1
        else min(len(pairs), fitting(len(quantities), width))
    )
    inner = int(width / columns) - MARGIN
    for panel, quantity in pairs:
        domain = _domain(quantity, panels, reference)
        size = inner, height or (210 if len(pairs) < 3 else 170)
        drawn.append(_course(alt, panel, quantity, size, reference, domain, step, alone=len(panels) == 1))
    return configured(drawn, columns, 12 if width > 500 else 11)


def has(panels: Sequence[Panel], quantity: Quantity) -> bool:
    """Whether any checkpoint of the panels has the quantity."""
    return any(quantity.of(entry) is not None for p in panels for line in p.lines for run in line.runs for entry in run.metrics)


def weights_of(runs: Sequence[Trajectory], histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Step -> means over the runs of every logged weight metric, as columns; empty where none was logged."""
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for run in runs:
        for line in histories.get(run.name, ()):
            if "weights/mean" in line and isinstance(line.get("step"), int):
                by_step.setdefault(line["step"], []).append(line)
    if not by_step:
        return {}
    steps = sorted(by_step)
    names = ["log_weight_mean", *(f"log_weight_{q}" for q in QUANTILES), "clip_fraction", "mean", "max", "ess"]
    found: dict[str, Any] = {"steps": steps}
    for name in names:
        rows = [[line.get(WEIGHTS + name) for line in by_step[step]] for step in steps]
        means = [float(np.mean(known)) if (known := [v for v in row if v is not None]) else None for row in rows]
        if any(value is not None for value in means):
            found[name] = means
    return found


def quantile_chart(
    lines: Sequence[tuple[Line, Mapping[str, Any]]], *, width: int = 980, limits: Mapping[str, float | None] | None = None
) -> Drawing:
    """Log importance weights before the clip, one panel a line: median, middle half and middle nine tenths of the pairs.

    limits: cell -> log weight at which the clip cuts.
    """
    import altair as alt

    columns = fitting(len(lines), width)
    inner = int(width / columns) - MARGIN
    low = min(v for _, w in lines for v in w["log_weight_p05"] if v is not None)
    high = max([v for _, w in lines for v in w["log_weight_p95"] if v is not None] + [0.5])
    drawn = []
    for line, weights in lines:
        rows = thin([dict(zip(("x", *QUANTILES), row, strict=True)) for row in _columns(weights)])
        axis = step_axis(alt, min(row["x"] for row in rows), max(row["x"] for row in rows))
        x = alt.X("x:Q", axis=axis, scale=alt.Scale(nice=False, zero=False))
        scale = alt.Scale(domain=[low, high], nice=True)
        axis = alt.Axis(title="log weight", tickCount=5, domain=False, ticks=False)

        def y(name: str, scale: Any = scale, axis: Any = axis) -> Any:
            return alt.Y(f"{name}:Q", scale=scale, axis=axis)

        colour = alt.value(line.colour)
        area = {"type": "area", "aria": False, "clip": True}
        layers = [
            layer(rows, area | {"opacity": 0.16}, x=x, y=y("p05"), y2=alt.Y2("p95:Q"), color=colour),
            layer(rows, area | {"opacity": 0.28}, x=x, y=y("p25"), y2=alt.Y2("p75:Q"), color=colour),
            layer(rows, {"type": "line", "strokeWidth": 2, "aria": False}, x=x, y=y("p50"), color=colour),
        ]
        limit = (limits or {}).get(line.cell)
        if limit is not None and in_sight(limit, [weights for _, weights in lines]):
            rule = {"type": "rule", "strokeDash": [4, 4], "color": MUTED, "strokeWidth": 1.2}
            layers.append(layer([{"y": limit}], rule, y=y("y")))
        drawn.append(frame(layers, inner, 180, line.title))
    return configured(drawn, columns, 12 if width > 500 else 11)


def in_sight(limit: float, weights: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a clip's log-weight is drawn: not where it lies far above all that was measured."""
    return limit < 1.5 * max([v for columns in weights for v in columns["log_weight_p95"] if v is not None] + [0.5]) + 1


def step_axis(alt: Any, low: float, high: float, title: str = STEP) -> Any:
    """The axis of steps, or of checkpoints by their number: whole numbers alone, some five of them."""
    wide = next(size * 10**power for power in range(12) for size in (1, 2, 5) if size * 10**power * 5.5 >= high - low)
    return alt.Axis(title=title, grid=False, values=list(range(-int(-low // wide) * wide, int(high) + 1, wide)), format=",d")


def weights_chart(panels: Sequence[tuple[str, Sequence[tuple[Line, Mapping[str, Any]]]]], *, width: int = 980) -> Drawing:
    """Clip fraction, mean weight and ESS/N of the training batches: a row of three for each (title, lines)."""
    import altair as alt

    names = logged_weights(panels)
    columns = fitting(len(names), width)
    inner = int(width / columns) - MARGIN
    drawn = []
    for title, lines in panels:
        for key, words in names:
            rows: Rows = []
            for line, weights in lines:
                values = zip(weights["steps"], weights.get(key, []), strict=False)
                rows += thin([{"line": line.label, "x": x, "y": y} for x, y in values if y is not None])
            if not rows:
                continue
            colour = colour_of(alt, [line.label for line, _ in lines], [line.colour for line, _ in lines], inner)
            axis = step_axis(alt, min(row["x"] for row in rows), max(row["x"] for row in rows))
            x = alt.X("x:Q", axis=axis, scale=alt.Scale(nice=False, zero=False))
            y = alt.Y("y:Q", axis=alt.Axis(title=words, tickCount=5, domain=False, ticks=False), scale=alt.Scale(zero=True))
            mark = {"type": "line", "strokeWidth": 2, "aria": False}
            chart = layer(rows, mark, x=x, y=y, color=colour)
            drawn.append(frame([chart], inner, 160, title))
    return configured(drawn, columns, 12 if width > 500 else 11)


def logged_weights(panels: Sequence[tuple[str, Sequence[tuple[Line, Mapping[str, Any]]]]]) -> list[tuple[str, str]]:
    """(key, title) of the weight metrics that some line of the panels has."""
    names = (("mean", "Mean weight"), ("ess", "ESS / N"), ("clip_fraction", "Share of pairs clipped"))
    return [(key, words) for key, words in names if any(key in columns for _, lines in panels for _, columns in lines)]


def thin(rows: Rows, most: int = POINTS) -> Rows:
    """At most `most` rows, evenly spread, first and last kept."""
    if len(rows) <= most:
        return rows
    return [rows[i] for i in sorted({round(i * (len(rows) - 1) / (most - 1)) for i in range(most)})]


def _columns(weights: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    return list(zip(weights["steps"], *(weights[f"log_weight_{q}"] for q in QUANTILES), strict=True))


def _rows(line: Line, quantity: Quantity) -> tuple[Rows, Rows]:
    """(seeds, mean); of one run, the mean is the run."""
    seeds: Rows = []
    columns = []
    for run in line.runs:
        values = [quantity.of(entry) for entry in run.metrics]
        rows = [
            {"line": line.label, "path": run.name, "x": int(s), "y": v}
            for s, v in zip(run.steps, values, strict=False)
            if v is not None
        ]
        seeds += rows
        columns.append(rows)
    alike = len({tuple(row["x"] for row in rows) for rows in columns}) == 1 or len({len(rows) for rows in columns}) == 1
    if not alike or not columns[0]:
        return seeds, []
    mean = [
        {
            "line": line.label,
            "path": line.cell,
            "x": float(np.mean([r["x"] for r in rows])),
            "y": float(np.mean([r["y"] for r in rows])),
        }
        for rows in zip(*columns, strict=True)
    ]
    return (seeds if len(columns) > 1 else []) or mean, mean


def _domain(quantity: Quantity, panels: Sequence[Panel], reference: Mapping[str, Any] | None) -> list[float]:
    values = [
        v for p in panels for line in p.lines for run in line.runs for e in run.metrics if (v := quantity.of(e)) is not None
    ]
    rule = quantity.of(reference) if reference is not None else None
    values += [rule] if rule is not None else []
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05
    least = 0.0 if low >= 0 else low - margin
    return [max(least, low - margin) if low > 0 else low - margin * (low < 0), high + margin]


def _course(
    alt: Any,
    panel: Panel,
    quantity: Quantity,
    size: tuple[int, int],
    reference: Mapping[str, Any] | None,
    domain: list[float],
    step: str,
    alone: bool,
) -> Any:
    width, height = size
    steps = [float(s) for line in panel.lines for run in line.runs for s in run.steps]
    numbered = step != STEP  # checkpoints by their number: they begin at 1, and a lone one stands in the middle
    room = 0.03 * (max(steps) - min(steps)) or 0.5
    ends = [min(steps) - room, max(steps) + room] if numbered else [0.0, max(*steps, 1.0)]
    x = alt.X("x:Q", axis=step_axis(alt, ends[0], ends[1], step), scale=alt.Scale(nice=False, zero=False, domain=ends))
    axis = alt.Axis(title=quantity.title, format=quantity.format, tickCount=5, domain=False, ticks=False)
    y = alt.Y("y:Q", axis=axis, scale=alt.Scale(domain=domain, nice=True, zero=False))
    colour = colour_of(alt, [line.label for line in panel.lines], [line.colour for line in panel.lines], width, alone)
    layers = []
    rule = quantity.of(reference) if reference is not None else None
    if rule is not None:
        mark = {"type": "rule", "strokeDash": [4, 4], "color": MUTED, "strokeWidth": 1, "aria": False}
        layers.append(layer([{"y": rule}], mark, y=y))
    found = [_rows(line, quantity) for line in panel.lines]
    seeds = [row for rows, mean in found for row in rows if rows is not mean]
    means = [row for _, mean in found for row in mean]
    base = {"type": "line", "aria": False}
    if seeds:
        layers.append(layer(seeds, base | {"strokeWidth": 1, "opacity": 0.35}, x=x, y=y, color=colour, detail=field("path:N")))
    if means:
        layers.append(layer(means, base | {"strokeWidth": 2.2}, x=x, y=y, color=colour, detail=field("path:N")))
        layers.append(layer(means, {"type": "circle", "size": 26, "opacity": 1, "aria": False}, x=x, y=y, color=colour))
    return frame(layers, width, height, "" if alone else panel.title)
