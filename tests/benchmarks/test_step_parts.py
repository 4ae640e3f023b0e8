"""Where a step's time goes, and what weighting costs: the commands run, and what they add up is right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import step_profile
import weighting_cost
from shapes import TINY_SHAPE, tiny


def test_operators_are_added_up_by_part() -> None:
    operators = [("aten::mm", 6.0), ("aten::addmm", 1.0), ("aten::copy_", 1.5), ("aten::_softmax", 1.0), ("aten::add_", 0.5)]
    parts, rest = step_profile.shares(operators)
    assert parts == {"matrix products": 0.7, "everything else": 0.2, "attention": 0.1}
    assert rest == [("aten::copy_", 0.15), ("aten::add_", 0.05)]


def test_a_profile_sees_the_steps_behind_the_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_profile, "Size", tiny)
    monkeypatch.setitem(step_profile.SHAPES, "short", TINY_SHAPE)
    out = tmp_path / "profile.json"
    threads = str(torch.get_num_threads())
    step_profile.main(["--shape", "short", "--vocabulary", "512", "--steps", "3", "--threads", threads, "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["settings"]["steps"] == 3
    assert {"matrix products", "attention", "optimiser", "everything else"} == set(found["parts"])
    assert sum(found["parts"].values()) == pytest.approx(1)
    assert 0.3 < found["seen"] < 1.05
    assert "matrix products" in capsys.readouterr().out


def test_every_objective_is_timed_against_dpo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cost.json"
    weighting_cost.main(["--pairs", "3", "--rounds", "2", "--repeats", "2", "--out", str(out)])
    rows = json.loads(out.read_text())["results"]
    assert [row["objective"] for row in rows] == list(weighting_cost.OBJECTIVES)
    assert rows[0]["beyond_dpo"] == 0 and all(row["median"] > 0 for row in rows)
    assert "| 3 | is_dpo |" in capsys.readouterr().out
