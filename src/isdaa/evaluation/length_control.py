"""AlpacaEval 2's win rates: raw, discrete, and controlled for length (Dubois et al. 2024, arXiv 2404.04475).

Pure functions of numbers; legend: N prompts. A preference is 1 where the model's response is better, 0 where the
baseline's is, soft in between, NaN where the judge's reply could not be read.

    logit p = w_l·tanh((len_model − len_baseline)/sd) + w_d·difficulty + w_m
    rate    = mean over the prompts of σ(w_d·difficulty + w_m)

Lengths are in characters; sd is the standard deviation (n − 1) of the N length differences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from isdaa.evaluation.logistic import fit_logistic, separates, sigmoid
from isdaa.evaluation.statistics import Figure, Numbers, bootstrap_counts, mean_figure, percentiles

_BLOCK = 50  # resamples fitted at once: their features stay in the cache


@dataclass(frozen=True)
class LengthControlled:
    """The rate, or None where the votes do not determine it, and `note` says why; coefficients: w_l, w_d, w_m, sd."""

    rate: Figure | None
    coefficients: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


def win_rate(preferences: Numbers, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> Figure | None:
    """The mean of the preferences that could be read; None where there is none."""
    values = np.asarray(preferences, dtype=np.float64)
    read = ~np.isnan(values)
    if not read.any():
        return None
    filled = np.where(read, values, 0.0)
    return mean_figure(filled, read.astype(float), resamples=resamples, confidence=confidence, seed=seed)


def discrete(preferences: Numbers) -> np.ndarray:
    """Each preference as a win (1), a draw (½, exactly ½ alone) or a loss (0); (N,)."""
    values = np.asarray(preferences, dtype=np.float64)
    return np.where(np.isnan(values), np.nan, (np.sign(values - 0.5) + 1) / 2)


def length_controlled(
    preferences: Numbers,
    model_lengths: Numbers,
    baseline_lengths: Numbers,
    difficulty: Numbers | None = None,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> LengthControlled:
    """The length-controlled win rate with its bootstrap interval over prompts; all arguments are (N,).

    The fit sees the preferences that could be read; sd and the mean of the rate are over all N prompts, as in the
    original. Each resample has its own sd and fit. Where one side wins every comparison the rate is that, 1 or 0. Where
    length (or difficulty) tells wins from losses without fault, likelihood has no maximum and no rate is given.
    Raises ValueError for shapes that do not fit or preferences outside [0, 1].
    """
    values = np.asarray(preferences, dtype=np.float64)
    gaps = np.asarray(model_lengths, dtype=np.float64) - np.asarray(baseline_lengths, dtype=np.float64)
    hardness = np.zeros(len(values)) if difficulty is None else np.asarray(difficulty, dtype=np.float64)
    if values.ndim != 1 or gaps.shape != values.shape or hardness.shape != values.shape:
        raise ValueError(f"preferences {values.shape}, lengths {gaps.shape}, difficulty {hardness.shape} must be (N,)")
    read = ~np.isnan(values)
    n = len(values)
    if not read.any():
        return LengthControlled(None, note="no preference could be read")
    if np.unique(values[read]).tolist() in ([0.0], [1.0]):
        rate = float(values[read][0])
        side = "the model" if rate else "the baseline"
        figure = Figure(percentiles(rate, np.full(resamples, rate), n, confidence), np.full(resamples, rate))
        return LengthControlled(figure, note=f"{side} wins every comparison, so length explains nothing")
    targets = np.where(read, values, 0.5)
    everyone = np.ones((1, n))
    features = _features(gaps, hardness, everyone)
    if separates(features[0, read], values[read]):
        return LengthControlled(
            None, note="length or difficulty tells all wins from all losses, so no length-controlled rate can be estimated"
        )
    fit = fit_logistic(features, targets, read * everyone)
    draws = []
    for counts in bootstrap_counts(n, resamples=resamples, seed=seed, block=_BLOCK):
        own = fit_logistic(_features(gaps, hardness, counts), targets, counts * read, start=fit[0])
        draws.append(_rates(own, hardness, counts))
    spread = np.concatenate(draws)
    rate = float(_rates(fit, hardness, everyone)[0])
    w_l, w_d, w_m = (float(value) for value in fit[0])
    sd = float(_deviations(gaps, everyone)[0])
    coefficients = {"w_l": w_l, "w_m": w_m, "sd": sd} | ({} if difficulty is None else {"w_d": w_d})
    note = "" if sd else "all length differences are equal: nothing was controlled for"
    return LengthControlled(Figure(percentiles(rate, spread, n, confidence), spread), coefficients, note)


def _features(gaps: np.ndarray, hardness: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(R, N, 3): length, difficulty, 1. A feature that does not vary gets a coefficient of no effect by the ridge."""
    deviations = _deviations(gaps, counts)[:, None]
    lengths = np.tanh(np.divide(gaps, deviations, out=np.zeros(counts.shape), where=deviations > 0))
    return np.stack([lengths, np.broadcast_to(hardness, counts.shape), np.ones(counts.shape)], axis=-1)


def _deviations(gaps: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(R,): standard deviations (n − 1) of the drawn length differences; 0 where they are all equal."""
    n = counts.shape[1]
    centred = gaps - gaps.mean()
    means = counts @ centred / n
    squares = counts @ centred**2 - n * means**2
    variances = np.maximum(squares, 0) / max(n - 1, 1)
    return np.sqrt(np.where(variances > 1e-12 * max(1.0, float(np.abs(gaps).max()) ** 2), variances, 0))


def _rates(coefficients: np.ndarray, hardness: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(R,): what is left at equal length."""
    chances = sigmoid(coefficients[:, 1:2] * hardness + coefficients[:, 2:])
    return (counts * chances).sum(axis=1) / counts.sum(axis=1)
