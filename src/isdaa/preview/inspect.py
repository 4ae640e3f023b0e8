"""`isdaa inspect`: what a configuration's stages will read and do, before anything is trained."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from isdaa.config import Config
from isdaa.errors import UserError
from isdaa.models.loading import model_config, random_config
from isdaa.objectives.presets import weighs_by_behaviour
from isdaa.preview.devices import check_name, here
from isdaa.preview.fits import Fit, fits
from isdaa.preview.plan import Plan, Sharding, dtype_of, own_memory, plan
from isdaa.preview.rows_seen import Examined, examine, writes_date, written_by_label
from isdaa.terminal import Bar, progress
from isdaa.training.preflight import check_start, revision_of, starts_of
from isdaa.training.run_folder import Run
from isdaa.training.stage_inputs import cache_folder, rounded_away, starting_path, tokenizer_of
from isdaa.training.stages.sft_and_reward import NO_BASE, not_for_reward, pairs_source
from isdaa.training.trainer.training_arguments import total_steps

BUSY = 0.1  # share of the cores; two threads that wait for each other lose far more than that in speed


@dataclass
class StageReport:
    """One stage. steps: of the optimiser, None for `label`; batch: rows of a global batch; architecture: the configuration of the
    model that is trained or sampled from, None where it could not be had."""

    examined: Examined
    architecture: Any = None
    steps: int | None = None
    steps_per_epoch: int | None = None
    batch: int | None = None
    checkpoints: int | None = None
    seen: list[str] = field(default_factory=list)  # which falls of the win rate the evaluation, and the guard, will see
    plan: Plan | None = None

    def facts(self) -> dict[str, Any]:
        """Plain data for a file."""
        names = ("steps", "steps_per_epoch", "batch", "checkpoints", "seen")
        counted = {name: getattr(self, name) for name in names}
        return {**self.examined.facts(), **counted, "plan": self.plan.facts() if self.plan is not None else None}


@dataclass
class Inspection:
    """All that `isdaa inspect` found. missing: what could not be had, one line each, in the form of an error."""

    config: Config
    stages: list[StageReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    fits: list[Fit] | None = None  # what can be trained in the memory that was asked about
    memory: tuple[float, str] | None = None  # that memory in bytes, and the device

    def facts(self) -> dict[str, Any]:
        """Plain data for a file."""
        return {
            "stages": [stage.facts() for stage in self.stages],
            "warnings": self.warnings,
            "missing": self.missing,
            **({} if self.fits is None else {"fits": [asdict(one) for one in self.fits]}),
        }


def inspect(
    config: Config,
    *,
    device: str = "auto",
    processes: int = 1,
    sharding: Sharding = "ddp",
    row: int = 0,
    plans: bool = True,
    weights: bool = False,
    memory: float | None = None,
) -> Inspection:
    """Look at everything that can be had; what cannot is named in `missing`. Nothing is trained, and no model's weights are read
    but for `weights`.

    device: one of `devices.NAMES`, for the plan. processes: of the run, one a device; sharding: what they divide. row: of each
    stage's rows, which is shown token by token. plans: False leaves out memory and time. weights: load the models, and measure
    the pairs' importance weights before the first step. memory: bytes of the device, for which the settings that fit are looked
    for (`fits`).

    Raises UserError where not even a tokenizer can be had, and for an unknown device.
    """
    check_name(device)
    run = _run(config)
    found = Inspection(config)

    @cache
    def belongings(start: str | None) -> tuple[Any, Any]:
        """(tokenizer, architecture) of a model that a stage starts from; None for what is missing."""
        tokenizer = _attempt(found, lambda: tokenizer_of(config, start))
        return tokenizer, None if tokenizer is None else _attempt(found, lambda: architecture_of(config, start, tokenizer))

    tokenizers = [belongings(_start(stage, run))[0] for stage in config.stages]
    if all(tokenizer is None for tokenizer in tokenizers):
        raise UserError(found.missing[0])
    for stage in config.stages:
        start = _start(stage, run)
        tokenizer, architecture = belongings(start)
        if stage == "reward" and start is None and "sft" not in config.stages:
            found.missing.append(NO_BASE)
            continue
        if tokenizer is None:
            continue
        report = _attempt(found, lambda stage=stage, own=tokenizer: _stage(stage, run, found, own, row))
        if report is not None:
            report.architecture = architecture
            _count_steps(report, config, processes)
            found.stages.append(report)
    for trained, name in starts_of(config, config.stages):
        _attempt(found, partial(check_start, config, trained, name))
    if weights:
        _measure_weights(found, run)
    planned = [report for report in found.stages if plans and report.architecture is not None]
    if planned:
        _import_trainers(config)
        program, on = own_memory(), here() if device == "auto" else device
        others = _others(found)
        with progress("planning", total=len(planned)) as bar:
            for report in planned:
                options: dict[str, Any] = {"processes": processes, "sharding": sharding, "program": program, "others": others}
                options |= {"steps": report.steps, "checkpoints": report.checkpoints}
                try:
                    with _without_traces():
                        report.plan = plan(report.examined, config, report.architecture, device=on, **options)
                except Exception as error:  # a model's own code, run without numbers, raises whatever it likes
                    why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                    found.warnings.append(
                        f"{report.examined.stage}: no plan: this model's code does not run without real numbers ({why})"
                    )
                bar.update()
        made = [report for report in planned if report.plan is not None]
        if memory is not None and made:
            found.memory = (memory, on)
            with progress("what fits: plans made") as bar:
                options = {"processes": processes, "sharding": sharding, "program": program, "others": others, "device": on}
                found.fits = _fits(run, found, made, memory, options, bar)
    _warn(found, tokenizers)
    return found


def _measure_weights(found: Inspection, run: Run) -> None:
    """Replace what `align` says of its weights by what it will say."""
    reports = [one for one in found.stages if one.examined.stage == "align" and not one.examined.assumed]
    if not reports or not weighs_by_behaviour(found.config.objective.arguments()):
        found.missing.append("--weights: there are no pairs yet, or the objective has no importance weights")
        return
    from isdaa.training.stages.align import weights_at_start

    said = _attempt(found, lambda: weights_at_start(run))
    if said is not None:
        reports[0].examined.notes = [note for note in reports[0].examined.notes if not note.startswith("μ ")] + said


@contextmanager
def _without_traces() -> Iterator[None]:
    """torch logs the traceback of what fake tensors cannot do, and then raises it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def _fits(run: Run, found: Inspection, reports: list[StageReport], memory: float, options: dict[str, Any], bar: Bar) -> list[Fit]:
    """The ways of training the inspected stages in so much memory; each plan is made anew, at the speed that was found."""
    given = found.config
    examined: dict[int, list[Examined]] = {given.tokenization.max_length: [report.examined for report in reports]}

    def seen(config: Config) -> list[Examined]:
        """The stages' rows at the configuration's length."""
        length = config.tokenization.max_length
        if length not in examined:
            shorter = Run(config).finished_before(own=False)
            stages = [report.examined.stage for report in reports]
            tokenizers = [tokenizer_of(config, _start(stage, run)) for stage in stages]
            both = zip(stages, tokenizers, strict=True)
            examined[length] = [_stage(stage, shorter, found, tokenizer, 0).examined for stage, tokenizer in both]
        return examined[length]

    def planner(config: Config) -> list[Plan]:
        plans = []
        for report, rows in zip(reports, seen(config), strict=True):
            assert report.plan is not None
            speed = report.plan.speed if options["device"] == "cpu" else None
            own = copy.deepcopy(report.architecture)
            with _without_traces():
                made = plan(rows, config, own, steps=report.steps, checkpoints=report.checkpoints, speed=speed, **options)
            plans.append(made)
            bar.update()
        return plans

    def cuts(length: int) -> float:
        lengths = reports[-1].examined.lengths
        whole = lengths[:, 0] + lengths[:, 1:].max(axis=1) if lengths.ndim == 2 and lengths.shape[1] > 1 else lengths.sum(axis=-1)
        return float((whole > length).mean())

    return fits(given, memory, planner, on_gpu=options["device"] != "cpu", cuts=cuts)


def _others(found: Inspection) -> dict[str, Any]:
    """Configurations of further models that lie in memory beside the policy. A scorer may well be trained later."""
    config, others = found.config, {}
    trust = config.model.trust_remote_code
    if "align" in config.stages:
        for name, path in (("reference", config.reference.path), ("behaviour", config.behaviour.model_path)):
            if path is not None:
                others[name] = _attempt(
                    found, partial(model_config, path, trust_remote_code=trust, revision=revision_of(config, path))
                )
    if "label" in config.stages and config.label_scorer not in (None, "gold"):
        with suppress(UserError):
            others["scorer"] = model_config(str(config.label_scorer))
    return {name: architecture for name, architecture in others.items() if architecture is not None}


def _import_trainers(config: Config) -> None:
    """What training will import, so that this process is as large as that one at its start."""
    names = {"sft": "trl.trainer.sft_trainer", "reward": "trl.trainer.reward_trainer", "align": "isdaa.training.stages.align"}
    for stage in config.stages:
        if stage in names:
            import_module(names[stage])


def _run(config: Config) -> Run:
    """The run of a configuration, with what is done in it; nothing is written."""
    return Run(config).finished_before(own=False)


def _attempt(found: Inspection, get: Any) -> Any:
    try:
        return get()
    except UserError as error:
        found.missing.append(str(error))
        return None


def _start(stage: str, run: Run) -> str | None:
    """Where a stage's tokenizer and architecture come from; an SFT model has those of what it started from. A model that is only
    named `model.random` needs no folder."""
    if stage == "reward" and run.config.reward.path is not None:
        return run.config.reward.path
    return run.config.model.path if "sft" in run.config.stages else starting_path(run)


def architecture_of(config: Config, start: str | None, tokenizer: Any) -> Any:
    """The transformers configuration of the policy. Raises UserError where there is none."""
    if start is not None:
        revision = config.model.revision if start == config.model.path else None
        return model_config(start, trust_remote_code=config.model.trust_remote_code, revision=revision)
    assert config.model.random is not None
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return random_config({"vocab_size": len(tokenizer), **ids, **config.model.random})


def _stage(stage: str, run: Run, found: Inspection, tokenizer: Any, row: int) -> StageReport:
    config, cache = run.config, cache_folder(run)
    source = {"sft": config.data.sft, "label": config.data.prompts}.get(stage) or pairs_source(run, stage)
    labelled = config.data.pairs is None or (stage == "align" and config.trains_on_labelled)
    if stage in ("reward", "align") and labelled and not Path(source).exists():
        prompts = next((report.examined for report in found.stages if report.examined.stage == "label"), None)
        if prompts is None:
            raise UserError(f"{source}: not written yet, and the prompts of the label stage could not be read")
        written = written_by_label(config, tokenizer, prompts, cache)
        written.stage = stage
        return StageReport(written)
    examined = examine(stage, config, tokenizer, source, cache, row)
    if stage == "reward":
        examined.notes += not_for_reward(config)
    return StageReport(examined)


def _count_steps(report: StageReport, config: Config, processes: int) -> None:
    stage = report.examined.stage
    if stage == "label":
        return
    settings = getattr(config, stage)
    rows = len(report.examined.lengths)
    report.batch = settings.batch_size * settings.gradient_accumulation_steps * processes
    report.steps = total_steps(settings, rows, processes)
    report.steps_per_epoch = -(-rows // report.batch)
    save = getattr(settings, "save_steps", None) or max(1, -(-report.steps // 10))
    made = -(-report.steps // save)
    kept = getattr(settings, "save_total_limit", None) if stage == "align" else 2
    report.checkpoints = made if kept is None else min(made, kept)
    report.seen = _seen(config, report) if stage == "align" else []


def _seen(config: Config, report: StageReport) -> list[str]:
    """Which falls of the win rate the evaluation and the guard will see."""
    from isdaa.evaluation.verdict import power

    judged, guard = config.evaluation, config.guard
    found = []
    if judged.scorer not in (None, "none") and config.data.evaluation is not None:
        rivals = 1 if judged.opponent == "chosen" else judged.opponent_samples
        found.append(power.seen(report.checkpoints or 0, judged.prompts, rivals))
    if guard.steps is not None and config.guard_scorer is not None:
        planned = (-(-(report.steps or 0) // guard.steps), guard.prompts, guard.opponent_samples)
        found.append(f"guard: {power.seen(*planned, what='measurement') if guard.stop == 'never' else power.stoppable(*planned)}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Warnings


def _warn(found: Inspection, tokenizers: list[Any]) -> None:
    config = found.config
    say = found.warnings.append
    trained = [report for report in found.stages if report.examined.stage != "label" and report.architecture is not None]
    coarse = [
        report.examined.stage
        for report in trained
        if dtype_of(config, report.architecture) == torch.bfloat16 and (report.examined.stage == "reward" or not config.lora.rank)
    ]
    if coarse:
        rate = max(getattr(config, stage).learning_rate for stage in coarse)
        of_file = ", which here is bfloat16," if config.model.dtype == "auto" else ""
        say(rounded_away(f"model.dtype is {config.model.dtype}{of_file}", rate))
    chat = any(
        span.kind == "given" and shown for report in found.stages for shown in report.examined.shown for span in shown.spans
    )
    if chat and any(writes_date(tokenizer) for tokenizer in tokenizers if tokenizer is not None):
        say(
            "the chat template writes today's date into every conversation: a run resumed tomorrow would see other tokens, and "
            "its cached reference logps would not match; give a --model.tokenizer whose template does not write the date"
        )
    for report in found.stages:
        _warn_of_stage(report, config, report.architecture, say)
        if report.plan is not None and found.fits is None:  # else the list says what fits
            warn_of_plan(report.plan, say)


def _warn_of_stage(report: StageReport, config: Config, architecture: Any, say: Any) -> None:
    examined, stage = report.examined, report.examined.stage
    if report.steps is not None and getattr(config, stage).warmup_steps >= report.steps:
        warm = getattr(config, stage).warmup_steps
        say(
            f"{stage}: the warm-up ({warm} steps) is as long as the run ({report.steps} steps), so the learning rate stays low; "
            f"lower {stage}.warmup_steps"
        )
    if architecture is not None:
        text = architecture.get_text_config()
        longest = _longest(examined, config)
        positions = getattr(text, "max_position_embeddings", None)
        if isinstance(positions, int) and 0 < positions < longest:
            say(
                f"{stage}: the longest row has {longest} tokens, the model {positions} positions; lower --tokenization.max_length"
            )
        if examined.highest_id >= getattr(text, "vocab_size", examined.highest_id + 1):
            say(
                f"{stage}: token id {examined.highest_id} is outside the model's vocabulary of {text.vocab_size}; "
                "does the tokenizer belong to the model?"
            )
    if examined.ended is not None and examined.ended < 0.9:
        say(
            f"{stage}: only {examined.ended:.0%} of the responses end with an end token; only these teach the model to stop "
            "(raise --tokenization.max_length, or check whether the data was cut)"
        )
    cut = sum(int(part.cut.sum()) for part in examined.parts if part.name in ("prompt", "example"))
    share = cut / max(1, sum(len(part.lengths) for part in examined.parts if part.name in ("prompt", "example")))
    if share > 0.05:
        say(f"{stage}: {share:.0%} of the {'examples' if stage == 'sft' else 'prompts'} are cut")


def warn_of_plan(plan: Plan, say: Any) -> None:
    if plan.speed.elsewhere > BUSY:
        say(
            f"{plan.stage}: other programs used {plan.speed.elsewhere:.0%} of the cores while the speed was measured, so the "
            "times may be far too long; repeat on an idle machine"
        )
    if plan.available is not None and plan.peak.total > plan.available:
        say(
            f"{plan.stage}: needs about {plan.peak.total / 1e9:.1f} GB of memory, has {plan.available / 1e9:.1f}: lower "
            f"batch_size and raise gradient_accumulation_steps, set --{plan.stage}.gradient_checkpointing or --lora.rank, or "
            "shard it over more devices (--memory lists settings that fit)"
        )
    if plan.disk_free is not None and plan.disk > plan.disk_free:
        less = "raise --align.save_steps, set --align.save_total_limit, or " if plan.stage == "align" else ""
        say(
            f"{plan.stage}: checkpoints will take {plan.disk / 1e9:.1f} GB, only {plan.disk_free / 1e9:.1f} GB are free: "
            f"{less}free some space"
        )


def _longest(examined: Examined, config: Config) -> int:
    lengths = examined.lengths
    if examined.stage == "label":
        return int(lengths.max()) + config.label.max_new_tokens
    return int((lengths[:, 0] + lengths[:, 1:].max(1)).max()) if lengths.shape[1] > 1 else int(lengths.max())
