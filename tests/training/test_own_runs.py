"""Training goes on from the user's own runs alone; records travel, the places of this machine do not."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from chains import ALIGN, chat_model, config_file, jsonl, plain_pairs, refused, stopped_at, train

from isdaa import PreferenceConfig, PreferenceTrainer, adopt, preference_trainer
from isdaa.cli import main
from isdaa.errors import UserError
from isdaa.evaluation.checkpoints.what_to_evaluate import requests
from isdaa.files import write_json
from isdaa.foreign import read_json
from isdaa.record import ModelRecord, read_record, record_text, without_places
from isdaa.training.trainer.checkpoints import MANIFEST, check_own


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    chat_model(tmp_path / "my_model")
    jsonl(tmp_path / "pairs.jsonl", plain_pairs(12))
    return tmp_path


def test_a_run_of_another_machine_is_foreign_until_it_is_adopted(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ALIGN | {"align.save_steps": 1, "align.max_steps": 3}
    stopped_at(2, settings)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place / "another user"))
    command = ["train", "--config", "run.yaml", "--output_dir", "run"]
    before = {path: path.read_bytes() for path in Path("run").rglob("*.*") if path.is_file()}
    refused(capsys, command, "run: not a run of yours", "--adopt", "--output_dir")
    assert {path: path.read_bytes() for path in before} == before
    assert main([*command, "--adopt"]) == 0
    assert "yours now" in capsys.readouterr().err
    assert read_json("run/run.json")["stages"]["align"]["done"] and read_record("run/model").own


def test_a_run_that_is_moved_on_its_machine_stays_the_users(place: Path) -> None:
    settings = ALIGN | {"align.save_steps": 1, "align.max_steps": 3}
    stopped_at(2, settings)
    shutil.move("run", "moved")
    config_file(Path("moved.yaml"), settings)
    assert main(["train", "--config", "moved.yaml", "--output_dir", "moved"]) == 0
    assert requests(["moved"], {"scorer": "none"}).models


@pytest.mark.parametrize("change", ["stages", "optimiser", "manifest"])
def test_what_another_hand_changed_is_not_gone_on_from(place: Path, capsys: pytest.CaptureFixture[str], change: str) -> None:
    settings = ALIGN | {"align.save_steps": 1, "align.max_steps": 3}
    stopped_at(2, settings)
    checkpoint = Path("run/checkpoints/checkpoint-2")
    if change == "stages":
        state = read_json("run/run.json")
        state["stages"]["align"]["done"] = True
        write_json("run/run.json", state)
    else:
        (checkpoint / "optimizer.pt").write_bytes(b"another")
        listed = read_json(checkpoint / MANIFEST)
        if change == "manifest":  # that agrees with the file, as anyone can make it
            from isdaa.training.trainer.checkpoints import write_manifest

            write_manifest(checkpoint, own=False)
            assert read_json(checkpoint / MANIFEST)["files"] != listed["files"]
    status = train("run", settings)
    if change == "optimiser":  # damage: an earlier checkpoint serves
        assert status == 0
        return
    assert status == 2
    assert "not a " in (said := capsys.readouterr().err) and "adopt" in said


def test_a_script_goes_on_from_its_own_checkpoints_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer(steps: int) -> PreferenceTrainer:
        args = PreferenceConfig("out", max_steps=steps, save_steps=1, use_cpu=True, max_length=200, report_to="none")
        return preference_trainer("my_model", args=args, train_dataset=plain_pairs(12))

    trainer(1).train()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place / "another user"))
    for start in (True, "out/checkpoint-1"):
        with pytest.raises(UserError, match="checkpoint-1: not a checkpoint of yours"):
            trainer(2).train(resume_from_checkpoint=start)
    adopt("out")
    trainer(2).train(resume_from_checkpoint=True)
    (place / "out/checkpoint-2" / MANIFEST).unlink()
    with pytest.raises(UserError, match="not a checkpoint of yours") as caught:
        trainer(3).train(resume_from_checkpoint="out/checkpoint-2")
    words = shlex.split(str(caught.value).partition("if you trust it: ")[2])
    exec(words[2])  # what the error prints, also of a checkpoint that another trainer wrote
    assert trainer(3).train(resume_from_checkpoint="out/checkpoint-2").global_step == 3


def test_what_an_error_says_of_a_checkpoint_behind_a_link_works(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's checkpoints may lie on another disk."""
    stopped_at(2, ALIGN | {"align.save_steps": 1, "align.max_steps": 3})
    shutil.move("run/checkpoints", "disk")
    Path("run/checkpoints").symlink_to("../disk")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place / "another user"))
    adopt("run")
    for checkpoint in Path("run/checkpoints").iterdir():
        with pytest.raises(UserError, match="not a checkpoint of yours") as caught:
            check_own(checkpoint)
        exec(shlex.split(str(caught.value).partition("if you trust it: ")[2])[2])
        check_own(checkpoint)
    assert main(["train", "--config", "run.yaml", "--output_dir", "run"]) == 0


def strings(value: Any) -> list[str]:
    """Every text in nested data, keys included."""
    if isinstance(value, dict):
        return [text for key, inner in value.items() for text in [key, *strings(inner)]]
    return [text for inner in value for text in strings(inner)] if isinstance(value, list) else [str(value)]


def test_a_record_holds_no_absolute_path(place: Path) -> None:
    absolute = {"model.path": str(place / "my_model"), "data.pairs": str(place / "pairs.jsonl"), "align.max_steps": 1}
    absolute |= {"reference.path": str(place / "my_model"), "reference.cache_dir": str(place / "cache")}
    absolute |= {"data.evaluation": str(place / "pairs.jsonl"), "evaluation.scorer": str(place / "gone")}
    assert train(place / "run", ALIGN | absolute) == 0
    for file in place.rglob("isdaa.json"):
        wrong = [text for text in strings(read_json(file)) if text.startswith(("/", "~")) or str(place) in text]
        assert not wrong, file
    record = read_record(place / "run/model")
    assert record is not None
    assert (record.reference, record.evaluation) == (str(place / "my_model"), str(place / "pairs.jsonl"))
    assert record.config["data"]["pairs"] == "pairs.jsonl"


@pytest.mark.parametrize("source", ["hh:{}/set", "{}/set:part", "hh:{}/set:part", "{}/gone", "hh:{}/gone"])
def test_sources_of_several_parts_travel_with_their_record(place: Path, source: str) -> None:
    (place / "set" / "part").mkdir(parents=True)
    (place / "run" / "model").mkdir(parents=True)
    named = source.format(place)
    text = record_text(ModelRecord("policy", {"data": {"evaluation": named}}, evaluation=named), place / "run/model")
    assert str(place) not in text
    (place / "run/model/isdaa.json").write_text(text)
    record = read_record("run/model")
    assert record is not None
    assert record.evaluation == (named if "gone" not in source else json.loads(text)["evaluation"])


def test_words_of_a_template_are_no_places() -> None:
    given = {"tokenization": {"chat_template_kwargs": {"suffix": "/no_think"}}, "model": {"path": "~/m", "random": {"x": "/a"}}}
    assert without_places(given) == {**given, "model": {"path": "m", "random": {"x": "/a"}}}
