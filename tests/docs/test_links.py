"""Folders that somebody else prepared: no link, pipe or folder in the place of a file of ours costs anybody's content."""

import os
from pathlib import Path

import pytest

from isdaa.errors import UserError, refused
from isdaa.evaluation.judges.cache import ReplyCache
from isdaa.evaluation.records import locked
from isdaa.files import append_jsonl, locked_file, own_file, write_atomically, write_folder_atomically
from isdaa.training.trainer.checkpoints import rotate, write_checkpoint
from isdaa.training.trainer.reference_logps import reference_logps


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    file = tmp_path / "victim"
    file.write_text("precious")
    return file


def stand_in(kind: str, path: Path, victim: Path) -> None:
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "dangling":
        path.symlink_to(victim.with_name("made"))
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_a_lock_is_a_plain_file_or_refused(kind: str, victim: Path, tmp_path: Path) -> None:
    stand_in(kind, tmp_path / ".lock", victim)
    with pytest.raises(UserError, match=r"\.lock: no plain file"), locked_file(tmp_path / ".lock", "taken"):
        pass
    assert victim.read_text() == "precious" and not (tmp_path / "made").exists()


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_so_is_the_lock_of_an_evaluation_and_what_is_appended_to(kind: str, victim: Path, tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    stand_in(kind, tmp_path / "evaluation" / ".lock", victim)
    with pytest.raises(UserError, match="no plain file"), locked(tmp_path / "evaluation"):
        pass
    stand_in(kind, tmp_path / "metrics.jsonl", victim)
    with pytest.raises(UserError, match=r"metrics\.jsonl: no plain file"):
        append_jsonl(tmp_path / "metrics.jsonl", [{"step": 1}])
    stand_in(kind, tmp_path / "replies.jsonl", victim)
    with pytest.raises(UserError, match=r"replies\.jsonl: no plain file"):
        ReplyCache(tmp_path / "replies.jsonl")
    assert victim.read_text() == "precious"


def test_so_is_the_lock_of_a_cache_of_logps(victim: Path, tmp_path: Path) -> None:
    pairs = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}]

    def never() -> None:
        raise AssertionError("computes while the lock is another's file")

    (tmp_path / "cache").mkdir()
    with pytest.raises(AssertionError):
        reference_logps(never, pairs, key={}, cache_dir=tmp_path / "cache")
    (lock,) = (tmp_path / "cache").glob(".*.lock")
    lock.unlink()
    lock.symlink_to(victim)
    with pytest.raises(UserError, match="no plain file"):
        reference_logps(never, pairs, key={}, cache_dir=tmp_path / "cache")
    assert victim.read_text() == "precious"


def test_a_lock_that_stands_already_keeps_what_is_in_it(tmp_path: Path) -> None:
    hard = tmp_path / ".lock"
    (tmp_path / "other").write_text("precious")
    os.link(tmp_path / "other", hard)
    with locked_file(hard, "taken"), pytest.raises(UserError, match="taken"), locked_file(hard, "taken"):
        pass
    assert (tmp_path / "other").read_text() == "precious"
    os.close(own_file(tmp_path / "new"))
    assert (tmp_path / "new").read_bytes() == b""


def test_whole_files_and_folders_take_a_links_place_and_leave_its_target(victim: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").symlink_to(victim)
    write_atomically(tmp_path / "run.json", "ours")
    assert not (tmp_path / "run.json").is_symlink() and victim.read_text() == "precious"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "f").write_text("precious")
    (tmp_path / "model").symlink_to(tmp_path / "theirs")
    write_folder_atomically(tmp_path / "model", lambda aside: (aside / "f").write_text("ours") and None)
    assert (tmp_path / "theirs" / "f").read_text() == "precious" and (tmp_path / "model" / "f").read_text() == "ours"
    assert not list(tmp_path.glob(".old-*"))


def test_names_that_a_checkpoint_is_written_under_may_be_links(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "f").write_text("precious")
    home = tmp_path / "checkpoints"
    home.mkdir()
    for name in (".writing-checkpoint-2", ".old-checkpoint-1"):
        (home / name).symlink_to(tmp_path / "theirs")
    for step in (1, 2):
        write_checkpoint(home / f"checkpoint-{step}", lambda aside: (aside / "f").write_text("ours") and None)
        (home / ".old-checkpoint-1").unlink(missing_ok=True)
        (home / ".old-checkpoint-1").symlink_to(tmp_path / "theirs")
    rotate(home, 1)
    assert (tmp_path / "theirs" / "f").read_text() == "precious"
    assert [path.name for path in home.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not any(path.is_symlink() for path in home.iterdir())


@pytest.mark.parametrize(
    ("kind", "words"), [("link", "a symbolic link that leads nowhere"), ("file", "a file, where a folder is needed")]
)
def test_what_stands_where_a_folder_must_be_is_named(kind: str, words: str, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    place.symlink_to(tmp_path / "gone") if kind == "link" else place.write_text("x")
    with pytest.raises(OSError, match="File exists") as error:
        place.mkdir(exist_ok=True)
    assert str(refused(error.value)) == f"{place}: {words}; remove it, or choose another place"


def test_a_folder_in_the_place_of_a_file_is_named_and_no_temporary_name(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match="Is a directory") as error:
        write_atomically(tmp_path / "metrics.jsonl", "x")
    assert str(refused(error.value)) == f"{tmp_path / 'metrics.jsonl'}: Is a directory"
