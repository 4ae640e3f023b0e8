"""Checkpoints of other programs: their steps, their order, and what a folder says of its own origin."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from isdaa.errors import UserError
from isdaa.evaluation.checkpoints.hints import base_hint, data_hint
from isdaa.evaluation.checkpoints.steps import Order, ordered
from isdaa.evaluation.checkpoints.what_to_evaluate import EvaluationRequest, expand, requests


def model(folder: Path, weights: str = "", state: dict[str, Any] | None = None) -> str:
    """A folder that looks like a model; state: its trainer_state.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(weights or folder.name)
    if state is not None:
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"grad_norm": float("nan")}]} | state))
    return str(folder)


def output_folder(folder: Path, steps: Sequence[int], states: bool = True) -> Path:
    """A trainer's: checkpoints, each with its state, and no final model."""
    for step in steps:
        state = {"global_step": step, "max_steps": max(steps)} if states else None
        model(folder / f"checkpoint-{step}", f"weights {step}", state)
    return folder


def names(order: Order) -> list[str]:
    return [Path(path).name for path in order.paths]


def order_of(folder: Path, *members: str, given: bool = False, as_one_run: bool = True) -> Order:
    paths = [str(folder / name) for name in members]
    return ordered(paths, paths, as_one_run, given)


def asked(folder: Path, *paths: str | Path, **how: bool) -> EvaluationRequest:
    return requests(list(paths), {"reference": model(folder / "base"), "data": "prompts.jsonl"}, **how)


def test_a_shells_order_is_not_that_of_training(tmp_path: Path) -> None:
    out = output_folder(tmp_path / "out", [200, 400, 1000])
    found = asked(tmp_path, *sorted(map(str, out.glob("checkpoint-*"))), as_one_run=True)
    assert [(one.label, one.step) for one in found.models] == [
        ("checkpoint-200", 200),
        ("checkpoint-400", 400),
        ("checkpoint-1000", 1000),
    ]
    assert found.told == (f"{out}: one run, by trainer_state.json: steps 200, 400, 1,000",) and found.doubts == ()
    assert found.output_dir == str(out / "evaluation")


@pytest.mark.parametrize(
    "members, expected, steps",
    [
        (["step_1000", "step_200"], ["step_200", "step_1000"], [200, 1000]),
        (["dpo-1000", "dpo-200", "dpo-50"], ["dpo-50", "dpo-200", "dpo-1000"], [50, 200, 1000]),
        (["global_step90", "global_step9"], ["global_step9", "global_step90"], [9, 90]),
        (["iter_0000200", "iter_0000100"], ["iter_0000100", "iter_0000200"], [100, 200]),
        (["epoch-10", "epoch-2"], ["epoch-2", "epoch-10"], [None, None]),  # ordered, but no steps
        (["epoch_1.5", "epoch_1.25", "epoch_10.0"], ["epoch_1.25", "epoch_1.5", "epoch_10.0"], [None, None, None]),
        (["checkpoint-9/model", "checkpoint-10/model"], ["model", "model"], [9, 10]),
        (["checkpoint-10/merged", "checkpoint-9/merged"], ["merged", "merged"], [9, 10]),
        (["checkpoint-10-merged", "checkpoint-9-merged"], ["checkpoint-9-merged", "checkpoint-10-merged"], [9, 10]),
        (["step20_bf16", "step3_bf16"], ["step3_bf16", "step20_bf16"], [3, 20]),
    ],
)
def test_names_alone_say_the_order(tmp_path: Path, members: list[str], expected: list[str], steps: list[int | None]) -> None:
    for name in members:
        model(tmp_path / name, name)
    found = order_of(tmp_path, *members)
    assert names(found) == expected and [found.steps.get(path) for path in found.paths] == steps and not found.doubts


def test_the_state_wins_over_a_name_and_says_so(tmp_path: Path) -> None:
    """Copied and renamed by hand: the folder's name lies."""
    model(tmp_path / "checkpoint-1", "a", {"global_step": 900})
    model(tmp_path / "checkpoint-2", "b", {"global_step": 300})
    found = order_of(tmp_path, "checkpoint-1", "checkpoint-2")
    assert names(found) == ["checkpoint-2", "checkpoint-1"] and sorted(found.steps.values()) == [300, 900]
    assert any("checkpoint-1: its trainer_state.json says step 900, its name 1" in doubt for doubt in found.doubts)


@pytest.mark.parametrize("broken", ['{"global_step": 12', "[]", '{"global_step": "12"}', '{"global_step": -3}', '{"epoch": 1.0}'])
def test_a_state_that_says_nothing_leaves_the_name(tmp_path: Path, broken: str) -> None:
    for step in (20, 100):
        (Path(model(tmp_path / f"checkpoint-{step}")) / "trainer_state.json").write_text(broken)
    assert names(order_of(tmp_path, "checkpoint-100", "checkpoint-20")) == ["checkpoint-20", "checkpoint-100"]


def test_names_that_say_nothing_stay_as_given_with_a_warning(tmp_path: Path) -> None:
    for name in ("late", "early", "middle"):
        model(tmp_path / name)
    found = order_of(tmp_path, "early", "middle", "late")
    assert names(found) == ["early", "middle", "late"] and found.steps == {} and "in the order given" in found.doubts[0]
    for name, step in (("late", 30), ("early", 10), ("middle", 20)):
        model(tmp_path / name, name, {"global_step": step})
    found = order_of(tmp_path, "late", "early", "middle")
    assert names(found) == ["early", "middle", "late"] and not found.doubts


def test_decimals_in_names_are_settings_and_no_steps(tmp_path: Path) -> None:
    members = ["dpo-beta-0.5", "dpo-beta-0.05", "dpo-beta-0.1"]
    for name in members:
        model(tmp_path / name)
    found = order_of(tmp_path, *members)
    assert names(found) == members and found.steps == {} and "in the order given" in found.doubts[0]


def test_two_models_of_one_step_are_a_warning(tmp_path: Path) -> None:
    model(tmp_path / "checkpoint-5", "a", {"global_step": 5})
    model(tmp_path / "checkpoint-6", "b", {"global_step": 5})
    assert "both of step 5" in order_of(tmp_path, "checkpoint-5", "checkpoint-6").doubts[-1]


@pytest.mark.parametrize(
    "weights, twin", [("weights 300", 300), ("weights 200", 200)]
)  # the last; the best, to which it went back
def test_a_final_model_that_is_a_checkpoint_is_not_counted_twice(tmp_path: Path, weights: str, twin: int) -> None:
    out = output_folder(tmp_path / "out", [100, 200, 300])
    model(out, weights, {"global_step": 300})
    found = asked(tmp_path, out, as_runs=True)
    assert [one.step for one in found.models] == [100, 200, 300]
    assert f"{out}: has the weights of checkpoint-{twin}, so it is not counted again" in found.told


def test_a_final_model_of_its_own_comes_last(tmp_path: Path) -> None:
    out = output_folder(tmp_path / "out", [100, 200])
    model(out, "more", {"global_step": 250})
    found = asked(tmp_path, out, as_runs=True)
    assert [(one.label, one.step) for one in found.models] == [("checkpoint-100", 100), ("checkpoint-200", 200), ("out", 250)]
    (out / "trainer_state.json").unlink()
    found = asked(tmp_path, out, as_runs=True)
    assert found.models[-1].step is None and "nothing says the step of this last model" in found.doubts[0]
    for step in (100, 200):
        model(out / f"checkpoint-{step}", f"weights {step}", {"global_step": step, "max_steps": 230})
    found = asked(tmp_path, out, as_runs=True)
    assert found.models[-1].step == 230 and "max_steps" in found.doubts[0]


def test_an_output_folder_is_a_run_for_a_report_and_a_model_for_an_evaluation(tmp_path: Path) -> None:
    out = output_folder(tmp_path / "out", [5, 10])
    assert [Path(path).name for path in expand(out)] == ["checkpoint-5", "checkpoint-10"]
    model(out, "final")
    assert expand(out) == [str(out)] and len(expand(out, as_run=True)) == 3


def test_a_checkpoint_without_a_model_is_no_silent_gap(tmp_path: Path) -> None:
    out = output_folder(tmp_path / "out", [5, 10])
    (out / "checkpoint-15" / "pytorch_model_fsdp_0").mkdir(parents=True)
    with pytest.raises(UserError, match=r"checkpoint-15: no model in it \(it holds pytorch_model_fsdp_0\).*--checkpoints"):
        expand(out)
    (out / "checkpoint-x").mkdir()
    (out / "checkpoint-15" / "pytorch_model_fsdp_0").rmdir()
    (out / "checkpoint-15").rmdir()
    assert len(expand(out)) == 2


def test_several_folders_are_several_runs_unless_they_are_said_to_be_one(tmp_path: Path) -> None:
    first, second = output_folder(tmp_path / "a", [200, 1000]), output_folder(tmp_path / "b", [300, 400])
    paths = [first / "checkpoint-1000", first / "checkpoint-200", second / "checkpoint-300", second / "checkpoint-400"]
    apart = asked(tmp_path, *paths, as_one_run=True)
    assert [one.step for one in apart.models] == [200, 1000, 300, 400] and len(apart.told) == 2
    assert [one.label for one in apart.models][:2] == ["checkpoint-200", "checkpoint-1000"]
    one = asked(tmp_path, *paths, as_one_run=True, one_run=True)
    assert [model.step for model in one.models] == [1000, 200, 300, 400] and one.one_run
    assert one.doubts == (
        "--one_run: the models stand in the order given; their steps are 1,000, 200, 300, 400, which do not rise",
    )
    rising = asked(tmp_path, paths[1], paths[2], paths[3], as_one_run=True, one_run=True)
    assert [model.step for model in rising.models] == [200, 300, 400] and rising.doubts == ()


def test_labels_tell_runs_of_the_same_names_apart(tmp_path: Path) -> None:
    first, second = output_folder(tmp_path / "dpo", [5]), output_folder(tmp_path / "ipo", [5])
    assert [one.label for one in asked(tmp_path, first, second, as_runs=True).models] == ["dpo/checkpoint-5", "ipo/checkpoint-5"]


def test_what_is_missing_is_asked_for_with_what_the_folder_knows(tmp_path: Path) -> None:
    out = output_folder(tmp_path / "out", [5, 10])
    with pytest.raises(UserError, match=r"--reference.* or .*--data.*; type: .*--reference REFERENCE --data DATA"):
        requests([out], as_runs=True)
    (out / "README.md").write_text("---\nbase_model: org/sft\ndatasets:\n- trl-lib/tldr\nlicense: mit\n---\n\n# Model\n")
    with pytest.raises(UserError, match=r"README.md \(base_model\) names org/sft.*--reference org/sft --data trl-lib/tldr"):
        requests([out], as_runs=True)
    (out / "checkpoint-5" / "adapter_config.json").write_text('{"base_model_name_or_path": "../base"}')
    with pytest.raises(UserError, match=r"adapter_config.json \(base_model_name_or_path\) names ../base; type"):
        requests([out], {"data": "mine.jsonl"}, as_runs=True)


@pytest.mark.parametrize("card", ["", "no settings", "---\n[broken", "---\n- a\n---\n", "---\ndatasets: 3\n---\n", "---\n"])
def test_a_card_that_says_nothing_suggests_nothing(tmp_path: Path, card: str) -> None:
    paths = [model(tmp_path / "out" / "checkpoint-5")]
    (tmp_path / "out" / "README.md").write_text(card)
    assert base_hint(paths) is None and data_hint(paths) is None


@pytest.mark.parametrize(
    "name, here, refused",
    [
        ("models/bsae", "models/base", True),
        ("out/checkpoint-30", "out/checkpoint-3", True),
        ("bsae", "base", True),
        ("gpt2", "gpt2-dpo", False),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B", False),
        ("org/name", "other/name", False),
        ("./base", "base2", True),
        ("a/b/c", "base", True),
    ],
)
@pytest.mark.parametrize("option", ["reference", "scorer"])
def test_a_mistyped_path_is_told_from_a_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, here: str, refused: bool, option: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model(tmp_path / here)
    mine = model(tmp_path / "mine")
    given = {"reference": mine, "data": "prompts.jsonl"} | {option: name}
    if not refused:
        assert getattr(requests([mine], given), option) == name
        return
    with pytest.raises(UserError, match=f"^{name}: no such model folder.*--{option}"):
        requests([mine], given)
