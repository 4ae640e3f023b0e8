"""Where rows come from: local files and folders, the Hub, recipes, the embedded world. Every row knows its 'file:row'."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from isdaa.data.pairs import (
    Counts,
    NoCommonPromptError,
    NoResponseError,
    Row,
    canonical_pair,
    canonical_prompt,
    canonical_sft,
    same_response,
)
from isdaa.data.readers import Numbered, iterate_rows
from isdaa.data.recipes import Located, Purpose, located
from isdaa.errors import UserError
from isdaa.files import digest

if TYPE_CHECKING:
    from datasets import Dataset

# Columns whose shape differs from row to row (text or messages; any object) are kept as JSON text and read on access.
CODED = frozenset({"prompt", "chosen", "rejected", "completion", "facts"})
TYPES = {
    "id": "string",
    "where": "string",
    "prompt_ids": "ids",
    "chosen_ids": "ids",
    "rejected_ids": "ids",
    "chosen_finished": "bool",
    "rejected_finished": "bool",
}


def load_rows(source: str, split: str | None = None, *, subset: str | None = None, limit: int | None = None) -> list[Row]:
    """Raw rows as they stand in the source, each with `where` ('file:row', lines and rows counted from 1).

    Of a recipe, the rows of its prompts.
    """
    _, rows = opened(source, split, "prompts", subset=subset, limit=limit)
    return [{**row, "where": where} for row, where in rows]


def opened(
    source: str, split: str | None, purpose: Purpose, *, subset: str | None = None, limit: int | None = None
) -> tuple[Located, Numbered]:
    """What a source stands for when it is read for a purpose, and its raw rows, which are read as they are asked for."""
    place = located(source, split, purpose)
    world = "prompts" if purpose == "prompts" else "sft"
    rows = iterate_rows(place.source, place.split, subset=subset, limit=limit, world_split=world, columns=place.columns)
    return place, rows


def load_pairs(
    source: str, split: str | None = None, *, subset: str | None = None, limit: int | None = None
) -> tuple[Dataset, Counts]:
    """Canonical pairs (`pairs.canonical_pair`) of any source and format, and the counts of those dropped.

    split: of a Hub data set, a folder or the embedded world; subset: a Hub data set's configuration;
    limit: at most so many rows are read. Raises UserError, also where no pair is left.
    """
    counts = Counts()
    return _different(_canonical(source, split, "pairs", canonical_pair, counts, subset, limit), counts, source)


def pairs_of(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[Dataset, Counts]:
    """As `load_pairs`, of rows in memory; errors call them `name:row`, counted from 1."""
    counts = Counts()
    numbered = ((row, f"{name}:{number}") for number, row in enumerate(rows, 1))
    return _different(_counted(numbered, canonical_pair, counts), counts, name)


def _different(rows: Iterable[Row], counts: Counts, source: str) -> tuple[Dataset, Counts]:
    """The pairs whose responses differ."""
    pairs: list[Row] = []
    for pair in rows:
        if same_response(pair):
            counts.dropped_equal += 1
        else:
            pairs.append(pair)
    counts.kept = len(pairs)
    if not pairs:
        raise UserError(f"{source}: no pair is left: {'; '.join(counts.lines())}")
    return as_dataset(pairs), counts


def load_prompts(
    source: str, split: str | None = None, *, subset: str | None = None, limit: int | None = None
) -> tuple[Dataset, Counts]:
    """Prompts to sample for: id, prompt, prompt_ids, chosen (a response to compare with, or None), facts, where.

    Reads prompt files, SFT examples and pairs alike. A prompt that comes again is used once, with the first row's
    response: intervals over prompts need different prompts.
    """
    counts = Counts()
    prompts: dict[str, Row] = {}
    for prompt in _canonical(source, split, "prompts", canonical_prompt, counts, subset, limit):
        if prompts.setdefault(prompt_key(prompt), prompt) is not prompt:
            counts.repeated_prompts += 1
    counts.kept = len(prompts)
    if not prompts:
        raise UserError(f"{source}: no prompt is left: {'; '.join(counts.lines())}")
    return as_dataset(list(prompts.values())), counts


def load_sft(
    source: str, split: str | None = None, *, subset: str | None = None, limit: int | None = None
) -> tuple[Dataset, Counts]:
    """SFT examples: id, prompt (None for plain text and whole conversations), completion, where."""
    counts = Counts()
    examples = list(_canonical(source, split, "sft", canonical_sft, counts, subset, limit))
    counts.kept = len(examples)
    if not examples:
        raise UserError(f"{source}: no example in it" + "".join(f"; {line}" for line in counts.lines() if counts.rows))
    return as_dataset(examples), counts


def _canonical(
    source: str,
    split: str | None,
    purpose: Purpose,
    canonical: Callable[[Mapping[str, Any], str, str], Row],
    counts: Counts,
    subset: str | None,
    limit: int | None,
) -> Iterator[Row]:
    """The rows of a source as `canonical` makes them; `counts` gets how many were read, and how many dropped on the way."""
    place, rows = opened(source, split, purpose, subset=subset, limit=limit)
    return _counted(rows, lambda row, where: canonical(place.row(row, where), where, place.source), counts)


def _counted(rows: Numbered, canonical: Callable[[Mapping[str, Any], str], Row], counts: Counts) -> Iterator[Row]:
    for row, where in rows:
        counts.rows += 1
        try:
            made = canonical(row, where)
        except (NoCommonPromptError, NoResponseError) as error:
            counts.drop(error)
            continue
        yield made


def hold_out(rows: Dataset, fraction: float, seed: int = 0) -> tuple[Dataset, Dataset | None]:
    """(rows to train on, rows held out), by prompt: no prompt is in both; at least one is held out where fraction > 0.

    A checksum of seed and prompt decides, so the order of the rows changes nothing. Raises UserError
    where fewer than two different prompts would have to be divided.
    """
    if fraction <= 0:
        return rows, None
    keys = [digest([seed, prompt_key(row)]) for row in _prompts_alone(rows)]
    order = sorted(set(keys))
    if len(order) < 2:
        raise UserError("the data has only one prompt, so none can be held out; set data.eval_pairs, or data.eval_fraction to 0")
    held = set(order[: min(len(order) - 1, math.ceil(fraction * len(order)))])
    sides = [[i for i, key in enumerate(keys) if (key in held) == side] for side in (False, True)]
    return rows.select(sides[0]), rows.select(sides[1])


def prompt_key(row: Mapping[str, Any]) -> str:
    """What tells prompts apart: the token ids where there are any, for they win over the text."""
    return json.dumps(row["prompt_ids"] if row.get("prompt_ids") is not None else row["prompt"], ensure_ascii=False)


def common_prompts(train: Dataset | Iterable[Mapping[str, Any]], held: Dataset | Iterable[Mapping[str, Any]]) -> int:
    """How many different prompts are in both, as `prompt_key` tells them apart: text and messages never agree."""
    return len(_prompt_keys(train) & _prompt_keys(held))


def _prompt_keys(rows: Any) -> set[str]:
    return {prompt_key(row) for row in _prompts_alone(rows)}


def _prompts_alone(rows: Any) -> Any:
    """The rows without what `prompt_key` does not look at: responses need not be decoded."""
    if not hasattr(rows, "select_columns"):
        return rows
    return rows.select_columns([name for name in ("prompt", "prompt_ids") if name in rows.column_names])


def as_dataset(rows: list[Row]) -> Dataset:
    """Canonical rows (all with the same keys) as a Dataset whose rows come back as they were given."""
    from datasets import Dataset, Features, List, Value

    features, columns = {}, {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        kind = TYPES.get(name, "string" if name in CODED else "float64")
        features[name] = List(Value("int32")) if kind == "ids" else Value(kind)
        columns[name] = [_code(value) for value in values] if name in CODED else values
    return Dataset.from_dict(columns, features=Features(features)).with_transform(_decode)


def _code(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _decode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {
        name: [None if value is None else json.loads(value) for value in values] if name in CODED else values
        for name, values in batch.items()
    }
