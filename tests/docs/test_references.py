"""What docs, messages and docstrings point at exists: files, pages, headings."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = sorted(path for folder in ("src", "tests", "benchmarks", "scripts") for path in (ROOT / folder).rglob("*.py"))


@cache
def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_pages_that_code_names_exist() -> None:
    for file in CODE:
        text = file.read_text(encoding="utf-8")
        for name in re.findall(r"docs/[\w./-]+\.md", text):
            assert (ROOT / name).exists() or file.name.startswith("test_"), f"{file}: {name}"
        assert not re.search(r"\b(METHOD|DESIGN|EVALUATION|WORLD|HOUSE|USERS)\.md\b", text) or file == Path(__file__), file


def test_files_of_the_architecture_and_of_the_tree_exist() -> None:
    source = ROOT / "src" / "isdaa"
    for line in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines():
        folder = ""
        for name in re.findall(r"`([\w/]+\.py)`", line):
            folder = name.rpartition("/")[0] if "/" in name else folder
            assert (source / folder / name.rpartition("/")[2]).is_file() or (source / name).is_file(), name
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("src/isdaa/\n")[1].split("```")[0]
    room = ""
    for line in tree.splitlines():
        room = found[1] if (found := re.match(r"  (\w+)/", line)) else room if line.startswith("    ") else ""
        for name in re.findall(r"(?<![\w/])([\w/]+(?:\.py|/))", line):
            assert (source / room / name).exists() or (source / name).exists(), f"{line}: {name}"


def test_dotted_names_of_modules_exist() -> None:
    tops = {path.name.removesuffix(".py") for path in (ROOT / "src" / "isdaa").iterdir()}
    for file in (*CODE, *PAGES):
        if file.name in ("CHANGELOG.md", "LOG.md"):
            continue
        if file.name == "test_presets.py":  # which asks for one that there is not
            continue
        for name in re.findall(r"(?<![\w./])isdaa((?:\.[a-z_]\w*)+)", file.read_text(encoding="utf-8")):
            parts = name[1:].split(".")
            if parts[0] not in tops or parts[-1] in ("json", "py"):
                continue
            place = ROOT / "src" / "isdaa"
            for part in parts:
                if (place / f"{part}.py").is_file() or not place.is_dir():
                    break
                assert (place / part).is_dir() or part in _named(place), f"{file}: isdaa{name}"
                place = place / part


@cache
def _named(package: Path) -> str:
    file = package / "__init__.py"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def test_every_folder_of_the_package_is_committed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    tracked = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "src").rglob("*.py")} <= {
        Path(name).parent.as_posix() for name in tracked
    }
