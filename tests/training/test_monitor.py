"""metrics.jsonl, the stall warning and the figures' edges."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_helpers import logged, tiny_model, token_rows, trainer_of, with_reference
from transformers import TrainerControl, TrainerState

from isdaa import Objective
from isdaa.training.trainer.callbacks import MetricsFile, StallWarning, WholeIntervals, metrics_line, warn_about_start
from isdaa.training.trainer.pair_metrics import COLUMNS, Figures


def test_a_line_is_json_that_every_reader_knows() -> None:
    line = metrics_line({"step": 3, "epoch": 0.5, "loss": float("nan"), "eval_rewards/margin": float("inf"), "n": 2})
    assert line == {"step": 3, "epoch": 0.5, "loss": None, "eval/rewards/margin": None, "n": 2}
    assert metrics_line({"step": 3, "train_runtime": 1.0, "train_loss": 2.0}) is None


def test_a_line_is_the_same_out_of_a_checkpoint() -> None:
    """A checkpoint's log is sorted by name; how long something took is under `time/`, by which two runs may differ."""
    logged = {"step": 3, "epoch": 0.5, "loss": 1.0, "grad_norm": 2.0, "eval_loss": 3.0, "eval_runtime": 4.0}
    line = metrics_line(logged)
    assert json.dumps(line) == json.dumps(metrics_line(json.loads(json.dumps(logged, sort_keys=True))))
    assert line is not None and list(line) == ["step", "epoch", "eval/loss", "time/eval_runtime", "grad_norm", "loss"]


def test_a_resumed_file_starts_from_the_checkpoints_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "epoch": 0.1, "loss": 1.0}\n{"step": 9, "loss": 7.0}\n{"step": 1')
    state = TrainerState(log_history=[{"loss": 1.0, "epoch": 0.1, "step": 2}], is_world_process_zero=True, global_step=2)
    file = MetricsFile(path)
    file.on_train_begin(None, state, TrainerControl())  # type: ignore[arg-type]
    state.global_step = 4
    file.on_log(None, state, TrainerControl(), logs={"loss": 0.5, "epoch": 0.2})  # type: ignore[arg-type]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 2, "epoch": 0.1, "loss": 1.0}, {"step": 4, "epoch": 0.2, "loss": 0.5}]
    state.is_world_process_zero = False
    file.on_log(None, state, TrainerControl(), logs={"loss": 0.4})  # type: ignore[arg-type]
    assert len(path.read_text().splitlines()) == 2


def test_a_checkpoint_ends_an_interval() -> None:
    state = TrainerState(global_step=5, max_steps=9)
    for save, step, expected in ((True, 5, True), (False, 5, False), (False, 9, True)):
        state.global_step = step
        control = WholeIntervals().on_step_end(None, state, TrainerControl(should_save=save))  # type: ignore[arg-type]
        assert control.should_log is expected


def fed(batches: list[list[float]]) -> tuple[StallWarning, list[int]]:
    """A warning that has seen the weights of these global batches, and the steps (from 1) after which it spoke."""
    stall, spoke = StallWarning(), []
    for step, weights in enumerate(batches):
        before, squares = len(stall.said), sum(w * w for w in weights)
        ess = sum(weights) ** 2 / (len(weights) * squares) if squares else 0.0
        stall.update(step, ess, sum(weights) / len(weights), len(weights))
        spoke += [step + 1] * (len(stall.said) - before)
    return stall, spoke


def test_the_stall_warning_needs_twenty_steps_and_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    few = [1.0] + [0.0] * 99  # ESS/N 0.01
    with caplog.at_level(logging.WARNING):
        assert fed([few] * 19)[1] == [] and not caplog.text
        assert fed([few] * 100)[1] == [20]
        assert (
            len(caplog.records) == 1
            and "step 20: the effective sample size of the pairs of the last 20 steps is 0.01" in caplog.text
        )
        caplog.clear()
        assert fed([[1e-4] * 8] * 100)[1] == [20]
        assert len(caplog.records) == 1 and "mean importance weight of the pairs of the last 20 steps is 0.0001" in caplog.text
        assert fed([[1.0] * 8] * 30 + [[1e-5] * 8] * 20)[1] == [50]
        assert fed([[0.0] * 8] * 20)[0].said == {"the effective sample size", "the mean importance weight"}


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 64, 512])
def test_a_few_pairs_that_teach_alone_are_seen_at_any_batch_size(size: int) -> None:
    """One pair in a hundred teaches: a batch of less than 50 has an ESS/N above the limit of 0.02 all the same."""
    weights = [1.0 if i % 100 == 50 else 2e-3 for i in range(max(400, 40 * size))]
    batches = [weights[i : i + size] for i in range(0, len(weights), size)]
    stall, spoke = fed(batches)
    assert stall.said == {"the effective sample size"} and spoke[0] >= 20
    assert sum(map(len, batches[: spoke[0]])) >= 100
    # Where each pair teaches, or one in ten, or the weights have fallen evenly to a tenth, nothing is said.
    for steady in (lambda i: 1.0, lambda i: float(i % 10 == 3), lambda i: max(1 - i / 200, 0.1)):
        weights = [steady(i) for i in range(max(400, 40 * size))]
        assert fed([weights[i : i + size] for i in range(0, len(weights), size)])[1] == []


def test_the_stall_warning_speaks_wherever_each_of_twenty_steps_is_below_a_limit() -> None:
    """docs/method.md's rule, on random batches that differ by orders of magnitude."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        batches = [(rng.exponential(10.0 ** rng.uniform(-3, 0)) * (rng.random(200) < 0.01)).tolist() for _ in range(20)]
        for batch in batches:
            batch[0] = max(batch[0], 1e-9)
        shares = [sum(b) ** 2 / (len(b) * sum(w * w for w in b)) for b in batches]
        if max(shares) < 0.02:
            assert "the effective sample size" in fed(batches)[0].said


def test_a_run_that_stalls_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Behaviour logps far above the policy's: every weight is as good as 0.
    data = with_reference(token_rows(8, behaviour_chosen_logps=[0.0] * 8, behaviour_rejected_logps=[0.0] * 8), tiny_model())
    with caplog.at_level(logging.WARNING):
        objective = Objective(weight="importance", normalize="batch")
        trainer = trainer_of(tiny_model(), tmp_path, data, objective=objective, batch_size=4, max_steps=24, learning_rate=0.0)
        trainer.train()
    # The figures are of the weights before normalisation, which would hide that all of them shrink.
    assert trainer.state.log_history[-2]["weights/mean"] < 1e-3
    assert "stalled" in caplog.text


def test_the_start_is_judged_by_mean_and_rms() -> None:
    for mean, rms, expected in (
        (0.0, 0.0, False),
        (0.049, 0.29, False),
        (-0.051, 0.06, True),
        (0.0, 0.31, True),
        (float("nan"), float("nan"), True),
    ):
        start = {"start/drift_mean": mean, "start/drift_rms": rms, "start/drift_max": 1.0}
        assert warn_about_start(start) is expected


def table(**columns: Any) -> torch.Tensor:
    size = len(next(iter(columns.values())))
    ones = {name: [1.0] * size for name in COLUMNS}
    return torch.tensor([(ones | columns)[name] for name in COLUMNS]).T


def test_figures_forget_fill_ins_and_count_ties_half() -> None:
    figures = Figures(
        table(
            valid=[1.0, 1.0, 0.0, 1.0, 1.0],
            chosen_reward=[1.0, 2.0, 9.0, 3.0, 0.0],
            rejected_reward=[1.0, 1.0, 0.0, 4.0, 0.0],
            step=[0.0, 0.0, 0.0, 1.0, 1.0],
            raw_weight=[1.0, 3.0, 50.0, 0.0, 0.0],
            chosen_drift=[0.5, -0.5, 70.0, 0.0, 0.0],
            rejected_drift=[1.0, 0.0, 70.0, 0.1, 0.0],
        )
    )
    metrics = figures.metrics()
    assert len(figures) == 4
    assert metrics["rewards/accuracy"] == pytest.approx((0.5 + 1 + 0 + 0.5) / 4)
    assert figures.steps() == [(0, pytest.approx(16 / (2 * 10)), 2.0, 2), (1, 0.0, 0.0, 2)]
    assert metrics["weights/ess"] == pytest.approx(0.4) and metrics["weights/mean"] == 1.0 and metrics["weights/max"] == 3.0
    start = figures.start()
    assert start["start/drift_mean"] == 0.25 and start["start/drift_max"] == 1.0
    assert start["start/drift_rms"] == pytest.approx((1.5 / 4) ** 0.5)


def test_rounding_is_no_accuracy() -> None:
    """At the first step every Δ is rounding: 0.406 and 0.875 of few pairs were seen, and looked like learning."""
    moved = {"chosen_reward": [2e-8, 2e-8, -1e-8, 3e-8], "rejected_reward": [-1e-8, 0.0, -2e-8, 1e-8]}
    rounding = {"chosen_drift": [2e-7, 9e-4, -1e-7, 3e-7], "rejected_drift": [-1e-7, 0.0, -2e-7, 1e-7]}
    later = {"step": [7.0] * 4}
    assert Figures(table(**moved, **rounding, **later)).accuracy() == 0.5
    assert Figures(table(**moved, **rounding | {"chosen_drift": [2e-3, 9e-4, -1e-7, 3e-7]}, **later)).accuracy() == 0.625
    # The coarser rounding of bfloat16, before the first step of a policy that is its reference, and of no other.
    coarse = {"chosen_drift": [0.2, -0.2, 0.1, -0.1], "rejected_drift": [-0.1, 0.1, -0.2, 0.2], "chosen_reward": [1.0] * 4}
    coarse |= {"rejected_reward": [0.0] * 4}
    first = {"step": [0.0] * 4}
    for columns, at_reference, expected in (
        (coarse | first, True, 0.5),
        (coarse | first, False, 1.0),
        (coarse | later, True, 1.0),
        (coarse | first | {"chosen_drift": [9.0] * 4}, True, 1.0),  # two models, of which the run warns
        (coarse | {"step": [0.0, 0.0, 1.0, 1.0]}, True, 0.75),
    ):
        assert Figures(table(**columns)).accuracy(at_reference) == expected


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_policy_equal_to_its_reference_has_an_accuracy_of_a_half(tmp_path: Path, precision: str) -> None:
    data = with_reference(token_rows(9), tiny_model())
    trainer = trainer_of(tiny_model(), tmp_path, data, data, batch_size=3, max_steps=1, precision=precision)
    assert trainer.evaluate()["eval_rewards/accuracy"] == trainer.held_out_metrics(data)["rewards/accuracy"] == 0.5
    trainer.train()
    assert logged(trainer, "rewards/accuracy") == [0.5]
    assert trainer.evaluate()["eval_rewards/accuracy"] != 0.5
