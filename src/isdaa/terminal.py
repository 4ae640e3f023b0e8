"""Progress on a terminal (rich) or, where there is none, a plain line every few seconds. Bars nest."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.text import Text

from isdaa.distributed import is_main
from isdaa.errors import shown

PLAIN_WIDTH = 100  # columns where there is no terminal to ask
PLAIN_INTERVAL = 10.0  # seconds between two lines where there is no terminal
SKIPPED = 0.5  # seconds; a part that takes less was finished earlier, and says nothing about the pace

# Hears of every bar that moves: (description, share done, note). A sweep's processes tell it so how they fare.
listener: Callable[[str, float, str], None] | None = None


class Terminal(Console):
    """A console on which a name is text, whatever is in it: no markup, no emoji, control characters as escapes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **kwargs)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """What rich renders, cleaned piece by piece; what moves the cursor is rich's own."""
        for piece in super().render(renderable, options):
            yield piece if piece.control else Segment(shown(piece.text, lines=True), piece.style)


def terminal_for(file: IO[str] | None, width: int | None) -> Terminal:
    """A console on `file` (stdout); where that is no terminal, plain and of a width that fits a page."""
    stream = file or sys.stdout
    found = Terminal(file=stream, width=width)
    if found.is_terminal or width is not None:
        return found
    return Terminal(file=stream, width=PLAIN_WIDTH, color_system=None)


class LogFormatter(logging.Formatter):
    """`name: message`, where the message is one line, whatever names it holds; a traceback follows as it is."""

    def __init__(self) -> None:
        super().__init__("%(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return shown(super().formatMessage(record))


def log_to_stderr(level: int) -> None:
    """What `logging` tells from `level` on."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    logging.basicConfig(level=level, handlers=[handler])


console = Terminal(stderr=True)
_live: Progress | None = None
_open: list[Bar] = []


def say(line: str) -> None:
    """One line on stderr, above the bars. Not wrapped where there is no terminal: a path stays in one piece.

    Of several processes, the main one alone says anything, here and in bars.
    """
    if not is_main():
        return
    console.print(shown(line), soft_wrap=not console.is_terminal)


def clock(seconds: float | None) -> str:
    """`0:42`, `1:03:20`; `-:--` where nothing is known."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Left(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{clock(task.fields['bar'].left())} left")


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        bar: Bar = task.fields["bar"]
        return Text(f"{bar.share():.0%}" if bar.in_parts else bar.count())


class Bar:
    """One line of progress: `update(n)` counts work done, `note` shows a word beside it."""

    def __init__(self, description: str, total: float | None, live: Progress | None, pace: float | None = None) -> None:
        self.description, self.total, self.done, self.note = shown(description), total, 0.0, ""
        self.in_parts = False
        self.pace = pace  # seconds a unit is expected to take
        self.started = self.printed = time.monotonic()
        self._part: tuple[float, float, str] | None = None  # done before it, its weight, the bar that leads it
        self._live = live
        self._task: TaskID | None = live.add_task(self.description, total=total, note="", bar=self) if live else None

    def update(self, n: float = 1, note: str | None = None, total: float | None = None) -> None:
        """Count `n` more units of work done."""
        self.note = self.note if note is None else shown(note)
        self.total = self.total if total is None else total
        self._reach(self.done + n)
        for outer in _open:
            outer._follow(self)

    @contextmanager
    def part(self, weight: float, leader: str) -> Iterator[None]:
        """`weight` units of this bar's work. Inside, it moves with the bar whose description begins with `leader`."""
        self.in_parts = True
        began, before = time.monotonic(), self.done
        self._part = (before, weight, leader)
        yield
        self._part = None
        if time.monotonic() - began < SKIPPED and self.total is not None:
            self.total -= weight
            self.started = time.monotonic() - (began - self.started)
            self._reach(before)
        else:
            self._reach(before + weight)

    def share(self) -> float:
        """Share of the work that is done."""
        return min(self.done / self.total, 1.0) if self.total else 0.0

    def count(self) -> str:
        """Units done, of how many."""
        return f"{self.done:g}/{self.total:g}" if self.total else f"{self.done:g}"

    def left(self) -> float | None:
        """Seconds left at the pace so far, or None before there is one.

        An expected pace counts as much as a tenth of the work that has been seen to go that way.
        """
        elapsed = time.monotonic() - self.started
        if not self.total:
            return None
        seen, took = self.done, elapsed
        if self.pace is not None:
            seen, took = seen + self.total / 10, took + self.pace * self.total / 10
        elif self.share() < 0.01 or elapsed < 1:
            return None
        return max(self.total - self.done, 0.0) * took / seen

    def _follow(self, inner: Bar) -> None:
        if self._part is not None and inner is not self and inner.description.startswith(self._part[2]):
            before, weight, _ = self._part
            self._reach(max(self.done, before + weight * inner.share()))

    def _reach(self, done: float) -> None:
        self.done = done
        if listener is not None:
            listener(self.description, self.share(), self.note)
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=self.done, total=self.total, note=self.note)
        elif time.monotonic() - self.printed >= PLAIN_INTERVAL:
            self.say()

    def say(self) -> None:
        """Print the plain line."""
        if not is_main():
            return
        self.printed = time.monotonic()
        count = f"{self.share():.0%}" if self.in_parts else self.count()
        left = self.left()
        rest = f", about {clock(left)} left" if left else ""
        line = f"{self.description}: {count} after {clock(self.printed - self.started)}{rest}  {self.note}"
        print(shown(line.rstrip()), file=sys.stderr, flush=True)


@contextmanager
def progress(description: str, total: float | None = None, pace: float | None = None) -> Iterator[Bar]:
    """A bar with the time left, estimated from the pace of its own work. An inner bar goes away when it is done.

    pace: seconds that a unit of work is expected to take, where that is known before anything has been seen.
    """
    global _live
    outermost = _live is None and console.is_terminal and is_main()
    if outermost:
        columns: list[Any] = [TextColumn("{task.description:<30}", markup=False), BarColumn(bar_width=24), _Count()]
        _live = Progress(*columns, TimeElapsedColumn(), _Left(), TextColumn("{task.fields[note]}", markup=False), console=console)
        _live.start()
    bar = Bar(description, total, _live, pace)
    _open.append(bar)
    try:
        yield bar
        if bar._live is None and bar.printed > bar.started:
            bar.say()
    finally:
        _open.remove(bar)
        if bar._live is not None and bar._task is not None and not outermost:
            bar._live.remove_task(bar._task)
        if outermost and _live is not None:
            _live.stop()
            _live = None
