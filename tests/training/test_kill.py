"""kill -9 at any moment costs nothing but time: the same command ends with the very weights of a run left alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from chains import (
    CHAIN,
    LONGER,
    chat_model,
    config_file,
    finish,
    jsonl,
    plain_pairs,
    read_lines,
    same_weights,
    start,
    train,
    without_time,
)
from patience import HANGS, killed_after

from isdaa import files
from isdaa.experiments.worker import PRELOAD
from isdaa.training.guard import guard, measurement
from isdaa.training.run_folder import Run
from isdaa.training.stages import align as align_module
from isdaa.training.stages import label, sft_and_reward
from isdaa.training.trainer import checkpoints
from isdaa.training.trainer.whole_checkpoints import WholeCheckpoints

KILLS = 8


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
    config_file(folder / "run.yaml", LONGER)
    begun = time.monotonic()
    finish(folder)
    (folder / "seconds").write_text(str(time.monotonic() - begun))
    return folder


@pytest.mark.slow
def test_killed_anywhere_a_run_ends_like_one_left_alone(whole: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    config_file(killed / "run.yaml", LONGER)
    seconds = float((whole / "seconds").read_text())
    moments = random.Random(3)
    met = []
    for _ in range(KILLS):
        process = start(killed)
        while not working(killed) and process.poll() is None:
            time.sleep(0.01)
        if not killed_after(process, moments.uniform(0.1, 0.6) * seconds):
            break
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
    config_file(killed / "run.yaml", LONGER)
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


# ---------------------------------------------------------------------------------------------------------------------
# At chosen points of every stage, in a process that kills itself there


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(
    place: Any, name: str, when: Callable[..., bool] = lambda *_: True, damage: Callable[..., None] = lambda *_: None
) -> None:
    """From now on the process dies at the call of `place.name` with arguments for which `when` is true."""
    original = getattr(place, name)

    def deadly(*arguments: Any, **keywords: Any) -> Any:
        if when(*arguments):
            damage(*arguments)
            die()
        return original(*arguments, **keywords)

    setattr(place, name, deadly)


def after_steps(number: int) -> None:
    """Death after so many optimiser steps of this process, before the last of them is logged or saved."""
    calls: list[int] = []
    before(WholeCheckpoints, "_maybe_log_save_evaluate", lambda *_: calls.append(1) or len(calls) >= number)


def half_a_file(folder: Path) -> None:
    weights = next(folder.glob("*.safetensors"))
    os.truncate(weights, weights.stat().st_size // 2)


def half_removed(folder: Any, *_: Any) -> bool:
    return Path(folder).name.startswith(".old-checkpoint") and Path(folder).exists()


def half_a_line(path: Path, records: Any) -> None:
    """All records but the last, of which a part is written."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.parent.mkdir(exist_ok=True)
    with open(path, "a") as file:
        file.write(text[: -len(text.splitlines()[-1]) // 2])


def later(number: int) -> Callable[..., bool]:
    """True from the n-th call on."""
    calls: list[int] = []
    return lambda *_: calls.append(1) or len(calls) >= number


MOMENTS: dict[str, Callable[[], None]] = {
    "first step": lambda: after_steps(1),
    "second step": lambda: after_steps(2),
    "third step": lambda: after_steps(3),
    "a checkpoint half written": lambda: before(checkpoints, "write_manifest", later(2), half_a_file),
    "a checkpoint not yet named": lambda: before(checkpoints, "sync_tree", later(2)),
    "rotation": lambda: before(shutil, "rmtree", half_removed, lambda folder, *_: half_a_file(Path(folder))),
    "after the last checkpoint": lambda: [before(place, "keep_model") for place in (sft_and_reward, align_module)] and None,
    "the final model half written": lambda: before(
        files, "sync_tree", lambda folder: folder.name.startswith((".writing-sft-", ".writing-reward-", ".writing-model-"))
    ),
    "before the stage is done": lambda: before(Run, "finish"),
    "second block": lambda: before(label, "append_jsonl", later(2), half_a_line),
    "behaviour logps": lambda: before(label, "reference_logps"),
    "pairs": lambda: before(label, "write_jsonl"),
    "opponents": lambda: before(measurement, "draw_records"),
    "opponents not scored": lambda: before(measurement.Blocks, "add", lambda blocks, kind, *_: kind == "scores"),
    "a look": lambda: before(measurement.Looks, "look", later(2)),
    "a best model half written": lambda: before(files, "sync_tree", lambda folder: folder.name.startswith(".writing-best")),
    "a best model not yet linked": lambda: before(guard.BestModel, "link"),
    "a best model before its checkpoint": lambda: before(WholeCheckpoints, "_save_checkpoint", later(2)),
    "facts": lambda: before(label, "write_json"),
}
END = ("after the last checkpoint", "the final model half written", "before the stage is done")
# From the checkpoint of step 0, 2, 3, 3, 4 and so on, of six to seven steps, of which each leaves a checkpoint, and two stay.
EVERYWHERE = ("third step", "a checkpoint half written", "first step", "rotation", "a checkpoint not yet named", *END)
SFT = {
    **CHAIN,
    "stages": ["sft"],
    "data.limit": 22,
    "sft.max_steps": None,
    "sft.batch_size": 2,
    "sft.gradient_accumulation_steps": 3,
}
SFT |= {"sft.logging_steps": 3}
PAIRS = {
    "model.path": "my_model",
    "data.pairs": "pairs.jsonl",
    "data.eval_fraction": 0.2,
    "tokenization.max_length": 200,
    "tokenization.max_prompt_length": 120,
}
REWARD = PAIRS | {
    "stages": ["reward"],
    "reward.batch_size": 2,
    "reward.gradient_accumulation_steps": 3,
    "reward.logging_steps": 3,
    "reward.learning_rate": 1e-2,
    "reward.warmup_steps": 1,
}
ALIGN = PAIRS | {
    "objective.method": "is_dpo",
    "align.batch_size": 2,
    "align.gradient_accumulation_steps": 3,
    "align.logging_steps": 3,
    "align.learning_rate": 1e-2,
    "align.warmup_steps": 1,
    "align.save_steps": 1,
    "align.save_total_limit": 2,
    "align.probe": False,
}
# Of a random model on the embedded world: a guard that looks at every step.
GUARD = {**CHAIN, "stages": ["label", "align"], "align.save_steps": 1, "align.save_total_limit": 2, "guard.steps": 1}
GUARD |= {"align.max_steps": None, "guard.prompts": 8, "guard.opponent_samples": 1, "guard.keep": "best"}
LABEL = {**CHAIN, "stages": ["label"], "label.batch_size": 8}


def deadly_train(folder: str, name: str, settings: dict[str, Any], moment: str | None) -> None:
    """In a process of its own: the run, which dies at `moment` where it comes to it."""
    os.chdir(folder)
    small_blocks()
    if moment is not None:
        MOMENTS[moment]()
    os._exit(train(name, settings))


def small_blocks() -> None:
    label.BLOCK = 16


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes start from one that has imported the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "chains", __name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # the server has no other way to find the tests
        forkserver.ensure_running()
    return context


LOOKS = (
    *("opponents", "opponents not scored", "a best model half written", "a best model not yet linked", "a look"),
    *("a best model before its checkpoint", *END),
)
HALF, MORE = {"epochs": 0.5}, {"epochs": 1.5}


@pytest.mark.parametrize(
    ("stage", "length", "steps", "moments"),
    [
        ("sft", HALF, 2, ("second step", *END)),
        ("sft", MORE, 6, EVERYWHERE),
        ("reward", {"max_steps": 7}, 7, EVERYWHERE),
        ("align", MORE, 6, EVERYWHERE),
        ("guard", {"max_steps": 5}, 5, LOOKS),
        ("label", {}, None, ("second block", "second block", "behaviour logps", "pairs", "facts", "before the stage is done")),
        pytest.param("sft", {"max_steps": 7}, 7, EVERYWHERE, marks=pytest.mark.slow),
        pytest.param("sft", {"epochs": 2}, 8, EVERYWHERE, marks=pytest.mark.slow),
        pytest.param("reward", HALF, 2, ("second step", *END), marks=pytest.mark.slow),
        pytest.param("reward", MORE, 6, EVERYWHERE, marks=pytest.mark.slow),
        pytest.param("align", HALF, 2, ("second step", *END), marks=pytest.mark.slow),
        pytest.param("align", {"max_steps": 7}, 7, EVERYWHERE, marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)[:8],
)
def test_killed_in_every_phase_a_stage_ends_as_if_left_alone(
    stage: str,
    length: dict[str, Any],
    steps: int | None,
    moments: tuple[str, ...],
    processes: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed, gone on with, killed in the next phase, and so on: one wrong resume among them would show at the end.

    All runs, the one left alone as well, are processes of one kind, as a user's are: what other tests have left in this one must
    not reach their last bits.
    """

    def run(name: str, settings: dict[str, Any], moment: str | None = None) -> int | None:
        process = processes.Process(target=deadly_train, args=(str(tmp_path), name, settings, moment))
        process.start()
        process.join(HANGS)
        return process.exitcode

    monkeypatch.chdir(tmp_path)
    chat_model(tmp_path / "my_model")
    jsonl(tmp_path / "pairs.jsonl", plain_pairs(24))
    settings = {"sft": SFT, "reward": REWARD, "align": ALIGN, "label": LABEL, "guard": GUARD}[stage]
    section = "align" if stage == "guard" else stage
    settings = settings | {f"{section}.{name}": value for name, value in length.items()}
    if stage == "guard":  # it kills in align; what its pairs are of is not at stake
        assert run("killed", settings | {"stages": ["label"]}) == 0
    assert run("whole", settings | {"reference.cache_dir": "whole-cache"}) == 0
    for moment in moments:
        assert run("killed", settings, moment) == -signal.SIGKILL, f"not met: {moment}"
    assert run("killed", settings) == 0
    output = {"sft": "sft", "reward": "reward", "align": "model", "label": "pairs", "guard": "model"}[stage]
    whole, killed = tmp_path / "whole" / output, tmp_path / "killed" / output
    if stage == "label":
        assert (whole / "train.jsonl").read_bytes() == (killed / "train.jsonl").read_bytes()
        responses = [
            {line["id"]: line["responses"] for line in read_lines(folder / "responses.jsonl")} for folder in (whole, killed)
        ]
        assert responses[0] == responses[1]
        return
    assert same_weights(whole, killed)
    records = [json.loads((folder / "isdaa.json").read_text()) for folder in (whole, killed)]
    for record in records:
        record["metrics"] = {name: value for name, value in record["metrics"].items() if "time/" not in name}
    assert records[0]["step"] == records[1]["step"] == steps
    assert records[0]["metrics"] == records[1]["metrics"]
    if stage == "guard":
        assert same_weights(tmp_path / "whole" / "best", tmp_path / "killed" / "best")
    if section == "align":
        assert without_time(tmp_path / "whole" / "metrics.jsonl") == without_time(tmp_path / "killed" / "metrics.jsonl")
    assert not [path for path in (tmp_path / "killed").rglob(".*") if path.name not in (".lock",)]
