"""How long do the samples and the KL of one checkpoint's evaluation take, and how long with `model.generate` and full logits?

    python benchmarks/evaluation_pass.py --threads 2 --out docs/results/evaluation-pass

The work: N held-out posts of the embedded world, one sample of the policy each at temperature 1, then logps of policy and
reference and the KL of their next-token distributions. Two ways take turns, so that other load meets both:

* ours: `isdaa.models.sampling.sampling.sample`, which keeps the policy's states, and
  `isdaa.evaluation.checkpoints.kl.divergences`;
* plain: `model.generate(do_sample=True, top_k=0)` on batches in the order of the posts, padded on the left, and then each model
  on the padded rows, logits of all positions, log-softmax of both. The same number of rows a batch.

Without --model_path the stages sft, label and align of --config are run first (about a minute), their models kept in --cache.
Seconds are wall clock; a ratio compares the two turns of one round. The table shows medians and, of ratios, the range.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isdaa.config import load_config
from isdaa.data.encoder import token_settings
from isdaa.data.reading.sources import load_prompts
from isdaa.evaluation.checkpoints.kl import KL_SETTINGS, divergences
from isdaa.evaluation.checkpoints.sample_and_kl import tokenize
from isdaa.models.loading import load_model, load_tokenizer
from isdaa.models.packed.forward import PairForward, prepare
from isdaa.models.sampling.sampling import SamplingSettings, sample
from isdaa.training.run_stages import run

Row = tuple[list[int], list[int]]  # ids of a prompt and of its response
States = list[Tensor | None]  # of the policy at its samples, per row
STEPS = ("sampling", "kl", "both")


@dataclass
class Work:
    """Models and prompts. Each way has copies of the models for itself: ours go through `prepare`."""

    prompts: list[list[int]]
    stop: set[int]
    pad: int
    limit: int
    batch: int
    ours: tuple[PairForward, PairForward]  # policy, reference
    plain: tuple[Any, Any]


def trained(config: Path, cache: Path) -> tuple[str, str]:
    """Paths of a policy and its reference from the config's own stages; what the cache holds already is reused."""
    folder = run(load_config(config, {"output_dir": str(cache)}))
    return str(folder / "model"), str(folder / "sft")


def load_work(policy: str, reference: str, config: Path, count: int, batch: int | None = None) -> Work:
    """The first `count` held-out prompts of the config, and both models twice."""
    settings = load_config(config)
    tokenizer = load_tokenizer(policy)
    chosen = settings.evaluation.model_copy(update={"prompts": count})
    assert settings.data.evaluation is not None
    rows, _ = load_prompts(settings.data.evaluation, "test", limit=count)
    prompts = tokenize(rows, tokenizer, chosen, token_settings(settings.tokenization))
    (stop,) = prompts.stop.values()
    return Work(
        [row["prompt_ids"] for row in prompts.rows],
        stop,
        tokenizer.pad_token_id,
        chosen.max_new_tokens,
        batch or chosen.batch_size,
        (prepare(load_model(policy)), prepare(load_model(reference))),
        (load_model(policy), load_model(reference)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Two ways to do it


def our_samples(work: Work, seed: int) -> tuple[list[Row], States]:
    """One response a prompt by the project's sampler."""
    keys = [f"kl/0/{i}" for i in range(len(work.prompts))]
    settings = SamplingSettings(**KL_SETTINGS, max_new_tokens=work.limit)
    arguments = (settings, work.stop, work.pad, seed, keys, work.batch)
    drawn = sample(work.ours[0].model, work.prompts, *arguments, with_states=True)
    rows = [(prompt, response.ids) for prompt, response in zip(work.prompts, drawn, strict=True)]
    return rows, [response.states for response in drawn]


def our_kl(work: Work, rows: Sequence[Row], states: States) -> Tensor:
    """(3, N): policy logps, reference logps, KL."""
    found = divergences(*work.ours, rows, states)
    return torch.tensor([[record[name] for record in found] for name in ("policy_logps", "reference_logps", "kl")])


def plain_samples(work: Work, seed: int) -> tuple[list[Row], States]:
    """One response a prompt by `model.generate`."""
    torch.manual_seed(seed)
    rows: list[Row] = []
    for batch in _slices(work.prompts, work.batch):
        width = max(map(len, batch))
        ids = torch.tensor([[work.pad] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        # top_k=0: generate's own 50 would cut the tail of the policy's distribution, and there is no KL of what is left.
        drawn = work.plain[0].generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=work.limit,
            eos_token_id=sorted(work.stop),
            pad_token_id=work.pad,
        )
        rows += [(prompt, _until(response, work.stop)) for prompt, response in zip(batch, drawn[:, width:].tolist(), strict=True)]
    return rows, []


def _until(ids: list[int], stop: set[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in stop), len(ids) - 1)
    return ids[: end + 1]


@torch.no_grad()
def plain_kl(work: Work, rows: Sequence[Row], states: States) -> Tensor:
    """(3, N): policy logps, reference logps, KL, from padded rows and logits of every position."""
    parts = []
    for batch in _slices(rows, work.batch):
        width = max(len(prompt) + len(response) for prompt, response in batch)
        padding = [width - len(prompt) - len(response) for prompt, response in batch]
        ids = torch.tensor([[*prompt, *response] + [work.pad] * n for (prompt, response), n in zip(batch, padding, strict=True)])
        mask = torch.tensor([[1] * (width - n) + [0] * n for n in padding])
        answered = torch.zeros(len(batch), width - 1)
        for row, (prompt, response) in enumerate(batch):
            answered[row, len(prompt) - 1 : len(prompt) + len(response) - 1] = 1
        policy, reference = (
            model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1) for model in work.plain
        )
        targets = ids[:, 1:, None]
        logps = [(logps.gather(-1, targets)[..., 0] * answered).sum(1) for logps in (policy, reference)]
        kl = ((policy.exp() * (policy - reference)).sum(-1) * answered).sum(1)
        parts.append(torch.stack([*logps, kl]))
    return torch.cat(parts, 1)


def _slices(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

Sampler = Callable[[Work, int], tuple[list[Row], States]]
Measure = Callable[[Work, Sequence[Row], States], Tensor]
WAYS: dict[str, tuple[Sampler, Measure]] = {
    "ours": (our_samples, our_kl),
    "plain": (plain_samples, plain_kl),
}


def measure(work: Work, rounds: int) -> list[dict[str, Any]]:
    """Per round and way: seconds of sampling, of the KL pass and of both, tokens sampled, mean KL. The order alternates."""
    for samples, kl in WAYS.values():  # first calls set things up: probes, memory
        kl(work, *samples(work, 0))
    found = []
    for number in range(rounds):
        ways = list(WAYS.items()) if number % 2 else list(WAYS.items())[::-1]
        result: dict[str, Any] = {}
        for name, (samples, kl) in ways:
            started = time.perf_counter()
            rows, states = samples(work, number)
            sampled = time.perf_counter()
            values = kl(work, rows, states)
            done = time.perf_counter()
            result[name] = {
                "sampling": sampled - started,
                "kl": done - sampled,
                "both": done - started,
                "tokens": sum(len(response) for _, response in rows),
                "mean_kl": float(values[2].mean()),
            }
        result["ratio"] = {step: result["plain"][step] / result["ours"][step] for step in STEPS}
        found.append(result)
    return found


def table(results: Mapping[int, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: medians over rounds, ratios with their range."""
    lines = ["| prompts | step | plain, s | ours, s | plain / ours |", "|---|---|---|---|---|"]
    for count, rounds in results.items():
        for step in STEPS:
            plain, ours = (statistics.median(found[way][step] for found in rounds) for way in ("plain", "ours"))
            ratios = [found["ratio"][step] for found in rounds]
            low, high = min(ratios), max(ratios)
            lines.append(
                f"| {count} | {step} | {plain:.2f} | {ours:.2f} | {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f}) |"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, writes both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", help="policy; needs --reference, too")
    parser.add_argument("--reference")
    parser.add_argument("--config", type=Path, default=Path("configs/mini/demo.yaml"))
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks/evaluation_pass"), help="run folder of the models")
    parser.add_argument("--prompts", type=int, nargs="+", default=[256, 2000])
    parser.add_argument("--batch_size", type=int, help="rows a batch; the config's where it is not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="path without suffix; .json and .md are written")
    arguments = parser.parse_args(argv)
    if (arguments.model_path is None) != (arguments.reference is None):
        parser.error("--model_path and --reference go together")
    torch.set_num_threads(arguments.threads)
    policy, reference = arguments.model_path, arguments.reference
    if policy is None:
        policy, reference = trained(arguments.config, arguments.cache)
    results = {}
    for count in arguments.prompts:
        work = load_work(policy, reference, arguments.config, count, arguments.batch_size)
        results[len(work.prompts)] = measure(work, arguments.rounds)
    text = table(results)
    print(text)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "batch_size": work.batch,
            "max_new_tokens": work.limit,
        }
        settings |= {"torch": torch.__version__}
        content = {"settings": settings, "results": results}
        arguments.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        arguments.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
