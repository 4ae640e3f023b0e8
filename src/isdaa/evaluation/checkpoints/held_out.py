"""Held-out preference pairs: does the policy rank them as their labels do, and how far have their logps drifted?

Neither number predicts the win rate: both logps fall in runs that get better and in runs that get worse, and accuracy does
not tell them apart.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from isdaa.data.encoder import Encoder, TokenizationSettings
from isdaa.evaluation.records import Record
from isdaa.evaluation.statistics import mean_interval
from isdaa.files import digest

logger = logging.getLogger(__name__)

STILL = 1e-3  # nats; a policy equal to its reference may differ from it by as much in float32 (docs/method.md)


def common_pairs(files: Sequence[str]) -> list[dict[str, Any]] | None:
    """Pairs of the first file whose prompt is in every file, so held out from all runs; None and a logged line, if there is none.

    Raises UserError for a file without pairs.
    """
    from isdaa.data.pairs import KEEP
    from isdaa.data.reading.sources import load_pairs, prompt_key

    first, *others = ([(prompt_key(pair), pair) for pair in load_pairs(file, repeated=KEEP)[0]] for file in files)
    shared = [{key for key, _ in pairs} for pairs in others]
    kept = [pair for key, pair in first if all(key in keys for keys in shared)]
    if not kept:
        logger.info("no pair is held out from all of these runs, so there is no accuracy and no drift; name pairs with --data")
    return kept or None


def tokenize_held_out(pairs: Iterable[Mapping[str, Any]], tokenizer: Any, tokenization: TokenizationSettings) -> list[Record]:
    """Canonical pairs as `{"id", "prompt", "prompt_ids", "chosen_ids", "rejected_ids"}`, `prompt` a digest of its ids.

    Pairs whose responses are equal are left out.
    """
    rows = [dict(pair) for pair in pairs]
    encoder = Encoder(tokenizer, tokenization)
    records = []
    for row, ids in zip(rows, encoder.pairs(rows), strict=True):
        if ids.chosen != ids.rejected:
            prompt = ids.prompt.ids
            record = {"id": str(row["id"]), "prompt": digest(prompt), "prompt_ids": prompt}
            records.append(record | {"chosen_ids": ids.chosen, "rejected_ids": ids.rejected})
    return records


def pair_logps(
    forward: Any, pairs: Sequence[Record], batch_tokens: int | None = None, progress: Callable[[int], object] | None = None
) -> list[tuple[float, float]]:
    """(chosen, rejected) logps of every pair in nats, by the shared-prefix forward, in the order of the pairs.

    batch_tokens: of a pass; None: `models.packed.forward.pass_tokens`. progress: called with the number of pairs just done.
    """
    import torch

    from isdaa.models.attention.layout import Layout
    from isdaa.models.packed.forward import pass_tokens
    from isdaa.models.packed.token_batches import longest_first

    parts = ("prompt_ids", "chosen_ids", "rejected_ids")
    device = next(forward.model.parameters()).device
    result = [(0.0, 0.0)] * len(pairs)
    lengths = [sum(len(pair[part]) for part in parts) for pair in pairs]
    for batch in longest_first(lengths, batch_tokens or pass_tokens(forward.model)):
        ids = torch.tensor([token for i in batch for part in parts for token in pairs[i][part]], device=device)
        layout = Layout.of_pairs(*(torch.tensor([len(pairs[i][part]) for i in batch]) for part in parts))
        with torch.no_grad():
            out = forward(forward.model, layout.reading(ids), None, layout)
        for i, chosen, rejected in zip(batch, out.chosen_logps.tolist(), out.rejected_logps.tolist(), strict=True):
            result[i] = (chosen, rejected)
        if progress is not None:
            progress(len(batch))
    return result


def held_out_summary(policy: Sequence[Record], reference: Sequence[Record], **bootstrap: Any) -> dict[str, Any]:
    """Means over prompts (pairs of one prompt averaged first), with intervals.

    accuracy: share of pairs with Δ_w > Δ_l, ½ for a tie and where both are rounding (`STILL`); margin: Δ_w − Δ_l;
    chosen_drift: Δ_w; rejected_drift: Δ_l, in nats.
    """
    rows: dict[str, list[tuple[float, float, float, float]]] = defaultdict(list)
    for ours, theirs in zip(policy, reference, strict=True):
        chosen = ours["chosen_logps"] - theirs["chosen_logps"]
        rejected = ours["rejected_logps"] - theirs["rejected_logps"]
        still = max(abs(chosen), abs(rejected)) <= STILL
        right = 0.5 if still or chosen == rejected else float(chosen > rejected)
        rows[ours["prompt"]].append((right, chosen - rejected, chosen, rejected))
    means = np.array([np.mean(values, axis=0) for values in rows.values()])
    names = ("accuracy", "margin", "chosen_drift", "rejected_drift")
    return {"pairs": len(policy)} | {
        name: mean_interval(means[:, column], **bootstrap).to_json() for column, name in enumerate(names)
    }
