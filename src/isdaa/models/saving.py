"""A model as a plain Hugging Face folder, and the digest that names its weights in a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from isdaa.files import write_folder_atomically
from isdaa.manifest import write_manifest
from isdaa.models.adapters import merged_copy
from isdaa.models.hub import quiet

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def save_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    files: Mapping[str, str] | None = None,
    *,
    merge: bool = True,
    stop_ids: Collection[int] = (),
) -> None:
    """Write safetensors, configuration, tokenizer, generation config and `files` (name -> text, such as README.md).

    The folder appears whole or not at all, with a manifest of its files; one of that name is replaced. It loads with
    `AutoModelForCausalLM` and pipelines without isdaa. A `PeftModel` is saved with its adapter merged into the weights (the
    model itself is left as it is); `merge=False` saves the adapter alone, which then needs its base model where it was.
    `stop_ids` are further tokens that end a response, beside the tokenizer's EOS and those that the model already has.
    """
    folder = Path(folder)
    for name in files or {}:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name}: extra files of a model lie inside its folder")
    plain: Any = merged_copy(model) if merge else model

    def fill(aside: Path) -> None:
        with quiet():
            plain.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            generation_config(model, tokenizer, stop_ids).save_pretrained(aside)
        for name, text in (files or {}).items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).write_text(text, encoding="utf-8")
        write_manifest(aside, own=False)  # nothing resumes from it

    write_folder_atomically(folder, fill)


def generation_config(model: Any, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int] = ()) -> GenerationConfig:
    """Sampling as the project means it: temperature 1, nothing filtered, and every token that ends a response.

    The filters are written out, since transformers' own default is a top-k of 50.
    """
    from transformers import GenerationConfig

    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = known if isinstance(known, list) else [known]
    stops = {tokenizer.eos_token_id, *stop_ids, *(stop for stop in listed if type(stop) is int)} - {None}
    first = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    eos: list[int] = first + sorted(stops - set(first))  # type: ignore[arg-type]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (eos[0] if eos else None)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos[0] if len(eos) == 1 else eos or None,
        pad_token_id=pad,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
    )


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
