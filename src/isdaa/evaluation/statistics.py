"""Means with bootstrap intervals. Prompts are resampled, each with everything that belongs to it.

Pure functions of numbers and a seed. The same seed resamples the same prompts, so intervals of two checkpoints on the
same prompts differ by their scores alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

Numbers = Sequence[float] | np.ndarray

# Resamples drawn at once: bounds memory at 16 MB per thousand prompts.
_BLOCK = 1000


@dataclass(frozen=True)
class Interval:
    """A mean over `n` prompts and its two-sided bootstrap interval; no bounds where one prompt gives none."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def to_json(self) -> dict[str, Any]:
        """`{"mean", "low", "high", "n"}`."""
        return asdict(self)


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, and what it is on each resample (R,): equal seeds and prompts make those paired."""

    interval: Interval
    draws: np.ndarray

    @property
    def value(self) -> float:
        """The number itself, on all prompts."""
        return self.interval.mean

    def to_json(self) -> dict[str, Any]:
        """`{"mean", "low", "high", "n"}`: the draws can be made again from the records."""
        return self.interval.to_json()

    def minus(self, other: Estimate, confidence: float = 0.95) -> Estimate:
        """The paired difference, of figures over the same prompts in the same order, drawn with the same seed.

        Either may lack a value of some of them: n is the smaller.
        """
        if self.draws.shape != other.draws.shape:
            raise ValueError("a paired difference needs the same prompts and resamples")
        draws = self.draws - other.draws
        n = min(self.interval.n, other.interval.n)
        return Estimate(percentiles(self.value - other.value, draws, n, confidence), draws)


def bootstrap_means(values: Numbers, *, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Means of `resamples` draws with replacement of the N prompts.

    values: (N,) or (N, M), one row a prompt; the M columns are resampled together, which keeps them paired.
    Returns (resamples,) or (resamples, M) float64.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim not in (1, 2) or len(values) == 0:
        raise ValueError(f"values must be (N,) or (N, M) with N > 0, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("values must be finite")
    n = len(values)
    # How often each prompt is drawn is all that a mean needs: one matrix product serves all columns.
    return np.concatenate([counts @ values / n for counts in bootstrap_counts(n, resamples=resamples, seed=seed)])


def bootstrap_counts(n: int, *, resamples: int = 1000, seed: int = 0, block: int = _BLOCK) -> Iterator[np.ndarray]:
    """How often each of `n` prompts is drawn, (block, n) resamples at a time; the block's size changes no draw."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)


def percentiles(value: float, draws: np.ndarray, n: int, confidence: float = 0.95) -> Interval:
    """A figure over `n` prompts with the percentile interval of its `draws` (R,); no bounds where one prompt gives none."""
    if n < 2:
        return Interval(value, None, None, n)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(value, float(low), float(high), n)


def mean_estimate(
    values: Numbers, weights: Numbers | None = None, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Σ weights·values / Σ weights over N prompts; one of weight 0 is drawn like any other, adds nothing, is not in n.

    values: (N,); weights: (N,), 1 by default. Resamples in which all weights are 0 take the figure itself.
    """
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    total = weights.sum()
    if values.ndim != 1 or weights.shape != values.shape or not total > 0:
        raise ValueError(f"values {values.shape} and weights {weights.shape} must be (N,), some weight above 0")
    mean = float(weights @ values / total)
    sums = bootstrap_means(np.stack([weights * (values - mean), weights], axis=1), resamples=resamples, seed=seed)
    draws = mean + np.divide(sums[:, 0], sums[:, 1], out=np.zeros(len(sums)), where=sums[:, 1] > 0)
    return Estimate(percentiles(mean, draws, int(np.count_nonzero(weights)), confidence), draws)


def mean_interval(values: Numbers, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Mean of (N,) values, one a prompt, with its percentile bootstrap interval (Efron & Tibshirani 1993, ch. 13).

    From about 50 prompts on it covers as often as it says, to a percent or two; below, it is somewhat too narrow.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"values must be (N,), got shape {values.shape}")
    mean = float(np.mean(values)) if len(values) else 0.0
    # Differences from the mean, so that equal values have an interval of width zero in spite of rounding.
    spread = bootstrap_means(values - mean, resamples=resamples, seed=seed)
    if len(values) < 2:
        return Interval(mean, None, None, len(values))
    tail = (1 - confidence) / 2
    low, high = np.quantile(spread, [tail, 1 - tail])
    return Interval(mean, mean + float(low), mean + float(high), len(values))


def share_interval(hits: Numbers, groups: Sequence[Any], confidence: float = 0.95) -> Interval:
    """Share of N trials that hit, by Wilson's interval (Wilson 1927), which holds for few trials and shares near 0 and 1.

    hits: (N,) in [0, 1]. groups: (N,) what each trial belongs to (its prompt): trials of one group count for fewer where they
    go together (the design effect, Kish 1965). Returns the interval with n = N.
    """
    values = np.asarray(hits, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or len(groups) != len(values):
        raise ValueError(f"hits must be (N,) with N > 0 and one group each, got {values.shape} and {len(groups)}")
    n, share = len(values), float(np.mean(values))
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    sums = np.bincount([number[group] for group in groups], weights=values - share)
    plain = share * (1 - share) * n * n / max(n - 1, 1)
    clustered = float(sums @ sums) * len(sums) / max(len(sums) - 1, 1)
    effective = n / max(clustered / plain, 1) if plain > 0 and len(sums) > 1 else len(sums)
    effective = min(max(effective, 1), n)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = (share + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * math.sqrt(share * (1 - share) / effective + z * z / (4 * effective**2))
    return Interval(share, max(middle - half, 0.0), min(middle + half, 1.0), n)


def fewest(confidence: float) -> int:
    """How many prompts must speak for the same side before chance is ruled out: what a two-sided sign test needs, 6 at 95 %.

    Prompts on which both sides are equal do not count. With fewer, a bootstrap interval may not reach zero all the same (of
    100 prompts with 4 wins and 96 draws, say): it takes the wins for certain, and would tell apart what chance does.
    """
    return 1 + math.ceil(-math.log2(1 - confidence))


def difference_interval(
    first: Numbers, second: Numbers, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of `first − second` over the same N prompts, both (N,), with its interval: two checkpoints compared."""
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a paired difference needs the same prompts, got shapes {first.shape} and {second.shape}")
    return mean_interval(first - second, resamples=resamples, confidence=confidence, seed=seed)
