"""The process in which one arm of the step benchmark trains, or in which the machine's matrix products are timed.

It hears and answers through one pipe, and ends when the other end is gone: whatever kills the benchmark, nothing is left over.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import statistics
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from peers import ARMS, Job, make_model
from shapes import Lengths, Product, Size, products, saved

MIB = 1 << 20
WEIGHTS = "weights.safetensors"


class PipedGate:
    """A `peers.Gate` at the worker's end of the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.started, self.cpu = pipe, 0.0, 0.0

    def ready(self) -> None:
        """Report that the arm is prepared, and wait."""
        gc.collect()
        self.pipe.send({"event": "ready", "memory": memory_now(), "peak": peak_memory()})
        self._wait()

    def step(self, loss: float) -> None:
        """Report a step, and wait."""
        spent = {"seconds": time.perf_counter() - self.started, "cpu": time.process_time() - self.cpu}
        self.pipe.send({"event": "step", **spent, "loss": loss, "peak": peak_memory(), "memory": memory_now()})
        self._wait()

    def _wait(self) -> None:
        self.pipe.recv()
        self.started, self.cpu = time.perf_counter(), time.process_time()


def train(pipe: Connection, settings: dict[str, Any], threads: int, limit: int | None) -> None:
    """Train one arm, step by step as it is let go, and save its weights.

    settings: of its `Job`. limit: bytes that it may allocate.
    """
    job = Job(**settings)
    with _Reporting(pipe, job.folder, threads, limit):
        pipe.recv()
        model = ARMS[job.arm](job, PipedGate(pipe))
        from safetensors.torch import save_file

        save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, job.folder / WEIGHTS)
        pipe.send({"event": "saved"})


def prepare_model(pipe: Connection, size: Size, folder: Path, threads: int) -> None:
    """Write the initial model."""
    with _Reporting(pipe, folder, threads, None):
        make_model(size, folder)
        pipe.send({"event": "saved"})


def multiply(pipe: Connection, size: Size, folder: Path, threads: int, repeats: int) -> None:
    """Time the products of one batch after another: receives its lengths, sends seconds and flops."""
    with _Reporting(pipe, folder, threads, None):
        while True:
            lengths: Sequence[Lengths] = pipe.recv()
            needed = list(products(size, lengths))
            took = {product: time_product(product, repeats) for product in needed}
            seconds = sum(took[product] for product in needed)
            tokens = sum(map(sum, lengths))
            # The same products were timed for all layers together; their rows are this many tokens.
            less = sum(took_by_one(took, product) * rows / tokens for product, rows in saved(size, lengths))
            flops = sum(product.flops for product in needed)
            pipe.send({"event": "multiplied", "seconds": seconds, "flops": flops, "saved": less})


def took_by_one(took: Mapping[Product, float], product: Product) -> float:
    """Seconds of a product that was timed together with the others of its shape."""
    (times,) = {alike.times for alike in took if replace(alike, times=1) == product}
    return took[replace(product, times=times)] / times


@torch.no_grad()
def time_product(product: Product, repeats: int) -> float:
    """Seconds that `times` such products take one after the other, into memory that is there: the median of some repeats."""
    shapes = {
        "nt": ((product.m, product.k), (product.n, product.k)),
        "nn": ((product.m, product.k), (product.k, product.n)),
        "tn": ((product.k, product.m), (product.k, product.n)),
    }
    a, b = (torch.randn(product.batch, *shape) for shape in shapes[product.form])
    out = torch.zeros(product.batch, product.m, product.n)
    a = a.transpose(1, 2) if product.form == "tn" else a
    b = b.transpose(1, 2) if product.form == "nt" else b
    multiply = torch.bmm
    if product.batch == 1:
        a, b, out, multiply = a[0], b[0], out[0], torch.mm
    multiply(a, b, out=out)
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(product.times):
            multiply(a, b, out=out)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


class _Reporting:
    """Around a worker's work: its own output and threads, and a failure sent as one message."""

    def __init__(self, pipe: Connection, folder: Path, threads: int, limit: int | None) -> None:
        self.pipe, self.folder, self.threads, self.limit = pipe, folder, threads, limit

    def __enter__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        log = os.open(self.folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        logging.basicConfig(level=logging.WARNING)
        torch.set_num_threads(self.threads)
        if self.limit is not None:
            # What does not fit then fails in this process, as an error, before the system looks for something to kill.
            resource.setrlimit(resource.RLIMIT_DATA, (self.limit, resource.RLIM_INFINITY))

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is None or isinstance(error, EOFError | BrokenPipeError | KeyboardInterrupt):
            return error is not None  # the benchmark has gone
        traceback.print_exception(error)
        text = " ".join(str(error).split())[:300]
        memory = isinstance(error, MemoryError) or "allocate memory" in text or "not enough memory" in text
        with suppress(OSError):
            self.pipe.send({"event": "failed", "memory": memory, "why": f"{type(error).__name__}: {text}"})
        return True


def peak_memory() -> float:
    """MiB that this process has held at most. Linux tells it of the program alone, `ru_maxrss` also of what it was before."""
    found = _status("VmHWM")
    return found if found is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_now() -> float | None:
    """MiB that this process holds."""
    return _status("VmRSS")


def _status(name: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) / 1024 if found else None
