"""What watches a run: `metrics.jsonl`, the bar on the terminal, the warning that a run has stalled."""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from isdaa.files import append_jsonl, write_atomically
from isdaa.terminal import Bar, progress

logger = logging.getLogger(__name__)

STALL_ESS = 0.02
STALL_MEAN_WEIGHT = 1e-3
STALL_STEPS = 20
STALL_PAIRS = round(2 / STALL_ESS)  # of fewer, the limit would be less than two pairs
START_MEAN = 0.05  # nats; a policy that starts as its reference differs from it by rounding alone
START_RMS = 0.3

TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")  # as the Trainer logs them
UNWEIGHTED = "loss/unweighted"
FIGURES = {  # shown beside the steps
    "loss": "loss",
    UNWEIGHTED: "unweighted",
    "rewards/accuracy": "accuracy",
    "weights/mean": "weight",
    "weights/ess": "ESS",
}


def metrics_line(entry: dict[str, Any]) -> dict[str, Any] | None:
    """A Trainer log entry as a line of `metrics.jsonl`: `eval_x` is `eval/x`, or `time/eval_x` where it is how long that took;
    numbers that no JSON knows are null. By name, as a checkpoint has them.

    None for the summary that the Trainer logs at its end: it describes one process, not the run.
    """
    if "train_runtime" in entry:
        return None
    line = {"step": entry["step"], "epoch": entry.get("epoch")}
    for key, value in sorted(entry.items()):
        if key in line:
            continue
        name = f"time/{key}" if key in TIMES else f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else key
        line[name] = None if isinstance(value, float) and not math.isfinite(value) else value
    return line


def metrics_at(log_history: list[dict[str, Any]], step: int) -> dict[str, float]:
    """The metrics that were logged at a step, by their names in `metrics.jsonl`. Of another step none is taken over."""
    found: dict[str, float] = {}
    for entry in log_history:
        line = metrics_line(entry) if entry["step"] == step else None
        found.update({k: float(v) for k, v in (line or {}).items() if isinstance(v, int | float) and ("/" in k or k == "loss")})
    return found


class MetricsFile(TrainerCallback):
    """`metrics.jsonl`: one JSON object a line, with `step`, `epoch` and `<group>/<name>` metrics.

    Every line is synced before the step's checkpoint is written. A run that resumes at step s starts its file from the
    checkpoint's own log, so that the file equals that of an uninterrupted run (but for `time/…`), whatever a kill left.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        lines = [metrics_line(entry) for entry in state.log_history]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines if line is not None)
        write_atomically(self.path, text)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        line = metrics_line({**logs, "step": state.global_step})
        if line is not None:
            append_jsonl(self.path, [line])


class WholeIntervals(TrainerCallback):
    """A checkpoint ends a logging interval: what is logged after a resume then covers the same steps as without one."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True
        return control


class TrainingProgress(TrainerCallback):
    """Steps, loss, ESS and the time left, on the terminal or as plain lines. The trainer closes it, errors or not."""

    def __init__(self, description: str = "align") -> None:
        self.description = description
        self._context: AbstractContextManager[Bar] | None = None
        self.bar: Bar | None = None
        self._figures = self._guard = ""  # of the last log, and what the guard found last
        self._covered = self._logged = 0  # the first and the last step of the last log

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.close()
        where = f" (from step {state.global_step})" if state.global_step else ""
        self._context = progress(f"{self.description}{where}", total=max(state.max_steps, 1), first=state.global_step)
        self.bar = self._context.__enter__()
        self._logged, self._figures, self._guard = state.global_step, "", ""

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.within(state.global_step + 1)

    def within(self, step: int, how_far: str = "") -> None:
        """Say what the step in work does: shown until it ends."""
        if self.bar is not None:
            self.bar.within = f"in step {step}{how_far and ': '}{how_far}"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None and not control.should_log:  # a step that is logged is shown with its figures, in `on_log`
            self._to(state.global_step, self._note(state.global_step))

    def _to(self, step: int, note: str) -> None:
        assert self.bar is not None
        self.bar.within = ""
        self.bar.update(step - self.bar.done, note=note)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is None or not logs:
            return

        def words(names: Mapping[str, str]) -> str:
            return "  ".join(f"{word} {logs[key]:.3g}" for key, word in names.items() if isinstance(logs.get(key), (int, float)))

        if "guard/kl" in logs:
            self._guard = words({"guard/win_rate": "win rate", "guard/kl": "KL"})
        elif "loss" in logs:
            self._figures = words(FIGURES if "weights/mean" in logs else {k: v for k, v in FIGURES.items() if k != UNWEIGHTED})
            self._covered, self._logged = self._logged + 1, state.global_step
        else:
            return
        note = self._note(state.global_step)
        if "loss" in logs:
            self._to(state.global_step, note)
            self.bar.begin()
        else:
            self.bar.update(0, note=note)

    def _note(self, step: int) -> str:
        """The last figures, and of which steps they are, where that is not `step` alone; what the guard found last."""
        whose = ""
        if self._figures and self._covered < self._logged:
            whose = f" (mean of steps {self._covered} to {self._logged})"
        elif self._figures and self._logged != step:
            whose = f" (of step {self._logged})"
        return "  ".join(filter(None, (self._figures + whose, self._guard)))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back."""
        if self._context is not None:
            self._context.__exit__(None, None, None)
        self._context = self.bar = None


class StallWarning:
    """Says, once, when a run has stopped learning: over the pairs of the last 20 steps together, ESS/N is below 0.02, or the mean
    weight below 1e-3.

    So it speaks wherever each of 20 steps is below a limit (docs/method.md). A batch alone has an ESS/N of at least 1/N, so of a
    small one the limit would be out of reach; of many steps together it is not. Where 20 steps have less than 100 pairs, of which
    the limit would be less than two, ESS/N is that of as many steps as have 100. A resumed process counts from 0 again.
    """

    def __init__(self, steps: int = STALL_STEPS) -> None:
        self.steps = steps
        self._seen: deque[tuple[float, float, float]] = deque()  # per step: pairs, Σw, Σw²
        self.said: set[str] = set()

    def update(self, step: int, ess: float, mean_weight: float, pairs: int) -> None:
        """Take in the global batch of one optimiser step (counted from 0)."""
        total = mean_weight * pairs
        self._seen.append((pairs, total, total**2 / (pairs * ess) if ess else 0.0))
        while len(self._seen) > self.steps and sum(count for count, _, _ in self._seen) - self._seen[0][0] >= STALL_PAIRS:
            self._seen.popleft()
        if len(self._seen) < self.steps:
            return
        count, total, squares = (sum(column) for column in zip(*self._seen, strict=True))
        share = total**2 / (count * squares) if squares else 0.0
        if count >= STALL_PAIRS and share < STALL_ESS:
            self._say("the effective sample size", share, STALL_ESS, len(self._seen), step)
        count, total, _ = (sum(column) for column in zip(*list(self._seen)[-self.steps :], strict=True))
        if total / count < STALL_MEAN_WEIGHT:
            self._say("the mean importance weight", total / count, STALL_MEAN_WEIGHT, self.steps, step)

    def _say(self, what: str, found: float, limit: float, steps: int, step: int) -> None:
        if what in self.said:
            return
        self.said.add(what)
        logger.warning(
            "step %d: %s of the pairs of the last %d steps is %.2g%s, below %g. The run has stalled: almost nothing is learnt "
            "any more. Try a larger beta, a smaller learning rate or an earlier checkpoint",
            step + 1,
            what,
            steps,
            found,
            " of their number" if limit == STALL_ESS else "",
            limit,
        )


def differs(start: Mapping[str, float]) -> bool:
    """Whether policy and reference, which are the same model, give logps that differ by more than rounding."""
    # A NaN is no small difference.
    return not (abs(start["start/drift_mean"]) <= START_MEAN and start["start/drift_rms"] <= START_RMS)


def warn_about_start(start: Mapping[str, float]) -> bool:
    """Say loudly that policy and reference, which are the same model, give different logps. True where they do."""
    if not differs(start):
        return False
    logger.warning(
        "BEFORE the first step the log-probabilities of the policy differ from those of its reference, though both are "
        "the same model: mean %.3g (limit %g), RMS %.3g (limit %g), largest %.3g nats. Weights and margins have this "
        "error. Compute the reference with the same precision and packing, or train in float32",
        start["start/drift_mean"],
        START_MEAN,
        start["start/drift_rms"],
        START_RMS,
        start["start/drift_max"],
    )
    return True
