"""The embedded experiment by its own command: small and fast, and whole, as `make demo` runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from isdaa.cli import main
from isdaa.config import load_config
from isdaa.experiments.demo import method_config, shared_config
from isdaa.training import stages

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "mini" / "demo.yaml"
SMALL = {"data.limit": 60, "sft.max_steps": 3, "align.max_steps": 2, "align.save_steps": 1, "evaluation.prompts": 12}


def options(**values: object) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def test_a_small_demo_draws_and_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["demo", "--config", str(CONFIG), "--output_dir", str(tmp_path / "demo"), *options(**SMALL)]
    assert main(command) == 0
    first = capsys.readouterr().out
    for word in ("dpo/1", "is_dpo/1", "KL (nats)", "win rate", "weight", "ESS", "dpo: win rate", "is_dpo: win rate"):
        assert word in first
    chart = tmp_path / "demo" / "win_rate_against_kl.png"
    assert chart.read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((tmp_path / "demo/evaluation/metrics.json").read_text())
    assert [model["step"] for model in metrics["models"]] == [1, 2, 1, 2]

    def refuse(run: object) -> Path:
        raise AssertionError("a finished stage ran again")

    monkeypatch.setattr(stages, "STAGE_FUNCTIONS", dict.fromkeys(stages.STAGE_FUNCTIONS, refuse))
    assert main(command) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "win rate" in line] == [
        line for line in first.splitlines() if "win rate" in line
    ]


def test_every_method_starts_from_the_shared_model_and_pairs() -> None:
    config = load_config(CONFIG, {"output_dir": "runs/x", "objective.beta": 0.05})
    assert shared_config(config).stages == ["sft", "label"]
    for method in ("dpo", "is_dpo", "chi_po"):
        one = method_config(config, method)
        assert one.stages == ["align"] and one.output_dir == f"runs/x/{method}"
        assert one.objective.method == method and one.objective.arguments()["beta"] == 0.05
        assert (one.model.path, one.data.pairs) == ("runs/x/world/sft", "runs/x/world/pairs/train.jsonl")


def test_an_unknown_method_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--config", str(CONFIG), "--output_dir", str(tmp_path / "d"), "--methods", "dpoo"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_the_whole_demo_shows_over_optimisation(tmp_path: Path) -> None:
    """One fixed seed, so no false alarms: DPO falls from its peak, IS-DPO does not, and stays nearer to the reference."""
    command = [sys.executable, "-m", "isdaa.cli", "demo", "--config", str(CONFIG), "--output_dir", str(tmp_path / "demo")]
    subprocess.run(command, check=True, cwd=ROOT)
    models = json.loads((tmp_path / "demo/evaluation/metrics.json").read_text())["models"]
    rates = {m: [x["win_rate"]["mean"] for x in models if x["method"] == m] for m in ("dpo", "is_dpo")}
    kl = {m: [x["kl"]["mean"] for x in models if x["method"] == m][-1] for m in ("dpo", "is_dpo")}
    assert max(rates["dpo"]) - rates["dpo"][-1] > 0.08
    assert max(rates["is_dpo"]) - rates["is_dpo"][-1] < 0.03
    assert rates["is_dpo"][-1] - rates["dpo"][-1] > 0.10
    assert kl["dpo"] > 3 * kl["is_dpo"]
