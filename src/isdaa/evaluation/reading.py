"""Where a reward model is read: at the token that its maker trained, which its folder tells.

Transformers' classifiers read a row at its last token that is not `config.pad_token_id`, and TRL trains them so, on all that the
chat template writes (for ChatML: at the line break behind `<|im_end|>`), of plain text through EOS. isdaa trains its own in the
same place, but for the first versions, which read the end of the turn, whatever pads; their record names no position.
"""

from __future__ import annotations

from collections.abc import Mapping
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


@dataclass
class Reading:
    """How one reward model reads. position: `auto` goes by the folder; another wins over it."""

    path: str
    position: Position = "auto"

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
            raise UserError(f"{self.path}: {NAME}: position {record.position!r} is of a later isdaa; set scorer.position")
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

    def described(self, tokenizer: Any) -> str:
        """Which token is read, in words."""
        eos = repr(str(tokenizer.eos_token))
        if self.encoder:
            through = "the end of its chat template's output" if self.template_end else "the end of the response"
            return f"an encoder, which reads the whole text, here through {through}, as its class does in plain transformers"
        if not self.template_end:
            whose = "" if self.position != "auto" else ", as its record has it"
            return f"read at the end of the response (the token that ends the turn, or {eos}){whose}"
        chat = None
        if tokenizer.chat_template:
            with suppress(UserError):  # no conversation may come, and if one does, its row is named
                chat = ChatFormat(tokenizer)
        if chat is None:
            if self.pad_id == tokenizer.eos_token_id:
                return f"read at the last token before {eos}, which also pads and is passed over, as in plain transformers"
            return f"read at the last token of the text, {eos} where it ended, as in plain transformers"
        text = chat.render([QUESTION, {"role": "assistant", "content": PROBE}], None, opening=False)
        ids = tokenize_text(tokenizer, [text])[0]
        while ids and ids[-1] == self.pad_id:
            ids.pop()
        last = tokenizer.decode(ids[-1:])
        if last.strip() and last in PROBE:
            last = "the last word"
        else:
            last = repr(last) + (f" behind {chat.turn_end!r}" if chat.turn_end and chat.turn_end not in last else "")
        skipped = tokenize_text(tokenizer, [text])[0][len(ids) :]
        passed = f"; {tokenizer.decode(skipped[:1])!r}, which also pads, is passed over" if skipped else ""
        return f"read at {last}, the end of its chat template's output, as in plain transformers{passed}"

    def agreement(self) -> str | None:
        """How often it agrees with the pairs that its training held out, in words; None where its record does not say."""
        found = self.record.held_out if self.record is not None else None
        return None if found is None else worth_in_words(found)


def worth_in_words(found: Mapping[str, Any]) -> str:
    """`agrees with 0.71 (0.66–0.76) of 300 held-out pairs`, of a record's `held_out`."""
    return "agrees with {accuracy:.2f} ({low:.2f}–{high:.2f}) of {pairs} held-out pairs".format(**found)
