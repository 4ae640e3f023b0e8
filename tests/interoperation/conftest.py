"""One run of each kind, made once through the door that users take, for every test in this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from chains import ALIGN, chat_model, jsonl, train
from interoperation_rows import MESSAGES


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `my_model`, `pairs.jsonl`, and the runs `full` (reward, align) and `lora` (align)."""
    folder = tmp_path_factory.mktemp("interoperation")
    chat_model(folder / "my_model")
    jsonl(folder / "pairs.jsonl", MESSAGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        changes = {"reward__max_steps": 1, "reward__batch_size": 4, "reward__warmup_steps": 0}
        assert train("full", ALIGN, stages=["reward", "align"], **changes) == 0
        assert train("lora", ALIGN, lora__rank=4, align__learning_rate=0.05) == 0
    return folder


@pytest.fixture
def place(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`home` as the current folder."""
    monkeypatch.chdir(home)
    return home
