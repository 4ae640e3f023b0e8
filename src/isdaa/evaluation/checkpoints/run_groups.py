"""Which models are checkpoints of one run, in which order, and what the run is called: by paths, names and records."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from isdaa.evaluation.records import Record
from isdaa.record import run_folder

LONE = "checkpoints"  # name of the only run, where no record says that isdaa trained it
# A checkpoint by its name: what stands before says whose it is, the number says when it was written.
NUMBERED = re.compile(
    r"(?P<run>.*?)[-_. ]*(?P<word>checkpoint|ckpt|global[-_]?step|step|iteration|iter|epoch)[-_. ]*(?P<number>\d+)"
    r"(?:[-_. ]*(?:merged|hf|model|adapter|bf16|fp16|fp32))?",
    re.IGNORECASE,
)
SEED = re.compile(r"seed[-_.= ]*\d+", re.IGNORECASE)  # in a name: of another run, never of a later checkpoint
NUMBER = re.compile(rf"({SEED.pattern})|\d+", re.IGNORECASE)
FINAL = ("model", "best", "merged", "final")  # folders of a run's, or a checkpoint's, that hold its weights
Identity = tuple[str | None, float | None, int | None]  # method, β and seed of a model's record
UNKNOWN: Identity = (None, None, None)


def homes_of(models: Sequence[tuple[str, Identity]], as_one_run: bool) -> list[Path]:
    """For each model a path that it shares with those of its run and with no other."""
    places = [_place(path, identity) for path, identity in models]
    numbered = [None if run_folder(place) is not None else NUMBERED.fullmatch(place.name) for place in places]
    families: dict[Path, set[str]] = {}  # folder -> what the names of the checkpoints in it begin with
    for place, found in zip(places, numbered, strict=True):
        if found is not None:
            families.setdefault(place.parent, set()).add(found["run"])
    alike = _alike([place for place, found in zip(places, numbered, strict=True) if found is None and place.name not in FINAL])

    def home(place: Path, found: re.Match[str] | None) -> Path:
        if found is not None:
            return place.parent / found["run"]
        run = run_folder(place) or (place.parent if place.name in FINAL else None)
        if run is not None:
            return run
        if families.get(place) == {""}:  # the last model of a program that writes its checkpoints below it
            return place
        beside = families.get(place.parent, set())
        named = sorted(name for name in beside if name and place.name.startswith(name)) or sorted(beside)
        if len(named) == 1:  # `dpo-final` beside `dpo-step100`
            return place.parent / named[0]
        return alike[place] if as_one_run and not beside else place

    return [home(*each) for each in zip(places, numbered, strict=True)]


def _alike(places: Sequence[Path]) -> dict[Path, Path]:
    """For each model what it shares with those of its run: its folder, or its name but for a number where that tells runs apart.

    A name's number is the last that varies among names which are else the same. It tells runs apart where some differ by it alone
    and others by more, or where names have seeds. A name without a number (`dpo-final`) goes with those that begin like it.
    """
    homes: dict[Path, Path] = {}
    for folder in dict.fromkeys(place.parent for place in places):
        names = list(dict.fromkeys(place.name for place in places if place.parent == folder))
        numbers = {name: [number for number in NUMBER.finditer(name) if not number[1]] for name in names}
        patterns = {name: NUMBER.sub(lambda number: number[1] or "#", name) for name in names}
        runs: dict[str, str] = {}
        for name in filter(numbers.get, names):
            columns = zip(*(numbers[other] for other in names if patterns[other] == patterns[name]), strict=True)
            varying = [place for place, column in enumerate(columns) if len({number[0] for number in column}) > 1]
            start, end = numbers[name][varying[-1] if varying else -1].span()
            runs[name] = (name[:start].rstrip("-_. ") + name[end:]).lstrip("-_. ")
        known = sorted(set(runs.values()))
        for name in names:
            mine = [run for run in known if run and name.startswith(run)] or known
            runs.setdefault(name, mine[0] if len(mine) == 1 and not SEED.search(name) else name)
        told = (
            len(known) < len(list(filter(numbers.get, names)))
            or len({found and found[0] for found in map(SEED.search, names)}) > 1
        )
        homes |= {folder / name: folder / run if told and len(set(runs.values())) > 1 else folder for name, run in runs.items()}
    return homes


def _place(path: str, identity: Identity) -> Path:
    """The model's folder, or that of the checkpoint around it (`checkpoint-100/model`), which no run of ours writes so."""
    folder = Path(path).absolute()
    inside = folder.name in FINAL and identity == UNKNOWN and NUMBERED.fullmatch(folder.parent.name) is not None
    return folder.parent if inside else folder


def in_order(members: Sequence[tuple[Record, Record]]) -> list[tuple[Record, Record]]:
    """A run's models in the order of training: by their records' steps, by the numbers in their names, else as given.

    The same weights of the same step, named twice, count once.
    """
    by_key = {(p["digest"], e["step"], e["path"] if e["step"] is None else ""): (p, e) for p, e in members}
    found = list(by_key.values())
    steps = [entry["step"] for _, entry in found]
    if None not in steps:
        return sorted(found, key=lambda member: member[1]["step"])
    numbers = [_number(entry["path"]) for _, entry in found]
    if len({word for word, _ in numbers if word}) != 1:
        return found
    return [found[i] for i in sorted(range(len(found)), key=lambda i: numbers[i][1])]


def _number(path: str) -> tuple[str, float]:
    """(`checkpoint`, 100) of a checkpoint by its name, or by that of the folder around it; a last model comes last."""
    for part in reversed(Path(path).parts[-2:]):
        if (found := NUMBERED.fullmatch(part)) is not None:
            return found["word"].lower(), float(found["number"])
    return "", float("inf")


def names_of(groups: Mapping[tuple[Path, Identity], Sequence[tuple[Record, Record]]]) -> list[str]:
    """What each run is called: by its folder, and by its record where a folder holds several runs."""
    homes = [home for home, _ in groups]
    paths = [planned["path"] for members in groups.values() for planned, _ in members]
    known = any(identity != UNKNOWN for _, identity in groups)
    if len(groups) == 1 and not known and all(run_folder(path) is None for path in paths):
        return [LONE]
    names = tails(list(dict.fromkeys(homes)))
    found = []
    for (home, (method, beta, seed)), members in groups.items():
        told = [method or "", "" if beta is None else f"β = {beta:g}", "" if seed is None else f"seed {seed}"]
        words = Path(members[0][0]["path"]).name if len(members) == 1 else ", ".join(filter(None, told))
        found.append(f"{names[home]} ({words})" if homes.count(home) > 1 and words else names[home])
    return found


def tails(folders: Sequence[Path]) -> dict[Path, str]:
    """Each folder's name, with as many of the folders around it as tell it from the others."""

    def tail(folder: Path, depth: int) -> tuple[str, ...]:
        return folder.parts[-depth:]

    names = {}
    for folder in folders:
        others = [other for other in folders if other != folder]
        depths = range(1, len(folder.parts) + 1)
        depth = next((d for d in depths if tail(folder, d) not in [tail(other, d) for other in others]), len(folder.parts))
        names[folder] = str(Path(*tail(folder, depth)))
    return names
