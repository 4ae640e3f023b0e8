"""The steps that span a global batch, the effective sample size, and what is logged about weights."""

import hashlib
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_objective import batches, pairs_of

from isdaa.objectives import Objective, batch_weights, effective_sample_size, resolve, weight_metrics
from isdaa.objectives.weights import importance_weights, permutation, wpo_weights

pytestmark = pytest.mark.fast

BATCHES = st.lists(st.floats(0, 50, width=32), min_size=1, max_size=12)
QUICK = settings(max_examples=80, deadline=None, derandomize=True)


def tensor(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    "weights, expected",
    [
        ([1.0], 1.0),
        ([3.0, 3.0, 3.0], 1.0),
        ([1.0, 0.0], 0.5),
        ([1.0, 0.0, 0.0, 0.0], 0.25),
        ([1.0, 3.0], 16 / 20),
        ([1.0, 2.0, 3.0], 36 / 42),
        ([0.0, 0.0], 0.0),
        ([0.0], 0.0),
        ([1e-300, 3e-300], 0.8),
    ],
)
def test_effective_sample_size_by_hand(weights: list[float], expected: float) -> None:
    assert effective_sample_size(tensor(weights)).item() == pytest.approx(expected, rel=1e-14)


def test_effective_sample_size_of_extreme_fp32_weights_and_of_fill_in_pairs() -> None:
    for scale in (1e-38, 1e30):
        assert effective_sample_size(torch.tensor([scale, 3 * scale])).item() == pytest.approx(0.8, rel=1e-5)
    assert effective_sample_size(torch.tensor([1, 3], dtype=torch.bfloat16)).dtype == torch.float32
    valid = torch.tensor([True, False, True])
    assert effective_sample_size(tensor([1.0, 9.0, 3.0]), valid).item() == pytest.approx(0.8)
    assert effective_sample_size(tensor([1.0, 9.0]), torch.tensor([False, False])).item() == 0.0


@QUICK
@given(BATCHES, st.floats(0.001, 1000))
def test_effective_sample_size_ignores_scale_and_lies_in_its_range(weights: list[float], scale: float) -> None:
    ess = effective_sample_size(tensor(weights)).item()
    assert effective_sample_size(tensor(weights) * scale).item() == pytest.approx(ess, rel=1e-9)
    assert ess == 0 if not any(weights) else 1 / len(weights) - 1e-9 <= ess <= 1 + 1e-9


@QUICK
@given(BATCHES, st.integers(-(2**70), 2**70), st.integers(0, 2**40), st.integers(0, 2**32))
def test_shuffled_keeps_the_multiset_and_depends_on_seed_and_step_alone(
    weights: list[float], seed: int, step: int, noise: int
) -> None:
    state = torch.random.get_rng_state()
    shuffled = batch_weights(tensor(weights), "shuffled", None, seed, step)
    assert torch.equal(state, torch.random.get_rng_state())  # it moves no global generator …
    torch.manual_seed(noise)
    random.seed(noise)
    assert torch.equal(shuffled, batch_weights(tensor(weights), "shuffled", None, seed, step))  # … and reads none
    assert sorted(shuffled.tolist()) == sorted(tensor(weights).tolist())


def test_permutations_differ_between_seeds_and_steps() -> None:
    seen = {tuple(permutation(20, seed, step).tolist()) for seed in range(12) for step in range(12)}
    assert len(seen) == 144
    assert sorted(permutation(20, 0, 0).tolist()) == list(range(20))
    assert permutation(20, 1, 2).tolist() != permutation(20, 2, 1).tolist()
    counts = torch.stack([permutation(4, 7, step) for step in range(2000)])
    for place in range(4):  # every weight reaches every place equally often: 500 ± 5 standard deviations
        assert all(abs((counts[:, place] == value).sum().item() - 500) < 100 for value in range(4))


def test_the_permutation_does_not_change_between_versions() -> None:
    """A resumed run must meet the permutation it would have met: the seed of the generator is pinned."""
    state = int.from_bytes(hashlib.sha256(b"3,5").digest()[:8], "little")
    expected = torch.randperm(9, generator=torch.Generator().manual_seed(state))
    assert torch.equal(permutation(9, 3, 5), expected)


@QUICK
@given(BATCHES, st.data())
def test_fill_in_pairs_count_nothing(weights: list[float], data: st.DataObject) -> None:
    """Any mode with fill-in pairs gives the others what they have without them, and the fill-in pairs 0."""
    valid = data.draw(st.lists(st.booleans(), min_size=len(weights), max_size=len(weights)))
    mask = torch.tensor(valid)
    for mode in ("none", "importance", "wpo", "shuffled", "mean"):
        for normalize in (None, "batch") if mode != "none" else (None,):
            out = batch_weights(tensor(weights), mode, normalize, 1, 2, mask)
            assert torch.equal(out[~mask], torch.zeros_like(out[~mask]))
            kept = [w for w, v in zip(weights, valid, strict=True) if v]
            if kept:
                alone = batch_weights(tensor(kept), mode, normalize, 1, 2)
                assert torch.equal(out[mask], alone)


def test_mean_and_normalisation_by_hand() -> None:
    weights = tensor([1.0, 2.0, 6.0])
    assert batch_weights(weights, "mean").tolist() == [3.0, 3.0, 3.0]
    assert batch_weights(weights, "importance").tolist() == [1.0, 2.0, 6.0]
    assert batch_weights(weights, "wpo", "batch").tolist() == pytest.approx([1 / 3, 2 / 3, 2.0], rel=1e-15)
    assert batch_weights(weights, "mean", "batch").tolist() == pytest.approx([1.0] * 3, rel=1e-15)
    assert sorted(batch_weights(weights, "shuffled", "batch").tolist()) == pytest.approx([1 / 3, 2 / 3, 2.0])
    assert batch_weights(tensor([0.0, 0.0]), "importance", "batch").tolist() == [0.0, 0.0]
    tiny = torch.tensor([1e-45] + [0.0] * 511)  # its plain fp32 mean is 0
    assert batch_weights(tiny, "importance", "batch").tolist() == [512.0] + [0.0] * 511


@QUICK
@given(batches(max_size=4), st.sampled_from(["importance", "shuffled", "mean", "wpo"]), st.booleans())
def test_a_call_takes_its_own_pairs_for_the_global_batch(rows: list, weight: str, normalized: bool) -> None:
    objective = Objective(weight=weight, normalize="batch" if normalized else None)  # type: ignore[arg-type]
    pairs = pairs_of(rows)
    log_weights, raw = objective.raw_weights(pairs)
    final = batch_weights(raw, objective.weight, objective.normalize, 3, 4)
    out = objective(pairs, seed=3, step=4)
    assert torch.equal(out.weights, final)
    assert torch.equal(out.log_weights, log_weights)
    assert torch.equal(objective(pairs, weights=final).losses, out.losses)


def test_given_weights_are_used_as_they_are_and_without_gradient() -> None:
    rows = [{"rw": -3.0, "rl": -4.0, "pw": -2.5, "pl": -4.5, "nw": 2, "nl": 3}] * 3
    given_weights = torch.tensor([0.0, 1.0, 100.0], requires_grad=True)
    objective = Objective(**resolve("is_rpo", normalize="batch", clip_eps=0.1))
    out = objective(pairs_of(rows, grad=True), weights=given_weights)
    assert out.weights.tolist() == [0.0, 1.0, 100.0]
    assert out.log_weights.tolist() == pytest.approx([0.0] * 3, abs=1e-15)
    assert torch.equal(out.losses, out.weights * out.unweighted_losses - 0.1 * 0.005 * pairs_of(rows).policy_chosen_logps)
    assert not out.weights.requires_grad


def test_no_weight_carries_a_gradient() -> None:
    ratios = [torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)]
    found = [*importance_weights(*ratios, "joint", 1.0), *wpo_weights(*ratios), effective_sample_size(ratios[0].exp())]
    found += [batch_weights(ratios[0].exp(), mode) for mode in ("importance", "shuffled", "mean")]
    assert not any(tensor.requires_grad for tensor in found)
    with pytest.raises(ValueError, match=r'clip must be "joint" or "per_response".*did you mean "joint"'):
        importance_weights(*ratios, "jiont", 1.0)


def test_invalid_pairs_have_no_loss_no_gradient_and_no_say() -> None:
    rows = [{"rw": -3.0 - i, "rl": -4.0, "pw": -2.5, "pl": -4.5 + i, "nw": 2, "nl": 3} for i in range(4)]
    valid = torch.tensor([True, False, True, False])
    for name, normalize in (("is_rpo", "batch"), ("rpo", None), ("is_rpo", None)):
        objective = Objective(**resolve(name, normalize=normalize))
        pairs = pairs_of(rows, grad=True)
        out = objective(pairs, valid=valid)
        alone = objective(pairs_of([rows[0], rows[2]]))
        assert torch.equal(out.losses[valid], alone.losses)
        assert out.losses[~valid].tolist() == [0.0, 0.0] and out.weights[~valid].tolist() == [0.0, 0.0]
        out.losses.sum().backward()
        assert pairs.policy_chosen_logps.grad is not None
        assert pairs.policy_chosen_logps.grad[~valid].tolist() == [0.0, 0.0]


def test_metrics_by_hand() -> None:
    log_weights = tensor([-3.0, -1.0, 0.0, 1.0, 3.0])
    weights = log_weights.clamp(max=2.0).exp()
    metrics = weight_metrics(log_weights, weights, log_weights > 2)
    assert list(metrics) == [
        "weights/log_weight_mean",
        *(f"weights/log_weight_p{p}" for p in ("05", "25", "50", "75", "95")),
        "weights/clip_fraction",
        "weights/mean",
        "weights/max",
        "weights/ess",
        "weights/capped",
    ]
    assert all(type(value) is float for value in metrics.values())
    total, squares = math.fsum(weights.tolist()), math.fsum((weights**2).tolist())
    assert metrics["weights/log_weight_mean"] == 0.0
    assert metrics["weights/log_weight_p05"] == pytest.approx(-2.6)
    assert metrics["weights/log_weight_p25"] == -1.0
    assert metrics["weights/log_weight_p50"] == 0.0
    assert metrics["weights/log_weight_p95"] == pytest.approx(2.6)
    assert metrics["weights/clip_fraction"] == pytest.approx(0.2)
    assert metrics["weights/mean"] == pytest.approx(total / 5)
    assert metrics["weights/max"] == pytest.approx(math.exp(2))
    assert metrics["weights/ess"] == pytest.approx(total**2 / (5 * squares))
    assert metrics["weights/capped"] == 0.0


def test_metrics_count_the_capped_pairs_and_leave_the_invalid_ones_out() -> None:
    rows = [{"rw": -90.0, "rl": -90.0, "pw": -90.0 + x, "pl": -90.0, "nw": 2, "nl": 3} for x in (0.0, 41.0, 50.0, 80.0)]
    for eps, capped, clip_fraction in ((None, 3.0, 0.0), (1.0, 0.0, 0.75), (30.0, 2.0, 0.25)):
        out = Objective(**resolve("is_dpo", clip_eps=eps))(pairs_of(rows))
        metrics = weight_metrics(out.log_weights, out.weights, out.clipped)
        assert (metrics["weights/capped"], metrics["weights/clip_fraction"]) == (capped, clip_fraction), eps
        assert metrics["weights/max"] <= math.exp(40) * (1 + 1e-12)
    valid = torch.tensor([True, True, False, False])
    some = weight_metrics(out.log_weights, out.weights, out.clipped, valid)
    assert some == weight_metrics(out.log_weights[:2], out.weights[:2], out.clipped[:2])


def test_half_precision_metrics_do_not_lose_digits() -> None:
    half = torch.full((1000,), 0.25, dtype=torch.bfloat16)
    metrics = weight_metrics(half.log(), half, torch.zeros(1000, dtype=torch.bool))
    assert metrics["weights/mean"] == 0.25 and metrics["weights/ess"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: batch_weights(torch.ones(2, 2), "mean"), r"weights must have shape \(B,\)"),
        (lambda: batch_weights(torch.ones(2), "shufled"), 'did you mean "shuffled"'),
        (lambda: batch_weights(torch.ones(2), "mean", "bacth"), 'did you mean "batch"'),
        (lambda: batch_weights(torch.ones(2), "none", "batch"), "needs a weight"),
        (lambda: batch_weights(torch.ones(2), "mean", valid=torch.ones(3, dtype=torch.bool)), "valid must be bool"),
        (lambda: batch_weights(torch.ones(2), "mean", valid=torch.ones(2)), "valid must be bool"),
        (lambda: effective_sample_size(torch.tensor(1.0)), "shape"),
        (lambda: weight_metrics(torch.ones(3), torch.ones(2), torch.ones(2)), "log_weights"),
        (lambda: weight_metrics(torch.ones(2), torch.ones(2), torch.ones(3)), "clipped"),
        (lambda: weight_metrics(torch.ones(0), torch.ones(0), torch.ones(0)), "at least one valid pair"),
    ],
)
def test_bad_arguments(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
