"""One call from checkpoints to numbers: sample, score, analyse, joined by records on disk.

    samples.jsonl, pairs.jsonl   step one (`collect.py`): samples with KL, held-out logps
    scores.jsonl                 step two (`scoring.py`)
    metrics.json                 step three (`analysis.py`)
    plan.json                    which of the records belong to the latest evaluation in the folder

Each step can be run again alone; each block of work (one checkpoint, one purpose) is kept under a key of the model's
weights, prompts and settings, so a second call reuses what is finished and a kill loses at most the block in work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isdaa.config import EvaluationConfig, Position
from isdaa.data.encoder import TokenizationSettings
from isdaa.distributed import is_main, once
from isdaa.errors import UserError
from isdaa.evaluation.card_section import write_sections
from isdaa.evaluation.checkpoint import Checkpoint
from isdaa.evaluation.checkpoints.analysis import analyse, check_opponent
from isdaa.evaluation.checkpoints.held_out import common_pairs, tokenize_held_out
from isdaa.evaluation.checkpoints.kept import merged
from isdaa.evaluation.checkpoints.own_scores import OwnScores, check_drawn
from isdaa.evaluation.checkpoints.sample_and_kl import PLAN, SAMPLES, Collection, tokenize
from isdaa.evaluation.checkpoints.scoring import score
from isdaa.evaluation.checkpoints.steps import ordered
from isdaa.evaluation.checkpoints.what_to_evaluate import EvaluationRequest, checkpoints, home_of
from isdaa.evaluation.left_out import check_weights
from isdaa.evaluation.model_digest import model_digest
from isdaa.evaluation.records import METRICS, locked, read_metrics, read_plan
from isdaa.evaluation.scorers import (
    GoldScorer,
    OwnScorer,
    RewardModelScorer,
    Scorer,
    about,
    doubts_of,
    learnt_alike,
    load_scorer,
)
from isdaa.evaluation.vocabulary import REFERENCE, base_remarks, check_ids, choose, vocabulary_of
from isdaa.files import write_atomically, write_json
from isdaa.record import read_record, run_folder
from isdaa.terminal import say

if TYPE_CHECKING:
    from isdaa.evaluation.checkpoints.judged_samples import SampleJudge

Row = Mapping[str, Any]
# Arguments of `evaluate` that a `Request` has under the same names.
SAME = (
    *("reference", "settings", "tokenization", "output_dir", "dtype", "trust_remote_code", "position", "label", "revision"),
    *("show_scorer_input", "one_run", "doubts", "tokenizer", "judge_model", "all_opponents"),
)


def evaluate(
    models: Sequence[str | Path | Checkpoint],
    *,
    reference: str | Path,
    prompts: Iterable[Row],
    scorer: Scorer | str | None = None,
    settings: EvaluationConfig | None = None,
    tokenization: TokenizationSettings | None = None,
    output_dir: str | Path,
    held_out: Iterable[Row] | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    shared: str | Path | None = None,
    position: Position = "auto",
    revision: str | None = None,
    one_run: bool = False,
    doubts: Sequence[str] = (),
    keep: bool = False,
    tokenizer: str | Path | None = None,
    label: str | None = None,
    show_scorer_input: bool = False,
    judge_model: SampleJudge | None = None,
    all_opponents: bool = False,
) -> dict[str, Any]:
    """Evaluate checkpoints against their reference on held-out prompts; returns what `metrics.json` holds.

    Args:
        models: model folders or Hub names, all with the vocabulary of the first one, in the order of the table.
        reference: π_ref; it is sampled and scored once for all models and all later calls.
        prompts: canonical prompt rows (`isdaa.data.reading.sources.load_prompts`); the first `settings.prompts` are used.
        scorer: `gold`, a reward model's folder or Hub name, or anything that `OwnScorer` takes. Without: no win rate, no verdict.
        held_out: canonical pairs (`load_pairs`) for accuracy, margins and drift.
        output_dir: folder of the records. One process at a time.
        dtype: of the policies' weights in memory; a reward model always runs in fp32.
        trust_remote_code: run code that a policy's Hub repository ships.
        shared: folder of another evaluation, whose records (the reference's samples, say) are read and not made again.
        position: where a reward model named by `scorer` is read, `scorer.position` of the configuration.
        label: of a reward model with two labels, the one that means good, `scorer.label` of the configuration.
        show_scorer_input: say once what a reward model is fed for the first prompt, token by token, before anything is sampled.
        revision: of the reference, where it is a name of the Hub.
        one_run: the models are one run's, in the order given. doubts: sentences that the report repeats as warnings.
        keep: an evaluation of other models in the folder stays, with these added to it.
        tokenizer: folder or Hub name of the tokenizer of all models; None: the first model's, its base's or the reference's.
        judge_model: in place of a scorer, a judge model that compares the samples; its `stopped` says what is left undone.
        all_opponents: draw `settings.opponent_samples` of the reference without a scorer, too, to be scored elsewhere.

    Raises UserError; with `keep`, `Replaces` where the evaluation in the folder is not one that these models can be added to.
    """
    settings = settings or EvaluationConfig.model_validate({})
    tokenization = tokenization or TokenizationSettings()
    if not models:
        raise UserError("no model to evaluate: give --model_path")
    described = checkpoints([model for model in models if not isinstance(model, Checkpoint)])
    foreign = [model.path for model in described if Path(model.path).is_dir() and read_record(model.path) is None]
    steps = ordered(foreign, foreign, as_one_run=False, given_order=one_run).steps
    known = {model.path: replace(model, step=steps.get(model.path, model.step)) for model in described}
    entries = [model if isinstance(model, Checkpoint) else known[str(model)] for model in models]
    shared = shared if shared is not None else _shared_before(Path(output_dir))
    prompts = list(islice(prompts, settings.prompts))
    judge = scorer
    if isinstance(scorer, str):
        judge = load_scorer(scorer, max_prompt_length=tokenization.max_prompt_length, position=position, label=label)
    elif scorer is not None and not isinstance(scorer, OwnScorer | OwnScores | GoldScorer | RewardModelScorer):
        judge = OwnScorer(scorer)
    assert not isinstance(judge, str)
    if judge is not None:
        for line in about(judge, prompts):
            say(f"scorer {judge.name}: {line}")
    if judge is not None and judge_model is not None:
        raise UserError(f"a scorer ({judge.name}) and a judge model ({judge_model.name}) are named; give one of the two")
    if isinstance(judge, OwnScores):
        settings = settings.model_copy(update={"opponent_samples": judge.opponents})
        check_drawn([Path(folder) for folder in (output_dir, shared) if folder is not None], judge)
    # All input is looked at before there is a folder: a call that fails on it leaves nothing behind.
    paths, reference = [entry.path for entry in entries], str(reference)
    pairs = list(held_out) if held_out is not None else []
    chosen = choose(
        paths,
        reference,
        given=str(tokenizer) if tokenizer is not None else None,
        conversations=any(isinstance(row.get("prompt"), list) for row in (*prompts, *pairs)),
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
    vocabulary = vocabulary_of(paths, reference, trust_remote_code, revision)
    rows = tokenize(prompts, chosen.tokenizer, settings, tokenization)
    tokenized_pairs = tokenize_held_out(pairs, chosen.tokenizer, tokenization)
    check_ids(vocabulary, chosen, reference, [*rows.rows, *tokenized_pairs], set().union(*rows.stop.values()))
    check_opponent(rows.rows, settings)
    if (check := getattr(judge, "check", None)) is not None:
        once(lambda: check(rows.rows))
    if show_scorer_input and judge is not None:
        shown = getattr(judge, "shown_input", None)
        for line in once(lambda: shown(rows.rows[0])) if shown else [f"scorer {judge.name}: it is fed no tokens"]:
            say(line)
    left_out = once(lambda: check_weights(entries, str(reference), trust_remote_code, revision))
    entries = [model for model in entries if model.path not in {left["path"] for left in left_out}]
    collection = Collection(
        entries,
        reference,
        rows,
        settings,
        Path(output_dir),
        held_out=tokenized_pairs,
        scored=judge is not None or judge_model is not None or all_opponents,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        shared=Path(shared) if shared is not None else None,
        revision=revision,
        more=({"one_run": True} if one_run else {}) | ({"doubts": list(doubts)} if doubts else {}),
        vocabulary=vocabulary,
        left_out=left_out,
    )
    recorded = {path: record.reference for path in paths if (record := read_record(path)) is not None}
    remarks = [
        *vocabulary.told({reference: REFERENCE} | {entry.path: entry.label for entry in entries}),
        *base_remarks(paths, reference, recorded, lambda path: collection.digests.get(path) or model_digest(path)),
        *doubts_of(judge),
        *learnt_alike(judge, [record.trained_on for path in paths if (record := read_record(path)) is not None]),
    ]
    for line in remarks:
        say(line)
    collection.more |= {"doubts": [*doubts, *remarks]} if remarks else {}
    if judge_model is not None:
        once(lambda: judge_model.check(Path(output_dir), collection.plan(), rows.rows))
    with locked(output_dir) as folder:
        once(lambda: _check_replaced(folder, entries))
        if keep:
            one = judge if judge is not None else judge_model
            own = judge_model.digests if judge_model is not None else (judge.digest,) if isinstance(judge, OwnScores) else ()
            collection.more |= once(lambda: merged(folder, collection.plan(), rows.rows, one.name if one else None, own))
        if isinstance(judge, OwnScores):
            judge.bind(folder, collection.plan(), collection.samples)
        if judge_model is not None:
            once(partial(judge_model.announce, folder, collection.plan(), rows.rows))
        with _former_stays(folder):
            collection.run()
            if judge_model is not None:
                judge_model.judge(folder)
            if judge is not None:
                score(folder, judge)
            once(lambda: analyse(folder, settings))
            return once(lambda: with_verdicts(folder))


@contextmanager
def _former_stays(folder: Path) -> Iterator[None]:
    """Where an evaluation ends without a result, the finished one that lay in the folder can still be read; the records that
    were made stay beside it."""
    files = [folder / PLAN, folder / METRICS]
    before = {file: file.read_bytes() for file in files if file.is_file()}
    try:
        yield
    except BaseException:
        changed = [file for file in before if not file.is_file() or file.read_bytes() != before[file]]
        if is_main() and len(before) == len(files) and changed:
            for file in changed:
                write_atomically(file, before[file].decode("utf-8"))
            say(f"{folder}: the evaluation that was here before stays as it was")
        raise


def _plan_before(folder: Path) -> dict[str, Any]:
    """The plan of the evaluation that lies in a folder already; empty where there is none."""
    return read_plan(folder / PLAN) if (folder / PLAN).is_file() else {}


def _shared_before(folder: Path) -> Path | None:
    """The evaluation whose records an earlier one in this folder read: a sweep's run goes on sharing its reference's samples."""
    shared = _plan_before(folder).get("shared")
    return folder / shared if shared is not None and (folder / shared).is_dir() else None


def _check_replaced(folder: Path, models: Sequence[Checkpoint]) -> None:
    """Raises UserError where an evaluation of checkpoints that are gone would be replaced by one of those that are left."""
    runs = {run_folder(model.path) for model in models} - {None}
    before = [model["path"] for model in _plan_before(folder).get("models", []) if run_folder(model["path"]) in runs]
    gone = [path for path in before if not Path(path).exists()]
    if gone:
        raise UserError(
            f"{folder}: holds the evaluation of {len(before)} checkpoints, of which {len(gone)} are gone from disk; it is not "
            "replaced by one of the others alone: choose another folder with --output"
        )


def with_verdicts(folder: str | Path) -> dict[str, Any]:
    """The metrics with `verdicts`: run -> what its checkpoints say together, null where they say nothing; `no_verdict`: run ->
    why they do not, null where they do; and `better`: run -> whether a checkpoint of it is shown to be better than the reference,
    null where that is not known. Written, too."""
    from isdaa.evaluation.checkpoints.trajectory import runs_ended, trajectories
    from isdaa.evaluation.verdict.overoptimization import judge, shown_better, why_none

    runs = trajectories(folder)
    metrics = read_metrics(Path(folder) / METRICS)
    verdicts = {run.name: judge(run, opponent=metrics["opponent"]) for run in runs}
    metrics["verdicts"] = {name: None if found is None else asdict(found) for name, found in verdicts.items()}
    metrics["no_verdict"] = {run.name: why_none(run) for run in runs}
    metrics["better"] = {run.name: shown_better(run) for run in runs}
    if ended := runs_ended(folder):
        metrics["ended"] = ended
    write_json(Path(folder) / METRICS, metrics)
    return metrics


def evaluate_request(request: EvaluationRequest, keep: bool = True) -> dict[str, Any]:
    """`evaluate` for what `requests` found: reads the rows, then evaluates; the metrics also say where the rows came from."""
    from isdaa.data.reading.sources import load_prompts

    for line in (*request.told, *(f"warning: {doubt}" for doubt in request.doubts)):
        say(line)
    scorer = OwnScores(request.scores) if request.scores is not None else request.scorer
    prompts, counts = once(lambda: load_prompts(request.data, request.split, repeated=request.repeated))
    for line in counts.lines()[1:]:
        say(f"{request.data}: {line}")
    held_out = once(lambda: common_pairs(request.held_out) if request.held_out else _pairs_of(request, prompts))
    same: dict[str, Any] = {name: getattr(request, name) for name in SAME}
    shared = request.shared if request.shared is not None else _drawn_at_home(request)
    metrics = evaluate(request.models, prompts=prompts, scorer=scorer, held_out=held_out, shared=shared, keep=keep, **same)
    metrics |= {"data": request.data, "split": request.split}
    metrics |= {"tokenizer_path": request.tokenizer} if request.tokenizer is not None else {}
    once(lambda: write_json(Path(request.output_dir) / METRICS, metrics))
    once(lambda: write_sections(metrics))
    return metrics


def _drawn_at_home(request: EvaluationRequest) -> str | None:
    """Where a file of scores goes into another folder than the models' own: theirs, which holds the samples."""
    if request.scores is None or (Path(request.output_dir) / SAMPLES).is_file():
        return None
    home = home_of([model.path for model in request.models])
    return str(home) if (Path(home) / SAMPLES).is_file() else None


def _pairs_of(request: EvaluationRequest, prompts: Iterable[Row]) -> list[Row] | None:
    """The pairs of the prompts that are evaluated, where `request.data` holds pairs and not prompts alone."""
    from isdaa.data.reading.sources import load_pairs, load_rows, prompt_key

    (first,) = load_rows(request.data, request.split, limit=1)
    if all(first.get(name) is None for name in ("rejected", "rejected_ids")):
        return None
    pairs, _ = load_pairs(request.data, request.split, repeated=request.repeated)
    evaluated = {prompt_key(row) for row in islice(prompts, request.settings.prompts)}
    return [pair for pair in pairs if prompt_key(pair) in evaluated]
