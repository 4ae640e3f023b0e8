"""PreferenceTrainer against TRL, against arithmetic, and with what users put around it."""

import json
import logging
import math
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import (
    EOS,
    VOCABULARY,
    arguments,
    largest_difference,
    logged,
    moved,
    tiny_model,
    token_rows,
    trainer_of,
    weights_of,
    with_reference,
)

from isdaa import Objective
from isdaa.config import AlignConfig
from isdaa.models.lora import add_lora
from isdaa.models.packed.forward import prepare
from isdaa.terminal import Bar
from isdaa.training.trainer import packing, preference_trainer
from isdaa.training.trainer.batches import TokenisedPairs
from isdaa.training.trainer.callbacks import MetricsFile
from isdaa.training.trainer.preference_trainer import PreferenceTrainer
from isdaa.training.trainer.training_arguments import total_steps, training_arguments


@pytest.fixture(scope="module")
def reference() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def pairs(reference: Any) -> TokenisedPairs:
    return with_reference(token_rows(12), reference)


def word_tokenizer() -> Any:
    """`w3` is token 3: TRL tokenises text, and must arrive at the ids of our rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    words = {"<pad>": 0, "<s>": 1, "<eos>": EOS} | {w: i for w, i in words.items() if i > 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", bos_token="<s>")


@pytest.mark.parametrize(
    ("trl_loss", "settings"),
    [
        ("sigmoid", {"loss": "logistic"}),
        ("hinge", {"loss": "hinge"}),
        ("ipo", {"loss": "squared", "length_normalized": True}),
    ],
)
def test_trl_computes_the_same_loss_and_gradient(
    trl_loss: str, settings: dict[str, Any], reference: Any, pairs: TokenisedPairs, tmp_path: Path
) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def text(ids: Any) -> str:
        return " ".join(f"w{i}" for i in ids if i != EOS)

    rows = [{k: text(pairs[i][f"{k}_ids"]) for k in ("prompt", "chosen", "rejected")} for i in range(len(pairs))]
    # The space keeps TRL's prompt a prefix of its prompt + response, and its EOS a token of its own.
    rows = [row | {k: f" {row[k]} <eos>" for k in ("chosen", "rejected")} for row in rows]
    theirs = moved(reference)
    args = DPOConfig(
        str(tmp_path), loss_type=[trl_loss], beta=0.4, per_device_train_batch_size=12, max_length=None,
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_dropout=True, report_to="none",
    )  # fmt: skip
    trl = DPOTrainer(
        theirs,
        ref_model=tiny_model(),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(),
    )
    batch = next(iter(trl.get_train_dataloader()))
    assert int(batch["completion_mask"].sum()) == sum(
        len(pairs[i][f"{k}_ids"]) for i in range(12) for k in ("chosen", "rejected")
    )
    expected = trl.compute_loss(theirs, batch)
    expected.backward()
    expected = expected.detach()

    ours = moved(reference)
    trainer = trainer_of(ours, tmp_path, pairs, objective=Objective(beta=0.4, weight="none", **settings), batch_size=12)
    micro, n = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    loss = trainer.training_step(ours, micro[0], n)
    assert float(loss) == pytest.approx(float(expected), rel=2e-5)
    gradients, others = ({n: p.grad for n, p in m.named_parameters()} for m in (ours, theirs))
    assert largest_difference(gradients, others) < 2e-5


def test_step_0_has_no_weight_but_1(reference: Any, pairs: TokenisedPairs, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_model(), tmp_path, pairs, batch_size=5, logging_steps=1)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-5)
    quantiles = [value for key, value in first.items() if key.startswith("weights/log_weight")]
    assert len(quantiles) == 6 and max(map(abs, quantiles)) <= 1e-3
    assert first["weights/ess"] == pytest.approx(1, abs=1e-5)
    assert first["start/drift_max"] <= 1e-3


def test_a_wrong_reference_is_said_aloud(
    reference: Any, pairs: TokenisedPairs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shifted = pairs.with_reference(*(pairs.floats[f"reference_{c}_logps"] + 0.2 for c in ("chosen", "rejected")))
    for data, own, expected in (
        (shifted, {}, True),
        (shifted, {"starts_at_reference": False}, False),
        (pairs, {}, False),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            trainer = trainer_of(tiny_model(), tmp_path, data, own=own, max_steps=1)
            trainer.train()
        assert ("BEFORE the first step" in caplog.text) is expected
        if own:
            assert "start/drift_mean" not in trainer.state.log_history[0]
        else:
            mean = 0.2 if data is shifted else 0
            assert trainer.state.log_history[0]["start/drift_mean"] == pytest.approx(-mean, abs=1e-3)


def test_figures_of_an_interval_by_hand(reference: Any, tmp_path: Path) -> None:
    """Steps of 4, 4 and 2 pairs, one interval, a policy that does not move: every figure from the logps alone."""
    data = with_reference(token_rows(10, seed=3), reference)
    policy = moved(reference)
    trainer = trainer_of(
        policy, tmp_path, data, objective=Objective(beta=0.5, weight="importance", clip_eps=0.2), learning_rate=0.0,
        batch_size=2, gradient_accumulation_steps=2, logging_steps=3, own={"starts_at_reference": False},
    )  # fmt: skip
    trainer.args.logging_first_step = False
    trainer.train()
    found = trainer.state.log_history[0]
    moved_pairs = with_reference(token_rows(10, seed=3), moved(reference))
    chosen, rejected = (torch.tensor(moved_pairs.floats[f"reference_{c}_logps"]) for c in ("chosen", "rejected"))
    d_w = chosen - torch.tensor(data.floats["reference_chosen_logps"])
    d_l = rejected - torch.tensor(data.floats["reference_rejected_logps"])
    log_weights = d_w + d_l
    weights = log_weights.clamp(max=0.4).exp()
    losses = -torch.nn.functional.logsigmoid(0.5 * (d_w - d_l))
    order = trainer.sampler.order(0)
    ess = [w.sum() ** 2 / (len(w) * (w**2).sum()) for w in weights[order].split(4)]
    lengths = [sum(len(data[i][f"{c}_ids"]) for i in range(10)) for c in ("chosen", "rejected")]
    expected = {
        # Each step's loss is the mean over its own pairs, so the last two pairs weigh more in the mean of steps.
        "loss": sum((weights * losses)[order][i : i + 4].mean() for i in (0, 4, 8)) / 3,
        "loss/unweighted": losses.mean(),
        "loss/weighted": (weights * losses).mean(),
        "loss/sft": 0.0,
        "rewards/chosen": 0.5 * d_w.mean(),
        "rewards/rejected": 0.5 * d_l.mean(),
        "rewards/margin": 0.5 * (d_w - d_l).mean(),
        "rewards/accuracy": (d_w > d_l).double().mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
        "drift/chosen": d_w.mean(),
        "drift/rejected": d_l.mean(),
        "drift/chosen_per_token": d_w.sum() / lengths[0],
        "drift/rejected_per_token": d_l.sum() / lengths[1],
        "weights/log_weight_mean": log_weights.mean(),
        "weights/log_weight_p05": log_weights.quantile(0.05),
        "weights/log_weight_p50": log_weights.quantile(0.5),
        "weights/log_weight_p95": log_weights.quantile(0.95),
        "weights/clip_fraction": (log_weights > 0.4).double().mean(),
        "weights/mean": weights.mean(),
        "weights/max": weights.max(),
        "weights/ess": sum(ess) / 3,
        "weights/capped": 0.0,
        "pairs_seen": 10,
    }
    assert 0 < expected["weights/clip_fraction"] < 1 and 0 < expected["rewards/accuracy"] < 1
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=2e-4, abs=1e-5), name
    assert found["time/pairs_per_second"] > 0


@pytest.mark.parametrize("weight", ["importance", "mean"])
def test_evaluation_by_hand(weight: str, reference: Any, pairs: TokenisedPairs, tmp_path: Path) -> None:
    held_out = with_reference(token_rows(9, seed=4, weight=[1.0, 2.0, 3.0] * 3), reference)
    objective = Objective(beta=0.5, weight=weight, sft_coefficient=0.1)
    file = MetricsFile(tmp_path / "metrics.jsonl")
    trainer = trainer_of(
        moved(reference), tmp_path, pairs, held_out, objective, max_steps=1, learning_rate=0.0,
        own={"starts_at_reference": False, "callbacks": [file]},
    )  # fmt: skip
    trainer.train()
    moved_pairs = with_reference(token_rows(9, seed=4), moved(reference))
    chosen, rejected = (torch.tensor(moved_pairs.floats[f"reference_{c}_logps"]) for c in ("chosen", "rejected"))
    d_w = chosen - torch.tensor(held_out.floats["reference_chosen_logps"])
    d_l = rejected - torch.tensor(held_out.floats["reference_rejected_logps"])
    own = (d_w + d_l).clamp(max=2.0).exp()
    weights = own if weight == "importance" else own.mean()
    losses = weights * -torch.nn.functional.logsigmoid(0.5 * (d_w - d_l)) - 0.5 * 0.1 * chosen
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
    assert found["step"] == 1 and found["epoch"] > 0
    expected = {
        "eval/loss": (losses * torch.tensor(held_out.floats["weight"])).mean(),
        "eval/rewards/accuracy": (d_w > d_l).double().mean(),
        "eval/rewards/margin": 0.5 * (d_w - d_l).mean(),
        "eval/drift/chosen": d_w.mean(),
        "eval/drift/rejected": d_l.mean(),
        "eval/weights/mean": own.mean(),
        "eval/weights/ess": own.sum() ** 2 / (9 * (own**2).sum()),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=2e-4, abs=1e-5), name
    # Outside of training, and with another batch size: the same.
    trainer.args.per_device_eval_batch_size = 2
    again = trainer.evaluate()
    for name in expected:
        assert again[name.replace("eval/", "eval_", 1)] == pytest.approx(found[name], rel=1e-5, abs=1e-6)


def test_an_objective_without_weights_logs_none(pairs: TokenisedPairs, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_model(), tmp_path, pairs, objective=Objective(weight="none"), max_steps=1)
    trainer.train()
    assert "loss/weighted" in trainer.state.log_history[0]
    assert not [key for key in trainer.state.log_history[0] if key.startswith("weights/")]


def test_training_raises_the_margin_and_behaviour_logps_are_the_denominator(reference: Any, tmp_path: Path) -> None:
    data = with_reference(token_rows(12), reference)
    trainer = trainer_of(tiny_model(), tmp_path, data, batch_size=12, epochs=12, logging_steps=1, optimizer="adamw")
    trainer.train()
    losses, accuracy = logged(trainer), logged(trainer, "rewards/accuracy")
    assert losses[-1] < 0.8 * losses[0] and accuracy[-1] > 0.9
    # One row with logps of its own: its log-weight alone differs.
    behaviour = {f"behaviour_{c}_logps": [None] * 11 + [-3.0] for c in ("chosen", "rejected")}
    own = with_reference(token_rows(12, **behaviour), reference)
    batch = own.batch(range(12))
    assert torch.equal(batch.behaviour_chosen_logps[:11], batch.reference_chosen_logps[:11])
    trainer = trainer_of(tiny_model(), tmp_path, own, batch_size=12, max_steps=1)
    trainer.train()
    logps = own.floats["reference_chosen_logps"][11] + own.floats["reference_rejected_logps"][11]
    assert logged(trainer, "weights/log_weight_mean")[0] == pytest.approx((logps + 6) / 12, rel=1e-4)


def test_gradient_checkpointing_changes_nothing(pairs: TokenisedPairs, tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        model = moved(tiny_model()).double()
        trainer = trainer_of(
            model, tmp_path, pairs, objective=Objective(weight="mean"), gradient_checkpointing=on, batch_size=3,
            gradient_accumulation_steps=2, optimizer="sgd", own={"starts_at_reference": False},
        )  # fmt: skip
        trainer.train()
        recomputed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
        assert bool(recomputed) is on
        found.append(weights_of(model))
    assert largest_difference(found[1], found[0]) < 1e-6


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("on", [False, True])
def test_gradient_checkpointing_computes_layers_again(rank: int, on: bool, pairs: TokenisedPairs, tmp_path: Path) -> None:
    model: Any = tiny_model()  # in evaluation mode, as models are loaded
    layer, calls = model.model.layers[0], []
    layer.input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    policy = add_lora(model, rank=rank) if rank else model
    trainer_of(policy, tmp_path, pairs, gradient_checkpointing=on, max_steps=2).train()
    assert len(calls) == (4 if on else 2)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop"])
def test_optimisers_by_name(optimizer: str, pairs: TokenisedPairs, tmp_path: Path) -> None:
    model = tiny_model()
    before = weights_of(model)
    trainer = trainer_of(model, tmp_path, pairs, optimizer=optimizer, max_steps=2, learning_rate=1e-3)
    trainer.train()
    assert largest_difference(weights_of(model), before) > 1e-5
    kind = type(trainer.optimizer.optimizer).__name__.lower()
    assert kind == optimizer
    group = trainer.optimizer.param_groups[0]
    assert group["lr"] == 1e-3 and group["weight_decay"] == 0
    assert optimizer != "adamw" or (group["eps"] == 1e-5 and group["betas"] == (0.9, 0.999))


def test_lora_trains_the_adapter_alone_and_resumes(reference: Any, pairs: TokenisedPairs, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def start(steps: int) -> PreferenceTrainer:
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")
        model = get_peft_model(tiny_model(), config)
        forward = prepare(model)
        trainer = trainer_of(model, tmp_path, pairs, own={"forward": forward}, save_steps=2, batch_size=4, optimizer="adamw")
        trainer.args.max_steps = steps
        return trainer

    trainer = start(4)
    before = weights_of(trainer.model)
    trainer.train()
    after = weights_of(trainer.model)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and all("lora_" in name for name in changed)
    assert logged(trainer)[0] == pytest.approx(math.log(2), rel=1e-5)  # the new adapter starts as nothing
    folder = tmp_path / "checkpoint-2"
    assert (folder / "adapter_model.safetensors").is_file()
    again = start(4)
    again.train(resume_from_checkpoint=str(folder))
    for name, value in weights_of(again.model).items():
        assert torch.equal(value, after[name]), name


def test_dropout_is_off(pairs: TokenisedPairs, tmp_path: Path) -> None:
    model = tiny_model(attention_dropout=0.5)
    trainer = trainer_of(model, tmp_path, pairs, batch_size=12)
    micro, n = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    losses = [float(trainer.training_step(model, micro[0], n)) for _ in range(2)]
    assert losses[0] == losses[1] == pytest.approx(math.log(2), rel=1e-5)
    assert model.training and model.config.attention_dropout == 0.5


def test_bfloat16_autocast_runs(reference: Any, pairs: TokenisedPairs, tmp_path: Path) -> None:
    model = tiny_model()
    trainer = trainer_of(model, tmp_path, pairs, precision="bfloat16", max_steps=2, learning_rate=1e-3)
    trainer.train()
    assert all(math.isfinite(loss) for loss in logged(trainer))
    # Autocast is really on: the fp32 reference is missed by more than fp32 would miss it.
    assert 1e-4 < logged(trainer, "start/drift_rms")[0] < 1
    assert next(model.parameters()).dtype == torch.float32


def test_training_arguments_are_what_the_config_says(tmp_path: Path) -> None:
    config = AlignConfig(
        batch_size=4, gradient_accumulation_steps=3, epochs=1.5, learning_rate=3e-6, warmup_steps=7, min_lr_ratio=0.2,
        optimizer="paged_adamw_8bit", max_grad_norm=0.5, weight_decay=0.1, seed=11, save_total_limit=3,
    )  # fmt: skip
    args = training_arguments(config, tmp_path, seed=1, pairs=1000, eval_pairs=10, use_cpu=True)
    assert (args.seed, args.data_seed, args.optim.value) == (11, 11, "paged_adamw_8bit")
    assert args.learning_rate == 3e-6 and args.warmup_steps == 7 and args.adam_epsilon == 1e-5
    assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.2} and args.max_grad_norm == 0.5 and args.weight_decay == 0.1
    assert total_steps(config, 1000) == 126 and args.save_steps == 13 and args.eval_steps == 13
    assert args.eval_strategy == "steps" and args.save_total_limit == 3 and args.report_to == []
    assert not args.bf16 and not args.remove_unused_columns and not args.logging_nan_inf_filter
    args = training_arguments(
        AlignConfig(max_steps=50, save_steps=20, eval_steps=5, report_to=["tensorboard"], precision="bfloat16"),
        tmp_path, seed=1, pairs=1000, use_cpu=True,
    )  # fmt: skip
    assert args.max_steps == 50 and args.save_steps == 20 and args.eval_strategy == "no" and args.bf16
    assert args.report_to == ["tensorboard"] and args.seed == 1


def test_learning_rate_falls_to_its_floor(pairs: TokenisedPairs, tmp_path: Path) -> None:
    trainer = trainer_of(
        tiny_model(), tmp_path, pairs, lr_scheduler="cosine_with_min_lr", min_lr_ratio=0.1, max_steps=20, batch_size=1,
        logging_steps=1, warmup_steps=4, learning_rate=1e-3,
    )  # fmt: skip
    trainer.train()
    rates = logged(trainer, "learning_rate")
    assert rates[0] == 0 and max(rates) == rates[4] == pytest.approx(1e-3) and 1e-4 <= rates[-1] < 1.2e-4


def test_pairs_without_reference_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reference"):
        trainer_of(tiny_model(), tmp_path, TokenisedPairs(token_rows(4)))
    with pytest.raises(ValueError, match="rejected_ids"):
        TokenisedPairs([{"prompt_ids": [1], "chosen_ids": [2]}])


def test_a_data_set_and_plain_rows_are_the_same_pairs(reference: Any) -> None:
    from datasets import Dataset

    behaviour = {f"behaviour_{c}_logps": [None, -2.0] * 5 for c in ("chosen", "rejected")}
    rows = token_rows(10, **behaviour, weight=[1.0] * 9 + [None])
    picked = Dataset.from_list([*rows, *token_rows(3, seed=8, **behaviour, weight=[9.0] * 3)]).select(range(10))
    one, other = TokenisedPairs(rows), TokenisedPairs(picked)
    assert one.content_digest() == other.content_digest()
    assert one.content_digest() != TokenisedPairs(rows[::-1]).content_digest()
    for a, b in ((one[i], other[i]) for i in range(10)):
        assert a.keys() == b.keys()
        for key in a:
            assert list(a[key]) == list(b[key]) if key.endswith("_ids") else a[key] == b[key]
    assert one.lengths().tolist() == [sum(len(row[f"{p}_ids"]) for p in ("prompt", "chosen", "rejected")) for row in rows]


def test_several_gpus_in_one_process_are_used_one_with_a_word(
    pairs: TokenisedPairs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = arguments(tmp_path, 12)
    args._n_gpu = 4
    model = tiny_model()
    with caplog.at_level(logging.WARNING):
        trainer = PreferenceTrainer(model, Objective(), args=args, forward=prepare(model, probe=False), train_dataset=pairs)
    assert trainer.args.n_gpu == 1 and "one of 4 GPUs" in caplog.text


def test_tokenizer_is_saved_with_a_checkpoint(pairs: TokenisedPairs, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    model = tiny_model()
    before = model.generation_config.to_dict()
    trainer = trainer_of(model, tmp_path, pairs, save_steps=1, max_steps=1, own={"tokenizer": tokenizer})
    trainer.train()
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path / "checkpoint-1")
    assert loaded("w5 w6 <eos>").input_ids == [5, 6, EOS]
    assert model.generation_config.to_dict() == before


def test_passes_of_a_few_seconds_change_no_figure_and_move_the_bar(
    reference: Any, pairs: TokenisedPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = with_reference(token_rows(9, seed=4), reference)
    found: list[dict[str, float]] = []
    moves: list[list[float]] = []
    for budget in (16_384, 25):
        for module in (preference_trainer, packing):
            monkeypatch.setattr(module, "pass_tokens", lambda model, budget=budget: budget)
        trainer = trainer_of(moved(reference), tmp_path, pairs, held_out, max_steps=1, logging_steps=1)
        assert trainer.batch_tokens == budget
        moves.append([])
        monkeypatch.setattr(
            Bar, "update", lambda self, n=1, **more: moves[-1].append(n) if "held-out" in self.description else None
        )
        found.append(trainer.evaluate())
        monkeypatch.setattr(Bar, "update", lambda self, n=1, **more: None)
        within: list[str] = []
        monkeypatch.setattr(trainer.progress, "within", lambda step, far="", within=within: within.extend(filter(None, [far])))
        trainer.train()
        found[-1] |= {key: value for key, value in trainer.state.log_history[-2].items() if "time" not in key}
        assert within[-1] == f"pass {len(within)} of {len(within)}" and (len(within) > 2) == (budget == 25)
    assert sum(moves[0]) == sum(moves[1]) == 9 and len(moves[1]) > len(moves[0])
    assert all(found[0][key] == pytest.approx(found[1][key], rel=1e-4, abs=1e-5) for key in found[0] if "time" not in key)


def test_weights_that_span_the_batch_are_not_paid_for_with_a_second_pass(
    reference: Any, pairs: TokenisedPairs, tmp_path: Path
) -> None:
    assert trainer_of(moved(reference), tmp_path, pairs).batch_tokens == 16_384
    spanning = Objective(weight="importance", normalize="batch")
    assert trainer_of(moved(reference), tmp_path, pairs, objective=spanning).batch_tokens is None
    assert trainer_of(moved(reference), tmp_path, pairs, own={"batch_tokens": 7}).batch_tokens == 7


def test_the_bar_is_closed_when_training_fails(pairs: TokenisedPairs, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_model(), tmp_path, pairs)

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        assert self.progress.bar is not None
        raise RuntimeError("no more memory")

    trainer.training_step = types.MethodType(fail, trainer)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no more memory"):
        trainer.train()
    assert trainer.progress.bar is None
