"""Is this run past its peak? A test for a guard that looks at a run while it trains, and may stop it.

Whoever looks twenty times at a healthy run, each time at 5 %, stops it sooner or later. Here each look has its own, ever smaller
share of 5 %: the chance that a healthy run is EVER stopped is what stays small. `benchmarks/verdict_calibration.py` measures it.

Pure numpy and scipy, no model: legend N prompts, L looks so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri, stdtr, stdtrit

from isdaa.evaluation.verdict.fall_statistics import BOUNCES, MARGIN, bounce_of

RECENT = 3  # looks that "now" is the mean of: one bad checkpoint is not a fall
ALPHA = 0.05  # the chance to ever stop a healthy run
PATIENCE = 2  # looks in a row that find a fall before a run is stopped
FIRST = RECENT + 2  # looks needed before the first test: the recent ones and two to have fallen from


@dataclass(frozen=True)
class Look:
    """What one look says. Win rates in [0, 1]; a fall is positive."""

    stop: bool  # past the peak: at this look and enough looks before it
    look: int  # index of this look
    peak: int  # index of the look that the fall counts from
    fall: float  # smoothed peak − mean of the recent looks
    standard_error: float  # prompts and bounce together
    lower: float  # bound of the fall at this look's share of ALPHA; −∞ where there is no test yet
    beyond: bool  # recent KL above the peak's


@dataclass(frozen=True)
class Evidence:
    """Of one look at each of ... runs: arrays (...)."""

    peak: np.ndarray
    fall: np.ndarray
    standard_error: np.ndarray
    lower: np.ndarray


class FallTest:
    """Looks at one run, one after another, on the same held-out prompts.

    A look stops the run where the fall's lower bound is above `margin` and KL beyond the peak's, at `patience` looks in a row.
    """

    def __init__(self, *, alpha: float = ALPHA, margin: float = MARGIN, patience: int = PATIENCE) -> None:
        if not 0 < alpha < 1 or margin < 0 or patience < 1:
            raise ValueError(f"need 0 < alpha < 1, margin ≥ 0, patience ≥ 1, got {alpha}, {margin}, {patience}")
        self.alpha, self.margin, self.patience = alpha, margin, patience
        self.wins: list[np.ndarray] = []  # (N,) a look
        self.kl: list[float] = []
        self.warnings = 0  # looks in a row, up to now, that found a fall

    def update(self, wins: np.ndarray, kl: float) -> Look:
        """The next look: (N,) win rates of the prompts, always the same ones, and their mean KL from the reference."""
        wins = np.asarray(wins, dtype=np.float64)
        if wins.ndim != 1 or len(wins) < 2 or (self.wins and len(wins) != len(self.wins[0])):
            raise ValueError(f"wins must be (N,) on the same prompts at every look, N ≥ 2, got shape {wins.shape}")
        if not (np.isfinite(wins).all() and np.isfinite(kl)):
            raise ValueError("wins and kl must be finite")
        self.wins.append(wins.copy())
        self.kl.append(float(kl))
        look = len(self.wins) - 1
        if len(self.wins) < FIRST:
            return Look(False, look, int(np.argmax([row.mean() for row in self.wins])), 0.0, 0.0, -np.inf, False)
        table = np.stack(self.wins)
        found = evidence(table.mean(axis=1), np.cov(table) / table.shape[1], table.shape[1], self.alpha)
        peak = int(found.peak)
        beyond = float(np.mean(self.kl[-RECENT:])) > self.kl[peak]
        self.warnings = self.warnings + 1 if float(found.lower) > self.margin and beyond else 0
        fall, error, lower = float(found.fall), float(found.standard_error), float(found.lower)
        return Look(self.warnings >= self.patience, look, peak, fall, error, lower, beyond)

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, as plain data for JSON."""
        return {"wins": [row.tolist() for row in self.wins], "kl": list(self.kl), "warnings": self.warnings}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state()`."""
        self.wins = [np.array(row, dtype=np.float64) for row in state["wins"]]
        self.kl = [float(value) for value in state["kl"]]
        self.warnings = int(state["warnings"])


def evidence(means: np.ndarray, covariance: np.ndarray, prompts: int, alpha: float = ALPHA) -> Evidence:
    """The fall to now from the best of the looks before, with its bound at this look's share of `alpha`.

    means: (..., L) win rates. covariance: (..., L, L), of those means over `prompts` prompts.

    Now is the mean of the last RECENT looks. A candidate for the peak is a look before those, smoothed with the neighbours
    (1, 2, 1) that lie before them too. Of all candidates the one of the largest bound counts, its error taken for
    a normal one.
    """
    looks = means.shape[-1]
    contrasts = _contrasts(looks)
    falls = means @ contrasts.T  # (..., K)
    noise = np.broadcast_to(np.sum((contrasts @ covariance) * contrasts, axis=-1), falls.shape)
    likely = bounce_of(means, covariance)
    size = np.sum(contrasts**2, axis=1)
    alpha = share_of(looks, alpha)
    error = np.sqrt(noise + (likely @ BOUNCES**2)[..., None] * size)
    peak = (falls - ndtri(1 - alpha) * error).argmax(axis=-1)
    fall, error, noise = (np.take_along_axis(x, peak[..., None], -1)[..., 0] for x in (falls, error, noise))
    # Each bounce that is possible has an error of its own: the bound is a quantile of their mixture, found by bisection.
    errors = np.sqrt(noise[..., None] + size[peak][..., None] * BOUNCES**2)
    low, high = np.zeros_like(fall), stdtrit(prompts - 1, 1 - alpha) * errors[..., -1]
    for _ in range(30):
        middle = (low + high) / 2
        beyond = np.sum(likely * stdtr(prompts - 1, -middle[..., None] / np.maximum(errors, 1e-300)), axis=-1) > alpha
        low, high = np.where(beyond, middle, low), np.where(beyond, high, middle)
    return Evidence(peak, fall, error, fall - high)


def stops_at(means: np.ndarray, covariance: np.ndarray, prompts: int) -> np.ndarray:
    """(R,) the look at which `FallTest` stops each of R runs whose KL grows from look to look; L where it never does.

    means: (R, L) win rates. covariance: (R, L, L) or (L, L), as `evidence` takes it.
    """
    runs, looks = means.shape
    warnings, stop = np.zeros(runs, dtype=int), np.full(runs, looks)
    for seen in range(FIRST, looks + 1):
        found = evidence(means[:, :seen], covariance[..., :seen, :seen], prompts)
        # KL grows, so the recent looks lie beyond any peak before them.
        warnings = np.where(found.lower > MARGIN, warnings + 1, 0)
        stop = np.where((warnings >= PATIENCE) & (stop == looks), seen - 1, stop)
    return stop


def share_of(looks: int, alpha: float = ALPHA) -> float:
    """The share of alpha of the look that is the `looks`-th: alpha·F/(L·(L+1)), which sums to alpha·F/F over L = F, F+1, …"""
    return alpha * FIRST / (looks * (looks + 1))


def _contrasts(looks: int) -> np.ndarray:
    """(K, L) candidate less now, K = L − RECENT."""
    before = looks - RECENT
    steps = np.arange(before)
    weights = np.maximum(2.0 - np.abs(steps[:, None] - steps), 0.0)
    contrasts = np.zeros((before, looks))
    contrasts[:, :before] = weights / weights.sum(axis=1, keepdims=True)
    contrasts[:, before:] = -1 / RECENT
    return contrasts
