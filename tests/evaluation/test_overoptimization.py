"""The verdict on a run and the law through its checkpoints: values by hand, identities, and false alarms counted."""

from dataclasses import replace

import numpy as np
import pytest

from isdaa.evaluation.falls import Bounce, bounce_of, crossfit, smoothed, smoothing
from isdaa.evaluation.overoptimization import Law, fit_law, judge, law_of, shown_better, verdict_of
from isdaa.evaluation.trajectory import Trajectory


def a_run(wins, kl=None, start=0.5, seed=1, cell=None):
    """A trajectory of (C, N) win rates and (C,) KL, the same for all prompts; KL 1, 2, 3, … unless given."""
    wins = np.asarray(wins, dtype=np.float64)
    count, n = wins.shape
    kl = np.arange(1.0, count + 1) if kl is None else np.asarray(kl, dtype=np.float64)
    steps = 10 * np.arange(1, count + 1)
    labels = [f"checkpoint-{step}" for step in steps]
    return Trajectory("run", steps, labels, labels, np.repeat(kl[:, None], n, axis=1), wins, start, seed=seed, cell=cell)


def simulated(curve, prompts=384, bounce=0.0, runs=1, seed=0):
    """(R, C, N) win rates against four opponents around the true curve; prompts keep half of their own luck."""
    rng = np.random.default_rng(seed)
    curve = np.asarray(curve) + bounce * rng.standard_normal((runs, len(curve)))
    kept, fresh = rng.standard_normal((runs, 1, prompts)), rng.standard_normal((runs, curve.shape[1], prompts))
    rates = np.clip(curve[:, :, None] + 0.15 * (kept + fresh), 0, 1)
    return rng.binomial(4, rates) / 4


FALLING = [0.70, 0.76, 0.75, 0.70, 0.65, 0.60, 0.56, 0.54]
AT_ONCE = [0.70, 0.50, 0.50, 0.50, 0.50, 0.50]  # after the first checkpoint, and for good
RISING = [0.62, 0.68, 0.72, 0.74, 0.755, 0.765, 0.77, 0.775]


def test_smoothing_by_hand():
    np.testing.assert_allclose(smoothed(np.array([0.0, 4.0, 8.0, 0.0])), [0.0, 8 / 3, 20 / 3, 10 / 3])
    np.testing.assert_allclose(smoothed(np.array([[0.0, 3.0], [3.0, 0.0]])), [[0.0, 3.0], [9 / 5, 6 / 5]])
    np.testing.assert_allclose(smoothed(np.array([0.7])), [0.7])
    assert np.count_nonzero(smoothing(12)[8]) == 3  # itself and two before from 12 checkpoints on


def test_what_comes_after_has_no_part():
    for count in (3, 6, 20):
        assert not np.triu(smoothing(count), 1).any()
    np.testing.assert_allclose(smoothed(np.array(AT_ONCE))[[0, -1]], [0.70, 0.50])  # a step keeps its size


def test_smoothing_keeps_constants():
    for count in (1, 2, 3, 7, 20):
        np.testing.assert_allclose(smoothing(count).sum(axis=1), 1.0)


def test_crossfit_by_hand():
    # The first half prefers candidate 0 (worth 0.6 − 0.5 to the second), the second prefers candidate 1 (0.6 − 0.4 to the first).
    fall, chosen = crossfit(np.array([0.9, 0.6, 0.4]), np.array([0.6, 0.8, 0.5]))
    assert fall == pytest.approx((0.1 + 0.2) / 2)
    assert chosen.tolist() == [0, 1]


def test_bounce_of_an_alternation_by_hand():
    # ±0.1 in turn: every second difference is ±0.4, so their mean square over 6 is 0.16/6. Four of them are worth
    # 24²/244 degrees of freedom, beside 2 of a bounce of 0.02.
    means = 0.5 + 0.1 * np.array([1, -1, 1, -1, 1, -1])
    found = bounce_of(means, np.zeros((6, 6)))
    df = 24**2 / 244
    assert found.df == pytest.approx(df + 2)
    assert found.variance == pytest.approx((df * 0.16 / 6 + 2 * 0.0004) / (df + 2))


def test_a_trend_is_no_bounce():
    assert bounce_of(np.linspace(0.5, 0.8, 9), np.zeros((9, 9))).variance < 0.02**2


@pytest.mark.parametrize("curve", [AT_ONCE, [0.7, 0.7, 0.7, 0.4, 0.4, 0.4], [0.6, 0.65, 0.7, 0.75, 0.7, 0.65]])
def test_one_bend_or_step_down_is_no_bounce(curve):
    flat = bounce_of(np.full(6, 0.5), np.zeros((6, 6)), bend=True)
    assert bounce_of(np.array(curve), np.zeros((6, 6)), bend=True).variance == pytest.approx(flat.variance, abs=1e-12)
    assert bounce_of(np.array(curve), np.zeros((6, 6))).variance > 1.5 * flat.variance
    # Four checkpoints are too few to leave anything out.
    few, none = np.array(curve[:4]), np.zeros((4, 4))
    assert bounce_of(few, none, bend=True).variance == bounce_of(few, none).variance


@pytest.mark.parametrize("count", [5, 6, 12])
def test_the_bounce_beside_a_bend_is_not_biased(count):
    # Of flat runs, the bend that is left out is luck: what it takes is given back. The 2 of a bounce of 0.02 are taken out here.
    means = 0.5 + 0.05 * np.random.default_rng(1).standard_normal((20_000, count))
    found = bounce_of(means, np.zeros((count, count)), bend=True)
    seen = (found.df * found.mean_square - 2 * 0.02**2) / (found.df - 2)
    assert seen.mean() == pytest.approx(0.05**2, rel=0.03)
    assert 2 * seen.mean() ** 2 / seen.var() == pytest.approx(np.mean(found.df) - 2, rel=0.1)


def test_draws_of_the_bounce_have_its_median():
    found = Bounce(np.float64(0.0004), np.float64(0.0), np.float64(50.0))
    assert np.median(found.draws(np.random.default_rng(0), 20_000)) == pytest.approx(0.0004, rel=0.03)


def test_a_fall_is_found():
    verdict = judge(a_run(simulated(FALLING)[0]))
    assert verdict.finding == "over-optimised"
    assert verdict.peak in (1, 2) and verdict.recommended in (1, 2)
    assert verdict.lower < verdict.fall < verdict.upper
    assert 0.15 < verdict.fall < 0.25
    assert verdict.sentence.startswith("Over-optimised: win rate fell by 0.")
    assert "over the last 3 checkpoints (to step 80)" in verdict.sentence
    assert verdict.sentence.endswith(f"keep checkpoint-{10 * (verdict.recommended + 1)}.")
    assert verdict.prompts_needed is None and verdict.checkpoints_needed is None


def test_a_rising_run_is_healthy():
    verdict = judge(a_run(simulated(RISING, prompts=512)[0]))
    assert verdict.finding == "not detected"
    assert abs(verdict.fall) < 0.01 and verdict.standard_error > 0
    assert verdict.recommended >= 4


def test_too_little_data_says_what_would_do():
    verdict = judge(a_run(simulated([0.70, 0.75, 0.74, 0.75, 0.73, 0.70], prompts=24, seed=3)[0]))
    assert verdict.finding == "underpowered"
    assert verdict.prompts_needed is None or verdict.prompts_needed > 24
    assert verdict.checkpoints_needed is None or verdict.checkpoints_needed > 6
    assert verdict.sentence.startswith("Underpowered")


def test_the_prompts_it_asks_for_are_about_right():
    asked = [verdict_of(run, np.arange(6.0)).prompts_needed for run in simulated([0.75] * 6, prompts=100, runs=40, seed=5)]
    asked = sorted(number for number in asked if number is not None)
    enough = asked[3 * len(asked) // 4]
    found = [verdict_of(run, np.arange(6.0)).finding for run in simulated([0.75] * 6, prompts=enough, runs=40, seed=6)]
    assert found.count("not detected") > 20


def test_a_run_below_its_reference_has_fallen_from_the_start():
    verdict = judge(a_run(simulated([0.42, 0.40, 0.38, 0.35, 0.33, 0.30])[0]))
    assert verdict.finding == "over-optimised" and verdict.below_start
    assert verdict.fall == pytest.approx(0.18, abs=0.05)  # ½ less the smoothed end
    assert "of the untrained reference" in verdict.sentence and verdict.sentence.endswith("keep the reference.")
    assert not judge(a_run(simulated([0.42, 0.40, 0.38, 0.35, 0.33, 0.30])[0], start=None)).below_start


def test_sentences_round_bounds_outwards():
    for curve in (FALLING, RISING):
        verdict = judge(a_run(simulated(curve, prompts=512)[0]))
        said = [float(word.strip("();,.")) for word in verdict.sentence.split() if word.startswith("0.")]
        if verdict.finding == "over-optimised":
            assert said[1] <= verdict.lower < said[1] + 0.01
        else:
            assert said[0] - 0.01 <= verdict.upper <= said[0]


def test_a_peak_at_the_first_checkpoint():
    verdict = judge(a_run(simulated([0.78, 0.74, 0.68, 0.62, 0.57, 0.52])[0]))
    assert verdict.finding == "over-optimised" and verdict.peak == 0 and verdict.recommended == 0


def test_a_fall_without_more_kl_is_not_over_optimisation():
    verdict = judge(a_run(simulated(FALLING)[0], kl=[1, 8, 8, 7, 6, 5, 4, 3]))
    assert verdict.finding == "underpowered" and "KL did not grow" in verdict.sentence
    assert verdict.prompts_needed is None and verdict.checkpoints_needed is None


def test_three_checkpoints_are_enough_for_a_large_fall():
    assert judge(a_run(simulated([0.78, 0.60, 0.40])[0])).finding == "over-optimised"


def test_no_verdict():
    wins = simulated(FALLING)[0]
    assert judge(a_run(wins[:2])) is None
    assert judge(replace(a_run(wins), wins=None)) is None
    assert verdict_of(wins[:, :3], np.arange(8.0)) is None
    with pytest.raises(ValueError, match="shapes"):
        verdict_of(wins, np.arange(7.0))


def test_equal_prompts_leave_the_bounce_alone():
    verdict = verdict_of(np.repeat(np.array(FALLING)[:, None], 10, axis=1), np.arange(8.0))
    curve = smoothed(np.array(FALLING))
    assert verdict.fall == pytest.approx(curve.max() - curve[-1])
    assert verdict.lower < verdict.fall


def test_a_shift_of_all_prompts_changes_nothing():
    wins = simulated(FALLING)[0]
    one, other = judge(a_run(wins)), judge(a_run(wins + 0.1, start=0.6))
    for name in ("fall", "standard_error", "lower", "upper", "bounce"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-9)
    assert (one.finding, one.peak, one.recommended) == (other.finding, other.peak, other.recommended)


def test_the_order_of_prompts_matters_for_the_halves_alone():
    wins = simulated(FALLING)[0]
    one, other = judge(a_run(wins)), judge(a_run(wins[:, ::-1]))
    assert one.bounce == pytest.approx(other.bounce) and one.upper == pytest.approx(other.upper, abs=0.005)
    assert (one.peak, one.recommended) == (other.peak, other.recommended)
    assert one.fall == pytest.approx(other.fall, abs=0.01)
    assert judge(a_run(wins)) == one  # the same data, the same verdict


def test_what_is_kept_is_the_smallest_kl_of_the_equally_good():
    # The last three are the same to a hair: the first of them, at the smallest KL, is kept; where KL falls, the last.
    wins = np.tile(simulated([0.75])[0, 0], (5, 1))
    wins[0] = np.maximum(wins[0] - 0.5, 0)
    wins[1] = np.maximum(wins[1] - 0.25, 0)
    assert judge(a_run(wins)).recommended == 2
    assert judge(a_run(wins, kl=[5, 5, 5, 4, 3])).recommended == 4


@pytest.mark.parametrize(
    ("count", "bounce", "naive_above"), [(8, 0.0, 0.1), (8, 0.02, 0.3), (8, 0.05, 0.6), (4, 0.05, 0.4), (6, 0.05, 0.5)]
)
def test_false_alarms_on_flat_runs(count, bounce, naive_above):
    """At most 5 % (and two standard errors of 200 runs), where the naive paired test alarms far more often."""
    runs = simulated([0.75] * count, bounce=bounce, runs=200, seed=11)
    alarms = np.mean([verdict_of(run, np.arange(float(count))).finding == "over-optimised" for run in runs])
    gaps = [run[run.mean(axis=1).argmax()] - run[-1] for run in runs]
    naive = np.mean([gap.mean() > 1.645 * gap.std() / np.sqrt(gap.size) for gap in gaps])
    assert alarms <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200), f"{alarms:.1%} of flat runs called over-optimised"
    assert naive > naive_above, f"the naive test alarmed on {naive:.1%}"


@pytest.mark.parametrize("curve", [FALLING, AT_ONCE])
def test_power_on_falling_runs(curve):
    runs = simulated(curve, prompts=256, bounce=0.02, runs=100, seed=12)
    assert np.mean([verdict_of(run, np.arange(float(len(curve)))).finding == "over-optimised" for run in runs]) > 0.9


def test_the_fall_of_a_step_is_its_size():
    found = [verdict_of(run, np.arange(6.0)).fall for run in simulated(AT_ONCE, runs=50, seed=13)]
    assert np.mean(found) == pytest.approx(0.2, abs=0.01)


# The law


def exact(a, b, kl, prompts=8, start=0.5):
    """A run whose checkpoints lie on the law."""
    gain = Law(a, b, None, None)(np.sqrt(kl))
    return a_run(start + np.repeat(gain[:, None], prompts, axis=1), kl=kl, start=start)


def test_the_law_by_hand():
    law = Law(1.0, 0.5, None, None)
    assert law(0.0) == 0.0
    assert law(1.0) == 1.0  # log 1 = 0
    assert law(np.e) == pytest.approx(np.e * 0.5)
    np.testing.assert_allclose(law(np.array([0.0, 1.0, np.e**2])), [0.0, 1.0, 0.0], atol=1e-12)


def test_exact_points_give_the_law_back():
    law = fit_law([exact(0.3, 0.2, np.array([0.5, 1.0, 2.0, 4.0, 9.0, 16.0]))])
    assert (law.a, law.b) == (pytest.approx(0.3), pytest.approx(0.2))
    assert law.peak == pytest.approx(np.exp(0.5))
    assert law.height == pytest.approx(0.2 * np.exp(0.5)) and law.height == pytest.approx(law(law.peak))
    assert law.rmse < 1e-12
    assert law.peak_low == pytest.approx(law.peak) and law.peak_high == pytest.approx(law.peak)  # prompts are all the same
    assert law.past_peak == 1.0


def test_no_peak_without_a_bend():
    law = fit_law([exact(0.3, -0.05, np.array([0.5, 1.0, 2.0, 4.0]))])
    assert law.peak is None and law.height is None and law.past_peak is None and law.peak_high is None
    assert law.doubt == "it has no peak"


def test_no_law_from_fewer_than_four_kls():
    assert fit_law([exact(0.3, 0.2, np.array([1.0, 2.0, 4.0]))]) is None
    assert fit_law([exact(0.3, 0.2, np.array([1.0, 2.0, 2.0, 4.0]))]) is None
    two = [exact(0.3, 0.2, np.array([1.0, 2.0])), exact(0.3, 0.2, np.array([3.0, 4.0]))]
    assert fit_law(two).a == pytest.approx(0.3)
    assert fit_law([]) is None
    assert fit_law([replace(two[0], wins=None)]) is None


def test_the_fit_is_numpys():
    rng = np.random.default_rng(0)
    d, gain = rng.uniform(0.3, 3, 9), rng.uniform(0, 0.3, 9)
    law = law_of([(np.repeat(0.5 + gain[:, None], 4, axis=1), np.repeat(d[:, None] ** 2, 4, axis=1), 0.5)])
    expected = np.linalg.lstsq(np.stack([d, -d * np.log(d)], axis=1), gain, rcond=None)[0]
    np.testing.assert_allclose([law.a, law.b], expected, rtol=1e-8)


def test_several_seeds_widen_the_interval():
    kl = np.array([0.5, 1.0, 2.0, 4.0, 9.0])
    law = fit_law([exact(a, 0.2, kl) for a in (0.2, 0.3, 0.4)])
    assert law.a == pytest.approx(0.3)
    assert law.peak_low < law.peak < law.peak_high
    assert law.peak_low >= np.exp(0.2 / 0.2 - 1) - 1e-9 and law.peak_high <= np.exp(0.4 / 0.2 - 1) + 1e-9


def test_the_interval_covers_the_peak_of_noisy_prompts():
    kl = np.array([0.3, 0.6, 1.0, 1.6, 2.4, 4.0, 6.0, 9.0])
    truth = Law(0.28, 0.22, None, None)
    peak, covered = np.exp(0.28 / 0.22 - 1), 0
    for seed in range(60):
        wins = simulated(0.5 + truth(np.sqrt(kl)), seed=seed)[0]
        law = fit_law([a_run(wins, kl=kl)], resamples=200, seed=seed)
        covered += law.peak_low <= peak <= law.peak_high
    assert covered >= 51  # 85 %: the clipping of win rates at 1 bends the simulated curve a little


@pytest.mark.parametrize(
    "a, b, kl, doubt",
    [
        (0.9, 0.2, [0.5, 1.0, 2.0, 4.0], "beyond the furthest checkpoint, √KL 2.00"),  # d* = e^3.5
        (0.1, 0.2, [1.0, 2.0, 4.0, 9.0], "before the first, √KL 1.00"),  # d* = e^-0.5
        (0.3, -0.1, [0.5, 1.0, 2.0, 4.0], "it has no peak"),
    ],
)
def test_no_peak_is_named_outside_the_checkpoints(a, b, kl, doubt):
    law = fit_law([exact(a, b, np.array(kl))])
    assert (law.a, law.b) == (pytest.approx(a), pytest.approx(b)) and doubt in law.doubt
    assert law.peak is law.height is law.peak_low is law.peak_high is law.past_peak is None


def test_no_peak_is_named_whose_interval_has_no_end():
    """Noise about a line: the fit has a peak among the checkpoints, and many of its draws have none."""
    kl = np.array([1.0, 2.0, 4.0, 9.0, 16.0])
    laws = [
        fit_law([a_run(simulated([0.5, 0.51, 0.5, 0.51, 0.5], prompts=30, seed=s)[0], kl=kl)], resamples=200) for s in range(30)
    ]
    open_ended = [law for law in laws if law.doubt is not None and "has no end" in law.doubt]
    assert open_ended and all(law.peak is None for law in open_ended)
    assert all((law.peak is None) == (law.doubt is not None) for law in laws)
    assert all(1 <= law.peak <= 4 and law.peak_high is not None for law in laws if law.peak is not None)


def test_nothing_is_recommended_that_is_not_shown_to_be_better():
    verdict = judge(a_run(simulated([0.50, 0.51, 0.50, 0.49, 0.50, 0.50], prompts=128)[0]))
    assert verdict.better is False and verdict.keeps_reference
    assert "no checkpoint is shown to be better than the reference (95 %)" in verdict.sentence
    assert verdict.sentence.endswith("keep the reference.") and "keep checkpoint" not in verdict.sentence
    found = judge(a_run(simulated(RISING)[0]))
    assert found.better is True and not found.keeps_reference and "no checkpoint" not in found.sentence


def test_one_checkpoint_that_is_shown_to_be_better_is_kept_though_its_neighbours_are_worse():
    """Smoothed, the curve lies below the reference; the reference was recommended, and `better` said the opposite."""
    verdict = judge(a_run(simulated([0.20, 0.58, 0.20, 0.20], prompts=800)[0]))
    assert verdict.below_start and verdict.better is True and verdict.recommended == 1 and not verdict.keeps_reference
    assert "keep checkpoint-2" in verdict.sentence and "keep the reference" not in verdict.sentence


def test_what_is_recommended_is_itself_shown_to_be_better():
    """The best and one near the reference cannot be told apart, but the latter is not shown to be better than the reference."""
    best = np.array([1.0] * 224 + [0.0] * 176)
    close = np.roll(best, 32)
    close[32:40] = 0.0  # 0.54: it loses 40 prompts and wins 32 others
    wins = np.stack([close, best, best])
    verdict = judge(a_run(wins, kl=[1.0, 5.0, 6.0]))
    assert verdict.better and verdict.recommended == 1
    assert wins[0].mean() == 0.54 and shown_better(a_run(wins[:1])) is False and shown_better(a_run(wins[1:])) is True


def test_an_unknown_reference_is_said():
    verdict = judge(a_run(simulated(RISING)[0], start=None))
    assert verdict.better is None and "(the reference's own win rate is not known)" in verdict.sentence
    assert shown_better(a_run(simulated(RISING)[0], start=None)) is None


def test_steps_that_nobody_knows_are_told_by_labels():
    wins = simulated(FALLING)[0]
    said = verdict_of(wins, np.arange(1.0, 9.0), labels=[f"epoch-{i}" for i in range(8)]).sentence
    assert "at epoch-" in said and "(to epoch-7)" in said and "step" not in said
    assert "(to step 80)" in judge(a_run(wins)).sentence
