"""A run's folder: whose it is, which stages are done, and that one program at a time works in it.

Of several processes, the main one holds the lock and writes; all of them know the same state.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any
from uuid import uuid4

from isdaa.config import Config, fields, resolved
from isdaa.config.settings_text import dump_settings
from isdaa.config.taken_away import at_default
from isdaa.data.encoder import VERSION
from isdaa.distributed import is_main, once, world_size
from isdaa.errors import UserError
from isdaa.files import locked_file, remove_tree, write_atomically, write_json
from isdaa.foreign import check_shape, read_json
from isdaa.manifest import HISTORY
from isdaa.ownership import SEAL, is_own, sealed
from isdaa.record import RUN, git_revision, versions
from isdaa.terminal import say
from isdaa.training.trainer.checkpoints import checkpoints
from isdaa.training.unchanged import check_inputs_unchanged, check_outputs_unchanged, inputs_of, outputs_of

ONE_PROCESS = "guard.steps: the guard works in one process for now; set it to null"
LONG, SHORT = 240, 100  # characters: of lines that a resume does not repeat whole, and what it says of them
READING = ("data.limit", "data.subset", "data.prompt_repeated")
# What decides the outcome of a stage. A stage that began with other values is another run.
DECIDES: dict[str, tuple[str, ...]] = {
    "sft": ("seed", "model", "data.sft", "data.sft_split", *READING, "tokenization", "sft", "lora"),
    "label": ("seed", "model", "data.prompts", "data.prompts_split", *READING, "tokenization", "label", "scorer"),
    "reward": (
        *("seed", "model", "tokenization", "reward", "data.pairs", "data.pairs_split", *READING),
        *("data.eval_pairs", "data.eval_fraction"),
    ),
    "align": (
        *("seed", "continue_optimizer", "objective", "model", "reference.path", "reference.revision", "behaviour"),
        *("tokenization", "align", "lora"),
        *("data.pairs", "data.pairs_split", "data.eval_pairs", "data.eval_split", "data.eval_fraction", *READING),
    ),
}
# What a stage leaves behind before it is done. A stage that left nothing binds nobody: its settings may still be mended.
LEAVES: dict[str, tuple[str, ...]] = {
    "sft": ("sft-checkpoints", "sft"),
    "label": ("pairs/train.jsonl",),  # responses.jsonl knows by itself what its records are good for
    "reward": ("reward-checkpoints", "reward"),
    "align": ("checkpoints", "model"),
}
WRITTEN = ("sft-checkpoints", "pairs", "reward-checkpoints", "checkpoints", "guard")  # folders that stages write into
# What else decides `align` where a guard may end it: the prompts and settings by which it judges.
GUARD_DECIDES = (
    *(
        "guard",
        "scorer",
        "data.evaluation",
        "data.evaluation_split",
        "evaluation.scorer",
        "evaluation.prompts",
        "evaluation.ties",
    ),
    *("evaluation.max_new_tokens", "evaluation.temperature", "evaluation.top_p", "evaluation.top_k"),
)
FREE = ("report_to", "logging_steps", "save_total_limit")  # change what is shown or kept, not what comes out
# Samples and weights do not depend on them, but for rounding: a run may go on with other kernels.
FREE_KEYS = (
    *("label.batch_size", "reward.eval_steps", "guard.batch_size", "guard.keep", "align.attention", "align.compile_layers"),
    "lora.merge",
)
# A global batch is what every process reads at once.
TRAINS = ("sft", "reward", "align")
# Whose output the later stages start from.
UPSTREAM = {"sft": ("label", "reward", "align"), "label": ("reward", "align")}
SHAPE = {
    "stages": {
        "*": {
            "done?": bool,
            "values?": dict,
            "pinned?": {"*": str},
            "inputs?": {"*": {"files?": [list], "rows?": str, "revision?": str}},
            "cwd?": str,
            "notes?": [str],
            "tokens?": int,
            "processes?": int,
            "precision?": str,
            "output?": str,
        }
    }
}


def deciding_values(config: Config, stage: str) -> dict[str, Any]:
    """The dotted configuration values that decide what `stage` produces."""
    flat = flattened(resolved(config))
    keys = DECIDES[stage]
    if stage == "align" and config.guard.stop != "never":
        keys = (*keys, *GUARD_DECIDES)
    return {
        key: value
        for key, value in flat.items()
        if any(key == chosen or key.startswith(f"{chosen}.") for chosen in keys)
        and key.split(".")[-1] not in FREE
        and key not in FREE_KEYS
    }


def _defaults_of_new_keys(now: dict[str, Any], begun: dict[str, Any]) -> dict[str, Any]:
    """What a run that an earlier version began did without a key: the key's default."""
    known = {key: default for key, _, default in fields()}
    return {key: known[key] for key in now if key not in begun and key in known}


def _precision(begun: dict[str, Any], stage: str) -> str | None:
    """What a stage that was begun computes in, if that is decided; an earlier isdaa's values say it."""
    found: str = begun.get("precision") or begun.get("values", {}).get(f"{stage}.precision", "auto")
    return None if found == "auto" else found


def flattened(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration by its dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and not (prefix == "model." and key == "random"):
            flat.update(flattened(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _holds(path: Path) -> bool:
    """Whether something is there: a file, or a folder with more than a log."""
    return path.is_file() or (path.is_dir() and any(inside.name != HISTORY for inside in path.iterdir()))


class Run:
    """The folder of one run. `run.json` says which stages began with which values and which are done."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = Path(config.output_dir)
        self.path = self.folder / RUN
        self.state: dict[str, Any] = {"stages": {}}
        self.writes = True
        self._said: list[str] = []  # by the start before this one

    @contextmanager
    def opened(self) -> Iterator[Run]:
        """Check that the folder is this run's, take its lock, and write the resolved configuration."""
        with ExitStack() as held:
            self.state = once(lambda: self._take(held))
            yield self

    def _take(self, held: ExitStack) -> dict[str, Any]:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder}: output_dir is a file; choose another folder with --output_dir")
        # Hidden files are a lock, or what a kill left of a file being written.
        strangers = [p.name for p in self.folder.iterdir() if p.name[0] != "."] if self.folder.is_dir() else []
        if strangers and not self.path.exists():
            raise UserError(
                f"{self.folder}: not empty and not a run of isdaa (it holds {sorted(strangers)[0]}); "
                "choose another folder with --output_dir"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        taken = f"{self.folder}: another isdaa process is working in this folder; wait for it"
        held.enter_context(locked_file(self.folder / ".lock", taken))
        if self.path.exists():
            self.state = self._read()
        self._check_identity()
        self._remove_leftovers()
        self.state.update(versions=versions(), git_revision=git_revision())
        self._save()  # first of all files: it is what makes the folder a run's
        text = dump_settings(resolved(self.config))
        write_atomically(self.folder / "config.yaml", text)
        return self.state

    def _remove_leftovers(self) -> None:
        """What kills left half written or half removed: nobody else writes here, and the room may be needed."""
        for place in (".", *WRITTEN):
            for left in (self.folder / place).glob(".*.tmp"):
                if not left.is_dir():
                    left.unlink()
            for name in (".writing-*", ".old-*"):
                for folder in (self.folder / place).glob(name):
                    remove_tree(folder)

    def finished_before(self, own: bool = True) -> Run:
        """This run as an earlier process left it, to look at: its folder is neither locked nor written to.

        own: it must be the user's. Raises UserError where it is not, or isdaa did not write its record.
        """
        self.state = self._read(own) if self.path.exists() else self.state
        self.writes = False
        return self

    def _read(self, own: bool = True) -> dict[str, Any]:
        state = read_json(self.path)
        check_shape(state, SHAPE, f"{self.path}: not a record of isdaa; choose another folder with --output_dir")
        if own and not is_own(RUN, state):
            raise UserError(
                f"{self.folder}: not a run of yours on this machine ({RUN} does not carry your digest), so it is not gone on "
                "from; if you trust it, add --adopt to the command; else choose another --output_dir"
            )
        return {key: value for key, value in state.items() if key != SEAL}

    def _check_identity(self) -> None:
        for stage in self.config.stages:
            later = [name for name in UPSTREAM.get(stage, ()) if not self.is_done(stage) and self._left(name)]
            if later:
                raise UserError(
                    f"{self.folder}: holds a different run (its {later[0]} stage began without a finished {stage} stage); "
                    "choose another --output_dir"
                )
        for stage, begun in self.state["stages"].items():
            if not self._left(stage):
                continue
            if begun.get("tokens", 1) != VERSION:
                raise UserError(
                    f"{self.folder}: its {stage} stage is of an earlier isdaa, with other rules of tokenisation: to go on would "
                    "mix the two; start anew in another --output_dir"
                )
            now = deciding_values(self.config, stage)
            values = {key: value for key, value in begun.get("values", {}).items() if not at_default(key, value)}
            begun = {**begun, "values": {**_defaults_of_new_keys(now, values), **values}}
            keys = {*now, *begun["values"]}
            if stage not in self.config.stages:  # its settings may be absent, but the later stages start from its model
                keys = {key for key in keys if key.startswith("model.")}
            for key in sorted(keys, key=lambda key: (key != "guard.stop", key)):  # it decides whether the others count
                before = begun["values"].get(key)
                had = _precision(begun, stage) if key == f"{stage}.precision" else None
                if now.get(key) not in (before, *(() if had is None else ("auto", had))):  # `auto` goes on with what it had
                    raise UserError(
                        f"{self.folder}: holds a different run (its {stage} stage has {key} = {before!r}, "
                        f"this one {now.get(key)!r}); choose another --output_dir or repeat its settings{self._going_on(stage)}"
                    )

    def _going_on(self, stage: str) -> str:
        """What to type where a finished run is asked for with other settings."""
        if stage != "align" or not self.is_done(stage):
            return ""
        return f"; to train its model on with others, type --continue_from {self.folder} --output_dir NEW"

    def is_done(self, stage: str) -> bool:
        """Whether a stage has finished in this folder."""
        return bool(self.state["stages"].get(stage, {}).get("done"))

    def _left(self, stage: str) -> bool:
        """Whether a stage has finished here, or was stopped and left something that its resume builds on."""
        return self.is_done(stage) or (
            stage in self.state["stages"] and any(_holds(self.folder / name) for name in LEAVES[stage])
        )

    def begin(self, stage: str) -> None:
        """Note that a stage starts, or goes on, with the values that decide it.

        Raises UserError where a stage that trains was stopped under another number of processes.
        """
        processes = world_size()
        self.state["stages"][stage] = once(lambda: self._begun(stage, processes))
        self._save()

    def _begun(self, stage: str, processes: int) -> dict[str, Any]:
        before = self.state["stages"][stage] if self._left(stage) else {}
        had, self._said = before.get("processes", 1), before.get("notes", [])
        if before and had != processes and stage in TRAINS:
            raise UserError(
                f"{self.folder}: its {stage} stage began with {had} processes, this start has {processes}: its batches would be "
                f"others; start it with {had}, or choose another --output_dir"
            )
        begun = {
            "done": False,
            "values": deciding_values(self.config, stage),
            "pinned": before.get("pinned", {}),
            "inputs": before.get("inputs") or inputs_of(self.config, self.folder, stage, self.is_done("sft")),
            "cwd": before.get("cwd") or os.path.relpath(Path.cwd(), self.folder.resolve()),  # from which paths were typed
            "tokens": VERSION,
        }
        precision = _precision(before, stage)
        begun |= {} if precision is None else {"precision": precision}
        return begun if processes == 1 else begun | {"processes": processes}

    def precision_before(self, stage: str) -> str | None:
        """What `precision: auto` was found to be when a stage began; `align` has that of `label`, whose logps are its μ's."""
        stages = self.state["stages"]
        found = _precision(stages.get(stage, {}), stage)
        if found is None and stage == "align" and self.is_done("label"):
            found = stages["label"].get("precision", "float32")  # an earlier isdaa knew no `auto`, and noted nothing
        return found

    def pin(self, stage: str, **digests: str) -> None:
        """Note the weights and data that a stage works on, which no configuration value identifies.

        Raises UserError where the stage was stopped in the middle of working on others: the rest would be another run's.
        """
        pinned = self.state["stages"][stage].setdefault("pinned", {})
        for name, value in digests.items():
            if pinned.setdefault(name, value) != value:
                raise UserError(
                    f"{self.folder}: its {stage} stage began with other {name} than lie at the same place now; "
                    "restore them or choose another --output_dir"
                )
        self._save()

    def finish(self, stage: str, **facts: Any) -> None:
        """Note that a stage has finished, with what it has left and what is worth knowing of it."""
        facts["outputs"] = once(lambda: outputs_of(self.folder, stage))
        if stage == "align":
            facts["checkpoints"] = once(lambda: [path.name for path in checkpoints(self.folder / "checkpoints")])
        self.state["stages"][stage].update(done=True, **facts)
        self._save()

    def check_unchanged(self) -> None:
        """Raises UserError where data or models that a stage began with, or what a finished one left, have changed since.

        What is gone, and what cannot be told, is said in a line.
        """
        for line in once(self.changes):
            say(line)
        self._save()

    def changes(self, outputs: bool = True) -> list[str]:
        """As `check_unchanged`, but the lines are returned and nothing is written; outputs: whether they are looked at."""
        said, wanted = [], self.config.stages
        missing = [stage for stage in wanted if not self.is_done(stage)]
        for stage, begun in self.state["stages"].items():
            finished, lines = self.is_done(stage), []
            try:
                if stage in wanted and finished and "inputs" not in begun:
                    lines.append("an earlier isdaa did not note what it read: changes of data and models since are not seen")
                elif stage in wanted and self._left(stage):
                    known = begun.get("inputs", {})
                    lines += check_inputs_unchanged(
                        self.config, self.folder, stage, known, sft=self.is_done("sft"), finished=finished
                    )
                if outputs and finished and (stage in wanted or (missing and stage in UPSTREAM)):
                    needed = bool(missing) or stage == wanted[-1]
                    lines += check_outputs_unchanged(self.folder, stage, begun.get("outputs", {}), needed=needed)
                    names = [name for name in begun.get("checkpoints", ()) if not (self.folder / "checkpoints" / name).is_dir()]
                    if names:
                        lines.append(f"{len(names)} of its {len(begun['checkpoints'])} checkpoints are gone ({names[0]})")
            except (KeyError, TypeError, ValueError, IndexError, AttributeError):
                raise UserError(f"{self.path}: not a record of isdaa; choose another folder with --output_dir") from None
            said += [f"{stage}: {line}" for line in lines]
        return said

    def note(self, stage: str, **facts: Any) -> None:
        """Keep something worth knowing of a stage in `run.json`."""
        self.state["stages"].setdefault(stage, {"done": False, "values": {}}).update(facts)
        self._save()

    def tracker_id(self) -> str:
        """The id of the W&B run that this run, with its resumes, is."""
        found: str = self.state.setdefault("wandb", once(lambda: uuid4().hex[:8]))
        self._save()
        return found

    def say(self, stage: str, lines: Iterable[str]) -> None:
        """Show what happened to the data, one line each, and keep it in `run.json`."""
        for line in lines:
            if self.writes:
                again = len(line) > LONG and line in self._said
                brief = f"{shorten(line, SHORT, placeholder=' …')} (said before, whole in {self.path})"
                say(f"{stage}: {brief if again else line}")
            self.state["stages"].setdefault(stage, {"done": False, "values": {}}).setdefault("notes", []).append(line)
        self._save()

    def _save(self) -> None:
        if is_main() and self.writes:
            write_json(self.path, sealed(RUN, self.state))
