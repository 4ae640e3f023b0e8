"""Where rows come from: local files and folders, the Hub, recipes, the embedded world. Every row knows its 'file:row'."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from isdaa.data.formats import ALPACA, SPOKEN, as_conversation, is_alpaca
from isdaa.data.implied import NoCommonPromptError, NoResponseError
from isdaa.data.pairs import (
    KNOWN_COLUMNS,
    PAIR_COLUMNS,
    PROMPT_NAMES,
    SFT_COLUMNS,
    TEMPLATE_COLUMNS,
    Counts,
    Repeated,
    Row,
    canonical_pair,
    canonical_prompt,
    canonical_sft,
    competing,
    same_response,
)
from isdaa.data.reading.readers import Numbered, divided, iterate_rows
from isdaa.data.reading.recipes import Located, Purpose, located
from isdaa.errors import UserError
from isdaa.files import digest

if TYPE_CHECKING:
    from datasets import Dataset

EMPTY_SHARE = 0.01  # of the rows: so many empty responses are an accident, more are a mistake
# Columns whose shape differs from row to row (text or messages; any object) are kept as JSON text and read on access.
CODED = frozenset({"prompt", "chosen", "rejected", "completion", "facts", "tools", "chat_template_kwargs"})
TYPES = {
    "id": "string",
    "where": "string",
    "behaviour_tokens": "string",
    "prompt_ids": "ids",
    "chosen_ids": "ids",
    "rejected_ids": "ids",
    "chosen_finished": "bool",
    "rejected_finished": "bool",
}


def load_rows(source: str, split: str | None = None, *, limit: int | None = None) -> list[Row]:
    """Raw rows as they stand in the source, each with `where` ('file:row', lines and rows counted from 1).

    Of a recipe, the rows of its prompts.
    """
    _, rows = opened(source, split, "prompts", limit=limit)
    return [{**row, "where": where} for row, where in rows]


def opened(source: str, split: str | None, purpose: Purpose, *, limit: int | None = None) -> tuple[Located, Numbered]:
    """What a source stands for when it is read for a purpose, and its raw rows, which are read as they are asked for."""
    place = located(source, split, purpose)
    world = "prompts" if purpose == "prompts" else "sft"
    return place, iterate_rows(place.source, place.split, limit=limit, world_split=world, columns=place.columns)


def load_pairs(
    source: str, split: str | None = None, *, limit: int | None = None, repeated: Repeated = None
) -> tuple[Dataset, Counts]:
    """Canonical pairs (`pairs.canonical_pair`) of any source and format, and the counts of those dropped.

    split: of a Hub data set, a folder or the embedded world; limit: at most so many rows are read; repeated: what becomes of
    text prompts that both responses begin with. Raises UserError for what is wrong with a row or with too many of them, for an
    id that stands for two prompts, and where no pair is left.
    """
    reading = Reading(source, PAIR_COLUMNS, repeated)
    return _different(reading.canonical(*opened(source, split, "pairs", limit=limit), canonical_pair), reading)


def pairs_of(rows: Any, name: str, repeated: Repeated = None) -> tuple[Dataset, Counts]:
    """As `load_pairs`, of rows in memory: mappings in any iterable, or a DataFrame; errors call them `name:row`, from 1."""
    reading = Reading(name, PAIR_COLUMNS, repeated)
    return _different(reading.canonical(Located(name, None), numbered(rows, name), canonical_pair), reading)


def numbered(rows: Any, name: str) -> Numbered:
    """Rows in memory, each with its place (`name:row`, from 1). Raises UserError for one that is no mapping."""
    if hasattr(rows, "to_dict") and hasattr(rows, "iloc"):  # pandas
        twice = [str(column) for column in rows.columns[rows.columns.duplicated()]]
        if twice:
            raise UserError(f"{name}: column '{twice[0]}' stands twice; rename or remove one")
        names = list(map(str, rows.columns))
        rows = (dict(zip(names, map(_of_pandas, values), strict=True)) for values in rows.itertuples(index=False, name=None))
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise UserError(f"{name}:{number}: a row must be a mapping of columns to values, not {type(row).__name__}")
        yield row, f"{name}:{number}"


def _of_pandas(value: Any) -> Any:
    """None for what pandas writes where a cell is empty: NaN, NaT, NA."""
    if type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value):
        return None
    return value


def _different(rows: Iterable[Row], reading: Reading) -> tuple[Dataset, Counts]:
    """The pairs whose responses differ."""
    pairs: list[Row] = []
    for pair in rows:
        if same_response(pair):
            reading.counts.dropped_equal += 1
        else:
            pairs.append(pair)
    return reading.whole(pairs, "pair")


def load_prompts(
    source: str, split: str | None = None, *, limit: int | None = None, repeated: Repeated = None
) -> tuple[Dataset, Counts]:
    """Prompts to sample for: id, prompt, prompt_ids, chosen (a response to compare with, or None), tools, facts, where.

    Reads prompt files, SFT examples and pairs alike. A prompt that comes again is used once, with the first row's
    response: intervals over prompts need different prompts. Errors as `load_pairs`.
    """
    reading = Reading(source, KNOWN_COLUMNS, repeated)
    prompts: dict[str, Row] = {}
    for prompt in reading.canonical(*opened(source, split, "prompts", limit=limit), canonical_prompt):
        if prompts.setdefault(prompt_key(prompt), prompt) is not prompt:
            reading.counts.repeated_prompts += 1
    return reading.whole(list(prompts.values()), "prompt")


def load_sft(
    source: str, split: str | None = None, *, limit: int | None = None, repeated: Repeated = None
) -> tuple[Dataset, Counts]:
    """SFT examples: id, prompt (None for plain text and whole conversations), completion, tools, where. Errors: `load_pairs`."""
    reading = Reading(source, SFT_COLUMNS, repeated)
    return reading.whole(list(reading.canonical(*opened(source, split, "sft", limit=limit), canonical_sft)), "example")


class Reading:
    """One reading of a source, and what is noticed on the way.

    columns: those that this purpose reads; the others are named in `counts.unread`, and recipes know their own.
    """

    def __init__(self, name: str, columns: frozenset[str], repeated: Repeated) -> None:
        self.name, self.columns, self.repeated = name, columns, repeated
        self.counts = Counts()
        self.exempt = False  # a published data set, whose empty responses are known and dropped
        self._names: tuple[str, ...] = ()
        self._unread: dict[str, None] = {}
        self._no_response: Exception | None = None
        self._repeats: str = ""
        self._ids: dict[str, tuple[str, str]] = {}

    def canonical(self, place: Located, rows: Numbered, make: Callable[..., Row]) -> Iterator[Row]:
        """The rows as `make` (one of `pairs.canonical_*`) gives them, without those that are dropped."""
        counts = self.counts
        self.exempt = place.convert is not None
        for row, where in rows:
            counts.rows += 1
            if place.convert is None:
                self._name_unread(row, sft=make is canonical_sft)
            before = counts.prompt_repeated
            try:
                made = make(place.row(row, where), where, divided(place.source)[0], self.repeated, counts)
            except (NoCommonPromptError, NoResponseError) as error:
                counts.drop(error)
                if isinstance(error, NoResponseError):
                    self._no_response = self._no_response or error
                continue
            if counts.prompt_repeated > before:
                self._repeats = self._repeats or where
            implied = isinstance(made["prompt"], str) and all(row.get(name) is None for name in PROMPT_NAMES)
            if make is not canonical_sft and not implied:
                self._check_id(made)
            yield made

    def whole(self, rows: list[Row], what: str) -> tuple[Dataset, Counts]:
        """The rows as a Dataset, with the counts, once all are read. Raises UserError where too much is wrong with them."""
        counts = self.counts
        counts.kept, counts.unread = len(rows), tuple(self._unread)
        if self._no_response is not None and not self.exempt and counts.dropped_no_response > EMPTY_SHARE * counts.rows:
            raise UserError(
                f"{self._no_response} ({counts.dropped_no_response} of {counts.rows} rows are so; up to {EMPTY_SHARE:.0%} are "
                "dropped and counted)"
            )
        if self.repeated is None and self.columns is not KNOWN_COLUMNS and counts.prompt_repeated > counts.rows / 2:
            raise UserError(
                f"{self._repeats}: the responses begin with the prompt, in {counts.prompt_repeated} of {counts.rows} rows: it "
                "would be read twice; set --data.prompt_repeated (PreferenceConfig: prompt_repeated) to strip, which takes it "
                "off the responses, or to keep"
            )
        if counts.spoken:  # what one row's columns say of the file is true of all its texts
            texts = [row for row in rows if isinstance(row["prompt"], str) and row.get("prompt_ids") is None]
            for row in texts:
                as_conversation(row)
                row.pop(SPOKEN)
            counts.spoken += len(texts)
        if not rows:
            raise UserError(f"{self.name}: no {what} is left: {'; '.join(counts.lines())}")
        return as_dataset(rows), counts

    def _name_unread(self, row: Mapping[str, Any], sft: bool) -> None:
        names = tuple(row)
        if self.columns is not KNOWN_COLUMNS:
            self._unread |= dict.fromkeys(competing(row, sft))
        if names != self._names:
            self._names = names
            read = self.columns | {"where"} | (frozenset(ALPACA) if is_alpaca(row) else frozenset())
            self._unread |= dict.fromkeys(str(name) for name in names if name not in read)

    def _check_id(self, row: Row) -> None:
        """Records go by id: one that stands for two prompts would mix them up."""
        key = digest(prompt_key(row)) if row["prompt"] is not None else ""
        first, where = self._ids.setdefault(row["id"], (key, row["where"]))
        if first != key:
            raise UserError(
                f"{row['where']}: id {row['id']!r} stands for another prompt at {where}; make ids unique, or remove the column"
            )


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
        raise UserError("the data has one prompt, so none can be held out; give --data.eval_pairs, or --data.eval_fraction 0")
    held = set(order[: min(len(order) - 1, math.ceil(fraction * len(order)))])
    sides = [[i for i, key in enumerate(keys) if (key in held) == side] for side in (False, True)]
    return rows.select(sides[0]), rows.select(sides[1])


def prompt_key(row: Mapping[str, Any]) -> str:
    """What tells prompts apart: the token ids where there are any, for they win over the text; else text and tools."""
    if row.get("prompt_ids") is not None:
        return json.dumps(row["prompt_ids"])
    beside = [row[name] for name in TEMPLATE_COLUMNS if row.get(name)]
    return json.dumps([row["prompt"], *beside] if beside else row["prompt"], ensure_ascii=False)


def common_prompts(train: Dataset | Iterable[Mapping[str, Any]], held: Dataset | Iterable[Mapping[str, Any]]) -> int:
    """How many different prompts are in both, as `prompt_key` tells them apart: text and messages never agree."""
    return len(_prompt_keys(train) & _prompt_keys(held))


def _prompt_keys(rows: Any) -> set[str]:
    return {prompt_key(row) for row in _prompts_alone(rows)}


def _prompts_alone(rows: Any) -> Any:
    """The rows without what `prompt_key` does not look at: responses need not be decoded."""
    if not hasattr(rows, "select_columns"):
        return rows
    return rows.select_columns([name for name in ("prompt", "prompt_ids", *TEMPLATE_COLUMNS) if name in rows.column_names])


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
