"""A model to evaluate, and what its record says of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Checkpoint:
    """A model to evaluate, with what its record says of it."""

    path: str
    label: str
    method: str | None = None
    beta: float | None = None
    seed: int | None = None
    step: int | None = None
    weight_mean: float | None = None  # over the training steps since the checkpoint before
    ess: float | None = None  # ESS/N over those steps

    def to_json(self) -> dict[str, Any]:
        """The fields, as plain data."""
        return asdict(self)
