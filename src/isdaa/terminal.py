"""Progress on a terminal (rich) or, where there is none, a plain line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True, highlight=False)
_live: Progress | None = None
PLAIN_INTERVAL = 10.0  # seconds between two lines where there is no terminal


class Bar:
    """One line of progress: `update(n)` counts work done, `note` shows a word beside it."""

    def __init__(self, description: str, total: float | None, live: Progress | None) -> None:
        self.description, self.total, self.done, self.note = description, total, 0.0, ""
        self.started = self.printed = time.monotonic()
        self.live = live
        self.task: TaskID | None = live.add_task(description, total=total, note="") if live else None

    def update(self, n: float = 1, note: str | None = None, total: float | None = None) -> None:
        """Count `n` more units of work done."""
        self.done += n
        self.note = self.note if note is None else note
        self.total = self.total if total is None else total
        if self.live is not None and self.task is not None:
            self.live.update(self.task, completed=self.done, total=self.total, note=self.note)
        elif time.monotonic() - self.printed >= PLAIN_INTERVAL:
            self.printed = time.monotonic()
            self._print()

    def _print(self) -> None:
        elapsed = time.monotonic() - self.started
        left = ""
        if self.total and 0 < self.done < self.total:
            left = f", about {elapsed / self.done * (self.total - self.done):.0f} s left"
        count = f"{self.done:g}/{self.total:g}" if self.total else f"{self.done:g}"
        print(f"{self.description}: {count} in {elapsed:.0f} s{left} {self.note}".rstrip(), file=sys.stderr, flush=True)


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator[Bar]:
    """A bar with the time left, estimated from the work of the same bar; bars nest."""
    global _live
    outermost = _live is None and console.is_terminal
    if outermost:
        columns: list[Any] = [TextColumn("{task.description:<34}"), BarColumn(bar_width=28), MofNCompleteColumn()]
        columns += [TimeElapsedColumn(), TimeRemainingColumn(elapsed_when_finished=False), TextColumn("{task.fields[note]}")]
        _live = Progress(*columns, console=console, transient=False)
        _live.start()
    bar = Bar(description, total, _live)
    try:
        yield bar
        if bar.live is None and bar.printed > bar.started:
            bar._print()
    finally:
        if bar.live is not None and bar.task is not None and not outermost:
            bar.live.remove_task(bar.task)
        if outermost and _live is not None:
            _live.stop()
            _live = None
