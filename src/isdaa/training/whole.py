"""The Trainer's checkpoints, made whole: for every trainer that this project runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from isdaa.errors import UserError
from isdaa.training.checkpoints import rotate, write_checkpoint


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
        if self.args.should_save:
            rotate(folder.parent, self.args.save_total_limit)

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
