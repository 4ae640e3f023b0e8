"""Checkpoints that are whole or not there: written aside, listed in a manifest, synced, renamed, checked before use."""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

from isdaa.disk import writing
from isdaa.errors import UserError
from isdaa.files import remove_tree, sync_folder, sync_tree, write_json
from isdaa.foreign import read_json
from isdaa.manifest import MANIFEST, defect, entry_of, sampled_digest, write_manifest
from isdaa.models.finite_weights import files_not_finite, listed
from isdaa.ownership import is_own, sealed
from isdaa.record import NAME as RECORD
from isdaa.record import RUN, run_folder

__all__ = [
    "MANIFEST",
    "adopt",
    "check_own",
    "check_resumable",
    "checkpoints",
    "complete_checkpoints",
    "defect",
    "named",
    "newest_complete_checkpoint",
    "rotate",
    "sampled_digest",
    "step_of",
    "unusable",
    "write_checkpoint",
    "write_manifest",
]
logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
ASIDE = ".writing-"
OLD = ".old-"
TRAINER_STATE = "trainer_state.json"


def check_own(folder: str | Path) -> None:
    """Raises UserError where optimiser and random states of a checkpoint are not of this user's own run."""
    path = Path(folder) / MANIFEST
    if not path.is_file() or not is_own(MANIFEST, read_json(path)):
        raise UserError(
            f"{folder}: not a checkpoint of yours on this machine ({MANIFEST} does not carry your digest), so training does not "
            "resume from it; if you trust it:",
            shlex.join(["python", "-c", f"import isdaa; isdaa.adopt({str(folder)!r})"]),
        )


def check_resumable(folder: str | Path) -> None:
    """Raises UserError where training cannot or may not go on from a checkpoint: it is damaged, or not of this user's own run."""
    if Path(folder, MANIFEST).is_file() and (wrong := unusable(folder)) is not None:
        raise UserError(f"{folder}: not a complete checkpoint ({wrong}); resume from another one")
    check_own(folder)


def adopt(folder: str | Path) -> int:
    """Make everything that isdaa wrote in a folder, as it is now, this user's own (docs/evaluation.md).

    A checkpoint of the Trainer without a manifest gets one. What a manifest calls damaged stays so. Symbolic links below the
    folder are not followed.

    Args:
        folder: of a run, sweep or model; a model in a run's folder stands for the run.

    Returns:
        How many records and lists there were.

    Raises:
        UserError: no such folder, or nothing of isdaa's in it.
    """
    given, run = Path(folder), run_folder(folder)
    folder = run if run is not None and (run / RUN).is_file() else given
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder; --adopt takes over folders of runs, sweeps and models")
    known = {RUN, RECORD, MANIFEST, TRAINER_STATE}
    tops = dict.fromkeys((folder, given))  # `given` may lie behind a link of the run's folder
    found = dict.fromkeys(Path(root).resolve() for top in tops for root, _, names in os.walk(top) if known & set(names))
    count = 0
    for place in found:
        if not os.path.lexists(place / MANIFEST) and (place / TRAINER_STATE).is_file() and place.name.startswith(PREFIX):
            write_manifest(place)
            count += 1
        listed = read_json(place / MANIFEST) if (place / MANIFEST).is_file() else {}
        entry = (listed.get("files") or {}).get(RECORD) if isinstance(listed, dict) else None
        whole = entry is not None and (place / RECORD).is_file() and entry == entry_of(place / RECORD)
        for name in (RUN, RECORD, MANIFEST):
            path = place / name
            if path.is_symlink() or not path.is_file() or not isinstance(content := read_json(path), dict):
                continue
            if name == MANIFEST and whole:
                content["files"][RECORD] = entry_of(place / RECORD)
            write_json(path, sealed(name, content))
            count += 1
    if not count:
        raise UserError(f"{folder}: it contains no run or model of isdaa ({RUN}, {RECORD})")
    return count


def unusable(folder: str | Path) -> str | None:
    """Why training cannot go on from a checkpoint: its defect, or weights that are not finite, as earlier isdaa wrote them."""
    wrong = defect(folder)
    if wrong is None and (broken := files_not_finite(folder)):
        return f"its weights are not finite: {listed(broken)}"
    return wrong


def checkpoints(folder: str | Path) -> list[Path]:
    """Every `checkpoint-N` folder, complete or not, by rising N."""
    found = [p for p in Path(folder).glob(f"{PREFIX}*") if p.is_dir() and re.fullmatch(r"\d+", p.name[len(PREFIX) :])]
    return sorted(found, key=step_of)


def step_of(folder: str | Path) -> int:
    """N of a `checkpoint-N` folder."""
    return int(Path(folder).name[len(PREFIX) :])


def newest_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint below `folder` whose weights are finite, or None. Others are passed over with a word."""
    folder = Path(folder)
    for path in sorted(folder.glob(f"{ASIDE}{PREFIX}*")):
        logger.warning("%s: a checkpoint that was not fully written; skipped", path)
    for path in reversed(checkpoints(folder)):
        wrong = unusable(path)
        if wrong is None:
            return str(path)
        logger.warning("%s: not a complete checkpoint (%s); skipped", path, wrong)
    return None


def complete_checkpoints(folder: str | Path) -> list[str]:
    """Every complete checkpoint below `folder`, by rising step; the others are passed over with a word."""
    found = []
    for path in checkpoints(folder):
        wrong = defect(path)
        if wrong is None:
            found.append(str(path))
        else:
            logger.warning("%s: not a complete checkpoint (%s); skipped", path, wrong)
    return found


def write_checkpoint(
    folder: Path,
    fill: Callable[[Path], None],
    *,
    main: bool = True,
    barrier: Callable[[], None] = lambda: None,
    need: float | None = None,
) -> None:
    """Let every rank `fill` the folder aside, then let the main one list, sync and rename it.

    Until the rename there is no `folder` (or still the earlier one of that name); after it, `folder` is complete. Where it
    cannot be written, nothing of it is left. need: bytes of it, about, for the words of a UserError where the disk is full.
    """
    aside, old = folder.parent / f"{ASIDE}{folder.name}", folder.parent / f"{OLD}{folder.name}"
    with writing(folder, need):
        if main:
            folder.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder.parent)
            aside.mkdir()
        try:
            barrier()
            fill(aside)
            barrier()
            if main:
                write_manifest(aside)
                sync_tree(aside)
                if folder.exists():
                    os.rename(folder, old)
                os.rename(aside, folder)
                sync_folder(folder.parent)
        except Exception:
            if main:
                remove_tree(aside)
                if old.exists() and not folder.exists():
                    os.rename(old, folder)
            raise
    if main:
        remove_tree(old)
    barrier()


def remove_leftovers(folder: Path) -> None:
    """What an interrupted process left half written or half removed among the checkpoints."""
    for left in (*folder.glob(f"{ASIDE}{PREFIX}*"), *folder.glob(f"{OLD}{PREFIX}*")):
        remove_tree(left)


def named(folder: Path) -> Path:
    """The path that a folder has, or, while it is written aside, the one that it will have."""
    return folder.with_name(folder.name.removeprefix(ASIDE))


def rotate(folder: Path, keep: int | None) -> None:
    """Remove the oldest complete checkpoints beyond `keep`, each renamed first, so that none is ever half there.

    A broken one is neither counted nor removed: it must not push out one that training can go on from.
    """
    if not keep:
        return
    complete = [path for path in checkpoints(folder) if defect(path) is None]
    for path in complete[:-keep]:
        old = path.parent / f"{OLD}{path.name}"
        remove_tree(old)
        os.rename(path, old)
        remove_tree(old)
