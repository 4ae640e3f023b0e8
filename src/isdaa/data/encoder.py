"""A tokenizer with the project's rules: BOS once in front, EOS where a response ended, one cut of the prompt a pair."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

from isdaa.data.arrivals import Arrivals
from isdaa.data.chat import ChatFormat, check_given, given_of, joined, start_ids, tokenizer_digest
from isdaa.data.checks import Message, Text
from isdaa.data.context import Before, Context, encodes_in_threads, unscored
from isdaa.data.pairs import Counts
from isdaa.errors import UserError
from isdaa.files import digest

VERSION = 2  # of these rules: raise it whenever the same rows may give other ids
# Tokens of prompts that are remembered, four bytes each: those of one prompt's pairs may lie anywhere in the data.
REMEMBERED = 16_000_000
NO_EOS = (
    "the tokenizer has no EOS token, so no response could end; set `eos_token` in its tokenizer_config.json, "
    "or name another tokenizer in model.tokenizer"
)


@dataclass(frozen=True)
class TokenizationSettings:
    """max_length: tokens of a prompt and response; max_prompt_length: of the prompt; truncation: which end stays.

    chat_template_kwargs: what the chat template gets beside the messages, in all conversations; a row's own win.
    """

    max_length: int = 640
    max_prompt_length: int = 512
    truncation: Literal["keep_end", "keep_start"] = "keep_end"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_given(self.chat_template_kwargs, "tokenization.chat_template_kwargs")
        if self.truncation not in ("keep_end", "keep_start"):
            raise UserError(f"tokenization.truncation must be 'keep_end' or 'keep_start', not {self.truncation!r}")
        if not 1 <= self.max_prompt_length < self.max_length:
            raise UserError(
                f"tokenization.max_prompt_length ({self.max_prompt_length}) must be at least 1 and below "
                f"tokenization.max_length ({self.max_length}), so that a response has room"
            )


UNCUT = TokenizationSettings(max_length=2**31, max_prompt_length=2**31 - 1)


def token_settings(section: Any) -> TokenizationSettings:
    """The `tokenization` section of a configuration as everything that tokenises takes it."""
    return TokenizationSettings(**section.model_dump())


class Prompt(NamedTuple):
    """ids: after any cut. before: text (None for given ids) and ids as tokenised, before any cut; chat: made by the template."""

    ids: list[int]
    before: Before
    cut: bool
    chat: bool


class Response(NamedTuple):
    """ids: after any cut; `~id` where a token is not scored."""

    ids: list[int]
    cut: bool


class Whole(NamedTuple):
    """ids: prompt and response as one text, after any cut."""

    ids: list[int]
    prompt_cut: bool
    response_cut: bool


def pair_digest(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> str:
    """What tells the tokens of a pair: behaviour logps are of these alone."""
    return digest([list(prompt), list(chosen), list(rejected)])


Pieces = list[tuple[str, bool]]  # (text, whether it is scored or learnt)


class PairIds(NamedTuple):
    """Token ids of one pair and what happened to it. Responses hold `~id` where a token is not scored (`context.unscored`)."""

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
    it is not the tokenizer's own. whole: in chat, responses that ended go on to the end of the template's output, where reward
    models are read; close_cut: so do those that a limit cut.
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: TokenizationSettings | None = None,
        template: str | None = None,
        *,
        whole: bool = False,
        close_cut: bool = False,
    ) -> None:
        if tokenizer.eos_token_id is None and not whole:
            raise UserError(NO_EOS)
        self.tokenizer = tokenizer
        self.settings = settings or TokenizationSettings()
        self.eos: int = -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id  # -1: nothing ends a text
        self.start = start_ids(tokenizer)
        self.counts = Counts()
        self.context = Context(tokenizer)
        self._chat: ChatFormat | None = None
        self._arrivals: Arrivals | None = None
        self._special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._template = template
        self.whole, self.close_cut = whole, close_cut
        self._prompts = Memory(REMEMBERED)
        self._lock = threading.Lock()

    @property
    def key(self) -> list[Any]:
        """All that decides token ids, beside the rows."""
        how = [["whole", self.close_cut]] if self.whole else []
        return [VERSION, tokenizer_digest(self.tokenizer), asdict(self.settings), *how]

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
            self._chat = ChatFormat(self.tokenizer, self._template, self.settings.chat_template_kwargs)
        return self._chat

    def prompts(self, rows: Sequence[Mapping[str, Any]]) -> list[Prompt]:
        """Prompts to be answered, of rows with `prompt`, `prompt_ids` and `where`, cut to max_prompt_length."""
        return self._prompts_of(rows, [self._texts(row, ())[0] for row in rows])

    def answered(self, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[tuple[Prompt, list[Response]]]:
        """Each row's prompt, and the responses in its columns `names` ('chosen', …), cut to the room that the prompt leaves."""
        texts = [self._texts(row, names) for row in rows]
        prompts = self._prompts_of(rows, [prompt for prompt, _ in texts])
        asked = [(i, pieces) for i, (_, responses) in enumerate(texts) for pieces in responses if pieces is not None]
        behind, merged = self._in_turn([(prompts[i].before, pieces) for i, pieces in asked])
        self.count(boundary_merges=len({asked[k][0] for k in merged}))
        encoded = iter(behind)
        result = []
        for row, prompt, (_, responses) in zip(rows, prompts, texts, strict=True):
            found = [None if pieces is None else _with_mask(next(encoded)) for pieces in responses]
            result.append((prompt, [self._fitted(row, prompt, name, ids) for name, ids in zip(names, found, strict=True)]))
        return result

    def read(self, rows: Sequence[Mapping[str, Any]], name: str) -> list[Whole]:
        """Each row's prompt and the response in its column `name`, tokenised as one text, as `tokenizer(text)` and
        `apply_chat_template` do. Rows with ids are not for it."""
        texts = [self._texts(row, (name,)) for row in rows]
        prompts = self._prompts_of(rows, [prompt for prompt, _ in texts])
        joined_texts = [str(prompt) + "".join(text for text, _ in pieces or ()) for prompt, (pieces,) in texts]
        encoded = self.context.encode(joined_texts)
        result = []
        for row, prompt, text in zip(rows, prompts, joined_texts, strict=True):
            ids = self._with_start(encoded[text], prompt.chat)
            if prompt.cut:
                ids = prompt.ids + ids[len(self._with_start(prompt.before.ids, prompt.chat)) :]
            if row.get(f"{name}_finished", True) and not (prompt.chat and self.whole):
                ids = self._ended(ids, prompt.chat, made_of_text=True)
            limit = self.settings.max_length
            if len(ids) <= limit:
                result.append(Whole(ids, prompt.cut, False))
                continue
            # What closes the turn stays, for there the model is read.
            end = self.chat.suffix if prompt.chat and text.endswith(self.chat.suffix) else ""
            words = self.context.encode([text.removesuffix(end)])[text.removesuffix(end)] if end else []
            tail = encoded[text][len(words) :] if end and encoded[text][: len(words)] == words else []
            result.append(Whole(ids[: limit - len(tail)] + tail, prompt.cut, True))
        return result

    def pairs(self, rows: Sequence[Mapping[str, Any]]) -> list[PairIds]:
        """Token ids of canonical pairs, in order; drops nothing."""
        found = self.answered(rows, ("chosen", "rejected"))
        return [PairIds(prompt, a.ids, b.ids, a.cut, b.cut) for prompt, (a, b) in found]

    def examples(self, rows: Sequence[Mapping[str, Any]]) -> list[list[tuple[list[int], list[int]]]]:
        """[(ids, mask of what is learnt), …] of each SFT row, in order.

        A conversation is one example, or several where the template writes a turn otherwise once others follow it: each turn is
        learnt as the model is asked for it.
        """
        result: dict[int, list[tuple[list[int], list[int]]]] = {}
        asked = [i for i, row in enumerate(rows) if row["prompt"] is not None and len(_turns(row["completion"])) == 1]
        for i, (prompt, (response,)) in zip(asked, self.answered([rows[i] for i in asked], ("completion",)), strict=True):
            result[i] = [(prompt.ids + response.ids, [0] * len(prompt.ids) + [1] * len(response.ids))]
            self.count(prompts_cut=prompt.cut, completions_cut=response.cut)
        others = [(i, pieces) for i in range(len(rows)) if i not in result for pieces in self._pieces(rows[i])]
        encoded, merged = self._in_turn([(Before("", []), pieces) for _, pieces in others])
        self.count(boundary_merges=len(merged))
        for (i, _), parts in zip(others, encoded, strict=True):
            result.setdefault(i, []).append(self._example(parts, isinstance(rows[i]["completion"], list)))
        return [result[i] for i in range(len(rows))]

    def _example(self, parts: list[tuple[list[int], bool]], chat: bool) -> tuple[list[int], list[int]]:
        """(ids, mask) of the pieces of an SFT example, begun, ended and cut."""
        parts[0] = self._with_start(parts[0][0], chat), parts[0][1]
        parts[-1] = self._ended(parts[-1][0], chat, made_of_text=True), parts[-1][1]
        ids = [token for part, _ in parts for token in part]
        mask = [int(learnt) for part, learnt in parts for _ in part]
        if ids[: len(self.start)] == self.start:  # given, never learnt
            mask[: len(self.start)] = [0] * len(self.start)
        self.count(completions_cut=len(ids) > self.settings.max_length)
        return ids[: self.settings.max_length], mask[: self.settings.max_length]

    def _in_turn(self, texts: Sequence[tuple[Before, Pieces]]) -> tuple[list[list[tuple[list[int], bool]]], set[int]]:
        """The ids of pieces of text, each tokenised behind those before it; and the texts in which a token would span two."""
        parts: list[list[tuple[list[int], bool]]] = [[] for _ in texts]
        before = [start for start, _ in texts]
        merged: set[int] = set()
        for turn in range(max((len(pieces) for _, pieces in texts), default=0)):
            now = [k for k, (_, pieces) in enumerate(texts) if turn < len(pieces)]
            for k, (ids, merges) in zip(now, self.context.behind([(before[k], texts[k][1][turn][0]) for k in now]), strict=True):
                text, learnt = texts[k][1][turn]
                parts[k].append((ids, learnt))
                merged |= {k} if merges else set()
                before[k] = Before(None if before[k].text is None else f"{before[k].text}{text}", [*before[k].ids, *ids])
        return parts, merged

    def _pieces(self, row: Mapping[str, Any]) -> list[Pieces]:
        """[(text, whether it is learnt), …] of plain text or of a conversation, through the last assistant turn; several such
        lists where the template writes earlier turns otherwise than it did when they were the last."""
        completion: Text = row["completion"]
        if isinstance(completion, str):
            self.count(no_template=bool(self.tokenizer.chat_template))
            return [[(completion, True)]]
        messages = [*(row["prompt"] or []), *completion]
        first = len(messages) - len(completion)
        where, given = row.get("where", "row"), given_of(row)
        learnt = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= max(first, 1)]
        self._arrive([(messages[: i + 1], 1) for i in learnt], given, where)
        self.count(not_learnt=messages[0]["role"] == "assistant" or learnt[-1] < len(messages) - 1)
        examples: list[Pieces] = []
        before = None
        shortened = False
        for i in learnt:
            asked = self.chat.prompt(messages[:i], where, given)
            prompt, answer = self.chat.response(messages[:i], asked, [messages[i]], True, where, given)
            shortened |= prompt != asked
            if before is None or not prompt.startswith(before):
                examples.append([])
                before = ""
            examples[-1] += [(prompt[len(before) :], False), (answer, True)]
            before = prompt + answer
        self.count(opening_cut=shortened)
        return examples

    def _texts(self, row: Mapping[str, Any], names: Sequence[str]) -> tuple[str | None, list[Pieces | None]]:
        """What is tokenised: the prompt's text and the pieces of the responses; None where the row has ids."""
        responses = [None if row.get(f"{name}_ids") is not None else row[name] for name in names]
        prompt: Text = row["prompt"]
        if row.get("prompt_ids") is not None or isinstance(prompt, str):
            text = None if row.get("prompt_ids") is not None else str(prompt)
            self.count(no_template=text is not None and bool(self.tokenizer.chat_template))
            words = [r if r is None or isinstance(r, str) else r[-1]["content"] for r in responses]
            return text, [None if word is None else [(word, True)] for word in words]
        where, given = row.get("where", "row"), given_of(row)
        turns = [[{"role": "assistant", "content": r}] if isinstance(r, str) else r for r in responses]
        whole_turns = [(joined(prompt, answers), len(answers)) for answers in turns if answers is not None]
        self._arrive(whole_turns if names else [(prompt, 0)], given, where)
        whole = text = self.chat.prompt(prompt, where, given)
        texts: list[Pieces | None] = []
        for _ in range(2):  # a second time where an answer made the prompt shorter
            before, texts = text, []
            for name, answers in zip(names, turns, strict=True):
                answer = None
                if answers is not None:
                    finished = row.get(f"{name}_finished", True)
                    text, answer = self.chat.parts(prompt, text, answers, finished, where, given)
                    if self.whole and (finished or self.close_cut):
                        written = text + "".join(piece for piece, _ in answer)
                        answer[-1] = answer[-1][0] + self.chat.closing(prompt, answers, written, where, given), answer[-1][1]
                texts.append(answer)
            if text == before:
                break
        self.count(opening_cut=text != whole)
        return text, texts

    def _arrive(self, conversations: Sequence[tuple[list[Message], int]], given: Mapping[str, Any], where: str) -> None:
        """Count what the template leaves out of a row's (messages, of these answers). Raises UserError where it must not."""
        if self._arrivals is None:
            self._arrivals = Arrivals(self.chat)
        found = [self._arrivals.check(messages, answers, given, where) for messages, answers in conversations]
        with self._lock:
            self.counts.thinking_left_out += any(one.thinking for one in found)
            self.counts.unread = tuple(dict.fromkeys((*self.counts.unread, *(name for one in found for name in one.unread))))

    def _prompts_of(self, rows: Sequence[Mapping[str, Any]], texts: Sequence[str | None]) -> list[Prompt]:
        different = dict.fromkeys(text for text in texts if text is not None)
        encoded = self._prompts.recall(different)
        new = self.context.encode(text for text in different if text not in encoded)
        self._prompts.add(new)
        encoded |= new
        result = []
        for row, text in zip(rows, texts, strict=True):
            chat = isinstance(row["prompt"], list)
            before = Before(text, self._given(row, "prompt_ids") if text is None else encoded[text])
            ids = before.ids if text is None else self._with_start(before.ids, chat)
            if not ids:
                raise UserError(
                    f"{row.get('where', 'row')}: column 'prompt' gives no token, and the tokenizer has no BOS to begin with; "
                    "write a prompt or remove the row"
                )
            kept = self._cut_prompt(ids, text, row)
            result.append(Prompt(kept, before, len(kept) < len(ids), chat))
        return result

    def _fitted(self, row: Mapping[str, Any], prompt: Prompt, name: str, tokenised: list[int] | None) -> Response:
        """A response, ended and cut. tokenised: None where the row has ids."""
        ids = self._given(row, f"{name}_ids") if tokenised is None else tokenised
        if row.get(f"{name}_finished", True):
            ids = self._closed(ids, prompt.chat, made_of_text=tokenised is not None)
        if not ids:
            raise UserError(f"{row.get('where', 'row')}: column '{name}' gives no token; write a response or remove the row")
        room = self.settings.max_length - len(prompt.ids)
        return Response(ids[:room], len(ids) > room)

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

    def _cut_prompt(self, ids: list[int], text: str | None, row: Mapping[str, Any]) -> list[int]:
        limit = self.settings.max_prompt_length
        if len(ids) <= limit:
            return ids
        if self.settings.truncation == "keep_end":
            head = self.start if self.start and ids[: len(self.start)] == self.start else []
            return head + ids[len(ids) - (limit - len(head)) :]
        # A chat prompt still has to end with the words that open the assistant's turn.
        tail: list[int] = []
        if isinstance(row["prompt"], list) and self.tokenizer.chat_template:
            where, given = row.get("where", "row"), given_of(row)
            tail = self.chat.opening_ids if text is None else self.chat.ids_of_opening(text, row["prompt"], where, given)
        if not tail or len(tail) >= limit or ids[-len(tail) :] != tail:
            tail = []
        return ids[: limit - len(tail)] + tail

    def _closed(self, ids: list[int], chat: bool, made_of_text: bool) -> list[int]:
        """A response that ended, with its end; with the template's whole end where it is read there."""
        if not (self.whole and chat and self.tokenizer.chat_template):
            return self._ended(ids, chat, made_of_text)
        if made_of_text:  # the text has all that the template writes
            return ids
        if self.chat.stop_id is None:
            return [*(ids[:-1] if ids[-1:] == [self.eos] else ids), *self.chat.tail_ids]
        return [*self._ended(ids, chat, made_of_text), *self.chat.tail_ids]

    def _ended(self, ids: list[int], chat: bool, made_of_text: bool) -> list[int]:
        """EOS at the end, never twice. In chat the end-of-turn token ends a response."""
        turn_end = self.chat.stop_id if chat and self.tokenizer.chat_template else None
        ends = {self.eos, turn_end} | (self._special if chat and made_of_text and turn_end is not None else set())
        if ids and ids[-1] in ends:  # a tool call ends with a token of its own in some templates
            return ids
        end = self.eos if made_of_text or turn_end is None else turn_end
        return [*ids, end] if end >= 0 else ids


def _with_mask(parts: Sequence[tuple[list[int], bool]]) -> list[int]:
    return [token for ids, scored in parts for token in (ids if scored else unscored(ids))]


def _turns(completion: Text) -> list[Any]:
    return completion if isinstance(completion, list) else [completion]
