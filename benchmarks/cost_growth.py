"""How does the cost of one training step grow: with pairs, prompt, response, vocabulary, model? Time and memory, with exponents.

    python benchmarks/cost_growth.py
    python benchmarks/cost_growth.py --axes prompt response --rounds 5 --out docs/results

One step is DPO's forward pass, loss, backward pass, clipping and fused AdamW on a random Llama and random pairs of equal lengths,
in fp32. One axis is varied, all else stays at the base point. Every point has a process of its own, since the peak of a process
never falls; one of them computes at a time. With one thread, time is that of the processor, which other programs do not
lengthen; with several, that of the clock. In a round each point takes its turn, in an order that is shuffled anew, so that a
machine that drifts does so for all points. An exponent is the slope of a straight line through log cost against log x, over
the whole axis and over its upper half, where constant costs count less. Beside time stands the arithmetic that a step needs,
counted, with its exponent over the same points.

Writes cost-growth.json (which defines every number in it), cost-growth.png and cost-growth.svg.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from _cell import Ended
from _growth import LEVEL, Axis, Point, along, axes, base_point, line, over_rounds, power, upper
from _growth_chart import growth_chart
from preference_step import machine
from rich.console import Console
from rich.table import Table

from isdaa.cli.parser import OneLineParser
from isdaa.errors import UserError, nearest
from isdaa.files import write_json
from isdaa.report.charts.style import save_chart
from isdaa.terminal import Bar, clock, progress, say

OUT = Path("runs/bench")
NAME = "cost-growth"
STEPS, SECONDS = 5, 1.0  # of a turn: so many steps at most, and none that would begin later
SLOWNESS = 2.0  # of a step, compared with its arithmetic at the speed of one large product; for the first estimate alone
START = 0.7  # seconds in which a point's process begins

DEFINITIONS = {
    "x": "what the axis varies; on the axis model the parameters of the layers, without the embedding",
    "wall, cpu": "seconds of a step in each round, by the clock, and of the processor for all threads: the median of a turn of "
    f"up to {STEPS} steps, fewer once {SECONDS:g} s are over",
    "rounds": "cpu where there is one thread, so that what other programs take is not in it; else wall, since threads that wait "
    "for each other are busy",
    "seconds": "median of rounds",
    "tokens_per_second": "tokens of the packed row, a prompt once, over seconds",
    "flops": "additions and multiplications of the matrix products that one forward and backward pass needs; neither what is "
    "computed again, nor softmax, norms and the optimiser",
    "before": "MiB that the process held when the model was there and nothing had been trained",
    "peak": "MiB that it held at most, until its last step; libraries are in it",
    "above_start": "peak less before: gradients, the optimiser's moments, activations, logits",
    "whole, upper": "over all points; over the larger half of them, the middle one included",
    "time": f"exponent of seconds: mean over rounds, each with an exponent of its own; low and high: {LEVEL:.0%} interval by "
    "Student's t of that mean",
    "wall_time": "the same of wall",
    "arithmetic": "exponent of flops",
    "memory": "exponent of above_start; its standard error is that of the fit: how far the points lie from a power law",
    "memory_in_all": "exponent of peak",
    "mib_per_unit": "least-squares slope of above_start against x itself, over the upper half",
    "expected": "what theory says, before any measurement",
}


def build_parser() -> OneLineParser:
    """The options."""
    parser = OneLineParser(prog="cost_growth.py", description=__doc__.splitlines()[0] if __doc__ else None)
    known = ", ".join(axes(tiny=False))
    parser.add_argument("--axes", nargs="+", default=["all"], metavar="NAME", help=f"{known}, or all")
    parser.add_argument("--rounds", type=int, default=None, metavar="N", help="turns of each point (default: 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="default: all cores")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, tokens and the order of turns")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=f"for JSON and charts (default: {OUT})")
    parser.add_argument("--tiny", action="store_true", help="very small models, three points an axis, two rounds, for tests")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run it. Returns 0, 1 where a point failed, 2 for bad options, 130 when interrupted."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        return run(build_parser().parse_args(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"cost_growth.py: error: {error}", file=sys.stderr)
        return 2
    except Ended as error:
        print(f"cost_growth.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ncost_growth.py: interrupted", file=sys.stderr)
        return 130


def _terminated(*unused: Any) -> None:
    raise KeyboardInterrupt


def run(arguments: Any) -> int:
    """All axes, one after the other; file and chart hold those that are done."""
    chosen, rounds = _checked(arguments)
    _environment(arguments.threads)
    todo = sum((1 + rounds) * point.flops for axis in chosen for point in axis.points)
    expected = START * sum(len(axis.points) for axis in chosen) + SLOWNESS * todo / _speed()
    say(f"{len(chosen)} axes, {sum(len(axis.points) for axis in chosen)} points, {rounds} rounds: about {clock(expected)}")
    began = machine(arguments.threads)
    found: list[dict[str, Any]] = []
    with progress("growth", todo, pace=expected / todo) as bar:
        bar.in_parts = True  # shown in per cent: its unit, an operation, tells nobody anything
        for axis in chosen:
            with running(axis, arguments.threads, arguments.seed) as points:
                measure(axis, points, rounds, arguments.seed, bar)
            found.append(summarise(axis, points, arguments.threads))
            report = {
                "benchmark": "cost_growth",
                "finished": len(found) == len(chosen),
                "machine": began,
                "settings": {
                    "rounds": rounds,
                    "seed": arguments.seed,
                    "tiny": arguments.tiny,
                    "base": _described(arguments.tiny),
                },
                "definitions": DEFINITIONS,
                "axes": found,
            }
            write_json(arguments.out / f"{NAME}.json", report)
            written = save_chart(growth_chart(found), arguments.out / NAME)
    Console(width=None if sys.stdout.isatty() else 180).print(table(found))
    print(f"written to {', '.join(map(str, (arguments.out / f'{NAME}.json', *written)))}")
    return 0


def _checked(arguments: Any) -> tuple[list[Axis], int]:
    known = axes(arguments.tiny)
    names = list(known) if arguments.axes == ["all"] else list(dict.fromkeys(arguments.axes))
    for name in names:
        if name not in known:
            raise UserError(f"--axes: unknown name {name!r}{nearest(name, known)}; known: {', '.join(known)}, or all")
    rounds = arguments.rounds if arguments.rounds is not None else 2 if arguments.tiny else 3
    for name, value, least in (("rounds", rounds, 1), ("threads", arguments.threads, 1), ("seed", arguments.seed, 0)):
        if value < least:
            raise UserError(f"--{name}: expected a whole number from {least} on, got {value}")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out: {arguments.out} is a file; name a folder")
    return [known[name] for name in names], rounds


def _environment(threads: int) -> None:
    """Of the processes that will be started; nothing reaches a network."""
    here = str(Path(__file__).resolve().parent)
    os.environ.update(
        PYTHONPATH=os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])),
        OMP_NUM_THREADS=str(threads),
        HF_HUB_OFFLINE="1",
    )
    _context.set_forkserver_preload(["_growth_worker"])


def _described(tiny: bool) -> dict[str, Any]:
    base = base_point(tiny)
    return {**asdict(base), "parameters": base.size.parameters, "layers_parameters": base.body}


def _speed() -> float:
    """Additions and multiplications a second, in one large product."""
    a = np.ones((1024, 1024), dtype=np.float32)
    a @ a
    started = time.perf_counter()
    for _ in range(5):
        a @ a
    return 10 * 1024**3 / (time.perf_counter() - started)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

# Forked from a process that has imported everything: all points begin with the same memory.
_context = multiprocessing.get_context("forkserver")


@dataclass
class Measured:
    """A point's process and what it has told. In MiB, before: held when nothing had been trained; peak: at most, so far;
    peak_before: at most, while it was prepared."""

    point: Point
    process: Any
    pipe: Connection
    before: float = 0.0
    peak_before: float = 0.0
    peak: float = 0.0
    wall: list[float] = field(default_factory=list)  # seconds of each round
    cpu: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of every step

    def hear(self) -> dict[str, Any]:
        """Its next message. Raises Ended."""
        wait([self.pipe, self.process.sentinel])
        message = None
        with suppress(EOFError, ConnectionResetError):
            message = self.pipe.recv() if self.pipe.poll() else None
        if message is None:
            self.process.join()
            killed = self.process.exitcode == -signal.SIGKILL
            why = "killed, out of memory as it seems" if killed else f"its process ended with status {self.process.exitcode}"
            raise Ended(f"{self.point}: {why}", killed)
        if message["event"] == "failed":
            raise Ended(f"{self.point}: {message['why']}", message["memory"])
        return message

    def turn(self, steps: int, limit: float) -> dict[str, Any]:
        """Up to `steps` steps, none of which begins after `limit` seconds. Raises Ended."""
        with suppress(OSError):  # `hear` says why
            self.pipe.send((steps, limit))
        told = self.hear()
        self.losses += told["losses"]
        self.peak = told["peak"]
        return told

    def end(self) -> None:
        """It ends when its pipe does."""
        self.pipe.close()
        self.process.join(30)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _work(*arguments: Any) -> None:
    from _growth_worker import work  # heavy; the benchmark's own process does without

    work(*arguments)


@contextmanager
def running(axis: Axis, threads: int, seed: int) -> Iterator[list[Measured]]:
    """The processes of an axis's points, prepared one after the other. Raises Ended."""
    with ExitStack() as stack:
        points = []
        for point in axis.points:
            ours, theirs = multiprocessing.Pipe()
            process = _context.Process(target=_work, args=(theirs, point, threads, seed), daemon=True)
            process.start()
            theirs.close()
            points.append(Measured(point, process, ours))
            stack.callback(points[-1].end)
            told = points[-1].hear()
            points[-1].before, points[-1].peak_before = told["memory"], told["peak"]
        yield points


def measure(axis: Axis, points: Sequence[Measured], rounds: int, seed: int, bar: Bar) -> None:
    """A step of each to warm up, then the rounds, each in an order of its own. Raises Ended."""
    rng = np.random.default_rng([seed, *axis.name.encode()])
    for number in range(rounds + 1):
        for place in rng.permutation(len(points)):
            measured = points[place]
            told = measured.turn(*((1, 0.0) if number == 0 else (STEPS, SECONDS)))
            if number:
                measured.wall.append(statistics.median(told["seconds"]))
                measured.cpu.append(statistics.median(told["cpu"]))
            bar.update(measured.point.flops, note=axis.name)
    for measured in points:
        if not (measured.losses[-1] < measured.losses[0]):  # so written that nan is caught
            raise Ended(f"{measured.point}: the loss did not fall, so that no training was timed: {measured.losses}", False)


def summarise(axis: Axis, points: Sequence[Measured], threads: int) -> dict[str, Any]:
    """An axis's points and exponents, as in the file."""
    times = [m.cpu if threads == 1 else m.wall for m in points]
    rows: list[dict[str, Any]] = [
        {
            "x": x,
            "pairs": m.point.pairs, "prompt": m.point.prompt, "response": m.point.response,
            "vocabulary": m.point.size.vocabulary, "hidden": m.point.size.hidden, "layers": m.point.size.layers,
            "parameters": m.point.size.parameters, "tokens": m.point.tokens, "flops": m.point.flops,
            "seconds": statistics.median(seconds), "rounds": seconds, "wall": m.wall, "cpu": m.cpu,
            "tokens_per_second": m.point.tokens / statistics.median(seconds),
            "before": m.before, "peak_before": m.peak_before, "peak": m.peak, "above_start": m.peak - m.before,
        }
        for x, m, seconds in zip(axis.xs, points, times, strict=True)
    ]  # fmt: skip
    found: dict[str, Any] = {
        "name": axis.name, "title": axis.title, "heading": axis.title.split(" (")[0], "unit": axis.unit,
        "expected": {"time": axis.time, "memory": axis.memory},
        "points": rows,
        "time": {}, "wall_time": {}, "arithmetic": {}, "memory": {}, "memory_in_all": {},
    }  # fmt: skip
    for name, part in (("whole", rows), ("upper", upper(rows))):
        xs = [row["x"] for row in part]
        for key, column in (("time", "rounds"), ("wall_time", "wall")):
            by_round = list(zip(*(row[column] for row in part), strict=True))
            found[key][name] = over_rounds(xs, by_round)
        found["arithmetic"][name] = power(xs, [row["flops"] for row in part])[0]
        found["memory"][name] = along(xs, [row["above_start"] for row in part])
        found["memory_in_all"][name] = along(xs, [row["peak"] for row in part])
    half = upper(rows)
    found["mib_per_unit"] = line([row["x"] for row in half], [row["above_start"] for row in half])[0]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The table


def table(found: Sequence[dict[str, Any]]) -> Table:
    """Exponents for the terminal."""
    shown = Table(
        title=f"Exponents: cost ∝ xᵃ; time with its {LEVEL:.0%} interval over rounds, memory ± standard error of the fit"
    )
    columns = ("axis", "x", "time", "upper half", "arithmetic", "upper half", "memory", "upper half", "MiB per unit", "tokens/s")
    for column in columns:
        shown.add_column(column, justify="left" if column == "axis" else "right")
    for axis in found:
        first, last = axis["points"][0], axis["points"][-1]
        shown.add_row(
            axis["name"],
            f"{first['x']:,} … {last['x']:,}",
            *(_interval(axis["time"][part]) for part in ("whole", "upper")),
            *(f"{axis['arithmetic'][part]:.2f}" for part in ("whole", "upper")),
            *(_error(axis["memory"][part]) for part in ("whole", "upper")),
            f"{axis['mib_per_unit']:.3g} a {axis['unit']}",
            f"{first['tokens_per_second']:.0f} … {last['tokens_per_second']:.0f}",
        )
    return shown


def _interval(found: dict[str, Any]) -> str:
    text = f"{found['exponent']:.2f}"
    return text if found["low"] is None else f"{text} [{found['low']:.2f}, {found['high']:.2f}]"


def _error(found: dict[str, Any]) -> str:
    text = f"{found['exponent']:.2f}"
    return text if found["standard_error"] is None else f"{text} ± {found['standard_error']:.2f}"


if __name__ == "__main__":
    sys.exit(main())
