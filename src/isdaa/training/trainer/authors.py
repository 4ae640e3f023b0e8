"""Did μ write the responses? An importance weight takes for granted that it did: the model that was named, else π_ref."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from isdaa.config import Config
from isdaa.data.pairs import Counts
from isdaa.objectives.presets import weighs_by_behaviour
from isdaa.training.trainer.batches import BEHAVIOUR_COLUMNS, TokenisedPairs, own_logps

LEAST = 16  # responses; nothing is said of fewer
SURE = 4.0  # standard errors
FAR = 1.0  # nats of |log w| on average, at a first step that nothing has changed yet
GAP = 0.015  # of what own samples would have; less is not worth a line, however sure
CERTAIN = -0.1  # logp from which on a response counts as no likelier: it says next to nothing, and must not outweigh the others
MODEL_NAMES = re.compile(r"(^|[ _.-])(models?|generators?)($|[ _.-])")  # columns that say who wrote a response

HELP = (
    "importance weights are right only for text that the reference wrote; for other text, give behaviour logps of the model that "
    "wrote it (`isdaa logps --model_path MODEL --data PAIRS --output FILE`, or --behaviour.model_path), or sample new responses "
    "from the reference with the label stage (docs/method.md)"
)

NAMED = (
    "It is named as μ, but weights from its logps are right only for text that it wrote itself, at temperature 1 and uncut: "
    "name the model that wrote these responses, or take a method without μ (docs/which_method.md)"
)
ASSUMED = (
    "μ = π_ref is assumed, since the rows have no behaviour logps: the weights treat the reference as the author of the "
    "responses; `isdaa train` tests whether they look like its samples"
)


def takes_reference_for_author(config: Config, pairs: TokenisedPairs) -> bool:
    """Whether weights depend on μ, and neither the configuration nor a row says what μ is."""
    known = config.behaviour.model_path is not None or set(pairs.floats) & set(BEHAVIOUR_COLUMNS)
    return weighs_by_behaviour(config.objective.arguments()) and not known


def not_drawn(objective: Mapping[str, Any], counts: Counts) -> list[str]:
    """A line where weights are made of μ, and the label stage has marked pairs as no draw from μ × μ."""
    if not counts.best_worst or not weighs_by_behaviour(objective):
        return []
    return [
        f"warning: {counts.best_worst} pairs are the best against the worst of several samples (pairing: best_worst), not "
        "draws from μ × μ, so importance weights on them are biased; make pairs with --label.pairing random, or take a method "
        "without μ, such as chi_po"
    ]


def naming_columns(counts: Counts) -> list[str]:
    """A line where the rows have a column that names the models which wrote the responses."""
    names = [name for name in counts.unread if MODEL_NAMES.search(name.lower())]
    if not names:
        return []
    columns = f"column{'s' if len(names) > 1 else ''} {', '.join(map(repr, names[:4]))}"
    return [f"warning: the rows name the models that wrote the responses ({columns}), and μ = π_ref is assumed: {HELP}"]


def foreign_text(measured: np.ndarray, pairs: TokenisedPairs, model: str | None = None) -> list[str]:
    """A line where responses are not draws from the model that measured them, at temperature 1; of rows without behaviour logps.

    A token drawn from π has, on average, the probability Σ_v π(v)². The sum over a response of π(y_t) − Σ_v π(v)² is then a
    martingale: its mean over responses is zero but for chance, whatever the prompts, lengths and cuts are. Pairs of equal
    responses are left out; a response y is weighed with 1 / (1 − π(y)), which makes up for those that it would have been in.

    measured: (6, N) of `reference.measure`. model: its name, where it was named as μ; None: the reference. Nothing is said of few
    responses, nor of a difference that chance may explain.
    """
    probability, own = measured[2:4].astype(np.float64).ravel(), measured[4:6].astype(np.float64).ravel()
    scored = pairs.scored_lengths().ravel()
    asked = (measured[0] != measured[1]) & ~own_logps(pairs)  # equal responses are no pair
    there = (own > 0) & np.tile(asked, 2)
    if there.sum() < LEAST:
        return []
    kept = -1 / np.expm1(np.minimum(measured[:2].astype(np.float64).ravel()[there], CERTAIN))
    excess = kept * (probability - own)[there]
    error = excess.std(ddof=1) / np.sqrt(len(excess))
    tokens = kept @ scored[there]
    gap = excess.sum() / (kept @ own[there])
    away = abs(excess.mean()) / max(error, 1e-12)
    if abs(gap) < GAP or away < SURE:
        return []
    found, expected = (float(kept @ values[there] / tokens) for values in (probability, own))
    means = f"μ = π_ref is assumed: {HELP}" if model is None else NAMED
    return [
        f"warning: the responses are not samples of {model or 'the reference'}: their tokens have probability {found:.3g} on "
        f"average, its own would have {expected:.3g} ({away:.0f} standard errors apart). {means}"
    ]
