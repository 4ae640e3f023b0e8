"""Records on disk: JSON Lines files of blocks, each whole or absent.

A block is what one piece of work gave: the samples of one checkpoint, the scores of those samples. It is a header line
`{"header": kind, "block": key, "count": n, …}`, which names all that the n lines after it share (model, sampling
settings, seed, scorer, template, versions), and n record lines, each with the block's key. The key is a digest of what
decides the block's content, so work done once is found again, and a block that a kill left unfinished is redone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from isdaa.distributed import is_main, once
from isdaa.errors import UserError
from isdaa.files import append_jsonl, locked_file, whole_jsonl, write_jsonl
from isdaa.foreign import check_shape, read_json, readable, readable_jsonl

Record = dict[str, Any]
METRICS = "metrics.json"  # what an evaluation, and a benchmark, found
AWAY = "move the evaluation's folder away and run it again"

NUMBER, WHOLE, TEXT = (float, None), (int, None), (str, None)
INTERVAL = {"mean": float, "low": NUMBER, "high": NUMBER, "n": int}
SCORER = {
    "name": str, "digest": str, "position?": str, "label?": str, "about?": [str], "kind?": str, "options?": [str],
}  # fmt: skip
FIGURES = {
    "path": str, "kl": INTERVAL, "length": INTERVAL, "truncated": float, "repetition": float, "tie_rate?": NUMBER,
    "thinking?": dict,
    **dict.fromkeys(("win_rate", "win_rate_reference?", "win_rate_chosen?", "reward"), (INTERVAL, None)),
}  # fmt: skip
TOLD = {
    "place?": str,
    "label": str,
    "method?": TEXT,
    "beta?": NUMBER,
    "seed?": WHOLE,
    "step?": WHOLE,
    "weight_mean?": NUMBER,
    "ess?": NUMBER,
}
LEFT_OUT = [{"path": str, "reason": str, "after": TEXT, **TOLD}]  # checkpoints that could not be evaluated
PLAN_SHAPE = {
    "left_out?": LEFT_OUT,
    "format": int, "settings": dict, "prompts": str, "tokenization": dict, "template": object, "tokenizer": object,
    "git_revision": TEXT, "scorer": (SCORER, None), "shared?": TEXT, "one_run?": bool, "doubts?": [str],
    "reference": {"path": str, "digest": str, "opponents": [str, ...], "pairs": TEXT},
    "models": [{"path": str, "digest": str, "samples": str, "kl": str, "pairs": TEXT, **TOLD}, ...],
}  # fmt: skip
HELD_OUT = {"pairs": int, **dict.fromkeys(("accuracy", "margin?", "chosen_drift", "rejected_drift"), INTERVAL)}
JUDGED = {
    "notes": [str], "prompts": int, "of": int, "dropped_tokens?": NUMBER, "kept_tokens?": NUMBER,
    "lacks?": [{"lack": str, "replies": int, "prompts": int, "tokens": NUMBER}],
}  # fmt: skip
METRICS_SHAPE = {
    "scorer": (SCORER, None), "settings": dict, "prompts": int, "opponent": str, "note": str,
    "tokenization": dict, "versions": dict, "reference": FIGURES, "models": [{**FIGURES, **TOLD, "held_out?": HELD_OUT}, ...],
    "left_out?": LEFT_OUT, "ended?": {"*": str},
    "verdicts?": {"*": (dict, None)}, "no_verdict?": {"*": TEXT}, "better?": {"*": (bool, None)},
    "data?": TEXT, "split?": TEXT, "git_revision?": TEXT,
    "one_run?": bool, "doubts?": [str],
    "judged?": JUDGED, "thinking?": {"notes": [str]},
}  # fmt: skip
SAMPLE = {
    "prompt_id": str,
    "sample": int,
    "text": (str, list),
    "ids": [int],
    "tokens": int,
    "finished": bool,
    "answer_tokens?": int,
}
# Kind of a block -> what its lines are.
LINES: dict[str, Record] = {
    "prompts": {
        "prompt_id": str,
        "prompt": (str, list),
        "prompt_ids": [int],
        "chosen": (str, list, None),
        "facts": (dict, None),
        "opened?": str,
    },
    "samples": SAMPLE,
    "kl": SAMPLE | {"kl": float},
    "scores": {"prompt_id": str, "sample": int, "score": float},
    "judged": {"prompt_id": str, "pair": int, "orders": [NUMBER], "state": str, "lacks?": [str]},
    "pairs": {"prompt": str, "chosen_logps": float, "rejected_logps": float},
}


def path_here(folder: Path, model: Record) -> str:
    """The path of a model of the evaluation in `folder`, as it is reached from here: the plan's may be from another folder."""
    path, place = Path(model["path"]), folder / model.get("place", "")
    if "place" not in model or not place.is_dir() or (path.is_dir() and path.resolve() == place.resolve()):
        return str(model["path"])
    return str(place.resolve())


def read_plan(path: Path) -> Record:
    """The `plan.json` of an evaluation. Raises UserError for one that isdaa did not write."""
    return _checked(path, PLAN_SHAPE)


def read_metrics(path: Path) -> Record:
    """The `metrics.json` of an evaluation. Raises UserError for one that isdaa did not write."""
    return _checked(path, METRICS_SHAPE)


def _checked(path: Path, shape: Record) -> Record:
    found: Record = read_json(path)
    check_shape(found, shape, str(path))
    models = [*found["models"], *found.get("left_out", [])]
    here = {model["path"]: path_here(path.parent, model) for model in models}
    for model in models:
        model |= {key: here.get(model[key], model[key]) for key in ("path", "after") if model.get(key) is not None}
    return found


class Blocks:
    """The blocks of one file, in memory and on disk.

    shared: another file of blocks, which is read and never written: what several evaluations have in common.
    """

    def __init__(self, path: str | Path, shared: str | Path | None = None, readonly: bool = False) -> None:
        self.path = Path(path)
        self.headers: dict[str, Record] = {}
        self.records: dict[str, list[Record]] = {}
        self.shared = Blocks(shared, readonly=True) if shared is not None else None
        lines = (readable_jsonl if readonly else whole_jsonl)(self.path)
        for number, line in enumerate(lines, start=1):
            key = line.get("block")
            if not isinstance(key, str):
                raise UserError(f"{self.path}: a line names no block, so isdaa did not write it; move the file away")
            if "header" in line:
                check_shape(line, {"header": str, "count": int}, f"{self.path}:{number}")
                # Begun twice: the first was cut off before its end.
                self.headers[key], self.records[key] = line, []
            elif key in self.headers:
                check_shape(line, LINES.get(self.headers[key]["header"], {}), f"{self.path}:{number}")
                self.records[key].append(line)
        broken = [key for key, header in self.headers.items() if len(self.records[key]) != header["count"]]
        for key in broken:
            del self.headers[key], self.records[key]
        if readonly:
            return
        if broken or len(lines) != sum(1 + len(records) for records in self.records.values()):
            write_jsonl(self.path, (line for key in self.headers for line in (self.headers[key], *self.records[key])))

    def __contains__(self, key: str) -> bool:
        return key in self.headers or (self.shared is not None and key in self.shared)

    def __getitem__(self, key: str) -> list[Record]:
        if key not in self.records and self.shared is not None and key in self.shared:
            return self.shared[key]
        if key not in self.records:
            raise UserError(f"{self.path}: lacks the records of block {key}; run the evaluation again to make them")
        return self.records[key]

    def add(self, kind: str, key: str, header: Record, records: Sequence[Record]) -> None:
        """Append a whole block and sync it."""
        head = {"header": kind, "block": key, "count": len(records), **header}
        lines = [{"block": key, **record} for record in records]
        if is_main():
            append_jsonl(self.path, [head, *lines])
        self.headers[key], self.records[key] = head, lines


class Lines:
    """Records that stand alone, one line each, found by their `key`: a kill loses at most those that were being made."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._found: dict[str, Record] = {}
        for line in whole_jsonl(self.path):
            if not isinstance(line.get("key"), str):
                raise UserError(f"{self.path}: a line has no key, so isdaa did not write it; move the file away")
            self._found[line["key"]] = line

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Record:
        return self._found[key]

    def add(self, records: Sequence[Record]) -> None:
        """Append records, each with its `key`, and sync them; of several processes, which all call it, the main one writes."""
        if is_main():
            append_jsonl(self.path, records)
        self._found |= {record["key"]: record for record in records}


def fitting(folder: Path) -> Any:
    """A context in which records that do not fit together raise UserError, which names the folder."""
    return readable(folder, "the records of this evaluation do not fit together", AWAY)


def blocks_of(folder: Path, name: str, plan: Record) -> Blocks:
    """The blocks of file `name` that an evaluation's plan speaks of, those that it shares with others included."""
    shared = plan.get("shared")
    return Blocks(folder / name, folder / shared / name if shared is not None else None)


@contextmanager
def locked(folder: str | Path) -> Iterator[Path]:
    """The folder, made if need be, while no other program writes records into it."""
    folder = Path(folder)
    with ExitStack() as held:
        once(lambda: _take(folder, held))
        yield folder


def _take(folder: Path, held: ExitStack) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose another folder for the evaluation with --output")
    folder.mkdir(parents=True, exist_ok=True)
    taken = f"{folder}: another isdaa process is evaluating into this folder; wait for it"
    held.enter_context(locked_file(folder / ".lock", taken))
