"""Records that a test changes, as the user's own program would have written them."""

from pathlib import Path
from typing import Any

from isdaa.files import write_json
from isdaa.ownership import sealed


def write_own(path: Path, content: dict[str, Any]) -> None:
    """Write `run.json`, `isdaa.json` or a manifest with the user's digest."""
    write_json(path, sealed(path.name, content))
