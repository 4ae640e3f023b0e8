"""Step three for a judge model: win rates from what it said of each comparison. There are no scores then.

Legend: N prompts, P comparisons a prompt (a checkpoint's sample against each of its opponents).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isdaa.config import EvaluationConfig
from isdaa.errors import UserError
from isdaa.evaluation.answer_notes import LACKS, NOT_SAID, apart
from isdaa.evaluation.records import Blocks, Record
from isdaa.evaluation.statistics import mean_interval
from isdaa.files import digest

JUDGED = "judged.jsonl"  # in the evaluation's folder
JUDGE = "judge"  # `scorer.kind` of a plan whose win rates a judge model gave
ASKED, SAME, LEFT = "asked", "same", "left"  # states of a comparison; same: equal texts, a tie that nobody is asked about


@dataclass(frozen=True)
class Side:
    """One model's samples before the judge. ours, theirs: keys of their blocks; no theirs: the data's chosen responses."""

    key: str  # of the block of what the judge said
    label: str
    ours: tuple[str, ...]
    theirs: tuple[str, ...]

    @property
    def pairs(self) -> list[tuple[str, str | None]]:
        """The comparisons of a prompt, by their blocks; None: the chosen response."""
        return [(one, other) for one in self.ours for other in self.theirs or (None,)]


def sides_of(plan: Record, judge_digest: str) -> list[Side]:
    """What is judged in an evaluation: every checkpoint, and against the chosen responses the reference, too."""
    reference, opponent = plan["reference"], plan["settings"].get("opponent", "reference")
    theirs = tuple(reference["opponents"]) if opponent == "reference" else ()
    named = [(model["label"], (model["samples"],)) for model in plan["models"]]
    named += [] if theirs else [("reference", tuple(reference["opponents"]))]
    labels: dict[tuple[str, ...], str] = {}
    for label, ours in named:
        labels.setdefault(ours, label)  # the same weights are judged once
    more = ["thinking"] if plan["settings"].get("keep_thinking") else []
    return [
        Side(digest([JUDGE, ours, theirs, plan["prompts"], judge_digest, *more]), label, ours, theirs)
        for ours, label in labels.items()
    ]


class JudgedTable:
    """Win rates of the prompts that are judged for all checkpoints (`kept`), so that every comparison is paired.

    A prompt of which one order was not asked, not answered, or could not be read is left out for all of them.
    """

    def __init__(
        self, plan: Record, prompts: Sequence[Record], judged: Blocks, settings: EvaluationConfig, bootstrap: Mapping[str, Any]
    ) -> None:
        if settings.opponent != plan["settings"].get("opponent", "reference"):
            raise UserError(f"{judged.path}: was judged against another opponent; evaluate again with the judge")
        self.settings, self.bootstrap = settings, bootstrap
        self.sides = sides_of(plan, plan["scorer"]["digest"])
        self.own = tuple(plan["reference"]["opponents"])
        self.orders: dict[tuple[str, ...], np.ndarray] = {}  # (N, P, 2) preferences for the model, NaN where there is none
        states, self.lacks = [], Counter[str]()
        self.lacking: dict[str, set[int]] = {}  # reason -> prompts
        for side in self.sides:
            records = judged[side.key]
            shape = len(prompts), len(side.pairs)
            values = [[np.nan if value is None else value for value in record["orders"]] for record in records]
            self.orders[side.ours] = np.array(values, dtype=np.float64).reshape(*shape, 2)
            states.append(np.array([record["state"] for record in records]).reshape(shape))
            for place, record in enumerate(records):
                for lack, value in zip(record.get("lacks") or ["", ""], record["orders"], strict=True):
                    if value is None and record["state"] == ASKED:
                        self.lacks[lack or NOT_SAID] += 1
                        self.lacking.setdefault(lack or NOT_SAID, set()).add(place // len(side.pairs))
        self.states = np.concatenate(states, axis=1)
        self.total = len(prompts)
        whole = np.concatenate(list(self.orders.values()), axis=1)
        self.whole = whole.reshape(self.total, -1, 2)
        self.kept = np.flatnonzero(~np.isnan(self.whole).any(axis=(1, 2)))
        self.unasked = int((self.states == LEFT).any(axis=1).sum())
        if not len(self.kept):
            raise UserError(f"{judged.path}: no prompt is judged for every checkpoint; evaluate again with the judge")

    def _values(self, ours: tuple[str, ...]) -> np.ndarray:
        """(n, P) value of each comparison, the mean of its two orders."""
        found: np.ndarray = self.orders[ours][self.kept].mean(axis=2)
        return np.where(found == 0.5, 0.0, found) if self.settings.ties == "loss" else found

    def _rates(self, ours: tuple[str, ...]) -> np.ndarray:
        rates: np.ndarray = self._values(ours).mean(axis=1)
        return rates

    def policy_rows(self, samples: str) -> tuple[np.ndarray, None]:
        """(n,) win rates of one checkpoint, prompt by prompt, and no scores."""
        return self._rates((samples,)), None

    def reference_rows(self) -> np.ndarray | None:
        """(n,) the reference's own win rate; None where it is not known: ties are losses, and it was not put to the judge."""
        if self.own in self.orders:
            return self._rates(self.own)
        return np.full(len(self.kept), 0.5) if self.settings.ties == "half" else None

    def policy(self, samples: str) -> dict[str, Any]:
        """Of one checkpoint, as `analysis.WinTable` gives it."""
        orders = self.orders[(samples,)][self.kept].mean(axis=2)
        return self._summary(self._rates((samples,)), float((orders == 0.5).mean()))

    def reference(self) -> dict[str, Any]:
        """Of the reference."""
        return self._summary(self.reference_rows(), None)

    def _summary(self, rates: np.ndarray | None, ties: float | None) -> dict[str, Any]:
        found: dict[str, Any] = dict.fromkeys(("win_rate", "win_rate_reference", "win_rate_chosen", "tie_rate", "reward"))
        rate = mean_interval(rates, **self.bootstrap).to_json() if rates is not None else None
        return found | {"win_rate": rate, f"win_rate_{self.settings.opponent}": rate, "tie_rate": ties}

    def counts(self, lengths: Sequence[Sequence[float]] = ()) -> dict[str, Any]:
        """How many prompts and comparisons count, and how often the judge contradicts itself: `judged` of `metrics.json`.

        lengths: of each prompt's answers, in tokens; empty where they are not known.
        """
        dropped = sorted(set().union(*self.lacking.values()))
        reasons = [
            {"lack": lack, "replies": n, "prompts": len(self.lacking[lack]), "tokens": _mean(lengths, self.lacking[lack])}
            for lack, n in self.lacks.items()
        ]
        read = self.whole[(self.states == ASKED) & ~np.isnan(self.whole).any(axis=2)]
        flips = float(((read[:, 0] - 0.5) * (read[:, 1] - 0.5) < 0).mean()) if len(read) else None
        return {
            "prompts": len(self.kept),
            "of": self.total,
            "unasked": self.unasked,
            "unread": self.total - len(self.kept) - self.unasked,
            "comparisons": len(read),
            "same": int((self.states == SAME).sum()),
            "flip_rate": flips,
            "lacks": reasons,
            "dropped_tokens": _mean(lengths, dropped),
            "kept_tokens": _mean(lengths, self.kept.tolist()),
        }

    def notes(self, lengths: Sequence[Sequence[float]] = ()) -> list[str]:
        """What a reader must know of the prompts that are left out, and of the judge, each a sentence."""
        count, lines = self.counts(lengths), []
        if count["unasked"]:
            lines.append(
                f"Judged in part: all numbers are of the {count['prompts']} of {count['of']} prompts that are judged for every "
                "checkpoint; the same command goes on with the others."
            )
        if count["unread"]:
            lines.append(
                f"{count['unread']} of {count['of']} prompts are left out, since a reply of the judge gave no verdict: "
                f"{', '.join(f'{lack} {number}' for lack, number in self.lacks.items())}."
            )
            lines += [f"{lack[:1].upper()}{lack[1:]}: {LACKS[lack]}." for lack in LACKS if lack in self.lacks]
        if (told := apart(count["unread"], count["dropped_tokens"], count["kept_tokens"])) is not None:
            lines.append(f"The answers to prompts that are left out are {told} tokens.")
        if (count["flip_rate"] or 0) > 0.5:
            share = f"{100 * count['flip_rate']:.0f} %"
            lines.append(
                f"The judge contradicts itself on {share} of {count['comparisons']} comparisons when their order is swapped."
            )
        return lines


def _mean(lengths: Sequence[Sequence[float]], places: Collection[int]) -> float | None:
    return float(np.mean([lengths[place] for place in places])) if places and lengths else None
