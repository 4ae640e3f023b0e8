"""The page of models that other programs trained: nothing on it that they do not have, and their conversations read as such."""

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from report_studies import FALLS, RISES, cells, study, sweep, trajectory, write_evaluation

from isdaa.evaluation.checkpoints.scoring import SCORES, scores_key
from isdaa.evaluation.checkpoints.trajectory import Study, read_study
from isdaa.evaluation.records import Blocks
from isdaa.evaluation.table import pm, print_table
from isdaa.report import page
from isdaa.report.answers import answer_turns
from isdaa.report.charts.lines import lines_of, panels_of
from isdaa.report.content import find, report_of
from isdaa.report.figures import figures_of
from isdaa.report.samples import samples_of
from isdaa.report.words import number

FLAT = (0.50, 0.49, 0.50, 0.48, 0.50, 0.49)


def foreign(curve=FALLS, name="out", **more):
    """A run without isdaa's record."""
    return trajectory(None, None, None, name=name, curve=curve, held_out=False, prompts=300, **more)


def with_steps(run, steps):
    metrics = [entry | {"step": step} for entry, step in zip(run.metrics, steps, strict=True)]
    return replace(run, steps=np.array(steps), metrics=metrics)


def numbered(run):
    """As the evaluation numbers checkpoints whose steps nobody knows."""
    return replace(run, steps=np.arange(1, len(run.steps) + 1))


@pytest.mark.parametrize(
    ("raw", "turns"),
    [
        ("Hi there.<|im_end|>", [("assistant", "Hi there.")]),
        (" A\n B<|eot_id|>\n", [("assistant", "A\n B")]),
        ("Yes<end_of_turn>\n<start_of_turn>user\nAnd?", [("assistant", "Yes"), ("user", "And?")]),
        ("No.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>", [("assistant", "No."), ("user", "Why?")]),
        ("<|start_header_id|>assistant<|end_header_id|>\n\nOh", [("assistant", "Oh")]),
        ("One<|end|>\n<|user|>\nTwo", [("assistant", "One"), ("user", "Two")]),
        ("So [INST] more [/INST] said</s>", [("assistant", "So"), ("user", "more"), ("assistant", "said")]),
        ("a<|endoftext|>b", [("assistant", "a\n(end of turn: <|endoftext|>)\nb")]),
        ("<think>\nhm\n</think>\n\n4", [("assistant", "(thinking) hm\n4")]),
        (
            'Let me see. <tool_call>\n{"name": "rain", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
            [("assistant", 'Let me see. call rain({"city": "Oslo"})')],
        ),
        ("<tool_call>{broken</tool_call>", [("assistant", "<tool_call>{broken</tool_call>")]),
        ("<tool_call>[1]</tool_call>", [("assistant", "<tool_call>[1]</tool_call>")]),
        ("<|im_end|>", [("assistant", "")]),
        ("", [("assistant", "")]),
        ([{"role": "assistant", "content": "chosen"}], [("assistant", "chosen")]),
    ],
)
def test_an_answer_in_a_chat_is_a_turn(raw, turns):
    assert answer_turns(raw, chat=True) == turns


def test_a_plain_answer_has_no_role():
    assert answer_turns("a <b> [1] | c", chat=False) == [("", "a <b> [1] | c")]


def _axes(value):
    if isinstance(value, dict):
        yield from [value["x"]["axis"]] if isinstance(value.get("x"), dict) and "axis" in value["x"] else []
        yield from (axis for inner in value.values() for axis in _axes(inner))
    elif isinstance(value, list):
        yield from (axis for inner in value for axis in _axes(inner))


@pytest.mark.parametrize(
    ("steps", "title", "ticks"),
    [
        (None, "Checkpoint, in the order of training", [1, 2]),
        ([1, 2], "Training step", [0, 1, 2]),
        ([3, 4], "Training step", [0, 1, 2, 3, 4]),
        ([500, 1000], "Training step", [0, 200, 400, 600, 800, 1000]),
    ],
)
def test_ticks_of_steps_are_whole_numbers(steps, title, ticks):
    run = foreign(RISES[:2])
    run = numbered(run) if steps is None else with_steps(run, steps)
    (figure,) = [figure for figure in figures_of(find(study([run]))) if figure.section == "training"]
    axes = list(_axes(figure.draw(900).to_dict()))
    assert axes and all((axis["title"], axis["values"]) == (title, ticks) for axis in axes)


@pytest.mark.parametrize("count", [1, 3, 12])
def test_checkpoints_by_number_have_whole_ticks_and_no_nought(count):
    run = numbered(foreign(tuple(np.linspace(0.5, 0.6, count))))
    (figure,) = [figure for figure in figures_of(find(study([run]))) if figure.section == "texts"]
    for axis in _axes(figure.draw(900).to_dict()):
        assert axis["values"] and all(isinstance(v, int) and 1 <= v <= count for v in axis["values"])


@pytest.mark.parametrize(
    ("curve", "roles"),
    [
        (FALLS, ["Reference", "Peak", "Last checkpoint"]),
        ((0.5, 0.55, 0.6, 0.7, 0.8), ["Reference", "Checkpoint to keep, the last"]),
        ((0.5, 0.7, 0.9, 0.89, 0.88), ["Reference", "Checkpoint to keep", "Last checkpoint"]),
        ((0.49, 0.51, 0.46, 0.45, 0.44), ["Reference", "Best checkpoint", "Last checkpoint"]),
        ((0.42, 0.40, 0.35, 0.31, 0.2), ["Reference", "Best checkpoint", "Last checkpoint"]),
        (RISES[:2], ["Reference", "First checkpoint", "Last checkpoint"]),
        (RISES[:1], ["Reference", "Checkpoint"]),
    ],
)
def test_a_peak_is_named_only_where_there_is_one(tmp_path, curve, roles):
    run = foreign(curve)
    count = len(curve)
    read = read_study(write_evaluation(tmp_path)).runs[0]
    paths = [read.paths[i % 5] for i in range(count)]
    run = replace(run, evaluation=read.evaluation, paths=paths)
    found = find(study([run]))
    verdict = found.verdicts[id(found.runs[0])]
    content = samples_of(replace(run, rewards=run.rewards[:, :12]), verdict)  # as many as there are records
    assert [column["role"] for column in content["columns"]] == roles
    if "Peak" not in roles:
        assert not any("peak" in prompt["why"] for prompt in content["prompts"])


def test_the_data_s_responses_stand_beside_where_they_are_the_opponent(tmp_path):
    run = write_evaluation(tmp_path)
    samples, metrics = run / "evaluation/samples.jsonl", run / "evaluation/metrics.json"
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    chosen = [{"role": "assistant", "content": "From the data."}]
    asked = [{"role": "user", "content": "Hm?"}]
    rows = [row | {"prompt": asked, "chosen": chosen} if "prompt" in row else row for row in rows]
    rows = [row | {"text": "Well.<|im_end|>\n<|im_start|>user\nMe?"} if "text" in row else row for row in rows]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    points = [{"prompt_id": f"p{i}", "sample": 0, "score": 0.25} for i in range(12)]
    Blocks(run / "evaluation" / SCORES).add("scores", scores_key("chosen", "prompts", "1" * 24), {}, points)
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"opponent": "chosen"}), encoding="utf-8")
    html = page.write_report(read_study(run), tmp_path / "report").read_text(encoding="utf-8")
    texts = html[html.index("Samples side by side") : html.index("Every checkpoint")]
    for role, words in (("user", "Hm?"), ("assistant", "From the data."), ("assistant", "Well."), ("user", "Me?")):
        assert f'<span class="role">{role}</span><div class="text">{words}</div>' in texts
    assert (
        "<h4>Chosen</h4>" in texts
        and "from the data · score 0.25</span>" in texts
        and "im_start" not in texts
        and "None" not in texts
    )
    assert "win rate against the data&#39;s chosen responses" in html[: html.index("<h2>")]


def test_captions_speak_of_marks_that_are_drawn(tmp_path):
    one = foreign()
    (win,) = [figure for figure in figures_of(find(study([one]))) if figure.section == "win"]
    assert "open circle" in win.caption and "Bars" in win.caption and "seeds" not in win.caption
    unknown = replace(one, start=None, metrics=())
    bare = Study([unknown], study([one]).metrics, "bare", study([one]).folder)
    (win,) = [figure for figure in figures_of(find(bare)) if figure.section == "win"]
    assert "open circle" not in win.caption and "Bars" not in win.caption and "dashed" not in win.caption
    either = ("A line is a run.", "bands their 95 % t-intervals")
    for seeds, words, other in (((1,), *either), ((1, 2, 3), *reversed(either))):
        made = find(cells({"method": "dpo"}, {"method": "is_dpo"}, seeds=seeds))
        captions = {figure.name: figure.caption for figure in figures_of(made)}
        assert words in captions["matched-kl"] and other not in captions["matched-kl"]
        assert "left out" not in captions["matched-kl"] and "in one panel" not in captions["matched-kl"]
    without = foreign(scored=False)
    headings = {figure.section: figure for figure in figures_of(find(study([without])))}
    assert headings["training"].title.startswith("KL") and "good" not in headings["training"].caption
    assert "win" not in headings and "held_out" not in headings and "weights" not in headings


def test_a_judge_without_points_has_no_chart_of_points(tmp_path):
    run = replace(foreign(), rewards=None)
    run = replace(run, metrics=[entry | {"reward": None} for entry in run.metrics])
    made = study([run])
    made = replace(made, metrics=made.metrics | {"reference": made.metrics["reference"] | {"reward": None}})
    html = page.write_report(made, tmp_path).read_text(encoding="utf-8")
    (figure,) = [figure for figure in figures_of(find(made)) if figure.section == "training"]
    assert figure.title == "Win rate and distance" and "(points)" not in html and ">Score<" not in html


def test_nothing_is_minus_nought(tmp_path):
    run = foreign()
    run = replace(run, kl=np.vstack([run.kl[:1] * 0 - 0.003, run.kl[1:]]))
    low = {"mean": -0.002, "low": -0.004, "high": -0.001, "n": 300}
    run = replace(run, metrics=[run.metrics[0] | {"kl": low, "reward": low}, *run.metrics[1:]])
    made = study([run])
    html = page.write_report(made, tmp_path).read_text(encoding="utf-8")
    print_table(made.metrics | {"verdicts": {"out": {"sentence": "Fine."}}}, file=(stream := io.StringIO()), width=140)
    assert "checkpoint-40" in stream.getvalue() or "40" in stream.getvalue()
    for text in (html, stream.getvalue()):
        assert not re.search(r"[-−]0(\.0+)?(?![\d.])", re.sub(r"<[^>]*>", " ", text))
    assert pm(low, 2).startswith("0.00 ±") and number(-0.0004, 3) == "0.000" and number(-0.0006, 3) == "−0.001"


@pytest.mark.parametrize("where", ["answers", "kl"])
def test_cut_answers_are_warned_of_without_a_scorer(tmp_path, where):
    """With the share and what to set, on page, terminal and in the data; of the samples for KL alone, too."""
    run = foreign(scored=False)
    for entry in run.metrics:
        entry["kl"]["truncated"] = 0.87
        entry["truncated"] = 0.87 if where == "answers" else 0.0
    made = study([run])
    html = page.write_report(made, tmp_path).read_text(encoding="utf-8")
    print_table(made.metrics | {"verdicts": {}}, file=(stream := io.StringIO()), width=400)
    (line,) = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["warnings"]
    told = re.sub(r"\s+", " ", stream.getvalue())
    for text in (html[: html.index("<h2>")].replace("<code>", "").replace("</code>", ""), told, line):
        assert (
            "cut 87 % of the" in text
            and "give --evaluation.max_new_tokens 64" in text
            and "KL counts tokens up to that limit only" in text
        )
    assert ("of the samples for KL" in line) == (where == "kl")


def test_runs_without_seeds_are_told_apart_by_their_findings(tmp_path):
    runs = [foreign(name="dpo"), foreign(FLAT, name="ipo")]
    made = study(runs)
    html = page.write_report(made, tmp_path).read_text(encoding="utf-8")
    report = report_of(find(made))
    fall = number(next(run for run in report["runs"] if run["name"] == "dpo")["verdict"]["fall"])
    assert f"dpo over-optimised (win rate against the reference down {fall})" in report["headline"]
    assert "seed" not in report["headline"] and "seed by seed" not in html and "A chip is a seed" not in html
    assert '<span class="chip over-optimised" title="over-optimised">over-optimised</span>' in html
    assert len(panels_of(lines_of(made))) == 1


def test_a_single_checkpoint_is_counted_as_one(tmp_path):
    report = report_of(find(study([foreign(RISES[:1])])))
    assert report["summary"].startswith(
        "1 run, 1 checkpoint, 80 held-out prompts, win rate against the reference, scored by gold."
    )


def test_a_clip_out_of_sight_is_not_spoken_of(tmp_path):
    run = write_evaluation(tmp_path)
    values = {"objective.weight": "importance", "objective.clip_eps": 50.0, "objective.clip": "joint"}
    (run / "run.json").write_text(json.dumps({"stages": {"align": {"values": values}}}), encoding="utf-8")
    logged = {f"weights/log_weight_p{q:02d}": -0.01 * q for q in (5, 25, 50, 75, 95)}
    (run / "metrics.jsonl").write_text(json.dumps({"step": 5, "weights/mean": 0.5} | logged) + "\n", encoding="utf-8")
    captions = {figure.name: figure.caption for figure in figures_of(find(read_study(run)))}
    assert "Dashed" not in captions["log-weights"]
    assert captions["weights"] == "Mean weight of the pairs of a batch."  # of no other number is there a panel


@pytest.mark.parametrize(("line", "shown"), [("One is left out.", "One is left out.</p>"), ("Two were cut", "Two were cut.</p>")])
def test_a_note_ends_with_one_full_stop(tmp_path, line, shown):
    made = replace(study([foreign()]), notes=[line])
    html = page.write_report(made, tmp_path / "report").read_text(encoding="utf-8")
    assert shown in html and "..</p>" not in html


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("measured", [True, False])
def test_without_a_scorer_the_page_speaks_of_what_there_is(runs, measured):
    made = [trajectory(None, None, None, name=f"run{i}", scored=False, held_out=measured) for i in range(runs)]
    said = report_of(find(study(made)))["headline"]
    assert said.startswith(f"No verdict: {'this run was' if runs == 1 else 'these runs were'} evaluated without a scorer, and KL")
    assert ("KL, drift and held-out accuracy do not tell better" in said) == measured == ("KL does not tell better" not in said)


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_over_seeds_are_spoken_of_where_there_are_several(seeds: int) -> None:
    found = find(sweep(betas=(0.01,), seeds=seeds))
    figures = figures_of(found)
    text = page.render(report_of(found), figures, {figure.name: "" for figure in figures}, found)
    assert "What the weights change" in text
    assert ("means over seeds" in text) == ("t-intervals over seeds" in text) == (seeds > 1)
