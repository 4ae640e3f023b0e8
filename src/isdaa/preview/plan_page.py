"""The plan of a stage on a terminal: memory as one bar with its parts, time and disk beside it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from isdaa.errors import shown
from isdaa.preview.devices import device_of
from isdaa.preview.fits import Fit
from isdaa.preview.plan import Phase, Plan

GB = 1e9
SHADES = {
    "program and data": "grey50",
    "CUDA": "grey50",
    "weights": "#3b82f6",
    "weights of the other model": "#1d4ed8",
    "weights of the scorer": "#1d4ed8",
    "gathered layers": "#93c5fd",
    "weights cast by autocast": "#60a5fa",
    "dequantised weights": "#93c5fd",
    "adapter": "#06b6d4",
    "optimiser states": "#8b5cf6",
    "gradients": "#f59e0b",
    "gradients being reduced": "#fcd34d",
    "activations": "#10b981",
    "logits": "#ef4444",
    "keys and values": "#10b981",
    "fragmentation": "grey35",
}
WORDS = {
    "program and data": "this process with libraries and rows, measured",
    "CUDA": "context and kernels, assumed",
    "fragmentation": "lost in the allocator, estimated",
    "logits": "of one chunk of positions, not of all",
    "gradients": "those that exist at the memory peak",
}


def print_plan(plan: Plan, console: Console, colour: bool) -> None:
    """One stage's plan on a console."""
    name = "this CPU" if plan.device == "cpu" else device_of(plan.device).name
    console.print()
    console.print(Rule(Text(f"plan · {plan.stage} on {name}", style="bold"), align="left", style="dim"))
    adapter = any("adapter" in phase.parts for phase in plan.phases)
    trained = f"; only the adapter's {count(plan.trainable)} are trained" if adapter else ""
    _entry(console, "model", f"{count(plan.parameters)} parameters{trained}")
    peak = plan.peak
    room = f" of {size(plan.available)}" if plan.available else ""
    over = plan.available is not None and peak.total > plan.available
    where = f" at the peak, during {peak.name}" if len(plan.phases) > 1 else ""
    _entry(console, "memory", f"{size(peak.total)}{room}{where}", "bold red" if over else "bold")
    _bar(peak, console, plan.available, colour)
    for phase in plan.phases:
        if phase is not peak:
            _entry(console, "", f"{phase.name}: {size(phase.total)}")
    _time(plan, console)
    if plan.checkpoint:
        free = f"; {size(plan.disk_free)} free" if plan.disk_free is not None else ""
        _entry(console, "disk", f"{size(plan.disk)} in total, {size(plan.checkpoint)} per checkpoint with optimiser states{free}")
    for note in plan.notes:
        _entry(console, "", note)


def print_fits(fits: Sequence[Fit], memory: float, device: str, console: Console) -> None:
    """The settings that fit into the given memory, best first, with what to type; then those that do not fit."""
    name = "this CPU (for a GPU of that size, name a similar one: --device l4)" if device == "cpu" else device_of(device).name
    console.print()
    console.print(Rule(Text("what fits, best first", style="bold"), align="left", style="dim"))
    _entry(console, "memory", f"{size(memory)} on {name}, a tenth left free; estimated, not measured", "bold")
    for one in fits:
        cut = f", {one.cut:.0%} of the pairs cut" if one.cut else ""
        told = f"{size(one.memory)}, {span(one.seconds)} in total{cut}" if one.fits else f"does not fit: needs {size(one.memory)}"
        _entry(console, "✓" if one.fits else "✗", f"{one.form}: {told}", "" if one.fits else "dim")
        if one.fits:
            _entry(console, "", " ".join(f"--{key} {_typed(value)}" for key, value in one.options.items()) or "as configured")
    if not any(one.fits for one in fits):
        _entry(console, "", "nothing fits; try a smaller model, or several devices (--processes, --sharding fsdp2)")


def _typed(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _time(plan: Plan, console: Console) -> None:
    parts = [f"{name} {span(seconds)}" for name, seconds in plan.seconds.items()]
    if plan.epoch_seconds is not None and plan.step_seconds is not None:
        pace = f"{span(plan.epoch_seconds)} per epoch, {plan.step_seconds:.2g} s per step"
        _entry(console, "time", f"{span(sum(plan.seconds.values()))} in total: {', '.join(parts)}")
        _entry(console, "", pace)
    else:
        _entry(console, "time", ", ".join(parts))
    _entry(console, "", plan.speed.how)
    if plan.plain:
        saved = 1 - plan.tokens / plan.plain
        _entry(console, "tokens", f"{plan.tokens:,} per epoch; separate rows would have {plan.plain:,} ({saved:.0%} saved)")


def _bar(phase: Phase, console: Console, available: float | None, colour: bool) -> None:
    """One bar with the parts side by side, and a line for each."""
    width = max(20, console.width - 14)
    full = max(phase.total, available or 0.0) if available and available < 4 * phase.total else phase.total
    bar, used = Text(" " * 11), 0
    edges = 0.0
    for name, part in phase.parts.items():
        edges += part
        end = round(edges / full * width)
        bar.append(("█" if colour else _letter(name, phase)) * (end - used), style=SHADES.get(name, "white"))
        used = end
    bar.append("·" * (width - used), style="dim")
    console.print(bar, no_wrap=True)
    longest = max(len(name) for name in phase.parts)
    for name, part in phase.parts.items():
        mark = "■" if colour else _letter(name, phase)
        line = Text(" " * 11) + Text(f"{mark} ", style=SHADES.get(name, "white"))
        line.append(f"{name:<{longest}} {size(part):>9} {part / phase.total:>5.0%}")
        words = WORDS.get(name, "")
        if words and console.width >= 100:
            line.append(f"  {words}", style="dim")
        console.print(line, no_wrap=True, overflow="ellipsis")


def _letter(name: str, phase: Phase) -> str:
    """A letter for each part, the first of its name that no part before it has."""
    taken: set[str] = set()
    for other in phase.parts:
        letter = next((c for c in other.lower().replace(" ", "") if c not in taken), "?")
        taken.add(letter)
        if other == name:
            return letter
    return "?"


def _entry(console: Console, name: str, words: str, style: str = "") -> None:
    room = max(20, console.width - 12)
    for number, line in enumerate(Text(shown(words), style=style).wrap(Console(width=room), room)):
        left = Text.assemble((f" {name:<9} " if number == 0 else " " * 11, "bold"))
        console.print(left.append_text(line), no_wrap=True)


def size(amount: float) -> str:
    """`1.64 GB`, `23 MB`: powers of ten, as devices are sold."""
    if amount >= 1e12:
        return f"{amount / 1e12:.2f} TB"
    return (
        f"{amount / GB:.2f} GB" if amount >= 0.9995e9 else f"{amount / 1e6:.0f} MB" if amount >= 1e6 else f"{amount / 1e3:.0f} kB"
    )


def count(number: int) -> str:
    """`3.21 billion`, `40.5 million`, `181,344`."""
    if number >= 1e9:
        return f"{number / 1e9:.2f} billion"
    return f"{number / 1e6:.1f} million" if number >= 1e6 else f"{number:,}"


def span(seconds: float) -> str:
    """`42 s`, `12 min`, `3.4 h`, `2.1 days`."""
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= (2 if unit == "days" else 1.5) * length:
            return f"{seconds / length:.1f} {unit}" if seconds < 20 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
