"""Offline preference alignment that does not over-optimise.

Everything that it offers by name is loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from isdaa.lazy import lazy

if TYPE_CHECKING:
    from isdaa.evaluation.judges.types import JudgeSettings
    from isdaa.evaluation.python import evaluate
    from isdaa.objectives.objective import Objective, PairLogps
    from isdaa.objectives.presets import PRESETS
    from isdaa.training.trainer.checkpoints import adopt
    from isdaa.training.trainer.preference_trainer import PreferenceTrainer
    from isdaa.training.trl_api.drop_in import preference_trainer
    from isdaa.training.trl_api.preference_config import PreferenceConfig

# torch reads this when it makes its first tensor: large blocks of CPU memory in huge pages, which are mapped hundreds of
# times faster. A training step maps and frees gigabytes, and spends 5 % of its time on that otherwise.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
HOMES = {
    "JudgeSettings": "evaluation.judges.types",
    "Objective": "objectives.objective",
    "PairLogps": "objectives.objective",
    "PRESETS": "objectives.presets",
    "PreferenceConfig": "training.trl_api.preference_config",
    "PreferenceTrainer": "training.trainer.preference_trainer",
    "adopt": "training.trainer.checkpoints",
    "evaluate": "evaluation.python",
    "preference_trainer": "training.trl_api.drop_in",
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

__getattr__, __dir__ = lazy(__name__, HOMES)
