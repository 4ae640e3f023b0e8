"""Records on disk: JSON Lines files of blocks, each whole or absent.

A block is what one piece of work gave: the samples of one checkpoint, the scores of those samples. It is a header line
`{"header": kind, "block": key, "count": n, …}`, which names all that the n lines after it share (model, sampling
settings, seed, scorer, template, versions), and n record lines, each with the block's key. The key is a digest of what
decides the block's content, so work done once is found again, and a block that a kill left unfinished is redone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from isdaa.distributed import is_main, once
from isdaa.errors import UserError
from isdaa.files import append_jsonl, locked_file, readable_jsonl, whole_jsonl, write_jsonl

Record = dict[str, Any]


class Blocks:
    """The blocks of one file, in memory and on disk.

    shared: another file of blocks, which is read and never written: what several evaluations have in common.
    """

    def __init__(self, path: str | Path, shared: str | Path | None = None, readonly: bool = False) -> None:
        self.path = Path(path)
        self.headers: dict[str, Record] = {}
        self.records: dict[str, list[Record]] = {}
        self.shared = Blocks(shared, readonly=True) if shared is not None else None
        lines = (readable_jsonl if readonly else whole_jsonl)(self.path)
        for line in lines:
            key = line.get("block")
            if not isinstance(key, str):
                raise UserError(f"{self.path}: a line names no block, so isdaa did not write it; move the file away")
            if "header" in line:
                # Begun twice: the first was cut off before its end.
                self.headers[key], self.records[key] = line, []
            elif key in self.headers:
                self.records[key].append(line)
        broken = [key for key, header in self.headers.items() if len(self.records[key]) != header["count"]]
        for key in broken:
            del self.headers[key], self.records[key]
        if readonly:
            return
        if broken or len(lines) != sum(1 + len(records) for records in self.records.values()):
            write_jsonl(self.path, (line for key in self.headers for line in (self.headers[key], *self.records[key])))

    def __contains__(self, key: str) -> bool:
        return key in self.headers or (self.shared is not None and key in self.shared)

    def __getitem__(self, key: str) -> list[Record]:
        if key not in self.records and self.shared is not None and key in self.shared:
            return self.shared[key]
        if key not in self.records:
            raise UserError(f"{self.path}: lacks the records of block {key}; run the evaluation again to make them")
        return self.records[key]

    def add(self, kind: str, key: str, header: Record, records: Sequence[Record]) -> None:
        """Append a whole block and sync it."""
        head = {"header": kind, "block": key, "count": len(records), **header}
        lines = [{"block": key, **record} for record in records]
        if is_main():
            append_jsonl(self.path, [head, *lines])
        self.headers[key], self.records[key] = head, lines


class Lines:
    """Records that stand alone, one line each, found by their `key`: a kill loses at most those that were being made."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._found: dict[str, Record] = {}
        for line in whole_jsonl(self.path):
            if not isinstance(line.get("key"), str):
                raise UserError(f"{self.path}: a line has no key, so isdaa did not write it; move the file away")
            self._found[line["key"]] = line

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Record:
        return self._found[key]

    def add(self, records: Sequence[Record]) -> None:
        """Append records, each with its `key`, and sync them; of several processes, which all call it, the main one writes."""
        if is_main():
            append_jsonl(self.path, records)
        self._found |= {record["key"]: record for record in records}


def blocks_of(folder: Path, name: str, plan: Record) -> Blocks:
    """The blocks of file `name` that an evaluation's plan speaks of, those that it shares with others included."""
    shared = plan.get("shared")
    return Blocks(folder / name, folder / shared / name if shared is not None else None)


@contextmanager
def locked(folder: str | Path) -> Iterator[Path]:
    """The folder, made if need be, while no other program writes records into it."""
    folder = Path(folder)
    with ExitStack() as held:
        once(lambda: _take(folder, held))
        yield folder


def _take(folder: Path, held: ExitStack) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose another folder for the evaluation with --output")
    folder.mkdir(parents=True, exist_ok=True)
    taken = f"{folder}: another isdaa process is evaluating into this folder; wait for it"
    held.enter_context(locked_file(folder / ".lock", taken))
