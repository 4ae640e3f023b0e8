"""The shared prefix: prompts and their responses as ONE packed row, and the attention that keeps them apart.

The row is ``[prompt_0 | its responses | prompt_1 | …]`` without padding; the position ids of every response go on from
its prompt, and its tokens do not see the other responses. A pair is a prompt with two responses; pairs of one prompt can
share it. Every linear layer of the model therefore works on (1, T) real tokens, a prompt is computed once, and only
attention knows which tokens belong together.
It does so through transformers' ``AttentionInterface``: `install` makes a model use `shared_prefix_attention`, which

* computes prompt by prompt (`choice` says in which way) when a `Layout` comes with the call (the keyword
  ``isdaa_layout`` travels down to the attention layers like any other keyword, so a recomputation under gradient
  checkpointing sees the very same layout), and
* hands every other call to the implementation that the model had before. Plain ``model(...)`` and ``generate`` on an
  installed model are therefore what they were; `plain_attention` also takes the detour away for a while.

Legend: P prompts, R responses, B pairs, T tokens of the packed row, N response tokens, H heads, D head size.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isdaa.models.attention import cpu_attention
from isdaa.models.attention.attention_choice import SDPA, fast_attention
from isdaa.models.attention.layout import Layout

NAME = "isdaa_shared_prefix"
LAYOUT_KEYWORD = "isdaa_layout"

# Up to this many tokens a prompt and its responses, the cost of a call for each response outweighs that of padding and a
# mask (measured on pairs: one block is faster at 80 tokens a pair, the calls are faster at 120).
SHORT_GROUP = 96

# Keywords that change the attention itself in a way that is not written here: better an error (and the fallback of
# `forward.prepare`) than a silently different model. Those of indexers change nothing in a row as short as a probe.
_UNSUPPORTED = (
    *("s_aux", "sinks", "position_bias", "cache", "cu_seq_lens_q"),
    *("block_mask", "indexer_mask", "indices", "block_indices"),
)


# ---------------------------------------------------------------------------------------------------------------------
# Attention over one packed row


@torch.compiler.disable  # lengths of pairs are plain numbers here: a compiler would start anew for every batch
def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    isdaa_layout: Layout,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of every response to its prompt and to itself.

    `query` is (1, H, T, D), `key` and `value` (1, H_kv, T, D), rotary done. Query and key positions are those of the rows
    `prompt + response`, for the sliding window too: token i sees token j where ``i - window < j <= i``. `softcap` is that
    of Gemma 2 (cap·tanh(score / cap)). Returns (1, T, H, D).

    Raises:
        NotImplementedError: the model passes something that is not written here (attention sinks, position biases, a mask of
            its own, …).
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"shared-prefix attention does not know the argument {name!r}")
    if isinstance(attention_mask, Tensor) and attention_mask.numel() > 1:
        # What `inner` gives the model has one element. Whatever a model makes of it (a choice of keys, a bias) would be lost.
        raise NotImplementedError(f"shared-prefix attention reads no mask, and the model made one, {tuple(attention_mask.shape)}")
    if not getattr(module, "is_causal", True):
        raise NotImplementedError("shared-prefix attention is causal")
    if query.shape[0] != 1 or query.shape[2] != isdaa_layout.tokens or key.shape[2] != isdaa_layout.tokens:
        raise NotImplementedError(f"a packed row of {isdaa_layout.tokens} tokens was expected, not {tuple(query.shape)}")
    if sliding_window is not None and sliding_window >= isdaa_layout.longest:
        sliding_window = None
    isdaa_layout.attended = True
    how = Kernel(scaling, dropout if module.training else 0.0, sliding_window, softcap)
    short = len(isdaa_layout.prompt_lengths) > 1 and isdaa_layout.longest_group <= SHORT_GROUP
    fast = fast_attention(
        module,
        query,
        key,
        dropout=how.dropout,
        scaling=scaling,
        window=sliding_window,
        softcap=softcap,
        blocks=not short and cpu_attention.suits(query, isdaa_layout),
    )
    # For those who want to know; of a model with several kinds of layers, a fast one.
    if isdaa_layout.cached("attention", lambda: SDPA) == SDPA and fast is not None:
        isdaa_layout.replace("attention", fast[0])
    if fast is not None:
        return fast[1](query, key, value, isdaa_layout), None
    if short:
        return attend_in_block(query, key, value, isdaa_layout, how), None
    return attend_one_by_one(query, key, value, isdaa_layout, how), None


@dataclass(frozen=True)
class Kernel:
    """How one block of queries attends to one block of keys."""

    scaling: float | None
    dropout: float
    window: int | None
    softcap: float | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """(b, H, q, D) from (b, H, q, D), (b, H_kv, k, D); `mask` is additive. None means causal with q = k, and needs no
        soft cap."""
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        if self.softcap is None:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=self.dropout, is_causal=mask is None, scale=self.scaling
            )
        assert mask is not None
        scale = query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        scores = torch.tanh(query @ key.transpose(2, 3) * (scale / self.softcap)) * self.softcap + mask
        probabilities = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
        return F.dropout(probabilities, self.dropout) @ value


def _additive(visible: Tensor, like: Tensor) -> Tensor:
    mask = torch.zeros(visible.shape, dtype=like.dtype).masked_fill_(~visible, float("-inf"))
    return mask.to(like.device)


def visible_keys(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def attend_one_by_one(query: Tensor, key: Tensor, value: Tensor, layout: Layout, how: Kernel) -> Tensor:
    """A call for each response, nothing padded: a prompt with its first response is a causal slice of the packed row as
    it stands; each further response attends to its prompt and to itself. Splitting makes views, and its backward is one
    concatenation."""
    pieces = layout.pieces
    queries, keys, values = (t.split([length for _, length in pieces], 2) for t in (query, key, value))
    masks = layout.cached((query.device, query.dtype, how), lambda: [_piece_mask(p, n, how, query) for p, n in pieces])
    outputs = []
    first_keys, first_values = keys[0], values[0]
    for (prompt, _), q, k, v, mask in zip(pieces, queries, keys, values, masks, strict=True):
        if prompt:
            k, v = torch.cat([first_keys[:, :, :prompt], k], 2), torch.cat([first_values[:, :, :prompt], v], 2)
        else:
            first_keys, first_values = k, v
        outputs.append(how(q, k, v, mask).transpose(1, 2))
    return torch.cat(outputs, 1)


def _piece_mask(prompt: int, length: int, how: Kernel, like: Tensor) -> Tensor | None:
    if prompt == 0 and how.softcap is None and (how.window is None or how.window >= length):
        return None  # causal is enough
    row = torch.arange(prompt + length)
    return _additive(visible_keys(row[prompt:], row, how.window), like)


def attend_in_block(query: Tensor, key: Tensor, value: Tensor, layout: Layout, how: Kernel) -> Tensor:
    """One call for all prompts: gathered to a padded (P, H, L, D) block, with a mask. For short ones, where the padding
    costs less than the calls."""
    into, back, padding, width = block_index(layout, query.device)
    mask = layout.cached((query.device, query.dtype, how.window, "block"), lambda: _block_mask(layout, how.window, query))

    def gather(x: Tensor) -> Tensor:
        rows = _Permute.apply(x[0].transpose(0, 1), into, None, back, None)
        return rows.view(len(layout.prompt_lengths), width, *rows.shape[1:]).transpose(1, 2)

    attended = how(gather(query), gather(key), gather(value), mask).transpose(1, 2)
    return _Permute.apply(attended.reshape(-1, *attended.shape[2:]), back, None, into, padding)[None]


class _Permute(torch.autograd.Function):
    """Rows by index, with a backward that also gathers: each real row has exactly one place on either side, so the
    scatter-add of `index_select` (slow on the CPU) is not needed. Rows in `zero` have no partner and are zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, zero: Tensor | None, back: Tensor, back_zero: Tensor | None) -> Tensor:
        ctx.back, ctx.back_zero = back, back_zero
        rows = x.index_select(0, index)
        return rows if zero is None else rows.index_fill_(0, zero, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        rows = grads[0].index_select(0, ctx.back)
        return rows if ctx.back_zero is None else rows.index_fill_(0, ctx.back_zero, 0), None, None, None, None


def block_index(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """(P*L,) packed row of every block slot, (T,) block slot of every packed row, slots that are padding, and L."""
    return layout.cached((device, "block"), lambda: _block_index(layout, device))


def _block_index(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    width = layout.longest_group
    starts = layout.prompt_starts[:, None]
    slot = torch.arange(width)
    real = slot < layout.group_lengths[:, None]
    into = torch.where(real, starts + slot, starts).flatten()
    back = real.flatten().nonzero()[:, 0]
    padding = (~real).flatten().nonzero()[:, 0]
    return into.to(device), back.to(device), padding.to(device), width


def _block_mask(layout: Layout, window: int | None, like: Tensor) -> Tensor:
    """(P, 1, L, L) additive mask. A padding slot is seen by itself alone."""
    into, _, padding, width = block_index(layout, torch.device("cpu"))
    position, owner = layout.position_ids[into], layout.owner[into]
    position[padding], owner[padding] = 0, -2 - padding  # each a response of its own
    position, owner = position.view(-1, width), owner.view(-1, width)
    same = owner[:, None, :] == owner[:, :, None]
    visible = visible_keys(position, position, window) & ((owner[:, None, :] == -1) | same)
    return _additive(visible, like)[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Installing it in a model


_ORIGINAL_OF: dict[str, str] = {}


def _register(original: str) -> str:
    """Registers (once) the implementation that stands in front of `original`, and returns its name."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = NAME if original == "sdpa" else f"{NAME}_{original}"
    if name in _ORIGINAL_OF:
        return name
    plain = None if original == "eager" else ALL_ATTENTION_FUNCTIONS[original]

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        if kwargs.get(LAYOUT_KEYWORD) is not None:
            return shared_prefix_attention(module, query, key, value, mask, **kwargs)
        function = plain or sys.modules[type(module).__module__].eager_attention_forward
        return function(module, query, key, value, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    if original in ALL_MASK_ATTENTION_FUNCTIONS:  # others are called without a mask, and so are we
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    _ORIGINAL_OF[name] = original
    return name


def _configs(model: nn.Module) -> list[Any]:
    found = {id(m.__dict__["config"]): m.__dict__["config"] for m in model.modules() if "config" in m.__dict__}
    return [c for c in found.values() if getattr(c, "_attn_implementation", None) is not None]


def install(model: nn.Module) -> None:
    """Puts `shared_prefix_attention` in front of the attention implementation of a transformers model, in place.

    It stays there through training: under gradient checkpointing the backward pass reads the implementation again.
    Saved folders are not affected (transformers does not save the implementation).
    """
    for config in _configs(model):
        if config._attn_implementation not in _ORIGINAL_OF:
            config._attn_implementation_internal = _register(config._attn_implementation)


def uninstall(model: nn.Module) -> None:
    """Gives a model back the attention implementation it had before `install`."""
    for config in _configs(model):
        if config._attn_implementation in _ORIGINAL_OF:
            config._attn_implementation_internal = _ORIGINAL_OF[config._attn_implementation]


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """The model with its own attention implementation, restored at the end. An installed model computes the same
    without this; it is for code that asks for the implementation by name, such as caches and compilers."""
    installed = [(c, c._attn_implementation) for c in _configs(model) if c._attn_implementation in _ORIGINAL_OF]
    try:
        for config, name in installed:
            config._attn_implementation_internal = _ORIGINAL_OF[name]
        yield
    finally:
        for config, name in installed:
            config._attn_implementation_internal = name
