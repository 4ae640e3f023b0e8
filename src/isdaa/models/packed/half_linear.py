"""Linear layers in bf16 on a CPU, from fp32 weights: what autocast does, with fewer copies.

Autocast casts the input of every linear layer anew, so that one norm's output is copied and kept three times for q, k and v. Here
layers that read the same tensor share its cast, and the backward pass casts a weight again instead of keeping its copy: for
a weight that is read once, a copy is memory held for nothing.

`install` gives plain linear layers a forward that does so where autocast to bf16 is on; every other call is the layer's own.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from isdaa.models.device_kind import kind_of

HALF = torch.bfloat16


def install(model: nn.Module) -> None:
    """Puts the forward into the plain linear layers of a model, in place; the class, and so saving, stay as they are."""
    for module in model.modules():
        own = getattr(module.__dict__.get("forward"), "__func__", None)
        mine = "forward" not in module.__dict__ or own is nn.Linear.forward  # as unpickling leaves it
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and mine:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(self: nn.Linear, input: Tensor) -> Tensor:
    weight = self.weight
    half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == HALF
    if not half or torch.compiler.is_compiling() or not _ours(input, weight):
        return F.linear(input, weight, self.bias)
    return cast(Tensor, _Linear.apply(input, shared_cast(input), weight, self.bias))  # type: ignore[no-untyped-call]


_forward.__name__ = "forward"  # so that a pickle of a bound method finds it: a revived layer has its class's forward


def _ours(input: Tensor, weight: Tensor) -> bool:
    plain = type(weight.data) in (Tensor, FakeTensor) and not hasattr(weight, "ds_id")
    plain = plain and input.dtype in (torch.float32, HALF)
    return plain and kind_of(weight.device) == input.device.type == "cpu" and weight.dtype == torch.float32


_last: tuple[ReferenceType[Tensor], int, ReferenceType[Tensor]] | None = None


def shared_cast(x: Tensor) -> Tensor:
    """`x` in bf16, without gradient: the copy that the call before made, where that was of the same tensor."""
    global _last
    if x.dtype == HALF:
        return x.detach()
    if x.is_inference():  # it has no version that tells whether it was changed
        return x.to(HALF)
    last = _last  # another thread may put its own there meanwhile
    if last is not None and last[0]() is x and last[1] == x._version:
        known = last[2]()
        if known is not None:
            return known
    copy = x.detach().to(HALF)
    _last = (ref(x), x._version, ref(copy))
    return copy


class _Linear(torch.autograd.Function):
    """y = x·Wᵀ + b. Products in bf16; the weight's gradient in fp32, as its dtype asks."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, half: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(half if ctx.needs_input_grad[2] else None, weight)
        ctx.dtype, ctx.bias = input.dtype, None if bias is None else bias.dtype
        with torch.autocast("cpu", enabled=False):
            return F.linear(half, weight.to(HALF), None if bias is None else bias.to(HALF))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        half, weight = ctx.saved_tensors
        needs_input, _, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grads[0]
        rows = grad.flatten(0, -2)  # an expert that nobody chose has none
        with torch.autocast("cpu", enabled=False):
            above = (rows @ weight.to(HALF)).to(ctx.dtype).view(*grad.shape[:-1], weight.shape[1]) if needs_input else None
            of_weight = (rows.T @ half.flatten(0, -2)).to(weight.dtype) if needs_weight else None
            of_bias = rows.sum(0, dtype=torch.float32).to(ctx.bias) if needs_bias else None
        return above, None, of_weight, of_bias
