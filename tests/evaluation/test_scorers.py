"""Scorers: the gold reward, a reward model against its own plain forward, and what cannot be scored."""

import hashlib
import logging
import math

import pytest
import torch
from evaluation_helpers import TOKENIZER, config, reward_model, save, tiny, world_rows
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from isdaa.data.tokenize_pairs import tokenize_prompt, tokenize_response
from isdaa.errors import UserError
from isdaa.evaluation.scorers import GoldScorer, RewardModelScorer, load_scorer
from isdaa.world import build_tokenizer, gold_reward, make_posts


def rows_with(*responses: tuple[str, bool]) -> list[dict]:
    rows = world_rows(len(responses))
    return [row | {"response": text, "finished": done} for row, (text, done) in zip(rows, responses, strict=True)]


def test_gold_is_the_worlds_reward_of_text_or_message():
    rows = rows_with(("my boss is rude.", True), ("my boss is rude.", False), ("", True))
    scores = load_scorer("gold").score(rows)
    assert scores == [gold_reward(row["facts"], row["response"], row["finished"]) for row in rows]
    message = [{**row, "response": [{"role": "assistant", "content": row["response"]}]} for row in rows]
    assert GoldScorer().score(message) == scores


def test_gold_without_facts_names_the_row():
    row = {"id": "a", "where": "prompts.jsonl:3", "prompt": "p", "facts": None, "response": "r", "finished": True}
    with pytest.raises(UserError, match=r"prompts.jsonl:3.*facts.*--scorer"):
        GoldScorer().score([row])


def test_reward_model_equals_one_row_at_a_time(tmp_path):
    path = reward_model(tmp_path / "reward")
    rows = rows_with(*[(row["chosen"], i % 3 != 0) for i, row in enumerate(world_rows(9))], ("", True), ("", False))
    batched = RewardModelScorer(path, batch_size=4).score(rows)
    model = AutoModelForSequenceClassification.from_pretrained(path)
    for row, score in zip(rows, batched, strict=True):
        response = tokenize_response(row["prompt"], row["response"], TOKENIZER, finished=row["finished"] or not row["response"])
        assert (response[-1] == TOKENIZER.eos_token_id) == (row["finished"] or not row["response"])
        with torch.no_grad():
            expected = model(torch.tensor([tokenize_prompt(row, TOKENIZER) + response])).logits.item()
        assert score == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_without_a_pad_token_takes_the_tokenizers(tmp_path):
    torch.manual_seed(3)
    model = LlamaForSequenceClassification(config(num_labels=1, pad_token_id=None)).eval()
    rows = rows_with(*[(row["chosen"], True) for row in world_rows(3)])
    scores = RewardModelScorer(save(model, tmp_path / "no_pad")).score(rows)
    assert scores == pytest.approx(RewardModelScorer(reward_model(tmp_path / "padded")).score(rows), abs=1e-5)


def test_eos_is_scored_where_it_is_the_pad_token_too_if_it_is_asked_for(tmp_path):
    tokenizer = build_tokenizer("small")
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(3)
    model = LlamaForSequenceClassification(config(num_labels=1, pad_token_id=tokenizer.eos_token_id)).eval()
    path = save(model, tmp_path / "reward", tokenizer)
    texts = [row["chosen"] for row in world_rows(3)]
    rows = rows_with(*[(text, True) for text in texts]) + rows_with(*[(text, False) for text in texts])
    scorer = RewardModelScorer(path, batch_size=4, position="response_end")
    scores = scorer.score(rows)
    model.config.pad_token_id = None  # then transformers takes the last token, of one row at a time
    with torch.no_grad():
        expected = [model(torch.tensor([ids])).logits.item() for ids in scorer.token_ids(rows)]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert all(abs(ended - cut) > 1e-3 for ended, cut in zip(scores[:3], scores[3:], strict=True))


def test_a_response_that_does_not_fit_is_cut_and_said(tmp_path, caplog):
    scorer = RewardModelScorer(reward_model(tmp_path / "short", max_position_embeddings=40), max_prompt_length=30)
    with caplog.at_level(logging.WARNING):
        ids = scorer.token_ids(rows_with(("my boss is rude. " * 10, True)))
    assert len(ids[0]) == 40
    assert "cut" in caplog.text


def test_digests_tell_scorers_apart(tmp_path):
    first, same, other = (reward_model(tmp_path / str(i), seed=seed) for i, seed in enumerate((3, 3, 4)))
    digests = [RewardModelScorer(path).digest for path in (first, same, other)]
    assert digests[0] == digests[1] != digests[2]
    assert RewardModelScorer(first, max_prompt_length=9).digest != digests[0]


def test_the_gold_judge_scores_as_its_digest_says() -> None:
    """Folders keep scores under the digest: scores that change need another one. 3 600 of them, 784 different."""
    scores = []
    for size in ("small", "medium"):
        posts = make_posts(size, 300, split="prompts")
        for post, other in zip(posts, posts[1:] + posts[:1], strict=True):
            own, strange = post["summary"], other["summary"]
            texts = (own, strange, f"{own} {strange}", post["prompt"], "", own[:40])
            scores += [round(gold_reward(post["facts"], text), 6) for text in texts]
    found = hashlib.sha256(repr(scores).encode()).hexdigest()[:24]
    assert (GoldScorer.digest, found) == ("87de42710d3c83d00c2c4b9e", "15dfb1e64e306a338e065da5")


def test_scores_that_are_no_numbers_name_the_row(tmp_path):
    torch.manual_seed(3)
    model = LlamaForSequenceClassification(config(num_labels=1))
    with torch.no_grad():
        model.score.weight.fill_(1e38)
        model.model.norm.weight.fill_(1e5)  # finite weights, infinite sums
    rows = rows_with(("my boss is rude.", True))
    with pytest.raises(UserError, match=rf"{rows[0]['where']}.*(nan|inf)"):
        RewardModelScorer(save(model, tmp_path / "large")).score(rows)
    with torch.no_grad():
        model.score.weight.fill_(math.nan)
    with pytest.raises(UserError, match=r"nan: weights are not finite"):
        RewardModelScorer(save(model, tmp_path / "nan")).score(rows)


def test_what_is_no_reward_model(tmp_path):
    with pytest.raises(UserError, match=r"glod.*did you mean \"gold\""):
        load_scorer("glod")
    with pytest.raises(UserError, match="no such folder"):
        load_scorer("./nowhere")
    rows = rows_with(("a", True))
    with pytest.raises(UserError, match="no trained reward head"):
        load_scorer(save(tiny(), tmp_path / "lm")).score(rows)
    two = save(LlamaForSequenceClassification(config(num_labels=2)), tmp_path / "two")
    with pytest.raises(UserError, match=r"two labels.*scorer.label"):
        load_scorer(two).score(rows)
