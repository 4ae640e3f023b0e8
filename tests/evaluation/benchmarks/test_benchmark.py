"""All benchmarks by their protocol, on the project's own questions."""

from collections import Counter

import pytest
from benchmark_helpers import Said

from isdaa.errors import UserError
from isdaa.evaluation.benchmarks import BENCHMARKS, benchmark
from isdaa.evaluation.benchmarks.sets.benchmark import Answer, Judged, Scoring, next_prompt
from isdaa.evaluation.benchmarks.sets.mt_bench import TEMPERATURES, WITH_REFERENCE
from isdaa.evaluation.benchmarks.sets.rows import project_rows

REPLY = {"alpaca_eval": "M", "mt_bench": "[[8]]", "arena_hard": "[[B>A]]", "hh": "Better: B", "tldr": "Better: B"}


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r'benchmark \'mtbench\' is unknown \(did you mean "mt_bench"\?\)'):
        benchmark("mtbench")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_questions_to_scores(name: str) -> None:
    """A judge that always prefers the second place, or gives 8: half of all, in both orders; or a mean of 8."""
    bench = BENCHMARKS[name]
    assert bench.name == name
    questions = bench.read_questions("project")
    assert len(questions) == 24 and len({q.id for q in questions}) == 24
    assert len(bench.read_questions("project", limit=5)) == 5
    judged = []
    for question in questions:
        answers: list[str] = []
        while next_prompt(question, answers) is not None:
            answers.append(f"answer {len(answers)} to {question.id}")
        answer = Answer(question.id, "mine", tuple(answers))
        opponent = None if bench.opponent is None else Answer(question.id, "base", ("another",))
        opponents = bench.opponents([question], [] if opponent is None else [opponent])
        asked = bench.judge_questions(question, answer, opponents[question.id])
        assert len(asked) == 2 and all(set(m) == {"role", "content"} for one in asked for m in one.messages)
        assert len({one.game for one in asked}) == 2
        verdicts = tuple(bench.parse(one, Said(REPLY[name])) for one in asked)
        judged.append(Judged(question, answer, opponents[question.id], verdicts, "judge"))
        assert 0 <= bench.generation.temperature_of(question) <= 1
    score = bench.score({"mine": judged}, Scoring(resamples=20))["mine"]
    assert score.figures[score.headline].value == pytest.approx(8.0 if name == "mt_bench" else 0.5, abs=1e-6)
    assert set(score.by_question) == {q.id for q in questions}


def test_the_projects_questions() -> None:
    rows = [row for row, _ in project_rows()]
    assert Counter(row["category"] for row in rows) == dict.fromkeys(TEMPERATURES, 3)
    assert all(len(row["turns"]) == 2 for row in rows)
    assert all((row["category"] in WITH_REFERENCE) == ("reference" in row) for row in rows)
    assert all(len(row.get("reference", ["", ""])) == 2 for row in rows)


def test_a_folder_called_project_hides_nothing(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path)
    assert [len(one.read_questions("project", None, 3)) for one in BENCHMARKS.values()] == [3] * len(BENCHMARKS)


def test_answers_of_two_models_are_no_opponent() -> None:
    bench = BENCHMARKS["alpaca_eval"]
    questions = bench.read_questions("project", None, 1)
    answers = [Answer("0", model, ("text",)) for model in ("one", "two")]
    with pytest.raises(UserError, match="the answers are of one, two: give those of one model alone"):
        bench.opponents(questions, answers)


def test_a_hub_file_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*args: object, **options: object) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    for name, file in (
        ("alpaca_eval", "alpaca_eval_gpt4_baseline.json"),
        ("mt_bench", "question.jsonl"),
        ("arena_hard", "question.jsonl"),
    ):
        with pytest.raises(UserError, match=rf"{file} cannot be had from the Hub \(no network\); download it"):
            BENCHMARKS[name].read_questions(BENCHMARKS[name].source)


def test_the_hubs_file_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    import huggingface_hub

    file = tmp_path / "alpaca_eval.json"
    file.write_text('[{"instruction": "Do.", "output": "x", "generator": "g", "dataset": "d"}]')
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **options: asked.append((args, options)) or str(file))
    (question,) = BENCHMARKS["alpaca_eval"].read_questions("tatsu-lab/alpaca_eval")
    opponent = BENCHMARKS["alpaca_eval"].opponents([question])["0"]
    assert (opponent.model, opponent.turns) == ("g", ("x",))  # the file brings the baseline along
    assert question.category == "d" and asked == [
        (("tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json"), {"repo_type": "dataset"})
    ]
