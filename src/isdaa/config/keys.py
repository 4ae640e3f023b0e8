"""The keys of the configuration, and what can be said of each: for the command line, its help, pages and errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from isdaa.config.sections import Config
from isdaa.objectives.presets import DEFAULTS, PRESETS, resolve

SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def fields(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    """Every key of the configuration: `(dotted name, pydantic field, default)`."""
    for name, field in section.model_fields.items():
        if (inner := section_of(field)) is not None:
            yield from fields(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field, field.get_default(call_default_factory=True)


def section_of(field: FieldInfo | None) -> type[BaseModel] | None:
    """The section that a field holds; None where it is a key of its own."""
    kind = None if field is None else field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def field_of(keys: Sequence[str], root: type[BaseModel] = Config) -> FieldInfo | None:
    """The field of a key or section; None where there is none."""
    section: type[BaseModel] | None = root
    field = None
    for key in keys:
        if section is None or key not in section.model_fields:
            return None
        field = section.model_fields[key]
        section = section_of(field)
    return field


def kind_of(keys: Sequence[str], root: type[BaseModel] = Config) -> Any:
    """The type of a key, by which its text is read; None where there is no such key."""
    field = field_of(keys, root)
    return None if field is None else field.annotation


def names(root: type[BaseModel] = Config) -> list[str]:
    """Every key, dotted, and every section."""
    return list(dict.fromkeys([*root.model_fields, *(dotted for dotted, _, _ in fields(root))]))


def allowed(field: FieldInfo) -> str:
    """What a key takes, in words: its choices, or its kind and range; empty for text and dictionaries."""
    kinds, choices, bounds = _members(field.annotation, field.metadata)
    extra = field.json_schema_extra
    offered: Any = extra.get("choices", []) if isinstance(extra, dict) else []
    choices = [*choices, *offered]
    words = [*map(str, choices), *(["null"] if type(None) in kinds else [])]
    number = "whole number" if int in kinds else "number" if float in kinds else ""
    if bool in kinds:
        return ", ".join(["true", "false", *words])
    if number:
        start = f"a list of {number}s" if list in kinds else f"a {number}"
        return ", ".join([" ".join([start, " and ".join(bounds)]).strip(), *words])
    return f"{'any' if list in kinds else 'one'} of {', '.join(words)}" if choices else ""


def kind_in_words(field: FieldInfo) -> str:
    """The type of a key in a word."""
    kinds = _members(field.annotation)[0]
    if get_origin(field.annotation) is list:
        return "list"
    for kind, word in ((dict, "dictionary"), (bool, "boolean"), (list, "text or list"), (float, "number"), (int, "number")):
        if kind in kinds:
            return word
    return "text"


def takes_null(field: FieldInfo) -> bool:
    """Whether a key may have no value."""
    return type(None) in _members(field.annotation)[0]


def _members(kind: Any, metadata: Sequence[Any] = ()) -> tuple[set[Any], list[Any], list[str]]:
    """The types that a value may have, the choices among them, and the bounds of its numbers."""
    kinds: set[Any] = set()
    choices: list[Any] = []
    bounds: list[str] = []

    def look(kind: Any, metadata: Sequence[Any]) -> None:
        for rule in metadata:
            bounds.extend(f"{sign} {value}" for name, sign in SIGNS.items() if (value := getattr(rule, name, None)) is not None)
            look(None, getattr(rule, "metadata", ()))  # of a field within an annotation
        origin = get_origin(kind)
        if hasattr(kind, "__metadata__"):
            look(kind.__origin__, kind.__metadata__)
        elif origin is Literal:
            choices.extend(value for value in get_args(kind) if value not in choices)
        elif origin is dict:
            kinds.add(dict)
        elif get_args(kind):
            kinds.update([list] if origin in (list, tuple) else [])
            for part in get_args(kind):
                look(part, ())
        elif kind is not None:
            kinds.add(kind)

    look(kind, metadata)
    return kinds, choices, [*dict.fromkeys(bounds)]


def preset_value(dotted: str) -> str:
    """What `preset` stands for as the value of a key of the objective; empty for other keys."""
    section, _, name = dotted.rpartition(".")
    if section != "objective" or name not in DEFAULTS:
        return ""
    values = {str(method): resolve(method)[name] for method in PRESETS}
    default = Config.model_fields["objective"].get_default(call_default_factory=True).method
    own = as_written(values[default])
    return own if len({*map(str, values.values())}) == 1 else f"the method's; {own} for {default}"


def as_written(value: Any) -> str:
    """A value as a YAML file would have it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
