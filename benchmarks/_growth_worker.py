"""The process that trains at one point of `cost_growth.py`, as many steps as it is told, and reports seconds and memory.

It ends when the other end of its pipe is gone.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import resource
import sys
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from _growth import MIB, Point
from shapes import EOS, PAD
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from isdaa.data.collation import PairBatch, collate
from isdaa.models.attention.layout import Layout
from isdaa.models.packed.forward import PairForward, prepare
from isdaa.models.packed.patched_forward import SHARED_PREFIX
from isdaa.objectives.objective import Objective, PairLogps
from isdaa.objectives.presets import resolve

BETA, LEARNING_RATE, MAX_GRAD_NORM = 0.1, 1e-4, 1.0


def work(pipe: Connection, point: Point, threads: int, seed: int) -> None:
    """Prepare, report memory; then hear (steps at most, seconds after which no further one begins), step, report; and so on."""
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(threads)
    try:
        step = Step(point, seed)
        gc.collect()
        _give_back()
        before = memory_now()
        pipe.send({"event": "ready", "memory": before, "peak": peak_memory()})
        while True:
            most, limit = pipe.recv()
            seconds: list[float] = []
            cpu: list[float] = []
            losses: list[float] = []
            while not seconds or (len(seconds) < most and sum(seconds) < limit):
                started, began = time.perf_counter(), time.process_time()
                losses.append(step())
                seconds.append(time.perf_counter() - started)
                cpu.append(time.process_time() - began)
            pipe.send({"event": "step", "seconds": seconds, "cpu": cpu, "losses": losses, "peak": peak_memory()})
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # the benchmark has gone
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).split())[:300]
        memory = isinstance(error, MemoryError) or "allocate memory" in text or "not enough memory" in text
        with suppress(OSError):
            pipe.send({"event": "failed", "memory": memory, "why": f"{type(error).__name__}: {text}"})


class Step:
    """One optimiser step of DPO on always the same pairs: layout, forward, loss, backward, clipping, fused AdamW; norms and
    gated units as the Trainer has them. The reference is the initial model, whose logps the first step's own forward gives."""

    def __init__(self, point: Point, seed: int) -> None:
        torch.manual_seed(seed)
        size = point.size
        self.model: nn.Module = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate,
                num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
                max_position_embeddings=size.positions, tie_word_embeddings=True, attention_dropout=0.0,
                pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS,
            )
        ).float()  # fmt: skip
        self.forward: PairForward = prepare(self.model, longest_row=point.prompt + point.response)
        if self.forward.mode != SHARED_PREFIX:
            raise RuntimeError(f"the mode {self.forward.mode} was chosen: the shared prefix would not be measured")
        self.batch: PairBatch = collate(point.rows(seed))
        self.objective = Objective(**resolve("dpo", beta=BETA))
        self.optimiser = torch.optim.AdamW(self.model.train().parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def __call__(self) -> float:
        """The loss before the step."""
        batch = self.batch
        logps = self.forward(self.model, batch.input_ids, None, Layout.of_pairs(*batch.parts()))
        if batch.reference_chosen_logps is None or batch.reference_rejected_logps is None:
            batch = self.batch = batch.with_reference(logps.chosen_logps.detach(), logps.rejected_logps.detach())
        assert batch.reference_chosen_logps is not None and batch.reference_rejected_logps is not None
        pairs = PairLogps(
            logps.chosen_logps, logps.rejected_logps, batch.reference_chosen_logps, batch.reference_rejected_logps,
            batch.chosen_lengths, batch.rejected_lengths,
        )  # fmt: skip
        loss = self.objective(pairs).losses.mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.item()


def memory_now() -> float:
    """MiB that this process holds; where the system does not say, what it has held at most."""
    found = _status("VmRSS")
    return peak_memory() if found is None else found


def peak_memory() -> float:
    """MiB that this process has held at most."""
    found = _status("VmHWM")
    if found is not None:
        return found
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / MIB if sys.platform == "darwin" else most / 1024


def _status(name: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [entry.split()[1] for entry in lines if entry.startswith(f"{name}:")]
    return int(found[0]) / 1024 if found else None


def _give_back() -> None:
    """Memory that is free, but that the C library keeps, would hide what the first step takes."""
    with suppress(AttributeError, OSError):
        libc: Any = ctypes.CDLL(None)
        libc.malloc_trim(0)
