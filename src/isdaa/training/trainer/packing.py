"""What goes through the model at once: pairs of a micro-batch, packed so that no prompt or response is in it twice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from isdaa.data.collation import PairBatch
from isdaa.models.attention.layout import Layout
from isdaa.models.packed.forward import pass_tokens
from isdaa.models.packed.token_batches import by_tokens
from isdaa.objectives.objective import Objective


@dataclass
class Piece:
    """Pairs of one forward pass, on the device, with their packed row.

    batch: B pairs, each with a prompt of its own in `batch.input_ids`. input_ids: (T,) the packed row that the model
    sees; layout: where prompts and responses lie in it.
    """

    batch: PairBatch
    input_ids: Tensor
    layout: Layout

    @classmethod
    def of(cls, batch: PairBatch, device: torch.device | str = "cpu") -> Piece:
        """A piece with every prompt, and every response to it, in the row once."""
        # The layout comes from the lengths on the CPU: no forward pass waits for the device to send them back.
        input_ids, layout = packed(batch)
        return cls(batch.to(device, non_blocking=True), input_ids.to(device, non_blocking=True), layout)


@dataclass
class MicroBatch:
    """One accumulation step of one rank: the pieces that go through the model one after the other, in the pairs' order.

    weights: final weights of each piece, each (B,), where they span the global batch and were computed ahead.
    """

    pieces: list[Piece]
    weights: list[Tensor] | None = None

    @property
    def pairs(self) -> int:
        """Pairs in it, fill-ins included."""
        return sum(len(piece.batch) for piece in self.pieces)


def packed(batch: PairBatch) -> tuple[Tensor, Layout]:
    """(T,) packed row of B pairs, and its layout. Equal prompts of a batch are one prompt, whatever their places, and
    equal responses to one prompt are one response."""
    parts = [ids.numpy() for ids in batch.input_ids.split(torch.stack(batch.parts(), 1).flatten().tolist())]
    prompts: dict[bytes, tuple[np.ndarray, dict[bytes, tuple[int, np.ndarray]]]] = {}
    places: list[tuple[int, int]] = []  # (prompt, place among its responses) of chosen_0, rejected_0, chosen_1, …
    numbers: dict[bytes, int] = {}
    for prompt, *responses in zip(parts[0::3], parts[1::3], parts[2::3], strict=True):
        key = prompt.tobytes()
        number = numbers.setdefault(key, len(numbers))
        _, known = prompts.setdefault(key, (prompt, {}))
        for response in responses:
            place, _ = known.setdefault(response.tobytes(), (len(known), response))
            places.append((number, place))
    if len(prompts) == len(batch) and all(len(known) == 2 for _, known in prompts.values()):
        layout = Layout.of_pairs(*batch.parts())
        return layout.reading(batch.input_ids), layout
    rows: list[np.ndarray] = []
    lengths: list[int] = []
    prompt_of: list[int] = []
    firsts: list[int] = []
    for number, (prompt, known) in enumerate(prompts.values()):
        firsts.append(len(lengths))
        rows += [prompt, *(response for _, response in known.values())]
        lengths += [len(response) for _, response in known.values()]
        prompt_of += [number] * len(known)
    responses_of = torch.tensor([firsts[number] + place for number, place in places])
    prompt_lengths = torch.tensor([len(prompt) for prompt, _ in prompts.values()])
    layout = Layout(
        prompt_lengths, torch.tensor(lengths), torch.tensor(prompt_of), chosen=responses_of[0::2], rejected=responses_of[1::2]
    )
    return layout.reading(torch.from_numpy(np.concatenate(rows))), layout


def piece_tokens(model: nn.Module, device: torch.device, objective: Objective, processes: int) -> int | None:
    """Tokens of a piece where the configuration names none. On a CPU a pass of a few seconds, which is as fast as a larger one
    and takes less memory; None, all pairs at once, on a GPU, and where weights that span the batch would need another pass."""
    alone = device.type == "cpu" and processes == 1 and not objective.needs_batch
    return pass_tokens(model) if alone else None


def split_by_tokens(batch: PairBatch, budget: int | None, at_least: int = 1) -> list[PairBatch]:
    """Consecutive pieces of at most `budget` tokens each (a longer pair is a piece of its own), at least `at_least`.

    The prompt of a pair that has the same as the pair before it costs nothing in the same piece.
    """
    lengths = batch.prompt_lengths + batch.chosen_lengths + batch.rejected_lengths
    if (budget is None or int(lengths.sum()) <= budget) and at_least <= 1:
        return [batch]
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).tolist()
    parts = by_tokens(lengths.tolist(), math.inf if budget is None else budget, _repeated_prompts(batch, ends))
    cuts = [*(part[0] for part in parts), len(batch)]
    while len(cuts) - 1 < min(at_least, len(batch)):
        widest = int(np.argmax(np.diff(cuts)))
        cuts.insert(widest + 1, (cuts[widest] + cuts[widest + 1]) // 2)
    return [_part(batch, a, b, ends[a], ends[b]) for a, b in pairwise(cuts)]


def _repeated_prompts(batch: PairBatch, ends: list[int]) -> list[int]:
    """Tokens of the prompt of each pair where it is that of the pair before, else 0."""
    prompts = [batch.input_ids[start : start + n] for start, n in zip(ends[:-1], batch.prompt_lengths.tolist(), strict=True)]
    return [0, *(len(b) if torch.equal(a, b) else 0 for a, b in pairwise(prompts))]


def _part(batch: PairBatch, first: int, last: int, start: int, end: int) -> PairBatch:
    """Pairs first … last − 1, whose tokens are start … end − 1 of the packed row."""
    values = {}
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            values[name] = value[start:end] if name == "input_ids" else value[first:last]
    return PairBatch(**values)
