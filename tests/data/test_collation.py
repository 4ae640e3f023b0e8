"""The packed layout, worked by hand and as a property."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isdaa.data.collation import PairBatch, collate

pytestmark = pytest.mark.fast

FIRST = {"prompt_ids": [10, 11, 12], "chosen_ids": [20, 21], "rejected_ids": [30]}
SECOND = {"prompt_ids": [13], "chosen_ids": [22, 23, 24], "rejected_ids": [31, 32]}


def test_one_pair_by_hand() -> None:
    batch = collate([FIRST])
    assert batch.input_ids.tolist() == [10, 11, 12, 20, 21, 30]
    assert [part.tolist() for part in batch.parts()] == [[3], [2], [1]]
    assert len(batch) == 1
    assert batch.valid.tolist() == [True]
    assert batch.index.tolist() == [-1]
    for part in (batch.input_ids, *batch.parts(), batch.index):
        assert part.dtype == torch.int64
    assert batch.weights is None
    assert batch.reference_chosen_logps is None
    assert batch.behaviour_chosen_logps is None


def test_two_pairs_by_hand_tokens_unlike_pairs() -> None:
    batch = collate([FIRST | {"index": 7}, SECOND | {"index": 3, "valid": False}])
    assert batch.input_ids.tolist() == [10, 11, 12, 20, 21, 30, 13, 22, 23, 24, 31, 32]
    assert [part.tolist() for part in batch.parts()] == [[3, 1], [2, 3], [1, 2]]
    assert batch.index.tolist() == [7, 3]
    assert batch.valid.tolist() == [True, False]
    assert batch.valid.dtype == torch.bool


def test_order_is_kept() -> None:
    assert collate([SECOND, FIRST]).rows() == [SECOND, FIRST]


def test_columns_that_only_some_rows_have() -> None:
    batch = collate([FIRST | {"weight": 0.5, "behaviour_chosen_logps": -1.5, "behaviour_rejected_logps": -2.5}, SECOND])
    assert batch.weights is not None and batch.behaviour_chosen_logps is not None
    assert batch.weights.tolist() == [0.5, 1.0]
    assert batch.weights.dtype == torch.float32
    assert batch.behaviour_chosen_logps[0] == -1.5
    assert math.isnan(batch.behaviour_chosen_logps[1])


def test_the_reference_stands_in_for_absent_behaviour_logps() -> None:
    rows = [FIRST | {"behaviour_chosen_logps": -1.5, "behaviour_rejected_logps": -2.5}, SECOND]
    batch = collate(rows).with_reference(torch.tensor([-3.0, -4.0]), torch.tensor([-5.0, -6.0]))
    assert batch.reference_chosen_logps is not None and batch.behaviour_chosen_logps is not None
    assert batch.behaviour_rejected_logps is not None
    assert batch.reference_chosen_logps.tolist() == [-3.0, -4.0]
    assert batch.behaviour_chosen_logps.tolist() == [-1.5, -4.0]
    assert batch.behaviour_rejected_logps.tolist() == [-2.5, -6.0]
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        batch.with_reference(torch.zeros(3), torch.zeros(2))


def test_reference_logps_in_the_rows_are_used() -> None:
    batch = collate([FIRST | {"reference_chosen_logps": -3.0, "reference_rejected_logps": -5.0}])
    assert batch.reference_chosen_logps is not None and batch.reference_rejected_logps is not None
    assert (batch.reference_chosen_logps.item(), batch.reference_rejected_logps.item()) == (-3.0, -5.0)
    assert batch.behaviour_chosen_logps is None


def test_to_moves_every_tensor() -> None:
    row = FIRST | {"weight": 2.0, "reference_chosen_logps": -3.0, "reference_rejected_logps": -5.0}
    moved = collate([row]).to("meta")
    assert isinstance(moved, PairBatch)
    tensors = [value for value in vars(moved).values() if value is not None]
    assert len(tensors) == 11
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.behaviour_chosen_logps is None


@pytest.mark.parametrize("name", ["prompt_ids", "chosen_ids", "rejected_ids"])
def test_an_empty_part_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="pair 1"):
        collate([FIRST, SECOND | {name: []}])
    with pytest.raises(ValueError, match="at least one"):
        collate([])


ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)
pair = st.fixed_dictionaries({"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids})


@settings(deadline=None)
@given(st.lists(pair, min_size=1, max_size=6))
def test_slicing_the_packed_row_returns_the_pairs(rows: list[dict[str, list[int]]]) -> None:
    batch = collate(rows)
    assert batch.rows() == rows
