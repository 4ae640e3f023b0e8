"""Conversations as people read them: roles and words, tools, tool calls and thinking; never a Python list."""

import pytest

from isdaa.data.conversation import conversation_text, turns_of

pytestmark = pytest.mark.fast

TOOL = {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}


def test_a_text_is_one_turn_without_a_role():
    assert turns_of("Name a colour.") == [("", "Name a colour.")] and conversation_text("a\nb") == "a\nb"


def test_a_conversation_of_several_turns_with_a_system_prompt():
    asked = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "2 + 2?"},
    ]
    assert turns_of(asked) == [("system", "Be short."), ("user", "Hi"), ("assistant", "Hello"), ("user", "2 + 2?")]
    assert conversation_text(asked) == "system: Be short.\n\nuser: Hi\n\nassistant: Hello\n\nuser: 2 + 2?"


@pytest.mark.parametrize("call", [CALL, CALL["function"], {"name": "weather", "arguments": '{"city": "Köln"}'}])
def test_tools_and_calls_are_named_with_their_arguments(call):
    asked = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "weather", "content": [{"type": "text", "text": "dry"}]},
    ]
    first, *turns = turns_of(asked, [TOOL])
    assert first == ("tools", 'weather: Of a city {"type": "object"}')
    assert turns == [("user", "Rain?"), ("assistant", 'call weather({"city": "Köln"})'), ("tool weather", "dry")]


def test_nothing_is_left_out():
    assert turns_of([{"role": "assistant", "reasoning_content": "hm", "content": "4"}]) == [
        ("assistant", "(reasoning_content) hm\n4")
    ]
    assert turns_of([{"role": "user", "content": [{"type": "image"}]}]) == [("user", '{"type": "image"}')]
    assert turns_of([{"role": "assistant", "content": "", "tool_calls": "odd"}]) == [("assistant", 'call "odd"')]
    assert turns_of([{"role": "user", "content": ""}]) == [("user", "")]
    assert turns_of([{"role": "user", "name": "Ann", "content": "Hi", "weight": 1}]) == [("user", "(name) Ann\n(weight) 1\nHi")]
    strict = {"function": TOOL["function"] | {"strict": True}}
    assert turns_of("Hi", [strict])[0] == ("tools", 'weather: Of a city {"type": "object"} {"strict": true}')
