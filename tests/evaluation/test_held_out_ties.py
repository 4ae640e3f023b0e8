"""Accuracy on held-out pairs: a policy that has not moved is right as often as chance is."""

import pytest

from isdaa.evaluation.checkpoints.held_out import held_out_summary


def test_a_pair_that_has_not_moved_is_a_tie() -> None:
    reference = [{"prompt": str(i), "chosen_logps": -20.0 - i, "rejected_logps": -30.0} for i in range(4)]

    def accuracy(*drifts: tuple[float, float]) -> float:
        policy = [
            {**row, "chosen_logps": row["chosen_logps"] + chosen, "rejected_logps": row["rejected_logps"] + rejected}
            for row, (chosen, rejected) in zip(reference, drifts, strict=True)
        ]
        return float(held_out_summary(policy, reference, resamples=50)["accuracy"]["mean"])

    assert accuracy((4e-6, -4e-6), (0.0, 4e-6), (9e-4, 0.0), (4e-6, 0.0)) == 0.5
    assert accuracy((0.1, -0.1), (0.1, 0.2), (-0.3, -0.4), (0.0, 0.0)) == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert accuracy((2e-3, 0.0), (0.0, -2e-3), (2e-3, 3e-3), (0.5, 0.5)) == pytest.approx((1 + 1 + 0 + 0.5) / 4)
