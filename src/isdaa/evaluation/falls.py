"""The fall of a run from its peak, with what is uncertain about it: the arithmetic behind a verdict.

A win rate over checkpoints carries two noises. One comes from the prompts, and resampling them shows it. The other, the
*bounce*, comes from training: neighbouring checkpoints differ by more than their prompts explain, on all prompts together.
Who looks for the highest checkpoint finds a lucky one, so both noises also bias the fall. The prompts' share of that bias goes
by choosing the peak on one half of the prompts and measuring on the other. The bounce is common to both halves: its share is
taken off by drawing what the whole procedure finds on a flat run with this run's noises.

Legend: C checkpoints, N prompts, K candidates for the peak, M draws, H splits into halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CONFIDENCE = 0.95  # of each one-sided bound
DRAWS = 1000
SPLITS = 8
# The bounce is estimated from few second differences. 0.02 (the runs measured so far bounced by 0.01 to 0.03) is added as if it
# had been seen in a few more: it steadies the estimate where there are hardly any, and keeps it from zero.
USUAL_BOUNCE, USUAL_WEIGHT = 0.02, 2.0


@dataclass(frozen=True)
class Bounce:
    """Variance of the noise common to all prompts, from second differences; `mean_square` still holds the prompts' part."""

    mean_square: np.ndarray
    prompts: np.ndarray  # what prompts alone put into `mean_square`
    df: np.ndarray  # degrees of freedom of `mean_square`

    @property
    def variance(self) -> np.ndarray:
        """τ² ≥ 0."""
        return np.maximum(self.mean_square - self.prompts, 0.0)

    def draws(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """(size,) variances that fit what was seen: χ² turned round, as a t quantile does it, prompts taken off after."""
        scale = self.df / (2 * np.maximum(rng.standard_gamma(self.df / 2, size), 1e-12))
        return np.maximum(self.mean_square * scale - self.prompts, 0.0)


@dataclass(frozen=True)
class Measured:
    """A verdict's numbers, before words."""

    fall: float
    standard_error: float
    lower: float
    upper: float
    bounce: float
    peak: int
    recommended: int
    below_start: bool
    lower_by_bounce: float  # fall − lower, and upper − fall, had there been infinitely many prompts
    upper_by_bounce: float


@lru_cache(maxsize=64)
def smoothing(checkpoints: int) -> np.ndarray:
    """(C, C) weights, rows sum to 1: triangular over the neighbours (1, 2, 1), wider from 16 checkpoints on.

    At the ends the missing neighbours' weight goes to those that are there: (2, 1). One checkpoint is left alone.
    """
    width = max(1, checkpoints // 8)
    steps = np.arange(checkpoints)
    weights = np.maximum(width + 1.0 - np.abs(steps[:, None] - steps), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    weights.setflags(write=False)
    return weights


def smoothed(values: np.ndarray) -> np.ndarray:
    """(C,) or (C, N) checkpoints × prompts, smoothed over neighbouring checkpoints."""
    values = np.asarray(values, dtype=np.float64)
    return smoothing(len(values)) @ values


def bounce_of(means: np.ndarray, covariance: np.ndarray) -> Bounce:
    """The bounce of (..., C) mean win rates whose prompts give them `covariance` (..., C, C).

    A second difference W[c−1] − 2W[c] + W[c+1] loses the trend and keeps 6τ² (von Neumann 1941 has first differences). A bend in
    the true curve stays in: the bounce is over-estimated then, never under. Degrees of freedom by Satterthwaite (1946), since
    second differences overlap.
    """
    second = np.diff(np.eye(means.shape[-1]), n=2, axis=0)
    trace = np.sum(second * second)
    mean_square = np.sum((means @ second.T) ** 2, axis=-1) / trace
    noise = second @ covariance @ second.T
    prompts = np.trace(noise, axis1=-2, axis2=-1) / trace
    spread = np.maximum(mean_square - prompts, 1e-8)[..., None, None] * (second @ second.T) + noise
    df = np.trace(spread, axis1=-2, axis2=-1) ** 2 / np.sum(spread * spread, axis=(-2, -1))
    total = df + USUAL_WEIGHT
    return Bounce((df * mean_square + USUAL_WEIGHT * (USUAL_BOUNCE**2 + prompts)) / total, prompts, total)


def crossfit(curves: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(..., K) candidates on both halves, the last of them the last checkpoint -> falls (...,), both ways round averaged.

    Also returns the (..., 2) candidates that each half chose.
    """
    first, second = curves.argmax(axis=-1), others.argmax(axis=-1)
    fall_first = np.take_along_axis(others, first[..., None], -1)[..., 0] - others[..., -1]
    fall_second = np.take_along_axis(curves, second[..., None], -1)[..., 0] - curves[..., -1]
    return (fall_first + fall_second) / 2, np.stack([first, second], axis=-1)


def measure(wins: np.ndarray, kl: np.ndarray, start: float | None, seed: int = 0) -> Measured:
    """The numbers of a verdict from (C, N) win rates and (C,) mean KL.

    Candidates for the peak are the C checkpoints, smoothed, and the reference, which is known exactly and not smoothed.
    lower: the fall less the 95 % quantile of the falls that the same procedure finds on flat runs with the same noises, which is
    the least favourable case. upper: the largest of the candidates' own upper bounds: "no candidate lies 0.05 above the last" is
    an intersection-union test (Berger 1982) and needs no correction for their number.
    """
    rng = np.random.default_rng(seed)
    count, n = wins.shape
    candidates = np.vstack([np.zeros((int(start is not None), count)), smoothing(count)])  # (K, C)
    level = np.zeros(len(candidates))
    level[: len(candidates) - count] = start or 0.0
    means = wins.mean(axis=1)
    covariance = np.cov(wins) / n
    bounce = bounce_of(means, covariance)

    halves = np.zeros((SPLITS, n))
    for row in halves:
        row[rng.permutation(n)[: n // 2]] = 1.0
    sums = halves @ wins.T  # (H, C)
    one, other = sums / (n // 2), (n * means - sums) / (n - n // 2)
    falls, chosen = crossfit(one @ candidates.T + level, other @ candidates.T + level)
    fall = float(falls.mean())
    curve = candidates @ means + level
    gaps = curve - curve[-1]

    factor = _root(covariance)
    shared = np.sqrt(bounce.draws(rng, DRAWS))[:, None] * rng.standard_normal((DRAWS, count))  # (M, C)
    prompts = rng.standard_normal((DRAWS, count)) @ factor.T
    apart = rng.standard_normal((2, DRAWS, count)) @ factor.T
    flat = _flat_falls(candidates, shared + prompts, apart)
    steady = _flat_falls(candidates, shared, np.zeros((1, 1, count)))
    around, around_bounce = (shared + prompts) @ candidates.T, shared @ candidates.T

    def highest(noise: np.ndarray) -> float:
        return float(np.max(gaps + np.quantile(noise - noise[:, -1:], CONFIDENCE, axis=0)))

    contrasts = candidates - candidates[-1]
    errors = np.sqrt(np.sum((contrasts @ factor) ** 2, axis=1) + bounce.variance * np.sum(contrasts**2, axis=1))
    share = np.bincount(chosen.ravel(), minlength=len(candidates)) / chosen.size
    contrast = share @ contrasts
    error = float(np.sqrt(np.sum((contrast @ factor) ** 2) + bounce.variance * np.sum(contrast**2)))
    offset = len(candidates) - count
    peak = int(curve[offset:].argmax())
    return Measured(
        fall=fall,
        standard_error=error if error > 0 else float(errors[:-1][gaps[:-1].argmax()]),
        lower=fall - float(np.quantile(flat, CONFIDENCE)),
        upper=max(fall, highest(around)),
        bounce=float(np.sqrt(bounce.variance)),
        peak=peak,
        recommended=_keep(means, kl, covariance),
        below_start=start is not None and bool(start > curve[offset:].max()),
        lower_by_bounce=float(np.quantile(steady, CONFIDENCE)),
        upper_by_bounce=highest(around_bounce) - fall,
    )


def _flat_falls(candidates: np.ndarray, common: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """(M,) cross-fitted falls of flat runs: (M, C) noise of all prompts, (H, M, C) by which the two halves differ from it."""
    noise, difference = common @ candidates.T, apart @ candidates.T
    return crossfit(noise + difference, noise - difference)[0].mean(axis=0)


def _keep(means: np.ndarray, kl: np.ndarray, covariance: np.ndarray) -> int:
    """The checkpoint to keep: of those within one standard error of the best, the one of the smallest KL.

    Not smoothed, and prompts alone make the error: what is kept is one checkpoint with its bounce, which is noise to the trend
    but a property of those weights. The rule is that of Breiman et al. (1984, § 3.4.3): what cannot be told from the best is
    chosen for its other virtue, here a small KL: nearer to the reference, so less over-optimised by measures nobody took, too.
    """
    best = int(means.argmax())
    errors = np.sqrt(np.maximum(covariance[best, best] + np.diag(covariance) - 2 * covariance[best], 0.0))
    return int(np.where(means[best] - means <= errors, kl, np.inf).argmin())


def _root(covariance: np.ndarray) -> np.ndarray:
    """A with A·Aᵀ = covariance, also where checkpoints repeat each other."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0.0))
