"""What a tokenizer does by itself: the BOS it puts in front, and what its chat template makes of a conversation."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes

from isdaa.data.checks import Message
from isdaa.data.context import Before, Context, tokenize_text
from isdaa.data.marks import MARK, calls
from isdaa.errors import UserError
from isdaa.files import digest

# Words that no template contains, to see what the template writes around an assistant's words.
PROBE = "isdaaprobe"
NO_TEMPLATE = (
    "the data is conversational, but the tokenizer has no chat template; set `chat_template` in its "
    "tokenizer_config.json (or a chat_template.jinja beside it), or give prompt and responses as plain text"
)
PATIENCE = 10.0  # seconds for one conversation
QUESTION: Message = {"role": "user", "content": "question"}
# What the project itself says to `apply_chat_template`.
OURS = (
    *("tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "return_tensors", "chat_template", "tools"),
    *("messages", "conversation", "max_length", "padding", "truncation", "tokenizer_kwargs", "return_assistant_tokens_mask"),
)


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
        unread = [name for name in self.given if name not in self.reads[1]]
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
        self._special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.turn_end, self.stop_id = self.suffix.rstrip(), None
        if places:
            start, _, token = min(places)
            self.turn_end, self.stop_id = self.suffix[: start + len(token)], tokens[token]

    @cached_property
    def source(self) -> str:
        """The template's text; of several, all."""
        template = self.tokenizer.chat_template
        return template if isinstance(template, str) else json.dumps(template)

    @cached_property
    def reads(self) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
        """The keys of messages and objects and the variables that the template reads, and its own words, by its syntax tree."""
        source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", self.source)  # transformers' own tag
        try:
            tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
        except TemplateError:  # it is refused where it is rendered, or has extensions of its own
            words = frozenset(re.findall(r"\w+", source))
            return words, words, words
        keys: set[str] = {node.attr for node in tree.find_all(nodes.Getattr)}
        asked: list[Any] = [node.arg for node in tree.find_all(nodes.Getitem)]
        asked += [call.args[0] for call in tree.find_all(nodes.Call) if call.args]
        asked += [test.expr for test in tree.find_all(nodes.Compare) if any(op.op in ("in", "notin") for op in test.ops)]
        keys |= {node.value for node in asked if isinstance(node, nodes.Const) and isinstance(node.value, str)}
        constants = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        return frozenset(keys), frozenset(meta.find_undeclared_variables(tree)), frozenset(constants)

    def opening_of(self, prompt: str, messages: Sequence[Message], where: str | None, given: Mapping[str, Any] | None) -> str:
        """What opens the assistant's turn at the end of a prompt's text, with words that begin the answer."""
        so_far = messages if _prefill(messages) is None else messages[:-1]
        closed = self.render(so_far, where, opening=False, given=given) if so_far else ""
        if not prompt.startswith(closed):  # Phi-3 closes what is not to be answered with EOS
            closed = closed.removesuffix(str(self.tokenizer.eos_token))
        return prompt[len(closed) :] if prompt.startswith(closed) else ""

    @cached_property
    def opening_ids(self) -> list[int]:
        """Ids of what opens the assistant's turn; empty where the template writes nothing there."""
        return self.ids_of_opening(self.render([QUESTION], None, opening=True), [QUESTION], None, None)

    def ids_of_opening(
        self, prompt: str, messages: Sequence[Message], where: str | None, given: Mapping[str, Any] | None
    ) -> list[int]:
        """Ids of `opening_of`, as they stand at the end of the prompt's."""
        opening = self.opening_of(prompt, messages, where, given)
        if not opening:
            return []
        before = prompt.removesuffix(opening)
        context = Context(self.tokenizer)
        return context.behind([(Before(before, context.encode([before])[before]), opening)])[0][0]

    def render(
        self, messages: Sequence[Message], where: str | None, opening: bool, given: Mapping[str, Any] | None = None
    ) -> str:
        """The template's text; `opening`: with the words that open the assistant's turn; where: None of a probe.

        given: `tools` and `chat_template_kwargs` of one conversation, beside `self.given`.
        """

        def text(turns: Sequence[Message]) -> str:
            arguments = {**self.given, **(given or {})}
            with _at_most(PATIENCE, f"{where or self.place}: the chat template{self._inside}"):
                return str(
                    self.tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=opening, **arguments)
                )

        try:
            return text(messages)
        except UserError:
            raise
        except Exception as error:  # templates raise whatever they like: jinja2's own errors, TypeError, KeyError
            as_text = [_arguments_as_text(message) for message in messages]
            if as_text != list(messages):
                with suppress(Exception):  # then it is the first error that says what is wrong
                    return text(as_text)  # DeepSeek V3 writes arguments as they stand
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
            prompt = self._written(messages, prompt, whole, where, given)
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
            text = text.rstrip()
            end = "" if finished else next((token for token in self._special if text.endswith(token)), "")  # of a tool call
            return prompt, text.removesuffix(end)
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
        pieces = self._pieces(messages, prompt, answers, prompt + text, where, given)
        # The same with marks in place of what others say: none may be scored, wherever the template writes it.
        marks = {number: f"{MARK.format(number)}o" for number in others}
        marked = [{**answer, "content": marks[n]} if n in marks else answer for n, answer in enumerate(answers)]
        whole = prompt + self.response(messages, prompt, marked, finished, where, given)[1]
        seen = self._pieces(messages, prompt, marked, whole, where, given)
        scored = "".join(piece for piece, own in seen or () if own)
        if pieces is None or seen is None or any(mark in scored for mark in marks.values()):
            raise UserError(
                f"{where}: the tool and user messages of a response cannot be found in the chat template's text"
                f"{self._inside}; make pairs of single answers of it"
            )
        return prompt, pieces

    def closing(
        self,
        messages: Sequence[Message],
        answers: Sequence[Message],
        text: str,
        where: str,
        given: Mapping[str, Any] | None = None,
    ) -> str:
        """What the template writes behind `text`, prompt and response as `parts` gives them: to the end of its whole output."""
        whole = self.render(joined(messages, answers), where, opening=False, given=given)
        return whole[len(text) :] if whole.startswith(text) else ""

    @cached_property
    def tail_ids(self) -> list[int]:
        """Ids of what the template writes behind the token that ends a turn; of all behind its last words where there is none."""
        turn = [QUESTION, {"role": "assistant", "content": PROBE}]
        before = self.render(turn, None, opening=False).removesuffix(self.suffix) + (self.turn_end if self.stop_id else "")
        context = Context(self.tokenizer)
        after = self.suffix[len(self.turn_end) :] if self.stop_id else self.suffix
        return context.behind([(Before(before, context.encode([before])[before]), after)])[0][0] if after else []

    def _pieces(
        self,
        messages: Sequence[Message],
        prompt: str,
        answers: Sequence[Message],
        whole: str,
        where: str,
        given: Mapping[str, Any] | None,
    ) -> list[tuple[str, bool]] | None:
        """The pieces of `parts`; None where turns are not to be told apart. whole: prompt and response."""
        pieces, done = [], len(prompt)
        for number, answer in enumerate(answers):
            if answer["role"] != "assistant":
                continue
            start, end = len(prompt), len(whole)
            if number:
                so_far = joined(messages, answers[:number])
                before = self.prompt(so_far, where, given)
                before = before if whole.startswith(before) else self._written(so_far, before, whole, where, given)
                start = len(before) if whole.startswith(before) else -1
            if number < len(answers) - 1:
                end = self._end_of_turn(messages, answers, number, whole, where, given)
            if not done <= start <= end:
                return None
            pieces += [(whole[done:start], False), (whole[start:end], True)]
            done = end
        return [(piece, scored) for piece, scored in pieces if piece]

    def _end_of_turn(
        self,
        messages: Sequence[Message],
        answers: Sequence[Message],
        number: int,
        whole: str,
        where: str,
        given: Mapping[str, Any] | None,
    ) -> int:
        """Where one of several answers ends in the text: with what closes it where it is the last; -1: nowhere.

        Where the template closes it otherwise once others follow, it ends behind the first special token after its words.
        """
        place = len(joined(messages, answers[: number + 1])) - 1
        alone = self._after(joined(messages, answers[: number + 1]), place, where, given)
        rest = self._after(joined(messages, answers), place, where, given)
        if alone is None or rest is None:
            return -1
        closing = alone.removesuffix(self.suffix) + self.turn_end if alone.endswith(self.suffix) else alone.rstrip()
        if not rest.startswith(closing):
            at, size = min(((rest.find(token), len(token)) for token in self._special if token in rest), default=(0, 0))
            closing = rest[: at + (size if self.turn_end else 0)]  # without an end of turn the next speaker's token stands there
        # The response may end before the template's text does: it is cut, or white space follows.
        ending = rest.removesuffix(self.suffix)
        ending += self.turn_end if whole.endswith(ending + self.turn_end) and ending != rest else ""
        ending = ending if whole.endswith(ending) else rest.rstrip()
        return len(whole) - len(ending) + len(closing) if whole.endswith(ending) else -1

    def _after(self, turns: Sequence[Message], place: int, where: str, given: Mapping[str, Any] | None) -> str | None:
        """What the template writes after the last words of one message; None where it has none."""
        marks: dict[str, str] = {}

        def mark(words: str) -> str:
            name = f"{PROBE}{len(marks)}e"
            marks[name] = words
            return name

        message = dict(turns[place])
        message["content"] = mark(message["content"]) if message["content"].strip() else ""
        if message.get("tool_calls"):
            message["tool_calls"] = calls(message["tool_calls"], mark)
        text = self.render([*turns[:place], message, *turns[place + 1 :]], where, opening=False, given=given)
        ends = [text.find(name) + len(name) for name in marks if name in text]
        if not ends:
            return None
        after = text[max(ends) :]
        for name, words in marks.items():  # some templates name a call's function once more before the tool's result
            after = after.replace(name, words)
        return after

    def _written(self, messages: Sequence[Message], prompt: str, whole: str, where: str, given: Mapping[str, Any] | None) -> str:
        """The prompt without the end of its opening that the template does not write before a plain answer, or this one."""
        closed = self.render(messages, where, opening=False, given=given)
        answered = self.render([*messages, {"role": "assistant", "content": PROBE}], where, opening=False, given=given)
        before, found, _ = answered.rpartition(PROBE)
        if not found or not prompt.startswith(closed):
            return prompt
        plain = self._common(prompt, before, closed)
        return plain if whole.startswith(plain) else self._common(prompt, whole, closed)

    @staticmethod
    def _common(prompt: str, before: str, closed: str) -> str:
        """What both begin with, not ending within a tag; the prompt where that is no more than `closed`."""
        common = next((i for i, (a, b) in enumerate(zip(prompt, before, strict=False)) if a != b), min(len(prompt), len(before)))
        written = prompt[:common]
        # Not within a tag: `<think>` and `</think>` have their first character in common.
        begun = written.rfind("<")
        if begun > written.rfind(">") and written != before:
            written = written[:begun]
        return written if len(written) > len(closed) else prompt


def check_given(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Raises UserError for template arguments that are not for users to give."""
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: must be names with values, such as {{enable_thinking: false}}, not {given!r}")
    ours = [name for name in given if name in OURS]
    if ours:
        raise UserError(f"{where}: '{ours[0]}' is set by isdaa itself; leave it out")
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
    begun = {**_unmarked(messages[-1]), **answers[0], "content": prefill + (answers[0].get("content") or "")}
    return [*messages[:-1], begun, *answers[1:]]


def _prefill(messages: Sequence[Message]) -> str | None:
    """The words with which a prompt begins its answer; None where it does not (`pairs` marks such a message)."""
    return messages[-1]["content"] if messages and messages[-1].get("prefix") is True else None


def _arguments_as_text(message: Message) -> Message:
    """The message with the arguments of tool calls as JSON text."""

    def told(call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": told(call["function"])}
        arguments = call.get("arguments")
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)} if isinstance(arguments, Mapping) else call

    tool_calls = message.get("tool_calls")
    return {**message, "tool_calls": [told(call) for call in tool_calls]} if isinstance(tool_calls, list) else message


def _unmarked(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "prefix"}


def start_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text by itself: [bos] or nothing. An EOS behind is left to us."""
    plain, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    place = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return list(full[:place])


class _TooLong(BaseException):
    """No `Exception`, which a template's own environment would take for a fault of its own."""


@contextmanager
def _at_most(seconds: float, what: str) -> Iterator[None]:
    """Raises UserError where a conversation takes longer; in the main thread alone, which renders the first of all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TooLong:
        raise UserError(f"{what} takes more than {seconds:g} s for one conversation; mend it") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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


def pad_apart(tokenizer: Any, vocabulary: int) -> str | None:
    """A padding token that no row of a reward model ends with: transformers reads a classifier's rows at the last token that is
    not padding. The tokenizer's own where it will do, else a special token that texts do not have; None where there is none.

    vocabulary: rows of the model's embeddings, which are never resized.
    """
    ends = ending_ids(tokenizer)
    written = ""
    if tokenizer.chat_template:
        with suppress(UserError):  # the data may be plain text: nobody asked the template for anything
            written = ChatFormat(tokenizer).render([QUESTION, {"role": "assistant", "content": PROBE}], None, opening=False)
            ends |= set(tokenize_text(tokenizer, [written])[0][-1:])
    own = tokenizer.pad_token_id
    if own is not None and own not in ends and 0 <= own < vocabulary:
        return str(tokenizer.pad_token)
    found = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special and i < vocabulary and i not in ends}
    found.pop(str(tokenizer.bos_token), None)
    for wanted in ("pad", "reserved", "unused", "placeholder", "unk", ""):
        for token in sorted(found, key=found.__getitem__):
            if wanted in token.lower() and token not in written:
                return token
    return None


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
