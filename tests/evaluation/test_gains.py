"""Is any checkpoint better than the reference? False alarms counted, power, pairing, and what cannot be asked."""

import numpy as np
import pytest

from isdaa.evaluation.verdict.fall_statistics import gains_shown

pytestmark = pytest.mark.fast


def drawn(gain: float, count: int, prompts: int, seed: int, kept: float = 0.7) -> np.ndarray:
    """(C, N) win rates against four answers of the reference; prompts keep a share of their luck in all checkpoints."""
    rng = np.random.default_rng(seed)
    luck = np.sqrt(kept) * rng.standard_normal(prompts) + np.sqrt(1 - kept) * rng.standard_normal((count, prompts))
    return (luck[:, :, None] + gain > rng.standard_normal((prompts, 4))).mean(axis=-1)


@pytest.mark.parametrize("count, prompts", [(1, 30), (8, 30), (20, 100)])
def test_of_runs_that_are_as_good_as_the_reference_few_are_called_better(count, prompts):
    found = [gains_shown(drawn(0.0, count, prompts, seed), 0.5, seed=seed).any() for seed in range(200)]
    assert sum(found) <= 20  # 5 % expected; the chance of more than 10 % is below one in a thousand


def test_a_gain_is_shown_and_only_where_it_is():
    wins = drawn(0.0, 6, 300, 1)
    wins[3] = drawn(0.6, 1, 300, 2)[0]
    assert list(np.flatnonzero(gains_shown(wins, 0.5))) == [3]
    assert not gains_shown(1 - wins[[3, 3]], 0.5).any()


def test_many_candidates_need_more_than_one():
    """What one checkpoint alone would show, the best of twenty does not."""
    for seed in range(40):
        wins = drawn(0.0, 20, 100, seed, kept=0.0)
        one = wins.mean(axis=1).argmax()
        if gains_shown(wins[[one]], 0.5).all():
            assert not gains_shown(wins, 0.5)[one] or wins[one].mean() > 0.58
            return
    raise AssertionError("none of forty runs had a lucky checkpoint")


def test_it_is_paired_with_the_reference_prompt_by_prompt():
    """Against the data's responses both are far below ½, and easy prompts are easy for both."""
    rng = np.random.default_rng(3)
    reference = rng.choice([0.0, 0.25, 0.5], 200)
    wins = np.clip(reference + rng.choice([0.0, 0.0, 0.1], (2, 200)), 0, 1)
    assert gains_shown(wins, float(reference.mean()), reference).all()
    assert not gains_shown(wins, 0.5).any()
    assert not gains_shown(np.stack([reference, reference]), float(reference.mean()), reference).any()


def test_few_prompts_show_nothing_however_they_lie():
    assert not gains_shown(np.ones((1, 4)), 0.5).any()  # four heads in a row
    assert gains_shown(np.ones((1, 5)), 0.5).all() and not gains_shown(np.ones((20, 5)), 0.5).any()
    draws = np.full((1, 100), 0.5)
    draws[0, :4] = 1.0  # 96 draws say nothing
    assert not gains_shown(draws, 0.5).any()
    assert not gains_shown(np.ones((3, 1)), 0.5).any() and gains_shown(np.ones((3, 9)), None) is None
