"""Attention in blocks of queries computes what a whole matrix of scores does, gradients included, and says where it cannot."""

from __future__ import annotations

import logging

import pytest
import torch
from forward_helpers import LAYOUTS, compare, compare_shared, tiny, untouched, used

from isdaa.models.attention import attention_choice, cpu_attention, shared_prefix
from isdaa.models.attention.cpu_attention import attend_blocks
from isdaa.models.attention.layout import Layout
from isdaa.models.packed.forward import prepare
from isdaa.preview.fake_step import Setting, Stage


def values_and_gradients(attend, layout, heads, groups, dtype=torch.float64, size=8):
    """size: of values."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    # As a model hands them over: heads behind tokens in memory.
    sizes = ((heads, 8), (groups, 8), (groups, size))
    inputs = [draw(1, layout.tokens, *both).transpose(1, 2).requires_grad_() for both in sizes]
    out = attend(*inputs)
    assert out.shape == (1, layout.tokens, heads, size) and out.dtype == dtype
    return [out.detach(), *torch.autograd.grad((out * draw(*out.shape)).sum(), inputs)]


@pytest.mark.parametrize("block", [1, 16, 96, 1000])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_a_matrix_of_scores(name, heads, groups, block, monkeypatch):
    layout = LAYOUTS[name]
    monkeypatch.setattr(cpu_attention, "BLOCK", block)
    for scaling in (None, 0.3):
        ours = values_and_gradients(lambda q, k, v, s=scaling: attend_blocks(q, k, v, layout, s), layout, heads, groups)
        dense = lambda q, k, v, s=scaling: attention_choice.dense_attention(q, k, v, layout, s, None, None)  # noqa: E731
        for found, truth in zip(ours, values_and_gradients(dense, layout, heads, groups), strict=True):
            torch.testing.assert_close(found, truth, rtol=0, atol=1e-12 * max(1.0, float(truth.abs().max())))


def test_values_of_another_size():
    layout = LAYOUTS["shared"]
    dense = lambda q, k, v: attention_choice.dense_attention(q, k, v, layout, None, None, None)  # noqa: E731
    ways = (lambda *x: attend_blocks(*x, layout), dense)
    for found, truth in zip(*(values_and_gradients(way, layout, 6, 2, size=5) for way in ways), strict=True):
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-12 * float(truth.abs().max()))


def test_rounds_as_the_fused_kernel_does():
    layout = LAYOUTS["pairs"]
    dense = lambda q, k, v: attention_choice.dense_attention(q, k, v, layout, None, None, None)  # noqa: E731
    how = shared_prefix.Kernel(None, 0.0, None, None)
    sdpa = lambda q, k, v: shared_prefix.attend_one_by_one(q, k, v, layout, how)  # noqa: E731
    exact = values_and_gradients(dense, layout, 6, 2)
    ours, usual = (values_and_gradients(way, layout, 6, 2, torch.float32) for way in (lambda *x: attend_blocks(*x, layout), sdpa))
    for found, plain, truth in zip(ours, usual, exact, strict=True):
        assert (found - truth).abs().max() <= 3 * (plain - truth).abs().max() + 1e-7 * truth.abs().max()


def test_keeps_nothing_that_grows_with_the_square():
    layout = Layout.of_pairs(*(torch.full((2,), n) for n in (700, 60, 50)))
    kept = []
    inputs = [torch.randn(1, n, layout.tokens, 8, requires_grad=True) for n in (4, 2, 2)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attend_blocks(*inputs, layout)
    assert sorted(kept) == sorted(x.numel() for x in inputs)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "qwen3", "mistral", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_models_equal_plain_rows(name, checkpointing):
    model = tiny(name)
    truth_model = untouched(model)
    forward = prepare(model, attention="blocks")
    assert forward.mode == "shared_prefix" and used(model, forward) == "blocks"
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    for pairs in (1, 5):
        compare(model, truth_model, forward, pairs)
    compare_shared(model, truth_model, forward)


def test_auto_takes_it_for_rows_that_are_neither_short_nor_very_long(monkeypatch):
    monkeypatch.setattr(cpu_attention, "NARROWEST", 0)
    model = tiny("llama")
    forward = prepare(model)
    assert used(model, forward) == "sdpa"  # two short pairs: one padded block
    assert used(model, forward, [(100, 5, 4), (3, 2, 2)]) == "blocks"
    monkeypatch.setattr(cpu_attention, "_LONGEST", 104)
    assert used(model, forward, [(100, 5, 4), (3, 2, 2)]) == "sdpa"
    assert used(model, forward, [(99, 5, 4), (3, 2, 2)]) == "blocks"
    width = model.config.num_attention_heads * model.config.head_dim
    monkeypatch.setattr(cpu_attention, "NARROWEST", width + 1)
    assert used(model, forward, [(99, 5, 4), (3, 2, 2)]) == "sdpa"


def test_a_model_in_which_it_is_wrong_goes_back_to_sdpa(monkeypatch, caplog):
    monkeypatch.setattr(cpu_attention, "NARROWEST", 0)
    right = cpu_attention.attend_blocks
    monkeypatch.setattr(cpu_attention, "attend_blocks", lambda *x: right(*x) * 1.01)
    model = tiny("llama")
    truth_model = untouched(model)
    with caplog.at_level(logging.WARNING):
        forward = prepare(model)
    assert forward.mode == "shared_prefix" and "attention by blocks does not reproduce" in caplog.text
    assert used(model, forward, [(100, 5, 4), (3, 2, 2)]) == "sdpa"
    compare(model, truth_model, forward, 3)


def test_what_it_lacks():
    single, half = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)
    assert cpu_attention.lacks(single, None, None) is None
    assert "fp32" in cpu_attention.lacks(half, None, None)
    assert "window" in cpu_attention.lacks(single, 7, None) and "soft cap" in cpu_attention.lacks(single, None, 2.0)
    assert "CPU" in cpu_attention.lacks(single.to("meta"), None, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu_attention.lacks(single, None, None) is None
        assert "fp32" in cpu_attention.lacks(half, None, None)


@pytest.mark.parametrize("name", ["mistral_short_window", "gemma2"])
def test_windows_and_soft_caps_are_left_to_sdpa(name, caplog, monkeypatch):
    monkeypatch.setattr(attention_choice, "said_once", set())
    model = tiny(name)
    truth_model = untouched(model)
    with caplog.at_level(logging.WARNING):
        forward = prepare(model, attention="blocks")
    assert "attention by blocks is not used: it knows no windows and no soft caps" in caplog.text
    for pairs in (1, 5):
        compare(model, truth_model, forward, pairs)
    assert forward.mode == "shared_prefix"


def test_a_rehearsal_proves_nothing_and_does_as_it_is_told(monkeypatch):
    proofs: dict = {}
    monkeypatch.setattr(attention_choice, "proofs", proofs)
    batch = Layout.of_pairs(*(torch.tensor([n]) for n in (300, 20, 20)))
    told = {name: Stage(Setting("pairs", tiny("llama").config, attention=name)).operations(batch) for name in ("blocks", "sdpa")}
    assert told["blocks"] > told["sdpa"] and not proofs  # the fused kernel's operations are not counted
    assert attention_choice.proved("blocks", "cpu", torch.float32, 4, 2, 8, None, None, None) and len(proofs) == 1
