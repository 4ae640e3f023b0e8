"""docs/configuration.md: its tables of keys are what the fields say, and its list of files is what runs leave."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from chains import CHAIN, ROOT, train

from isdaa.cli.main import main
from isdaa.config import Config, fields
from isdaa.config.page import BEGIN, END, PAGE, renewed

TEXT = (ROOT / PAGE).read_text(encoding="utf-8")
LEFT = TEXT[TEXT.index("## What a run leaves") : TEXT.index("Beside `output_dir` lies")]
LATER = {"sft-checkpoints/", "reward-checkpoints/", "guard/best-N/"}  # while the run works


def test_the_tables_are_what_the_fields_say() -> None:
    assert renewed(TEXT) == TEXT, "run `make docs-config`"
    inside = TEXT[TEXT.index(BEGIN) : TEXT.index(END)]
    for dotted, field, _ in fields():
        assert f"| `{dotted}` |" in inside
        assert (field.description or "").split("|")[0] in inside
    assert {section for section in Config.model_fields if f"### `{section}`" in inside} == {
        name.partition(".")[0] for name, _, _ in fields() if "." in name
    }


def test_a_key_that_is_changed_is_seen() -> None:
    assert renewed(TEXT.replace("strength of the implicit KL penalty", "…")) == TEXT
    assert renewed(TEXT.replace("| `objective.beta` |", "| `objective.betta` |")) == TEXT


def named(models: bool) -> list[str]:
    """Names in the first cells: of a model's folder, or of the run's."""
    run, _, model = LEFT.partition("| in a model's folder |")
    cells = [line.split("|")[1] for line in (model if models else run).splitlines() if re.match(r"\| [*`]", line)]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_every_file_that_a_run_leaves_is_named_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    full = CHAIN | {
        "stages": ["sft", "label", "reward", "align"], "reward.max_steps": 2, "align.max_steps": 4, "guard.steps": 2,
        "guard.prompts": 8, "guard.keep": "best", "align.report_to": ["tensorboard"],
    }  # fmt: skip
    assert train("run", full) == 0
    adapter = {key: value for key, value in full.items() if not key.startswith(("guard.", "reward.", "align.report"))}
    assert train("lora", adapter | {"stages": ["label", "align"], "lora.rank": 2, "lora.merge": False}) == 0
    assert main(["evaluate", "--model_path", "run"]) == 0
    assert main(["report", "run"]) == 0
    files = {str(path.relative_to(run)) for run in map(Path, ("run", "lora")) for path in run.rglob("*") if path.is_file()}

    folders = re.findall(r"\*\*`([^`]+/)`\*\*", LEFT)
    plain = [name for name in named(models=False) if name not in folders and name not in LATER]
    models = [folder + name for folder in folders for name in named(models=True)]
    patterns = [re.sub(r"\bN\b", "*", name) + ("*" if name.endswith("/") else "") for name in (*plain, *models)]
    assert sorted(file for file in files if not any(fnmatch(file, pattern) for pattern in patterns)) == []
    for name in plain:
        pattern = name + ("*" if name.endswith("/") else "")
        assert any(fnmatch(file, pattern) for file in files), f"{name}: no run leaves it"
    for name in named(models=True):
        assert any(file.endswith(f"/{name}") for file in files), f"{name}: in no model's folder"
    for folder in folders:
        assert any(fnmatch(file, re.sub(r"\bN\b", "*", folder) + "*") for file in files), folder


@pytest.mark.parametrize("name", sorted(LATER))
def test_what_is_there_for_a_while_is_named_as_such(name: str) -> None:
    assert f"`{name}`" in LEFT
