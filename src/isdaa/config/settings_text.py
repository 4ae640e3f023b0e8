"""What people write in a YAML file or behind an option, read as what its key is for: text keys are text.

A key whose type is text (paths, names, choices, lists of them) has the characters that are written: `2026-11-29`, `0123456`,
`12e4567`, `yes` and `run #2` stay what they are; only `null` is none. Numbers, booleans, lists and dictionaries are those of
YAML 1.2: no dates, no octal `0123`, no `12:30`, and `1e-6` is a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import reduce
from operator import or_
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from isdaa.errors import LONGEST, UserError
from isdaa.foreign import check_file

TAG = "tag:yaml.org,2002:"
IMPLICIT = {
    "null": (r"(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "bool": (r"(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    "int": (r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    "float": (
        r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
    "merge": ("<<$", ["<"]),
}
DEPTH = 4  # of keys that are typed: section.key, or grids.name.key
DEEPEST = 100  # lists and dictionaries in one another, as the value of a key
KindOf = Callable[[tuple[str, ...]], Any]  # path of a key -> its type; None where it is not known


class DistinctKeys(yaml.SafeLoader):
    """YAML 1.2 of plain data whose keys are text; a key that a mapping has twice is refused, of which YAML takes the last."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    yaml_constructors: dict[Any, Any] = {}  # type: ignore[misc]  # noqa: RUF012

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level > DEEPEST + DEPTH:  # the scanner's time grows with its square
            raise yaml.scanner.ScannerError(None, None, f"nested deeper than {DEEPEST}", self.get_mark())
        super().fetch_flow_collection_start(token)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for place, (key, value) in enumerate(node.value):
            if not isinstance(key, yaml.ScalarNode) or key.tag == TAG + "merge":
                continue
            line, name = key.start_mark.line + 1, key.value
            if name in lines:
                raise UserError(f"{self.name}:{line}: key '{name}' is given twice, first on line {lines[name]}; remove one")
            lines[name] = line
            node.value[place] = (_as_text(key), value)
        return node

    def construct_undefined(self, node: Any) -> Any:
        raise yaml.constructor.ConstructorError(None, None, f"no plain data: the tag {node.tag}", node.start_mark)

    def scalar(self, node: Any) -> Any:
        """The value of a null, boolean or number."""
        text, kind = node.value, node.tag.removeprefix(TAG)
        if not re.match(IMPLICIT[kind][0], text):
            raise yaml.constructor.ConstructorError(None, None, f"expected {kind}, found {text[:80]!r}", node.start_mark)
        if len(text) > LONGEST:
            raise yaml.constructor.ConstructorError(None, None, f"a number of {len(text)} characters", node.start_mark)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))
        value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        return text if math.isinf(value) and "inf" not in text.lower() else value  # 12e4567: more likely a name


class Dumper(yaml.SafeDumper):
    """Quotes every text that a reader of YAML 1.1 or 1.2 would take for something else."""


for _name, (_pattern, _first) in IMPLICIT.items():
    DistinctKeys.add_implicit_resolver(TAG + _name, re.compile(_pattern), _first)
    Dumper.add_implicit_resolver(TAG + _name, re.compile(_pattern), _first)
    if _name != "merge":
        DistinctKeys.add_constructor(TAG + _name, DistinctKeys.scalar)
for _name in ("str", "seq", "map"):
    DistinctKeys.add_constructor(TAG + _name, yaml.SafeLoader.yaml_constructors[TAG + _name])
DistinctKeys.add_constructor(None, DistinctKeys.construct_undefined)


def read_settings(path: str | Path, kind_of: KindOf) -> Any:
    """A YAML file's content. Raises UserError with file and line; FileNotFoundError where there is none."""
    if Path(path).exists() and not Path(path).is_dir():
        check_file(path)  # a named pipe would be waited for without end
    with open(path, "rb") as file:
        return _loaded(file, str(path), kind_of)


def dump_settings(value: Any) -> str:
    """YAML that is read as the same value again, here and by other tools."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def option_value(text: str, kind: Any, name: str) -> Any:
    """The value of one option's text. name: of the option, for errors."""
    text_too, others = _kinds(kind)
    if not text.strip():
        raise UserError(f"{name}: empty; write null for none")
    if text_too and not others:
        return None if text == "null" else text
    if any(_is_container(kind) for kind in others):
        return listed_value(text, kind, name)
    loader: Any = DistinctKeys("")
    node = yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text)
    if node.tag == TAG + "null":
        return None if text == "null" else text
    return loader.scalar(node) if node.tag != TAG + "str" and len(text) <= LONGEST else text


def listed_value(text: str, kind: Any, name: str) -> Any:
    """The value of an option whose text is one list of YAML, `[sft, align]`."""
    return _loaded(text, name, lambda path: None if path else kind)


def item_kind(kind: Any) -> Any:
    """The type of a list's items; None where `kind` is no list."""
    found = [get_args(one)[0] for one in _kinds(kind)[1] if get_origin(one) is list]
    return reduce(or_, found) if found else None


def or_list(kind: Any) -> Any:
    """A value of this type, or a list of them: what a grid has."""
    return kind | list[kind]


def _loaded(stream: Any, name: str, kind_of: KindOf) -> Any:
    loader = None
    try:
        loader = DistinctKeys(stream)
        loader.name = name
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(_typed(node, kind_of, ()))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: not a YAML file ({error})") from None
    finally:
        if loader is not None:
            loader.dispose()


def _typed(node: Any, kind_of: KindOf, path: tuple[str, ...]) -> Any:
    """The node with plain scalars of text keys as text. Copies what it changes: an alias may stand for another key, too."""
    if not isinstance(node, yaml.MappingNode):
        return _text_of(node, kind_of(path))
    if len(path) >= DEPTH:
        return node
    pairs = []
    for key, value in node.value:
        if key.tag != TAG + "merge":
            value = _typed(value, kind_of, (*path, str(key.value)))
        elif isinstance(value, yaml.SequenceNode):
            value = yaml.SequenceNode(value.tag, [_typed(one, kind_of, path) for one in value.value], value.start_mark)
        else:
            value = _typed(value, kind_of, path)
        pairs.append((key, value))
    return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark)


def _text_of(node: Any, kind: Any) -> Any:
    if isinstance(node, yaml.SequenceNode):
        item = item_kind(kind)
        return node if item is None else yaml.SequenceNode(node.tag, [_text_of(n, item) for n in node.value], node.start_mark)
    text_too, others = _kinds(kind)
    if not isinstance(node, yaml.ScalarNode) or not text_too or any(not _is_container(one) for one in others):
        return node
    if node.tag not in {TAG + name for name in IMPLICIT}:
        return node
    if node.tag == TAG + "null" and node.value in ("", "null"):
        return node
    if node.tag == TAG + "null":
        mark = node.start_mark
        raise UserError(
            f"{mark.name}:{mark.line + 1}: {node.value} can mean none or a text; write null, or put it in quotes "
            '("~/" is your home folder)'
        )
    return _as_text(node)


def _as_text(node: Any) -> yaml.ScalarNode:
    return yaml.ScalarNode(TAG + "str", node.value, node.start_mark, node.end_mark, node.style)


def _kinds(kind: Any) -> tuple[bool, list[Any]]:
    """Whether a type has text among its members, and its other members but None."""
    if get_origin(kind) is Annotated:
        return _kinds(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        found = [_kinds(one) for one in get_args(kind)]
        return any(text for text, _ in found), [one for _, others in found for one in others]
    if kind is str or (get_origin(kind) is Literal and all(isinstance(one, str) for one in get_args(kind))):
        return True, []
    return False, [] if kind in (None, type(None)) else [kind]


def _is_container(kind: Any) -> bool:
    return get_origin(kind) in (list, dict) or kind in (list, dict, Any)
