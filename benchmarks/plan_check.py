"""The plan of `isdaa inspect` against what `isdaa train` then needs on this CPU: peak memory and time a step.

    python benchmarks/plan_check.py --out docs/results/plan-check.json
    python benchmarks/plan_check.py --cases embedded tldr_lora

Each case is a configuration of one stage, `align` but for two. It is planned by `isdaa inspect --json` and trained for a few
steps by `isdaa train`, each in a process of its own. Measured are the process's peak memory (VmHWM) and the median time of a step
after the first (from `time/pairs_per_second` in metrics.jsonl; in stages that TRL trains, from one step's end to the next one's).
A ratio is planned / measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from _words import as_text, word_tokenizer
from shapes import SHAPES, draw_pairs

from isdaa.files import write_json, write_jsonl
from isdaa.foreign import read_json, read_jsonl
from isdaa.models.loading import random_model

WORDS = 160  # token ids of the embedded world's tokenizer, which the pairs are drawn from
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
EMBEDDED = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
TRAIN = """
import sys, time
from isdaa.cli import main
import transformers.trainer
ends = []
class Clock(transformers.TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        ends.append(time.perf_counter())
transformers.trainer.DEFAULT_CALLBACKS.append(Clock)
status = main(sys.argv[1:])
print("seconds", *(b - a for a, b in zip(ends, ends[1:])))
print("peak", dict(line.split(":", 1) for line in open("/proc/self/status"))["VmHWM"].split()[0])
sys.exit(status)
"""


@dataclass(frozen=True)
class Case:
    """A configuration. shape: of `shapes.SHAPES`; batch: rows; settings: beside the common ones."""

    shape: str
    model: dict[str, Any]
    batch: int
    steps: int = 7
    stage: str = "align"
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "embedded": Case("short", EMBEDDED, 32, 60, settings={"align": {"logging_steps": 10}}),
    "tldr": Case("tldr", LLAMA, 4),
    "tldr_checkpointing": Case("tldr", LLAMA, 4, settings={"align": {"gradient_checkpointing": True}}),
    "tldr_lora": Case("tldr", LLAMA, 4, settings={"lora": {"rank": 16}}),
    "tldr_lora_checkpointing": Case("tldr", LLAMA, 4, settings={"lora": {"rank": 16}, "align": {"gradient_checkpointing": True}}),
    "tldr_accumulating": Case("tldr", LLAMA, 2, settings={"align": {"gradient_accumulation_steps": 2}}),
    "chat": Case("chat", LLAMA, 2),
    "tldr_sft": Case("tldr", LLAMA, 6, stage="sft"),
    "tldr_reward": Case("tldr", LLAMA, 3, stage="reward"),
}


def configuration(case: Case, folder: Path) -> Path:
    """The case's files in a folder; the configuration's path."""
    accumulation = case.settings.get("align", {}).get("gradient_accumulation_steps", 1)
    count = case.batch * accumulation * case.steps + 4
    rows = draw_pairs(SHAPES[case.shape], WORDS, count, 0, longest=4096)
    settings = {"batch_size": case.batch, "max_steps": case.steps, "warmup_steps": 1, "logging_steps": 1, "learning_rate": 1e-5}
    settings |= {"save_steps": 1000, "eval_steps": 1000} if case.stage == "align" else {}
    config = {
        "output_dir": str(folder / "run"),
        "stages": [case.stage],
        "objective": {"method": "is_dpo", "beta": 0.1},
        "model": {"tokenizer": "world:small", "random": case.model},
        "data": {"pairs": str(folder / "pairs.jsonl"), "eval_fraction": 0.01},
        "tokenization": {"max_length": 4000, "max_prompt_length": 3000},
        case.stage: settings | case.settings.get(case.stage, {}),
        **{name: value for name, value in case.settings.items() if name != case.stage},
    }
    if case.stage == "sft":  # reads texts
        rows = [{"prompt": text["prompt"], "completion": text["chosen"]} for text in map(as_text, rows)]
        word_tokenizer(WORDS).save_pretrained(folder / "words")
        config["model"] = {"tokenizer": str(folder / "words"), "random": case.model}
        config["data"] = {"sft": str(folder / "pairs.jsonl")}
    if case.stage == "reward":  # begins with a model's files
        word_tokenizer(WORDS).save_pretrained(folder / "base")
        random_model(case.model, 0).save_pretrained(folder / "base")
        config["model"] = {"path": str(folder / "base")}
    write_jsonl(folder / "pairs.jsonl", rows)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def check(name: str, case: Case, folder: Path) -> dict[str, Any]:
    """Plan, train, compare."""
    config = configuration(case, folder)
    planned = json.loads(_run(["-m", "isdaa.cli", "inspect", "--config", str(config), "--device", "cpu", "--json"]))
    plan = planned["stages"][0]["plan"]
    out = _run(["-c", TRAIN, "train", "--config", str(config)])
    peak = int(out.rpartition("peak ")[2].split()[0]) * 1024
    accumulation = case.settings.get("align", {}).get("gradient_accumulation_steps", 1)
    if case.stage == "align":
        paces = [line["time/pairs_per_second"] for line in read_jsonl(folder / "run" / "metrics.jsonl") if "loss" in line]
        seconds = case.batch * accumulation / statistics.median(paces[1:])
    else:
        seconds = statistics.median(map(float, out.rpartition("seconds ")[2].splitlines()[0].split()))
    return {
        "case": name,
        "stage": case.stage,
        "shape": case.shape,
        "rows": case.batch * accumulation,
        "settings": case.settings,
        "parameters": plan["parameters"],
        "memory": {"planned": plan["peak"], "measured": peak, "ratio": plan["peak"] / peak},
        "step": {"planned": plan["step_seconds"], "measured": seconds, "ratio": plan["step_seconds"] / seconds},
        "phases": plan["phases"],
        "speed": plan["speed"],
    }


def _run(arguments: Sequence[str]) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", *arguments], capture_output=True, text=True, env={**os.environ})
    if done.returncode:
        raise SystemExit(f"plan_check.py: {' '.join(arguments[-4:])}: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each case. Returns 0."""
    parser = argparse.ArgumentParser(prog="plan_check.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON; other cases in it stay")
    options = parser.parse_args(argv)
    kept = read_json(options.out)["cases"] if options.out is not None and options.out.exists() else []
    found = [cell for cell in kept if cell["case"] not in options.cases]
    print("| case | memory planned | measured | ratio | step planned | measured | ratio |\n|---|---|---|---|---|---|---|")
    for name in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            cell = check(name, CASES[name], Path(folder))
        memory, step = cell["memory"], cell["step"]
        figures = [f"{memory['planned'] / 1e6:.0f} MB", f"{memory['measured'] / 1e6:.0f} MB", f"**{memory['ratio']:.2f}**"]
        figures += [f"{step['planned']:.3g} s", f"{step['measured']:.3g} s", f"**{step['ratio']:.2f}**"]
        print(f"| {name} | {' | '.join(figures)} |", flush=True)
        found.append(cell)
        if options.out is not None:
            write_json(options.out, {"benchmark": "plan_check", "machine": _machine(), "cases": found})
    return 0


def _machine() -> dict[str, Any]:
    import torch

    from isdaa.record import versions

    return {"threads": torch.get_num_threads(), "load": os.getloadavg()[0], "versions": versions()}


if __name__ == "__main__":
    sys.exit(main())
