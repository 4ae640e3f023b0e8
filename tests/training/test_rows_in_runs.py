"""What a row means reaches training, evaluation and the run's own files alike, and an earlier revision's tokens do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chains import ALIGN, chat_model, jsonl, plain_pairs, read_lines, refused, stopped_at, train
from own_records import write_own
from tokenizers_for_tests import byte_level

from isdaa.cli import main
from isdaa.data import token_cache
from isdaa.data.encoder import VERSION
from isdaa.data.reading.sources import load_pairs
from isdaa.evaluation.checkpoints.what_to_evaluate import requests

OFF = "{% if enable_thinking is false %}<think></think>{% endif %}"
THINKING = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}" + OFF + "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n" + OFF + "{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "rainfall", "parameters": {"type": "object"}}}


def conversations(count: int = 12, **columns: Any) -> list[dict[str, Any]]:
    rows = []
    for row in plain_pairs(count):
        answers = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
        rows.append({"prompt": [{"role": "user", "content": row["prompt"]}], **answers, **columns})
    return rows


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_level("chatml")
    tokenizer.chat_template = THINKING
    chat_model(tmp_path / "my_model", tokenizer, max_position_embeddings=512)
    return tmp_path


def test_a_run_that_began_under_other_rules_of_tokenisation_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jsonl(place / "pairs.jsonl", conversations())
    stopped_at(2, ALIGN | {"align.save_steps": 1, "align.max_steps": 4})
    state = json.loads((place / "run" / "run.json").read_text())
    assert state["stages"]["align"].pop("tokens") == VERSION  # what an earlier revision did not write
    write_own(place / "run" / "run.json", state)
    capsys.readouterr()
    assert train("run", ALIGN | {"align.save_steps": 1, "align.max_steps": 4}) == 2
    assert "rules of tokenisation" in capsys.readouterr().err
    state["stages"]["align"]["tokens"] = VERSION
    write_own(place / "run" / "run.json", state)
    assert train("run", ALIGN | {"align.save_steps": 1, "align.max_steps": 4}) == 0
    assert json.loads((place / "run" / "model" / "isdaa.json").read_text())["tokens"] == VERSION


def test_tokens_of_other_rules_are_made_anew(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(place / "pairs.jsonl", conversations())
    assert train("one", ALIGN) == 0
    made: list[int] = []
    original = token_cache.in_order
    monkeypatch.setattr(token_cache, "in_order", lambda *a: made.append(1) or original(*a))
    assert train("two", ALIGN) == 0 and not made
    monkeypatch.setattr("isdaa.data.encoder.VERSION", VERSION + 1)
    assert train("three", ALIGN) == 0 and made


def test_template_arguments_and_tools_are_the_same_in_training_and_evaluation(place: Path) -> None:
    jsonl(place / "pairs.jsonl", conversations(16, tools=[TOOL]))
    options = ALIGN | {"tokenization.chat_template_kwargs": {"enable_thinking": False}, "data.eval_fraction": 0.3}
    assert train("run", options) == 0
    request = requests(["run/model"], {})
    assert request.tokenization.chat_template_kwargs == {"enable_thinking": False}
    held, _ = load_pairs("run/eval_pairs.jsonl")
    assert all(row["tools"] == [TOOL] for row in held)
    assert main(["evaluate", "--model_path", "run/model", "--evaluation.max_new_tokens", "2"]) == 0
    prompts = [line for line in read_lines(place / "run" / "evaluation" / "samples.jsonl") if "prompt_ids" in line]
    tokenizer = byte_level("chatml")
    texts = {tokenizer.decode(row["prompt_ids"]) for row in prompts}
    assert texts and all("rainfall" in text and text.endswith("<think></think>") for text in texts)


def notes(run: str) -> str:
    """What a run said of its data."""
    return "\n".join(json.loads(Path(run, "run.json").read_text())["stages"]["align"]["notes"])


def test_dpo_keeps_rows_whose_behaviour_logps_it_does_not_use(place: Path) -> None:
    rows = conversations()
    long = {"chosen": [{"role": "assistant", "content": "word " * 200}], "chosen_logps": -3.0, "rejected_logps": -2.0}
    jsonl(place / "pairs.jsonl", [rows[0] | long, *rows[1:]])
    said = {}
    for method in ("dpo", "wpo", "is_dpo"):
        assert train(method, ALIGN | {"objective.method": method, "data.eval_fraction": 0.0}) == 0
        said[method] = notes(method)
    assert "12 of 12 rows kept" in said["dpo"] and "12 of 12 rows kept" in said["wpo"]
    assert "11 of 12 rows kept" in said["is_dpo"] and "behaviour logps are of the uncut response" in said["is_dpo"]


def test_a_subset_and_repeated_prompts_by_their_keys(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "local" / "small").mkdir(parents=True)
    rows = [row | {side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in plain_pairs(12)]
    jsonl(place / "local" / "small" / "train.jsonl", rows)
    options = ALIGN | {"data.pairs": "local", "data.subset": "small"}
    assert train("refused", options) == 2
    assert "data.prompt_repeated" in capsys.readouterr().err
    assert train("run", options | {"data.prompt_repeated": "strip", "data.eval_fraction": 0.3}) == 0
    said = notes("run")
    assert "have the prompt in column 'prompt' and again" in said and "chat template is not applied" in said
    held, _ = load_pairs("run/eval_pairs.jsonl", repeated="keep")
    assert not any(row["chosen"].startswith(row["prompt"]) for row in held)
    assert main(["evaluate", "--model_path", "run/model", "--evaluation.max_new_tokens", "2"]) == 0
    refused(
        capsys,
        ["train", "--data.pairs", "pairs.jsonl", "--model.path", "my_model", "--data.subset", "small"],
        "subset",
        "'small'",
    )


def without_version(file: Path) -> None:
    """A record as an earlier revision wrote it."""
    state = json.loads(file.read_text())
    for stage in state.get("stages", {}).values():
        stage.pop("tokens", None)
    state.pop("tokens", None)
    write_own(file, state)


def test_whatever_an_earlier_revision_finished_is_not_built_upon(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    jsonl(place / "pairs.jsonl", conversations(16))
    jsonl(place / "sft.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in plain_pairs(8)])
    both = ALIGN | {"data.sft": "sft.jsonl", "sft.max_steps": 1, "sft.warmup_steps": 0, "data.eval_fraction": 0.3}
    assert train("run", both, stages=["sft"]) == 0
    without_version(place / "run" / "run.json")
    assert train("run", both, stages=["sft", "align"]) == 2
    assert train("other", both, stages=["sft", "align"]) == 0
    without_version(place / "other" / "model" / "isdaa.json")
    requests(["other/model"], {})
    assert "earlier isdaa" in caplog.text


def test_behaviour_logps_are_of_their_own_tokens(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row | {side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in plain_pairs(4)]
    jsonl(place / "pairs.jsonl", [*rows, *plain_pairs(12)[4:]])
    settings = ["--tokenization.max_length", "200", "--tokenization.max_prompt_length", "120"]
    assert main(["logps", "--model_path", "my_model", "--data", "pairs.jsonl", "--output", "mu.jsonl", *settings]) == 0
    options = ALIGN | {"data.pairs": "mu.jsonl", "objective.method": "is_dpo"}
    assert train("same", options) == 0
    assert abs(read_lines(place / "same" / "metrics.jsonl")[0]["weights/log_weight_mean"]) < 1e-3
    capsys.readouterr()
    assert train("stripped", options | {"data.prompt_repeated": "strip"}) == 2
    assert "behaviour logps are of other tokens" in capsys.readouterr().err
    bare = [{k: v for k, v in row.items() if k != "behaviour_tokens"} for row in read_lines(place / "mu.jsonl")]
    jsonl(place / "bare.jsonl", bare)
    assert train("bare", options | {"data.pairs": "bare.jsonl", "data.prompt_repeated": "strip"}) == 2
    assert "--prompt_repeated strip" in capsys.readouterr().err
    again = ["--output", "again.jsonl", "--prompt_repeated", "strip", *settings]
    assert main(["logps", "--model_path", "my_model", "--data", "pairs.jsonl", *again]) == 0
    assert train("again", options | {"data.pairs": "again.jsonl"}) == 0
    assert train("plain", options | {"objective.method": "dpo", "data.prompt_repeated": "strip"}) == 0


def test_canonical_rows_are_the_same_read_again(place: Path) -> None:
    ask, one, two, three = (
        {"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "It is "), ("assistant", "7."), ("assistant", "8."))
    )
    rows = [
        {"chosen": [ask, one, two], "rejected": [ask, one, three]},
        {"prompt": [ask, one], "chosen": [two], "rejected": [three]},
        {"prompt": [ask], "chosen": [two], "rejected": [three], "tools": [TOOL], "chat_template_kwargs": {"a": 1}},
        {"prompt": "q", "chosen": " 7.", "rejected": " 8.", "weight": 0.5, "id": "x"},
        {"instruction": "q", "input": "i", "chosen": "7", "rejected": "8", "history": [["a", "b"]]},
    ]
    jsonl(place / "rows.jsonl", rows)
    first, _ = load_pairs("rows.jsonl")
    jsonl(place / "again.jsonl", [{k: v for k, v in row.items() if v is not None} for row in first])
    again, _ = load_pairs("again.jsonl")
    for row, other in zip(first, again, strict=True):
        assert {k: v for k, v in row.items() if k != "where"} == {k: v for k, v in other.items() if k != "where"}
    assert [row["prompt"][-1].get("prefix") for row in list(first)[:3]] == [False, True, None]
