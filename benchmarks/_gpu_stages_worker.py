"""One cell of `gpu_stages.py` in a process of its own: `python _gpu_stages_worker.py JOB RESULT`, two JSON files.

The stages are those that `isdaa train` and `isdaa evaluate` run. Around some of their functions there is a clock and a look at
the peak of the device's memory; nothing is left out but, where the cell does not say `saves`, the writing of checkpoints and
of the final model.
"""

from __future__ import annotations

import json
import resource
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _gpu_model import flops_of, machine, synchronize
from _gpu_stages import (
    BASE,
    CELLS,
    JUDGE,
    POLICY,
    SCALES,
    TRAINING,
    WARMUP,
    Cell,
    Scale,
    config_of,
    embedded_config,
    lengths,
    prepare,
    tokens_a_row,
)

from isdaa.config import Config
from isdaa.foreign import read_json

GIB = 2**30
NOT_ALLOCATED = ("CUDA", "program and data", "fragmentation")  # parts of a plan that are not PyTorch's


class Phases:
    """Seconds and peak memory of the parts of a stage; parts do not lie inside each other."""

    def __init__(self, device: str) -> None:
        self.device, self.peak, self.reserved = device, 0, 0
        self.found: dict[str, dict[str, Any]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """One part, or a further piece of it."""
        self._look()
        started = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self.device)
            entry = self.found.setdefault(name, {"seconds": 0.0, "calls": 0, "peak_gib": None})
            entry["seconds"] += time.perf_counter() - started
            entry["calls"] += 1
            peak = self._look()
            if peak is not None:
                entry["peak_gib"] = max(entry["peak_gib"] or 0.0, peak / GIB)

    def of(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as a part."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return measured

    def _look(self) -> int | None:
        """Bytes at most since the last look."""
        synchronize(self.device)
        if self.device != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated()
        self.peak, self.reserved = max(self.peak, peak), max(self.reserved, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()
        return peak

    def told(self) -> dict[str, Any]:
        """All of it, with the peak of the whole process."""
        self._look()
        if self.device == "cuda":
            memory = {"peak_gib": self.peak / GIB, "reserved_gib": self.reserved / GIB}
        else:
            memory = {"resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
        return {"phases": self.found, **memory}


class Steps:
    """When the steps of a Trainer end, and the memory that it begins with."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.before: float | None = None

    def callback(self) -> type:
        """A callback that every Trainer takes."""
        from transformers import TrainerCallback

        steps = self

        class Watch(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                steps.tick()
                if steps.device == "cuda":
                    steps.before = torch.cuda.memory_allocated() / GIB

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                steps.tick()

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                if "loss" in (logs or {}):
                    steps.losses.append(logs["loss"])

        return Watch

    def tick(self) -> None:
        """Now."""
        synchronize(self.device)
        self.ends.append(time.perf_counter())

    def told(self, cell: Cell, scale: Scale, peak_tflops: float | None) -> dict[str, Any]:
        """Rows and tokens a second in the median step."""
        seconds = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        median = statistics.median(seconds[WARMUP:])
        rows = scale.rows_a_step
        drawn = lengths(cell, scale)
        flops = flops_of(scale.size, drawn) / (len(drawn) / (2 if cell.stage == "reward" else 1)) * rows
        return {
            "rows_a_step": rows,
            "examples_per_second": rows / median,
            "tokens_per_second": rows * tokens_a_row(cell, scale) / median,
            # An adapter needs no gradients of the weights beneath it: fewer operations, which nobody has counted here.
            "mfu": flops / median / 1e12 / peak_tflops if peak_tflops and not cell.lora else None,
            "step_seconds": seconds,
            "losses": self.losses,
            "before_training_gib": self.before,
        }


def main(job_file: str, result_file: str) -> None:
    """Do the job; what went wrong is part of the result."""
    job = json.loads(Path(job_file).read_text())
    try:
        result = do(job)
    except Exception as error:
        traceback.print_exc()
        result = {"failed": _why(error), "out_of_memory": _of_memory(error)}
    Path(result_file).write_text(json.dumps(result))


def do(job: dict[str, Any]) -> dict[str, Any]:
    """One job: `machine` (and the model and data, where asked for), or a cell."""
    scale, device, folder = SCALES[job["model"]], job["device"], Path(job["folder"])
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if job["cell"] == "machine":
        memory = torch.cuda.mem_get_info()[1] / GIB if device == "cuda" else None
        found = {**machine(device, dtype), "memory_gib": memory}
        if job["prepare"]:
            prepare(folder / "prepared", scale, device)
        return found
    cell = next(cell for cell in CELLS if cell.name == job["cell"])
    from isdaa.terminal import quiet_libraries

    quiet_libraries()
    if cell.stage == "embedded":
        return embedded(embedded_config(scale, folder / "embedded"))
    precision = "bfloat16" if device == "cuda" else "float32"
    config = config_of(cell, scale, folder / "prepared", folder / "run", job["batch"], precision)
    phases, steps = Phases(device), Steps(device)
    function = STAGES.get(cell.stage, train)
    result = function(config, cell, scale, phases, steps)
    if cell.stage in TRAINING:
        result |= {"batch": job["batch"], **steps.told(cell, scale, job.get("peak_tflops"))}
    return {**result, **phases.told(), "plan": planned(config, cell, device)}


# ---------------------------------------------------------------------------------------------------------------------


def train(config: Config, cell: Cell, scale: Scale, phases: Phases, steps: Steps) -> dict[str, Any]:
    """`sft`, `reward` or `align`."""
    import transformers.trainer

    from isdaa.training import run_stages
    from isdaa.training.stages import align, preparation, sft_and_reward
    from isdaa.training.trainer import whole_checkpoints

    with ExitStack() as patched:

        def replace(place: Any, name: str, value: Any) -> None:
            patched.enter_context(patch.object(place, name, value))

        replace(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS, steps.callback()])
        replace(
            whole_checkpoints.WholeCheckpoints, "train", _method(phases, "training", whole_checkpoints.WholeCheckpoints.train)
        )
        replace(preparation, "measure", phases.of("reference logps", preparation.measure))
        if cell.saves:
            for module in (align, sft_and_reward):
                replace(module, "keep_model", phases.of("saving the model", module.keep_model))
        else:
            replace(whole_checkpoints.WholeCheckpoints, "_save_checkpoint", lambda *args, **kwargs: None)
            for module in (align, sft_and_reward):
                replace(module, "keep_model", lambda *args, **kwargs: None)
        run_stages.run(config)
    return {}


def label(config: Config, cell: Cell, scale: Scale, phases: Phases, steps: Steps) -> dict[str, Any]:
    """Samples, scores, behaviour logps."""
    from isdaa.training import run_stages
    from isdaa.training.stages import label as stage

    with (
        patch.object(stage, "respond", phases.of("sampling", stage.respond)),
        patch.object(stage, "reference_logps", phases.of("behaviour logps", stage.reference_logps)),
        _scoring(phases),
    ):
        run_stages.run(config)
    responses = config.label.samples * scale.prompts
    return _rates(phases, {"sampling": responses, "scoring": responses, "behaviour logps": responses // 2})


def evaluate(config: Config, cell: Cell, scale: Scale, phases: Phases, steps: Steps) -> dict[str, Any]:
    """Samples, KL and scores of a policy against its reference."""
    from isdaa.evaluation.checkpoints.sample_and_kl import Collection
    from isdaa.evaluation.checkpoints.what_to_evaluate import requests
    from isdaa.evaluation.evaluate import evaluate_request

    assert config.model.path is not None
    folder = Path(config.model.path).parent
    given: dict[str, Any] = {f"evaluation.{key}": value for key, value in config.evaluation.model_dump().items()}
    given |= {f"tokenization.{key}": value for key, value in config.tokenization.model_dump().items()}
    given |= {"reference": str(folder / BASE), "data": config.data.evaluation, "scorer": str(folder / JUDGE)}
    given |= {"output_dir": str(Path(config.output_dir) / "evaluation"), "dtype": config.model.dtype}
    collect = Collection.run

    def run(self: Collection) -> Any:
        with phases.part("loading the models"):
            for path in (self.reference, *(model.path for model in self.checkpoints)):
                self.models.get(path)
        return collect(self)

    with (
        patch.object(Collection, "run", run),
        patch.object(Collection, "draw", _method(phases, "samples for win rates", Collection.draw)),
        patch.object(Collection, "measure_kl", _method(phases, "samples and KL", Collection.measure_kl)),
        _scoring(phases),
    ):
        metrics = evaluate_request(requests([str(folder / POLICY)], given))
    drawn = scale.prompts * (1 + config.evaluation.opponent_samples)
    rates = _rates(phases, {"samples for win rates": drawn, "samples and KL": scale.prompts, "scoring": drawn})
    return {**rates, "kl": metrics["models"][0]["kl"]}


@contextmanager
def _scoring(phases: Phases) -> Iterator[None]:
    """The reward model's work as a part; loading it, as another one."""
    from isdaa.evaluation.scorers import RewardModelScorer

    measured = _method(phases, "scoring", RewardModelScorer.score)

    def score(self: RewardModelScorer, *args: Any, **kwargs: Any) -> Any:
        if self._model is None:
            with phases.part("loading the reward model"):
                assert self.model is not None
        return measured(self, *args, **kwargs)

    with patch.object(RewardModelScorer, "score", score):
        yield


def embedded(config: Config) -> dict[str, Any]:
    """The embedded experiment as a sweep, whose finished parts a later call finds; with a report where charts can be drawn."""
    from importlib.util import find_spec

    from isdaa.evaluation.records import METRICS
    from isdaa.experiments.grid import SweepConfig
    from isdaa.experiments.sweep import run_sweep

    sweep = SweepConfig.model_validate(
        {
            "title": "The embedded experiment with a larger model", "base": "demo", "output_dir": config.output_dir,
            "seeds": [config.seed], "grids": {"methods": {"objective.method": ["dpo", "is_dpo"]}}, "jobs": 2, "keep": "models",
        }
    )  # fmt: skip
    folder = run_sweep(sweep, config, "demo")
    told = read_json(folder / "sweep.json")
    runs = {}
    for run in told["runs"]:
        metrics = read_json(folder / run["evaluation"] / METRICS)
        runs[run["cell"]] = {
            "seconds": run["seconds"],
            "verdict": next(iter(metrics["verdicts"].values())),
            "checkpoints": metrics["models"],
        }
    report = None
    if find_spec("altair") and find_spec("vl_convert"):
        from isdaa.report.make import report_on

        report = str(report_on([str(folder)], {}, None, as_one_run=False)[0])
    return {"shared_seconds": [run["seconds"] for run in told["shared"]], "runs": runs, "report": report}


STAGES: dict[str, Callable[..., dict[str, Any]]] = {"label": label, "evaluate": evaluate}


def _method(phases: Phases, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A method as a part."""

    def measured(self: Any, *args: Any, **kwargs: Any) -> Any:
        with phases.part(name):
            return function(self, *args, **kwargs)

    return measured


def _rates(phases: Phases, counts: dict[str, int]) -> dict[str, Any]:
    return {"rates": {name: counts[name] / found["seconds"] for name, found in phases.found.items() if name in counts}}


def planned(config: Config, cell: Cell, device: str) -> dict[str, Any] | None:
    """What `isdaa inspect` says of the cell's memory and time; None where it says nothing of such a stage.

    `gib`: what PyTorch allocates in training, or in the phase that needs most: without CUDA's own memory and what lies between
    pieces, which `max_memory_allocated` does not count either.
    """
    from isdaa.preview.inspect import inspect

    if cell.stage not in (*TRAINING, "label"):
        return None
    try:
        found = inspect(config)
        plan = found.stages[0].plan if found.stages else None
        if plan is None:
            return {"failed": "; ".join(found.missing)}
        phase = next((phase for phase in plan.phases if phase.name == "training"), plan.peak)
        counted = sum(size for name, size in phase.parts.items() if name not in NOT_ALLOCATED)
        return {"device": plan.device, "gib": counted / GIB, "step_seconds": plan.step_seconds, **_parts_of(plan)}
    except Exception as error:  # the measurement stands without it
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _parts_of(plan: Any) -> dict[str, Any]:
    return {"phases": {phase.name: {name: size / GIB for name, size in phase.parts.items()} for phase in plan.phases}}


def _of_memory(error: Exception) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError) or "CUDA error: out of memory" in str(error)


def _why(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if _of_memory(error) else f"{type(error).__name__}: {text}"


def _end_with_parent() -> None:
    """Give the GPU back when the benchmark is killed. On Linux, which can."""
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    _end_with_parent()
    main(*sys.argv[1:])
