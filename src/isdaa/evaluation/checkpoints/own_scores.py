"""Scores that someone else's program gave to the samples of an evaluation: `--scores FILE`, in place of a scorer.

A row is one sample's: `model` (a path or label of the evaluation, `reference`, or `chosen` for the data's chosen responses),
`prompt_id` and `sample` as `samples.jsonl` has them, and `score`. docs/evaluation.md shows how to write the file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isdaa.data.reading.readers import iterate_rows
from isdaa.errors import UserError, nearest
from isdaa.evaluation.records import Blocks, Record
from isdaa.evaluation.scorers import ScorerRow
from isdaa.files import digest
from isdaa.terminal import Bar

SAMPLES = "samples.jsonl"  # of the evaluation
REFERENCE, CHOSEN = "reference", "chosen"
COLUMNS = ("model", "prompt_id", "sample", "score")
Place = tuple[str, str, int]  # block of samples (or `chosen`), prompt, sample


class OwnScores:
    """A scorer that reads. name: the file; opponents: samples a prompt of the reference that it scores.

    Raises UserError for a file that cannot be read or a row that is none.
    """

    def __init__(self, path: str | Path) -> None:
        self.name = str(path)
        if not Path(path).expanduser().is_file():
            raise UserError(f"--scores {path}: no such file; give a JSONL or CSV file with the columns {', '.join(COLUMNS)}")
        self.rows = [_row(row, where) for row, where in iterate_rows(str(path))]
        self.digest = digest(["scores", [row[:4] for row in self.rows]])
        samples = [sample for model, _, sample, _, _ in self.rows if model == REFERENCE]
        if not samples:
            raise UserError(f"{path}: no row has the model `{REFERENCE}`; win rates need its samples' scores, too")
        self.opponents = len(set(samples))
        self.with_chosen = any(model == CHOSEN for model, *_ in self.rows)
        self._found: dict[Place, float] = {}

    def facts(self) -> dict[str, Any]:
        """What records say beside name and digest."""
        return {"kind": "scores", "options": ["--scores", self.name]}

    def bind(self, folder: Path, plan: Record, samples: Blocks) -> None:
        """Find each needed sample's score. Raises UserError naming the first sample that was not drawn, or row that is wrong."""
        reference, models = plan["reference"], plan["models"]
        known: dict[str, list[tuple[str, int]]] = {REFERENCE: [(key, k) for k, key in enumerate(reference["opponents"])]}
        names = {REFERENCE: REFERENCE, reference["path"]: REFERENCE}
        for model in models:
            known[model["path"]] = [(model["samples"], 0)]
            names |= {model["path"]: model["path"], model["label"]: model["path"]}
        for model, blocks in known.items():
            if any(key not in samples for key, _ in blocks):
                raise UserError(
                    f"{folder}: lacks samples of {model} with these settings, {len(blocks)} a prompt; draw them first: the same "
                    f"command with --scorer none --evaluation.opponent_samples {self.opponents} in place of --scores"
                )
        prompts = {row["prompt_id"]: row for row in samples[plan["prompts"]]}
        wanted = {(model, prompt, k) for model, blocks in known.items() for _, k in blocks for prompt in prompts}
        if self.with_chosen or plan["settings"].get("opponent") == CHOSEN:
            names.setdefault(CHOSEN, CHOSEN)
            known[CHOSEN] = [(CHOSEN, 0)]
            wanted |= {(CHOSEN, prompt, 0) for prompt, row in prompts.items() if row["chosen"] is not None}
        block_of = {(model, k): key for model, blocks in known.items() for key, k in blocks}
        scores: dict[Place, tuple[float, str]] = {}  # by model
        found: dict[Place, tuple[float, str, str]] = {}  # by block, which models with the same weights have in common
        for named, prompt, sample, score, where in self.rows:
            if named not in names:
                raise UserError(f"{where}: no model {named!r} in this evaluation{nearest(named, names)}; it has {_some(names)}")
            if prompt not in prompts:
                raise UserError(f"{where}: no prompt {prompt!r} in this evaluation{nearest(prompt, prompts)}")
            place = names[named], prompt, sample
            if place not in wanted:
                raise UserError(f"{where}: no sample {sample} of {named} for prompt {prompt!r}; they are counted from 0")
            if place in scores:
                raise UserError(
                    f"{where}: a second score of sample {sample} of {named} for prompt {prompt!r}: see {scores[place][1]}"
                )
            scores[place] = score, where
            block = block_of[place[0], sample], prompt, sample
            other, at, whose = found.setdefault(block, (score, where, named))
            if other != score:
                raise UserError(
                    f"{where}: sample {sample} of {named} for prompt {prompt!r} is that of {whose}, a model with the same "
                    f"weights, and has another score there: see {at}"
                )
        order = [(model, prompt, k) for model, blocks in known.items() for _, k in blocks for prompt in prompts]
        missing = next((p for p in order if p in wanted and (block_of[p[0], p[2]], *p[1:]) not in found), None)
        if missing is not None:
            raise UserError(f"{self.name}: no score of sample {missing[2]} of {missing[0]} for prompt {missing[1]!r}")
        self._found = {block: score for block, (score, _, _) in found.items()}

    def score(self, rows: Sequence[ScorerRow], progress: Bar | None = None) -> list[float]:
        """The file's scores of recorded samples, which name their block (`of`) and place."""
        found = [self._found[row["of"], str(row["id"]), row["sample"]] for row in rows]
        if progress is not None:
            progress.update(len(rows))
        return found


def check_drawn(folders: Sequence[Path], scores: OwnScores) -> None:
    """Raises UserError where there is no evaluation whose samples the file could be of.

    folders: the evaluation's own, and that whose records it shares.
    """
    if not any((folder / SAMPLES).is_file() for folder in folders):
        raise UserError(
            f"{folders[0]}: no evaluation here whose samples {scores.name} could score; draw them first: the same command with "
            "--scorer none in place of --scores"
        )


def _row(row: ScorerRow, where: str) -> tuple[str, str, int, float, str]:
    """(model, prompt, sample, score, where)."""
    missing = [name for name in COLUMNS if row.get(name) in (None, "")]
    if missing:
        raise UserError(f"{where}: no value for {' and '.join(missing)}; each row needs {', '.join(COLUMNS)}")
    return str(row["model"]), str(row["prompt_id"]), _whole(row["sample"], where), _finite(row["score"], where), where


def _whole(value: Any, where: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    raise UserError(f"{where}: sample is {value!r:.60}; it must be a whole number, as in samples.jsonl")


def _finite(value: Any, where: str) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: score is {value!r:.60}; it must be a finite number")
    return number


def _some(names: Sequence[str] | dict[str, str]) -> str:
    listed = list(names)
    return ", ".join(listed[:6]) + (", …" if len(listed) > 6 else "")
