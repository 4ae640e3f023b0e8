"""One call from models to a benchmark's figures: answer, judge, score. Each step keeps its work on disk and reuses it.

generations.jsonl        every turn of every answer as it was drawn (`answers.py`)
answers/MODEL            the answers in the original tool's format
replies.jsonl            what the judge model replied (`judges/cache.py`); scores.jsonl of a reward model
judgments/JUDGE/MODEL    the judgments in the original tool's format
metrics.json, .csv       figures with intervals, models compared; examples.json: answers to read
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from isdaa.distributed import once
from isdaa.errors import DoneInPart, UserError
from isdaa.evaluation.answer_notes import lack_remarks, lacks_of, thinking_of, thinking_remarks, waiting
from isdaa.evaluation.benchmarks import benchmark
from isdaa.evaluation.benchmarks.answers import Respondent, answer, generation_of
from isdaa.evaluation.benchmarks.inputs import Control, Inputs, Side, check, judge_of, length_control, questions_of, read_inputs
from isdaa.evaluation.benchmarks.judgments import among_the_official, judgments_of
from isdaa.evaluation.benchmarks.outcome import (
    LENGTH_CONTROLLED,
    comparisons,
    examples,
    headline_of,
    sentence,
    table_csv,
    unlike_the_leaderboard,
)
from isdaa.evaluation.benchmarks.request import BenchmarkRequest, file_name
from isdaa.evaluation.benchmarks.sets.alpaca_eval import ALPACA_EVAL, QUESTIONS
from isdaa.evaluation.benchmarks.sets.benchmark import Answer, Benchmark, Judged, Question, Score, Scoring, counted
from isdaa.evaluation.benchmarks.sets.games import lost, waits
from isdaa.evaluation.benchmarks.sets.mt_bench import MT_BENCH
from isdaa.evaluation.benchmarks.sets.rows import PROJECT
from isdaa.evaluation.judging import BenchmarkJudge, Case, ModelJudge, judged
from isdaa.evaluation.records import METRICS, Lines, locked
from isdaa.files import write_atomically, write_json
from isdaa.foreign import read_object
from isdaa.record import git_revision, versions
from isdaa.terminal import say

FORMAT = 2
NO_CONTROL = "no length-controlled win rate"
GENERATIONS, ANSWERS, JUDGMENTS = "generations.jsonl", "answers", "judgments"
TABLE, EXAMPLES = "metrics.csv", "examples.json"
QUOTED = 80  # characters of a judge's reply in an error


@dataclass(frozen=True)
class Outcome:
    """The result of a call. metrics: as in `metrics.json`; folder: of the files. stopped: why it is not the whole result."""

    metrics: dict[str, Any]
    folder: Path
    stopped: str | None = None


def run_benchmark(request: BenchmarkRequest) -> Outcome:
    """Answer, judge and score. Without a judge the answers are all there is.

    All input is looked at before there is a folder, and before anything long. Raises UserError; where a budget of
    requests is spent, `Outcome.stopped` says so and the metrics are of the questions that were judged; where no reply of
    the judge could be read it says that, and the metrics hold no figure.
    """
    bench = benchmark(request.benchmark)
    once(lambda: check(bench, request))
    if request.sources.judgments:
        return once(lambda: _score_again(bench, request))
    inputs = once(lambda: read_inputs(bench, request))
    for line in request.told:
        say(line)
    if inputs.control.why and (request.judge is not None or request.asking is not None):
        say(f"{NO_CONTROL}: {inputs.control.why}")
    models = [Respondent(model, bench, request, inputs.questions, "policy") for model in request.models]
    if inputs.baseline is not None:
        models.append(Respondent(inputs.baseline, bench, request, inputs.questions, "opponent"))
    once(lambda: _check_narrower(Path(request.output_dir), request, inputs))
    with locked(request.output_dir) as folder:
        judges: list[BenchmarkJudge | None] = []  # the main process's own: a client cannot be sent to others
        once(lambda: judges.append(judge_of(request, folder)))
        drawn = answer(models, inputs.questions, once(lambda: Lines(folder / GENERATIONS))) if models else []
        sides = [
            Side(model.label, {key: one.answer for key, one in found.items()}, found, model.path, model.digest)
            for model, found in zip(models, drawn, strict=True)
        ]
        return once(lambda: _concluded(bench, request, inputs, sides, judges[0], folder))


def _concluded(
    bench: Benchmark,
    request: BenchmarkRequest,
    inputs: Inputs,
    drawn: Sequence[Side],
    judge: BenchmarkJudge | None,
    folder: Path,
) -> Outcome:
    """Write the answers, judge and score them. drawn: those of models; the opponent's are last where a model gave them."""
    questions, opponents = inputs.questions, inputs.opponents
    for side in drawn:
        file = folder / ANSWERS / (file_name(side.label) + bench.suffix)
        bench.write_answers(file, questions, [side.answers[question.id] for question in questions])
    other = drawn[-1] if inputs.baseline is not None else None
    sides = [*(drawn if other is None else drawn[:-1]), *inputs.given]
    metrics = _described(bench, request, questions, bool(drawn))
    metrics["opponent_answers"] = _entry(other)["answers"] if other is not None else None
    if judge is None:
        metrics |= {"models": [_entry(side) for side in sides], "opponent": other.label if other is not None else None}
        if not _judged_before(folder):
            write_json(folder / METRICS, metrics)
        return Outcome(metrics, folder)
    if other is not None:
        opponents = dict(other.answers)
    cases = {side.label: partial(_case, side, opponents, other) for side in sides}
    found, left = judged(bench, judge, questions, cases)
    if request.sources.lacking == "loss":
        found = {side.label: _with_losses(bench, side, found, sides, opponents, questions) for side in sides}
    metrics |= {"judge": judge.to_json(), "partial": left > 0, "notes": list(inputs.notes)}
    if left and not any(found.values()):
        raise DoneInPart(f"{_stopped(request, judge, metrics['questions'])}; no question is judged yet")
    for label, answers in found.items():
        bench.write_judgments(folder / JUDGMENTS / file_name(judge.name) / (file_name(label) + bench.suffix), answers)
    by_label = {side.label: side for side in sides}
    left_out = {side.label: len({q.id for q in questions}.intersection(side.missing)) for side in sides}
    gone = {label: [f"answer to {counted(count, 'question')}"] if count else [] for label, count in left_out.items()}
    metrics = _scored(bench, request, metrics, found, by_label, judge.both_orders, folder, inputs.control, gone)
    stopped = _stopped(request, judge, metrics["questions"]) if left else None
    missing = waiting([model["lacks"] for model in metrics["models"]])
    if not metrics["headline"]:
        cut = any(verdict.lack == "cut" for answers in found.values() for one in answers for verdict in one.verdicts)
        more = ", or give it room with --judge_max_tokens" if cut else ""
        way = f"name another judge{more}; all is kept in {folder}"
        unread = [_unread(found, f"replies of {judge.name}"), *([] if missing else [way])]
        stopped = "; ".join([*unread, *([stopped] if stopped else [])])
    return Outcome(metrics, folder, "; ".join(part for part in (stopped, missing) if part) or None)


def _with_losses(
    bench: Benchmark,
    side: Side,
    found: Mapping[str, Sequence[Judged]],
    sides: Sequence[Side],
    opponents: Mapping[str, Answer | None],
    questions: Sequence[Question],
) -> list[Judged]:
    """A model's judged answers, and lost comparisons on the questions its file lacks, except those that were not asked."""
    asked = {one.question.id for answers in found.values() for one in answers}
    asked |= {question.id for question in questions if not any(question.id in one.answers for one in sides)}
    own = {one.question.id: one for one in found[side.label]}
    for question in questions:
        if question.id in side.missing and question.id in asked:
            empty = Judged(question, Answer(question.id, side.label, ("",)), opponents[question.id], ())
            own[question.id] = lost(empty, bench.two_games)
    return [own[question.id] for question in questions if question.id in own]


def _judged_before(folder: Path) -> bool:
    """Whether the folder holds figures, which answers alone must not replace."""
    return (folder / METRICS).is_file() and read_object(folder / METRICS).get("judge") is not None


def _check_narrower(folder: Path, request: BenchmarkRequest, inputs: Inputs) -> None:
    """Raises UserError where figures of more models, or of more questions, would be replaced."""
    if (request.judge is None and request.asking is None) or not _judged_before(folder):
        return
    before = read_object(folder / METRICS)
    labels = {model.label for model in request.models} | {side.label for side in inputs.given}
    gone = [model["model"] for model in before["models"] if model["model"] not in labels]
    more = before["questions"]["count"] - len(inputs.questions)
    if gone or more > 0:
        lost = " and ".join(
            [*([f"of {gone[0]}"] if gone else []), *([f"on {counted(more, 'more question')}"] if more > 0 else [])]
        )
        raise UserError(f"{folder}: holds figures {lost}, which are not replaced; choose another folder with --output")


def _case(side: Side, opponents: Mapping[str, Answer | None], other: Side | None, question: Question) -> Case | None:
    if question.id not in side.answers:
        return None
    ended = other is None or other.finished(question.id)
    return Case(question, side.answers[question.id], opponents[question.id], side.finished(question.id), ended)


def _stopped(request: BenchmarkRequest, judge: BenchmarkJudge, questions: Mapping[str, Any]) -> str:
    assert request.asking is not None and isinstance(judge, ModelJudge)
    budget = request.asking.settings.max_requests
    kept = f"{questions['judged']} of {questions['count']} questions are judged, all replies are kept"
    if judge.judge.stopped:
        return f"{judge.judge.stopped}: {kept}; the same command goes on from here"
    if not budget:
        return f"--max_requests 0 lets nothing be asked: {kept}; a higher number goes on from here"
    return f"the budget of {counted(budget, 'request')} (--max_requests) is spent: {kept}; the same command goes on from here"


def _unread(found: Mapping[str, Sequence[Judged]], what: str) -> str:
    """Says that no verdict could be read, and quotes the first. what: what they are called."""
    said = [verdict.reply for answers in found.values() for one in answers for verdict in one.verdicts]
    first = " ".join(next((reply for reply in said if reply.strip()), "").split())
    first = first if len(first) <= QUOTED else first[: QUOTED - 1] + "…"
    quoted = f" (the first: {first!r})" if first else ""
    return f"none of the {len(said)} {what} could be read{quoted}, so there is no result"


def _score_again(bench: Benchmark, request: BenchmarkRequest) -> Outcome:
    """Judgments of files, scored as they are."""
    sources = request.sources
    wanted = bench is MT_BENCH or any(named is not None for named in (sources.questions, sources.split, sources.limit))
    questions = questions_of(bench, request) if wanted else []
    files = [file for file in (*sources.answers, sources.opponent) if file is not None]
    answers = [one for file in files for one in bench.read_answers(Path(file).expanduser(), questions)]
    found, gone = judgments_of(bench, request, questions, answers)
    opponents = {one.opponent.model for answers in found.values() for one in answers if one.opponent is not None}
    control = Control()
    if wanted:
        control = length_control(bench, request, opponents)
    elif bench is ALPACA_EVAL:
        questions, found, gone, control = among_the_official(bench, request, found, opponents)
    names = sorted({one.judge for answers in found.values() for one in answers if one.judge})
    count = len({one.question.id for answers in found.values() for one in answers})
    with locked(request.output_dir) as folder:
        metrics = _described(bench, request, questions, drawn=False)
        metrics["questions"]["count"] = len(questions) or count
        metrics["judge"] = {"kind": "file", "name": ", ".join(names) or "unknown"}
        both = any(verdict.game for answers in found.values() for one in answers for verdict in one.verdicts)
        metrics = _scored(bench, request, metrics, found, {}, both, folder, control, gone)
        return Outcome(metrics, folder, None if metrics["headline"] else _unread(found, "verdicts of the files"))


def _described(bench: Benchmark, request: BenchmarkRequest, questions: Sequence[Question], drawn: bool) -> dict[str, Any]:
    """What `metrics.json` says of the call, before there are figures. drawn: whether models answer in it."""
    sources = request.sources
    generation = None
    if drawn:
        chosen = generation_of(bench, request)
        generation = {
            "max_new_tokens": chosen.max_new_tokens,
            "benchmarks_own_limit": bench.generation.max_new_tokens,
            "temperature": chosen.temperature,
            "temperature_by_category": dict(chosen.by_category),
            "top_p": chosen.top_p,
            "seed": request.settings.seed,
            "dtype": request.dtype,
            "chat_template": "given" if request.chat_template is not None else "the tokenizer's",
            "keep_thinking": request.settings.keep_thinking,
        }
    return {
        "format": FORMAT,
        "benchmark": bench.name,
        "title": bench.title,
        "sentence": "",
        "partial": False,
        "headline": "",
        "questions": {
            "source": sources.questions or bench.source,
            "project": sources.questions == PROJECT,
            "split": sources.split,
            "limit": sources.limit,
            "count": len(questions),
            "judged": 0,
        },
        "sources": asdict(sources),
        "generation": generation,
        "judge": None,
        "opponent": None,
        "opponent_answers": None,
        "models": [],
        "comparisons": [],
        "confidence": request.settings.confidence,
        "resamples": request.settings.bootstrap,
        "seed": request.settings.seed,
        "versions": versions(),
        "git_revision": git_revision(),
    }


def _entry(side: Side) -> dict[str, Any]:
    """A model, and its answers in numbers."""
    answers = list(side.answers.values())
    told: dict[str, Any] = {
        "count": len(answers),
        "mean_characters": sum(sum(map(len, one.turns)) / len(one.turns) for one in answers) / len(answers),
        "mean_tokens": None,
        "turns": sum(len(one.turns) for one in answers),
        "truncated": None,
        "no_room": None,
        "empty": sum(not turn.strip() for one in answers for turn in one.turns),
        "thinking": thinking_of([part for one in answers for part in one.parts]),
    }
    if told["thinking"] is not None and any(one.turns != tuple(part.answer for part in one.parts) for one in answers):
        told["thinking"]["kept"] = True
    if side.drawn is not None:
        drawn = list(side.drawn.values())
        told |= {
            "mean_tokens": sum(one.tokens for one in drawn) / told["turns"],
            "truncated": sum(one.cut for one in drawn),
            "no_room": sum(one.no_room for one in drawn),
        }
    return {"model": side.label, "path": side.path, "digest": side.digest, "answers": told}


def _scored(
    bench: Benchmark,
    request: BenchmarkRequest,
    metrics: dict[str, Any],
    found: Mapping[str, Sequence[Judged]],
    sides: Mapping[str, Side],
    both_orders: bool,
    folder: Path,
    control: Control,
    gone: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """The metrics with figures, comparisons and the sentence; written with their table and some answers to read."""
    chosen = request.settings
    scoring = Scoring(chosen.bootstrap, chosen.confidence, chosen.seed, control.gamed)
    scores = bench.score(found, scoring)
    models = []
    asked = len({one.question.id for answers in found.values() for one in answers})
    for label, score in scores.items():
        plain = score.to_json()
        if not both_orders:
            plain["details"].pop("flip_rate", None)
        entry = _entry(sides[label]) if label in sides else {"model": label, "path": None, "answers": None}
        lacks = lacks_of(found[label])
        notes = [*plain["notes"], *lack_remarks(lacks), *_remarks(entry)]
        fate = "counted as lost" if request.sources.lacking == "loss" else "left out"
        notes = [*(f"no {what}: {fate}" for what in gone.get(label, ())), *notes]
        if len(found[label]) < asked:
            notes.append(
                f"judged on {len(found[label])} of {counted(asked, 'question')}: compare it by the paired differences alone"
            )
        models.append(entry | plain | {"lacks": lacks, "notes": notes})
    judgments = [one for answers in found.values() for one in answers]
    opponents = sorted({one.opponent.model for one in judgments if one.opponent is not None})
    templates = sorted({verdict.template for one in judgments for verdict in one.verdicts if verdict.template})
    metrics["judge"] |= {"templates": templates}
    remarks = [remark for score in scores.values() for remark in score.remarks]
    metrics |= {
        "notes": [*metrics.get("notes", []), *dict.fromkeys(remarks), *([f"{NO_CONTROL}: {control.why}"] if control.why else [])],
        "length_control": _length_control(control, scores) if bench is ALPACA_EVAL else None,
    }
    if any(LENGTH_CONTROLLED in score.figures for score in scores.values()):
        metrics["notes"] += unlike_the_leaderboard(metrics["judge"])
    metrics |= {
        "headline": headline_of(scores),
        "opponent": " and ".join(opponents) or None,
        "models": models,
        "comparisons": comparisons(bench, found, scores, scoring),
    }
    asks = metrics["judge"]["kind"] == "model"
    left = {one.question.id for one in judgments if asks and waits(one)}
    judged_ids = {identifier for score in scores.values() for identifier in score.by_question} - left
    metrics["questions"] |= {"judged": len(judged_ids), "waiting": len(left)}
    metrics["partial"] = metrics["partial"] or bool(left)
    metrics["sentence"] = sentence(bench, metrics)
    write_json(folder / METRICS, metrics)
    write_atomically(folder / TABLE, table_csv(metrics))
    write_json(folder / EXAMPLES, examples(found, scores))
    return metrics


def _length_control(control: Control, scores: Mapping[str, Score]) -> dict[str, Any]:
    """What `metrics.json` says of AlpacaEval's length control."""
    given = any(LENGTH_CONTROLLED in score.figures for score in scores.values())
    return {
        "recipe": "length_controlled_v1" if given else None,
        "of": QUESTIONS,
        "gamed": control.gamed.source if control.gamed is not None else None,
        "not_given": None if given else control.why,
        "interval": "bootstrap over questions by unpenalised refits, moved to the figure" if given else None,
    }


def _remarks(entry: Mapping[str, Any]) -> list[str]:
    """What a reader must know of the answers."""
    told = entry["answers"]
    if told is None:
        return []
    lines = []
    if told["truncated"]:
        lines.append(f"{told['truncated']} of {told['turns']} answers ended at the limit on new tokens")
    if told["no_room"]:
        lines.append(f"{told['no_room']} turns had no room left in the model's context and are empty")
    elif told["empty"] > (told["thinking"] or {"only": 0})["only"]:
        lines.append(f"{told['empty']} of {told['turns']} answers are empty")
    return lines + thinking_remarks(told)
