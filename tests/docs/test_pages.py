"""Pages that people read: short lines, a short README, and words of the glossary that are used and linked."""

from __future__ import annotations

import re
import runpy
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted(DOCS.rglob("*.md"))
WIDTH = 120
WRITTEN = ("results/",)  # by programs
SITE = runpy.run_path(str(ROOT / "docs" / "site.py"))


def prose(page: Path) -> list[str]:
    """Lines that are no table and no code, without the targets of their links."""
    found, fenced = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fenced ^= line.lstrip().startswith("```")
        if not fenced and not re.match(r"\||    |```|<!--", line):
            found.append(re.sub(r"\]\([^)]*\)", "]", line))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lines_fit_a_screen(page: Path) -> None:
    name = page.relative_to(DOCS).as_posix() if page.is_relative_to(DOCS) else page.name
    long = [line for line in prose(page) if len(line) > WIDTH]
    assert long == [] or name.startswith(WRITTEN)


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= WIDTH and all(len(line) <= WIDTH for line in lines if not line.startswith("|"))


def test_a_list_begins_behind_an_empty_line() -> None:
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines()
        for before, line in pairwise(lines):
            joined = before.strip() and not re.match(r"\s*([-*]|\d+\.) |  |[#|<]", before) and re.match(r"([-*]|1\.) ", line)
            assert not joined, f"{page.name}: {line}"  # the site would take it for a part of the paragraph


def test_every_word_of_the_glossary_is_linked_where_it_is_used() -> None:
    glossary = DOCS / SITE["GLOSSARY"]
    titles = re.findall(r"^### (.*)$", glossary.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(titles) == len(set(map(SITE["anchor"], titles))) > 40
    linked: set[str] = set()
    for page in PAGES:
        if page != glossary:
            file = page.relative_to(ROOT).as_posix()
            text = SITE["site_text"](page.read_text(encoding="utf-8"), file, SITE["site_path"](file))
            linked |= set(re.findall(r"glossary\.md#([^)]+)\)", text))
    assert {title for title in titles if SITE["anchor"](title) not in linked} == set()


def test_the_first_use_of_a_word_is_linked_and_nothing_else() -> None:
    text = "# Win rates\n\n`win rate`, [win rate](x.md), a win rate, win rates\n\n    win rate\n"
    found = SITE["with_glossary"](text, "glossary.md")
    assert found == text.replace("a win rate,", "a [win rate](glossary.md#win-rate),")
