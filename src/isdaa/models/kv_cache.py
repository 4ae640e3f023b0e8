"""The key-value cache of the sampler: transformers' own, with room to grow and rows that can be chosen."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# Layers whose whole state is one row of keys and values per batch row, so that rows can be dropped and repeated.
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


class RoomyLayer(DynamicLayer):
    """`DynamicLayer` that writes into spare room instead of copying all keys and values for every new token.

    `keys` and `values` are views (rows, heads, tokens so far, head size) of the buffers behind them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.key_buffer: Tensor | None = None
        self.value_buffer: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens, (rows, heads, new tokens, head size); return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.get_seq_length()
        self.key_buffer = _append(self.key_buffer, used, key_states)
        self.value_buffer = _append(self.value_buffer, used, value_states)
        self._show(used + key_states.shape[2])
        return self.keys, self.values  # type: ignore[return-value]

    def _show(self, length: int) -> None:
        assert self.key_buffer is not None and self.value_buffer is not None
        self.keys, self.values = self.key_buffer[:, :, :length], self.value_buffer[:, :, :length]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep (or repeat) the rows named by `indices`, an int64 vector."""
        if self.key_buffer is None or self.value_buffer is None:
            return
        length = self.get_seq_length()
        self.key_buffer = self.key_buffer.index_select(0, indices.to(self.key_buffer.device))
        self.value_buffer = self.value_buffer.index_select(0, indices.to(self.value_buffer.device))
        self._show(length)


def _append(buffer: Tensor | None, used: int, states: Tensor) -> Tensor:
    length = used + states.shape[2]
    if buffer is None or length > buffer.shape[2]:
        rows, heads, _, size = states.shape
        larger = states.new_empty(rows, heads, length + max(32, length // 2), size)
        if buffer is not None:
            larger[:, :, :used] = buffer[:, :, :used]
        buffer = larger
    buffer[:, :, used:length] = states
    return buffer


def new_cache(model: nn.Module) -> DynamicCache | None:
    """An empty cache for a transformers model, or None where its state is more than keys and values (state-space and
    linear-attention layers), which no row can be taken out of here."""
    cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
    if any(type(layer) not in _PLAIN_LAYERS for layer in cache.layers):
        return None
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def select_rows(cache: DynamicCache, indices: Tensor) -> None:
    """Keep (or repeat) the batch rows named by `indices`, an int64 vector, in every layer."""
    for layer in cache.layers:
        layer.batch_select_indices(indices)  # type: ignore[union-attr]
