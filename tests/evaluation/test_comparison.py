"""Methods over seeds: t-intervals, pairing, matched KL, all on values that can be worked by hand."""

import json

import numpy as np
import pytest

from isdaa.evaluation.checkpoints.trajectory import Trajectory
from isdaa.evaluation.verdict.comparison import (
    at_matched_kl,
    difference,
    paired_bootstrap,
    path_of,
    seed_mean,
    summarise,
    to_json,
)

pytestmark = pytest.mark.fast


def a_run(means, kl, cell, seed, prompts=6, wins=True):
    """A run whose prompts are all the same."""
    means, kl = np.asarray(means, dtype=np.float64), np.asarray(kl, dtype=np.float64)
    labels = [f"checkpoint-{c}" for c in range(len(kl))]
    table = np.repeat(means[:, None], prompts, axis=1) if wins else None
    kls = np.repeat(kl[:, None], prompts, axis=1)
    return Trajectory(f"{cell}-{seed}", np.arange(1, len(kl) + 1), labels, labels, kls, table, 0.5, seed=seed, cell=cell)


def a_line(slope, kl, cell, seed):
    """Win rate ½ + slope·√KL."""
    return a_run(0.5 + slope * np.sqrt(kl), kl, cell, seed)


def test_the_t_interval_by_hand():
    # Mean 2, standard deviation 1, t of 2 degrees of freedom 4.3027.
    found = seed_mean([1.0, 2.0, 3.0])
    assert (found.mean, found.seeds, found.values) == (2.0, 3, (1.0, 2.0, 3.0))
    assert found.high - found.mean == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_one_seed_has_no_bounds():
    assert seed_mean([0.7]).low is None and seed_mean([0.7]).mean == 0.7
    assert np.isnan(seed_mean([]).mean) and seed_mean([]).seeds == 0


@pytest.mark.parametrize("values", [[0.0, 0.0], [0.2, 0.9], [0.0, 0.0, 0.0], [0.1 + 0.2, 0.3, 0.3, 0.3]])
def test_two_seeds_and_seeds_that_all_gave_the_same_have_no_bounds(values):
    """An interval of width 0 read as certain, beside one from 0 to 1 of the same two seeds."""
    found = seed_mean(values)
    assert (found.low, found.high, found.seeds) == (None, None, len(values)) and found.mean == pytest.approx(np.mean(values))
    assert seed_mean([*values, 0.5]).low is not None or len(values) < 2


def test_the_t_interval_covers():
    rng = np.random.default_rng(0)
    found = [seed_mean(values) for values in rng.standard_normal((2000, 5))]
    assert np.mean([one.low <= 0 <= one.high for one in found]) == pytest.approx(0.95, abs=0.015)


def test_summaries():
    runs = [
        a_run([0.6, 0.9, 0.6, 0.3], [1, 2, 3, 4], "b", 2),
        a_run([0.6, 0.7, 0.8, 0.8], [1, 2, 3, 4], "a", 1),
        a_run([0.6, 0.9, 0.6, 0.2], [1, 2, 3, 6], "b", 1),
    ]
    b, a = summarise(runs)
    assert (b.cell, a.cell) == ("b", "a")
    assert [run.seed for run in b.runs] == [1, 2]
    assert b.final.values == (pytest.approx(0.2), pytest.approx(0.3))
    assert b.final_kl.mean == pytest.approx(5.0)
    assert b.best.values == (pytest.approx(0.9), pytest.approx(0.9))
    assert b.fall.values == (pytest.approx(0.7), pytest.approx(0.6)) and a.fall.values == (0.0,)
    assert sum(b.findings.values()) == 2 and sum(a.findings.values()) == 1
    assert a.final.low is None


def test_runs_without_win_rates():
    runs = [a_run([0.6, 0.7, 0.8], [1, 2, 3], "a", 1, wins=False), a_run([0.6, 0.7, 0.8], [1, 2, 5], "a", 2)]
    (summary,) = summarise(runs)
    assert summary.final.values == (pytest.approx(0.8),) and summary.final_kl.seeds == 2
    other = summarise([a_run([0.5, 0.5, 0.5], [1, 2, 3], "b", 2)])[0]
    assert difference(summary, other).values == (pytest.approx(0.3),)
    assert difference(summary, other, "final_kl").values == (pytest.approx(2.0),)


def test_differences_are_paired_by_seed():
    a = summarise([a_run([0.5, 0.5, 0.5 + 0.1 * s], [1, 2, 3], "a", s) for s in (1, 2, 3, 4)])[0]
    b = summarise([a_run([0.5, 0.5, 0.4 + 0.1 * s + 1e-4 * (s == 3)], [1, 2, 3], "b", s) for s in (4, 3, 2, 5)])[0]
    found = difference(a, b)
    assert found.seeds == 3 and found.values == pytest.approx((0.1, 0.1 - 1e-4, 0.1))
    assert found.high - found.low < 1e-3  # the seeds' own spread is gone
    assert difference(a, summarise([a_run([0.5] * 3, [1, 2, 3], "c", 9)])[0]).seeds == 0
    with pytest.raises(ValueError, match="best, final, final_kl, fall"):
        difference(a, b, "kl")


def test_falls_are_paired_too():
    a = summarise([a_run([0.6, 0.9, 0.6, 0.3], [1, 2, 3, 4], "a", s) for s in (1, 2)])[0]
    b = summarise([a_run([0.6, 0.7], [1, 2], "b", 1), a_run([0.6, 0.9, 0.6, 0.2], [1, 2, 3, 4], "b", 2)])[0]
    found = difference(b, a, "fall")  # seed 1 of b has too few checkpoints
    assert found.values == (pytest.approx(0.1),)  # 0.7 − 0.6


def test_a_path_goes_outwards_only():
    d, wins = path_of(a_run([0.6, 0.7, 0.1, 0.8], [1, 4, 2.25, 9], "a", 1))
    assert d.tolist() == [0.0, 1.0, 2.0, 3.0]
    np.testing.assert_allclose(wins, [0.5, 0.6, 0.7, 0.8])


def test_matched_kl_on_lines():
    kl = np.array([1.0, 4.0, 9.0])
    runs = [a_line(0.1, kl, "a", 1), a_line(0.1, kl, "a", 2), a_line(0.05, kl * 4, "b", 1), a_line(0.04, kl * 4, "b", 2)]
    found = at_matched_kl(runs, "a", points=5)
    assert found.baseline == "a" and list(found.cells) == ["a", "b"] and list(found.differences) == ["b"]
    # From b's first checkpoint (√4) to a's last (√9).
    np.testing.assert_allclose(found.root_kl, np.linspace(2, 3, 5))
    np.testing.assert_allclose([point.mean for point in found.cells["a"]], 0.5 + 0.1 * found.root_kl)
    np.testing.assert_allclose([point.mean for point in found.differences["b"]], -0.055 * found.root_kl)
    assert all(point.seeds == 2 for point in found.differences["b"])


def test_the_range_starts_at_the_reference_where_nobody_else_can():
    runs = [a_line(0.1, np.array([0.25, 1.0]), "a", 1), a_line(0.2, np.array([1.44, 4.0]), "b", 1)]
    assert at_matched_kl(runs, "a").root_kl[0] == 0.0


def test_a_cell_that_hardly_moves_is_left_out():
    kl = np.array([1.0, 4.0, 9.0])
    still = a_line(0.3, np.array([0.01, 0.02, 0.04]), "still", 1)
    runs = [a_line(0.1, kl, "a", 1), a_line(0.05, kl, "b", 1), still]
    found = at_matched_kl(runs, "a")
    assert found.excluded == ["still"] and found.root_kl[-1] == pytest.approx(3.0)
    # The baseline is never left out: all others are then compared over its short range.
    found = at_matched_kl(runs, "still")
    assert found.root_kl[-1] == pytest.approx(0.2) and found.excluded == []


def test_no_common_range():
    kl = np.array([1.0, 4.0])
    assert at_matched_kl([a_line(0.1, kl, "a", 1)], "a") is None
    assert at_matched_kl([a_line(0.1, kl, "a", 1), a_line(0.1, kl, "b", 1)], "c") is None
    assert at_matched_kl([a_line(0.1, kl, "a", 1), a_line(0.1, 0 * kl, "b", 1)], "a") is None


def test_paired_bootstrap_by_normal_theory():
    rng = np.random.default_rng(0)
    first, second = rng.uniform(0, 1, 400), rng.uniform(0, 1, 400)
    found = paired_bootstrap(first, second)
    error = (first - second).std() / 20
    assert found.mean == pytest.approx((first - second).mean()) and found.n == 400
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_paired_bootstrap_sees_seeds():
    # Three seeds apart by 0.1, prompts all alike: the spread is that of a bootstrap over three numbers.
    first = np.array([[0.6] * 50, [0.7] * 50, [0.8] * 50])
    found = paired_bootstrap(first, np.full((3, 50), 0.5))
    assert found.mean == pytest.approx(0.2)
    assert found.low == pytest.approx(0.1, abs=0.04) and found.high == pytest.approx(0.3, abs=0.04)


def test_paired_bootstrap_edges():
    same = np.linspace(0, 1, 9)
    found = paired_bootstrap(same, same)
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)
    assert paired_bootstrap([0.5], [0.4]).low is None
    with pytest.raises(ValueError, match="same seeds and prompts"):
        paired_bootstrap(same, same[:4])


def test_json():
    runs = [a_line(0.1, np.array([1.0, 4.0]), cell, seed) for cell in "ab" for seed in (1, 2)]
    content = {"summaries": summarise(runs), "matched": at_matched_kl(runs, "a", points=2), "nothing": float("nan")}
    plain = json.loads(json.dumps(to_json(content), allow_nan=False))
    assert plain["summaries"][0]["runs"] == ["a-1", "a-2"]
    assert plain["matched"]["root_kl"] == [1.0, 2.0]
    assert plain["matched"]["cells"]["a"][0]["mean"] == pytest.approx(0.6)
    assert plain["nothing"] is None and plain["summaries"][0]["fall"]["mean"] is None
