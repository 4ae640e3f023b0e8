"""`isdaa train --continue-from`: the old run's weights, its reference and its settings, in a run of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from chains import (
    ALIGN,
    chat_model,
    content,
    jsonl,
    plain_pairs,
    read_lines,
    same_weights,
    train,
    without_time,
)

from isdaa.cli import main
from isdaa.record import read_record

SETTINGS = ALIGN | {"objective.method": "is_dpo", "align.max_steps": 4, "align.learning_rate": 1e-2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `my_model`, `pairs.jsonl`, and a finished run each with all weights (`old`) and with an adapter (`lora`)."""
    folder = tmp_path_factory.mktemp("made")
    chat_model(folder / "my_model")
    jsonl(folder / "pairs.jsonl", plain_pairs(12))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train("old", SETTINGS) == 0
        assert train("lora", SETTINGS | {"lora.rank": 2}) == 0
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def go_on(name: str, *options: str, output: str = "new") -> int:
    return main(["train", "--continue-from", name, "--output_dir", output, *options])


def state(run: str = "new") -> dict[str, Any]:
    return json.loads(Path(run, "run.json").read_text())["stages"]["align"]


def test_one_more_epoch_begins_with_the_weights_and_keeps_the_reference(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(place / "old")
    assert go_on("old", "--align.epochs", "1", "--align.learning_rate", "0.001") == 0
    said = capsys.readouterr().err
    assert "goes on from old/checkpoints/checkpoint-4 (step 4); π_ref is that run's, my_model" in said
    assert "align.epochs" not in said  # 1.0 as before
    assert "align.max_steps is None; it was 4 in old" in said and "align.learning_rate is 0.001; it was 0.01 in old" in said
    assert "μ is assumed to be π_ref" in said and "left its reference already" in said
    assert content(place / "old") == before
    first = read_lines(place / "new" / "metrics.jsonl")[0]
    assert first["drift/chosen"] != 0 and abs(first["weights/mean"] - 1) > 1e-3  # not its own reference
    record = read_record(place / "new" / "model")
    assert record is not None and record.reference is not None and Path(record.reference).resolve() == place / "my_model"
    assert record.continued is not None
    assert record.continued == state()["continued"] | {"reference": str(place / "my_model")}
    assert record.continued["step"] == record.continued["steps_before"] == 4 and not record.continued["optimizer"]
    assert Path(record.continued["from"]) == place / "old" / "checkpoints" / "checkpoint-4"
    card = (place / "new" / "model" / "README.md").read_text()
    assert "goes on from: `old/checkpoint-4`, optimiser step 4, without the optimiser's state" in card
    assert "reference π_ref: `my_model`" in card


def test_it_is_the_run_that_one_would_configure_by_hand(place: Path) -> None:
    """And its weights before the first step are those of the checkpoint: a learning rate of 0 leaves them."""
    assert go_on("old/checkpoint-2", "--align.max_steps", "2") == 0
    by_hand = {"model.path": "old/checkpoints/checkpoint-2", "reference.path": "my_model", "align.max_steps": 2}
    assert train("hand", SETTINGS | by_hand) == 0
    assert same_weights(place / "new" / "model", place / "hand" / "model")
    assert without_time(place / "new" / "metrics.jsonl") == without_time(place / "hand" / "metrics.jsonl")
    assert go_on("old/checkpoints/checkpoint-2", "--align.learning_rate", "0", output="still") == 0
    assert same_weights(place / "still" / "model", place / "old" / "checkpoints" / "checkpoint-2")
