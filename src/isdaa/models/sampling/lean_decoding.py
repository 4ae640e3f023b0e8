"""Sampling from Llama-like models on a CPU: the run whose steps are as few calls of torch as they can be.

Prompts are padded on the right, which causal attention does not see. What is padded stays as a hole between a row's prompt and
its response, and a mask hides it.

Legend: R rows, T tokens, D features of a head, H heads, G heads of keys and values.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from isdaa.models.packed.patched_forward import inner_model
from isdaa.models.sampling.decoding import PROMPT_TOKENS, Group, chunks_of, gives_own_logits, repeats_of
from isdaa.models.sampling.lean import Lean, lean_parts

logger = logging.getLogger(__name__)


class LeanRun:
    """A run (see `decoding.Run`) of a model that `lean_parts` knows."""

    logits: Tensor
    states: Tensor | None

    def __init__(
        self,
        lean: Lean,
        groups: Sequence[Group],
        with_states: bool = False,
        chunk: int | None = None,
    ) -> None:
        self.lean, self.with_states = lean, with_states
        lengths = torch.tensor([len(prompt) for prompt, _ in groups])
        self.used = int(lengths.max())
        self.memory: list[tuple[Tensor, Tensor]] = []  # per layer: keys and values (R, G, room, D)
        self._ask(self._prompts(groups, lengths, chunk or PROMPT_TOKENS["cpu"]))
        self.holes: Tensor | None = None  # (R, 1, T) additive mask over the prompts
        if int(lengths.min()) < self.used:
            hole = torch.arange(self.used) >= lengths[:, None]
            self.holes = lean.like.new_zeros(hole.shape).masked_fill_(hole, -torch.inf)[:, None]
        self.positions = lengths
        repeats = repeats_of(groups, torch.device("cpu"))
        if repeats is not None:
            self._choose(repeats)

    def _prompts(self, groups: Sequence[Group], lengths: Tensor, tokens: int) -> Tensor:
        """Fills the memory; returns the states (R, C) at the prompts' last positions."""
        states, done = [], 0
        for part in chunks_of(groups, tokens):
            rows = slice(done, done + len(part))
            longest = int(lengths[rows].max())
            ids = torch.tensor([[*prompt, *[prompt[-1]] * (longest - len(prompt))] for prompt, _ in part])
            memory = partial(self._place, len(groups), rows, longest)
            states.append(self.lean.states(ids, lengths[rows] - 1, torch.ones_like(lengths[rows]), memory))
            done += len(part)
        return torch.cat(states)

    def _place(self, total: int, rows: slice, length: int, layer: int) -> tuple[Tensor, Tensor]:
        """Where keys and values of some prompts go."""
        if layer == len(self.memory):
            like = self.lean.like
            _, groups, size, _ = self.lean.layers[layer].shape
            shape = total, groups, _room(self.used), size
            self.memory.append((like.new_empty(shape), like.new_empty(shape)))
        for x in self.memory[layer]:
            x[rows, :, length : self.used] = 0  # never attended to, but 0 times NaN would be NaN
        keys, values = (x[rows, :, :length] for x in self.memory[layer])
        return keys, values

    def _ask(self, states: Tensor) -> None:
        self.logits, self.states = self.lean.head(states), states if self.with_states else None

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (R,) alone. Those that stay in their places are not copied."""
        self._choose(rows)

    def _choose(self, rows: Tensor) -> None:
        into = (rows != torch.arange(len(rows))).nonzero()[:, 0]
        origin = rows[into]
        if len(into) and int(origin.min()) < len(rows):
            self.memory = [(keys.index_select(0, rows), values.index_select(0, rows)) for keys, values in self.memory]
        else:
            for keys, values in self.memory:
                for x in (keys[:, :, : self.used], values[:, :, : self.used]):
                    x.index_copy_(0, into, x.index_select(0, origin))
            self.memory = [(keys[: len(rows)], values[: len(rows)]) for keys, values in self.memory]
        self.positions, self.logits = self.positions[rows], self.logits[rows]
        self.states = None if self.states is None else self.states[rows]
        self.holes = None if self.holes is None else self.holes[rows]

    def step(self, tokens: Tensor) -> None:
        """Append one token (R,) to each row."""
        lean, rows = self.lean, len(tokens)
        if self.used == self.memory[0][1].shape[2]:
            self.memory = [(_larger(keys), _larger(values)) for keys, values in self.memory]
        place = self.used
        self.used += 1
        hidden = lean.embed(tokens)
        table = lean.table(int(self.positions.max()) + 1)[self.positions]
        for layer, (all_keys, all_values) in zip(lean.layers, self.memory, strict=True):
            heads, groups, size, _ = layer.shape
            query, key, value = layer.heads(layer.before(hidden), table)
            all_keys[:, :, place].copy_(key)
            all_values[:, :, place].copy_(value)
            keys, values = (x[:, :, : self.used].flatten(0, 1) for x in (all_keys, all_values))
            scores = torch.bmm(query.reshape(rows * groups, heads // groups, size), keys.transpose(1, 2))
            if self.holes is not None:
                scores.view(rows, heads, self.used)[..., : self.holes.shape[2]] += self.holes
            attended = torch.bmm(torch.softmax(scores, -1), values)
            hidden = layer.after(hidden, attended.view(rows, heads * size))
        self._ask(lean.norm(hidden))
        self.positions = self.positions + 1


def _room(length: int) -> int:
    return length + max(32, length // 2)


def _larger(x: Tensor) -> Tensor:
    rows, groups, length, size = x.shape
    out = x.new_empty(rows, groups, _room(length), size)
    out[:, :, :length] = x
    return out


_WORKS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def lean_sampler(model: nn.Module, prompt: Sequence[int]) -> Lean | None:
    """The parts of a model for `LeanRun`, or None where they are not known or do not give the model's own logits; the latter is
    tried once a model, on a few tokens of a prompt."""
    lean = lean_parts(model)
    if lean is None:
        return None
    if model not in _WORKS:
        _WORKS[model] = gives_own_logits(model, prompt, lambda model, groups, pad_id, chunk: LeanRun(lean, groups, chunk=chunk))
        if not _WORKS[model]:
            logger.warning("%s: its logits are not those of its architecture", type(inner_model(model)).__name__)
    return lean if _WORKS[model] else None
