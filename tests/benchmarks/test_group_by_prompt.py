"""The benchmark of grouped pairs: both orders are the same pairs, the figures are right, and the parts run and are kept apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from patience import HANGS

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import group_by_prompt  # noqa: E402
from _grouping import pair_losses  # noqa: E402
from _grouping_effect import differences, gradient_variance  # noqa: E402
from _grouping_speed import PAIRS, Stepper, agreement, draw, draw_lengths, families, referenced, steps_of, tiny_speed, wrong  # noqa: E402
from shapes import SHAPES  # noqa: E402

SPEED = tiny_speed()


# ---- the pairs ----


@pytest.mark.parametrize("batch_size", [1, 4, 5, 6, 12, 24])
def test_six_rounds_see_every_pair_once_in_either_order_and_steps_are_alike(batch_size: int) -> None:
    count = families(batch_size)
    rows = draw(SPEED, 2, count, shared=False)
    prompts = [tuple(row["prompt_ids"]) for row in rows]
    lengths = [tuple(map(len, (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]))) for row in rows]
    for first, rounds in ((0, range(PAIRS)), (len(rows) // 2, range(PAIRS, 2 * PAIRS))):
        for grouped in (False, True):
            seen = [row for r in rounds for step in steps_of(r, batch_size, grouped) for row in step]
            assert sorted(seen) == list(range(first, first + len(rows) // 2))
    for r in range(2 * PAIRS):
        together, apart = (steps_of(r, batch_size, grouped) for grouped in (True, False))
        assert [len(step) for step in together] == [batch_size] * (count * PAIRS // batch_size)
        for one, other in zip(together, apart, strict=True):
            assert [lengths[row] for row in one] == [lengths[row] for row in other]
            assert len({prompts[row] for row in other}) == len(other)
            assert len({prompts[row] for row in one}) <= -(-len(one) // PAIRS) + 1


def test_a_prompt_has_twelve_responses_or_six_in_two_pairs_each() -> None:
    own, shared = (draw(SPEED, 1, 3, shared) for shared in (False, True))
    for rows, responses in ((own, 2 * PAIRS), (shared, PAIRS)):
        assert len(rows) == 3 * PAIRS * PAIRS
        for first in range(0, len(rows), PAIRS):
            prompt = rows[first : first + PAIRS]
            assert len({tuple(row["prompt_ids"]) for row in prompt}) == 1
            texts = [tuple(row[name]) for row in prompt for name in ("chosen_ids", "rejected_ids")]
            assert len(set(texts)) == responses
            assert all(texts.count(text) == 2 * PAIRS // responses for text in texts)
    shape = [[len(ids) for ids in row.values()] for row in own]
    assert shape == [[len(ids) for ids in row.values()] for row in shared]


def test_few_families_have_the_mean_lengths_of_the_shape() -> None:
    lengths = np.array(draw_lengths(SHAPES["tldr"], 2, np.random.default_rng(0), 4096))
    assert lengths.shape == (2, 1 + PAIRS)
    assert lengths[:, 0].mean() == pytest.approx(330, abs=1) and lengths[:, 1:].mean(1) == pytest.approx(38, abs=1)
    assert lengths.std(axis=0)[0] > 50 and np.ptp(lengths[:, 1:], axis=1).min() > 20


# ---- the same work ----


@pytest.mark.parametrize("shared", [False, True])
def test_grouped_pairs_have_the_losses_and_gradients_of_pairs_alone(shared: bool) -> None:
    stepper = Stepper(SPEED.size, 0)
    pairs = referenced(draw(SPEED, 1, 2, shared), SPEED.size.vocabulary)
    steps = steps_of(0, 4, grouped=True)
    before = stepper.step(pairs, steps[0])
    found = agreement(stepper, pairs, steps)
    assert found["loss_moved"] > 1e-3 > 1e-6 > found["loss_difference"]
    assert found["gradient_difference"] < 1e-4
    apart = stepper.step(pairs, steps_of(0, 4, grouped=False)[0])
    assert before < apart


def test_other_work_is_caught() -> None:
    right = {"loss_difference": 1e-7, "gradient_difference": 1e-6}
    cell = {"batch_size": 4, "same_pairs": {"grouped": right, "grouped_shared": right}}
    assert wrong({"cells": [cell]}) == []
    for name, value in (("loss_difference", 1e-3), ("gradient_difference", 0.01), ("loss_difference", float("nan"))):
        (line,) = wrong({"cells": [cell | {"same_pairs": {"grouped": right, "grouped_shared": right | {name: value}}}]})
        assert "grouped_shared" in line and "4 pairs" in line


# ---- the noise ----


def test_the_variance_of_a_gradient_is_that_of_its_batches() -> None:
    stepper = Stepper(SPEED.size, 0)
    pairs = referenced(draw(SPEED, 1, 1, shared=False), SPEED.size.vocabulary)
    batches = [[0, 1, 2], [7, 14, 21], [30, 8, 9]]
    gradients = []
    for batch in batches:
        stepper.model.zero_grad()
        pair_losses(stepper.forward, stepper.objective, pairs, batch)[0].mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in stepper.model.parameters() if p.grad is not None]).numpy())
    expected = np.var(np.array(gradients, dtype=np.float64), axis=0, ddof=1).sum()
    assert gradient_variance(stepper.forward, stepper.objective, pairs, batches) == pytest.approx(expected, rel=1e-5)
    assert gradient_variance(stepper.forward, stepper.objective, pairs, [[0, 1]] * 3) == pytest.approx(0, abs=1e-6 * expected)


def test_differences_are_paired_by_seed() -> None:
    def row(seed: int, value: float) -> dict[str, Any]:
        return {"seed": seed, "win_rate": value, "kl": 2 * value, "accuracy": 0.5, "loss_noise": value}

    apart = [row(1, 0.25), row(2, 0.5), row(5, 0.5), row(4, 9.0)]
    gaps = differences(apart, [row(2, 0.75), row(1, 0.375), row(5, 0.5), row(3, 7.0)])
    assert sorted(gaps["win_rate"].values) == [0.0, 0.125, 0.25]
    assert gaps["kl"].mean == pytest.approx(0.25) and gaps["accuracy"].mean == 0
    assert gaps["win_rate"].low is not None and gaps["win_rate"].low < 0
    assert differences(apart[:2], [row(1, 0.375), row(2, 0.75)])["win_rate"].low is None  # two seeds say no interval


# ---- the command ----


def test_the_speed_part_writes_what_it_shows_and_keeps_the_other_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    out.write_text(json.dumps({"benchmark": "group_by_prompt", "effect": {"kept": True}}))
    assert group_by_prompt.main(["--part", "speed", "--tiny", "--rounds", "2", "--threads", "1", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["effect"] == {"kept": True}
    (cell,) = report["speed"]["cells"]
    assert cell["batch_size"] == 4 and cell["steps_a_round"] == 3
    arms = cell["arms"]
    assert arms["apart"]["gain"]["median"] == 1
    for name, arm in arms.items():
        assert len(arm["seconds"]) == len(arm["cpu"]) == 2 and min(arm["seconds"]) > 0
        rounds = [a / b for a, b in zip(arms["apart"]["seconds"], arm["seconds"], strict=True)]
        assert arm["gain"]["least"] == pytest.approx(min(rounds)) and arm["gain"]["largest"] == pytest.approx(max(rounds))
        assert cell["epoch_tokens"][name] > 0
    tokens = [arms[name]["tokens"][0] for name in ("grouped_shared", "grouped", "apart")]
    assert tokens == sorted(tokens) and tokens[0] < tokens[2]
    assert {"gain", "apart", "grouped_shared", "epoch_tokens"} <= set(report["speed"]["definitions"])
    options = ["--part", "speed", "--tiny", "--rounds", "2", "--threads", "1", "--out", str(out)]
    assert group_by_prompt.main([*options, "--batch_sizes", "6"]) == 0
    both = json.loads(out.read_text())["speed"]
    assert both["settings"]["batch_sizes"] == [4, 6] and both["cells"][0] == cell
    options[options.index("--rounds") + 1] = "1"
    assert group_by_prompt.main([*options, "--batch_sizes", "6"]) == 0
    assert json.loads(out.read_text())["speed"]["settings"]["batch_sizes"] == [6]
    assert "grouped, 6 responses" in shown and "2 rounds" in shown and str(tmp_path) not in out.read_text()


def effect_command(folder: Path, *options: object) -> subprocess.CompletedProcess[str]:
    program = str(ROOT / "benchmarks" / "group_by_prompt.py")
    where = ("--out", folder / "out.json", "--folder", folder / "runs", "--threads", 1)
    words = [sys.executable, program, "--tiny", *map(str, (*where, *options))]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, env=os.environ.copy(), timeout=HANGS)


@pytest.mark.slow
def test_the_effect_part_runs_twins_and_finds_finished_ones_again(tmp_path: Path) -> None:
    done = effect_command(tmp_path, "--part", "effect", "--seeds", 5, 6)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())["effect"]
    rows = report["methods"]["dpo"]
    assert [row["seed"] for row in rows["grouped"]] == [row["seed"] for row in rows["not_grouped"]] == [5, 6]
    gaps = [a["kl"] - b["kl"] for a, b in zip(rows["grouped"], rows["not_grouped"], strict=True)]
    assert all(gaps) and rows["differences"]["kl"]["mean"] == pytest.approx(np.mean(gaps))
    for entry in report["noise"]:
        assert entry["prompts_per_step"]["grouped"] < entry["prompts_per_step"]["not_grouped"] <= 8
        assert all(entry[at]["variance"][name] > 0 for at in ("start", "end") for name in ("grouped", "not_grouped"))
    assert "grouped − not grouped" in done.stdout
    models = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")}
    assert len(models) > 4
    again = effect_command(tmp_path, "--part", "effect", "--seeds", 6)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")} == models
    assert [row["seed"] for row in json.loads((tmp_path / "out.json").read_text())["effect"]["noise"]] == [6]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--part", "sped"], "speed"),
        (["--rounds", "0"], "--rounds"),
        (["--rounds", "x"], "--rounds"),
        (["--seeds", "-1"], "--seeds"),
        (["--batch_sizes", "4", "0"], "--batch_sizes"),
        (["--threads", "0"], "--threads"),
        (["--jobs", "0"], "--jobs"),
        (["--sedes", "4"], "--seeds"),
        (["--out", "."], "--out"),
    ],
)
def test_bad_options_are_one_line_and_status_2(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert group_by_prompt.main(options) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and said in told and "Traceback" not in told


def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, said in (('{"benchmark": "other"}', "another file"), ("no json", "other.json"), ("[]", "another file")):
        path = tmp_path / "other.json"
        path.write_text(text)
        assert group_by_prompt.main(["--tiny", "--out", str(path)]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and said in told
        assert path.read_text() == text
