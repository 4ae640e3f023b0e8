"""Offline preference alignment that does not over-optimise.

Everything that it offers by name is loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isdaa.evaluation.judge_types import JudgeSettings
    from isdaa.evaluation.python import evaluate
    from isdaa.objectives.objective import Objective, PairLogps
    from isdaa.objectives.presets import PRESETS
    from isdaa.training.checkpoints import adopt
    from isdaa.training.preference import PreferenceTrainer
    from isdaa.training.preference_config import PreferenceConfig
    from isdaa.training.preference_trainer import preference_trainer

# torch reads this when it makes its first tensor: large blocks of CPU memory in huge pages, which are mapped hundreds of
# times faster. A training step maps and frees gigabytes, and spends 5 % of its time on that otherwise.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
HOMES = {
    "JudgeSettings": "evaluation.judge_types",
    "Objective": "objectives.objective",
    "PairLogps": "objectives.objective",
    "PRESETS": "objectives.presets",
    "PreferenceConfig": "training.preference_config",
    "PreferenceTrainer": "training.preference",
    "adopt": "training.checkpoints",
    "evaluate": "evaluation.python",
    "preference_trainer": "training.preference_trainer",
}
__all__ = [
    "PRESETS",
    "JudgeSettings",
    "Objective",
    "PairLogps",
    "PreferenceConfig",
    "PreferenceTrainer",
    "__version__",
    "adopt",
    "evaluate",
    "preference_trainer",
]


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f"isdaa.{HOMES[name]}"), name)
    raise AttributeError(f"module 'isdaa' has no attribute {name!r}")
