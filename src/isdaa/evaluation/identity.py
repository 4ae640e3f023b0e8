"""Which model this is, told from its files: a second evaluation must find its records without loading a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isdaa.files import digest, file_digest, read_json

# What decides a model's numbers. Optimiser states, cards and records do not; `generation_config.json` is never read.
DECIDING = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")


def model_digest(path: str | Path) -> str:
    """Digest of a model folder's weights and configuration, an adapter's base included; of a Hub model, of its weights.

    Raises UserError where nothing can be loaded from `path`.
    """
    folder = Path(path)
    if not folder.is_dir():
        from isdaa.models.loading import load_model, weights_digest

        return weights_digest(load_model(path, dtype="auto"))
    files = sorted({file for pattern in DECIDING for file in folder.glob(pattern) if file.is_file()})
    content: list[Any] = [[file.name, file_digest(file)] for file in files if file.name != "training_args.bin"]
    if not content:
        from isdaa.models.loading import load_model

        load_model(path)  # says what is missing
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if base and (folder / base).exists():
            content.append(model_digest(folder / base))
        elif base:
            content.append(model_digest(base) if Path(base).is_dir() else base)
    return digest(content)
