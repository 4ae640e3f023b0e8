"""Charts of a benchmark's figures: models with their intervals, category by category, and their paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from isdaa.evaluation.benchmarks.outcome import LENGTH_CONTROLLED, gap_between, is_share, name_of, ranked
from isdaa.evaluation.statistics import fewest
from isdaa.report.charts.style import INK, LETTER, MUTED, PALETTE, PAPER, Drawing, configured, frame, layer
from isdaa.report.figures import Figure

NARROW = 500  # pixels; below, labels are cut and letters smaller
LONGEST, LONGEST_WIDE = 24, 44  # letters of a model's name on a narrow drawing, and on a wide one
# The figure that stands beside the headline as a hollow dot: what it was before anything was controlled for.
PLAIN = "win_rate"
LEAST_MARGIN = 0.25  # of a point or a grade: where all that is drawn is one value


def benchmark_figures(metrics: Mapping[str, Any]) -> list[Figure]:
    """The charts that these metrics have something for."""
    headline = metrics["headline"]
    if not headline:
        return []
    level = f"{metrics['confidence'] * 100:g} %"
    share = is_share(headline)
    against = f" against {metrics['opponent']}" if metrics["opponent"] else ""
    hollow = share and headline != PLAIN
    caption = f"Bars are {level} intervals over questions."
    if share:
        caption += " Dashed: even with the opponent."
    if hollow:
        caption += " The hollow dot is the raw win rate, before any control."
    figures = [Figure("models", "result", title_of(metrics) + against, caption, lambda width: models_chart(metrics, width), 1)]
    if len(ranked(metrics)) > 1 and metrics["comparisons"]:
        best = leader(metrics)
        caption = f"Each model minus {best}, on the same questions, with {level} intervals over questions."
        gaps = [gap_between(metrics, best, model["model"]) for model in ranked(metrics)[1:]]
        known = [gap for gap in gaps if gap is not None]
        if all(gap["decided"] >= fewest(metrics["confidence"]) for gap in known):
            caption += " An interval that does not reach zero tells the two apart."
        title = "Difference from the best"
        if known:
            figures.append(Figure("differences", "result", title, caption, lambda width: differences_chart(metrics, width), 1))
    if categories_of(metrics):
        caption = f"Bars are {level} intervals over the questions of a category; over few questions they are rough."
        figures.append(
            Figure("categories", "categories", "By category", caption, lambda width: categories_chart(metrics, width), 1)
        )
    return figures


def title_of(metrics: Mapping[str, Any]) -> str:
    """The headline's name as a title."""
    name = name_of(metrics["headline"], metrics) if metrics["headline"] in (LENGTH_CONTROLLED, "score") else "win rate"
    return name[:1].upper() + name[1:]


def leader(metrics: Mapping[str, Any]) -> str:
    """The best model's name."""
    return str(ranked(metrics)[0]["model"])


def colours_of(metrics: Mapping[str, Any]) -> dict[str, str]:
    """A colour a model, in the order in which they were named."""
    return {model["model"]: PALETTE[place % len(PALETTE)] for place, model in enumerate(metrics["models"])}


def categories_of(metrics: Mapping[str, Any]) -> list[str]:
    """Categories in the order of the questions; none where there is only one."""
    prefix = _prefix(metrics)
    names = dict.fromkeys(
        name.removeprefix(prefix) for model in metrics["models"] for name in model["figures"] if name.startswith(prefix)
    )
    return list(names) if len(names) > 1 else []


def _prefix(metrics: Mapping[str, Any]) -> str:
    return "win_rate/" if is_share(metrics["headline"]) else "category/"


def models_chart(metrics: Mapping[str, Any], width: int) -> Drawing:
    """One row a model, best first."""
    headline, colours = metrics["headline"], colours_of(metrics)
    rows = [row_of(model["model"], model["figures"][headline], colours[model["model"]]) for model in ranked(metrics)]
    share = is_share(headline)
    if share and headline != PLAIN:
        for row, model in zip(rows, ranked(metrics), strict=True):
            row["plain"] = model["figures"][PLAIN]["mean"] if PLAIN in model["figures"] else None
    title = f"{title_of(metrics)} ({'%' if share else '1 to 10'})"
    return dots(rows, width, title, share, even=50.0 if share else None)


def differences_chart(metrics: Mapping[str, Any], width: int) -> Drawing:
    """One row a model but the best: how far behind it is."""
    share, colours = is_share(metrics["headline"]), colours_of(metrics)
    best, *others = [model["model"] for model in ranked(metrics)]
    rows = []
    for name in others:
        gap = gap_between(metrics, name, best)
        if gap is not None:
            rows.append(row_of(name, gap, colours[name]))
    title = f"Difference from {_cut(best, width)} ({'points' if share else 'grades'})"
    return dots(rows, width, title, share, even=0.0, within=None)


def categories_chart(metrics: Mapping[str, Any], width: int) -> Drawing:
    """One band a category, in it one row a model."""
    prefix, colours = _prefix(metrics), colours_of(metrics)
    share = is_share(metrics["headline"])
    several = len(metrics["models"]) > 1
    rows = []
    for category in categories_of(metrics):
        for model in ranked(metrics):
            figure = model["figures"].get(prefix + category)
            if figure is not None:
                rows.append(row_of(category, figure, colours[model["model"]]) | {"model": model["model"]})
    title = f"{'Win rate (%)' if share else 'Mean grade (1 to 10)'}"
    return dots(rows, width, title, share, even=50.0 if share else None, offset=several)


def row_of(name: str, figure: Mapping[str, Any], colour: str) -> dict[str, Any]:
    """What `dots` draws in one row."""
    return {"name": name, "colour": colour, "mean": figure["mean"], "low": figure["low"], "high": figure["high"], "plain": None}


def _cut(name: str, width: int) -> str:
    most = LONGEST_WIDE if width > NARROW else LONGEST
    return name if len(name) <= most else name[: most - 1] + "…"


def dots(
    rows: Sequence[Mapping[str, Any]],
    width: int,
    title: str,
    share: bool,
    even: float | None,
    within: tuple[float, float] | None = (0.0, 100.0),
    offset: bool = False,
    least: float = LEAST_MARGIN,
) -> Drawing:
    """Dots with bars, one row a name; offset: several models stand below each other in a row; least: `axis_domain`'s."""
    import altair as alt

    scale = 100.0 if share else 1.0
    small = width <= NARROW
    drawn = [
        {**row, "name": _cut(row["name"], width)}
        | {key: None if row[key] is None else scale * row[key] for key in ("mean", "low", "high", "plain")}
        for row in rows
    ]
    names = list(dict.fromkeys(row["name"] for row in drawn))
    values = [row[key] for row in drawn for key in ("mean", "low", "high", "plain") if row[key] is not None]
    domain = axis_domain([*values, *([even] if even is not None else [])], within if share else None, least)
    axis = alt.Axis(title=None, domain=False, ticks=False, labelColor=INK, grid=True)
    y = alt.Y("name:N", sort=names, axis=axis)
    models = list(dict.fromkeys(row["model"] for row in drawn)) if offset else []
    shift: dict[str, Any] = {"yOffset": alt.YOffset("model:N", sort=models)} if offset else {}

    def x(name: str) -> Any:
        label = "format(datum.value, '~g')" if even != 0.0 else "(datum.value > 0 ? '+' : '') + format(datum.value, '~g')"
        axis = alt.Axis(title=title, labelExpr=label, tickCount=5 if small else 8, grid=False)
        return alt.X(f"{name}:Q", scale=alt.Scale(domain=domain, nice=False, zero=False), axis=axis)

    colour = alt.Color("colour:N", scale=None)
    layers = []
    if even is not None:
        layers.append(layer([{"even": even}], {"type": "rule", "color": MUTED, "strokeDash": [4, 4]}, x=x("even")))
    bars = [row for row in drawn if row["low"] is not None]
    if bars:
        rule = {"type": "rule", "strokeWidth": 3, "opacity": 0.55}
        layers.append(layer(bars, rule, y=y, x=x("low"), x2=alt.X2("high:Q"), color=colour, **shift))
    hollow = [row for row in drawn if row["plain"] is not None]
    if hollow:
        ring = {"type": "point", "shape": "circle", "size": 60, "filled": False, "strokeWidth": 1.5, "opacity": 0.9}
        layers.append(layer(hollow, ring, y=y, x=x("plain"), color=colour, **shift))
    dot = {"type": "point", "shape": "circle", "size": 84, "filled": True, "opacity": 1, "stroke": PAPER, "strokeWidth": 1}
    layers.append(layer(drawn, dot, y=y, x=x("mean"), color=colour, **shift))
    inner = max(120, int(width - max(map(len, names)) * LETTER - 40))
    step = (
        {"step": max(14, 30 - 4 * len(models)), "for": "position"}
        if not offset
        else {"step": 12 * len(models) + 14, "for": "position"}
    )
    return configured([frame(layers, inner, step)], 1, 11 if small else 12)


def axis_domain(values: Sequence[float], within: tuple[float, float] | None, least: float = LEAST_MARGIN) -> list[float]:
    """A little more than what is drawn, by `least` at least, and no more than there can be."""
    low, high = min(values), max(values)
    margin = max(0.06 * (high - low), 0.02 * abs(high), least)
    if within is None:
        return [low - margin, high + margin]
    return [max(low - margin, within[0] - 0.5), min(high + margin, within[1] + 0.5)]
