"""What a reader must know of answers and verdicts: thinking that is left out, and questions without a verdict, by reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from isdaa.evaluation.benchmarks.sets.benchmark import Answer, Judged, counted
from isdaa.evaluation.benchmarks.sets.games import waits
from isdaa.evaluation.fragments import percent
from isdaa.evaluation.judges.replies import Parts
from isdaa.evaluation.judges.types import MOMENTARY, Lack

# What a reason means, and what mends it; nothing where asking again is all there is to do.
LACKS: dict[Lack, str] = {
    "refused": "the judge, or its endpoint's filter, refused to answer",
    "too long": "the question did not fit the judge's context",
    "rate-limited": "the endpoint took no more requests",
    "no answer": "the endpoint gave no reply, or none that could be used",
    "broken off": "the reply broke off on its way",
    "cut": "the reply ended at its limit: raise --judge_max_tokens, these alone are asked again",
    "thought only": "the judge thought and did not answer: turn its thinking off, or take another one",
    "unreadable": "the reply says no verdict",
    "rejected": "the endpoint did not take the request, in words that isdaa does not know",
    "no text": "the reply has no text: it is empty, or calls a tool",
}
NOT_SAID = "not said"  # the reason of a file that gives none
APART, FEWEST = 1.5, 3  # mean lengths of dropped and kept answers that differ by this factor are told, from so many dropped on


def thinking_of(parts: Sequence[Parts]) -> dict[str, Any] | None:
    """The share of thinking in what was written, by characters; None without any.

    only: answers that are thinking alone; unfinished: those of them whose thought does not end.
    """
    marked = [one for one in parts if one.marked]
    thought, written = sum(len(one.thinking) for one in parts), sum(len(one.thinking) + len(one.answer) for one in parts)
    only = [one for one in marked if not one.answer.strip()]
    if not marked:
        return None
    share, unfinished = thought / written if written else 0.0, sum(one.unfinished for one in only)
    return {"share": share, "answers": len(marked), "only": len(only), "unfinished": unfinished}


def thinking_remarks(told: Mapping[str, Any] | None) -> list[str]:
    """The same in words. told: a model's answers in numbers, of `metrics.json`."""
    found = (told or {}).get("thinking")
    if told is None or found is None:
        return []
    kept = "is judged and counted, too" if found.get("kept") else "is neither judged nor counted as length"
    lines = [f"thinking is {percent(found['share'])} of the characters of its answers, and {kept}"]
    if found["only"]:
        way = "raise --max_new_tokens, or --keep_thinking where these are the answers"
        those = "all" if found["unfinished"] == found["only"] else found["unfinished"]
        cut = f", {those} of them without an end: {way}" if found["unfinished"] else ""
        lines.append(f"{found['only']} of {told['turns']} answers are thinking alone{cut}")
    return lines


def lacks_of(judged: Sequence[Judged]) -> dict[str, Any] | None:
    """Why questions have no verdict: replies, questions and their answers' mean length by reason; None where all have one.

    characters: of the model's answer, the mean of its turns. dropped, kept: of questions that lack a verdict, and of others.
    """
    lacking = [one for one in judged if any(verdict.value is None for verdict in one.verdicts)]
    if not lacking:
        return None
    rows = []
    for lack in (*get_args(Lack), ""):
        said = [(one, n) for one in judged if (n := sum(v.value is None and v.lack == lack for v in one.verdicts))]
        if said:
            row = {"lack": lack or NOT_SAID, "replies": sum(n for _, n in said), "questions": len(said)}
            rows.append(row | {"characters": mean_length([one.answer for one, _ in said])})
    kept = [one for one in judged if one not in lacking]
    return {
        "reasons": rows,
        "questions": len(lacking),
        "waiting": sum(map(waits, lacking)),
        "dropped_characters": mean_length([one.answer for one in lacking]),
        "kept_characters": mean_length([one.answer for one in kept]),
    }


def mean_length(answers: Sequence[Answer]) -> float | None:
    """Mean characters a turn; None where no text is known."""
    known = [sum(map(len, one.turns)) / len(one.turns) for one in answers if one.turns]
    return sum(known) / len(known) if known else None


def lack_remarks(lacks: Mapping[str, Any] | None) -> list[str]:
    """The reasons in words, and whether leaving these questions out may bias the result."""
    if lacks is None:
        return []
    reasons = ", ".join(f"{row['lack']} {row['replies']:,}" for row in lacks["reasons"])
    lines = [f"without a verdict: {reasons}"]
    told = apart(lacks["questions"], lacks["dropped_characters"], lacks["kept_characters"])
    return lines + ([f"its answers to questions that are left out are {told} characters"] if told is not None else [])


def apart(count: int, dropped: float | None, kept: float | None) -> str | None:
    """In words, that `count` dropped answers differ in mean length from those kept, which may bias the result; None else."""
    if count < FEWEST or not dropped or not kept or 1 / APART < dropped / kept < APART:
        return None
    than, others = ("longer", "short") if dropped > kept else ("shorter", "long")
    return f"{than}, so the figures are of {others} ones more than of all: in the mean {dropped:,.0f} against {kept:,.0f}"


def meanings(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each reason means for which some model of `metrics.json` lacks a verdict."""
    found = {row["lack"] for model in models for row in (model.get("lacks") or {"reasons": ()})["reasons"]}
    told = [*LACKS.items(), (NOT_SAID, "the file has no verdict there, and no reason")]
    return [f"{lack}: {meaning}" for lack, meaning in told if lack in found]


def waiting(lacks: Sequence[Mapping[str, Any] | None]) -> str:
    """A sentence on replies that did not come for a passing reason; empty without any."""
    found: dict[str, int] = {}
    for row in (row for lack in lacks if lack is not None for row in lack["reasons"] if row["lack"] in MOMENTARY):
        found[row["lack"]] = found.get(row["lack"], 0) + row["replies"]
    return awaited(found)


def awaited(found: Mapping[str, int]) -> str:
    """The sentence of `waiting`. found: replies by passing reason."""
    if not found:
        return ""
    reasons = ", ".join(f"{lack} {count:,}" for lack, count in found.items())
    return f"{counted(sum(found.values()), 'reply', 'replies')} did not come ({reasons}): the same command asks for them again"
