"""What other tools call the keys of the configuration: a mistyped key or option is answered with ours first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from isdaa.errors import nearest

# Name elsewhere (TRL, transformers, peft, Axolotl, LLaMA-Factory, the paper's code, habit) -> key here. Where a section with
# a key of that name is written before it (`sft.lr`), the key of that section is meant.
SYNONYMS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(["lr", "learning_rate"], "align.learning_rate"),
        **dict.fromkeys(["epochs", "epoch", "num_epochs", "num_train_epochs", "n_epochs"], "align.epochs"),
        **dict.fromkeys(["steps", "num_steps", "max_train_steps", "total_steps", "max_steps"], "align.max_steps"),
        **dict.fromkeys(
            [
                *("batch", "bs", "batch_size", "micro_batch_size", "train_batch_size", "per_device_batch_size"),
                *("per_device_train_batch_size", "per_device_eval_batch_size", "per_gpu_train_batch_size"),
            ],
            "align.batch_size",
        ),
        **dict.fromkeys(
            ["grad_accum", "gradient_accumulation", "accumulation_steps", "grad_accum_steps", "gradient_accumulation_steps"],
            "align.gradient_accumulation_steps",
        ),
        **dict.fromkeys(["lr_scheduler_type", "scheduler", "schedule", "lr_schedule", "lr_scheduler"], "align.lr_scheduler"),
        **dict.fromkeys(["warmup", "num_warmup_steps", "warmup_steps"], "align.warmup_steps"),
        **dict.fromkeys(["cosine_min_lr_ratio", "min_lr", "min_lr_rate", "min_lr_ratio"], "align.min_lr_ratio"),
        **dict.fromkeys(["optim", "optimiser", "optimizer"], "align.optimizer"),
        **dict.fromkeys(["adam_eps", "adam_epsilon"], "align.adam_epsilon"),
        **dict.fromkeys(["wd", "weight_decay"], "align.weight_decay"),
        **dict.fromkeys(
            ["grad_clip", "clip_grad", "clip_grad_norm", "max_grad_norm", "gradient_clipping"], "align.max_grad_norm"
        ),
        **dict.fromkeys(["bf16", "fp16", "mixed_precision", "precision"], "align.precision"),
        **dict.fromkeys(
            ["activation_checkpointing", "grad_checkpointing", "gradient_checkpointing"], "align.gradient_checkpointing"
        ),
        **dict.fromkeys(["log_steps", "log_every", "logging_steps"], "align.logging_steps"),
        **dict.fromkeys(
            ["wandb", "tensorboard", "trackio", "wandb_project", "logger", "log_with", "report_to"], "align.report_to"
        ),
        **dict.fromkeys(["save_every", "checkpoint_steps", "save_steps"], "align.save_steps"),
        **dict.fromkeys(["eval_every", "eval_steps"], "align.eval_steps"),
        **dict.fromkeys(["keep_checkpoints", "max_checkpoints", "save_total_limit"], "align.save_total_limit"),
        **dict.fromkeys(["attn_implementation", "flash_attention", "flash_attn", "attention"], "align.attention"),
        **dict.fromkeys(["torch_compile", "compile"], "align.compile_layers"),
        **dict.fromkeys(["dpo_beta", "rl_beta", "pref_beta", "kl_coef", "beta"], "objective.beta"),
        **dict.fromkeys(["loss_type", "rl", "pref_loss", "algorithm", "algo", "method"], "objective.method"),
        **dict.fromkeys(["eps", "epsilon", "clip_epsilon", "clip_ratio", "clip_eps"], "objective.clip_eps"),
        **dict.fromkeys(["rpo_alpha", "sft_coef", "sft_weight", "sft_coefficient"], "objective.sft_coefficient"),
        **dict.fromkeys(["alpha_length", "length_alpha", "length_penalty"], "objective.length_penalty"),
        **dict.fromkeys(["dpo_label_smoothing", "label_smoothing_factor", "label_smoothing"], "objective.label_smoothing"),
        "use_weighting": "objective.weight",
        "dpo_use_weighting": "objective.weight",
        "dpo_norm_loss": "objective.length_normalized",
        **dict.fromkeys(["model", "base_model", "model_name", "model_name_or_path", "model_id", "model_path"], "model.path"),
        **dict.fromkeys(["tokenizer", "tokenizer_name", "tokenizer_name_or_path", "tokenizer_config"], "model.tokenizer"),
        **dict.fromkeys(["torch_dtype", "dtype"], "model.dtype"),
        **dict.fromkeys(["model_revision", "revision_of_model", "revision"], "model.revision"),
        **dict.fromkeys(
            ["load_in_4bit", "qlora", "quantization", "quantization_config", "bnb_4bit_quant_type"], "model.quantization"
        ),
        "trust_remote_code": "model.trust_remote_code",
        **dict.fromkeys(["ref_model", "reference_model", "ref_model_path", "ref_path", "reference"], "reference.path"),
        **dict.fromkeys(["behaviour_model", "behavior_model", "behavior", "behaviour", "mu"], "behaviour.model_path"),
        **dict.fromkeys(
            ["dataset", "datasets", "dataset_name", "train_dataset", "train_file", "data_path", "data_files", "pairs"],
            "data.pairs",
        ),
        **dict.fromkeys(["dataset_split", "dataset_train_split", "train_split", "split"], "data.pairs_split"),
        **dict.fromkeys(["eval_dataset", "test_datasets", "validation_file", "eval_file", "eval_pairs"], "data.eval_pairs"),
        **dict.fromkeys(["val_set_size", "val_size", "test_size", "validation_split", "eval_fraction"], "data.eval_fraction"),
        **dict.fromkeys(["dataset_config", "dataset_config_name", "config_name", "subset"], "data.subset"),
        **dict.fromkeys(["max_samples", "max_train_samples", "num_samples", "limit"], "data.limit"),
        **dict.fromkeys(
            ["max_seq_length", "max_seq_len", "sequence_len", "cutoff_len", "seq_length", "max_length"], "tokenization.max_length"
        ),
        "max_prompt_length": "tokenization.max_prompt_length",
        **dict.fromkeys(["truncation_mode", "truncation_side", "truncation"], "tokenization.truncation"),
        "chat_template_kwargs": "tokenization.chat_template_kwargs",
        **dict.fromkeys(["lora_r", "lora_rank", "r", "rank", "use_peft", "adapter", "lora"], "lora.rank"),
        **dict.fromkeys(["lora_alpha", "alpha"], "lora.alpha"),
        **dict.fromkeys(["lora_target_modules", "lora_target_linear", "lora_target", "target_modules"], "lora.target_modules"),
        **dict.fromkeys(["merge_adapter", "merge_lora", "merge"], "lora.merge"),
        **dict.fromkeys(["reward_model", "reward_model_path", "rm", "judge", "scorer"], "evaluation.scorer"),
        **dict.fromkeys(["load_best_model_at_end", "save_best", "keep_best"], "guard.keep"),
        **dict.fromkeys(["early_stopping", "early_stopping_patience", "early_stop"], "guard.stop"),
        **dict.fromkeys(["max_completion_length", "num_generations_max_tokens"], "label.max_new_tokens"),
        "num_generations": "label.samples",
        **dict.fromkeys(["random_seed", "data_seed"], "seed"),
        **dict.fromkeys(["output", "out", "out_dir", "output_path", "save_dir", "run_dir", "logging_dir"], "output_dir"),
        **dict.fromkeys(["stage"], "stages"),
    }
)

# Names that have no key, and what is done instead.
WITHOUT_KEY: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            ["warmup_ratio", "lr_warmup_ratio"], "give align.warmup_steps; `isdaa inspect` says how many steps a run has"
        ),
        **dict.fromkeys(["resume", "resume_from_checkpoint", "resume_from"], "the same command goes on by itself"),
        **dict.fromkeys(["push_to_hub", "hub_model_id", "hub_token"], "afterwards: `hf upload NAME RUN/model` (docs/how_to.md)"),
        "lora_dropout": "dropout is always off",
        **dict.fromkeys(
            ["packing", "sample_packing", "padding_free", "pad_to_max_length"], "rows are always packed, never padded"
        ),
        "precompute_ref_log_probs": "reference logps are always computed once, before training",
        "load_in_8bit": "a model.path whose weights lie in 8 bits is taken as it is",
        **dict.fromkeys(["deepspeed", "fsdp", "fsdp_config"], "accelerate's configuration file says it (docs/devices.md)"),
        **dict.fromkeys(["num_gpus", "n_gpus", "num_processes"], "torchrun or accelerate launch says it (docs/devices.md)"),
        "sync_ref_model": "a reference that moves is not offered",
    }
)


def hint(name: str, known: Iterable[str], prefix: str = "") -> str:
    """` (did you mean "align.learning_rate"?)` for a dotted name that is none of `known`; empty where nothing is close.

    First what other tools call so, in the section that was written before it where that has such a key; then a key of that
    name in another section, then the nearest one. Where there is no such key, what is done instead. prefix: `--` of options.
    """
    known, name = list(known), _plain(name)
    section, _, last = name.rpartition(".")
    names = (last, name.replace(".", "_"))
    for word in names:
        if word in WITHOUT_KEY:
            return f" ({WITHOUT_KEY[word]})"
    target = next((SYNONYMS[word] for word in names if word in SYNONYMS), "")
    own = f"{section}.{target.rpartition('.')[2]}"
    inside = [key for key in known if section and key.startswith(f"{section}.") and key.endswith(f"_{last}")]
    found = next((key for key in (own, target, *inside) if key in known), "")
    if found:
        return f' (did you mean "{prefix}{found}"?)'
    elsewhere = [prefix + key for key in known if "." in key and key.rpartition(".")[2] == last]
    if elsewhere:
        return f" (it belongs to {' or '.join(elsewhere)})"
    return nearest(prefix + name, [prefix + key for key in known])


def _plain(name: str) -> str:
    return str(name).lower().lstrip("-").replace("-", "_")
