"""The sampler draws from the model's own distribution, and a sample depends on nothing but model, prompt, seed and key."""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import GenerationConfig

from isdaa.errors import UserError
from isdaa.models.loading import add_lora, random_model
from isdaa.models.packed.forward import prepare
from isdaa.models.sampling import decoding, kv_cache, sampling
from isdaa.models.sampling.kv_cache import RoomyLayer
from isdaa.models.sampling.sampling import (
    Sample,
    SamplingSettings,
    draw,
    probabilities,
    respond,
    sample,
    uniforms,
    without_tokens,
)

VOCABULARY, EOS = 40, 2
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1, "attention_dropout": 0.3},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 5},
    "gpt_neox": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "bloom": {"n_layer": 2, "n_head": 2},
}


def tiny(family: str = "llama", vocabulary: int = VOCABULARY, sharp: float = 8.0, seed: int = 0) -> Any:
    """A random model with confident predictions (`sharp` scales its weights), so that a wrong context shows."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "gpt2":
        shape = {"n_positions": 64}
    elif family == "bloom":
        shape = {"hidden_size": 16}
    else:
        shape |= {"max_position_embeddings": 64}
    special = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
    model = random_model({"model_type": family, **shape, **special, **FAMILIES[family]}, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(sharp)
    return model


def some_prompts(count: int, vocabulary: int = VOCABULARY, longest: int = 12, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocabulary) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def names(count: int) -> list[str]:
    return [f"prompt {i}" for i in range(count)]


def run(model: Any, prompts: list[list[int]], keys: list[str] | None = None, **kwargs: Any) -> list[Sample]:
    settings = kwargs.pop("settings", SamplingSettings(max_new_tokens=10))
    arguments = {"stop_ids": {EOS}, "pad_id": 0, "seed": 3, "batch_size": 64, **kwargs}
    return sample(model, prompts, settings, keys=keys or names(len(prompts)), **arguments)


@torch.no_grad()
def plain(model: Any, ids: list[int]) -> torch.Tensor:
    """(V,) next-token log-probabilities of one unpadded row, by the model alone."""
    return model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


# --- the distribution ------------------------------------------------------------------------------------------------


def outcomes(model: Any, prompt: list[int], vocabulary: int, steps: int) -> dict[tuple[int, ...], float]:
    """Every response of at most `steps` tokens and its exact probability."""
    next_token = functools.cache(lambda before: plain(model, prompt + list(before)))
    responses = itertools.product(range(vocabulary), repeat=steps)
    ended = {y[: y.index(EOS) + 1] if EOS in y else y for y in responses}
    return {y: float(np.exp(sum(float(next_token(y[:t])[y[t]]) for t in range(len(y))))) for y in ended}


@pytest.mark.parametrize("seed", [0, 1])
def test_samples_follow_the_models_own_distribution(seed: int) -> None:
    """Chi-square over all 40 responses of ≤ 3 tokens, 4 tokens vocabulary: a false alarm in one of 1000 seeds."""
    model = tiny(vocabulary=4, sharp=5.0, seed=seed)
    prompt = [1, 3, 0]
    exact = outcomes(model, prompt, 4, 3)
    assert sum(exact.values()) == pytest.approx(1.0, abs=1e-6)
    count = 6000
    drawn = run(model, [prompt] * count, settings=SamplingSettings(max_new_tokens=3), seed=seed, batch_size=1000)
    counted = Counter(tuple(s.ids) for s in drawn)
    assert set(counted) <= set(exact)
    common = [y for y, p in exact.items() if p * count >= 5]
    observed = [counted[y] for y in common] + [sum(c for y, c in counted.items() if y not in common)]
    expected = [exact[y] * count for y in common] + [count * sum(p for y, p in exact.items() if y not in common)]
    if expected[-1] < 5:
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    assert len(common) > 10, "a test of a nearly deterministic model would show nothing"
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    assert stats.chi2.sf(statistic, len(observed) - 1) > 1e-3


def different(first: list[int], second: list[int]) -> float:
    """p-value of the chi-square test that two equally long lists were drawn from one distribution; rare values together."""
    one, two = Counter(first), Counter(second)
    common = [value for value in one | two if one[value] + two[value] >= 10]
    table = np.array([[counts[value] for value in common] for counts in (one, two)])
    rest = np.array([[len(first)], [len(second)]]) - table.sum(1, keepdims=True)
    return float(stats.chi2_contingency(np.hstack([table, rest]) if rest.any() else table).pvalue)


def test_samples_look_like_those_of_generate() -> None:
    """Lengths, first tokens, all tokens and pairs of neighbours against `model.generate` with its filters off. Tokens of one
    response depend on each other, so of each response one place is looked at, the same in both. Four tests at 1 in 4000: a
    false alarm in at most one of 1000 seeds."""
    model, count, limit = tiny(sharp=25.0, seed=3), 2000, 10
    prompts = [p for p in some_prompts(8, seed=1) for _ in range(count // 8)]
    width = max(map(len, prompts))
    rows = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    torch.manual_seed(0)
    arguments = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": limit, "eos_token_id": EOS, "pad_token_id": EOS}
    drawn = model.generate(input_ids=rows, attention_mask=mask, do_sample=True, **arguments)[:, width:].tolist()
    theirs = [ids[: ids.index(EOS) + 1] if EOS in ids else ids for ids in drawn]
    keys = names(count)
    ours, hotter = (
        [s.ids for s in run(model, prompts, keys, settings=SamplingSettings(t, max_new_tokens=limit), batch_size=500)]
        for t in (1.0, 1.5)
    )
    looks: list[Any] = [
        lambda ids, place: len(ids),
        lambda ids, place: ids[0],
        lambda ids, place: ids[place] if place < len(ids) else -1,
        lambda ids, place: tuple(ids[place : place + 2]),
    ]
    alarms = []
    for look in looks:
        one, two, three = ([look(ids, i % 5) for i, ids in enumerate(side)] for side in (theirs, ours, hotter))
        assert different(one, two) > 1 / 4000
        alarms.append(different(one, three) < 1 / 4000)
    assert sum(alarms) >= 2, "a test that a temperature of 1.5 passes would show nothing"


def test_the_models_generation_config_is_not_read() -> None:
    model, prompts = tiny(), some_prompts(20)
    before = run(model, prompts)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=9.0, max_new_tokens=2, eos_token_id=5
    )
    assert run(model, prompts) == before


def test_temperature_is_that_of_the_logits() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0]])
    halved = probabilities(logits, SamplingSettings(temperature=2.0))
    assert torch.allclose(halved, torch.softmax(logits / 2, -1))
    assert probabilities(logits * 1e4, SamplingSettings(temperature=1e-30)).tolist() == [[0.0, 0.0, 1.0]]


def test_filters_by_hand() -> None:
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    logits = p.log()

    def filtered(**settings: Any) -> list[float]:
        return [round(x, 5) for x in probabilities(logits, SamplingSettings(**settings))[0].tolist()]

    assert filtered() == [0.1, 0.4, 0.2, 0.3]
    assert filtered(top_k=2) == [0.0, 0.57143, 0.0, 0.42857]
    assert filtered(top_k=9) == [0.1, 0.4, 0.2, 0.3]
    assert filtered(top_p=0.39) == [0.0, 1.0, 0.0, 0.0]
    assert filtered(top_p=0.5) == [0.0, 0.57143, 0.0, 0.42857]  # 0.4 < 0.5: the token that crosses 0.5 stays
    assert filtered(top_p=0.71) == [0.0, 0.44444, 0.22222, 0.33333]
    assert filtered(top_p=1e-6) == [0.0, 1.0, 0.0, 0.0]  # never an empty set
    # Top-k first: of 4/7 and 3/7 the first alone reaches 0.5.
    assert filtered(top_k=2, top_p=0.5) == [0.0, 1.0, 0.0, 0.0]
    # Temperature before top-p: squared, 0.16 of 0.30 is already above one half.
    assert filtered(temperature=0.5, top_p=0.5) == [0.0, 1.0, 0.0, 0.0]


def test_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    edge = 1 - 2.0**-53
    for u, token in [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (edge, 4)]:
        assert draw(p, torch.tensor([u], dtype=torch.float64)).tolist() == [token]
    assert draw(p * 0.999, torch.tensor([edge], dtype=torch.float64)).tolist() == [4]  # need not sum to 1


def test_uniforms_are_a_fixed_stream_per_key() -> None:
    u = uniforms(7, "a", 1000)
    assert u.dtype == np.float64 and u.min() >= 0 and u.max() < 1
    assert np.array_equal(uniforms(7, "a", 10), u[:10])
    assert not np.array_equal(uniforms(8, "a", 10), u[:10])
    assert not np.array_equal(uniforms(7, "b", 10), u[:10])
    assert uniforms(7, "a", 2).tolist() == [0.24924248477653155, 0.7504130807143359]  # in any version, on any machine
    many = np.concatenate([uniforms(0, str(k), 20) for k in range(500)])
    assert stats.kstest(many, "uniform").pvalue > 1e-3


# --- independence of everything else ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_size_and_order_change_nothing(family: str) -> None:
    count = 18
    model, prompts, keys = tiny(family), some_prompts(count), names(count)
    alone = run(model, prompts, keys, batch_size=1)
    assert len({tuple(s.ids) for s in alone}) > 12 and len({len(s.ids) for s in alone}) > 1
    assert 0 < sum(s.finished for s in alone) < count
    for size in (7, 64):
        assert run(model, prompts, keys, batch_size=size) == alone
    order = list(range(count))
    random.Random(1).shuffle(order)
    shuffled = run(model, [prompts[i] for i in order], [keys[i] for i in order], batch_size=16)
    assert [shuffled[order.index(i)] for i in range(count)] == alone
    assert run(model, prompts, keys, seed=4) != alone


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_is_drawn_from_the_logits_of_the_unpadded_row(family: str) -> None:
    """Recomputed token by token without padding, cache or batch."""
    model, prompts, keys = tiny(family), some_prompts(8), names(8)
    for prompt, key, got in zip(prompts, keys, run(model, prompts, keys), strict=True):
        ids: list[int] = []
        for u in uniforms(3, key, 10):
            p = plain(model, prompt + ids).exp()
            ids.append(int(torch.searchsorted(p.cumsum(0), torch.tensor(u), right=True).clamp(max=VOCABULARY - 1)))
            if ids[-1] == EOS:
                break
        assert got == Sample(ids, ids[-1] == EOS)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_logits_equal_unpadded_ones(family: str) -> None:
    model, prompts = tiny(family).eval(), [[5], [6, 7, 8, 9, 3, 1, 4], [9, 9, 4]]
    rows = [list(p) for p in prompts]
    with torch.no_grad():
        assert decoding.cache_works(model, rows[1]) == (family != "bloom")
    if family == "bloom":  # takes no position ids: sampled without a cache
        return
    with torch.no_grad():
        cached = decoding.CachedDecoder(model, [(tuple(p), [i]) for i, p in enumerate(prompts)], pad_id=0)
        for step in range(6):
            expected = torch.stack([plain(model, row) for row in rows])
            assert torch.allclose(cached.logits.double().log_softmax(-1), expected, atol=2e-4)
            if step == 2:
                cached.keep(torch.tensor([2, 0, 0]))
                rows = [rows[2], rows[0], list(rows[0])]
            tokens = torch.tensor([step, step + 7, 30])
            cached.step(tokens)
            rows = [[*row, int(t)] for row, t in zip(rows, tokens, strict=True)]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bloom"])
@pytest.mark.parametrize("chunk", [1, 12, 1000])
@torch.no_grad()
def test_prompts_may_be_computed_apart(family: str, chunk: int) -> None:
    """Chunks of prompts padded to one length in the cache, samples of one prompt side by side, states of all of them."""
    model = tiny(family).eval()
    groups = [((5, 6, 7, 8, 9, 3, 1, 4), [0]), ((9, 9, 4), [1, 2, 3]), ((7, 7, 1), [4]), ((5,), [5, 6])]
    rows = [list(prompt) for prompt, numbers in groups for _ in numbers]
    cached = decoding.CachedDecoder(model, groups, pad_id=0, with_states=True, chunk=chunk)
    for step in range(4):
        expected = torch.stack([plain(model, row) for row in rows])
        assert torch.allclose(cached.logits.double().log_softmax(-1), expected, atol=2e-4)
        assert cached.states is not None
        torch.testing.assert_close(model.get_output_embeddings()(cached.states), cached.logits)
        if step == 1:
            cached.keep(torch.tensor([0, 6, 2, 3]))
            rows = [rows[0], rows[6], rows[2], rows[3]]
        tokens = torch.arange(len(rows)) + step
        cached.step(tokens)
        rows = [[*row, int(t)] for row, t in zip(rows, tokens, strict=True)]


def test_chunks_are_neighbours_of_similar_length() -> None:
    lengths = [9, 8, 8, 8, 5, 5, 5, 2, 1]
    groups = [(tuple(range(n)), [i]) for i, n in enumerate(lengths)]

    def cut(tokens: int) -> list[list[int]]:
        return [[len(prompt) for prompt, _ in part] for part in decoding.chunks_of(groups, tokens)]

    assert cut(1) == [[n] for n in lengths]
    assert cut(1000) == [lengths]
    assert cut(40) == [[9, 8, 8, 8], [5, 5, 5], [2, 1]]  # 36 tokens with padding; 15 are a quarter of 40 and more
    assert cut(64) == [[9, 8, 8, 8], [5, 5, 5, 2], [1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_states_of_a_sample_give_its_logits(family: str) -> None:
    model, prompts = tiny(family), some_prompts(12)
    without = run(model, prompts, batch_size=5)
    samples = run(model, prompts, batch_size=5, with_states=True)
    assert samples == without and all(s.states is None for s in without)
    for prompt, s in zip(prompts, samples, strict=True):
        assert s.states is not None and s.states.shape[0] == len(s.ids) and not s.states.requires_grad
        logps = model.get_output_embeddings()(s.states).double().log_softmax(-1)
        expected = torch.stack([plain(model, prompt + s.ids[:t]) for t in range(len(s.ids))])
        assert torch.allclose(logps, expected, atol=2e-4)


def test_a_model_without_a_head_to_listen_to_has_no_states() -> None:
    model = tiny()
    model.get_output_embeddings = lambda: None
    assert all(s.states is None for s in run(model, some_prompts(5), with_states=True))


def test_temperature_one_is_the_softmax_of_the_logits_to_the_bit() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 20
    shifted = logits - logits.amax(-1, keepdim=True)
    assert torch.equal(probabilities(logits, SamplingSettings()), torch.softmax(shifted, -1))


def test_n_samples_share_the_prompt_and_equal_separate_calls() -> None:
    model, prompts = tiny(), some_prompts(5)
    keys = [f"{i}#{j}" for i in range(5) for j in range(4)]
    widths: list[int] = []
    forward = type(model).forward

    def counted(self: Any, **kwargs: Any) -> Any:
        widths.append(kwargs["input_ids"].shape[0])
        return forward(self, **kwargs)

    model.forward = counted.__get__(model)
    run(model, prompts)  # the probe's own calls are not to be counted
    widths.clear()
    together = run(model, prompts, keys, n=4)
    assert widths[0] == 5 and widths[1] > 10  # five prompts, then up to twenty rows
    widths.clear()
    assert run(model, prompts, keys, n=4, batch_size=3) == together  # a prompt's samples in two batches
    assert max(widths) == 3
    del model.forward
    apart = [run(model, prompts, keys[j::4]) for j in range(4)]
    assert together == [apart[j][i] for i in range(5) for j in range(4)]
    repeated = [p for p in prompts for _ in range(4)]
    assert run(model, repeated, keys) == together
    assert len({tuple(s.ids) for s in together}) > 10


def test_a_shorter_limit_gives_a_beginning() -> None:
    model, prompts = tiny(), some_prompts(20)
    long, short = run(model, prompts), run(model, prompts, settings=SamplingSettings(max_new_tokens=4))
    assert any(len(s.ids) > 4 for s in long)
    for a, b in zip(long, short, strict=True):
        assert b == (a if len(a.ids) <= 4 else Sample(a.ids[:4], False))


def test_the_cache_grows_and_gives_rows_back() -> None:
    torch.manual_seed(0)
    layer, keys, values = RoomyLayer(), torch.zeros(3, 2, 0, 4), torch.zeros(3, 2, 0, 4)
    for step in range(120):
        new_keys, new_values = torch.randn(2, len(keys), 2, 1 + 4 * (step == 0), 4)
        seen = layer.update(new_keys, new_values)
        keys, values = torch.cat([keys, new_keys], 2), torch.cat([values, new_values], 2)
        if step in (3, 70):
            rows = torch.tensor([2, 0, 0, 1])[: len(keys)]
            layer.batch_select_indices(rows)
            keys, values = keys[rows], values[rows]
            seen = layer.keys, layer.values
        assert torch.equal(seen[0], keys) and torch.equal(seen[1], values)
    assert layer.get_seq_length() == 124


@pytest.mark.parametrize("start", ["appended", "joined", "first tokens"])
def test_rows_move_into_gaps(start: str) -> None:
    torch.manual_seed(0)
    caches = [kv_cache.new_cache(tiny()) for _ in range(3)]
    for cache in caches:
        assert cache is not None
        for layer in range(2):
            for _ in range(3 if start == "appended" else 1):
                cache.update(*torch.randn(2, 6, 1, 4, 8), layer)
    cache = caches[0]
    if start == "joined":
        cache = kv_cache.new_cache(tiny())
        assert cache is not None
        kept = [caches[1].layers[1].values, caches[2].layers[1].values]
        kv_cache.join(caches[1:], [None, torch.tensor([5, 5])], cache)
        assert torch.equal(cache.layers[1].values, torch.cat([kept[0], kept[1][[5, 5]]]))
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    for rows in ([0, 5, 2, 4], [0, 1], [1, 0], [0, 0, 1]):  # gaps filled, the end cut off, then copies
        kv_cache.select_rows(cache, torch.tensor(rows))
        before = [(keys[rows], values[rows]) for keys, values in before]
        more = torch.randn(2, len(rows), 1, 1, 8)
        for number, layer in enumerate(cache.layers):
            assert torch.equal(layer.keys, before[number][0]) and torch.equal(layer.values, before[number][1])
            seen = cache.update(*more, number)
            before[number] = tuple(torch.cat([old, new], 2) for old, new in zip(before[number], more, strict=True))
            assert torch.equal(seen[0], before[number][0]) and torch.equal(seen[1], before[number][1])


def test_rows_behind_the_new_end_fill_the_gaps() -> None:
    assert without_tokens(np.array([True, False, True, False, True, True])).tolist() == [0, 4, 2, 5]
    assert without_tokens(np.array([False, False, True])).tolist() == [2]
    assert without_tokens(np.array([True, True, False])).tolist() == [0, 1]


# --- ends ------------------------------------------------------------------------------------------------------------


def test_stop_tokens_end_a_response_and_belong_to_it() -> None:
    model, prompts = tiny(sharp=3.0), some_prompts(60)
    stops = {EOS, 5, 11, 17}
    samples = run(model, prompts, stop_ids=stops)
    for s in samples:
        assert not set(s.ids[:-1]) & stops
        assert s.finished == (s.ids[-1] in stops)
        assert s.finished or len(s.ids) == 10
    assert {s.ids[-1] for s in samples if s.finished} >= {5, 11}
    free = run(model, prompts, stop_ids=set())
    assert all(len(s.ids) == 10 and not s.finished for s in free)
    for s, f in zip(samples, free, strict=True):
        assert f.ids[: len(s.ids)] == s.ids


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_token_may_be_the_stop_token(family: str) -> None:
    model, prompts = tiny(family), some_prompts(40)
    assert any(EOS in p for p in prompts)
    assert run(model, prompts, pad_id=EOS) == run(model, prompts, pad_id=0) == run(model, prompts, pad_id=33)


class Numbers:
    """A tokenizer whose words are numbers; the one for id 9 is a NUL."""

    pad_token_id, eos_token_id = None, EOS

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return " ".join("\0" if i == 9 else str(i) for i in ids)


def test_responses_are_samples_read_up_to_the_stop_token_that_ended_them() -> None:
    model, prompts = tiny(sharp=3.0), some_prompts(16)
    chats = [i % 3 == 0 for i in range(16)]
    stops, settings = {False: {EOS}, True: {EOS, *range(20, 28)}}, SamplingSettings(max_new_tokens=10)
    keys = [f"{i}/{k}" for i in range(16) for k in range(2)]
    found = respond(model, Numbers(), list(zip(prompts, chats, strict=True)), settings, stops, 3, keys, 4, n=2)
    assert {one.finished for one in found} == {True, False}
    for chat, stop in stops.items():
        places = [i for i in range(16) if chats[i] == chat]
        own = [i * 2 + k for i in places for k in range(2)]
        alone = sample(model, [prompts[i] for i in places], settings, stop, EOS, 3, [keys[i] for i in own], 4, n=2)
        assert [(found[i].ids, found[i].finished) for i in own] == [(one.ids, one.finished) for one in alone]
        for one in alone:
            assert one.finished == (one.ids[-1] in stop) and not set(one.ids[:-1]) & stop
        words = [" ".join("\ufffd" if i == 9 else str(i) for i in one.ids if i not in stop) for one in alone]
        assert [found[i].text for i in own] == words
    assert any("\ufffd" in one.text for one in found)


def test_greedy_equals_generate_with_a_neutral_config() -> None:
    model, prompts = tiny(), some_prompts(15)
    greedy = run(model, prompts, settings=SamplingSettings(temperature=0, max_new_tokens=10), batch_size=4)
    for prompt, got in zip(prompts, greedy, strict=True):
        neutral = GenerationConfig(do_sample=False, max_new_tokens=10, eos_token_id=EOS, pad_token_id=0)
        row = torch.tensor([prompt])
        full = model.generate(row, attention_mask=torch.ones_like(row), generation_config=neutral)
        assert got.ids == full[0, len(prompt) :].tolist()
    assert run(model, prompts, settings=SamplingSettings(temperature=0, max_new_tokens=10), seed=99) == greedy


# --- models in use ---------------------------------------------------------------------------------------------------


def test_training_mode_and_prepared_models_and_adapters_are_left_as_they_were() -> None:
    model, prompts = tiny(), some_prompts(30)
    expected = run(model, prompts)
    model.train()
    model.model.layers[0].eval()
    model.gradient_checkpointing_enable()
    prepare(model)
    implementation = model.config._attn_implementation
    assert run(model, prompts) == expected
    assert model.config._attn_implementation == implementation
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    lora = add_lora(tiny(), rank=2)
    assert run(lora, prompts) == expected
    assert all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()
    state = torch.get_rng_state()
    run(model, prompts)
    assert torch.equal(torch.get_rng_state(), state)


def test_state_space_models_are_sampled_without_a_cache(caplog: pytest.LogCaptureFixture) -> None:
    config = {"model_type": "mamba", "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4}
    model, prompts = random_model(config, 0), some_prompts(9, 30)
    together = run(model, prompts, settings=SamplingSettings(max_new_tokens=4))
    assert "without one" in caplog.text
    assert together == run(model, prompts, settings=SamplingSettings(max_new_tokens=4), batch_size=1)


def test_a_model_whose_cache_is_wrong_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model, prompts = tiny(), some_prompts(10)
    expected = run(model, prompts)
    broken = tiny()
    forward = broken.forward

    def ignores_positions(**kwargs: Any) -> Any:
        if "position_ids" in kwargs:
            kwargs["position_ids"] = torch.zeros_like(kwargs["position_ids"])
        return forward(**kwargs)

    broken.forward = ignores_positions
    assert run(broken, prompts) == expected
    assert "does not support padded sampling" in caplog.text


def test_progress_counts_samples() -> None:
    class Counter:
        done = 0.0

        def update(self, n: float = 1) -> None:
            self.done += n

    bar = Counter()
    run(tiny(), some_prompts(20), [str(i) for i in range(40)], n=2, batch_size=7, progress=bar)
    assert bar.done == 40


def test_no_prompts_no_samples() -> None:
    assert run(tiny(), [], []) == []


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingSettings(**settings)


def test_bad_prompts_and_broken_models() -> None:
    model = tiny()
    with pytest.raises(UserError, match="prompt of sample b: no tokens"):
        run(model, [[1], []], ["a", "b"])
    with pytest.raises(UserError, match="prompt of sample a: token id 40, but the model knows 40 tokens"):
        run(model, [[40]], ["a"])
    with pytest.raises(UserError, match=r"55 tokens and max_new_tokens 10 exceed the model's context of 64"):
        run(model, [[1] * 55], ["a"])
    assert len(run(model, [[1] * 54], ["a"])) == 1
    with pytest.raises(ValueError, match="need as many keys"):
        run(model, [[1]], ["a"], n=2)
    with torch.no_grad():
        model.lm_head.weight[7, 0] = float("nan")
    with pytest.raises(UserError, match="sample a: the model's next-token probabilities are not numbers"):
        run(model, [[1]], ["a"])


def test_progress_moves_while_samples_are_in_flight() -> None:
    """Counted as they end, not batch by batch; between two that end, the token in work is told."""
    told: list[tuple[float, str]] = []

    class Bar:
        within = ""

        def update(self, n: float = 1) -> None:
            told.append((n, self.within))

        def __setattr__(self, name: str, value: str) -> None:
            seen.append(value)
            object.__setattr__(self, name, value)

    seen: list[str] = []
    prompts = [[3 + i, 4, 5] for i in range(6)]
    drawn = sample(tiny(sharp=1.0), prompts, SamplingSettings(max_new_tokens=9), {EOS}, 0, 3, list("abcdef"), 4, Bar())
    assert sum(n for n, _ in told) == 6 and len(told) > 2
    assert {"reading 4 prompts", "reading 2 prompts", "token 1 of at most 9"} <= set(seen) and told[-1][1] == ""
    early = [n for n, within in told if within]
    assert sum(early) <= sum(sample.finished for sample in drawn) < 6


def test_progress_goes_through_a_batch_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for the prompts, a tenth of one for each token: how much of the batch is done follows the time."""
    now = [0.0]
    monkeypatch.setattr(sampling.time, "monotonic", lambda: now[0])
    read, step = decoding.CachedDecoder.__init__, decoding.CachedDecoder.step

    def slowly(seconds: float, do: Any) -> Any:
        return lambda *args, **kwargs: (now.__setitem__(0, now[0] + seconds), do(*args, **kwargs))[1]

    monkeypatch.setattr(decoding.CachedDecoder, "__init__", slowly(1.0, read))
    monkeypatch.setattr(decoding.CachedDecoder, "step", slowly(0.1, step))

    class Bar:
        within, ahead = "", 0.0

        def update(self, n: float = 1) -> None:
            pass

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "ahead":
                seen.append((now[0], value))

    seen: list[tuple[float, float]] = []
    sample(tiny(), [[3, 4, 5], [4, 5, 6]], SamplingSettings(max_new_tokens=21), {-1}, 0, 3, list("ab"), 2, Bar())
    start = seen[0][0] - 1.1
    assert len(seen) == 20 and seen[-1][1] == 0.0
    assert all(value == pytest.approx(2 * (when - start) / 3.0) for when, value in seen[:-1])
