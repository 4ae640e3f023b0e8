"""What does `align.group_by_prompt` gain where several pairs share a prompt, and what does the order of pairs that it needs cost?

    python benchmarks/group_by_prompt.py --part speed
    python benchmarks/group_by_prompt.py --part effect --threads 1 --jobs 2

speed: seconds a pair of one optimiser step of a Llama of 40M parameters on pairs as long as TL;DR's, six a prompt; the same pairs
in an order in which no two of a step share a prompt, and prompt by prompt. Both orders take turns in one process, and a round's
steps are of the same lengths either way (`_grouping_speed.py`).

effect: twin runs on the embedded world, grouped and not, with everything else equal: win rate, KL and held-out accuracy at the
end, paired by seed; and how far a step's gradient scatters in either order (`_grouping_effect.py`). A sweep of
4 · seeds runs, which lie in --folder; stop it at any moment, the same command goes on.

The JSON file defines its numbers; a call that runs one part leaves the other one in it as it was, and one that measures some
batch sizes the others' numbers, where all else is the same.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preference_step import machine
from rich.console import Console

from isdaa.cli.parser import OneLineParser
from isdaa.errors import UserError
from isdaa.files import write_json
from isdaa.foreign import read_json

NAME = "group_by_prompt"
OUT = Path("runs/bench/group-by-prompt.json")
FOLDER = Path("runs/bench/group-by-prompt")
PARTS = ("speed", "effect")
SEEDS = (31, 32, 33, 34)


def build_parser() -> OneLineParser:
    """The options."""
    parser = OneLineParser(prog="group_by_prompt.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", choices=(*PARTS, "both"), default="both", help="default: both")
    parser.add_argument("--rounds", type=int, default=None, metavar="N", help="timed rounds of a batch size (default: 6)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=None, metavar="B", help="pairs a step (default: 4 12 24)")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, metavar="S", help=f"of the runs (default: {_words(SEEDS)})")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="default: all cores (effect: cores / jobs)")
    parser.add_argument("--folder", type=Path, default=FOLDER, metavar="DIR", help=f"of the runs (default: {FOLDER})")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help=f"JSON to write (default: {OUT})")
    parser.add_argument("--tiny", action="store_true", help="very small models and few steps, for tests")
    return parser


def _words(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def main(argv: Sequence[str] | None = None) -> int:
    """Run it. Returns 0, 1 where both orders did not do the same work, 2 for bad options, 130 when interrupted."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        return run(build_parser().parse_args(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"group_by_prompt.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ngroup_by_prompt.py: interrupted", file=sys.stderr)
        return 130


def _terminated(*unused: Any) -> None:
    raise KeyboardInterrupt  # so that the sweep ends its processes


def run(arguments: Any) -> int:
    """One part or both; the file is written after each."""
    parts = PARTS if arguments.part == "both" else (arguments.part,)
    _check(arguments)
    report = _earlier(arguments.out)
    trouble: list[str] = []
    for part in parts:
        threads = arguments.threads or max(1, (os.cpu_count() or 1) // (arguments.jobs if part == "effect" else 1))
        before = machine(threads)
        found, tables, wrong = (_speed if part == "speed" else _effect)(arguments, threads, report)
        report[part] = {"machine": before, **found}
        write_json(arguments.out, report)
        console = Console(width=None if sys.stdout.isatty() else 180)
        for table in tables:
            console.print(table)
        trouble += wrong
    print(f"written to {arguments.out}")
    for line in trouble:
        print(line, file=sys.stderr)
    return 1 if trouble else 0


def _speed(arguments: Any, threads: int, report: dict[str, Any]) -> tuple[dict[str, Any], list[Any], list[str]]:
    from _grouping_speed import Speed, run_speed, table, tiny_speed, with_earlier, wrong

    given = {"threads": threads}
    given |= {} if arguments.rounds is None else {"rounds": arguments.rounds}
    given |= {} if arguments.batch_sizes is None else {"batch_sizes": tuple(dict.fromkeys(arguments.batch_sizes))}
    found = with_earlier(run_speed((tiny_speed if arguments.tiny else Speed)(**given)), report.get("speed"))
    return found, [table(found)], wrong(found)


def _effect(arguments: Any, threads: int, report: dict[str, Any]) -> tuple[dict[str, Any], list[Any], list[str]]:
    from _grouping_effect import Effect, run_effect, tables, tiny_effect

    seeds = tuple(dict.fromkeys(arguments.seeds or (SEEDS[:1] if arguments.tiny else SEEDS)))
    settings = (tiny_effect if arguments.tiny else Effect)(
        seeds=seeds, folder=arguments.folder, jobs=arguments.jobs, threads=threads
    )
    found = run_effect(settings)
    return found, tables(found), []


def _check(arguments: Any) -> None:
    for name, least in (("rounds", 1), ("jobs", 1), ("threads", 1), ("seeds", 0), ("batch_sizes", 1)):
        value = getattr(arguments, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < least:
                raise UserError(f"--{name}: expected whole numbers from {least} on, got {number}")
    if arguments.out.is_dir():
        raise UserError(f"--out: {arguments.out} is a folder; name a file")
    if arguments.folder.exists() and not arguments.folder.is_dir():
        raise UserError(f"--folder: {arguments.folder} is a file; name a folder")


def _earlier(path: Path) -> dict[str, Any]:
    """What the file says of other parts. Raises UserError for a file of something else, which is not overwritten."""
    if not path.exists():
        return {"benchmark": NAME}
    found = read_json(path)
    if not isinstance(found, dict) or found.get("benchmark") != NAME:
        raise UserError(f"--out: {path} was not written by this benchmark; name another file")
    return found


if __name__ == "__main__":
    sys.exit(main())
