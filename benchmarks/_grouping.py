"""What both parts of `group_by_prompt.py` train on: the losses of some pairs that go through the model at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from isdaa.models.packed.forward import PairForward
from isdaa.objectives.objective import Objective, PairLogps
from isdaa.training.trainer.batches import TokenisedPairs
from isdaa.training.trainer.packing import Piece


def pair_losses(forward: PairForward, objective: Objective, pairs: TokenisedPairs, batch: Sequence[int]) -> tuple[Tensor, int]:
    """(B,) losses of the rows `batch` of `pairs`, as `PreferenceTrainer` computes them, and the tokens of the packed row."""
    piece = Piece.of(pairs.batch(batch))
    logps = forward(forward.model, piece.input_ids, None, piece.layout)
    own = piece.batch
    assert own.reference_chosen_logps is not None and own.reference_rejected_logps is not None
    found = PairLogps(
        policy_chosen_logps=logps.chosen_logps,
        policy_rejected_logps=logps.rejected_logps,
        reference_chosen_logps=own.reference_chosen_logps,
        reference_rejected_logps=own.reference_rejected_logps,
        chosen_lengths=own.chosen_lengths,
        rejected_lengths=own.rejected_lengths,
    )
    return objective(found).losses, piece.layout.tokens
