"""What `cost_growth.py` measures: one base point, five axes through it, and how an exponent is read off an axis."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import stdtrit
from shapes import Lengths, Shape, Size, draw_pairs, lengths_of, products

LEVEL = 0.95
MIB = 1 << 20
BASE_SIZE = Size(32_000)


@dataclass(frozen=True)
class Point:
    """One training step: pairs of equal lengths in tokens, and the model."""

    pairs: int = 4
    prompt: int = 330
    response: int = 38
    size: Size = BASE_SIZE

    @property
    def tokens(self) -> int:
        """Of the packed row; a prompt counts once."""
        return self.pairs * (self.prompt + 2 * self.response)

    @property
    def lengths(self) -> list[Lengths]:
        """Prompt, chosen and rejected response of each pair."""
        return [(self.prompt, self.response, self.response)] * self.pairs

    @property
    def body(self) -> int:
        """Parameters without the embedding, which is the head, too."""
        return self.size.parameters - self.size.vocabulary * self.size.hidden

    @property
    def flops(self) -> int:
        """Additions and multiplications that the mathematics of the step needs (`shapes.products`)."""
        return sum(product.flops for product in products(self.size, self.lengths))

    def rows(self, seed: int) -> list[dict[str, list[int]]]:
        """Random token ids; every pair is as long as every other."""
        shape = Shape((self.prompt, 0), (self.response, 0), "exact lengths")
        rows = draw_pairs(shape, self.size.vocabulary, self.pairs, seed, self.size.positions)
        assert lengths_of(rows) == self.lengths, "lengths were cut: they must be from 4 to half of the model's positions"
        return rows


@dataclass(frozen=True)
class Axis:
    """Points that differ in one thing. time, memory: what theory expects of the exponents, a sentence each."""

    name: str
    title: str
    unit: str
    points: tuple[Point, ...]
    xs: tuple[int, ...]
    time: str
    memory: str


THEORY = {
    "pairs": (
        "Pairs",
        "pair",
        "1, since every product works on tokens; a little less while the optimiser, whose work is the same for any batch, shows",
        "towards 1, from below: activations grow with the pairs, the gradients and the optimiser's moments do not",
    ),
    "prompt": (
        "Prompt length (tokens)",
        "prompt token",
        "below 1 where the prompt is no longer than the responses, then 1, and slowly more as attention's square comes in",
        "towards 1, from below: activations are kept for every token, but never a matrix of tokens × tokens",
    ),
    "response": (
        "Response length (tokens)",
        "response token",
        "0 while the prompt outweighs both responses, then 1; only these tokens reach the head, which computes its logits once "
        "more where they are too many to keep",
        "towards 1, from below, with a step down where the head stops to keep what it has computed (192 MiB of logits)",
    ),
    "vocabulary": (
        "Vocabulary (tokens)",
        "vocabulary entry",
        "1 for the head and the embedding's share of the optimiser, 0 for the layers: low, and rising with the head's share",
        "1 for the embedding's gradient and moments and for the logits that are kept, 0 for the rest",
    ),
    "model": (
        "Parameters in the layers",
        "parameter",
        "1 for the layers; less in all, since the head and attention grow with the width and the depth, not with the "
        "width's square",
        "1 for gradients and moments; less for activations, which grow with the width times the depth",
    ),
}
LARGE: dict[str, Sequence[int]] = {
    "pairs": (1, 2, 4, 8, 16),
    "prompt": (64, 128, 256, 512, 1024, 2048),
    "response": (8, 16, 32, 64, 128, 256, 512),
    "vocabulary": (8_000, 16_000, 32_000, 64_000, 128_256),
}
# Width, depth: heads of 64, the inner width 2.75 times the width, as in the base point; each twice as large as the one before.
LARGE_MODELS = ((256, 4), (384, 4), (384, 8), (512, 8), (640, 10), (768, 14))
TINY: dict[str, Sequence[int]] = {
    "pairs": (1, 2, 4),
    "prompt": (32, 64, 128),
    "response": (8, 16, 32),
    "vocabulary": (2_000, 4_000, 8_000),
}
TINY_MODELS = ((64, 2), (128, 2), (128, 4))


def model(width: int, depth: int, vocabulary: int) -> Size:
    """A Llama of the base point's proportions."""
    heads = width // 64
    return Size(vocabulary, width, width * 11 // 4, depth, heads, max(1, heads // 2))


def base_point(tiny: bool) -> Point:
    """Where all axes meet."""
    return Point(2, 48, 16, model(128, 2, 4_000)) if tiny else Point()


def axes(tiny: bool) -> dict[str, Axis]:
    """All axes, by name."""
    base, found = base_point(tiny), {}
    for name, (title, unit, *theory) in THEORY.items():
        if name == "model":
            points = [replace(base, size=model(*both, base.size.vocabulary)) for both in (TINY_MODELS if tiny else LARGE_MODELS)]
            xs = [point.body for point in points]
        else:
            xs = list((TINY if tiny else LARGE)[name])
            points = [_moved(base, name, x) for x in xs]
        found[name] = Axis(name, title, unit, tuple(points), tuple(xs), *theory)
    return found


def _moved(base: Point, name: str, x: int) -> Point:
    change: dict[str, Any] = {"size": replace(base.size, vocabulary=x)} if name == "vocabulary" else {name: x}
    return replace(base, **change)


# ---------------------------------------------------------------------------------------------------------------------
# Exponents


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float | None]:
    """Least-squares slope of a straight line, and its standard error, None for two points.

    Raises ValueError for fewer than two different x.
    """
    x, y = np.asarray(xs, dtype=float), np.asarray(ys, dtype=float)
    if x.shape != y.shape or len(set(x.tolist())) < 2:
        raise ValueError(f"a line needs two different points, not {len(x)} x and {len(y)} y")
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    if len(x) == 2:
        return slope, None
    rest = y - y.mean() - slope * centred
    return slope, float(np.sqrt(rest @ rest / (len(x) - 2) / (centred @ centred)))


def power(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float | None]:
    """The exponent a of y ∝ xᵃ: slope of log y against log x, and its standard error. All numbers must be positive."""
    if min(*xs, *ys) <= 0:
        raise ValueError("exponents are of positive numbers alone")
    return line(np.log(xs).tolist(), np.log(ys).tolist())


def upper(values: Sequence[Any]) -> Sequence[Any]:
    """The larger half of an axis, its middle point included."""
    return values[len(values) // 2 :]


def over_rounds(xs: Sequence[float], rounds: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """An exponent with its 95 % interval over rounds, each of which measured all points.

    Every round has an exponent of its own; Student's t of their mean. What slows a whole round down changes none of them.
    """
    slopes = [power(xs, ys)[0] for ys in rounds]
    found: dict[str, float | None] = {"exponent": statistics.fmean(slopes), "low": None, "high": None}
    if len(slopes) > 1:
        half = float(stdtrit(len(slopes) - 1, (1 + LEVEL) / 2)) * statistics.stdev(slopes) / math.sqrt(len(slopes))
        mean = statistics.fmean(slopes)
        found |= {"low": mean - half, "high": mean + half}
    return found


def along(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float | None]:
    """An exponent with the standard error of the fit: how far the points lie from a power law, not how they repeat."""
    slope, error = power(xs, ys)
    return {"exponent": slope, "standard_error": error}
