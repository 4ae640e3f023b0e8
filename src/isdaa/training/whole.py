"""The Trainer's checkpoints, made whole: for every trainer that this project runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from isdaa.errors import UserError
from isdaa.training.checkpoints import rotate, write_checkpoint
from isdaa.training.hub import model_files, push_checkpoint, upload


class WholeCheckpoints:
    """Mixed in before a `transformers.Trainer`: `checkpoint-N` is written aside, synced, listed, and only then named.

    before_rename(folder, step) writes further files into a checkpoint.
    """

    before_rename: Callable[[Path, int], None] | None = None

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's. Raises UserError where FSDP would save weights in pieces that no other program reads."""
        if self.is_fsdp_enabled and "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            raise UserError("fsdp_state_dict_type: checkpoints are model folders; set it to FULL_STATE_DICT in accelerate's file")
        return super().train(*args, **kwargs)  # type: ignore[misc]

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

        write_checkpoint(folder, fill, main=self.args.should_save, barrier=self.accelerator.wait_for_everyone)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            rotate(folder.parent, self.args.save_total_limit)

    # ---- models that a script saves, and the Hub ----

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, with card and record beside the model."""
        super().save_model(output_dir, True)  # type: ignore[misc]
        if _internal_call:
            return
        self._describe(Path(str(self.args.output_dir if output_dir is None else output_dir)))
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
