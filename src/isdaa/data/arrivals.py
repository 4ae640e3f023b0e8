"""Does everything that a conversation says arrive in what the chat template writes? One rule, for all templates and parts.

Each distinct shape of conversation is rendered once with marks in place of its words. A part whose mark does not arrive is
refused, but for the thinking of earlier turns where a template knows of it and leaves it out on purpose: that is counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from isdaa.data.chat import ChatFormat
from isdaa.data.checks import THINKING, Message
from isdaa.data.formats import STANDARD_ROLES
from isdaa.data.marks import MARK, Mark, calls, leaves, tool
from isdaa.errors import UserError

# Keys that say no words of their own; templates differ in which of them they write.
QUIET = ("role", "content", "tool_calls", "tool_call_id", "name", "prefix", *THINKING)
THOUGHT = "thought"  # before a closing tag of the template's own, as `</think>`
TAG = re.compile(r"</?[\w|]{1,30}>|\[/?[A-Z_]{2,30}\]|<\|[^|<>\s]{1,40}\|>")


class Arrived(NamedTuple):
    """What became of a conversation. refused: why it cannot be used, or None; thinking: of earlier turns, left out; unread: what
    the template does not know."""

    refused: str | None
    thinking: bool
    unread: tuple[str, ...]


class Arrivals:
    """What arrives of conversations in the text of one template."""

    def __init__(self, chat: ChatFormat) -> None:
        self.chat = chat
        self.tags = set(TAG.findall(chat.source))
        self._seen: dict[str, Arrived] = {}

    def check(self, messages: Sequence[Message], answers: int, given: Mapping[str, Any], where: str) -> Arrived:
        """messages: the conversation, of which the last `answers` are the response (0: a prompt to be answered).

        Raises UserError where something does not arrive.
        """
        beside = {name: _kinds(value) if name == "tools" else value for name, value in given.items()}
        key = json.dumps([[self._shape(message) for message in messages], answers, beside], default=str)
        found = self._seen.get(key)
        if found is None:
            found = self._seen[key] = self._rendered(messages, answers, given, where)
        if found.refused is not None:
            raise UserError(f"{where}: {found.refused}")
        return found

    def _shape(self, message: Message) -> Any:
        """All of a message but its words."""
        return {
            k: self._parts(v)[1] if isinstance(v, str) and k != "role" else v if k == "role" else _kinds(v)
            for k, v in message.items()
        }

    def _parts(self, text: str) -> tuple[list[str], list[Any]]:
        """A text divided at the template's own tags, and its shape: the tags, and which parts say something."""
        inside = [tag for tag in self.tags if tag in text]
        if not inside:
            return [text], [bool(text.strip())]
        parts = re.split(f"({'|'.join(map(re.escape, sorted(inside, key=len, reverse=True)))})", text)
        return parts, [part if part in self.tags else bool(part.strip()) for part in parts]

    def _rendered(self, messages: Sequence[Message], answers: int, given: Mapping[str, Any], where: str) -> Arrived:
        marks: list[tuple[str, int, str]] = []  # mark, number of the message (-1: tools), what it is

        def mark(number: int, what: str) -> Mark:
            def marked(text: str) -> str:
                marks.append((MARK.format(len(marks)), number, what))
                return marks[-1][0]

            return marked

        marked = [self._marked(message, number, mark) for number, message in enumerate(messages)]
        beside = dict(given)
        if given.get("tools"):
            beside["tools"] = [tool(schema, mark(-1, "tools")) for schema in given["tools"]]
        if messages[-1].get("prefix") is True and not answers:
            marked[-1].pop("prefix")
        opening = not answers and messages[-1]["role"] != "assistant"
        text = self.chat.render(marked, where, opening=opening, given=beside)
        thinking = False
        read, variables, words = self.chat.reads
        for message in messages:
            role = message["role"]
            if role not in STANDARD_ROLES and role not in words:
                inside = f" in {self.chat.place}" if self.chat.place else ""
                return Arrived(f"the chat template{inside} does not know the role '{role}'; write one that it knows", False, ())
        for name, number, what in marks:
            if name in text:
                continue
            earlier = 0 <= number < len(messages) - answers and messages[number]["role"] == "assistant"
            meant = what == THOUGHT or (what in THINKING and what in read)  # it knows thinking, and leaves it out
            if not (earlier and meant):
                return Arrived(self._refusal(what, number, messages), False, ())
            thinking = True
        keys = [f"'{key}' of messages" for message in messages for key in message if key not in (*QUIET, *read)]
        keys += [f"'{key}' of chat_template_kwargs" for key in given if key not in ("tools", *variables)]
        return Arrived(None, thinking, tuple(dict.fromkeys(keys)))

    def _refusal(self, what: str, number: int, messages: Sequence[Message]) -> str:
        inside = f" in {self.chat.place}" if self.chat.place else ""
        if number < 0:
            return (
                f"the chat template{inside} does not write column 'tools'; use a model whose template does, or remove the column"
            )
        role = messages[number]["role"]
        of, cure = f"message {number} (role '{role}')", "remove it from the data, or set a template that writes it"
        if what == "content":
            return f"the chat template{inside} leaves out what {of} says; give it another role, or set a template that writes it"
        if what in (THOUGHT, *THINKING):
            key = "" if what == THOUGHT else f", key '{what}'"
            return f"the chat template{inside} leaves out the thinking of {of}{key}; {cure}"
        return f"the chat template{inside} leaves out '{what}' of {of}; {cure}"

    def _marked(self, message: Message, number: int, mark: Callable[[int, str], Mark]) -> Message:
        """The message with a mark for every part that says something."""
        result = dict(message)
        for key, value in message.items():
            if key == "content":
                parts, shape = self._parts(value)
                closing = max((i for i, part in enumerate(shape) if isinstance(part, str) and part[1:2] == "/"), default=-1)
                result[key] = "".join(
                    mark(number, THOUGHT if i < closing and message["role"] == "assistant" else "content")(part)
                    if said is True
                    else part
                    for i, (part, said) in enumerate(zip(parts, shape, strict=True))
                )
            elif key in THINKING:
                result[key] = leaves(value, mark(number, key))
            elif key == "tool_calls":
                result[key] = calls(value, mark(number, "tool_calls"))
        return result


def _kinds(value: Any) -> Any:
    """The shape of anything: its keys and the kinds of its values."""
    if isinstance(value, Mapping):
        return {str(key): value[key] if isinstance(value[key], bool) else _kinds(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list):
        return [_kinds(item) for item in value]
    return type(value).__name__ if not isinstance(value, str) else bool(value.strip())
