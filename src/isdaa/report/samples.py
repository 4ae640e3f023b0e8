"""Texts side by side: what reference, best and last checkpoint answered to the same prompts, and how the prompts were chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isdaa.errors import UserError
from isdaa.evaluation.collect import PLAN, SAMPLES
from isdaa.evaluation.overoptimization import Verdict
from isdaa.evaluation.records import blocks_of, read_plan
from isdaa.evaluation.scoring import SCORES, scores_key
from isdaa.evaluation.trajectory import Trajectory

FIRST = WORST = 3  # prompts of each kind
FROM_FIRST = "first in the order of the data"
FROM_WORST = "largest fall in score from peak to last"


def samples_of(run: Trajectory, verdict: Verdict | None) -> dict[str, Any] | None:
    """`{"columns": [{"role", "label"}], "prompts": [{"id", "prompt", "tools", "why", "responses": [{"text", …}]}], "total"}`.

    A prompt is text or a list of messages; tools: those that it offers, null where there are none.
    The first prompts in the order of the data, then those whose score fell most from the peak to the last checkpoint. None where
    the run's records are gone.
    """
    if run.evaluation is None or not (run.evaluation / PLAN).is_file():
        return None
    try:
        return _read(run, run.evaluation, verdict)
    except UserError:  # records that were moved away; all else of the report stands without them
        return None


def _read(run: Trajectory, folder: Path, verdict: Verdict | None) -> dict[str, Any]:
    plan = read_plan(folder / PLAN)
    samples = blocks_of(folder, SAMPLES, plan)
    scores = blocks_of(folder, SCORES, plan) if run.rewards is not None else None  # a judge gives none
    prompts = samples[plan["prompts"]]
    keys = {model["path"]: model["samples"] for model in plan["models"]}
    chosen = _columns(run, verdict)
    columns = [{"role": "Reference", "label": "before training", "key": plan["reference"]["opponents"][0]}]
    columns += [{"role": role, "label": run.labels[i], "key": keys[run.paths[i]]} for role, i in chosen]
    texts = [samples[column["key"]] for column in columns]
    points: list[list[float | None]] = [[None] * len(prompts) for _ in columns]
    if scores is not None:
        points = [
            [record["score"] for record in scores[scores_key(column["key"], plan["prompts"], plan["scorer"]["digest"])]]
            for column in columns
        ]
    found = []
    for index, why in _choose(run, chosen, len(prompts)):
        responses = [
            {
                "text": text[index]["text"],
                "tokens": text[index]["tokens"],
                "finished": text[index]["finished"],
                "score": value[index],
            }
            for text, value in zip(texts, points, strict=True)
        ]
        prompt = prompts[index]
        asked = {"id": prompt["prompt_id"], "prompt": prompt["prompt"], "tools": prompt.get("tools")}
        found.append(asked | {"why": why, "responses": responses})
    return {"columns": [{k: c[k] for k in ("role", "label")} for c in columns], "prompts": found, "total": len(prompts)}


def _columns(run: Trajectory, verdict: Verdict | None) -> list[tuple[str, int]]:
    """(role, index) of the checkpoints beside the reference."""
    last = len(run.steps) - 1
    if verdict is None:
        return [("First checkpoint", 0), ("Last checkpoint", last)] if last else [("Checkpoint", 0)]
    if verdict.peak == last:
        return [("Peak and last checkpoint", last)]
    return [("Peak", verdict.peak), ("Last checkpoint", last)]


def _choose(run: Trajectory, columns: Sequence[tuple[str, int]], total: int) -> list[tuple[int, str]]:
    first = [(i, FROM_FIRST) for i in range(min(FIRST, total))]
    if run.rewards is None or len(columns) < 2:
        return first
    falls = run.rewards[columns[0][1]] - run.rewards[columns[-1][1]]
    worst = [int(i) for i in np.argsort(-falls, kind="stable") if i >= len(first) and falls[i] > 0]
    return first + [(i, FROM_WORST) for i in worst[:WORST]]


def representative(
    runs: Sequence[Trajectory], summaries: Sequence[Any], verdicts: Mapping[str, Verdict | None]
) -> list[tuple[Trajectory, str]]:
    """(run, why it): all of two runs; of more, one of the cell that fell most and one of the cell that ended highest."""
    if len(runs) <= 2:
        return [(run, "") for run in runs]
    scored = [s for s in summaries if s.final.seeds]
    if not scored:
        return [(runs[0], "the first run"), (runs[-1], "the last run")]
    falling = [s for s in scored if s.fall.seeds]
    picked = [(max(falling, key=lambda s: s.fall.mean), "the largest mean fall")] if falling else []
    picked.append((max(scored, key=lambda s: s.final.mean), "the highest mean final win rate"))
    found: dict[str, tuple[Trajectory, str]] = {}
    for summary, why in picked:
        members = [run for run in summary.runs if run.wins is not None]
        gaps = [abs(float(run.wins[-1].mean()) - summary.final.mean) for run in members if run.wins is not None]
        run = members[int(np.argmin(gaps))]
        found.setdefault(run.name, (run, f"of the cell with {why}, the seed nearest to its mean final win rate"))
    return list(found.values())
