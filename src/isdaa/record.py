"""What is written beside every model and run: where it came from, so that a path alone is enough to evaluate it."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from isdaa.errors import UserError
from isdaa.foreign import check_shape, read_json
from isdaa.ownership import SEAL, is_own, sealed

NAME = "isdaa.json"
RUN = "run.json"  # of a run's folder: its stages
GOLD = "gold"  # the embedded world's scorer: a word, not a path
SOURCE = re.compile(r"(\w+:)?(.+?)(:[\w.-]+)?", re.DOTALL)  # `hh:/data/hh`, `/data/set:subset`
ABSOLUTE = re.compile(r"(\w+:)?([/~].*)", re.DOTALL)
NO_PLACES = ("chat_template_kwargs", "random")  # values of others, in which `/no_think` is a word
PLACES = ("reference", "evaluation", "scorer")  # what a record names beside its model
PACKAGES = ("isdaa", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "numpy")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
BASE_KEYS = {  # of the files in a model's folder, what names the model that it was made of
    NAME: ("base", "reference"),
    "source.json": ("model",),  # of `isdaa get-model`
    "adapter_config.json": ("base_model_name_or_path",),
    "config.json": ("_name_or_path",),
}
SECTION = (dict, None)
SHAPE = {
    "kind": str,
    "config": {
        "seed?": (int, None),
        "objective?": ({"method?": (str, None), "beta?": (float, None)}, None),
        "model?": ({**dict.fromkeys(("path?", "revision?", "dtype?"), (str, None)), "trust_remote_code?": (bool, None)}, None),
        "reference?": (dict.fromkeys(("path?", "revision?"), (str, None)), None),
        "data?": ({"evaluation?": (str, None), "prompt_repeated?": (str, None)}, None),
        "evaluation?": SECTION,
        "tokenization?": SECTION,
        "scorer?": SECTION,
    },
    **dict.fromkeys(("reference?", "evaluation?", "evaluation_split?", "scorer?", "git_revision?", "base?"), (str, None)),
    "position?": (str, None),
    "own_logps?": ([int], None),
    "trained_on?": ({"responses?": int, "least": str}, None),
    "held_out?": ({**dict.fromkeys(("accuracy", "low", "high"), float), "pairs": int, "prompts": int}, None),
    "continued?": (
        {
            **dict.fromkeys(("from", "weights"), str),
            **dict.fromkeys(("run", "reference"), (str, None)),
            "step": (int, None),
            "steps_before": int,
            "optimizer": bool,
        },
        None,
    ),
    "step?": (int, None),
    "tokens?": (int, None),
    "metrics?": dict,
    "versions?": dict,
}


@dataclass
class ModelRecord:
    """The record `isdaa.json` in a model's folder. Local paths are stored relative to that folder, so a run can be moved."""

    kind: str  # "sft", "reward" or "policy"
    config: dict[str, Any]  # resolved configuration of the run
    step: int | None = None  # optimiser step of a checkpoint
    reference: str | None = None  # model folder or Hub name of π_ref
    evaluation: str | None = None  # held-out prompts or pairs: file, Hub name or world
    evaluation_split: str | None = None
    scorer: str | None = None  # "gold", a reward model's folder or name, or null
    metrics: dict[str, float] = field(default_factory=dict)  # last training metrics
    position: str | None = (
        None  # of a reward model: where it is read (`evaluation.reward_reading`); None: at the response's last token
    )
    held_out: dict[str, Any] | None = None  # of a reward model: accuracy, low, high, pairs, prompts on pairs it never saw
    trained_on: dict[str, Any] | None = None  # sketch of its pairs (`data.overlap`), by which shared ones are known
    tokens: int | None = None  # version of the rules by which text became tokens (`data.encoder.VERSION`); None: the first
    versions: dict[str, str] = field(default_factory=dict)
    git_revision: str | None = None
    continued: dict[str, Any] | None = None  # of a policy: what its run goes on from (`training.stages.continued.ancestry`)
    own_logps: list[int] | None = None  # of a weighted policy: pairs with behaviour logps of their own, of how many
    base: str | None = None  # Hub name of the model that the weights come from in the end, where it is known
    own: bool = field(default=False, compare=False)  # read from a file that carries this user's digest; never written


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache  # of the code that this process has loaded, which later changes on disk do not touch
def git_revision() -> str | None:
    """The revision of the source tree that isdaa runs from, with `+changes` where files differ from it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():
        return None

    def git(*command: str) -> str:
        called = ["git", "-C", str(root), *command]
        return subprocess.run(called, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # Unpacked inside another repository, isdaa has no revision: that one's says nothing of it.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return git("describe", "--always", "--dirty=+changes", "--abbrev=12", "--exclude=*") or None
    except (OSError, subprocess.SubprocessError):
        return None


def relative_to(folder: Path, target: str | None) -> str | None:
    """A local path as seen from `folder`; anything else (a Hub name, `gold`) unchanged."""
    if target is None or target == GOLD:
        return target
    recipe, place, subset = _parts(target, lambda path: Path(path).exists())
    if not (Path(place).is_absolute() or Path(place).exists()):
        return target
    return recipe + os.path.relpath(Path(place).resolve(), Path(folder).resolve()) + subset


def resolve_from(folder: Path, target: str | None) -> str | None:
    """Undo `relative_to`."""
    if target is None or target == GOLD:
        return target
    # `..` leads out of where a symlink points, not of where it stands.
    recipe, place, subset = _parts(target, lambda path: (folder.resolve() / path).exists())
    inside = folder.resolve() / place
    return recipe + os.path.normpath(inside) + subset if inside.exists() else target


def path_of(source: str) -> Path | None:
    """What lies on this disk of a source such as `hh:/data/hh`; None for a name of the Hub and for what is not there."""
    place = Path(_parts(source, lambda path: Path(path).exists())[1])
    return place if place.exists() else None


def _parts(target: str, there: Callable[[str], bool]) -> tuple[str, str, str]:
    """(`hh:`, the path, `:subset`) of a source, where the path is there; else what an absolute path has before it."""
    found = SOURCE.fullmatch(target)
    recipe, rest, subset = ("", target, "") if found is None else (found[1] or "", found[2], found[3] or "")
    for parts in (("", target, ""), (recipe, rest + subset, ""), ("", recipe + rest, subset), (recipe, rest, subset)):
        if there(parts[1]):
            return parts
    return (recipe, rest + subset, "") if rest[0] in "/~" else ("", target, "")


def record_text(record: ModelRecord, home: str | Path) -> str:
    """The content of `isdaa.json`, with the user's digest, for a model whose folder is, or after a rename will be, `home`."""
    data = asdict(record)
    del data["own"]
    data["config"] = without_places(data["config"])
    for key in PLACES:
        data[key] = relative_to(Path(home), data[key])
    if data["continued"] is not None:
        data["continued"] |= {key: relative_to(Path(home), data["continued"][key]) for key in ("from", "reference")}
    data["versions"] = data["versions"] or versions()
    data["git_revision"] = data["git_revision"] or git_revision()
    return json.dumps(sealed(NAME, data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def without_places(value: Any) -> Any:
    """JSON data whose absolute paths, which hold on this machine alone, are cut to their last part."""
    if isinstance(value, dict):
        return {key: inner if key in NO_PLACES else without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_places(inner) for inner in value]
    found = ABSOLUTE.fullmatch(value) if isinstance(value, str) else None
    return (found[1] or "") + Path(found[2]).name if found else value


def read_record(folder: str | Path) -> ModelRecord | None:
    """The record beside a model, with its paths made usable from here; None where the folder has none."""
    folder = Path(folder)
    path = folder / NAME
    if not path.is_file():
        return None
    data = read_json(path)
    check_shape(data, SHAPE, str(path))
    try:
        record = ModelRecord(**{key: value for key, value in data.items() if key not in (SEAL, "own")}, own=is_own(NAME, data))
    except (TypeError, AttributeError):
        raise UserError(f"{path}: not a record of this version of isdaa; name --reference and --data instead") from None
    for key in PLACES:
        setattr(record, key, resolve_from(folder, getattr(record, key)))
    if record.continued is not None:
        record.continued |= {key: resolve_from(folder, record.continued[key]) for key in ("from", "reference")}
    return record


def base_of(path: str | None) -> str | None:
    """The Hub name of the model that the weights at `path` come from in the end: through records, adapters, and the Hub's cache.

    None where nothing says it. What lies in a folder is only shown, never loaded.
    """
    seen: list[Path] = []
    while path is not None and (folder := Path(path).expanduser()).is_dir() and folder.resolve() not in seen:
        seen.append(folder.resolve())
        cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", str(folder.resolve()))
        if cached is not None:
            return f"{cached[1]}/{cached[2]}"
        path = _named_in(folder)
    return path if path is not None and HUB_NAME.fullmatch(path) and not Path(path).exists() else None


def _named_in(folder: Path) -> str | None:
    """What a model's folder names as its base: a Hub name, or a folder that is there."""
    for file, keys in BASE_KEYS.items():
        try:
            data = read_json(folder / file)
        except (UserError, OSError):
            continue
        for key in keys:
            found = data.get(key) if isinstance(data, dict) else None
            if isinstance(found, str) and found:
                beside = folder.resolve() / found
                if beside.is_dir() or "/" in found or file == NAME:  # else as likely a folder that is elsewhere
                    return os.path.normpath(beside) if beside.is_dir() else found
    return None


def run_folder(path: str | Path) -> Path | None:
    """The run that a checkpoint or final model lies in, or None."""
    folder = Path(path).absolute()
    if folder.parent.name == "checkpoints":
        return folder.parent.parent
    return folder.parent if folder.name == "model" else None
