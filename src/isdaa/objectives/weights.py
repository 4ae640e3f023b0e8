"""The weight of a pair, the steps that span a global batch, and what is logged of weights. Nothing has a gradient."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from isdaa.errors import nearest
from isdaa.objectives.presets import CHOICES

LOG_WEIGHT_CAP = 40.0
"""No log-weight exceeds this before exp, whatever the clip: e^40 times the largest loss is still an fp32 number."""

QUANTILES = (0.05, 0.25, 0.50, 0.75, 0.95)


@torch.no_grad()
def importance_weights(
    chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, clip: str, clip_eps: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Importance weights of pairs (Nguyen et al., NeurIPS 2025, arXiv 2506.08681).

    Arguments: log π(y|x) − log μ(y|x) of both responses, (B,); clip "joint" or "per_response"; ε, or None for no clip.
    Returns log_weights (B,) before the clip, weights (B,), and clipped (B,) bool: whether ε, not the cap, lowered it.
    """
    log_weights = chosen_log_ratios + rejected_log_ratios
    if clip_eps is None:
        bounded, clipped = log_weights, torch.zeros_like(log_weights, dtype=torch.bool)
    elif clip == "joint":
        bounded, clipped = log_weights.clamp(max=2 * clip_eps), log_weights > 2 * clip_eps
    elif clip == "per_response":
        bounded = chosen_log_ratios.clamp(max=clip_eps) + rejected_log_ratios.clamp(max=clip_eps)
        clipped = (chosen_log_ratios > clip_eps) | (rejected_log_ratios > clip_eps)
    else:
        raise ValueError(f'clip must be "joint" or "per_response"; got {clip!r}{nearest(clip, CHOICES["clip"])}')
    return log_weights, torch.exp(bounded.clamp(max=LOG_WEIGHT_CAP)), clipped


@torch.no_grad()
def wpo_weights(chosen_wpo: Tensor, rejected_wpo: Tensor) -> tuple[Tensor, Tensor]:
    """WPO weights of pairs (Zhou et al. 2024, arXiv 2406.11827).

    Arguments: mean over a response's tokens of [log π(y_t) − log Σ_v π(v)²]. Returns log_weights and weights. All (B,).
    """
    log_weights = chosen_wpo + rejected_wpo
    return log_weights, torch.exp(log_weights.clamp(max=LOG_WEIGHT_CAP))


@torch.no_grad()
def batch_weights(
    weights: Tensor,
    mode: str,
    normalize: str | None = None,
    seed: int = 0,
    step: int = 0,
    valid: Tensor | None = None,
) -> Tensor:
    """Turn the pairs' own weights into the final ones.

    Args:
        weights: (B,), of all pairs of the GLOBAL batch.
        mode: "shuffled" permutes them among the pairs, by `seed` and `step` alone; "mean" gives every pair their mean;
            "none", "importance" and "wpo" leave them.
        normalize: "batch" divides them by their mean.
        seed: of the permutation.
        step: the optimiser step.
        valid: (B,) bool; where it is False a pair weighs 0 and counts in no mean.

    Returns:
        The final weights, (B,).

    Raises:
        ValueError: wrong shapes, an unknown mode or normalisation, or normalisation without a weight.
    """
    weights, valid = _checked(weights, valid)
    for name, value in (("weight", mode), ("normalize", normalize)):
        if value not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {CHOICES[name]}; got {value!r}{nearest(value, CHOICES[name])}")
    if normalize is not None and mode == "none":
        raise ValueError(f'normalize="{normalize}" needs a weight; with weight="none" it must be null')
    kept = weights[valid]
    if mode == "shuffled":
        kept = kept[permutation(kept.numel(), seed, step).to(kept.device)]
    elif mode == "mean" and kept.numel():
        kept = kept.mean().expand_as(kept)
    if normalize == "batch":
        # Relative to the largest weight, or a mean of tiny weights would underflow to 0. All zero stay zero.
        relative = _relative(kept)
        kept = torch.where(relative > 0, relative / relative.mean(), relative)
    return torch.zeros_like(weights).masked_scatter(valid, kept)


def permutation(size: int, seed: int, step: int) -> Tensor:
    """The permutation (size,) int64, on the CPU, of this seed and step. Touches no global random state."""
    # A hash, since seed + step would give run 1 at step 2 the permutation of run 2 at step 1.
    state = int.from_bytes(hashlib.sha256(f"{int(seed)},{int(step)}".encode()).digest()[:8], "little")
    return torch.randperm(size, generator=torch.Generator().manual_seed(state))


@torch.no_grad()
def effective_sample_size(weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """ESS/N = (Σw)²/(N·Σw²): the share of pairs that would teach as much if all weighed the same (Kish 1965).

    Args:
        weights: (B,), of all pairs of the GLOBAL batch.
        valid: (B,) bool; pairs where it is False do not count.

    Returns:
        A scalar tensor in [0, 1]; 0 if all weights are zero.

    Raises:
        ValueError: wrong shapes.
    """
    weights, valid = _checked(weights, valid)
    relative = _relative(weights[valid])
    total = relative.square().sum() * relative.numel()
    return torch.where(total > 0, relative.sum().square() / total, total)


@torch.no_grad()
def weight_metrics(log_weights: Tensor, weights: Tensor, clipped: Tensor, valid: Tensor | None = None) -> dict[str, float]:
    """What the log shows about the weights of a GLOBAL batch (docs/metrics.md).

    Args:
        log_weights: (B,), before the clip.
        weights: (B,), the final ones.
        clipped: (B,) bool; whether ε lowered the weight.
        valid: (B,) bool; pairs where it is False do not count.

    Returns:
        Keys `weights/…`. `weights/capped` is a number of pairs (log-weight above 40 with no ε below it),
        `weights/clip_fraction` a share of them.

    Raises:
        ValueError: wrong shapes, or no pair that is valid.
    """
    weights, valid = _checked(weights, valid)
    for name, tensor in (("log_weights", log_weights), ("clipped", clipped)):
        if tensor.shape != weights.shape:
            raise ValueError(f"{name} must have the shape {tuple(weights.shape)} of weights; got {tuple(tensor.shape)}")
    if not bool(valid.any()):
        raise ValueError("weight_metrics needs at least one valid pair")
    logs, kept, clipped = _at_least_fp32(log_weights)[valid], weights[valid], clipped[valid].bool()
    points = torch.quantile(logs, torch.tensor(QUANTILES, dtype=logs.dtype, device=logs.device))
    return {
        "weights/log_weight_mean": logs.mean().item(),
        **{f"weights/log_weight_p{round(100 * q):02d}": p for q, p in zip(QUANTILES, points.tolist(), strict=True)},
        "weights/clip_fraction": clipped.to(logs.dtype).mean().item(),
        "weights/mean": kept.mean().item(),
        "weights/max": kept.max().item(),
        "weights/ess": effective_sample_size(kept).item(),
        "weights/capped": float(((logs > LOG_WEIGHT_CAP) & ~clipped).sum().item()),
    }


def _checked(weights: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    if weights.dim() != 1:
        raise ValueError(f"weights must have shape (B,); got {tuple(weights.shape)}")
    if valid is None:
        valid = torch.ones_like(weights, dtype=torch.bool)
    if valid.shape != weights.shape or valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool of shape {tuple(weights.shape)}; got {valid.dtype} of shape {tuple(valid.shape)}")
    return _at_least_fp32(weights), valid


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _relative(weights: Tensor) -> Tensor:
    """Weights over the largest of them: sums and squares then neither overflow nor vanish. All zero stay zero."""
    if not weights.numel():
        return weights
    largest = weights.max()
    return torch.where(largest > 0, weights / largest, torch.zeros_like(weights))
