"""Rows of a model's embeddings and head, one a token id: how many there are, and a model with fewer of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from isdaa.errors import UserError
from isdaa.models.hub_access import quiet
from isdaa.models.loading import model_config
from isdaa.models.lora import vocabulary_brought
from isdaa.models.packed.patched_forward import inner_model
from isdaa.models.places import (
    adapter_config,
    adapter_settings,
    base_named,
    base_of,
    check_adapter_weights,
    hub_file,
    local_folder,
    short,
)

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def vocabulary_rows(path_or_name: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> int | None:
    """Rows of the embeddings of the model of a folder or Hub name, without its weights; of an adapter that brings embeddings of
    its own, theirs. None where the configuration does not say.

    Raises:
        UserError: as `loading.model_config`; an adapter's file that cannot be read.
    """
    name = str(path_or_name)
    folder = local_folder(name)
    adapter = adapter_config(name, folder, revision)
    config = model_config(name, trust_remote_code=trust_remote_code, revision=revision)
    if adapter is None:
        return getattr(config.get_text_config(), "vocab_size", None)
    settings = adapter_settings(adapter)
    with base_named(adapter, name):
        rows = vocabulary_rows(base_of(adapter, name), trust_remote_code=trust_remote_code, revision=settings.get("revision"))
    weights = _shapes(name, folder, revision)
    if rows is None or not any("lora" not in key for key in weights):
        return rows
    from transformers import AutoModelForCausalLM

    config.get_text_config().vocab_size = rows
    with torch.device("meta"), quiet():
        base = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return vocabulary_brought(base, weights, name) or rows


def _shapes(name: str, folder: Path | None, revision: str | None) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file, without memory where the file allows it."""
    from peft.utils import load_peft_weights
    from safetensors import safe_open

    check_adapter_weights(name, folder)
    file = folder / ADAPTER_WEIGHTS if folder is not None else hub_file(name, ADAPTER_WEIGHTS, revision)
    try:
        if file is None or not file.is_file():
            return load_peft_weights(str(folder or name), device="cpu", revision=revision)
        with safe_open(file, "pt") as tensors:
            return {key: torch.empty(tensors.get_slice(key).get_shape(), device="meta") for key in tensors.keys()}  # noqa: SIM118
    except Exception as error:
        raise UserError(f"{name}: the adapter does not fit its base model or is damaged ({short(error)})") from error


def cut_vocabulary(model: Any, rows: int, name: str) -> None:
    """Take from a model, in memory, the embeddings and logits of ids from `rows` on: as if their logits were −∞, and no others.

    Raises:
        UserError: a model whose ends are of a kind that cannot be cut, such as a quantised head.
    """
    inner: Any = inner_model(model)
    try:
        with quiet():
            inner.resize_token_embeddings(rows, mean_resizing=False)
    except Exception as error:
        raise _uncut(name, rows, short(error)) from error
    ends = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    if any(end is None or end.weight.shape[0] != rows for end in ends):
        raise _uncut(name, rows, "its embeddings or its head keep more")


def _uncut(name: str, rows: int, why: str) -> UserError:
    return UserError(
        f"{name}: its vocabulary cannot be cut to the {rows} rows that all models have ({why}); merge its adapter and save it "
        "with plain weights, then evaluate that"
    )
