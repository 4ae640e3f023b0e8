"""What a stage will read, without training: rows kept and dropped, lengths, cuts, and what templates and BOS do to them.

Counts over all rows are those that training makes, from the same functions. What needs the uncut text (lengths before any
cut, special tokens inside texts) is taken from at most `SAMPLE` rows, evenly spread.

Legend: N rows, M sampled rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from isdaa.config import Config
from isdaa.data.chat import ChatFormat, stop_token_ids
from isdaa.data.checks import Text
from isdaa.data.encoder import UNCUT, Encoder, token_settings
from isdaa.data.pairs import Counts
from isdaa.data.reading.sources import load_prompts, load_sft
from isdaa.data.tokenize_pairs import tokenize_pairs, tokenize_prompts, tokenize_sft
from isdaa.errors import UserError
from isdaa.preview.token_view import Shown, shown_example, shown_pair, shown_prompt
from isdaa.training.stage_inputs import uses_behaviour
from isdaa.training.stages.pair_split import read_pairs
from isdaa.training.stages.starting_weights import unmeasured
from isdaa.training.trainer.authors import ASSUMED, naming_columns, not_drawn, takes_reference_for_author
from isdaa.training.trainer.batches import TokenisedPairs

SAMPLE = 20_000
SOUGHT = 2_000  # rows looked through for one whose tokens would merge across the boundary
DATE = "isdaa-looked-at-the-clock"

Row = Mapping[str, Any]


@dataclass
class PartLengths:
    """Tokens of one part of the rows, before any cut. lengths: (M,); limit: where the part is cut, None where at no fixed
    place; cut: (M,) whether it is."""

    name: str
    lengths: np.ndarray
    cut: np.ndarray
    limit: int | None = None

    def facts(self) -> dict[str, Any]:
        """Plain numbers for a file."""
        low, middle, high = (float(np.percentile(self.lengths, q)) for q in (5, 50, 95))
        return {
            "part": self.name,
            "rows": len(self.lengths),
            "mean": round(float(self.lengths.mean()), 2),
            "percentiles": {"5": low, "50": middle, "95": high},
            "longest": int(self.lengths.max()),
            "limit": self.limit,
            "cut": int(self.cut.sum()),
        }


@dataclass
class Examined:
    """What is known of a stage's rows.

    lengths: (N, k) tokens after all cuts of a row's parts: prompt, chosen, rejected for pairs (k = 3), the whole example
        for SFT and the prompt for sampling (k = 1). learnt: mean share of an SFT example's tokens that is learnt.
    groups: (N,) the number of each pair's prompt.
    found: what the texts hold, by name; see `FOUND`. sampled: the M rows that it was looked for in.
    assumed: not empty where the rows do not exist yet: what they are taken to be like.
    """

    stage: str
    source: str
    counts: Counts
    lengths: np.ndarray
    parts: list[PartLengths] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    found: dict[str, int] = field(default_factory=dict)
    sampled: int = 0
    groups: np.ndarray | None = None
    ended: float | None = None
    different_prompts: int | None = None
    learnt: float | None = None
    held_out: int = 0
    held_lengths: np.ndarray | None = None
    highest_id: int = 0
    merge: str | None = None
    notes: list[str] = field(default_factory=list)
    assumed: str = ""

    def facts(self) -> dict[str, Any]:
        """Plain data for a file."""
        counts = asdict(self.counts)
        return {
            "stage": self.stage,
            "source": self.source,
            "rows": {**counts, "lines": self.counts.lines()},
            "assumed": self.assumed or None,
            "held_out": self.held_out,
            "different_prompts": self.different_prompts,
            "tokens_after_cuts": int(self.lengths.sum()),
            "lengths": [part.facts() for part in self.parts],
            "responses_that_end": self.ended,
            "learnt": self.learnt,
            "sampled": self.sampled,
            "found": self.found,
            "merge": self.merge,
            "notes": self.notes,
            "shown": [shown.facts() for shown in self.shown],
        }


# What `found` counts, in words.
FOUND = {
    "special_in_chat": "rows have special tokens in messages: was a chat template applied already?",
    "special_in_text": "rows have special tokens in plain text: no chat template is applied to them",
    "bos_inside": "prompts have a BOS token inside: was a template applied twice?",
    "eos_inside": "responses have an end token before their end: what follows it is trained on, too",
}


def examine(stage: str, config: Config, tokenizer: Any, source: str, cache: Path, row: int = 0) -> Examined:
    """Read and tokenise a stage's rows as training will. `row`: which of the kept rows is shown.

    Raises UserError as the stage would, and where there is no such row.
    """
    return {"sft": _sft, "label": _label, "reward": _pairs, "align": _pairs}[stage](stage, config, tokenizer, source, cache, row)


def _pairs(stage: str, config: Config, tokenizer: Any, source: str, cache: Path, row: int) -> Examined:
    read = read_pairs(config, source)
    behaviour = stage == "align" and uses_behaviour(config)
    tokens, more = tokenize_pairs(read.rows, tokenizer, token_settings(config.tokenization), cache_dir=cache, behaviour=behaviour)
    counts = read.counts + more
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    columns = {name: _column(tokens, name) for name in names}
    result = Examined(stage, source, counts, np.stack([lengths for _, lengths in columns.values()], 1))
    result.highest_id = max(int(np.maximum(ids, ~ids).max()) for ids, _ in columns.values())
    prompts, lengths = columns["prompt_ids"]
    numbers: dict[bytes, int] = {}
    parts = np.split(prompts, np.cumsum(lengths)[:-1])
    result.groups = np.array([numbers.setdefault(part.tobytes(), len(numbers)) for part in parts])
    result.different_prompts = len(numbers)
    if read.held is not None:
        held, _ = tokenize_pairs(read.held, tokenizer, token_settings(config.tokenization), cache_dir=cache, behaviour=behaviour)
        result.held_out = len(held)
        result.held_lengths = np.stack([_column(held, name)[1] for name in names], 1)
    if behaviour and takes_reference_for_author(config, pairs := TokenisedPairs(tokens)):
        result.notes += naming_columns(counts) or [ASSUMED]
    elif behaviour:
        result.notes.append(unmeasured(config, pairs))
    if stage == "align":
        result.notes += not_drawn(config.objective.arguments(), counts)
    if read.common:
        result.notes.append(f"{read.common} prompts are in both training and held-out pairs")
    chat = _chat(read.rows, "prompt")
    stops = stop_token_ids(tokenizer, chat and bool(tokenizer.chat_template))
    ended = np.stack([_last(*columns[name], stops) for name in names[1:]], 1)
    result.ended = float(ended.mean())
    if stage == "reward" and chat and tokenizer.chat_template:  # read to the end of the template's output
        form = ChatFormat(tokenizer, given=config.tokenization.chat_template_kwargs)
        longer = result.lengths[:, 1:] + ended * (len(form.tail_ids) - (form.stop_id is None))
        result.lengths[:, 1:] = np.minimum(longer, config.tokenization.max_length - result.lengths[:, :1])
    result.found["eos_inside"] = sum(int((~_only_last(*columns[name], stops)).sum()) for name in names[1:])
    result.found["bos_inside"] = 0 if chat else _bos_inside(*columns["prompt_ids"], tokenizer)
    uncut = _uncut(
        read.rows, tokenizer, config, lambda encoder, rows: [(p.prompt.ids, p.chosen, p.rejected) for p in encoder.pairs(rows)]
    )
    _add_texts(result, read.rows, tokenizer, ("prompt", "chosen", "rejected"))
    settings = config.tokenization
    prompt, room = uncut[:, 0], settings.max_length - np.minimum(uncut[:, 0], settings.max_prompt_length)
    result.parts = [
        PartLengths("prompt", prompt, prompt > settings.max_prompt_length, settings.max_prompt_length),
        PartLengths("chosen", uncut[:, 1], uncut[:, 1] > room),
        PartLengths("rejected", uncut[:, 2], uncut[:, 2] > room),
    ]
    both = np.minimum(prompt, settings.max_prompt_length) + uncut[:, 1:].max(1)
    result.parts.append(PartLengths("prompt + longer response", both, both > settings.max_length, settings.max_length))
    result.shown = [shown_pair(_row(tokens, row, "pair"), tokenizer, stops)]
    if counts.boundary_merges:
        result.merge = _merge(read.rows, tokenizer, config, ("chosen", "rejected"))
    return result


def _sft(stage: str, config: Config, tokenizer: Any, source: str, cache: Path, row: int) -> Examined:
    rows, counts = load_sft(source, config.data.sft_split, limit=config.data.limit, repeated=config.data.prompt_repeated)
    tokens, more = tokenize_sft(rows, tokenizer, token_settings(config.tokenization), cache_dir=cache)
    ids, lengths = _column(tokens, "input_ids")
    mask, _ = _column(tokens, "completion_mask")
    result = Examined(stage, source, counts + more, lengths[:, None], highest_id=int(ids.max()))
    result.learnt = float(mask.mean())
    chat = _chat(rows, "completion")
    stops = stop_token_ids(tokenizer, chat and bool(tokenizer.chat_template))
    result.ended = float(_last(ids, lengths, stops).mean())
    result.found["bos_inside"] = 0 if chat else _bos_inside(ids, lengths, tokenizer)
    whole = _uncut(rows, tokenizer, config, lambda encoder, some: [(e[0],) for row in encoder.examples(some) for e in row])[:, 0]
    limit = config.tokenization.max_length
    _add_texts(result, rows, tokenizer, ("prompt", "completion"))
    result.parts = [PartLengths("example", whole, whole > limit, limit)]
    result.shown = [shown_example(_row(tokens, row, "example"), tokenizer, stops)]
    if result.counts.boundary_merges:
        result.merge = _merge(rows, tokenizer, config, ("completion",))
    return result


def _label(stage: str, config: Config, tokenizer: Any, source: str, cache: Path, row: int) -> Examined:
    rows, counts = load_prompts(source, config.data.prompts_split, limit=config.data.limit, repeated=config.data.prompt_repeated)
    ids, more = tokenize_prompts(rows, tokenizer, token_settings(config.tokenization))
    lengths = np.array([len(prompt) for prompt in ids])
    result = Examined(stage, source, counts + more, lengths[:, None], highest_id=max(max(prompt) for prompt in ids))
    flat = np.concatenate([np.asarray(prompt, np.int64) for prompt in ids])
    result.found["bos_inside"] = 0 if _chat(rows, "prompt") else _bos_inside(flat, lengths, tokenizer)
    prompt = _uncut(rows, tokenizer, config, lambda encoder, some: [(p.ids,) for p in encoder.prompts(some)])[:, 0]
    limit = config.tokenization.max_prompt_length
    _add_texts(result, rows, tokenizer, ("prompt",))
    result.parts = [PartLengths("prompt", prompt, prompt > limit, limit)]
    if not 0 <= row < len(ids):
        raise UserError(f"--row {row}: there are {len(ids)} prompts, numbered from 0")
    result.shown = [shown_prompt(rows[row]["id"], ids[row], row, tokenizer)]
    return result


def written_by_label(config: Config, tokenizer: Any, prompts: Examined, cache: Path) -> Examined:
    """What `label` will write, before it has: so many pairs, with responses as long as the ones that the data has.

    Lengths come from the responses beside the prompts, else from `data.sft`, else they are `label.max_new_tokens`.
    """
    label = config.label
    source = config.data.source("prompts")
    assert source is not None
    rows, _ = load_prompts(source, config.data.prompts_split, limit=config.data.limit, repeated=config.data.prompt_repeated)
    most = min(label.max_new_tokens, config.tokenization.max_length - int(prompts.lengths.max()))
    known = [row for row in _spread(rows) if row.get("chosen") is not None]
    if known:
        encoder = Encoder(tokenizer, token_settings(config.tokenization))
        lengths = np.array([len(response.ids) for _, (response,) in encoder.answered(known, ("chosen",))])
        like = "the responses in the prompts' file"
    else:
        lengths, like = np.array([most]), f"label.max_new_tokens ({most} tokens each)"
    lengths = np.minimum(lengths, most)
    pairs = label.samples // 2 if label.pairing == "random" else 1
    count = len(prompts.lengths) * pairs
    held = round(count * config.data.eval_fraction) if config.data.eval_pairs is None else 0
    drawn = np.random.default_rng(0).choice(lengths, (count, 2))
    every = np.concatenate([np.repeat(prompts.lengths, pairs, axis=0), drawn], 1)
    result = Examined(
        "align", "pairs that the label stage will write", Counts(rows=count - held, kept=count - held), every[held:]
    )
    result.held_out, result.held_lengths = held, every[:held] if held else None
    result.highest_id, result.different_prompts = prompts.highest_id, (count - held) // pairs
    result.groups = np.repeat(np.arange(len(prompts.lengths)), pairs)[held:]
    if label.pairing == "best_worst" and "align" in config.stages:
        result.notes += not_drawn(config.objective.arguments(), Counts(best_worst=count - held))
    result.assumed = f"not written yet; assumed: {count:,} pairs with responses as long as {like}"
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Columns of token ids: ids (ΣT,) and lengths (N,)


def _column(tokens: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    lists = tokens.with_format("arrow")[:][name].combine_chunks()
    offsets = lists.offsets.to_numpy()
    return lists.values.to_numpy()[offsets[0] : offsets[-1]], np.diff(offsets)


def _last(ids: np.ndarray, lengths: np.ndarray, stops: set[int]) -> np.ndarray:
    """(N,) whether a row's last token ends it."""
    return np.isin(ids[np.cumsum(lengths) - 1], list(stops))


def _only_last(ids: np.ndarray, lengths: np.ndarray, stops: set[int]) -> np.ndarray:
    """(N,) whether no token but the last one is an end. Responses of several messages, which hold unscored ones, have several."""
    ends = np.isin(ids, list(stops))
    ends[np.cumsum(lengths) - 1] = False
    starts = np.cumsum(lengths) - lengths
    return (np.add.reduceat(ends, starts) == 0) | (np.minimum.reduceat(ids, starts) < 0)


def _bos_inside(ids: np.ndarray, lengths: np.ndarray, tokenizer: Any) -> int:
    """Rows with BOS behind their first place. Of a tokenizer whose BOS is also its EOS, nothing is said."""
    bos = tokenizer.bos_token_id
    if bos is None or bos in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        return 0
    found = ids == bos
    found[np.cumsum(lengths) - lengths] = False
    return int((np.add.reduceat(found, np.cumsum(lengths) - lengths) > 0).sum())


def _row(tokens: Any, row: int, what: str) -> Row:
    if not 0 <= row < len(tokens):
        raise UserError(f"--row {row}: there are {len(tokens)} {what}s, numbered from 0")
    return tokens[row]


# ---------------------------------------------------------------------------------------------------------------------
# A sample of the texts


def _spread(rows: Any, most: int = SAMPLE) -> list[Row]:
    """At most so many rows, evenly spread over all."""
    if len(rows) > most:
        rows = rows.select(np.linspace(0, len(rows) - 1, most).astype(int).tolist())
    return list(rows)


def _uncut(
    rows: Any, tokenizer: Any, config: Config, encode: Callable[[Encoder, Sequence[Row]], list[tuple[list[int], ...]]]
) -> np.ndarray:
    """(M, k) tokens of the parts of sampled rows, nothing cut."""
    encoder = _uncutting(tokenizer, config)
    sample = _spread(rows)
    found = [lengths for start in range(0, len(sample), 1000) for lengths in encode(encoder, sample[start : start + 1000])]
    return np.array([[len(part) for part in parts] for parts in found])


def _add_texts(result: Examined, rows: Any, tokenizer: Any, columns: Sequence[str]) -> None:
    """Count rows whose texts or messages hold the tokenizer's special tokens."""
    special = sorted({str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}, key=len, reverse=True)
    sample = _spread(rows)
    result.sampled = len(sample)
    result.found |= {"special_in_chat": 0, "special_in_text": 0}
    if not special:
        return
    pattern = re.compile("|".join(map(re.escape, special)))
    for row in sample:
        kinds = {_kind(row[name], pattern) for name in columns if row.get(name) is not None}
        for kind in kinds - {None}:
            result.found[str(kind)] += 1


def _kind(text: Text, pattern: re.Pattern[str]) -> str | None:
    if isinstance(text, str):
        return "special_in_text" if pattern.search(text) else None
    return "special_in_chat" if any(pattern.search(message["content"]) for message in text) else None


def _uncutting(tokenizer: Any, config: Config) -> Encoder:
    return Encoder(tokenizer, replace(UNCUT, chat_template_kwargs=config.tokenization.chat_template_kwargs))


def _chat(rows: Any, column: str) -> bool:
    """Whether any of the first rows is a conversation."""
    return any(isinstance(value, list) for value in rows[: min(len(rows), 1000)][column])


def _merge(rows: Any, tokenizer: Any, config: Config, names: Sequence[str]) -> str | None:
    """An example of a token that spans prompt and response in the whole text: the tokens on both sides of the boundary."""
    for row in _spread(rows, SOUGHT):
        for name in names:
            encoder = _uncutting(tokenizer, config)
            if row.get("prompt") is None or row.get(f"{name}_ids") is not None:
                continue
            prompt, (response,) = encoder.answered([row], (name,))[0]
            if encoder.counts.boundary_merges:
                before, after = (tokenizer.decode(part) for part in (prompt.ids[-1:], response.ids[:1]))
                return f"{before!r} and {after!r}, row {row.get('where') or row.get('id')}"
    return None


def writes_date(tokenizer: Any) -> bool:
    """Whether the chat template looks at the clock: tokens then depend on the day."""
    template = tokenizer.chat_template
    if not template or "strftime_now" not in str(template):
        return False
    question = [{"role": "user", "content": "question"}]
    try:
        text = tokenizer.apply_chat_template(question, tokenize=False, strftime_now=lambda form: DATE)
    except Exception:  # a template raises whatever it likes; that it names the clock is enough then
        return True
    return DATE in text
