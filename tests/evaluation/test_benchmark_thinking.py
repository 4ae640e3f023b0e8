"""Benchmarks of models and judges that think: what is judged, measured and said; and questions without a verdict, by reason."""

from pathlib import Path

import pytest
from benchmark_run_helpers import between, chat_model, judge_server
from judge_server import Answer, completion, serving

import isdaa.models.sampling.sampling
from isdaa.cli import main
from isdaa.evaluation.answer_notes import lack_remarks, lacks_of, thinking_remarks, waiting
from isdaa.evaluation.benchmarks import benchmark
from isdaa.evaluation.benchmarks.answers import Respondent, parted
from isdaa.evaluation.benchmarks.sets.benchmark import Answer as Said
from isdaa.evaluation.benchmarks.sets.benchmark import Judged, Judgment, Question
from isdaa.files import write_json, write_jsonl
from isdaa.foreign import read_json, read_jsonl

OPENING = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: <think>\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {name: chat_model(folder / name, seed) for seed, name in enumerate(("reference", "one"))}


def run(name: str, output: Path, *options: object) -> int:
    words = ["--questions", "project", "--limit", "4", "--max_new_tokens", "8", "--evaluation.bootstrap", "100"]
    return main(["benchmark", name, "--output", str(output), *words, *map(str, options)])


def writing(monkeypatch, text: str) -> None:
    """Every model writes that, whatever it draws."""
    monkeypatch.setattr(isdaa.models.sampling.sampling, "text_of", lambda ids, finished, tokenizer: text)


def better(talk) -> str:
    return "Better: B" if "SO" in between(talk[-1]["content"], "<<<summary B\n", "\nsummary B>>>") else "Better: A"


@pytest.mark.parametrize(("text", "template"), [("<think>hm</think>SO it is", None), ("hm\n</think>\n\nSO it is", OPENING)])
def test_thinking_is_stored_and_counted_and_not_judged(text, template, models, tmp_path, monkeypatch, capsys):
    writing(monkeypatch, text)
    options = ["--model_path", models["one"], "--baseline", models["reference"]]
    if template is not None:
        (tmp_path / "t.jinja").write_text(template)
        options += ["--chat_template", tmp_path / "t.jinja"]
    with judge_server(better) as (judge, url):
        asking = ["--judge_model", "toy", "--judge_base_url", url]
        assert run("tldr", tmp_path / "out", *options, *asking) == 0
        asked = [body["messages"][-1]["content"] for body in judge.asked]
        assert asked and not any("hm" in between(one, f"<<<summary {s}\n", f"\nsummary {s}>>>") for one in asked for s in "AB")
        told = " ".join(capsys.readouterr().out.split())
        assert "thinking is 20 % of the characters of its answers, and is neither judged nor counted as length" in told
        metrics = read_json(tmp_path / "out/metrics.json")
        answers = metrics["models"][0]["answers"]
        assert answers["thinking"] == {"share": pytest.approx(2 / 10), "answers": 4, "only": 0, "unfinished": 0}
        assert answers["mean_characters"] == len("SO it is") and metrics["opponent_answers"]["thinking"]["answers"] == 4
        assert [row["response"] for row in read_jsonl(tmp_path / "out/answers/one.jsonl")] == ["SO it is"] * 4
        assert {row["text"] for row in read_jsonl(tmp_path / "out/generations.jsonl")} == {text}
        assert "Thinking</th>" in (tmp_path / "out/report.html").read_text()

        def refuse(*args, **kwargs):
            raise AssertionError("an answer was drawn again")

        # The records are the same: nothing is drawn again to judge the thinking, too.
        monkeypatch.setattr(isdaa.models.sampling.sampling, "sample", refuse)
        assert run("tldr", tmp_path / "out", *options, *asking, "--keep_thinking") == 0
        assert any("hm" in between(body["messages"][-1]["content"], "<<<summary A\n", "\nsummary A>>>") for body in judge.asked)
    answers = read_json(tmp_path / "out/metrics.json")["models"][0]["answers"]
    assert answers["thinking"]["kept"] and answers["mean_characters"] == len(text)
    assert "is judged and counted, too" in " ".join(capsys.readouterr().out.split())


def test_the_next_turn_does_not_see_what_was_thought(models, tmp_path, monkeypatch):
    prompts = []
    asked = Respondent.asked

    def watched(self, questions, turns):
        found = asked(self, questions, turns)
        prompts.extend(self.tokenizer.decode(one.ids) for one in found if one.turn == 1)
        return found

    writing(monkeypatch, "<think>hm hm</think>SO it is")
    monkeypatch.setattr(Respondent, "asked", watched)
    assert run("mt_bench", tmp_path / "out", "--model_path", models["one"]) == 0
    assert prompts and all("SO it is" in prompt and "hm hm" not in prompt for prompt in prompts)
    del prompts[:]
    assert run("mt_bench", tmp_path / "kept", "--model_path", models["one"], "--keep_thinking") == 0
    assert prompts and all("hm hm" in prompt for prompt in prompts)


def test_answers_that_are_thinking_alone_are_named(models, tmp_path, monkeypatch, capsys):
    writing(monkeypatch, "<think>I am cut")
    assert run("tldr", tmp_path / "out", "--model_path", models["one"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert (
        "one: 4 of 4 answers are thinking alone, all of them without an end: raise --max_new_tokens, or --keep_thinking" in told
    )
    assert read_json(tmp_path / "out/metrics.json")["models"][0]["answers"]["thinking"]["unfinished"] == 4


def test_how_many_thoughts_have_no_end_is_said():
    for unfinished, told in ((1, "2 of 8 answers are thinking alone, 1 of them without an end: raise"), (0, "alone")):
        found = {"share": 0.5, "answers": 3, "only": 2, "unfinished": unfinished}
        line = thinking_remarks({"turns": 8, "thinking": found})[1]
        assert line.startswith(told) or line.endswith(told)


def test_thinking_in_another_tools_answers(tmp_path):
    questions = benchmark("alpaca_eval").read_questions("project", limit=4)
    for name in ("mine", "base"):
        rows = [
            {"instruction": q.prompt[0]["content"], "output": f"<think>long {name}</think>SO", "generator": name, "dataset": "x"}
            for q in questions
        ]
        write_json(tmp_path / f"{name}.json", rows)
    with judge_server(lambda talk: "m") as (judge, url):
        asking = ["--judge_model", "toy", "--judge_base_url", url]
        files = ["--answers", tmp_path / "mine.json", "--opponent", tmp_path / "base.json"]
        assert run("alpaca_eval", tmp_path / "out", *files, *asking) in (0, 3)
        assert judge.asked and not any("long" in str(body["messages"]) for body in judge.asked)
    assert read_json(tmp_path / "out/metrics.json")["models"][0]["answers"]["mean_characters"] == 2


def test_what_a_file_counts_of_all_that_was_written_does_not_stay() -> None:
    answer = Said("x", "mine", ("<think>hm</think>SO",), tokens=99, row={"uid": "x", "metadata": {"token_len": 99}})
    assert (parted(answer, False).turns, parted(answer, False).tokens) == (("SO",), None)
    assert parted(answer, False).row == {"uid": "x"}
    assert parted(answer, True).turns == answer.turns and parted(answer, True).row == answer.row
    plain = Said("x", "mine", ("SO",), tokens=1, row={"metadata": {}})
    assert (parted(plain, False).turns, parted(plain, False).row) == (plain.turns, plain.row)


def test_every_question_without_a_verdict_has_a_reason(tmp_path, capsys):
    """Eight ways of a judge; what each came to stands in the metrics, in the terminal and on the page."""
    questions = benchmark("tldr").read_questions("project", limit=8)
    ways = {
        0: Answer("Better: A"),
        1: Answer(body=completion("Better: B", finish_reason="length")),
        2: Answer("<think>Better: A</think>"),
        3: Answer("Both have their merits."),
        4: Answer(status=429),
        5: Answer("b"),
        6: Answer("Response A"),
        7: Answer("<think>B is short</think>\nThey are equally good."),
    }

    def behaviour(number, body):
        user = body["messages"][-1]["content"]
        return ways[next(i for i, q in enumerate(questions) if q.prompt[0]["content"] in user)]

    for name, size in (("mine", 10), ("base", 20)):
        rows = [
            {"id": q.id, "response": "x" * (size * (40 if i in (1, 2, 3) else 1)), "model": name} for i, q in enumerate(questions)
        ]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    with serving(behaviour) as server:
        words = ["--answers", tmp_path / "mine.jsonl", "--opponent", tmp_path / "base.jsonl", "--judge_model", "toy"]
        words += ["--judge_base_url", server.url, "--judge_retries", "0", "--judge_concurrency", "1"]
        options = ["--questions", "project", "--limit", "8", "--evaluation.bootstrap", "100", *map(str, words)]
        assert main(["benchmark", "tldr", "--output", str(tmp_path / "out"), *options]) == 3
        told, asked = capsys.readouterr(), len(server.asked)
        assert "2 replies did not come (rate-limited 2): the same command asks for them again" in told.err
        metrics = read_json(tmp_path / "out/metrics.json")
        model = metrics["models"][0]
        rows = {row["lack"]: (row["replies"], row["questions"], row["characters"]) for row in model["lacks"]["reasons"]}
        assert rows == {
            "cut": (2, 1, 400), "thought only": (2, 1, 400), "unreadable": (2, 1, 400),
            "rate-limited": (2, 1, 10),
        }  # fmt: skip
        assert model["lacks"]["kept_characters"] == 10 and model["lacks"]["dropped_characters"] == (3 * 400 + 10) / 4
        assert model["lacks"]["waiting"] == metrics["questions"]["waiting"] == 1
        # Four of the eight have a verdict, wherever it is said.
        assert metrics["questions"]["judged"] == model["figures"]["win_rate"]["n"] == model["judged"] == 4
        assert (
            metrics["sentence"].startswith("Partial, 4 of 8 questions judged: ")
            and "4 questions cannot tell" in metrics["sentence"]
        )
        assert "4 of 8 questions; ±" in " ".join(told.out.split())
        assert "Partial: 4 of 8 questions are judged" in (tmp_path / "out/report.html").read_text()
        assert main(["benchmark", "tldr", "--output", str(tmp_path / "few"), *options, "--max_requests", "14"]) == 3
        few, said = read_json(tmp_path / "few/metrics.json"), capsys.readouterr()
        count = few["questions"]["judged"]
        assert few["questions"]["waiting"] == 1 and 0 < count == few["models"][0]["figures"]["win_rate"]["n"]
        assert f"{count} of 8 questions are judged, all replies are kept" in said.err
        assert f"Partial, {count} of 8 questions judged" in few["sentence"] and f"{count} of 8 questions; ±" in " ".join(
            said.out.split()
        )
        asked = len(server.asked)
        out = " ".join(told.out.split())
        assert "rate-limited 2, cut 2, thought only 2, unreadable 2" in out
        assert "more than of all: in the mean 302 against 10 characters" in out and "--judge_max_tokens" in out
        page = (tmp_path / "out/report.html").read_text()
        assert 'id="lacks"' in page and "thought only</td>" in page
        # Only those that may come are asked again; with more room those that were cut, too.
        assert main(["benchmark", "tldr", "--output", str(tmp_path / "out"), *options]) == 3
        assert len(server.asked) == asked + 2
        more = [*options, "--judge_max_tokens", "900"]
        assert main(["benchmark", "tldr", "--output", str(tmp_path / "out"), *more]) == 3
        assert len(server.asked) == asked + 2 + 2 + 2


def test_reasons_survive_files_and_short_or_few_answers_are_no_bias(tmp_path) -> None:
    bench = benchmark("hh")

    def one(name: str, length: int, lack: str) -> Judged:
        verdicts = tuple(Judgment(g, None if lack else 1.0, "unparsed" if lack else "hard", lack=lack) for g in ("a", "b"))
        return Judged(Question(name, "?"), Said(name, "mine", ("x" * length,)), Said(name, "other", ("y",)), verdicts)

    judged = [one("1", 10, ""), one("2", 90, "cut"), one("3", 90, "rate-limited")]
    bench.write_judgments(tmp_path / "j.jsonl", judged)
    again = bench.read_judgments(tmp_path / "j.jsonl", [], [])["mine"]
    assert [v.lack for row in again for v in row.verdicts] == ["", "", "cut", "cut", "rate-limited", "rate-limited"]
    few = lacks_of(judged)
    assert few is not None and len(lack_remarks(few)) == 1  # two questions say nothing of a bias
    assert "did not come (rate-limited 2)" in waiting([few, None]) and waiting([None]) == ""
    alike = lacks_of([*judged, one("4", 9, "cut"), one("5", 100, ""), one("6", 80, "")])
    assert len(lack_remarks(alike)) == 1
    assert len(lack_remarks(lacks_of([*judged, one("4", 90, "cut")]))) == 2
    assert lacks_of([one("1", 10, "")]) is None and lack_remarks(None) == []
