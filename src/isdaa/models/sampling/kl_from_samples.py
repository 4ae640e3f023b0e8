"""KL of a policy on its own samples without running the policy again: the sampler has seen the states already.

A hidden state that enters the model's head is all that log-probabilities need. Those kept by `sampling.sample` come from the pass
that drew the samples, so what is compared with the reference is the very distribution that the tokens were drawn from.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from isdaa.models.attention.layout import Layout
from isdaa.models.packed.forward import PairForward, evaluating
from isdaa.models.packed.logprobs import full_vocabulary_kl, token_logps
from isdaa.models.packed.patched_forward import head_of, inner_model
from isdaa.models.packed.plain_rows import Progress, Row, RowDivergences, sequence_logps
from isdaa.models.packed.token_batches import longest_first

logger = logging.getLogger(__name__)

_CHECKED = 4  # rows that are computed both ways


@torch.no_grad()
def states_agree(policy: PairForward, rows: Sequence[Row], states: Sequence[Tensor]) -> bool:
    """Whether a few rows have the logps that the policy gives them when it is run; a warning says where they have not."""
    chosen = sorted({i * (len(rows) - 1) // max(1, _CHECKED - 1) for i in range(_CHECKED)})
    few = [rows[i] for i in chosen]
    model = inner_model(policy.model)
    parameter = next(model.parameters())
    targets = torch.tensor([token for _, response in few for token in response], device=parameter.device)
    known = torch.cat([states[i] for i in chosen]).to(parameter.device)
    if len(known) != len(targets):
        raise ValueError(f"{len(known)} states of {len(targets)} response tokens")
    lengths = [len(response) for _, response in few]
    found = torch.stack([part.sum() for part in token_logps(known, head_of(model), targets)[0].cpu().split(lengths)])
    expected = sequence_logps(policy, few)
    tolerance = 1e-3 if parameter.dtype in (torch.float32, torch.float64) else 0.05
    # NaN is no sign against the states: whoever reads the result reports it as what it is.
    if not bool(((found - expected).abs() > tolerance * (1 + expected.abs())).any()):
        return True
    logger.warning("%s: states kept while sampling do not give its logps; it is run again", type(model).__name__)
    return False


@torch.no_grad()
def kl_from_states(
    policy: PairForward,
    reference: PairForward,
    rows: Sequence[Row],
    states: Sequence[Tensor],
    batch_tokens: int = 16384,
    progress: Progress | None = None,
) -> RowDivergences:
    """What `kl_pass` gives, with the policy's states known: (length of the response, D) of each row, on any device.

    Raises:
        ValueError: not as many states as response tokens.
        UserError: vocabularies of different size.
    """
    head = head_of(inner_model(policy.model))
    there, elsewhere = (next(side.model.parameters()).device for side in (policy, reference))
    out = RowDivergences(*(torch.zeros(len(rows)) for _ in range(3)))
    with evaluating(reference.model):
        for batch in longest_first([len(prompt) + len(response) for prompt, response in rows], batch_tokens):
            of_batch = [rows[i] for i in batch]
            known = torch.cat([states[i] for i in batch]).to(there)
            lengths = [len(response) for _, response in of_batch]
            if len(known) != sum(lengths):
                raise ValueError(f"{len(known)} states of {sum(lengths)} response tokens")
            targets = torch.tensor([token for _, response in of_batch for token in response], dtype=torch.int64, device=there)
            ids = torch.tensor([token for row in of_batch for part in row for token in part], device=elsewhere)
            layout = Layout.of_rows(torch.tensor([len(prompt) for prompt, _ in of_batch]), torch.tensor(lengths))
            hidden, reference_head = reference.predicting_states(reference.model, ids, layout)
            kl, logps, logps_ref = full_vocabulary_kl(known, head, hidden, reference_head, targets)
            tokens = torch.stack([logps, logps_ref.to(there), kl]).float().cpu()
            row = torch.arange(len(batch)).repeat_interleave(torch.tensor(lengths))
            sums = torch.zeros(3, len(batch)).index_add_(1, row, tokens)
            out.policy_logps[batch], out.reference_logps[batch], out.kl[batch] = sums
            if progress is not None:
                progress(len(batch))
    return out
