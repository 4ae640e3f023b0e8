"""MT-Bench: the original's files there and back, what the judge sees, grades by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmark_helpers import Said, jsonl, lines

from isdaa.errors import UserError
from isdaa.evaluation.benchmarks.sets.benchmark import Answer, Judged, Judgment, Scoring, next_prompt
from isdaa.evaluation.benchmarks.sets.mt_bench import MT_BENCH as BENCH
from isdaa.evaluation.benchmarks.sets.mt_bench import with_references
from isdaa.evaluation.statistics import bootstrap_counts

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a verse.", "Now without rhyme."]},
    {"question_id": 111, "category": "math", "turns": ["What is 2 + 2?", "And times 3?"], "reference": ["4", "12"]},
    {"question_id": 131, "category": "extraction", "turns": ["List the names.", "Sort them."], "note": {"own": 1}},
]
ANSWERS = [
    {
        "question_id": row["question_id"],
        "answer_id": f"id{i}",
        "model_id": "mine",
        "choices": [{"index": 0, "turns": [f"first {i}", f"second {i}"]}, {"index": 1, "turns": ["other", "other"]}],
        "tstamp": 1.5 + i,
        "generate_params": {"top_p": 0.9},
    }
    for i, row in enumerate(QUESTIONS)
]


@pytest.fixture
def questions(tmp_path: Path) -> list:
    return BENCH.read_questions(str(jsonl(tmp_path / "question.jsonl", QUESTIONS)))


def test_answers_there_and_back_without_loss(questions: list, tmp_path: Path) -> None:
    answers = BENCH.read_answers(jsonl(tmp_path / "mine.jsonl", ANSWERS), questions)
    assert answers[1].turns == ("first 1", "second 1") and answers[1].question == "111"
    BENCH.write_answers(tmp_path / "again.jsonl", questions, answers)
    assert lines(tmp_path / "again.jsonl") == ANSWERS


def test_new_answers_keep_the_questions_number(questions: list, tmp_path: Path) -> None:
    BENCH.write_answers(tmp_path / "new.jsonl", questions, [Answer("81", "mine", ("a", "b"))])
    (row,) = lines(tmp_path / "new.jsonl")
    assert row["question_id"] == 81 and row["choices"] == [{"index": 0, "turns": ["a", "b"]}] and row["answer_id"]
    assert BENCH.read_answers(tmp_path / "new.jsonl", questions[:1])[0].turns == ("a", "b")


def test_the_hubs_column_names_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": ["One?", "Two?"], "prompt_id": 7, "category": "stem", "reference": []}]
    (question,) = BENCH.read_questions(str(jsonl(tmp_path / "hub.jsonl", rows)))
    assert (question.id, question.follow_ups, question.references) == ("7", ("Two?",), ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"turns": "One?"}, "question.jsonl:2: key 'turns' must be a list of texts, not 'One\\?'"),
        ({"turns": []}, "question.jsonl:2: key 'turns' is empty"),
        ({"question_id": 81}, r"question.jsonl:2: question 81 is there already \(.*question.jsonl:1\)"),
        ({"question_id": 1.5}, "key 'question_id' must be an id"),
        ({"category": None}, "key 'category' is null"),
    ],
)
def test_a_bad_question_is_one_line(tmp_path: Path, change: dict, message: str) -> None:
    path = jsonl(tmp_path / "question.jsonl", [QUESTIONS[0], {**QUESTIONS[1], **change}])
    with pytest.raises(UserError, match=message):
        BENCH.read_questions(str(path))


def test_a_bad_answer_is_one_line(questions: list, tmp_path: Path) -> None:
    def refused(rows: list, message: str) -> None:
        with pytest.raises(UserError, match=message):
            BENCH.read_answers(jsonl(tmp_path / "mine.jsonl", rows), questions)

    refused([{**ANSWERS[0], "choices": []}], "mine.jsonl:1: key 'choices' must be a list of objects")
    refused([{**ANSWERS[0], "choices": [{"index": 0, "turns": ["a", 2]}]}], r"choices\[0\]: key 'turns' must be a list of texts")
    refused([{**ANSWERS[0], "choices": [{"turns": ["a"]}]}], "1 turns are answered of 2 of question 81")
    refused([*ANSWERS, ANSWERS[1]], r"mine.jsonl:4: mine answers question 111 again \(first at .*mine.jsonl:2\)")


def test_temperatures_and_turns(questions: list) -> None:
    by_category = {question.category: BENCH.generation.temperature_of(question) for question in questions}
    assert by_category == {"writing": 0.7, "math": 0.0, "extraction": 0.0}
    assert BENCH.generation.by_category["humanities"] == BENCH.generation.by_category["stem"] == 0.1
    assert BENCH.generation.by_category["roleplay"] == 0.7
    question = questions[0]
    assert next_prompt(question, []) == [{"role": "user", "content": "Write a verse."}]
    assert next_prompt(question, ["A"]) == [
        {"role": "user", "content": "Write a verse."},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "Now without rhyme."},
    ]
    assert next_prompt(question, ["A", "B"]) is None


def test_what_the_judge_sees(questions: list, tmp_path: Path) -> None:
    right = jsonl(tmp_path / "right.jsonl", [{**ANSWERS[1], "choices": [{"index": 0, "turns": ["4", "12"]}]}])
    question = with_references(questions, right)[1]
    first, second = BENCH.judge_questions(question, Answer("111", "mine", ("four {x}", "twelve")), None)
    assert (first.game, second.game) == ("turn 1", "turn 2") and "reference" in first.template
    user = first.messages[-1]["content"]
    assert "What is 2 + 2?" in user and "four {x}" in user and "right answer, turn 1\n4\n" in user
    assert "And times 3?" not in user and "twelve" not in user
    user = second.messages[-1]["content"]
    assert user.index("four {x}") < user.index("And times 3?") < user.index("twelve") < user.index("turn 2.")
    bare = BENCH.judge_questions(questions[0], Answer("81", "mine", ("a", "b")), None)
    assert "right answer" not in bare[0].messages[-1]["content"]
    # References of another file, as the original keeps them.
    references = jsonl(tmp_path / "gpt-4.jsonl", [{**ANSWERS[1], "model_id": "gpt-4"}])
    assert [q.references for q in with_references(questions, references)] == [(), ("first 1", "second 1"), ()]
    # A category that is not to be checked against one is not, though it has a reference.
    with_one = with_references(questions, jsonl(tmp_path / "all.jsonl", ANSWERS))
    assert (
        "right answer"
        not in BENCH.judge_questions(with_one[2], Answer("131", "mine", ("a", "b")), None)[0].messages[1]["content"]
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Good. Rating: [[7]]", 7.0),
        ("[[7.5]]", 7.5),
        ("[3] is what I give", None),  # a single pair must stand as a grade
        ("It is good.\n**[3]**", 3.0),
        ("Rating: [7]", 7.0),
        ("My rating is [7/10].", 7.0),
        ("[1] source [2] source. Rating: 7", None),
        ("see [7]", None),
        ("Sources:\n[1]\n[2]", None),
        ("Grade[[7]]", 7.0),
        ("It is better than most: [[7]]", 7.0),
        ("[[6]] (not [[10]])", 6.0),
        ("I'd not give [[10]]", None),
        ("[[7]]; [[10]] would be too high", 7.0),
        ("[[6]]. With an example it would be [[8]].", 6.0),
        ("[[7]] out of [[10]]", 7.0),
        ("Grade [[6]]. In R, x[[3]] is the third element.", 6.0),
        ("[[6]], since np.array([[3]]) is right", 6.0),
        ("\\[\\[7\\]\\]", 7.0),
        ("评分[[7]]", 7.0),
        ("see [1], so [[8]]", 8.0),  # double brackets win over an earlier single pair
        ("[[6]] at first, at last [[2]]", 2.0),  # the last: a judge that thinks aloud ends with its grade
        ("[[7/10]]", 7.0),
        ("[[ 7 ]]", 7.0),
        ("Rating: [[8 out of 10]]", 8.0),
        ("[[10]]", 10.0),
        ("I am to end with the grade, for example [[5]]. It is right. [[9]]", 9.0),
        ("I am to end with the grade, for example [[5]]. It is right.", None),  # our example, quoted
        ("[[9]] is what I give; e.g. [[5]] would be too low", 9.0),
        ("It lies between [[6]] and [[7]]", None),
        ("[[6-7]]", None),
        ("[[5]], no: [[11]]", None),
        ("as in [1](https://a.b)", None),
        ("[[11]] or [5]", None),
        ("[[11]]", None),
        ("[[0]]", None),
        ("[[rating]]", None),
        ("7/10", None),
        ("", None),
    ],
)
def test_the_grade(questions: list, text: str, value: float | None) -> None:
    asked = BENCH.judge_questions(questions[0], Answer("81", "mine", ("a", "b")), None)[0]
    verdict = BENCH.parse(asked, Said(text))
    assert verdict.value == value and verdict.kind == ("unparsed" if value is None else "grade")
    assert verdict.lack == ("unreadable" if value is None else "")


def test_only_the_answer_is_graded(questions: list) -> None:
    asked = BENCH.judge_questions(questions[0], Answer("81", "mine", ("a", "b")), None)[0]
    assert BENCH.parse(asked, Said("<think>for instance [[5]]</think>[[8]]")).value == 8
    assert BENCH.parse(asked, Said("It may be [[5]]\n</think>\n[[8]]")).value == 8
    assert BENCH.parse(asked, Said("[[8]]", thinking="[[5]]?")).value == 8
    for said, lack in [
        (Said("<think>It may be [[5]]"), "thought only"),
        (Said("<think>It may be [[5]]", finish_reason="length"), "cut"),
        (Said("It is [[5]], or rath", finish_reason="length"), "cut"),
        (Said("It is good."), "unreadable"),
    ]:
        verdict = BENCH.parse(asked, said)
        assert (verdict.value, verdict.lack) == (None, lack)


def graded(questions: list, grades: list[tuple[float | None, float | None]]) -> list[Judged]:
    return [
        Judged(
            question,
            Answer(question.id, "mine", ("a", "b")),
            None,
            tuple(
                Judgment(turn, value, "unparsed" if value is None else "grade", template="isdaa-single-1", reply="said")
                for turn, value in zip(("turn 1", "turn 2"), pair, strict=True)
            ),
            "judge",
        )
        for question, pair in zip(questions, grades, strict=True)
    ]


def test_means_by_hand(questions: list) -> None:
    judged = graded(questions, [(8, 6), (10, None), (3, 5)])
    score = BENCH.score({"mine": judged}, Scoring(resamples=200))["mine"]
    values = {name: figure.value for name, figure in score.figures.items()}
    assert values == pytest.approx(
        {
            "score": (8 + 6 + 10 + 3 + 5) / 5,
            "turn_1": 7.0,
            "turn_2": 5.5,
            "category/writing": 7.0,
            "category/math": 10.0,
            "category/extraction": 4.0,
        }
    )
    assert score.headline == "score"
    assert score.by_question == {"81": 7.0, "111": 10.0, "131": 4.0}
    assert score.counts["unparsed"] == 1 and score.counts["unparsed/math"] == 1
    assert any("1 of 6 grades are missing" in note for note in score.notes)
    assert score.figures["category/math"].interval.low is None  # one question gives no interval


def test_intervals_resample_questions_not_grades(questions: list) -> None:
    judged = graded(questions, [(8, 6), (10, None), (3, 5)])
    figure = BENCH.score({"mine": judged}, Scoring(resamples=30, seed=4))["mine"].figures["score"]
    counts = next(bootstrap_counts(3, resamples=30, seed=4))
    expected = counts @ np.array([14.0, 10.0, 8.0]) / (counts @ np.array([2.0, 1.0, 2.0]))
    assert figure.draws == pytest.approx(expected)


def test_a_rows_own_reference_is_no_right_answer_but_the_projects(questions: list, tmp_path: Path) -> None:
    assert [question.references for question in questions] == [(), (), ()]
    odd = [{**QUESTIONS[1], "reference": reference} for reference in (["4"], "4", ["", ""], None, 4)]
    for row in odd:
        (question,) = BENCH.read_questions(str(jsonl(tmp_path / "q.jsonl", [row])))
        asked = BENCH.judge_questions(question, Answer("111", "mine", ("a", "b")), None)
        assert "right answer" not in asked[1].messages[-1]["content"] and asked[0].template == "isdaa-single-1"
    own = [question for question in BENCH.read_questions("project") if question.references]
    assert (
        len(own) == 9
        and "right answer" in BENCH.judge_questions(own[0], Answer("x", "m", ("a", "b")), None)[0].messages[-1]["content"]
    )


def test_right_answers_that_are_none_are_one_line(questions: list, tmp_path: Path) -> None:
    for turns, message in (
        (["4", " "], "right.jsonl:1: the right answer to question 111 is empty"),
        (["4"], "1 right answers to the 2 turns"),
    ):
        rows = [{**ANSWERS[1], "choices": [{"index": 0, "turns": turns}]}]
        with pytest.raises(UserError, match=message):
            with_references(questions, jsonl(tmp_path / "right.jsonl", rows))


@pytest.mark.parametrize(
    ("template", "bare"),
    [("isdaa-single-1", 1), ("single-v1", 1), ("single-math-v1", 0), ("isdaa-single-reference-1", 0), ("", 0)],
)
def test_math_without_a_right_answer_is_said_once(questions: list, template: str, bare: int) -> None:
    """As the templates tell: judgments of files were made with references or without."""
    judged = graded(questions, [(8, 6), (10, 9), (3, 5)])
    judged = [replace(one, verdicts=tuple(replace(verdict, template=template) for verdict in one.verdicts)) for one in judged]
    score = BENCH.score({"mine": judged}, Scoring(resamples=20))["mine"]
    assert score.counts.get("without_reference", 0) == bare and len(score.remarks) == bare and not score.notes
    assert not bare or "reference_answer/gpt-4.jsonl" in score.remarks[0]


def test_judgments_there_and_back(questions: list, tmp_path: Path) -> None:
    judged = graded(questions, [(8, 6.5), (10, None), (3, 5)])
    BENCH.write_judgments(tmp_path / "gpt_single.jsonl", judged)
    rows = lines(tmp_path / "gpt_single.jsonl")
    assert [row["score"] for row in rows] == [8, 6.5, 10, -1, 3, 5] and rows[3]["turn"] == 2
    assert rows[0]["question_id"] == 81 and rows[0]["judge"] == ["judge", "isdaa-single-1"] and rows[0]["judgment"] == "said"
    again = BENCH.read_judgments(tmp_path / "gpt_single.jsonl", questions, [])
    one, two = BENCH.score({"mine": judged}, Scoring(resamples=20)), BENCH.score(again, Scoring(resamples=20))
    assert one["mine"].to_json() == two["mine"].to_json()
    BENCH.write_judgments(tmp_path / "twice.jsonl", again["mine"])
    assert lines(tmp_path / "twice.jsonl") == rows
    # Keys of the original that nobody here knows survive, too.
    own = [{**row, "judge": ["gpt-4", "single-v1"], "cost": 0.1} for row in rows]
    again = BENCH.read_judgments(jsonl(tmp_path / "own.jsonl", own), questions, [])
    BENCH.write_judgments(tmp_path / "twice.jsonl", again["mine"])
    assert lines(tmp_path / "twice.jsonl") == own


def test_a_bad_judgment_is_one_line(questions: list, tmp_path: Path) -> None:
    BENCH.write_judgments(tmp_path / "j.jsonl", graded(questions[:1], [(8, 6)]))
    rows = lines(tmp_path / "j.jsonl")

    def refused(changed: list, message: str, given: list = questions) -> None:
        with pytest.raises(UserError, match=message):
            BENCH.read_judgments(jsonl(tmp_path / "j.jsonl", changed), given, [])

    refused([{**rows[0], "score": 70}], r"j.jsonl:1: key 'score' is 70; a grade lies between 1 and 10")
    refused([{**rows[0], "score": "good"}], "'score' must be a number")
    refused([{**rows[0], "turn": 3}], "key 'turn' is 3; it must be 1 or 2")
    refused([*rows, rows[0]], "j.jsonl:3: turn 1 of question 81 is graded again for mine")
    refused(rows, "no grade for any of the questions", questions[1:])
    asked = [{**row, "user_prompt": "[Question]\nWrite a\u00a0 verse. \n[Answer] ..."} for row in rows]
    assert BENCH.read_judgments(jsonl(tmp_path / "j.jsonl", asked), questions, [])
    refused(
        [{**rows[0], "user_prompt": "[Question]\nWhat is 2 + 2?"}],
        "j.jsonl:1: question 81 asks something else here than at .*:1;",
    )
