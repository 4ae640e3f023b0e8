"""A prompt or a response as people read it: who says what, tool calls and thinking included."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from isdaa.data.checks import THINKING


def turns_of(value: Any, tools: Any = None) -> list[tuple[str, str]]:
    """(role, words) of each message of a conversation; of plain text, one turn whose role is empty.

    A message's parts stand one below the other: thinking and other keys, content, tool calls as `call name(arguments)`. tools:
    those that the conversation offers, as a first turn `tools`, a line each. What is not known is shown as JSON; nothing is left
    out.
    """
    if isinstance(value, str):
        turns = [("", value)]
    else:
        turns = [_turn(message) for message in (value if isinstance(value, Sequence) else [value])]
    return [("tools", "\n".join(map(_tool, tools))), *turns] if tools else turns


def conversation_text(value: Any, tools: Any = None) -> str:
    """The same as one text: `role: words`, turns apart by an empty line; plain text as it is."""
    return "\n\n".join(f"{role}: {words}" if role else words for role, words in turns_of(value, tools))


def _turn(message: Any) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        return "", message if isinstance(message, str) else _plain(message)
    role, shown = str(message.get("role") or ""), {"role", "content", "tool_calls"}
    if role == "tool" and message.get("name"):
        role, shown = f"tool {message['name']}", shown | {"name"}
    beside = [*THINKING, *(name for name in message if name not in (*THINKING, *shown))]
    words = [f"({name}) {_content(message[name])}" for name in beside if message.get(name)]
    content = _content(message.get("content"))
    calls = message.get("tool_calls") or []
    words += [content] if content or not (words or calls) else []
    words += [_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    return role, "\n".join(words)


def _content(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, list):
        return "\n".join(p["text"] if isinstance(p, Mapping) and isinstance(p.get("text"), str) else _plain(p) for p in content)
    return content if isinstance(content, str) else _plain(content)


def _call(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        return f"call {_plain(call)}"
    arguments = function.get("arguments", "")
    return f"call {function['name']}({arguments if isinstance(arguments, str) else _plain(arguments)})"


def _tool(tool: Any) -> str:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        return _plain(tool)
    told = f"{function['name']}: {function['description']}" if function.get("description") else str(function["name"])
    rest = {key: value for key, value in function.items() if key not in ("name", "description", "parameters", "type") and value}
    return " ".join([told, *(_plain(value) for value in (function.get("parameters"), rest) if value)])


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
