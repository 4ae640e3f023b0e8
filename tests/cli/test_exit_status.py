"""The exit statuses of docs/exit_status.md, and what is said beside them."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from patience import HANGS

from isdaa.cli import main
from isdaa.errors import LONGEST, DoneInPart, UserError

ROOT = Path(__file__).resolve().parents[2]


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """The exit status of a command that ends with `error`."""

    def command(arguments: Any) -> int:
        raise error

    monkeypatch.setattr("isdaa.cli.methods.run", command)
    return main(["methods"])


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("bad"), 2),
        (DoneInPart("half"), 3),
        (OSError(28, "No space left on device", "/x"), 2),
        (PermissionError(13, "Permission denied", "/x"), 2),
        (MemoryError(), 2),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), 2),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), 2),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 141),
        (KeyError("x"), 1),
        (ValueError("y"), 1),
        (AssertionError(), 1),
        (RecursionError("deep"), 1),
        (OSError("an OSError by name"), 1),
    ],
)
def test_every_way_to_end_has_its_status(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert raising(monkeypatch, error) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == (status != 141), lines
    assert not any("Traceback" in line for line in lines)


def test_a_fault_is_one_line_and_a_private_file_with_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert raising(monkeypatch, ZeroDivisionError("of \x1b[31m" + "long " * 1000)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    (file,) = tmp_path.iterdir()
    assert line.startswith(r"isdaa: a fault of isdaa: ZeroDivisionError: of \x1b[31mlong long") and " … " in line
    assert line.endswith(f"traceback in {file}; please report it (docs/exit_status.md says how)")
    assert len(line) < LONGEST + 200
    text = file.read_text()
    assert "Traceback (most recent call last)" in text and "ZeroDivisionError" in text and "in command" in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert (ROOT / "docs" / "exit_status.md").is_file()


def test_a_fault_where_no_file_can_be_written_is_still_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert raising(monkeypatch, KeyError("x")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "KeyError: 'x'; no traceback, for no file can be written" in line


def test_help_and_readme_name_the_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    table = (ROOT / "docs" / "exit_status.md").read_text()
    statuses = re.findall(r"^\| (\d+) \|", table, re.MULTILINE)
    assert statuses == ["0", "1", "2", "3", "130", "141"]
    assert main(["--help"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("exit status:"))
    assert re.findall(r"(?<= )\d+(?= )", line) == statuses
    assert "docs/exit_status.md" in (ROOT / "README.md").read_text()


def ended(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], text=True, timeout=HANGS, check=False, **kwargs)


@pytest.mark.parametrize("argv", [["methods"], ["--help"], ["methods", "--json"]])
def test_a_closed_pipe_is_141_also_where_only_the_last_flush_meets_it(argv: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = ended(["-m", "isdaa.cli", *argv], stdout=pipe, stderr=subprocess.PIPE)
    assert done.returncode == 141 and done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full is Linux's")
@pytest.mark.parametrize("argv", [["methods"], ["--version"]])
def test_a_full_disk_behind_stdout_is_one_line_and_status_2(argv: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = ended(["-m", "isdaa.cli", *argv], stdout=full, stderr=subprocess.PIPE)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("isdaa: error: ") and "No space left on device" in line


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full is Linux's")
def test_a_full_disk_behind_stderr_changes_no_status() -> None:
    with open("/dev/full", "wb") as full:
        assert ended(["-m", "isdaa.cli", "nonsense"], stdout=subprocess.PIPE, stderr=full).returncode == 2


def test_the_scripts_have_the_same_statuses(tmp_path: Path) -> None:
    for script in ("train.py", "evaluate.py"):
        done = ended([str(ROOT / "scripts" / script), "--nonsense"], stderr=subprocess.PIPE, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("isdaa: error: unknown option --nonsense")
        done = ended([str(ROOT / "scripts" / script), "--help"], stdout=subprocess.PIPE, cwd=tmp_path)
        assert done.returncode == 0


def test_an_interruption_inside_an_import_is_130(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("raise KeyboardInterrupt\n")
    path = os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = ended(["-m", "isdaa.cli", "methods"], stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 130 and done.stderr.strip() == "isdaa: interrupted; the same command goes on from here"


def test_a_name_that_the_terminal_cannot_show_ends_nothing() -> None:
    done = ended(
        ["-m", "isdaa.cli", "methods"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0 and r"\u0394" in done.stdout and done.stderr == ""


def test_terminated_from_outside_is_the_systems_own_status() -> None:
    program = "import os, signal; from isdaa.cli import main, methods\n"
    program += "methods.run = lambda _: os.kill(os.getpid(), signal.SIGTERM)\nraise SystemExit(main(['methods']))"
    assert ended(["-c", program]).returncode == -15  # 143 in a shell
