"""The kind of device that a computation is made for: what sizes of pieces, and ways that exist on one kind alone, go by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_stands_for: str | None = None


def kind_of(device: torch.device) -> str:
    """`cpu`, `cuda`, …: the device's own, or the one that it stands for."""
    return _stands_for or device.type


@contextmanager
def standing_for(kind: str | None) -> Iterator[None]:
    """Computations go the ways of another kind of device, such as those of a GPU that is not here (`preview.fake_step`).
    None: their own."""
    global _stands_for
    before, _stands_for = _stands_for, kind
    try:
        yield
    finally:
        _stands_for = before
