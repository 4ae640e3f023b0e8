"""Sampling from the model as it is: a response depends on the model, its prompt, the seed and its key, on nothing else.

Temperature 1, top-p 1 and top-k 0 mean the model's own distribution: no other processor exists here, and the model's
own generation_config is never read (a default top-k of 50 is enough to bias a KL estimate). Every sample has a stream
of uniform numbers of its own, `uniforms(seed, key)`, and each token is read off the inverse of the cumulative
distribution, so batch size, order and the other rows of a batch change nothing (up to a float tie: one in millions).

Legend: R rows (samples in flight), V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from isdaa.errors import UserError
from isdaa.files import clean
from isdaa.models.attention.shared_prefix import plain_attention
from isdaa.models.packed.forward import evaluating, inner_model
from isdaa.models.sampling.decoding import CachedDecoder, Decoder, Group, PlainDecoder, cache_works

# Finished rows leave the batch once they are this share of it. Only rows that move into their places are copied.
_FINISHED_SHARE = 1 / 16


class Progress(Protocol):
    """What `sample` reports to: `isdaa.terminal.Bar`, or anything like it."""

    within: str  # how far the samples in flight are, in words
    ahead: float  # and in samples

    def update(self, n: float = 1) -> Any:
        """`n` more samples are finished."""


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn: temperature first (0 takes the most probable token), then top-k, then top-p, both off by
    default. `max_new_tokens` counts the stop token.

    Raises:
        UserError: a value out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (1: no filter)")
        if self.top_k != int(self.top_k) or self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be a whole number, 0 or more (0: no filter)")
        if self.max_new_tokens != int(self.max_new_tokens) or self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be a whole number, 1 or more")


@dataclass(frozen=True)
class Sample:
    """One response: its token ids (the stop token included where it ended) and whether it ended by itself.

    states: where asked for, the (len(ids), D) hidden states that entered the model's head and predicted each id, on the CPU.
    """

    ids: list[int]
    finished: bool
    states: Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class SampledText(Sample):
    """A sample, and what it reads as (`text_of`)."""

    text: str = ""


def text_of(ids: Sequence[int], finished: bool, tokenizer: Any) -> str:
    """A sample as text: without the stop token that ended it. Special tokens elsewhere stay: a judge is to see them."""
    return clean(str(tokenizer.decode(list(ids[:-1] if finished else ids), skip_special_tokens=False)))


def uniforms(seed: int, key: str, steps: int) -> np.ndarray:
    """(steps,) float64 numbers in [0, 1), one per step, from a hash stream of (seed, key).

    SHAKE-128 is counter-based where it matters: a longer stream begins with the shorter one, and streams of different
    keys are independent. Unlike a random generator's, its values are the same in every version of every library.
    """
    stream = hashlib.shake_128(f"{seed}\0{key}".encode()).digest(8 * steps)
    return (np.frombuffer(stream, dtype="<u8") >> np.uint64(11)) * 2.0**-53


def probabilities(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """(R, V) next-token distribution after temperature, top-k and top-p, in fp32; temperature must be above 0.

    Top-k keeps what is at least the k-th largest logit. Top-p keeps the smallest set of most probable tokens whose sum
    reaches p (Holtzman et al. 2020, arXiv 1904.09751); among equals the lower id goes first.
    """
    logits = logits.float()
    if settings.temperature != 1:  # the largest becomes 0 first: no temperature can make it overflow
        logits = (logits - logits.amax(-1, keepdim=True)) / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        smallest = logits.topk(settings.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    result = torch.softmax(logits, dim=-1)
    if settings.top_p < 1:
        ordered, tokens = result.sort(dim=-1, descending=True, stable=True)
        before = ordered.double().cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= settings.top_p, 0.0)
        result = torch.zeros_like(result).scatter_(-1, tokens, ordered)
        result /= result.sum(-1, keepdim=True)
    return result


def draw(distribution: Tensor, uniform: Tensor) -> Tensor:
    """(R,) tokens: the first whose cumulative probability, in float64, exceeds `uniform` (R,) in [0, 1).

    A token of probability 0 is never drawn. The distribution (R, V) need not sum to 1 exactly.
    """
    if distribution.device.type == "mps":  # has no float64
        distribution = distribution.cpu()
    cumulative = distribution.double().cumsum(-1)
    total = cumulative[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniform.to(total)[:, None] * total, below_total)
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    stop_ids: Collection[int],
    pad_id: int,
    seed: int,
    keys: Sequence[str],
    batch_size: int = 256,
    progress: Progress | None = None,
    n: int = 1,
    with_states: bool = False,
) -> list[Sample]:
    """Draw `n` responses per prompt: `keys` names each of them, prompt by prompt, and the result is in the same order.

    `batch_size` counts responses. Equal prompts are computed once per batch, however they come about (by `n`, or
    repeated in `prompts`). The same prompt, seed and key always give the same response, and a smaller `max_new_tokens`
    a beginning of it. The token `pad_id` only fills space and may equal a stop token. The model is in evaluation mode
    meanwhile. `with_states` also keeps what `Sample.states` says, where the model has a head that can be listened to.

    Raises:
        UserError: an empty prompt, one with ids that the model does not have, one that leaves no room for
            `max_new_tokens` in the model's context, or a model whose probabilities are not numbers.
    """
    if len(keys) != len(prompts) * n or n < 1 or batch_size < 1:
        raise ValueError(f"{len(prompts)} prompts × {n} samples need as many keys, not {len(keys)}; batch_size {batch_size}")
    if not prompts:
        return []
    _check_prompts(model, prompts, keys, settings, n)
    pad_id = pad_id if pad_id < inner_model(model).get_input_embeddings().weight.shape[0] else 0  # type: ignore[operator]
    groups: dict[tuple[int, ...], list[int]] = {}
    for index in range(len(keys)):
        groups.setdefault(tuple(prompts[index // n]), []).append(index)
    results: dict[int, Sample] = {}
    with evaluating(model), plain_attention(model), torch.no_grad():
        longest = max(groups, key=len)
        cached = cache_works(model, longest)
        kind: Callable[..., Decoder] = CachedDecoder if cached else PlainDecoder
        for batch in _batches(groups, batch_size, equal_lengths=not cached):
            rows = [index for _, indices in batch for index in indices]
            if progress is not None:
                progress.within = f"reading {len(batch)} prompts"
            randoms = np.stack([uniforms(seed, keys[i], settings.max_new_tokens) for i in rows])
            began = time.monotonic()
            run = kind(model, batch, pad_id, with_states)
            # How long answers are, those of earlier batches tell.
            usual = float(np.mean([len(done.ids) for done in results.values()])) if results else settings.max_new_tokens
            samples = _decode(run, settings, stop_ids, randoms, [keys[i] for i in rows], progress, usual, began)
            results.update(zip(rows, samples, strict=True))
    return [results[index] for index in range(len(keys))]


def respond(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[tuple[Sequence[int], bool]],
    settings: SamplingSettings,
    stop_ids: Mapping[bool, Collection[int]],
    seed: int,
    keys: Sequence[str],
    batch_size: int = 256,
    progress: Progress | None = None,
    n: int = 1,
    with_states: bool = False,
) -> list[SampledText]:
    """`sample`, for prompts of which some may be conversations: what labels, guards, evaluations and benchmarks draw.

    Args:
        prompts: token ids, and whether they are a conversation. Conversations and others are in batches of their own.
        stop_ids: what ends a response, in conversations and elsewhere (`data.chat.stop_token_ids`). The first of them that
            is drawn is the response's last id, makes it `finished`, and is no part of its text.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    found: dict[int, SampledText] = {}
    for chat in sorted({chat for _, chat in prompts}):
        places = [i for i, prompt in enumerate(prompts) if prompt[1] == chat]
        numbers = [i * n + k for i in places for k in range(n)]
        ids, named = [prompts[i][0] for i in places], [keys[number] for number in numbers]
        drawn = sample(
            model, ids, settings, stop_ids[chat], pad, seed, named, batch_size, progress=progress, n=n, with_states=with_states
        )
        for number, one in zip(numbers, drawn, strict=True):
            found[number] = SampledText(list(one.ids), one.finished, one.states, text_of(one.ids, one.finished, tokenizer))
    return [found[number] for number in range(len(keys))]


# ---------------------------------------------------------------------------------------------------------------------
# The loop over tokens


def _batches(groups: dict[tuple[int, ...], list[int]], size: int, equal_lengths: bool) -> Iterator[list[Group]]:
    """Prompts of similar length together, the longest first: a batch that does not fit shows at once."""
    batch: list[Group] = []
    room = size
    for prompt in sorted(groups, key=lambda p: (-len(p), p)):
        if batch and equal_lengths and len(batch[-1][0]) != len(prompt):
            yield batch
            batch, room = [], size
        numbers = groups[prompt]
        while numbers:
            batch.append((prompt, numbers[:room]))
            numbers, room = numbers[room:], room - len(numbers[:room])
            if room == 0:
                yield batch
                batch, room = [], size
    if batch:
        yield batch


def _decode(
    run: Decoder,
    settings: SamplingSettings,
    stop_ids: Collection[int],
    randoms: np.ndarray,
    keys: Sequence[str],
    progress: Progress | None = None,
    usual: float = math.inf,
    began: float = 0.0,
) -> list[Sample]:
    """began: when the prompts began to be read; usual: how many tokens answers have. Both only for `progress`."""
    read = time.monotonic()
    rows, steps = randoms.shape
    stops = np.zeros(run.logits.shape[1], dtype=bool)
    stops[[stop for stop in stop_ids if 0 <= stop < len(stops)]] = True
    ids = np.zeros((rows, steps), dtype=np.int64)
    lengths, finished = np.full(rows, steps), np.zeros(rows, dtype=bool)
    flight = np.arange(rows)  # which row each row of the run is
    states: list[tuple[np.ndarray, Tensor]] = []  # per step: rows in flight, and theirs
    for step in range(steps):
        tokens = _choose(run.logits, settings, randoms[flight, step], [keys[i] for i in flight.tolist()])
        if run.states is not None:
            states.append((flight, run.states))
        ids[flight, step] = tokens.cpu().numpy()  # a finished row may go on for a while; its length says where it ended
        ended = stops[ids[flight, step]] & ~finished[flight]
        finished[flight[ended]], lengths[flight[ended]] = True, step + 1
        going = ~finished[flight]
        last = not going.any() or step == steps - 1
        if progress is not None:
            progress.within = "" if last else f"token {step + 1} of at most {steps}"
            if count := int(ended.sum()) + (int(going.sum()) if last else 0):
                progress.update(count)
            if last or step:  # the first token came with the prompts
                elapsed = time.monotonic() - read
                expected = read - began + elapsed * max(usual - 1, 1) / max(step, 1)  # seconds of the batch, prompts included
                progress.ahead = 0.0 if last else int(going.sum()) * min((read - began + elapsed) / expected, 1.0)
        if last:
            break
        if going.sum() <= (1 - _FINISHED_SHARE) * len(flight):
            order = without_tokens(going)
            flight = flight[order]
            kept = torch.from_numpy(order).to(tokens.device)
            tokens = tokens[kept]
            run.keep(kept)
        run.step(tokens)
    found = _states_of_rows(states, lengths)
    return [Sample(ids[i, : lengths[i]].tolist(), bool(finished[i]), found[i]) for i in range(rows)]


def without_tokens(going: np.ndarray) -> np.ndarray:
    """Places of the rows that go on. Those behind the new end fill the gaps, so that all others stay where they are."""
    count = int(going.sum())
    order = np.arange(count)
    order[~going[:count]] = count + np.flatnonzero(going[count:])
    return order


def _states_of_rows(steps: Sequence[tuple[np.ndarray, Tensor]], lengths: np.ndarray) -> Sequence[Tensor | None]:
    """From the states of each step's rows to those of each row's steps, without those after its end."""
    if not steps:
        return [None] * len(lengths)
    starts = lengths.cumsum() - lengths
    out = steps[0][1].new_empty(int(lengths.sum()), steps[0][1].shape[1], device="cpu")
    for step, (flight, states) in enumerate(steps):
        before_end = np.flatnonzero(step < lengths[flight])
        out[torch.from_numpy(starts[flight[before_end]] + step)] = states[torch.from_numpy(before_end).to(states.device)].cpu()
    return out.split(lengths.tolist())


def _choose(logits: Tensor, settings: SamplingSettings, randoms: np.ndarray, keys: Sequence[str]) -> Tensor:
    highest = logits.amax(-1)  # NaN where any logit is
    if not bool(torch.isfinite(highest).all()):
        broken = int((~torch.isfinite(highest)).nonzero()[0])
        raise UserError(f"sample {keys[broken]}: the model's next-token probabilities are not numbers (NaN or infinite logits)")
    if settings.temperature == 0:
        return logits.argmax(-1)
    return draw(probabilities(logits, settings), torch.from_numpy(randoms)).to(logits.device)


def _check_prompts(
    model: nn.Module, prompts: Sequence[Sequence[int]], keys: Sequence[str], settings: SamplingSettings, n: int
) -> None:
    inner: Any = inner_model(model)
    known = inner.get_input_embeddings().weight.shape[0]
    context = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    for index, prompt in enumerate(prompts):
        name = f"prompt of sample {keys[index * n]}"
        if len(prompt) == 0:
            raise UserError(f"{name}: no tokens; a prompt needs at least one (a BOS token would do)")
        if not 0 <= min(prompt) <= max(prompt) < known:
            raise UserError(
                f"{name}: token id {max(prompt)}, but the model knows {known} tokens; is the tokenizer another model's?"
            )
        if context is not None and len(prompt) + settings.max_new_tokens > context:
            raise UserError(
                f"{name}: {len(prompt)} tokens and max_new_tokens {settings.max_new_tokens} exceed the model's context "
                f"of {context} tokens; lower max_new_tokens or max_prompt_length"
            )
