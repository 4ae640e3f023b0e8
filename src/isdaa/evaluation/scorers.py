"""What gives a response its score: the embedded world's gold reward or a reward model, behind one small interface.

A scorer takes rows and returns one number a row. A row is a canonical prompt row (`prompt`: text or messages; `facts`:
a dict or None) with `response` (text, or one assistant message in a list) and `finished` (False: a limit cut
it). Nothing else in the project can tell which scorer it holds. `OwnScorer` makes one of what users write.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable
from uuid import uuid4

from isdaa.config import Position
from isdaa.data.chat import joined
from isdaa.data.context import tokenize_text
from isdaa.data.conversation import turns_of
from isdaa.data.overlap import shared
from isdaa.distributed import once
from isdaa.errors import UserError, nearest
from isdaa.evaluation.model_digest import model_digest
from isdaa.evaluation.reward_reading import Frame, Reading
from isdaa.files import digest
from isdaa.record import read_record
from isdaa.terminal import Bar

ScorerRow = Mapping[str, Any]
log = logging.getLogger(__name__)

GOLD = "gold"
FITS = 2  # of how prompt and response share a model's positions; raise it when that changes
USUAL = 4096  # tokens of a response, which leave a model that has as many positions beside the prompt as it was
CUT = {"prompt": "beginning", "response": "end"}
PLACEHOLDER = "This is an answer."  # where input is looked at before there are answers, and the data has none
OFFSET = ("roberta", "camembert", "longformer", "mpnet", "data2vec-text", "xmod", "ernie_m")  # positions begin behind the pad's


class Fed(NamedTuple):
    """What a reward model is fed for one row. types: None where its tokenizer gives none. lacking: of prompt and response, those
    that its positions do not hold whole."""

    ids: list[int]
    types: list[int] | None
    lacking: tuple[str, ...] = ()


class Scorer(Protocol):
    """`name` is what the user called it; `digest` changes whenever its scores may, and is part of every cache key."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    def score(self, rows: Sequence[ScorerRow], progress: Bar | None = None) -> list[float]:
        """One finite score a row, in order; higher is better. Raises UserError for rows that it cannot judge."""
        ...


@runtime_checkable
class OwnFacts(Protocol):
    """A scorer that says itself what records are to say of it, beside name and digest."""

    def facts(self) -> dict[str, Any]: ...


def about(scorer: Scorer | None, prompts: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """What a run says of a scorer before it uses it, a line each: which token a reward model is read at, and how good it is.

    prompts: rows with `prompt`, where they are known; conversations and plain texts are read differently.
    """
    if not isinstance(scorer, RewardModelScorer):
        return []
    scorer.asked |= {type(row["prompt"]) for row in prompts if row.get("prompt")}
    return scorer.about()


def doubts_of(scorer: Scorer | None) -> list[str]:
    """Warnings about its scores of the prompts that `about` was given; the report shows them, too."""
    if not isinstance(scorer, RewardModelScorer) or scorer.reading.record is not None or not scorer.reading.bare(scorer.asked):
        return []
    return [
        f"scorer {scorer.name}: its tokenizer has a chat template, but the prompts are plain text, to which it is not applied; "
        "the scores of a reward model that was trained on conversations may mean nothing then: give prompts as messages"
    ]


SHARED = 0.1  # of the pairs' responses, from which on a scorer is said to have been trained on the policy's own


def learnt_alike(scorer: Scorer | None, policies: Iterable[Mapping[str, Any] | None]) -> list[str]:
    """A line where a reward model was trained on the pairs that a policy was trained on. policies: `trained_on` of records."""
    record = scorer.reading.record if isinstance(scorer, RewardModelScorer) else None
    if scorer is None or record is None or record.trained_on is None:
        return []
    share, error = max((shared(record.trained_on, sketch) for sketch in policies), default=(0.0, 0.0))
    if share - error < SHARED:
        return []
    return [
        f"scorer {scorer.name} was trained on the policy's own pairs (about {100 * share:.0f} % of them): it shares their "
        "mistakes, so the win rate can rise while the text gets worse; watch KL, and judge by a reward model trained on other "
        "pairs or by a judge model (--judge_model)"
    ]


def cut_by_positions(scorer: Scorer, lacking: Sequence[Sequence[str]]) -> list[str]:
    """A line for rows that a reward model cannot read whole. lacking: `Fed.lacking` of each row that was scored."""
    counts = [(sum(what in row for row in lacking), f"{what}s lost their {end}") for what, end in CUT.items()]
    shares = " and ".join(f"{100 * count / len(lacking):.2g} % of the {words}" for count, words in counts if count)
    if not shares:
        return []
    return [f"scorer {scorer.name}: {shares}: prompt and response together are longer than its input may be"]


def facts(scorer: Scorer) -> dict[str, Any]:
    """What records of an evaluation say of a scorer."""
    found: dict[str, Any] = {"name": scorer.name, "digest": scorer.digest}
    if isinstance(scorer, RewardModelScorer):
        found |= {"position": scorer.reading.position, "about": scorer.about()}
        found |= {} if scorer.reading.label is None else {"label": scorer.reading.label}
    elif isinstance(scorer, OwnFacts):
        found |= scorer.facts()
    return found


def load_scorer(
    name: str,
    *,
    max_prompt_length: int = 512,
    position: Position = "auto",
    label: str | None = None,
) -> Scorer:
    """`gold`, or a sequence-classification model's folder or Hub name. Nothing large is loaded before the first score.

    max_prompt_length: tokens of a prompt that a reward model reads, `tokenization.max_prompt_length` of the policies.
    position: where a reward model is read (`isdaa.evaluation.reward_reading`), `scorer.position` of the configuration.
    label: of a classifier with two, the one that means good, `scorer.label`.
    Raises UserError where there is no such folder.
    """
    if name == GOLD:
        return GoldScorer()
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise UserError(
            f"scorer {name!r}: no such folder{nearest(name, [GOLD])}; name `gold`, a reward model's folder or Hub name"
        )
    return RewardModelScorer(name, max_prompt_length=max_prompt_length, position=position, label=label)


class OwnScorer:
    """What a user wrote: a function of the rows, or an object with `score(rows)`, with `name` and `digest` where it has them.

    A response is text for it, also of a conversation. Without a digest nothing says whether its scores would be the same again,
    so each evaluation scores anew. Raises UserError for what cannot be called with rows alone.
    """

    def __init__(self, given: Any) -> None:
        kind = type(given).__name__
        if isinstance(given, type):
            raise UserError(f"scorer {given.__name__} is a class; give an object of it, {given.__name__}()")
        if hasattr(given, "save_pretrained"):
            raise UserError(f"scorer: a {kind} in memory; save it beside its tokenizer, and give the folder")
        self._score = given if inspect.isroutine(given) else getattr(given, "score", given)
        if not callable(self._score):
            raise UserError(
                f"scorer: cannot score with {kind}; give a reward model's folder or Hub name, `gold`, `none`, a "
                "function of the rows, or an object with score(rows)"
            )
        own = getattr(given, "name", None) or getattr(given, "__name__", kind)
        self.name = own.strip("<>") if isinstance(own, str) else kind
        try:
            inspect.signature(self._score).bind([])
        except TypeError:
            raise UserError(
                f"scorer {self.name}: takes {inspect.signature(self._score)}; it is called with the rows alone"
            ) from None
        except ValueError:  # of code that is not Python's
            pass
        told = getattr(given, "digest", None)
        if told is not None and not isinstance(told, str):
            raise UserError(
                f"scorer {self.name}: its digest is {type(told).__name__}; give a text that changes whenever its scores may"
            )
        self.digest = told or once(lambda: uuid4().hex)

    def score(self, rows: Sequence[ScorerRow], progress: Bar | None = None) -> list[float]:
        """What it gives. Raises UserError where that is not one finite number a row."""
        given = self._score([{**row, "response": response_text(row)} for row in rows])
        if isinstance(given, str | bytes | Mapping | set) or not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0:
            raise UserError(f"scorer {self.name}: gave {type(given).__name__}; it must give a list with one number a row")
        if progress is not None:
            progress.update(len(rows))
        return checked(list(given), rows, self.name)


class GoldScorer:
    """The embedded world's judge, who knows the facts behind each post."""

    name = GOLD
    # The judge is code: one that scores otherwise is another scorer, and needs another digest (a test holds its scores to it).
    digest = "87de42710d3c83d00c2c4b9e"

    def check(self, prompts: Sequence[Mapping[str, Any]]) -> None:
        """Raises UserError where answers to these prompts could not be judged, before there are any."""
        self.score([example(prompt) for prompt in prompts])

    def score(self, rows: Sequence[ScorerRow], progress: Bar | None = None) -> list[float]:
        """Points by `isdaa.world.gold_reward`. Raises UserError where a row carries no facts."""
        from isdaa.world import gold_reward

        scores = []
        for row in rows:
            if not row.get("facts"):
                raise UserError(
                    f"{_place(row)}: scorer `gold` needs the column `facts` of the embedded world; "
                    "for other data name a reward model with --scorer"
                )
            scores.append(float(gold_reward(row["facts"], response_text(row), bool(row["finished"]))))
            if progress is not None:
                progress.update()
        return checked(scores, rows, self.name)


class RewardModelScorer:
    """A sequence-classification model with one output, or with two labels of which one means good, in fp32.

    The text is tokenised by the model's own tokenizer, with the `chat_template_kwargs` that its record names: a conversation as
    its chat template writes it, to the end, plain text with EOS where it ended. Where it is read, its folder says, or `position`
    does (`Reading`); at `response_end` it is tokenised as a policy's response would be, through the end of the turn. Encoders
    without a chat template get prompt and answer as two texts (`Reading.pair`), with token types where they have them.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        batch_size: int = 32,
        max_prompt_length: int = 512,
        device: str | None = None,
        position: Position = "auto",
        label: str | None = None,
    ) -> None:
        self.name = str(path)
        self.reading = Reading(self.name, position, label)
        self._warned: set[str] = set()
        self.asked: set[type] = set()  # kinds of prompts: lists of messages, texts
        self.lacking: list[tuple[str, ...]] = []  # of each row of the last call of `score`, what was cut by a lack of positions
        self.batch_size, self.max_prompt_length, self.device = batch_size, max_prompt_length, device
        self._model: Any = None
        self._digest: str | None = None

    @property
    def digest(self) -> str:
        """Of the weights, the tokenizer, and how a row becomes their input."""
        if self._digest is None:
            from isdaa.data.chat import tokenizer_digest

            how: list[Any] = [self.max_prompt_length, *([self.template_kwargs] if self.template_kwargs else [])]
            if self.reading.template_end:
                how.append(["template_end", self.reading.pad_id, self.reading.close_cut])
            if self.reading.pair:
                how.append("pair")
            if self._positions() < self.max_prompt_length + USUAL:
                how.append(["fits", FITS])
            if self.reading.head.bad is not None:
                how.append(["less", self.reading.head.good, self.reading.head.bad])
            self._digest = digest([self._weights(), tokenizer_digest(self.tokenizer), *how])
        return self._digest

    def _weights(self) -> str:
        """Digest of the model's files; of a model of the Hub, of its weights."""
        from isdaa.models.loading import load_sequence_classifier, weights_digest
        from isdaa.models.places import local_folder

        if local_folder(self.name) is not None:
            return model_digest(self.name)
        return weights_digest(load_sequence_classifier(self.name, labels=self._labels))

    @property
    def _labels(self) -> int:
        return 1 if self.reading.head.bad is None else 2

    def about(self) -> list[str]:
        """Where it is read, and how often it agrees with pairs that its training held out, where its record says so."""
        agreement = self.reading.agreement()
        words = [self.reading.described(self.tokenizer, self.asked), *filter(None, [self.reading.head.words])]
        return ["; ".join(words), *([agreement] if agreement else [])]

    def check(self, prompts: Sequence[Mapping[str, Any]]) -> None:
        """Raises UserError for all that would keep the scorer from judging answers to these prompts, before there are any.

        prompts: rows with `prompt`, `chosen` or None, and `prompt_id` or `id`.
        """
        from isdaa.evaluation.left_out import NOT_FINITE, broken_weights
        from isdaa.models.finite_weights import NotFiniteError, listed
        from isdaa.models.places import local_folder

        try:
            # A model of the Hub is loaded for its digest, which looks at them, too.
            broken = broken_weights(self.name, scorer=True) if local_folder(self.name) is not None else []
            _ = self.digest
        except NotFiniteError as error:
            broken = error.names
        if broken:
            raise UserError(f"scorer {self.name}: its {NOT_FINITE} ({listed(broken)}); take another one")
        ids = [token for row in self.inputs([example(prompt) for prompt in prompts]) for token in row.ids]
        vocabulary = getattr(self.config, "vocab_size", None)
        if vocabulary is not None and max(ids, default=0) >= vocabulary:
            raise UserError(
                f"scorer {self.name}: its tokenizer gives id {max(ids)}, but the model knows {vocabulary} tokens; "
                "put the tokenizer that it was trained with into its folder"
            )

    def shown_input(self, prompt: Mapping[str, Any]) -> list[str]:
        """What the model is fed for a prompt and an answer, token by token: lines for people."""
        (fed,) = self.inputs([example(prompt)])
        whose = "the data's chosen response" if prompt.get("chosen") else f"the placeholder {PLACEHOLDER!r}"
        read = None
        if not self.reading.encoder:
            skipped = self.reading.pad_id if self.reading.template_end else None
            read = max((i for i, token in enumerate(fed.ids) if token != skipped), default=len(fed.ids) - 1)
        lines = [f"scorer {self.name}: its input for prompt {_place(example(prompt))} and {whose}, {len(fed.ids)} tokens:"]
        for i, token in enumerate(fed.ids):
            kind = "" if fed.types is None else f"  type {fed.types[i]}"
            here = "  <- read here" if i == read else ""
            lines.append(f"{i:5d}  id {token:6d}  {self.tokenizer.convert_ids_to_tokens(token)!r}{kind}{here}")
        return lines

    @cached_property
    def template_kwargs(self) -> dict[str, Any]:
        """What the chat template got beside the messages when the model was trained."""
        record = read_record(self.name)
        return dict(((record.config.get("tokenization") if record else None) or {}).get("chat_template_kwargs") or {})

    @property
    def tokenizer(self) -> Any:
        """The reward model's own."""
        return self.reading.tokenizer

    @cached_property
    def config(self) -> Any:
        """The model's configuration, of its text part."""
        from isdaa.models.loading import model_config

        return model_config(self.name).get_text_config()

    @property
    def model(self) -> Any:
        """Loaded when first asked for."""
        if self._model is None:
            import torch

            from isdaa.models.loading import load_sequence_classifier

            device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
            pad = self.reading.pad_id
            model = load_sequence_classifier(
                self.name,
                device=device,
                pad_id=self._pad,
                by_mask=not self.reading.template_end or pad is None,
                labels=self._labels,
            )
            self._model = model.requires_grad_(False)
        return self._model

    @property
    def _pad(self) -> int:
        """The padding token: the model's own where its class looks for it."""
        pad = self.tokenizer.pad_token_id if self.reading.pad_id is None else self.reading.pad_id
        return int(pad or 0)  # no token pads: the mask tells

    def score(self, rows: Sequence[ScorerRow], progress: Bar | None = None) -> list[float]:
        """The model's output where each row is read. Raises UserError where it is not finite."""
        import torch

        fed = self.inputs(rows)
        self.lacking = [row.lacking for row in fed]
        sequences, head = [row.ids for row in fed], self.reading.head
        order = sorted(range(len(rows)), key=lambda i: len(sequences[i]))
        pad = self._pad
        scores = [math.nan] * len(rows)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            longest = len(sequences[batch[-1]])
            ids = torch.full((len(batch), longest), pad)
            mask = torch.zeros((len(batch), longest), dtype=torch.long)
            types = torch.zeros((len(batch), longest), dtype=torch.long)
            more = {}
            for line, index in enumerate(batch):
                kinds = fed[index].types
                if kinds is not None:
                    types[line, : len(kinds)] = torch.tensor(kinds)
                    more["token_type_ids"] = types
                ids[line, : len(sequences[index])] = torch.tensor(sequences[index])
                mask[line, : len(sequences[index])] = 1
            with torch.no_grad():
                device = self.model.device
                more = {name: value.to(device) for name, value in more.items()}
                logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), **more).logits.float()
            values = logits[:, head.good] if head.bad is None else logits[:, head.good] - logits[:, head.bad]
            for index, value in zip(batch, values.tolist(), strict=True):
                scores[index] = value
            if progress is not None:
                progress.update(len(batch))
        return checked(scores, rows, self.name)

    def token_ids(self, rows: Sequence[ScorerRow]) -> list[list[int]]:
        """Ids of each row's prompt and response. A lack of positions cuts the prompt's beginning, and a response that has not
        room alone."""
        return [fed.ids for fed in self.inputs(rows)]

    def inputs(self, rows: Sequence[ScorerRow]) -> list[Fed]:
        """What the model is fed for each row."""
        if self.reading.pair:
            return self._pairs(rows)
        chat = next((row for row in rows if isinstance(row["prompt"], list)), None)
        if chat is not None and not self.tokenizer.chat_template:
            raise UserError(
                f"scorer {self.name}: the prompts are conversations, but the scorer's own tokenizer has no chat template; set "
                "`chat_template` in the tokenizer_config.json of its folder (or a chat_template.jinja beside it) to the one that "
                "it was trained with, or give plain-text prompts"
            )
        return self._ids(rows)

    def _pairs(self, rows: Sequence[ScorerRow]) -> list[Fed]:
        """Prompt and answer as two texts, as `tokenizer(prompt, answer)` writes them."""
        frame, typed = Frame.of(self.tokenizer), "token_type_ids" in self.tokenizer.model_input_names
        positions = self._positions() - frame.size
        asked, answers = zip(*map(_two_texts, rows), strict=True)
        ones, twos = ([*tokenize_text(self.tokenizer, texts)] for texts in (asked, answers))
        limit = self.max_prompt_length
        found = []
        for one, two in zip(ones, twos, strict=True):
            room = max(positions - len(two), 0)
            ids, types = frame.around(one[max(len(one) - min(limit, room), 0) :], two[:positions])
            lacking = _lacking(min(len(one), limit) > room, len(two) > positions)
            found.append(Fed(ids, types if typed else None, lacking))
        several = sum(isinstance(row["prompt"], list) and len(row["prompt"]) > 1 for row in rows)
        self._warn_of_cuts(found, positions + frame.size, sum(len(ids) > limit for ids in ones))
        self._warn(several, len(rows), "prompts have several turns: their texts are joined by blank lines, without their roles")
        self._warn(
            sum(not row["finished"] for row in rows), len(rows), "responses did not end (a limit cut them): it cannot see the "
            "cut, since its input has no end of an answer"
        )  # fmt: skip
        return found

    def _positions(self) -> int:
        """Tokens that fit into a row."""
        config = self.config
        positions = getattr(config, "max_position_embeddings", None) or 1_000_000
        if self.reading.encoder:  # whose rows no cache of positions makes longer, and whose tokenizers know the limit
            first = int(config.pad_token_id or 0) + 1 if any(kind in config.model_type for kind in OFFSET) else 0
            return min(positions - first, int(min(self.tokenizer.model_max_length, 1_000_000)))
        return int(positions)

    def _ids(self, rows: Sequence[ScorerRow]) -> list[Fed]:
        from isdaa.data.context import as_read
        from isdaa.data.encoder import Encoder, TokenizationSettings, Whole
        from isdaa.data.pairs import TEMPLATE_COLUMNS

        positions = self._positions()
        reading = self.reading

        def encoder(length: int, limit: int) -> Encoder:
            """For rows of so many tokens, of which prompts have at most `limit`."""
            settings = TokenizationSettings(length, limit, "keep_end", self.template_kwargs)
            return Encoder(self.tokenizer, settings, whole=reading.template_end, close_cut=reading.close_cut)

        def read(encoder: Encoder, rows: Sequence[Mapping[str, Any]]) -> list[Whole]:
            if reading.template_end:
                return encoder.read(rows, "response")
            answered = [(prompt, response) for prompt, (response,) in encoder.answered(rows, ("response",))]
            return [Whole(prompt.ids + as_read(response.ids), prompt.cut, response.cut) for prompt, response in answered]

        plain = [
            # An empty response that never ended has no token at all: EOS stands for it.
            {
                **{name: row.get(name) for name in ("prompt", "response", *TEMPLATE_COLUMNS)},
                "response_finished": bool(row["finished"]) or not response_text(row),
                "where": _place(row),
            }
            for row in rows
        ]
        closed = sum(not row["response_finished"] and isinstance(row["prompt"], list) for row in plain)
        roomy = encoder(self.max_prompt_length + 1_000_000_000, self.max_prompt_length)
        whole, found = read(roomy, plain), []
        for row, one in zip(plain, whole, strict=True):
            lacks = len(one.ids) - positions
            if lacks <= 0:
                found.append(Fed(one.ids, None))
                continue
            # The prompt gives way, down to one token; then the response.
            (prompt,) = roomy.prompts([row])
            room = min(max(len(prompt.ids) - lacks, 1), positions - 1)
            (fitted,) = read(encoder(positions, room), [row])
            found.append(Fed(fitted.ids, None, _lacking(room < len(prompt.ids), fitted.response_cut)))
        self._warn_of_cuts(found, positions, sum(one.prompt_cut for one in whole))
        self._warn(
            closed if reading.close_cut else 0,
            len(rows),
            "responses did not end (a limit cut them); its chat template closes them, so it cannot see the cut",
        )
        return found

    def _warn_of_cuts(self, found: Sequence[Fed], positions: int, long: int) -> None:
        """Warn of what is cut. long: how many prompts have more than `max_prompt_length` tokens."""
        beside = f"prompts do not fit its {positions} positions beside their responses and lost their beginnings"
        for what, words in (("prompt", beside), ("response", f"responses do not fit its {positions} positions and were cut")):
            self._warn(sum(what in fed.lacking for fed in found), len(found), words)
        self._warn(long, len(found), f"prompts have more than {self.max_prompt_length} tokens and were cut")

    def _warn(self, count: int, rows: int, what: str) -> None:
        """Say once what happens to rows, with its figures in the first call where it does."""
        if count and what not in self._warned:
            self._warned.add(what)
            log.warning("scorer %s: %d of %d %s", self.name, count, rows, what)


def _lacking(prompt: bool, response: bool) -> tuple[str, ...]:
    return tuple(what for what, cut in zip(CUT, (prompt, response), strict=True) if cut)


def _two_texts(row: ScorerRow) -> tuple[str, str]:
    """(prompt, answer) of a row as plain texts, the turns of a conversation joined by blank lines."""
    prompt, response = row["prompt"], row["response"]
    if isinstance(prompt, str):
        return prompt, response_text(row)
    answers = [{"role": "assistant", "content": response}] if isinstance(response, str) else list(response)
    turns = joined(prompt, answers)
    asked, answered = turns[: len(turns) - len(answers)], turns[len(turns) - len(answers) :]
    texts = ["\n\n".join(words for _, words in turns_of(part) if words) for part in (asked, answered)]
    return texts[0], texts[1]


def example(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """A row to be scored, for a prompt: with the data's chosen response, else with `PLACEHOLDER`."""
    answer = prompt.get("chosen") or PLACEHOLDER
    return {**prompt, "id": prompt.get("prompt_id", prompt.get("id")), "response": answer, "finished": True}


def response_text(row: ScorerRow) -> str:
    """The response's words, of text or of an assistant message."""
    response = row["response"]
    return response if isinstance(response, str) else str(response[-1]["content"])


def checked(scores: Sequence[Any], rows: Sequence[ScorerRow], name: str) -> list[float]:
    """The scores, if there is a finite one for every row. Raises UserError naming the first row without."""
    if len(scores) != len(rows):
        raise UserError(
            f"scorer {name}: {len(scores)} scores for {len(rows)} rows; it must give one number a row, in their order"
        )
    found = [_number(score) for score in scores]
    for score, number, row in zip(scores, found, rows, strict=True):
        if not math.isfinite(number):
            raise UserError(f"scorer {name}: the score of {_place(row)} is {score!r:.60}, not a finite number; check the scorer")
    return found


def _number(value: Any) -> float:
    """NaN for anything but a number; text is no number, whatever it says."""
    try:
        return math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _place(row: ScorerRow) -> str:
    return str(row.get("where") or row.get("id") or "a row")
