"""A run that an earlier isdaa began goes on as if nothing had happened, or is refused in one line; never a mixture.

`run_before/` is what the code before the configuration became a package left of `SETTINGS`: `config.yaml`, and of `run.json` the
values by which each stage knows itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from chains import CHAIN, config_file, refused, same_weights, stopped_at, train, without_time

from isdaa.config import fields
from isdaa.ownership import sealed
from isdaa.training.run_folder import RUN, flattened

BEFORE = Path(__file__).parent / "run_before"
SETTINGS = CHAIN | {"align.max_steps": 4, "guard.steps": 2, "guard.prompts": 4, "guard.keep": "best", "lora.rank": 2}
DEFAULTS = {name: default for name, _, default in fields()}


def values_before() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((BEFORE / "values.json").read_text())
    return found


def test_the_same_command_writes_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train("run", SETTINGS) == 0
    written = flattened(yaml.safe_load(Path("run/config.yaml").read_text()))
    before = flattened(yaml.safe_load((BEFORE / "config.yaml").read_text()))
    assert {key: written.get(key, ...) for key in before} == before
    assert {key: written[key] for key in written.keys() - before.keys()} == {
        key: DEFAULTS[key] for key in written.keys() - before.keys()
    }
    stages = json.loads(Path("run", RUN).read_text())["stages"]
    for stage, values in values_before().items():
        assert {key: stages[stage]["values"].get(key, ...) for key in values} == values


def test_a_run_begun_before_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train("whole", SETTINGS) == 0
    stopped_at(3, SETTINGS)
    state = json.loads(Path("run", RUN).read_text())
    for stage, values in values_before().items():
        state["stages"][stage]["values"] = values
    Path("run", RUN).write_text(json.dumps(sealed(RUN, {key: value for key, value in state.items() if key != "seal"})))
    Path("run/config.yaml").write_text((BEFORE / "config.yaml").read_text())
    file = config_file(tmp_path / "other.yaml", SETTINGS | {"align.learning_rate": 1e-3})
    line = refused(capsys, ["train", "--config", str(file), "--output_dir", "run"], "run: holds a different run")
    assert "its align stage has align.learning_rate = 0.003, this one 0.001" in line
    assert train("run", SETTINGS) == 0  # as typed anew
    assert without_time(Path("run/metrics.jsonl")) == without_time(Path("whole/metrics.jsonl"))
    assert same_weights(Path("run/model"), Path("whole/model"))
