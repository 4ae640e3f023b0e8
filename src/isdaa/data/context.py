"""Token ids in context: what follows a text's ids in the tokenisation of the whole, never what a part has alone.

Tokenised alone, a response gains a dummy `▁` with Llama-type tokenizers, which a model that goes on from the prompt never writes.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from isdaa.foreign import readable

# Before a text that merges with what stands before it, so that it is no beginning: the first of these that does not merge itself.
ANCHORS = ("\n", "a", ".", *string.printable)
# Of a long text the last words are enough, where no token goes past a word: from a space at least NEAR and at most FAR characters
# before its end.
NEAR, FAR = 32, 256
BETWEEN_WORDS = re.compile(r"[A-Za-z] (?=[A-Za-z])")
PAST_A_WORD = re.compile("[A-Za-z][Ġ▁ ]")


class Before(NamedTuple):
    """What stands before a text: its own text (None where only ids are known) and ids, without special tokens added."""

    text: str | None
    ids: list[int]


class Context:
    """A tokenizer that tokenises texts behind others."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._fast = getattr(tokenizer, "backend_tokenizer", None) is not None
        tokens = tokenizer.added_tokens_decoder.values() if self._fast else ()
        self._added = {str(token).strip(" ") for token in tokens}
        cutting = sorted((str(t) for t in tokens if not t.normalized and not t.single_word), key=len, reverse=True)
        self._cutting = re.compile("|".join(map(re.escape, cutting))) if cutting else None

    def encode(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Ids of each different text, no special tokens added."""
        different = list(dict.fromkeys(texts))
        return dict(zip(different, tokenize_text(self.tokenizer, different), strict=True))

    def behind(self, pairs: Sequence[tuple[Before, str]]) -> list[tuple[list[int], bool]]:
        """(ids, whether a token of the whole would span the boundary) of each text behind what stands before it.

        Where the ids before are a prefix of the whole text's, the ids are the rest of those. Where a token spans the boundary,
        the text is tokenised behind a character that it does not merge with.
        """
        tails = [self.deciding_tail(before) for before, _ in pairs]
        encoded = self.encode(
            [x for tail, (_, text) in zip(tails, pairs, strict=True) if tail is not None for x in (tail, tail + text)]
        )
        # Where the tail alone is not what it is in the text, the whole text decides.
        whole = self.encode(
            [
                str(before.text) + text
                for tail, (before, text) in zip(tails, pairs, strict=True)
                if tail is not None and not _ends_with(before.ids, encoded[tail])
            ]
        )
        found: list[list[int] | None] = []
        for tail, (before, text) in zip(tails, pairs, strict=True):
            if tail is None:
                found.append(None)
                continue
            start, ids = encoded[tail], encoded[tail + text]
            if not _ends_with(before.ids, start):
                start, ids = before.ids, whole[str(before.text) + text]
            found.append(ids[len(start) :] if ids[: len(start)] == start else None)
        inner = self._inner(text for ids, (_, text) in zip(found, pairs, strict=True) if ids is None)
        return [
            (ids, False) if ids is not None else (inner[text], before.text is not None)
            for ids, (before, text) in zip(found, pairs, strict=True)
        ]

    def deciding_tail(self, before: Before) -> str | None:
        """The part of a text that decides the ids behind it: texts are divided at added tokens first, then between words."""
        if before.text is None:
            return None
        text = before.text
        if self._cutting is not None:
            text = text[max((found.start() for found in self._cutting.finditer(text)), default=0) :]
        if len(text) > FAR and self._word_start is not None:
            spaces = [found.start() + 1 for found in BETWEEN_WORDS.finditer(text, len(text) - FAR, len(text) - NEAR)]
            return text[spaces[-1] + self._word_start :] if spaces else text
        return text

    @cached_property
    def _word_start(self) -> int | None:
        """Whether a word's tokens begin behind its space (1, where the tokenizer adds one itself) or with it (0).

        None where words are not independent: a token of the vocabulary goes on past the end of a word.
        """
        if self._fast is False or any(PAST_A_WORD.search(token) for token in self.tokenizer.get_vocab()):
            return None
        both, with_space, without = tokenize_text(self.tokenizer, ["z b", " b", "b"])
        return 0 if _ends_with(both, with_space) else 1 if _ends_with(both, without) else None

    def _inner(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Ids of texts that stand inside another one."""
        left = dict.fromkeys(texts)
        found: dict[str, list[int]] = {}
        for anchor in ANCHORS:
            if not left:
                return found
            if anchor in self._added:  # what stands behind an added token begins anew
                continue
            encoded = self.encode([anchor, *(anchor + text for text in left)])
            start = encoded[anchor]
            for text in list(left) if start else []:
                ids = encoded[anchor + text]
                if ids[: len(start)] == start and len(ids) > len(start):
                    found[text] = ids[len(start) :]
                    del left[text]
        return found | self.encode(left)


def _ends_with(ids: list[int], end: list[int]) -> bool:
    return ids[len(ids) - len(end) :] == end


def tokenize_text(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text: no special token added, nothing cut, nothing padded, whatever the tokenizer is set to."""
    if not texts:
        return []
    with readable(getattr(tokenizer, "name_or_path", None) or "tokenizer", "it cannot make tokens of the data's texts"):
        return _ids(tokenizer, texts)


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if encodes_in_threads(tokenizer):
        # The same ids as below, in half the time: no offsets into the text are kept.
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]
    encoded: dict[str, list[list[int]]] = tokenizer(
        list(texts),
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"]


def unscored(ids: Sequence[int]) -> list[int]:
    """Tokens of a response that are read and not scored (what a tool or a user says in it), as rows hold them: `~id`."""
    return [~token for token in ids]


def as_read(ids: Sequence[int]) -> list[int]:
    """Token ids as a model reads them, whether they are scored or not."""
    return [token if token >= 0 else ~token for token in ids]


def encodes_in_threads(tokenizer: Any) -> bool:
    """Is there a backend in Rust that works as it stands? It lets other threads go on; a call that sets it anew does not."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and backend.truncation is None and backend.padding is None
