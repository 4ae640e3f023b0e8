"""The KL estimator against enumeration of every response, and the sampling settings that it insists on."""

import itertools

import pytest
import torch
from evaluation_helpers import moved, settings, tiny, world_rows
from transformers import LlamaConfig, LlamaForCausalLM

from isdaa.evaluation.checkpoints.kl import KL_SETTINGS, divergences, kl_summary
from isdaa.models.packed.forward import prepare
from isdaa.models.sampling.sampling import SamplingSettings, sample

pytestmark = pytest.mark.fast

VOCABULARY, EOS, LENGTH = 5, 2, 3
PROMPT = [1, 3, 4]


def small(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=16, initializer_range=0.8, pad_token_id=0, **shape)
    ).eval()


def enumerated(policy: LlamaForCausalLM, reference: LlamaForCausalLM) -> float:
    """Σ_y π(y) log π(y)/π_ref(y) over all responses that end with EOS or reach the limit."""
    total = 0.0
    for length in range(1, LENGTH + 1):
        for response in itertools.product(range(VOCABULARY), repeat=length):
            if EOS in response[:-1] or (response[-1] != EOS and length < LENGTH):
                continue
            ids = torch.tensor([[*PROMPT, *response]])
            with torch.no_grad():
                logps = [
                    torch.log_softmax(model(ids).logits[0, len(PROMPT) - 1 : -1], -1)
                    .gather(1, ids[0, len(PROMPT) :, None])
                    .sum()
                    .item()
                    for model in (policy, reference)
                ]
            total += torch.tensor(logps[0]).exp().item() * (logps[0] - logps[1])
    return total


def drawn(policy: LlamaForCausalLM, n: int) -> list[list[int]]:
    keys = [f"kl/{i}" for i in range(n)]
    found = sample(policy, [PROMPT], SamplingSettings(**KL_SETTINGS, max_new_tokens=LENGTH), {EOS}, 0, 0, keys, n, n=n)
    return [response.ids for response in found]


def test_expectation_is_the_enumerated_kl():
    policy, reference = small(0), small(1)
    truth = enumerated(policy, reference)
    responses = drawn(policy, 4000)
    rows = divergences(prepare(policy), prepare(reference), [(PROMPT, response) for response in responses])
    records = [row | {"finished": ids[-1] == EOS} for row, ids in zip(rows, responses, strict=True)]
    found = kl_summary(records, resamples=400, seed=0)
    assert found["low"] < truth < found["high"]
    assert found["mean"] == pytest.approx(truth, rel=0.05)
    plain = found["monte_carlo"]
    assert plain["low"] < truth < plain["high"]
    assert found["high"] - found["low"] < plain["high"] - plain["low"]  # why Rao–Blackwell is the one reported
    assert found["truncated"] == sum(ids[-1] != EOS for ids in responses) / len(responses)


def test_a_prompts_kl_is_the_sum_over_positions():
    policy, reference = small(0), small(1)
    response = [3, 4, EOS]
    ids = torch.tensor([[*PROMPT, *response]])
    with torch.no_grad():
        ours, theirs = (torch.log_softmax(m(ids).logits[0, len(PROMPT) - 1 : -1].double(), -1) for m in (policy, reference))
    expected = (ours.exp() * (ours - theirs)).sum().item()
    (row,) = divergences(prepare(policy), prepare(reference), [(PROMPT, response)])
    assert row["kl"] == pytest.approx(expected, rel=1e-5)
    index = torch.tensor(response)[:, None]
    assert row["policy_logps"] == pytest.approx(ours.gather(1, index).sum().item(), rel=1e-5)
    assert row["reference_logps"] == pytest.approx(theirs.gather(1, index).sum().item(), rel=1e-5)


def test_states_of_the_sampler_stand_in_for_the_policy(caplog):
    policy, reference = small(0), small(1)
    settings = SamplingSettings(**KL_SETTINGS, max_new_tokens=LENGTH)
    samples = sample(policy, [PROMPT], settings, {EOS}, 0, 0, [str(i) for i in range(40)], n=40, with_states=True)
    rows, states = [(PROMPT, s.ids) for s in samples], [s.states for s in samples]
    forwards = prepare(policy), prepare(reference)
    expected = divergences(*forwards, rows)
    calls = []
    policy.register_forward_pre_hook(lambda *_: calls.append(1))
    found = divergences(*forwards, rows, states)
    assert len(calls) == 1  # four rows, to see that the states are what they should be
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    for useless in ([None] * 40, [*states[:-1], None], [s * 2 for s in states]):  # the policy is run
        assert divergences(*forwards, rows, useless) == expected
    assert caplog.text.count("states kept while sampling") == 1


def test_zero_where_the_policy_is_the_reference():
    policy = small(0)
    rows = divergences(prepare(policy), prepare(small(0)), [(PROMPT, ids) for ids in drawn(policy, 50)])
    assert all(row["kl"] == pytest.approx(0, abs=1e-6) for row in rows)
    assert kl_summary([row | {"finished": True} for row in rows])["monte_carlo"]["mean"] == pytest.approx(0, abs=1e-6)


def test_broken_weights_and_other_vocabularies_are_said():
    from isdaa.errors import UserError

    broken = small(0)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="broken"):
        divergences(prepare(broken, probe=False), prepare(small(1)), [(PROMPT, [3, EOS])])
    with pytest.raises(UserError, match="vocabularies"):
        divergences(prepare(small(0)), prepare(tiny()), [(PROMPT, [3, EOS])])


def test_settings_are_the_models_own_distribution():
    assert KL_SETTINGS == {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


def test_kl_does_not_depend_on_the_win_rates_settings_nor_on_generation_config(tmp_path):
    """Hotter or greedier win-rate samples, and a model that asks for top-k 1: the KL samples stay the same."""
    from evaluation_helpers import TOKENIZATION, save

    from isdaa.evaluation.checkpoints.sample_and_kl import Collection, tokenize
    from isdaa.evaluation.checkpoints.what_to_evaluate import checkpoints

    reference = save(tiny(), tmp_path / "reference")
    policy = moved(tiny(), 0.1)
    plain = save(policy, tmp_path / "policy")
    policy.generation_config.update(do_sample=True, top_k=1, top_p=0.5, temperature=0.1)
    asking = save(policy, tmp_path / "asking")
    texts: dict[str, list[str]] = {}
    for name, path, changes in (
        ("plain", plain, {}),
        ("asking", asking, {}),
        ("greedy", plain, {"temperature": 0.0}),
    ):
        from evaluation_helpers import TOKENIZER

        chosen = settings(max_new_tokens=10, **changes)
        prompts = tokenize(world_rows(), TOKENIZER, chosen, TOKENIZATION)
        work = Collection(checkpoints([path]), reference, prompts, chosen, tmp_path / name)
        plan = work.run()
        for kind in ("kl", "samples"):
            texts[f"{name} {kind}"] = [record["text"] for record in work.samples[plan["models"][0][kind]]]
    assert texts["plain kl"] == texts["asking kl"] == texts["greedy kl"]
    assert texts["plain samples"] == texts["asking samples"] != texts["greedy samples"]
    # Even with the same settings, the two purposes have samples of their own.
    assert texts["plain samples"] != texts["plain kl"]
