"""Which model this is, told from its files: a second evaluation must find its records without loading a model."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

from isdaa.files import digest, file_digest

# What decides a model's numbers. Optimiser states, cards and records do not; `generation_config.json` is never read.
DECIDING = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
SETTLED = 2.0  # seconds since a file's last change, from which on another one would show in its times
NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "pytorch_model_fsdp.bin")  # a trainer's own


_known: dict[tuple[Any, ...], str] = {}  # digests of files as they are, by what the system says of them


def _file_digest(path: Path) -> str:
    """`file_digest`, read once a process while the file stays as it is."""
    state = path.stat()
    key = (str(path.resolve()), state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    if key not in _known:
        found = file_digest(path)
        if time.time() - max(state.st_mtime, state.st_ctime) < SETTLED:
            return found  # it may change again within the clock's tick
        _known[key] = found
    return _known[key]


@cache
def _hub_digest(name: str, trust_remote_code: bool, revision: str | None) -> str:
    from isdaa.models.loading import load_model, weights_digest

    return weights_digest(load_model(name, dtype="auto", trust_remote_code=trust_remote_code, revision=revision))


def model_digest(path: str | Path, trust_remote_code: bool = False, revision: str | None = None) -> str:
    """Digest of a model folder's weights and configuration, an adapter's base included; of a Hub model, of its weights.

    Raises UserError where nothing can be loaded from `path`.
    """
    # What is an adapter and where its base lies is decided in one place, so that this digest is of what is loaded.
    from isdaa.models.loading import load_model
    from isdaa.models.places import adapter_config, base_of, local_folder

    name = str(path)
    folder = local_folder(name)
    if folder is None:
        return _hub_digest(name, trust_remote_code, revision)
    files = sorted({file for pattern in DECIDING for file in folder.glob(pattern) if file.is_file()})
    content: list[Any] = [[file.name, _file_digest(file)] for file in files if file.name not in NO_WEIGHTS]
    if not content:
        load_model(name)  # says what is missing
    adapter = adapter_config(name, folder, None)
    if adapter is not None:
        base = base_of(adapter, name)
        content.append(model_digest(base) if local_folder(base) is not None else base)
    return digest(content)


def same_weights(one: str | Path, other: str | Path) -> bool:
    """Whether two folders hold the same files of weights, byte by byte."""
    first, second = (
        {file.name: file for pattern in DECIDING[:2] for file in Path(path).glob(pattern) if file.name not in NO_WEIGHTS}
        for path in (one, other)
    )
    if not first or first.keys() != second.keys():
        return False
    pairs = [(file, second[name]) for name, file in first.items()]
    return all(a.stat().st_size == b.stat().st_size for a, b in pairs) and all(
        _file_digest(a) == _file_digest(b) for a, b in pairs
    )


def stat_of(path: str | Path) -> list[list[Any]]:
    """What the system says of the files that decide a model's numbers: name, bytes, time of the last change."""
    files = sorted({file for pattern in DECIDING for file in Path(path).glob(pattern) if file.name not in NO_WEIGHTS})
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
