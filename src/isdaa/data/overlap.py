"""How many pairs two data sets share, told from a few numbers that a model's record keeps of what it was trained on.

Bottom-k sketches (Broder 1997; Cohen & Kaplan 2007): of a set, the k least hashes; of two, what their union's k least have in
common estimates |A ∩ B| / |A ∪ B|, exactly where both sets are small.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

LEAST = 128  # hashes that are kept: a share is known to about ± 4 points
DIGITS = 12  # hexadecimal, of a hash: two of a billion pairs' agree by chance less than once in a hundred sets


def sketch(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of rows with `prompt`, `chosen` and `rejected`: `{pairs, least}`. Which of the two is chosen does not count."""
    found = {_hash(row) for row in rows}
    return {"pairs": len(found), "least": "".join(sorted(found)[:LEAST])}


def shared(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> float:
    """The estimated share of the smaller set's pairs that are in the larger one, too; 0 where one is not known."""
    if not one or not other or not one["pairs"] or not other["pairs"]:
        return 0.0
    ours, theirs = (set(_hashes(each["least"])) for each in (one, other))
    union = sorted(ours | theirs)[:LEAST]
    alike = sum(each in ours and each in theirs for each in union) / len(union)
    both = alike * (one["pairs"] + other["pairs"]) / (1 + alike)
    return min(1.0, both / min(one["pairs"], other["pairs"]))


def joined(one: Mapping[str, Any], other: Mapping[str, Any] | None) -> dict[str, Any]:
    """The sketch of both sets together; their size is estimated where they are many. other: None where it is not known."""
    if not other:
        return dict(one)
    least = sorted({*_hashes(one["least"]), *_hashes(other["least"])})
    both = shared(one, other) * min(one["pairs"], other["pairs"])
    pairs = len(least) if len(least) < LEAST else round(one["pairs"] + other["pairs"] - both)
    return {"pairs": pairs, "least": "".join(least[:LEAST])}


def _hash(row: Mapping[str, Any]) -> str:
    sides = sorted(json.dumps(row[name], sort_keys=True) for name in ("chosen", "rejected"))
    words = json.dumps([row["prompt"], *sides], sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()[:DIGITS]


def _hashes(least: str) -> list[str]:
    return [least[i : i + DIGITS] for i in range(0, len(least), DIGITS)]
