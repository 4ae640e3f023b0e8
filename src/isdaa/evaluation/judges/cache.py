"""A judge's replies on disk: one JSON line each, only ever appended, found again by what was asked.

A line is written and synced before the reply counts. The file is read once, when the cache is made; a line that a kill tore is
passed over. Processes that use one file at the same time lose no reply, but may ask the same question twice.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from isdaa.errors import UserError
from isdaa.evaluation.judges.types import Reply, request_key
from isdaa.files import append_jsonl, own_file

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
        if self.path is not None:
            self._load(self.path)

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str, limit: int) -> Reply | None:
        """The reply of that key, marked as cached; one that ended at its own limit counts where `limit` is no higher."""
        given, reply = self._replies.get(key, (0, None))
        if reply is None or (reply.finish_reason == "length" and limit > given):
            return None
        return replace(reply, cached=True)

    def add(self, request: dict[str, Any], reply: Reply, place: str = "", ways: Collection[str] = ()) -> None:
        """Write and sync a reply, with the request as it was meant. place: the endpoint; ways: what that does not take."""
        if self.path is not None:
            answer = {name: value for name, value in asdict(reply).items() if name != "cached"}
            record = {"judge_reply": request_key(request), "request": request, "reply": answer}
            record |= {"at": datetime.now(UTC).isoformat(), "endpoint": place, "ways": sorted(ways)}
            append_jsonl(self.path, [record])
        self._keep(request, reply)

    def _keep(self, request: dict[str, Any], reply: Reply) -> None:
        """Of two replies to the same question the later counts, but no cut one for one that ended by itself."""
        key, limit = request_key(request), int(request["max_tokens"])
        if reply.finish_reason != "length" or self.get(key, limit) is None:
            self._replies[key] = limit, reply

    def _load(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(own_file(path), "rb") as file:  # a place that cannot be written is known before any request
                data = file.read()
        except OSError as error:
            raise UserError(f"{path}: the judge's replies cannot be kept there ({error.strerror}); name a file") from None
        if not BEGINNING.startswith(data[: len(BEGINNING)]):  # a torn first line may be shorter
            raise UserError(f"{path}: holds something else than a judge's replies; choose another file for them")
        lines = data[: data.rfind(b"\n") + 1].split(b"\n")
        broken = sum(bool(line.strip()) and not self._read(line) for line in lines)
        if broken:
            log.warning("%s: passed over %d lines that are no whole reply (a kill leaves at most one)", path, broken)

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
