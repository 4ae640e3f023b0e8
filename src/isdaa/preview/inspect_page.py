"""What `isdaa inspect` prints: headings, counts, one row token by token, histograms, warnings."""

from __future__ import annotations

from typing import IO

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from isdaa.errors import shown
from isdaa.preview.histogram import common_end, print_histogram
from isdaa.preview.inspect import Inspection, StageReport
from isdaa.preview.plan_page import print_fits, print_plan
from isdaa.preview.rows_seen import FOUND
from isdaa.preview.token_view import print_shown
from isdaa.terminal import terminal_for

NAMES = {
    "sft": "supervised fine-tuning",
    "reward": "reward model",
    "label": "sampling and labelling",
    "align": "preference training",
}
MARKS = {True: "the end token is yellow", False: "separated by bars, the end token in brackets"}


def print_inspection(found: Inspection, file: IO[str] | None = None, width: int | None = None, whole: bool = False) -> None:
    """Print everything, with colour where `file` (stdout) is a terminal that has it and NO_COLOR is not set."""
    console = terminal_for(file, width)
    print_to(found, console, whole)


def print_to(found: Inspection, console: Console, whole: bool = False) -> None:
    """The same on a console of the caller's."""
    colour = console.color_system is not None and not console.no_color
    if found.memory is None:
        for report in found.stages:
            _stage(report, console, colour, whole)
        for report in found.stages:
            if report.plan is not None:
                print_plan(report.plan, console, colour)
    else:
        print_fits(found.fits or [], *found.memory, console)
    _lines("missing", [f"{line}" for line in found.missing], "bold red", "✗", console)
    _lines("warnings", found.warnings, "yellow", "!", console)
    if not found.warnings and not found.missing:
        console.print()
        console.print(Text(" No warnings.", style="green"))


def _stage(report: StageReport, console: Console, colour: bool, whole: bool) -> None:
    examined = report.examined
    console.print()
    title = f"{examined.stage} · {NAMES[examined.stage]}"
    console.print(Rule(Text(title, style="bold"), align="left", style="dim"))
    _rows(report, console)
    if examined.shown:
        console.print()
        console.print(Text.assemble((" token by token  ", "bold")) + Text(MARKS[colour], style="dim"))
        for row in examined.shown:
            print_shown(row, console, colour, whole)
    if examined.parts:
        console.print()
        note = f"; {len(examined.parts[0].lengths):,} rows sampled" if examined.sampled < examined.counts.kept else ""
        console.print(Text.assemble((" lengths in tokens, before cutting", "bold")) + Text(note, style="dim"))
        end = common_end(examined.parts)
        for part in examined.parts:
            print_histogram(part, console, end)


def _rows(report: StageReport, console: Console) -> None:
    examined = report.examined
    entries: list[tuple[str, str]] = [("data", examined.source)]
    if examined.assumed:
        entries.append(("", examined.assumed))
    else:
        kept, *rest = examined.counts.lines()
        entries.append(("rows", kept))
        entries += [("", f"– {line}") for line in rest]
    if examined.held_out:
        entries.append(("held out", f"{examined.held_out:,} pairs"))
    if examined.different_prompts is not None:
        each = len(examined.lengths) / examined.different_prompts
        entries.append(("prompts", f"{examined.different_prompts:,} different prompts, {each:.2f} pairs each"))
    if examined.ended is not None:
        entries.append(("ends", f"{examined.ended:.1%} of the responses end with an end token"))
    if examined.learnt is not None:
        entries.append(("learnt", f"{examined.learnt:.1%} of the tokens are trained on"))
    if examined.merge:
        entries.append(("merges", f"a token spans prompt and response, for example {examined.merge}"))
    entries += [("check", f"{n:,} {FOUND[name]}") for name, n in examined.found.items() if n]
    entries += [("note", note) for note in examined.notes]
    if report.steps is not None:
        entries.append(("steps", _steps(report)))
    entries += [("" if later else "verdict", line) for later, line in enumerate(report.seen)]
    for name, words in entries:
        style = "yellow" if name == "check" else "bold" if name else ""
        console.print(_entry(name, words, style, console.width))


def _steps(report: StageReport) -> str:
    noun = "examples" if report.examined.stage == "sft" else "pairs"
    kept = f"; {report.checkpoints} checkpoint{'s' * (report.checkpoints > 1)} kept" if report.checkpoints else ""
    return f"{report.steps:,} with {report.batch:,} {noun} each ({report.steps_per_epoch:,} per epoch){kept}"


def _entry(name: str, words: str, style: str, width: int) -> Text:
    """A name in its column, and words that wrap beside it."""
    room = max(20, width - 12)
    text = Text()
    for number, line in enumerate(Text(shown(words)).wrap(Console(width=room), room)):
        text.append(f" {name:<9} " if number == 0 else " " * 11, style=style)
        text.append_text(line)
        text.append("\n")
    text.right_crop(1)
    return text


def _lines(title: str, lines: list[str], style: str, mark: str, console: Console) -> None:
    if not lines:
        return
    console.print()
    console.print(Rule(Text(title, style=style), align="left", style="dim"))
    for line in lines:
        console.print(Padding(Text(f"{mark} ", style=style) + Text(shown(line)), (0, 1)))
