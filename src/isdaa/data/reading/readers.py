"""Reading rows where they lie: local files and folders, the Hub, the embedded world; each with its 'file:row'."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isdaa.data.pairs import KNOWN_COLUMNS
from isdaa.disk import disk_error
from isdaa.errors import UserError, nearest
from isdaa.foreign import (
    PACKED,
    ROW,
    JsonDecoder,
    check_file,
    check_limits,
    given_twice,
    iterate_jsonl,
    opened_text,
    read_object,
    why,
)

if TYPE_CHECKING:
    import pyarrow as pa

Numbered = Iterator[tuple[Mapping[str, Any], str]]

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # of files that may be packed, too
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow", ".feather")
# Names that say which split a file of a folder, or that folder itself, holds.
SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval", "sft", "prompts")
WORLD_SPLITS = {"train": None, "test": "eval", "validation": "eval"}  # None: the split that the caller is for
WORLD_ROWS = {"sft": 6400, "prompts": 10_000, "eval": 512}


def iterate_rows(
    source: str,
    split: str | None = None,
    *,
    limit: int | None = None,
    world_split: str = "sft",
    columns: frozenset[str] = frozenset(),
) -> Numbered:
    """Yield (row, 'file:row') of a file, a folder, the Hub's `owner/name` or the embedded world.

    `owner/name:subset` is a configuration of a Hub data set, `folder:subset` a sub-folder.
    world_split: which of the embedded world's splits stands for 'train'; columns: those to decode beside `KNOWN_COLUMNS`.
    """
    place, subset = divided(source)
    path = Path(place).expanduser()
    if source.startswith("world:"):
        rows = _world(source, split, world_split, limit)
    elif path.exists():
        rows = _local(path if subset is None else _sub_folder(path, subset), split, columns)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:[^:/]+)?", source) and not source.startswith(".") and kind_of(path) is None:
        rows = _hub(place, split or "train", subset, columns)
    else:
        hint = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise UserError(
            f"{source}: no such file or folder{hint}; give an existing path, a Hub name (owner/name, owner/name:subset) or "
            "world:small"
        )
    for row, where in islice(rows, limit):
        check_limits(row, where)
        yield row, where


def divided(source: str) -> tuple[str, str | None]:
    """`owner/name:subset` or `folder:subset` as its two parts; an existing path is whole, whatever colons are in it."""
    place, colon, subset = source.rpartition(":")
    return (place, subset) if colon and not Path(source).expanduser().exists() else (source, None)


def kind_of(path: Path) -> str | None:
    """Which of `SUFFIXES` says how a file is read, whatever its capitals and its packing; None: it holds no rows."""
    inner = _unpacked(path)
    kind = inner.suffix.lower()
    return kind if kind in (SUFFIXES if inner == path else TEXT_SUFFIXES) else None


def _unpacked(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in PACKED else path


def has_split(path: Path, split: str) -> bool:
    """Whether a local folder has a split of exactly this name: by its files' names, or as `datasets` saved it."""
    if (path / "dataset_dict.json").exists():
        return split in _splits(path)
    return path.is_dir() and any(_is_of(file, path, split) for file in _data_files(path))


def _data_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if kind_of(file) is not None and file.is_file())


def files_behind(source: str, split: str | None = None) -> list[Path] | None:
    """The files that `iterate_rows` reads for a local source, in their order; None where the source is no local one, or gone."""
    place, subset = divided(source)
    path = Path(place).expanduser()
    if source.startswith("world:") or not path.exists():
        return None
    path = path if subset is None else _sub_folder(path, subset)
    if path.is_file():
        return [path]
    if (path / "dataset_dict.json").exists():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        path = path / (split or ("train" if "train" in splits else splits[0]))
    return sorted(path.glob("*.arrow")) if (path / "state.json").exists() else _files_of(path, split)


def _sub_folder(path: Path, subset: str) -> Path:
    if not path.is_dir():
        raise UserError(f"{path}:{subset}: {path} is a file, which has no subset; leave ':{subset}' away")
    folders = sorted(inner.name for inner in path.iterdir() if inner.is_dir() and not inner.name.startswith("."))
    if subset not in folders:
        found = f"give one of {', '.join(folders)}" if folders else "it has no sub-folder at all, so name none"
        raise UserError(f"{path}:{subset}: no sub-folder '{subset}'{nearest(subset, folders)}; {found}")
    return path / subset


def _is_of(file: Path, folder: Path, split: str) -> bool:
    """Whether the file's name, or a folder's on the way to it, is the split's name or that and more."""
    return any(re.match(rf"{re.escape(split)}($|[-_.])", part) for part in file.relative_to(folder).parts)


def _local(path: Path, split: str | None, columns: frozenset[str]) -> Numbered:
    if not path.is_dir():
        check_file(path)
        yield from _reader(path)(path)
    elif (path / "dataset_dict.json").exists():
        splits = _splits(path)
        name = split or ("train" if "train" in splits else splits[0])
        if name not in splits:
            raise UserError(f"{path}: no split '{name}'{nearest(name, splits)}; it has {', '.join(splits)}")
        yield from _saved(path / name, columns)
    elif (path / "state.json").exists():
        yield from _saved(path, columns)
    else:
        for file in _files_of(path, split):
            yield from _reader(file)(file)


def _splits(folder: Path) -> list[str]:
    """The splits of a folder that `datasets` saved; each is a sub-folder."""
    file = folder / "dataset_dict.json"
    splits = read_object(file).get("splits")
    if (
        not isinstance(splits, list)
        or not splits
        or not all(isinstance(name, str) and Path(name).name == name for name in splits)
    ):
        raise UserError(f"{file}: 'splits' must be a list of names of folders beside it")
    return splits


def _files_of(folder: Path, split: str | None) -> list[Path]:
    files = _data_files(folder)
    if not files:
        raise UserError(f"{folder}: holds no data file ({', '.join(SUFFIXES)})")
    if (both := given_twice(map(_unpacked, files))) is not None:
        raise UserError(f"{both}: exists twice, compressed and not, or in two compressed formats; remove one")
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
    readers: dict[str | None, Callable[[Path], Numbered]] = {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".json": _json,
        ".csv": partial(_csv, dialect="excel"),
        ".tsv": partial(_csv, dialect="excel-tab"),
        ".parquet": _parquet,
        ".arrow": _arrow,
        ".feather": _arrow,
    }
    kind = kind_of(path)
    if kind not in readers:
        raise UserError(
            f"{path}: unknown kind of file '{path.name.removeprefix(_unpacked(path).stem)}'; known are {', '.join(SUFFIXES)}, "
            f"text formats also compressed ({', '.join(PACKED)})"
        )
    return readers[kind]


def _jsonl(path: Path) -> Numbered:
    for number, row in iterate_jsonl(path):
        yield row, f"{path}:{number}"


def _json(path: Path) -> Numbered:
    """A list of objects, an object with that list under 'data', or JSON Lines under the wrong name."""
    decoder = JsonDecoder()
    with opened_text(path) as (file, encoding):
        text = file.read().decode(encoding)
    try:
        content = decoder.decode(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _jsonl(path)
            return
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error}); mend the file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({why(error)}); mend the file") from None
    rows = content.get("data", [content]) if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of objects, found {type(rows).__name__}")
    if decoder.repeated:
        keys = {id(record): key for record, key in decoder.repeated}
        found = ((f":{n}", keys[id(inner)]) for n, row in enumerate(rows, 1) for inner in _objects(row) if id(inner) in keys)
        row_number, key = next(found, ("", decoder.repeated[0][1]))
        raise UserError(f"{path}{row_number}: key '{key}' is given twice in one object; remove one")
    if isinstance(content, dict) and content and all(isinstance(value, dict) for value in content.values()):
        raise UserError(
            f"{path}: objects of objects, as pandas writes them by itself; write it with orient='records', lines=True"
        )
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        yield row, f"{path}:{number}"


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(inner)


def _csv(path: Path, dialect: str) -> Numbered:
    """Rows are numbered by the line on which they start, the header being line 1."""
    csv.field_size_limit(ROW)
    line = 1
    try:
        with opened_text(path) as (file, encoding):
            text = io.TextIOWrapper(file, encoding, newline="")
            reader = csv.reader(iter(partial(_line, text, path), ""), dialect, strict=True)
            header = next(reader, [])
            while header and not header[-1].strip():  # columns that a spreadsheet adds
                header.pop()
            if (name := given_twice(header)) is not None:
                raise UserError(f"{path}:1: column '{name}' is there twice; rename or remove one")
            line = reader.line_num + 1
            for cells in reader:
                while len(cells) > len(header) and not cells[-1].strip():
                    cells.pop()
                if not any(cells):  # a blank line, or a row of empty cells
                    cells = []
                if cells and len(cells) != len(header):
                    raise UserError(
                        f"{path}:{line}: {'more' if len(cells) > len(header) else 'fewer'} cells than the header has columns "
                        f"({len(cells)}, not {len(header)}); give each column one cell, quoted where it holds the separator"
                    )
                if cells:
                    yield dict(zip(header, cells, strict=True)), f"{path}:{line}"
                line = reader.line_num + 1
    except csv.Error as error:
        kind = "TSV" if dialect == "excel-tab" else "CSV"
        raise UserError(f"{path}:{line}: not a valid {kind} row ({error}); mend or remove it") from None


def _line(text: io.TextIOWrapper, path: Path) -> str:
    line = text.readline(ROW + 1)
    if len(line) > ROW:
        raise UserError(f"{path}: more than {ROW >> 20} MiB in one line; divide or remove it")
    return line


def _parquet(path: Path) -> Numbered:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _of_batches(path, file.schema_arrow, file.iter_batches(1000))
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({_first_line(error)})") from None


def _arrow(path: Path) -> Numbered:
    """Arrow IPC, the stream format (`datasets` writes it) or the file format (Feather)."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            try:
                table = pa.ipc.open_stream(file).read_all()
            except pa.ArrowInvalid:
                table = pa.ipc.open_file(file).read_all()
            yield from _of_batches(path, table.schema, table.to_batches(1000))
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError) as error:
        raise UserError(f"{path}: not a readable Arrow file ({_first_line(error)})") from None


def _of_batches(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Numbered:
    _check_names(path, list(schema))
    number = 0
    for batch in batches:
        batch.validate(full=True)  # damaged offsets would have Python read memory that is not the file's
        try:
            rows = batch.to_pylist()
        except (OverflowError, ValueError, LookupError) as error:
            _check_values(path, batch, number)
            raise error
        for row in rows:
            number += 1
            yield row, f"{path}:{number}"


def _check_values(path: Path, batch: pa.RecordBatch, before: int) -> None:
    """Raises UserError for the first value that Python has no form of, such as a date after the year 9999."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        for number, value in enumerate(column, before + 1):
            try:
                value.as_py()
            except (OverflowError, ValueError, LookupError) as error:
                told = f"column '{name}' holds a value that cannot be read ({_first_line(error)}); mend it or remove the column"
                raise UserError(f"{path}:{number}: {told}") from None


def _check_names(path: Path, fields: list[pa.Field]) -> None:
    """Raises UserError where two columns, or two fields of a column, have one name."""
    if (name := given_twice(field.name for field in fields)) is not None:
        raise UserError(f"{path}: column '{name}' is there twice; rename or remove one")
    for field in fields:
        _check_names(path, [field.type.field(i) for i in range(field.type.num_fields)])


def _saved(folder: Path, columns: frozenset[str]) -> Numbered:
    from datasets import load_from_disk

    try:
        rows = load_from_disk(str(folder))
    except Exception as error:  # pyarrow's, json's and datasets' own errors, by what is wrong
        raise UserError(f"{folder}: not a readable save_to_disk folder ({_first_line(error)})") from None
    yield from _of_dataset(rows, str(folder), columns)


def _hub(name: str, split: str, subset: str | None, columns: frozenset[str]) -> Numbered:
    from datasets import load_dataset

    source = name if subset is None else f"{name}:{subset}"
    try:
        rows = load_dataset(name, subset, split=split)
    except Exception as error:  # network, permissions, unknown names: each library below has its own
        raise disk_error(error) or UserError(
            f"{source}: neither a local path nor loadable from the Hub, split '{split}' "
            f"({type(error).__name__}: {_first_line(error)}); a local copy can stand in: its path, or RECIPE:PATH"
        ) from None
    yield from _of_dataset(rows, source, columns)


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
