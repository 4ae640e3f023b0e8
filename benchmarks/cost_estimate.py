"""GPU-hours and price of the paper's two experiments, estimated from their configurations: the tables of docs/reproduction.md.

    python benchmarks/cost_estimate.py
    python benchmarks/cost_estimate.py --price 2.2 --mfu 0.4
    python benchmarks/cost_estimate.py --measured docs/results/gpu_step.json      # your own GPU instead of assumptions

An estimate, not a measurement: operations by arithmetic, over assumed shares of a GPU's peak. Operations are those of
`_gpu_model.flops_of`, which also count for the MFU of `gpu_step.py`: six for each weight of the layers and token, each prompt
counted once, and for each weight of the head and response token; a third of it without gradients. What is computed again
(gradient checkpointing), casts, the optimiser and communication are inside the MFU.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _gpu_model import LLAMA_3B, flops_of
from shapes import Lengths, Size

from isdaa.config import Config, load_config
from isdaa.errors import UserError
from isdaa.experiments.grid import cells_of, load_sweep, tasks_of
from isdaa.foreign import read_json

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# The body of Llama 3.1 8B. As a reward model it has no head over the vocabulary, so `parameters` fits it as it does tied ones.
LLAMA_8B = Size(128_256, hidden=4096, intermediate=14_336, layers=32, heads=32, kv_heads=8, positions=131_072)
BYTES_A_WEIGHT = 16  # fp32 weight, gradient and two moments of AdamW


@dataclass(frozen=True)
class Data:
    """A split for training: rows as the data set's card says; mean tokens of prompt and response, assumed."""

    rows: int
    prompt: int
    response: int
    held_out: int = 0  # pairs of the split that is evaluated on, or of these rows, where `data.eval_pairs` names none
    shape: str = "tldr"  # of gpu_step.py, whose measurement fits best


# Lengths: TL;DR's as in `shapes.py`; the others from bytes a row on the cards, at 4.4 bytes a token, with a chat template.
DATA = {
    "tldr posts": Data(116_722, 330, 38, held_out=2334),
    "tldr pairs": Data(92_858, 330, 38),
    "ultrachat": Data(207_865, 300, 1000, shape="chat"),
    "ultrafeedback": Data(61_135, 200, 280, held_out=2000, shape="chat"),
    "hh_chat": Data(112_052, 230, 75, held_out=12_451, shape="chat"),
}


@dataclass(frozen=True)
class Assumed:
    """What stands between operations and hours."""

    peak: float = 989.0  # bf16, 10¹² operations a second: an H100 SXM by its data sheet
    mfu: float = 0.30
    peak_fp32: float = 67.0
    share_fp32: float = 0.60
    step_ms: float = 30.0  # of sampling: a token for each row of the batch
    start_seconds: float = 60.0  # to start a process and load a model
    price: float = 3.0  # dollars a GPU-hour
    measured: Mapping[str, float] | None = None  # shape -> MFU, in place of `mfu`


@dataclass(frozen=True)
class Work:
    """What one step of an experiment computes. flops: in bf16 with the MFU of `shape`; fp32: outside autocast."""

    name: str
    flops: float = 0.0
    fp32: float = 0.0
    sampling_steps: float = 0.0
    starts: int = 1
    shape: str = "tldr"
    size: Size | None = None  # of what is trained

    def hours(self, given: Assumed) -> float:
        """GPU-hours."""
        mfu = (given.measured or {}).get(self.shape, given.mfu)
        seconds = self.flops / (given.peak * 1e12 * mfu) + self.fp32 / (given.peak_fp32 * 1e12 * given.share_fp32)
        return (seconds + self.sampling_steps * given.step_ms / 1000 + self.starts * given.start_seconds) / 3600

    def times(self, count: int) -> Work:
        """The same, `count` times over."""
        flops, fp32, sampled = (count * value for value in (self.flops, self.fp32, self.sampling_steps))
        return replace(self, flops=flops, fp32=fp32, sampling_steps=sampled, starts=count * self.starts)

    def __add__(self, other: Work) -> Work:
        """Both, one after the other, under the name and shape of the first."""
        sums = {key: getattr(self, key) + getattr(other, key) for key in ("flops", "fp32", "sampling_steps", "starts")}
        return replace(self, **sums)


def tldr(folder: Path) -> Iterator[tuple[Work, int]]:
    """(one run of a step, how many runs) of the TL;DR study."""
    posts, pairs = DATA["tldr posts"], DATA["tldr pairs"]
    yield sft("SFT", load_config(folder / "sft.yaml"), posts), 1
    gold = load_config(folder / "gold.yaml")
    both = [_whole(pairs)] * 2  # the reward model reads a pair as two rows, each with its prompt
    yield Work("gold reward model", gold.reward.epochs * pairs.rows * flops_of(LLAMA_8B, both), size=LLAMA_8B), 1
    yield labelling("label", load_config(folder / "label.yaml"), posts), 1
    run, last, runs = _grid(folder / "sweep.yaml", posts)
    yield replace(run, name="grid: training and evaluation"), runs
    yield replace(last, name="win rate against the data's summaries, two models a run"), runs


def instruct(folder: Path) -> Iterator[tuple[Work, int]]:
    """(one run of a step, how many runs) of instruction following."""
    yield sft("SFT on UltraChat", load_config(folder / "sft.yaml"), DATA["ultrachat"]), 1
    for name, data in (("ultrafeedback", DATA["ultrafeedback"]), ("hh", DATA["hh_chat"])):
        run, _, runs = _grid(folder / f"{name}-sweep.yaml", data)
        yield replace(run, name=f"{name} grid: training and evaluation"), runs


EXPERIMENTS = {"TL;DR": ("tldr", tldr), "Instruction following": ("instruct", instruct)}


def sft(name: str, config: Config, data: Data) -> Work:
    """Supervised fine-tuning."""
    return Work(name, config.sft.epochs * data.rows * flops_of(LLAMA_3B, [(data.prompt, data.response, 0)]), **_of(data))


def labelling(name: str, config: Config, data: Data) -> Work:
    """Samples and their scores in fp32; behaviour logps as training computes them."""
    settings = config.label
    responses = settings.samples * data.rows
    fp32 = data.rows * _forward(LLAMA_3B, (data.prompt, 0, 0)) + responses * _forward(LLAMA_8B, _whole(data))
    logps = responses // 2 * _forward(LLAMA_3B, _pair(data))
    steps = math.ceil(responses / settings.batch_size) * settings.max_new_tokens
    return Work(name, logps, fp32, steps, starts=2)


def alignment(config: Config, data: Data) -> Work:
    """Preference training. Reference logps are computed once and shared: a pass more in the first run, left out here."""
    return Work("align", config.align.epochs * _trained(config, data) * flops_of(LLAMA_3B, [_pair(data)]), **_of(data))


def evaluation(config: Config, data: Data) -> Work:
    """One checkpoint: samples for win rates and for KL, both models' logps of the latter, scores, held-out pairs."""
    settings = config.evaluation
    drawn = _sampled(config, data)
    own = 2 * _forward(LLAMA_3B, (drawn[0], 0, 0)) + _forward(LLAMA_3B, drawn) + _forward(LLAMA_8B, (sum(drawn), 0, 0))
    fp32 = settings.prompts * own + data.held_out * _forward(LLAMA_3B, _pair(data))
    batches = 2 * math.ceil(settings.prompts / settings.batch_size)
    return Work("evaluation", 0.0, fp32, batches * settings.max_new_tokens, shape=data.shape)


def checkpoints_of(config: Config, data: Data) -> int:
    """Models of one run that are evaluated."""
    batch = config.align.batch_size * config.align.gradient_accumulation_steps
    steps = math.ceil(config.align.epochs * math.ceil(_trained(config, data) / batch))
    return math.ceil(steps / (config.align.save_steps or math.ceil(steps / 10)))


def table(works: Sequence[tuple[Work, int]], given: Assumed) -> Iterator[str]:
    """One experiment as Markdown."""
    yield "| step | runs | bf16, 10¹⁸ operations | fp32, 10¹⁸ | sampling steps | GB to train | GPU-hours a run | GPU-hours | $ |"
    yield "|---|---|---|---|---|---|---|---|---|"
    total = 0.0
    for work, runs in works:
        hours, every = work.hours(given), work.times(runs)
        total += runs * hours
        memory = f"{work.size.parameters * BYTES_A_WEIGHT / 1e9:.0f}" if work.size else "–"
        figures = [f"{every.flops / 1e18:.1f}", f"{every.fp32 / 1e18:.1f}", f"{every.sampling_steps:,.0f}", memory]
        figures += [f"{hours:.1f}", f"{runs * hours:.0f}", f"{runs * hours * given.price:,.0f}"]
        yield f"| {work.name} | {runs} | {' | '.join(figures)} |"
    yield f"| together | | | | | | | {total:.0f} | {total * given.price:,.0f} |"


def _grid(sweep: Path, data: Data) -> tuple[Work, Work, int]:
    """(one run of a sweep with all its checkpoints' evaluations, two evaluations more, runs)."""
    settings, config = load_sweep(sweep)
    runs = sum(task.cell is not None for task in tasks_of(settings, config, cells_of(settings, config)))
    once = evaluation(config, data)
    run = alignment(config, data) + once.times(checkpoints_of(config, data))
    return run, once.times(2), runs


def _trained(config: Config, data: Data) -> int:
    """Pairs that are left to train on."""
    return data.rows - (data.held_out if config.data.eval_pairs is None else 0)


def _of(data: Data) -> dict[str, Any]:
    return {"shape": data.shape, "size": LLAMA_3B}


def _pair(data: Data) -> Lengths:
    return data.prompt, data.response, data.response


def _whole(data: Data) -> Lengths:
    """Prompt and response of which no token's distribution over the vocabulary is needed."""
    return data.prompt + data.response, 0, 0


def _sampled(config: Config, data: Data) -> Lengths:
    return data.prompt, min(data.response, config.evaluation.max_new_tokens), 0


def _forward(size: Size, lengths: Lengths) -> float:
    return flops_of(size, [lengths]) / 3


def measured(path: Path) -> tuple[float, dict[str, float]]:
    """(peak, shape -> MFU of isdaa's fastest arm) of a file of `gpu_step.py`. Raises UserError for one that says neither."""
    found = read_json(path)
    if not isinstance(found, Mapping) or found.get("benchmark") != "gpu_step":
        raise UserError(f"--measured {path}: not a result of gpu_step.py")
    best = {}
    for cell in found["cells"]:
        shares = [told["mfu"] for arm, told in cell["arms"].items() if arm.startswith("isdaa") and told.get("mfu")]
        if shares:
            best[cell["shape"]] = max(shares)
    peak = found["machine"].get("peak_tflops")
    if not best or not peak:
        raise UserError(f"--measured {path}: no MFU in it (the device's peak is not known, or every arm failed); give --mfu")
    return float(peak), best


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables. Returns 0, or 2 for bad options."""
    parser = argparse.ArgumentParser(prog="cost_estimate.py", description=(__doc__ or "").splitlines()[0])
    defaults = Assumed()
    parser.add_argument("--price", type=float, default=defaults.price, help="dollars a GPU-hour")
    parser.add_argument("--mfu", type=float, default=defaults.mfu, help="share of the bf16 peak that training reaches")
    parser.add_argument("--peak", type=float, default=defaults.peak, help="bf16, 10¹² operations a second")
    parser.add_argument("--peak_fp32", type=float, default=defaults.peak_fp32, help="fp32, 10¹² operations a second")
    parser.add_argument("--step_ms", type=float, default=defaults.step_ms, help="milliseconds of a sampling step")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="of gpu_step.py: its peak and MFU instead")
    options = vars(parser.parse_args(argv))
    try:
        for name in ("price", "mfu", "peak", "peak_fp32", "step_ms"):
            if not (math.isfinite(options[name]) and options[name] > 0 and (name != "mfu" or options[name] <= 1)):
                raise UserError(f"--{name}: expected a number above 0{' up to 1' if name == 'mfu' else ''}, got {options[name]}")
        file = options.pop("measured")
        given = replace(defaults, **options)
        if file is not None:
            peak, shares = measured(file)
            given = replace(given, peak=peak, measured=shares)
    except UserError as error:
        print(f"cost_estimate.py: error: {error}", file=sys.stderr)
        return 2
    for title, (folder, steps) in EXPERIMENTS.items():
        print(f"{title}\n")
        print("\n".join(table(list(steps(CONFIGS / folder)), given)), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
