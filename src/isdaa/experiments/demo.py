"""The main job on the embedded world: SFT, gold labels, one alignment per method, every checkpoint evaluated, one chart."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isdaa.config import Config, resolved, validate
from isdaa.errors import UserError
from isdaa.objectives.presets import PRESETS
from isdaa.terminal import progress

CHART = "win_rate_against_kl"
# Measured on two idle cores; the estimate starts from it.
SECONDS = {"sft": 75, "reward": 40, "label": 45, "align": 42, "evaluate": 17}


def run_demo(config: Config, methods: Sequence[str]) -> Path | None:
    """Run or finish the experiment in `config.output_dir`. Returns the chart's path; None without a scorer.

    `world/` holds the SFT model and the pairs that all methods share, `METHOD/` one run each, `evaluation/` the records.
    Raises UserError for unknown methods.
    """
    for method in methods:
        if method not in PRESETS:
            raise UserError(f"--methods: unknown method {method!r}; `isdaa methods` lists the presets")
    from isdaa.training.stages import run

    started = time.monotonic()
    base = Path(config.output_dir)
    shared, runs = shared_config(config), [method_config(config, method) for method in methods]
    total = sum(SECONDS[name] for name in shared.stages) + len(runs) * (SECONDS["align"] + SECONDS["evaluate"])
    with progress("demo", total, pace=1.0) as bar:
        for stage in shared.stages:
            with bar.part(SECONDS[stage], stage):
                run(shared.model_copy(update={"stages": [stage]}))
        for one in runs:
            with bar.part(SECONDS["align"], f"align: {one.objective.method}"):
                run(one)
        with bar.part(len(runs) * SECONDS["evaluate"], "evaluating"):
            metrics = evaluate_runs([Path(one.output_dir) for one in runs], config)
    chart = draw(metrics, base)
    show(metrics, base, chart, time.monotonic() - started)
    return chart


def shared_config(config: Config) -> Config:
    """The stages that every method shares."""
    data = config.model_dump()
    data.update(output_dir=str(Path(config.output_dir) / "world"), stages=[s for s in config.stages if s != "align"])
    return validate(data, "demo")


def method_config(config: Config, method: str) -> Config:
    """One method's alignment, from the shared SFT model and pairs."""
    base = Path(config.output_dir)
    data = resolved(config)
    data.update(output_dir=str(base / method), stages=["align"])
    given = {key: value for key, value in config.model_dump()["objective"].items() if value != "preset"}
    data["objective"] = {**given, "method": method}
    data["model"].update(path=str(base / "world" / "sft"), random=None, tokenizer=None)
    data["data"].update(pairs=str(base / "world" / "pairs" / "train.jsonl"), sft=None, prompts=None)
    return validate(data, f"demo: {method}")


def evaluate_runs(runs: Sequence[Path], config: Config) -> dict[str, Any]:
    """Every checkpoint of every run against the one reference, in one call, as `config.evaluation` says now."""
    from isdaa.evaluation.evaluate import evaluate_request
    from isdaa.evaluation.requests import requests

    settings = config.evaluation.model_dump()
    overrides = {f"evaluation.{key}": value for key, value in settings.items()}
    return evaluate_request(requests([str(run) for run in runs], overrides | {"scorer": settings["scorer"] or "none"}))


def draw(metrics: dict[str, Any], folder: Path) -> Path | None:
    """Win rate against √KL, as PNG and SVG; None where there are no win rates to draw."""
    from isdaa.evaluation.analysis import chart_records
    from isdaa.report.charts import save_chart, win_rate_chart

    records = chart_records(metrics)
    if not records:
        return None
    start = metrics["reference"]["win_rate"]
    chart = win_rate_chart(
        records,
        opponent="the reference" if metrics["opponent"] == "reference" else "the chosen responses",
        start=start["mean"] if start is not None else None,
        confidence=metrics["settings"]["confidence"],
    )
    return save_chart(chart, folder / CHART)[0]


def show(metrics: dict[str, Any], base: Path, chart: Path | None, seconds: float) -> None:
    """The table, what it says, and where everything is."""
    from isdaa.evaluation.table import print_table

    print_table(metrics)
    print()
    for sentence in readings(metrics):
        print(sentence)
    print(f"\nchart:   {chart or 'none, for without a scorer there are no win rates'}")
    print(f"records: {base / 'evaluation'}\n{seconds:.0f} s in this call")


def readings(metrics: dict[str, Any]) -> list[str]:
    """What a method's rows say, one plain sentence a method; no verdict, which one run of one seed cannot carry."""
    sentences = []
    for method in dict.fromkeys(model["method"] for model in metrics["models"]):
        rows = [model for model in metrics["models"] if model["method"] == method and model["win_rate"]]
        if not rows:
            continue
        best, last = max(rows, key=lambda m: m["win_rate"]["mean"]), rows[-1]
        sentences.append(
            f"{method}: win rate {best['win_rate']['mean']:.2f} at its best (step {best['step']}, KL {best['kl']['mean']:.1f}), "
            f"{last['win_rate']['mean']:.2f} at the end (KL {last['kl']['mean']:.1f})."
        )
    return sentences
