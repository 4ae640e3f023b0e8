"""A name that was made to do harm, and what nothing that people look at may hold of it."""

from __future__ import annotations

import re
import unicodedata

from isdaa.errors import HIDDEN

NAME = "a\x1b]0;x\x07[red]=1+1<script>alert(1)<|script>\u202e\x9b31m\u2028:smile:\n"
FOLDER = NAME.replace("|", "")  # of a folder, which may hold all but a slash
ESCAPED = r"a\x1b]0;x\x07[red]=1+1<script>"


def harmless(text: str, where: object = "") -> None:
    """Nothing in it moves a cursor, turns the direction of writing or hides itself."""
    found = [c for c in text if unicodedata.category(c) in HIDDEN and c not in "\n\t"]
    assert not found, (where, found)


def unwrapped(text: str) -> str:
    return re.sub(r"\s+", "", text)
