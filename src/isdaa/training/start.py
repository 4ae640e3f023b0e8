"""What a stage starts from: tokenizer, policy, reference; and the folder that a finished stage leaves."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from isdaa.config import Config, resolved
from isdaa.data.tokenization import TokenizationSettings, tokenizer_digest
from isdaa.errors import UserError
from isdaa.models.loading import load_model, load_tokenizer, random_model
from isdaa.models.saving import save_model, weights_digest
from isdaa.record import NAME as RECORD
from isdaa.record import ModelRecord, record_text
from isdaa.training.cards import model_card
from isdaa.training.run import Run

WORLD = "world:"


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
    return load_tokenizer(name, trust_remote_code=config.model.trust_remote_code, revision=config.model.revision)


def starting_path(run: Run) -> str | None:
    """Where the policy of `reward`, `label` and `align` comes from: this run's SFT model, else `model.path`."""
    if run.is_done("sft"):
        return str(run.folder / "sft")
    return run.config.model.path


def policy_of(run: Run, tokenizer: Any, path: str | None) -> Any:
    """The model at `path`, or a new random one with the tokenizer's vocabulary where `path` is None; on the device."""
    settings = run.config.model
    if path is not None:
        return other_model(run.config, path)
    assert settings.random is not None
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    model: Any = random_model({"vocab_size": len(tokenizer), **ids, **settings.random}, run.config.seed, dtype=settings.dtype)
    return model.to(device() or "cpu")


def other_model(config: Config, path: str) -> Any:
    """A model loaded as the policy is: dtype, device, and the revision where it is the model that training starts from."""
    settings = config.model
    revision = settings.revision if path == settings.path else None
    return load_model(
        path, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code, revision=revision, device=device()
    )


def device() -> str | None:
    """This process's GPU; None, the CPU, where there is none. Reference logps must come from where training computes."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else None


def token_settings(config: Config) -> TokenizationSettings:
    """The tokenization section as the data room's own settings."""
    return TokenizationSettings(**config.tokenization.model_dump())


def logps_key(config: Config, model: Any, tokenizer: Any) -> dict[str, Any]:
    """What reference logps depend on beside the token ids: weights, dtype, tokenizer, template, truncation (METHOD.md)."""
    return {
        "weights": weights_digest(model),
        "dtype": str(next(model.parameters()).dtype),
        "tokenizer": tokenizer_digest(tokenizer),
        "tokenization": asdict(token_settings(config)),
    }


def cache_folder(run: Run) -> Path:
    """Where reference logps are kept: shared by every run beside this one."""
    return Path(run.config.reference.cache_dir or run.folder.resolve().parent / ".isdaa_cache")


def record_of(run: Run, kind: str, **facts: Any) -> ModelRecord:
    """The record beside a model of this run."""
    config = run.config
    evaluation: str | None = config.data.evaluation
    split: str | None = config.data.evaluation_split
    held_out = run.folder / "eval_pairs.jsonl"
    if evaluation is None and held_out.exists():
        evaluation, split = str(held_out), None
    scorer = config.evaluation.scorer
    return ModelRecord(kind=kind, config=resolved(config), evaluation=evaluation, evaluation_split=split, scorer=scorer, **facts)


def described(record: ModelRecord, folder: Path) -> dict[str, str]:
    """Record and card of a model that is, or will be, in `folder`: file name -> text."""
    return {RECORD: record_text(record, folder), "README.md": model_card(record, folder.name)}


def keep_model(model: Any, tokenizer: Any, folder: Path, record: ModelRecord) -> None:
    """Save a finished stage's model as a plain Hugging Face folder with record and card; an adapter is merged."""
    save_model(model, tokenizer, folder, described(record, folder))
