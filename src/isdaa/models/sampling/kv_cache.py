"""The key-value cache of the sampler: transformers' own, with room to grow and rows that can be chosen.

Legend: R rows, T tokens so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# Layers whose whole state is one row of keys and values per batch row, so that rows can be dropped and repeated.
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


class RoomyLayer(DynamicLayer):
    """`DynamicLayer` that writes into spare room instead of copying all keys and values for every new token.

    `keys` and `values` (R, heads, T, head size) are views of the buffers behind them. The first tokens need no buffer:
    their keys and values are kept as they come.
    """

    def __init__(self) -> None:
        super().__init__()
        self.key_buffer: Tensor | None = None
        self.value_buffer: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens, (R, heads, new tokens, head size); return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        else:
            assert self.keys is not None and self.values is not None
            self.key_buffer, self.keys = _append(self.key_buffer, self.keys, key_states)
            self.value_buffer, self.values = _append(self.value_buffer, self.values, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep (or repeat) the rows named by `indices`, an int64 vector."""
        if self.keys is None or self.values is None:
            return
        self.keys, self.values = (x.index_select(0, indices.to(x.device)) for x in (self.keys, self.values))
        self.key_buffer = self.value_buffer = None

    def move(self, rows: int, into: Tensor, origin: Tensor) -> None:
        """Copy the rows `origin` to the places `into`, then keep the first `rows` rows: nothing else is copied."""
        if self.keys is None or self.values is None:
            return
        if len(into):
            for x in (self.keys, self.values):
                x.index_copy_(0, into.to(x.device), x.index_select(0, origin.to(x.device)))
        self.keys, self.values = self.keys[:rows], self.values[:rows]
        if self.key_buffer is not None and self.value_buffer is not None:
            self.key_buffer, self.value_buffer = self.key_buffer[:rows], self.value_buffer[:rows]

    def join(self, parts: Sequence[DynamicLayer], repeats: Sequence[Tensor | None]) -> None:
        """Take the rows of `parts` one below the other, the shorter ones padded on the left with zeros.

        repeats: for each part its rows in the order wanted, or None for all of them once.
        """
        first = parts[0].keys
        if first is None:  # a layer that reads another one's keys
            return
        self.lazy_initialization(first, first)
        self.key_buffer, self.keys = _stack([part.keys for part in parts], repeats)
        self.value_buffer, self.values = _stack([part.values for part in parts], repeats)


def _room(length: int) -> int:
    return length + max(32, length // 2)


def room_of(prompt: int, total: int) -> int:
    """Tokens that a layer has room for when a prompt of `prompt` tokens has grown to `total`."""
    room = _room(prompt)
    while room < total:
        room = _room(room + 1)
    return room


def _append(buffer: Tensor | None, kept: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """The buffer, larger if need be, and the view of all tokens in it."""
    used = kept.shape[2]
    length = used + states.shape[2]
    if buffer is None or length > buffer.shape[2]:
        buffer = kept.new_empty(*kept.shape[:2], _room(length), kept.shape[3])
        buffer[:, :, :used] = kept
    buffer[:, :, used:length] = states
    return buffer, buffer[:, :, :length]


def _stack(parts: Sequence[Any], repeats: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    counts = [len(part) if rows is None else len(rows) for part, rows in zip(parts, repeats, strict=True)]
    longest = max(part.shape[2] for part in parts)
    buffer = parts[0].new_empty(sum(counts), parts[0].shape[1], _room(longest), parts[0].shape[3])
    blocks = buffer.split(counts)
    for block, part, rows in zip(blocks, parts, repeats, strict=True):
        padding = longest - part.shape[2]
        block[:, :, :padding] = 0  # never attended to, but 0 times NaN would be NaN
        block[:, :, padding:longest] = part if rows is None else part.index_select(0, rows.to(part.device))
    return buffer, buffer[:, :, :longest]


def new_cache(model: nn.Module) -> DynamicCache | None:
    """An empty cache for a transformers model, or None where its state is more than keys and values (state-space and
    linear-attention layers), which no row can be taken out of here."""
    cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
    if any(type(layer) not in _PLAIN_LAYERS for layer in cache.layers):
        return None
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def can_join(cache: DynamicCache) -> bool:
    """Whether caches of this kind, of prompts of different length, can become one: not where windows slide."""
    return all(type(layer) is RoomyLayer for layer in cache.layers)


def join(caches: Sequence[DynamicCache], repeats: Sequence[Tensor | None], into: DynamicCache) -> None:
    """Fill an empty cache with the rows of others, padded on the left; `repeats` as for `RoomyLayer.join`."""
    for number, layer in enumerate(into.layers):
        assert isinstance(layer, RoomyLayer)
        layer.join([cache.layers[number] for cache in caches], repeats)  # type: ignore[misc]
        for cache in caches:
            cache.layers[number].reset()  # its memory is free for the next layer's buffers


def select_rows(cache: DynamicCache, indices: Tensor) -> None:
    """Keep (or repeat) the batch rows named by `indices`, an int64 vector, in every layer.

    Where each row of the result is the same row as before or comes from behind the result's end, only the latter move.
    """
    rows = len(indices)
    into = (indices != torch.arange(rows, device=indices.device)).nonzero()[:, 0]
    origin = indices[into]
    in_place = len(into) == 0 or int(origin.min()) >= rows
    for layer in cache.layers:
        if in_place and isinstance(layer, RoomyLayer):
            layer.move(rows, into, origin)
        else:
            layer.batch_select_indices(indices)  # type: ignore[union-attr]
