"""Where a model lies: a folder, a repository of the Hub, an adapter beside a base model of its own. Loads no weights."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from isdaa.disk import disk_error
from isdaa.errors import UserError
from isdaa.foreign import read_object
from isdaa.manifest import check_manifest
from isdaa.models.hub_access import offline, quiet

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARY = ("tokenizer.*", "vocab*", "*.model", "*.tiktoken")  # without one of them a tokenizer is empty
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


def check_adapter_weights(name: str, folder: Path | None) -> None:
    """Raises UserError for an adapter's folder without its weights; peft would ask the Hub for them."""
    if folder is not None and not has(folder, *ADAPTER_FILES):
        raise UserError(
            f"{name}: an adapter ({ADAPTER_CONFIG}) whose weights are missing: there is neither {' nor '.join(ADAPTER_FILES)}; "
            "copy it there from where the adapter was saved"
        )


def adapter_settings(adapter: Path) -> dict[str, Any]:
    settings = read_object(adapter)
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(settings.get(key), str | None):
            raise UserError(f"{adapter}: {key} must be text or null, found {type(settings[key]).__name__}")
    return settings


def base_of(adapter: Path, name: str) -> str:
    """The folder or Hub name of an adapter's base model.

    A relative path is one from the working directory, as for peft; else from the adapter's folder, or the folder around it.
    adapter: its `adapter_config.json`; name: of the adapter, for messages. Raises UserError for a path that leads nowhere.
    """
    base = adapter_settings(adapter).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{adapter}: names no base model (base_model_name_or_path); set it to the base's folder or name")
    here, beside = Path(base).expanduser(), _beside(adapter, base)
    if here.exists():
        if beside is not None and beside.resolve() != here.resolve():
            _say_once(f"{adapter}: base_model_name_or_path {base}: that of the working directory is taken, not {beside}")
    elif beside is not None:
        if not _looks_like_path(base):  # the Hub may have a model of that name
            _say_once(f"{adapter}: base_model_name_or_path {base}: {beside} is taken")
        base = str(beside.resolve() if ".." in beside.parts else beside)
    elif _looks_like_path(base):
        raise _no_base(adapter, name, f"{base} does not exist")
    if (Path(base) / ADAPTER_CONFIG).exists() and adapter.resolve() in _chain(Path(base)):
        raise UserError(f"{adapter}: base_model_name_or_path, {base}, leads back to this adapter; name the base model")
    return base


@contextmanager
def base_named(adapter: Path | None, name: str) -> Iterator[None]:
    """What says that a base model is no folder and no name of the Hub says, too, which adapter asks for it."""
    try:
        yield
    except UserError as error:
        base = None if adapter is None else adapter_settings(adapter).get("base_model_name_or_path")
        if adapter is None or not str(error).startswith(f'"{base}": no such folder here'):
            raise
        raise _no_base(adapter, name, error) from error


def _no_base(adapter: Path, name: str, why: object) -> UserError:
    return UserError(
        f"{name}: its base model {why}; mend base_model_name_or_path in {adapter}: write the base's folder there, whole or from "
        'the adapter\'s folder on ("../base")'
    )


def _beside(adapter: Path, base: str) -> Path | None:
    """The base model's folder by its path from the adapter's folder, or from the run's around it; None where there is none."""
    outer = adapter.parent.absolute().parent
    for folder in (adapter.parent, outer, *([outer.parent] if outer.name == "checkpoints" else [])):
        found = folder / base
        if found.is_dir() and any((found / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
            return found
    found = adapter.parent / base
    return found if _looks_like_path(base) and found.exists() else None  # loading it says what is wrong


@cache
def _say_once(line: str) -> None:
    logger.warning(line)


def tokenizer_places(name: str, revision: str | None = None) -> Iterator[tuple[str, str | None]]:
    """Where a model's tokenizer may lie, best first, each with its revision: its own place, the run's folder around a
    checkpoint, its base model's places. A folder without a vocabulary is none; a name of the Hub always is one."""
    folder = local_folder(name)
    if folder is None or _has_tokenizer(folder):
        yield name, revision
    if folder is not None and re.fullmatch(r"checkpoint-\d+", folder.name):
        around = folder.absolute().parent if folder.parent == Path() else folder.parent
        if _has_tokenizer(around):
            yield str(around), None
    adapter = adapter_config(name, folder, revision)
    if adapter is not None:
        with base_named(adapter, name):
            yield from tokenizer_places(base_of(adapter, name), adapter_settings(adapter).get("revision"))


def _has_tokenizer(folder: Path) -> bool:
    if has(folder, *VOCABULARY):
        return True
    config = folder / TOKENIZER_CONFIG
    return config.is_file() and bool(read_object(config).get("auto_map"))  # code of its own, with files of its own


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
        base = adapter_settings(file).get("base_model_name_or_path") or ""
        here = Path(base).expanduser()
        folder = here if here.is_dir() else _beside(file, base) or file.parent / base
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
