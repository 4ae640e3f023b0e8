"""How a command ends: its exit status (docs/exit_status.md), and one line on stderr for whatever went wrong."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable

from isdaa import __version__, ownership
from isdaa.disk import disk_error
from isdaa.distributed import is_main, left_alone, rank, speaks_first
from isdaa.errors import UserError, refused, shortened, shown


def exit_status(command: Callable[[], int]) -> int:
    """Call a command and return its exit status.

    Of several processes that torchrun started, one says what is wrong. Whatever is not foreseen becomes one line, too, and a
    file with the traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks must not end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _ended(command)
        sys.stdout.flush()  # here, where a closed pipe and a full disk still have an exit status
        return status
    except BrokenPipeError:
        _let_go()
        return 141
    except OSError as error:
        _let_go()
        return _refused(str(refused(error) or error))
    finally:
        ownership.command = ()  # what a program does after it is no part of the command


def _ended(command: Callable[[], int]) -> int:
    try:
        return command()
    except UserError as error:
        return _refused(str(error), error.status)
    except KeyboardInterrupt:
        if is_main():
            tell("\nisdaa: interrupted; the same command goes on from here")
        return 130
    except BrokenPipeError:
        raise
    except SystemExit as end:  # --help, --version; and rich's way out of a closed pipe
        if isinstance(end.__context__, BrokenPipeError):
            return 141
        raise
    except Exception as error:
        found = disk_error(error) or (refused(error) if isinstance(error, OSError) else _out_of_memory(error))
        if found is not None:
            return _refused(str(found))
        if left_alone(error):
            tell(f"isdaa: process {rank()} ends, since another one has ended")
        else:
            fault(error)
        return 1


def _let_go() -> None:
    """Point stdout, which nobody can write to any more, at nothing: the interpreter flushes it once more at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refused(line: str, status: int = 2) -> int:
    if speaks_first():
        tell(f"isdaa: error: {line}")
    return status


def tell(line: str) -> None:
    """To stderr, where there is one: the exit status says the same."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def _out_of_memory(error: Exception) -> UserError | None:
    """Memory that ran out is no fault of anybody's code; None for every other error."""
    if not isinstance(error, MemoryError) and not re.search(r"out of memory|can't allocate memory", str(error)):
        return None
    return UserError(
        f"out of memory ({str(error) or 'of this machine'}); lower batch_size (as --align.batch_size), set --align.batch_tokens, "
        "or take a smaller model; `isdaa inspect` plans what a run needs"
    )


def fault(error: Exception) -> None:
    """Say in one line what nobody foresaw; its traceback goes to a file of its own. Of several processes, one does."""
    if not speaks_first():
        return
    text = "".join(traceback.format_exception(error))
    where = f"isdaa {__version__}, Python {sys.version.split()[0]}, {sys.platform}"
    try:
        descriptor, name = tempfile.mkstemp(prefix="isdaa-fault-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{where}\n{shown(ownership.completed([]))}\n\n{text}")
        kept = f"traceback in {name}"
    except OSError as refusal:
        kept = f"no traceback, for no file can be written ({refusal.strerror})"
    told = shortened(" ".join(f"{type(error).__name__}: {error}".split()))
    tell(f"isdaa: a fault of isdaa: {told}; {kept}; please report it (docs/exit_status.md says how)")
