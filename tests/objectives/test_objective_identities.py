"""Identities that hold exactly, whatever the numbers, and gradients against numeric derivatives."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from plain_objective import pairs_of

from isdaa.objectives import PRESETS, Objective, PairLogps, resolve

pytestmark = pytest.mark.fast

LOSSES, REWARDS = ("logistic", "squared", "hinge"), ("log_ratio", "chi_squared")
WEIGHTS = ("none", "importance", "wpo", "shuffled", "mean")


def rows_of(size: int, seed: int = 0, at_reference: bool = False) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(size, 8, generator=generator, dtype=torch.float64).tolist()
    rows = []
    for a, b, c, d, e, f, g, h in draw:
        rw, rl = -5 - 60 * a, -5 - 60 * b
        pw, pl = (rw, rl) if at_reference else (rw + 3 * c - 1.6, rl + 3 * d - 1.4)
        row = {"rw": rw, "rl": rl, "pw": pw, "pl": pl, "nw": 1 + int(30 * e), "nl": 1 + int(30 * f)}
        rows.append(row | {"aw": g - 0.8, "al": h - 0.8})
    return rows


def output(rows: list[dict], **settings: object) -> torch.Tensor:
    return Objective(**settings)(pairs_of(rows)).losses  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("name", PRESETS)
def test_shapes_and_types(name: str, size: int) -> None:
    for dtype, inside in ((torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)):
        out = Objective(**resolve(name))(pairs_of(rows_of(size), dtype))
        for field, tensor in vars(out).items():
            assert tensor.shape == (size,), field
            assert tensor.dtype == (torch.bool if field == "clipped" else inside), field


def test_half_precision_is_computed_in_fp32() -> None:
    half = pairs_of(rows_of(5), torch.bfloat16)
    single = PairLogps(
        **{k: v.float() if v.is_floating_point() else v for k, v in vars(half).items() if v is not None}  # type: ignore[arg-type]
    )
    objective = Objective(**resolve("is_chi_po"))
    assert torch.equal(objective(half).losses, objective(single).losses)


@pytest.mark.parametrize("name", ["dpo", "cdpo", "is_dpo", "is_cdpo"])
@pytest.mark.parametrize("beta", [0.01, 1.0])
def test_at_the_reference_the_logistic_loss_is_log_2(name: str, beta: float) -> None:
    out = Objective(**resolve(name, beta=beta))(pairs_of(rows_of(4, at_reference=True)))
    assert torch.allclose(out.losses, torch.full((4,), math.log(2), dtype=torch.float64), rtol=1e-15)
    assert torch.equal(out.log_weights, torch.zeros(4, dtype=torch.float64))
    assert torch.equal(out.weights, torch.ones(4, dtype=torch.float64))


def test_at_the_reference_other_losses_by_hand() -> None:
    rows = rows_of(3, at_reference=True)
    assert output(rows, loss="hinge").tolist() == [1.0] * 3
    assert output(rows, loss="squared", beta=0.1).tolist() == pytest.approx([25.0] * 3, rel=1e-15)


@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize("reward, loss, weight", itertools.product(REWARDS, LOSSES, WEIGHTS))
def test_weight_one_gives_the_base_loss(reward: str, loss: str, weight: str, size: int) -> None:
    rows = rows_of(size)
    base = output(rows, implicit_reward=reward, loss=loss, sft_coefficient=0.1)
    objective = Objective(implicit_reward=reward, loss=loss, weight=weight, sft_coefficient=0.1)  # type: ignore[arg-type]
    assert torch.equal(objective(pairs_of(rows), weights=torch.ones(size)).losses, base)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("normalize", [None, "batch"])
def test_on_policy_every_importance_weight_is_one(loss: str, normalize: str | None) -> None:
    """μ = π: the pairs are fresh samples, and the importance-weighted loss is the plain one."""
    rows = [row | {"mw": row["pw"], "ml": row["pl"]} for row in rows_of(6)]
    for weight in ("importance", "shuffled", "mean"):
        weighted = output(rows, loss=loss, weight=weight, normalize=normalize)
        assert torch.allclose(weighted, output(rows, loss=loss), rtol=1e-14, atol=0)


@pytest.mark.parametrize("clip", ["joint", "per_response"])
@pytest.mark.parametrize("weight", ["importance", "shuffled", "mean"])
def test_a_wide_clip_is_no_clip(clip: str, weight: str) -> None:
    rows = [row | {"mw": row["pw"] - 30, "ml": row["pl"] - 25} for row in rows_of(3)] + rows_of_behaviour(4)
    wide = output(rows, weight=weight, clip=clip, clip_eps=1e6)
    assert torch.equal(wide, output(rows, weight=weight, clip=clip, clip_eps=None))
    assert not torch.equal(wide, output(rows, weight=weight, clip=clip, clip_eps=1.0))


def rows_of_behaviour(size: int) -> list[dict]:
    return [row | {"mw": row["rw"] - 0.3, "ml": row["rl"] + 0.2} for row in rows_of(size, seed=1)]


def test_clip_by_hand() -> None:
    row = {"rw": -9.0, "rl": -9.0, "pw": -7.0, "pl": -9.5, "nw": 3, "nl": 4}  # log-ratios 2 and −0.5
    for clip, eps, expected, is_clipped in (
        ("joint", 1.0, math.exp(1.5), False),
        ("per_response", 1.0, math.exp(0.5), True),
        ("joint", 0.25, math.exp(0.5), True),
        ("per_response", 0.25, math.exp(-0.25), True),
        ("joint", 0.0, 1.0, True),
        ("per_response", None, math.exp(1.5), False),
    ):
        out = Objective(weight="importance", clip=clip, clip_eps=eps)(pairs_of([row]))  # type: ignore[arg-type]
        assert out.log_weights.item() == 1.5
        assert out.weights.item() == pytest.approx(expected, rel=1e-15), (clip, eps)
        assert out.clipped.item() is is_clipped, (clip, eps)


def test_no_clip_is_capped_at_40() -> None:
    row = {"rw": -90.0, "rl": -90.0, "pw": -60.0, "pl": -60.0, "nw": 3, "nl": 4}
    for eps in (None, 25.0):
        out = Objective(weight="importance", clip_eps=eps)(pairs_of([row]))
        assert out.log_weights.item() == 60.0
        assert out.weights.item() == pytest.approx(math.exp(40), rel=1e-15)


def test_wpo_by_hand() -> None:
    row = {"rw": -9.0, "rl": -9.0, "pw": -7.0, "pl": -9.5, "nw": 3, "nl": 4, "aw": -0.3, "al": -0.9}
    out = Objective(**resolve("wpo"))(pairs_of([row]))
    assert out.log_weights.item() == pytest.approx(-1.2, rel=1e-15)
    assert out.weights.item() == pytest.approx(math.exp(-0.3) * math.exp(-0.9), rel=1e-14)
    assert out.losses.item() == pytest.approx(math.exp(-1.2) * math.log1p(math.exp(-0.25)), rel=1e-14)
    assert not out.clipped.item()


@pytest.mark.parametrize("name", ["rpo", "r_dpo", "cdpo", "is_dpo"])
def test_a_mitigation_switched_off_is_dpo(name: str) -> None:
    off = {"length_penalty": 0.0, "sft_coefficient": 0.0, "label_smoothing": 0.0, "weight": "none"}
    rows = rows_of(5)
    assert torch.equal(output(rows, **resolve(name, **off)), output(rows, **resolve("dpo")))
    assert not torch.allclose(output(rows, **resolve(name)), output(rows, **resolve("dpo")), rtol=1e-6)


def test_a_wide_max_reward_is_none_and_a_tight_one_stops_the_gradient() -> None:
    pairs = pairs_of(rows_of(5), grad=True)
    chi_po = resolve("chi_po", length_penalty=0.3)
    wide = Objective(**{**chi_po, "max_reward": 1e6})(pairs)
    assert torch.equal(wide.losses, Objective(**chi_po)(pairs).losses)
    tight = Objective(**{**chi_po, "max_reward": 1e-6})(pairs)
    lengths = 0.3 * (pairs.chosen_lengths - pairs.rejected_lengths).double()
    assert torch.all((tight.logits - lengths).abs() <= 2.0001e-6)  # the bound is ±2·R_max, and on β·h alone
    assert torch.all((tight.logits - lengths).abs() >= 1.9999e-6)
    assert not torch.autograd.grad(tight.losses.sum(), pairs.policy_chosen_logps)[0].any()


def test_length_normalisation_touches_the_margin_alone() -> None:
    rows = rows_of(5)
    settings = resolve("is_rpo")
    plain = Objective(**settings)(pairs_of(rows))
    divided = Objective(**{**settings, "length_normalized": True})(pairs_of(rows))
    assert torch.equal(plain.weights, divided.weights)
    sft = -0.1 * 0.005 * torch.tensor([row["pw"] for row in rows], dtype=torch.float64)
    for out in (plain, divided):
        assert torch.allclose(out.losses - out.weights * out.unweighted_losses, sft, rtol=1e-10)
    by_hand = [0.1 * ((r["pw"] - r["rw"]) / r["nw"] - (r["pl"] - r["rl"]) / r["nl"]) for r in rows]
    assert divided.logits.tolist() == pytest.approx(by_hand, rel=1e-12)


def test_the_margin_uses_the_reference_and_the_weight_the_behaviour() -> None:
    rows = rows_of_behaviour(5)
    objective = Objective(**resolve("is_dpo", clip_eps=None))
    out, without = (
        objective(pairs_of(rows)),
        objective(pairs_of([{k: r[k] for k in r if k not in ("mw", "ml")} for r in rows])),
    )
    assert torch.equal(out.logits, without.logits)
    by_hand = [r["pw"] - r["mw"] + r["pl"] - r["ml"] for r in rows]
    assert out.log_weights.tolist() == pytest.approx(by_hand, rel=1e-12)
    assert without.log_weights.tolist() == pytest.approx([r["pw"] - r["rw"] + r["pl"] - r["rl"] for r in rows], rel=1e-12)


@pytest.mark.parametrize("reward, loss, weight", itertools.product(REWARDS, LOSSES, WEIGHTS))
@pytest.mark.parametrize("length_normalized", [False, True])
def test_gradients_against_numeric_derivatives(reward: str, loss: str, weight: str, length_normalized: bool) -> None:
    rows = rows_of(4)
    objective = Objective(
        implicit_reward=reward,  # type: ignore[arg-type]
        loss=loss,  # type: ignore[arg-type]
        weight=weight,  # type: ignore[arg-type]
        beta=0.5,
        length_penalty=0.02,
        sft_coefficient=0.1,
        label_smoothing=0.1 if loss == "logistic" else 0.0,
        length_normalized=length_normalized,
    )
    pairs = pairs_of(rows, grad=True)
    out = objective(pairs)
    frozen = out.weights

    def losses(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return objective(replace(pairs, policy_chosen_logps=chosen, policy_rejected_logps=rejected), weights=frozen).losses

    logps = (pairs.policy_chosen_logps, pairs.policy_rejected_logps)
    assert torch.autograd.gradcheck(losses, logps, eps=1e-6, atol=1e-7, rtol=1e-6)
    live = torch.autograd.grad(out.losses.sum(), logps)
    fixed = torch.autograd.grad(losses(*logps).sum(), logps)
    assert all(torch.equal(a, b) for a, b in zip(live, fixed, strict=True))


ENUMERATED = [(reward, loss, 0.0) for reward in REWARDS for loss in LOSSES] + [("log_ratio", "logistic", 0.2)]


@pytest.mark.parametrize("reward, loss, smoothing", ENUMERATED)
@pytest.mark.parametrize("length_penalty", [0.0, 0.05])
def test_the_weighted_gradient_is_the_on_policy_gradient(reward: str, loss: str, smoothing: float, length_penalty: float) -> None:
    """E_{y~μ}[w ∇ℓ] = E_{y~π}[∇ℓ] exactly, over every pair of a softmax over five responses, with noisy labels."""
    generator = torch.Generator().manual_seed(3)
    theta = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()
    behaviour, reference = torch.randn(2, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    utility = torch.randn(5, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([1, 4, 2, 9, 6])
    chosen, rejected = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    label = torch.sigmoid(utility[chosen] - utility[rejected])  # probability that the pair is labelled this way round
    settings = {"implicit_reward": reward, "loss": loss, "label_smoothing": smoothing, "beta": 0.7}
    settings["length_penalty"] = length_penalty

    def gradient(sampler: torch.Tensor, **weighting: object) -> torch.Tensor:
        policy = theta.log_softmax(-1)
        pairs = PairLogps(
            policy[chosen],
            policy[rejected],
            reference[chosen],
            reference[rejected],
            lengths[chosen],
            lengths[rejected],
            behaviour[chosen],
            behaviour[rejected],
        )
        probability = (sampler[chosen] + sampler[rejected]).exp() * label * 2  # either order of the draw
        out = Objective(**settings, **weighting)(pairs)  # type: ignore[arg-type]
        return torch.autograd.grad((probability.detach() * out.losses).sum(), theta)[0]

    on_policy = gradient(theta.log_softmax(-1))
    for clip in ("joint", "per_response"):
        weighted = gradient(behaviour, weight="importance", clip_eps=None, clip=clip)
        assert torch.allclose(weighted, on_policy, rtol=1e-11, atol=1e-13)
    assert on_policy.norm() > 1e-2
    assert not torch.allclose(gradient(behaviour), on_policy, rtol=1e-2, atol=1e-3)
    assert not torch.allclose(gradient(behaviour, weight="importance", clip_eps=0.1), on_policy, rtol=1e-2, atol=1e-3)
