"""The word-level tokenizer, alone and beside its model in one folder."""

import pytest

from isdaa.world import PROMPT_END, SIZES, build_tokenizer, make_posts, model_config
from isdaa.world.reward import split_words
from isdaa.world.tokenizer import vocabulary

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module", params=SIZES)
def world(request):
    return request.param, build_tokenizer(request.param)


def test_vocabulary_is_small_and_special_tokens_are_named(world):
    size, tokenizer = world
    tokens = vocabulary(size)
    assert 130 <= len(tokens) == len(tokenizer) == len(set(tokens)) <= 260
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokens)))) == tokens
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<bos>", "<eos>")


def test_every_text_of_the_world_survives_the_round_trip(world):
    size, tokenizer = world
    for row in make_posts(size, 300, split="sft", seed=1):
        for text in (row["prompt"], row["summary"]):
            ids = tokenizer(text)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
    ids = tokenizer(row["summary"], add_special_tokens=False)["input_ids"]
    assert len(ids) == len(split_words(row["summary"]))  # the judge counts what the model writes


def test_prompt_and_response_concatenate_cleanly(world):
    size, tokenizer = world
    row = make_posts(size, 1, split="eval")[0]
    prompt = tokenizer(row["prompt"])["input_ids"]
    response = tokenizer(row["summary"], add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(prompt[-1]) == PROMPT_END
    assert prompt[-1] not in tokenizer.all_special_ids
    for glue in ("", " "):
        assert tokenizer(row["prompt"] + glue + row["summary"])["input_ids"] == prompt + response
    text = row["summary"] + tokenizer.eos_token
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == [*response, tokenizer.eos_token_id]


def test_other_text_becomes_unknown_words_not_errors(world):
    _, tokenizer = world
    ids = tokenizer("My BOSS, zebra…", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["my", "boss", ",", "<unk>", "<unk>"]
    assert tokenizer("", add_special_tokens=False)["input_ids"] == []


def test_a_saved_model_folder_loads_with_the_same_ids(world, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    size, tokenizer = world
    model = LlamaForCausalLM(LlamaConfig(**model_config(size)))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for row in make_posts(size, 20, split="eval"):
        text = row["prompt"] + row["summary"]
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (
        len(tokenizer),
        loaded.eos_token_id,
        loaded.pad_token_id,
    )


@pytest.mark.parametrize(("size", "low", "high"), [("small", 150_000, 300_000), ("medium", 2_000_000, 8_000_000)])
def test_model_sizes(size, low, high):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**model_config(size)))
    assert low <= sum(p.numel() for p in model.parameters()) <= high
