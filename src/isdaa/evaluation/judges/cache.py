"""A judge's replies on disk: one JSON line each, only ever appended, found again by what was asked.

Several processes may share the file. A line is written under a lock and synced before the reply counts; a line that a
kill tore is passed over, and the next writer begins a line of its own. While a process asks a question it holds a claim
on it, which the system takes back when the process dies, so that two processes on the same work share it out.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from isdaa.disk import disk_error
from isdaa.errors import UserError
from isdaa.evaluation.judges.types import Reply, request_key
from isdaa.files import own_file

log = logging.getLogger(__name__)

BEGINNING = b'{"judge_reply": '  # of every line


class ReplyCache:
    """Replies by key, in memory and in the file at `path`; with None, in memory alone.

    Raises UserError where the path cannot be read or is another program's file.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = Path(path) if path is not None else None
        self._replies: dict[str, tuple[int, Reply]] = {}  # the limit that was wanted, and the reply
        self.learnt: dict[str, list[str]] = {}  # address of an endpoint -> what it does not take
        self._read_to = 0  # bytes of the file that are in memory
        self._claims: BinaryIO | None = None
        self._load()

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str, limit: int) -> Reply | None:
        """The reply of that key, also where another process wrote it a moment ago; marked as cached.

        One that ended at its own limit counts where `limit` is no higher.
        """
        if not self._serves(key, limit):
            self._refresh()
        return replace(self._replies[key][1], cached=True) if self._serves(key, limit) else None

    def _serves(self, key: str, limit: int) -> bool:
        """Whether the reply would be no other at that limit."""
        if key not in self._replies:
            return False
        given, reply = self._replies[key]
        return reply.finish_reason != "length" or limit <= given

    def add(self, request: dict[str, Any], reply: Reply, place: str = "", ways: Collection[str] = ()) -> None:
        """Write and sync a reply, with the request as it was meant. place: the endpoint; ways: what that does not take."""
        key = request_key(request)
        if self.path is not None:
            answer = {name: value for name, value in asdict(reply).items() if name != "cached"}
            record = {"judge_reply": key, "request": request, "reply": answer, "at": datetime.now(UTC).isoformat()}
            record |= {"endpoint": place, "ways": sorted(ways)}
            self._append((json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="backslashreplace"))
        self._keep(request, reply)

    def _keep(self, request: dict[str, Any], reply: Reply) -> None:
        """Of two replies to the same question the later counts, but no cut one for one that ended by itself."""
        key, limit = request_key(request), int(request["max_tokens"])
        if reply.finish_reason != "length" or not self._serves(key, limit):
            self._replies[key] = limit, reply

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Whether this process may ask that question now; False while another process is asking it."""
        taken = self._lock(key, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield taken
        finally:
            if taken:
                self._lock(key, fcntl.LOCK_UN)

    def _lock(self, key: str, operation: int) -> bool:
        if self.path is None:
            return True
        if self._claims is None:
            self._claims = open(own_file(self.path.with_name(f".{self.path.name}.claims")), "ab")  # noqa: SIM115 - held for life
        try:
            fcntl.lockf(self._claims, operation, 1, int(key[:15], 16))
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks: at worst two processes ask the same
            return True
        return True

    def _load(self) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                file.seek(0)
                beginning = file.read(len(BEGINNING))
        except OSError as error:
            raise UserError(f"{self.path}: the judge's replies cannot be kept there ({error.strerror}); name a file") from None
        if not BEGINNING.startswith(beginning):  # a torn first line may be shorter
            raise UserError(f"{self.path}: holds something else than a judge's replies; choose another file for them")
        broken = self._refresh()
        if broken:
            log.warning("%s: passed over %d lines that are no whole reply (a kill leaves at most one)", self.path, broken)

    def _refresh(self) -> int:
        """Read what was appended since; returns how many whole lines are no reply."""
        if self.path is None:
            return 0
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self._read_to:  # another file by the same name
            self._replies, self._read_to = {}, 0
        if size == self._read_to:
            return 0
        with open(self.path, "rb") as file:
            file.seek(self._read_to)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._read_to += end
        broken = 0
        for line in data[:end].split(b"\n"):
            if line.strip() and not self._read(line):
                broken += 1
        return broken

    def _read(self, line: bytes) -> bool:
        """Whether a line is a reply. Its key comes from its request: earlier versions had the limit in theirs."""
        try:
            record = json.loads(line)
            if not isinstance(record["reply"]["text"], str) or not isinstance(record["judge_reply"], str):
                return False
            self._keep(record["request"], Reply(**record["reply"]))
            if record.get("endpoint"):
                self.learnt[record["endpoint"]] = list(record["ways"])
        except (ValueError, KeyError, TypeError):
            return False
        return True

    def _append(self, line: bytes) -> None:
        assert self.path is not None
        try:
            with open(self.path, "a+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else b"\n" + line
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(error, self.path, len(line)) or UserError(
                f"{self.path}: a reply could not be written ({error.strerror}); mend it and run the same command again"
            ) from None
