"""The arms of the step benchmark: the same model, pairs, loss and optimiser, trained by isdaa, by TRL, and by plain scripts.

Each arm is a function of a `Job` and a `Gate`: it prepares, calls `gate.ready()`, and then trains; after every optimiser step
it calls `gate.step(loss)`, which blocks until the benchmark lets it go on. Real trainers do so in `on_step_end`, so that a
measured step runs from there to there: logging of the step before, fetching and collation of the batch, forward, backward,
clipping, optimiser.

What TRL is given (trl.trainer.dpo_trainer and dpo_config of 1.16 are the source):

* Text, through its own pipeline. A tokenizer of whole words ("t123" is id 123) makes of it the ids that isdaa gets; the
  arm compares them before it trains. `train_sampling_strategy="sequential"` keeps their order.
* Best settings on a CPU: reference logps computed beforehand, no gradient checkpointing, fused AdamW (its default), and one
  pair at a time with accumulated gradients. The loss is the same, and a step of TL;DR's shape took 0.6 of the time of a whole
  batch at once: pairs are not padded to the longest of the batch, and the logits are smaller. (It made no difference for short
  pairs.) `padding_free` is switched off in this version, Liger's and the Hub's kernels need a GPU, and batches grouped by
  length would hold other pairs than the other arms' batches. SDPA is the attention of all arms.
* `trl_whole` is the same with the whole batch at once, the settings that a user of a GPU would carry over.
* Torch's memory in huge pages, which isdaa switches on when it is imported, and any script can by an environment variable:
  all arms have them, but not TRL's defaults, which run as they come.
* Defaults: whole batches, gradient checkpointing, and a second model that computes the reference at every step. `bf16`, which is
  on by default, is off in `trl_defaults` and on in `trl_defaults_bf16`.
* An arm whose name ends in `_bf16` trains its fp32 weights under autocast to bfloat16, as TRL does by default and isdaa does with
  `align.precision: bfloat16`. All other arms are in fp32.
* `max_length=None`, so that nothing is cut.
* Without Triton, on a CPU, TRL's head scores every position of every row, on a GPU only those of responses. `trl_gpu_head`
  is the best settings with that choice made as on a GPU, by a patch: not what a user gets, but a fairer opponent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from _without import LEFT, Left
from _words import as_text, word_tokenizer
from datasets import Dataset
from shapes import BETA, EOS, PAD, Size
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.trainer_utils import SaveStrategy
from trl import DPOConfig, DPOTrainer
from trl.trainer import utils as trl_utils

from isdaa.config import AlignConfig
from isdaa.data.collation import PairBatch, collate
from isdaa.models.attention import shared_prefix
from isdaa.models.attention.layout import Layout
from isdaa.models.packed.forward import PairForward, prepare
from isdaa.models.packed.patched_forward import SHARED_PREFIX, TWO_ROWS
from isdaa.objectives.objective import Objective, PairLogps
from isdaa.objectives.presets import resolve
from isdaa.training.trainer.batches import GlobalBatchSampler, TokenisedPairs
from isdaa.training.trainer.callbacks import MetricsFile
from isdaa.training.trainer.preference_trainer import PreferenceTrainer
from isdaa.training.trainer.reference_logps import reference_logps
from isdaa.training.trainer.training_arguments import training_arguments

LEARNING_RATE, MAX_GRAD_NORM, SEED = 1e-4, 1.0, 17
# At 1e-8 Adam makes whole steps of gradients that are rounding alone, in entries of the embedding that no token touches.
EPSILON = 1e-5
LOGGING_STEPS = 1  # of both trainers: every measured step holds a whole log


@dataclass
class Job:
    """What an arm trains. model: folder of the initial weights; folder: the arm's own; rows: the pairs, in their order."""

    arm: str
    model: Path
    folder: Path
    rows: list[dict[str, list[int]]]
    batch_size: int
    vocabulary: int

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return len(self.rows) // self.batch_size

    @property
    def batches(self) -> Iterator[list[dict[str, list[int]]]]:
        """The pairs of each step."""
        return (self.rows[i : i + self.batch_size] for i in range(0, len(self.rows), self.batch_size))


class Gate(Protocol):
    """How an arm is let through, step by step."""

    def ready(self) -> None:
        """Everything is prepared; returns when the first step may begin."""

    def step(self, loss: float) -> None:
        """A step is done; returns when the next one may begin, or when there is none."""


class _Gated(TrainerCallback):
    """Stops a Trainer after each step. The loss is the sum of what `training_step` returned: logs may round it."""

    def __init__(self, gate: Gate) -> None:
        self.gate, self.loss = gate, 0.0

    def attach(self, trainer: Any) -> None:
        """Last of the callbacks, so that the others' work is part of the step."""
        original = trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> Tensor:
            loss = original(*args, **kwargs)
            self.loss += float(loss)
            return loss

        trainer.training_step = training_step
        trainer.add_callback(self)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        loss, self.loss = self.loss, 0.0
        self.gate.step(loss)


# ---------------------------------------------------------------------------------------------------------------------
# isdaa


def isdaa_trainer(
    job: Job,
    gate: Gate,
    method: str = "dpo",
    mode: str = SHARED_PREFIX,
    batch_tokens: int | None = None,
    precision: Literal["float32", "bfloat16"] = "float32",
) -> nn.Module:
    """`PreferenceTrainer`, set up as `isdaa train` does it. batch_tokens: of a forward pass, at least one pair."""
    model = load(job.model)
    args = training_arguments(
        AlignConfig(
            batch_size=job.batch_size, max_steps=job.steps, learning_rate=LEARNING_RATE, lr_scheduler="constant",
            warmup_steps=0, adam_epsilon=EPSILON, max_grad_norm=MAX_GRAD_NORM, logging_steps=LOGGING_STEPS,
            precision=precision,
        ),
        job.folder, seed=SEED, pairs=len(job.rows), use_cpu=True,
    )  # fmt: skip
    args.save_strategy = SaveStrategy.NO
    # The sampler permutes; the rows are laid where it will read them in the order of the other arms.
    order = GlobalBatchSampler(len(job.rows), job.batch_size, 1, 1, 0, SEED).order(0).tolist()
    rows = [row for _, row in sorted(zip(order, job.rows, strict=True), key=lambda both: both[0])]
    forward = _forward(model, job, mode)
    pairs = TokenisedPairs(rows)
    trainer = PreferenceTrainer(
        model,
        Objective(**resolve(method, beta=BETA)),
        args=args,
        forward=forward,
        train_dataset=pairs.with_reference(*reference_logps(forward, pairs, key={}, cache_dir=None, precision=precision)),
        callbacks=[MetricsFile(job.folder / "metrics.jsonl")],
        batch_tokens=batch_tokens,
    )
    _Gated(gate).attach(trainer)
    gate.ready()
    trainer.train()
    return model


def isdaa_without(job: Job, gate: Gate, left: Left) -> nn.Module:
    """isdaa dpo, with one thing of what makes it fast left out."""
    with left():
        return isdaa_trainer(job, gate)


def isdaa_bare(job: Job, gate: Gate) -> nn.Module:
    """The same forward, loss and optimiser in a loop by hand, over batches that were collated beforehand."""
    model = load(job.model)
    forward = _forward(model, job, SHARED_PREFIX)
    pairs = TokenisedPairs(job.rows)
    pairs = pairs.with_reference(*reference_logps(forward, pairs, key={}, cache_dir=None))
    batches = [collate([pairs[i] for i in range(s, s + job.batch_size)]) for s in range(0, len(pairs), job.batch_size)]
    objective = Objective(**resolve("dpo", beta=BETA))
    optimiser = adamw(model.train())
    gate.ready()
    for batch in batches:
        gate.step(update(_bare_loss(model, forward, objective, batch), model, optimiser))
    return model


def _bare_loss(model: nn.Module, forward: PairForward, objective: Objective, batch: PairBatch) -> Tensor:
    logps = forward(model, batch.input_ids, None, Layout.of_pairs(*batch.parts()))
    assert batch.reference_chosen_logps is not None and batch.reference_rejected_logps is not None
    pairs = PairLogps(
        logps.chosen_logps, logps.rejected_logps, batch.reference_chosen_logps, batch.reference_rejected_logps,
        batch.chosen_lengths, batch.rejected_lengths,
    )  # fmt: skip
    return objective(pairs).losses.mean()


def _forward(model: nn.Module, job: Job, mode: str) -> PairForward:
    longest = max(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in job.rows)
    forward = prepare(model, longest_row=longest)
    if forward.mode != SHARED_PREFIX:
        raise RuntimeError(
            f"isdaa chose the mode {forward.mode} for this model: the benchmark would not measure the shared prefix"
        )
    if mode == SHARED_PREFIX:
        return forward
    shared_prefix.uninstall(model)  # as `prepare` leaves a model whose shared prefix is not exact
    return PairForward(model, TWO_ROWS)


# ---------------------------------------------------------------------------------------------------------------------
# TRL


def trl_trainer(job: Job, gate: Gate, settings: dict[str, Any], gpu_head: bool = False, bf16: bool = False) -> nn.Module:
    """`DPOTrainer` on text, through its own tokenisation. settings: what differs from its defaults."""
    if gpu_head:
        _score_responses_only()
    args = DPOConfig(
        output_dir=str(job.folder), max_steps=job.steps, beta=BETA, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
        warmup_steps=0, weight_decay=0.0, adam_epsilon=EPSILON, max_grad_norm=MAX_GRAD_NORM, logging_steps=LOGGING_STEPS,
        bf16=bf16, max_length=None, train_sampling_strategy="sequential", save_strategy="no", report_to="none", use_cpu=True,
        seed=SEED, **settings,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=str(job.model),
        args=args,
        train_dataset=Dataset.from_list([as_text(row) for row in job.rows]),
        processing_class=word_tokenizer(job.vocabulary),
    )
    for row, own in zip(job.rows, cast(Any, trainer.train_dataset), strict=True):
        if any(own[name] != ids for name, ids in row.items()):
            raise RuntimeError("TRL's token ids are not those of the other arms")
    _Gated(gate).attach(trainer)
    gate.ready()
    trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model)


def trl_best(job: Job, gate: Gate, at_once: int = 1, gpu_head: bool = False, bf16: bool = False) -> nn.Module:
    """The settings that are fastest on a CPU. at_once: pairs of a forward pass."""
    settings = {
        "precompute_ref_log_probs": True, "gradient_checkpointing": False, "disable_tqdm": True,
        "per_device_train_batch_size": at_once, "gradient_accumulation_steps": job.batch_size // at_once,
    }  # fmt: skip
    return trl_trainer(job, gate, settings, gpu_head, bf16)


def trl_defaults(job: Job, gate: Gate, bf16: bool = False) -> nn.Module:
    """As it comes."""
    return trl_trainer(job, gate, {"per_device_train_batch_size": job.batch_size}, bf16=bf16)


def _score_responses_only() -> None:
    if not hasattr(trl_utils, "_use_triton"):
        raise RuntimeError("this version of TRL chooses the positions that its head scores in another way")
    trl_utils._use_triton = lambda device: True  # read by the patched forward alone; the kernels ask their own module


# ---------------------------------------------------------------------------------------------------------------------
# A plain script


def two_rows(job: Job, gate: Gate, bf16: bool = False) -> nn.Module:
    """Padded rows `prompt + response`, chosen ones first, full logits, in the loop that most scripts write."""
    model = load(job.model)
    batches = [_padded(rows) for rows in job.batches]
    half = torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)
    with torch.no_grad(), half:
        references = [_row_logps(model, *batch) for batch in batches]
    optimiser = adamw(model.train())
    gate.ready()
    for batch, reference in zip(batches, references, strict=True):
        with half:
            loss = _plain_loss(model, batch, reference)
        gate.step(update(loss, model, optimiser))
    return model


def _plain_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], reference: Tensor) -> Tensor:
    chosen, rejected = (_row_logps(model, *batch) - reference).chunk(2)
    return -nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def _padded(rows: Sequence[dict[str, list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and response mask of 2B rows."""
    both = [(row["prompt_ids"], row[name]) for name in ("chosen_ids", "rejected_ids") for row in rows]
    width = max(len(prompt) + len(response) for prompt, response in both)
    ids = torch.full((len(both), width), PAD)
    attention, responses = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (prompt, response) in enumerate(both):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.tensor(prompt + response)
        attention[i, :end] = 1
        responses[i, len(prompt) : end] = 1
    return ids, attention, responses


def _row_logps(model: nn.Module, ids: Tensor, attention: Tensor, responses: Tensor) -> Tensor:
    """(2B,) summed logps of the responses."""
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
    logps = torch.log_softmax(logits[:, :-1].float(), -1).gather(2, ids[:, 1:, None])[..., 0]
    return (logps * responses[:, 1:]).sum(1)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """The optimiser that both Trainers use, too."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=EPSILON, weight_decay=0.0, fused=True)


def update(loss: Tensor, model: nn.Module, optimiser: torch.optim.AdamW) -> float:
    """Backward, clipping, optimiser. Gives the loss as a number, so that nobody keeps its graph until the next step."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimiser.step()
    optimiser.zero_grad()
    return loss.item()


# ---------------------------------------------------------------------------------------------------------------------


def make_model(size: Size, folder: Path) -> None:
    """Random weights by a fixed seed, saved with nothing but their config."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.positions, tie_word_embeddings=True, attention_dropout=0.0,
        pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def load(folder: Path) -> nn.Module:
    """The initial policy, in fp32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


ARMS: dict[str, Callable[[Job, Gate], nn.Module]] = {
    "isdaa_dpo": isdaa_trainer,
    "isdaa_is_dpo": lambda job, gate: isdaa_trainer(job, gate, "is_dpo"),
    "isdaa_one": lambda job, gate: isdaa_trainer(job, gate, batch_tokens=1),
    "isdaa_bare": isdaa_bare,
    "isdaa_two_rows": lambda job, gate: isdaa_trainer(job, gate, mode=TWO_ROWS),
    "trl_best": trl_best,
    "trl_whole": lambda job, gate: trl_best(job, gate, at_once=job.batch_size),
    "trl_gpu_head": lambda job, gate: trl_best(job, gate, gpu_head=True),
    "trl_defaults": trl_defaults,
    "two_rows": two_rows,
    "isdaa_dpo_bf16": partial(isdaa_trainer, precision="bfloat16"),
    "isdaa_is_dpo_bf16": partial(isdaa_trainer, method="is_dpo", precision="bfloat16"),
    "trl_best_bf16": partial(trl_best, bf16=True),
    "trl_whole_bf16": lambda job, gate: trl_best(job, gate, at_once=job.batch_size, bf16=True),
    "trl_gpu_head_bf16": partial(trl_best, gpu_head=True, bf16=True),
    "trl_defaults_bf16": partial(trl_defaults, bf16=True),
    "two_rows_bf16": partial(two_rows, bf16=True),
} | {name: partial(isdaa_without, left=left) for name, left in LEFT.items()}
