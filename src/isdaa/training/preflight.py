"""What can be seen to be missing before a run starts: not after its first stage has worked for hours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from isdaa.config import REWARD, Config, OptimisationConfig
from isdaa.data.reading.recipes import Purpose
from isdaa.data.reading.sources import opened
from isdaa.errors import UserError, nearest
from isdaa.models.loading import model_config
from isdaa.models.places import is_adapter
from isdaa.models.quantised import check_trainable, quantisation
from isdaa.record import GOLD


def check_inputs(config: Config, stages: Sequence[str]) -> None:
    """Look at the local files and folders, and at the optional packages, that `stages` will ask for.

    Hub names are not looked up, but for models that a later stage begins with: the first stage looks itself.
    Raises UserError for the first thing that is missing.
    """
    for key, source, split, purpose in sources_of(config, stages):
        if source is None:
            continue
        try:
            place, rows = opened(source, split, purpose, limit=1)
            if not _may_be_on_the_hub(place.source):
                next(iter(rows), None)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    home = Path(config.output_dir).resolve()
    made = [home / stage for stage in ("sft", "reward") if stage in config.stages]
    for key, name in models_of(config, stages):
        if name is None or Path(name).resolve() in made or Path(name).expanduser().exists():
            continue
        if name.startswith((".", "/", "~")) or home in Path(name).resolve().parents:
            raise UserError(f"{key}: {name}: no such folder{_made(made)}")
        if key.endswith("scorer") and name == REWARD:
            raise UserError(f"{key}: {REWARD}: no such folder, and this run has no reward stage; add it to --stages")
        if key.endswith("scorer") and name not in (GOLD, "none") and name.count("/") != 1:  # no name of the Hub
            raise UserError(f"{key}: {name}: no such folder{nearest(name, [GOLD, REWARD])}{_made(made)}")
    if config.model.quantization is not None:
        installed_version("bitsandbytes", "model.quantization")
    for stage, name in starts_of(config, stages):
        if Path(name).expanduser().is_dir() or stage != stages[0]:
            check_start(config, stage, name)
    for stage in stages:
        section = getattr(config, stage)
        if isinstance(section, OptimisationConfig):
            for tracker in section.report_to:
                installed_version(tracker, f"{stage}.report_to")
            if "8bit" in section.optimizer:
                installed_version("bitsandbytes", f"{stage}.optimizer")


def sources_of(config: Config, stages: Sequence[str]) -> Iterator[tuple[str, str | None, str, Purpose]]:
    """The data that stages read: key, source, split, and what it is read for."""
    data = config.data
    if "sft" in stages:
        yield "data.sft", data.sft, data.sft_split, "sft"
    if "label" in stages:
        yield "data.prompts", data.prompts, data.prompts_split, "prompts"
    if {"reward", "align"} & set(stages):
        yield "data.pairs", data.pairs, data.pairs_split, "pairs"
        yield "data.eval_pairs", data.eval_pairs, data.eval_split, "pairs"
    if "align" in stages:
        yield "data.evaluation", data.evaluation, data.evaluation_split, "prompts"


def models_of(config: Config, stages: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """The models and tokenizers that stages load: key, and folder or name."""
    yield "model.path", config.model.path
    yield "model.tokenizer", config.model.tokenizer
    if "label" in stages:
        yield "label.scorer", config.label_scorer
    if "reward" in stages:
        yield "reward.path", config.reward.path
    if "align" in stages:
        yield "reference.path", config.reference.path
        yield "behaviour.model_path", config.behaviour.model_path
        if config.guard.steps is not None:
            yield "guard.scorer" if config.guard.scorer is not None else "evaluation.scorer", config.guard_scorer


def revision_of(config: Config, path: str | None) -> str | None:
    """The revision at which a model that the configuration names is read, where that is a name of the Hub."""
    if path == config.model.path:
        return config.model.revision
    return config.reference.revision if path == config.reference.path else None


def starts_of(config: Config, stages: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The models whose weights stages train, where no earlier stage of the run makes them: stage, and folder or name."""
    first = None if "sft" in config.stages else config.model.path
    starts = {"sft": config.model.path, "reward": config.reward.path or first, "align": first}
    yield from ((stage, name) for stage in stages if (name := starts.get(stage)) is not None)


def check_start(config: Config, stage: str, name: str) -> None:
    """Raises UserError where a stage cannot train what it starts from, since its weights lie quantised."""
    settings = config.model
    revision = settings.revision if name == settings.path else None
    try:
        architecture = model_config(name, trust_remote_code=settings.trust_remote_code, revision=revision)
    except UserError:
        return  # loading it says what is wrong
    what = quantisation(architecture)
    if what is None:
        return
    if stage == "reward":
        raise UserError(
            f"{name}: its weights are quantised ({what}), and all weights of a reward model are trained; name the model that was "
            "quantised (reward.path)"
        )
    check_trainable(name, architecture, adapter=config.lora.rank > 0)
    if settings.quantization is not None:
        raise UserError(f"{name}: its weights are quantised already ({what}); leave --model.quantization out")
    later = [one for one in config.stages if one in ("reward", "align") and not (one == "reward" and config.reward.path)]
    if is_adapter(name, revision) or (stage == "sft" and later and config.lora.merge is not True):
        then = f"{later[0]} could not train what sft leaves" if stage == "sft" and later else "no second adapter can be trained"
        raise UserError(
            f"{name}: its weights are quantised ({what}), and beside an adapter {then}: give --lora.merge true where the adapter "
            "is trained"
        )


def _made(made: Sequence[Path]) -> str:
    return "; this run makes " + " and ".join(str(path) for path in made) if made else ""


def _may_be_on_the_hub(source: str) -> bool:
    path = Path(source).expanduser()
    return source.count("/") == 1 and not source.startswith((".", "~")) and not path.suffix and not path.exists()


def installed_version(package: str, key: str) -> None:
    if find_spec(package) is None:
        raise UserError(f"{key}: {package} is not installed; pip install {package}")
