"""Bootstrap over prompts: by hand, by the textbook formula, and by counting false alarms."""

import numpy as np
import pytest

from isdaa.evaluation.statistics import bootstrap_means, difference_interval, mean_interval

pytestmark = pytest.mark.fast


def test_two_prompts_by_hand():
    """Two values: a resample's mean is 0, ½ or 1 with probability ¼, ½, ¼, so the 95 % interval is all of it."""
    means = bootstrap_means([0.0, 1.0], resamples=4000, seed=1)
    shares = [float((means == value).mean()) for value in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    interval = mean_interval([0.0, 1.0], seed=1)
    assert (interval.mean, interval.low, interval.high, interval.n) == (0.5, 0.0, 1.0, 2)


def test_close_to_the_normal_interval_for_many_prompts():
    values = np.random.default_rng(0).gamma(2.0, 3.0, size=2000)
    interval = mean_interval(values, resamples=4000, seed=2)
    error = values.std() / np.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_constant_values_one_prompt_and_wrong_input():
    constant = mean_interval([0.3] * 8)
    assert constant.low == constant.mean == constant.high
    single = mean_interval([2.0])
    assert (single.mean, single.low, single.high) == (2.0, None, None)
    for values in ([], [1.0, float("nan")], [[[1.0]]]):
        with pytest.raises(ValueError):
            bootstrap_means(values)
    with pytest.raises(ValueError):
        mean_interval([[1.0, 2.0]])
    with pytest.raises(ValueError, match="same prompts"):
        difference_interval([1.0, 2.0], [1.0])


def test_columns_are_resampled_together_and_the_seed_decides():
    values = np.random.default_rng(0).normal(size=(40, 2))
    both = bootstrap_means(values, resamples=1500, seed=3)
    assert both.shape == (1500, 2)
    np.testing.assert_allclose(both[:, 1], bootstrap_means(values[:, 1], resamples=1500, seed=3))
    assert not np.allclose(both, bootstrap_means(values, resamples=1500, seed=4))


def test_a_paired_difference_is_narrower_than_its_parts_where_prompts_decide():
    rng = np.random.default_rng(0)
    prompt = rng.normal(size=300)
    first, second = prompt + 0.1 * rng.normal(size=300), prompt + 0.1 * rng.normal(size=300)
    paired = difference_interval(first, second)
    alone = mean_interval(first)
    assert paired.high - paired.low < 0.3 * (alone.high - alone.low)


@pytest.mark.parametrize(("n", "alarms_allowed"), [(64, (0.03, 0.08)), (384, (0.03, 0.07))])
def test_false_alarms_at_95_percent(n: int, alarms_allowed: tuple[float, float]):
    """Per-prompt win rates against 4 samples whose true mean is ½: how often the interval leaves ½ out.

    At these seeds 5.5 % of 2000 experiments with 64 prompts and 4.7 % with 384 (5 % is what it says).
    """
    rng = np.random.default_rng(n)
    experiments = 2000
    values = rng.binomial(4, rng.beta(2, 2, size=(experiments, n))) / 4
    means = bootstrap_means(values.T, resamples=1000, seed=7)  # one column an experiment
    quantiles = np.quantile(means, [0.025, 0.975], axis=0)
    alarms = float(((quantiles[0] > 0.5) | (quantiles[1] < 0.5)).mean())
    print(f"{n} prompts: {100 * alarms:.1f} % false alarms")
    assert alarms_allowed[0] < alarms < alarms_allowed[1]
