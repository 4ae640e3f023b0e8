"""Whatever a model or a judge writes, every writer of records takes, and gives back when read; nothing paid for is lost by a
write. What comes from files is refused before anything is asked."""

from __future__ import annotations

import csv
import io
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from benchmark_run_helpers import chat_model, judge_server
from chains import jsonl, refused
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from isdaa.cli import main
from isdaa.data.checks import LONGEST, check_asked
from isdaa.data.reading.sources import load_prompts
from isdaa.errors import UserError
from isdaa.evaluation.benchmarks import BENCHMARKS
from isdaa.evaluation.benchmarks.outcome import examples
from isdaa.evaluation.benchmarks.sets.benchmark import Answer, Judged, Judgment, Question, Scoring, prompt_text
from isdaa.evaluation.judges.cache import ReplyCache
from isdaa.evaluation.judges.types import Reply
from isdaa.evaluation.records import Blocks, Lines
from isdaa.files import append_jsonl, clean, csv_text, digest, whole_jsonl, write_atomically, write_json, write_jsonl
from isdaa.foreign import ROW, iterate_jsonl, read_json, read_jsonl, readable_jsonl

NASTY = (
    "\ud800", "a\udc00b", "\udc00\ud800", "\ud83d\ude00", "\ud83d", "\0", "\\ud800", "\\", "\\\ud800", '"', "", " ", "\x1b[2J",
    "\x7f\x85", "\u2028\u2029", "\r\n", "\r", "\x0b\x0c\x1c", "\ufeff", "\uffff\ufffe", "\u202e", "</script>", "{{ 7 * 7 }}",
    "=1+1", "NaN", "[[A>>B]]",
)  # fmt: skip
HUGE = "\x01😀\ud800\u2028" * (LONGEST // 4)
TEXT = st.lists(st.one_of(st.sampled_from(NASTY), st.text(st.characters(exclude_categories=()), max_size=8)), max_size=4).map(
    "".join
)
NUMBER = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**53), 2**53))
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBER, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT.map(clean), inner, max_size=3)),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(TEXT.map(clean), VALUE, max_size=3), min_size=1, max_size=3)
quick = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))


@contextmanager
def folder() -> Iterator[Path]:
    """Of one example of many: a fixture's would be of all of them."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def read(value: Any) -> Any:
    """A value as JSON gives it back: two halves of a character that stand together are that character."""
    return json.loads(json.dumps(value))


# --- cleaning


@quick
@given(TEXT)
@example(HUGE)
def test_cleaned_text_is_whole_and_what_was_whole_stays(text: str) -> None:
    cleaned = clean(text)
    assert "\0" not in cleaned and cleaned.encode().decode() == cleaned == clean(cleaned)
    if not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text):
        assert cleaned == text


def test_the_middle_of_what_is_too_long_is_left_out() -> None:
    text = clean("a" * LONGEST + "[[A>>B]]", LONGEST)
    assert len(text) == LONGEST + 3 and text.startswith("aaa") and text.endswith("aaa[[A>>B]]")
    assert clean("a" * LONGEST, LONGEST) == "a" * LONGEST


# --- files


@quick
@given(ROWS)
@example([{"a": HUGE, HUGE: 1}])
def test_json_files_give_back_what_they_were_given(rows: list[dict[str, Any]]) -> None:
    with folder() as place:
        write_json(place / "a.json", rows)
        assert read_json(place / "a.json") == read(rows)
        write_jsonl(place / "a.jsonl", rows)
        append_jsonl(place / "a.jsonl", rows)
        for found in (read_jsonl, whole_jsonl, readable_jsonl):
            assert found(place / "a.jsonl") == read(rows * 2)
        assert digest(rows) == digest(rows)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_never_reaches_a_file(number: float, tmp_path: Path) -> None:
    append_jsonl(tmp_path / "a.jsonl", [{"a": 1}])
    for write, name in ((write_json, "a.json"), (write_jsonl, "b.jsonl"), (append_jsonl, "a.jsonl")):
        with pytest.raises(ValueError, match="JSON compliant"):
            write(tmp_path / name, [{"a": 2}, {"a": [{"b": number}]}])
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    assert read_jsonl(tmp_path / "a.jsonl") == [{"a": 1}]


@pytest.mark.parametrize("more", [0, 1])
def test_no_line_is_longer_than_what_is_read(more: int, tmp_path: Path) -> None:
    append_jsonl(tmp_path / "a.jsonl", [{"a": 1}])
    long = {"a": "x" * (ROW - len('{"a": ""}\n') + more)}
    if more:
        for write in (write_jsonl, append_jsonl):
            with pytest.raises(UserError, match="a record of more than 64 MiB"):
                write(tmp_path / "a.jsonl", [{"a": 2}, long])
    else:
        append_jsonl(tmp_path / "a.jsonl", [long])
    assert [record for _, record in iterate_jsonl(tmp_path / "a.jsonl")] == [{"a": 1}, long][: 2 - more]


@quick
@given(TEXT)
@example(HUGE)
def test_any_text_is_a_file(text: str) -> None:
    with folder() as place:
        write_atomically(place / "a.txt", text)
        assert (place / "a.txt").read_bytes() == text.encode(errors="backslashreplace")


@quick
@given(st.lists(st.lists(TEXT.map(clean), min_size=2, max_size=2), max_size=3))
def test_tables_give_back_their_cells(rows: list[list[str]]) -> None:
    back = list(csv.reader(io.StringIO(csv_text(["a", "b"], rows), newline="")))
    assert [[cell[cell.startswith("'") and not was.startswith("'") :] for cell, was in zip(*pair, strict=True)]
            for pair in zip(back[1:], rows, strict=True)] == rows  # fmt: skip


# --- records


@quick
@given(ROWS, TEXT)
@example([{"text": HUGE}], HUGE)
def test_records_are_found_again(rows: list[dict[str, Any]], text: str) -> None:
    with folder() as place:
        records = [{**row, "key": str(number), "text": text} for number, row in enumerate(rows)]
        Lines(place / "generations.jsonl").add(records)
        again = Lines(place / "generations.jsonl")
        assert [again[str(number)] for number in range(len(rows))] == read(records)
        for kind in ("anything", "tax"):
            block = {**rows[0], "answers": [text]}
            Blocks(place / f"{kind}.jsonl").add(kind, "key", {"model": text}, [block])
            found = Blocks(place / f"{kind}.jsonl")
            assert found["key"] == [read(block | {"block": "key"})] and found.headers["key"]["model"] == read(text)


@quick
@given(TEXT, st.dictionaries(TEXT, st.floats(-1e4, 0), max_size=3))
@example(HUGE, {HUGE: 0.0})
def test_replies_are_found_again(text: str, logprobs: dict[str, float]) -> None:
    with folder() as place:
        reply = Reply(text, read(logprobs), 1, 2, False, "stop", text, text)
        request = {"model": "judge", "messages": [{"role": "user", "content": clean(text)}], "max_tokens": 4}
        ReplyCache(place / "replies.jsonl").add(request, reply)
        (found,) = [json.loads(line)["reply"] for line in (place / "replies.jsonl").read_bytes().splitlines()]
        assert (found["text"], found["first_token_logprobs"]) == (read(text), read(logprobs))
        assert len(ReplyCache(place / "replies.jsonl")) == 1


def judged_by(name: str, text: str, label: str, question: Question) -> Judged:
    """An answer, an opponent's, and a verdict each order or turn, all of one text."""
    turns = (text,) * (1 + len(question.follow_ups))
    answer, opponent = (Answer(question.id, who, turns) for who in (label, "other"))
    games = ("turn 1", "turn 2") if name == "mt_bench" else ("opponent first", "model first")
    value, kind, said = (5.0, "grade", "5") if name == "mt_bench" else (0.5, "hard", "A=B" if name == "arena_hard" else "A")
    messages = ({"role": "user", "content": prompt_text(question)},)
    verdicts = tuple(Judgment(game, value, kind, said, reply=text, messages=messages, template="t") for game in games)
    return Judged(question, answer, None if name == "mt_bench" else opponent, verdicts, label)


@quick
@pytest.mark.parametrize("name", BENCHMARKS)
@given(TEXT, TEXT.map(clean).filter(str.strip))
@example(HUGE, "m")
def test_every_benchmarks_files_give_back_answers_and_judgments(name: str, text: str, label: str) -> None:
    bench = BENCHMARKS[name]
    questions = bench.read_questions("project", None, 2)
    found = [judged_by(name, text, label, question) for question in questions]
    with folder() as place:
        file = place / ("a.json" if name == "alpaca_eval" else "a.jsonl")
        bench.write_answers(file, questions, [one.answer for one in found])
        answers = bench.read_answers(file, questions)
        assert [(one.model, list(one.turns)) for one in answers] == [(label, read(list(one.answer.turns))) for one in found]
        bench.write_judgments(file, found)
        (back,) = bench.read_judgments(file, questions, answers).values()
        assert [[verdict.reply for verdict in one.verdicts] for one in back] == [read([text] * 2)] * 2
        assert [[verdict.value for verdict in one.verdicts] for one in back] == [[v.value for v in one.verdicts] for one in found]
        write_json(place / "examples.json", examples({label: found}, bench.score({label: found}, Scoring(resamples=100))))
        shown = read_json(place / "examples.json")
        assert {turn for one in shown for turn in one["answers"][0]["turns"]} == {read(text)}


# --- what comes from files


BAD: dict[str, tuple[Any, str]] = {
    "half": ("a\ud800b", "half of a character"),
    "nul": ("a\0b", "NUL"),
    "long": ("x" * (LONGEST + 1), "1,048,577 characters"),
}


@pytest.mark.parametrize("value", [bad for bad, _ in BAD.values()])
def test_what_no_judge_is_asked_about_is_refused_at_any_depth(value: str) -> None:
    for place in (value, [["a", value]], ({"content": value},)):
        with pytest.raises(UserError, match=r"a.json:3 "):
            check_asked(place, "a.json:3")
    check_asked(("whole 😀 \u2028 \x01", [{"content": "x" * LONGEST}], None, 1.5), "a.json:3")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("column", ["facts", "tools", "prompt"])
def test_a_number_that_no_record_can_hold_is_refused_with_its_row(number: str, column: str, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": [1, {"b": 5}]}}}
    row: dict[str, Any] = {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c", "note": {"a": 5}}
    row["facts"], row["tools"] = {"a": {"b": 5}}, [{"type": "function", "function": {"name": "f", "x": 5}}]
    row["prompt"] = [*row["prompt"], {"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "d"}]
    assert len(load_prompts(str(jsonl(tmp_path / "a.jsonl", [row])))[0]) == 1
    for name in ("note", column):
        text = json.dumps(row[name])
        (tmp_path / "a.jsonl").write_text(json.dumps(row).replace(text, text.replace("5", number)) + "\n")
        if name == "note":  # nobody reads it
            assert len(load_prompts(str(tmp_path / "a.jsonl"))[0]) == 1
        elif number == "NaN" and column == "tools":  # what pandas writes for null
            json.dumps(list(load_prompts(str(tmp_path / "a.jsonl"))[0]), allow_nan=False)
        else:
            with pytest.raises(UserError, match=r"a.jsonl:1.*no number in JSON"):
                load_prompts(str(tmp_path / "a.jsonl"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return chat_model(tmp_path_factory.mktemp("models") / "m")


def rows_of(name: str, question: str, answer: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A file of questions and one of answers, in the form of a benchmark's tool."""
    if name == "alpaca_eval":
        return [{"instruction": question, "output": "base", "generator": "b"}], [
            {"instruction": question, "output": answer, "generator": "m"}
        ]
    if name == "mt_bench":
        return (
            [{"question_id": 1, "category": "c", "turns": ["first?", question]}],
            [{"question_id": 1, "model_id": "m", "choices": [{"index": 0, "turns": ["x", answer]}]}],
        )
    if name == "arena_hard":
        return [{"uid": "1", "category": "c", "prompt": question}], [
            {"uid": "1", "model": "m", "messages": [{"role": "assistant", "content": {"answer": answer}}]}
        ]
    return [{"id": "1", "prompt": question, "chosen": "good"}], [{"id": "1", "response": answer, "model": "m"}]


@pytest.mark.parametrize("what", ["question", "answer"])
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_refuses_what_could_not_be_kept_before_anything_is_asked(
    name: str, kind: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("isdaa.evaluation.judges.judge.Judge.ask", lambda *_: pytest.fail("asked"))
    bad, words = BAD[kind]
    questions, answers = rows_of(name, **{"question": "why?", "answer": "so", what: bad})
    files = [
        str(jsonl(tmp_path / file, rows)) for file, rows in (("q.jsonl", questions), ("a.jsonl", answers), ("o.jsonl", answers))
    ]
    options = ["--questions", files[0], "--answers", files[1], "--output", str(tmp_path / "out")]
    options += [] if name == "mt_bench" else ["--opponent", files[2]]
    said = refused(
        capsys, ["benchmark", name, *options, "--judge_model", "j", "--judge_base_url", "http://127.0.0.1:1/v1"], words
    )
    assert f"{'q' if what == 'question' else 'a'}.jsonl:1" in said and not (tmp_path / "out").exists()


# --- what comes from models and judges


def test_a_judge_and_a_model_may_write_anything(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(NASTY)
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.decode", lambda self, *rest, **more: text)
    options = [
        "--model_path",
        model,
        "--questions",
        "project",
        "--limit",
        "2",
        "--max_new_tokens",
        "3",
        "--output",
        str(tmp_path / "out"),
    ]
    with judge_server(lambda talk: text + "\n[[5]]") as (_, url):
        command = [
            "benchmark",
            "mt_bench",
            *options,
            "--evaluation.bootstrap",
            "100",
            "--judge_model",
            "j",
            "--judge_base_url",
            url,
        ]
        assert main(command) == 0
    rows = read_jsonl(tmp_path / "out/generations.jsonl")
    assert {row["text"] for row in rows} == {clean(text).strip()}
    assert read_json(tmp_path / "out/metrics.json")["models"][0]["figures"]["score"]["mean"] == 5.0
    (judgments,) = (tmp_path / "out/judgments/j").iterdir()
    assert {row["judgment"] for row in read_jsonl(judgments)} == {clean(text) + "\n[[5]]"}
    page = (tmp_path / "out/report.html").read_text()
    assert "&lt;/script&gt;" in page and "{{ 7 * 7 }}" in page
    assert main(command) == 0, "the same command finds it all again, and asks nobody"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_model_of_a_file_may_be_called_anything(name: str, tmp_path: Path) -> None:
    text = clean("".join(NASTY)).replace("\ufffd", "")
    questions, answers = rows_of(name, text, text)
    answers = json.loads(json.dumps(answers).replace('"m"', json.dumps(text)))
    files = [str(jsonl(tmp_path / file, rows)) for file, rows in (("q.jsonl", questions), ("a.jsonl", answers))]
    options = ["--questions", files[0], "--answers", files[1], "--output", str(tmp_path / "out"), "--evaluation.bootstrap", "100"]
    options += [] if name == "mt_bench" else ["--opponent", files[1]]
    said = {"alpaca_eval": "m", "hh": "Better: A", "tldr": "Better: A"}.get(name, f"{text}\n[[5]] [[A=B]]")
    with judge_server(lambda talk: said) as (_, url):
        assert main(["benchmark", name, *options, "--judge_model", "j", "--judge_base_url", url, "--judge_retries", "0"]) in (
            0,
            3,
        )
    assert read_json(tmp_path / "out/metrics.json")["models"][0]["model"] == text
    table = csv.reader(io.StringIO((tmp_path / "out/metrics.csv").read_bytes().decode(), newline=""))
    assert {row[0].removeprefix("'") for row in table} == {"model", text}
    made = [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".jsonl")]
    assert len(made) >= 4
    for path in made:
        (read_json if path.suffix == ".json" else read_jsonl)(path)
