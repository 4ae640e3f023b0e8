"""The guard's test: values by hand, a resume that changes nothing, and how often it stops whom."""

import json

import numpy as np
import pytest

from isdaa.evaluation.verdict.sequential import ALPHA, FIRST, FallTest, evidence, share_of

FLAT = [0.75] * 20
FALLING = [0.65, 0.72, 0.75, 0.75] + [0.75 - 0.2 * k / 15 for k in range(1, 17)]
RISING = [0.5 + 0.27 * (1 - np.exp(-k / 6)) for k in range(1, 21)]


def simulated(curve, prompts=128, bounce=0.0, seed=0):
    """(L, N) win rates against four opponents around the true curve; prompts keep half of their own luck."""
    rng = np.random.default_rng(seed)
    curve = np.asarray(curve) + bounce * rng.standard_normal(len(curve))
    rates = curve[:, None] + 0.15 * (rng.standard_normal(prompts) + rng.standard_normal((len(curve), prompts)))
    return rng.binomial(4, np.clip(rates, 0, 1)) / 4


def stop_of(wins, **options):
    """Index of the look that stops the run, None where none does; KL grows."""
    test = FallTest(**options)
    return next((look for look, row in enumerate(wins) if test.update(row, float(look)).stop), None)


def test_the_shares_sum_to_alpha():
    assert sum(share_of(looks, 0.05) for looks in range(FIRST, 200_000)) == pytest.approx(0.05, rel=1e-3)
    assert share_of(FIRST) == pytest.approx(ALPHA / (FIRST + 1))


def test_the_fall_by_hand():
    # Looks 0 to 2 are candidates, (2, 1), (1, 2, 1) and (1, 2); now is the mean of the last three.
    means = np.array([0.6, 0.9, 0.6, 0.4, 0.3, 0.2])
    found = evidence(means, np.zeros((6, 6)), 100)
    assert found.peak == 1 and found.fall == pytest.approx(0.75 - 0.3)
    assert found.lower < found.fall


def test_a_falling_run_is_stopped_well_before_its_end():
    stop = stop_of(simulated(FALLING))
    assert stop is not None and 6 <= stop <= 16


def test_a_look_says_where_the_peak_was():
    test = FallTest()
    looks = [test.update(row, float(k)) for k, row in enumerate(simulated(FALLING))]
    assert [look.look for look in looks] == list(range(20))
    assert not any(look.stop for look in looks[: FIRST - 1]) and looks[0].lower == -np.inf
    assert looks[-1].stop and 1 <= looks[-1].peak <= 5 and looks[-1].fall == pytest.approx(0.18, abs=0.06)
    assert looks[-1].beyond


def test_no_stop_while_kl_does_not_grow():
    test = FallTest()
    assert not any(test.update(row, 5.0 - 0.1 * k).stop for k, row in enumerate(simulated(FALLING)))


def test_one_bad_look_stops_nothing():
    for at in range(4, 20):
        wins = simulated(FLAT, seed=at)
        wins[at] = np.maximum(wins[at] - 0.3, 0)
        assert stop_of(wins) is None


def test_patience_only_delays():
    wins = simulated(FALLING)
    stops = [stop_of(wins, patience=patience) for patience in (1, 2, 3)]
    assert stops[0] < stops[1] < stops[2]


def test_a_resume_changes_nothing():
    wins = simulated(FALLING)
    whole, first = FallTest(), FallTest()
    expected = [whole.update(row, float(k)) for k, row in enumerate(wins)]
    found = [first.update(row, float(k)) for k, row in enumerate(wins[:9])]
    second = FallTest()
    second.load_state(json.loads(json.dumps(first.state())))
    found += [second.update(row, float(k)) for k, row in enumerate(wins[9:], start=9)]
    assert found == expected


def test_a_state_is_a_copy():
    test = FallTest()
    test.update(np.array([0.0, 1.0]), 0.0)
    state = test.state()
    test.update(np.array([0.0, 1.0]), 1.0)
    assert len(state["wins"]) == 1


def test_the_order_of_prompts_and_a_shift_change_nothing():
    wins = simulated(FALLING)
    for changed in (wins[:, ::-1], wins + 0.1):
        one, other = FallTest(), FallTest()
        for k in range(20):
            first, second = one.update(wins[k], float(k)), other.update(changed[k], float(k))
            assert (first.stop, first.peak) == (second.stop, second.peak)
            assert first.fall == pytest.approx(second.fall) and first.standard_error == pytest.approx(second.standard_error)


def test_equal_prompts_need_no_special_case():
    assert stop_of(np.repeat(np.array(FLAT)[:, None], 5, axis=1)) is None


def test_wrong_arguments():
    test = FallTest()
    test.update(np.array([0.0, 1.0]), 0.0)
    with pytest.raises(ValueError, match="same prompts"):
        test.update(np.array([0.0, 1.0, 1.0]), 1.0)
    with pytest.raises(ValueError, match="finite"):
        test.update(np.array([0.0, np.nan]), 1.0)
    for wrong in ({"alpha": 0.0}, {"margin": -0.1}, {"patience": 0}):
        with pytest.raises(ValueError, match="need"):
            FallTest(**wrong)


@pytest.mark.parametrize(("curve", "bounce"), [(FLAT, 0.0), (FLAT, 0.02), (FLAT, 0.05), (RISING, 0.02)])
def test_healthy_runs_are_hardly_ever_stopped(curve, bounce):
    """At most 5 % (and two standard errors of 80 runs) over all twenty looks together."""
    stopped = np.mean([stop_of(simulated(curve, bounce=bounce, seed=seed)) is not None for seed in range(80)])
    assert stopped <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 80), f"{stopped:.1%} of healthy runs stopped"


def test_power():
    stops = [stop_of(simulated(FALLING, bounce=0.02, seed=seed)) for seed in range(40)]
    assert np.mean([stop is not None for stop in stops]) > 0.8
