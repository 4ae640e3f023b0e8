"""Marks in place of a conversation's words: what a template makes of them shows in its text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

Mark = Callable[[str], str]

MARK = "isdaamark{}e"
NO_WORDS = ("id", "type", "index")  # of a tool call: templates differ in which of them they write


def leaves(value: Any, mark: Mark, leave: tuple[str, ...] = ()) -> Any:
    """Every text that says something, marked; those under the keys `leave` stay."""
    if isinstance(value, Mapping):
        return {key: item if key in leave else leaves(item, mark, leave) for key, item in value.items()}
    if isinstance(value, list):
        return [leaves(item, mark, leave) for item in value]
    return mark(value) if isinstance(value, str) and value.strip() else value


def calls(tool_calls: Any, mark: Mark) -> Any:
    """Tool calls, marked; of arguments that are JSON text, the texts inside."""
    if isinstance(tool_calls, list):
        return [calls(call, mark) for call in tool_calls]
    if isinstance(tool_calls, Mapping):
        if "function" in tool_calls:
            return {**tool_calls, "function": calls(tool_calls["function"], mark)}
        arguments = tool_calls.get("arguments")
        rest = leaves({key: value for key, value in tool_calls.items() if key != "arguments"}, mark, NO_WORDS)
        if isinstance(arguments, str):
            try:
                return {**rest, "arguments": json.dumps(leaves(json.loads(arguments), mark))}
            except ValueError:
                pass
        return {**rest, "arguments": leaves(arguments, mark)} if "arguments" in tool_calls else rest
    return leaves(tool_calls, mark)


def tool(schema: Mapping[str, Any], mark: Mark) -> Any:
    """A tool's schema with its name marked; without a name, every text of it."""
    if isinstance(schema.get("function"), Mapping):
        return {**schema, "function": tool(schema["function"], mark)}
    return {**schema, "name": mark(str(schema["name"]))} if schema.get("name") else leaves(schema, mark)
