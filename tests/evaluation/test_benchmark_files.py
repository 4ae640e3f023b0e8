"""Files of other tools in a benchmark: AlpacaEval's length control and when its name is given, files that lack questions."""

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
from benchmark_run_helpers import between, judge_server

from isdaa.cli import main
from isdaa.evaluation.benchmarks.sets import alpaca_eval
from isdaa.files import digest, write_jsonl
from isdaa.foreign import read_json, read_jsonl

BASELINE = alpaca_eval.BASELINE
INSTRUCTIONS = [f"Task {i}" for i in range(12)]
LC = "length_controlled_win_rate"


@pytest.fixture(autouse=True)
def official(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`questions.json` and `gamed.csv`: twelve questions that stand in for the official ones. There is no Hub."""

    def absent(*args: object, **options: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", absent)
    monkeypatch.setattr(alpaca_eval, "INSTRUCTIONS", digest(INSTRUCTIONS))
    for module in ("sets.alpaca_eval", "run", "inputs", "judgments"):
        monkeypatch.setattr(f"isdaa.evaluation.benchmarks.{module}.QUESTIONS", 12)
    rows = [{"instruction": text, "output": "b" * (7 * i + 5), "generator": BASELINE} for i, text in enumerate(INSTRUCTIONS)]
    write(tmp_path / "questions.json", rows)
    header = "index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n"
    gamed = [(i, (3 * i + side) % 10 / 10, (5 * i + side) % 7 / 3 - 1, i / 4 - 1, False) for side in range(2) for i in range(12)]
    (tmp_path / "gamed.csv").write_text(header + "".join(",".join(map(str, row)) + "\n" for row in gamed))


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def annotations(model: str = "mine", baseline: str = BASELINE, annotator: str = "weighted_alpaca_eval_gpt4_turbo") -> list[dict]:
    sides = {"generator_1": baseline, "generator_2": model, "annotator": annotator}
    return [
        {
            "instruction": text,
            "output_1": "b" * (7 * i + 5),
            "output_2": "m" * (90 - 6 * i),
            **sides,
            "preference": 1.05 + i % 5 / 5,
        }
        for i, text in enumerate(INSTRUCTIONS)
    ]


def evaluate(name: str, output: Path, *options: object) -> int:
    words = [name, "--output", str(output), "--evaluation.bootstrap", "100", *map(str, options)]
    return main(["benchmark", *words])


def scored(folder: Path, capsys: pytest.CaptureFixture[str], *options: object, name: str = "alpaca_eval") -> tuple[dict, str]:
    """(metrics, what was printed) of judgments, and that table, page, CSV and JSON say the same of length control."""
    capsys.readouterr()
    assert evaluate(name, folder / "out", *options) == 0
    metrics, printed = read_json(folder / "out/metrics.json"), " ".join(capsys.readouterr().out.split())
    page, table = (folder / "out/report.html").read_text(), (folder / "out/metrics.csv").read_text()
    for figure, words in ((LC, "ength-controlled win rate"), ("length_adjusted_win_rate", "no difficulty; not comparable")):
        given = any(figure in model["figures"] for model in metrics["models"])
        assert (f",{figure}," in table) == given == (words in re.sub("no length-controlled win rate", "", printed))
        assert given == (words in re.sub("(?i)no length-controlled win rate", "", page))
    assert all(note in printed for note in metrics["notes"])
    return metrics, printed


def test_the_name_is_given_for_the_official_questions_against_the_baseline(tmp_path, capsys):
    questions, gamed = ["--questions", tmp_path / "questions.json"], ["--gamed", tmp_path / "gamed.csv"]
    file = write(tmp_path / "mine.json", annotations())
    metrics, printed = scored(tmp_path, capsys, "--judgments", file, *questions, *gamed)
    assert metrics["headline"] == LC and metrics["length_control"]["recipe"] == "length_controlled_v1"
    assert "mine has a length-controlled win rate of " in printed and not metrics["notes"]
    assert "judged by weighted_alpaca_eval_gpt4_turbo" in printed and metrics["length_control"]["gamed"] == str(gamed[1])
    (model,) = metrics["models"]
    assert model["details"]["length"] == sum(90 - 6 * i for i in range(12)) // 12 and model["counts"]["hard"] == 0
    whole = model["figures"]

    metrics, printed = scored(tmp_path, capsys, "--judgments", write(file, annotations()[::-1]), *questions, *gamed)
    assert metrics["models"][0]["figures"] == whole  # the order of the rows says nothing

    metrics, printed = scored(tmp_path / "few", capsys, "--judgments", file, *questions, *gamed, "--limit", "9")
    assert "a length-controlled win rate on 9 of 12 questions of" in printed and metrics["models"][0]["figures"][LC]["n"] == 9
    assert "Length-controlled win rate on 9 of 12" in (tmp_path / "few/out/report.html").read_text()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"gamed": None}, "df_gamed.csv cannot be had from the Hub (no network); download it and give it with --gamed FILE"),
        ({"baseline": "davinci"}, "the opponent is davinci, not gpt4_1106_preview"),
        ({"questions": "other"}, "are not AlpacaEval's own 12 in their order"),
        (
            {"questions": None},
            "alpaca_eval_gpt4_baseline.json cannot be had from the Hub (no network); give it with --questions FILE",
        ),
        ({"questions": None, "baseline": "davinci"}, "the opponent is davinci, not gpt4_1106_preview"),
    ],
)
def test_otherwise_the_raw_rate_leads_and_it_is_said_why(change, why, tmp_path, capsys):
    questions, gamed = change.get("questions", "questions"), change.get("gamed", "gamed")
    write(tmp_path / "other.json", read_json(tmp_path / "questions.json")[::-1])
    options = ["--judgments", write(tmp_path / "mine.json", annotations(baseline=change.get("baseline", BASELINE)))]
    options += ["--questions", tmp_path / f"{questions}.json"] if questions else []
    options += ["--gamed", tmp_path / f"{gamed}.csv"] if gamed else []
    metrics, printed = scored(tmp_path, capsys, *options)
    assert metrics["headline"] == "win_rate" and why in metrics["notes"][0] and metrics["length_control"]["recipe"] is None
    assert list(metrics["models"][0]["figures"]) == ["win_rate", "discrete_win_rate", "length_adjusted_win_rate"]
    assert (
        "mine has a win rate of" in printed
        and f"no length-controlled win rate: {metrics['length_control']['not_given']}" in printed
    )


def test_annotations_alone_are_of_the_hubs_questions_where_these_are_to_be_had(tmp_path, capsys, monkeypatch):
    files = {"alpaca_eval_gpt4_baseline.json": tmp_path / "questions.json", "df_gamed.csv": tmp_path / "gamed.csv"}
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file, repo_type: str(files[file]))
    file = write(tmp_path / "mine.json", annotations()[1:])
    assert evaluate("alpaca_eval", tmp_path / "out", "--judgments", file) == 2
    error = capsys.readouterr().err
    assert "no judgment of mine to question 0 ('Task 0') of 12 questions; --missing skip" in error and error.count("\n") == 1
    metrics, printed = scored(tmp_path, capsys, "--judgments", file, "--missing", "loss")
    assert "no judgment of 1 question: counted as lost" in printed and metrics["models"][0]["figures"][LC]["n"] == 12
    metrics, printed = scored(tmp_path, capsys, "--judgments", file, "--missing", "skip")
    assert "no judgment of 1 question: left out" in printed and "11 of 12 questions; ±" in printed
    assert metrics["questions"]["count"] == 12 and metrics["questions"]["judged"] == 11
    assert metrics["headline"] == LC and "length-controlled win rate on 11 of 12" in printed and not metrics["partial"]
    expected, _ = scored(tmp_path, capsys, "--judgments", file, "--questions", tmp_path / "questions.json", "--missing", "skip")
    assert expected["models"][0]["figures"] == metrics["models"][0]["figures"]
    write(file, [*annotations(), annotations()[0] | {"instruction": "Another"}])
    metrics, _ = scored(tmp_path / "strange", capsys, "--judgments", file)
    assert metrics["headline"] == "win_rate" and "not among AlpacaEval's own 12" in metrics["notes"][0]


def letters(talk) -> str:
    """A judge who prefers m's."""
    user = talk[-1]["content"]
    return "M" if "mm" in between(user, "<<<M\n", "\nM>>>") else "m"


def test_answers_judged_here_have_the_figure_and_the_template_beside_it(tmp_path, capsys):
    rows = [
        {"instruction": text, "output": "m" * (9 + i) if i % 3 else "x", "generator": "mine"}
        for i, text in enumerate(INSTRUCTIONS)
    ]
    with judge_server(letters) as (_, url):
        options = ["--answers", write(tmp_path / "a.json", rows), "--judge_model", "toy", "--judge_base_url", url]
        options += ["--questions", tmp_path / "questions.json"]
        metrics, printed = scored(tmp_path, capsys, *options, "--gamed", tmp_path / "gamed.csv")
        assert metrics["headline"] == LC and metrics["judge"]["templates"] == ["isdaa-alpaca-1"]
        assert "judged by toy, template isdaa-alpaca-1" in printed and "isdaa's words, not the leaderboard's" in printed
        assert "toy,isdaa-alpaca-1" in (tmp_path / "out/metrics.csv").read_text()
        capsys.readouterr()
        # Said before anything is asked, too.
        assert evaluate("alpaca_eval", tmp_path / "none", *options, "--max_requests", "0") == 3
        assert "no length-controlled win rate: tatsu-lab/alpaca_eval: df_gamed.csv" in capsys.readouterr().err


def test_a_deleted_row_is_an_error_left_out_or_lost(tmp_path, capsys):
    questions = ["--questions", tmp_path / "questions.json", "--gamed", tmp_path / "gamed.csv"]
    rows = annotations()
    file = write(tmp_path / "mine.json", rows[:4] + rows[5:])
    assert evaluate("alpaca_eval", tmp_path / "out", "--judgments", file, *questions) == 2
    error = capsys.readouterr().err
    assert "mine.json: no judgment of mine to question 4 ('Task 4') of 12 questions; --missing skip leaves them out" in error
    assert "--missing loss counts them as lost" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()

    metrics, printed = scored(tmp_path, capsys, "--judgments", file, *questions, "--missing", "skip")
    (model,) = metrics["models"]
    kept = [row["preference"] - 1 for row in rows if row["instruction"] != "Task 4"]
    assert model["figures"]["win_rate"]["mean"] == pytest.approx(sum(kept) / 11) and model["figures"][LC]["n"] == 11
    assert "no judgment of 1 question: left out" in printed and "win rate on 11 of 12" in printed

    metrics, printed = scored(tmp_path, capsys, "--judgments", file, *questions, "--missing", "loss")
    (model,) = metrics["models"]
    assert model["figures"]["win_rate"]["mean"] == pytest.approx(sum(kept) / 12) and model["figures"][LC]["n"] == 12
    assert "no judgment of 1 question: counted as lost" in printed and model["counts"]["hard"] == 0
    assert model["details"]["length"] == sum(90 - 6 * i for i in range(12) if i != 4) // 12  # the lost one is empty

    rows[4]["preference"] = None  # unread, not missing
    metrics, _ = scored(tmp_path, capsys, "--judgments", write(file, rows), *questions)
    assert metrics["models"][0]["counts"]["unparsed"] == 1 and metrics["models"][0]["figures"][LC]["n"] == 12


def test_a_model_against_itself_minus_a_row_is_level_without_questions(tmp_path, capsys):
    files = [write(tmp_path / "one.json", annotations("one")), write(tmp_path / "two.json", annotations("two")[::-1][:-3])]
    metrics, _ = scored(tmp_path, capsys, "--judgments", *files)
    (pair,) = metrics["comparisons"]
    assert (pair["better"], pair["equal"], pair["worse"], pair["questions"]) == (0, 9, 0, 9)


def test_answers_and_opponents_that_lack_questions(tmp_path, capsys):
    pairs = [{"id": str(i), "prompt": f"Post {i}"} for i in range(5)]
    write_jsonl(tmp_path / "q.jsonl", pairs)
    for label, gone in (("mine", 3), ("yours", None), ("base", 1)):
        rows = [row | {"response": label * 2, "model": label} for row in pairs if row["id"] != str(gone)]
        write_jsonl(tmp_path / f"{label}.jsonl", rows)
    with judge_server(lambda talk: "Better: A") as (judge, url):
        asking = ["--judge_model", "toy", "--judge_base_url", url, "--questions", tmp_path / "q.jsonl"]
        sources = ["--answers", tmp_path / "mine.jsonl", tmp_path / "yours.jsonl", "--opponent", tmp_path / "base.jsonl"]
        assert evaluate("tldr", tmp_path / "out", *sources, *asking) == 2
        assert "mine.jsonl: no answer of mine to question 3 ('Post 3') of 5 questions" in capsys.readouterr().err
        assert evaluate("tldr", tmp_path / "out", *sources, *asking, "--missing", "loss") == 2
        assert "nothing to compare an answer to question 1 with" in capsys.readouterr().err and not judge.asked
        assert evaluate("tldr", tmp_path / "out", *sources, *asking, "--missing", "skip") == 0
        metrics, printed = read_json(tmp_path / "out/metrics.json"), " ".join(capsys.readouterr().out.split())
        assert [model["counts"]["questions"] for model in metrics["models"]] == [3, 4] and metrics["questions"]["judged"] == 4
        assert "base.jsonl has no answer to 1 of 5 questions: left out" in printed
        assert "mine: no answer to 1 question: left out" in printed and len(judge.asked) == 14
        (tmp_path / "base.jsonl").write_text(
            "".join(json.dumps(row | {"response": "b", "model": "base"}) + "\n" for row in pairs)
        )
        assert evaluate("tldr", tmp_path / "lost", *sources, *asking, "--missing", "loss") == 0
    mine, yours = read_json(tmp_path / "lost/metrics.json")["models"]
    assert mine["figures"]["win_rate"]["mean"] == pytest.approx(4 * 0.5 / 5) and yours["figures"]["win_rate"]["mean"] == 0.5
    assert "no answer to 1 question: counted as lost" in mine["notes"] and mine["answers"]["count"] == 4
    # What is written is read again, and means the same.
    assert {row["id"] for row in read_jsonl(tmp_path / "lost/judgments/toy/mine.jsonl")} == set("01234")
    options = ["--judgments", tmp_path / "lost/judgments/toy/mine.jsonl", "--questions", tmp_path / "q.jsonl"]
    assert evaluate("tldr", tmp_path / "again", *options) == 0
    assert read_json(tmp_path / "again/metrics.json")["models"][0]["figures"] == mine["figures"]


def test_arena_hards_missing_judgments_are_two_lost_games(tmp_path, capsys):
    write_jsonl(tmp_path / "q.jsonl", [{"uid": uid, "category": "coding", "prompt": uid} for uid in "abc"])
    won = {"score": "B>>A", "judgment": {"answer": ""}}, {"score": "A>>B", "judgment": {"answer": ""}}
    rows = [{"uid": uid, "category": "coding", "model": "m", "baseline": "base", "judge": "j", "games": won} for uid in "ac"]
    write_jsonl(tmp_path / "j.jsonl", rows)
    options = ["--questions", tmp_path / "q.jsonl", "--judgments", tmp_path / "j.jsonl"]
    assert evaluate("arena_hard", tmp_path / "out", *options) == 2
    assert "no judgment of m to question b" in capsys.readouterr().err
    assert evaluate("arena_hard", tmp_path / "out", *options, "--missing", "loss") == 0
    (model,) = read_json(tmp_path / "out/metrics.json")["models"]
    assert model["figures"]["win_rate"]["mean"] == pytest.approx(12 / 14)  # six votes a question won, two lost


def test_mt_bench_says_once_that_right_answers_are_missing(tmp_path, capsys):
    write_jsonl(
        tmp_path / "q.jsonl", [{"question_id": 111, "category": "math", "turns": ["1+1?", "+1?"], "reference": ["two", ""]}]
    )
    rows = [
        {"question_id": 111, "model": m, "judge": ["j", "isdaa-single-1"], "turn": t, "score": 5} for m in "AB" for t in (1, 2)
    ]
    write_jsonl(tmp_path / "j.jsonl", rows)
    assert evaluate("mt_bench", tmp_path / "out", "--questions", tmp_path / "q.jsonl", "--judgments", tmp_path / "j.jsonl") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("reference_answer/gpt-4.jsonl") == 1
    assert (tmp_path / "out/report.html").read_text().count("reference_answer/gpt-4.jsonl") == 1
    write_jsonl(tmp_path / "j.jsonl", rows[:3])  # a turn that nobody graded
    assert evaluate("mt_bench", tmp_path / "half", "--questions", tmp_path / "q.jsonl", "--judgments", tmp_path / "j.jsonl") == 2
    assert "no judgment of every turn of B to question 111" in capsys.readouterr().err


def test_a_model_that_wins_everything_has_no_interval_and_is_better(tmp_path, capsys):
    questions = ["--questions", tmp_path / "questions.json", "--gamed", tmp_path / "gamed.csv"]
    rows = [row | {"preference": 2.0} for row in annotations("winner")]
    file = write(tmp_path / "winner.json", rows)
    metrics, printed = scored(tmp_path / "one", capsys, "--judgments", file, *questions)
    figure = metrics["models"][0]["figures"][LC]
    assert figure["low"] is None is figure["high"] and 0.5 < figure["mean"] <= 1
    assert metrics["sentence"].endswith("against gpt4_1106_preview: better than its opponent.") and "no interval" in printed
    assert 'class="verdict not"' in (tmp_path / "one/out/report.html").read_text()
    other = write(tmp_path / "mine.json", annotations())
    metrics, printed = scored(tmp_path / "two", capsys, "--judgments", file, other, *questions)
    (pair,) = metrics["comparisons"]
    assert pair["headline_difference"] is None and "] raw |" in printed  # two figures of which one has no resamples
    again = write(tmp_path / "again.json", [row | {"generator_2": "again"} for row in rows])
    metrics, printed = scored(tmp_path / "three", capsys, "--judgments", file, again, *questions)
    assert metrics["comparisons"][0]["headline_difference"] is None and "winner and again are level on" in printed


def test_a_verdict_that_a_file_does_not_have_is_not_said_to_be_unreadable(tmp_path, capsys):
    rows = annotations()
    rows[3]["preference"] = None
    game = {"score": "A>B", "judgment": {"answer": ""}}
    asked = {"category": "coding", "model": "m", "baseline": "base", "judge": "j"}
    games = [[game, None], [{**game, "score": None}, game], [game, game]]
    graded = [{"question_id": 1, "model": "m", "judge": ["j", "t"], "turn": t, "score": s} for t, s in ((1, 5), (2, -1))]
    files = {
        "alpaca_eval": rows,
        "arena_hard": [{**asked, "uid": str(i), "games": games[i]} for i in range(3)],
        "mt_bench": graded,
    }
    write_jsonl(tmp_path / "q.jsonl", [{"question_id": 1, "category": "writing", "turns": ["Hi", "And?"]}])
    for name, judgments in files.items():
        write_jsonl(tmp_path / f"{name}.jsonl", judgments)
        options = ["--questions", tmp_path / "q.jsonl"] if name == "mt_bench" else []
        metrics, printed = scored(tmp_path / name, capsys, "--judgments", tmp_path / f"{name}.jsonl", *options, name=name)
        assert [row["lack"] for row in metrics["models"][0]["lacks"]["reasons"]] == ["not said"]
        assert "not said: the file has no verdict there, and no reason" in printed and "unreadable" not in printed


@pytest.mark.parametrize("name", ["alpaca_eval", "tldr"])
def test_a_row_that_stands_twice_is_refused_where_no_questions_are_at_hand(name, tmp_path, capsys):
    game = {"game": "", "value": 1.0, "kind": "hard"}
    pairs = [{"id": str(i), "prompt": f"Post {i}", "model": "m", "opponent": "o", "games": [game]} for i in range(8)]
    rows = annotations(baseline="other") if name == "alpaca_eval" else pairs
    file = tmp_path / "mine.jsonl"
    write_jsonl(file, [*rows, rows[6]])
    assert evaluate(name, tmp_path / "out", "--judgments", file) == 2
    error = capsys.readouterr().err
    assert "again, word for word (" in error and "remove one" in error and "--limit" not in error
    write_jsonl(file, [*rows, rows[6] | {"output_2": "another", "id": "another"}])  # asked twice, and answered twice
    metrics, _ = scored(tmp_path, capsys, "--judgments", file, name=name)
    assert metrics["questions"]["judged"] == len(rows) + 1
    if name == "alpaca_eval":
        write_jsonl(file, [*rows, rows[6]])
        assert evaluate(name, tmp_path / "out", "--judgments", file, "--questions", tmp_path / "questions.json") == 2
        error = capsys.readouterr().err
        assert "again, which the questions have once; remove one" in error and "--limit" not in error


def test_an_opponent_that_has_no_answer_cannot_have_won(tmp_path, capsys):
    write_jsonl(tmp_path / "q.jsonl", [{"id": str(i), "prompt": f"Post {i}"} for i in range(2)])
    for label, count in (("mine", 2), ("base", 1)):
        rows = [{"id": str(i), "prompt": f"Post {i}", "response": "x", "model": label} for i in range(count)]
        write_jsonl(tmp_path / f"{label}.jsonl", rows)
    options = ["--questions", tmp_path / "q.jsonl", "--answers", tmp_path / "mine.jsonl", "--opponent", tmp_path / "base.jsonl"]
    options += ["--judge_model", "toy", "--judge_base_url", "http://127.0.0.1:9"]
    for more, told in (([], False), (["--missing", "loss"], True)):
        assert evaluate("tldr", tmp_path / "out", *options, *more) == 2
        error = capsys.readouterr().err
        assert "nothing to compare an answer to question 1 with" in error and "--missing skip" in error
        assert ("nobody lost: --missing loss is not possible" in error) == told


def test_a_turn_without_its_other_counts_as_in_fastchat(tmp_path, capsys):
    write_jsonl(tmp_path / "q.jsonl", [{"question_id": i, "category": "writing", "turns": ["Hi", "And?"]} for i in range(8)])
    turns = [(i, t) for i in range(7) for t in (1, 2) if (i, t) != (6, 2)]  # question 7 is not there at all
    rows = [{"question_id": i, "model": "m", "judge": ["j", "t"], "turn": t, "score": 9 if i == 6 else 5 - t} for i, t in turns]
    write_jsonl(tmp_path / "j.jsonl", rows)
    options = ["--questions", tmp_path / "q.jsonl", "--judgments", tmp_path / "j.jsonl", "--missing", "skip"]
    metrics, printed = scored(tmp_path, capsys, *options, name="mt_bench")
    (model,) = metrics["models"]
    assert model["figures"]["score"]["mean"] == pytest.approx((6 * 7 + 9) / 13)
    assert (model["figures"]["turn_1"]["n"], model["figures"]["turn_2"]["n"]) == (7, 6)
    assert model["notes"][:2] == ["no judgment of 1 question: left out", "no judgment of some turn of 1 question: left out"]
    assert not metrics["partial"] and "m has a mean grade on 7 of 8 questions of 3.92" in printed and "Partial" not in printed


def test_files_that_lack_questions_are_of_fewer_and_not_partial(tmp_path, capsys):
    write_jsonl(tmp_path / "q.jsonl", [{"uid": str(i), "category": "coding", "prompt": str(i)} for i in range(9)])
    games = [{"score": label, "judgment": {"answer": ""}} for label in ("B>A", "A>B")]
    told = {"category": "coding", "model": "m", "baseline": "base", "judge": "j", "games": games}
    write_jsonl(tmp_path / "j.jsonl", [{**told, "uid": str(i)} for i in range(7)])
    arena = ["--questions", tmp_path / "q.jsonl", "--judgments", tmp_path / "j.jsonl"]
    file = write(tmp_path / "mine.json", annotations(baseline="davinci")[:7])
    for name, options in (
        ("arena_hard", arena),
        ("alpaca_eval", ["--questions", tmp_path / "questions.json", "--judgments", file]),
    ):
        metrics, printed = scored(tmp_path / name, capsys, *options, "--missing", "skip", name=name)
        count = metrics["questions"]["count"]
        assert not metrics["partial"] and "Partial" not in printed and f" win rate on 7 of {count} questions of " in printed
        page = (tmp_path / name / "out/report.html").read_text()
        assert "Partial" not in page and f"7 of {count} questions, answers compared" in page


def test_models_that_lack_different_rows_are_compared_at_equal_length_on_those_of_both(tmp_path, capsys):
    """The raw difference, which stood in its place, has the other sign: what wins is length."""
    rows = annotations()
    long = [row | {"generator_2": "long", "preference": 1.9 - i % 3 / 10} for i, row in enumerate(rows)]
    short = [row | {"generator_2": "short", "preference": 1.55 - i % 4 / 20, "output_2": "s"} for i, row in enumerate(rows)]
    files = [write(tmp_path / "long.json", long[1:]), write(tmp_path / "short.json", short[:-1])]
    options = ["--questions", tmp_path / "questions.json", "--gamed", tmp_path / "gamed.csv", "--missing", "skip"]
    metrics, printed = scored(tmp_path, capsys, "--judgments", *files, *options)
    (pair,) = metrics["comparisons"]
    assert metrics["headline"] == LC and pair["questions"] == 10 and "] raw |" not in printed
    common = [write(tmp_path / f"both-{name}.json", part[1:-1]) for name, part in (("long", long), ("short", short))]
    expected, _ = scored(tmp_path / "both", capsys, "--judgments", *common, *options)
    assert pair["headline_difference"] == expected["comparisons"][0]["headline_difference"] != pair["difference"]
