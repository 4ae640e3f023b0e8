"""Would the first steps teach anything? The weights of pairs under the policy as it starts, before training does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from isdaa.config import Config
from isdaa.errors import UserError
from isdaa.objectives.presets import weighs_by_behaviour
from isdaa.objectives.weights import effective_sample_size, importance_weights
from isdaa.training.trainer.batches import BEHAVIOUR_COLUMNS, REFERENCE_COLUMNS, TokenisedPairs, own_logps
from isdaa.training.trainer.callbacks import STALL_ESS, STALL_MEAN_WEIGHT

EVEN = 0.5  # ESS/N from which weights are alike enough that dividing them by their mean helps
CLIPPED = 0.9  # share of pairs at the clip from which the weights say nothing
SAMPLE = 512  # pairs that are measured where the policy's own logps are not there yet


class Stalled(UserError):
    """Hardly any pair would teach."""


def starting_weights(
    objective: Mapping[str, Any],
    pairs: TokenisedPairs,
    policy: Callable[[TokenisedPairs], np.ndarray] | None,
    own: np.ndarray,
    model: str | None,
    allow_stall: bool,
    went_on: bool = False,
    total: int | None = None,
) -> list[str]:
    """A line that says where μ comes from, with mean weight and ESS/N before the first step; none without weights made of μ.

    Args:
        objective: the arguments of `Objective`.
        pairs: with reference logps.
        policy: logps of pairs under the policy, as `reference.measure` gives them; None: it is the reference, whose are there.
        own: (N,) of `own_logps`, before a named model filled the rest.
        model: what was named as μ, where a model was.
        allow_stall: only say it.
        went_on: the policy has been trained from this reference before.
        total: pairs of which these are a sample.

    Raises:
        Stalled: hardly any pair would teach, and `allow_stall` is not set: ESS/N below 0.02, or below two pairs of 20 or more,
            or a mean weight below 1e-3.
    """
    if not weighs_by_behaviour(objective):
        return []
    total = total or len(pairs)
    pairs = pairs if policy is None else thinned(pairs)
    reference = np.stack([pairs.floats[name] for name in REFERENCE_COLUMNS])
    ours = reference if policy is None else policy(pairs)[:2]
    columns = [pairs.floats.get(name, np.full(len(pairs), np.nan)) for name in BEHAVIOUR_COLUMNS]
    behaviour = np.where(np.isnan(columns), reference, columns)
    # In fp32, as training computes them: a weight that vanishes there teaches nothing.
    chosen, rejected = (torch.from_numpy(np.asarray(gap, dtype=np.float32)) for gap in ours - behaviour)
    logs, weights, clipped = importance_weights(chosen, rejected, objective["clip"], objective["clip_eps"])
    mean, ess, at_clip = float(weights.mean()), float(effective_sample_size(weights)), float(clipped.float().mean())
    source = _source(model, own) + (
        "; the policy has already moved away from its reference, so w = π/μ need not be 1" if went_on else ""
    )
    count = f"{len(pairs):,} pairs" if len(pairs) == total else f"{len(pairs)} of {total:,} pairs"
    figures = f"before the first step {count} have a mean weight of {mean:.3g} and ESS/N {ess:.3g}"
    least = max(STALL_ESS, min(0.1, 2 / len(pairs)))  # of few pairs, one alone is more than 0.02
    few, small = ess < least and objective["weight"] != "mean", mean < STALL_MEAN_WEIGHT and objective["normalize"] is None
    if not (few or small):
        if at_clip < CLIPPED:
            source = f"warning: {source}" if model is None and len(set(own.tolist())) == 2 else source
            return [f"{source}; {figures}" + (f", {at_clip:.0%} of them at the clip" if at_clip else "")]
        return [
            f"warning: {source}; {figures}, but {at_clip:.0%} of them are at the clip (median log w {float(logs.median()):.3g}): "
            "so nearly all pairs have the same weight; did this μ write the responses, and are its logps sums over the response "
            "only?"
        ]
    limits = [f"ESS/N below {least:.2g}"] * few + [f"mean below {STALL_MEAN_WEIGHT:g}"] * small
    told = f"{source}; {figures}: almost nothing would be learnt ({', '.join(limits)})"
    if allow_stall:
        return [f"warning: {told}; training anyway (objective.allow_stall)"]
    even = "" if ess < EVEN or objective["weight"] == "mean" else ", objective.normalize: batch (the weights are even)"
    if went_on:
        even = f"{even}, an earlier checkpoint of the old run"
    raise Stalled(
        f"{told}. What helps: logps of the model that wrote them (`isdaa logps`, behaviour.model_path), the label stage, "
        f"objective.method: dpo{even}; or objective.allow_stall: true"
    )


def thinned(pairs: TokenisedPairs) -> TokenisedPairs:
    """At most `SAMPLE` pairs, spread over all of them."""
    if len(pairs) <= SAMPLE:
        return pairs
    return TokenisedPairs([pairs[int(row)] for row in np.linspace(0, len(pairs) - 1, SAMPLE)])


def unmeasured(config: Config, pairs: TokenisedPairs) -> str:
    """The same line without its figures, which need the policy's logps: for `isdaa inspect` without `--weights`."""
    source = _source(config.behaviour.model_path, own_logps(pairs))
    return (
        f"{source}; `isdaa train` measures mean weight and ESS/N before its first step, and stops where the mean is "
        f"below {STALL_MEAN_WEIGHT:g} or ESS/N below {STALL_ESS:g} (--weights measures them now, on {SAMPLE} pairs)"
    )


def _source(model: str | None, own: np.ndarray) -> str:
    """Where μ comes from. own: (N,) whether a row has logps of its own."""
    rest = int((~own).sum())
    if not rest:
        unused = "" if model is None else f"; {model} (behaviour.model_path) is not used"
        return f"μ comes from the rows' own behaviour logps{unused}"
    if model is not None:
        where = f" in {rest:,} rows, and the other {len(own) - rest:,} have behaviour logps of their own" if own.any() else ""
        return f"μ is {model} (behaviour.model_path){where}"
    if own.any():
        assumed = f"is assumed to be π_ref in {rest:,} rows without any, so the weights have two meanings"
        return f"μ comes from the rows' own behaviour logps, and {assumed}"
    return "μ is assumed to be π_ref, since the rows have no behaviour logps"
