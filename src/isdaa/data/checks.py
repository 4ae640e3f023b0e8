"""Checks of single columns. Whatever is wrong is one line: 'file:row', column, what stands there, how to mend it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from isdaa.errors import UserError, nearest

THINKING = ("reasoning_content", "reasoning", "thinking")  # keys of a message beside its content
Message = dict[str, Any]
Text = str | list[Message]


def check_text(row: Mapping[str, Any], column: str, where: str, blank: bool = False) -> Text:
    """The column's text or messages; `blank`: a text may be empty. Raises UserError for one that is missing, null or empty."""
    if column not in row:
        found = ", ".join(f"'{name}'" for name in row if name != "where") or "none"
        raise UserError(f"{where}: column '{column}' is missing{nearest(column, row)}; the columns are {found}; rename or add it")
    value = row[column]
    if value is None:
        raise UserError(f"{where}: column '{column}' is null; give a text or remove the row")
    if isinstance(value, str):
        if not value.strip() and not blank:
            raise UserError(f"{where}: column '{column}' is empty; give a text or remove the row")
        return value
    return check_messages(value, column, where)


def check_messages(value: Any, column: str, where: str) -> list[Message]:
    """Chat messages with text content; keys that are null are left out, as columnar files add them to every message."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise UserError(f"{where}: column '{column}' must be text or a list of messages, not {type(value).__name__}")
    if not value:
        raise UserError(f"{where}: column '{column}' is an empty list; give at least one message or remove the row")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"{where}: column '{column}', message {number}: expected an object with 'role' and 'content'")
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            content = _joined_parts(content)
        if content is None and message.get("tool_calls"):
            content = ""
        if not isinstance(content, str):
            raise UserError(f"{where}: column '{column}', message {number}: 'content' must be text, not {kind(content)}")
        told = {k: v for k, v in message.items() if v is not None}
        if told.get("tool_calls"):
            told["tool_calls"] = _calls(told["tool_calls"], column, f"{where}: column '{column}', message {number}")
        messages.append({**told, "content": content})
    if not any(message["content"].strip() or message.get("tool_calls") for message in messages):
        raise UserError(f"{where}: column '{column}' has only empty messages; give a text or remove the row")
    return messages


def _calls(value: Any, column: str, where: str) -> list[Any]:
    """Tool calls as a list of objects with arguments as objects, however JSON text stands in between (OpenAI's form)."""
    value = json_cell(value, column, where)
    calls = [json_cell(call, column, where) for call in (value if isinstance(value, list) else [value])]
    if not all(isinstance(call, Mapping) for call in calls):
        raise UserError(f"{where}: 'tool_calls' must be a list of objects, not {kind(value)}")
    return [_with_arguments(call) for call in calls]


def _with_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            return dict(call)
        return {**call, "arguments": arguments} if isinstance(arguments, Mapping) else dict(call)
    return dict(call)


def _joined_parts(parts: Sequence[Any]) -> str | None:
    """Text of a message given as typed parts; None where a part is no text."""
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    return "".join(text for text in texts if text is not None) if all(isinstance(text, str) for text in texts) else None


def number(
    row: Mapping[str, Any], column: str, where: str, minimum: float | None = None, maximum: float | None = None
) -> float | None:
    """A finite number in range, or None where the column is absent, null or an empty cell."""
    value = row.get(column)
    if value is None or value == "":
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
        numeric = not isinstance(value, bool)
    except (TypeError, ValueError):
        numeric = False
    if not numeric:
        raise UserError(f"{where}: column '{column}' must be a number, not {kind(value)}; mend it or leave it out")
    if not math.isfinite(number):
        raise UserError(f"{where}: column '{column}' is {number}, not a finite number; mend it or leave it out")
    if minimum is not None and number < minimum:
        raise UserError(f"{where}: column '{column}' is {number:g}; it must not be below {minimum:g}")
    if maximum is not None and number > maximum:
        raise UserError(f"{where}: column '{column}' is {number:g}; a log-probability (a sum over the response) is never above 0")
    return number


def flag(row: Mapping[str, Any], column: str, where: str) -> bool:
    """True where the column is absent: a response given as text alone counts as finished."""
    value = row.get(column)
    if value is None or value == "":
        return True
    flags = {"true": True, "1": True, "false": False, "0": False}
    if str(value).lower() not in flags:
        raise UserError(f"{where}: column '{column}' must be true or false, not {kind(value)}")
    return flags[str(value).lower()]


def token_ids(row: Mapping[str, Any], column: str, where: str) -> list[int] | None:
    value = json_cell(row.get(column), column, where)
    if value is None:
        return None
    if not isinstance(value, Sequence) or not all(type(item) is int and item >= 0 for item in value):
        raise UserError(f"{where}: column '{column}' must be a list of token ids (integers from 0), not {kind(value)}")
    if not value:
        raise UserError(f"{where}: column '{column}' is an empty list; give at least one token id or remove the row")
    return list(value)


def facts(row: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    value = json_cell(row.get("facts"), "facts", where)
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"{where}: column 'facts' must be an object, not {kind(value)}")
    return None if value is None else dict(value)


def json_cell(value: Any, column: str, where: str) -> Any:
    """A cell that a CSV file can only hold as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value else None
    except json.JSONDecodeError:
        raise UserError(f"{where}: column '{column}' is not valid JSON; mend it or leave it out") from None


def kind(value: Any) -> str:
    """The value itself where it is short, so that the message shows what stands in the file."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
