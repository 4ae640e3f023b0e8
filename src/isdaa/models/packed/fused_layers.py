"""Norms and gated units of a model in fewer passes over memory, on the CPU: the same values and gradients.

Between the matrix products of a decoder layer lie element-wise operations, which autograd takes one by one: a pass over
memory and a saved tensor for each. RMSNorm and the SiLU-gated unit are written here as one operation each, which saves
its inputs alone. `install` puts them into those modules of a model that compute exactly this (each kind is tried on
random numbers against the module's own forward, gradients included) and leaves all others alone. On a GPU this is the
work of a compiler.

Legend: T tokens, D features.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_DTYPES = (torch.float32, torch.float64)
# Largest value that enters a gate while a kind of module is tried, besides that of plain random numbers: a model may cut gates
# off at some value, often 7 or 10, which small ones do not reach.
_REACHES = (100.0, 10_000.0)


def install(model: nn.Module, prove: bool = True) -> int:
    """Puts the fused operations into a model on the CPU, in place; returns the number of modules that have them now.

    prove: try each kind on random numbers first. A model without numbers (`preview.fake_step`) can only be trusted.
    """
    fits: dict[Any, bool] = {}
    count = 0
    for module in model.modules():
        forward = _fused_forward(module)
        own = getattr(module.__dict__.get("forward"), "__func__", None)
        if forward is None or ("forward" in module.__dict__ and own not in (forward, type(module).forward)):
            continue  # somebody else's forward stands there
        key = (type(module), forward, *_settings(module))
        if key not in fits:
            fits[key] = not prove or _same(module, forward)
        if fits[key]:
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]
            count += 1
    return count


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    """Numbers and flags by which modules of one class may differ."""
    return sorted((k, v) for k, v in vars(module).items() if isinstance(v, int | float) and k != "training")


def _fused_forward(module: nn.Module) -> Any:
    """The forward that may replace the module's own, or None."""
    weights = list(module.parameters(recurse=False))
    name = type(module).__name__
    if name.endswith("RMSNorm") and hasattr(module, "variance_epsilon") and len(weights) == 1:
        (weight,) = weights
        plain = weight.ndim == 1 and weight.dtype in _DTYPES and weight.device.type == "cpu"
        return _norm_forward if plain and getattr(module, "weight", None) is weight else None
    parts = [getattr(module, part, None) for part in ("gate_proj", "up_proj", "down_proj")]
    if name.endswith("MLP") and not weights and all(isinstance(part, nn.Module) for part in parts):
        activation = getattr(module, "act_fn", None)
        silu = activation is F.silu or isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
        return _gated_forward if silu else None
    return None


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    if hidden_states.dtype != self.weight.dtype or hidden_states.device.type != "cpu":
        return type(self).forward(self, hidden_states)
    return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    if x.dtype not in _DTYPES or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return type(self).forward(self, x)  # which may care for precision in a way of its own
    return self.down_proj(_Gated.apply(self.gate_proj(x), self.up_proj(x)))


# So that a pickle of a bound method finds it: a revived module has its class's forward.
_norm_forward.__name__ = _gated_forward.__name__ = "forward"


def _same(module: nn.Module, forward: Any) -> bool:
    """Whether `forward` gives the values and gradients of the module's own on random numbers."""
    generator = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(module)
    layer: Any = twin if forward is _norm_forward else twin.gate_proj
    width = layer.weight.shape[0] if forward is _norm_forward else getattr(layer, "in_features", 0)
    try:
        parameter = next(twin.parameters())
        x = torch.randn(2, 3, width, generator=generator).to(parameter.dtype)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            largest = float((x if forward is _norm_forward else layer(x)).abs().max())
        return all(_same_on(twin, forward, x * factor) for factor in (1.0, *(reach / (largest or 1.0) for reach in _REACHES)))
    except Exception:  # a foreign module that does something else: it keeps its own forward
        return False


def _same_on(module: nn.Module, forward: Any, x: Tensor) -> bool:
    """Whether both forwards of a module give the same for one input."""
    x = x.requires_grad_()
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    found = []
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for way in (type(module).forward, forward):
            out = way(module, x)
            mix = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
            found.append([out.detach(), *torch.autograd.grad((out * mix).sum(), leaves)])
    tolerance = 1e-10 if x.dtype == torch.float64 else 1e-5
    return all(float((a - b).abs().max()) <= tolerance * float(b.abs().max()) for b, a in zip(*found, strict=True))


class _RMSNorm(torch.autograd.Function):
    """y = w · x / √(mean(x²) + ε) over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, scale = ctx.saved_tensors
        grad = grads[0]
        normed = x * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -2).sum(0)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        # dx = s·(g·w − n·mean(n·g·w)), with s the scale and n = s·x.
        direction = grad * weight
        mean = torch.linalg.vecdot(direction, normed).div_(-x.shape[-1])
        return direction.addcmul_(normed, mean[..., None]).mul_(scale), grad_weight, None


class _Gated(torch.autograd.Function):
    """silu(gate) · up (SwiGLU; Shazeer 2020, arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        gate, up = ctx.saved_tensors
        grad = grads[0]
        grad_up = F.silu(gate).mul_(grad) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_up
        return torch.ops.aten.silu_backward(grad * up, gate), grad_up
