"""One task of a sweep in a process of its own: train, evaluate, tidy up; and the two ways to start such a process.

A task tells how it fares by two small files: `status.json` (what it does, the share done) while it works, `result.json`
when it has ended. So a sweep's overview can follow processes here and jobs on a cluster alike.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from isdaa.disk import FULL, disk_error, free
from isdaa.errors import UserError, shortened, shown
from isdaa.experiments.grid import Keep, SlurmConfig, Task
from isdaa.files import own_file, write_json
from isdaa.foreign import read_json

STATUS, RESULT, LOG = "status.json", "result.json", "log.txt"
EVALUATED = "evaluated.json"  # says that the evaluation was finished before checkpoints were tidied away
STATUS_INTERVAL = 1.0  # seconds
RESUME_FILES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json")
# What a new process would import first; forked from one that has them, it starts at once.
PRELOAD = (
    *(
        "isdaa.training.stages.align",
        "isdaa.training.stages.label",
        "isdaa.training.stages.sft_and_reward",
        "isdaa.training.run_stages",
    ),
    *("isdaa.evaluation.evaluate", "isdaa.evaluation.verdict.overoptimization", "isdaa.world", "isdaa.models.sampling.sampling"),
    *("transformers.models.llama.modeling_llama", "scipy.stats"),
)


@dataclass(frozen=True)
class Work:
    """A task and how it is done. Called in the process that does it."""

    task: Task
    logs: Path  # this task's own folder
    threads: int | None = None
    device: str | None = None  # CUDA_VISIBLE_DEVICES
    keep: Keep = "models"

    def __call__(self) -> None:
        """Do it; whatever happens is told by `result.json`. Resumes what an earlier process left."""
        started, cpu = time.monotonic(), time.process_time()
        outcome: dict[str, Any] = {"key": self.task.key}
        try:
            self._environment()
            with _status_in(self.logs / STATUS):
                _do(self.task, self.keep, self.logs)
            outcome["done"] = True
        except UserError as error:
            outcome |= {"done": False, "error": str(error)}
            print(f"isdaa: error: {error}", file=sys.stderr)
        except Exception as error:
            refused = disk_error(error)
            outcome |= {"done": False, "error": shortened(refused or f"{type(error).__name__}: {error}".splitlines()[0])}
            print(shown(traceback.format_exc(), lines=True), file=sys.stderr)
        outcome |= {"seconds": round(time.monotonic() - started, 2), "cpu_seconds": round(time.process_time() - cpu, 2)}
        write_json(self.logs / RESULT, outcome)

    def checkpoint(self) -> Any:
        """What submitit submits when the cluster takes the job away or its time is up: the same, which resumes."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def _environment(self) -> None:
        if self.device is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.device
        import logging

        from isdaa.terminal import log_to_stderr

        log_to_stderr(logging.INFO)
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)


def _do(task: Task, keep: Keep, logs: Path) -> None:
    if not task.evaluates_alone:
        from isdaa.training.run_stages import run

        run(task.config)
    if task.cell is None:
        _evaluate_reference(task)
        return
    if not (logs / EVALUATED).is_file() or read_json(logs / EVALUATED) != {"key": task.key}:
        _evaluate(task, str(task.folder), {"shared": str(task.shared)} if task.has_shared else {})
        write_json(logs / EVALUATED, {"key": task.key})
    tidy(task, keep)


def _evaluate_reference(task: Task) -> None:
    """The reference against itself: its samples serve every run, and it must win half of the time."""
    config, reference = task.config, task.reference
    if reference is None or config.data.evaluation is None:
        return
    given: dict[str, Any] = {f"tokenization.{key}": value for key, value in config.tokenization.model_dump().items()}
    given |= {"reference": reference, "data": config.data.source("evaluation"), "split": config.data.evaluation_split}
    _evaluate(task, reference, given | {"dtype": config.model.dtype})


def _evaluate(task: Task, model: str, given: dict[str, Any]) -> None:
    from isdaa.evaluation.checkpoints.what_to_evaluate import requests
    from isdaa.evaluation.evaluate import evaluate_request

    settings = task.config.evaluation
    overrides: dict[str, Any] = {f"evaluation.{key}": value for key, value in settings.model_dump().items()}
    overrides |= {"scorer": task.config.evaluation_scorer or "none", "output_dir": str(task.evaluation)}
    overrides["scorer.position"] = task.config.scorer.position
    overrides["scorer.label"] = task.config.scorer.label
    overrides["trust_remote_code"] = task.config.model.trust_remote_code  # the user's own word, which no record gives
    evaluate_request(requests([model], overrides | given), keep=False)


def tidy(task: Task, keep: Keep) -> None:
    """Free the disk of what an evaluated run no longer needs.

    `models` removes what only a resume reads; `best` also removes every checkpoint but the recommended one.
    """
    if keep == "all":
        return
    from isdaa.training.trainer.checkpoints import checkpoints, defect, write_manifest

    kept: set[str] | None = None
    if keep == "best":
        from isdaa.evaluation.checkpoints.trajectory import trajectories
        from isdaa.evaluation.verdict.overoptimization import judge

        (run,) = trajectories(task.evaluation)
        verdict = judge(run)
        if verdict is not None:  # without win rates nobody can say which is the best
            kept = {Path(run.paths[verdict.recommended]).name}
    for folder in checkpoints(task.folder / "checkpoints"):
        if kept is not None and folder.name not in kept:
            shutil.rmtree(folder)
            continue
        left = [path for name in RESUME_FILES for path in folder.glob(name)]
        intact = defect(folder) is None
        for path in left:
            path.unlink()
        if left and intact:
            write_manifest(folder)


@contextlib.contextmanager
def _status_in(path: Path) -> Iterator[None]:
    """Every bar of this process is also written to `path`, about once a second."""
    from isdaa import terminal

    last = 0.0

    def tell(description: str, share: float, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= STATUS_INTERVAL:
            last = now
            write_json(path, {"what": description.strip(), "share": share, "note": note})

    terminal.listener = tell
    try:
        yield
    finally:
        terminal.listener = None


class Job(Protocol):
    """A process or job that was started."""

    def running(self) -> bool:
        """Whether it has not ended yet."""
        ...

    def stop(self) -> None:
        """End it."""
        ...


Launcher = Callable[[Work], Job]


class LocalJobs:
    """Processes on this machine, forked from one that has imported the libraries already."""

    def __init__(self, threads: int | None) -> None:
        import multiprocessing

        if threads is not None:  # read by the libraries when they are first imported
            for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
                os.environ[name] = str(threads)
        # Threads that spin while they wait cost a factor of ten where a core is busy with something else.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(PRELOAD))

    def __call__(self, work: Work) -> Job:
        here, there = self.context.Pipe()
        process = self.context.Process(target=_in_process, args=(work, there), name=work.task.name)
        process.start()
        there.close()
        return _Process(process, here)


class _Process:
    def __init__(self, process: Any, pipe: Any) -> None:
        self.process, self.pipe = process, pipe

    def running(self) -> bool:
        return self.process.is_alive()

    def stop(self) -> None:
        self.process.terminate()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _in_process(work: Work, pipe: Any) -> None:
    """The child: output to the log; where the sweep itself is gone, so is this process."""

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            pipe.recv()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the sweep, which stops its processes in order
    with open(own_file(work.logs / LOG), "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    work()


class ClusterJobs:
    """Jobs through submitit: on a SLURM cluster, or (`local`) as its local executor runs them."""

    def __init__(self, cluster: str, folder: Path, settings: SlurmConfig) -> None:
        try:
            import submitit
        except ImportError:
            raise UserError("cluster: submitit is not installed; pip install 'isdaa[slurm]'") from None
        parameters: dict[str, Any] = {"timeout_min": settings.minutes, "cpus_per_task": settings.cpus}
        if settings.gpus:
            parameters["gpus_per_node"] = settings.gpus
        if settings.memory_gb is not None:
            parameters["mem_gb"] = settings.memory_gb
        if cluster == "slurm" and settings.partition is not None:
            parameters["slurm_partition"] = settings.partition
        try:
            self.executor = submitit.AutoExecutor(folder=folder / "submitit", cluster=cluster)
            self.executor.update_parameters(**{**parameters, **settings.options})
        except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
            raise UserError(f"--cluster {cluster}: submitit refuses: {str(error).splitlines()[0]}") from None

    def __call__(self, work: Work) -> Job:
        self.executor.update_parameters(name=work.task.name.replace("/", "-"))
        return _ClusterJob(self.executor.submit(work))


class _ClusterJob:
    def __init__(self, job: Any) -> None:
        self.job = job

    def running(self) -> bool:
        return not self.job.done()

    def stop(self) -> None:
        self.job.cancel()


def outcome_of(logs: Path) -> dict[str, Any] | None:
    """What an ended task left, or None."""
    return read_json(logs / RESULT) if (logs / RESULT).is_file() else None


def died(logs: Path) -> dict[str, Any]:
    """The outcome of a task whose process left none: it was killed, or could not even write that."""
    room = free(logs)
    full = None if room is None or room >= FULL else disk_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), logs)
    return {"done": False, "error": str(full or "its process was killed; the same command goes on")}


def status_of(logs: Path) -> dict[str, Any]:
    """What a running task does now; empty where it has not said yet."""
    try:
        return json.loads((logs / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
