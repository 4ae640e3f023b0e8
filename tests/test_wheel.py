"""The package as it is installed: its wheel has every file, and the commands work in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from isdaa.cli import configs, main
from isdaa.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools")
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "src"):  # built aside, where it may leave what it likes
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(place), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = place.glob("isdaa-*.whl")
    return found


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("isdaa/")}
    source = ROOT / "src"
    ours = {
        path.relative_to(source).as_posix()
        for path in (source / "isdaa").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == ours and "isdaa/py.typed" in inside


COMMANDS = [
    (["methods"], "chi_po"),
    (["configs"], "mini/demo"),
    (["inspect", "--config", "configs/mini/demo.yaml", "--no_plan", "--data.limit", "64"], "align"),
    (["sweep", "--config", "configs/mini/sweep.yaml", "--dry_run"], "228 runs"),
    (["configs", "copy", "mini/demo"], "written: demo.yaml"),
    (["benchmark", "--help"], "alpaca_eval"),
]


def test_commands_work_where_there_is_no_checkout(wheel: Path, tmp_path: Path) -> None:
    """All in one process, which imports the package once."""
    zipfile.ZipFile(wheel).extractall(installed := wheel.parent / "installed")
    # Without site's editable installation in front of it.
    environment = os.environ | {"PYTHONPATH": str(installed), "COLUMNS": "200"}
    program = (
        f"import isdaa\nassert isdaa.__file__.startswith({str(installed)!r})\n"
        f"from isdaa.cli import main\nfor command in {[command for command, _ in COMMANDS]!r}:\n"
        "    try:\n        status = main(command)\n    except SystemExit as ended:\n        status = ended.code\n"
        "    assert not status, command\n    print('\\nEND', flush=True)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout
    for (command, words), said in zip(COMMANDS, ended.stdout.split("\nEND"), strict=False):
        assert words in said, command


def test_a_configuration_is_copied_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (copied,) = configs.copy("configs/mini/demo.yaml", "mine.yaml")
    assert copied.read_text() == (ROOT / "configs" / "mini" / "demo.yaml").read_text()
    assert configs.copy("mini/sweep", "own/sweep.yaml") == [Path("own/sweep.yaml"), Path("own/demo.yaml")]
    assert main(["sweep", "--config", "own/sweep.yaml", "--dry_run"]) == 0
    Path("own/sweep.yaml").unlink()
    Path("own/demo.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"own/demo\.yaml: there already"):
        configs.copy("mini/sweep", "own/sweep.yaml")
    assert not Path("own/sweep.yaml").exists()
    with pytest.raises(UserError, match=r"mine\.yaml: there already"):
        configs.copy("mini/demo", "mine.yaml")
    with pytest.raises(UserError, match=r'no such configuration \(did you mean "mini/demo"\?\)'):
        configs.copy("mini/demos")


def test_a_file_of_ones_own_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert configs.found("configs/mini/demo.yaml") == str(configs.FOLDER / "mini" / "demo.yaml")
    assert configs.found("configs/mini/none.yaml") == "configs/mini/none.yaml"
    (tmp_path / "configs" / "mini").mkdir(parents=True)
    (tmp_path / "configs" / "mini" / "demo.yaml").write_text("seed: 1\n")
    assert configs.found("configs/mini/demo.yaml") == "configs/mini/demo.yaml"
