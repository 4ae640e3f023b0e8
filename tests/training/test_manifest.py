"""A model that its own manifest calls damaged is read by no command, whatever way leads to it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chains import ALIGN, chat_model, jsonl, plain_pairs, refused, train

from isdaa import manifest
from isdaa.cli import main
from isdaa.errors import UserError
from isdaa.files import current_umask
from isdaa.manifest import MANIFEST, check_manifest, defect, write_manifest
from isdaa.models.loading import add_lora, load_model, load_sequence_classifier, load_tokenizer, save_model

CHAIN = ALIGN | {
    "stages": ["sft", "reward", "align"],
    "data.sft": "sft.jsonl",
    **{f"{stage}.max_steps": 2 for stage in ("sft", "reward", "align")},
    **{f"{stage}.batch_size": 4 for stage in ("sft", "reward", "align")},
    "align.save_steps": 1,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`: sft, reward and align; `run/checkpoints` has two steps."""
    folder = tmp_path_factory.mktemp("manifest")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        chat_model(folder / "my_model")
        jsonl(folder / "pairs.jsonl", plain_pairs(12))
        jsonl(folder / "sft.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in plain_pairs(12)])
        assert train("run", CHAIN) == 0
    return folder


@pytest.fixture
def place(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flip(path: Path) -> None:
    """Change one bit, as a disk would: neither size nor time of change say it."""
    facts = path.stat()
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "changed": (lambda folder: flip(folder / "model.safetensors"), "model.safetensors is damaged"),
    "cut": (lambda folder: os.truncate(folder / "model.safetensors", 100), "model.safetensors has 100 bytes instead of"),
    "missing": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "edited": (lambda folder: (folder / "generation_config.json").write_text("{}"), "generation_config.json has 2 bytes"),
    "hostile": (
        lambda folder: (folder / MANIFEST).write_text(json.dumps({"files": {"../../run.json": {}}})),
        "lists ../../run.json, which is outside of it",
    ),
    "odd": (lambda folder: (folder / MANIFEST).write_text('{"files": 3}'), "is not readable"),
}
EVALUATE = ["evaluate", "--data", "run/eval_pairs.jsonl", "--reference", "my_model", "--scorer", "none", "--model_path"]
REPORT = ["report", "--data", "run/eval_pairs.jsonl", "--reference", "my_model"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_evaluate_refuses_it_as_a_path_and_in_a_run(damage: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, said = DAMAGE[damage]
    spoil(place / "run/checkpoints/checkpoint-1")
    for path in ("run/checkpoints/checkpoint-1", "run"):
        error = refused(capsys, [*EVALUATE, path], "run/checkpoints/checkpoint-1: not the model that was written", said)
        assert f"if the change was meant, remove run/checkpoints/checkpoint-1/{MANIFEST}" in error
    assert not (place / "run/evaluation/samples.jsonl").exists(), "nothing was computed before"


def test_every_other_command_refuses_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (requirements-dev.txt has it)")
    flip(place / "run/checkpoints/checkpoint-1/model.safetensors")
    spoilt, said = "run/checkpoints/checkpoint-1", "model.safetensors is damaged"
    refused(capsys, ["report", "run"], said)
    refused(capsys, [*REPORT, "--checkpoints", spoilt, "run/model"], said)
    refused(capsys, ["tax", "arc_easy", "--model_path", spoilt, "--reference", "my_model"], said)
    refused(capsys, ["tax", "arc_easy", "--model_path", "run/model", "--reference", spoilt], said)
    benchmark = ["benchmark", "tldr", "--questions", "pairs.jsonl", "--judge", "run/reward", "--output", "b"]
    refused(capsys, [*benchmark, "--model_path", spoilt], said)
    refused(capsys, ["logps", "--model_path", spoilt, "--data", "pairs.jsonl", "--output", "l.jsonl"], said)
    refused(capsys, ["evaluate", "--model_path", "run/model", "--reference", spoilt, "--data", "pairs.jsonl"], said)
    for key in ("model.path", "reference.path", "behaviour.model_path", "model.tokenizer"):
        capsys.readouterr()
        assert train(key, ALIGN | {key: spoilt}) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_report_does_not_speak_of_it_as_it_was(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*EVALUATE, "run", "--evaluation.prompts", "2", "--evaluation.max_new_tokens", "2"]) == 0
    assert main(["report", "run"]) == 0
    flip(place / "run/checkpoints/checkpoint-1/model.safetensors")
    refused(capsys, ["report", "run"], "run/checkpoints/checkpoint-1: not the model", "model.safetensors is damaged")


def test_models_of_finished_stages_have_a_manifest_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("sft", "reward", "model"):
        assert defect(place / "run" / name) is None
        (place / "run" / name / "README.md").write_text("# My own words\n")
        (place / "run" / name / "metrics.jsonl").unlink(missing_ok=True)
        assert defect(place / "run" / name) is None, "a card is there to be edited, and a log is no part of the model"
    flip(place / "run/reward/model.safetensors")
    refused(capsys, [*EVALUATE[:-3], "--scorer", "run/reward", "--model_path", "run/model"], "run/reward: not the model")
    flip(place / "run/model/model.safetensors")
    refused(capsys, [*EVALUATE, "run/model"], "run/model: not the model", "model.safetensors is damaged")
    flip(place / "run/sft/model.safetensors")
    for load, name in ((load_model, "sft"), (load_sequence_classifier, "reward"), (load_tokenizer, "sft")):
        with pytest.raises(UserError, match=f"run/{name}: not the model that was written"):
            load(f"run/{name}")


def test_a_change_that_was_meant_is_accepted_and_what_a_resume_reads_may_go(place: Path) -> None:
    folder = place / "run/checkpoints/checkpoint-1"
    assert [file.unlink() for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth") for file in folder.glob(name)]
    assert load_model(folder) and defect(folder) == "optimizer.pt is missing", "for a resume it is no whole checkpoint"
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    with pytest.raises(UserError, match=r"generation_config\.json"):
        load_model(folder)
    (folder / MANIFEST).unlink()
    assert load_model(folder)
    assert main([*EVALUATE, str(folder), "--evaluation.prompts", "2", "--evaluation.max_new_tokens", "2"]) == 0


def test_the_base_of_an_adapter_that_was_moved_is_mended(place: Path) -> None:
    save_model(add_lora(load_model(place / "my_model"), rank=2), load_tokenizer("my_model"), "adapter", merge=False)
    shutil.move("my_model", "moved")
    with pytest.raises(UserError, match=r"mend base_model_name_or_path in .*adapter_config\.json"):
        load_model("adapter")
    file = place / "adapter/adapter_config.json"
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": "../moved"}
    file.write_text(json.dumps(settings))
    assert load_model("adapter") and defect("adapter") is None
    file.write_text(json.dumps(settings | {"lora_alpha": 99}))
    with pytest.raises(UserError, match=r"adapter_config\.json has"):
        load_model("adapter")
    file.write_text("[1]")
    with pytest.raises(UserError, match="adapter: not the model that was written"):
        load_model("adapter")


def test_a_folder_of_another_program_needs_none(place: Path) -> None:
    (place / "my_model" / "config.json").touch()
    assert not (place / "my_model" / MANIFEST).exists() and load_model("my_model")


def test_files_are_read_once_while_they_stay_as_they_are(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = manifest.sampled_digest
    monkeypatch.setattr(manifest, "sampled_digest", lambda path: read.append(path.name) or original(path))
    folder = place / "run/model"
    check_manifest(folder)
    once = len(read)
    check_manifest(folder)
    assert once and len(read) == once
    flip(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        check_manifest(folder)


def test_a_manifest_leads_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(manifest, "sampled_digest", lambda path: opened.append(path) or "")
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("../secret", str(tmp_path / "secret"), "a/../../secret"):
        (folder / MANIFEST).write_text(json.dumps({"files": {name: {"size": 1, "sha256": ""}}}))
        assert "outside of it" in (defect(folder) or "")
    assert not opened


def test_a_model_saved_over_ones_own_has_a_manifest_of_its_own(place: Path) -> None:
    from isdaa import PreferenceConfig, preference_trainer

    args = PreferenceConfig("out", max_steps=1, per_device_train_batch_size=4, max_length=200, report_to="none", use_cpu=True,
                            bf16=False, save_strategy="no")  # fmt: skip
    trainer = preference_trainer("run/sft", args=args, train_dataset=plain_pairs(8))
    trainer.train()
    key = place / "run/sft/key.env"
    key.touch(0o600)
    trainer.save_model("run/sft")
    assert defect("run/sft") is None and load_model("run/sft")
    assert (place / "run/sft/model.safetensors").stat().st_mode & 0o777 == 0o666 & ~current_umask()
    assert key.stat().st_mode & 0o777 == 0o600  # the user's own is none of ours


def test_all_that_a_run_leaves_is_read_by_whom_the_umask_lets(home: Path) -> None:
    mode = 0o666 & ~current_umask()
    kept = [path for path in home.rglob("*") if path.is_file() and path.stat().st_mode & mode != mode]
    assert not [path for path in kept if "my_model" not in path.parts]  # what a test has saved by transformers itself


def test_a_sweep_that_frees_the_disk_blesses_no_damage(place: Path) -> None:
    from isdaa.experiments.grid import Task
    from isdaa.experiments.worker import tidy

    flip(place / "run/checkpoints/checkpoint-1/model.safetensors")
    task = Task.__new__(Task)
    object.__setattr__(task, "folder", place / "run")
    tidy(task, "models")
    assert not (place / "run/checkpoints/checkpoint-1/optimizer.pt").exists()
    assert defect(place / "run/checkpoints/checkpoint-2") is None
    with pytest.raises(UserError, match="damaged"):
        load_model(place / "run/checkpoints/checkpoint-1")
    write_manifest(place / "run/checkpoints/checkpoint-1")
    assert load_model(place / "run/checkpoints/checkpoint-1")
