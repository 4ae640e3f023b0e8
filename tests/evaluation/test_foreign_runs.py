"""`isdaa report OUT`: what another trainer wrote is a run, and what was measured of it is never lost to a narrower call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chains import jsonl, refused
from evaluation_helpers import moved, save, tiny

from isdaa.cli import main
from isdaa.world import make_posts

SMALL = {"evaluation__max_new_tokens": 6, "evaluation__bootstrap": 100, "evaluation__opponent_samples": 2}
SMALL |= {"tokenization__max_length": 128, "tokenization__max_prompt_length": 96}


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three checkpoints whose names sort otherwise, and a final model with the weights of the last."""
    monkeypatch.chdir(tmp_path)
    reference = tiny(0)
    save(reference, tmp_path / "base")
    for index, step in enumerate((5, 20, 100)):
        folder = Path(save(moved(reference, 0.1 * (index + 1)), tmp_path / "out" / f"checkpoint-{step}"))
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 100}))
    save(moved(reference, 0.3), tmp_path / "out")
    posts = make_posts("small", 8, split="eval")
    jsonl(tmp_path / "prompts.jsonl", [{key: post[key] for key in ("id", "prompt", "facts")} for post in posts])
    return tmp_path / "out"


def options(**changes: Any) -> list[str]:
    """Options of a report, with some of them changed."""
    given = {"reference": "base", "data": "prompts.jsonl", "scorer": "gold"} | SMALL
    return [word for name, value in (given | changes).items() for word in (f"--{name.replace('__', '.')}", str(value))]


def report(*paths: str, **changes: Any) -> int:
    return main(["report", *paths, *options(**changes)])


def read(place: Path) -> Any:
    return json.loads(place.read_text(encoding="utf-8"))


def steps_in(place: Path) -> list[int | None]:
    (run,) = read(place)["runs"]
    return [row["step"] for row in run["checkpoints"]]


def test_the_folder_is_a_run_with_a_verdict_and_real_steps(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["report", "out"], "--reference REFERENCE", "--data DATA", "type: isdaa report out")
    assert not (out / "evaluation").exists()
    assert report("out") == 0
    said = capsys.readouterr()
    assert "one run, by trainer_state.json: steps 5, 20, 100" in said.err and "has the weights of checkpoint-100" in said.err
    assert steps_in(out / "report/report.json") == [5, 20, 100]
    (verdict,) = read(out / "evaluation/metrics.json")["verdicts"].values()
    assert verdict["sentence"] in said.out
    assert main(["report", "out"]) == 0, "what is measured is read, without options"
    refused(capsys, ["evaluate", "--model_path", "out", *options(scorer="none")], "out/evaluation: holds an evaluation of 3")


def test_a_narrower_call_loses_nothing(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report("out") == 0
    before = read(out / "evaluation/metrics.json")
    assert report("--checkpoints", "out/checkpoint-100", "out/checkpoint-20") == 0
    assert "its evaluation of 1 other checkpoint stays" in capsys.readouterr().err
    after = read(out / "evaluation/metrics.json")
    assert [m["kl"] for m in after["models"]] == [m["kl"] for m in before["models"]]
    assert steps_in(out / "report/report.json") == [5, 20, 100]


@pytest.mark.parametrize(
    "more, told",
    [
        ({"evaluation__prompts": 4}, "4 prompts that this one has not"),
        ({"scorer": "none"}, "a scorer (gold)"),
        ({"reference": "out/checkpoint-5"}, "another reference (base)"),
    ],
)
def test_another_evaluation_goes_elsewhere_or_is_refused(
    out: Path, capsys: pytest.CaptureFixture[str], more: dict[str, Any], told: str
) -> None:
    assert report("out") == 0
    kept = {name: (out / name).read_bytes() for name in ("evaluation/metrics.json", "evaluation/plan.json", "report/report.json")}
    refused(capsys, ["report", "out", *options(**more)], "holds an evaluation of 3 checkpoints", told, "--output")
    assert report("out", output="mine", **more) == 0
    assert steps_in(Path("mine/report.json")) == [5, 20, 100] and Path("mine/evaluation/metrics.json").is_file()
    assert kept == {name: (out / name).read_bytes() for name in kept}
    assert report("out", output="mine", **more) == 0, "the same again is read"
    save(moved(tiny(0), 0.2), Path("other/checkpoint-9"))
    refused(
        capsys, ["report", "--checkpoints", "other/checkpoint-9", *options(output="mine", **more)], "mine: holds a report on 3"
    )


def test_fewer_checkpoints_with_other_settings_or_after_a_change_are_refused(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report("out") == 0
    call = ["report", "--checkpoints", "out/checkpoint-100", "out/checkpoint-20"]
    refused(capsys, [*call, *options(evaluation__max_new_tokens=4)], "other settings")
    save(moved(tiny(0), 0.7), out / "checkpoint-5")  # trained again, into the same folder
    refused(capsys, [*call, *options()], "checkpoint-5 as it was before its files changed")
    assert report("out") == 0, "all of them, as they are now"


def test_more_prompts_and_more_checkpoints_take_the_place_of_fewer(out: Path) -> None:
    assert report("--checkpoints", "out/checkpoint-20", "out/checkpoint-5", scorer="none", evaluation__prompts=4) == 0
    assert report("out") == 0
    found = read(out / "evaluation/metrics.json")
    assert found["prompts"] == 8 and len(found["models"]) == 3 and found["scorer"]["name"] == "gold"


def test_one_run_keeps_the_given_order_wherever_its_models_lie(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(moved(tiny(0), 0.5), Path("later/checkpoint-10"))
    paths = ["out/checkpoint-20", "out/checkpoint-100", "later/checkpoint-10"]
    assert report("--checkpoints", *paths, "--one_run", output="joined") == 0
    assert steps_in(Path("joined/report.json")) == [20, 100, 10]
    doubt = "--one-run: the models stand in the order given; their steps are 20, 100, 10, which do not rise"
    assert doubt in read(Path("joined/report.json"))["notes"] and f"warning: {doubt}" in capsys.readouterr().err.replace(
        "\n", " "
    )
    assert report("--checkpoints", *paths, output="apart") == 0
    assert len(read(Path("apart/report.json"))["runs"]) == 2
