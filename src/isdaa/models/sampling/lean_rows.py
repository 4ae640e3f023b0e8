"""Hidden states of plain (prompt, response) rows from a model's parts (`lean`), where those are known and prove themselves."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from isdaa.models.attention.layout import Layout
from isdaa.models.packed.forward import PairForward
from isdaa.models.packed.patched_forward import evaluating, inner_model
from isdaa.models.sampling.lean import Lean, lean_parts

logger = logging.getLogger(__name__)

Row = tuple[Sequence[int], Sequence[int]]

_CHECKED = 4  # rows that are computed both ways
_WORKS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def lean_states(lean: Lean, rows: Sequence[Row]) -> Tensor:
    """(N, C) states that predict the N response tokens, in the order of the rows. Rows of like length pad each other little."""
    asked = [row for row in rows if row[1]]
    if not asked:
        return lean.like.new_empty(0, lean.width)
    longest = max(len(prompt) + len(response) for prompt, response in asked)
    ids = torch.tensor([[*p, *r, *[r[-1]] * (longest - len(p) - len(r))] for p, r in asked])
    starts, counts = torch.tensor([len(p) - 1 for p, _ in asked]), torch.tensor([len(r) for _, r in asked])
    return lean.states(ids, starts, counts)


@torch.no_grad()
def lean_reader(forward: PairForward, rows: Sequence[Row]) -> Lean | None:
    """The parts of a prepared model in evaluation mode, or None where they are not known or give other states than the model;
    the latter is tried once a model, on a few of the rows, and a warning says so."""
    lean = lean_parts(forward.model)
    few = (
        [rows[i] for i in sorted({i * (len(rows) - 1) // max(1, _CHECKED - 1) for i in range(_CHECKED)}) if rows[i][1]]
        if rows
        else []
    )
    if lean is None or not few:
        return None
    if forward.model not in _WORKS:
        _WORKS[forward.model] = not _error(forward, lean, few) > 1e-3  # NaN is no sign against the parts
        if not _WORKS[forward.model]:
            name = type(inner_model(forward.model)).__name__
            logger.warning("%s: its hidden states are not those of its architecture; its own forward is used", name)
    return lean if _WORKS[forward.model] else None


def _error(forward: PairForward, lean: Lean, rows: Sequence[Row]) -> float:
    """Largest difference of the states, relative to the largest of them."""
    prompts, responses = (torch.tensor([len(row[part]) for row in rows]) for part in (0, 1))
    ids = torch.tensor([token for row in rows for part in row for token in part])
    with evaluating(forward.model):
        expected, _ = forward.predicting_states(forward.model, ids, Layout.of_rows(prompts, responses))
        try:
            found = lean_states(lean, rows)
        except Exception as error:  # whatever a part of unknown make raises, the model's own forward remains
            logger.debug("lean states failed: %s", error)
            return math.inf
    return float((found - expected).abs().max() / expected.abs().max())
