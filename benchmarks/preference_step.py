"""One optimiser step of preference training, side by side: isdaa, TRL's DPOTrainer, and a plain script.

    python benchmarks/preference_step.py
    python benchmarks/preference_step.py --shapes all --vocabularies all --out docs/results/preference_step.json
    python benchmarks/preference_step.py --arms without                 # what each thing that makes isdaa fast is worth

Every arm trains the same random Llama on the same random pairs, with the same loss and optimiser, in a process of its own that
has all threads: in fp32, or with its products in bfloat16 where its name ends in `_bf16`. A round is one step of every arm, one
after the other in an order that is shuffled, so that whatever else the machine does falls on all of them; ratios are taken within
a round. The machine's own matrix products, at the shapes that the step needs, take their turn, too. In the end the losses and the
trained weights are compared with isdaa's in fp32. An arm in fp32 may differ by rounding, one in bf16 by as much as TRL's do:
where it is more, the table says so and the exit status is 1.

`peers.py` says how each arm is set up, `shapes.py` what it trains on, and the JSON file defines every number in it.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _cell import HUGE_PAGES, MATMUL, CellPlan, Ended, Settings, plans, running
from _memory import BASE, WITHOUT, free_memory
from _summary import DEFINITIONS, LABELS, below, summarise, table, wrong
from rich.console import Console
from shapes import EOS, SHAPES, TINY_SHAPE, TINY_VOCABULARY, VOCABULARIES, Shape, Size, lengths_of, products, tiny

from isdaa.cli.parser import OneLineParser
from isdaa.errors import UserError, nearest
from isdaa.files import write_json
from isdaa.models.half_precision import processor
from isdaa.record import git_revision, versions
from isdaa.terminal import clock, progress, say

OUT = Path("runs/bench/preference_step.json")
PRECISION = "float32; products in bfloat16, by autocast, in arms whose name ends in _bf16 and in no other"
# How many times longer than its matrix products a step of each arm is, roughly; for the estimate that is printed first.
SLOWNESS = {
    "isdaa_dpo": 1.6, "isdaa_is_dpo": 1.6, "isdaa_one": 1.8, "isdaa_bare": 1.6, "isdaa_two_rows": 4,
    "trl_best": 6, "trl_whole": 10, "trl_gpu_head": 4, "trl_defaults": 15, "two_rows": 6, MATMUL: 3,
    "isdaa_dpo_bf16": 0.9, "isdaa_is_dpo_bf16": 0.9,
    "trl_best_bf16": 5, "trl_whole_bf16": 7, "trl_gpu_head_bf16": 4, "trl_defaults_bf16": 12,
    "two_rows_bf16": 5,
} | dict.fromkeys(WITHOUT, 1.8)  # fmt: skip
ALL = [name for name in LABELS if name not in WITHOUT]
START = 25.0  # seconds in which the processes of a cell begin


def build_parser() -> OneLineParser:
    """The options."""
    parser = OneLineParser(prog="preference_step.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", default=["tldr"], metavar="NAME", help=f"{', '.join(SHAPES)}, or all")
    parser.add_argument("--vocabularies", nargs="+", default=["32000"], metavar="V", help="numbers of tokens, or all")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=["all"],
        metavar="NAME",
        help=f"{', '.join(LABELS)}; all: {', '.join(ALL)}; without: {BASE} and all without_…",
    )
    parser.add_argument("--rounds", type=int, default=None, metavar="N", help="timed steps of each arm (default: 7)")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="steps before them")
    parser.add_argument("--batch_size", type=int, default=None, metavar="B", help="pairs of a step (default: 4)")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="default: all cores")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the pairs and of the arms' order")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help=f"JSON to write (default: {OUT})")
    parser.add_argument("--model_path", type=Path, metavar="FOLDER", help="a Llama with tied embeddings, instead of random ones")
    parser.add_argument(
        "--pairs", metavar="FILE", help="pairs of --model_path, read as `isdaa train` does, instead of random ones"
    )
    parser.add_argument("--tiny", action="store_true", help="a very small model, shape and number of rounds, for tests")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run it. Returns 0, 1 where an arm failed or did other work, 2 for bad options, 130 when interrupted."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        return run(build_parser().parse_args(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"preference_step.py: error: {error}", file=sys.stderr)
        return 2
    except Ended as error:
        print(f"preference_step.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\npreference_step.py: interrupted", file=sys.stderr)
        return 130


def _terminated(*unused: Any) -> None:
    raise KeyboardInterrupt  # so that temporary files go


def run(arguments: Any) -> int:
    """All cells, one after the other; the file holds those that are done."""
    settings = _settings(arguments)
    model = arguments.model_path
    if model is None and arguments.pairs is not None:
        raise UserError("--pairs: needs --model_path, whose tokenizer reads them")
    cells = _cells(arguments) if model is None else _real_cells(arguments)
    todo = [plan for cell in cells for plan in plans(settings, *cell, model=model)]
    _environment(settings.threads)
    expected = sum(_expected(plan, settings) for plan in todo)
    say(f"{len(todo)} cells, {settings.rounds} rounds, {len(settings.arms)} arms: about {clock(expected)}, as a rough guess")
    turns = sum(plan.turns(settings) for plan in todo)
    with progress("steps", turns, pace=expected / turns) as bar:
        summaries: list[dict[str, Any]] = []
        for plan in todo:
            with running(settings, plan, bar) as cell:
                summaries.append(summarise(cell, settings.batch_size))
            show(summaries[-1])
            report = {
                "benchmark": "preference_step",
                "finished": len(summaries) == len(todo),
                "machine": machine(settings.threads),
                "settings": vars(settings),
                "definitions": DEFINITIONS,
                "cells": summaries,
            }
            write_json(arguments.out, report)
    print(f"written to {arguments.out}")
    trouble = [line for summary in summaries for line in wrong(summary)]
    for line in trouble:
        print(line, file=sys.stderr)
    return 1 if trouble else 0


def show(summary: dict[str, Any]) -> None:
    """A cell's table, and the lines below it."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table(summary))
    for line in below(summary):
        console.print(line, markup=False, highlight=False)


def _cells(arguments: Any) -> list[tuple[str, Shape, Size]]:
    if arguments.tiny:
        return [(f"tiny, V = {TINY_VOCABULARY}", TINY_SHAPE, tiny(TINY_VOCABULARY))]
    shapes = _chosen("shapes", arguments.shapes, SHAPES)
    try:
        sizes = VOCABULARIES if arguments.vocabularies == ["all"] else [int(v) for v in arguments.vocabularies]
    except ValueError:
        raise UserError(f"--vocabularies: expected whole numbers or all, got {' '.join(arguments.vocabularies)}") from None
    if min(sizes) < 100:
        raise UserError(f"--vocabularies: expected at least 100 tokens, got {min(sizes)}")
    return [(f"{shape}, V = {size}", SHAPES[shape], Size(size)) for size in sizes for shape in shapes]


def _real_cells(arguments: Any) -> list[tuple[str, Any, Size]]:
    """The shapes, or the pairs of a file, with the model of a folder."""
    from isdaa.data.reading.sources import load_pairs
    from isdaa.data.tokenize_pairs import TokenizationSettings, tokenize_pairs
    from isdaa.models.loading import load_tokenizer, model_config

    config: Any = model_config(arguments.model_path)
    if config.model_type != "llama" or not config.tie_word_embeddings or config.eos_token_id != EOS:
        raise UserError(
            f"--model_path: {arguments.model_path}: the arms train a Llama with tied embeddings whose end token is {EOS}"
        )
    size = Size(
        config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers,
        config.num_attention_heads, config.num_key_value_heads, config.max_position_embeddings,
    )  # fmt: skip
    name = arguments.model_path.resolve().name
    if arguments.pairs is None:
        return [(f"{shape}, {name}", SHAPES[shape], size) for shape in _chosen("shapes", arguments.shapes, SHAPES)]
    rows, _ = load_pairs(arguments.pairs)
    pairs, _ = tokenize_pairs(
        rows, load_tokenizer(arguments.model_path), TokenizationSettings(size.positions, size.positions // 2)
    )
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [(f"{Path(arguments.pairs).name}, {name}", [{c: list(row[c]) for c in columns} for row in pairs], size)]


def _settings(arguments: Any) -> Settings:
    defaults = {"rounds": 2 if arguments.tiny else 7, "batch_size": 2 if arguments.tiny else 4, "threads": os.cpu_count() or 1}
    found = {}
    for name, default in {**defaults, "warmup": 1, "seed": 0}.items():
        value, least = getattr(arguments, name), 0 if name in ("warmup", "seed") else 1
        found[name] = default if value is None else value
        if found[name] < least:
            raise UserError(f"--{name}: expected a whole number from {least} on, got {value}")
    arms = _arms(arguments.arms)
    if BASE not in arms:
        raise UserError(f"--arms: {BASE} must be among them, since all others are compared with it")
    if arguments.out.is_dir():
        raise UserError(f"--out: {arguments.out} is a folder; name a file")
    return Settings(arms=tuple(arms), repeats=3, **found)


def _arms(given: Sequence[str]) -> list[str]:
    named = {"all": ALL, "without": [BASE, *WITHOUT]}
    return named[given[0]] if len(given) == 1 and given[0] in named else _chosen("arms", given, LABELS)


def _chosen(option: str, given: Sequence[str], known: Any) -> list[str]:
    if list(given) == ["all"]:
        return list(known)
    for name in given:
        if name not in known:
            raise UserError(f"--{option}: unknown name {name!r}{nearest(name, known)}; known: {', '.join(known)}, or all")
    return list(dict.fromkeys(given))


def _environment(threads: int) -> None:
    """Of the processes that will be started; nothing reaches a network."""
    here = str(Path(__file__).resolve().parent)
    os.environ.update(
        PYTHONPATH=os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])),
        OMP_NUM_THREADS=str(threads),
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
    )


def _expected(plan: CellPlan, settings: Settings) -> float:
    """Seconds of a cell, from how fast this process multiplies."""
    flops = sum(product.flops for product in products(plan.size, lengths_of(plan.rows))) / settings.steps
    slowness = sum(SLOWNESS[name] for name in (*plan.arms, MATMUL))
    return START + settings.steps * slowness * flops / _speed()


def _speed() -> float:
    """Additions and multiplications a second, in the best of some moments."""
    a, best = np.ones((512, 512), dtype=np.float32), 0.0
    for _ in range(20):
        started = time.perf_counter()
        a @ a
        best = max(best, 2 * 512**3 / (time.perf_counter() - started))
    return best


def machine(threads: int) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    free = free_memory()
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "free_gib": None if free is None else round(free / 2**30, 1),
        "system": platform.platform(),
        "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": versions(),
        "git_revision": git_revision(),
        "huge_pages": {"torch": os.environ.get(HUGE_PAGES), "system": _first_line("/sys/kernel/mm/transparent_hugepage/enabled")},
        "precision": PRECISION,
    }


def _first_line(path: str) -> str | None:
    """Of a file that some systems have."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next(iter(lines), None)


if __name__ == "__main__":
    sys.exit(main())
