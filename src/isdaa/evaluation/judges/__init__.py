"""A judge model behind an endpoint: asked, read, kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from isdaa.lazy import lazy

if TYPE_CHECKING:
    from isdaa.evaluation.judges.judge import Judge, Question
    from isdaa.evaluation.judges.types import JudgeSettings

__all__ = ["Judge", "JudgeSettings", "Question"]
__getattr__, __dir__ = lazy(
    __name__,
    {"Judge": "evaluation.judges.judge", "JudgeSettings": "evaluation.judges.types", "Question": "evaluation.judges.judge"},
)
