"""Checkpoints of different runs are different curves, however they were named and in whatever order they were given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from report_studies import write_evaluation

from isdaa.evaluation.checkpoints.run_groups import LONE
from isdaa.evaluation.checkpoints.trajectory import Trajectory, trajectories
from isdaa.evaluation.evaluate import with_verdicts
from isdaa.files import write_json
from isdaa.report.content import find, report_of
from isdaa.report.make import read_study

NOBODY = (None, None, None, None)  # method, β, seed, step


def evaluated(folder: Path, models: Sequence[tuple[str, tuple[Any, ...]]]) -> Path:
    """An evaluation of at most five models: (path below the folder, (method, β, seed, step) of its record)."""
    place = write_evaluation(folder, prompts=6) / "evaluation"
    plan, metrics = (json.loads((place / name).read_text(encoding="utf-8")) for name in ("plan.json", "metrics.json"))
    for name, content in (("plan.json", plan), ("metrics.json", metrics)):
        content["models"] = content["models"][: len(models)]
        for number, (entry, (path, record)) in enumerate(zip(content["models"], models, strict=True)):
            entry |= {"path": str(folder / path), "label": Path(path).name, "digest": f"{number}" * 24}
            entry |= dict(zip(("method", "beta", "seed", "step"), record, strict=True))
        write_json(place / name, content)
    return place


def curves(folder: Path, models: Sequence[Any], as_one_run: bool = False) -> dict[str, list[str]]:
    """Run -> its models' paths below the folder, in the run's order."""
    named = [model if isinstance(model, tuple) else (model, NOBODY) for model in models]
    runs: list[Trajectory] = trajectories(evaluated(folder, named), as_one_run)
    assert len({run.name for run in runs}) == len(runs)
    return {run.name: [str(Path(path).relative_to(folder)) for path in run.paths] for run in runs}


def policy(seed: int = 1, step: int | None = None, method: str = "dpo", beta: float = 0.1) -> tuple[Any, ...]:
    return method, beta, seed, step


@pytest.mark.parametrize("as_one_run", [False, True])
def test_runs_of_isdaa_are_never_joined(tmp_path: Path, as_one_run: bool) -> None:
    models = [(f"{run}/checkpoints/checkpoint-{step}", policy(1, step)) for run in ("a", "b") for step in (5, 10)]
    assert curves(tmp_path, models, as_one_run) == {
        "a": ["a/checkpoints/checkpoint-5", "a/checkpoints/checkpoint-10"],
        "b": ["b/checkpoints/checkpoint-5", "b/checkpoints/checkpoint-10"],
    }


def test_runs_whose_folders_have_the_same_name_have_names_of_their_own(tmp_path: Path) -> None:
    models = [(f"{cell}/seed-{seed}/model", policy(seed, 9, cell)) for cell in ("dpo", "ipo") for seed in (1, 2)]
    assert list(curves(tmp_path, models, True)) == ["dpo/seed-1", "dpo/seed-2", "ipo/seed-1", "ipo/seed-2"]


def test_the_stages_of_a_run_are_apart(tmp_path: Path) -> None:
    sft = (None, None, 1, 6)
    models = [("x/sft", sft), ("x/checkpoints/checkpoint-5", policy(1, 5)), ("x/model", policy(1, 9))]
    assert curves(tmp_path, models) == {"sft": ["x/sft"], "x": ["x/checkpoints/checkpoint-5", "x/model"]}
    assert set(curves(tmp_path / "again", models, True)) == {"x (sft)", "x (dpo, β = 0.1, seed 1)"}


def test_any_order_gives_the_order_of_training(tmp_path: Path) -> None:
    models = [("x/model", policy(1, 30)), ("x/checkpoints/checkpoint-20", policy(1, 20)), ("x/best", policy(1, 10))]
    assert curves(tmp_path, models) == {"x": ["x/best", "x/checkpoints/checkpoint-20", "x/model"]}
    foreign = ["out", "out/checkpoint-200", "out/checkpoint-1000", "out/checkpoint-50"]
    order = ["out/checkpoint-50", "out/checkpoint-200", "out/checkpoint-1000", "out"]
    assert curves(tmp_path / "foreign", foreign) == {LONE: order}


def test_weights_that_are_named_twice_count_once(tmp_path: Path) -> None:
    models = [
        ("x/checkpoints/checkpoint-9", policy(1, 9)),
        ("x/model", policy(1, 9)),
        ("x/checkpoints/checkpoint-5", policy(1, 5)),
    ]
    place = evaluated(tmp_path, models)
    plan = json.loads((place / "plan.json").read_text())
    plan["models"][1]["digest"] = plan["models"][0]["digest"]
    write_json(place / "plan.json", plan)
    (run,) = trajectories(place)
    assert list(run.steps) == [5, 9] and run.kl.shape == (2, 6)


@pytest.mark.parametrize("as_one_run", [False, True])
@pytest.mark.parametrize(
    "models, expected",
    [
        (["a/step-100", "b/step-100", "a/step-200", "b/step-200"], {"a": 2, "b": 2}),
        (["a/checkpoint-1/model", "a/checkpoint-2/model", "b/checkpoint-1/model"], {"a": 2, "b": 1}),
        (["all/dpo-step100", "all/ipo-step100", "all/dpo-step200", "all/dpo-final"], {"dpo": 3, "ipo": 1}),
        (["hub/a_epoch_1", "hub/a_epoch_2", "hub/b_epoch_1"], {"a": 2, "b": 1}),
        (["a/global_step5", "a/final", "a/global_step9"], {LONE: 3}),
    ],
)
def test_models_of_other_programs_go_by_folder_and_name(tmp_path: Path, models, expected, as_one_run) -> None:
    assert {name: len(paths) for name, paths in curves(tmp_path, models, as_one_run).items()} == expected


def test_names_that_say_nothing_are_one_run_where_the_user_says_so(tmp_path: Path) -> None:
    models = ["m/first", "m/second", "m/third"]
    assert curves(tmp_path, models, True) == {LONE: models}
    assert curves(tmp_path / "more", models) == {"first": ["m/first"], "second": ["m/second"], "third": ["m/third"]}
    assert set(curves(tmp_path / "apart", ["m/first", "n/first"], True)) == {"m", "n"}
    copied = [("m/first", policy(1, 5)), ("m/second", policy(1, 9)), ("m/third", policy(2, 5))]
    assert {n: len(p) for n, p in curves(tmp_path / "copied", copied, True).items()} == {
        "m (dpo, β = 0.1, seed 1)": 2,
        "m (third)": 1,
    }


@pytest.mark.parametrize(
    "models, expected",
    [
        (["m/dpo-100", "m/dpo-200", "m/ipo-100", "m/dpo-final"], {"dpo": 3, "ipo": 1}),
        (["m/100-dpo", "m/100-ipo", "m/200-ipo"], {"dpo": 1, "ipo": 2}),
        (["m/dpo-b0.1-e1", "m/dpo-b0.1-e2", "m/dpo-b0.5-e1"], {"dpo-b0.1-e": 2, "dpo-b0.5-e": 1}),
        (["m/dpo-seed1-10", "m/dpo-seed1-20", "m/dpo-seed2-10"], {"dpo-seed1": 2, "dpo-seed2": 1}),
        (["m/seed-1", "m/seed-2"], {"seed-1": 1, "seed-2": 1}),
        (["m/seed-1-early", "m/seed-1-late"], {LONE: 2}),
        (["m/dpo-100", "m/dpo-200", "m/dpo-final"], {LONE: 3}),
        (["m/2026-01-30", "m/2026-01-31"], {LONE: 2}),
        (["m/100", "m/200", "n/100"], {"m": 2, "n": 1}),
    ],
)
def test_names_with_bare_numbers_tell_runs_apart_where_they_can(tmp_path: Path, models, expected) -> None:
    assert {name: len(paths) for name, paths in curves(tmp_path, models, True).items()} == expected
    apart = curves(tmp_path / "apart", models)
    assert all(len(paths) == 1 for paths in apart.values()), "nothing says that they are one run"


def test_each_curve_has_a_verdict_and_a_label_of_its_own(tmp_path: Path) -> None:
    """Four runs of one method, β and seed: what tells them apart is their names."""
    place = evaluated(tmp_path, [(f"run{i}/model", policy(1, 9)) for i in range(4)])
    assert set(with_verdicts(place)["verdicts"]) == {f"run{i}" for i in range(4)}
    report = report_of(find(read_study(place, True)))
    assert [run["name"] for run in report["runs"]] == [f"run{i}" for i in range(4)]
    labels = [cell["label"] for cell in report["cells"]]
    assert len(set(labels)) == 4 and all(any(f"run{i}" in label for label in labels) for i in range(4))


def test_foreign_checkpoints_are_told_by_their_names(tmp_path: Path) -> None:
    place = evaluated(tmp_path, [(f"a/step-{step}00", NOBODY) for step in (3, 1, 2)])
    (run,) = trajectories(place)
    assert run.labels == ["step-100", "step-200", "step-300"] and not run.steps_known
    sentence = with_verdicts(place)["verdicts"][LONE]["sentence"]
    assert "step 3" not in sentence and "step 1" not in sentence
