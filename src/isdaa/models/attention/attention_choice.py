"""Which attention a model uses over a packed row, and the proof that a fast one computes what the slow one does.

"sdpa" works everywhere. "blocks" (`query_blocks`) is for a CPU. "varlen" and "flex" (`kernels`) are for GPUs, and foreign code
on a machine that nobody has tested. Each of the three is run once, forward and backward, for every kind of tensors (device,
dtype, heads, …) and compared with a plain matrix of scores in fp32, before it is used. What fails is not used; `forward.prepare`
compares the whole model's logps, too. "auto" is, on a GPU, "varlen", else "flex", else "sdpa"; on a CPU "blocks" unless rows are
very short or very long or the model is narrow, else "sdpa".

Why this order on a GPU (reasoned, not measured): at lengths of preference data attention is a few per cent of the arithmetic, and
what costs is the number of calls, of which "sdpa" makes several a response in every layer. The two others make one.
FlashAttention's kernels need no compilation, and waste less on short responses than blocks of 128 do.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from isdaa.errors import UserError, nearest
from isdaa.models.attention import cpu_attention, gpu_attention
from isdaa.models.attention.layout import Layout
from isdaa.models.device_kind import kind_of

AUTO, SDPA, BLOCKS, FLEX, VARLEN = "auto", "sdpa", "blocks", "flex", "varlen"
NAMES = (AUTO, SDPA, BLOCKS, FLEX, VARLEN)
FAST = {"cuda": (VARLEN, FLEX), "cpu": (BLOCKS,)}
_ATTRIBUTE = "_isdaa_attention"

# Of the largest value: generous for bf16 and TF32, and far below what a wrong mask changes.
_TOLERANCE = 0.03

logger = logging.getLogger(__name__)
proofs: dict[tuple[Any, ...], bool] = {}
said_once: set[str] = set()

Attention = Callable[[Tensor, Tensor, Tensor, Layout], Tensor]


def choose_attention(model: nn.Module, name: str) -> None:
    """Sets the attention over packed rows of a model, one of `NAMES`. It is kept in the model, so that a layer that is
    computed again under gradient checkpointing does the same again.

    Raises:
        UserError: an unknown name.
    """
    if name not in NAMES:
        raise UserError(f"attention {name!r}{nearest(name, NAMES)}: one of {', '.join(NAMES)}")
    for module in model.modules():
        setattr(module, _ATTRIBUTE, name)


def fast_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    blocks: bool = True,
) -> tuple[str, Attention] | None:
    """Name and function of the fast attention to use in a layer, or None where that is "sdpa".

    blocks: whether "auto" may take blocks of queries on a CPU, at the lengths at hand."""
    wanted = getattr(module, _ATTRIBUTE, AUTO)
    names: tuple[str, ...] = () if wanted == SDPA else (wanted,)
    if wanted == AUTO:
        place = kind_of(query.device)  # what stands for a GPU is rehearsed with "sdpa": no kernel of a GPU runs on it
        names = () if place != query.device.type or (place == "cpu" and not blocks) else FAST.get(place, ())
    settings: dict[str, Any] = {"scaling": scaling, "window": window, "softcap": softcap}
    kind = str(query.device), query.dtype, query.shape[1], key.shape[1], query.shape[3]
    for name in names:
        lack: str | None
        if dropout > 0:
            lack = "it knows no dropout"
        elif name == BLOCKS:
            lack = cpu_attention.lacks(query, window, softcap)
        else:
            lack = gpu_attention.lacks(name, query, key, softcap)
        if lack is None:
            # Tensors without numbers (`preview.fake_step`) cannot prove anything, and ours needs it least.
            if (name == BLOCKS and isinstance(query, FakeTensor)) or proved(name, *kind, **settings):
                return name, _bound(name, settings)
        elif wanted != AUTO and lack not in said_once:
            said_once.add(lack)
            logger.warning("attention by %s is not used: %s", name, lack)
    return None


def _bound(name: str, settings: dict[str, Any]) -> Attention:
    if name == BLOCKS:
        return lambda query, key, value, layout: cpu_attention.attend_blocks(query, key, value, layout, settings["scaling"])
    if name == FLEX:
        return lambda query, key, value, layout: gpu_attention.attend_flex(query, key, value, layout, **settings)
    kernel = gpu_attention.varlen_kernel(settings["softcap"])
    assert kernel is not None
    return lambda query, key, value, layout: gpu_attention.attend_varlen(query, key, value, layout, kernel=kernel, **settings)


@torch.compiler.assume_constant_result
def proved(
    name: str,
    device: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    size: int,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> bool:
    short = None if window is None else 9  # its kernel does not depend on how long it is
    key = (name, device, dtype, heads, kv_heads, size, scaling, short, softcap)
    if key not in proofs:
        try:
            trouble = _trouble(*key)
        except Exception as error:  # a kernel that does not compile, or does not run here
            trouble = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if trouble is not None:
            logger.warning("attention by %s is not used on %s: %s", name, device, trouble)
        proofs[key] = trouble is None
    return proofs[key]


def _trouble(
    name: str,
    device: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    size: int,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> str | None:
    """What is wrong with an attention's values and gradients on a small layout of its own, in words, or None."""
    lengths = ([150, 30, 1], [70, 0, 5, 40, 3, 20, 9], [0, 0, 0, 0, 1, 2, 2], [0], [2])
    layout = Layout(*(torch.tensor(part) for part in lengths))
    settings: dict[str, Any] = {"scaling": scaling, "window": window, "softcap": softcap}
    generator = torch.Generator().manual_seed(0)
    with _of_its_own(torch.device(device).type):
        shapes = [(1, h, layout.tokens, size) for h in (heads, kv_heads, kv_heads)] + [(1, layout.tokens, heads, size)]
        *inputs, weights = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        found = _with_gradients(_bound(name, settings), inputs, weights, layout)
        dense = functools.partial(dense_attention, **settings)
        truth = _with_gradients(dense, [x.to(exact) for x in inputs], weights.to(exact), layout)
    for what, ours, right in zip(("output", "query", "key", "value"), found, truth, strict=True):
        difference, largest = float((ours.to(exact) - right).abs().max()), float(right.abs().max())
        if not difference <= _TOLERANCE * largest:  # so written that nan is trouble
            of = what if what == "output" else f"gradient of the {what}"
            return f"its {of} differs from that of plain attention by {difference:.2g} at a largest value of {largest:.2g}"
    return None


@contextmanager
def _of_its_own(device: str) -> Iterator[None]:
    """Gradients, whatever is around: no_grad, autocast, or gradient checkpointing (which watches what is saved)."""
    own_tensors = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False), own_tensors:
        yield


def _with_gradients(attend: Attention, inputs: list[Tensor], weights: Tensor, layout: Layout) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    query, key, value = leaves
    out = attend(query, key, value, layout)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """All scores at once: slow and obvious."""
    group = torch.arange(len(layout.prompt_lengths)).repeat_interleave(layout.group_lengths)
    owner, distance = layout.owner, layout.position_ids[:, None] - layout.position_ids
    visible = (group[:, None] == group) & ((owner == -1) | (owner[:, None] == owner)) & (distance >= 0)
    visible &= distance < (layout.tokens if window is None else window)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    return (scores.masked_fill(~visible.to(query.device), float("-inf")).softmax(-1) @ value).transpose(1, 2)
