"""The `sft` and `reward` stages: TRL's trainers, with every default that would change the result set explicitly."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from isdaa.config import Config, OptimisationConfig
from isdaa.data.context import as_read
from isdaa.data.sources import load_sft
from isdaa.data.tokenization import tokenize_pairs, tokenize_sft
from isdaa.data.tokens import content_digest
from isdaa.disk import writing
from isdaa.distributed import once, world_size
from isdaa.errors import UserError
from isdaa.models.adapters import add_lora
from isdaa.models.loading import load_model, load_sequence_classifier
from isdaa.models.saving import weights_digest
from isdaa.training.arguments import training_arguments
from isdaa.training.monitor import TrainingProgress, WholeIntervals
from isdaa.training.reading import read_pairs
from isdaa.training.room import check_training
from isdaa.training.run import Run
from isdaa.training.start import (
    cache_folder,
    check_rows,
    keep_model,
    newest,
    policy_of,
    record_of,
    starting_path,
    token_settings,
    tokenizer_of,
    trained_model,
)
from isdaa.training.whole import WholeCheckpoints

# Checkpoints serve a resume alone, and ten of an 8B model with its optimiser would be a terabyte; two, should one be damaged.
KEPT = 2
IGNORED = -100  # the label of a token that is not learnt
NO_BASE = "reward.path: a reward model needs a base; name one, or run the sft stage first"


def sft(run: Run) -> Path:
    """Fine-tune on the completions alone. Returns the model's folder."""
    from trl import SFTConfig, SFTTrainer

    config = run.config
    tokenizer = tokenizer_of(config)
    data = once(lambda: _examples(run, tokenizer))
    model = policy_of(run, tokenizer, config.model.path)
    check_rows(model, config.model.path, *_extent(data, ("input_ids",)))
    run.pin("sft", weights=weights_digest(model), examples=content_digest(data.remove_columns("id")))
    folder = run.folder / "sft-checkpoints"
    check_training(run, "sft", model, config.sft, len(data), folder=folder, limit=KEPT, lora=config.lora)
    if config.lora.rank:
        model = add_lora(model, **config.lora.model_dump(), seed=config.seed)

    class Trainer(WholeCheckpoints, SFTTrainer):
        """TRL's, with checkpoints that are whole or absent."""

    settings = _trl_arguments(
        SFTConfig,
        config.sft,
        folder,
        run,
        len(data),
        max_length=None,  # cut by the rules of METHOD.md already
        packing=False,
        completion_only_loss=False,  # the labels say what is learnt
        dataset_kwargs={"skip_prepare_dataset": True},
        shuffle_dataset=False,
        loss_type="nll",
    )
    settings.average_tokens_across_devices = world_size() > 1  # one mean over the tokens of all processes
    trainer = Trainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    metrics = _train(trainer, "sft")
    folder = run.folder / "sft"
    record = record_of(run, "sft", step=trainer.state.global_step, metrics=metrics)
    load = partial(load_model, dtype=config.model.dtype, trust_remote_code=config.model.trust_remote_code)
    keep_model(partial(trained_model, trainer, load), tokenizer, folder, record)
    return folder


def _examples(run: Run, tokenizer: Any) -> Any:
    """A Dataset of id, input_ids and labels."""
    config = run.config
    source = config.data.source("sft")
    assert source is not None
    rows, counts = load_sft(source, config.data.sft_split, limit=config.data.limit, repeated=config.data.prompt_repeated)
    examples, more = tokenize_sft(rows, tokenizer, token_settings(config), cache_dir=cache_folder(run))
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
    data = once(lambda: _both(run, tokenizer))
    model = load_sequence_classifier(
        start,
        dtype=config.model.dtype,
        trust_remote_code=config.model.trust_remote_code,
        new_head=True,
        pad_id=tokenizer.pad_token_id,
        seed=config.seed,
    )

    check_rows(model, start, *_extent(data, ("chosen_ids", "rejected_ids")))
    run.pin("reward", weights=weights_digest(model), pairs=content_digest(data.remove_columns("id")))
    folder = run.folder / "reward-checkpoints"
    check_training(run, "reward", model, config.reward, len(data), folder=folder, limit=KEPT)

    class Trainer(WholeCheckpoints, RewardTrainer):
        """TRL's, with checkpoints that are whole or absent."""

    settings = _trl_arguments(RewardConfig, config.reward, folder, run, len(data), max_length=None, disable_dropout=True)
    trainer = Trainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    metrics = _train(trainer, "reward")
    folder = run.folder / "reward"
    record = record_of(run, "reward", step=trainer.state.global_step, metrics=metrics)

    def trained() -> Any:
        found = trained_model(trainer, load_sequence_classifier)
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            # Plain transformers would stop before the EOS; without a pad id it reads the last token, one row at a time.
            found.config.get_text_config().pad_token_id = found.config.pad_token_id = None
        return found

    keep_model(trained, tokenizer, folder, record)
    return folder


def not_for_reward(config: Config) -> list[str]:
    """What the configuration asks of the policy and the reward model does not get, in words."""
    told = {"lora.rank": bool(config.lora.rank), "model.quantization": config.model.quantization is not None}
    return [
        f"{key} is for the policy (sft, align): all weights of the reward model are trained" for key, on in told.items() if on
    ]


def _both(run: Run, tokenizer: Any) -> Any:
    """A Dataset of id, chosen_ids and rejected_ids, prompts included."""
    config = run.config
    # The pairs that `align` holds out stay unseen by the model that may judge on them.
    read = read_pairs(config, pairs_source(run), held_out=False)
    tokens, more = tokenize_pairs(read.rows, tokenizer, token_settings(config), cache_dir=cache_folder(run), behaviour=False)
    run.say("reward", (read.counts + more).lines())
    kept = ("id", "chosen_ids", "rejected_ids")
    with writing(cache_folder(run)):
        return tokens.map(_both_rows, remove_columns=[c for c in tokens.column_names if c not in kept])


def _both_rows(row: dict[str, Any]) -> dict[str, Any]:
    prompt = list(row["prompt_ids"])
    return {name: prompt + as_read(row[name]) for name in ("chosen_ids", "rejected_ids")}


def pairs_source(run: Run) -> str:
    """The pairs of `align` and `reward`: `data.pairs`, else what this run's `label` stage wrote."""
    return run.config.data.source("pairs") or str(run.folder / "pairs" / "train.jsonl")


def _trl_arguments(kind: Any, settings: OptimisationConfig, folder: Path, run: Run, rows: int, **explicit: Any) -> Any:
    """TRL's own argument class with our explicit values: it defaults to bf16 and gradient checkpointing, which change results."""
    from dataclasses import fields

    common = training_arguments(settings, folder, seed=run.config.seed, pairs=rows, world_size=world_size())
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


def _train(trainer: Any, description: str) -> dict[str, float]:
    """Train, from the newest complete checkpoint where there is one. Returns the metrics that were logged at the last step."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    bar = TrainingProgress(description)
    for callback in (WholeIntervals(), _TokensSeen(trainer), bar):
        trainer.add_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=newest(Path(trainer.args.output_dir)))
    finally:
        bar.close()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry and entry["step"] == trainer.state.global_step]
    last = logged[-1] if logged else {}
    return {key: float(value) for key, value in last.items() if isinstance(value, int | float) and math.isfinite(value)}
