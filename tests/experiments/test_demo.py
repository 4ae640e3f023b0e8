"""The embedded experiment by its own command: small and fast, and whole, as `make demo` runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from isdaa.cli import main
from isdaa.evaluation.checkpoints.trajectory import read_study
from isdaa.experiments.demo import merged

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "mini" / "demo.yaml"
SMALL = {"data.limit": 60, "sft.max_steps": 3, "align.max_steps": 3, "align.save_steps": 1, "evaluation.prompts": 12}


def options(**values: object) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def test_a_small_demo_ends_with_the_report_and_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    command = ["demo", "--config", str(CONFIG), "--output_dir", str(folder), *options(**SMALL)]
    assert main(command) == 0
    first = capsys.readouterr().out
    verdicts = json.loads((folder / "report/report.json").read_text())["runs"]
    for word in ("dpo/1", "is_dpo/1", "KL (nats)", "win rate", "weight", "ESS", f"report:  {folder / 'report' / 'report.html'}"):
        assert word in first
    words = " ".join(first.split())
    for run in verdicts:
        assert run["verdict"]["sentence"] in words
    assert set(merged(read_study(folder))["better"]) == {run["cell"] for run in verdicts}, "not the first run's own name"
    assert [run.steps.tolist() for run in read_study(folder).runs] == [[1, 2, 3], [1, 2, 3]]

    made = {path: path.stat().st_mtime_ns for path in folder.glob("**/result.json")}
    assert len(made) == 3  # the shared world and two runs
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("**/result.json")} == made
    assert capsys.readouterr().out.splitlines()[:-1] == first.splitlines()[:-1]  # the last line says how long it took


def test_an_unknown_method_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--config", str(CONFIG), "--output_dir", str(tmp_path / "d"), "--methods", "dpoo"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_theory_by_its_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "finite", "--output_dir", str(tmp_path)]) == 0
    assert {path.suffix for path in tmp_path.glob("finite.*")} == {".png", ".svg", ".json"}
    assert capfd.readouterr().out.strip()


@pytest.mark.slow
def test_the_whole_demo_shows_over_optimisation(tmp_path: Path) -> None:
    """One fixed seed, so no false alarms: DPO falls from its peak, IS-DPO does not, and stays nearer to the reference."""
    command = [sys.executable, "-m", "isdaa.cli", "demo", "--config", str(CONFIG), "--output_dir", str(tmp_path / "demo")]
    subprocess.run(command, check=True, cwd=ROOT)
    runs = {run.method: run for run in read_study(tmp_path / "demo").runs}
    rates = {method: run.wins.mean(axis=1) for method, run in runs.items() if run.wins is not None}
    assert max(rates["dpo"]) - rates["dpo"][-1] > 0.08
    assert max(rates["is_dpo"]) - rates["is_dpo"][-1] < 0.03
    assert rates["is_dpo"][-1] - rates["dpo"][-1] > 0.10
    assert runs["dpo"].kl[-1].mean() > 3 * runs["is_dpo"].kl[-1].mean()
