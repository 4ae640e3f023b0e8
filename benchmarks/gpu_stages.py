"""Every stage of the paper's recipes on one GPU for a few steps: memory, speed, and the embedded experiment with a larger model.

    python benchmarks/gpu_stages.py --minutes 60 --out docs/results/gpu_stages.json
    python benchmarks/gpu_stages.py --model tiny --device cpu --out runs/stages.json        # whether it runs at all

Llama 3.2 3B's architecture with random weights in fp32 under bf16 autocast, as `configs/tldr/` has it, on random text of
TL;DR's lengths: `sft`, `reward`, `label`, `align` with `is_dpo`, `evaluate` with samples, KL and scores. Training in full and by
LoRA, with gradient checkpointing and without. Each cell has a process of its own, so that its memory is its own; one that does
not fit is a result, and is tried again with fewer rows at a time. The file is written after every cell: the same command, after
whatever stopped it, goes on with what is missing. Beside the JSON lies the table for docs/performance.md.

The data, the model and the experiment lie in --folder, 13 GB there and as much again at times. No network is needed. Without
`trl`, the cells that train by it are left out, and the others run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _gpu_stages_table import tables

from isdaa.errors import UserError, nearest
from isdaa.files import write_atomically, write_json
from isdaa.foreign import read_json
from isdaa.record import git_revision, versions
from isdaa.terminal import clock, progress, say

OUT, FOLDER = Path("runs/bench/gpu_stages.json"), Path("runs/bench/gpu-stages")
HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "pydantic", "yaml", "safetensors", "tokenizers")
GUESS = 75.0  # seconds of a cell, before one has been seen
SHARE = 0.5  # a cell is not begun with less time than this share of what cells took


class TimeIsUp(Exception):
    """A cell was still at work at the end of --minutes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing. Returns 0; 1 where a cell failed but for memory, or time was up; 2 for bad options."""
    arguments = _parser().parse_args(argv)
    began = time.monotonic()
    try:
        cells = _chosen(arguments.cells)
        _check(arguments)
        report = _report(arguments)
        missing = [cell for cell in cells if not _finished(report["cells"].get(cell.name))]
        report["machine"] = _machine(arguments, report, any(cell.stage != "embedded" for cell in missing), began)
    except UserError as error:
        print(f"gpu_stages.py: error: {error}", file=sys.stderr)
        return 2
    if len(missing) < len(cells):
        say(f"{len(cells) - len(missing)} of {len(cells)} cells are in {arguments.out} already")
    left_out: list[str] = []
    try:
        with progress("cells", len(missing), pace=GUESS if arguments.model == "3b" else None) as bar:
            for cell in missing:
                if not _time_for_one(report, arguments, began):
                    left_out.append(cell.name)
                    continue
                say(f"{cell.name} ({clock(_left(arguments, began))} left)" if arguments.minutes else cell.name)
                report["cells"][cell.name] = told = _cell(cell, arguments, report, began)
                write_json(arguments.out, report)
                say(f"{cell.name}: {told['status']}{': ' + told['why'] if 'why' in told else ''}, {told['seconds']:.0f} s")
                bar.update()
    except TimeIsUp as stopped:
        left_out = [cell.name for cell in missing if cell.name not in report["cells"]]
        say(f"{stopped}: time is up")
    write_json(arguments.out, report)
    text = tables(report)
    write_atomically(arguments.out.with_suffix(".md"), text)
    print(text)
    print(f"written to {arguments.out} and {arguments.out.with_suffix('.md')}")
    if left_out:
        print(f"no time for {', '.join(left_out)}: the same command goes on with them")
    failed = any(report["cells"][cell.name]["status"] == "failed" for cell in cells if cell.name in report["cells"])
    return 1 if failed or left_out else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_stages.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=None, metavar="M", help="end by then (default: when all is done)")
    parser.add_argument("--cells", nargs="+", default=["all"], metavar="NAME", help="names, as the table has them, or all")
    parser.add_argument("--model", choices=("3b", "tiny"), default="3b", help="tiny: for tests")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", type=Path, default=FOLDER, metavar="DIR", help=f"to work in (default: {FOLDER})")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help=f"JSON to write (default: {OUT})")
    return parser


def _chosen(names: Sequence[str]) -> list[Any]:
    lacking = [name for name in PACKAGES if find_spec(name) is None]
    if lacking:
        raise UserError(f"not installed here: {', '.join(lacking)}; pip install -r requirements.txt")
    from _gpu_stages import CELLS

    known = {cell.name: cell for cell in CELLS}
    if list(names) == ["all"]:
        return CELLS
    for name in names:
        if name not in known:
            raise UserError(f"--cells: unknown name {name!r}{nearest(name, known)}; known: {', '.join(known)}, or all")
    return [known[name] for name in dict.fromkeys(names)]


def _check(arguments: Any) -> None:
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise UserError(f"--minutes: expected a number above 0, got {arguments.minutes}")
    if arguments.out.is_dir() or arguments.out.suffix == ".md":
        raise UserError(f"--out: {arguments.out}: name a JSON file; the table gets the same name with .md")
    if arguments.device == "cpu" and arguments.model != "tiny":
        raise UserError("--device cpu is for --model tiny alone: the other model has 3.2 billion parameters")
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("there is no GPU here; --model tiny --device cpu tries the script itself")


def _report(arguments: Any) -> dict[str, Any]:
    """What an earlier call left, or a new one."""
    same = {"benchmark": "gpu_stages", "model": arguments.model, "device": arguments.device}
    report: dict[str, Any] = {**same, "cells": {}}
    if arguments.out.exists():
        report = read_json(arguments.out)
        if not isinstance(report, dict) or any(report.get(key) != value for key, value in same.items()):
            asked = f"--model {arguments.model} --device {arguments.device}"
            raise UserError(f"--out: {arguments.out} is no result of this script with {asked}; name another file")
    return report | {"versions": versions()}


def _machine(arguments: Any, report: dict[str, Any], prepare: bool, began: float) -> dict[str, Any]:
    """What the device is; in the same process, the model and the data that the cells share."""
    from _gpu_stages import SCALES, prepared

    makes = prepare and not prepared(arguments.folder / "prepared", SCALES[arguments.model])
    say("model and data" if makes else "a look at the machine")
    try:
        told = _process({"cell": "machine", "prepare": makes}, arguments, began)
    except TimeIsUp:
        raise UserError("--minutes: too few to make the model and the data") from None
    if "failed" in told:
        raise UserError(f"the device cannot be used, or model and data not be made: {told['failed']}")
    before = report.get("machine", {}).get("device", told["device"])
    if before != told["device"]:
        raise UserError(
            f"--out: {arguments.out} has figures of another device ({before}); this is {told['device']}: name another file"
        )
    return told


def _finished(entry: dict[str, Any] | None) -> bool:
    """What is done, and what memory does not suffice for, is not tried again."""
    return entry is not None and entry["status"] in ("done", "out of memory")


def _cell(cell: Any, arguments: Any, report: dict[str, Any], began: float) -> dict[str, Any]:
    """One cell, with fewer and fewer rows at a time while memory does not suffice."""
    from _gpu_stages import NEEDS_TRL, SCALES, TRAINING

    entry: dict[str, Any] = {"stage": cell.stage, "lora": cell.lora, "checkpointing": cell.checkpointing}
    entry |= {"git_revision": git_revision(), "seconds": 0.0}
    if cell.stage in NEEDS_TRL and find_spec("trl") is None:
        return entry | {"status": "not run", "why": "trl is not installed, and this trains by it"}
    started, tried = time.monotonic(), []
    for batch in SCALES[arguments.model].batches if cell.stage in TRAINING else (None,):
        job = {"cell": cell.name, "batch": batch, "peak_tflops": report["machine"]["peak_tflops"]}
        try:
            told = _process(job, arguments, began)
        except TimeIsUp:
            if cell.stage != "embedded":
                raise
            entry["seconds"] = time.monotonic() - started
            return entry | {"status": "stopped", "why": "time is up", "tasks": _tasks(arguments.folder / "embedded" / "logs")}
        finally:
            shutil.rmtree(arguments.folder / "run", ignore_errors=True)
        entry["seconds"] = time.monotonic() - started
        if "failed" not in told:
            return {**told, **entry, "status": "done", "too_large": tried}
        if not told.get("out_of_memory"):
            return entry | {"status": "failed", "why": told["failed"], "too_large": tried}
        tried.append({"batch": batch, "why": told["failed"]})
    return entry | {"status": "out of memory", "why": tried[-1]["why"], "too_large": tried}


def _tasks(logs: Path) -> dict[str, Any]:
    """The experiment's tasks that have ended."""
    return {str(path.parent.relative_to(logs)): read_json(path) for path in sorted(logs.glob("**/result.json"))}


def _left(arguments: Any, began: float) -> float | None:
    return None if arguments.minutes is None else 60 * arguments.minutes - (time.monotonic() - began)


def _time_for_one(report: dict[str, Any], arguments: Any, began: float) -> bool:
    left = _left(arguments, began)
    if left is None:
        return True
    seen = [told["seconds"] for told in report["cells"].values() if told["status"] == "done"]
    return left > SHARE * (statistics.median(seen) if seen else 1.0)


def _process(job: dict[str, Any], arguments: Any, began: float) -> dict[str, Any]:
    """A process of its own, and what it says. Raises TimeIsUp."""
    home = arguments.folder / "jobs"
    home.mkdir(parents=True, exist_ok=True)
    asked, answered, log = (home / f"{job['cell']}.{kind}" for kind in ("job.json", "result.json", "log"))
    answered.unlink(missing_ok=True)
    job |= {"model": arguments.model, "device": arguments.device, "folder": str(arguments.folder.resolve())}
    asked.write_text(json.dumps(job))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if arguments.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(HERE / "_gpu_stages_worker.py"), str(asked), str(answered)]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            code = process.wait(timeout=_left(arguments, began))
        except subprocess.TimeoutExpired:
            raise TimeIsUp(job["cell"]) from None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if not answered.exists():
        last = " ".join(log.read_text(errors="replace").split())[-300:]
        return {"failed": f"its process ended with status {code}: {last}"}
    return read_json(answered)


if __name__ == "__main__":
    sys.exit(main())
