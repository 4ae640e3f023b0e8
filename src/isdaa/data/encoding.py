"""A tokenizer with the project's rules: BOS once in front, EOS where a response ended, one cut of the prompt a pair."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

from isdaa.data.chat import ChatFormat, encodes_in_threads, start_ids, tokenize_text, tokenizer_digest
from isdaa.data.checks import Text
from isdaa.data.pairs import Counts
from isdaa.errors import UserError

# Characters on each side of the boundary that are tokenised together to see whether they merge; longer than a token.
BOUNDARY = 32
# Tokens of prompts that are remembered, four bytes each: those of one prompt's pairs may lie anywhere in the data.
REMEMBERED = 16_000_000
NO_EOS = (
    "the tokenizer has no EOS token, so no response could end; set `eos_token` in its tokenizer_config.json, "
    "or name another tokenizer in model.tokenizer"
)


@dataclass(frozen=True)
class TokenizationSettings:
    """max_length: tokens of a prompt and response; max_prompt_length: of the prompt; truncation: which end stays."""

    max_length: int = 640
    max_prompt_length: int = 512
    truncation: Literal["keep_end", "keep_start"] = "keep_end"

    def __post_init__(self) -> None:
        if self.truncation not in ("keep_end", "keep_start"):
            raise UserError(f"tokenization.truncation must be 'keep_end' or 'keep_start', not {self.truncation!r}")
        if not 1 <= self.max_prompt_length < self.max_length:
            raise UserError(
                f"tokenization.max_prompt_length ({self.max_prompt_length}) must be at least 1 and below "
                f"tokenization.max_length ({self.max_length}), so that a response has room"
            )


class Prompt(NamedTuple):
    """ids: after any cut. text: what was tokenised, None for given ids; chat: made by the template."""

    ids: list[int]
    text: str | None
    cut: bool
    chat: bool


class PairIds(NamedTuple):
    """Token ids of one pair and what happened to it."""

    prompt: Prompt
    chosen: list[int]
    rejected: list[int]
    chosen_cut: bool
    rejected_cut: bool


class Memory:
    """Token ids of the texts that came last, at most `room` of them in all."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._lock = threading.Lock()
        self._kept: dict[bytes, array[int]] = {}

    def recall(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Those of the texts that are known, with their ids."""
        with self._lock:
            found = {text: self._kept.get(self._key(text)) for text in texts}
        return {text: ids.tolist() for text, ids in found.items() if ids is not None}

    def add(self, encoded: Mapping[str, list[int]]) -> None:
        """Remember these; what came first goes first where there is no room."""
        with self._lock:
            for text, ids in encoded.items():
                key = self._key(text)
                if key not in self._kept:
                    self._kept[key] = array("i", ids)
                    self.room -= len(ids)
            while self.room < 0:
                self.room += len(self._kept.pop(next(iter(self._kept))))

    @staticmethod
    def _key(text: str) -> bytes:
        return blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


class Encoder:
    """A tokenizer with the rules of this file. Texts go through it in batches; what it sees is counted in `counts`.

    Several threads may use one encoder at once where `in_threads` says so. template: where the chat template stands, where
    it is not the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, settings: TokenizationSettings | None = None, template: str | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(NO_EOS)
        self.tokenizer = tokenizer
        self.settings = settings or TokenizationSettings()
        self.eos: int = tokenizer.eos_token_id
        self.start = start_ids(tokenizer)
        self.counts = Counts()
        self._chat: ChatFormat | None = None
        self._template = template
        self._prompts = Memory(REMEMBERED)
        self._lock = threading.Lock()

    @property
    def key(self) -> list[Any]:
        """All that decides token ids, beside the rows."""
        return [tokenizer_digest(self.tokenizer), asdict(self.settings)]

    @property
    def in_threads(self) -> bool:
        """May several threads encode at once?"""
        return encodes_in_threads(self.tokenizer)

    def count(self, **events: int) -> None:
        """Add to `counts`, whichever thread it is."""
        with self._lock:
            for name, n in events.items():
                setattr(self.counts, name, getattr(self.counts, name) + n)

    @property
    def chat(self) -> ChatFormat:
        """The chat template, read when the first conversation comes. Raises UserError where there is none."""
        if self._chat is None:
            self._chat = ChatFormat(self.tokenizer, self._template)
        return self._chat

    def prompts(self, rows: Sequence[Mapping[str, Any]]) -> list[Prompt]:
        """Prompts of rows with `prompt`, `prompt_ids` and `where`, cut to max_prompt_length."""
        texts = [self._prompt_text(row) for row in rows]
        different = dict.fromkeys(text for text in texts if text is not None)
        encoded = self._prompts.recall(different)
        new = self._encode(text for text in different if text not in encoded)
        self._prompts.add(new)
        encoded |= new
        result = []
        for row, text in zip(rows, texts, strict=True):
            chat = isinstance(row["prompt"], list)
            ids = self._given(row, "prompt_ids") if text is None else self._with_start(encoded[text], chat)
            if not ids:
                raise UserError(f"{row.get('where', 'row')}: column 'prompt' gives no token; write a prompt or remove the row")
            kept = self._cut_prompt(ids, chat)
            result.append(Prompt(kept, text, len(kept) < len(ids), chat))
        return result

    def responses(self, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt], name: str) -> list[tuple[list[int], bool]]:
        """Ids of column `name` ('chosen', …) and whether they were cut to the room that the prompt leaves."""
        return self._responses(rows, prompts, (name,))[0]

    def pairs(self, rows: Sequence[Mapping[str, Any]]) -> list[PairIds]:
        """Token ids of canonical pairs, in order; drops nothing."""
        prompts = self.prompts(rows)
        chosen, rejected = self._responses(rows, prompts, ("chosen", "rejected"))
        return [
            PairIds(prompt, a, b, a_cut, b_cut) for prompt, (a, a_cut), (b, b_cut) in zip(prompts, chosen, rejected, strict=True)
        ]

    def _responses(
        self, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt], names: Sequence[str]
    ) -> list[list[tuple[list[int], bool]]]:
        """What `responses` gives, for several columns. All texts of theirs go through the tokenizer in one call."""
        texts = [[self._response_text(row, prompt, name) for row, prompt in zip(rows, prompts, strict=True)] for name in names]
        windows = [window for column in texts for window in _windows(prompts, column)]
        asked = [text for column in texts for text in column if text is not None]
        encoded = self._encode([*asked, *(text for a, b in windows for text in (a, b, a + b))])
        self.count(boundary_merges=sum(encoded[a + b] != encoded[a] + encoded[b] for a, b in windows))
        return [self._fitted(rows, prompts, name, column, encoded) for name, column in zip(names, texts, strict=True)]

    def _fitted(
        self,
        rows: Sequence[Mapping[str, Any]],
        prompts: Sequence[Prompt],
        name: str,
        texts: Sequence[str | None],
        encoded: Mapping[str, list[int]],
    ) -> list[tuple[list[int], bool]]:
        """Responses of one column, ended and cut."""
        result = []
        for row, prompt, text in zip(rows, prompts, texts, strict=True):
            ids = self._given(row, f"{name}_ids") if text is None else encoded[text]
            if row.get(f"{name}_finished", True):
                ids = self._ended(ids, prompt.chat, made_of_text=text is not None)
            if not ids:
                raise UserError(f"{row.get('where', 'row')}: column '{name}' gives no token; write a response or remove the row")
            room = self.settings.max_length - len(prompt.ids)
            result.append((ids[:room], len(ids) > room))
        return result

    def examples(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[list[int], list[int]]]:
        """(ids, mask of what is learnt) of SFT rows, in order."""
        result: dict[int, tuple[list[int], list[int]]] = {}
        asked = [i for i, row in enumerate(rows) if row["prompt"] is not None and len(_turns(row["completion"])) == 1]
        singles = [rows[i] for i in asked]
        prompts = self.prompts(singles)
        for i, prompt, (ids, cut) in zip(asked, prompts, self.responses(singles, prompts, "completion"), strict=True):
            result[i] = prompt.ids + ids, [0] * len(prompt.ids) + [1] * len(ids)
            self.count(prompts_cut=prompt.cut, completions_cut=cut)
        others = [i for i in range(len(rows)) if i not in result]
        pieces = [self._pieces(rows[i]) for i in others]
        encoded = self._encode(text for row in pieces for text, _ in row)
        for i, row in zip(others, pieces, strict=True):
            parts = [(encoded[text], learnt) for text, learnt in row]
            chat = isinstance(rows[i]["completion"], list)
            parts[0] = self._with_start(parts[0][0], chat), parts[0][1]
            parts[-1] = self._ended(parts[-1][0], chat, made_of_text=True), parts[-1][1]
            ids = [token for part, _ in parts for token in part]
            mask = [int(learnt) for part, learnt in parts for _ in part]
            if ids[: len(self.start)] == self.start:  # given, never learnt
                mask[: len(self.start)] = [0] * len(self.start)
            self.count(completions_cut=len(ids) > self.settings.max_length)
            result[i] = ids[: self.settings.max_length], mask[: self.settings.max_length]
        return [result[i] for i in range(len(rows))]

    def _pieces(self, row: Mapping[str, Any]) -> list[tuple[str, bool]]:
        """(text, whether it is learnt) of plain text or of a conversation, through the last assistant turn."""
        completion: Text = row["completion"]
        if isinstance(completion, str):
            return [(completion, True)]
        messages = [*(row["prompt"] or []), *completion]
        first = len(messages) - len(completion)
        where = row.get("where", "row")
        pieces: list[tuple[str, bool]] = []
        for i, message in enumerate(messages):
            if i < max(first, 1) or message["role"] != "assistant":
                continue
            prompt = self.chat.prompt(messages[:i], where)
            before = "".join(text for text, _ in pieces)
            if not prompt.startswith(before):  # earlier turns are written otherwise than the last: learn the later ones
                pieces, before = [], ""
            answer = self.chat.response(messages[:i], prompt, message, True, where)
            pieces += [(prompt[len(before) :], False), (answer, True)]
        return pieces

    def _prompt_text(self, row: Mapping[str, Any]) -> str | None:
        if row.get("prompt_ids") is not None:
            return None
        prompt: Text = row["prompt"]
        return prompt if isinstance(prompt, str) else self.chat.prompt(prompt, row.get("where", "row"))

    def _response_text(self, row: Mapping[str, Any], prompt: Prompt, name: str) -> str | None:
        if row.get(f"{name}_ids") is not None:
            return None
        response: Text = row[name]
        if not prompt.chat or prompt.text is None:
            return response if isinstance(response, str) else response[-1]["content"]
        message = {"role": "assistant", "content": response} if isinstance(response, str) else response[-1]
        where = row.get("where", "row")
        return self.chat.response(row["prompt"], prompt.text, message, row.get(f"{name}_finished", True), where)

    def _encode(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Ids of each different text, no special tokens added. Pairs often share prompts: each is tokenised once."""
        different = list(dict.fromkeys(texts))
        return dict(zip(different, tokenize_text(self.tokenizer, different), strict=True))

    def _given(self, row: Mapping[str, Any], column: str) -> list[int]:
        ids = list(row[column])
        if ids and max(ids) >= len(self.tokenizer):
            raise UserError(
                f"{row.get('where', 'row')}: column '{column}' holds token id {max(ids)}, but the tokenizer has only "
                f"{len(self.tokenizer)} tokens; use the tokenizer that made the ids, or leave them out"
            )
        return ids

    def _with_start(self, ids: list[int], chat: bool) -> list[int]:
        """BOS in front, once. A chat template says itself whether there is one, here as wherever the model is used."""
        start = self.start
        if not start or ids[: len(start)] != start:
            return ids if chat else start + ids
        self.count(own_bos=1)
        while ids[len(start) : 2 * len(start)] == start:
            ids = ids[len(start) :]
        return ids

    def _cut_prompt(self, ids: list[int], chat: bool) -> list[int]:
        limit = self.settings.max_prompt_length
        if len(ids) <= limit:
            return ids
        if self.settings.truncation == "keep_end":
            head = self.start if self.start and ids[: len(self.start)] == self.start else []
            return head + ids[len(ids) - (limit - len(head)) :]
        # A chat prompt still has to end with the words that open the assistant's turn.
        tail = self.chat.opening_ids if chat and self.tokenizer.chat_template else []
        if not tail or len(tail) >= limit or ids[-len(tail) :] != tail:
            tail = []
        return ids[: limit - len(tail)] + tail

    def _ended(self, ids: list[int], chat: bool, made_of_text: bool) -> list[int]:
        """EOS at the end, never twice. In chat the end-of-turn token ends a response."""
        turn_end = self.chat.stop_id if chat and self.tokenizer.chat_template else None
        if ids and ids[-1] in (self.eos, turn_end):
            return ids
        return [*ids, self.eos if made_of_text or turn_end is None else turn_end]


def _windows(prompts: Sequence[Prompt], texts: Sequence[str | None]) -> list[tuple[str, str]]:
    """Both sides of the boundary: would tokenising across it give other ids than tokenising each side?"""
    return [
        (prompt.text[-BOUNDARY:], text[:BOUNDARY])
        for prompt, text in zip(prompts, texts, strict=True)
        if prompt.text is not None and text
    ]


def _turns(completion: Text) -> list[Any]:
    return completion if isinstance(completion, list) else [completion]
