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
LAYOUTS = {
    "pairs": Layout.of_pairs(*(torch.tensor(n) for n in ([150, 1, 60], [20, 3, 31], [41, 9, 1]))),
    "one block": Layout.of_pairs(*(torch.tensor(n) for n in ([70, 20], [9, 8], [11, 10]))),  # T = 128
    "short": Layout.of_pairs(*(torch.tensor([n]) for n in (1, 1, 1))),
    "rows": Layout.of_rows(torch.tensor([40, 3]), torch.tensor([0, 100])),
    "shared": Layout(*(torch.tensor(n) for n in ([100, 1, 40], [70, 0, 5, 40, 3, 0, 0, 9], [0, 0, 0, 0, 1, 2, 2, 2], [0], [2]))),
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


def compare(model, truth_model, forward, pairs: int) -> None:
    ids, layout = packed(lengths_of(pairs), seed=pairs)
    truth = plain_logps(truth_model, ids, layout)
    out = forward(model, ids, layout.position_ids, layout)
    assert out.token_logps.dtype == torch.float32
    assert_close(out.chosen_logps, truth[0], what="chosen")
    assert_close(out.rejected_logps, truth[1], what="rejected")
    ours = gradients(model, loss_of(out.chosen_logps, out.rejected_logps))
    assert_same_gradients(ours, gradients(truth_model, loss_of(*truth)))


def compare_shared(model, truth_model, forward) -> None:
    """Three pairs of one prompt, two of them with one rejected response, and a pair of another prompt."""
    lengths = torch.tensor([9, 4]), torch.tensor([5, 3, 6, 2, 7, 4]), torch.tensor([0, 0, 0, 0, 1, 1])
    layout = Layout(*lengths, chosen=torch.tensor([0, 2, 3, 5]), rejected=torch.tensor([1, 1, 0, 4]))
    ids = torch.randint(3, VOCABULARY, (layout.tokens,), generator=torch.Generator().manual_seed(3))
    starts = layout.response_starts.tolist()
    prompts = [ids[start : start + n] for start, n in zip(layout.prompt_starts.tolist(), lengths[0].tolist(), strict=True)]
    responses = [ids[start : start + n] for start, n in zip(starts, lengths[1].tolist(), strict=True)]
    rows = [plain_token_logps(truth_model, prompts[p], r).sum() for p, r in zip(lengths[2].tolist(), responses, strict=True)]
    truth = torch.stack(rows)
    out = forward(model, ids, None, layout)
    assert_close(out.logps, truth)
    assert torch.equal(out.chosen_logps, out.logps[layout.chosen])
    ours = gradients(model, loss_of(out.chosen_logps, out.rejected_logps))
    assert_same_gradients(ours, gradients(truth_model, loss_of(truth[layout.chosen], truth[layout.rejected])))


def used(model, forward, lengths=None):
    ids, layout = packed(lengths or lengths_of(2))
    with torch.no_grad():
        forward(model, ids, None, layout)
    return layout.cached("attention", lambda: "nothing")
