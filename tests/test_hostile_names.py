"""What terminal, page, card and spreadsheet get of a name that was made to do harm: its characters, and no effect."""

from __future__ import annotations

import csv
import io
import logging
import re
from pathlib import Path

import pytest
from chains import ALIGN, chat_model, config_file, jsonl, plain_pairs
from hostile import ESCAPED, FOLDER, NAME, harmless, unwrapped
from rich.text import Text

from isdaa import terminal
from isdaa.cli import main
from isdaa.errors import LONGEST, UserError, shown
from isdaa.files import csv_text

HARMFUL = (
    *map(chr, range(0x20)),
    *map(chr, range(0x7F, 0xA0)),
    "\u200b",
    "\u200e",
    "\u200f",
    "\u2028",
    "\u2029",
    "\ufeff",
    "\ud800",
    "\udfff",
    *map(chr, range(0x202A, 0x202F)),
    *map(chr, range(0x2066, 0x206A)),
    "\U000e0041",
)


def test_every_harmful_character_is_shown_as_an_escape() -> None:
    for character in HARMFUL:
        escaped = shown(f"x{character}y")
        assert re.fullmatch(r"x\\([nrt]|x..|u....|U........)y", escaped), escaped
    for text in ("plain", "naïve Δπ 模型 🙂 a\u00a0b\u3000c", r"a\x1b", "[red]<b>`|"):
        assert shown(text) == text
    assert shown("a\n\tb\r", lines=True) == "a\n\tb\\r"
    assert shown(Path("/x\x1b")) == r"/x\x1b"


def test_an_error_is_one_harmless_line_that_ends() -> None:
    line = str(UserError(f"{NAME * 3}: not {'x' * 5000} there; type --this"))
    harmless(line)
    assert "\n" not in line and len(line) == LONGEST and " … " in line and line.endswith("there; type --this")
    assert line.startswith(ESCAPED) and str(UserError("short")) == "short"
    command = "isdaa evaluate --reference " + "y" * 2000
    assert str(UserError("z" * 5000, command)).endswith(f" {command}")


def test_an_error_keeps_its_text_on_the_way_to_another_process() -> None:
    import pickle

    from isdaa.errors import DoneInPart

    for error in (UserError(NAME * 200), UserError("a", "isdaa " + "y" * 900), DoneInPart("half")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error) and again.status == error.status


@pytest.mark.parametrize("is_terminal", [True, False])
def test_notes_and_progress(is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    console = terminal.Terminal(file=stream, force_terminal=is_terminal, width=300, color_system=None, legacy_windows=False)
    monkeypatch.setattr(terminal, "console", console)
    monkeypatch.setattr(terminal, "PLAIN_INTERVAL", 0.0)
    terminal.say(f"note: {NAME}")
    with terminal.progress(NAME, 2) as bar:
        bar.update(1, note=NAME)
    text = stream.getvalue() + capsys.readouterr().err
    own = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text)  # what rich itself writes to move the cursor
    harmless(own)
    assert own.count("[red]=1+1") >= 3 and ":smile:" in own and "\x1b]" not in text
    assert all(line.startswith(("note: ", r"a\x1b")) for line in own.splitlines() if line.strip())


def test_texts_of_a_spreadsheet_are_never_formulas_and_numbers_stay_numbers() -> None:
    texts = ["=1+1", "+1", "-1", "@x", "\tx", "\rx", "x=1", "", "'=", "1", "\u202e=1"]
    rows = list(csv.reader(io.StringIO(csv_text(["=head", "n"], [[text, -1.5] for text in texts]), newline="")))
    assert [row[0] for row in rows] == ["'=head", "'=1+1", "'+1", "'-1", "'@x", "'\tx", "'\rx", *texts[6:]]
    assert {row[1] for row in rows[1:]} == {"-1.5"}
    assert csv_text(["a"], [[-3], [None], [True], [-1e-7]]) == 'a\n-3\n""\nTrue\n-1e-07\n'


def test_a_card_shows_hostile_values_and_does_nothing_else() -> None:
    from isdaa.config import Config, resolved
    from isdaa.record import ModelRecord
    from isdaa.training.model_card import model_card

    value = f"```\n\n`x`|{NAME}"
    config = resolved(Config.model_validate({"model": {"path": "m"}, "data": {"pairs": value, "pairs_split": value}}))
    config["tokenization"]["chat_template_kwargs"] = {"it": f"\n```\n<script>\n{value}"}
    record = ModelRecord(kind="policy", config=config, reference=value, metrics={f"|{NAME}": 1.0})
    card = model_card(record, f"# {NAME}")
    harmless(card)
    outside, fence = [], ""
    for line in card.splitlines():
        mark = re.match(r" {0,3}(`{3,})", line)
        if mark and not fence:
            fence = mark.group(1)
        elif fence and re.fullmatch(rf" {{0,3}}{fence}`*\s*", line):
            fence = ""
        elif not fence:
            outside.append(re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", line))
    assert not fence, "a block stays open"
    assert not [line for line in outside if re.search(r"(?<!\\)<script", line)], outside
    (heading,) = [line for line in card.splitlines() if line.startswith("# ")]
    assert heading.startswith(r"# # a\\x1b\]0;x") and r"\<script\>" in heading


def test_what_is_logged_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(terminal.LogFormatter())
    logger = logging.getLogger("isdaa.hostile")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        logger.warning("%s: not there", NAME)
        raise ValueError("x")
    except ValueError:
        logger.exception("failed: %s", NAME)
    finally:
        logger.removeHandler(handler)
    first, second, *trace = stream.getvalue().splitlines()
    harmless(stream.getvalue())
    assert first.startswith(f"isdaa.hostile: {ESCAPED}") and first.endswith(r"\n: not there")
    assert second.startswith("isdaa.hostile: failed: ") and trace[0].startswith("Traceback")


def test_a_sweeps_overview(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from isdaa.experiments import overview

    monkeypatch.setattr(overview, "PLAIN_INTERVAL", 0.0)
    with overview.Overview([(NAME, False, False), ("b", False, False)], 1) as seen:
        seen.show([(NAME, 1.0, {"what": NAME, "share": 0.5})])
        seen.ended(NAME, {"done": False, "error": NAME}, 1.0)
        seen.ended("b", {"done": True}, 1.0)
    told = capsys.readouterr().err
    harmless(told)
    assert told.count(ESCAPED) == 4 and all(line.startswith(("sweep: ", "FAILED ", "finished ")) for line in told.splitlines())
    stream = io.StringIO()
    console = terminal.Terminal(file=stream, width=400, color_system=None)
    console.print(seen.picture() if seen.running else Text(""))
    harmless(stream.getvalue())


def test_a_run_from_data_to_report_under_a_hostile_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folder, data file, split and ids carry the name; all that is told and written for people is looked through."""
    monkeypatch.chdir(tmp_path)
    chat_model(tmp_path / "my_model")
    capsys.readouterr()  # a library's bar
    rows = [row | {"id": f"{NAME}{number}"} for number, row in enumerate(plain_pairs(10))]
    jsonl(tmp_path / f"{FOLDER}.jsonl", rows)
    file = config_file(tmp_path / "run.yaml", ALIGN | {"data.pairs": f"{FOLDER}.jsonl", "output_dir": FOLDER})
    assert main(["inspect", "--config", str(file), "--no_plan"]) == 0
    assert main(["inspect", "--config", str(file), "--no_plan", "--json"]) == 0
    assert main(["train", "--config", str(file)]) == 0
    assert main(["evaluate", "--model_path", FOLDER]) == 0
    assert main(["report", FOLDER]) == 0
    assert main(["evaluate", "--model_path", f"{FOLDER}x"]) == 2
    told = capsys.readouterr()
    for text in (told.out, told.err):
        harmless(text)
        assert unwrapped(ESCAPED) in unwrapped(text)
    assert (tmp_path / FOLDER / "model" / "isdaa.json").is_file()
    written = [p for p in (tmp_path / FOLDER).rglob("*") if p.suffix in (".html", ".svg", ".md")]
    assert {p.suffix for p in written} == {".html", ".svg", ".md"}
    for path in written:
        text = path.read_text(encoding="utf-8")
        harmless(text, path)
        assert path.suffix == ".md" or "<script" not in text
