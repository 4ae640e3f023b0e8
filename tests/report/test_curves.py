"""Charts of the report: what is drawn, and that the drawing is whole."""

import json
import re

import numpy as np
import pytest
from report_studies import cells, study, sweep, trajectory

from isdaa.evaluation.verdict.comparison import MatchedKl, SeedMean, at_matched_kl, summarise
from isdaa.evaluation.verdict.overoptimization import Law
from isdaa.report.charts.lines import lines_of, panels_of
from isdaa.report.charts.style import PALETTE, inline_svg, legend_columns, save_chart, svg_of
from isdaa.report.charts.training_curves import Quantity, course_chart, thin, weights_of
from isdaa.report.charts.win_rate_curves import final_chart, matched_kl_chart, study_chart

ENDS = {"dpo": (0.731, 0.709), "is_dpo": (0.725, 0.731)}


def test_a_study_has_a_panel_a_beta_with_seeds_behind_their_mean():
    made = sweep(seeds=3)
    chart = study_chart(made).to_dict(validate=True)
    assert [panel["title"] for panel in chart["concat"]] == ["β = 0.01", "β = 0.1"]
    lines = [layer for layer in chart["concat"][0]["layer"] if layer["mark"]["type"] == "line"]
    thin_lines = next(layer for layer in lines if layer["mark"]["strokeWidth"] == 1)
    assert len({row["path"] for row in thin_lines["data"]["values"]}) == 6  # two cells, three seeds
    thick = next(layer for layer in lines if layer["mark"]["strokeWidth"] == 2.3)
    rows = [row for row in thick["data"]["values"] if row["line"] == "dpo"]
    runs = [run for run in made.runs if run.cell == "dpo-beta0.01"]
    assert rows[0]["x"] == 0 and rows[0]["y"] == 0.5
    assert rows[-1]["y"] == pytest.approx(np.mean([run.wins[-1].mean() for run in runs]))
    assert rows[-1]["x"] == pytest.approx(np.mean([run.root_kl[-1] for run in runs]))


def test_only_the_asked_cells_and_their_laws(tmp_path):
    made = sweep(seeds=1)
    law = Law(0.23, 0.15, 1.7, 0.26, 1.5, 2.0)
    chart = study_chart(made, ["dpo-beta0.01"], laws={"dpo-beta0.01": law}, width=356)
    text = json.dumps(chart.to_dict(), ensure_ascii=False)
    assert "is_dpo" not in text and "strokeDash" in text and '"triangle-up"' in text
    for file in save_chart(chart, tmp_path / "one"):
        assert file.stat().st_size > 2000


def test_what_is_drawn_together_has_colours_of_its_own():
    """In a study of many cells colours go by family; a figure of a few of them still tells them apart."""
    runs = [trajectory(method=f"m{i}", name=f"m{i}", cell=f"m{i}", paths=[f"m{i}/{k}" for k in range(8)]) for i in range(12)]
    chart = study_chart(study(runs), ["m0", "m5", "m9"]).to_dict()
    text = json.dumps(chart)
    assert all(colour in text for colour in PALETTE[:3]) and PALETTE[3] not in text


def test_a_figure_of_some_cells_has_the_study_s_labels():
    """A label says what a cell changes in its study, whoever else is drawn."""
    made = cells({"method": "dpo"}, {"method": "is_dpo"}, {"method": "is_dpo", "clip_eps": 0.5}, seeds=(1,))
    chart = study_chart(made, ["methoddpo", "methodis_dpo-clip_eps0.5"]).to_dict()
    assert {row["line"] for layer in chart["layer"] for row in layer["data"]["values"] if "line" in row} == {
        "dpo",
        "is_dpo, ε 0.5",
    }


def test_an_unknown_cell_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r'no cell .dpo-beta=0.01. in this study \(did you mean "dpo-beta0.01"\?\)'):
        study_chart(sweep(seeds=1), ["dpo-beta=0.01"])


def test_the_kept_checkpoint_is_told_by_cell():
    made = sweep(("dpo",), (0.01,), 1)
    diamonds = [x for x in study_chart(made, keep={"dpo-beta0.01": 2}).to_dict()["layer"] if x["mark"].get("shape") == "diamond"]
    assert diamonds[0]["data"]["values"][0]["x"] == pytest.approx(made.runs[0].root_kl[2])


def test_no_win_rates_no_chart():
    with pytest.raises(ValueError, match="no run has win rates"):
        study_chart(study([trajectory(scored=False)]))


def test_final_chart_is_sorted_and_shows_every_seed():
    summaries = summarise(sweep(seeds=3).runs)
    chart = final_chart(summaries).to_dict(validate=True)
    dots = next(layer for layer in chart["layer"] if layer["mark"].get("size") == 26)
    assert len(dots["data"]["values"]) == 12
    order = dots["encoding"]["y"]["sort"]
    assert order == [s.cell for s in sorted(summaries, key=lambda s: -s.final.mean)]


def test_matched_kl_chart():
    matched = at_matched_kl([run for run in sweep(seeds=3).runs if "0.01" in run.cell], "dpo-beta0.01")
    chart = matched_kl_chart(matched).to_dict(validate=True)
    assert {layer["mark"]["type"] for layer in chart["layer"]} == {"area", "line"}


def test_no_two_ticks_carry_the_same_label():
    """Win rates within two hundredths, on an axis whose labels have two digits."""
    means = {cell: [SeedMean(value, None, None, 1, (value,)) for value in ends] for cell, ends in ENDS.items()}
    svg = svg_of(matched_kl_chart(MatchedKl(np.array([1.4, 1.6]), means, {}, "dpo")).to_dict())
    labels = re.findall(r">(0\.\d+)</text>", svg)
    assert len(labels) >= 2 and len(set(labels)) == len(labels)


def test_a_course_has_the_reference_and_skips_what_nobody_measured():
    made = study([trajectory()])
    panels = panels_of(lines_of(made))
    chart = course_chart(
        panels,
        [Quantity("length", "Length", "", ""), Quantity("nothing", "Nothing", "", "")],
        reference=made.metrics["reference"],
    )
    specification = chart.to_dict(validate=True)
    assert specification["layer"][0]["data"]["values"] == [{"y": 18.0}]
    assert course_chart(panels, [Quantity("nothing", "Nothing", "", "")]) is None


def test_weights_are_means_over_seeds():
    runs = [trajectory(seed=seed) for seed in (1, 2)]
    logs = {
        run.name: [{"step": 10, "weights/mean": 0.5 * i, "weights/log_weight_p50": -1.0}, {"step": 11, "loss": 1.0}]
        for i, run in enumerate(runs, start=1)
    }
    assert weights_of(runs, logs) == {"steps": [10], "log_weight_p50": [-1.0], "mean": [0.75]}
    assert weights_of(runs, {}) == {}


def test_long_histories_are_thinned():
    rows = [{"x": i} for i in range(1000)]
    short = thin(rows)
    assert len(short) == 80 and short[0] == rows[0] and short[-1] == rows[-1]


def test_drawings_in_one_page_do_not_meet():
    """Ids of their own, text as it was, no number in a text cut."""
    svg = svg_of(study_chart(study([trajectory()])).to_dict())
    first = inline_svg(svg, "one", 'said "so" & more')
    assert 'id="clip' not in first and "url(#clip" not in first and "url(#one-" in first
    assert 'aria-label="said &quot;so&quot; &amp; more"' in first and first.count("aria-label") == 1
    assert "1.2345" in inline_svg('<svg viewBox="0 0 10 10"><text x="1.23456">1.2345</text></svg>', "two", "")


def test_legends_wrap():
    assert legend_columns(["a" * 20] * 4, 320) == 2 and legend_columns(["a"], 100) == 1
