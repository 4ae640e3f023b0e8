"""Losses and gradients stay finite in fp32 and bf16 for log-ratios up to ±1e4, for every composition."""

import itertools

import pytest
import torch

from isdaa.objectives import Objective, PairLogps
from isdaa.objectives.implicit_reward import chi_squared
from isdaa.objectives.weights import weight_metrics

pytestmark = pytest.mark.fast

RATIOS = (-1e4, -89.0, -88.0, -1.0, 0.0, 19.0, 20.0, 21.0, 39.0, 1e4)
VARIANTS = list(itertools.product(("log_ratio", "chi_squared"), ("logistic", "squared", "hinge")))
WEIGHTS = [
    ("none", {}),
    ("wpo", {}),
    ("importance", {"clip_eps": None}),
    ("importance", {"clip_eps": 1e4}),
    ("importance", {"clip_eps": 1e4, "clip": "per_response"}),
    ("importance", {"clip_eps": 1.0}),
    ("importance", {"clip_eps": 1.0, "clip": "per_response"}),
    ("shuffled", {"clip_eps": None}),
    ("mean", {"clip_eps": None}),
]


def extreme_pairs(dtype: torch.dtype) -> PairLogps:
    """Every pair of extreme log-ratios, by a policy, a reference and a behaviour policy that go far below 0."""
    chosen, rejected = torch.cartesian_prod(torch.tensor(RATIOS), torch.tensor(RATIOS)).T
    base = torch.full_like(chosen, -1e4)
    return PairLogps(
        policy_chosen_logps=(base + chosen).to(dtype).requires_grad_(),
        policy_rejected_logps=(base + rejected).to(dtype).requires_grad_(),
        reference_chosen_logps=base.to(dtype),
        reference_rejected_logps=base.to(dtype),
        chosen_lengths=torch.full_like(chosen, 2000).long(),
        rejected_lengths=torch.ones_like(chosen).long(),
        behaviour_chosen_logps=(base - chosen.flip(0)).to(dtype),
        behaviour_rejected_logps=(base - rejected).to(dtype),
        policy_chosen_wpo=chosen.to(dtype),
        policy_rejected_wpo=rejected.to(dtype),
    )


def assert_finite(pairs: PairLogps, **settings: object) -> None:
    out = Objective(**settings)(pairs)  # type: ignore[arg-type]
    grads = torch.autograd.grad(out.losses.mean(), [pairs.policy_chosen_logps, pairs.policy_rejected_logps])
    assert torch.isfinite(torch.stack([*vars(out).values(), *grads])).all(), (out, grads, settings)


def assert_metrics_finite(pairs: PairLogps, **settings: object) -> None:
    out = Objective(**settings)(pairs)  # type: ignore[arg-type]
    metrics = weight_metrics(out.log_weights, out.weights, out.clipped)
    assert torch.isfinite(torch.tensor(list(metrics.values()))).all(), (metrics, settings)
    assert 0 <= metrics["weights/ess"] <= 1 + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight, clip", WEIGHTS, ids=str)
def test_every_composition_stays_finite(dtype: torch.dtype, weight: str, clip: dict) -> None:
    pairs = extreme_pairs(dtype)
    for reward, loss in VARIANTS:
        options = itertools.product(
            (0.001, 1.0),
            (None, "batch") if weight != "none" else (None,),
            (False, True),
            (0.3,) if loss == "logistic" else (0.0,),  # both of its terms
            (None, 10.0) if reward == "chi_squared" else (None,),
            (0.0, 0.01),
        )
        for beta, normalize, length_normalized, smoothing, max_reward, length_penalty in options:
            assert_finite(
                pairs,
                implicit_reward=reward,
                loss=loss,
                beta=beta,
                weight=weight,
                normalize=normalize,
                length_penalty=length_penalty,
                sft_coefficient=100 * length_penalty,
                label_smoothing=smoothing,
                length_normalized=length_normalized,
                max_reward=max_reward,
                **clip,
            )
    for normalize in (None, "batch") if weight != "none" else (None,):
        assert_metrics_finite(pairs, weight=weight, normalize=normalize, **clip)


def test_the_pairs_are_as_extreme_as_they_claim() -> None:
    pairs = extreme_pairs(torch.float32)
    delta = (pairs.policy_chosen_logps - pairs.reference_chosen_logps).detach()
    assert delta.max() == 1e4 and delta.min() == -1e4
    out = Objective(weight="importance", clip_eps=None)(pairs)
    assert out.log_weights.max() > 1e4 and out.log_weights.min() < -1e4
    assert (out.weights == 0).any() and (out.weights > 1e17).any()


@pytest.mark.parametrize(
    "delta, slope",
    [(-1e4, 1.0), (-88.5, 1.0), (0.0, 2.0), (1.0, 1 + 2.718281828459045), (20.5, 1.0), (1e4, 1.0)],
)
def test_chi_squared_outside_the_clamp_only_the_log_part_has_a_gradient(delta: float, slope: float) -> None:
    x = torch.tensor([delta], dtype=torch.float64, requires_grad=True)
    chi_squared(x).backward()
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(slope, rel=1e-15)
