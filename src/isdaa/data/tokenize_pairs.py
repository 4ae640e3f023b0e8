"""Text to token ids: one prompt a pair, BOS once, EOS where the response ended, every cut counted.

A response's ids are those that follow its prompt's in the tokenisation of both together; no ids are decoded and encoded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isdaa.data.chat import ending_ids, stop_token_ids, template_hash, tokenizer_digest
from isdaa.data.checks import Text
from isdaa.data.encoder import Encoder, PairIds, TokenizationSettings, pair_digest
from isdaa.data.pairs import Counts, Row
from isdaa.data.token_cache import tokenized
from isdaa.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

BEHAVIOUR = ("behaviour_chosen_logps", "behaviour_rejected_logps")
__all__ = [
    "Encoder",
    "TokenizationSettings",
    "ending_ids",
    "stop_token_ids",
    "template_hash",
    "tokenize_pairs",
    "tokenize_prompt",
    "tokenize_prompts",
    "tokenize_response",
    "tokenize_sft",
    "tokenizer_digest",
]


def tokenize_pairs(
    pairs: Dataset,
    tokenizer: Any,
    settings: TokenizationSettings | None = None,
    cache_dir: str | Path | None = None,
    behaviour: bool = True,
    whole: bool = False,
) -> tuple[Dataset, Counts]:
    """Canonical pairs (`load_pairs`) to token ids, and the counts of what was cut or dropped on the way.

    Returns a Dataset with id, index (row number), prompt_ids, chosen_ids, rejected_ids (EOS included where the response
    ended), behaviour_chosen_logps, behaviour_rejected_logps and weight (None where a row has none).
    cache_dir: folder in which the result is kept under a key of its content; a damaged file there is made anew.
    behaviour: whether the rows' own behaviour logps will be used: rows with them that would be cut are dropped then.
    whole: responses that ended go on to the end of the chat template's output, where reward models are read.
    Raises UserError for a tokenizer without EOS, a missing or unusable chat template, foreign ids, no pair left.
    """
    encoder = Encoder(tokenizer, settings, whole=whole)

    def columns(rows: list[Row]) -> dict[str, list[Any]]:
        kept: list[tuple[Row, PairIds]] = []
        for row, pair in zip(rows, encoder.pairs(rows), strict=True):
            if pair.chosen == pair.rejected:
                encoder.count(dropped_equal=1)
            elif (
                behaviour
                and row["behaviour_chosen_logps"] is not None
                and (pair.prompt.cut or pair.chosen_cut or pair.rejected_cut)
            ):
                encoder.count(dropped_behaviour_cut=1)
            else:
                stated = row.get("behaviour_tokens") if behaviour else None
                if stated is not None and stated != pair_digest(pair.prompt.ids, pair.chosen, pair.rejected):
                    raise UserError(
                        f"{row.get('where', 'row')}: its behaviour logps are of other tokens (another tokenizer, template, "
                        "setting or version); compute them again with `isdaa logps` and this run's settings"
                    )
                kept.append((row, pair))
        encoder.count(
            prompts_cut=sum(pair.prompt.cut for _, pair in kept),
            chosen_cut=sum(pair.chosen_cut for _, pair in kept),
            rejected_cut=sum(pair.rejected_cut for _, pair in kept),
        )
        return {
            "id": [row["id"] for row, _ in kept],
            "prompt_ids": [pair.prompt.ids for _, pair in kept],
            "chosen_ids": [pair.chosen for _, pair in kept],
            "rejected_ids": [pair.rejected for _, pair in kept],
            **{name: [row[name] if behaviour else None for row, _ in kept] for name in BEHAVIOUR},
            "weight": [row["weight"] for row, _ in kept],
        }

    return tokenized(pairs, columns, encoder, ["pairs", behaviour, *encoder.key], cache_dir, "pairs")


def tokenize_prompts(
    rows: Iterable[Mapping[str, Any]], tokenizer: Any, settings: TokenizationSettings | None = None
) -> tuple[list[list[int]], Counts]:
    """Token ids of prompts (rows with `prompt` or `prompt_ids`), ready to be continued; in order, none dropped."""
    encoder = Encoder(tokenizer, settings)
    rows = list(rows)
    prompts = encoder.prompts(rows)
    encoder.counts.rows = encoder.counts.kept = len(rows)
    encoder.counts.prompts_cut = sum(prompt.cut for prompt in prompts)
    return [prompt.ids for prompt in prompts], encoder.counts


def tokenize_prompt(row: Mapping[str, Any], tokenizer: Any, settings: TokenizationSettings | None = None) -> list[int]:
    """Token ids of one row's prompt as in a pair: with BOS or the opened assistant turn, and cut the same way."""
    return tokenize_prompts([row], tokenizer, settings)[0][0]


def tokenize_response(
    prompt: Text, response: Text, tokenizer: Any, settings: TokenizationSettings | None = None, finished: bool = True
) -> list[int]:
    """Token ids of a response to `prompt`, as in a pair: EOS where it ended, cut to the room that the prompt leaves."""
    encoder = Encoder(tokenizer, settings)
    row = {"prompt": prompt, "response": response, "response_finished": finished}
    return encoder.answered([row], ("response",))[0][1][0].ids


def tokenize_sft(
    rows: Dataset, tokenizer: Any, settings: TokenizationSettings | None = None, cache_dir: str | Path | None = None
) -> tuple[Dataset, Counts]:
    """SFT rows (`load_sft`) to a Dataset of id, index, input_ids, completion_mask (1: to be learnt), as TRL reads it.

    A prompt with one answer is tokenised as in a pair. Of a longer conversation every assistant turn is learnt, in one example or
    in several (`Encoder.examples`); what is beyond max_length is cut off its end; plain text is learnt whole. EOS and cache as in
    `tokenize_pairs`.
    """
    encoder = Encoder(tokenizer, settings)

    def columns(batch: list[Row]) -> dict[str, list[Any]]:
        kept = []
        for row, examples in zip(batch, encoder.examples(batch), strict=True):
            found = [
                (row["id"] if turn == 0 else f"{row['id']} part {turn + 1}", ids, mask)
                for turn, (ids, mask) in enumerate(examples)
                if any(mask)
            ]
            encoder.count(dropped_nothing_left=not found, turns_apart=max(0, len(found) - 1))
            kept += found
        return {
            "id": [name for name, _, _ in kept],
            "input_ids": [ids for _, ids, _ in kept],
            "completion_mask": [mask for _, _, mask in kept],
        }

    return tokenized(rows, columns, encoder, ["sft", *encoder.key], cache_dir, "examples")
