"""A run that would teach nothing is refused before its first step, and every weighted run says where μ comes from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from isdaa.errors import UserError
from isdaa.objectives.presets import resolve
from isdaa.training.batches import TokenisedPairs
from isdaa.training.stall import SAMPLE, starting_weights


def pairs(count: int, mu: Any = None) -> TokenisedPairs:
    """Pairs whose responses have logp -10 under the reference; mu(i): (chosen, rejected) under the behaviour policy, or None."""
    rows = []
    for i in range(count):
        row = {"prompt_ids": [1, i % 7], "chosen_ids": [2, 3], "rejected_ids": [4, 5]}
        row |= {"reference_chosen_logps": -10.0, "reference_rejected_logps": -10.0}
        own = mu(i) if mu is not None else None
        both = own if own is not None else (None, None)
        rows.append(row | dict(zip(("behaviour_chosen_logps", "behaviour_rejected_logps"), both, strict=True)))
    return TokenisedPairs(rows)


def told(
    count: int = 64, mu: Any = None, *, model: str | None = None, policy: Any = None, allow: bool = False, **changes: Any
) -> str:
    found = starting_weights(resolve("is_dpo", **changes), pairs(count, mu), policy, model, allow)
    return "\n".join(found)


def test_where_mu_comes_from_is_said_with_mean_weight_and_effective_sample_size() -> None:
    assert told() == (
        "μ is assumed to be π_ref, since the rows carry no behaviour logps; before the first step 64 pairs have a mean weight of "
        "1 and ESS/N 1"
    )
    assert told(mu=lambda i: (-10.0, -10.0)).startswith("μ comes from the rows' own behaviour logps; before")
    assert "is assumed to be π_ref in 16 rows that have none" in told(mu=lambda i: (-10.0, -10.0) if i % 4 else None)
    assert told(mu=lambda i: (-10.0, -9.0), model="writer").startswith("μ is writer (behaviour.model_path); before")
    assert f"mean weight of {math.exp(-1):.3g}" in told(mu=lambda i: (-10.0, -9.0))
    for method in ("dpo", "wpo"):
        assert starting_weights(resolve(method), pairs(8), None, None, False) == []


def test_weights_that_let_nobody_teach_are_refused_with_what_helps() -> None:
    distant = lambda i: (-1.0, -2.0)  # noqa: E731 - the policy finds the pair e^-17 as likely
    with pytest.raises(UserError, match=r"mean weight of 4.14e-08 and ESS/N 1: hardly any pair .*mean below 0.001") as caught:
        told(mu=distant)
    for words in (
        "isdaa logps",
        "behaviour.model_path",
        "label stage",
        "objective.method: dpo",
        "normalize: batch",
        "allow_stall",
    ):
        assert words in str(caught.value)
    assert told(mu=distant, allow=True).startswith("warning: ") and "allow_stall trains nevertheless" in told(
        mu=distant, allow=True
    )
    # Divided by their mean they are 1: nothing is lost.
    assert "mean weight" in told(mu=distant, normalize="batch")


def test_one_pair_among_many_is_refused_and_normalising_is_no_help() -> None:
    def one(i: int) -> tuple[float, float]:
        return (-10.0, -10.0) if i == 0 else (-5.0, -5.0)

    for changes in ({}, {"normalize": "batch"}, {"weight": "shuffled"}):
        with pytest.raises(UserError, match=r"ESS/N 0.01\d*: .*ESS/N below 0.02") as caught:
            told(count=100, mu=one, **changes)
        assert "normalize: batch" not in str(caught.value)
    assert "mean weight of 0.01" in told(count=100, mu=one, weight="mean")  # each pair gets it


def test_limits_are_those_of_the_method() -> None:
    def shift(weight: float) -> Any:
        return lambda i: (-10.0 - math.log(weight), -10.0)

    assert "0.0011" in told(mu=shift(0.0011))
    with pytest.raises(UserError, match=r"mean below 0\.001"):
        told(mu=shift(0.0009))


def test_a_policy_beside_its_reference_is_measured_on_a_sample_spread_over_all_pairs() -> None:
    seen = []

    def policy(some: TokenisedPairs) -> np.ndarray:
        seen.append(some)
        return np.full((6, len(some)), -10.5)

    line = told(count=2000, policy=policy)
    assert f"{SAMPLE} of 2,000 pairs have a mean weight of {math.exp(-1):.3g}" in line
    assert len(seen[0]) == SAMPLE and {seen[0][i]["prompt_ids"][1] for i in range(SAMPLE)} == set(range(7))
    assert "30 pairs" in told(count=30, policy=policy)
