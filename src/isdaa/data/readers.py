"""Reading rows where they lie: local files and folders, the Hub, the embedded world; each with its 'file:row'."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from isdaa.data.pairs import KNOWN_COLUMNS
from isdaa.errors import UserError, nearest
from isdaa.files import iterate_jsonl

Numbered = Iterator[tuple[Mapping[str, Any], str]]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
# Names that say which split a file of a folder, or that folder itself, holds.
SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval", "sft", "prompts")
WORLD_SPLITS = {"train": None, "test": "eval", "validation": "eval"}  # None: the split that the caller is for
WORLD_ROWS = {"sft": 6400, "prompts": 10_000, "eval": 512}


def iterate_rows(
    source: str,
    split: str | None = None,
    *,
    subset: str | None = None,
    limit: int | None = None,
    world_split: str = "sft",
    columns: frozenset[str] = frozenset(),
) -> Numbered:
    """Yield (row, 'file:row').

    world_split: which of the embedded world's splits stands for 'train'; columns: those to decode beside `KNOWN_COLUMNS`.
    """
    path = Path(source).expanduser()
    if source.startswith("world:"):
        rows = _world(source, split, world_split, limit)
    elif path.exists():
        if subset is not None:
            raise UserError(f"{source}: 'subset' ({subset}) names a configuration of a Hub data set, but this is a local path")
        rows = _local(path, split, columns)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith(".") and path.suffix not in SUFFIXES:
        rows = _hub(source, split or "train", subset, columns)
    else:
        hint = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise UserError(f"{source}: no such file or folder{hint}; give an existing path, a Hub name (owner/name) or world:small")
    for number, item in enumerate(rows):
        if limit is not None and number >= limit:
            return
        yield item


def has_split(path: Path, split: str) -> bool:
    """Whether a local folder has a split of exactly this name: by its files' names, or as `datasets` saved it."""
    if (path / "dataset_dict.json").exists():
        return split in json.loads((path / "dataset_dict.json").read_text())["splits"]
    return path.is_dir() and any(_is_of(file, path, split) for file in path.rglob("*") if file.suffix in SUFFIXES)


def _is_of(file: Path, folder: Path, split: str) -> bool:
    """Whether the file's name, or a folder's on the way to it, is the split's name or that and more."""
    return any(re.match(rf"{re.escape(split)}($|[-_.])", part) for part in file.relative_to(folder).parts)


def _local(path: Path, split: str | None, columns: frozenset[str]) -> Numbered:
    if path.is_file():
        yield from _reader(path)(path)
    elif (path / "dataset_dict.json").exists():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        name = split or ("train" if "train" in splits else splits[0])
        if name not in splits:
            raise UserError(f"{path}: no split '{name}'{nearest(name, splits)}; it has {', '.join(splits)}")
        yield from _saved(path / name, columns)
    elif (path / "state.json").exists():
        yield from _saved(path, columns)
    else:
        for file in _files_of(path, split):
            yield from _reader(file)(file)


def _files_of(folder: Path, split: str | None) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"{folder}: holds no data file ({', '.join(SUFFIXES)})")
    exact = [file for file in files if split is not None and _is_of(file, folder, split)]
    if exact:  # `train_prefs` where there is `train_sft`, too
        return exact
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = [re.split(r"[-_.]", part)[0] for part in file.relative_to(folder).parts]
        splits.setdefault(next((word for word in words if word in (*SPLIT_NAMES, split)), ""), []).append(file)
    if split is None or set(splits) == {""}:
        return files
    if split not in splits:
        known = [name for name in splits if name]
        raise UserError(f"{folder}: no file of split '{split}'{nearest(split, known)}; its files are of {', '.join(known)}")
    return splits[split]


def _reader(path: Path) -> Callable[[Path], Numbered]:
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".arrow": _arrow}
    if path.suffix not in readers:
        raise UserError(f"{path}: unknown kind of file '{path.suffix}'; known are {', '.join(SUFFIXES)}")
    return readers[path.suffix]


def _jsonl(path: Path) -> Numbered:
    for number, row in iterate_jsonl(path):
        yield row, f"{path}:{number}"


def _json(path: Path) -> Numbered:
    """A list of objects, an object with that list under 'data', or JSON Lines under the wrong name."""
    try:
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _jsonl(path)
            return
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error}); mend the file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 ({error}); save it as UTF-8") from None
    rows = content.get("data", [content]) if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of objects, found {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        yield row, f"{path}:{number}"


def _csv(path: Path) -> Numbered:
    """Rows are numbered by the line on which they start, the header being line 1."""
    csv.field_size_limit(2**31 - 1)
    line = 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            line = 1 if reader.fieldnames is None else reader.line_num + 1
            for row in reader:
                if None in row:
                    raise UserError(f"{path}:{line}: more cells than the header has columns; quote cells that hold commas")
                yield row, f"{path}:{line}"
                line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: not a valid CSV row ({error}); mend or remove it") from None
    except UnicodeDecodeError as error:  # found in a block read ahead, so the line is not known
        raise UserError(f"{path}: not valid UTF-8 ({error}); save it as UTF-8") from None


def _parquet(path: Path) -> Numbered:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(1000):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path}:{number}"
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({_first_line(error)})") from None


def _arrow(path: Path) -> Numbered:
    """Arrow IPC, the stream format (`datasets` writes it) or the file format (Feather)."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            try:
                batches = pa.ipc.open_stream(file).read_all().to_batches(1000)
            except pa.ArrowInvalid:
                batches = pa.ipc.open_file(file).read_all().to_batches(1000)
            number = 0
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path}:{number}"
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Arrow file ({_first_line(error)})") from None


def _saved(folder: Path, columns: frozenset[str]) -> Numbered:
    from datasets import load_from_disk

    try:
        rows = load_from_disk(str(folder))
    except Exception as error:  # pyarrow's, json's and datasets' own errors, by what is wrong
        raise UserError(f"{folder}: not a readable save_to_disk folder ({_first_line(error)})") from None
    yield from _of_dataset(rows, str(folder), columns)


def _hub(name: str, split: str, subset: str | None, columns: frozenset[str]) -> Numbered:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, subset, split=split)
    except Exception as error:  # network, permissions, unknown names: each library below has its own
        raise UserError(
            f"{name}: neither a local path nor loadable from the Hub, split '{split}' "
            f"({type(error).__name__}: {_first_line(error)}); a local copy can stand in: its path, or RECIPE:PATH"
        ) from None
    yield from _of_dataset(rows, name, columns)


def _of_dataset(rows: Any, name: str, columns: frozenset[str]) -> Numbered:
    """Columns that nobody here reads are not decoded (published token columns are long); messages still name them."""
    unread = dict.fromkeys(column for column in rows.column_names if column not in KNOWN_COLUMNS | columns)
    for number, row in enumerate(rows.remove_columns(list(unread)), start=1):
        yield {**row, **unread}, f"{name}:{number}"


def _world(source: str, split: str | None, default: str, limit: int | None) -> Numbered:
    """`world:small`, `world:medium`, or with another draw's seed `world:small:7`."""
    from isdaa.world.grammar import SPLITS, make_posts
    from isdaa.world.lexicon import SIZES

    _, size, seed, *more = [*source.split(":"), "0"]
    if size not in SIZES or not seed.isdecimal() or len(more) > 1:
        known = [f"world:{size}" for size in SIZES]
        raise UserError(
            f"{source}: no such world{nearest(source, known)}; known are {', '.join(known)}, each with ':seed' or not"
        )
    name = WORLD_SPLITS.get(split or "train", split) or default
    if name not in SPLITS:
        raise UserError(f"{source}: no split '{split}'{nearest(str(split), SPLITS)}; it has {', '.join(SPLITS)}")
    for row in make_posts(size, limit or WORLD_ROWS[name], split=name, seed=int(seed)):
        yield row, f"{source}:{row['id']}"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
