"""Every format of a pair, and every refusal: one line that names file and row, the column, and how to mend it."""

from typing import Any

import pytest

from isdaa.data.pairs import (
    Counts,
    NoCommonPromptError,
    canonical_pair,
    canonical_prompt,
    canonical_sft,
    same_response,
)
from isdaa.errors import UserError

pytestmark = pytest.mark.fast

USER = {"role": "user", "content": "What is the capital of France?"}
SYSTEM = {"role": "system", "content": "Answer in one sentence."}
GOOD = {"role": "assistant", "content": "Paris."}
BAD = {"role": "assistant", "content": "Lyon."}
MORE = {"role": "user", "content": "Are you sure?"}
PLAIN = {"prompt": "What is the capital of France?", "chosen": " Paris.", "rejected": " Lyon."}
WHERE = "pairs.jsonl:17"


def pair(**row: Any) -> dict[str, Any]:
    return canonical_pair(row, WHERE)


def texts(row: dict[str, Any]) -> tuple[Any, Any, Any]:
    return row["prompt"], row["chosen"], row["rejected"]


def refusal(row: dict[str, Any], reader: Any = canonical_pair) -> str:
    with pytest.raises(UserError) as caught:
        reader(row, WHERE)
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: ")
    assert "\n" not in message
    return message


def test_standard_format() -> None:
    row = pair(**PLAIN)
    assert texts(row) == (PLAIN["prompt"], " Paris.", " Lyon.")
    assert row["id"] == "pairs.jsonl:17"
    assert row["where"] == WHERE
    assert row["chosen_finished"] is row["rejected_finished"] is True
    for name in ("behaviour_chosen_logps", "weight", "prompt_ids", "chosen_reward", "facts"):
        assert row[name] is None


def test_query_stands_for_prompt_and_the_own_id_is_kept() -> None:
    row = pair(query="Why?", chosen="So.", rejected="No.", id=5)
    assert texts(row) == ("Why?", "So.", "No.")
    assert row["id"] == "5"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD]},  # UltraFeedback
        {"prompt": USER["content"], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "Paris.", "rejected": "Lyon."},
        {"prompt": None, "chosen": [USER | {"tool_calls": None}, GOOD], "rejected": [USER, BAD]},  # as Parquet fills in
        {"chosen": [USER | {"content": [{"type": "text", "text": USER["content"]}]}, GOOD], "rejected": [USER, BAD]},
    ],
    ids=["explicit", "implicit", "repeated", "ultrafeedback", "text_prompt", "text_answers", "null_keys", "parts"],
)
def test_conversational_formats_mean_the_same(row: dict[str, Any]) -> None:
    assert texts(pair(**row)) == ([USER], [GOOD], [BAD])


def test_multi_turn_and_system_prompts_score_the_last_turn() -> None:
    history = [SYSTEM, USER, BAD, MORE]
    assert texts(pair(chosen=[*history, GOOD], rejected=[*history, BAD])) == (history, [GOOD], [BAD])
    assert texts(pair(prompt=history, chosen=[GOOD], rejected=[BAD])) == (history, [GOOD], [BAD])
    # An explicit prompt whose responses hold several turns: all but the last are prompt.
    assert texts(pair(prompt=[USER], chosen=[BAD, MORE, GOOD], rejected=[BAD, MORE, BAD])) == (
        history[1:],
        [GOOD],
        [BAD],
    )


def test_conversations_that_part_early_have_responses_of_several_messages() -> None:
    row = pair(chosen=[USER, GOOD, MORE, GOOD], rejected=[USER, BAD, MORE, BAD])
    assert texts(row) == ([USER], [GOOD, MORE, GOOD], [BAD, MORE, BAD])
    assert texts(pair(chosen=[USER, GOOD, MORE, GOOD], rejected=[USER, BAD])) == ([USER], [GOOD, MORE, GOOD], [BAD])
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {"at": "map"}}}]}
    tool = {"role": "tool", "content": "a river"}
    row = pair(prompt=[USER], chosen=[call, tool, GOOD], rejected=[BAD])
    assert texts(row) == ([USER], [call, tool, GOOD], [BAD])
    # What both say first is no choice between them: it is prompt.
    assert texts(pair(prompt=[USER], chosen=[call, tool, GOOD], rejected=[call, tool, BAD])) == (
        [USER, call, tool],
        [GOOD],
        [BAD],
    )
    assert texts(pair(prompt=[USER], chosen=[call], rejected=[BAD])) == ([USER], [call], [BAD])
    with pytest.raises(NoCommonPromptError):
        pair(chosen=[USER, GOOD], rejected=[MORE, BAD])


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("The sky is", " blue.", " green."),
        ("The sky is", " blue.", " black."),
        ("\n\nHuman: Hi?\n\nAssistant:", " Yes.", " No."),
        ("\n\nHuman: Hi?\n\nAssistant:", " Yes, I do.", " Yes, I did."),  # the words that both answers begin with are theirs
        ("It is", " so", " so."),
        ("Is", " it so.", " it"),
        ("We", " don't know", " do, too"),
        ("It costs", " 3.14 in all", " 3.15 in all"),
        ("Das ist", " schön", " schön-gut"),
        ("这是", "好的", "坏的"),
        ("สวัสดี", "ครับ", "ค่ะ"),
        ("Look: ", "👩🏽", "👩🏻"),
        ("Flag ", "🇩🇪", "🇩🇰"),
        ("e ", "e\u0301t", "e\u0300t"),
    ],
)
def test_an_implied_prompt_of_texts_cuts_no_word(prompt: str, chosen: str, rejected: str) -> None:
    from trl import extract_prompt

    both = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    assert extract_prompt(both)["prompt"].startswith(prompt.rstrip())  # TRL's is as long or longer
    found = texts(pair(**both))
    assert "".join(found[:2]) == both["chosen"] and found[0].rstrip() == prompt.rstrip()
    assert found[1].strip() == chosen.strip() and found[2].strip() == rejected.strip()
    row = canonical_prompt(both, WHERE)
    assert (row["prompt"], row["chosen"]) == found[:2]


def test_texts_with_no_common_start_are_dropped_and_a_misnamed_prompt_is_not_implied() -> None:
    for chosen, rejected in (("Yes.", "No."), (" a", " b"), ("y", "y")):
        with pytest.raises(NoCommonPromptError):
            pair(chosen=chosen, rejected=rejected)
    for name in ("promt", "question", "context"):
        with pytest.raises(UserError, match="'prompt' is missing") as caught:
            pair(chosen="The sea.", rejected="The sun.", **{name: "Where?"})
        assert not isinstance(caught.value, NoCommonPromptError)


def test_equal_responses() -> None:
    assert same_response(pair(**PLAIN | {"rejected": " Paris."}))
    assert not same_response(pair(**PLAIN))
    assert same_response(pair(chosen=[USER, GOOD], rejected=[USER, GOOD]))
    assert not same_response(pair(**PLAIN | {"rejected": " Paris.", "rejected_finished": False}))
    ids = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [2, 3]}
    assert same_response(pair(**PLAIN | ids))  # ids win over the text, which differs
    assert not same_response(pair(**PLAIN | ids | {"rejected": " Paris.", "rejected_ids": [2]}))


@pytest.mark.parametrize(
    "names",
    [
        ("behaviour_chosen_logps", "behaviour_rejected_logps"),
        ("chosen_logps", "rejected_logps"),
        ("behavior_chosen_logps", "behavior_rejected_logps"),
    ],
)
def test_behaviour_logps_under_their_names(names: tuple[str, str]) -> None:
    row = pair(**PLAIN, **{names[0]: -3.5, names[1]: -4})
    assert (row["behaviour_chosen_logps"], row["behaviour_rejected_logps"]) == (-3.5, -4.0)
    assert pair(**PLAIN, **{names[0]: None, names[1]: None})["behaviour_chosen_logps"] is None
    message = refusal(PLAIN | {names[0]: -3.5})
    assert names[1] in message and "neither" in message
    message = refusal(PLAIN | {names[0]: None, names[1]: -3.5})
    assert f"'{names[0]}' has no value" in message
    for broken in (float("nan"), float("-inf")):
        assert names[0] in refusal(PLAIN | {names[0]: broken, names[1]: -1.0})
    assert "never above 0" in refusal(PLAIN | {names[0]: 3.5, names[1]: -1.0})


def test_our_own_behaviour_columns_win_over_the_authors_names() -> None:
    own = {
        "behaviour_chosen_logps": -1.0,
        "behaviour_rejected_logps": -2.0,
        "chosen_logps": -8.0,
        "rejected_logps": -9.0,
    }
    assert pair(**PLAIN, **own)["behaviour_chosen_logps"] == -1.0


def test_weights_rewards_and_facts() -> None:
    row = pair(**PLAIN, weight=0, chosen_reward=1, rejected_reward="-2.5", facts='{"size": "small"}')
    assert (row["weight"], row["chosen_reward"], row["rejected_reward"]) == (0.0, 1.0, -2.5)
    assert row["facts"] == {"size": "small"}
    assert pair(**PLAIN, weight="")["weight"] is None  # an empty cell


@pytest.mark.parametrize("weight", ["heavy", -1, float("nan"), float("inf"), True, [1.0]])
def test_a_weight_that_is_none(weight: Any) -> None:
    assert "'weight'" in refusal(PLAIN | {"weight": weight})


def test_token_ids_need_no_text_and_come_together() -> None:
    ids = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": "[4, 5]"}
    row = pair(**ids, chosen_finished=False, rejected_finished="true")
    assert row["rejected_ids"] == [4, 5]
    assert (row["chosen_finished"], row["rejected_finished"]) == (False, True)
    assert texts(row) == ("", "", "")
    assert pair(**ids, prompt="p", chosen="", rejected=None)["prompt"] == "p"
    message = refusal({"prompt_ids": [1], "chosen_ids": [3]})
    assert "'rejected_ids'" in message
    for broken in ([], [-1], [1.5], "seven", [True], 3):
        assert "'chosen_ids'" in refusal(ids | {"chosen_ids": broken})
    assert "'chosen_finished'" in refusal(ids | {"chosen_finished": "perhaps"})


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"prompt": "p", "chosen": "c"}, ["'rejected' is missing", "'prompt', 'chosen'"]),
        ({"prompt": "p", "choosen": "c", "rejected": "r"}, ["'chosen' is missing", 'did you mean "choosen"?']),
        ({"chosen": "c", "rejected": "r"}, ["'prompt' is missing"]),
        (PLAIN | {"chosen": ""}, ["'chosen' is empty"]),
        (PLAIN | {"chosen": " \n"}, ["'chosen' is empty"]),
        (PLAIN | {"rejected": None}, ["'rejected' is null"]),
        (PLAIN | {"prompt": 7}, ["'prompt'", "not int"]),
        (PLAIN | {"chosen": []}, ["'chosen' is empty"]),
        ({"chosen": [GOOD], "rejected": [BAD]}, ["'chosen'", "no message before"]),
        ({"chosen": [USER], "rejected": [USER, BAD]}, ["'chosen'", "end with an assistant message", "'user'"]),
        (
            {"chosen": [USER, {"role": "assistant"}], "rejected": [USER, BAD]},
            ["'chosen' has an empty last message"],
        ),
        ({"chosen": [USER, GOOD | {"content": " "}], "rejected": [USER, BAD]}, ["'chosen' has an empty last message"]),
        ({"chosen": [{"from": "cat", "value": "x"}], "rejected": [USER, BAD]}, ["'chosen'", "'cat'", "human, "]),
        (
            {"chosen": [USER | {"content": [{"type": "image"}]}, GOOD], "rejected": [USER, BAD]},
            ["message 0", "type 'image' is not read"],
        ),
        ({"prompt": "another", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, ["'prompt' is none of the messages"]),
        (PLAIN | {"facts": "no json"}, ["'facts' is not valid JSON"]),
        (PLAIN | {"facts": [1]}, ["'facts' must be an object"]),
    ],
)
def test_refusals_name_row_and_column(row: dict[str, Any], parts: list[str]) -> None:
    message = refusal(row)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("row", "prompt", "chosen"),
    [
        ({"prompt": "Why?"}, "Why?", None),
        ({"query": "Why?", "reference_response": "So."}, "Why?", "So."),
        ({"prompt": "Why?", "completion": " "}, "Why?", None),
        ({"prompt": [USER]}, [USER], None),
        ({"messages": [SYSTEM, USER, GOOD]}, [SYSTEM, USER], [GOOD]),
        ({"messages": [USER]}, [USER], None),
        (PLAIN, PLAIN["prompt"], " Paris."),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], [GOOD]),
    ],
)
def test_prompts_from_any_kind_of_row(row: dict[str, Any], prompt: Any, chosen: Any) -> None:
    result = canonical_prompt(row, WHERE)
    assert (result["prompt"], result["chosen"]) == (prompt, chosen)


def test_prompts_with_ids_and_refusals() -> None:
    assert canonical_prompt({"prompt_ids": [1, 2]}, WHERE)["prompt_ids"] == [1, 2]
    assert "'prompt' is missing" in refusal({"text": "Why?"}, canonical_prompt)
    assert "'prompt' is null" in refusal({"prompt": None}, canonical_prompt)
    assert "'messages'" in refusal({"messages": [GOOD]}, canonical_prompt)


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "Why?", "completion": "So."}, "Why?", "So."),
        ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, "Why?", "So."),
        ({"prompt": [USER], "completion": [GOOD]}, [USER], [GOOD]),
        ({"prompt": [USER], "completion": "Paris."}, [USER], [GOOD]),
        ({"prompt": [USER], "completion": [USER, GOOD]}, [USER], [GOOD]),
        ({"messages": [SYSTEM, USER, GOOD]}, [SYSTEM, USER], [GOOD]),
        ({"messages": [USER, BAD, MORE, GOOD]}, None, [USER, BAD, MORE, GOOD]),
        ({"text": "Once upon a time"}, None, "Once upon a time"),
    ],
)
def test_sft_rows(row: dict[str, Any], prompt: Any, completion: Any) -> None:
    result = canonical_sft(row, WHERE)
    assert (result["prompt"], result["completion"]) == (prompt, completion)


def test_sft_refusals() -> None:
    assert "'completion' is missing" in refusal({"prompt": "Why?"}, canonical_sft)
    assert "'text' is empty" in refusal({"text": " "}, canonical_sft)
    assert "assistant" in refusal({"messages": [USER, MORE]}, canonical_sft)
    assert "assistant" in refusal({"messages": [GOOD]}, canonical_sft)


def test_counts_add_up_over_two_steps() -> None:
    total = Counts(rows=10, kept=8, dropped_equal=2) + Counts(rows=8, kept=7, dropped_equal=1, chosen_cut=3)
    assert total == Counts(rows=10, kept=7, dropped_equal=3, chosen_cut=3)
    assert total.lines() == [
        "7 of 10 rows kept",
        "3 dropped: chosen equals rejected",
        "3 chosen responses cut to max_length (no EOS scored)",
    ]
