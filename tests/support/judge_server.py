"""A chat-completions endpoint on loopback that misbehaves as a test tells it to, and remembers what it was asked."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from isdaa.evaluation.judges.judge import Judge, JudgeSettings, Question


@dataclass
class Answer:
    """One HTTP response. cut: the connection ends halfway through the body, or with 0 before a byte is sent."""

    text: str = "A"
    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: float | None = None

    def content(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        return json.dumps(completion(self.text) if self.body is None else self.body).encode()


def completion(text: str | None, **changes: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"} | changes
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
    return {"id": "1", "object": "chat.completion", "model": "served-name", "choices": [choice], "usage": usage}


def streamed(text: str, *, end: str | None = "stop", done: bool = True, field: str = "content") -> bytes:
    """A chat completion of these letters as a stream of events. end: its reason; done: whether `[DONE]` follows."""
    parts = [{"choices": [{"delta": {"role": "assistant"}}]}]
    parts += [{"choices": [{"delta": {field: letter}, "finish_reason": None}]} for letter in text]
    parts += [{"choices": [{"delta": {}, "finish_reason": end}]}] if end else []
    parts += [{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}]
    lines = [": keep alive", *(f"data: {json.dumps(part)}" for part in parts), *(["data: [DONE]"] if done else [])]
    return "\n\n".join(lines).encode() + b"\n\n"


# Told the number of the request (from 0) and its body.
Behaviour = Callable[[int, dict[str, Any]], Answer]


class JudgeServer:
    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.models: list[str] = ["judge", "other-judge"]
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def contents(self) -> list[str]:
        """The last message of every request, in the order they came."""
        return [body["messages"][-1]["content"] for body in self.asked]

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # a body after its headers would wait 40 ms for their receipt

            def do_GET(self) -> None:
                listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in server.models]}
                self._send(Answer(status=200 if server.models else 404, body=listed))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with server.lock:
                    number = len(server.asked)
                    server.asked.append(body)
                    server.paths.append(self.path)
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    server.in_flight += 1
                    server.most_in_flight = max(server.most_in_flight, server.in_flight)
                try:
                    answer = server.behaviour(number, body)
                    time.sleep(answer.delay)
                finally:
                    with server.lock:
                        server.in_flight -= 1
                self._send(answer)

            def _send(self, answer: Answer) -> None:
                content = answer.content()
                if answer.cut is not None:
                    self.close_connection = True
                if answer.cut == 0:
                    return
                self.send_response(answer.status)
                for name, value in ({"content-type": "application/json"} | answer.headers).items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: int(len(content) * (1 if answer.cut is None else answer.cut))])

            def log_message(self, *arguments: Any) -> None:
                pass

        return Handler


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[JudgeServer]:
    server = JudgeServer(behaviour)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


def replying(text: str = "A") -> Behaviour:
    return lambda number, body: Answer(text)


def scripted(*answers: Answer) -> Behaviour:
    """One answer after the other; the last one for ever."""
    return lambda number, body: answers[min(number, len(answers) - 1)]


class Sleeps:
    """Stands in for the waiting: notes how long, and does not wait."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def judge(server: JudgeServer | str, cache: Any = None, sleep: Any = None, **settings: Any) -> Judge:
    url = server if isinstance(server, str) else server.url
    return Judge(JudgeSettings(**({"model": "judge", "base_url": url} | settings)), cache, sleep=sleep or Sleeps())


def ask(text: str, **overrides: Any) -> Question:
    return Question(({"role": "user", "content": text},), **overrides)


def asks(n: int, start: int = 0) -> list[Question]:
    return [ask(f"question {i}") for i in range(start, start + n)]


def sides(body: dict[str, Any]) -> tuple[str, str]:
    """What a question about a pair has between the markers of A and of B."""
    words = body["messages"][-1]["content"]
    found = [re.search(rf"<<<(\w+ {letter})\n(.*)\n\1>>>", words, re.DOTALL) for letter in "AB"]
    assert found[0] and found[1]
    return found[0][2], found[1][2]
