"""Running a model one token at a time for many rows: with a cache where the model can, without where it cannot.

A run holds the next-token logits of its rows, (R, V); `step` appends a token to each row, `keep` goes on with some.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Collection, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from isdaa.models.forward import inner_model
from isdaa.models.kv_cache import new_cache, select_rows

logger = logging.getLogger(__name__)

Group = tuple[tuple[int, ...], list[int]]  # a prompt, and the numbers of its samples


class Run(Protocol):
    """Rows in flight; the order is that of the samples in their groups."""

    logits: Tensor

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (R,) alone."""

    def step(self, tokens: Tensor) -> None:
        """Append one token (R,) to each row."""


class CachedRun:
    """Rows padded on the left; keys and values are kept, so each step computes one token per row."""

    def __init__(self, model: nn.Module, groups: Sequence[Group], pad_id: int) -> None:
        self.model = model
        cache = new_cache(inner_model(model))
        assert cache is not None
        self.cache, self.options = cache, _last_position_only(model)
        device = next(model.parameters()).device
        longest = max(len(prompt) for prompt, _ in groups)
        ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p, _ in groups], device=device)
        lengths = torch.tensor([len(p) for p, _ in groups], device=device)
        self.mask = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
        self.positions = lengths
        self.logits = self._forward(ids, (self.mask.cumsum(-1) - 1).clamp(min=0))
        if any(len(numbers) > 1 for _, numbers in groups):
            self.keep(torch.tensor([row for row, (_, numbers) in enumerate(groups) for _ in numbers], device=device))

    def _forward(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            **self.options,
        )
        return output.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (R,) alone; a row may be named more than once."""
        select_rows(self.cache, rows)
        self.mask, self.positions, self.logits = self.mask[rows], self.positions[rows], self.logits[rows]

    def step(self, tokens: Tensor) -> None:
        """Append one token (R,) to each row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self.logits = self._forward(tokens[:, None], self.positions[:, None])
        self.positions = self.positions + 1


class PlainRun:
    """Without cache or padding, for models that cannot do with them: rows of one length, computed anew in each step."""

    def __init__(self, model: nn.Module, groups: Sequence[Group], pad_id: int) -> None:
        self.model = model
        rows = [prompt for prompt, numbers in groups for _ in numbers]
        self.ids = torch.tensor(rows, device=next(model.parameters()).device)
        self.logits = plain_logits(model, self.ids)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (R,) alone."""
        self.ids, self.logits = self.ids[rows], self.logits[rows]

    def step(self, tokens: Tensor) -> None:
        """Append one token (R,) to each row."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self.logits = plain_logits(self.model, self.ids)


def plain_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """(R, V) next-token logits of full rows (R, T), from the model's simplest forward pass: the probe's yardstick."""
    accepted = _accepted(model)
    arguments: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    arguments = {name: value for name, value in arguments.items() if name in accepted} | _last_position_only(model)
    return model(input_ids=ids, **arguments).logits[:, -1]


def _accepted(model: nn.Module) -> Collection[str]:
    # Of the class: an instance may carry a forward of isdaa's own in front of it, which passes everything on.
    return inspect.signature(type(inner_model(model)).forward).parameters


def _last_position_only(model: nn.Module) -> dict[str, int]:
    return {"logits_to_keep": 1} if "logits_to_keep" in _accepted(model) else {}


_CACHE_WORKS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def cache_works(model: nn.Module, prompt: Sequence[int]) -> bool:
    """Whether left padding, position ids and a cache give the model's own logits; tried once a model, on few tokens."""
    if model not in _CACHE_WORKS:
        try:
            difference = _cache_error(model, (list(prompt) * 6)[:7])
        except Exception as error:  # whatever a model of unknown make raises, the plain way remains
            logger.debug("sampling with a cache failed: %s", error)
            difference = math.inf
        precise = next(model.parameters()).dtype in (torch.float32, torch.float64)
        # NaN is no sign against the cache: the loop reports it as what it is.
        _CACHE_WORKS[model] = not difference > (5e-3 if precise else 0.1)
        if not _CACHE_WORKS[model]:
            name = type(inner_model(model)).__name__
            logger.warning("%s does not support padded sampling with a cache; sampling without one, which is slow", name)
    return _CACHE_WORKS[model]


def _cache_error(model: nn.Module, tokens: list[int]) -> float:
    """Largest relative error of the cached logits after a padded prompt and after one more token."""
    if not {"position_ids", "past_key_values", "attention_mask"} <= set(_accepted(model)):
        return math.inf
    if new_cache(inner_model(model)) is None:
        return math.inf
    rows = [tokens[:3], tokens[1:]]
    run = CachedRun(model, [(tuple(row), [0]) for row in rows], pad_id=tokens[0])
    device = run.logits.device
    errors = []
    for _ in range(2):
        for row, logits in zip(rows, run.logits, strict=True):
            expected = plain_logits(model, torch.tensor([row], device=device))[0]
            errors.append(float((logits - expected).abs().max() / expected.abs().max()))
        rows = [[*row, tokens[0]] for row in rows]
        run.step(torch.tensor([tokens[0]] * 2, device=device))
    return max(errors)
