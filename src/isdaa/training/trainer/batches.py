"""Tokenised pairs in memory, and the order in which training reads them.

Legend: B pairs of a micro-batch, W ranks, A accumulation steps; a global batch is A·W·B pairs.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from isdaa.data.collation import PairBatch, collate
from isdaa.data.pairs import LARGEST_WEIGHT

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
BEHAVIOUR_COLUMNS = ("behaviour_chosen_logps", "behaviour_rejected_logps")
REFERENCE_COLUMNS = ("reference_chosen_logps", "reference_rejected_logps")
FLOAT_COLUMNS = (*REFERENCE_COLUMNS, *BEHAVIOUR_COLUMNS, "weight")


class TokenisedPairs(Dataset):
    """N tokenised pairs as flat arrays. Reading a row is slicing, so that a small model does not wait for its data.

    rows: a `datasets.Dataset` or a sequence of mappings with `prompt_ids`, `chosen_ids`, `rejected_ids`, and optionally
        `reference_*_logps`, `behaviour_*_logps`, `weight` and `id`. Raises ValueError where token ids are missing or a weight is
        negative or above 1e6.
    """

    def __init__(self, rows: Any) -> None:
        self.tokens: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # column -> ids (ΣT,), offsets (N + 1,)
        self.floats: dict[str, np.ndarray] = {}  # column -> (N,) float64, NaN where a row has none
        names = rows.column_names if hasattr(rows, "column_names") else {name for row in rows for name in row}
        for name in TOKEN_COLUMNS:
            if name not in names:
                raise ValueError(f"the pairs are not tokenised: column {name} is missing")
            self.tokens[name] = _ragged(rows, name)
        for name in FLOAT_COLUMNS:
            if name in names:
                column = _numbers(rows, name)
                wrong = np.flatnonzero((column < 0) | (column > LARGEST_WEIGHT))
                if name == "weight" and len(wrong):
                    raise ValueError(f"row {wrong[0]}: weight is {column[wrong[0]]:g}; it must be from 0 to {LARGEST_WEIGHT:g}")
                if not np.isnan(column).all():
                    self.floats[name] = column
        self.names: Any = None  # (N,) what people call the rows, by their `id`; None where they have none
        if "id" in names:
            self.names = rows.with_format("arrow")[:]["id"] if hasattr(rows, "column_names") else [row.get("id") for row in rows]

    def __len__(self) -> int:
        return len(self.tokens["prompt_ids"][1]) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index` for `collate`. `~index`, a negative number, is the same row as a fill-in: valid is False."""
        at = ~index if index < 0 else index
        row: dict[str, Any] = {"index": at, "valid": index >= 0}
        for name, (ids, offsets) in self.tokens.items():
            row[name] = ids[offsets[at] : offsets[at + 1]]
        for name, values in self.floats.items():
            row[name] = None if np.isnan(values[at]) else values[at]
        return row

    def name(self, index: int) -> str:
        """What people call a row: its `id`, which is 'file:row' where it has none of its own; else its number."""
        found: Any = None if self.names is None else self.names[index]
        found = found.as_py() if hasattr(found, "as_py") else found
        return f"row {index}" if found is None else str(found)

    def lengths(self) -> np.ndarray:
        """(N,) tokens of prompt + chosen + rejected: what a row costs in a packed batch."""
        return np.sum([np.diff(offsets) for _, offsets in self.tokens.values()], axis=0)

    def scored_lengths(self) -> np.ndarray:
        """(2, N) scored tokens of chosen and rejected responses."""
        found = []
        for name in TOKEN_COLUMNS[1:]:
            ids, offsets = self.tokens[name]
            found.append(np.diff(np.concatenate([[0], np.cumsum(ids >= 0)])[offsets]))  # `~id`: not scored
        return np.stack(found)

    def prompt_groups(self) -> np.ndarray:
        """(N,) the same number for pairs with the same prompt, counted from 0 in the order of their first pairs."""
        ids, offsets = self.tokens["prompt_ids"]
        seen: dict[bytes, int] = {}
        keys = (hashlib.blake2b(ids[a:b].tobytes(), digest_size=16).digest() for a, b in pairwise(offsets.tolist()))
        return np.fromiter((seen.setdefault(key, len(seen)) for key in keys), dtype=np.int64, count=len(self))

    def extent(self) -> tuple[int, int]:
        """The highest token id, and the tokens of the longest prompt + response."""
        lengths = {name: np.diff(offsets) for name, (_, offsets) in self.tokens.items()}
        longest = lengths["prompt_ids"] + np.maximum(lengths["chosen_ids"], lengths["rejected_ids"])
        highest = max(int(np.maximum(ids, ~ids).max(initial=0)) for ids, _ in self.tokens.values())  # `~id`: not scored
        return highest, int(longest.max(initial=0))

    def batch(self, indices: Sequence[int] | np.ndarray) -> PairBatch:
        """The packed batch of some rows, in their order."""
        return collate([self[int(index)] for index in indices])

    def with_reference(self, chosen: np.ndarray, rejected: np.ndarray) -> TokenisedPairs:
        """The same pairs (arrays shared) with reference logps, each (N,)."""
        return self._with(dict(zip(REFERENCE_COLUMNS, (chosen, rejected), strict=True)))

    def with_behaviour(self, chosen: np.ndarray, rejected: np.ndarray) -> TokenisedPairs:
        """The same pairs (arrays shared) with behaviour logps, each (N,), where a row has none of its own."""
        both = {}
        for name, values in zip(BEHAVIOUR_COLUMNS, (chosen, rejected), strict=True):
            own = self.floats.get(name)
            both[name] = values if own is None else np.where(np.isnan(own), values, own)
        return self._with(both)

    def _with(self, columns: Mapping[str, np.ndarray]) -> TokenisedPairs:
        for name, values in columns.items():
            if values.shape != (len(self),):
                raise ValueError(f"{name} must have shape ({len(self)},); got {values.shape}")
        pairs = object.__new__(TokenisedPairs)
        pairs.tokens, pairs.names = self.tokens, self.names
        pairs.floats = self.floats | {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
        return pairs

    def row_digests(self) -> np.ndarray:
        """(N, 16) uint8: digests of each pair's token ids."""
        parts = [(ids.astype("<i4"), offsets.tolist()) for ids, offsets in self.tokens.values()]
        found = bytearray()
        for i in range(len(self)):
            sha = hashlib.blake2b(digest_size=16)
            for ids, offsets in parts:
                own = ids[offsets[i] : offsets[i + 1]].tobytes()
                sha.update(len(own).to_bytes(8, "little") + own)
            found += sha.digest()
        return np.frombuffer(bytes(found), dtype=np.uint8).reshape(len(self), 16)

    def content_digest(self) -> str:
        """Digest of the token ids, in order: what reference logps depend on besides the model."""
        sha = hashlib.sha256()
        for name in TOKEN_COLUMNS:
            ids, offsets = self.tokens[name]
            sha.update(np.ascontiguousarray(np.diff(offsets), dtype="<i8").tobytes())
            sha.update(np.ascontiguousarray(ids, dtype="<i8").tobytes())
        return sha.hexdigest()[:24]


def tokenised(rows: Any) -> TokenisedPairs:
    """`rows` as `TokenisedPairs`, which they may be already."""
    return rows if isinstance(rows, TokenisedPairs) else TokenisedPairs(rows)


def _numbers(rows: Any, name: str) -> np.ndarray:
    """One column of numbers, (N,) float64, NaN where a row has none."""
    values = rows.with_format("arrow")[:][name].to_pylist() if hasattr(rows, "column_names") else [row.get(name) for row in rows]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _ragged(rows: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """One column of lists of ints as flat int32 ids and int64 offsets."""
    if hasattr(rows, "column_names"):
        column = rows.with_format("arrow")[:][name].combine_chunks()
        if column.null_count:
            raise ValueError(f"the pairs are not tokenised: column {name} has rows without ids")
        offsets = column.offsets.to_numpy().astype(np.int64)
        ids = column.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
        return ids.astype(np.int32), offsets - offsets[0]
    lists = [row[name] for row in rows]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in lists])]).astype(np.int64)
    ids = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in lists]) if lists else np.zeros(0, np.int32)
    return ids, offsets


class GlobalBatchSampler(Sampler[list[int]]):
    """Micro-batches of one rank, so that every global batch is the next A·W·B pairs of a seeded permutation.

    How a global batch is split over ranks and accumulation steps changes nothing but the splitting. At an epoch's end
    the last global batch is smaller; where its pairs do not divide among the ranks, some repeat as fill-ins, marked by
    `~index`. The epoch follows from the trainer's step, so that a resumed run reads on where it stopped.

    lengths: (N,) tokens of each pair; micro-batches of a global batch then get their pairs by `arrange`: "balanced" gives
        all about as many tokens, so that no rank waits and no step needs the memory of the longest pairs together;
        "sorted" puts pairs of like length together, for a forward pass that pads.
    groups: (N,) prompt of each pair, as a number; pairs of one prompt then follow one another, which lets them share its
        forward pass. Prompts come in a seeded order, and the pairs of a prompt in one; nothing is arranged further.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        accumulation: int,
        world: int,
        rank: int,
        seed: int,
        lengths: np.ndarray | None = None,
        arrange: Literal["balanced", "sorted"] = "balanced",
        groups: np.ndarray | None = None,
    ) -> None:
        self.size, self.batch_size, self.accumulation = size, batch_size, accumulation
        self.world, self.rank, self.seed = world, rank, seed
        self.lengths, self.arrange, self.groups = lengths, arrange, groups
        self.step = 0  # optimiser step at which the next iteration starts; the trainer keeps it up to date

    @property
    def global_batch(self) -> int:
        """Pairs of a full global batch."""
        return self.batch_size * self.accumulation * self.world

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch."""
        return -(-self.size // self.global_batch)

    def pairs_seen(self, step: int) -> int:
        """Pairs that `step` optimiser steps have read, fill-ins not counted."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        return epochs * self.size + min(rest * self.global_batch, self.size)

    def __len__(self) -> int:
        return -(-self.size // (self.batch_size * self.world))

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of an epoch, (N,)."""
        order = self._permutation(self.size, f"{self.seed},{epoch}")
        if self.groups is None:
            return order
        rank = np.argsort(self._permutation(int(self.groups.max()) + 1, f"{self.seed},{epoch},prompts"))
        return order[np.argsort(rank[self.groups[order]], kind="stable")]

    def _permutation(self, size: int, name: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).numpy()

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order(self.step // self.steps_per_epoch)
        stride = self.batch_size * self.world
        for first in range(0, self.size, self.global_batch):
            together = self._arranged(order[first : first + self.global_batch])
            for start in range(0, len(together), stride):
                yield shard(together[start : start + stride], self.world, self.rank)

    def _arranged(self, together: np.ndarray) -> np.ndarray:
        """A global batch, in the order in which `shard` deals it out."""
        if self.lengths is None or self.groups is not None or len(together) <= self.batch_size:
            return together
        lengths = self.lengths[together]
        longest_first = np.argsort(-lengths, kind="stable")
        if self.arrange == "sorted":
            return together[longest_first]
        stride = self.batch_size * self.world
        room = []  # places of every rank in every micro-batch
        for start in range(0, len(together), stride):
            size = min(stride, len(together) - start)
            part = -(-size // self.world)
            room += [max(0, min(part, size - rank * part)) for rank in range(self.world)]
        # Longest first, each to where the fewest tokens are so far.
        places: list[list[int]] = [[] for _ in room]
        heap = [(0, place) for place, free in enumerate(room) if free]
        for i in longest_first.tolist():
            tokens, place = heapq.heappop(heap)
            places[place].append(i)
            if len(places[place]) < room[place]:
                heapq.heappush(heap, (tokens + int(lengths[i]), place))
        return together[[i for place in places for i in sorted(place)]]


def shard(indices: np.ndarray, world: int, rank: int) -> list[int]:
    """The `rank`-th of `world` equal consecutive parts; the last ones are filled up with `~indices[0]`."""
    part = -(-len(indices) // world)
    mine = indices[rank * part : (rank + 1) * part].tolist()
    return [int(i) for i in mine] + [~int(indices[0])] * (part - len(mine))


def own_logps(pairs: TokenisedPairs) -> np.ndarray:
    """(N,) whether a row has behaviour logps of both its responses."""
    columns = [pairs.floats.get(name, np.full(len(pairs), np.nan)) for name in BEHAVIOUR_COLUMNS]
    found: np.ndarray = ~np.isnan(np.stack(columns)).any(axis=0)
    return found
