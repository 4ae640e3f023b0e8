"""The `align` stage: held-out split, reference and behaviour logps, training, the final model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from isdaa.config import departures, resolved
from isdaa.data.encoder import token_settings
from isdaa.data.overlap import joined, sketch
from isdaa.data.pairs import Counts
from isdaa.data.tokenize_pairs import tokenize_pairs
from isdaa.distributed import once, world_size
from isdaa.errors import UserError
from isdaa.evaluation import fragments
from isdaa.files import digest, write_jsonl
from isdaa.manifest import HISTORY
from isdaa.models.attention.gpu_attention import compile_layers
from isdaa.models.loading import load_model
from isdaa.models.places import is_adapter
from isdaa.models.saving import weights_digest
from isdaa.objectives.objective import Objective
from isdaa.record import ModelRecord, versions
from isdaa.terminal import working
from isdaa.training.disk_room import check_training
from isdaa.training.guard.guard import guard_of
from isdaa.training.guard.measurement import longest_row
from isdaa.training.preflight import check_start
from isdaa.training.run_folder import Run
from isdaa.training.stage_inputs import (
    adapter_base,
    cache_folder,
    check_rows,
    config_digest,
    decided,
    described,
    device,
    is_start,
    keep_model,
    merges,
    new_adapter,
    other_digest,
    other_model,
    policy_of,
    record_of,
    resumed,
    starting_path,
    tokenizer_of,
    trained_adapter,
    trained_model,
    uses_behaviour,
)
from isdaa.training.stages.continued import OPTIMIZER, Ancestor, ancestor_of, ancestry, seen_before, told
from isdaa.training.stages.pair_split import read_pairs
from isdaa.training.stages.preparation import Other, Preparation, check_vocabulary, prepared
from isdaa.training.stages.sft_and_reward import pairs_source
from isdaa.training.stages.starting_weights import Stalled, starting_weights, thinned
from isdaa.training.trainer.authors import naming_columns, not_drawn, takes_reference_for_author
from isdaa.training.trainer.batches import TokenisedPairs, own_logps
from isdaa.training.trainer.callbacks import MetricsFile, metrics_at
from isdaa.training.trainer.checkpoints import named, sampled_digest
from isdaa.training.trainer.preference_trainer import PreferenceTrainer
from isdaa.training.trainer.training_arguments import total_steps, training_arguments
from isdaa.training.trainer.whole_checkpoints import TakenOver


def weights_at_start(run: Run) -> list[str]:
    """What a run would say of its weights before its first step, from a sample of its pairs: `isdaa inspect --weights`.

    run: as `finished_before` gives it; nothing is written but cached logps. Loads the models. Raises UserError as training would.
    """
    config, start = run.config, starting_path(run)
    tokenizer = tokenizer_of(config, start)
    every = TokenisedPairs(_tokens(run, read_pairs(config, pairs_source(run, "align")).rows, tokenizer)[0])
    pairs = thinned(every)
    policy, _ = _policy(run, tokenizer, start)
    check_rows(policy, start, *pairs.extent())
    how = _preparation(run, tokenizer, decided(run, "align", policy, every.lengths().mean()).precision)
    forward, sources = how.forward(policy), _sources(run, how, start)
    key, own = how.key(forward), own_logps(every)
    (filled,) = how.with_logps([pairs], sources, forward, key)
    ours = None if sources["reference"] is None else partial(how.measure, forward, key, what="the policy's logps at the start")
    notes = [str(line) for line in run.state["stages"].get("align", {}).get("notes", [])]
    try:
        arguments, mu, went_on = config.objective.arguments(), config.behaviour.model_path, config.continue_from is not None
        return notes + starting_weights(arguments, filled, ours, own, mu, False, went_on, total=len(every))
    except Stalled as error:
        return [*notes, f"`isdaa train` will refuse this: {error}"]


def align(run: Run) -> Path:
    """Train the policy on preference pairs. Returns the final model's folder."""
    config = run.config
    start = starting_path(run)
    tokenizer = tokenizer_of(config, start)
    if others := departures(resolved(config)["objective"]):
        method = config.objective.method
        run.say("align", [f"objective.method is {method} with {', '.join(others)} (in brackets: {method}'s own values)"])
    ancestor = once(lambda: None if config.continue_from is None else ancestor_of(config.continue_from))
    if ancestor is not None:
        run.say("align", told(ancestor, config))
    with working("align: reading pairs"):
        train, held_out = once(lambda: _pairs(run, tokenizer, ancestor))
    if start is not None:
        check_start(config, "align", start)
    policy, grown = _policy(run, tokenizer, start)
    for pairs in (train, held_out):
        if pairs is not None:
            check_rows(policy, start, *pairs.extent())
    weights = weights_digest(policy)
    run.pin("align", weights=weights, pairs=train.content_digest())
    if ancestor is not None:
        run.note("align", continued=ancestry(ancestor, config, weights))
        if config.continue_optimizer:
            run.pin("align", **{"optimiser states": once(lambda: sampled_digest(ancestor.folder / OPTIMIZER))})
    loaded = {"weights": weights, "config": config_digest(policy), "dtype": config.model.dtype}
    check_training(
        run, "align", policy, config.align, len(train),
        folder=run.folder / "checkpoints", limit=config.align.save_total_limit, lora=config.lora,
        best=config.guard.steps is not None and config.guard.keep == "best",
        logps=2 * (len(train) + (0 if held_out is None else len(held_out))),
    )  # fmt: skip
    settings = decided(run, "align", policy, train.lengths().mean())
    how = _preparation(run, tokenizer, settings.precision)

    def adapter(plain: Any) -> Any:
        return new_adapter(config, plain, once(lambda: adapter_base(run, plain, tokenizer, start)))

    ready = prepared(
        how,
        policy,
        [pairs for pairs in (train, held_out) if pairs is not None],
        _sources(run, how, start),
        rate=config.align.learning_rate,
        adapter=adapter if config.lora.rank and not grown else None,
        weights=weights,
        allow_stall=config.objective.allow_stall,
        went_on=ancestor is not None,
    )
    policy, forward, train = ready.policy, ready.forward, ready.sets[0]
    held_out = None if held_out is None else ready.sets[1]
    run.note("align", own_logps=[int(ready.own.sum()), len(ready.own)])
    if config.align.compile_layers:
        compile_layers(policy)
    steps = total_steps(config.align, len(train), world_size())
    if config.align.warmup_steps >= steps:
        slow = (
            f"the warm-up ({config.align.warmup_steps} steps) is as long as the run ({steps} steps): the learning rate stays low"
        )
        run.say("align", [f"warning: {slow}; lower --align.warmup_steps"])
    reference = config.reference.path or start
    checkpoints = run.folder / "checkpoints"

    def record(step: int) -> ModelRecord:
        return record_of(run, "policy", step=step, reference=reference, metrics=metrics_at(trainer.state.log_history, step))

    def describe(folder: Path, step: int) -> None:
        for name, text in described(record(step), named(folder), adapter=config.lora.rank > 0).items():
            (folder / name).write_text(text, encoding="utf-8")

    guard = guard_of(run, tokenizer, forward, settings.precision, start=start, identity=loaded, held_out=held_out, record=record)
    trainer = PreferenceTrainer(
        policy,
        Objective(**config.objective.arguments()),
        args=training_arguments(
            settings,
            checkpoints,
            seed=config.seed,
            pairs=len(train),
            eval_pairs=len(held_out) if held_out else 0,
            world_size=world_size(),
        ),
        forward=forward,
        train_dataset=train,
        eval_dataset=held_out,
        tokenizer=tokenizer,
        callbacks=[MetricsFile(run.folder / HISTORY), *([guard] if guard is not None else [])],
        starts_at_reference=config.reference.path is None,
        went_on=ancestor is not None,
        batch_tokens=config.align.batch_tokens,
        group_by_prompt=config.align.group_by_prompt,
        before_rename=describe,
        description=f"align: {config.objective.method}",
    )
    if guard is not None:
        guard.attach(trainer)
    if ancestor is not None and config.continue_optimizer:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise UserError("continue_optimizer: a sharded optimiser's state cannot be loaded; leave it out")
        trainer.add_callback(TakenOver(ancestor.folder))
    trainer.train(resume_from_checkpoint=resumed("align", checkpoints, steps))
    if guard is not None:
        run.say("align", guard.summary())
        run.note("align", guard=guard.facts())
    folder = run.folder / "model"
    load = partial(load_model, dtype=config.model.dtype, trust_remote_code=config.model.trust_remote_code)
    merge = merges(config, policy) or not config.lora.rank
    keep_model(partial(trained_model, trainer, load, merge), tokenizer, folder, record(trainer.state.global_step), merge=merge)
    return folder


def _policy(run: Run, tokenizer: Any, start: str | None) -> tuple[Any, bool]:
    """The model that training starts from, and whether it is an adapter that is trained on."""
    if run.config.continue_from is not None and start is not None and is_adapter(start):
        return trained_adapter(run.config, start), True
    return policy_of(run, tokenizer, start), False


def _pairs(run: Run, tokenizer: Any, ancestor: Ancestor | None = None) -> tuple[TokenisedPairs, TokenisedPairs | None]:
    """Training and held-out pairs as token ids; the held-out ones are also kept as text, for `isdaa evaluate`."""
    config = run.config
    read = read_pairs(config, pairs_source(run, "align"))
    before = None if ancestor is None or ancestor.record is None else ancestor.record.trained_on
    run.note("align", trained_on=joined(sketch(read.rows), before))
    if config.trains_on_labelled and config.data.pairs is not None:
        run.say("align", ["trains on the pairs that label wrote; data.pairs are for the reward model"])
    if read.common:
        run.say(
            "align",
            [f"warning: {read.common} prompts are in both data.pairs and data.eval_pairs: held-out metrics look too good"],
        )
    rows, held, counts, held_counts = read.rows, read.held, read.counts, read.held_counts
    if ancestor is not None:
        run.say("align", seen_before(ancestor, config, held))
    tokens, more = _tokens(run, rows, tokenizer)
    run.say("align", [f"training pairs: {line}" for line in (counts + more).lines()])
    run.say("align", not_drawn(config.objective.arguments(), counts))
    cut = [not finished for name in ("chosen_finished", "rejected_finished") for finished in rows[name]]
    if fragments.many(share := sum(cut) / len(cut)):
        told = "the model learns no end from them; sample again with a larger limit (label.max_new_tokens)"
        run.say("align", [f"warning: {fragments.percent(share)} of the training pairs' responses were cut: {told}"])
    if takes_reference_for_author(config, train := TokenisedPairs(tokens)):
        run.say("align", naming_columns(counts))
    if held is None:
        run.say("align", ["no held-out pairs"])
        (run.folder / "eval_pairs.jsonl").unlink(missing_ok=True)
        return train, None
    write_jsonl(run.folder / "eval_pairs.jsonl", (_plain(row) for row in held))
    held_tokens, more = _tokens(run, held, tokenizer)
    run.say("align", [f"held-out pairs: {line}" for line in (held_counts + more).lines()])
    return train, TokenisedPairs(held_tokens)


def _tokens(run: Run, rows: Any, tokenizer: Any) -> tuple[Any, Counts]:
    settings, behaviour = token_settings(run.config.tokenization), uses_behaviour(run.config)
    return tokenize_pairs(rows, tokenizer, settings, cache_dir=cache_folder(run), behaviour=behaviour)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None and key != "where"}


def _preparation(run: Run, tokenizer: Any, precision: str) -> Preparation:
    config, align = run.config, run.config.align
    return Preparation(
        tokenizer=tokenizer,
        tokenization=token_settings(config.tokenization),
        probe=align.probe,
        attention=align.attention,
        longest=longest_row(config),
        precision=precision,
        cache_dir=cache_folder(run),
        objective=config.objective.arguments(),
        mu=config.behaviour.model_path,
        stage="align",
        say=partial(run.say, "align"),
    )


def _sources(run: Run, how: Preparation, start: str | None) -> dict[str, Other | None]:
    """What gives the logps of the reference and of a behaviour model; None for the policy as it was loaded from `start`, and
    for every model that is the same one."""
    config = run.config

    def other(which: str, path: str) -> Other:
        def load() -> Any:
            model = other_model(config, path)
            check_vocabulary(path, model, how.tokenizer, which)
            return model

        # The key is the one under which a run that started from this model has kept its logps, too.
        files = {
            "model": other_digest(config, path),
            "revision": config.model.revision,
            "dtype": config.model.dtype,
            "probe": config.align.probe,
            "attention": config.align.attention,
            "longest": how.longest,
            "versions": versions(),
            "device": str(device()),
        }
        return Other(load, path, how.cache_dir / f"model-{digest(files)}.json")

    named_models = {"reference": config.reference.path, "behaviour": config.behaviour.model_path}
    return {
        which: None if path is None or is_start(config, path, start) else other(which, path)
        for which, path in named_models.items()
        if path is not None or which == "reference"
    }
