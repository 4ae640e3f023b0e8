"""The stages' script at toy size on a CPU: all cells, what a resume skips, and what memory, time and missing packages do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import ROOT
from patience import HANGS

from isdaa.config import load_config
from isdaa.experiments import sweep as sweeps
from isdaa.foreign import read_json
from isdaa.preview import plan
from isdaa.preview.devices import Speed

sys.path.insert(0, str(ROOT / "benchmarks"))
import _gpu_stages
import _gpu_stages_worker
import gpu_stages

pytestmark = pytest.mark.slow  # what measures, not what is measured; `make test-slow` runs it

TINY = ["--model", "tiny", "--device", "cpu"]


class Inline:
    """The sweep's processes, one after the other in this one."""

    def __init__(self, threads: int | None) -> None:
        pass

    def __call__(self, work: Any) -> Inline:
        work()
        return self

    def running(self) -> bool:
        return False


def inline(job: dict[str, Any], arguments: Any, began: float) -> dict[str, Any]:
    """A cell in this process."""
    job |= {"model": arguments.model, "device": arguments.device, "folder": str(arguments.folder.resolve())}
    arguments.folder.mkdir(parents=True, exist_ok=True)
    asked, answered = arguments.folder / "job.json", arguments.folder / "result.json"
    asked.write_text(json.dumps(job))
    _gpu_stages_worker.main(str(asked), str(answered))
    return read_json(answered)


def call(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    out = folder / "out.json"
    status = gpu_stages.main([*TINY, "--folder", str(folder / "work"), "--out", str(out), *options])
    return status, read_json(out) if out.exists() else {}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gpu_stages, "_process", inline)
        patched.setattr(sweeps, "LocalJobs", Inline)
        patched.setattr(plan, "measured_speed", lambda *given: Speed(1e9, 1e9, "given", False))  # it takes seconds a cell
        status, report = call(folder)
    assert status == 0
    return {"report": report, "table": (folder / "out.md").read_text(), "folder": folder}


def test_every_cell_says_what_it_is_for(everything: dict[str, Any]) -> None:
    cells = everything["report"]["cells"]
    assert list(cells) == [cell.name for cell in _gpu_stages.CELLS]
    for cell in _gpu_stages.CELLS:
        told = cells[cell.name]
        assert told["status"] == "done" and told["seconds"] > 0, told
        if cell.stage in _gpu_stages.TRAINING:
            assert told["batch"] == 4 and told["rows_a_step"] == 8 and len(told["step_seconds"]) == 4 == len(told["losses"])
            assert told["examples_per_second"] > 0 and told["phases"]["training"]["seconds"] > 0
            assert ("saving the model" in told["phases"]) == cell.saves
            assert told["plan"]["gib"] > 0 and told["plan"]["step_seconds"] > 0
    for name in ("align-full", "align-lora"):
        assert cells[name]["losses"] == pytest.approx(cells[f"{name}-checkpointing"]["losses"], abs=1e-5)
        assert "reference logps" in cells[name]["phases"]
    assert cells["label"]["rates"].keys() == {"sampling", "scoring", "behaviour logps"}
    assert cells["evaluate"]["rates"].keys() == {"samples for win rates", "samples and KL", "scoring"}
    assert cells["evaluate"]["kl"]["mean"] > 0  # two different models
    assert cells["embedded"]["runs"].keys() == {"dpo", "is_dpo"}
    assert "| align-full | 4 | 8 |" in everything["table"] and "| label | scoring |" in everything["table"]
    assert not (everything["folder"] / "work" / "run").exists()


def test_finished_cells_are_not_run_again(everything: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = everything["report"]
    cells = {**report["cells"], "label": {**report["cells"]["label"], "status": "failed", "why": "a reason"}}
    cells["sft-full"] = {**cells["sft-full"], "status": "out of memory", "why": "too large"}
    del cells["reward-full"]
    (tmp_path / "out.json").write_text(json.dumps({**report, "cells": cells}))
    asked = []

    def process(job: dict[str, Any], arguments: Any, began: float) -> dict[str, Any]:
        asked.append(job["cell"])
        return report["machine"] if job["cell"] == "machine" else report["cells"].get(job["cell"], {})

    monkeypatch.setattr(gpu_stages, "_process", process)
    status, again = call(tmp_path)
    assert status == 0 and asked == ["machine", "label", "reward-full"]
    assert again["cells"]["label"]["status"] == "done" and again["cells"]["sft-full"]["status"] == "out of memory"


def test_memory_time_and_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everything: dict[str, Any]) -> None:
    """Fewer rows where memory does not suffice; a failure stops nothing; what there was no time for is left for the next call."""
    good, tried = everything["report"]["cells"], []

    def process(job: dict[str, Any], arguments: Any, began: float) -> dict[str, Any]:
        if job["cell"] == "machine":
            return everything["report"]["machine"]
        tried.append((job["cell"], job["batch"]))
        if job["cell"] == "align-full" or job["batch"] == 4:
            return {"failed": "CUDA out of memory", "out_of_memory": True}
        if job["cell"] == "label":
            return {"failed": "ValueError: no", "out_of_memory": False}
        if job["cell"] == "sft-full":
            raise gpu_stages.TimeIsUp(job["cell"])
        return {**good[job["cell"]], "batch": job["batch"]}

    monkeypatch.setattr(gpu_stages, "_process", process)
    names = ["align-full", "label", "align-lora", "sft-full", "reward-full"]
    status, report = call(tmp_path, "--cells", *names)
    cells = report["cells"]
    assert status == 1 and list(cells) == names[:3]
    twice = [(name, batch) for name in ("align-full", "align-lora", "sft-full") for batch in (4, 2)]
    assert tried == [*twice[:2], ("label", None), *twice[2:]]
    assert cells["align-full"]["status"] == "out of memory" and cells["label"]["why"] == "ValueError: no"
    assert cells["align-lora"]["status"] == "done" and cells["align-lora"]["too_large"][0]["batch"] == 4
    table = (tmp_path / "out.md").read_text()
    assert "| align-lora | ~~4~~, 2 |" in table and "label: failed: ValueError: no" in table


def test_plan_and_measurement_stand_beside_each_other(everything: dict[str, Any]) -> None:
    told = dict(everything["report"]["cells"]["align-full"])
    told |= {"plan": {"gib": 3.0, "step_seconds": 1.5}, "examples_per_second": 4.0, "rows_a_step": 8}
    told["phases"] = {"training": {"seconds": 1.0, "calls": 1, "peak_gib": 2.0}}
    table = gpu_stages.tables({**everything["report"], "cells": {"align-full": told}})
    (line,) = [line for line in table.splitlines() if line.startswith("| align-full | 4 |")]
    assert line.endswith("| 2.0 | 3.0 | 1.50 | 0.75 |")


def test_without_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everything: dict[str, Any]) -> None:
    report = everything["report"]

    def process(job: dict[str, Any], arguments: Any, began: float) -> dict[str, Any]:
        return dict(report["cells"].get(job["cell"], report["machine"]))

    monkeypatch.setattr(gpu_stages, "_process", process)
    find = gpu_stages.find_spec
    monkeypatch.setattr(gpu_stages, "find_spec", lambda name: None if name == "trl" else find(name))
    status, told = call(tmp_path, "--cells", "sft-full", "align-full", "embedded")
    assert status == 0 and told["cells"]["align-full"]["status"] == "done"
    for name in ("sft-full", "embedded"):
        assert told["cells"][name]["status"] == "not run" and "trl" in told["cells"][name]["why"]
    assert "sft-full: not run: trl is not installed" in (tmp_path / "out.md").read_text()


def test_the_command_itself(tmp_path: Path) -> None:
    """As it is typed, with a process of its own for a cell."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_stages.py"), *TINY, "--cells", "align-full-checkpointing"]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    options = ["--folder", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env={**os.environ, **paths}, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    told = read_json(tmp_path / "out.json")["cells"]["align-full-checkpointing"]
    assert told["status"] == "done" and told["resident_gib"] > 0.1


def test_the_recipes_decide(tmp_path: Path) -> None:
    """Only lengths of runs, places and what a cell is about differ from configs/tldr/."""
    scale = _gpu_stages.SCALES["3b"]
    assert scale.batches[0] == 16 and scale.size.parameters == 3_212_749_824
    for cell in _gpu_stages.CELLS:
        if cell.stage not in _gpu_stages.TRAINING:
            continue
        config = _gpu_stages.config_of(cell, scale, tmp_path, tmp_path / "run", 16, "bfloat16")
        recipe = load_config(ROOT / "configs" / "tldr" / f"{'gold' if cell.stage == 'reward' else cell.stage}.yaml")
        ours, theirs = (getattr(c, cell.stage).model_dump() for c in (config, recipe))
        free = {"max_steps", "save_steps", "eval_steps", "logging_steps", "warmup_steps"}
        free |= {"batch_size", "gradient_accumulation_steps", "gradient_checkpointing"}
        assert {key for key in ours if ours[key] != theirs[key]} <= free
        assert (config.model.dtype, config.objective, config.tokenization) == ("float32", recipe.objective, recipe.tokenization)
        assert config.lora.rank == (16 if cell.lora else 0)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--cells", "align-ful"], "did you mean"),
        (["--minutes", "0"], "--minutes"),
        (["--out", "table.md"], "name a JSON file"),
        (["--model", "3b"], "3.2 billion"),
        pytest.param(["--device", "cuda"], "no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")),
    ],
)
def test_bad_options(options: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_stages.main([*TINY, *options]) == 2
    assert why in capsys.readouterr().err


def test_results_of_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.json").write_text('{"benchmark": "gpu_step"}')
    assert call(tmp_path)[0] == 2 and "no result of this script" in capsys.readouterr().err
    other = {"benchmark": "gpu_stages", "model": "tiny", "device": "cpu", "cells": {}, "machine": {"device": "another"}}
    (tmp_path / "out.json").write_text(json.dumps(other))
    monkeypatch.setattr(gpu_stages, "_process", lambda *given: {"device": "CPU", "peak_tflops": None})
    assert call(tmp_path)[0] == 2 and "another device" in capsys.readouterr().err
