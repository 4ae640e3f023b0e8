"""The Trainer's own options upload a checkpoint with this project's card, and nothing that is nobody's business.

The upload is real: `huggingface_hub` speaks HTTP to a Hub on this machine (`fake_hub.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub
from interoperation_rows import MESSAGES
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_layout import model_defects

from isdaa import PreferenceConfig, preference_trainer
from isdaa.training.trainer.checkpoints import defect

SECRET = "hf_NobodyShallReadThis"
MODEL = {
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "README.md", "isdaa.json"),
}
ADAPTER = MODEL - {"config.json", "generation_config.json", "model.safetensors"} | {
    "adapter_config.json",
    "adapter_model.safetensors",
}
STATES = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "isdaa_manifest.json"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    import huggingface_hub.constants as constants
    import transformers.utils.hub

    found = FakeHub()
    server = found.start()
    monkeypatch.setattr(constants, "ENDPOINT", found.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    yield found
    server.shutdown()
    server.server_close()


def pushed(folder: Path, **given: Any) -> Any:
    settings = {"max_steps": 2, "save_steps": 1, "use_cpu": True, "bf16": False, "learning_rate": 1e-2, "max_length": 200}
    settings |= {"push_to_hub": True, "hub_model_id": "me/mine", "hub_token": SECRET, "hub_always_push": True}
    peft_config = given.pop("peft_config", None)
    args = PreferenceConfig(str(folder), **(settings | given))
    trainer = preference_trainer("my_model", args=args, train_dataset=MESSAGES, peft_config=peft_config)
    trainer.train()
    return trainer


def unpacked(files: dict[str, bytes], folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def nothing_secret(files: dict[str, bytes], tmp_path: Path) -> None:
    for name, data in files.items():
        assert SECRET.encode() not in data, name
        assert str(tmp_path).encode() not in data, name
        assert name.rpartition("/")[2] != "training_args.bin"


def test_checkpoints_go_up_while_it_trains_and_the_model_at_the_end(place: Path, hub: FakeHub, tmp_path: Path) -> None:
    trainer = pushed(tmp_path / "out", hub_private_repo=True)
    assert [commit.message for commit in hub.commits] == [f"Training in progress, step {step}" for step in (1, 2)]
    trainer.push_to_hub(dataset_name="what TRL's card would be told")
    assert hub.commits[-1].message == "End of training"
    assert hub.repositories[0]["visibility"] == "private"
    assert {commit.repository for commit in hub.commits} == {"me/mine"}
    assert hub.tokens == {SECRET}  # in the header, where it belongs
    for commit in hub.commits:
        assert commit.files.keys() <= MODEL
        nothing_secret(commit.files, tmp_path)
    content = hub.content()
    assert content.keys() == MODEL
    card = content["README.md"].decode()
    assert "## Method: `dpo`" in card
    assert "Preference alignment with isdaa, optimiser step 2." in card
    assert json.loads(content["isdaa.json"])["step"] == 2
    folder = unpacked(content, tmp_path / "downloaded")
    assert model_defects(folder, "<|im_end|>") == []
    assert AutoTokenizer.from_pretrained(folder).chat_template
    for name, tensor in AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
        torch.testing.assert_close(tensor, trainer.model.state_dict()[name], rtol=0, atol=0)
    assert not list((tmp_path / "out").glob(".pushing-*"))
    assert not list((tmp_path / "out").rglob("training_args.bin"))


def test_the_strategy_is_the_trainers(place: Path, hub: FakeHub, tmp_path: Path) -> None:
    pushed(tmp_path / "end", hub_strategy="end")
    assert hub.commits == []
    pushed(tmp_path / "all", hub_strategy="all_checkpoints", save_total_limit=1)
    names = hub.content().keys()
    expected = {f"checkpoint-{step}/{name}" for step in (1, 2) for name in MODEL | STATES}
    assert names == MODEL | expected
    nothing_secret(hub.content(), tmp_path)
    assert defect(unpacked(hub.content(), tmp_path / "fetched") / "checkpoint-2") is None  # training could go on from it
    hub.commits.clear()
    pushed(tmp_path / "last", hub_strategy="checkpoint")
    assert hub.content().keys() == MODEL | {f"last-checkpoint/{name}" for name in MODEL | STATES}


def test_an_adapter_goes_up_alone(place: Path, hub: FakeHub, tmp_path: Path) -> None:
    trainer = pushed(tmp_path / "out", peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer.save_model()
    assert hub.commits[-1].message == "Model save"
    assert hub.content().keys() == ADAPTER
    assert json.loads(hub.content()["adapter_config.json"])["base_model_name_or_path"] == "my_model"
    nothing_secret(hub.content(), tmp_path)


def test_the_fake_hub_would_show_a_secret(place: Path, hub: FakeHub, tmp_path: Path) -> None:
    # transformers' own way takes the arguments along, pickled, token and all.
    from transformers import Trainer

    trainer = pushed(tmp_path / "out", hub_strategy="end")
    trainer.hub_model_id = "me/other"
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    trainer.args.hub_strategy = type(trainer.args.hub_strategy)("every_save")
    Trainer._push_from_checkpoint(trainer, checkpoint)
    trainer._finish_current_push()
    with pytest.raises(AssertionError):
        nothing_secret(hub.content(), tmp_path)
