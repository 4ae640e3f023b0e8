"""Where a model lies: a folder, a repository of the Hub, an adapter beside a base model of its own. Loads no weights."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from isdaa.disk import disk_error
from isdaa.errors import UserError
from isdaa.foreign import read_object
from isdaa.manifest import check_manifest
from isdaa.models.hub import offline, quiet

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")


def local_folder(name: str) -> Path | None:
    """The folder of that name, or None for a Hub name; a path that leads nowhere, or to a damaged model, is an error."""
    path = Path(name).expanduser()
    if path.is_dir():
        check_manifest(path)
        return path
    if path.exists():
        refuse_gguf(path)
        raise UserError(f"{name}: a file; a model is a folder with config.json and *.safetensors")
    if not name or _looks_like_path(name):
        raise UserError(f'"{name}": no such folder')
    return None


def refuse_gguf(place: str | Path) -> None:
    """Raises UserError for a GGUF file, or a folder with one and no weights: they can be read, but not trained or saved."""
    path = Path(place).expanduser()
    files = [path] if path.suffix == ".gguf" and path.is_file() else sorted(path.glob("*.gguf"))
    if files and not has(path, *WEIGHTS):
        raise UserError(
            f"{files[0]}: a GGUF file; its quantised weights cannot be trained. Make an ordinary folder of it, and name that:",
            f"isdaa get-model {shlex.quote(str(files[0]))} {shlex.quote(f'models/{files[0].stem.lower()}')}",
        )


def has(folder: Path, *patterns: str) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in patterns)


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or "\\" in name or name.endswith("/") or name.count("/") > 1


def adapter_config(name: str, folder: Path | None, revision: str | None) -> Path | None:
    """The adapter_config.json of a place that holds an adapter and no model of its own."""
    if folder is not None:
        path = folder / ADAPTER_CONFIG
        # Some trainers write the base model's config.json beside an adapter; its weights they do not.
        return (
            path if path.is_file() and not has(folder, "model*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin") else None
        )
    adapter = hub_file(name, ADAPTER_CONFIG, revision)
    return adapter if adapter is not None and hub_file(name, "config.json", revision) is None else None


def adapter_settings(adapter: Path) -> dict[str, Any]:
    settings = read_object(adapter)
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(settings.get(key), str | None):
            raise UserError(f"{adapter}: {key} must be text or null, found {type(settings[key]).__name__}")
    return settings


def base_of(adapter: Path, name: str) -> str:
    base = adapter_settings(adapter).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{adapter}: names no base model (base_model_name_or_path); set it to the base's folder or name")
    if _looks_like_path(base) and not Path(base).exists():
        beside = adapter.parent / base
        if not beside.exists():
            raise UserError(f"{name}: its base model {base} does not exist; mend base_model_name_or_path in {adapter}")
        base = str(beside)
    if (Path(base) / ADAPTER_CONFIG).exists() and adapter.resolve() in _chain(Path(base)):
        raise UserError(f"{adapter}: base_model_name_or_path, {base}, leads back to this adapter; name the base model")
    return base


def is_adapter(path_or_name: str, revision: str | None = None) -> bool:
    """Whether a folder or Hub name holds an adapter and no model of its own."""
    return adapter_config(path_or_name, local_folder(path_or_name), revision) is not None


def adapter_base(folder: Path) -> str | None:
    """The folder or name of the base model of an adapter's folder; None where it holds a model of its own, or names none."""
    try:
        adapter = adapter_config(str(folder), folder, None)
        return None if adapter is None else base_of(adapter, str(folder))
    except UserError:
        return None  # loading it says what is wrong


def _chain(folder: Path) -> list[Path]:
    """The adapters that a folder begins: its own, that of its base, and so on until one comes again."""
    found: list[Path] = []
    while (file := (folder / ADAPTER_CONFIG).resolve()).is_file() and file not in found:
        found.append(file)
        base = Path(adapter_settings(file).get("base_model_name_or_path") or "")
        folder = base if base.is_dir() else file.parent / base
    return found


def hub_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a Hub repository, on this disk; None where it has none or cannot be asked. Raises UserError for no such name."""
    from transformers.utils import cached_file

    try:
        with quiet():
            found = cached_file(
                name,
                file,
                revision=revision,
                **offline(None),
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
    except OSError as error:  # no name that the Hub could have
        raise readable(error, name, None, "model") from error
    return None if found is None else Path(found)


def readable(error: BaseException, name: str, folder: Path | None, what: str) -> UserError:
    """One line for what transformers raised."""
    text = str(error)
    if (refused := disk_error(error)) is not None:  # the Hub's own cache
        return refused
    if "trust_remote_code" in text:
        return UserError(f"{name}: needs code of its own repository; set trust_remote_code only if you trust its authors")
    if "Unrecognized configuration class" in text:
        return UserError(f"{name}: not a decoder language model ({short(error)})")
    if folder is not None:
        return UserError(f"{name}: the {what} in this folder cannot be loaded ({short(error)})")
    if isinstance(error, OSError):
        return UserError(
            f'"{name}": no such folder here, and no {what} of that name could be had from the Hub '
            f"({'it cannot be reached' if offline(None) else short(error)})"
        )
    return UserError(f"{name}: the {what} cannot be loaded ({short(error)})")


def short(error: BaseException) -> str:
    """Kind and first sentence of an error; transformers' own go on with advice and tables."""
    text = " ".join(str(error).split())
    end = text.find(". ")
    text = text if end < 0 else text[:end]
    return f"{type(error).__name__}: {text if len(text) <= 240 else text[:240] + '…'}"
