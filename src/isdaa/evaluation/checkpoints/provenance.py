"""What a record beside a model may decide: in the user's own runs all, elsewhere only what lies in the same folder.

Whose code may run no record ever says: that comes from the command line or the configuration alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from isdaa.errors import UserError
from isdaa.foreign import read_json
from isdaa.ownership import completed, is_own
from isdaa.record import GOLD, NAME, PLACES, RUN, ModelRecord, path_of, read_record, run_folder

OPTIONS = {"reference": "reference", "evaluation": "data", "scorer": "scorer"}  # a record's place -> the option that gives it


@dataclass(frozen=True)
class Records:
    """The records beside some models, without what they may not decide. outside: of each model, such places by option."""

    by_path: dict[str, ModelRecord | None]
    outside: dict[str, dict[str, str]]

    def first(self) -> ModelRecord | None:
        """The first record there is."""
        return next((record for record in self.by_path.values() if record is not None), None)

    def require(self, wanted: Mapping[str, str]) -> None:
        """Raises UserError where others' records name what is wanted outside their folders. wanted: option -> the command's."""
        kept = {path: {k: v for k, v in places.items() if k in wanted} for path, places in self.outside.items()}
        path, named = next(((path, places) for path, places in kept.items() if places), ("", {}))
        if not named:
            return
        options = {f"--{wanted[option]}": place for places in kept.values() for option, place in places.items()}
        what = " and ".join(f"{option} {place}" for option, place in named.items())
        call = ["isdaa", "evaluate", "--model_path", *self.by_path]
        raise UserError(
            f"{path}: not a run of yours on this machine, and its record names {what}, outside its folder; take the run over as "
            "your own with --adopt, or, if you trust what it names, type:",
            completed(call, options),
        )

    def told(self, given: Sequence[str]) -> list[str]:
        """What is taken from records, one line a run. given: options that the user gave."""
        lines: dict[str, None] = {}
        for path, record in self.by_path.items():
            if record is None:
                continue
            found = {option: getattr(record, field) for field, option in OPTIONS.items() if option not in given}
            what = ", ".join(f"{option} {place}" for option, place in found.items() if place is not None)
            whose = "your run's record" if record.own else "the record of a run that is not yours"
            if what:
                lines[f"{run_folder(path) or path}: {what} (from {whose})"] = None
        return list(lines)


def records_of(paths: Sequence[str]) -> Records:
    """The records beside some models, by path. Raises UserError for one that cannot be read."""
    by_path: dict[str, ModelRecord | None] = {}
    outside: dict[str, dict[str, str]] = {}
    for path in paths:
        record = by_path[path] = read_record(path)
        if record is None:
            continue
        root = _root(path)
        own = record.own and (root == Path(path) or is_own(RUN, read_json(root / RUN)))
        far = {} if own else {f: str(v) for f in PLACES if (v := getattr(record, f)) is not None and not _within(root, str(v))}
        nowhere: dict[str, Any] = dict.fromkeys(far)
        by_path[path] = replace(record, own=own, **nowhere)
        outside[path] = {OPTIONS[field]: place for field, place in far.items()}
    return Records(by_path, outside)


def check_stays(folder: Path) -> None:
    """Raises UserError where what is written into a folder of others' run or model would land elsewhere, behind a link."""
    root = folder.parent
    if any((root / name).is_file() and is_own(name, read_json(root / name)) for name in (RUN, NAME)):
        return
    link = next((path for path in (folder, *folder.rglob("*")) if path.is_symlink() and path.is_dir()), None)
    if link is not None:
        raise UserError(
            f"{link}: a symbolic link to a folder, in what is not yours: files would be written behind it; remove it, or say "
            "where to write with --output"
        )


def _root(path: str) -> Path:
    """The folder that a model came in: its run's, where it lies in one."""
    run = run_folder(path)
    return run if run is not None and (run / RUN).is_file() else Path(path)


def _within(root: Path, place: str) -> bool:
    """Whether a place is there, in the folder, or a word that is no place: the embedded world's. A name of the Hub is neither."""
    if place in (GOLD, "none") or place.startswith("world:"):
        return True
    path = path_of(place)
    return path is not None and root.resolve() in path.resolve().parents
