"""Whole runs in miniature, through the door that users take: configurations, models and files of a few kilobytes."""

from __future__ import annotations

import gc
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from patience import HANGS
from safetensors.torch import load_file
from tokenizers_for_tests import byte_level
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from isdaa.cli import main
from isdaa.training.trainer.preference_trainer import PreferenceTrainer

# The Trainer collects garbage at each start; without the imported libraries' objects this takes no time.
gc.freeze()

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
# The whole chain on the embedded world, in about two seconds.
CHAIN: dict[str, Any] = {
    "stages": ["sft", "label", "align"],
    "objective.method": "is_dpo",
    "objective.beta": 0.05,
    "model.tokenizer": "world:small",
    "model.random": TINY_LLAMA,
    "data.sft": "world:small",
    "data.prompts": "world:small",
    "data.evaluation": "world:small",
    "data.eval_fraction": 0.1,
    "data.limit": 48,
    "tokenization.max_length": 128,
    "tokenization.max_prompt_length": 96,
    "sft.max_steps": 6,
    "sft.batch_size": 16,
    "sft.learning_rate": 1e-2,
    "sft.warmup_steps": 1,
    "label.scorer": "gold",
    "label.max_new_tokens": 10,
    "label.batch_size": 64,
    "align.max_steps": 6,
    "align.batch_size": 8,
    "align.learning_rate": 3e-3,
    "align.warmup_steps": 1,
    "align.save_steps": 2,
    "align.logging_steps": 1,
    "evaluation.scorer": "gold",
    "evaluation.prompts": 8,
    "evaluation.opponent_samples": 2,
    "evaluation.max_new_tokens": 10,
    "evaluation.bootstrap": 100,
}
# A few more steps and blocks than elsewhere, so that there is something to be killed in.
LONGER = CHAIN | {
    "data.limit": 200,
    "sft.max_steps": 30,
    "label.max_new_tokens": 24,
    "align.max_steps": 30,
    "align.save_steps": 2,
    "align.logging_steps": 3,
}
# Alignment alone, of the model in `my_model` on a file.
ALIGN: dict[str, Any] = {
    "model.path": "my_model",
    "data.pairs": "pairs.jsonl",
    "data.eval_fraction": 0.2,
    "tokenization.max_length": 200,
    "tokenization.max_prompt_length": 120,
    "objective.beta": 0.1,
    "align.max_steps": 2,
    "align.batch_size": 4,
    "align.learning_rate": 1e-3,
    "align.warmup_steps": 1,
    "align.save_steps": 2,
    "align.logging_steps": 1,
    "align.probe": False,
    "evaluation.prompts": 4,
    "evaluation.max_new_tokens": 6,
    "evaluation.opponent_samples": 1,
    "evaluation.bootstrap": 100,
}


def config_file(path: Path, settings: dict[str, Any]) -> Path:
    """A YAML file of dotted settings."""
    nested: dict[str, Any] = {}
    for dotted, value in settings.items():
        *sections, last = dotted.split(".")
        place = nested
        for name in sections:
            place = place.setdefault(name, {})
        place[last] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(nested), encoding="utf-8")
    return path


def train(output_dir: Path | str, settings: dict[str, Any], **changes: Any) -> int:
    """`isdaa train` with a YAML file beside the output folder. Dots in the names of `changes` are written as `__`."""
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    file = config_file(Path(f"{output_dir}.yaml"), {**settings, **dotted})
    return main(["train", "--config", str(file), "--output_dir", str(output_dir)])


def start(folder: Path) -> subprocess.Popen[bytes]:
    """`isdaa train` on the folder's `run.yaml` in a process group of its own, that a test may kill."""
    command = [sys.executable, "-m", "isdaa.cli", "train", "--config", str(folder / "run.yaml"), "--output_dir", "run"]
    log = open(folder / "log.txt", "ab")  # noqa: SIM115 - the process writes into it
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def finish(folder: Path, seconds: float = HANGS) -> None:
    """The same to its end."""
    assert start(folder).wait(timeout=seconds) == 0, (folder / "log.txt").read_text()


def stopped_at(step: int, settings: dict[str, Any], output_dir: Path | str = "run") -> None:
    """Train until Ctrl-C in the middle of a step of `align` (from 0), behind the checkpoint of the steps before."""
    original = PreferenceTrainer.training_step

    def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreferenceTrainer, "training_step", stopping)
        assert train(output_dir, settings) == 130


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], *words: str) -> str:
    """The one line of an error: status 2, no traceback, all the words in it."""
    capsys.readouterr()
    status = main(argv)
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("isdaa: error: ")]
    assert status == 2, lines
    assert len(errors) == 1, lines
    assert lines[-1] == errors[0], lines
    assert not any("Traceback" in line for line in lines)
    for word in words:
        assert word in errors[0], errors[0]
    return errors[0]


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder and a digest of what is in it; locks say nothing."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def jsonl(path: Path, rows: list[Any]) -> Path:
    """Rows as JSON Lines; a row given as text is written as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def chat_model(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Save a Llama of a few thousand parameters with a byte-level chat tokenizer. Its responses end after a few tokens."""
    tokenizer = tokenizer or byte_level("chatml")
    torch.manual_seed(seed)
    settings = {**TINY_LLAMA, "vocab_size": len(tokenizer), "initializer_range": 0.1, "tie_word_embeddings": False, **changes}
    settings |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in settings.items() if k != "model_type"}))
    vocabulary = tokenizer.get_vocab()
    ends = [vocabulary["<|im_end|>"], vocabulary["<|end_of_text|>"]]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0  # carried through the residual stream: a constant for the head
        model.lm_head.weight[[i for i in ends if i < model.config.vocab_size], 0] += 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def plain_pairs(count: int, **columns: Any) -> list[dict[str, Any]]:
    """Pairs of short texts with different prompts."""
    fruits = ("an apple", "a pear", "a plum", "some figs", "a quince")
    return [
        {
            "prompt": f"Question {i}: what is in basket {i}?",
            "chosen": f"In it you find {fruits[i % 5]}.",
            "rejected": f"No idea, {i}!",
            **{name: values[i] for name, values in columns.items()},
        }
        for i in range(count)
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    """Whether two model folders hold the same tensors, bit for bit."""
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_time(path: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` but for what no two runs share."""
    return [{key: value for key, value in line.items() if "time/" not in key} for line in read_lines(path)]
