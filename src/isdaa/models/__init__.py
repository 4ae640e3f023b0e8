"""Models: loaded and saved, run over packed pairs, sampled from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from isdaa.lazy import lazy

if TYPE_CHECKING:
    from isdaa.models.loading import load_model, load_tokenizer
    from isdaa.models.saving import save_model

__all__ = ["load_model", "load_tokenizer", "save_model"]
__getattr__, __dir__ = lazy(
    __name__, {"load_model": "models.loading", "load_tokenizer": "models.loading", "save_model": "models.saving"}
)
