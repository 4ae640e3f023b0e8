"""What a benchmark is: questions to answer, answers to judge, replies to read, verdicts to score.

Data and pure functions alone: nothing here asks a model. A `Benchmark` tells whoever does (a sampler, a judge's client)
what to ask, and what the replies are worth:

    read_questions -> next_prompt -> [a model answers] -> judge_questions -> [a judge replies] -> parse -> score
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from isdaa.data.checks import Text
from isdaa.data.conversation import conversation_text, turns_of
from isdaa.errors import UserError
from isdaa.evaluation.benchmarks.sets.length_control import Gamed
from isdaa.evaluation.judges.replies import Parts
from isdaa.evaluation.judges.types import Lack
from isdaa.evaluation.statistics import Estimate
from isdaa.files import write_json, write_jsonl

Row = Mapping[str, Any]
ChatMessage = dict[str, str]


@dataclass(frozen=True)
class Question:
    """What is to be answered. `row` is the file's own, kept so that writing loses no key; `where` is its 'file:row'."""

    id: str
    prompt: Text  # text to continue, or chat messages to answer
    follow_ups: tuple[str, ...] = ()  # what the user says after each answer
    category: str = ""
    references: tuple[str, ...] = ()  # a right answer a turn, for the judge
    response: str | None = None  # the data set's own response, where it is the opponent
    responder: str = "the data's response"  # whose that response is
    where: str = ""
    row: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """One model's answer, a text a turn. tokens: of the last turn, or None where nobody counted.

    parts: thinking and answer of each turn, where that was looked at.
    """

    question: str
    model: str
    turns: tuple[str, ...]
    tokens: int | None = None
    where: str = ""
    row: Row = field(default_factory=dict)
    parts: tuple[Parts, ...] = ()


@dataclass(frozen=True)
class Generation:
    """How a benchmark wants its questions answered. top_k is always off; there is no system prompt."""

    max_new_tokens: int
    temperature: float
    by_category: Mapping[str, float] = field(default_factory=dict)
    top_p: float = 1.0

    def temperature_of(self, question: Question) -> float:
        """0 means greedy."""
        return self.by_category.get(question.category, self.temperature)


@dataclass(frozen=True)
class JudgeQuestion:
    """One request to a judge.

    game: which of the requests about an answer it is; logprobs: how many alternatives of the first token are wanted.
    """

    question: str
    game: str
    messages: tuple[ChatMessage, ...]
    template: str
    max_tokens: int
    logprobs: int | None = None


class ReadQuestions(Protocol):
    """Questions of a local path, a Hub name or `project`: the questions that come with isdaa."""

    def __call__(self, source: str, split: str | None = None, limit: int | None = None) -> list[Question]: ...


class Reply(Protocol):
    """What a judge says (`judge_types.Reply`).

    first_token_logprobs: log-probability of each first token that the endpoint names, or None.
    """

    @property
    def text(self) -> str: ...

    @property
    def thinking(self) -> str: ...

    @property
    def finish_reason(self) -> str | None: ...

    @property
    def first_token_logprobs(self) -> Mapping[str, float] | None: ...


@dataclass(frozen=True)
class Judgment:
    """What a reply says: a preference for the model in [0, 1], or a grade. `value` is None where there is none.

    lack: why there is none; empty where there is one, or where a file does not say.

    kind: `soft` from log-probabilities, `hard` from a sampled word, `grade`; weight: how many votes it counts; messages
    and template: what was asked, for the original tool's files; row: of the file it was read from.
    """

    game: str
    value: float | None
    kind: Literal["soft", "hard", "grade", "unparsed"]
    label: str = ""
    weight: float = 1.0
    reply: str = ""
    messages: tuple[ChatMessage, ...] = ()
    template: str = ""
    row: Row = field(default_factory=dict)
    lack: Lack | Literal[""] = ""


@dataclass(frozen=True)
class Judged:
    """A question, its answer, what the answer is compared with, and every verdict on it; row: of the file, where read."""

    question: Question
    answer: Answer
    opponent: Answer | None
    verdicts: tuple[Judgment, ...]
    judge: str = ""
    row: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Scoring:
    """How verdicts become figures. gamed: what AlpacaEval's length control needs. Intervals resample questions, by the seed."""

    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0
    gamed: Gamed | None = None

    def drawn(self) -> dict[str, Any]:
        """The arguments that every figure's function takes."""
        return {"resamples": self.resamples, "confidence": self.confidence, "seed": self.seed}


@dataclass(frozen=True)
class Score:
    """One model's result: figures by name, of which `headline` is the benchmark's own; counts; notes a reader must see.

    remarks: notes on the result as a whole, said once however many models there are.
    by_question: each question's share of the headline's uncontrolled form, by id: the unit that intervals resample.
    """

    headline: str
    figures: Mapping[str, Estimate]
    counts: Mapping[str, int]
    by_question: Mapping[str, float]
    details: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def decided(self) -> int:
        """How many questions have a verdict that is no draw; of grades, all that could be read."""
        return sum(value != 0.5 for value in self.by_question.values())

    def to_json(self) -> dict[str, Any]:
        """What `metrics.json` holds."""
        return {
            "headline": self.headline,
            "figures": {name: figure.to_json() for name, figure in self.figures.items()},
            "counts": dict(self.counts),
            "judged": len(self.by_question),
            "decided": self.decided,
            "details": dict(self.details),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Benchmark:
    """A benchmark by its functions. Files are those of the original tool; every reader raises UserError for a bad row.

    opponent: what an answer is compared with: `file` another model's answers, `data` the data set's response (or a
    file), None nothing. source: of the questions, where the user names none. baselines: which model is the opponent of
    a category, where the file of opponents holds several. answer_row, judgment_rows: rows of the files that are written.
    read_reply: which request it answers (`JudgeQuestion.game`) and the reply -> verdict. score: judged answers by model ->
    score by model; models are scored together since some formulas pool them. two_games: files hold a verdict of each order,
    whoever judged. suffix: of the files that are written.
    """

    name: str
    title: str
    generation: Generation
    opponent: Literal["file", "data"] | None
    source: str
    read_questions: ReadQuestions
    read_answers: Callable[[str | Path, Sequence[Question]], list[Answer]]
    answer_row: Callable[[Question, Answer], dict[str, Any]]
    judge_questions: Callable[[Question, Answer, Answer | None], list[JudgeQuestion]]
    read_reply: Callable[[str, Reply], Judgment]
    score: Callable[[Mapping[str, Sequence[Judged]], Scoring], dict[str, Score]]
    judgment_rows: Callable[[Judged], list[dict[str, Any]]]
    read_judgments: Callable[[str | Path, Sequence[Question], Sequence[Answer]], dict[str, list[Judged]]]
    baselines: Mapping[str, str] = field(default_factory=dict)
    two_games: bool = False
    suffix: Literal[".json", ".jsonl"] = ".jsonl"

    def parse(self, asked: JudgeQuestion, reply: Reply) -> Judgment:
        """What a reply says, with what was asked beside it."""
        return replace(self.read_reply(asked.game, reply), messages=asked.messages, template=asked.template)

    def write_answers(self, path: str | Path, questions: Sequence[Question], answers: Sequence[Answer]) -> None:
        """Answers in the original tool's format; keys that a file brought along stay."""
        by_id = {question.id: question for question in questions}
        self._write(path, [self.answer_row(by_id[answer.question], answer) for answer in answers])

    def write_judgments(self, path: str | Path, judged: Sequence[Judged]) -> None:
        """Judgments in the original tool's format; keys that a file brought along stay."""
        self._write(path, [row for one in judged for row in self.judgment_rows(one)])

    def _write(self, path: str | Path, rows: list[dict[str, Any]]) -> None:
        if self.suffix == ".json":
            write_json(path, rows)
        else:
            write_jsonl(path, rows)

    def opponents(
        self, questions: Sequence[Question], answers: Sequence[Answer] = (), lacking: str = "error"
    ) -> dict[str, Answer | None]:
        """What each question's answer is compared with, by question id; `answers`: of the opponents' file, where there is one.

        lacking: `skip` leaves out questions that have no opponent. Raises UserError where one has none otherwise.
        """
        if self.opponent is None:
            return {question.id: None for question in questions}
        models = sorted({answer.model for answer in answers})
        by_key = {(answer.question, answer.model): answer for answer in answers}
        found: dict[str, Answer | None] = {}
        for question in questions:
            wanted = models[0] if len(models) == 1 else self.baselines.get(question.category, "")
            opponent = by_key.get((question.id, wanted))
            if not answers and self.opponent == "data" and question.response is not None:
                opponent = Answer(question.id, question.responder, (question.response,))
            if opponent is None and lacking == "skip" and (wanted in models or question.category in self.baselines):
                continue
            if opponent is None:
                raise UserError(
                    f"{question.where}: nothing to compare an answer to question {question.id} with; "
                    + self._wanted(wanted, models)
                    + ("; where it has none, nobody lost: --missing loss is not possible" if lacking == "loss" else "")
                )
            found[question.id] = opponent
        return found

    def _wanted(self, opponent: str, models: Sequence[str]) -> str:
        """What to do where a question has no opponent among the models that answered."""
        if len(models) > 1 and not opponent:
            return f"the answers are of {', '.join(models)}: give those of one model alone"
        known = f"its opponent is {opponent}, the answers are of {', '.join(models)}; " if len(models) > 1 else ""
        return (
            f"{known}give answers of the opponent to every question of {self.name}, or leave such questions out: --missing skip"
        )


def each(score: Callable[[Sequence[Judged], Scoring], Score]) -> Callable[..., dict[str, Score]]:
    """`Benchmark.score` of a benchmark that scores every model by itself."""
    return lambda judged, scoring: {model: score(answers, scoring) for model, answers in judged.items()}


def counted(number: int, one: str, more: str | None = None) -> str:
    """`1 question`, `2 questions`; more: the plural, where it is not `one` with an s."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def next_prompt(question: Question, answers: Sequence[str]) -> Text | None:
    """What a model is asked after it gave `answers`: text, or the conversation so far; None when all is answered."""
    if not answers:
        return question.prompt
    if len(answers) > len(question.follow_ups):
        return None
    if isinstance(question.prompt, str):
        raise ValueError("a question with further turns is a conversation, not a text")
    messages = list(question.prompt)
    for answer, follow_up in zip(answers, question.follow_ups, strict=False):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": follow_up}]
    return messages


def prompt_text(question: Question) -> str:
    """The first prompt's words: the text, or the last message's of a conversation of one; more are named by their roles."""
    if isinstance(question.prompt, str):
        return question.prompt
    if len(question.prompt) == 1:
        return turns_of(question.prompt)[0][1]
    return conversation_text(question.prompt)
