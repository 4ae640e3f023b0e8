"""What the tests of whole benchmark runs share: tiny chat models, a judge over HTTP, the command as a user calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from judge_server import Answer, JudgeServer, serving
from tokenizers_for_tests import byte_level
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

Talk = list[dict[str, str]]


@contextmanager
def judge_server(
    say: Callable[[Talk], str | int], before: Callable[[int], None] | None = None
) -> Iterator[tuple[JudgeServer, str]]:
    """An endpoint and its address. say: messages -> reply, or a status; before: told each request's number, from 1."""

    def behaviour(number: int, body: dict[str, Any]) -> Answer:
        if before is not None:
            before(number + 1)
        said = say(body["messages"])
        return Answer(said) if isinstance(said, str) else Answer(status=said)

    with serving(behaviour) as server:
        yield server, server.url


def _config(words: Any, **changes: Any) -> LlamaConfig:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    base = {"vocab_size": len(words), "max_position_embeddings": 2048, "initializer_range": 0.3}
    return LlamaConfig(**(shape | ids | base | changes))


def chat_model(folder: Path, seed: int = 0, template: str | None = "chatml", context: int = 2048) -> str:
    """A random model of a few thousand parameters that answers in conversations (template None: it cannot)."""
    words = byte_level(template)
    torch.manual_seed(seed)
    LlamaForCausalLM(_config(words, max_position_embeddings=context)).eval().save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def chat_reward_model(folder: Path, seed: int = 7) -> str:
    """A random reward model that reads conversations."""
    words = byte_level("chatml")
    torch.manual_seed(seed)
    LlamaForSequenceClassification(_config(words, num_labels=1)).eval().save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def judge_of_one_word(folder: Path, word: str) -> str:
    """A model that replies with that word, one token, to whatever it is asked: its logits look at the last token alone."""
    words = byte_level("chatml")
    model = LlamaForCausalLM(_config(words, max_position_embeddings=8192, tie_word_embeddings=False)).eval()
    said, end = words.convert_tokens_to_ids(word), words.eos_token_id
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight[:, 0] = 1
        model.model.embed_tokens.weight[said] = torch.eye(16)[1]
        model.lm_head.weight[said, 0] = model.lm_head.weight[end, 1] = 1
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def between(text: str, start: str, end: str) -> str:
    """What stands between two markers."""
    return text.split(start, 1)[1].split(end, 1)[0].strip()
