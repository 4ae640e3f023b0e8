"""Checks of single columns. Whatever is wrong is one line: 'file:row', column, what stands there, how to mend it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from isdaa.errors import UserError, nearest
from isdaa.foreign import JsonDecoder

LONGEST = 1 << 20  # characters of a text that is asked, answered and judged: a record holds several, and must be read again
THINKING = ("reasoning_content", "reasoning", "thinking")  # keys of a message beside its content
Message = dict[str, Any]
Text = str | list[Message]


def whole_text(value: Any, where: str) -> None:
    """Raises UserError for half of a surrogate pair, which no tokenizer can read and no file can hold."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                half = f"\\u{ord(value[error.start]):04x}"
                raise UserError(
                    f"{where} holds half of a character ({half}, a lone surrogate): a text was cut in its middle; mend or remove "
                    "the row"
                ) from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            whole_text(key, where)
            whole_text(item, where)
    elif isinstance(value, list) and value and not isinstance(value[0], int | float):
        for item in value:
            whole_text(item, where)


def finite(value: Any, where: str) -> None:
    """Raises UserError for a number, at any depth, that JSON has not: no record could hold it."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} holds {value}, which is no number in JSON; mend or remove the row")
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        finite(item, where)


def check_asked(value: Any, where: str) -> None:
    """Raises UserError for texts, in lists and messages, too, that no judge is to be asked about: with half of a surrogate pair,
    which no request can hold, with a NUL, or of more than `LONGEST` characters."""
    if isinstance(value, str):
        whole_text(value, where)
        if "\0" in value:
            raise UserError(f"{where} holds a NUL character, which no page and few endpoints take; mend or remove the row")
        if len(value) > LONGEST:
            raise UserError(f"{where} has {len(value):,} characters, more than {LONGEST:,}; shorten it or remove the row")
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        check_asked(item, where)


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
        content, place = message.get("content"), f"{where}: column '{column}', message {number}"
        if isinstance(content, Sequence) and not isinstance(content, str):
            content = _joined_parts(content, place)
        told = {k: v for k, v in message.items() if v is not None}
        if told.get("function_call") and not told.get("tool_calls"):  # OpenAI's older form
            told["tool_calls"] = [{"type": "function", "function": told.pop("function_call")}]
        says = any(told.get(name) for name in ("tool_calls", *THINKING))
        if content is None and says:
            content = ""
        if not isinstance(content, str):
            raise UserError(f"{place}: 'content' must be text, not {kind(content)}")
        if told.get("tool_calls"):
            told["tool_calls"] = _calls(told["tool_calls"], column, place)
            whole_text(told["tool_calls"], place)
        finite(told, place)
        messages.append({**told, "content": content})
    if not any(m["content"].strip() or any(m.get(name) for name in ("tool_calls", *THINKING)) for m in messages):
        raise UserError(f"{where}: column '{column}' has only empty messages; give a text or remove the row")
    return messages


def _calls(value: Any, column: str, where: str) -> list[Any]:
    """Tool calls as a list of objects with arguments as objects, however JSON text stands in between (OpenAI's form)."""
    value = json_cell(value, column, where)
    calls = [json_cell(call, column, where) for call in (value if isinstance(value, list) else [value])]
    if not all(isinstance(call, Mapping) for call in calls):
        raise UserError(f"{where}: 'tool_calls' must be a list of objects, not {kind(value)}")
    return [_with_arguments(call, where) for call in calls]


def _with_arguments(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"], where)}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        decoder = JsonDecoder()
        try:
            arguments = decoder.decode(arguments or "{}")
        except (ValueError, RecursionError):
            return dict(call)
        if decoder.repeated:
            raise UserError(f"{where}: key '{decoder.repeated[0][1]}' is given twice in the arguments of a tool call; remove one")
        return {**call, "arguments": arguments} if isinstance(arguments, Mapping) else dict(call)
    return dict(call)


def _joined_parts(parts: Sequence[Any], place: str) -> str:
    """Text of a message given as typed parts. Raises UserError for a part that is no text: pictures, sound, files, thinking."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        sort = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, Mapping) or sort not in (None, "text", "input_text", "output_text"):
            raise UserError(f"{place}: a part of type {kind(sort)} is not read: isdaa trains on text alone; remove it or the row")
        if not isinstance(part.get("text"), str):
            raise UserError(f"{place}: 'content' must be text, or parts with a 'text' each, not {kind(part)}")
        texts.append(part["text"])
    return "".join(texts)


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
    except (TypeError, ValueError, OverflowError):
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
    flags = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
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
    if max(value) >= 2**31:
        raise UserError(f"{where}: column '{column}' holds {kind(max(value))}, which is no token's id")
    return list(value)


def facts(row: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    value = json_cell(row.get("facts"), "facts", where)
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"{where}: column 'facts' must be an object, not {kind(value)}")
    finite(value, f"{where}: column 'facts'")
    return None if value is None else dict(value)


def json_cell(value: Any, column: str, where: str) -> Any:
    """A cell that a CSV file can only hold as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value else None
    except (ValueError, RecursionError):
        raise UserError(f"{where}: column '{column}' is not valid JSON; mend it or leave it out") from None


def kind(value: Any) -> str:
    """The value itself where it is short, so that the message shows what stands in the file."""
    try:
        text = "null" if value is None else repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        text = "a number of very many digits"
    return text if len(text) <= 40 else f"{text[:37]}…"
