"""lm-eval behind a small interface: the tasks that a name stands for, a model as lm-eval takes it, a task's items.

lm-eval is an extra: nothing here imports it before a function that needs it is called.
"""

from __future__ import annotations

import glob
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from isdaa.errors import UserError, nearest
from isdaa.files import clean, digest, file_digest
from isdaa.terminal import Bar, say

Record = dict[str, Any]

# The tasks of the Open LLM Leaderboard (its first version) that are reported as alignment tax, with its number of examples.
SHOTS = {"mmlu": 5, "gsm8k": 5, "arc_challenge": 25, "hellaswag": 10, "winogrande": 5}
# The leaderboard's metric where it is not the first that lm-eval lists.
METRIC_OF = {"arc_challenge": "acc_norm,none", "hellaswag": "acc_norm,none"}
# Where lm-eval keeps them: reading these folders takes a second, reading all of its tasks more than ten.
FOLDERS = {name: name for name in SHOTS} | {"mmlu": "mmlu/default", "arc_challenge": "arc"}
# Requests of a part (an item times its choices): how the progress bar shares out the time. A generated answer counts as 40.
REQUESTS = {"gsm8k": 1319 * 40, "arc_challenge": 1172 * 4, "hellaswag": 10042 * 4, "winogrande": 1267 * 2}
REQUESTS_ELSE = 14042 / 57 * 4  # a mean subject of MMLU


@dataclass(frozen=True)
class Part:
    """What lm-eval runs at once: a task, or a group that changes the tasks in it."""

    name: str
    digest: str  # of its files, and of its data where they are local


@dataclass(frozen=True)
class Asked:
    """A task, group or tag that the user named."""

    name: str
    parts: tuple[Part, ...]
    shots: int | None  # None: the task's own
    by_size: bool  # whether an item counts the same wherever it is, or every task of the group

    def requests(self, part: Part, limit: int | None) -> float:
        """A guess at the size of a part."""
        size = REQUESTS.get(part.name, REQUESTS_ELSE)
        return size if limit is None else min(size, 4.0 * limit)


class Harness:
    """lm-eval's index of tasks, and what was asked of it.

    names: tasks, groups or tags. shots: name -> examples. include: a folder of the user's own tasks, which go before lm-eval's.
    Raises UserError where lm-eval is missing or a name unknown.
    """

    def __init__(self, names: Sequence[str], shots: Mapping[str, int], include: str | None = None) -> None:
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(f"tax: lm-eval is not installed ({error}); pip install 'isdaa[lm-eval]'") from None
        if not hasattr(TaskManager, "load"):
            raise UserError(f"tax: lm-eval {lm_eval.__version__} is too old; pip install 'isdaa[lm-eval]'")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.version: str = lm_eval.__version__
        home = Path(lm_eval.__file__).parent
        folders = [str(home / "tasks" / folder) for folder in FOLDERS.values()]
        own = [] if include is None else [include]
        self.manager: Any = TaskManager(include_path=[*folders, *own], include_defaults=False)
        if not all(self._known(name) for name in names):
            say("reading the files of all of lm-eval's tasks, which takes some seconds")
            self.manager = TaskManager(include_path=own or None)
        self._shorten = {str(home): ""} | {str(Path(folder)): "" for folder in own}
        strange = next((name for name in [*names, *shots] if name not in self.index), None)
        if strange is not None:
            close = nearest(strange, SHOTS) or nearest(strange, self.index)
            raise UserError(f"tax: lm-eval {self.version} knows no task {strange!r}{close}; `lm-eval ls tasks` lists them all")
        unused = next((name for name in shots if name not in names), None)
        if unused is not None:
            raise UserError(f"--shots: {unused} is not among the tasks ({', '.join(names)})")
        self.asked = [self._ask(name, shots) for name in dict.fromkeys(names)]

    @property
    def index(self) -> Mapping[str, Any]:
        """Name -> lm-eval's entry, of every task, group and tag."""
        return self.manager.task_index

    def _ask(self, name: str, shots: Mapping[str, int]) -> Asked:
        whole = next((known for known in SHOTS if known in self.index and name in self._below(known)), None)
        number = shots.get(name, SHOTS[whole] if whole is not None else None)
        parts = tuple(Part(part, self._digest(part)) for part in dict.fromkeys(self._parts(name)))
        fixed = next((part.name for part in parts if (self.index[part.name].cfg or {}).get("num_fewshot") == 0), None)
        if name in shots and fixed is not None:
            raise UserError(
                f"--shots: the file of {fixed} fixes 0 examples (its prompt may hold some); leave {name}={number} out"
            )
        config = self.index[name].cfg or {}
        metrics = config.get("aggregate_metric_list") or [{}]
        first = metrics[0] if isinstance(metrics, list) else metrics
        return Asked(name, parts, number, bool(first.get("weight_by_size", True)))

    def _children(self, name: str) -> list[Any]:
        """What a group or tag holds: names, or settings of the group's own; nothing for a task."""
        entry = self.index[name]
        if entry.cfg is None:
            return sorted(entry.tags)
        held = entry.cfg.get("task") if "group" in entry.cfg else None
        return held if isinstance(held, list) else []

    def _below(self, name: str) -> set[str]:
        """A name and all that is in it."""
        found = {name}
        for child in self._children(name):
            if isinstance(child, str) and child in self.index:
                found |= self._below(child)
        return found

    def _known(self, name: str) -> bool:
        """Whether a name and all that is in it are in the index."""
        return name in self.index and all(not isinstance(child, str) or self._known(child) for child in self._children(name))

    def _parts(self, name: str) -> list[str]:
        """The tasks of a group, each run and kept by itself; the group alone where it has settings for them."""
        children, config = self._children(name), self.index[name].cfg or {}
        changes = set(config) - {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag"}
        if not children or (config and changes) or not all(isinstance(child, str) and child in self.index for child in children):
            return [name]
        return [part for child in children for part in self._parts(child)]

    def _digest(self, name: str) -> str:
        """Digest of all that decides a task's items: its settings, the code beside them, local files of data."""
        entry = self.index[name]
        content: list[Any] = []
        config = entry.cfg or {}
        for child in self._children(name):
            if isinstance(child, str) and child in self.index:
                content.append(self._digest(child))
        if entry.yaml_path is not None:
            content += [[file.name, file_digest(file)] for file in sorted(Path(entry.yaml_path).parent.glob("*.py"))]
        content += [[Path(file).name, file_digest(file)] for file in _local_data(config)]
        text = str(sorted(config.items(), key=str))
        for folder, short in self._shorten.items():
            text = text.replace(folder, short)
        return digest([name, text, content])

    def run(self, lm: Any, asked: Asked, part: Part, bar: Bar, limit: int | None, chat: bool) -> tuple[Record, list[Record]]:
        """One part under a model: (what its header says, one record an item).

        A record is `{task, item, doc, values, answers}`: `values` are the metrics that are means over items, by
        `metric,filter`; `answers` the text of what was generated, or the log-likelihood of each choice.
        Raises UserError where the task cannot be loaded or does not suit the model.
        """
        import torch
        from jinja2 import TemplateError
        from lm_eval import simple_evaluate

        started = time.monotonic()
        try:
            tasks = self.manager.load([part.name])["tasks"]
        except Exception as error:  # whatever a task's file, code and data can raise
            raise UserError(f"{part.name}: lm-eval cannot load this task: {_said(error)}") from error
        try:
            with _reported(bar) as seen:
                found: Any = simple_evaluate(
                    model=lm,
                    tasks=list(tasks.values()),
                    num_fewshot=asked.shots,
                    limit=limit,
                    bootstrap_iters=0,
                    apply_chat_template=chat,
                    task_manager=self.manager,
                )
        except torch.OutOfMemoryError:
            raise UserError(f"{part.name}: the GPU's memory is full; choose a smaller --batch_size") from None
        except (ValueError, KeyError, AssertionError, TemplateError) as error:
            raise UserError(f"{part.name}: lm-eval cannot run this task: {_said(error)}") from error
        results = {}
        records: list[Record] = []
        for task, samples in found["samples"].items():
            scores = {k: float(v) for k, v in found["results"][task].items() if "," in k and "_stderr," not in k}
            merged = _items(task, samples)
            by_item = {metric: _is_mean(value, merged, metric) for metric, value in scores.items()}
            for record in merged:
                record["values"] = {metric: value for metric, value in record["values"].items() if by_item.get(metric)}
            higher = found["higher_is_better"].get(task, {})
            results[task] = {
                "shots": found["n-shot"].get(task),
                "of": found["n-samples"][task]["original"],
                "metrics": {
                    metric: {"value": value, "by_item": by_item[metric], "higher": higher.get(metric.split(",")[0]) is not False}
                    for metric, value in scores.items()
                },
            }
            records += merged
        return {"results": results, "truncated": seen["truncated"], "seconds": round(time.monotonic() - started, 3)}, records


def as_lm_eval(model: Any, tokenizer: Any, batch_size: int | str) -> Any:
    """A loaded model as lm-eval takes it."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _items(task: str, samples: Sequence[Mapping[str, Any]]) -> list[Record]:
    """One record an item; lm-eval logs an item once for every filter."""
    found: dict[int, Record] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        fresh = {"task": task, "item": sample["doc_id"], "doc": sample["doc_hash"][:16], "values": {}, "answers": None}
        record = found.setdefault(sample["doc_id"], fresh)
        record["answers"] = [_answer(answer) for answer in sample["resps"]]
        for metric in sample["metrics"]:
            value = _number(sample[metric])
            if value is not None:
                record["values"][f"{metric},{sample['filter']}"] = value
    return list(found.values())


def _number(value: Any) -> float | None:
    """A finite number as such; anything else (what corpus metrics keep of an item) is none."""
    if hasattr(value, "item"):
        value = value.item() if getattr(value, "size", 1) == 1 else None
    return float(value) if isinstance(value, bool | int | float) and math.isfinite(value) else None


def _answer(answer: Any) -> Any:
    """A generated text, or the log-likelihood of a choice."""
    while isinstance(answer, list | tuple) and answer:
        answer = answer[0]
    return clean(answer) if isinstance(answer, str) else _number(answer)


def _is_mean(value: float, records: Sequence[Record], metric: str) -> bool:
    """Whether the metric is a mean over items; only then can it be paired and resampled by item."""
    values = [record["values"].get(metric) for record in records]
    if not values or any(value is None for value in values):
        return False
    return math.isclose(math.fsum(values) / len(values), value, rel_tol=1e-6, abs_tol=1e-9)


def _local_data(config: Mapping[str, Any]) -> list[str]:
    """The local files that a task's settings name as its data."""
    options = config.get("dataset_kwargs") or {}
    named: list[Any] = [config.get("dataset_path"), options.get("data_dir"), options.get("data_files")]
    files: set[str] = set()
    while named:
        value = named.pop()
        if isinstance(value, Mapping):
            named += value.values()
        elif isinstance(value, list | tuple):
            named += value
        elif isinstance(value, str):
            for path in map(Path, glob.glob(value, recursive=True)):
                inside = path.rglob("*") if path.is_dir() else [path]
                files |= {str(file) for file in inside if file.is_file()}
    return sorted(files)


def _said(error: Exception) -> str:
    """An error's kind and the first line of what it says."""
    line = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {line}"


@contextmanager
def _reported(bar: Bar) -> Iterator[dict[str, bool]]:
    """Inside, lm-eval's bars move ours; yields whether a prompt was longer than the model's context.

    lm-eval says the latter in a warning a request and nowhere else. Nor does `simple_evaluate` describe the machine here, for
    which it starts pip and git: 1.6 s a part, 90 s for the 57 subjects of MMLU.
    """
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.models.huggingface

    seen = {"truncated": False}
    logger = logging.getLogger("lm_eval.models.huggingface")

    def listen(record: logging.LogRecord) -> bool:
        text = record.getMessage().lower()
        seen["truncated"] |= "truncating" in text or "left truncation" in text
        return record.levelno >= logging.ERROR

    modules: list[Any] = [lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface]
    ours: list[tuple[Any, str, Any]] = [(module, "tqdm", partial(_Forward, bar)) for module in modules]
    ours += [(lm_eval.evaluator, name, lambda *_: None) for name in ("add_env_info", "get_git_commit_hash")]
    theirs = [(module, name, getattr(module, name, None)) for module, name, _ in ours]
    level = logger.level
    logger.addFilter(listen)
    logger.setLevel(logging.WARNING)
    try:
        for module, name, value in ours:
            setattr(module, name, value)
        yield seen
    finally:
        logger.setLevel(level)
        logger.removeFilter(listen)
        for module, name, value in theirs:
            setattr(module, name, value)


class _Forward:
    """Takes the place of lm-eval's tqdm: what it counts with `update` (requests) counts on our bar, its loops do not."""

    def __init__(self, bar: Bar, iterable: Any = None, *, total: float | None = None, **_: Any) -> None:
        self.bar, self.iterable = bar, iterable
        if iterable is None:
            bar.update(0, total=(bar.total or 0) + (total or 0))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.iterable)

    def update(self, n: float = 1) -> None:
        """As tqdm's."""
        self.bar.update(n)

    def close(self) -> None:
        """As tqdm's."""
