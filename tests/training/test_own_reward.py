"""A run whose guard, label stage or evaluation scores by the reward model that this very run makes, in one command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from chains import CHAIN, read_lines, refused, same_weights, train

from isdaa.cli import main
from isdaa.config import load_config
from isdaa.errors import UserError
from isdaa.record import read_record

REWARD = CHAIN | {
    "stages": ["sft", "reward", "align"],
    "data.pairs": "made/pairs/train.jsonl",
    "reward.max_steps": 3,
    "reward.batch_size": 8,
    "reward.warmup_steps": 1,
    "reward.eval_steps": 3,
    "align.max_steps": 4,
    "evaluation.scorer": None,
    "guard.steps": 2,
    "guard.prompts": 4,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with labelled pairs in `made`."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train("made", CHAIN, stages=["sft", "label"]) == 0
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def looks(run: str) -> list[float]:
    return [line["guard/win_rate"] for line in read_lines(Path(run, "metrics.jsonl")) if "guard/win_rate" in line]


@pytest.mark.parametrize(
    "named",
    [{"guard.scorer": "reward"}, {"evaluation.scorer": "reward"}, {"evaluation.scorer": "run/reward"}, {"guard.keep": "best"}],
    ids=["guard", "evaluation", "path", "default"],
)
def test_the_guard_scores_by_the_reward_model_of_the_run(
    named: dict[str, Any], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("run", REWARD | named) == 0
    said = capsys.readouterr().err
    assert "guard: scorer run/reward: read at" in said
    assert "scorer run/reward was trained on the policy's own pairs (about 100 % of them)" in said
    assert len(looks("run")) == 2
    record = read_record("run/model")
    wanted = str(place / "run" / "reward") if "evaluation.scorer" in named else None
    assert record is not None and record.scorer == wanted
    assert train("run", REWARD | named) == 0  # all is reused
    state = json.loads(Path("run/run.json").read_text())
    assert "guard.scorer" in state["stages"]["align"]["inputs"]
    file = Path("run/reward/config.json")
    file.write_text(file.read_text() + " ")
    Path("run/reward/isdaa_manifest.json").unlink()
    config = str(Path("run.yaml"))
    refused(capsys, ["train", "--config", config, "--output_dir", "run"], "read guard.scorer as it no longer is")


def test_it_labels_and_judges_in_one_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """data.pairs are those of the reward model; align trains on what label wrote with it, and a run goes on from all of that."""
    own = {"label.scorer": "reward", "label.seed": 7, "evaluation.scorer": "reward"}
    settings = REWARD | own | {"stages": ["sft", "reward", "label", "align"]}
    assert main(["inspect", "--config", str(config(settings)), "--no_plan"]) == 0
    capsys.readouterr()
    assert train("run", settings) == 0
    said = capsys.readouterr().err
    assert "label: scorer run/reward: read at" in said and "align: trains on the pairs that label wrote" in said
    assert "was trained on the policy's own pairs" not in said
    assert "warning: guard: scorer run/reward labelled the pairs that the policy is trained on" in said
    held = {row["prompt"] for row in read_lines(Path("run/eval_pairs.jsonl"))}
    assert held <= {row["prompt"] for row in read_lines(Path("run/pairs/train.jsonl"))}
    inputs = json.loads(Path("run/run.json").read_text())["stages"]["align"]["inputs"]
    assert "pairs/train.jsonl" in inputs and "data.pairs" not in inputs
    assert main(["evaluate", "--model_path", "run/model"]) == 0
    assert "Win rate by run/reward" in capsys.readouterr().out.replace(str(place) + "/", "")
    assert main(["train", "--continue_from", "run", "--output_dir", "new", "--align.max_steps", "2"]) == 0
    assert "guard: scorer run/reward" in (said := capsys.readouterr().err) and "data.pairs is" not in said
    assert Path("new/eval_pairs.jsonl").read_bytes() == Path("run/eval_pairs.jsonl").read_bytes()


def config(settings: dict[str, Any]) -> Path:
    from chains import config_file

    return config_file(Path("inspected.yaml"), settings | {"output_dir": "inspected"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluation.scorer": "run/rewrad"}, ["evaluation.scorer: run/rewrad"]),
        (
            {"evaluation.scorer": "./run/rewrad"},
            ["evaluation.scorer: ./run/rewrad: no such folder", "this run makes", "run/reward"],
        ),
        ({"guard.scorer": "rewrad"}, ["guard.scorer: rewrad", 'did you mean "reward"']),
        ({"guard.scorer": "glod"}, ["guard.scorer: glod", 'did you mean "gold"']),
        ({"stages": ["sft", "align"], "guard.scorer": "reward"}, ["guard.scorer: reward", "no such folder"]),
        ({"reference.path": "./run/sftt"}, ["reference.path: ./run/sftt"]),
    ],
    ids=range(6),
)
def test_a_typo_is_seen_before_any_work(
    changes: dict[str, Any], words: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from chains import config_file

    file = config_file(Path("run.yaml"), REWARD | changes)
    refused(capsys, ["train", "--config", str(file), "--output_dir", "run"], *words)
    assert not (place / "run" / "sft").exists() and not (place / "run" / "sft-checkpoints").exists()


def test_a_folder_of_that_name_is_not_guessed_about(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "reward").mkdir()
    config = load_config(None, {"model.path": "m", "data.pairs": "p", "stages": ["reward", "align"], "guard.scorer": "reward"})
    with pytest.raises(UserError, match=r"runs/isdaa/reward, or \./reward"):
        _ = config.guard_scorer
    assert load_config(None, {"model.path": "m", "data.pairs": "p", "guard.scorer": "reward"}).guard_scorer == "reward"


def test_a_guard_that_only_looks_names_no_scorer_by_itself(place: Path) -> None:
    """A verdict by a model of the same pairs is for those who ask for it; a guard that acts could not act otherwise."""
    given = {"model.path": "m", "data.pairs": "p", "guard.steps": 2}
    assert load_config(None, given | {"stages": ["reward", "align"]}).guard_scorer is None
    acting = load_config(None, given | {"stages": ["reward", "align"], "guard.stop": "over-optimised"})
    assert acting.guard_scorer == "runs/isdaa/reward" and acting.evaluation_scorer is None
    with pytest.raises(UserError, match="there is no scorer"):
        load_config(None, given | {"guard.stop": "over-optimised"})


def test_the_word_and_the_path_are_the_same_run(place: Path) -> None:
    assert train("one", REWARD | {"guard.scorer": "reward", "guard.keep": "best"}) == 0
    assert train("two", REWARD | {"guard.keep": "best"}) == 0
    assert same_weights(place / "one" / "best", place / "two" / "best") and looks("one") == looks("two")
