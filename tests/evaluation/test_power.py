"""What is said to be seen beforehand, against what is seen."""

from pathlib import Path

import numpy as np
import pytest

from isdaa.config import load_config
from isdaa.evaluation.verdict.overoptimization import verdict_of
from isdaa.evaluation.verdict.power import looks_needed, seen, smallest_fall, stoppable
from isdaa.evaluation.verdict.sequential import FallTest

pytestmark = pytest.mark.fast


def judged(curve, prompts, runs, seed):
    """(R, C, N) win rates against four samples of the reference; prompts correlate by ½ between checkpoints."""
    rng = np.random.default_rng(seed)
    rivals, own = rng.standard_normal((runs, 1, prompts, 4)), rng.standard_normal((runs, len(curve), prompts))
    lasting = rng.standard_normal((runs, 1, prompts))
    strength = np.array([0.9539 if rate == 0.75 else 2**0.5 * _normal(rate) for rate in curve])
    score = strength[:, None] + np.sqrt(0.5) * (lasting + own)
    return (score[..., None] > rivals).mean(axis=-1)


def _normal(rate):
    from statistics import NormalDist

    return NormalDist().inv_cdf(rate)


@pytest.mark.parametrize("checkpoints, prompts", [(3, 128), (6, 256), (12, 64)])
def test_the_fall_that_is_promised_is_seen_in_eight_of_ten_runs(checkpoints, prompts):
    """Of 100 runs between 70 and 97: the differences of prompts are assumed, not known."""
    fall = smallest_fall(checkpoints, prompts)
    curve = [0.6] * (checkpoints - 2) + [0.75, 0.75 - fall]
    found = [verdict_of(run, np.arange(1.0, checkpoints + 1)).finding for run in judged(curve, prompts, 100, checkpoints)]
    assert 70 <= sum(finding in ("over-optimised", "worse") for finding in found) <= 97


def test_more_of_everything_sees_smaller_falls():
    assert smallest_fall(6, 1024) < smallest_fall(6, 256) < smallest_fall(12, 256) < smallest_fall(12, 64)
    assert smallest_fall(6, 64, 8) < smallest_fall(6, 64) < smallest_fall(6, 64, 1)
    assert seen(6, 256) == f"6 checkpoints and 256 prompts: falls of {smallest_fall(6, 256):.2f} or more are seen in 8 of 10 runs"
    assert "needs 3" in seen(2, 256) and "4 prompts" in seen(5, 1) and "hardly any" in seen(6, 4)


def test_a_guard_of_few_looks_says_that_it_cannot_stop():
    needed = looks_needed(128)
    assert list(needed) == [0.1, 0.15, 0.2, 0.3] and 6 <= needed[0.3] <= needed[0.2] <= needed[0.15]
    few = stoppable(5, 128)
    assert "5 measurements on 128 prompts stop hardly any run" in few and f"0.20 needs {needed[0.2]}" in few
    assert "stop 8 of 10 runs whose win rate falls by 0.20" in stoppable(needed[0.2], 128)


def test_the_looks_that_are_asked_for_stop_the_run():
    looks = looks_needed(128)[0.2]
    curve = [0.75] * (looks // 2) + [0.55] * (looks - looks // 2)
    stopped = 0
    for run in judged(curve, 128, 60, 1):
        test = FallTest()
        stopped += any(test.update(row, float(look)).stop for look, row in enumerate(run))
    assert stopped >= 42  # 48 expected at the least; fewer than 42 in two of a hundred such tests


@pytest.mark.parametrize(
    "config, checkpoints",
    [
        ("config.yaml", 10),
        ("configs/mini/demo.yaml", 6),
        ("configs/tldr/align.yaml", 12),
        ("configs/instruct/ultrafeedback.yaml", 12),
    ],
)
def test_what_is_shipped_sees_a_fall_of_015(config, checkpoints):
    judged = load_config(Path(__file__).parents[2] / config, {}).evaluation
    assert smallest_fall(checkpoints, judged.prompts, judged.opponent_samples) <= 0.15
