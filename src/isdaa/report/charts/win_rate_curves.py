"""Charts of win rates: against √KL, at matched KL, and at the end of training. They serve the page and the README alike.

Every function takes the total width in pixels, so that one chart can be drawn for a wide page and for a narrow one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isdaa.errors import nearest
from isdaa.evaluation.checkpoints.trajectory import Study, Trajectory
from isdaa.evaluation.verdict.comparison import CellSummary, MatchedKl
from isdaa.evaluation.verdict.overoptimization import Law
from isdaa.report.charts.lines import Line, Panel, coloured, lines_of, panels_of
from isdaa.report.charts.style import INK, LETTER, MUTED, PALETTE, PAPER, Drawing, configured, field, frame, layer, legend_columns

Rows = list[dict[str, Any]]
Domain = tuple[float, float]
LAWS = 4  # fitted laws in one panel; more would hide the measurements
MARGIN = 62  # pixels beside a panel, taken by the labels and the title of its axis
X_TITLE = "√KL from the reference (√nats)"


def study_chart(
    study: Study,
    cells: Sequence[str] | None = None,
    *,
    width: int = 980,
    columns: int | None = None,
    laws: Mapping[str, Law | None] | None = None,
    height: int | None = None,
    keep: Mapping[str, int] | None = None,
) -> Drawing:
    """Win rate against √KL, one panel a β: the mean over seeds of each cell, every seed as a thin line behind it.

    Args:
        study: of `isdaa.evaluation.read_study`.
        cells: names of the cells to draw, all by default; labels are those of the whole study.
        width: pixels, of all panels together.
        columns: panels in a row; None: as many as fit.
        laws: cell -> fitted law, drawn dashed with the interval of its peak at the foot of the panel, where it has one.
        height: pixels, of a panel.
        keep: cell -> index of its recommended checkpoint, drawn as a diamond where the cell has one seed.

    Returns:
        A chart for `save_chart`; `altair()` makes it an Altair chart.

    Raises:
        ValueError: a name that is no cell's, or no win rates.
    """
    lines = lines_of(study)
    if cells is not None:
        known = [line.cell for line in lines]
        for name in cells:
            if name not in known:
                raise ValueError(f"no cell {name!r} in this study{nearest(name, known)}")
        lines = [line for line in lines if line.cell in cells]
    lines = coloured(lines, [panel.lines for panel in panels_of(lines)])
    return panels_chart(panels_of(lines), width=width, columns=columns, laws=laws, height=height, keep=keep, named=len(lines) > 1)


def panels_chart(
    panels: Sequence[Panel],
    *,
    width: int = 980,
    columns: int | None = None,
    laws: Mapping[str, Law | None] | None = None,
    height: int | None = None,
    keep: Mapping[str, int] | None = None,
    named: bool = True,
) -> Drawing:
    """`study_chart` of panels that are already made. named: whether even a single line has its name above it."""

    panels = [Panel(p.title, [line for line in p.lines if _runs(line)]) for p in panels]
    panels = [panel for panel in panels if panel.lines]
    if not panels:
        raise ValueError("no run has win rates")
    columns = columns or fitting(len(panels), width)
    inner = int(width / columns) - MARGIN
    height = height or (360 if len(panels) == 1 else 240)
    y = _range([v for p in panels for line in p.lines for run in _runs(line) for v in _extent(run)])
    drawn = []
    for panel in panels:
        same = [line for p in panels for line in p.lines if p.beta == panel.beta]
        right = max(float(run.root_kl.max()) for line in same for run in _runs(line)) or 1.0
        x = (-0.025 * right, 1.04 * right)
        drawn.append(_panel(panel, (x, y), (inner, height), laws or {}, keep or {}, alone=not named))
    return configured(drawn, columns, 12 if width > 500 else 11)


def final_chart(
    summaries: Sequence[CellSummary],
    *,
    width: int = 980,
    titles: Mapping[str, str] | None = None,
    colours: Mapping[str, str] | None = None,
    opponent: str = "the reference",
    start: float | None = 0.5,
) -> Drawing:
    """Win rate of each cell's last checkpoint, best first: mean with interval, a dot a seed, and its best as a hollow square.

    Args:
        summaries: of `isdaa.evaluation.summarise`.
        width: pixels.
        titles: cell -> what it is called; its name by default.
        colours: cell -> colour; the first colour by default.
        opponent: what the win rates are against, for the title.
        start: the reference's own win rate, a dashed line; None: no line.

    Returns:
        A chart for `save_chart`.
    """
    import altair as alt

    titles, colours = titles or {}, colours or {}
    ranked = sorted(summaries, key=lambda s: -s.final.mean)
    names = [titles.get(s.cell, s.cell) for s in ranked]
    means, dots = [], []
    for summary, name in zip(ranked, names, strict=True):
        row = {"cell": name, "colour": colours.get(summary.cell, PALETTE[0])}
        bounds: dict[str, Any] = {"low": within(summary.final.low), "high": within(summary.final.high)}
        means.append(row | {"mean": summary.final.mean} | bounds)
        means[-1]["best"] = summary.best.mean
        dots += [row | {"value": value} for value in summary.final.values]
    values: list[Any] = [v for m in means for v in (m["mean"], m["low"], m["high"], m["best"]) if v is not None]
    domain = _range(values + [d["value"] for d in dots] + ([start] if start is not None else []))
    label = max(map(len, names)) * LETTER + 14
    axis = alt.Axis(title=None, domain=False, ticks=False, labelColor=INK, labelPadding=8, grid=True)
    y = alt.Y("cell:N", sort=names, axis=axis)
    title = f"Win rate against {opponent} at the end of training"

    def x(name: str) -> Any:
        axis = alt.Axis(title=title, format=".2f", tickMinStep=0.01, tickCount=6, grid=False)
        return alt.X(f"{name}:Q", scale=alt.Scale(domain=list(domain), nice=False, zero=False), axis=axis)

    colour = alt.Color("colour:N", scale=None)
    bars = [row for row in means if row["low"] is not None]
    layers = []
    if start is not None:
        layers.append(layer([{"start": start}], {"type": "rule", "color": MUTED, "strokeDash": [4, 4]}, x=x("start")))
    if bars:
        rule = {"type": "rule", "strokeWidth": 3, "opacity": 0.55}
        layers.append(layer(bars, rule, y=y, x=x("low"), x2=alt.X2("high:Q"), color=colour))
    layers.append(layer(dots, {"type": "circle", "size": 26, "opacity": 0.55, "aria": False}, y=y, x=x("value"), color=colour))
    square = {"type": "point", "shape": "square", "size": 62, "filled": False, "strokeWidth": 1.4, "opacity": 0.9}
    layers.append(layer(means, square, y=y, x=x("best"), color=colour))
    mark = {"type": "point", "shape": "circle", "size": 78, "filled": True, "opacity": 1, "stroke": PAPER, "strokeWidth": 1}
    layers.append(layer(means, mark, y=y, x=x("mean"), color=colour))
    inner = max(120, int(width - label - 24))
    chart = frame(layers, inner, {"step": 22})
    return configured([chart], 1, 12 if width > 500 else 11)


def matched_kl_chart(
    matched: MatchedKl,
    *,
    width: int = 560,
    height: int = 280,
    labels: Mapping[str, str] | None = None,
    colours: Mapping[str, str] | None = None,
    opponent: str = "the reference",
    title: str = "",
) -> Drawing:
    """Win rates of cells at the same √KL: mean over seeds as a line, its t-interval as a band.

    Args:
        matched: of `isdaa.evaluation.at_matched_kl`.
        width: pixels.
        height: pixels.
        labels: cell -> what it is called.
        colours: cell -> colour.
        opponent: what the win rates are against.
        title: of the chart.

    Returns:
        A chart for `save_chart`.
    """
    return matched_charts(
        [(title, matched)], width=width, height=height, columns=1, labels=labels, colours=colours, opponent=opponent
    )


def matched_charts(
    matched: Sequence[tuple[str, MatchedKl]],
    *,
    width: int = 980,
    height: int = 240,
    columns: int | None = None,
    labels: Mapping[str, str] | None = None,
    colours: Mapping[str, str] | None = None,
    opponent: str = "the reference",
) -> Drawing:
    """`matched_kl_chart` of several groups, (title, group) each a panel."""
    import altair as alt

    labels, colours = labels or {}, colours or {}
    columns = columns or fitting(len(matched), width)
    inner = int(width / columns) - MARGIN
    panels = []
    for title, group in matched:
        rows = [
            {"line": labels.get(cell, cell), "x": float(d), "y": m.mean, "low": within(m.low), "high": within(m.high)}
            for cell, means in group.cells.items()
            for d, m in zip(group.root_kl, means, strict=True)
        ]
        names = [labels.get(cell, cell) for cell in group.cells]
        palette = [colours.get(cell, PALETTE[i % len(PALETTE)]) for i, cell in enumerate(group.cells)]
        colour = colour_of(alt, names, palette, inner)
        x = alt.X("x:Q", axis=alt.Axis(title=X_TITLE, grid=False, tickCount=6), scale=alt.Scale(nice=False, zero=False))
        y = alt.Y("y:Q", scale=alt.Scale(zero=False), axis=win_axis(alt, opponent))
        layers = [layer(rows, {"type": "line", "strokeWidth": 2.4, "aria": False}, x=x, y=y, color=colour)]
        bands = [row for row in rows if row["low"] is not None]
        if bands:
            low = alt.Y("low:Q", scale=alt.Scale(zero=False), axis=win_axis(alt, opponent))
            area = {"type": "area", "opacity": 0.17, "aria": False}
            layers.insert(0, layer(bands, area, x=x, y=low, y2=alt.Y2("high:Q"), color=colour))
        panels.append(frame(layers, inner, height, title))
    return configured(panels, columns, 12 if width > 500 else 11)


def within(bound: float | None) -> float | None:
    """A bound of a win rate: a t-interval knows nothing of the ends of the scale."""
    return None if bound is None else min(max(bound, 0.0), 1.0)


def fitting(panels: int, width: int) -> int:
    """Columns for so many panels in `width` pixels: at most three, and rows as even as can be."""
    most = max(1, min(3, panels, int(width / 290)))
    return 2 if panels == 4 and most == 3 else most


def _name_ends(draw: Any, kept: Mapping[str, Any], last: Mapping[str, Any], pixel: float, alt: Any) -> None:
    """Win rates in words beside the checkpoint to keep and the last one; the lower of two that are close goes below."""
    same = (kept["x"], kept["y"]) == (last["x"], last["y"])
    close = abs(kept["x"] - last["x"]) < 84 * pixel
    words = [(kept, f"keep: {kept['y']:.2f}"), (last, f"last: {last['y']:.2f}")][: 1 if same else 2]
    lower = min(words, key=lambda item: item[0]["y"])[0]
    note = {"type": "text", "align": "center", "baseline": "middle", "fontWeight": "bold", "fontSize": 12, "clip": False}
    for row, text in words:
        place = note | {"dy": 22 if close and not same and row is lower else -22}
        values = [{"x": row["x"], "y": row["y"], "text": text}]
        draw(
            values, place | {"stroke": PAPER, "strokeWidth": 4, "strokeJoin": "round"}, text=field("text:N"), color=alt.Undefined
        )
        draw(values, place | {"color": INK}, text=field("text:N"), color=alt.Undefined)


def colour_of(alt: Any, names: Sequence[str], palette: Sequence[str], width: int, alone: bool = False) -> Any:
    """Colour by line, with the panel's own legend above it; one line needs none where the page says whose it is."""
    legend = alt.Legend(columns=legend_columns(names, width)) if len(names) > 1 or not alone else None
    return alt.Color("line:N", scale=alt.Scale(domain=list(names), range=list(palette)), legend=legend)


def win_axis(alt: Any, opponent: str = "") -> Any:
    """The axis of win rates."""
    title = f"Win rate against {opponent}" if opponent else "Win rate"
    # Ticks closer than their labels can tell would carry the same label twice.
    return alt.Axis(title=title, format=".2f", tickMinStep=0.01, tickCount=5, domain=False, ticks=False)


def mean_path(runs: Sequence[Trajectory]) -> tuple[np.ndarray, np.ndarray] | None:
    """(C,) √KL and win rate, means over seeds checkpoint by checkpoint; None where the seeds' checkpoints differ."""
    if len({run.steps.tobytes() for run in runs}) > 1 and len({len(run.steps) for run in runs}) > 1:
        return None
    wins = [run.wins.mean(axis=1) for run in runs if run.wins is not None]
    return np.mean([run.root_kl for run in runs], axis=0), np.mean(wins, axis=0)


def _runs(line: Line) -> list[Trajectory]:
    return [run for run in line.runs if run.wins is not None]


def _extent(run: Trajectory) -> list[float]:
    assert run.wins is not None
    values = [*run.wins.mean(axis=1).tolist(), *([run.start] if run.start is not None else [])]
    return values + [entry["win_rate"][k] for entry in run.metrics if entry.get("win_rate") for k in ("low", "high")]


def _range(values: Sequence[Any]) -> Domain:
    known = [float(v) for v in values if v is not None]
    low, high = min(known), max(known)
    margin = max(0.02, 0.05 * (high - low))
    return max(0.0, low - margin), min(1.0, high + margin)


def _panel(
    panel: Panel,
    domains: tuple[Domain, Domain],
    size: tuple[int, int],
    laws: Mapping[str, Law | None],
    keep: Mapping[str, int],
    alone: bool,
) -> Any:
    """One panel: seeds thin, means thick, intervals where a line is one run, the origin that all share."""
    import altair as alt

    x = alt.X("x:Q", scale=alt.Scale(domain=list(domains[0]), nice=False), axis=alt.Axis(title=X_TITLE, grid=False, tickCount=6))
    scale = alt.Scale(domain=list(domains[1]), nice=False, zero=False)
    y = alt.Y("y:Q", scale=scale, axis=win_axis(alt))
    colour = colour_of(alt, [line.label for line in panel.lines], [line.colour for line in panel.lines], size[0], alone)
    palette = alt.Scale(domain=[line.label for line in panel.lines], range=[line.colour for line in panel.lines])
    stroke = alt.Stroke("line:N", scale=palette, legend=None)
    layers: list[Any] = []

    def draw(values: Rows, mark: dict[str, Any], **encoding: Any) -> None:
        if values:
            layers.append(layer(values, {"clip": True, "aria": False} | mark, **({"x": x, "y": y, "color": colour} | encoding)))

    start = next((run.start for line in panel.lines for run in _runs(line)), None)
    if start is not None:
        draw(
            [{"y": start}],
            {"type": "rule", "color": MUTED, "strokeDash": [4, 4], "strokeWidth": 1},
            x=alt.Undefined,
            color=alt.Undefined,
        )
    seeds = [row for line in panel.lines if len(_runs(line)) > 1 for row in _seed_rows(line)]
    whole = [row for line in panel.lines for row in _mean_rows(line)]
    draw(seeds, {"type": "line", "strokeWidth": 1, "opacity": 0.38}, detail=field("path:N"), order=field("order:Q"))
    _draw_laws(draw, panel, domains, laws, alt)
    bars = [row for row in whole if row["low"] is not None]
    low = alt.Y("low:Q", scale=scale, axis=win_axis(alt))
    draw(bars, {"type": "rule", "strokeWidth": 2, "opacity": 0.32}, y=low, y2=alt.Y2("high:Q"))
    draw(whole, {"type": "line", "strokeWidth": 2.3, "strokeJoin": "round"}, order=field("order:Q"), detail=field("path:N"))
    draw([r for r in whole if not r["origin"]], {"type": "circle", "size": 30, "opacity": 1})
    last = [r for r in whole if r["last"]]
    draw(
        last,
        {"type": "point", "filled": True, "fill": PAPER, "size": 90, "strokeWidth": 2.4, "opacity": 1, "clip": False},
        stroke=stroke,
    )
    kept = [row for line in panel.lines if len(_runs(line)) == 1 for row in _kept_rows(line, keep)]
    mark = {
        "type": "point",
        "filled": True,
        "shape": "diamond",
        "size": 170,
        "stroke": INK,
        "strokeWidth": 1.4,
        "opacity": 1,
        "clip": False,
    }
    draw(kept, mark)
    if start is not None:
        ring = {"type": "point", "filled": True, "size": 60, "stroke": INK, "strokeWidth": 1.5, "opacity": 1, "clip": False}
        draw([{"x": 0.0, "y": start}], ring, color=alt.value(PAPER))
    if len(panel.lines) == 1 and kept:
        _name_ends(draw, kept[0], last[0], (domains[0][1] - domains[0][0]) / size[0], alt)
    return frame(layers, *size, "" if alone else panel.title)


def _path(line: Line, name: str, x: np.ndarray, y: np.ndarray, start: float | None) -> Rows:
    rows = [
        {"x": float(a), "y": float(b), "origin": False, "last": i == len(x) - 1}
        for i, (a, b) in enumerate(zip(x, y, strict=True))
    ]
    if start is not None:
        rows.insert(0, {"x": 0.0, "y": start, "origin": True, "last": False})
    return [{"line": line.label, "path": name, "order": i, "low": None, "high": None, **row} for i, row in enumerate(rows)]


def _seed_rows(line: Line) -> Rows:
    found = []
    for run in _runs(line):
        assert run.wins is not None
        found += _path(line, f"{line.cell} {run.name}", run.root_kl, run.wins.mean(axis=1), run.start)
    return found


def _mean_rows(line: Line) -> Rows:
    """The line over all its seeds; of a single run with the intervals over prompts."""
    runs = _runs(line)
    path = mean_path(runs)
    if path is None:
        return []
    rows = _path(line, line.cell, *path, runs[0].start)
    if len(runs) == 1 and len(runs[0].metrics) == len(path[0]):
        for row, entry in zip(rows[-len(path[0]) :], runs[0].metrics, strict=True):
            row |= {key: (entry.get("win_rate") or {}).get(key) for key in ("low", "high")}
    return rows


def _kept_rows(line: Line, keep: Mapping[str, int]) -> Rows:
    run = _runs(line)[0]
    index = keep.get(line.cell)
    if index is None or run.wins is None:
        return []
    return [{"line": line.label, "x": float(run.root_kl[index]), "y": float(run.wins[index].mean())}]


def laws_of(panel: Panel, laws: Mapping[str, Law | None]) -> list[Line]:
    """The lines whose law is drawn: those of a peak that the checkpoints show; none where they would hide the measurements."""
    fitted = [line for line in panel.lines if (law := laws.get(line.cell)) is not None and law.peak is not None]
    return fitted if len(fitted) <= LAWS else []


def _draw_laws(draw: Any, panel: Panel, domains: tuple[Domain, Domain], laws: Mapping[str, Law | None], alt: Any) -> None:
    """Dashed curves, and at the foot of the panel the interval of each peak."""
    (_, right), (bottom, top) = domains
    for place, line in enumerate(laws_of(panel, laws)):
        law = laws[line.cell]
        assert law is not None and law.peak is not None
        end = max(float(run.root_kl.max()) for run in _runs(line))
        start = _runs(line)[0].start or 0.0
        grid = np.linspace(0.0, min(right, end), 80)
        rows = [{"line": line.label, "x": float(d), "y": start + float(r)} for d, r in zip(grid, law(grid), strict=True)]
        draw(rows, {"type": "line", "strokeDash": [5, 4], "strokeWidth": 1.6, "opacity": 0.85})
        foot = bottom + (0.02 + 0.025 * place) * (top - bottom)
        here = {"line": line.label, "x": law.peak, "y": foot}
        if law.peak_low is not None and law.peak_high is not None:
            bar = here | {"x": min(law.peak_low, right), "end": min(law.peak_high, right)}
            draw([bar], {"type": "rule", "strokeWidth": 3, "opacity": 0.5}, x2=alt.X2("end:Q"))
        draw([here], {"type": "point", "filled": True, "shape": "triangle-up", "size": 60, "opacity": 1})


__all__ = ["final_chart", "matched_charts", "matched_kl_chart", "panels_chart", "study_chart"]
