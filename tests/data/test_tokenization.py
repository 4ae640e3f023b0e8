"""BOS, EOS, cuts, merges, templates: exactly which ids a pair becomes."""

import json
import logging
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import CHATML, byte_level, ids_of
from transformers import AutoTokenizer

from isdaa.config import TokenizationConfig
from isdaa.data import context as context_room
from isdaa.data import encoder as encoding_room
from isdaa.data import token_cache as tokens_room
from isdaa.data.encoder import token_settings
from isdaa.data.pairs import Counts, canonical_pair, canonical_sft
from isdaa.data.reading.sources import as_dataset
from isdaa.data.tokenize_pairs import (
    TokenizationSettings,
    stop_token_ids,
    template_hash,
    tokenize_pairs,
    tokenize_prompt,
    tokenize_prompts,
    tokenize_response,
    tokenize_sft,
    tokenizer_digest,
)
from isdaa.errors import UserError

PLAIN = {"prompt": "What is the capital of France?", "chosen": " The capital is Paris.", "rejected": " Good morning!"}
USER = {"role": "user", "content": "What is the capital of France?"}
SYSTEM = {"role": "system", "content": "Answer in one sentence."}
GOOD = {"role": "assistant", "content": "Paris."}
BAD = {"role": "assistant", "content": "Good morning!"}
CHAT = {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def tokens(tokenizer: Any, *rows: dict[str, Any], **options: Any) -> tuple[list[dict[str, Any]], Counts]:
    pairs = as_dataset([canonical_pair(row, f"pairs.jsonl:{n}") for n, row in enumerate(rows, start=1)])
    result, counts = tokenize_pairs(pairs, tokenizer, TokenizationSettings(**options))
    return list(result), counts


def one(tokenizer: Any, row: dict[str, Any], **options: Any) -> tuple[list[int], list[int], list[int]]:
    (pair,), _ = tokens(tokenizer, row, **options)
    return pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]


def refusal(tokenizer: Any, *rows: dict[str, Any], **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        tokens(tokenizer, *rows, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_configuration_has_the_defaults_of_the_tokeniser() -> None:
    assert token_settings(TokenizationConfig.model_validate({})) == TokenizationSettings()
    values = {"max_length": 9, "max_prompt_length": 4, "truncation": "keep_start", "chat_template_kwargs": {"a": 1}}
    section = TokenizationConfig.model_validate(values)
    # The records of models and evaluations, and the keys of kept logps, say the same of either.
    assert asdict(token_settings(section)) == section.model_dump() == values


# --- plain text


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("pad", ["<|pad|>", EOS, None])
def test_plain_text(bos: bool, padding_side: str, pad: str | None) -> None:
    """BOS once at the prompt's start where the tokenizer adds one, EOS at the end; padding settings change nothing."""
    tokenizer = byte_level(bos=bos, padding_side=padding_side, pad=pad)
    start = [tokenizer.bos_token_id] if bos else []
    expected = (
        start + ids_of(tokenizer, PLAIN["prompt"]),
        [*ids_of(tokenizer, PLAIN["chosen"]), tokenizer.eos_token_id],
        [*ids_of(tokenizer, PLAIN["rejected"]), tokenizer.eos_token_id],
    )
    assert one(tokenizer, PLAIN) == expected
    if pad is not None:  # a call that pads and cuts leaves the tokenizer so set
        tokenizer(["a", "a longer text than that"], padding=True, truncation=True, max_length=3)
        assert one(tokenizer, PLAIN) == expected
    assert tokenize_prompt(PLAIN, tokenizer) == expected[0]
    assert tokenize_response(PLAIN["prompt"], PLAIN["chosen"], tokenizer) == expected[1]
    assert stop_token_ids(tokenizer, chat=False) == {tokenizer.eos_token_id}


def test_a_prompt_with_its_own_bos_gets_no_second_one() -> None:
    tokenizer = byte_level(bos=True)
    expected = one(tokenizer, PLAIN)
    (pair, again), counts = tokens(
        tokenizer, PLAIN | {"prompt": BOS + PLAIN["prompt"]}, PLAIN | {"prompt": BOS * 2 + PLAIN["prompt"]}
    )
    assert pair["prompt_ids"] == again["prompt_ids"] == expected[0]
    assert counts.own_bos == 2
    # A tokenizer that adds none leaves the text alone.
    without = byte_level()
    (pair,), counts = tokens(without, PLAIN | {"prompt": BOS + PLAIN["prompt"]})
    assert pair["prompt_ids"] == expected[0]
    assert counts.own_bos == 0


def test_eos_never_twice_and_never_after_a_cut_response() -> None:
    tokenizer = byte_level()
    _, chosen, rejected = one(tokenizer, PLAIN | {"chosen": PLAIN["chosen"] + EOS, "rejected_finished": False})
    assert chosen == [*ids_of(tokenizer, PLAIN["chosen"]), tokenizer.eos_token_id]
    assert rejected == ids_of(tokenizer, PLAIN["rejected"])


def test_a_tokenizer_that_adds_eos_by_itself_gives_one() -> None:
    from tokenizers import processors

    tokenizer = byte_level()
    backend = tokenizer.backend_tokenizer
    special = [(name, backend.token_to_id(name)) for name in (BOS, EOS)]
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=special)
    assert one(tokenizer, PLAIN) == one(byte_level(bos=True), PLAIN)


def test_no_eos_no_training() -> None:
    assert "no EOS token" in refusal(byte_level(eos=False), PLAIN)


def test_boundary_merges_are_counted_and_not_made() -> None:
    tokenizer = byte_level()
    merging = {"prompt": "Is it Par", "chosen": "is or not", "rejected": " not"}
    merged = ids_of(tokenizer, "Is it Paris or not")
    apart = ids_of(tokenizer, "Is it Par") + ids_of(tokenizer, "is or not")
    assert merged != apart
    (pair, _), counts = tokens(tokenizer, merging, PLAIN)
    assert pair["prompt_ids"] + pair["chosen_ids"][:-1] == apart
    assert counts.boundary_merges == 1
    # Far from the boundary nothing counts, however long the texts are.
    long = {
        "prompt": "The water will boil soon. " * 20 + "Is it Par",
        "chosen": "is or not" + " the water" * 20,
        "rejected": " not",
    }
    assert tokens(tokenizer, long)[1].boundary_merges == 1
    assert tokens(tokenizer, PLAIN | {"prompt": PLAIN["prompt"] * 9, "chosen": PLAIN["chosen"] * 9})[1].boundary_merges == 0


# --- cuts


def test_long_prompts_are_cut_once_a_pair_and_keep_their_end() -> None:
    tokenizer = byte_level(bos=True)
    whole, chosen, rejected = one(tokenizer, PLAIN)
    limits = {"max_prompt_length": 5, "max_length": 100}
    (pair,), counts = tokens(tokenizer, PLAIN, **limits)
    assert pair["prompt_ids"] == [tokenizer.bos_token_id, *whole[-4:]]
    assert (pair["chosen_ids"], pair["rejected_ids"]) == (chosen, rejected)
    assert (counts.prompts_cut, counts.chosen_cut, counts.rejected_cut) == (1, 0, 0)
    assert one(tokenizer, PLAIN, **limits, truncation="keep_start")[0] == whole[:5]
    assert one(byte_level(), PLAIN, **limits)[0] == whole[-5:]
    assert one(tokenizer, PLAIN, max_prompt_length=1, max_length=100)[0] == [tokenizer.bos_token_id]
    assert tokens(tokenizer, PLAIN, max_prompt_length=len(whole), max_length=100)[1].prompts_cut == 0


def test_long_responses_are_cut_to_the_room_and_keep_no_eos() -> None:
    tokenizer = byte_level()
    prompt, chosen, rejected = one(tokenizer, PLAIN)
    assert len(chosen) > len(rejected)
    limits = {"max_prompt_length": len(prompt), "max_length": len(prompt) + len(chosen) - 1}
    (pair,), counts = tokens(tokenizer, PLAIN, **limits)
    assert pair["chosen_ids"] == chosen[:-1]
    assert tokenizer.eos_token_id not in pair["chosen_ids"]
    assert pair["rejected_ids"] == rejected
    assert (counts.prompts_cut, counts.chosen_cut, counts.rejected_cut) == (0, 1, 0)
    # The room is what the cut prompt leaves.
    (pair,), counts = tokens(tokenizer, PLAIN, max_prompt_length=4, max_length=6)
    assert [len(pair[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")] == [4, 2, 2]
    assert (counts.prompts_cut, counts.chosen_cut, counts.rejected_cut) == (1, 1, 1)


def test_rows_with_behaviour_logps_are_dropped_rather_than_cut() -> None:
    tokenizer = byte_level()
    prompt, chosen, _ = one(tokenizer, PLAIN)
    known = PLAIN | {"chosen_logps": -20.0, "rejected_logps": -9.0}
    (pair,), counts = tokens(tokenizer, known)
    assert (pair["behaviour_chosen_logps"], pair["behaviour_rejected_logps"]) == (-20.0, -9.0)
    cuts_prompt = {"max_prompt_length": len(prompt) - 1, "max_length": 100}
    cuts_chosen = {"max_prompt_length": len(prompt), "max_length": len(prompt) + len(chosen) - 1}
    for limits in (cuts_prompt, cuts_chosen):
        (pair,), counts = tokens(tokenizer, known, PLAIN, **limits)
        assert pair["id"] == "pairs.jsonl:2"
        assert pair["index"] == 0
        assert (counts.rows, counts.kept, counts.dropped_behaviour_cut) == (2, 1, 1)
        assert counts.prompts_cut + counts.chosen_cut == 1  # of the pair that is kept
        assert "1 dropped: too long, and their behaviour logps" in refusal(tokenizer, known, **limits)


def test_pairs_that_a_cut_makes_equal_are_dropped() -> None:
    tokenizer = byte_level()
    row = {"prompt": "How?", "chosen": " the water will boil", "rejected": " the water will soon"}
    prompt = one(tokenizer, row)[0]
    limits = {"max_prompt_length": len(prompt), "max_length": len(prompt) + 1}
    assert "1 dropped: chosen equals rejected" in refusal(tokenizer, row, **limits)


@pytest.mark.parametrize(
    "options", [{"max_prompt_length": 640}, {"max_prompt_length": 0}, {"truncation": "keep_middle"}, {"max_length": 1}]
)
def test_settings_that_leave_no_room(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="tokenization"):
        TokenizationSettings(**options)


# --- token ids in the data


def test_token_ids_win_over_the_text() -> None:
    tokenizer = byte_level(bos=True)
    ids = {"prompt_ids": [50, 51], "chosen_ids": [60, 61], "rejected_ids": [70, 71], "rejected_finished": False}
    assert one(tokenizer, PLAIN | ids) == ([50, 51], [60, 61, tokenizer.eos_token_id], [70, 71])
    ended = ids | {"chosen_ids": [60, tokenizer.eos_token_id]}
    (pair,), counts = tokens(tokenizer, ended)
    assert pair["chosen_ids"] == [60, tokenizer.eos_token_id]
    assert counts.boundary_merges == counts.own_bos == 0
    # Cut like any other: the prompt at its start, responses at their end.
    assert one(tokenizer, ids, max_prompt_length=1, max_length=3) == ([51], [60, 61], [70, 71])


def test_token_ids_of_a_chat_end_with_the_end_of_turn() -> None:
    tokenizer = byte_level("chatml")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = {"prompt_ids": [50], "chosen_ids": [60, end], "rejected_ids": [70]}
    assert one(tokenizer, CHAT | ids) == ([50], [60, end], [70, end])
    assert one(byte_level(), CHAT | ids)[2] == [70, tokenizer.eos_token_id]  # no template is needed for ids


def test_ids_of_another_tokenizer_are_refused() -> None:
    tokenizer = byte_level()
    message = refusal(tokenizer, {"prompt_ids": [5], "chosen_ids": [9_999], "rejected_ids": [6]})
    assert message.startswith("pairs.jsonl:1: column 'chosen_ids' holds token id 9999")


# --- chat


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_chatml(bos: bool, padding_side: str) -> None:
    """The template says all: no BOS beside it; the end of turn ends a response, white space after it is no part."""
    tokenizer = byte_level("chatml", bos=bos, padding_side=padding_side)
    prompt, chosen, rejected = one(tokenizer, CHAT)
    system = "<|im_start|>system\nAnswer in one sentence.<|im_end|>\n"
    user = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    assert prompt == ids_of(tokenizer, system + user + "<|im_start|>assistant\n")
    assert chosen == ids_of(tokenizer, "Paris.<|im_end|>")
    assert rejected == ids_of(tokenizer, "Good morning!<|im_end|>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chosen[-1] == end
    assert stop_token_ids(tokenizer, chat=True) == {end, tokenizer.eos_token_id}
    assert stop_token_ids(tokenizer, chat=False) == {tokenizer.eos_token_id}
    assert tokenize_prompt({"prompt": CHAT["prompt"]}, tokenizer) == prompt
    assert tokenize_response(CHAT["prompt"], "Paris.", tokenizer) == chosen


def test_a_cut_chat_response_has_no_end_of_turn() -> None:
    tokenizer = byte_level("chatml")
    assert one(tokenizer, CHAT | {"chosen_finished": False})[1] == ids_of(tokenizer, "Paris.")
    assert tokenize_response(CHAT["prompt"], "Paris.", tokenizer, finished=False) == ids_of(tokenizer, "Paris.")


@pytest.mark.parametrize("bos", [False, True])
def test_llama3(bos: bool) -> None:
    tokenizer = byte_level("llama3", bos=bos)
    spaced = CHAT | {"chosen": [GOOD | {"content": "\nParis. \n"}]}  # this template trims
    (pair,), counts = tokens(tokenizer, spaced)
    assert pair["prompt_ids"].count(tokenizer.bos_token_id) == 1
    assert pair["prompt_ids"][0] == tokenizer.bos_token_id
    assert pair["chosen_ids"] == ids_of(tokenizer, "Paris.<|eot_id|>")
    assert counts.own_bos == int(bos)
    assert stop_token_ids(tokenizer, chat=True) == {
        tokenizer.convert_tokens_to_ids("<|eot_id|>"),
        tokenizer.eos_token_id,
    }


def test_only_the_end_of_turn_is_scored_where_eos_follows_it() -> None:
    tokenizer = byte_level("turn_then_eos")
    assert one(tokenizer, CHAT)[1] == ids_of(tokenizer, "Paris.<|im_end|>")


def test_a_template_whose_turns_end_with_no_token_gets_eos() -> None:
    tokenizer = byte_level("words")
    prompt, chosen, _ = one(tokenizer, CHAT)
    assert prompt[-len(ids_of(tokenizer, "assistant: ")) :] == ids_of(tokenizer, "assistant: ")
    assert chosen == [*ids_of(tokenizer, "Paris."), tokenizer.eos_token_id]
    assert stop_token_ids(tokenizer, chat=True) == {tokenizer.eos_token_id}


def test_multi_turn() -> None:
    tokenizer = byte_level("chatml")
    history = [USER, BAD, USER]
    prompt, chosen, _ = one(tokenizer, {"chosen": [*history, GOOD], "rejected": [*history, BAD]})
    assert tokenizer.decode(prompt).count("<|im_start|>") == 4
    assert chosen == ids_of(tokenizer, "Paris.<|im_end|>")


def test_chat_prompts_cut_at_their_end_still_open_the_assistants_turn() -> None:
    tokenizer = byte_level("chatml")
    whole = one(tokenizer, CHAT)[0]
    opening = ids_of(tokenizer, "<|im_start|>assistant\n")
    limit = len(opening) + 3
    limits = {"max_prompt_length": limit, "max_length": 200}
    assert one(tokenizer, CHAT, **limits)[0] == whole[-limit:]
    assert one(tokenizer, CHAT, **limits, truncation="keep_start")[0] == whole[:3] + opening
    tight = {"max_prompt_length": len(opening) - 1, "max_length": 200}  # no room even for the opening
    assert one(tokenizer, CHAT, **tight, truncation="keep_start")[0] == whole[: len(opening) - 1]


def test_chat_and_plain_prompts_in_one_data_set() -> None:
    tokenizer = byte_level("chatml", bos=True)
    (first, second), _ = tokens(tokenizer, PLAIN, CHAT)
    assert (first["chosen_ids"][-1], second["chosen_ids"][-1]) == (
        tokenizer.eos_token_id,
        ids_of(tokenizer, "<|im_end|>")[0],
    )
    assert (first["prompt_ids"][0] == tokenizer.bos_token_id, second["prompt_ids"][0] == tokenizer.bos_token_id) == (
        True,
        False,
    )


def test_chat_without_a_template() -> None:
    assert "no chat template" in refusal(byte_level(), CHAT)


def test_a_template_whose_prompt_is_no_prefix() -> None:
    """Thinking that is opened for a model, and not written into answers, is no part of the prompt; anything else is refused."""
    tokenizer = byte_level("no_prefix")
    (row,), counts = tokens(tokenizer, CHAT)
    assert tokenizer.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n") and counts.opening_cut == 1
    assert row["chosen_ids"] == ids_of(tokenizer, "Paris.<|im_end|>")
    assert tokenizer.decode(tokenize_prompt({"prompt": [USER]}, tokenizer)).endswith("<think>")  # a model is asked as ever
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ 'Q' if add_generation_prompt else 'q' }}" + CHATML
    message = refusal(tokenizer, CHAT)
    assert message.startswith("pairs.jsonl:1: ") and "no prefix" in message


def test_a_template_that_refuses_or_forgets() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system,\nplease') }}{% endif %}" + CHATML
    )
    message = refusal(tokenizer, CHAT)
    assert message.startswith("pairs.jsonl:1: ") and "no system, please" in message
    tokenizer.chat_template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    assert "leaves out the assistant's words" in refusal(tokenizer, CHAT)


def test_a_template_that_cannot_be_used_is_named_by_where_it_stands(tmp_path: Path) -> None:
    def loaded(template: str) -> Any:
        tokenizer = byte_level()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path)
        return AutoTokenizer.from_pretrained(tmp_path)

    file = tmp_path / "chat_template.jinja"
    assert refusal(loaded("\n{% if"), CHAT).startswith(f"{file}: the chat template refuses a question and its answer")
    assert refusal(loaded("{{ messages[0]['content'] }}"), CHAT).startswith(f"{file}: the chat template leaves out")
    message = refusal(loaded("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML), CHAT)
    assert message.startswith("pairs.jsonl:1: ") and message.endswith(f"mend its messages or the template in {file}")


def test_template_hash() -> None:
    assert template_hash(byte_level()) == "none"
    assert len({template_hash(byte_level(name)) for name in ("chatml", "llama3")} | {"none"}) == 3


# --- supervised examples


def sft(tokenizer: Any, *rows: dict[str, Any], **options: Any) -> tuple[list[dict[str, Any]], Counts]:
    data = as_dataset([canonical_sft(row, f"sft.jsonl:{n}") for n, row in enumerate(rows, start=1)])
    result, counts = tokenize_sft(data, tokenizer, TokenizationSettings(**options))
    return list(result), counts


def learnt(example: dict[str, Any]) -> list[int]:
    return [i for i, mask in zip(example["input_ids"], example["completion_mask"], strict=True) if mask]


def test_sft_tokens_are_those_of_a_pair() -> None:
    for tokenizer, row in (
        (byte_level(bos=True), PLAIN),
        (byte_level("chatml"), CHAT),
        (byte_level("llama3", bos=True), CHAT),
    ):
        prompt, chosen, _ = one(tokenizer, row)
        (example,), counts = sft(tokenizer, {"prompt": row["prompt"], "completion": row["chosen"]})
        assert example["input_ids"] == prompt + chosen
        assert learnt(example) == chosen
        assert (counts.rows, counts.kept) == (1, 1)


def test_sft_of_conversations_learns_every_answer() -> None:
    for name, end in (("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("turn_then_eos", "<|im_end|>")):
        tokenizer = byte_level(name)
        (example,), _ = sft(tokenizer, {"messages": [USER, BAD, USER, GOOD]})
        assert learnt(example) == ids_of(tokenizer, f"Good morning!{end}") + ids_of(tokenizer, f"Paris.{end}")
        assert tokenizer.decode(example["input_ids"]).count("What is the capital") == 2
    assert learnt(sft(byte_level("words"), {"messages": [USER, BAD, USER, GOOD]})[0][0])[-1] == tokenizer.eos_token_id


def test_sft_where_the_template_writes_earlier_turns_otherwise() -> None:
    """Templates that write thoughts into the last turn alone: every turn is learnt as the model is asked for it."""
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML.replace(
        "message['content'] + '<|im_end|>\n' }}",
        "('<think></think>' if loop.last and message['role'] == 'assistant' else '') + message['content'] + '<|im_end|>\n' }}",
    )
    (first, second), counts = sft(tokenizer, {"messages": [USER, BAD, USER, GOOD]})
    assert learnt(first) == ids_of(tokenizer, f"<think></think>{BAD['content']}<|im_end|>")
    assert learnt(second) == ids_of(tokenizer, "<think></think>Paris.<|im_end|>")
    assert tokenizer.decode(second["input_ids"]).count("think>") == 2 and first["id"] != second["id"]
    assert counts.turns_apart == 1 and counts.lines()[0] == "1 of 1 rows kept"
    # Earlier answers that the template leaves out are no conversation that anybody could learn from.
    tokenizer.chat_template = CHATML.replace(
        "message['content'] + '<|im_end|>\n' }}",
        "(message['content'] if loop.last or message['role'] != 'assistant' else '…') + '<|im_end|>\n' }}",
    )
    with pytest.raises(UserError, match="leaves out what message 1 "):
        sft(tokenizer, {"messages": [USER, BAD, USER, GOOD]})


def test_sft_of_plain_text_and_cuts() -> None:
    tokenizer = byte_level(bos=True)
    text = "The kettle is on the stove."
    (example,), _ = sft(tokenizer, {"text": text})
    assert example["input_ids"] == [tokenizer.bos_token_id, *ids_of(tokenizer, text), tokenizer.eos_token_id]
    assert example["completion_mask"] == [0] + [1] * (len(example["input_ids"]) - 1)
    (example,), counts = sft(tokenizer, {"text": text}, max_prompt_length=2, max_length=4)
    assert example["input_ids"] == [tokenizer.bos_token_id, *ids_of(tokenizer, text)[:3]]
    assert counts.completions_cut == 1
    (example,), counts = sft(tokenizer, {"prompt": text, "completion": text}, max_prompt_length=3, max_length=5)
    assert (len(example["input_ids"]), sum(example["completion_mask"]), counts.prompts_cut, counts.completions_cut) == (
        5,
        2,
        1,
        1,
    )
    talk = {"messages": [USER, BAD, USER, GOOD]}
    with pytest.raises(UserError, match="1 dropped: nothing to learn"):
        sft(byte_level("chatml"), talk, max_prompt_length=2, max_length=4)


def test_prompts_alone() -> None:
    tokenizer = byte_level(bos=True)
    ids, counts = tokenize_prompts([PLAIN, {"prompt_ids": [7, 8], "prompt": ""}], tokenizer, TokenizationSettings(9, 4))
    assert ids == [one(tokenizer, PLAIN, max_length=9, max_prompt_length=4)[0], [7, 8]]
    assert (counts.rows, counts.kept, counts.prompts_cut) == (2, 2, 1)


# --- the cache on disk


def count_tokenizations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = context_room.tokenize_text

    def counted(tokenizer: Any, texts: Any) -> Any:
        calls.append(len(texts))
        return original(tokenizer, texts)

    monkeypatch.setattr(context_room, "tokenize_text", counted)
    return calls


def test_the_cache_is_hit_by_content_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_tokenizations(monkeypatch)
    rows = [canonical_pair(PLAIN | {"weight": float(i)}, f"a/pairs.jsonl:{i}") for i in range(3)]
    elsewhere = [row | {"where": row["where"].replace("a/", "b/")} for row in rows]

    def run(data: list[dict[str, Any]], tokenizer: Any, **options: Any) -> tuple[list[dict[str, Any]], Counts, bool]:
        del calls[:]
        result, counts = tokenize_pairs(as_dataset(data), tokenizer, TokenizationSettings(**options), cache_dir=tmp_path)
        return list(result), counts, bool(calls)

    first = run(rows, byte_level())
    assert first[2]
    used = byte_level(padding_side="left")
    used(["a", "a longer text"], padding=True, truncation=True, max_length=2)
    for tokenizer in (byte_level(), used):
        assert run(elsewhere, tokenizer) == (first[0], first[1], False)
    assert len(list(tmp_path.iterdir())) == 1
    changed = [rows[0] | {"chosen": " Lyon."}, *rows[1:]]
    for data, tokenizer, options in (
        (changed, byte_level(), {}),
        ([rows[1], rows[0], rows[2]], byte_level(), {}),
        (rows, byte_level(bos=True), {}),
        (rows, byte_level("chatml"), {}),
        (rows, byte_level(), {"max_length": 600}),
        (rows, byte_level(), {"truncation": "keep_start"}),
    ):
        assert run(data, tokenizer, **options)[2]
        assert not run(data, tokenizer, **options)[2]


@pytest.mark.parametrize("damage", ["flip", "short", "no_record", "foreign_record", "empty"])
def test_a_damaged_cache_is_noticed_and_made_anew(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = count_tokenizations(monkeypatch)
    pairs = as_dataset([canonical_pair(PLAIN, "pairs.jsonl:1")])
    expected = list(tokenize_pairs(pairs, byte_level(), cache_dir=tmp_path)[0])
    (folder,) = tmp_path.iterdir()
    data, record = folder / "tokens.arrow", folder / "tokens.json"
    content = bytearray(data.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "short":
        data.write_bytes(content[:-40])
    elif damage == "no_record":
        record.unlink()
    elif damage == "foreign_record":
        record.write_text(json.dumps({"digest": json.loads(record.read_text())["digest"], "rows": 1, "counts": {"other": 1}}))
    else:
        data.unlink()
    del calls[:]
    with caplog.at_level(logging.WARNING):
        assert list(tokenize_pairs(pairs, byte_level(), cache_dir=tmp_path)[0]) == expected
    assert calls
    assert "damaged" in caplog.text
    del calls[:]
    assert list(tokenize_pairs(pairs, byte_level(), cache_dir=tmp_path)[0]) == expected
    assert not calls


def test_many_batches_are_numbered_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tokens_room, "BATCH", 2)
    rows = [canonical_pair(PLAIN | {"prompt": f"How {i}?"}, f"pairs.jsonl:{i}") for i in range(5)]
    rows[1]["rejected"] = rows[1]["chosen"]
    for folder in (None, tmp_path):
        result, counts = tokenize_pairs(as_dataset(rows), byte_level(), cache_dir=folder)
        assert list(result["index"]) == [0, 1, 2, 3]
        assert list(result["id"]) == [f"pairs.jsonl:{i}" for i in (0, 2, 3, 4)]
        assert (counts.rows, counts.kept, counts.dropped_equal) == (5, 4, 1)
        assert result[0]["weight"] is None


# --- batches in threads, prompts remembered


def varied(chat: bool) -> list[dict[str, Any]]:
    """Rows that touch every rule, prompts of theirs shared far apart."""
    ids = {"prompt_ids": [50, 51], "chosen_ids": [60, 61], "rejected_ids": [70, 71, 72]}
    rows = [
        PLAIN,
        PLAIN | {"chosen_finished": False, "weight": 2.0},
        PLAIN | {"prompt": BOS + PLAIN["prompt"], "rejected": " Good" + EOS},
        {"prompt": "Is it Par", "chosen": "is or not", "rejected": "is"},  # merges across the boundary, twice
        PLAIN | {"prompt": "Der Käse – 猫 und 🫖 – ist\r\n alt.  \n\n\t?"},
        PLAIN | ids,
        PLAIN | ids | {"rejected_finished": False},
        PLAIN | {"prompt": "The kettle is on the stove. " * 9},
        PLAIN | {"chosen": " and the water will boil soon" * 19},
        PLAIN | {"chosen": " the water will boil soon" * 19, "chosen_logps": -2.0, "rejected_logps": -3.0},  # dropped: cut
        PLAIN | {"chosen_logps": -2.0, "rejected_logps": -3.0},
        PLAIN | {"chosen": " Paris" * 80, "rejected": " Paris" * 81},  # dropped: equal when cut
    ]
    if chat:
        rows += [
            CHAT,
            CHAT | {"rejected_finished": False},
            {"chosen": [USER, BAD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]},
        ]
        rows += [CHAT | ids, CHAT | {"prompt": [SYSTEM, USER | {"content": "What is the capital of France? " * 9}]}]
    return [row | {"id": str(n)} for n, row in enumerate(rows)]


@pytest.mark.parametrize(("remembered", "truncation"), [(60, "keep_end"), (10**6, "keep_start")])
@pytest.mark.parametrize("template", [None, "chatml", "llama3"])
def test_rows_are_the_same_in_threads_and_alone(
    template: str | None, truncation: str, remembered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However rows are put into batches, and whatever is remembered of others, each gives what it gives by itself."""
    options = {"max_length": 70, "max_prompt_length": 50, "truncation": truncation}
    rows = varied(template is not None)
    alone, summed = [], Counts()
    for row in rows:
        try:
            pairs, counts = tokens(byte_level(template, bos=True), row, **options)
        except UserError as error:  # the only row is dropped; nothing else is counted of these
            pairs = []
            counts = Counts(rows=1, **{"dropped_equal" if "equals" in str(error) else "dropped_behaviour_cut": 1})
            counts.no_template = int(template is not None)  # both are texts
        alone += pairs
        summed = Counts(**{name: value + getattr(counts, name) * 3 for name, value in asdict(summed).items()})
    expected = [pair | {"index": n} for n, pair in enumerate(alone * 3)]
    seen = {name for name, value in asdict(summed).items() if value}
    assert {"own_bos", "boundary_merges", "prompts_cut", "chosen_cut", "dropped_equal", "dropped_behaviour_cut"} <= seen

    monkeypatch.setattr(encoding_room, "REMEMBERED", remembered)
    for batch in (1, 4, 1000):
        monkeypatch.setattr(tokens_room, "BATCH", batch)
        assert tokens(byte_level(template, bos=True), *rows * 3, **options) == (expected, summed)
    # A tokenizer without a backend is used by one thread alone.
    monkeypatch.setattr(tokens_room, "BATCH", 4)
    monkeypatch.setattr(tokens_room, "ThreadPoolExecutor", None)
    for module in (context_room, encoding_room):
        monkeypatch.setattr(module, "encodes_in_threads", lambda tokenizer: False)
    assert tokens(byte_level(template, bos=True), *rows * 3, **options) == (expected, summed)


def test_texts_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts across batches; within one, each different text: prompts, then those with the responses of both columns."""
    monkeypatch.setattr(tokens_room, "BATCH", 2)
    monkeypatch.setattr(tokens_room, "WORKERS", 1)
    calls = count_tokenizations(monkeypatch)
    rows = [PLAIN | {"prompt": f"How {i % 2}?", "chosen": f" {i}"} for i in range(6)]
    tokens(byte_level(), *rows)
    # Two prompts, each with two responses; a prompt that is remembered is encoded once more with its responses alone.
    assert [texts for texts in calls if texts] == [2, 6, 6, 6]


def test_the_first_bad_row_is_named_and_threads_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_room, "BATCH", 2)
    foreign = {"prompt_ids": [5], "chosen_ids": [9_999], "rejected_ids": [6]}
    rows = [PLAIN | ({} if i < 5 else foreign) for i in range(40)]
    before = threading.enumerate()
    assert refusal(byte_level(), *rows).startswith("pairs.jsonl:6: ")
    assert all(thread in before or thread.name == "isdaa progress" for thread in threading.enumerate())


def test_memory_keeps_what_came_last() -> None:
    memory = encoding_room.Memory(5)
    memory.add({"a": [1, 2], "b": [3]})
    memory.add({"a": [9, 9], "c": [4, 5]})
    assert memory.recall(["a", "b", "c", "d"]) == {"a": [1, 2], "b": [3], "c": [4, 5]}
    memory.add({"d": [6, 7]})
    assert memory.recall(["a", "b", "c", "d"]) == {"b": [3], "c": [4, 5], "d": [6, 7]}
    memory.add({"long": [0] * 6, "\ud800": [8]})  # too long for it: all that came before goes, too
    assert memory.recall(["d", "long", "\ud800"]) == {"\ud800": [8]}
    assert memory.room == 4


def test_tokenizer_digest_sees_what_matters() -> None:
    digests = [tokenizer_digest(t) for t in (byte_level(), byte_level(bos=True), byte_level("chatml"), byte_level(eos=False))]
    assert len(set(digests)) == 4
    assert tokenizer_digest(byte_level(padding_side="left")) == digests[0]
    assert tokenizer_digest(after_a_padded_call(byte_level())) == digests[0]


def test_what_a_call_left_set_does_not_pad_or_cut() -> None:
    words = ["The kettle is on the stove.", "a"]
    tokenizer = after_a_padded_call(byte_level())
    assert context_room.tokenize_text(tokenizer, words) == [ids_of(byte_level(), text) for text in words]
    assert context_room.tokenize_text(tokenizer, []) == []


def after_a_padded_call(tokenizer: Any) -> Any:
    tokenizer(["a", "a longer text than that"], padding=True, truncation=True, max_length=3)
    assert tokenizer.backend_tokenizer.padding is not None
    return tokenizer


# --- properties


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda s: bool(s.strip()))


@settings(deadline=None, max_examples=60)
@given(prompt=text, chosen=text, rejected=text, bos=st.booleans(), room=st.integers(1, 40), limit=st.integers(1, 40))
def test_lengths_stay_within_bounds_and_ids_concatenate(
    prompt: str, chosen: str, rejected: str, bos: bool, room: int, limit: int
) -> None:
    tokenizer = byte_level(bos=bos)
    limits = {"max_prompt_length": limit, "max_length": limit + room}
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    try:
        (pair,), counts = tokens(tokenizer, row, **limits)
    except UserError as error:
        assert "chosen equals rejected" in str(error)
        return
    whole = ([tokenizer.bos_token_id] if bos else []) + ids_of(tokenizer, prompt)
    assert len(pair["prompt_ids"]) == min(len(whole), limit)
    assert pair["prompt_ids"][-1] == whole[-1] or limit == 1
    for name, said in (("chosen", chosen), ("rejected", rejected)):
        ids = [*ids_of(tokenizer, said), tokenizer.eos_token_id]
        assert pair[f"{name}_ids"] == ids[: limit + room - len(pair["prompt_ids"])]
        assert getattr(counts, f"{name}_cut") == (len(pair[f"{name}_ids"]) < len(ids))


def test_two_processes_fill_the_cache_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = as_dataset([canonical_pair(PLAIN, "pairs.jsonl:1")])
    write = tokens_room.write_tokens
    depth = 0

    def meanwhile(*arguments: Any) -> None:
        nonlocal depth
        write(*arguments)
        depth += 1
        if depth == 1:
            tokenize_pairs(rows, byte_level(), cache_dir=tmp_path)
            assert depth == 2

    monkeypatch.setattr(tokens_room, "write_tokens", meanwhile)
    first, _ = tokenize_pairs(rows, byte_level(), cache_dir=tmp_path)
    assert list(first) == list(tokenize_pairs(rows, byte_level())[0])
    assert [path.name[:7] for path in tmp_path.iterdir()] == ["tokens-"]
    assert depth == 2
    # Absent when it is read back, since another process is just putting its own there.
    monkeypatch.setattr(tokens_room, "read_tokens", lambda folder: None)
    assert list(tokenize_pairs(rows, byte_level(), cache_dir=tmp_path)[0]) == list(first)
