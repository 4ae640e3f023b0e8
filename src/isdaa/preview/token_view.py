"""A row token by token: which tokens the model is given, which it is scored on, where the response ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from isdaa.errors import shown as escaped

EDGE = 48  # tokens shown at each end of a long part
GIVEN, CHOSEN, REJECTED, LEARNT, END = "given", "chosen", "rejected", "learnt", "end"
# Two shades each, so that neighbours differ: the colours of chosen and rejected are told apart by the colour-blind, too.
SHADES = {
    GIVEN: ("grey78 on grey23", "grey78 on grey30"),
    CHOSEN: ("white on #1d4ed8", "white on #1e3a8a"),
    REJECTED: ("white on #b45309", "white on #92400e"),
    LEARNT: ("white on #1d4ed8", "white on #1e3a8a"),
    END: ("bold black on #facc15",) * 2,
}


@dataclass(frozen=True)
class Token:
    """One token. text: as it reads, with spaces and line breaks made visible; scored: whether the loss sees it."""

    id: int
    text: str
    scored: bool
    end: bool


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of one kind. name: what the row calls them; kind: a key of `SHADES`."""

    name: str
    kind: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Shown:
    """A row's spans, in the order in which the model reads them. title: which row it is."""

    title: str
    spans: tuple[Span, ...]

    def facts(self) -> dict[str, Any]:
        """Plain data for a file: every token, none left out."""
        spans = [
            {
                "name": span.name,
                "ids": [token.id for token in span.tokens],
                "tokens": [token.text for token in span.tokens],
                "scored": [token.scored for token in span.tokens],
                "ends": bool(span.tokens and span.tokens[-1].end),
            }
            for span in self.spans
        ]
        return {"title": self.title, "runs": spans}


def shown_pair(row: Mapping[str, Any], tokenizer: Any, stops: set[int]) -> Shown:
    """A tokenised pair (`tokenize_pairs`)."""
    spans = [_span("prompt", GIVEN, row["prompt_ids"], tokenizer, set())]
    for name, kind in (("chosen", CHOSEN), ("rejected", REJECTED)):
        spans.append(_span(name, kind, row[f"{name}_ids"], tokenizer, stops))
    return Shown(f"pair {row['index']} · {row['id']}", tuple(spans))


def shown_example(row: Mapping[str, Any], tokenizer: Any, stops: set[int]) -> Shown:
    """A tokenised SFT example (`tokenize_sft`), cut into what is given and what is learnt."""
    ids, mask = row["input_ids"], row["completion_mask"]
    starts = [i for i in range(len(ids)) if i == 0 or mask[i] != mask[i - 1]]
    spans = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        name, kind = ("learnt", LEARNT) if mask[start] else ("given", GIVEN)
        spans.append(_span(name, kind, ids[start:end], tokenizer, stops if mask[start] else set()))
    return Shown(f"example {row['index']} · {row['id']}", tuple(spans))


def shown_prompt(name: str, ids: Sequence[int], index: int, tokenizer: Any) -> Shown:
    """A prompt that responses will be sampled for."""
    return Shown(f"prompt {index} · {name}", (_span("prompt", GIVEN, ids, tokenizer, set()),))


def _span(name: str, kind: str, ids: Sequence[int], tokenizer: Any, stops: set[int]) -> Span:
    tokens = []
    for i in map(int, ids):
        scored = kind != GIVEN and i >= 0  # `~id`: what a tool or a user says in a response
        token = max(i, ~i)
        tokens.append(Token(token, readable(tokenizer, token), scored, scored and token in stops))
    return Span(name, kind, tuple(tokens))


def readable(tokenizer: Any, token: int) -> str:
    """A token's own text; where it is a part of a character, as the vocabulary writes it. White space becomes visible."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    piece = tokenizer.convert_ids_to_tokens(token)
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        text = str(piece)
    elif isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" "):
        text = f" {text}"  # SentencePiece drops the space of a text's first word
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    return {" ": "·", "\n": "↵", "\t": "⇥"}.get(character, character if character.isprintable() else repr(character)[1:-1])


def lines_of(span: Span, width: int, colour: bool, whole: bool = False) -> list[Text]:
    """A span as lines of at most `width` columns. Without colour tokens stand between bars, and the end in brackets.

    whole: all tokens; otherwise long parts show their two ends.
    """
    tokens: list[Token | str] = list(span.tokens)
    if not whole and len(tokens) > 2 * EDGE + 8:
        tokens = [*tokens[:EDGE], f" … {len(tokens) - 2 * EDGE} more tokens … ", *tokens[-EDGE:]]
    lines, line = [], Text(no_wrap=True)
    for number, token in enumerate(tokens):
        piece = _piece(token, span.kind, number, colour)
        if line and line.cell_len + piece.cell_len > width:
            lines.append(line)
            line = Text(no_wrap=True)
        while piece.cell_len > width:  # a token longer than a line
            head, piece = piece[:width], piece[width:]
            lines.append(head)
        line.append_text(piece)
    return [*lines, line]


def _piece(token: Token | str, kind: str, number: int, colour: bool) -> Text:
    if isinstance(token, str):
        return Text(token, style="dim italic")
    if colour:
        return Text(token.text, style=SHADES[END if token.end else kind if token.scored else GIVEN][number % 2])
    if not token.scored and kind != GIVEN:
        return Text(f"({token.text})|")
    return Text(f"[{token.text}]" if token.end else f"{token.text}|")


def print_shown(shown: Shown, console: Console, colour: bool, whole: bool = False) -> None:
    """One row on a console."""
    console.print(Text(f" {escaped(shown.title)}"))
    names = [span.name if span.name in ("given", "learnt") else f"{span.name}, {_state(span)}" for span in shown.spans]
    label = max(cell_len(name) for name in names)
    for span, name in zip(shown.spans, names, strict=True):
        lines = lines_of(span, max(20, console.width - label - 8), colour, whole)
        for number, line in enumerate(lines):
            left = f" {name:<{label}} {len(span.tokens):>4}  " if number == 0 else " " * (label + 8)
            console.print(Text(left, style="dim" if span.kind == GIVEN else "") + line, soft_wrap=True)


def _state(span: Span) -> str:
    return "given" if span.kind == GIVEN else "scored"
