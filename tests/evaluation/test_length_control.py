"""The leaderboard's length-controlled win rate against its recipe stated again; the simple fit; where a fit cannot be had."""

import time
import warnings

import numpy as np
import pandas as pd
import pytest
import sklearn
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import make_scorer
from sklearn.model_selection import GroupKFold

from isdaa.evaluation.benchmarks.sets.length_control import Gamed, discrete, length_adjusted, length_controlled, win_rate
from isdaa.evaluation.benchmarks.sets.logistic import fit_logistic, separates, sigmoid
from isdaa.evaluation.statistics import bootstrap_counts

QUESTIONS = 240


def simulated(n: int = 805, seed: int = 0, hard: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(preferences, lengths of the model, of the baseline): longer answers win."""
    rng = np.random.default_rng(seed)
    model, baseline = rng.integers(20, 4000, n), rng.integers(20, 3000, n)
    gap = (model - baseline) / (model - baseline).std(ddof=1)
    logits = 0.9 * np.tanh(gap) - 0.4 + rng.normal(0, 1.5, n)
    chances = 1 / (1 + np.exp(-logits))
    preferences = (rng.random(n) < chances).astype(float) if hard else chances
    return preferences, model.astype(float), baseline.astype(float)


def gamed_file(seed: int = 0, questions: int = QUESTIONS) -> pd.DataFrame:
    """Two gamed baselines as the official file has them: every question twice, the second time with another difficulty."""
    rng = np.random.default_rng([seed, 1])
    difficulty = rng.normal(-0.3, 1.9, questions)
    parts = []
    for place, (name, shift) in enumerate({"concise": 1.0, "verbose": -0.4}.items()):
        gap = rng.normal(shift, 1, questions)
        chance = 1 / (1 + np.exp(1.6 * np.tanh(gap) - 0.8 * difficulty + rng.normal(0, 1, questions)))
        columns = {"index": np.arange(questions), "preference": chance, "std_delta_len": gap / gap.std(ddof=1)}
        columns |= {"instruction_difficulty": difficulty + place, "not_gamed_baseline": False}
        parts.append(pd.DataFrame(columns).assign(model=name))
    rows = pd.concat(parts, ignore_index=True)
    rows.loc[3, "preference"] = np.nan
    return rows


def annotations(gamed: pd.DataFrame, seed: int = 0, hard: bool = False) -> pd.DataFrame:
    """One row a question, in order: `preference` from 1 to 2, ties as 0 and 1.5, some null; lengths of both outputs."""
    rng = np.random.default_rng([seed, 2])
    difficulty = gamed.drop_duplicates("index").instruction_difficulty.to_numpy()
    n = len(difficulty)
    len_1, len_2 = rng.integers(20, 4000, n), rng.integers(20, 2500, n)
    gap = (len_1 - len_2) / np.std(len_1 - len_2, ddof=1)
    chance = 1 / (1 + np.exp(1.2 * np.tanh(gap) - 0.7 * difficulty + rng.normal(0.6, 1, n)))
    preference = 1 + ((rng.random(n) < chance) if hard else chance)
    rows = pd.DataFrame({"index": np.arange(n), "preference": preference.astype(float), "len_1": len_1, "len_2": len_2})
    rows.loc[rng.choice(n, 18, replace=False), "preference"] = np.repeat([0.0, 1.5, np.nan], 6)
    return rows


def recipe(rows: pd.DataFrame, gamed: pd.DataFrame) -> float:
    """`length_controlled_v1` in percent, said again: data frames, metadata routing, a scorer that is told the targets."""
    rows = rows.sort_values("index")
    delta = rows.len_1 - rows.len_2
    difficulty = gamed.drop_duplicates("index").set_index("index").instruction_difficulty
    own = pd.DataFrame({"x": np.tanh(delta / delta.std()), "d": rows["index"].map(difficulty), "m": 1.0})
    own = own.assign(p=rows.preference.replace({0.0: 1.5}) - 1, w=1.0)
    theirs = pd.DataFrame({"x": np.tanh(gamed.std_delta_len), "d": gamed.instruction_difficulty, "m": 0.0})
    fit = pd.concat([theirs.assign(p=gamed.preference, w=0.1), own]).dropna(subset="p").reset_index(drop=True)
    twice = pd.concat([fit.assign(y=1, t=fit.p), fit.assign(y=0, t=1 - fit.p)])

    def loss(y: np.ndarray, q: np.ndarray, t: np.ndarray, w: np.ndarray) -> float:
        p, q = np.where(y == 1, t, 1 - t), np.clip(q, 1e-15, 1 - 1e-15)
        return -np.mean(w * (p * np.log(q) + (1 - p) * np.log(1 - q)))

    with sklearn.config_context(enable_metadata_routing=True):
        scorer = make_scorer(loss, response_method="predict_proba", greater_is_better=False)
        model = LogisticRegressionCV(
            Cs=np.logspace(-4, 4, 10),
            cv=GroupKFold(n_splits=5),
            scoring=scorer.set_score_request(t=True, w=True),
            l1_ratios=(1,),
            solver="liblinear",
            random_state=123,
            fit_intercept=False,
            use_legacy_attributes=True,
        ).set_fit_request(sample_weight=True)
        told = {"groups": twice.index.to_numpy(), "t": twice.t.to_numpy(), "w": twice.w.to_numpy()}
        model.fit(twice[["x", "d", "m"]].to_numpy(), twice.y.to_numpy(), sample_weight=(twice.t * twice.w).to_numpy(), **told)
    return float(100 * model.predict_proba(own.assign(x=0.0)[["x", "d", "m"]].to_numpy())[:, 1].mean())


def as_gamed(rows: pd.DataFrame) -> Gamed:
    honest = rows.not_gamed_baseline.to_numpy(dtype=float)
    first = rows.drop_duplicates("index").set_index("index").instruction_difficulty.to_dict()
    columns = (rows[name].to_numpy() for name in ("index", "std_delta_len", "instruction_difficulty", "preference"))
    return Gamed(*columns, honest, first)


def ours(rows: pd.DataFrame, gamed: pd.DataFrame, **more):
    preferences = rows.preference.replace({0.0: 1.5}).to_numpy() - 1
    return length_controlled(preferences, rows.len_2, rows.len_1, rows["index"], as_gamed(gamed), **{"resamples": 10, **more})


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("seed", range(4))
def test_the_leaderboards_recipe_to_a_ten_thousandth_of_a_point(seed: int, hard: bool) -> None:
    gamed = gamed_file(seed)
    rows = annotations(gamed, seed, hard)
    expected = recipe(rows, gamed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = ours(rows, gamed)
    assert 100 * result.rate.value == pytest.approx(expected, abs=1e-4) and result.rate.interval.n == QUESTIONS
    preferences = rows.preference.replace({0.0: 1.5}) - 1
    assert abs(100 * preferences.mean() - expected) > 1, "the simulation must have something to control for"
    simple = length_adjusted(preferences, rows.len_2, rows.len_1, resamples=10)
    assert hard or abs(100 * simple.rate.value - expected) > 0.1, "difficulty and gamed rows must matter"


def test_the_recipe_on_shuffled_rows_and_on_a_part_of_the_questions() -> None:
    gamed = gamed_file(5)
    rows = annotations(gamed, 5)
    whole = ours(rows, gamed)
    shuffled = ours(rows.sample(frac=1, random_state=0), gamed)
    assert shuffled.rate.value == pytest.approx(whole.rate.value, abs=1e-9)
    part = rows.sample(100, random_state=1)
    assert 100 * ours(part, gamed).rate.value == pytest.approx(recipe(part, gamed), abs=1e-4)
    assert 100 * ours(rows.head(3), gamed).rate.value == pytest.approx(recipe(rows.head(3), gamed), abs=1e-4)


def test_the_users_own_scikit_learn_settings_change_nothing_and_stay() -> None:
    gamed = gamed_file()
    rows = annotations(gamed)
    plain = ours(rows, gamed).rate.value
    with sklearn.config_context(enable_metadata_routing=True):
        before = sklearn.get_config()
        assert ours(rows, gamed).rate.value == plain and sklearn.get_config() == before
    before = sklearn.get_config()
    ours(rows, gamed)
    assert sklearn.get_config() == before


def test_its_coefficients_say_that_length_wins_and_difficulty_loses() -> None:
    gamed = gamed_file()
    coefficients = ours(annotations(gamed), gamed).coefficients
    assert coefficients["w_l"] > 0.5 and coefficients["w_d"] > 0.3 and coefficients["C"] in np.logspace(-4, 4, 10)


def test_its_interval_is_of_unpenalised_fits_and_has_the_figure_in_the_middle() -> None:
    gamed = gamed_file(2)
    rows = annotations(gamed, 2).dropna()
    result = ours(rows, gamed, resamples=400, seed=5)
    counts = next(bootstrap_counts(len(rows), resamples=3, seed=5))
    difficulty = gamed.drop_duplicates("index").instruction_difficulty.to_numpy()[rows["index"]]
    preferences = rows.preference.replace({0.0: 1.5}).to_numpy() - 1
    place = {index: row for row, index in enumerate(rows["index"])}

    def unpenalised(count: np.ndarray) -> float:
        """Every prompt as often as it is drawn, with its gamed rows; those of prompts that were not asked as they are."""
        kept = np.repeat(np.arange(len(rows)), count)
        gaps = (rows.len_1 - rows.len_2).to_numpy(dtype=float)[kept]
        with_it = gamed.dropna()
        times = np.array([count[place[i]] if i in place else 1 for i in with_it["index"]])
        x = np.concatenate([np.tanh(gaps / gaps.std(ddof=1)), np.tanh(with_it.std_delta_len)])
        d = np.concatenate([difficulty[kept], with_it.instruction_difficulty])
        m = np.concatenate([np.ones(len(kept)), np.zeros(len(with_it))])
        p, w = np.concatenate([preferences[kept], with_it.preference]), np.concatenate([np.ones(len(kept)), 0.1 * times])
        design = np.column_stack([x, d, m])

        def cost(c: np.ndarray) -> float:
            return float((w * (np.logaddexp(0, design @ c) - p * (design @ c))).sum())

        c = minimize(cost, np.zeros(3), method="BFGS", options={"gtol": 1e-7}).x
        return float(np.mean(1 / (1 + np.exp(-(c[1] * difficulty[kept] + c[2])))))

    moved = result.rate.value - unpenalised(np.ones(len(rows), dtype=int))
    assert result.rate.draws[:3] == pytest.approx([unpenalised(count) + moved for count in counts], abs=1e-5)
    assert result.rate.interval.low < result.rate.value < result.rate.interval.high
    assert result.rate.interval.mean == result.rate.value


def test_a_thousand_resamples_of_the_benchmark_are_quick_and_repeat() -> None:
    gamed = gamed_file(questions=805)
    rows = annotations(gamed)
    start = time.process_time()
    result = ours(rows, gamed, resamples=1000)
    assert time.process_time() - start < 6.0
    interval = result.rate.interval
    assert interval.low is not None and interval.high is not None and 0.02 < interval.high - interval.low < 0.08
    assert np.array_equal(result.rate.draws, ours(rows, gamed, resamples=1000).rate.draws)
    assert not np.array_equal(result.rate.draws, ours(rows, gamed, resamples=1000, seed=1).rate.draws)


@pytest.mark.parametrize("value", [1.0, 2.0])
def test_votes_without_an_unpenalised_fit_have_the_figure_and_no_interval(value: float) -> None:
    gamed = gamed_file()
    rows = annotations(gamed).assign(preference=value)
    result = ours(rows, gamed)
    assert 100 * result.rate.value == pytest.approx(recipe(rows, gamed), abs=1e-4)
    assert result.rate.interval.low is None is result.rate.interval.high and "no interval" in result.note


def test_answers_of_one_length_are_not_controlled_and_nothing_read_gives_nothing() -> None:
    gamed = gamed_file()
    rows = annotations(gamed).assign(len_1=300, len_2=200)
    result = ours(rows, gamed)
    assert 0 < result.rate.value < 1 and "nothing was controlled" in result.note
    assert ours(rows.assign(preference=np.nan), gamed).rate is None


def independent_rate(preferences: np.ndarray, model: np.ndarray, baseline: np.ndarray) -> float:
    """The simple formula again, in percent: another likelihood, another optimiser, the other sign of length, no ridge."""
    gap = baseline - model
    design = np.column_stack([np.tanh(gap / np.std(gap, ddof=1)), np.ones(len(gap))])

    def cost(w: np.ndarray) -> float:
        z = design @ w
        return float(-(preferences * -np.logaddexp(0, -z) + (1 - preferences) * -np.logaddexp(0, z)).sum())

    best = minimize(cost, np.zeros(2), method="BFGS", options={"gtol": 1e-6}).x
    return float(100 / (1 + np.exp(-best[1])))


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("n", [60, 805])
def test_the_simple_fit_agrees_with_an_independent_one_to_a_hundredth_of_a_point(n: int, hard: bool) -> None:
    preferences, model, baseline = simulated(n, seed=n, hard=hard)
    expected = independent_rate(preferences, model, baseline)
    result = length_adjusted(preferences, model, baseline, resamples=10)
    assert 100 * result.rate.value == pytest.approx(expected, abs=0.01)
    assert result.coefficients["w_l"] > 0 and "w_d" not in result.coefficients
    assert abs(100 * win_rate(preferences).value - expected) > 0.3, "the simulation must have something to control for"


def test_each_resample_is_a_fit_of_its_own() -> None:
    preferences, model, baseline = simulated(40, seed=3)
    result = length_adjusted(preferences, model, baseline, resamples=6, seed=5)
    counts = next(bootstrap_counts(40, resamples=6, seed=5))
    for draw, count in zip(result.rate.draws, counts, strict=True):
        rows = np.repeat(np.arange(40), count)
        assert 100 * draw == pytest.approx(independent_rate(preferences[rows], model[rows], baseline[rows]), abs=0.01)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """150 draws of 200 prompts from a known model, hard votes: nominal 95 %, binomial error 1.8 points."""
    covered = 0
    rng = np.random.default_rng(11)
    for _ in range(150):
        gap = rng.normal(100, 400, 200)
        votes = (rng.random(200) < 1 / (1 + np.exp(-(0.8 * np.tanh(gap / 400) - 0.2)))).astype(float)
        result = length_adjusted(votes, 1000 + gap, np.full(200, 1000.0), resamples=200)
        covered += result.rate.interval.low <= 1 / (1 + np.exp(0.2)) <= result.rate.interval.high
    assert 0.89 <= covered / 150 <= 0.99


def test_the_official_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """80 draws of 200 prompts from a known model, their difficulties drawn with them; binomial error 2.4 points."""
    covered = 0
    rng = np.random.default_rng(12)
    truth = float(np.mean(1 / (1 + np.exp(-(0.5 * rng.normal(size=1_000_000) - 0.2)))))
    for seed in range(80):
        gamed = gamed_file(seed, 200)
        gamed["instruction_difficulty"] = np.tile(rng.normal(size=200), 2)
        chances = 1 / (1 + np.exp(0.8 * np.tanh(gamed.std_delta_len) - 0.5 * gamed.instruction_difficulty))
        gap, difficulty = rng.normal(100, 400, 200), gamed.instruction_difficulty.to_numpy()[:200]
        votes = rng.random(200) < 1 / (1 + np.exp(-(0.8 * np.tanh(gap / 400) + 0.5 * difficulty - 0.2)))
        gamed["preference"] = (rng.random(400) < chances).astype(float)
        numbers = (votes.astype(float), 1000 + gap, np.full(200, 1000.0), np.arange(200))
        interval = length_controlled(*numbers, as_gamed(gamed), resamples=100).rate.interval
        covered += interval.low <= truth <= interval.high
    assert 0.88 <= covered / 80 <= 1


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_one_side_wins_every_comparison(value: float) -> None:
    _, model, baseline = simulated(30)
    result = length_adjusted(np.full(30, value), model, baseline, resamples=20)
    assert result.rate.value == value and result.rate.interval.low == value == result.rate.interval.high
    assert "wins every comparison" in result.note


def test_length_alone_decides_every_vote_so_there_is_no_rate() -> None:
    _, model, baseline = simulated(30)
    result = length_adjusted((model > baseline).astype(float), model, baseline, resamples=20)
    assert result.rate is None and "separates all wins from all losses" in result.note
    votes = (model > baseline).astype(float)
    votes[np.argmax(model - baseline)] = 0.0  # one upset, and there is a maximum again
    assert length_adjusted(votes, model, baseline, resamples=20).rate is not None


def test_equal_lengths_leave_the_plain_win_rate() -> None:
    preferences, *_ = simulated(50)
    result = length_adjusted(preferences, np.full(50, 300.0), np.full(50, 200.0), resamples=20)
    assert result.rate.value == pytest.approx(preferences.mean(), abs=1e-6)
    assert "nothing was controlled" in result.note


def test_unread_replies_are_left_out_of_the_fit_and_stay_in_the_mean() -> None:
    preferences, model, baseline = simulated(80)
    preferences[:20] = np.nan
    result = length_adjusted(preferences, model, baseline, resamples=50)
    gap = (model - baseline) / np.std(model - baseline, ddof=1)
    design = np.column_stack([np.tanh(gap), np.ones(80)])
    coefficients = fit_logistic(design[20:], preferences[20:])
    assert result.rate.value == pytest.approx(sigmoid(coefficients[1:])[0], abs=1e-9)
    assert result.rate.interval.n == 80
    nothing = length_adjusted(np.full(80, np.nan), model, baseline)
    assert nothing.rate is None and win_rate(np.full(80, np.nan)) is None


@pytest.mark.parametrize("n", [1, 2])
def test_one_and_two_prompts(n: int) -> None:
    result = length_adjusted(np.array([0.3, 0.8])[:n], np.array([10.0, 30.0])[:n], np.array([20.0, 20.0])[:n], resamples=20)
    assert 0 <= result.rate.value <= 1
    assert (result.rate.interval.low is None) == (n == 1)
    gamed = gamed_file()
    official = ours(annotations(gamed, 3).head(n), gamed)
    assert 0 <= official.rate.value <= 1 and (official.rate.interval.low is None) == (n == 1)


def test_raw_and_discrete_rates_by_hand() -> None:
    preferences = [0.9, 0.5, 0.2, np.nan, 0.51]
    assert win_rate(preferences, resamples=10).value == pytest.approx((0.9 + 0.5 + 0.2 + 0.51) / 4)
    assert discrete(preferences)[[0, 1, 2, 4]].tolist() == [1, 0.5, 0, 1] and np.isnan(discrete(preferences)[3])


def test_a_wrong_shape_or_value_is_refused() -> None:
    with pytest.raises(ValueError, match="must be"):
        length_adjusted([0.5, 0.5], [1.0], [1.0])
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        length_adjusted([0.5, 1.7], [1.0, 3.0], [1.0, 2.0])


def test_separation_is_seen_complete_and_quasi() -> None:
    line = np.column_stack([np.array([-2.0, -1.0, 1.0, 2.0]), np.ones(4)])
    assert separates(line, np.array([0.0, 0.0, 1.0, 1.0]))
    assert not separates(line, np.array([0.0, 1.0, 0.0, 1.0]))
    assert separates(np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]), np.array([0.0, 1.0, 1.0, 1.0]))
    assert not separates(line, np.array([0.1, 0.2, 0.8, 0.9])), "soft votes are never separated"
    assert not separates(np.zeros((4, 2)), np.array([0.0, 0.0, 1.0, 1.0]))


def test_the_fit_weights_rows_as_repeats_would() -> None:
    preferences, model, baseline = simulated(30, seed=9)
    design = np.column_stack([np.tanh((model - baseline) / 1000), np.ones(30)])
    counts = np.arange(30) % 4
    repeated = np.repeat(np.arange(30), counts)
    assert fit_logistic(design, preferences, counts) == pytest.approx(fit_logistic(design[repeated], preferences[repeated]))


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_the_ridge_moves_no_rate(hard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty prompts, where it is largest: less than a thousandth of a point."""
    from isdaa.evaluation.benchmarks.sets import logistic

    for seed in range(20):
        arguments = simulated(20, seed, hard)
        with_ridge = length_adjusted(*arguments, resamples=1)
        with monkeypatch.context() as patched:
            patched.setattr(logistic, "RIDGE", 1e-12)
            without = length_adjusted(*arguments, resamples=1)
        assert (with_ridge.rate is None) == (without.rate is None)
        if with_ridge.rate is not None:
            assert with_ridge.rate.value == pytest.approx(without.rate.value, abs=1e-5)
