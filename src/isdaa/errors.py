"""The one kind of error a user is meant to read: a single line that says what is wrong, where, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. `str(error)` is one line; the command line prints it and exits with status 2, without a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


def refused(error: OSError) -> UserError | None:
    """What the system refused, as one line with the file's name; None for a library's own error that is an OSError by name."""
    if error.filename is None and error.errno is None:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return UserError(f"{where}{error.strerror or error}")


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean "x"?)` for the known name closest to `name`, or an empty string where none is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f' (did you mean "{close[0]}"?)' if close else ""
