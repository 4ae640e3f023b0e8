"""Models of a few thousand parameters on the embedded world, saved as plain folders, and small settings."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from isdaa.config import EvaluationConfig
from isdaa.data.encoder import TokenizationSettings
from isdaa.world import build_tokenizer, make_posts

TOKENIZATION = TokenizationSettings(128, 96)
TOKENIZER = build_tokenizer("small")


def settings(**changes: Any) -> EvaluationConfig:
    """Few prompts, few tokens, few resamples."""
    base = {"prompts": 8, "opponent_samples": 2, "max_new_tokens": 6, "batch_size": 8, "bootstrap": 100}
    return EvaluationConfig.model_validate(base | {"temperature": 1.0, "top_p": 1.0} | changes)


def world_rows(n: int = 8) -> list[dict[str, Any]]:
    """Canonical prompt rows of the embedded world."""
    return [
        {"id": p["id"], "prompt": p["prompt"], "prompt_ids": None, "chosen": p["summary"], "facts": p["facts"], "where": p["id"]}
        for p in make_posts("small", n, split="eval")
    ]


def world_pairs(n: int = 6) -> list[dict[str, Any]]:
    """Canonical pairs: each post with its own summary, and another's as the rejected one."""
    posts = make_posts("small", n, split="eval")
    pairs = []
    for post, other in zip(posts, [*posts[1:], posts[0]], strict=True):
        pair: dict[str, Any] = dict.fromkeys(("behaviour_chosen_logps", "behaviour_rejected_logps", "weight"))
        pair |= {"id": post["id"], "prompt": post["prompt"], "chosen": post["summary"], "rejected": other["summary"]}
        pair |= {"prompt_ids": None, "chosen_ids": None, "rejected_ids": None}
        pairs.append(pair | {"chosen_finished": True, "rejected_finished": True, "facts": post["facts"], "where": post["id"]})
    return pairs


def config(**changes: Any) -> LlamaConfig:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 256, "initializer_range": 0.3}
    ids = {"pad_token_id": TOKENIZER.pad_token_id, "bos_token_id": TOKENIZER.bos_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    return LlamaConfig(**(shape | base | ids | changes))


def save(model: Any, folder: Path, tokenizer: Any = TOKENIZER) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config()).eval()


def moved(model: LlamaForCausalLM, size: float, seed: int = 1) -> LlamaForCausalLM:
    """A copy whose weights differ: a policy that has left its reference."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return other


def reward_model(folder: Path, seed: int = 3, **changes: Any) -> str:
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(config(num_labels=1, **changes)).eval()
    return save(model, folder)


class WordCount:
    """A scorer of the tests' own: what it is shown can be looked at."""

    name, digest = "words", "words-1"

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def score(self, rows: Sequence[Any], progress: Any = None) -> list[float]:
        self.seen += [dict(row) for row in rows]
        return [float(len(str(row["response"]).split())) for row in rows]


def numbers(value: Any) -> Iterator[float]:
    """Every number in nested plain data."""
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield float(value)
