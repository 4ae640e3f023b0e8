"""Keys of earlier versions: at their default they are accepted, with a word, for one release; with another value refused."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from typing import Any

from isdaa.config.keys import fields
from isdaa.errors import UserError

logger = logging.getLogger(__name__)

TAKEN_AWAY: dict[str, tuple[Any, str]] = {  # key -> (default, why it was taken away)
    "align.fused_head": (False, "the kernel that it asked for is in no release of cut-cross-entropy"),
}


def of_this_version(data: Mapping[str, Any], where: str, options: Container[str] = ()) -> dict[str, Any]:
    """Plain data without keys of earlier versions, each of them said.

    where: file, for messages; options: keys that were given as options. Raises UserError for a value that has no effect any more.
    """
    found = dict(data)
    for dotted in TAKEN_AWAY:
        section, _, key = dotted.rpartition(".")
        given = found.get(section) if section else found
        if isinstance(given, Mapping) and key in given:
            say_taken_away(dotted, given[key], f"--{dotted}" if dotted in options else f"{where}: {dotted}")
            left = {name: value for name, value in given.items() if name != key}
            found = found | {section: left} if section else left
    return found


def say_taken_away(dotted: str, value: Any, place: str) -> None:
    """A word about one of `TAKEN_AWAY` at its default. Raises UserError where it has another value."""
    default, why = TAKEN_AWAY[dotted]
    if value != default or type(value) is not type(default):
        raise UserError(f"{place}: taken away, since {why}; leave it out")
    logger.warning("%s: taken away; what it was by default is what is done, so leave it out", place)


def known_keys(data: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The sections of a record, which another version may have written, without keys that there are none here.

    Those that mattered are said.
    """
    known = {dotted for dotted, _, _ in fields()}
    found: dict[str, dict[str, Any]] = {}
    for section, values in data.items():
        found[section] = {key: value for key, value in values.items() if f"{section}.{key}" in known}
        for key, value in values.items():
            if key not in found[section] and not at_default(f"{section}.{key}", value):
                logger.warning("%s: %s.%s: %r is of another isdaa, and has no effect here", where, section, key, value)
    return found


def at_default(dotted: str, value: Any) -> bool:
    """Whether a recorded key is one of `TAKEN_AWAY` that changed nothing."""
    return dotted in TAKEN_AWAY and value == TAKEN_AWAY[dotted][0]
