"""Judgments that another tool wrote: read, put into the order of the questions, missing ones left out or counted as lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from isdaa.errors import UserError
from isdaa.evaluation.benchmarks.inputs import Control, lacking, length_control
from isdaa.evaluation.benchmarks.request import BenchmarkRequest
from isdaa.evaluation.benchmarks.sets.alpaca_eval import ALPACA_EVAL, BASELINE, QUESTIONS
from isdaa.evaluation.benchmarks.sets.benchmark import Answer, Benchmark, Judged, Question, counted
from isdaa.evaluation.benchmarks.sets.games import lost


def judgments_of(
    bench: Benchmark, request: BenchmarkRequest, questions: Sequence[Question], answers: Sequence[Answer]
) -> tuple[dict[str, list[Judged]], dict[str, list[str]]]:
    """(judged answers by model, what is missing by model, in words). In the questions' order, else as they first appear.

    A question of several turns of which some are graded keeps these, as in FastChat.
    """
    found: dict[str, list[Judged]] = {}
    gone: dict[str, list[str]] = {}
    for file in request.sources.judgments:
        read = bench.read_judgments(Path(file).expanduser(), questions, answers)
        again = next((label for label in read if label in found), None)
        if again is not None:
            raise UserError(f"{file}: {again} is judged in another of the files already; give one of them")
        for label, own in read.items():
            had = {one.question.id: one for one in own}
            whole = {name for name, one in had.items() if len(one.verdicts) > len(one.question.follow_ups)}
            missing = lacking(bench, request, file, label, questions, had, "judgment")
            half = len(lacking(bench, request, file, label, questions, whole, "judgment of every turn")) - len(missing)
            gone[label] = [f"judgment of {counted(len(missing), 'question')}"] if missing else []
            gone[label] += [f"judgment of some turn of {counted(half, 'question')}"] if half else []
            if request.sources.lacking == "loss":
                for question in questions:
                    if question.id in missing:
                        opponent = _opponent_of(bench, file, question, own, answers)
                        empty = Judged(question, Answer(question.id, label, ("",)), opponent, (), own[0].judge)
                        read[label].append(lost(empty, bench.two_games))
        found |= read
    met = [one.question.id for answers in found.values() for one in answers]
    place = {identifier: row for row, identifier in enumerate(dict.fromkeys([*(q.id for q in questions), *met]))}
    return {label: sorted(own, key=lambda one: place[one.question.id]) for label, own in found.items()}, gone


def _opponent_of(bench: Benchmark, file: str, question: Question, judged: Sequence[Judged], answers: Sequence[Answer]) -> Answer:
    """The opponent's answer to a question that the model has no judgment of; its text may be unknown, except for AlpacaEval."""
    names = dict.fromkeys(one.opponent.model for one in judged if one.opponent is not None)
    name = next(iter(names)) if len(names) == 1 else bench.baselines.get(question.category, "")
    known = next((one for one in answers if (one.model, one.question) == (name, question.id)), None)
    if known is not None:
        return known
    if question.response is not None and question.responder == name:
        return Answer(question.id, name, (question.response,))
    if bench is ALPACA_EVAL:
        raise UserError(
            f"{file}: --missing loss needs the length of {name}'s answer to question {question.id}; give its answers with "
            "--opponent FILE"
        )
    return Answer(question.id, name, ())


def among_the_official(
    bench: Benchmark, request: BenchmarkRequest, found: dict[str, list[Judged]], opponents: set[str]
) -> tuple[list[Question], dict[str, list[Judged]], dict[str, list[str]], Control]:
    """AlpacaEval's annotations matched to its official questions, if those can be had and no others are named.

    Raises UserError where they lack some of these questions, unless that is allowed.
    """
    if opponents != {BASELINE}:
        return [], found, {}, Control(why=f"the opponent is {' and '.join(sorted(opponents))}, not {BASELINE}")
    try:
        questions = bench.read_questions(bench.source)
    except UserError as error:
        why = f"{str(error).partition('; ')[0]}; give it with --questions FILE, and df_gamed.csv with --gamed FILE"
        return [], found, {}, Control(why=why)
    lenient = replace(request, sources=replace(request.sources, missing="skip"))
    again, _ = judgments_of(bench, lenient, questions, [])
    if sum(map(len, again.values())) < sum(map(len, found.values())):
        return [], found, {}, Control(why=f"some of the instructions are not among AlpacaEval's own {QUESTIONS}")
    again, gone = judgments_of(bench, request, questions, [])
    return questions, again, gone, length_control(bench, request, opponents)
