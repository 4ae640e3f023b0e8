"""How many pairs two sets share, from their sketches."""

from __future__ import annotations

import random

import pytest

from isdaa.data.overlap import joined, shared, sketch


def rows(start: int, stop: int, words: str = "") -> list[dict[str, str]]:
    return [{"prompt": f"p{i}", "chosen": f"{words}a{i}", "rejected": f"b{i}"} for i in range(start, stop)]


def test_small_sets_are_known_exactly() -> None:
    whole = sketch(rows(0, 60))
    assert shared(whole, sketch(rows(0, 60))) == 1.0
    assert shared(whole, sketch(rows(60, 100))) == 0.0
    assert shared(whole, sketch(rows(30, 60))) == pytest.approx(1.0)  # all of the smaller one
    assert shared(whole, sketch(rows(40, 80))) == pytest.approx(0.5)
    assert shared(whole, None) == shared(None, whole) == shared(sketch([]), whole) == 0.0


def test_order_repeats_and_which_is_chosen_do_not_count_and_other_responses_do() -> None:
    pairs = rows(0, 50)
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs]
    random.Random(0).shuffle(turned)
    assert sketch(pairs) == sketch([*turned, *turned])
    assert shared(sketch(pairs), sketch(rows(0, 50, "other "))) == 0.0
    chat = [{name: [{"role": "user", "content": value}] for name, value in row.items()} for row in pairs]
    assert shared(sketch(chat), sketch(chat)) == 1.0


@pytest.mark.parametrize(("start", "true"), [(0, 1.0), (1000, 0.5), (1800, 0.1), (2000, 0.0)])
def test_large_sets_are_known_to_a_few_points(start: int, true: float) -> None:
    """Fixed hashes: no false alarm here; a share of 0 is 0 exactly, and 128 hashes err by about 4 points (1 standard error)."""
    found = shared(sketch(rows(0, 2000)), sketch(rows(start, start + 2000)))
    assert found == pytest.approx(true, abs=0.13) and (true or not found)


def test_sketches_of_two_sets_together() -> None:
    assert joined(sketch(rows(0, 60)), sketch(rows(40, 80))) == sketch(rows(0, 80))
    assert joined(sketch(rows(0, 9)), None) == sketch(rows(0, 9))
    many, whole = joined(sketch(rows(0, 2000)), sketch(rows(1000, 3000))), sketch(rows(0, 3000))
    assert many["least"] == whole["least"] and many["pairs"] == pytest.approx(3000, rel=0.15)
