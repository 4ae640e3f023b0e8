"""Whether weights are numbers at all: NaN and infinities, found in one pass over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isdaa.errors import UserError
from isdaa.foreign import read_object, readable
from isdaa.models.places import ADAPTER_FILES

HALF = (torch.float16, torch.bfloat16)
# What transformers loads of a folder: the first of these that it has.
MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TRAINED = (".weight", ".bias")  # how names of what is trained end: no mask, no limit


class NotFiniteError(UserError):
    """Weights that hold a NaN or an infinity. names: of their tensors."""

    def __init__(self, message: str, names: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.names = list(names)


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


def _plain(tensor: Tensor) -> Tensor:
    """float8 has no norm."""
    return tensor if tensor.element_size() > 1 else tensor.float()


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor."""
    whole: Any = tensor.detach()
    return whole.to_local() if hasattr(whole, "to_local") else whole


@torch.no_grad()
def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the floating-point tensors that hold a NaN or an infinity, in their order; masks and limits may."""
    floats = [(n, t) for n, t in tensors if t.is_floating_point() and t.numel() and t.device.type != "meta"]
    plain = [_plain(t) for _, t in floats]
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
        raise NotFiniteError(f"{name}: weights are not finite ({listed(broken)}); {mend}", broken)


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


def loaded_not_finite(folder: str | Path, adapter: bool = False) -> list[str]:
    """`not_finite` of the weights that loading a folder would read, file by file; none of them stays in memory.

    adapter: of the adapter in it. Raises UserError, naming the file, for one that is damaged or that an index names in vain.
    """
    folder = Path(folder).expanduser()
    first = next((folder / name for name in (ADAPTER_FILES if adapter else MODEL_FILES) if (folder / name).is_file()), None)
    if first is None:
        return []  # loading it says what is missing
    files = [first]
    if first.suffix == ".json":
        shards = read_object(first).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise UserError(f"{first}: names no files of weights (weight_map); copy or save the model again")
        files = [folder / name for name in sorted(set(shards.values()))]
    lost = next((file for file in files if not file.is_file()), None)
    if lost is not None:
        raise UserError(f"{lost}: is not there, but {first.name} names it: the model is incomplete; copy or save it again")
    found: list[str] = []
    for file in files:
        state = file.stat()
        found += _file_not_finite(str(file), (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    return found


@lru_cache(maxsize=4096)
def _file_not_finite(path: str, state: tuple[int, ...]) -> tuple[str, ...]:
    """Of one file, read once a process while the system says the same of it."""
    from safetensors import safe_open

    if path.endswith(".safetensors"):
        with readable(path, "a damaged file of weights", "copy or save it again"), safe_open(path, framework="pt") as file:
            return tuple(n for name in file.keys() for n in _one_not_finite(name, file.get_tensor(name)))  # noqa: SIM118
    with readable(path, "a damaged file of weights", "copy or save it again"):
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # of an older kind, which cannot be mapped
            weights = torch.load(path, map_location="cpu", weights_only=True)
        tensors = [(name, value) for name, value in weights.items() if isinstance(value, Tensor)]
    return tuple(n for name, value in tensors for n in _one_not_finite(name, value))


def _one_not_finite(name: str, tensor: Tensor) -> list[str]:
    if not (name.endswith(TRAINED) or "lora_" in name):
        return not_finite([(name, tensor)])
    if not tensor.is_floating_point() or not tensor.numel():
        return []
    plain = _plain(tensor)
    return [name] if bool(suspicious([plain])) and not bool(plain.isfinite().all()) else []


def listed(names: Sequence[str], most: int = 1) -> str:
    """The first few of some names, and that there are more."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
