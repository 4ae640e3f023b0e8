"""Full logits never exist: the peak memory of a step at a real vocabulary, against an explicit bound."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

VOCABULARY, HIDDEN, TOKENS = 128_256, 32, 512

# One step of 4 pairs with 128 response tokens each. Prints MiB: what full logits would take, and what the step took.
# The peak is the program's own, VmHWM: `ru_maxrss` starts at what the process that started it has held.
PROGRAM = """
import os
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from isdaa.models.packed.forward import prepare
from isdaa.models.attention.layout import Layout

vocabulary, hidden, tokens = {vocabulary}, {hidden}, {tokens}
way = "ours"
if (child := os.fork()) == 0:  # what is imported is imported once
    way = "full"
else:
    assert os.waitpid(child, 0)[1] == 0
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=vocabulary, hidden_size=hidden, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, tie_word_embeddings=False))
forward = prepare(model, probe=False)
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)
ones = torch.ones(4, dtype=torch.long)
layout = Layout.of_pairs(8 * ones, tokens // 8 * ones, tokens // 8 * ones)
ids = torch.randint(0, vocabulary, (layout.tokens,))
status = lambda: dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = lambda: int(status()["VmHWM"].split()[0]) / 1024
before = peak()
if way == "ours":
    out = forward(model, ids, None, layout, with_wpo=True)
    (out.chosen_logps - out.rejected_logps).sum().backward()
else:
    torch.log_softmax(model(input_ids=ids[None, :tokens]).logits[0], -1)[:, 0].sum().backward()
print(way, vocabulary * tokens * 4 / 2**20, peak() - before, flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
def test_peak_memory_of_a_step():
    program = PROGRAM.format(vocabulary=VOCABULARY, hidden=HIDDEN, tokens=TOKENS)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    told = {line.split()[0]: [*map(float, line.split()[1:])] for line in done.stdout.splitlines()}
    assert told.keys() == {"ours", "full"}
    # One chunk of 32 MiB and the gradients of two (V, D) matrices of 16 MiB fit; full logits do not.
    bound = 120
    for way, (full, used) in told.items():
        assert full > 2 * bound
        assert (used < bound) == (way == "ours"), f"{used:.0f} MiB, full logits alone are {full:.0f} MiB"
