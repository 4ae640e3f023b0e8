"""Full fine-tuning that starts from an adapter's folder: the very training that starts from the model merged by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import (
    ALIGN,
    chat_model,
    jsonl,
    plain_pairs,
    read_lines,
    refused,
    same_weights,
    stopped_at,
    train,
    weights,
    without_time,
)
from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from isdaa import PreferenceConfig, preference_trainer
from isdaa.errors import UserError
from isdaa.files import write_json
from isdaa.foreign import read_json
from isdaa.models.loading import add_lora, load_model, load_sequence_classifier, save_model

LORA: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 2}
KINDS: dict[str, PeftConfig] = {
    "lora": LoraConfig(**LORA, target_modules=["q_proj", "down_proj"]),
    "dora": LoraConfig(**LORA, target_modules=["q_proj", "v_proj"], use_dora=True),
    "saved": LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "tied": LoraConfig(**LORA, target_modules=["q_proj", "embed_tokens"]),
    "resized": LoraConfig(**LORA, target_modules=["q_proj"]),
}
SFT = {"stages": ["sft"], "data.sft": "sft.jsonl", "sft.max_steps": 2, "sft.batch_size": 4, "sft.learning_rate": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and for each kind its adapter and `KIND-merged`, which PEFT alone has made of it."""
    home = tmp_path_factory.mktemp("adapters")
    for kind, config in KINDS.items():
        base = home / f"{kind}-base"
        chat_model(base, tie_word_embeddings=kind == "tied")
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        if kind == "resized":
            model.resize_token_embeddings(model.config.vocab_size + 5)
        model = get_peft_model(model, config)
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(home / kind)
        if kind == "tied":  # peft would change the head with the embedding
            model.base_model.model.lm_head.weight = torch.nn.Parameter(model.base_model.model.lm_head.weight.detach().clone())
        model.merge_and_unload().save_pretrained(home / f"{kind}-merged")
        AutoTokenizer.from_pretrained(base).save_pretrained(home / f"{kind}-merged")
    return home


@pytest.fixture
def place(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    jsonl(tmp_path / "pairs.jsonl", plain_pairs(12))
    jsonl(tmp_path / "sft.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in plain_pairs(12)])
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_alignment_trains_all_weights_as_from_the_model_merged_by_hand(place: Path, kind: str) -> None:
    assert train("run", ALIGN | {"model.path": kind}) == 0
    assert train("other", ALIGN | {"model.path": f"{kind}-merged"}) == 0
    assert same_weights(Path("run/model"), Path("other/model"))
    assert without_time(Path("run/metrics.jsonl")) == without_time(Path("other/metrics.jsonl"))
    before, after = weights(Path(f"{kind}-merged")), weights(Path("run/model"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert not list(Path("run/model").glob("adapter*"))
    assert abs(read_lines(Path("run/metrics.jsonl"))[0]["start/drift_rms"]) < 1e-3, "the reference is the merged model"
    record = json.loads(Path("run/model/isdaa.json").read_text())
    assert Path("run/model", record["reference"]).resolve() == Path(kind).resolve()
    assert "LoRA" not in Path("run/model/README.md").read_text()


def test_fine_tuning_does_too(place: Path) -> None:
    for name, path in (("run", "lora"), ("other", "lora-merged")):
        assert train(name, ALIGN | SFT | {"model.path": path}) == 0
    assert same_weights(Path("run/sft"), Path("other/sft"))
    before, after = weights(Path("lora-merged")), weights(Path("run/sft"))
    assert all(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["lora", "saved", "resized"])
def test_a_reward_model_starts_from_the_merged_weights(place: Path, kind: str) -> None:
    for name, path in (("run", kind), ("other", f"{kind}-merged")):
        settings = ALIGN | {"stages": ["reward"], "reward.max_steps": 2, "reward.batch_size": 4, "model.path": path}
        assert train(name, settings) == 0
    assert same_weights(Path("run/reward"), Path("other/reward"))


def test_a_resume_goes_on_with_the_same_weights(place: Path) -> None:
    settings = ALIGN | {"model.path": "lora", "align.save_steps": 1, "align.max_steps": 3}
    assert train("whole", settings) == 0
    stopped_at(2, settings)
    assert train("run", settings) == 0
    assert same_weights(Path("run/model"), Path("whole/model"))


def test_reference_and_behaviour_may_be_adapters(place: Path) -> None:
    shared = ALIGN | {"model.path": "lora-base", "objective.method": "is_dpo"}
    for name, path in (("run", "lora"), ("other", "lora-merged")):
        assert train(name, shared | {"reference.path": path, "behaviour.model_path": path}) == 0
    assert same_weights(Path("run/model"), Path("other/model"))


def test_labels_are_drawn_from_the_merged_model(place: Path) -> None:
    jsonl(place / "prompts.jsonl", [{"prompt": row["prompt"]} for row in plain_pairs(6)])
    rewards = load_sequence_classifier("lora-base", new_head=True, pad_id=0)
    save_model(rewards, AutoTokenizer.from_pretrained("lora-base"), "scorer")
    settings = {key: value for key, value in ALIGN.items() if key != "data.pairs"}
    settings |= {"stages": ["label"], "data.prompts": "prompts.jsonl", "label.scorer": "scorer", "label.max_new_tokens": 4}
    for name, path in (("run", "lora"), ("other", "lora-merged")):
        assert train(name, settings | {"model.path": path}) == 0
    assert read_lines(Path("run/pairs/train.jsonl")) == read_lines(Path("other/pairs/train.jsonl"))


def test_a_script_that_names_the_folder_trains_all_weights(place: Path) -> None:
    for name, path in (("out", "lora"), ("other", "lora-merged")):
        args = PreferenceConfig(name, max_steps=1, per_device_train_batch_size=4, learning_rate=1e-3, save_strategy="steps",
                                save_steps=1, max_length=200, report_to="none", bf16=False,
                                use_cpu=True)  # fmt: skip
        preference_trainer(path, args=args, train_dataset=plain_pairs(8)).train()
    assert same_weights(Path("out/checkpoint-1"), Path("other/checkpoint-1"))
    record = json.loads(Path("out/checkpoint-1/isdaa.json").read_text())
    assert Path("out/checkpoint-1", record["reference"]).resolve() == Path("lora").resolve()
    model = load_model("lora")
    assert model.config._name_or_path == "lora", "the reference of one that is given in memory is the merged model, too"
    by_hand = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("lora-base"), "lora").merge_and_unload()
    with pytest.raises(UserError, match=r"merge_and_unload\(\) call model\.requires_grad_\(True\)"):
        preference_trainer(
            by_hand,
            args=args,
            train_dataset=plain_pairs(8),
            processing_class=AutoTokenizer.from_pretrained("lora-base"),
        )


def test_a_new_adapter_on_an_old_one_is_as_before(place: Path) -> None:
    lora = {"lora.rank": 2, "lora.alpha": 4}
    for name, path in (("run", "lora"), ("other", "lora-merged")):
        assert train(name, ALIGN | lora | {"model.path": path}) == 0
    assert same_weights(Path("run/model"), Path("other/model"))


def test_what_cannot_be_merged_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained("lora-base"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    model.save_pretrained("prompt")
    for number, changes in enumerate(({}, SFT)):
        assert train(f"run{number}", ALIGN | changes | {"model.path": "prompt"}) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error == "isdaa: error: prompt: an adapter of type PROMPT_TUNING cannot be merged into a model's weights"
    refused(capsys, ["evaluate", "--model_path", "prompt", "--reference", "lora-base", "--data", "pairs.jsonl"], "PROMPT_TUNING")


def test_an_adapter_that_lacks_the_head_of_its_larger_vocabulary_is_refused(place: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = place / "lacking"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(Path("resized/adapter_config.json").read_text())
    found = load_file("resized/adapter_model.safetensors")
    del found["base_model.model.lm_head.weight"]
    save_file(found, adapter / "adapter_model.safetensors")
    with pytest.raises(
        UserError, match="lacking: the adapter was trained with a vocabulary of 423 tokens, the base model has 418"
    ):
        load_model(adapter)


def test_an_adapter_stays_beside_quantised_weights(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "is_quantized", True, raising=False)
    model = load_model("lora")
    assert isinstance(model, PeftModel)
    with pytest.raises(UserError, match="lora: the model has quantised weights and an adapter already"):
        add_lora(model, rank=2)
    with pytest.raises(UserError, match=r"the trained adapter: quantised weights cannot take it in; save it .*\(merge=False\)"):
        save_model(model, AutoTokenizer.from_pretrained("lora-base"), "merged")


def test_a_freshly_merged_folder_of_ours_starts_training(place: Path) -> None:
    save_model(add_lora(load_model("lora"), rank=2), AutoTokenizer.from_pretrained("lora-base"), "ours")
    assert {parameter.requires_grad for parameter in load_model("ours").parameters()} == {True}


def test_an_adapter_that_lacks_weights_or_whose_base_has_no_possible_name_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("lora", "half")
    tensors = load_file("half/adapter_model.safetensors")
    save_file({name: value for name, value in tensors.items() if "lora_B" not in name}, "half/adapter_model.safetensors")
    command = ["logps", "--data", "pairs.jsonl", "--output", "l.jsonl", "--model_path", "half"]
    with pytest.raises(UserError, match=r"half: the adapter does not fit.*missing adapter keys.*lora_B"):
        load_model("half")
    for name in ("my model", "a/b c"):
        write_json("half/adapter_config.json", read_json("half/adapter_config.json") | {"base_model_name_or_path": name})
        refused(capsys, command, f'"{name}": no such folder here')
