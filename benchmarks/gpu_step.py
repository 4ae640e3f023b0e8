"""One optimiser step on a GPU, at the size of Llama 3.2 3B: isdaa with each way of attention, TRL, and flash-pref.

    python benchmarks/gpu_step.py --out docs/results/gpu_step.json
    python benchmarks/gpu_step.py --tiny --device cpu        # whether it runs at all

Each arm trains in a process of its own, one at a time, since two models of this size with their optimisers seldom fit beside
each other; the arms take turns several times (--visits), every other time in reverse order. `_gpu_arms.py` says how each is
set up. The table has pairs a second, peak memory, and MFU: operations that the mathematics needs with every prompt counted
once and the head at response tokens alone, over seconds and the device's peak; and over what it reached in one large product.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _gpu_model import flops_of, pairs_of, task
from rich.console import Console
from rich.table import Table
from shapes import lengths_of

from isdaa.errors import UserError, nearest
from isdaa.files import write_json
from isdaa.record import git_revision, versions
from isdaa.terminal import progress, say

OUT = Path("runs/bench/gpu_step.json")
LABELS = {
    "isdaa_varlen": "isdaa, attention varlen",
    "isdaa_flex": "isdaa, attention flex",
    "isdaa_sdpa": "isdaa, attention sdpa",
    "isdaa_compiled": "isdaa, compiled layers",
    "trl": "TRL DPOTrainer, best settings",
    "flash_pref": "flash-pref",
}
SHAPES = ("tldr", "chat")
HERE = Path(__file__).resolve().parent
SEED = 0
NEEDED = ("transformers", "accelerate", "pydantic", "safetensors")  # beside torch, numpy and rich; TRL's arm has its own needs


def main(argv: Sequence[str] | None = None) -> int:
    """Run it. Returns 0, 1 where an arm of isdaa failed, 2 for bad options."""
    arguments = _parser().parse_args(argv)
    try:
        arms, shapes = _chosen("arms", arguments.arms, LABELS), _chosen("shapes", arguments.shapes, SHAPES)
        _check(arguments, arms)
    except UserError as error:
        print(f"gpu_step.py: error: {error}", file=sys.stderr)
        return 2
    shapes = ["tiny"] if arguments.tiny else shapes
    report: dict[str, Any] = {
        "benchmark": "gpu_step",
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()},
        "versions": versions(),
        "git_revision": git_revision(),
        "cells": [],
    }
    turns = 1 + len(shapes) * (1 + len(arms) * arguments.visits)
    with progress("processes", turns) as bar:
        report["machine"] = _run("machine", shapes[0], arguments)
        bar.update()
        for shape in shapes:
            cell = _cell(shape, arms, arguments, report["machine"], bar)
            report["cells"].append(cell)
            write_json(arguments.out, report)
    for cell in report["cells"]:
        _show(cell)
    print(f"written to {arguments.out}")
    failed = [arm for cell in report["cells"] for arm, told in cell["arms"].items() if "failed" in told]
    return 1 if any(arm.startswith("isdaa") for arm in failed) or "failed" in report["machine"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_step.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["all"], metavar="NAME", help=f"{', '.join(SHAPES)}, or all")
    parser.add_argument("--arms", nargs="+", default=["all"], metavar="NAME", help=f"{', '.join(LABELS)}, or all")
    parser.add_argument("--batch_size", type=int, default=None, metavar="B", help="pairs a step (default: 16; tiny: 2)")
    parser.add_argument("--rounds", type=int, default=None, metavar="N", help="timed steps of a visit (default: 8; tiny: 2)")
    parser.add_argument("--warmup", type=int, default=None, metavar="N", help="steps before them (default: 3; tiny: 1)")
    parser.add_argument("--visits", type=int, default=None, metavar="N", help="turns of each arm (default: 2; tiny: 1)")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="in every arm; where memory does not suffice")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--flash_pref_python", type=Path, default=None, metavar="FILE", help="interpreter that has flash_pref")
    parser.add_argument("--timeout", type=int, default=900, metavar="S", help="seconds of one process at most")
    parser.add_argument("--tiny", action="store_true", help="a very small model and shape, for tests")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help=f"JSON to write (default: {OUT})")
    return parser


def _check(arguments: Any, arms: Sequence[str]) -> None:
    lacking = [name for name in NEEDED if find_spec(name) is None]
    if lacking and any(arm.startswith("isdaa") for arm in arms):
        raise UserError(f"not installed here, and isdaa's arms need it: {', '.join(lacking)}; pip install {' '.join(lacking)}")
    small = {"batch_size": 2, "rounds": 2, "warmup": 1, "visits": 1}
    for name, large in (("batch_size", 16), ("rounds", 8), ("warmup", 3), ("visits", 2)):
        if getattr(arguments, name) is None:
            setattr(arguments, name, small[name] if arguments.tiny else large)
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name}: expected a whole number from 1 on, got {getattr(arguments, name)}")
    if arguments.out.is_dir():
        raise UserError(f"--out: {arguments.out} is a folder; name a file")
    if arguments.device == "cpu" and not arguments.tiny:
        raise UserError("--device cpu is for --tiny alone: the model has 3.2 billion parameters")
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("there is no GPU here; --tiny --device cpu tries the benchmark itself")


def _chosen(option: str, given: Sequence[str], known: Any) -> list[str]:
    if list(given) == ["all"]:
        return list(known)
    for name in given:
        if name not in known:
            raise UserError(f"--{option}: unknown name {name!r}{nearest(name, known)}; known: {', '.join(known)}, or all")
    return list(dict.fromkeys(given))


def _cell(shape: str, arms: Sequence[str], arguments: Any, machine: dict[str, Any], bar: Any) -> dict[str, Any]:
    """All arms on one shape."""
    told: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for visit in range(arguments.visits):
        for arm in arms if visit % 2 == 0 else reversed(arms):
            if not any("failed" in found for found in told[arm]):
                say(f"{shape}: {LABELS[arm]}, visit {visit + 1} of {arguments.visits}")
                told[arm].append(_run(arm, shape, arguments))
            bar.update()
    parts = _run("parts", shape, arguments)
    bar.update()
    given, count = task(shape, arguments.tiny, _dtype(arguments)), arguments.batch_size
    lengths = lengths_of(pairs_of(given, count * (arguments.warmup + arguments.rounds), SEED))
    steps = [lengths[i : i + count] for i in range(count * arguments.warmup, len(lengths), count)]
    flops = [flops_of(given.size, step) for step in steps]
    return {
        "shape": shape,
        "tokens": statistics.mean(sum(map(sum, step)) for step in steps),
        "padded_tokens": statistics.mean(2 * len(step) * max(p + max(c, r) for p, c, r in step) for step in steps),
        "tflops": statistics.mean(flops) / 1e12,
        "arms": {arm: _summary(found, flops, count, machine) for arm, found in told.items()},
        **parts,
    }


def _summary(visits: list[dict[str, Any]], flops: list[int], pairs: int, machine: dict[str, Any]) -> dict[str, Any]:
    """Medians over all steps of all visits; `seconds` keeps them apart."""
    failed = next((found["failed"] for found in visits if "failed" in found), None)
    if failed is not None:
        return {"failed": failed}
    seconds = [one for found in visits for one in found["seconds"]]
    speeds = [work / one / 1e12 for found in visits for work, one in zip(flops, found["seconds"], strict=True)]
    peaks = [found["peak_bytes"] for found in visits if found["peak_bytes"]]
    speed, peak = statistics.median(speeds), machine.get("peak_tflops")
    return {
        "attention": visits[0]["attention"],
        "pairs_per_second": pairs / statistics.median(seconds),
        "step_seconds": {"median": statistics.median(seconds), "least": min(seconds), "largest": max(seconds)},
        "peak_gib": max(peaks) / 2**30 if peaks else None,
        "tflops_per_second": speed,
        "mfu": speed / peak if peak else None,
        "of_matmul": speed / machine["matmul_tflops"] if machine.get("matmul_tflops") else None,
        "seconds": [found["seconds"] for found in visits],
        "losses": [found["losses"] for found in visits],
    }


def _dtype(arguments: Any) -> str:
    return "bfloat16" if arguments.device == "cuda" else "float32"


def _run(arm: str, shape: str, arguments: Any) -> dict[str, Any]:
    """An arm's process, and what it says."""
    python = str(arguments.flash_pref_python or sys.executable) if arm == "flash_pref" else sys.executable
    job = {
        "arm": arm, "shape": shape, "tiny": arguments.tiny, "device": arguments.device, "dtype": _dtype(arguments),
        "batch_size": arguments.batch_size, "rounds": arguments.rounds, "warmup": arguments.warmup, "seed": SEED,
        "checkpointing": arguments.gradient_checkpointing,
    }  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        asked, answered, log = (Path(folder) / name for name in ("job.json", "result.json", "log.txt"))
        asked.write_text(json.dumps(job))
        with log.open("w") as output:
            try:
                command = [python, str(HERE / "_gpu_arms.py"), str(asked), str(answered)]
                code = subprocess.run(
                    command, stdout=output, stderr=output, env=environment, timeout=arguments.timeout
                ).returncode
            except subprocess.TimeoutExpired:
                return {"failed": f"not done after {arguments.timeout} s"}
        if not answered.exists():
            last = " ".join(log.read_text(errors="replace").split())[-300:]
            return {"failed": f"its process ended with status {code}: {last}"}
        return json.loads(answered.read_text())


def _show(cell: dict[str, Any]) -> None:
    trl = cell["arms"].get("trl", {}).get("pairs_per_second")
    table = Table(title=f"{cell['shape']}: {cell['tokens']:.0f} tokens a step ({cell['padded_tokens']:.0f} padded)")
    for name in ("arm", "attention", "pairs/s", "times TRL", "peak GiB", "MFU", "of matmul"):
        table.add_column(name, justify="left" if name in ("arm", "attention") else "right")
    for arm, told in cell["arms"].items():
        if "failed" in told:
            table.add_row(LABELS[arm], told["failed"])
            continue
        pace = told["pairs_per_second"]
        figures = [f"{pace:.2f}", _text(pace / trl if trl else None, ".2f"), _text(told["peak_gib"], ".1f")]
        table.add_row(LABELS[arm], told["attention"], *figures, _text(told["mfu"], ".1%"), _text(told["of_matmul"], ".1%"))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for name, value in cell.get("parts", {"parts": cell.get("failed", "")}).items():
        text = f"{1000 * value:.2f} ms" if isinstance(value, float) else value
        console.print(f"{name}, forward and backward: {text}", markup=False, highlight=False)


def _text(value: float | None, style: str) -> str:
    return "–" if value is None else format(value, style)


if __name__ == "__main__":
    sys.exit(main())
