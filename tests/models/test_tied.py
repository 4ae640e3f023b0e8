"""Tied embeddings: one gradient for the matrix that is embedding and head, the same as autograd's two."""

from __future__ import annotations

import pytest
import torch
from forward_helpers import assert_same_gradients, gradients, lengths_of, loss_of, packed, plain_logps, tiny, untouched

from isdaa.models.packed import logprobs, tied_embeddings
from isdaa.models.packed.forward import prepare

pytestmark = pytest.mark.fast


@pytest.fixture(params=["kept", "recomputed"], autouse=True)
def way(request, monkeypatch):
    monkeypatch.setattr(logprobs, "KEPT_BYTES", {"cpu": 2**20 if request.param == "kept" else 0})


def test_several_passes_and_one_backward():
    model = tiny("llama_tied")
    truth_model = untouched(model)
    forward = prepare(model)
    ours, truth = 0.0, 0.0
    for seed, pairs in ((1, 3), (2, 1), (3, 5)):
        ids, layout = packed(lengths_of(pairs), seed)
        out = forward(model, ids, None, layout)
        ours = ours + loss_of(out.chosen_logps, out.rejected_logps)
        truth = truth + loss_of(*plain_logps(truth_model, ids, layout))
    expected = gradients(truth_model, truth)
    assert_same_gradients(gradients(model, ours), expected)


def test_accumulated_over_backward_passes_and_padding_index():
    model = tiny("llama_tied")
    model.get_input_embeddings().padding_idx = 7
    truth_model = untouched(model)
    forward = prepare(model)
    for m in (model, truth_model):
        m.zero_grad()
    for seed in (1, 2):
        ids, layout = packed(lengths_of(5), seed)
        ids[layout.prompt_starts[0] + 1] = 7
        out = forward(model, ids, None, layout)
        loss_of(out.chosen_logps, out.rejected_logps).backward()
        loss_of(*plain_logps(truth_model, ids, layout)).backward()
    assert_same_gradients(*({n: p.grad for n, p in m.named_parameters()} for m in (model, truth_model)))


def test_one_tie_carries_the_gradient(monkeypatch):
    """What the test above compares did go through a tie; a frozen or an untied matrix has none."""
    model = tiny("llama_tied")
    forward = prepare(model)
    ties, make = [], tied_embeddings.tie_of
    monkeypatch.setattr("isdaa.models.packed.patched_forward.tie_of", lambda m: ties.append(make(m)) or ties[-1])
    ids, layout = packed(lengths_of(2))
    out = forward(model, ids, None, layout)
    head = torch.autograd.grad(out.token_logps.sum(), model.lm_head.weight, retain_graph=True)[0]
    assert len(ties) == 1 and ties[0] is not None and ties[0].head_gradient is None
    # A second backward pass over the same graph gives the same.
    assert torch.equal(torch.autograd.grad(out.token_logps.sum(), model.lm_head.weight)[0], head)
    model.lm_head.weight.requires_grad_(False)
    assert make(model) is None and make(tiny("llama")) is None


def test_hooks_on_the_embedding_still_run():
    model = tiny("llama_tied")
    truth_model = untouched(model)
    forward = prepare(model)
    calls = []
    model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    ids, layout = packed(lengths_of(3))
    out = forward(model, ids, None, layout)
    ours = gradients(model, loss_of(out.chosen_logps, out.rejected_logps))
    assert calls
    assert_same_gradients(ours, gradients(truth_model, loss_of(*plain_logps(truth_model, ids, layout))))
