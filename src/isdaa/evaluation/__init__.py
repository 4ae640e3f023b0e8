"""Samples, KL, win rates and records of checkpoints: did a run over-optimise, and which checkpoint should be kept?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from isdaa.lazy import lazy

if TYPE_CHECKING:
    from isdaa.evaluation.checkpoints.trajectory import read_study
    from isdaa.evaluation.python import evaluate
    from isdaa.evaluation.verdict.comparison import at_matched_kl, summarise
    from isdaa.evaluation.verdict.overoptimization import Verdict, judge, verdict_of

__all__ = ["Verdict", "at_matched_kl", "evaluate", "judge", "read_study", "summarise", "verdict_of"]
__getattr__, __dir__ = lazy(
    __name__,
    {
        "Verdict": "evaluation.verdict.overoptimization",
        "judge": "evaluation.verdict.overoptimization",
        "verdict_of": "evaluation.verdict.overoptimization",
        "evaluate": "evaluation.python",
        "read_study": "evaluation.checkpoints.trajectory",
        "at_matched_kl": "evaluation.verdict.comparison",
        "summarise": "evaluation.verdict.comparison",
    },
)
