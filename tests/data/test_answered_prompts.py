"""Prompts for evaluation that hold more than a question: whole conversations, answers, other speakers at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isdaa.data.pairs import Counts, canonical_pair, canonical_prompt
from isdaa.data.reading.sources import load_prompts
from isdaa.errors import UserError

WHERE = "data.jsonl:4"
SYSTEM = {"role": "system", "content": "Be brief."}
ASK, AGAIN = {"role": "user", "content": "What is 3+4?"}, {"role": "user", "content": "And 2+2?"}
SEVEN, FOUR = {"role": "assistant", "content": "It is 7."}, {"role": "assistant", "content": "It is 4."}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
TOOL = {"role": "tool", "content": "7"}


def read(**row: Any) -> tuple[Any, Any, Counts]:
    counts = Counts()
    found = canonical_prompt(row, WHERE, counts=counts)
    return found["prompt"], found["chosen"], counts


@pytest.mark.parametrize("turns", [[ASK], [SYSTEM, ASK], [ASK, SEVEN, AGAIN], [ASK, CALL, TOOL]])
def test_the_last_answer_of_a_whole_conversation_is_no_part_of_the_prompt(turns: list[Any]) -> None:
    prompt, chosen, counts = read(prompt=[*turns, FOUR])
    assert (prompt, chosen) == (turns, [FOUR]) and counts.answered == 1 and counts.prefilled == 0
    assert read(messages=[*turns, FOUR])[:2] == (turns, [FOUR])
    assert read(prompt=turns, chosen=[*turns, FOUR])[:2] == (turns, [FOUR])
    assert read(prompt=[*turns, FOUR], chosen="It is 4.")[:2] == (turns, [FOUR])
    assert read(prompt=[*turns, FOUR], chosen=[*turns, FOUR])[:2] == (turns, [FOUR])
    assert read(prompt=turns)[:2] == (turns, None)


def test_a_message_that_says_so_is_gone_on_from() -> None:
    begun = {"role": "assistant", "content": "It", "prefix": True}
    for name in ("prompt", "messages"):
        prompt, chosen, counts = read(**{name: [ASK, begun]})
        assert (prompt, chosen, counts.prefilled, counts.answered) == ([ASK, begun], None, 1, 0)
    counts = Counts()
    row = {"prompt": [ASK, {"role": "assistant", "content": "It"}], "chosen": " is 7.", "rejected": " is 8."}
    assert canonical_pair(row, WHERE, counts=counts)["prompt"][-1]["prefix"] is True and counts.prefilled == 1
    assert canonical_prompt(row, WHERE)["prompt"][-1]["prefix"] is True  # as the run that trained on it


def test_a_dialogue_as_text_is_divided_too() -> None:
    asked = "\n\nHuman: What is 3+4?\n\nAssistant:"
    prompt, chosen, counts = read(prompt=asked + " It is 7.")
    assert (prompt, chosen, counts.answered) == (asked, " It is 7.", 1)
    assert read(prompt=asked)[:2] == (asked, None) and read(prompt="What is 3+4?")[:2] == ("What is 3+4?", None)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": [ASK, SYSTEM]}, "column 'prompt' ends with a message of role 'system'"),
        ({"messages": [ASK, SYSTEM]}, "column 'messages' ends with a message of role 'system'"),
        ({"prompt": [ASK, {**SYSTEM, "role": "developer"}]}, "ends with a message of role 'developer'"),
        ({"prompt": [SYSTEM]}, "column 'prompt' ends with a message of role 'system'"),
        ({"prompt": [ASK, SYSTEM], "chosen": [SEVEN], "rejected": [FOUR]}, "ends with a message of role 'system'"),
        ({"prompt": [SYSTEM, SEVEN]}, "column 'prompt' ends with a message of role 'system'"),
        ({"prompt": [CALL, TOOL]}, "column 'prompt' has no message of role 'user'"),
        ({"prompt": [SEVEN]}, "column 'prompt' has no turn before the assistant's"),
        ({"prompt": [ASK, SEVEN, FOUR]}, "column 'prompt' ends with two turns of the assistant in a row"),
        ({"prompt": [ASK], "chosen": [AGAIN, FOUR]}, "'prompt' ends with a user message and a response begins with another one"),
        ({"prompt": [ASK, SEVEN], "chosen": [ASK, FOUR]}, "stands once more in a response"),
        ({"prompt": [ASK], "chosen": [ASK]}, "column 'chosen' holds no answer of the assistant"),
    ],
)
def test_what_asks_nothing_or_does_not_fit_is_refused_by_its_row(row: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        canonical_prompt(row, WHERE)
    assert str(error.value).startswith(f"{WHERE}: ") and said in str(error.value)


def test_it_is_said_how_many_are_so(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ([ASK, SEVEN], [AGAIN, FOUR], [SYSTEM, ASK])))
    prompts, counts = load_prompts(str(file))
    assert [row["chosen"] for row in prompts] == [[SEVEN], [FOUR], None]
    assert "2 prompts are whole conversations: the model answers again, and their last answer is for comparison" in counts.lines()
