"""Tied embeddings: one gradient instead of two for the matrix that is both input embedding and head.

Autograd makes two gradients of (V, D), the embedding's almost all zeros, and adds them: three passes over V·D numbers in
every step, a good part of a step of short pairs. Here the head's backward pass, which always comes first, leaves its
gradient in a `Tie`; the embedding's adds its few rows to it and hands it on as the gradient of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from isdaa.models.device_kind import kind_of


@dataclass(eq=False)
class Tie:
    """Joins embedding and head of ONE forward pass. `head_gradient` (V, D): what the head's backward pass leaves here."""

    head_gradient: Tensor | None = None


def tie_of(model: nn.Module) -> Tie | None:
    """A new tie for one forward pass, or None where embedding and head are not one plain matrix that is trained."""
    embedding, head = _layer(model, "get_input_embeddings"), _layer(model, "get_output_embeddings")
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear or head.weight is not embedding.weight:
        return None
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        return None
    if "forward" in embedding.__dict__ or embedding._forward_hooks or embedding._forward_pre_hooks or embedding._backward_hooks:
        return None
    weight = embedding.weight
    # FakeTensor: a step that is only planned (`preview.fake_step`) goes the same way.
    plain = type(weight.data) in (Tensor, FakeTensor) and not hasattr(weight, "ds_id") and not weight._backward_hooks
    return Tie() if plain and weight.requires_grad and kind_of(weight.device) == "cpu" else None


def embed(model: nn.Module, input_ids: Tensor, tie: Tie) -> Tensor:
    """(…, D) embeddings of token ids (…), whose backward pass gives the gradient of the head as well."""
    embedding: Any = _layer(model, "get_input_embeddings")
    padding = -1 if embedding.padding_idx is None else embedding.padding_idx
    return cast(Tensor, _Embed.apply(embedding.weight, input_ids, padding, tie))  # type: ignore[no-untyped-call]


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int, tie: Tie) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding, ctx.tie, ctx.shape = padding, tie, weight.shape
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (ids,), grad = ctx.saved_tensors, grads[0]
        total, ctx.tie.head_gradient = ctx.tie.head_gradient, None
        if total is None:  # no response token, or a second backward pass
            return torch.ops.aten.embedding_dense_backward(grad, ids, ctx.shape[0], ctx.padding, False), None, None, None
        ids, grad = ids.reshape(-1), grad.reshape(-1, grad.shape[-1])
        if ctx.padding >= 0:
            grad = grad * (ids != ctx.padding)[:, None]
        return total.index_add_(0, ids, grad.to(total.dtype)), None, None, None


def _layer(model: nn.Module, getter: str) -> Any:
    get: Any = getattr(model, getter, None)
    return get() if get else None
