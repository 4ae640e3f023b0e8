"""What is written beside every model and run: where it came from, so that a path alone is enough to evaluate it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from isdaa.errors import UserError
from isdaa.files import read_json

NAME = "isdaa.json"
GOLD = "gold"  # the embedded world's scorer: a word, not a path
PACKAGES = ("isdaa", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "numpy")


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
    tokens: int | None = None  # version of the rules by which text became tokens (`data.encoding.VERSION`); None: the first
    versions: dict[str, str] = field(default_factory=dict)
    git_revision: str | None = None


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
    """A local path as seen from `folder`; anything that does not exist locally (a Hub name, `gold`) unchanged."""
    if target in (None, GOLD) or not Path(target).exists():
        return target
    return os.path.relpath(Path(target).resolve(), Path(folder).resolve())


def resolve_from(folder: Path, target: str | None) -> str | None:
    """Undo `relative_to`."""
    if target in (None, GOLD):
        return target
    inside = folder.resolve() / target  # `..` leads out of where a symlink points, not of where it stands
    return os.path.normpath(inside) if inside.exists() else target


def record_text(record: ModelRecord, home: str | Path) -> str:
    """The content of `isdaa.json` for a model whose folder is, or after a rename will be, `home`."""
    data = asdict(record)
    for key in ("reference", "evaluation", "scorer"):
        data[key] = relative_to(Path(home), data[key])
    data["versions"] = data["versions"] or versions()
    data["git_revision"] = data["git_revision"] or git_revision()
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_record(folder: str | Path) -> ModelRecord | None:
    """The record beside a model, with its paths made usable from here; None where the folder has none."""
    folder = Path(folder)
    path = folder / NAME
    if not path.is_file():
        return None
    data = read_json(path)
    try:
        record = ModelRecord(**data)
    except (TypeError, AttributeError):
        raise UserError(f"{path}: not a record of this version of isdaa; name --reference and --data instead") from None
    for key in ("reference", "evaluation", "scorer"):
        setattr(record, key, resolve_from(folder, getattr(record, key)))
    return record
