"""The `sft` and `reward` stages: TRL's trainers, with every default that would change the result set explicitly."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from isdaa.config import Config, OptimisationConfig
from isdaa.data.chat import pad_apart
from isdaa.data.context import as_read
from isdaa.data.encoder import token_settings
from isdaa.data.overlap import sketch
from isdaa.data.pairs import Counts
from isdaa.data.reading.sources import load_sft
from isdaa.data.token_cache import content_digest
from isdaa.data.tokenize_pairs import tokenize_pairs, tokenize_sft
from isdaa.disk import writing
from isdaa.distributed import once, world_size
from isdaa.errors import UserError
from isdaa.evaluation.reward_reading import worth_in_words
from isdaa.evaluation.statistics import share_interval
from isdaa.files import digest
from isdaa.manifest import HISTORY
from isdaa.models.loading import load_model, load_sequence_classifier, model_config
from isdaa.models.packed import half_linear
from isdaa.models.saving import weights_digest
from isdaa.terminal import Bar, progress, say
from isdaa.training.disk_room import check_training
from isdaa.training.preflight import check_start
from isdaa.training.run_folder import Run
from isdaa.training.stage_inputs import (
    adapter_base,
    cache_folder,
    check_rows,
    coarse_weights,
    decided,
    keep_model,
    merges,
    new_adapter,
    policy_of,
    record_of,
    resumed,
    starting_path,
    tokenizer_of,
    trained_model,
)
from isdaa.training.stages.pair_split import read_pairs
from isdaa.training.trainer.callbacks import MetricsFile, TrainingProgress, WholeIntervals
from isdaa.training.trainer.training_arguments import total_steps, training_arguments
from isdaa.training.trainer.whole_checkpoints import WholeCheckpoints

# Checkpoints serve a resume alone, and ten of an 8B model with its optimiser would be a terabyte; two, should one be damaged.
KEPT = 2
IGNORED = -100  # the label of a token that is not learnt
POSITION = "template_end"  # where reward models are read that are trained here (`isdaa.evaluation.reward_reading`)
WATCHED, MEASURED = 512, 4096  # held-out pairs that are scored during training, and afterwards, at most
NO_BASE = "reward.path: a reward model needs a base; name one, or run the sft stage first"


def sft(run: Run) -> Path:
    """Fine-tune on the completions alone. Returns the model's folder."""
    from trl import SFTConfig, SFTTrainer

    config = run.config
    tokenizer = tokenizer_of(config)
    data = once(lambda: _examples(run, tokenizer))
    if config.model.path is not None:
        check_start(config, "sft", config.model.path)
    model = policy_of(run, tokenizer, config.model.path)
    generation = copy.deepcopy(getattr(model, "generation_config", None))
    merge = merges(config, model) or not config.lora.rank
    check_rows(model, config.model.path, *_extent(data, ("input_ids",)))
    run.pin("sft", weights=weights_digest(model), examples=content_digest(data.remove_columns("id")))
    folder = run.folder / "sft-checkpoints"
    check_training(run, "sft", model, config.sft, len(data), folder=folder, limit=KEPT, lora=config.lora)
    if config.lora.rank:
        plain = model
        base = (
            None if merge and config.model.path is None else once(lambda: adapter_base(run, plain, tokenizer, config.model.path))
        )
        model = new_adapter(config, model, base)

    run.say("sft", coarse_weights(model, config.sft.learning_rate))
    decision = decided(run, "sft", model, sum(map(len, data["input_ids"])) / len(data))
    half_linear.install(model)

    class Trainer(WholeCheckpoints, SFTTrainer):
        """TRL's, with checkpoints that are whole or absent."""

    settings = _trl_arguments(
        SFTConfig,
        decision,
        folder,
        run,
        len(data),
        max_length=None,  # cut by the rules of docs/method.md already
        packing=False,
        completion_only_loss=False,  # the labels say what is learnt
        dataset_kwargs={"skip_prepare_dataset": True},
        shuffle_dataset=False,
        loss_type="nll",
    )
    settings.average_tokens_across_devices = world_size() > 1  # one mean over the tokens of all processes
    trainer = Trainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    log = MetricsFile(folder / HISTORY)
    metrics = _train(trainer, "sft", config.sft, log)
    folder = run.folder / "sft"
    record = record_of(run, "sft", step=trainer.state.global_step, metrics=metrics)
    load = partial(load_model, dtype=config.model.dtype, trust_remote_code=config.model.trust_remote_code)

    def trained() -> Any:
        found = trained_model(trainer, load, merge)
        found.generation_config = generation  # the trainer has put the tokenizer's tokens into it
        return found

    keep_model(trained, tokenizer, folder, record, log.path, merge=merge)
    return folder


def _examples(run: Run, tokenizer: Any) -> Any:
    """A Dataset of id, input_ids and labels."""
    config = run.config
    source = config.data.source("sft")
    assert source is not None
    rows, counts = load_sft(source, config.data.sft_split, limit=config.data.limit, repeated=config.data.prompt_repeated)
    examples, more = tokenize_sft(rows, tokenizer, token_settings(config.tokenization), cache_dir=cache_folder(run))
    run.say("sft", (counts + more).lines())
    with writing(cache_folder(run)):  # the library's own cache, beside ours
        data = examples.map(_labels, remove_columns=[c for c in examples.column_names if c not in ("id", "input_ids")])
    _check_labels(data)
    return data


def _extent(data: Any, columns: tuple[str, ...]) -> tuple[int, int]:
    """The highest token id, and the tokens of the longest row."""
    rows = [ids for name in columns for ids in data[name]]
    return max(max(ids) for ids in rows), max(len(ids) for ids in rows)


def _labels(row: dict[str, Any]) -> dict[str, Any]:
    return {"labels": [i if learnt else IGNORED for i, learnt in zip(row["input_ids"], row["completion_mask"], strict=True)]}


def _check_labels(data: Any) -> None:
    """TRL would learn prompts, too, where labels are missing: make sure that they are not."""
    for row in data.select(range(min(64, len(data)))):
        learnt = [label for label in row["labels"] if label != IGNORED]
        if not learnt or len(row["labels"]) != len(row["input_ids"]):
            raise UserError("sft: an example has nothing to learn; every row needs a completion")


def reward(run: Run) -> Path:
    """Train a reward model on the pairs (Bradley–Terry). Returns its folder."""
    from trl import RewardConfig, RewardTrainer

    config = run.config
    start = config.reward.path or starting_path(run)
    if start is None:
        raise UserError(NO_BASE)
    run.say("reward", not_for_reward(config))
    tokenizer = tokenizer_of(config, start)
    options: dict[str, Any] = {"trust_remote_code": config.model.trust_remote_code}
    options["revision"] = config.model.revision if start == config.model.path else None
    run.say("reward", _pad_apart(tokenizer, start, **options))
    data, held = once(lambda: _both(run, tokenizer))
    check_start(config, "reward", start)
    model = load_sequence_classifier(
        start,
        dtype=config.model.dtype,
        new_head=True,
        pad_id=tokenizer.pad_token_id,
        by_mask=False,
        seed=config.seed,
        **options,
    )

    for pairs in (data, *([] if held is None else [held])):
        check_rows(model, start, *_extent(pairs, ("chosen_ids", "rejected_ids")))
    # Where rows are read is as much of the data as their ids: an earlier isdaa read them elsewhere.
    read = digest([POSITION, tokenizer.pad_token_id, content_digest(data.remove_columns(["id", "prompt"]))])
    run.pin("reward", weights=weights_digest(model), pairs=read)
    folder = run.folder / "reward-checkpoints"
    check_training(run, "reward", model, config.reward, len(data), folder=folder, limit=KEPT)

    run.say("reward", coarse_weights(model, config.reward.learning_rate))
    decision = decided(
        run, "reward", model, sum(len(row) for name in ("chosen_ids", "rejected_ids") for row in data[name]) / len(data)
    )
    half_linear.install(model)

    class Trainer(WholeCheckpoints, RewardTrainer):
        """TRL's, with checkpoints that are whole or absent, and figures of held-out pairs that are of all of them alike."""

        def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> tuple[None, Any, Any]:
            """(no loss, (B, 2) scores of chosen and rejected, (B,) something): TRL's own takes the mean of batches' means."""
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                scores = model(**inputs, use_cache=False).logits.float().view(2, -1).T.contiguous()
            return None, scores, torch.zeros(len(scores), device=scores.device)

    def ended(what: str) -> UserError:
        assert trainer.watch is not None
        return trainer.watch.error(trainer.state.global_step, what)

    few = None if held is None else held.select(range(min(WATCHED, len(held))))
    settings = _trl_arguments(
        RewardConfig, decision, folder, run, len(data), 0 if few is None else len(few), max_length=None, disable_dropout=True
    )
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=data,
        eval_dataset=few,
        processing_class=tokenizer,
        compute_metrics=None if held is None else partial(held_out_figures, held["prompt"], ended=ended),
    )
    log, watch = MetricsFile(folder / HISTORY), _HeldOut()
    try:
        metrics = _train(trainer, "reward", config.reward, log, watch)
        worth = None if held is None else _worth(trainer, held)
    finally:
        watch.close()
    if worth is not None:
        run.say("reward", [f"the reward model {worth_in_words(worth)}"])
        run.note("reward", held_out=worth)
    record = record_of(run, "reward", step=trainer.state.global_step, metrics=metrics, position=POSITION, held_out=worth)
    keep_model(partial(trained_model, trainer, load_sequence_classifier), tokenizer, run.folder / "reward", record, log.path)
    return run.folder / "reward"


def held_out_figures(prompts: Sequence[Hashable], scores: Any, ended: Callable[[str], UserError] = UserError) -> dict[str, float]:
    """Of (N, 2) scores of chosen and rejected: share ranked as labelled (a tie counts ½) with its interval, mean loss, margin.

    prompts: what each of the first N pairs is an answer to; pairs of one prompt count together. scores: the Trainer's
    `EvalPrediction`. Raises what `ended` makes of the words where a score is not finite.
    """
    chosen, rejected = np.asarray(scores.predictions, dtype=np.float64).T
    if not np.isfinite(chosen - rejected).all():
        raise ended("a score of a held-out pair is not finite")
    right = np.where(chosen == rejected, 0.5, chosen > rejected)
    interval = share_interval(right, prompts[: len(right)])
    assert interval.low is not None and interval.high is not None
    return {
        "accuracy": interval.mean,
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "loss": float(np.logaddexp(0, rejected - chosen).mean()),
        "margin": float((chosen - rejected).mean()),
        "pairs": len(right),
        "prompts": len(set(prompts[: len(right)])),
    }


def _worth(trainer: Any, held: Any) -> dict[str, Any]:
    """What the trained model makes of all held-out pairs; where they were watched all along, as it was logged."""
    at_end = [entry for entry in trainer.state.log_history if entry["step"] == trainer.state.global_step]
    found = next((entry for entry in reversed(at_end) if entry.get("eval_pairs") == len(held)), None)
    found = trainer.evaluate(held) if found is None else found
    names = {"accuracy": "accuracy", "low": "accuracy_low", "high": "accuracy_high"}
    return {name: float(found[f"eval_{key}"]) for name, key in names.items()} | {
        name: int(found[f"eval_{name}"]) for name in ("pairs", "prompts")
    }


def _pad_apart(tokenizer: Any, start: str, **options: Any) -> list[str]:
    """Give the tokenizer a padding token that ends no row, so that plain transformers reads all of it. Returns what to say."""
    vocabulary = model_config(start, **options).get_text_config().vocab_size
    token = pad_apart(tokenizer, vocabulary)
    if token is None:
        return [
            f"the tokenizer's only padding token is {tokenizer.pad_token!r}: as in plain transformers, the score is read "
            "before it, and does not depend on whether a response ended"
        ]
    before, tokenizer.pad_token = tokenizer.pad_token, token
    return [] if before == token else [f"rows are padded with {token!r}, because {before!r} ends a text"]


def not_for_reward(config: Config) -> list[str]:
    """What the configuration asks of the policy and the reward model does not get, in words."""
    told = {"lora.rank": bool(config.lora.rank), "model.quantization": config.model.quantization is not None}
    return [
        f"{key} is for the policy (sft, align): all weights of the reward model are trained" for key, on in told.items() if on
    ]


def _both(run: Run, tokenizer: Any) -> tuple[Any, Any | None]:
    """Datasets of id, prompt (a digest), chosen_ids and rejected_ids, prompts included: to train on, and held out."""
    config = run.config
    # The pairs that `align` holds out stay unseen by the model that may judge on them.
    read = read_pairs(config, pairs_source(run, "reward"))
    run.note("reward", trained_on=sketch(read.rows))
    if read.common:
        run.say("reward", [f"{read.common} prompts are in both data.pairs and data.eval_pairs: held-out accuracy looks too good"])
    rows = _read_whole(run, tokenizer, read.rows, read.counts, "training pairs")
    if read.held is None:
        run.say("reward", ["no held-out pairs: the reward model's accuracy is not measured"])
        return rows, None
    held, counts = read.held, read.held_counts
    if len(held) > MEASURED:
        run.say("reward", [f"held-out pairs: the first {MEASURED} of {len(held)} are measured"])
        held, counts = held.select(range(MEASURED)), Counts(rows=MEASURED)
    return rows, _read_whole(run, tokenizer, held, counts, "held-out pairs")


def _read_whole(run: Run, tokenizer: Any, rows: Any, counts: Counts, what: str) -> Any:
    settings, cache = token_settings(run.config.tokenization), cache_folder(run)
    tokens, more = tokenize_pairs(rows, tokenizer, settings, cache_dir=cache, behaviour=False, whole=True)
    run.say("reward", [f"{what}: {line}" for line in (counts + more).lines()])
    kept = ("id", "chosen_ids", "rejected_ids")
    with writing(cache):
        return tokens.map(_both_rows, remove_columns=[c for c in tokens.column_names if c not in kept])


def _both_rows(row: dict[str, Any]) -> dict[str, Any]:
    prompt = list(row["prompt_ids"])
    return {"prompt": digest(prompt)} | {name: prompt + as_read(row[name]) for name in ("chosen_ids", "rejected_ids")}


def pairs_source(run: Run, stage: str) -> str:
    """The pairs of `align` or `reward`: `data.pairs`, or what this run's `label` stage wrote."""
    own = stage == "align" and run.config.trains_on_labelled
    return (None if own else run.config.data.source("pairs")) or str(run.folder / "pairs" / "train.jsonl")


def _trl_arguments(
    kind: Any, settings: OptimisationConfig, folder: Path, run: Run, rows: int, held: int = 0, **explicit: Any
) -> Any:
    """TRL's own argument class with our explicit values: it defaults to bf16 and gradient checkpointing, which change results."""
    from dataclasses import fields

    common = training_arguments(settings, folder, seed=run.config.seed, pairs=rows, eval_pairs=held, world_size=world_size())
    names = {f.name for f in fields(type(common)) if f.init} & {f.name for f in fields(kind) if f.init}
    arguments = kind(**{name: getattr(common, name) for name in names if not name.startswith("_")}, **explicit)
    arguments.save_total_limit = KEPT
    # The Trainer writes this into the saved config, and without it everyone's generation would be slow.
    arguments.use_cache = True
    return arguments


class _TokensSeen(TrainerCallback):
    """TRL's count of tokens goes on where the checkpoint's own log ends."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        counts = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        self.trainer._total_train_tokens = int(counts[-1]) if counts else 0


class _HeldOut(TrainerCallback):
    """A bar while held-out pairs are scored, and a line of what came of it."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._bar: Bar | None = None

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self._bar is None:
            self._bar = self._open.enter_context(progress("reward: held-out pairs", len(kwargs["eval_dataloader"])))
        self._bar.update()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        self.close()
        if state.is_world_process_zero and "eval_accuracy" in (metrics or {}):
            low, high = metrics["eval_accuracy_low"], metrics["eval_accuracy_high"]
            found = f"{metrics['eval_accuracy']:.2f} ({low:.2f}–{high:.2f}) of {metrics['eval_pairs']}"
            say(f"reward: step {state.global_step}: right in {found} held-out pairs")

    def close(self) -> None:
        """Give the terminal back."""
        self._open.close()
        self._bar = None


def _train(trainer: Any, description: str, settings: OptimisationConfig, *callbacks: TrainerCallback) -> dict[str, float]:
    """Train, from the newest complete checkpoint where there is one. Returns the metrics that were logged at the last step."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    bar = TrainingProgress(description)
    folder, steps = Path(trainer.args.output_dir), total_steps(settings, len(trainer.train_dataset), world_size())
    for callback in (WholeIntervals(), _TokensSeen(trainer), *callbacks, bar):
        trainer.add_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=resumed(description, folder, steps))
    finally:
        bar.close()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry and entry["step"] == trainer.state.global_step]
    last = logged[-1] if logged else {}
    return {key: float(value) for key, value in last.items() if isinstance(value, int | float) and math.isfinite(value)}
