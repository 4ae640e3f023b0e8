"""A response's ids are those that follow its prompt's in the whole text's, with every kind of published tokenizer."""

import random
from dataclasses import asdict
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from real_tokenizers import FAMILIES, build
from tokenizers_for_tests import ids_of
from transformers import PreTrainedTokenizerFast

from isdaa.data.context import Before, Context
from isdaa.data.encoder import Encoder
from isdaa.data.pairs import Counts, canonical_pair, canonical_sft
from isdaa.data.reading.sources import as_dataset
from isdaa.data.tokenize_pairs import TokenizationSettings, tokenize_pairs, tokenize_prompt, tokenize_response, tokenize_sft

NOTHING_CUT = TokenizationSettings(max_length=100_000, max_prompt_length=50_000)
# What ends an assistant's turn.
ENDS = {
    **dict.fromkeys(("llama2", "llama2_new", "mistral_v1", "mistral_v3", "tekken", "tinyllama_zephyr"), "</s>"),
    **dict.fromkeys(("chatml_on_llama", "qwen2", "qwen3", "smollm2"), "<|im_end|>"),
    "phi3": "<|end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "deepseek": "<｜end▁of▁sentence｜>",
}
EVERYDAY = [
    *(
        "Hello",
        "world",
        " world",
        "nice",
        " nice",
        "Question:",
        "Answer:",
        "It",
        " It",
        " is",
        " the",
        "don't",
        "7",
        "1984",
        " 12",
    ),
    *(" ", "  ", "   ", "\n", "\n\n", " \n", ".", ",", "?", "...", " people", " sentence", "tokenizer"),
]
RARE = [
    *("\t", "\r\n", " -", "(", "])", "<", ">", "|", "/", "_", "=", "▁", "▁It", "é", "e\u0301", "\u0301", "ä", "ß", "…", "“"),
    *("\u00a0", "\u200b", "世界", "東", "ไทย", "น้ำ", "🙂", "👍🏽", "👩‍👩‍👧", "🇫🇷"),
]
# Added tokens of some families, plain words with the others. None of them ends a text.
TURNS = [
    *("[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|im_start|>", "<start_of_turn>", "<|start_header_id|>"),
    *("<think>", "</think>", "<tool_call>", "<｜User｜>", "<extra_id_0>", "<unk>"),
]
COMMON = st.lists(st.sampled_from(EVERYDAY), min_size=1, max_size=8).map("".join)
PLAIN = st.lists(st.sampled_from(EVERYDAY) | st.sampled_from(RARE) | st.text(max_size=3), min_size=1, max_size=8).map("".join)
ANY = PLAIN | st.lists(st.sampled_from(EVERYDAY + RARE + TURNS) | st.text(max_size=3), min_size=1, max_size=8).map("".join)
often = settings(derandomize=True, max_examples=30, deadline=None)
seldom = settings(derandomize=True, max_examples=6, deadline=None)
all_families = pytest.mark.parametrize("family", FAMILIES)
chat_families = pytest.mark.parametrize("family", [family for family in FAMILIES if family in ENDS])


@st.composite
def divided(draw: st.DrawFn) -> tuple[str, str]:
    """Prompt and response: two texts, or one that is cut anywhere."""
    if draw(st.integers(0, 3)) == 0:
        prompt, response = draw(ANY), draw(ANY)
    else:
        whole = draw(COMMON | ANY)
        place = draw(st.integers(1, max(len(whole) - 1, 1)))
        prompt, response = whole[:place], whole[place:]
    assume(prompt.strip() and response.strip())
    return prompt, response


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def dummies(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> int:
    """How many ▁ there are."""
    return "".join(tokenizer.convert_ids_to_tokens(ids)).count("▁")


@cache
def start(family: str) -> list[int]:
    """What the tokenizer puts in front of every text."""
    tokenizer = build(family)
    first = tokenizer("a")["input_ids"][0]
    return [first] if first == tokenizer.bos_token_id else []


@cache
def encoder(family: str) -> Encoder:
    """One for all texts: what a chat template writes is found out once."""
    return Encoder(build(family), NOTHING_CUT)


def prompt_ids(family: str, prompt: Any) -> list[int]:
    return encoder(family).prompts([{"prompt": prompt}])[0].ids


def response_ids(family: str, prompt: Any, response: str, finished: bool = True) -> list[int]:
    row = {"prompt": prompt, "response": response, "response_finished": finished}
    return encoder(family).answered([row], ("response",))[0][1][0].ids


def merges(tokenizer: PreTrainedTokenizerFast, prompt: str, response: str) -> bool:
    """Whether a token of the whole spans the boundary."""
    before = ids_of(tokenizer, prompt)
    return ids_of(tokenizer, prompt + response)[: len(before)] != before


def check(family: str, prompt: str, response: str, finished: bool = True) -> None:
    """Ids of a text prompt and its response against those of the whole text."""
    tokenizer = build(family)
    before, whole = ids_of(tokenizer, prompt), ids_of(tokenizer, prompt + response)
    merged = merges(tokenizer, prompt, response)
    assert prompt_ids(family, prompt) == start(family) + before
    if not finished and whole == before:
        return  # nothing is left to learn: refused
    ids = response_ids(family, prompt, response, finished)
    if finished:
        assert ids.pop() == tokenizer.eos_token_id
    if not merged:
        assert before + ids == whole
    elif text_of(tokenizer, whole) == prompt + response and text_of(tokenizer, before) == prompt:
        assert text_of(tokenizer, before + ids) == prompt + response


def through_end(family: str, written: str) -> list[int]:
    """Ids of a whole conversation up to the last turn's end."""
    tokenizer = build(family)
    ids, end = ids_of(tokenizer, written), tokenizer.convert_tokens_to_ids(ENDS[family])
    return ids[: len(ids) - ids[::-1].index(end)]


def check_chat(family: str, messages: list[dict[str, str]], answer: str) -> None:
    """Ids of a conversation and its answer against those of all that the template writes."""
    tokenizer = build(family)
    said = {"role": "assistant", "content": answer}
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    written = tokenizer.apply_chat_template([*messages, said], tokenize=False)
    assert written.startswith(opened)
    before, whole = ids_of(tokenizer, opened), through_end(family, written)
    prompt, response = prompt_ids(family, messages), response_ids(family, messages, answer)
    assert prompt == before
    assert response[-1] == whole[-1]
    assert dummies(tokenizer, prompt + response) <= dummies(tokenizer, whole)
    if whole[: len(before)] == before:
        assert prompt + response == whole
    elif text_of(tokenizer, whole) == written[: written.rindex(ENDS[family])] + ENDS[family]:
        assert text_of(tokenizer, prompt + response) == text_of(tokenizer, whole)


# --- single cases

CASES = [
    ("Question: 3+4?\nAnswer:", " It is 7."),
    ("Question: 3+4?\nAnswer:", "It is 7."),
    ("Question: 3+4?\nAnswer: ", "It is 7."),
    ("Question: 3+4?\nAnswer:  ", " It is 7."),
    ("Question: 3+4?\nAnswer:", "\nIt is 7."),
    ("Question: 3+4?\nAnswer:\n", "\n\n  It is 7.\n"),
    ("TL;DR:", "👩‍👩‍👧"),
    ("TL;DR:", "น้ำ"),
    ("Caf", "e\u0301 a\u0308"),
    ("Cafe", "\u0301"),
    ("Hello▁", "▁world ▁ nice"),
    ("Hello", "▁world"),
    ("Hello ▁", "▁"),
    ("Hello wor", "ld is nice"),
    ("Hello", ","),
    ("12", "34"),
    ("<|us", "er|> Hello"),
    ("<|user|>", "\nHello"),
    ("<|user|>\n", "Hello"),
    ("[INST] Hello [/INST]", "It is 7."),
    ("[INST] Hello [/INST]", " It is 7."),
    ("<think>", "\n\nHello</think>world"),
]


@all_families
@pytest.mark.parametrize(("prompt", "response"), CASES)
def test_single_cases(family: str, prompt: str, response: str) -> None:
    check(family, prompt, response)
    check(family, prompt, response, finished=False)
    if family in ENDS and "</think>" not in response:  # some templates leave thinking out, and the row is refused
        check_chat(family, [{"role": "user", "content": prompt}], response)


@all_families
def test_a_word_cut_in_two_is_counted_and_comes_back_whole(family: str) -> None:
    tokenizer = build(family)
    prompt, responses = "Hello wor", ("ld is nice", " is nice")
    assert merges(tokenizer, prompt, responses[0]) and not merges(tokenizer, prompt, responses[1])
    row, counts = pair_of(tokenizer, [(prompt, *responses)])
    assert counts.boundary_merges == 1
    assert text_of(tokenizer, ids_of(tokenizer, "Hello world is nice")) == "Hello world is nice"
    for ids, response in zip((row[0]["chosen_ids"], row[0]["rejected_ids"]), responses, strict=True):
        assert text_of(tokenizer, row[0]["prompt_ids"][len(start(family)) :] + ids[:-1]) == prompt + response


def test_no_dummy_prefix() -> None:
    """As a Llama writes it that goes on from the prompt."""
    for family in ("llama2", "llama2_new", "mistral_v1", "mistral_v3", "tinyllama_zephyr", "chatml_on_llama", "phi3"):
        tokenizer = build(family)
        assert "".join(tokenizer.convert_ids_to_tokens(ids_of(tokenizer, "It is 7."))) == "▁It▁is▁7."
        for response, pieces in ((" It is 7.", "▁It▁is▁7."), ("It is 7.", "It▁is▁7."), ("\nIt is 7.", "<0x0A>It▁is▁7.")):
            ids = response_ids(family, "Question: 3+4?\nAnswer:", response)
            assert "".join(tokenizer.convert_ids_to_tokens(ids[:-1])) == pieces


@all_families
def test_the_functions_for_one_text_do_what_the_encoder_does(family: str) -> None:
    tokenizer, answer = build(family), "It is 7."
    for prompt in ("Question: 3+4?\nAnswer: ", *([[{"role": "user", "content": "3+4?"}]] if family in ENDS else [])):
        assert tokenize_prompt({"prompt": prompt}, tokenizer, NOTHING_CUT) == prompt_ids(family, prompt)
        for finished in (True, False):
            ids = tokenize_response(prompt, answer, tokenizer, NOTHING_CUT, finished)
            assert ids == response_ids(family, prompt, answer, finished)


# --- any text


@all_families
@often
@given(texts=divided(), finished=st.booleans())
@example(texts=("a", " "), finished=True)
def test_text_in_context(family: str, texts: tuple[str, str], finished: bool) -> None:
    assume(ids_of(build(family), texts[0]))
    check(family, *texts, finished)


@chat_families
@often
@given(asked=PLAIN, before=st.none() | st.tuples(PLAIN, PLAIN), answer=PLAIN)
def test_chat_in_context(family: str, asked: str, before: tuple[str, str] | None, answer: str) -> None:
    assume(all(text.strip() for text in (asked, answer, *(before or ()))))
    roles = ("user", "assistant", "user")
    texts = (*(before or ()), asked)
    messages = [{"role": role, "content": text} for role, text in zip(roles[-len(texts) :], texts, strict=True)]
    check_chat(family, messages, answer)


# --- whole data sets


def pair_of(tokenizer: PreTrainedTokenizerFast, rows: list[tuple[str, str, str]]) -> tuple[list[dict[str, Any]], Counts]:
    """Ids of rows of prompt, chosen and rejected."""
    names = ("prompt", "chosen", "rejected")
    pairs = [canonical_pair(dict(zip(names, row, strict=True)), f"pairs.jsonl:{n}") for n, row in enumerate(rows)]
    result, counts = tokenize_pairs(as_dataset(pairs), tokenizer, NOTHING_CUT)
    return list(result), counts


@all_families
@seldom
@given(rows=st.lists(st.tuples(divided(), ANY), min_size=1, max_size=12))
def test_boundary_merges_are_counted_exactly(family: str, rows: list[tuple[tuple[str, str], str]]) -> None:
    tokenizer = build(family)
    texts = [(prompt, response, f"{other} {n} and others") for n, ((prompt, response), other) in enumerate(rows)]
    assume(all(ids_of(tokenizer, prompt) for prompt, _, _ in texts))
    pairs, counts = pair_of(tokenizer, texts)
    expected = [[merges(tokenizer, prompt, response) for response in responses] for prompt, *responses in texts]
    assert counts.boundary_merges == sum(map(any, expected))
    for pair in pairs:
        prompt, *responses = texts[int(pair["id"].rpartition(":")[2])]
        assert pair["prompt_ids"] == prompt_ids(family, prompt)
        for name, response in zip(("chosen_ids", "rejected_ids"), responses, strict=True):
            assert pair[name] == response_ids(family, prompt, response)

    learnt = [
        canonical_sft({"prompt": prompt, "completion": response}, f"sft.jsonl:{n}")
        for n, (prompt, response, _) in enumerate(texts)
    ]
    examples, counts = tokenize_sft(as_dataset(learnt), tokenizer, NOTHING_CUT)
    assert asdict(counts)["boundary_merges"] == sum(first for first, _ in expected)
    for row, (prompt, response, _) in zip(examples, texts, strict=True):
        ids = response_ids(family, prompt, response)
        assert row["input_ids"] == prompt_ids(family, prompt) + ids
        assert row["completion_mask"][-len(ids) :] == [1] * len(ids) and sum(row["completion_mask"]) == len(ids)


@chat_families
def test_every_answer_of_a_conversation_is_learnt_as_it_stands(family: str) -> None:
    tokenizer = build(family)
    texts = ["Question: 3+4?", "It is 7.", "And 4+5?", "It is 9, the world says."]
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=True)]
    data = as_dataset([canonical_sft({"messages": messages}, "sft.jsonl:1")])
    examples, counts = tokenize_sft(data, tokenizer, NOTHING_CUT)
    # Qwen3's template writes thinking into the last answer alone: each is learnt as it was the last.
    lengths = (2, 4) if family == "qwen3" else (4,)
    assert len(examples) == len(lengths)
    for row, length in zip(examples, lengths, strict=True):
        whole = through_end(family, tokenizer.apply_chat_template(messages[:length], tokenize=False))
        assert row["input_ids"] == whole
        learnt = [token for token, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if mask]
        said = text_of(tokenizer, learnt)
        expected = [texts[length - 1]] if len(lengths) == 2 else [texts[1], texts[3]]
        assert [text for text in texts if text in said] == expected
    assert counts.boundary_merges == 0


# --- long prompts


@all_families
def test_of_a_long_prompt_the_last_words_decide_what_the_whole_would(family: str) -> None:
    """Only the end of a long prompt is tokenised again with the response: the ids are those of the whole text all the same."""
    tokenizer, draw = build(family), random.Random(1)
    context = Context(tokenizer)
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "don't",
        "3.14",
        "Hello,",
        "wor",
        "ld",
        "nice\n\n ",
        "f(x):",
        "x+1",
        "naïve",
        "A",
        "--",
    ]
    words += ["世界", "ไทย", "🙂", "it's", "!!", "▁x", "Ġy", "<0x0A>", "", "\t", "zzzz"]
    cases, shorter = [], 0
    for _ in range(200):
        before = " ".join(draw.choices(words, k=draw.randint(60, 120))) + draw.choice(["", " ", "\n", ":", "\nA:", "wor"])
        behind = draw.choice([" ", "", "\n", "ld"]) + " ".join(draw.choices(words, k=draw.randint(1, 6))) + "."
        cases.append((Before(before, context.encode([before])[before]), behind))
        shorter += len(context.deciding_tail(cases[-1][0]) or "") < len(before)
    assert shorter > 100 or family == "deepseek"  # its vocabulary has tokens that go on past a word
    for (before, behind), (ids, merges) in zip(cases, context.behind(cases), strict=True):
        whole = context.encode([f"{before.text}{behind}"])[f"{before.text}{behind}"]
        assert merges == (whole[: len(before.ids)] != before.ids)
        assert merges or ids == whole[len(before.ids) :]
