"""Did a run over-optimise, where was its best checkpoint, and what law does its curve follow? (METHOD.md)

A win rate over checkpoints carries two noises. One comes from the prompts, and resampling them shows it. The other, the
*bounce*, comes from training: neighbouring checkpoints differ by more than their prompts explain, on all prompts together.
Who looks for the highest checkpoint finds a lucky one, so both noises also bias the fall. The prompts' share of that bias goes
by choosing the peak on one half of the prompts and measuring on the other. The bounce is common to both halves: its share is
taken off by drawing what the whole procedure finds on a flat run with this run's noises.

Legend: C checkpoints, N prompts, M draws, H splits into halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from isdaa.evaluation.trajectory import Trajectory

Finding = Literal["over-optimised", "not detected", "underpowered"]

MARGIN = 0.03  # a fall must be larger than this, with confidence, to be called one
NEGLIGIBLE = 0.05  # a fall smaller than this, with confidence, is called none
CONFIDENCE = 0.95  # of each one-sided bound
DRAWS = 1000
SPLITS = 8
# The bounce is estimated from few second differences. Runs measured so far bounced by 0.01 to 0.03, which is added as if it had
# been seen in a few second differences more: it steadies the estimate, and keeps it from zero, where there are hardly any.
USUAL_BOUNCE, USUAL_WEIGHT = 0.02, 2.0
MOST_PROMPTS, MOST_CHECKPOINTS = 20_000, 60  # nobody measures more: beyond, the answer is "cannot be decided so"


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
    below_start: bool = False  # the reference itself is above every checkpoint: the fall counts from there


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
        d = np.asarray(d, dtype=np.float64)
        value = d * (self.a - self.b * np.log(np.where(d > 0, d, 1.0)))
        return float(value) if value.ndim == 0 else value


@dataclass(frozen=True)
class Bounce:
    """Variance of the noise common to all prompts, from second differences; `mean_square` still holds the prompts' part."""

    mean_square: float
    prompts: float  # what prompts alone put into `mean_square`
    df: float  # degrees of freedom of `mean_square`

    @property
    def variance(self) -> float:
        """τ² ≥ 0."""
        return max(self.mean_square - self.prompts, 0.0)

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
    """The bounce of (C,) mean win rates whose prompts give them `covariance` (C, C).

    A second difference W[c−1] − 2W[c] + W[c+1] loses the trend and keeps 6τ² (von Neumann 1941 has first differences). A bend in
    the true curve stays in: the bounce is over-estimated then, never under. Degrees of freedom by Satterthwaite (1946), since
    second differences overlap.
    """
    second = np.diff(np.eye(len(means)), n=2, axis=0)
    trace = np.sum(second * second)
    mean_square = float(np.sum((second @ means) ** 2) / trace)
    noise = second @ covariance @ second.T
    prompts = float(np.trace(noise) / trace)
    spread = max(mean_square - prompts, 1e-8) * second @ second.T + noise
    df = float(np.trace(spread) ** 2 / np.sum(spread * spread))
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
        recommended=_keep(means, kl, covariance, bounce.variance),
        below_start=start is not None and bool(start > curve[offset:].max()),
        lower_by_bounce=float(np.quantile(steady, CONFIDENCE)),
        upper_by_bounce=highest(around_bounce) - fall,
    )


def verdict_of(
    wins: np.ndarray,
    kl: np.ndarray,
    start: float | None = 0.5,
    *,
    steps: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
    seed: int = 0,
) -> Verdict | None:
    """The verdict from (C, N) win rates and (C,) or (C, N) KL; None from fewer than 3 checkpoints or 4 prompts."""
    wins, kl = np.asarray(wins, dtype=np.float64), np.asarray(kl, dtype=np.float64)
    if wins.ndim != 2 or len(kl) != len(wins):
        raise ValueError(f"wins must be (C, N) and kl (C,) or (C, N), got shapes {wins.shape} and {kl.shape}")
    if len(wins) < 3 or wins.shape[1] < 4:
        return None
    kl = kl if kl.ndim == 1 else kl.mean(axis=1)
    found = measure(wins, kl, start, seed)
    beyond = found.below_start or bool(kl[-1] > kl[found.peak])
    finding: Finding = "underpowered"
    if found.lower > MARGIN and beyond:
        finding = "over-optimised"
    elif found.upper < NEGLIGIBLE:
        finding = "not detected"
    needs = _needs(found, *wins.shape) if finding == "underpowered" and found.lower <= MARGIN else (None, None)
    curve = smoothed(wins.mean(axis=1))
    steps = list(range(1, len(wins) + 1)) if steps is None else [int(step) for step in steps]
    labels = [f"checkpoint-{step}" for step in steps] if labels is None else labels
    sentence = _sentence(finding, found, curve, start, steps, labels, needs)
    return Verdict(
        finding,
        found.fall,
        found.standard_error,
        found.lower,
        found.upper,
        found.bounce,
        found.peak,
        found.recommended,
        *needs,
        sentence,
        found.below_start,
    )


def judge(run: Trajectory, *, seed: int = 0) -> Verdict | None:
    """The verdict on one run; None without win rates or with fewer than three checkpoints."""
    if run.wins is None:
        return None
    return verdict_of(run.wins, run.kl, run.start, steps=list(run.steps), labels=run.labels, seed=seed)


def _flat_falls(candidates: np.ndarray, common: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """(M,) cross-fitted falls of flat runs: (M, C) noise of all prompts, (H, M, C) by which the two halves differ from it."""
    noise, difference = common @ candidates.T, apart @ candidates.T
    return crossfit(noise + difference, noise - difference)[0].mean(axis=0)


def _keep(means: np.ndarray, kl: np.ndarray, covariance: np.ndarray, variance: float) -> int:
    """The checkpoint to keep: of those within one standard error of the best, the one of the smallest KL.

    What is kept is one checkpoint, its bounce included: that is noise to the trend, but a property of those weights. So each
    checkpoint is put between its own win rate and the smooth curve, nearer to its own the less of their difference the prompts
    explain (Efron & Morris 1973). The rule is that of Breiman et al. (1984, § 3.4.3): what cannot be told from the best is chosen for
    its other virtue, here a small KL: nearer to the reference, so less over-optimised by measures that nobody took, too.
    """
    weights = smoothing(len(means))
    rough = np.eye(len(means)) - weights
    prompts = np.einsum("ij,jk,ik->i", rough, covariance, rough)
    trust = variance / np.maximum(variance + prompts / np.maximum(np.sum(rough**2, axis=1), 1e-12), 1e-12)
    mixed = weights + trust[:, None] * rough
    quality = mixed @ means
    best = int(quality.argmax())
    contrasts = mixed - mixed[best]
    errors = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", contrasts, covariance, contrasts), 0.0))
    return int(np.where(quality[best] - quality <= errors, kl, np.inf).argmin())


def _root(covariance: np.ndarray) -> np.ndarray:
    """A with A·Aᵀ = covariance, also where checkpoints repeat each other."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0.0))


def _needs(found: Measured, checkpoints: int, prompts: int) -> tuple[int | None, int | None]:
    """(prompts at these checkpoints, checkpoints at these prompts) that would decide, were the fall what it seems to be.

    The nearer of the two findings is asked for. The square of a bound's distance is a bounce's part, which checkpoints shrink,
    plus a prompts' part, which goes with 1/N.
    """
    to_fall, to_none = found.fall - MARGIN, NEGLIGIBLE - found.fall
    if to_fall > to_none:
        target, now, floor = to_fall, found.fall - found.lower, found.lower_by_bounce
    else:
        target, now, floor = to_none, found.upper - found.fall, found.upper_by_bounce
    floor = min(max(floor, 0.0), now)
    by_prompts = now**2 - floor**2
    more: int | None = None
    if target > floor:
        wanted = int(np.ceil(prompts * by_prompts / (target**2 - floor**2)))
        more = max(wanted, prompts + 1) if wanted <= MOST_PROMPTS else None
    for count in range(checkpoints + 1, MOST_CHECKPOINTS + 1):
        if by_prompts + (floor * _reach(count) / _reach(checkpoints)) ** 2 < target**2:
            return more, count
    return more, None


@lru_cache(maxsize=64)
def _reach(checkpoints: int) -> float:
    """How far a bounce of 1 puts the bound away at so many checkpoints: its error in the smoothed ends times its t quantile."""
    from scipy.stats import t

    weights = smoothing(checkpoints)
    contrast = weights[checkpoints // 2] - weights[-1]
    df = bounce_of(np.zeros(checkpoints), np.zeros((checkpoints, checkpoints))).df
    return float(t.ppf(CONFIDENCE, df) * np.sqrt(np.sum(contrast**2)))


def _sentence(
    finding: Finding,
    found: Measured,
    curve: np.ndarray,
    start: float | None,
    steps: Sequence[int],
    labels: Sequence[str],
    needs: tuple[int | None, int | None],
) -> str:
    top, origin = curve[found.peak], f"at step {steps[found.peak]}"
    if found.below_start and start is not None:
        top, origin = start, "of the untrained reference"
    path = f"from {top:.2f} {origin} to {curve[-1]:.2f} at step {steps[-1]}"
    keep = f"keep {labels[found.recommended]}" if not found.below_start else "keep the reference"
    if finding == "over-optimised":
        return f"Over-optimised: win rate fell by {found.fall:.2f} (95 % lower bound {found.lower:.2f}), {path}; {keep}."
    if finding == "not detected":
        return f"Over-optimisation not detected: any fall to the last checkpoint is below {max(found.upper, 0.005):.2f}; {keep}."
    if found.lower > MARGIN:
        return f"Not decided: win rate fell by {found.fall:.2f}, {path}, but KL did not grow since; {keep}."
    wishes = [f"{needs[0]} prompts" if needs[0] else "", f"{needs[1]} checkpoints" if needs[1] else ""]
    ask = " or ".join(wish for wish in wishes if wish)
    ask = f"about {ask} would decide" if ask else "more prompts or checkpoints alone would not decide; train more seeds"
    return f"Underpowered: the fall may lie between {max(found.lower, 0.0):.2f} and {found.upper:.2f}; {ask}; for now {keep}."


def fit_law(runs: Sequence[Trajectory], *, resamples: int = 1000, seed: int = 0) -> Law | None:
    """The law through all checkpoints of the runs (one run, or one cell's seeds); None from fewer than four distinct KLs.

    Runs without win rates do not count.
    """
    scored = [(run.wins, run.kl, run.start or 0.0) for run in runs if run.wins is not None]
    return law_of(scored, resamples=resamples, seed=seed)


def law_of(runs: Sequence[tuple[np.ndarray, np.ndarray, float]], *, resamples: int = 1000, seed: int = 0) -> Law | None:
    """`fit_law` on (wins (C, N), kl (C, N), start) of each run.

    Prompts are resampled with win rate and KL of all checkpoints together; where there are several runs, runs are resampled too.
    The interval of d* is that of the draws that have a peak, with ∞ for those that have none.
    """
    runs = [(np.asarray(w, dtype=np.float64), np.asarray(k, dtype=np.float64), s) for w, k, s in runs]
    if not runs:
        return None
    d = np.concatenate([_root_kl(kl.mean(axis=1)) for _, kl, _ in runs])
    gain = np.concatenate([wins.mean(axis=1) - start for wins, _, start in runs])
    if len(np.unique(d[d > 0].round(9))) < 4:
        return None
    a, b = (float(value[0]) for value in _least_squares(d[None], gain[None]))
    peak = float(np.exp(a / b - 1)) if _peaked(a, b) else None
    law = Law(a, b, peak, b * peak if peak is not None else None)
    rmse = float(np.sqrt(np.mean((law(d) - gain) ** 2)))
    low, high, past = _law_interval(runs, resamples, seed)
    return Law(a, b, law.peak, law.height, low, high, past, rmse)


def _law_interval(
    runs: Sequence[tuple[np.ndarray, np.ndarray, float]], resamples: int, seed: int
) -> tuple[float | None, float | None, float]:
    """(low, high) of d*, None where it is 0 or ∞, and the share of draws whose last checkpoint lies beyond d*."""
    rng = np.random.default_rng(seed)
    ds, gains = [], []
    for wins, kl, start in runs:
        n = wins.shape[1]
        weights = rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n
        ds.append(_root_kl(weights @ kl.T))
        gains.append(weights @ wins.T - start)
    times = np.ones((resamples, len(runs)))
    if len(runs) > 1:
        times = rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=resamples)
    each = np.repeat(times, [d.shape[1] for d in ds], axis=1).astype(np.float64)
    a, b = _least_squares(np.concatenate(ds, axis=1), np.concatenate(gains, axis=1), each)
    with np.errstate(all="ignore"):
        peaks = np.where(b > 0, np.exp(np.clip(a / b - 1, -50, 50)), np.inf)
    last = (np.stack([d[:, -1] for d in ds], axis=1) * times).sum(axis=1) / times.sum(axis=1)
    low, high = np.quantile(peaks, [0.025, 0.975], method="nearest")
    return _finite(low), _finite(high), float(np.mean(last > peaks))


def _least_squares(d: np.ndarray, gain: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(M, P) points -> (M,) a and (M,) b of d·(a − b·log d), by the normal equations of two columns."""
    weights = np.ones_like(d) if weights is None else weights
    one, two = d, -d * np.log(np.where(d > 0, d, 1.0))
    aa, ab, bb = (np.sum(weights * x * y, axis=1) for x, y in ((one, one), (one, two), (two, two)))
    ya, yb = (np.sum(weights * x * gain, axis=1) for x in (one, two))
    determinant = aa * bb - ab**2
    with np.errstate(all="ignore"):
        a, b = (bb * ya - ab * yb) / determinant, (aa * yb - ab * ya) / determinant
    single = determinant <= 1e-12 * aa * bb  # one KL only: no bend can be told
    return np.where(single, ya / np.where(aa > 0, aa, 1.0), a), np.where(single, 0.0, b)


def _peaked(a: float, b: float) -> bool:
    return b > 0 and abs(a / b - 1) < 50


def _root_kl(kl: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(kl, 0.0))


def _finite(value: float) -> float | None:
    return float(value) if 1e-20 < value < 1e20 else None
