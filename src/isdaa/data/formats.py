"""Files of other tools, as the columns that `pairs` reads: ShareGPT, Alpaca, ms-swift, conversations that became text.

What a row means is never dropped: columns that belong into the conversation (`system`, `history`, `tools`) go there,
pictures are refused, and the names of all other columns are told once.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from isdaa.data.checks import kind
from isdaa.errors import UserError

Row = dict[str, Any]

# Of ShareGPT's `from`.
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool"), "tool"),
    "system": "system",
}
FOREIGN_ROLES = ("human", "gpt", "chatgpt", "bot", "ai", "observation", "function_call")  # words for roles that no template knows
PICTURES = ("image", "images", "video", "videos", "audio", "audios")
RESPONSES = ("chosen", "rejected")
STRUCTURED = ("prompt", "chosen", "rejected", "completion", "messages", "conversations", "system", "history")
JSON_COLUMNS = ("tools", "chat_template_kwargs")
ALPACA = ("instruction", "input", "output")
WORDS = frozenset(
    {*STRUCTURED, *JSON_COLUMNS, *PICTURES, *ALPACA, "query", "response", "text", "rejected_response", "rejected_messages"}
)
# Columns of other formats; `standard` puts their content into those of `pairs.KNOWN_COLUMNS`.
COLUMNS = frozenset({"conversations", "rejected_response", "rejected_messages", "system", "history", *JSON_COLUMNS, *PICTURES})

TOLD_AS_TEXT = re.compile(r"\s*(array\(|Array\()?\[?\s*\{\s*(['\"])(role|content|from|value)\2\s*:")


def standard(row: Mapping[str, Any], where: str) -> Row:
    """The row with the columns prompt, chosen, rejected, completion, messages, tools and chat_template_kwargs, where it has them.

    Messages are lists of {'role', 'content', …}; keys that are null are taken away at any depth. Raises UserError for pictures,
    half a surrogate pair, a conversation that became text and cannot be read, roles that nobody knows.
    """
    result = {name: _plain(value) if name in WORDS else value for name, value in row.items()}
    for name, value in result.items():
        _whole(value, name, where)
    for name in PICTURES:
        if result.pop(name, None):
            raise UserError(f"{where}: column '{name}' is not read: isdaa trains on text alone; remove the column or the row")
    _read_told(result, where)
    for name in JSON_COLUMNS:
        if isinstance(result.get(name), str):
            result[name] = _parsed(result[name], name, where) if result[name].strip() else None
    _check_tools(result, where)
    _rename(result, where)
    for name in STRUCTURED:
        if isinstance(result.get(name), Mapping):  # a single message
            result[name] = [result[name]]
        if isinstance(result.get(name), list) and name != "history":
            result[name] = [_message(message, name, where) for message in result[name]]
    _bring_in_history(result, where)
    return result


def is_alpaca(row: Mapping[str, Any]) -> bool:
    """An instruction with answers: `chosen` and `rejected`, or `output` (one for SFT, or a better and a worse one)."""
    named = any(row.get(name) is not None for name in ("prompt", "query", "messages", "conversations"))
    return row.get("instruction") is not None and not named and any(row.get(name) is not None for name in ("chosen", "output"))


def empty(value: Any) -> bool:
    """Whether a response says nothing: null, blank text, no message, or a last message without words and tool calls."""
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        last = value[-1]
        content = last.get("content")
        if not isinstance(content, str | None):
            return not content
        return not (content or "").strip() and not last.get("tool_calls")
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {})


def _plain(value: Any, inside: bool = False) -> Any:
    """Lists and dicts for numpy's and Arrow's containers. Below a column, null keys are gone; NaN, pandas' null, is None."""
    if isinstance(value, str | bool | int | None):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) and not inside else value
    if hasattr(value, "tolist") and not isinstance(value, Mapping):  # numpy's
        return _plain(value.tolist(), inside)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, True) for k, v in value.items() if v is not None}
    return [_plain(item, True) for item in value] if isinstance(value, Sequence) and not isinstance(value, bytes) else value


def _whole(value: Any, column: str, where: str) -> None:
    """Raises UserError for half of a surrogate pair, which no tokenizer can read and no file can hold."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                half = f"\\u{ord(value[error.start]):04x}"
                raise UserError(
                    f"{where}: column '{column}' holds half of a character ({half}, a lone surrogate): a text was cut in its "
                    "middle; mend or remove the row"
                ) from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _whole(key, column, where)
            _whole(item, column, where)
    elif isinstance(value, list) and value and not isinstance(value[0], int | float):
        for item in value:
            _whole(item, column, where)


def _read_told(row: Row, where: str) -> None:
    """Conversations that a CSV file or a careless export holds as text, `[{'role': …` or `[{"role": …`, are read again.

    Of responses only where both look so: one alone may well be an answer about conversations, or half of a mistake.
    """
    told = {name for name in STRUCTURED if isinstance(row.get(name), str) and TOLD_AS_TEXT.match(row[name])}
    pair = [name for name in RESPONSES if name in told]
    other = next((name for name in RESPONSES if name not in pair), "")
    if len(pair) == 1 and isinstance(row.get(other), str):
        raise UserError(
            f"{where}: column '{pair[0]}' looks like a conversation that became text, and '{other}' does not; save both as "
            "messages (JSON Lines, Parquet), or both as text"
        )
    for name in told:
        row[name] = _plain(_parsed(row[name], name, where), True)


def _parsed(text: str, column: str, where: str) -> Any:
    """JSON, or what Python prints of lists and dicts."""
    for read in (json.loads, ast.literal_eval):
        try:
            return _plain(read(text))
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
    raise UserError(
        f"{where}: column '{column}' looks like messages or objects that became text, and is no valid JSON; save the data as "
        "JSON Lines or Parquet"
    )


def _check_tools(row: Row, where: str) -> None:
    tools, given = row.get("tools"), row.get("chat_template_kwargs")
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise UserError(f"{where}: column 'tools' must be a list of JSON schemas, not {kind(tools)}")
    if given is not None and not isinstance(given, Mapping):
        raise UserError(f"{where}: column 'chat_template_kwargs' must be an object, not {kind(given)}")
    for name in JSON_COLUMNS:
        if name in row:
            row[name] = row[name] or None


def _rename(row: Row, where: str) -> None:
    """Columns of Alpaca, ShareGPT and ms-swift under the names of TRL's formats."""
    if is_alpaca(row):
        words = [row.pop(name, None) for name in ("instruction", "input")]
        row["prompt"] = [{"role": "user", "content": "\n".join(str(word) for word in words if word)}]
        output = row.pop("output", None)
        if isinstance(output, list) and row.get("chosen") is None:
            if len(output) != 2:
                raise UserError(
                    f"{where}: column 'output' must be one text, or the better and the worse answer, not {kind(output)}"
                )
            row["chosen"], row["rejected"] = output
        elif output is not None and row.get("completion") is None:
            row["completion"] = output
        for name in (*RESPONSES, "completion"):
            if isinstance(row.get(name), str):
                row[name] = [{"role": "assistant", "content": row[name]}]
    conversation = row.pop("conversations", None)
    if conversation is not None and row.get("messages") is None:
        row["messages"] = conversation
    worse = [row.pop(name, None) for name in ("rejected_response", "rejected_messages")]
    worse = [value for value in worse if value is not None]
    messages = row.get("messages")
    if worse and row.get("rejected") is None and isinstance(messages, list) and messages:  # ms-swift's
        row["prompt"], row["chosen"], row["rejected"] = messages[:-1], messages[-1:], worse[0]
        if isinstance(worse[0], list) and len(worse[0]) > 1:
            row["prompt"], row["chosen"] = None, messages
        row.pop("messages")
    elif isinstance(messages, list) and all(row.get(name) is not None for name in RESPONSES):
        # The conversation so far, where the responses do not repeat it (ShareGPT's ranking); else once more what they say.
        starts = [value[0] if isinstance(value, list) and value else value for value in (row[name] for name in RESPONSES)]
        told = [str(start.get("role") or ROLES.get(str(start.get("from")))) for start in starts if isinstance(start, Mapping)]
        if row.get("prompt") is None and all(role == "assistant" for role in told):
            row["prompt"] = messages
        row.pop("messages")


def _message(message: Any, column: str, where: str) -> Any:
    """ShareGPT's {'from', 'value'} as {'role', 'content'}; anything else as it is."""
    if not isinstance(message, Mapping):
        return message
    if "from" not in message or "role" in message:
        role = message.get("role")
        if isinstance(role, str) and role.lower() in FOREIGN_ROLES:
            meant = ROLES.get(role.lower(), "assistant")
            raise UserError(f"{where}: column '{column}': no chat template knows the role '{role}'; write '{meant}'")
        return message
    role = ROLES.get(str(message["from"]).lower())
    if role is None:
        known = ", ".join(ROLES)
        raise UserError(f"{where}: column '{column}': unknown speaker {kind(message['from'])} in 'from'; known are {known}")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    if str(message["from"]).lower() == "function_call":
        calls = _parsed(str(message.get("value")), column, where)
        calls = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
        return {"role": role, "content": "", "tool_calls": calls, **rest}
    return {"role": role, "content": message.get("value"), **rest}


def _bring_in_history(row: Row, where: str) -> None:
    """`system` and `history` before the prompt. Beside texts they make the row a conversation."""
    given = [name for name in ("system", "history") if name in row]
    system, history = row.pop("system", None), row.pop("history", None)
    if not given or row.get("prompt_ids") is not None:
        return
    turns: list[Any] = []
    if isinstance(system, str) and system.strip():
        turns.append({"role": "system", "content": system})
    elif isinstance(system, list):
        turns += [message if isinstance(message, Mapping) else {"role": "system", "content": message} for message in system]
    for turn in history or []:
        if isinstance(turn, Mapping):
            turns.append(_message(turn, "history", where))
        elif isinstance(turn, list) and len(turn) == 2:
            turns += [{"role": role, "content": words} for role, words in zip(("user", "assistant"), turn, strict=True)]
        else:
            raise UserError(f"{where}: column 'history' must hold pairs of question and answer, not {kind(turn)}")
    before: Sequence[str] = [name for name in ("prompt", "query", "messages") if row.get(name) is not None][:1]
    if not before and isinstance(row.get("chosen"), list):  # an implied prompt: both conversations begin with it
        before = RESPONSES
    if turns and not before:
        raise UserError(f"{where}: column '{given[0]}' is given, but there is no prompt that it could stand before; add 'prompt'")
    if before != RESPONSES:
        for name in ("prompt", "query", *RESPONSES, "completion", "response"):
            if isinstance(row.get(name), str) and row[name].strip():
                row[name] = [{"role": "user" if name in before else "assistant", "content": row[name]}]
    for name in before if turns else ():
        row[name] = _after(turns, row[name], given[0], where)


def _after(turns: list[Any], messages: Any, column: str, where: str) -> list[Any]:
    """`messages` behind `turns`; a system message that both have stands once."""
    if not isinstance(messages, list):
        raise UserError(f"{where}: column '{column}' stands before messages, not before {kind(messages)}")
    own = messages[0] if messages and isinstance(messages[0], Mapping) and messages[0].get("role") == "system" else None
    first = turns[0]
    if own is None or first.get("role") != "system":
        return [*turns, *messages]
    if str(own.get("content")).strip() != str(first.get("content")).strip():
        raise UserError(f"{where}: column '{column}' and the conversation have different system messages; leave one out")
    return [*turns, *messages[1:]]
