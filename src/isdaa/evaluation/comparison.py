"""Methods compared over seeds: at the end of training, at their peaks, and at matched KL (METHOD.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isdaa.evaluation.trajectory import Trajectory


@dataclass(frozen=True)
class SeedMean:
    """A mean over S seeds with its t-interval; no bounds from one seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int
    values: tuple[float, ...]  # one a seed, in the order of the seeds


@dataclass(frozen=True)
class CellSummary:
    """One cell (method with its settings) over its seeds."""

    cell: str
    runs: Sequence[Trajectory]
    best: SeedMean  # smoothed peak of each seed's win rate; optimistic, since the peak is chosen on what it is measured on
    final: SeedMean  # win rate of the last checkpoint
    final_kl: SeedMean
    fall: SeedMean  # cross-fitted (overoptimization.judge)
    findings: Mapping[str, int]  # how many seeds were found what


@dataclass(frozen=True)
class MatchedKl:
    """Win rates of several cells interpolated at the same √KL, seed by seed, over the range that all reach."""

    root_kl: np.ndarray  # (P,) grid
    cells: Mapping[str, Sequence[SeedMean]]  # cell -> (P,) means
    differences: Mapping[str, Sequence[SeedMean]]  # cell -> (P,) differences from `baseline`, paired by seed
    baseline: str
    excluded: Sequence[str] = ()  # cells left out because they do not reach the common range


def summarise(runs: Sequence[Trajectory], *, confidence: float = 0.95) -> list[CellSummary]:
    """One summary a cell, in the order in which cells first occur."""
    raise NotImplementedError


def difference(first: CellSummary, second: CellSummary, what: str = "final", *, confidence: float = 0.95) -> SeedMean:
    """`first − second` of `what` ("best", "final", "final_kl", "fall"), paired by the seeds that both have."""
    raise NotImplementedError


def at_matched_kl(runs: Sequence[Trajectory], baseline: str, *, points: int = 25, confidence: float = 0.95) -> MatchedKl | None:
    """Cells at matched KL; None where no range is common to any two cells."""
    raise NotImplementedError


def to_json(value: Any) -> Any:
    """Dataclasses of this module as plain data."""
    raise NotImplementedError
