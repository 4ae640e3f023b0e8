"""The parts of Llama-like models, put together with as few calls as that takes: for sampling and evaluation on a CPU.

Per token of a small model, transformers' own forward spends more time on masks, rotary tables, copies and Python than on the
model. Here the model's own parts are read, biases, LoRA and quantised layers included. What a model of these architectures can
have and this code does not know, `lean_parts` refuses; and whoever uses the parts compares a few rows with the model first.

Legend: R rows, T tokens of a row, N positions that are asked for, C features of the model, D of a head, H heads, G heads of keys
and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isdaa.models.attention.shared_prefix import own_implementation
from isdaa.models.packed import fused_layers, last_layer
from isdaa.models.packed.patched_forward import inner_model

_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_ROTARY = ("default", "linear", "llama3", "yarn")  # others depend on the length of the row
_ATTENTION = ("sdpa", "eager")
_DTYPES = (torch.float32, torch.float64)
_TABLE = 256  # positions by which the rotary table grows
_SMALL_WEIGHTS = 2**20  # elements up to which weights are copied, to be one matrix product
_SHORT = 128  # queries up to which all scores exist at once: products and a softmax then beat the fused kernel

Part = Callable[[Tensor], Tensor]
Memory = Callable[[int], tuple[Tensor, Tensor]]


def lean_parts(model: nn.Module) -> Lean | None:
    """The parts of a model, or None where it is not of a kind that is known here, or is not run as it stands: on another
    device, in a precision that this code does not care for, with a window, or with code of its own in front of it."""
    inner: Any = inner_model(model)
    config = inner.config
    if getattr(config, "model_type", None) not in _ARCHITECTURES or not _only_lora(model) or not _transformers_own(inner):
        return None
    if own_implementation(config._attn_implementation) not in _ATTENTION or _windows(inner):
        return None
    if any(p.device.type != "cpu" or (p.is_floating_point() and p.dtype not in _DTYPES) for p in model.parameters()):
        return None
    if len({p.dtype for p in model.parameters() if p.is_floating_point()}) != 1:
        return None
    if torch.is_autocast_enabled("cpu") or _hooked(model) or inner.model.rotary_emb.rope_type not in _ROTARY:
        return None
    layers = [_layer(layer, config) for layer in inner.model.layers[: config.num_hidden_layers]]
    if not layers or len({layer.shape for layer in layers}) != 1:
        return None
    head, like = _part(inner.get_output_embeddings()), torch.empty(0, dtype=inner.dtype)
    return Lean(inner.model.embed_tokens, layers, _part(inner.model.norm), head, inner.model.rotary_emb, like, config.hidden_size)


def _only_lora(model: nn.Module) -> bool:
    """Whether an adapter changes layers alone. Others add tokens, or act from some token on."""
    configs = getattr(model, "peft_config", {})
    return all(
        str(getattr(config.peft_type, "value", config.peft_type)) == "LORA"
        and getattr(config, "alora_invocation_tokens", None) is None
        for config in configs.values()
    )


def _transformers_own(inner: Any) -> bool:
    """Whether model, layers and blocks are transformers' own classes, with nobody else's forward in front of them."""
    state = inner.__dict__.get("_isdaa_state")
    if "forward" in inner.__dict__ and (state is None or state.original is not None):
        return False
    home = type(inner).__module__
    if not home.startswith("transformers.models.") or not type(inner).__name__.endswith("ForCausalLM"):
        return False
    blocks = [inner.model, inner.model.rotary_emb]
    for layer in inner.model.layers:
        blocks += [layer, layer.self_attn, layer.mlp]
    return all(type(block).__module__ == home and not _replaced(block) for block in blocks)


def _replaced(module: nn.Module) -> bool:
    """Whether a forward of this one instance stands in front of the class's; isdaa's own compute the same."""
    forward = module.__dict__.get("forward")
    known = (type(module).forward, fused_layers._norm_forward, fused_layers._gated_forward, last_layer._forward)
    return forward is not None and getattr(forward, "__func__", None) not in known


def _windows(inner: Any) -> bool:
    config = inner.config
    if config.model_type == "mistral" and getattr(config, "sliding_window", None) is not None:
        return True
    kinds = getattr(config, "layer_types", None) or ()
    return any(kind != "full_attention" for kind in kinds) or any(
        getattr(layer.self_attn, "sliding_window", None) is not None for layer in inner.model.layers
    )


def _hooked(model: nn.Module) -> bool:
    everywhere = nn.modules.module
    return bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks) or any(
        m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in model.modules()
    )


@dataclass(frozen=True)
class Layer:
    """The parts of one layer, so that no step has to look for them. shape: H, G and D, and the factor of the scores."""

    before: Part
    query: Part
    keys_values: Part
    all_three: Part
    query_norm: Part | None
    key_norm: Part | None
    out: Part
    between: Part
    gate: Part
    activation: Part
    up: Part
    down: Part
    shape: tuple[int, int, int, float]

    def queries(self, x: Tensor, table: Tensor) -> Tensor:
        """(…, H, D) queries of (…, C) inputs, turned; table: (…, 1, 2 D)."""
        query = self.query(x).view(*x.shape[:-1], self.shape[0], self.shape[2])
        return turn(query if self.query_norm is None else self.query_norm(query), table)

    def memory(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """(…, G, D) keys, turned, and values of (…, C) inputs."""
        _, groups, size, _ = self.shape
        key, value = self.keys_values(x).view(*x.shape[:-1], 2 * groups, size).split(groups, -2)
        return turn(key if self.key_norm is None else self.key_norm(key), table), value

    def heads(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(…, H, D) queries, (…, G, D) keys and values of (…, C) inputs."""
        heads, groups, size, _ = self.shape
        all_three = self.all_three(x).view(*x.shape[:-1], heads + 2 * groups, size)
        both, value = all_three.split((heads + groups, groups), -2)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = both.split((heads, groups), -2)
            both = torch.cat([self.query_norm(query), self.key_norm(key)], -2)
        query, key = turn(both, table).split((heads, groups), -2)
        return query, key, value

    def after(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """What leaves the layer, (…, C), from what entered it and what was attended to, (…, H·D)."""
        hidden = hidden + self.out(attended)
        x = self.between(hidden)
        return hidden.add_(self.down(self.activation(self.gate(x)).mul_(self.up(x))))


@dataclass
class Lean:
    """A model's parts. like: an empty tensor of its precision; width: C."""

    embed: Part
    layers: Sequence[Layer]
    norm: Part
    head: Part
    rotary: Any
    like: Tensor
    width: int
    _table: Tensor = field(default_factory=lambda: torch.empty(0))

    def table(self, length: int) -> Tensor:
        """(at least `length`, 1, 2 D): cosines, and sines with the sign of the half that is turned, by position. Both hold
        the root of the scores' factor, so that queries times keys need none."""
        table = self._table  # another thread may put another table there meanwhile
        if len(table) < length:
            cos, sin = self.rotary(self.like, torch.arange(length + _TABLE - length % _TABLE)[None])
            half = sin.shape[-1] // 2
            table = torch.cat([cos[0], -sin[0, :, :half], sin[0, :, half:]], -1)[:, None] * self.layers[0].shape[3] ** 0.5
            self._table = table
        return table

    def states(self, ids: Tensor, starts: Tensor, counts: Tensor, memory: Memory | None = None) -> Tensor:
        """(N, C) hidden states that enter the head at some positions: all that lie behind them cost nothing in the last layer.

        Args:
            ids: (R, T) rows padded on the right with any token.
            starts: (R,) first position asked for, and
            counts: (R,) how many from there on; N is their sum, in the order of the rows.
            memory: for each layer, where its keys and values, both (R, G, T, D), are to be written.
        """
        rows, length = ids.shape
        _, groups, size, _ = self.layers[0].shape
        hidden: Tensor = self.embed(ids)
        if memory is None:
            spare = self.like.new_empty(rows, groups, length, size), self.like.new_empty(rows, groups, length, size)
            memory = lambda number: spare  # noqa: E731
        table = self.table(length)
        for number, layer in enumerate(self.layers[:-1]):
            query, key, value = layer.heads(layer.before(hidden), table[:length])
            keys, values = _remember(memory(number), key, value)
            hidden = layer.after(hidden, _attend(query, keys, values))
        layer, asked = self.layers[-1], _Asked.of(starts, counts, length)
        x = layer.before(hidden)
        key, value = layer.memory(x, table[:length])
        keys, values = _remember(memory(len(self.layers) - 1), key, value)
        x, hidden = (t.flatten(0, 1).index_select(0, asked.slots) for t in (x, hidden))
        query = layer.queries(x, table[asked.positions])
        attended = _attend(query[asked.block], keys, values, asked.visible(self.like))
        return self.norm(layer.after(hidden, attended.flatten(0, 1).index_select(0, asked.back)))


@dataclass(frozen=True)
class _Asked:
    """Positions that are asked for. positions, slots: (N,) in their rows and in all rows; block: (R, A) which of the N, padded
    with any; back: (N,) place in the block."""

    positions: Tensor
    slots: Tensor
    block: Tensor
    back: Tensor
    length: int

    @classmethod
    def of(cls, starts: Tensor, counts: Tensor, length: int) -> _Asked:
        width, total = int(counts.max()), int(counts.sum())
        row = torch.arange(len(counts)).repeat_interleave(counts)
        before = counts.cumsum(0) - counts
        offset = torch.arange(total) - before[row]
        positions = starts[row] + offset
        block = (before[:, None] + torch.arange(width)).clamp_(max=total - 1)
        return cls(positions, row * length + positions, block, row * width + offset, length)

    def visible(self, like: Tensor) -> Tensor:
        """(R, 1, A, T) additive mask."""
        later = torch.arange(self.length) > self.positions[self.block][..., None]
        return like.new_zeros(later.shape).masked_fill_(later, -torch.inf)[:, None]


def turn(x: Tensor, table: Tensor) -> Tensor:
    """Rotary position embedding of (…, heads, D)."""
    half = x.shape[-1] // 2
    cos, sin = table.chunk(2, -1)
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _remember(memory: tuple[Tensor, Tensor], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = memory
    return keys.copy_(key.transpose(1, 2)), values.copy_(value.transpose(1, 2))


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """(R, A, H·D) from (R, A, H, D) queries, (R, G, T, D) keys and values.

    mask: (R, 1, A, T), additive; None is causal, with A = T."""
    rows, asked, heads, size = query.shape
    groups, length = values.shape[1:3]
    if asked > _SHORT:
        if heads > groups:
            keys, values = (x.repeat_interleave(heads // groups, 1) for x in (keys, values))
        query = query.transpose(1, 2)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=mask is None, scale=1.0)
        return out.transpose(1, 2).flatten(2)
    together = query.transpose(1, 2).reshape(rows * groups, heads // groups * asked, size)
    transposed = keys.flatten(0, 1).transpose(1, 2)
    if mask is None:
        causal = query.new_full((length, length), -torch.inf).triu_(1).repeat(heads // groups, 1)
        scores = torch.baddbmm(causal, together, transposed)
    else:
        scores = torch.bmm(together, transposed)
        scores.view(rows, heads, asked, length).add_(mask)
    out = torch.bmm(torch.softmax(scores, -1), values.flatten(0, 1))
    return out.view(rows, heads, asked, size).transpose(1, 2).flatten(2)


def _layer(layer: Any, config: Any) -> Layer:
    own, mlp = layer.self_attn, layer.mlp
    return Layer(
        before=_part(layer.input_layernorm),
        query=_part(own.q_proj),
        keys_values=_together(own.k_proj, own.v_proj),
        all_three=_together(own.q_proj, own.k_proj, own.v_proj),
        query_norm=_part(own.q_norm) if hasattr(own, "q_norm") else None,
        key_norm=_part(own.k_norm) if hasattr(own, "k_norm") else None,
        out=_part(own.o_proj),
        between=_part(layer.post_attention_layernorm),
        gate=_part(mlp.gate_proj),
        activation=mlp.act_fn,
        up=_part(mlp.up_proj),
        down=_part(mlp.down_proj),
        shape=(config.num_attention_heads, config.num_key_value_heads, own.head_dim, own.scaling),
    )


def _plain_linear(module: Any) -> bool:
    return type(module) is nn.Linear and not _replaced(module) and type(module.weight.data) is Tensor


def _part(module: Any) -> Part:
    """What a module computes; for the two usual kinds in one call of torch."""
    if _plain_linear(module):
        return lambda x: F.linear(x, module.weight, module.bias)
    own = type(module).__module__.startswith("transformers.models.") and not _replaced(module)
    if own and type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        weight, epsilon = module.weight, module.variance_epsilon
        return lambda x: F.rms_norm(x, weight.shape, weight, epsilon)
    return module


def _together(*modules: Any) -> Part:
    """Outputs of several layers side by side; small plain ones as one product with a copy of their weights."""
    plain = all(_plain_linear(module) for module in modules) and len({module.bias is None for module in modules}) == 1
    if not plain or sum(module.weight.numel() for module in modules) > _SMALL_WEIGHTS:
        parts = [_part(module) for module in modules]
        return lambda x: torch.cat([part(x) for part in parts], -1)
    weight = torch.cat([module.weight.detach() for module in modules])
    bias = None if modules[0].bias is None else torch.cat([module.bias.detach() for module in modules])
    return lambda x: F.linear(x, weight, bias)
