"""What a stage read and what it left, by their files: a finished stage that is asked for again sees that they have changed.

Noted in `run.json` before a stage reads anything. Sizes and times are looked at first, contents only where those differ, so
that a file that was touched, copied or restored is no other file. Nothing is loaded or tokenised.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from isdaa.config import Config
from isdaa.data.reading.readers import files_behind
from isdaa.data.reading.recipes import Purpose, located
from isdaa.data.reading.sources import opened
from isdaa.errors import UserError, shown
from isdaa.files import digest, file_digest
from isdaa.manifest import check_manifest, sampled_digest
from isdaa.training.preflight import models_of, revision_of, sources_of

WEIGHTS = ("*.safetensors", "*.bin")
# What decides a model's numbers and its tokens; cards, records and optimiser states do not.
MODEL = (
    *(*WEIGHTS, "config.json", "adapter_config.json", "modeling_*.py", "configuration_*.py", "tokenization_*.py"),
    *("tokenizer*.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "special_tokens_map.json", "added_tokens.json"),
    "chat_template*",
)
NOT_MODEL = ("training_args.bin", "optimizer.bin", "pytorch_model_fsdp.bin")
WORLD = "world:"
FIRST = 64  # rows of the embedded world, which is made, not read: enough to tell another world
# Seen by a stopped stage itself, from the rows and weights in memory (`Run.pin`).
PINNED = ("data.sft", "data.prompts", "data.pairs", "model.path", "model.tokenizer", "reward.path", "sft", "pairs/train.jsonl")
FOLDERS = {"sft": "sft", "reward": "reward", "align": "model"}

Facts = dict[str, Any]  # `files`: [name, size, time of change, of its entry, digest]; `rows` of the world; `revision` on the Hub


def inputs_of(config: Config, folder: Path, stage: str, sft: bool) -> dict[str, Facts]:
    """Facts of all that a stage reads, by the configuration's key, or by the name in the run's folder.

    sft: whether the run has a model of its own to start from.
    """
    return {key: facts for key, look, *_ in _read(config, folder, stage, sft) if (facts := look()) is not None}


def outputs_of(folder: Path, stage: str) -> dict[str, Facts]:
    """Facts of what a finished stage has left, by the name in the run's folder."""
    found: dict[str, Facts | None] = {}
    if stage in FOLDERS:
        found[FOLDERS[stage]] = _files(_weights(folder / FOLDERS[stage]), sampled_digest)
    if stage == "label":
        found["pairs/train.jsonl"] = _of_file(folder / "pairs" / "train.jsonl")
    if stage == "align":
        found["eval_pairs.jsonl"] = _of_file(folder / "eval_pairs.jsonl")
    return {name: facts for name, facts in found.items() if facts is not None}


def check_inputs_unchanged(
    config: Config, folder: Path, stage: str, noted: dict[str, Facts], *, sft: bool, finished: bool
) -> list[str]:
    """Raises UserError where a stage read something else than lies at the same place now. Returns what else is to be said.

    noted: `inputs_of` as the stage began; times in it are brought up to date. finished: False for a stage that was stopped.
    """
    said = []
    for key, place, before, now, name in _compared(config, folder, stage, noted, sft):
        if key in PINNED and not finished:
            continue
        if now is None:
            said.append(f"{key}: {place} is not there any more; what was made of it is reused")
        elif name is None:
            noted[key] = now
        elif "revision" in before:
            said.append(
                f"{key}: {place} has another revision on the Hub now ({now['revision'][:12]}) than when the stage began "
                f"({before['revision'][:12]}); what was made of that is reused"
            )
        else:
            state = "finished" if finished else "stopped"
            raise UserError(
                f"{folder}: its {state} {stage} stage read {key} as it no longer is (changed: {name}); restore it, or choose "
                "another --output_dir"
            )
    return said


def changed_inputs(config: Config, folder: Path, stage: str, noted: dict[str, Facts], *, sft: bool) -> dict[str, tuple[str, str]]:
    """What lies at the same place with other content than when a stage read it: key -> place, and what has changed."""
    compared = _compared(config, folder, stage, noted, sft)
    return {key: (place, name) for key, place, _, _, name in compared if name is not None}


def changed_model(before: Facts | None, name: str, revision: str | None) -> str | None:
    """What of the model of that name is not as it was noted; None: nothing, or it cannot be told."""
    now = None if before is None else _of_model(name, revision, before)
    return None if before is None or not now or not now.get("files", True) else _difference(before, now)


def places_read(config: Config, stage: str) -> set[Path]:
    """Where a stage of a run that has no model of its own reads."""
    return {Path(place).resolve() for _, _, place in _read(config, Path(config.output_dir), stage, False)}


def check_outputs_unchanged(folder: Path, stage: str, noted: dict[str, Facts], *, needed: bool) -> list[str]:
    """Raises UserError where what a finished stage left has changed, or is gone while it is `needed`. Returns what to say."""
    said = []
    if stage in FOLDERS:
        check_manifest(folder / FOLDERS[stage])
    for name, before in noted.items():
        path = folder / name
        now = _files(_weights(path), sampled_digest, before) if name in FOLDERS.values() else _of_file(path, before)
        if now is None or not now["files"]:
            gone = f"{path}: what its finished {stage} stage left is gone"
            if needed:
                raise UserError(f"{gone}; restore it, or choose another --output_dir")
            said.append(gone)
        elif (changed := _difference(before, now)) is not None:
            raise UserError(
                f"{path}: not what its finished {stage} stage left (changed: {changed}); restore it, or choose another "
                "--output_dir"
            )
        else:
            noted[name] = now
    return said


def _compared(
    config: Config, folder: Path, stage: str, noted: dict[str, Facts], sft: bool
) -> Iterator[tuple[str, str, Facts, Facts | None, str | None]]:
    """Of all that a stage has read: key, place, facts then and now (None: it is gone), and what differs."""
    for key, look, place in _read(config, folder, stage, sft):
        before = noted.get(key)
        if before is None:
            continue
        try:
            now = look(before)
        except UserError:  # a place that says what is missing
            now = None
        if now is not None and not now.get("files", True):
            now = None
        yield key, place, before, now, None if now is None else _difference(before, now)


def _read(config: Config, folder: Path, stage: str, sft: bool) -> Iterator[tuple[str, Callable[..., Facts | None], str]]:
    """Key, what looks at it (given the facts before, where there are any), and the place in words, of all that a stage reads."""
    judged = stage == "align" and config.guard.steps is not None

    for key, source, split, purpose in sources_of(config, [stage]):
        if key == "data.pairs" and (source is None or (stage == "align" and config.trains_on_labelled)):
            written = folder / "pairs" / "train.jsonl"
            yield "pairs/train.jsonl", partial(_of_file, written), str(written)
        elif source is not None and (judged or key != "data.evaluation"):
            section, name = key.split(".")
            source = str(getattr(config, section).source(name))
            yield key, partial(_of_rows, source, split, purpose), source
    models: dict[str, str | None] = dict(models_of(config, [stage]))
    if "evaluation.scorer" in models:  # noted by what it is for
        models["guard.scorer"] = models.pop("evaluation.scorer")
    if sft and stage != "sft":
        models |= {"sft": str(folder / "sft"), "model.path": None}
    for key, found in models.items():
        if found is not None and found not in ("gold", "none") and not found.startswith(WORLD):
            yield key, partial(_of_model, found, revision_of(config, found)), found


def _of_rows(source: str, split: str | None, purpose: Purpose, before: Facts | None = None) -> Facts | None:
    place = located(source, split, purpose)
    if place.source.startswith(WORLD):
        _, rows = opened(source, split, purpose, limit=FIRST)
        return {"rows": digest([row for row, _ in islice(rows, FIRST)])}
    files = files_behind(place.source, place.split)
    return _files(files, file_digest, before) if files is not None else _on_hub("datasets", place.source, None)


def _of_model(name: str, revision: str | None, before: Facts | None = None) -> Facts | None:
    from isdaa.models.places import adapter_base

    path = Path(name).expanduser()
    if not path.is_dir():
        return _on_hub("models", name, revision)
    files = [file for file in _matching(path, MODEL) if file.name not in NOT_MODEL]
    base = adapter_base(path)
    if base is not None and Path(base).is_dir():
        files += [file for file in _matching(Path(base), MODEL) if file.name not in NOT_MODEL]
    return _files(files, sampled_digest, before)


def _of_file(path: Path, before: Facts | None = None) -> Facts | None:
    return _files([path], file_digest, before) if path.is_file() else None


def _weights(folder: Path) -> list[Path]:
    return [file for file in _matching(folder, WEIGHTS) if file.name not in NOT_MODEL]


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    read = any(file.match("model*.safetensors") for file in found)  # before any *.bin, which may be of another program
    return sorted(file for file in found if not (read and file.suffix == ".bin"))


def _files(files: Iterable[Path], content: Callable[[Path], str], before: Facts | None = None) -> Facts:
    """Facts of files. Content is read only of those that are not as `before` by size and times."""
    known = {tuple(entry[:4]): entry[4] for entry in (before or {}).get("files", ())}
    found = []
    for file in files:
        facts = file.stat()
        entry = (shown(file.name), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
        found.append([*entry, known[entry] if entry in known else content(file)])
    return {"files": found}


def _on_hub(kind: str, name: str, revision: str | None) -> Facts | None:
    """The revision that the Hub's cache on this machine has; the network is not asked."""
    from huggingface_hub.constants import HF_HUB_CACHE

    repository = name.partition(":")[0].replace("/", "--")
    ref = Path(HF_HUB_CACHE) / f"{kind}--{repository}" / "refs" / (revision or "main")
    try:
        return {"revision": ref.read_text(encoding="utf-8").strip()}
    except (OSError, ValueError):
        return None


def _difference(before: Facts, now: Facts) -> str | None:
    """What differs, in a word; None: the contents are the same, in the same order, whatever the files are called now."""
    if "files" not in before or "files" not in now:
        kinds = {"rows": "its rows", "revision": "its revision on the Hub"}
        return None if before == now else next((word for key, word in kinds.items() if key in before and key in now), "its place")
    old, new = before["files"], now["files"]
    if [entry[4] for entry in old] == [entry[4] for entry in new]:
        return None
    digests = {entry[4] for entry in old}
    changed = next((entry[0] for entry in new if entry[4] not in digests), None)
    return changed or next((os.path.basename(entry[0]) for entry in old if entry[4] not in {e[4] for e in new}), "their order")
