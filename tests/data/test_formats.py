"""Files of other tools and rows that could lose their meaning: read as their makers meant them, or refused with one line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, IterableDataset

from isdaa.data.formats import standard
from isdaa.data.implied import NoResponseError
from isdaa.data.pairs import Counts, canonical_pair, canonical_prompt, canonical_sft
from isdaa.data.reading.sources import load_pairs, load_prompts, load_sft, pairs_of
from isdaa.errors import UserError

pytestmark = pytest.mark.fast

WHERE = "pairs.jsonl:3"
USER = {"role": "user", "content": "What is 1 plus two?"}
GOOD = {"role": "assistant", "content": "3"}
BAD = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "You are a pirate."}
ASKED = {"from": "human", "value": USER["content"]}
MORE = {"role": "user", "content": "Are you sure?"}
TOOL_RESULT = {"role": "tool", "content": "3"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "required": ["a"]}}}
PLAIN = {"prompt": "Q: one?\nA:", "chosen": " 1", "rejected": " 2"}
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_rows(*rows: Any, name: str = "pairs.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(tmp_path / name)

    return write_rows


def texts(row: dict[str, Any]) -> tuple[Any, Any, Any]:
    pair = canonical_pair(row, WHERE)
    return pair["prompt"], pair["chosen"], pair["rejected"]


def refusal(row: dict[str, Any], reader: Any = canonical_pair) -> str:
    with pytest.raises(UserError) as caught:
        reader(row, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: ") and "\n" not in str(caught.value)
    return str(caught.value)


# --- other tools


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [ASKED], "chosen": {"from": "gpt", "value": "3"}, "rejected": {"from": "gpt", "value": "4"}},
        {"conversations": [ASKED], "chosen": "3", "rejected": "4"},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {"messages": [USER, GOOD], "rejected_response": "4"},
        {"messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
        {"messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD], "prompt": USER["content"]},
        {"instruction": USER["content"], "input": "", "chosen": "3", "rejected": "4"},
        {"instruction": "What is 1", "input": "plus two?", "output": ["3", "4"]},
        {"prompt": USER["content"], "chosen": GOOD, "rejected": BAD},
        {"chosen": [ASKED, {"from": "gpt", "value": "3"}], "rejected": [USER, BAD]},
    ],
)
def test_ranking_formats_of_other_tools(row: dict[str, Any]) -> None:
    prompt, chosen, rejected = texts(row)
    assert [message["content"].replace("\n", " ") for message in prompt] == [USER["content"]]
    assert (chosen, rejected) == ([GOOD], [BAD])


def test_sharegpt_in_full_and_unknown_speakers() -> None:
    talk = [("system", "Be brief."), ("human", "Add."), ("function_call", '{"name": "add", "arguments": {"a": 1}}')]
    talk += [("observation", "3"), ("gpt", "3.")]
    row = {"conversations": [{"from": name, "value": words} for name, words in talk]}
    sft = canonical_sft(row, WHERE)
    assert [message["role"] for message in sft["completion"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert sft["completion"][2]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    row["conversations"][1]["from"] = "narrator"
    assert "'narrator'" in refusal(row, canonical_sft)


@pytest.mark.parametrize("role", ["human", "gpt", "bot", "Human"])
def test_roles_that_no_template_knows_are_refused_with_the_right_word(role: str) -> None:
    row = {"prompt": [USER | {"role": role}], "chosen": [GOOD], "rejected": [BAD]}
    assert f"'{role}'" in refusal(row) and "write '" in refusal(row)
    assert f"'{role}'" in refusal({"messages": [USER, GOOD, USER | {"role": role}, GOOD]}, canonical_sft)


def test_alpaca_rows_of_sft_and_prompts() -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "", "history": [["Hi", "Hello"]]}
    sft = canonical_sft(row, WHERE)
    assert [m["content"] for m in sft["prompt"]] == ["Hi", "Hello", "Add.\n1 and 2"]
    assert sft["completion"] == [GOOD]
    prompt = canonical_prompt({"instruction": "Add.", "chosen": "3", "rejected": "4"}, WHERE)
    assert prompt["prompt"] == [{"role": "user", "content": "Add."}] and prompt["chosen"] == [GOOD]


# --- columns that change what a row means


@pytest.mark.parametrize("system", ["You are a pirate.", [SYSTEM], SYSTEM, ["You are a pirate."]])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": USER["content"], "chosen": "3", "rejected": "4"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
        {"conversations": [{"from": "human", "value": USER["content"]}], "chosen": "3", "rejected": "4"},
        {"instruction": USER["content"], "chosen": "3", "rejected": "4"},
    ],
)
def test_a_system_column_is_the_first_message(row: dict[str, Any], system: Any) -> None:
    assert texts(row | {"system": system}) == ([SYSTEM, USER], [GOOD], [BAD])


def test_two_system_messages_that_differ_are_refused() -> None:
    row = {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD], "system": "Be brief."}
    assert "different system messages" in refusal(row)
    assert "no prompt" in refusal({"chosen": "Q: a", "rejected": "Q: b", "system": "Be brief."})


def test_history_stands_before_the_prompt() -> None:
    row = {"history": [["Hi", "Hello"]], "prompt": USER["content"], "chosen": "3", "rejected": "4"}
    prompt, chosen, _ = texts(row)
    assert [m["content"] for m in prompt] == ["Hi", "Hello", USER["content"]] and chosen == [GOOD]
    row["history"] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert texts(row)[0] == prompt
    assert "'history'" in refusal(row | {"history": ["Hi"]})


@pytest.mark.parametrize("name", ["images", "image", "videos", "audio"])
def test_pictures_are_refused_and_empty_columns_of_them_are_not(name: str) -> None:
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    assert f"'{name}'" in refusal(row | {name: ["a.png"]})
    assert f"'{name}'" in refusal({"messages": [USER, GOOD], name: "a.png"}, canonical_sft)
    for nothing in (None, [], ""):
        assert texts(row | {name: nothing}) == ([USER], [GOOD], [BAD])


def test_tools_and_template_arguments_of_a_row() -> None:
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    for tools in ([TOOL], json.dumps([TOOL])):
        assert canonical_pair(row | {"tools": tools}, WHERE)["tools"] == [TOOL]
    given = {"enable_thinking": False}
    for value in (given, json.dumps(given), str(given)):
        assert canonical_pair(row | {"chat_template_kwargs": value}, WHERE)["chat_template_kwargs"] == given
        assert canonical_prompt({"prompt": [USER], "chat_template_kwargs": value}, WHERE)["chat_template_kwargs"] == given
    assert canonical_pair(row | {"tools": []}, WHERE)["tools"] is None
    assert "'tools'" in refusal(row | {"tools": "add"})
    assert "'tools'" in refusal(row | {"tools": [3]})
    assert "'chat_template_kwargs'" in refusal(row | {"chat_template_kwargs": [1]})
    for reader, text in (
        (canonical_pair, PLAIN),
        (canonical_sft, {"prompt": "a", "completion": "b"}),
        (canonical_sft, {"text": "a"}),
    ):
        assert "plain text" in refusal(text | {"tools": [TOOL]}, reader)
        assert reader(text | {"tools": []}, WHERE)["tools"] is None


def test_other_columns_are_named_once(write: Write) -> None:
    rows = [PLAIN | {"source": "web", "score": n, "output": "x"} for n in range(3)] + [PLAIN | {"topic": 1}]
    counts = load_pairs(write(*rows))[1]
    assert (
        counts.unread == ("source", "score", "output", "topic") and counts.lines()[-1] == "not read: source, score, output, topic"
    )
    assert load_pairs(write(PLAIN | {"weight": 1.0, "id": "a", "chosen_reward": 2}))[1].unread == ()
    assert load_sft(write({"prompt": "a", "completion": "b", "weight": 1}))[1].unread == ("weight",)
    assert load_pairs(write({"instruction": "a", "input": "", "chosen": "b", "rejected": "c"}))[1].unread == ()


# --- the prompt twice


ONE, MANY = USER["content"], [USER["content"], BAD["content"], MORE["content"]]
SPACED = USER | {"content": ONE + " \n"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": [USER], "chosen": [USER | {"turn": 1}, GOOD], "rejected": [USER | {"turn": 1}, BAD]}, [ONE]),
        ({"prompt": [SPACED], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [ONE]),
        ({"prompt": [SYSTEM, USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [SYSTEM["content"], ONE]),
        ({"prompt": [USER], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, [SYSTEM["content"], ONE]),
        ({"prompt": [MORE], "chosen": [USER, BAD, MORE, GOOD], "rejected": [USER, BAD, MORE, BAD]}, MANY),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [BAD]}, [ONE]),
        ({"prompt": [SYSTEM], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [SYSTEM["content"], ONE]),
        ({"prompt": [USER, BAD], "chosen": [MORE, GOOD], "rejected": [MORE, BAD]}, MANY),
    ],
)  # fmt: skip
def test_a_prompt_beside_whole_conversations_stands_once(row: dict[str, Any], prompt: list[str]) -> None:
    found, chosen, rejected = texts(row)
    assert [message["content"].strip() for message in found] == prompt
    assert (chosen, rejected) == ([GOOD], [BAD])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER, BAD, MORE], "chosen": [MORE, GOOD], "rejected": [MORE, BAD]},
        {"prompt": [USER], "chosen": [MORE, GOOD], "rejected": [MORE, BAD]},
        {"prompt": [SYSTEM, USER], "chosen": [SYSTEM | {"content": "Be brief."}, USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_user_turns_that_follow_each_other_are_refused(row: dict[str, Any]) -> None:
    assert "'prompt'" in refusal(row)
    assert "'prompt'" in refusal({"prompt": row["prompt"], "completion": row["chosen"]}, canonical_sft)


def test_texts_that_repeat_the_prompt(write: Write) -> None:
    repeated = {"prompt": "Q: one?\nA:", "chosen": "Q: one?\nA: 1", "rejected": "Q: one?\nA: 2"}
    message = "data.prompt_repeated"
    with pytest.raises(UserError, match=message):
        load_pairs(write(repeated, repeated | {"prompt": "Q: other?"}, repeated))
    pairs, counts = load_pairs(write(repeated, PLAIN))  # half is not more than half
    assert counts.prompt_repeated == 1 and pairs[0]["chosen"] == repeated["chosen"]
    pairs, counts = load_pairs(write(repeated, repeated), repeated="strip")
    assert (pairs[0]["chosen"], pairs[0]["rejected"], counts.prompt_repeated) == (" 1", " 2", 2)
    assert load_pairs(write(repeated), repeated="keep")[0][0]["chosen"] == repeated["chosen"]
    spaced = {"prompt": " Q: one?\nA: ", "chosen": "Q: one?\nA: 1", "rejected": "Q: one?\nA: 2"}
    assert load_pairs(write(spaced), repeated="strip")[0][0]["chosen"] == " 1"
    assert load_prompts(write(repeated))[1].prompt_repeated == 1  # prompts alone are asked: nothing is wrong with them
    with pytest.raises(UserError, match=message):
        load_sft(write({"prompt": "Q:", "completion": "Q: 1"}))
    assert load_sft(write({"prompt": "Q:", "completion": "Q: 1"}), repeated="strip")[0][0]["completion"] == " 1"
    one_side = {"prompt": "Q:", "chosen": "Q: is a letter", "rejected": "no"}
    assert load_pairs(write(one_side))[1].prompt_repeated == 0


# --- shape lost on the way


def test_conversations_that_became_text_are_read_again(tmp_path: Path) -> None:
    chat = {"prompt": [USER], "chosen": [GOOD | {"content": 'It\'s "3"\n.'}], "rejected": [BAD]}
    for write in (str, json.dumps, lambda value: json.dumps(value, indent=1)):
        row = {name: write(value) for name, value in chat.items()}
        assert texts(row) == (chat["prompt"], chat["chosen"], chat["rejected"])
        assert texts({k: row[k] for k in ("chosen", "rejected")} | {"prompt": USER["content"]}) == texts(row)
        assert canonical_sft({"messages": write([USER, GOOD])}, WHERE)["completion"] == [GOOD]
        assert canonical_prompt({"prompt": write([USER])}, WHERE)["prompt"] == [USER]
    with open(tmp_path / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["chosen", "rejected", "tools"])
        writer.writeheader()
        writer.writerow({"chosen": [USER, GOOD], "rejected": [USER, BAD], "tools": json.dumps([TOOL])})
    pairs, _ = load_pairs(str(tmp_path / "pairs.csv"))
    assert pairs[0]["prompt"] == [USER] and pairs[0]["tools"] == [TOOL]


def test_conversations_that_became_text_and_cannot_be_read_are_refused() -> None:
    broken = "[{'content': 'What?', 'role': 'user'}\n {'content': '3', 'role': 'assistant'}]"  # as pandas prints numpy's
    assert "saved as text" in refusal({"chosen": broken, "rejected": broken})
    assert "saved as text" in refusal({"messages": broken}, canonical_sft)
    assert "'rejected' does not" in refusal(PLAIN | {"chosen": str([GOOD])})
    assert texts(PLAIN | {"chosen": "[{a: 1}]"})[1] == "[{a: 1}]"  # an answer that is no conversation


def test_nulls_that_arrow_adds_are_taken_away_at_any_depth(tmp_path: Path) -> None:
    calls = [
        {"function": {"name": name, "arguments": arguments}}
        for name, arguments in (("add", {"a": {"x": 1}}), ("sub", {"b": [2]}))
    ]
    rows = [{"prompt": [USER], "chosen": [CALL | {"tool_calls": [call]}], "rejected": [BAD], "tools": [TOOL]} for call in calls]
    rows[1]["tools"] = [{"type": "function", "function": {"name": "sub", "strict": True}}]
    Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    pairs, _ = load_pairs(str(tmp_path / "pairs.parquet"))
    for pair, call, row in zip(pairs, calls, rows, strict=True):
        assert pair["chosen"][0]["tool_calls"] == [call] and pair["tools"] == row["tools"]


@pytest.mark.parametrize(
    "row",
    [
        PLAIN | {"chosen": "cut \ud83d"},
        {"prompt": [USER | {"content": "\udc00"}], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": [{"function": {"name": "\ud800"}}]},
        PLAIN | {"id": "\ud800"},
    ],
)
def test_half_a_character_is_one_line(row: dict[str, Any]) -> None:
    assert "lone surrogate" in refusal(row)
    assert texts(PLAIN | {"chosen": "whole 😀 \x00 \u2028"})[1] == "whole 😀 \x00 \u2028"


def containers(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def generator() -> Iterator[dict[str, Any]]:
        yield from rows

    return {
        "list": rows,
        "dataset": Dataset.from_list(rows),
        "iterable": IterableDataset.from_generator(generator),
        "frame": pd.DataFrame(rows),
        "generator": generator(),
    }


@pytest.mark.parametrize("kind", ["list", "dataset", "iterable", "frame", "generator"])
def test_every_container_in_memory_is_read_alike(kind: str) -> None:
    rows = [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "system": text, "topic": "sums"} for text in ("Be brief.", None)
    ]
    pairs, counts = pairs_of(containers(rows)[kind], "train_dataset")
    assert [len(row["prompt"]) for row in pairs] == [2, 1] and counts.unread == ("topic",)
    with pytest.raises(UserError, match="train_dataset:1: column 'images'"):
        pairs_of(containers([rows[0] | {"images": ["a.png"]}])[kind], "train_dataset")


def test_frames_with_numpy_cells_nulls_and_columns_given_twice() -> None:
    frame = pd.DataFrame({"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"], "weight": [0.5, np.nan]})
    assert [row["weight"] for row in pairs_of(frame, "rows")[0]] == [0.5, None]
    frame = pd.DataFrame({"chosen": [np.array([USER, GOOD])], "rejected": [np.array([USER, BAD])], "tools": [np.nan]})
    assert pairs_of(frame, "rows")[0][0]["prompt"] == [USER]
    twice = pd.DataFrame([["a", "b", "c", "d"]], columns=["prompt", "chosen", "rejected", "prompt"])
    with pytest.raises(UserError, match="'prompt' stands twice"):
        pairs_of(twice, "rows")
    with pytest.raises(UserError, match="rows:1: a row must be a mapping"):
        pairs_of(["a"], "rows")


# --- rows that TRL takes, and empty ones


def test_an_empty_prompt_is_taken_and_counted() -> None:
    counts = Counts()
    assert canonical_pair(PLAIN | {"prompt": ""}, WHERE, counts=counts)["prompt"] == "" and counts.empty_prompts == 1
    assert "is null" in refusal(PLAIN | {"prompt": None})


def test_a_prompt_that_begins_the_answer_is_marked() -> None:
    prefill = {"role": "assistant", "content": "Sure:"}
    prompt, chosen, _ = texts({"prompt": [USER, prefill], "chosen": [GOOD], "rejected": [BAD]})
    assert prompt == [USER, prefill | {"prefix": True}] and chosen == [GOOD]
    assert canonical_prompt({"prompt": [USER, prefill | {"prefix": True}]}, WHERE)["prompt"][-1]["prefix"] is True
    # Two answers in a row of one conversation are two messages.
    whole = texts({"chosen": [USER, prefill, GOOD], "rejected": [USER, prefill, BAD]})
    assert whole[0] == [USER, prefill | {"prefix": False}]
    assert texts({"prompt": whole[0], "chosen": [GOOD], "rejected": [BAD]}) == whole


@pytest.mark.parametrize("nothing", ["", " \n", None, [], [{"role": "assistant", "content": ""}], [{"role": "assistant"}]])
def test_empty_responses_up_to_one_in_a_hundred_are_dropped_and_counted(nothing: Any, write: Write) -> None:
    rows = [{"prompt": [USER | {"content": str(n)}], "chosen": [GOOD], "rejected": [BAD]} for n in range(100)]
    empty = rows[7] | {"rejected": nothing}
    pairs, counts = load_pairs(write(*rows[:7], empty, *rows[8:]))
    assert (len(pairs), counts.dropped_no_response) == (99, 1)
    with pytest.raises(UserError, match=r"pairs.jsonl:2: column 'chosen' .* \(2 of 100 rows"):
        load_pairs(write(rows[0], rows[1] | {"chosen": nothing}, empty, *rows[3:]))
    with pytest.raises(NoResponseError):
        canonical_sft({"prompt": "a", "completion": nothing}, WHERE)


def test_a_tool_call_is_no_empty_response() -> None:
    assert texts({"prompt": [USER], "chosen": [CALL | {"content": None}], "rejected": [BAD]})[1] == [CALL]


def test_an_id_that_stands_for_two_prompts_is_refused(write: Write) -> None:
    with pytest.raises(UserError, match=r"pairs.jsonl:2: id 'x' stands for another prompt at .*pairs.jsonl:1"):
        load_pairs(write(PLAIN | {"id": "x"}, PLAIN | {"id": "x", "prompt": "Q: two?"}))
    with pytest.raises(UserError, match="id '1'"):
        load_prompts(write({"prompt": "a", "id": 1}, {"prompt": "b", "id": "1"}))
    tools = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "id": "x"}
    with pytest.raises(UserError, match="id 'x'"):
        load_pairs(write(tools, tools | {"tools": [TOOL]}))
    assert load_pairs(write(PLAIN | {"id": "x"}, PLAIN | {"id": "x", "rejected": " 3"}))[1].kept == 2


def test_raw_dialogues_are_recognised(write: Write) -> None:
    talk = "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: What is 1 plus two?\n\nAssistant:"
    path = write({"chosen": f"{talk} It is 3.", "rejected": f"{talk} It is 4."})
    assert load_pairs(path)[0][0]["prompt"] == talk and load_pairs(path)[0][0]["chosen"] == " It is 3."
    assert load_prompts(path)[0][0]["prompt"] == talk
    counts = Counts()
    with pytest.raises(NoResponseError):
        canonical_pair({"chosen": f"{talk} It is 3.", "rejected": talk}, WHERE, counts=counts)


def test_standard_leaves_other_columns_as_they_are() -> None:
    row = {"facts": {"a": None}, "prompt_ids": [1, 2], "weight": float("nan"), "prompt": "a"}
    assert standard(row, WHERE) == row


# --- what a reader with fresh eyes tried


@pytest.mark.parametrize(
    "text",
    [
        '{"value": 42}',
        '{"content": "Hi"}',
        '[{"role": "CEO", "name": "Ann"}]',
        '{"from": "Berlin", "to": "Paris"}',
        "{'role': 'user'} what does this dict mean?",
        '{"role": "admin"}\nThis grants admin.',
        " " * 50_000 + "x",
    ],
)
def test_answers_that_are_json_stay_text(text: str) -> None:
    assert texts(PLAIN | {"chosen": text, "rejected": text.replace("4", "5") + " "})[1] == text
    assert texts(PLAIN | {"prompt": text})[0] == text
    assert canonical_sft({"prompt": "a", "completion": text}, WHERE)["completion"] == text


def test_told_conversations_whatever_stands_first_and_in_whatever_column() -> None:
    named = [{"name": None, "weight": 1} | message for message in (USER, GOOD)]
    for told in (str(named), json.dumps(named), str(tuple(named)), json.dumps(json.dumps(named))):
        found = texts({"chosen": told, "rejected": told.replace("'content': '3'", "'content': '4'")})
        assert [message["content"] for message in found[0]] == [ONE]
    assert canonical_sft({"query": str([USER]), "response": str([GOOD])}, WHERE)["completion"] == [GOOD]
    assert texts({"messages": str([USER, GOOD]), "rejected_messages": str([USER, BAD])}) == ([USER], [GOOD], [BAD])
    twice = '[{"role": "user", "content": "a", "content": "b"}]'
    assert "given twice" in refusal({"prompt": twice, "chosen": [GOOD], "rejected": [BAD]})
    half = '[{"role": "user", "content": "\\ud800"}]'
    assert "lone surrogate" in refusal({"prompt": half, "chosen": [GOOD], "rejected": [BAD]})


@pytest.mark.parametrize("sort", ["image", "image_url", "input_audio", "thinking", "file"])
def test_parts_of_messages_that_are_no_text_are_refused(sort: str) -> None:
    parts = [{"type": sort, "text": ""}, {"type": "text", "text": "what?"}]
    assert f"type '{sort}'" in refusal({"prompt": [USER | {"content": parts}], "chosen": [GOOD], "rejected": [BAD]})
    assert texts({"prompt": [USER | {"content": ["wh", "at?"]}], "chosen": [GOOD], "rejected": [BAD]})[0][0]["content"] == "what?"


def test_empty_answers_of_conversations_are_dropped() -> None:
    for turns in ([USER, GOOD | {"content": ""}], [USER, GOOD | {"content": " "}, MORE, GOOD]):
        with pytest.raises(NoResponseError):
            canonical_sft({"messages": turns}, WHERE)


@pytest.mark.parametrize(
    ("row", "reader"),
    [
        ({"chosen": [USER, SPACED, GOOD], "rejected": [USER, SPACED, BAD]}, canonical_pair),
        ({"messages": [USER, USER, GOOD]}, canonical_sft),
        ({"prompt": [USER, SPACED]}, canonical_prompt),
        ({"prompt": ONE, "chosen": [USER, USER, GOOD], "rejected": [USER, USER, BAD]}, canonical_pair),
    ],
)
def test_a_user_message_that_stands_twice_is_refused_everywhere(row: dict[str, Any], reader: Any) -> None:
    assert "stands twice" in refusal(row, reader)


def test_repeated_prompts_of_rows_that_became_conversations(write: Write) -> None:
    row = {"system": "Be kind.", "prompt": "Why is it?", "chosen": "Why is it? Because.", "rejected": "Why is it? No."}
    alpaca = {"instruction": "Why is it?", "chosen": "Why is it? Because.", "rejected": "Why is it? No."}
    for one in (row, alpaca):
        with pytest.raises(UserError, match="prompt_repeated"):
            load_pairs(write(one))
        pairs, counts = load_pairs(write(one), repeated="strip")
        assert pairs[0]["chosen"] == [{"role": "assistant", "content": "Because."}] and counts.prompt_repeated == 1
    words = {"prompt": "Hi", "chosen": "History is long", "rejected": "Hi there"}
    assert load_pairs(write(words), repeated="strip")[0][0]["chosen"] == "History is long"


def test_a_prompt_that_holds_the_answer_is_refused_and_prefills_are_counted() -> None:
    assert "ends with one of the responses" in refusal({"prompt": [USER, GOOD], "chosen": "3", "rejected": "4"})
    counts = Counts()
    canonical_pair({"prompt": [USER, GOOD | {"content": "It"}], "chosen": "3", "rejected": "4"}, WHERE, counts=counts)
    assert counts.prefilled == 1


def test_empty_columns_of_system_and_history_change_nothing_alone(write: Write) -> None:
    for value in ("", None, []):
        assert texts(PLAIN | {"system": value, "history": value})[0] == PLAIN["prompt"]
    pairs, counts = load_pairs(
        write(PLAIN | {"system": ""}, PLAIN | {"system": "Be kind.", "prompt": "b"}, PLAIN | {"prompt": "c"})
    )
    assert [len(row["prompt"]) for row in pairs] == [1, 2, 1] and counts.spoken == 3  # one file, one kind of rows
    for history in (3, "three"):
        assert "'history'" in refusal(PLAIN | {"history": history})
    assert len(texts(PLAIN | {"history": '[["a", "b"]]'})[0]) == 3
    assert "'system'" in refusal(PLAIN | {"system": 3})


def test_older_and_thinking_answers_are_no_empty_ones() -> None:
    older = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}}
    assert texts({"prompt": [USER], "chosen": [older], "rejected": [BAD]})[1][0]["tool_calls"][0]["function"]["arguments"] == {
        "a": 1
    }
    thought = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    assert texts({"prompt": [USER], "chosen": [thought], "rejected": [BAD]})[1] == [thought]
    twice = CALL | {"tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1, "a": 2}'}}]}
    assert "given twice" in refusal({"prompt": [USER], "chosen": [twice], "rejected": [BAD]})


def test_columns_that_compete_are_named(write: Write) -> None:
    both = {"prompt": "a", "completion": "b", "response": "c", "text": "d"}
    assert load_sft(write(both))[1].unread == ("response", "text")
    assert load_sft(write({"messages": [USER, GOOD], "prompt": "a"}))[1].unread == ("prompt",)
    assert load_pairs(write(PLAIN | {"query": "b", "messages": [USER]}))[1].unread == ("query", "messages")


def test_odd_values_are_one_line_or_text(write: Write) -> None:
    import datetime

    dated = USER | {"timestamp": datetime.datetime(2024, 1, 2)}
    assert texts({"prompt": [dated], "chosen": [GOOD], "rejected": [BAD]})[0][0]["timestamp"] == "2024-01-02 00:00:00"
    assert "bytes" in refusal({"prompt": [USER | {"raw": b"x"}], "chosen": [GOOD], "rejected": [BAD]})
    deep: Any = "x"
    for _ in range(3000):
        deep = [deep]
    assert "too deep" in refusal({"prompt": [USER | {"deep": deep}], "chosen": [GOOD], "rejected": [BAD]})
    assert "'weight'" in refusal(PLAIN | {"weight": "9" * 400}) and "1e+06" in refusal(PLAIN | {"weight": 1e7})
    assert canonical_pair(PLAIN | {"chosen_finished": 1.0, "images": "[]", "videos": [None]}, WHERE)["chosen_finished"] is True
    odd = load_pairs(write(PLAIN | {"x\ny": 1, "": 2, "long" * 40: 3}))[1].lines()[-1]
    assert "\n" not in odd and "''" in odd and len(odd) < 200
    ids = {"prompt_ids": np.array([1]), "chosen_ids": np.array([2]), "rejected_ids": np.array([3])}
    assert canonical_pair(ids, WHERE)["chosen_ids"] == [2]
    frame = pd.DataFrame([PLAIN | {"id": np.nan}, PLAIN | {"id": np.nan, "prompt": "b"}])
    assert len(pairs_of(frame, "rows")[0]) == 2


def test_prompts_that_are_implied_need_no_equal_ids(write: Write) -> None:
    same = {"id": "p1", "chosen": "Q: why A: The cat", "rejected": "Q: why A: The dog"}
    assert load_pairs(write(same, same | {"rejected": "Q: why A: No"}))[1].kept == 2
    assert texts({"prompt": "", "chosen": [USER, GOOD], "rejected": [USER, BAD]}) == ([USER], [GOOD], [BAD])
    assert texts({"prompt": [USER], "chosen": [CALL, TOOL_RESULT], "rejected": [BAD]})[1] == [CALL]


@pytest.mark.parametrize(
    "talk",
    ["\r\n\r\nHuman: Hi?\r\n\r\nAssistant:", "<s>\n\nHuman: Hi?\n\nAssistant:", "System: kind\n\nHuman: Hi?\n\nAssistant:"],
)
def test_dialogues_of_other_makes(talk: str, write: Write) -> None:
    row = {"chosen": f"{talk} the cat", "rejected": f"{talk} the car"}
    assert load_pairs(write(row))[0][0]["chosen"] == " the cat"
    assert load_sft(write(row))[0][0]["completion"] == " the cat"
    assert load_prompts(write({"instruction": "q", "input": "i"}))[0][0]["prompt"] == [{"role": "user", "content": "q\ni"}]
