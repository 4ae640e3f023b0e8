"""Replies on disk: killed, torn, written by several processes, never asked for twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from judge_server import Answer, ask, asks, completion, judge, replying, serving
from patience import HANGS

from isdaa.errors import UserError
from isdaa.evaluation.judges.cache import ReplyCache
from isdaa.evaluation.judges.judge import Reply
from isdaa.evaluation.judges.types import request_key

CHILD = """
import sys
from judge_server import asks, judge
asking = judge(sys.argv[1], sys.argv[2], concurrency=int(sys.argv[3]))
replies = asking.ask(asks(int(sys.argv[4])))
assert all(reply.text == "A" for reply in replies)
"""


def child(url: str, cache: Path, concurrency: int, n: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CHILD, url, str(cache), str(concurrency), str(n)]
    paths = [str(Path(__file__).parent), *sys.path]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))})


def test_what_kill_9_left_is_not_asked_again(tmp_path: Path) -> None:
    cache = tmp_path / "replies.jsonl"
    with serving(lambda number, body: Answer(delay=0.02)) as server:
        process = child(server.url, cache, 2, 60)
        try:
            deadline = time.monotonic() + 30
            while (not cache.exists() or cache.read_bytes().count(b"\n") < 10) and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.2)  # requests on their way
        kept = cache.read_bytes().count(b"\n")
        before = server.contents()
        assert 10 <= kept < 60 and len(before) <= kept + 2
        # The kill may also fall into the middle of a line.
        torn = cache.read_bytes()
        cache.write_bytes(torn[:-25])
        asking = judge(server, cache)
        assert all(isinstance(reply, Reply) and reply.text == "A" for reply in asking.ask(asks(60)))
        assert asking.usage.cached == kept - 1
        assert len(server.asked) - len(before) == 60 - (kept - 1)
        asked = len(server.asked)
        assert all(isinstance(reply, Reply) and reply.cached for reply in judge(server, cache).ask(asks(60)))
        assert len(server.asked) == asked
    assert len([json.loads(line) for line in cache.read_bytes().splitlines()]) == 60


def test_two_processes_that_write_at_once_lose_no_reply(tmp_path: Path) -> None:
    cache = tmp_path / "replies.jsonl"
    with serving(replying()) as server:
        both = [child(server.url, cache, 8, 60) for _ in range(2)]
        assert [process.wait(timeout=HANGS) for process in both] == [0, 0]
    assert len([json.loads(line) for line in cache.read_bytes().splitlines()]) == len(server.asked) >= 60
    assert len(ReplyCache(cache)) == 60


def test_a_reply_is_on_disk_before_the_next_question_is_asked(tmp_path: Path) -> None:
    cache = tmp_path / "replies.jsonl"
    lines = []

    def behaviour(number: int, body: dict[str, Any]) -> Answer:
        lines.append(cache.read_bytes().count(b"\n"))
        return Answer()

    with serving(behaviour) as server:
        judge(server, cache, concurrency=1).ask(asks(4))
    assert lines == [0, 1, 2, 3]


def test_another_model_message_or_setting_is_another_question(tmp_path: Path) -> None:
    cache = tmp_path / "replies.jsonl"
    with serving(replying()) as server:
        judge(server, cache).ask(asks(1))
        for changes in ({"model": "other-judge"}, {"temperature": 1.0}, {"logprobs": 2}, {"seed": 1}):
            judge(server, cache, **changes).ask(asks(1))
        judge(server, cache).ask([ask("another")])
        assert len(server.asked) == 6
        # What does not change the reply does not change the key; a reply that ended by itself is the same at any limit.
        judge(server, cache, concurrency=1, retries=0, timeout_s=3, max_requests=9, price_in=1, price_out=1).ask(asks(1))
        for limit in (3, 3000):
            judge(server, cache, max_tokens=limit).ask(asks(1))
        assert len(server.asked) == 6
    with serving(replying("never asked")) as elsewhere:
        (reply,) = judge(elsewhere, cache).ask(asks(1))
        assert reply == Reply("A", None, 10, 2, True, "stop", "served-name") and not elsewhere.asked


def test_cut_replies_alone_are_asked_again_when_the_limit_is_raised(tmp_path: Path) -> None:
    cache = tmp_path / "replies.jsonl"

    def behaviour(number: int, body: dict[str, Any]) -> Answer:
        cut = "question 1" in str(body) and body["max_tokens"] < 100
        return Answer(body=completion("first of all", finish_reason="length")) if cut else Answer("B")

    def reasons(limit: int) -> list[str | None]:
        return [reply.finish_reason for reply in judge(server, cache, max_tokens=limit).ask(asks(3)) if isinstance(reply, Reply)]

    with serving(behaviour) as server:
        assert reasons(50) == reasons(50) == reasons(40) == ["stop", "length", "stop"]
        assert len(server.asked) == 3
        assert reasons(60) == ["stop", "length", "stop"] and len(server.asked) == 4
        assert reasons(200) == reasons(200) == ["stop"] * 3 and len(server.asked) == 5
        assert reasons(50) == ["stop"] * 3 and len(server.asked) == 5  # what was paid for and is whole stays


def test_replies_of_an_earlier_version_are_found(tmp_path: Path) -> None:
    """Their keys had the limit in them, and their lines neither endpoint nor ways."""
    cache = tmp_path / "replies.jsonl"
    with serving(replying("B")) as server:
        judge(server, cache).ask(asks(2))
        records = [json.loads(line) for line in cache.read_text().splitlines()]
        for record in records:
            record["judge_reply"] = "0" * 24
            for name in ("endpoint", "ways"):
                del record[name]
            for name in ("thinking", "limit"):
                del record["reply"][name]
        cache.write_text("".join(json.dumps(record) + "\n" for record in records))
        judge(server, cache).ask(asks(2))
    assert len(server.asked) == 2


def test_a_cached_reply_is_the_reply_and_names_its_request(tmp_path: Path) -> None:
    cache = tmp_path / "replies.jsonl"
    reply = Reply("Überraschung\u2028\n\x00", {"m": -0.25, "M": -9999.0}, 3, None, False, "stop", None)
    request = {"model": "judge", "messages": [], "max_tokens": 4}
    ReplyCache(cache).add(request, reply)
    read = ReplyCache(cache).get(request_key(request), 4)
    assert read == Reply(**{**vars(reply), "cached": True})
    (line,) = cache.read_text(encoding="utf-8").split("\n")[:-1]
    assert json.loads(line)["request"] == request


def test_damaged_lines_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = tmp_path / "replies.jsonl"
    requests = [{"model": name, "messages": [], "max_tokens": 4} for name in "ab"]
    for request in requests:
        ReplyCache(cache).add(request, Reply("A"))
    first, second = cache.read_bytes().splitlines(keepends=True)
    odd = b'{"judge_reply": "c3", "reply": {"text": 3}}\n{"judge_reply": 1, "reply": {"text": ""}}\n[1]\n\n'
    cache.write_bytes(first[:30] + b"\n" + odd + second)
    again = ReplyCache(cache)
    found = [again.get(request_key(request), 4) for request in requests]
    assert len(again) == 1 and found[0] is None and found[1] is not None
    assert "passed over 4 lines" in caplog.text


@pytest.mark.parametrize("content", ['{"prompt": "x"}\n', "[1, 2]", "text\n"])
def test_another_programs_file_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match="holds something else than a judge's replies"):
        ReplyCache(file)
    assert file.read_text() == content


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no plain file"):
        ReplyCache(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be kept there"):
        ReplyCache(tmp_path / "file" / "replies.jsonl")
