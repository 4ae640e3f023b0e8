"""End to end: a tiny model of random weights behind `transformers serve` is asked both orders of real benchmark questions."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from evaluation_helpers import TOKENIZER, save, tiny
from judge_server import judge

from isdaa.errors import UserError
from isdaa.evaluation.benchmarks import TLDR, games
from isdaa.evaluation.benchmarks.benchmark import Answer, Judged, Question, Scoring
from isdaa.evaluation.judges import Question as Asked
from isdaa.evaluation.judges import Reply

TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
PATIENCE = 90  # seconds until the server must have come up


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address and model name of a running `transformers serve`."""
    folder = tmp_path_factory.mktemp("serve")
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = TEMPLATE
    model = save(tiny(), folder / "model", tokenizer)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", program, "serve", model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HOME": str(folder / "home")})
    try:
        deadline = time.monotonic() + PATIENCE
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
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def test_transformers_serve_is_a_judge(served: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    url, model = served
    questions = [Question(str(i), f"post {i}", response="the cat ran away") for i in range(3)]
    pairs = [(question, Answer(question.id, "model", ("my brother wrote a letter",))) for question in questions]
    opponents = TLDR.opponents(questions)
    asked = [one for question, answer in pairs for one in TLDR.judge_questions(question, answer, opponents[question.id])]
    requests = [Asked(one.messages, max_tokens=8, logprobs=5) for one in asked]
    asking = judge(url, tmp_path / "replies.jsonl", model=model, concurrency=2, timeout_s=60)
    replies = asking.ask(requests)
    assert all(isinstance(reply, Reply) and reply.completion_tokens and reply.prompt_tokens for reply in replies)
    # It ignores the wish for log-probabilities: nothing is made up in their place.
    assert all(isinstance(reply, Reply) and reply.first_token_logprobs is None for reply in replies)
    assert asking.usage.requests == 6 and asking.usage.failures == 0 and asking.usage.completion_tokens > 0

    verdicts = [TLDR.parse(one, reply) for one, reply in zip(asked, replies, strict=True) if isinstance(reply, Reply)]
    cases = [
        Judged(question, answer, opponents[question.id], tuple(verdicts[2 * i : 2 * i + 2]), model)
        for i, (question, answer) in enumerate(pairs)
    ]
    score = TLDR.score({"model": cases}, Scoring(resamples=100))["model"]
    assert score.counts["replies"] == 6
    assert score.counts["unparsed"] == sum(one.value is None for one in verdicts) == 6  # random words
    assert games.flip_rate(cases) is None

    again = judge("http://127.0.0.1:1/v1", tmp_path / "replies.jsonl", model=model)
    assert [reply.text for reply in again.ask(requests) if isinstance(reply, Reply)] == [
        reply.text for reply in replies if isinstance(reply, Reply)
    ]
    assert again.usage.requests == 0
    with pytest.raises(UserError, match=r"answered 400: Server is pinned to .*requested 'other'"):
        judge(url, model="other").ask(requests)
