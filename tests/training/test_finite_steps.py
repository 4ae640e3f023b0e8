"""A run that is not finite any more ends within a step; what it leaves is finite, and no figure is of another step."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import ALIGN, chat_model, jsonl, plain_pairs, read_lines, refused, same_weights, train
from own_records import write_own
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from training_helpers import logged, moved, tiny_model, token_rows, trainer_of, weights_of, with_reference
from transformers import TrainerCallback

from isdaa import Objective
from isdaa.errors import UserError
from isdaa.models.finite_weights import files_not_finite, not_finite
from isdaa.models.loading import load_model, load_sequence_classifier, random_model
from isdaa.models.packed.forward import prepare
from isdaa.record import read_record
from isdaa.training.guard import guard
from isdaa.training.trainer.batches import TokenisedPairs
from isdaa.training.trainer.callbacks import metrics_at
from isdaa.training.trainer.checkpoints import newest_complete_checkpoint, write_manifest
from isdaa.training.trainer.preference_trainer import PreferenceTrainer
from isdaa.training.trl_api.drop_in import preference_trainer
from isdaa.training.trl_api.preference_config import PreferenceConfig

NAN, INF = float("nan"), float("inf")
STAGES = {"sft": "sft-checkpoints", "reward": "reward-checkpoints", "align": "checkpoints"}


class At(TrainerCallback):
    """Calls `do(model)` at one event of one step (counted from 1)."""

    def __init__(self, step: int, event: str, do: Callable[[Any], None]) -> None:
        self.step, self.do = step, do
        setattr(self, event, self._happened)

    def _happened(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.do(model)


def break_a_weight(value: float) -> Callable[[Any], None]:
    def do(model: Any) -> None:
        model.get_input_embeddings().weight.data[5, 3] = value

    return do


def ended(trainer: PreferenceTrainer) -> str:
    with pytest.raises(UserError) as error:
        trainer.train()
    return str(error.value)


def rows(count: int = 12, **columns: Any) -> list[dict[str, Any]]:
    return token_rows(count, id=[f"pairs.jsonl:{n + 1}" for n in range(count)], **columns)


def all_finite(folder: Path) -> bool:
    return all(bool(tensor.isfinite().all()) for file in folder.glob("*.safetensors") for tensor in load_file(file).values())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    chat_model(folder / "my_model")
    chat_model(folder / "half").to(torch.float16).save_pretrained(folder / "half")  # type: ignore[arg-type]
    return folder


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `my_model`, `half` (float16), `pairs.jsonl` and `sft.jsonl`, to work in."""
    for name in ("my_model", "half"):
        shutil.copytree(models / name, tmp_path / name)
    jsonl(tmp_path / "pairs.jsonl", plain_pairs(12))
    jsonl(tmp_path / "sft.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in plain_pairs(12)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stage(name: str, **changes: Any) -> dict[str, Any]:
    """One stage that trains, of `my_model`, six steps, with changes of its own section."""
    settings = {key: value for key, value in ALIGN.items() if not key.startswith("align.")} | {"stages": [name]}
    settings |= {"align.probe": False, "data.sft": "sft.jsonl"} if name == "sft" else {"align.probe": False}
    own = {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0, "lr_scheduler": "constant"} | changes
    return settings | {f"{name}.{key}": value for key, value in own.items()}


def spoilt(folder: Path, value: float, source: str = "my_model") -> str:
    """A copy of a model folder with one number that is none. Gives the name of its tensor."""
    shutil.copytree(source, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = max(tensors)
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, {"format": "pt"})
    return name


# --- one step


@pytest.mark.parametrize("logging_steps", [1, 50])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_weight_that_breaks_ends_the_run_within_its_step(tmp_path: Path, value: float, logging_steps: int) -> None:
    data = with_reference(rows(), tiny_model())
    broken = At(3, "on_optimizer_step", break_a_weight(value))
    own = {"callbacks": [broken]}
    trainer = trainer_of(tiny_model(), tmp_path, data, max_steps=9, save_steps=2, logging_steps=logging_steps, own=own)
    message = ended(trainer)
    assert message.startswith("step 3: weights are not finite after its update (model.embed_tokens.weight), in rows pairs.jsonl:")
    assert message.count("pairs.jsonl:") == 4 and "(all of the step)" in message
    assert "a smaller learning rate (now 0.01)" in message and "a larger beta (now 0.5)" in message
    assert "max_grad_norm 1 (now 0: gradients are not clipped)" in message and "float16" not in message
    assert f"the last finite checkpoint is {tmp_path / 'checkpoint-2'}" in message
    assert trainer.state.global_step == 3
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert max(entry["step"] for entry in trainer.state.log_history) < 3


def test_a_weight_that_breaks_at_a_checkpoints_step_is_not_saved(tmp_path: Path) -> None:
    data = with_reference(rows(), tiny_model())
    own = {"callbacks": [At(4, "on_optimizer_step", break_a_weight(NAN))]}
    message = ended(trainer_of(tiny_model(), tmp_path, data, max_steps=4, save_steps=2, own=own))
    assert "step 4" in message and newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-4").exists()


@pytest.mark.parametrize("saves", [True, False])
def test_weights_that_a_callback_breaks_after_the_last_update_are_not_kept(tmp_path: Path, saves: bool) -> None:
    class Late(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 4:
                break_a_weight(NAN)(model)

    data = with_reference(rows(), tiny_model())
    own = {"callbacks": [Late()]}
    settings: dict[str, Any] = {"save_steps": 2} if saves else {}
    message = ended(trainer_of(tiny_model(), tmp_path, data, max_steps=4, own=own, **settings))
    assert message.startswith("step 4: weights are not finite") and not (tmp_path / "checkpoint-4").exists()


def test_the_pair_whose_loss_is_not_finite_is_named_and_the_weights_stay(tmp_path: Path) -> None:
    data = with_reference(rows(), tiny_model())
    data.floats["reference_chosen_logps"][7] = INF
    seen: list[dict[str, torch.Tensor]] = []
    own = {"callbacks": [At(step, "on_step_begin", lambda model: seen.append(weights_of(model))) for step in (1, 2, 3)]}
    model = tiny_model()
    trainer = trainer_of(model, tmp_path, data, objective=Objective(beta=0.1), max_steps=9, batch_size=4, own=own)
    message = ended(trainer)
    step = next(s for s in (1, 2, 3) if 7 in trainer.sampler.order(0)[4 * (s - 1) : 4 * s])
    assert message.startswith(f"step {step}: the loss is not finite")
    assert "in row pairs.jsonl:8." in message and message.count("pairs.jsonl:") == 1
    assert "there is no checkpoint yet" in message
    assert all(torch.equal(seen[-1][name], tensor) for name, tensor in weights_of(model).items())
    assert len(logged(trainer)) < step


def test_rows_without_ids_are_named_by_number_and_pieces_of_a_step_are_told_apart(tmp_path: Path) -> None:
    data = with_reference(token_rows(12), tiny_model())
    data.floats["reference_rejected_logps"][2] = NAN
    settings: dict[str, Any] = {"batch_size": 2, "gradient_accumulation_steps": 6, "batch_tokens": 20, "max_steps": 3}
    assert "in row row 2." in ended(trainer_of(tiny_model(), tmp_path, data, objective=Objective(beta=0.1), **settings))


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_an_infinite_gradient_norm_of_finite_gradients_ends_the_run(tmp_path: Path, clip: float) -> None:
    # Clipped, every update would be 0 and the loss would stand still for ever.
    data, model = with_reference(rows(), tiny_model()), tiny_model()
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient * 1e30)
    before = weights_of(model)
    trainer = trainer_of(model, tmp_path, data, objective=Objective(beta=0.1), max_steps=5, max_grad_norm=clip)
    message = ended(trainer)
    assert message.startswith("step 1: the gradient's norm is not finite (inf), in rows ")
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(model).items())
    assert ("max_grad_norm 1" in message) == (clip == 0)


@pytest.mark.parametrize("rate", [1e20, 1e38])
def test_a_learning_rate_that_is_far_too_large_ends_the_run(tmp_path: Path, rate: float) -> None:
    data = with_reference(rows(), tiny_model())
    trainer = trainer_of(tiny_model(), tmp_path, data, objective=Objective(beta=0.1), max_steps=9, learning_rate=rate)
    message = ended(trainer)
    assert int(message[5]) <= 3 and f"a smaller learning rate (now {rate:g})" in message


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_other_optimizers_are_watched_alike(tmp_path: Path, optimizer: str) -> None:
    data = with_reference(rows(), tiny_model())
    settings: dict[str, Any] = {"optimizer": optimizer, "learning_rate": 1e38, "max_steps": 9}
    message = ended(trainer_of(tiny_model(), tmp_path, data, objective=Objective(beta=0.1), **settings))
    assert int(message[5]) <= 3 and "not finite" in message


def test_float16_weights_that_break_end_the_run_and_no_loss_of_zero_is_logged(tmp_path: Path) -> None:
    # The Trainer's filter, which is on by default, would log a loss that is not finite as 0.0.
    model = tiny_model().to(torch.float16)  # type: ignore[arg-type]
    data = with_reference(rows(), model)
    trainer = trainer_of(model, tmp_path, data, objective=Objective(beta=0.1), max_steps=9, learning_rate=100.0)
    trainer.args.logging_nan_inf_filter = True
    message = ended(trainer)
    assert "not finite" in message and "weights in float32 or bfloat16 (now float16)" in message
    assert all(loss > 0 for loss in logged(trainer))


def test_finite_weights_that_are_very_large_do_not_end_the_run(tmp_path: Path) -> None:
    # Their norm overflows: the suspicion is looked into.
    data = with_reference(rows(), tiny_model())
    model = tiny_model()
    model.lm_head.register_parameter("unused", torch.nn.Parameter(torch.full((4, 4), 1e30)))
    trainer = trainer_of(model, tmp_path, data, objective=Objective(beta=0.1), max_steps=3, learning_rate=1e-3)
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.watch is not None


def test_a_held_out_loss_that_is_not_finite_ends_the_run_and_names_its_pairs(tmp_path: Path) -> None:
    data = with_reference(rows(), tiny_model())
    held_out = with_reference(token_rows(5, seed=4, id=[f"held.jsonl:{n + 1}" for n in range(5)]), tiny_model())
    held_out.floats["reference_chosen_logps"][3] = INF
    trainer = trainer_of(tiny_model(), tmp_path, data, held_out, Objective(beta=0.1), max_steps=9, save_steps=1, eval_steps=2)
    message = ended(trainer)
    assert message.startswith("step 2: the held-out loss is not finite, in row held.jsonl:4.")
    assert str(tmp_path / "checkpoint-1") in message and not any("eval_loss" in entry for entry in trainer.state.log_history)
    with pytest.raises(UserError, match=r"held-out loss is not finite, in row held.jsonl:4"):
        trainer_of(tiny_model(), tmp_path, data, held_out, Objective(beta=0.1), max_steps=9).evaluate()


# --- a gradient of exactly 0


def still(tmp_path: Path, caplog: pytest.LogCaptureFixture, data: TokenisedPairs, steps: int = 24, **changes: Any) -> list[str]:
    with caplog.at_level(logging.WARNING):
        trainer_of(moved(tiny_model()), tmp_path, data, max_steps=steps, **changes).train()
    return [record.getMessage() for record in caplog.records if "gradient has been exactly 0" in record.getMessage()]


def test_a_gradient_of_zero_for_twenty_steps_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = with_reference(token_rows(8, weight=[0.0] * 8), tiny_model())
    (said,) = still(tmp_path, caplog, data, objective=Objective(beta=0.1))
    assert said.startswith("step 20: ")


def test_nineteen_steps_are_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = with_reference(token_rows(8, weight=[0.0] * 8), tiny_model())
    assert still(tmp_path, caplog, data, steps=19, objective=Objective(beta=0.1)) == []


def test_a_satisfied_hinge_explains_a_gradient_of_zero(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = with_reference(token_rows(8), tiny_model())
    for name, size in (("reference_chosen_logps", -500.0), ("reference_rejected_logps", 500.0)):
        data.floats[name] = data.floats[name] + size  # every margin is far beyond 1
    assert still(tmp_path, caplog, data, objective=Objective(loss="hinge", beta=0.1), own={"starts_at_reference": False}) == []


def test_a_learning_rate_of_zero_is_no_gradient_of_zero(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = with_reference(token_rows(8), tiny_model())
    assert still(tmp_path, caplog, data, objective=Objective(beta=0.1), learning_rate=0.0) == []


# --- the stages


@pytest.mark.parametrize("name", list(STAGES))
def test_a_stage_that_breaks_is_not_finished_and_keeps_its_last_finite_checkpoint(
    place: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from isdaa.training.trainer.whole_checkpoints import WholeCheckpoints

    original: Any = WholeCheckpoints.train

    def breaking(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(At(5, "on_optimizer_step", break_a_weight(NAN)))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(WholeCheckpoints, "train", breaking)
    assert train("run", stage(name, logging_steps=50)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    newest = place / "run" / STAGES[name] / "checkpoint-4"
    rows_named = "sft.jsonl:" if name == "sft" else "pairs.jsonl:"
    assert error.startswith("isdaa: error: step 5: weights are not finite after its update (") and rows_named in error
    assert error.endswith(f"the last finite checkpoint is {Path('run') / STAGES[name] / 'checkpoint-4'}")
    assert ("beta" in error) == (name == "align")
    assert newest_complete_checkpoint(newest.parent) == str(newest) and all(map(all_finite, newest.parent.iterdir()))
    assert not json.loads((place / "run" / "run.json").read_text())["stages"][name]["done"]
    assert not (place / "run" / ("model" if name == "align" else name)).exists()
    # The same command goes on from there and ends in the same way; a run of its own with other settings does not.
    assert train("run", stage(name, logging_steps=50)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == error
    refused(capsys, ["train", "--config", "run.yaml", "--output_dir", "run", f"--{name}.learning_rate", "1e-5"], "different run")
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert train("run", stage(name, logging_steps=50)) == 0  # what broke it is gone: it is finished from where it stood
    assert train("whole", stage(name, logging_steps=50)) == 0
    final = "model" if name == "align" else name
    assert same_weights(place / "run" / final, place / "whole" / final)


@pytest.mark.parametrize("name", list(STAGES))
def test_a_learning_rate_too_large_ends_each_stage_and_a_smaller_one_elsewhere_does_not(
    place: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("run", stage(name, learning_rate=1e14)) == 2
    assert "a smaller learning rate (now 1e+14)" in capsys.readouterr().err.splitlines()[-1]
    assert all(map(all_finite, (place / "run" / STAGES[name]).glob("checkpoint-*")))
    assert train("other", stage(name)) == 0
    assert all_finite(place / "other" / ("model" if name == "align" else name))


def test_a_row_that_cannot_be_learnt_is_named_by_the_supervised_stages(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from isdaa.training.trainer.finite_steps import FiniteSteps

    original: Any = FiniteSteps.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        if self.state.global_step == 1 and len(self.watch.losses) == 2:
            self.watch.losses[-1] = loss * NAN
        return loss

    monkeypatch.setattr(FiniteSteps, "training_step", training_step)
    for name, file in (("sft", "sft.jsonl"), ("reward", "pairs.jsonl")):
        assert train(f"run-{name}", stage(name, batch_size=2, gradient_accumulation_steps=2)) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        # Of the step's four rows, the two of the micro-batch whose loss is not finite.
        assert "step 2: the loss is not finite (nan), in rows " in error and error.count(f"{file}:") == 2


def test_a_learning_rate_of_the_largest_kind_leaves_no_half_finished_record(place: Path) -> None:
    assert train("run", stage("align", learning_rate=1e30, save_steps=1)) == 2
    assert not list((place / "run" / "checkpoints").glob("checkpoint-*"))
    assert train("run", stage("align")) == 0  # nothing was left: its settings may be mended in place


def test_a_checkpoint_that_is_not_finite_is_never_the_newest(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert train("whole", stage("align", save_steps=2)) == 0
    assert train("run", stage("align", save_steps=2)) == 0
    last = place / "run" / "checkpoints" / "checkpoint-6"
    tensors = load_file(last / "model.safetensors")
    tensors["lm_head.weight"][1, 1] = NAN  # as an earlier revision wrote them: whole, with a right manifest
    save_file(tensors, last / "model.safetensors", {"format": "pt"})
    write_manifest(last)
    assert files_not_finite(last) == ["lm_head.weight"]
    with caplog.at_level(logging.WARNING):
        assert newest_complete_checkpoint(last.parent) == str(last.parent / "checkpoint-4")
    assert "its weights are not finite: lm_head.weight); skipped" in caplog.text
    with pytest.raises(
        UserError, match=r"checkpoint-6: not a complete checkpoint \(its weights are not finite: lm_head.weight\)"
    ):
        data = with_reference(rows(), tiny_model())
        trainer_of(tiny_model(), place / "other", data, max_steps=9).train(resume_from_checkpoint=str(last))
    state = json.loads((place / "run" / "run.json").read_text())
    state["stages"]["align"]["done"] = False
    write_own(place / "run" / "run.json", state)
    assert train("run", stage("align", save_steps=2)) == 0
    assert same_weights(place / "run" / "model", place / "whole" / "model")


@pytest.mark.parametrize("kind", ["mask", "limit"])
def test_a_mask_or_a_limit_in_a_checkpoint_is_no_broken_weight(tmp_path: Path, kind: str) -> None:
    def model() -> Any:
        found = tiny_model()
        if kind == "mask":
            found.register_buffer("causal", torch.full((4, 4), -INF).triu(1))
        else:
            found.lm_head.cap = torch.nn.Parameter(torch.tensor(INF), requires_grad=False)
        return found

    data = with_reference(rows(), tiny_model())
    trainer_of(model(), tmp_path, data, max_steps=4, save_steps=2).train()
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    trainer = trainer_of(model(), tmp_path, data, max_steps=6, save_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6 and trainer._initial_global_step == 4


def test_a_loss_that_is_not_finite_before_the_first_update_is_not_put_down_to_the_learning_rate(place: Path, capsys: Any) -> None:
    model = load_model("my_model")
    model.lm_head.weight.data.mul_(3e37)  # finite weights whose logits are not
    model.save_pretrained("my_model")
    capsys.readouterr()
    assert train("run", stage("sft")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("isdaa: error: ")]
    assert "step 1: the loss is not finite" in line and "in row" in line and "learning rate" not in line
    assert "no update has been made yet: check these rows and the model" in line


def test_preference_trainer_ends_in_the_same_way(place: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 9, "logging_steps": 1, "save_steps": 1, "model_init_kwargs": {"dtype": "float16"}}
    args = PreferenceConfig("out", learning_rate=0.5, bf16=False, use_cpu=True, report_to="none", **settings)
    trainer = preference_trainer("half", args=args, train_dataset=plain_pairs(12))
    message = ended(trainer)
    assert "not finite" in message and "train_dataset:" in message and "(now float16)" in message
    assert all(loss > 0 for loss in logged(trainer))
    assert all(map(all_finite, (place / "out").glob("checkpoint-*")))


def test_preference_trainer_refuses_a_model_in_memory_that_is_not_finite(place: Path) -> None:
    from isdaa.models.loading import load_tokenizer

    model = load_model("my_model")
    break_a_weight(INF)(model)
    args = PreferenceConfig("out", use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(UserError, match=r"my_model: weights are not finite \(model.embed_tokens.weight\)"):
        preference_trainer(model, args=args, train_dataset=plain_pairs(4), processing_class=load_tokenizer("my_model"))


# --- the guard


GUARDED = stage("align") | {
    "guard.steps": 2,
    "guard.prompts": 4,
    "guard.opponent_samples": 1,
    "guard.max_new_tokens": 4,
    "guard.scorer": "me/letters",
    "data.eval_fraction": 0.4,
    "evaluation.bootstrap": 100,
    "evaluation.prompts": 2,
}


class Letters:
    name = digest = "letters"

    def __init__(self, broken: bool = False) -> None:
        self.broken, self.calls = broken, 0

    def score(self, rows: Any, progress: Any = None) -> list[float]:
        self.calls += 1
        if self.broken and self.calls > 2:
            raise UserError("scorer letters: the score of row 1 is nan, not a finite number; check the scorer")
        return [float(len(row["response"]) % 7) for row in rows]


def test_a_guard_that_sees_logits_that_are_not_finite_ends_the_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from isdaa.training.guard import measurement

    monkeypatch.setattr(guard, "load_scorer", lambda name, **kwargs: Letters())
    draw = measurement.Looks.draw_samples

    def broken(self: Any, model: Any, sampling: Any, purpose: str, *args: Any, **kwargs: Any) -> Any:
        if not purpose.endswith("/4"):
            return draw(self, model, sampling, purpose, *args, **kwargs)
        head = model.get_output_embeddings()
        hook = head.register_forward_hook(lambda module, inputs, logits: logits * NAN)
        try:
            return draw(self, model, sampling, purpose, *args, **kwargs)
        finally:
            hook.remove()

    monkeypatch.setattr(measurement.Looks, "draw_samples", broken)
    assert train("run", GUARDED, align__save_steps=1) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("isdaa: error: step 4: guard: sample guard/kl/4/")
    assert "NaN or infinite logits" in error and error.endswith(str(Path("run/checkpoints/checkpoint-3")))
    assert [line["step"] for line in read_lines(place / "run" / "metrics.jsonl") if "guard/kl" in line] == [2]
    assert not json.loads((place / "run" / "run.json").read_text())["stages"]["align"]["done"]


def test_a_guard_whose_scorer_gives_no_number_ends_the_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scorer = Letters(broken=True)
    monkeypatch.setattr(guard, "load_scorer", lambda name, **kwargs: scorer)
    assert train("run", GUARDED) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("isdaa: error: step 4: guard: scorer letters: the score of row 1 is nan")


# --- what is loaded


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_folder_whose_weights_are_not_finite_is_said_to_be_that(
    place: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    name = spoilt(place / "broken", value)
    words = f"broken: weights are not finite ({name})"
    judged = ["--data", "pairs.jsonl", "--scorer", "none"]
    first, second = (
        ["evaluate", "--model_path", m, "--reference", r, *judged] for m, r in (("broken", "my_model"), ("my_model", "broken"))
    )
    assert "not supported" not in refused(capsys, [*first, "--output", "one"], words)
    refused(capsys, [*second, "--output", "two"], words)
    benchmark = ["--questions", "world:small", "--judge", "gold", "--limit", "2"]
    refused(capsys, ["benchmark", "tldr", "--model_path", "broken", "--output", "three", *benchmark], words)
    refused(capsys, ["report", "--checkpoints", "broken", "--reference", "my_model", *judged, "--output", "four"], words)
    for which in STAGES:
        assert train(f"run-{which}", stage(which) | {"model.path": "broken"}) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert train("run", stage("align") | {"reference.path": "broken"}) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_an_adapter_a_reward_model_and_a_random_model_that_are_not_finite(place: Path) -> None:
    get_peft_model(load_model("my_model"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("adapter")
    name = spoilt(place / "bad adapter", NAN, "adapter")
    for merge in (True, False):
        with pytest.raises(UserError, match=r"^bad adapter: weights are not finite \(base_model.model.model.layers.0"):
            load_model("bad adapter", merge_adapter=merge)
    assert "lora" in name and all_finite(place / "adapter")
    load_sequence_classifier("my_model", new_head=True).save_pretrained("scorer")
    spoilt(place / "bad scorer", INF, "scorer")
    with pytest.raises(UserError, match=r"^bad scorer: weights are not finite \(score.weight\)"):
        load_sequence_classifier("bad scorer")
    with pytest.raises(UserError, match="model_type gpt2: weights are not finite"):
        random_model({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 1e38}, 0)


def test_finite_weights_whose_logits_are_not_are_told_from_a_model_that_is_not_supported() -> None:
    model = tiny_model().to(torch.bfloat16)  # type: ignore[arg-type]
    model.lm_head.weight.data.fill_(3e38)
    with pytest.raises(UserError, match=r"its logits are not finite .*too large for bfloat16") as error:
        prepare(model)
    assert "not supported" not in str(error.value)


def test_every_kind_of_tensor_is_asked() -> None:
    good = [torch.ones(3), torch.ones(3, dtype=torch.float16) * 60000, torch.full((4,), 1e30), torch.zeros(0), torch.arange(3)]
    good += [torch.ones(2, dtype=torch.float64) * 1e300, torch.empty(2, device="meta"), torch.ones(2).to(torch.float8_e4m3fn)]
    named = [(f"good {i}", tensor) for i, tensor in enumerate(good)]
    assert not_finite(named) == [] and not_finite([]) == []
    bad = [
        torch.tensor([1.0, value]).to(kind)
        for value in (NAN, INF, -INF)
        for kind in (torch.float16, torch.bfloat16, torch.float64)
    ]
    assert not_finite([*named, *((f"bad {i}", tensor) for i, tensor in enumerate(bad))]) == [f"bad {i}" for i in range(9)]


# --- figures are of the step that they name


def test_metrics_of_a_step_are_those_logged_at_it() -> None:
    history = [
        {"step": 2, "loss": 1.0, "rewards/margin": 0.5, "epoch": 0.1},
        {"step": 2, "eval_loss": 2.0},
        {"step": 3, "guard/kl": 0.25},
        {"step": 4, "loss": NAN, "rewards/margin": 0.75, "learning_rate": 0.1},
    ]
    assert metrics_at(history, 2) == {"loss": 1.0, "rewards/margin": 0.5, "eval/loss": 2.0}
    assert metrics_at(history, 3) == {"guard/kl": 0.25}
    assert metrics_at(history, 4) == {"rewards/margin": 0.75}
    assert metrics_at(history, 5) == {}


def test_records_and_cards_of_a_run_hold_the_figures_of_their_step_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "load_scorer", lambda name, **kwargs: Letters())
    settings = GUARDED | stage("align", save_steps=2, eval_steps=5, logging_steps=4) | {"guard.steps": 3, "guard.keep": "best"}
    assert train("run", settings | {"data.eval_fraction": 0.4}) == 0
    lines = read_lines(place / "run" / "metrics.jsonl")
    kinds = set()
    for folder in (*(place / "run" / "checkpoints").iterdir(), place / "run" / "model", place / "run" / "best"):
        record = read_record(folder)
        assert record is not None and record.step is not None
        here = [line for line in lines if line["step"] == record.step]
        logged_here = {key: value for line in here for key, value in line.items() if "/" in key or key == "loss"}
        assert record.metrics.items() <= logged_here.items()
        if folder.name != "best":  # it is written between the guard's look and the step's own log
            assert record.metrics.keys() == logged_here.keys() and "loss" in record.metrics
        kinds.add(("loss" in record.metrics, "eval/loss" in record.metrics, "guard/kl" in record.metrics))
        card = (folder / "README.md").read_text()
        assert f"## Training metrics, logged at step {record.step}\n" in card
        assert ("| loss |" in card) == ("loss" in record.metrics)
    assert {(True, False, False), (True, True, True), (False, False, True)} == kinds


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_the_records_of_the_supervised_stages_are_of_the_last_step(place: Path, name: str) -> None:
    assert train("run", stage(name, max_steps=5, logging_steps=3, gradient_accumulation_steps=1)) == 0
    record = read_record(place / "run" / name)
    assert record is not None and record.step == 5 == record.metrics["step"] and record.metrics["loss"] > 0


# --- weights of pairs


@pytest.mark.parametrize("weight", [1.1e6, -0.5, INF, NAN, "1e7", 10**400])
def test_a_weight_of_a_pair_that_is_none_is_an_error_of_its_row(
    place: Path, weight: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_given = plain_pairs(12)
    rows_given[4]["weight"] = weight
    jsonl(place / "pairs.jsonl", rows_given)
    assert train("run", stage("align")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "pairs.jsonl:5: " in error
    assert "'weight'" in error or weight in (INF, NAN)  # these two are no JSON in the first place


def test_a_weight_of_a_million_is_one(place: Path) -> None:
    jsonl(place / "pairs.jsonl", plain_pairs(12, weight=[1e6] * 12))
    assert train("run", stage("align", max_steps=1)) == 0
    for wrong in (1.1e6, -1.0, INF):
        with pytest.raises(ValueError, match="row 2: weight is"):
            TokenisedPairs(token_rows(4, weight=[1.0, 0.0, wrong, 1e6]))
