"""Every folder that a run leaves loads with transformers (and peft, for an adapter) as it stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

CHAT = [{"role": "user", "content": "What is in the basket?"}]
WRONG = ("missing_keys", "unexpected_keys", "mismatched_keys")


@pytest.mark.parametrize("name", ["full/model", "full/checkpoints/checkpoint-2", "lora/model"])
def test_a_policy_generates_and_stops_where_its_turn_ends(place: Path, name: str) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
    assert not any(report[key] for key in WRONG)
    tokenizer = AutoTokenizer.from_pretrained(name)
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    last = set()
    for seed in range(8):
        torch.manual_seed(seed)
        out = model.generate(**ids, max_new_tokens=200)[0, ids["input_ids"].shape[1] :].tolist()
        text = tokenizer.convert_ids_to_tokens(out)
        assert not {"<|im_end|>", "<|end_of_text|>"} & set(text[:-1])
        last.add(text[-1])
    assert "<|im_end|>" in last  # the template's end of a turn, which is not the tokenizer's EOS
    answer = pipeline("text-generation", model=name)(CHAT, max_new_tokens=3)[0]["generated_text"][-1]
    assert answer["role"] == "assistant"


def test_an_adapter_loads_on_its_base_and_equals_the_merged_model(place: Path) -> None:
    folder = "lora/checkpoints/checkpoint-2"
    ids = torch.tensor([[9, 30, 31, 32, 33]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained("lora/model")(ids).logits
        by_peft = AutoPeftModelForCausalLM.from_pretrained(folder)(ids).logits
        by_transformers = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        base = AutoModelForCausalLM.from_pretrained("my_model")(ids).logits
    torch.testing.assert_close(by_peft, merged, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_transformers, merged, rtol=1e-5, atol=1e-6)
    assert (merged - base).abs().max() > 1e-3


def test_the_reward_model_scores_a_padded_batch_as_it_scores_rows(place: Path) -> None:
    model, report = AutoModelForSequenceClassification.from_pretrained("full/reward", output_loading_info=True)
    assert not any(report[key] for key in WRONG)
    tokenizer = AutoTokenizer.from_pretrained("full/reward")
    texts = ["one", "two words more"]
    with torch.no_grad():
        together = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        rows = [model(**tokenizer(text, return_tensors="pt")).logits for text in texts]
    assert together.shape == (2, 1)
    torch.testing.assert_close(together, torch.cat(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["full/model", "full/checkpoints/checkpoint-2", "full/reward", "lora/model"])
def test_no_folder_asks_for_remote_code(place: Path, name: str) -> None:
    assert not list((place / name).glob("*.py"))
    assert "auto_map" not in json.loads((place / name / "config.json").read_text())
