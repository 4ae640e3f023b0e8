"""The inputs of a benchmark's call, read before any model: questions, answers of other tools, opponents, the judge."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isdaa.data.checks import check_asked
from isdaa.errors import UserError
from isdaa.evaluation.benchmarks.answers import Drawn, parted
from isdaa.evaluation.benchmarks.request import BenchmarkRequest
from isdaa.evaluation.benchmarks.sets.alpaca_eval import ALPACA_EVAL, BASELINE, QUESTIONS, gamed, is_official
from isdaa.evaluation.benchmarks.sets.benchmark import Answer, Benchmark, Question, counted, prompt_text
from isdaa.evaluation.benchmarks.sets.length_control import Gamed
from isdaa.evaluation.benchmarks.sets.mt_bench import MT_BENCH, with_references
from isdaa.evaluation.benchmarks.sets.rows import shortened, without_repeats
from isdaa.evaluation.judges.judge import Judge
from isdaa.evaluation.judging import REPLIES, SCORES, BenchmarkJudge, ModelJudge, ScorerJudge
from isdaa.evaluation.scorers import GoldScorer, RewardModelScorer, about, load_scorer
from isdaa.terminal import say


@dataclass(frozen=True)
class Side:
    """A model's answers. drawn: the same with counts, where they were generated here; digest: of the model's weights.

    missing: ids of questions that their file lacks.
    """

    label: str
    answers: Mapping[str, Answer]
    drawn: Mapping[str, Drawn] | None = None
    path: str | None = None
    digest: str | None = None
    missing: tuple[str, ...] = ()

    def finished(self, question: str) -> bool:
        """Whether the model itself ended its answer, as far as anybody knows."""
        return self.drawn is None or self.drawn[question].finished


@dataclass(frozen=True)
class Inputs:
    """All that is read before a model is loaded. given: answers of files; baseline: the model that is to answer as the opponent.

    control: of length (AlpacaEval), where there is a judge. notes: sentences about the questions, for the result.
    """

    questions: list[Question]
    given: list[Side]
    opponents: dict[str, Any]
    baseline: Any
    control: Control
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Control:
    """gamed: what AlpacaEval's length control needs; why: the reason where it cannot be given. Other benchmarks have neither."""

    gamed: Gamed | None = None
    why: str = ""


def read_inputs(bench: Benchmark, request: BenchmarkRequest) -> Inputs:
    """Reads the files. Raises UserError for what does not fit together, the judge included."""
    questions = questions_of(bench, request)
    check_judge(bench, request, questions)
    given = _given(bench, request, questions)
    wants_judge = request.asking is not None or request.judge is not None
    opponents, baseline = _opponents(bench, request, questions) if wants_judge else ({}, request.baseline)
    opponents = {key: one and parted(one, request.settings.keep_thinking) for key, one in opponents.items()}
    notes = []
    if baseline is None and wants_judge and (left := len(questions) - len(opponents)):
        notes.append(f"{request.sources.opponent} has no answer to {left} of {counted(len(questions), 'question')}: left out")
        questions = [question for question in questions if question.id in opponents]
    _check_texts(questions, [*(one for side in given for one in side.answers.values()), *filter(None, opponents.values())])
    names = {baseline.label} if baseline is not None else {one.model for one in opponents.values() if one is not None}
    control = length_control(bench, request, names) if wants_judge else Control()
    return Inputs(questions, given, opponents, baseline, control, tuple(notes))


def length_control(bench: Benchmark, request: BenchmarkRequest, opponents: Collection[str]) -> Control:
    """What the leaderboard's length control needs, where questions and opponent are the leaderboard's, too."""
    sources = request.sources
    if bench is not ALPACA_EVAL:
        return Control()
    source = sources.questions or bench.source
    if not is_official(source, sources.split):
        return Control(why=f"the questions of {source} are not AlpacaEval's own {QUESTIONS} in their order")
    if BASELINE not in opponents:
        return Control(why=f"the opponent is {' and '.join(sorted(opponents))}, not {BASELINE}")
    if importlib.util.find_spec("sklearn") is None:
        return Control(why="it needs scikit-learn: pip install 'isdaa[judge]'")
    if sources.gamed is not None:
        return Control(gamed(sources.gamed))
    try:
        return Control(gamed(None))
    except UserError as error:
        return Control(why=str(error))


def lacking(
    bench: Benchmark, request: BenchmarkRequest, file: str, label: str, asked: Sequence[Question], had: Collection[str], what: str
) -> tuple[str, ...]:
    """Ids of the questions without a model's answer or judgment in a file. Raises UserError unless `--missing` allows it."""
    gone = tuple(question.id for question in asked if question.id not in had)
    if gone and request.sources.lacking == "error":
        shown = next(question for question in asked if question.id == gone[0])
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        loss = "" if bench.opponent is None else ", --missing loss counts them as lost"
        raise UserError(
            f"{file}: no {what} of {label} to question {gone[0]} ({shortened(prompt_text(shown))!r}){more} of "
            f"{counted(len(asked), 'question')}; --missing skip leaves them out{loss}"
        )
    return gone


def _check_texts(questions: Sequence[Question], answers: Sequence[Answer]) -> None:
    """Raises UserError, before anything is paid for, where a text could not be sent to the judge or written to a file."""
    for one in questions:
        told = (one.id, one.category, one.prompt, one.follow_ups, one.references, one.responder, one.response or "")
        check_asked(told, f"{one.where}: the question, or what stands beside it,")
    for answer in answers:
        check_asked((answer.model, answer.turns), f"{answer.where}: the answer")


def check(bench: Benchmark, request: BenchmarkRequest) -> None:
    """Raises UserError for options that the benchmark has no use for, before anything is read."""
    if request.sources.references is not None and bench is not MT_BENCH:
        raise UserError(f"--references: only mt_bench grades against right answers, {bench.name} has no use for them")
    if request.sources.gamed is not None and bench is not ALPACA_EVAL:
        raise UserError(f"--gamed: only alpaca_eval controls for length, {bench.name} has no use for it")
    if request.sources.lacking == "loss" and bench.opponent is None:
        raise UserError(
            f"--missing loss: {bench.name} grades every answer by itself, so that nothing is lost; say --missing skip"
        )
    if request.judge is not None:
        load_scorer(request.judge)  # is there such a thing?
    if bench.opponent is None and (request.sources.opponent or request.sources.baseline):
        raise UserError(f"{bench.name} grades every answer by itself: leave out --opponent and --baseline")


def questions_of(bench: Benchmark, request: BenchmarkRequest) -> list[Question]:
    """The benchmark's questions, each once, with right answers where the user has a file of them."""
    sources = request.sources
    questions = bench.read_questions(sources.questions or bench.source, sources.split, sources.limit)
    questions = without_repeats(questions)
    return with_references(questions, sources.references) if sources.references is not None else questions


def _given(bench: Benchmark, request: BenchmarkRequest, questions: Sequence[Question]) -> list[Side]:
    """The models whose answers another tool wrote."""
    sides: dict[str, dict[str, Answer]] = {}
    gone: dict[str, tuple[str, ...]] = {}
    for file in request.sources.answers:
        read: dict[str, dict[str, Answer]] = {}
        for one in bench.read_answers(Path(file).expanduser(), questions):
            read.setdefault(one.model, {})[one.question] = parted(one, request.settings.keep_thinking)
        for label in read:
            if label in sides or label in [model.label for model in request.models]:
                raise UserError(f"{file}: there is another model {label} already; rename one of the two")
        sides |= read
        for label, answers in read.items():
            gone[label] = lacking(bench, request, file, label, questions, answers, "answer")
    return [Side(label, answers, missing=gone[label]) for label, answers in sides.items()]


def _opponents(bench: Benchmark, request: BenchmarkRequest, questions: Sequence[Question]) -> tuple[dict[str, Any], Any]:
    """(opponent's answer by question, the model that has yet to give them).

    The first of: the user's file, the user's model, the data's own, the models' reference.
    """
    sources = request.sources
    if bench.opponent is None:
        return dict.fromkeys(question.id for question in questions), None
    if sources.opponent is not None:
        answers = bench.read_answers(Path(sources.opponent).expanduser(), questions)
        return bench.opponents(questions, answers, sources.lacking), None
    if request.baseline is not None:
        return {}, request.baseline
    if bench.opponent == "data" and all(question.response is not None for question in questions):
        return bench.opponents(questions), None
    if request.reference is not None:
        return {}, request.reference
    if request.records is not None:
        request.records.require({"reference": "baseline"})
    raise UserError(
        f"{bench.name} compares each answer with an opponent's, and neither these questions nor the models' records name one; "
        "give its answers with --opponent FILE, or a model that answers with --baseline MODEL"
    )


def judge_of(request: BenchmarkRequest, folder: Path) -> BenchmarkJudge | None:
    """The judge that the request names; its replies or scores are kept in `folder`."""
    if request.asking is not None:
        return ModelJudge(request.asking, folder / REPLIES)
    if request.judge is not None:
        limit, how = request.tokenization.max_prompt_length, request.scorer
        scorer = load_scorer(request.judge, max_prompt_length=limit, position=how.position, label=how.label)
        for line in about(scorer):
            say(f"judge {scorer.name}: {line}")
        return ScorerJudge(scorer, folder / SCORES)
    return None


def check_judge(bench: Benchmark, request: BenchmarkRequest, questions: Sequence[Question]) -> None:
    """Raises UserError where the judge cannot be asked or cannot judge these questions: called before long work."""
    if request.asking is not None:
        Judge(request.asking.settings).ready()
    if request.judge is None:
        return
    scorer = load_scorer(request.judge)
    if bench.opponent is None:
        raise UserError(
            f"{bench.name} grades every answer from 1 to 10, which a reward model cannot; name a judge model with --judge_model"
        )
    bare = next((question for question in questions if not question.row.get("facts")), None)
    if isinstance(scorer, GoldScorer) and bare is not None:
        raise UserError(
            f"{bare.where}: the gold judge needs the facts of the embedded world, as the questions of "
            "`isdaa benchmark tldr --questions world:small` have them; name a reward model's path or a judge model"
        )
    chat = any(not isinstance(question.prompt, str) for question in questions)
    if isinstance(scorer, RewardModelScorer) and chat and not scorer.tokenizer.chat_template:
        raise UserError(f"{scorer.name}: the questions are conversations, and the reward model's tokenizer has no chat template")
