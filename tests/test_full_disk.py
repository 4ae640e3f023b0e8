"""A full disk ends a run with one line and exit status 2, leaves nothing half written, and the same command goes on."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import ALIGN, CHAIN, TINY_LLAMA, chat_model, content, jsonl, plain_pairs, refused, same_weights, train, without_time
from safetensors import SafetensorError
from safetensors.torch import save_file

from isdaa import disk
from isdaa.cli import main
from isdaa.config import load_config
from isdaa.disk import disk_error, free, in_units, writing
from isdaa.errors import UserError
from isdaa.experiments.worker import died
from isdaa.files import append_jsonl, write_atomically, write_folder_atomically
from isdaa.foreign import read_jsonl
from isdaa.training.disk_room import check_labels
from isdaa.training.run_folder import Run
from isdaa.training.trainer.checkpoints import write_checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# What libraries raise

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FULL, "No space left on device"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "quota exceeded"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), "File too large"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "Read-only file system"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "Permission denied"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
        (SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"), "quota exceeded"),
        (Exception("No space left on device (os error 28)"), "No space left"),  # tokenizers
        (
            OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
            "No space left",
        ),  # pyarrow
        (
            RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file data/0"),
            "writing file",
        ),
        (RuntimeError("[enforce fail at inline_container.cc:450] . unexpected pos 64 vs 0"), "unexpected pos"),
        (caused(ValueError("a cache could not be made"), FULL), "No space left"),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "No space left"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_every_librarys_word_for_a_full_disk_is_understood(error: Exception, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as found, writing(tmp_path / "weights", 3_400_000):
        raise error
    assert words in str(found.value) and str(found.value).startswith(f"{tmp_path / 'weights'}: ")


@pytest.mark.parametrize(
    "error",
    [ValueError("a number"), RuntimeError("shapes differ"), FileNotFoundError(2, "No such file"), KeyError("28")],
    ids=repr,
)
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)), writing(tmp_path / "weights"):
        raise error
    assert disk_error(error) is None


def test_the_line_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free", lambda _: 12_000)
    found = disk_error(RuntimeError("PytorchStreamWriter failed writing file"), tmp_path / "optimizer.pt", 3_400_000)
    words = "No space left on device, it needs 3.4 MB, 12 kB are free there; make room, and the same command goes on"
    assert str(found) == f"{tmp_path}/optimizer.pt: {words}"
    assert [in_units(size) for size in (0, 999, 1500, 41_000, 3.4e9, 2e12)] == [
        "0 bytes",
        "999 bytes",
        "1.5 kB",
        "41 kB",
        "3.4 GB",
        "2.0 TB",
    ]


def test_a_full_folder_for_temporary_files_is_named_and_not_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nobody knows what was written: the error has no path."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(disk, "free", lambda path: 10 if "temporary" in str(path) else 10**12)
    for path in (tmp_path / "run", None):
        assert str(disk_error(FULL, path)).startswith(f"{temporary}: No space left on device, 10 bytes are free")


# ---------------------------------------------------------------------------------------------------------------------
# Files, folders, appended records, checkpoints


@contextmanager
def no_larger_than(size: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes: the system refuses it in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def tensors(folder: Path) -> None:
    save_file({"weight": torch.zeros(10_000)}, folder / "model.safetensors")


def states(folder: Path) -> None:
    torch.save({"state": torch.zeros(10_000)}, folder / "optimizer.pt")


def text(folder: Path) -> None:
    (folder / "small").write_text("small")
    (folder / "large").write_text("x" * 40_000)


def arrow(folder: Path) -> None:
    import pyarrow as pa

    table = pa.table({"ids": list(range(10_000))})
    with pa.OSFile(str(folder / "tokens.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("fill", [tensors, states, text, arrow])
@pytest.mark.parametrize("write", [write_folder_atomically, write_checkpoint])
def test_a_folder_that_does_not_fit_leaves_nothing_and_keeps_the_old_one(
    write: Callable[..., None], fill: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-4"
    write(folder, lambda aside: (aside / "old").write_text("old") and None)
    before = content(tmp_path)
    with pytest.raises(UserError) as found, no_larger_than(9_000):
        write(folder, fill)
    assert str(found.value).startswith(f"{folder}: ") and "the same command goes on" in str(found.value)
    assert content(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"]
    write(folder, fill)
    assert not (folder / "old").exists()


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    write_atomically(tmp_path / "run.json", "old")
    with pytest.raises(UserError, match="File too large, it needs 50 kB"), no_larger_than(9_000):
        write_atomically(tmp_path / "run.json", "x" * 50_000)
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"] and (tmp_path / "run.json").read_text() == "old"


def test_an_append_that_is_cut_short_takes_nothing_of_it(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_jsonl(path, [{"a": 1}])
    with pytest.raises(UserError, match=r"records.jsonl: File too large, it needs 40 kB"), no_larger_than(9_000):
        append_jsonl(path, [{"b": "x" * 10_000}] * 4)
    assert path.read_text() == '{"a": 1}\n'
    append_jsonl(path, [{"c": 3}])
    assert read_jsonl(path) == [{"a": 1}, {"c": 3}]


@pytest.mark.parametrize("whole", ['{"a": 1}\n', "", '{"a": "' + "x" * 200_000 + '"}\n'])
def test_an_append_after_half_a_line_begins_a_line_of_its_own(whole: str, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(whole + '{"b": ' + "y" * 70_000)
    append_jsonl(path, [{"c": 3}])
    assert path.read_text() == whole + '{"c": 3}\n'


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs

LARGER = TINY_LLAMA | {"hidden_size": 64, "intermediate_size": 128}
RUN = {**CHAIN, "model.random": LARGER, "align.save_steps": 1, "sft.max_steps": 3, "align.max_steps": 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(folder, RUN) == 0
    return folder


def one_line(capsys: pytest.CaptureFixture[str], status: int) -> str:
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("isdaa: error: ")]
    assert status == 2 and len(errors) == 1 and not any("Traceback" in line for line in lines), lines
    return errors[0]


def check_goes_on(folder: Path, whole: Path) -> None:
    left = [path for path in folder.parent.rglob(".*") if not path.name.endswith((".lock", ".isdaa_cache"))]
    assert not left
    assert train(folder, RUN) == 0
    assert same_weights(folder / "model", whole / "model")
    assert without_time(folder / "metrics.jsonl") == without_time(whole / "metrics.jsonl")


@pytest.mark.parametrize(
    ("size", "what"),
    [
        (1_000, "config.yaml"),  # and what a run writes first
        (6_000, ".isdaa_cache/tokens-"),  # the cache of tokens
        (100_000, "sft-checkpoints/checkpoint-1"),  # model.safetensors
        (300_000, "sft-checkpoints/checkpoint-1"),  # optimizer.pt
    ],
)
def test_a_run_meets_a_limit_and_goes_on(
    size: int, what: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with no_larger_than(size):
        status = train(tmp_path / "run", RUN)
    line = one_line(capsys, status)
    assert what in line and str(tmp_path) in line
    check_goes_on(tmp_path / "run", whole)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own, of so few bytes, which has room again behind this block."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a file system; the limit on files stands for it elsewhere")
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,size=100m", str(folder)], check=True)


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", str(tmp_path / "disk")], capture_output=True)


@pytest.mark.parametrize("size", ["400k", "1400k", "2200k"])  # the first and the second checkpoint of sft, one of align
def test_a_run_on_a_full_disk_goes_on_when_there_is_room(
    size: str, whole: Path, disks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(disks, size):
        with monkeypatch.context() as patched:
            patched.setattr("isdaa.training.disk_room.check_room", lambda *_: None)
            status = train(disks / "run", RUN)
        line = one_line(capsys, status)
        assert "/checkpoint-" in line and "No space left on device, it needs " in line and "are free there" in line
    check_goes_on(disks / "run", whole)


def test_a_full_disk_for_temporary_files(disks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(disks, "64k"):
        monkeypatch.setenv("TMPDIR", str(disks))
        (disks / "everything").write_bytes(b"x" * 60_000)
        with pytest.raises(OSError) as raised, open(disks / "more", "wb", buffering=0) as file:
            for _ in range(20):
                file.write(b"x" * 4096)
        assert f"{disks}: No space left on device" in str(disk_error(raised.value))


def test_evaluation_and_report_meet_a_limit_and_go_on(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate = ["evaluate", "--model_path", str(whole)]
    with no_larger_than(3_000):
        assert str(whole / "evaluation") in refused(capsys, evaluate, "File too large, it needs ")
    assert main(evaluate) == 0
    report = ["report", str(whole), "--output", str(tmp_path / "report")]
    with no_larger_than(20_000):  # the charts, or the page
        assert str(tmp_path / "report") in refused(capsys, report, "File too large, it needs ")
    assert main(report) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Before a stage


@pytest.mark.parametrize(
    ("stage", "changes", "words"),
    [
        ("sft", {}, "3 checkpoints of 569 kB, 1 model of 190 kB"),
        ("sft", {"lora.rank": 4}, "1 model of 190 kB"),
        ("sft", {"sft.optimizer": "sgd"}, "3 checkpoints of 190 kB"),
        ("label", {}, "the label stage needs about"),
        ("align", {}, "3 checkpoints of 569 kB, 1 model of 190 kB"),
        ("align", {"align.save_total_limit": 1}, "2 checkpoints of 569 kB"),
        ("align", {"guard.steps": 1, "guard.keep": "best"}, "3 models of 190 kB"),
    ],
    ids=str,
)
def test_a_stage_without_room_is_refused_before_it_starts(
    stage: str,
    changes: dict[str, Any],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = RUN | changes
    stages = RUN["stages"]
    assert stage == "sft" or train(tmp_path / "run", settings | {"stages": stages[: stages.index(stage)]}) == 0
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(disk, "free", lambda _: 1_000)
        status = train(tmp_path / "run", settings | {"stages": stages[: stages.index(stage) + 1]})
    line = one_line(capsys, status)
    assert words in line and "1.0 kB are free: " in line and "are missing; make room, or " in line
    assert not list((tmp_path / "run").rglob("checkpoint-*"))
    assert not (tmp_path / "run" / "pairs" / "responses.jsonl").exists() or stage == "align"


def test_the_reward_stage_is_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    chat_model(tmp_path / "my_model")
    jsonl(tmp_path / "pairs.jsonl", plain_pairs(12))
    monkeypatch.setattr(disk, "free", lambda _: 1_000)
    settings = {key: value for key, value in ALIGN.items() if not key.startswith(("align", "objective", "evaluation"))}
    assert "the reward stage needs about" in one_line(capsys, train("run", settings | {"stages": ["reward"]}))


def test_what_is_there_already_needs_no_room(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(disk, "free", lambda _: 1_000)
    assert train(whole, RUN) == 0  # finished


@pytest.mark.parametrize("changes", [{}, {"lora.rank": 4}, {"align.save_total_limit": 1}], ids=str)
def test_the_estimate_is_what_the_stage_writes(changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model of a few megabytes, beside which the small files of a checkpoint do not count."""
    monkeypatch.chdir(tmp_path)
    chat_model(tmp_path / "my_model", hidden_size=256, intermediate_size=512)
    jsonl(tmp_path / "pairs.jsonl", plain_pairs(12))
    wanted: list[float] = []
    original = disk.check_room

    def noted(what: str, needs: Any, *arguments: Any) -> None:
        wanted.append(sum(needs.values()))
        original(what, needs, *arguments)

    monkeypatch.setattr("isdaa.training.disk_room.check_room", noted)
    largest = 0.0

    def measure() -> None:
        nonlocal largest
        files = [path for name in ("checkpoints", "model") for path in (tmp_path / "run").rglob("*") if f"/{name}" in str(path)]
        largest = max(largest, sum(path.stat().st_size for path in set(files) if path.is_file()))

    from isdaa.training.trainer import checkpoints

    rotate = checkpoints.remove_tree
    monkeypatch.setattr(checkpoints, "remove_tree", lambda path: (measure(), rotate(path)))
    assert train("run", ALIGN | {"align.save_steps": 1, "align.max_steps": 3} | changes) == 0
    measure()
    assert len(wanted) == 1
    slack = 200_000 * 4  # of small files, of which the tokenizer is the largest
    assert largest - slack < wanted[0] < 1.3 * largest + slack


@pytest.mark.parametrize("stage", ["sft", "align"])
def test_a_stage_that_misses_its_model_alone_needs_no_room_for_checkpoints(
    stage: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    module = {"sft": "sft_and_reward", "align": "align"}[stage]
    settings = RUN | {"stages": [stage], "model.path": str(whole / "sft"), "model.tokenizer": None, "model.random": None}
    settings |= {"data.pairs": str(whole / "pairs" / "train.jsonl")}
    with monkeypatch.context() as patched:
        patched.setattr(f"isdaa.training.stages.{module}.keep_model", interrupted)
        assert train(tmp_path / "run", settings) == 130
    asked: list[str] = []
    monkeypatch.setattr("isdaa.training.disk_room.check_room", lambda what, needs, how, parts="": asked.append(parts))
    assert train(tmp_path / "run", settings) == 0
    assert len(asked) == 1 and asked[0].startswith("0 checkpoints of ") and ", 1 model of " in asked[0]


def test_responses_that_are_there_need_no_room_again(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(
        "isdaa.training.disk_room.check_room", lambda what, needs, how, parts="": asked.append(sum(needs.values()))
    )
    run = Run(load_config(whole / "config.yaml", {"output_dir": str(tmp_path / "other")}))
    rows = [{"prompt_ids": [1] * 20}] * 40
    check_labels(run, rows)
    (tmp_path / "other" / "pairs").mkdir(parents=True)
    (tmp_path / "other" / "pairs" / "responses.jsonl").write_bytes(b"x" * 100)
    check_labels(run, rows)
    assert asked[0] - asked[1] == 100


def test_room_is_counted_by_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free", lambda _: 100)
    disk.check_room("it", {tmp_path / "a" / "b": 60.0, tmp_path / "c": 40.0}, "or else")
    with pytest.raises(UserError, match=r"a/b: it needs about 101 bytes there, 100 bytes are free: 1 bytes are missing"):
        disk.check_room("it", {tmp_path / "a" / "b": 60.0, tmp_path / "c": 41.0}, "or else")
    monkeypatch.setattr(disk, "free", lambda _: None)  # a file system that does not say
    disk.check_room("it", {tmp_path: 1e15}, "or else")


def test_free_is_that_of_the_nearest_folder_there_is(tmp_path: Path) -> None:
    room = free(tmp_path / "not" / "yet")
    assert room is not None and room > 0


def test_a_sweep_does_not_call_a_full_disk_a_kill(disks: Path, tmp_path: Path) -> None:
    """Its process can write neither result nor log."""
    assert died(tmp_path)["error"] == "its process was killed; the same command goes on"
    with small_disk(disks, "64k"):
        (disks / "everything").write_bytes(b"x" * 60_000)
        assert f"{disks}: No space left on device" in died(disks)["error"]
