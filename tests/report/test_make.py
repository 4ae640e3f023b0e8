"""`isdaa report`, through the door that users take: a run, and models that isdaa did not train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chains import CHAIN, jsonl, refused, train

from isdaa.cli import main
from isdaa.world import make_posts


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "mine"
    assert train(folder, CHAIN) == 0
    return folder


def test_a_run_is_evaluated_and_reported_on(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(trained)]) == 0
    *_, sentence, place = (printed := capsys.readouterr().out.splitlines())
    page, report = trained / "report" / "report.html", json.loads((trained / "report/report.json").read_text())
    if keep := report["keep"]:
        sentence = printed[-4]
        assert printed[-3:-1] == [f"keep: {keep['path']}", f"upload: hf upload OWNER/NAME {keep['path']}"]
    assert place == f"report: {page}" and sentence in report["headline"]
    assert "<script" not in page.read_text(encoding="utf-8")
    metrics = json.loads((trained / "evaluation/metrics.json").read_text())
    assert metrics["verdicts"]["mine"]["sentence"] == sentence
    rows = (trained / "report/report.csv").read_text().splitlines()
    assert len(rows) == 1 + len(metrics["models"]) == 4


def test_checkpoints_that_isdaa_did_not_train(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bare model folders: no record beside them, so the options name reference, prompts and scorer."""
    names = []
    for index, folder in enumerate(sorted((trained / "checkpoints").glob("checkpoint-*"))):
        bare = tmp_path / f"theirs-{index}"
        bare.mkdir()
        for file in folder.iterdir():
            if file.suffix in (".safetensors", ".json", ".jinja") and not file.name.startswith(("isdaa", "trainer")):
                (bare / file.name).write_bytes(file.read_bytes())
        names.append(str(bare))
    prompts = jsonl(
        tmp_path / "prompts.jsonl", [{k: p[k] for k in ("id", "prompt", "facts")} for p in make_posts("small", 8, split="eval")]
    )
    options = ["--reference", str(trained / "sft"), "--data", str(prompts), "--scorer", "gold", "--output", str(tmp_path / "out")]
    small = ["--evaluation.max_new_tokens", "8", "--evaluation.bootstrap", "100", "--tokenization.max_length", "128"]
    small += ["--tokenization.max_prompt_length", "96"]
    monkeypatch.chdir(tmp_path)  # where records of models go that have no folder in common
    names.append(str(trained / "model"))  # of another run: a curve of its own, whatever the order
    assert main(["report", "--checkpoints", *names[::-1], *options, *small]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {run["name"]: len(run["checkpoints"]) for run in report["runs"]} == {"mine": 1, tmp_path.name: len(names) - 1}
    said = f"these models belong to 2 runs (mine, {tmp_path.name}), each with its own curve"
    assert report["notes"] == [said] and said in capsys.readouterr().out.splitlines()
    assert said in (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert (tmp_path / "out/report.html").is_file()
    assert "theirs-0" in json.dumps(report)


def test_what_is_missing_is_one_line(tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["report"], "--checkpoints")
    refused(capsys, ["report", str(tmp_path / "nowhere")], "nowhere: no such folder")
    refused(capsys, ["report", str(trained), "--checkpoints", "x"], "--checkpoints")
    refused(capsys, ["report", "--checkpoints", str(trained / "sft"), "--referense", "x"], "--reference")
