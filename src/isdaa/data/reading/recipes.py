"""Recipes for the data sets of the paper: Hub name, splits, columns, and how a row of each becomes one that `pairs` reads.

A source `tldr`, `hh`, `hh_chat`, `ultrafeedback` or `ultrachat` means the data set on the Hub; `hh:/data/hh` means a local
folder or file of the same columns. What a row is read for (pairs, prompts, sft) decides which data set, which split and which
columns are meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from isdaa.data.checks import Message, Text, check_messages, check_text
from isdaa.data.implied import NoCommonPromptError, NoResponseError, last_turn
from isdaa.data.pairs import Row
from isdaa.data.reading.readers import has_split
from isdaa.errors import UserError, nearest

Purpose = Literal["pairs", "prompts", "sft"]
Convert = Callable[[Mapping[str, Any], str], Row]

# The TL;DR sets were written for another tokenizer, whose EOS and padding stand in their texts.
FOREIGN_TOKENS = ("<|endoftext|>", "[PAD]")
QUERY = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


@dataclass(frozen=True)
class RecipeSource:
    """What a recipe reads for one purpose. splits: what `train`, `validation` and `test` are called there, where not so."""

    hub: str
    splits: Mapping[str, str]
    convert: Convert


@dataclass(frozen=True)
class Located:
    """Where rows come from, and what makes each of them readable; `convert` is None where the source is no recipe."""

    source: str
    split: str | None
    convert: Convert | None = None
    columns: frozenset[str] = frozenset()

    def row(self, row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """The row as `pairs` reads it. Raises NoResponseError, NoCommonPromptError: dropped and counted; UserError."""
        return row if self.convert is None else self.convert(row, where)


def located(source: str, split: str | None, purpose: Purpose) -> Located:
    """What a source stands for when it is read for a purpose. A stand-in may call its splits plainly `train` and `test`.

    Raises UserError for a recipe that has nothing for this purpose, for a name that is also a file or folder here, and for a
    single word that is neither.
    """
    name, colon, place = source.partition(":")
    if name not in RECIPES:
        if re.fullmatch(r"\w+", source) and not Path(source).exists():
            hint = nearest(source, [*RECIPES, *(path.name for path in Path().iterdir())])
            raise UserError(
                f"{source}: no such file or folder, and no data recipe{hint}; give a path, a Hub name (owner/name), world:small "
                f"or one of {', '.join(RECIPES)}"
            )
        return Located(source, split)
    if purpose not in RECIPES[name]:
        able = " and ".join(f"data.{key}" for key in RECIPES[name])
        raise UserError(f"{source}: the recipe '{name}' has no preference pairs; it is for {able}")
    part = RECIPES[name][purpose]
    own = part.splits.get(split or "train", split or "train")
    if not colon:
        if Path(name).exists():
            raise UserError(f"{name}: a data recipe and also a file or folder here; write ./{name} for that, or rename it")
        return Located(part.hub, own, part.convert, COLUMNS)
    path = Path(place).expanduser()
    if not place or not path.exists():
        raise UserError(f"{source}: {place or 'the path'} is not there; give {name}:PATH, or {name} for the Hub's data set")
    return Located(place, own if has_split(path, own) else split or "train", part.convert, COLUMNS)


# --- TL;DR: posts and summaries as plain text


def _tldr_pair(row: Mapping[str, Any], where: str) -> Row:
    if row.get("chosen") is None and row.get("summaries") is not None:  # OpenAI's own form
        summaries, choice = row["summaries"], row.get("choice")
        if choice not in (0, 1) or len(summaries) != 2:
            raise UserError(f"{where}: column 'choice' must be 0 or 1, the better one of two 'summaries', not {choice!r}")
        row = {**row, "chosen": summaries[choice].get("text"), "rejected": summaries[1 - choice].get("text")}
    return {"prompt": _query(row, where), **{name: _summary(row, name, where) for name in ("chosen", "rejected")}}


def _tldr_example(row: Mapping[str, Any], where: str) -> Row:
    name = next((name for name in ("summary", "reference_response") if row.get(name) is not None), "summary")
    return {"prompt": _query(row, where), "completion": _summary(row, name, where)}


def _tldr_prompt(row: Mapping[str, Any], where: str) -> Row:
    """A post with its summary, or, where the file holds pairs, with the better one."""
    if any(row.get(name) is not None for name in ("summary", "reference_response")):
        example = _tldr_example(row, where)
        return {"prompt": example["prompt"], "chosen": example["completion"]}
    pair = _tldr_pair(row, where)
    return {"prompt": pair["prompt"], "chosen": pair["chosen"]}


def _query(row: Mapping[str, Any], where: str) -> str:
    """The published `query`, in which long posts were cut between paragraphs; else made of the post's own columns."""
    if row.get("query") is None:
        post = row.get("info") or row
        if all(post.get(name) is not None for name in ("subreddit", "title", "post")):
            return QUERY.format(**{name: post[name] for name in ("subreddit", "title", "post")})
    return _without_foreign(_text(row, "query", where))


def _summary(row: Mapping[str, Any], column: str, where: str) -> str:
    text = row.get(column)
    if isinstance(text, str) and not _without_foreign(text):
        raise NoResponseError(f"{where}: column '{column}' holds no summary")
    return " " + _without_foreign(_text(row, column, where))


def _without_foreign(text: str) -> str:
    text = text.strip()
    while text.startswith(FOREIGN_TOKENS) or text.endswith(FOREIGN_TOKENS):
        for token in FOREIGN_TOKENS:
            text = text.removeprefix(token).removesuffix(token).strip()
    return text


# --- HH: dialogues as text, the last turn of the assistant being the response


def _hh_pair(row: Mapping[str, Any], where: str) -> Row:
    chosen, rejected = _hh_turn(row, "chosen", where), _hh_turn(row, "rejected", where)
    if chosen[0] != rejected[0]:
        raise NoCommonPromptError(
            f"{where}: the dialogues differ before the assistant's last turn, so they have no common prompt"
        )
    return {"prompt": chosen[0], "chosen": chosen[1], "rejected": rejected[1]}


def _hh_prompt(row: Mapping[str, Any], where: str) -> Row:
    prompt, chosen = _hh_turn(row, "chosen", where)
    return {"prompt": prompt, "chosen": chosen}


def _hh_example(row: Mapping[str, Any], where: str) -> Row:
    prompt, chosen = _hh_turn(row, "chosen", where)
    return {"prompt": prompt, "completion": chosen}


def _hh_turn(row: Mapping[str, Any], column: str, where: str) -> tuple[str, str]:
    """(the dialogue through the last 'Assistant:', what the assistant says then), of either published form."""
    if isinstance(row.get(column), str) and not row[column].strip():
        raise NoResponseError(f"{where}: column '{column}' is empty")
    text = _text(row, column, where)
    if row.get("prompt") is not None:
        prompt = _text(row, "prompt", where).rstrip()
        response = text.removeprefix(row["prompt"]).removeprefix(prompt)
        if not response.strip():
            raise NoResponseError(f"{where}: column '{column}' has an empty last turn")
        return prompt, " " + response.strip()
    return last_turn(text, column, where)


def _as_chat(convert: Convert) -> Convert:
    """The same rows as messages."""

    def chat(row: Mapping[str, Any], where: str) -> Row:
        plain = convert(row, where)
        answers: Row = {k: [{"role": "assistant", "content": v.strip()}] for k, v in plain.items() if k != "prompt"}
        return {"prompt": _dialogue(plain["prompt"], where), **answers}

    return chat


def _dialogue(text: str, where: str) -> list[Message]:
    """The turns of a text with Human: and Assistant:, but not the open one at its end; a speaker's turns in a row become one."""
    opening, *rest = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    turns: list[Message] = []
    if opening.strip():
        turns.append({"role": "user", "content": opening.strip()})
    for speaker, words in zip(rest[::2], rest[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1]["role"] == role:
            turns[-1] = {"role": role, "content": f"{turns[-1]['content']}\n\n{words.strip()}".strip()}
        else:
            turns.append({"role": role, "content": words.strip()})
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    if not turns or not any(turn["content"] for turn in turns):
        raise NoResponseError(f"{where}: the dialogue has no turn before the assistant's last one")
    return turns


# --- UltraFeedback and UltraChat: conversations


def _ultrafeedback_pair(row: Mapping[str, Any], where: str) -> Row:
    """The conversations say all; the column `prompt`, the first question once more, is not read."""
    chosen, rejected = _conversation(row, "chosen", where), _conversation(row, "rejected", where)
    scores = {f"{side}_reward": row.get(f"score_{side}") for side in ("chosen", "rejected")}
    return {"chosen": chosen, "rejected": rejected, **scores}


def _ultrafeedback_prompt(row: Mapping[str, Any], where: str) -> Row:
    chosen = _conversation(row, "chosen", where)
    return {"prompt": chosen[:-1], "chosen": chosen[-1:]}


def _ultrafeedback_example(row: Mapping[str, Any], where: str) -> Row:
    return {"messages": _conversation(row, "chosen", where)}


def _ultrachat(row: Mapping[str, Any], where: str) -> Row:
    return {"messages": _conversation(row, "messages", where)}


def _conversation(row: Mapping[str, Any], column: str, where: str) -> list[Message]:
    if column not in row or row[column] is None:
        check_text(row, column, where)  # says what is wrong
    turns = row[column]
    if isinstance(turns, list) and turns and not any(isinstance(turn, Mapping) and turn.get("content") for turn in turns):
        raise NoResponseError(f"{where}: column '{column}' has only empty messages")
    turns = check_messages(turns, column, where)
    if turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip() or len(turns) < 2:
        raise NoResponseError(f"{where}: column '{column}' does not end with an answer of the assistant")
    return turns


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value: Text = check_text(row, column, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: column '{column}' must be text here, not a list of messages")
    return value


_TLDR = "vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144"
_TLDR_POSTS = "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144"
_HH, _HH_SPLITS = "Dahoas/full-hh-rlhf", {"validation": "test"}
_FEEDBACK, _CHAT = "HuggingFaceH4/ultrafeedback_binarized", "HuggingFaceH4/ultrachat_200k"
_PREFS = {"train": "train_prefs", "validation": "test_prefs", "test": "test_prefs"}
_SFT = {"train": "train_sft", "validation": "test_sft", "test": "test_sft"}

RECIPES: dict[str, dict[Purpose, RecipeSource]] = {
    "tldr": {
        "pairs": RecipeSource(_TLDR, {"test": "validation"}, _tldr_pair),
        "prompts": RecipeSource(_TLDR_POSTS, {}, _tldr_prompt),
        "sft": RecipeSource(_TLDR_POSTS, {}, _tldr_example),
    },
    "hh": {
        "pairs": RecipeSource(_HH, _HH_SPLITS, _hh_pair),
        "prompts": RecipeSource(_HH, _HH_SPLITS, _hh_prompt),
        "sft": RecipeSource(_HH, _HH_SPLITS, _hh_example),
    },
    "hh_chat": {
        "pairs": RecipeSource(_HH, _HH_SPLITS, _as_chat(_hh_pair)),
        "prompts": RecipeSource(_HH, _HH_SPLITS, _as_chat(_hh_prompt)),
        "sft": RecipeSource(_HH, _HH_SPLITS, _as_chat(_hh_example)),
    },
    "ultrafeedback": {
        "pairs": RecipeSource(_FEEDBACK, _PREFS, _ultrafeedback_pair),
        "prompts": RecipeSource(_FEEDBACK, _PREFS, _ultrafeedback_prompt),
        "sft": RecipeSource(_FEEDBACK, _SFT, _ultrafeedback_example),
    },
    "ultrachat": {"prompts": RecipeSource(_CHAT, _SFT, _ultrachat), "sft": RecipeSource(_CHAT, _SFT, _ultrachat)},
}
# What the recipes read beside `pairs.KNOWN_COLUMNS`; published columns of token ids stay undecoded.
COLUMNS = frozenset({"info", "summaries", "choice", "subreddit", "title", "post", "score_chosen", "score_rejected"})
