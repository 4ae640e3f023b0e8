"""AlpacaEval 2: the original's files there and back, the letter's probability, win rates by hand."""

import json
import math
from pathlib import Path

import pytest
from benchmark_helpers import Said

from isdaa.errors import UserError
from isdaa.evaluation.benchmarks import games
from isdaa.evaluation.benchmarks.alpaca_eval import ALPACA_EVAL as BENCH
from isdaa.evaluation.benchmarks.alpaca_eval import read_difficulty
from isdaa.evaluation.benchmarks.benchmark import Answer, Judged, Scoring, Verdict

ROWS = [
    {"instruction": "Name a river.", "output": "The Oder.", "generator": "base", "dataset": "helpful_base", "extra": [1, None]},
    {"instruction": "Count to {three}.", "output": "1 2 3", "generator": "base", "dataset": "koala"},
    {"instruction": "Name a river.", "output": "Po", "generator": "base", "dataset": "koala"},
]


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    path = tmp_path / "outputs.json"
    path.write_text(json.dumps(ROWS))
    return path


def test_outputs_there_and_back_without_loss(outputs: Path, tmp_path: Path) -> None:
    questions = BENCH.read_questions(str(outputs))
    assert [q.id for q in questions] == ["0", "1", "2"] and questions[1].category == "koala"
    answers = BENCH.read_answers(outputs, questions)
    assert [(a.question, a.turns) for a in answers] == [("0", ("The Oder.",)), ("1", ("1 2 3",)), ("2", ("Po",))]
    BENCH.write_answers(tmp_path / "again.json", questions, answers)
    assert json.loads((tmp_path / "again.json").read_text()) == ROWS


def test_new_outputs_have_the_originals_keys_and_an_empty_answer_is_one(outputs: Path, tmp_path: Path) -> None:
    questions = BENCH.read_questions(str(outputs), limit=1)
    BENCH.write_answers(tmp_path / "new.json", questions, [Answer("0", "mine", ("",))])
    assert json.loads((tmp_path / "new.json").read_text()) == [
        {"instruction": "Name a river.", "output": "", "generator": "mine", "dataset": "helpful_base"}
    ]
    assert BENCH.read_answers(tmp_path / "new.json", questions)[0].turns == ("",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction": None}, "outputs.json:2: key 'instruction' is null"),
        ({"instruction": " "}, "outputs.json:2: key 'instruction' is empty"),
        ({"output": 3}, "outputs.json:2: key 'output' must be text, not 3"),
        ({"generator": ["a"]}, r"outputs.json:2: key 'generator' must be text, not \['a'\]"),
    ],
)
def test_a_bad_row_is_one_line_that_names_file_row_and_key(outputs: Path, change: dict, message: str) -> None:
    questions = BENCH.read_questions(str(outputs))
    rows = [ROWS[0], {**ROWS[1], **change}, ROWS[2]]
    outputs.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=message):
        BENCH.read_answers(outputs, questions)


def test_a_misspelt_key_names_the_nearest_and_missing_answers_are_counted(outputs: Path) -> None:
    questions = BENCH.read_questions(str(outputs))
    outputs.write_text(json.dumps([{"instruction": "Name a river.", "ouput": "x", "generator": "base"}]))
    with pytest.raises(UserError, match=r'key \'output\' is missing \(did you mean "ouput"\?\)'):
        BENCH.read_answers(outputs, questions)
    outputs.write_text(json.dumps([ROWS[0]]))
    with pytest.raises(UserError, match="no answer to question 1 and 1 more"):
        BENCH.read_answers(outputs, questions)
    outputs.write_text(json.dumps([{"instruction": "Another.", "output": "x", "generator": "base"}]))
    with pytest.raises(UserError, match="no answer to any of the questions"):
        BENCH.read_answers(outputs, questions)


def test_the_judge_sees_both_orders_and_braces_survive(outputs: Path) -> None:
    question = BENCH.read_questions(str(outputs))[1]
    first, second = BENCH.judge_questions(question, Answer("1", "mine", ("OURS {x}",)), Answer("1", "base", ("THEIRS",)))
    assert (first.game, second.game) == (games.OPPONENT_FIRST, games.MODEL_FIRST)
    user = first.messages[-1]["content"]
    assert "Count to {three}." in user and user.index("THEIRS") < user.index("OURS {x}")
    user = second.messages[-1]["content"]
    assert user.index("OURS {x}") < user.index("THEIRS")
    assert first.logprobs and first.messages[0]["role"] == "system"
    with pytest.raises(UserError, match="give its outputs"):
        BENCH.judge_questions(question, Answer("1", "mine", ("a",)), None)


@pytest.fixture
def asked(outputs: Path) -> list:
    question = BENCH.read_questions(str(outputs))[0]
    return BENCH.judge_questions(question, Answer("0", "mine", ("a",)), Answer("0", "base", ("b",)))


def test_log_probabilities_give_a_soft_preference(asked: list) -> None:
    # e^-0.25 and e^-1.75: P(M) = 1/(1 + e^1.5) = 0.18243; the model is M in the first order, m in the second.
    tokens = {"m": -0.25, " M": -1.75, "The": -5.0}
    first, second = (BENCH.parse(one, Said("m", tokens)) for one in asked)
    assert (first.kind, second.kind, first.label) == ("soft", "soft", "m")
    assert first.value == pytest.approx(1 / (1 + math.exp(1.5)))
    assert second.value == pytest.approx(1 - 1 / (1 + math.exp(1.5)))
    assert first.template and first.messages == asked[0].messages


@pytest.mark.parametrize(
    ("text", "value"),
    [("m", 0.0), ("M", 1.0), (" **M**", 1.0), ("Model m", 0.0), ("m.", 0.0), ("model M is", 1.0)],
)
def test_without_log_probabilities_the_word_is_a_hard_vote(asked: list, text: str, value: float) -> None:
    verdict = BENCH.parse(asked[0], Said(text))
    assert (verdict.value, verdict.kind) == (value, "hard")
    assert BENCH.parse(asked[1], Said(text)).value == 1 - value


@pytest.mark.parametrize("text", ["", "Both", "My choice", "m'kay", "me", "I think M"])
def test_anything_else_is_unparsed(asked: list, text: str) -> None:
    verdict = BENCH.parse(asked[0], Said(text))
    assert verdict.value is None and verdict.kind == "unparsed" and verdict.reply == text


def test_letters_that_the_judge_hardly_thinks_of_are_no_vote(asked: list) -> None:
    assert BENCH.parse(asked[0], Said("Both", {"Both": -0.01, "m": -9.0, "M": -10.0})).value is None


def judged(preferences: list[tuple[float | None, ...]], lengths: list[tuple[int, int]]) -> list[Judged]:
    result = []
    for i, (values, (mine, base)) in enumerate(zip(preferences, lengths, strict=True)):
        question = BENCH.read_questions("project", limit=len(preferences))[i]
        verdicts = tuple(
            Verdict(game, value, "unparsed" if value is None else "soft")
            for game, value in zip((games.OPPONENT_FIRST, games.MODEL_FIRST), values, strict=True)
        )
        answer, opponent = Answer(str(i), "mine", ("x" * mine,)), Answer(str(i), "base", ("y" * base,))
        result.append(Judged(question, answer, opponent, verdicts, "judge"))
    return result


def test_scores_by_hand() -> None:
    # Means of the orders: 0.8, 0.5, 0.2, left out. Flips: only the second question, of three read twice.
    rows = judged([(0.9, 0.7), (0.75, 0.25), (0.1, 0.3), (0.9, None)], [(10, 12), (30, 15), (7, 9), (40, 40)])
    score = BENCH.score({"mine": rows}, Scoring(resamples=50))["mine"]
    assert score.figures["win_rate"].value == pytest.approx(0.5)
    assert score.figures["discrete_win_rate"].value == pytest.approx(0.5)
    assert score.headline == "length_controlled_win_rate" and 0 < score.figures[score.headline].value < 1
    assert score.details["flip_rate"] == pytest.approx(1 / 3)
    assert score.details["length"] == pytest.approx((10 + 30 + 7 + 40) / 4)
    assert score.counts == {"questions": 4, "replies": 8, "unparsed": 1, "left_out": 1, "soft": 7, "hard": 0}
    assert score.by_question == pytest.approx({"0": 0.8, "1": 0.5, "2": 0.2})
    assert any("1 of 8 replies could not be read; 1 of 4 questions" in note for note in score.notes)
    assert json.loads(json.dumps(score.to_json()))["figures"]["win_rate"]["n"] == 4


def test_a_judge_that_always_says_m_gives_half_and_flips_everywhere() -> None:
    score = BENCH.score({"mine": judged([(0.0, 1.0)] * 3, [(5, 9), (9, 5), (7, 7)])}, Scoring(resamples=20))["mine"]
    assert score.figures["win_rate"].value == 0.5 and score.details["flip_rate"] == 1.0
    assert any("contradicts itself on 100 %" in note for note in score.notes)


def test_no_readable_reply_gives_no_figure_but_counts() -> None:
    score = BENCH.score({"mine": judged([(None, None)] * 2, [(5, 9), (9, 5)])}, Scoring(resamples=20))["mine"]
    assert not score.figures and score.headline == "" and score.counts["left_out"] == 2


def test_annotations_there_and_back_and_scored_alike(tmp_path: Path) -> None:
    rows = judged([(0.9, 0.7), (0.75, 0.25), (0.1, 0.3), (0.9, None)], [(10, 12), (30, 15), (7, 9), (40, 40)])
    BENCH.write_judgments(tmp_path / "annotations.json", rows)
    written = json.loads((tmp_path / "annotations.json").read_text())
    assert [row["preference"] for row in written] == [pytest.approx(1.8), pytest.approx(1.5), pytest.approx(1.2), None]
    assert written[0]["generator_1"] == "base" and written[0]["annotator"] == "judge"
    questions = [one.question for one in rows]
    again = BENCH.read_judgments(tmp_path / "annotations.json", questions, [])
    old, new = BENCH.score({"mine": rows}, Scoring(resamples=20))["mine"], BENCH.score(again, Scoring(resamples=20))["mine"]
    assert old.to_json() == new.to_json()
    BENCH.write_judgments(tmp_path / "twice.json", again["mine"])
    assert json.loads((tmp_path / "twice.json").read_text()) == written


def test_the_originals_annotations_are_read_without_questions(tmp_path: Path) -> None:
    """One verdict a row, 0 for an old tie, null where the judge failed, keys of its own."""
    rows = [
        {
            "instruction": f"Do {i}.",
            "output_1": "a" * (i + 1),
            "generator_1": "base",
            "dataset": "koala",
            "output_2": "b" * (6 - i),
            "generator_2": "mine",
            "annotator": "weighted_alpaca_eval_gpt4_turbo",
            "preference": preference,
            "raw_completion": {"text": "m"},
            "price_per_example": 0.1,
        }
        for i, preference in enumerate([1.0, 2.0, 1.25, 0, None])
    ]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    judged_rows = BENCH.read_judgments(path, [], [])["mine"]
    assert [one.verdicts[0].value for one in judged_rows] == [0.0, 1.0, 0.25, 0.5, None]
    score = BENCH.score({"mine": judged_rows}, Scoring(resamples=20))["mine"]
    assert score.figures["win_rate"].value == pytest.approx(1.75 / 4)
    assert "flip_rate" not in score.details and score.counts["left_out"] == 1
    BENCH.write_judgments(tmp_path / "again.json", judged_rows)
    assert json.loads((tmp_path / "again.json").read_text()) == rows
    path.write_text(json.dumps([{**rows[0], "preference": 2.5}]))
    with pytest.raises(UserError, match=r"annotations.json:1: key 'preference' is 2.5; it must lie between 1"):
        BENCH.read_judgments(path, [], [])


@pytest.mark.parametrize("text", ["index,instruction_difficulty\n0,0.5\n1,-1.25\n", ",instruction_difficulty\n0,0.5\n1,-1.25\n"])
def test_the_originals_difficulty_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "instruction_difficulty.csv"
    path.write_text(text)
    assert read_difficulty(path) == {"0": 0.5, "1": -1.25}
    rows = judged([(0.9, 0.7), (0.75, 0.25), (0.1, 0.3)], [(10, 12), (30, 15), (7, 9)])
    with pytest.raises(UserError, match="no difficulty for question 2"):
        BENCH.score({"mine": rows}, Scoring(resamples=5, difficulty=read_difficulty(path)))
    full = {**read_difficulty(path), "2": 0.1}
    assert "w_d" in BENCH.score({"mine": rows}, Scoring(resamples=5, difficulty=full))["mine"].details
    path.write_text("index,instruction_difficulty\n0,hard\n")
    with pytest.raises(UserError, match="'instruction_difficulty' must be a number"):
        read_difficulty(path)
