"""Whole benchmark runs on tiny models: five benchmarks, a judge over HTTP, reward judges, kills, budgets, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from benchmark_run_helpers import between, chat_model, chat_reward_model, judge_server
from evaluation_helpers import save, tiny
from patience import HANGS

import isdaa.models.loading
import isdaa.models.sampling.sampling
from isdaa.cli import main
from isdaa.evaluation.benchmarks import BENCHMARKS
from isdaa.evaluation.records import Lines
from isdaa.files import write_jsonl
from isdaa.foreign import read_json, read_jsonl
from isdaa.world import gold_reward, make_posts

NAMES = list(BENCHMARKS)
KEY = "sk-never-to-be-written-anywhere"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {name: chat_model(folder / name, seed) for seed, name in enumerate(("reference", "one", "two"))}


@pytest.fixture
def no_models(monkeypatch):
    """Any model that is loaded raises."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was needed")

    monkeypatch.setattr(isdaa.models.loading, "load_model", refuse)


def sides(user: str) -> tuple[str, str]:
    """The two responses of a comparing judge's question, in their order."""
    for first, second in (("m", "M"), ("answer of A", "answer of B"), ("summary A", "summary B"), ("response A", "response B")):
        if f"<<<{first}\n" in user:
            end = {"answer of A": "A", "answer of B": "B"}
            return between(user, f"<<<{first}\n", f"\n{end.get(first, first)}>>>"), between(
                user, f"<<<{second}\n", f"\n{end.get(second, second)}>>>"
            )
    raise AssertionError(user)


def verdict(user: str, second_is_better: bool) -> str:
    """Words for that verdict in the benchmark that asked."""
    if "m or M" in user:
        return "M" if second_is_better else "m"
    if "<<<answer of A" in user:
        return "I compared them. [[B>A]]" if second_is_better else "I compared them. [[A>B]]"
    return f"One is better.\nBetter: {'B' if second_is_better else 'A'}"


def fair(talk) -> str:
    """A judge who likes a text by its letters alone, wherever it stands; grades from 1 to 10."""
    user = talk[-1]["content"]
    if "Grade the" in user:
        return f"Seen. [[{1 + sum(map(ord, user)) % 10}]]"
    first, second = sides(user)
    return verdict(user, sum(map(ord, second)) % 97 > sum(map(ord, first)) % 97)


def good(talk) -> str:
    """A judge who wants to read GOOD."""
    user = talk[-1]["content"]
    return verdict(user, "GOOD" in sides(user)[1])


def biased(talk) -> str:
    """A judge who always likes the first."""
    return verdict(talk[-1]["content"], False)


def evaluate(name: str, output: Path, *options: object, limit: int | None = 4) -> int:
    """The command on few questions, with short answers and a judge who is not asked twice; its exit status."""
    words = [str(option) for option in options]
    words += ["--limit", str(limit)] if limit else []
    words += ["--max_new_tokens", "8"] if "--model_path" in words else []
    words += ["--judge_retries", "0"] if "--judge_model" in words else []
    return main(["benchmark", name, "--output", str(output), "--evaluation.bootstrap", "100", *words])


def judge_options(url: str) -> list[str]:
    return ["--judge_model", "toy", "--judge_base_url", url]


def project(models, *names: str, baseline: bool = True) -> list[str]:
    """Options of models on the project's questions."""
    paths = ["--model_path", *(models[name] for name in names), "--questions", "project"]
    return paths + (["--baseline", models["reference"]] if baseline else [])


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """Benchmark -> folder of a run of two models, judged by `fair`; made when first asked for."""

    @cache
    def run(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "out"
        with judge_server(fair) as (judge, url), pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPENAI_API_KEY", KEY)
            assert evaluate(name, folder, *project(models, "one", "two", baseline=name != "mt_bench"), *judge_options(url)) == 0
            assert len(judge.asked) == 16  # two turns or two orders, of four questions and two models
        return folder

    return run


@pytest.mark.parametrize("name", NAMES)
def test_a_run_judges_scores_and_reports_and_asks_nothing_again(name, finished, models, capsys, monkeypatch):
    folder = finished(name)
    monkeypatch.setattr(isdaa.models.loading, "load_model", None)  # nothing is generated again
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    capsys.readouterr()
    with judge_server(fair) as (judge, url):
        assert evaluate(name, folder, *project(models, "one", "two", baseline=name != "mt_bench"), *judge_options(url)) == 0
        assert not judge.asked
    printed = " ".join(capsys.readouterr().out.split())
    metrics = read_json(folder / "metrics.json")
    bench = BENCHMARKS[name]
    questions = bench.read_questions("project", None, 4)
    assert [model["model"] for model in metrics["models"]] == ["one", "two"]
    assert metrics["judge"]["usage"]["requests"] == 0
    assert metrics["questions"]["judged"] == 4 and not metrics["partial"]
    (pair,) = metrics["comparisons"]
    assert pair["better"] + pair["worse"] + pair["equal"] == pair["questions"] == 4
    # The original tool's files hold what was said.
    for model in metrics["models"]:
        label = model["model"]
        suffix = ".json" if name == "alpaca_eval" else ".jsonl"
        answers = bench.read_answers(folder / f"answers/{label}{suffix}", questions)
        assert {answer.model for answer in answers} == {label} and len(answers) == 4
        judged = bench.read_judgments(folder / f"judgments/toy/{label}{suffix}", questions, answers)[label]
        assert len(judged) == 4 and all(one.judge == "toy" for one in judged)
        if name != "mt_bench":  # two orders; a judge without a liking for a place contradicts itself nowhere
            assert model["details"]["flip_rate"] == 0.0 and model["counts"]["replies"] == 8
    assert metrics["sentence"] in printed
    page = (folder / "report.html").read_text()
    assert any(words in metrics["sentence"] for words in (" leads on ", " are level on ")) and metrics["sentence"] in page
    assert (folder / "charts/models.svg").is_file()
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in content for content in written) and KEY not in printed


def test_a_judge_who_likes_a_place_gives_half_and_flips_always(models, tmp_path, capsys):
    with judge_server(biased) as (_, url):
        for name in ("alpaca_eval", "arena_hard", "hh"):
            assert evaluate(name, tmp_path / name, *project(models, "one"), *judge_options(url)) == 0
            (model,) = read_json(tmp_path / name / "metrics.json")["models"]
            assert model["figures"]["win_rate"]["mean"] == 0.5
            assert model["details"]["flip_rate"] == 1.0
            assert "contradicts itself" in " ".join(model["notes"])
    assert "4 questions cannot tell two models apart" in " ".join(capsys.readouterr().out.split())


def test_answers_of_another_tool_are_judged_and_paired(tmp_path, no_models):
    (questions := tmp_path / "q.jsonl").write_text(
        "".join(json.dumps({"instruction": f"Task {i}", "output": "plain", "generator": "base"}) + "\n" for i in range(8))
    )
    files = []
    for label, words in (("strong", ["GOOD"] * 8), ("weak", ["GOOD", *["poor"] * 7])):
        rows = [{"instruction": f"Task {i}", "output": word, "generator": label} for i, word in enumerate(words)]
        (file := tmp_path / f"{label}.json").write_text(json.dumps(rows))
        files.append(str(file))
    with judge_server(good) as (_, url):
        options = ["--questions", questions, "--answers", *files, *judge_options(url)]
        assert evaluate("alpaca_eval", tmp_path / "out", *options, limit=None) == 0
    metrics = read_json(tmp_path / "out/metrics.json")
    # Against `plain` the word GOOD wins in both orders; where nothing is GOOD, the first always wins: a half.
    strong, weak = metrics["models"]
    assert strong["figures"]["win_rate"]["mean"] == 1.0
    assert weak["figures"]["win_rate"]["mean"] == pytest.approx((1 + 7 * 0.5) / 8)
    (pair,) = metrics["comparisons"]
    assert (pair["first"], pair["second"], pair["better"], pair["equal"], pair["worse"]) == ("strong", "weak", 7, 1, 0)
    assert pair["difference"]["mean"] == pytest.approx(7 / 16)
    assert pair["difference"]["low"] > 0
    assert metrics["opponent"] == "base"
    assert metrics["sentence"].startswith("strong leads on AlpacaEval 2 with a")
    assert "ahead of weak" in metrics["sentence"]


@pytest.mark.parametrize("name", NAMES)
def test_judgments_are_scored_again_without_judge_or_model(name, finished, tmp_path, monkeypatch):
    folder = finished(name)
    monkeypatch.setattr(isdaa.models.loading, "load_model", None)
    judgments, answers = sorted((folder / "judgments/toy").iterdir()), sorted((folder / "answers").iterdir())
    options = ["--judgments", *judgments, "--questions", "project", "--answers", *answers]
    assert evaluate(name, tmp_path / "again", *options) == 0
    first, second = (read_json(where / "metrics.json") for where in (folder, tmp_path / "again"))
    assert [model["figures"] for model in second["models"]] == [model["figures"] for model in first["models"]]
    assert second["comparisons"] == first["comparisons"]
    templates = [] if name == "arena_hard" else first["judge"]["templates"]  # its files have no place for them
    assert second["judge"] == {"kind": "file", "name": "toy", "templates": templates}


def test_gold_judges_the_worlds_summaries(tmp_path, capsys):
    model = save(tiny(), tmp_path / "model")
    options = ["--model_path", model, "--questions", "world:small", "--split", "test", "--judge", "gold"]
    assert evaluate("tldr", tmp_path / "out", *options, limit=6) == 0
    posts = {post["id"]: post for post in make_posts("small", 6, split="eval")}
    rows = read_jsonl(tmp_path / "out/generations.jsonl")
    wins = []
    for row in rows:
        post = posts[row["question"]]
        mine, other = gold_reward(post["facts"], row["text"], row["finished"]), gold_reward(post["facts"], post["summary"], True)
        wins.append(0.5 if mine == other else float(mine > other))
    metrics = read_json(tmp_path / "out/metrics.json")
    assert len(wins) == 6 and metrics["models"][0]["figures"]["win_rate"]["mean"] == pytest.approx(sum(wins) / 6)
    assert "flip_rate" not in metrics["models"][0]["details"]
    assert metrics["judge"]["kind"] == "reward"
    assert rows[0]["sampling"] == {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 8}
    before = (tmp_path / "out/scores.jsonl").read_bytes()
    assert evaluate("tldr", tmp_path / "out", *options, limit=6) == 0
    assert (tmp_path / "out/scores.jsonl").read_bytes() == before


def test_figures_of_more_questions_are_not_replaced(tmp_path, capsys):
    model = save(tiny(), tmp_path / "model")
    options = ["--model_path", model, "--questions", "world:small", "--split", "test", "--judge", "gold"]
    assert evaluate("tldr", tmp_path / "out", *options, limit=4) == 0
    before = (tmp_path / "out/metrics.json").read_bytes()
    assert evaluate("tldr", tmp_path / "out", *options, limit=2) == 2
    assert "holds figures on 2 more questions, which are not replaced" in capsys.readouterr().err
    assert (tmp_path / "out/metrics.json").read_bytes() == before
    assert evaluate("tldr", tmp_path / "out", *options, limit=5) == 0


@pytest.mark.parametrize("name", ["alpaca_eval", "arena_hard"])
def test_a_reward_model_prefers_what_it_scores_higher(name, models, tmp_path):
    reward = chat_reward_model(tmp_path / "reward")
    assert evaluate(name, tmp_path / "out", *project(models, "one"), "--judge", reward) == 0
    scores = [row["score"] for row in read_jsonl(tmp_path / "out/scores.jsonl")]
    assert len(scores) == 8  # of four answers and four of the opponent's
    (model,) = read_json(tmp_path / "out/metrics.json")["models"]
    wins = [float(mine > other) for mine, other in zip(scores[:4], scores[4:], strict=True)]
    assert model["figures"]["win_rate"]["mean"] == pytest.approx(sum(wins) / 4)
    (file,) = next((tmp_path / "out/judgments").iterdir()).iterdir()
    again = BENCHMARKS[name].read_judgments(file, BENCHMARKS[name].read_questions("project", None, 4), [])["one"]
    assert [one.verdicts[0].value for one in again] == wins


def test_without_a_judge_there_are_answers_and_a_word_on_judging(models, tmp_path, capsys):
    assert evaluate("mt_bench", tmp_path / "out", *project(models, "one", baseline=False)) == 0
    out = capsys.readouterr().out
    assert "--judge_model" in out and "answers" in out
    assert not (tmp_path / "out/report.html").exists()
    rows = read_jsonl(tmp_path / "out/generations.jsonl")
    assert [row["turn"] for row in rows] == [1] * 4 + [2] * 4
    with judge_server(fair) as (judge, url):
        assert evaluate("mt_bench", tmp_path / "out", *project(models, "one", baseline=False), *judge_options(url)) == 0
        assert len(judge.asked) == 8
    assert read_jsonl(tmp_path / "out/generations.jsonl") == rows


def test_answers_alone_do_not_take_the_place_of_figures(finished, models, capsys):
    folder = finished("mt_bench")
    before = (folder / "metrics.json").read_bytes()
    assert evaluate("mt_bench", folder, *project(models, "one", baseline=False)) == 0
    assert "nothing is judged" in capsys.readouterr().out
    assert (folder / "metrics.json").read_bytes() == before


def test_models_judged_on_different_questions_are_told(tmp_path, capsys):
    asked = [row | {"turn": turn} for row in [{"question_id": 81 + i} for i in range(4)] for turn in (1, 2)]
    rows = [{**row, "model": model, "judge": ["j", "t"], "judgment": "[[5]]", "score": 5} for model in "AB" for row in asked]
    questions, file = tmp_path / "questions.jsonl", tmp_path / "judgments.jsonl"
    write_jsonl(questions, [{"question_id": 81 + i, "category": "writing", "turns": ["Hi", "And?"]} for i in range(4)])
    write_jsonl(file, rows[:-2])  # B lacks the last question
    options = ["--questions", questions, "--judgments", file]
    assert evaluate("mt_bench", tmp_path / "out", *options, limit=None) == 2
    assert "judgments.jsonl: no judgment of B to question 84 ('Hi') of 4 questions; --missing skip" in capsys.readouterr().err
    assert evaluate("mt_bench", tmp_path / "out", *options, "--missing", "loss", limit=None) == 2
    assert "--missing loss: mt_bench grades every answer by itself" in capsys.readouterr().err
    assert evaluate("mt_bench", tmp_path / "out", *options, "--missing", "skip", limit=None) == 0
    words = "judged on 3 of 4 questions: compare it by the paired differences alone"
    assert f"B: {words}" in " ".join(capsys.readouterr().out.split())
    assert [words in model["notes"] for model in read_json(tmp_path / "out/metrics.json")["models"]] == [False, True]


def test_mt_bench_asks_its_second_turn_after_the_first_and_at_the_categorys_temperature(models, tmp_path):
    assert evaluate("mt_bench", tmp_path / "out", *project(models, "one", baseline=False), limit=8) == 0
    questions = {question.id: question for question in BENCHMARKS["mt_bench"].read_questions("project", None, 8)}
    rows = read_jsonl(tmp_path / "out/generations.jsonl")
    assert len(rows) == 2 * len(questions)
    first = {row["question"]: row for row in rows if row["turn"] == 1}
    for row in rows:
        wanted = BENCHMARKS["mt_bench"].generation.temperature_of(questions[row["question"]])
        assert row["sampling"]["temperature"] == wanted
        if row["turn"] == 2:
            assert row["prompt_tokens"] > first[row["question"]]["prompt_tokens"] + first[row["question"]]["tokens"] - 2


def test_what_does_not_fit_the_context_is_shorter_or_empty_and_said(tmp_path, capsys):
    model = chat_model(tmp_path / "short", context=260)
    with judge_server(fair) as (_, url):
        options = ["--model_path", model, "--questions", "project", *judge_options(url)]
        words = ["--output", str(tmp_path / "out"), "--limit", "3", "--max_new_tokens", "200", "--evaluation.bootstrap", "100"]
        assert main(["benchmark", "mt_bench", *words, *options]) == 0
    rows = read_jsonl(tmp_path / "out/generations.jsonl")
    assert all(row["prompt_tokens"] + row["room"] <= 260 or row["room"] == 0 for row in rows)
    empty = [row for row in rows if row["room"] == 0]
    assert empty and all(row["text"] == "" and not row["finished"] for row in empty)
    told = " ".join(capsys.readouterr().out.split())
    assert f"{len(empty)} turns had no room left in the model's context" in told


def test_an_interrupted_generation_loses_one_batch(models, tmp_path, monkeypatch):
    drawn = []
    true = isdaa.models.sampling.sampling.sample

    def counting(model, prompts, *rest, **more):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(len(prompts))
        return true(model, prompts, *rest, **more)

    monkeypatch.setattr(isdaa.models.sampling.sampling, "sample", counting)
    options = [*project(models, "one", "two", baseline=False), "--evaluation.batch_size", "2"]
    assert evaluate("alpaca_eval", tmp_path / "out", *options, limit=8) == 130
    kept = read_jsonl(tmp_path / "out/generations.jsonl")
    assert drawn == [2, 2, 2] and len(kept) == 6
    with open(tmp_path / "out/generations.jsonl", "ab") as file:
        file.write(b'{"key": "torn')  # as a kill in the middle of a write leaves it
    drawn.clear()
    drawn.extend([0] * 4)
    assert evaluate("alpaca_eval", tmp_path / "out", *options, limit=8) == 0
    assert sum(drawn) == 16 - 6
    rows = read_jsonl(tmp_path / "out/generations.jsonl")
    assert rows[:6] == kept and len({row["key"] for row in rows}) == len(rows) == 16
    assert evaluate("alpaca_eval", tmp_path / "whole", *options[:-2], limit=8) == 0
    whole = {row["key"]: row["text"] for row in read_jsonl(tmp_path / "whole/generations.jsonl")}
    assert whole == {row["key"]: row["text"] for row in rows}  # neither batches nor the kill change an answer


@pytest.mark.slow  # tests/evaluation/test_judge_cache.py kills what asks, without a benchmark around it
def test_a_kill_while_judging_loses_no_reply(models, tmp_path):
    program = [sys.executable, "-m", "isdaa.cli", "benchmark", "tldr", "--output", str(tmp_path / "out")]
    program += ["--limit", "6", "--max_new_tokens", "8", "--evaluation.bootstrap", "100", "--judge_concurrency", "1"]
    processes: list[subprocess.Popen] = []

    def kill(number: int) -> None:
        if number == 6:
            os.kill(processes[0].pid, signal.SIGKILL)

    with judge_server(fair, kill) as (judge, url):
        command = [*program, *project(models, "one"), *judge_options(url)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment))
        assert processes[0].wait(HANGS) == -signal.SIGKILL
        generated = (tmp_path / "out/generations.jsonl").read_bytes()
        assert len(judge.asked) == 6
        assert main(command[3:]) == 0
        # The sixth was asked, and its reply never arrived: it alone is asked again.
        asked = judge.contents()
        assert len(asked) == 12 + 1 and len(set(asked)) == 12 and asked[5] == asked[6]
    assert (tmp_path / "out/generations.jsonl").read_bytes() == generated


def test_a_spent_budget_keeps_everything_and_says_that_the_result_is_partial(models, tmp_path, capsys):
    options = project(models, "one", "two")
    with judge_server(fair) as (judge, url):
        budget = [*options, *judge_options(url), "--max_requests"]
        assert evaluate("arena_hard", tmp_path / "out", *budget, "3") == 3
        told = capsys.readouterr()
        assert "no question is judged yet" in told.err and told.err.count("\n") <= 2
        assert not (tmp_path / "out/metrics.json").exists()
        assert evaluate("arena_hard", tmp_path / "out", *budget, "6") == 3
        told = capsys.readouterr()
        metrics = read_json(tmp_path / "out/metrics.json")
        assert "2 of 4 questions are judged" in told.err.splitlines()[-1]
        assert metrics["partial"] and metrics["questions"]["judged"] == 2
        assert metrics["sentence"].startswith("Partial, 2 of 4 questions judged: ")
        assert "Partial: 2 of 4" in (tmp_path / "out/report.html").read_text()
        assert [model["counts"]["questions"] for model in metrics["models"]] == [2, 2]  # the same two of both models
        assert evaluate("arena_hard", tmp_path / "out", *budget, "100") == 0
        assert len(judge.asked) == len(set(judge.contents())) == 16
    assert not read_json(tmp_path / "out/metrics.json")["partial"]


def test_a_budget_of_nothing_asks_nothing_and_does_not_promise_to_go_on(models, tmp_path, capsys):
    options = project(models, "one")
    with judge_server(fair) as (judge, url):
        asking = [*options, *judge_options(url)]
        assert evaluate("tldr", tmp_path / "out", *asking, "--max_requests", "0") == 3
        told = capsys.readouterr().err
        assert "--max_requests 0 lets nothing be asked" in told and "a higher number goes on from here" in told
        assert not judge.asked and "the same command goes on" not in told.lower()
        assert evaluate("tldr", tmp_path / "out", *asking, limit=2) == 0  # two of the four questions
        assert evaluate("tldr", tmp_path / "out", *asking, "--max_requests", "0", limit=2) == 0
        assert len(judge.asked) == 4
        capsys.readouterr()
        assert evaluate("tldr", tmp_path / "out", *asking, "--max_requests", "0") == 3
        told = capsys.readouterr()
        assert "2 of 4 questions are judged" in told.err and "Partial, 2 of 4" in told.out and len(judge.asked) == 4
    page = (tmp_path / "out/report.html").read_text()
    assert "Partial: 2 of 4 questions are judged" in page and "same command" not in page


def test_replies_that_say_nothing_are_counted(models, tmp_path, capsys):
    def mumbling(talk):
        return "Hm." if "lift" in talk[-1]["content"] else fair(talk)

    with judge_server(mumbling) as (_, url):
        assert evaluate("tldr", tmp_path / "out", *project(models, "one"), *judge_options(url)) == 0
    (model,) = read_json(tmp_path / "out/metrics.json")["models"]
    assert model["counts"]["unparsed"] == 2 and model["counts"]["left_out"] == 1
    assert "2 of 8 replies gave no verdict" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["mt_bench", "arena_hard"])
def test_a_judge_who_never_says_anything_gives_no_result(name, models, tmp_path, capsys):
    with judge_server(lambda talk: "Hm.") as (judge, url):
        options = [*project(models, "one", "two", baseline=name != "mt_bench"), *judge_options(url)]
        assert evaluate(name, tmp_path / "out", *options, limit=2) == 3
        told = capsys.readouterr()
        (error,) = [line for line in told.err.splitlines() if line.startswith("isdaa: error: ")]
        assert "none of the 8 replies of toy could be read (the first: 'Hm.'), so there is no result" in error
        assert "name another judge" in error and "--judge_max_tokens" not in error  # they were not cut: room is no help
        assert str(tmp_path / "out") in error and "Traceback" not in told.err
        assert "No reply of the judge could be read" in " ".join(told.out.split())
        # All is kept, and nothing is asked again.
        page = (tmp_path / "out/report.html").read_text()
        assert "No reply of the judge could be read, so there is no result." in page and '<td class="n">4</td>' in page
        assert evaluate(name, tmp_path / "out", *options, limit=2) == 3 and len(judge.asked) == 8
    judgments = sorted((tmp_path / "out/judgments/toy").iterdir())
    capsys.readouterr()
    assert evaluate(name, tmp_path / "again", "--judgments", *judgments, "--questions", "project", limit=2) == 3
    assert "none of the 8 verdicts of the files could be read" in capsys.readouterr().err


def test_a_question_without_a_reply_is_counted_and_asked_again(models, tmp_path, capsys):
    well = []

    def failing(talk):
        return fair(talk) if well or "lift" not in talk[-1]["content"] else 500

    with judge_server(failing) as (judge, url):
        options = [*project(models, "one"), *judge_options(url)]
        assert evaluate("tldr", tmp_path / "out", *options) == 3
        told = capsys.readouterr()
        assert "2 replies did not come (no answer 2): the same command asks for them again" in told.err
        metrics = read_json(tmp_path / "out/metrics.json")
        assert metrics["models"][0]["counts"]["left_out"] == 1 and metrics["judge"]["usage"]["failures"] == 2
        assert metrics["partial"] and metrics["sentence"].startswith("Partial, 3 of 4 questions judged: ")
        page = (tmp_path / "out/report.html").read_text()
        assert "Partial: 3 of 4 questions are judged. For 1 no reply arrived; the same command asks again." in page
        well.append(True)
        before = len(judge.asked)
        assert evaluate("tldr", tmp_path / "out", *options) == 0
        assert len(judge.asked) == before + 2
    assert read_json(tmp_path / "out/metrics.json")["models"][0]["counts"]["left_out"] == 0


def test_right_answers_of_a_file_are_used(tmp_path, no_models):
    with judge_server(fair) as (judge, url):
        (turns := tmp_path / "mt.jsonl").write_text(json.dumps({"question_id": 1, "category": "math", "turns": ["1+1?"]}) + "\n")
        row = {"question_id": 1, "model_id": "m", "choices": [{"index": 0, "turns": ["3"]}]}
        for name, model, said in (("given", "m", "3"), ("right", "teacher", "It is two, of course.")):
            line = row | {"model_id": model, "choices": [{"index": 0, "turns": [said]}]}
            (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
        options = ["--questions", turns, "--answers", tmp_path / "given.jsonl", "--references", tmp_path / "right.jsonl"]
        assert evaluate("mt_bench", tmp_path / "mt", *options, *judge_options(url), limit=None) == 0
        assert "It is two, of course." in judge.contents()[-1]
    (model,) = read_json(tmp_path / "mt/metrics.json")["models"]
    assert model["figures"]["score"]["n"] == 1


def test_what_the_judge_is_sent(models, tmp_path):
    with judge_server(fair) as (judge, url):
        options = [*project(models, "one"), *judge_options(url)]
        assert evaluate("alpaca_eval", tmp_path / "a", *options, limit=1) == 0
        own = ["--judge_temperature", "none", "--judge_max_tokens", "77", "--judge_no_logprobs"]
        assert evaluate("alpaca_eval", tmp_path / "b", *options, *own, limit=1) == 0
    first, second = judge.asked[0], judge.asked[-1]
    assert (first["temperature"], first["max_tokens"], first["top_logprobs"]) == (0.0, 4, 5)
    assert "temperature" not in second and "logprobs" not in second and second["max_tokens"] == 77


def test_the_reference_of_the_models_record_is_the_opponent(models, tmp_path):
    from isdaa.record import ModelRecord, record_text

    policy = Path(chat_model(tmp_path / "policy", 5))
    record = ModelRecord("policy", {}, reference=models["reference"])
    (policy / "isdaa.json").write_text(record_text(record, policy))
    with judge_server(fair) as (_, url):
        options = ["--model_path", str(policy), "--questions", "project", *judge_options(url)]
        assert evaluate("arena_hard", tmp_path / "out", *options) == 0
    assert read_json(tmp_path / "out/metrics.json")["opponent"] == "reference"


def test_a_model_against_itself_is_another_draw(models, tmp_path):
    with judge_server(fair) as (_, url):
        options = ["--model_path", models["one"], "--baseline", models["one"], "--questions", "project", *judge_options(url)]
        assert evaluate("tldr", tmp_path / "out", *options) == 0
    assert read_json(tmp_path / "out/metrics.json")["opponent"] == "one (opponent)"
    names = {path.name for path in (tmp_path / "out/answers").iterdir()}
    assert names == {"one.jsonl", "one--opponent.jsonl"}
    first, second = (read_jsonl(tmp_path / "out/answers" / name) for name in sorted(names))
    assert [row["response"] for row in first] != [row["response"] for row in second]


def test_a_script_in_an_answer_stays_text(tmp_path, no_models):
    script = "GOOD <script>document.title='ran'</script>"
    (questions := tmp_path / "q.json").write_text(json.dumps([{"instruction": "Say", "output": "x", "generator": "base"}]))
    (answers := tmp_path / "a.json").write_text(json.dumps([{"instruction": "Say", "output": script, "generator": "<b>m</b>"}]))
    with judge_server(good) as (_, url):
        options = ["--questions", questions, "--answers", answers, *judge_options(url)]
        assert evaluate("alpaca_eval", tmp_path / "out", *options, limit=None) == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>m</b>" not in page
    assert (tmp_path / "out/judgments/toy/b--m--b.json").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["alpaca"], ["alpaca_eval"]),
        (["mt_bench", "--judge", "gold", "--questions", "project"], ["mt_bench", "--judge_model"]),
        (["mt_bench", "--opponent", "{here}/a.json"], ["mt_bench", "--opponent"]),
        (["tldr", "--judge", "gold", "--questions", "project"], ["facts", "world:small"]),
        (["tldr", "--judge", "./absent"], ["absent", "no such folder"]),
        (["tldr", "--judge", "gold", "--judge_model", "toy"], ["--judge", "--judge_model"]),
        (["tldr", "--judge_base_url", "http://localhost:1/v1"], ["--judge_model"]),
        (["tldr", "--judge_model", "toy", "--judge_temperature", "warm"], ["warm", "none"]),
        (["tldr", "--judge_model", "toy", "--judge_price_in", "1"], ["both prices", "--judge_price_out"]),
        (["tldr", "--judge_model", "toy", "--judge_timeout", "0"], ["--judge_timeout must be at least 0.001"]),
        (["tldr", "--judge_model", "toy", "--judge_temperature", "nan"], ["--judge_temperature must be"]),
        (["tldr", "--judge_model", "toy", "--judge_concurrency", "0"], ["--judge_concurrency: expected a whole number ≥ 1"]),
        (["tldr", "--judge_model", "toy", "--max_requests", "-1"], ["--max_requests: expected a whole number ≥ 0, got '-1'"]),
        (["tldr", "--judge_model", " "], ["--judge_model is empty"]),
        (["mt_bench", "--questions", "project", "--split", "test"], ["--split test", "no splits", "isdaa"]),
        (["tldr", "--questions", "project", "--split", "test"], ["--split test", "no splits", "isdaa"]),
        (["alpaca_eval", "--split", "eval"], ["--split eval", "one file", "tatsu-lab/alpaca_eval"]),
        (["arena_hard", "--questions", "{here}/a.json", "--split", "test"], ["--split test", "a.json"]),
        (["hh", "--questions", "{here}/a.json", "--split", "test"], ["--split test", "a.json", "no splits"]),
        (["arena_hard", "--questions", "project", "--judge_model", "toy", "--judge_base_url", "http://localhost:1/v1"],
         ["--opponent", "--baseline"]),
        (["arena_hard", "--questions", "projekt"], ["projekt"]),
        (["arena_hard", "--reference", "x"], ["--reference", "--baseline"]),
        (["arena_hard", "--evaluation.prompts", "3"], ["--evaluation.prompts", "--limit"]),
        (["arena_hard", "--answers", "{here}/nothing.jsonl"], ["nothing.jsonl", "no such file"]),
        (["arena_hard", "--limit", "0"], ["--limit: expected a whole number ≥ 1"]),
        (["tldr", "--gamed", "{here}/a.json", "--questions", "project"], ["--gamed", "alpaca_eval"]),
        (["alpaca_eval", "--gamed", "{here}/no.csv", "--questions", "project"], ["no.csv: no such file"]),
        (["alpaca_eval", "--difficulty", "x", "--questions", "project"], ["--difficulty", "--gamed FILE"]),
        (["tldr", "--missing", "skip", "--questions", "project"], ["--missing", "--answers", "--judgments"]),
        (["alpaca_eval", "--chat_template", "{here}/none.jinja"], ["none.jinja"]),
        (["alpaca_eval", "--judgments", "{here}/a.json"], ["--judgments", "--model_path"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(options, words, models, tmp_path, capsys, no_models):
    (tmp_path / "a.json").write_text("[]")
    before = sorted(tmp_path.iterdir())
    given = [option.format(here=tmp_path) for option in options]
    assert main(["benchmark", *given, "--model_path", models["one"], "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("isdaa: error: ")
    assert all(word in error for word in words), error
    assert sorted(tmp_path.iterdir()) == before


def test_a_tokenizer_without_template_is_refused_with_the_way_out(tmp_path, capsys):
    model = chat_model(tmp_path / "bare", template=None)
    options = ["--model_path", model, "--questions", "project"]
    assert evaluate("mt_bench", tmp_path / "out", *options) == 2
    assert "--chat_template FILE" in capsys.readouterr().err and not (tmp_path / "out").exists()
    (template := tmp_path / "t.jinja").write_text(TEMPLATE)
    assert evaluate("mt_bench", tmp_path / "out", *options, "--chat_template", str(template)) == 0


def test_a_broken_chat_template_is_named_by_its_file(models, tmp_path, capsys, no_models):
    model = tmp_path / "model"
    shutil.copytree(models["one"], model)
    options = ["--model_path", str(model), "--questions", "project"]
    given = tmp_path / "given.jinja"
    for broken, more in ((given, ["--chat_template", str(given)]), (model / "chat_template.jinja", [])):
        broken.write_text("one\n{% for m in messages %}")
        assert evaluate("mt_bench", tmp_path / "out", *options, *more) == 2
        error = capsys.readouterr().err
        assert f"{broken}: the chat template refuses" in error and "TemplateSyntaxError" in error and "line 2" in error
        broken.write_text("{{ messages[0]['content'] }}")
        assert evaluate("mt_bench", tmp_path / "out", *options, *more) == 2
        assert f"{broken}: the chat template leaves out the assistant's words" in capsys.readouterr().err
        broken.write_text("{% if 'railway' in messages[0]['content'] %}{{ raise_exception('no trains') }}{% endif %}" + TEMPLATE)
        assert evaluate("mt_bench", tmp_path / "out", *options, *more) == 2
        error = capsys.readouterr().err
        assert "project.jsonl:2: " in error and "no trains" in error and f"the template in {broken}" in error
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_program_is_no_store(tmp_path):
    (file := tmp_path / "generations.jsonl").write_text('{"name": 1}\n')
    with pytest.raises(Exception, match=r"generations.jsonl: a line has no key"):
        Lines(file)
