"""Small Llama and Qwen2 models with the tokenizers of published ones, and prompts for them."""

from pathlib import Path
from typing import Any

import torch
from real_tokenizers import build
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

QWEN = build("qwen2")
SHAPE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
                         "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3}  # fmt: skip
WORDS = ["What is the kettle for?", "Hello", "Which city is the capital of France, please? Answer soon.", "Write a note."]


def language_model(rows: int, seed: int = 0, tied: bool = False, kind: str = "qwen2") -> Any:
    torch.manual_seed(seed)
    config, cls = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[kind]
    return cls(config(vocab_size=rows, tie_word_embeddings=tied, **SHAPE)).eval()


def save(model: Any, folder: Path, tokenizer: Any = QWEN) -> str:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def prompts(chat: bool = True) -> list[dict[str, Any]]:
    return [
        {"id": f"p{i}", "prompt": [{"role": "user", "content": text}] if chat else text, "prompt_ids": None,
         "chosen": [{"role": "assistant", "content": "It is."}] if chat else " It is.", "facts": None, "where": f"p{i}"}
        for i, text in enumerate(WORDS)
    ]  # fmt: skip
