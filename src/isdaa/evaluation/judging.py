"""Who says how good an answer is: a judge model behind an endpoint, a reward model, or the embedded world's gold reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from isdaa.data.pairs import TEMPLATE_COLUMNS
from isdaa.evaluation.benchmarks.sets.benchmark import Answer, Benchmark, Judged, JudgeQuestion, Judgment, Question
from isdaa.evaluation.benchmarks.sets.games import MODEL_FIRST, OPPONENT_FIRST, no_reply
from isdaa.evaluation.judges.judge import Judge, NoReply
from isdaa.evaluation.judges.judge import Question as Asked
from isdaa.evaluation.judges.types import Asking
from isdaa.evaluation.records import Lines
from isdaa.evaluation.scorers import Scorer, facts
from isdaa.files import digest
from isdaa.terminal import progress

REPLIES, SCORES = "replies.jsonl", "scores.jsonl"
CHUNK = 256  # responses that a reward model scores between two writes


@dataclass(frozen=True)
class Case:
    """An answer, and what it is compared with. finished: whether the model itself ended it."""

    question: Question
    answer: Answer
    opponent: Answer | None
    finished: bool = True
    opponent_finished: bool = True


class BenchmarkJudge(Protocol):
    """Judges answers. both_orders: whether a case is judged in both orders, so that there is a flip rate."""

    @property
    def name(self) -> str: ...

    @property
    def both_orders(self) -> bool: ...

    def verdicts(self, bench: Benchmark, cases: Sequence[Case]) -> list[tuple[Judgment, ...] | None]:
        """The verdicts on each case; None where not all of its questions were asked."""
        ...

    def to_json(self) -> dict[str, Any]:
        """What `metrics.json` says of the judge."""
        ...


class ModelJudge:
    """A judge model, asked the benchmark's questions."""

    both_orders = True

    def __init__(self, asking: Asking, cache: Path | None) -> None:
        self.asking = asking
        self.judge = Judge(asking.settings, cache)

    @property
    def name(self) -> str:
        """The model's, as the endpoint knows it."""
        return self.judge.name

    def limit(self, question: JudgeQuestion) -> int:
        """Tokens that a reply may have."""
        return self.asking.settings.max_tokens if self.asking.own_max_tokens else question.max_tokens

    def verdicts(self, bench: Benchmark, cases: Sequence[Case]) -> list[tuple[Judgment, ...] | None]:
        """Every request of every case, case by case, so that a spent budget leaves whole cases behind."""
        asked = [bench.judge_questions(case.question, case.answer, case.opponent) for case in cases]
        flat = [question for questions in asked for question in questions]
        with progress("judging", len(flat)) as bar:
            replies = iter(self.judge.ask([self.request(question) for question in flat], bar))
        found: list[tuple[Judgment, ...] | None] = []
        for questions in asked:
            pairs = list(zip(questions, islice(replies, len(questions)), strict=True))
            if any(isinstance(reply, NoReply) and reply.unasked for _, reply in pairs):
                found.append(None)
                continue
            found.append(
                tuple(
                    no_reply(question, reply.reason, reply.kind) if isinstance(reply, NoReply) else bench.parse(question, reply)
                    for question, reply in pairs
                )
            )
        return found

    def request(self, question: JudgeQuestion) -> Asked:
        """The question as the endpoint gets it: the user's own settings stand before the benchmark's."""
        return Asked(
            question.messages,
            temperature=None if self.asking.own_temperature else 0.0,
            max_tokens=None if self.asking.own_max_tokens else question.max_tokens,
            logprobs=question.logprobs if self.asking.logprobs else None,
            of=question.question,
        )

    def to_json(self) -> dict[str, Any]:
        """Name, address, the user's settings, and what it cost in this call."""
        settings = self.asking.settings
        return {
            "kind": "model",
            "name": self.name,
            "base_url": settings.base_url,
            "temperature": settings.temperature if self.asking.own_temperature else "the benchmark's",
            "max_tokens": settings.max_tokens if self.asking.own_max_tokens else "the benchmark's",
            "logprobs": self.asking.logprobs,
            "seed": settings.seed,
            "about": self.judge.about,
            "usage": asdict(self.judge.usage),
        }


class ScorerJudge:
    """A reward, of one answer alone: the higher one is preferred, equal ones are a tie."""

    both_orders = False

    def __init__(self, scorer: Scorer, cache: Path) -> None:
        self.scorer, self.store = scorer, Lines(cache)

    @property
    def name(self) -> str:
        """What the user called the scorer."""
        return self.scorer.name

    def verdicts(self, bench: Benchmark, cases: Sequence[Case]) -> list[tuple[Judgment, ...] | None]:
        """Arena-Hard's files hold two games, so there the one verdict stands in both orders; elsewhere once."""
        ours = [self._row(case.question, case.answer, case.finished) for case in cases]
        theirs = [self._row(case.question, case.opponent, case.opponent_finished) for case in cases if case.opponent is not None]
        scores = self._scores([*ours, *theirs])
        found: list[tuple[Judgment, ...] | None] = []
        for mine, other in zip(scores[: len(ours)], scores[len(ours) :], strict=True):
            value = 0.5 if mine == other else float(mine > other)
            reply = f"{mine:.6g} against the opponent's {other:.6g}"
            if not bench.two_games:
                found.append((Judgment("", value, "hard", reply=reply),))
                continue
            labels = {1.0: ("B>A", "A>B"), 0.0: ("A>B", "B>A"), 0.5: ("A=B", "A=B")}[value]
            orders = zip((OPPONENT_FIRST, MODEL_FIRST), labels, strict=True)
            found.append(tuple(Judgment(game, value, "hard", label, reply=reply) for game, label in orders))
        return found

    def _row(self, question: Question, answer: Answer | None, finished: bool) -> dict[str, Any]:
        response = answer.turns[0] if answer is not None else ""
        row = {"prompt": question.prompt, "response": response, "finished": finished, "facts": question.row.get("facts")}
        row |= {name: question.row[name] for name in TEMPLATE_COLUMNS if question.row.get(name)}
        return row | {"where": question.where, "key": digest([self.scorer.digest, *row.values()])}

    def _scores(self, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """A score each, kept on disk."""
        missing = list({row["key"]: row for row in rows if row["key"] not in self.store}.values())
        with progress("judging", len(missing)) as bar:
            for start in range(0, len(missing), CHUNK):
                part = missing[start : start + CHUNK]
                scores = self.scorer.score(part, bar)
                scored = zip(part, scores, strict=True)
                self.store.add([{"key": row["key"], "score": score, "scorer": self.name} for row, score in scored])
        return [float(self.store[row["key"]]["score"]) for row in rows]

    def to_json(self) -> dict[str, Any]:
        """Name and digest, and where a reward model is read."""
        return {"kind": "reward", **facts(self.scorer)}


def judged(
    bench: Benchmark,
    judge: BenchmarkJudge,
    questions: Sequence[Question],
    case_of: Mapping[str, Callable[[Question], Case | None]],
) -> tuple[dict[str, list[Judged]], int]:
    """Every model's judged answers, and how many questions a spent budget left out.

    case_of: by model, an answer to a question, or None where it has none. Questions come one after the other, each with
    all models, so that what a spent budget leaves is paired.
    """
    cases = [(label, case) for question in questions for label, of in case_of.items() if (case := of(question)) is not None]
    verdicts = judge.verdicts(bench, [case for _, case in cases])
    unasked = {case.question.id for (_, case), said in zip(cases, verdicts, strict=True) if said is None}
    result: dict[str, list[Judged]] = {label: [] for label in case_of}
    for (label, case), said in zip(cases, verdicts, strict=True):
        if said is not None and case.question.id not in unasked:
            result[label].append(Judged(case.question, case.answer, case.opponent, said, judge.name))
    return result, len(unasked)
