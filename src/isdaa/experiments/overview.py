"""A sweep on the terminal: how many runs are done, what the running ones do, how long it will take. Plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from heapq import heapreplace
from statistics import median
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from isdaa.errors import shown
from isdaa.terminal import clock, console

PLAIN_INTERVAL = 9.0  # seconds between two lines where there is no terminal, a turn of the watch apart from ten
SHOWN = 12  # running rows on a terminal


class Overview:
    """Follows a sweep's tasks. tasks: (name, whether it is a shared world, whether it was finished earlier).

    expected: seconds of a shared world and of a run, where that is known before one has finished.
    """

    def __init__(self, tasks: Sequence[tuple[str, bool, bool]], jobs: int, expected: tuple[float, float] | None = None) -> None:
        self.expected = dict(zip((True, False), expected, strict=True)) if expected is not None else {}
        self.shared = {name for name, shared, _ in tasks if shared}
        self.todo = {name for name, _, done in tasks if not done}
        self.total, self.earlier, self.jobs = len(tasks), len(tasks) - len(self.todo), jobs
        self.failed = 0
        self.took: dict[bool, list[float]] = {True: [], False: []}  # seconds of finished worlds and runs
        self.started = self.printed = time.monotonic()
        self.running: Sequence[tuple[str, float, Mapping[str, Any]]] = ()
        self.live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None

    def __enter__(self) -> Overview:
        if self.live is not None:
            self.live.start()
        self._say(f"sweep: {self.earlier} of {self.total} finished earlier, {len(self.todo)} to do, {self.jobs} at a time")
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.update(self.head())
            self.live.stop()
        else:
            self._say(self.head().plain)

    def show(self, running: Sequence[tuple[str, float, Mapping[str, Any]]]) -> None:
        """running: (name, seconds so far, status) of every running task."""
        self.running = running
        if self.live is not None:
            self.live.update(self.picture())
        elif time.monotonic() - self.printed >= PLAIN_INTERVAL:
            now = "; ".join(f"{name}: {self._doing(status)}" for name, _, status in running)
            self._say(f"{self.head().plain}  [{now}]")

    def ended(self, name: str, outcome: Mapping[str, Any], seconds: float) -> None:
        """A task has ended, well or not."""
        self.todo.discard(name)
        if outcome["done"]:
            self.took[name in self.shared].append(seconds)
            self._say(f"finished {name} in {clock(seconds)}")
        else:
            self.failed += 1
            self._say(f"FAILED {name} after {clock(seconds)}: {outcome['error']}")

    def left(self) -> float | None:
        """Seconds left: the median time of finished tasks of each kind for those to come, less what the running ones have
        behind them, and a tenth of that for those that have taken longer already; the shared worlds come first, and each kind is
        dealt out to the places. None where nothing of a kind that is to come has finished."""
        known = self.expected | {kind: median(times) for kind, times in self.took.items() if times}
        behind = {name: seconds for name, seconds, _ in self.running}
        total = 0.0
        for kind in (True, False):
            todo = [name for name in self.todo if (name in self.shared) == kind]
            if todo and kind not in known:
                return None
            places = [0.0] * self.jobs
            past = [behind.get(name, 0.0) for name in todo]
            for seconds in sorted(max(known[kind] - seconds, seconds / 10) for seconds in past):
                heapreplace(places, places[0] + seconds)  # the place that is free first; those that run have begun already
            total += max(places)
        return total

    def head(self) -> Text:
        done = self.total - len(self.todo) - self.failed
        text = f"sweep: {done}/{self.total} done"
        text += f", {self.failed} FAILED" if self.failed else ""
        text += f", {clock(time.monotonic() - self.started)} so far"
        if self.todo:
            left = self.left()
            text += f", about {clock(left)} left" if left is not None else ", time left not known yet"
        return Text(text)

    def picture(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for name, seconds, status in self.running[:SHOWN]:
            share = float(status.get("share") or 0.0)
            bar = ProgressBar(total=1.0, completed=share, width=20)
            doing = Text(shown(self._doing(status, share=False)))
            table.add_row(Text(shown(name)), bar, Text(f"{share:4.0%}"), Text(clock(seconds)), doing)
        if len(self.running) > SHOWN:
            table.add_row(Text(f"and {len(self.running) - SHOWN} more"))
        return Group(self.head(), table)

    @staticmethod
    def _doing(status: Mapping[str, Any], share: bool = True) -> str:
        what = status.get("what") or "starting"
        return f"{what} {float(status.get('share') or 0.0):.0%}" if share and status else what

    def _say(self, line: str) -> None:
        self.printed = time.monotonic()
        if self.live is not None:
            self.live.console.print(shown(line))
        else:
            print(shown(line), file=sys.stderr, flush=True)
