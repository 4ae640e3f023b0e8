"""How cost grows: exponents of exact power laws are found, axes vary one thing alone, and a tiny run measures them all."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patience import HANGS

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cost_growth  # noqa: E402
from _growth import Point, along, axes, line, over_rounds, power, upper  # noqa: E402
from _growth_chart import growth_chart  # noqa: E402

pytestmark = pytest.mark.slow  # what measures, not what is measured; `make test-slow` runs it

# ---- exponents ----


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 0.37, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(exponent: float) -> None:
    xs = [1, 2, 4, 8, 16, 128_256]
    found, error = power(xs, [7.3 * x**exponent for x in xs])
    assert found == pytest.approx(exponent, abs=1e-12)
    assert error == pytest.approx(0, abs=1e-7)


def test_a_constant_beside_a_linear_cost_lowers_the_exponent_and_less_so_in_the_upper_half() -> None:
    xs = [1, 2, 4, 8, 16, 32, 64]
    ys = [10.0 + x for x in xs]
    assert list(upper(xs)) == [8, 16, 32, 64]
    assert list(upper([1, 2, 3, 4])) == [3, 4]
    assert 0 < power(xs, ys)[0] < power(upper(xs), upper(ys))[0] < 1


def test_slope_and_standard_error_are_those_of_least_squares() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=20)
    y = 3 * x + 1 + rng.normal(size=20)
    design = np.stack([x, np.ones(20)], 1)
    solution, (rest,), *_ = np.linalg.lstsq(design, y, rcond=None)
    covariance = rest / 18 * np.linalg.inv(design.T @ design)
    slope, error = line(x.tolist(), y.tolist())
    assert slope == pytest.approx(solution[0])
    assert error == pytest.approx(math.sqrt(covariance[0, 0]))
    assert line([1, 3], [2, 8]) == (3.0, None)


@pytest.mark.parametrize(("xs", "ys"), [([1], [1]), ([2, 2], [1, 3]), ([1, 2, 3], [1, 2]), ([1, 2], [0, 1]), ([-1, 2], [1, 1])])
def test_what_has_no_exponent_is_refused(xs: list[float], ys: list[float]) -> None:
    with pytest.raises(ValueError):
        power(xs, ys)


def test_rounds_of_different_speed_agree_on_the_exponent() -> None:
    xs = [1, 4, 16]
    found = over_rounds(xs, [[speed * x**0.8 for x in xs] for speed in (1.0, 3.0, 0.2)])
    assert [found[name] for name in ("exponent", "low", "high")] == pytest.approx([0.8, 0.8, 0.8])


def test_the_interval_is_students_t_over_rounds() -> None:
    xs = [1, 10]
    found = over_rounds(xs, [[1.0, 10**a] for a in (0.9, 1.0, 1.1)])
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert [found[name] for name in ("exponent", "low", "high")] == pytest.approx([1.0, 1 - half, 1 + half], rel=1e-6)
    assert over_rounds(xs, [[1.0, 10.0]]) == {"exponent": pytest.approx(1.0), "low": None, "high": None}
    assert along(xs, [2.0, 200.0]) == {"exponent": pytest.approx(2.0), "standard_error": None}


# ---- what is measured ----


@pytest.mark.parametrize("tiny", [True, False])
def test_an_axis_varies_one_thing_and_passes_by_the_base(tiny: bool) -> None:
    base = cost_growth.base_point(tiny)
    for name, axis in axes(tiny).items():
        assert list(axis.xs) == sorted(set(axis.xs)) and len(axis.xs) == len(axis.points) >= 3
        for x, point in zip(axis.xs, axis.points, strict=True):
            if name == "vocabulary":
                assert point == replace(base, size=replace(base.size, vocabulary=x))
            elif name == "model":
                assert point == replace(base, size=point.size) and point.body == x
                assert point.size.vocabulary == base.size.vocabulary
            else:
                assert point == replace(base, **{name: x})
        assert axis.points[0].flops < axis.points[-1].flops
    assert base in axes(tiny)["pairs"].points and base in axes(tiny)["vocabulary"].points
    assert base.size in [point.size for point in axes(tiny)["model"].points]


def test_all_pairs_of_a_point_are_exactly_as_long_as_it_says() -> None:
    for axis in axes(tiny=False).values():
        for point in axis.points:
            rows = point.rows(seed=3)
            assert len(rows) == point.pairs
            assert {tuple(map(len, row.values())) for row in rows} == {(point.prompt, point.response, point.response)}
            assert sum(len(ids) for row in rows for ids in row.values()) == point.tokens
    with pytest.raises(AssertionError, match="lengths were cut"):
        Point(prompt=3000).rows(seed=3)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("growth") / "there"
    command = [sys.executable, str(ROOT / "benchmarks" / "cost_growth.py"), "--tiny", "--threads", "1", "--out", str(folder)]
    done = subprocess.run(command, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "about" in done.stderr
    return folder, json.loads((folder / "cost-growth.json").read_text())


def test_a_tiny_run_measures_every_axis(ran: Any) -> None:
    folder, report = ran
    assert report["finished"] and report["machine"]["threads"] == 1
    assert [axis["name"] for axis in report["axes"]] == list(axes(tiny=True))
    for axis in report["axes"]:
        for point in axis["points"]:
            assert len(point["wall"]) == len(point["cpu"]) == report["settings"]["rounds"] == 2
            assert point["rounds"] == point["cpu"]  # one thread
            assert min(point["rounds"]) <= point["seconds"] <= max(point["rounds"])
            assert point["peak"] > point["before"] > 0
            # At least gradients and two moments, in fp32.
            assert point["above_start"] > 0.8 * 12 * point["parameters"] / 2**20
        for part in ("whole", "upper"):
            for cost in ("time", "wall_time", "memory", "memory_in_all"):
                assert math.isfinite(axis[cost][part]["exponent"])
            assert axis["time"][part]["low"] <= axis["time"][part]["exponent"] <= axis["time"][part]["high"]
            assert 0 < axis["arithmetic"][part] < 2
        assert axis["memory"]["whole"]["exponent"] > 0
        assert axis["expected"]["time"] and axis["expected"]["memory"]
    assert (folder / "cost-growth.png").read_bytes().startswith(b"\x89PNG")
    svg = (folder / "cost-growth.svg").read_text()
    assert all(axis["heading"] in svg for axis in report["axes"])


def test_the_chart_is_valid_and_says_the_exponents(ran: Any) -> None:
    _, report = ran
    drawn = growth_chart(report["axes"]).to_dict(validate=True)
    for axis, panel in zip(report["axes"], drawn["concat"], strict=False):
        assert f"{axis['time']['upper']['exponent']:.2f}" in panel["title"]["subtitle"][0]
    assert growth_chart(report["axes"][:1]).to_dict(validate=True)


# ---- options ----


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--axes", "promt"], "prompt"),
        (["--rounds", "0"], "--rounds"),
        (["--rounds", "x"], "--rounds"),
        (["--threads", "0"], "--threads"),
        (["--seed", "-1"], "--seed"),
        (["--axis", "pairs"], "--axes"),
        (["--out", __file__], "--out"),
    ],
)
def test_bad_options_are_one_line_and_status_2(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cost_growth.main(options) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and said in told and "Traceback" not in told
