"""The rows that `reward` and `align` train on, as text: read, divided into trained and held out, and counted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from isdaa.config import Config
from isdaa.data.pairs import Counts
from isdaa.data.reading.sources import common_prompts, hold_out, load_pairs


@dataclass(frozen=True)
class PairRows:
    """Canonical pairs (`data.reading.sources.load_pairs`). held: None where nothing is held out; common: prompts in both sets."""

    rows: Any
    counts: Counts
    held: Any | None
    held_counts: Counts
    common: int = 0


def read_pairs(config: Config, source: str) -> PairRows:
    """Pairs of a source, as `align` and `reward` divide them: `data.eval_pairs` is held out, else a share of the prompts."""
    data = config.data
    rows, counts = load_pairs(source, data.pairs_split, limit=data.limit, repeated=data.prompt_repeated)
    held_source = data.source("eval_pairs")
    if held_source is not None:
        held, held_counts = load_pairs(held_source, data.eval_split, limit=data.limit, repeated=data.prompt_repeated)
        return PairRows(rows, counts, held, held_counts, common_prompts(rows, held))
    rows, held = hold_out(rows, config.data.eval_fraction, config.seed)
    size = len(held) if held is not None else 0
    return PairRows(rows, replace(counts, rows=counts.rows - size), held, Counts(rows=size))
