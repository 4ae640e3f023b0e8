"""Progress on a terminal (rich) or, where there is none, a plain line every few seconds. Bars nest."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.text import Text

from isdaa.distributed import is_main
from isdaa.errors import shown

PLAIN_WIDTH = 100  # columns where there is no terminal to ask
PLAIN_INTERVAL = 10.0  # seconds between two lines of a bar where there is no terminal
SILENCE = 8.0  # seconds without any line, after which the innermost bar prints one
OFTEN = 0.2  # seconds between two movements within a unit
ROUGH = 5.0  # seconds after which less than a hundredth of the work is enough for an estimate
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
_printed = time.monotonic()  # when the last line was printed
_idle = threading.Event()  # no bar is open
_idle.set()


def say(line: str) -> None:
    """One line on stderr, above the bars. Not wrapped where there is no terminal: a path stays in one piece.

    Of several processes, the main one alone says anything, here and in bars.
    """
    if not is_main():
        return
    _note_line()
    console.print(shown(line), soft_wrap=not console.is_terminal)


def _note_line() -> None:
    global _printed
    _printed = time.monotonic()


def _speak() -> None:
    """While a bar is open: after `SILENCE` without a line the innermost prints one. On a terminal they show the time."""
    while not _idle.wait(max(_printed + SILENCE - time.monotonic(), 0.05)):
        if time.monotonic() - _printed >= SILENCE:
            _note_line()
            with suppress(OSError, ValueError, IndexError):  # a closed pipe is for the main thread to notice
                if _live is None:
                    _open[-1].say(within=True)


def clock(seconds: float | None) -> str:
    """`0:42`, `1:03:20`; `-:--` where nothing is known."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Left(ProgressColumn):
    def render(self, task: Task) -> Text:
        bar: Bar = task.fields["bar"]
        return Text(f"{clock(bar.left())} left" if bar.total else "")


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        bar: Bar = task.fields["bar"]
        return Text(f"{bar.share():.0%}" if bar.in_parts else bar.count() if bar.total or bar.done else "")


class _Note(ProgressColumn):
    def render(self, task: Task) -> Text:
        bar: Bar = task.fields["bar"]
        return Text("  ".join(filter(None, (bar.note, shown(bar.within)))))


class Bar:
    """One line of progress: `update(n)` counts work done, `note` shows a word beside it.

    within: what goes on in the unit that is in work, shown while it lasts; set it as often as you like.
    ahead: how much of the units in work is done, in units; it moves the bar and those around it, and is not counted.
    """

    def __init__(
        self, description: str, total: float | None, live: Progress | None, pace: float | None = None, first: float = 0.0
    ) -> None:
        self.description, self.total, self.note, self.within = shown(description), total, "", ""
        self.first = self.done = first  # what was done by an earlier process says nothing about the pace
        self.in_parts = False
        self.pace = pace  # seconds a unit is expected to take
        self.started = self.printed = self._moved = time.monotonic()
        self._ahead = self._stride = 0.0  # the last movement, in units
        self._part: tuple[float, float, str] | None = None  # done before it, its weight, the bar that leads it
        self._live = live
        self._line: tuple[Any, ...] | None = None  # what the last plain line showed
        self._told = False  # whether a plain line has shown what is done
        self._task: TaskID | None = live.add_task(self.description, total=total, completed=first, bar=self) if live else None  # type: ignore[arg-type]

    def update(self, n: float = 1, note: str | None = None, total: float | None = None) -> None:
        """Count `n` more units of work done."""
        self.note = self.note if note is None else shown(note)
        self.total = self.total if total is None else total
        before, self._ahead = self.done + self._ahead, max(self._ahead - n, 0.0)  # what is done now was in work before
        self._reach(self.done + n, before)
        for outer in _open:
            outer._follow(self)

    @property
    def ahead(self) -> float:
        return self._ahead

    @ahead.setter
    def ahead(self, units: float) -> None:
        if units and time.monotonic() - self._moved < OFTEN:
            return
        before, self._ahead = self.done + self._ahead, units
        self._reach(self.done, before)
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
            self._reach(before, before)
        else:
            self._reach(before + weight, self.done)

    def share(self) -> float:
        """Share of the work that is done."""
        return min((self.done + self._ahead) / self.total, 1.0) if self.total else 0.0

    def count(self) -> str:
        """Units done, of how many."""
        return f"{self.done:g}/{self.total:g}" if self.total else f"{self.done:g}"

    def left(self) -> float | None:
        """Seconds left at the pace so far, or None before there is one.

        An expected pace counts as much as a tenth of the work that has been seen to go that way. Until the next unit is done the
        time runs down, by no more than the last one took: it goes up only where the work has become slower.
        """
        if not self.total:
            return None
        elapsed, reached = time.monotonic() - self.started, min(self.done + self._ahead, self.total)
        seen, took = reached - self.first, max(self._moved - self.started, 0.0)
        if self.pace is not None:
            seen, took = seen + self.total / 10, took + self.pace * self.total / 10
        elif seen <= 0 or elapsed < 1 or (seen / self.total < 0.01 and elapsed < ROUGH):
            return None
        pace, waited = took / seen, max(time.monotonic() - self._moved, 0.0)
        return max((self.total - reached) * pace - min(waited, self._stride * pace), 0.0)

    def _follow(self, inner: Bar) -> None:
        if self._part is not None and inner is not self and inner.description.startswith(self._part[2]):
            before, weight, _ = self._part
            self._reach(max(self.done, before + weight * inner.share()), self.done)

    def _reach(self, done: float, before: float) -> None:
        """before: where the bar stood, with what was ahead."""
        self.done = done
        if (moved := done + self._ahead - before) > 0:
            self._moved, self._stride = time.monotonic(), moved
        if listener is not None:
            listener(self.description, self.share(), self.note)
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=self.done + self._ahead, total=self.total)
        elif time.monotonic() - self.printed >= PLAIN_INTERVAL:
            self.say()

    def say(self, within: bool = False) -> None:
        """Print the plain line. within: with what goes on in the unit in work, instead of the note on those that are done."""
        if not is_main():
            return
        _note_line()
        now, self._line = time.monotonic(), self._state()
        if not within:  # else the figures of the next unit that is done would have to wait
            self.printed, self._told = now, True
        count = f"{self.share():.0%}" if self.in_parts else self.count()
        left = self.left()
        rest = f", about {clock(left)} left" if left else ""
        counted = f"{count} after " if self.total or self.done else ""
        words = (within and self.within) or self.note
        counted = counted or ("" if words else "at work for ")
        line = f"{self.description}: {counted}{clock(now - self.started)}{rest}  {words}"
        print(shown(line.rstrip()) + "\n", end="", file=sys.stderr, flush=True)

    def begin(self) -> None:
        """Print the first plain line without waiting for its time; the last one then comes, too, however short the work is."""
        if self._live is None and not self._told:
            self.say()

    def _state(self) -> tuple[Any, ...]:
        return self.done, self.total, self.note

    def close(self) -> None:
        """The last plain line, where there have been others and it says something new."""
        if self._live is None and self._line not in (None, self._state()):
            self.say()


@contextmanager
def progress(
    description: str, total: float | None = None, pace: float | None = None, *, first: float = 0.0, alone: bool = True
) -> Iterator[Bar]:
    """A bar with the time left, estimated from the pace of its own work. An inner bar goes away when it is done.

    Where there is no terminal, a line every few seconds, also while nothing is counted.

    pace: seconds that a unit of work is expected to take, where that is known before anything has been seen.
    first: what was done before, by another process. alone: False draws it on a terminal only within another bar.
    """
    global _live
    outermost = _live is None and console.is_terminal and is_main() and alone
    if outermost:
        columns: list[Any] = [TextColumn("{task.description:<30}", markup=False), BarColumn(bar_width=24), _Count()]
        _live = Progress(*columns, TimeElapsedColumn(), _Left(), _Note(), console=console)
        _live.start()
    bar = Bar(description, total, _live, pace, first)
    _open.append(bar)
    if _idle.is_set() and is_main():
        _idle.clear()
        _note_line()
        threading.Thread(target=_speak, daemon=True, name="isdaa progress").start()
    try:
        yield bar
        bar.close()
    finally:
        _open.remove(bar)
        if not _open:
            _idle.set()
        if bar._live is not None and bar._task is not None and not outermost:
            bar._live.remove_task(bar._task)
        if outermost and _live is not None:
            _live.stop()
            _live = None


def working(what: str) -> AbstractContextManager[Bar]:
    """A phase whose work cannot be counted: it is heard of only where it takes long."""
    return progress(what, alone=False)


def quiet_libraries() -> None:
    """Libraries' own bars and notices would cover ours; warnings still come through `logging`."""
    warnings.simplefilter("ignore", FutureWarning, append=True)  # for those who write the libraries
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    log_to_stderr(logging.WARNING if is_main() else logging.ERROR)
    logging.getLogger("isdaa").setLevel(logging.INFO if is_main() else logging.ERROR)
