"""Reference logps: right, computed once, and never taken from a file that does not belong to them."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_helpers import moved, tiny_model, token_rows

from isdaa.errors import UserError
from isdaa.models.forward import PairForward, prepare
from isdaa.training.batches import TokenisedPairs
from isdaa.training.reference import cache_key, read_cache, reference_logps

KEY = {"weights": "abc", "template": "t", "truncation": "keep_end"}


@pytest.fixture(scope="module")
def forward() -> PairForward:
    return prepare(tiny_model())


@pytest.fixture(scope="module")
def pairs() -> TokenisedPairs:
    return TokenisedPairs(token_rows(17))


def refuse() -> PairForward:
    raise AssertionError("a forward pass was made")


def compute(forward: Any, pairs: Any, folder: Path | None, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    return reference_logps(forward, pairs, **({"key": KEY, "cache_dir": folder} | changes))


def test_they_are_the_models_own(forward: PairForward, pairs: TokenisedPairs) -> None:
    for budget in (1, 50, 10**6):  # one pair a pass, several, all
        found = compute(forward, pairs, None, batch_tokens=budget)
        for values, which in zip(found, ("chosen", "rejected"), strict=True):
            assert values.dtype == np.float32 and values.shape == (17,)
            for index in range(17):
                prompt, response = pairs[index]["prompt_ids"].tolist(), pairs[index][f"{which}_ids"].tolist()
                with torch.no_grad():
                    logits = forward.model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
                expected = sum(float(logits[len(prompt) - 1 + t, token]) for t, token in enumerate(response))
                assert values[index] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_second_run_makes_no_forward_pass(forward: PairForward, pairs: TokenisedPairs, tmp_path: Path) -> None:
    calls = []

    def load() -> PairForward:
        calls.append(1)
        return forward

    first = compute(load, pairs, tmp_path)
    for values, again in zip(first, compute(refuse, pairs, tmp_path), strict=True):
        assert np.array_equal(values, again)
    assert len(calls) == 1 and len(list(tmp_path.glob("logps-*"))) == 1
    # Without a cache there is nothing to read: the test above can fail.
    with pytest.raises(AssertionError, match="forward pass"):
        compute(refuse, pairs, None)


@pytest.mark.parametrize("what", ["weights", "truncation", "data", "order", "precision", "versions"])
def test_everything_they_depend_on_is_in_the_key(
    what: str, forward: PairForward, pairs: TokenisedPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute(forward, pairs, tmp_path)
    changes: dict[str, Any] = {}
    rows = token_rows(17)
    if what in ("weights", "truncation"):
        changes["key"] = KEY | {what: "other"}
    elif what == "data":
        rows[3]["chosen_ids"] = [*rows[3]["chosen_ids"][:-1], 9]
    elif what == "order":
        rows = rows[::-1]
    elif what == "precision":
        changes["precision"] = "bfloat16"
    else:
        monkeypatch.setattr(torch, "__version__", "9.9")
    with pytest.raises(AssertionError, match="forward pass"):
        compute(refuse, TokenisedPairs(rows), tmp_path, **changes)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "foreign", "older key"])
def test_a_damaged_or_foreign_file_is_noticed_and_replaced(
    damage: str, forward: PairForward, pairs: TokenisedPairs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    right = compute(forward, pairs, tmp_path)
    (path,) = tmp_path.glob("logps-*")
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-5])
    elif damage == "flipped":
        content[-2] ^= 64
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("{}")
    else:
        other = TokenisedPairs(token_rows(17, seed=1)) if damage == "foreign" else pairs
        key = KEY if damage == "foreign" else KEY | {"weights": "older"}
        compute(prepare(moved(tiny_model())), other, tmp_path / "elsewhere", key=key)
        (stranger,) = (tmp_path / "elsewhere").glob("logps-*")
        path.write_bytes(stranger.read_bytes())
    with caplog.at_level(logging.WARNING):
        again = compute(forward, pairs, tmp_path)
    assert "computed again" in caplog.text and path.name in caplog.text
    assert all(np.array_equal(a, b) for a, b in zip(again, right, strict=True))
    caplog.clear()
    compute(refuse, pairs, tmp_path)
    assert not caplog.text


def test_a_file_of_another_number_of_pairs_is_not_read(forward: PairForward, pairs: TokenisedPairs, tmp_path: Path) -> None:
    compute(forward, pairs, tmp_path)
    (path,) = tmp_path.glob("logps-*")
    key = cache_key(pairs, KEY, "float32")
    assert read_cache(path, key, 17) is not None
    assert read_cache(path, key, 16) is None
    assert read_cache(path, key | {"weights": "other"}, 17) is None
    assert read_cache(tmp_path / "absent", key, 17) is None


def test_logps_that_are_no_numbers_are_an_error_and_are_not_kept(pairs: TokenisedPairs, tmp_path: Path) -> None:
    model = tiny_model()
    broken = prepare(model)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="17 pairs"):
        compute(broken, pairs, tmp_path)
    assert list(tmp_path.glob("logps-*")) == []


def test_the_model_keeps_its_mode(pairs: TokenisedPairs) -> None:
    model = tiny_model()
    forward = prepare(model)
    for training in (True, False):
        model.train(training)
        compute(forward, pairs, None)
        assert model.training is training


def test_two_runs_that_want_the_same_compute_it_once(forward: PairForward, pairs: TokenisedPairs, tmp_path: Path) -> None:
    """The second waits for the first and reads what it wrote; threads stand for the processes."""
    calls: list[int] = []

    def slow() -> PairForward:
        calls.append(1)
        time.sleep(0.3)
        return forward

    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(compute, slow, pairs, tmp_path) for _ in range(2))
        for one, other in zip(first.result(), second.result(), strict=True):
            assert np.array_equal(one, other)
    assert len(calls) == 1
