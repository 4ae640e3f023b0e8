"""What other tools call the keys of the configuration: a mistyped key or option is answered with ours first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from isdaa.errors import nearest

# Key here -> names elsewhere (TRL, transformers, peft, Axolotl, LLaMA-Factory, the paper's code, habit). Where a section with
# a key of that name is written before it (`sft.lr`), the key of that section is meant.
_NAMES_OF = {
    "align.learning_rate": "lr learning_rate",
    "align.epochs": "epochs epoch num_epochs num_train_epochs n_epochs",
    "align.max_steps": "steps num_steps max_train_steps total_steps max_steps",
    "align.batch_size": (
        "batch bs batch_size micro_batch_size train_batch_size per_device_batch_size per_device_train_batch_size "
        "per_device_eval_batch_size per_gpu_train_batch_size"
    ),
    "align.gradient_accumulation_steps": (
        "grad_accum gradient_accumulation accumulation_steps grad_accum_steps gradient_accumulation_steps"
    ),
    "align.lr_scheduler": "lr_scheduler_type scheduler schedule lr_schedule lr_scheduler",
    "align.warmup_steps": "warmup num_warmup_steps warmup_steps",
    "align.min_lr_ratio": "cosine_min_lr_ratio min_lr min_lr_rate min_lr_ratio",
    "align.optimizer": "optim optimiser optimizer",
    "align.adam_epsilon": "adam_eps adam_epsilon",
    "align.weight_decay": "wd weight_decay",
    "align.max_grad_norm": "grad_clip clip_grad clip_grad_norm max_grad_norm gradient_clipping",
    "align.precision": "bf16 fp16 mixed_precision precision",
    "align.gradient_checkpointing": "activation_checkpointing grad_checkpointing gradient_checkpointing",
    "align.logging_steps": "log_steps log_every logging_steps",
    "align.report_to": "wandb tensorboard trackio wandb_project logger log_with report_to",
    "align.save_steps": "save_every checkpoint_steps save_steps",
    "align.eval_steps": "eval_every eval_steps",
    "align.save_total_limit": "keep_checkpoints max_checkpoints save_total_limit",
    "align.attention": "attn_implementation flash_attention flash_attn attention",
    "align.compile_layers": "torch_compile compile",
    "objective.beta": "dpo_beta rl_beta pref_beta kl_coef beta",
    "objective.method": "loss_type rl pref_loss algorithm algo method",
    "objective.clip_eps": "eps epsilon clip_epsilon clip_ratio clip_eps",
    "objective.sft_coefficient": "rpo_alpha sft_coef sft_weight sft_coefficient",
    "objective.length_penalty": "alpha_length length_alpha length_penalty",
    "objective.label_smoothing": "dpo_label_smoothing label_smoothing_factor label_smoothing",
    "objective.weight": "use_weighting dpo_use_weighting",
    "objective.length_normalized": "dpo_norm_loss",
    "model.path": "model base_model model_name model_name_or_path model_id model_path",
    "model.tokenizer": "tokenizer tokenizer_name tokenizer_name_or_path tokenizer_config",
    "model.dtype": "torch_dtype dtype",
    "model.revision": "model_revision revision_of_model revision",
    "model.quantization": "load_in_4bit qlora quantization quantization_config bnb_4bit_quant_type",
    "model.trust_remote_code": "trust_remote_code",
    "reference.path": "ref_model reference_model ref_model_path ref_path reference",
    "behaviour.model_path": "behaviour_model behavior_model behavior behaviour mu",
    "data.pairs": "dataset datasets dataset_name train_dataset train_file data_path data_files pairs",
    "data.pairs_split": "dataset_split dataset_train_split train_split split",
    "data.eval_pairs": "eval_dataset test_datasets validation_file eval_file eval_pairs",
    "data.eval_fraction": "val_set_size val_size test_size validation_split eval_fraction",
    "data.subset": "dataset_config dataset_config_name config_name subset",
    "data.limit": "max_samples max_train_samples num_samples limit",
    "tokenization.max_length": "max_seq_length max_seq_len sequence_len cutoff_len seq_length max_length",
    "tokenization.max_prompt_length": "max_prompt_length",
    "tokenization.truncation": "truncation_mode truncation_side truncation",
    "tokenization.chat_template_kwargs": "chat_template_kwargs",
    "lora.rank": "lora_r lora_rank r rank use_peft adapter lora",
    "lora.alpha": "lora_alpha alpha",
    "lora.target_modules": "lora_target_modules lora_target_linear lora_target target_modules",
    "lora.merge": "merge_adapter merge_lora merge",
    "evaluation.scorer": "reward_model reward_model_path rm judge scorer",
    "guard.keep": "load_best_model_at_end save_best keep_best",
    "guard.stop": "early_stopping early_stopping_patience early_stop",
    "label.max_new_tokens": "max_completion_length num_generations_max_tokens",
    "label.samples": "num_generations",
    "seed": "random_seed data_seed",
    "output_dir": "output out out_dir output_path save_dir run_dir logging_dir",
    "stages": "stage",
}
# Names that have no key -> what is done instead.
_INSTEAD_OF = {
    "warmup_ratio lr_warmup_ratio": "give align.warmup_steps; `isdaa inspect` says how many steps a run has",
    "resume resume_from_checkpoint resume_from": "the same command goes on by itself",
    "push_to_hub hub_model_id hub_token": "afterwards: `hf upload NAME RUN/model` (docs/how_to.md)",
    "lora_dropout": "dropout is always off",
    "packing sample_packing padding_free pad_to_max_length": "rows are always packed, never padded",
    "precompute_ref_log_probs": "reference logps are always computed once, before training",
    "load_in_8bit": "a model.path whose weights lie in 8 bits is taken as it is",
    "deepspeed fsdp fsdp_config": "accelerate's configuration file says it (docs/devices.md)",
    "num_gpus n_gpus num_processes": "torchrun or accelerate launch says it (docs/devices.md)",
    "sync_ref_model": "a reference that moves is not offered",
}
SYNONYMS: Mapping[str, str] = MappingProxyType({name: key for key, names in _NAMES_OF.items() for name in names.split()})
WITHOUT_KEY: Mapping[str, str] = MappingProxyType({name: why for names, why in _INSTEAD_OF.items() for name in names.split()})


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
