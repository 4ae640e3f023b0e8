"""Random compositions on random batches, against the plain-Python objective with derivatives worked by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_objective import batches, compositions, pairs_of, plain

from isdaa.objectives import Objective
from isdaa.objectives.weights import permutation

pytestmark = pytest.mark.fast

EXAMPLES = settings(max_examples=120, deadline=None, derandomize=True)


def assert_close(found: torch.Tensor, expected: list[float], slack: list[float], name: str) -> None:
    # slack: rounding of e^Δ that a difference of two rewards lays bare; 0 where nothing cancels.
    for value, wanted, room in zip(found.tolist(), expected, slack, strict=True):
        assert math.isclose(value, wanted, rel_tol=1e-9, abs_tol=1e-12 * room), (name, value, wanted)


@EXAMPLES
@given(compositions(), batches(), st.integers(0, 2**40), st.integers(0, 10_000))
def test_every_output_and_gradient(s: dict, rows: list, seed: int, step: int) -> None:
    pairs = pairs_of(rows, grad=True)
    out = Objective(**s)(pairs, seed=seed, step=step)
    out.losses.sum().backward()
    expected = plain(rows, s, permutation(len(rows), seed, step).tolist())
    for name in (
        "logits",
        "unweighted_losses",
        "weights",
        "log_weights",
        "losses",
        "chosen_rewards",
        "rejected_rewards",
    ):
        slack = [(1 + e["weights"]) * (1 + 1 / s["beta"]) * e["size"] ** 2 for e in expected]
        assert_close(getattr(out, name), [e[name] for e in expected], slack, name)
        assert getattr(out, name).shape == (len(rows),)
    for grad, name in ((pairs.policy_chosen_logps.grad, "grad_w"), (pairs.policy_rejected_logps.grad, "grad_l")):
        slack = [(1 + e["weights"]) * (1 + 1 / s["beta"]) * e["size"] ** 2 for e in expected]
        assert grad is not None
        assert_close(grad, [e[name] for e in expected], slack, name)


@EXAMPLES
@given(compositions(), batches(), st.data())
def test_composition_of_the_batch_changes_nothing(s: dict, rows: list, data: st.DataObject) -> None:
    """A pair's outputs do not depend on its neighbours, given the weights of the global batch."""
    objective = Objective(**s)
    whole = objective(pairs_of(rows), seed=1, step=2)
    cut = data.draw(st.integers(0, len(rows) - 1))
    for part in (slice(0, cut), slice(cut, None)):
        if rows[part]:
            out = objective(pairs_of(rows[part]), weights=whole.weights[part])
            for name in ("losses", "logits", "log_weights", "weights", "clipped"):
                assert torch.equal(getattr(out, name), getattr(whole, name)[part]), name
            if not objective.needs_batch:
                assert torch.equal(objective(pairs_of(rows[part])).losses, whole.losses[part])


@EXAMPLES
@given(compositions(), batches())
def test_no_gradient_through_what_is_constant(s: dict, rows: list) -> None:
    pairs = pairs_of(rows, grad=True)
    objective = Objective(**s)
    out = objective(pairs)
    for name in ("weights", "log_weights", "clipped", "chosen_rewards", "rejected_rewards"):
        assert not getattr(out, name).requires_grad, name
    assert all(not tensor.requires_grad for tensor in objective.raw_weights(pairs))
    # The same gradient with the weights frozen beforehand: nothing flows through them.
    grads = torch.autograd.grad(out.losses.sum(), [pairs.policy_chosen_logps, pairs.policy_rejected_logps])
    frozen = objective(pairs, weights=out.weights).losses.sum()
    again = torch.autograd.grad(frozen, [pairs.policy_chosen_logps, pairs.policy_rejected_logps])
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
