"""What pydantic found wrong, as one line: where it stands, what it is, what to write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from isdaa.config.keys import allowed, as_written, field_of, kind_in_words, names, section_of
from isdaa.config.sections import Config
from isdaa.config.synonyms import SYNONYMS, hint
from isdaa.errors import UserError


def refusal(error: ValidationError, where: str, options: Iterable[str] = (), root: type[BaseModel] = Config) -> UserError:
    """The first error. where: the file; options: keys that were given as options, and are named so."""
    # Unknown keys come first: they are usually the cause of what else is missing.
    first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    kind, value, message = first["type"], first["input"], first["msg"].removeprefix("Value error, ")
    keys = _keys(first["loc"], kind, root)
    dotted = ".".join(keys)
    options = list(options)
    given = sorted(f"--{key}" for key in options if key.startswith(f"{dotted}."))
    if given:  # the section as a whole is wrong: what was said here may be why
        where = f"{where} with {', '.join(given)}"
    place = f"--{dotted}" if dotted in options else f"{where}: {dotted}" if dotted else where
    if kind == "extra_forbidden":
        return UserError(f"{place}: unknown key{hint(dotted, names(root))}")
    if kind == "value_error":  # some name their keys themselves
        return UserError(f"{where}: {message}" if message.startswith(f"{dotted}.") else f"{place}: {message}")
    if kind == "missing":
        needed = [name for name, field in root.model_fields.items() if field.is_required()]
        return UserError(f"{place}: missing; needed are {', '.join(needed)}")
    got, scalar = "null" if value is None else repr(value), isinstance(value, (str, int, float))
    if kind == "model_type":
        meant = SYNONYMS.get(dotted, "").removeprefix(f"{dotted}.")
        one = f"; write {dotted}: {{{meant}: {as_written(value)}}}" if scalar and meant and "." not in meant else ""
        return UserError(f"{place}: expected a section of keys, got {got}{one}")
    if kind == "list_type" and scalar:
        return UserError(f"{place}: expected a list, got {got}; write [{as_written(value)}]")
    expected = _expected(keys, message, root)
    if kind == "finite_number":
        expected = expected.replace("number", "finite number", 1)
    return UserError(f"{place}: expected {expected}, got {got}")


def _keys(location: Sequence[int | str], kind: str, root: type[BaseModel]) -> list[str]:
    """The keys of pydantic's location, which also names members of unions."""
    keys: list[str] = []
    section: type[BaseModel] | None = root
    inside: Any = None  # a dictionary
    for part in location:
        field = section.model_fields.get(str(part)) if section is not None else None
        if field is None and kind != "extra_forbidden" and inside is not dict:
            break
        keys.append(str(part))
        section, inside = section_of(field), get_origin(field.annotation) if field is not None else None
    return keys


def _expected(keys: Sequence[str], message: str, root: type[BaseModel]) -> str:
    field = field_of(keys, root)
    if field is None:
        return message.removeprefix("Input should be ")
    words = allowed(field)
    if not words:
        kind = kind_in_words(field)
        return f"a {kind}" if kind in ("dictionary", "list") else kind
    return words if words.startswith(("one of ", "any of ")) else words.replace(", ", " or ")
