"""What happens inside the forward of the innermost causal language model: hidden states of a packed batch, and logps.

The work is done there because wrappers (PEFT, DDP, FSDP, accelerate) have to be called as usual: calling a part of a
model under them lets ranks drift apart. `install_forward` replaces the forward of one instance; a call without our
keyword is the model's own forward, untouched.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from isdaa.errors import UserError
from isdaa.models.attention import shared_prefix
from isdaa.models.attention.layout import Layout
from isdaa.models.attention.shared_prefix import LAYOUT_KEYWORD
from isdaa.models.packed import last_layer
from isdaa.models.packed.logprobs import Head, LinearHead, OwnHead, linear_head, text_config, token_logps
from isdaa.models.packed.tied_embeddings import Tie, embed, tie_of

SHARED_PREFIX = "shared_prefix"
TWO_ROWS = "two_rows"
REQUEST = "isdaa_request"
_STATE = "_isdaa_state"


class ForwardRequest:
    """What travels through the wrappers to the inner model's forward. `want` is "logps", "wpo" or "hidden".

    Not a dataclass, like the layout: FSDP would pass on a copy.
    """

    def __init__(self, layout: Layout, mode: str, want: str) -> None:
        self.layout, self.mode, self.want = layout, mode, want


@dataclass
class _State:
    """What an installed model remembers: an instance forward that was there before, and whether the linear head is
    known not to be the whole head."""

    original: Callable[..., Any] | None
    own_head: bool = False


def inner_model(model: nn.Module) -> nn.Module:
    """The causal language model inside PEFT, DDP, FSDP and similar wrappers.

    Raises:
        UserError: there is none.
    """
    seen = model
    while True:
        if hasattr(seen, "get_base_model"):
            seen = seen.get_base_model()  # type: ignore[operator]
        elif hasattr(seen, "base_model_prefix"):
            return seen
        elif isinstance(getattr(seen, "module", None), nn.Module):
            seen = seen.module  # type: ignore[assignment]
        elif isinstance(getattr(seen, "_orig_mod", None), nn.Module):
            seen = seen._orig_mod  # type: ignore[assignment]
        else:
            raise UserError(f"a transformers causal language model is needed, not {type(model).__name__}")


def install_forward(model: nn.Module) -> _State:
    """Replaces the forward of this one instance; the class, and so saving and loading, stay as they are."""
    forward = model.__dict__.get("forward")
    if getattr(forward, "__func__", None) is type(model).forward:
        forward = None  # a pickled model comes back with its class's forward in the place of ours
    elif _STATE in model.__dict__:
        return cast(_State, model.__dict__[_STATE])
    state = _State(forward)
    setattr(model, _STATE, state)
    model.forward = MethodType(_make_forward(type(model)), model)
    return state


def _make_forward(cls: type) -> Callable[..., Any]:
    @functools.wraps(cls.forward)  # type: ignore[attr-defined]
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        request = kwargs.pop(REQUEST, None)
        if request is None:
            return _own_forward(self, *args, **kwargs)
        return _answer(self, request, kwargs["input_ids"], kwargs["position_ids"])

    # transformers and the Trainer read the class's signature here; accelerate would follow `__wrapped__` past this
    # function when it unwraps a model.
    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    del forward.__wrapped__
    return forward


def _own_forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    state: _State = model.__dict__[_STATE]
    return type(model).forward(model, *args, **kwargs) if state.original is None else state.original(*args, **kwargs)


def _answer(model: nn.Module, request: ForwardRequest, input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
    """Runs inside the inner model's forward. A plain dict of tensors: every wrapper can walk through it."""
    layout = request.layout
    head = head_of(model)
    tie = tie_of(model) if isinstance(head, LinearHead) and request.want != "hidden" else None
    if request.mode == SHARED_PREFIX:
        hidden = _packed_states(model, input_ids, position_ids, layout, tie)
    else:
        hidden = _two_row_states(model, input_ids[0], layout, tie)
    if request.want == "hidden":
        return {"token_logps": None, "wpo": None, "hidden": hidden}
    targets = input_ids[0].index_select(0, layout.on(input_ids.device, "target_index"))
    logps, wpo = token_logps(hidden, head, targets, with_wpo=request.want == "wpo", tie=tie)
    return {"token_logps": logps, "wpo": wpo, "hidden": None}


def _decoder_name(model: nn.Module) -> str:
    """Name of the child that maps token ids to the hidden states that enter the head."""
    prefix: str = model.base_model_prefix  # type: ignore[assignment]
    return prefix if prefix in model._modules else "model"


def _decoder(model: nn.Module) -> nn.Module:
    return cast(nn.Module, getattr(model, _decoder_name(model)))


def _packed_states(model: nn.Module, input_ids: Tensor, position_ids: Tensor, layout: Layout, tie: Tie | None) -> Tensor:
    shared_prefix.install(model)  # no work where it is in place; another model may share the config object
    # A 4-D mask is passed on as it is: nothing of size T × T is made, and nothing guesses at packed sequences from the
    # position ids. Our attention never reads it.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    out = _decoder(model)(
        **_inputs(model, input_ids, tie),
        position_ids=position_ids,
        attention_mask=mask,
        use_cache=False,
        **{LAYOUT_KEYWORD: layout},
    )
    return last_layer.narrowed(out.last_hidden_state, layout)


def _inputs(model: nn.Module, input_ids: Tensor, tie: Tie | None) -> dict[str, Tensor]:
    return {"input_ids": input_ids} if tie is None else {"inputs_embeds": embed(model, input_ids, tie)}


def _two_row_states(model: nn.Module, packed: Tensor, layout: Layout, tie: Tie | None) -> Tensor:
    """The same states from separate right-padded rows `prompt + response`, with the model's own attention."""
    rows, mask, index = layout.cached((str(packed.device), "two_rows"), lambda: _two_rows(layout, packed.device))
    # Padding repeats a real token: masks decide, and no model needs to know a pad token.
    out = _decoder(model)(**_inputs(model, packed[rows], tie), attention_mask=mask, use_cache=False)
    return cast(Tensor, out.last_hidden_state).flatten(0, 1).index_select(0, index)


def _two_rows(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, L) index into the packed row, (rows, L) mask, (N,) predictor index into the flattened rows."""
    prompts = layout.prompt_lengths[layout.prompt_of]
    lengths = prompts + layout.response_lengths
    present = layout.response_lengths > 0
    present[0] |= not bool(present.any())
    slot = torch.arange(int(lengths[present].max()))
    starts = layout.prompt_starts[layout.prompt_of]
    # Where the response begins in the packed row: other responses may lie between its prompt and it.
    gap = layout.response_starts - starts - prompts
    index = starts[:, None] + slot + gap[:, None] * (slot >= prompts[:, None])
    mask = slot < lengths[:, None]
    row_of = present.cumsum(0) - 1
    response = layout.response_of
    predictors = row_of[response] * len(slot) + prompts[response] + layout.offset - 1
    rows = torch.where(mask, index, starts[:, None])[present]
    return rows.to(device), mask[present].long().to(device), predictors.to(device)


def head_of(model: nn.Module) -> Head:
    """The head of an installed model: linear where that is all it is, else the model's own forward."""
    state: _State = model.__dict__[_STATE]
    head = None if state.own_head else linear_head(model)
    return own_head(model) if head is None else head


def own_head(model: nn.Module) -> OwnHead:
    """The head of an installed model by the model's own forward."""
    return OwnHead(functools.partial(_own_logits, model), int(text_config(model).vocab_size))


def _own_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """(n, V) logits of (n, D) hidden states by the model's own forward, its decoder replaced by one that gives them."""
    name = _decoder_name(model)
    decoder = model._modules[name]
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    try:
        model._modules[name] = _Given(hidden[None])
        return cast(Tensor, _own_forward(model, input_ids=ids, use_cache=False).logits[0])
    finally:
        model._modules[name] = decoder


class _Given(nn.Module):
    """Stands in for a decoder whose last hidden states are known."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    @property
    def decoder(self) -> _Given:
        """OPT calls this part of its model."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        out = MoeModelOutputWithPast(last_hidden_state=self.hidden)
        out.cross_attentions = None  # GPT-2 and its like pass them on
        return out


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; at the end every module has its own mode back."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# What training adds at random besides dropout: noise in front of routers (Mixtral, DBRX, PhiMoE). PhiMoE's `router_jitter_noise`
# is not of them: it is a threshold, in evaluation too.
_NOISE = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability of a model to 0, in place: dropout layers, LoRA's included, and the numbers that
    attention layers pass on; and the noise of routers. The model's config keeps its values: a module that reads them anew in
    each call (Falcon's, Persimmon's) gets a copy."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if ("drop" in name or name in _NOISE) and isinstance(value, float):
                setattr(module, name, 0.0)
        config = module.__dict__.get("config")
        if config is not None and _reads_dropout(module, config):
            if id(config) not in copies:
                copies[id(config)] = copy.copy(config)
                for name in _dropouts(config):
                    setattr(copies[id(config)], name, 0.0)
            module.config = copies[id(config)]


def _dropouts(config: Any) -> set[str]:
    """Names of a config's dropout probabilities that are above 0."""
    values = getattr(config, "__dict__", {}).items()
    return {name for name, value in values if "drop" in name and isinstance(value, float) and value > 0}


def _reads_dropout(module: nn.Module, config: Any) -> bool:
    """Whether a module's forward looks up a probability in its config."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)  # what is wrapped for gradient checkpointing, too
    return code is not None and "config" in code.co_names and not _dropouts(config).isdisjoint(code.co_names)
