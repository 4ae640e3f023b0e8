"""Alignment tax: what a model lost, or won, on tasks that it was not aligned for (`isdaa tax`).

lm-eval asks; this module decides what is asked of whom, keeps every answer, and compares models with their reference item by
item. Nothing heavy is imported before there is a tax to measure.

    tax.jsonl   one block a model and task, one record an item: done once, found again
    tax.json    scores and differences of the latest call
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isdaa.distributed import world_size
from isdaa.errors import UserError

if TYPE_CHECKING:
    from isdaa.evaluation.checkpoints.what_to_evaluate import EvaluationRequest
    from isdaa.evaluation.records import Blocks
    from isdaa.evaluation.tax.harness import Asked, Harness, Part

Keys = dict[tuple[str, str], str]  # (name that was asked for, part of it) -> block of one model
TAX, ITEMS = "tax.json", "tax.jsonl"
FORMAT = 1  # of the records; raise it when the same work would give other records
BATCH = 8


@dataclass(frozen=True)
class TaxSettings:
    """What is asked of lm-eval."""

    tasks: tuple[str, ...] = ()  # none: the five of `harness.SHOTS`
    shots: Mapping[str, int] | None = None  # task -> examples in the prompt
    limit: int | None = None  # items a task
    include_path: str | None = None  # folder of further tasks
    batch_size: int | str = BATCH
    chat_template: bool = False


def measure_tax(request: EvaluationRequest, settings: TaxSettings) -> dict[str, Any]:
    """The alignment tax of a request's models against its reference; returns what `tax.json` holds.

    Each part (a task, a subject of MMLU) of each model is kept in `tax.jsonl` under a digest of weights, tokenizer, task and
    settings: a second call asks nothing again, and a kill loses the part in work. Raises UserError.
    """
    from isdaa.evaluation.model_digest import model_digest
    from isdaa.evaluation.records import Blocks, locked
    from isdaa.evaluation.tax.harness import SHOTS, Harness
    from isdaa.files import write_json
    from isdaa.record import git_revision, versions

    if world_size() > 1:
        raise UserError("tax: works in one process; start it without torchrun or accelerate launch")
    if settings.include_path is not None and not Path(settings.include_path).is_dir():
        raise UserError(f"--include_path {settings.include_path}: no such folder")
    harness = Harness(settings.tasks or tuple(SHOTS), settings.shots or {}, settings.include_path)
    paths = list(dict.fromkeys([request.reference, *(model.path for model in request.models)]))
    digests = {path: model_digest(path, request.trust_remote_code, request.revision_of(path)) for path in paths}
    keys = {path: _keys(path, digests[path], request, harness, settings) for path in paths}
    with locked(request.output_dir) as folder:
        items = Blocks(folder / ITEMS)
        _ask_all(paths, keys, digests, items, request, harness, settings)
        tax = {
            "settings": asdict(settings) | {"tasks": [asked.name for asked in harness.asked], "dtype": request.dtype},
            "lm_eval": harness.version,
            **_compared(request, harness.asked, keys, digests, items),
            "versions": versions(),
            "git_revision": git_revision(),
        }
        write_json(folder / TAX, tax)
    return tax


def _keys(path: str, weights: str, request: EvaluationRequest, harness: Harness, settings: TaxSettings) -> Keys:
    """The blocks of one model."""
    from isdaa.data.chat import ChatFormat, tokenizer_digest
    from isdaa.files import digest
    from isdaa.models.loading import load_tokenizer

    place = request.tokenizer or path
    tokenizer = load_tokenizer(place, trust_remote_code=request.trust_remote_code, revision=request.revision_of(place))
    if settings.chat_template and not tokenizer.chat_template:
        raise UserError(f"{path}: its tokenizer has no chat template; leave --chat_template out")
    if settings.chat_template:
        ChatFormat(tokenizer)  # can it be used?
    who = [weights, tokenizer_digest(tokenizer), request.dtype]
    how = [harness.version, settings.limit, settings.chat_template]
    return {
        (asked.name, part.name): digest([FORMAT, "tax", who, how, part.name, part.digest, asked.shots])
        for asked in harness.asked
        for part in asked.parts
    }


def _ask_all(
    paths: Sequence[str],
    keys: Mapping[str, Keys],
    digests: Mapping[str, str],
    items: Blocks,
    request: EvaluationRequest,
    harness: Harness,
    settings: TaxSettings,
) -> None:
    """Ask what is not on disk yet, model by model, so that each is loaded once, and one is in memory at a time."""
    from isdaa.record import git_revision, versions
    from isdaa.terminal import progress

    limit = settings.limit
    todo: dict[str, list[tuple[Asked, Part]]] = {}
    planned: set[str] = set()  # checkpoints with the same weights share their keys
    for path in paths:
        for asked in harness.asked:
            for part in asked.parts:
                key = keys[path][asked.name, part.name]
                if key not in items and key not in planned:
                    planned.add(key)
                    todo.setdefault(path, []).append((asked, part))
    if not todo:
        return
    labels = {model.path: model.label for model in request.models} | {request.reference: "reference"}
    with progress("alignment tax", sum(asked.requests(part, limit) for work in todo.values() for asked, part in work)) as bar:
        for path, work in todo.items():
            lm = load_for_tasks(path, request, settings)
            for asked, part in work:
                bar.update(0, note=f"{labels[path]}, {part.name}")
                with bar.part(asked.requests(part, limit), "  requests"), progress("  requests") as inner:
                    header, records = harness.run(lm, asked, part, inner, limit, settings.chat_template)
                header = {
                    "model": path,
                    "model_digest": digests[path],
                    "part": part.name,
                    "dtype": request.dtype,
                    "limit": limit,
                    "chat_template": settings.chat_template,
                    "batch_size": settings.batch_size,
                    "lm_eval": harness.version,
                    "versions": versions(),
                    "git_revision": git_revision(),
                    **header,
                }
                items.add("tax", keys[path][asked.name, part.name], header, records)
            del lm


def load_for_tasks(path: str, request: EvaluationRequest, settings: TaxSettings) -> Any:
    import torch

    from isdaa.evaluation.tax.harness import as_lm_eval
    from isdaa.models.loading import load_model, load_tokenizer

    device = "cuda" if torch.cuda.is_available() else None
    hub: Any = {"trust_remote_code": request.trust_remote_code, "revision": request.revision_of(path)}
    model = load_model(path, dtype=request.dtype, device=device, **hub)
    model.requires_grad_(False)
    place = request.tokenizer or path
    hub["revision"] = request.revision_of(place)
    return as_lm_eval(model, load_tokenizer(place, **hub), settings.batch_size)


def _compared(
    request: EvaluationRequest,
    tasks: Sequence[Asked],
    keys: Mapping[str, Keys],
    digests: Mapping[str, str],
    items: Blocks,
) -> dict[str, Any]:
    """Reference and models with their scores; models with their differences, too."""
    from isdaa.evaluation.tax.scores import Answers, scores, sentence

    def answers(path: str) -> list[Answers]:
        found = []
        for asked in tasks:
            blocks = [keys[path][asked.name, part.name] for part in asked.parts]
            headers = [items.headers[block] for block in blocks]
            found.append(Answers(asked.name, headers, [record for block in blocks for record in items[block]], asked.by_size))
        return found

    own = answers(request.reference)
    chosen = {name: getattr(request.settings, name) for name in ("bootstrap", "confidence", "seed")}
    models = []
    for model in request.models:
        measured = scores(answers(model.path), own, **chosen)
        told = sentence(model.label, measured, chosen["confidence"])
        models.append({**model.to_json(), "digest": digests[model.path], **measured, "sentence": told})
    reference = {"path": request.reference, "digest": digests[request.reference], **scores(own, None, **chosen)}
    return {"statistics": chosen, "reference": reference, "models": models}
