"""Bradley–Terry with style control, as Arena-Hard computes it: markdown, length, and what is left without them.

Legend: N comparisons (one model's answer to one prompt, against the baseline's), M models, F = 4 style features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from isdaa.evaluation.benchmarks.sets.logistic import fit_logistic, separates, sigmoid
from isdaa.evaluation.statistics import Estimate, bootstrap_counts, percentiles

FEATURES = ("token_len", "header_count", "list_count", "bold_count")
_BLOCK = 50

# What the original counts, after code blocks are taken away. Of its spellings of bold it reads `**` and `__`.
_CODE = re.compile(r"```[^`]*```")
_HEADERS = {f"h{level}": re.compile(rf"^#{{{level}}}\s", re.MULTILINE) for level in range(1, 7)}
_LISTS = {
    "ordered": re.compile(r"^\s*\d+\.\s", re.MULTILINE),
    "unordered": re.compile(r"^\s*[-*+]\s", re.MULTILINE),
}
_BOLD = {"**": re.compile(r"\*\*[^*\n]+\*\*"), "__": re.compile(r"__[^_\n]+__")}


def markdown_counts(answer: str) -> dict[str, dict[str, int]]:
    """Headers, list items and bold spans of an answer outside its code blocks, by kind, as the original's `metadata`."""
    words = _CODE.sub("", answer)
    kinds = {"header_count": _HEADERS, "list_count": _LISTS, "bold_count": _BOLD}
    return {name: {kind: len(found.findall(words)) for kind, found in patterns.items()} for name, patterns in kinds.items()}


def pieces(answer: str) -> int:
    """Words and marks: a length in about-tokens that needs no tokenizer, for answers whose tokens nobody counted alike."""
    return len(re.findall(r"\w+|[^\w\s]", answer))


def style_differences(model: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """(N, 4) features of each comparison from (N, 4) counts: token_len, headers, list items, bold spans.

    Lengths: (a − b)/(a + b). Others as densities, counts over tokens + 1: (a − b)/(a + b + 1).
    """
    model, baseline = np.asarray(model, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    total = model[:, :1] + baseline[:, :1]
    lengths = np.divide(model[:, :1] - baseline[:, :1], total, out=np.zeros_like(total), where=total > 0)
    ours, theirs = (counts[:, 1:] / (counts[:, :1] + 1) for counts in (model, baseline))
    return np.concatenate([lengths, (ours - theirs) / (ours + theirs + 1)], axis=1)


@dataclass(frozen=True)
class StyleControl:
    """Win rates against the baseline by model, at the pool's mean style and at equal style; coefficients by feature."""

    at_mean_style: Mapping[str, Estimate]
    at_equal_style: Mapping[str, Estimate]
    coefficients: Mapping[str, float]
    note: str = ""


def style_controlled(
    models: Sequence[str],
    prompts: Sequence[str],
    wins: np.ndarray,
    votes: np.ndarray,
    features: np.ndarray,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> StyleControl:
    """logit P(model beats baseline) = θ_model + Σ s_k·z_k, with z the features less their mean, over their deviation.

    models, prompts: of each comparison; wins, votes: (N,), won votes and all; features: (N, 4). Mean and deviation
    (n − 1) are over the votes of all models, as in the original, whose rate σ(θ) is therefore that at the pool's mean
    style: with a single model it controls for next to nothing. The rate at equal style, σ(θ − Σ s_k·mean_k/deviation_k),
    is free of the company a model is judged in. Prompts are resampled, for all models together. Where style tells a
    model's wins from its losses without fault, likelihood has no maximum, and no rate is given.
    """
    names, which = np.unique(np.asarray(models), return_inverse=True)
    places, prompt = np.unique(np.asarray(prompts), return_inverse=True)
    votes = np.asarray(votes, dtype=np.float64)
    mean, deviation = (moment[0] for moment in _moments(features, votes[None]))
    varied = deviation > 1e-9
    unit = np.where(varied, deviation, 1.0)
    scores = np.where(varied, (features - mean) / unit, 0.0)
    design = np.concatenate([np.eye(len(names))[which], scores], axis=1)
    targets = np.divide(wins, votes, out=np.full(len(votes), 0.5), where=votes > 0)
    size = len(names)
    # A model that wins, or loses, every vote has that rate at any style, and says nothing about style.
    extremes = {m: value for m in range(size) for value in (0.0, 1.0) if (targets[(which == m) & (votes > 0)] == value).all()}
    free = ~np.isin(which, list(extremes))
    fitted = free & (votes > 0)
    if fitted.any() and separates(design[fitted], targets[fitted]):
        return StyleControl({}, {}, {}, "style separates all wins from all losses: no style-controlled rate can be estimated")
    fit = fit_logistic(design, targets, votes * free)[None]

    def rates(coefficients: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(R, M) at the resample's own mean style, and at equal style."""
        strength, style = coefficients[:, :size], np.where(varied, coefficients[:, size:], 0.0)
        own = _moments(features, weights)[0]
        shifted = strength + (style * (own - mean) / unit).sum(axis=1, keepdims=True)
        equal = strength - (style * mean / unit).sum(axis=1, keepdims=True)
        chances = sigmoid(shifted), sigmoid(equal)
        for m, value in extremes.items():
            chances[0][:, m] = chances[1][:, m] = value
        return chances

    draws: list[tuple[np.ndarray, np.ndarray]] = []
    for counts in bootstrap_counts(len(places), resamples=resamples, seed=seed, block=_BLOCK):
        weights = counts[:, prompt] * votes
        draws.append(rates(fit_logistic(design, targets, weights * free, start=fit[0]), weights))
    centre = rates(fit, votes[None])
    figures: list[dict[str, Estimate]] = []
    for kind in (0, 1):
        spread = np.concatenate([draw[kind] for draw in draws])
        figures.append(
            {
                str(name): Estimate(percentiles(float(centre[kind][0, m]), spread[:, m], len(places), confidence), spread[:, m])
                for m, name in enumerate(names)
            }
        )
    return StyleControl(figures[0], figures[1], dict(zip(FEATURES, fit[0, size:].tolist(), strict=True)))


def _moments(features: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and deviations (n − 1) of the features (N, F), each row counted by its weight: (R, F) of weights (R, N)."""
    total = np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)
    means = weights @ features / total
    squares = np.maximum(weights @ features**2 - total * means**2, 0)
    return means, np.sqrt(squares / np.maximum(total - 1, 1e-12))
