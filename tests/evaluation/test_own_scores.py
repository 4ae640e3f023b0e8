"""Scores of the user's own, from a file: the way that docs/evaluation.md tells, and every row that is wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation_helpers import TOKENIZATION, WordCount, moved, save, settings, tiny, world_rows

from isdaa.cli import main
from isdaa.errors import UserError
from isdaa.evaluation.checkpoints.own_scores import OwnScores
from isdaa.evaluation.evaluate import evaluate
from isdaa.foreign import read_json
from isdaa.world import make_posts

EXAMPLE = re.compile(r"```python\n(# score\.py.*?)```", re.DOTALL)
DOCS = Path(__file__).parents[2] / "docs" / "evaluation.md"
SMALL = [
    *("--evaluation.prompts", "8", "--evaluation.max_new_tokens", "6", "--evaluation.bootstrap", "100"),
    *("--tokenization.max_length", "128", "--tokenization.max_prompt_length", "96"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("own")
    found = {"reference": save(tiny(), folder / "reference")}
    for step in (10, 20, 30):
        found[str(step)] = save(moved(tiny(), step / 100), folder / "run" / f"checkpoint-{step}")
    return found


def draw(models: dict[str, str], out: Path, scorer: Any = None, opponents: int = 2, **more: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"all_opponents": True, "settings": settings(opponent_samples=opponents)} | more
    paths = [models[name] for name in ("10", "20", "30")]
    return evaluate(
        paths,
        reference=models["reference"],
        prompts=world_rows(),
        tokenization=TOKENIZATION,
        output_dir=out,
        scorer=scorer,
        **options,
    )


@pytest.fixture(scope="module")
def once_drawn(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drawn") / "evaluation"
    draw(models, out)
    return out


@pytest.fixture
def drawn(once_drawn: Path, tmp_path: Path) -> Path:
    """An evaluation without a scorer, two samples of the reference a prompt; a copy, for a score changes its plan."""
    return Path(shutil.copytree(once_drawn, tmp_path / "drawn"))


def rows_of(folder: Path, models: Callable[[dict[str, Any]], str]) -> list[dict[str, Any]]:
    """A row for every sample that is needed: its number of words. models: how the file names a model of the plan."""
    plan = read_json(folder / "plan.json")
    blocks = dict.fromkeys(plan["reference"]["opponents"], "reference") | {m["samples"]: models(m) for m in plan["models"]}
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [
        {"model": blocks[r["block"]], "prompt_id": r["prompt_id"], "sample": r["sample"], "score": len(r["text"].split())}
        for r in lines
        if r["block"] in blocks and "header" not in r
    ]


def written(file: Path, rows: list[dict[str, Any]]) -> OwnScores:
    if file.suffix == ".csv":
        text = "\n".join(",".join(map(str, row)) for row in [list(rows[0]), *(list(row.values()) for row in rows)]) + "\n"
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_text(text)
    return OwnScores(file)


@pytest.mark.parametrize("name", ["scores.jsonl", "scores.csv"])
def test_a_file_gives_what_the_same_scores_from_a_scorer_give(
    models: dict[str, str], drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    told = draw(models, tmp_path / "scorer", WordCount())
    monkeypatch.setattr("isdaa.evaluation.checkpoints.sample_and_kl.Models.get", lambda *_: pytest.fail("a model was loaded"))
    own = written(tmp_path / name, rows_of(drawn, lambda model: model["path"]))
    found = draw(models, drawn, own)
    for mine, theirs in zip(found["models"], told["models"], strict=True):
        assert mine["win_rate"] == theirs["win_rate"] and mine["reward"] == theirs["reward"]
    assert found["verdicts"] == told["verdicts"] and next(iter(found["verdicts"].values()))["finding"]
    assert found["scorer"]["kind"] == "scores" and found["scorer"]["options"] == ["--scores", str(tmp_path / name)]
    assert found["models"][0]["win_rate_chosen"] is None and found["settings"]["opponent_samples"] == 2


def test_labels_name_models_too_and_fewer_opponents_are_enough(models: dict[str, str], drawn: Path, tmp_path: Path) -> None:
    rows = [row for row in rows_of(drawn, lambda model: model["label"]) if row["sample"] == 0]
    found = draw(models, drawn, written(tmp_path / "s.jsonl", rows))
    assert found["settings"]["opponent_samples"] == 1 and found["models"][0]["win_rate"] is not None


def test_the_chosen_responses_may_be_scored_too(models: dict[str, str], drawn: Path, tmp_path: Path) -> None:
    rows = rows_of(drawn, lambda model: model["label"])
    rows += [{"model": "chosen", "prompt_id": row["id"], "sample": 0, "score": 3} for row in world_rows()]
    against = settings(opponent_samples=2, opponent="chosen")
    found = draw(models, drawn, written(tmp_path / "s.jsonl", rows), settings=against)
    assert found["models"][0]["win_rate"] == found["models"][0]["win_rate_chosen"] is not None
    with pytest.raises(UserError, match=r"no score of sample 0 of chosen for prompt"):
        draw(models, drawn, written(tmp_path / "less.jsonl", rows[:-8]), settings=against)


def change(**values: Any) -> Callable[[list[dict[str, Any]]], Any]:
    return lambda rows: rows[3].update(values)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda rows: rows.pop(3), r"no score of sample 0 of reference for prompt"),
        (lambda rows: rows.append(dict(rows[3])), r"s\.jsonl:41: a second score of sample 0 of reference .* see .*s\.jsonl:4$"),
        (change(model="checkpoint-99"), r"s\.jsonl:4: no model 'checkpoint-99' in this evaluation \(did you mean"),
        (change(prompt_id="what"), r"s\.jsonl:4: no prompt 'what'"),
        (change(sample=2), r"lacks samples of reference with these settings, 3 a prompt; .* --evaluation.opponent_samples 3"),
        (change(score=float("nan")), r"s\.jsonl"),
        (change(score="much"), r"s\.jsonl:4: score is 'much'; it must be a finite number"),
        (change(score=None), r"s\.jsonl:4: no value for score"),
        (change(score=True), r"s\.jsonl:4: score is True"),
        (change(sample="first"), r"s\.jsonl:4: sample is 'first'"),
        (lambda rows: rows[-1].update(sample=1), r"s\.jsonl:40: no sample 1 of .* for prompt"),
        (lambda rows: rows.__setitem__(slice(None), rows[16:]), r"no row has the model `reference`"),
    ],
)
def test_a_row_that_is_wrong_is_named(
    models: dict[str, str], drawn: Path, tmp_path: Path, edit: Callable[[list[dict[str, Any]]], Any], said: str
) -> None:
    rows = rows_of(drawn, lambda model: model["label"])
    edit(rows)
    with pytest.raises(UserError, match=said):
        draw(models, drawn, written(tmp_path / "s.jsonl", rows))


def test_without_samples_the_line_says_how_to_draw_them(models: dict[str, str], drawn: Path, tmp_path: Path) -> None:
    own = written(tmp_path / "s.jsonl", rows_of(drawn, lambda model: model["label"]))
    with pytest.raises(UserError, match=r"no evaluation here .* --scorer none in place of --scores"):
        draw(models, tmp_path / "new", own)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=r"lacks samples of reference with these settings"):
        draw(models, drawn, own, settings=settings(temperature=0.5))


def test_the_example_of_the_docs_scores_a_run(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three commands of the docs: draw, score with the example, report; a later call reads the page's records alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"id": p["id"], "prompt": p["prompt"]}) + "\n" for p in make_posts("small", 8, split="eval"))
    )
    steps = [models[name] for name in ("10", "20", "30")]
    common = ["--reference", models["reference"], "--data", "prompts.jsonl", *SMALL]
    evaluated = ["evaluate", "--model_path", *steps, *common, "--output", "evaluation"]
    assert main([*evaluated, "--scorer", "none", "--evaluation.opponent_samples", "2"]) == 0
    assert "--scores FILE" in " ".join(capsys.readouterr().out.split())
    assert len(read_json(tmp_path / "evaluation/plan.json")["reference"]["opponents"]) == 2
    example = EXAMPLE.search(DOCS.read_text(encoding="utf-8"))
    assert example is not None
    code = example[1].replace("runs/mine/evaluation", "evaluation")
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) <= 12
    exec(compile(code, "score.py", "exec"), {"my_score": lambda prompt, text: len(text.split()) + 0.001 * len(prompt)})
    assert main([*evaluated, "--scores", "scores.jsonl"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Win rate by scores.jsonl against the reference's samples" in told and "No scorer" not in told
    metrics = read_json(tmp_path / "evaluation/metrics.json")
    assert metrics["scorer"]["name"] == "scores.jsonl" and len(metrics["verdicts"]) == 1
    assert main([*evaluated, "--scores", "nowhere.jsonl"]) == 2
    assert "--scores nowhere.jsonl: no such file" in capsys.readouterr().err
    assert main([*evaluated, "--scores", "scores.jsonl", "--scorer", "gold"]) == 2
    assert "--scores and --scorer both say who judges" in capsys.readouterr().err


def test_a_second_file_goes_into_a_folder_of_its_own(
    models: dict[str, str], drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its samples are those of the evaluation whose records are shared."""
    rows = rows_of(drawn, lambda model: model["label"])
    first = draw(models, drawn, written(tmp_path / "a.jsonl", rows))
    monkeypatch.setattr("isdaa.evaluation.checkpoints.sample_and_kl.Models.get", lambda *_: pytest.fail("a model was loaded"))
    other = written(tmp_path / "b.jsonl", [row | {"score": -row["score"]} for row in rows])
    second = draw(models, tmp_path / "page/evaluation", other, shared=drawn)
    for one, two in zip(first["models"], second["models"], strict=True):
        assert one["win_rate"]["mean"] == pytest.approx(1 - two["win_rate"]["mean"])
    with pytest.raises(UserError, match="no evaluation here whose samples"):
        draw(models, tmp_path / "else", other, shared=tmp_path)


def test_a_second_file_on_the_command_line(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path(shutil.copytree(Path(models["10"]).parent, tmp_path / "run"))
    Path("prompts.jsonl").write_text(
        "".join(json.dumps({"id": p["id"], "prompt": p["prompt"]}) + "\n" for p in make_posts("small", 8, split="eval"))
    )
    steps = sorted(map(str, run.glob("checkpoint-*")))
    common = ["--model_path", *steps, "--reference", models["reference"], "--data", "prompts.jsonl", *SMALL]
    assert main(["evaluate", *common, "--scorer", "none"]) == 0
    rows = rows_of(run / "evaluation", lambda model: model["path"])
    for name in ("a", "b"):
        written(tmp_path / f"{name}.jsonl", rows)
    assert main(["evaluate", *common, "--scores", "a.jsonl"]) == 0
    assert main(["evaluate", *common, "--scores", "b.jsonl"]) == 2
    assert "name another folder" in " ".join(capsys.readouterr().err.split())
    assert main(["evaluate", *common, "--scores", "b.jsonl", "--output", "other"]) == 0
    page = ["report", "--checkpoints", *steps, *common[common.index("--reference") :], "--scores", "b.jsonl", "--output", "page"]
    assert main(page) == 0
    one, two = (read_json(tmp_path / folder / "metrics.json")["models"] for folder in ("other", "page/evaluation"))
    assert [model["win_rate"] for model in one] == [model["win_rate"] for model in two]


def test_models_with_the_same_weights_share_their_scores(models: dict[str, str], tmp_path: Path) -> None:
    twin = shutil.copytree(models["20"], tmp_path / "run" / "checkpoint-25")
    paths = {**models, "30": str(twin)}
    draw(paths, tmp_path / "out")
    rows = rows_of(tmp_path / "out", lambda model: model["path"])  # as the example of the docs: one name a block
    assert {row["model"] for row in rows} == {"reference", models["10"], str(twin)}
    found = draw(paths, tmp_path / "out", written(tmp_path / "s.jsonl", rows))
    assert found["models"][1]["win_rate"] == found["models"][2]["win_rate"] is not None
    both = [*rows, *({**row, "model": models["20"]} for row in rows if row["model"] == str(twin))]
    assert draw(paths, tmp_path / "out", written(tmp_path / "s.jsonl", both))["models"] == found["models"]
    both[-1]["score"] += 1
    with pytest.raises(
        UserError, match=r"s\.jsonl:\d+: sample 0 of .* is that of .*, a model with the same weights, and has another"
    ):
        draw(paths, tmp_path / "out", written(tmp_path / "s.jsonl", both))
    with pytest.raises(UserError, match="no score of sample 0 of"):
        draw(paths, tmp_path / "out", written(tmp_path / "s.jsonl", rows[:-1]))
