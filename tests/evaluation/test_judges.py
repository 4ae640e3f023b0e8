"""The judge's client against an endpoint that misbehaves in every way that endpoints do."""

from __future__ import annotations

import asyncio
import math
import socket
import sys
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from judge_server import Answer, Sleeps, ask, asks, completion, judge, replying, scripted, serving

from isdaa.errors import UserError
from isdaa.evaluation.judges.client import address, read_answer, retry_after
from isdaa.evaluation.judges.judge import JudgeSettings, NoReply, Reply


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def texts(replies: list[Reply | NoReply]) -> list[str]:
    return [reply.text if isinstance(reply, Reply) else f"none: {reply.reason}" for reply in replies]


def echo(number: int, body: dict[str, Any]) -> Answer:
    return Answer(f"reply to {body['messages'][-1]['content']}")


def test_replies_come_in_the_order_asked_and_equal_questions_are_asked_once() -> None:
    def slow_first(number: int, body: dict[str, Any]) -> Answer:
        return Answer(echo(number, body).text, delay=0.05 if "question 1" in str(body) else 0)

    with serving(slow_first) as server:
        asking = judge(server)
        replies = asking.ask([*asks(6), *asks(3)])
    assert texts(replies) == [f"reply to question {i}" for i in (0, 1, 2, 3, 4, 5, 0, 1, 2)]
    assert sorted(server.contents()) == [f"question {i}" for i in range(6)]
    usage = asking.usage
    assert (usage.requests, usage.cached, usage.prompt_tokens, usage.completion_tokens) == (6, 3, 60, 12)


def test_what_is_sent_are_the_settings_with_a_questions_own_before_them() -> None:
    with serving(replying()) as server:
        asking = judge(server, temperature=0.5, max_tokens=7, logprobs=5, seed=3)
        asking.ask([ask("plain"), ask("own", temperature=0.0, max_tokens=9, logprobs=2, seed=4)])
        judge(server, temperature=None).ask([ask("bare")])
    common = {"model": "judge", "logprobs": True}
    plain, own, bare = server.asked
    assert plain == common | {
        "messages": [{"role": "user", "content": "plain"}],
        "temperature": 0.5,
        "max_tokens": 7,
        "top_logprobs": 5,
        "seed": 3,
    }
    assert {**own, "messages": 0} == common | {"messages": 0, "temperature": 0.0, "max_tokens": 9, "top_logprobs": 2, "seed": 4}
    assert set(bare) == {"model", "messages", "max_tokens"}


def test_log_probabilities_of_the_first_token_are_read_and_same_words_count_together() -> None:
    entries = [{"token": "m", "logprob": math.log(0.5)}, {"token": "M", "logprob": math.log(0.25)}]
    entries += [{"token": "m", "logprob": math.log(0.125)}, {"token": "x", "logprob": -math.inf}]
    logprobs = {"content": [{"token": "m", "logprob": 0, "top_logprobs": entries}, {"token": "!", "top_logprobs": []}]}
    with serving(lambda number, body: Answer(body=completion("m!", logprobs=logprobs))) as server:
        (reply,) = judge(server, logprobs=4).ask(asks(1))
    assert isinstance(reply, Reply) and reply.first_token_logprobs is not None
    found = {token: math.exp(value) for token, value in reply.first_token_logprobs.items()}
    assert found == pytest.approx({"m": 0.625, "M": 0.25, "x": 0.0})
    assert reply.model == "served-name" and reply.finish_reason == "stop"


# --- what goes better the next time


def test_429_without_a_wait_backs_off_ever_longer() -> None:
    with serving(scripted(*[Answer(status=429, body={"error": {"message": "slow down"}})] * 3, Answer("B"))) as server:
        sleep = Sleeps()
        asking = judge(server, sleep=sleep)
        assert texts(asking.ask(asks(1))) == ["B"]
    assert len(server.asked) == 4 and asking.usage.retries == 3
    first, second, third = sleep.seconds
    assert 0.5 <= first <= 1 <= second <= 2 <= third <= 4


def test_429_with_retry_after_is_waited_for_by_every_request() -> None:
    with serving(scripted(Answer("A"), Answer(status=429, headers={"retry-after": "7"}), Answer("B"))) as server:
        sleep = Sleeps()
        asking = judge(server, sleep=sleep, concurrency=1)
        assert texts(asking.ask(asks(3))) == ["A", "B", "B"]
    waits = [seconds for seconds in sleep.seconds if seconds > 5]
    assert waits and all(6 < seconds <= 7 for seconds in waits)


def test_a_wait_of_hours_leaves_the_rest_for_the_next_call(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(scripted(Answer(), Answer(status=429, headers={"retry-after": "86400"}))) as server:
        asking = judge(server, concurrency=1)
        first, second, *others = asking.ask(asks(9))
    assert isinstance(first, Reply) and isinstance(second, NoReply) and second.kind == "rate-limited"
    assert all(isinstance(reply, NoReply) and reply.unasked for reply in others) and len(server.asked) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "7 of 9 questions to the judge were not asked" in said and "a pause of 86400 s; the same command goes on" in said


def test_spent_credit_is_not_tried_again() -> None:
    body = {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}
    with serving(scripted(Answer(status=429, body=body))) as server, pytest.raises(UserError, match="credit is spent"):
        judge(server).ask(asks(2))
    assert len(server.asked) == 1


def test_retry_after_is_a_number_or_a_date_or_milliseconds() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    later = format_datetime(now + timedelta(seconds=90), usegmt=True)
    assert retry_after({"retry-after": later}, now.timestamp()) == 90
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after": "-1"}) == 0
    assert retry_after({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    endless = f"Mon, 01 Jan {'9' * 30} 00:00:00 GMT"
    assert [retry_after({"retry-after": word}) for word in ("soon", "nan", "inf", endless)] == [None] * 4
    assert retry_after({}) is None


@pytest.mark.parametrize(
    "trouble",
    [
        Answer(status=500),
        Answer(status=503, body=b"<html>upstream</html>", headers={"content-type": "text/html"}),
        Answer(status=408),
        Answer(cut=0),
        Answer(cut=0.5),
        Answer(body=b'{"choices": [{"mess'),
        Answer(body=b"\xff\xfe"),
        Answer(body=b""),
        Answer(body=b"[" * 100_000),
        Answer(body=b"data:" * 100_000 + b'"error"'),
        Answer(body={"choices": []}),
        Answer(body={"choices": [{"message": None}]}),
        Answer(body=[1]),
        Answer(body={"error": {"message": "overloaded"}}),
        Answer(text=""),
        Answer(text=" \n"),
        Answer(body=completion(None)),
    ],
    ids=lambda answer: f"{answer.status} {answer.cut} {answer.content()[:20]!r}",
)
def test_momentary_trouble_is_tried_again(trouble: Answer) -> None:
    with serving(scripted(trouble, trouble, Answer("B"))) as server:
        asking = judge(server)
        assert texts(asking.ask(asks(1))) == ["B"]
    assert len(server.asked) == asking.usage.requests == 3
    assert asking.usage.retries == 2 and asking.usage.failures == 0


def test_a_request_that_takes_too_long_is_cut_off_even_where_bytes_keep_coming() -> None:
    with serving(scripted(Answer(delay=3), Answer("B"))) as server:
        assert texts(judge(server, timeout_s=0.2).ask(asks(1))) == ["B"]
    with socket.create_server(("127.0.0.1", 0)) as dripping:
        replies = asyncio.run(_drip(dripping))
    assert all(isinstance(reply, NoReply) and "no answer within 0.2 s" in reply.reason for reply in replies)


async def _drip(listening: socket.socket) -> list[Reply | NoReply]:
    async def one_byte_at_a_time(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for byte in b"HTTP/1.1 200 OK\r\n" + b"x-padding: 1\r\n" * 1000:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.01)

    server = await asyncio.start_server(one_byte_at_a_time, sock=listening)
    async with server:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        return await asyncio.to_thread(judge(url, timeout_s=0.2, retries=1).ask, asks(3))


# --- what does not


def test_a_question_that_always_fails_has_no_reply_and_is_asked_again_by_the_next_run() -> None:
    def behaviour(number: int, body: dict[str, Any]) -> Answer:
        return Answer(status=500, body={"error": "bad luck"}) if "question 1" in str(body) else echo(number, body)

    with serving(behaviour) as server:
        asking = judge(server, retries=2)
        replies = asking.ask(asks(3))
        assert texts(replies)[::2] == ["reply to question 0", "reply to question 2"]
        assert isinstance(replies[1], NoReply) and not replies[1].unasked
        assert "answered 500: bad luck" in replies[1].reason
        assert (asking.usage.failures, asking.usage.retries, len(server.asked)) == (1, 2, 5)
        server.behaviour = echo
        assert texts(asking.ask(asks(3)))[1] == "reply to question 1"
        assert len(server.asked) == 6


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(body=completion("", finish_reason="content_filter")), "the judge refused"),
        (Answer(body=completion(None, message={"content": None, "refusal": "I cannot"})), "the judge refused: I cannot"),
        (Answer(body=completion("A", finish_reason="tool_calls")), "called a tool"),
        (Answer(status=400, body={"message": "maximum context length is 4 tokens: 9 input tokens"}), "too long for the judge"),
        (Answer(status=403, body={"error": {"message": "your input was flagged"}}), "content filter"),
        (Answer(status=413, body=b""), "too long for the judge"),
        (Answer(status=400, body={"error": {"message": "x", "code": "content_filter"}}), "content filter"),
        (Answer(status=400, body={"error": {"message": "odd"}}), "answered 400: odd"),
        (Answer(status=400, body=b'{"a": ' * 700 + b"1" + b"}" * 700), 'answered 400: {"a": {"a"'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_with_one_question_is_not_tried_again_and_stops_nothing(answer: Answer, reason: str) -> None:
    with serving(lambda number, body: answer if "question 1" in str(body) else Answer("A")) as server:
        replies = judge(server).ask(asks(3))
    assert isinstance(replies[1], NoReply) and reason in replies[1].reason
    assert texts(replies)[::2] == ["A", "A"] and len(server.asked) == 3


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_missing_or_wrong_ends_at_once_and_names_the_variable(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(scripted(Answer(status=status))) as server:
        with pytest.raises(UserError, match=rf"{server.url} answered {status}: it asks for a key.*OPENAI_API_KEY"):
            judge(server).ask(asks(9))
        monkeypatch.setenv("MY_KEY", "sk-very-secret-indeed")
        with pytest.raises(UserError, match=r"does not accept the key in the environment variable MY_KEY"):
            judge(server, key_variable="MY_KEY").ask(asks(9))
    assert len(server.asked) == 2


def test_an_unknown_model_is_named_with_the_nearest_and_those_served() -> None:
    body = {"error": {"message": "The model does not exist", "code": "model_not_found"}}
    with serving(scripted(Answer(status=404, body=body))) as server:
        with pytest.raises(UserError, match=r"serves no model 'judg' \(did you mean \"judge\"\?\); it serves judge, other-judge"):
            judge(server, model="judg").ask(asks(3))
        server.models = []
        with pytest.raises(UserError, match=r"answered 404: The model does not exist; check the judge's address .*/v1"):
            judge(server).ask(asks(3))
    assert len(server.asked) == 2


def test_an_address_without_v1_is_pointed_at() -> None:
    """Also where the endpoint lists its models there."""
    with serving(scripted(Answer(status=404, body=b""))) as server:
        with pytest.raises(UserError, match=r"answered 404; check the judge's address \(it ends in /v1"):
            judge(server.url.removesuffix("/v1")).ask(asks(3))
        with pytest.raises(UserError, match=r"answered 404; check the judge's model and settings"):
            judge(server.url).ask(asks(3))


def test_a_complaint_that_nobody_knows_ends_the_run_when_three_questions_in_a_row_get_it() -> None:
    odd = Answer(status=400, body={"error": {"message": "colour must be blue"}})
    line = r"answered 400: colour must be blue; check .* settings"
    with serving(scripted(odd)) as server, pytest.raises(UserError, match=line):
        judge(server).ask(asks(9))
    assert len(server.asked) == 3
    with serving(lambda number, body: odd if number % 3 else Answer("A")) as server:  # two, a reply, two, a reply
        replies = judge(server, concurrency=1).ask(asks(30))
    assert [isinstance(reply, NoReply) and reply.kind for reply in replies] == [False, "rejected", "rejected"] * 10


def test_a_redirection_is_not_followed() -> None:
    with serving(replying()) as target:
        answer = Answer(status=307, headers={"location": f"{target.url}/chat/completions?x=1"})
        with serving(scripted(answer)) as server, pytest.raises(UserError, match=rf"redirects to {target.url}; give"):
            judge(server).ask(asks(1))
    assert not target.asked
    nowhere = Answer(status=307, headers={"location": "http://["})
    with serving(scripted(nowhere)) as server, pytest.raises(UserError, match="redirects to elsewhere; give"):
        judge(server).ask(asks(1))


def test_no_server_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=rf"no reply from the judge at http://127.0.0.1:{port}/v1: the connection failed"):
        judge(f"http://127.0.0.1:{port}/v1", retries=1).ask(asks(5))


def test_an_endpoint_that_never_replies_is_given_up_after_three_questions() -> None:
    with serving(scripted(Answer(text=""))) as server, pytest.raises(UserError, match="the reply is empty"):
        judge(server, retries=1).ask(asks(50))
    assert len(server.asked) == 6


def test_an_endpoint_that_dies_is_given_up_and_the_rest_is_left(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda number, body: Answer(status=500) if 5 <= number < 50 else Answer("A")) as server:
        asking = judge(server, tmp_path / "cache.jsonl", concurrency=2, retries=0)
        replies = asking.ask(asks(100))
        # Five answered and nine not, in a row; another may be in flight then, and one failed before the fifth answer was read.
        assert 14 <= len(server.asked) <= 16 and len(asking.cache) == 5
    assert sum(isinstance(reply, NoReply) and reply.unasked for reply in replies) == 100 - len(server.asked)
    assert "9 questions in a row without a reply" in " ".join(capsys.readouterr().err.split())


def test_text_that_is_no_unicode_is_a_question_without_a_reply() -> None:
    with serving(scripted(Answer(body=completion("half \ud800 a pair")))) as server:
        replies = judge(server).ask([ask("broken \ud800"), ask("whole")])
    assert isinstance(replies[0], NoReply) and "Unicode" in replies[0].reason
    assert texts(replies)[1] == "half \ufffd a pair" and len(server.asked) == 1


# --- limits


def test_no_more_requests_are_in_flight_than_allowed() -> None:
    with serving(lambda number, body: Answer(delay=0.05)) as server:
        judge(server, concurrency=3).ask(asks(13))
    assert server.most_in_flight == 3 and len(server.asked) == 13


def test_the_first_question_goes_alone_until_the_judge_has_answered() -> None:
    def behaviour(number: int, body: dict[str, Any]) -> Answer:
        assert number > 3 or server.in_flight == 1
        return Answer(status=500 if number < 3 else 200, delay=0.05)

    with serving(behaviour) as server:
        assert set(texts(judge(server, concurrency=4).ask(asks(9)))) == {"A"}
    assert server.contents()[:4] == ["question 0"] * 4 and server.most_in_flight > 1


def test_the_budget_stops_after_that_many_requests_and_says_how_to_go_on(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(lambda number, body: Answer(status=500) if number % 3 == 1 else Answer("A")) as server:
        asking = judge(server, tmp_path / "cache.jsonl", max_requests=8)
        replies = asking.ask([*asks(20), *asks(2)])
        assert len(server.asked) == asking.usage.requests == 8
        left = sum(isinstance(reply, NoReply) and reply.unasked for reply in replies[:20])
        assert left == asking.usage.unasked == 20 - len(asking.cache) > 10
        assert f"{left} of 20 questions to the judge were not asked: the 8 requests of --max_requests are used up" in " ".join(
            capsys.readouterr().err.split()
        )
        answered = len(asking.cache)
        again = judge(server, tmp_path / "cache.jsonl", max_requests=0)
        assert sum(isinstance(reply, Reply) for reply in again.ask(asks(20))) == answered
        assert len(server.asked) == 8 and again.usage.requests == 0


def test_cost_counts_every_billed_token_and_says_what_it_does_not_know() -> None:
    uncounted = {"choices": [{"message": {"content": "A"}}]}
    with serving(scripted(Answer(), Answer(text=""), Answer(), Answer(body=uncounted))) as server:
        asking = judge(server, price_in=1.0, price_out=10.0)
        asking.ask(asks(3))
    usage = asking.usage
    assert (usage.requests, usage.prompt_tokens, usage.completion_tokens, usage.uncounted) == (4, 30, 6, 1)
    assert usage.cost == pytest.approx((30 * 1 + 6 * 10) / 1e6)
    assert judge(server).usage.cost is None
    assert "4 requests" in str(usage) and "cost 0.00" in str(usage)


# --- addresses and settings


@pytest.mark.parametrize(
    ("url", "used"),
    [
        ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
        (" https://host/openai ", "https://host/openai"),
        ("http://[::1]:80/v1", "http://[::1]:80/v1"),
    ],
)
def test_addresses(url: str, used: str) -> None:
    assert address(url) == (used, None)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "http://host:port/v1", "http://[::1"])
def test_what_is_no_address_is_one_line(url: str) -> None:
    with pytest.raises(UserError, match="http://localhost:8000/v1"):
        address(url)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model": " "}, "name is empty"),
        ({"temperature": -1}, "temperature must be at least 0, got -1"),
        ({"temperature": math.nan}, "temperature must be at least 0"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"logprobs": 21}, "logprobs must be between 1 and 20"),
        ({"price_in": 1.0}, "both prices"),
        ({"ways": ("no sytem",)}, r"ways: 'no sytem' is unknown .*did you mean \"no system\""),
    ],
)
def test_settings_that_make_no_sense_are_one_line(change: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        JudgeSettings(**({"model": "judge"} | change))


def test_openais_own_endpoint_needs_a_key_before_any_work() -> None:
    asking = judge("https://api.openai.com/v1")
    with pytest.raises(UserError, match="needs a key: set the environment variable OPENAI_API_KEY"):
        asking.ready()
    with serving(replying()) as server:
        judge(server).ready()


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'isdaa\[judge\]'"):
        judge("http://localhost:1/v1").ask(asks(1))


def test_a_running_event_loop_is_no_hindrance() -> None:
    async def notebook() -> list[Reply | NoReply]:
        return judge(server).ask(asks(2))

    with serving(replying("B")) as server:
        assert texts(asyncio.run(notebook())) == ["B", "B"]


def test_parts_of_content_are_joined() -> None:
    reply = read_answer('{"choices": [{"message": {"content": [{"type": "text", "text": "a"}, {"text": "b"}]}}]}')
    assert isinstance(reply, Reply) and reply.text == "ab" and reply.prompt_tokens is None
