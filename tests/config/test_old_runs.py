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
from isdaa.models import half_precision
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
    before |= {key: "auto" for key in before if key.endswith(".precision")}  # its default was float32
    assert {key: written.get(key, ...) for key in before} == before
    assert {key: written[key] for key in written.keys() - before.keys()} == {
        key: DEFAULTS[key] for key in written.keys() - before.keys()
    }
    stages = json.loads(Path("run", RUN).read_text())["stages"]
    for stage, values in values_before().items():
        values = {key: "auto" if key.endswith(".precision") else value for key, value in values.items()}
        assert {key: stages[stage]["values"].get(key, ...) for key in values} == values
        assert stages[stage].get("precision", "float32") == "float32"


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


@pytest.mark.parametrize("had", ["bfloat16", "float32"])
def test_auto_goes_on_with_the_precision_that_a_run_had(
    had: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"bfloat16": "float32", "float32": "bfloat16"}[had]
    monkeypatch.chdir(tmp_path)
    given = SETTINGS | {"align.precision": had}
    assert train("whole", given) == 0
    stopped_at(3, given)
    refused(capsys, ["train", "--config", str(config_file(tmp_path / "other.yaml", SETTINGS | {"align.precision": other})),
                     "--output_dir", "run"], f"align.precision = '{had}', this one '{other}'")  # fmt: skip
    assert train("run", SETTINGS) == 0
    assert without_time(Path("run/metrics.jsonl")) == without_time(Path("whole/metrics.jsonl"))
    assert same_weights(Path("run/model"), Path("whole/model"))
    assert json.loads(Path("run", RUN).read_text())["stages"]["align"]["precision"] == had
    assert train("run", given) == 0  # as it was typed first: it is done


def test_a_run_keeps_what_auto_was_found_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = half_precision.Choice("bfloat16", "it was timed", 0.4)
    monkeypatch.setattr(half_precision, "choose", lambda *_, **__: found)
    monkeypatch.chdir(tmp_path)
    stopped_at(3, SETTINGS)
    said = capsys.readouterr().err
    assert "sft: precision: bfloat16, since it was timed" in said and "label: precision: bfloat16" in said
    assert "align: precision" not in said  # its weights come from the logps of label
    found = half_precision.Choice("float32", "it is slower now", 2.0)
    assert train("run", SETTINGS) == 0
    assert "slower" not in capsys.readouterr().err
    stages = json.loads(Path("run", RUN).read_text())["stages"]
    assert stages["align"]["precision"] == "bfloat16" and stages["align"]["values"]["align.precision"] == "auto"
    assert train("whole", SETTINGS | {f"{stage}.precision": "bfloat16" for stage in ("sft", "align")}) == 0
    assert same_weights(Path("run/model"), Path("whole/model"))
    file = config_file(tmp_path / "other.yaml", SETTINGS | {"align.precision": "float32"})
    refused(capsys, ["train", "--config", str(file), "--output_dir", "run"], "align.precision = 'auto'")


def test_align_has_the_precision_of_the_logps_that_an_earlier_label_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stopped_at(0, SETTINGS)
    state = json.loads(Path("run", RUN).read_text())
    for begun in state["stages"].values():
        begun.pop("precision", None)
    del state["stages"]["align"]
    Path("run", RUN).write_text(json.dumps(sealed(RUN, {key: value for key, value in state.items() if key != "seal"})))
    monkeypatch.setattr(half_precision, "choose", lambda *_, **__: half_precision.Choice("bfloat16", "it was timed", 0.4))
    assert train("run", SETTINGS) == 0
    assert json.loads(Path("run", RUN).read_text())["stages"]["align"]["precision"] == "float32"


def test_auto_behind_a_label_stage_whose_precision_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stopped_at(0, SETTINGS | {"align.precision": "bfloat16"})
    state = json.loads(Path("run", RUN).read_text())
    del state["stages"]["align"]
    Path("run", RUN).write_text(json.dumps(sealed(RUN, {key: value for key, value in state.items() if key != "seal"})))
    assert train("run", SETTINGS) == 0
    assert json.loads(Path("run", RUN).read_text())["stages"]["align"]["precision"] == "bfloat16"
