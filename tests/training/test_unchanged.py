"""A finished run that is asked for again is what lies there now: other data, models or results are never reused in silence."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from chains import ALIGN, CHAIN, chat_model, jsonl, plain_pairs, stopped_at, train

from isdaa.manifest import MANIFEST, write_manifest
from isdaa.models.loading import load_model, load_sequence_classifier, load_tokenizer, save_model
from isdaa.ownership import sealed
from isdaa.training import unchanged

WHOLE: dict[str, Any] = {key: value for key, value in ALIGN.items() if key not in ("data.pairs", "data.eval_fraction")} | {
    "stages": ["sft", "label", "reward", "align"],
    "data.sft": "sft.jsonl",
    "data.prompts": "prompts.jsonl",
    "data.eval_pairs": "held.jsonl",
    "model.tokenizer": "my_tokenizer",
    "label.scorer": "scorer",
    "label.max_new_tokens": 4,
    "reference.path": "reference",
    "behaviour.model_path": "behaviour",
    **{f"{stage}.max_steps": 1 for stage in ("sft", "reward", "align")},
    **{f"{stage}.batch_size": 4 for stage in ("sft", "reward", "align")},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`, all four stages finished, with every input in a place of its own."""
    folder = tmp_path_factory.mktemp("unchanged")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, seed in (("my_model", 0), ("reference", 1), ("behaviour", 2)):
            chat_model(folder / name, seed=seed)
        load_tokenizer("my_model").save_pretrained("my_tokenizer")
        save_model(load_sequence_classifier("my_model", new_head=True, pad_id=0), load_tokenizer("my_model"), "scorer")
        jsonl(folder / "held.jsonl", plain_pairs(14)[12:])
        jsonl(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in plain_pairs(8)])
        jsonl(folder / "sft.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in plain_pairs(8)])
        assert train("run", WHOLE) == 0
    return folder


@pytest.fixture
def place(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)  # of other times: nothing may be made of that
    monkeypatch.chdir(tmp_path)
    return tmp_path


def again(capsys: pytest.CaptureFixture[str], status: int = 0, settings: dict[str, Any] = WHOLE, run: str = "run") -> list[str]:
    """The lines of the same command, once more."""
    capsys.readouterr()
    assert train(run, settings) == status
    return capsys.readouterr().err.splitlines()


def edit(path: Path) -> None:
    """One character of a text file becomes another: the size stays."""
    text = path.read_text()
    place = text.rindex("a")
    path.write_text(text[:place] + "e" + text[place + 1 :])


def retrain(folder: Path) -> None:
    """Another model, whole by its own manifest, at the same place."""
    model = load_model(folder)
    for parameter in model.parameters():
        parameter.data += 0.01
    save_model(model, load_tokenizer(folder), folder)


INPUTS: dict[str, tuple[str, str]] = {
    "data.sft": ("sft.jsonl", "sft"),
    "data.prompts": ("prompts.jsonl", "label"),
    "data.eval_pairs": ("held.jsonl", "reward"),
    "model.path": ("my_model", "sft"),
    "model.tokenizer": ("my_tokenizer/tokenizer_config.json", "sft"),
    "label.scorer": ("scorer", "label"),
    "reference.path": ("reference", "align"),
    "behaviour.model_path": ("behaviour", "align"),
}


@pytest.mark.parametrize("key", INPUTS)
def test_changed_inputs_of_a_finished_stage_are_an_error(key: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, stage = INPUTS[key]
    if (place / name).is_file():
        edit(place / name)
    elif key == "label.scorer":
        other = load_sequence_classifier(name, pad_id=0)
        other.score.weight.data += 1
        save_model(other, load_tokenizer(name), name)
    else:
        retrain(place / name)
    error = again(capsys, 2)[-1]
    assert error.startswith(f"isdaa: error: run: its finished {stage} stage read {key} as it no longer is (")
    assert Path(name).name in error or "model.safetensors" in error
    assert error.endswith("restore it, or choose another --output_dir")


def test_what_is_restored_is_no_change(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (place / "held.jsonl").read_text()
    edit(place / "held.jsonl")
    again(capsys, 2)
    (place / "held.jsonl").write_text(before)
    assert sum("finished earlier, reused" in line for line in again(capsys)) == 4


def test_an_unchanged_run_says_nothing_and_reads_no_content(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    again(capsys)  # the copies have other times: read once, and noted
    read: list[Path] = []
    for name in ("file_digest", "sampled_digest"):
        monkeypatch.setattr(unchanged, name, lambda path: read.append(path) or "")
    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(f"isdaa.models.loading.{name}", lambda *args, **kwargs: pytest.fail("nothing is loaded"))
    assert again(capsys) == [f"{stage}: finished earlier, reused" for stage in WHOLE["stages"]]
    assert not read


def test_files_that_were_touched_copied_or_renamed_are_the_same(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("sft.jsonl", "my_model/model.safetensors", "run/model/model.safetensors", "run/pairs/train.jsonl"):
        os.utime(place / name)
        shutil.copy(place / name, place / "aside")
        os.replace(place / "aside", place / name)
    (place / "my_model" / "README.md").write_text("# A card\n")
    (place / "my_model" / "results.json").write_text("{}")
    assert len(again(capsys)) == 4


def test_files_that_a_model_is_not_read_from_do_not_count(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("my_model", "run/model", "run/sft"):
        (place / folder / "model.q4.bin").write_bytes(b"of another program")
        (place / folder / "README.md").write_text("mine")
    assert not any("gone" in line or "error" in line for line in again(capsys))
    shutil.move("my_model/model.safetensors", "my_model/pytorch_model.bin")
    assert "changed: " in again(capsys, 2)[-1]


def test_a_run_that_was_moved_is_the_same(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "elsewhere").mkdir()
    shutil.move("run", "elsewhere/renamed")
    assert len(again(capsys, run="elsewhere/renamed")) == 4


def test_inputs_that_are_gone_are_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "sft.jsonl").unlink()
    shutil.rmtree("reference")
    lines = again(capsys)
    assert "sft: data.sft: sft.jsonl is not there any more; what was made of it is reused" in lines
    assert "align: reference.path: reference is not there any more; what was made of it is reused" in lines
    assert len(lines) == 6


def test_an_older_run_says_what_is_not_known(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = json.loads(Path("run/run.json").read_text())
    for stage in state["stages"].values():
        for name in ("inputs", "outputs", "checkpoints"):
            stage.pop(name, None)
    Path("run/run.json").write_text(json.dumps(sealed("run.json", state)))
    edit(place / "sft.jsonl")
    lines = again(capsys)
    assert len(lines) == 8 and "sft: an earlier isdaa did not note what it read" in lines[0]


@pytest.mark.parametrize("name", ["sft", "reward", "model"])
def test_a_finished_model_that_was_replaced_edited_or_removed(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "run" / name
    (folder / "generation_config.json").write_text("{}")
    assert f"run/{name}: not the model that was written (generation_config.json has 2 bytes" in again(capsys, 2)[-1]
    (folder / MANIFEST).unlink()
    assert len(again(capsys)) == 4, "a change that was meant, and not of the weights"
    other = place / ("reference" if name != "reward" else "scorer")
    for file in ("model.safetensors", "config.json"):
        shutil.copy(other / file, folder / file)
    write_manifest(folder)
    error = again(capsys, 2)[-1]
    assert "(changed: model.safetensors); restore it, or choose another --output_dir" in error
    shutil.rmtree(folder)
    if name == "model":
        assert "model: what its finished align stage left is gone; restore it" in again(capsys, 2)[-1]
    else:
        assert any(f"{name}: run/{name}: what its finished {name} stage left is gone" in line for line in again(capsys))


def test_pairs_that_a_stage_wrote_were_edited(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, stage in (("pairs/train.jsonl", "label"), ("eval_pairs.jsonl", "align")):
        before = Path("run", name).read_text()
        edit(place / "run" / name)
        assert f"run/{name}: not what its finished {stage} stage left" in again(capsys, 2)[-1]
        Path("run", name).write_text(before)
    shutil.rmtree("run/checkpoints/checkpoint-1")
    assert "align: 1 of its 1 checkpoints are gone (checkpoint-1)" in again(capsys)


def test_a_later_stage_does_not_start_from_another_sft_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = WHOLE | {"stages": ["sft"]}
    assert train("two", settings) == 0
    retrain(place / "two/sft")
    for stages in (["sft", "label"], ["label"]):
        error = again(capsys, 2, WHOLE | {"stages": stages}, run="two")[-1]
        assert "two/sft: not what its finished sft stage left (changed: model.safetensors)" in error


def test_a_stopped_stage_does_not_go_on_with_another_reference(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jsonl(place / "pairs.jsonl", plain_pairs(12))
    settings = ALIGN | {"reference.path": "reference", "align.save_steps": 1}
    stopped_at(1, settings, "two")
    retrain(place / "reference")
    error = again(capsys, 2, settings, run="two")[-1]
    assert "two: its stopped align stage read reference.path as it no longer is (changed: model.safetensors)" in error


def test_an_edited_base_of_an_adapter_is_another_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from isdaa.models.loading import add_lora

    jsonl(place / "pairs.jsonl", plain_pairs(12))
    save_model(add_lora(load_model("reference"), rank=2), load_tokenizer("reference"), "adapter", merge=False)
    assert train("two", ALIGN | {"model.path": "adapter"}) == 0
    retrain(place / "reference")
    assert (
        "read model.path as it no longer is (changed: model.safetensors)"
        in again(capsys, 2, ALIGN | {"model.path": "adapter"}, "two")[-1]
    )


def test_a_folder_of_files_is_seen(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "rows").mkdir()
    for split in ("train", "test"):
        jsonl(place / "rows" / f"{split}.jsonl", plain_pairs(12))
    settings = ALIGN | {"data.pairs": "rows"}
    assert train("two", settings) == 0
    edit(place / "rows/test.jsonl")
    assert len(again(capsys, settings=settings, run="two")) == 1, "a split that is not read"
    edit(place / "rows/train.jsonl")
    assert "read data.pairs as it no longer is (changed: train.jsonl)" in again(capsys, 2, settings, "two")[-1]


def test_another_world_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = CHAIN | {"stages": ["sft"], "sft.max_steps": 1}
    monkeypatch.chdir(tmp_path)
    assert train("run", settings) == 0
    assert len(again(capsys, settings=settings)) == 1
    original = unchanged.opened
    monkeypatch.setattr(
        unchanged,
        "opened",
        lambda *args, **kwargs: (lambda place, rows: (place, (({**row, "prompt": "?"}, at) for row, at in rows)))(
            *original(*args, **kwargs)
        ),
    )
    assert "read data.sft as it no longer is (changed: its rows)" in again(capsys, 2, settings)[-1]


def test_the_hubs_cache_tells_another_revision(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "cache"))
    ref = place / "cache/models--owner--name/refs/main"
    ref.parent.mkdir(parents=True)
    ref.write_text("a" * 40)
    from isdaa.config import load_config

    config = load_config(None, {"model.path": "owner/name", "data.sft": "sft.jsonl", "stages": ["sft"]})
    noted = unchanged.inputs_of(config, place / "run", "sft", False)
    assert noted["model.path"] == {"revision": "a" * 40}
    check = {"sft": False, "finished": True}
    assert not unchanged.check_inputs_unchanged(config, place / "run", "sft", noted, **check)
    ref.write_text("b" * 40)
    (line,) = unchanged.check_inputs_unchanged(config, place / "run", "sft", noted, **check)
    assert line.startswith("model.path: owner/name has another revision on the Hub now (bbbbbbbbbbbb)")


@pytest.mark.parametrize("inputs", [3, {"data.sft": 3}, {"data.sft": {"files": [[1]]}}, {"data.sft": {"files": {"a": 1}}}, [1]])
def test_a_record_of_odd_types_is_one_line(inputs: Any, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = json.loads(Path("run/run.json").read_text())
    state["stages"]["sft"]["inputs"] = inputs
    Path("run/run.json").write_text(json.dumps(sealed("run.json", state)))
    lines = again(capsys, 2)
    assert lines[-1].startswith("isdaa: error: run") and not any("Traceback" in line for line in lines)
