"""End to end: a tiny model behind `transformers serve` judges both orders of real benchmark questions, and a whole benchmark."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmark_run_helpers import judge_of_one_word
from evaluation_helpers import save, tiny
from judge_server import judge
from patience import HANGS

from isdaa.cli import main
from isdaa.errors import UserError
from isdaa.evaluation.benchmarks import TLDR
from isdaa.evaluation.benchmarks.sets import games
from isdaa.evaluation.benchmarks.sets.benchmark import Answer, Judged, Question, Scoring
from isdaa.evaluation.judges.judge import Question as Asked
from isdaa.evaluation.judges.judge import Reply
from isdaa.foreign import read_json


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address and model name of a running `transformers serve`; the model prefers whatever comes first."""
    folder = tmp_path_factory.mktemp("serve")
    model = judge_of_one_word(folder / "model", "A")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", program, "serve", model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HOME": str(folder / "home")})
    try:
        deadline = time.monotonic() + HANGS
        while not _is_up(f"http://127.0.0.1:{port}/health"):
            words = (folder / "log.txt").read_text()
            assert process.poll() is None and time.monotonic() < deadline, words
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        process.kill()
        process.wait()


def _is_up(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=30) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.mark.slow
def test_transformers_serve_is_a_judge(served: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    url, model = served
    questions = [Question(str(i), f"post {i}", response="the cat ran away") for i in range(3)]
    pairs = [(question, Answer(question.id, "model", ("my brother wrote a letter",))) for question in questions]
    opponents = TLDR.opponents(questions)
    asked = [one for question, answer in pairs for one in TLDR.judge_questions(question, answer, opponents[question.id])]
    requests = [Asked(one.messages, max_tokens=8, logprobs=5) for one in asked]
    asking = judge(url, tmp_path / "replies.jsonl", model=model, concurrency=2, timeout_s=600)
    replies = asking.ask(requests)
    assert all(isinstance(reply, Reply) and reply.completion_tokens and reply.prompt_tokens for reply in replies)
    assert [reply.text for reply in replies if isinstance(reply, Reply)] == ["A"] * 6
    # It ignores the wish for log-probabilities: nothing is made up in their place.
    assert all(isinstance(reply, Reply) and reply.first_token_logprobs is None for reply in replies)
    assert asking.usage.requests == 6 and asking.usage.failures == 0 and asking.usage.completion_tokens > 0

    verdicts = [TLDR.parse(one, reply) for one, reply in zip(asked, replies, strict=True) if isinstance(reply, Reply)]
    cases = [
        Judged(question, answer, opponents[question.id], tuple(verdicts[2 * i : 2 * i + 2]), model)
        for i, (question, answer) in enumerate(pairs)
    ]
    score = TLDR.score({"model": cases}, Scoring(resamples=100))["model"]
    assert score.counts["replies"] == 6 and score.counts["unparsed"] == 0
    assert score.figures["win_rate"].value == 0.5 and games.flip_rate(cases) == 1.0

    again = judge("http://127.0.0.1:1/v1", tmp_path / "replies.jsonl", model=model)
    assert [reply.text for reply in again.ask(requests) if isinstance(reply, Reply)] == [
        reply.text for reply in replies if isinstance(reply, Reply)
    ]
    assert again.usage.requests == 0
    with pytest.raises(UserError, match=r"answered 400: Server is pinned to .*requested 'other'"):
        judge(url, model="other").ask(requests)


def test_transformers_serve_judges_a_whole_benchmark(
    served: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    url, model = served
    out = tmp_path / "out"
    policy = save(tiny(seed=1), tmp_path / "policy")

    def command(address: str) -> list[str]:
        words = ["benchmark", "tldr", "--model_path", policy, "--questions", "world:small", "--split", "test"]
        words += ["--limit", "4", "--max_new_tokens", "8", "--evaluation.bootstrap", "100", "--output", str(out)]
        return [*words, "--judge_model", model, "--judge_base_url", address, "--judge_concurrency", "2", "--judge_timeout", "600"]

    assert main(command(url)) == 0
    metrics = read_json(out / "metrics.json")
    usage = metrics["judge"]["usage"]
    assert usage["requests"] == 8 and usage["failures"] == 0 and usage["prompt_tokens"] > 8 * usage["completion_tokens"] > 0
    (found,) = metrics["models"]
    assert found["figures"]["win_rate"]["mean"] == 0.5 and found["details"]["flip_rate"] == 1.0
    assert found["counts"]["replies"] == 8 and found["counts"]["unparsed"] == 0
    assert "contradicts itself" in " ".join(capsys.readouterr().out.split())
    questions = TLDR.read_questions("world:small", "test", 4)
    (file,) = (out / "judgments").rglob("*.jsonl")
    (judged,) = TLDR.read_judgments(file, questions, []).values()
    assert len(judged) == 4 and all(one.judge == model for one in judged)
    assert "contradicts itself" in (out / "report.html").read_text()

    assert main(command("http://127.0.0.1:1/v1")) == 0  # nobody there to ask again
    assert read_json(out / "metrics.json")["judge"]["usage"]["requests"] == 0
