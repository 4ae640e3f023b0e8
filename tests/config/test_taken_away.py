"""Keys of earlier versions: accepted at their default, with a word; a run that was begun with them goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from chains import ALIGN, chat_model, config_file, jsonl, plain_pairs, refused

from isdaa import PreferenceConfig
from isdaa.cli.main import main, parse
from isdaa.cli.options import overrides_of
from isdaa.config import TAKEN_AWAY, fields, load_config, validate
from isdaa.errors import UserError
from isdaa.evaluation.checkpoints.what_to_evaluate import requests, sections_of
from isdaa.experiments.grid import cells_of, load_sweep, tasks_of
from isdaa.ownership import sealed
from isdaa.record import ModelRecord
from isdaa.training.run_folder import RUN


def test_none_of_them_is_a_key() -> None:
    assert not set(TAKEN_AWAY) & {name for name, _, _ in fields()}


def test_keys_without_a_section_and_beside_others(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(TAKEN_AWAY, "old", (None, "nobody used it"))
    monkeypatch.setitem(TAKEN_AWAY, "guard.old", ("x", "nobody used it"))
    data = {"model": {"path": "m"}, "data": {"pairs": "p"}, "old": None, "guard": {"old": "x", "prompts": 7}}
    assert validate(data, "run.yaml").guard.prompts == 7
    assert [line.getMessage().partition(": taken")[0] for line in caplog.records] == ["run.yaml: old", "run.yaml: guard.old"]
    for changed in ({"old": 1}, {"guard": {"old": None}}):
        with pytest.raises(UserError, match=r"^run\.yaml: (guard\.)?old: taken away, since nobody used it; leave it out$"):
            validate(data | changed, "run.yaml")


@pytest.mark.parametrize("key", sorted(TAKEN_AWAY))
def test_at_its_default_a_key_is_accepted_with_a_word_and_otherwise_refused(
    key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    default, why = TAKEN_AWAY[key]
    for given in (config_file(tmp_path / "run.yaml", {"model.path": "m", "data.pairs": "p", key: default}), None):
        caplog.clear()
        options = {} if given else {"model.path": "m", "data.pairs": "p", key: default}
        assert load_config(given, options).model.path == "m"
        assert f"{key}: taken away; what it was by default is what is done, so leave it out" in caplog.text
    with pytest.raises(UserError, match="taken away, since") as caught:
        load_config(None, {"model.path": "m", "data.pairs": "p", key: not default})
    assert key in str(caught.value) and why in str(caught.value)


def test_a_sweep_keeps_the_names_of_its_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (file := tmp_path / "sweep.yaml").write_text("")

    def sweep_of(grid: dict[str, Any], **base: Any) -> list[Any]:
        config_file(tmp_path / "base.yaml", {"model.path": "m", "data.pairs": "p", **base})
        file.write_text(yaml.safe_dump({"base": "base.yaml", "seeds": [1], "grids": {"m": grid}}))
        sweep, config = load_sweep(file)
        return tasks_of(sweep, config, cells_of(sweep, config, "sweep.yaml"), "sweep.yaml")

    (plain,) = sweep_of({"objective.beta": [0.1]})
    for value in (False, [False]):
        caplog.clear()
        (task,) = sweep_of({"objective.beta": [0.1], "align.fused_head": value}, **{"align.fused_head": False})
        assert (task.name, task.key) == ("is_dpo-fused_headFalse-beta0.1/seed-1", plain.key)
        assert [record.getMessage().partition(": taken away")[0] for record in caplog.records] == [
            f"{tmp_path / 'base.yaml'}: align.fused_head",
            "sweep.yaml: grids.m: align.fused_head",
        ]
    with pytest.raises(UserError, match=r"^sweep\.yaml: grids\.m: align\.fused_head: taken away, since .*; leave it out$"):
        sweep_of({"objective.beta": [0.1], "align.fused_head": [False, True]})
    with pytest.raises(UserError, match=r"base\.yaml: align\.fused_head: taken away, since"):
        sweep_of({"objective.beta": [0.1]}, **{"align.fused_head": True})


def test_options_of_an_evaluation_and_settings_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(TAKEN_AWAY, "evaluation.old", (1, "nobody used it"))
    monkeypatch.setitem(TAKEN_AWAY, "tokenization.old", (1, "nobody used it"))
    (tmp_path / "config.json").write_text("{}")
    for command, key in (("evaluate", "evaluation.old"), ("report", "tokenization.old"), ("logps", "tokenization.old")):
        needed = {"evaluate": ["--model_path", "m"], "report": ["m"]}.get(command)
        needed = needed or ["--model_path", "m", "--data", "d", "--output", "o"]
        given = overrides_of(parse([command, *needed, f"--{key}", "1"]))
        assert given == {key: 1}
        caplog.clear()
        requests([tmp_path], {**given, "reference": str(tmp_path), "data": "d.jsonl"})
        assert f"--{key}: taken away" in caplog.text
        with pytest.raises(UserError, match=f"^--{key}: taken away, since nobody used it; leave it out$"):
            requests([tmp_path], {key: 2, "reference": str(tmp_path), "data": "d.jsonl"})
    with pytest.raises(UserError, match=r"unknown option --align\.fused_head"):  # which `isdaa evaluate` never had
        parse(["evaluate", "--model_path", "m", "--align.fused_head", "false"])


def test_of_a_record_only_what_mattered_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(TAKEN_AWAY, "evaluation.old", (1, "nobody used it"))
    for value, said in ((1, []), (2, ["isdaa.json: evaluation.old: 2 is of another isdaa, and has no effect here"])):
        caplog.clear()
        record = ModelRecord("policy", {"evaluation": {"prompts": 3, "old": value}})
        assert sections_of(record, {}).evaluation.prompts == 3
        assert [one.getMessage() for one in caplog.records] == said


def test_python_never_had_it() -> None:
    with pytest.raises(UserError, match="PreferenceConfig: unknown argument fused_head"):
        PreferenceConfig("out", fused_head=False)


def test_a_run_that_was_begun_with_such_a_key_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    chat_model(tmp_path / "my_model")
    jsonl(tmp_path / "pairs.jsonl", plain_pairs(12))
    file = config_file(tmp_path / "run.yaml", ALIGN)
    command = ["train", "--config", str(file), "--output_dir", "run"]
    assert main(command) == 0

    def with_value(value: Any) -> None:
        state = json.loads((tmp_path / "run" / RUN).read_text())
        state["stages"]["align"]["values"]["align.fused_head"] = value
        (tmp_path / "run" / RUN).write_text(json.dumps(sealed(RUN, {k: v for k, v in state.items() if k != "seal"})))

    with_value(False)
    assert main([*command, "--align.fused_head", "false"]) == 0
    onwards = ["train", "--continue_from", "run", "--stages", "align", "--align.max_steps", "1"]
    assert main([*onwards, "--output_dir", "onwards"]) == 0
    with_value(True)
    assert main(command) == 2 and "align.fused_head = True" in capsys.readouterr().err
    refused(capsys, [*onwards, "--output_dir", "other"], "run.json: align.fused_head: taken away, since")
