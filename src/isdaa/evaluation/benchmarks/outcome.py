"""From verdicts to results: models compared question by question, tables, and the result in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from isdaa.evaluation.benchmarks.sets.benchmark import Benchmark, Judged, Score, Scoring, counted, prompt_text
from isdaa.evaluation.benchmarks.sets.games import waits
from isdaa.evaluation.statistics import difference_interval, fewest
from isdaa.files import csv_text

LENGTH_CONTROLLED, LENGTH_ADJUSTED = "length_controlled_win_rate", "length_adjusted_win_rate"
RAW = ("win_rate", "score")
# The annotator of the leaderboard of AlpacaEval 2: its judge and template.
LEADERBOARDS_JUDGE = "weighted_alpaca_eval_gpt4_turbo"
WORDS = {
    "win_rate": "win rate",
    "discrete_win_rate": "discrete win rate",
    LENGTH_CONTROLLED: "length-controlled win rate",
    LENGTH_ADJUSTED: "length-adjusted (no difficulty; not comparable with the leaderboard)",
    "style_controlled_win_rate": "style-controlled win rate",
    "equal_style_win_rate": "win rate at equal style",
    "score": "mean grade",
    "turn_1": "turn 1",
    "turn_2": "turn 2",
}
EXAMPLES = 8


def is_share(headline: str) -> bool:
    """Whether the figure is a share of comparisons won, and no grade."""
    return headline.endswith("win_rate")


def name_of(figure: str, metrics: Mapping[str, Any], models: Sequence[Mapping[str, Any]] = ()) -> str:
    """A figure's name in words; the length-controlled win rate with the count where it is not of all its questions.

    models: whose figure it is; by default all.
    """
    name = WORDS.get(figure, figure)
    of = (metrics.get("length_control") or {}).get("of")
    if figure != LENGTH_CONTROLLED or of is None:
        return name
    counts = sorted({model["figures"][figure]["n"] for model in models or metrics["models"] if figure in model["figures"]})
    if counts in ([], [of]):
        return name
    return f"{name} on {counts[0]}{f' to {counts[-1]}' if len(counts) > 1 else ''} of {of} questions"


def judged_by(judge: Mapping[str, Any]) -> str:
    """The judge's name and its templates."""
    templates = judge.get("templates") or []
    return str(judge["name"]) + (f", template{'s' if len(templates) > 1 else ''} {', '.join(templates)}" if templates else "")


def unlike_the_leaderboard(judge: Mapping[str, Any]) -> list[str]:
    """A note where the judge of a length-controlled win rate is not the leaderboard's."""
    if judge["name"] == LEADERBOARDS_JUDGE and not judge.get("templates"):
        return []
    own = "isdaa's words, not the leaderboard's" if judge.get("templates") else "not the leaderboard's"
    return [
        f"judged by {judged_by(judge)}: {own} ({LEADERBOARDS_JUDGE}), so that no length-controlled win rate compares with "
        "the leaderboard"
    ]


def shown(value: float, share: bool) -> str:
    """`61.3 %`, or a grade `6.42`."""
    return f"{100 * value:.1f} %" if share else f"{value:.2f}"


def headline_of(scores: Mapping[str, Score]) -> str:
    """The figure that all models are compared by: the benchmark's own where every model has it, else their raw rate.

    Models without a figure, of which no reply could be read, do not count; empty where no model has one.
    """
    known = [score for score in scores.values() if score.figures]
    own = {score.headline for score in known}
    if len(own) == 1:
        return own.pop()
    return next((name for name in ("win_rate", "score") if known and all(name in score.figures for score in known)), "")


def ranked(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The models that have a headline figure, best first."""
    headline = metrics["headline"]
    known = [model for model in metrics["models"] if headline in model["figures"]]
    return sorted(known, key=lambda model: -model["figures"][headline]["mean"])


def comparisons(
    bench: Benchmark, judged: Mapping[str, Sequence[Judged]], scores: Mapping[str, Score], scoring: Scoring
) -> list[dict[str, Any]]:
    """Every two models on the questions that both answered: how often each was better, and by how much on average.

    `difference` is the mean over those questions of the raw figure (a share, or a grade); `headline_difference` that of
    the headline figure, resample by resample: of models with different questions it is scored anew on those that both have.
    None where a figure has no resamples.
    """
    headline = headline_of(scores)
    known = {label: {one.question.id: one for one in judged[label] if not waits(one)} for label in scores}
    order = {label: ([one.question.id for one in judged[label]], list(known[label])) for label in scores}
    found = []
    for first, second in combinations(scores, 2):
        ours, theirs = scores[first].by_question, scores[second].by_question
        common = [identifier for identifier in ours if identifier in theirs]
        if not common:
            continue
        a, b = (np.array([side[identifier] for identifier in common]) for side in (ours, theirs))
        row: dict[str, Any] = {
            "first": first,
            "second": second,
            "questions": len(common),
            "better": int((a > b).sum()),
            "worse": int((a < b).sum()),
            "equal": int((a == b).sum()),
            "difference": difference_interval(a, b, **scoring.drawn()).to_json(),
            "headline_difference": None,
        }
        own, same = scores, order[first] == order[second]
        if not same and headline not in RAW:
            both = [identifier for identifier in known[first] if identifier in known[second]]
            own = bench.score({label: [known[label][i] for i in both] for label in (first, second)}, scoring)
        figures = [own[label].figures.get(headline) for label in (first, second)]
        drawn = [figure.draws.size for figure in figures if figure is not None]
        if not same and headline in RAW:
            row["headline_difference"] = row["difference"]
        elif figures[0] is not None and figures[1] is not None and drawn[0] == drawn[1] > 0:
            row["headline_difference"] = figures[0].minus(figures[1], scoring.confidence).to_json()
        found.append(row)
    return found


def sentence(bench: Benchmark, metrics: Mapping[str, Any]) -> str:
    """The result in one sentence."""
    headline, questions = metrics["headline"], metrics["questions"]
    start = f"Partial, {questions['judged']} of {questions['count']} questions judged: " if metrics["partial"] else ""
    if not headline:
        return f"{start}{'no' if start else 'No'} reply of the judge could be read, so there is no result."
    share = is_share(headline)
    order = ranked(metrics)
    best = order[0]
    figure = best["figures"][headline]
    told = shown(figure["mean"], share) + _range(figure, share)
    scale = "" if share else " of 10"
    name = name_of(headline, metrics, [best])
    read = best.get("judged", figure["n"])
    if headline != LENGTH_CONTROLLED and not metrics["partial"] and read < questions["count"]:
        name += f" on {read:,} of {counted(questions['count'], 'question')}"
    if len(order) == 1:
        if not share:
            return f"{start}{best['model']} has a {name} of {told}{scale} on {bench.title}."
        against = f"{metrics['opponent']}: {_against(best, figure, metrics['confidence'])}"
        return f"{start}{best['model']} has a {name} of {told} against {against}."
    first = _level(order, metrics, share)
    lead = _lead(first, order, metrics, share)
    if len(first) == 1:
        if lead.first:
            return f"{start}{best['model']} leads on {bench.title} with a {name} of {told}{scale}{lead.words}."
        return f"{start}{best['model']} has the highest {name} on {bench.title}, {told}{scale}{lead.words}."
    alike = len({_range(model["figures"][headline], share) for model in first}) == 1
    told = (told if alike else shown(figure["mean"], share)) + scale
    names = _listed([model["model"] for model in first])
    return f"{start}{names} are level on {bench.title} with a {name} of {told} each{lead.words}."


def _range(figure: Mapping[str, Any], share: bool) -> str:
    if figure["low"] is None:
        return ""
    low, high = (shown(figure[side], share).removesuffix(" %") for side in ("low", "high"))
    return f" [{low}, {high}]"


def told_apart(interval: Mapping[str, Any], even: float, confidence: float, decided: int) -> int:
    """1 where the interval lies above `even`, −1 below; 0 where it contains `even`, or where too few questions decide.

    decided: questions with a verdict for the one side or the other (`fewest`).
    """
    if interval["low"] is None or decided < fewest(confidence):
        return 0
    return int(interval["low"] > even) - int(interval["high"] < even)


def bounded(model: Mapping[str, Any], figure: Mapping[str, Any]) -> Mapping[str, Any]:
    """The figure, or the raw win rate where votes are too one-sided for an interval of it."""
    return model["figures"].get("win_rate", figure) if figure["low"] is None else figure


def decided_of(model: Mapping[str, Any], figure: Mapping[str, Any]) -> int:
    """How many of a model's questions have a verdict that is no draw; all, where an older isdaa's metrics do not say."""
    return int(model.get("decided", figure["n"]))


def _against(model: Mapping[str, Any], figure: Mapping[str, Any], confidence: float) -> str:
    if (read := model.get("judged", figure["n"])) < fewest(confidence):
        return f"{counted(read, 'question')} cannot tell two models apart"
    figure = bounded(model, figure)
    apart = ("the two cannot be told apart on these questions", "better than its opponent", "worse than its opponent")
    return apart[told_apart(figure, 0.5, confidence, decided_of(model, figure))]


def _level(order: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], share: bool) -> list[Mapping[str, Any]]:
    """The best model, and those that show the same figure and cannot be told from it."""
    best = order[0]

    def read(model: Mapping[str, Any]) -> str:
        return shown(model["figures"][metrics["headline"]]["mean"], share)

    def ahead(other: Mapping[str, Any]) -> bool:
        gap = gap_between(metrics, best["model"], other["model"])
        return gap is not None and told_apart(gap, 0, metrics["confidence"], gap["decided"]) != 0

    return [best, *(other for other in order[1:] if read(other) == read(best) and not ahead(other))]


class _Lead(NamedTuple):
    """Words on the other models, and whether the first leads all of them."""

    words: str
    first: bool


def _lead(
    first: Sequence[Mapping[str, Any]], order: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], share: bool
) -> _Lead:
    """How far the first (and those level with it) are ahead of the others, and which they cannot be told from.

    A model with a lower figure is ahead where both were judged on different questions and it is better on those of both.
    """
    ahead: list[tuple[str, str]] = []
    alike: list[tuple[str, str]] = []
    behind: list[tuple[str, str]] = []
    strangers: list[str] = []
    unknown: list[str] = []
    compared = {frozenset((row["first"], row["second"])) for row in metrics["comparisons"]}
    for other in (model for model in order if model not in first):
        pairs = [(one["model"], other["model"]) for one in first]
        gaps = [gap for pair in pairs if (gap := gap_between(metrics, *pair)) is not None]
        if len(gaps) < len(pairs):
            (unknown if compared.issuperset(map(frozenset, pairs)) else strangers).append(other["model"])
            continue
        signs = [told_apart(gap, 0, metrics["confidence"], gap["decided"]) for gap in gaps]
        points = f"{100 * abs(gaps[0]['mean']):.1f} points" if share else f"{abs(gaps[0]['mean']):.2f}"
        (ahead if min(signs) > 0 else behind if min(signs) < 0 else alike).append((other["model"], points))
    parts = [f"on the questions that both have {name} is {points} ahead of it" for name, points in behind]
    if ahead:
        more = f" and further ahead of {counted(len(ahead) - 1, 'other')}" if len(ahead) > 1 else ""
        parts.append(f"{ahead[0][1]} ahead of {ahead[0][0]}{more}")
    if alike:
        parts.append(f"{'it' if len(first) == 1 else 'they'} cannot be told from {_listed([name for name, _ in alike])}")
    parts += [f"{_listed(strangers)} {'was' if len(strangers) == 1 else 'were'} judged on other questions"] if strangers else []
    parts += [f"how far from {_listed(unknown)} is not known: one-sided votes have no interval"] if unknown else []
    return _Lead("".join(f"; {part}" for part in parts), not (behind or strangers or unknown))


def _listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`, `a, b, c and 2 others`."""
    shown, last = (names[:3], counted(len(names) - 3, "other")) if len(names) > 3 else (names[:-1], names[-1])
    return f"{', '.join(shown)} and {last}" if shown else last


def gap_between(metrics: Mapping[str, Any], first: str, second: str, raw: bool = False) -> dict[str, Any] | None:
    """The difference first − second of the headline; None where it is not known. raw: then that of the raw figure.

    `decided`: on how many questions one of the two was better.
    """
    for row in metrics["comparisons"]:
        if {row["first"], row["second"]} != {first, second}:
            continue
        known = row["headline_difference"] or (row["difference"] if raw or metrics["headline"] in RAW else None)
        if known is None:
            return None
        gap = {**known, "decided": row["better"] + row["worse"]}
        if row["first"] == first:
            return gap
        low, high = gap["low"], gap["high"]
        flipped = {"low": None if high is None else -high, "high": None if low is None else -low}
        return {**gap, "mean": -gap["mean"], **flipped}
    return None


def table_csv(metrics: Mapping[str, Any]) -> str:
    """One row a model and figure: mean and interval; then one a pair of models."""
    rows: list[list[Any]] = []
    judge = [metrics["judge"]["name"], " ".join(metrics["judge"].get("templates") or [])]
    for model in metrics["models"]:
        for name, figure in model["figures"].items():
            values = (figure[key] for key in ("mean", "low", "high", "n"))
            rows.append([model["model"], metrics["opponent"] or "", name, *values, *judge])
    for row in metrics["comparisons"]:
        for name in ("difference", "headline_difference"):
            if row[name] is not None:
                rows.append(
                    [row["first"], row["second"], name, *(row[name][key] for key in ("mean", "low", "high", "n")), *judge]
                )
    return csv_text(["model", "against", "figure", "mean", "low", "high", "questions", "judge", "templates"], rows)


def examples(judged: Mapping[str, Sequence[Judged]], scores: Mapping[str, Score], most: int = EXAMPLES) -> list[dict[str, Any]]:
    """Questions to read: where the first model fares best and where worst, with every answer and what the judge said."""
    first = next(iter(scores))
    values = scores[first].by_question
    by_model = {label: {one.question.id: one for one in answers} for label, answers in judged.items()}
    order = sorted((identifier for identifier in values if identifier in by_model[first]), key=lambda i: (-values[i], i))
    kept = order if len(order) <= most else [*order[: most // 2], *order[-(most - most // 2) :]]
    return [_example(identifier, by_model, scores) for identifier in kept]


def _example(identifier: str, by_model: Mapping[str, Mapping[str, Judged]], scores: Mapping[str, Score]) -> dict[str, Any]:
    sides = {label: answers[identifier] for label, answers in by_model.items() if identifier in answers}
    one = next(iter(sides.values()))
    opponent = one.opponent
    return {
        "id": identifier,
        "category": one.question.category,
        "asked": [prompt_text(one.question), *one.question.follow_ups],
        "opponent": None if opponent is None else {"model": opponent.model, "turns": list(opponent.turns)},
        "answers": [
            {
                "model": label,
                "turns": list(side.answer.turns),
                "value": scores[label].by_question.get(identifier),
                "verdicts": [
                    {"game": verdict.game, "label": verdict.label, "value": verdict.value, "reply": verdict.reply}
                    | ({"lack": verdict.lack} if verdict.lack else {})
                    for verdict in side.verdicts
                ],
            }
            for label, side in sides.items()
        ],
    }
