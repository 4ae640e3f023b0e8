"""Logps and divergences of plain (prompt, response) rows, through the same forward as training.

Rows are grouped into packed batches by a budget of tokens; the results come back in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isdaa.models.attention.layout import Layout
from isdaa.models.packed.forward import PairForward, evaluating
from isdaa.models.packed.logprobs import full_vocabulary_kl
from isdaa.models.packed.token_batches import longest_first

Row = tuple[Sequence[int], Sequence[int]]
Progress = Callable[[int], object]


@dataclass
class RowDivergences:
    """Per row, on the CPU in fp32: logps summed over the response, and the sum over its positions of the
    full-vocabulary KL(π‖π_ref) of the next-token distributions (Rao–Blackwell; Amini et al. 2025, arXiv 2504.10637)."""

    policy_logps: Tensor
    reference_logps: Tensor
    kl: Tensor


@torch.no_grad()
def sequence_logps(
    forward: PairForward, rows: Sequence[Row], batch_tokens: int = 16384, progress: Progress | None = None
) -> Tensor:
    """(R,) logps of R responses given their prompts, in fp32 on the CPU, the model in evaluation mode.

    Args:
        forward: of `prepare`; its model computes.
        rows: (prompt ids, response ids); a prompt has at least one token, a response may be empty (logp 0).
        batch_tokens: tokens of a packed batch; a longer row is a batch of its own.
        progress: called with the number of rows done since the last call.
    """
    sums = torch.zeros(len(rows))
    with evaluating(forward.model):
        for batch, ids, layout in _batches(rows, batch_tokens, _device(forward.model)):
            sums[batch] = forward(forward.model, ids, None, layout).logps.float().cpu()
            if progress is not None:
                progress(len(batch))
    return sums


@torch.no_grad()
def kl_pass(
    policy: PairForward,
    reference: PairForward,
    rows: Sequence[Row],
    batch_tokens: int = 16384,
    progress: Progress | None = None,
) -> RowDivergences:
    """Logps of both models and the Rao–Blackwell KL(π‖π_ref) of every row, in nats, from one pass of each model.

    For the KL of a prompt the responses must be samples of the policy at temperature 1, top-p 1, top-k 0.
    Arguments as in `sequence_logps`. The models may lie on different devices.

    Raises:
        UserError: vocabularies of different size.
    """
    out = RowDivergences(*(torch.zeros(len(rows)) for _ in range(3)))
    with evaluating(policy.model), evaluating(reference.model):
        for batch, ids, layout in _batches(rows, batch_tokens, _device(policy.model)):
            hidden, head = policy.predicting_states(policy.model, ids, layout)
            elsewhere = ids.to(_device(reference.model))
            hidden_ref, head_ref = reference.predicting_states(reference.model, elsewhere, layout)
            targets = ids[layout.on(ids.device, "target_index")]
            kl, logps, logps_ref = full_vocabulary_kl(hidden, head, hidden_ref, head_ref, targets)
            for total, tokens in ((out.kl, kl), (out.policy_logps, logps), (out.reference_logps, logps_ref)):
                total[batch] = layout.response_sums(tokens).float().cpu()
            if progress is not None:
                progress(len(batch))
    return out


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _batches(rows: Sequence[Row], batch_tokens: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Layout]]:
    """(row numbers, (T,) packed row, layout), the longest rows first."""
    for batch in longest_first([len(prompt) + len(response) for prompt, response in rows], batch_tokens):
        ids = [token for i in batch for part in rows[i] for token in part]
        prompts, responses = (torch.tensor([len(rows[i][part]) for i in batch]) for part in (0, 1))
        yield torch.tensor(batch), torch.tensor(ids, device=device), Layout.of_rows(prompts, responses)
