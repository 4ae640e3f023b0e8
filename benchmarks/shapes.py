"""What the step benchmark trains on: shapes of pairs, models, and the matrix products that one step of them needs.

Legend: B pairs, T tokens with every prompt counted once, N response tokens, D hidden, V vocabulary, H heads, d = D / H.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

BETA = 0.1
PAD, EOS, FIRST_WORD = 0, 2, 3  # token ids below FIRST_WORD are special
SHORTEST = 4  # tokens; what a normal distribution gives below it is raised to it


@dataclass(frozen=True)
class Shape:
    """Tokens of prompts and responses: mean and standard deviation of a normal distribution."""

    prompt: tuple[float, float]
    response: tuple[float, float]
    like: str


SHAPES = {
    "tldr": Shape((330, 90), (38, 12), "summaries of posts"),
    "chat": Shape((200, 60), (250, 80), "chat"),
    "short": Shape((20, 6), (15, 5), "short answers"),
    "long": Shape((1500, 200), (100, 30), "answers about a long document"),
}
TINY_SHAPE = Shape((24, 6), (9, 3), "a test")


@dataclass(frozen=True)
class Size:
    """A Llama with tied embeddings: 24M parameters in its layers, and V·D in its embedding."""

    vocabulary: int
    hidden: int = 512
    intermediate: int = 1408
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    positions: int = 4096

    @property
    def head_dim(self) -> int:
        """d."""
        return self.hidden // self.heads

    @property
    def linear(self) -> dict[tuple[int, int], int]:
        """(inputs, outputs) of a layer's linear maps, and how often a layer has them."""
        kv = self.kv_heads * self.head_dim
        maps = [(self.hidden, self.hidden)] * 2 + [(self.hidden, kv)] * 2
        maps += [(self.hidden, self.intermediate)] * 2 + [(self.intermediate, self.hidden)]
        return {both: maps.count(both) for both in dict.fromkeys(maps)}

    @property
    def parameters(self) -> int:
        """Weights in all, the norms' included."""
        layer = sum(i * o * n for (i, o), n in self.linear.items()) + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocabulary * self.hidden


VOCABULARIES = (32_000, 128_256)
TINY_VOCABULARY = 512


def tiny(vocabulary: int) -> Size:
    """A model for tests."""
    return Size(vocabulary, hidden=32, intermediate=64, layers=2, heads=2, kv_heads=1, positions=256)


Lengths = tuple[int, int, int]  # prompt, chosen, rejected


def draw_pairs(shape: Shape, vocabulary: int, count: int, seed: int, longest: int) -> list[dict[str, list[int]]]:
    """`count` pairs of random token ids; responses end with EOS. Lengths do not depend on the vocabulary.

    longest: tokens of prompt + response at most.
    """
    sizes, words = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    rows = []
    for _ in range(count):
        row = {}
        for name, (mean, deviation) in (("prompt", shape.prompt), ("chosen", shape.response), ("rejected", shape.response)):
            length = int(np.clip(round(sizes.normal(mean, deviation)), SHORTEST, longest // 2))
            end = [] if name == "prompt" else [EOS]
            row[f"{name}_ids"] = words.integers(FIRST_WORD, vocabulary, length - len(end)).tolist() + end
        rows.append(row)
    return rows


def lengths_of(rows: Sequence[dict[str, list[int]]]) -> list[Lengths]:
    """Tokens of each pair's parts."""
    return [(len(row["prompt_ids"]), len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Matrix products


@dataclass(frozen=True)
class Product:
    """`batch` products (m, k) × (k, n), done `times` times a step. form: which operand lies transposed, as in BLAS."""

    form: str  # "nt": a · bᵀ, "nn": a · b, "tn": aᵀ · b
    batch: int
    m: int
    k: int
    n: int
    times: int

    @property
    def flops(self) -> int:
        """Additions and multiplications of all of them."""
        return 2 * self.times * self.batch * self.m * self.k * self.n


def products(size: Size, lengths: Sequence[Lengths]) -> Iterator[Product]:
    """The products that the mathematics of one step needs: one forward and two backward of each linear map, two and four of
    attention. Nothing that an implementation recomputes is in it, and no product is cut into smaller ones.

    Every prompt counts once; the head sees the N response tokens alone; attention counts the (query, key) pairs that are
    visible, as a rectangle of as many, since no plain product computes a triangle.
    """
    tokens = sum(p + c + r for p, c, r in lengths)
    responses = sum(c + r for _, c, r in lengths)
    for (inputs, outputs), times in size.linear.items():
        yield from linear(tokens, inputs, outputs, times * size.layers)
    yield from linear(responses, size.hidden, size.vocabulary, 1)
    for p, c, r in lengths:
        visible = (p + c) * (p + c + 1) // 2 + r * p + r * (r + 1) // 2
        queries = p + c + r
        keys, d, times = max(1, round(visible / queries)), size.head_dim, 2 * size.layers
        yield Product("nt", size.heads, queries, d, keys, times)  # scores; gradient of the probabilities
        yield Product("nn", size.heads, queries, keys, d, times)  # values; gradient of the queries
        yield Product("tn", size.heads, keys, queries, d, times)  # gradients of the values and of the keys


def saved(size: Size, lengths: Sequence[Lengths]) -> Iterator[tuple[Product, int]]:
    """Products among these that isdaa does not do in full, and the rows that it leaves out: the last layer's gated unit needs the
    last token of each prompt and the responses but for their last tokens."""
    tokens = sum(p + c + r for p, c, r in lengths)
    kept = sum(max(c, 1) + r - 1 for _, c, r in lengths)
    for inputs, outputs in ((size.hidden, size.intermediate), (size.hidden, size.intermediate), (size.intermediate, size.hidden)):
        yield from ((product, tokens - kept) for product in linear(tokens, inputs, outputs, 1))


def linear(rows: int, inputs: int, outputs: int, times: int) -> Iterator[Product]:
    """x Wᵀ, and in the backward pass g W and gᵀ x."""
    yield Product("nt", 1, rows, inputs, outputs, times)
    yield Product("nn", 1, rows, outputs, inputs, times)
    yield Product("tn", 1, outputs, rows, inputs, times)
