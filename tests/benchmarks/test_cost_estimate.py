"""The estimate of hours and price: by hand where a hand can follow, and the page shows what the command prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cost_estimate  # noqa: E402
from cost_estimate import DATA, Assumed, Data, Work  # noqa: E402

from isdaa.config import load_config  # noqa: E402

CONFIGS = ROOT / "configs"


def rows(printed: str) -> dict[str, list[str]]:
    """Step -> its cells."""
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines}


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost_estimate.main([]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) >= 12
    page = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in page if line.startswith("|")] == printed


def test_sft_by_hand() -> None:
    """Six operations a weight and token; the head at the 38 tokens of a summary."""
    layers = 28 * (2 * 3072 * 3072 + 2 * 3072 * 1024 + 3 * 3072 * 8192)
    by_hand = 116_722 * 6 * (layers * 368 + 3072 * 128_256 * 38)
    work = cost_estimate.sft("SFT", load_config(CONFIGS / "tldr" / "sft.yaml"), DATA["tldr posts"])
    assert work.flops == pytest.approx(by_hand, rel=0.02)  # attention scores come on top
    assert work.hours(Assumed()) == pytest.approx((work.flops / (989e12 * 0.3) + 60) / 3600)
    assert work.size is not None and work.size.parameters * 16 == pytest.approx(51.4e9, rel=0.01)
    assert cost_estimate.LLAMA_8B.parameters == 7_504_924_672  # Llama 3.1 8B without its head


def test_the_configurations_decide(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "tldr" / "align.yaml")
    data = Data(1000, 100, 20)
    once = cost_estimate.alignment(config, data)
    config.align.epochs = 2
    assert cost_estimate.alignment(config, data).flops == 2 * once.flops
    config.align.save_steps = 5
    assert cost_estimate.checkpoints_of(config, data) == 4  # 16 steps: after 5, 10, 15, and the last one
    first = cost_estimate.evaluation(config, data)
    assert first.sampling_steps == 2 * 4 * 128  # samples for win rates and for KL, 512 prompts, 128 at a time
    config.evaluation.prompts = 1024
    second = cost_estimate.evaluation(config, data)
    assert (second.fp32, second.sampling_steps) == (2 * first.fp32, 2 * first.sampling_steps)


def test_sums() -> None:
    one, other = Work("a", 3e15, 1e12, 100, shape="chat"), Work("b", 1e15, 2e12, 50)
    both = one + other.times(2)
    assert (both.name, both.flops, both.fp32, both.sampling_steps, both.starts) == ("a", 5e15, 5e12, 200, 3)
    given = Assumed(peak=1.0, mfu=0.5, peak_fp32=1.0, share_fp32=1.0, step_ms=10, start_seconds=0)
    assert both.hours(given) == pytest.approx((5e15 / 0.5e12 + 5 + 2) / 3600)


def test_price_and_measured_throughput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpu_step.json"
    arms: dict[str, Any] = {
        "isdaa_sdpa": {"mfu": 0.1},
        "isdaa_varlen": {"mfu": 0.2},
        "trl": {"mfu": 0.9},
        "isdaa_flex": {"failed": "x"},
    }
    content = {"benchmark": "gpu_step", "machine": {"peak_tflops": 500.0}, "cells": [{"shape": "tldr", "arms": arms}]}
    file.write_text(json.dumps(content))
    assert cost_estimate.measured(file) == (500.0, {"tldr": 0.2})
    assert cost_estimate.main(["--measured", str(file), "--price", "2", "--mfu", "0.4"]) == 0
    printed = rows(capsys.readouterr().out)
    hours = cost_estimate.sft("", load_config(CONFIGS / "tldr" / "sft.yaml"), DATA["tldr posts"]).flops / (500e12 * 0.2) / 3600
    assert float(printed["SFT"][-3]) == pytest.approx(hours + 1 / 60, abs=0.05)
    assert float(printed["SFT"][-1]) == pytest.approx(2 * (hours + 1 / 60), abs=0.5)
    content["machine"] = {"peak_tflops": None}
    file.write_text(json.dumps(content))
    assert cost_estimate.main(["--measured", str(file)]) == 2
    assert "give --mfu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mfu", "1.5"], "--mfu: expected a number above 0 up to 1"),
        (["--price", "0"], "--price: expected a number above 0"),
        (["--peak", "nan"], "--peak: "),
        (["--measured", str(CONFIGS / "nowhere.json")], "nowhere.json"),
    ],
)
def test_bad_options_are_one_line(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cost_estimate.main(options) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_held_out_rows_are_not_trained_on() -> None:
    """TL;DR holds out a share of its own posts; the other sets have splits for it."""
    config = load_config(CONFIGS / "tldr" / "align.yaml")
    assert DATA["tldr posts"].held_out == round(config.data.eval_fraction * DATA["tldr posts"].rows)
    assert cost_estimate.checkpoints_of(config, DATA["tldr posts"]) == 9  # 894 steps, not 912
    whole, half = (cost_estimate.alignment(config, Data(1000, 100, 20, held_out=held)) for held in (0, 500))
    assert half.flops == whole.flops / 2
    hh = load_config(CONFIGS / "instruct" / "hh.yaml")
    assert (
        cost_estimate.alignment(hh, Data(1000, 9, 9, held_out=500)).flops == cost_estimate.alignment(hh, Data(1000, 9, 9)).flops
    )
