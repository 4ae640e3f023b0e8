"""What sections must agree on is asked of a run, and of nothing that reads a section alone; every answer says what to type."""

from __future__ import annotations

from typing import Any

import pytest
from chains import refused

from isdaa.config import Config, parsed, validate
from isdaa.errors import UserError

RUN = {"model": {"path": "m"}, "data": {"pairs": "p.jsonl"}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"data": {"pairs": "p"}}, "no model: give model.path (a folder or Hub name) or model.random (a config)"),
        (
            {"model": {"path": "m"}},
            "data.pairs: the align stage needs preference pairs: a file, a folder or a data set of the Hub",
        ),
        (
            RUN | {"model": {"path": "m", "quantization": "nf4"}},
            "model.quantization: weights of 4 bits cannot be trained; set lora.rank, for example --lora.rank 16",
        ),
        (
            RUN | {"model": {"path": "m", "revision": "a"}, "reference": {"path": "m", "revision": "b"}},
            "reference.revision and model.revision differ, and one name is read at one revision; leave reference.revision out, "
            "or download that revision and give its folder as reference.path",
        ),
        (
            RUN | {"continue_optimizer": True},
            "continue_optimizer needs continue_from: the run, or its checkpoint, whose optimiser goes on",
        ),
        (RUN | {"stages": ["sft"]}, "data.sft: the sft stage needs examples: a file, a folder or a data set of the Hub"),
        (RUN | {"stages": ["label"]}, "the label stage needs data.prompts and label.scorer"),
        (RUN | {"stages": ["label"], "label": {"scorer": "gold"}}, "the label stage needs data.prompts"),
        (
            {"model": {"path": "m"}, "data": {"prompts": "p"}, "label": {"scorer": "s"}, "stages": ["reward", "label", "align"]},
            "data.pairs: the reward stage needs preference pairs: a file, a folder or a data set of the Hub; or put label first, "
            "which makes them",
        ),
        (
            RUN | {"guard": {"steps": 5, "keep": "best"}},
            "guard.keep and guard.stop need win rates, and there is no scorer: name one with guard.scorer or evaluation.scorer, "
            "or add the reward stage",
        ),
        (
            RUN | {"guard": {"keep": "best", "scorer": "s"}},
            "guard.keep and guard.stop need guard.steps, for example --guard.steps 100",
        ),
        (
            RUN | {"guard": {"stop": "over-optimised", "scorer": "s"}},
            "guard.keep and guard.stop need guard.steps, for example --guard.steps 100",
        ),
        (
            RUN | {"guard": {"steps": 5}, "data": {"pairs": "p", "eval_fraction": 0}},
            "guard.steps: nothing is held out to measure on; set data.evaluation, data.eval_pairs or data.eval_fraction",
        ),
    ],
)
def test_what_a_run_lacks_is_said_and_its_sections_can_be_read(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(data, "run.yaml")
    assert str(caught.value) == f"run.yaml: {message}"
    assert parsed(data, "run.yaml") == Config.model_validate(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"model": {"path": "m", "random": {"model_type": "llama"}}}, "model.path and model.random: give one of them, not both"),
        (
            {"model": {"random": {"model_type": "llama"}}},
            "model.tokenizer: a random model has none of its own; name one, for example world:small",
        ),
        (
            {"model": {"random": {"model_type": "llama"}, "quantization": "nf4"}},
            "model.quantization: random weights gain nothing by 4 bits; leave it out, or give model.path",
        ),
        (
            {"align": {"compile_layers": True, "gradient_checkpointing": True}},
            "align.compile_layers and align.gradient_checkpointing: PyTorch does not compile layers that are computed again; set "
            "one of them to false",
        ),
        (
            {"tokenization": {"max_length": 100}},
            "tokenization.max_prompt_length (512) must be below tokenization.max_length (100), for example "
            "--tokenization.max_prompt_length 80",
        ),
        (
            {"label": {"pairing": "best_worst", "label": "sample"}},
            "label.label: sample may draw the worse response as chosen, and label.pairing: best_worst means the best; leave "
            "label.label out, or set label.pairing: random",
        ),
        (
            {"data": {"pairs": "p.jsonl", "subset": "en"}},
            "data.subset: no source is a data set of the Hub (owner/name) or a folder with a folder 'en' in it; leave it out",
        ),
        ({"stages": ["sft", "sft"]}, "stages: name each stage once"),
        (
            {"stages": ["align", "sft"]},
            "stages: sft comes first and align last: each stage starts from what those before it made",
        ),
    ],
)
def test_a_section_checks_itself_without_the_others(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(data, "run.yaml")
    assert str(caught.value) == f"run.yaml: {message}"


def test_a_guard_of_a_run_that_does_not_align_is_no_matter() -> None:
    assert validate(RUN | {"stages": ["reward"], "guard": {"stop": "over-optimised"}}, "run.yaml").guard.steps is None


def test_commands_that_read_a_section_need_neither_model_nor_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed({}).tokenization.max_length == 640
    logps = ["logps", "--model_path", "nowhere", "--data", "none.jsonl", "--output", "out.jsonl"]
    refused(capsys, [*logps, "--tokenization.max_length", "1"], "--tokenization.max_length: expected a whole number ≥ 2, got 1")
    refused(capsys, logps, "nowhere")
    evaluate = ["evaluate", "--model_path", "nowhere/at/all"]
    refused(capsys, [*evaluate, "--evaluation.prompts", "8"], "nowhere/at/all: no such")
