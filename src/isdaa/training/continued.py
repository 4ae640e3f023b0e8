"""Going on: a new run whose policy has the trained weights of an old one, whose reference is the old one's π_ref, and whose
settings are the old one's where nothing else is said (docs/going_on.md).

All of it becomes an ordinary configuration (`model.path`, `reference.path`, `data.pairs`, …), so that a stage cannot tell such a
run from any other, and the same command goes on with it after a kill.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isdaa.config import REWARD, Config, fields, layers, resolved, validate
from isdaa.data.sources import common_prompts
from isdaa.errors import UserError, nearest_path
from isdaa.evaluation.provenance import records_of
from isdaa.files import located
from isdaa.foreign import check_shape, read_json
from isdaa.manifest import MANIFEST, defect
from isdaa.models.places import is_adapter
from isdaa.ownership import is_own
from isdaa.record import RUN, ModelRecord, run_folder
from isdaa.training.checkpoints import PREFIX, check_resumable, checkpoints, complete_checkpoints
from isdaa.training.reading import read_pairs
from isdaa.training.run import SHAPE, flattened

OPTIMIZER = "optimizer.pt"
BEST = "best"  # in a run's folder, what its guard keeps
NEEDED = ("sft", "prompts", "pairs")  # data, of some stage
# Said in words of their own, or of no meaning for what comes out.
NO_DIFFERENCE = ("output_dir", "stages", "continue_from", "continue_optimizer", "model.path", "model.random", "model.revision")


@dataclass(frozen=True)
class Ancestor:
    """What a new run goes on from.

    folder: of the trained weights. run: the folder of the run that trained them; None where another program did. reference: of
    that run, a folder or Hub name, with its revision. config: of that run, resolved. begun: what `run.json` says of its `align`.
    """

    folder: Path
    run: Path | None = None
    record: ModelRecord | None = None
    reference: str | None = None
    revision: str | None = None
    config: dict[str, Any] | None = None
    begun: dict[str, Any] | None = None

    @property
    def step(self) -> int | None:
        """Optimiser step of the weights in their run."""
        return None if self.record is None else self.record.step

    @property
    def name(self) -> str:
        """The folder as messages call it."""
        return spelled(self.folder)


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
    named = {key: data[key] for key in ("continue_from", "output_dir", "stages") if key in data}
    validate(
        {"model": {"path": "-"}, "data": dict.fromkeys(NEEDED, "-"), "label": {"scorer": "-"}} | named, where, overrides or {}
    )
    ancestor = ancestor_of(name)
    laid = _laid_over(ancestor, data)
    config = validate(laid, where if path or ancestor.run is None else f"{ancestor.run / 'config.yaml'}", overrides or {})
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
        raise UserError(f"continue_from: {run}: has no align stage to go on from (stages: {made}); name a model by --model.path")
    folder = _of_run(run, begun) if place == run else place
    config = _settings_of(run, begun)
    folder = _with_adapter(run, folder) if config["lora"]["rank"] and not is_adapter(str(folder)) else folder
    _check_whole(folder)
    if config["model"].get("quantization") and is_adapter(str(folder)):
        raise UserError(
            f"continue_from: {folder}: an adapter on weights of 4 bits, which is not gone on with; merge it (lora.merge true "
            f"where it was trained), then --model.path {run / 'model'} with --reference.path and a new adapter"
        )
    records = records_of([str(folder)])
    records.require({"reference": "reference.path"})
    record = records.by_path[str(folder)]
    reference = None if record is None else record.reference
    if reference is None and (run / "base").is_dir():  # of an adapter that began on new random weights
        reference = str(run / "base")
    if reference is not None and reference.startswith((".", "/")) and not Path(reference).exists():
        raise UserError(f"continue_from: {folder}: the reference that its record names, {reference}, is not there; restore it")
    model, own = config["model"], config["reference"]
    revision = own.get("revision") if own.get("path") is not None else model.get("revision")
    at_hub = reference is not None and not Path(reference).exists()
    return Ancestor(folder, run, record, reference, revision if at_hub else None, config, begun)


def _foreign(place: Path) -> Ancestor:
    if is_adapter(str(place)):
        raise UserError(
            f"continue_from: {place}: an adapter of another program; a new one on its merged weights is trained by --model.path "
            f"{place} --lora.rank … --reference.path …"
        )
    if not (place / "config.json").is_file():
        found = [path.name for path in checkpoints(place)]
        has = f"a trainer's output; name a checkpoint ({', '.join(found)})" if found else "no run of isdaa and no model"
        raise UserError(f"continue_from: {place}: {has}")
    _check_whole(place)
    return Ancestor(place)


def _of_run(run: Path, begun: Mapping[str, Any]) -> Path:
    """The weights that a finished run stands for."""
    if not begun.get("done"):
        there = complete_checkpoints(run / "checkpoints")
        named = f", or name a checkpoint: --continue_from {run / Path(there[-1]).name}" if there else ""
        again = f"isdaa train --config {run / 'config.yaml'}"
        raise UserError(f"continue_from: {run}: its align stage has not finished; finish it ({again}){named}")
    record = records_of([str(run / "model")]).by_path[str(run / "model")]
    last = None if record is None else record.step
    stopped = (begun.get("guard") or {}).get("stopped")
    if stopped is not None:
        best = begun["guard"].get("best_step")
        places = [run / BEST, run / "checkpoints" / f"{PREFIX}{best}"]
        found = next((path for path in places if path.is_dir()), None)
        kept = f"{found} (step {best}, its best look)" if found is not None else f"a checkpoint near step {best}, its best look"
        raise UserError(
            f"continue_from: {run}: its guard stopped it at step {stopped['step']}, after its win rate had fallen; name which "
            f"weights: {kept}, or {run / 'model'} (step {last}, the fallen ones)"
        )
    checkpoint = run / "checkpoints" / f"{PREFIX}{last}"
    return checkpoint if checkpoint.is_dir() else run / "model"


def _with_adapter(run: Path, folder: Path) -> Path:
    """The checkpoint that holds the adapter which lies merged in `folder`."""
    record = records_of([str(folder)]).by_path[str(folder)]
    checkpoint = run / "checkpoints" / f"{PREFIX}{None if record is None else record.step}"
    if not (checkpoint.is_dir() and is_adapter(str(checkpoint))):
        raise UserError(
            f"continue_from: {folder}: its adapter lies in its weights, and no checkpoint of its step holds it; name "
            f"RUN/checkpoint-N or train a new adapter on it: --model.path {folder} --reference.path …"
        )
    return checkpoint


def _check_whole(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"continue_from: {folder}: no such folder any more; name a checkpoint")
    wrong = defect(folder, resume=False) if (folder / MANIFEST).is_file() else None
    if wrong is not None:
        raise UserError(f"continue_from: {folder}: not the weights that were written ({wrong}); restore them, or name others")


def _settings_of(run: Path, begun: Mapping[str, Any]) -> dict[str, Any]:
    """The run's resolved configuration. Whose code may run, its own record says: the file could be anybody's."""
    path = run / "config.yaml"
    data = resolved(validate(layers(path), str(path)))
    data["model"]["trust_remote_code"] = begun.get("values", {}).get("model.trust_remote_code") is True
    return data


def _check_optimizer(ancestor: Ancestor, config: Config) -> None:
    folder = ancestor.folder
    if not (folder / OPTIMIZER).is_file():
        raise UserError(
            f"continue_optimizer: {folder} holds no {OPTIMIZER}; name a checkpoint (RUN/checkpoint-N), or leave it out"
        )
    check_resumable(folder)
    before = (ancestor.config or {}).get("align", {}).get("optimizer")
    if before != config.align.optimizer:
        raise UserError(
            f"continue_optimizer: {folder} has the state of {before}, not of align.optimizer {config.align.optimizer}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The new run's configuration


def _laid_over(ancestor: Ancestor, given: Mapping[str, Any]) -> dict[str, Any]:
    """The old run's configuration with what was given on top, and the old weights and reference in their places."""
    old = ancestor.config or {}
    data = old | {"continue_optimizer": False}  # of an old run that went on itself
    for key, value in given.items():
        both = isinstance(value, dict) and isinstance(old.get(key), dict)
        data[key] = {**old[key], **value} if both else value

    def said(section: str, key: str) -> Any:
        return (given.get(section) or {}).get(key) if isinstance(given.get(section), dict) else None

    _check_output(ancestor, given.get("output_dir"))
    if old and said("objective", "method") not in (None, old["objective"]["method"]):
        data["objective"] = given["objective"]  # what is spelled out of the old method is not the new one's
    if said("align", "epochs") is not None and said("align", "max_steps") is None:
        data["align"] = {**data["align"], "max_steps": None}  # or it would end them
    data["model"] = _model(ancestor, given, said("model", "path"), data.get("model"))
    reference = _reference(ancestor, old, said("reference", "path"))
    told = said("reference", "revision")
    revision = told if told is not None or reference != ancestor.reference else ancestor.revision
    data["reference"] = {**(data.get("reference") or {}), "path": spelled(reference), "revision": revision}
    if given.get("stages") in (None, old.get("stages")):
        data["stages"] = ["align"]
    elif "sft" in data["stages"]:
        raise UserError("stages: sft would begin the new run with another model than continue_from; leave it out")
    if ancestor.run is not None:
        _own_files(ancestor.run, data, old)
        _check_adapter(ancestor, data["lora"])
    return data


def _check_output(ancestor: Ancestor, output: Any) -> None:
    old = (ancestor.run or ancestor.folder).resolve()
    if not isinstance(output, str):
        raise UserError(f"output_dir: a run that goes on from {spelled(old)} needs a folder of its own; add --output_dir")
    new = Path(located(output)).resolve()
    if new == old or old in new.parents:
        raise UserError(f"output_dir: {output} is the old run's own folder, or lies in it; a new run needs one of its own")


def _model(ancestor: Ancestor, given: Mapping[str, Any], path: Any, model: Any) -> dict[str, Any]:
    old = (ancestor.config or {}).get("model", {})
    if path is not None and path != old.get("path") and Path(str(path)).resolve() != ancestor.folder.resolve():
        raise UserError(f"model.path: {path}, and continue_from: {given['continue_from']}: one of them is where training starts")
    return {**(model or {}), "path": spelled(ancestor.folder), "random": None, "revision": None}


def _reference(ancestor: Ancestor, old: Mapping[str, Any], path: Any) -> str:
    if path is not None and path != old.get("reference", {}).get("path"):
        return str(path)
    if ancestor.reference is None:
        why = "not a run of isdaa, so nothing says" if ancestor.run is None else "its record does not say"
        raise UserError(f"continue_from: {ancestor.name}: {why} what its reference π_ref was; name it with --reference.path")
    return ancestor.reference


def _own_files(run: Path, data: dict[str, Any], old: Mapping[str, Any]) -> None:
    """What the old run's earlier stages made for it: pairs and a reward model."""
    before, pairs = Config.model_validate(old), data["data"].get("pairs")
    same = pairs == before.data.pairs
    if "label" not in data["stages"] and same and (pairs is None or before.trains_on_labelled):
        data["data"] = {**data["data"], "pairs": spelled(run / "pairs" / "train.jsonl")}
    if "label" in data["stages"] and same and REWARD not in data["stages"]:
        data["data"] = {**data["data"], "pairs": None}  # it makes others
    if REWARD in data["stages"]:
        return
    for section in ("guard", "evaluation", "label"):
        if data[section].get("scorer") == REWARD:
            data[section] = {**data[section], "scorer": spelled(run / REWARD)}
    if before.guard_scorer is not None and not (data["guard"]["scorer"] or data["evaluation"]["scorer"]):
        data["guard"] = {**data["guard"], "scorer": spelled(run / REWARD)}


def _check_adapter(ancestor: Ancestor, lora: Mapping[str, Any]) -> None:
    old = (ancestor.config or {})["lora"]
    changed = next((key for key in ("rank", "alpha", "target_modules") if lora[key] != old[key]), None)
    if changed is not None and is_adapter(str(ancestor.folder)):
        raise UserError(
            f"lora.{changed}: the adapter that is gone on with has {old[changed]!r}, not {lora[changed]!r}; leave it out, or "
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
    if ancestor.reference is None or spelled(ancestor.reference) != where:
        reference = f"π_ref is {where}" + ("" if ancestor.reference is None else f", not {ancestor.reference} as before")
    schedule = "the learning rate's schedule begins anew"
    state = (
        f"the optimiser's state goes on, {schedule}"
        if config.continue_optimizer
        else "the optimiser and the learning rate's schedule begin anew"
    )
    lines = [f"goes on from {ancestor.name}{at}; {reference}; {state}"]
    return lines + _differences(ancestor, config)


def _differences(ancestor: Ancestor, config: Config) -> list[str]:
    if ancestor.config is None or ancestor.run is None:
        return []
    old, new = flattened(ancestor.config), flattened(resolved(config))
    unused = {"sft", "label", "reward"} - set(config.stages)
    made = {"data.pairs": ancestor.run / "pairs" / "train.jsonl"}
    lines = []
    for key, _, _ in fields():
        if key in NO_DIFFERENCE or key.startswith("reference.") or key.split(".")[0] in unused or old.get(key) == new.get(key):
            continue
        if key in made and new[key] == spelled(made[key]):
            continue
        lines.append(f"{key} is {new.get(key)!r}; it was {old.get(key)!r} in {spelled(ancestor.run)}")
    kept = {"data.limit": None, "data.subset": None, "data.pairs_split": "train"}
    if old["data.pairs"] != new["data.pairs"] != spelled(made["data.pairs"]):
        same = [f"{key} {new[key]!r}" for key, usual in kept.items() if new[key] == old[key] != usual]
        lines += [f"of the old run's settings {', '.join(same)} holds for the new data.pairs, too"] if same else []
    return lines


def seen_before(ancestor: Ancestor, config: Config, held: Any) -> list[str]:
    """A line for each run before this one that was trained on held-out prompts. held: their rows, or None."""
    if held is None or ancestor.config is None or ancestor.run is None:
        return []
    before, run = Config.model_validate(ancestor.config), spelled(ancestor.run)
    lines = []
    if not _same_held_out(ancestor.run, before, config):
        kept = ancestor.run / "eval_pairs.jsonl"
        advice = f"; data.eval_pairs {spelled(kept)} holds out what that run did" if kept.is_file() else ""
        try:
            count = common_prompts(read_pairs(before, _pairs_of(ancestor.run, before)).rows, held)
            if count:
                lines.append(f"{run} was trained on {count} of the held-out prompts: the held-out figures flatter{advice}")
        except UserError:
            lines.append(f"whether {run} was trained on held-out prompts is not known: its pairs are not there{advice}")
    if before.continue_from is None:
        return lines
    try:
        return lines + seen_before(ancestor_of(before.continue_from), config, held)
    except UserError:
        return [*lines, f"whether the run before {run} was trained on held-out prompts is not known: it is not there any more"]


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
