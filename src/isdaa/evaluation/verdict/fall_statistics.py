"""The fall of a run to its last checkpoint, with what is uncertain about it: the arithmetic behind a verdict.

Two questions are asked of the same numbers.

*Is the last checkpoint worse than an earlier one, or than the reference?* It is about these models: prompts are all that is
uncertain, and every figure is a raw win rate, paired over prompts.

*Is that more than checkpoints bounce?* It is about the run. Neighbouring checkpoints differ by more than their prompts explain,
on all prompts together, so the highest of several lies above the last even where nothing falls. The bounce is estimated from
second differences of the curve, without the one bend or step down that explains most of them: else a fall would be taken for
noise. That lets luck through, which is why each draw of a flat run has its bounce estimated anew. From fewer than five
checkpoints nothing can be estimated, and the largest bounce that is allowed for is assumed.

Legend: C checkpoints, N prompts, R rows (the reference, where it is known, then the checkpoints), K candidates, M draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import gammaln, stdtrit

from isdaa.evaluation.statistics import fewest

CONFIDENCE = 0.95  # of each one-sided bound
MARGIN = 0.03  # a fall must be larger than this, with confidence, to be called one
NEGLIGIBLE = 0.05  # a fall smaller than this, with confidence, is called none
DRAWS, T_DRAWS = 1000, 4000
ENOUGH = 5  # checkpoints from which the bounce is estimated
# Bounces that are thought possible, beforehand as likely as the root of their size: who takes a bounce for too small takes it for
# a fall. Runs measured so far bounced by 0.01 to 0.03. Where it is estimated, a fall must exceed what flat runs show by SLACK.
BOUNCES, SLACK = np.linspace(0.01, 0.05, 5), 0.015
# Of advice: from fewer prompts nothing can be foreseen, nobody measures more, and the chance that following it decides.
FEWEST_PROMPTS, MOST_PROMPTS, DECIDES = 32, 20_000, 0.9


@dataclass(frozen=True)
class Measured:
    """A verdict's numbers, before words. Falls are to the last checkpoint, raw."""

    fall: float  # from the peak; 0 where nothing lies above the last
    lower: float  # of that fall, for all candidates at once
    upper: float  # of the fall from any candidate
    beyond_bounce: bool  # whether it is more than checkpoints bounce
    bounce: float
    peak: int  # checkpoint, of the largest lower bound where that is above MARGIN, else the highest
    recommended: int
    below_start: bool  # the fall counts from the reference
    better: bool | None  # whether some checkpoint is shown to be better than the reference; None where that cannot be asked
    best_shown: bool  # whether the checkpoint of the highest win rate is (True where that cannot be asked)
    prompts_needed: int | None  # that would decide whether the last is worse, if some number would


def rows_of(wins: np.ndarray, start: float | None, start_wins: np.ndarray | None) -> np.ndarray:
    """(R, N): the reference's own win rates, where they are known, above those of the (C, N) checkpoints."""
    if start is None:
        return wins
    return np.vstack([np.full(wins.shape[1], start) if start_wins is None else start_wins, wins])


def measure(
    wins: np.ndarray, kl: np.ndarray, start: float | None, seed: int = 0, start_wins: np.ndarray | None = None
) -> Measured:
    """The numbers of a verdict from (C, N) win rates and (C,) mean KL. start_wins: as `gains_shown` takes them."""
    rows = rows_of(wins, start, start_wins)
    offset = len(rows) - len(wins)
    gaps = rows[:-1] - rows[-1]  # (K, N)
    falls, means = gaps.mean(axis=1), wins.mean(axis=1)
    lowers, critical = simultaneous(gaps, seed)
    uppers = falls + above(gaps)
    worse = bool(lowers.max() > MARGIN)
    candidate = int(lowers.argmax()) if worse else int(falls.argmax()) if falls.max() > 0 else len(falls)
    lasting, bounce = beyond_bounce(rows, offset, seed)
    shown = gains_shown(wins, start, start_wins, seed)
    upper = float(np.clip(uppers.max(), 0.0, 1.0))
    below = candidate < offset
    return Measured(
        fall=float(np.append(falls, 0.0)[candidate]),
        lower=float(np.clip(np.append(lowers, 0.0)[candidate], -1.0, 1.0)),
        upper=upper,
        beyond_bounce=lasting,
        bounce=bounce,
        peak=int(means.argmax()) if below else candidate - offset,
        recommended=_keep(means, kl, np.cov(wins) / wins.shape[1], shown),
        below_start=below,
        better=None if shown is None else bool(shown.any()),
        best_shown=shown is None or bool(shown[means.argmax()]),
        prompts_needed=None if worse or upper < NEGLIGIBLE else prompts_needed(rows, offset, critical, seed),
    )


def falls_for_sure(rows: np.ndarray, seed: int = 0) -> bool:
    """Whether both answers are yes for (R, N) win rates, the reference's first: worse at the end, by more than a bounce."""
    return bool(simultaneous(rows[:-1] - rows[-1], seed)[0].max() > MARGIN) and beyond_bounce(rows, 1, seed)[0]


def simultaneous(gaps: np.ndarray, seed: int = 0) -> tuple[np.ndarray, float]:
    """(K, N) paired differences -> (K,) one-sided 95 % lower bounds of their means, all at once, and the t value they are of.

    That is the largest of K correlated t values (Hothorn et al. 2008). Where fewer prompts have a difference than a sign test
    needs at that level, no bound lies above 0. An error is at least 2/N: what lost on each of N prompts may win on 3/N of all.
    """
    count, n = gaps.shape
    if n < 2:
        return np.full(count, -1.0), np.inf
    covariance = np.atleast_2d(np.cov(gaps)) / n
    errors = np.sqrt(np.diag(covariance)) + 1e-12
    rng = np.random.default_rng(seed)
    spread = np.sqrt((n - 1) / np.maximum(rng.chisquare(n - 1, T_DRAWS), 1e-12))
    drawn = (rng.standard_normal((T_DRAWS, count)) @ _root(covariance / np.outer(errors, errors)).T).max(axis=1) * spread
    critical = float(np.quantile(drawn, CONFIDENCE))
    lowers = gaps.mean(axis=1) - critical * np.maximum(errors, 2 / n)
    enough = np.count_nonzero(gaps, axis=1) >= fewest(1 - 2 * (1 - CONFIDENCE) / count)
    return np.where(enough, lowers, np.minimum(lowers, 0.0)), critical


def above(gaps: np.ndarray) -> np.ndarray:
    """(K, N) paired differences -> (K,) how far each one's own 95 % upper bound lies above its mean.

    "No candidate lies 0.05 above the last" is an intersection-union test (Berger 1982): no correction for their number.
    A score bound (Wilson 1927): were the mean larger by δ, more prompts would differ, and add δ times the size of a difference to
    the variance. So that prompts without any difference do not bound it by 0.
    """
    largest = np.abs(gaps).max(axis=1)
    return _score(gaps.std(axis=1, ddof=1), np.where(largest > 0, largest, 1.0), gaps.shape[1])


def _score(deviation: np.ndarray, size: np.ndarray, n: int) -> np.ndarray:
    """How far a score bound over n prompts lies above the mean. deviation: of a prompt's difference; size: of the largest."""
    t = float(stdtrit(n - 1, CONFIDENCE))
    half = t**2 * size / (2 * n)
    return half + np.sqrt(half**2 + t**2 * deviation**2 / n)


def beyond_bounce(rows: np.ndarray, offset: int, seed: int = 0) -> tuple[bool, float]:
    """Whether some fall to the last row is more than runs with this bounce show where nothing falls; and the bounce's √τ².

    rows: (R, N), the first `offset` of them the reference, which does not bounce. Falls are raw and, where the bounce is
    estimated, smoothed too; the largest t value counts (max-T), against those of drawn flat runs.
    """
    rng = np.random.default_rng(seed)
    count = len(rows) - offset
    means, covariance = rows.mean(axis=1), np.cov(rows) / rows.shape[1]
    weights = [np.eye(len(rows))]
    if count >= ENOUGH:
        weights.append(np.eye(len(rows)))
        weights[1][offset:, offset:] = smoothing(count)
    contrasts = np.vstack([(row - row[-1])[:-1] for row in weights])  # (K, R)
    moves = np.arange(len(rows)) >= offset
    own = covariance[offset:, offset:]
    likely = bounce_of(means[offset:], own)
    factor = _root(covariance)
    size, by_prompts = contrasts**2 @ moves, np.sum((contrasts @ factor) ** 2, axis=1)

    shared = rng.choice(BOUNCES, DRAWS, p=likely)[:, None] * rng.standard_normal((DRAWS, len(rows))) * moves
    noise = shared + rng.standard_normal((DRAWS, len(rows))) @ factor.T
    drawn = bounce_of(noise[:, offset:], own)
    here, there = (np.sqrt(by_prompts + np.multiply.outer(p @ BOUNCES**2, size) + 1e-18) for p in (likely, drawn))
    largest = (noise @ contrasts.T / there).max(axis=1)
    lower = contrasts @ means - np.quantile(largest, CONFIDENCE) * here
    return bool(lower.max() > (SLACK if count >= ENOUGH else 0.0)), float(np.sqrt(likely @ BOUNCES**2))


def bounce_of(means: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """(..., C) mean win rates, whose prompts give them `covariance` (..., C, C) -> (..., 5) how likely each of `BOUNCES` is.

    A second difference W[c−1] − 2W[c] + W[c+1] loses the trend and keeps 6τ² (von Neumann 1941 has first differences). The bend
    or step down that explains most is left out; what else bends stays in, so that the bounce is over-estimated then, never
    under. Their mean square is taken for a χ², with the degrees of freedom of Satterthwaite (1946), since they overlap. From
    fewer than `ENOUGH` checkpoints nothing is learnt, and the largest bounce is assumed.
    """
    if means.shape[-1] < ENOUGH:
        return np.broadcast_to(BOUNCES[-1] == BOUNCES, (*means.shape[:-1], len(BOUNCES))).astype(np.float64)
    second = np.diff(np.eye(means.shape[-1]), n=2, axis=0)
    overlap, noise = second @ second.T, second @ covariance @ second.T
    trace = np.trace(overlap)
    differences = means @ second.T
    left, fewer = _after_a_bend(len(second))
    square = (np.sum(differences**2, axis=-1) - _bent(differences)) / left  # trace times the mean square
    by_prompts, both, own = (np.sum(x * noise, axis=(-2, -1))[..., None] for x in (np.eye(len(second)), overlap, noise))
    expected = trace * BOUNCES**2 + by_prompts
    # ‖τ²·overlap + noise‖², term by term.
    spread = BOUNCES**4 * np.sum(overlap**2) + 2 * BOUNCES**2 * both + own
    df = fewer * expected**2 / spread
    x = np.maximum(df * square[..., None] / expected, 1e-12)
    chances = (df / 2 - 1) * np.log(x) - x / 2 - df / 2 * np.log(2) - gammaln(df / 2)  # the density of a χ²
    likely = np.exp(chances - chances.max(axis=-1, keepdims=True)) * df / expected * np.sqrt(BOUNCES)
    return np.asarray(likely / likely.sum(axis=-1, keepdims=True))


def _bent(differences: np.ndarray) -> np.ndarray:
    """(..., D) second differences -> (...,) the largest part of their squares that one bend or step of a fall explains.

    A curve that bends down at a checkpoint has one second difference below 0. A step down makes one below and the next above 0;
    right after the first checkpoint, the one above 0 alone.
    """
    steps = (differences[..., 1:] - differences[..., :-1]) / np.sqrt(2)
    best = np.maximum(np.maximum(-differences.min(axis=-1), steps.max(axis=-1)), differences[..., 0])
    found: np.ndarray = np.maximum(best, 0.0) ** 2
    return found


@lru_cache(maxsize=64)
def _after_a_bend(differences: int) -> tuple[float, float]:
    """The shares of the squares and of their degrees of freedom that `_bent` leaves of a bounce without any bend, on average."""
    means = np.random.default_rng(0).standard_normal((10_000, differences + 2))
    values = np.diff(means, n=2)
    whole = np.sum(values**2, axis=1)
    rest = whole - _bent(values)
    return float(rest.mean() / whole.mean()), float(rest.mean() ** 2 / rest.var() * whole.var() / whole.mean() ** 2)


@lru_cache(maxsize=64)
def smoothing(checkpoints: int) -> np.ndarray:
    """(C, C) weights, rows sum to 1: a checkpoint and the one before it (2, 1), wider from 12 checkpoints on.

    Those after it have no part: a peak of one checkpoint would hold a part of the fall already. The last reaches back by one more
    (3, 2, 1): no peak lies there to be flattened. The first is left alone.
    """
    width = np.full((checkpoints, 1), max(1, checkpoints // 6))
    width[-1] += 1
    steps = np.arange(checkpoints)
    back = steps[:, None] - steps
    weights = np.where(back >= 0, np.maximum(width + 1.0 - back, 0.0), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    weights.setflags(write=False)
    return weights


def gains_shown(wins: np.ndarray, start: float | None, start_wins: np.ndarray | None = None, seed: int = 0) -> np.ndarray | None:
    """(C,) whether each checkpoint of (C, N) win rates is shown to be better than the reference; None where `start` is.

    start: the reference's own win rate. start_wins: the same prompt by prompt, (N,), where it was measured and not known.
    The bounce has no part in it: it belongs to the weights that would be kept.
    """
    if start is None:
        return None
    return np.asarray(simultaneous(wins - (start if start_wins is None else start_wins), seed)[0] > 0)


def prompts_needed(rows: np.ndarray, offset: int, critical: float, seed: int = 0) -> int | None:
    """How many prompts would decide whether the last is worse, with a chance of `DECIDES`, to two digits; None where none would.

    rows: as `beyond_bounce` takes them. The true win rates are drawn around those measured, new measurements around these. The
    highest of several is partly lucky: differences between checkpoints are shrunk by the share of them that prompts explain, but
    for a bounce of 0.02.
    """
    rng = np.random.default_rng(seed)
    n = rows.shape[1]
    means, factor = rows.mean(axis=1), _root(np.cov(rows) / n)
    one, other = rng.standard_normal((2, DRAWS, len(rows))) @ factor.T
    centre = np.eye(len(rows))
    centre[offset:, offset:] -= 1 / (len(rows) - offset)
    centre[:offset] = 0.0
    apart = centre @ means
    noise, bounce = float(np.sum((centre @ factor) ** 2)) + 1e-12, BOUNCES[1] ** 2 * (len(rows) - offset - 1)
    real = max(1 - noise / max(apart @ apart, 1e-12), bounce / (bounce + noise))
    truth = means + one + (real - 1) * apart + (np.sqrt(real) - 1) * (one @ centre.T)
    gaps = rows[:-1] - rows[-1]
    deviation, size = gaps.std(axis=1, ddof=1), np.maximum(np.abs(gaps).max(axis=1), 0.5)
    wanted = 2 * n
    while n >= FEWEST_PROMPTS and wanted <= MOST_PROMPTS:
        seen = truth + np.sqrt(n / wanted) * other
        seen = seen[:, :-1] - seen[:, -1:]
        worse = (seen - critical * np.maximum(deviation / np.sqrt(wanted), 2 / wanted)).max(axis=1) > MARGIN
        none = (seen + _score(deviation, size, wanted)).max(axis=1) < NEGLIGIBLE
        if np.mean(worse | none) >= DECIDES:
            digits = 10 ** (len(str(wanted)) - 2)
            return int(-(-wanted // digits) * digits)
        wanted *= 2
    return None


def _keep(means: np.ndarray, kl: np.ndarray, covariance: np.ndarray, shown: np.ndarray | None) -> int:
    """The checkpoint to keep: of those within one standard error of the best, the one of the smallest KL.

    Prompts alone make the error: what is kept is one checkpoint with its bounce, which is noise to the trend but a property of
    those weights. The rule is that of Breiman et al. (1984, § 3.4.3): what cannot be told from the best is
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
    root: np.ndarray = vectors * np.sqrt(np.maximum(values, 0.0))
    return root
