"""One arm of the GPU benchmark in a process of its own: `python _gpu_arms.py JOB RESULT`, two JSON files.

All arms train the same pairs in the same order, from random weights in bf16, with fused AdamW whose moments are bf16, too,
clipping, and reference logps that were computed beforehand; nothing is recomputed unless asked for.

* isdaa_*: `PreferenceTrainer` with one way of attention each. isdaa_compiled: the default way and compiled layers.
* trl: `DPOTrainer`, attention by FlashAttention where `flash_attn` is installed, else SDPA. `padding_free` is switched off
  in TRL 1.16, Liger is deprecated there. On a GPU its head scores response tokens alone, like the other arms'.
* flash_pref: that package's `shared_prefix` in a loop by hand; its head, too, gets response tokens alone, which is more
  than a user of it has. It needs transformers < 4.52, and therefore a Python of its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _gpu_model import attention_with_padding, machine, make_model, pairs_of, synchronize, task, timed
from torch import Tensor

BETA, LEARNING_RATE, SEED = 0.1, 1e-6, 17


class Steps:
    """Clock and memory of an arm's steps; the first `warmup` do not count."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.device, self.warmup = job["device"], job["warmup"]
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.peak: int | None = None

    def start(self) -> None:
        """Everything is prepared."""
        self.step(None)

    def step(self, loss: float | Tensor | None) -> None:
        """A step is done."""
        import time

        synchronize(self.device)
        self.ends.append(time.perf_counter())
        if loss is not None:
            self.losses.append(float(loss.detach() if isinstance(loss, Tensor) else loss))
        if self.device == "cuda":
            if len(self.ends) == self.warmup + 1:
                torch.cuda.reset_peak_memory_stats()
            self.peak = torch.cuda.max_memory_allocated()

    def told(self) -> dict[str, Any]:
        """What came out."""
        seconds = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        return {"seconds": seconds[self.warmup :], "losses": self.losses, "peak_bytes": self.peak}


def main(job_file: str, result_file: str) -> None:
    """Run the job; what went wrong is part of the result."""
    job = json.loads(Path(job_file).read_text())
    try:
        result = ARMS[job["arm"]](job)
    except Exception as error:
        traceback.print_exc()
        memory = isinstance(error, torch.cuda.OutOfMemoryError)
        result = {"failed": "out of memory" if memory else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    Path(result_file).write_text(json.dumps(result))


def _rows(job: dict[str, Any]) -> list[dict[str, list[int]]]:
    return pairs_of(_task(job), job["batch_size"] * (job["warmup"] + job["rounds"]), job["seed"])


def _task(job: dict[str, Any]) -> Any:
    return task(job["shape"], job["tiny"], job["dtype"])


def _model(job: dict[str, Any], attention: str) -> Any:
    return make_model(_task(job).size, getattr(torch, job["dtype"]), job["device"], attention)


def _watched(trainer: Any, steps: Steps) -> None:
    """Lets `steps` see each step of a Trainer, after the work of all other callbacks."""
    from transformers import TrainerCallback

    original, last = trainer.training_step, []

    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        loss = original(*args, **kwargs)
        last[:] = [loss.detach()]
        return loss

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            steps.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps.step(last[0])

    trainer.training_step = training_step
    trainer.add_callback(Watch())


# ---------------------------------------------------------------------------------------------------------------------


def isdaa(job: dict[str, Any], attention: str, compiled: bool = False) -> dict[str, Any]:
    """`PreferenceTrainer`, set up as `isdaa train` does it."""
    from transformers.trainer_utils import SaveStrategy

    from isdaa.config import AlignConfig
    from isdaa.models.attention import gpu_attention
    from isdaa.models.attention.layout import Layout
    from isdaa.models.packed.forward import prepare
    from isdaa.objectives.objective import Objective
    from isdaa.objectives.presets import resolve
    from isdaa.training.trainer.batches import GlobalBatchSampler, TokenisedPairs
    from isdaa.training.trainer.preference_trainer import PreferenceTrainer
    from isdaa.training.trainer.reference_logps import reference_logps
    from isdaa.training.trainer.training_arguments import training_arguments

    rows, steps, batch = _rows(job), Steps(job), job["batch_size"]
    model = _model(job, "sdpa")
    lengths = [(len(r["prompt_ids"]), len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
    forward = prepare(model, longest_row=max(p + max(c, r) for p, c, r in lengths), attention=attention)
    if forward.mode != "shared_prefix":
        raise RuntimeError(f"isdaa chose the mode {forward.mode} for this model")
    if compiled:
        gpu_attention.compile_layers(model)
    precision = "bfloat16" if job["dtype"] == "bfloat16" else "float32"
    order = GlobalBatchSampler(len(rows), batch, 1, 1, 0, SEED).order(0).tolist()  # it permutes: lay the rows accordingly
    rows = [row for _, row in sorted(zip(order, rows, strict=True), key=lambda both: both[0])]
    pairs = TokenisedPairs(rows)
    references = reference_logps(forward, pairs, key={}, cache_dir=None, precision=precision)
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(
            AlignConfig(
                batch_size=batch, max_steps=len(rows) // batch, learning_rate=LEARNING_RATE, lr_scheduler="constant",
                warmup_steps=0, logging_steps=10, precision=precision, gradient_checkpointing=job["checkpointing"],
            ),
            folder, seed=SEED, pairs=len(rows), use_cpu=job["device"] == "cpu",
        )  # fmt: skip
        args.save_strategy = SaveStrategy.NO
        trainer = PreferenceTrainer(
            model, Objective(**resolve("dpo", beta=BETA)), args=args, forward=forward,
            train_dataset=pairs.with_reference(*references),
        )  # fmt: skip
        _watched(trainer, steps)
        trainer.train()
    layout = Layout.of_pairs(*(torch.tensor(part) for part in zip(*lengths[:batch], strict=True)))
    ids = torch.zeros(layout.tokens, dtype=torch.long, device=job["device"])
    with torch.no_grad():
        forward(model, ids, None, layout)
    return {**steps.told(), "attention": layout.cached("attention", lambda: "?")}


def trl(job: dict[str, Any]) -> dict[str, Any]:
    """`DPOTrainer` at its best settings."""
    from _words import as_text, word_tokenizer
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows, steps, batch = _rows(job), Steps(job), job["batch_size"]
    attention = attention_with_padding(job["device"])
    recompute = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if job["checkpointing"] else {}
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder, max_steps=len(rows) // batch, per_device_train_batch_size=batch, beta=BETA,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, logging_steps=10,
            bf16=job["dtype"] == "bfloat16", max_length=None, train_sampling_strategy="sequential", save_strategy="no",
            report_to="none", use_cpu=job["device"] == "cpu", seed=SEED, optim="adamw_torch_fused", disable_tqdm=True,
            precompute_ref_log_probs=True, gradient_checkpointing=job["checkpointing"], **recompute,
        )  # fmt: skip
        trainer = DPOTrainer(
            model=_model(job, attention), args=args, train_dataset=Dataset.from_list([as_text(row) for row in rows]),
            processing_class=word_tokenizer(_task(job).size.vocabulary),
        )  # fmt: skip
        dataset: Any = trainer.train_dataset
        for row, own in zip(rows, dataset, strict=True):
            if any(own[name] != ids for name, ids in row.items()):
                raise RuntimeError("TRL's token ids are not those of the other arms")
        _watched(trainer, steps)
        trainer.train()
    return {**steps.told(), "attention": attention}


def flash_pref(job: dict[str, Any]) -> dict[str, Any]:
    """`flash_pref.shared_prefix` around forward and backward, in a loop by hand."""
    from flash_pref import shared_prefix

    rows, steps, batch = _rows(job), Steps(job), job["batch_size"]
    attention = attention_with_padding(job["device"])
    model = _model(job, attention)
    if job["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    batches = [_padded(rows[i : i + batch], job["device"]) for i in range(0, len(rows), batch)]

    def logps(ids: Tensor, mask: Tensor, predicting: Tensor, owner: Tensor) -> Tensor:
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1][predicting]
        found = torch.log_softmax(model.lm_head(hidden).float(), -1).gather(1, ids[:, 1:][predicting][:, None])[:, 0]
        return found.new_zeros(len(ids)).index_add(0, owner, found)

    references = []
    with torch.no_grad():
        for ids, mask, *rest in batches:
            with shared_prefix(model, input_ids=ids, attention_mask=mask, interleaved=True):
                references.append(logps(ids, mask, *rest))
    steps.start()
    for (ids, mask, *rest), reference in zip(batches, references, strict=True):
        with shared_prefix(model, input_ids=ids, attention_mask=mask, interleaved=True):
            chosen, rejected = (logps(ids, mask, *rest) - reference).chunk(2)
            loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        steps.step(loss)
    return {**steps.told(), "attention": attention}


def _padded(rows: Sequence[dict[str, list[int]]], device: str) -> list[Tensor]:
    """Ids and mask (2B, L) of the chosen rows and then the rejected ones; (2B, L − 1) which positions predict a response
    token, and (N,) whose it is."""
    both = [(row["prompt_ids"], row[name]) for name in ("chosen_ids", "rejected_ids") for row in rows]
    width = max(len(prompt) + len(response) for prompt, response in both)
    ids = torch.zeros(len(both), width, dtype=torch.long)
    mask, predicting = torch.zeros_like(ids), torch.zeros(len(both), width - 1, dtype=torch.bool)
    for i, (prompt, response) in enumerate(both):
        end = len(prompt) + len(response)
        ids[i, :end], mask[i, :end] = torch.tensor(prompt + response), 1
        predicting[i, len(prompt) - 1 : end - 1] = True
    return [x.to(device) for x in (ids, mask, predicting, predicting.nonzero()[:, 0])]


# ---------------------------------------------------------------------------------------------------------------------


def parts(job: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward of attention in one layer, and of the head, each way by itself: median seconds."""
    from isdaa.models.attention import attention_choice, gpu_attention
    from isdaa.models.attention.layout import Layout
    from isdaa.models.attention.shared_prefix import shared_prefix_attention
    from isdaa.models.packed.logprobs import LinearHead, token_logps

    size, device, dtype = _task(job).size, job["device"], getattr(torch, job["dtype"])
    rows = _rows(job)[: job["batch_size"]]
    lengths = [torch.tensor([len(row[f"{part}_ids"]) for row in rows]) for part in ("prompt", "chosen", "rejected")]
    layout, found = Layout.of_pairs(*lengths), {}
    heads = (size.heads, size.kv_heads, size.kv_heads)
    inputs = [torch.randn(1, h, layout.tokens, size.head_dim, device=device, dtype=dtype, requires_grad=True) for h in heads]
    for way in (attention_choice.SDPA, attention_choice.VARLEN, attention_choice.FLEX):
        module = torch.nn.Module()
        attention_choice.choose_attention(module, way)
        lack = gpu_attention.lacks(way, inputs[0], inputs[1], None) if way != attention_choice.SDPA else None

        def attend(module: torch.nn.Module = module) -> None:
            out, _ = shared_prefix_attention(module, *inputs, None, isdaa_layout=layout)
            torch.autograd.grad(out.sum(), inputs)

        fast = (
            None
            if lack
            else attention_choice.fast_attention(module, *inputs[:2], dropout=0.0, scaling=None, window=None, softcap=None)
        )
        if way == attention_choice.SDPA or fast is not None:
            found[f"attention {way}"] = _median(attend, job)
        else:
            found[f"attention {way}"] = lack or "it failed its proof"
    hidden = torch.randn(layout.tokens - int(lengths[0].sum()), size.hidden, device=device, dtype=dtype, requires_grad=True)
    head = LinearHead(torch.randn(size.vocabulary, size.hidden, device=device, dtype=dtype, requires_grad=True))
    targets = torch.randint(0, size.vocabulary, (len(hidden),), device=device)

    def score(function: Callable[..., Any]) -> None:
        logps = function(hidden, head, targets)
        torch.autograd.grad((logps[0] if isinstance(logps, tuple) else logps).sum(), (hidden, head.weight))

    found["head chunked"] = _median(lambda: score(token_logps), job)
    return {"parts": found}


def _median(function: Callable[[], None], job: dict[str, Any]) -> float:
    for _ in range(job["warmup"]):
        function()
    return sorted(timed(function, job["device"]) for _ in range(job["rounds"]))[job["rounds"] // 2]


ARMS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "machine": lambda job: machine(job["device"], getattr(torch, job["dtype"])),
    "parts": parts,
    "isdaa_varlen": lambda job: isdaa(job, "varlen"),
    "isdaa_flex": lambda job: isdaa(job, "flex"),
    "isdaa_sdpa": lambda job: isdaa(job, "sdpa"),
    "isdaa_compiled": lambda job: isdaa(job, "auto", compiled=True),
    "trl": trl,
    "flash_pref": flash_pref,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
