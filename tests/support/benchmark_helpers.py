"""What the benchmarks' tests share: replies, files of rows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Said:
    """A judge's reply."""

    text: str
    first_token_logprobs: Mapping[str, float] | None = None
    finish_reason: str | None = "stop"
    thinking: str = ""


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
