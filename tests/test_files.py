"""Folders that appear whole or not at all, also where several processes write the same one."""

import os
import stat
import time
from pathlib import Path

import pytest

from isdaa.files import write_folder_atomically


def write(folder: Path, text: str) -> None:
    write_folder_atomically(folder, lambda aside: (aside / "f").write_text(text) and None)


def test_two_writers_at_once_and_the_last_wins(tmp_path: Path) -> None:
    folder = tmp_path / "cache"

    def fill(aside: Path) -> None:
        (aside / "f").write_text("outer")
        write(folder, "inner")

    write_folder_atomically(folder, fill)
    assert (folder / "f").read_text() == "outer"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_put_there_between_the_two_renames_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename, seen = tmp_path / "cache", os.rename, []

    def racing(source: Path, target: Path) -> None:
        if target == folder and not seen:
            seen.append(source)
            folder.mkdir()
            (folder / "f").write_text("theirs")
        rename(source, target)

    monkeypatch.setattr(os, "rename", racing)
    write(folder, "ours")
    assert seen and (folder / "f").read_text() == "ours"
    assert list(tmp_path.iterdir()) == [folder]


def test_permissions_and_leftovers(tmp_path: Path) -> None:
    young, old = tmp_path / ".writing-cache-abcdefgh", tmp_path / ".old-cache-abcdefgh"
    other = tmp_path / ".writing-cache-two-abcdefgh"
    for path in (young, old, other):
        path.mkdir()
    for path in (old, other):
        os.utime(path, (time.time() - 100_000,) * 2)
    mask = os.umask(0o027)
    try:
        write(tmp_path / "cache", "x")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o750
    assert young.exists() and other.exists() and not old.exists()
    with pytest.raises(ZeroDivisionError):
        write_folder_atomically(tmp_path / "cache", lambda aside: 1 // 0 and None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, other.name, "cache"]
    assert (tmp_path / "cache" / "f").read_text() == "x"
