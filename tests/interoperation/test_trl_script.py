"""A TRL user's script becomes one of isdaa by the replacements of docs/migrating.md, and computes the same."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import ROOT, chat_model, jsonl, plain_pairs
from interoperation_rows import MESSAGES
from tokenizers_for_tests import byte_level

MIGRATING = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `([^`]+)` \| (?:`([^`]+)`|nothing) \|$", re.MULTILINE)

SCRIPT = """
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

model = AutoModelForCausalLM.from_pretrained("my_model")
ref_model = AutoModelForCausalLM.from_pretrained("sft_model")
tokenizer = AutoTokenizer.from_pretrained("my_model")
dataset = load_dataset("json", data_files={"train": "pairs.jsonl", "test": "held_out.jsonl"})
training_args = DPOConfig(
    output_dir="out",
    loss_type="sigmoid",
    beta=0.2,
    learning_rate=0.05,
    lr_scheduler_type="constant",
    optim="sgd",
    per_device_train_batch_size=6,
    per_device_eval_batch_size=4,
    gradient_accumulation_steps=2,
    max_steps=3,
    max_length=256,
    eval_strategy="steps",
    eval_steps=3,
    logging_steps=1,
    save_steps=3,
    use_cpu=True,
    bf16=False,
    seed=7,
    precompute_ref_log_probs=True,
    dataset_num_proc=1,
    report_to="none",
)
trainer = DPOTrainer(
    model,
    ref_model,
    args=training_args,
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    processing_class=tokenizer,
    peft_config=None,
)
trainer.train()
trainer.save_model("out/final")
"""
LORA = {
    "peft_config=None": 'peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")',
    "    ref_model,\n": "",
    "learning_rate=0.05": "learning_rate=2.0",
}


def replacements() -> dict[str, str]:
    """The table 'In a script' of the document: what to write for what."""
    section = MIGRATING.partition("## A script")[2].partition("\n## ")[0]
    return dict(ROW.findall(section))


def translated(script: str) -> str:
    """The script with every replacement made; what is to be left out goes with its comma and line."""
    for theirs, ours in replacements().items():
        script = script.replace(theirs, ours) if ours else re.sub(rf"\n *{re.escape(theirs)},", "", script)
    return script


def run(script: str) -> Any:
    names: dict[str, Any] = {}
    exec(compile(script, "script.py", "exec"), names)
    return names["trainer"]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run scripts in. Llama's template writes nothing after the end of a turn, which TRL would score."""
    tokenizer = byte_level("llama3")
    chat_model(tmp_path / "my_model", tokenizer)
    chat_model(tmp_path / "sft_model", tokenizer, seed=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def text_rows() -> list[dict[str, Any]]:
    return [{"prompt": r["prompt"], "chosen": f" {r['chosen']}", "rejected": f" {r['rejected']}"} for r in plain_pairs(16)]


def implicit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next(folder.glob("*model.safetensors")))


def compare(desk: Path, script: str, eval_limit: float = 1e-5) -> tuple[Any, Any]:
    """Both trainers after their run, whose losses and weights agree."""
    theirs = run(script)
    shutil.move(desk / "out", desk / "theirs")
    ours = run(translated(script))
    for key, limit in (("loss", 1e-5), ("eval_loss", eval_limit), ("grad_norm", 1e-4)):
        expected = [entry[key] for entry in theirs.state.log_history if key in entry]
        found = [entry[key] for entry in ours.state.log_history if key in entry]
        assert found == pytest.approx(expected, rel=limit), key
        assert len(found) == (1 if key == "eval_loss" else 3)
    one, other = weights(desk / "theirs" / "final"), weights(desk / "out" / "final")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=2e-6)
    return theirs, ours


@pytest.mark.parametrize(
    ("loss", "rows"),
    [
        ('loss_type="sigmoid"', text_rows()),
        ('loss_type="hinge"', text_rows()),
        ('loss_type="ipo"', [*MESSAGES, *MESSAGES[:4]]),
        ('loss_type="sigmoid_norm"', implicit([*MESSAGES, *MESSAGES[:4]])),
        ("use_weighting=True", text_rows()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_script_computes_what_it_computed(desk: Path, loss: str, rows: list[dict[str, Any]]) -> None:
    jsonl(desk / "pairs.jsonl", rows[:12])
    jsonl(desk / "held_out.jsonl", rows[12:])
    script = SCRIPT.replace('loss_type="sigmoid"', loss)
    theirs, ours = compare(desk, script)
    first = ours.state.log_history[0]
    assert abs(first["rewards/margin"]) > 1e-3  # policy and reference differ from the start
    for key in ("logps/chosen", "logps/rejected"):
        assert first[key] == pytest.approx(theirs.state.log_history[0][key], rel=1e-5)
    assert (desk / "out" / "final" / "isdaa.json").is_file()


def test_a_script_with_lora_and_no_reference(desk: Path) -> None:
    jsonl(desk / "pairs.jsonl", text_rows()[:12])
    jsonl(desk / "held_out.jsonl", text_rows()[12:])
    script = SCRIPT
    for old, new in LORA.items():
        assert old in script
        script = script.replace(old, new)
    # Of a new adapter most gradients are near rounding, and Adam makes whole steps of them: 2e-5 on some processors.
    compare(desk, script, eval_limit=1e-4)
    names = weights(desk / "out" / "final").keys()
    assert names and all("lora_" in name for name in names)


def test_the_table_is_needed_and_used() -> None:
    # Every row changes the script, or one with another loss.
    losses = ('loss_type="sigmoid"', 'loss_type="hinge"', 'loss_type="ipo"', 'loss_type="sigmoid_norm"', "use_weighting=True")
    scripts = "".join(SCRIPT.replace(losses[0], loss) for loss in losses)
    assert len(replacements()) >= 10
    unused = [theirs for theirs in replacements() if theirs not in scripts]
    assert not unused
    changed = translated(scripts)
    assert "trl" not in changed
    assert "DPO" not in changed
