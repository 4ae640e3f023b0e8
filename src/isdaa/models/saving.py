"""A model as a plain Hugging Face folder, and the digest that names its weights in a cache."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from isdaa.files import write_folder_atomically
from isdaa.manifest import write_manifest
from isdaa.models.hub_access import quiet
from isdaa.models.lora import merged_copy
from isdaa.models.merging import settle_ties

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    files: Mapping[str, str] | None = None,
    *,
    merge: bool = True,
    stop_ids: Collection[int] = (),
) -> None:
    """Write a model's folder: safetensors, configuration, tokenizer, generation config, a manifest.

    The folder appears whole or not at all; one of that name is replaced. It loads with `AutoModelForCausalLM` and pipelines,
    without isdaa.

    Args:
        model: a transformers model or a `PeftModel`; it is left as it is.
        tokenizer: saved beside it.
        folder: where to.
        files: further files: name -> text, such as README.md.
        merge: whether an adapter is merged into the weights; False: the adapter alone, which needs its base model where it was.
        stop_ids: tokens that end a response, beside the tokenizer's EOS and those that the model already has.

    Raises:
        UserError: merged into the weights, the adapter would compute something else; nothing is written then.
        ValueError: a name in `files` that leads out of the folder.
    """
    folder = Path(folder)
    for name in files or {}:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name}: extra files of a model lie inside its folder")
    plain: Any = merged_copy(model) if merge else model

    def fill(aside: Path) -> None:
        with quiet(), savable(plain):
            plain.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
        write_generation_config(model, tokenizer, aside, stop_ids)
        for name, text in (files or {}).items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).write_text(text, encoding="utf-8")
        write_manifest(aside, own=False)  # nothing resumes from it

    write_folder_atomically(folder, fill)


class _AsItIs:
    """A generation config that is written as it is: transformers refuses one that, say, sets a temperature without sampling."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        self.own.to_json_file(Path(folder) / "generation_config.json", use_diff=True, keys_to_pop=["compile_config"])


@contextmanager
def savable(model: Any) -> Iterator[None]:
    """While a model is saved: its configuration says which weights are tied, and its generation config is written as it is."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    settle_ties(inner)
    own = inner.__dict__.get("generation_config")
    try:
        if own is not None:
            inner.generation_config = _AsItIs(own)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")  # peft's, of what is wanted
            yield
    finally:
        if own is not None:
            inner.generation_config = own


def write_generation_config(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, stop_ids: Collection[int] = ()) -> None:
    """Write generation_config.json: the model's own, as it was loaded, with every token that ends a response.

    This project's own sampler never reads it.
    """
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)  # a PeftModel's is that of its base
    config = GenerationConfig() if own is None else copy.deepcopy(own)
    listed = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stops = {tokenizer.eos_token_id, *stop_ids, *(stop for stop in listed if type(stop) is int)} - {None}
    first = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    eos: list[int] = first + sorted(stops - set(first))
    config._from_model_config = False  # or `generate` might make it anew
    config.eos_token_id = eos[0] if len(eos) == 1 else eos or None
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (eos[0] if eos else None)
    if config.bos_token_id is None:
        config.bos_token_id = tokenizer.bos_token_id
    _AsItIs(config).save_pretrained(folder)


def weights_digest(model: nn.Module) -> str:
    """Hexadecimal SHA-256 over names, dtypes, shapes and bytes of all parameters and saved buffers.

    The same in every process and on every device; one flipped bit changes it. Shared tensors are read once, and that
    they are shared counts. About a second per gigabyte and core.
    """
    tensors = model.state_dict()
    owner: dict[tuple[Any, ...], str] = {}
    for name in sorted(tensors):
        owner.setdefault(_place(tensors[name]), name)
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        contents = dict(zip(owner.values(), pool.map(_content, (tensors[n] for n in owner.values())), strict=True))
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor, first = tensors[name], owner[_place(tensors[name])]
        total.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0{first}\0{contents[first]}\n".encode())
    return total.hexdigest()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies in memory: equal for tied weights alone."""
    if tensor.numel() == 0:
        return ("empty", id(tensor))
    return (str(tensor.device), tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _content(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy()).hexdigest()  # type: ignore[arg-type]
