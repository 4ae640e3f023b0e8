"""Attention over the packed row on a CPU: plain matrix products, block after block of queries.

PyTorch's fused kernel for the CPU runs its backward pass at a third of the speed of a matrix product, and wants the keys
of grouped heads repeated. Here the query heads that share keys stand below each other, as the rows of one product per
group of heads; a block of queries sees its keys and no others, so that next to nothing is computed above the diagonal; and
the backward pass takes the probabilities again, so that memory grows with T and not with its square.

Under autocast to bf16 it stays in fp32, as queries and keys come from the rotary positions: the fused kernel in bf16 takes
longer, and scores keep their digits.

Legend: T tokens of the packed row, H heads, G heads of keys, r = H / G heads of queries to each, D head size; n queries
and k keys of a block, s the factor of the scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from isdaa.models.attention.layout import Layout
from isdaa.models.device_kind import kind_of

BLOCK = 96  # queries; scores of a block then stay in the cache at the lengths of preference data
_DTYPES = (torch.float32, torch.float64)
# Rows beyond this are not measured; the scores of a block grow with the row.
_LONGEST = 4096
# Heads times their size from which blocks win on pairs of all lengths but short ones: with 512 and more they take 0.68 to 1.08 of
# the fused kernel's time, with 96 (the embedded world's models) 0.88 to 1.30. Between the two nothing is measured.
NARROWEST = 256


def attend_blocks(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None = None) -> Tensor:
    """(1, T, H, D) from (1, H, T, D) and (1, G, T, D): every response sees its prompt and itself, causally. Values may be of
    another size than keys, and then so is what is returned.

    scaling: of the scores; None is 1/√D.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    key, value = key.to(query.dtype), value.to(query.dtype)  # under autocast queries are in fp32, values not
    attended: Tensor = _Attention.apply(query, key, value, layout, scaling)
    return attended


def lacks(query: Tensor, window: int | None, softcap: float | None) -> str | None:
    """Why this attention cannot be used, in words, or None."""
    if query.device.type != "cpu" or kind_of(query.device) != "cpu":
        return "it is for a CPU"
    if query.dtype not in _DTYPES:
        return "it knows fp32 and fp64 alone"
    if window is not None or softcap is not None:
        return "it knows no windows and no soft caps"
    return None


def suits(query: Tensor, layout: Layout) -> bool:
    """Whether this attention is known to be the faster one, for queries (1, H, T, D) of a layout that is not short."""
    return layout.longest <= _LONGEST and query.shape[1] * query.shape[3] >= NARROWEST


@dataclass(frozen=True)
class _Block:
    """Places in the packed row: queries first … last - 1; keys own … last - 1, and those of a prompt that lies elsewhere."""

    first: int
    last: int
    own: int
    prompt: slice

    def keys(self, x: Tensor) -> Tensor:
        """(G, k, D) of (G, T, D) keys or values: the prompt's, then its own."""
        own = x[:, self.own : self.last]
        return torch.cat([x[:, self.prompt], own], 1) if self.prompt.stop > self.prompt.start else own

    def add(self, total: Tensor, x: Tensor) -> None:
        """Adds (G, k, D) to where these keys lie in (G, T, D)."""
        prompt = self.prompt.stop - self.prompt.start
        if prompt:
            total[:, self.prompt] += x[:, :prompt]
        total[:, self.own : self.last] += x[:, prompt:]


def _blocks(layout: Layout) -> Iterator[_Block]:
    start = prompt_start = 0
    for prompt, length in layout.pieces:
        if not prompt:
            prompt_start = start
        for first in range(start, start + length, BLOCK):
            yield _Block(first, min(first + BLOCK, start + length), start, slice(prompt_start, prompt_start + prompt))
        start += length


class _Attention(torch.autograd.Function):
    """softmax(s·QKᵀ)·V over what is visible. With P the probabilities and dO the gradient of the output:
    dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P∘(dP - rowsum(P∘dP)), dQ = s·dS·K and dK = s·dSᵀ·Q."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> Tensor:
        queries = _rows(query[0].transpose(0, 1), key.shape[1]).mul_(scaling)
        keys, values = key[0].contiguous(), value[0].contiguous()
        shared, later = query.shape[1] // key.shape[1], _later(query)
        out = query.new_empty(layout.tokens, query.shape[1], value.shape[3])
        with torch.autocast("cpu", enabled=False):
            for block in _blocks(layout):
                rows = slice(block.first * shared, block.last * shared)
                probabilities = _probabilities(queries[:, rows], block.keys(keys), shared, later)
                _write(out[block.first : block.last], torch.bmm(probabilities, block.keys(values)))
        ctx.save_for_backward(queries, keys, values)
        ctx.layout, ctx.scaling = layout, scaling
        return out[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        queries, keys, values = ctx.saved_tensors
        grad_out = _rows(grads[0][0], len(keys))
        shared, later = queries.shape[1] // keys.shape[1], _later(queries)
        grad_queries = queries.new_empty(keys.shape[1], len(keys) * shared, keys.shape[2])
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        for block in _blocks(ctx.layout):
            rows = slice(block.first * shared, block.last * shared)
            query, above, seen = queries[:, rows], grad_out[:, rows], block.keys(keys)
            probabilities = _probabilities(query, seen, shared, later)
            block.add(grad_values, torch.bmm(probabilities.transpose(1, 2), above))
            grad_probabilities = torch.bmm(above, block.keys(values).transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_probabilities, probabilities, -1, query.dtype)
            block.add(grad_keys, torch.bmm(grad_scores.transpose(1, 2), query))
            _write(grad_queries[block.first : block.last], torch.bmm(grad_scores, seen))
        return grad_queries.mul_(ctx.scaling).transpose(0, 1)[None], grad_keys[None], grad_values[None], None, None


def _rows(x: Tensor, groups: int) -> Tensor:
    """A copy of (T, H, D) as (G, T·r, D): the heads of a group below each other, token by token, so that a block of tokens is
    a slice."""
    return x.unflatten(1, (groups, -1)).transpose(0, 1).clone(memory_format=torch.contiguous_format).flatten(1, 2)


def _write(out: Tensor, rows: Tensor) -> None:
    """Puts (G, n·r, D) into (n, H, D)."""
    out.unflatten(1, (len(rows), -1)).copy_(rows.unflatten(1, (len(out), -1)).transpose(0, 1))


def _later(like: Tensor) -> Tensor:
    """(BLOCK, 1, BLOCK): -∞ where a key lies behind a query of the same block, else 0."""
    return like.new_full((BLOCK, BLOCK), -torch.inf).triu_(1)[:, None]


def _probabilities(queries: Tensor, keys: Tensor, shared: int, later: Tensor) -> Tensor:
    """(G, n·r, k) of n queries, the last of the k keys being their own."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    n = queries.shape[1] // shared
    scores.unflatten(1, (n, shared))[..., -n:].add_(later[:n, :, :n])
    return torch.softmax(scores, -1)
