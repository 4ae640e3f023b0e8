"""The last decoder layer, past its attention, at the positions that predict a response token alone.

Nothing reads the states that a prompt's other tokens leave the last layer with: log-probabilities need those of the last
prompt token and of the response. Every layer below feeds the attention of the layer above it at all positions; the last one
feeds only the head. `install` gives the last layer of a Llama-like model a forward that drops the other rows between its
attention and its gated unit, forward and backward alike; values and gradients stay what they are. Calls without a `Layout`
go to the layer's own forward.

Legend: T tokens of the packed row, K of them kept, D hidden.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from isdaa.models.attention.layout import Layout

# x + attention(norm(x)), then x + unit(norm(x)), with these names and no scale, no further norm and no soft cap between.
_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}

# The same word as `shared_prefix.LAYOUT_KEYWORD`; named again so that the signature below can hold it.
LAYOUT_KEYWORD = "isdaa_layout"


def install(model: nn.Module) -> bool:
    """Puts the narrowing forward into the last layer of an inner model, in place; returns whether it is there."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if getattr(getattr(model, "config", None), "model_type", None) not in _ARCHITECTURES or not layers:
        return False
    layer = layers[-1]
    own = getattr(layer.__dict__.get("forward"), "__func__", None)
    if set(layer._modules) != _PARTS or ("forward" in layer.__dict__ and own not in (_forward, type(layer).forward)):
        return False  # another layer under a known name, or somebody else's forward
    layer.forward = MethodType(_forward, layer)
    return True


def narrowed(hidden: Tensor, layout: Layout) -> Tensor:
    """(N, D) states that predict the response tokens, of a decoder's (1, T, D) output, or of a narrowed (1, K, D) one."""
    name = "predictor_index" if hidden.shape[1] == layout.tokens else "predictor_among_kept"
    return hidden[0].index_select(0, layout.on(hidden.device, name))


def _forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    layout: Layout | None = kwargs.get(LAYOUT_KEYWORD)
    if layout is None:
        return cast(Tensor, type(self).forward(self, hidden_states, *args, **kwargs))
    attended, _ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
    hidden = _keep(hidden_states + attended, layout)
    return cast(Tensor, hidden + self.mlp(self.post_attention_layernorm(hidden)))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # positions are numbers of this batch: a compiler would start anew for every one
def _keep(x: Tensor, layout: Layout) -> Tensor:
    return cast(Tensor, _Keep.apply(x, layout.on(x.device, "kept_index")))  # type: ignore[no-untyped-call]


_forward.__name__ = "forward"  # so that a pickle of a bound method finds it: a revived layer has its class's forward


class _Keep(torch.autograd.Function):
    """Rows of (1, T, D) by an index without repeats, whose backward therefore copies where `index_select` would add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.shape = x.shape
        return x.index_select(1, kept)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (kept,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.shape).index_copy_(1, kept, grads[0]), None
