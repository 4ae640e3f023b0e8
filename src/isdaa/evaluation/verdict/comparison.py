"""Methods compared over seeds: at the end of training, at their peaks, and at matched KL (docs/method.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from isdaa.evaluation.checkpoints.trajectory import Trajectory
from isdaa.evaluation.statistics import Interval, Numbers
from isdaa.evaluation.verdict.overoptimization import judge

WHAT = ("best", "final", "final_kl", "fall")
FEW = 3  # seeds from which a t-interval says something; two are nearly always told to lie anywhere
# A cell that goes less than this share of the way in √KL that the median cell goes is left out: it would end everyone's range.
HARDLY = 0.5


@dataclass(frozen=True)
class SeedMean:
    """A mean over S seeds with its t-interval; no bounds from fewer than three seeds, nor from seeds that all gave the same."""

    mean: float
    low: float | None
    high: float | None
    seeds: int
    values: tuple[float, ...]  # one a seed, in the order of the seeds


@dataclass(frozen=True)
class CellSummary:
    """One cell (method with its settings) over its seeds.

    Attributes:
        cell: its name.
        runs: one a seed.
        best: the highest checkpoint's win rate; too high, since it is chosen on what it is measured on.
        final: win rate of the last checkpoint.
        final_kl: KL of the last checkpoint, nats.
        fall: win rate that was lost to the last checkpoint (`judge`); a little too large, as `best`.
        findings: finding of the verdict -> how many seeds have it.
    """

    cell: str
    runs: Sequence[Trajectory]
    best: SeedMean
    final: SeedMean
    final_kl: SeedMean
    fall: SeedMean
    findings: Mapping[str, int]


@dataclass(frozen=True)
class MatchedKl:
    """Win rates of several cells interpolated at the same √KL, seed by seed, over the range that all reach.

    Attributes:
        root_kl: (P,), the grid.
        cells: cell -> P means over seeds.
        differences: cell -> P differences from `baseline`, paired by seed.
        baseline: the cell that the others are compared with.
        excluded: cells that do not reach the common range.
    """

    root_kl: np.ndarray
    cells: Mapping[str, Sequence[SeedMean]]
    differences: Mapping[str, Sequence[SeedMean]]
    baseline: str
    excluded: Sequence[str] = ()


def seed_mean(values: Sequence[float], *, confidence: float = 0.95) -> SeedMean:
    """Mean of one value a seed with its t-interval; a bootstrap over five seeds would cover 84 %. NaN from no seed.

    Seeds that all gave the same value (falls of 0) have no spread to tell an interval from: one of width 0 would read as certain.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) == 0:
        return SeedMean(float("nan"), None, None, 0, ())
    mean = float(numbers.mean())
    values = tuple(float(value) for value in numbers)
    if len(numbers) < FEW or np.ptp(numbers) < 1e-9:
        return SeedMean(mean, None, None, len(numbers), values)
    half = float(student.ppf((1 + confidence) / 2, len(numbers) - 1) * numbers.std(ddof=1) / np.sqrt(len(numbers)))
    return SeedMean(mean, mean - half, mean + half, len(numbers), values)


def summarise(runs: Sequence[Trajectory], *, confidence: float = 0.95) -> list[CellSummary]:
    """Each cell over its seeds.

    Args:
        runs: of `read_study(…).runs`. A run that belongs to no cell is one by itself, by its name. Runs without win rates
            count in `final_kl` alone, and runs with too few checkpoints for a verdict take no part in `fall`.
        confidence: of the t-intervals over seeds.

    Returns:
        One summary a cell, in the order in which cells first occur; seeds in rising order.
    """
    return [_summary(cell, members, confidence) for cell, members in _cells(runs).items()]


def difference(first: CellSummary, second: CellSummary, what: str = "final", *, confidence: float = 0.95) -> SeedMean:
    """`first − second` of `what` ("best", "final", "final_kl", "fall"), paired by the seeds that both have.

    Without a common seed the result has no seeds and a mean of NaN.
    """
    if what not in WHAT:
        raise ValueError(f"what must be one of {', '.join(WHAT)}, got {what!r}")
    ones, others = (_by_seed(summary, what) for summary in (first, second))
    return seed_mean([value - others[seed] for seed, value in ones.items() if seed in others], confidence=confidence)


def at_matched_kl(runs: Sequence[Trajectory], baseline: str, *, points: int = 25, confidence: float = 0.95) -> MatchedKl | None:
    """Cells at matched KL.

    A run's path is read as a function of d = √KL: from the reference (0, start) over the checkpoints that set a new largest
    d, with straight lines between. What a run does after it turned back in KL is not read, since at one d it would be two values.
    The range goes from the largest of the seeds' first checkpoints to the smallest of their largest d: nobody's line
    from the untrained reference to its first checkpoint is passed off as a measurement, where the range allows (else it starts
    at 0). A cell whose least d over seeds is below half of the median cell's is `excluded`; the baseline never is.

    Args:
        runs: of `read_study(…).runs`.
        baseline: the cell that the others are compared with.
        points: P, of the grid over √KL.
        confidence: of the t-intervals over seeds.

    Returns:
        Win rates and differences on the grid; None where no range is common to any two cells.
    """
    cells = {cell: [run for run in members if run.wins is not None] for cell, members in _cells(runs).items()}
    cells = {cell: members for cell, members in cells.items() if members}
    if baseline not in cells or len(cells) < 2:
        return None
    paths = {cell: [path_of(run) for run in members] for cell, members in cells.items()}
    reach = {cell: min(float(d[-1]) for d, _ in members) for cell, members in paths.items()}
    bar = HARDLY * float(np.median(list(reach.values())))
    kept = [cell for cell in cells if cell == baseline or reach[cell] >= bar]
    high = min(reach[cell] for cell in kept)
    if len(kept) < 2 or high <= 0:
        return None
    first = max(float(d[min(1, len(d) - 1)]) for cell in kept for d, _ in paths[cell])
    grid = np.linspace(first if first < high else 0.0, high, points)
    curves = {cell: np.stack([np.interp(grid, d, wins) for d, wins in paths[cell]]) for cell in kept}  # (S, P)
    seeds = {cell: {run.seed: index for index, run in enumerate(cells[cell])} for cell in kept}

    def gap(cell: str) -> np.ndarray:
        both = [(index, seeds[baseline][seed]) for seed, index in seeds[cell].items() if seed in seeds[baseline]]
        return np.array([curves[cell][one] - curves[baseline][other] for one, other in both]).reshape(-1, points)

    return MatchedKl(
        root_kl=grid,
        cells={cell: _columns(curves[cell], confidence) for cell in kept},
        differences={cell: _columns(gap(cell), confidence) for cell in kept if cell != baseline},
        baseline=baseline,
        excluded=[cell for cell in cells if cell not in kept],
    )


def path_of(run: Trajectory) -> tuple[np.ndarray, np.ndarray]:
    """(P,) rising √KL and (P,) win rate of a run with win rates: the reference, then each checkpoint beyond all before it."""
    assert run.wins is not None
    d, wins = [0.0], [0.5 if run.start is None else run.start]
    for root, win in zip(run.root_kl, run.wins.mean(axis=1), strict=True):
        if root > d[-1]:
            d.append(float(root))
            wins.append(float(win))
    return np.array(d), np.array(wins)


def paired_bootstrap(
    first: Numbers, second: Numbers, *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of `first − second` on the same prompts, (N,) or (S, N) with one row a seed, and its bootstrap interval.

    Seeds and prompts are resampled independently of each other, each pair of a seed and a prompt counting by the product: the
    bootstrap of two crossed random effects (Owen 2007), somewhat too wide. Seeds are few: below about ten of them take the
    t-interval of `difference` for a claim on methods; this one says what the prompts add. `n` is the number of prompts.
    """
    one, two = np.atleast_2d(np.asarray(first, np.float64)), np.atleast_2d(np.asarray(second, np.float64))
    if one.shape != two.shape or one.ndim != 2 or one.size == 0:
        raise ValueError(f"a paired difference needs the same seeds and prompts, got shapes {one.shape} and {two.shape}")
    gaps = one - two
    seeds, prompts = gaps.shape
    mean = float(gaps.mean())
    if prompts < 2:
        return Interval(mean, None, None, prompts)
    rng = np.random.default_rng(seed)
    draws = []
    for begin in range(0, resamples, 1000):
        size = min(1000, resamples - begin)
        by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=size) / seeds
        by_prompt = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=size) / prompts
        draws.append(np.sum((by_seed @ (gaps - mean)) * by_prompt, axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(draws), [tail, 1 - tail])
    return Interval(mean, mean + float(low), mean + float(high), prompts)


def to_json(value: Any) -> Any:
    """Dataclasses of this module as plain data; runs by their names, NaN as null."""
    if isinstance(value, Trajectory):
        return value.name
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_json(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return to_json(value.tolist())
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def _cells(runs: Sequence[Trajectory]) -> dict[str, list[Trajectory]]:
    cells: dict[str, list[Trajectory]] = {}
    for run in runs:
        cells.setdefault(run.cell if run.cell is not None else run.name, []).append(run)
    return {cell: sorted(members, key=_seed) for cell, members in cells.items()}


def _seed(run: Trajectory) -> int:
    return -1 if run.seed is None else run.seed


def _summary(cell: str, runs: Sequence[Trajectory], confidence: float) -> CellSummary:
    verdicts = [verdict for verdict in map(judge, runs) if verdict is not None]
    falls = [verdict.fall for verdict in verdicts if verdict.finding != "diverged"]
    found = {what: list(_values(runs, what).values()) for what in ("best", "final", "final_kl")}
    return CellSummary(
        cell=cell,
        runs=runs,
        **{what: seed_mean(values, confidence=confidence) for what, values in found.items()},
        fall=seed_mean(falls, confidence=confidence),
        findings=dict(Counter(verdict.finding for verdict in verdicts)),
    )


def _values(runs: Sequence[Trajectory], what: str) -> dict[int | None, float]:
    """Seed -> value, of the runs that have one."""
    if what != "best":  # where a run's last checkpoint was left out, nothing is said of its end
        runs = [run for run in runs if run.ended is None]
    if what == "final_kl":
        return {run.seed: float(run.kl[-1].mean()) for run in runs}
    if what == "fall":
        return {run.seed: verdict.fall for run in runs if (verdict := judge(run)) is not None}
    means = {run.seed: run.wins.mean(axis=1) for run in runs if run.wins is not None}
    return {seed: float(curve.max() if what == "best" else curve[-1]) for seed, curve in means.items()}


def _by_seed(summary: CellSummary, what: str) -> dict[int | None, float]:
    """Seed -> value; a value per run is in the summary already, for the runs that have one, in their order."""
    runs = summary.runs if what == "final_kl" else [run for run in summary.runs if run.wins is not None]
    values = getattr(summary, what).values
    if len(runs) == len(values):
        return {run.seed: value for run, value in zip(runs, values, strict=True)}
    return _values(summary.runs, what)


def _columns(values: np.ndarray, confidence: float) -> list[SeedMean]:
    return [seed_mean(column, confidence=confidence) for column in values.T]
