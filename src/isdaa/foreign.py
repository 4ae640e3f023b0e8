"""What is read from outside: whatever is wrong with it becomes one line, with file and row or key, before it goes any further."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import errno
import gzip
import io
import json
import lzma
import math
import os
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from isdaa.errors import UserError

UTF8 = "utf-8-sig"  # with a byte order mark or without
MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
ROW = 64 << 20  # bytes of a row, at most
DEPTH = 100  # lists and objects inside each other, at most
Name = TypeVar("Name", bound=Hashable)


@contextlib.contextmanager
def no_panics() -> Iterator[None]:
    """Where a library written in Rust fails, what it raises is no `Exception`; here it is a RuntimeError."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


@contextlib.contextmanager
def readable(where: object, what: str = "cannot be read", advice: str = "") -> Iterator[None]:
    """Whatever goes wrong inside with what is read from outside is one line: `where: what (why); advice`.

    For code that takes foreign data apart, where each wrong value is another error of Python's or of a library's. UserErrors and
    a full disk pass.
    """
    try:
        with no_panics():
            yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EPIPE):
            raise
        raise UserError(f"{where}: {what} ({why(error)}){f'; {advice}' if advice else ''}") from error


def why(error: BaseException) -> str:
    """What an error of Python's or of a library's says, in a few words."""
    text = " ".join(str(error).split())
    if isinstance(error, RecursionError):
        return "nested too deep"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if "integer string conversion" in text:
        return "a number of more than 4300 digits"
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if "\n" in error.doc else ""  # of a file; a row is said by its own
        return f"{error.msg}, {line}column {error.colno}"
    if isinstance(error, KeyError):
        return f"it lacks {text}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return text or type(error).__name__


def check_file(path: str | Path) -> None:
    """Raises UserError where there is something, and no plain file: reading a pipe, a socket or a device may never end.

    Pipes of the shell, `<(…)` and /dev/stdin, are files enough.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # a loop of links, too long a name, a null character
        raise UserError(f"{path}: {why(error)}") from None
    if stat.S_ISREG(mode) or (stat.S_ISFIFO(mode) and str(path).startswith("/dev/")):
        return
    if stat.S_ISDIR(mode):
        raise UserError(f"{path}: {os.strerror(errno.EISDIR)}")
    kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    raise UserError(f"{path}: {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file")


def check_limits(value: Any, where: str, size: float = ROW) -> None:
    """Raises UserError for a row of more than `size` bytes, or nested deeper than `DEPTH`: no later step could take it apart."""
    found, level, depth = 0, [value], 0
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                found += sum(len(key) for key in item if isinstance(key, str))
                below += item.values()
            elif isinstance(item, list | tuple):
                numbers = bool(item) and isinstance(item[0], int | float)
                found += 8 * len(item) if numbers else 0
                below += [inner for inner in item if not isinstance(inner, int | float)] if numbers else item
            elif isinstance(item, str | bytes):
                found += len(item)
        depth += 1
        if found > size:
            raise UserError(f"{where}: more than {ROW >> 20} MiB in one row; divide or remove it")
        if depth > DEPTH and any(isinstance(item, Mapping | list | tuple) for item in level):
            raise UserError(f"{where}: lists and objects are nested more than {DEPTH} deep; mend or remove it")
        level = below


def read_json(path: str | Path, finite: bool = True) -> Any:
    """Read a JSON file; one that is missing or broken, or that nests too deep, is a `UserError` naming the file.

    finite: NaN and infinities are no numbers; other programs write them.
    """
    check_file(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (UnicodeDecodeError, MemoryError) as error:
        raise UserError(f"{path}: not valid JSON ({why(error)})") from None
    return parse_json(text, path, finite)


def parse_json(text: str, where: object, finite: bool = True) -> Any:
    """The value of a JSON text. Raises UserError for what is none, and for a key that an object has twice; as `read_json`."""
    decoder = JsonDecoder(_no_number if finite else None)
    try:
        value = decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({why(error)})") from None
    if decoder.repeated:
        raise UserError(f"{where}: key '{decoder.repeated[0][1]}' is given twice in one object; remove one")
    check_limits(value, str(where), math.inf)
    return value


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def check_shape(value: Any, shape: Any, where: str, key: str = "") -> None:
    """Raises UserError, `where: key: expected …`, where a value of JSON does not have the shape that a record of isdaa has.

    shape: a type (`float` takes whole numbers, too, and no number is beyond 1e30, whole ones not beyond 2⁵³); None; a tuple of
    shapes, any of which will do; `[shape]`, a list of it, `[shape, ...]` one that is not empty; a dictionary of keys, of which
    those that end with `?` may be missing, and of which `*` stands for all others.
    """
    if isinstance(shape, tuple):
        shape = next((one for one in shape if _fits(value, one)), shape[0])
    if not _fits(value, shape):
        found = f"{value!r:.60}" if isinstance(value, int | float) else _WORDS.get(type(value), "null")
        raise UserError(f"{where}: {f'{key}: ' if key else ''}expected {_WORDS.get(_kind(shape), 'null')}, found {found}")
    if isinstance(shape, list):
        if len(shape) > 1 and not value:
            raise UserError(f"{where}: {key}: an empty list")
        for number, item in enumerate(value):
            if not (type(item) is int is shape[0] and abs(item) <= 2**53):  # token ids, by thousands
                check_shape(item, shape[0], where, f"{key}.{number}".lstrip("."))
    elif isinstance(shape, dict):
        for name, inner in shape.items():
            bare = name.rstrip("?")
            if bare in value:
                check_shape(value[bare], inner, where, f"{key}.{bare}".lstrip("."))
            elif bare == name and name != "*":
                raise UserError(f"{where}: lacks '{f'{key}.{name}'.lstrip('.')}'")
        if "*" in shape:
            for name, item in value.items():
                check_shape(item, shape["*"], where, f"{key}.{name}".lstrip("."))


_WORDS = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _kind(shape: Any) -> Any:
    return shape if shape is None or isinstance(shape, type) else type(shape)


def _fits(value: Any, shape: Any) -> bool:
    kind = _kind(shape)
    if kind is None:
        return value is None
    if kind is float:
        return type(value) in (int, float) and abs(value) <= 1e30
    if kind is int:
        return type(value) is int and abs(value) <= 2**53
    return kind is object or type(value) is kind


def read_object(path: str | Path) -> dict[str, Any]:
    """`read_json` of a file that must hold an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def given_twice(names: Iterable[Name]) -> Name | None:
    """The first of the names that comes again."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


class JsonDecoder(json.JSONDecoder):
    """Python's, which takes the last of a key's values in silence; here `repeated` lists such objects, each with the key."""

    def __init__(self, constant: Callable[[str], Any] | None = None) -> None:
        super().__init__(object_pairs_hook=self._object, parse_constant=constant)
        self.repeated: list[tuple[dict[str, Any], str]] = []

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            self.repeated.append((record, str(given_twice(key for key, _ in pairs))))
        return record


@contextlib.contextmanager
def opened_text(path: str | Path) -> Iterator[tuple[IO[bytes], str]]:
    """A text file's bytes, unpacked where its name ends in .gz, .bz2 or .xz, and its encoding, by the byte order mark.

    Raises UserError with the file's name for whatever is wrong with its bytes, also while the caller reads them.
    """
    suffix = Path(path).suffix.lower()
    check_file(path)
    try:
        with PACKED.get(suffix, open)(path, "rb") as file:
            head = file.read(4)
            file.seek(0)
            encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), UTF8)
            if encoding == UTF8 and b"\0" in head:
                raise UserError(f"{path}: not valid UTF-8 text (UTF-16 without its byte order mark?); save it as UTF-8")
            yield file, encoding
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid {error.encoding.upper()} ({error.reason}); save it as UTF-8") from None
    except MemoryError as error:
        raise UserError(f"{path}: {why(error)}") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{path}: {error.strerror}") from None
        raise UserError(f"{path}: not a whole {suffix} file ({error}); pack or download it again") from None


def iterate_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(line number from 1, record)`; a broken line is a `UserError` of the form `file:line: …`."""
    decoder = JsonDecoder()
    with opened_text(path) as (file, encoding):
        # UTF-8 is decoded line by line, so that the line of a wrong byte is known.
        lines: IO[Any] = file if encoding == UTF8 else io.TextIOWrapper(file, encoding, newline="\n")
        for number, line in enumerate(iter(partial(lines.readline, ROW + 1), lines.read(0)), start=1):
            if len(line) > ROW:
                raise UserError(f"{path}:{number}: more than {ROW >> 20} MiB in one row; divide or remove it")
            try:
                text = (line if isinstance(line, str) else line.decode()).removeprefix("\ufeff").rstrip("\r\n")
                if not text.strip():
                    continue
                record = decoder.decode(text)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}:{number}: not valid JSON, for it is not UTF-8 ({error.reason}); save the file as UTF-8"
                ) from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not valid JSON ({why(error)}); mend or remove the line") from None
            if decoder.repeated:
                raise UserError(f"{path}:{number}: key '{decoder.repeated[0][1]}' is given twice in one object; remove one")
            if not isinstance(record, dict):
                raise UserError(f"{path}:{number}: expected a JSON object, found {type(record).__name__}")
            yield number, record


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Every record of a JSON Lines file."""
    return [record for _, record in iterate_jsonl(path)]


def readable_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The whole records of a file that another process may be appending to; nothing is written."""
    path = Path(path)
    if not path.exists():
        return []
    check_file(path)
    data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].split(b"\n")
    try:
        found = {n: parse_json(line.decode(), f"{path}:{n}") for n, line in enumerate(lines, start=1) if line.strip()}
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 ({error.reason}); mend the line or move the file away") from None
    for number, record in found.items():
        check_shape(record, {}, f"{path}:{number}")
    return list(found.values())
