"""Resuming equals not having stopped; a checkpoint is whole or absent, also under kill -9."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import tiny_model, token_rows, trainer_of, with_reference
from transformers import AutoModelForCausalLM

from isdaa import Objective, manifest
from isdaa.errors import UserError
from isdaa.files import sync_tree
from isdaa.training.trainer import checkpoints as checkpoints_module
from isdaa.training.trainer.callbacks import MetricsFile
from isdaa.training.trainer.checkpoints import (
    MANIFEST,
    checkpoints,
    complete_checkpoints,
    defect,
    newest_complete_checkpoint,
    rotate,
    sampled_digest,
    write_checkpoint,
    write_manifest,
)

# Two epochs of 6 steps; checkpoints and evaluations at 4, 8 and 12; logs every 3 steps, so that a checkpoint falls
# within a logging interval; and weights that span two micro-batches and are permuted by the step.
SETTINGS: dict[str, Any] = {
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "epochs": 2,
    "save_steps": 4,
    "logging_steps": 3,
    "optimizer": "adamw",
    "lr_scheduler": "cosine_with_min_lr",
    "warmup_steps": 2,
    "max_grad_norm": 1.0,
}
OBJECTIVE = Objective(weight="shuffled", beta=0.3)


def start(folder: Path, **own: Any) -> Any:
    """The same run in every process: model, data and trainer from fixed seeds."""
    model = tiny_model()
    train = with_reference(token_rows(22), tiny_model())
    held_out = with_reference(token_rows(7, seed=9), tiny_model())
    own = {"callbacks": [MetricsFile(folder / "metrics.jsonl")], **own}
    return trainer_of(model, folder / "checkpoints", train, held_out, OBJECTIVE, own=own, **SETTINGS)


def state_of(folder: Path) -> dict[str, Any]:
    """Weights, optimiser, schedule and metrics at the end of a run."""
    last = folder / "checkpoints" / "checkpoint-12"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": load_file(last / "model.safetensors"),
        "optimizer": torch.load(last / "optimizer.pt"),
        "scheduler": torch.load(last / "scheduler.pt"),
        "metrics": [{key: value for key, value in line.items() if "time/" not in key} for line in lines],
    }


def assert_same(one: Any, other: Any) -> None:
    """Equal bit for bit, all the way down."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    start(folder).train()
    return folder


def test_the_log_of_a_run(whole_run: Path) -> None:
    lines = state_of(whole_run)["metrics"]
    assert [line["step"] for line in lines if "loss" in line] == [1, 3, 4, 6, 8, 9, 12]
    assert [line["step"] for line in lines if "eval/loss" in line] == [4, 8, 12]
    assert [line["pairs_seen"] for line in lines if "loss" in line] == [4, 12, 16, 22, 30, 34, 44]
    assert ["start/drift_rms" in line for line in lines] == [True] + [False] * (len(lines) - 1)
    assert lines[0]["start/drift_max"] <= 1e-3
    assert abs(lines[0]["weights/log_weight_mean"]) <= 1e-3


@pytest.mark.parametrize("step", [4, 8])
def test_resumed_equals_uninterrupted_bit_for_bit(step: int, whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    for path in checkpoints(tmp_path / "run" / "checkpoints"):
        if path.name > f"checkpoint-{step}" or len(path.name) > len("checkpoint-8"):
            shutil.rmtree(path)
    # What a kill leaves: lines beyond the checkpoint, the last of them cut short.
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-25])
    trainer = start(tmp_path / "run")
    newest = newest_complete_checkpoint(trainer.args.output_dir)
    assert newest is not None and newest.endswith(f"checkpoint-{step}")
    torch.manual_seed(999)
    trainer.train(resume_from_checkpoint=newest)
    assert_same(state_of(tmp_path / "run"), state_of(whole_run))


def test_the_comparison_can_fail(whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-12")
    # An optimiser that forgets is what "resume does not resume" usually means.
    optimizer = tmp_path / "run" / "checkpoints" / "checkpoint-8" / "optimizer.pt"
    state = torch.load(optimizer)
    for moments in state["state"].values():
        moments["exp_avg"].zero_()
    torch.save(state, optimizer)
    with pytest.raises(UserError, match=r"optimizer.pt is damaged"):
        start(tmp_path / "run").train(resume_from_checkpoint=str(optimizer.parent))
    trainer = start(tmp_path / "run")
    assert newest_complete_checkpoint(trainer.args.output_dir).endswith("checkpoint-4")  # the change is seen
    write_manifest(optimizer.parent)
    trainer.train(resume_from_checkpoint=str(optimizer.parent))
    with pytest.raises(AssertionError):
        assert_same(state_of(tmp_path / "run")["weights"], state_of(whole_run)["weights"])


class Killed(BaseException):
    """Stands in for SIGKILL within one process: nothing catches it."""


@pytest.mark.parametrize("moment", ["in the middle of saving", "before the manifest", "while syncing"])
def test_a_run_that_dies_while_it_writes_a_checkpoint(
    moment: str, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = start(tmp_path)
    plan: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "in the middle of saving": (trainer, "_save_rng_state", trainer._save_rng_state),
        "before the manifest": (checkpoints_module, "write_manifest", write_manifest),
        "while syncing": (checkpoints_module, "sync_tree", sync_tree),
    }
    place, name, original = plan[moment]

    def deadly(folder: Any) -> None:
        if "checkpoint-8" in str(folder):
            raise Killed
        original(folder)

    monkeypatch.setattr(place, name, deadly)
    with pytest.raises(Killed):
        trainer.train()
    monkeypatch.undo()
    folder = tmp_path / "checkpoints"
    assert (folder / ".writing-checkpoint-8").is_dir() and not (folder / "checkpoint-8").exists()
    with caplog.at_level(logging.WARNING):
        newest = newest_complete_checkpoint(folder)
    assert newest == str(folder / "checkpoint-4") and "skipped" in caplog.text
    start(tmp_path).train(resume_from_checkpoint=newest)
    assert_same(state_of(tmp_path), state_of(whole_run))
    assert not list(folder.glob(".*"))


KILLED_RUN = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import test_checkpoints
from isdaa.training.trainer import checkpoints
write_manifest = checkpoints.write_manifest
def deadly(folder):
    if folder.name.endswith("checkpoint-8"):
        # Half a file, and gone.
        weights = folder / "model.safetensors"
        os.truncate(weights, weights.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    write_manifest(folder)
checkpoints.write_manifest = deadly
test_checkpoints.start(Path({folder!r})).train()
"""


@pytest.mark.slow
def test_kill_9_in_the_middle_of_writing_a_checkpoint(whole_run: Path, tmp_path: Path) -> None:
    program = KILLED_RUN.format(paths=[str(Path(__file__).parent), *sys.path], folder=str(tmp_path))
    killed = subprocess.run([sys.executable, "-c", program], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    newest = newest_complete_checkpoint(tmp_path / "checkpoints")
    assert newest is not None and newest.endswith("checkpoint-4")
    start(tmp_path).train(resume_from_checkpoint=newest)
    assert_same(state_of(tmp_path), state_of(whole_run))


def test_a_checkpoint_is_a_plain_folder(whole_run: Path) -> None:
    folder = whole_run / "checkpoints" / "checkpoint-8"
    assert {
        "model.safetensors",
        "config.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    } <= {path.name for path in folder.iterdir()}
    assert not (folder / "training_args.bin").exists()
    assert not any(path.name.startswith(".") for path in folder.parent.iterdir())
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert model.config.use_cache is True


def test_a_hook_writes_into_the_checkpoint_before_it_has_its_name(tmp_path: Path) -> None:
    seen = []

    def hook(folder: Path, step: int) -> None:
        seen.append((folder.name, step, (tmp_path / "checkpoints" / f"checkpoint-{step}").exists()))
        (folder / "isdaa.json").write_text("{}")

    trainer = start(tmp_path, before_rename=hook)
    trainer.args.max_steps = 4
    trainer.train()
    assert seen == [(".writing-checkpoint-4", 4, False)]
    folder = tmp_path / "checkpoints" / "checkpoint-4"
    assert defect(folder) is None
    (folder / "isdaa.json").write_text("{ }")
    assert "isdaa.json" in str(defect(folder))


@pytest.mark.parametrize("damage", ["no manifest", "manifest cut", "missing", "cut", "changed", "empty folder"])
def test_damaged_checkpoints_are_passed_over_with_a_word(
    damage: str, whole_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole_run / "checkpoints", tmp_path / "c")
    last = tmp_path / "c" / "checkpoint-12"
    weights, manifest = last / "model.safetensors", last / MANIFEST
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "manifest cut":
        manifest.write_bytes(manifest.read_bytes()[:-40])
    elif damage == "missing":
        weights.unlink()
    elif damage == "cut":
        os.truncate(weights, weights.stat().st_size - 1)
    elif damage == "changed":
        content = bytearray(weights.read_bytes())
        content[-3] ^= 1
        weights.write_bytes(content)
    else:
        shutil.rmtree(last)
        last.mkdir()
    with caplog.at_level(logging.WARNING):
        assert newest_complete_checkpoint(tmp_path / "c") == str(tmp_path / "c" / "checkpoint-8")
    assert "checkpoint-12" in caplog.text and "skipped" in caplog.text
    assert [Path(path).name for path in complete_checkpoints(tmp_path / "c")] == ["checkpoint-4", "checkpoint-8"]


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert newest_complete_checkpoint(tmp_path) is None
    assert newest_complete_checkpoint(tmp_path / "absent") is None
    (tmp_path / "checkpoint-final").mkdir()
    assert checkpoints(tmp_path) == []


def test_a_card_may_be_edited(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "README.md").write_text("one")
        (folder / "weights").write_text("w")

    write_checkpoint(tmp_path / "checkpoint-1", fill)
    (tmp_path / "checkpoint-1" / "README.md").write_text("another")
    assert defect(tmp_path / "checkpoint-1") is None


def test_writing_again_replaces_and_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step, text in ((2, "a"), (10, "b"), (9, "c"), (10, "d")):
        write_checkpoint(tmp_path / f"checkpoint-{step}", lambda folder, text=text: (folder / "f").write_text(text))
    assert (tmp_path / "checkpoint-10" / "f").read_text() == "d"
    rotate(tmp_path, None)
    assert len(checkpoints(tmp_path)) == 3
    rotate(tmp_path, 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]


def test_rotation_keeps_a_good_checkpoint_rather_than_a_broken_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-100").mkdir()
    (tmp_path / "checkpoint-100" / "f").write_text("half")
    for step in (50, 60):
        write_checkpoint(tmp_path / f"checkpoint-{step}", lambda folder: (folder / "f").write_text("whole") and None)
        rotate(tmp_path, 1)
        assert newest_complete_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{step}")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-60", "checkpoint-100"]


def test_the_digest_of_a_large_file_sees_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "WINDOW", 16)
    monkeypatch.setattr(manifest, "WHOLE", 4)
    path = tmp_path / "f"
    content = bytearray(os.urandom(1000))
    path.write_bytes(content)
    digest = sampled_digest(path)
    for place in (0, 999):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert sampled_digest(path) != digest
    path.write_bytes(content[:-1])
    assert sampled_digest(path) != digest


# --- going on with other settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 3}, "a global batch of 4 rows, this one 6 rows"),
        ({"gradient_accumulation_steps": 1}, "a global batch of 4 rows, this one 2 rows"),
        ({"optimizer": "sgd"}, "optimizer adamw_torch_fused, this one sgd"),
        ({"seed": 5}, "seed 3, this one 5"),
        ({"rows": 21}, "a data set of 22 rows, this one 21 rows"),
        ({"rows_seed": 3}, "pairs "),
        ({"group_by_prompt": True}, "order pair by pair, this one prompt by prompt"),
        ({"objective": Objective(weight="shuffled", beta=0.1)}, "objective "),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_other_batches_data_or_settings_is_refused(
    changes: dict[str, Any], words: str, whole_run: Path, tmp_path: Path
) -> None:
    again = other(tmp_path, **changes)
    checkpoint = whole_run / "checkpoints" / "checkpoint-4"
    with pytest.raises(UserError) as refused:
        again.train(resume_from_checkpoint=str(checkpoint))
    assert words in str(refused.value) and str(checkpoint) in str(refused.value)
    assert again.state.global_step == 0


def other(folder: Path, rows: int = 22, rows_seed: int = 0, **changes: Any) -> Any:
    """`start`, but for some settings."""
    own = {"group_by_prompt": True} if changes.pop("group_by_prompt", False) else {}
    train = with_reference(token_rows(rows, seed=rows_seed), tiny_model())
    objective = changes.pop("objective", OBJECTIVE)
    return trainer_of(tiny_model(), folder / "checkpoints", train, None, objective, own=own, **(SETTINGS | changes))


def test_the_same_global_batch_split_otherwise_reads_every_pair_once_an_epoch(whole_run: Path, tmp_path: Path) -> None:
    read: list[int] = []
    again = other(tmp_path, batch_size=1, gradient_accumulation_steps=4, epochs=1)
    original = again.pieces_of

    def noted(batch: Any, *others: Any) -> Any:
        read.extend(batch.index[batch.valid].tolist())
        return original(batch, *others)

    again.pieces_of = noted
    again.train(resume_from_checkpoint=str(whole_run / "checkpoints" / "checkpoint-4"))
    first = again.sampler.order(0)[:16].tolist()  # four steps of the run that was resumed
    assert sorted(first + read) == list(range(22))


def test_another_course_of_the_learning_rate_is_told(whole_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    again = other(tmp_path, epochs=1, learning_rate=0.5)
    again.train(resume_from_checkpoint=str(whole_run / "checkpoints" / "checkpoint-4"))
    (line,) = [record.getMessage() for record in caplog.records if "follows the new schedule" in record.getMessage()]
    assert "length 2 epochs, now 1 epochs" in line and "learning_rate 0.01, now 0.5" in line
    assert again.state.global_step == 6


def test_true_goes_on_from_the_newest_complete_checkpoint(whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "checkpoint-12" / "model.safetensors").unlink()
    again = start(tmp_path)
    steps = []
    again.pieces_of = lambda *arguments, kept=again.pieces_of: steps.append(again.state.global_step) or kept(*arguments)
    again.train(resume_from_checkpoint=True)
    assert steps[0] == 8
    assert_same(state_of(tmp_path), state_of(whole_run))
