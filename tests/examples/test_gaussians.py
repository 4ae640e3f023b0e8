"""The demo of the Gaussians: its gradients, and where the fits end."""

import json
import math
from pathlib import Path

import gaussians
import pytest
import torch
from gaussians import (
    CLIP_EPS,
    DATA_SPREAD,
    HEAVY,
    MODES,
    SPREAD,
    Runs,
    exact_off_policy,
    exact_on_policy,
    fit,
    gradients,
    grid,
    kl_to_target,
    normal_logp,
    pair_weights,
    place,
    run_gaussians,
    target_logp,
)

from isdaa.errors import UserError

DRAWN_PICTURES = True
DOUBLE = torch.float64


def from_data(count: int) -> Runs:
    return Runs(*(torch.full((count,), value, dtype=DOUBLE) for value in (0.0, DATA_SPREAD, HEAVY)))


def test_the_target_is_a_density_with_its_two_modes() -> None:
    y, heavy = grid(), torch.tensor(HEAVY, dtype=DOUBLE)
    density = target_logp(y, heavy).exp()
    assert (density.sum() * (y[1] - y[0])).item() == pytest.approx(1, abs=1e-9)
    for mode, weight in zip(MODES, (HEAVY, 1 - HEAVY), strict=True):
        peak = density[(y - mode).abs().argmin()].item()
        assert peak == pytest.approx(weight / (SPREAD * math.sqrt(2 * math.pi)), rel=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_by_hand_are_those_of_autograd(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(3, 5, 2, generator=generator, dtype=DOUBLE)
    weights = torch.rand(3, 5, generator=generator, dtype=DOUBLE) if weighted else None
    targets = target_logp(y, torch.tensor(HEAVY, dtype=DOUBLE))
    at = torch.randn(2, 3, generator=generator, dtype=DOUBLE).requires_grad_()
    gap = normal_logp(y, at[0, :, None, None], at[1, :, None, None].exp()) - targets
    losses = (gap[..., 0] - gap[..., 1]) ** 2
    losses = losses * weights if weights is not None else losses
    expected = torch.autograd.grad(losses.mean(-1).sum(), at)[0]
    assert torch.allclose(gradients(y, at.detach(), targets, weights), expected, rtol=1e-12, atol=1e-12)


def every_pair(at: torch.Tensor, sampler: torch.Tensor, clip_eps: float | None, weighted: bool) -> torch.Tensor:
    """E[w ∇ℓ] over all pairs of a grid of 121 points drawn from `sampler` (Y,) log-densities: a sum, not a sample."""
    y = grid()[::20]
    step = y[1] - y[0]
    first, second = torch.cartesian_prod(torch.arange(len(y)), torch.arange(len(y))).T
    pairs = torch.stack([y[first], y[second]], dim=-1)[None]
    weights = (sampler[first] + sampler[second]).exp()[None] * step**2 * len(first)  # `gradients` divides by their number
    if weighted:
        logps = normal_logp(pairs, at[0, :, None, None], at[1, :, None, None].exp())
        data = normal_logp(pairs, torch.zeros((), dtype=DOUBLE), torch.tensor(DATA_SPREAD, dtype=DOUBLE))
        weights = weights * pair_weights(logps, data, clip_eps)[0]
    return gradients(pairs, at, target_logp(pairs, torch.tensor(HEAVY, dtype=DOUBLE)), weights)


def test_on_policy_and_weighted_gradients_are_four_times_that_of_the_kl() -> None:
    at = torch.tensor([[-0.7], [0.3]], dtype=DOUBLE).requires_grad_()
    kl = kl_to_target(at[0], at[1].exp(), torch.tensor([HEAVY], dtype=DOUBLE))
    expected = 4 * torch.autograd.grad(kl.sum(), at)[0]
    at = at.detach()
    y = grid()[::20]
    policy = normal_logp(y, at[0], at[1].exp())
    data = normal_logp(y, torch.zeros((), dtype=DOUBLE), torch.tensor(DATA_SPREAD, dtype=DOUBLE))
    assert torch.allclose(every_pair(at, policy, None, weighted=False), expected, rtol=1e-6, atol=1e-8)
    assert torch.allclose(every_pair(at, data, None, weighted=True), expected, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(every_pair(at, data, None, weighted=False), expected, rtol=0.1)
    assert not torch.allclose(every_pair(at, data, 0.05, weighted=True), expected, rtol=0.1)


def test_exact_answers() -> None:
    mean, spread = exact_off_policy()
    assert abs(mean) < 0.3 and 1.1 < spread < 1.2
    at = torch.tensor([[mean], [math.log(spread)]], dtype=DOUBLE)
    data = normal_logp(grid()[::20], torch.zeros((), dtype=DOUBLE), torch.tensor(DATA_SPREAD, dtype=DOUBLE))
    assert every_pair(at, data, None, weighted=False).abs().max() < 1e-2  # up to the coarser grid
    mean, spread = exact_on_policy()
    assert mean == pytest.approx(MODES[0], abs=0.02) and spread == pytest.approx(SPREAD, abs=0.02)


def test_where_the_fits_sit_over_five_seeds() -> None:
    """Within 0.15 and 0.08 of the exact answers where data is fixed, within 0.02 and 0.02 where it is on-policy."""
    between, mode = exact_off_policy(), exact_on_policy()
    for data, (mean, spread), tolerances in (
        ("data", between, (0.15, 0.08)),
        ("policy", mode, (0.02, 0.02)),
        ("weighted", mode, (0.02, 0.02)),
    ):
        for seed in range(5):
            found = fit(from_data(1), data, CLIP_EPS if data == "weighted" else None, seed)
            assert found.means.item() == pytest.approx(mean, abs=tolerances[0]), (data, seed)
            assert found.spreads.item() == pytest.approx(spread, abs=tolerances[1]), (data, seed)
            assert place(found.means.item(), found.spreads.item()) == ("between" if data == "data" else "heavier mode")
            assert (found.ess.item() < 0.3) == (data == "weighted")


@pytest.mark.parametrize(
    "at, expected",
    [
        ((-2.0, 0.7), "heavier mode"),
        ((2.2, 0.8), "lighter mode"),
        ((-0.2, 1.2), "between"),
        ((0, 1.9), "both"),
        ((-2, 1.8), "both"),
    ],
)
def test_place(at: tuple[float, float], expected: str) -> None:
    assert place(*at) == expected


def test_the_demo_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gaussians, "REPEATS", 3)
    chart = run_gaussians(tmp_path / "new" / "folder", seed=3)
    assert chart == tmp_path / "new" / "folder" / "gaussians.png"
    assert sorted(path.name for path in chart.parent.iterdir()) == ["gaussians.json", "gaussians.png", "gaussians.svg"]
    assert chart.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    fits = json.loads((chart.parent / "gaussians.json").read_text())["fits"]
    assert fits["off_policy"]["places"] == {"between": 3}
    assert fits["on_policy"]["places"] == fits["weighted"]["places"] == {"heavier mode": 3}
    assert fits["off_policy"]["kl_to_target"]["low"] > fits["weighted"]["kl_to_target"]["high"] + 0.5
    printed = capsys.readouterr().out
    assert "between the modes in 3 of 3 runs" in printed
    assert max(map(len, printed.splitlines()[:7])) <= 100


def test_the_same_seed_gives_the_same_fit() -> None:
    runs = from_data(2)
    first, again, other = (fit(runs, "data", None, seed) for seed in (0, 0, 1))
    assert torch.equal(first.means, again.means)
    assert not torch.equal(first.means, other.means)


@pytest.mark.parametrize("seed", [-1, 0.5, True])
def test_a_bad_seed_is_one_line(tmp_path: Path, seed: object) -> None:
    with pytest.raises(UserError, match=r"^--seed: "):
        run_gaussians(tmp_path, seed)  # type: ignore[arg-type]


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--output_dir: .*file: "):
        run_gaussians(tmp_path / "file")
