"""The demo on enumerated problems: the identity, and what a clip does to bias and noise."""

import json
from pathlib import Path

import finite
import pytest
import torch
from finite import (
    EPSILONS,
    PRESETS,
    average,
    compared,
    distinct,
    drawn_batches,
    enumerate_pairs,
    equals,
    mean_gradient,
    normalised,
    problems,
    rmse,
    run_finite,
    variance,
)

from isdaa.errors import UserError
from isdaa.objectives import Objective, PairLogps, resolve

DRAWN_PICTURES = True
CLIPS = ("joint", "per_response")


def settings_of(preset: str, **changes: object) -> dict:
    return resolve(preset, beta=0.5, **changes)


@pytest.mark.parametrize("preset", PRESETS)
def test_without_a_clip_the_weighted_gradient_is_the_on_policy_one(preset: str) -> None:
    problem = problems(20, seed=1)
    fresh = mean_gradient(enumerate_pairs(problem, problem.policy, **settings_of(preset)))
    for clip in CLIPS:
        rows = enumerate_pairs(problem, problem.behaviour, **settings_of(preset, weight="importance", clip_eps=None, clip=clip))
        assert torch.allclose(mean_gradient(rows), fresh, rtol=1e-10, atol=1e-12)
        assert torch.allclose(average(rows, rows.weights), torch.ones(20, dtype=torch.float64), rtol=1e-12)
    plain = mean_gradient(enumerate_pairs(problem, problem.behaviour, **settings_of(preset)))
    assert ((plain - fresh).norm(dim=-1) / fresh.norm(dim=-1)).min() > 0.1


def test_probabilities_sum_to_one_and_gradients_are_those_of_the_logits() -> None:
    """The rows' gradients by hand against autograd through the softmax, for a loss that weights nothing."""
    problem = problems(1, seed=2)
    rows = enumerate_pairs(problem, problem.behaviour, **settings_of("dpo"))
    assert rows.probabilities.sum(-1).item() == pytest.approx(1, rel=1e-14)
    logits = problem.policy.clone().requires_grad_()
    policy = logits.log_softmax(-1)[0]
    prompt, chosen, rejected = torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(6)).T
    lengths = torch.ones_like(prompt)
    pairs = PairLogps(
        policy[prompt, chosen],
        policy[prompt, rejected],
        problem.reference[0, prompt, chosen],
        problem.reference[0, prompt, rejected],
        lengths,
        lengths,
    )
    losses = Objective(**settings_of("dpo"))(pairs).losses
    for row in (0, 7, 40, 71):
        expected = torch.autograd.grad(losses[row], logits, retain_graph=True)[0].reshape(-1)
        assert torch.allclose(rows.gradients[0, row], expected, rtol=1e-12, atol=1e-15)
    total = torch.autograd.grad((rows.probabilities[0] * losses).sum(), logits)[0].reshape(-1)
    assert torch.allclose(mean_gradient(rows)[0], total, rtol=1e-12, atol=1e-15)


def test_variance_is_that_of_drawn_pairs() -> None:
    rows = enumerate_pairs(problems(1, seed=0), problems(1, seed=0).behaviour, **settings_of("ipo"))
    drawn = torch.multinomial(rows.probabilities[0], 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    assert rows.gradients[0, drawn].var(0).sum().item() == pytest.approx(variance(rows).item(), rel=0.02)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("clip", CLIPS)
def test_a_wider_clip_has_less_bias_and_more_noise(preset: str, clip: str) -> None:
    """On 50 problems: in nearly all at each step (the norm of a bias need not fall), in the median always; 0 without a clip."""
    problem = problems(50, seed=0)
    target = mean_gradient(enumerate_pairs(problem, problem.policy, **settings_of(preset)))
    swept = [
        enumerate_pairs(problem, problem.behaviour, **settings_of(preset, weight="importance", clip_eps=eps, clip=clip))
        for eps in EPSILONS
    ]
    errors = [compared(rows, target) for rows in swept]
    bias, noise = (torch.stack([e[key] for e in errors]) for key in ("bias", "noise"))
    assert (bias.diff(dim=0) <= 1e-12).all(0).sum() >= 48
    assert (bias.median(-1).values.diff() <= 1e-12).all()
    assert bias[0].median() > 0.3 and bias[-1].max() < 1e-12
    assert (noise.diff(dim=0) >= -1e-12).all(0).sum() >= 48
    assert (noise[-1] > noise[0]).all()
    weights = torch.stack([rows.weights for rows in swept])
    second = torch.stack([average(rows, rows.gradients.square().sum(-1)) for rows in swept])
    assert (weights.diff(dim=0) >= 0).all() and (second.diff(dim=0) >= 0).all()  # these hold for every problem


def test_rmse_joins_bias_and_noise() -> None:
    errors = {"bias": torch.tensor([0.3]), "noise": torch.tensor([4.0])}
    assert rmse(errors, 100).item() == pytest.approx(0.5)


def test_the_normalised_gradient_is_that_of_the_objective() -> None:
    problem = problems(1, seed=4)
    rows = enumerate_pairs(problem, problem.behaviour, **settings_of("dpo", weight="importance"))
    occurrences = drawn_batches(rows, 32, 1, seed=5)
    drawn = torch.repeat_interleave(torch.arange(72), occurrences[0, 0].long())
    prompt, chosen, rejected = (
        index[drawn] for index in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(6)).T
    )
    logits = problem.policy.clone().requires_grad_()
    policy = logits.log_softmax(-1)[0]
    lengths = torch.ones_like(prompt)
    named = [policy, problem.reference[0], problem.behaviour[0]]
    six = [logps[prompt, response] for logps in named for response in (chosen, rejected)]
    pairs = PairLogps(*six[:4], lengths, lengths, *six[4:])
    objective = Objective(**settings_of("dpo", weight="importance", normalize="batch"))
    gradient = torch.autograd.grad(objective(pairs).losses.mean(), logits)[0].reshape(-1)
    estimate = (occurrences @ rows.gradients)[0, 0] / (occurrences @ rows.weights[..., None])[0, 0]
    assert torch.allclose(estimate, gradient, rtol=1e-12, atol=1e-15)


def test_the_normalised_weight_is_biased_but_less_with_more_pairs() -> None:
    problem = problems(10, seed=0)
    target = mean_gradient(distinct(enumerate_pairs(problem, problem.policy, **settings_of("dpo"))))
    rows = distinct(enumerate_pairs(problem, problem.behaviour, **settings_of("dpo", weight="importance", clip_eps=None)))
    few, many = (normalised(rows, drawn_batches(rows, n, 2000, seed=0), target, n) for n in (8, 512))
    assert few["bias"].median() > 5 * few["bias_error"].median()
    assert many["bias"].median() < 0.5 * few["bias"].median()


def test_dropping_pairs_of_equals_changes_the_scale_of_the_weighted_gradient_alone() -> None:
    """A pair of equals has no gradient: without it each mean is the whole one over the share of the others."""
    problem = problems(10, seed=0)
    fresh = enumerate_pairs(problem, problem.policy, **settings_of("dpo"))
    rows = enumerate_pairs(problem, problem.behaviour, **settings_of("dpo", weight="importance", clip_eps=None))
    assert (fresh.gradients * equals(fresh)[:, None]).abs().max() == 0
    for some in (fresh, rows):
        share = 1 - average(some, equals(some).expand_as(some.probabilities))
        assert torch.allclose(mean_gradient(distinct(some)) * share[:, None], mean_gradient(some), rtol=1e-12, atol=1e-15)
    assert torch.allclose(compared(distinct(rows), mean_gradient(distinct(fresh)))["cosine"], torch.ones(10, dtype=torch.float64))


def test_the_demo_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(finite, "PROBLEMS", 10)
    monkeypatch.setattr(finite, "BATCHES", 100)
    chart = run_finite(tmp_path / "new", seed=2)
    assert sorted(path.name for path in chart.parent.iterdir()) == ["finite.json", "finite.png", "finite.svg"]
    assert chart.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    results = json.loads((chart.parent / "finite.json").read_text())
    assert list(results["presets"]) == list(PRESETS)
    for found in results["presets"].values():
        assert max(found["identity"].values()) < 1e-12
        assert [row["eps"] for row in found["weights"]["joint"]["rows"]] == list(EPSILONS)
        assert sum(found["weights"]["joint"]["best_eps"]["128"].values()) == 10
    printed = capsys.readouterr().out
    assert "is the on-policy gradient" in printed
    assert max(map(len, printed.splitlines())) <= 130


@pytest.mark.parametrize("seed", [-1, "one"])
def test_a_bad_seed_is_one_line(tmp_path: Path, seed: object) -> None:
    with pytest.raises(UserError, match=r"^--seed: "):
        run_finite(tmp_path, seed)  # type: ignore[arg-type]
