"""Rows in batches of at most so many tokens, for every forward pass of a packed row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def by_tokens(lengths: Sequence[int], budget: float, shared: Sequence[int] | None = None) -> Iterator[list[int]]:
    """The numbers of consecutive rows with at most `budget` tokens together; a longer row is alone.

    shared: of each row, the tokens that the row before it has too, and that cost nothing in the same batch.
    """
    batch: list[int] = []
    tokens = 0
    for row, length in enumerate(lengths):
        cost = length - shared[row] if shared is not None and batch else length
        if batch and tokens + cost > budget:
            yield batch
            batch, tokens, cost = [], 0, length
        batch.append(row)
        tokens += cost
    if batch:
        yield batch


def longest_first(lengths: Sequence[int], budget: float) -> Iterator[list[int]]:
    """`by_tokens`, the longest rows first: what does not fit into memory fails at once, and like lengths share a batch."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for batch in by_tokens([lengths[row] for row in order], budget):
        yield [order[place] for place in batch]
