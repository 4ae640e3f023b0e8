# ruff: noqa: E501 - one way, one line
"""A judge that misbehaves in some forty ways, and for each what a whole benchmark makes of it: the table of docs/judging.md.

Eight questions; of three (`odd`) the opponent's summary is better, of the others the model's. The judge knows which, and says
so well of all but the odd ones. So a reply that is read wrongly moves the win rate from 5/8, and one that is left out to 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from judge_server import Answer, completion, serving, sides, streamed

from isdaa.cli import main
from isdaa.evaluation.judges import judge
from isdaa.foreign import read_json

RIGHT, DROPPED = 5 / 8, 1.0
Say = Callable[[str, dict[str, Any]], Answer]  # told the better letter and the request


def say(text: str, **changes: Any) -> Say:
    """`{}` in the text is the better letter, `{x}` the other."""

    def words(letter: str, body: dict[str, Any]) -> Answer:
        other = "AB"["BA".index(letter)]
        return Answer(body=completion(text.replace("{x}", other).replace("{}", letter), **changes))

    return words


def message(content: Any = None, **fields: Any) -> Say:
    def words(letter: str, body: dict[str, Any]) -> Answer:
        filled = json.loads(json.dumps({"content": content, **fields}).replace("{}", letter))
        return Answer(body=completion(None, message=filled))

    return words


def status(code: int, text: str = "", **headers: str) -> Say:
    return lambda letter, body: Answer(status=code, body={"error": {"message": text}}, headers=headers)


def once(first: Answer, seen: set[str]) -> Say:
    """Misbehaves the first time that a question comes."""

    def words(letter: str, body: dict[str, Any]) -> Answer:
        key = json.dumps(body["messages"])
        if key in seen:
            return Answer(f"Better: {letter}")
        seen.add(key)
        return first

    return words


def unless(refused: Callable[[dict[str, Any]], bool], text: str) -> Say:
    """A 400 for what it does not take."""
    return lambda letter, body: status(400, text)(letter, body) if refused(body) else Answer(f"Better: {letter}")


def short(letter: str, body: dict[str, Any]) -> Answer:
    """Room for 100 tokens of a reply."""
    wanted = 3996 + body["max_tokens"]
    told = f"maximum context length is 4096 tokens. However, you requested {wanted} tokens (3996 in the messages, "
    return status(400, told)(letter, body) if wanted > 4096 else Answer(f"Better: {letter}")


# Way -> what it does with the odd questions, exit status, win rate, reasons of replies without a verdict.
WAYS: dict[str, tuple[Say, int, float, dict[str, int]]] = {
    # Said in other words, and read as it means.
    "thinks aloud": (say("<think>Better: {x}? no</think>The first is long.\nBetter: {}"), 0, RIGHT, {}),
    "thinks, opened by its template": (say("Better: {x} at first sight.</think>\n\nBetter: {}"), 0, RIGHT, {}),
    "channels": (say("<|channel|>analysis<|message|>Better: {x}<|end|><|start|>assistant<|channel|>final<|message|>Better: {}"), 0, RIGHT, {}),
    "thinking in a field": (message("Better: {}", reasoning_content="Better: A Better: B"), 0, RIGHT, {}),
    "thinking in a part": (message([{"type": "thinking", "thinking": "Better: A"}, {"type": "text", "text": "Better: {}"}]), 0, RIGHT, {}),
    "response A": (say("Better: Response {}"), 0, RIGHT, {}),
    "brackets": (say("Better: [{}]"), 0, RIGHT, {}),
    "bold": (say("**Better:** **{}**"), 0, RIGHT, {}),
    "a draft before": (say("Better: {x}\n\nWait, on reflection:\nBetter: {}"), 0, RIGHT, {}),
    "one letter": (say("{}"), 0, RIGHT, {}),
    "a tie": (say("A and B are equal"), 0, (5 + 1.5) / 8, {}),
    "a stream": (lambda letter, body: Answer(body=streamed(f"Better: {letter}")), 0, RIGHT, {}),
    "a byte order mark": (lambda letter, body: Answer(body=b"\xef\xbb\xbf" + json.dumps(completion(f"Better: {letter}")).encode()), 0, RIGHT, {}),
    "half a character": (say("Better: {} \ud83d"), 0, RIGHT, {}),
    "a null character": (say("\x00Better: {}\x00"), 0, RIGHT, {}),
    "other words for stop": (say("Better: {}", finish_reason="eos_token"), 0, RIGHT, {}),
    # Goes better the next time.
    "a 500 first": (once(Answer(status=500), set()), 0, RIGHT, {}),
    "a 429 with seconds": (once(Answer(status=429, headers={"retry-after": "0"}), set()), 0, RIGHT, {}),
    "a 429 with a date": (once(Answer(status=429, headers={"retry-after": formatdate(0, usegmt=True)}), set()), 0, RIGHT, {}),
    "an empty reply first": (once(Answer(text=""), set()), 0, RIGHT, {}),
    "a torn reply first": (once(Answer(body=b'{"choices": [{"mess'), set()), 0, RIGHT, {}),
    "a cut connection first": (once(Answer(cut=0.5), set()), 0, RIGHT, {}),
    "an error inside a 200 first": (once(Answer(body={"error": {"code": 529, "message": "overloaded"}}), set()), 0, RIGHT, {}),
    "no choices first": (once(Answer(body={"choices": []}), set()), 0, RIGHT, {}),
    # Does not take a setting.
    "no max_tokens": (unless(lambda body: "max_tokens" in body, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'"), 0, RIGHT, {}),
    "no temperature": (unless(lambda body: "temperature" in body, "temperature does not support 0.0"), 0, RIGHT, {}),
    "no system": (unless(lambda body: body["messages"][0]["role"] == "system", "System role not supported"), 0, RIGHT, {}),
    "streams alone": (lambda letter, body: Answer(body=streamed(f"Better: {letter}")) if body.get("stream") else Answer(status=400, body={"detail": "Stream must be set to true"}), 0, RIGHT, {}),
    "little room": (short, 0, RIGHT, {}),
    # No verdict, each with its reason.
    "names neither": (say("Both have their strengths and I cannot say."), 0, DROPPED, {"unreadable": 6}),
    "takes it back": (say("Response {} is not better."), 0, DROPPED, {"unreadable": 6}),
    "cut": (say("Better: {}", finish_reason="length"), 0, DROPPED, {"cut": 6}),
    "cut in thought": (say("<think>Better: {}", finish_reason="length"), 0, DROPPED, {"cut": 6}),
    "thinks and stops": (message(None, reasoning="Better: {}"), 0, DROPPED, {"thought only": 6}),
    "never ends its thought": (say("<think>Better: {}"), 0, DROPPED, {"thought only": 6}),
    "refuses": (message(None, refusal="I cannot judge this"), 0, DROPPED, {"refused": 6}),
    "is filtered": (say("", finish_reason="content_filter"), 0, DROPPED, {"refused": 6}),
    "a filter's 400": (status(400, "blocked by our content management policy"), 0, DROPPED, {"refused": 6}),
    "calls a tool": (say("", finish_reason="tool_calls"), 0, DROPPED, {"no text": 6}),
    "too long": (status(400, "prompt is too long: 210000 tokens > 200000 maximum"), 0, DROPPED, {"too long": 6}),
    "a 413": (status(413), 0, DROPPED, {"too long": 6}),
    # No verdict yet: the result is partial.
    "rate-limited": (status(429, "slow down"), 3, DROPPED, {"rate-limited": 6}),
    "500 for ever": (status(500), 3, DROPPED, {"no answer": 6}),
    "breaks off": (say("Better: {}", finish_reason="error"), 3, DROPPED, {"broken off": 6}),
}  # fmt: skip


ASKED_AGAIN = ("thinks aloud", "a 500 first", "no system", "streams alone")  # of those with a verdict from all


def files(folder: Path) -> list[str]:
    """Questions with the opponent's summaries, and the model's answers; what is better holds the word `good`."""
    rows, answers = [], []
    for i in range(8):
        odd = 3 <= i < 6
        prompt = f"{'odd' if odd else 'plain'} post {i}"
        better, worse = f"a good summary {i}", f"a summary of nothing {i}"
        rows.append({"prompt": prompt, "chosen": better if odd else worse, "rejected": "x"})
        answers.append({"prompt": prompt, "response": worse if odd else better, "model": "mine"})
    for name, content in (("questions.jsonl", rows), ("answers.jsonl", answers)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    return ["benchmark", "tldr", "--questions", str(folder / "questions.jsonl"), "--answers", str(folder / "answers.jsonl")]


def behaviour(odd: Say) -> Callable[[int, dict[str, Any]], Answer]:
    def words(number: int, body: dict[str, Any]) -> Answer:
        first, _ = sides(body)
        letter = "A" if "good" in first else "B"
        return odd(letter, body) if "odd post" in body["messages"][-1]["content"] else Answer(f"Better: {letter}")

    return words


def evaluated(command: list[str], out: Path, url: str, *more: str) -> tuple[int, dict[str, Any]]:
    asked = ["--judge_model", "judge", "--judge_base_url", url, "--judge_retries", "2", "--judge_concurrency", "1"]
    code = main([*command, "--output", str(out), *asked, "--evaluation.bootstrap", "100", *more])
    return code, read_json(out / "metrics.json")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(judge, "FIRST_PAUSE", 0.001)


def reasons(metrics: dict[str, Any]) -> dict[str, int]:
    (model,) = metrics["models"]
    return {row["lack"]: row["replies"] for row in (model["lacks"] or {"reasons": ()})["reasons"]}


def test_there_are_many_ways() -> None:
    assert len(WAYS) >= 30


@pytest.mark.parametrize("way", WAYS)
def test_a_misbehaving_judge(way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd, code, rate, lacks = WAYS[way]
    command = files(tmp_path)
    with serving(behaviour(odd)) as server:
        found, metrics = evaluated(command, tmp_path / "out", server.url)
        shown = capsys.readouterr()
        assert (found, metrics["models"][0]["figures"]["win_rate"]["mean"], reasons(metrics)) == (code, rate, lacks), shown
        assert "Traceback" not in shown.err
        told = " ".join(shown.out.split())
        assert all(f"{lack}" in told for lack in lacks) and metrics["partial"] == (code == 3)
        if not lacks and way not in ASKED_AGAIN:
            return
        # What is there is not asked again; what did not come is, and only that.
        server.asked.clear()
        server.behaviour = behaviour(lambda letter, body: Answer(f"Better: {letter}"))
        again, metrics = evaluated(command, tmp_path / "out", server.url)
        waited = {"rate-limited", "no answer", "broken off", "refused", "too long", "no text"} & lacks.keys()
        assert len(server.asked) == (6 if waited else 0) and again == 0
        assert metrics["models"][0]["figures"]["win_rate"]["mean"] == (RIGHT if waited else rate)


def test_a_raised_limit_asks_the_cut_replies_alone(tmp_path: Path) -> None:
    def odd(letter: str, body: dict[str, Any]) -> Answer:
        return say("first, ", finish_reason="length")(letter, body) if body["max_tokens"] < 400 else Answer(f"Better: {letter}")

    command = files(tmp_path)
    with serving(behaviour(odd)) as server:
        code, metrics = evaluated(command, tmp_path / "out", server.url)
        assert code == 0 and reasons(metrics) == {"cut": 6} and len(server.asked) == 16
        code, metrics = evaluated(command, tmp_path / "out", server.url, "--judge_max_tokens", "500")
        assert code == 0 and not reasons(metrics) and len(server.asked) == 22
        assert metrics["models"][0]["figures"]["win_rate"]["mean"] == RIGHT


def test_a_judge_that_dies_leaves_a_partial_result_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, dead = files(tmp_path), set[int]()

    def dying(number: int, body: dict[str, Any]) -> Answer:
        return (
            Answer(status=503)
            if number >= 8 and not dead
            else behaviour(lambda letter, body: Answer(f"Better: {letter}"))(number, body)
        )

    with serving(dying) as server:
        code, metrics = evaluated(command, tmp_path / "out", server.url)
        assert code == 3 and metrics["partial"] and metrics["models"][0]["figures"]
        assert "same command" in " ".join(capsys.readouterr().err.split())
        dead.add(1)
        server.asked.clear()
        code, metrics = evaluated(command, tmp_path / "out", server.url)
        assert code == 0 and len(server.asked) == 8 and metrics["models"][0]["figures"]["win_rate"]["mean"] == RIGHT
    code, metrics = evaluated(command, tmp_path / "out", "http://127.0.0.1:1/v1")
    assert code == 0 and metrics["judge"]["usage"]["requests"] == 0
