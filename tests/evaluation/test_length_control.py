"""The length-controlled win rate against an independent fit, and where a fit cannot be had."""

import time

import numpy as np
import pytest
from scipy.optimize import minimize

from isdaa.evaluation.length_control import discrete, length_controlled, win_rate
from isdaa.evaluation.logistic import fit_logistic, separates, sigmoid
from isdaa.evaluation.statistics import bootstrap_counts


def simulated(n: int = 805, seed: int = 0, hard: bool = False) -> tuple[np.ndarray, ...]:
    """(preferences, lengths of the model, of the baseline, difficulty): longer answers win, hard prompts are lost."""
    rng = np.random.default_rng(seed)
    model, baseline = rng.integers(20, 4000, n), rng.integers(20, 3000, n)
    difficulty = rng.normal(0.3, 1.2, n)
    gap = (model - baseline) / (model - baseline).std(ddof=1)
    logits = 0.9 * np.tanh(gap) - 0.6 * difficulty - 0.4 + rng.normal(0, 1.5, n)
    chances = 1 / (1 + np.exp(-logits))
    preferences = (rng.random(n) < chances).astype(float) if hard else chances
    return preferences, model.astype(float), baseline.astype(float), difficulty


def independent_rate(preferences: np.ndarray, model: np.ndarray, baseline: np.ndarray, difficulty: np.ndarray | None) -> float:
    """The formula again, in percent: another likelihood, another optimiser, the original's sign of length, no ridge."""
    gap = baseline - model
    columns = [np.tanh(gap / np.std(gap, ddof=1)), np.ones(len(gap))] + ([] if difficulty is None else [difficulty])
    design = np.column_stack(columns)

    def cost(w: np.ndarray) -> float:
        z = design @ w
        return float(-(preferences * -np.logaddexp(0, -z) + (1 - preferences) * -np.logaddexp(0, z)).sum())

    best = minimize(cost, np.zeros(design.shape[1]), method="BFGS", options={"gtol": 1e-6}).x
    z = best[1] + (0 if difficulty is None else best[2] * difficulty)
    return float(100 * np.mean(1 / (1 + np.exp(-z)) * np.ones(len(gap))))


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("with_difficulty", [False, True], ids=["plain", "difficulty"])
@pytest.mark.parametrize("n", [60, 805])
def test_the_rate_agrees_with_an_independent_fit_to_a_hundredth_of_a_point(n: int, with_difficulty: bool, hard: bool) -> None:
    preferences, model, baseline, difficulty = simulated(n, seed=n, hard=hard)
    difficulty = difficulty if with_difficulty else None
    expected = independent_rate(preferences, model, baseline, difficulty)
    result = length_controlled(preferences, model, baseline, difficulty, resamples=10)
    assert result.rate is not None
    assert 100 * result.rate.value == pytest.approx(expected, abs=0.01)
    assert result.coefficients["w_l"] > 0
    assert ("w_d" in result.coefficients) == with_difficulty
    assert abs(100 * win_rate(preferences).value - expected) > 0.3, "the simulation must have something to control for"


def test_each_resample_is_a_fit_of_its_own() -> None:
    preferences, model, baseline, difficulty = simulated(40, seed=3)
    result = length_controlled(preferences, model, baseline, difficulty, resamples=6, seed=5)
    counts = next(bootstrap_counts(40, resamples=6, seed=5))
    for draw, count in zip(result.rate.draws, counts, strict=True):
        rows = np.repeat(np.arange(40), count)
        expected = independent_rate(preferences[rows], model[rows], baseline[rows], difficulty[rows])
        assert 100 * draw == pytest.approx(expected, abs=0.01)


def test_a_thousand_resamples_of_the_benchmark_are_quick_and_cover() -> None:
    preferences, model, baseline, difficulty = simulated()
    start = time.process_time()
    result = length_controlled(preferences, model, baseline, difficulty, resamples=1000)
    assert time.process_time() - start < 2.0
    half = result.rate.interval.half_width
    # The bootstrap's spread is that of the model's own votes: about 1.96·sd/√N of the residuals.
    assert 0.01 < half < 0.04
    again = length_controlled(preferences, model, baseline, difficulty, resamples=1000)
    assert np.array_equal(result.rate.draws, again.rate.draws)
    other = length_controlled(preferences, model, baseline, difficulty, resamples=1000, seed=1)
    assert not np.array_equal(result.rate.draws, other.rate.draws)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """150 draws of 200 prompts from a known model, hard votes: nominal 95 %, binomial error 1.8 points."""
    covered = 0
    rng = np.random.default_rng(11)
    for _ in range(150):
        gap, difficulty = rng.normal(100, 400, 200), rng.normal(size=200)
        chances = 1 / (1 + np.exp(-(0.8 * np.tanh(gap / 400) - 0.5 * difficulty - 0.2)))
        votes = (rng.random(200) < chances).astype(float)
        result = length_controlled(votes, 1000 + gap, np.full(200, 1000.0), difficulty, resamples=200)
        covered += result.rate.interval.low <= TRUTH <= result.rate.interval.high
    assert 0.89 <= covered / 150 <= 0.99


# E[σ(−0.2 − 0.5·d)], d standard normal.
TRUTH = float(np.mean(1 / (1 + np.exp(0.2 + 0.5 * np.random.default_rng(0).normal(size=2_000_000)))))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_one_side_wins_every_comparison(value: float) -> None:
    _, model, baseline, difficulty = simulated(30)
    result = length_controlled(np.full(30, value), model, baseline, difficulty, resamples=20)
    assert result.rate.value == value and result.rate.interval.low == value == result.rate.interval.high
    assert "wins every comparison" in result.note


def test_length_alone_decides_every_vote_so_there_is_no_rate() -> None:
    _, model, baseline, difficulty = simulated(30)
    result = length_controlled((model > baseline).astype(float), model, baseline, difficulty, resamples=20)
    assert result.rate is None and "tells all wins from all losses" in result.note
    votes = (model > baseline).astype(float)
    votes[np.argmax(model - baseline)] = 0.0  # one upset, and there is a maximum again
    assert length_controlled(votes, model, baseline, resamples=20).rate is not None


def test_equal_lengths_and_constant_difficulty_leave_the_plain_win_rate() -> None:
    preferences, *_ = simulated(50)
    for difficulty in (None, np.full(50, 0.7)):
        result = length_controlled(preferences, np.full(50, 300.0), np.full(50, 200.0), difficulty, resamples=20)
        assert result.rate.value == pytest.approx(preferences.mean(), abs=1e-6)
        assert "nothing was controlled" in result.note


def test_collinear_difficulty_changes_no_rate() -> None:
    preferences, model, baseline, _ = simulated(100)
    plain = length_controlled(preferences, model, baseline, resamples=20)
    constant = length_controlled(preferences, model, baseline, np.full(100, 2.0), resamples=20)
    assert constant.rate.value == pytest.approx(plain.rate.value, abs=1e-6)


def test_unread_replies_are_left_out_of_the_fit_and_stay_in_the_mean() -> None:
    preferences, model, baseline, difficulty = simulated(80)
    preferences[:20] = np.nan
    result = length_controlled(preferences, model, baseline, difficulty, resamples=50)
    gap = (model - baseline) / np.std(model - baseline, ddof=1)
    design = np.column_stack([np.tanh(gap), difficulty, np.ones(80)])
    coefficients = fit_logistic(design[20:], preferences[20:])
    assert result.rate.value == pytest.approx(sigmoid(design[:, 1:] @ coefficients[1:]).mean(), abs=1e-9)
    assert result.rate.interval.n == 80
    nothing = length_controlled(np.full(80, np.nan), model, baseline)
    assert nothing.rate is None and win_rate(np.full(80, np.nan)) is None


@pytest.mark.parametrize("n", [1, 2])
def test_one_and_two_prompts(n: int) -> None:
    result = length_controlled(np.array([0.3, 0.8])[:n], np.array([10.0, 30.0])[:n], np.array([20.0, 20.0])[:n], resamples=20)
    assert 0 <= result.rate.value <= 1
    assert (result.rate.interval.low is None) == (n == 1)


def test_raw_and_discrete_rates_by_hand() -> None:
    preferences = [0.9, 0.5, 0.2, np.nan, 0.51]
    assert win_rate(preferences, resamples=10).value == pytest.approx((0.9 + 0.5 + 0.2 + 0.51) / 4)
    assert discrete(preferences)[[0, 1, 2, 4]].tolist() == [1, 0.5, 0, 1] and np.isnan(discrete(preferences)[3])


def test_a_wrong_shape_or_value_is_refused() -> None:
    with pytest.raises(ValueError, match="must be"):
        length_controlled([0.5, 0.5], [1.0], [1.0])
    with pytest.raises(ValueError, match=r"targets in \[0, 1\]"):
        length_controlled([0.5, 1.7], [1.0, 3.0], [1.0, 2.0])


def test_separation_is_seen_complete_and_quasi() -> None:
    line = np.column_stack([np.array([-2.0, -1.0, 1.0, 2.0]), np.ones(4)])
    assert separates(line, np.array([0.0, 0.0, 1.0, 1.0]))
    assert not separates(line, np.array([0.0, 1.0, 0.0, 1.0]))
    assert separates(np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]), np.array([0.0, 1.0, 1.0, 1.0]))
    assert not separates(line, np.array([0.1, 0.2, 0.8, 0.9])), "soft votes are never separated"
    assert not separates(np.zeros((4, 2)), np.array([0.0, 0.0, 1.0, 1.0]))


def test_the_fit_weights_rows_as_repeats_would() -> None:
    preferences, model, baseline, difficulty = simulated(30, seed=9)
    design = np.column_stack([np.tanh((model - baseline) / 1000), difficulty, np.ones(30)])
    counts = np.arange(30) % 4
    repeated = np.repeat(np.arange(30), counts)
    assert fit_logistic(design, preferences, counts) == pytest.approx(fit_logistic(design[repeated], preferences[repeated]))


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_the_ridge_moves_no_rate(hard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty prompts, where it is largest: less than a thousandth of a point."""
    from isdaa.evaluation import logistic

    for seed in range(20):
        arguments = simulated(20, seed, hard)
        with_ridge = length_controlled(*arguments, resamples=1)
        with monkeypatch.context() as patched:
            patched.setattr(logistic, "RIDGE", 1e-12)
            without = length_controlled(*arguments, resamples=1)
        assert (with_ridge.rate is None) == (without.rate is None)
        if with_ridge.rate is not None:
            assert with_ridge.rate.value == pytest.approx(without.rate.value, abs=1e-5)
