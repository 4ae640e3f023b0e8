"""The guard: it leaves training as it is, measures what it says, keeps the best model, stops a run, and survives a kill."""

from __future__ import annotations

import gc
import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from chains import (
    ALIGN,
    CHAIN,
    chat_model,
    config_file,
    finish,
    jsonl,
    plain_pairs,
    read_lines,
    refused,
    same_weights,
    start,
    train,
    weights,
    without_time,
)
from patience import killed_after
from training_helpers import largest_difference, tiny_model, token_rows, trainer_of, weights_of, with_reference

from isdaa.cli import main
from isdaa.evaluation.verdict.sequential import Look
from isdaa.files import digest, write_json
from isdaa.models.loading import load_model
from isdaa.models.lora import add_lora
from isdaa.models.packed.forward import prepare
from isdaa.models.sampling import sampling
from isdaa.record import read_record
from isdaa.training.guard import guard, measurement
from isdaa.training.guard.guard import BestModel, untouched_random_state
from isdaa.training.guard.measurement import Reference
from isdaa.training.stages import align
from isdaa.training.trainer import preference_trainer

GUARDED: dict[str, Any] = ALIGN | {
    "data.eval_fraction": 0.4,
    "align.max_steps": 6,
    "align.save_steps": 3,
    "align.learning_rate": 3e-2,
    "guard.steps": 2,
    "guard.prompts": 6,
    "guard.opponent_samples": 2,
    "guard.max_new_tokens": 5,
    "evaluation.scorer": "me/letters",
}
ACTING = GUARDED | {"guard.keep": "best", "guard.stop": "over-optimised"}


class Letters:
    """A judge of responses of any kind: the sum of their letters, with a remainder that has no taste."""

    name = digest_ = "letters"

    def __init__(self) -> None:
        self.seen: list[int] = []

    @property
    def digest(self) -> str:
        return self.digest_

    def score(self, rows: Sequence[Any], progress: Any = None) -> list[float]:
        self.seen.append(len(rows))
        return [float(sum(map(ord, row["response"])) % 17) for row in rows]


class Scripted:
    """A test that stops at look number `at`, and whose peak is the first look."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.wins: list[np.ndarray] = []

    def update(self, wins: np.ndarray, kl: float) -> Look:
        assert len(wins) == 6 and kl >= 0
        self.wins.append(wins)
        looks = len(self.wins)
        return Look(looks >= self.at, looks - 1, 0, 0.125 * looks, 0.01, 0.0625 * looks, True)

    def state(self) -> dict[str, Any]:
        return {"wins": [row.tolist() for row in self.wins]}

    def load_state(self, state: dict[str, Any]) -> None:
        self.wins = [np.array(row) for row in state["wins"]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "my_model"
    chat_model(folder)
    gc.freeze()
    return folder


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Letters:
    found = Letters()
    monkeypatch.setattr(guard, "load_scorer", lambda name, **kwargs: found)
    return found


@pytest.fixture
def place(model: Path, judge: Letters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `my_model` and `pairs.jsonl`, to work in."""
    shutil.copytree(model, tmp_path / "my_model")
    jsonl(tmp_path / "pairs.jsonl", plain_pairs(40))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def looks(folder: Path) -> list[dict[str, Any]]:
    return [line for line in without_time(folder / "metrics.jsonl") if "guard/kl" in line]


def stop_at(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(guard, "new_test", lambda: Scripted(at))


def interrupted(owner: Any, name: str, calls: int, settings: dict[str, Any], folder: str = "run") -> None:
    """A run that is cut off at the n-th call of a method, and started again."""
    original: Callable[..., Any] = getattr(owner, name)
    left = [calls]

    def stopping(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stopping)
        assert train(folder, settings) == 130
    assert train(folder, settings) == 0


# --- it leaves training as it is


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora.rank": 2},
        {"align.precision": "bfloat16"},
        {"objective.weight": "shuffled", "align.gradient_checkpointing": True},
    ],
    ids=lambda changes: " ".join(changes) or "plain",
)
def test_a_guarded_run_trains_bit_for_bit_as_without(place: Path, changes: dict[str, Any]) -> None:
    settings = GUARDED | changes | {"guard.keep": "best"}
    assert train("guarded", settings) == 0
    assert train("plain", settings, guard__steps=None, guard__keep="all") == 0
    assert same_weights(place / "guarded" / "model", place / "plain" / "model")
    assert not same_weights(place / "guarded" / "model", place / "my_model")
    lines = without_time(place / "guarded" / "metrics.jsonl")
    assert [line for line in lines if "guard/kl" not in line] == without_time(place / "plain" / "metrics.jsonl")
    assert not (place / "plain" / "guard").exists()


def test_random_numbers_after_a_look_are_those_without_it() -> None:
    def three() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = three()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with untouched_random_state():
        assert three() == expected
    assert three() == expected


# --- what it measures


def test_each_look_is_one_whole_line(place: Path, judge: Letters, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("run", GUARDED, align__max_steps=5) == 0
    found = looks(place / "run")
    assert [line["step"] for line in found] == [2, 4, 5]  # and at the last step
    keys = {"kl", "kl_low", "kl_high", "win_rate", "win_rate_low", "win_rate_high", "reward", "length", "truncated", "best_step"}
    keys.add("reference_length")
    assert all({"step", "epoch", *(f"guard/{key}" for key in keys)} == set(line) for line in found)
    assert 0 <= found[0]["guard/win_rate_low"] <= found[0]["guard/win_rate"] <= found[0]["guard/win_rate_high"] <= 1
    assert 0 < found[0]["guard/kl"] < found[-1]["guard/kl"]
    assert judge.seen == [12, 6, 6, 6]  # the opponents, once; then one response a prompt
    said = capsys.readouterr().err
    assert "guard: 3 measurements and 6 prompts: hardly any fall is seen" in said  # before the first step
    assert "guard.max_new_tokens (5) cut" in said and "give --guard.max_new_tokens 10" in said and "of the reference's" in said
    opponents = read_lines(place / "run/guard/samples.jsonl")[1:]
    lengths = np.mean([len(row["ids"]) for row in opponents])
    assert {line["guard/reference_length"] for line in found} == {lengths}
    best = max(found, key=lambda line: line["guard/win_rate"])
    bounds = "{guard/win_rate:.3f} [{guard/win_rate_low:.3f}, {guard/win_rate_high:.3f}]".format(**best)
    place_of = "model/ (step 5, the last)" if best["step"] == 5 else f"the checkpoint nearest to step {best['step']} (guard.keep"
    assert f"guard: keep the reference, or judge {place_of}" in " ".join(said.split())
    assert f"best win rate {bounds} on its 6 prompts; no measurement is shown to be better than" in " ".join(said.split())
    assert all("time/guard_seconds" in line for line in read_lines(place / "run" / "metrics.jsonl") if "guard/kl" in line)
    assert found[-1]["guard/best_step"] == best["step"]
    assert json.loads((place / "run" / "run.json").read_text())["stages"]["align"]["guard"] == {
        "use": None,
        "best_step": best["step"],
        "best_win_rate": best["guard/win_rate"],
        "stopped": None,
        "better": False,  # on six prompts nothing is
        "reference_truncated": np.mean([not row["finished"] for row in opponents]),
        "reference_length": lengths,
    }
    assert not (place / "run" / "best").exists()


@pytest.mark.parametrize(("wins", "advice"), [(1.0, "use run/best (step 4): "), (0.5, "keep the reference, or judge run/best")])
def test_the_end_says_what_to_use_and_how_sure_it_is(wins: float, advice: str) -> None:
    told = guard.Guard.__new__(guard.Guard)
    told.test, told.steps, told.best_step, told.stopped, told.cut = Scripted(9), [2, 4], 4, None, []
    told.test.wins = [np.full(24, 0.5), np.full(24, wins)]
    told.looks = SimpleNamespace(bootstrap={}, scorer=Letters(), reference_wins=np.full(24, 0.5), opponents_cut=None)
    told.best, told.trainer = SimpleNamespace(folder=Path("run/best")), None
    (line,) = told.summary()
    assert line.startswith(f"guard: {advice}") and f"{wins:.3f} [{wins:.3f}, {wins:.3f}] on its 24 prompts" in line
    assert ("no measurement is shown" in line) is (wins == 0.5)


@pytest.mark.parametrize("changes", [{}, {"lora.rank": 2}, {"align.precision": "bfloat16"}, {"model.dtype": "bfloat16"}], ids=str)
def test_a_policy_that_does_not_move_has_no_kl(place: Path, changes: dict[str, Any]) -> None:
    assert train("run", GUARDED | changes, align__learning_rate=0, align__max_steps=2) == 0
    assert looks(place / "run")[0]["guard/kl"] == pytest.approx(0, abs=1e-6)


def test_an_adapter_switched_off_is_the_model_as_loaded(place: Path) -> None:
    policy = add_lora(load_model("my_model"), rank=2, target_modules=["q_proj", "lm_head"])
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    forward, base = prepare(policy), prepare(load_model("my_model"))
    rows = [([5, 6, 7], [8, 9]), ([5, 6], [9, 10, 11])]
    found = []
    for reference in (Reference(None, forward), Reference(lambda: base)):
        with reference.in_memory() as frozen:
            found.append(measurement.divergences(forward, frozen, rows))
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert ours["kl"] > 1e-3
    assert all(p.requires_grad == ("lora_" in name) for name, p in policy.named_parameters())


def test_a_large_reference_is_loaded_for_each_look_and_a_small_one_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[int] = []

    def load() -> Any:
        loaded.append(1)
        return prepare(tiny_model(), probe=False)

    for limit, times in ((measurement.KEPT, 1), (10, 3)):
        loaded.clear()
        monkeypatch.setattr(measurement, "KEPT", limit)
        reference = Reference(load)
        for _ in range(3):
            with reference.in_memory():
                pass
        assert len(loaded) == times


def test_another_reference_by_its_path(place: Path) -> None:
    chat_model(place / "other", seed=5)
    assert train("run", GUARDED, reference__path="other", align__learning_rate=0, align__max_steps=2) == 0
    assert looks(place / "run")[0]["guard/kl"] > 0.01


def test_its_prompts_lie_behind_those_of_the_evaluation(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("run", GUARDED, align__max_steps=2) == 0
    assert "its 6 prompts are" not in capsys.readouterr().err
    held_out = [row["prompt"] for row in read_lines(place / "run" / "eval_pairs.jsonl")]
    assert len(held_out) == 16
    assert main(["evaluate", "--model_path", "run/model", "--scorer", "none"]) == 0
    samples = read_lines(place / "run" / "evaluation" / "samples.jsonl")
    judged = {row["prompt"] for row in samples if "prompt" in row and "header" not in row}
    assert len(judged) == 4
    opponents = read_lines(place / "run" / "guard" / "samples.jsonl")[1:]
    assert len(opponents) == 12
    assert not {row["prompt_id"] for row in opponents} & {row["prompt_id"] for row in samples if "header" not in row}
    capsys.readouterr()
    assert train("watched", GUARDED, align__max_steps=2, evaluation__prompts=12) == 0
    assert "prompts are among" not in capsys.readouterr().err  # nothing is chosen
    assert train("more", GUARDED, align__max_steps=2, evaluation__prompts=12, guard__keep="best") == 0
    assert "2 of its 6 prompts are among the first 12 held-out ones" in capsys.readouterr().err
    assert train("all", GUARDED, align__max_steps=2, evaluation__prompts=512, guard__keep="best") == 0
    assert "6 of its 6 prompts are among all 16 held-out ones" in capsys.readouterr().err


def test_without_a_scorer_the_proxies_are_logged_and_nothing_is_kept(place: Path) -> None:
    assert train("run", GUARDED, evaluation__scorer=None) == 0
    for line in looks(place / "run"):
        assert {"guard/kl", "guard/accuracy", "guard/drift_chosen", "guard/drift_rejected", "guard/length"} <= line.keys()
        assert "guard/reference_length" not in line  # of samples that nobody needs
        assert not any("win_rate" in key or "best" in key or "fall" in key for key in line)
    assert not (place / "run" / "best").exists()
    assert not (place / "run" / "guard").exists()
    assert train("asked", GUARDED, guard__scorer="none") == 0
    assert looks(place / "asked") == looks(place / "run")
    folders = (place / name / "run.json" for name in ("run", "asked"))
    stages = [json.loads(path.read_text())["stages"]["align"] for path in folders]
    told, asked = (next(note for note in stage["notes"] if "KL, length" in note) for stage in stages)
    assert asked.startswith("guard: without a scorer, as named") and "judge" not in asked
    assert told.startswith("guard: no scorer is named")
    assert "KL" in told and "they do not say whether" in told and "--judge_model" in told


def test_a_scorer_that_was_trained_on_the_same_pairs_is_flagged(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(place)
    jsonl(place / "others.jsonl", [{**row, "prompt": f"Else {row['prompt']}"} for row in plain_pairs(40)])
    reward = {**ALIGN, "stages": ["reward"], "data.eval_fraction": 0.4, "reward.max_steps": 2, "reward.batch_size": 4}
    assert train("same", reward) == train("other", reward, data__pairs="others.jsonl") == 0
    for name, flagged in (("same", True), ("other", False)):
        assert train(f"by_{name}", GUARDED, evaluation__scorer=f"{name}/reward") == 0
        said = " ".join(capsys.readouterr().err.split())
        warned = f"warning: guard: scorer {name}/reward was trained on the policy's own pairs (about 100 % of them)"
        assert (warned in said) == flagged
        assert main(["evaluate", "--model_path", f"by_{name}/model", "--evaluation.prompts", "6"]) == 0
        doubts = json.loads((place / f"by_{name}" / "evaluation" / "plan.json").read_text()).get("doubts", [])
        assert any("was trained on the policy's own pairs" in doubt for doubt in doubts) == flagged


def test_weights_that_broke_end_the_run_before_the_look(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = preference_trainer.PreferenceTrainer.training_step

    def breaking(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        if self.state.global_step == 3:
            next(self.model.parameters()).data.fill_(torch.nan)
        return loss

    monkeypatch.setattr(preference_trainer.PreferenceTrainer, "training_step", breaking)
    assert train("run", GUARDED) == 2
    assert [line["step"] for line in looks(place / "run")] == [2]
    assert "step 4: weights are not finite after its update" in capsys.readouterr().err.splitlines()[-1]


# --- the best model


def test_the_best_model_is_that_of_its_step_and_loads_with_transformers(place: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert train("run", GUARDED, guard__keep="best", align__save_steps=1) == 0
    run = place / "run"
    best = max(looks(run), key=lambda line: line["guard/win_rate"])
    record = read_record(run / "best")
    assert record is not None
    assert (record.kind, record.step) == ("policy", best["step"])
    assert record.metrics["guard/win_rate"] == best["guard/win_rate"]
    assert same_weights(run / "best", run / "checkpoints" / f"checkpoint-{best['step']}")
    assert AutoModelForCausalLM.from_pretrained(run / "best").num_parameters() > 0
    assert AutoTokenizer.from_pretrained(run / "best").eos_token_id is not None
    assert (run / "best" / "README.md").read_text().startswith("---")
    assert {p.name for p in (run / "guard").iterdir()} == {"samples.jsonl", "scores.jsonl"}
    assert main(["evaluate", "--model_path", "run/best", "--output", "records", "--scorer", "none"]) == 0
    assert json.loads(Path("records/metrics.json").read_text())["models"][0]["step"] == best["step"]
    assert main(["evaluate", "--model_path", "run", "--output", "all", "--scorer", "none"]) == 0
    assert [m["step"] for m in json.loads(Path("all/metrics.json").read_text())["models"]] == [1, 2, 3, 4, 5, 6]


def test_the_best_model_of_a_lora_run_is_merged(place: Path) -> None:
    assert train("run", GUARDED | {"lora.rank": 2}, guard__keep="best") == 0
    assert (place / "run" / "best" / "model.safetensors").exists()
    assert weights(place / "run" / "best").keys() == weights(place / "my_model").keys()


def test_a_run_that_is_thrown_back_has_the_best_model_of_that_step(tmp_path: Path) -> None:
    def write(folder: Path, step: int) -> None:
        folder.mkdir(parents=True)
        (folder / "weights").write_text(f"of step {step}")
        write_json(folder / "isdaa.json", {"kind": "policy", "config": {}, "step": step})

    best = BestModel(tmp_path, write)
    assert best.restore(None)
    best.keep(2)
    best.committed(2)
    best.keep(4)
    best.keep(6)  # no checkpoint knows of 4 or 6 yet
    assert (tmp_path / "best" / "weights").read_text() == "of step 6"
    assert {p.name for p in (tmp_path / "guard").iterdir()} == {"best-2", "best-6"}
    for half in (tmp_path / ".writing-best-12345678", tmp_path / "guard" / ".writing-best-8-12345678", tmp_path / ".old-best"):
        half.mkdir()
    again = BestModel(tmp_path, write)
    assert again.restore(2)
    assert {p.name for p in tmp_path.rglob("*")} == {"best", "guard", "best-2", "weights", "isdaa.json"}
    assert (tmp_path / "best" / "weights").read_text() == "of step 2"
    assert (tmp_path / "best" / "weights").stat().st_ino == (tmp_path / "guard" / "best-2" / "weights").stat().st_ino
    again.close()
    assert not list((tmp_path / "guard").iterdir())
    assert BestModel(tmp_path, write).restore(2)  # a finished run's is there without its candidate
    assert not BestModel(tmp_path, write).restore(4)
    assert not (tmp_path / "best").exists()


# --- stopping


def test_a_run_that_falls_is_stopped_and_not_trained_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(monkeypatch, 2)
    assert train("run", ACTING) == 0
    run = place / "run"
    said = capsys.readouterr().err
    lines = without_time(run / "metrics.jsonl")
    best = max(looks(run), key=lambda line: line["guard/win_rate"])["step"]
    expected = (
        f"guard: use run/best (step {best}): over-optimised, the win rate fell by 0.250 (at least 0.125) from step 2, and "
        "training stopped at step 4, whose weights are in model/"
    )
    assert expected in said and "guard: the reference may be as good: no measurement is shown" in " ".join(said.split())
    assert f"align: finished: use run/best (step {best}); run/model has the weights of the stop" in " ".join(said.split())
    state = json.loads((run / "run.json").read_text())["stages"]["align"]
    assert state["done"]
    assert expected in state["notes"]
    assert state["guard"]["stopped"] == {"step": 4, "peak_step": 2, "fall": 0.25, "lower": 0.125}
    assert max(line["step"] for line in lines) == 4
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"checkpoint-3", "checkpoint-4"}
    assert [line["step"] for line in lines if "loss" in line][-1] == 4
    assert [line["step"] for line in lines if "eval/loss" in line][-1] == 4
    assert same_weights(run / "model", run / "checkpoints" / "checkpoint-4")
    record = read_record(run / "model")
    assert record is not None and record.step == 4
    monkeypatch.setattr(preference_trainer.PreferenceTrainer, "training_step", None)
    assert train("run", ACTING) == 0
    assert "finished earlier, reused" in capsys.readouterr().err


def test_the_same_fall_is_only_logged_where_nothing_shall_stop(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 2)
    assert train("run", GUARDED) == 0
    assert [line["guard/fall"] for line in looks(place / "run")] == [0.125, 0.25, 0.375]


@pytest.mark.parametrize("falling", [True, False])
def test_the_real_test_tells_a_falling_run_from_a_healthy_one(
    place: Path, judge: Letters, monkeypatch: pytest.MonkeyPatch, falling: bool
) -> None:
    def score(rows: Sequence[Any], progress: Any = None) -> list[float]:
        judge.seen.append(len(rows))
        number = len(judge.seen) - 1  # 0: the opponents
        share = 0.5 if number == 0 else 0.9 - 0.1 * max(0, number - 3) if falling else 0.9
        return [share + 0.01 * (int(digest([row["id"], number])[:4], 16) % 5) for row in rows]

    monkeypatch.setattr(judge, "score", score)
    monkeypatch.setattr(
        "isdaa.evaluation.checkpoints.win_rate.wins_of", lambda one, other, ties: np.clip(one - other + 0.5, 0, 1)
    )
    assert train("run", ACTING, guard__steps=1, align__max_steps=12, align__save_steps=6) == 0
    stopped = json.loads((place / "run" / "run.json").read_text())["stages"]["align"]["guard"]["stopped"]
    assert (stopped is not None) is falling
    assert looks(place / "run")[-1]["step"] == (stopped["step"] if falling else 12)


# --- a kill


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run left alone: eleven steps, of which the guard allows eight."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(model, folder / "my_model")
    jsonl(folder / "pairs.jsonl", plain_pairs(40))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(guard, "load_scorer", lambda name, **kwargs: Letters())
        stop_at(patch, 4)
        assert train("run", ACTING, align__max_steps=11) == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (preference_trainer.PreferenceTrainer, "training_step", 0),
        (preference_trainer.PreferenceTrainer, "training_step", 2),  # after a look, before any checkpoint
        (preference_trainer.PreferenceTrainer, "training_step", 5),  # after a look that no checkpoint knows
        (preference_trainer.PreferenceTrainer, "training_step", 7),
        (BestModel, "keep", 1),
        (BestModel, "committed", 1),
        (measurement.Looks, "look", 2),
        (align, "keep_model", 0),  # after the stop, before the final model
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_stopped_run_that_was_killed_equals_one_left_alone(
    place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int
) -> None:
    stop_at(monkeypatch, 4)
    interrupted(owner, name, calls, ACTING | {"align.max_steps": 11})
    run = place / "run"
    assert without_time(run / "metrics.jsonl") == without_time(whole / "metrics.jsonl")
    assert looks(run)[-1]["step"] == 8
    for part in ("model", "best"):
        assert same_weights(run / part, whole / part)
    assert read_lines(run / "guard" / "samples.jsonl") == read_lines(whole / "guard" / "samples.jsonl")
    facts = [json.loads((folder / "run.json").read_text())["stages"]["align"]["guard"] for folder in (run, whole)]
    assert facts[0] == facts[1]


@pytest.mark.slow
def test_kill_9_costs_a_guarded_run_nothing(tmp_path: Path) -> None:
    """The embedded world with its gold judge: killed at random moments, and one run left alone."""
    settings = CHAIN | {
        "align.max_steps": 40,
        "align.save_steps": 7,
        "guard.steps": 3,
        "guard.prompts": 16,
        "guard.keep": "best",
        "guard.stop": "over-optimised",
    }
    for name in ("whole", "killed"):
        config_file(tmp_path / name / "run.yaml", settings)
    begun = time.monotonic()
    finish(tmp_path / "whole")
    seconds, moments, met = time.monotonic() - begun, random.Random(5), 0
    for _ in range(4):
        if not killed_after(start(tmp_path / "killed"), moments.uniform(0.4, 0.8) * seconds):
            break
        met += 1
    assert met, "the run was never met at work"
    finish(tmp_path / "killed")
    killed, alone = tmp_path / "killed" / "run", tmp_path / "whole" / "run"
    assert without_time(killed / "metrics.jsonl") == without_time(alone / "metrics.jsonl")
    assert len(looks(killed)) == 14
    for part in ("model", "best"):
        assert same_weights(killed / part, alone / part)
    assert {p.name for p in (killed / "guard").iterdir()} == {"samples.jsonl", "scores.jsonl"}


def test_opponents_are_drawn_once(place: Path, judge: Letters, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    original = sampling.sample

    def counted(*args: Any, **kwargs: Any) -> Any:
        drawn.extend(key for key in args[6] if "opponent" in key)
        return original(*args, **kwargs)

    monkeypatch.setattr(sampling, "sample", counted)
    interrupted(preference_trainer.PreferenceTrainer, "training_step", 4, GUARDED)
    assert len(drawn) == len(set(drawn)) == 12
    assert judge.seen.count(12) == 1


def test_a_run_resumed_at_its_last_step_takes_no_further_one(tmp_path: Path) -> None:
    rows = with_reference(token_rows(32), tiny_model())
    first = trainer_of(tiny_model(), tmp_path, rows, max_steps=3, save_steps=3)  # an epoch has eight steps
    first.train()
    again = trainer_of(tiny_model(), tmp_path, rows, max_steps=3, save_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 3
    assert largest_difference(weights_of(again.model), weights_of(first.model)) == 0


# --- what is refused


def test_only_a_guard_that_may_stop_decides_the_outcome(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(folder: str, *changes: str) -> list[str]:
        return ["train", "--config", f"{folder}.yaml", "--output_dir", folder, *changes]

    assert train("logs", GUARDED) == 0
    assert main(command("logs", "--guard.prompts", "5", "--guard.keep", "best")) == 0
    refused(capsys, command("logs", "--guard.stop", "over-optimised"), "guard.stop", "'over-optimised'")
    assert train("stops", ACTING) == 0
    assert main(command("stops", "--guard.keep", "all", "--guard.batch_size", "2")) == 0
    refused(capsys, command("stops", "--guard.prompts", "5"), "guard.prompts = 6, this one 5")
    refused(capsys, command("stops", "--evaluation.temperature", "0.5"), "evaluation.temperature")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluation.scorer": None, "guard.keep": "best"}, ("guard.scorer", "no scorer")),
        ({"guard.scorer": "none", "guard.stop": "over-optimised"}, ("guard.scorer", "no scorer")),
        ({"guard.steps": None, "guard.keep": "best"}, ("guard.steps", "for example --guard.steps 100")),
        ({"data.eval_fraction": 0}, ("guard.steps", "nothing is held out")),
        ({"guard.stop": "always"}, ("guard.stop", "never, over-optimised", "always")),
        ({"guard.max_new_tokens": 900}, ("900", "context", "max_new_tokens")),
        ({"guard.scorer": "./nowhere"}, ("./nowhere", "no such folder")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_mistakes_are_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: Any
) -> None:
    from isdaa.evaluation.scorers import load_scorer

    if "guard.scorer" in changes:
        monkeypatch.setattr(guard, "load_scorer", load_scorer)
    file = config_file(place / "wrong.yaml", GUARDED | changes)
    refused(capsys, ["train", "--config", str(file), "--output_dir", "wrong"], *words)
