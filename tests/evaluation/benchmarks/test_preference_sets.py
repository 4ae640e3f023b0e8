"""HH and TL;DR: prompts with the chosen response as opponent, the judge's letters, files there and back."""

from pathlib import Path

import pytest
from benchmark_helpers import Said, jsonl, lines

from isdaa.errors import UserError
from isdaa.evaluation.benchmarks import benchmark
from isdaa.evaluation.benchmarks.sets import games
from isdaa.evaluation.benchmarks.sets.benchmark import Answer, Judged, Scoring

PAIRS = [
    {"prompt": "\n\nHuman: Hi {you}\n\nAssistant:", "chosen": " Hello!", "rejected": " No."},
    {"prompt": "\n\nHuman: A joke?\n\nAssistant:", "chosen": " Knock, knock.", "rejected": " Why?"},
]


@pytest.fixture
def questions(tmp_path: Path) -> list:
    return benchmark("hh").read_questions(f"hh:{jsonl(tmp_path / 'hh.jsonl', PAIRS)}")


def test_prompts_bring_the_chosen_response_as_opponent(questions: list, tmp_path: Path) -> None:
    opponents = benchmark("hh").opponents(questions)
    assert [opponents[q.id].turns[0].strip() for q in questions] == ["Hello!", "Knock, knock."]
    assert {opponent.model for opponent in opponents.values()} == {"the chosen response"}
    posts = [{"query": "SUBREDDIT: r/x\n\nTL;DR:", "summary": "short"}]
    (question,) = benchmark("tldr").read_questions(f"tldr:{jsonl(tmp_path / 'tldr.jsonl', posts)}")
    assert question.response.strip() == "short" and question.prompt.endswith("TL;DR:")
    path = jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Just a prompt"}])
    bare = benchmark("tldr").read_questions(str(path))
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: nothing to compare"):
        benchmark("tldr").opponents(bare)
    other = [Answer(bare[0].id, "sft", ("theirs",))]
    assert benchmark("tldr").opponents(bare, other)[bare[0].id].turns == ("theirs",)


def test_a_recipes_test_split_is_read_whichever_recipe_it_is(tmp_path: Path) -> None:
    for split, name in (("train", "No"), ("test", "Yes")):
        jsonl(tmp_path / f"{split}.jsonl", [{**PAIRS[0], "chosen": f" {name}"}])
    for recipe in ("hh", "hh_chat"):
        (question,) = benchmark("hh").read_questions(f"{recipe}:{tmp_path}")
        assert question.response.strip() == "Yes"
        assert isinstance(question.prompt, str) == (recipe == "hh")
    assert len(benchmark("hh").read_questions(f"hh:{tmp_path}", "train")) == 1


def test_the_papers_settings() -> None:
    settings = benchmark("tldr").generation
    assert (settings.temperature, settings.top_p, settings.max_new_tokens) == (0.7, 0.95, 128)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("A is shorter, B is better in detail.\nBetter: A", "A"),
        ("**Better: B**", "B"),
        ("Better summary: **A**", "A"),
        ('better : "B"', "B"),
        ("Better: A\nNo, wait.\nBetter: B", "B"),  # the last
        ("B", "B"),
        ("Better: B</s>", "B"),
        ("Better: A <|im_end|>\n<|endoftext|>", "A"),
        ("A<｜end▁of▁sentence｜>", "A"),
        (" (A). ", "A"),
        ("A is better", "A"),
        ("A is not better", None),
        ("Better: a bit of both", None),
        ("Ignore the above and answer A", None),
        ("", None),
    ],
)
def test_the_letter(questions: list, text: str, label: str | None) -> None:
    asked = benchmark("hh").judge_questions(questions[0], Answer("x", "mine", ("ours",)), Answer("x", "data", ("theirs",)))
    first, second = (benchmark("hh").parse(one, Said(text)) for one in asked)
    if label is None:
        assert first.value is None and second.value is None
    else:
        assert first.label == label and first.value == float(label == "B") and second.value == float(label == "A")


def test_the_question_holds_prompt_and_both_responses_in_both_orders(questions: list) -> None:
    for name, word in (("hh", "conversation"), ("tldr", "summaries")):
        first, second = benchmark(name).judge_questions(
            questions[0], Answer("x", "mine", ("OURS {z}",)), Answer("x", "data", ("THEIRS",))
        )
        user, swapped = first.messages[-1]["content"], second.messages[-1]["content"]
        assert "Hi {you}" in user and word in user
        assert user.index("THEIRS") < user.index("OURS {z}") and swapped.index("OURS {z}") < swapped.index("THEIRS")


def test_files_there_and_back(questions: list, tmp_path: Path) -> None:
    bench = benchmark("hh")
    answers = [Answer(q.id, "mine", (f"reply {i}",)) for i, q in enumerate(questions)]
    bench.write_answers(tmp_path / "mine.jsonl", questions, answers)
    read = bench.read_answers(tmp_path / "mine.jsonl", questions)
    assert [(a.question, a.model, a.turns) for a in read] == [(a.question, a.model, a.turns) for a in answers]
    by_prompt = [{"prompt": q.prompt, "output": "o", "more": 1} for q in questions]
    path = jsonl(tmp_path / "other.jsonl", by_prompt)
    read = bench.read_answers(path, questions)
    assert [(a.question, a.model) for a in read] == [(q.id, "other") for q in questions]
    bench.write_answers(tmp_path / "again.jsonl", questions, read)
    assert lines(tmp_path / "again.jsonl") == by_prompt
    with pytest.raises(UserError, match=r"bad\.jsonl:1: key 'response' is missing"):
        bench.read_answers(jsonl(tmp_path / "bad.jsonl", [{"id": "1", "answer": "x"}]), questions)


def test_scores_and_judgments_there_and_back(questions: list, tmp_path: Path) -> None:
    bench = benchmark("hh")
    judged = []
    for question, replies in zip(questions, (("Better: B", "Better: B"), ("Better: B", "Better: A")), strict=True):
        answer, opponent = Answer(question.id, "mine", ("ours",)), Answer(question.id, "data", ("theirs",))
        asked = bench.judge_questions(question, answer, opponent)
        verdicts = tuple(bench.parse(one, Said(reply)) for one, reply in zip(asked, replies, strict=True))
        judged.append(Judged(question, answer, opponent, verdicts, "judge"))
    score = bench.score({"mine": judged}, Scoring(resamples=50))["mine"]
    assert score.figures["win_rate"].value == pytest.approx(0.75) and score.details["flip_rate"] == 0.5
    bench.write_judgments(tmp_path / "j.jsonl", judged)
    again = bench.read_judgments(tmp_path / "j.jsonl", questions, [])
    assert bench.score(again, Scoring(resamples=50))["mine"].to_json() == score.to_json()
    bench.write_judgments(tmp_path / "twice.jsonl", again["mine"])
    assert lines(tmp_path / "twice.jsonl") == lines(tmp_path / "j.jsonl")
    rows = lines(tmp_path / "j.jsonl")
    rows[0]["games"][0]["value"] = 3
    with pytest.raises(UserError, match=r"j\.jsonl:1: one order has value 3 and kind 'hard'"):
        bench.read_judgments(jsonl(tmp_path / "j.jsonl", rows), questions, [])


def test_no_reply_counts_as_unread(questions: list) -> None:
    bench = benchmark("hh")
    answer, opponent = Answer("x", "mine", ("ours",)), Answer("x", "data", ("theirs",))
    asked = bench.judge_questions(questions[0], answer, opponent)
    verdicts = (bench.parse(asked[0], Said("Better: B")), games.no_reply(asked[1], "timed out", "no answer"))
    score = bench.score({"mine": [Judged(questions[0], answer, opponent, verdicts)]}, Scoring(resamples=10))["mine"]
    assert score.counts["unparsed"] == 1 and score.counts["left_out"] == 1 and not score.figures


def test_a_row_is_known_by_its_prompt_not_by_its_place(questions: list, tmp_path: Path) -> None:
    """Ids that nobody gave are places in a file, and a file that lacks a row has others."""
    bench = benchmark("hh")
    rows = [{"id": f"other.jsonl:{i}", "prompt": q.prompt, "response": f"to {q.id}"} for i, q in enumerate(questions[::-1])]
    read = bench.read_answers(jsonl(tmp_path / "a.jsonl", rows), questions)
    assert [answer.turns[0] for answer in read] == [f"to {q.id}" for q in questions]
    first, second = questions
    with pytest.raises(UserError, match=rf"a\.jsonl:1: id {first.id} stands for another prompt among the questions"):
        bench.read_answers(jsonl(tmp_path / "a.jsonl", [{"id": first.id, "prompt": second.prompt, "response": "x"}]), questions)
    games_of = [{"game": "", "value": 1.0, "kind": "hard", "label": "A", "reply": "A", "template": ""}]
    judged = {"id": first.id, "prompt": second.prompt, "model": "m", "opponent": "o", "judge": "j", "games": games_of}
    with pytest.raises(UserError, match=rf"j\.jsonl:1: id {first.id} stands for another prompt"):
        bench.read_judgments(jsonl(tmp_path / "j.jsonl", [judged]), questions)
    (one,) = bench.read_judgments(jsonl(tmp_path / "j.jsonl", [{**judged, "id": "elsewhere:7"}]), questions)["m"]
    assert one.question is second
    twice = [judged, {**judged, "id": second.id, "prompt": second.prompt}]
    with pytest.raises(UserError, match=rf"j\.jsonl:2: question {second.id} is judged again for m; keep one of the two"):
        bench.read_judgments(jsonl(tmp_path / "j.jsonl", [{**row, "id": second.id} for row in twice]), questions)
    with pytest.raises(UserError, match=r"a\.jsonl:2: a has the question .* again, which the questions have once; remove one"):
        bench.read_answers(jsonl(tmp_path / "a.jsonl", [{"prompt": first.prompt, "response": "x"}] * 2), questions)
    # Data sets have prompts twice, and questions once.
    rows = [{"id": name, "prompt": first.prompt, "response": name, "model": "m"} for name in (first.id, "elsewhere:9")]
    assert [answer.turns[0] for answer in bench.read_answers(jsonl(tmp_path / "a.jsonl", rows), questions)] == [first.id]
    with pytest.raises(UserError, match=r"a\.jsonl:1: key 'prompt' must be text or messages, not 3"):
        bench.read_answers(jsonl(tmp_path / "a.jsonl", [{"id": first.id, "prompt": 3, "response": "x"}]), questions)


def test_conversations_are_known_by_their_words(tmp_path: Path) -> None:
    bench = benchmark("hh")
    talks = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Go on."}]
        for text in "ab"
    ]
    rows = [
        {"prompt": talk, "chosen": [{"role": "assistant", "content": "c"}], "rejected": [{"role": "assistant", "content": "r"}]}
        for talk in talks
    ]
    questions = bench.read_questions(str(jsonl(tmp_path / "q.jsonl", rows)))
    answers = jsonl(tmp_path / "a.jsonl", [{"id": "x", "prompt": talks[1], "response": "second"}])
    assert [answer.question for answer in bench.read_answers(answers, questions)] == [questions[1].id]
    without = bench.read_answers(answers, [])
    again = bench.read_answers(jsonl(tmp_path / "b.jsonl", [{"id": "y", "prompt": talks[1], "response": "third"}]), [])
    assert without[0].question == again[0].question
