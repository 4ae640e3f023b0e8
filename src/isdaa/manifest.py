"""A list beside a model of what its files were when it was written, by which damage and changes are seen before it is read."""

from __future__ import annotations

import hashlib
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from isdaa.errors import UserError
from isdaa.files import digest, write_json
from isdaa.foreign import read_json
from isdaa.ownership import sealed

MANIFEST = "isdaa_manifest.json"
ADAPTER = "adapter_config.json"
WINDOW = 1 << 20
WHOLE = 64  # windows: files up to 64 MiB are read whole, of larger ones 64 MiB spread evenly
# What a resume alone reads; people remove it to free the disk, and the model is none the worse.
RESUME = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json", "training_args.bin", "pytorch_model_fsdp*",
          "global_step*", "latest", "zero_to_fp32.py")  # fmt: skip
HISTORY = "metrics.jsonl"  # what training logged
UNLISTED = ("README.md", HISTORY)  # the card, which people edit, and the log: no part of the model
_intact: dict[str, list[Any]] = {}  # folder -> its manifest's files as they were when they were last read


def sampled_digest(path: Path) -> str:
    """SHA-256 of a file's content, or, beyond 64 MiB, of 64 windows of 1 MiB spread over it, both ends included.

    Syncing before the rename is what keeps a checkpoint whole; the digest catches a disk that lied and a file that was
    changed. Reading every byte of optimiser states of 100 GB twice would cost minutes at each save.
    """
    size = path.stat().st_size
    sha = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= WHOLE * WINDOW:
            while piece := file.read(WINDOW):
                sha.update(piece)
        else:
            for window in range(WHOLE):
                file.seek((size - WINDOW) * window // (WHOLE - 1))
                sha.update(file.read(WINDOW))
    return sha.hexdigest()


def write_manifest(folder: Path, own: bool = True) -> None:
    """List every file of a folder with size and digest, but not its card and its log. Called last of all.

    own: with this user's digest, without which training does not go on from the folder.
    """
    files: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (MANIFEST, *UNLISTED):
            files[path.relative_to(folder).as_posix()] = entry_of(path)
    write_json(folder / MANIFEST, sealed(MANIFEST, {"files": files}) if own else {"files": files})


def entry_of(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    facts = {"size": path.stat().st_size, "sha256": sampled_digest(path)}
    return facts | ({"but_base": _but_base(path)} if path.name == ADAPTER else {})


def defect(folder: str | Path, resume: bool = True) -> str | None:
    """What is wrong with a folder that has a manifest, in a few words; None where it is complete.

    resume: whether what only a resume reads must be there, too; False where the model alone is asked for.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}"
    try:
        for name, expected in _files(folder).items():
            path = folder / name
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                return f"its {MANIFEST} lists {name}, which is outside of it"
            if not path.is_file():
                if resume or not any(fnmatch(PurePosixPath(name).parts[0], pattern) for pattern in RESUME):
                    return f"{name} is missing"
            elif "but_base" in expected and _but_base(path) == expected["but_base"]:
                continue
            elif path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
            elif sampled_digest(path) != expected["sha256"]:
                return f"{name} is damaged"
    except (UserError, KeyError, TypeError, AttributeError, OSError, ValueError) as error:
        return f"its {MANIFEST} is not readable ({error})"
    return None


def _but_base(path: Path) -> str:
    """Digest of an adapter's configuration but for the place of its base model, which is mended where a run was moved."""
    return digest({key: value for key, value in dict(read_json(path)).items() if key != "base_model_name_or_path"})


def check_manifest(folder: Path) -> None:
    """Raises UserError where a model's folder has a manifest and is not what that says. Read once while no file changes."""
    if not (folder / MANIFEST).is_file():
        return
    state = _state(folder)
    if state is not None and _intact.get(str(folder.resolve())) == state:
        return
    wrong = defect(folder, resume=False)
    if wrong is not None:
        raise UserError(
            f"{folder}: not the model that was written ({wrong}); restore it, or, if the change was meant, "
            f"remove {folder / MANIFEST}"
        )
    if state is not None:
        _intact[str(folder.resolve())] = state


def _files(folder: Path) -> dict[str, Any]:
    files = read_json(folder / MANIFEST)["files"]
    if not isinstance(files, dict):
        raise TypeError("files is not a mapping of names")
    return files


def _state(folder: Path) -> list[Any] | None:
    """Size and times of a manifest and of all that lies in its folder; None where that cannot be told."""
    try:
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        return [(str(path), (facts := path.stat()).st_size, facts.st_mtime_ns, facts.st_ctime_ns) for path in found]
    except OSError:
        return None
