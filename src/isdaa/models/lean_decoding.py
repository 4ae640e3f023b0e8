"""The forward pass of Llama-like models for sampling on a CPU: what the model computes, without what it does besides.

Per token of a small model, transformers' own forward spends more time on masks, rotary tables, copies and Python than on the
model. This one calls the model's own embedding, norms, projections and MLPs (LoRA and biases included) and does the rest, the
attention, itself; in the last layer it goes on with the last position alone. It is used for the architectures named here, and
only once `decoding` has seen that its logits are those of the model.

Legend: R rows, T tokens of a row, D head size, H heads, G heads of keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isdaa.models.inner import inner_model

_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")


def lean_forward(model: nn.Module) -> LeanForward | None:
    """The lean forward of a model, or None where the model is not of a kind that is known here, or is not run as it stands:
    on another device, in a precision that this code does not care for, or with code of its own in front of it."""
    inner: Any = inner_model(model)
    decoder = getattr(inner, "model", None)
    parameter = next(model.parameters())
    state = inner.__dict__.get("_isdaa_state")
    own = "forward" in inner.__dict__ and (state is None or state.original is not None)
    hooked = any(hasattr(module, "_hf_hook") for module in inner.modules())  # accelerate moves such a module's weights
    if (
        getattr(inner.config, "model_type", None) not in _ARCHITECTURES
        or not all(hasattr(decoder, name) for name in _PARTS)
        or inner.get_output_embeddings() is None
        or parameter.device.type != "cpu"
        or parameter.dtype not in (torch.float32, torch.float64)
        or torch.is_autocast_enabled("cpu")
        or own
        or hooked
    ):
        return None
    return LeanForward(inner, decoder)


class LeanForward:
    """Callable: token ids, positions and mask in, states of the last position out; keys and values go to a cache."""

    def __init__(self, inner: Any, decoder: Any) -> None:
        self.inner, self.decoder = inner, decoder

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        """Logits (R, V) of the next token, and the hidden states (R, hidden) that enter the head.

        Args:
            ids: (R, t) new tokens, padded on the left.
            positions: (R, t) their positions.
            mask: (R, T) 1 at tokens, 0 at padding, for the new tokens and all in the cache before them.
            cache: anything with transformers' `update(keys, values, layer)`. Where t > 1 it is empty.
        """
        hidden = self.decoder.embed_tokens(ids)
        cos, sin = (x[:, :, None] for x in self.decoder.rotary_emb(hidden, positions))
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)  # the sign of the half that is turned
        to_all, to_last = _masks(mask, ids.shape[1], hidden.dtype)
        for number, layer in enumerate(self.decoder.layers):
            x, own = layer.input_layernorm(hidden), layer.self_attn
            shape = (*x.shape[:2], -1, own.head_dim)
            key, value = own.k_proj(x).view(shape), own.v_proj(x).view(shape)
            last_only = number == len(self.decoder.layers) - 1 or x.shape[1] == 1
            if last_only:
                x, hidden = x[:, -1:], hidden[:, -1:]
            query = own.q_proj(x).view(*x.shape[:2], -1, own.head_dim)
            if hasattr(own, "q_norm"):
                query, key = own.q_norm(query), own.k_norm(key)
            query = _turn(query, cos[:, -1:], sin[:, -1:]) if last_only else _turn(query, cos, sin)
            key, value = cache.update(_turn(key, cos, sin).transpose(1, 2), value.transpose(1, 2), number)
            if last_only:
                attended = _attend_last(query[:, 0], key, value, to_last, own.scaling)
            else:
                attended = _attend(query.transpose(1, 2), key, value, to_all, own.scaling)
            hidden = hidden + own.o_proj(attended)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        states = self.decoder.norm(hidden[:, -1])
        return self.inner.get_output_embeddings()(states), states


def _masks(mask: Tensor, new: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Additive masks: (R, 1, T, T) for all queries and (R, 1, T) for the last; None where nothing is padded."""
    if bool(mask.all()):
        return None, None
    hidden = mask == 0
    to_last = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)[:, None]
    if new == 1:
        return None, to_last
    later = torch.ones(new, new, dtype=torch.bool).triu(1)
    unseen = later | hidden[:, None]
    unseen &= ~torch.eye(new, dtype=torch.bool)  # padding sees itself: a row without any key would be NaN
    return torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf)[:, None], to_last


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of (R, t, heads, D)."""
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, torch.cat([x[..., half:], x[..., :half]], -1), sin)


def _attend_last(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """(R, 1, H·D) from one query a row (R, H, D) and keys and values (R, G, T, D), a view of the cache's buffers."""
    rows, heads, size = query.shape
    groups, length = key.shape[1:3]
    together = (query * scaling).view(rows * groups, heads // groups, size)
    scores = torch.bmm(together, key.flatten(0, 1).transpose(1, 2)).view(rows, heads, length)
    if mask is not None:
        scores += mask
    weights = torch.softmax(scores, -1).view(rows * groups, heads // groups, length)
    return torch.bmm(weights, value.flatten(0, 1)).view(rows, 1, heads * size)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """(R, T, H·D) from (R, H, T, D) queries and (R, G, T, D) keys and values."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
    return out.transpose(1, 2).flatten(2)
