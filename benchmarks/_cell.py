"""One cell of the step benchmark: one shape and one vocabulary, every arm in its own process, one optimiser step at a time."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle, islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from _memory import Budget, free_memory, of_products
from shapes import Lengths, Shape, Size, draw_pairs, lengths_of

from isdaa.terminal import Bar, say

Rows = list[dict[str, list[int]]]
MATMUL = "matrix products"  # takes its turn in every round, as if it were an arm
# Forked from a process that has imported everything: all arms begin with the same memory, and in no time.
_forked = multiprocessing.get_context("forkserver")
_forked.set_forkserver_preload(["_worker"])
# Whether torch keeps its memory in huge pages is decided with the first tensor of a process, before anything is forked.
_fresh = multiprocessing.get_context("spawn")
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
# Without huge pages, which isdaa switches on and all other arms are given, too.
AS_IT_COMES = ("trl_defaults", "trl_defaults_bf16", "without_huge_pages")


@dataclass(frozen=True)
class Settings:
    """What holds for all cells. warmup: steps that are trained and compared, but not timed."""

    arms: tuple[str, ...]
    rounds: int
    warmup: int
    batch_size: int
    threads: int
    seed: int
    repeats: int  # of each matrix product

    @property
    def steps(self) -> int:
        """Of each arm."""
        return self.rounds + self.warmup


@dataclass(frozen=True)
class CellPlan:
    """A cell to run: arms that fit into memory beside each other. limits: bytes for each; too_large: arms that fit nowhere."""

    name: str
    size: Size
    rows: list[dict[str, list[int]]]
    arms: tuple[str, ...]
    limits: dict[str, int | None]
    too_large: dict[str, str]
    model: Path | None = None  # folder of the initial weights; None: random ones

    def turns(self, settings: Settings) -> int:
        """Preparations and steps of the arms, and measurements of the matrix products."""
        return len(self.arms) + settings.steps * (len(self.arms) + 1)


def plans(settings: Settings, name: str, shape: Shape | Rows, size: Size, model: Path | None = None) -> list[CellPlan]:
    """One, or several where memory is short: each has the arm that all others are compared with."""
    wanted = settings.steps * settings.batch_size
    if isinstance(shape, Shape):
        rows = draw_pairs(shape, size.vocabulary, wanted, settings.seed, size.positions)
    else:
        rows = list(islice(cycle(shape), wanted))
    lengths, free = _by_step(rows, settings.batch_size), free_memory()
    budget = Budget(size, lengths, settings.arms, None if free is None else free - of_products(size, lengths))
    parts, too_large = budget.parts()
    found = []
    for number, arms in enumerate(parts, 1):
        limits = {arm: budget.limit(arm, arms) for arm in arms}
        title = name if len(parts) == 1 else f"{name}, part {number} of {len(parts)}"
        found.append(CellPlan(title, size, rows, tuple(arms), limits, too_large if number == 1 else {}, model))
    return found


def _by_step(rows: list[dict[str, list[int]]], batch_size: int) -> list[list[Lengths]]:
    return [lengths_of(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]


@dataclass
class Recorded:
    """What one arm did, step by step. Of its process, in MiB, memory: before the first step; peak_before: until then;
    held: after the last step, while it waits. cpu: seconds of all its threads; elsewhere: share of the cores that other
    programs had during each step.
    """

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    elsewhere: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory: float | None = None
    peak_before: float | None = None
    peak: float | None = None
    held: float | None = None


@dataclass
class Cell:
    """What its arms did, and where their weights lie. out: arms that memory did not allow; failed: those by mistake."""

    plan: CellPlan
    folder: Path
    lengths: list[list[Lengths]]  # of each step's pairs
    arms: dict[str, Recorded] = field(default_factory=dict)
    orders: list[list[str]] = field(default_factory=list)
    multiplied: list[float] = field(default_factory=list)  # seconds of each round
    flops: list[int] = field(default_factory=list)
    saved: list[float] = field(default_factory=list)  # seconds of products that isdaa leaves out
    out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def drop(self, arm: str, why: str, memory: bool) -> None:
        """An arm is out of the race; what it did is not reported."""
        self.arms.pop(arm, None)
        (self.out if memory else self.failed)[arm] = why
        say(f"{self.plan.name}: {arm} is left out: {why}")


class Ended(Exception):
    """A worker failed, or is dead. memory: for want of memory."""

    def __init__(self, why: str, memory: bool) -> None:
        super().__init__(why)
        self.memory = memory


class Worker:
    """A process, and our end of its pipe. fresh: it has nothing of what isdaa sets in the environment."""

    def __init__(self, target: str, *arguments: Any, fresh: bool = False) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        settings: dict[str, Any] = {"target": _run, "args": (target, theirs, *arguments), "daemon": True}
        self.process: Any = _fresh.Process(**settings) if fresh else _forked.Process(**settings)
        before = os.environ.get(HUGE_PAGES)
        if fresh:
            os.environ[HUGE_PAGES] = "0"
        self.process.start()
        if before is not None:
            os.environ[HUGE_PAGES] = before
        theirs.close()

    def hear(self) -> dict[str, Any]:
        """Its next message. Raises Ended."""
        wait([self.pipe, self.process.sentinel])
        try:
            message = self.pipe.recv() if self.pipe.poll() else None
        except (EOFError, ConnectionResetError):
            message = None
        if message is None:
            self.process.join()
            killed = self.process.exitcode == -9
            why = "killed, out of memory as it seems" if killed else f"its process ended with status {self.process.exitcode}"
            raise Ended(why, killed)
        if message["event"] == "failed":
            raise Ended(f"out of memory ({message['why']})" if message["memory"] else message["why"], message["memory"])
        return message

    def ask(self, message: Any) -> dict[str, Any]:
        """Let it go on, and hear what came of it. Raises Ended."""
        with suppress(OSError):  # `hear` says why
            self.pipe.send(message)
        return self.hear()

    def end(self) -> None:
        """It ends when its pipe does."""
        self.pipe.close()
        self.process.join(30)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _run(target: str, pipe: Connection, *arguments: Any) -> None:
    import _worker  # heavy; the benchmark's own process does without

    getattr(_worker, target)(pipe, *arguments)


@contextmanager
def running(settings: Settings, plan: CellPlan, bar: Bar) -> Iterator[Cell]:
    """Run a cell; its folder with the trained weights is there until the end of the block. Raises Ended."""
    folder = Path(tempfile.mkdtemp(prefix="preference_step-"))
    try:
        cell = Cell(plan, folder, _by_step(plan.rows, settings.batch_size))
        for arm, why in plan.too_large.items():
            cell.drop(arm, why, memory=True)
        with ExitStack() as stack:
            if plan.model is None:
                maker = Worker("prepare_model", plan.size, folder / "initial", settings.threads)
                stack.callback(maker.end)
                maker.hear()
            else:
                (folder / "initial").symlink_to(plan.model.resolve())
            workers = _start(cell, settings, stack, bar)
            _train(cell, settings, workers, bar)
        yield cell
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(cell: Cell, settings: Settings, stack: ExitStack, bar: Bar) -> dict[str, Worker]:
    """The processes of all arms, prepared one after the other, and that of the matrix products."""
    plan, workers = cell.plan, {}
    for arm in plan.arms:
        job = {
            "arm": arm, "model": cell.folder / "initial", "folder": cell.folder / arm, "rows": plan.rows,
            "batch_size": settings.batch_size, "vocabulary": plan.size.vocabulary,
        }  # fmt: skip
        workers[arm] = Worker("train", job, settings.threads, plan.limits[arm], fresh=arm in AS_IT_COMES)
        stack.callback(workers[arm].end)
    for arm in plan.arms:
        say(f"{plan.name}: preparing {arm}")
        try:
            told = workers[arm].ask("prepare")
            cell.arms[arm] = Recorded(memory=told["memory"], peak_before=told["peak"])
        except Ended as ended:
            cell.drop(arm, str(ended), ended.memory)
        bar.update()
    workers[MATMUL] = Worker("multiply", plan.size, cell.folder / "products", settings.threads, settings.repeats)
    stack.callback(workers[MATMUL].end)
    return workers


def _train(cell: Cell, settings: Settings, workers: dict[str, Worker], bar: Bar) -> None:
    """All steps, then the trained weights. One process computes at a time; each round shuffles whose turn it is."""
    rng = np.random.default_rng([settings.seed, 2])
    for step, lengths in enumerate(cell.lengths):
        timed = step - settings.warmup
        order = rng.permutation([*cell.plan.arms, MATMUL]).tolist()
        cell.orders += [order] if timed >= 0 else []
        for name in order:
            if name == MATMUL:
                told = workers[name].ask(lengths)
                if timed >= 0:
                    cell.multiplied.append(told["seconds"])
                    cell.flops.append(told["flops"])
                    cell.saved.append(told["saved"])
            elif name in cell.arms:
                _step(cell, name, workers[name], timed >= 0)
            bar.update()
        say(f"{cell.plan.name}: {_line(cell, timed, settings.rounds)}")
    for arm in list(cell.arms):
        try:
            workers[arm].ask("finish")
        except Ended as ended:
            cell.drop(arm, str(ended), ended.memory)


def _step(cell: Cell, arm: str, worker: Worker, timed: bool) -> None:
    recorded, before = cell.arms[arm], _cpu_seconds()
    try:
        told = worker.ask("go")
    except Ended as ended:
        cell.drop(arm, str(ended), ended.memory)
        return
    if timed:
        recorded.seconds.append(told["seconds"])
        recorded.cpu.append(told["cpu"])
        if before is not None:
            others = max(0.0, (_cpu_seconds() or before) - before - told["cpu"])
            recorded.elsewhere.append(others / told["seconds"] / (os.cpu_count() or 1))
    recorded.losses.append(told["loss"])
    recorded.peak, recorded.held = told["peak"], told["memory"]


def _cpu_seconds() -> float | None:
    """Seconds that all cores have worked since the machine's start, or None where the system does not say."""
    try:
        user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def _line(cell: Cell, timed: int, rounds: int) -> str:
    if timed < 0:
        return "warm-up done"
    times: Sequence[str] = [f"{arm} {recorded.seconds[-1]:.2f}" for arm, recorded in cell.arms.items()]
    return f"round {timed + 1} of {rounds}, seconds a step: {', '.join(times)}; {MATMUL} {cell.multiplied[-1]:.2f}"
