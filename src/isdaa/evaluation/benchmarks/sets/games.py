"""Two responses before a judge, in both orders: what the verdicts say together."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from isdaa.errors import UserError
from isdaa.evaluation.benchmarks.sets.benchmark import (
    Answer,
    Judged,
    JudgeQuestion,
    Judgment,
    Question,
    Reply,
    counted,
    prompt_text,
)
from isdaa.evaluation.judges.replies import split
from isdaa.evaluation.judges.types import MOMENTARY, Lack

STOPS_END = 200  # characters
_STOPS = re.compile(r"(?:\s*(?:</s>|<eos>|<end_of_turn>|<turn\|>|<[|｜][\w▁]+[|｜]>))+\s*\Z")  # that a server left in
_ENDS = re.compile(r"([\n\r\v\f\x1c-\x1e\x85\u2028\u2029])")
_BLANK = r"[\s\u200b-\u200d\u2060\ufeff]*"  # white space, and characters that take no room
_OPENS, _CLOSES = re.compile(rf"^({_BLANK})<<<"), re.compile(rf">>>(?={_BLANK}$)")

# What stands before a grade or label in brackets that is not given, is quoted as an example, or is given only in part.
_RULED_OUT = re.compile(
    r"(?:\b(?:not|never|than|instead of|nor|out of|maximum(?: of)?|could be|might be|may be|would be|"
    r"(?:could|would) have been)|n['’]t|"
    r"\b(?:for example|for instance|such as|like|in the form|example)|\be\.g\.)[:,]?"
    r"(?: (?:give|be|is|a|an|the|it|grade|rating|score|of|worth|deserve|quite|award|say|choose|pick|reach))*[\s*_\"'`“(]*\Z",
    re.IGNORECASE,
)
_TOO_MUCH = re.compile(r"[\s*_\"'`”)]*(?:(?:would|is|seems)(?: be)? (?:too|not|for)|isn['’]t)\b", re.IGNORECASE)
_INDEXED = re.compile(r"(?:\w\(|[A-Za-z0-9)\]])(?<!grade)(?<!rating)(?<!score)\Z", re.IGNORECASE)  # `x[[3]]`, `array([[3]])`
JOINED = re.compile(r"[\s*\"'`]*(?:or|and|to|of|out of|vs\.?|/|,|–|—|-)[\s*\"'`]*", re.IGNORECASE)
_DOUBLE = [(re.compile(r"\\?\[\\?\["), "[["), (re.compile(r"\\?\]\\?\]"), "]]")]

OPPONENT_FIRST, MODEL_FIRST = "opponent first", "model first"
PLACES = ("prompt", "first", "second")  # in a judge's question, of what is put in


def inside(text: str) -> str:
    """The text as it stands between markers: a line of its own that would open or close one (`<<<`, `>>>`) is broken up.

    So a response cannot close its part of the judge's question and go on with instructions. A carriage return and Unicode's
    separators end a line, too. Everything else stays, such as Python's `>>> ` prompts and shifts within a line.
    """
    return "".join(_CLOSES.sub(">> >", _OPENS.sub(r"\1< <<", part)) for part in _ENDS.split(text))


def in_both_orders(
    question: Question,
    answer: Answer,
    opponent: Answer | None,
    system: str,
    user: str | Callable[[str, str, str], str],
    template: str,
    max_tokens: int,
    logprobs: int | None = None,
) -> list[JudgeQuestion]:
    """A comparison's two requests: the opponent's response first, then the model's.

    user: what the judge is asked of a prompt and two responses: a text with `{prompt}`, `{first}` and `{second}`, or a
    function of the three. Raises UserError where there is no opponent.
    """
    if opponent is None:
        raise UserError(f"{question.where}: nothing to compare the answer with; give the opponent's answers")
    asked = []
    for game, sides in ((OPPONENT_FIRST, (opponent, answer)), (MODEL_FIRST, (answer, opponent))):
        parts = (prompt_text(question), *(side.turns[0] for side in sides))
        told = user(*parts) if callable(user) else user.format(**dict(zip(PLACES, map(inside, parts), strict=True)))
        messages = ({"role": "system", "content": system}, {"role": "user", "content": told})
        asked.append(JudgeQuestion(question.id, game, messages, template, max_tokens, logprobs=logprobs))
    return asked


def preference(judged: Judged) -> float:
    """The mean preference for the model over the orders that were asked; NaN where one could not be read.

    One order alone would carry the judge's liking for a place into the figure.
    """
    values = [verdict.value for verdict in judged.verdicts]
    read = [value for value in values if value is not None]
    return sum(read) / len(read) if read and len(read) == len(values) else math.nan


def flipped(judged: Judged) -> bool | None:
    """Whether the two orders prefer different responses; None where there are not two readable verdicts. A tie is no flip."""
    read = [verdict.value for verdict in judged.verdicts if verdict.value is not None]
    return (read[0] - 0.5) * (read[1] - 0.5) < 0 if len(read) == 2 else None


def flip_rate(judged: Sequence[Judged]) -> float | None:
    """Share of the questions judged in both orders whose two verdicts contradict each other."""
    flips = [flip for flip in map(flipped, judged) if flip is not None]
    return sum(flips) / len(flips) if flips else None


def counts(judged: Sequence[Judged]) -> dict[str, int]:
    """How many questions, replies, unread replies, questions left out for these, soft and hard votes."""
    verdicts = [verdict for one in judged if not missing(one) for verdict in one.verdicts]
    return {
        "questions": len(judged),
        "replies": len(verdicts),
        "unparsed": sum(verdict.value is None for verdict in verdicts),
        "left_out": sum(any(verdict.value is None for verdict in one.verdicts) or not one.verdicts for one in judged),
        "soft": sum(verdict.kind == "soft" for verdict in verdicts),
        "hard": sum(verdict.kind == "hard" for verdict in verdicts),
    }


def notes(count: dict[str, int], flips: float | None = None) -> list[str]:
    """What a reader must know of the counts."""
    lines = []
    if count["unparsed"]:
        lines.append(
            f"{count['unparsed']} of {counted(count['replies'], 'reply', 'replies')} gave no verdict; "
            f"{count['left_out']} of {counted(count['questions'], 'question')} left out"
        )
    if count["hard"] and count["soft"]:
        lines.append(
            f"{counted(count['hard'], 'vote')} hard, {count['soft']} soft: without log-probabilities a vote is a win or a loss"
        )
    if flips is not None and flips > 0.5:
        lines.append(f"the judge contradicts itself on {100 * flips:.0f} % of the questions when the order is swapped")
    return lines


def oriented(share_of_second: float, game: str) -> float:
    """Preference for the model, from the preference for the response in the second place."""
    return share_of_second if game == OPPONENT_FIRST else 1 - share_of_second


def no_reply(asked: JudgeQuestion, reason: str, lack: Lack) -> Judgment:
    """The verdict on a question that the judge never answered: counted with the replies that could not be read."""
    return Judgment(asked.game, None, "unparsed", reply=reason, messages=asked.messages, template=asked.template, lack=lack)


def heard(reply: Reply) -> tuple[str, Lack | Literal[""]]:
    """(the judge's answer without its thinking; why that can be no verdict, empty where it may be one)."""
    parts = split(reply.text, reply.thinking)
    answer = parts.answer[:-STOPS_END] + _STOPS.sub("", parts.answer[-STOPS_END:])
    if reply.finish_reason == "length":
        return answer, "cut"
    return answer, "" if answer.strip() else "thought only" if parts.marked else "unreadable"


def given(found: re.Match[str]) -> bool:
    """Whether a grade or label in brackets is given: not ruled out, no example, and no index of code."""
    before = found.string[max(found.start() - 80, 0) : found.start()]
    behind = found.string[found.end() : found.end() + 40]
    return not (_RULED_OUT.search(before) or _INDEXED.search(before) or _TOO_MUCH.match(behind))


def bracketed(text: str) -> str:
    """The text, its double brackets without the backslashes that Markdown may put before them."""
    for pattern, plain in _DOUBLE:
        text = pattern.sub(plain, text)
    return text


def preferred(game: str, reply: Reply, share: float | None, lack: Lack | Literal[""], label: str = "") -> Judgment:
    """A hard vote for the second response, by its share; none where there is a lack, or no share."""
    if lack or share is None:
        return unparsed(game, reply.text or reply.thinking, lack or "unreadable")
    return Judgment(game, oriented(share, game), "hard", label, reply=reply.text)


def unparsed(game: str, reply: str, lack: Lack | Literal[""] = "unreadable") -> Judgment:
    """A reply that says nothing that counts; lack: empty where a file has no verdict and no reason."""
    return Judgment(game, None, "unparsed", reply=reply, lack=lack)


def waits(judged: Judged) -> bool:
    """Whether a reply did not come for a reason that passes, so that the question is not judged yet."""
    return any(verdict.lack in MOMENTARY for verdict in judged.verdicts)


NO_ANSWER = "no answer in the file: counted as lost"


def lost(judged: Judged, both: bool) -> Judged:
    """An answer that a file lacks, where that counts as lost. both: whether files of the benchmark hold two games."""
    orders = ((OPPONENT_FIRST, "A>B"), (MODEL_FIRST, "B>A")) if both else (("", ""),)
    verdicts = tuple(Judgment(game, 0.0, "hard", label, reply=NO_ANSWER) for game, label in orders)
    return replace(judged, verdicts=verdicts)


def missing(judged: Judged) -> bool:
    """Whether there was no answer to judge."""
    return any(verdict.reply == NO_ANSWER for verdict in judged.verdicts)


GAME_KEYS = ("game", "value", "kind", "label", "reply", "template")


def game_row(verdict: Judgment) -> dict[str, Any]:
    """One order's verdict in a file of isdaa's own."""
    return {key: getattr(verdict, key) for key in GAME_KEYS} | ({"lack": verdict.lack} if verdict.lack else {})


def read_game(row: Mapping[str, Any] | None, where: str) -> Judgment:
    """The verdict that `game_row` wrote; keys that it does not write are not looked at."""
    row = row or {}
    value, kind = row.get("value"), row.get("kind")
    sound = value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1)
    if not sound or (kind == "unparsed") != (value is None) or kind not in ("soft", "hard", "unparsed"):
        raise UserError(
            f"{where}: one order has value {value!r} and kind {kind!r}; it must be a value from 0 to 1 with kind soft or "
            "hard, or null with kind unparsed"
        )
    game, label, reply, template = (str(row.get(key) or "") for key in ("game", "label", "reply", "template"))
    lack: Lack | Literal[""] = next((lack for lack in get_args(Lack) if value is None and lack == row.get("lack")), "")
    return Judgment(game, None if value is None else float(value), kind, label, reply=reply, template=template, lack=lack)
