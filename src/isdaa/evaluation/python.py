"""`isdaa.evaluate`: what `isdaa evaluate` does, from Python: the same checks, records, table and verdict."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from isdaa.errors import DoneInPart, UserError
from isdaa.files import digest, located, write_jsonl

Model = Any  # a folder or Hub name, a model in memory, or a trainer
MODELS = "models"  # in the evaluation's folder: those that were given in memory
# Option of the command -> argument, where they are called differently.
ARGUMENTS = {"model_path": "model", "data": "prompts", "output": "output_dir", "judge_model": "judge", "scores": "scorer"}
ARGUMENTS |= {name: name for name in ("reference", "scorer", "tokenizer", "split", "dtype", "trust_remote_code")}
SWITCHES = {"keep_thinking": 'settings={"evaluation.keep_thinking": True}', "adopt": "isdaa.adopt(RUN)"}
# Commands in backticks stay; behind an option, a number is its value, and capitals stand for one.
OPTION = re.compile(
    r"`isdaa [^`]*`|--judge_model … --judge_base_url …|"
    r"--(?P<name>[a-z_]+(?:\.[a-z_]+)?)(?: (?:(?P<value>\d+(?:\.\d+)?)|[A-Z]+\b))?"
)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; `print` shows the command's table and the verdicts.

    Attributes:
        metrics: what `metrics.json` holds.
        folder: where the records are.
        stopped: why this is not the whole result; None: it is.
    """

    metrics: Mapping[str, Any]
    folder: Path
    stopped: str | None = None

    @property
    def win_rate(self) -> float | None:
        """Win rate of the table's last model (of a run: its last checkpoint), in [0, 1]; None without a scorer or judge."""
        found = self.metrics["models"][-1]["win_rate"]
        return None if found is None else float(found["mean"])

    @property
    def kl(self) -> float:
        """KL(π‖π_ref) of the table's last model, in nats a response."""
        return float(self.metrics["models"][-1]["kl"]["mean"])

    @property
    def verdicts(self) -> dict[str, str]:
        """Run -> its verdict, a sentence; or `No verdict: …` with the reason."""
        whys = self.metrics["no_verdict"]
        return {name: str(whys[name] or found["sentence"]) for name, found in self.metrics["verdicts"].items()}

    def __str__(self) -> str:
        from isdaa.evaluation.table import print_table

        shown = io.StringIO()
        print_table(self.metrics, shown, worded=in_python)
        return "\n".join([shown.getvalue().rstrip(), *([self.stopped] if self.stopped else [])])


def in_python(text: str) -> str:
    """A text of the command's, in which options become arguments."""
    return OPTION.sub(_argument, text)


def _argument(found: re.Match[str]) -> str:
    name, value = found["name"], found["value"]
    if name is None:
        return found[0] if found[0].startswith("`") else "judge=…"
    name = "judge_max_requests" if name == "max_requests" else name
    if "." in name:
        return f'settings={{"{name}": {value}}}' if value else f'settings["{name}"]'
    if name in ARGUMENTS:
        return f"{ARGUMENTS[name]}={value or '…'}"
    if name.startswith("judge_"):
        return f"JudgeSettings({name.removeprefix('judge_')}={value or '…'})"
    return SWITCHES.get(name, found[0])


@contextmanager
def _in_python() -> Iterator[None]:
    """Errors that name options, and what to type, name arguments."""
    try:
        yield
    except UserError as error:
        message, command = (*error.args, "")[:2]
        options = {f"--{option}": name for option, name in ARGUMENTS.items() if option != "model_path"}
        given = [f'{options[a]}="{b}"' for a, b in pairwise(shlex.split(command)) if a in options]
        kind = DoneInPart if isinstance(error, DoneInPart) else UserError
        raise kind(in_python(message), f"isdaa.evaluate({', '.join(['…', *given])})" if given else command) from None


@_in_python()
def evaluate(
    model: Model | Sequence[Model],
    reference: Model | None = None,
    prompts: str | Path | Iterable[Any] | None = None,
    scorer: Any = None,
    *,
    judge: Any = None,
    output_dir: str | Path | None = None,
    tokenizer: Any = None,
    split: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Evaluation:
    """KL and win rate of models against their reference; of a run's checkpoints, the verdict, too.

    Args:
        model: a model's or run's folder (all its checkpoints), a Hub name, a model in memory, a trainer (its model as it is now),
            or several of them. What is in memory is saved below `output_dir` first, an adapter merged.
        reference: π_ref, named or in memory; None: the one that the models' records name.
        prompts: a file, Hub name or `world:…`, or rows: texts, lists of messages, or dictionaries with `prompt` (and `chosen`,
            `rejected` for held-out accuracy). None: those that the models' records name.
        scorer: a reward model's folder or Hub name, `gold`, a function that gives one number for each of a list of rows, or an
            object with `score(rows)` (docs/python.md). None: the one that the records name; `none`: KL alone.
        judge: in place of a scorer, `JudgeSettings` of a judge model (docs/judging.md).
        output_dir: folder of the records; None: `evaluation` beside the first model. A second call reuses what is there.
        tokenizer: of models in memory; a trainer has its own. A folder or Hub name: of all models.
        split: of a data set with several.
        dtype: of the weights in memory: float32, bfloat16, float16 or auto.
        trust_remote_code: run code that a model's repository ships.
        settings: dotted keys of `evaluation`, `tokenization` and `scorer`: `{"evaluation.prompts": 128}`.

    Returns:
        Win rates, KL and verdicts, with the folder of their records.

    Raises:
        UserError: one line, as the command says it, in the words of the arguments.
    """
    from isdaa.evaluation.checkpoints.what_to_evaluate import check_keys, home_of, requests
    from isdaa.evaluation.evaluate import evaluate_request
    from isdaa.evaluation.scorers import OwnScorer

    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping):
        raise UserError(f"settings: a {type(settings).__name__}; give a dictionary of dotted keys, {{'evaluation.prompts': 128}}")
    check_keys(settings)
    for key, value in settings.items():
        if value is None or key == "evaluation.scorer":
            raise UserError(f"settings: {key}: {'is None; leave it out' if value is None else 'give it as scorer=…'}")
    entries = list(model) if isinstance(model, list | tuple) else [model]
    if not entries:
        raise UserError("isdaa.evaluate: no model is given")
    named = [located(entry) for entry in entries if isinstance(entry, str | Path)]
    if output_dir is None and not named:
        raise UserError("isdaa.evaluate: models in memory need a folder for their records; give output_dir")
    folder = Path(located(output_dir)) if output_dir is not None else Path(home_of(named))
    own: Any = None if scorer is None or isinstance(scorer, str | Path) else OwnScorer(scorer)
    named_tokenizer = located(tokenizer) if isinstance(tokenizer, str | Path) else None
    if named_tokenizer is not None:
        from isdaa.models.loading import load_tokenizer

        tokenizer = load_tokenizer(named_tokenizer, trust_remote_code=trust_remote_code)
    elif tokenizer is not None and all(isinstance(entry, str | Path) for entry in (*entries, reference or "")):
        raise UserError(
            "tokenizer: an object is for models in memory, and all are folders or Hub names; give a folder or Hub name"
        )
    alone = len(entries) == 1 and hasattr(entries[0], "state")  # a trainer, whose model is named by its step
    paths = [_path(entry, folder, tokenizer, "" if alone else f"model-{number}") for number, entry in enumerate(entries)]
    overrides: dict[str, Any] = {
        "reference": None if reference is None else _path(reference, folder, _tokenizer(entries[0], tokenizer), "reference"),
        "data": _data(prompts, folder),
        "scorer": "none" if own is not None else None if scorer is None else str(scorer),
        "judge_model": _judge(judge),
        "output_dir": str(folder),
        "split": split,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code or None,
        "tokenizer": named_tokenizer,
        **settings,
    }
    request = requests(paths, overrides)
    if own is not None:
        request = replace(request, scorer=own)
    metrics = evaluate_request(request)
    judged = overrides["judge_model"]
    stopped = None if judged is None or judged.stopped is None else in_python(judged.stopped)
    return Evaluation(metrics, Path(request.output_dir), stopped)


def _path(model: Model, folder: Path, tokenizer: Any, label: str) -> str:
    """Where a model lies; one in memory is saved first, under a name that says what it is of."""
    if isinstance(model, str | Path):
        return located(model)
    from torch import nn

    step = getattr(getattr(model, "state", None), "global_step", None)
    tokenizer, inner = _tokenizer(model, tokenizer), getattr(model, "model", None) if step is not None else model
    if not isinstance(inner, nn.Module):
        raise UserError(f"isdaa.evaluate: {type(model).__name__} is no model; give a folder, a Hub name, a model or a trainer")
    if tokenizer is None:
        raise UserError("isdaa.evaluate: a model in memory has no tokenizer of its own; give tokenizer")
    from isdaa.models.saving import save_model

    place = folder / MODELS / "-".join(filter(None, [label, f"step-{step}" if step is not None else ""]))
    save_model(inner, tokenizer, place)
    return str(place)


def _tokenizer(model: Model, given: Any) -> Any:
    return given if given is not None else getattr(model, "tokenizer", None) or getattr(model, "processing_class", None)


def _data(prompts: Any, folder: Path) -> str | None:
    """Where prompts lie; rows are written beside the records, under a name of their own, so that others' records stay valid."""
    if prompts is None or isinstance(prompts, str | Path):
        return None if prompts is None else str(prompts)
    from isdaa.data.reading.sources import numbered

    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise UserError(
            f"prompts: a {type(prompts).__name__}; give a file, a Hub name, or a list of texts, of lists of messages or of rows"
        )
    # A table's columns are no prompts.
    given = (row for row, _ in numbered(prompts, "prompts")) if hasattr(prompts, "columns") else prompts
    rows = [dict(row) if isinstance(row, Mapping) else {"prompt": row} for row in given]
    if not rows:
        raise UserError("isdaa.evaluate: no prompt is given")
    file = folder / f"prompts-{digest(rows)[:8]}.jsonl"
    write_jsonl(file, rows)
    return str(file)


def _judge(settings: Any) -> Any:
    if settings is None:
        return None
    from isdaa.evaluation.checkpoints.judged_samples import SampleJudge
    from isdaa.evaluation.judges.types import Asking, JudgeSettings

    if not isinstance(settings, JudgeSettings):
        raise UserError(f"isdaa.evaluate: judge is {type(settings).__name__}; give JudgeSettings(model, base_url=…)")
    usual = JudgeSettings(settings.model)
    return SampleJudge(Asking(settings, settings.temperature != usual.temperature, settings.max_tokens != usual.max_tokens))
