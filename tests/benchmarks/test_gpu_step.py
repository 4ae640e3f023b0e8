"""The GPU benchmark at toy size on the CPU: every arm trains and says what it should, and the figures are what they claim."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import _gpu_arms  # noqa: E402
import _gpu_model  # noqa: E402
import gpu_step  # noqa: E402

pytestmark = pytest.mark.slow  # what measures, not what is measured; `make test-slow` runs it

JOB: dict[str, Any] = {
    "shape": "tiny", "tiny": True, "device": "cpu", "dtype": "float32", "batch_size": 2, "rounds": 2, "warmup": 1, "seed": 0,
    "checkpointing": False,
}  # fmt: skip


def run(arm: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """As the benchmark does it, but in this process."""
    asked, answered = folder / "job.json", folder / "result.json"
    asked.write_text(json.dumps({**JOB, "arm": arm, **changes}))
    _gpu_arms.main(str(asked), str(answered))
    return json.loads(answered.read_text())


@pytest.fixture(scope="module")
def trl_losses(tmp_path_factory):
    told = run("trl", tmp_path_factory.mktemp("trl"))
    assert told.get("failed") is None and len(told["seconds"]) == 2
    return told["losses"]


@pytest.mark.parametrize("arm", ["isdaa_sdpa", "isdaa_compiled"])
def test_isdaa_does_the_work_that_trl_does(arm, trl_losses, tmp_path, monkeypatch):
    from isdaa.models.attention import gpu_attention

    monkeypatch.setattr(gpu_attention, "compile_layers", partial(gpu_attention.compile_layers, backend="eager"))
    told = run(arm, tmp_path)
    assert "failed" not in told, told
    assert told["attention"] == "sdpa" and len(told["seconds"]) == 2 and min(told["seconds"]) > 0
    assert told["losses"][0] == pytest.approx(math.log(2), abs=1e-5)
    assert told["losses"] == pytest.approx(trl_losses, abs=1e-5)
    assert told["peak_bytes"] is None


def test_parts_and_machine(tmp_path):
    parts = run("parts", tmp_path)["parts"]
    assert parts["attention sdpa"] > 0 and parts["head chunked"] > 0
    assert "half precision" in parts["attention varlen"] and "GPU" in parts["head fused"]
    told = run("machine", tmp_path)
    assert told["device"] == "CPU" and told["peak_tflops"] is None and told["matmul_tflops"] > 0


def test_an_arm_that_fails_says_why(tmp_path):
    assert "flash_pref" in run("flash_pref", tmp_path)["failed"]


def test_rows_for_flash_pref():
    rows = [
        {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 2], "rejected_ids": [9, 10, 2]},
        {"prompt_ids": [4], "chosen_ids": [3, 3, 2], "rejected_ids": [2]},
    ]
    ids, mask, predicting, owner = _gpu_arms._padded(rows, "cpu")
    assert ids.tolist()[0] == [5, 6, 7, 8, 2, 0] and ids.tolist()[2] == [5, 6, 7, 9, 10, 2]  # chosen ones first
    assert mask.sum(1).tolist() == [5, 4, 6, 2]
    assert ids[:, 1:][predicting].tolist() == [8, 2, 3, 3, 2, 9, 10, 2, 2]
    assert owner.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_the_model_is_llama_3b():
    """3.21 billion parameters, by its own config, without making them."""
    with torch.device("meta"):
        model = _gpu_model.make_model(_gpu_model.LLAMA_3B, torch.bfloat16, "meta", "sdpa")
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == _gpu_model.LLAMA_3B.parameters == 3_212_749_824
    assert model.config.rope_parameters["rope_type"] == "llama3" and model.dtype == torch.bfloat16


def test_flops_by_hand():
    """A pair of 330 + 38 + 38 tokens: six operations a weight and token, head only at responses, visible scores."""
    size = _gpu_model.LLAMA_3B
    layer = 2 * 3072 * 3072 + 2 * 3072 * 1024 + 3 * 3072 * 8192
    visible = 368 * 369 // 2 + 38 * 330 + 38 * 39 // 2
    by_hand = 6 * (28 * layer * 406 + 3072 * 128_256 * 76) + 12 * 28 * 3072 * visible
    assert _gpu_model.flops_of(size, [(330, 38, 38)]) == pytest.approx(by_hand, rel=1e-3)


def test_what_the_figures_are(monkeypatch, tmp_path, capsys):
    """Two visits of each arm, the second in reverse order, and medians over both."""
    asked = []

    def told(arm, shape, arguments):
        asked.append(arm)
        if arm == "machine":
            return {"device": "NVIDIA H200", "peak_tflops": 989.0, "matmul_tflops": 700.0}
        if arm == "parts":
            return {"parts": {"head chunked": 0.002}}
        if arm == "flash_pref":
            return {"failed": "not there"}
        pace = {"trl": 2.0}.get(arm, 1.0)
        return {"seconds": [pace, pace, 9.0], "losses": [0.69], "peak_bytes": 2**31, "attention": "some"}

    monkeypatch.setattr(gpu_step, "_run", told)
    out = tmp_path / "out.json"
    options = ["--tiny", "--device", "cpu", "--visits", "2", "--rounds", "3", "--arms", "isdaa_varlen", "trl", "flash_pref"]
    assert gpu_step.main([*options, "--out", str(out)]) == 0
    assert asked == ["machine", "isdaa_varlen", "trl", "flash_pref", "trl", "isdaa_varlen", "parts"]
    (cell,) = json.loads(out.read_text())["cells"]
    ours = cell["arms"]["isdaa_varlen"]
    assert ours["pairs_per_second"] == 2.0 and cell["arms"]["trl"]["pairs_per_second"] == 1.0 and ours["peak_gib"] == 2.0
    lengths = gpu_step.lengths_of(gpu_step.pairs_of(_gpu_model.task("tiny", True, "float32"), 8, 0))
    flops = [_gpu_model.flops_of(_gpu_model.task("tiny", True, "").size, lengths[i : i + 2]) for i in (2, 4)]
    assert min(flops) / 989e12 <= ours["mfu"] <= max(flops) / 989e12
    assert ours["of_matmul"] == pytest.approx(ours["mfu"] * 989 / 700)
    printed = capsys.readouterr().out
    assert "2.00" in printed and "not there" in printed and "head chunked, forward and backward: 2.00 ms" in printed


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--arms", "isdaa_flexx"], "unknown name"),
        (["--device", "cpu"], "3.2 billion"),
        (["--tiny", "--device", "cpu", "--rounds", "0"], "--rounds"),
        pytest.param(["--tiny"], "no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")),
    ],
)
def test_bad_options(options, why, capsys):
    assert gpu_step.main(options) == 2
    assert why in capsys.readouterr().err


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(("datasets", "trl", "bitsandbytes"), None))
import _gpu_arms
_gpu_arms.main(*sys.argv[1:])
"""


def test_isdaas_arms_need_neither_datasets_nor_trl(tmp_path: Path) -> None:
    asked, answered = tmp_path / "job.json", tmp_path / "result.json"
    asked.write_text(json.dumps({**JOB, "arm": "isdaa_sdpa"}))
    paths = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", WITHOUT, str(asked), str(answered)]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, check=True, capture_output=True)
    told = json.loads(answered.read_text())
    assert "failed" not in told and len(told["seconds"]) == 2


def test_what_is_not_installed_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_step, "find_spec", lambda name: None if name == "pydantic" else object())
    options = ["--tiny", "--device", "cpu", "--out", str(tmp_path / "out.json"), "--arms"]
    assert gpu_step.main([*options, "isdaa_sdpa"]) == 2
    error = capsys.readouterr().err
    assert "pip install pydantic" in error and error.count("\n") == 1
