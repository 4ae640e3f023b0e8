"""One section of the configuration as explicit `TrainingArguments`."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from isdaa.config import OptimisationConfig

# Of a trained weight: tensors of its own dtype that the optimiser keeps, and bytes beside them.
STATES = {"adamw": (2, 0), "adamw_8bit": (0, 2), "paged_adamw_8bit": (0, 2), "rmsprop": (1, 0), "sgd": (0, 0)}


def training_arguments(
    settings: OptimisationConfig,
    output_dir: str | Path,
    *,
    seed: int,
    pairs: int,
    eval_pairs: int = 0,
    world_size: int = 1,
    use_cpu: bool | None = None,
) -> TrainingArguments:
    """Explicit `TrainingArguments` of an `OptimisationConfig` (an `AlignConfig` for evaluation and checkpoints).

    pairs, eval_pairs: numbers of pairs in the two data sets. `save_steps` null means ten checkpoints a run, and
        `eval_steps` null an evaluation at each.
    """
    steps = total_steps(settings, pairs, world_size)
    save = save_steps(settings, steps)
    evaluate = getattr(settings, "eval_steps", None) or save
    cpu = not torch.cuda.is_available() if use_cpu is None else use_cpu
    run_seed = seed if settings.seed is None else settings.seed
    checkpointing = "activation_checkpointing"  # its name since transformers 5.2x; before it was gradient_checkpointing
    if checkpointing not in TrainingArguments.__dataclass_fields__:
        checkpointing = "gradient_checkpointing"
    recompute: dict[str, Any] = {
        checkpointing: settings.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False},
    }
    optimizers = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit"}
    schedule = {"min_lr_rate": settings.min_lr_ratio} if settings.lr_scheduler == "cosine_with_min_lr" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return TrainingArguments(
            output_dir=str(output_dir),
            num_train_epochs=settings.epochs,
            max_steps=settings.max_steps or -1,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.lr_scheduler,
            lr_scheduler_kwargs=schedule,
            warmup_steps=settings.warmup_steps,
            optim=optimizers.get(settings.optimizer, settings.optimizer),
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_epsilon=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            bf16=settings.precision == "bfloat16",
            fp16=False,
            use_cpu=cpu,
            seed=run_seed,
            data_seed=run_seed,
            logging_strategy="steps",
            logging_steps=settings.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            report_to=list(settings.report_to) or "none",
            disable_tqdm=True,
            save_strategy="steps",
            save_steps=save,
            save_total_limit=getattr(settings, "save_total_limit", None),
            eval_strategy="steps" if eval_pairs else "no",
            eval_steps=evaluate if eval_pairs else None,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            ddp_find_unused_parameters=False,
            average_tokens_across_devices=False,
            **recompute,
        )


def total_steps(settings: OptimisationConfig, pairs: int, world_size: int = 1) -> int:
    """Optimiser steps of a run over `pairs` pairs."""
    if settings.max_steps is not None:
        return settings.max_steps
    per_epoch = -(-pairs // (settings.batch_size * settings.gradient_accumulation_steps * world_size))
    return math.ceil(settings.epochs * per_epoch)


def save_steps(settings: OptimisationConfig, steps: int) -> int:
    """Optimiser steps between two checkpoints of a run of `steps`: `save_steps`, or as many as make ten checkpoints."""
    return getattr(settings, "save_steps", None) or max(1, -(-steps // 10))
