"""Help comes at once: no command's `--help` waits for a library that only its work needs."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from isdaa.cli import COMMANDS, build_parser

ROOT = Path(__file__).parents[1]
HEAVY = {
    "torch", "transformers", "tokenizers", "trl", "datasets", "peft", "accelerate", "numpy", "scipy", "pandas", "pyarrow",
    "altair", "vl_convert", "jinja2",
}  # fmt: skip


def loaded(program: str, *arguments: str) -> set[str]:
    """Heavy libraries that a fresh Python has imported once the program has ended."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = {['isdaa', *arguments]!r}\n"
        "try:\n"
        f"    {program}\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"print('loaded:', *sorted({HEAVY!r} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    text, _, names = done.stdout.rpartition("loaded:")
    assert "usage: " in text
    return set(names.split())


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=lambda c: " ".join(c) or "isdaa")
def test_help_of_commands_loads_nothing_heavy(command: list[str]) -> None:
    assert loaded("from isdaa.cli import main; main()", *command, "--help") == set()


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_help_of_scripts_loads_nothing_heavy(script: Path) -> None:
    assert loaded(f"runpy.run_path({str(script)!r}, run_name='__main__')", "--help") == set()


def test_the_check_sees_what_is_loaded() -> None:
    assert loaded("import jinja2; from isdaa.cli import main; main()", "--help") == {"jinja2"}


def test_options_are_written_one_way() -> None:
    """With underscores, as the keys of the configuration are: in help, messages and pages. Dashes are taken all the same."""
    options = re.findall(r"^  (?:-\w, )?--([\w.-]+)", "\n".join(every_help()), re.MULTILINE)
    assert len(options) > 150 and not [name for name in options if "-" in name]
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "src").rglob("*.py")]
    written = re.compile(r"--([a-z]+(?:\.[a-z_]+)?(?:-[a-z]+)+)\b")
    found = [
        f"{path.name}: --{name}"
        for path in texts
        if path.name != "LOG.md"
        for name in written.findall(path.read_text(encoding="utf-8"))
        if name.replace("-", "_") in options and name != "align.learning" + "-rate"  # which says that it is taken
    ]
    assert found == []


def every_help() -> list[str]:
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return [parser.format_help() for parser in commands.choices.values()]
