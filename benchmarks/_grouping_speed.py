"""How long one optimiser step takes when the pairs of a prompt share its forward pass, and when they do not.

Pairs come in families: six prompts of one length, each with six pairs whose responses have the same lengths for all six
prompts. Grouped, a round takes all pairs of one prompt of each family; apart, it takes pair p of six different prompts of each
family, p = 0 … 5. So a round's steps have the same lengths either way, no two pairs of a step apart share a prompt, and after
six rounds both orders have seen the same pairs. Lengths are spaced so that every round has the shape's means. What is left
between the two is the sharing.

Legend: B pairs of a step, F families of a round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from _grouping import pair_losses
from _summary import ratios, spread
from rich.table import Table
from shapes import EOS, FIRST_WORD, PAD, SHAPES, SHORTEST, TINY_SHAPE, TINY_VOCABULARY, Shape, Size, tiny
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from isdaa.models.packed.forward import PairForward, disable_dropout, prepare
from isdaa.objectives.objective import Objective
from isdaa.objectives.presets import resolve
from isdaa.terminal import Bar, progress, say
from isdaa.training.trainer.batches import GlobalBatchSampler, TokenisedPairs
from isdaa.training.trainer.packing import Piece

PAIRS = 6  # of a prompt
ARMS = ("apart", "grouped", "grouped_shared")
BETA, LEARNING_RATE, EPSILON, MAX_GRAD_NORM = 0.1, 1e-4, 1e-5, 1.0
TOLERANCE = 1e-5  # nats a pair; of the gradient's length
EPOCH = 2000  # prompts of the epoch whose tokens are counted

DEFINITIONS = {
    "apart": "no two pairs of a step have the same prompt",
    "grouped": "the pairs of a prompt one after the other; its twelve responses all differ",
    "grouped_shared": "the same, but a prompt has six responses, each in two of its pairs",
    "seconds": "wall clock a pair in each round, from collation to the end of the optimiser's step",
    "cpu": "processor seconds of all threads a pair",
    "tokens": "tokens a pair that go through the model",
    "gain": "seconds of apart over seconds of this arm, in the same round; cpu_gain: by processor seconds; token_gain: by tokens",
    "epoch_tokens": "tokens a pair over an epoch of many prompts (settings.epoch) in the order of the trainer's own sampler, in "
    "which two pairs of a shuffled step share a prompt now and then",
    "loss_difference": "largest |loss − loss of the same pair alone| over the pairs of a round, with the weights after all "
    "rounds: a pair alone shares its prompt with nobody",
    "loss_moved": "largest |loss − log 2| of those pairs: what the difference is to be compared with",
    "gradient_difference": "the gradient of the round's mean loss, taken step by step, less that taken pair by pair: its length "
    "over the gradient's",
}


@dataclass(frozen=True)
class Speed:
    """What is measured."""

    rounds: int = PAIRS
    batch_sizes: tuple[int, ...] = (4, 12, 24)
    threads: int = 1
    shape: Shape = SHAPES["tldr"]
    size: Size = field(default_factory=lambda: Size(32_000))
    epoch: int = EPOCH
    seed: int = 0


def tiny_speed(rounds: int = 2, batch_sizes: tuple[int, ...] = (4,), threads: int = 1) -> Speed:
    """For tests."""
    return Speed(rounds, batch_sizes, threads, TINY_SHAPE, tiny(TINY_VOCABULARY), epoch=60)


def families(batch_size: int) -> int:
    """F: as few as make whole steps of whole prompts."""
    return math.lcm(PAIRS, batch_size) // PAIRS


# ---------------------------------------------------------------------------------------------------------------------
# The pairs

Row = dict[str, list[int]]


def draw_family(vocabulary: int, rng: np.random.Generator, shared: bool, lengths: Sequence[int], prompts: int) -> list[Row]:
    """Six pairs of each prompt. lengths: of the prompt, and of its responses 0 … 5: pair p is of p against p + 1.

    shared: a prompt has these six responses and no more; else every pair has two of its own.
    """

    def words(length: int) -> list[int]:
        return rng.integers(FIRST_WORD, vocabulary, length).tolist()

    prompt, *responses = lengths
    rows = []
    for _ in range(prompts):
        own = words(prompt)
        texts = [[*words(n - 1), EOS] for n in responses]
        for p in range(PAIRS):
            q = (p + 1) % PAIRS
            both = [texts[p], texts[q]] if shared else [[*words(responses[i] - 1), EOS] for i in (p, q)]
            rows.append({"prompt_ids": own, "chosen_ids": both[0], "rejected_ids": both[1]})
    return rows


def draw_lengths(shape: Shape, count: int, rng: np.random.Generator, longest: int) -> list[list[int]]:
    """Of `count` families: tokens of the prompt and of six responses, in a random order.

    They are evenly spaced quantiles of the shape's distributions, so that two families have its mean lengths as a thousand do.
    """

    def spaced(mean: float, deviation: float, n: int) -> list[int]:
        values = [NormalDist(mean, deviation).inv_cdf((i + 0.5) / n) for i in range(n)]
        return [int(np.clip(round(value), SHORTEST, longest // 2)) for value in rng.permutation(values)]

    return [[prompt, *spaced(*shape.response, PAIRS)] for prompt in spaced(*shape.prompt, count)]


def draw(settings: Speed, blocks: int, count: int, shared: bool, prompts: int = PAIRS) -> list[Row]:
    """`blocks` times `count` families, one after the other. Their lengths do not depend on `shared`.

    prompts: of each family; one alone where lengths shall be as various as the prompts are many.
    """
    lengths, words = np.random.default_rng([settings.seed, 0]), np.random.default_rng([settings.seed, 1])
    size = settings.size
    families = [one for _ in range(blocks) for one in draw_lengths(settings.shape, count, lengths, size.positions)]
    return [row for one in families for row in draw_family(size.vocabulary, words, shared, one, prompts)]


def steps_of(round_: int, batch_size: int, grouped: bool) -> list[list[int]]:
    """Row numbers of a round's steps. Rounds 0 … 5 see every pair of their families once, in either order."""
    block, j = divmod(round_, PAIRS)
    count = families(batch_size)
    rows = [
        (block * count + f) * PAIRS * PAIRS + ((j if grouped else (j + p) % PAIRS) * PAIRS) + p
        for f in range(count)
        for p in range(PAIRS)
    ]
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]


def referenced(rows: Sequence[Row], vocabulary: int) -> TokenisedPairs:
    """Pairs with the logps of the uniform distribution as their reference: a new random model's are close to these."""
    pairs = TokenisedPairs(rows)
    both = (np.array([-len(row[name]) * math.log(vocabulary) for row in rows]) for name in ("chosen_ids", "rejected_ids"))
    return pairs.with_reference(*both)


# ---------------------------------------------------------------------------------------------------------------------
# The steps


def run_speed(settings: Speed) -> dict[str, Any]:
    """All batch sizes, one after the other, as JSON-able data."""
    torch.set_num_threads(settings.threads)
    cells = []
    with progress("speed", (settings.rounds + 1) * len(ARMS) * sum(_weight(b) for b in settings.batch_sizes)) as bar:
        bar.in_parts = True
        for batch_size in settings.batch_sizes:
            cells.append(_cell(settings, batch_size, bar))
            gain = cells[-1]["arms"]["grouped"]["gain"]["median"]
            say(f"{batch_size} pairs a step: {gain:.2f} times as fast with groups (median of {settings.rounds} rounds)")
    return {
        "settings": {**_plain(asdict(settings)), "parameters": settings.size.parameters, "pairs_a_prompt": PAIRS},
        "definitions": DEFINITIONS,
        "cells": cells,
    }


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def with_earlier(found: dict[str, Any], earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """`found` with the cells of other batch sizes of an earlier call, where all other settings were the same."""
    if earlier is None or any(earlier["settings"].get(k) != v for k, v in found["settings"].items() if k != "batch_sizes"):
        return found
    cells = {cell["batch_size"]: cell for cell in (*earlier["cells"], *found["cells"])}
    settings = {**found["settings"], "batch_sizes": sorted(cells)}
    return {**found, "settings": settings, "cells": [cells[size] for size in sorted(cells)]}


def _weight(batch_size: int) -> int:
    return families(batch_size) * PAIRS


class Stepper:
    """A random model with what trains it, set up as `PreferenceTrainer` sets it up, but without the Trainer around it."""

    def __init__(self, size: Size, seed: int) -> None:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate,
            num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
            max_position_embeddings=size.positions, tie_word_embeddings=True, attention_dropout=0.0,
            pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS,
        )  # fmt: skip
        self.model: nn.Module = LlamaForCausalLM(config)
        disable_dropout(self.model)
        self.forward: PairForward = prepare(self.model)
        self.model.train()
        self.objective = Objective(**resolve("dpo", beta=BETA))
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, eps=EPSILON, weight_decay=0.0, fused=True)

    def step(self, pairs: TokenisedPairs, batch: Sequence[int]) -> int:
        """Train on a batch; returns its tokens."""
        losses, tokens = pair_losses(self.forward, self.objective, pairs, batch)
        losses.mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return tokens

    def gradient(self, pairs: TokenisedPairs, batches: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """(P,) losses of the pairs of some batches in their order, and the gradient of their mean."""
        count = sum(map(len, batches))
        self.optimiser.zero_grad()
        found = []
        for batch in batches:
            losses, _ = pair_losses(self.forward, self.objective, pairs, batch)
            (losses.sum() / count).backward()
            found.append(losses.detach())
        gradient = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        self.optimiser.zero_grad()
        return torch.cat(found), gradient


def _cell(settings: Speed, batch_size: int, bar: Bar) -> dict[str, Any]:
    stepper = Stepper(settings.size, settings.seed)
    blocks, count = -(-settings.rounds // PAIRS), families(batch_size)
    data = {shared: referenced(draw(settings, blocks, count, shared), settings.size.vocabulary) for shared in (False, True)}
    measured: dict[str, dict[str, list[float]]] = {arm: {"seconds": [], "cpu": [], "tokens": []} for arm in ARMS}
    rng = np.random.default_rng([settings.seed, 2])
    for round_ in range(-1, settings.rounds):
        for arm in rng.permutation(ARMS).tolist():
            steps = steps_of(max(round_, 0), batch_size, arm != "apart")
            started, cpu = time.perf_counter(), time.process_time()
            tokens = sum(stepper.step(data[arm == "grouped_shared"], step) for step in (steps if round_ >= 0 else steps[:1]))
            if round_ >= 0:
                took = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu, "tokens": float(tokens)}
                for name, value in took.items():
                    measured[arm][name].append(value / _weight(batch_size))
            bar.update(_weight(batch_size))
    return {
        "batch_size": batch_size,
        "steps_a_round": len(steps_of(0, batch_size, True)),
        "arms": {arm: _arm(measured, arm) for arm in ARMS},
        "same_pairs": {
            arm: agreement(stepper, data[arm == "grouped_shared"], steps_of(0, batch_size, True))
            for arm in ARMS
            if arm != "apart"
        },
        "epoch_tokens": _epoch_tokens(settings, batch_size),
    }


def _arm(measured: Mapping[str, Mapping[str, list[float]]], arm: str) -> dict[str, Any]:
    own, apart = measured[arm], measured["apart"]
    found: dict[str, Any] = {**own, "median_seconds": spread(own["seconds"])}
    for name, gain in (("seconds", "gain"), ("cpu", "cpu_gain"), ("tokens", "token_gain")):
        found[gain] = spread(ratios(apart[name], own[name]))
    return found


def agreement(stepper: Stepper, pairs: TokenisedPairs, steps: Sequence[Sequence[int]]) -> dict[str, float]:
    """How far losses and gradient of a round are from those of its pairs one at a time, nothing shared."""
    together, gradient = stepper.gradient(pairs, steps)
    alone, other = stepper.gradient(pairs, [[row] for step in steps for row in step])
    return {
        "loss_difference": float((together - alone).abs().max()),
        "loss_moved": float((alone - math.log(2)).abs().max()),
        "gradient_difference": float((gradient - other).norm() / other.norm()),
    }


def _epoch_tokens(settings: Speed, batch_size: int) -> dict[str, float]:
    """Tokens a pair, in the sampler's own order of many prompts of different lengths."""
    found = {}
    for name, shared in (("grouped", False), ("grouped_shared", True)):
        pairs = TokenisedPairs(draw(settings, 1, settings.epoch, shared, prompts=1))
        if not found:
            found["apart"] = _tokens(pairs, batch_size, settings.seed, None)
        found[name] = _tokens(pairs, batch_size, settings.seed, pairs.prompt_groups())
    return found


def _tokens(pairs: TokenisedPairs, batch_size: int, seed: int, groups: np.ndarray | None) -> float:
    batches: Iterator[list[int]] = iter(
        GlobalBatchSampler(len(pairs), batch_size, 1, 1, 0, seed, lengths=pairs.lengths(), groups=groups)
    )
    return sum(Piece.of(pairs.batch(batch)).layout.tokens for batch in batches) / len(pairs)


# ---------------------------------------------------------------------------------------------------------------------
# What came out


def wrong(found: Mapping[str, Any]) -> list[str]:
    """A line for each arm whose losses or gradients are not those of its pairs alone."""
    lines = []
    for cell in found["cells"]:
        for arm, apart in cell["same_pairs"].items():
            # Written so that a NaN counts as wrong.
            if not (apart["loss_difference"] <= TOLERANCE and apart["gradient_difference"] <= TOLERANCE * 10):
                lines.append(f"{cell['batch_size']} pairs a step: {arm} does NOT do the same work as its pairs alone")
    return lines


def table(found: Mapping[str, Any]) -> Table:
    """A row for each batch size and arm."""
    settings = found["settings"]
    shown = Table(
        title=f"One optimiser step, {settings['parameters'] / 1e6:.0f}M parameters, V = {settings['size']['vocabulary']}, "
        f"{PAIRS} pairs a prompt, threads: {settings['threads']}, {settings['rounds']} rounds: median (least … largest)"
    )
    for column in (
        "pairs a step",
        "order",
        "s / pair",
        "gain",
        "gain, cpu",
        "tokens / pair",
        "fewer",
        "epoch",
        "|Δ loss|",
        "|Δ grad|",
    ):
        shown.add_column(column, justify="left" if column == "order" else "right")
    for cell in found["cells"]:
        for name, arm in cell["arms"].items():
            same = cell["same_pairs"].get(name)
            tokens = spread(arm["tokens"])
            assert tokens is not None
            shown.add_row(
                str(cell["batch_size"]) if name == "apart" else "",
                {"apart": "apart", "grouped": "grouped, 12 responses", "grouped_shared": "grouped, 6 responses"}[name],
                _range(arm["median_seconds"], 3),
                "" if name == "apart" else _range(arm["gain"], 2),
                "" if name == "apart" else f"{arm['cpu_gain']['median']:.2f}",
                f"{tokens['median']:.0f}",
                "" if name == "apart" else f"{arm['token_gain']['median']:.2f}",
                f"{cell['epoch_tokens'][name]:.0f}",
                "" if same is None else f"{same['loss_difference']:.0e} of {same['loss_moved']:.2f}",
                "" if same is None else f"{same['gradient_difference']:.0e}",
                end_section=name == ARMS[-1],
            )
    return shown


def _range(found: Mapping[str, float], digits: int) -> str:
    middle, low, high = (f"{found[name]:.{digits}f}" for name in ("median", "least", "largest"))
    return f"{middle} ({low} … {high})"
