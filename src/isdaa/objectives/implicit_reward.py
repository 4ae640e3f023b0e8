"""The implicit reward r(Δ) of a response, from its log-ratio Δ = log π(y|x) − log π_ref(y|x)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

EXP_MIN, EXP_MAX = -88.0, 20.0
"""Bounds of the exponent of chi_squared: exp stays a normal fp32 number below and, squared, far from overflow above."""


def log_ratio(log_ratios: Tensor) -> Tensor:
    """r(Δ) = Δ, the implicit reward of DPO up to β (Rafailov et al. 2023, arXiv 2305.18290). Any shape."""
    return log_ratios


def chi_squared(log_ratios: Tensor) -> Tensor:
    """r(Δ) = Δ + exp(clamp(Δ, −88, 20)), the φ(z) = z + log z of χPO at z = e^Δ. Any shape.

    Huang et al. 2024, arXiv 2407.13399, Algorithm 1. The clamp is a deviation, to keep every number finite: outside it
    exp is a constant without gradient, and Δ keeps its own gradient.
    """
    return log_ratios + torch.exp(torch.clamp(log_ratios, EXP_MIN, EXP_MAX))


IMPLICIT_REWARDS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"log_ratio": log_ratio, "chi_squared": chi_squared}
)
