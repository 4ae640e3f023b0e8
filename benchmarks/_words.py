"""Token ids as text and back, for what reads text: a tokenizer of whole words.

Imports neither isdaa nor TRL.
"""

from __future__ import annotations

from shapes import EOS, FIRST_WORD, PAD
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Words "t3", "t4", … are ids 3, 4, …; nothing is added at the front."""
    words = {PAD: "<pad>", 1: "<unk>", EOS: "</s>"} | {i: f"t{i}" for i in range(FIRST_WORD, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in words.items()}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


def as_text(row: dict[str, list[int]]) -> dict[str, str]:
    """The texts of a pair's ids. Tokenising them adds the EOS that a response ends with."""
    prompt, chosen, rejected = (row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    # Of a real conversation, the end token also stands behind the turns of the prompt.
    texts = (" ".join("</s>" if i == EOS else f"t{i}" for i in ids) for ids in (prompt, chosen[:-1], rejected[:-1]))
    return dict(zip(("prompt", "chosen", "rejected"), (f" {text}" for text in texts), strict=True))
