"""The fall of a run from its peak, with what is uncertain about it: the arithmetic behind a verdict.

A win rate over checkpoints carries two noises. One comes from the prompts, and resampling them shows it. The other, the
*bounce*, comes from training: neighbouring checkpoints differ by more than their prompts explain, on all prompts together.
Who looks for the highest checkpoint finds a lucky one, so both noises also bias the fall. The prompts' share of that bias goes
by choosing the peak on one half of the prompts and measuring on the other. The bounce is common to both halves: its share is
taken off by drawing what the whole procedure finds on a flat run with this run's noises.

Many runs fall at once and stay down. Two things keep such a fall visible. A checkpoint is smoothed with those before it only:
smoothed with those after it, a peak of one checkpoint would hold a part of the fall already. And the bounce leaves out the one
bend or step down that explains most of it: else the fall itself would be taken for noise. Both let luck through as well, which
is why each draw goes through the same steps, its bounce estimated anew: what is compared is the fall over its estimated error.

Legend: C checkpoints, N prompts, K candidates for the peak, M draws, H splits into halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from isdaa.evaluation.statistics import fewest

CONFIDENCE = 0.95  # of each one-sided bound
DRAWS = 1000
GAIN_DRAWS = 4000  # of the largest of several t values
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
    better: bool | None  # whether some checkpoint is shown to be better than the reference; None where that cannot be asked
    by_bounce: float  # the share of the error's square that the bounce makes, so that more prompts leave it


@lru_cache(maxsize=64)
def smoothing(checkpoints: int) -> np.ndarray:
    """(C, C) weights, rows sum to 1: a checkpoint and the one before it (2, 1), wider from 12 checkpoints on.

    Those after it have no part. The last, which every fall counts to, reaches back by one more (3, 2, 1): no peak lies there to
    be flattened. Where there is nothing before, the weight goes to what is there; the first is left alone.
    """
    width = np.full((checkpoints, 1), max(1, checkpoints // 6))
    width[-1] += 1
    steps = np.arange(checkpoints)
    back = steps[:, None] - steps
    weights = np.where(back >= 0, np.maximum(width + 1.0 - back, 0.0), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    weights.setflags(write=False)
    return weights


def smoothed(values: np.ndarray) -> np.ndarray:
    """(C,) or (C, N) checkpoints × prompts, each smoothed with those before it."""
    values = np.asarray(values, dtype=np.float64)
    return smoothing(len(values)) @ values


def bounce_of(means: np.ndarray, covariance: np.ndarray, *, bend: bool = False) -> Bounce:
    """The bounce of (..., C) mean win rates whose prompts give them `covariance` (..., C, C).

    A second difference W[c−1] − 2W[c] + W[c+1] loses the trend and keeps 6τ² (von Neumann 1941 has first differences). A bend in
    the true curve stays in: the bounce is over-estimated then, never under. Degrees of freedom by Satterthwaite (1946), since
    second differences overlap. bend: leave out the bend or step down that explains most, if there are 5 checkpoints or more.
    """
    second = np.diff(np.eye(means.shape[-1]), n=2, axis=0)
    overlap, noise = second @ second.T, second @ covariance @ second.T
    trace = np.trace(overlap)
    differences = means @ second.T
    squares = np.sum(differences**2, axis=-1)
    prompts = np.trace(noise, axis1=-2, axis2=-1) / trace
    left = fewer = 1.0
    if bend and len(second) > 2:
        squares, (left, fewer) = squares - _bent(differences), _after_a_bend(len(second))
    mean_square = squares / (left * trace)
    common = np.maximum(mean_square - prompts, 1e-8)
    # ‖common·overlap + noise‖², term by term.
    spread = (
        common**2 * np.sum(overlap**2) + 2 * common * np.sum(overlap * noise, axis=(-2, -1)) + np.sum(noise**2, axis=(-2, -1))
    )
    df = fewer * (trace * (common + prompts)) ** 2 / spread
    total = df + USUAL_WEIGHT
    return Bounce((df * mean_square + USUAL_WEIGHT * (USUAL_BOUNCE**2 + prompts)) / total, prompts, total)


def _bent(differences: np.ndarray) -> np.ndarray:
    """(..., D) second differences -> (...,) the largest part of their squares that one bend or step of a fall explains.

    A curve that bends down at a checkpoint has one second difference below 0. A step down makes one below and the next above 0;
    right after the first checkpoint, the one above 0 alone.
    """
    steps = (differences[..., 1:] - differences[..., :-1]) / np.sqrt(2)
    best = np.maximum(np.maximum(-differences.min(axis=-1), steps.max(axis=-1)), differences[..., 0])
    return np.maximum(best, 0.0) ** 2


@lru_cache(maxsize=64)
def _after_a_bend(differences: int) -> tuple[float, float]:
    """The shares of the squares and of their degrees of freedom that `_bent` leaves of a bounce without any bend, on average."""
    means = np.random.default_rng(0).standard_normal((10_000, differences + 2))
    values = np.diff(means, n=2)
    whole = np.sum(values**2, axis=1)
    rest = whole - _bent(values)
    return float(rest.mean() / whole.mean()), float(rest.mean() ** 2 / rest.var() * whole.var() / whole.mean() ** 2)


def crossfit(curves: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(..., K) candidates on both halves, the last of them the last checkpoint -> falls (...,), both ways round averaged.

    Also returns the (..., 2) candidates that each half chose.
    """
    first, second = curves.argmax(axis=-1), others.argmax(axis=-1)
    fall_first = np.take_along_axis(others, first[..., None], -1)[..., 0] - others[..., -1]
    fall_second = np.take_along_axis(curves, second[..., None], -1)[..., 0] - curves[..., -1]
    return (fall_first + fall_second) / 2, np.stack([first, second], axis=-1)


def measure(
    wins: np.ndarray, kl: np.ndarray, start: float | None, seed: int = 0, start_wins: np.ndarray | None = None
) -> Measured:
    """The numbers of a verdict from (C, N) win rates and (C,) mean KL. start_wins: as `gains_shown` takes them.

    Candidates for the peak are the C checkpoints, smoothed, and the reference, which is known exactly and not smoothed.
    lower: the fall less the 95 % quantile of the falls that the same procedure finds on flat runs with the same noises, which is
    the least favourable case. Quantiles are of falls over estimated errors (bootstrap-t, Efron & Tibshirani 1993, § 12.5),
    so that a draw whose bounce looks small because its luck was taken for a step counts as what it is.
    upper: the largest of the candidates' own upper bounds: "no candidate lies 0.05 above the last" is an intersection-union test
    (Berger 1982) and needs no correction for their number.
    """
    rng = np.random.default_rng(seed)
    count, n = wins.shape
    candidates = np.vstack([np.zeros((int(start is not None), count)), smoothing(count)])  # (K, C)
    level = np.zeros(len(candidates))
    level[: len(candidates) - count] = start or 0.0
    means = wins.mean(axis=1)
    covariance = np.cov(wins) / n
    bounce = bounce_of(means, covariance, bend=True)

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
    contrasts = candidates - candidates[-1]
    size, by_prompts = np.sum(contrasts**2, axis=1), np.sum((contrasts @ factor) ** 2, axis=1)
    shared = np.sqrt(bounce.draws(rng, DRAWS))[:, None] * rng.standard_normal((DRAWS, count))  # (M, C)
    own = rng.standard_normal((DRAWS, count)) @ factor.T
    apart = rng.standard_normal((2, DRAWS, count)) @ factor.T

    noise = shared + own
    drawn = bounce_of(noise, covariance, bend=True).variance[:, None]
    here, there = (np.sqrt(by_prompts + v * size + 1e-18)[..., :-1] for v in (bounce.variance, drawn))  # the last has no fall
    flat = _flat_falls(candidates, noise, apart) / there.max(axis=1)
    highest = gaps[:-1] + here * np.quantile((noise @ contrasts.T)[:, :-1] / there, CONFIDENCE, axis=0)
    share = np.bincount(chosen.ravel(), minlength=len(candidates)) / chosen.size
    if share[-1] == 1.0:  # both halves choose the last: the error is that of the candidate next to it
        share = np.eye(len(candidates))[gaps[:-1].argmax()]
    contrast = share @ contrasts
    error = float(np.sqrt(np.sum((contrast @ factor) ** 2) + bounce.variance * np.sum(contrast**2)))
    offset = len(candidates) - count
    shown = gains_shown(wins, start, start_wins, seed)
    peak = int(curve[offset:].argmax())
    return Measured(
        fall=fall,
        standard_error=error,
        lower=fall - float(here.max() * np.quantile(flat, CONFIDENCE)),
        upper=max(fall, 0.0, float(highest.max())),
        bounce=float(np.sqrt(bounce.variance)),
        peak=peak,
        recommended=_keep(means, kl, covariance, shown),
        below_start=start is not None and bool(start > curve[offset:].max()),
        better=None if shown is None else bool(shown.any()),
        by_bounce=float(bounce.variance * size[here.argmax()] / here.max() ** 2),
    )


def _flat_falls(candidates: np.ndarray, common: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """(M,) cross-fitted falls of flat runs: (M, C) noise of all prompts, (H, M, C) by which the two halves differ from it."""
    noise, difference = common @ candidates.T, apart @ candidates.T
    return crossfit(noise + difference, noise - difference)[0].mean(axis=0)


def gains_shown(wins: np.ndarray, start: float | None, start_wins: np.ndarray | None = None, seed: int = 0) -> np.ndarray | None:
    """(C,) whether each checkpoint of (C, N) win rates is shown to be better than the reference; None where `start` is.

    start: the reference's own win rate. start_wins: the same prompt by prompt, (N,), where it was measured and not known.
    Paired over prompts: a one-sided 95 % lower bound of the gain above 0, for all checkpoints at once (the largest of C
    correlated t values, Hothorn et al. 2008), and as many prompts with a gain or loss as a sign test needs at that level. The
    bounce has no part in it: it belongs to the weights that would be kept.
    """
    if start is None:
        return None
    gaps = wins - (start if start_wins is None else start_wins)
    count, n = gaps.shape
    if n < 2:
        return np.zeros(count, dtype=bool)
    covariance = np.atleast_2d(np.cov(gaps)) / n
    errors = np.sqrt(np.diag(covariance)) + 1e-12
    rng = np.random.default_rng(seed)
    spread = np.sqrt((n - 1) / np.maximum(rng.chisquare(n - 1, GAIN_DRAWS), 1e-12))
    drawn = (rng.standard_normal((GAIN_DRAWS, count)) @ _root(covariance / np.outer(errors, errors)).T).max(axis=1) * spread
    enough = np.count_nonzero(gaps, axis=1) >= fewest(1 - 2 * (1 - CONFIDENCE) / count)
    return np.asarray((gaps.mean(axis=1) > np.quantile(drawn, CONFIDENCE) * errors) & enough)


def _keep(means: np.ndarray, kl: np.ndarray, covariance: np.ndarray, shown: np.ndarray | None) -> int:
    """The checkpoint to keep: of those within one standard error of the best, the one of the smallest KL.

    Not smoothed, and prompts alone make the error: what is kept is one checkpoint with its bounce, which is noise to the trend
    but a property of those weights. The rule is that of Breiman et al. (1984, § 3.4.3): what cannot be told from the best is
    chosen for its other virtue, here a small KL: nearer to the reference, so less over-optimised by measures nobody took, too.
    shown: where some checkpoints are shown to be better than the reference, only they are asked.
    """
    asked = shown if shown is not None and shown.any() else np.ones(len(means), dtype=bool)
    best = int(np.where(asked, means, -np.inf).argmax())
    errors = np.sqrt(np.maximum(covariance[best, best] + np.diag(covariance) - 2 * covariance[best], 0.0))
    return int(np.where(asked & (means[best] - means <= errors), kl, np.inf).argmin())


def _root(covariance: np.ndarray) -> np.ndarray:
    """A with A·Aᵀ = covariance, also where checkpoints repeat each other."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0.0))
