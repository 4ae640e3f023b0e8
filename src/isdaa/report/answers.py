"""A response as people read it: the raw text of a chat model, its markup turned into turns."""

from __future__ import annotations

import json
import re
from typing import Any

from isdaa.data.conversation import turns_of

ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>",
        "<｜end▁of▁sentence｜>")  # fmt: skip
# What opens a turn: ChatML, Llama 3, Gemma, Phi and Zephyr, DeepSeek, Mistral and Llama 2.
OPENS = re.compile(
    r"<\|im_start\|>(?P<chatml>[\w-]*)\n?|<\|start_header_id\|>(?P<llama>[\w-]*)<\|end_header_id\|>\s*|<start_of_turn>(?P<gemma>\w*)\n?"
    r"|<\|(?P<phi>system|user|assistant)\|>\n?|<｜(?P<deepseek>User|Assistant)｜>|(?P<user>\[INST\])|(?P<model>\[/INST\])"
)
END = re.compile("|".join(map(re.escape, ENDS)))
CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
THOUGHT = re.compile(r"<think>\s*(.*?)\s*</think>\s*", re.DOTALL)
MODEL = "assistant"


def answer_turns(value: Any, chat: bool) -> list[tuple[str, str]]:
    """(role, words) of a response: its own turn, then whatever else it wrote as turns of others.

    value: raw text, or messages. chat: whether its prompt is a conversation; plain text without markup has an empty role. Tokens
    that open a turn become its role, those that end one the line `(end of turn: …)` where text follows; tool calls are shown as
    `call name(arguments)`, thinking as such. Nothing is left out.
    """
    if not isinstance(value, str):
        return turns_of(value)
    turns: list[tuple[str, str]] = []
    role, start = MODEL if chat or OPENS.search(value) else "", 0
    for found in OPENS.finditer(value):
        turns.append((role, value[start : found.start()]))
        name = next((text for text in found.groups() if text), "")
        role, start = {"[INST]": "user", "[/INST]": MODEL, "model": MODEL, "": MODEL}.get(name, name.lower()), found.end()
    turns.append((role, value[start:]))
    read = [(name, _words(text)) for name, text in turns]
    return [turn for turn in read if turn[1]] or [(role, "")]


def _words(text: str) -> str:
    """A turn's text in words: ends, tool calls and thinking as lines of their own."""
    text = text.strip()
    while text.endswith(ENDS):
        text = text[: -len(next(end for end in ENDS if text.endswith(end)))].rstrip()
    text = THOUGHT.sub(lambda found: f"(thinking) {found[1]}\n", text)
    text = CALL.sub(_call, text)
    return END.sub(lambda found: f"\n(end of turn: {found[0]})\n", text)


def _call(found: re.Match[str]) -> str:
    """A call as `turns_of` shows it; what is no call stays as it was written."""
    try:
        call = json.loads(found[1])
    except ValueError:
        return found[0]
    if not isinstance(call, dict) or "name" not in call:
        return found[0]
    return turns_of([{"role": MODEL, "tool_calls": [call]}])[0][1]
