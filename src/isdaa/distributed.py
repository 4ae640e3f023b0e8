"""Several processes as one program: what torchrun or `accelerate launch` started share the work and act as one.

The main process writes, the others wait for it (`once`); work on many items is dealt out (`dealt`); what fails on one
process fails on all of them. Objects and errors travel through a group of their own, on the CPU, that waits for days: a
main process that tokenises for an hour runs into no time-out (trl#1519). For a process alone, all this is the plain call.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from isdaa.disk import disk_error
from isdaa.errors import UserError, refused

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = timedelta(days=7)  # of processes that wait for another one's work
TENSORS = timedelta(hours=2)  # of the group in which gradients travel

_control: Any = None  # the group of objects and errors
_alone = False  # inside a function of `once` or `everyones`: it is this process's own work


def world_size() -> int:
    """Number of processes that work together; 1 inside functions that `once`, `everyones` and `dealt` call."""
    return 1 if _alone else int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK") or 0) if int(os.environ.get("WORLD_SIZE") or 1) > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def start() -> None:
    """Join the other processes, where there are any. Every function here that needs them does so by itself."""
    global _control
    if _control is not None or world_size() == 1:
        return
    _end_with_launcher()
    import torch
    from accelerate import PartialState

    # As `TrainingArguments` would, which find it done: on GPUs this also says which one is this process's.
    PartialState(cpu=not torch.cuda.is_available(), timeout=TENSORS)
    _control = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def finish() -> None:
    """Part from the others at the end of a program that went well."""
    global _control
    if _control is not None:
        import torch

        wait()
        _control = None
        torch.distributed.destroy_process_group()


def wait() -> None:
    """Wait until every process is here."""
    everyones(lambda: None)


def once(function: Callable[[], T]) -> T:
    """What `function` gives, called by the main process alone while the others wait; its error is everyone's."""
    if world_size() == 1:
        return function()
    start()
    import torch

    outcome = [_outcome(function) if is_main() else None]
    torch.distributed.broadcast_object_list(outcome, src=0, group=_control)
    assert outcome[0] is not None
    return _value(*outcome[0])


def everyones(function: Callable[[], T]) -> list[T]:
    """What `function` gives on each process, by rank. Where it fails on one, its error is everyone's."""
    if world_size() == 1:
        return [function()]
    start()
    import torch

    mine, outcomes = _outcome(function), [(None, None)] * world_size()
    torch.distributed.all_gather_object(outcomes, mine, group=_control)
    # An error that was foreseen says more than those that may have followed from it.
    failed = sorted((error for _, error in outcomes if error is not None), key=lambda error: not isinstance(error, UserError))
    return [_value(value, failed[0] if failed else None) for value, _ in outcomes]


def dealt(items: Sequence[T], work: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
    """`work`, one result an item, on all items: each process has every n-th of them, and gets everyone's results in order."""
    world = world_size()
    if world == 1:
        return list(work(items))
    mine = items[rank() :: world]
    result: list[Any] = [None] * len(items)
    for first, share in enumerate(everyones(lambda: list(work(mine)) if len(mine) else [])):
        result[first::world] = share
    return result


def speaks_first() -> bool:
    """Whether this process is the first one to ask: an error that all of them meet is said once."""
    if world_size() == 1:
        return True
    import torch

    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch.distributed.TCPStore(*address, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"isdaa/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return is_main()


def left_alone(error: Exception) -> bool:
    """Whether an error only says that another process is gone. That process reports the cause itself."""
    return world_size() > 1 and any(f"Connection {how} by peer" in str(error) for how in ("closed", "reset"))


def _outcome(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """(value, error) of a call, fit for sending."""
    global _alone
    _alone = True
    try:
        return function(), None
    except UserError as error:
        return None, error
    except Exception as error:
        # An OSError loses its class on the way to the others; the command line would have said it in one line.
        foreseen = disk_error(error) or (refused(error) if isinstance(error, OSError) else None)
        if foreseen is not None:
            return None, foreseen
        import traceback

        failure = RuntimeError(f"process {rank()}: {type(error).__name__}: {error}")
        failure.add_note(traceback.format_exc())  # travels with it, into the file that the command line writes
        return None, failure
    finally:
        _alone = False


def _value(value: Any, error: Exception | None) -> Any:
    if error is not None:
        raise error
    return value


def _end_with_launcher() -> None:
    """Die when torchrun is killed, instead of working on in a folder that its next start will want. On Linux, which can."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != launcher or launcher == 1:
        os._exit(1)  # it was killed before this took hold
