"""Tables of a page without what says nothing: columns and rows in which no cell has a value."""

from __future__ import annotations

import re

TABLE = re.compile(r"<table\b.*?</table>", re.DOTALL)
ROW = re.compile(r"<tr\b[^>]*>(.*?)</tr>\s*", re.DOTALL)
CELL = re.compile(r"<(t[hd])\b([^>]*)>(.*?)</\1>", re.DOTALL)
SPAN = re.compile(r'\bcolspan="(\d+)"')


def pruned(page: str) -> str:
    """The page, its tables without columns and rows of dashes. What stands in cells is escaped, so that it holds no tag.

    The first column names its row and stays. A cell over several columns is no value of any one of them.
    """
    return TABLE.sub(lambda found: _pruned(found.group()), page)


def _pruned(table: str) -> str:
    filled: set[int] = set()
    for row in ROW.findall(table):
        filled |= {place for kind, place, span, text in _cells(row) if kind == "td" and place and span == 1 and _says(text)}
    if not filled:
        return table

    def keep(found: re.Match[str]) -> str:
        cells = _cells(found.group(1))
        behind = [text for kind, place, _, text in cells if kind == "td" and place]
        if behind and not any(map(_says, behind)):
            return ""
        start, end = (edge - found.start() for edge in found.span(1))
        return found.group()[:start] + CELL.sub(_Kept(filled | {0}), found.group(1)) + found.group()[end:]

    return ROW.sub(keep, table)


class _Kept:
    """Goes through a row's cells in their order: what becomes of each."""

    def __init__(self, columns: set[int]) -> None:
        self.columns, self.place = columns, 0

    def __call__(self, cell: re.Match[str]) -> str:
        span = _span(cell.group(2))
        left = sum(place in self.columns for place in range(self.place, self.place + span))
        self.place += span
        if span == 1:
            return cell.group() if left else ""
        return SPAN.sub(f'colspan="{max(left, 1)}"', cell.group(), count=1)


def _cells(row: str) -> list[tuple[str, int, int, str]]:
    """(th or td, its first column, how many it covers, what it holds) of each cell."""
    found, place = [], 0
    for kind, attributes, text in CELL.findall(row):
        span = _span(attributes)
        found.append((kind, place, span, text))
        place += span
    return found


def _span(attributes: str) -> int:
    told = SPAN.search(attributes)
    return int(told.group(1)) if told is not None else 1


def _says(text: str) -> bool:
    return re.sub(r"<[^>]*>", "", text).strip() not in ("", "–")
