"""The verdict on a run and the law through its checkpoints: values by hand, identities, and false alarms counted."""

import re
from dataclasses import replace

import numpy as np
import pytest

from isdaa import evaluation
from isdaa.evaluation.checkpoints.trajectory import Trajectory
from isdaa.evaluation.verdict.fall_statistics import BOUNCES, MARGIN, above, bounce_of, simultaneous, smoothing
from isdaa.evaluation.verdict.overoptimization import Law, fit_law, judge, law_of, places_of, shown_better, verdict_of, why_none


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
    curve = np.array([0.0, 4.0, 8.0, 0.0])
    np.testing.assert_allclose(smoothing(4) @ curve, [0.0, 8 / 3, 20 / 3, 10 / 3])
    assert np.count_nonzero(smoothing(12)[8]) == 3  # itself and two before from 12 checkpoints on
    for count in (1, 2, 3, 7, 20):
        np.testing.assert_allclose(smoothing(count).sum(axis=1), 1.0)
        assert not np.triu(smoothing(count), 1).any()  # what comes after has no part


def test_the_bounce_that_was_drawn_is_the_likeliest():
    rng = np.random.default_rng(0)
    for bounce in (0.01, 0.03, 0.05):
        likely = bounce_of(0.5 + bounce * rng.standard_normal((400, 20)), np.zeros((20, 20)))
        assert likely.shape == (400, 5) and np.allclose(likely.sum(axis=1), 1)
        assert np.sqrt(np.mean(likely @ BOUNCES**2)) == pytest.approx(bounce, abs=0.006)


def test_what_prompts_explain_is_no_bounce():
    rng = np.random.default_rng(0)
    means = 0.5 + 0.05 * rng.standard_normal((100, 40))
    with_prompts = bounce_of(means, 0.05**2 * np.eye(40)) @ BOUNCES**2
    without = bounce_of(means, np.zeros((40, 40))) @ BOUNCES**2
    assert np.sqrt(with_prompts.mean()) < 0.032 and np.sqrt(without.mean()) > 0.045
    np.testing.assert_allclose(bounce_of(means, np.broadcast_to(0.05**2 * np.eye(40), (100, 40, 40))) @ BOUNCES**2, with_prompts)


@pytest.mark.parametrize(
    "curve", [AT_ONCE, [0.7, 0.7, 0.7, 0.4, 0.4, 0.4], [0.6, 0.65, 0.7, 0.75, 0.7, 0.65], np.linspace(0.5, 0.8, 6)]
)
def test_a_trend_one_bend_or_step_down_is_no_bounce(curve):
    flat, none = bounce_of(np.full(6, 0.5), np.zeros((6, 6))), np.zeros((6, 6))
    np.testing.assert_allclose(bounce_of(np.array(curve), none), flat, atol=1e-9)
    assert flat @ BOUNCES**2 < 0.025**2


def test_from_four_checkpoints_the_largest_bounce_is_assumed():
    assert bounce_of(np.full(4, 0.7), np.zeros((4, 4))).tolist() == [0, 0, 0, 0, 1]


def test_bounds_are_simultaneous_and_paired():
    """Of eight equal candidates the luckiest is hardly ever shown to lie above the last; one bound alone would often be."""
    rng = np.random.default_rng(0)
    shown = alone = 0
    for _ in range(300):
        gaps = rng.choice([-0.5, 0.0, 0.5], (8, 100))
        lowers, critical = simultaneous(gaps)
        shown += lowers.max() > 0
        alone += (gaps.mean(axis=1) - 1.66 * gaps.std(axis=1, ddof=1) / 10).max() > 0
    assert critical > 2.3 and shown <= 25 < alone  # 15 expected; more than 25 in one of a hundred such tests


def test_no_difference_on_few_prompts_bounds_little():
    """Sixteen prompts without any difference: up to 17 % of all prompts may still have one (0.83^16 = 5 %)."""
    assert above(np.zeros((1, 16)))[0] == pytest.approx(0.19, abs=0.02) and above(np.zeros((1, 512)))[0] < 0.01
    gaps = np.random.default_rng(0).choice([-0.5, 0.0, 0.5], (1, 400))
    assert above(gaps)[0] == pytest.approx(1.649 * gaps.std() / 20, rel=0.1)


def test_a_fall_is_found():
    verdict = judge(a_run(simulated(FALLING)[0]))
    assert verdict.finding == "over-optimised"
    assert verdict.peak in (1, 2) and verdict.recommended in (1, 2)
    assert MARGIN < verdict.lower < verdict.fall < verdict.upper <= 1
    assert 0.15 < verdict.fall < 0.27
    assert verdict.sentence.startswith("Over-optimised: the win rate against the reference fell from 0.7")
    assert "(checkpoint-80), by at least 0." in verdict.sentence
    assert "(95 %), while the distance from the reference still grew. Keep checkpoint-" in verdict.sentence
    assert (
        "the win rate against the data's chosen responses fell" in judge(a_run(simulated(FALLING)[0]), opponent="chosen").sentence
    )
    assert verdict.prompts_needed is None


def test_sentences_quote_the_table():
    """The win rates in a sentence are those of checkpoints, not of a smoothed curve."""
    for curve in (FALLING, AT_ONCE, [0.63, 0.80, 0.66, 0.53]):
        run = a_run(simulated(curve)[0])
        verdict = judge(run)
        place = r"(0\.\d\d) \(checkpoint-(\d+)\)"
        said = re.search(rf"from {place} to {place}, by at least (0\.\d\d)", verdict.sentence)
        raw = dict(zip(run.steps, run.wins.mean(axis=1), strict=True))
        assert float(said[1]) == pytest.approx(raw[int(said[2])], abs=0.0051) and int(said[4]) == run.steps[-1]
        assert float(said[3]) == pytest.approx(raw[int(said[4])], abs=0.0051)
        assert verdict.fall == pytest.approx(raw[int(said[2])] - raw[int(said[4])])
        assert float(said[5]) <= verdict.lower < float(said[5]) + 0.01  # rounded outwards


def test_four_checkpoints_see_what_anyone_can_see():
    """0.63, 0.80, 0.66, 0.53 at KL 4, 6, 17, 20 was called underpowered, with however many prompts."""
    for prompts in (128, 512, 4096):
        verdict = verdict_of(simulated([0.63, 0.80, 0.66, 0.53], prompts=prompts)[0], np.array([4.0, 6.0, 17.0, 20.0]))
        assert verdict.finding == "over-optimised" and verdict.peak == 1 and verdict.sentence.endswith(". Keep checkpoint-2.")


def test_a_fall_within_the_bounce_is_worse_and_no_more():
    verdict = judge(a_run(simulated([0.75, 0.62, 0.75, 0.62, 0.75, 0.62], prompts=512)[0]))
    assert verdict.finding == "worse" and verdict.lower > MARGIN
    assert "Worse at the end" in verdict.sentence and "ordinary variation between checkpoints" in verdict.sentence
    assert "Keep checkpoint-" in verdict.sentence and "still grew" not in verdict.sentence


def test_a_rising_run_is_healthy():
    verdict = judge(a_run(simulated(RISING, prompts=1024)[0]))
    assert verdict.finding == "not detected" and verdict.upper < 0.05
    assert verdict.fall < 0.02 and verdict.recommended >= 4
    said = float(re.search(r"at most (0\.\d\d) below the highest", verdict.sentence)[1])
    assert said - 0.01 <= verdict.upper <= said


def test_too_little_data_says_what_would_do():
    verdict = judge(a_run(simulated([0.70, 0.75, 0.74, 0.75, 0.73, 0.70], prompts=24, seed=3)[0]))
    assert verdict.finding == "underpowered"
    assert verdict.prompts_needed is None or verdict.prompts_needed > 24
    assert verdict.sentence.startswith("Underpowered") and "seeds" not in verdict.sentence and "or now" in verdict.sentence
    assert "24 prompts are too few" in verdict.sentence


@pytest.mark.parametrize("curve", [[0.75] * 6, [0.65, 0.75, 0.73, 0.71, 0.69, 0.67], [0.6, 0.7, 0.74, 0.6]])
def test_advice_that_is_followed_decides(curve):
    """The same models measured again on as many prompts as were asked for: at least 80 % are decided."""
    decided = []
    for seed in range(60):
        true = np.array(curve) + 0.02 * np.random.default_rng(seed).standard_normal(len(curve))
        kl = np.arange(1.0, len(curve) + 1)
        asked = verdict_of(simulated(true, prompts=64, seed=seed)[0], kl).prompts_needed
        if asked is not None:
            decided.append(verdict_of(simulated(true, prompts=asked, seed=seed + 1000)[0], kl).finding != "underpowered")
    assert len(decided) > 5 and np.mean(decided) >= 0.8


def test_a_run_below_its_reference_has_fallen_from_the_start():
    verdict = judge(a_run(simulated([0.42, 0.40, 0.38, 0.35, 0.33, 0.30])[0]))
    assert verdict.finding == "over-optimised" and verdict.below_start
    assert verdict.fall == pytest.approx(0.20, abs=0.04)
    assert "from 0.50 (the untrained reference)" in verdict.sentence and verdict.sentence.endswith("keep the reference.")
    assert not judge(a_run(simulated([0.42, 0.40, 0.38, 0.35, 0.33, 0.30])[0], start=None)).below_start


def test_a_measured_reference_enters_prompt_by_prompt():
    """Against the data's responses: easy prompts are easy for both, so a small fall from the reference is seen."""
    rng = np.random.default_rng(0)
    reference = rng.choice([0.0, 0.25, 0.75, 1.0], 300)
    last = np.clip(reference - rng.choice([0.0, 0.25], 300, p=[0.7, 0.3]), 0, 1)
    wins, kl = np.stack([last, last, last]), np.array([1.0, 2.0, 3.0])
    known = float(reference.mean())
    assert verdict_of(wins, kl, known, start_wins=reference).finding in ("over-optimised", "worse")
    assert verdict_of(wins, kl, known).finding == "underpowered"


def test_a_peak_at_the_first_checkpoint():
    verdict = judge(a_run(simulated([0.78, 0.74, 0.68, 0.62, 0.57, 0.52])[0]))
    assert verdict.finding == "over-optimised" and verdict.peak == 0 and verdict.recommended == 0


def test_a_fall_without_more_kl_is_not_over_optimisation():
    verdict = judge(a_run(simulated(FALLING)[0], kl=[1, 8, 8, 7, 6, 5, 4, 3]))
    assert verdict.finding == "worse" and "but KL has not grown since then" in verdict.sentence
    assert verdict.prompts_needed is None


def test_three_checkpoints_are_enough_for_a_large_fall():
    assert judge(a_run(simulated([0.78, 0.60, 0.40])[0])).finding == "over-optimised"


def test_no_verdict():
    wins = simulated(FALLING)[0]
    none = {
        "2 checkpoints only; it needs 3 or more of one run": a_run(wins[:2]),
        "1 checkpoint only; it needs 3 or more of one run": a_run(wins[:1]),
        "3 prompts are too few; it needs at least 4": a_run(wins[:, :3]),
        "there is no scorer or judge, so no win rate": replace(a_run(wins), wins=None),
    }
    for why, run in none.items():
        assert judge(run) is None and why_none(run) == f"No verdict: {why}."
    for run in (a_run(wins[:3]), a_run(wins[:, :4])):
        assert judge(run) is not None and why_none(run) is None
    assert verdict_of(wins[:, :3], np.arange(8.0)) is None
    with pytest.raises(ValueError, match="shapes"):
        verdict_of(wins, np.arange(7.0))
    assert evaluation.verdict_of is verdict_of and evaluation.judge is judge
    with pytest.raises(AttributeError, match="nothing"):
        _ = evaluation.nothing


def test_equal_prompts_leave_the_bounce_alone():
    verdict = verdict_of(np.repeat(np.array(FALLING)[:, None], 10, axis=1), np.arange(8.0))
    assert verdict.fall == pytest.approx(0.22) and verdict.lower == pytest.approx(0.22) and verdict.finding == "over-optimised"


def test_a_shift_of_all_prompts_changes_nothing():
    wins = simulated(FALLING)[0]
    one, other = judge(a_run(wins)), judge(a_run(wins + 0.1, start=0.6))
    for name in ("fall", "lower", "upper", "bounce"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-9)
    assert (one.finding, one.peak, one.recommended) == (other.finding, other.peak, other.recommended)


def test_the_order_of_prompts_does_not_matter():
    wins = simulated(FALLING)[0]
    one, other = judge(a_run(wins)), judge(a_run(wins[:, ::-1]))
    assert (one.finding, one.peak, one.recommended, one.sentence) == (
        other.finding,
        other.peak,
        other.recommended,
        other.sentence,
    )
    assert one.fall == pytest.approx(other.fall) and one.lower == pytest.approx(other.lower, abs=0.005)
    assert judge(a_run(wins)) == one  # the same data, the same verdict


def test_what_is_kept_is_the_smallest_kl_of_the_equally_good():
    # The last three are the same to a hair: the first of them, at the smallest KL, is kept; where KL falls, the last.
    wins = np.tile(simulated([0.75])[0, 0], (5, 1))
    wins[0] = np.maximum(wins[0] - 0.5, 0)
    wins[1] = np.maximum(wins[1] - 0.25, 0)
    wins[4, :3] = [0.75, 0.75, 0.25]
    wins[2:4, :3] = 0.5
    verdict = judge(a_run(wins))
    assert verdict.recommended == 2  # and what it trades:
    trade = (
        "checkpoint-50 is higher by less than 0.01, but within one standard error, at 1.7 times the KL (5.0 against 3.0 nats)."
    )
    assert verdict.sentence.endswith(f"eep checkpoint-30: {trade}")
    assert judge(a_run(wins, kl=[5, 5, 5, 4, 3])).recommended == 4


@pytest.mark.parametrize(
    ("count", "bounce", "prompts", "naive_above"),
    [(8, 0.0, 384, 0.1), (8, 0.05, 384, 0.6), (3, 0.05, 512, 0.3), (4, 0.05, 64, 0.2), (6, 0.05, 128, 0.4)],
)
def test_false_alarms_on_flat_runs(count, bounce, prompts, naive_above):
    """At most 5 % (and two standard errors of 200 runs), where the naive paired test alarms far more often."""
    runs = simulated([0.75] * count, prompts=prompts, bounce=bounce, runs=200, seed=11)
    alarms = np.mean([verdict_of(run, np.arange(float(count))).finding == "over-optimised" for run in runs])
    gaps = [run[run.mean(axis=1).argmax()] - run[-1] for run in runs]
    naive = np.mean([gap.mean() > 1.645 * gap.std() / np.sqrt(gap.size) for gap in gaps])
    assert alarms <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200), f"{alarms:.1%} of flat runs called over-optimised"
    assert naive > naive_above, f"the naive test alarmed on {naive:.1%}"


@pytest.mark.parametrize(
    ("curve", "power"),
    [
        (FALLING, 0.9),
        (AT_ONCE, 0.9),
        ([0.63, 0.75, 0.60, 0.45], 0.95),
        ([0.63, 0.75, 0.65, 0.55], 0.75),
        ([0.60, 0.68, 0.72, 0.75, 0.75, 0.55], 0.8),
    ],
)
def test_power_on_falling_runs(curve, power):
    runs = simulated(curve, prompts=256, bounce=0.02, runs=100, seed=12)
    assert np.mean([verdict_of(run, np.arange(float(len(curve)))).finding == "over-optimised" for run in runs]) >= power


@pytest.mark.parametrize("curve", [[0.75] * 6, [0.72, 0.74, 0.75, 0.75, 0.75, 0.72], AT_ONCE])
def test_bounds_hold_for_what_they_say(curve):
    """Of 200 runs, the true fall to the last checkpoint lies above the lower bound and below the upper one in 95 % and more."""
    low = high = 0
    for seed in range(200):
        true = np.array(curve) + 0.02 * np.random.default_rng(seed).standard_normal(6)
        verdict = verdict_of(simulated(true, prompts=128, seed=seed)[0], np.arange(6.0))
        candidates = np.append(true[:-1], 0.5)
        low += verdict.lower <= candidates[-1 if verdict.below_start else verdict.peak] - true[-1] + 1e-9 or verdict.lower <= 0
        high += verdict.upper >= (candidates - true[-1]).max()
    assert low >= 184 and high >= 184  # 190 expected at the least; below 184 once in a hundred such tests


def test_a_reference_that_is_just_beaten_is_mostly_kept():
    """At a true 0.52 throughout, 64 prompts and 4 checkpoints show nothing: the reference is kept nearly always."""
    runs = simulated([0.52] * 4, prompts=64, runs=100, seed=3)
    kept = np.mean([verdict_of(run, np.arange(4.0)).keeps_reference for run in runs])
    assert 0.75 <= kept < 1


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
    assert law.peak_low < law.peak < law.peak_high  # prompts are all the same, but checkpoints bounce
    assert law.past_peak > 0.95


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
    kl = np.array([0.5, 1.0, 2.0, 4.0, 9.0, 16.0])
    law = fit_law([exact(a, 0.2, kl) for a in (0.2, 0.3, 0.4)])
    assert law.a == pytest.approx(0.3)
    assert law.peak_low < law.peak < law.peak_high
    assert law.peak_low < np.exp(0.25 / 0.2 - 1) and law.peak_high > np.exp(0.35 / 0.2 - 1)


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
    """A late fall: the fit has a peak among the checkpoints, and many of its draws have none."""
    kl = np.array([1.0, 2.0, 4.0, 9.0, 16.0])
    laws = [
        fit_law([a_run(simulated([0.55, 0.58, 0.62, 0.68, 0.55], prompts=60, seed=s)[0], kl=kl)], resamples=200)
        for s in range(30)
    ]
    open_ended = [law for law in laws if law.doubt is not None and "is open-ended" in law.doubt]
    assert open_ended and all(law.peak is None for law in open_ended)
    assert all((law.peak is None) == (law.doubt is not None) for law in laws)
    assert all(1 <= law.peak <= 4 and law.peak_high is not None for law in laws if law.peak is not None)


def test_nothing_is_recommended_that_is_not_shown_to_be_better():
    verdict = judge(a_run(simulated([0.50, 0.51, 0.50, 0.49, 0.50, 0.50], prompts=128)[0]))
    assert verdict.better is False and verdict.keeps_reference
    assert "No checkpoint is shown to be better than the reference (95 %)" in verdict.sentence
    assert verdict.sentence.endswith("keep the reference.") and "eep checkpoint" not in verdict.sentence
    found = judge(a_run(simulated(RISING)[0]))
    assert found.better is True and not found.keeps_reference and "o checkpoint" not in found.sentence


def test_one_checkpoint_that_is_shown_to_be_better_is_kept_though_its_neighbours_are_worse():
    """The reference was recommended once, for the smoothed curve lies below it, and `better` said the opposite."""
    verdict = judge(a_run(simulated([0.20, 0.58, 0.20, 0.20], prompts=800)[0]))
    assert verdict.better is True and verdict.recommended == 1 and not verdict.keeps_reference
    assert "eep checkpoint-2" in verdict.sentence and "keep the reference" not in verdict.sentence


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
    assert "(epoch-" in said and "(epoch-7), by" in said and "step" not in said
    assert "(checkpoint-80), by" in judge(a_run(wins)).sentence


def test_checkpoints_are_called_by_the_shortest_name_that_tells_them_apart():
    assert places_of(["/a/out/checkpoint-100", "/a/out/checkpoint-200"]) == ["checkpoint-100", "checkpoint-200"]
    assert places_of(["one/model", "two/model"], [4, 8]) == ["one/model, step 4", "two/model, step 8"]
    assert places_of(["out/checkpoint-100", "out/model", "epoch-3"], [100, 150, 200]) == [
        "checkpoint-100",
        "model, step 150",
        "epoch-3, step 200",
    ]


def test_a_higher_checkpoint_that_is_not_kept_is_told_with_what_it_costs():
    """Two prompts in 200 more, at three times the distance; where KL is nought, no ratio; and never a negative zero."""
    place = np.arange(200)
    wins = np.stack([place < 150, (place > 0) & (place < 151), (place > 2) & (place < 155)]).astype(float)
    trade = "checkpoint-3 is 0.01 higher, but within one standard error, at 3.0 times the KL (6.0 against 2.0 nats)."
    assert verdict_of(wins, np.array([2.0, 4.0, 6.0])).sentence.endswith(f"eep checkpoint-1: {trade}")
    said = verdict_of(wins, np.array([-0.004, 4.0, 6.0])).sentence
    assert said.endswith("at a larger KL (6.0 against 0.0 nats).")
