"""The key by which isdaa knows a user's runs: made once, for him alone; what is not sealed by it is nobody's own."""

from __future__ import annotations

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from isdaa.errors import UserError
from isdaa.ownership import SEAL, completed, is_own, key_file, sealed


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration folder without a key."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def test_the_key_is_made_once_and_nobody_else_reads_it(home: Path) -> None:
    assert not is_own("run.json", {"a": 1, SEAL: "0" * 64}) and not key_file().exists()  # a look makes none
    first, second = sealed("run.json", {"a": 1}), sealed("run.json", {"a": 1})
    assert first == second and is_own("run.json", first)
    assert key_file().stat().st_mode & 0o777 == 0o600 and key_file().parent.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in key_file().parent.iterdir()] == ["key"]
    key_file().unlink()
    assert sealed("run.json", {"a": 1}) != first and not is_own("run.json", first)


@pytest.mark.parametrize(
    "change", [{"a": 2}, {"b": None}, {SEAL: "0" * 64}, {SEAL: None}, {SEAL: "\u00e9"}, {SEAL: "\ud800"}], ids=repr
)
def test_a_change_of_one_value_breaks_the_seal(home: Path, change: dict[str, Any]) -> None:
    assert not is_own("run.json", sealed("run.json", {"a": 1}) | change)


def test_a_seal_is_for_one_kind_of_file_and_survives_it(home: Path) -> None:
    content = {"z": 0.1 + 0.2, "a": {10: [1, (2, 3)], 2: Path("x")}, "é": "\ud800"}
    read = json.loads(json.dumps(sealed("run.json", content), default=str))
    assert is_own("run.json", read) and not is_own("isdaa.json", read) and not is_own("run.json", [read])
    assert is_own("run.json", sealed("run.json", read))


def _seal(_: int) -> str:
    return str(sealed("run.json", {})[SEAL])


def test_processes_that_make_a_key_at_once_have_the_same(home: Path) -> None:
    with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
        assert len(set(pool.map(_seal, range(16)))) == 1


@pytest.mark.parametrize("wrong", ["readable", "short", "link", "folder", "fifo"])
def test_a_key_that_is_not_the_users_alone_is_refused(home: Path, wrong: str) -> None:
    sealed("run.json", {})
    key = key_file()
    if wrong == "readable":
        key.chmod(0o644)
    elif wrong == "short":
        key.write_bytes(b"short")
    else:
        key.rename(home / "other")
        {"link": lambda: key.symlink_to(home / "other"), "folder": key.mkdir, "fifo": lambda: os.mkfifo(key)}[wrong]()
    with pytest.raises(UserError, match=str(key)):
        is_own("run.json", {SEAL: "0" * 64})
    with pytest.raises(UserError, match=str(key)):
        sealed("run.json", {})


def test_another_users_key_is_no_leak(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under sudo or in a container the key is sound: nobody shall remove it."""
    sealed("run.json", {})
    user = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(UserError, match=r"another user's key.*set XDG_CONFIG_HOME") as caught:
        is_own("run.json", {SEAL: "0" * 64})
    assert "remove" not in str(caught.value)


def test_where_no_key_can_be_kept_one_line_says_what_to_set(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "file"))
    with pytest.raises(UserError, match="set XDG_CONFIG_HOME"):
        sealed("run.json", {})


def test_a_command_is_completed_as_one_types_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert completed(["isdaa", "x y"], {"--data": "it's"}) == "isdaa 'x y' --data 'it'\"'\"'s'"
    monkeypatch.setattr("isdaa.ownership.command", ["isdaa", "report", "run"])
    assert completed(["isdaa", "evaluate"], {}) == "isdaa report run"
