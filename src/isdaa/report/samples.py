"""Texts side by side: what the reference and some checkpoints answered to the same prompts, and how the prompts were chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isdaa.errors import UserError
from isdaa.evaluation.checkpoints.sample_and_kl import PLAN, SAMPLES
from isdaa.evaluation.checkpoints.scoring import SCORES, answer, scores_key
from isdaa.evaluation.checkpoints.trajectory import Trajectory
from isdaa.evaluation.judges.replies import parts_of
from isdaa.evaluation.records import Blocks, blocks_of, read_plan
from isdaa.evaluation.verdict.overoptimization import Verdict, places_of

FIRST = WORST = 3  # prompts of each kind
FROM_FIRST = "first in the order of the data"
FROM_WORST = "largest fall in "
PEAK, BEST, KEEP, LAST = "Peak", "Best checkpoint", "Checkpoint to keep", "Last checkpoint"


def samples_of(run: Trajectory, verdict: Verdict | None, opponent: str = "reference") -> dict[str, Any] | None:
    """`{"columns": [{"role", "label"}], "prompts": [{"id", "prompt", "tools", "why", "responses": [{"text", …}]}], "total"}`.

    A prompt is text or a list of messages; tools: those that it offers, null where there are none.
    The first prompts in the order of the data, then those whose score fell most from the first shown checkpoint to the last. The
    data's chosen responses stand beside them where they are the opponent. A response is raw text, a chosen one may be messages.
    None where the run's records are gone.
    """
    if run.evaluation is None or not (run.evaluation / PLAN).is_file():
        return None
    try:
        return _read(run, run.evaluation, verdict, opponent)
    except UserError:  # records that were moved away; all else of the report stands without them
        return None


def _read(run: Trajectory, folder: Path, verdict: Verdict | None, opponent: str) -> dict[str, Any]:
    plan = read_plan(folder / PLAN)
    samples = blocks_of(folder, SAMPLES, plan)
    scores = blocks_of(folder, SCORES, plan) if run.rewards is not None else None  # a judge gives none
    prompts = samples[plan["prompts"]]
    keys = {model["path"]: model["samples"] for model in plan["models"]}
    chosen = _columns(run, verdict)
    columns = [{"role": "Reference", "label": "before training", "key": plan["reference"]["opponents"][0]}]
    names = places_of(run.labels, list(run.steps) if run.steps_known else None)
    columns += [{"role": role, "label": names[i], "key": keys[run.paths[i]]} for role, i in chosen]
    texts = [samples[column["key"]] for column in columns]
    points = [_points(scores, plan, column["key"], len(prompts)) for column in columns]
    if opponent == "chosen":
        columns.insert(0, {"role": "Chosen", "label": "from the data", "key": "chosen"})
        texts.insert(0, [{"text": prompt["chosen"], "tokens": None, "finished": True} for prompt in prompts])
        points.insert(0, _points(scores, plan, "chosen", len(prompts)))
    found = []
    keep = bool(plan["settings"].get("keep_thinking"))
    for index, why in _choose(run, chosen, len(prompts)):
        prompt = prompts[index]
        responses = [
            {"score": value[index]} | _shown(text[index], prompt, keep) for text, value in zip(texts, points, strict=True)
        ]
        asked = {"id": prompt["prompt_id"], "prompt": prompt["prompt"], "tools": prompt.get("tools")}
        found.append(asked | {"why": why, "responses": responses})
    return {"columns": [{k: c[k] for k in ("role", "label")} for c in columns], "prompts": found, "total": len(prompts)}


def _shown(record: Mapping[str, Any], prompt: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    """A response, and what was thought before it, which neither scorer nor judge saw."""
    thinking = parts_of(record, prompt).thinking if not keep and record["tokens"] is not None else ""
    text = answer(record, prompt, keep) if record["tokens"] is not None else record["text"]
    return {key: record[key] for key in ("tokens", "finished")} | {"text": text} | ({"thinking": thinking} if thinking else {})


def _points(scores: Blocks | None, plan: Mapping[str, Any], key: str, count: int) -> list[float | None]:
    """A block's scores; a judge that only compares gives none."""
    name = scores_key(key, plan["prompts"], plan["scorer"]["digest"]) if scores is not None else ""
    if scores is None or name not in scores:
        return [None] * count
    return [record.get("score") for record in scores[name]]


def _columns(run: Trajectory, verdict: Verdict | None) -> list[tuple[str, int]]:
    """(role, index) of the checkpoints beside the reference: a peak is one only where the verdict finds a fall from it."""
    last = len(run.steps) - 1
    if verdict is None:
        return [("First checkpoint", 0), (LAST, last)] if last else [("Checkpoint", 0)]
    fell = verdict.finding in ("over-optimised", "worse") and not verdict.below_start
    best = int(run.wins.mean(axis=1).argmax()) if run.wins is not None else verdict.peak
    role, index = (PEAK, verdict.peak) if fell else (BEST, best) if verdict.keeps_reference else (KEEP, verdict.recommended)
    return [(role, index), (LAST, last)] if index != last else [(f"{role}, the last" if role != PEAK else LAST, last)]


def _choose(run: Trajectory, columns: Sequence[tuple[str, int]], total: int) -> list[tuple[int, str]]:
    first = [(i, FROM_FIRST) for i in range(min(FIRST, total))]
    judged, what = (run.rewards, "score") if run.rewards is not None else (run.wins, "win rate")
    if judged is None or len(columns) < 2:
        return first
    (role, one), (_, other) = columns
    falls = judged[one] - judged[other]
    worst = [int(i) for i in np.argsort(-falls, kind="stable") if i >= len(first) and falls[i] > 0]
    return first + [(i, f"{FROM_WORST}{what} from {role[:1].lower()}{role[1:]} to last") for i in worst[:WORST]]


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
