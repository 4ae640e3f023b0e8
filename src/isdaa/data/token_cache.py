"""Tokenised rows as Arrow tables, kept on disk under a key of all that decides their content."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isdaa.data.encoder import Encoder
from isdaa.data.pairs import Counts, Row
from isdaa.errors import UserError
from isdaa.files import digest, file_digest, write_folder_atomically, write_json
from isdaa.foreign import read_json
from isdaa.terminal import progress

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

FORMAT = 2  # of the files; `encoding.VERSION`, in the key, is of the ids
BATCH = 1000  # rows at once
WORKERS = 2  # batches at once: while one is in the tokenizer, on all cores, Python makes lists of the other
logger = logging.getLogger(__name__)


def content_digest(rows: Dataset) -> str:
    """Digest of every value of a data set, whatever files or pieces it lies in. `where` is a place, not content."""
    sha = hashlib.sha256()
    rows = rows.remove_columns([name for name in ("where",) if name in rows.column_names])
    for batch in rows.iter(BATCH):
        for row in zip(*batch.values(), strict=True):
            sha.update(json.dumps(row, ensure_ascii=False, default=str).encode())
    sha.update(json.dumps(rows.column_names).encode())
    return sha.hexdigest()[:24]


def tokenized(
    rows: Dataset,
    columns: Callable[[list[Row]], dict[str, list[Any]]],
    encoder: Encoder,
    key: list[Any],
    cache_dir: str | Path | None,
    what: str,
) -> tuple[Dataset, Counts]:
    """Run `columns` (rows to lists by column; it may drop rows) over a data set, or read what an earlier run kept.

    encoder: what `columns` uses, in several threads at once, and counts its events with; key: with the rows' content, all
    that decides the result. Adds the column `index`, the row number. Raises UserError where no row is left.
    """
    from datasets import Dataset

    folder = None
    if cache_dir is not None:
        folder = Path(cache_dir) / f"tokens-{digest([FORMAT, key, content_digest(rows)])}"
        if (found := read_tokens(folder)) is not None:
            return found
    counts = encoder.counts
    batches: list[pyarrow.RecordBatch] = []
    kept = 0
    with progress(f"tokenising {what}", len(rows)) as bar:
        for size, values in in_order(rows, columns, encoder.in_threads):
            batches.append(_record_batch(values, kept))
            kept += batches[-1].num_rows
            bar.update(size)
    counts.rows, counts.kept = len(rows), kept
    if not kept:
        raise UserError(f"no {what} left after tokenising: {'; '.join(counts.lines())}")
    import pyarrow as pa

    table = pa.Table.from_batches(batches)
    if folder is None:
        return Dataset(_in_memory(table)), counts
    found = read_tokens(folder)  # another process may have filled it meanwhile
    if found is None:
        write_folder_atomically(folder, lambda aside: write_tokens(aside, table, counts))
        found = read_tokens(folder)
    # Absent where another process is just replacing it by its own, equal one.
    return (Dataset(_in_memory(table)), counts) if found is None else found


def in_order(
    rows: Dataset, columns: Callable[[list[Row]], dict[str, list[Any]]], in_threads: bool
) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """(rows taken, `columns` of them) batch by batch; a few batches ahead where there are several and threads may be used."""
    batches = (_rows_of(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH))
    if not in_threads or len(rows) <= BATCH:
        yield from ((len(batch), columns(batch)) for batch in batches)
        return
    waiting: deque[tuple[int, Future[dict[str, list[Any]]]]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for batch in batches:
                waiting.append((len(batch), pool.submit(columns, batch)))
                if len(waiting) > WORKERS:
                    size, values = waiting.popleft()
                    yield size, values.result()
            while waiting:
                size, values = waiting.popleft()
                yield size, values.result()
        finally:  # after an error, what has not begun is not worth its time
            pool.shutdown(wait=False, cancel_futures=True)


def _rows_of(batch: dict[str, list[Any]]) -> list[Row]:
    size = len(next(iter(batch.values())))
    return [{name: column[i] for name, column in batch.items()} for i in range(size)]


def _record_batch(values: dict[str, list[Any]], first: int) -> pyarrow.RecordBatch:
    """Lists of ids become int32 lists (Python ints would take ten times the memory), the rest strings and float64."""
    import pyarrow as pa

    arrays: dict[str, pyarrow.Array] = {}
    for name, column in values.items():
        if name == "id":
            arrays[name] = pa.array(column, pa.string())
        elif name.endswith(("_ids", "_mask")):
            flat = np.fromiter(chain.from_iterable(column), np.int32)
            offsets = np.cumsum([0, *map(len, column)], dtype=np.int32)
            arrays[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
        else:
            arrays[name] = pa.array(column, pa.float64())
    arrays["index"] = pa.array(np.arange(first, first + len(values["id"])), pa.int64())
    return pa.RecordBatch.from_pydict(arrays)


def _in_memory(table: pyarrow.Table) -> Any:
    from datasets.table import InMemoryTable

    return InMemoryTable(table)


def write_tokens(folder: Path, table: pyarrow.Table, counts: Counts) -> None:
    import pyarrow as pa

    path = folder / "tokens.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    write_json(folder / "tokens.json", {"counts": asdict(counts), "rows": table.num_rows, "digest": file_digest(path)})


def read_tokens(folder: Path) -> tuple[Dataset, Counts] | None:
    """What an earlier run kept, or None where it is absent or damaged."""
    from datasets import Dataset

    if not folder.exists():
        return None
    try:
        record = read_json(folder / "tokens.json")
        if record["digest"] != file_digest(folder / "tokens.arrow"):
            raise ValueError("its content is not what was written")
        rows = Dataset.from_file(str(folder / "tokens.arrow"))
        if len(rows) != record["rows"]:
            raise ValueError("rows are missing")
        counts = Counts(**record["counts"])
        if not all(type(value) is int for name, value in asdict(counts).items() if name != "unread"):
            raise ValueError("its counts are no numbers")
        return rows, counts
    except Exception as error:  # a cache is never worth a failed run: whatever is wrong with it, it is made anew
        logger.warning("%s is damaged (%s) and is made again", folder, error)
        return None
