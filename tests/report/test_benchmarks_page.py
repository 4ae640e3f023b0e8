"""A benchmark's page: what it says, and that nothing of it sticks out or runs in a real browser."""

import re
from pathlib import Path

import pytest
from browser import BROWSER, PROBE, dump

from isdaa.errors import UserError
from isdaa.evaluation.tax.scores import Answers, scores
from isdaa.files import write_json
from isdaa.foreign import read_object
from isdaa.report.benchmarks import write_benchmark_report

LONG = "a-model-with-a-very-long-name/that-nobody-would-have-chosen-by-hand"


def figure(mean: float, width: float = 0.1) -> dict:
    return {"mean": mean, "low": mean - width, "high": mean + width, "n": 40}


def write(folder: Path, share: bool = True, models: int = 2) -> Path:
    headline = "length_controlled_win_rate" if share else "score"
    names = ["first", LONG, *(f"model {i}" for i in range(2, models))][:models]
    entries = []
    for place, name in enumerate(names):
        value = 0.6 - 0.05 * place if share else 6.5 - place
        figures = {headline: figure(value)} | ({"win_rate": figure(value + 0.02)} if share else {"turn_1": figure(value)})
        figures |= {f"{'win_rate/' if share else 'category/'}{c}": figure(value, 0.2) for c in ("coding", "creative writing")}
        answers = {"mean_characters": 812.4, "truncated": 3, "turns": 40}
        entry = {"model": name, "answers": answers, "figures": figures, "counts": {"unparsed": 0}, "details": {}, "notes": []}
        entries.append(entry | {"digest": f"weights {place}"})
    counts = {"better": 20, "equal": 5, "worse": 15, "headline_difference": figure(0.05)}
    pairs = [{"first": "first", "second": name, "difference": figure(0.05), **counts} for name in names[1:]]
    control = {"of": 805, "recipe": "length_controlled_v1", "gamed": "g.csv", "interval": "by refits"}
    metrics = {
        "format": 2, "length_control": control if share else None,
        "title": "AlpacaEval 2", "sentence": "first <b>leads</b>.", "headline": headline, "confidence": 0.95, "resamples": 1000,
        "partial": False, "questions": {"source": "q.json", "project": False, "limit": None, "count": 40, "judged": 40},
        "opponent": "base" if share else None, "models": entries, "notes": ["a note on all models"],
        "judge": {"kind": "model", "name": "judge", "base_url": None, "templates": ["isdaa-1"]},
        "comparisons": pairs, "generation": None, "git_revision": None, "versions": {"isdaa": "0"},
    }  # fmt: skip
    write_json(folder / "metrics.json", metrics)
    told = {"game": "model first", "label": "A", "value": 1.0 if share else 7.0, "reply": "<script>document.title = 1</script>"}
    sides = [{"model": name, "turns": ["word " * 300], "value": 0.5, "verdicts": [told]} for name in names]
    asked = {"id": "1", "category": "coding", "asked": ["x" * 300], "opponent": None, "answers": sides}
    write_json(folder / "examples.json", [asked])
    return write_benchmark_report(folder)


def write_tax(folder: Path) -> None:
    """Tasks with items of 0 and 1, of the page's first two models and of a third that the page does not show."""

    def answered(gap: int) -> list[Answers]:
        found = []
        for task, count in (("a_task_with_a_very_long_name_of_its_own", 40), ("gsm8k", 30)):
            values = [float(i % 2 or i < gap) for i in range(count)]
            items = [{"task": task, "item": i, "doc": "", "values": {"acc,none": value}} for i, value in enumerate(values)]
            metric = {"value": 0.0, "by_item": True, "higher": True}
            results = {task: {"shots": 5, "of": count, "metrics": {"acc,none": metric}}}
            found.append(Answers(task, [{"results": results, "truncated": False}], items, True))
        return found

    options = {"bootstrap": 200, "confidence": 0.95, "seed": 0}
    models = [
        {"label": f"other {i}", "path": "", "digest": f"weights {i}", **scores(answered(gap), answered(0), **options)}
        for i, gap in ((0, 20), (1, 2), (7, 0))
    ]
    reference = {"path": "", "digest": "", **scores(answered(0), None, **options)}
    write_json(folder / "tax.json", {"statistics": options, "reference": reference, "models": models})
    (folder / "tax.jsonl").touch()


@pytest.mark.parametrize("place", [".", ".."])
def test_the_tax_of_the_pages_own_models_is_shown(place, tmp_path):
    (folder := tmp_path / "mt_bench").mkdir()
    write_tax(folder / place)
    page = write(folder).read_text()
    section = page[page.index("<h2>Alignment tax</h2>") : page.index("<h2>Answers to read</h2>")]
    assert "Alignment tax of first: +0.292" in section and "better on a_task_with_a_very_long_name_of_its_own, gsm8k." in section
    assert "+0.250 ± " in section and " *</td>" in section and "other" not in section  # of 40 items 10, and of the page's names
    assert section.count(" *</td>") == 3 and ">40</td>" in section  # the first model's; the other differs on one item a task
    assert section.count("<tr>") == 1 + 3 * 3 and (folder / "charts/tax.png").is_file()
    assert "two models differ on at least 6 items" in section
    (folder / place / "tax.json").unlink()
    assert "Alignment tax" not in write(folder).read_text()


@pytest.mark.parametrize("share", [True, False])
def test_the_page_says_what_the_metrics_say(share, tmp_path):
    page = write(tmp_path, share, models=3).read_text()
    assert "first &lt;b&gt;leads&lt;/b&gt;." in page and "<script" not in page
    assert ("60.0 %" if share else "6.50") in page and ("[50.0, 70.0]" if share else "[6.40, 6.60]") in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert ("Length-controlled win rate on 40 of 805" in page) == share == ("as the leaderboard’s, with g.csv" in page)
    assert "judged by judge, template isdaa-1." in page and "a note on all models." in page
    assert all((tmp_path / f"charts/{name}.{kind}").is_file() for name in ("models", "differences") for kind in ("png", "svg"))
    assert (tmp_path / "charts/categories.svg").is_file()


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.json of a benchmark there"):
        write_benchmark_report(tmp_path)


def test_an_older_isdaas_length_controlled_rate_is_refused_and_its_other_figures_are_not(tmp_path):
    for share in (True, False):
        write(tmp_path, share)
        metrics = read_object(tmp_path / "metrics.json")
        for name in ("length_control", "notes"):
            del metrics[name]
        del metrics["judge"]["templates"]
        write_json(tmp_path / "metrics.json", metrics | {"format": 1})
        if not share:
            assert write_benchmark_report(tmp_path).is_file()
            continue
        with pytest.raises(UserError, match=r"metrics\.json: its length-controlled win rate is from an older isdaa and not the"):
            write_benchmark_report(tmp_path)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_and_nothing_runs(width, tmp_path):
    write_tax(tmp_path)
    page = write(tmp_path, models=4)
    (probe := tmp_path / "probe.html").write_text(PROBE.format(width=width, page=page.as_uri()), encoding="utf-8")
    dom, console = dump(probe, tmp_path / "profile")
    found = re.search(r'data-found="([^"]*)"', dom)
    assert found is not None and console == ""
    scroll, client, title, drawings = found.group(1).split("|")
    assert int(scroll) <= int(client) and title == "AlpacaEval 2: benchmark report" and int(drawings) == 8
