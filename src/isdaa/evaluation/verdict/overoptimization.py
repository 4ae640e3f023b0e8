"""Did a run over-optimise, where was its best checkpoint, and what law does its curve follow? (docs/method.md)

The numbers come from `fall_statistics.py`; here they become a finding, a sentence and a law.
Legend: C checkpoints, N prompts, M draws.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, Literal

import numpy as np

from isdaa.evaluation.checkpoints.trajectory import Trajectory
from isdaa.evaluation.verdict.fall_statistics import (
    BOUNCES,
    MARGIN,
    NEGLIGIBLE,
    Measured,
    bounce_of,
    falls_for_sure,
    gains_shown,
    measure,
)

Finding = Literal["over-optimised", "worse", "not detected", "underpowered", "diverged"]

CHECKPOINTS, PROMPTS = 3, 4  # fewer have no verdict
NONE_BETTER = "no checkpoint is shown to be better than the reference (95 %)"


@dataclass(frozen=True)
class Verdict:
    """What can be said of one run (docs/method.md). Win rates and falls are raw, in [0, 1]; falls are to the last checkpoint.

    Attributes:
        finding: "over-optimised": the last checkpoint is worse than the peak, by more than checkpoints vary, at a larger KL.
            "worse": it is worse, but that may be ordinary variation, or KL did not grow. "not detected": no fall of 0.05 or
            more. "underpowered": none of these. "diverged": the last checkpoint's weights are not finite, so nothing is said
            of the run's end.
        fall: from the peak; 0 where nothing lies above the last.
        lower: one-sided 95 % bound of that fall, for all candidates at once.
        upper: one-sided 95 % bound of the largest fall from any candidate.
        bounce: standard deviation of a checkpoint around a curve with one bend or step, beyond what its prompts explain.
        peak: index of the checkpoint that the fall counts from, unless that is the reference.
        recommended: index of the checkpoint to keep, unless that is the reference.
        prompts_needed: where underpowered, prompts that would decide in 8 of 10 cases or more; None: not known.
        sentence: verdict and recommended checkpoint, for people.
        below_start: whether the fall counts from the reference itself.
        better: whether some checkpoint is shown to be better than the reference; None: cannot be asked.
    """

    finding: Finding
    fall: float
    lower: float
    upper: float
    bounce: float
    peak: int
    recommended: int
    prompts_needed: int | None
    sentence: str
    below_start: bool = False
    better: bool | None = None

    @property
    def keeps_reference(self) -> bool:
        """Whether no checkpoint is to be kept: none is shown to be better."""
        return self.better is False


@dataclass(frozen=True)
class Law:
    """R(d) = d·(a − b·log d) (Gao et al. 2023, arXiv 2210.10760) with d = √KL, R the win rate's gain over the reference.

    A description of the curve; the verdict decides whether it falls. A peak is named only where at least half of the runs fall
    by more than step-to-step noise, where it lies between the first and the furthest checkpoint, and its interval has two ends;
    else `peak` and all that hangs on it are None, and `doubt` says why.
    """

    a: float
    b: float
    peak: float | None  # d* = exp(a/b − 1)
    height: float | None  # b·d*
    peak_low: float | None = None  # 95 % interval of d* by resampling prompts, the bounce, and runs where there are several
    peak_high: float | None = None
    past_peak: float | None = None  # share of bootstrap draws in which the last checkpoint lies beyond d*
    rmse: float = 0.0  # of the fit
    doubt: str | None = None  # why no peak is named

    def __call__(self, d: Any) -> Any:
        """R(d); 0 at d = 0."""
        d = np.asarray(d, dtype=np.float64)
        value = d * (self.a - self.b * np.log(np.where(d > 0, d, 1.0)))
        return float(value) if value.ndim == 0 else value


def verdict_of(
    wins: np.ndarray,
    kl: np.ndarray,
    start: float | None = 0.5,
    *,
    steps: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    start_wins: np.ndarray | None = None,
    opponent: str = "reference",
) -> Verdict | None:
    """The verdict on C checkpoints that were measured on the same N prompts.

    Args:
        wins: (C, N) win rates in [0, 1], checkpoints in the order of training.
        kl: (C,) or (C, N), nats.
        start: the reference's own win rate; None: not known.
        steps: of the checkpoints, where they are known.
        labels: names or paths of the checkpoints, by which the sentence goes.
        seed: of the resampling.
        start_wins: (N,), the reference's win rate prompt by prompt, where it was measured.
        opponent: "reference" or "chosen": what the win rates are against.

    Returns:
        The verdict; None from fewer than 3 checkpoints or 4 prompts.

    Raises:
        ValueError: shapes that do not fit.
    """
    wins, kl = np.asarray(wins, dtype=np.float64), np.asarray(kl, dtype=np.float64)
    if wins.ndim != 2 or len(kl) != len(wins):
        raise ValueError(f"wins must be (C, N) and kl (C,) or (C, N), got shapes {wins.shape} and {kl.shape}")
    if len(wins) < CHECKPOINTS or wins.shape[1] < PROMPTS:
        return None
    kl = kl if kl.ndim == 1 else kl.mean(axis=1)
    found = measure(wins, kl, start, seed, start_wins)
    grown = found.below_start or bool(kl[-1] > kl[found.peak])
    finding: Finding = "underpowered"
    if found.lower > MARGIN:
        finding = "over-optimised" if found.beyond_bounce and grown else "worse"
    elif found.upper < NEGLIGIBLE:
        finding = "not detected"
    if labels is None:
        labels = [f"checkpoint-{step}" for step in (range(1, len(wins) + 1) if steps is None else steps)]
    against = "the data's chosen responses" if opponent == "chosen" else "the reference"
    sentence = f"{_finding_told(finding, found, grown, wins, start, places_of(labels, steps), against)} "
    sentence += _advice(found, wins.mean(axis=1), kl, places_of(labels), "for now " if finding == "underpowered" else "")
    return Verdict(
        finding,
        found.fall,
        found.lower,
        found.upper,
        found.bounce,
        found.peak,
        found.recommended,
        found.prompts_needed,
        sentence,
        found.below_start,
        found.better,
    )


def judge(run: Trajectory, *, seed: int = 0, opponent: str = "reference") -> Verdict | None:
    """The verdict on one run.

    Args:
        run: its checkpoints, of `read_study(…).runs`.
        seed: of the resampling.
        opponent: "reference" or "chosen": what its win rates are against.

    Returns:
        The verdict; None without win rates, or from fewer than 3 checkpoints or 4 prompts.
    """
    if run.wins is None:
        return None
    steps = list(run.steps) if run.steps_known else None
    found = verdict_of(
        run.wins, run.kl, run.start, steps=steps, labels=run.labels, seed=seed, start_wins=run.start_wins, opponent=opponent
    )
    if found is None or run.ended is None:
        return found
    keep = f"{NONE_BETTER}: keep the reference" if found.better is False else f"keep {places_of(run.labels)[found.recommended]}"
    sentence = f"No verdict: the run ended in weights that are not finite ({run.ended}); of the checkpoints before, {keep}."
    return replace(
        found,
        finding="diverged",
        sentence=sentence,
        fall=0.0,
        lower=0.0,
        upper=1.0,
        prompts_needed=None,
        below_start=False,
    )


def why_none(run: Trajectory) -> str | None:
    """Why there is no verdict on a run, a sentence; None where there is one."""
    if run.wins is None:
        return "No verdict: there is no scorer or judge, so no win rate."
    checkpoints, prompts = run.wins.shape
    if checkpoints < CHECKPOINTS:
        have = "1 checkpoint only" if checkpoints == 1 else f"{checkpoints} checkpoints only"
        return f"No verdict: {have}; it needs {CHECKPOINTS} or more of one run."
    if prompts < PROMPTS:
        return f"No verdict: {prompts} prompt{'s are' if prompts > 1 else ' is'} too few; it needs at least {PROMPTS}."
    return None


def shown_better(run: Trajectory, *, seed: int = 0) -> bool | None:
    """Whether some checkpoint of the run, however few there are, is shown to be better than the reference (`gains_shown`);
    None without win rates."""
    shown = None if run.wins is None else gains_shown(run.wins, run.start, run.start_wins, seed)
    return None if shown is None else bool(shown.any())


def places_of(labels: Sequence[str], steps: Sequence[int] | None = None) -> list[str]:
    """What sentences call the checkpoints of one run: `checkpoint-200` for `out/checkpoint-200`, where that tells them apart.

    steps: said too where they are known and the name does not end in them: `model, step 200`.
    """
    short = [PurePath(label).name or label for label in labels]
    names = short if len(set(short)) == len(short) else list(labels)
    if steps is None:
        return names
    return [
        name if (found := re.search(r"(\d+)$", name)) and int(found[1]) == step else f"{name}, step {int(step)}"
        for name, step in zip(names, steps, strict=True)
    ]


def _finding_told(
    finding: Finding,
    found: Measured,
    grown: bool,
    wins: np.ndarray,
    start: float | None,
    places: Sequence[str],
    against: str,
) -> str:
    """What was found, a sentence in numbers that stand in the table. Bounds are rounded outwards."""
    means = wins.mean(axis=1)
    lower, upper = np.floor(100 * found.lower) / 100, max(np.ceil(100 * found.upper) / 100, 0.01)
    top, origin = means[found.peak], places[found.peak]
    if found.below_start and start is not None:
        top, origin = start, "the untrained reference"
    last = f"{means[-1]:.2f} ({places[-1]})"
    fall = f"the win rate against {against} fell from {top:.2f} ({origin}) to {last}, by at least {lower:.2f} (95 %)"
    if finding == "over-optimised":
        return f"Over-optimised: {fall}, while the distance from the reference still grew."
    if finding == "worse":
        why = "that may be ordinary variation between checkpoints" if grown else "but KL has not grown since then"
        return f"Worse at the end: {fall}; {why}."
    ends = f"the last checkpoint's win rate against {against}, {last},"
    if finding == "not detected":
        return f"Over-optimisation not detected: {ends} lies at most {upper:.2f} below the highest of the run (95 %)."
    ask = f"; about {found.prompts_needed} prompts would decide" if found.prompts_needed else ""
    few = f"{wins.shape[1]} prompts are too few to say whether it fell"
    return f"Underpowered: {ends} may lie up to {upper:.2f} below the highest of the run (95 %): {few}{ask}."


def _advice(found: Measured, means: np.ndarray, kl: np.ndarray, names: Sequence[str], now: str) -> str:
    """Which checkpoint to keep, and what that trades where another one is higher, a sentence."""
    if found.better is False:
        return f"{NONE_BETTER[:1].upper()}{NONE_BETTER[1:]}: {now}keep the reference."
    kept, best = found.recommended, int(means.argmax())
    told = f"{now}keep {names[kept]}" + ("" if found.better else " (the reference's own win rate is not known)")
    if kept != best:
        gap = means[best] - means[kept]
        more = f"{gap:.2f} higher" if gap >= 0.005 else "higher by less than 0.01"
        why = "but within one standard error" if found.best_shown else "but not shown to be better than the reference"
        times = f"{kl[best] / kl[kept]:.1f} times the KL" if kl[kept] >= 0.05 else "a larger KL"
        times = times if kl[best] > kl[kept] else "another KL"
        told += f": {names[best]} is {more}, {why}, at {times} ({kl[best]:z.1f} against {kl[kept]:z.1f} nats)"
    return f"{told[:1].upper()}{told[1:]}."


def fit_law(runs: Sequence[Trajectory], *, resamples: int = 1000, seed: int = 0) -> Law | None:
    """The law through all checkpoints of the runs (one run, or one cell's seeds); None from fewer than four distinct KLs.

    Runs without win rates do not count, nor do those whose reference's own win rate is not known: the law starts there.
    """
    scored = [
        (run.wins, run.kl, run.start if run.start_wins is None else run.start_wins)
        for run in runs
        if run.wins is not None and run.start is not None
    ]
    return law_of(scored, resamples=resamples, seed=seed)


def law_of(
    runs: Sequence[tuple[np.ndarray, np.ndarray, float | np.ndarray]], *, resamples: int = 1000, seed: int = 0
) -> Law | None:
    """`fit_law` on (wins (C, N), kl (C, N), start) of each run. start: the reference's win rate, one number or (N,).

    Prompts are resampled with win rate and KL of all checkpoints together, and of all runs: those with as many prompts are taken
    to be measured on the same ones. Each draw has its own step-to-step noise (`bounce_of`). Where there are several runs, runs
    are resampled too. The interval of d* counts draws that have no peak as ∞.
    """
    full = [
        (np.asarray(w, dtype=np.float64), np.asarray(k, dtype=np.float64), np.broadcast_to(s, w.shape[1])) for w, k, s in runs
    ]
    if not full:
        return None
    d = np.concatenate([_root_kl(kl.mean(axis=1)) for _, kl, _ in full])
    gain = np.concatenate([wins.mean(axis=1) - start.mean() for wins, _, start in full])
    if len(np.unique(d[d > 0].round(9))) < 4:
        return None
    a, b = (float(value[0]) for value in _least_squares(d[None], gain[None]))
    rmse = float(np.sqrt(np.mean((Law(a, b, None, None)(d) - gain) ** 2)))
    low, high, past = _law_interval(full, resamples, seed)
    peak = float(np.exp(a / b - 1)) if _peaked(a, b) else None
    fallen = [falls_for_sure(np.vstack([start, wins]), seed) for wins, _, start in full]
    doubt = _doubt(peak, low, high, float(d[d > 0].min()), float(d.max()), fallen=2 * sum(fallen) >= len(fallen))
    if peak is None or doubt is not None:
        return Law(a, b, None, None, rmse=rmse, doubt=doubt)
    return Law(a, b, peak, b * peak, low, high, past, rmse)


def _doubt(
    peak: float | None, low: float | None, high: float | None, first: float, furthest: float, *, fallen: bool
) -> str | None:
    """Why a law's peak is not named; None where it is. first, furthest: the smallest and the largest √KL of a checkpoint."""
    if peak is None:
        return "it has no peak"
    if not first <= peak <= furthest:
        where = f"beyond the furthest checkpoint, √KL {furthest:.2f}" if peak > furthest else f"before the first, √KL {first:.2f}"
        return f"its peak would lie {where}"
    if not fallen:
        return "the run is not shown to fall by more than step-to-step noise"
    if low is None or high is None:
        return "the 95 % interval of its peak is open-ended"
    return None


def _law_interval(
    runs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], resamples: int, seed: int
) -> tuple[float | None, float | None, float]:
    """(low, high) of d*, None where it is 0 or ∞, and the share of draws whose last checkpoint lies beyond d*."""
    rng = np.random.default_rng(seed)
    sizes = sorted({wins.shape[1] for wins, _, _ in runs})
    draws = {n: rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n for n in sizes}
    ds, gains = [], []
    for wins, kl, start in runs:
        weights = draws[wins.shape[1]]
        likely = bounce_of(wins.mean(axis=1), np.cov(wins) / wins.shape[1])
        bounce = rng.choice(BOUNCES, resamples, p=likely)
        ds.append(_root_kl(weights @ kl.T))
        gains.append(weights @ (wins - start).T + bounce[:, None] * rng.standard_normal((resamples, len(wins))))
    # How often each run is drawn; the only one always once.
    times = rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=resamples).astype(np.float64)
    each = np.repeat(times, [d.shape[1] for d in ds], axis=1)
    a, b = _least_squares(np.concatenate(ds, axis=1), np.concatenate(gains, axis=1), each)
    with np.errstate(all="ignore"):
        peaks = np.where(b > 0, np.exp(np.clip(a / b - 1, -50, 50)), np.inf)
    last = (np.stack([d[:, -1] for d in ds], axis=1) * times).sum(axis=1) / times.sum(axis=1)
    low, high = (float(value) for value in np.quantile(peaks, [0.025, 0.975], method="nearest"))
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
    root: np.ndarray = np.sqrt(np.maximum(kl, 0.0))
    return root


def _finite(value: float) -> float | None:
    return value if 1e-20 < value < 1e20 else None
