"""Logistic regression on soft preferences, for one data set or for many resamples of it at once.

Legend: N rows, F features, R resamples. A target is a probability in [0, 1]; a row's weight says how often it counts.
"""

from __future__ import annotations

import numpy as np

# Added to the curvature of the summed log-likelihood: moves a rate over 20 prompts by less than 1e-5, and gives collinear
# features (and resamples that a line separates) the solution of smallest norm instead of none.
RIDGE = 1e-6
_STEPS = 100


def fit_logistic(
    features: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None, *, start: np.ndarray | None = None
) -> np.ndarray:
    """Coefficients that maximise Σ w·[t·log σ(x·c) + (1−t)·log σ(−x·c)] − RIDGE/2·|c|², by Newton with halved steps.

    features: (N, F), or (R, N, F) where each resample has its own; targets: (N,); weights: (N,), or (R, N) for R fits;
    start: (F,). Returns (F,), or (R, F). No intercept is added. Raises ValueError for shapes that do not fit, targets
    outside [0, 1] and numbers that are not finite.
    """
    features, targets = np.asarray(features, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    rows, width = features.shape[-2:]
    weights = np.ones(rows) if weights is None else np.asarray(weights, dtype=np.float64)
    if features.ndim not in (2, 3) or targets.shape != (rows,) or weights.shape[-1:] != (rows,) or weights.ndim > 2:
        raise ValueError(f"features {features.shape}, targets {targets.shape}, weights {weights.shape} do not fit")
    if not (np.isfinite(features).all() and np.isfinite(weights).all() and ((targets >= 0) & (targets <= 1)).all()):
        raise ValueError("features and weights must be finite, targets in [0, 1]")
    many = weights.ndim == 2 or features.ndim == 3
    weights = np.atleast_2d(weights)
    count = max(len(weights), len(features) if features.ndim == 3 else 1)
    weights = np.broadcast_to(weights, (count, rows))
    coefficients = np.tile(np.zeros(width) if start is None else np.asarray(start, dtype=np.float64), (count, 1))
    loss, gradient, curvature = _derivatives(features, targets, weights, coefficients)
    live = np.arange(count)
    for _ in range(_STEPS):
        move = -np.linalg.solve(curvature, gradient[..., None])[..., 0]
        size = np.ones((len(live), 1))
        own = features[live] if features.ndim == 3 else features
        for _ in range(30):
            trial = coefficients[live] + size * move
            trial_loss = _loss(own, targets, weights[live], trial)
            worse = trial_loss > loss + 1e-12 * np.abs(loss)
            if not worse.any():
                break
            size[worse] /= 2
        coefficients[live] = np.where(worse[:, None], coefficients[live], trial)
        moving = (np.abs(size * move).max(axis=1) > 1e-9) & ~worse
        if not moving.any():
            break
        live = live[moving]
        own = features[live] if features.ndim == 3 else features
        loss, gradient, curvature = _derivatives(own, targets, weights[live], coefficients[live])
    return coefficients if many else coefficients[0]


def separates(features: np.ndarray, targets: np.ndarray) -> bool:
    """Whether some line tells wins from losses without fault, so that likelihood has no maximum (Albert & Anderson 1984).

    Complete or quasi-complete: a direction c ≠ 0 in the rows' span with x·c ≥ 0 where t = 1, ≤ 0 where t = 0, and = 0
    where the target lies between. Found by a linear programme.
    """
    from scipy.optimize import linprog

    features, targets = np.asarray(features, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    scale = np.abs(features).max(axis=0)
    scaled = features / np.where(scale > 0, scale, 1)
    hard = (targets == 0) | (targets == 1)
    if not hard.any():
        return False
    signed = np.where(targets[hard, None] == 1, 1.0, -1.0) * scaled[hard]
    soft = scaled[~hard]
    solution = linprog(
        -signed.sum(axis=0),
        A_ub=-signed,
        b_ub=np.zeros(len(signed)),
        A_eq=soft if len(soft) else None,
        b_eq=np.zeros(len(soft)) if len(soft) else None,
        bounds=(-1, 1),
    )
    return bool(solution.status == 0 and -solution.fun > 1e-6)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + e^−z), without overflow."""
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1, small) / (1 + small)


def _logits(features: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """(R, N)."""
    return coefficients @ features.T if features.ndim == 2 else (features @ coefficients[..., None])[..., 0]


def _loss(features: np.ndarray, targets: np.ndarray, weights: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """(R,)."""
    logits = _logits(features, coefficients)
    softplus = np.maximum(logits, 0) + np.log1p(np.exp(-np.abs(logits)))
    return (weights * (softplus - targets * logits)).sum(axis=1) + RIDGE / 2 * (coefficients**2).sum(axis=1)


def _derivatives(
    features: np.ndarray, targets: np.ndarray, weights: np.ndarray, coefficients: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss (R,), gradient (R, F) and curvature (R, F, F) of `_loss`."""
    count, width = coefficients.shape
    chance = sigmoid(_logits(features, coefficients))
    residual, slope = weights * (chance - targets), weights * chance * (1 - chance)
    if features.ndim == 2:
        gradient = residual @ features
        products = (features[:, :, None] * features[:, None, :]).reshape(len(features), width * width)
        curvature = (slope @ products).reshape(count, width, width)
    else:
        gradient = (residual[:, None, :] @ features)[:, 0]
        curvature = (features * slope[..., None]).transpose(0, 2, 1) @ features
    gradient = gradient + RIDGE * coefficients
    return _loss(features, targets, weights, coefficients), gradient, curvature + RIDGE * np.eye(width)
