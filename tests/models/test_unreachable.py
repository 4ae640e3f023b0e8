"""What changes a model's numbers only in rows, or batches, that no probe is as long as."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from forward_helpers import SMALL, assert_close, packed, plain_logps, tiny, untouched
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from isdaa.errors import UserError
from isdaa.models.attention import shared_prefix
from isdaa.models.attention.layout import Layout
from isdaa.models.packed.forward import prepare


def made(model_type: str, **options) -> torch.nn.Module:
    """A model in which attention matters."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[model_type](**{**SMALL, "max_position_embeddings": 512, **options})
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]))
    return model


def assert_right(model, truth_model, forward, lengths) -> None:
    ids, layout = packed(lengths)
    with torch.no_grad():
        out, truth = forward(model, ids, None, layout), plain_logps(truth_model, ids, layout)
        assert_close(out.chosen_logps, truth[0])
        assert_close(out.rejected_logps, truth[1])
        row = ids[None, : sum(lengths[0][:2])]
        assert_close(model(input_ids=row).logits, truth_model(input_ids=row).logits)


def test_a_choice_of_keys_in_long_rows():
    """DeepSeek V3.2 attends to the best keys of an index alone: to all of them in rows as short as the probe."""
    model = made(
        "deepseek_v32", num_key_value_heads=4, index_topk=60, index_head_dim=8, index_n_heads=24, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=2, n_routed_experts=2, num_experts_per_tok=1,
        n_group=1, topk_group=1, moe_intermediate_size=8,
    )  # fmt: skip
    truth_model = untouched(model)
    forward = prepare(model)
    for lengths in ([(90, 20, 30)], [(9, 5, 3), (70, 8, 2)]):
        assert_right(model, truth_model, forward, lengths)


def test_a_mask_that_a_model_makes_is_not_ignored():
    layout = Layout.of_pairs(*(torch.tensor([n]) for n in (3, 2, 1)))
    query, module = torch.randn(1, 2, 6, 4), torch.nn.Module()
    one = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    for mask in (None, one):
        assert shared_prefix.shared_prefix_attention(module, query, query, query, mask, isdaa_layout=layout)[0].shape[1] == 6
    with pytest.raises(NotImplementedError, match="reads no mask"):
        shared_prefix.shared_prefix_attention(module, query, query, query, one.expand(1, 1, 6, 6), isdaa_layout=layout)
    for name in ("indices", "block_indices", "sinks"):
        with pytest.raises(NotImplementedError, match=name):
            shared_prefix.shared_prefix_attention(module, query, query, query, one, isdaa_layout=layout, **{name: query})


def test_tokens_that_a_model_counts_by_itself(caplog):
    """Llama 4's layers without rotary positions scale queries by the place in the row they are given: the packed one."""
    model = made("llama4_text", intermediate_size_mlp=24, head_dim=8, moe_layers=[], no_rope_layers=[1, 0], floor_scale=61)
    truth_model = untouched(model)
    forward = prepare(model)
    assert forward.mode == "shared_prefix"
    assert_right(model, truth_model, forward, [(30, 20, 10)])  # 60 tokens
    with caplog.at_level(logging.WARNING):
        assert_right(model, truth_model, forward, [(20, 9, 7), (25, 9, 9), (60, 20, 3)])
    assert "count of its own from token 61" in caplog.text


def test_rows_that_change_each_others_positions_are_told(caplog):
    """Phi-3's longrope: a property of the longest row of a batch, in the model's own padded batches, too."""
    scaling = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.0], "long_factor": [4.0, 9.0],
        "original_max_position_embeddings": 33,
    }  # fmt: skip
    model = made("phi3", rope_parameters=scaling, original_max_position_embeddings=33)
    truth_model = untouched(model)
    forward = prepare(model)
    with caplog.at_level(logging.WARNING):
        for lengths in ([(20, 9, 7), (5, 9, 28)], [(40, 9, 7), (25, 9, 30)]):
            assert_right(model, truth_model, forward, lengths)
        assert "more than 33 tokens" not in caplog.text
        ids, layout = packed([(20, 9, 7), (25, 9, 2)])
        forward(model, ids, None, layout)
        assert caplog.text.count("more than 33 tokens") == 1


def test_an_adapter_that_begins_within_a_row_is_refused():
    peft = pytest.importorskip("peft")
    late = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], alora_invocation_tokens=[3, 4])
    with pytest.raises(UserError, match="activated LoRA"):
        prepare(peft.get_peft_model(tiny("llama"), late))
