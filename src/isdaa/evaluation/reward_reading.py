"""Where a reward model is read: at the token that its maker trained, which its folder tells.

Transformers' classifiers read a row at its last token that is not `config.pad_token_id`, and TRL trains them so, on all that the
chat template writes (for ChatML: at the line break behind `<|im_end|>`), of plain text through EOS. isdaa trains its own in the
same place, but for the first versions, which read the end of the turn, whatever pads; their record names no position.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from isdaa.config import Position
from isdaa.data.chat import PROBE, QUESTION, ChatFormat
from isdaa.data.context import tokenize_text
from isdaa.errors import UserError
from isdaa.record import NAME, ModelRecord, read_record

# Names of two labels, the good one first; letters alone count. Others are told by a prefix: helpful, unhelpful.
OPPOSITES = (
    *(("chosen", "rejected"), ("accepted", "rejected"), ("accept", "reject"), ("preferred", "rejected"), ("good", "bad")),
    *(("positive", "negative"), ("pos", "neg"), ("better", "worse"), ("harmless", "harmful"), ("safe", "harmful")),
    *(("nontoxic", "toxic"), ("nottoxic", "toxic"), ("right", "wrong"), ("win", "loss"), ("win", "lose"), ("winner", "loser")),
)
GOOD = (
    *("chosen", "accepted", "acceptable", "preferred", "good", "helpful", "safe", "correct", "honest", "harmless", "desired"),
    *("desirable", "appropriate", "satisfactory", "truthful", "useful", "aligned", "liked"),
)
NOT = ("un", "in", "dis", "non", "not", "mis")


@dataclass(frozen=True)
class Head:
    """Which outputs are the score: `good`, or the logit of `good` less that of `bad`."""

    good: int = 0
    bad: int | None = None
    words: str = ""

    @classmethod
    def of(cls, path: str, names: Sequence[str], label: str | None) -> Head:
        """Of a classifier with several labels. Raises UserError where it cannot be told which one means good."""
        listed = ", ".join(repr(name) for name in names[:6]) + (", …" if len(names) > 6 else "")
        if len(names) != 2:
            raise UserError(
                f"scorer {path}: a classifier of {len(names)} labels ({listed}); a reward model has one output, or two labels of "
                "which one means good"
            )
        if label is not None:
            found = [i for i, name in enumerate(names) if label.casefold() in (name.casefold(), str(i))]
            if len(found) != 1:
                raise UserError(f"scorer {path}: scorer.label {label!r} is none of its labels {listed}")
            good = found[0]
        else:
            first, second = ("".join(filter(str.isalpha, name.casefold())) for name in names)
            known = _good_of(first, second)
            if known is None:
                raise UserError(
                    f"scorer {path}: a classifier of two labels ({listed}), whose names do not say which one means good; name it "
                    f"with --scorer.label, for example --scorer.label {names[1]}"
                )
            good = known
        return cls(good, 1 - good, f"the score is the logit of {names[good]!r} less that of {names[1 - good]!r}")


def _good_of(first: str, second: str) -> int | None:
    """Which of two labels means good, by their names; None where those do not say."""
    for place, (good, bad) in enumerate(((first, second), (second, first))):
        if (good, bad) in OPPOSITES or (good in GOOD and bad in [prefix + good for prefix in NOT]):
            return place
    return None


@dataclass(frozen=True)
class Frame:
    """The special tokens that a tokenizer puts around two texts, with their token types: (ids, types) of each stretch."""

    before: tuple[list[int], list[int]]
    between: list[int]
    between_types: list[int]
    after: tuple[list[int], list[int]]
    types: tuple[int, int]  # of the two texts' tokens

    @classmethod
    def of(cls, tokenizer: Any) -> Frame:
        """Seen on two short texts; `between` is empty where no special token stands between them."""
        nothing = cls(([], []), [], [], ([], []), (0, 0))
        one, two = tokenize_text(tokenizer, ["a", "b"])
        encoded = tokenizer("a", "b", return_token_type_ids=True, verbose=False)
        ids, types = list(encoded["input_ids"]), list(encoded.get("token_type_ids") or [0] * len(encoded["input_ids"]))
        start = next((i for i in range(len(ids)) if one and ids[i : i + len(one)] == one), None)
        if start is None:
            return nothing
        end = start + len(one)
        second = next((i for i in range(end, len(ids)) if two and ids[i : i + len(two)] == two), None)
        if second is None or not set(ids[end:second]) <= set(tokenizer.all_special_ids):
            return nothing
        last = second + len(two)
        before, after = (ids[:start], types[:start]), (ids[last:], types[last:])
        return cls(before, ids[end:second], types[end:second], after, (types[start], types[second]))

    def around(self, one: list[int], two: list[int]) -> tuple[list[int], list[int]]:
        """(ids, token types) of two texts' ids."""
        ids = [*self.before[0], *one, *self.between, *two, *self.after[0]]
        types = [*self.before[1], *[self.types[0]] * len(one), *self.between_types, *[self.types[1]] * len(two), *self.after[1]]
        return ids, types

    @property
    def size(self) -> int:
        """Special tokens of a row."""
        return len(self.before[0]) + len(self.between) + len(self.after[0])


@dataclass
class Reading:
    """How one reward model reads. position: `auto` goes by the folder; another wins over it."""

    path: str
    position: Position = "auto"
    label: str | None = None  # of two, the one that means good; null: by their names

    @cached_property
    def head(self) -> Head:
        """Which outputs are the score. Raises UserError for a classifier whose labels do not say which one means good."""
        from isdaa.models.loading import model_config
        from isdaa.models.places import is_adapter

        if is_adapter(self.path):
            return Head()
        config = model_config(self.path)
        told: dict[Any, str] = dict(config.id2label or {})
        names = [str(told.get(i, i)) for i in range(config.num_labels or 1)]
        language = [name for name in config.architectures or () if name.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM"))]
        if len(names) == 2 and language:  # labels that no head has: transformers' default
            raise UserError(
                f"scorer {self.path}: no trained reward head: it is a language model ({language[0]}), not a reward model; name "
                "one with --scorer"
            )
        return Head() if len(names) == 1 else Head.of(self.path, names, self.label)

    @cached_property
    def pair(self) -> bool:
        """Whether prompt and answer are two texts, between which the tokenizer puts a separator (BERT, RoBERTa, DeBERTa).

        So are others' encoders whose tokenizer has no chat template; isdaa's own read what they were trained on.
        """
        if self.record is not None or self.position == "response_end" or not self.encoder:
            return False
        tokenizer = self.tokenizer
        return not tokenizer.chat_template and bool(Frame.of(tokenizer).between)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own; an encoder's may know no end of a text."""
        from isdaa.models.loading import load_tokenizer

        return load_tokenizer(self.path, require_eos=not self.encoder)

    @cached_property
    def record(self) -> ModelRecord | None:
        """That of a reward model that isdaa trained; None for any other."""
        from isdaa.models.places import hub_file

        folder: Path | None = Path(self.path).expanduser()
        if folder is not None and not folder.is_dir():
            file = hub_file(self.path, NAME)
            folder = None if file is None else file.parent
        record = None if folder is None else read_record(folder)
        if record is None or record.kind != "reward":
            return None
        if record.position not in (None, *get_args(Position)[1:]):
            raise UserError(f"{self.path}: {NAME}: position {record.position!r} is of a later isdaa; give --scorer.position")
        return record

    @property
    def template_end(self) -> bool:
        """Whether rows are read where plain transformers reads them; else at the response's last token, EOS included."""
        if self.position != "auto":
            return self.position == "template_end"
        return self.record is None or self.record.position == "template_end"

    @property
    def close_cut(self) -> bool:
        """Whether the template closes the turn of a response that a limit cut: others' models know no other rows, and isdaa's
        own learnt from rows without an end."""
        return self.template_end and self.record is None

    @cached_property
    def pad_id(self) -> int | None:
        """The token that the model's class passes over at a row's end; None: it reads the last one, or the mask decides."""
        from isdaa.models.loading import load_tokenizer, model_config
        from isdaa.models.places import is_adapter

        if not self.template_end:
            return None
        if is_adapter(self.path):  # its base model's configuration is not that of its training, of which the tokenizer is
            found = load_tokenizer(self.path).pad_token_id
        else:
            config = model_config(self.path)
            found = getattr(config.get_text_config(), "pad_token_id", None)
            vocabulary = getattr(config.get_text_config(), "vocab_size", None)
            if vocabulary is not None and found is not None and not 0 <= found < vocabulary:
                found = None  # no token has it, so none is passed over
        return found if isinstance(found, int) else None

    @cached_property
    def encoder(self) -> bool:
        """Whether its class reads rows whole, as BERT does, wherever they end."""
        from transformers import MODEL_FOR_MASKED_LM_MAPPING

        from isdaa.models.loading import model_config

        return type(model_config(self.path)) in MODEL_FOR_MASKED_LM_MAPPING

    def bare(self, asked: Collection[type]) -> bool:
        """Whether a model with a chat template gets plain texts, to which it is not applied. asked: as for `described`."""
        return str in asked and bool(self.tokenizer.chat_template)

    def described(self, tokenizer: Any, asked: Collection[type] = ()) -> str:
        """Which token is read, in words. asked: kinds of the prompts (list: conversations, str: texts); none: not known yet."""
        chats, texts = list in asked or str not in asked, str in asked
        eos = repr(str(tokenizer.eos_token))
        if self.pair:
            return (
                "an encoder, which reads prompt and answer as two texts with a separator between them, as "
                "tokenizer(prompt, answer) writes them; a conversation's turns are joined by blank lines, without their roles"
            )
        if self.encoder:
            through = "the end of its chat template's output" if self.template_end and chats else "the end of the response"
            return f"an encoder, which reads the whole text, here through {through}, as its class does in plain transformers"
        if not self.template_end:
            whose = "" if self.position != "auto" else ", as its record has it"
            return f"read at the end of the response (the token that ends the turn, or {eos}){whose}"
        chat = None
        if tokenizer.chat_template and chats:
            with suppress(UserError):  # no conversation may come, and if one does, its row is named
                chat = ChatFormat(tokenizer)
        of_texts = f"the last token of the text, {eos} where it ended"
        if self.pad_id == tokenizer.eos_token_id:
            of_texts = f"the last token before {eos}, which is also the padding token and is skipped"
        if chat is None:
            return f"read at {of_texts}, as in plain transformers"
        text = chat.render([QUESTION, {"role": "assistant", "content": PROBE}], None, opening=False)
        ids = tokenize_text(tokenizer, [text])[0]
        while ids and ids[-1] == self.pad_id:
            ids.pop()
        last = tokenizer.decode(ids[-1:])
        if last.strip() and last in PROBE:
            last = "the last word"
        else:
            last = repr(last) + (f" after {chat.turn_end!r}" if chat.turn_end and chat.turn_end not in last else "")
        skipped = tokenize_text(tokenizer, [text])[0][len(ids) :]
        passed = f"; {tokenizer.decode(skipped[:1])!r}, which is also the padding token, is skipped" if skipped else ""
        apart = f"; of plain-text prompts at {of_texts}" if texts else ""
        return f"read at {last}, the end of its chat template's output, as in plain transformers{passed}{apart}"

    def agreement(self) -> str | None:
        """How often it agrees with the pairs that its training held out, in words; None where its record does not say."""
        found = self.record.held_out if self.record is not None else None
        return None if found is None else worth_in_words(found)


def worth_in_words(found: Mapping[str, Any]) -> str:
    """`agrees with 0.71 (0.66–0.76) of 300 held-out pairs`, of a record's `held_out`."""
    return "agrees with {accuracy:.2f} ({low:.2f}–{high:.2f}) of {pairs} held-out pairs".format(**found)
