"""Step two of three: scores of recorded samples. Needs a scorer and the samples' file, no policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from isdaa.distributed import dealt, once, world_size
from isdaa.evaluation.checkpoints.sample_and_kl import PLAN, SAMPLES
from isdaa.evaluation.judges.replies import parts_of, without_thinking
from isdaa.evaluation.records import Blocks, Record, blocks_of, read_plan
from isdaa.evaluation.scorers import OwnFacts, RewardModelScorer, Scorer, cut_by_positions, facts
from isdaa.files import digest, write_json
from isdaa.record import git_revision, versions
from isdaa.terminal import Bar, progress

SCORES = "scores.jsonl"


def scores_key(samples: str, prompts: str, scorer_digest: str) -> str:
    """Key of one scorer's scores of one block of samples; `prompts` decides the facts that it sees."""
    return digest(["scores", samples, prompts, scorer_digest])


def chosen_key(prompts: str, scorer_digest: str) -> str:
    """Key of the scores of the data's chosen responses."""
    return scores_key("chosen", prompts, scorer_digest)


def score(folder: str | Path, scorer: Scorer) -> None:
    """Score every sample of the evaluation in `folder`, and the chosen responses, that this scorer has not scored yet.

    Raises UserError where step one has left no records, or for rows that the scorer cannot judge.
    """
    folder = Path(folder)
    plan, samples, scores = once(lambda: _records(folder))
    prompts = {row["prompt_id"]: row for row in samples[plan["prompts"]]}
    keep = bool(plan["settings"].get("keep_thinking"))
    chosen = [
        {"prompt_id": name, "sample": 0, "text": row["chosen"], "finished": True}
        for name, row in prompts.items()
        if row["chosen"] is not None
    ]
    # A file of scores may leave the chosen ones out.
    given = {"chosen": chosen} if chosen and getattr(scorer, "with_chosen", True) else {}
    given |= {key: samples[key] for key in [*plan["reference"]["opponents"], *(model["samples"] for model in plan["models"])]}
    said = {key: [answer(r, prompts[r["prompt_id"]], keep) for r in records] for key, records in given.items()}
    scored_as = scorer.digest
    own = isinstance(scorer, OwnFacts)  # scores of a file are of whatever it scored
    if not own and any(text != r["text"] for key, records in given.items() for text, r in zip(said[key], records, strict=True)):
        scored_as = digest([scorer.digest, "answers"])  # not the scores that an earlier version gave to thinking and all
    work = {scores_key(key, plan["prompts"], scored_as): (key, records) for key, records in given.items()}
    todo = {key: value for key, value in work.items() if key not in scores}
    shared = {"scorer": scorer.name, "scorer_digest": scored_as, "prompts": plan["prompts"]}
    shared |= {"versions": versions(), "git_revision": git_revision()}
    if todo:
        with progress("scoring", sum(len(records) for _, records in todo.values()) // world_size()) as bar:
            for key, (of, records) in todo.items():
                rows = [
                    {**prompts[r["prompt_id"]], "id": r["prompt_id"], "response": text, "finished": r["finished"]}
                    | {"of": of, "sample": r["sample"]}
                    for r, text in zip(records, said[of], strict=True)
                ]
                values = dealt(rows, partial(_scored, scorer, bar))
                scored = [
                    {"prompt_id": r["prompt_id"], "sample": r["sample"], "score": value} | more
                    for r, (value, more) in zip(records, values, strict=True)
                ]
                scores.add("scores", key, {"of": of, **shared}, scored)
    lacking = [record.get("lacking") or () for key in work for record in scores[key]]
    doubts = list(dict.fromkeys([*(plan.get("doubts") or []), *cut_by_positions(scorer, lacking)]))
    once(
        lambda: write_json(
            folder / PLAN, plan | {"scorer": facts(scorer) | {"digest": scored_as}} | ({"doubts": doubts} if doubts else {})
        )
    )


def answer(record: Mapping[str, Any], prompt: Mapping[str, Any], keep: bool) -> Any:
    """What of a response counts: all of it, or its answer without what was thought."""
    if keep:
        return record["text"]
    drawn = "tokens" in record
    return parts_of(record, prompt).answer if drawn else without_thinking(record["text"])


def _scored(scorer: Scorer, bar: Bar, rows: Sequence[Record]) -> list[tuple[float, Record]]:
    """Each row's score, and `lacking`: which of prompt and response the scorer could not read whole."""
    values = scorer.score(rows, progress=bar)
    lacking = scorer.lacking if isinstance(scorer, RewardModelScorer) else [()] * len(values)
    return [(value, {"lacking": list(parts)} if parts else {}) for value, parts in zip(values, lacking, strict=True)]


def _records(folder: Path) -> tuple[Record, Blocks, Blocks]:
    """The plan of the evaluation in `folder`, its samples and its scores."""
    plan = read_plan(folder / PLAN)
    return plan, blocks_of(folder, SAMPLES, plan), blocks_of(folder, SCORES, plan)
