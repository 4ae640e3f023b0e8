"""kill -9 of one of two processes, or of torchrun: nothing goes on alone, and the same command ends as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

import psutil
import pytest
from chains import LONGER, config_file, same_weights, without_time
from patience import HANGS

STAGES = ("sft", "label", "align")
KILLS = 3  # while each stage is at work, for each seed
TARGETS = ("rank 0", "rank 1", "torchrun", "all")
TWO = LONGER | {"sft.batch_size": 8, "align.batch_size": 4, "objective.normalize": "batch"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(folder: Path) -> psutil.Popen:
    command = [*TORCHRUN, "-m", "isdaa.cli", "train", "--config", str(folder / "run.yaml"), "--output_dir", "run"]
    with open(folder / "log.txt", "ab") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return psutil.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True)


def finish(folder: Path) -> None:
    assert start(folder).wait(timeout=HANGS) == 0, (folder / "log.txt").read_text()[-4000:]


def wait_for_work(process: psutil.Popen, folder: Path) -> None:
    """Until this start has taken the folder."""
    record = folder / "run" / "run.json"
    while process.poll() is None and not (record.exists() and record.stat().st_mtime > process.create_time() + 1):
        time.sleep(0.01)


def kill(process: psutil.Popen, target: str) -> None:
    """kill -9, after which all the others must end by themselves, too."""
    workers = process.children()
    by_rank = {f"rank {worker.environ()['RANK']}": worker for worker in workers}
    assert len(by_rank) == 2
    for victim in [process, *workers] if target == "all" else [by_rank.get(target, process)]:
        victim.kill()
    # torchrun ends the second process when the first one is gone; without it they must end at once.
    _, alive = psutil.wait_procs([process, *workers], timeout=5 if target == "torchrun" else 60)
    assert not alive, f"after kill -9 of {target}: {alive}"


def at_work(folder: Path) -> str:
    """The stage that the run is at, or `end`."""
    stages = json.loads((folder / "run" / "run.json").read_text())["stages"]
    return next((name for name in STAGES if not stages.get(name, {}).get("done")), "end")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes that was left alone, and how long each of its stages took."""
    folder = tmp_path_factory.mktemp("whole")
    config_file(folder / "run.yaml", TWO)
    process = start(folder)
    wait_for_work(process, folder)
    seconds = dict.fromkeys(STAGES, 0.0)
    while process.poll() is None:
        stage, begun = at_work(folder), time.monotonic()
        time.sleep(0.02)
        if stage in seconds:
            seconds[stage] += time.monotonic() - begun
    assert process.returncode == 0, (folder / "log.txt").read_text()[-4000:]
    (folder / "seconds.json").write_text(json.dumps(seconds))
    return folder


def check(killed: Path, whole: Path) -> None:
    for part in ("sft", "model"):
        assert same_weights(killed / "run" / part, whole / "run" / part)
    assert (killed / "run" / "pairs" / "train.jsonl").read_bytes() == (whole / "run" / "pairs" / "train.jsonl").read_bytes()
    assert without_time(killed / "run" / "metrics.jsonl") == without_time(whole / "run" / "metrics.jsonl")
    left = [p.name for p in (killed / "run").iterdir() if p.name.startswith((".writing", ".old")) or p.name.endswith(".tmp")]
    assert not left


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_anywhere_two_processes_end_like_two_left_alone(whole: Path, tmp_path: Path, seed: int) -> None:
    seconds = json.loads((whole / "seconds.json").read_text())
    chance = random.Random(seed)
    config_file(tmp_path / "run.yaml", TWO)
    met: list[tuple[str, str]] = []
    for stage in STAGES:
        for _ in range(KILLS):
            process = start(tmp_path)
            wait_for_work(process, tmp_path)
            while process.poll() is None and STAGES.index(stage) > ([*STAGES, "end"].index(at_work(tmp_path))):
                time.sleep(0.005)
            deadline = time.monotonic() + chance.uniform(0, 0.9) * seconds[stage]
            while time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.005)
            if process.poll() is not None:
                assert process.returncode == 0, (tmp_path / "log.txt").read_text()[-4000:]
                break
            target = TARGETS[(len(met) + seed) % len(TARGETS)]
            kill(process, target)
            met.append((target, at_work(tmp_path)))
    finish(tmp_path)
    check(tmp_path, whole)
    print(f"\nseed {seed}: {len(met)} kills: {met}")
    assert len(met) > 2 * KILLS


@pytest.mark.slow
def test_a_start_beside_one_at_work_is_refused_and_harms_nothing(whole: Path, tmp_path: Path) -> None:
    config_file(tmp_path / "run.yaml", TWO)
    process = start(tmp_path)
    wait_for_work(process, tmp_path)
    everyone = [process, *process.children(recursive=True)]
    for one in everyone:
        one.suspend()  # however long the second takes to start, the first is still at work
    second = start(tmp_path)
    try:
        assert second.wait(timeout=HANGS) != 0
    finally:
        for one in everyone:
            one.resume()
    assert (tmp_path / "log.txt").read_text().count("another isdaa process is working in this folder") == 1
    assert process.wait(timeout=HANGS) == 0
    check(tmp_path, whole)
