"""How much of two data sets is the same, told from a few numbers that a model's record keeps of what it was trained on.

Bottom-k sketches (Broder 1997; Cohen & Kaplan 2007): of a set, the k least hashes; of two, what their union's k least have in
common estimates |A ∩ B| / |A ∪ B|, exactly where both sets are small. What is counted are responses with their prompts, by their
words alone: a conversation and a text that say the same are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from math import sqrt
from typing import Any

LEAST = 512  # hashes that are kept
DIGITS = 12  # hexadecimal, of a hash: two of a billion agree by chance less than once in a hundred sets


def sketch(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of rows with `prompt`, `chosen` and `rejected`: `{responses, least}`. Which of the two is chosen does not count."""
    found = {_hash(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")}
    return {"responses": len(found), "least": "".join(sorted(found)[:LEAST])}


def shared(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> tuple[float, float]:
    """The estimated share of the smaller set that is in the larger one, too, and its standard error; 0 where one is not known.

    Sets without a common response have a share of 0 without error. Of a set in one a hundred times as large the share is known to
    about ± 0.4 only.
    """
    if not one or not other or not one.get("responses") or not other.get("responses"):
        return 0.0, 0.0
    ours, theirs = (set(_hashes(each["least"])) for each in (one, other))
    both = len(ours) < LEAST and len(theirs) < LEAST
    union = sorted(ours | theirs)[: None if both else LEAST]
    hits = sum(each in ours and each in theirs for each in union)
    alike = hits / len(union)
    count = alike * (one["responses"] + other["responses"]) / (1 + alike)
    share = min(1.0, count / min(one["responses"], other["responses"]))
    return share, 0.0 if both or not hits else share * sqrt((1 - alike) / hits)


def joined(one: Mapping[str, Any], other: Mapping[str, Any] | None) -> dict[str, Any]:
    """The sketch of both sets together; their size is estimated where they are many. other: None where it is not known."""
    if not other or not other.get("responses"):
        return dict(one)
    least = sorted({*_hashes(one["least"]), *_hashes(other["least"])})
    both = shared(one, other)[0] * min(one["responses"], other["responses"])
    size = len(least) if len(least) < LEAST else round(one["responses"] + other["responses"] - both)
    return {"responses": size, "least": "".join(least[:LEAST])}


def _hash(prompt: Any, response: Any) -> str:
    words = "\0".join(" ".join(_words(part).split()) for part in (prompt, response))
    return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()[:DIGITS]


def _words(text: Any) -> str:
    """What is said in a text, or by all messages of a conversation, whoever says it."""
    if isinstance(text, str):
        return text
    if isinstance(text, Mapping):
        return _words(text.get("content", text.get("text", "")))
    return " ".join(map(_words, text)) if isinstance(text, (list, tuple)) else ""


def _hashes(least: str) -> list[str]:
    return [least[i : i + DIGITS] for i in range(0, len(least), DIGITS)]
