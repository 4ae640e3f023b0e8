"""From prompts to labelled preference pairs: sample n responses a prompt, score them, pair them, draw the label."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from isdaa.config import LabelConfig
from isdaa.data.pairs import TEMPLATE_COLUMNS

Row = dict[str, Any]


def generator_of(seed: int, key: str) -> np.random.Generator:
    """A generator that depends on a prompt's own key alone, so that labels do not depend on order or batch."""
    words = hashlib.sha256(f"isdaa-label/{seed}/{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(words[:16], "little")))


def pair_indices(rewards: Sequence[float], pairing: str, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Which of a prompt's n responses meet: n // 2 random disjoint pairs, or the best against the worst.

    Random disjoint pairs are draws from μ × μ, which the importance weight's identity needs; best against worst is not.
    """
    if pairing == "best_worst":
        order = np.argsort(np.asarray(rewards), kind="stable")
        return [(int(order[-1]), int(order[0]))]
    order = rng.permutation(len(rewards))
    return [(int(order[i]), int(order[i + 1])) for i in range(0, len(order) - 1, 2)]


def first_is_preferred(first: float, second: float, label: str, scale: float, rng: np.random.Generator) -> bool:
    """Bradley–Terry: the first wins with probability σ(scale·(first − second)); `argmax`: the larger reward wins.

    A uniform is drawn in either case, so that both labels see the same stream; equal rewards are a fair coin.
    """
    uniform = float(rng.random())
    difference = first - second
    if label == "argmax" and difference != 0:
        return difference > 0
    # The two forms keep exp() from overflowing.
    logit = scale * difference
    probability = 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))
    return uniform < probability


def label_prompt(prompt: Row, responses: Sequence[Row], settings: LabelConfig, seed: int) -> list[Row]:
    """The pairs of one prompt.

    Args:
        prompt: canonical prompt row with `id`, `prompt`, `prompt_ids` and what a scorer needs.
        responses: n rows with `text` (str or messages), `ids`, `finished`, `reward`.

    Returns:
        Canonical pair rows with text, token ids, `*_finished` and `*_reward`; identical pairs are kept here and dropped
        (and counted) where pairs are read.
    """
    rng = generator_of(seed, str(prompt["id"]))
    rewards = [float(response["reward"]) for response in responses]
    pairs = []
    for number, (i, j) in enumerate(pair_indices(rewards, settings.pairing, rng)):
        winner, loser = (i, j) if first_is_preferred(rewards[i], rewards[j], settings.label, settings.scale, rng) else (j, i)
        chosen, rejected = responses[winner], responses[loser]
        pair = {"id": f"{prompt['id']}#{number}", "prompt": prompt["prompt"]}
        pair |= {"chosen": chosen["text"], "rejected": rejected["text"], "prompt_ids": list(prompt["prompt_ids"])}
        for side, response in (("chosen", chosen), ("rejected", rejected)):
            pair[f"{side}_ids"] = list(response["ids"])
            pair[f"{side}_finished"] = bool(response["finished"])
            pair[f"{side}_reward"] = float(response["reward"])
        if settings.pairing == "best_worst":
            pair["pairing"] = settings.pairing
        pair |= {name: prompt[name] for name in ("facts", *TEMPLATE_COLUMNS) if prompt.get(name) is not None}
        pairs.append(pair)
    return pairs
