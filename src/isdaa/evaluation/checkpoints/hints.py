"""What a folder that another program wrote knows of its own origin: only ever a suggestion of what to type."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from isdaa.errors import UserError
from isdaa.foreign import read_object

CARD = "README.md"
CARD_HEAD = 100_000  # characters of a card within which its settings stand


def base_hint(paths: Sequence[str]) -> tuple[str, str] | None:
    """(model that the models at `paths` were trained from, file and key that name it); None where none does."""
    for file, key in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "_name_or_path")):
        for folder in _folders(paths):
            with suppress(UserError, OSError):
                found = read_object(folder / file).get(key)
                if isinstance(found, str) and found and Path(found).resolve() not in {one.resolve() for one in _folders(paths)}:
                    here = next((str(p) for p in (Path(found), folder / found, folder.parent / found) if p.is_dir()), found)
                    return os.path.normpath(here) if here != found else found, f"{folder / file} ({key})"
    return _of_card(paths, "base_model")


def data_hint(paths: Sequence[str]) -> tuple[str, str] | None:
    """(data set that the models were trained on, card and key that name it); None where no card does."""
    return _of_card(paths, "datasets")


def _of_card(paths: Sequence[str], key: str) -> tuple[str, str] | None:
    for folder in _folders(paths):
        found = _settings(folder / CARD).get(key)
        for name in found if isinstance(found, list) else [found]:
            if isinstance(name, str) and name:
                return name, f"{folder / CARD} ({key})"
    return None


def _folders(paths: Sequence[str]) -> list[Path]:
    """The models' folders, each after the output folder around it: a card stands there."""
    folders = [Path(path) for path in paths]
    return list(
        dict.fromkeys(f for folder in folders for f in ([folder.parent] * folder.name.startswith("checkpoint") + [folder]))
    )


def _settings(card: Path) -> dict[str, Any]:
    """The YAML that a model's card begins with."""
    import yaml

    try:
        with card.open(encoding="utf-8") as file:
            _, begin, rest = file.read(CARD_HEAD).partition("---\n")
        found = yaml.safe_load(rest.partition("\n---")[0]) if begin else None
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
