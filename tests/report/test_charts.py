"""The chart of win rate against √KL: files that are what they say, with the data in them."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from isdaa.report.charts import PALETTE, save_chart, win_rate_chart


def run(method: str, beta: float | None = 0.01, seed: int | None = 1) -> list[dict]:
    rates = (0.61, 0.7, 0.55, 0.43) if method == "dpo" else (0.6, 0.68, 0.71, 0.72)
    divergences = (0.25, 1.0, 4.0, 9.0) if method == "dpo" else (0.16, 0.49, 0.81, 1.21)
    return [
        {
            "method": method, "beta": beta, "seed": seed, "step": 30 * (i + 1), "kl": kl,
            "win_rate": rate, "low": rate - 0.05, "high": rate + 0.05, "label": "not used",
        }
        for i, (kl, rate) in enumerate(zip(divergences, rates, strict=True))
    ]  # fmt: skip


def layers(chart) -> list[dict]:
    return chart.to_dict()["layer"]


def values(chart) -> list[dict]:
    return [row for layer in layers(chart) for row in layer["data"].get("values", [])]


def test_png_and_svg_are_written_with_the_data_in_them(tmp_path):
    png, svg = save_chart(win_rate_chart(run("dpo") + run("is_dpo")), tmp_path / "folder" / "kl")
    assert (png.name, svg.name) == ("kl.png", "kl.svg")
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data.rstrip(b"\x00").endswith(b"IEND\xaeB`\x82")
    assert int.from_bytes(data[16:20], "big") > 1000  # width in pixels at scale 2
    root = ElementTree.fromstring(svg.read_text())
    words = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]
    text = re.sub(r"\s+", " ", " ".join(words))
    for expected in ("dpo 0.43", "is_dpo 0.72", "√KL from the reference", "Win rate against the reference", "95 %"):
        assert expected in text
    drawing = svg.read_text()
    for colour in PALETTE[:2]:
        assert colour.lower() in drawing.lower()
    # Each checkpoint's place is told to screen readers too.
    for record in run("dpo"):
        assert f"{math.sqrt(record['kl']):g}" in drawing and f"{record['win_rate']:g}" in drawing
    assert not list((tmp_path / "folder").glob(".*"))


def test_lines_start_at_the_reference_and_follow_training():
    shuffled = [run("dpo")[i] for i in (2, 0, 3, 1)]
    lines = [layer for layer in layers(win_rate_chart(shuffled)) if layer["mark"]["type"] == "line"]
    rows = sorted(lines[0]["data"]["values"], key=lambda row: row["order"])
    assert [row["step"] for row in rows] == [0, 30, 60, 90, 120]
    assert (rows[0]["root_kl"], rows[0]["win_rate"]) == (0.0, 0.5)
    assert [row["last"] for row in rows] == [False, False, False, False, True]
    assert not any(row["root_kl"] == 0 for row in values(win_rate_chart(run("dpo"), start=None)))


def test_arrows_turn_along_the_line():
    """Upwards and to the right at first, then downwards: 0° is up, clockwise."""
    arrows = [row for row in values(win_rate_chart(run("dpo"))) if "angle" in row]
    assert 0 < arrows[0]["angle"] < 90 and 90 < arrows[-1]["angle"] < 180


def test_several_betas_have_panels_and_several_seeds_lines():
    chart = win_rate_chart([r for beta in (0.1, 0.01) for seed in (1, 2, 3) for r in run("dpo", beta, seed)])
    panels = chart.to_dict()["hconcat"]
    assert [panel["title"]["text"] for panel in panels] == ["β = 0.01", "β = 0.1"]
    lines = [layer for layer in panels[0]["layer"] if layer["mark"]["type"] == "line"]
    assert len({row["path"] for row in lines[0]["data"]["values"]}) == 3
    assert "each line is a seed" in json.dumps(chart.to_dict(), ensure_ascii=False)


def test_labels_do_not_cover_each_other():
    """Eight methods that end at the same place."""
    records = [dict(r, method=f"method_{i}") for i in range(8) for r in run("is_dpo")]
    chart = win_rate_chart(records, height=360)
    encoding = next(layer for layer in layers(chart) if layer["mark"]["type"] == "line")["encoding"]
    low, high = encoding["y"]["scale"]["domain"]
    left, right = encoding["x"]["scale"]["domain"]
    labels = {
        row["text"]: (row["root_kl"], row["win_rate"]) for row in values(chart) if str(row.get("text")).startswith("method")
    }
    assert len(labels) == 8
    places = [((x - left) / (right - left) * 560, (high - y) / (high - low) * 360) for x, y in labels.values()]
    for i, (x, y) in enumerate(places):
        assert -20 <= y <= 380
        assert all(abs(x - a) > 100 or abs(y - b) > 11 for a, b in places[:i])


def test_sparse_records():
    with pytest.raises(ValueError, match="no record"):
        win_rate_chart([{"method": "dpo", "kl": None, "win_rate": 0.5}])
    only = [{"method": None, "beta": None, "seed": None, "step": None, "kl": -1e-9, "win_rate": 0.6, "low": None, "high": None}]
    win_rate_chart(only).to_dict()
