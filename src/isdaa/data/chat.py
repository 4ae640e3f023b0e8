"""What a tokenizer does by itself: the BOS it puts in front, and what its chat template makes of a conversation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from isdaa.data.checks import Message
from isdaa.errors import UserError
from isdaa.files import digest

# An assistant's words that no template contains, to see what the template writes after them.
PROBE = "isdaaprobe"
NO_TEMPLATE = (
    "the data is conversational, but the tokenizer has no chat template; set `chat_template` in its "
    "tokenizer_config.json (or a chat_template.jinja beside it), or give prompt and responses as plain text"
)


class ChatFormat:
    """A tokenizer's chat template, with the end of the assistant's turn found by rendering a probe.

    suffix: all that the template writes after the assistant's last words ('<|im_end|>\\n');
    turn_end: the part of it that is scored ('<|im_end|>'): through the first special token, or without trailing white
        space where there is none;
    stop_id: id of that token; None where the template closes a turn with no token of its own (then EOS is appended).

    place: where the template stands, for messages; None: where the tokenizer was loaded from (`template_place`).
    Raises UserError for a template that does not render a plain question and answer.
    """

    def __init__(self, tokenizer: Any, place: str | None = None) -> None:
        if not tokenizer.chat_template:
            raise UserError(NO_TEMPLATE)
        self.tokenizer = tokenizer
        self.place = place or template_place(tokenizer)
        question = {"role": "user", "content": "question"}
        probe = self.render([question, {"role": "assistant", "content": PROBE}], None, opening=False)
        _, found, self.suffix = probe.rpartition(PROBE)
        if not found:
            where = f"{self.place}: " if self.place else ""
            raise UserError(
                f"{where}the chat template leaves out the assistant's words; set one that renders messages of role 'assistant'"
            )
        tokens = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
        places = [(self.suffix.find(token), -len(token), token) for token in tokens if token in self.suffix]
        self.turn_end, self.stop_id = self.suffix.rstrip(), None
        if places:
            start, _, token = min(places)
            self.turn_end, self.stop_id = self.suffix[: start + len(token)], tokens[token]

    @cached_property
    def opening_ids(self) -> list[int]:
        """Ids of what opens the assistant's turn; empty where the template writes nothing there."""
        question = [{"role": "user", "content": "question"}]
        closed, opened = (self.render(question, None, opening=opening) for opening in (False, True))
        return tokenize_text(self.tokenizer, [opened[len(closed) :]])[0] if opened.startswith(closed) and opened != closed else []

    def render(self, messages: Sequence[Message], where: str | None, opening: bool) -> str:
        """The template's text; `opening`: with the words that open the assistant's turn; where: None of a probe."""
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opening)
        except Exception as error:  # templates raise whatever they like: jinja2's own errors, TypeError, KeyError
            line = getattr(error, "lineno", None)
            said = f"{type(error).__name__}: {error}" + (f", line {line}" if line is not None else "")
            if where is None:
                of = f"{self.place}: " if self.place else ""
                raise UserError(f"{of}the chat template refuses a question and its answer ({said}); mend it") from None
            raise UserError(
                f"{where}: the chat template refuses the conversation ({said}); mend its messages or the template{self._inside}"
            ) from None

    @property
    def _inside(self) -> str:
        return f" in {self.place}" if self.place else ""

    def prompt(self, messages: Sequence[Message], where: str) -> str:
        """The conversation so far, with the assistant's turn opened."""
        return self.render(messages, where, opening=True)

    def response(self, messages: Sequence[Message], prompt: str, answer: Message, finished: bool, where: str) -> str:
        """What follows `prompt`, the text of `messages`: answer and turn's end, or the words alone if it was cut."""
        whole = self.render([*messages, answer], where, opening=False)
        if not whole.startswith(prompt):
            place = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
            raise UserError(
                f"{where}: the chat template's prompt is no prefix of prompt and response: after "
                f"{prompt[:place][-20:]!r} the prompt has {prompt[place : place + 20]!r}, the whole "
                f"{whole[place : place + 20]!r}; set a template{self._inside} whose generation prompt is what it writes before "
                "an assistant message"
            )
        answer_text = whole[len(prompt) :]
        if not answer_text.endswith(self.suffix):
            return answer_text.rstrip()
        words = answer_text.removesuffix(self.suffix)
        return words + self.turn_end if finished else words


def tokenize_text(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text: no special token added, nothing cut, nothing padded, whatever the tokenizer is set to."""
    if not texts:
        return []
    if encodes_in_threads(tokenizer):
        # The same ids as below, in half the time: no offsets into the text are kept.
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"]


def encodes_in_threads(tokenizer: Any) -> bool:
    """Is there a backend in Rust that works as it stands? It lets other threads go on; a call that sets it anew does not."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and backend.truncation is None and backend.padding is None


def start_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text by itself: [bos] or nothing. An EOS behind is left to us."""
    plain, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    place = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return list(full[:place])


def stop_token_ids(tokenizer: Any, chat: bool, place: str | None = None) -> set[int]:
    """Ids that end a response: EOS and, in chat, the template's end-of-turn token. place: as `ChatFormat` takes it."""
    stop = {tokenizer.eos_token_id} - {None}
    if chat:
        stop |= {ChatFormat(tokenizer, place).stop_id} - {None}
    return stop


def ending_ids(tokenizer: Any) -> set[int]:
    """Ids that end a response wherever the model is used: as `stop_token_ids`, in chat where there is a usable template."""
    try:
        return stop_token_ids(tokenizer, chat=bool(tokenizer.chat_template))
    except UserError:  # the data was plain text: nobody asked the template for anything
        return stop_token_ids(tokenizer, chat=False)


def template_place(tokenizer: Any) -> str:
    """Where the chat template stands: a file of the folder that the tokenizer was loaded from, its Hub name, or ''."""
    name = str(getattr(tokenizer, "name_or_path", None) or "")
    files = [Path(name).expanduser() / file for file in ("chat_template.jinja", "tokenizer_config.json")] if name else []
    return next((str(file) for file in files if file.is_file()), name)


def template_hash(tokenizer: Any) -> str:
    """Digest of the chat template, 'none' where there is none."""
    return digest(tokenizer.chat_template) if tokenizer.chat_template else "none"


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of everything that decides token ids; padding and truncation, which calls leave set, do not."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content.pop("padding", None)
        content.pop("truncation", None)
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest([content, special, start_ids(tokenizer), template_hash(tokenizer)])
