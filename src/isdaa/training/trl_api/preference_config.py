"""`PreferenceConfig`: TRL's `DPOConfig` for this project's objective. Every other name of that class says what became of it.

Defaults are those of `DPOConfig`, so that a script means here what it meant there (docs/migrating.md); those of `isdaa train`
stand in `isdaa.config`.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from isdaa.config.synonyms import SYNONYMS
from isdaa.errors import UserError, nearest
from isdaa.objectives.presets import DEFAULTS, resolve
from isdaa.terminal import say

MIGRATING = "docs/migrating.md"
OBJECTIVE = (
    *("beta", "implicit_reward", "loss", "weight", "clip_eps", "clip", "normalize", "length_penalty", "sft_coefficient"),
    *("label_smoothing", "length_normalized", "max_reward"),
)
# Names of `DPOConfig` that are none here -> what to write instead.
GONE = {
    "loss_type": 'choose a method: sigmoid is method="dpo"; hinge "slic"; ipo "ipo" with length_normalized=True; sigmoid_norm '
    '"dpo" with length_normalized=True',
    "use_weighting": 'choose method="wpo"',
    "truncation_mode": "leave it out: prompts are cut to max_prompt_length (`truncation` says which part is kept), responses at "
    "their end",
    "disable_dropout": "leave it out: dropout is always off",
    "dataset_num_proc": "leave it out: texts are tokenised in threads",
    "padding_free": "leave it out: rows are always packed without padding",
    "pad_to_multiple_of": "leave it out: nothing is padded",
    "precompute_ref_log_probs": "leave it out: reference logps are always computed once, before training, and kept on disk",
    "precompute_ref_batch_size": "leave it out: batches of the reference are cut by tokens",
    "activation_offloading": "leave it out, or use gradient_checkpointing and batch_tokens where memory is short",
    "pad_token": "leave it out: masks decide what is padding",
    "loss_weights": "a sum of losses is not offered; an SFT term is sft_coefficient",
    "ld_alpha": "LD-DPO is not offered; length_penalty and length_normalized are",
    "f_divergence_type": 'f-DPO is not offered; implicit_reward="chi_squared" is the mixed χ² divergence',
    "f_alpha_divergence_coef": "f-DPO is not offered",
    "discopop_tau": "DiscoPOP is not offered",
    "sync_ref_model": "a reference that moves is not offered: its logps are computed once",
    "ref_model_mixup_alpha": "a reference that moves is not offered",
    "ref_model_sync_steps": "a reference that moves is not offered",
    "router_aux_loss_coef": "the auxiliary loss of mixtures of experts is not offered",
}
# Keys of `isdaa train` that transformers calls otherwise.
THEIRS = {
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "precision": "bf16",
}
_OWN_BATCHES = "micro-batches are made by this project's own sampler and loader, which do not read it"
_OWN_EVALUATION = "held-out pairs are evaluated by this project's own code, which does not read it"
_BEST = "not offered here: `isdaa train` with guard.keep: best keeps the checkpoint of the highest win rate"
# Names of `TrainingArguments` of which the default alone is accepted -> why.
DEFAULT_ALONE = {
    "label_smoothing_factor": "the objective's own is label_smoothing",
    "fp16": "log-probabilities need more range; use bf16=True, or neither",
    "bf16_full_eval": _OWN_EVALUATION,
    "fp16_full_eval": _OWN_EVALUATION,
    "torch_compile": "a whole model is not compiled; `isdaa train` has align.compile_layers",
    "torch_compile_backend": "see torch_compile",
    "torch_compile_mode": "see torch_compile",
    "use_liger_kernel": "it replaces the forward pass; here the vocabulary's logits never exist anyway",
    "liger_kernel_config": "see use_liger_kernel",
    "neftune_noise_alpha": "noise would move the policy away from its reference before the first step",
    "torch_empty_cache_steps": "not offered; batch_tokens bounds the memory of a step",
    "auto_find_batch_size": "not offered; batch_tokens splits a batch that does not fit, and changes nothing else",
    "include_num_input_tokens_seen": "not offered; pairs_seen is logged",
    "prediction_loss_only": _OWN_EVALUATION,
    "eval_do_concat_batches": _OWN_EVALUATION,
    "eval_use_gather_object": _OWN_EVALUATION,
    "eval_accumulation_steps": _OWN_EVALUATION,
    "include_for_metrics": _OWN_EVALUATION,
    "batch_eval_metrics": _OWN_EVALUATION,
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "ignore_data_skip": "a resumed run reads on where it stopped, at no cost",
    "accelerator_config": _OWN_BATCHES,
    "parallelism_config": "not offered; DDP, FSDP2 and DeepSpeed are (docs/devices.md)",
    "dataloader_drop_last": "the last, smaller batch counts by its own pairs",
    "dataloader_persistent_workers": _OWN_BATCHES,
    "dataloader_prefetch_factor": _OWN_BATCHES,
    "dataloader_multiprocessing_context": _OWN_BATCHES,
    "dataloader_in_order": _OWN_BATCHES,
    "label_names": _OWN_BATCHES,
    "train_sampling_strategy": "pairs are shuffled and dealt out by length; group_by_prompt brings a prompt's pairs together",
    "length_column_name": _OWN_BATCHES,
}


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class PreferenceConfig(TrainingArguments):
    """Arguments of `preference_trainer`: transformers' own, the objective's, and how text becomes tokens.

    Settings of the objective (`isdaa.Objective`; `isdaa methods` lists the presets) that are None have the method's value.
    docs/migrating.md has every field of TRL's `DPOConfig`.

    Raises:
        UserError: a value that means nothing, or a name of TRL's that is none here, with what to write instead.
    """

    learning_rate: float = _setting(1e-6, "as DPOConfig")
    logging_steps: float = _setting(10, "as DPOConfig")
    bf16: bool | None = _setting(
        None, "autocast to bfloat16; None: as DPOConfig, True, where there is an accelerator that has it"
    )  # type: ignore[assignment]
    gradient_checkpointing: bool = _setting(True, "as DPOConfig")

    method: str = _setting("dpo", "preset of the objective")
    beta: float = _setting(DEFAULTS["beta"], "strength of the implicit KL penalty")
    implicit_reward: str | None = _setting(None, "log_ratio or chi_squared")
    loss: str | None = _setting(None, "logistic, squared or hinge")
    weight: str | None = _setting(None, "none, importance, wpo, shuffled or mean")
    clip_eps: float | None = _setting(None, "upper clip of the log-weight; inf: no clip")
    clip: str | None = _setting(None, "joint or per_response")
    normalize: str | None = _setting(None, "batch: divide by the global batch's mean weight")
    length_penalty: float | None = _setting(None, "α, per token")
    sft_coefficient: float | None = _setting(None, "η of the SFT term")
    label_smoothing: float | None = _setting(None, "share of flipped labels (cDPO)")
    length_normalized: bool | None = _setting(None, "divide the log-ratios by the length in the margin")
    max_reward: float | None = _setting(None, "R_max of χPO")
    allow_stall: bool = _setting(False, "train even if almost all importance weights are 0 at the start")

    max_length: int | None = _setting(1024, "tokens of prompt + response; None: as many as the model has positions")
    max_prompt_length: int | None = _setting(None, "tokens of the prompt; None: four fifths of max_length")
    truncation: Literal["keep_end", "keep_start"] = _setting(
        "keep_end", "the part of a long prompt that is kept: keep_end or keep_start"
    )

    chat_template_kwargs: dict[str, Any] | str | None = _setting(  # noqa: RUF009
        None, "for the chat template, in all conversations; a row's column of this name wins"
    )
    prompt_repeated: Literal["strip", "keep"] | None = _setting(
        None, "where responses begin with the text prompt once more: strip or keep; None: an error if most do"
    )

    reference_cache_dir: str | None = _setting(None, "of reference logps; None: `.isdaa_cache` beside output_dir")
    batch_tokens: int | None = _setting(None, "split a forward pass into pieces of at most so many tokens")
    group_by_prompt: bool = _setting(False, "pairs of one prompt one after the other, sharing its forward pass")
    attention: str = _setting("auto", "kernel of the shared prefix: auto, sdpa, blocks, flex or varlen")
    probe: bool = _setting(True, "compare shared-prefix logps with plain rows before training")

    model_init_kwargs: dict[str, Any] | str | None = _setting(  # noqa: RUF009
        None, "of `isdaa.models.loading.load_model`, for a model given by name"
    )
    trust_remote_code: bool = _setting(False, "run code that a Hub repository ships")

    def __new__(cls, *args: Any, **kwargs: Any) -> PreferenceConfig:
        """Refuse unknown names before `__init__` does, which could not say what became of them."""
        known = [f.name for f in fields(cls) if f.init]
        for name in kwargs:
            if name in GONE:
                raise UserError(f"PreferenceConfig: no {name} here; {GONE[name]} ({MIGRATING})")
            if name not in known:
                key = SYNONYMS.get(name.lower(), name).rpartition(".")[2]
                meant = THEIRS.get(key, key)
                close = f' (did you mean "{meant}"?)' if meant in known else nearest(name, known)
                raise UserError(f"PreferenceConfig: unknown argument {name}{close}; {MIGRATING} lists the names")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check what can be checked without model and data."""
        for name, why in DEFAULT_ALONE.items():
            value, default = getattr(self, name, None), _default(type(self), name)
            if value != default and not (value in (None, False) and default in (None, False, "no")):
                raise UserError(f"PreferenceConfig: {name} must keep its default: {why} ({MIGRATING})")
        self.objective_arguments()
        if self.truncation not in ("keep_end", "keep_start"):
            raise UserError(f"PreferenceConfig: truncation must be keep_end or keep_start, got {self.truncation!r}")
        if self.prompt_repeated not in (None, "strip", "keep"):
            raise UserError(f"PreferenceConfig: prompt_repeated must be strip or keep, got {self.prompt_repeated!r}")
        lacking = not self.use_cpu and not is_torch_bf16_gpu_available() and not is_torch_xla_available()
        if self.bf16 and lacking:
            raise UserError(
                "PreferenceConfig: bf16=True, and there is no accelerator here that has it; leave it out, or bf16=False"
            )
        if self.bf16 is None and lacking:
            say("PreferenceConfig: bf16 is off, for there is no accelerator here that has it: float32 throughout")
        self.bf16 = not lacking if self.bf16 is None else self.bf16
        self.gradient_checkpointing_kwargs = {"use_reentrant": False, **(as_dict(self.gradient_checkpointing_kwargs) or {})}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the name of gradient_checkpointing
            super().__post_init__()
        if str(self.save_strategy) in ("best", "SaveStrategy.BEST"):
            raise UserError(f"PreferenceConfig: save_strategy=best is {_BEST} ({MIGRATING})")
        self.average_tokens_across_devices = False  # the loss is the mean over the pairs of the global batch already
        self.remove_unused_columns = False

    def loading(self) -> dict[str, Any]:
        """The keyword arguments of `isdaa.models.loading.load_model` for a model that is given by name."""
        return {"trust_remote_code": self.trust_remote_code, **(as_dict(self.model_init_kwargs) or {})}

    def objective_arguments(self) -> dict[str, Any]:
        """The keyword arguments of `isdaa.Objective`. Raises UserError for settings that mean nothing."""
        chosen = {name: getattr(self, name) for name in OBJECTIVE if getattr(self, name) is not None}
        if chosen.get("clip_eps") == math.inf:
            chosen["clip_eps"] = None
        try:
            return resolve(self.method, **chosen)
        except ValueError as error:
            raise UserError(f"PreferenceConfig: {error}") from None


def _default(kind: type[Any], name: str) -> Any:
    found = next((f for f in fields(kind) if f.name == name), None)
    if found is None:  # not in this version of transformers
        return None
    return found.default_factory() if found.default_factory is not MISSING else found.default


def as_dict(value: Any) -> Any:
    """A dict that a command line gave as JSON."""
    return json.loads(value) if isinstance(value, str) else value
