"""What tools and users say inside a response is read by the model and takes no part in logps, lengths and losses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_helpers import VOCABULARY, tiny_model, token_rows, with_reference
from trl import __file__ as trl_file

from isdaa.data.collation import collate
from isdaa.data.context import as_read, unscored
from isdaa.data.pairs import canonical_pair
from isdaa.data.reading.sources import as_dataset
from isdaa.data.tokenize_pairs import TokenizationSettings, tokenize_pairs
from isdaa.models.packed.forward import PairForward, prepare
from isdaa.training.trainer.batches import TokenisedPairs
from isdaa.training.trainer.packing import packed

TEMPLATES = Path(trl_file).parent / "chat_templates"
USER = {"role": "user", "content": "How much is 1 + 2?"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}],
}
TOOL = {"role": "tool", "content": "3"}  # it stands in the call, too
MORE = {"role": "user", "content": "Sure?"}
SUM = {"role": "assistant", "content": "It is 3."}


def masked_rows() -> list[dict[str, Any]]:
    rows = token_rows(6, seed=3)
    for row in rows[:4]:
        row["chosen_ids"] = [5, 6, *unscored([7, 8, 9]), 10, 2]
    rows[1]["rejected_ids"] = [5, 6, 7, 8, 9, 10, 2]  # the same tokens, all scored
    return rows


@pytest.mark.parametrize("mode", ["shared_prefix", "two_rows"])
def test_logps_are_sums_over_the_scored_tokens(mode: str) -> None:
    model = tiny_model()
    rows = masked_rows()
    ids, layout = packed(collate(rows))
    assert int(ids.min()) >= 0
    forward = prepare(model)
    with torch.no_grad():
        found = PairForward(model, mode, **({} if mode == "shared_prefix" else {"switch": forward.switch}))(
            model, ids, None, layout, True
        )
        for i, row in enumerate(rows):
            for name, logps, wpo in (
                ("chosen", found.chosen_logps, found.chosen_wpo),
                ("rejected", found.rejected_logps, found.rejected_wpo),
            ):
                response = row[f"{name}_ids"]
                whole = torch.tensor([*row["prompt_ids"], *as_read(response)])
                logs = torch.log_softmax(model(input_ids=whole[None]).logits[0].float(), -1)[len(row["prompt_ids"]) - 1 : -1]
                tokens = logs.gather(1, torch.tensor(as_read(response))[:, None])[:, 0]
                scored = torch.tensor([token >= 0 for token in response])
                assert float(logps[i]) == pytest.approx(float(tokens[scored].sum()), abs=1e-4)
                assert wpo is not None
                expected = (tokens - logs.exp().square().sum(-1).log())[scored].mean()
                assert float(wpo[i]) == pytest.approx(float(expected), abs=1e-4)


def test_lengths_count_scored_tokens_and_digests_see_the_mask() -> None:
    batch = collate(masked_rows())
    assert batch.chosen_lengths[:4].tolist() == [7] * 4 and batch.chosen_scored[:4].tolist() == [4] * 4
    assert batch.rejected_scored.tolist() == batch.rejected_lengths.tolist()
    pairs = TokenisedPairs(masked_rows())
    assert pairs.extent()[0] < VOCABULARY
    plain = [row | {"chosen_ids": as_read(row["chosen_ids"])} for row in masked_rows()]
    assert pairs.content_digest() != TokenisedPairs(plain).content_digest()


def test_the_gradient_of_what_is_not_scored_is_none() -> None:
    """The logps of a response do not change with a token of a tool that comes after everything that is scored but the end."""
    model = tiny_model()
    rows = masked_rows()[:1]
    pairs = with_reference(rows, model)
    plain = with_reference([row | {"chosen_ids": as_read(row["chosen_ids"])} for row in rows], model)
    names = ("reference_chosen_logps", "reference_rejected_logps")
    (masked, rejected), (all_scored, same) = ([found.floats[name][0] for name in names] for found in (pairs, plain))
    assert masked > all_scored and rejected == pytest.approx(same, abs=1e-5)


def byte_level(template: str) -> Any:
    """A tokenizer with a published template, whose tags are special tokens."""
    from tokenizers_for_tests import byte_level as build

    tokenizer = build("chatml")
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(set(re.findall(r"<\|\w+\|>", tokenizer.chat_template)))})
    return tokenizer


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "llama3_2", "glm4moe", "qwen3_8", "gptoss", "lfm2"])
def test_only_the_assistants_words_of_a_response_are_scored(template: str) -> None:
    tokenizer = byte_level(template)
    cases: list[list[Any]] = [[SUM, MORE, SUM | {"content": "Quite."}]]
    if template not in ("lfm2",):
        cases.append([CALL, TOOL, SUM])
    for answers in cases:
        row = canonical_pair({"prompt": [USER], "chosen": answers, "rejected": [SUM | {"content": "No idea."}]}, "pairs.jsonl:1")
        (pair,), _ = tokenize_pairs(as_dataset([row]), tokenizer, TokenizationSettings(10_000, 9_000))
        ids = np.array(pair["chosen_ids"])
        said = "".join(
            tokenizer.decode(as_read(part.tolist()))
            for part in np.split(ids, np.flatnonzero(np.diff(ids >= 0)) + 1)
            if part[0] >= 0
        )
        others = "".join(
            tokenizer.decode(as_read(part.tolist()))
            for part in np.split(ids, np.flatnonzero(np.diff(ids >= 0)) + 1)
            if part[0] < 0
        )
        for answer in answers:
            words = answer["content"] or "add"
            mine = answer["role"] == "assistant"
            assert words in (said if mine else others), (template, said, others)
            assert mine or answer["content"] == "3" or answer["content"] not in said
        prompt = tokenizer.decode(pair["prompt_ids"])
        whole = tokenizer.apply_chat_template([USER, *answers], tokenize=False)
        assert whole.startswith(prompt + tokenizer.decode(as_read(pair["chosen_ids"])).removesuffix(tokenizer.eos_token))
        assert all(token >= 0 for token in pair["rejected_ids"]) and pair["chosen_ids"][-1] >= 0
