"""Files that isdaa writes: whole or absent, appended line by line, locked; paths as people write them; content digests."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import glob
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from isdaa.disk import writing
from isdaa.errors import UserError
from isdaa.foreign import ROW, check_file, read_jsonl

DAY = 24 * 60 * 60  # seconds
FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # beginnings of cells that a spreadsheet computes


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
        raise ValueError(f"expected some text, got {text!r}")
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


def share(files: Iterable[Path]) -> None:
    """Let those read the files whom the umask lets: safetensors writes files that their owner alone can read."""
    mode = 0o666 & ~current_umask()
    for path in files:
        path.chmod(path.stat().st_mode | mode)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, which this program wrote, to disk, with the umask's modes."""
    for root, _, names in os.walk(folder):
        share(Path(root, name) for name in names)
        for name in names:
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(root))


def clean(text: str, most: int | None = None) -> str:
    """What a model or a judge wrote, as every file, page and endpoint can hold it; it was paid for, so it is not refused.

    A NUL, and half of a surrogate pair whose other half is not beside it, become U+FFFD; two halves are the character that
    they are of. Of more than `most` characters, those in the middle are left out.
    """
    if most is not None and len(text) > most:
        text = f"{text[: most // 2]} … {text[len(text) - most // 2 :]}"
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").replace("\0", "\ufffd")


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """The same file under another name, or a copy of it on a file system without hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically; NaN and infinities are refused, since no other tool reads them."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n")


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
    """Write a JSON Lines file atomically; NaN and infinities are refused, as by `write_json`, and lines too long to be read."""
    write_atomically(path, b"".join(_line(path, record) for record in records))


def _line(path: str | Path, record: dict[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    line = text.encode(errors="backslashreplace")
    if len(line) > ROW:
        raise UserError(f"{path}: a record of more than {ROW >> 20} MiB, which nobody could read; shorten the texts in it")
    return line


def append_jsonl(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """Append records and sync; refuses what `write_jsonl` does. Where they cannot be written whole, none of them is, and half a
    line that a kill left at the end goes: `whole_jsonl` reads past one, too."""
    path = Path(path)
    data = b"".join(_line(path, record) for record in records)
    with writing(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(own_file(path), "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
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
