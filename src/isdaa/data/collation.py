"""Pairs of token ids to one packed shared-prefix batch (docs/architecture.md).

Legend: B pairs, T tokens of the packed row, T = Σ_b prompt_b + chosen_b + rejected_b. There is no padding anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch


@dataclass
class PairBatch:
    """B pairs packed as `[prompt_0|chosen_0|rejected_0|prompt_1|…]`; the lengths say everything about the layout.

    input_ids: (T,) int64; in a response `~id` for a token that is not scored.
    prompt_lengths, chosen_lengths, rejected_lengths: (B,) int64, in tokens, EOS included.
    chosen_scored, rejected_scored: (B,) int64, those of the tokens that are scored: |y| of the objective.
    *_logps: (B,) float32, sums over a response in nats, or None where no row has them. A NaN among the behaviour logps
        marks a row without its own: the reference is its behaviour policy (`with_reference` fills it in).
    weights: (B,) float32 of the data's `weight` column (1 where a row has none), or None where no row has one.
    valid: (B,) bool; False for pairs that only fill a rank, which count for nothing.
    index: (B,) int64, row numbers in the tokenised data set; -1 where a row does not say.
    """

    input_ids: torch.Tensor
    prompt_lengths: torch.Tensor
    chosen_lengths: torch.Tensor
    rejected_lengths: torch.Tensor
    chosen_scored: torch.Tensor
    rejected_scored: torch.Tensor
    valid: torch.Tensor
    index: torch.Tensor
    reference_chosen_logps: torch.Tensor | None = None
    reference_rejected_logps: torch.Tensor | None = None
    behaviour_chosen_logps: torch.Tensor | None = None
    behaviour_rejected_logps: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.prompt_lengths.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        """The same batch on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {k: None if v is None else v.to(device, non_blocking=non_blocking) for k, v in values.items()}
        return PairBatch(**moved)

    def with_reference(self, chosen_logps: torch.Tensor, rejected_logps: torch.Tensor) -> PairBatch:
        """The same batch with reference logps, each (B,); they stand in where a row has no behaviour logps."""
        if chosen_logps.shape != (len(self),) or rejected_logps.shape != (len(self),):
            raise ValueError(f"reference logps must have shape ({len(self)},)")
        chosen, rejected = self.behaviour_chosen_logps, self.behaviour_rejected_logps
        return replace(
            self,
            reference_chosen_logps=chosen_logps,
            reference_rejected_logps=rejected_logps,
            behaviour_chosen_logps=None if chosen is None else torch.where(chosen.isnan(), chosen_logps, chosen),
            behaviour_rejected_logps=None if rejected is None else torch.where(rejected.isnan(), rejected_logps, rejected),
        )

    def rows(self) -> list[dict[str, list[int]]]:
        """The B pairs as `prompt_ids`, `chosen_ids` and `rejected_ids` again: the inverse of `collate`."""
        ids = self.input_ids.tolist()
        result, start = [], 0
        for lengths in zip(*(part.tolist() for part in self.parts()), strict=True):
            row = {}
            for name, length in zip(("prompt_ids", "chosen_ids", "rejected_ids"), lengths, strict=True):
                row[name] = ids[start : start + length]
                start += length
            result.append(row)
        return result

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Lengths of prompts, chosen and rejected responses, each (B,)."""
        return self.prompt_lengths, self.chosen_lengths, self.rejected_lengths


def collate(rows: Sequence[Mapping[str, Any]]) -> PairBatch:
    """Pack tokenised pairs, in their order. Truncation is over by now: nothing is cut, padded or reordered here.

    rows: `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of ints, none empty), and optionally `reference_*_logps`,
        `behaviour_*_logps`, `weight`, `valid` and `index`.
    Raises ValueError for no rows or an empty part: a response without a token has no logp, one without a prompt no
        token that predicts its first.
    """
    if not rows:
        raise ValueError("collate needs at least one pair")
    lengths = np.array(
        [[len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")] for row in rows], dtype=np.int64
    )
    if (lengths == 0).any():
        raise ValueError(f"pair {int(np.argwhere(lengths == 0)[0, 0])} of the batch has an empty prompt or response")
    ids = [np.asarray(row[name], dtype=np.int64) for row in rows for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    reference_chosen, reference_rejected = (
        _floats(rows, "reference_chosen_logps"),
        _floats(rows, "reference_rejected_logps"),
    )
    batch = PairBatch(
        input_ids=torch.from_numpy(np.concatenate(ids)),
        prompt_lengths=torch.from_numpy(lengths[:, 0].copy()),
        chosen_lengths=torch.from_numpy(lengths[:, 1].copy()),
        rejected_lengths=torch.from_numpy(lengths[:, 2].copy()),
        chosen_scored=torch.tensor([int((part >= 0).sum()) for part in ids[1::3]]),
        rejected_scored=torch.tensor([int((part >= 0).sum()) for part in ids[2::3]]),
        valid=torch.tensor([bool(row.get("valid", True)) for row in rows]),
        index=torch.tensor([int(row.get("index", -1)) for row in rows], dtype=torch.int64),
        behaviour_chosen_logps=_floats(rows, "behaviour_chosen_logps"),
        behaviour_rejected_logps=_floats(rows, "behaviour_rejected_logps"),
        weights=_floats(rows, "weight", absent=1.0),
    )
    if reference_chosen is None or reference_rejected is None:
        return batch
    return batch.with_reference(reference_chosen, reference_rejected)


def _floats(rows: Sequence[Mapping[str, Any]], name: str, absent: float = math.nan) -> torch.Tensor | None:
    """(B,) float32 of one column, `absent` where a row lacks it; None where all rows do."""
    values = [row.get(name) for row in rows]
    if all(value is None for value in values):
        return None
    return torch.tensor([absent if value is None else float(value) for value in values], dtype=torch.float32)
