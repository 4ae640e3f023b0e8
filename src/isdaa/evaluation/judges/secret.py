"""The judge's key: read from the environment alone, never shown, and taken out of whatever an endpoint sends back."""

from __future__ import annotations

import logging
import os
import sys
import traceback

from isdaa.errors import UserError

SHOWN = "[key]"
SHORTEST = 6  # characters; a shorter "key" (`none`, `EMPTY`) is a word that a local server never looks at
FRAGMENT = 8  # characters of a key in a row that count as the key
LONG_FRAGMENT = 16  # the same in a judge's replies, whose words may by chance be some of a short password's
LOGGERS = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")


class Secret:
    """A key that no `repr`, traceback with local variables or JSON file shows."""

    __slots__ = ("_value",)

    def __init__(self, value: str | None) -> None:
        self._value = value

    def __repr__(self) -> str:
        return SHOWN if self._value else "no key"

    def __bool__(self) -> bool:
        return bool(self._value)

    def reveal(self) -> str | None:
        """The key itself, for the client that sends it."""
        return self._value

    def scrub(self, text: str, fragment: int = FRAGMENT) -> str:
        """`text` without the key and without any part of it that is `fragment` characters long."""
        key = self._value
        if key is None or len(key) < SHORTEST:
            return text
        window = min(fragment, len(key))
        parts = {key[i : i + window] for i in range(len(key) - window + 1)}
        hidden = bytearray(len(text))
        for start in range(len(text) - window + 1):
            if text[start : start + window] in parts:
                hidden[start : start + window] = b"\1" * window
        if not any(hidden):
            return text
        shown = []
        for index, character in enumerate(text):
            if not hidden[index]:
                shown.append(character)
            elif index == 0 or not hidden[index - 1]:
                shown.append(SHOWN)
        return "".join(shown)


def key_from_environment(variable: str) -> Secret:
    """The key in that variable, or none. Raises UserError (which does not show it) where it cannot be sent."""
    value = os.environ.get(variable, "").strip()
    if not value.isascii() or not value.isprintable() or " " in value:
        raise UserError(
            f"the key in the environment variable {variable} holds a space, a line break or a character beyond ASCII; set it anew"
        )
    return Secret(value or None)


class _Scrubber(logging.Filter):
    def __init__(self, secret: Secret) -> None:
        super().__init__()
        self._secret = secret

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self._secret.scrub(record.getMessage()), None
        if record.exc_info:
            error = record.exc_info if isinstance(record.exc_info, tuple) else sys.exc_info()
            record.exc_text, record.exc_info = self._secret.scrub("".join(traceback.format_exception(*error))), None
        return True


def guard_logs(secret: Secret) -> None:
    """Take the key out of what the HTTP libraries log, headers that an endpoint sends back among it.

    Called once the libraries are imported: a filter works on one logger, not on those below it.
    """
    if not secret:
        return
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] in LOGGERS:
            logger = logging.getLogger(name)
            if not any(isinstance(old, _Scrubber) and old._secret.reveal() == secret.reveal() for old in logger.filters):
                logger.addFilter(_Scrubber(secret))
