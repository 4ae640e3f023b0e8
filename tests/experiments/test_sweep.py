"""Sweeps in miniature: processes of their own, shared work done once, finished runs skipped, killed ones resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from chains import CHAIN, config_file, refused, same_weights
from patience import HANGS

from isdaa import adopt
from isdaa.cli import main
from isdaa.errors import UserError
from isdaa.evaluation.checkpoints.trajectory import read_study
from isdaa.experiments.grid import load_sweep
from isdaa.experiments.sweep import run_sweep

METHODS = {"methods": {"objective.method": ["dpo", "is_dpo"]}}


def write(folder: Path, grids: Any = METHODS, settings: dict[str, Any] | None = None, **changes: Any) -> Path:
    config_file(folder / "base.yaml", CHAIN | {"align.max_steps": 3, "align.save_steps": 1} | (settings or {}))
    data = {"base": "base.yaml", "output_dir": str(folder / "out"), "seeds": [5], "grids": grids, "jobs": 2, "threads": 1}
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(data | changes, sort_keys=False), encoding="utf-8")
    return file


def results(folder: Path) -> dict[str, int]:
    """When each task last told a result."""
    return {str(p.parent.relative_to(folder / "logs")): p.stat().st_mtime_ns for p in folder.glob("logs/**/result.json")}


def left_after(session: int, seconds: float) -> list[str]:
    """Processes of a session that still run after so long; those that have ended and wait for their parent do not."""
    deadline = time.monotonic() + seconds
    while True:
        listed = subprocess.run(["ps", "-o", "pid=,stat=,args=", "-s", str(session)], capture_output=True, text=True).stdout
        alive = [line for line in listed.splitlines() if line.split()[1][0] != "Z"]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.2)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swept")
    return run_sweep(*load_sweep(write(folder)), "sweep.yaml")


def test_every_run_is_trained_and_every_checkpoint_evaluated(swept: Path) -> None:
    study = read_study(swept)
    assert [run.name for run in study.runs] == ["dpo/seed-5", "is_dpo/seed-5"] and not study.missing
    for run in study.runs:
        assert run.steps.tolist() == [1, 2, 3]
        assert run.wins is not None and run.wins.shape == run.kl.shape == (3, CHAIN["evaluation.prompts"])
        assert (run.cell, run.seed, run.start) == (run.method, 5, 0.5)


def test_shared_work_is_done_once(swept: Path) -> None:
    """The reference's samples and scores lie with the shared world; the runs' own records hold none of them."""
    shared = [json.loads(line) for line in (swept / "shared/seed-5/evaluation/samples.jsonl").read_text().splitlines()]
    opponents = [line["block"] for line in shared if str(line.get("purpose", "")).startswith("opponent")]
    assert len(opponents) == CHAIN["evaluation.opponent_samples"]
    for run in ("dpo", "is_dpo"):
        plan = json.loads((swept / f"runs/{run}/seed-5/evaluation/plan.json").read_text())
        assert plan["reference"]["opponents"] == opponents
        own = (swept / f"runs/{run}/seed-5/evaluation/samples.jsonl").read_text()
        assert not any(block in own for block in opponents)
    assert len(list((swept / ".isdaa_cache").glob("logps-*"))) <= 3  # label's pairs, training pairs, held-out pairs


def test_what_only_a_resume_reads_is_tidied_away(swept: Path) -> None:
    from isdaa.training.trainer.checkpoints import complete_checkpoints

    folder = swept / "runs/dpo/seed-5/checkpoints"
    assert not list(folder.glob("*/optimizer*"))
    assert len(complete_checkpoints(folder)) == 3


def test_a_report_on_a_run_of_a_sweep_reads_what_there_is(swept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from isdaa.evaluation import evaluate
    from isdaa.report.make import report_on

    def refuse(request: object) -> None:
        raise AssertionError("evaluated again")

    monkeypatch.setattr(evaluate, "evaluate_request", refuse)
    page, sentence = report_on([swept / "runs/dpo/seed-5"])
    assert page.is_file() and sentence


def test_an_evaluation_of_checkpoints_that_are_gone_is_not_replaced(swept: Path, tmp_path: Path) -> None:
    import shutil

    from isdaa.evaluation.checkpoints.what_to_evaluate import requests
    from isdaa.evaluation.evaluate import evaluate_request

    shutil.copytree(swept, tmp_path / "copy")
    run = tmp_path / "copy/runs/dpo/seed-5"
    plan = json.loads((run / "evaluation/plan.json").read_text())
    for model in plan["models"]:
        model["path"] = str(run / model["path"].split("/dpo/seed-5/")[1])
    (run / "evaluation/plan.json").write_text(json.dumps(plan))
    shutil.rmtree(run / "checkpoints" / "checkpoint-1")
    before = (run / "evaluation/metrics.json").read_bytes()
    with pytest.raises(UserError, match=r"1 are gone.*--output"):
        evaluate_request(requests([run]))
    assert (run / "evaluation/metrics.json").read_bytes() == before


def test_finished_runs_are_skipped_and_new_cells_join(swept: Path) -> None:
    before = results(swept)
    file = write(swept.parent, {**METHODS, "more": {"objective.method": "chi_po"}})
    run_sweep(*load_sweep(file), "sweep.yaml")
    after = results(swept)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"chi_po/seed-5"}
    assert [run.cell for run in read_study(swept).runs] == ["dpo", "is_dpo", "chi_po"]


def test_finished_runs_whose_data_changed_are_an_error(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = load_sweep(swept.parent / "sweep.yaml")
    (pairs,) = swept.glob("*/**/pairs/train.jsonl")
    before, results_before = pairs.read_bytes(), results(swept)
    try:
        pairs.write_bytes(before.replace(b" the ", b" not ", 1))
        with pytest.raises(UserError, match=r"its finished (label|align) stage (left|read).*train\.jsonl"):
            run_sweep(*again, "sweep.yaml")
    finally:
        pairs.write_bytes(before)
    capsys.readouterr()
    run_sweep(*again, "sweep.yaml")
    assert results(swept) == results_before
    assert "not there" not in capsys.readouterr().err


def test_a_sweep_of_another_machine_is_adopted(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another user"))
    command = ["sweep", "--config", str(swept.parent / "sweep.yaml")]
    refused(capsys, command, "not a run of yours", "add --adopt to the command")
    assert main([*command, "--adopt"]) == 0
    monkeypatch.undo()
    adopt(swept)  # for the other tests


def test_a_failed_run_stops_no_other_and_is_one_line(tmp_path: Path) -> None:
    grids = {"broken": {"data.pairs_split": "nope", "data.limit": 1}, "methods": {"objective.method": ["dpo"]}}
    with pytest.raises(UserError, match=r"1 of 3 runs failed; the first is is_dpo-\S+/seed-5: .* \(see .*log.txt\)") as caught:
        run_sweep(*load_sweep(write(tmp_path, grids)), "sweep.yaml")
    assert "\n" not in str(caught.value) and caught.value.status == 3
    study = read_study(tmp_path / "out")
    assert [run.cell for run in study.runs] == ["dpo"]
    assert len(study.missing) == 1


def test_a_sweep_whose_every_run_failed_has_done_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 of 2 runs failed") as caught:
        run_sweep(*load_sweep(write(tmp_path, {"broken": {"data.pairs_split": "nope", "data.limit": 1}})), "sweep.yaml")
    assert caught.value.status == 2


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a sweep of isdaa"):
        run_sweep(*load_sweep(file), "sweep.yaml")


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_process_and_resumes(tmp_path: Path) -> None:
    """kill -9 of the sweep alone: its processes notice and end; the same command finishes with the same weights."""
    settings = {"align.max_steps": 40, "align.save_steps": 4}
    file = write(tmp_path, settings=settings)
    command = [sys.executable, "-m", "isdaa.cli", "sweep", "--config", str(file)]
    log = open(tmp_path / "log", "wb")  # noqa: SIM115 - the process writes into it
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    run = tmp_path / "out/runs/dpo/seed-5"
    deadline = time.monotonic() + 240
    while not list((run / "checkpoints").glob("checkpoint-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not left_after(process.pid, seconds=30)
    subprocess.run(command, check=True, capture_output=True, timeout=HANGS)
    alone = write(tmp_path / "alone", settings=settings)
    run_sweep(*load_sweep(alone), "sweep.yaml")
    for method in ("dpo", "is_dpo"):
        assert same_weights(tmp_path / f"out/runs/{method}/seed-5/model", tmp_path / f"alone/out/runs/{method}/seed-5/model")


@pytest.mark.slow
def test_through_submitit(tmp_path: Path) -> None:
    """Its local executor runs the very jobs that a SLURM cluster would."""
    file = write(tmp_path, {"methods": {"objective.method": ["dpo"]}}, cluster="local", slurm={"gpus": 0, "cpus": 1})
    folder = run_sweep(*load_sweep(file), "sweep.yaml")
    (run,) = read_study(folder).runs
    assert run.cell == "dpo" and len(run.steps) == 3
    assert list((folder / "submitit").glob("*_result.pkl"))


def _hear_interrupts() -> None:
    """A shell that runs the tests in the background ignores SIGINT, and so would everything that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupting_stops_the_processes(tmp_path: Path) -> None:
    """Ctrl-C reaches the whole group; the sweep ends its processes and says how to go on."""
    file = write(tmp_path, settings={"align.max_steps": 4000, "align.save_steps": 4})
    command = [sys.executable, "-m", "isdaa.cli", "sweep", "--config", str(file)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, preexec_fn=_hear_interrupts
    )
    while not list(tmp_path.glob("out/runs/dpo/seed-5/checkpoints/checkpoint-*")) and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=HANGS)
    assert process.returncode == 130 and "the same command goes on" in output, output
    assert not left_after(process.pid, seconds=30)
