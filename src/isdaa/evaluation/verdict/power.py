"""Which fall of the win rate can be seen with so many checkpoints (or measurements) and prompts: asked before a run.

A fall is seen where the verdict, or the guard, finds it in `POWER` of all runs. What prompts differ by is taken from simulated
judges of 1 to 8 opponents whose prompts correlate by ½ between checkpoints, as in measured runs.
Legend: C checkpoints, N prompts, L looks, R simulated runs.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist

import numpy as np

from isdaa.evaluation.verdict.fall_statistics import CONFIDENCE, MARGIN, T_DRAWS
from isdaa.evaluation.verdict.sequential import stops_at

POWER = 0.8
BOUNCE = 0.02  # of the simulated runs
RUNS = 100
LOOKS = (6, 8, 12, 16, 24, 40)
FALLS = (0.1, 0.15, 0.2, 0.3)


def difference_variance(opponents: int) -> float:
    """Of a prompt's win rates at two checkpoints, judged against the same opponents."""
    return 0.09 + 0.13 / opponents


@lru_cache(maxsize=64)
def smallest_fall(checkpoints: int, prompts: int, opponents: int = 4) -> float:
    """The smallest fall from one checkpoint to the last, or from the reference, that the verdict shows; rounded up to 0.01.

    The bound is the largest of C correlated t values (`fall_statistics.simultaneous`): all falls share the last
    checkpoint.
    """
    rng = np.random.default_rng(0)
    normal = (rng.standard_normal((T_DRAWS, checkpoints)) + rng.standard_normal((T_DRAWS, 1))) / np.sqrt(2)
    spread = np.sqrt((prompts - 1) / rng.chisquare(prompts - 1, T_DRAWS))
    critical = np.quantile(normal.max(axis=1) * spread, CONFIDENCE)
    error = np.sqrt(difference_variance(opponents) / prompts)
    return float(np.ceil(100 * (MARGIN + (critical + NormalDist().inv_cdf(POWER)) * error)) / 100)


def seen(checkpoints: int, prompts: int, opponents: int = 4, what: str = "checkpoint") -> str:
    """`6 checkpoints and 256 prompts: falls of 0.10 or more are seen in 8 of 10 runs`."""
    words = f"{checkpoints} {what}{'s' * (checkpoints != 1)} and {prompts} prompt{'s' * (prompts != 1)}"
    if checkpoints < 3 or prompts < 4:
        return f"{words}: too few for a verdict, which needs 3 {what}s and 4 prompts"
    fall = smallest_fall(checkpoints, prompts, opponents)
    return f"{words}: falls of {fall:.2f} or more are seen in 8 of 10 runs" if fall < 0.5 else f"{words}: hardly any fall is seen"


@lru_cache(maxsize=64)
def looks_needed(prompts: int, opponents: int = 4) -> dict[float, int | None]:
    """Fall -> looks that a run must have for the guard to stop it, where it falls by so much half-way; of `LOOKS`."""
    return {fall: next((looks for looks in LOOKS if _stopped(fall, looks, prompts, opponents) >= POWER), None) for fall in FALLS}


def stoppable(looks: int, prompts: int, opponents: int = 4) -> str:
    """`8 measurements on 128 prompts stop 8 of 10 runs whose win rate falls by 0.20 half-way and stays there`."""
    needed = looks_needed(prompts, opponents)
    words = f"{looks} measurement{'s' * (looks != 1)} on {prompts} prompts"
    found = [fall for fall, least in needed.items() if least is not None and least <= looks]
    others = [f"{fall:.2f} needs {least}" for fall, least in needed.items() if least is not None and least > looks]
    more = f"; a fall of {', of '.join(others)}" if others else ""
    if not found:
        return f"{words} stop hardly any run{more} (lower guard.steps or raise guard.prompts)"
    return f"{words} stop 8 of 10 runs whose win rate falls by {found[0]:.2f} half-way and stays there{more}"


def _stopped(fall: float, looks: int, prompts: int, opponents: int) -> float:
    """The share of R runs that fall by so much half-way which `FallTest` stops."""
    rng = np.random.default_rng(looks)
    covariance = (np.eye(looks) + 1) * difference_variance(opponents) / 2 / prompts
    means = rng.standard_normal((RUNS, looks)) @ np.linalg.cholesky(covariance).T + BOUNCE * rng.standard_normal((RUNS, looks))
    means -= fall * (np.arange(looks) >= looks // 2)
    return float(np.mean(stops_at(means, covariance, prompts) < looks))
