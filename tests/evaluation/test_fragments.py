"""Responses that the limit cut: from which share on it is said, of whom, and what to type."""

import pytest
from evaluation_helpers import settings

from isdaa.evaluation.fragments import is_fragmentary, many, warning, warnings_of


def metrics(models=(0.0,), reference=0.0, kl=0.0, scorer="gold", opponent="reference"):
    return {
        "models": [{"truncated": share, "kl": {"mean": 1.0, "truncated": kl}} for share in models],
        "reference": {"truncated": reference},
        "scorer": {"name": scorer} if scorer else None,
        "opponent": opponent,
        "settings": settings(max_new_tokens=64).model_dump(),
    }


def test_few_are_a_number_and_many_a_warning():
    assert not many(None) and not many(0.1) and many(0.11)
    assert warnings_of(metrics((0.1, 0.02), 0.05)) == []
    (line,) = warnings_of(metrics((0.42, 0.78), 0.05))
    assert line.startswith(
        "evaluation.max_new_tokens (64) cut 42 to 78 % of the checkpoints' responses and 5 % of the reference's"
    )
    assert "win rate and score are of fragments" in line and "give --evaluation.max_new_tokens 128" in line and "KL" not in line


def test_the_reference_s_own_samples_count():
    (line,) = warnings_of(metrics((0.0,), 0.5))
    assert "cut 0 % of the checkpoints' responses and 50 % of the reference's" in line
    assert is_fragmentary(metrics((0.0,), 0.5), {"truncated": 0.0})
    against_chosen = metrics((0.0,), 0.5, opponent="chosen")
    assert not is_fragmentary(against_chosen, {"truncated": 0.0}) and is_fragmentary(against_chosen, {"truncated": 0.5})


def test_samples_for_kl_are_cut_too():
    assert "KL counts tokens up to that limit only" in warnings_of(metrics((0.5,), kl=0.5))[0]
    (line,) = warnings_of(metrics((0.0,), kl=0.3))
    assert line.startswith("evaluation.max_new_tokens (64) cut 30 % of the samples for KL: KL counts")
    assert "win rate" not in warnings_of(metrics((0.5,), scorer=None))[0]


@pytest.mark.parametrize("limit, place", [(12, "label.max_new_tokens (12) cut"), (None, "label.max_new_tokens cut")])
def test_what_to_type(limit, place):
    line = warning({"its 220 responses": [0.777]}, "they are fragments", "label.max_new_tokens", limit)
    assert line.startswith(f"{place} 78 % of its 220 responses: they are fragments; give ")
    assert ("--label.max_new_tokens 24;" if limit else "a larger --label.max_new_tokens;") in line
