"""The one kind of error a user is meant to read: a single line that says what is wrong, where, and how to mend it."""

from __future__ import annotations

import difflib
import errno
import os
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

LONGEST = 500  # characters of an error's line, whatever it quotes
HEAD = 300  # of them, before the cut


class UserError(Exception):
    """Bad input, or a run that had to stop. `str(error)` is one line; the command line prints it and exits with `status`.

    Args:
        message: what is wrong, where, and how to mend it; cut in its middle beyond 500 characters.
        command: what to type; it follows the message uncut.
    """

    status = 2

    def __init__(self, message: str, command: str = "") -> None:
        super().__init__(shortened(" ".join(str(message).split())), *([shown(command)] if command else []))

    def __str__(self) -> str:
        return " ".join(self.args)


class DoneInPart(UserError):
    """Some of the work is done and written, and the same command may do the rest."""

    status = 3


def shown(text: object, lines: bool = False) -> str:
    r"""A name from outside as a terminal, a log or a page may show it: `\x1b` for a control character.

    Escaped are control and format characters (ESC, overrides of direction, zero width), separators of lines and
    paragraphs, and lone surrogates; every other character stays. lines: line feeds and tabs stay, too.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in HIDDEN and not (lines and c in "\n\t") else c for c in text)


HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def shortened(text: object) -> str:
    """`shown`, and no longer than `LONGEST`: the middle of a longer one is left out."""
    line = shown(text)
    return line if len(line) <= LONGEST else f"{line[:HEAD]} … {line[HEAD + 3 - LONGEST :]}"


def refused(error: OSError) -> UserError | None:
    """What the system refused, as one line with the file's name; None for a library's own error that is an OSError by name."""
    if error.filename is None and error.errno is None:
        return None
    # Of a file that was renamed into place, the place: the other name is one that nobody knows.
    name = error.filename2 if error.filename2 and error.errno in (errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST) else error.filename
    reason = error.strerror or str(error)
    if error.errno == errno.EEXIST and name and not os.path.isdir(name):
        found = "a file, where a folder is needed" if os.path.exists(name) else "a symbolic link that leads nowhere"
        reason = f"{found}; remove it, or choose another place"
    return UserError(f"{name}: {reason}" if name else reason)


def nearest_path(path: str | Path, known: Iterable[str | Path]) -> str:
    """The same of paths that lie beside it, by their last parts: what all have before them makes none of them alike."""
    return _nearest(Path(path).name, {Path(one).name: str(one) for one in known})


def nearest(name: object, known: Iterable[object]) -> str:
    """` (did you mean "x"?)` for the known name closest to `name`, or an empty string where none is close."""
    return _nearest(name, {str(one): str(one) for one in known if one is not None})


def _nearest(name: object, known: Mapping[str, str]) -> str:
    """known: what is compared -> what is shown. Upper and lower case, dashes and underscores are the same."""
    folded = {one.lower().replace("-", "_"): shown for one, shown in known.items()}
    close = difflib.get_close_matches(str(name)[:LONGEST].lower().replace("-", "_"), list(folded), n=1, cutoff=0.5)
    return f' (did you mean "{folded[close[0]]}"?)' if close else ""
