"""Whether weights are numbers at all: NaN and infinities, found in one pass over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isdaa.errors import UserError
from isdaa.foreign import readable

HALF = (torch.float16, torch.bfloat16)


def _suspected(tensors: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """(places, (n,) bool) of the tensors of one device and dtype: True where a tensor's norm is not finite.

    A norm costs a tenth of asking every number; only very large finite weights (beyond 1e18) are suspected in vain.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(place)
    for (_, dtype), places in kinds.items():
        norms = torch._foreach_norm([_local(tensors[i]) for i in places], 2, torch.float32 if dtype in HALF else None)
        yield places, ~torch.stack(norms).isfinite()


@torch.no_grad()
def suspicious(tensors: Sequence[Tensor]) -> Tensor:
    """A bool on the first tensor's device, which nobody waits for: False where all of them are finite for sure."""
    return torch.stack([flags.any().to(tensors[0].device) for _, flags in _suspected(tensors)]).any()


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor."""
    whole: Any = tensor.detach()
    return whole.to_local() if hasattr(whole, "to_local") else whole


@torch.no_grad()
def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the floating-point tensors that hold a NaN or an infinity, in their order; masks and limits may."""
    floats = [(n, t) for n, t in tensors if t.is_floating_point() and t.numel() and t.device.type != "meta"]
    plain = [t if t.element_size() > 1 else t.float() for _, t in floats]  # float8 has no norm
    doubts = {places[i] for places, flags in _suspected(plain) for i, doubt in enumerate(flags.tolist()) if doubt}
    return [name for i, (name, t) in enumerate(floats) if i in doubts and not _is_fine(_local(plain[i]), t.requires_grad)]


def _is_fine(values: Tensor, trained: bool) -> bool:
    """Whether all are numbers; also for what is not trained and knows 0 and infinity alone: a mask, a limit that is none."""
    finite = values.isfinite()
    return bool(finite.all()) or (not trained and bool((finite.logical_not() ^ (values == 0)).all() and not values.isnan().any()))


def check_finite(name: str, model: nn.Module, mend: str = "take an earlier checkpoint") -> None:
    """Raises UserError, named by where the model came from, for weights that are not finite. mend: what to do about it."""
    broken = not_finite(model.named_parameters())
    if broken:
        raise UserError(f"{name}: weights are not finite ({listed(broken)}); {mend}")


def files_not_finite(folder: str | Path) -> list[str]:
    """`not_finite` of the safetensors files of a folder, tensor by tensor: none is in memory with another one.

    Raises UserError for a file that is none.
    """
    from safetensors import safe_open

    found = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        with readable(path, "not a readable safetensors file"), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no dict
                found += not_finite([(name, file.get_tensor(name))])
    return found


def listed(names: Sequence[str], most: int = 1) -> str:
    """The first few of some names, and that there are more."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
