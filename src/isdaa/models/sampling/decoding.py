"""Running a model one token at a time for many rows: with a cache where the model can, without where it cannot.

A run holds the next-token logits of its rows, (R, V); `step` appends a token to each row, `keep` goes on with some. It can
also hold the hidden states (R, D) that entered the model's head, for those who go on to compare the model with another one.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from isdaa.models.packed.forward import inner_model
from isdaa.models.sampling.kv_cache import can_join, join, new_cache, select_rows

logger = logging.getLogger(__name__)

# Tokens of prompts that are computed at a time: on a CPU as many as keep the processor's caches warm.
PROMPT_TOKENS = {"cpu": 4096}

Group = tuple[tuple[int, ...], list[int]]  # a prompt, and the numbers of its samples


class Decoder(Protocol):
    """Rows in flight; the order is that of the samples in their groups."""

    logits: Tensor
    states: Tensor | None

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (R,) alone."""

    def step(self, tokens: Tensor) -> None:
        """Append one token (R,) to each row."""


class CachedDecoder:
    """Rows padded on the left; keys and values are kept, so each step computes one token per row.

    The prompts are computed in chunks of similar length, which are padded to one length only in the cache.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        pad_id: int,
        with_states: bool = False,
        chunk: int | None = None,
    ) -> None:
        self.model, self.with_states, self.options = model, with_states, _last_position_only(model)
        self.mask: Tensor
        self.logits: Tensor
        self.states: Tensor | None
        device = next(model.parameters()).device
        empty = _new_cache(model)
        chunk = chunk or PROMPT_TOKENS.get(device.type, 2**16)
        chunks = list(chunks_of(groups, chunk)) if can_join(empty) else [list(groups)]
        caches, logits, states = [], [], []
        for part in chunks:
            self.cache = _new_cache(model)
            longest = max(len(prompt) for prompt, _ in part)
            ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p, _ in part], device=device)
            self.mask = _left_padded([len(p) for p, _ in part], longest, device)
            self._forward(ids, (self.mask.cumsum(-1) - 1).clamp(min=0))
            caches.append(self.cache)
            logits.append(self.logits)
            states.append(self.states)
        lengths = [len(prompt) for prompt, _ in groups]
        self.positions = torch.tensor(lengths, device=device)
        self.logits = torch.cat(logits)
        self.states = None if any(s is None for s in states) else torch.cat(states)  # type: ignore[arg-type, unused-ignore]
        repeats = repeats_of(groups, device)
        if len(chunks) > 1:
            self.cache, self.mask = empty, _left_padded(lengths, max(lengths), device)
            join(caches, [repeats_of(part, device) for part in chunks], empty)
        elif repeats is not None:
            select_rows(self.cache, repeats)
        if repeats is not None:
            self._keep_numbers(repeats)

    def _forward(self, ids: Tensor, position_ids: Tensor) -> None:
        self.logits, self.states = _predict(
            self.model,
            self.with_states,
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            **self.options,
        )

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (R,) alone; a row may be named more than once."""
        select_rows(self.cache, rows)
        self._keep_numbers(rows)

    def _keep_numbers(self, rows: Tensor) -> None:
        self.mask, self.positions, self.logits = self.mask[rows], self.positions[rows], self.logits[rows]
        self.states = None if self.states is None else self.states[rows]

    def step(self, tokens: Tensor) -> None:
        """Append one token (R,) to each row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self._forward(tokens[:, None], self.positions[:, None])
        self.positions = self.positions + 1


def chunks_of(groups: Sequence[Group], tokens: int) -> Iterator[list[Group]]:
    """Neighbouring prompts in chunks of at most `tokens`, padding included. A chunk that is large enough ends where the length
    changes: without padding, attention needs no mask."""
    chunk: list[Group] = []
    longest = 0
    for group in groups:
        length = len(group[0])
        size = max(longest, length) * (len(chunk) + 1)
        if chunk and (size > tokens or (length != len(chunk[-1][0]) and longest * len(chunk) >= tokens // 4)):
            yield chunk
            chunk, longest = [], 0
        chunk.append(group)
        longest = max(longest, length)
    yield chunk


def repeats_of(groups: Sequence[Group], device: torch.device) -> Tensor | None:
    """Row of the prompt of each sample; None where each prompt has one."""
    if all(len(numbers) == 1 for _, numbers in groups):
        return None
    return torch.tensor([row for row, (_, numbers) in enumerate(groups) for _ in numbers], device=device)


def _left_padded(lengths: Sequence[int], longest: int, device: torch.device) -> Tensor:
    """(R, longest) mask: 1 at tokens, 0 at padding."""
    return (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long().to(device)


def _new_cache(model: nn.Module) -> Any:
    cache = new_cache(inner_model(model))
    assert cache is not None
    return cache


def _predict(model: nn.Module, with_states: bool, **arguments: Any) -> tuple[Tensor, Tensor | None]:
    """(R, V) logits of the next token, and where asked for what entered the model's head, (R, D), if it has one."""
    get_head: Any = getattr(inner_model(model), "get_output_embeddings", None)
    head = get_head() if with_states and get_head else None
    if head is None:
        return model(**arguments).logits[:, -1], None
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, -1].clone()))
    try:
        logits = model(**arguments).logits[:, -1]
    finally:
        handle.remove()
    return logits, seen[0] if len(seen) == 1 else None


class PlainDecoder:
    """Without cache or padding, for models that cannot do with them: rows of one length, computed anew in each step."""

    def __init__(self, model: nn.Module, groups: Sequence[Group], pad_id: int, with_states: bool = False) -> None:
        self.model, self.with_states = model, with_states
        rows = [prompt for prompt, numbers in groups for _ in numbers]
        self.ids = torch.tensor(rows, device=next(model.parameters()).device)
        self.logits, self.states = _plain(model, self.ids, with_states)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (R,) alone."""
        self.ids, self.logits = self.ids[rows], self.logits[rows]
        self.states = None if self.states is None else self.states[rows]

    def step(self, tokens: Tensor) -> None:
        """Append one token (R,) to each row."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self.logits, self.states = _plain(self.model, self.ids, self.with_states)


def plain_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """(R, V) next-token logits of full rows (R, T), from the model's simplest forward pass: the probe's yardstick."""
    return _plain(model, ids, with_states=False)[0]


def _plain(model: nn.Module, ids: Tensor, with_states: bool) -> tuple[Tensor, Tensor | None]:
    accepted = _accepted(model)
    arguments: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    arguments = {name: value for name, value in arguments.items() if name in accepted} | _last_position_only(model)
    return _predict(model, with_states, input_ids=ids, **arguments)


def _accepted(model: nn.Module) -> Collection[str]:
    # Of the class: an instance may carry a forward of isdaa's own in front of it, which passes everything on.
    return inspect.signature(type(inner_model(model)).forward).parameters


def _last_position_only(model: nn.Module) -> dict[str, int]:
    return {"logits_to_keep": 1} if "logits_to_keep" in _accepted(model) else {}


_WORKS: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


def cache_works(model: nn.Module, prompt: Sequence[int]) -> bool:
    """Whether left padding, position ids and a cache give the model's own logits; tried once a model, on few tokens."""
    known = _WORKS.setdefault(model, {})
    if "cache" not in known:
        known["cache"] = gives_own_logits(model, prompt, CachedDecoder)
        if not known["cache"]:
            name = type(inner_model(model)).__name__
            logger.warning("%s does not support padded sampling with a cache; sampling without one, which is slow", name)
    return known["cache"]


@torch.no_grad()
def gives_own_logits(model: nn.Module, prompt: Sequence[int], start: Callable[..., Decoder]) -> bool:
    """Whether a kind of decoder gives the model's own logits on a few tokens: `start` as `CachedDecoder`."""
    try:
        difference = _cache_error(model, (list(prompt) * 6)[:7], start)
    except Exception as error:  # whatever a model of unknown make raises, the plain way remains
        logger.debug("sampling with a cache failed: %s", error)
        difference = math.inf
    precise = next(model.parameters()).dtype in (torch.float32, torch.float64)
    # NaN is no sign against the cache: the loop reports it as what it is.
    return not difference > (5e-3 if precise else 0.1)


def _cache_error(model: nn.Module, tokens: list[int], start: Callable[..., Decoder]) -> float:
    """Largest relative error of the cached logits after a padded prompt and after one more token."""
    if not {"position_ids", "past_key_values", "attention_mask"} <= set(_accepted(model)):
        return math.inf
    if new_cache(inner_model(model)) is None:
        return math.inf
    errors = []
    for chunk in (None, 1):  # padded together, and each by itself
        rows = [tokens[:3], tokens[1:]]
        run = start(model, [(tuple(row), [0]) for row in rows], pad_id=tokens[0], chunk=chunk)
        device = run.logits.device
        for _ in range(2):
            for row, logits in zip(rows, run.logits, strict=True):
                expected = plain_logits(model, torch.tensor([row], device=device))[0]
                errors.append(float((logits - expected).abs().max() / expected.abs().max()))
            rows = [[*row, tokens[0]] for row in rows]
            run.step(torch.tensor([tokens[0]] * 2, device=device))
    return max(errors)
