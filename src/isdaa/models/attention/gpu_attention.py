"""Attention over the packed row for a GPU: one kernel call for all prompts and responses, and no mask of size T × T.

Two ways, with the same contract as the functions of `shared_prefix`:

* `attend_flex`: FlexAttention. Which keys a query sees is written as two intervals of the packed row, and only blocks of
  128 × 128 in which anything is visible are computed. Any dtype, soft caps, windows.
* `attend_varlen`: a FlashAttention kernel for rows of different lengths. A prompt with its first response is one causal
  row of queries and keys as it stands; every further response is a row of few queries and more keys, those of its prompt
  copied in front of its own (aligned at the end, as these kernels do). Half precision.

Legend: P prompts, R responses, T tokens of the packed row, K keys once prompts are copied, H heads, D head size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isdaa.models.attention.layout import Layout

BLOCK = 128  # FlexAttention's own block size
_LARGEST_HEAD = 256  # of the FlashAttention kernels


# ---------------------------------------------------------------------------------------------------------------------
# FlexAttention


def attend_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """(1, T, H, D) from (1, H, T, D) and (1, H_kv, T, D). Compiled on a GPU; elsewhere PyTorch's own reference of it, which
    is slow and makes all scores: for tests.

    The row is padded to whole blocks with tokens that see only themselves, so that one compiled kernel serves all lengths.
    """
    from torch.nn.attention.flex_attention import flex_attention

    mask = layout.cached(("flex", str(query.device), window), lambda: block_mask(layout, window, query.device))
    padding = -layout.tokens % BLOCK
    query, key, value = (F.pad(x, (0, 0, 0, padding)) if padding else x for x in (query, key, value))
    plain = query.device.type == "cpu" or torch.compiler.is_compiling()
    function: Any = flex_attention if plain else _compiled_flex()
    attended: Tensor = function(
        query,
        key,
        value,
        score_mod=None if softcap is None else _soft_cap(softcap),
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended[:, :, : layout.tokens].transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Lengths are dynamic from the first call on: otherwise the probe's row would be compiled, then the batches' again.
    return torch.compile(flex_attention, dynamic=True)


@functools.cache
def _soft_cap(cap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.tanh(score / cap) * cap

    return score_mod


def visible_intervals(layout: Layout, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """What every token sees, in places of the packed row: (T,) `own`, `prompt` and `end`. Token i sees the places
    own[i] … i, and prompt[i] … end[i] − 1; a token of a prompt has nothing of the second kind."""
    place = torch.arange(layout.tokens)
    group = layout.prompt_starts.repeat_interleave(layout.group_lengths)
    own, prompt, end = group.clone(), torch.zeros_like(place), torch.zeros_like(place)
    tokens, response = layout.target_index, layout.response_of
    own[tokens] = layout.response_starts[response]
    prompt[tokens] = group[tokens]
    end[tokens] = group[tokens] + layout.prompt_lengths[layout.prompt_of[response]]
    if window is not None:
        own = torch.maximum(own, place - window + 1)
        prompt[tokens] = torch.maximum(prompt, group + layout.position_ids - window + 1)[tokens]
    return own, prompt, end


def block_mask(layout: Layout, window: int | None, device: torch.device) -> Any:
    """FlexAttention's `BlockMask` of a layout, over T rounded up to whole blocks. What it needs grows with T times the
    number of blocks, not with T × T."""
    from torch.nn.attention.flex_attention import BlockMask

    padding = -layout.tokens % BLOCK
    place = torch.arange(layout.tokens + padding)
    own, prompt, end = visible_intervals(layout, window)
    own = torch.cat([own, place[layout.tokens :]])
    prompt, end = (F.pad(x, (0, padding)) for x in (prompt, end))
    visible = _keys_in_blocks(own, place + 1) + _keys_in_blocks(prompt, end)
    count = visible.view(-1, BLOCK, len(place) // BLOCK).sum(1)
    full = count == BLOCK * BLOCK
    own, prompt, end = (x.int().to(device) for x in (own, prompt, end))

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ((key >= own[query]) & (key <= query)) | ((key >= prompt[query]) & (key < end[query]))

    blocks = (*_ordered((count > 0) & ~full), *_ordered(full))
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(len(place), len(place))).to(device)


def _keys_in_blocks(start: Tensor, end: Tensor) -> Tensor:
    """(T, blocks) keys of each block that lie in the interval [start, end) of every token."""
    first = torch.arange(0, len(start), BLOCK)
    return (torch.minimum(end[:, None], first + BLOCK) - torch.maximum(start[:, None], first)).clamp_(min=0)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, n) numbers of blocks and (1, 1, n, n) their indices, those that are set first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int()[None, None], order.int()[None, None]


# ---------------------------------------------------------------------------------------------------------------------
# Kernels for rows of different lengths

# (q (T, H, D), k and v (K, H_kv, D), cu_q, cu_k (rows + 1,) int32, longest q, longest k, scale, window, softcap) -> (T, H, D);
# causal, queries and keys of a row aligned at its end.
VarlenKernel = Callable[..., Tensor]


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    *,
    kernel: VarlenKernel,
) -> Tensor:
    """(1, T, H, D) from (1, H, T, D) and (1, H_kv, T, D), by one call of `kernel` for all rows of all lengths."""
    rows = layout.cached(("varlen", str(query.device)), lambda: _Rows(layout, query.device))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if rows.copies:
        k, v = (_Copied.apply(x, rows.keys, rows.own, rows.copies) for x in (k, v))
    return kernel(q, k, v, *rows.lengths, scaling, window, softcap)[None]


class _Rows:
    """The rows of a layout and which keys they have: the packed row itself is the list of all queries.

    lengths: what a kernel wants to know. keys: (K,) place in the packed row of every key. own: (T,) where every token
    stands among the keys by itself. copies: (places of prompt tokens, where a copy of theirs stands), in as many parts
    as a prompt has further responses; no place is twice in a part.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        queries, keys, own = [], [], []
        most = max((len(responses) for _, responses in layout.groups), default=0)
        copies: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in range(most)]
        start = before = 0  # in the packed row; among the keys
        for prompt, responses in layout.groups:
            group = torch.arange(start, start + prompt)
            for number, length in enumerate((prompt + sum(responses[:1]), *responses[1:])):
                if length == 0:
                    continue
                if number:
                    copies[number][0].append(group)
                    copies[number][1].append(torch.arange(before, before + prompt))
                    keys.append(group)
                    before += prompt
                queries.append(length)
                keys.append(torch.arange(start, start + length))
                own.append(torch.arange(before, before + length))
                start, before = start + length, before + length
        places = torch.cat(own)
        ends = torch.tensor(queries).cumsum(0)
        cu_q, cu_k = (F.pad(x, (1, 0)).int() for x in (ends, places[ends - 1] + 1))
        self.lengths = cu_q.to(device), cu_k.to(device), max(queries), int(cu_k.diff().max())
        self.keys, self.own = torch.cat(keys).to(device), places.to(device)
        self.copies = [(torch.cat(a).to(device), torch.cat(b).to(device)) for a, b in copies if a]


class _Copied(torch.autograd.Function):
    """Rows by index, some more than once. Its backward adds what came to the copies, part by part: no two of a part belong
    to one row, so that the sum does not depend on an order (`index_select`'s own backward would use atomic additions)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, own: Tensor, copies: list[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.own, ctx.copies = own, copies
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = grads[0]
        total = grad.index_select(0, ctx.own)
        if len(ctx.copies) > 1:  # many additions in half precision would lose what is small
            total = total.float() if total.dtype in (torch.float16, torch.bfloat16) else total
        for places, copies in ctx.copies:
            added = total.index_select(0, places) + grad.index_select(0, copies).to(total.dtype)
            total.index_copy_(0, places, added)
        return total.to(grad.dtype), None, None, None


def varlen_kernel(softcap: float | None) -> VarlenKernel | None:
    """The kernel to use, or None where there is none: PyTorch's own, or `flash_attn`'s where it is installed and a soft
    cap is wanted, which the former does not know."""
    if softcap is None:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            pass
        else:
            if {"scale", "window_size"} <= set(inspect.signature(varlen_attn).parameters):
                return torch_varlen_kernel
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    needed = {"softmax_scale", "window_size"} | ({"softcap"} if softcap is not None else set())
    return flash_attn_kernel if needed <= set(inspect.signature(flash_attn_varlen_func).parameters) else None


def torch_varlen_kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, most_q: int, most_k: int, scale: Any, window: Any, softcap: Any
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in varlen_parameters():
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    # The window counts keys BEFORE the query; (−1, 0) is causal.
    before = (-1, 0) if window is None else (window - 1, 0)
    found: Any = varlen_attn(q, k, v, cu_q, cu_k, most_q, most_k, scale=scale, window_size=before, **options)
    return found


@functools.cache
def varlen_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def flash_attn_kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, most_q: int, most_k: int, scale: Any, window: Any, softcap: Any
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    options = {} if softcap is None else {"softcap": softcap}
    before = (-1, -1) if window is None else (window - 1, 0)
    return flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, most_q, most_k, softmax_scale=scale, causal=True, window_size=before, **options
    )


# ---------------------------------------------------------------------------------------------------------------------
# What can be used


def lacks(name: str, query: Tensor, key: Tensor, softcap: float | None) -> str | None:
    """Why "flex" or "varlen" is not to be had for such tensors, in words, or None."""
    if name == "flex":
        if query.device.type == "cuda" and not _has_triton():
            return "there is no Triton to compile FlexAttention with"
        return None
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"kernels for variable lengths compute in half precision, not in {query.dtype}"
    if query.shape[-1] > _LARGEST_HEAD or query.shape[-1] % 8:
        return f"kernels for variable lengths know no heads of size {query.shape[-1]}"
    if query.device.type != "cuda":
        return "kernels for variable lengths need a GPU"
    if varlen_kernel(softcap) is None:
        return "no kernel for variable lengths is installed" + ("" if softcap is None else " that knows soft caps")
    return None


@functools.cache
def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()


# ---------------------------------------------------------------------------------------------------------------------
# The rest of a layer


def compile_layers(model: nn.Module, **options: Any) -> int:
    """Compiles every decoder layer of a transformers model in place, and returns how many there are.

    Attention over a packed row stays outside (`shared_prefix`): what is compiled knows only the number of tokens, which is
    dynamic, so that it is compiled once and serves every batch. `torch.compile(model)`, which is what the Trainer's
    `torch_compile` does, gives the same numbers but also compiles our own index arithmetic, several times over. Where the
    last layer is narrowed (`last_layer`) it is compiled by itself.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.compile(**{"dynamic": True, **options})
    return len(layers)
