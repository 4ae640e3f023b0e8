"""What MkDocs needs beside mkdocs.yml: pages that lie outside docs/, links to them, and the notebook as a page."""

from __future__ import annotations

import json
import posixpath
import re
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Page of the site -> file of the repository.
OUTSIDE = {
    "index.md": "README.md",
    "first_use.md": "examples/first_use.ipynb",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
PAGE_OF = {file: page for page, file in OUTSIDE.items()}
GLOSSARY = "glossary.md"
UNLINKED = (GLOSSARY, "changelog.md", "LOG.md")  # pages without links to the glossary
COPIED = "files"  # where the site keeps other files that a page links to
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside docs/, and every other file that a page links to."""
    from mkdocs.structure.files import File

    for page, file in OUTSIDE.items():
        text = markdown_of(ROOT / file)
        files.append(File.generated(config, page, content=site_text(text, file, page)))
    for page in [file for file in files.documentation_pages() if file.src_uri not in OUTSIDE]:
        for target in LINK.findall(page.content_string):
            found = target_of(target, f"docs/{page.src_uri}")
            copied = site_path(found)
            if copied.startswith(f"{COPIED}/") and (ROOT / found).is_file() and files.get_file_from_path(copied) is None:
                files.append(File.generated(config, copied, abs_src_path=str(ROOT / found)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of a page of docs/, as they are in the repository, become links of the site."""
    uri = page.file.src_uri
    return markdown if uri in OUTSIDE else site_text(markdown, f"docs/{uri}", uri)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Pages that docstrings name become links."""
    if not page.file.src_uri.startswith("api/"):
        return html
    link = '<a href="../{0}.html">{1}</a>'
    return re.sub(r"(?<![\w/])docs/(\w+)\.md", lambda name: link.format(name[1], titles()[f"{name[1]}.md"]), html)


def site_text(text: str, file: str, page: str) -> str:
    """A page's text for the site: its links lead to pages, code in tables has plain bars, words lead to the glossary."""
    home = posixpath.dirname(page) or "."
    text = re.sub(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)", lambda link: _named(link, file), text)
    text = LINK.sub(lambda found: posixpath.relpath(site_path(target_of(found[1], file)), home), text)
    text = re.sub(r"^\|.*$", lambda line: re.sub(r"`[^`]*`", lambda code: code[0].replace(r"\|", "|"), line[0]), text, flags=re.M)
    return text if page in UNLINKED else with_glossary(text, posixpath.relpath(GLOSSARY, home))


def _named(link: re.Match[str], file: str) -> str:
    """A link to a folder is its text alone; one whose text is a page's file is called as in the navigation."""
    path = target_of(link[2], file)
    title = titles().get(site_path(path)) if link[1].endswith(".md") else None
    return link[1] if (ROOT / path).is_dir() else f"[{title or link[1]}]({link[2]}{link[3] or ''})"


@cache
def titles() -> dict[str, str]:
    """Page -> what the navigation calls it."""
    lines = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    return {page: title.strip('"') for title, page in re.findall(r"^ +- (.+): (\S+\.md)$", lines, re.M)}


def anchor(title: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


@cache
def terms() -> dict[str, str]:
    """Word of the glossary -> its anchor. Words of every day, such as "peak", and single letters are linked by hand alone."""
    titles = re.findall(r"^### (.*)$", (ROOT / "docs" / GLOSSARY).read_text(encoding="utf-8"), re.M)
    words = {word: anchor(title) for title in titles for word in title.split(", ")}
    return {word: found for word, found in words.items() if re.search(r"[^a-z]", word[1:]) and "(" not in word}


def with_glossary(text: str, glossary: str) -> str:
    """The page with a link at the first use of each word of the glossary, but for headings, code and links."""
    left = {word: place for word, place in terms().items() if f"{glossary}#{place}" not in text}
    lines, fenced = text.split("\n"), False
    for number, line in enumerate(lines):
        fenced ^= line.lstrip().startswith("```")
        if fenced or re.match(r"#|    |<|:::|```", line):
            continue
        for word, place in list(left.items()):
            pattern = rf"(?<![\w-])({re.escape(word[0])}|{re.escape(word[0].lower())}){re.escape(word[1:])}s?(?![\w-])"
            parts = re.split(r"(`[^`]*`|!?\[[^\]]*\]\([^)]*\)|\[[^\]]*\]|<[^>]*>)", lines[number])  # those in between are prose
            for index in range(0, len(parts), 2):
                parts[index], found = re.subn(pattern, lambda use: f"[{use[0]}]({glossary}#{place})", parts[index], count=1)  # noqa: B023
                if found:
                    left = {other: there for other, there in left.items() if there != place}
                    break
            lines[number] = "".join(parts)
    return "\n".join(lines)


def target_of(target: str, file: str) -> str:
    """The path, from the repository's root, that a link in `file` names."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(file), target))


def site_path(path: str) -> str:
    """Where the site has a file of the repository."""
    if path in PAGE_OF:
        return PAGE_OF[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{COPIED}/{path}"


def markdown_of(file: Path) -> str:
    """A page's Markdown; of a notebook its cells, with what they printed."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".ipynb":
        return text
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = "".join("".join(output.get("text", "")) for output in cell.get("outputs", []))
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
