"""A run that would teach nothing is refused before its first step, and every weighted run says where μ comes from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from isdaa.errors import UserError
from isdaa.objectives.presets import resolve
from isdaa.training.stages.starting_weights import SAMPLE, starting_weights
from isdaa.training.trainer.batches import TokenisedPairs, own_logps

pytestmark = pytest.mark.fast


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
    given = pairs(count, mu)
    found = starting_weights(resolve("is_dpo", **changes), given, policy, own_logps(given), model, allow)
    return "\n".join(found)


def test_where_mu_comes_from_is_said_with_mean_weight_and_effective_sample_size() -> None:
    assert told() == (
        "μ is assumed to be π_ref, since the rows have no behaviour logps; before the first step 64 pairs have a mean weight of "
        "1 and ESS/N 1"
    )
    assert told(mu=lambda i: (-10.0, -10.0)).startswith("μ comes from the rows' own behaviour logps; before")
    mixed = told(mu=lambda i: (-10.0, -10.0) if i % 4 else None)
    assert mixed.startswith("warning: μ") and "π_ref in 16 rows without any, so the weights have two meanings; before" in mixed
    assert told(mu=lambda i: (-10.0, -9.0), model="writer").startswith(
        "μ comes from the rows' own behaviour logps; writer (behaviour.model_path) is not used; before"
    )
    filled = pairs(64, lambda i: (-10.0, -9.0))
    for own, words in ((np.zeros(64, bool), "; before"), (np.arange(64) < 16, " in 48 rows, and the other 16 have")):
        (line,) = starting_weights(resolve("is_dpo"), filled, None, own, "writer", False)
        assert line.startswith(f"μ is writer (behaviour.model_path){words}")
    assert f"mean weight of {math.exp(-1):.3g}" in told(mu=lambda i: (-10.0, -9.0))
    for method in ("dpo", "wpo"):
        assert starting_weights(resolve(method), pairs(8), None, own_logps(pairs(8)), None, False) == []


def test_weights_that_let_nobody_teach_are_refused_with_what_helps() -> None:
    distant = lambda i: (-1.0, -2.0)  # noqa: E731 - the policy finds the pair e^-17 as likely
    with pytest.raises(UserError, match=r"mean weight of 4.14e-08 and ESS/N 1: almost nothing .*mean below 0.001") as caught:
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
    assert told(mu=distant, allow=True).startswith("warning: ") and "training anyway (objective.allow_stall)" in told(
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


def test_weights_that_vanish_in_training_s_precision_are_refused_however_they_are_normalised() -> None:
    for normalize in (None, "batch"):
        with pytest.raises(UserError, match="ESS/N 0: almost nothing") as caught:
            told(mu=lambda i: (-1.0, -1.0 + 130.0), normalize=normalize)
        assert "normalize: batch" not in str(caught.value)


@pytest.mark.parametrize(("count", "teach"), [(48, 1), (100, 1), (24, 1)])
def test_one_pair_of_few_does_not_teach_for_all(count: int, teach: int) -> None:
    with pytest.raises(UserError, match="ESS/N below") as caught:
        told(count=count, mu=lambda i: (-10.0, -10.0) if i < teach else (-1.0, -1.0))
    assert "normalize: batch" not in str(caught.value)


def test_normalising_is_advised_only_where_the_weights_are_even() -> None:
    def uneven(i: int) -> tuple[float, float]:  # 3 of 100 weigh e^-8, the rest next to nothing
        return (-2.0, -10.0) if i < 3 else (10.0, -2.0)

    with pytest.raises(UserError, match="mean below") as caught:
        told(count=100, mu=uneven)
    assert "normalize: batch" not in str(caught.value)


def test_weights_that_all_lie_at_the_clip_are_a_warning() -> None:
    assert "warning" not in told(mu=lambda i: (-10.0, -10.5)) and "100% of them at the clip" not in told(
        mu=lambda i: (-10.0, -10.5)
    )
    line = told(mu=lambda i: (-1000.0, -900.0))
    assert line.startswith("warning: ") and "100% of them are at the clip (median log w 1.88e+03)" in line
    assert "50% of them at the clip" in told(mu=lambda i: (-1000.0, -900.0) if i % 2 else (-10.0, -10.0))
