"""kill -9 at any moment costs nothing but time: the same command ends with the very weights of a run left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chains import CHAIN, config_file, same_weights, without_time

KILLS = 8
# A few more steps and blocks than elsewhere, so that there is something to be killed in.
SETTINGS = CHAIN | {
    "data.limit": 200,
    "sft.max_steps": 30,
    "label.max_new_tokens": 24,
    "align.max_steps": 30,
    "align.save_steps": 2,
    "align.logging_steps": 3,
}


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "isdaa.cli", "train", "--config", str(folder / "run.yaml"), "--output_dir", "run"]
    log = open(folder / "log.txt", "ab")  # noqa: SIM115 - the process writes into it
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def finish(folder: Path) -> None:
    process = start(folder)
    assert process.wait(timeout=300) == 0, (folder / "log.txt").read_text()


def working(folder: Path) -> bool:
    """Whether the libraries are loaded and the run has taken its folder."""
    return (folder / "run" / "run.json").exists()


def done(folder: Path) -> int:
    """Stages that are finished."""
    state = json.loads((folder / "run" / "run.json").read_text())
    return sum(stage["done"] for stage in state["stages"].values())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was left alone, and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    config_file(folder / "run.yaml", SETTINGS)
    begun = time.monotonic()
    finish(folder)
    (folder / "seconds").write_text(str(time.monotonic() - begun))
    return folder


@pytest.mark.slow
def test_killed_anywhere_a_run_ends_like_one_left_alone(whole: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    config_file(killed / "run.yaml", SETTINGS)
    seconds = float((whole / "seconds").read_text())
    moments = random.Random(3)
    met = []
    for _ in range(KILLS):
        process = start(killed)
        while not working(killed) and process.poll() is None:
            time.sleep(0.01)
        deadline = time.monotonic() + moments.uniform(0.1, 0.6) * seconds
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        met.append(done(killed))
    assert met, "the run was never met at work"
    finish(killed)
    for part in ("sft", "model"):
        assert same_weights(killed / "run" / part, whole / "run" / part), met
    assert (killed / "run" / "pairs" / "train.jsonl").read_bytes() == (whole / "run" / "pairs" / "train.jsonl").read_bytes()
    assert without_time(killed / "run" / "metrics.jsonl") == without_time(whole / "run" / "metrics.jsonl")
    left = [p.name for p in (killed / "run").iterdir() if p.name.startswith((".writing", ".old")) or p.name.endswith(".tmp")]
    assert not left


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "label", "align"])
def test_killed_while_each_stage_writes(whole: Path, tmp_path: Path, stage: str) -> None:
    """Killed as soon as the stage's first file appears, then again and again a little later."""
    signs = {"sft": "sft-checkpoints", "label": "pairs", "align": "checkpoints"}
    killed = tmp_path / "killed"
    config_file(killed / "run.yaml", SETTINGS)
    for wait in (0.0, 0.05, 0.2):
        process = start(killed)
        while not (killed / "run" / signs[stage]).exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(wait)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finish(killed)
    assert same_weights(killed / "run" / "model", whole / "run" / "model")
    assert without_time(killed / "run" / "metrics.jsonl") == without_time(whole / "run" / "metrics.jsonl")
