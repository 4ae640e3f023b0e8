"""The proof, on one pair, that a model's shared-prefix logps are those of two plain rows of its own logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isdaa.models.attention import shared_prefix
from isdaa.models.attention.layout import Layout
from isdaa.models.packed.logprobs import LinearHead, linear_head, text_config
from isdaa.models.packed.patched_forward import inner_model, own_head

# A probe is a forward pass; above this many tokens it would no longer be a small one. Mistral's window (4096) fits.
LONGEST = 4352
_SHORT = 48

# Tolerated |difference| of a token logp, relative to the largest |logp|; more where the model's own rounding noise is
# larger (deep models, TF32), but never without bound: a model that is all noise is not computed rightly.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
_MOST_NOISE = 30


@dataclass
class Probe:
    """One pair and the truth about it.

    ids, layout: the packed row. truth: (N,) token logps of two plain rows of the model's own logits. tolerance: what
    rounding may change. unprobed_window: the shortest attention window that the rows do not exceed, or None.
    """

    ids: Tensor
    layout: Layout
    truth: Tensor
    tolerance: float
    unprobed_window: int | None

    def trouble(self, model: nn.Module, token_logps: Callable[[Tensor, Layout], Tensor]) -> str | None:
        """What is wrong with `token_logps(ids, layout)` of an installed model, in words, or None."""
        try:
            logps = token_logps(self.ids, self.layout)
            changed = self._changed(model)
        except Exception as error:  # whatever a foreign model's code raises is a reason to fall back, and is reported
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        difference = float((logps - self.truth).abs().max())
        if not difference <= self.tolerance:  # so written that nan is trouble
            return f"a token logp differs by {difference:.2g}, tolerance {self.tolerance:.2g}"
        return None if changed <= self.tolerance else f"plain calls changed: a logit differs by {changed:.2g}"

    def _changed(self, model: nn.Module) -> float:
        """Largest change of a logit of a plain call (evaluation, sampling) by the installation."""
        row = self.ids[None, : min(_SHORT, self.layout.longest)]
        installed = _last_logits(model, row, 1)
        with shared_prefix.plain_attention(model):
            return float((installed - _last_logits(model, row, 1)).abs().max())


def make_probe(model: nn.Module, longest_row: int | None) -> Probe:
    """The probe of a model in evaluation mode, wrapped or not; call it without gradients."""
    inner = inner_model(model)
    length, unprobed_window = row_length(inner, longest_row)
    chosen, rejected = max(1, min(9, length - 2)), max(1, min(7, length - 3))
    prompt = max(1, length - chosen)
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(text_config(inner).vocab_size)
    ids = torch.randint(0, vocabulary, (prompt + chosen + rejected,), generator=generator)
    ids = ids.to(next(inner.parameters()).device)
    layout = Layout.of_pairs(*(torch.tensor([n]) for n in (prompt, chosen, rejected)))
    truth, noise = _plain_logps(model, ids, layout)
    dtypes = {p.dtype for p in inner.parameters() if p.is_floating_point()} | _computed_dtypes(model, ids)
    relative = max(TOLERANCE.get(dtype, max(TOLERANCE.values())) for dtype in dtypes)
    base = relative * float(truth.abs().max())
    return Probe(ids, layout, truth, min(max(base, 4 * noise), _MOST_NOISE * base), unprobed_window)


def _computed_dtypes(model: nn.Module, ids: Tensor) -> set[torch.dtype]:
    """Dtypes of what the linear layers give: a wrapper's autocast computes in another one than the weights have."""
    found: set[torch.dtype] = set()

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            found.add(output.dtype)

    hooks = [m.register_forward_hook(note) for m in inner_model(model).modules() if isinstance(m, nn.Linear)]
    try:
        with shared_prefix.plain_attention(model):
            model(input_ids=ids[None, : min(_SHORT, len(ids))])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def head_trouble(model: nn.Module) -> str | None:
    """Compares the linear head of an inner model with its own forward, at logits large enough for a soft cap to show;
    what is wrong in words, or None."""
    head = linear_head(model)
    if head is None:
        return "the head is no plain linear layer"
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, head.weight.shape[1], generator=generator).to(head.weight)
    largest = LinearHead(head.weight).logits(hidden).abs().max().clamp(min=1e-12)
    hidden = hidden * (40 / largest).to(hidden.dtype)
    try:
        own = own_head(model).logits(hidden)
    except Exception:
        return None  # there is nothing to compare with, or to fall back to; the probe has the last word
    difference = float((own - head.logits(hidden)).abs().max() / own.abs().max())
    if difference <= TOLERANCE.get(head.weight.dtype, max(TOLERANCE.values())):
        return None
    return f"the linear head differs from the model's own logits by {difference:.2g}"


def row_length(model: nn.Module, longest_row: int | None) -> tuple[int, int | None]:
    """(tokens of the longer row of the probe, the window that it does not exceed or None)."""
    most = getattr(text_config(model), "max_position_embeddings", None)
    most = most if isinstance(most, int) and most > 0 else None
    limit = min(n for n in (LONGEST, most, longest_row and max(longest_row, _SHORT)) if n)
    # A window that no row can exceed needs no proof.
    windows = sorted(w for w in _windows(model) if w < min(longest_row or w + 1, most or w + 1))
    # 13 tokens more than a window: all of both responses has something that it must not see.
    wanted = max([_SHORT, *(w + 13 for w in windows)])
    if wanted <= limit:
        return wanted, None
    return limit, next((w for w in windows if w + 13 > limit), None)


def _windows(model: nn.Module) -> set[int]:
    names = ("sliding_window", "window_size", "attention_chunk_size", "local_attention")
    found = {getattr(source, name, None) for source in _sources(model) for name in names}
    return {w for w in found if isinstance(w, int) and not isinstance(w, bool) and w > 0}


def counted_positions(model: nn.Module) -> int | None:
    """Tokens of a packed row up to which it makes no difference that layers without rotary positions count tokens by
    themselves (Llama 4's temperature tuning; no probe is as long), or None where none does."""
    found = [
        source.floor_scale
        for source in _sources(model)
        if getattr(source, "attn_temperature_tuning", False) and getattr(source, "floor_scale", None)
    ]
    return min(found) - 1 if found else None


def switching_length(model: nn.Module) -> int | None:
    """Tokens of a row beyond which rotary positions of the whole batch are others ("longrope"), or None."""
    rope = getattr(text_config(model), "rope_parameters", None)
    if not isinstance(rope, dict) or rope.get("rope_type") != "longrope":
        return None
    length = rope.get("original_max_position_embeddings")
    return length if isinstance(length, int) else None


def _sources(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if "config" in module.__dict__:
            yield module.config
        if "attention" in type(module).__name__.lower():
            yield module


def _plain_logps(model: nn.Module, ids: Tensor, layout: Layout) -> tuple[Tensor, float]:
    """(N,) token logps of two plain rows of the model's own logits, each alone; and how much they change when the rows
    are computed together, a measure of the rounding noise of this model."""
    ((p, (c, r)),) = layout.groups
    both = min(c, r)
    rows = [(ids[: p + c], c), (torch.cat([ids[:p], ids[p + c :]]), r)]
    with shared_prefix.plain_attention(model):
        alone = torch.cat([_row_logps(_last_logits(model, row[None], n)[0], row) for row, n in rows])
        cut = torch.stack([row[: p + both] for row, _ in rows])
        together = torch.cat([_row_logps(z, row) for z, row in zip(_last_logits(model, cut, both), cut, strict=True)])
    return alone, float((torch.cat([alone[:both], alone[c : c + both]]) - together).abs().max())


def _last_logits(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """(rows, count + 1, V) logits of the last positions, fp32 at least. All logits of a long row are made only where
    the model cannot do less."""
    can_keep = "logits_to_keep" in inspect.signature(inner_model(model).forward).parameters
    kwargs = {"logits_to_keep": count + 1} if can_keep else {}
    logits: Tensor = model(input_ids=ids, **kwargs).logits[:, -count - 1 :]
    return logits if logits.dtype == torch.float64 else logits.float()


def _row_logps(logits: Tensor, row: Tensor) -> Tensor:
    """(n,) logps of the last n tokens of a row from its last (n + 1, V) logits."""
    return torch.log_softmax(logits[:-1], -1).gather(1, row[1 - len(logits) :, None])[:, 0]
