"""Histograms of token counts in a few lines of text."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.text import Text

from isdaa.preview.rows_seen import PartLengths

BLOCKS = " ▁▂▃▄▅▆▇█"
HEIGHT = 3  # lines
LEFT = 11  # columns before the bars
SHADES = {"prompt": "grey62", "chosen": "#3b82f6", "rejected": "#d97706"}


def heights(lengths: np.ndarray, room: int, end: int) -> tuple[np.ndarray, int]:
    """(heights in eighths of a line, tokens a column) for counts of lengths in 0 … end, longer ones in the last column.

    Columns are whole tokens wide, at most `room` of them. One that holds anything is at least an eighth high.
    """
    step = -(-(end + 1) // room)
    counts = np.bincount(np.minimum(lengths, end) // step, minlength=end // step + 1)
    scaled = counts * (8 * HEIGHT / max(int(counts.max()), 1))
    return np.where(counts > 0, np.maximum(1, np.round(scaled)), 0).astype(int), step


def print_histogram(part: PartLengths, console: Console, end: int) -> None:
    """Bars, a mark at the limit, an axis, and the figures in words. end: tokens at the right edge."""
    bars, step = heights(part.lengths, max(20, console.width - LEFT - 2), end)
    columns = len(bars)
    limit = None if part.limit is None or part.limit > end else min(columns - 1, part.limit // step)
    shade = SHADES.get(part.name, "#14b8a6")
    facts = part.facts()
    middle, high = (facts["percentiles"][q] for q in ("50", "95"))
    words = f"half have up to {middle:.0f} tokens, 95 % up to {high:.0f}, the longest {facts['longest']:,}"
    console.print(Text.assemble((f" {part.name}", "bold")) + Text(f"  {words}", style=""), soft_wrap=True)
    for line in range(HEIGHT - 1, -1, -1):
        text = Text(" " * LEFT)
        for column, height in enumerate(bars):
            at_limit = column == limit
            block = BLOCKS[int(np.clip(height - 8 * line, 0, 8))]
            beyond = limit is not None and column >= limit
            text.append("┊" if at_limit and block == " " else block, style="red" if beyond else shade)
        console.print(text, no_wrap=True)
    console.print(_axis(part, columns, end, limit), no_wrap=True)


def _axis(part: PartLengths, columns: int, end: int, limit: int | None) -> Text:
    row = [" "] * columns
    marks = [(0, "0"), (columns, f"{end:,}")]
    if limit is not None:
        share = part.cut.mean()
        words = f"limit {part.limit:,}: " + (f"{share:.1%} cut" if share else "none cut")
        marks.append((limit, words))
    for place, words in marks:
        start = max(0, min(place - len(words) // 2 if 0 < place < columns else place, columns - len(words)))
        if all(character == " " for character in row[max(0, start - 1) : start + len(words) + 1]) or place not in (0, columns):
            row[start : start + len(words)] = list(words)
    return Text(" " * LEFT + "".join(row), style="dim")


def common_end(parts: list[PartLengths]) -> int:
    """The right edge that several histograms share: all but a few outliers, and every limit."""
    most = max(max(int(np.percentile(part.lengths, 99.5)), part.limit or 0) for part in parts)
    return max(8, most * 21 // 20)
