# ruff: noqa: E501 - endpoints' words stand on one line each
"""What an endpoint does not take is learnt from its first complaint, in its own words; what has no room gets less of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judge_server import Answer, ask, asks, completion, judge, replying, serving, streamed

from isdaa.errors import UserError
from isdaa.evaluation.judges.client import address, read_answer, without_system
from isdaa.evaluation.judges.judge import NoReply, Question, Reply
from isdaa.evaluation.judges.wording import WAYS, is_too_long, room, way_of

SYSTEM = Question(({"role": "system", "content": "You judge."}, {"role": "user", "content": "Which?"}))


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def error(message: str, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", **more}}


def has(field: str) -> Callable[[dict[str, Any]], bool]:
    return lambda body: field in body


def has_system(body: dict[str, Any]) -> bool:
    return body["messages"][0]["role"] == "system"


# The way -> what is refused, status, the endpoint's words.
COMPLAINTS = [
    ("max_completion_tokens", has("max_tokens"), 400, error("Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.", param="max_tokens", code="unsupported_parameter")),
    ("max_completion_tokens", has("max_tokens"), 422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "max_tokens"], "msg": "Extra inputs are not permitted"}]}),
    ("no temperature", has("temperature"), 400, error("Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.", param="temperature")),
    ("no temperature", has("temperature"), 400, {"message": "`temperature` is deprecated for this model."}),
    ("no logprobs", has("logprobs"), 403, error("You are not allowed to request logprobs from this model.")),
    ("no logprobs", has("top_logprobs"), 400, [{"error": {"code": 400, "message": "Invalid JSON payload received. Unknown name \"top_logprobs\": Cannot find field.", "status": "INVALID_ARGUMENT"}}]),
    ("no seed", has("seed"), 400, [{"error": {"code": 400, "message": "Invalid JSON payload received. Unknown name \"seed\": Cannot find field."}}]),
    ("no system", has_system, 400, error("System role not supported")),
    ("no system", has_system, 400, {"object": "error", "message": "Conversation roles must alternate user/assistant/user/assistant/...", "code": 400}),
    ("no system", has_system, 400, error("Unsupported value: 'messages[0].role' does not support 'system' with this model.", param="messages[0].role")),
    ("no system", has_system, 400, error("Only user and assistant roles are supported!")),
    ("no system", has_system, 400, [{"error": {"code": 400, "message": "Developer instruction is not enabled for models/gemma"}}]),
    ("stream", lambda body: not body.get("stream"), 400, error("This model only supports streaming: set stream to true")),
    ("stream", lambda body: not body.get("stream"), 400, {"detail": "Stream must be set to true"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("way", "refuses", "status", "words"), COMPLAINTS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_first_complaint_teaches_and_is_remembered(
    way: str, refuses: Any, status: int, words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def behaviour(number: int, body: dict[str, Any]) -> Answer:
        if refuses(body):
            return Answer(status=status, body=words)
        return Answer(body=streamed("B") if body.get("stream") else None, text="B")

    def questions(start: int) -> list[Question]:
        return [Question((SYSTEM.messages[0], ask(f"question {i}").messages[0])) for i in range(start, start + 6)]

    with serving(behaviour) as server:
        asking = judge(server, tmp_path / "replies.jsonl", logprobs=5, seed=1)
        replies = asking.ask(questions(0))
        assert all(isinstance(reply, Reply) and reply.text == "B" for reply in replies), replies
        assert len(server.asked) == asking.usage.requests == 7 and not asking.usage.retries
        assert asking.about == ([WAYS[way]] if way != "max_completion_tokens" else [])
        said = " ".join(capsys.readouterr().err.split())
        assert said.count(f"the judge at {server.url} {WAYS[way]}") == 1
        # A later call knows it already, from the file of replies.
        again = judge(server, tmp_path / "replies.jsonl", logprobs=5, seed=1)
        assert len(again.ask(questions(3))) == 6 and len(server.asked) == 10
        assert not any(refuses(body) for body in server.asked[1:])
    told = judge("http://localhost:1/v1", ways=(way,))
    assert not told.about  # what the user said is no news


def test_several_complaints_in_a_row_and_requests_on_their_way_are_all_mended() -> None:
    refusals = {field: error(f"Unsupported parameter: '{field}'", param=field) for field in ("max_tokens", "temperature", "seed")}

    def behaviour(number: int, body: dict[str, Any]) -> Answer:
        found = next((field for field in refusals if field in body), None)
        # From the third question on only: so several requests are on their way when the first complaint comes.
        if number < 2 or found is None:
            return Answer("B", delay=0.02)
        return Answer(status=400, body=refusals[found], delay=0.05)

    with serving(behaviour) as server:
        replies = judge(server, seed=1, concurrency=4).ask(asks(12))
    assert all(isinstance(reply, Reply) for reply in replies)


def test_a_setting_that_was_not_sent_is_no_way_out() -> None:
    body = {"error": {"message": "temperature too hot in the data centre"}}
    with serving(lambda number, sent: Answer(status=400, body=body)) as server:
        (reply,) = judge(server, temperature=None).ask(asks(1))
    assert isinstance(reply, NoReply) and reply.kind == "rejected" and len(server.asked) == 1
    sent = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    for words in (
        "upstream closed the connection",
        "the seedling failed",
        "please proceed",
        "insufficient_system_resource",
        "The system is overloaded; message queue full",
    ):
        assert way_of(words, {**sent, "seed": 1}) is None, words


def test_what_did_not_help_is_not_kept_and_an_echo_of_the_prompt_teaches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FastAPI quotes what it got; and a word in a complaint need not be its reason."""
    echo = {"detail": [{"loc": ["body", "messages"], "msg": "bad", "input": "a question of temperature and seed"}]}
    guess = {"error": {"message": "temperature in the room is too high"}}

    def behaviour(number: int, body: dict[str, Any]) -> Answer:
        words = str(body["messages"])
        return (
            Answer(status=422, body=echo)
            if "question 1" in words
            else Answer(status=400, body=guess)
            if "question 2" in words
            else Answer("B")
        )

    with serving(behaviour) as server:
        asking = judge(server, tmp_path / "r.jsonl", seed=1, concurrency=1)
        kinds = [reply.kind if isinstance(reply, NoReply) else "" for reply in asking.ask(asks(5))]
        assert kinds == ["", "rejected", "rejected", "", ""] and not asking.about
        assert {"temperature", "seed"} <= server.asked[-1].keys()
    assert "takes no" not in capsys.readouterr().err and '"ways": []' in (tmp_path / "r.jsonl").read_text().splitlines()[-1]


def test_two_orders_of_a_question_are_one_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def behaviour(number: int, body: dict[str, Any]) -> Answer:
        return Answer(status=400, body=error("gremlin")) if "odd" in str(body["messages"]) else Answer("B")

    def questions(names: list[str]) -> list[Question]:
        return [Question(ask(f"{name}, order {order}").messages, of=name) for name in names for order in (1, 2, 3)]

    with serving(behaviour) as server:
        replies = judge(server, tmp_path / "r.jsonl", concurrency=1).ask(questions(["odd 1", "odd 2", "good", "odd 3"]))
        assert [isinstance(reply, Reply) for reply in replies] == [False] * 6 + [True] * 3 + [False] * 3
        again = judge(server, tmp_path / "r.jsonl").ask(questions(["odd 1", "odd 2", "good", "odd 3"]))
        assert [reply.kind for reply in again if isinstance(reply, NoReply)] == ["rejected"] * 9
        assert capsys.readouterr().err.count("gremlin") == 2  # once a call
        with pytest.raises(UserError, match="gremlin"):
            judge(server).ask(questions(["odd 1", "odd 2", "odd 3", "good"]))


def test_what_the_system_says_stands_before_the_user() -> None:
    talk = [("system", "a"), ("user", "b"), ("assistant", "c"), ("system", "d"), ("system", "e"), ("user", "f"), ("system", "g")]
    messages = [{"role": role, "content": content} for role, content in talk]
    found = [(message["role"], message["content"]) for message in without_system(messages)]
    assert found == [("user", "a\n\nb"), ("assistant", "c"), ("user", "d\n\ne\n\nf"), ("user", "g")]


# --- no room


# Words, the limit that was asked for, the one to try next.
LONG = [
    ("This model's maximum context length is 4096 tokens. However, you requested 4996 tokens (2996 in the messages, 2000 in the completion). Please reduce the length of the messages or completion.", 2000, 1100),
    ("'max_tokens' or 'max_completion_tokens' is too large: 4096. This model's maximum context length is 4096 tokens and your request has 128 input tokens (4096 > 4096 - 128).", 4096, 3968),
    ("This model's maximum context length is 2048 tokens. However, your request has 8 input tokens plus 2045 'max_tokens'. Please reduce one or the other.", 2045, 2040),
    ("You passed 4100 input tokens and requested 512 output tokens. However, the model's context length is only 4096 tokens, resulting in a maximum input length of 3584 tokens.", 512, None),
    ("max_tokens must be at least 1, got -186.", 512, 256),
    ("Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4000 `inputs` tokens and 512 `max_new_tokens`", 512, 96),
    ("Input validation error: `inputs` must have less than 1024 tokens. Given: 2000", 16, None),
    ('{"error":{"code":400,"message":"the request exceeds the available context size, try increasing it","type":"exceed_context_size_error","n_prompt_tokens":1407,"n_ctx":256}}', 512, None),
    ("request (5000 tokens) exceeds the available context size (4096 tokens), try increasing it", 512, None),
    ("The input token count (1200293) exceeds the maximum number of tokens allowed (1048576).", 32, None),
    ("prompt is too long: 210000 tokens > 200000 maximum", 64, None),
    (f"prompt is too long: {'9' * 5000} tokens > 200000 maximum", 64, 32),
    ("Sequence length 5000 exceeds model's maximum of 4096", 64, 32),
    ("Total tokens 5000 > max 4096", 64, 32),
    ("The prompt exceeds the model's context of 4096", 64, 32),
    ("input length and `max_tokens` exceed context limit: 199000 + 4096 > 200000, decrease input length or `max_tokens` and try again", 4096, 1000),
    ("Requested token count exceeds the model's maximum context length of 4096 tokens. You requested a total of 5000 tokens: 4000 tokens from the input messages and 1000 tokens for the completion.", 1000, 96),
    ("This endpoint's maximum context length is 4096 tokens. However, you requested about 5000 tokens (3000 of text input, 2000 in the output).", 2000, 1096),
    ("`max_tokens` must be less than or equal to `1024`, the maximum value for `max_tokens` is less than the context window of this model", 4096, 1024),
    ("max_tokens is too large: 8192. This model supports at most 4096 completion tokens, whereas you provided 8192.", 8192, 4096),
    ("Prompt contains 40000 tokens, too large for model with 32768 maximum context length", 32, 16),
    ("Request too large for model on tokens per minute (TPM): Limit 6000, Requested 8000", 32, 16),
]  # fmt: skip


@pytest.mark.parametrize(("words", "limit", "left"), LONG, ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_every_servers_words_for_too_long_are_known(words: str, limit: int, left: int | None) -> None:
    assert is_too_long(words)
    assert room(words, limit) == left
    assert not is_too_long("The model is overloaded. Try again later.")


def test_halving_ends() -> None:
    limits, limit = [], 2048
    while (smaller := room("too many tokens", limit)) is not None:
        limits.append(limit := smaller)
    assert limits == [1024, 512, 256, 128, 64, 32, 16]


def test_the_limit_shrinks_before_a_question_is_given_up(tmp_path: Path) -> None:
    def behaviour(number: int, body: dict[str, Any]) -> Answer:
        words, limit = body["messages"][-1]["content"], body["max_tokens"]
        prompt = {"question 0": 900, "question 1": 3900, "question 2": 5000, "question 3": 4070}[words]
        if prompt + limit > 4096:
            message = f"maximum context length is 4096 tokens. However, you requested {prompt + limit} ({prompt} in the messages"
            return Answer(status=400, body=error(message))
        return Answer(body=completion("first of all,", finish_reason="length")) if words == "question 3" else Answer("B")

    cache = tmp_path / "replies.jsonl"
    with serving(behaviour) as server:
        for _ in range(2):
            whole, shrunk, long, cut = judge(server, cache, max_tokens=512).ask(asks(4))
            assert isinstance(whole, Reply) and whole.limit is None
            assert isinstance(shrunk, Reply) and shrunk.limit == 196
            assert isinstance(long, NoReply) and long.kind == "too long"
            assert isinstance(cut, NoReply) and cut.kind == "too long" and "26 tokens were left" in cut.reason
        # Asked again is only what has no reply: not what the context cut, nor what it left room enough for.
        assert server.contents().count("question 2") == 2 and len(server.asked) == 7


def test_a_server_that_reads_a_part_of_a_long_question_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def counting(tokens: int) -> Callable[[int, dict[str, Any]], Answer]:
        return lambda number, body: Answer(body={**completion("B"), "usage": {"prompt_tokens": tokens, "completion_tokens": 1}})

    long = [ask(f"{i} " + "word " * 2000) for i in range(3)]
    with serving(counting(500)) as server:
        asking = judge(server)
        asking.ask([*long, ask("short")])
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("counted 500 tokens in a question of 10,002 characters") == 1 and "3 questions" in asking.about[-1]
    for tokens in (2500, 0):  # 4 characters a token; not counted
        with serving(counting(tokens)) as server:
            asking = judge(server)
            asking.ask(long)
        assert not asking.about


# --- streams and answers within answers


def test_a_stream_is_read_whole_whether_or_not_it_was_asked_for() -> None:
    reply = read_answer(streamed("Better: B").decode())
    assert isinstance(reply, Reply) and (reply.text, reply.finish_reason, reply.prompt_tokens) == ("Better: B", "stop", 3)
    thought = read_answer(streamed("hm", field="reasoning_content").decode())
    assert isinstance(thought, Reply) and (thought.text, thought.thinking) == ("", "hm")
    assert isinstance(read_answer(streamed("A", end=None).decode()), Reply)  # [DONE] is an end
    for torn in (streamed("Better", end=None, done=False), streamed("Bet", end="error"), b'data: {"choices": [{"del'):
        found = read_answer(torn.decode())
        assert not isinstance(found, Reply) and found.kind == "retry"
    with serving(lambda number, body: Answer(body=streamed("B"))) as server:
        (reply,) = judge(server).ask(asks(1))
    assert isinstance(reply, Reply) and reply.text == "B"


@pytest.mark.parametrize(
    ("message", "said", "thought"),
    [
        ({"content": "B", "reasoning_content": "hm"}, "B", "hm"),
        ({"content": "B", "reasoning": "hm"}, "B", "hm"),
        ({"content": None, "reasoning_content": "hm"}, "", "hm"),
        (
            {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "B"}]},
            "B",
            "hm",
        ),
        ({"content": "B", "reasoning": None}, "B", ""),
    ],
)
def test_thinking_beside_the_reply_is_kept_apart(message: dict[str, Any], said: str, thought: str) -> None:
    reply = read_answer(json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}))
    assert isinstance(reply, Reply) and (reply.text, reply.thinking) == (said, thought)


@pytest.mark.parametrize(
    ("reason", "found"),
    [
        ("stop", "stop"), ("eos_token", "stop"), ("STOP", "stop"), ("FinishReason.STOP", "stop"), (None, "stop"), ("", "stop"),
        ("length", "length"), ("MAX_TOKENS", "length"), ("content_filter", "refused"), ("SAFETY", "refused"),
        ("error", "broken off"), ("abort", "broken off"), ("insufficient_system_resource", "broken off"), ("tool_calls", "no text"),
    ],
)  # fmt: skip
def test_how_a_reply_ended(reason: str | None, found: str) -> None:
    reply = read_answer(json.dumps(completion("B", finish_reason=reason)))
    assert (reply.finish_reason if isinstance(reply, Reply) else reply.lack) == found


def test_an_error_inside_a_200_is_what_its_status_says() -> None:
    bodies = iter([{"error": {"code": 429, "message": "slow down"}}, {"error": {"message": "overloaded"}}])
    with serving(lambda number, body: Answer(body=next(bodies, None), text="B")) as server:
        asking = judge(server)
        assert [reply.text for reply in asking.ask(asks(1)) if isinstance(reply, Reply)] == ["B"]
    assert asking.usage.retries == 2
    inside = Answer(body={"error": {"code": 400, "message": "context size exceeded", "n_prompt_tokens": 9, "n_ctx": 4}})
    with serving(lambda number, body: inside) as server:
        (reply,) = judge(server).ask(asks(1))
    assert isinstance(reply, NoReply) and reply.kind == "too long" and len(server.asked) == 1


def test_an_answer_of_endless_size_or_of_impossible_numbers_is_no_traceback(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 10**40, "completion_tokens": -1}
    logprobs = {"content": [{"top_logprobs": [{"token": "A", "logprob": 1e999}]}]}
    body = {**completion("\x00\ud800A", logprobs=logprobs), "usage": usage}
    with serving(lambda number, sent: Answer(body=body)) as server:
        asking = judge(server, tmp_path / "replies.jsonl", price_in=1, price_out=1)
        (reply,) = asking.ask(asks(1))
        assert isinstance(reply, Reply) and reply.first_token_logprobs is None and asking.usage.uncounted == 1
        (again,) = judge(server, tmp_path / "replies.jsonl").ask(asks(1))
        assert isinstance(again, Reply) and again.text == reply.text == "\ufffd\ufffdA" and len(server.asked) == 1
    broken = b'data: {"choices": [{"delta": {"content": "A"}}]}\n\ndata: {"error": {"code": 429, "message": "slow"}}\n\n'
    with serving(lambda number, sent: Answer(body=broken)) as server:
        (late,) = judge(server, retries=1).ask(asks(1))
    assert isinstance(late, NoReply) and late.kind == "rate-limited"
    with serving(replying("x" * (1 << 24))) as server:
        (huge,) = judge(server).ask(asks(1))
    assert isinstance(huge, NoReply) and huge.kind == "unreadable"


def test_a_judge_whose_every_reply_is_cut_before_a_word_is_not_asked_on(tmp_path: Path) -> None:
    body = completion(None, message={"content": None, "reasoning_content": "let me see"}, finish_reason="length")
    with serving(lambda number, sent: Answer(body=body if sent["max_tokens"] < 99 else None)) as server:
        with pytest.raises(UserError, match=r"first 3 replies .* cut at 4 tokens, .*--judge_max_tokens"):
            judge(server, tmp_path / "r.jsonl", max_tokens=4, concurrency=1).ask(asks(90))
        assert len(server.asked) == 3
        assert all(isinstance(reply, Reply) for reply in judge(server, tmp_path / "r.jsonl", max_tokens=99).ask(asks(6)))
        assert len(server.asked) == 9


# --- Azure


def test_a_classic_azure_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "azure-key-in-full")
    with serving(replying("B")) as server:
        place = server.url.removesuffix("/v1") + "/openai/deployments/mine"
        for asking in (judge(f"{place}?api-version=2024-10-21"), judge(place, api_version="2024-10-21")):
            (reply,) = asking.ask(asks(1))
            assert isinstance(reply, Reply) and reply.text == "B"
        assert server.paths == ["/openai/deployments/mine/chat/completions?api-version=2024-10-21"] * 2
        assert all(headers["api-key"] == "azure-key-in-full" and "authorization" not in headers for headers in server.headers)
    asking = judge("https://mine.openai.azure.com/?api-version=2024-10-21")
    assert asking._endpoint.address == "https://mine.openai.azure.com/openai"
    full = "https://mine.openai.azure.com/openai/deployments/gpt/chat/completions?api-version=2024-10-21"
    assert address(full) == ("https://mine.openai.azure.com/openai/deployments/gpt", "2024-10-21")
    with pytest.raises(UserError, match="user, password or query"):
        address("https://mine.openai.azure.com/openai?api-version=2024-10-21&api-key=sk-secret")
