"""The request of one call of `isdaa benchmark`: plain values that fit together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from isdaa.config import EvaluationConfig, ScorerConfig, TokenizationConfig
from isdaa.errors import UserError
from isdaa.evaluation.checkpoint import Checkpoint
from isdaa.evaluation.checkpoints.provenance import Records, records_of
from isdaa.evaluation.checkpoints.what_to_evaluate import check_keys, checkpoints, expand, home_of, sections_of
from isdaa.evaluation.judges.types import Asking
from isdaa.files import located

MISSING = ("error", "skip", "loss")
# Keys of the section `evaluation` that mean the same for a benchmark; the others are the benchmark's own.
SHARED_KEYS = ("seed", "bootstrap", "confidence", "batch_size", "keep_thinking")


@dataclass(frozen=True)
class Sources:
    """Where questions and answers come from. None: the benchmark's default, or nothing.

    questions: path, Hub name or `project`. answers: files of models that another tool asked. judgments: files of what a
    judge said already. opponent: a file of answers; baseline: a model that gives them. references: right answers
    (MT-Bench); gamed: `df_gamed.csv` (AlpacaEval). missing: what becomes of questions that a file of answers or judgments
    lacks (`MISSING`).
    """

    questions: str | None = None
    split: str | None = None
    limit: int | None = None
    answers: tuple[str, ...] = ()
    judgments: tuple[str, ...] = ()
    opponent: str | None = None
    baseline: str | None = None
    references: str | None = None
    gamed: str | None = None
    missing: str | None = None

    @property
    def lacking(self) -> str:
        """One of `MISSING`."""
        return self.missing or MISSING[0]


@dataclass(frozen=True)
class BenchmarkRequest:
    """Everything, resolved: `models` answer, `baseline` answers for the opponent (None: a file or the data does).

    reference: of the models' records, used where neither user nor data names an opponent. judge: `gold` or a reward model's
    path; asking: a judge model; at most one of them. settings: of which `SHARED_KEYS` count; tokenization and scorer: how a
    reward model reads. chat_template: text that takes the place of the tokenizers' own template, from `template_file`.
    """

    benchmark: str
    output_dir: str
    settings: EvaluationConfig
    tokenization: TokenizationConfig
    scorer: ScorerConfig
    models: tuple[Checkpoint, ...] = ()
    sources: Sources = Sources()
    baseline: Checkpoint | None = None
    reference: Checkpoint | None = None
    judge: str | None = None
    asking: Asking | None = None
    max_new_tokens: int | None = None
    chat_template: str | None = None
    template_file: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False
    told: tuple[str, ...] = ()  # what comes from records, one line each, to be said first
    records: Records | None = None


def benchmark_request(
    benchmark: str,
    model_paths: Sequence[str | Path] = (),
    sources: Sources | None = None,
    *,
    judge: str | None = None,
    asking: Asking | None = None,
    max_new_tokens: int | None = None,
    chat_template: str | None = None,
    output_dir: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> BenchmarkRequest:
    """The request for what a user said; a model's record gives the reference and the dtype.

    model_paths: model folders, run folders (all their checkpoints) or Hub names. chat_template: a file.
    overrides: `dtype`, `trust_remote_code`, dotted keys of the sections `evaluation` (`SHARED_KEYS` alone) and
    `tokenization`. Raises UserError for what contradicts each other or is not there.
    """
    sources = sources or Sources()
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    check_keys(given, ("dtype", "trust_remote_code"))
    _check(sources, model_paths, given, judge, asking)
    paths = list(dict.fromkeys(path for name in model_paths for path in expand(name)))
    found = records_of(paths)
    records, first = found.by_path, found.first()
    known = {str(record.reference) for record in records.values() if record is not None and record.reference is not None}
    other = _single(sources.baseline) if sources.baseline is not None else _reference(known)
    named = {model.path: model for model in checkpoints([*paths, *([other] if other is not None and other not in paths else [])])}
    against = named[other] if other is not None else None
    if against is not None and other in paths:  # its answers to itself as an opponent are others
        against = replace(against, label=f"{against.label} (opponent)")
    sections = sections_of(first, given)
    model = (first.config.get("model") if first else None) or {}
    home = Path(located(output_dir)) if output_dir is not None else (home_of(paths) if paths else Path("evaluation")) / benchmark
    return BenchmarkRequest(
        benchmark=benchmark,
        output_dir=str(home),
        settings=sections.evaluation,
        tokenization=sections.tokenization,
        scorer=sections.scorer,
        models=tuple(named[path] for path in paths),
        sources=sources,
        baseline=against if sources.baseline is not None else None,
        reference=against if sources.baseline is None else None,
        judge=judge,
        asking=asking,
        max_new_tokens=max_new_tokens,
        chat_template=_template(chat_template),
        template_file=chat_template,
        dtype=str(given.get("dtype") or model.get("dtype") or "float32"),
        trust_remote_code=bool(given.get("trust_remote_code", False)),
        told=tuple(found.told(["data", "scorer", *(["reference"] if sources.baseline is not None else [])])),
        records=found,
    )


def _check(
    sources: Sources, model_paths: Sequence[Any], given: Mapping[str, Any], judge: str | None, asking: Asking | None
) -> None:
    if judge is not None and asking is not None:
        raise UserError("--judge names a reward model and --judge_model a judge model; give one of the two")
    if sources.judgments and (model_paths or judge is not None or asking is not None):
        raise UserError("--judgments are scored as they are: leave out --model_path and the judge")
    if not (model_paths or sources.answers or sources.judgments):
        raise UserError("nothing to evaluate: give models with --model_path, or what another tool wrote with --answers")
    if sources.opponent is not None and sources.baseline is not None:
        raise UserError("--opponent is a file of answers and --baseline a model that gives them; give one of the two")
    if sources.missing is not None and not (sources.answers or sources.judgments or sources.opponent):
        raise UserError("--missing needs a file that may lack questions: --answers, --judgments or --opponent")
    if sources.limit is not None and sources.limit < 1:
        raise UserError(f"--limit is {sources.limit}; it must be 1 or more")
    for key in given:
        section, _, name = key.partition(".")
        if section == "evaluation" and name not in SHARED_KEYS:
            raise UserError(f"--{key}: has no effect on a benchmark, which has settings of its own")
    for file in (*sources.answers, *sources.judgments, sources.opponent, sources.references, sources.gamed):
        if file is not None and not Path(file).expanduser().exists():
            raise UserError(f"{file}: no such file or folder")


def _single(path: str) -> str:
    found = expand(path)
    if len(found) != 1:
        raise UserError(f"{path}: holds {len(found)} models; --baseline names one of them, such as {found[-1]}")
    return found[0]


def _reference(known: set[str]) -> str | None:
    """The one reference that the records name, if it exists: the opponent where nothing else is one."""
    try:
        return _single(known.pop()) if len(known) == 1 else None
    except UserError:
        return None


def _template(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: the chat template cannot be read ({getattr(error, 'strerror', None) or 'no UTF-8'})") from None
    if not text.strip():
        raise UserError(f"{file}: the chat template is empty; give a Jinja template")
    return text


def file_name(label: str) -> str:
    """A model's or judge's name as a file's: `dpo/model` becomes `dpo--model`."""
    return re.sub(r"[^\w.+-]+", "--", label).strip("-.") or "model"
