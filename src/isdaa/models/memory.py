"""The machine's memory: what is free, and what a new model would take of it."""

from __future__ import annotations

import copy
import resource
from pathlib import Path
from typing import Any

import torch

from isdaa.errors import UserError
from isdaa.models.hub_access import quiet

LAYER = 100_000  # bytes of Python's objects in a decoder layer
FEW = 64  # layers of a model that is made without numbers to count its parameters; of a deeper one, two are


def free_memory() -> float | None:
    """Bytes that this process can still have: by the machine, its container and its own limit; None where none of them says."""
    found = [_available(), _of_container(), _of_limit()]
    return min((value for value in found if value is not None), default=None)


def _available() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:")), None)
    except (OSError, ValueError):
        return None


def _of_container() -> float | None:
    group = Path("/sys/fs/cgroup")
    try:
        most = (group / "memory.max").read_text().strip()
        return None if most == "max" else float(most) - float((group / "memory.current").read_text())
    except (OSError, ValueError):
        return None


def _of_limit() -> float | None:
    """Of `ulimit -d` and `ulimit -v`."""
    try:
        pages = [float(word) * resource.getpagesize() for word in Path("/proc/self/statm").read_text().split()]
    except (OSError, ValueError):
        return None
    limits = [
        (resource.getrlimit(kind)[0], used) for kind, used in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5]))
    ]
    return min((most - used for most, used in limits if most != resource.RLIM_INFINITY), default=None)


def check_fits(config: Any, dtype: torch.dtype) -> None:
    """Raises UserError where a new causal language model of this configuration does not fit into the free memory.

    Raises whatever the architecture raises for values that it cannot be made with.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    count = layers if isinstance(layers, int) and layers > FEW else 0
    parameters = _parameters(config, 2) if count else _parameters(config)
    if count:
        parameters += (parameters - _parameters(config, 1)) * (count - 2)
    needs, there = parameters * dtype.itemsize + LAYER * count, free_memory()
    if there is not None and needs > there:
        raise UserError(
            f"model.random: {parameters:.3g} parameters need {needs / 1e9:.1f} GB of memory, and {there / 1e9:.1f} GB are free; "
            "make the model smaller"
        )


def _parameters(config: Any, layers: int | None = None) -> int:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if isinstance(getattr(text, "layer_types", None), list):
            text.layer_types = text.layer_types[:layers]
    with torch.device("meta"), quiet():
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
