"""`PreferenceTrainer`: transformers' Trainer with the loss, the batches and the checkpoints of direct alignment.

The Trainer keeps the loop, resuming, schedules, logging and the distributed strategies. Ours are: a loss that is the
mean over the pairs of the GLOBAL batch (docs/method.md), weights that span it, figures that are read back only when they are
logged, evaluation on held-out pairs, and checkpoints that are whole or absent.

Legend: B pairs of a piece or micro-batch, N pairs of the global batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as hf_logging

from isdaa.data.collation import PairBatch, collate
from isdaa.data.encoder import VERSION
from isdaa.data.tokenize_pairs import ending_ids
from isdaa.errors import UserError
from isdaa.models.packed.forward import PASS_TOKENS, PairForward, ResponseLogps, disable_dropout, pass_tokens
from isdaa.models.packed.patched_forward import SHARED_PREFIX
from isdaa.models.saving import write_generation_config
from isdaa.objectives.objective import Objective, ObjectiveOutput, PairLogps
from isdaa.objectives.weights import batch_weights
from isdaa.record import read_record
from isdaa.terminal import progress as show_progress
from isdaa.training.trainer.authors import FAR, HELP
from isdaa.training.trainer.batches import BEHAVIOUR_COLUMNS, GlobalBatchSampler, TokenisedPairs, shard, tokenised
from isdaa.training.trainer.callbacks import StallWarning, TrainingProgress, WholeIntervals, warn_about_start
from isdaa.training.trainer.checkpoints import newest_complete_checkpoint
from isdaa.training.trainer.finite_steps import some_rows
from isdaa.training.trainer.packing import MicroBatch, Piece, piece_tokens, split_by_tokens
from isdaa.training.trainer.pair_metrics import COLUMNS, Figures, gathered, pair_figures
from isdaa.training.trainer.whole_checkpoints import WholeCheckpoints

logger = logging.getLogger(__name__)


class PreferenceTrainer(WholeCheckpoints, Trainer):
    """Minimises an `Objective` over tokenised pairs that carry reference logps; `preference_trainer` makes one.

    A `transformers.Trainer`. Dropout is switched off in the model, LoRA's included (docs/architecture.md).

    Args:
        model: the policy, a transformers causal LM or a peft model around one.
        objective: what is minimised.
        args: transformers' own.
        forward: `models.packed.forward.prepare(model)`.
        train_dataset: `TokenisedPairs` or rows for it, with `reference_*_logps`.
        eval_dataset: the same of held-out pairs.
        tokenizer: saved into every checkpoint.
        callbacks: transformers' own.
        starts_at_reference: whether policy and reference start as the same model; their difference at step 0 is logged then,
            and said aloud where it is more than rounding.
        went_on: whether the policy has been trained from this reference before.
        batch_tokens: a micro-batch of more tokens goes through the model in parts; loss and gradient stay the same. None: on a
            CPU, what a pass of a few seconds holds; on a GPU no limit.
        group_by_prompt: whether pairs of one prompt are read one after the other and share its forward pass.
        before_rename: called with folder and step; writes further files into a checkpoint.
        description: of the progress bar.
        kwargs: further arguments of `transformers.Trainer`.

    Raises:
        ValueError: rows without reference logps.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        args: TrainingArguments,
        forward: PairForward,
        train_dataset: Any,
        eval_dataset: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        starts_at_reference: bool = True,
        went_on: bool = False,
        batch_tokens: int | None = None,
        group_by_prompt: bool = False,
        before_rename: Callable[[Path, int], None] | None = None,
        description: str = "align",
        **kwargs: Any,
    ) -> None:
        args.remove_unused_columns = False
        if args.n_gpu > 1:
            # DataParallel would copy the model and cut packed rows apart at every step.
            logger.warning("one process uses one of %d GPUs", args.n_gpu)
            args._n_gpu = 1
        # The Trainer writes this into the model's config, and from there into the saved folder; ours stays as it was.
        args.use_cache = bool(getattr(getattr(model, "config", None), "use_cache", True))
        self.objective: Objective = objective
        self.pair_forward, self.batch_tokens = forward, batch_tokens
        self.tokenizer, self.before_rename = tokenizer, before_rename
        self.starts_at_reference, self.went_on = starts_at_reference, went_on
        train = _with_reference(train_dataset, "train")
        held_out = None if eval_dataset is None else _with_reference(eval_dataset, "eval")
        disable_dropout(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=cast(Any, collate),
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=[WholeIntervals(), *callbacks],
            **kwargs,
        )
        if self.is_fsdp_enabled:
            # FSDP's own cast would compute norms in half precision, too. Autocast, which the reference's logps come from,
            # does not; its price is that weights are gathered in fp32.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        hf_logging.disable_progress_bar()  # a bar of their own for each saved file; ours shows the run
        for unwanted in (PrinterCallback, ProgressCallback):
            self.remove_callback(unwanted)
        if batch_tokens is None:
            self.batch_tokens = piece_tokens(model, args.device, objective, args.world_size)
        self.progress = TrainingProgress(description)
        self.add_callback(self.progress)
        self.stall = StallWarning()
        self.sampler = GlobalBatchSampler(
            len(train),
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.world_size,
            args.process_index,
            args.seed if args.data_seed is None else args.data_seed,
            lengths=train.lengths(),
            arrange="balanced" if forward.mode == SHARED_PREFIX else "sorted",
            groups=train.prompt_groups() if group_by_prompt else None,
        )
        self._tables: list[Tensor] = []  # figures since the last log
        self._interval_started: float | None = None
        self._interval_pairs = 0
        self._passes = [0, 0]  # of the step in work: begun, all
        self._parameters = sum(p.numel() for p in model.parameters())

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """Micro-batches of this rank. Not prepared by accelerate: our sampler shards by itself, exactly."""
        workers, rows = self.args.dataloader_num_workers, cast(TokenisedPairs, self.train_dataset)
        sampler = _Following(self.sampler, self)
        return DataLoader(rows, batch_sampler=sampler, collate_fn=collate, num_workers=workers)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list[Any], int | None]:
        """The micro-batches of one optimiser step, on the device, and N, the valid pairs of all ranks.

        Where weights span the global batch and it takes more than one forward pass, they are computed here first.
        """
        if self.ended():
            return [], None
        if self._interval_started is None:
            self._interval_started = time.perf_counter()
        batches: list[PairBatch] = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if not batches:
            return [], None
        pairs = self._over_ranks(sum(int(batch.valid.sum()) for batch in batches), "sum")
        self._interval_pairs += pairs
        micro = [MicroBatch(self.pieces_of(batch, device, self.batch_tokens)) for batch in batches]
        self._passes = [0, sum(len(m.pieces) for m in micro)]
        if self.objective.needs_batch and sum(len(m.pieces) for m in micro) > 1:
            self.weigh(micro)
        return micro, pairs

    def pieces_of(self, batch: PairBatch, device: torch.device, budget: int | None) -> list[Piece]:
        parts = split_by_tokens(batch, budget)
        if budget is not None:
            # Sharded models gather their weights in each forward pass: every rank must make as many of them.
            most = self._over_ranks(len(parts), "max")
            if len(parts) < most:
                parts = split_by_tokens(batch, budget, at_least=most)
        return [Piece.of(part, device) for part in parts]

    @property
    def policy(self) -> nn.Module:
        """The model as evaluation calls it: sharded where it is sharded, but without DDP around it."""
        return cast(nn.Module, self.model)

    def _over_ranks(self, number: int, how: str) -> int:
        if self.args.world_size == 1:
            return number
        found = self.accelerator.gather(torch.tensor([number], device=self.args.device))
        return int(found.sum() if how == "sum" else found.max())

    # ---- weights that span the global batch ----

    @torch.no_grad()
    def weigh(self, micro: list[MicroBatch]) -> None:
        """Final weights of all pieces, from a pass without gradients over the whole global batch."""
        training = self.policy.training
        self.policy.eval()
        raw = []
        pieces = [piece for m in micro for piece in m.pieces]
        for number, piece in enumerate(pieces):
            self.progress.within(self.state.global_step + 1, f"weights, pass {number + 1} of {len(pieces)}")
            with self.compute_loss_context_manager():
                pairs, _ = self._pair_logps(self.policy, piece)
            raw.append(self.objective.raw_weights(pairs)[1])
        self.policy.train(training)
        valid = torch.cat([piece.batch.valid for m in micro for piece in m.pieces])
        index = torch.cat([piece.batch.index for m in micro for piece in m.pieces])
        final = self.global_weights(torch.cat(raw), valid, index)
        start = 0
        for m in micro:
            m.weights = []
            for piece in m.pieces:
                m.weights.append(final[start : start + len(piece.batch)])
                start += len(piece.batch)

    def global_weights(self, raw: Tensor, valid: Tensor, index: Tensor) -> Tensor:
        """Final weights (P,) of this rank's pairs from their own weights, validity and row numbers, each (P,).

        Pairs are put into the order of their row numbers, so that a permutation by (seed, step) depends on which pairs
        are in the global batch, and not on how it is split over ranks and micro-batches.
        """
        exact = torch.float32 if raw.device.type == "mps" else torch.float64  # of row numbers; MPS has no more
        table = torch.stack([raw.to(exact), valid.to(exact), index.to(exact)], 1)
        if self.args.world_size > 1:
            table = self.accelerator.gather(table)
        order = torch.argsort(2 * table[:, 2] + (1 - table[:, 1]), stable=True)  # a fill-in after the pair that it repeats
        settings = (self.objective.weight, self.objective.normalize, self.sampler.seed, self.state.global_step)
        ordered = batch_weights(table[order, 0].to(raw.dtype), *settings, table[order, 1] > 0)
        final = torch.empty_like(ordered).index_copy(0, order, ordered)
        return final[self.args.process_index * len(raw) :][: len(raw)]

    # ---- the loss ----

    def _pair_logps(self, model: nn.Module, piece: Piece) -> tuple[PairLogps, ResponseLogps]:
        batch, wpo = piece.batch, self.objective.needs_wpo
        logps = self.pair_forward(model, piece.input_ids, None, piece.layout, with_wpo=wpo)
        assert batch.reference_chosen_logps is not None and batch.reference_rejected_logps is not None
        pairs = PairLogps(
            policy_chosen_logps=logps.chosen_logps,
            policy_rejected_logps=logps.rejected_logps,
            reference_chosen_logps=batch.reference_chosen_logps,
            reference_rejected_logps=batch.reference_rejected_logps,
            chosen_lengths=batch.chosen_scored,
            rejected_lengths=batch.rejected_scored,
            behaviour_chosen_logps=batch.behaviour_chosen_logps,
            behaviour_rejected_logps=batch.behaviour_rejected_logps,
            policy_chosen_wpo=logps.chosen_wpo,
            policy_rejected_wpo=logps.rejected_wpo,
        )
        return pairs, logps

    def losses_of(self, model: nn.Module, piece: Piece, weights: Tensor | None = None) -> tuple[ObjectiveOutput, Tensor]:
        """The objective's output, and (B, K) figures. weights: (B,) final ones, where they were computed ahead."""
        batch = piece.batch
        pairs, logps = self._pair_logps(model, piece)
        raw = self.objective.raw_weights(pairs)[1]
        if weights is None:
            spans = self.objective.needs_batch and model.training
            weights = self.global_weights(raw, batch.valid, batch.index) if spans else raw
        out = self.objective(pairs, weights, valid=batch.valid)
        figures = pair_figures(self.objective, batch, logps, out, raw, self.state.global_step)
        return out, figures

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: Piece,
        return_outputs: bool = False,
        num_items_in_batch: int | Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Any:
        """world_size · Σ_local / N_global of one piece: the mean over ranks of its sum is the global batch's loss.

        Without `num_items_in_batch` N is the piece's own number of valid pairs.
        """
        out, figures = self.losses_of(model, inputs, weights)
        self._tables.append(figures)
        batch = inputs.batch
        losses = out.losses if batch.weights is None else out.losses * batch.weights.to(out.losses.dtype)
        divisor = batch.valid.sum() if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() * (self.args.world_size / divisor)
        return (loss, out) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: int | Tensor | None = None) -> Tensor:
        """Forward and backward of one micro-batch, piece by piece. No division by accumulation steps comes on top."""
        if not model.training:
            model.train()
        deepspeed = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        state = self.accelerator.gradient_state
        sync = state.sync_gradients
        total = torch.zeros((), device=self.args.device)
        for number, piece in enumerate(inputs.pieces):
            last = number == len(inputs.pieces) - 1
            weights = None if inputs.weights is None else inputs.weights[number]
            self._passes[0] += 1
            self.progress.within(self.state.global_step + 1, "pass {} of {}".format(*self._passes))
            state._set_sync_gradients(sync and last)
            with nullcontext() if last or self.is_deepspeed_enabled else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, piece, num_items_in_batch=num_items_in_batch, weights=weights)
                self.accelerator.backward(loss, **deepspeed)
            total += loss.detach()
        if self.watch is not None:
            self.watch.saw(total, self._tables[-len(inputs.pieces) :])
        return total

    def satisfied(self, losses: Tensor, seen: Sequence[Any]) -> Tensor:
        """A bool: whether every pair of a step, its weight aside, has loss 0 (a hinge does). seen: figures of the pieces."""
        tables = [part for parts in seen for part in parts]
        if not tables:  # a loss of somebody's own, which keeps no figures
            return super().satisfied(losses, seen)
        table = torch.cat(tables)
        learnt = table[:, [COLUMNS.index("unweighted"), COLUMNS.index("sft")]].abs().sum(1)
        return ((learnt == 0) | (table[:, COLUMNS.index("valid")] == 0)).all()

    def rows_of(self, losses: Tensor, seen: Sequence[Any]) -> tuple[bool, list[str]]:
        """(whether their loss is not finite, names) of this process's pairs of a step: of those at fault, where there are any."""
        tables = [part for parts in seen for part in parts]
        if not tables:
            return not bool(losses.isfinite().all()), []
        return _at_fault(Figures(torch.cat(tables)), cast(TokenisedPairs, self.train_dataset))

    def advice(self) -> list[str]:
        """What may help, with what it is now."""
        beta = self.objective.beta
        return [*super().advice(), f"a {'larger' if beta < 1 else 'smaller'} beta (now {beta:g})"]

    def floating_point_ops(self, inputs: Any) -> int:
        """6·parameters·tokens of a micro-batch (Kaplan et al. 2020, arXiv 2001.08361, sec. 2.1)."""
        return 6 * self._parameters * sum(piece.layout.tokens for piece in inputs.pieces)

    # ---- figures ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the figures of all pairs since the last training log where these are training logs."""
        if "loss" in logs and self._tables:
            logs.update(self.interval_metrics())
        super().log(logs, start_time)

    def _metrics_of(self, figures: Figures) -> dict[str, float]:
        weighted, chi_squared = self.objective.weight != "none", self.objective.implicit_reward == "chi_squared"
        return figures.metrics(weighted, chi_squared, self.starts_at_reference)

    def interval_metrics(self) -> dict[str, float]:
        figures = gathered(self._tables, self.accelerator.gather if self.args.world_size > 1 else None)
        now = time.perf_counter()
        metrics = self._metrics_of(figures)
        metrics["pairs_seen"] = self.sampler.pairs_seen(self.state.global_step)
        if self.starts_at_reference and figures["step"].min().item() == 0:
            metrics |= figures.start()
            warn_about_start(metrics)
        elif not self.went_on and self.objective.weight not in ("none", "wpo") and figures["step"].min().item() == 0:
            self._warn_about_weights(figures)
        if self.objective.weight != "none":
            for found in figures.steps():
                self.stall.update(*found)
        if self._interval_started is not None:
            metrics["time/pairs_per_second"] = self._interval_pairs / max(now - self._interval_started, 1e-9)
        self._tables, self._interval_started, self._interval_pairs = [], None, 0
        return metrics

    def _warn_about_weights(self, figures: Figures) -> None:
        """Where policy and reference start as two models, and the reference stands for the one that wrote the responses."""
        first = figures["log_weight"][figures["step"] == 0]
        if set(BEHAVIOUR_COLUMNS) & set(cast(TokenisedPairs, self.train_dataset).floats) or first.abs().mean() <= FAR:
            return
        logger.warning("at the first step log w is %.3g on average, weights are far from 1: %s", first.mean().item(), HELP)

    def leave_out(self, seconds: float) -> None:
        """Time that was spent on something else than training does not count in `time/pairs_per_second`."""
        if self._interval_started is not None:
            self._interval_started += seconds

    def held_out_metrics(self, dataset: TokenisedPairs) -> dict[str, float]:
        """The figures of some held-out pairs under the policy as it is now, without logging them."""
        return self._held_out_figures(dataset).metrics(weighted=False, at_reference=self.starts_at_reference)

    def evaluate(  # type: ignore[override, unused-ignore]
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The objective's loss and all figures on held-out pairs. Weights that span a batch span the held-out set."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise ValueError("evaluation needs an eval_dataset")
        dataset = _with_reference(rows, "eval")
        started = time.perf_counter()
        figures = self._held_out_figures(dataset)
        found = {"loss": self._held_out_loss(figures), **self._metrics_of(figures)}
        found["time/pairs_per_second"] = len(figures) / max(time.perf_counter() - started, 1e-9)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _held_out_figures(self, dataset: TokenisedPairs) -> Figures:
        if not self.is_in_train and not self.accelerator._models:
            # As the Trainer's own evaluation does it: mixed precision and sharding come with this call.
            sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
            prepared = (
                self.accelerator.prepare(self.model)
                if sharded
                else self.accelerator.prepare_model(self.model, evaluation_mode=True)
            )
            if sharded:
                self.model = self.model_wrapped = prepared
        training = self.policy.training
        self.policy.eval()
        # Pairs of like length together: nothing is padded, but short ones share one attention call.
        order = np.argsort(dataset.lengths(), kind="stable")
        size = self.args.per_device_eval_batch_size
        world, rank = self.args.world_size, self.args.process_index
        budget = min(pass_tokens(self.policy), self.batch_tokens or PASS_TOKENS)
        tables = []
        shown = show_progress("held-out pairs", total=len(order)) if rank == 0 else nullcontext()
        with shown as bar:
            for start in range(0, len(order), size * world):
                indices = order[start : start + size * world]
                done = 0
                for piece in self.pieces_of(dataset.batch(shard(indices, world, rank)), self.args.device, budget):
                    with self.compute_loss_context_manager():
                        tables.append(self.losses_of(self.policy, piece)[1])
                    if bar is not None:
                        more = min(len(piece.batch) * world, len(indices) - done)  # the last pairs may be fill-ins
                        done += more
                        bar.update(more)
                if bar is not None and done < len(indices):
                    bar.update(len(indices) - done)
        self.policy.train(training)
        figures = gathered(tables, self.accelerator.gather if world > 1 else None)
        broken, names = _at_fault(figures, dataset)
        if broken:
            what = f"the held-out loss is not finite, in {some_rows(names)}"
            raise UserError(what) if self.watch is None else self.watch.error(self.state.global_step, what)
        return figures

    def _held_out_loss(self, figures: Figures) -> float:
        objective = self.objective
        weights = figures["raw_weight"]
        if objective.needs_batch:
            weights = batch_weights(weights, objective.weight, objective.normalize, self.sampler.seed, 0)
        losses = weights * figures["unweighted"] + figures["sft"]
        return (losses * figures["pair_weight"]).mean().item()

    # ---- running, saving, resuming ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the terminal is given back whatever happens."""
        self._tables, self._interval_started, self._interval_pairs = [], None, 0
        self._check_rules(kwargs.get("resume_from_checkpoint", args[0] if args else None))
        # An adapter's wrapper is born in training mode around a model in evaluation mode, where layers checkpoint nothing.
        self.policy.train()
        try:
            return super().train(*args, **kwargs)
        finally:
            self.progress.close()

    def must_stay(self) -> dict[str, Any]:
        """As the mixin's; the pairs by their content, their order, and what is minimised."""
        rows = cast(TokenisedPairs, self.train_dataset)
        order = "prompt by prompt" if self.sampler.groups is not None else "pair by pair"
        more = {"pairs": rows.content_digest(), "order": order, "objective": self.objective.formula()}
        return super().must_stay() | more

    def _check_rules(self, checkpoint: Any) -> None:
        """Raises UserError where a checkpoint to go on from was made of tokens of an earlier revision's rules."""
        folder = newest_complete_checkpoint(Path(str(self.args.output_dir))) if checkpoint is True else checkpoint
        record = read_record(folder) if folder and Path(folder).is_dir() else None
        if record is not None and (record.tokens or 1) != VERSION:
            raise UserError(
                f"{folder}: written by an earlier isdaa with other tokenisation rules, which resuming would mix; train anew"
            )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = str(self.args.output_dir if output_dir is None else output_dir)
        if self.args.should_save:
            # A pickle with the paths of this machine; nothing reads it.
            Path(folder, "training_args.bin").unlink(missing_ok=True)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
                if Path(folder, "config.json").is_file():  # an adapter is used with its base model's
                    model = self.accelerator.unwrap_model(self.model)
                    write_generation_config(model, self.tokenizer, Path(folder), ending_ids(self.tokenizer))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Tied weights are saved once; loading them is not a loss.
        tied = set(getattr(self.accelerator.unwrap_model(self.model), "_tied_weights_keys", None) or ())
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result)


class _Following:
    """The sampler as a batch sampler that starts where the trainer stands."""

    def __init__(self, sampler: GlobalBatchSampler, trainer: Trainer) -> None:
        self.sampler, self.trainer = sampler, trainer
        self.batch_size, self.drop_last = sampler.batch_size, False

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[int]]:
        self.sampler.step = self.trainer.state.global_step
        return iter(self.sampler)


def _at_fault(figures: Figures, pairs: TokenisedPairs) -> tuple[bool, list[str]]:
    """(whether there are pairs whose loss is not finite, the names of these, else of all)."""
    broken = ~torch.stack([figures[name] for name in ("unweighted", "weighted", "sft", "pair_weight")]).isfinite().all(0)
    rows = figures["index"][broken] if bool(broken.any()) else figures["index"]
    return bool(broken.any()), [pairs.name(int(row)) for row in rows.tolist()]


def _with_reference(rows: Any, which: str) -> TokenisedPairs:
    pairs = tokenised(rows)
    if "reference_chosen_logps" not in pairs.floats or "reference_rejected_logps" not in pairs.floats:
        raise ValueError(
            f"{which}_dataset has no reference logps; `training.trainer.reference_logps.reference_logps` computes them"
        )
    return pairs
