"""The forward pass that training, reference logps and evaluation share: a packed row in, logps of the responses out."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isdaa.errors import UserError
from isdaa.models.attention import shared_prefix
from isdaa.models.attention.attention_choice import AUTO, SDPA, choose_attention
from isdaa.models.attention.layout import Layout
from isdaa.models.half_precision import FLOAT32, numerics
from isdaa.models.packed import half_linear, last_layer
from isdaa.models.packed.logprobs import Head
from isdaa.models.packed.patched_forward import (
    REQUEST,
    SHARED_PREFIX,
    TWO_ROWS,
    ForwardRequest,
    disable_dropout,
    evaluating,
    head_of,
    inner_model,
    install_forward,
)
from isdaa.models.packed.probe import counted_positions, head_trouble, make_probe, switching_length
from isdaa.models.quantised import keep_gradients
from isdaa.terminal import working

__all__ = ["PairForward", "ResponseLogps", "disable_dropout", "evaluating", "inner_model", "pass_tokens", "prepare"]

logger = logging.getLogger(__name__)

PASS_TOKENS = 16_384  # of a packed row without gradients: enough for any GPU
CPU_WORK = 2.5e11  # floating-point operations of one on a CPU: a few seconds, and no slower than larger ones
LEAST_TOKENS = 256  # of one, however large the model

NOT_FINITE = (
    "{name}: its logits are not finite (NaN or infinite), though its weights are: too large for {dtype}; load it in float32, "
    "or take an earlier checkpoint"
)


def pass_tokens(model: nn.Module) -> int:
    """Tokens of a forward pass without gradients (2·parameters operations each, Kaplan et al. 2020, arXiv 2001.08361, sec. 2.1).

    Model and kind of device alone decide, never a measured time: passes, and so the last bits of a number, are the same in
    every run.
    """
    parameters = list(model.parameters())
    return cpu_pass_tokens(sum(p.numel() for p in parameters)) if parameters[0].device.type == "cpu" else PASS_TOKENS


def cpu_pass_tokens(parameters: int) -> int:
    """The same of a model of so many parameters on a CPU."""
    return min(PASS_TOKENS, max(LEAST_TOKENS, int(CPU_WORK / (2 * parameters))))


@dataclass
class ResponseLogps:
    """Logps in fp32, summed over the scored tokens of a response (nats).

    logps: (R,) of the responses in packed order; an empty response has logp 0.
    chosen_logps, rejected_logps: (B,) of the layout's pairs.
    token_logps: (N,) in packed order (see `Layout.response_of`).
    token_wpo: (N,) log π(y_t) − log Σ_v π(v)², without gradient, or None.
    chosen_wpo, rejected_wpo: (B,) mean over tokens of log π(y_t) − log Σ_v π(v)², without gradient, or None.
    """

    logps: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    token_logps: Tensor
    token_wpo: Tensor | None = None
    chosen_wpo: Tensor | None = None
    rejected_wpo: Tensor | None = None


@dataclass
class PairForward:
    """Callable of `prepare`: (model, input_ids, position_ids, layout, with_wpo) -> ResponseLogps.

    `model` is what `prepare` was given or any wrapper around it. `mode` is "shared_prefix" or "two_rows";
    `unprobed_window` is an attention window that the probe could not exceed: batches with longer rows are computed as
    two rows. `counted` is how many tokens a packed row may have before a model that counts positions by itself
    (`probe.counted_positions`) would notice: longer ones are computed as two rows, too. `switch` is the length from which
    a row changes the positions of its whole batch (`probe.switching_length`): a batch of which that is true is warned of.
    """

    model: nn.Module
    mode: str
    unprobed_window: int | None = None
    counted: int | None = None
    switch: int | None = None

    def __call__(
        self, model: nn.Module, input_ids: Tensor, position_ids: Tensor | None, layout: Layout, with_wpo: bool = False
    ) -> ResponseLogps:
        """Logps of every response.

        Args:
            model: the prepared model, or a wrapper around it (its training mode and gradient mode are the caller's).
            input_ids: (T,) or (1, T) packed row.
            position_ids: (T,) or (1, T); None derives them from the layout.
            layout: where prompts and responses lie.
            with_wpo: also compute the WPO term.

        Raises:
            ValueError: the layout does not describe `input_ids`, or the model was not prepared.
        """
        out = self._request(model, input_ids, position_ids, layout, "wpo" if with_wpo else "logps")
        tokens, wpo = out["token_logps"], out["wpo"]
        logps = layout.response_sums(tokens)
        chosen, rejected = (layout.on(tokens.device, name) for name in ("chosen", "rejected"))
        found = ResponseLogps(logps, logps[chosen], logps[rejected], tokens, wpo)
        if wpo is not None:
            means = layout.response_sums(wpo) / layout.on(tokens.device, "scored_lengths").clamp(min=1)
            found.chosen_wpo, found.rejected_wpo = means[chosen], means[rejected]
        return found

    def predicting_states(self, model: nn.Module, input_ids: Tensor, layout: Layout) -> tuple[Tensor, Head]:
        """(N, D) hidden states that predict the response tokens, and the model's head; for comparing two models."""
        out = self._request(model, input_ids, None, layout, "hidden")
        return out["hidden"], head_of(inner_model(model))

    def _request(
        self, model: nn.Module, input_ids: Tensor, position_ids: Tensor | None, layout: Layout, want: str
    ) -> dict[str, Any]:
        input_ids = input_ids.reshape(1, -1)
        if input_ids.shape[1] != layout.tokens:
            raise ValueError(f"the layout describes {layout.tokens} tokens, the packed row has {input_ids.shape[1]}")
        if position_ids is None:
            position_ids = layout.on(input_ids.device, "position_ids")
        mode = self.mode
        if self.unprobed_window is not None and layout.longest > self.unprobed_window:
            _warn_once(
                f"rows of more than {self.unprobed_window} tokens exceed an attention window too long to probe:"
                " their pairs are computed as two separate rows"
            )
            mode = TWO_ROWS
        if self.counted is not None and layout.tokens > self.counted:
            _warn_once(
                f"this model scales attention by a count of its own from token {self.counted + 1} on: batches of more tokens"
                " are computed as two separate rows a pair (--align.batch_tokens keeps them shorter)"
            )
            mode = TWO_ROWS
        if self.switch is not None and layout.longest > self.switch >= layout.shortest:
            _warn_once(
                f"a row of more than {self.switch} tokens changes the rotary positions of all rows of its batch: logps of shorter"
                f" ones depend on what they meet; let none be longer (--tokenization.max_length {self.switch})"
            )
        request = ForwardRequest(layout, mode, want)
        out = model(input_ids=input_ids, position_ids=position_ids.reshape(1, -1), **{REQUEST: request})
        if not isinstance(out, dict) or "token_logps" not in out:
            raise ValueError("the model was not prepared: call isdaa.models.packed.forward.prepare on it, or on what it wraps")
        return out


def prepare(
    model: nn.Module, probe: bool = True, longest_row: int | None = None, attention: str = AUTO, precision: str = FLOAT32
) -> PairForward:
    """Installs the shared-prefix forward in a model and proves it on one pair.

    The pair is longer than any attention window of the model, or than `longest_row` where the caller will send nothing
    longer; at most as long as the model's positions allow, and 4352 tokens. A window beyond that stays unproved, and
    batches that exceed it are computed as two rows. The token logps must equal those of two plain rows of
    `model(...).logits`, up to rounding in the model's dtype. Where they do not, the forward computes two separate rows
    with the model's plain attention instead, and a warning says so and why.

    Args:
        model: a transformers causal language model, or a PEFT model around one. Call it before DDP or FSDP wrap it.
        probe: False trusts the shared prefix and the config's names for the head.
        longest_row: the longest `prompt + response` the caller will send, in tokens.
        attention: one of `choice.NAMES`. A fast one that cannot be used here, or with which the logps are not those of
            plain rows, gives way to "sdpa", with a warning.
        precision: "bfloat16" where the caller's passes run under autocast to it: the proof then does, too.

    Raises:
        UserError: an unknown attention, no causal language model, one whose logits are not finite, one whose logps can be
            computed in neither way, or one with an adapter that acts on a part of a row or whose two ends peft ties.
    """
    inner = inner_model(model)
    adapters = getattr(model, "peft_config", {}).values()
    if any(getattr(config, "target_modules_to_tie", None) for config in adapters):
        raise UserError(
            "ensure_weight_tying with target_modules: peft does not merge such an adapter rightly and, for some models, reads "
            "back another than it has saved; leave ensure_weight_tying out, or name the embeddings in modules_to_save"
        )
    if any(getattr(config, "alora_invocation_tokens", None) for config in adapters):
        raise UserError(
            "an activated LoRA (alora_invocation_tokens) acts from some token of a row on; a packed row has many such"
        )
    keep_gradients(inner)
    state = install_forward(inner)
    state.own_head = False
    shared_prefix.install(inner)
    last_layer.install(inner)
    half_linear.install(inner)
    choose_attention(inner, attention)
    lengths: dict[str, Any] = {"counted": counted_positions(inner), "switch": switching_length(inner)}
    if not probe:
        return PairForward(model, SHARED_PREFIX, **lengths)

    def token_logps(mode: str) -> Callable[[Tensor, Layout], Tensor]:
        return lambda ids, layout: PairForward(model, mode)(model, ids, None, layout).token_logps

    name = type(inner).__name__
    half = numerics(precision, next(inner.parameters()).device.type)
    with torch.no_grad(), evaluating(model), half, working("probing the forward pass"):
        pair = make_probe(model, longest_row)
        if not bool(pair.truth.isfinite().all()):
            where = getattr(inner.config, "_name_or_path", "") or name
            raise UserError(NOT_FINITE.format(name=where, dtype=str(next(inner.parameters()).dtype).removeprefix("torch.")))
        trouble = head_trouble(inner)
        if trouble is not None:
            state.own_head = True
            logger.warning("%s: %s; response logits are computed by the model's own code", name, trouble)
        trouble = pair.trouble(model, token_logps(SHARED_PREFIX))
        used = pair.layout.cached("attention", lambda: SDPA)
        if trouble is not None and used != SDPA:
            logger.warning("%s: attention by %s does not reproduce the model's own logps (%s)", name, used, trouble)
            choose_attention(inner, SDPA)
            trouble = pair.trouble(model, token_logps(SHARED_PREFIX))
        if trouble is None and not pair.layout.attended:
            # Small random weights hardly attend at all: numbers alone would not tell.
            trouble = "its attention does not go through transformers' attention interface"
        if trouble is None:
            return PairForward(model, SHARED_PREFIX, pair.unprobed_window, **lengths)
        logger.warning(
            "%s: the shared prefix does not reproduce the model's own logps (%s); every pair is computed as two"
            " separate rows, at up to twice the cost",
            name,
            trouble,
        )
        shared_prefix.uninstall(inner)
        for own_head in (state.own_head, True):
            state.own_head = own_head
            trouble = pair.trouble(model, token_logps(TWO_ROWS))
            if trouble is None:
                return PairForward(model, TWO_ROWS, switch=lengths["switch"])
    raise UserError(f"{name}: chunked logps do not equal the model's own logits ({trouble}); this model is not supported")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
