"""What gives a response its score: the embedded world's gold reward or a reward model, behind one small interface.

A scorer takes rows and returns one number a row. A row is a canonical prompt row (`prompt`: text or messages; `facts`:
a dict or None) with `response` (text, or one assistant message in a list) and `finished` (False: a limit cut
it). Nothing else in the project can tell which scorer it holds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from isdaa.config import Position
from isdaa.errors import UserError, nearest
from isdaa.evaluation.identity import model_digest
from isdaa.evaluation.reading import Reading
from isdaa.files import digest, file_digest
from isdaa.record import read_record
from isdaa.terminal import Bar

ScorerRow = Mapping[str, Any]
log = logging.getLogger(__name__)

GOLD = "gold"


class Scorer(Protocol):
    """`name` is what the user called it; `digest` changes whenever its scores may, and is part of every cache key."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    def score(self, rows: Sequence[ScorerRow], progress: Bar | None = None) -> list[float]:
        """One finite score a row, in order; higher is better. Raises UserError for rows that it cannot judge."""
        ...


def about(scorer: Scorer | None) -> list[str]:
    """What a run says of a scorer before it goes by its scores, a line each: where a reward model is read, what it is worth."""
    return scorer.about() if isinstance(scorer, RewardModelScorer) else []


def facts(scorer: Scorer) -> dict[str, Any]:
    """What records of an evaluation say of a scorer."""
    found: dict[str, Any] = {"name": scorer.name, "digest": scorer.digest}
    if isinstance(scorer, RewardModelScorer):
        found |= {"position": scorer.reading.position, "about": scorer.about()}
    return found


def load_scorer(
    name: str,
    *,
    batch_size: int = 32,
    max_prompt_length: int = 512,
    device: str | None = None,
    position: Position = "auto",
) -> Scorer:
    """`gold`, or a sequence-classification model's folder or Hub name. Nothing large is loaded before the first score.

    max_prompt_length: tokens of a prompt that a reward model reads, `tokenization.max_prompt_length` of the policies.
    position: where a reward model is read (`isdaa.evaluation.reading`), `scorer.position` of the configuration.
    Raises UserError where there is no such folder.
    """
    if name == GOLD:
        return GoldScorer()
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise UserError(
            f"scorer {name!r}: no such folder{nearest(name, [GOLD])}; name `gold`, a reward model's folder or Hub name"
        )
    return RewardModelScorer(name, batch_size=batch_size, max_prompt_length=max_prompt_length, device=device, position=position)


class GoldScorer:
    """The embedded world's judge, who knows the facts behind each post."""

    name = GOLD

    def __init__(self) -> None:
        from isdaa.world import lexicon, reward

        # The judge is code: another version of it is another scorer.
        self.digest = digest([file_digest(str(module.__file__)) for module in (lexicon, reward)])

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
    """A sequence-classification model with one output, in fp32.

    The text is tokenised by the model's own tokenizer, with the `chat_template_kwargs` that its record names: a conversation as
    its chat template writes it, to the end, plain text with EOS where it ended. Where it is read, its folder says, or `position`
    does (`Reading`); at `response_end` it is tokenised as a policy's response would be, through the end of the turn.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        batch_size: int = 32,
        max_prompt_length: int = 512,
        device: str | None = None,
        position: Position = "auto",
    ) -> None:
        self.name = str(path)
        self.reading = Reading(self.name, position)
        self._warned: set[str] = set()
        self.batch_size, self.max_prompt_length, self.device = batch_size, max_prompt_length, device
        self._model: Any = None
        self._tokenizer: Any = None
        self._digest: str | None = None

    @property
    def digest(self) -> str:
        """Of the weights and of how a row is written for them."""
        if self._digest is None:
            from isdaa.data.chat import tokenizer_digest

            how: list[Any] = [self.max_prompt_length, *([self.template_kwargs] if self.template_kwargs else [])]
            if self.reading.template_end:
                how.append(["template_end", self.reading.pad_id, self.reading.close_cut])
            self._digest = digest([model_digest(self.name), tokenizer_digest(self.tokenizer), *how])
        return self._digest

    def about(self) -> list[str]:
        """Where it is read, and how often it agrees with pairs that its training held out, where its record says so."""
        agreement = self.reading.agreement()
        return [self.reading.described(self.tokenizer), *([agreement] if agreement else [])]

    @cached_property
    def template_kwargs(self) -> dict[str, Any]:
        """What the chat template got beside the messages when the model was trained."""
        record = read_record(self.name)
        return dict(((record.config.get("tokenization") if record else None) or {}).get("chat_template_kwargs") or {})

    @property
    def tokenizer(self) -> Any:
        """The reward model's own."""
        if self._tokenizer is None:
            from isdaa.models.loading import load_tokenizer

            self._tokenizer = load_tokenizer(self.name)
        return self._tokenizer

    @property
    def model(self) -> Any:
        """Loaded when first asked for."""
        if self._model is None:
            import torch

            from isdaa.models.loading import load_sequence_classifier

            device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
            pad = self.reading.pad_id
            model = load_sequence_classifier(
                self.name, device=device, pad_id=self._pad, by_mask=not self.reading.template_end or pad is None
            )
            self._model = model.requires_grad_(False)
        return self._model

    @property
    def _pad(self) -> int:
        """What fills rows up: where the model's class looks for it, its own."""
        return int(self.tokenizer.pad_token_id if self.reading.pad_id is None else self.reading.pad_id)

    def score(self, rows: Sequence[ScorerRow], progress: Bar | None = None) -> list[float]:
        """The model's output where each row is read. Raises UserError where it is not finite."""
        import torch

        sequences = self.token_ids(rows)
        order = sorted(range(len(rows)), key=lambda i: len(sequences[i]))
        pad = self._pad
        scores = [math.nan] * len(rows)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            longest = len(sequences[batch[-1]])
            ids = torch.full((len(batch), longest), pad)
            mask = torch.zeros((len(batch), longest), dtype=torch.long)
            for line, index in enumerate(batch):
                ids[line, : len(sequences[index])] = torch.tensor(sequences[index])
                mask[line, : len(sequences[index])] = 1
            with torch.no_grad():
                device = self.model.device
                logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()
            for index, value in zip(batch, logits[:, 0].tolist(), strict=True):
                scores[index] = value
            if progress is not None:
                progress.update(len(batch))
        return checked(scores, rows, self.name)

    def token_ids(self, rows: Sequence[ScorerRow]) -> list[list[int]]:
        """Ids of each row's prompt and response. Only a lack of positions cuts a response."""
        from isdaa.data.context import as_read
        from isdaa.data.encoding import Encoder, TokenizationSettings, Whole
        from isdaa.data.pairs import TEMPLATE_COLUMNS

        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1_000_000
        prompt_length = min(self.max_prompt_length, positions - 1)
        settings = TokenizationSettings(positions, prompt_length, "keep_end", self.template_kwargs)
        reading = self.reading
        encoder = Encoder(self.tokenizer, settings, whole=reading.template_end, close_cut=reading.close_cut)
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
        if reading.template_end:
            found = encoder.read(plain, "response")
        else:
            answered = [(prompt, response) for prompt, (response,) in encoder.answered(plain, ("response",))]
            found = [Whole(prompt.ids + as_read(response.ids), prompt.cut, response.cut) for prompt, response in answered]
        self._warn(
            sum(one.response_cut for one in found), len(rows), f"responses do not fit its {positions} positions and were cut"
        )
        self._warn(sum(one.prompt_cut for one in found), len(rows), f"prompts have more than {prompt_length} tokens and were cut")
        self._warn(
            closed if reading.close_cut else 0,
            len(rows),
            "responses did not end (a limit cut them); its chat template closes them all the same, for it knows no other rows: "
            "it cannot tell",
        )
        return [one.ids for one in found]

    def _warn(self, count: int, rows: int, what: str) -> None:
        """Say once what happens to rows, with its figures in the first call where it does."""
        if count and what not in self._warned:
            self._warned.add(what)
            log.warning("scorer %s: %d of %d %s", self.name, count, rows, what)


def response_text(row: ScorerRow) -> str:
    """The response's words, of text or of an assistant message."""
    response = row["response"]
    return response if isinstance(response, str) else str(response[-1]["content"])


def checked(scores: Sequence[float], rows: Sequence[ScorerRow], name: str) -> list[float]:
    """The scores, if there is a finite one for every row. Raises UserError naming the first row without."""
    if len(scores) != len(rows):
        raise UserError(f"scorer {name}: {len(scores)} scores for {len(rows)} rows")
    for score, row in zip(scores, rows, strict=True):
        if not math.isfinite(score):
            raise UserError(f"scorer {name}: the score of {_place(row)} is {score}, not a finite number; check the reward model")
    return list(scores)


def _place(row: ScorerRow) -> str:
    return str(row.get("where") or row.get("id") or "a row")
