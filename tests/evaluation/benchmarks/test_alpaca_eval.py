"""AlpacaEval 2: the original's files there and back, the letter's probability, win rates by hand."""

import json
import math
from pathlib import Path

import pytest
from benchmark_helpers import Said

from isdaa.errors import UserError
from isdaa.evaluation.benchmarks.sets import alpaca_eval, games
from isdaa.evaluation.benchmarks.sets.alpaca_eval import ALPACA_EVAL as BENCH
from isdaa.evaluation.benchmarks.sets.alpaca_eval import BASELINE, is_official, read_gamed
from isdaa.evaluation.benchmarks.sets.benchmark import Answer, Judged, Judgment, Scoring
from isdaa.files import digest

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
    outputs.write_text(json.dumps(ROWS[1:2]))
    assert [answer.question for answer in BENCH.read_answers(outputs, questions)] == ["1"]
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
    with pytest.raises(UserError, match="give the opponent's answers"):
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
    [("m", 0.0), ("M", 1.0), (" **M**", 1.0), ("Model m", 0.0), ("m.", 0.0), ("Model M is better.", 1.0)],
)
def test_without_log_probabilities_the_word_is_a_hard_vote(asked: list, text: str, value: float) -> None:
    verdict = BENCH.parse(asked[0], Said(text))
    assert (verdict.value, verdict.kind) == (value, "hard")
    assert BENCH.parse(asked[1], Said(text)).value == 1 - value


@pytest.mark.parametrize("text", ["", "Both", "My choice", "m'kay", "me", "model M is", "I think not M"])
def test_anything_else_is_unparsed(asked: list, text: str) -> None:
    verdict = BENCH.parse(asked[0], Said(text))
    assert verdict.value is None and verdict.kind == "unparsed" and verdict.reply == text


def test_letters_that_the_judge_hardly_thinks_of_are_no_vote(asked: list) -> None:
    assert BENCH.parse(asked[0], Said("Both", {"Both": -0.01, "m": -9.0, "M": -10.0})).value is None


@pytest.mark.parametrize(
    ("said", "value", "kind", "lack"),
    [
        # The first token of a thought is no vote, whatever else the endpoint lists beside it.
        (Said("<think>\n\n</think>\n\nM", {"<think>": -0.01, "m": -4.0}), 1.0, "hard", ""),
        (Said("<think>Let me", {"<think>": -0.01, "m": -4.0}, "length"), None, "unparsed", "cut"),
        (Said("Let me", {"<think>": -0.01, "m": -4.0}, "length"), None, "unparsed", "cut"),
        (Said("M", {"<|channel|>": -0.01, "m": -4.0}), 1.0, "hard", ""),
        (Said("M", {"m": -0.1, "M": -2.4}, thinking="Both are long."), 1.0, "hard", ""),
        (Said("", None, thinking="Both are long."), None, "unparsed", "thought only"),
        # A soft vote needs no more than its first token, and so do some hard ones.
        (Said("m and M are", {"m": -0.1, "M": -2.4}, "length"), 1 / (1 + math.exp(2.3)), "soft", ""),
        (Said("M", None, "length"), 1.0, "hard", ""),
        (Said("**M**\n\nBecause", None, "length"), 1.0, "hard", ""),
        (Said("Model m.", None, "length"), 0.0, "hard", ""),
        (Said("Model m and", None, "length"), None, "unparsed", "cut"),
        (Said("m, or rather", None, "length"), None, "unparsed", "cut"),
        (Said("Both models are equally good."), 0.5, "hard", ""),
    ],
)
def test_thoughts_and_cut_replies(asked: list, said: Said, value: float | None, kind: str, lack: str) -> None:
    verdict = BENCH.parse(asked[0], said)
    assert (verdict.kind, verdict.lack) == (kind, lack)
    assert verdict.value == (None if value is None else pytest.approx(value))


def judged(preferences: list[tuple[float | None, ...]], lengths: list[tuple[int, int]]) -> list[Judged]:
    result = []
    for i, (values, (mine, base)) in enumerate(zip(preferences, lengths, strict=True)):
        question = BENCH.read_questions("project", limit=len(preferences))[i]
        verdicts = tuple(
            Judgment(game, value, "unparsed" if value is None else "soft")
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
    assert score.headline == "win_rate" and list(score.figures)[-1] == "length_adjusted_win_rate"
    assert 0 < score.figures["length_adjusted_win_rate"].value < 1
    assert score.details["flip_rate"] == pytest.approx(1 / 3)
    assert score.details["length"] == (10 + 30 + 7 + 40) // 4 == 21  # of 21.75: the leaderboard cuts it off
    assert score.counts == {"questions": 4, "replies": 8, "unparsed": 1, "left_out": 1, "soft": 7, "hard": 0}
    assert score.by_question == pytest.approx({"0": 0.8, "1": 0.5, "2": 0.2})
    assert any("1 of 8 replies gave no verdict; 1 of 4 questions" in note for note in score.notes)
    assert json.loads(json.dumps(score.to_json()))["figures"]["win_rate"]["n"] == 3


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


def annotation(instruction: str, model: str, preference: float | None, **more: object) -> dict:
    sides = {"output_1": "base says", "generator_1": BASELINE, "output_2": f"{model} says", "generator_2": model}
    return {"instruction": instruction, **sides, "annotator": "judge", "preference": preference, **more}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def test_files_that_lack_a_row_still_pair_without_questions(tmp_path: Path) -> None:
    """By the instruction, wherever the row stands; the second of two equal ones is the second."""
    rows = [annotation(text, "one", 1.2, output_2=str(i)) for i, text in enumerate("ABCBD")]
    other = [annotation(text, "two", 1.7, output_2=str(i)) for i, text in enumerate("DBBC")]
    first = BENCH.read_judgments(write(tmp_path / "one.json", rows), [])["one"]
    second = BENCH.read_judgments(write(tmp_path / "two.json", other), [])["two"]
    names = {judged.question.id: judged.row["instruction"] for judged in first}
    assert [names[judged.question.id] for judged in second] == ["D", "B", "B", "C"] and len(names) == 5
    answers = BENCH.read_answers(write(tmp_path / "three.json", [{**ROWS[1], "instruction": "C"}]), [])
    assert names[answers[0].question] == "C"


def test_one_of_two_equal_questions_could_be_either(outputs: Path, tmp_path: Path) -> None:
    questions = BENCH.read_questions(str(outputs))
    with pytest.raises(UserError, match=r"has 1 of the 2 questions 'Name a river.', and nothing tells which"):
        BENCH.read_answers(write(tmp_path / "a.json", ROWS[:2]), questions)
    with pytest.raises(UserError, match=r"has 1 of the 2 questions 'Name a river.'"):
        BENCH.read_judgments(write(tmp_path / "j.json", [annotation("Name a river.", "m", 1.5)]), questions)
    few = BENCH.read_questions(str(outputs), limit=2)
    with pytest.raises(
        UserError, match=r"outputs.json:3: base has the question 'Name a river.' again, which the questions have once; remove one"
    ):
        BENCH.read_answers(outputs, few)
    with pytest.raises(UserError, match=r"j.json:2: m has the question 'Count to .*' again"):
        BENCH.read_judgments(write(tmp_path / "j.json", [annotation(ROWS[1]["instruction"], "m", 1.5)] * 2), few)


def test_an_annotator_that_gives_fractions_has_no_hard_votes(tmp_path: Path) -> None:
    def kinds(*preferences: float | None, annotator: str = "judge") -> list[str]:
        rows = [annotation(str(i), "m", value, annotator=annotator) for i, value in enumerate(preferences)]
        rows.append(annotation("x", "m", 2, annotator="voter"))
        return [one.verdicts[0].kind for one in BENCH.read_judgments(write(tmp_path / "j.json", rows), [])["m"]]

    assert kinds(1, 2, 1.99999, 1.5, 0, None) == ["soft"] * 5 + ["unparsed", "hard"]
    assert kinds(1, 2, 1.5, 0) == ["hard"] * 5
    assert kinds(1.3, 2, annotator="voter") == ["soft"] * 3


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[str, str]:
    """(questions, gamed): files of eight questions that stand in for the official ones."""
    instructions = [f"Task {i}" for i in range(8)]
    monkeypatch.setattr(alpaca_eval, "QUESTIONS", 8)
    monkeypatch.setattr(alpaca_eval, "INSTRUCTIONS", digest(instructions))
    rows = [{"instruction": text, "output": "x" * 9 * (i + 1), "generator": BASELINE} for i, text in enumerate(instructions)]
    header = "model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n"
    lines = [
        f"{name},{i},{(3 * i + place) % 10 / 10},{i / 4 - 1},{i / 3 - 1 + place},False\n"
        for place, name in enumerate("cv")
        for i in range(8)
    ]
    (tmp_path / "gamed.csv").write_text(header + "".join(lines))
    return str(write(tmp_path / "questions.json", rows)), str(tmp_path / "gamed.csv")


def test_the_official_questions_are_known_by_all_their_texts_in_order(official: tuple[str, str], tmp_path: Path) -> None:
    questions, _ = official
    rows = json.loads(Path(questions).read_text())
    assert is_official(questions) and not is_official("project")
    for changed in (rows[:-1], [*rows, rows[0]], rows[::-1], [{**rows[0], "instruction": "Task 0 "}, *rows[1:]]):
        assert not is_official(str(write(tmp_path / "changed.json", changed)))


def test_the_gamed_file(official: tuple[str, str], tmp_path: Path) -> None:
    _, path = official
    gamed = read_gamed(path)
    assert gamed.places.tolist() == [*range(8), *range(8)] and gamed.by_place[2] == pytest.approx(2 / 3 - 1)
    assert gamed.preferences[:3].tolist() == [0.0, 0.3, 0.6] and gamed.gaps[3] == -0.25 and not gamed.honest.any()
    lines = Path(path).read_text().splitlines()

    def refused(changed: list[str], message: str) -> None:
        (bad := tmp_path / "bad.csv").write_text("\n".join(changed))
        with pytest.raises(UserError, match=message):
            read_gamed(bad)

    refused(lines[:5], r"bad.csv: no difficulty for question 4 \(column 'index'\)")
    refused([lines[0], "c,0,1.7,0,0,False"], r"bad.csv:\d: column 'preference' is 1.7; it must lie between 0 and 1")
    refused([lines[0], "c,8,0.7,0,0,False"], r"column 'index' is 8; it must be a question's place, 0 to 7")
    refused([lines[0], "c,0,0.7,,0,False"], r"column 'std_delta_len' is empty")
    refused([lines[0], "c,0,0.7,0,hard,False"], r"'instruction_difficulty' must be a number")
    refused([lines[0], "c,0,0.7,0,0,maybe"], r"'not_gamed_baseline' must be True or False")
    refused(["index,instruction_difficulty", "0,0.5"], r"key 'std_delta_len' is missing")


def test_the_length_controlled_rate_is_against_the_leaderboards_baseline_alone(official: tuple[str, str], tmp_path: Path) -> None:
    source, path = official
    questions = BENCH.read_questions(source)
    rows = [annotation(f"Task {i}", "m", 1 + i % 3 / 3, output_2="y" * (50 - i)) for i in range(8)]
    judged = BENCH.read_judgments(write(tmp_path / "j.json", rows), questions)
    scoring = Scoring(resamples=20, gamed=read_gamed(path))
    score = BENCH.score(judged, scoring)["m"]
    assert score.headline == "length_controlled_win_rate" and "length_adjusted_win_rate" not in score.figures
    assert {"w_l", "w_d", "w_m", "sd", "C"} < set(score.details) and score.figures[score.headline].interval.n == 8
    without = BENCH.score(judged, Scoring(resamples=20))["m"]
    assert without.headline == "win_rate" and "length_controlled_win_rate" not in without.figures
    other = BENCH.read_judgments(write(tmp_path / "j.json", [{**row, "generator_1": "davinci"} for row in rows]), questions)
    score = BENCH.score(other, scoring)["m"]
    assert score.headline == "win_rate" and any(BASELINE in note for note in score.notes)
    itself = BENCH.read_judgments(write(tmp_path / "j.json", [{**row, "generator_2": BASELINE} for row in rows]), questions)
    score = BENCH.score(itself, scoring)[BASELINE]
    assert score.figures["length_controlled_win_rate"].value == 0.5 and any("by definition" in note for note in score.notes)
