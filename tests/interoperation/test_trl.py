"""What isdaa writes is a start for TRL's trainers, as the policy, as the adapter and as the reward model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from interoperation_rows import MESSAGES
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 1,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
}


def first_log(trainer: Any) -> dict[str, float]:
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("name", ["full/model", "full/checkpoints/checkpoint-2", "lora/model"])
@pytest.mark.parametrize("peft", [False, True])
def test_dpo_goes_on_from_a_policy(place: Path, tmp_path: Path, name: str, peft: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(name)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer = DPOTrainer(
        model,
        args=DPOConfig(str(tmp_path), **COMMON),
        train_dataset=Dataset.from_list(MESSAGES),
        processing_class=AutoTokenizer.from_pretrained(name),
        peft_config=LoraConfig(r=2, target_modules="all-linear") if peft else None,
    )
    assert first_log(trainer)["loss"] == pytest.approx(math.log(2), abs=1e-4)  # policy and reference are the same yet
    after = {key: value for key, value in trainer.model.named_parameters() if "up_proj" in key}
    assert len(after) == (3 if peft else 1)
    moved = [key for key, value in after.items() if value.requires_grad and value.abs().sum() > 0]
    assert moved
    if not peft:
        assert not torch.equal(after["model.layers.0.mlp.up_proj.weight"], before)


def test_dpo_takes_a_checkpoint_by_its_path(place: Path, tmp_path: Path) -> None:
    data = Dataset.from_list(MESSAGES)
    trainer = DPOTrainer("full/model", args=DPOConfig(str(tmp_path), **COMMON), train_dataset=data)
    assert first_log(trainer)["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_the_reward_trainer_goes_on_from_the_reward_model(place: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained("full/reward")
    tokenizer = AutoTokenizer.from_pretrained("full/reward")
    rows = [row["prompt"] + row[side] for row in MESSAGES[:4] for side in ("chosen", "rejected")]
    ids = [tokenizer.apply_chat_template(row, return_tensors="pt", return_dict=True)["input_ids"] for row in rows]
    with torch.no_grad():
        scores = torch.cat([model(i).logits[:, 0] for i in ids]).view(4, 2)
    expected = -torch.nn.functional.logsigmoid(scores[:, 0] - scores[:, 1]).mean().item()
    args = RewardConfig(str(tmp_path), **COMMON, disable_dropout=True)
    trainer = RewardTrainer(model, args=args, train_dataset=Dataset.from_list(MESSAGES[:4]), processing_class=tokenizer)
    assert first_log(trainer)["loss"] == pytest.approx(expected, abs=1e-4)
