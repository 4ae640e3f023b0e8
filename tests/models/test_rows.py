"""Rows of prompt and response: logps and Rao–Blackwell KL against direct, dense computations."""

from __future__ import annotations

import pytest
import torch
from forward_helpers import plain_token_logps, tiny, untouched

from isdaa.errors import UserError
from isdaa.models.packed.forward import prepare
from isdaa.models.packed.plain_rows import kl_pass, sequence_logps

pytestmark = pytest.mark.fast


def rows_of(count: int) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 20, (count, 2), generator=generator).tolist()
    rows = [tuple(torch.randint(3, 61, (n,), generator=generator).tolist() for n in pair) for pair in lengths]
    return [*rows, ([5, 6, 7], [])]


def dense(policy, reference, row):
    prompt, response = (torch.tensor(part, dtype=torch.long) for part in row)
    logits = [m(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1] for m in (policy, reference)]
    p, q = (torch.log_softmax(z, -1) for z in logits)
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("names", [("llama", "llama"), ("gemma2", "qwen2"), ("bloom", "llama")])
@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
@torch.no_grad()
def test_against_dense(names, batch_tokens):
    models = [tiny(name, seed).eval() for seed, name in enumerate(names)]
    truth_models = [untouched(model) for model in models]
    forwards = [prepare(model) for model in models]
    rows = rows_of(9)
    done = []
    out = kl_pass(*forwards, rows, batch_tokens=batch_tokens, progress=done.append)
    assert sum(done) == len(rows) and (len(done) == len(rows)) == (batch_tokens == 1)
    for model, found in zip(truth_models, (out.policy_logps, out.reference_logps), strict=True):
        logps = [plain_token_logps(model, torch.tensor(p), torch.tensor(r, dtype=torch.long)).sum() for p, r in rows]
        torch.testing.assert_close(found, torch.stack(logps), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.kl, torch.stack([dense(*truth_models, row) for row in rows]), rtol=1e-5, atol=1e-5)
    assert out.kl[-1] == 0 and (out.kl[:-1] > 0).all()
    alone = sequence_logps(forwards[0], rows, batch_tokens=batch_tokens, progress=done.append)
    torch.testing.assert_close(alone, out.policy_logps, rtol=1e-5, atol=1e-5)


def test_zero_for_equal_models_and_no_rows():
    model = tiny("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5  # must not matter: the pass is made in evaluation mode
    model.train()
    forward, other = prepare(model), prepare(untouched(model))
    out = kl_pass(forward, other, rows_of(5))
    assert out.kl.abs().max() == 0 and torch.equal(out.policy_logps, out.reference_logps)
    assert not out.kl.requires_grad and model.training
    assert kl_pass(forward, other, []).kl.shape == (0,)
    assert sequence_logps(forward, []).shape == (0,)


def test_different_vocabularies_are_a_user_error():
    model, other = tiny("llama"), tiny("llama")
    other.resize_token_embeddings(70)
    with pytest.raises(UserError, match="61 and 70"):
        kl_pass(prepare(model), prepare(other), rows_of(2))
