"""The micro-batches of a run before it begins: what its plan rehearses.

Legend: N rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from isdaa.config import Config, OptimisationConfig
from isdaa.models.attention.layout import Layout
from isdaa.models.packed.forward import PASS_TOKENS
from isdaa.models.packed.token_batches import by_tokens
from isdaa.preview.fake_step import Rows, layout_of
from isdaa.preview.rows_seen import Examined
from isdaa.training.trainer.batches import GlobalBatchSampler


@dataclass(frozen=True)
class Batches:
    """Micro-batches of an epoch on one device. tokens: of the epoch on all of them; plain: were nothing shared; pieces: whether
    some go through the model in several."""

    heaviest: Layout | Rows
    typical: Layout | Rows
    reference: Layout | Rows
    tokens: int
    plain: int | None
    steps: int
    pieces: bool = False


def batches_of(
    examined: Examined,
    config: Config,
    settings: OptimisationConfig,
    processes: int,
    pass_tokens: int = PASS_TOKENS,
    piece_tokens: int | None = None,
) -> Batches:
    """The batches that training will see in its first epoch (of SFT, some that are as likely).

    pass_tokens: of a pass without gradients. piece_tokens: of one with, where the configuration names none.
    """
    size = len(examined.lengths)
    steps = -(-size // (settings.batch_size * settings.gradient_accumulation_steps * processes))
    if examined.stage != "align":
        return _padded(examined, config, settings, steps)
    groups = examined.groups
    assert groups is not None
    sampler = GlobalBatchSampler(
        size,
        settings.batch_size,
        settings.gradient_accumulation_steps,
        processes,
        0,
        config.seed if settings.seed is None else settings.seed,
        lengths=examined.lengths.sum(1),
        groups=groups if config.align.group_by_prompt else None,
    )
    micro = [[i for i in batch if i >= 0] for batch in sampler]
    budget = config.align.batch_tokens or piece_tokens
    pieces = micro if budget is None else [piece for batch in micro for piece in _pieces(examined, batch, budget)]
    tokens = np.array([_tokens(examined, piece) for piece in pieces])
    ordinary = [i for i, piece in enumerate(pieces) if len(piece) >= np.median([len(p) for p in pieces])]
    typical = min(ordinary, key=lambda i: abs(float(tokens[i]) - float(tokens[ordinary].mean())))
    longest = np.lexsort((groups, -_longest_of_group(examined)[groups]))
    plain = int((2 * examined.lengths[:, 0] + examined.lengths[:, 1:].sum(1)).sum())
    return Batches(
        heaviest=_layout(examined, pieces[int(tokens.argmax())]),
        typical=_layout(examined, pieces[typical]),
        reference=_layout(examined, next(_pieces(examined, longest.tolist(), pass_tokens))),
        tokens=int(tokens.sum()) * processes,
        plain=plain,
        steps=steps,
        pieces=len(pieces) > len(micro),
    )


def _longest_of_group(examined: Examined) -> np.ndarray:
    assert examined.groups is not None
    longest = np.zeros(int(examined.groups.max()) + 1, dtype=np.int64)
    np.maximum.at(longest, examined.groups, examined.lengths.sum(1))
    return longest


def _tokens(examined: Examined, pairs: Sequence[int]) -> int:
    """Of a packed row, every prompt once."""
    assert examined.groups is not None
    _, first = np.unique(examined.groups[pairs], return_index=True)
    return int(examined.lengths[pairs, 1:].sum() + examined.lengths[np.asarray(pairs)[first], 0].sum())


def _pieces(examined: Examined, pairs: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Consecutive pieces of at most so many tokens, as `packing.split_by_tokens` and `reference_logps` cut them: the prompt of
    the pair before costs nothing."""
    assert examined.groups is not None
    lengths, groups = examined.lengths[pairs], examined.groups[pairs]
    shared = np.append(False, np.diff(groups) == 0) * lengths[:, 0]
    for piece in by_tokens(lengths.sum(1).tolist(), budget, shared.tolist()):
        yield [pairs[place] for place in piece]


def _layout(examined: Examined, pairs: Sequence[int]) -> Layout:
    assert examined.groups is not None
    prompts: dict[int, tuple[int, list[tuple[int, int]]]] = {}
    for i in pairs:
        prompt, chosen, rejected = (int(n) for n in examined.lengths[i])
        prompts.setdefault(int(examined.groups[i]), (prompt, []))[1].append((chosen, rejected))
    return layout_of(list(prompts.values()))


def _padded(examined: Examined, config: Config, settings: OptimisationConfig, steps: int) -> Batches:
    """Rows in a random order, padded to the longest of a micro-batch; a reward model reads a pair as two rows."""
    pair = examined.stage == "reward"
    lengths = examined.lengths
    rows = np.concatenate([lengths[:, :1] + lengths[:, 1:2], lengths[:, :1] + lengths[:, 2:]], 1) if pair else lengths
    order = np.random.default_rng(config.seed).permutation(len(rows))
    size = min(settings.batch_size, len(rows))
    longest = np.array([rows[order[i : i + size]].max() for i in range(0, len(rows) - size + 1, size)])
    per = size * (2 if pair else 1)

    def batch(length: float) -> Rows:
        return Rows(per, round(length), 1 if pair else round(length * (examined.learnt or 1.0)))

    heaviest, mean = batch(float(longest.max())), batch(float(longest.mean()))
    count = len(rows) / size
    return Batches(heaviest, mean, mean, round(count * per * float(longest.mean())), None, steps)
