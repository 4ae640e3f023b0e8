"""Scores of lm-eval's tasks and their differences from the reference, paired by item. Pure functions of records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isdaa.errors import UserError
from isdaa.evaluation.statistics import Estimate, Interval, fewest, mean_estimate, percentiles
from isdaa.evaluation.tax.harness import METRIC_OF

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Answers:
    """All items of a task that the user named, under one model; of a group, those of all its tasks."""

    name: str
    headers: Sequence[Record]
    items: Sequence[Record]
    by_size: bool

    @property
    def results(self) -> dict[str, Any]:
        """lm-eval's own results, by task."""
        return {task: result for header in self.headers for task, result in header["results"].items()}

    @property
    def metrics(self) -> list[str]:
        """The metrics that all tasks have, in lm-eval's order, the one to report first."""
        first, *others = (result["metrics"] for result in self.results.values())
        common = [metric for metric in first if all(metric in other for other in others)]
        named = {METRIC_OF.get(task) for task in [self.name, *self.results]}
        return sorted(common, key=lambda metric: metric not in named)

    def higher(self, metric: str) -> bool:
        """Whether more of it is better."""
        return all(result["metrics"][metric]["higher"] for result in self.results.values())

    def by_item(self, metric: str) -> bool:
        """Whether it is a mean over items."""
        return all(result["metrics"][metric]["by_item"] for result in self.results.values())

    def whole(self, metric: str) -> float | None:
        """lm-eval's own value; None for a group of several tasks."""
        values = [result["metrics"][metric]["value"] for result in self.results.values()]
        return values[0] if len(values) == 1 else None

    def weights(self) -> np.ndarray:
        """(N,) weights of items: 1, or such that every task of the group counts the same."""
        sizes = Counter(item["task"] for item in self.items)
        return np.array([1.0 if self.by_size else 1 / sizes[item["task"]] for item in self.items])


def scores(
    tasks: Sequence[Answers], reference: Sequence[Answers] | None, *, bootstrap: int, confidence: float, seed: int
) -> dict[str, Any]:
    """`{"tasks": [...], "mean": {...} or None}` of one model; differences where there is a reference to differ from.

    Items are resampled: those of a group together, whatever their task; those of different tasks independently. The mean is
    over the tasks that the user named, each counting the same, and is left out where not every one is a mean over items of
    something of which more is better. Beside a difference stands `differing`, on how many items the two models differ; of
    the mean, on how many in all, but no more than the smallest task has items.
    """
    entries: list[dict[str, Any]] = []
    figures, gaps = [], []
    for place, answers in enumerate(tasks):
        other = reference[place] if reference is not None else None
        if other is not None:
            _check_pairs(answers, other)
        options = {"resamples": bootstrap, "confidence": confidence, "seed": seed + place}
        measured = {}
        for metric in answers.metrics:
            score = _figure(answers, metric, options)
            base = _figure(other, metric, options) if other is not None else None
            gap = score.minus(base, confidence) if isinstance(score, Estimate) and isinstance(base, Estimate) else None
            if metric == answers.metrics[0]:
                figures.append(score if answers.higher(metric) else None)
                gaps.append(gap if answers.higher(metric) else None)
            measured[metric] = {
                "score": _json(score, len(answers.items)),
                "difference": gap.to_json() if gap is not None else _plain_difference(score, base, len(answers.items)),
                "differing": _differing(answers, other, metric) if gap is not None and other is not None else None,
                "higher_is_better": answers.higher(metric),
            }
        shots = sorted({result["shots"] or 0 for result in answers.results.values()})
        entries.append(
            {
                "task": answers.name,
                "metric": answers.metrics[0],
                "shots": shots[0] if len(shots) == 1 else shots,
                "items": len(answers.items),
                "of": sum(result["of"] for result in answers.results.values()),
                "truncated": any(header["truncated"] for header in answers.headers),
                **measured[answers.metrics[0]],
                "metrics": measured,
            }
        )
    mean = None
    if len(tasks) > 1 and all(isinstance(figure, Estimate) for figure in figures):
        difference = _mean(gaps, confidence) if reference is not None else None
        differing = None
        if difference is not None:
            differing = min(sum(entry["differing"] for entry in entries), *(entry["items"] for entry in entries))
        mean = {"score": _mean(figures, confidence), "difference": difference, "differing": differing}
    return {"tasks": entries, "mean": mean}


def sentence(label: str, measured: Record, confidence: float = 0.95) -> str:
    """What the numbers say of one model, in a sentence."""
    entries = measured["tasks"]
    signs = {entry["task"]: clear(entry, confidence) for entry in entries}
    lost, won = ([task for task, sign in signs.items() if sign == wanted] for wanted in (-1, 1))
    found = []
    if measured["mean"] is not None:
        found.append(f"{signed(measured['mean']['difference'])} over {len(entries)} tasks")
    elif len(entries) == 1:
        found.append(f"{signed(entries[0]['difference'])} on {entries[0]['task']}")
    found.append(f"worse on {', '.join(lost)}" if lost else "clearly worse on none")
    if won:
        found.append(f"better on {', '.join(won)}")
    return f"alignment tax of {label}: {'; '.join(found)}"


def clear(measured: Record, confidence: float = 0.95) -> int:
    """-1 where a model lost beyond chance, 1 where it gained; 0 where the interval of its difference contains zero.

    measured: `difference`, `differing` and, where less may be better, `higher_is_better`. Where fewer items differ than a
    sign test needs (`statistics.fewest`), or there is no interval, it is 0, too.
    """
    difference = measured["difference"]
    if difference is None or difference["low"] is None or difference["low"] <= 0 <= difference["high"]:
        return 0
    if (measured.get("differing") or 0) < fewest(confidence):
        return 0
    return 1 if (difference["mean"] > 0) == measured.get("higher_is_better", True) else -1


def signed(difference: Record | None) -> str:
    """`-0.012 ± 0.008`; the number alone without an interval; empty where there is none."""
    if difference is None:
        return ""
    mean = f"{difference['mean']:+z.3f}"
    return mean if difference["low"] is None else f"{mean} ± {(difference['high'] - difference['low']) / 2:.3f}"


def _figure(answers: Answers, metric: str, options: Mapping[str, Any]) -> Estimate | float | None:
    """An estimate with draws where the metric is a mean over items; else lm-eval's own value, if there is one."""
    if metric not in answers.metrics:
        return None
    if not answers.by_item(metric):
        return answers.whole(metric)
    return mean_estimate([item["values"][metric] for item in answers.items], answers.weights(), **options)


def _differing(one: Answers, other: Answers, metric: str) -> int:
    pairs = zip(one.items, other.items, strict=True)
    return sum(ours["values"][metric] != theirs["values"][metric] for ours, theirs in pairs)


def _json(score: Estimate | float | None, items: int) -> dict[str, Any] | None:
    if score is None:
        return None
    return score.to_json() if isinstance(score, Estimate) else Interval(score, None, None, items).to_json()


def _plain_difference(score: Estimate | float | None, base: Estimate | float | None, items: int) -> dict[str, Any] | None:
    """The difference of metrics that are no means over items, without an interval."""
    if not isinstance(score, float) or not isinstance(base, float):
        return None
    return Interval(score - base, None, None, items).to_json()


def _mean(figures: Sequence[Estimate | float | None], confidence: float) -> dict[str, Any] | None:
    """The mean over tasks, whose items were drawn independently of each other's."""
    known = [figure for figure in figures if isinstance(figure, Estimate)]
    if len(known) != len(figures):
        return None
    value = float(np.mean([figure.value for figure in known]))
    draws = np.mean([figure.draws for figure in known], axis=0)
    smallest = min(figure.interval.n for figure in known)
    found = percentiles(value, draws, smallest, confidence)
    return Interval(value, found.low, found.high, sum(figure.interval.n for figure in known)).to_json()


def _check_pairs(one: Answers, other: Answers) -> None:
    """Raises UserError where two models were not asked the same."""
    asked = [[(item["task"], item["item"], item["doc"]) for item in answers.items] for answers in (one, other)]
    if asked[0] != asked[1]:
        raise UserError(
            f"{one.name}: its data changed since the reference was asked, so models cannot be compared by item; move the "
            "evaluation's tax.jsonl away and run this again"
        )
