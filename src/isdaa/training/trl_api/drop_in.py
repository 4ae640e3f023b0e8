"""`preference_trainer`: what a script calls where it called TRL's `DPOTrainer`. It prepares model, pairs and reference logps,
in the order of the `align` stage, and returns the project's one trainer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from isdaa.config import parsed, resolved
from isdaa.data.reading.sources import pairs_of
from isdaa.data.tokenize_pairs import TokenizationSettings, tokenize_pairs
from isdaa.distributed import once
from isdaa.errors import UserError
from isdaa.files import located
from isdaa.manifest import HISTORY
from isdaa.models.finite_weights import check_finite
from isdaa.models.loading import load_model, load_tokenizer
from isdaa.models.packed.forward import disable_dropout
from isdaa.models.quantised import check_trainable
from isdaa.objectives.formulas import one_line
from isdaa.objectives.objective import Objective
from isdaa.objectives.presets import weighs_by_behaviour
from isdaa.record import ModelRecord, base_of
from isdaa.terminal import say
from isdaa.training.stage_inputs import check_rows, described
from isdaa.training.stages.preparation import Other, Preparation, check_vocabulary, prepared
from isdaa.training.trainer.authors import not_drawn
from isdaa.training.trainer.batches import TokenisedPairs
from isdaa.training.trainer.callbacks import MetricsFile, metrics_at
from isdaa.training.trainer.checkpoints import named
from isdaa.training.trainer.preference_trainer import PreferenceTrainer
from isdaa.training.trl_api.preference_config import MIGRATING, PreferenceConfig, as_dict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

# Of `load_model`.
KEYWORDS = {"dtype", "attn_implementation", "trust_remote_code", "revision", "merge_adapter", "quantization", "dequantize"}
# Settings of the optimiser that a model's card shows.
SHOWN = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "optim", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("weight_decay", "max_grad_norm", "bf16", "gradient_checkpointing", "batch_tokens", "group_by_prompt", "attention"),
)


# Keys of `isdaa train` that are arguments here, and what they are set to.
KEY = re.compile(r"\b(?P<section>objective|tokenization|data|behaviour)\.(?P<name>[a-z_]+)(?:: (?P<value>[a-z_]+))?")


@contextmanager
def _in_python() -> Iterator[None]:
    """Errors that name keys of the configuration name arguments."""
    try:
        yield
    except UserError as error:
        error.args = (KEY.sub(_argument, error.args[0]), *error.args[1:])
        raise


def _argument(found: re.Match[str]) -> str:
    name, value = found["name"], found["value"]
    if found["section"] == "behaviour":
        return "behaviour_model"
    if name not in {field.name for field in fields(PreferenceConfig)}:
        return found[0]
    return name if value is None else f"{name}={value.title() if value in ('true', 'false') else repr(value)}"


@_in_python()
def preference_trainer(
    model: str | nn.Module,
    ref_model: str | nn.Module | None = None,
    args: PreferenceConfig | None = None,
    *,
    train_dataset: Iterable[Mapping[str, Any]] | None = None,
    eval_dataset: Iterable[Mapping[str, Any]] | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    behaviour_model: str | nn.Module | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    optimizers: tuple[Any, Any] = (None, None),
    peft_config: Any = None,
) -> PreferenceTrainer:
    """A `PreferenceTrainer` that is ready to train, from the arguments of TRL's `DPOTrainer` (docs/migrating.md).

    The logps under reference and behaviour policy are computed here, once, and kept on disk. `output_dir` gets `metrics.jsonl`,
    and every checkpoint its card and `isdaa.json`, by which `isdaa evaluate` knows it.

    Args:
        model: a causal language model, a PeftModel around one, or a folder or Hub name. Its dropout is switched off.
        ref_model: π_ref; None: the policy exactly as it is given, an adapter included. Let go before training starts.
        args: settings; None: the defaults, with a folder named after the model.
        train_dataset: rows with prompt, chosen and rejected, as text or messages (docs/configuration.md).
        eval_dataset: the same, held out.
        processing_class: the tokenizer; None: the model's own.
        behaviour_model: μ of the importance weights; None: the rows' own behaviour logps, else π_ref. Let go as `ref_model`.
        callbacks: transformers' own.
        optimizers: an optimizer and a scheduler of your own.
        peft_config: of a new adapter, of a model that carries none.

    Returns:
        The trainer; call its `train()`.

    Raises:
        UserError: bad arguments or rows.
    """
    args = args or PreferenceConfig(f"{_name(model) or 'model'}-preference".rpartition("/")[2])
    if not isinstance(args, PreferenceConfig):
        raise UserError(f"args: a {type(args).__name__}; PreferenceConfig takes its place ({MIGRATING})")
    if train_dataset is None:
        raise UserError("train_dataset: a data set of pairs is needed")
    if ref_model is not None and ref_model is model:
        raise UserError("ref_model: the policy itself, which will change; leave it out: its logps are taken before training")
    policy = _loaded(model, args)
    name = _name(model)
    adapted = isinstance(policy, PeftModel)
    check_trainable(name or "model", policy.config, adapter=adapted or peft_config is not None)
    tokenizer = processing_class if processing_class is not None else _tokenizer(name, args)
    settings = _settings(args, policy)
    train = _pairs(train_dataset, "train_dataset", tokenizer, settings, args)
    held_out = None if eval_dataset is None else _pairs(eval_dataset, "eval_dataset", tokenizer, settings, args)
    sets = [pairs for pairs in (train, held_out) if pairs is not None]
    for pairs in sets:
        check_rows(policy, name, *pairs.extent())
    if adapted and peft_config is not None:
        raise UserError(
            "peft_config: the model carries an adapter already; merge it (model.merge_and_unload()), save that and give it"
        )
    given = args.reference_cache_dir
    how = Preparation(
        tokenizer=tokenizer,
        tokenization=settings,
        probe=args.probe,
        attention=args.attention,
        longest=max(pairs.extent()[1] for pairs in sets),
        precision="bfloat16" if args.bf16 else "float32",
        cache_dir=Path(located(given)) if given else Path(str(args.output_dir)).resolve().parent / ".isdaa_cache",
        objective=args.objective_arguments(),
        mu=None if behaviour_model is None else _name(behaviour_model) or "a model in memory",
        stage="preference",
        say=_say,
    )

    def adapter(plain: Any) -> Any:
        revision = args.loading().get("revision") if isinstance(model, str) else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            return get_peft_model(plain, peft_config, revision=revision)

    sources: dict[str, Other | None] = {
        "reference": None if ref_model is None else _other(ref_model, "reference", args, tokenizer)
    }
    if behaviour_model is not None:
        sources["behaviour"] = _other(behaviour_model, "behaviour", args, tokenizer)
    ready = prepared(
        how,
        policy,
        sets,
        sources,
        rate=args.learning_rate,
        adapter=None if peft_config is None else adapter,
        allow_stall=args.allow_stall,
    )
    policy, sets = ready.policy, ready.sets
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise UserError(
            "model: no parameter of it can be trained; load an adapter with is_trainable=True, or give a peft_config; after "
            "merge_and_unload() call model.requires_grad_(True)"
        )
    # An adapter that came with the policy has no folder of its own that would stand for both.
    reference = _name(ref_model) if ref_model is not None else None if adapted else name
    config = _recorded(args, settings, policy, name, reference, behaviour_model, [len(pairs) for pairs in sets])

    def describe(folder: Path, step: int) -> None:
        metrics = metrics_at(trainer.state.log_history, step)
        record = ModelRecord("policy", config, step=step, reference=reference or None, metrics=metrics, base=base_of(name))
        record.own_logps = [int(ready.own.sum()), len(ready.own)]
        for file, text in described(record, named(folder), adapter=isinstance(policy, PeftModel)).items():
            (folder / file).write_text(text, encoding="utf-8")

    _say([f"{args.method}: {one_line(args.objective_arguments())}"])
    trainer = PreferenceTrainer(
        policy,
        Objective(**args.objective_arguments()),
        args=args,
        forward=ready.forward,
        train_dataset=sets[0],
        eval_dataset=sets[1] if held_out is not None else None,
        tokenizer=tokenizer,
        callbacks=[MetricsFile(Path(str(args.output_dir)) / HISTORY), *callbacks],
        starts_at_reference=ref_model is None,
        batch_tokens=args.batch_tokens,
        group_by_prompt=args.group_by_prompt,
        before_rename=describe,
        description=args.method,
        optimizers=optimizers,
    )
    return trainer


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        say(f"preference: {line}")


def _name(model: Any) -> str:
    """Folder or Hub name of a model; empty where it was made in memory."""
    return model if isinstance(model, str) else str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def _loaded(model: str | nn.Module, args: PreferenceConfig) -> Any:
    """The model on the device that trains it: logps must come from where training computes."""
    if isinstance(model, str):
        wanted = args.loading()
        if unknown := wanted.keys() - KEYWORDS:
            raise UserError(
                f"model_init_kwargs: {min(unknown)} is none of {', '.join(sorted(KEYWORDS))}; load the model yourself"
            )
        if isinstance(dtype := wanted.get("dtype"), torch.dtype):
            wanted["dtype"] = str(dtype).removeprefix("torch.")
        return load_model(model, device=args.device, **wanted)
    if getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None):
        return model  # it is where it must be
    check_finite(_name(model) or "the model", model.to(args.device))
    return model


def _other(model: str | nn.Module, which: str, args: PreferenceConfig, tokenizer: Any) -> Other:
    def load() -> Any:
        other = _loaded(model, args)
        if isinstance(model, str):
            check_vocabulary(model, other, tokenizer, which)
        disable_dropout(other)
        return other

    return Other(load, _name(model))


def _tokenizer(name: str, args: PreferenceConfig) -> Any:
    if not name:
        raise UserError("processing_class: the model names no folder from which its tokenizer could be read; give one")
    wanted = {key: value for key, value in args.loading().items() if key in ("trust_remote_code", "revision")}
    return load_tokenizer(name, **wanted)


def _settings(args: PreferenceConfig, model: Any) -> TokenizationSettings:
    longest = args.max_length or getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not longest:
        raise UserError("max_length: the model does not say how many positions it has; give a number of tokens")
    prompt = args.max_prompt_length or max(1, longest * 4 // 5)
    if prompt >= longest:
        raise UserError(f"max_prompt_length ({prompt}) must be below max_length ({longest})")
    given = as_dict(args.chat_template_kwargs) or {}
    return TokenizationSettings(longest, prompt, args.truncation, given)


def _pairs(rows: Any, which: str, tokenizer: Any, settings: TokenizationSettings, args: PreferenceConfig) -> TokenisedPairs:
    if isinstance(rows, Mapping):
        raise UserError(f"{which}: one data set is expected, not a dict of them; choose one of {', '.join(map(str, rows))}")

    def read() -> tuple[TokenisedPairs, list[str]]:
        canonical, counts = pairs_of(rows, which, repeated=args.prompt_repeated)
        objective = args.objective_arguments()
        tokens, more = tokenize_pairs(canonical, tokenizer, settings, behaviour=weighs_by_behaviour(objective))
        biased = not_drawn(objective, counts) if which == "train_dataset" else []
        return TokenisedPairs(tokens), [*(counts + more).lines(), *biased]

    pairs, lines = once(read)
    _say([f"{which}: {line}" for line in lines])
    return pairs


def _recorded(
    args: PreferenceConfig,
    settings: TokenizationSettings,
    policy: Any,
    name: str,
    reference: str | None,
    behaviour_model: Any,
    counts: list[int],
) -> dict[str, Any]:
    """The run in the words of `isdaa train`'s configuration, as cards and `isdaa evaluate` read it."""
    objective = args.objective_arguments()
    given = {
        "output_dir": str(args.output_dir),
        "seed": args.seed,
        "objective": {"method": args.method, **objective},
        "model": {"path": name or "a model in memory", "trust_remote_code": args.trust_remote_code},
        "reference": {"path": reference or None},
        "behaviour": {"model_path": None if behaviour_model is None else _name(behaviour_model) or "a model in memory"},
        "tokenization": asdict(settings),
    }
    found = resolved(parsed(given, "PreferenceConfig"))
    found["data"] = dict(zip(("pairs", "eval_pairs"), (f"{count} pairs in memory" for count in counts), strict=False))
    shown = {name: getattr(args, name) for name in SHOWN}
    found["align"] = {key: getattr(value, "value", value) for key, value in shown.items() if value not in (None, {})}
    if isinstance(policy, PeftModel):
        config: Any = policy.peft_config["default"]
        targets = config.target_modules
        rank, alpha = getattr(config, "r", 0), getattr(config, "lora_alpha", None)
        found["lora"] = {
            "rank": rank,
            "alpha": alpha,
            "target_modules": targets if isinstance(targets, str) else sorted(targets or ()),
        }
    return found
