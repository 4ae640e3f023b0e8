"""`isdaa report OUT`: what another trainer wrote is a run, and what was measured of it is never lost to a narrower call."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chains import jsonl, refused
from evaluation_helpers import moved, save, tiny

from isdaa.cli import main
from isdaa.world import make_posts

SMALL = {"evaluation__max_new_tokens": 6, "evaluation__bootstrap": 100, "evaluation__opponent_samples": 2}
SMALL |= {"tokenization__max_length": 128, "tokenization__max_prompt_length": 96}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests begin with, to be copied into the one folder that all work in, for records name its models: `fresh`, three
    checkpoints whose names sort otherwise, and a final model with the weights of the last; and `reported`, with a report."""
    home = tmp_path_factory.mktemp("foreign")
    work, reference = home / "work", tiny(0)
    save(reference, work / "base")
    for index, step in enumerate((5, 20, 100)):
        folder = Path(save(moved(reference, 0.1 * (index + 1)), work / "out" / f"checkpoint-{step}"))
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 100}))
    save(moved(reference, 0.3), work / "out")
    posts = make_posts("small", 8, split="eval")
    jsonl(work / "prompts.jsonl", [{key: post[key] for key in ("id", "prompt", "facts")} for post in posts])
    shutil.copytree(work, home / "fresh")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        assert report("out") == 0
    shutil.copytree(work, home / "reported")
    return home


@pytest.fixture
def out(kept: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of checkpoints in its place, without a report unless `reported` is asked for, too."""
    work = kept / "work"
    shutil.rmtree(work)
    shutil.copytree(kept / ("reported" if "reported" in request.fixturenames else "fresh"), work)
    monkeypatch.chdir(work)
    return work / "out"


@pytest.fixture
def reported(out: Path) -> None:
    """`out` has been reported on."""


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


def test_a_narrower_call_loses_nothing(out: Path, reported: None, capsys: pytest.CaptureFixture[str]) -> None:
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
    out: Path, reported: None, capsys: pytest.CaptureFixture[str], more: dict[str, Any], told: str
) -> None:
    kept = {name: (out / name).read_bytes() for name in ("evaluation/metrics.json", "evaluation/plan.json", "report/report.json")}
    refused(capsys, ["report", "out", *options(**more)], "holds an evaluation of 3 checkpoints", told, "--output")
    assert report("out", output="mine", **more) == 0
    assert steps_in(Path("mine/report.json")) == [5, 20, 100] and Path("mine/evaluation/metrics.json").is_file()
    assert kept == {name: (out / name).read_bytes() for name in kept}
    assert report("out", output="mine", **more) == 0, "the same again is read"
    save(moved(tiny(0), 0.2), Path("other/checkpoint-9"))
    refused(
        capsys,
        ["report", "--checkpoints", "other/checkpoint-9", *options(output="mine", **more)],
        "mine/evaluation: holds an evaluation of other models",
    )


def test_fewer_checkpoints_with_other_settings_or_after_a_change_are_refused(
    out: Path, reported: None, capsys: pytest.CaptureFixture[str]
) -> None:
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
    doubt = "--one_run: the models stand in the order given; their steps are 20, 100, 10, which do not rise"
    assert doubt in read(Path("joined/report.json"))["notes"] and f"warning: {doubt}" in capsys.readouterr().err.replace(
        "\n", " "
    )
    assert report("--checkpoints", *paths, output="apart") == 0
    assert len(read(Path("apart/report.json"))["runs"]) == 2


def test_the_order_of_the_last_call_counts(out: Path) -> None:
    for index, name in enumerate(("late", "early", "middle")):
        save(moved(tiny(0), 0.2 + index / 10), Path("named") / name)
    paths = ["named/late", "named/early", "named/middle"]
    assert report("--checkpoints", *paths) == 0
    assert report("--checkpoints", paths[1], paths[2], paths[0]) == 0
    (run,) = read(Path("named/report/report.json"))["runs"]
    assert [row["label"] for row in run["checkpoints"]] == ["early", "middle", "late"]
    assert report("--checkpoints", paths[2], paths[0], paths[1], "--one_run") == 0
    (run,) = read(Path("named/report/report.json"))["runs"]
    assert [row["label"] for row in run["checkpoints"]] == ["middle", "late", "early"]


def test_a_part_of_one_run_is_not_put_into_the_whole(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [f"out/checkpoint-{step}" for step in (100, 20, 5)]
    assert report("--checkpoints", *paths, "--one_run") == 0
    assert any("--one_run" in line for line in read(out / "report/report.json")["reproduce"])
    refused(capsys, ["report", "--checkpoints", *paths[:2], "--one_run", *options()], "only a call with all of them can give")


def test_an_evaluation_knows_its_models_from_any_folder(
    out: Path, reported: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = out.parent
    monkeypatch.chdir("/")
    assert main(["report", str(out)]) == 0, "nothing is asked for: it is all there"
    paths = [str(out / f"checkpoint-{step}") for step in (20, 5)]
    where = {"reference": str(home / "base"), "data": str(home / "prompts.jsonl")}
    assert report("--checkpoints", *paths, **where) == 0
    assert steps_in(out / "report/report.json") == [5, 20, 100]


def test_weights_that_changed_are_evaluated_again(out: Path, reported: None, capsys: pytest.CaptureFixture[str]) -> None:
    folder = out / "checkpoint-20"
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())  # written anew, the same
    assert main(["report", "out"]) == 0
    save(moved(tiny(0), 0.9), folder)
    told = refused(capsys, ["report", "out"], "checkpoint-20: has changed since it was evaluated")
    call = shlex.split(told.partition("again: isdaa ")[2])
    assert call[:2] == ["report", "--checkpoints"] and "--evaluation.max_new_tokens" in call
    assert main(call) == 0 and main(["report", "out"]) == 0


def test_weights_that_changed_places_are_noticed(out: Path, reported: None, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("out/evaluation", "other/evaluation")
    for name in ("checkpoint-5", "checkpoint-20"):
        (out / name).rename(out / f"{name}-away")
    (out / "checkpoint-5-away").rename(out / "checkpoint-20")
    (out / "checkpoint-20-away").rename(out / "checkpoint-5")
    refused(capsys, ["report", "out"], "has changed since it was evaluated")
    for step in (5, 20, 100):
        save(moved(tiny(0), 1 / step), Path(f"other/checkpoint-{step}"))
    refused(capsys, ["report", "other"], "has changed since it was evaluated")


def test_a_run_is_one_by_any_of_its_names(out: Path, reported: None) -> None:
    Path("link").symlink_to("out")
    assert report("--checkpoints", "link/checkpoint-20", "link/checkpoint-5") == 0
    assert steps_in(out / "report/report.json") == [5, 20, 100]
    for index, name in enumerate(("late", "early")):
        save(moved(tiny(0), 0.2 + index / 10), Path("named") / name)
    assert report("--checkpoints", "named/late", "named/early", "named/late") == 0
    (run,) = read(Path("named/report/report.json"))["runs"]
    assert [row["label"] for row in run["checkpoints"]] == ["late", "early"]


def test_the_folder_of_another_run_is_no_place_for_a_report(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (5, 10, 20):
        save(moved(tiny(0), 1 / step), Path(f"other/checkpoint-{step}"))
    assert report("other") == 0
    refused(capsys, ["report", "out", *options(output="other")], "holds an evaluation of other models")


@pytest.mark.parametrize("name", ["model", "final_checkpoint"])
def test_a_last_model_in_the_folder_hides_no_checkpoint(out: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for file in out.glob("*.*"):
        file.unlink()
    save(moved(tiny(0), 0.6), out / name)
    save(moved(tiny(0), 0.7), out / "ema")
    assert report("out") == 0
    (run,) = read(out / "report/report.json")["runs"]
    assert [row["label"].split("/")[-1] for row in run["checkpoints"]] == [
        "checkpoint-5",
        "checkpoint-20",
        "checkpoint-100",
        name,
    ]
    assert "not read: ema" in capsys.readouterr().err.replace("\n", " ")


def test_what_is_said_of_a_kept_model_stays_said(out: Path) -> None:
    save(moved(tiny(0), 0.6), out)  # a last model of its own, whose step nothing says
    assert report("out") == 0
    before = read(out / "report/report.json")["notes"]
    assert any("last model" in line for line in before)
    assert report("--checkpoints", "out/checkpoint-20", "out/checkpoint-5") == 0
    assert read(out / "report/report.json")["notes"] == before


def test_labels_stay_apart_when_models_are_added(out: Path) -> None:
    save(moved(tiny(0), 0.4), Path("more/checkpoint-5"))
    assert main(["evaluate", "--model_path", "out/checkpoint-5", *options(output="both")]) == 0
    assert main(["evaluate", "--model_path", "more/checkpoint-5", *options(output="both")]) == 0
    labels = [model["label"] for model in read(Path("both/metrics.json"))["models"]]
    assert sorted(labels) == ["more/checkpoint-5", "out/checkpoint-5"]


def test_a_mistyped_path_answers_before_anything_large_is_imported(out: Path) -> None:
    calls = [
        ["report", "--checkpoints", "out/checkpoint-11", *options()],
        ["report", "out", *options(reference="bsae")],
        ["evaluate", "--model_path", "out/checkpoint-5", *options(scorer="./gould")],
    ]
    program = (
        "import sys; from isdaa.cli import main\n"
        f"for argv in {calls!r}:\n"
        "    print(main(argv), sorted({'torch', 'transformers', 'altair'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["2 []"] * 3, done
