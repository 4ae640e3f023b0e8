"""What a stage starts from: tokenizer, policy, reference; and the folder that a finished stage leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from isdaa.config import Config, OptimisationConfig, resolved
from isdaa.data.encoder import VERSION
from isdaa.data.tokenize_pairs import TokenizationSettings, ending_ids, tokenizer_digest
from isdaa.distributed import once
from isdaa.errors import UserError
from isdaa.evaluation.checkpoints.trajectory import SWEEP
from isdaa.evaluation.model_digest import model_digest
from isdaa.files import digest
from isdaa.models import half_precision
from isdaa.models.loading import load_model, load_tokenizer, random_model
from isdaa.models.lora import add_lora
from isdaa.models.packed.forward import pass_tokens
from isdaa.models.places import is_adapter
from isdaa.models.saving import save_model, weights_digest
from isdaa.objectives.presets import weighs_by_behaviour
from isdaa.record import NAME as RECORD
from isdaa.record import ModelRecord, base_of, record_text
from isdaa.terminal import say, working
from isdaa.training.model_card import model_card
from isdaa.training.preflight import revision_of
from isdaa.training.run_folder import Run
from isdaa.training.trainer.checkpoints import newest_complete_checkpoint, step_of

WORLD = "world:"
NO_NUMBERS = ("architectures", "transformers_version", "use_cache", "dtype", "torch_dtype", "name_or_path")  # of a model's config


def tokenizer_of(config: Config, folder: str | None = None) -> Any:
    """The tokenizer of a run: `model.tokenizer` (a path, a Hub name or `world:SIZE`), else the model's own."""
    name = config.model.tokenizer or folder or config.model.path
    assert name is not None, "the configuration has neither model.path nor model.tokenizer"
    if name.startswith(WORLD):
        from isdaa.world.lexicon import SIZES
        from isdaa.world.tokenizer import build_tokenizer

        size = name.removeprefix(WORLD)
        if size not in SIZES:
            raise UserError(f"model.tokenizer: no world {size!r}; known are {', '.join(SIZES)}")
        return build_tokenizer(size)
    revision = config.model.revision if name == config.model.path else None  # another repository's has other names
    return load_tokenizer(name, trust_remote_code=config.model.trust_remote_code, revision=revision)


def starting_path(run: Run) -> str | None:
    """Where the policy of `reward`, `label` and `align` comes from: this run's SFT model, else `model.path`."""
    if run.is_done("sft"):
        return str(run.folder / "sft")
    return run.config.model.path


def policy_of(run: Run, tokenizer: Any, path: str | None) -> Any:
    """The model at `path`, or a new random one with the tokenizer's vocabulary where `path` is None; on the device."""
    settings = run.config.model
    if path is not None:
        return other_model(run.config, path, settings.quantization)
    assert settings.random is not None
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    model: Any = random_model({"vocab_size": len(tokenizer), **ids, **settings.random}, run.config.seed, dtype=settings.dtype)
    return model.to(device() or "cpu")


def other_model(config: Config, path: str, quantization: str | None = None) -> Any:
    """A model loaded as the policy is: dtype, device, and the revision where it is the model that training starts from."""
    settings = config.model
    return load_model(
        path,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        revision=revision_of(config, path),
        device=device(),
        quantization=quantization,
    )


def trained_adapter(config: Config, path: str) -> Any:
    """The adapter at `path` on its base model, which stays as it is: the adapter alone is trained on."""
    model: Any = load_model(
        path, dtype=config.model.dtype, trust_remote_code=config.model.trust_remote_code, device=device(), merge_adapter=False
    )
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name)
    model.peft_config["default"].inference_mode = False
    return model


def other_digest(config: Config, path: str) -> str:
    """`model_digest` of what `other_model` loads."""
    folder, settings = Path(path).expanduser(), config.model
    if folder.is_dir():
        return model_digest(folder)
    return model_digest(path, settings.trust_remote_code, revision_of(config, path))


def is_start(config: Config, path: str, start: str | None) -> bool:
    """Whether the model at `path` is, file by file, the one at `start` as the policy is loaded from it: the same numbers."""
    if start is None or config.model.quantization is not None:
        return False
    folders = [Path(name).expanduser() for name in (path, start)]
    if not all(folder.is_dir() for folder in folders):
        return path == start  # on the Hub, where one revision of the model that training starts from holds for both
    return model_digest(folders[0]) == model_digest(folders[1])


def device() -> str | None:
    """This process's GPU; None, the CPU, where there is none. Reference logps must come from where training computes."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else None


def uses_behaviour(config: Config) -> bool:
    """Whether the rows' own behaviour logps decide anything: the objective weighs pairs by μ."""
    return weighs_by_behaviour(config.objective.arguments())


def logps_key(
    model: Any, mode: str, tokenizer: Any, settings: TokenizationSettings, weights: str | None = None
) -> dict[str, Any]:
    """What reference logps depend on beside the token ids: weights, architecture, dtype, forward, tokenizer, truncation.

    mode: of the prepared forward (`PairForward.mode`). weights: the model's `weights_digest`, where it is known.
    """
    return {
        "weights": weights or weights_digest(model),
        "config": config_digest(model),
        "dtype": str(next(model.parameters()).dtype),
        "mode": mode,
        "tokenizer": tokenizer_digest(tokenizer),
        "tokenization": asdict(settings),
    }


def config_digest(model: Any) -> str:
    """Digest of a model's configuration: eps, rope, soft caps and scales change logps and are no weights."""
    values = {k: v for k, v in model.config.to_dict().items() if k not in NO_NUMBERS and not k.startswith("_")}
    return digest(json.loads(json.dumps(values, default=str)))


def check_rows(model: Any, path: str | None, highest_id: int, longest: int) -> None:
    """Raises UserError where token ids or positions of the data are beyond what the model has."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if highest_id >= vocabulary:
        raise UserError(
            f"{path or 'model.random'}: token id {highest_id} occurs in the data, but the model's vocabulary has {vocabulary}; "
            "name the tokenizer that belongs to the model"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < longest:
        raise UserError(
            f"{path or 'model.random'}: rows of {longest} tokens, but the model has {positions} positions; "
            "lower --tokenization.max_length"
        )


def cache_folder(run: Run) -> Path:
    """Where reference logps are kept: shared by every run beside this one."""
    return Path(run.config.reference.cache_dir or run.folder.resolve().parent / ".isdaa_cache")


def decided(run: Run, stage: str, model: Any, tokens: float) -> Any:
    """A stage's settings with `precision` float32 or bfloat16: `auto` is decided once a run, said, and kept in `run.json`.

    `label` has those of `align`, whose weights come from its logps. model: what is trained; tokens: of an average row.
    """
    settings: OptimisationConfig = getattr(run.config, "align" if stage == "label" else stage)
    found = run.precision_before(stage) if settings.precision == half_precision.AUTO else settings.precision
    if found is None:
        cache, rows = cache_folder(run), min(int(tokens * settings.batch_size), pass_tokens(model))
        choice = once(lambda: half_precision.choose(model, rows, cache, shared=(cache.parent / SWEEP).is_file()))
        found = choice.precision
        run.say(stage, [f"precision: {found}, since {choice.why}"] if choice.ratio is not None else [])
    run.note(stage, precision=found)
    return settings.model_copy(update={"precision": found})


def record_of(run: Run, kind: str, **facts: Any) -> ModelRecord:
    """The record beside a model of this run."""
    config = run.config
    evaluation = config.data.source("evaluation")
    split: str | None = config.data.evaluation_split
    held_out = run.folder / "eval_pairs.jsonl"
    if evaluation is None and held_out.exists():
        evaluation, split = str(held_out), None
    scorer = config.evaluation_scorer
    facts["trained_on"] = run.state["stages"].get({"policy": "align"}.get(kind, kind), {}).get("trained_on")
    if kind == "policy":
        facts |= {name: run.state["stages"].get("align", {}).get(name) for name in ("continued", "own_logps")}
    base = base_of((config.reward.path if kind == "reward" else None) or config.model.path)
    return ModelRecord(kind, resolved(config), base=base, evaluation=evaluation, evaluation_split=split, scorer=scorer, **facts)


def described(record: ModelRecord, folder: Path, *, adapter: bool = False) -> dict[str, str]:
    """Record and card of a model that is, or will be, in `folder`: file name -> text. adapter: what lies there is one alone."""
    return {RECORD: record_text(replace(record, tokens=VERSION), folder), "README.md": model_card(record, folder, adapter)}


def adapter_base(run: Run, policy: Any, tokenizer: Any, start: str | None) -> str:
    """Where what holds an adapter alone finds its base: the start, or, where that is itself an adapter or a new random model, a
    merged copy in the run's folder."""
    if start is not None and not is_adapter(start, run.config.model.revision if start == run.config.model.path else None):
        path = Path(start).expanduser()
        return str(path.absolute()) if path.is_dir() else start
    base = run.folder / "base"
    if not base.is_dir():
        save_model(policy, tokenizer, base)
    return str(base.absolute())


def new_adapter(config: Config, model: Any, base: str | None) -> Any:
    """The model with a new adapter on it, as the `lora` section describes it. base: what its files name (`adapter_base`)."""
    adapted: Any = add_lora(model, **config.lora.model_dump(exclude={"merge"}), seed=config.seed)
    settings = adapted.peft_config["default"]
    settings.base_model_name_or_path = base
    settings.revision = config.model.revision if base == config.model.path else None  # or another's weights were loaded under it
    return adapted


def rounded_away(of: str, rate: float, share: float | None = None) -> str:
    """The warning about half-precision weights that are trained. of: whose weights; share: of them, that a step of the learning
    rate does not move; None: not measured."""
    most = "most weights" if share is None else f"{share:.0%} of the weights"
    return (
        f"warning: {of} and all weights are trained: an update is about the learning rate ({rate:g}), and one below half of "
        f"their spacing (1/256 of the weight in bfloat16) is rounded away, so that {most} never move; give --model.dtype float32 "
        "(and precision bfloat16), or --lora.rank"
    )


def coarse_weights(model: Any, rate: float) -> list[str]:
    """The same of a model that is to be trained, where a tenth of its weights or more cannot move; measured on a sample."""
    still, count, kinds = 0.0, 0, set()
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype in (torch.bfloat16, torch.float16):
            flat = weight.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // 4096)]
            moved = [(some.float() + step).to(some.dtype) != some for step in (rate, -rate)]
            still += float((~(moved[0] | moved[1])).float().mean()) * len(flat)
            count += len(flat)
            kinds.add(str(weight.dtype).removeprefix("torch."))
    share = still / max(count, 1)
    return [rounded_away(f"the model is in {'/'.join(sorted(kinds))}", rate, share)] if share >= 0.1 else []


def keep_model(
    model: Callable[[], Any],
    tokenizer: Any,
    folder: Path,
    record: ModelRecord,
    log: Path | None = None,
    *,
    merge: bool = True,
) -> None:
    """Save a finished stage's model as a plain Hugging Face folder with record and card; an adapter is merged, unless `merge` is
    False.

    model: gives it; called by the main process alone. log: a file of metrics that goes with it.
    """

    def save() -> None:
        more = {} if log is None else {log.name: log.read_text(encoding="utf-8")}
        files = described(record, folder, adapter=not merge) | more
        save_model(model(), tokenizer, folder, files, merge=merge, stop_ids=ending_ids(tokenizer))

    with working(f"saving {folder.name}"):
        once(save)


def merges(config: Config, model: Any) -> bool:
    """Whether a stage saves its policy merged (`lora.merge`). model: as it is trained; weights of 4 bits that this run has made
    of plain ones count as these."""
    lies_quantised = getattr(model, "is_quantized", False) and config.model.quantization is None
    return not lies_quantised if config.lora.merge is None else config.lora.merge


def trained_model(trainer: Any, load: Callable[..., Any], merge: bool = True) -> Any:
    """The model that a trainer has trained, without what was wrapped around it.

    load: `load_model` or `load_sequence_classifier`. Where each process has a part of the weights only, and where they are
    quantised and to be merged, the model is read from the checkpoint of the last step: an adapter then goes into its base model's
    own weights, or into plain ones made of these.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    sharded, quantised = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled, getattr(model, "is_quantized", False)
    if not sharded and not (quantised and merge):
        return model
    options = {"dequantize": True} if quantised and merge else {} if merge else {"merge_adapter": False}
    return load(Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}", **options)


def resumed(stage: str, folder: Path, steps: int) -> str | None:
    """The newest complete checkpoint below `folder`, the same for every process, and said; None where there is none.

    steps: of the whole stage.
    """
    found = once(lambda: newest_complete_checkpoint(folder))
    if found is not None:
        say(f"{stage}: goes on at step {step_of(found)} of {steps} ({Path(found).name})")
    return found
