"""The part of docs/configuration.md that the fields write: `make docs-config`, or `python -m isdaa.config.page [FILE]`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from isdaa.config.keys import allowed, as_written, fields, kind_in_words, preset_value, section_of, takes_null
from isdaa.config.sections import Config
from isdaa.config.synonyms import SYNONYMS, WITHOUT_KEY
from isdaa.files import write_atomically

PAGE = "docs/configuration.md"
BEGIN, END = "<!-- from the fields: make docs-config -->", "<!-- end of what the fields say -->"


def from_fields() -> str:
    """Every section and key as tables, and other tools' names of them."""
    parts = [_table("The run", "", "Keys without a section.")]
    for name, field in Config.model_fields.items():
        if (section := section_of(field)) is not None:
            parts.append(_table(f"`{name}`", name, (section.__doc__ or "").split("\n")[0]))
    return "\n\n".join([*parts, _synonyms()])


def _table(title: str, section: str, what: str) -> str:
    lines = [f"### {title}", "", what, "", "| key | type | default | allowed | meaning |", "|---|---|---|---|---|"]
    for dotted, field, default in fields():
        if dotted.rpartition(".")[0] != section:
            continue
        preset = preset_value(dotted)
        value = f"`{as_written(default)}`" + (f": {preset}" if preset else "")
        takes = allowed(field) or ("any, null" if takes_null(field) else "any")
        cells = [f"`{dotted}`", kind_in_words(field), value, takes, field.description or ""]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


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
