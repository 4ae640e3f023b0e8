"""The probe notices what the shared prefix would get wrong, and says so."""

from __future__ import annotations

import logging

import pytest
import torch
from forward_helpers import (
    CONFIGS,
    assert_close,
    assert_same_gradients,
    gradients,
    loss_of,
    packed,
    plain_logps,
    tiny,
    untouched,
)
from torch import nn

from isdaa.errors import UserError
from isdaa.models.attention import shared_prefix
from isdaa.models.packed import forward as forward_module
from isdaa.models.packed import probe
from isdaa.models.packed.forward import inner_model, prepare

pytestmark = pytest.mark.fast


def test_an_ignored_window_is_noticed(monkeypatch, caplog):
    real = shared_prefix.shared_prefix_attention

    def without_window(*args, **kwargs):
        return real(*args, **{**kwargs, "sliding_window": None})

    monkeypatch.setattr(shared_prefix, "shared_prefix_attention", without_window)
    model = tiny("mistral_long_window")  # window 100: only rows of more than 100 tokens can show it
    truth_model = untouched(model)
    with caplog.at_level(logging.WARNING):
        forward = prepare(model)
    assert forward.mode == "two_rows" and "two separate rows" in caplog.text and "differs" in caplog.text
    ids, layout = packed([(105, 7, 9)])
    assert_close(forward(model, ids, None, layout).chosen_logps, plain_logps(truth_model, ids, layout)[0])
    assert prepare(tiny("mistral")).mode == "shared_prefix"


def test_an_ignored_window_of_an_untrained_model_is_noticed(monkeypatch):
    """Small random weights, as in a model made from a config, make the difference small; it must exceed rounding."""
    from transformers import AutoModelForCausalLM

    real = shared_prefix.shared_prefix_attention
    monkeypatch.setattr(shared_prefix, "shared_prefix_attention", lambda *a, **k: real(*a, **{**k, "sliding_window": None}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["mistral_long_window"]())
    assert prepare(model).mode == "two_rows"


def test_length_of_the_probe():
    def length(name, longest_row=None, **changes):
        config = CONFIGS[name]()
        for key, value in changes.items():
            setattr(config, key, value)
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return probe.row_length(AutoModelForCausalLM.from_config(config), longest_row)

    assert length("llama") == (48, None)
    assert length("mistral_short_window") == (48, None)
    assert length("mistral_long_window") == (113, None)
    # a window that no row of the caller exceeds needs no long probe
    assert length("mistral_long_window", longest_row=60) == (48, None)
    assert length("mistral_long_window", longest_row=100) == (48, None)
    # nor one beyond the model's positions
    assert length("mistral", sliding_window=4096) == (48, None)
    assert length("mistral", sliding_window=4096, max_position_embeddings=32768) == (4109, None)
    # too long to probe: said, not ignored
    assert length("mistral", sliding_window=8192, max_position_embeddings=32768) == (4352, 8192)
    assert length("mistral", longest_row=9000, sliding_window=8192, max_position_embeddings=32768) == (4352, 8192)
    # the rows of the caller exceed the window by less than the probe would like
    assert length("mistral", longest_row=105, sliding_window=100) == (105, 100)


def test_rows_beyond_an_unprobed_window_are_two_rows(monkeypatch, caplog):
    monkeypatch.setattr(probe, "LONGEST", 60)
    model = tiny("mistral_long_window")
    truth_model = untouched(model)
    forward = prepare(model)
    assert (forward.mode, forward.unprobed_window) == ("shared_prefix", 100)
    modes = []
    real = forward_module.ForwardRequest
    monkeypatch.setattr(
        forward_module, "ForwardRequest", lambda layout, mode, want: modes.append(mode) or real(layout, mode, want)
    )
    with caplog.at_level(logging.WARNING):
        for lengths in ([(20, 5, 6)], [(105, 7, 9), (5, 1, 2)]):
            ids, layout = packed(lengths)
            assert_close(forward(model, ids, None, layout).rejected_logps, plain_logps(truth_model, ids, layout)[1])
    assert modes == ["shared_prefix", "two_rows"]
    assert "exceed an attention window" in caplog.text


@pytest.mark.parametrize("odd", ["factor", "cap", "shift"])
def test_a_head_that_is_more_than_the_config_says_is_computed_by_the_model(odd, caplog):
    llama = type(tiny("llama"))

    class Odd(llama):
        def forward(self, *args, **kwargs):
            out = llama.forward(self, *args, **kwargs)
            z = out.logits
            out.logits = {"factor": z * 0.37, "cap": 300 * torch.tanh(z / 300), "shift": z + torch.arange(61) / 30}[odd]
            return out

    model = tiny("llama")
    model.__class__ = Odd
    truth_model = untouched(model)
    with caplog.at_level(logging.WARNING):
        forward = prepare(model)
    assert "linear head" in caplog.text and "own code" in caplog.text
    assert forward.mode == "shared_prefix"
    ids, layout = packed([(6, 4, 5), (3, 2, 1)])
    truth = plain_logps(truth_model, ids, layout)
    out = forward(model, ids, None, layout)
    assert_close(out.chosen_logps, truth[0])
    ours = gradients(model, loss_of(out.chosen_logps, out.rejected_logps))
    assert_same_gradients(ours, gradients(truth_model, loss_of(*truth)))


def test_a_model_that_can_be_computed_in_neither_way():
    class Restless(type(tiny("llama"))):
        """Every call gives other logits."""

        calls = 0

        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            type(self).calls += 1
            out.logits = out.logits + self.calls * torch.arange(out.logits.shape[-1])
            return out

    model = tiny("llama")
    model.__class__ = Restless
    with pytest.raises(UserError, match="not supported"):
        prepare(model)
    with pytest.raises(UserError, match="causal language model"):
        inner_model(nn.Linear(2, 2))
