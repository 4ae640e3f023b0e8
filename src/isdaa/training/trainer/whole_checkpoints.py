"""The Trainer's checkpoints, made whole: for every trainer that this project runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from isdaa.distributed import once
from isdaa.errors import UserError
from isdaa.files import share
from isdaa.foreign import check_shape, read_json, readable
from isdaa.manifest import MANIFEST, write_manifest
from isdaa.models.saving import savable
from isdaa.terminal import working
from isdaa.training.trainer.checkpoints import check_resumable, newest_complete_checkpoint, rotate, write_checkpoint
from isdaa.training.trainer.finite_steps import FiniteSteps
from isdaa.training.trainer.hub_upload import model_files, push_checkpoint, upload

logger = logging.getLogger(__name__)

ELSE = "resume from another checkpoint"
STATE = {  # of a `trainer_state.json`, what decides how a run goes on
    "global_step": int,
    "stateful_callbacks?": {"*": (dict, list)},
    "log_history?": [dict],
    **dict.fromkeys(("max_steps?", "best_global_step?", "train_batch_size?"), (int, None)),
    **dict.fromkeys(("best_model_checkpoint?", "trial_name?"), (str, None)),
    **dict.fromkeys(("epoch?", "best_metric?", "num_train_epochs?", "total_flos?"), (float, None)),
    **dict.fromkeys(("save_steps?", "logging_steps?", "eval_steps?"), (float, None)),
}
SMALL_FILES = 100_000  # bytes of a checkpoint's small files: configuration, states of the trainer and of random numbers


class Basis(TrainerCallback, ExportableState):
    """What a resumed run must share with its start, or be warned of, by name; it travels in every checkpoint's state."""

    def __init__(self, must: dict[str, Any], may: dict[str, Any]) -> None:
        self.must, self.may = must, may

    def state(self) -> dict[str, Any]:
        """As JSON-able data: `must` be the same, `may` change for the steps to come."""
        return {"must": self.must, "may": self.may}

    def check(self, checkpoint: str) -> None:
        """Raises UserError where the checkpoint is of a run that this one would not go on with; warns of another schedule."""
        try:
            kept = read_json(Path(checkpoint) / TRAINER_STATE_NAME, finite=False)["stateful_callbacks"][type(self).__name__]
        except (UserError, KeyError, TypeError):
            return  # not of this project, or of an earlier revision
        for name, value in self.must.items():
            if (before := kept["must"].get(name, value)) != value:
                raise UserError(
                    f"{checkpoint}: its run has {name} {before}, this one {value}, and resuming would mix the two; give the old "
                    "value, or start a new run from the checkpoint's model in another output_dir"
                )
        changed = [
            f"{name} {kept['may'][name]}, now {value}"
            for name, value in self.may.items()
            if kept["may"].get(name, value) != value
        ]
        if changed:
            told = "; ".join(changed)
            logger.warning("%s: the run began with %s; from here on the learning rate follows the new schedule", checkpoint, told)


class TakenOver(TrainerCallback):
    """The state of another run's optimiser, with which a run begins; learning rate and all other settings are the run's own."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step:  # a resumed run has one of its own
            return
        with readable(self.checkpoint, "the states of its optimiser cannot be loaded", "leave continue_optimizer out"):
            before = torch.load(self.checkpoint / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
            own = optimizer.state_dict()
            theirs, ours = ([len(group["params"]) for group in found["param_groups"]] for found in (before, own))
            if theirs != ours:
                raise ValueError(f"it has {sum(theirs)} weight tensors, the model trains {sum(ours)}")
            optimizer.load_state_dict(own | {"state": before["state"]})


class WholeCheckpoints(FiniteSteps):
    """Mixed in before a `transformers.Trainer`: `checkpoint-N` is written aside, synced, listed, and only then named; a run that
    is not finite any more ends (`FiniteSteps`).

    before_rename(folder, step) writes further files into a checkpoint.
    """

    before_rename: Callable[[Path, int], None] | None = None
    _optimizer_kind: str | None = None

    def train(self: Any, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; True goes on from the newest checkpoint that is complete.

        Raises UserError where FSDP would save weights in pieces that no other program reads, and where the checkpoint to go on
        from is damaged, not of the user's own run, or of a run with other batches, data or settings.
        """
        if self.is_fsdp_enabled and "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            raise UserError("fsdp_state_dict_type: checkpoints are model folders; set it to FULL_STATE_DICT in accelerate's file")
        self.remove_callback(Basis)
        basis = Basis(self.must_stay(), self.may_change())
        self.add_callback(basis)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = once(lambda: newest_complete_checkpoint(self.args.output_dir)) or True
        if isinstance(resume_from_checkpoint, (str, Path)):
            resume_from_checkpoint = str(resume_from_checkpoint)
            with working(f"reading {Path(resume_from_checkpoint).name}"):
                once(partial(check_resumable, resume_from_checkpoint))  # the key may lie on the main process's machine alone
            state = Path(resume_from_checkpoint, TRAINER_STATE_NAME)
            if state.is_file():
                check_shape(read_json(state, finite=False), STATE, str(state))
            basis.check(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def must_stay(self: Any) -> dict[str, Any]:
        """What every step of a run must share, by name, as JSON-able data."""
        args = self.args
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if self._optimizer_kind is None:  # before the first start, when one that is there was given by the caller
            given = args.optim if self.optimizer is None else type(self.optimizer).__name__
            self._optimizer_kind = str(getattr(given, "value", given))
        return {
            "a global batch of": f"{per_step} rows",
            "a data set of": f"{len(self.train_dataset)} rows",
            "seed": args.seed if args.data_seed is None else args.data_seed,
            "optimizer": self._optimizer_kind,
        }

    def may_change(self: Any) -> dict[str, Any]:
        """Settings of the learning rate's course."""
        args = self.args
        names = ("learning_rate", "lr_scheduler_type", "warmup_steps")
        found = {name: str(getattr(getattr(args, name), "value", getattr(args, name))) for name in names}
        if not found["lr_scheduler_type"].startswith("constant"):
            found["length"] = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
        return found

    # ---- a resume ----

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with readable(resume_from_checkpoint, "its model cannot be loaded", ELSE):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        with readable(checkpoint, "the states of its optimiser cannot be loaded", ELSE):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _load_rng_state(self: Any, checkpoint: str | None) -> None:
        with readable(checkpoint, "its states of random numbers cannot be loaded", ELSE):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]

    def _load_callback_state(self: Any) -> None:
        with readable(TRAINER_STATE_NAME, "the states of callbacks in it cannot be used", ELSE):
            super()._load_callback_state()  # type: ignore[misc]

    # ---- a resume at the end ----

    def ended(self: Any) -> bool:
        """Whether no step is left, which also ends the Trainer's loop: it looks only after one more step (fractional epochs)."""
        if 0 < self.state.max_steps <= self.state.global_step:
            self.control.should_training_stop = True
        return bool(self.control.should_training_stop)

    def get_batch_samples(self: Any, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """As the Trainer's, but nothing where training is at its end."""
        if self.ended():
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]

    def _maybe_log_save_evaluate(self: Any, *args: Any, **kwargs: Any) -> None:
        # Without a step since the start there is nothing new: what the checkpoint's state still wants was done before it.
        if self.state.global_step > self._initial_global_step:
            super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]

    # ---- checkpoints ----

    def _checkpoint_bytes(self: Any) -> float | None:
        """About how much a checkpoint takes: weights, of an adapter its own alone, and the optimiser's states."""
        model = self.accelerator.unwrap_model(self.model)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None  # each process has a part alone
        trained = [p for p in model.parameters() if p.requires_grad]
        saved = trained if isinstance(model, PeftModel) else list(model.parameters())
        states = [] if self.optimizer is None else [v for s in self.optimizer.state.values() for v in s.values()]
        tensors = [*saved, *([] if self.args.save_only_model else [v for v in states if isinstance(v, torch.Tensor)])]
        return float(SMALL_FILES + sum(t.numel() * t.element_size() for t in tensors))

    def _save_checkpoint(self: Any, model: nn.Module, trial: Any = None) -> None:
        self.store_flos()
        step = self.state.global_step
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{step}"

        def fill(aside: Path) -> None:
            where = str(aside)
            self.save_model(where, _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(where)
                self._save_scaler(where)
                self._save_rng_state(where)
            if self.args.should_save:
                # A pickle with the paths of this machine; nothing reads it.
                Path(where, "training_args.bin").unlink(missing_ok=True)
                self._note_callback_states()
                self.state.save_to_json(os.path.join(where, TRAINER_STATE_NAME))
                if self.before_rename is not None:
                    self.before_rename(aside, step)

        barrier, need = self.accelerator.wait_for_everyone, self._checkpoint_bytes()
        with working(f"saving {folder.name}"):
            write_checkpoint(folder, fill, main=self.args.should_save, barrier=barrier, need=need)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            rotate(folder.parent, self.args.save_total_limit)

    def _save(self: Any, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with savable(self.accelerator.unwrap_model(self.model)):
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        if self.args.should_save:  # what a script saves is written in place, beside files of its own
            share(Path(str(self.args.output_dir if output_dir is None else output_dir)).glob("*.safetensors"))

    # ---- models that a script saves, and the Hub ----

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, with card and record beside the model."""
        super().save_model(output_dir, True)  # type: ignore[misc]
        if _internal_call:
            return
        folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
        self._describe(folder)
        if self.args.should_save and (folder / MANIFEST).is_file():  # of the model that has been replaced
            write_manifest(folder)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self: Any, *args: Any, **kwargs: Any) -> None:
        """This project's card and record in the output folder; what other trainers' cards are told is not used."""
        self._describe(Path(self.args.output_dir))

    def _describe(self: Any, folder: Path) -> None:
        if self.args.should_save and self.before_rename is not None:
            self.before_rename(folder, self.state.global_step)

    def push_to_hub(
        self: Any,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model into the output folder and upload it, as the Trainer does; kwargs were for another card."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card()
        self._finish_current_push()
        folder = Path(self.args.output_dir)
        message = commit_message or "End of training"
        return upload(self, folder, model_files(folder), message, blocking=blocking, token=token, revision=revision)

    def _push_from_checkpoint(self: Any, checkpoint_folder: str) -> None:
        """Start the upload of a checkpoint; one is left out while another is on its way, unless `hub_always_push`."""
        if self.is_world_process_zero():
            push_checkpoint(self, Path(checkpoint_folder))

    def _note_callback_states(self: Any) -> None:
        """What the Trainer itself does before it writes its state."""
        noted: Any = self.state.stateful_callbacks
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name = type(callback).__name__
                if isinstance(noted.get(name), list):
                    noted[name].append(callback.state())
                else:
                    noted[name] = callback.state()
