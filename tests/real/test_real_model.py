"""A real pretrained model through every step: SmolLM2-135M-Instruct, dequantised from Q4_1.

`make test-real` runs this, not CI: it takes about a quarter of an hour on two idle cores. 40 pairs of plain English chat.
"""

from __future__ import annotations

import html
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import ROOT, config_file, finish, read_lines, same_weights, start, without_time
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from isdaa.cli import main
from isdaa.config import AlignConfig
from isdaa.data.reading.sources import load_pairs
from isdaa.data.tokenize_pairs import TokenizationSettings, tokenize_pairs
from isdaa.models.gguf import get_model
from isdaa.models.loading import load_model, load_tokenizer
from isdaa.models.packed.forward import prepare
from isdaa.objectives.objective import Objective
from isdaa.objectives.presets import resolve
from isdaa.training.trainer.batches import GlobalBatchSampler, TokenisedPairs
from isdaa.training.trainer.preference_trainer import PreferenceTrainer
from isdaa.training.trainer.reference_logps import reference_logps
from isdaa.training.trainer.training_arguments import training_arguments

pytestmark = pytest.mark.real

PAIRS = Path(__file__).with_name("pairs.jsonl")
END = 2  # <|im_end|>, which is also the padding token
LORA = {"lora.rank": 8, "lora.alpha": 16, "lora.target_modules": ["q_proj", "v_proj", "lm_head"], "align.learning_rate": 2e-4}
METHODS = {"full": {}, "lora": LORA}


@pytest.fixture(scope="session")
def model() -> Path:
    return get_model("smollm2-135m", ROOT / "models" / "smollm2-135m")


def settings(model: Path) -> dict[str, Any]:
    return {
        "stages": ["align"],
        "model.path": str(model),
        "data.pairs": str(PAIRS),
        "data.eval_fraction": 0.2,
        "objective.method": "is_dpo",
        "objective.beta": 0.1,
        "tokenization.max_length": 256,
        "tokenization.max_prompt_length": 192,
        "align.batch_size": 8,
        "align.learning_rate": 2e-5,
        "align.warmup_steps": 1,
        "align.save_steps": 2,
        "align.logging_steps": 1,
        "evaluation.prompts": 8,
        "evaluation.max_new_tokens": 32,
        "evaluation.opponent_samples": 1,
    }


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was killed as soon as its first checkpoint stood, beside one that was left alone."""
    folder = tmp_path_factory.mktemp(request.param)
    for name in ("killed", "whole"):
        config_file(folder / name / "run.yaml", {**settings(model), **METHODS[request.param]})
    process = start(folder / "killed")
    while not list((folder / "killed" / "run").glob("checkpoints/checkpoint-*")):
        assert process.poll() is None, (folder / "killed" / "log.txt").read_text()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finish(folder / "killed", seconds=1800)
    finish(folder / "whole", seconds=1800)
    return folder / "killed" / "run"


def test_every_pair_is_read_and_every_response_ends_with_its_turn(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in settings(model).items()]
    assert main(["inspect", *options, "--no_plan", "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert stage["rows"]["kept"] == 32  # the other eight are held out
    rows, _ = load_pairs(str(PAIRS))
    pairs, _ = tokenize_pairs(rows, load_tokenizer(model), TokenizationSettings(256, 192))
    assert all(row[name][-1] == END for row in pairs for name in ("chosen_ids", "rejected_ids"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row, pair in zip(rows, pairs, strict=True):
        text = tokenizer.apply_chat_template([*row["prompt"], *row["chosen"]], tokenize=False)
        assert tokenizer.decode([*pair["prompt_ids"], *pair["chosen_ids"]]) + "\n" == text


def test_killed_and_resumed_it_is_the_run_left_alone(run: Path) -> None:
    whole = run.parents[1] / "whole" / "run"
    assert same_weights(run / "model", whole / "model")
    assert without_time(run / "metrics.jsonl") == without_time(whole / "metrics.jsonl")


def test_what_is_saved_is_what_was_trained(run: Path) -> None:
    """Plain transformers, row by row, finds the held-out accuracy and margin that training logged last."""
    last = [line for line in read_lines(run / "metrics.jsonl") if "eval/rewards/accuracy" in line][-1]
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    trained = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "smollm2-135m", dtype=torch.float32)
    rows, _ = load_pairs(str(run / "eval_pairs.jsonl"))
    pairs, _ = tokenize_pairs(rows, tokenizer, TokenizationSettings(256, 192))
    margins = []
    for row in pairs:
        gains = [logp(trained, row, name) - logp(reference, row, name) for name in ("chosen_ids", "rejected_ids")]
        margins.append(gains[0] - gains[1])
    assert sum(margin > 0 for margin in margins) / len(margins) == pytest.approx(last["eval/rewards/accuracy"])
    assert 0.1 * sum(margins) / len(margins) == pytest.approx(last["eval/rewards/margin"], abs=2e-3)


@torch.no_grad()
def logp(model: Any, row: Any, name: str) -> float:
    prompt, response = list(row["prompt_ids"]), list(row[name])
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())


def test_evaluate_and_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model_path", str(run)]) == 0
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert len(metrics["models"]) == 2
    assert all(entry["kl"]["mean"] > 0 for entry in metrics["models"])
    assert main(["report", str(run)]) == 0
    page = html.unescape((run / "report" / "report.html").read_text(encoding="utf-8"))
    assert "No verdict" in capsys.readouterr().out
    first = read_lines(run / "eval_pairs.jsonl")[0]
    assert first["prompt"][-1]["content"] in page and "'role'" not in page  # conversations as conversations


# ---------------------------------------------------------------------------------------------------------------------
# The peer


class Losses(TrainerCallback):
    """What `training_step` returned, step by step."""

    def attach(self, trainer: Any) -> list[float]:
        found: list[float] = []
        original = trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            loss = original(*args, **kwargs)
            found.append(float(loss))
            return loss

        trainer.training_step = training_step
        return found


def test_losses_are_those_of_trl(model: Path, tmp_path: Path) -> None:
    """Same pairs, order and settings, through TRL's own chat pipeline; but for the newline after <|im_end|>, which it scores."""
    steps, batch = 5, 4
    common = {"beta": 0.1, "lr": 2e-5}
    tokenizer = load_tokenizer(model)
    rows, _ = load_pairs(str(PAIRS))
    rows = rows.select(range(steps * batch))
    pairs, _ = tokenize_pairs(rows, tokenizer, TokenizationSettings(256, 192))

    policy = load_model(model)
    forward = prepare(policy, longest_row=256)
    arguments = training_arguments(
        AlignConfig(
            batch_size=batch, max_steps=steps, learning_rate=common["lr"], lr_scheduler="constant", warmup_steps=0,
            adam_epsilon=1e-8, logging_steps=1,
        ),
        tmp_path / "ours", seed=3, pairs=len(rows), use_cpu=True,
    )  # fmt: skip
    order = GlobalBatchSampler(len(rows), batch, 1, 1, 0, 3).order(0).tolist()
    laid = [row for _, row in sorted(zip(order, pairs, strict=True), key=lambda both: both[0])]
    known = TokenisedPairs(laid)
    known = known.with_reference(*reference_logps(forward, known, key={}, cache_dir=None))
    objective = Objective(**resolve("dpo", beta=common["beta"]))
    ours = PreferenceTrainer(policy, objective, args=arguments, forward=forward, train_dataset=known)
    our_losses = Losses().attach(ours)
    ours.train()

    theirs_tokenizer = AutoTokenizer.from_pretrained(model)
    template = theirs_tokenizer.chat_template
    cut = template.replace("'<|im_end|>' + '\n'", "'<|im_end|>' + ('\n' if add_generation_prompt or not loop.last else '')")
    assert cut != template
    theirs_tokenizer.chat_template = cut
    theirs = DPOTrainer(
        model=str(model),
        args=DPOConfig(
            output_dir=str(tmp_path / "theirs"), max_steps=steps, beta=common["beta"], learning_rate=common["lr"],
            lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, adam_epsilon=1e-8, max_grad_norm=1.0, bf16=False,
            per_device_train_batch_size=batch, gradient_checkpointing=False, precompute_ref_log_probs=True, max_length=None,
            train_sampling_strategy="sequential", save_strategy="no", report_to="none", use_cpu=True, logging_steps=1,
        ),
        train_dataset=Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]),
        processing_class=theirs_tokenizer,
    )  # fmt: skip
    for own, row in zip(pairs, theirs.train_dataset, strict=True):
        assert all(list(own[name]) == row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    their_losses = Losses().attach(theirs)
    theirs.train()
    assert len(our_losses) == len(their_losses) == steps
    assert our_losses == pytest.approx(their_losses, abs=1e-4)
    assert our_losses[-1] < our_losses[0]
