"""The Python that README and docs show runs as it stands, in order, beside models and files of a few kilobytes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chains import ALIGN, ROOT, chat_model, jsonl, plain_pairs, train

import isdaa

MODEL = {"max_position_embeddings": 1200}


def python_of(page: str, heading: str = "") -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text.partition(heading)[2] if heading else text, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        chat_model(folder / "my_model", **MODEL)
        jsonl(folder / "pairs.jsonl", plain_pairs(40))
        assert train("runs/reward", {**ALIGN, "stages": ["reward"], "reward.max_steps": 1, "reward.batch_size": 4}) == 0
        shutil.copytree("runs/reward/reward", "my_reward_model")
        assert train("runs/mine", ALIGN | {"align.max_steps": 3, "align.save_steps": 1, "evaluation.prompts": 128}) == 0
        yield folder


def test_the_readme_s_script_trains_here(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (script,) = python_of("README.md", "## In Python")
    space: dict[str, Any] = {"pairs": plain_pairs(8)}
    exec(script, space)
    assert space["trainer"].state.global_step == 3
    assert "bf16 is off" in capsys.readouterr().err or space["trainer"].args.bf16


def test_the_loss_alone_in_a_loop_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    (script,) = python_of("docs/api/objectives.md")
    space: dict[str, Any] = {}
    exec(script, space)
    assert space["policy_chosen"].grad.abs().min() > 0 and space["out"].weights.shape == (2,)
    assert "0.05·h" in capsys.readouterr().out


def test_going_on_in_python(home: Path) -> None:
    (script,) = python_of("docs/going_on.md")
    space: dict[str, Any] = {"pairs": plain_pairs(8)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        exec(script.replace('"out"', '"on"'), space)
    assert space["trainer"].state.global_step == 1 and (home / "on" / "metrics.jsonl").is_file()


def test_the_page_on_python(home: Path) -> None:
    args = isdaa.PreferenceConfig("out", max_steps=3, save_steps=1, max_length=200, report_to="none")
    trainer = isdaa.preference_trainer("my_model", args=args, train_dataset=plain_pairs(12))
    trainer.train()
    space: dict[str, Any] = {"trainer": trainer, "prompts": [row["prompt"] for row in plain_pairs(6)]}
    first, verdict, run, own = python_of("docs/python.md")
    exec(first, space)
    assert space["found"].win_rate is not None
    exec(verdict, space)
    assert list(space["found"].verdicts) == ["out"] and not space["found"].verdicts["out"].startswith("No verdict")
    assert len(space["found"].metrics["models"]) == 3
    exec(run, space)
    assert space["found"].metrics["settings"]["max_new_tokens"] == 64
    exec(own, space)


def test_the_rows_of_a_scorer_have_the_keys_of_the_page(home: Path) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8").partition("| key of a row |")[2]
    keys = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    seen: list[dict[str, Any]] = []

    def score(rows: list[dict[str, Any]]) -> list[float]:
        seen.extend(rows)
        return [0.0 for _ in rows]

    isdaa.evaluate("runs/mine/model", prompts=plain_pairs(4), scorer=score, output_dir="keys")
    assert len(keys) == 6 and all(keys <= row.keys() for row in seen)
