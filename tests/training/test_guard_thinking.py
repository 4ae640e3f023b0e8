"""The guard's scorer and its length see the answer alone."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from isdaa.evaluation.checkpoints.sample_and_kl import length_of_answer
from isdaa.training.guard.measurement import Looks


@pytest.mark.parametrize(("keep", "expected"), [(False, ["SO", "so", ""]), (True, ["<think>hm</think>SO", "so", "hm"])])
def test_the_scorer_gets_the_answer(keep: bool, expected: list[str]) -> None:
    rows = [{"prompt_id": "1", "prompt": "?"}, {"prompt_id": "2", "prompt": "?", "opened": "<think>\n"}]
    looks = SimpleNamespace(
        prompts=SimpleNamespace(rows=rows), config=SimpleNamespace(evaluation=SimpleNamespace(keep_thinking=keep))
    )
    texts = [("1", "<think>hm</think>SO"), ("1", "so"), ("2", "hm")]
    drawn = [{"prompt_id": name, "text": text, "finished": True} for name, text in texts]
    found = Looks.scorer_rows(cast(Any, looks), drawn)
    assert [row["response"] for row in found] == expected and [row["id"] for row in found] == ["1", "1", "2"]


def test_the_length_is_the_answers() -> None:
    def words(text: str, **options: Any) -> dict[str, list[str]]:
        return {"input_ids": text.split()}

    assert length_of_answer({"text": "<think>a b c</think>d e"}, {}, words) == {"answer_tokens": 2}
    assert length_of_answer({"text": "a b c"}, {"opened": "<think>"}, words) == {"answer_tokens": 0}
    assert length_of_answer({"text": "a b c"}, {}, words) == {}
