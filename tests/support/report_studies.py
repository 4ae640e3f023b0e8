"""Studies made of arrays and of records on disk: every shape that the report must take."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isdaa.evaluation.checkpoints.sample_and_kl import PLAN, SAMPLES
from isdaa.evaluation.checkpoints.scoring import SCORES, scores_key
from isdaa.evaluation.checkpoints.trajectory import Study, Trajectory
from isdaa.evaluation.records import Blocks
from isdaa.evaluation.statistics import mean_interval
from isdaa.files import write_json

SCRIPT = "<script>alert(1)</script>"
RISES = (0.60, 0.68, 0.72, 0.74, 0.75, 0.75, 0.76, 0.76)
SECTIONS = {"learning_rate": "align", "optimizer": "align", "epochs": "align", "save_steps": "align", "limit": "data"}
FALLS = (0.70, 0.76, 0.74, 0.68, 0.63, 0.58, 0.55, 0.54)


def interval(values: np.ndarray) -> dict[str, Any]:
    return mean_interval(values, resamples=50).to_json()


def entries(run: dict[str, Any], scored: bool = True, held_out: bool = True) -> list[dict[str, Any]]:
    """Entries as those of `metrics.json`."""
    found = []
    for i, step in enumerate(run["steps"]):
        entry = {"path": run["paths"][i], "label": run["labels"][i], "method": run["method"], "beta": run["beta"]}
        entry |= {"seed": run["seed"], "step": int(step) if run["method"] else None, "weight_mean": None, "ess": None}
        entry |= {"kl": interval(run["kl"][i]), "win_rate": interval(run["wins"][i]) if scored else None}
        entry |= {"reward": interval(run["rewards"][i]) if scored else None, "length": interval(run["lengths"][i])}
        entry |= {"truncated": 0.01 * i, "repetition": 0.004 * i}
        if held_out:
            drift = {"pairs": 20, "accuracy": interval(np.array([0.0, 1.0, 1.0, 0.0, 1.0]))}
            entry["held_out"] = drift | {
                k: interval(np.array([-1.0, -2.0]) * (i + 1)) for k in ("chosen_drift", "rejected_drift")
            }
        found.append(entry)
    return found


def trajectory(
    method: str | None = "dpo",
    beta: float | None = 0.01,
    seed: int | None = 1,
    *,
    curve: Sequence[float] | None = None,
    prompts: int = 80,
    scored: bool = True,
    held_out: bool = True,
    folder: str = "runs",
    **more: Any,
) -> Trajectory:
    """One run whose win rate follows `curve`, its KL growing with 1/β."""
    weighted = method is not None and method.startswith("is_")
    curve = curve or (RISES if weighted else FALLS)
    rng = np.random.default_rng(_number(method, beta, seed))
    count = len(curve)
    rates = np.clip(np.array(curve) + 0.01 * rng.standard_normal(count), 0.02, 0.98)
    wins = (rng.random((count, prompts)) < rates[:, None]).astype(float)
    scale = (0.25 if weighted else 1.0) * (0.05 / (beta or 0.05)) ** 0.5
    kl = scale * np.arange(1, count + 1)[:, None] * rng.gamma(4.0, 0.25, (count, prompts))
    name = more.pop("name", f"{method}-{beta}-{seed}")
    run: dict[str, Any] = {
        "name": name,
        "steps": np.arange(1, count + 1) * 40,
        "labels": [f"{method}/checkpoint-{40 * (i + 1)}" for i in range(count)],
        "paths": [f"{folder}/{name}/checkpoints/checkpoint-{40 * (i + 1)}" for i in range(count)],
        "kl": kl,
        "wins": wins,
        "rewards": wins * 2 + rng.standard_normal((count, prompts)),
        "lengths": rng.integers(10, 30, (count, prompts)).astype(float),
        "method": method,
        "beta": beta,
        "seed": seed,
        "start": 0.5,
    }
    run["metrics"] = entries(run, scored, held_out)
    if not scored:
        run |= {"wins": None, "rewards": None, "start": None}
    return Trajectory(**(run | more))


def _number(*parts: Any) -> int:
    return zlib.crc32(json.dumps(parts).encode())


def metrics_of(runs: Sequence[Trajectory], scored: bool = True) -> dict[str, Any]:
    """`metrics.json` of an evaluation of these runs."""
    flat = {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 80}
    reference = {"path": "models/sft", "digest": "0" * 24, "kl": flat | {"mean": 0.0, "low": 0.0, "high": 0.0}}
    reference |= {"win_rate": flat if scored else None, "reward": flat if scored else None, "length": flat | {"mean": 18.0}}
    reference |= {"truncated": 0.01, "repetition": 0.01}
    settings = {
        "scorer": "gold" if scored else None,
        "prompts": 80,
        "opponent": "reference",
        "opponent_samples": 2,
        "ties": "half",
    }
    settings |= {"max_new_tokens": 32, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "batch_size": 8, "bootstrap": 100}
    return {
        "format": 2,
        "scorer": {"name": "gold", "digest": "1" * 24} if scored else None,
        "verdict": None,
        "note": "",
        "opponent": "reference",
        "prompts": 80,
        "settings": settings | {"confidence": 0.95, "seed": 0},
        "reference": reference,
        "models": [entry for run in runs for entry in run.metrics],
        "tokenization": {"max_length": 128, "max_prompt_length": 96, "truncation": "keep_end"},
        "template": "none",
        "tokenizer": "2" * 24,
        "git_revision": "abcdef012345",
        "versions": {"python": "3.11", "isdaa": "0.1.0"},
    }


def study(runs: Sequence[Trajectory], title: str = "study", **more: Any) -> Study:
    """Runs looked at together."""
    scored = runs[0].wins is not None
    return Study(list(runs), metrics_of(runs, scored), title, Path("runs/study"), **more)


def sweep(methods: Sequence[str] = ("dpo", "is_dpo"), betas: Sequence[float] = (0.01, 0.1), seeds: int = 3, **more: Any) -> Study:
    """A sweep of methods, βs and seeds."""
    cells, runs = [], []
    for method in methods:
        for beta in betas:
            name = f"{method}-beta{beta:g}"
            settings = {"objective.method": method, "objective.beta": beta}
            cells.append({"name": name, "grids": ["main"], "settings": settings})
            runs += [
                trajectory(method, beta, 20 + s, cell=name, settings=settings, name=f"{name}/seed-{20 + s}", **more)
                for s in range(seeds)
            ]
    return study(runs, "a sweep", cells=cells)


def cells(*settings: dict[str, Any], seeds: Sequence[int] = (1, 2), **more: Any) -> Study:
    """A sweep of cells that set `settings`, keys without their section: `{"method": "is_dpo", "learning_rate": 0.1}`."""
    names, runs = [], []
    for given in settings:
        dotted = {f"{SECTIONS.get(key, 'objective')}.{key}": value for key, value in given.items()}
        name = "-".join(f"{key}{value}" for key, value in given.items())
        names.append({"name": name, "grids": ["main"], "settings": dotted})
        beta = given.get("beta", 0.01)
        runs += [trajectory(given["method"], beta, s, cell=name, settings=dotted, name=f"{name}/seed-{s}", **more) for s in seeds]
    return study(runs, "cells", cells=names)


def write_evaluation(folder: Path, *, text: str = SCRIPT, scored: bool = True, prompts: int = 12) -> Path:
    """An evaluation of one run, as records on disk that `read_study` reads; every response holds `text`."""
    run = folder / "dpo"
    evaluation = run / "evaluation"
    evaluation.mkdir(parents=True)
    made = trajectory(prompts=prompts, scored=scored, folder=str(folder), name="dpo", curve=FALLS[:5])
    metrics = metrics_of([made], scored)
    samples, scores = Blocks(evaluation / SAMPLES), Blocks(evaluation / SCORES)
    rows = [
        {"prompt_id": f"p{i}", "prompt": f"Prompt {i} {text}", "prompt_ids": [1, 2], "chosen": None, "facts": None, "chat": False}
        for i in range(prompts)
    ]
    samples.add("prompts", "prompts", {}, rows)

    def block(name: str, values: np.ndarray | None, kl: np.ndarray | None = None) -> str:
        records = [
            {
                "prompt_id": f"p{i}",
                "sample": 0,
                "text": f"{name} says {text} & <b>{i}</b>",
                "ids": [3, 4, 5],
                "tokens": 3,
                "finished": i % 2 == 0,
            }
            for i in range(prompts)
        ]
        if kl is not None:
            records = [{**record, "kl": float(value), "mc": 0.0} for record, value in zip(records, kl, strict=True)]
        samples.add("samples", name, {}, records)
        if scored and values is not None:
            points = [{"prompt_id": f"p{i}", "sample": 0, "score": float(v)} for i, v in enumerate(values)]
            scores.add("scores", scores_key(name, "prompts", "1" * 24), {}, points)
        return name

    opponents = [block(f"opponent{k}", np.zeros(prompts)) for k in range(2)]
    models = []
    for i, entry in enumerate(made.metrics):
        values = np.asarray(made.rewards[i] if made.rewards is not None else np.zeros(prompts))
        planned = {key: entry[key] for key in ("path", "label", "method", "beta", "seed", "step")}
        models.append(
            planned
            | {"digest": "3" * 24, "samples": block(f"policy{i}", values), "kl": block(f"kl{i}", None, made.kl[i]), "pairs": None}
        )
    plan = {"format": 2, "prompts": "prompts", "models": models, "scorer": metrics["scorer"]}
    plan["reference"] = {"path": "models/sft", "digest": "4" * 24, "opponents": opponents, "pairs": None}
    plan |= {key: metrics[key] for key in ("settings", "tokenization", "template", "tokenizer", "git_revision")}
    write_json(evaluation / PLAN, plan)
    write_json(evaluation / "metrics.json", metrics)
    return run
