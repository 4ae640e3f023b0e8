"""The pages of tasks: every command is one that isdaa takes, and every page and place that they link to is there."""

from __future__ import annotations

import re
import shlex

import pytest
from chains import ROOT

from isdaa.cli import build_parser
from isdaa.config import load_config
from isdaa.options import overrides_of

PAGES = ("how_to.md", "which_method.md", "metrics.md")
TEXTS = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in PAGES}
TASKS = 12
ELSEWHERE = ("going_on.md",)  # comes with `--continue_from`


def commands() -> list[tuple[str, str]]:
    found = []
    for page, text in TEXTS.items():
        blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL) + re.findall(r"(?:^    [^\n]+\n)+", text, re.MULTILINE)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            if line.strip().startswith("isdaa "):
                found.append((page, " ".join(line.split())))
    return found


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: value[:60])
def test_every_command_is_taken(page: str, command: str) -> None:
    arguments = build_parser().parse_args(shlex.split(command)[1:])
    if arguments.command in ("train", "inspect"):
        load_config(None, overrides_of(arguments))


def test_there_are_commands_to_take() -> None:
    assert len(commands()) > 15
    assert len(re.findall(r"^## ", TEXTS["how_to.md"], re.MULTILINE)) == TASKS


def anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_place_that_is_linked_to_is_there(page: str) -> None:
    for target, _, place in re.findall(r"\]\(([\w./-]*)(#?)([\w-]*)\)", TEXTS[page]):
        file = ROOT / "docs" / (target or page)
        if target in ELSEWHERE and not file.exists():
            continue
        assert file.is_file(), target
        titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert not place or place in map(anchor, titles), f"{target}#{place}"
