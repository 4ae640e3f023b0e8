"""How many pairs two sets share, from their sketches."""

from __future__ import annotations

import random

import pytest

from isdaa.data.overlap import joined, shared, sketch

pytestmark = pytest.mark.fast


def rows(start: int, stop: int, words: str = "") -> list[dict[str, str]]:
    return [{"prompt": f"p{i}", "chosen": f"{words}a{i}", "rejected": f"b{i}"} for i in range(start, stop)]


def test_small_sets_are_known_exactly() -> None:
    whole = sketch(rows(0, 60))
    assert shared(whole, sketch(rows(0, 60))) == (1.0, 0.0)
    assert shared(whole, sketch(rows(60, 100))) == (0.0, 0.0)
    assert shared(whole, sketch(rows(30, 60))) == pytest.approx((1.0, 0.0))  # all of the smaller one
    assert shared(whole, sketch(rows(40, 80))) == pytest.approx((0.5, 0.0))
    assert shared(whole, None) == shared(None, whole) == shared(sketch([]), whole) == (0.0, 0.0)
    assert shared({"pairs": 3, "least": "0" * 36}, whole) == (0.0, 0.0)  # of an earlier version


def test_order_repeats_and_which_is_chosen_do_not_count_and_other_responses_do() -> None:
    pairs = rows(0, 50)
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs]
    random.Random(0).shuffle(turned)
    assert sketch(pairs) == sketch([*turned, *turned])
    assert shared(sketch(pairs), sketch([{**row, "prompt": "x" + row["prompt"]} for row in pairs]))[0] == 0.0
    assert shared(sketch(pairs), sketch(rows(0, 50, "other ")))[0] == pytest.approx(0.5)  # of the responses


def test_the_same_words_are_the_same_in_every_form() -> None:
    pairs = sketch(rows(0, 50))
    for form in (
        lambda value: [{"role": "user", "content": value}],
        lambda value: [{"role": "user", "content": [{"type": "text", "text": value}]}],
        lambda value: f" {value}\n",
    ):
        other = sketch([{name: form(value) for name, value in row.items()} for row in rows(0, 50)])
        assert shared(pairs, other) == (1.0, 0.0)


@pytest.mark.parametrize(("start", "true"), [(0, 1.0), (1000, 0.5), (1800, 0.1), (2000, 0.0)])
def test_large_sets_are_known_to_a_few_points(start: int, true: float) -> None:
    """Fixed hashes: no false alarm here; a share of 0 is 0 exactly, the rest lies within three standard errors."""
    found, error = shared(sketch(rows(0, 2000)), sketch(rows(start, start + 2000)))
    assert found == pytest.approx(true, abs=3 * error + 1e-9) and error < 0.05 and (true or not found)


def test_a_small_set_in_a_large_one_is_seen_and_a_few_common_pairs_are_not_called_many() -> None:
    """20 sets of 300 pairs among 30,000, with all or 3 % in common: at least 18 are seen, and at most one is called 10 %."""
    large = sketch(rows(0, 30_000))
    seen = [shared(large, sketch(rows(300 * i, 300 * i + 300))) for i in range(20)]
    few = [shared(large, sketch(rows(300 * i, 300 * i + 9) + rows(40_000 + 300 * i, 40_291 + 300 * i))) for i in range(20)]
    assert sum(share - error > 0.1 for share, error in seen) >= 18
    assert sum(share - error > 0.1 for share, error in few) <= 1


def test_sketches_of_two_sets_together() -> None:
    assert joined(sketch(rows(0, 60)), sketch(rows(40, 80))) == sketch(rows(0, 80))
    assert joined(sketch(rows(0, 9)), None) == sketch(rows(0, 9))
    many, whole = joined(sketch(rows(0, 2000)), sketch(rows(1000, 3000))), sketch(rows(0, 3000))
    assert many["least"] == whole["least"] and many["responses"] == pytest.approx(6000, rel=0.15)
