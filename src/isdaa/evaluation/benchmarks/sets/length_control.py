"""AlpacaEval 2's win rates: raw, discrete, length-controlled as its leaderboard (Dubois et al. 2024, arXiv 2404.04475).

Pure functions of numbers; legend: N prompts, G rows of gamed baselines. A preference is 1 where the model's response is
better, 0 where the baseline's is, soft in between, NaN where the judge's reply could not be read.

    logit p = w_l·tanh((len_model − len_baseline)/sd) + w_d·difficulty + w_m·[not a gamed row]
    rate    = mean over the prompts of σ(w_d·difficulty + w_m)

Lengths are in characters; sd is the standard deviation (n − 1) of the N length differences. `length_controlled` is the
recipe `length_controlled_v1`; `length_adjusted` the same formula without difficulty and gamed rows, a figure of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isdaa.evaluation.benchmarks.sets.logistic import fit_logistic, separates, sigmoid
from isdaa.evaluation.statistics import Estimate, Interval, Numbers, bootstrap_counts, mean_estimate, percentiles

GAMED_WEIGHT = 0.1  # of a gamed row: half of the recipe's 0.2, as there are two gamed baselines
FOLDS, STRENGTHS, SEED = 5, 10, 123
_BLOCK = 50  # resamples fitted at once: their features stay in the cache
_EPSILON = 1e-15
UNCONTROLLED = "all length differences are equal: nothing was controlled for"


@dataclass(frozen=True)
class Gamed:
    """Rows of baselines that were told to be long or short, (G,) each, and every question's difficulty by its place.

    places: of each row's question among the official ones; gaps: standardised length differences, baseline − model;
    preferences in [0, 1]; honest: 1 for a row that is not gamed. source: the file.
    """

    places: np.ndarray
    gaps: np.ndarray
    difficulty: np.ndarray
    preferences: np.ndarray
    honest: np.ndarray
    by_place: Mapping[int, float]
    source: str = ""


@dataclass(frozen=True)
class LengthControlled:
    """The rate, or None where the votes do not determine it, and `note` says why.

    coefficients: w_l (above 0 where length wins), w_m, sd; w_d and the penalty's C of the leaderboard's fit.
    """

    rate: Estimate | None
    coefficients: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


def win_rate(preferences: Numbers, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> Estimate | None:
    """The mean of the preferences that could be read; None where there is none."""
    values = np.asarray(preferences, dtype=np.float64)
    read = ~np.isnan(values)
    if not read.any():
        return None
    filled = np.where(read, values, 0.0)
    return mean_estimate(filled, read.astype(float), resamples=resamples, confidence=confidence, seed=seed)


def discrete(preferences: Numbers) -> np.ndarray:
    """Each preference as a win (1), a draw (½, exactly ½ alone) or a loss (0); (N,)."""
    values = np.asarray(preferences, dtype=np.float64)
    return np.where(np.isnan(values), np.nan, (np.sign(values - 0.5) + 1) / 2)


def length_controlled(
    preferences: Numbers,
    model_lengths: Numbers,
    baseline_lengths: Numbers,
    places: Numbers,
    gamed: Gamed,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> LengthControlled:
    """The leaderboard's length-controlled win rate; all but `gamed` are (N,), places: of the questions among the official ones.

    Rows are fitted in the order of their places, since the folds of the cross-validation go by it. The fit sees the
    preferences that could be read; sd and the mean of the rate are over all N prompts. The interval is that of
    unpenalised fits to resampled prompts, each with its own sd and the prompts' gamed rows, moved so that its centre is the
    figure; there is none where the votes have no unpenalised fit. Raises ValueError for shapes that do not fit or
    preferences outside [0, 1].
    """
    where = np.asarray(places, dtype=np.int64)
    votes = _Votes.of(preferences, model_lengths, baseline_lengths, [gamed.by_place[place] for place in where.tolist()])
    if not votes.read.any():
        return LengthControlled(None, note="no preference could be read")
    usable = ~np.isnan(gamed.preferences)
    theirs = np.column_stack([np.tanh(-gamed.gaps), gamed.difficulty, gamed.honest])[usable]
    index = {place: row for row, place in enumerate(where.tolist())}
    beside = _Beside(
        theirs,
        gamed.preferences[usable],
        np.where(gamed.honest > 0, 1.0, GAMED_WEIGHT)[usable],
        np.array([index.get(place, -1) for place in gamed.places[usable].tolist()], dtype=np.int64),
    )
    n, everyone = len(where), np.ones((1, len(where)))
    order = np.argsort(where, kind="stable")
    own = votes.features(everyone)[0]
    kept = order[votes.read[order]]
    fitted, strength = _penalised(
        np.concatenate([theirs, own[kept]]),
        np.concatenate([beside.targets, votes.values[kept]]),
        np.concatenate([beside.weights, np.ones(len(kept))]),
    )
    rate = float(votes.rates(fitted[None], everyone)[0])
    coefficients = votes.coefficients(fitted) | {"w_d": float(fitted[1]), "C": strength}
    notes = [] if coefficients["sd"] else [UNCONTROLLED]
    if separates(np.concatenate([own[votes.read], theirs]), np.concatenate([votes.values[votes.read], beside.targets])):
        notes.append("no interval: the votes are so one-sided that resampling cannot estimate the error")
        return LengthControlled(Estimate(Interval(rate, None, None, n), np.empty(0)), coefficients, "; ".join(notes))
    centre, draws = votes.resampled(beside, resamples, seed)
    draws = np.clip(draws + rate - float(votes.rates(centre[None], everyone)[0]), 0, 1)
    return LengthControlled(Estimate(percentiles(rate, draws, n, confidence), draws), coefficients, "; ".join(notes))


def length_adjusted(
    preferences: Numbers,
    model_lengths: Numbers,
    baseline_lengths: Numbers,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> LengthControlled:
    """What is left of a win rate at equal length, by an unpenalised fit to these votes alone; all arguments are (N,).

    No difficulty and no gamed rows: no figure of the leaderboard. Each resample has its own sd and fit. Where one side
    wins every comparison the rate is that, 1 or 0. Where length tells wins from losses without fault, likelihood has no
    maximum and no rate is given. Raises as `length_controlled`.
    """
    votes = _Votes.of(preferences, model_lengths, baseline_lengths)
    values, n = votes.values[votes.read], len(votes.values)
    if not len(values):
        return LengthControlled(None, note="no preference could be read")
    if np.unique(values).tolist() in ([0.0], [1.0]):
        rate = float(values[0])
        side = "the model" if rate else "the baseline"
        figure = Estimate(percentiles(rate, np.full(resamples, rate), n, confidence), np.full(resamples, rate))
        return LengthControlled(figure, note=f"{side} wins every comparison, so length explains nothing")
    everyone = np.ones((1, n))
    if separates(votes.features(everyone)[0, votes.read], values):
        return LengthControlled(None, note="length separates all wins from all losses: no length-adjusted rate can be estimated")
    fit, draws = votes.resampled(
        _Beside(np.empty((0, 3)), np.empty(0), np.empty(0), np.empty(0, dtype=np.int64)), resamples, seed
    )
    rate = float(votes.rates(fit[None], everyone)[0])
    coefficients = votes.coefficients(fit)
    note = "" if coefficients["sd"] else UNCONTROLLED
    return LengthControlled(Estimate(percentiles(rate, draws, n, confidence), draws), coefficients, note)


@dataclass(frozen=True)
class _Beside:
    """Rows that join a fit: features (G, 3), targets, weights, and the prompt (of N) that each is drawn with, −1 for none."""

    features: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    prompts: np.ndarray


@dataclass(frozen=True)
class _Votes:
    """N preferences (0.5 where `read` is false), length differences, difficulties."""

    values: np.ndarray
    read: np.ndarray
    gaps: np.ndarray
    hardness: np.ndarray

    @classmethod
    def of(cls, preferences: Numbers, model: Numbers, baseline: Numbers, difficulty: Numbers | None = None) -> _Votes:
        values = np.asarray(preferences, dtype=np.float64)
        gaps = np.asarray(model, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
        hardness = np.zeros(values.shape) if difficulty is None else np.asarray(difficulty, dtype=np.float64)
        if values.ndim != 1 or gaps.shape != values.shape or hardness.shape != values.shape:
            raise ValueError(f"preferences {values.shape}, lengths {gaps.shape}, difficulties {hardness.shape} must be (N,)")
        read = ~np.isnan(values)
        if not ((values[read] >= 0) & (values[read] <= 1)).all():
            raise ValueError("preferences must lie in [0, 1]")
        return cls(np.where(read, values, 0.5), read, gaps, hardness)

    def features(self, counts: np.ndarray) -> np.ndarray:
        """(R, N, 3): length, difficulty, 1. A feature that does not vary gets a coefficient of no effect by the ridge."""
        deviations = _deviations(self.gaps, counts)[:, None]
        lengths = np.tanh(np.divide(self.gaps, deviations, out=np.zeros(counts.shape), where=deviations > 0))
        return np.stack([lengths, np.broadcast_to(self.hardness, counts.shape), np.ones(counts.shape)], axis=-1)

    def rates(self, coefficients: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """(R,): what is left at equal length."""
        chances = sigmoid(coefficients[:, 1:2] * self.hardness + coefficients[:, 2:])
        return (counts * chances).sum(axis=1) / counts.sum(axis=1)

    def coefficients(self, fit: np.ndarray) -> dict[str, float]:
        """w_l, w_m, and the sd that w_l goes by."""
        return {"w_l": float(fit[0]), "w_m": float(fit[2]), "sd": float(_deviations(self.gaps, np.ones((1, len(self.gaps))))[0])}

    def resampled(self, beside: _Beside, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Unpenalised fits: coefficients (3,) on all prompts, and the rate on each resample of them (R,)."""
        targets = np.concatenate([self.values, beside.targets])

        def fitted(counts: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
            rows = np.broadcast_to(beside.features, (len(counts), *beside.features.shape))
            drawn = np.where(beside.prompts >= 0, counts[:, beside.prompts], 1) if len(beside.prompts) else counts[:, :0]
            weights = np.concatenate([counts * self.read, beside.weights * drawn], axis=1)
            return fit_logistic(np.concatenate([self.features(counts), rows], axis=1), targets, weights, start=start)

        fit = fitted(np.ones((1, len(self.values))))[0]
        blocks = bootstrap_counts(len(self.values), resamples=resamples, seed=seed, block=_BLOCK)
        return fit, np.concatenate([self.rates(fitted(counts, fit), counts) for counts in blocks])


def _penalised(features: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients (3,) and C of scikit-learn's L1 fit, its strength by cross-validation with both copies of a row in one fold.

    Every row stands twice, as a win that weighs w·p and a loss that weighs w·(1 − p).
    """
    import sklearn
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import GroupKFold

    rows = len(targets)
    doubled, wins = np.concatenate([features, features]), np.repeat([1, 0], rows)
    votes = np.concatenate([targets, 1 - targets]) * np.concatenate([weights, weights])
    folds = GroupKFold(FOLDS).split(doubled, wins, np.tile(np.arange(rows), 2))

    def score(model: Any, held: np.ndarray, won: np.ndarray, sample_weight: np.ndarray) -> float:
        """Mean over the fold's rows of w·(p·log q + (1 − p)·log(1 − q)), from both copies of each."""
        chance = np.clip(model.predict_proba(held)[:, 1], _EPSILON, 1 - _EPSILON)
        return float(sample_weight @ np.log(np.where(won == 1, chance, 1 - chance)) / (len(won) / 2))

    model = LogisticRegressionCV(
        Cs=STRENGTHS,
        cv=list(folds),
        l1_ratios=(1.0,),
        solver="liblinear",
        scoring=score,
        fit_intercept=False,
        random_state=SEED,
        use_legacy_attributes=False,
    )
    with sklearn.config_context(enable_metadata_routing=False):  # a user's own setting would ask the scorer to declare itself
        model.fit(doubled, wins, sample_weight=votes)
    return np.asarray(model.coef_[0], dtype=np.float64), float(model.C_)


def _deviations(gaps: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(R,): standard deviations (n − 1) of the drawn length differences; 0 where they are all equal."""
    n = counts.shape[1]
    centred = gaps - gaps.mean()
    means = counts @ centred / n
    squares = counts @ centred**2 - n * means**2
    variances = np.maximum(squares, 0) / max(n - 1, 1)
    return np.sqrt(np.where(variances > 1e-12 * max(1.0, float(np.abs(gaps).max()) ** 2), variances, 0))
