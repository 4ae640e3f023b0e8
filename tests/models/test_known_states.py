"""KL from the states that the sampler kept, against running the policy again."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from forward_helpers import tiny

from isdaa.models.packed.forward import prepare
from isdaa.models.packed.plain_rows import kl_pass
from isdaa.models.sampling.kl_from_samples import kl_from_states, states_agree
from isdaa.models.sampling.sampling import SamplingSettings, sample

Row = tuple[list[int], list[int]]


def drawn(model: Any, count: int) -> tuple[list[Row], list[torch.Tensor]]:
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 61) for _ in range(rng.randint(1, 9))] for _ in range(count)]
    keys = [str(i) for i in range(count)]
    samples = sample(model, prompts, SamplingSettings(max_new_tokens=8), set(range(2, 12)), 0, 0, keys, 6, with_states=True)
    assert len({len(s.ids) for s in samples}) > 2
    return [(p, s.ids) for p, s in zip(prompts, samples, strict=True)], [s.states for s in samples]  # type: ignore[misc]


@pytest.mark.parametrize("names", [("llama", "llama"), ("gemma2", "qwen2"), ("gpt2", "llama"), ("bloom", "llama")])
@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_equals_running_the_policy_again(names: tuple[str, str], batch_tokens: int) -> None:
    policy, reference = (prepare(tiny(name, seed)) for seed, name in enumerate(names))
    rows, states = drawn(policy.model, 15)
    assert states_agree(policy, rows, states)
    expected = kl_pass(policy, reference, rows)
    found = kl_from_states(policy, reference, rows, states, batch_tokens=batch_tokens)
    for name in ("policy_logps", "reference_logps", "kl"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    assert (found.kl > 0).all() and not found.kl.requires_grad


def test_the_policy_is_not_run() -> None:
    policy, reference = prepare(tiny("llama", 0)), prepare(tiny("llama", 1))
    rows, states = drawn(policy.model, 12)
    policy.model.forward = None  # type: ignore[assignment]
    assert kl_from_states(policy, reference, rows, states).kl.shape == (12,)


def test_wrong_states_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    policy = prepare(tiny("llama", 0))
    rows, states = drawn(policy.model, 12)
    assert not states_agree(policy, rows, [s + 0.5 for s in states])
    assert "it is run again" in caplog.text
    assert states_agree(policy, rows[:1], states[:1])
    with pytest.raises(ValueError, match="response tokens"):
        states_agree(policy, rows, [s[1:] for s in states])
