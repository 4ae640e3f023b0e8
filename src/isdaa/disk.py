"""Room on disk: what a disk that is full, or may not be written to, comes to in words, and whether there is enough of it.

Every library has an error of its own for a full disk (OSError, SafetensorError, RuntimeError of torch.save, pyarrow's,
tokenizers' plain Exception); here all of them become the one line that a user reads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from isdaa.errors import UserError

FULL = 1 << 20  # bytes; a disk with less is full
# What systems and libraries say of a write that was refused -> the error number that they mean.
SAID = {
    r"No space left on device|\b(?:os error|errno) 28\b|disk is full|No usable temporary directory": errno.ENOSPC,
    r"Disk quota exceeded|\b(?:os error|errno) 122\b": errno.EDQUOT,
    r"File too large|\b(?:os error|errno) 27\b": errno.EFBIG,
    r"Read-only file system|\b(?:os error|errno) 30\b": errno.EROFS,
    # torch.save keeps the number to itself.
    r"PytorchStreamWriter failed|unexpected pos \d+ vs|iostream error|basic_ios::clear": 0,
}
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
MAY_NOT = (errno.EACCES, errno.EPERM)


def in_units(size: float) -> str:
    """Bytes as people write them: `412 kB`, `3.4 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if size >= 10 or unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def standing(path: str | Path) -> Path:
    """The path, or of its parents the nearest that exists."""
    path = Path(path).absolute()
    return next((place for place in (path, *path.parents) if place.exists()), Path("/"))


def free(path: str | Path) -> int | None:
    """Bytes that this user may still write where `path` is, or will be; None where the file system does not say."""
    try:
        found = shutil.disk_usage(standing(path))
    except OSError:
        return None
    return found.free if found.total else None


def disk_error(error: BaseException | None, path: str | Path | None = None, need: float | None = None) -> UserError | None:
    """One line on a write that was refused for want of room or of permission; None for any other error.

    path: what was being written, where the error itself does not say. need: bytes of it.
    """
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        number = _number(error, known_place=path is not None)
        if number is not None and not isinstance(error, UserError):
            return _line(number, _place(error, number, path), need, error)
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def writing(path: str | Path, need: float | None = None) -> Iterator[None]:
    """What is written inside is, or belongs to, `path`, of about `need` bytes. Raises UserError where the disk refuses it."""
    try:
        yield
    except Exception as error:
        found = None if isinstance(error, UserError) else disk_error(error, path, need)
        if found is None:
            raise
        raise found from error


def check_room(what: str, needs: Mapping[Path, float], how: str, parts: str = "") -> None:
    """Raises UserError where a disk has less room than `what` needs there.

    needs: bytes by folder; those of one file system count together. parts: what they are made of. how: to need less.
    """
    together: dict[int, tuple[Path, float]] = {}
    for folder, size in needs.items():
        device = standing(folder).stat().st_dev
        first, so_far = together.get(device, (folder, 0.0))
        together[device] = first, so_far + size
    for folder, size in together.values():
        room = free(folder)
        if room is not None and room < size:
            made = f" ({parts})" if parts else ""
            raise UserError(
                f"{folder}: {what} needs about {in_units(size)} there{made}, {in_units(room)} are free: "
                f"{in_units(size - room)} are missing; make room, {how}"
            )


def _number(error: BaseException, known_place: bool) -> int | None:
    """The error number that an error means, 0 where it hides it, None where it is no refused write."""
    number = getattr(error, "errno", None) if isinstance(error, OSError) else None
    if number in REFUSALS or (known_place and number in MAY_NOT):
        return number
    if isinstance(error, (OSError, RuntimeError, ValueError)) or type(error) is Exception or "afetensor" in type(error).__name__:
        return next((number for said, number in SAID.items() if re.search(said, str(error), re.IGNORECASE)), None)
    return None


def _place(error: BaseException, number: int, path: str | Path | None) -> str | Path | None:
    """What could not be written: `path`, unless the error names another place."""
    named = getattr(error, "filename", None)
    if not isinstance(named, (str, bytes)):
        return path
    named = os.fsdecode(named)
    beside = path is not None and Path(named).absolute().is_relative_to(Path(path).absolute().parent)
    return path if beside or (path is not None and number not in MAY_NOT) else named


def _line(number: int, path: str | Path | None, need: float | None, error: BaseException) -> UserError:
    room = None if path is None else free(path)
    if path is None or (number in (0, errno.ENOSPC) and room is not None and room >= max(FULL, need or 0)):
        # It was written elsewhere: to a temporary file, or to a library's own cache.
        path = _full_place() or path
        room = None if path is None else free(path)
    if number == 0:
        number = errno.ENOSPC if room is not None and room < max(FULL, need or 0) else errno.EIO
    where = "the disk" if path is None else str(path)
    if number in (errno.EROFS, *MAY_NOT):
        return UserError(f"{where}: {os.strerror(number)}; mend that, or name another folder")
    if number == errno.EIO:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return UserError(f"{where}: could not be written ({reason}); when that is mended, the same command goes on")
    wanted = f", it needs {in_units(need)}" if need else ""
    left = f", {in_units(room)} are free there" if room is not None else ""
    if number == errno.EFBIG:
        limit = "its file system, or a limit of this session (ulimit -f), allows no larger one"
        return UserError(f"{where}: {os.strerror(number)}{wanted}: {limit}; mend that, and the same command goes on")
    if number == errno.ENOSPC and path is not None and _no_more_files(path):
        left = ", its file system holds as many files as it can"
    return UserError(f"{where}: {os.strerror(number)}{wanted}{left}; make room, and the same command goes on")


def _no_more_files(path: str | Path) -> bool:
    found = os.statvfs(standing(path))
    return found.f_files > 0 and found.f_favail == 0


def _full_place() -> Path | None:
    """A folder for temporary files or of a library's cache whose disk is full."""
    names = ("TMPDIR", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR")
    given = [os.environ.get(name) for name in names]
    usual = [tempfile.tempdir, "/tmp", str(Path.home() / ".cache"), os.getcwd()]
    for place in (*given, *usual):
        if place and (room := free(place)) is not None and room < FULL:
            return Path(place)
    return None
