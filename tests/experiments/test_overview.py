"""How long a sweep will take, by what its tasks have taken."""

import pytest

from isdaa.experiments.overview import Overview

WORLD = ("world", True, False)
RUNS = [(f"run {i}", False, False) for i in range(3)]


def test_runs_wait_for_their_world_and_for_places() -> None:
    with Overview([WORLD, *RUNS], 2) as seen:
        assert seen.left() is None
        seen.running = [("world", 40.0, {})]
        seen.expected = {True: 100.0, False: 10.0}
        assert seen.left() == pytest.approx(60 + 2 * 10)  # one run after the other two
        seen.ended("world", {"done": True}, 100.0)
        seen.running = [("run 0", 4.0, {}), ("run 1", 25.0, {})]  # the second takes longer than thought
        assert seen.left() == pytest.approx(2.5 + 10)
        seen.ended("run 1", {"done": True}, 30.0)
        seen.running = [("run 0", 10.0, {}), ("run 2", 0.0, {})]
        assert seen.left() == pytest.approx(30)  # of what was seen, not of what was expected


def test_what_was_expected_is_given_up_for_what_was_seen() -> None:
    with Overview([WORLD, *RUNS[:1]], 2, (100.0, 10.0)) as seen:
        assert seen.left() == pytest.approx(110)


def test_a_world_says_nothing_of_runs() -> None:
    """A sweep said "about 16 minutes left", the time of its world, and then "about 0:00" for a quarter of an hour."""
    with Overview([WORLD, *RUNS[:1]], 2) as seen:
        seen.ended("world", {"done": True}, 50.0)
        assert seen.left() is None
        assert "time left not known yet" in seen.head().plain
