"""Samples, KL, win rates and records of checkpoints: did a run over-optimise, and which checkpoint should be kept?

`verdict_of`, `judge` and `Verdict` are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isdaa.evaluation.overoptimization import Verdict, judge, verdict_of

__all__ = ["Verdict", "judge", "verdict_of"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("isdaa.evaluation.overoptimization"), name)
    raise AttributeError(f"module 'isdaa.evaluation' has no attribute {name!r}")
