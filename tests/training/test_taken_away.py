"""Keys of earlier versions: accepted at their default, with a word; a run that was begun with them goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chains import ALIGN, chat_model, config_file, jsonl, plain_pairs

from isdaa.cli import main
from isdaa.config import TAKEN_AWAY, fields, load_config
from isdaa.errors import UserError
from isdaa.ownership import sealed
from isdaa.training.run_folder import RUN


def test_none_of_them_is_a_key() -> None:
    assert not set(TAKEN_AWAY) & {name for name, _, _ in fields()}


@pytest.mark.parametrize("key", sorted(TAKEN_AWAY))
def test_at_its_default_a_key_is_accepted_with_a_word_and_otherwise_refused(
    key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    default, why = TAKEN_AWAY[key]
    for given in (config_file(tmp_path / "run.yaml", {"model.path": "m", "data.pairs": "p", key: default}), None):
        caplog.clear()
        options = {} if given else {"model.path": "m", "data.pairs": "p", key: default}
        assert load_config(given, options).model.path == "m"
        assert f"{key} is known no longer" in caplog.text
    with pytest.raises(UserError, match="taken away, since") as caught:
        load_config(None, {"model.path": "m", "data.pairs": "p", key: not default})
    assert key in str(caught.value) and why in str(caught.value)


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
    with_value(True)
    assert main(command) == 2 and "align.fused_head = True" in capsys.readouterr().err
