"""Help: at once, in two lengths, with the values that are allowed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from chains import refused

from isdaa.cli import main
from isdaa.cli.main import COMMANDS, command_of, parser_of
from isdaa.config import allowed, fields

ROOT = Path(__file__).parents[2]
SCREENS = 90  # lines: two screens
HEAVY = {
    "torch", "transformers", "tokenizers", "trl", "datasets", "peft", "accelerate", "numpy", "scipy", "pandas", "pyarrow",
    "altair", "vl_convert", "jinja2",
}  # fmt: skip
EVERY_KEY = ("train", "inspect", "demo")
FIELDS = {dotted: field for dotted, field, _ in fields()}


def loaded(program: str, *arguments: str, watched: set[str] = HEAVY) -> set[str]:
    """Which of these modules a fresh Python has imported once the program has ended."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = {['isdaa', *arguments]!r}\n"
        "try:\n"
        f"    {program}\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"print('loaded:', *sorted({watched!r} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    text, _, names = done.stdout.rpartition("loaded:")
    assert "usage: " in text
    return set(names.split())


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=lambda c: " ".join(c) or "isdaa")
def test_help_loads_nothing_heavy_and_no_other_command(command: list[str]) -> None:
    others = {f"isdaa.cli.{name.replace('-', '_')}" for name in COMMANDS if name not in command}
    watched = HEAVY | others if command else HEAVY | others | {"pydantic", "rich", "yaml", "argparse"}
    assert loaded("from isdaa.cli import main; main()", *command, "--help", watched=watched) == set()


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_help_of_scripts_loads_nothing_heavy(script: Path) -> None:
    assert loaded(f"runpy.run_path({str(script)!r}, run_name='__main__')", "--help") == set()


def test_the_check_sees_what_is_loaded() -> None:
    assert loaded("import jinja2; from isdaa.cli import main; main()", "--help") == {"jinja2"}


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def described(text: str) -> dict[str, str]:
    """Option -> its help, in one line."""
    parts = re.split(r"^  (?:-\w, )?--([\w.-]+)", text, flags=re.MULTILINE)
    return {name: " ".join(what.split()) for name, what in zip(parts[1::2], parts[2::2], strict=True)}


def squeezed(text: str) -> str:
    """Without blanks, wherever lines are broken."""
    return "".join(text.split())


def facts(key: str) -> str:
    """Choices or bounds of a key; that it is a number, N and X say."""
    return squeezed(allowed(FIELDS[key]).removeprefix("a whole number ").removeprefix("a number ").removesuffix(", null"))


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_two_screens_and_names_what_is_allowed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and text == parser_of(command).format_help()
    assert len(text.splitlines()) <= SCREENS and max(map(len, text.splitlines())) <= 100
    shown, rare = described(text), described(parser_of(command).format_help(every=True)).keys() - described(text).keys()
    for name in shown.keys() & FIELDS.keys():
        assert facts(name) in squeezed(shown[name]) and "default" in shown[name]
    common = getattr(command_of(command), "COMMON", "").split()
    known = {name.removeprefix("--") for name in parser_of(command)._option_string_actions}
    assert set(common) <= known, "COMMON names what is no option"
    assert bool(rare) == bool(common) == (f"{len(rare)} more options: `isdaa {command} --help-all`" in text)


@pytest.mark.parametrize("spelt", ["--help-all", "--help_all"])
@pytest.mark.parametrize("command", COMMANDS)
def test_all_of_the_help_names_every_key(command: str, spelt: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, spelt])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "more options" not in text
    shown = described(text)
    taken = {name.removeprefix("--") for name in parser_of(command)._option_string_actions if name.startswith("--")}
    hidden = {"help_all", "align.fused_head"}  # another spelling, and a key that was taken away
    assert taken - hidden == shown.keys() - hidden
    if command in EVERY_KEY:
        assert shown.keys() >= FIELDS.keys()
    for name in shown.keys() & FIELDS.keys():
        assert facts(name) in squeezed(shown[name])


def test_whole_numbers_say_from_where_on() -> None:
    for command in COMMANDS:
        for action in parser_of(command)._actions:
            if getattr(action.type, "__qualname__", "").startswith("whole"):
                assert "≥" in (action.help or ""), f"{command} {action.option_strings}"


def test_the_help_of_isdaa_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["-h"], ["--help-all"]):
        assert main(argv) == 0
        text = capsys.readouterr().out
        assert all(f"    {name} " in text and what in text for name, what in COMMANDS.items())
        assert "--help-all" in text and "--version" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistyped_command_is_answered_with_the_nearest(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for mistyped in (command[:-2] + command[-1] + command[-2], command + "s", command.upper()[:1] + command[1:]):
        if mistyped not in COMMANDS:
            refused(capsys, [mistyped, "--config", "run.yaml"], f"unknown command {mistyped!r}", f'(did you mean "{command}"?)')


def test_options_are_written_one_way() -> None:
    """With underscores, as the keys of the configuration are: in help, messages and pages. Dashes are taken all the same."""
    every = "\n".join(parser_of(name).format_help(every=True) for name in COMMANDS)
    options = set(described(every)) - {"help-all"}
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
