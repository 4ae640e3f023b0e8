"""`PreferenceConfig` and `preference_trainer`: every name of TRL's has its answer, every mistake one line."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import ALIGN, ROOT, train
from datasets import Dataset
from interoperation_rows import MESSAGES
from peft import LoraConfig
from transformers import AutoModelForCausalLM, HfArgumentParser
from trl import DPOConfig

from isdaa import PreferenceConfig, PreferenceTrainer, preference_trainer
from isdaa.cli import main
from isdaa.config import fields as config_fields
from isdaa.errors import UserError
from isdaa.training.trainer import reference_logps
from isdaa.training.trl_api.preference_config import DEFAULT_ALONE, GONE

MIGRATING = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
OURS = {f.name: f for f in fields(PreferenceConfig) if f.init}
THEIRS = {f.name: f for f in fields(DPOConfig) if f.init}
SMALL: dict[str, Any] = {"use_cpu": True, "bf16": False, "max_steps": 1, "logging_steps": 1, "save_steps": 1, "max_length": 200}


def section(title: str) -> str:
    return MIGRATING.partition(f"### {title}\n")[2].partition("\n##")[0]


def table(title: str) -> dict[str, str]:
    return dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section(title), re.MULTILINE))


def test_every_field_of_dpo_config_has_its_place_in_the_document() -> None:
    same = set(re.findall(r"`([a-z0-9_]+)`", section("Under the same name")))
    differs = set(table("Under the same name, but"))
    gone = table("Under another name, needless, or not offered")
    alone = table("With their default alone")
    assert not (same & differs) and not ((same | differs) & (gone.keys() | alone.keys()))
    assert same | differs | gone.keys() | alone.keys() == THEIRS.keys()
    assert gone == GONE
    assert alone == {name: why for name, why in DEFAULT_ALONE.items() if name in THEIRS}
    assert same | differs | alone.keys() == THEIRS.keys() & OURS.keys()
    assert not GONE.keys() & OURS.keys()


def test_defaults_are_those_of_dpo_config() -> None:
    theirs, ours = DPOConfig("out", use_cpu=True), PreferenceConfig("out", use_cpu=True)
    always = {"average_tokens_across_devices", "remove_unused_columns", "label_smoothing", "gradient_checkpointing_kwargs"}
    always |= {"activation_checkpointing_kwargs"}
    for name in THEIRS.keys() & OURS.keys() - always:
        assert str(getattr(ours, name)) == str(getattr(theirs, name)), name
    assert ours.objective_arguments() == {**ours.objective_arguments(), "loss": "logistic", "weight": "none", "beta": 0.1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without an accelerator")
def test_bf16_is_off_where_no_accelerator_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert PreferenceConfig("out").bf16 is False
    assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(UserError, match="bf16=True, and there is no accelerator here that has it") as caught:
        PreferenceConfig("out", bf16=True)
    assert "\n" not in str(caught.value)
    # TRL's own word for the CPU leaves it on there, as in DPOConfig; what is said is said only of the default.
    assert PreferenceConfig("out", use_cpu=True).bf16 is True
    assert PreferenceConfig("out", bf16=False).bf16 is False
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(GONE))
def test_a_name_of_trls_that_is_none_here_says_what_to_write(name: str) -> None:
    with pytest.raises(UserError) as caught:
        PreferenceConfig("out", use_cpu=True, **{name: True})
    assert name in str(caught.value)
    assert GONE[name] in str(caught.value)
    assert "docs/migrating.md" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("lr", "learning_rate"), ("batch_size", "per_device_train_batch_size"), ("epochs", "num_train_epochs"), ("bta", "beta")],
)
def test_a_name_of_nobody_s_is_answered_with_the_one_that_is_meant(name: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf'unknown argument {name} \(did you mean "{meant}"\?\)'):
        PreferenceConfig("out", use_cpu=True, **{name: 1})


OTHER_VALUES = {
    "label_smoothing_factor": 0.1,
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "liger_kernel_config": {"rope": True},
    "neftune_noise_alpha": 5.0,
    "torch_empty_cache_steps": 4,
    "include_num_input_tokens_seen": "all",
    "eval_do_concat_batches": False,
    "eval_accumulation_steps": 4,
    "include_for_metrics": ["loss"],
    "metric_for_best_model": "loss",
    "accelerator_config": {"split_batches": True},
    "parallelism_config": object(),
    "dataloader_prefetch_factor": 2,
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_in_order": False,
    "label_names": ["labels"],
    "train_sampling_strategy": "sequential",
    "length_column_name": "tokens",
}


@pytest.mark.parametrize("name", sorted(DEFAULT_ALONE.keys() & THEIRS.keys()))
def test_what_would_be_ignored_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} must keep its default"):
        PreferenceConfig("out", use_cpu=True, **{name: OTHER_VALUES.get(name, True)})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lerning_rate": 1}, ["lerning_rate", "learning_rate"]),
        ({"method": "dop"}, ["method", "dop", "dpo"]),
        ({"method": "slic", "label_smoothing": 0.1}, ["label_smoothing", "logistic"]),
        ({"beta": -1.0}, ["beta", "-1"]),
        ({"truncation": "middle"}, ["truncation", "keep_end"]),
        ({"save_strategy": "best", "metric_for_best_model": None}, ["save_strategy", "guard"]),
    ],
)
def test_mistakes_in_arguments(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        PreferenceConfig("out", use_cpu=True, **given)
    for word in words:
        assert word in str(caught.value)


def test_no_clip_is_infinite_and_a_method_keeps_its_own_settings() -> None:
    settings = PreferenceConfig("out", use_cpu=True, method="is_rpo", clip_eps=float("inf"), beta=0.02).objective_arguments()
    assert (settings["clip_eps"], settings["weight"], settings["sft_coefficient"]) == (None, "importance", 0.005)
    assert settings["beta"] == 0.02


def test_the_arguments_can_be_a_command_line() -> None:
    line = "--output_dir out --use_cpu --method is_dpo --beta 0.05 --clip_eps inf --learning_rate 1e-4 --hub_model_id me/mine"
    (args,) = HfArgumentParser(PreferenceConfig).parse_args_into_dataclasses(line.split())
    assert (args.method, args.beta, args.learning_rate, args.hub_model_id) == ("is_dpo", 0.05, 1e-4, "me/mine")
    assert args.objective_arguments()["clip_eps"] is None


def test_the_axolotl_table_names_keys_that_exist() -> None:
    known = {name for name, _, _ in config_fields()}
    rows = MIGRATING.partition("## An Axolotl configuration")[2].partition("\n## ")[0]
    sections = "|".join(sorted({name.split(".")[0] for name in known}))
    named = re.findall(rf"`((?:{sections})\.\w+)", rows)
    assert len(named) > 30
    assert not set(named) - known


# --- preference_trainer


def arguments(**given: Any) -> PreferenceConfig:
    return PreferenceConfig("out", **(SMALL | given))


def trained(model: Any, folder: Path, **given: Any) -> PreferenceTrainer:
    own = {key: given.pop(key) for key in ("ref_model", "behaviour_model", "peft_config", "eval_dataset") if key in given}
    args = PreferenceConfig(str(folder), **(SMALL | given))
    trainer = preference_trainer(model, args=args, train_dataset=Dataset.from_list(MESSAGES), **own)
    trainer.train()
    return trainer


def test_a_model_by_name_needs_nothing_else_and_its_checkpoint_can_be_evaluated(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trained(
        "my_model", tmp_path / "out", method="is_dpo", eval_dataset=MESSAGES[:3], eval_strategy="steps", eval_steps=1
    )
    assert isinstance(trainer, PreferenceTrainer)
    assert "12 of 12 rows kept" in capsys.readouterr().err
    assert "eval_loss" in {key for entry in trainer.state.log_history for key in entry}
    checkpoint = tmp_path / "out" / "checkpoint-1"
    record = json.loads((checkpoint / "isdaa.json").read_text())
    assert record["config"]["objective"]["method"] == "is_dpo"
    assert record["config"]["tokenization"]["max_length"] == 200
    assert record["step"] == 1
    assert (checkpoint / record["reference"]).resolve() == place / "my_model"
    options = "--evaluation.prompts 3 --evaluation.max_new_tokens 4 --evaluation.opponent_samples 1 --evaluation.bootstrap 100"
    command = ["evaluate", "--model_path", str(checkpoint), "--data", "pairs.jsonl", "--output", str(tmp_path / "found")]
    assert main([*command, *options.split()]) == 0
    assert json.loads((tmp_path / "found" / "metrics.json").read_text())["models"][0]["kl"]["mean"] >= 0


def test_resuming_gives_what_an_uninterrupted_run_gives(place: Path, tmp_path: Path) -> None:
    given = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 3}
    whole = trained("my_model", tmp_path / "whole", **given)
    trained("my_model", tmp_path / "part", **(given | {"max_steps": 2}))
    args = PreferenceConfig(str(tmp_path / "part"), **(SMALL | given))
    again = preference_trainer("my_model", args=args, train_dataset=MESSAGES)
    again.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == [1, 2, 3]
    for (name, one), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_an_adapter_that_the_policy_carries_belongs_to_the_reference(place: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained("my_model")
    model = PeftModel.from_pretrained(base, "lora/checkpoints/checkpoint-2", is_trainable=True)
    trainer = trained(model, tmp_path / "out")
    assert trainer.state.log_history[0]["start/drift_max"] < 1e-4
    record = json.loads((tmp_path / "out" / "checkpoint-1" / "isdaa.json").read_text())
    assert record["reference"] is None  # no folder holds it


def test_another_behaviour_model_is_in_the_weights_alone(place: Path, tmp_path: Path) -> None:
    plain = trained("my_model", tmp_path / "a", method="is_dpo").state.log_history[0]
    other = trained("my_model", tmp_path / "b", method="is_dpo", behaviour_model="full/model").state.log_history[0]
    assert abs(plain["weights/log_weight_mean"]) < 1e-4 < abs(other["weights/log_weight_mean"])
    assert plain["rewards/margin"] == other["rewards/margin"]


def test_isdaa_train_and_preference_trainer_find_each_others_logps(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = str(tmp_path / "kept")
    settings = ALIGN | {"data.eval_fraction": 0.0, "reference.cache_dir": kept, "reference.path": "full/model"}
    assert train(tmp_path / "run", settings) == 0
    files = {path.name for path in Path(kept).glob("logps-*")}

    def computed(*given: object) -> None:
        raise AssertionError("logps were computed again")

    monkeypatch.setattr(reference_logps, "computed_logps", computed)
    given = {"max_length": 200, "max_prompt_length": 120, "reference_cache_dir": kept}
    trained("my_model", tmp_path / "out", ref_model="full/model", **given)
    assert {path.name for path in Path(kept).glob("logps-*")} == files


def test_a_named_reference_of_another_tokenizer_is_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree("my_model", tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="the reference model must share the policy's tokenizer; name another reference"):
        trained("my_model", tmp_path / "out", ref_model=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train_dataset": None}, ["train_dataset"]),
        ({"train_dataset": {"a": MESSAGES}}, ["train_dataset", "dict"]),
        ({"train_dataset": Dataset.from_list([{**row, "images": ["a.png"]} for row in MESSAGES])}, ["train_dataset:1", "images"]),
        ({"train_dataset": [{"prompt": "a", "chosen": "b"}]}, ["train_dataset:1", "rejected"]),
        ({"args": DPOConfig("out", use_cpu=True)}, ["DPOConfig", "PreferenceConfig"]),
        ({"model": "no/such/model"}, ["no/such/model"]),
        (
            {"args": PreferenceConfig("out", **SMALL, model_init_kwargs={"load_in_8bit": True})},
            ["model_init_kwargs", "load_in_8bit"],
        ),
        (
            {"args": PreferenceConfig("out", **(SMALL | {"max_length": 20}), max_prompt_length=20)},
            ["max_prompt_length", "max_length"],
        ),
    ],
)
def test_mistakes_in_what_is_trained(place: Path, given: dict[str, Any], words: list[str]) -> None:
    call = {"model": "my_model", "args": arguments(), "train_dataset": MESSAGES} | given
    with pytest.raises(UserError) as caught:
        preference_trainer(call.pop("model"), **call)
    for word in words:
        assert word in str(caught.value)


def test_keys_of_isdaa_train_are_said_as_arguments(place: Path) -> None:
    rows = [row | {"behaviour_chosen_logps": -0.5, "behaviour_rejected_logps": -0.5} for row in MESSAGES]
    with pytest.raises(UserError, match="almost nothing would be learnt") as caught:
        preference_trainer("my_model", args=arguments(method="is_dpo"), train_dataset=rows)
    assert "(`isdaa logps`, behaviour_model)" in str(caught.value)
    assert "method='dpo'" in str(caught.value) and str(caught.value).endswith("or allow_stall=True")
    assert "objective." not in str(caught.value)
    trainer = preference_trainer("my_model", args=arguments(method="is_dpo", allow_stall=True), train_dataset=rows)
    assert isinstance(trainer, PreferenceTrainer)


def test_a_frozen_model_a_shared_one_and_an_adapter_twice(place: Path) -> None:
    from peft import PeftModel

    args = arguments()
    model = AutoModelForCausalLM.from_pretrained("my_model")
    with pytest.raises(UserError, match="ref_model: the policy itself"):
        preference_trainer(model, model, args, train_dataset=MESSAGES)
    adapted = PeftModel.from_pretrained(model, "lora/checkpoints/checkpoint-2")
    with pytest.raises(UserError, match="carries an adapter already"):
        preference_trainer(adapted, args=args, train_dataset=MESSAGES, peft_config=LoraConfig(r=2))
    with pytest.raises(UserError, match="no parameter of it can be trained"):
        preference_trainer(adapted, args=args, train_dataset=MESSAGES)
    assert all(not torch.isnan(p).any() for p in model.parameters())
