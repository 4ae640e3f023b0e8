"""A guard over a run: it measures KL and win rate during training, keeps the best model, and stops a run that falls.

`measurement.py` measures; `isdaa.evaluation.verdict.sequential` decides whether a fall is more than chance. A measurement leaves
no trace in training: until it is stopped, a guarded run has bit for bit the weights of the same run without a guard.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from isdaa.config import Config, GuardConfig
from isdaa.data.tokenize_pairs import ending_ids
from isdaa.errors import UserError
from isdaa.evaluation.fragments import many, warning
from isdaa.evaluation.scorers import GoldScorer, Scorer, about, learnt_alike, load_scorer
from isdaa.evaluation.statistics import mean_interval
from isdaa.evaluation.verdict.fall_statistics import gains_shown
from isdaa.files import link_or_copy, remove_tree, write_folder_atomically
from isdaa.models.packed.forward import PairForward, prepare
from isdaa.models.saving import save_model
from isdaa.record import ModelRecord, read_record
from isdaa.training.guard.measurement import Looks, Measurement, Reference, guard_prompts, longest_row
from isdaa.training.run_folder import ONE_PROCESS, Run
from isdaa.training.stage_inputs import described, is_start, merges, other_digest, other_model, policy_of
from isdaa.training.trainer.batches import TokenisedPairs
from isdaa.training.trainer.preference_trainer import PreferenceTrainer

if TYPE_CHECKING:
    from isdaa.evaluation.verdict.sequential import FallTest

logger = logging.getLogger(__name__)

NO_SCORER = (
    "guard: no scorer is named, so it measures KL, length and, on held-out pairs, accuracy and drift; they do not say whether "
    "the text gets better or worse. Name a reward model (guard.scorer) for win rates, guard.keep and guard.stop; or get a "
    "verdict afterwards from a judge model (isdaa report RUN --judge_model NAME)"
)
ASKED_FOR_NONE = "guard: without a scorer, as named, it measures KL, length and, on held-out pairs, accuracy and drift"
FOLDER, BEST = "guard", "best"  # in a run's folder: opponents and candidates; the best model


class Guard(TrainerCallback, ExportableState):
    """Measures every `settings.steps` optimiser steps, and at the last one.

    forward: of the policy that is trained. test: None where there are no win rates. best: None where nothing is kept.
    pairs: held-out pairs with reference logps, measured where there are no win rates.
    Its own state travels in each checkpoint, so that a resumed run goes on with that of the step it resumes from.
    """

    def __init__(
        self,
        settings: GuardConfig,
        looks: Looks,
        forward: PairForward,
        *,
        test: FallTest | None = None,
        best: BestModel | None = None,
        pairs: TokenisedPairs | None = None,
        say: Callable[[str], None] = logger.info,
    ) -> None:
        self.settings, self.looks, self.forward, self.say = settings, looks, forward, say
        self.test, self.best, self.pairs = test, best, pairs
        self.trainer: PreferenceTrainer | None = None
        self.steps: list[int] = []  # of the looks that the test has seen
        self.best_step: int | None = None
        self.best_win_rate: float | None = None
        self.stopped: dict[str, Any] | None = None
        self.cut: list[float] = []  # of this call's looks, the share of responses that the limit cut

    def attach(self, trainer: PreferenceTrainer) -> None:
        """The trainer whose log it writes to. Raises UserError where the run has several processes."""
        if trainer.args.world_size > 1:
            raise UserError(ONE_PROCESS)
        self.trainer = trainer

    # ---- its state ----

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "steps": list(self.steps),
            "best_step": self.best_step,
            "best_win_rate": self.best_win_rate,
            "stopped": self.stopped,
            "test": None if self.test is None else self.test.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.steps, self.stopped = list(state["steps"]), state["stopped"]
        self.best_step, self.best_win_rate = state["best_step"], state["best_win_rate"]
        if self.test is not None and state["test"] is not None:
            self.test.load_state(state["test"])

    # ---- events of the trainer ----

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        saved: Any = state.stateful_callbacks
        if type(self).__name__ in saved:
            self.load_state(saved[type(self).__name__])
        if self.best is not None and not self.best.restore(self.best_step):
            logger.warning("guard: the model of its best step, %s, is missing; it keeps the best one from now on", self.best_step)
            self.best_step = self.best_win_rate = None
        if self.stopped is not None:
            control.should_training_stop = True
        elif self.test is not None:
            from isdaa.evaluation.verdict import power

            assert self.settings.steps is not None
            planned = (-(-state.max_steps // self.settings.steps), len(self.looks.prompts.rows), self.settings.opponent_samples)
            said = power.seen(*planned, what="measurement") if self.settings.stop == "never" else power.stoppable(*planned)
            self.say(f"guard: {said}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        assert self.settings.steps is not None and self.trainer is not None
        step = state.global_step
        if step % self.settings.steps and step < state.max_steps:
            return control
        started = time.perf_counter()
        assert self.trainer.watch is not None
        self.trainer.watch.check_weights()
        try:
            with untouched_random_state():
                found = self.looks.look(self.forward, step)
        except UserError as error:
            raise self.trainer.watch.error(step, f"guard: {error}") from error
        metrics = found.metrics | self._proxies()
        self._note_cut(metrics["guard/truncated"])
        better = found.wins is not None and self._judge(found, step, metrics)
        metrics["time/guard_seconds"] = time.perf_counter() - started
        self._log(metrics, control)
        if better and self.best is not None:
            self.best.keep(step)
        self.trainer.leave_out(time.perf_counter() - started)
        if self.stopped is not None:
            _end(args, control)
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.best is not None:
            self.best.committed(self.best_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.best is not None:
            self.best.close()

    # ---- judging ----

    def _judge(self, found: Measurement, step: int, metrics: dict[str, float]) -> bool:
        """Take in a look with win rates; True where it is the best so far."""
        assert found.wins is not None and self.test is not None
        fall = self.test.update(found.wins, found.kl)
        self.steps.append(step)
        if np.isfinite(fall.lower):  # it is not before a few looks have been taken
            metrics |= {"guard/fall": fall.fall, "guard/fall_low": fall.lower}
        win_rate = metrics["guard/win_rate"]
        better = self.best_win_rate is None or win_rate > self.best_win_rate
        if better:
            self.best_step, self.best_win_rate = step, win_rate
        assert self.best_step is not None
        metrics["guard/best_step"] = self.best_step
        if fall.stop and self.settings.stop == "over-optimised":
            self.stopped = {
                "step": step,
                "peak_step": self.steps[fall.peak],
                "fall": fall.fall,
                "lower": fall.lower,
            }
        return better

    def _note_cut(self, share: float) -> None:
        """Say, the first time that it is so, that many responses have no end."""
        before = self.fragments()
        self.cut.append(share)
        if before is None and (line := self.fragments()) is not None:
            logger.warning("%s", line)

    def fragments(self) -> str | None:
        """What is to be said of responses that the limit cut; None where they are few."""
        own = self.looks.opponents_cut
        if not self.cut or not (many(max(self.cut)) or many(own)):
            return None
        cut = {"its responses": self.cut} | ({} if own is None else {"the reference's": [own]})
        what = "KL and length count tokens up to that limit only" if own is None else "win rate and score are of fragments"
        setting = "evaluation.max_new_tokens" if self.settings.max_new_tokens is None else "guard.max_new_tokens"
        return f"guard: {warning(cut, what, setting, self.looks.sampling.max_new_tokens)}"

    def better(self) -> bool | None:
        """Whether some measurement is shown to be better than the reference (`gains_shown`); None where that is not known."""
        reference = self.looks.reference_wins
        if self.test is None or not self.test.wins or reference is None:
            return None
        shown = gains_shown(np.stack(self.test.wins), float(reference.mean()), reference)
        return None if shown is None else bool(shown.any())

    def _proxies(self) -> dict[str, float]:
        """Accuracy and drift on held-out pairs: all there is without a scorer, and neither predicts the win rate."""
        if self.pairs is None or self.trainer is None:
            return {}
        found = self.trainer.held_out_metrics(self.pairs)
        names = {"accuracy": "rewards/accuracy", "drift_chosen": "drift/chosen", "drift_rejected": "drift/rejected"}
        return {f"guard/{name}": found[metric] for name, metric in names.items()}

    def _log(self, metrics: dict[str, float], control: TrainerControl) -> None:
        assert self.trainer is not None
        wanted = control.should_log
        self.trainer.log(metrics)
        control.should_log = wanted  # a log takes it back, but this step's own is still to come

    # ---- what people read ----

    def summary(self) -> list[str]:
        """What came of it, in a line; where there were no win rates, at most that responses were cut."""
        cut = self.fragments()
        more = [] if cut is None else [cut]
        if self.best_step is None:
            return more
        unsure, shown = self.better() is False, "no measurement is shown to be better than the reference (95 %)"
        if (at := self.stopped) is None:
            advice = f"keep the reference, or judge {self._to_use()} on more prompts" if unsure else f"use {self._to_use()}"
            doubt = f"; {shown}" if unsure else ""
            return [f"guard: {advice}: {self._best()}{doubt}", *more]
        return [
            f"guard: use {self._to_use()}: over-optimised, the win rate fell by {at['fall']:.3f} (at least {at['lower']:.3f}) "
            f"from step {at['peak_step']}, and training stopped at step {at['step']}, whose weights are in model/",
            *([f"guard: the reference may be as good: {shown}"] if unsure else []),
            *more,
        ]

    def _best(self) -> str:
        """The best look's win rate, with its interval, and what the reward model that says so is worth."""
        assert self.test is not None and self.best_step is not None
        wins = self.test.wins[self.steps.index(self.best_step)]
        interval = mean_interval(wins, **self.looks.bootstrap)
        bounds = "" if interval.low is None or interval.high is None else f" [{interval.low:.3f}, {interval.high:.3f}]"
        worth = "".join(f" (its reward model {line})" for line in about(self.looks.scorer)[1:])
        return f"best win rate {interval.mean:.3f}{bounds} on its {len(wins)} prompts{worth}"

    def _to_use(self) -> str:
        """The folder of the best model, or where it may be found."""
        if self.best is not None:
            return f"{self.best.folder} (step {self.best_step})"
        if self.trainer is not None and self.trainer.state.global_step == self.best_step:
            return f"model/ (step {self.best_step}, the last)"
        return f"the checkpoint nearest to step {self.best_step} (guard.keep: best would have kept its model)"

    def facts(self) -> dict[str, Any]:
        """The same as data, for `run.json`."""
        named = self.stopped is not None or (self.best is not None and self.better())
        told: dict[str, Any] = {"use": self._to_use() if named else None}
        told |= {"best_step": self.best_step, "best_win_rate": self.best_win_rate, "stopped": self.stopped}
        return told | {
            "better": self.better(),
            "reference_truncated": self.looks.opponents_cut,
            "reference_length": self.looks.opponents_length,
        }


def _end(args: TrainingArguments, control: TrainerControl) -> None:
    """Make this step the last one, with all that a last step does."""
    control.should_training_stop = control.should_log = True
    control.should_save = control.should_save or args.save_strategy == SaveStrategy.STEPS
    control.should_evaluate = control.should_evaluate or args.eval_strategy == IntervalStrategy.STEPS


class BestModel:
    """`best/` in a run's folder, whole or absent, and always that of the state which a resume starts from.

    Each best model is written as a candidate; `best/` has hard links to the newest one. The candidate that the newest
    checkpoint knows as the best stays until the next checkpoint, for a kill may throw the run back to it.

    write(folder, step): saves the policy as it is now.
    """

    def __init__(self, run_folder: Path, write: Callable[[Path, int], None]) -> None:
        self.folder, self.candidates, self.write = run_folder / BEST, run_folder / FOLDER, write
        self._committed: int | None = None

    def keep(self, step: int) -> None:
        """The policy as it is now is the best so far."""
        self.write(self._candidate(step), step)
        self.link(step)
        self._remove_all_but({step, self._committed})

    def restore(self, step: int | None) -> bool:
        """Make `best/` that of `step` again, or absent where that is None. False where its model is gone."""
        # What a kill left half written or half removed. No other process writes here: the run's folder is locked.
        for left in (*self.candidates.glob(".*-*"), *self.folder.parent.glob(f".*-{BEST}*")):
            remove_tree(left)
        found = True
        if step is None or self._step() != step:
            if step is not None and self._candidate(step).is_dir():
                self.link(step)
            else:
                found = step is None
                _remove(self.folder)
        self._committed = step if found else None
        self._remove_all_but({self._committed})
        return found

    def committed(self, step: int | None) -> None:
        """A checkpoint has been written that knows this step as the best."""
        self._committed = step
        self._remove_all_but({step})

    def close(self) -> None:
        """The run is over: `best/` is all that is needed."""
        self._remove_all_but(())

    def _candidate(self, step: int) -> Path:
        return self.candidates / f"{BEST}-{step}"

    def _step(self) -> int | None:
        record = read_record(self.folder)
        return None if record is None else record.step

    def link(self, step: int) -> None:
        source = self._candidate(step)

        def fill(aside: Path) -> None:
            shutil.copytree(source, aside, dirs_exist_ok=True, copy_function=link_or_copy)

        write_folder_atomically(self.folder, fill)

    def _remove_all_but(self, steps: Collection[int | None]) -> None:
        kept = {self._candidate(step) for step in steps if step is not None}
        for folder in self.candidates.glob(f"{BEST}-*"):
            if folder not in kept:
                _remove(folder)


def _remove(folder: Path) -> None:
    """Take a folder away at once, and its content after that."""
    if folder.is_dir():
        aside = folder.parent / f".old-{folder.name}"
        remove_tree(aside)
        os.rename(folder, aside)
        remove_tree(aside)


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Whatever draws random numbers inside, the ones after it are those that would have come without it."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


# ---------------------------------------------------------------------------------------------------------------------
# From a run's configuration


def _labeller(config: Config, scorer: Scorer) -> list[str]:
    """A line where a reward model judges a policy that is trained on its own labels; the gold reward is what is meant."""
    if not config.trains_on_labelled or config.label_scorer != config.guard_scorer or isinstance(scorer, GoldScorer):
        return []
    return [
        f"scorer {scorer.name} labelled the pairs that the policy is trained on: its win rate rises whatever the responses are "
        "worth; watch KL, and judge by a reward model trained on other pairs or by a judge model (--judge_model)"
    ]


def guard_of(
    run: Run,
    tokenizer: Any,
    forward: PairForward,
    precision: str,
    *,
    start: str | None,
    identity: Mapping[str, Any],
    held_out: TokenisedPairs | None,
    record: Callable[[int], ModelRecord],
) -> Guard | None:
    """The guard that a run asks for, its opponents drawn and scored; None where it asks for none.

    forward: of the policy before its first step. precision: of its passes. start: where it came from. identity: of its weights
    as loaded, as JSON-able data. record: of the policy at a step, for the model that is kept.
    """
    config, settings = run.config, run.config.guard
    if settings.steps is None:
        return None
    config = config.model_copy(update={"align": config.align.model_copy(update={"precision": precision})})
    name = config.guard_scorer
    scorer = None
    if name is not None:
        limit, position = config.tokenization.max_prompt_length, config.scorer.position
        scorer = load_scorer(name, max_prompt_length=limit, position=position, label=config.scorer.label)
        run.say("align", [f"guard: scorer {scorer.name}: {line}" for line in about(scorer)])
        own = run.state["stages"]["align"].get("trained_on")
        run.say("align", [f"warning: guard: {line}" for line in learnt_alike(scorer, [own]) + _labeller(config, scorer)])
    else:
        run.say("align", [ASKED_FOR_NONE if "none" in (settings.scorer, config.evaluation.scorer) else NO_SCORER])
    prompts = guard_prompts(run, tokenizer)
    if settings.stop != "never" and scorer is not None:
        run.pin("align", **{"guard prompts": prompts.block, "guard scorer": scorer.digest})
    path = config.reference.path
    if path is not None:
        identity = {"model": other_digest(config, path), "dtype": config.model.dtype}

    def load() -> PairForward:
        model = policy_of(run, tokenizer, start) if path is None else other_model(config, path)
        return prepare(
            model.requires_grad_(False),
            probe=config.align.probe,
            longest_row=longest_row(config),
            attention=config.align.attention,
            precision=precision,
        )

    own = config.lora.rank > 0 and (path is None or is_start(config, path, _base_of(forward.model)))
    reference = Reference(load, forward if own else None, precision)

    def write(folder: Path, step: int) -> None:
        # Quantised weights take no adapter in: it is kept as checkpoints keep it.
        alone = config.lora.rank > 0 and (not merges(config, forward.model) or getattr(forward.model, "is_quantized", False))
        files = described(record(step), run.folder / BEST, adapter=alone)
        save_model(forward.model, tokenizer, folder, files, merge=not alone, stop_ids=ending_ids(tokenizer))

    looks = Looks(config, prompts, reference, scorer, identity=identity, folder=run.folder / FOLDER)
    if scorer is None:
        few = None if held_out is None else [held_out[i] for i in range(min(settings.prompts, len(held_out)))]
        return Guard(settings, looks, forward, pairs=None if few is None else TokenisedPairs(few))
    best = BestModel(run.folder, write) if settings.keep == "best" else None
    return Guard(settings, looks, forward, test=new_test(), best=best, say=lambda line: run.say("align", [line]))


def _base_of(adapted: Any) -> str | None:
    name: str | None = adapted.peft_config["default"].base_model_name_or_path
    return name


def new_test() -> FallTest:
    from isdaa.evaluation.verdict.sequential import FallTest

    return FallTest()
