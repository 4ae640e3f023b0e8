"""Token logps from hidden states, only where a response token is predicted, in chunks: full logits never exist.

Legend: N response tokens, D hidden, V vocabulary. Every log-softmax is computed in fp32 (float64 stays float64), also
inside an autocast region.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary

from isdaa.errors import UserError
from isdaa.models.device_kind import kind_of
from isdaa.models.packed.tied_embeddings import Tie

# Elements of one chunk of logits: 32 MiB in fp32 on a CPU, where larger ones fall out of the cache; a GPU needs more
# rows to be busy.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}
LEAST_ROWS = 32

# Up to this size, (N, V) directions stay from the forward to the backward pass of a head that is trained; beyond, a
# fourth product is cheaper than the memory. On a GPU memory is what batches are made of.
KEPT_BYTES = {"cpu": 3 * 2**26}


@dataclass(frozen=True)
class LinearHead:
    """A head that is a matrix product and, after it, at most a factor and a soft cap.

    logits = cap·tanh(z / cap) with z = scale·(h Wᵀ + b); `softcap` None means logits = z. Scale: Cohere multiplies by
    ``logit_scale``, Granite divides by ``logits_scaling``; cap: Gemma's ``final_logit_softcapping``.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.weight.shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) logits of (n, D) hidden states, fp32 at least."""
        dtype = _compute_dtype(hidden, self.weight)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            product = F.linear(hidden.to(dtype), self.weight.to(dtype), bias)
        logits = (product if product.dtype == torch.float64 else product.float()) * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


@dataclass(frozen=True)
class OwnHead:
    """A head of any kind: `function` maps (n, D) hidden states to (n, V) logits by the model's own code."""

    function: Callable[[Tensor], Tensor]
    vocabulary: int

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) logits of (n, D) hidden states, fp32 at least."""
        logits = self.function(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()


Head = LinearHead | OwnHead


def chunk_rows(head: Head, device: torch.device) -> int:
    """Rows of hidden states whose logits are computed at a time."""
    return max(LEAST_ROWS, CHUNK_ELEMENTS.get(kind_of(device), 2**27) // head.vocabulary)


def token_logps(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    chunk: int | None = None,
    with_wpo: bool = False,
    tie: Tie | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log π(target | hidden) per token, with gradients to `hidden` and to the head's parameters.

    Args:
        hidden: (N, D) hidden states as the model's decoder returns them.
        head: the model's head.
        targets: (N,) token ids.
        chunk: rows whose logits exist at a time; None chooses by vocabulary and device.
        tie: takes the gradient of a linear head's weight, which then comes with that of `tied.embed`.
        with_wpo: also return the (N,) term log π(y_t) − log Σ_v π(v)², without gradient (WPO, arXiv 2406.11827).

    Returns:
        (N,) logps in fp32 (float64 for a float64 model), and the WPO term or None.

    Raises:
        ValueError: shapes that do not fit.
    """
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(f"hidden (N, D) and targets (N,) are needed, not {tuple(hidden.shape)} and {tuple(targets.shape)}")
    chunk = chunk or chunk_rows(head, hidden.device)
    if isinstance(head, LinearHead):
        settings = (chunk, head.scale, head.softcap, with_wpo, torch.is_grad_enabled(), tie)
        logps, wpo = _LinearLogps.apply(hidden, head.weight, head.bias, targets, settings)  # type: ignore[no-untyped-call]
        return logps, wpo if with_wpo else None
    logps_parts, wpo_parts = [], []
    for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        if torch.is_grad_enabled():
            logp, wpo = checkpoint(_own_logps, head, h, y, use_reentrant=False, preserve_rng_state=False)
        else:
            logp, wpo = _own_logps(head, h, y)
        logps_parts.append(logp)
        wpo_parts.append(wpo)
    if not logps_parts:
        logps_parts = wpo_parts = [hidden.new_zeros(0, dtype=torch.float32)]
    return torch.cat(logps_parts), torch.cat(wpo_parts) if with_wpo else None


def _own_logps(head: OwnHead, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    all_logps = torch.log_softmax(head.logits(hidden), -1)
    logps = all_logps.gather(1, targets[:, None])[:, 0]
    with torch.no_grad():
        return logps, logps.detach() - torch.logsumexp(2 * all_logps, -1)


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


# A weight's copy in half precision, (V, D), is needed within one call and never after it: the next call, and the product that is
# the weight's gradient, find its memory warm. Fresh memory of this size takes ten times as long to fill.
_rooms: MutableMapping[Tensor, Tensor] = WeakIdKeyDictionary()


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.dtype == dtype or kind_of(weight.device) != "cpu" or type(weight.data) is not Tensor:
        return weight.to(dtype)
    room = _rooms.get(weight)
    if room is None or room.dtype != dtype or room.shape != weight.shape:
        room = _rooms[weight] = torch.empty_like(weight, dtype=dtype, requires_grad=False)
    return room.copy_(weight.detach())


class Chunks:
    """Logits of one chunk of hidden states after another, in the same memory: fresh pages cost as much as the product
    itself where V is large. What `fill` returns is overwritten by the next call; or, in the weight's dtype of fp32 or
    more, it lies in `kept` (N, V), where it stays."""

    def __init__(self, rows: int, head: LinearHead, kept: Tensor | None = None) -> None:
        self.head = head
        self.in_place = head.weight.dtype in (torch.float32, torch.float64)
        self.kept = kept if self.in_place else None
        self.product = head.weight.new_empty(0 if self.kept is not None else rows, head.vocabulary)
        self.logits = self.product if self.in_place else self.product.new_empty(self.product.shape, dtype=torch.float32)

    def fill(self, hidden: Tensor, start: int = 0) -> Tensor:
        """(n, V) logits, fp32 at least, of (n, D) hidden states in the weight's dtype: rows start … start + n − 1 of all."""
        n, head = len(hidden), self.head
        product = self.product[:n] if self.kept is None else self.kept[start : start + n]
        logits = product if self.in_place else self.logits[:n]
        if head.bias is None:
            torch.mm(hidden, head.weight.T, out=product)
        else:
            torch.addmm(head.bias, hidden, head.weight.T, out=product)
        if not self.in_place:
            logits.copy_(product)
        if head.scale != 1.0:
            logits *= head.scale
        return logits if head.softcap is None else logits.div_(head.softcap).tanh_().mul_(head.softcap)


class _LinearLogps(torch.autograd.Function):
    """logp_t = z_t[y_t] − logsumexp(z_t) over chunks of t.

    The direction ∂logp_t/∂z_t = onehot(y_t) − softmax(z_t), (N, V), does not depend on the loss, which only scales its
    rows: what follows from it is taken in the forward pass, where the chunk is at hand. That is its product with W, for
    the hidden states; and for the head's parameters the direction itself, kept where it is small (`KEPT_BYTES`).
    Otherwise the logits of a chunk are computed again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        chunk, scale, softcap, with_wpo, with_grad, _ = settings
        dtype = _compute_dtype(hidden, weight)
        h, w = hidden.to(dtype), _cast(weight, dtype)
        head = LinearHead(w, None if bias is None else bias.to(dtype), scale, softcap)
        logps = torch.empty(len(targets), dtype=_at_least_fp32(dtype), device=hidden.device)
        normalisers = torch.empty_like(logps)
        wpo = torch.empty_like(logps) if with_wpo else logps.new_empty(0)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        trains_head = needs_weight or needs_bias
        small = len(h) * len(w) * dtype.itemsize <= KEPT_BYTES.get(kind_of(hidden.device), 0)
        # Under no_grad a weight still says that it requires one.
        ahead = with_grad and (needs_hidden or trains_head) and (small or not trains_head)
        kept = h.new_empty(len(h), len(w)) if ahead and trains_head else None
        hidden_direction = torch.empty_like(h) if ahead and needs_hidden else None
        chunks = Chunks(min(chunk, len(h)), head, kept)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(targets), chunk):
                rows = slice(start, start + chunk)
                z = chunks.fill(h[rows], start)
                y = targets[rows, None]
                picked = z.gather(1, y)[:, 0]
                slope = _softcap_slope(z, head) if ahead else None
                top = z.amax(-1)
                e = z.sub_(top[:, None]).exp_()
                total = e.sum(-1)
                normalisers[rows] = total.log() + top
                logps[rows] = picked - normalisers[rows]
                if with_wpo:
                    # log Σ p² = log Σ e² − 2 log Σ e; the norm needs no second (n, V) tensor.
                    wpo[rows] = logps[rows] - 2 * (torch.linalg.vector_norm(e, dim=-1).log() - total.log())
                if ahead:
                    d = e.mul_(-1 / total[:, None])
                    d.scatter_add_(1, y, torch.ones_like(d[:, :1]))
                    d = _through_head(d, slope, head)
                    # In place it lies there already.
                    d = kept[rows].copy_(d) if kept is not None and chunks.kept is None else d.to(dtype)
                    if hidden_direction is not None:
                        torch.mm(d, w, out=hidden_direction[rows])
        ctx.settings, ctx.ahead, ctx.dtype = settings, ahead, dtype
        ctx.room = None if w is weight or weight not in _rooms else ref(w)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        if ahead:
            ctx.save_for_backward(hidden if needs_weight else None, kept, hidden_direction)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        ctx.mark_non_differentiable(wpo)
        return logps, wpo

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        found = (_scaled if ctx.ahead else _recomputed)(ctx, grads[0])
        hidden, weight, bias = (None if g is None else g.to(t) for g, t in zip(found, ctx.dtypes, strict=True))
        tie: Tie | None = ctx.settings[-1]
        if tie is not None:
            tie.head_gradient, weight = weight, None
        return hidden, weight, bias, None, None


def _scaled(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias from directions that the forward pass took; `grad` is (N,)."""
    hidden, direction, hidden_direction = ctx.saved_tensors
    into = ctx.room() if ctx.room is not None else None
    _, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    with torch.autocast(grad.device.type, enabled=False):  # the loss's slope in its own dtype: a response's tokens share it
        grad_hidden = None if hidden_direction is None else hidden_direction * grad[:, None]
        grad_weight = torch.mm(direction.T, (hidden * grad[:, None]).to(ctx.dtype), out=into) if needs_weight else None
        grad_bias = direction.T.to(grad.dtype) @ grad if needs_bias else None
    return grad_hidden, grad_weight, grad_bias


def _recomputed(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The same where the direction was not kept: the logits of each chunk once more."""
    hidden, weight, bias, targets, normalisers = ctx.saved_tensors
    chunk, scale, softcap, *_ = ctx.settings
    h, w = hidden.to(ctx.dtype), _cast(weight, ctx.dtype)
    head = LinearHead(w, None if bias is None else bias.to(ctx.dtype), scale, softcap)
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_hidden = torch.empty_like(h) if needs_hidden else None
    chunks = Chunks(min(chunk, len(h)), head)
    # Sums over chunks are kept in fp32, like a single product would keep them.
    sums = torch.float32 if ctx.dtype in (torch.bfloat16, torch.float16) and len(h) > chunk else ctx.dtype
    grad_weight = torch.empty_like(w, dtype=sums) if needs_weight else None
    if grad_weight is not None and (sums != ctx.dtype or len(h) == 0):
        grad_weight.zero_()
    grad_bias = normalisers.new_zeros(len(w)) if needs_bias else None
    with torch.autocast(h.device.type, enabled=False):
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            z = chunks.fill(h[rows])
            slope = _softcap_slope(z, head)
            g = grad[rows, None]
            d = z.sub_(normalisers[rows, None]).exp_().mul_(-g)
            d.scatter_add_(1, targets[rows, None], g)
            d = _through_head(d, slope, head)
            if grad_bias is not None:
                grad_bias += d.sum(0)
            d = d.to(ctx.dtype)
            if grad_hidden is not None:
                torch.mm(d, w, out=grad_hidden[rows])
            if grad_weight is not None:
                if sums == ctx.dtype:
                    grad_weight.addmm_(d.T, h[rows], beta=float(start > 0))  # β = 0 overwrites empty memory
                else:
                    grad_weight += d.T @ h[rows]
    return grad_hidden, grad_weight, grad_bias


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _softcap_slope(logits: Tensor, head: LinearHead) -> Tensor | None:
    """d cap·tanh(z / cap) / dz = 1 − (logits / cap)²."""
    return None if head.softcap is None else 1 - (logits / head.softcap).square_()


def _through_head(d: Tensor, slope: Tensor | None, head: LinearHead) -> Tensor:
    if slope is not None:
        d = d.mul_(slope)
    return d if head.scale == 1.0 else d.mul_(head.scale)


@torch.no_grad()
def full_vocabulary_kl(
    policy_hidden: Tensor, policy_head: Head, reference_hidden: Tensor, reference_head: Head, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(π‖π_ref) of the two next-token distributions at every position, over the whole vocabulary, in chunks.

    Args:
        policy_hidden, reference_hidden: (N, D) hidden states of the two models (their D may differ, not their V).
        targets: (N,) token ids.

    Returns:
        (N,) KL in nats, fp32, never negative (rounding below 0 is cut); (N,) policy logps; (N,) reference logps.

    Raises:
        UserError: the vocabularies differ in size.
    """
    if policy_head.vocabulary != reference_head.vocabulary:
        raise UserError(
            f"policy and reference have vocabularies of {policy_head.vocabulary} and {reference_head.vocabulary}"
            " tokens; a KL needs one vocabulary"
        )
    kls, policies, references = [], [], []
    rows = chunk_rows(policy_head, policy_hidden.device)
    for h, h_ref, y in zip(policy_hidden.split(rows), reference_hidden.split(rows), targets.split(rows), strict=True):
        policy = torch.log_softmax(policy_head.logits(h), -1)
        reference = torch.log_softmax(reference_head.logits(h_ref), -1).to(policy.device)
        policies.append(policy.gather(1, y[:, None])[:, 0])
        references.append(reference.gather(1, y[:, None])[:, 0])
        kls.append((policy.exp() * reference.neg_().add_(policy)).sum(-1).clamp_min_(0))
    if not kls:
        return (targets.new_zeros(0, dtype=torch.float32),) * 3
    return torch.cat(kls), torch.cat(policies), torch.cat(references)


def linear_head(model: nn.Module) -> LinearHead | None:
    """The head of a causal language model as a `LinearHead`, read from its output embedding and its config, or None
    where it is something else (a LoRA adapter on the head, sharded parameters, …). Whether the config's names mean what
    they seem to mean is for `forward.prepare` to check against the model's own logits."""
    get_layer: Any = getattr(model, "get_output_embeddings", None)
    layer = get_layer() if get_layer else None
    if type(layer) is not nn.Linear:
        return None
    for parameter in (layer.weight, layer.bias):
        # Parameters that DeepSpeed or FSDP2 keep in pieces are whole only inside the layer's own forward. Fake tensors, on which
        # a step is only planned (`preview.fake_step`), are whole.
        if parameter is not None and (hasattr(parameter, "ds_id") or type(parameter.data) not in (Tensor, FakeTensor)):
            return None
    config = text_config(model)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return LinearHead(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def text_config(model: nn.Module) -> Any:
    """The config of the language part of a transformers model."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
