"""A run that is not finite any more ends at once: loss, gradient norm and weights are watched at every optimiser step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from isdaa.distributed import everyones, once
from isdaa.errors import UserError
from isdaa.models.finite_weights import listed, not_finite, suspicious
from isdaa.training.trainer.checkpoints import newest_complete_checkpoint

logger = logging.getLogger(__name__)

STILL_STEPS = 20  # of a gradient of exactly 0, before the run says so
ROWS = 6  # that an error names


class FiniteSteps:
    """Mixed in before a `transformers.Trainer`: what is not finite ends the run with a UserError (docs/guard.md).

    Loss and gradient norm (before clipping, which turns an infinite one into updates of 0) are read before the optimizer steps,
    so that the weights stay those of the last finite step. The weights are read where a log, checkpoint, evaluation or the end
    follows their step, else with the next step's loss: a device is waited for once a step. No checkpoint is written of what is
    not finite. A gradient of exactly 0 for 20 steps is a warning, unless the loss is 0 as well.
    """

    watch: Watch | None = None

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's. Raises UserError where loss, gradient or weights are not finite any more."""
        # The filter would log the mean of other steps, or 0.0, in place of a loss that is not finite.
        self.args.logging_nan_inf_filter = False
        self.watch = Watch(self)
        self.add_callback(self.watch)
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.remove_callback(self.watch)

    def training_step(self: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer's, with its loss and rows remembered until the step has shown that it is finite."""
        seen = [(inputs["input_ids"], inputs["attention_mask"])] if "attention_mask" in inputs else []
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if self.watch is not None:
            self.watch.saw(loss, seen)
        return loss

    def _get_grad_norm(self: Any, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)  # type: ignore[misc]
        if self.watch is not None:
            self.watch.norm = norm
        return norm

    def satisfied(self, losses: Tensor, seen: Sequence[Any]) -> Tensor:
        """A bool: whether the losses of a step, (micro-batches,), leave nothing to learn."""
        return (losses == 0).all()

    def rows_of(self: Any, losses: Tensor, seen: Sequence[Any]) -> tuple[bool, list[str]]:
        """(whether their loss is not finite, names) of this process's rows of a step: of the micro-batches at fault, if any."""
        broken = ~losses.isfinite()
        chosen = [batch for batch, bad in zip(seen, broken.tolist(), strict=True) if bad or not bool(broken.any())]
        rows = self.train_dataset
        columns = ["input_ids"] if "input_ids" in rows.column_names else ["chosen_ids", "rejected_ids"]
        wanted = set()
        for batch in chosen:
            for input_ids, mask in batch:
                ids = [tuple(row[kept].tolist()) for row, kept in zip(input_ids, mask.bool(), strict=True)]
                half = len(ids) // len(columns)  # the chosen ones come first
                wanted |= set(zip(*(ids[i * half : (i + 1) * half] for i in range(len(columns))), strict=True))
        names = rows["id"] if "id" in rows.column_names else [f"row {i}" for i in range(len(rows))]
        content = zip(*(rows[name] for name in columns), strict=True)
        return bool(broken.any()), [str(n) for n, row in zip(names, content, strict=True) if tuple(map(tuple, row)) in wanted]

    def advice(self: Any) -> list[str]:
        """What may help, with what it is now."""
        args = self.args
        found = [f"a smaller learning rate (now {args.learning_rate:g})"]
        if args.max_grad_norm <= 0:
            found.append("max_grad_norm 1 (now 0: gradients are not clipped)")
        if any(p.dtype == torch.float16 for p in self.model.parameters()):
            found.append("weights in float32 or bfloat16 (now float16)")
        if args.adam_epsilon < 1e-8:
            found.append(f"adam_epsilon 1e-8 (now {args.adam_epsilon:g})")
        return found


class Watch(TrainerCallback):
    """What is known of the steps of one call of `train` that have not yet shown that they are finite."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.losses: list[Tensor] = []  # of the micro-batches of this step
        self.seen: list[Any] = []  # what names their rows
        self.norm: Any = None
        self.stepped: tuple[Tensor, list[Tensor], list[Any]] | None = None  # (suspicion, losses, seen) of the step before
        self.still = 0

    def saw(self, loss: Tensor, seen: Any) -> None:
        """One micro-batch of this step: its loss, and what names its rows."""
        self.losses.append(loss.detach())
        self.seen.append(seen)

    # ---- events of the trainer ----

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        losses, norm = torch.stack(self.losses), self._norm()
        suspected = losses.new_zeros((), dtype=torch.bool) if self.stepped is None else self.stepped[0]
        still = (norm == 0) & ~self.trainer.satisfied(losses, self.seen)
        loss_broken, norm_broken, weights_broken, still_now = self._anywhere(
            ~losses.isfinite().all(), ~norm.isfinite(), suspected.to(losses.device), still
        )
        if weights_broken:
            self.check_weights()
        if loss_broken or norm_broken:
            total = self._summed(losses.sum())
            what = f"the loss is not finite ({total:g})" if loss_broken else f"the gradient's norm is not finite ({norm:g})"
            raise self.error(state.global_step + 1, what, self.losses, self.seen)
        self.still = self.still + 1 if still_now else 0
        if self.still == STILL_STEPS:
            logger.warning(
                "step %d: the gradient has been exactly 0 for %d steps, though the loss is not: nothing is learnt. The loss is "
                "flat here, or its numbers are too small; try a smaller beta, pair weights above 0, or float32",
                state.global_step + 1,
                STILL_STEPS,
            )

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.stepped = (suspicious(self._weights()), self.losses, self.seen)
        self.losses, self.seen, self.norm = [], [], None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stepped is not None and (control.should_save or control.should_training_stop):  # other callbacks may change them
            self.stepped = (suspicious(self._weights()), *self.stepped[1:])
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self.check_weights()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.check_weights()

    # ---- what is not finite ----

    def check_weights(self) -> None:
        """Raises UserError where the last optimiser step left weights that are not finite. Every process must call it."""
        if self.stepped is None:
            return
        suspected, losses, seen = self.stepped
        self.stepped = None
        if not self._anywhere(suspected)[0]:
            return
        names = sorted({name for found in everyones(self._broken) for name in found})
        if names:
            step = self.trainer.state.global_step
            raise self.error(step, f"weights are not finite after its update ({listed(names)})", losses, seen)

    def error(self, step: int, what: str, losses: Sequence[Tensor] = (), seen: Sequence[Any] = ()) -> UserError:
        """The end of the run, in a line. Every process must call it: each knows rows of its own."""
        trainer = self.trainer
        rows = ""
        if losses:
            found = everyones(lambda: trainer.rows_of(torch.stack(list(losses)), seen))
            broken = any(bad for bad, _ in found)
            names = list(dict.fromkeys(name for bad, part in found for name in part if bad or not broken))
            rows = f", in {some_rows(names)}" if names else ""
            rows += " (all of the step)" if names and not broken else ""
        hint = f"try {', '.join(trainer.advice())}, in another output_dir"
        if trainer.state.global_step == 0 and "loss" in what:  # which no step has had a part in
            hint = "no update has been made yet: check these rows and the model that training starts from"
        folder = Path(trainer.args.output_dir)
        kept = once(lambda: newest_complete_checkpoint(folder))
        return UserError(
            f"step {step}: {what}{rows}. The run has stopped, and would stop here again: {hint};",
            f"the last finite checkpoint is {kept}" if kept else "there is no checkpoint yet",
        )

    def _weights(self) -> list[Tensor]:
        return [getattr(p, "ds_tensor", p) for p in self.trainer.model.parameters() if p.requires_grad]

    def _broken(self) -> list[str]:
        trained = ((n, getattr(p, "ds_tensor", p)) for n, p in self.trainer.model.named_parameters() if p.requires_grad)
        return not_finite(trained)

    def _norm(self) -> Tensor:
        """() norm of the gradient before clipping, on the loss's device."""
        norm = self.norm
        if norm is None:
            gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
            # DeepSpeed has none here: it took the step with the backward pass, and the weights will tell.
            norm = torch.nn.utils.get_total_norm(gradients) if gradients else 1.0
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
        return norm.detach().to(self.losses[0].device)

    def _anywhere(self, *flags: Tensor) -> list[bool]:
        """Each flag, true where it is on any process."""
        return [value > 0 for value in self._summed(torch.stack(flags).float()).tolist()]

    def _summed(self, values: Tensor) -> Tensor:
        """Over all processes."""
        several = self.trainer.args.world_size > 1
        return self.trainer.accelerator.reduce(values, "sum") if several else values


def some_rows(names: Sequence[str]) -> str:
    """Names of rows, not too many of them."""
    more = f" and {len(names) - ROWS} more rows" if len(names) > ROWS else ""
    return ("row " if len(names) == 1 else "rows ") + ", ".join(names[:ROWS]) + more
