"""Rows with the columns of the published data sets, and a reward model for chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers_for_tests import byte_level
from transformers import LlamaConfig, LlamaForSequenceClassification


def posts(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows with the columns of the TL;DR sets, SFT examples and pairs in one."""
    rows = []
    for i in range(first, first + count):
        query = f"SUBREDDIT: r/cats\n\nTITLE: Cat {i}\n\nPOST: Cat {i} sleeps on box {i % 7}.\n\nTL;DR:"
        good, bad = f" Cat {i} sleeps.", f" A dog, {i}."
        rows.append({"id": "t3", "query": query, "summary": good.strip(), "chosen": f"{good}<|endoftext|>", "rejected": bad})
    return rows


def chats(count: int) -> list[dict[str, Any]]:
    """Rows with the columns of UltraChat, UltraFeedback and HH in one."""
    rows = []
    for i in range(count):
        ask = {"content": f"What is in basket {i}?", "role": "user"}
        good, bad = ({"content": text, "role": "assistant"} for text in (f"Fruit {i}.", "No idea."))
        more = [{"content": "And in the next?", "role": "user"}, good]
        rows.append({"prompt": ask["content"], "messages": [ask, good, *more], "chosen": [ask, good], "rejected": [ask, bad]})
        rows[-1] |= {"score_chosen": 8.0, "score_rejected": 2.0}
    return rows


def dialogues(count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"\n\nHuman: Who is {i}?\n\nAssistant:", "chosen": f" Number {i}.", "rejected": " Go away."}
        for i in range(count)
    ]


def scorer(folder: Path) -> None:
    """A reward model with random weights and a chat template of its own."""
    tokenizer = byte_level("chatml")
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
