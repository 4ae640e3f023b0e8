"""KL(π‖π_ref) of a policy from its reference, on the policy's own samples (docs/method.md, "KL and win rate")."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from isdaa.errors import UserError
from isdaa.evaluation.records import Record
from isdaa.evaluation.statistics import Interval, mean_interval

if TYPE_CHECKING:
    from torch import Tensor

# Samples for KL come from the policy as it is. Any other temperature, or a cut of its tail, is another distribution,
# whose samples would bias the estimate; so these are constants, and samples for win rates are never used here.
KL_SETTINGS: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}

_BATCH_TOKENS = {"cpu": 4096}  # at most; a larger batch falls out of the processor's caches


def divergences(
    policy: Any,
    reference: Any,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    states: Sequence[Tensor | None] | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[dict[str, float]]:
    """`{"policy_logps", "reference_logps", "kl"}` of (prompt ids, response ids) rows, in nats, summed over a response.

    policy, reference: `isdaa.models.packed.forward.PairForward`. kl: sum over positions of the full-vocabulary KL of the
    next-token distributions (Rao–Blackwell; Amini et al. 2025). states: of the policy's samples (`Sample.states`); with them
    only the reference is run, once they have shown on a few rows that they give what running the policy gives. progress: called
    with the number of rows done since the last call. Raises UserError where the vocabularies differ in size.
    """
    from isdaa.models.packed.forward import pass_tokens
    from isdaa.models.packed.plain_rows import kl_pass
    from isdaa.models.sampling.kl_from_samples import kl_from_states, states_agree

    try:
        known = [kept for kept in states or [] if kept is not None]
        most = pass_tokens(policy.model)
        tokens = min(most, _BATCH_TOKENS.get(next(policy.model.parameters()).device.type, most))
        if rows and len(known) == len(rows) and states_agree(policy, rows, known):
            found = kl_from_states(policy, reference, rows, known, batch_tokens=tokens, progress=progress)
        else:
            found = kl_pass(policy, reference, rows, batch_tokens=tokens, progress=progress)
    except ValueError as error:
        raise UserError(f"policy and reference cannot be compared: {error}") from None
    columns = (found.policy_logps.tolist(), found.reference_logps.tolist(), found.kl.tolist())
    result = []
    for p, r, k in zip(*columns, strict=True):
        if not (math.isfinite(p) and math.isfinite(r) and math.isfinite(k)):
            raise UserError(f"a sample has logps {p} and {r} and KL {k}: the policy's or the reference's weights are broken")
        result.append({"policy_logps": p, "reference_logps": r, "kl": max(0.0, k)})  # rounding can leave −1e-9
    return result


def kl_summary(records: Sequence[Record], **bootstrap: Any) -> dict[str, Any]:
    """Mean over prompts with interval, the Monte-Carlo estimate log π − log π_ref of the same samples, and the share of
    samples that the length limit cut: what lies beyond the limit is in neither estimate.
    """
    exact = mean_interval([record["kl"] for record in records], **bootstrap)
    plain: Interval = mean_interval([record["policy_logps"] - record["reference_logps"] for record in records], **bootstrap)
    truncated = sum(not record["finished"] for record in records) / len(records)
    return {**exact.to_json(), "monte_carlo": plain.to_json(), "truncated": truncated}
