"""Files that are either whole or absent: atomic writes, text in any Unicode encoding, JSON Lines, content digests."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import errno
import fcntl
import glob
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import shutil
import stat
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from isdaa.disk import writing
from isdaa.errors import UserError

DAY = 24 * 60 * 60  # seconds
UTF8 = "utf-8-sig"  # with a byte order mark or without
MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # beginnings of cells that a spreadsheet computes
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


def own_file(path: str | Path) -> int:
    """A descriptor, to read and to append, of a file that this program writes itself; it is made where it is missing.

    Nothing is emptied. Raises UserError where a symbolic link, which may lead to anybody's file, or no plain file stands there.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    wrong = UserError(f"{path}: no plain file but a link, a folder or a device, which isdaa does not write to; remove it")
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise wrong from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise wrong
    return descriptor


def usable(text: str) -> str:
    """A path's or a name's text. Raises ValueError where it is empty, holds a NUL, or is no Unicode that a record can keep."""
    if not text.strip():
        raise ValueError(f"expected some text, got {text!r}; write null for none")
    if "\0" in text:
        raise ValueError("holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"not valid UTF-8: {text!r}; rename the file or folder") from None
    return text


def at_home(path: str) -> str:
    """`~` and `~user` in front, for the folder that they stand for; variables such as $HOME are the shell's, and stay.

    Raises ValueError for what is not `usable`, and for a user that there is not.
    """
    found = os.path.expanduser(usable(path))
    if found.startswith("~"):
        raise ValueError(f"{path}: no such user; write ./{path} for what is called so here")
    return found


def located(path: str | Path) -> str:
    """`at_home` of a path that a caller gave. Raises UserError."""
    try:
        return at_home(str(path))
    except ValueError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


@contextlib.contextmanager
def locked_file(path: Path, taken: str) -> Iterator[None]:
    """While no other process has the lock at `path`. Raises UserError, which says `taken`, where one has it."""
    with open(own_file(path), "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(taken) from None
        yield


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entry list, so that a rename inside it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file aside, sync it and rename it: a reader sees the old content or the new, never a part."""
    # Half of a surrogate pair, which UTF-8 cannot hold, becomes `\ud800`: in JSON the same text.
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    with writing(path, len(data)):
        _write_atomically(Path(path), data)


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        os.fchmod(descriptor, 0o666 & ~current_umask())
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def current_umask() -> int:
    """The process's umask; reading it means setting it twice."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_folder_atomically(folder: str | Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a folder aside, sync every file of it, then rename it into place.

    An existing folder of that name is replaced: moved away first, removed last. A kill between the two renames leaves no
    folder of that name, never a part of one. Where `fill` fails, nothing is left of its work. Several processes may write
    the same folder at once: each writes a folder of its own aside, and the last to rename wins.
    """
    with writing(folder):
        _write_folder_atomically(Path(folder), fill)


def _write_folder_atomically(folder: Path, fill: Callable[[Path], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".writing-{folder.name}-"))
    try:
        aside.chmod(0o777 & ~current_umask())
        fill(aside)
        sync_tree(aside)
        _rename_over(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def _rename_over(aside: Path, folder: Path) -> None:
    """Rename `aside` to `folder`, whatever stands there now or is put there meanwhile."""
    old = folder.parent / aside.name.replace(".writing-", ".old-", 1)
    while True:
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, old)
        try:
            os.rename(aside, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
        finally:
            remove_tree(old)


def remove_tree(path: Path) -> None:
    """Remove a folder with all that is in it, as far as can be; of a symbolic link, the link alone."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """What kills left aside. Only what is a day old: a younger one may be another process's that writes now."""
    for name in (".writing", ".old"):
        for left in folder.parent.glob(f"{name}-{glob.escape(folder.name)}-????????"):
            with contextlib.suppress(FileNotFoundError):
                if left.lstat().st_mtime < time.time() - DAY:
                    remove_tree(left)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(root))


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically; NaN and infinities are refused, since no other tool reads them."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n")


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
                text = (line if isinstance(line, str) else line.decode()).removeprefix("\ufeff")
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


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A CSV file. A text that a spreadsheet would take for a formula has an apostrophe in front; numbers are never touched."""
    lines = []
    for row in (header, *rows):
        out = io.StringIO(newline="")
        # A writer quotes what its own end of a line consists of: a CR in a name, too.
        csv.writer(out).writerow([f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULAS) else cell for cell in row])
        lines.append(out.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)


def write_jsonl(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a JSON Lines file atomically."""
    write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def append_jsonl(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """Append records and sync. Where they cannot be written whole, none of them is, and half a line that a kill left at the end
    goes: `whole_jsonl` reads past one, too."""
    path = Path(path)
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode(errors="backslashreplace")
    with writing(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(own_file(path), "r+b", buffering=0) as file:
            end = _end_of_lines(file)
            file.truncate(end)
            try:
                left = memoryview(data)
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise


def _end_of_lines(file: IO[bytes]) -> int:
    """Where the last whole line of a file ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - (1 << 16))
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


def whole_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Records of a file that this program appends to; a half line that a kill left at the end is cut off the file."""
    path = Path(path)
    if not path.exists():
        return []
    check_file(path)
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end != len(data):
        write_atomically(path, data[:end])
    return read_jsonl(path)


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


def digest(value: Any) -> str:
    """A short hexadecimal SHA-256 of bytes, or of any JSON-able value in canonical form."""
    data = (
        value
        if isinstance(value, bytes)
        else json.dumps(value, sort_keys=True, ensure_ascii=False).encode(errors="backslashreplace")
    )
    return hashlib.sha256(data).hexdigest()[:24]


def file_digest(path: str | Path) -> str:
    """`digest` of a file's content, read in pieces."""
    check_file(path)
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            sha.update(piece)
    return sha.hexdigest()[:24]
