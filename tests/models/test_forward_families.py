"""Logps and all parameter gradients of the shared forward equal those of two plain rows, family by family."""

from __future__ import annotations

import logging

import pytest
import torch
from forward_helpers import (
    CONFIGS,
    SHARED,
    VOCABULARY,
    assert_close,
    compare,
    compare_shared,
    lengths_of,
    packed,
    plain_logps,
    tiny,
    untouched,
)

from isdaa.models.attention import shared_prefix
from isdaa.models.packed import logprobs
from isdaa.models.packed.forward import prepare
from isdaa.models.packed.patched_forward import head_of, own_head


@pytest.mark.parametrize("name", SHARED)
def test_equals_two_plain_rows(name, monkeypatch):
    model = tiny(name)
    truth_model = untouched(model)
    forward = prepare(model)
    assert forward.mode == "shared_prefix"
    assert isinstance(head_of(model), logprobs.LinearHead)  # the fast way, scale and soft cap included
    for pairs in (1, 2, 5):
        compare(model, truth_model, forward, pairs)  # short pairs: one padded block
    compare_shared(model, truth_model, forward)
    monkeypatch.setattr(shared_prefix, "SHORT_GROUP", 0)
    compare(model, truth_model, forward, 5)  # pair by pair
    compare_shared(model, truth_model, forward)
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", {"cpu": 7 * VOCABULARY})
    monkeypatch.setattr(logprobs, "LEAST_ROWS", 1)
    compare(model, truth_model, forward, 5)  # many vocabulary chunks, the last one smaller
    monkeypatch.setattr(logprobs, "KEPT_BYTES", {})
    compare(model, truth_model, forward, 5)  # computed again in the backward pass


@pytest.mark.parametrize("name", ["bloom", "llama", "gemma2"])
def test_two_rows_equal_two_plain_rows(name, caplog, monkeypatch):
    model = tiny(name)
    truth_model = untouched(model)
    if name != "bloom":  # a model that the shared prefix would fit, told otherwise
        monkeypatch.setattr(shared_prefix, "visible_keys", lambda q, k, w: q[..., :, None] * 0 >= k[..., None, :] * 0)
    with caplog.at_level(logging.WARNING):
        forward = prepare(model, attention="sdpa")
    assert forward.mode == "two_rows"
    assert "two separate rows" in caplog.text and "ForCausalLM" in caplog.text
    monkeypatch.undo()
    for pairs in (1, 2, 5):
        compare(model, truth_model, forward, pairs)
    compare_shared(model, truth_model, forward)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gemma2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant):
    model = tiny(name)
    truth_model = untouched(model)
    forward = prepare(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    layer = model.get_submodule({"gpt2": "transformer.h.0"}.get(name, "model.layers.0"))
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    if reentrant:
        model.enable_input_require_grads()
    compare(model, truth_model, forward, 5)
    assert len(calls) == 2  # once forward, once recomputed


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_lora(targets):
    from peft import LoraConfig, get_peft_model

    def adapted():
        return get_peft_model(tiny("llama"), LoraConfig(r=3, target_modules=targets, lora_dropout=0.0))

    model, truth_model = adapted(), adapted()
    forward = prepare(model)
    for each in (model, truth_model):  # a fresh adapter does nothing: its effect must not be lost after the probe
        torch.manual_seed(1)
        for name, parameter in each.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    assert forward.mode == "shared_prefix"
    for pairs in (1, 5):
        compare(model, truth_model, forward, pairs)
    with model.disable_adapter():  # the reference of a LoRA run
        ids, layout = packed(lengths_of(5))
        out = forward(model, ids, None, layout)
        assert_close(out.chosen_logps, plain_logps(tiny("llama"), ids, layout)[0])


def test_prepared_before_the_adapter():
    from peft import LoraConfig, get_peft_model

    model = tiny("qwen2")
    truth_model = untouched(model)
    forward = prepare(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    ids, layout = packed(lengths_of(2))
    assert_close(forward(wrapped, ids, None, layout).rejected_logps, plain_logps(truth_model, ids, layout)[1])


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_order_and_composition_of_the_batch_change_nothing(name):
    model = tiny(name)
    forward = prepare(model)
    lengths = lengths_of(5)
    ids, layout = packed(lengths)
    pairs = ids.split([sum(three) for three in lengths])
    with torch.no_grad():
        together = forward(model, ids, None, layout, with_wpo=True)
        order = [3, 0, 4, 2, 1]
        mixed = forward(
            model,
            torch.cat([pairs[i] for i in order]),
            None,
            packed([lengths[i] for i in order])[1],
            with_wpo=True,
        )
        for field in ("chosen_logps", "rejected_logps", "chosen_wpo", "rejected_wpo"):
            assert_close(getattr(mixed, field), getattr(together, field)[order], what=field)
        for i, pair in enumerate(pairs):
            alone = forward(model, pair, None, packed([lengths[i]])[1])
            assert_close(alone.chosen_logps, together.chosen_logps[i : i + 1], scale=1.0)
            assert_close(alone.rejected_logps, together.rejected_logps[i : i + 1], scale=1.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_models_own_forward_serves_as_its_head(name):
    """As it must under FSDP, where the head's weights are whole only inside its own forward."""
    model = tiny(name)
    prepare(model)
    ids = torch.randint(3, VOCABULARY, (1, 7))
    with torch.no_grad():
        hidden = getattr(model, model.base_model_prefix)(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(own_head(model).logits(hidden), model(input_ids=ids).logits[0])
