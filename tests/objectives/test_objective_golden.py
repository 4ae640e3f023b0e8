"""Values and gradients against tests/golden/objectives.json, computed at 50 digits by an independent program."""

import json
from pathlib import Path

import pytest
import torch

from isdaa.objectives import Objective, PairLogps

pytestmark = pytest.mark.fast

CASES = json.loads((Path(__file__).parents[1] / "golden" / "objectives.json").read_text(encoding="utf-8"))["cases"]


def inputs(case: dict, copies: int = 1) -> tuple[PairLogps, torch.Tensor, torch.Tensor]:
    def tensor(name: str) -> torch.Tensor | None:
        return torch.tensor([case[name]] * copies, dtype=torch.float64) if case.get(name) is not None else None

    chosen, rejected = tensor("policy_chosen_logps"), tensor("policy_rejected_logps")
    assert chosen is not None and rejected is not None
    pairs = PairLogps(
        policy_chosen_logps=chosen.requires_grad_(),
        policy_rejected_logps=rejected.requires_grad_(),
        reference_chosen_logps=tensor("reference_chosen_logps"),
        reference_rejected_logps=tensor("reference_rejected_logps"),
        chosen_lengths=torch.tensor([case["chosen_lengths"]] * copies),
        rejected_lengths=torch.tensor([case["rejected_lengths"]] * copies),
        behaviour_chosen_logps=tensor("behaviour_chosen_logps"),
        behaviour_rejected_logps=tensor("behaviour_rejected_logps"),
    )
    return pairs, chosen, rejected


def test_the_file_is_whole() -> None:
    assert len(CASES) == 64
    known = {"name", "objective", "expected", *PairLogps.__dataclass_fields__}
    assert all(set(case) <= known for case in CASES)  # nothing in it goes unread


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_values_and_gradients(case: dict, copies: int) -> None:
    pairs, chosen, rejected = inputs(case, copies)
    out = Objective(**case["objective"])(pairs)
    out.losses.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    found = {
        "logit": out.logits,
        "unweighted_loss": out.unweighted_losses,
        "weight": out.weights,
        "log_weight_unclipped": out.log_weights,
        "loss": out.losses,
        "grad_policy_chosen": chosen.grad,
        "grad_policy_rejected": rejected.grad,
    }
    assert set(found) == set(case["expected"])
    for name, values in found.items():
        for value in values.tolist():
            assert value == pytest.approx(case["expected"][name], rel=1e-9, abs=0), name
