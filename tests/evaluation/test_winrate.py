"""Win rates worked by hand, ties included."""

import numpy as np
import pytest

from isdaa.evaluation.checkpoints.win_rate import own_win_rates, tie_rate, win_rates

pytestmark = pytest.mark.fast

OPPONENTS = [[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0], [5.0, 5.0, 0.0, 5.0]]


def test_by_hand():
    policy = [2.0, 1.0, 4.0]
    # 2 beats 0 and 1, ties with 2, loses to 3; 1 ties four times; 4 beats one of four.
    assert win_rates(policy, OPPONENTS).tolist() == [2.5 / 4, 0.5, 0.25]
    assert win_rates(policy, OPPONENTS, ties="loss").tolist() == [0.5, 0.0, 0.25]
    assert tie_rate(policy, OPPONENTS) == 5 / 12


def test_one_opponent_and_several_policy_samples():
    assert win_rates([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]).tolist() == [0.0, 0.5, 1.0]
    # 0 and 3 against 1 and 3: lose, lose, win, tie.
    assert win_rates([[0.0, 3.0]], [[1.0, 3.0]]).tolist() == [1.5 / 4]


def test_the_two_sides_add_up_to_one():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 4, size=(20, 3)), rng.integers(0, 4, size=(20, 5))
    np.testing.assert_allclose(win_rates(first, second) + win_rates(second, first), 1)


def test_a_policy_against_itself():
    assert own_win_rates(OPPONENTS).tolist() == [0.5] * 3
    # Ordered pairs of different samples: 6 of 12 are wins; all ties; the three 5s each beat the 0.
    assert own_win_rates(OPPONENTS, ties="loss").tolist() == [0.5, 0.0, 3 / 12]
    assert own_win_rates([[1.0], [2.0]]).tolist() == [0.5, 0.5]
    assert own_win_rates([[1.0], [2.0]], ties="loss") is None


def test_wrong_input():
    for policy, opponents in (([1.0], [[1.0], [2.0]]), ([], []), ([float("inf")], [1.0]), ([[[1.0]]], [1.0])):
        with pytest.raises(ValueError):
            win_rates(policy, opponents)
