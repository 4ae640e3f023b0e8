"""Models answer a benchmark's questions: turn by turn, at the question's temperature, every answer kept as it is drawn.

An answer's key is a digest of all that decides it (weights, prompt ids, temperature, limit, seed, stream of random
numbers), and it depends on nothing else, so that a second run draws only what is missing: after a kill, for more
questions, beside another model. Several processes share the batches; an answer does not depend on who draws it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from isdaa.data.pairs import TEMPLATE_COLUMNS
from isdaa.distributed import dealt, once, world_size
from isdaa.errors import UserError
from isdaa.evaluation.benchmarks.request import BenchmarkRequest
from isdaa.evaluation.benchmarks.sets.benchmark import Answer, Benchmark, Generation, Question, next_prompt
from isdaa.evaluation.checkpoint import Checkpoint
from isdaa.evaluation.judges.replies import TAIL, Parts, opened_by, split
from isdaa.evaluation.model_digest import model_digest
from isdaa.evaluation.records import Lines, Record
from isdaa.files import digest
from isdaa.terminal import Bar, progress

FORMAT = 1  # of the records; raise it when the same work would give other answers
ROOM_STEP = 128  # tokens; answers that a short context cuts share a few limits, so that they fill batches


def generation_of(bench: Benchmark, request: BenchmarkRequest) -> Generation:
    """How the questions are answered: as the benchmark wants it, with the user's limit on new tokens."""
    own = bench.generation
    return replace(own, max_new_tokens=request.max_new_tokens or own.max_new_tokens)


@dataclass(frozen=True)
class Drawn:
    """A model's answer to one question.

    tokens: of all turns, without thinking that is left out; cut: turns that a limit ended; no_room: that had no room at all.
    """

    answer: Answer
    tokens: int
    cut: int
    no_room: int

    @property
    def finished(self) -> bool:
        """Whether the model ended every turn by itself."""
        return not self.cut


class Respondent:
    """A model that answers. Making one reads its tokenizer and a digest of its weights; these are loaded when first needed.

    role: policies share their random numbers, so that only the models differ; the opponent has its own.
    Raises UserError where the tokenizer lacks what the questions need, or its chat template cannot be used.
    """

    def __init__(
        self,
        model: Checkpoint,
        bench: Benchmark,
        request: BenchmarkRequest,
        questions: Sequence[Question],
        role: Literal["policy", "opponent"],
    ) -> None:
        from isdaa.data.chat import stop_token_ids, template_hash, tokenizer_digest
        from isdaa.data.encoder import UNCUT, Encoder
        from isdaa.models.loading import load_tokenizer

        self.path, self.label, self.request, self.role = model.path, model.label, request, role
        self.generation = generation_of(bench, request)
        tokenizer = load_tokenizer(model.path, trust_remote_code=request.trust_remote_code)
        if request.chat_template is not None:
            tokenizer.chat_template = request.chat_template
        chats = {not isinstance(question.prompt, str) for question in questions}
        if True in chats and not tokenizer.chat_template:
            raise UserError(
                f"{model.path}: {bench.title} asks in conversations, and the tokenizer has no chat template; give one with "
                "--chat_template FILE (Jinja), or set `chat_template` in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        given = dict(request.tokenization.chat_template_kwargs)
        self.encoder = Encoder(tokenizer, replace(UNCUT, chat_template_kwargs=given), request.template_file)
        self.stop = {chat: stop_token_ids(tokenizer, chat, request.template_file) for chat in chats}
        self.template = template_hash(tokenizer)
        self.digest = once(lambda: model_digest(model.path, request.trust_remote_code))
        self._identity = [FORMAT, self.digest, request.dtype, tokenizer_digest(tokenizer), request.settings.seed]
        self._model: Any = None
        self.asked(questions, {question.id: () for question in questions})  # does the template take every question?

    @property
    def model(self) -> Any:
        """The weights, on the GPU where there is one."""
        if self._model is None:
            import torch

            from isdaa.models.loading import load_model

            device = "cuda" if torch.cuda.is_available() else None
            model = load_model(
                self.path, dtype=self.request.dtype, device=device, trust_remote_code=self.request.trust_remote_code
            )
            self._model = model.requires_grad_(False)
        return self._model

    def release(self) -> None:
        """Free the weights: the next model needs the memory."""
        self._model = None

    def asked(self, questions: Sequence[Question], turns: Mapping[str, Sequence[str]]) -> list[_Asked]:
        """What the model is asked next, for every question that is not answered to its end."""
        found = [(question, next_prompt(question, turns[question.id])) for question in questions]
        rows = [
            {"prompt": prompt, "prompt_ids": None, "where": question.where}
            | {name: question.row.get(name) for name in TEMPLATE_COLUMNS}
            for question, prompt in found
            if prompt is not None
        ]
        prompts = self.encoder.prompts(rows)
        left = [question for question, prompt in found if prompt is not None]
        return [self._asked(q, len(turns[q.id]), prompt.ids, prompt.chat) for q, prompt in zip(left, prompts, strict=True)]

    def _asked(self, question: Question, turn: int, ids: list[int], chat: bool) -> _Asked:
        generation = self.generation
        temperature, top_p = generation.temperature_of(question), generation.top_p
        stream = f"{self.role}/{self.request.benchmark}/{question.id}/{turn}"
        key = digest([*self._identity, stream, ids, sorted(self.stop[chat]), temperature, top_p, generation.max_new_tokens])
        return _Asked(key, question, turn, ids, chat, temperature, stream)

    def room(self, tokens: int) -> int:
        """How many tokens an answer to a prompt of `tokens` may have: the limit, or what the model's context leaves."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        limit = self.generation.max_new_tokens
        left = limit if context is None else context - tokens
        return limit if left >= limit else max(left - left % ROOM_STEP if left >= ROOM_STEP else left, 0)

    def draw(self, batch: Sequence[_Asked], room: int) -> list[Record]:
        """One record each; all have the same temperature and room."""
        from isdaa.models.sampling.sampling import SamplingSettings, respond

        generation, first = self.generation, batch[0]
        sampling: dict[str, Any] = {"temperature": first.temperature, "top_p": generation.top_p, "max_new_tokens": room}
        texts: list[tuple[str, int, bool]] = [("", 0, False)] * len(batch)
        if room:
            drawn = respond(
                self.model,
                self.tokenizer,
                [(one.ids, one.chat) for one in batch],
                SamplingSettings(**sampling),
                self.stop,
                self.request.settings.seed,
                [one.stream for one in batch],
                self.request.settings.batch_size,
            )
            # In chat, white space around an answer goes, as in the benchmarks' own programs.
            texts = [(one.text.strip() if first.chat else one.text, len(one.ids), bool(one.finished)) for one in drawn]
        head = {"model": self.path, "model_digest": self.digest, "dtype": self.request.dtype, "template": self.template}
        return [
            {
                "key": one.key,
                "question": one.question.id,
                "turn": one.turn + 1,
                "text": text,
                "tokens": tokens,
                "finished": finished,
                "prompt_tokens": len(one.ids),
                "room": room,
                "sampling": sampling,
                "seed": self.request.settings.seed,
                **head,
            }
            for one, (text, tokens, finished) in zip(batch, texts, strict=True)
        ]

    def parts(self, one: _Asked, text: str) -> Parts:
        """Thinking and answer of what the model wrote; the prompt may have begun the thought."""
        return split(text, opened=opened_by(str(self.tokenizer.decode(one.ids[-TAIL:], skip_special_tokens=False))))

    def tokens(self, parts: Parts, record: Record) -> int:
        """Tokens of the answer; they are counted again where thinking is left out."""
        if self.request.settings.keep_thinking or not parts.marked:
            return int(record["tokens"])
        return len(self.tokenizer(parts.answer, add_special_tokens=False)["input_ids"])


def parted(answer: Answer, keep: bool) -> Answer:
    """A file's answer without its thinking, and then without the file's counts, which are of thinking and answer together."""
    parts = tuple(split(turn) for turn in answer.turns)
    if keep or not any(one.marked for one in parts):
        return replace(answer, parts=parts)
    row = {name: value for name, value in answer.row.items() if name not in ("metadata", "conv_metadata")}
    return replace(answer, turns=tuple(one.answer for one in parts), tokens=None, row=row, parts=parts)


@dataclass(frozen=True)
class _Asked:
    """One turn of one question, as the model sees it."""

    key: str
    question: Question
    turn: int
    ids: list[int]
    chat: bool
    temperature: float
    stream: str


def answer(respondents: Sequence[Respondent], questions: Sequence[Question], store: Lines) -> list[dict[str, Drawn]]:
    """Every model's answers, by question id, in the order of the models. What the store holds is not drawn again."""
    turns = sum(1 + len(question.follow_ups) for question in questions)
    results = []
    with progress("answering", turns * len(respondents)) as bar:
        for respondent in respondents:
            bar.update(0, note=respondent.label)
            results.append(_answers(respondent, questions, store, bar))
            respondent.release()
    return results


def _answers(respondent: Respondent, questions: Sequence[Question], store: Lines, bar: Bar) -> dict[str, Drawn]:
    said: dict[str, list[tuple[str, Parts, int, Record]]] = {question.id: [] for question in questions}
    while asked := respondent.asked(questions, {name: [text for text, *_ in turns] for name, turns in said.items()}):
        missing = [one for one in asked if one.key not in store]
        bar.update(len(asked) - len(missing))
        batches = list(_batches(respondent, missing))
        for start in range(0, len(batches), world_size()):
            for drawn in dealt(batches[start : start + world_size()], lambda own: [respondent.draw(*one) for one in own]):
                store.add(drawn)
                bar.update(len(drawn))
        for one in asked:
            record = store[one.key]
            part = respondent.parts(one, record["text"])
            text = record["text"] if respondent.request.settings.keep_thinking else part.answer
            said[one.question.id].append((text, part, respondent.tokens(part, record), record))
    found = {}
    for name, turns in said.items():
        texts, parts, tokens, records = zip(*turns, strict=True)
        found[name] = Drawn(
            Answer(name, respondent.label, texts, tokens[-1], parts=parts),
            tokens=sum(tokens),
            cut=sum(not record["finished"] for record in records),
            no_room=sum(not record["room"] for record in records),
        )
    return found


def _batches(respondent: Respondent, asked: Sequence[_Asked]) -> Iterator[tuple[list[_Asked], int]]:
    """(batch, room): one temperature and one room each, the longest prompts first; small enough that every process gets one."""
    groups: dict[tuple[float, int, bool], list[_Asked]] = {}
    for one in sorted(asked, key=lambda one: -len(one.ids)):
        groups.setdefault((one.temperature, respondent.room(len(one.ids)), one.chat), []).append(one)
    size = min(respondent.request.settings.batch_size, max(1, math.ceil(len(asked) / world_size())))
    for (_, room, _), members in groups.items():
        for start in range(0, len(members), size):
            yield members[start : start + size], room
