"""The `align` stage: held-out split, reference and behaviour logps, training, the final model."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

from isdaa.data.pairs import Counts
from isdaa.data.sources import hold_out, load_pairs
from isdaa.data.tokenization import tokenize_pairs
from isdaa.errors import UserError
from isdaa.evaluation.collect import check_tokenizers
from isdaa.files import write_jsonl
from isdaa.models.adapters import add_lora
from isdaa.models.forward import PairForward, prepare
from isdaa.models.loading import load_tokenizer
from isdaa.objectives.objective import Objective
from isdaa.training.arguments import training_arguments
from isdaa.training.batches import BEHAVIOUR_COLUMNS, TokenisedPairs
from isdaa.training.checkpoints import newest_complete_checkpoint
from isdaa.training.monitor import MetricsFile, metrics_line
from isdaa.training.preference import PreferenceTrainer
from isdaa.training.reference import reference_logps
from isdaa.training.run import Run
from isdaa.training.start import (
    cache_folder,
    described,
    keep_model,
    logps_key,
    other_model,
    policy_of,
    record_of,
    starting_path,
    token_settings,
    tokenizer_of,
)
from isdaa.training.supervised import pairs_source


def align(run: Run) -> Path:
    """Train the policy on preference pairs. Returns the final model's folder."""
    config = run.config
    start = starting_path(run)
    tokenizer = tokenizer_of(config, start)
    train, held_out = _pairs(run, tokenizer)
    policy = policy_of(run, tokenizer, start)
    forward = prepare(policy, probe=config.align.probe, longest_row=config.tokenization.max_length)
    if config.lora.rank:
        # The reference is the policy exactly as loaded: its logps come before the new adapter.
        train, held_out = _with_logps(run, train, held_out, policy, forward, tokenizer)
        policy = add_lora(policy, **config.lora.model_dump(), seed=config.seed)
        if start is not None and Path(start).is_dir():
            # Checkpoints hold the adapter alone: they must find its base from any folder.
            policy.peft_config["default"].base_model_name_or_path = str(Path(start).absolute())
        forward = prepare(policy, probe=False)
    else:
        train, held_out = _with_logps(run, train, held_out, policy, forward, tokenizer)
    reference = config.reference.path or start
    checkpoints = run.folder / "checkpoints"

    def describe(folder: Path, step: int) -> None:
        record = record_of(run, "policy", step=step, reference=reference, metrics=_last_metrics(trainer))
        for name, text in described(record, checkpoints / f"checkpoint-{step}").items():
            (folder / name).write_text(text, encoding="utf-8")

    trainer = PreferenceTrainer(
        policy,
        Objective(**config.objective.arguments()),
        args=training_arguments(
            config.align, checkpoints, seed=config.seed, pairs=len(train), eval_pairs=len(held_out) if held_out else 0
        ),
        forward=forward,
        train_dataset=train,
        eval_dataset=held_out,
        tokenizer=tokenizer,
        callbacks=[MetricsFile(run.folder / "metrics.jsonl")],
        starts_at_reference=config.reference.path is None,
        batch_tokens=config.align.batch_tokens,
        before_rename=describe,
        description=f"align: {config.objective.method}",
    )
    trainer.train(resume_from_checkpoint=newest_complete_checkpoint(checkpoints))
    folder = run.folder / "model"
    record = record_of(run, "policy", step=trainer.state.global_step, reference=reference, metrics=_last_metrics(trainer))
    keep_model(trainer.accelerator.unwrap_model(trainer.model), tokenizer, folder, record)
    return folder


def _last_metrics(trainer: Any) -> dict[str, float]:
    """Each metric's last logged value, by its name in `metrics.jsonl`; values that are not finite are left out."""
    last: dict[str, float] = {}
    for entry in trainer.state.log_history:
        line = metrics_line(entry) or {}
        last.update({k: float(v) for k, v in line.items() if isinstance(v, int | float) and ("/" in k or k == "loss")})
    return last


def _pairs(run: Run, tokenizer: Any) -> tuple[TokenisedPairs, TokenisedPairs | None]:
    """Training and held-out pairs as token ids; the held-out ones are also kept as text, for `isdaa evaluate`."""
    config = run.config
    source = pairs_source(run)
    rows, counts = load_pairs(source, config.data.pairs_split, limit=config.data.limit)
    held_counts = Counts()
    if config.data.eval_pairs is not None:
        held, held_counts = load_pairs(config.data.eval_pairs, config.data.eval_split, limit=config.data.limit)
    else:
        rows, held = hold_out(rows, config.data.eval_fraction, config.seed)
        counts = replace(counts, rows=counts.rows - (len(held) if held is not None else 0))
    tokens, more = _tokens(run, rows, tokenizer)
    run.say("align", [f"training pairs: {line}" for line in (counts + more).lines()])
    if held is None:
        run.say("align", ["no pair held out"])
        return TokenisedPairs(tokens), None
    write_jsonl(run.folder / "eval_pairs.jsonl", (_plain(row) for row in held))
    held_tokens, more = _tokens(run, held, tokenizer)
    held_counts = replace(held_counts, rows=held_counts.rows or len(held))
    run.say("align", [f"held-out pairs: {line}" for line in (held_counts + more).lines()])
    return TokenisedPairs(tokens), TokenisedPairs(held_tokens)


def _tokens(run: Run, rows: Any, tokenizer: Any) -> tuple[Any, Counts]:
    return tokenize_pairs(rows, tokenizer, token_settings(run.config), cache_dir=cache_folder(run))


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None and key != "where"}


def _with_logps(
    run: Run, train: TokenisedPairs, held_out: TokenisedPairs | None, policy: Any, forward: PairForward, tokenizer: Any
) -> tuple[TokenisedPairs, TokenisedPairs | None]:
    """Both sets with reference logps, and with behaviour logps where the configuration names a behaviour model."""
    config = run.config
    sets = [s for s in (train, held_out) if s is not None]
    if config.reference.path is None:
        sets = _filled(run, sets, "reference", policy, forward, tokenizer)
    else:
        sets = _filled_by(run, sets, "reference", config.reference.path, tokenizer)
    if config.behaviour.model_path is not None:
        sets = _filled_by(run, sets, "behaviour", config.behaviour.model_path, tokenizer)
    elif any(set(s.floats) & set(BEHAVIOUR_COLUMNS) for s in sets):
        run.say("align", ["behaviour logps: the rows' own"])
    return sets[0], sets[1] if len(sets) > 1 else None


def _filled_by(run: Run, sets: list[TokenisedPairs], which: str, path: str, tokenizer: Any) -> list[TokenisedPairs]:
    """Logps under another model, which is let go again."""
    model = other_model(run.config, path)
    _check_vocabulary(path, model, tokenizer)
    forward = prepare(model, probe=run.config.align.probe, longest_row=run.config.tokenization.max_length)
    filled = _filled(run, sets, which, model, forward, tokenizer)
    del model, forward
    gc.collect()
    return filled


def _check_vocabulary(path: str, model: Any, tokenizer: Any) -> None:
    """Raises UserError where the policy's token ids mean something else to the model at `path`, or nothing."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if vocabulary < len(tokenizer):
        raise UserError(
            f"{path}: its vocabulary ({vocabulary}) is smaller than that of the policy's tokenizer ({len(tokenizer)}); "
            "name a model that shares the policy's tokenizer"
        )
    try:
        own = load_tokenizer(path, require_eos=False)
    except UserError:
        return  # a folder of weights alone
    check_tokenizers(["the policy", path], [tokenizer, own])


def _filled(
    run: Run, sets: list[TokenisedPairs], which: str, model: Any, forward: PairForward, tokenizer: Any
) -> list[TokenisedPairs]:
    key = {**logps_key(run.config, model, tokenizer), "mode": forward.mode}
    filled = []
    for pairs in sets:
        logps = reference_logps(
            forward,
            pairs,
            key=key,
            cache_dir=cache_folder(run),
            precision=run.config.align.precision,
            progress=f"align: {which} logps",
        )
        filled.append(pairs.with_reference(*logps) if which == "reference" else pairs.with_behaviour(*logps))
    return filled
