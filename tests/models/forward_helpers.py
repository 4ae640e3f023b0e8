"""Tiny models of many families, pairs of mixed lengths, and the slow and obvious way to compute their logps."""

from __future__ import annotations

import copy
import math

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from isdaa.models.attention.layout import Layout

VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128}
_PLAIN_HEADS = {**SMALL, "num_key_value_heads": 4}

CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "llama_tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=8),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=None),
    "mistral_long_window": lambda: MistralConfig(**SMALL, sliding_window=100),
    "mistral_short_window": lambda: MistralConfig(**SMALL, sliding_window=5),
    "gpt_neox": lambda: GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "gpt2": lambda: GPT2Config(**_GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "phi": lambda: PhiConfig(**_PLAIN_HEADS),
    "granite": lambda: GraniteConfig(**SMALL, logits_scaling=3.0, attention_multiplier=0.3, residual_multiplier=0.7),
    "cohere": lambda: CohereConfig(**SMALL, logit_scale=0.25),
    "cohere2": lambda: Cohere2Config(**SMALL, sliding_window=5),
    "gemma2": lambda: Gemma2Config(
        **SMALL, head_dim=8, sliding_window=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=5, final_logit_softcapping=4.0),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=16,
        dropout=0.0,
    ),
    "bloom": lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=4),
}
SHARED = [name for name in CONFIGS if name != "bloom"]


def tiny(name: str, seed: int = 0) -> torch.nn.Module:
    """A tiny model whose weights are large enough for attention, biases, soft caps and windows to matter."""
    torch.manual_seed(seed)
    # Older transformers give Gemma 2 an SDPA that silently ignores its soft cap.
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager" if name == "gemma2" else None)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]))
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def lengths_of(pairs: int) -> list[tuple[int, int, int]]:
    """(prompt, chosen, rejected) lengths, mixed; the shortest possible prompt and response are among them."""
    return [(13, 7, 4), (1, 1, 9), (22, 3, 8), (5, 12, 1), (9, 6, 6)][:pairs]


def packed(lengths: list[tuple[int, int, int]], seed: int = 0) -> tuple[torch.Tensor, Layout]:
    """(T,) random packed row and its layout."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (sum(map(sum, lengths)),), generator=generator)
    return ids, Layout.of_pairs(*(torch.tensor(part) for part in zip(*lengths, strict=True)))


def split(ids: torch.Tensor, layout: Layout) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(prompt, chosen, rejected) ids of every pair."""
    parts = ids.split([n for prompt, (chosen, rejected) in layout.groups for n in (prompt, chosen, rejected)])
    return list(zip(parts[0::3], parts[1::3], parts[2::3], strict=True))


def plain_token_logps(model: torch.nn.Module, prompt: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """Token logps of a response from one plain row of the model's own logits."""
    logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0]
    rows = torch.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, -1)
    return rows[len(prompt) - 1 : -1].gather(1, response[:, None])[:, 0]


def plain_logps(model: torch.nn.Module, ids: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) chosen and (B,) rejected logps from 2B plain rows."""
    pairs = split(ids, layout)
    chosen = torch.stack([plain_token_logps(model, prompt, response).sum() for prompt, response, _ in pairs])
    rejected = torch.stack([plain_token_logps(model, prompt, response).sum() for prompt, _, response in pairs])
    return chosen, rejected


def loss_of(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """A loss that gives every response a different coefficient."""
    weights = torch.linspace(0.3, 1.7, 2 * len(chosen), dtype=chosen.dtype)
    return (weights * torch.cat([chosen, -rejected])).sum()


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of all parameters that require one, zero where the loss does not reach."""
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
    }


def assert_close(ours: torch.Tensor, truth: torch.Tensor, scale: float = 0.0, what: str = "") -> None:
    """max|a − b| / max|b| ≤ 1e-5; tensors below 1e-5 of `scale` are zero by construction and compared with it."""
    difference, size = float((ours - truth).detach().abs().max()), float(truth.detach().abs().max())
    bound = 1e-5 * size if size > 1e-5 * scale else 1e-5 * scale
    assert difference <= bound, f"{what}: {difference:.3g} at a largest value of {size:.3g}"


def assert_same_gradients(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == truth.keys()
    scale = max(float(g.abs().max()) for g in truth.values())
    assert scale > 0
    for name, gradient in truth.items():
        assert_close(ours[name], gradient, scale, name)


def untouched(model: torch.nn.Module) -> torch.nn.Module:
    """A copy from before `prepare`; its plain rows are the truth."""
    return copy.deepcopy(model)
