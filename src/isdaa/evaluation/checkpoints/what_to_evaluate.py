"""What to evaluate, from as little as a path: models that isdaa trained carry a record that names the rest."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from isdaa.config import Config, EvaluationConfig, Position, fields, laid_over, parsed
from isdaa.config.synonyms import hint
from isdaa.config.taken_away import known_keys
from isdaa.data.encoder import VERSION, TokenizationSettings, token_settings
from isdaa.errors import UserError, nearest_path
from isdaa.evaluation.checkpoint import Checkpoint
from isdaa.evaluation.checkpoints.hints import base_hint, data_hint
from isdaa.evaluation.checkpoints.provenance import OPTIONS, check_stays, records_of
from isdaa.evaluation.checkpoints.run_groups import tails
from isdaa.evaluation.checkpoints.steps import ordered
from isdaa.files import file_digest, located
from isdaa.foreign import check_shape, readable_jsonl
from isdaa.manifest import HISTORY, MANIFEST
from isdaa.models.places import refuse_gguf
from isdaa.ownership import completed
from isdaa.record import GOLD, NAME, ModelRecord, read_record, run_folder

logger = logging.getLogger(__name__)

SECTIONS = ("evaluation", "tokenization", "scorer")
PLAIN = (  # what else `requests` takes
    *(
        "reference",
        "data",
        "split",
        "scorer",
        "judge_model",
        "scores",
        "all_opponents",
        "show_scorer_input",
        "output_dir",
        "dtype",
    ),
    *("trust_remote_code", "shared", "tokenizer"),
)
MODEL = ("config.json", "adapter_config.json", MANIFEST)  # a folder with one of them is, or was, a model


@dataclass(frozen=True)
class EvaluationRequest:
    """All that `evaluate` needs, beside the rows themselves."""

    models: list[Checkpoint]
    reference: str
    data: str  # held-out prompts (or pairs): file, folder, Hub name or world
    split: str | None
    scorer: str | None
    settings: EvaluationConfig
    tokenization: TokenizationSettings
    output_dir: str
    held_out: tuple[str, ...] = ()  # files of pairs that the runs held out; pairs of prompts that are in all of them count
    dtype: str = "float32"
    trust_remote_code: bool = False
    shared: str | None = None  # folder of an evaluation whose records are read, too
    repeated: Literal["strip", "keep"] | None = None  # as `data.prompt_repeated`
    position: Position = "auto"  # where a reward model is read
    label: str | None = None  # of a reward model with two labels, the one that means good
    show_scorer_input: bool = False  # say once what a reward model is fed, token by token
    revision: str | None = None  # of the reference, where it is a name of the Hub
    tokenizer: str | None = None  # folder or Hub name; None: the models' own
    told: tuple[str, ...] = ()  # what comes from records and how checkpoints are ordered, one line each, to be said first
    doubts: tuple[str, ...] = ()  # what a reader must know before believing that order, a sentence each
    one_run: bool = False  # the models are one run's, in the order given, whatever their folders are
    judge_model: Any = None  # a `SampleJudge`, in place of a scorer
    scores: str | None = None  # file of the user's own scores, in place of a scorer
    all_opponents: bool = False  # draw all samples of the reference without a scorer, too

    def revision_of(self, path: str) -> str | None:
        """The revision at which a model of this request is loaded."""
        return self.revision if path == self.reference else None


def requests(
    model_paths: Sequence[str | Path],
    overrides: Mapping[str, Any] | None = None,
    *,
    as_runs: bool = False,
    as_one_run: bool = False,
    one_run: bool = False,
) -> EvaluationRequest:
    """The request for some models, from the records beside them and what the user said.

    model_paths: model folders, Hub names or run folders (all their checkpoints and the final model).
    overrides: `PLAIN` (`scorer` `none`: no scorer; `judge_model`: a `SampleJudge`; `scores`: a file), and dotted keys of
    `SECTIONS` (`evaluation.prompts`). They win over records; keys whose value is None are ignored.
    as_runs: a trainer's output folder is its checkpoints and its final model, also where it is a model itself. as_one_run: as
    `trajectories` takes it. one_run: all models are one run's, in the order given.
    Raises UserError for an unknown key; naming the option to give where neither a record nor an override says it, records
    disagree, or the record of a run that is not the user's names something outside its folder. Whose code may run, only
    `overrides` say.
    """
    check_keys(overrides or {}, PLAIN)
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    places = ("reference", "data", "scorer", "output_dir", "tokenizer", "scores")
    given |= {key: located(given[key]) for key in places if key in given}
    _decide_who_judges(given)
    if not model_paths:
        raise UserError("no model to evaluate: give --model_path (a model folder, a run folder or a Hub name)")
    model_paths = [located(path) for path in model_paths]
    for option in ("reference", "scorer"):
        check_place(given.get(option), f"--{option}")
    paths = _once(path for name in model_paths for path in expand(name, as_runs))
    found_records = records_of(paths)
    found_records.require({option: option for option in OPTIONS.values() if option not in given})
    records, first = found_records.by_path, found_records.first()
    foreign = _foreign(records)
    _ask(model_paths, foreign if len(foreign) == len(paths) else [], given)
    order, named_models = ordered(paths, foreign, as_one_run, one_run), paths
    paths = list(order.paths)
    older = [path for path, record in records.items() if record is not None and (record.tokens or 1) != VERSION]
    if older:
        logger.warning(
            "%s: trained by an earlier isdaa with other tokenisation rules: held-out accuracy and drift are measured on "
            "other tokens than it was trained on",
            " ".join(older),
        )

    def named(option: str, field: str, what: str) -> str:
        if option in given:
            return str(given[option])
        values = {path: getattr(record, field) for path, record in records.items() if record is not None}
        found = {_resolved(value): path for path, value in values.items() if value is not None}
        bare = next((path for path, record in records.items() if record is None or getattr(record, field) is None), None)
        if bare is not None and len(found) != 1:
            if not Path(bare).exists():
                beside = Path(bare).parent
                near = nearest_path(bare, beside.iterdir()) if beside.is_dir() else ""
                raise UserError(
                    f"{bare}: no such folder here{near}; for a model of the Hub, of which no record names {what}, give --{option}"
                )
            lacks = "its record does not name" if records[bare] is not None else "no isdaa.json beside it names"
            raise UserError(f"{bare}: {lacks} {what}; give it with --{option}")
        for value, path in found.items():
            if value.startswith((".", "/")) and not Path(value).exists():
                raise UserError(f"{Path(path) / NAME}: {what} that it names, {value}, is not there; give it with --{option}")
        if len(found) > 1:
            raise UserError(f"the models' records name different {option} ({', '.join(sorted(found))}); choose with --{option}")
        return next(iter(found))

    reference = named("reference", "reference", "the reference model π_ref")
    data = named("data", "evaluation", "held-out prompts")
    split = given.get("split") if "data" in given or "split" in given else (first.evaluation_split if first else None)
    scorers = {_resolved(record.scorer) for record in records.values() if record is not None and record.scorer is not None}
    if len(scorers) > 1 and "scorer" not in given:
        raise UserError(f"the models' records name different scorers ({', '.join(sorted(scorers))}); choose with --scorer")
    sections = sections_of(first, given)
    scorer = given.get("scorer") or sections.evaluation.scorer or next(iter(scorers), None)
    model = (first.config.get("model") if first else None) or {}
    return EvaluationRequest(
        models=[replace(model, step=order.steps.get(model.path, model.step)) for model in checkpoints(paths, records)],
        reference=reference,
        data=data,
        split=split,
        scorer=None if scorer in (None, "none") else str(scorer),
        settings=sections.evaluation,
        tokenization=token_settings(sections.tokenization),
        output_dir=str(given.get("output_dir") or home_of(model_paths)),
        held_out=() if "data" in given else _held_out_pairs(paths, records),
        dtype=str(given.get("dtype") or model.get("dtype") or "float32"),
        trust_remote_code=bool(given.get("trust_remote_code", False)),
        shared=str(given["shared"]) if "shared" in given else None,
        repeated=_repeated(first, given),
        position=sections.scorer.position,
        label=sections.scorer.label,
        show_scorer_input=bool(given.get("show_scorer_input", False)),
        revision=_revision(reference, records),
        judge_model=given.get("judge_model"),
        scores=given.get("scores"),
        all_opponents=bool(given.get("all_opponents", False)),
        told=(*found_records.told(list(given)), *order.told, *_unscored(scorer, first, given)),
        doubts=(*order.doubts, *(line for name in model_paths if as_runs for line in _unread(Path(name), named_models))),
        one_run=one_run,
        tokenizer=str(given["tokenizer"]) if "tokenizer" in given else None,
    )


def check_keys(given: Mapping[str, Any], plain: Sequence[str] = ()) -> None:
    """Raises UserError for a key that is neither one of `plain` nor in one of `SECTIONS`: nothing would read it."""
    known = [dotted for dotted, _, _ in fields() if dotted.startswith(tuple(f"{section}." for section in SECTIONS))]
    for key in given:
        section, dot, _ = str(key).partition(".")
        if key not in plain and not (dot and section in SECTIONS):
            raise UserError(f"settings: {key}: unknown key{hint(str(key), known)}")


def _unscored(scorer: str | None, record: ModelRecord | None, given: Mapping[str, Any]) -> list[str]:
    """A line where a run's guard had a scorer, and its evaluation has none."""
    guard = ((record.config.get("guard") if record is not None else None) or {}).get("scorer")
    if guard is None or scorer is not None or "judge_model" in given or "scores" in given:
        return []
    return [f"no win rate: `guard.scorer` ({guard}) is the guard's alone; name the evaluation's scorer, too"]


def _once(paths: Iterable[str]) -> list[str]:
    """Each model once, however it is spelled."""
    found: dict[str, str] = {}
    for path in paths:
        found.setdefault(os.path.realpath(path) if Path(path).exists() else path, path)
    return list(found.values())


def models_of(run: str | Path) -> list[str]:
    """The models of a run's folder that an evaluation of it covers."""
    paths = expand(run, as_run=True)
    return list(ordered(paths, _foreign(records_of(paths).by_path), as_one_run=False).paths)


def _foreign(records: Mapping[str, ModelRecord | None]) -> list[str]:
    """The models here that isdaa did not train."""
    return [path for path, record in records.items() if record is None and Path(path).is_dir()]


def _ask(model_paths: Sequence[str | Path], foreign: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raises UserError, one line with the command that would do, where models of other programs lack reference or prompts."""
    missing = {} if not foreign else {"reference": base_hint(foreign), "data": data_hint(foreign)}
    missing = {option: hint for option, hint in missing.items() if option not in given}
    if not missing:
        return
    what = {"reference": "the model that they were trained from", "data": "held-out prompts or pairs"}
    known = [f"{hint[1]} names {hint[0]}" for hint in missing.values() if hint is not None]
    options = {f"--{option}": option.upper() if hint is None else hint[0] for option, hint in missing.items()}
    raise UserError(
        f"{' '.join(map(str, model_paths[:2]))}{' …' * (len(model_paths) > 2)}: not trained by isdaa, so no isdaa.json beside it "
        f"names {' or '.join(f'{what[option]} (--{option})' for option in missing)}{'; ' * bool(known)}{'; '.join(known)}; type:",
        completed(["isdaa", "evaluate", "--model_path", *map(str, model_paths)], options),
    )


def check_place(name: Any, option: str) -> None:
    """Raises UserError where a path was mistyped; a name that the Hub could have is left alone, unless one like it is here."""
    if not isinstance(name, str) or name in (GOLD, "none") or Path(name).exists():
        return
    beside = Path(name).parent
    # Others may be the Hub's, beside a folder that is here: gpt2 and gpt2-dpo, Llama-3.2-1B and Llama-3.2-3B.
    alike = [
        str(path)
        for path in (beside.iterdir() if beside.is_dir() else ())
        if abs(len(str(path)) - len(name)) <= 1 and re.findall(r"\d", str(path)) == re.findall(r"\d", name)
    ]
    near = nearest_path(name, alike)
    if near or name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).name.startswith("checkpoint-"):
        raise UserError(f"{name}: no such model folder{near}; {option} names a folder that is here, or a model of the Hub")


def _revision(reference: str, records: Mapping[str, ModelRecord | None]) -> str | None:
    """The revision of the Hub at which runs began with the reference. Raises UserError where they name several."""
    found = set()
    for config in (record.config for record in records.values() if record is not None):
        named = [section for name in ("model", "reference") if (section := config.get(name) or {}).get("path") == reference]
        found |= {section.get("revision") for section in named[:1]}
    if len(found) > 1:
        told = ", ".join(sorted(str(revision or "main") for revision in found))
        raise UserError(
            f"the models' records name different revisions of the reference {reference} ({told}); evaluate them apart"
        )
    return next(iter(found), None)


def _repeated(record: ModelRecord | None, given: Mapping[str, Any]) -> Any:
    """What becomes of prompts that responses repeat: as in the run; what the run wrote itself stays as it is."""
    data = (record.config.get("data") if record is not None else None) or {}
    own = record is not None and "data" not in given and data.get("evaluation") is None
    return "keep" if own else data.get("prompt_repeated")


def _decide_who_judges(given: dict[str, Any]) -> None:
    """With a judge model or scores of the user's own, no scorer that a record names is in question. Raises UserError for two."""
    options = {"judge_model": "--judge_model", "scores": "--scores"}
    named = [option for key, option in options.items() if key in given]
    named += ["--scorer"] if given.get("scorer", "none") != "none" else []
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)} both say who judges the samples; give one of them")
    if "judge_model" in given:
        if given.get("show_scorer_input"):
            raise UserError(
                "--show_scorer_input: there is no scorer; replies.jsonl of the evaluation shows what a judge is asked"
            )
        # Every opponent of a prompt costs two requests a checkpoint.
        given.setdefault("evaluation.opponent_samples", 1)
    if "judge_model" in given or "scores" in given:
        given["scorer"] = "none"


def expand(path: str | Path, as_run: bool = False) -> list[str]:
    """A run folder becomes its checkpoints in the order of their steps and its final model; any other path stays.

    A run's folder is one of isdaa's, where the last checkpoint is left out if the final model is of the same step, or the output
    folder of another trainer, with `checkpoint-N` in it. as_run: also where the latter is a model itself; else it is that model.
    Raises UserError for a local path that does not exist, and for a trainer's checkpoint without a model in it.
    """
    text = located(path)
    folder = Path(text)
    if not folder.exists():
        check_place(text, "a path")
        return [text]  # a Hub name; loading it says whether it exists
    refuse_gguf(folder)
    is_model = any((folder / name).exists() for name in MODEL)
    if is_model and not as_run:
        return [text]
    found = {int(p.name.split("-")[1]): p for p in (folder / "checkpoints").glob("checkpoint-*") if _is_checkpoint(p)}
    final = folder / "model"
    ours = final.is_dir() and (bool(found) or read_record(final) is not None or not _has_checkpoints(folder))
    if ours:
        record = read_record(final)
        found.pop(record.step if record is not None and record.step is not None else -1, None)
    models = [str(found[step]) for step in sorted(found)] + ([str(final)] if ours else [])
    models = models or [*_written_by_trainer(folder), *_last_models(folder), *([text] if is_model else [])]
    if not models:
        runs = sorted({str(inside.parent) for name in ("checkpoints", "model") for inside in folder.glob(f"*/{name}")})
        runs += sorted({str(inside.parent) for inside in folder.glob("*/checkpoint-*") if _is_checkpoint(inside)})
        hint = f"; did you mean {' '.join(runs)}?" if runs else ""
        raise UserError(
            f"{text}: neither a model folder (config.json) nor a run folder with checkpoints/, model/ or checkpoint-N/{hint}"
        )
    return models


LAST = ("model", "best", "final", "final_model", "final_checkpoint")  # what scripts call a last model in their output folder


def _has_checkpoints(folder: Path) -> bool:
    return any(_is_checkpoint(path) for path in folder.glob("checkpoint-*"))


def _last_models(folder: Path) -> list[str]:
    """Models beside a trainer's checkpoints."""
    return [str(folder / name) for name in LAST if any((folder / name / file).exists() for file in MODEL)]


def _unread(folder: Path, models: Sequence[str]) -> list[str]:
    """Of a trainer's output folder, in words: models in it that are not taken for checkpoints of its run."""
    known = {Path(path).resolve() for path in models}
    others = sorted(
        p for p in folder.glob("*") if p.is_dir() and any((p / name).exists() for name in MODEL) and p.resolve() not in known
    )
    if not others or not _has_checkpoints(folder):
        return []
    return [f"{folder}: not read: {', '.join(path.name for path in others)}; models by other names are named with --checkpoints"]


def _written_by_trainer(folder: Path) -> list[str]:
    """The checkpoints in a trainer's output folder, by their numbers."""
    found = {
        int(p.name.split("-")[1]): p for p in folder.glob("checkpoint-*") if p.name.split("-", 1)[1].isdecimal() and p.is_dir()
    }
    for _, path in sorted(found.items()):
        if not _is_checkpoint(path):
            held = ", ".join(sorted(inside.name for inside in path.iterdir())[:4]) or "nothing"
            raise UserError(
                f"{path}: no model in it (it holds {held}), so the run’s curve would have a gap; convert it to the form of "
                "`save_pretrained`, remove it if it was never finished, or name the others with --checkpoints"
            )
    return [str(found[step]) for step in sorted(found)]


def checkpoints(paths: Sequence[str | Path], records: Mapping[str, ModelRecord | None] | None = None) -> list[Checkpoint]:
    """What the records beside some models say of them; labels are unique and as short as that allows."""
    texts = [str(path) for path in paths]
    found = records if records is not None else {text: read_record(text) for text in texts}
    return [_checkpoint(text, label, found[text]) for text, label in zip(texts, labels_of(texts), strict=True)]


def _checkpoint(path: str, label: str, record: ModelRecord | None) -> Checkpoint:
    if record is None:
        return Checkpoint(path, label)
    objective = record.config.get("objective") or {}
    is_policy = record.kind == "policy"
    weights = _weights_since(run_folder(path), record.step) if is_policy else {}
    return Checkpoint(
        path,
        label,
        method=objective.get("method") if is_policy else None,
        beta=objective.get("beta") if is_policy else None,
        seed=record.config.get("seed"),
        step=record.step,
        weight_mean=weights.get("weights/mean"),
        ess=weights.get("weights/ess"),
    )


def _weights_since(run: Path | None, step: int | None) -> dict[str, float]:
    """Means of the logged weights over the steps since the checkpoint before; a line speaks for the steps since the last line."""
    if run is None or not (run / HISTORY).is_file():
        return {}
    earlier = [int(p.name.split("-")[1]) for p in (run / "checkpoints").glob("checkpoint-*") if _is_checkpoint(p)]
    lines = [line for line in _lines(run / HISTORY) if "weights/mean" in line]
    if step is not None:
        since = max((s for s in earlier if s < step), default=0)
        steps = [0, *(int(line["step"]) for line in lines)]
        covered = [min(step, end) - max(since, begin) for begin, end in pairwise(steps)]
    else:
        covered = [1 if line is lines[-1] else 0 for line in lines]
    kept = [(count, line) for count, line in zip(covered, lines, strict=True) if count > 0]
    total = sum(count for count, _ in kept)
    return {key: sum(n * line[key] for n, line in kept) / total for key in ("weights/mean", "weights/ess") if total}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's `metrics.jsonl`, each with a step; a live run may be appending to it."""
    lines = readable_jsonl(path)
    for number, line in enumerate(lines, start=1):
        check_shape(line, {"step": int, "weights/mean?": float, "weights/ess?": float}, f"{path}:{number}")
    return lines


def labels_of(paths: Sequence[str]) -> list[str]:
    """The last one or two telling parts of each path, or as many as are unique."""
    labels = []
    for path in paths:
        run = run_folder(path)
        labels.append(f"{run.name}/{Path(path).name}" if run is not None else Path(path).name)
    if len(set(labels)) == len(set(paths)):
        return labels
    names = tails([Path(path).absolute() for path in paths])
    return [names[Path(path).absolute()] for path in paths]


def _is_checkpoint(folder: Path) -> bool:
    number = folder.name.removeprefix("checkpoint-")
    return number.isdecimal() and any((folder / name).exists() for name in MODEL)


def home_of(model_paths: Sequence[str | Path]) -> Path:
    """Where records go: the run's folder; of several runs, the folder around them; of a lone model, its own.

    Raises UserError where others' folder would lead them elsewhere.
    """
    homes = []
    for path in model_paths:
        run = run_folder(path) or (_trainers(path) if len(model_paths) > 1 else Path(path))
        homes.append(run if run.is_dir() else Path("evaluation") / str(path).replace("/", "--"))
    different = list(dict.fromkeys(home.absolute() for home in homes))
    if len(different) == 1:
        check_stays(homes[0] / "evaluation")
        return homes[0] / "evaluation" if homes[0].is_dir() else homes[0]
    parents = {home.parent for home in different}
    return (parents.pop() if len(parents) == 1 else Path.cwd()) / "evaluation"


def _trainers(path: str | Path) -> Path:
    """The output folder of the trainer that wrote a checkpoint; any other model's own."""
    folder = Path(path)
    return folder.parent if _is_checkpoint(folder) else folder


def _held_out_pairs(paths: Sequence[str], records: Mapping[str, ModelRecord | None]) -> tuple[str, ...]:
    """The held-out pairs that the runs kept, one file of each content; none where a run, which may train on them, kept none."""
    runs = dict.fromkeys(run_folder(path) for path in paths if records[path] is not None)
    files = {run: run / "eval_pairs.jsonl" for run in runs if run is not None}
    without = next((run for run, file in files.items() if not file.is_file()), None)
    if without is not None:
        if len(files) > 1:
            logger.info("%s held no pairs out, so there is no accuracy and no drift; pairs can be named with --data", without)
        return ()
    return tuple({file_digest(file): str(file) for file in reversed(files.values())}.values())[::-1]


def _resolved(value: str) -> str:
    """One spelling of each local path; anything else as it is."""
    return os.path.realpath(value) if Path(value).exists() and value != GOLD else value


def sections_of(record: ModelRecord | None, given: Mapping[str, Any]) -> Config:
    """The sections `evaluation`, `tokenization` and `scorer`: defaults, then the record's values, then the user's."""
    recorded = {} if record is None else {name: record.config.get(name) or {} for name in SECTIONS}
    # A record of another version may hold keys that are gone.
    data = known_keys(recorded, NAME)
    if record is not None and "scorer" in data["evaluation"]:
        data["evaluation"]["scorer"] = record.scorer  # the same, as it is reached from here
    dotted = {key: value for key, value in given.items() if "." in key}
    return parsed(laid_over(data, dotted), overrides=dotted)
