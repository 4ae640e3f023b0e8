"""Checkpoints that diverged or are damaged, found before the first sample: left out with a word, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from evaluation_helpers import TOKENIZATION, TOKENIZER, moved, reward_model, save, settings, tiny, world_rows
from safetensors.torch import load_file, save_file

from isdaa.cli import main
from isdaa.errors import UserError
from isdaa.evaluation.checkpoints import sample_and_kl
from isdaa.evaluation.evaluate import evaluate
from isdaa.evaluation.records import read_metrics, read_plan
from isdaa.evaluation.table import print_table
from isdaa.files import write_jsonl
from isdaa.models.lora import add_lora
from isdaa.report.make import report_on

NAN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another program: checkpoint-10 to checkpoint-40 beside its reference."""
    folder = tmp_path_factory.mktemp("run")
    reference = tiny()
    save(reference, folder / "reference")
    for i in range(1, 5):
        save(moved(reference, 0.05 * i), folder / f"out/checkpoint-{i * 10}")
    return folder


@pytest.fixture
def run(healthy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(healthy, tmp_path / "run"))


@pytest.fixture
def no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever draws a sample has looked too late."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a sample was drawn")

    monkeypatch.setattr(sample_and_kl.Collection, "sample_model", never)


def break_weights(folder: Path, value: float = float("nan"), name: str = NAN, file: str = "model.safetensors") -> None:
    weights = load_file(folder / file)
    weights[name].view(-1)[0] = value
    save_file(weights, folder / file, metadata={"format": "pt"})


def evaluated(run: Path, numbers: tuple[int, ...] = (10, 20, 30, 40), **changes: object) -> dict:
    paths = [run / f"out/checkpoint-{n}" for n in numbers]
    options = {"scorer": "gold", "settings": settings(), "output_dir": run / "evaluation", "reference": run / "reference"}
    return evaluate(paths, prompts=world_rows(), tokenization=TOKENIZATION, **(options | changes))


def test_a_checkpoint_that_diverged_is_left_out_and_the_others_are_evaluated(run: Path, capsys) -> None:
    break_weights(run / "out/checkpoint-20")
    metrics = evaluated(run)
    assert [Path(model["path"]).name for model in metrics["models"]] == ["checkpoint-10", "checkpoint-30", "checkpoint-40"]
    (left,) = metrics["left_out"]
    assert (
        left["label"] == "checkpoint-20"
        and left["reason"] == f"weights are not finite ({NAN})"
        and left["after"].endswith("checkpoint-10")
    )
    assert (
        read_plan(run / "evaluation/plan.json")["left_out"] == read_metrics(run / "evaluation/metrics.json")["left_out"] == [left]
    )
    assert "ended" not in metrics and metrics["verdicts"]["checkpoints"]["finding"] != "diverged"
    said = capsys.readouterr().err
    assert f"{run}/out/checkpoint-20: left out: its weights are not finite ({NAN})" in said
    print_table(metrics)
    assert f"checkpoint-20 is left out: its weights are not finite ({NAN})." in capsys.readouterr().out


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_run_that_ended_so_has_no_verdict_on_its_end(run: Path, value: float, capsys) -> None:
    break_weights(run / "out/checkpoint-40", value)
    metrics = evaluated(run)
    assert metrics["ended"] == {"checkpoints": "checkpoint-40"}
    verdict = metrics["verdicts"]["checkpoints"]
    assert verdict["finding"] == "diverged"
    assert verdict["sentence"].startswith("No verdict: the run ended in weights that are not finite (checkpoint-40); of the")
    print_table(metrics)
    first = "The run ended in weights that are not finite (checkpoint-40)."
    assert capsys.readouterr().out.splitlines()[0] == first


def test_of_two_runs_the_one_that_ended_so_is_named(run: Path) -> None:
    for i in range(1, 4):
        shutil.copytree(run / f"out/checkpoint-{i * 10}", run / f"other/checkpoint-{i * 10}")
        break_weights(run / f"other/checkpoint-{i * 10}", name="model.norm.weight") if i > 1 else None
    paths = [run / f"{name}/checkpoint-{n}" for name in ("out", "other") for n in (10, 20, 30)]
    evaluate(
        paths, reference=run / "reference", scorer="gold", settings=settings(), output_dir=run / "evaluation",
        prompts=world_rows(), tokenization=TOKENIZATION,
    )  # fmt: skip
    metrics = read_metrics(run / "evaluation/metrics.json")
    assert metrics["ended"] == {"other": "other/checkpoint-30"} or metrics["ended"]["other"].endswith("other/checkpoint-30")
    assert len(metrics["left_out"]) == 2 and metrics["verdicts"]["out"]["finding"] != "diverged"


def options(run: Path) -> list[str]:
    rows = [{key: row[key] for key in ("id", "prompt", "facts")} for row in world_rows(6)]
    write_jsonl(run / "prompts.jsonl", rows)
    small = {"evaluation.max_new_tokens": "4", "evaluation.bootstrap": "100", "evaluation.opponent_samples": "1"}
    small |= {"tokenization.max_length": "128", "tokenization.max_prompt_length": "96"}
    named = ["--reference", str(run / "reference"), "--data", str(run / "prompts.jsonl"), "--scorer", "gold"]
    return [*named, *(word for key, value in small.items() for word in (f"--{key}", value))]


def test_report_and_evaluate_say_it_first_and_end_with_status_3(run: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(run)
    break_weights(run / "out/checkpoint-40")
    paths = [str(run / f"out/checkpoint-{n}") for n in (10, 20, 30, 40)]
    assert main(["report", "--checkpoints", *paths, *options(run), "--output", str(run / "page")]) == 3
    told = capsys.readouterr()
    report = json.loads((run / "page/report.json").read_text())
    assert report["headline"].startswith(
        "No verdict: the run ended in weights that are not finite (checkpoint-40); of the checkpoints before"
    )
    assert report["headline"] in told.out and report["ended"] == {"checkpoints": "checkpoint-40"}
    assert f"1 checkpoint was left out: checkpoint-40: weights are not finite ({NAN})" in told.err
    cell = report["cells"][0]
    assert cell["final"]["mean"] is None and cell["fall"]["mean"] is None and cell["best"]["mean"] is not None
    assert report["headline"] in (run / "page/report.html").read_text(encoding="utf-8")
    assert main(["evaluate", "--model_path", *paths, *options(run), "--output", str(run / "evaluation")]) == 3
    assert capsys.readouterr().out.startswith("The run ended in weights that are not finite (checkpoint-40).")


def test_two_runs_that_both_ended_so_are_reported_on(run: Path, monkeypatch) -> None:
    monkeypatch.chdir(run)
    for n in (10, 20, 30, 40):
        shutil.copytree(run / f"out/checkpoint-{n}", run / f"other/checkpoint-{n}")
    break_weights(run / "out/checkpoint-40"), break_weights(run / "other/checkpoint-40")
    paths = [str(run / f"{name}/checkpoint-{n}") for name in ("out", "other") for n in (10, 20, 30, 40)]
    assert main(["report", "--checkpoints", *paths, *options(run), "--output", str(run / "page")]) == 3
    report = json.loads((run / "page/report.json").read_text())
    assert "out ended in weights" in report["headline"] and "other ended in weights" in report["headline"]
    assert "ends highest" not in report["headline"] and "over-optimised" not in report["headline"].lower()


def test_an_evaluation_that_was_made_says_the_same_later(run: Path, no_sample: None, monkeypatch) -> None:
    monkeypatch.undo()
    shutil.copytree(run / "out", run / "checkpoints")
    break_weights(run / "checkpoints/checkpoint-30")
    overrides = {"reference": str(run / "reference"), "scorer": "gold", "data": None}
    write_jsonl(run / "prompts.jsonl", [{key: row[key] for key in ("id", "prompt", "facts")} for row in world_rows(6)])
    overrides |= {"data": str(run / "prompts.jsonl"), "evaluation.max_new_tokens": 4, "evaluation.bootstrap": 100}
    overrides |= {"tokenization.max_length": 128, "tokenization.max_prompt_length": 96}
    report_on([run], overrides)
    _, sentences = report_on([run])  # nothing is asked for: what lies there covers all four
    assert f"checkpoint-30 is left out: its weights are not finite ({NAN})." in " ".join(sentences)


def test_without_a_finite_reference_or_checkpoint_nothing_is_drawn(run: Path, no_sample: None) -> None:
    for n in (10, 20):
        break_weights(run / f"out/checkpoint-{n}")
    with pytest.raises(
        UserError, match=r"no checkpoint is left to evaluate: checkpoint-10, checkpoint-20: weights are not finite"
    ):
        evaluated(run, (10, 20))
    break_weights(run / "reference")
    with pytest.raises(UserError, match=r"reference: weights are not finite .*so it is no reference.*--reference"):
        evaluated(run)
    assert not (run / "evaluation").exists()


def test_a_scorer_that_is_not_finite_is_refused_before(run: Path, tmp_path: Path, no_sample: None) -> None:
    scorer = Path(reward_model(tmp_path / "reward"))
    break_weights(scorer, name="score.weight")
    with pytest.raises(UserError, match=r"scorer .*reward: its weights are not finite \(score.weight\)"):
        evaluated(run, scorer=str(scorer))


def test_a_damaged_checkpoint_is_refused_by_its_file(run: Path, no_sample: None) -> None:
    file = run / "out/checkpoint-40/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"checkpoint-40/model.safetensors: a damaged file of weights"):
        evaluated(run)


def shards(folder: Path) -> None:
    """The model's file as two, with an index."""
    weights = load_file(folder / "model.safetensors")
    names, half = sorted(weights), len(weights) // 2
    parts = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}
    for file, held in parts.items():
        save_file({name: weights[name] for name in held}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_shards_are_all_looked_at(run: Path, no_sample: None) -> None:
    folder = run / "out/checkpoint-20"
    shards(folder)
    last = folder / "model-00002-of-00002.safetensors"
    kept = last.read_bytes()
    last.unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors: is not there, but model.safetensors.index.json"):
        evaluated(run)
    last.write_bytes(kept[:-5])
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors: a damaged file"):
        evaluated(run)


def test_a_diverged_shard_and_a_diverged_file_of_torchs_are_found(run: Path) -> None:
    shards(run / "out/checkpoint-20")
    file = next(f for f in (run / "out/checkpoint-20").glob("model-*.safetensors") if NAN in load_file(f))
    break_weights(run / "out/checkpoint-20", file=file.name)
    folder = run / "out/checkpoint-30"
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"].view(-1)[5] = float("inf")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    metrics = evaluated(run)
    assert [left["label"] for left in metrics["left_out"]] == ["checkpoint-20", "checkpoint-30"]
    assert metrics["left_out"][1]["reason"] == "weights are not finite (lm_head.weight)"


def test_weights_that_are_missing_from_a_whole_file_are_refused_before(run: Path, no_sample: None) -> None:
    file = run / "out/checkpoint-40/model.safetensors"
    weights = load_file(file)
    del weights[NAN]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"checkpoint-40: 1 weights of LlamaForCausalLM are not in the folder"):
        evaluated(run)


def test_an_adapter_that_diverged_is_left_out(run: Path) -> None:
    for n in (50, 60):
        model = add_lora(tiny(), rank=2)
        model.base_model.peft_config = model.peft_config
        model.peft_config["default"].base_model_name_or_path = str(run / "reference")
        model.save_pretrained(run / f"out/checkpoint-{n}")
        TOKENIZER.save_pretrained(run / f"out/checkpoint-{n}")
    name = next(iter(load_file(run / "out/checkpoint-60/adapter_model.safetensors")))
    break_weights(run / "out/checkpoint-60", name=name, file="adapter_model.safetensors")
    metrics = evaluated(run, (40, 50, 60))
    assert [left["label"] for left in metrics["left_out"]] == ["checkpoint-60"]
    assert metrics["left_out"][0]["reason"] == f"weights are not finite ({name})"
    assert metrics["ended"] == {"checkpoints": "checkpoint-60"}
    assert len(metrics["models"]) == 2


def test_what_was_left_out_stays_so_beside_models_that_are_added(run: Path) -> None:
    break_weights(run / "out/checkpoint-20")
    evaluated(run, (10, 20, 30), keep=True)
    metrics = evaluated(run, (40,), keep=True)
    assert [left["label"] for left in metrics["left_out"]] == ["checkpoint-20"] and len(metrics["models"]) == 3
    shutil.copy(run / "out/checkpoint-10/model.safetensors", run / "out/checkpoint-20/model.safetensors")
    metrics = evaluated(run, (10, 20, 30, 40), keep=True)  # mended
    assert "left_out" not in metrics and len(metrics["models"]) == 4
