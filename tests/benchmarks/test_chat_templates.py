"""The page about chat templates is what its command writes, and another template gets a line."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import chat_templates

pytestmark = pytest.mark.slow  # what measures, not what is measured; `make test-slow` runs it

MADE_UP = (
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}{{ '<|' + m.role + '|>' + m.content + '<|stop|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
)


def lines(text: str) -> dict[str, dict[str, str]]:
    """{template: {column: cell}} of the page's table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_the_page_is_what_the_command_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.md"
    assert chat_templates.main(["--out", str(out)]) == 0
    written, committed = out.read_text(encoding="utf-8"), chat_templates.PAGE.read_text(encoding="utf-8")
    assert capsys.readouterr().out == f"{written}\n{out}\n"
    assert all(len(line) <= 120 for line in written.splitlines() if not line.startswith("|"))
    assert chat_templates.LEGEND in committed
    head = next(line for line in written.splitlines() if line.startswith("Written by"))
    if head not in committed:
        pytest.skip(f"other versions: {head}")
    assert lines(written) == lines(committed)
    assert written == committed


def test_every_sign_is_explained_and_no_word_is_a_template_s_own() -> None:
    table = lines(chat_templates.PAGE.read_text(encoding="utf-8"))
    signs = {cell for row in table.values() for column, cell in row.items() if column != "template" and cell}
    assert all(f"**{name}**" in chat_templates.LEGEND for name in signs)
    assert all(f"**{name}**" in chat_templates.LEGEND for name in chat_templates.KINDS)
    templates = chat_templates.shipped(patches=True)
    assert not [name for name, text in templates.items() for word in chat_templates.WORDS if word in text]
    assert {"gemma_training", "gemma"} <= set(templates)
    assert "gemma_training" not in table


def test_another_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "made_up.jinja"
    file.write_text(MADE_UP)
    before = chat_templates.PAGE.stat()
    assert chat_templates.main(["--templates", str(file)]) == 0
    assert chat_templates.PAGE.stat() == before
    (row,) = lines(capsys.readouterr().out).values()
    assert (row["template"], row["pair"], row["turns"], row["off"]) == ("made_up", "shorter", "one", "–")
    assert row["system"] == row["tool"] == row["call"] == row["tools"] == row["thinking"] == "refused"
    assert (row["thinking before"], row["`<think>` before"], row["prefill"]) == ("refused", "✓", "✓")
    assert chat_templates.main(["--templates", str(tmp_path / "none.jinja")]) == 2


def test_words_that_nothing_counted_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "made_up.jinja"
    file.write_text(MADE_UP)
    monkeypatch.setattr(chat_templates.Encoder, "_arrive", lambda *given: None)
    assert chat_templates.main(["--templates", str(file)]) == 1
    assert chat_templates.LOST in capsys.readouterr().out
