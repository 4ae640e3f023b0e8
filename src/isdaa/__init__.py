"""Offline preference alignment that does not over-optimise.

`Objective`, `PairLogps` and `PRESETS` are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isdaa.objectives.objective import Objective, PairLogps
    from isdaa.objectives.presets import PRESETS

# torch reads this when it makes its first tensor: large blocks of CPU memory in huge pages, which are mapped hundreds of
# times faster. A training step maps and frees gigabytes, and spends 5 % of its time on that otherwise.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
__all__ = ["PRESETS", "Objective", "PairLogps", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("Objective", "PairLogps"):
        from isdaa.objectives import objective

        return getattr(objective, name)
    if name == "PRESETS":
        from isdaa.objectives.presets import PRESETS

        return PRESETS
    raise AttributeError(f"module 'isdaa' has no attribute {name!r}")
