"""What a benchmark's call begins with: questions, answers of other tools, opponents, settings, read before any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from isdaa.errors import UserError
from isdaa.evaluation.benchmark_answers import Answering, Drawn
from isdaa.evaluation.benchmark_judging import check_judge
from isdaa.evaluation.benchmark_request import BenchmarkRequest
from isdaa.evaluation.benchmarks.alpaca_eval import ALPACA_EVAL
from isdaa.evaluation.benchmarks.benchmark import Answer, Benchmark, Question
from isdaa.evaluation.benchmarks.mt_bench import MT_BENCH, with_references
from isdaa.evaluation.benchmarks.rows import without_repeats
from isdaa.evaluation.scorers import load_scorer


@dataclass(frozen=True)
class Side:
    """Somebody's answers. drawn: where they were generated here; path, digest: of the model and of its weights."""

    label: str
    answers: Mapping[str, Answer]
    drawn: Mapping[str, Drawn] | None = None
    path: str | None = None
    digest: str | None = None

    def finished(self, question: str) -> bool:
        """Whether the model itself ended its answer, as far as anybody knows."""
        return self.drawn is None or self.drawn[question].finished


@dataclass(frozen=True)
class Plan:
    """What is read before any model. given: answers of files; baseline: the model that has yet to give the opponent's."""

    questions: list[Question]
    given: list[Side]
    answering: Answering
    opponents: dict[str, Any]
    baseline: Any


def plan_of(bench: Benchmark, request: BenchmarkRequest) -> Plan:
    """Reads the files. Raises UserError for what does not fit together, the judge included."""
    questions = questions_of(bench, request)
    check_judge(bench, request, questions)
    given = _given(bench, request, questions)
    settings = Answering(
        bench.name,
        bench.title,
        replace(bench.generation, max_new_tokens=request.max_new_tokens or bench.generation.max_new_tokens),
        request.seed,
        request.batch_size,
        request.dtype,
        request.trust_remote_code,
        request.chat_template,
        request.template_file,
        request.chat_template_kwargs,
    )
    wants_judge = request.asking is not None or request.judge is not None
    opponents, baseline = _opponents(bench, request, questions) if wants_judge else ({}, request.baseline)
    return Plan(questions, given, settings, opponents, baseline)


def check(bench: Benchmark, request: BenchmarkRequest) -> None:
    """Raises UserError for options that the benchmark has no use for, before anything is read."""
    if request.sources.references is not None and bench is not MT_BENCH:
        raise UserError(f"--references: only mt_bench grades against right answers, {bench.name} has no use for them")
    if request.sources.difficulty is not None and bench is not ALPACA_EVAL:
        raise UserError(f"--difficulty: only alpaca_eval has instruction difficulties, {bench.name} has no use for them")
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
    for file in request.sources.answers:
        read: dict[str, dict[str, Answer]] = {}
        for one in bench.read_answers(Path(file).expanduser(), questions):
            read.setdefault(one.model, {})[one.question] = one
        for label in read:
            if label in sides or label in [model.label for model in request.models]:
                raise UserError(f"{file}: answers of {label} are there already; rename the model in one of the files")
        sides |= read
    return [Side(label, answers) for label, answers in sides.items()]


def _opponents(bench: Benchmark, request: BenchmarkRequest, questions: Sequence[Question]) -> tuple[dict[str, Any], Any]:
    """(opponent's answer by question, the model that has yet to give them).

    The first of: the user's file, the user's model, the data's own, the models' reference.
    """
    sources = request.sources
    if bench.opponent is None:
        return dict.fromkeys(question.id for question in questions), None
    if sources.opponent is not None:
        return bench.opponents(questions, bench.read_answers(Path(sources.opponent).expanduser(), questions)), None
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
