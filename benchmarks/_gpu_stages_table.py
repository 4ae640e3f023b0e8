"""The result of `gpu_stages.py` as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Told = Mapping[str, Any]
TRAINING = (
    *("cell", "rows at a time", "rows a step", "a second", "tokens a second", "MFU"),
    *("GiB before", "peak GiB", "planned GiB", "planned / peak", "planned / measured time"),
)
ROWS = {"sft": "examples", "reward": "pairs", "align": "pairs"}


def tables(report: Told) -> str:
    """Training cells, the parts of sampling stages, the embedded experiment; then what has not been done, and why."""
    return "\n".join([*_head(report), *_training(report), *_parts(report), *_embedded(report), *_not_done(report)]) + "\n"


def _head(report: Told) -> Iterator[str]:
    machine = report["machine"]
    memory = f", {machine['memory_gib']:.0f} GiB" if machine.get("memory_gib") else ""
    libraries = f"torch {machine['torch']}, transformers {machine['transformers']}"
    yield f"{machine['device']}{memory}; {libraries}; model {report['model']}."
    yield ""


def _training(report: Told) -> Iterator[str]:
    rows = [(name, told) for name, told in report["cells"].items() if told["stage"] in ROWS]
    if not rows:
        return
    yield "| " + " | ".join(TRAINING) + " |"
    yield "|---" * len(TRAINING) + "|"
    for name, told in rows:
        if told["status"] != "done":
            yield f"| {name} | {told['status']} |" + " |" * (len(TRAINING) - 2)
            continue
        peak, plan = _peak(told, "training"), told.get("plan") or {}
        rate = f"{told['examples_per_second']:.3g} {ROWS[told['stage']]}"
        batches = ", ".join([*(f"~~{tried['batch']}~~" for tried in told.get("too_large", [])), str(told["batch"])])
        figures = [batches, str(told["rows_a_step"]), rate, f"{told['tokens_per_second']:.3g}", _text(told["mfu"], ".1%")]
        figures += [_text(told["before_training_gib"], ".1f"), _text(peak, ".1f"), _text(plan.get("gib"), ".1f")]
        median = told["rows_a_step"] / told["examples_per_second"]
        figures += [_text(_ratio(plan.get("gib"), peak), ".2f"), _text(_ratio(plan.get("step_seconds"), median), ".2f")]
        yield f"| {name} | {' | '.join(figures)} |"
    yield ""
    yield "Struck out: more than memory has room for. Tokens: no padding; a pair's prompt once in `align`, twice in `reward`."
    yield "Planned: by `isdaa inspect`, without CUDA's own memory and fragmentation, as the measured peaks."
    yield ""


def _parts(report: Told) -> Iterator[str]:
    rows = [(name, told) for name, told in report["cells"].items() if told.get("phases")]
    if not rows:
        return
    yield "| cell | part | calls | s | a second | peak GiB |"
    yield "|---|---|---|---|---|---|"
    for name, told in rows:
        for part, found in told["phases"].items():
            rate = told.get("rates", {}).get(part)
            figures = [str(found["calls"]), f"{found['seconds']:.1f}", _text(rate, ".3g"), _text(found["peak_gib"], ".1f")]
            yield f"| {name} | {part} | {' | '.join(figures)} |"
    yield ""
    yield "A second: responses; pairs of behaviour logps."
    yield ""


def _embedded(report: Told) -> Iterator[str]:
    told = report["cells"].get("embedded")
    if told is None or told["status"] != "done":
        return
    yield "| embedded experiment | s | checkpoint | KL | win rate |"
    yield "|---|---|---|---|---|"
    for cell, run in told["runs"].items():
        for model in run["checkpoints"]:
            kl, wins = (
                model[key]["mean"] if isinstance(model.get(key), Mapping) else model.get(key) for key in ("kl", "win_rate")
            )
            yield f"| {cell} | {_text(run['seconds'], '.0f')} | {model['label']} | {_text(kl, '.2f')} | {_text(wins, '.3f')} |"
    yield ""


def _not_done(report: Told) -> Iterator[str]:
    for name, told in report["cells"].items():
        if told["status"] != "done":
            yield f"{name}: {told['status']}{': ' + told['why'] if told.get('why') else ''}"


def _peak(told: Told, part: str) -> float | None:
    return told["phases"].get(part, {}).get("peak_gib")


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def _text(value: float | None, style: str) -> str:
    return "–" if value is None else format(value, style)
