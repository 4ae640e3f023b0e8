"""The `align` stage: held-out split, reference and behaviour logps, training, the final model."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

from isdaa.config import departures, resolved
from isdaa.data.overlap import joined, sketch
from isdaa.data.pairs import Counts
from isdaa.data.tokenize_pairs import tokenize_pairs, tokenizer_digest
from isdaa.distributed import once, world_size
from isdaa.errors import UserError
from isdaa.evaluation import fragments
from isdaa.evaluation.vocabulary import check_tokenizers
from isdaa.files import digest, write_json, write_jsonl
from isdaa.foreign import read_json
from isdaa.manifest import HISTORY
from isdaa.models.attention.gpu_attention import compile_layers
from isdaa.models.loading import load_model, load_tokenizer
from isdaa.models.packed.forward import PairForward, prepare
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
    coarse_weights,
    config_digest,
    described,
    device,
    is_start,
    keep_model,
    logps_key,
    merges,
    new_adapter,
    other_digest,
    other_model,
    policy_of,
    record_of,
    resumed,
    starting_path,
    token_settings,
    tokenizer_of,
    trained_adapter,
    trained_model,
    uses_behaviour,
)
from isdaa.training.stages.continued import OPTIMIZER, Ancestor, ancestor_of, ancestry, seen_before, told
from isdaa.training.stages.pair_split import read_pairs
from isdaa.training.stages.sft_and_reward import pairs_source
from isdaa.training.stages.starting_weights import Stalled, sample, starting_weights
from isdaa.training.trainer.authors import foreign_text, naming_columns, not_drawn, takes_reference_for_author
from isdaa.training.trainer.batches import TokenisedPairs, own_logps
from isdaa.training.trainer.callbacks import MetricsFile, metrics_at
from isdaa.training.trainer.checkpoints import named, sampled_digest
from isdaa.training.trainer.preference_trainer import PreferenceTrainer
from isdaa.training.trainer.reference_logps import measure
from isdaa.training.trainer.training_arguments import total_steps, training_arguments
from isdaa.training.trainer.whole_checkpoints import TakenOver


def weights_at_start(run: Run) -> list[str]:
    """What a run would say of its weights before its first step, from a sample of its pairs: `isdaa inspect --weights`.

    run: as `finished_before` gives it; nothing is written but cached logps. Loads the models. Raises UserError as training would.
    """
    config, start = run.config, starting_path(run)
    tokenizer = tokenizer_of(config, start)
    every = TokenisedPairs(_tokens(run, read_pairs(config, pairs_source(run, "align")).rows, tokenizer)[0])
    pairs = sample(every)
    policy, _ = _policy(run, tokenizer, start)
    check_rows(policy, start, *pairs.extent())
    forward = prepare(policy, probe=config.align.probe, longest_row=longest_row(config), attention=config.align.attention)
    key = logps_key(policy, forward.mode, tokenizer, token_settings(config), weights_digest(policy))
    own = own_logps(every)
    filled, _ = _with_logps(run, pairs, None, start, forward, key, tokenizer)
    alone = config.reference.path is None or is_start(config, config.reference.path, start)
    ours = None if alone else partial(measure, forward, key=key, cache_dir=cache_folder(run), precision=config.align.precision)
    notes = [str(line) for line in run.state["stages"].get("align", {}).get("notes", [])]
    try:
        arguments, mu, went_on = config.objective.arguments(), config.behaviour.model_path, config.continue_from is not None
        return notes + starting_weights(arguments, filled, ours, own, mu, False, went_on, total=len(every))
    except Stalled as error:
        return [*notes, f"`isdaa train` will refuse this: {error}"]


OF_MODEL = ("weights", "config", "dtype", "mode")  # of `logps_key`, what a model and its way through the forward pass decide


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
    forward = prepare(policy, probe=config.align.probe, longest_row=longest_row(config), attention=config.align.attention)
    # The reference is the policy exactly as loaded: its logps come before a new adapter.
    key = logps_key(policy, forward.mode, tokenizer, token_settings(config), weights)
    own = own_logps(train)
    run.note("align", own_logps=[int(own.sum()), len(own)])
    train, held_out = _with_logps(run, train, held_out, start, forward, key, tokenizer)
    alone = config.reference.path is None or is_start(config, config.reference.path, start)
    options: Any = {"key": key, "cache_dir": cache_folder(run), "precision": config.align.precision}
    measured = partial(measure, forward, progress="align: the policy's logps at the start", **options)
    arguments, named_model = config.objective.arguments(), config.behaviour.model_path
    policy_logps, allowed = None if alone else measured, config.objective.allow_stall
    run.say("align", starting_weights(arguments, train, policy_logps, own, named_model, allowed, went_on=ancestor is not None))
    if config.lora.rank and not grown:
        plain = policy
        base = once(lambda: adapter_base(run, plain, tokenizer, start))
        policy = new_adapter(config, policy, base)
        # Probed again: what the base's probe found out must hold for the forward that trains.
        forward = prepare(policy, probe=config.align.probe, longest_row=longest_row(config), attention=config.align.attention)
    run.say("align", coarse_weights(policy, config.align.learning_rate))
    if config.align.compile_layers:
        compile_layers(policy)
    steps = total_steps(config.align, len(train), world_size())
    if config.align.warmup_steps >= steps:
        slow = (
            f"the warm-up ({config.align.warmup_steps} steps) is as long as the run ({steps} steps): the learning rate stays low"
        )
        run.say("align", [f"warning: {slow}; lower align.warmup_steps"])
    reference = config.reference.path or start
    checkpoints = run.folder / "checkpoints"

    def record(step: int) -> ModelRecord:
        return record_of(run, "policy", step=step, reference=reference, metrics=metrics_at(trainer.state.log_history, step))

    def describe(folder: Path, step: int) -> None:
        for name, text in described(record(step), named(folder), adapter=config.lora.rank > 0).items():
            (folder / name).write_text(text, encoding="utf-8")

    guard = guard_of(run, tokenizer, forward, start=start, identity=loaded, held_out=held_out, record=record)
    trainer = PreferenceTrainer(
        policy,
        Objective(**config.objective.arguments()),
        args=training_arguments(
            config.align,
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
    settings, behaviour = token_settings(run.config), uses_behaviour(run.config)
    return tokenize_pairs(rows, tokenizer, settings, cache_dir=cache_folder(run), behaviour=behaviour)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None and key != "where"}


def _with_logps(
    run: Run,
    train: TokenisedPairs,
    held_out: TokenisedPairs | None,
    start: str | None,
    forward: PairForward,
    key: dict[str, Any],
    tokenizer: Any,
) -> tuple[TokenisedPairs, TokenisedPairs | None]:
    """Both sets with reference logps, and with behaviour logps where the configuration names a behaviour model.

    forward, key: of the policy as it was loaded from `start`, which stands for every model that is the same one.
    """
    config = run.config
    sets = [s for s in (train, held_out) if s is not None]
    for which, path in (("reference", config.reference.path), ("behaviour", config.behaviour.model_path)):
        if path is None and which == "behaviour":
            continue
        if path is None or is_start(config, path, start):
            sets = _filled(run, sets, which, forward, key)
        else:
            sets = _filled_by(run, sets, which, path, tokenizer)
    return sets[0], sets[1] if len(sets) > 1 else None


def _filled_by(run: Run, sets: list[TokenisedPairs], which: str, path: str, tokenizer: Any) -> list[TokenisedPairs]:
    """Logps under another model, which is loaded only where they are not in the cache, and let go again."""
    settings = run.config

    @cache
    def load() -> PairForward:
        model = other_model(settings, path)
        _check_vocabulary(path, model, tokenizer, which)
        for pairs in sets:
            check_rows(model, path, *pairs.extent())
        return prepare(
            model,
            probe=settings.align.probe,
            longest_row=longest_row(settings),
            attention=settings.align.attention,
        )

    filled = _filled(run, sets, which, load, _key_of(run, path, tokenizer, load))
    del load  # and with it the model
    gc.collect()
    return filled


def _key_of(run: Run, path: str, tokenizer: Any, load: Callable[[], PairForward]) -> dict[str, Any]:
    """`logps_key` of another model: the key under which a run that started from it has kept its logps, too.

    It needs the model, which is loaded once for it: a note beside the logps says what its files hold.
    """
    config, settings = run.config, token_settings(run.config)
    files = {
        "model": other_digest(config, path),
        "revision": config.model.revision,
        "dtype": config.model.dtype,
        "probe": config.align.probe,
        "attention": config.align.attention,
        "longest": longest_row(config),
        "versions": versions(),
        "device": str(device()),
    }
    note = cache_folder(run) / f"model-{digest(files)}.json"
    known = once(lambda: _noted(note))
    if known is not None:
        return {**known, "tokenizer": tokenizer_digest(tokenizer), "tokenization": asdict(settings)}
    forward = load()
    key = logps_key(forward.model, forward.mode, tokenizer, settings)
    once(lambda: write_json(note, {name: key[name] for name in OF_MODEL}))
    return key


def _noted(note: Path) -> dict[str, str] | None:
    """What a note says; None where there is none that can be read."""
    with suppress(UserError, OSError):
        found = read_json(note)
        if isinstance(found, dict) and found.keys() == set(OF_MODEL) and all(isinstance(value, str) for value in found.values()):
            return found
    return None


def _check_vocabulary(path: str, model: Any, tokenizer: Any, which: str) -> None:
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
    instead = "take a method without μ (docs/which_method.md)" if which == "behaviour" else "name another reference"
    advice = f"the {which} model must share the policy's tokenizer; {instead}"
    check_tokenizers(["the policy", path], [tokenizer, own], advice)


def _filled(
    run: Run, sets: list[TokenisedPairs], which: str, forward: PairForward | Callable[[], PairForward], key: dict[str, Any]
) -> list[TokenisedPairs]:
    filled = []
    for pairs in sets:
        found = measure(
            forward,
            pairs,
            key=key,
            cache_dir=cache_folder(run),
            precision=run.config.align.precision,
            progress=f"align: {which} logps",
        )
        filled.append(pairs.with_reference(*found[:2]) if which == "reference" else pairs.with_behaviour(*found[:2]))
        named_model = run.config.behaviour.model_path
        if len(filled) == 1 and uses_behaviour(run.config) and (named_model is None) == (which == "reference"):
            run.say("align", foreign_text(found, pairs, named_model))
    return filled
