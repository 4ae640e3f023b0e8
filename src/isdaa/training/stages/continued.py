"""Going on: a new run whose policy has the trained weights of an old one, whose reference is the old one's π_ref, and whose
settings are the old one's where nothing else is said (docs/going_on.md).

All of it becomes an ordinary configuration (`model.path`, `reference.path`, `data.pairs`, …), so that a stage cannot tell such a
run from any other, and the same command goes on with it after a kill.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from isdaa.config import REWARD, TAKEN_AWAY, Config, Location, fields, laid_over, lay_over, layers, parsed, resolved, validate
from isdaa.config.taken_away import at_default
from isdaa.data.reading.sources import common_prompts
from isdaa.errors import UserError, nearest_path
from isdaa.evaluation.checkpoints.provenance import records_of
from isdaa.files import located
from isdaa.foreign import check_shape, read_json
from isdaa.manifest import MANIFEST, defect
from isdaa.models.places import adapter_base, is_adapter
from isdaa.ownership import is_own
from isdaa.record import RUN, ModelRecord, read_record, resolve_from, run_folder
from isdaa.training.run_folder import SHAPE, flattened
from isdaa.training.stages.pair_split import read_pairs
from isdaa.training.trainer.checkpoints import PREFIX, check_resumable, checkpoints, complete_checkpoints
from isdaa.training.unchanged import WORLD, changed_inputs, changed_model, places_read

OPTIMIZER = "optimizer.pt"
CONFIG = "config.yaml"  # in a run's folder, its settings
BEST = "best"  # in a run's folder, what its guard keeps
NO_POLICY = {
    "sft": "a model of the sft stage, which has no reference; start from it with --model.path",
    "reward": "a reward model, not a policy; to score with it, use --guard.scorer",
}
# Said in words of their own, or of no meaning for what comes out.
NO_DIFFERENCE = ("output_dir", "stages", "continue_from", "continue_optimizer", "model.path", "model.random", "model.revision")


@dataclass(frozen=True)
class Ancestor:
    """What a new run goes on from.

    folder: of the trained weights. run: the folder of the run that trained them; None where another program did. reference: of
    that run, a folder or Hub name, with its revision. config: of that run, resolved, with places as they are named from here.
    stages: what `run.json` says of them. edited: settings that its `config.yaml` has no longer as it was trained with them.
    """

    folder: Path
    run: Path | None = None
    record: ModelRecord | None = None
    reference: str | None = None
    revision: str | None = None
    config: dict[str, Any] | None = None
    stages: Mapping[str, Any] = field(default_factory=dict)
    edited: tuple[str, ...] = ()

    @property
    def step(self) -> int | None:
        """Optimiser step of the weights in their run."""
        return None if self.record is None else self.record.step

    @property
    def name(self) -> str:
        """The folder as messages call it."""
        return spelled(self.folder)

    def noted(self, stage: str) -> dict[str, Any]:
        """Facts of what a stage of the run read (`training.unchanged`)."""
        found: dict[str, Any] = self.stages.get(stage, {}).get("inputs", {})
        return found

    @property
    def began(self) -> dict[str, Any] | None:
        """Facts of the model that the run's `align` began with."""
        return self.noted("align").get("sft", self.noted("align").get("model.path"))

    @property
    def was(self) -> dict[str, Any] | None:
        """Facts of the run's reference."""
        assert self.config is not None
        return self.began if self.config["reference"]["path"] is None else self.noted("align").get("reference.path")


def config_of(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Config:
    """As `load_config`, of a run that may go on from another: what nobody gives is that one's, whose file is `--config` then.

    Raises UserError as `load_config` and `ancestor_of` do, and where the new run could not be told from the old one.
    """
    data = layers(path, overrides)
    where = "command line" if path is None else located(path)
    name = data.get("continue_from")
    sections = {key.partition(".")[0] for key, _, _ in fields() if "." in key}
    if not isinstance(name, str) or any(not isinstance(data.get(key, {}), dict) for key in sections):
        return validate(data, where, overrides or {})
    parsed({key: data[key] for key in ("continue_from", "output_dir", "stages") if key in data}, where, overrides or {})
    ancestor = ancestor_of(name)
    # A file that does not say `continue_from` may be the old run's own: what it says of stages and reference held for that one.
    file = {} if path is None else layers(path)
    if path is not None and ancestor.run is not None and _same(located(path), ancestor.run / CONFIG):
        data = laid_over(_placed(ancestor.run, ancestor.stages["align"], layers(path)), overrides or {})
    laid = _laid_over(ancestor, data, data if file.get("continue_from") == name else layers(None, overrides))
    config = validate(laid, where if path or ancestor.run is None else f"{ancestor.run / CONFIG}", overrides or {})
    if config.continue_optimizer:
        _check_optimizer(ancestor, config)
    return config


# ---------------------------------------------------------------------------------------------------------------------
# What is gone on from


def place_of(name: str) -> Path:
    """The folder that is meant: a run, one of its checkpoints (`RUN/checkpoint-N`) or models, or any other model's.

    Raises UserError where there is none.
    """
    path = Path(located(name))
    inside = path.parent / "checkpoints" / path.name
    if path.name.startswith(PREFIX) and not path.exists() and inside.is_dir():
        return inside
    if path.is_dir():
        return path
    if path.name.startswith(PREFIX) and (found := [p.name for p in checkpoints(path.parent / "checkpoints")]):
        raise UserError(f"continue_from: {name}: no such checkpoint; {path.parent} has {', '.join(found)}")
    if path.exists():
        raise UserError(f"continue_from: {name}: a file; name the run's folder: {path.parent}")
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    raise UserError(f"continue_from: {name}: no such folder{nearest_path(name, beside)}; name a run or RUN/checkpoint-N")


def ancestor_of(name: str) -> Ancestor:
    """The weights that a name stands for, and what the run that trained them says of itself.

    Raises UserError where the run is not the user's own, has not finished (unless a checkpoint is named), was stopped by its
    guard (unless one of its models is named), or where the weights are not those that were written.
    """
    place = place_of(name)
    run = place if (place / RUN).is_file() else place.absolute().parent if place.name == BEST else run_folder(place)
    if run is None or not (run / RUN).is_file():
        return _foreign(place)
    state = read_json(run / RUN)
    check_shape(state, SHAPE, f"{run / RUN}: not a record of isdaa")
    if not is_own(RUN, state):
        raise UserError(
            f"continue_from: {run}: not a run of yours on this machine ({RUN} does not carry your digest); if you trust it, add "
            "--adopt to the command"
        )
    begun = state["stages"].get("align")
    if begun is None:
        made = ", ".join(state["stages"]) or "none"
        raise UserError(
            f"continue_from: {run}: has no align stage to continue (stages: {made}); use --model.path to start from a model"
        )
    folder = _of_run(run, begun) if place == run else place
    config, edited = _settings_of(run, state["stages"])
    folder = _with_adapter(run, folder) if config["lora"]["rank"] and not is_adapter(str(folder)) else folder
    _check_whole(folder)
    if config["model"].get("quantization") and is_adapter(str(folder)):
        raise UserError(
            f"continue_from: {folder}: an adapter on 4-bit weights cannot be continued; merge it (lora.merge: true in its own "
            f"run), then use --model.path {run / 'model'} with --reference.path and a new adapter"
        )
    records = records_of([str(folder)])
    records.require({"reference": "reference.path"})
    record = records.by_path[str(folder)]
    reference = None if record is None else record.reference
    if reference is None and (run / "base").is_dir():  # of an adapter that began on new random weights
        reference = str(run / "base")
    model, own = config["model"], config["reference"]
    revision = own.get("revision") if own.get("path") is not None else model.get("revision")
    at_hub = reference is not None and not Path(reference).exists()
    return Ancestor(folder, run, record, reference, revision if at_hub else None, config, state["stages"], edited)


def _foreign(place: Path) -> Ancestor:
    record = read_record(place)
    if record is not None and record.kind in NO_POLICY:
        raise UserError(f"continue_from: {place}: {NO_POLICY[record.kind]} {place}")
    if is_adapter(str(place)):
        raise UserError(
            f"continue_from: {place}: an adapter of another program; train a new adapter on its merged weights: --model.path "
            f"{place} --lora.rank … --reference.path …"
        )
    if not (place / "config.json").is_file():
        found = [path.name for path in checkpoints(place)]
        has = f"a trainer's output; name a checkpoint ({', '.join(found)})" if found else "neither a run of isdaa nor a model"
        raise UserError(f"continue_from: {place}: {has}")
    _check_whole(place)
    return Ancestor(place)


def _of_run(run: Path, begun: Mapping[str, Any]) -> Path:
    """The weights that a finished run stands for."""
    if not begun.get("done"):
        there = complete_checkpoints(run / "checkpoints")
        named = f", or name a checkpoint: --continue_from {run / Path(there[-1]).name}" if there else ""
        again = f"isdaa train --config {run / CONFIG}"
        raise UserError(f"continue_from: {run}: its align stage has not finished; finish it ({again}){named}")
    record = records_of([str(run / "model")]).by_path[str(run / "model")]
    last = None if record is None else record.step
    stopped = (begun.get("guard") or {}).get("stopped")
    if stopped is not None:
        best = begun["guard"].get("best_step")
        places = [run / BEST, run / "checkpoints" / f"{PREFIX}{best}"]
        found = next((path for path in places if path.is_dir()), None)
        kept = f"{found} (step {best}, its highest win rate)" if found else f"a checkpoint near step {best}, its highest win rate"
        raise UserError(
            f"continue_from: {run}: its guard stopped it at step {stopped['step']}, after its win rate had fallen; name the "
            f"weights to use: {kept}, or {run / 'model'} (step {last}, after the fall)"
        )
    checkpoint = run / "checkpoints" / f"{PREFIX}{last}"
    return checkpoint if checkpoint.is_dir() else run / "model"


def _with_adapter(run: Path, folder: Path) -> Path:
    """The checkpoint that holds the adapter which lies merged in `folder`."""
    record = records_of([str(folder)]).by_path[str(folder)]
    checkpoint = run / "checkpoints" / f"{PREFIX}{None if record is None else record.step}"
    if not (checkpoint.is_dir() and is_adapter(str(checkpoint))):
        raise UserError(
            f"continue_from: {folder}: its adapter is merged into its weights, and no checkpoint of this step has it; name "
            f"RUN/checkpoint-N, or train a new adapter on it: --model.path {folder} --reference.path …"
        )
    return checkpoint


def _check_whole(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"continue_from: {folder}: the folder is missing; name a checkpoint")
    wrong = defect(folder, resume=False) if (folder / MANIFEST).is_file() else None
    if wrong is not None:
        raise UserError(
            f"continue_from: {folder}: its weights have changed since they were written ({wrong}); restore them, or name others"
        )


def _settings_of(run: Path, stages: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The run's resolved configuration, and what of it is no longer so in its file.

    What decided its stages, whose code may run among it, its record says: the file could be anybody's.
    """
    path, begun = run / CONFIG, stages["align"]
    read = parsed(layers(path), str(path))
    data, known = resolved(read), {key for key, _, _ in fields()} | {*TAKEN_AWAY}  # which are refused, or at their defaults
    for stage in sorted(stages, key=lambda stage: stage == "align"):
        values = stages[stage].get("values", {})
        if values:  # which of these keys there are is noted with them
            data["tokenization"]["chat_template_kwargs"] = {}
            data["objective"].pop("allow_stall", None)
        for key, value in values.items():
            if (key in known or key.startswith("tokenization.chat_template_kwargs.")) and not at_default(key, value):
                lay_over(data, key, value)
    data["model"]["trust_remote_code"] = begun.get("values", {}).get("model.trust_remote_code") is True
    old, new = flattened(resolved(read)), flattened(data)
    edited = [f"{key} {new.get(key)!r} (not {old.get(key)!r})" for key in {**old, **new} if old.get(key) != new.get(key)]
    data = _placed(run, begun, data) | {"output_dir": str(run)}
    return resolved(parsed(data, str(run / RUN))), tuple(edited)


def _placed(run: Path, begun: Mapping[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Settings as the run's command named them, with places as they are called from here."""
    flat = flattened(data)
    for key, kind, _ in fields():
        place = flat.get(key)
        if Location not in get_args(kind.annotation) or not isinstance(place, str) or "cwd" not in begun:
            continue
        if place.startswith(WORLD) or place in ("none", REWARD):
            continue
        found = resolve_from(run / begun["cwd"], place)
        if found not in (place, resolve_from(Path(), place)):
            lay_over(data, key, spelled(str(found)))
    return data


def _check_optimizer(ancestor: Ancestor, config: Config) -> None:
    folder = ancestor.folder
    if not (folder / OPTIMIZER).is_file():
        raise UserError(f"continue_optimizer: {folder} has no {OPTIMIZER}; name a checkpoint (RUN/checkpoint-N), or leave it out")
    check_resumable(folder)
    before = (ancestor.config or {}).get("align", {}).get("optimizer")
    if before != config.align.optimizer:
        raise UserError(
            f"continue_optimizer: {folder} has the state of {before}, not of align.optimizer {config.align.optimizer}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The new run's configuration


def _laid_over(ancestor: Ancestor, given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The old run's configuration with what was given on top, and the old weights and reference in their places.

    own: what was given of the new run for sure, and does not come from a file of the old one.
    """
    old = ancestor.config or {}
    once = {"continue_optimizer": False}  # of an old run that went on itself
    data = laid_over(copy.deepcopy(dict(old)) | once, _dotted(given))

    _check_output(ancestor, given.get("output_dir"))
    data["model"] = _model(ancestor, given, data.get("model"))
    reference = _reference(ancestor, given, own)
    told = (given.get("reference") or {}).get("revision")
    revision = told if told is not None or reference != ancestor.reference else ancestor.revision
    data["reference"] = {**(data.get("reference") or {}), "path": spelled(reference), "revision": revision}
    if "stages" not in own and given.get("stages") in (None, old.get("stages")):
        data["stages"] = ["align"]
    elif "sft" in data["stages"]:
        raise UserError("stages: sft would start from another model than continue_from; leave it out")
    if ancestor.run is not None:
        _own_files(ancestor.run, data, old)
        _check_adapter(ancestor, data["lora"])
        _check_unchanged(ancestor, reference, revision)
    return data


def _dotted(data: Mapping[str, Any]) -> dict[str, Any]:
    sections = {key: value for key, value in data.items() if isinstance(value, dict)}
    named = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    return named | {key: value for key, value in data.items() if key not in sections}


def _check_output(ancestor: Ancestor, output: Any) -> None:
    old = (ancestor.run or ancestor.folder).resolve()
    if not isinstance(output, str):
        raise UserError(f"output_dir: a run continued from {spelled(old)} needs a folder of its own; add --output_dir")
    new = Path(located(output)).resolve()
    if new == old or old in new.parents:
        raise UserError(f"output_dir: {output} is the old run's folder, or inside it; name a new folder")


def _model(ancestor: Ancestor, given: Mapping[str, Any], model: Any) -> dict[str, Any]:
    old, said = (ancestor.config or {}).get("model", {}), given.get("model") or {}
    for key in ("path", "random", "revision"):
        value = said.get(key)
        if value in (None, old.get(key)) or (key == "path" and _same(value, old.get(key), ancestor.folder)):
            continue
        shown = f" {value}" if isinstance(value, str) else ""
        raise UserError(
            f"model.{key}:{shown} and continue_from: {given['continue_from']}: training starts from one of them; leave one out"
        )
    return {**(model or {}), "path": spelled(ancestor.folder), "random": None, "revision": None}


def _reference(ancestor: Ancestor, given: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    path, said = (given.get("reference") or {}).get("path"), (own.get("reference") or {}).get("path", ...)
    if said is None:
        raise UserError(
            f"reference.path: null would mean the trained weights; leave it out for the old run's π_ref, or name {ancestor.name}"
        )
    if path is not None and (said is not ... or path != (ancestor.config or {}).get("reference", {}).get("path")):
        return str(path)
    if ancestor.reference is None:
        why = "not a run of isdaa" if ancestor.run is None else "its record is incomplete"
        raise UserError(f"continue_from: {ancestor.name}: {why}, so its reference π_ref is unknown; give --reference.path")
    if ancestor.reference.startswith((".", "/")) and not Path(ancestor.reference).exists():
        gone = f"its reference {spelled(ancestor.reference)} is missing"
        raise UserError(f"continue_from: {ancestor.name}: {gone}; restore it, or give its new path with --reference.path")
    return ancestor.reference


def _check_unchanged(ancestor: Ancestor, reference: str, revision: str | None) -> None:
    """Raises UserError where the old run's reference, or the base under its adapter, is not what it was."""
    assert ancestor.config is not None and ancestor.run is not None
    if _same(reference, ancestor.reference) and revision == ancestor.revision:
        then = (ancestor.was or {}).get("revision")
        way = "restore it, or name another with --reference.path"
        way = way if then is None else f"give the old revision: --reference.revision {then}"
        _check_model(ancestor, "its reference", reference, ancestor.was, revision, way)
    if not is_adapter(str(ancestor.folder)):
        return
    base, model = adapter_base(ancestor.folder), ancestor.config["model"]
    way = f"restore it, or train a new adapter: --model.path {spelled(ancestor.run / 'model')} --reference.path …"
    if base is None:
        raise UserError(f"continue_from: {ancestor.name}: the base of this adapter is missing; {way}")
    if not _same(base, ancestor.run / "base"):  # made by the run, with a manifest of its own
        # Where the run itself went on, it began with an adapter, whose base is this one.
        began = base if ancestor.config["continue_from"] is None else str(model["path"])
        _check_model(ancestor, "the base of this adapter", began, ancestor.began, model["revision"], way)


def _check_model(
    ancestor: Ancestor, what: str, place: str, before: dict[str, Any] | None, revision: str | None, way: str
) -> None:
    changed = changed_model(before, place, revision)
    if changed is not None:
        raise UserError(f"continue_from: {ancestor.name}: {what}, {spelled(place)}, has changed since ({changed}); {way}")


def _same(place: Any, *others: Any) -> bool:
    """Whether a place is one of others, whatever it is called."""
    return any(other is not None and Path(str(place)).resolve() == Path(str(other)).resolve() for other in others)


def _own_files(run: Path, data: dict[str, Any], old: Mapping[str, Any]) -> None:
    """What the old run's earlier stages made for it: pairs and a reward model."""
    before, pairs = Config.model_validate(old), data["data"].get("pairs")
    same = pairs == before.data.pairs
    if "label" not in data["stages"] and same and (pairs is None or before.trains_on_labelled):
        data["data"] = {**data["data"], "pairs": spelled(run / "pairs" / "train.jsonl")}
    if "label" in data["stages"] and same and REWARD not in data["stages"]:
        data["data"] = {**data["data"], "pairs": None}  # it makes others
    if REWARD in data["stages"] or not (run / REWARD).is_dir():
        return
    for section in ("guard", "evaluation", "label"):
        if data[section].get("scorer") == REWARD:
            data[section] = {**data[section], "scorer": spelled(run / REWARD)}
    implied = before.guard_scorer is not None and not (before.guard.scorer or before.evaluation.scorer)
    if implied and not (data["guard"]["scorer"] or data["evaluation"]["scorer"]):
        data["guard"] = {**data["guard"], "scorer": spelled(run / REWARD)}


def _check_adapter(ancestor: Ancestor, lora: Mapping[str, Any]) -> None:
    old = (ancestor.config or {})["lora"]
    changed = next((key for key in ("rank", "alpha", "target_modules") if lora[key] != old[key]), None)
    if changed is not None and is_adapter(str(ancestor.folder)):
        raise UserError(
            f"lora.{changed}: the adapter has {old[changed]!r}, not {lora[changed]!r}, and cannot change; leave it out, or "
            f"train a new one on the merged weights: --model.path {ancestor.name} --reference.path …"
        )


def spelled(place: str | Path) -> str:
    """A path as one would type it here: what lies below the working directory relative to it. Names of the Hub stay."""
    path = Path(place)
    if not path.is_absolute():
        return str(place)
    near = os.path.relpath(path)
    return str(place) if near.startswith("..") else near


# ---------------------------------------------------------------------------------------------------------------------
# What is said of it, and noted


def told(ancestor: Ancestor, config: Config) -> list[str]:
    """Lines for the start of the new run: from where, with what reference, and what differs from the old run's settings."""
    at = "" if ancestor.step is None else f" (step {ancestor.step})"
    where = config.reference.path
    reference = f"π_ref is that run's, {where}"
    if ancestor.reference is None or (spelled(ancestor.reference) != where and not _moved(ancestor, where)):
        reference = f"π_ref is {where}" + ("" if ancestor.reference is None else f", not {ancestor.reference} as before")
    schedule = "the learning-rate schedule starts again"
    state = (
        f"the optimiser's state is kept, {schedule}"
        if config.continue_optimizer
        else "optimiser and learning-rate schedule start again"
    )
    lines = [f"goes on from {ancestor.name}{at}; {reference}; {state}"]
    if ancestor.config is None or ancestor.run is None:
        return lines
    if ancestor.edited:
        lines.append(f"{spelled(ancestor.run)}/{CONFIG} was changed; the run was trained with {', '.join(ancestor.edited)}")
    if set(ancestor.config["stages"]) - set(config.stages):
        lines.append(f"stages: {', '.join(config.stages)}; the old run had {', '.join(ancestor.config['stages'])}")
    if "inputs" not in ancestor.stages["align"]:
        lines.append(
            "the old run is of an earlier isdaa, which recorded no inputs: later changes of its data and models are not seen"
        )
    return lines + _differences(ancestor, config) + _changes(ancestor, config)


def _moved(ancestor: Ancestor, where: str | None) -> bool:
    """Whether the old run's reference lies at another place now, file by file."""
    there = where is not None and Path(where).is_dir() and ancestor.config is not None and ancestor.was is not None
    return there and changed_model(ancestor.was, str(where), None) is None


def _changes(ancestor: Ancestor, config: Config) -> list[str]:
    """A line for each source, other than the models that are trained and compared with, that is not what the old run read."""
    lines = {}
    for stage in config.stages:
        for key, (place, what) in _changed(ancestor, stage).items():
            if key not in ("model.path", "sft", "reference.path") and Path(place).resolve() in places_read(config, stage):
                lines[key] = f"{key}: {place} is not what it was for the old run (changed: {what})"
    return [*lines.values()]


def _changed(ancestor: Ancestor, stage: str) -> dict[str, tuple[str, str]]:
    assert ancestor.config is not None and ancestor.run is not None
    before, noted = Config.model_validate(ancestor.config), ancestor.noted(stage)
    return changed_inputs(before, ancestor.run, stage, noted, sft="sft" in noted)


def _differences(ancestor: Ancestor, config: Config) -> list[str]:
    assert ancestor.config is not None and ancestor.run is not None
    old, new = flattened(ancestor.config), flattened(resolved(config))
    unused = {"sft", "label", "reward"} - set(config.stages)
    made = {"data.pairs": ancestor.run / "pairs" / "train.jsonl"}
    lines = []
    for key in {**old, **new}:
        if key in NO_DIFFERENCE or key.startswith("reference.") or key.split(".")[0] in unused or old.get(key) == new.get(key):
            continue
        if key in made and new[key] == spelled(made[key]) and REWARD not in config.stages:
            continue
        lines.append(f"{key} is {new.get(key)!r}; it was {old.get(key)!r} in {spelled(ancestor.run)}")
    kept = {"data.limit": None, "data.subset": None, "data.pairs_split": "train"}
    if old["data.pairs"] != new["data.pairs"] != spelled(made["data.pairs"]):
        same = [f"{key} {new[key]!r}" for key, usual in kept.items() if new[key] == old[key] != usual]
        lines += [f"the old run's {', '.join(same)} also applies to the new data.pairs"] if same else []
    return lines


def seen_before(ancestor: Ancestor, config: Config, held: Any) -> list[str]:
    """A line for each run before this one that was trained on held-out prompts. held: their rows, or None."""
    if held is None or ancestor.config is None or ancestor.run is None:
        return []
    before, run = Config.model_validate(ancestor.config), spelled(ancestor.run)
    lines = []
    changed = {"data.pairs", "data.eval_pairs", "pairs/train.jsonl"} & set(_changed(ancestor, "align"))
    if changed or not _same_held_out(ancestor.run, before, config):
        kept = ancestor.run / "eval_pairs.jsonl"
        advice = f"; --data.eval_pairs {spelled(kept)} holds out the same pairs as that run" if kept.is_file() else ""
        try:
            if changed:
                raise UserError("they cannot be read any more")
            count = common_prompts(read_pairs(before, _pairs_of(ancestor.run, before)).rows, held)
            if count:
                lines.append(f"{run} was trained on {count} of the held-out prompts: held-out metrics look too good{advice}")
        except UserError:
            lines.append(f"whether {run} was trained on held-out prompts is not known: its pairs are missing or changed{advice}")
    if before.continue_from is None:
        return lines
    try:
        return lines + seen_before(ancestor_of(before.continue_from), config, held)
    except UserError:
        return [*lines, f"whether the run before {run} was trained on held-out prompts is not known: it is missing"]


def _pairs_of(run: Path, config: Config) -> str:
    """The pairs that a run's `align` was trained on."""
    own = str(run / "pairs" / "train.jsonl")
    return own if config.trains_on_labelled else config.data.source("pairs") or own


def _same_held_out(run: Path, before: Config, config: Config) -> bool:
    """Whether both runs divide the same pairs alike."""
    keys = ("pairs_split", "eval_pairs", "eval_split", "eval_fraction", "limit", "subset")
    alike = before.seed == config.seed and all(getattr(before.data, key) == getattr(config.data, key) for key in keys)
    if not alike or "label" in config.stages:
        return False
    old, new = (Path(located(source)) for source in (_pairs_of(run, before), str(config.data.pairs)))
    return old == new or (old.exists() and old.resolve() == new.resolve())


def ancestry(ancestor: Ancestor, config: Config, weights: str) -> dict[str, Any]:
    """The same as data, for records. weights: digest of the policy as loaded."""
    before = None if ancestor.record is None else ancestor.record.continued
    steps = (ancestor.step or 0) + (0 if before is None else before["steps_before"])
    return {
        "from": str(ancestor.folder.resolve()),
        "run": None if ancestor.run is None else ancestor.run.resolve().name,
        "step": ancestor.step,
        "steps_before": steps,
        "weights": weights,
        "reference": config.reference.path,
        "optimizer": config.continue_optimizer,
    }
