"""kill -9 while the models of a benchmark answer: what was drawn stays, the rest is drawn once, and no answer changes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from benchmark_run_helpers import chat_model
from patience import HANGS

import isdaa.models.sampling.sampling
from isdaa.cli import main
from isdaa.foreign import read_jsonl

QUESTIONS, BEFORE = 24, 5  # of each of two models; answers that must be there before the kill


def command(models: list[str], output: Path, batch_size: int) -> list[str]:
    words = ["benchmark", "alpaca_eval", "--model_path", *models, "--questions", "project"]
    return [*words, "--output", str(output), "--max_new_tokens", "32", "--evaluation.batch_size", str(batch_size)]


@pytest.mark.slow  # ten seconds, most of them for imports
def test_a_kill_while_generating_costs_no_finished_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [chat_model(tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    store = tmp_path / "out" / "generations.jsonl"
    with open(tmp_path / "log.txt", "wb") as log:
        program = [sys.executable, "-m", "isdaa.cli", *command(models, tmp_path / "out", 1)]
        process = subprocess.Popen(program, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    deadline = time.monotonic() + HANGS
    while process.poll() is None and time.monotonic() < deadline:
        if store.exists() and store.read_bytes().count(b"\n") >= BEFORE:
            break
        time.sleep(0.002)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL, (tmp_path / "log.txt").read_text()
    lines = store.read_bytes().split(b"\n")[:-1]  # half a line may follow
    assert BEFORE <= len(lines) < 2 * QUESTIONS, "it was not met while it generated"

    drawn: list[int] = []
    sample = isdaa.models.sampling.sampling.sample

    def counting(model: Any, prompts: Any, *rest: Any, **more: Any) -> Any:
        drawn.append(len(prompts))
        return sample(model, prompts, *rest, **more)

    monkeypatch.setattr(isdaa.models.sampling.sampling, "sample", counting)
    assert main(command(models, tmp_path / "out", 64)) == 0
    assert sum(drawn) == 2 * QUESTIONS - len(lines)
    assert store.read_bytes().split(b"\n")[: len(lines)] == lines
    assert main(command(models, tmp_path / "whole", 64)) == 0
    texts = [{row["key"]: row["text"] for row in read_jsonl(tmp_path / name / "generations.jsonl")} for name in ("out", "whole")]
    assert texts[0] == texts[1] and len(texts[0]) == 2 * QUESTIONS
    for label in ("one", "two"):
        files = [(tmp_path / name / "answers" / f"{label}.json").read_bytes() for name in ("out", "whole")]
        assert files[0] == files[1]
