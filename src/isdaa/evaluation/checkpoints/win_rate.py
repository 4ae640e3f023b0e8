"""Win rates from scores: the share of comparisons that the policy's response wins, prompt by prompt.

Pure functions of score tables; legend: N prompts, S policy samples a prompt, K opponent responses a prompt.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from isdaa.evaluation.statistics import Numbers

Ties = Literal["half", "loss"]


def win_rates(policy: Numbers, opponents: Numbers, ties: Ties = "half") -> np.ndarray:
    """Per prompt, the mean over all S·K comparisons of its policy and opponent scores.

    policy: (N,) or (N, S); opponents: (N,) or (N, K). A tie counts ½, or with `ties="loss"` 0 (the convention of the
    code released with Nguyen et al. 2025). Returns (N,) in [0, 1].
    """
    policy_table, opponent_table = _table(policy, "policy"), _table(opponents, "opponents")
    if len(policy_table) != len(opponent_table):
        raise ValueError(f"{len(policy_table)} prompts of the policy, {len(opponent_table)} of the opponent")
    return wins_of(policy_table[:, :, None], opponent_table[:, None, :], ties).mean(axis=(1, 2))


def own_win_rates(scores: Numbers, ties: Ties = "half") -> np.ndarray | None:
    """Per prompt, the win rate of a policy against itself: every one of its K samples against the K − 1 others.

    scores: (N, K). With ties at half this is ½ by symmetry; with ties as losses it is what the reference starts from.
    None where K = 1 and ties are losses: one sample says nothing about ties.
    """
    table = _table(scores, "scores")
    n, k = table.shape
    if ties == "half":
        return np.full(n, 0.5)
    if k == 1:
        return None
    wins = wins_of(table[:, :, None], table[:, None, :], ties)  # the diagonal is a tie with itself: 0 here
    return wins.sum(axis=(1, 2)) / (k * (k - 1))


def tie_rate(policy: Numbers, opponents: Numbers) -> float:
    """Share of all comparisons that are ties."""
    policy_table, opponent_table = _table(policy, "policy"), _table(opponents, "opponents")
    return float((policy_table[:, :, None] == opponent_table[:, None, :]).mean())


def wins_of(first: np.ndarray, second: np.ndarray, ties: Ties) -> np.ndarray:
    tied = 0.5 if ties == "half" else 0.0
    return np.where(first == second, tied, first > second)


def _table(scores: Numbers, name: str) -> np.ndarray:
    table = np.asarray(scores, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"{name} must be (N,) or (N, K), got shape {np.shape(scores)}")
    if not np.isfinite(table).all():
        raise ValueError(f"{name}: scores must be finite")
    return table
