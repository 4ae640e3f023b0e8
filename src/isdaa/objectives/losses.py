"""The loss ℓ(u) of a pair, from its logit u = β·h + α·(|y_w| − |y_l|). Element-wise, any shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor


def logistic(logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """ℓ = −(1−s)·log σ(u) − s·log σ(−u).

    s = 0: DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7). s > 0: cDPO (Mitchell 2023).
    """
    # logsigmoid rather than softplus, whose threshold cuts the tail off and with it nine digits of the gradient.
    losses = -(1.0 - label_smoothing) * F.logsigmoid(logits)
    if label_smoothing:
        losses = losses - label_smoothing * F.logsigmoid(-logits)
    return losses


def squared(logits: Tensor, beta: float) -> Tensor:
    """ℓ = (u/β − 1/(2β))² (IPO: Azar et al. 2023, arXiv 2310.12036, eq. 17, with their τ as β)."""
    return torch.square(logits / beta - 0.5 / beta)


def hinge(logits: Tensor) -> Tensor:
    """ℓ = max(0, 1 − u) (SLiC: Zhao et al. 2023, arXiv 2305.10425, on the margin with reference; Tang et al. 2024)."""
    return torch.relu(1.0 - logits)


LOSSES: Mapping[str, Callable[[Tensor, float, float], Tensor]] = MappingProxyType(
    {
        "logistic": lambda logits, beta, label_smoothing: logistic(logits, label_smoothing),
        "squared": lambda logits, beta, label_smoothing: squared(logits, beta),
        "hinge": lambda logits, beta, label_smoothing: hinge(logits),
    }
)
"""Loss by name; every entry takes (logits, beta, label_smoothing) and uses what it needs."""
