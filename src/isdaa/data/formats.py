"""Files of other tools, as the columns that `pairs` reads: ShareGPT, Alpaca, ms-swift, conversations that became text.

What a row means is never dropped: columns that belong into the conversation (`system`, `history`, `tools`) go there,
pictures are refused, and the names of all other columns are told once.
"""

from __future__ import annotations

import ast
import datetime
import decimal
import json
import math
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from isdaa.data.checks import THINKING, finite, kind, whole_text
from isdaa.errors import UserError
from isdaa.foreign import JsonDecoder

Row = dict[str, Any]

# Of ShareGPT's `from`.
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool"), "tool"),
    "system": "system",
}
FOREIGN_ROLES = ("human", "gpt", "chatgpt", "bot", "ai")  # ShareGPT's words where others have 'role'
STANDARD_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
RESPONSES = ("chosen", "rejected")
JSON_COLUMNS = ("tools", "chat_template_kwargs")
ALPACA = ("instruction", "input", "output")
PICTURES = ("image", "images", "video", "videos", "audio", "audios")
# Texts or messages, in this format or another.
TEXTS = (
    *("prompt", "query", *RESPONSES, "completion", "response", "summary", "reference_response", "text", "messages"),
    *("conversations", "system", "history", "rejected_response", "rejected_messages", *ALPACA),
)
IDS = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")
# Columns of other formats; `standard` puts their content into those of `pairs.KNOWN_COLUMNS`.
COLUMNS = frozenset({"conversations", "rejected_response", "rejected_messages", "system", "history", *JSON_COLUMNS, *PICTURES})
SPOKEN = "_spoken"  # marks a row of texts that a column made a conversation
TOLD = re.compile(r"\b(?:role|from)\\*['\"]\s*:")  # somewhere in what became text of messages


def standard(row: Mapping[str, Any], where: str) -> Row:
    """The row with the columns prompt, chosen, rejected, completion, messages, tools and chat_template_kwargs, where it has them.

    Messages are lists of {'role', 'content', …}; keys that are null are taken away at any depth. Raises UserError for pictures,
    half a surrogate pair, a conversation that became text and cannot be read, roles that nobody knows.
    """
    try:
        result = {name: _plain(value, where, name) for name, value in row.items()}
        _refuse_pictures(result, where)
        _read_told(result, where)
        for name in JSON_COLUMNS:
            if isinstance(result.get(name), str):
                result[name] = _parsed(result[name], name, where) if result[name].strip() else None
            finite(result.get(name), f"{where}: column {name!r}")
        for name, value in result.items():
            whole_text(value, f"{where}: column {name!r}")
    except RecursionError:
        raise UserError(f"{where}: objects are nested too deep; mend or remove the row") from None
    _check_tools(result, where)
    _rename(result, where)
    for name in TEXTS:
        if isinstance(result.get(name), Mapping):  # a single message
            result[name] = [result[name]]
        if isinstance(result.get(name), list) and name != "history":
            result[name] = [_message(message, name, where) for message in result[name]]
    if result.get("prompt") in ("", []) and any(_whole_conversation(result.get(name)) for name in RESPONSES):
        result["prompt"] = None  # it is implied
    _bring_in_history(result, where)
    return result


def _refuse_pictures(row: Row, where: str) -> None:
    for name in PICTURES:
        value = row.pop(name, None)
        if isinstance(value, str) and value.strip().lower() in ("", "[]", "{}", "null", "none", "nan"):
            continue
        if value and not (isinstance(value, list) and all(item is None for item in value)):
            raise UserError(f"{where}: column '{name}' is not read: isdaa trains on text alone; remove the column or the row")


def _whole_conversation(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and value[0].get("role") in ("system", "user")
    )


def is_alpaca(row: Mapping[str, Any]) -> bool:
    """An instruction with answers: `chosen` and `rejected`, or `output` (one for SFT, or a better and a worse one)."""
    named = any(row.get(name) is not None for name in ("prompt", "query", "messages", "conversations"))
    answers = ("chosen", "input", "output")
    return row.get("instruction") is not None and not named and any(row.get(name) is not None for name in answers)


def empty(value: Any) -> bool:
    """Whether a response says nothing: null, blank text, no message, or a last message without words and tool calls."""
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        last = value[-1]
        content = last.get("content")
        if not isinstance(content, str | None):
            return not content
        return not (content or "").strip() and not any(last.get(name) for name in ("tool_calls", "function_call", *THINKING))
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {})


def _plain(value: Any, where: str, column: str, inside: bool = False) -> Any:
    """Lists, dicts and texts for the containers and scalars of numpy, Arrow and pandas. Below a column, null keys are gone."""
    if isinstance(value, str | bool | int | None):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) and column in (*TEXTS, *JSON_COLUMNS, *PICTURES, "id") else value
    if not inside and column not in (*TEXTS, *JSON_COLUMNS, *PICTURES, *IDS, "id", "facts"):
        return value  # not read, or a number that is checked where it is
    if hasattr(value, "tolist") and not isinstance(value, Mapping):  # numpy's, torch's
        return _plain(value.tolist(), where, column, inside)
    if column in (*IDS, "facts") or (isinstance(value, list) and value and isinstance(value[0], int)):
        return value
    if isinstance(value, Mapping):
        return {str(k): v for k, v in ((k, _plain(v, where, column, True)) for k, v in value.items()) if v is not None}
    if isinstance(value, datetime.date | datetime.time | decimal.Decimal | uuid.UUID):
        return str(value)
    if isinstance(value, bytes):
        raise UserError(f"{where}: column '{column}' holds bytes, which are no text; remove the column or the row")
    return [_plain(item, where, column, True) for item in value] if isinstance(value, Sequence) else value


def _read_told(row: Row, where: str) -> None:
    """Conversations that a CSV file or a careless export holds as text, `[{'role': …`, are read again.

    Of responses only where both are so: one alone is refused, for it may be an answer about conversations, or half of a mistake.
    """
    told = {}
    for name in TEXTS:
        value = row.get(name)
        if isinstance(value, str) and value[:200].lstrip()[:1] in ("[", "(", "{", '"', "a") and TOLD.search(value):
            read = _told(value, name, where)
            if read is not None:
                told[name] = read
    single = [name for name in RESPONSES if name in told]
    other = next((name for name in RESPONSES if name not in single), "")
    if len(single) == 1 and isinstance(row.get(other), str):
        raise UserError(
            f"{where}: column '{single[0]}' looks like a conversation saved as text, and '{other}' does not; save both as "
            "messages (JSON Lines, Parquet), or both as text"
        )
    row |= told


def _told(text: str, column: str, where: str) -> Any:
    """The messages that a text is the print of; None of an ordinary text. Raises UserError where it is a broken print."""
    text = text.strip()
    if text[0] == "a" and not text.startswith("array("):
        return None
    try:
        value = _read(text)
        value = _read(value) if isinstance(value, str) else value
    except ValueError as error:
        if "is given twice" in str(error):
            raise UserError(f"{where}: column '{column}': {error}; remove one") from None
        words = r"['\"](?:role|from)['\"]\s*:\s*['\"](?:" + "|".join((*STANDARD_ROLES, *ROLES)) + r")['\"]"
        if text[0] in "[(a" and text[-1] in "])" and re.search(words, text):
            raise _became_text(column, where) from None
        return None
    items = value if isinstance(value, list) else [value]
    return value if items and all(_is_message(item) for item in items) else None


def _is_message(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    if str(value.get("role")).lower() in (*STANDARD_ROLES, *FOREIGN_ROLES):
        return bool({"content", "tool_calls", *THINKING} & value.keys())
    return str(value.get("from")).lower() in ROLES and "value" in value


def _read(text: str) -> Any:
    """JSON, or what Python prints of lists and dicts. Raises ValueError, also for a key that is given twice."""
    decoder = JsonDecoder()
    try:
        value = decoder.decode(text)
    except json.JSONDecodeError:
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, MemoryError, TypeError) as error:
            raise ValueError(str(error)) from None
    if decoder.repeated:
        raise ValueError(f"key '{decoder.repeated[0][1]}' is given twice in one object")
    return _plain(value, "", TEXTS[0])


def _parsed(text: str, column: str, where: str) -> Any:
    """The objects of a column that holds them as text."""
    try:
        return _read(text)
    except ValueError as error:
        if "is given twice" in str(error):
            raise UserError(f"{where}: column '{column}': {error}; remove one") from None
        raise _became_text(column, where) from None


def _became_text(column: str, where: str) -> UserError:
    return UserError(
        f"{where}: column '{column}' looks like messages or objects saved as text, but is not valid JSON; save the "
        "data as JSON Lines or Parquet"
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
        if isinstance(role, str) and role not in STANDARD_ROLES and role.lower() in (*FOREIGN_ROLES, *STANDARD_ROLES):
            meant = role.lower() if role.lower() in STANDARD_ROLES else ROLES.get(role.lower(), "assistant")
            raise UserError(f"{where}: column '{column}': no chat template knows the role {kind(role)}; write '{meant}'")
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
    given = [name for name in ("system", "history") if row.get(name) not in (None, "", [])]
    system, history = row.pop("system", None), row.pop("history", None)
    if not given or row.get("prompt_ids") is not None:
        return
    turns: list[Any] = []
    if isinstance(system, str) and system.strip():
        turns.append({"role": "system", "content": system})
    elif isinstance(system, list):
        turns += [message if isinstance(message, Mapping) else {"role": "system", "content": message} for message in system]
    elif system is not None and not isinstance(system, str):
        raise UserError(f"{where}: column 'system' must be text or messages, not {kind(system)}")
    if isinstance(history, str):
        history = _parsed(history, "history", where) if history.strip() else []
    if not isinstance(history or [], list):
        raise UserError(f"{where}: column 'history' must be a list of pairs of question and answer, not {kind(history)}")
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
        raise UserError(
            f"{where}: column '{given[0]}' is given, but there is no prompt that it could stand before; add a column "
            "'prompt', or rename the one that it is"
        )
    if turns and before != RESPONSES:
        as_conversation(row, before)
    for name in before if turns else ():
        row[name] = _after(turns, row[name], given[0], where)


def as_conversation(row: Row, prompts: Sequence[str] = ("prompt",)) -> None:
    """Make messages of a row's texts. A row of which this was done has `SPOKEN`."""
    for name in ("prompt", "query", *RESPONSES, "completion", "response"):
        if isinstance(row.get(name), str) and row[name].strip():
            row[name] = [{"role": "user" if name in prompts else "assistant", "content": row[name]}]
            row[SPOKEN] = True


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
