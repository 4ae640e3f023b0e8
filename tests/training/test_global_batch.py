"""The loss is the mean over the pairs of the GLOBAL batch, however that batch is cut up."""

from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_helpers import (
    largest_difference,
    logged,
    moved,
    tiny_model,
    token_rows,
    trainer_of,
    weights_of,
    with_reference,
)

from isdaa import Objective, PairLogps
from isdaa.objectives.weights import batch_weights
from isdaa.training.trainer.batches import GlobalBatchSampler, TokenisedPairs, shard
from isdaa.training.trainer.packing import MicroBatch, Piece, packed, split_by_tokens

OBJECTIVES = {
    "none": {"weight": "none"},
    "importance": {"weight": "importance"},
    "importance normalised": {"weight": "importance", "normalize": "batch"},
    "shuffled": {"weight": "shuffled"},
    "shuffled normalised": {"weight": "shuffled", "normalize": "batch"},
    "mean": {"weight": "mean"},
    "wpo": {"weight": "wpo"},
    "wpo normalised": {"weight": "wpo", "normalize": "batch"},
    "with an SFT term": {"weight": "importance", "normalize": "batch", "sft_coefficient": 0.1, "loss": "squared"},
}


@pytest.fixture(scope="module")
def reference() -> Any:
    return tiny_model().double()  # rounding then hides no mistake


@pytest.fixture(scope="module")
def pairs(reference: Any) -> Any:
    rows = token_rows(22, weight=[1.0 + 0.5 * (i % 3) for i in range(22)])
    return with_reference(rows, reference)


def run(reference: Any, folder: Path, pairs: Any, objective: Objective, **changes: Any) -> tuple[list[float], Any]:
    """Losses of every step and the weights at the end of one epoch of plain gradient descent, from a moved policy."""
    policy = moved(reference)
    own = {"starts_at_reference": False} | changes.pop("own", {})
    settings = {"optimizer": "sgd", "logging_steps": 1, "learning_rate": 0.02} | changes
    trainer = trainer_of(policy, folder, pairs, objective=objective, own=own, **settings)
    trainer.train()
    return logged(trainer), weights_of(policy)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_by_eight_equals_eight_by_one(name: str, reference: Any, pairs: Any, tmp_path: Path) -> None:
    # 22 pairs in global batches of 8: the last one has 6, which 1 × 8, 2 × 4 and 8 × 1 cut up differently.
    objective = Objective(beta=0.3, **OBJECTIVES[name])
    losses, weights = run(reference, tmp_path / "a", pairs, objective, batch_size=8)
    assert len(losses) == 3 and len(set(losses)) == 3
    for batch_size, steps in ((1, 8), (4, 2)):
        folder = tmp_path / f"{batch_size}"
        other, cut = run(reference, folder, pairs, objective, batch_size=batch_size, gradient_accumulation_steps=steps)
        assert other == pytest.approx(losses, rel=1e-6)
        assert largest_difference(cut, weights) < 1e-9


@pytest.mark.parametrize("name", ["importance", "shuffled", "importance normalised"])
def test_pieces_of_a_micro_batch_change_nothing(name: str, reference: Any, pairs: Any, tmp_path: Path) -> None:
    objective = Objective(beta=0.3, **OBJECTIVES[name])
    losses, weights = run(reference, tmp_path / "a", pairs, objective, batch_size=8)
    own = {"batch_tokens": 40}
    other, cut = run(reference, tmp_path / "b", pairs, objective, batch_size=8, own=own)
    assert other == pytest.approx(losses, rel=1e-6)
    assert largest_difference(cut, weights) < 1e-9


def test_the_equality_can_fail(reference: Any, pairs: Any, tmp_path: Path) -> None:
    # Weights that span only the micro-batch are what the pass over the global batch prevents.
    objective = Objective(beta=0.3, weight="importance", normalize="batch")
    losses, weights = run(reference, tmp_path / "a", pairs, objective, batch_size=8)
    policy = moved(reference)
    trainer = trainer_of(
        policy, tmp_path / "b", pairs, objective=objective, optimizer="sgd", logging_steps=1, learning_rate=0.02,
        batch_size=1, gradient_accumulation_steps=8, own={"starts_at_reference": False},
    )  # fmt: skip
    trainer.weigh = lambda micro: None  # type: ignore[method-assign]
    trainer.train()
    assert logged(trainer) != pytest.approx(losses, rel=1e-3)
    assert largest_difference(weights_of(policy), weights) > 1e-4


@pytest.mark.parametrize("name", ["importance", "importance normalised"])
def test_loss_and_gradient_by_hand(name: str, reference: Any, pairs: Any, tmp_path: Path) -> None:
    """Every pair alone through the model's own logits; the objective on all of them; their mean with the weights."""
    objective = Objective(beta=0.3, **OBJECTIVES[name])
    policy = moved(reference)
    trainer = trainer_of(policy, tmp_path, pairs, objective=objective, batch_size=3, gradient_accumulation_steps=10)
    micro, n = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 8, torch.device("cpu"))
    assert n == 22
    loss = sum(trainer.training_step(policy, m, n) for m in micro)
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}

    policy.zero_grad()
    logps = torch.stack([torch.stack([plain_logp(policy, pairs, i, c) for c in ("chosen", "rejected")]) for i in range(22)])
    lengths = [torch.tensor([len(pairs[i][f"{c}_ids"]) for i in range(22)]) for c in ("chosen", "rejected")]
    refs = [torch.tensor(pairs.floats[f"reference_{c}_logps"]).float() for c in ("chosen", "rejected")]
    out = objective(PairLogps(logps[:, 0], logps[:, 1], *refs, *lengths))
    expected = (out.losses * torch.tensor(pairs.floats["weight"])).sum() / 22
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    assert largest_difference(gradients, {name: p.grad for name, p in policy.named_parameters()}) < 5e-6


def plain_logp(model: Any, pairs: Any, index: int, which: str) -> torch.Tensor:
    prompt, response = pairs[index]["prompt_ids"].tolist(), pairs[index][f"{which}_ids"].tolist()
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    positions = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
    return logits[positions, torch.tensor(response)].sum()


def test_fill_in_pairs_count_nothing(reference: Any, pairs: Any, tmp_path: Path) -> None:
    for weight in ("importance", "shuffled"):
        objective = Objective(beta=0.3, weight=weight, normalize="batch", sft_coefficient=0.1)
        policy = moved(reference)
        trainer = trainer_of(policy, tmp_path, pairs, objective=objective, batch_size=8)
        found = []
        for indices in ([3, 1, 4], [3, 1, 4, ~3, ~9]):
            policy.zero_grad()
            batch = pairs.batch(indices)
            assert batch.valid.tolist() == [i >= 0 for i in indices]
            micro = MicroBatch([Piece.of(batch)])
            loss = trainer.training_step(policy, micro, int(batch.valid.sum()))
            found.append((float(loss), {name: p.grad.clone() for name, p in policy.named_parameters()}))
        assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
        assert largest_difference(found[1][1], found[0][1]) < 1e-9
        metrics = trainer.interval_metrics()
        assert metrics["weights/mean"] > 0


def test_order_and_company_of_a_pair_change_nothing(reference: Any, pairs: Any, tmp_path: Path) -> None:
    policy = moved(reference)
    trainer = trainer_of(policy, tmp_path, pairs, batch_size=8)

    def losses(indices: list[int]) -> dict[int, float]:
        batch = pairs.batch(indices)
        out, _ = trainer.losses_of(policy, Piece.of(batch))
        return dict(zip(indices, out.losses.tolist(), strict=True))

    together = losses(list(range(12)))
    assert losses(list(range(11, -1, -1))) == pytest.approx(together, rel=1e-5)
    for index in (0, 5, 11):
        assert losses([index])[index] == pytest.approx(together[index], rel=1e-5)
        assert losses([20, index, 13])[index] == pytest.approx(together[index], rel=1e-5)


def test_the_weight_column_multiplies_the_whole_loss_and_no_divisor(reference: Any, tmp_path: Path) -> None:
    plain = with_reference(token_rows(8), reference)
    tripled = with_reference(token_rows(8, weight=[3.0] * 8), reference)
    some = with_reference(token_rows(8, weight=[0.0, None, 0.0, None, 0.0, None, 0.0, None]), reference)
    objective = Objective(beta=0.3, weight="importance", normalize="batch", sft_coefficient=0.1)
    losses, weights = {}, {}
    for name, data in (("plain", plain), ("tripled", tripled), ("some", some)):
        policy = moved(reference)
        trainer = trainer_of(policy, tmp_path / name, data, objective=objective, batch_size=8, optimizer="sgd", logging_steps=1)
        trainer.train()
        losses[name] = logged(trainer)[0]
        weights[name] = {n: p - weights_of(moved(reference))[n] for n, p in weights_of(policy).items()}
        losses[f"{name} ess"] = logged(trainer, "weights/ess")[0]
    assert losses["tripled"] == pytest.approx(3 * losses["plain"], rel=1e-6)
    # It takes no part in the figures of the weights.
    assert losses["tripled ess"] == losses["plain ess"] == losses["some ess"]
    assert 0 < losses["some"] < losses["plain"]  # a missing weight is 1, and N stays 8
    assert largest_difference(weights["tripled"], {n: 3 * w for n, w in weights["plain"].items()}) < 5e-6


def test_the_sampler_reads_every_pair_once_an_epoch_whatever_the_ranks() -> None:
    for size, batch_size, accumulation, world in ((22, 2, 2, 3), (5, 4, 1, 4), (7, 1, 3, 2), (12, 4, 3, 1)):
        ranks = [GlobalBatchSampler(size, batch_size, accumulation, world, r, seed=1) for r in range(world)]
        single = GlobalBatchSampler(size, batch_size * accumulation * world, 1, 1, 0, seed=1)
        batches = [list(sampler) for sampler in ranks]
        assert {len(b) for b in batches} == {len(ranks[0])}
        steps = -(-len(ranks[0]) // accumulation)
        assert steps == single.steps_per_epoch == ranks[0].steps_per_epoch
        for step, expected in enumerate(single):
            micro = range(step * accumulation, min((step + 1) * accumulation, len(ranks[0])))
            assert all(len({len(b[m]) for b in batches}) == 1 for m in micro)  # every rank has as many
            found = [i for m in micro for b in batches for i in b[m]]
            assert [i for i in found if i >= 0] == expected
        assert single.pairs_seen(steps) == size and single.pairs_seen(steps + 1) == size + min(size, single.global_batch)


def test_micro_batches_share_the_tokens_of_a_global_batch_or_have_pairs_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, size=46)
    for batch_size, accumulation, world in ((2, 4, 1), (2, 3, 2), (3, 2, 2)):
        args = (46, batch_size, accumulation, world)
        plain = [list(GlobalBatchSampler(*args, rank, seed=1)) for rank in range(world)]
        for arrange in ("balanced", "sorted"):
            samplers = [GlobalBatchSampler(*args, rank, seed=1, lengths=lengths, arrange=arrange) for rank in range(world)]
            ranks = [list(sampler) for sampler in samplers]
            assert [[len(b) for b in rank] for rank in ranks] == [[len(b) for b in rank] for rank in plain]
            spreads: tuple[list[int], list[int]] = ([], [])
            for step in range(samplers[0].steps_per_epoch):
                micro = slice(step * accumulation, (step + 1) * accumulation)
                found = [[i for i in b if i >= 0] for rank in ranks for b in rank[micro]]
                before = [[i for i in b if i >= 0] for rank in plain for b in rank[micro]]
                assert sorted(chain(*found)) == sorted(chain(*before))  # the same global batch
                full = len(list(chain(*found))) == samplers[0].global_batch
                if arrange == "sorted":
                    parts = sorted(([lengths[i] for i in b] for b in found if b), key=lambda b: (max(b), min(b)))
                    assert all(max(a) <= min(b) for a, b in pairwise(parts))
                elif full:
                    for spread, batches in zip(spreads, (found, before), strict=True):
                        spread.append(max(sum(lengths[i] for i in b) for b in batches))
            assert arrange == "sorted" or sum(spreads[0]) < sum(spreads[1])


def shared_rows(prompts: int = 7, seed: int = 0) -> list[dict[str, list[int]]]:
    """Pairs of one to four a prompt, in mixed order; some share a response, and one pair stands there twice."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt in range(prompts):
        ids = [4 + prompt, *rng.integers(3, 20, size=rng.integers(1, 9)).tolist()]
        responses = [[*rng.integers(3, 20, size=rng.integers(1, 6)).tolist(), 2] for _ in range(4)]
        for a, b in [(0, 1), (2, 1), (1, 3), (3, 0)][: rng.integers(1, 5)]:
            rows.append({"prompt_ids": ids, "chosen_ids": responses[a], "rejected_ids": responses[b]})
    rows.append(dict(rows[0]))
    rng.shuffle(rows)  # type: ignore[arg-type]
    return rows


def test_equal_prompts_and_responses_are_packed_once(reference: Any) -> None:
    from isdaa.models.packed.forward import prepare

    forward = prepare(reference)
    data = TokenisedPairs(shared_rows())
    batch = data.batch(range(len(data)))
    input_ids, layout = packed(batch)
    rows = [tuple(map(tuple, row.values())) for row in batch.rows()]
    prompts = {row[0] for row in rows}
    responses = {(row[0], response) for row in rows for response in row[1:]}
    assert len(layout.prompt_lengths) == len(prompts) == data.prompt_groups().max() + 1
    assert layout.responses == len(responses) < 2 * len(rows)
    assert layout.tokens == sum(map(len, prompts)) + sum(len(r) for _, r in responses) < batch.input_ids.numel()
    with torch.no_grad():
        together = forward(reference, input_ids, None, layout)
        alone = [forward(reference, *_split(packed(data.batch([i])))) for i in range(len(data))]
    for name in ("chosen_logps", "rejected_logps"):
        torch.testing.assert_close(getattr(together, name), torch.cat([getattr(a, name) for a in alone]))
    one = data.batch([0, ~0])  # a fill-in costs nothing
    assert packed(one)[1].tokens == data.batch([0]).input_ids.numel()
    budget = 60
    for part in split_by_tokens(data.batch(np.argsort(data.prompt_groups(), kind="stable")), budget):
        assert len(part) == 1 or packed(part)[1].tokens <= budget


def _split(found: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, None, Any]:
    return found[0], None, found[1]


def test_pairs_of_one_prompt_follow_one_another() -> None:
    groups = np.array([0, 1, 0, 2, 1, 0, 3, 3, 2, 4])
    sampler = GlobalBatchSampler(10, 2, 1, 1, 0, seed=1, lengths=np.arange(10), groups=groups)
    orders = [sampler.order(epoch) for epoch in range(200)]
    for order in orders:
        assert sorted(order) == list(range(10))
        assert (np.diff(groups[order]) != 0).sum() == 4  # five prompts in a row
    assert list(chain(*sampler)) == orders[0].tolist()
    firsts = np.bincount([groups[order[0]] for order in orders], minlength=5)
    # Each prompt comes first in a fifth of the epochs, whatever its number of pairs: 40 ± 5.7; beyond ± 4 standard
    # deviations for one of five prompts by chance once in 3 000 seeds.
    assert np.all(np.abs(firsts - 40) < 23)
    assert len({tuple(order[np.isin(order, [0, 2, 5])]) for order in orders}) == 6  # pairs of a prompt change places


def test_training_by_prompt_gives_the_same_step_for_less(reference: Any, tmp_path: Path) -> None:
    data = with_reference(shared_rows(), reference)
    weights, tokens = {}, {}
    for grouped in (False, True):
        policy = moved(reference)
        size = len(data)
        own = {"group_by_prompt": grouped}
        folder, objective = tmp_path / str(grouped), Objective(beta=0.3)
        trainer = trainer_of(policy, folder, data, objective=objective, batch_size=size, optimizer="sgd", own=own)
        tokens[grouped] = trainer.pieces_of(data.batch(trainer.sampler.order(0)), torch.device("cpu"), None)[0].layout.tokens
        trainer.train()
        weights[grouped] = weights_of(policy)
    assert largest_difference(weights[True], weights[False]) < 1e-6  # the whole epoch is one batch
    assert tokens[True] == tokens[False]
    halves = trainer_of(moved(reference), tmp_path / "halves", data, batch_size=3, own={"group_by_prompt": True})
    plain = trainer_of(moved(reference), tmp_path / "plain", data, batch_size=3)

    def cost(trainer: Any) -> int:
        batches = [data.batch(indices) for indices in trainer.sampler]
        return sum(piece.layout.tokens for batch in batches for piece in trainer.pieces_of(batch, torch.device("cpu"), None))

    assert cost(halves) < cost(plain)


def test_the_permutation_is_of_the_seed_and_the_step(reference: Any, pairs: Any, tmp_path: Path) -> None:
    trainer = trainer_of(moved(reference), tmp_path, pairs, objective=Objective(weight="shuffled"))
    raw, valid = torch.rand(8), torch.ones(8, dtype=torch.bool)
    found = []
    for step in (0, 1):
        trainer.state.global_step = step
        found.append(trainer.global_weights(raw, valid, torch.arange(8)).tolist())
        assert found[-1] == batch_weights(raw, "shuffled", None, 3, step).tolist()
    assert found[0] != found[1] and sorted(found[0]) == sorted(raw.tolist())


def test_the_trainer_reads_another_order_in_each_epoch(reference: Any, pairs: Any, tmp_path: Path) -> None:
    trainer = trainer_of(moved(reference), tmp_path, pairs, batch_size=6, epochs=3)
    read: list[int] = []
    step = trainer.training_step

    def reading(model: Any, inputs: MicroBatch, n: Any = None) -> torch.Tensor:
        read.extend(i for piece in inputs.pieces for i in piece.batch.index.tolist())
        return step(model, inputs, n)

    trainer.training_step = reading  # type: ignore[method-assign]
    trainer.train()
    epochs = [read[i : i + 22] for i in (0, 22, 44)]
    assert len(read) == 66 and all(sorted(epoch) == list(range(22)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[1] == trainer.sampler.order(1).tolist()


def test_epochs_differ_and_a_resumed_sampler_reads_on() -> None:
    sampler = GlobalBatchSampler(20, 4, 1, 1, 0, seed=1)
    first, again = list(sampler), list(sampler)
    assert first == again
    sampler.step = 5
    second = list(sampler)
    assert second != first and sorted(i for batch in second for i in batch) == list(range(20))
    assert list(GlobalBatchSampler(20, 4, 1, 1, 0, seed=2)) != first
    assert shard(np.arange(5), 4, 2) == [4, ~0] and shard(np.arange(5), 4, 3) == [~0, ~0]


def test_split_by_tokens(pairs: Any) -> None:
    batch = pairs.batch(range(10))
    for budget, at_least in ((None, 1), (60, 1), (1, 1), (None, 3), (60, 9), (10**6, 20)):
        parts = split_by_tokens(batch, budget, at_least)
        assert [r for part in parts for r in part.rows()] == batch.rows()
        assert torch.equal(torch.cat([p.reference_chosen_logps for p in parts]), batch.reference_chosen_logps)
        assert len(parts) >= min(at_least, 10)
        if budget is not None:
            assert all(len(part) == 1 or part.input_ids.numel() <= budget for part in parts)
    assert len(split_by_tokens(batch, 1)) == 10


class Ranks:
    """Stands in for accelerate's gather: the tensors of all ranks, one below the other."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self.tensors.append(tensor)
        return torch.cat(self.tensors) if len(self.tensors) == 3 else tensor.new_zeros(3 * len(tensor), 3)


def test_weights_over_ranks_follow_the_order_of_the_rows(reference: Any, pairs: Any, tmp_path: Path) -> None:
    objective = Objective(weight="shuffled", normalize="batch")
    trainer = trainer_of(moved(reference), tmp_path, pairs, objective=objective)
    samplers = [GlobalBatchSampler(22, 3, 2, 3, rank, seed=3) for rank in range(3)]
    # Two micro-batches of each rank, the second of 4 pairs in 2 + 2 + 2 places.
    per_rank = [list(s)[1:] for s in samplers]
    own = torch.rand(22).exp()
    raw = [torch.cat([own[[i if i >= 0 else ~i for i in b]] for b in batches]) for batches in per_rank]
    valid = [torch.tensor([i >= 0 for b in batches for i in b]) for batches in per_rank]
    order = sorted(i for batches in per_rank for batch in batches for i in batch if i >= 0)
    index = [torch.tensor([i if i >= 0 else ~i for i in (i for b in batches for i in b)]) for batches in per_rank]
    expected = dict(zip(order, batch_weights(own[order], "shuffled", "batch", 3, 0).tolist(), strict=True))
    ranks = Ranks()
    ranks.tensors = [torch.stack([r, v, i], 1).double() for r, v, i in zip(raw[:2], valid[:2], index[:2], strict=True)]
    fake = type("Args", (), {"world_size": 3, "process_index": 2})()
    trainer.args, trainer.accelerator = fake, ranks
    final = trainer.global_weights(raw[2], valid[2], index[2])
    for index, weight in zip([i for b in per_rank[2] for i in b], final.tolist(), strict=True):
        assert weight == (pytest.approx(expected[index]) if index >= 0 else 0)
