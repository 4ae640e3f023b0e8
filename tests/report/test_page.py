"""The report's page, data and table: every shape of study, escaping, and that all three say the same."""

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hostile import ESCAPED, NAME, harmless
from report_studies import FALLS, RISES, SCRIPT, cells, study, sweep, trajectory, write_evaluation

from isdaa.errors import UserError
from isdaa.evaluation.checkpoints.trajectory import Study, read_study
from isdaa.report import page
from isdaa.report.charts.lines import lines_of, panels_of
from isdaa.report.charts.style import PALETTE
from isdaa.report.content import COLUMNS, find, report_of
from isdaa.report.figures import figures_of
from isdaa.report.words import keep_lines, number


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """Pictures take seconds each; tests of text do without them, those marked `drawn` do not."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(page, "drawings_of", lambda figures, folder: {figure.name: "<svg></svg>" for figure in figures})


@pytest.fixture
def drawn():
    """Asks for real pictures."""


class Tables(HTMLParser):
    """Rows of the tables with an id or class, as texts of their cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.rows: list[list[str]] = []
        self.inside = False
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "table":
            names = dict(attrs)
            self.rows = self.tables.setdefault(names.get("id") or names["class"], [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def written(made: Study, folder) -> tuple[str, dict, list[dict]]:
    path = page.write_report(made, folder)
    assert path == folder / "report.html"
    rows = list(csv.DictReader((folder / "report.csv").open(encoding="utf-8")))
    return path.read_text(encoding="utf-8"), json.loads((folder / "report.json").read_text(encoding="utf-8")), rows


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def shown(value, digits=2) -> str:
    if value is None or value["mean"] is None:
        return "–"
    text = number(value["mean"], digits)
    if value["low"] is None:
        return f"{text} [–]" if value.get("seeds", 1) > 1 else text
    return f"{text} [{number(value['low'], digits)}, {number(value['high'], digits)}]"


def test_one_run_begins_with_its_verdict_and_the_checkpoint_to_keep(tmp_path):
    html, report, rows = written(study([trajectory(prompts=300)]), tmp_path / "new" / "folder")
    verdict, keep = report["runs"][0]["verdict"], report["runs"][0]["recommended"]
    assert verdict["finding"] == "over-optimised" and report["headline"] == verdict["sentence"] and report["tone"] == "over"
    body = html[html.index("<body>") :]
    assert body.index(keep["path"]) < body.index("<h2>") and verdict["sentence"].split(";")[0] in body
    assert [row["recommended"] for row in rows].count("True") == 1
    assert next(row for row in rows if row["recommended"] == "True")["path"] == keep["path"]
    assert list(rows[0]) == list(COLUMNS) and len(rows) == len(FALLS)
    first = report["runs"][0]["checkpoints"][0]
    assert float(rows[0]["kl"]) == first["kl"]["mean"] and float(rows[0]["win_rate"]) == first["win_rate"]["mean"]
    assert float(rows[0]["chosen_drift"]) == first["chosen_drift"]["mean"] and rows[0]["finding"] == "over-optimised"
    assert not list(tmp_path.rglob(".*"))


def test_numbers_on_the_page_are_those_of_the_data(tmp_path):
    html, report, rows = written(sweep(seeds=2), tmp_path)
    tables = Tables(html).tables
    for row, cell in zip(tables["cells"][1:], report["cells"], strict=True):
        expected = [cell["label"], *(shown(cell[key]) for key in ("best", "final", "final_kl", "fall"))]
        assert [squeezed(text) for text in row[:5]] == expected
        assert row[5] == "".join(str(seed["seed"]) for seed in cell["seeds"])
    for row, cell in zip(tables["laws"][1:], report["cells"], strict=True):
        assert squeezed(row[1]) == number(cell["law"]["a"], 3) and squeezed(row[5]) == number(cell["law"]["past_peak"])
    for row, entry in zip(tables["end"][1:], report["comparison"]["end"], strict=True):
        assert [squeezed(t) for t in row[2:]] == [shown(entry[key]) for key in ("final", "best", "final_kl", "fall")]
    found = [row for row in tables["checkpoints"] if row[0] != "Checkpoint"]
    order = [
        row for cell in report["cells"] for run in report["runs"] if run["cell"] == cell["cell"] for row in run["checkpoints"]
    ]
    assert len(found) == len(order) == len(rows)
    for row, entry in zip(found, order, strict=True):
        assert [squeezed(t) for t in row[3:6]] == [shown(entry[key]) for key in ("kl", "win_rate", "reward")]
        assert squeezed(row[6]) == shown(entry["length"], 1)
        assert squeezed(row[9]) == shown(entry["accuracy"]) and squeezed(row[11]) == shown(entry["rejected_drift"], 1)


def test_a_sweep_says_who_fell_and_who_ends_highest(tmp_path):
    html, report, _ = written(sweep(seeds=4, prompts=300), tmp_path)
    finals = [cell["final"]["mean"] for cell in report["cells"]]
    assert finals == sorted(finals, reverse=True)
    assert "over-optimised on 4 of 4 seeds" in report["headline"]
    best = report["cells"][0]
    assert f"is_dpo (β = {best['beta']:g}) ends highest, with a win rate of {finals[0]:.2f}" in report["headline"]
    assert len(report["cells"]) == 4 and all(len(cell["seeds"]) == 4 for cell in report["cells"])
    assert report["comparison"]["end"] and report["comparison"]["matched_kl"]
    assert html.count('class="chip over-optimised"') > 8


def test_two_seeds_have_no_interval_and_the_page_says_why(tmp_path):
    for seeds, told in ((2, True), (3, False)):
        html, report, _ = written(sweep(seeds=seeds), tmp_path / str(seeds))
        assert ("[–]: too few seeds for an interval" in html) is told and ("[–]</span>" in html) is told
        assert all((cell["final"]["low"] is None) is told for cell in report["cells"])
        assert ("interval" in report["headline"]) is not told
    # The run alone has its own, over prompts.
    html, report, _ = written(sweep(seeds=1), tmp_path / "1")
    assert "[–]" not in html and all(cell["final"]["low"] is not None for cell in report["cells"])


@pytest.mark.parametrize("there", [True, False])
def test_the_folder_to_keep_stands_in_a_line_with_the_upload(tmp_path, there):
    """Of one run, the best cell's, or another cell's that was higher, as the sentence says; none where none is better."""
    home = tmp_path / "my runs"
    one = study([trajectory(prompts=300, folder=str(home))])
    runs = [
        trajectory(method, 0.01, seed, curve=curve, prompts=300, folder=str(home))
        for seed in (1, 2)
        for method, curve in (("dpo", [0.85, 0.7, 0.6, 0.5]), ("is_dpo", [0.6, 0.62, 0.62, 0.62]))
    ]
    for number_, (case, whose) in enumerate(
        ((one, "dpo-0.01-1"), (study(runs), "dpo-0.01-"), (study(runs[1::2]), "is_dpo-0.01-"))
    ):
        _, report, _ = written(case, tmp_path / f"page-{number_}")
        folder = Path(report["keep"]["path"])
        assert folder.is_relative_to(home) and folder.parts[len(home.parts)].startswith(whose)
        assert folder.name == f"checkpoint-{report['keep']['step']}"
        if len(report["runs"]) > 1:
            assert f"step {report['keep']['step']} of" in report["headline"] or "keep its" in report["headline"]
        if there:
            folder.mkdir(parents=True, exist_ok=True)
        lines = [f"keep: {folder}"] + [f"upload: hf upload OWNER/NAME '{folder}'"] * there
        assert keep_lines(report) == lines
    for none in ([trajectory(curve=FLAT, prompts=120)], [trajectory("dpo", b, 1, curve=FLAT, prompts=120) for b in (0.01, 0.1)]):
        _, report, _ = written(study(none), tmp_path / "none" / str(len(none)))
        assert report["keep"] is None and keep_lines(report) == []
    _, report, _ = written(study([trajectory(scored=False)]), tmp_path / "unscored")
    assert report["keep"] is None and keep_lines(report) == []


def test_commas_of_a_cell_are_not_those_of_a_list(tmp_path):
    runs = [trajectory("chi_po", beta, 1, curve=[0.8, 0.81, 0.8, 0.81], prompts=400) for beta in (0.01, 0.05)]
    runs += [trajectory("dpo", beta, 1, curve=FLAT[:4], prompts=400) for beta in (0.05, 0.1)]
    _, report, _ = written(study(runs), tmp_path)
    assert "; no checkpoint of dpo (β = 0.05) and dpo (β = 0.1) is shown to be better" in report["headline"]
    assert ", β" not in report["headline"] and {cell["label"] for cell in report["cells"]} >= {"dpo, β = 0.1"}


def test_without_a_scorer_there_is_no_verdict(tmp_path):
    html, report, rows = written(study([trajectory(scored=False)]), tmp_path)
    assert report["headline"].startswith("No verdict") and "without a scorer" in html
    assert report["runs"][0]["verdict"] is None and report["runs"][0]["recommended"] is None
    assert rows[0]["win_rate"] == "" and rows[0]["kl"] and rows[0]["accuracy"]
    names = {chart["name"] for chart in report["charts"]}
    assert {"training", "held-out", "texts"} <= names and not any(name.startswith(("win-rate", "final")) for name in names)


def test_models_that_nobody_knows_and_few_checkpoints(tmp_path):
    run = trajectory(None, None, None, name="checkpoints", curve=(0.6, 0.7), held_out=False)
    html, report, rows = written(study([run]), tmp_path)
    assert report["headline"].startswith("No verdict: it needs at least three checkpoints")
    assert rows[0]["step"] == rows[0]["method"] == rows[0]["seed"] == ""
    assert not re.search(
        r"Held-out pairs|Weights of the training|Seeds|Chat template|fitted law|Peak|–<", html[html.index("<h2>") :]
    )
    assert "Scorer" in html and "none" not in html[html.index("<dl>") : html.index("Evaluation settings")]
    assert report["cells"][0]["law"] is None


def test_bare_arrays_are_enough():
    run = trajectory()
    bare = type(run)(**{**vars(run), "metrics": ()})
    report = report_of(find(Study([bare], study([run]).metrics, "bare", study([run]).folder)))
    assert report["runs"][0]["checkpoints"][0]["kl"]["mean"] == pytest.approx(run.kl[0].mean())


def test_what_a_model_wrote_stays_text(tmp_path, drawn):
    """End to end: records on disk, read, drawn and written."""
    run = write_evaluation(tmp_path)
    html, report, _ = written(read_study(run), tmp_path / "report")
    tags = Tables(html).tags
    assert "script" not in tags and "iframe" not in tags and "img" not in tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "says" in html
    block = report["samples"][0]
    assert SCRIPT in block["prompts"][0]["responses"][0]["text"]
    assert block["columns"][0]["role"] == "Reference"
    assert [p["id"] for p in block["prompts"][:3]] == ["p0", "p1", "p2"] and block["prompts"][3]["why"].startswith("largest fall")
    score = block["prompts"][0]["responses"][1]["score"]
    assert f"score {number(score)}" in html
    assert "default-src 'none'" in html and not re.search(r'(?:src|href)="(?:https?:)?//', html)
    assert len(re.findall(r"\bid=\"[^\"]+\"", html)) == len(set(re.findall(r"\bid=\"[^\"]+\"", html)))
    for chart in report["charts"]:
        png, svg = (tmp_path / "report" / name for name in chart["files"])
        assert png.read_bytes().startswith(b"\x89PNG") and svg.read_text(encoding="utf-8").startswith("<svg")


def test_a_title_and_a_label_are_text_too(tmp_path):
    made = study([trajectory(name=f"<img src=x onerror=1>{SCRIPT}", labels=[SCRIPT] * 8)], title=SCRIPT)
    html, _, _ = written(made, tmp_path)
    assert "script" not in Tables(html).tags and "img" not in Tables(html).tags


def test_many_methods_share_panels_and_colours_by_family():
    lines = lines_of(sweep(("dpo", "is_dpo", "ipo", "is_ipo", "slic", "is_slic", "rpo", "is_rpo", "wpo"), (0.01, 0.1), 1))
    panels = panels_of(lines)
    assert max(len(panel.lines) for panel in panels) <= 6 and sum(len(panel.lines) for panel in panels) == 18
    by_label = {line.label: line.colour for line in lines}
    assert by_label["dpo"] == by_label["ipo"] == PALETTE[0] and by_label["is_dpo"] == by_label["is_rpo"] == PALETTE[1]
    assert panels[0].title == "dpo, β = 0.01"


def test_cells_of_one_method_are_told_apart_by_their_settings():
    runs = [
        trajectory("is_dpo", 0.01, 1, cell=f"c{clip}", settings={"objective.method": "is_dpo", "objective.clip_eps": clip})
        for clip in (0.5, 1.0)
    ]
    assert [line.label for line in lines_of(study(runs))] == ["is_dpo, ε 0.5", "is_dpo, ε 1"]


def test_a_label_says_all_that_a_cell_changes():
    made = cells(
        {"method": "ipo", "beta": 0.01},
        {"method": "is_ipo", "beta": 0.01, "implicit_reward": "chi_squared"},
        {"method": "is_dpo", "beta": 0.1, "weight": "shuffled", "optimizer": "sgd", "learning_rate": 0.43, "normalize": "batch"},
        {"method": "dpo", "beta": 0.1, "limit": 2000, "epochs": 8, "save_steps": 83},
        {"method": "is_dpo", "beta": 0.1, "length_normalized": True, "clip_eps": None},
        seeds=(1,),
    )
    assert [line.label for line in lines_of(made)] == [
        "ipo",
        "is_ipo, chi_squared",
        "is_dpo, weights shuffled, sgd, lr 0.43, normalize batch",
        "dpo, limit 2000, 8 epochs",
        "is_dpo, length_normalized on, ε none",
    ]
    shared = cells({"method": "dpo", "optimizer": "sgd"}, {"method": "ipo", "optimizer": "sgd"}, seeds=(1,))
    assert [line.label for line in lines_of(shared)] == ["dpo", "ipo"]


def test_lines_of_one_panel_differ_in_colour():
    methods = ["dpo", "ipo", "slic", "rpo", "wpo"]
    made = cells(*({"method": m} for m in methods), *({"method": "is_dpo", "clip_eps": e} for e in (0.1, 0.2, 0.3, 0.4, 0.5)))
    apart = replace(made, cells=[cell | {"grids": [f"grid {i // 5}"]} for i, cell in enumerate(made.cells)])
    found = find(apart)
    for start in (0, 5):
        assert len({line.colour for line in found.lines[start : start + 5]}) == 5


def test_another_confidence_is_said_and_used(tmp_path):
    made = sweep(("dpo", "is_dpo"), (0.01,), 3)
    other = replace(made, metrics=made.metrics | {"settings": made.metrics["settings"] | {"confidence": 0.5}})
    reports = [written(study, tmp_path / name)[1] for name, study in (("wide", made), ("narrow", other))]
    for row in ("final", "best", "final_kl", "fall"):
        (wide,), (narrow,) = ([end[row] for end in report["comparison"]["end"]] for report in reports)
        assert narrow["high"] - narrow["low"] < 0.5 * (wide["high"] - wide["low"])
    wide, narrow = (report["cells"][1]["below_best"] for report in reports)
    assert narrow["high"] - narrow["low"] < 0.5 * (wide["high"] - wide["low"])
    assert "(50 % interval" in reports[1]["headline"] and "(95 % interval" in reports[0]["headline"]
    captions = {figure.name: figure.caption for figure in figures_of(find(other))}
    assert "their 50 % t-intervals" in captions["final"] and "their 50 % t-intervals" in captions["matched-kl"]


@pytest.mark.parametrize("clip, limit", [("joint", 1.0), ("per_response", None)])
def test_only_a_joint_clip_has_one_limit(tmp_path, clip, limit):
    run = write_evaluation(tmp_path)
    values = {"objective.weight": "importance", "objective.clip_eps": 0.5, "objective.clip": clip}
    (run / "run.json").write_text(json.dumps({"stages": {"align": {"values": values}}}), encoding="utf-8")
    logged = {f"weights/log_weight_p{q:02d}": -0.01 * q for q in (5, 25, 50, 75, 95)}
    (run / "metrics.jsonl").write_text(json.dumps({"step": 5, "weights/mean": 0.5} | logged) + "\n", encoding="utf-8")
    figure = next(figure for figure in figures_of(find(read_study(run))) if figure.name == "log-weights")
    rules = [layer for layer in figure.draw(600).to_dict()["layer"] if layer["mark"]["type"] == "rule"]
    assert [layer["data"]["values"][0]["y"] for layer in rules] == ([limit] if limit else [])
    assert ("Dashed" in figure.caption) == bool(limit)


def test_runs_of_no_sweep_are_grouped_by_method_and_beta():
    runs = [trajectory("dpo", 0.01, 1), trajectory("dpo", 0.01, 2), trajectory("dpo", 0.1, 1), trajectory("dpo", 0.01, 2)]
    assert [len(line.runs) for line in lines_of(study(runs))] == [2, 1, 1]


def test_a_run_that_was_moved_keeps_its_log(tmp_path):
    run = write_evaluation(tmp_path)
    (tmp_path / "later").mkdir()
    moved = run.rename(tmp_path / "later" / "dpo")
    line = {"step": 5, "weights/mean": 0.5, "weights/ess": 0.4, "weights/clip_fraction": 0.1}
    (moved / "metrics.jsonl").write_text(json.dumps(line) + "\n" + '{"half a li', encoding="utf-8")
    (moved / "run.json").write_text(json.dumps({"stages": {"align": {"values": {"objective.beta": 0.01}}}}), encoding="utf-8")
    html, report, _ = written(read_study(moved), tmp_path / "report")
    assert next(iter(report["weights"].values()))["mean"] == [0.5] and report["training"]["shared"] == {"objective.beta": 0.01}
    assert "Weights after the clip" in html


def test_a_close_second_is_called_one(tmp_path):
    made = sweep(("is_dpo", "is_ipo"), (0.01,), 3)
    _, report, _ = written(made, tmp_path)
    assert "below_best" in report["cells"][1]
    gap = report["cells"][1]["below_best"]
    assert ("1 other cannot be told from it" in report["headline"]) == (gap["low"] <= 0)


def test_errors_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no run to report on"):
        page.write_report(Study([], {"scorer": None}, "none", tmp_path), tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        page.write_report(study([trajectory()]), tmp_path / "file")


@pytest.mark.parametrize("value, text", [(None, "–"), (-0.001, "0.00"), (-0.25, "−0.25"), (3, "3.00")])
def test_numbers_for_people(value, text):
    assert number(value) == text


def test_a_report_of_hostile_runs(tmp_path, drawn):
    names = [NAME, "=cmd()"]
    runs = [
        trajectory("dpo", 0.1, seed, cell=name, settings={"data.pairs": name}, name=f"{name}/seed-{seed}")
        for name in names
        for seed in (1, 2)
    ]
    cells = [{"name": name, "grids": ["main"], "settings": {"data.pairs": name}} for name in names]
    text = page.write_report(study(runs, NAME, cells=cells), tmp_path / "report").read_text(encoding="utf-8")
    harmless(text)
    assert "<script" not in text and ESCAPED.replace("<script>", "&lt;script&gt;") in text
    for drawing in (tmp_path / "report" / "charts").glob("*.svg"):
        drawn_text = drawing.read_text(encoding="utf-8")
        harmless(drawn_text, drawing)
        assert "<script" not in drawn_text
    with open(tmp_path / "report" / "report.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["cell"] for row in rows} == {NAME, "'=cmd()"}
    assert any(float(row["chosen_drift"]) < 0 for row in rows)


FLAT = (0.50, 0.49, 0.50, 0.48, 0.50, 0.49, 0.50, 0.49)


def test_a_conversation_is_shown_as_one(tmp_path):
    """Roles and words, the tools on offer and the calls made; what a model or a user wrote stays text."""
    run = write_evaluation(tmp_path)
    samples = run / "evaluation" / "samples.jsonl"
    call = {"function": {"name": "weather", "arguments": {"city": SCRIPT}}}
    asked = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": f"Rain? {SCRIPT}"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "dry"},
    ]
    tools = [{"function": {"name": "weather", "description": "Of a city"}}]
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    rows = [row | {"prompt": asked, "tools": tools} if "prompt" in row else row for row in rows]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    html, report, _ = written(read_study(run), tmp_path / "report")
    assert report["samples"][0]["prompts"][0]["prompt"] == asked and "script" not in Tables(html).tags
    shown_text = html[html.index("Samples side by side") :]
    for role, words in (("tools", "weather: Of a city"), ("system", "Be short."), ("user", "Rain? &lt;script"), ("tool", "dry")):
        assert f'<span class="role">{role}</span><div class="text">{words}' in shown_text
    assert '<span class="role">assistant</span><div class="text">call weather({&#34;city&#34;: &#34;&lt;script' in shown_text
    for sign in ("[{", "{&#39;", "&#39;role&#39;", "None"):
        assert sign not in shown_text.partition("Every checkpoint")[0]


def test_where_none_is_better_nothing_is_recommended(tmp_path):
    html, report, rows = written(study([trajectory(curve=FLAT, prompts=120)]), tmp_path)
    run = report["runs"][0]
    assert report["tone"] != "not"  # a run that gained nothing is no good news
    assert run["better"] is False and run["recommended"] == {"label": "the reference", "path": "models/sft", "step": 0}
    assert "No checkpoint is shown to be better than the reference" in report["headline"]
    assert "No checkpoint to keep. The reference: <code>models/sft</code>" in html and "Checkpoint to keep:" not in html
    assert not any(row["recommended"] == "True" for row in rows) and "Bold:" not in html and 'class="kept"' not in html
    (figure,) = [figure for figure in figures_of(find(study([trajectory(curve=FLAT, prompts=120)]))) if figure.section == "win"]
    assert "diamond" not in figure.caption and '"diamond"' not in json.dumps(figure.draw(600).to_dict())


def test_of_several_runs_the_sentence_says_which_are_not_better(tmp_path):
    runs = [trajectory(None, None, None, name=name, curve=curve, prompts=300) for name, curve in (("up", RISES), ("flat", FLAT))]
    _, report, _ = written(study(runs), tmp_path / "one")
    assert report["headline"].endswith("; no checkpoint of flat is shown to be better than the reference (95 %).")
    assert "up ends highest" in report["headline"] and "keep its up" not in report["headline"]
    flat = [trajectory("dpo", beta, 1, curve=FLAT, prompts=120) for beta in (0.01, 0.1)]
    _, report, _ = written(study(flat), tmp_path / "none")
    assert report["headline"].endswith("no checkpoint is shown to be better than the reference (95 %): keep the reference.")
    assert report["headline"].count("no checkpoint") == 1 and [run["better"] for run in report["runs"]] == [False, False]
    few = study([trajectory(curve=FLAT[:2], prompts=120)])
    assert report_of(find(few))["headline"].endswith("No checkpoint is shown to be better than the reference (95 %).")


def test_the_checkpoint_to_keep_is_the_best_of_all_runs(tmp_path):
    """One method fell from 0.85, another stayed at 0.62 and so ends higher: its checkpoint was recommended."""
    runs = [
        trajectory(method, 0.01, 1, curve=curve, prompts=300)
        for method, curve in (("dpo", [0.85, 0.7, 0.6, 0.5]), ("is_dpo", [0.6, 0.62, 0.62, 0.62]))
    ]
    _, report, _ = written(study(runs), tmp_path)
    assert "is_dpo (β = 0.01) ends highest" in report["headline"]
    assert "but the best of all is step 40 of dpo (β = 0.01), with 0.8" in report["headline"]


def test_a_run_that_ends_worse_is_named(tmp_path):
    runs = [
        trajectory(method, 0.01, 1, curve=curve, prompts=300)
        for method, curve in (("dpo", [0.85, 0.7, 0.6, 0.5]), ("ipo", [0.8, 0.65, 0.8, 0.65, 0.8, 0.65]))
    ]
    html, report, rows = written(study(runs), tmp_path / "both")
    assert [run["verdict"]["finding"] for run in report["runs"]] == ["over-optimised", "worse"]
    down = f"(win rate against the reference down {number(report['runs'][0]['verdict']['fall'])})"
    assert f"dpo (β = 0.01) over-optimised {down}, ipo (β = 0.01) is worse at the end; " in report["headline"]
    assert 'class="chip worse"' in html and {row["finding"] for row in rows} == {"over-optimised", "worse"}
    _, report, _ = written(study(runs[1:]), tmp_path / "one")
    assert (
        report["headline"].startswith("Worse at the end: the win rate against the reference fell from 0.8")
        and report["tone"] == "over"
    )
    two = [runs[1], trajectory("ipo", 0.1, 1, curve=[0.8, 0.65, 0.8, 0.65, 0.8, 0.65], prompts=300)]
    _, report, _ = written(study(two), tmp_path / "two")
    assert report["headline"].startswith("No run is shown to have over-optimised (2 of 2 worse at the end);")


def test_a_law_without_a_peak_among_the_checkpoints_is_not_drawn_and_it_says_why(tmp_path):
    made = study([trajectory("is_dpo", prompts=300)])
    html, report, _ = written(made, tmp_path)
    law = report["cells"][0]["law"]
    assert law["doubt"] and law["peak"] is law["peak_low"] is law["height"] is law["past_peak"] is None and law["a"] is not None
    (figure,) = [figure for figure in figures_of(find(made)) if figure.section == "win"]
    assert f"not drawn, and no peak named: {law['doubt']}" in figure.caption and "triangle" not in figure.caption
    dashes = [layer["mark"] for layer in figure.draw(600).to_dict()["layer"] if "strokeDash" in layer["mark"]]
    assert [mark["type"] for mark in dashes] == ["rule"]  # the reference's own win rate
    (head, row) = Tables(html).tables["laws"]
    assert row[head.index("Why no peak is named")] == law["doubt"] and "d*, its 95 % interval" not in head and "–" not in row
    falling = figures_of(find(study([trajectory(prompts=300)])))[0]
    assert "the triangle at the foot marks its peak" in falling.caption and "not drawn" not in falling.caption
    both = figures_of(find(sweep(("dpo", "is_dpo"), (0.01,), 1, prompts=300)))[0]
    assert "No law is drawn and no peak named for is_dpo" in both.caption and "triangle" in both.caption


def test_cut_responses_are_warned_of_beside_every_win_rate(tmp_path):
    runs = [trajectory(prompts=120), trajectory("is_dpo", prompts=120)]
    for entry in runs[1].metrics:
        entry["truncated"] = 0.6
    html, report, _ = written(study(runs), tmp_path)
    (line,) = report["warnings"]
    assert line.startswith(
        "evaluation.max_new_tokens (32) cut 0 to 60 % of the checkpoints' responses and 1 % of the reference's"
    )
    assert (
        line.replace("'", "&#39;") in re.sub("</?code>", "", html[: html.index("<h2>")])
        and "--evaluation.max_new_tokens 64" in line
    )
    assert html.count('title="of fragments">!') == len(runs[1].metrics)
    captions = {figure.name: figure.caption for figure in figures_of(find(study(runs)))}
    for name in ("win-rate-kl", "final", "training"):
        assert "These win rates are of fragments" in captions[name]
    clean = study([trajectory(prompts=120)])
    assert report_of(find(clean))["warnings"] == [] and "fragments" not in figures_of(find(clean))[0].caption
