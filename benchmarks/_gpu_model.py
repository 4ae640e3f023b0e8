"""What the GPU benchmark trains, how many operations that is, and how many a second a GPU can do.

Imports neither isdaa nor a new transformers: an arm may run in an environment of its own.

Legend: B pairs, T tokens with every prompt counted once, N response tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shapes import EOS, PAD, SHAPES, TINY_SHAPE, TINY_VOCABULARY, Lengths, Shape, Size, draw_pairs, products, tiny

# Llama 3.2 3B. Its weights are random here: what a step costs does not depend on them.
LLAMA_3B = Size(128_256, hidden=3072, intermediate=8192, layers=28, heads=24, kv_heads=8, positions=131_072)
ROPE = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPE_THETA = 500_000.0

# Dense bf16 products with fp32 sums, in 10¹² operations a second, from the makers' data sheets. The first name that is in
# the device's counts.
PEAKS = {
    "B200": 2250.0, "GH200": 989.0, "H200": 989.0, "H100 NVL": 835.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0,
    "L40S": 362.0, "A10G": 70.0, "RTX 4090": 165.0, "RTX A6000": 155.0,
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One shape of pairs, drawn for one model."""

    shape: Shape
    size: Size
    longest: int
    dtype: str


def task(name: str, is_tiny: bool, dtype: str) -> Task:
    """The task of a shape's name."""
    if is_tiny:
        return Task(TINY_SHAPE, tiny(TINY_VOCABULARY), 256, dtype)
    return Task(SHAPES[name], LLAMA_3B, 2048, dtype)


def pairs_of(given: Task, count: int, seed: int) -> list[dict[str, list[int]]]:
    """`count` pairs of token ids."""
    return draw_pairs(given.shape, given.size.vocabulary, count, seed, given.longest)


def flops_of(size: Size, lengths: Sequence[Lengths]) -> int:
    """Operations that the mathematics of a step needs: every token once, the head at response tokens, visible scores."""
    return sum(product.flops for product in products(size, lengths))


def make_model(size: Size, dtype: Any, device: str, attention: str) -> Any:
    """A Llama with random weights, made on the device."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, LlamaConfig

    rope: dict[str, Any] = {"rope_type": "llama3", **ROPE}
    if int(transformers.__version__.split(".")[0]) >= 5:
        scaled = {"rope_parameters": {**rope, "rope_theta": ROPE_THETA}}
    else:
        scaled = {"rope_scaling": rope, "rope_theta": ROPE_THETA}
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim, max_position_embeddings=size.positions, rms_norm_eps=1e-5, tie_word_embeddings=True,
        attention_dropout=0.0, pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS, use_cache=False, **scaled,
    )  # fmt: skip
    torch.manual_seed(17)
    named = "dtype" if "rope_parameters" in scaled else "torch_dtype"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, **{named: dtype})
    return model.train()


def attention_with_padding(device: str) -> str:
    """The best that transformers has for padded rows here."""
    if device == "cuda":
        try:
            import flash_attn  # noqa: F401
        except ImportError:
            pass
        else:
            return "flash_attention_2"
    return "sdpa"


def machine(device: str, dtype: Any) -> dict[str, Any]:
    """The device, its peak by the table, and what it reaches in one large product."""
    import torch
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    peak = next((value for key, value in PEAKS.items() if key in name), None)
    side, repeats = (8192, 20) if device == "cuda" else (256, 3)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = min(timed(lambda: a @ b, device) for _ in range(repeats))
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "peak_tflops": peak,
        "matmul_tflops": 2 * side**3 / seconds / 1e12,
    }


def timed(function: Any, device: str) -> float:
    """Seconds of a call, to the end of what it starts on the device."""
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
