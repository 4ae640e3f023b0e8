"""The README's commands are the tested ones: its block for one's own data runs here exactly as it stands."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from chains import CHAIN, EXAMPLES, ROOT, TINY_LLAMA, chat_model

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"<!-- tested: own data -->\n```bash\n(.*?)```", re.DOTALL)


def test_ten_lines_for_ones_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (script,) = entry_points(group="console_scripts", name="isdaa")
    program = script.load()  # in this process: new ones would only load the libraries again
    (block,) = BLOCK.findall(README)
    assert len(block.splitlines()) <= 10
    chat_model(tmp_path / "my_model", max_position_embeddings=1024)
    for name in ("pairs.jsonl", "prompts.jsonl"):
        shutil.copy(EXAMPLES / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for line in block.replace("\\\n", " ").splitlines():
        name, *argv = shlex.split(line)
        assert name == "isdaa" and program(argv) == 0, line
    said = capsys.readouterr().out
    assert "KL (nats)" in said and "mine/model" in said
    (record,) = tmp_path.rglob("model/isdaa.json")
    assert json.loads(record.read_text())["config"]["objective"]["method"] == "chi_po"


def test_the_example_pairs_are_what_the_readme_says() -> None:
    pairs = [json.loads(line) for line in (EXAMPLES / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(pairs) >= 100
    assert {type(pair["prompt"]) for pair in pairs} == {str, list}
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)


@pytest.mark.parametrize(
    "command",
    [
        "make demo",
        "make test",
        "pip install -r requirements.txt",
        "python scripts/train.py --config config.yaml",
        "python scripts/evaluate.py --model_path",
        "isdaa methods",
    ],
)
def test_the_readme_names_the_command(command: str) -> None:
    assert command in README


def test_what_the_commands_need_is_there() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test", "test-slow", "lint"} <= set(targets)
    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] not in "#-."]
    assert pins
    assert all("==" in line for line in pins), pins


def test_what_it_installs_reads_the_model_that_it_names() -> None:
    install, first = README.index("\n## Install\n"), README.index("\n## Your own data\n")
    assert install < README.index("    pip install -r requirements.txt") < README.index("isdaa get-model smollm2-135m") < first
    pin = "gguf==0.19.0"
    assert pin in (ROOT / "requirements.txt").read_text().splitlines()
    assert f'gguf = ["{pin}"]' in (ROOT / "pyproject.toml").read_text()
    assert f"pip install {pin}" in (ROOT / "src/isdaa/models/gguf.py").read_text()


def test_the_scripts_train_and_evaluate_the_shipped_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process: a new one would only load the libraries again.
    monkeypatch.chdir(tmp_path)
    tiny = {key: CHAIN[key] for key in CHAIN if key.split(".")[0] in ("sft", "label", "align", "evaluation")}
    tiny |= {"data.limit": 48, "model.random": json.dumps(TINY_LLAMA)}
    options = [word for key, value in tiny.items() for word in (f"--{key}", str(value))]
    for words in (["train", "--config", str(ROOT / "config.yaml"), *options], ["evaluate", "--model_path", "runs/mini/model"]):
        script = ROOT / "scripts" / f"{words[0]}.py"
        monkeypatch.setattr(sys, "argv", [str(script), *words[1:]])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
        assert ended.value.code == 0
    assert "win rate" in capsys.readouterr().out
    assert Path("runs/mini/evaluation/metrics.json").exists()
