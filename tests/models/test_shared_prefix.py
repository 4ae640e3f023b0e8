"""The layout of a packed row, and what installing the attention does to a model and leaves alone."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from forward_helpers import assert_close, lengths_of, packed, plain_logps, tiny, untouched

from isdaa.models.attention import shared_prefix
from isdaa.models.attention.layout import Layout
from isdaa.models.attention.shared_prefix import plain_attention
from isdaa.models.packed.forward import PairForward, disable_dropout, inner_model, prepare

pytestmark = pytest.mark.fast


def test_layout_by_hand():
    #                0 1 2 | 3 4 | 5 6 7 || 8 | 9 | 10
    # pair 0: prompt 0..2, chosen 3..4, rejected 5..7; pair 1: prompt 8, chosen 9, rejected 10
    layout = Layout.of_pairs(torch.tensor([3, 1]), torch.tensor([2, 1]), torch.tensor([3, 1]))
    assert (layout.responses, layout.tokens, layout.longest, layout.longest_group) == (4, 11, 6, 8)
    assert (layout.chosen.tolist(), layout.rejected.tolist()) == ([0, 2], [1, 3])
    assert layout.target_index.tolist() == [3, 4, 5, 6, 7, 9, 10]
    assert layout.predictor_index.tolist() == [2, 3, 2, 5, 6, 8, 8]
    assert layout.response_of.tolist() == [0, 0, 1, 1, 1, 2, 3]
    assert layout.owner.tolist() == [-1, -1, -1, 0, 0, 1, 1, 1, -1, 2, 3]
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 1]
    sums = layout.response_sums(torch.tensor([1.0, 2, 10, 20, 30, 5, 7]))
    assert sums.tolist() == [3, 60, 5, 7]


def test_layout_of_shared_prompts_by_hand():
    # prompt 0..1 with responses 2..3 | 4 | 5..6, then prompt 7 with response 8; response 1 is in both pairs of prompt 0
    shared = torch.tensor([2, 1]), torch.tensor([2, 1, 2, 1]), torch.tensor([0, 0, 0, 1])
    layout = Layout(*shared, chosen=torch.tensor([0, 1]), rejected=torch.tensor([1, 2]))
    assert (layout.tokens, layout.longest, layout.longest_group) == (9, 4, 7)
    assert layout.target_index.tolist() == [2, 3, 4, 5, 6, 8]
    assert layout.predictor_index.tolist() == [1, 2, 1, 1, 5, 7]
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 2, 2, 3, 0, 1]
    assert layout.groups == [(2, [2, 1, 2]), (1, [1])]
    assert layout.response_sums(torch.arange(6.0)).tolist() == [1, 2, 7, 5]


def test_empty_responses_and_wrong_lengths():
    layout = Layout.of_pairs(torch.tensor([2, 3]), torch.tensor([2, 0]), torch.tensor([0, 0]))
    assert layout.target_index.tolist() == [2, 3]
    assert layout.predictor_index.tolist() == [1, 2]
    assert Layout.of_rows(torch.tensor([2, 3]), torch.tensor([0, 1])).target_index.tolist() == [5]
    assert layout.response_sums(torch.tensor([1.0, 2.0])).tolist() == [3, 0, 0, 0]
    with pytest.raises(ValueError, match="prompt of length 0"):
        Layout.of_pairs(torch.tensor([0]), torch.tensor([1]), torch.tensor([1]))
    with pytest.raises(ValueError, match="shapes"):
        Layout.of_pairs(torch.tensor([1, 2]), torch.tensor([1]), torch.tensor([1]))
    with pytest.raises(ValueError, match="order of their prompts"):
        Layout(*(torch.tensor(part) for part in ([1, 1], [1, 1], [1, 0], [0], [1])))
    with pytest.raises(ValueError, match="as many chosen"):
        Layout(*(torch.tensor(part) for part in ([1, 1], [1, 1], [0, 1], [0, 1], [1])))


@pytest.mark.parametrize("name", ["llama", "mistral_short_window", "gemma2", "bloom"])
def test_plain_calls_and_generation_are_untouched(name):
    model = tiny(name).eval()
    before = untouched(model).eval()
    prepare(model)
    ids = torch.randint(3, 61, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    with torch.no_grad():
        for kwargs in ({}, {"attention_mask": mask}):
            assert torch.equal(model(input_ids=ids, **kwargs).logits, before(input_ids=ids, **kwargs).logits)
        arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
        assert torch.equal(model.generate(**arguments), before.generate(**arguments))
        with plain_attention(model):
            assert model.config._attn_implementation == before.config._attn_implementation
            assert torch.equal(model.generate(**arguments), before.generate(**arguments))
    if name != "bloom":
        assert model.config._attn_implementation.startswith(shared_prefix.NAME)


def test_two_models_that_share_a_config():
    """Uninstalling one (it fell back) must not silently take the attention away from the other."""
    model = tiny("llama")
    truth_model = untouched(model)
    forward = prepare(model)
    ids, layout = packed(lengths_of(3))
    shared_prefix.uninstall(model)
    assert_close(forward(model, ids, None, layout).chosen_logps, plain_logps(truth_model, ids, layout)[0])


@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "gpt2"])
def test_saving_copying_and_pickling(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny(name).eval()
    before = untouched(model)
    forward = prepare(model)
    model.save_pretrained(tmp_path)
    assert "isdaa" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    ids, layout = packed(lengths_of(2))
    with torch.no_grad():
        truth = plain_logps(before, ids, layout)[1]
        own = before.config._attn_implementation
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=own).eval()
        assert_close(plain_logps(loaded, ids, layout)[1], truth)
        twin = copy.deepcopy(model)
        assert twin.forward.__self__ is twin
        next(model.parameters()).data.add_(1.0)  # the copy computes with its own weights
        assert_close(forward(twin, ids, None, layout).rejected_logps, truth)
        revived = pickle.loads(pickle.dumps(twin))
        assert_close(plain_logps(revived, ids, layout)[1], truth)
        assert_close(prepare(revived)(revived, ids, None, layout).rejected_logps, truth)


def test_prepare_twice_and_a_model_that_was_not_prepared():
    model = tiny("gpt2")
    truth_model = untouched(model)
    prepare(model)
    forward = prepare(model)
    ids, layout = packed(lengths_of(2))
    assert_close(forward(model, ids, None, layout).chosen_logps, plain_logps(truth_model, ids, layout)[0])
    with pytest.raises((ValueError, TypeError)):
        PairForward(truth_model, "shared_prefix")(truth_model, ids, None, layout)
    with pytest.raises(ValueError, match="layout describes"):
        forward(model, ids[1:], None, layout)


def test_training_mode_survives_prepare():
    model = tiny("llama")
    model.train()
    model.model.layers[1].eval()
    prepare(model)
    assert model.training and model.model.layers[0].mlp.training
    assert not model.model.layers[1].mlp.training


def test_disable_dropout():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

    for config in (
        GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_positions=64),
        Qwen2Config(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            attention_dropout=0.5,
        ),
    ):
        model = AutoModelForCausalLM.from_config(config)
        targets = ["c_attn"] if isinstance(config, GPT2Config) else ["q_proj"]
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, lora_dropout=0.5, init_lora_weights=False))
        forward = prepare(model)
        model.train()
        ids, layout = packed(lengths_of(3))
        first = forward(model, ids, None, layout).token_logps
        assert not torch.equal(first, forward(model, ids, None, layout).token_logps)
        disable_dropout(model)
        first = forward(model, ids, None, layout).token_logps
        assert torch.equal(first, forward(model, ids, None, layout).token_logps)
        saved = json.loads(inner_model(model).config.to_json_string(use_diff=False))
        assert saved["resid_pdrop" if isinstance(config, GPT2Config) else "attention_dropout"] > 0


@pytest.mark.parametrize("kind", ["falcon", "persimmon", "mixtral"])
def test_randomness_that_is_no_dropout_layer(kind):
    """Probabilities that are read from the config in each call, and noise in front of a router."""
    from transformers import AutoModelForCausalLM, FalconConfig, MixtralConfig, PersimmonConfig

    small = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    config = {
        "falcon": lambda: FalconConfig(**small, parallel_attn=False, hidden_dropout=0.5, attention_dropout=0.4),
        "persimmon": lambda: PersimmonConfig(**small, intermediate_size=16, attention_dropout=0.5),
        "mixtral": lambda: MixtralConfig(**small, num_key_value_heads=2, intermediate_size=16, router_jitter_noise=0.5),
    }[kind]()
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    forward = prepare(model)
    ids, layout = packed(lengths_of(3))
    expected = forward(model.eval(), ids, None, layout).token_logps
    model.train()
    assert not torch.equal(forward(model, ids, None, layout).token_logps, expected)
    disable_dropout(model)
    assert_close(forward(model, ids, None, layout).token_logps, expected)
    with plain_attention(model):
        assert_close(forward(model, ids, None, layout).token_logps, expected)
    assert model.config is config
    saved = json.loads(config.to_json_string(use_diff=False))
    assert saved["router_jitter_noise" if kind == "mixtral" else "attention_dropout"] > 0
