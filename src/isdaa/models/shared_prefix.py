"""The shared prefix: B pairs as ONE packed row, and the attention that keeps them apart.

The row is ``[prompt_0 | chosen_0 | rejected_0 | prompt_1 | …]`` without padding; the position ids of a rejected
response restart after its prompt, and its tokens do not see the chosen response. Every linear layer of the model
therefore works on (1, T) real tokens, the prompt of a pair is computed once, and only attention knows about pairs.
It does so through transformers' ``AttentionInterface``: `install` makes a model use `shared_prefix_attention`, which

* computes pair by pair when a `Layout` comes with the call (the keyword ``isdaa_layout`` travels down to the attention
  layers like any other keyword, so a recomputation under gradient checkpointing sees the very same layout), and
* hands every other call to the implementation that the model had before. Plain ``model(...)`` and ``generate`` on an
  installed model are therefore what they were; `plain_attention` also takes the detour away for a while.

Legend: B pairs, T tokens of the packed row, N response tokens, H heads, D head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAME = "isdaa_shared_prefix"
LAYOUT_KEYWORD = "isdaa_layout"

# Up to this many tokens a pair, the cost of two calls a pair outweighs that of padding and a mask (measured: one block
# is faster at 80 tokens a pair, the calls are faster at 120).
_SHORT_PAIR = 96

# Keywords that change the attention itself in a way that is not written here: better an error (and the fallback of
# `forward.prepare`) than a silently different model.
_UNSUPPORTED = ("s_aux", "position_bias", "cache", "cu_seq_lens_q", "block_mask", "indexer_mask")


@dataclass(eq=False)
class Layout:
    """Where the parts of B pairs lie in their packed row; everything follows from three (B,) int64 tensors of lengths.

    A prompt has at least one token (its last one predicts the first token of both responses). A response may be empty,
    so that a plain (prompt, response) row is a pair whose rejected response has length 0.

    Raises:
        ValueError: lengths of different shapes, or an empty prompt.
    """

    prompt_lengths: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    attended: bool = field(default=False, init=False, repr=False)  # whether any attention has read this layout
    _device_copies: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        shapes = {tuple(t.shape) for t in (self.prompt_lengths, self.chosen_lengths, self.rejected_lengths)}
        if len(shapes) != 1 or self.prompt_lengths.ndim != 1 or len(self.prompt_lengths) == 0:
            raise ValueError(f"three (B,) tensors of lengths with B > 0 are needed, not shapes {sorted(shapes)}")
        # Index arithmetic happens on the CPU, once a batch; attention only ever sees finished index tensors.
        self._lengths = torch.stack([self.prompt_lengths, self.chosen_lengths, self.rejected_lengths]).cpu().long()
        if int(self._lengths[0].min()) < 1:
            raise ValueError("a prompt of length 0: its last token must predict the first token of each response")

    @property
    def pairs(self) -> int:
        """B."""
        return self._lengths.shape[1]

    @cached_property
    def tokens(self) -> int:
        """T, the length of the packed row."""
        return int(self._lengths.sum())

    @cached_property
    def longest(self) -> int:
        """The longest of the 2B rows `prompt + response`, in tokens."""
        prompt, chosen, rejected = self._lengths
        return int((prompt + torch.maximum(chosen, rejected)).max())

    @cached_property
    def longest_pair(self) -> int:
        """The longest `prompt + chosen + rejected`, in tokens."""
        return int(self._lengths.sum(0).max())

    @cached_property
    def lengths(self) -> list[tuple[int, int, int]]:
        """(prompt, chosen, rejected) per pair as plain numbers."""
        return [(p, c, r) for p, c, r in self._lengths.T.tolist()]

    @cached_property
    def _starts(self) -> Tensor:
        totals = self._lengths.sum(0)
        return totals.cumsum(0) - totals

    @cached_property
    def _responses(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For the N response tokens in packed order: pair, offset within its response, is_rejected, target position."""
        prompt, chosen, rejected = self._lengths
        count = chosen + rejected
        pair = torch.arange(self.pairs).repeat_interleave(count)
        within = torch.arange(len(pair)) - (count.cumsum(0) - count)[pair]
        is_rejected = within >= chosen[pair]
        target = (self._starts + prompt)[pair] + within
        return pair, torch.where(is_rejected, within - chosen[pair], within), is_rejected, target

    @cached_property
    def target_index(self) -> Tensor:
        """(N,) position in the packed row of every response token, in packed order."""
        return self._responses[3]

    @cached_property
    def predictor_index(self) -> Tensor:
        """(N,) position whose hidden state predicts the response token: the token before it, but for the first token
        of a rejected response the last token of the PROMPT."""
        pair, offset, is_rejected, target = self._responses
        return torch.where(is_rejected & (offset == 0), target - 1 - self._lengths[1][pair], target - 1)

    @cached_property
    def response_of(self) -> Tensor:
        """(N,) number of the response in 0..2B-1: b is the chosen, B + b the rejected response of pair b."""
        pair, _, is_rejected, _ = self._responses
        return pair + self.pairs * is_rejected

    @cached_property
    def position_ids(self) -> Tensor:
        """(T,) position ids: 0.. within each pair, restarting after the prompt for the rejected response."""
        prompt, chosen, _ = self._lengths
        totals = self._lengths.sum(0)
        pair = torch.arange(self.pairs).repeat_interleave(totals)
        within = torch.arange(self.tokens) - self._starts[pair]
        return torch.where(within >= (prompt + chosen)[pair], within - chosen[pair], within)

    def on(self, device: torch.device | str, name: str) -> Tensor:
        """One of the derived index tensors on a device, copied there once."""
        return self.cached((str(device), name), lambda: getattr(self, name).to(device))

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, once per layout and key: masks and indices are the same in every layer of a model."""
        if key not in self._device_copies:
            self._device_copies[key] = make()
        return self._device_copies[key]

    def response_sums(self, values: Tensor) -> Tensor:
        """Sums (N,) token values over their responses, giving (2B,): chosen 0..B-1, rejected B..2B-1.

        Through a padded block rather than `index_add`, whose order of addition is not fixed on a GPU.
        """
        width = max(1, int(self._lengths[1:].max()))
        slots = self.cached(
            (str(values.device), "slots"),
            lambda: (self.response_of * width + self._responses[1]).to(values.device),
        )
        block = values.new_zeros(2 * self.pairs * width).index_copy(0, slots, values)
        return block.view(2 * self.pairs, width).sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# Attention over one packed row


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
    """Attention of every pair within itself. `query` is (1, H, T, D), `key` and `value` (1, H_kv, T, D), rotary done.

    Query and key positions are those of the two rows `prompt + chosen` and `prompt + rejected`, for the sliding window
    too: token i sees token j where ``i - window < j <= i``. `softcap` is that of Gemma 2 (cap·tanh(score / cap)).
    Returns (1, T, H, D).

    Raises:
        NotImplementedError: the model passes something that is not written here (attention sinks, position biases, …).
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"shared-prefix attention does not know the argument {name!r}")
    if not getattr(module, "is_causal", True):
        raise NotImplementedError("shared-prefix attention is causal")
    if query.shape[0] != 1 or query.shape[2] != isdaa_layout.tokens or key.shape[2] != isdaa_layout.tokens:
        raise NotImplementedError(f"a packed row of {isdaa_layout.tokens} tokens was expected, not {tuple(query.shape)}")
    if sliding_window is not None and sliding_window >= isdaa_layout.longest:
        sliding_window = None
    isdaa_layout.attended = True
    how = _Kernel(scaling, dropout if module.training else 0.0, sliding_window, softcap)
    # The one place that chooses an algorithm: a GPU kernel for variable lengths would be a third branch here.
    if isdaa_layout.pairs > 1 and isdaa_layout.longest_pair <= _SHORT_PAIR:
        return _attend_in_block(query, key, value, isdaa_layout, how), None
    return _attend_pair_by_pair(query, key, value, isdaa_layout, how), None


@dataclass(frozen=True)
class _Kernel:
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


def _visible(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _attend_pair_by_pair(query: Tensor, key: Tensor, value: Tensor, layout: Layout, how: _Kernel) -> Tensor:
    """Two calls a pair, nothing padded: prompt + chosen is a causal slice of the packed row as it stands; the rejected
    response attends to its prompt and to itself. Splitting makes views, and its backward is one concatenation."""
    parts = [length for p, c, r in layout.lengths for length in (p + c, r)]
    queries, keys, values = (t.split(parts, 2) for t in (query, key, value))
    masks = layout.cached((query.device, query.dtype, how), lambda: _pair_masks(layout, how, query))
    outputs = []
    for b, (p, _, r) in enumerate(layout.lengths):
        chosen_mask, rejected_mask = masks[b]
        k, v = keys[2 * b], values[2 * b]
        outputs.append(how(queries[2 * b], k, v, chosen_mask).transpose(1, 2))
        if r:
            k, v = torch.cat([k[:, :, :p], keys[2 * b + 1]], 2), torch.cat([v[:, :, :p], values[2 * b + 1]], 2)
            outputs.append(how(queries[2 * b + 1], k, v, rejected_mask).transpose(1, 2))
    return torch.cat(outputs, 1)


def _pair_masks(layout: Layout, how: _Kernel, like: Tensor) -> list[tuple[Tensor | None, Tensor | None]]:
    masks: list[tuple[Tensor | None, Tensor | None]] = []
    for p, c, r in layout.lengths:
        row, other = torch.arange(p + c), torch.arange(p + r)
        causal_is_enough = how.softcap is None and (how.window is None or how.window >= p + c)
        masks.append(
            (
                None if causal_is_enough else _additive(_visible(row, row, how.window), like),
                _additive(_visible(other[p:], other, how.window), like) if r else None,
            )
        )
    return masks


def _attend_in_block(query: Tensor, key: Tensor, value: Tensor, layout: Layout, how: _Kernel) -> Tensor:
    """One call for all pairs: gathered to a padded (B, H, L, D) block, with a mask. For short pairs, where the padding
    costs less than the calls."""
    into, back, padding, width = layout.cached((query.device, "block"), lambda: _block_index(layout, query.device))
    mask = layout.cached((query.device, query.dtype, how.window, "block"), lambda: _block_mask(layout, how.window, query))

    def gather(x: Tensor) -> Tensor:
        rows = _Permute.apply(x[0].transpose(0, 1), into, None, back, None)
        return rows.view(layout.pairs, width, *rows.shape[1:]).transpose(1, 2)

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


def _block_index(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """(B*L,) packed row of every block slot, (T,) block slot of every packed row, slots that are padding, and L."""
    totals = layout._lengths.sum(0)
    width = layout.longest_pair
    slot = torch.arange(width)
    real = slot < totals[:, None]
    into = torch.where(real, layout._starts[:, None] + slot, layout._starts[:, None]).flatten()
    back = real.flatten().nonzero()[:, 0]
    padding = (~real).flatten().nonzero()[:, 0]
    return into.to(device), back.to(device), padding.to(device), width


def _block_mask(layout: Layout, window: int | None, like: Tensor) -> Tensor:
    """(B, 1, L, L) additive mask. Padding comes last, so it is invisible to real tokens, and sees itself."""
    prompt, chosen, _ = (t[:, None] for t in layout._lengths)
    slot = torch.arange(layout.longest_pair).expand(layout.pairs, -1)
    rejected = slot >= prompt + chosen
    positions = torch.where(rejected, slot - chosen, slot)
    visible = _visible(positions, positions, window) & (slot[:, :, None] >= slot[:, None, :])
    hidden = rejected[:, :, None] & (~rejected & (slot >= prompt))[:, None, :]
    return _additive(visible & ~hidden, like)[:, None]


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
        function = plain or sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
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
