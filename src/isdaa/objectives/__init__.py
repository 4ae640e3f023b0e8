"""Preference objectives: pure functions of `(B,)` tensors. Imports torch alone, and torch only when a tensor is needed.

Shapes here and in every module of this folder: B pairs. A *logp* is the sum of natural-log token probabilities of one
response, EOS included where the response ended, prompt excluded.
"""

from typing import TYPE_CHECKING

from isdaa.lazy import lazy
from isdaa.objectives.presets import CHOICES, DEFAULTS, FIELDS, PRESETS, Preset, check_settings, resolve

if TYPE_CHECKING:
    from isdaa.objectives.objective import Objective, ObjectiveOutput, PairLogps
    from isdaa.objectives.weights import batch_weights, effective_sample_size, weight_metrics

__all__ = [
    "CHOICES",
    "DEFAULTS",
    "FIELDS",
    "PRESETS",
    "Objective",
    "ObjectiveOutput",
    "PairLogps",
    "Preset",
    "batch_weights",
    "check_settings",
    "effective_sample_size",
    "resolve",
    "weight_metrics",
]

# Imported on first use: the command line reads the presets for its help, which must not wait for torch.
_LAZY = {
    "Objective": "objectives.objective",
    "ObjectiveOutput": "objectives.objective",
    "PairLogps": "objectives.objective",
    "batch_weights": "objectives.weights",
    "effective_sample_size": "objectives.weights",
    "weight_metrics": "objectives.weights",
}

__getattr__, __dir__ = lazy(__name__, _LAZY)
