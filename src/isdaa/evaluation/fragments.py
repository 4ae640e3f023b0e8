"""Responses that the limit on new tokens cut: win rate and KL of such fragments are not those of whole responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# The share of cut responses from which on a warning stands beside the numbers. Where the cut turns a sure win or loss into the
# toss of a coin, half a comparison, a tenth of fragments moves a win rate by 0.05, and a fall below 0.05 is called none
# (`fall_statistics.NEGLIGIBLE`). Below it the share stands in its column.
MANY = 0.1


def many(share: float | None) -> bool:
    """Whether so large a share of cut responses is worth a warning."""
    return share is not None and share > MANY


def percent(share: float) -> str:
    """`3 %`; `<1 %` where it is small but not zero."""
    return "<1 %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def is_fragmentary(metrics: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether a model's win rate (or the reference's own) is one of fragments: its responses, or those of its opponent."""
    opponent = metrics["reference"]["truncated"] if metrics["opponent"] == "reference" else None
    return many(entry["truncated"]) or many(opponent)


def warnings_of(metrics: Mapping[str, Any]) -> list[str]:
    """What an evaluation (`metrics.json`) has to say of cut responses, a sentence at most; nothing where they are few."""
    models = [share for model in metrics["models"] if (share := model["truncated"]) is not None]
    own = [share for share in [metrics["reference"]["truncated"]] if share is not None]
    kl = [model["kl"].get("truncated") or 0.0 for model in metrics["models"]]
    limit = metrics["settings"].get("max_new_tokens")
    if any(map(many, [*models, *own])):
        judged = (metrics["scorer"] or {}).get("kind") == "judge"  # which gives no scores
        what = "length and repetition" if metrics["scorer"] is None else "win rate and length" if judged else "win rate and score"
        what += " are of fragments"
        what += ", and KL counts tokens up to that limit only" if any(map(many, kl)) else ""
        cut = {"the checkpoints' responses": models, "the reference's": own}
    elif any(map(many, kl)):
        what, cut = "KL counts tokens up to that limit only", {"the samples for KL": kl}
    else:
        return []
    return [warning(cut, what, "evaluation.max_new_tokens", limit)]


def warning(cut: Mapping[str, Sequence[float]], what: str, setting: str, limit: int | None) -> str:
    """`label.max_new_tokens (64) cut 78 % of its responses: …; give --label.max_new_tokens 128; …`.

    cut: whose -> shares of cut responses, of which the smallest and the largest are told. what: it means. setting: dotted.
    """
    told = " and ".join(f"{_range(shares)} of {whose}" for whose, shares in cut.items() if shares)
    place, more = (setting, f"a larger --{setting}") if limit is None else (f"{setting} ({limit})", f"--{setting} {2 * limit}")
    return f"{place} cut {told}: {what}; give {more}; if many are still cut then, the model has not learnt to end"


def _range(shares: Sequence[float]) -> str:
    low, high = percent(min(shares)), percent(max(shares))
    return high if low == high else f"{low.removesuffix(' %')} to {high}"
