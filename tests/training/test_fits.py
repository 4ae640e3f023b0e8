"""What fits into a memory: the forms that do, best first, at the largest micro-batch, with what to type."""

from __future__ import annotations

from typing import Any

import pytest

from isdaa.config import Config, load_config
from isdaa.errors import UserError
from isdaa.preview.devices import Speed
from isdaa.preview.fits import EIGHT_BIT, ROOM, Fit, fits, memory_of, micro_batches
from isdaa.preview.plan import Phase, Plan

pytestmark = pytest.mark.fast


def config_of(**changes: Any) -> Config:
    given = {"model.path": "m", "data.pairs": "p", "align.batch_size": 32, "align.gradient_accumulation_steps": 2}
    return load_config(None, given | {key.replace("__", "."): value for key, value in changes.items()})


def planner(config: Config) -> list[Plan]:
    """10 GB of weights with their states, 0.5 GB a row of 640 tokens; an adapter, halved weights and 4 bits need less."""
    weights = 10e9 if not config.lora.rank else 2e9
    weights *= 0.8 if config.align.optimizer == "adamw_8bit" else 1
    weights *= {"float32": 1.0, "bfloat16": 0.5}[str(config.model.dtype)] * (0.5 if config.model.quantization else 1)
    row = 0.5e9 * config.tokenization.max_length / 640 * (0.2 if config.align.gradient_checkpointing else 1)
    made = Plan(
        "align", "h100", [Phase("training", {"all": weights + row * config.align.batch_size})], Speed(1, 1, "", False), 1, 1
    )
    made.seconds["training"] = (1.3 if config.align.gradient_checkpointing else 1.0) * (1 + 1 / config.align.batch_size)
    return [made]


def found(memory: float, on_gpu: bool = True, **changes: Any) -> list[Fit]:
    return fits(config_of(**changes), memory / ROOM, planner, on_gpu=on_gpu, cuts=lambda length: 0.25)


def test_of_each_form_the_largest_micro_batch_that_fits_and_no_checkpointing_where_it_is_not_needed() -> None:
    everything = found(80e9)
    assert [one.form for one in everything] == [
        "all weights", EIGHT_BIT, "adapter", "adapter on bfloat16 weights", "adapter on 4-bit weights",
    ]  # fmt: skip
    assert all(one.fits and "align.batch_size" not in one.options for one in everything)
    assert not any(one.options.get("align.gradient_checkpointing") for one in everything)
    whole = found(12e9)[0]
    assert whole.form == "all weights" and whole.memory == pytest.approx(12e9) and whole.options["align.batch_size"] == 4
    assert whole.options["align.gradient_accumulation_steps"] == 16  # the global batch stays 64


def test_what_does_not_fit_comes_last_and_checkpointing_is_tried() -> None:
    some = found(2.3e9)
    assert [one.fits for one in some] == [True, True, True, False, False] and some[-2].form == "all weights"
    assert some[0].form == "adapter" and some[0].options["align.gradient_checkpointing"] is True
    assert some[-2].memory == pytest.approx(10.1e9)  # the least that was found


def test_shorter_rows_where_nothing_else_fits_and_how_many_they_cut() -> None:
    short = found(0.58e9)
    assert short[0].form == "adapter on 4-bit weights" and short[0].fits and short[0].cut == 0.25
    assert short[0].options["tokenization.max_length"] == 320 and short[0].options["tokenization.max_prompt_length"] == 256
    assert not any(one.fits for one in found(0.1e9))


def test_4_bits_are_for_gpus_and_an_adapters_own_rank_stays() -> None:
    assert [one.form for one in found(80e9, on_gpu=False)] == ["all weights", "adapter", "adapter on bfloat16 weights"]
    ranks = [one.options.get("lora.rank") for one in found(80e9, lora__rank=64)]
    assert ranks == [0, 0, None, None, None]  # None: as it is configured


@pytest.mark.parametrize(("batch", "accumulated"), [(100, 1), (7, 1), (30, 1), (32, 2), (12, 5), (1, 4)])
def test_the_global_batch_stays_whatever_its_size(batch: int, accumulated: int) -> None:
    config = config_of(align__batch_size=batch, align__gradient_accumulation_steps=accumulated)
    for changes in micro_batches(config, ["align"]):
        one = config_of(align__batch_size=batch, align__gradient_accumulation_steps=accumulated, **changes).align
        assert one.batch_size * one.gradient_accumulation_steps == batch * accumulated and one.batch_size <= batch


def test_a_tenth_of_the_memory_is_left_free() -> None:
    (whole, *_) = fits(config_of(), 26e9, planner, on_gpu=True, cuts=lambda length: 0.0)
    assert whole.form == "all weights" and whole.memory <= 0.9 * 26e9 and whole.options["align.batch_size"] == 16


def test_a_run_that_goes_on_stays_what_it_was() -> None:
    for rank, forms in ((0, {"all weights", EIGHT_BIT}), (8, {"adapter", "adapter on bfloat16 weights"})):
        config = config_of(lora__rank=rank).model_copy(update={"continue_from": "old"})
        made = fits(config, 80e9, planner, on_gpu=True, cuts=lambda length: 0.0)
        assert {one.form for one in made} == forms
        assert not any("lora.rank" in one.options for one in made)


@pytest.mark.parametrize(
    ("text", "memory"), [("8GB", 8e9), ("8 gib", 8 * 2**30), ("500MB", 5e8), ("rtx4090", 24e9), ("0.5tb", 5e11)]
)
def test_amounts_and_names(text: str, memory: float) -> None:
    assert memory_of(text)[0] == memory


@pytest.mark.parametrize("text", ["8", "0GB", "big", "rtx409", "-1GB", "8 GBs"])
def test_what_is_no_amount_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"--memory .*: give an amount such as 8GB, or a GPU"):
        memory_of(text)
