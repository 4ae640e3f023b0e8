"""What a tokenizer does by itself: the BOS it puts in front, and what its chat template makes of a conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from isdaa.data.checks import Message
from isdaa.data.context import Before, Context
from isdaa.errors import UserError
from isdaa.files import digest

# Words that no template contains, to see what the template writes around an assistant's words.
PROBE = "isdaaprobe"
NO_TEMPLATE = (
    "the data is conversational, but the tokenizer has no chat template; set `chat_template` in its "
    "tokenizer_config.json (or a chat_template.jinja beside it), or give prompt and responses as plain text"
)
QUESTION: Message = {"role": "user", "content": "question"}
# What the project itself says to `apply_chat_template`.
OURS = ("tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "return_tensors", "chat_template", "tools")


class ChatFormat:
    """A tokenizer's chat template, with the end of the assistant's turn found by rendering a probe.

    suffix: all that the template writes after the assistant's last words ('<|im_end|>\\n');
    turn_end: the part of it that is scored ('<|im_end|>'): through the first special token, or without trailing white
        space where there is none;
    stop_id: id of that token; None where the template closes a turn with no token of its own (then EOS is appended).

    place: where the template stands, for messages; None: where the tokenizer was loaded from (`template_place`).
    given: what the template gets beside the messages (`chat_template_kwargs`), in all conversations.
    Raises UserError for a template that does not render a plain question and answer.
    """

    def __init__(self, tokenizer: Any, place: str | None = None, given: Mapping[str, Any] | None = None) -> None:
        if not tokenizer.chat_template:
            raise UserError(NO_TEMPLATE)
        self.tokenizer = tokenizer
        self.place = place or template_place(tokenizer)
        self.given = check_given(given or {}, "chat_template_kwargs")
        unread = [name for name in self.given if not self.names(name)]
        if unread:
            raise UserError(f"chat_template_kwargs: the chat template{self._inside} does not read '{unread[0]}'; leave it out")
        probe = self.render([QUESTION, {"role": "assistant", "content": PROBE}], None, opening=False)
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
    def source(self) -> str:
        """The template's text; of several, all."""
        template = self.tokenizer.chat_template
        return template if isinstance(template, str) else json.dumps(template)

    def names(self, word: str) -> bool:
        """Whether the template mentions a word at all."""
        return re.search(rf"\b{re.escape(word)}\b", self.source) is not None

    @cached_property
    def opening_ids(self) -> list[int]:
        """Ids of what opens the assistant's turn; empty where the template writes nothing there."""
        closed, opened = (self.render([QUESTION], None, opening=opening) for opening in (False, True))
        if not opened.startswith(closed) or opened == closed:
            return []
        context = Context(self.tokenizer)
        return context.behind([(Before(closed, context.encode([closed])[closed]), opened[len(closed) :])])[0][0]

    def render(
        self, messages: Sequence[Message], where: str | None, opening: bool, given: Mapping[str, Any] | None = None
    ) -> str:
        """The template's text; `opening`: with the words that open the assistant's turn; where: None of a probe.

        given: `tools` and `chat_template_kwargs` of one conversation, beside `self.given`.
        """
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=opening, **{**self.given, **(given or {})}
            )
        except Exception as error:  # templates raise whatever they like: jinja2's own errors, TypeError, KeyError
            line = getattr(error, "lineno", None)
            said = " ".join(f"{type(error).__name__}: {error}".split()) + (f", line {line}" if line is not None else "")
            if where is None:
                of = f"{self.place}: " if self.place else ""
                raise UserError(f"{of}the chat template refuses a question and its answer ({said}); mend it") from None
            raise UserError(
                f"{where}: the chat template refuses the conversation ({said}); mend its messages or the template{self._inside}"
            ) from None

    @property
    def _inside(self) -> str:
        return f" in {self.place}" if self.place else ""

    def prompt(self, messages: Sequence[Message], where: str, given: Mapping[str, Any] | None = None) -> str:
        """The conversation so far, with the assistant's turn opened, or through the words that a last message begins it with."""
        prefill = _prefill(messages)
        if prefill is None:
            return self.render(messages, where, opening=True, given=given)
        marked = {**_unmarked(messages[-1]), "content": prefill + PROBE}
        text, found, _ = self.render([*messages[:-1], marked], where, opening=False, given=given).rpartition(PROBE)
        if not found:
            raise UserError(f"{where}: the chat template{self._inside} leaves out the words that the answer begins with")
        return text

    def response(
        self,
        messages: Sequence[Message],
        prompt: str,
        answers: Sequence[Message],
        finished: bool,
        where: str,
        given: Mapping[str, Any] | None = None,
    ) -> tuple[str, str]:
        """(prompt, what follows it): `answers`, and the turn's end if it ended. `prompt` is the text of `messages`.

        The prompt is given back as it is, or without the thinking that the template opens for a model that answers, where it
        writes none into answers that have none (DeepSeek R1, Nemotron).
        """
        whole = self.render(joined(messages, answers), where, opening=False, given=given)
        if not whole.startswith(prompt) and _prefill(messages) is None:
            prompt = self._written(messages, prompt, where, given)
        if not whole.startswith(prompt):
            place = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
            raise UserError(
                f"{where}: the chat template's prompt is no prefix of prompt and response: after "
                f"{prompt[:place][-20:]!r} the prompt has {prompt[place : place + 20]!r}, the whole "
                f"{whole[place : place + 20]!r}; set a template{self._inside} whose generation prompt is what it writes before "
                "an assistant message"
            )
        text = whole[len(prompt) :]
        if not text.endswith(self.suffix):
            return prompt, text.rstrip()
        words = text.removesuffix(self.suffix)
        return prompt, words + self.turn_end if finished else words

    def parts(
        self,
        messages: Sequence[Message],
        prompt: str,
        answers: Sequence[Message],
        finished: bool,
        where: str,
        given: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[tuple[str, bool]]]:
        """As `response`, in pieces: (text, whether the assistant writes it). Several where others speak between its turns."""
        prompt, text = self.response(messages, prompt, answers, finished, where, given)
        others = [number for number, answer in enumerate(answers) if answer["role"] != "assistant"]
        if not others:
            return prompt, [(text, True)]
        marks = {number: f"{PROBE}{number}e" for number in others}
        marked = [{**answer, "content": marks[n]} if n in marks else answer for n, answer in enumerate(answers)]
        between = re.split("|".join(marks.values()), self.response(messages, prompt, marked, finished, where, given)[1])
        pieces: list[tuple[str, bool]] = []
        for k, part in enumerate(between):
            after, before = others[k - 1] if k else -1, others[k] if k < len(others) else len(answers)
            start = self._opened(part, answers[after + 1]) if k and after + 1 < before else 0
            end = (
                len(part)
                if k == len(others)
                else part.rfind(self.turn_end) + len(self.turn_end)
                if self.turn_end in part
                else len(part)
            )
            if after + 1 == before:  # two others in a row
                start = end = len(part)
            pieces += [(part[:start], False), (part[start:end], True), (part[end:], False)]
            if k < len(others):
                words = answers[before]["content"]
                done = sum(len(piece) for piece, _ in pieces)
                pieces.append((words if text.startswith(words, done) else words.strip(), False))
        if len(between) != len(others) + 1 or "".join(piece for piece, _ in pieces) != text:
            raise UserError(
                f"{where}: what others than the assistant say in a response cannot be told apart in the chat template's text"
                f"{self._inside}; make pairs of single answers of it"
            )
        return prompt, [(piece, scored) for piece, scored in pieces if piece]

    def _opened(self, part: str, answer: Message) -> int:
        """Where an answer begins in a text: behind what opens the assistant's turn, or at its own words."""
        for opening in (self.opening, self.opening.partition("<think")[0]):
            if opening.strip() and opening in part:
                return part.index(opening) + len(opening)
        return max(0, part.find(answer["content"].strip()))

    @cached_property
    def opening(self) -> str:
        """What opens the assistant's turn; empty where the template writes nothing there."""
        closed, opened = (self.render([QUESTION], None, opening=opening) for opening in (False, True))
        if opened.startswith(closed):
            return opened[len(closed) :]
        tokens = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
        return opened[max((opened.rfind(token) for token in tokens if token in opened), default=len(opened)) :]

    def _written(self, messages: Sequence[Message], prompt: str, where: str, given: Mapping[str, Any] | None) -> str:
        """The prompt without the end of its opening that the template does not write before a plain answer."""
        closed = self.render(messages, where, opening=False, given=given)
        answered = self.render([*messages, {"role": "assistant", "content": PROBE}], where, opening=False, given=given)
        before, found, _ = answered.rpartition(PROBE)
        if not found or not prompt.startswith(closed):
            return prompt
        common = next((i for i, (a, b) in enumerate(zip(prompt, before, strict=False)) if a != b), min(len(prompt), len(before)))
        written = prompt[:common]
        # Not within a tag: `<think>` and `</think>` have their first character in common.
        begun = written.rfind("<")
        if begun > written.rfind(">") and written != before:
            written = written[:begun]
        return written if len(written) > len(closed) else prompt


def check_given(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Raises UserError for template arguments that are not for users to give."""
    ours = [name for name in given if name in OURS]
    if ours:
        raise UserError(f"{where}: '{ours[0]}' is not for the template to get from here; leave it out")
    return dict(given)


def given_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row's template gets beside its messages."""
    own = check_given(row.get("chat_template_kwargs") or {}, f"{row.get('where', 'row')}: column 'chat_template_kwargs'")
    return {**own, "tools": row["tools"]} if row.get("tools") else own


def joined(messages: Sequence[Message], answers: Sequence[Message]) -> list[Message]:
    """The conversation of a prompt and its answers: words that begin an answer and what goes on from them are one message."""
    prefill = _prefill(messages)
    if prefill is None or not answers:
        return [*messages, *answers]
    return [*messages[:-1], {**answers[0], "content": prefill + (answers[0].get("content") or "")}, *answers[1:]]


def _prefill(messages: Sequence[Message]) -> str | None:
    """The words with which a prompt begins its answer; None where it does not (`pairs` marks such a message)."""
    return messages[-1]["content"] if messages and messages[-1].get("prefix") is True else None


def _unmarked(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "prefix"}


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
