"""The commands on the page are those that make it again."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

from report_studies import cells, metrics_of, study, sweep, trajectory, write_evaluation

from isdaa.cli.main import parse
from isdaa.config import EvaluationConfig, TokenizationConfig
from isdaa.evaluation.checkpoints.trajectory import read_study
from isdaa.record import ModelRecord, record_text
from isdaa.report.reproduce import commands

DEFAULTS = EvaluationConfig.model_validate({}).model_dump()


def parsed(line: str):
    name, *words = shlex.split(line)
    assert name == "isdaa"
    return parse(words)


def models(folder: Path, reference: Path | None, evaluation: dict, steps=(40, 80)) -> list[str]:
    """Checkpoints of a run, with records where `reference` is given."""
    found = []
    for step in steps:
        model = folder / "checkpoints" / f"checkpoint-{step}"
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
        config = {"objective": {"method": "dpo", "beta": 0.01}, "seed": 1, "evaluation": evaluation}
        record = ModelRecord("policy", config, step, str(reference), "world:small", None, "gold")
        if reference is not None:
            (model / "isdaa.json").write_text(record_text(record, model), encoding="utf-8")
        found.append(str(model))
    return found


def made(paths: list[str], reference: Path, **settings):
    run = trajectory(curve=(0.6, 0.7), paths=paths, name="run")
    metrics = metrics_of([run]) | {"tokenization": TokenizationConfig.model_validate({}).model_dump()}
    metrics["reference"] = metrics["reference"] | {"path": str(reference)}
    return replace(study([run]), metrics=metrics | {"settings": DEFAULTS | settings | {"scorer": "gold"}})


def test_a_run_needs_no_more_than_its_folder(tmp_path):
    sft, run = tmp_path / "sft", tmp_path / "my run"
    sft.mkdir()
    found = made(models(run, sft, {"prompts": 64}), sft, prompts=64)
    assert commands(found) == [f"isdaa evaluate --model_path '{run}'", f"isdaa report '{run}'"]
    assert parsed(commands(found)[0]).model_path == [str(run)] and parsed(commands(found)[1]).path == str(run)


def test_what_the_records_do_not_say_is_said(tmp_path):
    sft, other, run = tmp_path / "sft", tmp_path / "other", tmp_path / "run"
    sft.mkdir(), other.mkdir()
    found = made(models(run, sft, {"prompts": 64}), other, prompts=32, temperature=1.0)
    found = replace(found, metrics=found.metrics | {"scorer": {"name": "my judge", "digest": "1"}})
    evaluate, report = (parsed(line) for line in commands(found))
    assert (evaluate.reference, evaluate.scorer, evaluate.data) == (str(other), "my judge", None)
    options = vars(evaluate)
    assert (options["evaluation.prompts"], options["evaluation.temperature"]) == ("32", "1.0")
    assert "evaluation.bootstrap" not in options and report.path == str(run)


def test_foreign_checkpoints_are_named_with_all_that_no_record_says(tmp_path):
    paths = []
    for name in ("one", "two's"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        paths.append(str(tmp_path / name))
    sft = tmp_path / "sft"
    sft.mkdir()
    found = made(paths, sft, max_new_tokens=8)
    note, line = commands(found)
    report = parsed(line)
    assert note.startswith("# PROMPTS") and report.checkpoints == paths
    assert (report.reference, report.data, report.scorer) == (str(sft), "PROMPTS", "gold")
    assert vars(report)["evaluation.max_new_tokens"] == "8"
    (line,) = commands(replace(found, metrics=found.metrics | {"data": "prompts.jsonl"}))
    assert parsed(line).data == "prompts.jsonl"


def test_some_of_a_run_s_checkpoints_and_several_runs(tmp_path):
    sft = tmp_path / "sft"
    sft.mkdir()
    paths = models(tmp_path / "run", sft, {}, (40, 80, 120))
    (line,) = commands(made(paths[:2], sft))
    assert parsed(line).checkpoints == paths[:2]
    both = [*models(tmp_path / "a", sft, {}), *models(tmp_path / "b", sft, {})]
    pair = made(both[:2], sft)
    (line,) = commands(replace(pair, runs=[*pair.runs, trajectory(curve=(0.6, 0.7), paths=both[2:])]))
    assert line == f"isdaa report --checkpoints {tmp_path / 'a'} {tmp_path / 'b'}"


def test_models_that_are_gone_are_named_all_the_same():
    assert "--model_path runs/dpo" in commands(study([trajectory(name="dpo")]))[1]


EMPTY = {"cells": [], "runs": []}


def test_a_sweep_names_its_file(tmp_path):
    swept = replace(sweep(seeds=1), folder=tmp_path)
    assert commands(swept) == [
        f"isdaa sweep --config {tmp_path / 'sweep.yaml'} --output_dir {tmp_path}",
        f"isdaa report {tmp_path}",
    ]
    (tmp_path / "sweep.json").write_text(json.dumps(EMPTY | {"base": "demo.yaml", "config": "configs/my sweep.yaml"}))
    assert parsed(commands(swept)[0]).config == "configs/my sweep.yaml"


def test_a_demo_is_made_again_by_the_demo(tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps(EMPTY | {"base": "demo", "config": "demo"}))
    (line,) = commands(replace(cells({"method": "dpo"}, {"method": "is_dpo"}, seeds=(3,)), folder=tmp_path))
    demo = parsed(line)
    assert demo.methods == ["dpo", "is_dpo"] and vars(demo)["output_dir"] == str(tmp_path) and vars(demo)["seed"] == "3"


def test_runs_whose_folders_share_a_name_have_names_of_their_own(tmp_path):
    run = write_evaluation(tmp_path)
    evaluation = run / "evaluation"
    plan, metrics = (json.loads((evaluation / name).read_text()) for name in ("plan.json", "metrics.json"))
    for index, folder in enumerate(("a/dpo", "a/dpo", "b/dpo", "b/dpo", "b/ipo")):
        path = f"runs/{folder}/checkpoints/checkpoint-{index}"
        plan["models"][index]["path"] = metrics["models"][index]["path"] = path
    for name, content in (("plan.json", plan), ("metrics.json", metrics)):
        (evaluation / name).write_text(json.dumps(content))
    assert [found.name for found in read_study(run).runs] == ["a/dpo", "b/dpo", "ipo"]
