"""The docs as a site: it builds without a warning, needs no network, and shows what is in the repository."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
API = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md")}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def text_of(page: Path) -> str:
    return unescape(re.sub(r"<[^>]*>", "", page.read_text(encoding="utf-8")))


def test_every_page_is_there(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if not (site / page).is_file()} == set()
    for name, words in {"index": "Two commands", "first_use": "gold_reward", "changelog": "Unreleased"}.items():
        assert words in text_of(site / f"{name}.html")


def test_nothing_is_fetched_over_the_network(site: Path) -> None:
    loaded = re.compile(r'<(?:(?:script|img|iframe|source)[^>]*\ssrc|link[^>]*\shref)="?(?:https?:)?//')
    for page in site.rglob("*.html"):
        assert not loaded.search(page.read_text(encoding="utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_links_lead_to_files_of_the_site(site: Path) -> None:
    for page in site.rglob("*.html"):
        for target in re.findall(r'\s(?:href|src)="([^"]+)"', page.read_text(encoding="utf-8")):
            name = unescape(target).partition("#")[0].partition("?")[0]
            if name and not re.match(r"[a-z]+:|//", name) and page.name != "404.html":
                assert (page.parent / name).exists(), f"{page.relative_to(site)}: {target}"


def test_api_pages_show_what_the_docstrings_say(site: Path) -> None:
    shown = text_of(site / "api" / "objectives.html")
    for words in ("ESS/N = (Σw)²/(N·Σw²)", "log π(y_w|x) in nats", "Raises", "Nguyen et al."):
        assert words in shown, words
    assert "isdaa.evaluate" in text_of(site / "api" / "isdaa.html")
    assert '<a href="../method.html">' in (site / "api" / "objectives.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", ["isdaa", *(f"isdaa.{name}" for name in sorted(API) if name not in ("isdaa", "index"))])
def test_what_a_package_exports_has_a_place_on_a_page(package: str) -> None:
    exported = importlib.import_module(package).__all__
    shown = {name.rpartition(".")[2] for text in API.values() for name in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)}
    assert {name for name in exported if not name.startswith("__")} <= shown


def test_what_is_on_a_page_exists_once() -> None:
    names = [name for text in API.values() for name in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)]
    assert len(names) == len(set(names))
    for name in names:
        module, _, member = name.rpartition(".")
        assert hasattr(importlib.import_module(module), member), name


@pytest.mark.parametrize("package", ["isdaa", *(f"isdaa.{name}" for name in ("evaluation", "models", "objectives", "report"))])
def test_dir_shows_what_is_public_and_nothing_else(package: str) -> None:
    module = importlib.import_module(package)
    assert dir(module) == sorted(module.__all__)
    assert all(getattr(module, name) is not None for name in module.__all__)
