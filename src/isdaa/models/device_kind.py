"""The kind of device that a computation is for. Chunk sizes and the choice of kernels depend on it."""

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
    """Choose chunk sizes and kernels as for another kind of device, such as a GPU that is not here (`preview.fake_step`).
    None: as for the device itself."""
    global _stands_for
    before, _stands_for = _stands_for, kind
    try:
        yield
    finally:
        _stands_for = before
