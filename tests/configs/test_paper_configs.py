"""The paper-scale configurations: the very files, with other values, run from SFT to report on a CPU."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from chains import ALIGN, CHAIN, ROOT, chat_model, jsonl, read_lines
from paper_rows import chats, dialogues, posts, scorer
from tokenizers_for_tests import byte_level

from isdaa.cli.main import main, parse
from isdaa.config import load_config
from isdaa.experiments import sweep as sweeps
from isdaa.experiments.worker import Work

CONFIGS = ROOT / "configs"
PAPER = sorted(path for name in ("tldr", "instruct") for path in (CONFIGS / name).glob("*.yaml"))
EMBEDDED = [ROOT / "config.yaml", *sorted((CONFIGS / "mini").glob("*.yaml"))]
# What a run with given models and data on a GPU says beside that. The chains below run all of it.
BESIDE = {
    *("model.path", "model.dtype", "data.pairs", "data.eval_pairs", "data.eval_split", "data.evaluation_split"),
    *(f"{stage}.{key}" for stage in ("sft", "reward", "align") for key in ("precision", "gradient_checkpointing")),
    *(f"{stage}.{key}" for stage in ("sft", "reward", "align") for key in ("min_lr_ratio", "gradient_accumulation_steps")),
    *(f"reward.{key}" for key in ("epochs", "batch_size", "learning_rate", "lr_scheduler", "warmup_steps", "adam_epsilon")),
    *("evaluation.opponent", "keep", *(f"slurm.{key}" for key in ("gpus", "cpus", "memory_gb", "minutes"))),
}
SMALL = {"batch_size": 4, "gradient_accumulation_steps": 2, "warmup_steps": 1, "learning_rate": 1e-3}
EVALUATION = {"evaluation.prompts": 4, "evaluation.opponent_samples": 2, "evaluation.max_new_tokens": 6}
GRID = {"grids": {"methods": {"objective.method": ["dpo", "is_dpo"], "objective.beta": [0.05]}}, "seeds": [1]}


def keys_of(data: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys; a grid's keys are those of a run."""
    for key, value in data.items():
        if key == "grids":
            yield from (inner for grid in value.values() for inner in grid)
        elif isinstance(value, dict) and prefix + key not in ("model.random",):
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def keys_in(path: Path) -> set[str]:
    return set(keys_of(yaml.safe_load(path.read_text(encoding="utf-8"))))


def test_paper_scale_differs_from_the_embedded_world_in_values_alone() -> None:
    embedded = {*CHAIN, *ALIGN, *(key for path in EMBEDDED for key in keys_in(path))}
    paper = {key for path in PAPER for key in keys_in(path)}
    assert paper - embedded <= BESIDE
    assert paper >= BESIDE, f"not used any more: {sorted(BESIDE - paper)}"


@pytest.mark.parametrize("path", PAPER, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_the_published_settings(path: Path) -> None:
    """docs/method.md, 'The paper's settings'."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "grids" in data:
        assert data["grids"]["methods"]["objective.beta"] == [0.01, 0.05, 0.1] and data["seeds"] == [1, 2, 3]
        return
    config = load_config(path)
    long = path.parent.name == "instruct" and not path.name.startswith("hh")
    assert (config.tokenization.max_length, config.tokenization.max_prompt_length) == ((2048, 1024) if long else (640, 512))
    for stage in {"sft", "reward", "align"} & set(config.stages):
        settings = getattr(config, stage)
        assert settings.batch_size * settings.gradient_accumulation_steps == 128
        assert (settings.lr_scheduler, settings.min_lr_ratio, settings.warmup_steps) == ("cosine_with_min_lr", 0.1, 150)
        assert (settings.optimizer, settings.adam_epsilon, settings.weight_decay) == ("adamw", 1e-5, 0)
        assert (settings.epochs, settings.precision, config.model.dtype) == (1, "bfloat16", "float32")
        assert settings.learning_rate == {"sft": 1e-5, "align": 1e-6, "reward": 3e-6}[stage]
    if "align" in config.stages:
        assert config.align.save_steps is not None and config.align.save_steps * 128 in (12_800, 19_200)
        shown = config.evaluation
        assert (shown.prompts, shown.temperature, shown.top_p) == (512, 0.7, 0.95)
        assert shown.max_new_tokens == (512 if long else 128)


def documented() -> list[str]:
    """The `isdaa` commands of docs/reproduction.md."""
    page = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    lines = [line.strip() for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.startswith("isdaa ")]


@pytest.mark.parametrize("command", documented())
def test_the_commands_of_the_page_are_commands(command: str) -> None:
    arguments = parse(shlex.split(command)[1:])
    if arguments.command in ("train", "sweep"):
        assert ROOT / arguments.config in PAPER


def test_the_page_names_every_configuration() -> None:
    page = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    bases = {"ultrafeedback.yaml", "hh.yaml"}  # named by their sweeps
    assert all(f"configs/{path.parent.name}/{path.name}" in page for path in PAPER if path.name not in bases)


class Home:
    """A folder in which the shipped files run with other values; no key is added and none taken away."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def write(self, file: str, **values: Any) -> str:
        """A shipped file with other values, as text that YAML reads. `stage` stands for the small optimisation settings."""
        data = yaml.safe_load((CONFIGS / self.name / file).read_text(encoding="utf-8"))
        stage = values.pop("stage", None)
        small = {f"{stage}.{key}": value for key, value in SMALL.items()} if stage else {}
        for dotted, value in {**small, **values}.items():
            *sections, last = dotted.split(".")
            place = data
            for section in sections:
                place = place[section]
            assert last in place, f"{file}: {dotted} is not a key of it"
            place[last] = value
        path = self.folder / file
        path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
        return str(path)

    def train(self, file: str, **values: Any) -> None:
        assert main(["train", "--config", self.write(file, **values)]) == 0


class Inline:
    """The sweep's processes, one after the other in this one: new ones would only load the libraries again."""

    def __init__(self, threads: int | None) -> None:
        pass

    def __call__(self, work: Work) -> Inline:
        work()
        return self

    def running(self) -> bool:
        return False


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweeps, "LocalJobs", Inline)
    return tmp_path


def study_of(folder: Path, runs: list[str]) -> dict[str, Any]:
    """The sweep's record; every run has trained three checkpoints, been evaluated, and its last model is there."""
    content = json.loads((folder / "sweep.json").read_text())
    assert [run["name"] for run in content["runs"]] == runs
    for run in content["runs"]:
        metrics = json.loads((folder / run["evaluation"] / "metrics.json").read_text())
        assert [model["step"] for model in metrics["models"]] == [2, 4, 6]
        assert all(0 <= model["win_rate"]["mean"] <= 1 for model in metrics["models"])
        assert (folder / run["folder"] / "model" / "model.safetensors").is_file()
    return content


def test_the_tldr_study(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SFT, gold reward model, labels, the grid, both evaluations, the report: each file of configs/tldr in its turn."""
    place = Home(home, "tldr")
    chat_model(home / "llama", byte_level(bos=True), max_position_embeddings=1024)
    (home / "data").mkdir()
    for split, count, first in (("train", 44, 0), ("validation", 4, 50), ("test", 6, 60)):
        jsonl(home / "data" / f"{split}.jsonl", posts(count, first))
    given = {"model.path": "llama"}
    place.train("sft.yaml", **given, **{"data.sft": "tldr:data"}, stage="sft")
    place.train("gold.yaml", **given, **{"data.pairs": "tldr:data", "data.eval_pairs": "tldr:data"}, stage="reward")
    drawn = {"label.max_new_tokens": 6, "label.batch_size": 16}
    place.train("label.yaml", **{"data.prompts": "tldr:data"}, **drawn)
    labelled = read_lines(home / "runs/tldr/label/pairs/train.jsonl")
    assert len(labelled) == 44 and all(row["chosen_reward"] >= row["rejected_reward"] for row in labelled)
    assert all(row["prompt"].startswith("SUBREDDIT: r/cats") for row in labelled)
    assert any("behaviour_chosen_logps" in row for row in labelled)

    changes = {**EVALUATION, "data.evaluation": "tldr:data", "align.save_steps": 2, "data.eval_fraction": 0.05}
    place.write("align.yaml", **changes, stage="align")
    sweep = place.write("sweep.yaml", **GRID)
    assert main(["sweep", "--config", sweep]) == 0
    study = home / "runs/tldr/study"
    study_of(study, ["dpo-beta0.05/seed-1", "is_dpo-beta0.05/seed-1"])
    # `keep: best`: of a run's checkpoints only the recommended one and the last are left to measure again.
    run = study / "runs/dpo-beta0.05/seed-1"
    output = str(run / "evaluation-chosen")
    assert main(["evaluate", "--model_path", str(run), "--evaluation.opponent", "chosen", "--output", output]) == 0
    metrics = json.loads((run / "evaluation-chosen/metrics.json").read_text())
    assert metrics["settings"]["opponent"] == "chosen" and metrics["models"][-1]["step"] == 6
    capsys.readouterr()
    assert main(["report", str(study)]) == 0
    assert (study / "report/report.html").stat().st_size > 10_000


def test_instruction_following(home: Path) -> None:
    """UltraChat SFT with another tokenizer's chat template, then both preference sets, scored by a reward model for chat."""
    place = Home(home, "instruct")
    chat_model(home / "llama", byte_level(), max_position_embeddings=2048)
    byte_level("chatml").save_pretrained(home / "template")
    scorer(home / "scorer")
    for name, rows in (("chat", chats(50)), ("hh", dialogues(50))):
        (home / name).mkdir()
        jsonl(home / name / "train.jsonl", rows[:44])
        jsonl(home / name / "test.jsonl", rows[44:])
    start = {"model.path": "llama", "model.tokenizer": "template", "data.sft": "ultrachat:chat"}
    place.train("sft.yaml", **start, stage="sft")
    assert (home / "runs/instruct/sft/sft/chat_template.jinja").is_file()
    for name, source, methods in (
        ("ultrafeedback", "ultrafeedback:chat", ["dpo", "is_dpo"]),
        ("hh", "hh_chat:hh", ["dpo"]),  # the methods' own ways are those of the other set
    ):
        data = dict.fromkeys(("data.pairs", "data.eval_pairs", "data.evaluation"), source)
        changes = {**data, **EVALUATION, "evaluation.scorer": "scorer", "align.save_steps": 2}
        place.write(f"{name}.yaml", **changes, stage="align")
        grid = {"grids": {"methods": {"objective.method": methods, "objective.beta": [0.05]}}, "seeds": [1]}
        sweep = place.write(f"{name}-sweep.yaml", **grid)
        assert main(["sweep", "--config", sweep]) == 0
        study = home / "runs/instruct" / name
        study_of(study, [f"{method}-beta0.05/seed-1" for method in methods])
        (held, *_) = read_lines(study / "runs/dpo-beta0.05/seed-1/eval_pairs.jsonl")
        assert [message["role"] for message in (*held["prompt"], *held["chosen"])] == ["user", "assistant"]
        assert main(["report", str(study)]) == 0
