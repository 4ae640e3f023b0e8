"""The key: from the environment alone, and in no file, log, error or representation, whatever the endpoint sends back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from judge_server import Answer, asks, completion, judge, scripted, serving
from patience import HANGS

from isdaa.cli import main
from isdaa.errors import UserError
from isdaa.evaluation.judges.client import address
from isdaa.evaluation.judges.judge import JudgeSettings, NoReply, Reply
from isdaa.evaluation.judges.secret import Secret, key_from_environment

KEY = "sk-9QzX7vLw3RbT5yKd1MnP"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def parts(text: str) -> list[str]:
    """Pieces of the key that a text holds."""
    return [KEY[i : i + 8] for i in range(len(KEY) - 7) if KEY[i : i + 8] in text]


def everything_of(error: BaseException) -> str:
    """An error as any program could print it: causes, contexts and every frame's local variables."""
    shown = traceback.TracebackException.from_exception(error, capture_locals=True)
    frames = [
        line
        for line in shown.format()
        # This test's own variables may hold the key.
        if "test_judge_key.py" not in line
    ]
    linked = f"{error!r} {error.__cause__!r} {error.__context__!r}"
    return "".join(frames) + linked


ECHOES = [
    Answer(status=401, body={"error": {"message": f"Incorrect API key provided: {KEY}"}}),
    Answer(status=401, body={"error": {"message": f"Incorrect API key provided: {KEY[:4]}***{KEY[-4:]}"}}),
    Answer(status=404, body={"error": {"message": f"no model for Bearer {KEY}"}}),
    Answer(status=400, body=f"Bearer {KEY} asked for something odd".encode()),
    Answer(status=400, body={"detail": [f"header {KEY[:12]}… cut, {KEY[10:]}"]}),
    Answer(status=429, body={"error": {"message": KEY}}, headers={"retry-after": "90000", "x-key": KEY}),
    Answer(status=307, headers={"location": f"http://127.0.0.1/{KEY}"}),
    Answer(status=500, body={"error": {"message": KEY}}, headers={"x-key": KEY}),
    Answer(body={"error": {"message": KEY}}),
    Answer(body=f"not JSON {KEY}".encode(), headers={"x-key": KEY}),
    Answer(body=completion(None, message={"content": "", "refusal": KEY})),
    Answer(body=completion(f"My key is {KEY}. A", finish_reason=KEY) | {"model": KEY}, headers={"set-cookie": f"k={KEY}"}),
    Answer(body=completion("A", logprobs={"content": [{"top_logprobs": [{"token": KEY, "logprob": -1.0}]}]})),
]


@pytest.mark.parametrize("echo", ECHOES, ids=lambda answer: f"{answer.status} {answer.content()[:24]!r}")
def test_an_endpoint_that_sends_the_key_back_cannot_make_it_show(
    echo: Answer, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(scripted(echo)) as server:
        server.models = [f"model-{KEY}"]
        asking = judge(server, tmp_path / "replies.jsonl", retries=1)
        shown = [repr(asking), repr(vars(asking)), repr(vars(asking._endpoint)), str(asking.settings)]
        replies: list[Reply | NoReply] = []
        try:
            replies = asking.ask(asks(4))
        except UserError as error:
            shown.append(everything_of(error))
            assert error.__cause__ is None
        assert replies or len(shown) == 5
        assert all(headers["authorization"] == f"Bearer {KEY}" for headers in server.headers)
    shown += [repr(replies), caplog.text, *capsys.readouterr()]
    shown += [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert parts("\n".join(shown)) == []
    if echo.status == 200 and replies and isinstance(replies[0], Reply):
        assert replies[0].text in ("A", "My key is [key]. A")


def test_the_check_above_can_fail() -> None:
    try:
        held = {"authorization": KEY}
        raise ValueError(held)
    except ValueError as error:
        assert parts(repr(error))
    assert parts(f"…{KEY[5:13]}…") and not parts(KEY[:7])


def test_the_libraries_do_log_what_is_taken_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(scripted(Answer(headers={"x-key": KEY}))) as server:
        judge(server).ask(asks(1))
    assert "'x-key'" in caplog.text and "[key]" in caplog.text


def test_the_key_is_in_no_setting_and_no_option_takes_it() -> None:
    names = [field.name for field in dataclasses.fields(JudgeSettings)]
    assert [name for name in names if "key" in name] == ["key_variable"]
    assert KEY not in json.dumps(dataclasses.asdict(JudgeSettings("judge")))


def test_another_variable_can_hold_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "  sk-from-the-other-variable\n")
    with serving(scripted(Answer())) as server:
        judge(server, key_variable="JUDGE_KEY").ask(asks(1))
        monkeypatch.delenv("OPENAI_API_KEY")
        judge(server).ask(asks(1))
    assert [headers["authorization"] for headers in server.headers] == ["Bearer sk-from-the-other-variable", "Bearer none"]


def test_a_key_in_the_place_of_its_variables_name_is_refused_unseen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="key_variable must name the environment variable") as caught:
        JudgeSettings("judge", key_variable=KEY)
    options = ["--answers", __file__, "--judge_model", "judge", "--judge_key_variable", KEY]
    assert main(["benchmark", "tldr", *options]) == 2
    shown = capsys.readouterr()
    assert "--judge_key_variable must name" in shown.err and not parts(shown.out + shown.err + str(caught.value))


@pytest.mark.parametrize("value", [f"{KEY}\r\nx: y", f"{KEY} {KEY}", f"{KEY}ß"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", value)
    with pytest.raises(UserError, match="OPENAI_API_KEY holds a space") as caught:
        key_from_environment("OPENAI_API_KEY")
    assert not parts(str(caught.value))


@pytest.mark.parametrize(
    "url", [f"https://user:{KEY}@host/v1", f"https://{KEY}@host/v1", f"https://host/v1?api_key={KEY}", f"https://host/v1#{KEY}"]
)
def test_a_secret_in_the_address_is_refused_unseen(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="for host holds a user, password or query") as caught:
        address(url)
    assert not parts(str(caught.value))
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(UserError, match="holds a user"):
        judge("", tmp_path / "replies.jsonl")


def test_a_secret_shows_nothing_and_takes_out_its_fragments() -> None:
    secret = Secret(KEY)
    assert repr(secret) == str(secret) == f"{secret}" == "[key]" and repr(Secret(None)) == "no key"
    assert not hasattr(secret, "__dict__")
    assert secret.scrub(f"a {KEY} b {KEY[3:14]} c {KEY[:7]}") == f"a [key] b [key] c {KEY[:7]}"
    assert Secret("EMPTY").scrub("an EMPTY word") == "an EMPTY word"
    assert Secret("hunter2").scrub("say hunter2!") == "say [key]!"
    assert secret.scrub("") == "" and Secret(None).scrub("text") == "text"


def test_a_program_that_dies_of_the_error_prints_no_key(tmp_path: Path) -> None:
    program = (
        "import logging, sys; logging.basicConfig(level=logging.DEBUG)\n"
        "from judge_server import asks, judge\njudge(sys.argv[1], 'replies.jsonl').ask(asks(3))\n"
    )
    body: dict[str, Any] = {"error": {"message": f"unknown setting for {KEY}"}}
    with serving(scripted(Answer(status=400, body=body, headers={"x-key": KEY}))) as server:
        paths = [str(Path(__file__).parent), *sys.path]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OPENAI_LOG": "debug"}
        command = [sys.executable, "-c", program, server.url]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 1 and "unknown setting for [key]" in done.stderr and "x-key" in done.stderr
    assert not parts(done.stdout + done.stderr + "".join(file.read_text() for file in tmp_path.iterdir()))
    with contextlib.suppress(FileNotFoundError):
        assert not parts(Path("replies.jsonl").read_text())
