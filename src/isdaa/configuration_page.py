"""The part of docs/configuration.md that the fields write: `make docs-config`, or `python -m isdaa.configuration_page [FILE]`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from isdaa.config import Config, allowed, as_written, fields, preset_value
from isdaa.files import write_atomically
from isdaa.settings_text import item_kind
from isdaa.synonyms import SYNONYMS, WITHOUT_KEY

PAGE = "docs/configuration.md"
BEGIN, END = "<!-- from the fields: make docs-config -->", "<!-- end of what the fields say -->"


def from_fields() -> str:
    """Every section and key as tables, and other tools' names of them."""
    parts = [_table("The run", "", "Keys without a section.")]
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            parts.append(_table(f"`{name}`", name, (section.__doc__ or "").split("\n")[0]))
    return "\n\n".join([*parts, _synonyms()])


def _table(title: str, section: str, what: str) -> str:
    lines = [f"### {title}", "", what, "", "| key | type | default | allowed | meaning |", "|---|---|---|---|---|"]
    for dotted, field, default in fields():
        if dotted.rpartition(".")[0] != section:
            continue
        preset = preset_value(dotted)
        value = f"`{as_written(default)}`" + (f": {preset}" if preset else "")
        cells = [
            f"`{dotted}`",
            _kind(field.annotation),
            value,
            allowed(field) or _anything(field.annotation),
            field.description or "",
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _kind(annotation: Any) -> str:
    """The type of a key in a word."""
    if hasattr(annotation, "__metadata__"):
        return _kind(annotation.__origin__)
    if item_kind(annotation) is not None and get_origin(annotation) is list:
        return "list"
    kinds = {part for part in _parts(annotation) if part is not type(None)}
    for kind, word in ((dict, "dictionary"), (bool, "boolean"), (list, "text or list"), (float, "number"), (int, "number")):
        if kind in kinds:
            return word
    return "text"


def _parts(annotation: Any) -> set[Any]:
    if hasattr(annotation, "__metadata__"):
        return _parts(annotation.__origin__)
    origin = get_origin(annotation)
    if origin in (list, dict):
        return {origin}
    arguments = get_args(annotation)
    return set().union(*map(_parts, arguments)) if arguments else {annotation}


def _anything(annotation: Any) -> str:
    return ", ".join(["any"] + ["null"] * (type(None) in _parts(annotation)))


def _synonyms() -> str:
    known = {name for name, _, _ in fields()}
    names: dict[str, list[str]] = {}
    for name, key in SYNONYMS.items():
        if name != key.rpartition(".")[2] and name not in known:
            names.setdefault(key, []).append(name)
    without: dict[str, list[str]] = {}
    for name, why in WITHOUT_KEY.items():
        without.setdefault(why, []).append(name)
    lines = [
        "### Other tools' names",
        "",
        "What TRL, transformers, peft, Axolotl and habit call a key. A file or an option with one of these is refused with",
        "the key of the second column (`--align.lr` → `--align.learning_rate`; of `sft.lr` it is `sft.learning_rate`).",
        "",
        "| there | here |",
        "|---|---|",
        *(f"| {', '.join(f'`{name}`' for name in found)} | `{key}` |" for key, found in names.items()),
        *(f"| {', '.join(f'`{name}`' for name in found)} | no key: {why} |" for why, found in without.items()),
    ]
    return "\n".join(lines)


def renewed(text: str) -> str:
    """A page with the part between its two marks as the fields have it now."""
    return re.sub(f"(?<={re.escape(BEGIN)}\n).*(?=\n{re.escape(END)})", lambda _: f"\n{from_fields()}\n", text, flags=re.DOTALL)


if __name__ == "__main__":
    page = Path(sys.argv[1] if len(sys.argv) > 1 else PAGE)
    write_atomically(page, renewed(page.read_text(encoding="utf-8")))
