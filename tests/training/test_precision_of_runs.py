"""What `precision: auto` asks the machine for, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chains import ALIGN, chat_model, train

from isdaa.models import half_precision

PAIRS = Path(__file__).parents[2] / "docs" / "examples" / "pairs.jsonl"


@pytest.mark.parametrize("in_sweep", [False, True])
def test_runs_of_a_sweep_share_one_answer(in_sweep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bool]] = []

    def choose(model: Any, rows: int, cache: Path, shared: bool) -> half_precision.Choice:
        asked.append((rows, shared))
        assert cache == (tmp_path / ".isdaa_cache").resolve()
        return half_precision.Choice("bfloat16", "it was timed", 0.4)

    monkeypatch.setattr(half_precision, "choose", choose)
    monkeypatch.chdir(tmp_path)
    chat_model(tmp_path / "my_model")
    (tmp_path / "pairs.jsonl").write_text(PAIRS.read_text())
    if in_sweep:
        (tmp_path / "sweep.json").write_text("{}")
    assert train("run", ALIGN | {"stages": ["align"], "align.max_steps": 1}) == 0
    ((rows, shared),) = asked
    assert shared is in_sweep and 10 < rows < 4 * 400
