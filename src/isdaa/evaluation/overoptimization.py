"""Did a run over-optimise, where was its best checkpoint, and what law does its curve follow? (METHOD.md)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from isdaa.evaluation.trajectory import Trajectory

Finding = Literal["over-optimised", "not detected", "underpowered"]


@dataclass(frozen=True)
class Verdict:
    """What can be said of one run. All win rates in [0, 1]; falls are positive where the run got worse."""

    finding: Finding
    fall: float  # smoothed peak − smoothed last, cross-fitted over the two halves of the prompts
    standard_error: float  # of `fall`, prompts and bounce together
    lower: float  # one-sided 95 % bounds of `fall`
    upper: float
    bounce: float  # standard deviation of a checkpoint around the smooth curve, beyond what its prompts explain
    peak: int  # index of the checkpoint where the smoothed curve over all prompts is highest
    recommended: int  # index of the checkpoint to keep
    prompts_needed: int | None  # where underpowered: prompts (at these checkpoints) that would decide; None if they cannot
    checkpoints_needed: int | None  # where underpowered: checkpoints (at these prompts) that would decide
    sentence: str  # verdict and recommended checkpoint, for people


@dataclass(frozen=True)
class Law:
    """R(d) = d·(a − b·log d) (Gao et al. 2023, arXiv 2210.10760) with d = √KL, R the win rate's gain over the reference."""

    a: float
    b: float
    peak: float | None  # d* = exp(a/b − 1); None where b ≤ 0
    height: float | None  # b·d*
    peak_low: float | None = None  # 95 % interval of d* by bootstrap over prompts, or over seeds where there are several
    peak_high: float | None = None
    past_peak: float | None = None  # share of bootstrap draws in which the last checkpoint lies beyond d*
    rmse: float = 0.0  # of the fit

    def __call__(self, d: Any) -> Any:
        """R(d); 0 at d = 0."""
        raise NotImplementedError


def judge(run: Trajectory, *, seed: int = 0) -> Verdict | None:
    """The verdict on one run; None without win rates or with fewer than three checkpoints."""
    raise NotImplementedError


def fit_law(runs: Sequence[Trajectory], *, resamples: int = 1000, seed: int = 0) -> Law | None:
    """The law through all checkpoints of the runs (one run, or one cell's seeds); None from fewer than four distinct KLs."""
    raise NotImplementedError


def smoothed(values: np.ndarray) -> np.ndarray:
    """(C,) or (C, N) checkpoints × prompts, smoothed over neighbouring checkpoints."""
    raise NotImplementedError
