"""Arena-Hard: files of both editions, labels, votes by hand, style control against the original's own formula."""

from pathlib import Path

import numpy as np
import pytest
from benchmark_helpers import Said, jsonl, lines
from scipy.optimize import minimize

from isdaa.errors import UserError
from isdaa.evaluation.benchmarks.sets import games
from isdaa.evaluation.benchmarks.sets.arena_hard import ARENA_HARD as BENCH
from isdaa.evaluation.benchmarks.sets.arena_hard import LABELS, label_of, labelled
from isdaa.evaluation.benchmarks.sets.benchmark import Answer, Judged, Question, Scoring
from isdaa.evaluation.benchmarks.sets.style import markdown_counts, pieces, style_controlled, style_differences

V2 = [
    {"uid": "a1", "category": "hard_prompt", "subcategory": "coding", "prompt": "Sort {it}."},
    {"uid": "b2", "category": "creative_writing", "subcategory": "creative_writing", "prompt": "A poem."},
]
V01 = [{"uid": "c3", "category": "arena-hard-v0.1", "cluster": "ABC Sequence", "prompt": "Use ABC."}]
OLD = [{"question_id": "c3", "category": "arena-hard-v1", "cluster": "ABC", "turns": [{"content": "Use ABC."}]}]


def answer_row(uid: str, model: str, text: str, tokens: int = 10) -> dict:
    asked = {row["uid"]: row["prompt"] for row in (*V2, *V01)}.get(uid, uid)
    return {
        "uid": uid,
        "ans_id": f"{uid}{model}",
        "model": model,
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": {"answer": text, "thought": None}}],
        "tstamp": 1.0,
        "metadata": {"token_len": tokens, **markdown_counts(text)},
    }


def test_questions_of_both_editions(tmp_path: Path) -> None:
    questions = BENCH.read_questions(str(jsonl(tmp_path / "q.jsonl", V2)))
    assert [(q.id, q.category) for q in questions] == [("a1", "hard_prompt"), ("b2", "creative_writing")]
    (new,) = BENCH.read_questions(str(jsonl(tmp_path / "q.jsonl", V01)))
    (old,) = BENCH.read_questions(str(jsonl(tmp_path / "q.jsonl", OLD)))
    assert (new.id, new.prompt, new.category) == (old.id, old.prompt, old.category)
    with pytest.raises(UserError, match=r"q\.jsonl:2: question a1 is there already"):
        BENCH.read_questions(str(jsonl(tmp_path / "q.jsonl", [V2[0], V2[0]])))


def test_answers_of_both_editions_there_and_back(tmp_path: Path) -> None:
    questions = BENCH.read_questions(str(jsonl(tmp_path / "q.jsonl", V2)))
    rows = [answer_row("a1", "mine", "# Hi\n**bold**", 12), answer_row("b2", "mine", "", 0)]
    answers = BENCH.read_answers(jsonl(tmp_path / "a.jsonl", rows), questions)
    assert [(a.turns, a.tokens) for a in answers] == [(("# Hi\n**bold**",), 12), (("",), 0)]
    BENCH.write_answers(tmp_path / "again.jsonl", questions, answers)
    assert lines(tmp_path / "again.jsonl") == rows
    old_questions = BENCH.read_questions(str(jsonl(tmp_path / "q.jsonl", OLD)))
    old = [
        {
            "question_id": "c3",
            "answer_id": "x",
            "model_id": "gpt-4-0314",
            "choices": [{"index": 0, "turns": [{"content": "So.", "token_len": 2}]}],
            "tstamp": 2.0,
            "conv_metadata": {"token_len": 2},
        }
    ]
    answers = BENCH.read_answers(jsonl(tmp_path / "a.jsonl", old), old_questions)
    assert (answers[0].model, answers[0].turns, answers[0].tokens) == ("gpt-4-0314", ("So.",), 2)
    BENCH.write_answers(tmp_path / "again.jsonl", old_questions, answers)
    assert lines(tmp_path / "again.jsonl") == old


def test_new_answers_are_as_the_original_reads_them(tmp_path: Path) -> None:
    questions = BENCH.read_questions(str(jsonl(tmp_path / "q.jsonl", V2)))
    BENCH.write_answers(tmp_path / "new.jsonl", questions[:1], [Answer("a1", "mine", ("## Yes, **it** is",))])
    (row,) = lines(tmp_path / "new.jsonl")
    assert row["messages"][0] == {"role": "user", "content": "Sort {it}."}
    assert row["messages"][-1]["content"]["answer"] == "## Yes, **it** is"
    # The original sums every value of `metadata` that is no number, and takes them by their order.
    assert list(row["metadata"]) == ["token_len", "header_count", "list_count", "bold_count"]
    sums = [v if isinstance(v, int) else sum(v.values()) for v in row["metadata"].values()]
    assert sums == [pieces("## Yes, **it** is"), 1, 0, 1]
    (answer,) = BENCH.read_answers(tmp_path / "new.jsonl", questions[:1])
    assert answer.turns == ("## Yes, **it** is",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "a.jsonl:1: key 'messages' must be a list of objects"),
        ({"messages": [{"role": "assistant", "content": {"text": "x"}}]}, "content: key 'answer' is missing"),
        ({"metadata": {"token_len": -1}}, "key 'metadata.token_len' is -1"),
        ({"model": 3}, "key 'model' must be text, not 3"),
    ],
)
def test_a_bad_answer_is_one_line(tmp_path: Path, change: dict, message: str) -> None:
    questions = BENCH.read_questions(str(jsonl(tmp_path / "q.jsonl", V2)))
    with pytest.raises(UserError, match=message):
        BENCH.read_answers(jsonl(tmp_path / "a.jsonl", [{**answer_row("a1", "mine", "x"), **change}]), questions)


def test_the_opponent_is_the_categorys_baseline(tmp_path: Path) -> None:
    questions = BENCH.read_questions(str(jsonl(tmp_path / "q.jsonl", V2)))
    folder = tmp_path / "model_answer"
    folder.mkdir()
    for model, word in (("o3-mini-2025-01-31", "o3"), ("gemini-2.0-flash-001", "gem")):
        jsonl(folder / f"{model}.jsonl", [answer_row(row["uid"], model, word) for row in V2])
    opponents = BENCH.opponents(questions, BENCH.read_answers(folder, questions))
    assert [opponents[q.id].turns[0] for q in questions] == ["o3", "gem"]
    jsonl(folder / "gemini-2.0-flash-001.jsonl", [answer_row("a1", "gemini-2.0-flash-001", "gem")])
    with pytest.raises(UserError, match=r"question b2 with; its opponent is gemini-2\.0-flash-001"):
        BENCH.opponents(questions, BENCH.read_answers(folder, questions))
    with pytest.raises(UserError, match="give answers of the opponent"):
        BENCH.opponents(questions, [])


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("First [[B>A]], but then: [[A>>B]]", "A>>B"),  # the last
        ("[[a>b]]", "A>B"),
        ("tie [A=B]", "A=B"),
        ("[[A>B]] (see [B>A])", "A>B"),  # single brackets are the second choice
        ("[[B<<A]]", "B<<A"),
        ("[[A]] is better: [[A>B]] [[B]]", "A>B"),  # what is no label is passed over
        ("[[A]]", None),
        ("[[A]] so [A>B]", None),  # a label in single brackets counts only where nothing stands in double ones
        ("[[ A > B ]]", "A>B"),
        ("[[A＞B]]", "A>B"),
        ("[[A&gt;&gt;B]]", "A>>B"),
        ("A is better.\n\n**B>A**", "B>A"),
        ("Final verdict: A >> B.", "A>>B"),
        ("A>B is what some say.", None),
        ("I see [[A>>B]], [[A>B]], [[A=B]], [[B>A]] and [[B>>A]]", None),  # our list, quoted
        ("It is [[A>B]] or [[A=B]]", None),
        ("[[B>A]] rather than [[B>>A]]", "B>A"),
        ("Not [[A>B]]", None),
        ("[[A>B]] (not [[A>>B]])", "A>B"),
        ("I would not give [[A>>B]]", None),
        ("[[A≫B]]", "A>>B"),
        ("[[B ≫ A]]", "B>>A"),
        ("[[A≪B]]", "A<<B"),
        ("\\[\\[A>B\\]\\]", "A>B"),
        ("", None),
    ],
)
def test_the_label(text: str, label: str | None) -> None:
    assert label_of(text) == label


def test_the_two_games_and_their_votes(tmp_path: Path) -> None:
    question = BENCH.read_questions(str(jsonl(tmp_path / "q.jsonl", V2)))[0]
    first, second = BENCH.judge_questions(question, Answer("a1", "mine", ("OURS",)), Answer("a1", "base", ("THEIRS",)))
    user = first.messages[-1]["content"]
    assert user.index("THEIRS") < user.index("OURS") and "Sort {it}." in user
    assert second.messages[-1]["content"].index("OURS") < second.messages[-1]["content"].index("THEIRS")
    verdict = BENCH.parse(first, Said("[[A>>B]]"))  # A is the baseline here
    assert (verdict.value, verdict.weight, verdict.label) == (0.0, 3.0, "A>>B")
    verdict = BENCH.parse(second, Said("[[A>>B]]"))
    assert (verdict.value, verdict.weight) == (1.0, 3.0)
    assert BENCH.parse(first, Said("[[B>A]]")).value == 1.0
    assert BENCH.parse(first, Said("none")).kind == "unparsed"
    thought = "<think>At first [[A>>B]], no.</think>"
    assert BENCH.parse(first, Said(f"{thought}[[B>A]]")).value == 1.0
    assert BENCH.parse(first, Said(thought)).lack == "thought only"
    assert BENCH.parse(first, Said("", thinking="[[A>B]]")).lack == "thought only"
    assert BENCH.parse(first, Said("I think [[A>B]]", finish_reason="length")).lack == "cut"
    assert BENCH.parse(first, Said("[[A>B]]", finish_reason=None)).value == 0.0  # an endpoint that does not say


def judged(labels: dict[str, tuple[str | None, str | None]], category: str = "hard_prompt", model: str = "mine") -> list[Judged]:
    rows = []
    for uid, pair in labels.items():
        question = Question(uid, "?", category=category)
        sides = Answer(uid, model, ()), Answer(uid, "base", ())
        asked = BENCH.judge_questions(question, Answer(uid, model, ("a",)), Answer(uid, "base", ("b",)))
        verdicts = tuple(
            BENCH.parse(one, Said("" if label is None else f"[[{label}]]")) for one, label in zip(asked, pair, strict=True)
        )
        rows.append(Judged(question, *sides, verdicts, "judge"))
    return rows


def test_votes_by_hand() -> None:
    """x: baseline much better (3 lost), then model slightly better (1 won). y: won 1, tie. z: unread, left out."""
    rows = judged({"x": ("A>>B", "A>B"), "y": ("B>A", "A=B"), "z": ("B>A", None)})
    score = BENCH.score({"mine": rows}, Scoring(resamples=40, seed=2))["mine"]
    assert score.headline == "win_rate"
    assert score.figures["win_rate"].value == pytest.approx((1 + 1.5) / (4 + 2))
    assert score.by_question == pytest.approx({"x": 1 / 4, "y": 1.5 / 2})
    assert score.counts["left_out"] == 1 and score.counts["unparsed"] == 1
    assert score.details["flip_rate"] == 0.5  # x alone contradicts itself; a tie does not
    assert "style_controlled_win_rate" not in score.figures and any("no style control" in note for note in score.notes)


def test_the_win_rate_is_bradley_terrys(tmp_path: Path) -> None:
    """Against one baseline, Bradley–Terry's σ(θ) is the share of votes: an independent fit says the same."""
    rows = judged({"x": ("A>>B", "A>B"), "y": ("B>A", "A=B"), "z": ("B>A", "A>>B")})
    votes = [(v.value, v.weight) for one in rows for v in one.verdicts]

    def cost(theta: np.ndarray) -> float:
        return sum(w * (np.logaddexp(0, theta[0]) - v * theta[0]) for v, w in votes)

    theta = minimize(cost, [0.0], method="BFGS", options={"gtol": 1e-9}).x[0]
    value = BENCH.score({"mine": rows}, Scoring(resamples=20))["mine"].figures["win_rate"].value
    assert value == pytest.approx(1 / (1 + np.exp(-theta)), abs=1e-6)


def test_categories_have_figures_of_their_own() -> None:
    rows = judged({"x": ("B>A", "A>B")}, "hard_prompt") + judged({"y": ("A>B", "B>A"), "w": ("A=B", "B=A")}, "creative_writing")
    figures = BENCH.score({"mine": rows}, Scoring(resamples=20))["mine"].figures
    assert figures["win_rate/hard_prompt"].value == 1.0 and figures["win_rate/creative_writing"].value == 0.25
    assert figures["win_rate"].value == pytest.approx(3 / 6)


def test_models_resample_the_same_prompts() -> None:
    labels = {f"q{i}": (("B>A", "A>B"), ("A>B", "B>A"), ("A=B", "A=B"))[i % 3] for i in range(20)}
    twice = {"one": judged(labels, model="one"), "two": judged(labels, model="two")}
    scores = BENCH.score(twice, Scoring(resamples=50))
    difference = scores["one"].figures["win_rate"].minus(scores["two"].figures["win_rate"])
    assert difference.interval.low == difference.interval.high == 0.0


# --- markdown and style


def test_markdown_is_counted_as_the_original_does() -> None:
    text = (
        "# One\n## Two\n####### no\n1. first\n 2. second\n- a\n* b\n+ c\n**x** and __y__ and **z\nw**\n```\n# code\n- no\n```\n"
    )
    assert markdown_counts(text) == {
        "header_count": {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 2, "unordered": 3},
        "bold_count": {"**": 1, "__": 1},
    }
    # A code block that holds a backtick is none to the original's pattern.
    assert markdown_counts("```\na `b`\n# c\n```")["header_count"]["h1"] == 1


def test_style_differences_by_hand() -> None:
    model, baseline = np.array([[30.0, 3, 6, 0]]), np.array([[10.0, 1, 0, 2]])
    ours, theirs = (3 / 31, 6 / 31, 0), (1 / 11, 0, 2 / 11)  # over tokens + 1
    expected = [20 / 40, *((a - b) / (a + b + 1) for a, b in zip(ours, theirs, strict=True))]
    assert style_differences(model, baseline)[0] == pytest.approx(expected)
    assert style_differences(np.zeros((1, 4)), np.zeros((1, 4))).tolist() == [[0.0, 0.0, 0.0, 0.0]]


def simulated(models: int = 3, prompts: int = 60, seed: int = 0) -> tuple:
    rng = np.random.default_rng(seed)
    names = np.repeat([f"m{i}" for i in range(models)], prompts)
    ids = np.tile([f"p{i}" for i in range(prompts)], models)
    features = rng.normal(0.4, [0.3, 0.05, 0.2, 0.1], (models * prompts, 4))
    logits = np.repeat(np.linspace(-0.5, 1.0, models), prompts) + 2 * features[:, 0] + features[:, 2]
    votes = rng.integers(2, 7, len(names)).astype(float)
    return names, ids, rng.binomial(votes.astype(int), 1 / (1 + np.exp(-logits))).astype(float), votes, features


def originals_rates(names: np.ndarray, wins: np.ndarray, votes: np.ndarray, features: np.ndarray) -> dict[str, float]:
    """The original's way: one row a vote, z-scores over these rows, indicators +1 and −1 for the baseline, softmax of two."""
    rows = np.repeat(np.arange(len(names)), votes.astype(int))
    outcome = np.concatenate([[1.0] * int(w) + [0.0] * int(v - w) for w, v in zip(wins, votes, strict=True)])
    z = features[rows]
    z = (z - z.mean(axis=0)) / z.std(axis=0, ddof=1)
    known = sorted({*names, "base"})
    hot = np.zeros((len(rows), len(known)))
    hot[np.arange(len(rows)), [known.index(names[r]) for r in rows]] = 1
    hot[:, known.index("base")] = -1
    design = np.concatenate([hot, z], axis=1)

    def cost(c: np.ndarray) -> tuple[float, np.ndarray]:
        logits = design @ c
        chance = 1 / (1 + np.exp(-logits))
        return float((np.logaddexp(0, logits) - outcome * logits).sum()), design.T @ (chance - outcome)

    best = minimize(cost, np.full(design.shape[1], 0.5), jac=True, method="L-BFGS-B", options={"ftol": 1e-14, "gtol": 1e-9}).x
    strength = np.exp(best[: len(known)])
    base = strength[known.index("base")]
    return {name: float(strength[known.index(name)] / (strength[known.index(name)] + base)) for name in known if name != "base"}


@pytest.mark.parametrize("models", [1, 3])
def test_style_control_agrees_with_the_originals_formula(models: int) -> None:
    names, ids, wins, votes, features = simulated(models)
    control = style_controlled(names, ids, wins, votes, features, resamples=10)
    expected = originals_rates(names, wins, votes, features)
    assert {name: figure.value for name, figure in control.at_mean_style.items()} == pytest.approx(expected, abs=1e-5)
    assert control.coefficients["token_len"] > 0


def test_each_resample_standardises_and_fits_anew() -> None:
    names, ids, wins, votes, features = simulated(2, 25, seed=1)
    control = style_controlled(names, ids, wins, votes, features, resamples=3, seed=7)
    from isdaa.evaluation.statistics import bootstrap_counts

    places = np.unique(ids)
    for r, counts in enumerate(next(bootstrap_counts(25, resamples=3, seed=7))):
        drawn = np.concatenate([np.repeat(np.flatnonzero(ids == place), n) for place, n in zip(places, counts, strict=True)])
        expected = originals_rates(names[drawn], wins[drawn], votes[drawn], features[drawn])
        assert {name: figure.draws[r] for name, figure in control.at_mean_style.items()} == pytest.approx(expected, abs=1e-4)


def test_one_model_is_controlled_at_equal_style_alone() -> None:
    """The trap: with one model, z-scores put the rate at that model's own mean style, so it stays near the raw one."""
    names, ids, wins, votes, features = simulated(1, 400)
    control = style_controlled(names, ids, wins, votes, features, resamples=20)
    raw = wins.sum() / votes.sum()
    truth = 1 / (1 + np.exp(0.5))  # σ(θ) of the simulation, at equal style
    assert abs(control.at_mean_style["m0"].value - raw) < 0.02
    assert control.at_equal_style["m0"].value == pytest.approx(truth, abs=0.05)
    assert raw - truth > 0.15


def test_a_feature_that_never_varies_and_separation() -> None:
    names, ids, wins, votes, features = simulated(1, 40)
    features[:, 1] = 0.0
    assert np.isfinite(style_controlled(names, ids, wins, votes, features, resamples=5).at_equal_style["m0"].value)
    decided = np.where(features[:, 0] > 0.4, votes, 0.0)
    control = style_controlled(names, ids, decided, votes, features, resamples=5)
    assert not control.at_mean_style and "separates all wins from all losses" in control.note


def test_a_model_that_wins_everything_leaves_the_others_figures_alone() -> None:
    names, ids, wins, votes, features = simulated(3)
    wins = np.where(names == "m2", votes, wins)
    control = style_controlled(names, ids, wins, votes, features, resamples=5)
    assert control.at_mean_style["m2"].value == control.at_equal_style["m2"].value == 1.0
    assert control.at_mean_style["m2"].draws.tolist() == [1.0] * 5
    kept = names != "m2"
    alone = style_controlled(names[kept], ids[kept], wins[kept], votes[kept], features[kept], resamples=5)
    for name in ("m0", "m1"):  # at equal style, which does not depend on the pool's mean
        assert control.at_equal_style[name].value == pytest.approx(alone.at_equal_style[name].value, abs=1e-5)
        assert control.at_mean_style[name].value != pytest.approx(alone.at_mean_style[name].value, abs=1e-5)


def test_scores_with_answers_control_for_style(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    uids = [f"u{i}" for i in range(40)]
    jsonl(tmp_path / "q.jsonl", [{"uid": uid, "category": "hard_prompt", "prompt": uid} for uid in uids])
    questions = BENCH.read_questions(str(tmp_path / "q.jsonl"))
    rows = {}
    for model, more in (("mine", 30), ("base", 0)):
        texts = ["word " * int(rng.integers(20, 60) + more) + "\n- item" * int(rng.integers(0, 4)) for _ in uids]
        rows[model] = [answer_row(uid, model, text, pieces(text) + 1) for uid, text in zip(uids, texts, strict=True)]
    folder = tmp_path / "model_answer"
    folder.mkdir()
    for model, part in rows.items():
        jsonl(folder / f"{model}.jsonl", part)
    answers = BENCH.read_answers(folder, questions)
    names = list(LABELS)
    judgments = [
        {
            "uid": uid,
            "category": "hard_prompt",
            "judge": "gpt-4.1",
            "model": "mine",
            "baseline": "base",
            "games": [{"score": names[rng.integers(10)], "judgment": {"answer": "because"}, "prompt": []} for _ in range(2)],
            "more": 1,
        }
        for uid in uids
    ]
    judgments[3]["games"][1] = None
    path = jsonl(tmp_path / "judgments.jsonl", judgments)
    read = BENCH.read_judgments(path, questions, answers)
    score = BENCH.score(read, Scoring(resamples=50))["mine"]
    assert {"win_rate", "style_controlled_win_rate", "equal_style_win_rate"} == set(score.figures)
    assert "style/token_len" in score.details and score.counts["left_out"] == 1
    assert read["mine"][0].verdicts[0].game == games.OPPONENT_FIRST
    BENCH.write_judgments(tmp_path / "again.jsonl", read["mine"])
    assert lines(tmp_path / "again.jsonl") == judgments


def test_lengths_that_were_counted_differently_are_counted_anew(tmp_path: Path) -> None:
    """The baseline's file counts in gpt-4o's tokens, isdaa's in words and marks: then both are counted in the latter."""
    from isdaa.evaluation.benchmarks.sets.arena_hard import length_of, style_of

    jsonl(tmp_path / "q.jsonl", V2[:1])
    questions = BENCH.read_questions(str(tmp_path / "q.jsonl"))
    (theirs,) = BENCH.read_answers(jsonl(tmp_path / "a.jsonl", [answer_row("a1", "base", "one two", 99)]), questions)
    BENCH.write_answers(tmp_path / "b.jsonl", questions, [Answer("a1", "mine", ("one two",))])
    (ours,) = BENCH.read_answers(tmp_path / "b.jsonl", questions)
    assert length_of(theirs) == (99, "gpt-4o") and length_of(ours)[0] == 2
    assert length_of(Answer("a1", "x", ("one two",))) == length_of(ours)
    assert style_of(theirs, alike=True)[0] == 99 and style_of(theirs, alike=False)[0] == 2


def test_judgments_written_by_isdaa_and_the_first_editions(tmp_path: Path) -> None:
    rows = judged({"x": ("A>>B", "A>B"), "y": ("B>A", None)})
    BENCH.write_judgments(tmp_path / "j.jsonl", rows)
    written = lines(tmp_path / "j.jsonl")
    assert written[0]["games"][0]["score"] == "A>>B" and written[1]["games"][1]["score"] is None
    again = BENCH.read_judgments(tmp_path / "j.jsonl", [one.question for one in rows], [])
    one, two = (BENCH.score(part, Scoring(resamples=20))["mine"].to_json() for part in ({"mine": rows}, again))
    assert one == two
    old = [
        {
            "question_id": "x",
            "model": "mine",
            "judge": "gpt-4",
            "games": [{"user_prompt": "", "judgment": "s", "score": "A=B"}] * 2,
        }
    ]
    read = BENCH.read_judgments(jsonl(tmp_path / "old.jsonl", old), [], [])
    assert BENCH.score(read, Scoring(resamples=20))["mine"].figures["win_rate"].value == 0.5

    def refused(row: dict, message: str) -> None:
        with pytest.raises(UserError, match=message):
            BENCH.read_judgments(jsonl(tmp_path / "j.jsonl", [row]), [], [])

    refused({**written[0], "games": written[0]["games"][:1]}, "j.jsonl:1: key 'games' has 1 games; it must have two")
    bad = [{**written[0]["games"][0], "score": "A"}, None]
    refused({**written[0], "games": bad}, r"key 'games\[0\].score' is 'A'; it must be one of A>>B")


def test_an_id_that_asks_something_else_is_refused(tmp_path: Path) -> None:
    questions = BENCH.read_questions(str(jsonl(tmp_path / "q.jsonl", V2)))
    row = answer_row("a1", "mine", "x")
    row["messages"][0]["content"] = "  Sort\n{it}. "  # white space is no other question
    assert BENCH.read_answers(jsonl(tmp_path / "a.jsonl", [row]), questions)
    row["messages"][0]["content"] = "Something else."
    with pytest.raises(
        UserError, match=r"a\.jsonl:1: question a1 asks something else here than at .*q\.jsonl:1; give the questions"
    ):
        BENCH.read_answers(jsonl(tmp_path / "a.jsonl", [row]), questions)
    played = {"score": "A>B", "judgment": {"answer": "[[A>B]]"}, "prompt": [{"role": "user", "content": "<|prompt|>\nA poem.\n"}]}
    judged = {"uid": "b2", "category": "creative_writing", "model": "m", "baseline": "b", "games": [played, played]}
    assert BENCH.read_judgments(jsonl(tmp_path / "j.jsonl", [judged]), questions)
    with pytest.raises(UserError, match=r"j\.jsonl:1: question a1 asks something else here"):
        BENCH.read_judgments(jsonl(tmp_path / "j.jsonl", [{**judged, "uid": "a1"}]), questions)
    with pytest.raises(UserError, match=r"j\.jsonl:1: question a1 asks something else here"):
        old = {"score": "A>B", "judgment": "[[A>B]]", "user_prompt": "<|User Prompt|>\nA poem."}
        BENCH.read_judgments(jsonl(tmp_path / "j.jsonl", [{**judged, "uid": "a1", "games": [old, old]}]), questions)


def test_answers_that_are_missing_and_lost_have_no_part_in_style() -> None:
    rng = np.random.default_rng(0)
    names, kept, gone = list(LABELS), [], []
    for i in range(40):
        sides = [
            Answer(str(i), model, ("word " * int(rng.integers(20, 60)),), int(rng.integers(20, 60)), row={"metadata": {}})
            for model in ("mine", "base")
        ]
        question = Question(str(i), "p", category="coding")
        if i < 5:
            gone.append(games.lost(Judged(question, Answer(str(i), "mine", ("",)), sides[1], ()), True))
            continue
        verdicts = tuple(labelled(game, names[rng.integers(10)], "") for game in (games.OPPONENT_FIRST, games.MODEL_FIRST))
        kept.append(Judged(question, *sides, verdicts))
    alone, beside = (BENCH.score({"mine": rows}, Scoring(resamples=20))["mine"] for rows in (kept, gone + kept))
    for name in ("equal_style_win_rate", "style_controlled_win_rate"):
        assert alone.figures[name].to_json() == beside.figures[name].to_json()
    assert beside.figures["win_rate"].value < alone.figures["win_rate"].value and beside.figures["win_rate"].interval.n == 40
    assert "the rates with style control leave out 5 lost answers: a missing answer has no style" in beside.notes
    assert not any("lost" in note for note in alone.notes)
