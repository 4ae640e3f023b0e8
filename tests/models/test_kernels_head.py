"""The fused head is called as its library wants it, and only where it computes the same. A stand-in with the library's
signature takes its place: the real one needs a GPU."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from isdaa.models import fused_head
from isdaa.models.logprobs import LinearHead, token_logps


def as_it_is(
    e, c, targets, bias=None, ignore_index=-100, softcap=None, reduction="mean", shift=0, filter_eps="auto",
    accum_e_fp32=False, accum_c_fp32=False, filter_e_grad=True, filter_c_grad=True,
):  # fmt: skip
    assert (reduction, filter_eps, accum_e_fp32, accum_c_fp32, shift, bias) == ("none", None, True, True, 0, None)
    logits = e.float() @ c.float().T
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def as_released(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high"):
    raise AssertionError("this version adds gradients up in half precision")


def without_gradient(e, c, targets, **settings):
    return as_it_is(e, c.detach(), targets, **settings) + 0 * c.sum()


def install(monkeypatch, function):
    module = ModuleType("cut_cross_entropy")
    module.linear_cross_entropy = function
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", module)
    monkeypatch.setattr(fused_head, "_on_gpu", lambda x: True)
    monkeypatch.setattr(fused_head, "_proofs", {})
    monkeypatch.setattr(fused_head, "ENABLED", True)


def numbers(softcap=None, dtype=torch.bfloat16, **settings):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 16, generator=generator).to(dtype).requires_grad_() for n in (9, 50))
    return hidden, LinearHead(weight, softcap=softcap, **settings), torch.randint(0, 50, (9,), generator=generator)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_same_logps_and_gradients(monkeypatch, softcap):
    install(monkeypatch, as_it_is)
    hidden, head, targets = numbers(softcap)
    factors = torch.linspace(-1, 2, 9)
    results = []
    for logps in (fused_head.fused_token_logps(hidden, head, targets), token_logps(hidden, head, targets)[0]):
        assert logps.dtype == torch.float32
        results.append([logps, *torch.autograd.grad((logps * factors).sum(), [hidden, head.weight])])
    for ours, chunked in zip(*results, strict=True):
        torch.testing.assert_close(ours, chunked, rtol=0.03, atol=0.03)


def test_off_unless_asked_for(monkeypatch):
    install(monkeypatch, as_it_is)
    monkeypatch.setattr(fused_head, "ENABLED", False)
    assert fused_head.fused_token_logps(*numbers()) is None


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"scale": 0.5}, "no factor"),
        ({"bias": torch.zeros(50)}, "no bias"),
        ({"dtype": torch.float32}, "half precision"),
    ],
)
def test_heads_that_it_does_not_know(monkeypatch, settings, why):
    install(monkeypatch, as_it_is)
    hidden, head, targets = numbers(**settings)
    assert why in fused_head.lacks(hidden, head)
    assert fused_head.fused_token_logps(hidden, head, targets) is None


@pytest.mark.parametrize(
    ("function", "why"), [(as_released, "accum_c_fp32, accum_e_fp32"), (without_gradient, "gradient of the weight")]
)
def test_versions_that_compute_something_else(monkeypatch, function, why):
    if function is without_gradient:
        without_gradient.__signature__ = __import__("inspect").signature(as_it_is)
    install(monkeypatch, function)
    hidden, head, targets = numbers()
    assert why in fused_head.lacks(hidden, head)
    assert fused_head.fused_token_logps(hidden, head, targets) is None


def test_not_installed_and_not_on_a_gpu(monkeypatch):
    hidden, head, targets = numbers()
    monkeypatch.setattr(fused_head, "ENABLED", True)
    assert "GPU" in fused_head.lacks(hidden, head)
    install(monkeypatch, as_it_is)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    assert "cannot be imported" in fused_head.lacks(hidden, head)
    assert fused_head.fused_token_logps(hidden, head, targets) is None


def test_under_autocast(monkeypatch):
    install(monkeypatch, as_it_is)
    hidden, head, targets = numbers(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, chunked = fused_head.fused_token_logps(hidden, head, targets), token_logps(hidden, head, targets)[0]
    torch.testing.assert_close(ours, chunked, rtol=0.03, atol=0.03)
