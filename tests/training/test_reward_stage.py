"""The `reward` stage: what is saved is what plain transformers scores, and what it is worth on pairs that it never saw."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from chains import chat_model, jsonl, read_lines, train
from real_tokenizers import build
from tokenizers_for_tests import byte_level
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from isdaa.errors import UserError
from isdaa.evaluation.scorers import RewardModelScorer, about
from isdaa.evaluation.statistics import share_interval
from isdaa.training.stages import sft_and_reward

PAIRS = 24


def its_data(home: Path) -> dict[str, Any]:
    return {"model.path": str(home / "base"), "data.pairs": str(home / "pairs.jsonl"), "data.eval_fraction": 0.4}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`: a reward model trained on conversations, two a prompt, with a tokenizer that pads with what ends a response."""
    home = tmp_path_factory.mktemp("reward")
    tokenizer = byte_level("chatml", pad=None)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    chat_model(home / "base", tokenizer)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Question {i // 2}: what is it?"}],
            "chosen": [{"role": "assistant", "content": f"It is number {i}, I think."}],
            "rejected": [{"role": "assistant", "content": "no " * (i % 3 + 1)}],
        }
        for i in range(PAIRS)
    ]
    jsonl(home / "pairs.jsonl", rows)
    settings = {
        "stages": ["reward"],
        **its_data(home),
        "tokenization.max_length": 120,
        "tokenization.max_prompt_length": 80,
        "reward.max_steps": 3,
        "reward.batch_size": 4,
        "reward.learning_rate": 1e-2,
        "reward.warmup_steps": 0,
        "reward.logging_steps": 1,
        "reward.eval_steps": 2,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft_and_reward, "WATCHED", 6)
        assert train(home / "run", settings) == 0
    return home


def test_plain_transformers_gives_the_same_score(home: Path) -> None:
    folder = home / "run" / "reward"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    rows = [{"id": str(i), **row} for i, row in enumerate(read_lines(home / "pairs.jsonl")[:5])]
    chats = [row["prompt"] + row["chosen"] for row in rows]
    batch = tokenizer.apply_chat_template(chats, tokenize=True, padding=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].tolist()
    scorer = RewardModelScorer(folder, batch_size=3)
    scores = scorer.score([row | {"response": row["chosen"], "finished": True} for row in rows])
    assert scores == pytest.approx(expected, abs=1e-5)
    assert "'\\n' after '<|im_end|>'" in about(scorer)[0]


def test_a_tokenizer_with_nothing_to_pad_with_but_eos(tmp_path: Path) -> None:
    """GPT-2's: rows are read before the EOS, by plain transformers and so by isdaa, and the run says so."""
    tokenizer = build("gpt2")
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"Question {i}:", "chosen": f" It is {i}.", "rejected": " no"} for i in range(8)]
    jsonl(tmp_path / "pairs.jsonl", rows)
    settings = {"stages": ["reward"], "model.path": str(tmp_path / "base"), "data.pairs": str(tmp_path / "pairs.jsonl")}
    assert train(tmp_path / "run", settings | {"reward.max_steps": 1, "data.eval_fraction": 0}) == 0
    stage = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["reward"]
    assert any("does not depend on whether a response ended" in note for note in stage["notes"])
    assert any("no held-out pairs" in note for note in stage["notes"]) and "held_out" not in stage
    folder = tmp_path / "run" / "reward"
    model, found = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = found([row["prompt"] + row["chosen"] + found.eos_token for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].tolist()
    scorer = RewardModelScorer(folder)
    asked = [{"id": str(i), "prompt": row["prompt"], "response": row["chosen"], "finished": True} for i, row in enumerate(rows)]
    assert scorer.score(asked) == pytest.approx(expected, abs=1e-5) and len(about(scorer)) == 1


def test_it_is_trained_where_it_is_read(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    tokenize = sft_and_reward.tokenize_pairs

    def kept(rows: Any, *given: Any, **more: Any) -> Any:
        return seen.setdefault(len(rows), tokenize(rows, *given, **more))

    monkeypatch.setattr(sft_and_reward, "tokenize_pairs", kept)
    settings = {"stages": ["reward"], "model.path": str(home / "base"), "data.pairs": str(home / "pairs.jsonl")}
    assert train(tmp_path / "run", settings | {"reward.max_steps": 1, "data.eval_fraction": 0.4}) == 0
    row = read_lines(home / "pairs.jsonl")[0]
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    ids = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=True, return_dict=False)
    trained = [pair["prompt_ids"] + pair["chosen_ids"] for tokens, _ in seen.values() for pair in tokens]
    assert len(trained) == PAIRS and ids in trained


def test_what_it_is_worth_is_told_in_every_place(home: Path) -> None:
    run, folder = home / "run", home / "run" / "reward"
    stage = json.loads((run / "run.json").read_text())["stages"]["reward"]
    worth = stage["held_out"]
    lines = read_lines(folder / "metrics.jsonl")
    watched = [line for line in lines if "eval/accuracy" in line]
    assert [(line["step"], line["eval/pairs"]) for line in watched] == [(2, 6), (3, 6), (3, worth["pairs"])]
    assert all(line["eval/accuracy_low"] <= line["eval/accuracy"] <= line["eval/accuracy_high"] for line in watched)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    # By the scorer, from the held-out rows themselves.
    scorer = RewardModelScorer(folder)
    held = [note for note in stage["notes"] if note.startswith("held-out pairs: ")]
    assert held == [f"held-out pairs: {worth['pairs']} of {worth['pairs']} rows kept"] and worth["prompts"] == worth["pairs"] / 2
    record = json.loads((folder / "isdaa.json").read_text())
    assert record["held_out"] == worth and record["position"] == "template_end"
    assert watched[-1]["eval/accuracy"] == worth["accuracy"]
    words = about(scorer)[1]
    assert (
        words
        == f"agrees with {worth['accuracy']:.2f} ({worth['low']:.2f}–{worth['high']:.2f}) of {worth['pairs']} held-out pairs"
    )
    assert words in (folder / "README.md").read_text() and f"the reward model {words}" in stage["notes"]


def test_the_guard_and_label_say_what_their_scorer_is_worth(home: Path, tmp_path: Path) -> None:
    scorer = str(home / "run" / "reward")
    settings = {
        "stages": ["align"],
        **its_data(home),
        "align.max_steps": 1,
        "align.batch_size": 4,
        "align.probe": False,
        "guard.steps": 1,
        "guard.prompts": 4,
        "guard.scorer": scorer,
        "guard.opponent_samples": 1,
        "evaluation.prompts": 2,
        "evaluation.max_new_tokens": 4,
    }
    assert train(tmp_path / "run", settings) == 0
    notes = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["align"]["notes"]
    read, agrees = about(RewardModelScorer(scorer))
    assert f"guard: scorer {scorer}: {read}" in notes
    assert any(note.startswith("guard: ") and "best win rate" in note and agrees in note for note in notes)


def test_its_accuracy_is_that_of_its_scores(home: Path) -> None:
    rows = [{"id": str(i), **row} for i, row in enumerate(read_lines(home / "pairs.jsonl"))]
    scorer = RewardModelScorer(home / "run" / "reward")
    chosen, rejected = (
        scorer.score([r | {"response": r[side], "finished": True} for r in rows]) for side in ("chosen", "rejected")
    )
    from isdaa.config import Config
    from isdaa.training.stages.pair_split import read_pairs

    data = {"pairs": str(home / "pairs.jsonl"), "eval_fraction": 0.4}
    held = read_pairs(Config.model_validate({"model": {"path": "x"}, "data": data}), str(home / "pairs.jsonl")).held
    assert held is not None
    asked = {row["prompt"][0]["content"] for row in held}
    right = [c > r for c, r, row in zip(chosen, rejected, rows, strict=True) if row["prompt"][0]["content"] in asked]
    worth = json.loads((home / "run" / "run.json").read_text())["stages"]["reward"]["held_out"]
    assert len(right) == worth["pairs"] and np.mean(right) == pytest.approx(worth["accuracy"])


def test_of_very_many_held_out_pairs_the_first_are_measured(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft_and_reward, "MEASURED", 4)
    settings = {"stages": ["reward"], "model.path": str(home / "base"), "data.pairs": str(home / "pairs.jsonl")}
    assert train(tmp_path / "run", settings | {"reward.max_steps": 1, "data.eval_fraction": 0.4}) == 0
    stage = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["reward"]
    assert stage["held_out"]["pairs"] == 4
    assert any(note.startswith("held-out pairs: the first 4 of") for note in stage["notes"])


def figures(scores: list[list[float]], prompts: list[str]) -> dict[str, float]:
    return sft_and_reward.held_out_figures(prompts, SimpleNamespace(predictions=np.array(scores)))


def test_figures_of_held_out_pairs() -> None:
    found = figures([[1, 0], [2, 2], [0, 1], [3, 1]], ["a", "a", "b", "c"])
    assert found["accuracy"] == 2.5 / 4 and found["pairs"] == 4 and found["prompts"] == 3  # a tie counts a half
    assert found["loss"] == pytest.approx(np.mean([np.log1p(np.exp(-1)), np.log(2), np.log1p(np.exp(1)), np.log1p(np.exp(-2))]))
    assert found["margin"] == pytest.approx(0.5)
    with pytest.raises(UserError, match="not finite"):
        figures([[1, float("nan")]], ["a"])


def test_an_interval_that_knows_few_pairs_and_pairs_of_one_prompt() -> None:
    plain = share_interval([1] * 7 + [0] * 3, list(range(10)))
    assert (plain.mean, plain.n) == (0.7, 10)
    assert (plain.low, plain.high) == pytest.approx((0.3968, 0.8922), abs=1e-4)  # Wilson's, from the formula
    sure = share_interval([1] * 12, list(range(12)))
    assert sure.high == 1 and sure.low == pytest.approx(0.7575, abs=1e-4)
    hits = [1, 1, 0, 0] * 25
    apart, together = share_interval(hits, list(range(100))), share_interval(hits, [i // 2 for i in range(100)])
    half = share_interval([1, 0] * 25, list(range(50)))
    assert together.low == pytest.approx(half.low, abs=2e-3) and apart.low is not None and together.low < apart.low - 0.02
    with pytest.raises(ValueError, match="one group each"):
        share_interval([1, 0], ["a"])


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        share = np.repeat(rng.beta(6, 2, size=30), 2)  # two pairs a prompt, which go together
        found = share_interval((rng.random(60) < share).astype(float), [i // 2 for i in range(60)])
        assert found.low is not None and found.high is not None
        covered.append(found.low <= 0.75 <= found.high)
    assert 0.92 <= np.mean(covered) <= 0.99
