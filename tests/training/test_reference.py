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
from isdaa.models.packed.forward import LEAST_TOKENS, PASS_TOKENS, PairForward, cpu_pass_tokens, pass_tokens, prepare
from isdaa.training.trainer import reference_logps as reference_module
from isdaa.training.trainer.batches import TokenisedPairs
from isdaa.training.trainer.reference_logps import cache_key, measure, read_cache, reference_logps

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


@pytest.mark.parametrize("what", ["weights", "truncation", "data", "precision", "versions"])
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


class Killed(BaseException):
    """Stands in for SIGKILL within one process: nothing catches it."""


class Counting:
    """A prepared forward that counts its passes, and dies before the one numbered `last`."""

    def __init__(self, forward: PairForward, last: int | None = None) -> None:
        self.forward, self.last, self.calls = forward, last, 0
        self.model, self.mode = forward.model, forward.mode

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if self.calls == self.last:
            raise Killed
        self.calls += 1
        return self.forward(*arguments, **keywords)


def interrupted(forward: PairForward, pairs: TokenisedPairs, folder: Path, passes: int, **changes: Any) -> None:
    """A computation that dies after so many passes, in which every pass took long enough to be kept."""
    with pytest.raises(Killed):
        compute(lambda: Counting(forward, passes), pairs, folder, batch_tokens=60, **changes)


@pytest.fixture
def slow_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass takes as long as passes between two writes."""
    monkeypatch.setattr(reference_module, "PART_SECONDS", 0.0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_killed_computation_goes_on_where_it_was(
    precision: str, forward: PairForward, pairs: TokenisedPairs, tmp_path: Path, slow_passes: None
) -> None:
    whole = Counting(forward)
    right = compute(lambda: whole, pairs, tmp_path / "whole", batch_tokens=60, precision=precision)
    assert whole.calls > 5
    for done in (0, 2, 3):  # killed three times, each a little later
        interrupted(forward, pairs, tmp_path / "killed", done, precision=precision)
    assert len(list((tmp_path / "killed").glob("*.part-*"))) == 1
    rest = Counting(forward)
    found = compute(lambda: rest, pairs, tmp_path / "killed", batch_tokens=60, precision=precision)
    assert rest.calls == whole.calls - 5
    assert all(a.tobytes() == b.tobytes() for a, b in zip(found, right, strict=True))
    (written,) = [path for path in (tmp_path / "killed").iterdir() if not path.name.endswith(".lock")]
    assert all(
        np.array_equal(a, b) for a, b in zip(compute(refuse, pairs, written.parent, precision=precision), right, strict=True)
    )


def test_without_a_minute_between_them_nothing_is_written_but_the_end(
    forward: PairForward, pairs: TokenisedPairs, tmp_path: Path
) -> None:
    assert reference_module.PART_SECONDS * 2 < 60
    interrupted(forward, pairs, tmp_path, 4)
    assert not list(tmp_path.glob("*.part-*"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another's"])
def test_a_damaged_part_is_computed_again(
    damage: str,
    forward: PairForward,
    pairs: TokenisedPairs,
    tmp_path: Path,
    slow_passes: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    right = compute(forward, pairs, None, batch_tokens=60)
    interrupted(forward, pairs, tmp_path, 4)
    (part,) = tmp_path.glob("*.part-*")
    content = bytearray(part.read_bytes())
    if damage == "cut":
        part.write_bytes(content[:-5])
    elif damage == "flipped":
        content[-2] ^= 64
        part.write_bytes(content)
    elif damage == "empty":
        part.write_bytes(b"")
    else:
        interrupted(prepare(moved(tiny_model())), pairs, tmp_path / "other", 4, key=KEY | {"weights": "other"})
        (stranger,) = (tmp_path / "other").glob("*.part-*")
        part.write_bytes(stranger.read_bytes())
    with caplog.at_level(logging.WARNING):
        found = compute(forward, pairs, tmp_path, batch_tokens=60)
    assert "computed again" in caplog.text
    assert all(a.tobytes() == b.tobytes() for a, b in zip(found, right, strict=True))
    assert not list(tmp_path.glob("*.part-*"))


def test_other_batches_do_not_take_up_a_part(
    forward: PairForward, pairs: TokenisedPairs, tmp_path: Path, slow_passes: None
) -> None:
    interrupted(forward, pairs, tmp_path, 4)
    all_of_it = Counting(forward)
    compute(lambda: all_of_it, pairs, tmp_path, batch_tokens=10**6)
    assert all_of_it.calls == 1
    assert not list(tmp_path.glob("*.part-*"))


def test_each_of_two_processes_goes_on_with_its_own_share(
    forward: PairForward, pairs: TokenisedPairs, tmp_path: Path, slow_passes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process stands for both, one after the other; what the second one gives is put to the first one's."""
    monkeypatch.setattr(reference_module, "world_size", lambda: 2)
    shares: dict[int, np.ndarray] = {}

    def of(number: int, everyone: bool, last: int | None = None) -> Counting:
        counting = Counting(forward, last)

        def everyones(function: Any) -> list[Any]:
            found = function()
            if not isinstance(found, np.ndarray):
                return [found]  # whether the file is there
            shares[number] = found
            return list(shares.values()) if everyone else [found]

        monkeypatch.setattr(reference_module, "rank", lambda: number)
        monkeypatch.setattr(reference_module, "is_main", lambda: everyone)
        monkeypatch.setattr(reference_module, "everyones", everyones)
        result.append(compute(lambda: counting, pairs, tmp_path, batch_tokens=60))
        return counting

    result: list[Any] = []
    for number in (0, 1):
        with pytest.raises(Killed):
            of(number, False, 2)
    assert len(list(tmp_path.glob("*.part-*"))) == 2
    calls = [of(1, False).calls, of(0, True).calls]
    assert sum(calls) > 0
    monkeypatch.undo()
    monkeypatch.setattr(reference_module, "PART_SECONDS", 0.0)
    assert not list(tmp_path.glob("*.part-*"))
    right = compute(forward, pairs, None)
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(result[-1], right, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(result[-1], compute(refuse, pairs, tmp_path), strict=True))


def test_probabilities_are_measured_in_the_same_pass(forward: PairForward, pairs: TokenisedPairs) -> None:
    found = measure(forward, pairs, key=KEY, cache_dir=None)
    assert found.shape == (6, 17) and found.dtype == np.float32
    for logps, plain in zip(found, compute(forward, pairs, None), strict=False):
        assert np.array_equal(logps, plain)
    for place, which in enumerate(("chosen", "rejected")):
        for index in range(17):
            prompt, response = pairs[index]["prompt_ids"].tolist(), pairs[index][f"{which}_ids"].tolist()
            with torch.no_grad():
                table = forward.model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].softmax(-1)
            assert found[2 + place, index] == pytest.approx(float(table[range(len(response)), response].sum()), rel=1e-4)
            assert found[4 + place, index] == pytest.approx(float(table.square().sum()), rel=1e-4)


def test_pairs_of_a_larger_set_are_not_computed_again(
    forward: PairForward, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`label` measures all pairs; `align` then asks for two parts of them, in another order."""
    rows = token_rows(17)
    whole = compute(forward, TokenisedPairs(rows), tmp_path)
    order = np.random.default_rng(0).permutation(17)
    for part in (order[:12], order[12:]):
        for _ in range(2):  # out of the larger file, then out of one of its own
            found = compute(refuse, TokenisedPairs([rows[i] for i in part]), tmp_path)
            assert all(np.array_equal(values, of[part]) for values, of in zip(found, whole, strict=True))
    assert len(list(tmp_path.glob("logps-*"))) == 3
    assert not caplog.text  # what was taken out of the larger file is whole in its own


@pytest.mark.parametrize("what", ["another pair", "another model", "damaged", "older"])
def test_a_larger_set_does_only_where_it_has_the_very_pairs(
    what: str, forward: PairForward, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = token_rows(17)
    compute(forward, TokenisedPairs(rows), tmp_path)
    (path,) = tmp_path.glob("logps-*")
    wanted, key = rows[:5], KEY
    if what == "another pair":  # the same tokens, divided elsewhere
        moved_on = {"prompt_ids": [*rows[2]["prompt_ids"], rows[2]["chosen_ids"][0]], "chosen_ids": rows[2]["chosen_ids"][1:]}
        wanted = [*rows[:2], rows[2] | moved_on]
    elif what == "another model":
        key = KEY | {"weights": "other"}
    elif what == "damaged":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(path.read_bytes().replace(b'\\"format\\": 3', b'\\"format\\": 2'))
    with pytest.raises(AssertionError, match="forward pass"):
        compute(refuse, TokenisedPairs(wanted), tmp_path, key=key)
    assert ("damaged" in caplog.text) == (what == "damaged")


def test_a_pass_counts_a_shared_prompt_once(forward: PairForward, pairs: TokenisedPairs) -> None:
    rows = [{"prompt_ids": list(range(3, 13)), "chosen_ids": [3 + i, 2], "rejected_ids": [30 - i, 2]} for i in range(8)]
    counting = Counting(forward)
    compute(lambda: counting, TokenisedPairs(rows), None, batch_tokens=10 + 8 * 4)
    assert counting.calls == 1
    counting = Counting(forward)
    compute(lambda: counting, TokenisedPairs(rows), None, batch_tokens=10 + 8 * 4 - 1)
    assert counting.calls == 2


def test_a_pass_on_a_cpu_takes_a_few_seconds_whatever_the_model(forward: PairForward) -> None:
    assert pass_tokens(forward.model) == PASS_TOKENS == 16_384
    assert 800 <= cpu_pass_tokens(134_515_008) <= 1000  # SmolLM2-135M: 4 seconds of one core of 2020
    assert cpu_pass_tokens(8 * 10**9) == LEAST_TOKENS
