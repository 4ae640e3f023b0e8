"""Scores in words and pairs: what is compared, what a reader is told."""

import csv
import io

import pytest
from hostile import ESCAPED, NAME, harmless, unwrapped
from scipy.stats import binomtest

from isdaa.cli import main
from isdaa.evaluation.benchmarks import BENCHMARKS, TLDR
from isdaa.evaluation.benchmarks.outcome import comparisons, gap_between, headline_of, sentence, table_csv
from isdaa.evaluation.benchmarks.request import file_name
from isdaa.evaluation.benchmarks.sets.benchmark import Answer, Judged, Judgment, Question, Scoring
from isdaa.evaluation.benchmarks.table import cut_notes, pairs_of, print_outcome, raw_mark, signed, spread
from isdaa.evaluation.statistics import fewest
from isdaa.report.benchmark_charts import axis_domain, benchmark_figures
from isdaa.report.benchmarks import tone

SCORING = Scoring(resamples=200)


def judged(model: str, values: list[float | None]) -> list[Judged]:
    """One question a value; None: a reply that could not be read."""
    found = []
    for number, value in enumerate(values):
        kind = "unparsed" if value is None else "hard"
        sides = [Answer(str(number), name, ("text",)) for name in (model, "base")]
        found.append(Judged(Question(str(number), "prompt"), sides[0], sides[1], (Judgment("", value, kind),), "judge"))
    return found


def metrics_of(models: dict[str, list[float | None]], **changes):
    found = {name: judged(name, values) for name, values in models.items()}
    scores = TLDR.score(found, SCORING)
    count = len(next(iter(models.values())))
    metrics = {
        "headline": headline_of(scores),
        "title": TLDR.title,
        "opponent": "base",
        "partial": False,
        "confidence": 0.95,
        "questions": {"count": count, "judged": count},
        "judge": {"kind": "reward", "name": "judge"},
        "models": [{"model": name, "answers": None, **score.to_json()} for name, score in scores.items()],
        "comparisons": comparisons(TLDR, found, scores, SCORING),
    }
    metrics |= changes
    return metrics | {"sentence": sentence(TLDR, metrics)}


def test_two_models_are_compared_on_the_questions_that_both_have_a_verdict_on():
    (row,) = metrics_of({"a": [1, 1, None, 0, 1], "b": [0, 1, 1, 0.5, None]})["comparisons"]
    assert (row["questions"], row["better"], row["worse"], row["equal"]) == (3, 1, 1, 1)
    assert row["difference"]["mean"] == pytest.approx((1 + 0 - 0.5) / 3)
    # The headline is each model's mean over what could be read of it.
    assert row["headline_difference"]["mean"] == pytest.approx(3 / 4 - 2.5 / 4)


def test_a_gap_read_the_other_way_round_changes_its_sign():
    metrics = metrics_of({"a": [1] * 8 + [0] * 2, "b": [0.5] * 5 + [0] * 5})
    there, back = gap_between(metrics, "a", "b"), gap_between(metrics, "b", "a")
    assert there is not None and back is not None
    assert (back["mean"], back["low"], back["high"]) == (-there["mean"], -there["high"], -there["low"])
    assert back["low"] < back["high"] and gap_between(metrics, "a", "c") is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1] * 30 + [0] * 2, "better than its opponent"),
        ([0] * 30 + [1] * 2, "worse than its opponent"),
        ([0, 1] * 8, "cannot be told apart"),
        ([1], "1 question cannot tell two models apart"),
        ([1] * 5, "5 questions cannot tell two models apart"),  # chance does so one time in sixteen
        ([0] * 6, "worse than its opponent"),
        ([1] * 4 + [0.5] * 96, "the two cannot be told apart"),  # the 96 draws speak for neither; its interval is above 50 %
        ([1] * 5 + [None] * 95, "5 questions cannot tell two models apart"),
        ([1] * 6 + [0.5] * 94, "better than its opponent"),
    ],
)
def test_one_model_in_a_sentence(values, words):
    told = metrics_of({"a": values})["sentence"]
    assert told.startswith("a has a win rate o") and " against base: " in told and words in told


def test_how_many_questions_can_tell_two_models_apart():
    """As many as a two-sided sign test needs where all go the same way."""
    for confidence in (0.5, 0.9, 0.95, 0.99):
        n = fewest(confidence)
        assert binomtest(n, n).pvalue <= 1 - confidence < binomtest(n - 1, n - 1).pvalue


@pytest.mark.parametrize(
    ("n", "told", "colour"), [(5, "it cannot be told from weak", "under"), (6, "points ahead of weak", "not")]
)
def test_few_questions_put_no_model_ahead_of_another(n, told, colour):
    metrics = metrics_of({"weak": [0] * n, "strong": [1] * n})
    assert told in metrics["sentence"] and tone(metrics) == colour
    print_outcome(metrics, out := io.StringIO())
    assert "somewhat too narrow for so few" in " ".join(out.getvalue().split())
    print_outcome(metrics_of({"a": [0, 1] * 25}), out := io.StringIO())
    assert "too narrow" not in out.getvalue()


def test_equal_models_lead_nobody():
    same = [1, 0] * 10
    assert metrics_of({"a": same, "b": same})["sentence"] == (
        "a and b are level on TL;DR summaries with a win rate of 50.0 % [25.0, 75.0] each."
    )
    # Level on the whole, though each wins where the other loses; a third is behind, a fourth is not for sure.
    told = metrics_of({"weak": [0] * 20, "a": same, "near": [0, 0, *same[2:-2], 0, 1], "b": same[::-1]})["sentence"]
    assert told.startswith("a and b are level on TL;DR summaries with a win rate of 50.0 % [") and " each; " in told
    assert told.endswith("50.0 points ahead of weak; they cannot be told from near.")
    many = metrics_of(dict.fromkeys("abcde", same))
    assert many["sentence"].startswith("a, b, c and 2 others are level on") and tone(many) == "under"


def test_a_few_questions_among_many_draws_put_no_model_ahead():
    base = [0.5] * 60
    for wins, told, colour in ((5, "it cannot be told from base", "under"), (6, "points ahead of base", "not")):
        metrics = metrics_of({"base": base, "better": [1.0] * wins + base[wins:]})
        assert metrics["comparisons"][0]["difference"]["high"] < 0, "the interval alone would tell them apart"
        assert told in metrics["sentence"] and tone(metrics) == colour
        caption = benchmark_figures(metrics)[1].caption
        assert ("tells the two apart" in caption) == (wins == 6)


def test_several_models_in_a_sentence():
    told = metrics_of({"weak": [0] * 40, "strong": [1] * 39 + [0], "twin": [0, 0] + [1] * 38})["sentence"]
    assert told.startswith("strong leads on TL;DR summaries with a win rate of 97.5 %")
    assert "97.5 points ahead of weak" in told and "cannot be told from twin" in told


def test_no_readable_reply_is_no_result():
    metrics = metrics_of({"a": [None, None]})
    assert metrics["sentence"] == "No reply of the judge could be read, so there is no result."
    partial = metrics_of({"a": [1, 0]}, partial=True, questions={"count": 5, "judged": 2})
    assert partial["sentence"].startswith("Partial, 2 of 5 questions judged: a has")


def test_a_model_of_which_nothing_could_be_read_takes_no_part():
    metrics = metrics_of({"mute": [None, None], "a": [1, 0], "b": [1, 1]})
    assert metrics["headline"] == "win_rate" and metrics["sentence"].startswith("b leads on")
    assert [(row["first"], row["second"]) for row in metrics["comparisons"]] == [("a", "b")]
    print_outcome(metrics, out := io.StringIO())
    assert "mute" in out.getvalue() and "2 of 2 replies gave no verdict" in " ".join(out.getvalue().split())


def test_a_raw_difference_under_a_controlled_headline_is_marked():
    metrics = metrics_of({"a": [1, 0, 1], "b": [0, 0, 1]})
    assert raw_mark(metrics["comparisons"][0], "length_controlled_win_rate") == ""
    metrics["comparisons"][0]["headline_difference"] = None
    assert raw_mark(metrics["comparisons"][0], "win_rate") == ""
    assert raw_mark(metrics["comparisons"][0], "length_controlled_win_rate") == " raw"
    figures = {"length_controlled_win_rate": {"mean": 0.5, "low": None, "high": None, "n": 3}}
    models = [model | {"figures": model["figures"] | figures} for model in metrics["models"]]
    print_outcome(metrics | {"headline": "length_controlled_win_rate", "models": models}, out := io.StringIO())
    assert "+33.3 [+0.0, +100.0] raw" in out.getvalue()


def test_equal_models_are_drawn_on_an_axis_that_can_be_read():
    assert axis_domain([0.0, 0.0], None) == [-0.25, 0.25] and axis_domain([50.0], (0.0, 100.0)) == [49.0, 51.0]


def test_of_many_models_the_terminal_compares_each_with_the_best():
    values = {f"m{i}": [1.0] * (4 + i) + [0.0] * (6 - i) for i in range(5)}
    metrics = metrics_of(values)
    assert len(metrics["comparisons"]) == 10
    assert [row["first"] for row in pairs_of(metrics)] == ["m0", "m1", "m2", "m3"]


def test_figures_as_people_read_them():
    assert spread({"mean": 0.6134, "low": 0.57, "high": 0.65}, True) == "61.3 ± 4.0 %"
    assert spread({"mean": 6.4, "low": None, "high": None}, False) == "6.40"
    assert signed({"mean": 0.041, "low": -0.01, "high": 0.1}, True) == "+4.1 [-1.0, +10.0]"
    assert file_name("dpo/model") == "dpo--model" and file_name("../x y") == "x--y"


def test_table_and_csv_hold_every_model_and_pair():
    metrics = metrics_of({"a": [1, 0, 1], "b": [0, 0, 1]})
    out = io.StringIO()
    print_outcome(metrics, out)
    assert "a − b" in out.getvalue() and "judged by judge" in out.getvalue()
    rows = [line.split(",") for line in table_csv(metrics).splitlines()]
    assert [row[:3] for row in rows[1:]] == [
        ["a", "base", "win_rate"], ["b", "base", "win_rate"], ["a", "b", "difference"], ["a", "b", "headline_difference"],
    ]  # fmt: skip
    assert float(rows[1][3]) == pytest.approx(2 / 3)


def test_the_help_names_every_benchmark(capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", "--help"])
    told = capsys.readouterr().out
    assert all(name in told for name in BENCHMARKS)


def test_a_hostile_name_is_text_in_table_and_csv():
    judge = {"kind": "reward", "name": NAME}
    found = metrics_of({NAME: [1, 0, 1], "@b": [0, 0, 1]}, opponent=NAME, judge=judge, title=NAME)
    out = io.StringIO()
    print_outcome(found, out)
    harmless(out.getvalue())
    assert unwrapped(out.getvalue()).count(unwrapped(ESCAPED)) >= 5
    rows = list(csv.reader(io.StringIO(table_csv(found))))
    assert {row[0] for row in rows[1:]} == {NAME, "'@b"}
    assert all(not cell.startswith("'") for row in rows for cell in row[3:])


def test_figures_of_fragments_are_marked_and_it_says_what_to_type():
    metrics = metrics_of({"a": [1] * 20, "b": [0] * 20}, generation={"max_new_tokens": 1024})
    whole = {"mean_characters": 80.0, "truncated": 1, "turns": 20}
    for model in metrics["models"]:
        model["answers"] = dict(whole)
    assert cut_notes(metrics) == []
    metrics["models"][1]["answers"]["truncated"] = 15
    (note,) = cut_notes(metrics)
    assert note.startswith(
        "max_new_tokens (1024) cut 75 % of the answers of b: its figures are of fragments; give --max_new_tokens 2048"
    )
    print_outcome(metrics, out := io.StringIO(), width=200)
    lines = out.getvalue().splitlines()
    rows = [next(line for line in lines if line.startswith(f"|{name} ")) for name in "ab"]
    assert " !" not in rows[0] and "0.0 ± 0.0 % !" in rows[1] and f"! {note}." in lines
    metrics |= {"models": metrics["models"][:1], "opponent_answers": whole | {"truncated": 5}}
    (note,) = cut_notes(metrics)
    assert "cut 25 % of the answers of base: the figures of all models are wins over fragments" in note
    # Answers of a file say nothing of how they ended.
    metrics["opponent_answers"] = {"mean_characters": 80.0, "truncated": None, "turns": 20}
    assert cut_notes(metrics) == []


def test_columns_that_no_model_has_a_value_for_are_left_out():
    metrics = metrics_of({"a": [1] * 20})
    metrics["models"][0]["answers"] = {"mean_characters": 80.0, "truncated": None, "turns": 20}
    print_outcome(metrics, out := io.StringIO(), width=200)
    assert "characters" in out.getvalue() and "cut" not in out.getvalue() and "unread" not in out.getvalue()


def test_no_model_leads_where_the_questions_of_both_say_the_opposite_or_nothing():
    skipped = [None] * 10
    # `a` has the higher figure, on easier questions; `b` is better wherever both were asked.
    metrics = metrics_of({"a": [1.0] * 20 + [0.0] * 10, "b": [0.5] * 30})
    assert metrics["sentence"].startswith("a leads on")
    row = metrics["comparisons"][0]
    gap = {"mean": -0.127, "low": -0.2, "high": -0.05, "n": 20}
    behind = metrics | {"comparisons": [row | {"headline_difference": gap}]}
    told = sentence(TLDR, behind)
    assert told.startswith("a has the highest win rate on") and "leads" not in told and "cannot be told" not in told
    assert told.endswith("on the questions that both have b is 12.7 points ahead of it.") and tone(behind) == "under"
    told = sentence(TLDR, metrics | {"comparisons": []})
    assert "leads" not in told and told.endswith("; b was judged on other questions.")
    figures = {"length_controlled_win_rate": {"mean": 0.9, "low": None, "high": None, "n": 3}}
    models = [model | {"figures": model["figures"] | figures} for model in metrics["models"]]
    models[1]["figures"] = models[1]["figures"] | {"length_controlled_win_rate": {"mean": 0.2, "low": 0.1, "high": 0.3, "n": 3}}
    comparison = [row | {"headline_difference": None}]
    one_sided = metrics | {"headline": "length_controlled_win_rate", "models": models, "comparisons": comparison}
    told = sentence(TLDR, one_sided)
    assert (
        "leads" not in told
        and "cannot be told" not in told
        and told.endswith("how far from b is not known: one-sided votes have no interval.")
    )
    assert gap_between(one_sided, "a", "b") is None and gap_between(one_sided, "a", "b", raw=True) is not None
    # Raw figures of different questions are compared on those of both.
    found = {"a": judged("a", [1.0, 0.0, *skipped])[:2], "b": judged("b", [None, 1.0, 0.0])[1:]}
    (pair,) = comparisons(TLDR, found, TLDR.score(found, SCORING), SCORING)
    assert pair["headline_difference"] == pair["difference"] and pair["questions"] == 1
