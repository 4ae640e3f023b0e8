"""Token logps by a fused kernel on a GPU: the logits never leave the chip. Off unless asked for.

The kernel is `cut_cross_entropy.linear_cross_entropy` (arXiv 2411.09009). It is used only where it computes what `logprobs`
computes, token by token, with gradients to hidden states and weight: half precision on a GPU, no bias, no factor, nothing
filtered out of the gradient, sums of gradients in fp32. The release on PyPI (25.1.1) adds gradients up in bf16 and is
therefore not used; later versions take `accum_e_fp32` and `accum_c_fp32`. Liger's fused cross-entropy is no candidate: it
computes gradients in its forward pass, for one sum over all tokens, and here every response has a factor of its own.

Chunked PyTorch stays the default: nobody has measured which is faster here (benchmarks/gpu_step.py does).
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from isdaa.models.logprobs import LinearHead

ENABLED = False

_said: set[str] = set()

_NEEDED = {"softcap", "reduction", "filter_eps", "accum_e_fp32", "accum_c_fp32"}
_TOLERANCE = 0.03  # of the largest value, against fp32 on the same half-precision numbers
_proofs: dict[tuple[Any, ...], str | None] = {}
logger = logging.getLogger(__name__)


@contextmanager
def enabled(flag: bool) -> Iterator[None]:
    """Asks for the fused head, or does not, and puts back what was asked before."""
    global ENABLED
    before, ENABLED = ENABLED, flag
    try:
        yield
    finally:
        ENABLED = before


def fused_token_logps(hidden: Tensor, head: LinearHead, targets: Tensor) -> Tensor | None:
    """(N,) log π(target | hidden) in fp32, as `logprobs.token_logps` gives it, or None where the kernel cannot be used.

    hidden: (N, D); targets: (N,). Asked for nothing (`ENABLED` is False), it does nothing.
    """
    if not ENABLED:
        return None
    why = lacks(hidden, head)
    if why is not None:
        if why not in _said and len(hidden):
            _said.add(why)
            logger.warning("fused_head is not used: %s; token logps come from chunked logits", why)
        return None
    dtype = _dtype(hidden, head.weight)
    with torch.autocast(hidden.device.type, enabled=False):
        return _logps(hidden.to(dtype), head.weight.to(dtype), targets, head.softcap)


def lacks(hidden: Tensor, head: LinearHead) -> str | None:
    """Why the kernel cannot be used for this head, in words, or None. A kernel that is there is first run once, forward
    and backward, and compared with plain logits in fp32."""
    if len(hidden) == 0 or not _on_gpu(hidden):
        return "the fused head needs tokens on a GPU"
    if _dtype(hidden, head.weight) not in (torch.float16, torch.bfloat16):
        return "the fused head computes in half precision alone"
    if head.bias is not None or head.scale != 1.0:
        return "the fused head knows no bias and no factor"
    try:
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    except Exception as error:  # a foreign package may fail in any way
        return f"cut_cross_entropy cannot be imported ({type(error).__name__}: {error})"
    missing = _NEEDED - set(inspect.signature(function).parameters)
    if missing:
        return f"this version of cut_cross_entropy does not know {', '.join(sorted(missing))}"
    key = str(hidden.device), _dtype(hidden, head.weight), head.weight.shape[1], head.softcap
    if key not in _proofs:
        try:
            _proofs[key] = _trouble(*key)
        except Exception as error:
            _proofs[key] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if _proofs[key] is not None:
            logger.warning("the fused head is not used: %s", _proofs[key])
    return _proofs[key]


def _on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _logps(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    settings = {"softcap": softcap, "reduction": "none", "filter_eps": None, "accum_e_fp32": True, "accum_c_fp32": True}
    return -linear_cross_entropy(hidden, weight, targets, **settings).float()


def _trouble(device: str, dtype: torch.dtype, size: int, softcap: float | None) -> str | None:
    """What is wrong with values and gradients on a few random numbers, in words, or None."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, size, generator=generator).to(device, dtype) for n in (150, 1000))
    weight = weight / size**0.5
    targets = torch.randint(0, 1000, (150,), generator=generator).to(device)
    factors = torch.randn(150, generator=generator).to(device)

    def exact(h: Tensor, w: Tensor) -> Tensor:
        return LinearHead(w, softcap=softcap).logits(h).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def both(function: Any, *inputs: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        logps = function(*leaves)
        return [logps.detach(), *torch.autograd.grad((logps * factors).sum(), leaves)]

    own_tensors = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(torch.device(device).type, enabled=False), own_tensors:
        found = both(lambda h, w: _logps(h, w, targets, softcap), hidden, weight)
        truth = both(exact, hidden.float(), weight.float())
    for what, ours, right in zip(("logps", "gradient of the hidden states", "gradient of the weight"), found, truth, strict=True):
        difference, largest = float((ours.float() - right).abs().max()), float(right.abs().max())
        if not difference <= _TOLERANCE * largest:
            return f"its {what} differ by {difference:.2g} at a largest value of {largest:.2g}"
    return None
