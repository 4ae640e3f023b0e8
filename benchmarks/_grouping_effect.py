"""What reading the pairs of one prompt together does to training: twin runs on the embedded world, and the noise of a step.

A sweep trains every method twice on the same pairs of each seed, grouped and not, and evaluates both as any run. All seeds begin
with one SFT model; they differ in the sampled responses, the labels and the order. Then, with neither
model moving, the gradients of an epoch's first steps are taken in both orders: how far they scatter says how many independent
pairs a grouped step is worth.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _grouping import pair_losses
from rich.table import Table

from isdaa.config import Config, load_config
from isdaa.data.encoder import token_settings
from isdaa.data.reading.sources import hold_out, load_pairs
from isdaa.data.tokenize_pairs import tokenize_pairs
from isdaa.evaluation.checkpoints.trajectory import Trajectory, read_study
from isdaa.evaluation.verdict.comparison import SeedMean, seed_mean, to_json
from isdaa.experiments.grid import SweepConfig
from isdaa.experiments.sweep import run_sweep
from isdaa.files import write_jsonl
from isdaa.foreign import iterate_jsonl
from isdaa.models.loading import load_model, load_tokenizer
from isdaa.models.packed.forward import PairForward, prepare
from isdaa.objectives.objective import Objective
from isdaa.objectives.presets import resolve
from isdaa.terminal import progress, say
from isdaa.training.run_stages import run as run_stages
from isdaa.training.trainer.batches import GlobalBatchSampler, TokenisedPairs
from isdaa.training.trainer.reference_logps import reference_logps
from isdaa.world import make_posts

BASE = Path(__file__).resolve().parents[1] / "configs" / "mini" / "demo.yaml"
START_SEED = 31  # of the SFT model
MEASURED = ("win_rate", "kl", "accuracy", "loss_noise")

DEFINITIONS = {
    "win_rate, kl, accuracy": "of the last checkpoint: win rate against the reference and KL in nats on held-out prompts, share "
    "of held-out pairs that are ranked as labelled, pairs of a prompt averaged first",
    "loss_noise": "scatter of the training loss from step to step: root mean square difference of neighbouring steps over √2, in "
    "the second half of the run",
    "differences": "grouped less not grouped, seed by seed, with the mean and its 95 % interval by Student's t",
    "variance": "of a step's gradient: summed over all weights, over the first steps of an epoch, the model at rest",
    "variance_ratio": "variance with grouped pairs over that without, at the same model on the same pairs",
    "worth": "batch size over variance_ratio: as many independent pairs have gradients that scatter as much",
    "prompts_per_step": "different prompts in a step, mean",
}


@dataclass(frozen=True)
class Effect:
    """What is run. noise_steps: gradients that are taken in each order, at each model."""

    seeds: tuple[int, ...]
    folder: Path
    jobs: int = 1
    threads: int = 1
    prompts: int = 1700
    samples: int = 12
    methods: tuple[str, ...] = ("dpo", "is_dpo")
    beta: float = 0.01
    save_steps: int = 160  # two checkpoints
    noise_steps: int = 100
    more: Mapping[str, Any] = field(default_factory=dict)  # further keys of a run


def tiny_effect(seeds: tuple[int, ...], folder: Path, jobs: int = 1, threads: int = 1) -> Effect:
    """Nothing can be learnt from it, but that it runs."""
    more = {
        "data.limit": 400, "data.eval_fraction": 0.1, "sft.epochs": 1, "label.max_new_tokens": 8, "align.batch_size": 8,
        "evaluation.prompts": 8, "evaluation.opponent_samples": 1, "evaluation.max_new_tokens": 8, "evaluation.bootstrap": 100,
    }  # fmt: skip
    return Effect(seeds, folder, jobs, threads, prompts=20, samples=8, methods=("dpo",), save_steps=6, noise_steps=6, more=more)


def run_effect(settings: Effect) -> dict[str, Any]:
    """Run what is not finished yet, and say what came out, as JSON-able data."""
    start = _start(settings)
    base = _base(settings, start)
    sweep = SweepConfig.model_validate(
        {
            "title": "Pairs of one prompt, together or not",
            "base": "demo.yaml",
            "output_dir": str(settings.folder / "sweep"),
            "seeds": list(settings.seeds),
            "grids": {
                "order": {
                    "objective.method": list(settings.methods),
                    "objective.beta": settings.beta,
                    "align.group_by_prompt": [False, True],
                }
            },
            "jobs": settings.jobs,
            "threads": settings.threads,
        }
    )
    folder = run_sweep(sweep, base, "group_by_prompt")
    runs = _runs(folder, settings)
    torch.set_num_threads(settings.threads)
    noise = [_noise(folder, start, settings, base, seed) for seed in settings.seeds]
    return {
        "settings": {name: value for name, value in asdict(settings).items() if name != "folder"},
        "definitions": DEFINITIONS,
        "pairs": {str(entry["seed"]): entry["pairs"] for entry in noise},
        "methods": {method: _compared(*runs[method]) for method in settings.methods},
        "noise": noise,
        "noise_over_seeds": {at: to_json(seed_mean([entry[at]["variance_ratio"] for entry in noise])) for at in ("start", "end")},
    }


def _start(settings: Effect) -> Path:
    """The SFT model from which all runs start."""
    first = {"stages": ["sft"], "seed": START_SEED, "output_dir": str(settings.folder / "start")}
    return run_stages(load_config(BASE, dict(settings.more) | first)) / "sft"


def _base(settings: Effect, start: Path) -> Config:
    """The demo's configuration on fewer prompts with more responses each, and the file of those prompts."""
    prompts = settings.folder / "prompts.jsonl"
    posts = make_posts("small", settings.prompts, split="prompts")
    write_jsonl(prompts, [{name: post[name] for name in ("id", "prompt", "facts")} for post in posts])
    given = {
        "stages": ["label", "align"],
        "model.path": str(start),
        "model.random": None,
        "model.tokenizer": None,
        "data.prompts": str(prompts),
        "label.samples": settings.samples,
        "align.save_steps": settings.save_steps,
        "align.logging_steps": 1,
        **settings.more,
    }
    return load_config(BASE, given)


# ---------------------------------------------------------------------------------------------------------------------
# The runs


def _runs(folder: Path, settings: Effect) -> dict[str, tuple[list[Trajectory], list[Trajectory]]]:
    """Of each method: runs without and with groups, by seed. Another call's seeds are left out."""
    found: dict[str, tuple[list[Trajectory], list[Trajectory]]] = {method: ([], []) for method in settings.methods}
    for run in sorted(read_study(folder).runs, key=lambda run: run.seed or 0):
        method = run.settings["objective.method"]
        if run.seed in settings.seeds and method in found:
            found[method][run.settings["align.group_by_prompt"]].append(run)
    return found


def _compared(apart: Sequence[Trajectory], grouped: Sequence[Trajectory]) -> dict[str, Any]:
    rows = [[_measured(run) for run in runs] for runs in (apart, grouped)]
    return {
        "not_grouped": rows[0],
        "grouped": rows[1],
        "means": {
            name: {
                which: to_json(seed_mean([row[name] for row in part]))
                for which, part in zip(("not_grouped", "grouped"), rows, strict=True)
            }
            for name in MEASURED
        },
        "differences": {name: to_json(gap) for name, gap in differences(*rows).items()},
    }


def differences(apart: Sequence[Mapping[str, Any]], grouped: Sequence[Mapping[str, Any]]) -> dict[str, SeedMean]:
    """Grouped less not grouped of everything measured, paired by seed; only seeds that both have."""
    others = {row["seed"]: row for row in apart}
    pairs = [(row, others[row["seed"]]) for row in grouped if row["seed"] in others]
    return {name: seed_mean([one[name] - other[name] for one, other in pairs]) for name in MEASURED}


def _measured(run: Trajectory) -> dict[str, Any]:
    assert run.wins is not None and run.history is not None
    return {
        "seed": run.seed,
        "steps": run.steps.tolist(),
        "win_rates": run.wins.mean(axis=1).tolist(),
        "kls": run.kl.mean(axis=1).tolist(),
        "win_rate": float(run.wins[-1].mean()),
        "kl": float(run.kl[-1].mean()),
        "accuracy": run.metrics[-1]["held_out"]["accuracy"]["mean"],
        "loss_noise": _loss_noise(run.history),
    }


def _loss_noise(history: Path) -> float:
    losses = [row["loss"] for _, row in iterate_jsonl(history) if row.get("loss") is not None]
    late = losses[len(losses) // 2 :]
    return statistics.pstdev(np.diff(late).tolist(), mu=0.0) / 2**0.5


# ---------------------------------------------------------------------------------------------------------------------
# The noise of a step


def _noise(folder: Path, start: Path, settings: Effect, base: Config, seed: int) -> dict[str, Any]:
    """How far gradients scatter in both orders, at the model that all runs of a seed start from and where plain DPO ends."""
    end = folder / "runs" / f"dpo-beta{settings.beta:g}-group_by_promptFalse" / f"seed-{seed}" / "model"
    tokenizer = load_tokenizer(str(start))
    rows, _ = load_pairs(str(folder / "shared" / f"seed-{seed}" / "pairs" / "train.jsonl"))
    rows, _ = hold_out(rows, base.data.eval_fraction, seed)
    pairs = TokenisedPairs(tokenize_pairs(rows, tokenizer, token_settings(base.tokenization))[0])
    forward = prepare(load_model(str(start)))
    pairs = pairs.with_reference(*reference_logps(forward, pairs, key={}, cache_dir=None))
    groups = pairs.prompt_groups()
    found: dict[str, Any] = {"seed": seed, "pairs": len(pairs), "prompts": int(groups.max()) + 1}
    objective = Objective(**resolve("dpo", beta=settings.beta))
    orders = {
        name: _first_batches(pairs, base.align.batch_size, seed, groups if grouped else None, settings.noise_steps)
        for name, grouped in (("not_grouped", False), ("grouped", True))
    }
    found["prompts_per_step"] = {
        name: statistics.mean(len(np.unique(groups[batch])) for batch in batches) for name, batches in orders.items()
    }
    for at, model in (("start", None), ("end", end)):
        if model is not None:
            forward = prepare(load_model(str(model)))
        say(f"seed {seed}: gradients at the {at}")
        variance = {name: gradient_variance(forward, objective, pairs, batches) for name, batches in orders.items()}
        ratio = variance["grouped"] / variance["not_grouped"]
        found[at] = {"variance": variance, "variance_ratio": ratio, "worth": base.align.batch_size / ratio}
    return found


def _first_batches(pairs: TokenisedPairs, size: int, seed: int, groups: np.ndarray | None, most: int) -> list[list[int]]:
    sampler = GlobalBatchSampler(len(pairs), size, 1, 1, 0, seed, lengths=pairs.lengths(), groups=groups)
    return [batch for batch, _ in zip(sampler, range(most), strict=False) if len(batch) == size]


def gradient_variance(
    forward: PairForward, objective: Objective, pairs: TokenisedPairs, batches: Sequence[Sequence[int]]
) -> float:
    """Unbiased variance of the mean loss's gradient over batches, summed over all weights. At least two batches."""
    model = forward.model.eval()
    total: torch.Tensor | None = None
    squares = 0.0
    with progress("gradients", len(batches)) as bar:
        for batch in batches:
            model.zero_grad()
            pair_losses(forward, objective, pairs, batch)[0].mean().backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
            total = gradient if total is None else total + gradient
            squares += float(gradient @ gradient)
            bar.update()
    assert total is not None
    return (squares - float(total @ total) / len(batches)) / (len(batches) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The runs with their differences, and the noise of a step."""
    runs = Table(
        title="End of training on the embedded world; differences: grouped − not grouped, mean [95 % interval over seeds]"
    )
    for column in ("method", "seed", "win rate", "grouped", "KL", "grouped", "accuracy", "grouped", "loss noise", "grouped"):
        runs.add_column(column, justify="left" if column == "method" else "right")
    for method, part in found["methods"].items():
        for apart, grouped in zip(part["not_grouped"], part["grouped"], strict=True):
            cells = [f"{row[name]:.{_digits(name)}f}" for name in MEASURED for row in (apart, grouped)]
            runs.add_row(method, str(apart["seed"]), *cells)
        gaps = [["", _interval(part["differences"][name], _digits(name))] for name in MEASURED]
        runs.add_row(method, "Δ", *(cell for both in gaps for cell in both), end_section=True)
    noise = Table(title="Variance of a step's gradient, grouped / not grouped")
    for column in (
        "seed",
        "pairs",
        "prompts",
        "prompts a step",
        "grouped",
        "ratio at the start",
        "worth",
        "ratio at DPO's end",
        "worth",
    ):
        noise.add_column(column, justify="right")
    for entry in found["noise"]:
        steps = entry["prompts_per_step"]
        noise.add_row(
            *(str(entry[name]) for name in ("seed", "pairs", "prompts")),
            f"{steps['not_grouped']:.1f}",
            f"{steps['grouped']:.1f}",
            *(cell for at in ("start", "end") for cell in (f"{entry[at]['variance_ratio']:.2f}", f"{entry[at]['worth']:.1f}")),
        )
    return [runs, noise]


def _digits(name: str) -> int:
    return {"kl": 2, "loss_noise": 4}.get(name, 3)


def _interval(value: Mapping[str, Any], digits: int) -> str:
    mean = f"{value['mean']:+.{digits}f}"
    return mean if value["low"] is None else f"{mean} [{value['low']:+.{digits}f}, {value['high']:+.{digits}f}]"
