"""Chunked token logps against a dense log-softmax: values, gradients, WPO term, KL."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from isdaa.errors import UserError
from isdaa.models.packed import logprobs
from isdaa.models.packed.logprobs import LinearHead, OwnHead, full_vocabulary_kl, token_logps

pytestmark = pytest.mark.fast

N, D, V = 11, 6, 17


def inputs(dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    vector = torch.randn(V, dtype=dtype, requires_grad=True) if bias else None
    return hidden, weight, vector, torch.randint(0, V, (N,))


@pytest.fixture(params=["kept", "recomputed"], autouse=True)
def way(request, monkeypatch):
    """Every test runs with directions kept for the backward pass, and with logits computed again."""
    monkeypatch.setattr(logprobs, "KEPT_BYTES", {"cpu": 2**20 if request.param == "kept" else 0})


def dense(hidden, weight, bias, targets, scale=1.0, softcap=None):
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    every = torch.log_softmax(logits, -1)
    return every.gather(1, targets[:, None])[:, 0], every


@pytest.mark.parametrize("chunk", [1, 4, N, 100, None])
@pytest.mark.parametrize(("bias", "scale", "softcap"), [(False, 1.0, None), (True, 0.3, None), (True, 1.7, 2.0)])
def test_values_and_gradients(chunk, bias, scale, softcap):
    hidden, weight, vector, targets = inputs(bias=bias)
    leaves = [t for t in (hidden, weight, vector) if t is not None]
    logps, wpo = token_logps(hidden, LinearHead(weight, vector, scale, softcap), targets, chunk, with_wpo=True)
    truth, every = dense(hidden, weight, vector, targets, scale, softcap)
    torch.testing.assert_close(logps, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(wpo, (truth - every.exp().square().sum(-1).log()).detach(), rtol=1e-12, atol=1e-12)
    assert not wpo.requires_grad
    coefficients = torch.linspace(-1, 2, N, dtype=torch.float64)
    ours = torch.autograd.grad((logps * coefficients).sum(), leaves)
    for mine, other in zip(ours, torch.autograd.grad((truth * coefficients).sum(), leaves), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("frozen", ["weights", "hidden", "weight only"])
def test_gradients_where_a_part_is_frozen(frozen):
    hidden, weight, bias, targets = inputs()
    for leaf in {"weights": [weight, bias], "hidden": [hidden], "weight only": [weight]}[frozen]:
        leaf.requires_grad_(False)
    leaves = [t for t in (hidden, weight, bias) if t.requires_grad]
    head = LinearHead(weight, bias, 0.7, 3.0)
    assert torch.autograd.gradcheck(lambda *_: token_logps(hidden, head, targets, 4)[0], leaves)


def test_own_head_is_any_function_and_never_keeps_logits():
    hidden, weight, bias, targets = inputs()
    rows = []

    def odd_head(h):
        rows.append(len(h))
        return F.linear(h, weight, bias).pow(3)

    logps, wpo = token_logps(hidden, OwnHead(odd_head, V), targets, 4, with_wpo=True)
    every = torch.log_softmax(F.linear(hidden, weight, bias).pow(3), -1)
    truth = every.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logps, truth)
    torch.testing.assert_close(wpo, (truth - every.exp().square().sum(-1).log()).detach())
    assert rows == [4, 4, 3]
    ours = torch.autograd.grad(logps.sin().sum(), (hidden, weight, bias))
    assert sorted(rows) == [3, 3, 4, 4, 4, 4]  # recomputed in the backward pass
    for mine, other in zip(ours, torch.autograd.grad(truth.sin().sum(), (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("chunk", [4, 100])
def test_low_precision_and_autocast_give_fp32_logps(chunk):
    hidden, weight, bias, targets = inputs(torch.float32)
    exact = dense(hidden, weight, bias, targets)[0]
    low = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight, bias)]
    logps, _ = token_logps(low[0], LinearHead(low[1], low[2]), targets, chunk)
    # the log-softmax in fp32 of logits that were rounded once to bf16
    logits = F.linear(*low)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0])
    with torch.autocast("cpu", torch.bfloat16):
        logps, wpo = token_logps(hidden, LinearHead(weight, bias), targets, chunk, with_wpo=True)
    assert logps.dtype == wpo.dtype == torch.float32
    assert 0 < (logps - exact).abs().max() < 0.2
    grads = torch.autograd.grad(logps.sum(), (hidden, weight, bias))
    assert [g.dtype for g in grads] == [torch.float32] * 3
    for mine, other in zip(grads, torch.autograd.grad(exact.sum(), (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(mine, other, rtol=0.1, atol=0.1)


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    logps, wpo = token_logps(hidden, LinearHead(weight), torch.tensor([0, 0]), 1, with_wpo=True)
    torch.testing.assert_close(logps, torch.tensor([0.0, -2e4]))
    assert torch.isfinite(wpo).all()
    assert torch.isfinite(torch.autograd.grad(logps.sum(), hidden)[0]).all()


def test_no_tokens_and_wrong_shapes():
    hidden, weight, bias, targets = inputs()
    for head in (LinearHead(weight, bias), OwnHead(lambda h: F.linear(h, weight, bias), V)):
        assert token_logps(hidden[:0], head, targets[:0])[0].shape == (0,)
        with pytest.raises(ValueError, match="hidden"):
            token_logps(hidden, head, targets[1:])


def test_full_vocabulary_kl(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", {"cpu": 4 * V})
    monkeypatch.setattr(logprobs, "LEAST_ROWS", 1)
    hidden, weight, bias, targets = inputs(torch.float32)
    other_hidden, other_weight = torch.randn(N, D + 2), torch.randn(V, D + 2)
    policy, reference = LinearHead(weight, bias), LinearHead(other_weight, None, 0.5)
    kl, logps, logps_ref = full_vocabulary_kl(hidden, policy, other_hidden, reference, targets)
    truth, every = dense(hidden, weight, bias, targets)
    truth_ref, every_ref = dense(other_hidden, other_weight, None, targets, 0.5)
    torch.testing.assert_close(logps, truth.detach())
    torch.testing.assert_close(logps_ref, truth_ref)
    torch.testing.assert_close(kl, (every.exp() * (every - every_ref)).sum(-1).detach())
    assert (kl > 0).all()
    assert full_vocabulary_kl(hidden, policy, hidden, policy, targets)[0].abs().max() == 0
    many = torch.randn(500, D)
    nearly = full_vocabulary_kl(many, policy, many * (1 + 1e-6), policy, torch.zeros(500, dtype=torch.long))[0]
    assert nearly.min() >= 0 and nearly.max() < 1e-5  # rounding alone would go below 0
    with pytest.raises(UserError, match="17 and 16"):
        full_vocabulary_kl(hidden, policy, other_hidden, LinearHead(other_weight[1:]), targets)


def test_nothing_is_kept_without_gradients(monkeypatch):
    hidden, weight, bias, targets = inputs(torch.float32)
    kept, chunks = [], logprobs.Chunks
    monkeypatch.setattr(
        logprobs, "Chunks", lambda rows, head, keep=None: kept.append(keep is not None) or chunks(rows, head, keep)
    )
    monkeypatch.setattr(logprobs, "KEPT_BYTES", {"cpu": 2**20})
    token_logps(hidden, LinearHead(weight, bias), targets)
    with torch.no_grad():
        token_logps(hidden, LinearHead(weight, bias), targets)
    assert kept == [True, False]


def test_second_derivatives_are_an_error_and_no_wrong_number():
    hidden, weight, bias, targets = inputs()
    logps, _ = token_logps(hidden, LinearHead(weight, bias), targets)
    first = torch.autograd.grad(logps.sin().sum(), hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), hidden)
