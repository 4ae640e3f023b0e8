"""lm-eval runs on what isdaa writes: its real evaluator, offline, on a task of three lines that the test makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from chains import jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed (requirements-dev.txt has it)")

ROWS = [
    {"question": "What is in basket 1?", "choices": ["In it you find a pear.", "No idea!"], "answer": 0},
    {"question": "Who knocks?", "choices": ["No idea!", "The neighbour.", "A cat."], "answer": 1},
    {"question": "Is it far?", "choices": ["No.", "Yes, a mile."], "answer": 1},
]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a multiple-choice task and its data."""
    folder = tmp_path_factory.mktemp("task")
    data = jsonl(folder / "rows.jsonl", ROWS)
    settings = {
        "task": "baskets",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "baskets.yaml").write_text(yaml.safe_dump(settings))
    return folder


def expected(folder: str) -> tuple[list[list[float]], float]:
    """Log-likelihood of every choice, and the accuracy, by transformers alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    logps = []
    for row in ROWS:
        prompt = tokenizer(row["question"])["input_ids"]
        logps.append([])
        for choice in row["choices"]:
            ids = tokenizer(f"{row['question']} {choice}")["input_ids"]
            with torch.no_grad():
                table = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            logps[-1].append(sum(float(table[i - 1, ids[i]]) for i in range(len(prompt), len(ids))))
    right = [max(range(len(values)), key=values.__getitem__) == row["answer"] for row, values in zip(ROWS, logps, strict=True)]
    return logps, sum(right) / len(ROWS)


def evaluated(task: Path, model_args: dict[str, Any]) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task), include_defaults=False)
    return simple_evaluate(
        "hf",
        model_args=model_args | {"device": "cpu", "dtype": "float32"},
        tasks=["baskets"],
        task_manager=manager,
        batch_size=2,
        bootstrap_iters=0,
    )


@pytest.mark.parametrize("name", ["full/model", "full/checkpoints/checkpoint-2", "lora/model"])
def test_lm_eval_reads_a_model_and_gives_transformers_numbers(place: Path, task: Path, name: str) -> None:
    found = evaluated(task, {"pretrained": name})
    logps, accuracy = expected(name)
    assert found["results"]["baskets"]["acc,none"] == pytest.approx(accuracy)
    samples = sorted(found["samples"]["baskets"], key=lambda sample: sample["doc_id"])
    for sample, values in zip(samples, logps, strict=True):
        assert [answer[0][0] for answer in sample["resps"]] == pytest.approx(values, rel=1e-4)


def test_lm_eval_reads_an_adapter_beside_its_base(place: Path, task: Path) -> None:
    found = evaluated(task, {"pretrained": "my_model", "peft": "lora/checkpoints/checkpoint-2"})
    samples = sorted(found["samples"]["baskets"], key=lambda sample: sample["doc_id"])
    for sample, values in zip(samples, expected("lora/model")[0], strict=True):
        assert [answer[0][0] for answer in sample["resps"]] == pytest.approx(values, rel=1e-4)


def test_the_command_line_does_the_same(place: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.__main__ import cli_evaluate

    command = f"lm_eval run --model hf --model_args pretrained=full/model,dtype=float32 --tasks baskets --include_path {task}"
    monkeypatch.setattr("sys.argv", [*command.split(), "--device", "cpu", "--output_path", str(tmp_path)])
    cli_evaluate()
    (written,) = tmp_path.rglob("results_*.json")
    assert json.loads(written.read_text())["results"]["baskets"]["acc,none"] == pytest.approx(expected("full/model")[1])
