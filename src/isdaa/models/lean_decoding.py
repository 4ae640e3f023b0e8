"""The forward pass of Llama-like models for sampling on a CPU: what the model computes, without what it does besides.

Per token of a small model, transformers' own forward spends more time on masks, rotary tables, copies and Python than on the
model. This one reads the model's own parts, biases, LoRA and quantised layers included, and puts them together with as few calls
as that takes; in the last layer it goes on with the last position alone. It is used for the architectures named here, and only
once `decoding` has seen that its logits are those of the model.

Legend: R rows, T tokens of a row, D head size, H heads, G heads of keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isdaa.models.inner import inner_model

_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_ROTARY = ("default", "linear", "llama3", "yarn")  # others depend on the length of the row
_TABLE = 256  # positions by which the rotary table grows

Part = Callable[[Tensor], Tensor]


def lean_forward(model: nn.Module) -> LeanForward | None:
    """The lean forward of a model, or None where the model is not of a kind that is known here, or is not run as it stands:
    on another device, in a precision that this code does not care for, or with code of its own in front of it."""
    inner: Any = inner_model(model)
    parameter = next(model.parameters())
    if getattr(inner.config, "model_type", None) not in _ARCHITECTURES or inner.get_output_embeddings() is None:
        return None
    if parameter.device.type != "cpu" or parameter.dtype not in (torch.float32, torch.float64):
        return None
    state = inner.__dict__.get("_isdaa_state")
    in_front = "forward" in inner.__dict__ and (state is None or state.original is not None)
    hooked = any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in model.modules())
    if (
        in_front
        or hooked
        or torch.is_autocast_enabled("cpu")
        or getattr(inner.model.rotary_emb, "rope_type", None) not in _ROTARY
    ):
        return None
    return LeanForward(inner)


@dataclass(frozen=True)
class _Layer:
    """The parts of one layer, so that no step has to look for them."""

    before: Part
    query: Part
    key: Part
    value: Part
    query_norm: Part | None
    key_norm: Part | None
    out: Part
    between: Part
    gate: Part
    activation: Part
    up: Part
    down: Part
    size: int
    scaling: float


class LeanForward:
    """Callable: token ids, positions and mask in, logits and states of the last position out; keys and values go to a cache."""

    def __init__(self, inner: Any) -> None:
        self.decoder, self.head = inner.model, _part(inner.get_output_embeddings())
        self.norm, self.layers = _part(inner.model.norm), [_layer(layer) for layer in inner.model.layers]
        self.table = torch.empty(0)

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        """Logits (R, V) of the next token, and the hidden states (R, hidden) that enter the head.

        Args:
            ids: (R, t) new tokens, padded on the left.
            positions: (R, t) their positions, below T.
            mask: (R, T) 1 at tokens, 0 at padding, for the new tokens and all in the cache before them.
            cache: anything with transformers' `update(keys, values, layer)`. Where t > 1 it is empty.
        """
        hidden = self.decoder.embed_tokens(ids)
        rows, new = ids.shape
        rotary = self._rotary(positions, mask.shape[1], hidden)
        to_all, to_last = _masks(mask, new, hidden.dtype)
        for number, layer in enumerate(self.layers):
            x, size = layer.before(hidden), layer.size
            key, value = layer.key(x).view(rows, new, -1, size), layer.value(x).view(rows, new, -1, size)
            last_only = new == 1 or number == len(self.layers) - 1
            if new > 1 and last_only:
                x, hidden = x[:, -1:], hidden[:, -1:]
            query = layer.query(x).view(rows, x.shape[1], -1, size)
            if layer.query_norm is not None and layer.key_norm is not None:
                query, key = layer.query_norm(query), layer.key_norm(key)
            if query.shape[1] == new:  # both at once
                query, key = _turn(torch.cat([query, key], 2), *rotary).split([query.shape[2], key.shape[2]], 2)
            else:
                query, key = _turn(query, *(part[:, -1:] for part in rotary)), _turn(key, *rotary)
            key, value = cache.update(key.transpose(1, 2), value.transpose(1, 2), number)
            if last_only:
                attended = _attend_last(query[:, 0], key, value, to_last, layer.scaling)
            else:
                attended = _attend(query.transpose(1, 2), key, value, to_all, layer.scaling)
            hidden = hidden + layer.out(attended)
            x = layer.between(hidden)
            hidden = hidden + layer.down(layer.activation(layer.gate(x)).mul_(layer.up(x)))
        states = self.norm(hidden[:, -1])
        return self.head(states), states

    def _rotary(self, positions: Tensor, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(R, t, 1, D) cosines, and sines with the sign of the half that is turned; every position is computed once."""
        if len(self.table) < length:
            known = torch.arange(length + _TABLE - length % _TABLE)[None]
            cos, sin = self.decoder.rotary_emb(like, known)
            half = sin.shape[-1] // 2
            self.table = torch.cat([cos[0], -sin[0, :, :half], sin[0, :, half:]], -1)
        cos, sin = F.embedding(positions, self.table)[:, :, None].chunk(2, -1)
        return cos, sin


def _layer(layer: Any) -> _Layer:
    own, mlp = layer.self_attn, layer.mlp
    return _Layer(
        before=_part(layer.input_layernorm),
        query=_part(own.q_proj),
        key=_part(own.k_proj),
        value=_part(own.v_proj),
        query_norm=_part(own.q_norm) if hasattr(own, "q_norm") else None,
        key_norm=_part(own.k_norm) if hasattr(own, "k_norm") else None,
        out=_part(own.o_proj),
        between=_part(layer.post_attention_layernorm),
        gate=_part(mlp.gate_proj),
        activation=mlp.act_fn,
        up=_part(mlp.up_proj),
        down=_part(mlp.down_proj),
        size=own.head_dim,
        scaling=own.scaling,
    )


def _part(module: Any) -> Part:
    """What a module computes; for the two usual kinds in one call of torch."""
    if type(module) is nn.Linear:
        return lambda x: F.linear(x, module.weight, module.bias)
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        weight, epsilon = module.weight, module.variance_epsilon
        return lambda x: F.rms_norm(x, weight.shape, weight, epsilon)
    return module


def _masks(mask: Tensor, new: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Additive masks: (R, 1, T, T) for all queries and (R, 1, T) for the last; None where nothing is padded."""
    if bool(mask.all()):
        return None, None
    to_last = mask.to(dtype).log_()[:, None]  # log 0 = −∞
    if new == 1:
        return None, to_last
    later = torch.ones(new, new, dtype=torch.bool).triu(1)
    unseen = later | (mask == 0)[:, None]
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
