"""The configuration: one pydantic model a section, every default in one place, unknown keys refused with the nearest name.

A YAML file and `--section.key value` options are merged as plain data and validated once, so that both speak the same
language and get the same one-line errors.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from isdaa.errors import UserError
from isdaa.files import at_home, located, usable
from isdaa.objectives.presets import DEFAULTS, PRESETS, Clip, ImplicitReward, Loss, Weight, known_method, resolve
from isdaa.settings_text import read_settings
from isdaa.synonyms import SYNONYMS, hint

logger = logging.getLogger(__name__)

FromPreset = Literal["preset"]
Stage = Literal["sft", "reward", "label", "align"]
Position = Literal["auto", "template_end", "response_end"]  # where a reward model is read
DEEPEST = 100  # lists and dictionaries in one another
STAGES: tuple[str, ...] = get_args(Stage)
REWARD = "reward"  # as a scorer: the model of the run's own reward stage


def _no_boolean(value: Any) -> Any:
    """Python counts True as 1; nobody who writes `true` means it."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {value}")
    return value


def _yaml_float(value: Any) -> Any:
    """YAML 1.1 reads `1e-6` as text; people write it all the time."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return _no_boolean(value)


Float = Annotated[float, BeforeValidator(_yaml_float)]
Int = Annotated[int, BeforeValidator(_no_boolean)]
Location = Annotated[str, AfterValidator(at_home)]  # a folder, a file, or a name on the Hub
Seed = Annotated[Int, Field(ge=0, le=2**32 - 1)]  # what torch and numpy both take


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and so are infinities, NaN, and text that is empty or no Unicode."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _plain_data(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):  # which checks its own
            _check_plain(value)
        return value


def _check_plain(value: Any, depth: int = 0) -> None:
    if isinstance(value, str) and (value or not depth):  # an empty one in a dictionary is handed on as it is
        usable(value)
    elif depth and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected finite numbers, got {value}")
    elif depth > DEEPEST:
        raise ValueError(f"nested deeper than {DEEPEST}")
    elif isinstance(value, (dict, list, tuple)):
        for one in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_plain(one, depth + 1)


class ObjectiveConfig(Section):
    """What is minimised. `preset` means: the value that the named method has (`isdaa methods`)."""

    method: Annotated[str, AfterValidator(known_method)] = Field(
        "is_dpo",
        description="preset to start from (docs/which_method.md; `isdaa methods` has formulas and sources)",
        json_schema_extra={"choices": [*PRESETS]},
    )
    beta: Annotated[Annotated[float, Field(gt=0)] | FromPreset, BeforeValidator(_yaml_float)] = Field(
        "preset", description="strength of the implicit KL penalty"
    )
    implicit_reward: ImplicitReward | FromPreset = Field("preset", description="r(Δ): Δ, or Δ + e^Δ (χPO)")
    loss: Loss | FromPreset = Field("preset", description="loss on the margin")
    weight: Weight | FromPreset = Field("preset", description="what each pair's loss is multiplied by")
    clip: Clip | FromPreset = Field("preset", description="where the importance weight is clipped")
    clip_eps: Annotated[Annotated[float, Field(ge=0)] | FromPreset | None, BeforeValidator(_yaml_float)] = Field(
        "preset", description="upper clip ε of the log-weight; null: no clip"
    )
    normalize: Literal["batch"] | FromPreset | None = Field("preset", description="divide by the global batch's mean weight")
    length_penalty: Annotated[float | FromPreset, BeforeValidator(_yaml_float)] = Field(
        "preset", description="α, per token of length difference"
    )
    sft_coefficient: Annotated[Annotated[float, Field(ge=0)] | FromPreset, BeforeValidator(_yaml_float)] = Field(
        "preset", description="η of the SFT term"
    )
    label_smoothing: Annotated[Annotated[float, Field(ge=0, le=0.5)] | FromPreset, BeforeValidator(_yaml_float)] = Field(
        "preset", description="s, the share of labels that is taken for wrong; logistic loss only"
    )
    length_normalized: bool | FromPreset = Field("preset", description="divide the log-ratios by the length in the margin")
    max_reward: Annotated[Annotated[float, Field(gt=0)] | FromPreset | None, BeforeValidator(_yaml_float)] = Field(
        "preset", description="R_max of χPO: β·h is clipped to ±2·R_max; chi_squared only"
    )
    allow_stall: bool = Field(False, description="train although the weights at the start let hardly any pair teach")

    @model_validator(mode="after")
    def _meaningful(self) -> ObjectiveConfig:
        self.arguments()
        return self

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `isdaa.Objective`."""
        chosen = {name: value for name, value in self if name not in ("method", "allow_stall") and value != "preset"}
        return resolve(self.method, **chosen)


class ModelConfig(Section):
    """The model that training starts from."""

    path: Location | None = Field(None, description="folder or Hub name; null with `random` set: a new small model")
    random: dict[str, Any] | None = Field(None, description="config of a randomly initialised model, with its `model_type`")
    tokenizer: Location | None = Field(None, description="folder, Hub name or `world:small`; null: the model's own")
    dtype: Literal["float32", "bfloat16", "auto"] = Field("float32", description="of the weights in memory")
    trust_remote_code: bool = Field(False, description="run code that a Hub repository ships")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    quantization: Literal["nf4"] | None = Field(None, description="nf4: frozen weights of 4 bits under an adapter (QLoRA)")


class ReferenceConfig(Section):
    """π_ref, in every margin."""

    path: Location | None = Field(None, description="null: the policy exactly as loaded, an SFT adapter included")
    revision: str | None = Field(None, description="branch, tag or commit of `reference.path` on the Hub")
    cache_dir: Location | None = Field(None, description="of reference logps; null: `.isdaa_cache` beside the output folder")


class BehaviourConfig(Section):
    """μ, in the denominator of the importance weight."""

    model_path: Location | None = Field(None, description="model that wrote the responses; null: the rows' own logps, else π_ref")


class DataConfig(Section):
    """Preference pairs for `align` and `reward`, SFT examples and prompts for the earlier stages."""

    pairs: Location | None = Field(None, description="file, folder, Hub name, recipe; null: what the `label` stage wrote")
    pairs_split: str = Field("train", description="split of a Hub data set or of a folder with splits")
    eval_pairs: Location | None = Field(None, description="held-out pairs; null: eval_fraction of the prompts")
    eval_split: str = Field("test", description="split of `eval_pairs`")
    eval_fraction: Float = Field(0.05, ge=0, lt=1, description="of the prompts, held out where `eval_pairs` is null")
    sft: Location | None = Field(None, description="SFT examples: file, folder, Hub name, recipe or `world:small`")
    sft_split: str = Field("train", description="split of `sft`")
    prompts: Location | None = Field(None, description="prompts that `label` samples for")
    prompts_split: str = Field("train", description="split of `prompts`")
    evaluation: Location | None = Field(
        None, description="held-out prompts of `isdaa evaluate`; null: the held-out pairs' prompts"
    )
    evaluation_split: str = Field("test", description="split of `evaluation`")
    limit: Int | None = Field(None, ge=1, description="read at most this many rows of each source")
    subset: str | None = Field(
        None, description="configuration of the Hub data sets named above, or a sub-folder of that name in a local copy"
    )
    prompt_repeated: Literal["strip", "keep"] | None = Field(
        None, description="where responses begin with the text prompt once more; null: an error if most do"
    )

    def source(self, name: str) -> str | None:
        """One of the sources, with the subset where that is for it: `owner/name:subset`."""
        value: str | None = getattr(self, name)
        if value is None or self.subset is None:
            return value
        path = Path(value).expanduser()
        hub = not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", value) is not None
        return f"{value}:{self.subset}" if hub or (path / self.subset).is_dir() else value

    @model_validator(mode="after")
    def _subset_of_something(self) -> DataConfig:
        names = ("pairs", "eval_pairs", "sft", "prompts", "evaluation")
        if self.subset is not None and all(self.source(name) == getattr(self, name) for name in names):
            raise ValueError(f"subset: no source is a Hub data set (owner/name) or a folder that holds a folder '{self.subset}'")
        return self


class TokenizationConfig(Section):
    """How text becomes token ids (method.md, "Text to tokens")."""

    max_length: Int = Field(640, ge=2, description="tokens of prompt + response")
    max_prompt_length: Int = Field(512, ge=1, description="tokens of the prompt")
    truncation: Literal["keep_end", "keep_start"] = Field("keep_end", description="the part of a long prompt that is kept")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="for the chat template, as {enable_thinking: false}; a row's column of this name wins"
    )

    @model_validator(mode="after")
    def _room_for_a_response(self) -> TokenizationConfig:
        if self.max_prompt_length >= self.max_length:
            raise ValueError(f"max_prompt_length ({self.max_prompt_length}) must be below max_length ({self.max_length})")
        return self


class OptimisationConfig(Section):
    """Optimiser and schedule of one training stage."""

    epochs: Float = Field(1.0, gt=0, description="passes over the training rows")
    max_steps: Int | None = Field(None, ge=1, description="stop after this many optimiser steps; null: `epochs` decides")
    batch_size: Int = Field(8, ge=1, description="rows (pairs) of one forward pass on one device")
    gradient_accumulation_steps: Int = Field(1, ge=1, description="forward passes of one optimiser step")
    learning_rate: Float = Field(1e-6, ge=0, description="at its highest, after the warm-up")
    lr_scheduler: Literal["cosine_with_min_lr", "cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine_with_min_lr", description="how the learning rate falls; all but `constant` start with the warm-up"
    )
    min_lr_ratio: Float = Field(0.1, ge=0, le=1, description="floor of `cosine_with_min_lr`")
    warmup_steps: Int = Field(150, ge=0, description="optimiser steps in which the learning rate rises from 0")
    optimizer: Literal["adamw", "sgd", "rmsprop", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw", description="AdamW has β₁ = 0.9 and β₂ = 0.999; those of 8 bits need bitsandbytes"
    )
    adam_epsilon: Float = Field(1e-5, gt=0, description="ε in AdamW's denominator")
    weight_decay: Float = Field(0.0, ge=0, description="of all weights but biases and norms")
    max_grad_norm: Float = Field(1.0, ge=0, description="the gradient's norm is clipped to it; 0: no gradient clipping")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: autocast on top of `model.dtype`")
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, more time"
    )
    seed: Seed | None = Field(None, description="null: the run's seed")
    logging_steps: Int = Field(10, ge=1, description="a line of `metrics.jsonl` every n optimiser steps (docs/metrics.md)")
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list, description="trackers that get the metrics, too; `[]` or `none`: none"
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _none_or_one(cls, value: Any) -> Any:
        """`none` and a tracker's bare name, as transformers and TRL take them."""
        return [] if value in (None, "none", ["none"], [None]) else [value] if isinstance(value, str) else value


class SftConfig(OptimisationConfig):
    """Supervised fine-tuning, on the completion alone."""

    learning_rate: Float = Field(1e-5, ge=0, description="at its highest, after the warm-up")


class RewardConfig(OptimisationConfig):
    """A reward model on preference pairs (TRL's RewardTrainer)."""

    path: Location | None = Field(None, description="base model; null: the model that this run starts from (or trained in `sft`)")
    eval_steps: Int | None = Field(None, ge=1, description="held-out accuracy every n steps; null: ten times a run")


class ScorerConfig(Section):
    """How reward models are read that score: in `label`, by the guard and in evaluations."""

    position: Position = Field(
        "auto",
        description="the token whose output is the score; auto: where the model's maker trained it, as its folder tells "
        "(docs/evaluation.md); template_end: where plain transformers reads it; response_end: the last token of the response",
    )
    label: str | None = Field(
        None, description="of a classifier with two labels, the one that means good, by name or number; null: by their names"
    )


class LabelConfig(Section):
    """Sample n responses a prompt, score them, make pairs."""

    scorer: Location | None = Field(
        None, description="`gold` (embedded world), a sequence-classification model's path, or `reward`: this run's own"
    )
    samples: Int = Field(2, ge=2, description="responses a prompt")
    pairing: Literal["random", "best_worst"] = Field("random", description="best_worst is not a draw from μ × μ, and is marked")
    label: Literal["sample", "argmax"] = Field(
        "sample", description="Bradley–Terry draw, or the larger reward; with best_worst: argmax"
    )
    scale: Float = Field(1.0, gt=0, description="σ(scale · reward difference) is the Bradley–Terry probability")
    max_new_tokens: Int = Field(128, ge=1, description="limit of a response; what it cuts has no end (EOS)")
    temperature: Float = Field(1.0, ge=0, description="of the samples; at 1, with top_p 1 and top_k 0, they are draws from μ")
    top_p: Float = Field(1.0, gt=0, le=1, description="sample from the most probable tokens of this mass")
    top_k: Int = Field(0, ge=0, description="sample from the k most probable tokens; 0: from all")
    batch_size: Int = Field(64, ge=1, description="responses sampled at a time")
    seed: Seed | None = Field(None, description="null: the run's seed")

    @model_validator(mode="before")
    @classmethod
    def _label_of_the_pairing(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("pairing") == "best_worst" and values.get("label") is None:
            return {**values, "label": "argmax"}
        return values

    @model_validator(mode="after")
    def _best_is_chosen(self) -> LabelConfig:
        if self.pairing == "best_worst" and self.label == "sample":
            raise ValueError(
                "label: sample draws which response is chosen, so that the worst can be, and pairing: best_worst says that the "
                "best is; leave label out (argmax), or set pairing: random"
            )
        return self


class AlignConfig(OptimisationConfig):
    """Preference training."""

    batch_tokens: Int | None = Field(
        None,
        ge=1,
        description="split a forward pass into pieces of at most so many tokens; null: on a CPU of a few seconds, else not",
    )
    group_by_prompt: bool = Field(False, description="pairs of one prompt one after the other, sharing its forward pass")
    attention: Literal["auto", "sdpa", "blocks", "flex", "varlen"] = Field(
        "auto", description="kernel of the shared prefix; auto: the fastest that proves itself on this device"
    )
    compile_layers: bool = Field(False, description="torch.compile of every decoder layer; not with gradient_checkpointing")
    eval_steps: Int | None = Field(None, ge=1, description="held-out loss and accuracy every n steps; null: at each save")
    save_steps: Int | None = Field(None, ge=1, description="a checkpoint every n optimiser steps; null: ten a run")
    save_total_limit: Int | None = Field(None, ge=1, description="keep the newest n checkpoints; null: all of them")
    probe: bool = Field(True, description="compare shared-prefix logps with plain rows before training")


class LoraConfig(Section):
    """A new low-rank adapter on the policy (peft)."""

    rank: Int = Field(0, ge=0, description="0: full fine-tuning")
    alpha: Float = Field(16.0, gt=0, description="the adapter's output is multiplied by alpha / rank")
    target_modules: str | list[str] = Field("all-linear", description="names, or ends of names, of linear layers")
    merge: bool | None = Field(
        None,
        description="save the model with the adapter in its weights; false: the adapter alone; null: merged, but where the base "
        "model's folder holds quantised weights, which true turns into plain ones",
    )

    @field_validator("target_modules")
    @classmethod
    def _some_module(cls, value: str | list[str]) -> str | list[str]:
        if not value or not all(value):
            raise ValueError(f"name at least one module, or all-linear, got {value!r}")
        return value


class EvaluationConfig(Section):
    """Sampling, KL and win rate of checkpoints."""

    scorer: Location | None = Field(
        None, description="`gold`, a sequence-classification model's path, or `reward`: this run's own; null: no verdict"
    )
    prompts: Int = Field(512, ge=1, description="held-out prompts")
    opponent: Literal["reference", "chosen"] = Field(
        "reference", description="win rate against its samples, or the data's chosen"
    )
    opponent_samples: Int = Field(4, ge=1, description="reference samples a prompt")
    ties: Literal["half", "loss"] = Field("half", description="what a tie of two scores counts: half a win, or none")
    keep_thinking: bool = Field(False, description="what a model thinks aloud is scored, judged and measured with its answer")
    max_new_tokens: Int = Field(128, ge=1, description="limit of a response")
    temperature: Float = Field(0.7, ge=0, description="of the samples for win rates; KL always samples at 1")
    top_p: Float = Field(0.95, gt=0, le=1, description="of the samples for win rates; KL always has 1")
    top_k: Int = Field(0, ge=0, description="of the samples for win rates; 0: all tokens; KL always has 0")
    batch_size: Int = Field(64, ge=1, description="responses sampled at a time")
    bootstrap: Int = Field(1000, ge=100, description="resamples of the prompts")
    confidence: Float = Field(0.95, gt=0.5, lt=1, description="of the intervals over prompts")
    seed: Seed = Field(0, description="of samples and intervals")


class GuardConfig(Section):
    """Measurements during alignment, on a few held-out prompts: logged, and, where asked for, acted upon (docs/guard.md)."""

    steps: Int | None = Field(None, ge=1, description="measure every n optimiser steps and at the last one; null: never")
    prompts: Int = Field(128, ge=2, description="held-out prompts, behind those that `isdaa evaluate` will use")
    scorer: Location | None = Field(
        None,
        description="`gold`, a reward model's path, or `reward`: this run's own; null: evaluation.scorer, else `reward` where "
        "keep or stop need one; none: KL and held-out pairs alone",
    )
    opponent_samples: Int = Field(4, ge=1, description="reference samples a prompt, drawn and scored once")
    max_new_tokens: Int | None = Field(None, ge=1, description="null: evaluation.max_new_tokens")
    temperature: Float | None = Field(
        None, ge=0, description="of the samples for win rates; null: evaluation.temperature; KL always samples at 1"
    )
    top_p: Float | None = Field(None, gt=0, le=1, description="null: evaluation.top_p")
    batch_size: Int | None = Field(None, ge=1, description="responses sampled at a time; null: evaluation.batch_size")
    seed: Seed = Field(0, description="of its samples")
    keep: Literal["all", "best"] = Field("all", description="best: the model of the highest win rate so far is in `best/`")
    stop: Literal["never", "over-optimised"] = Field(
        "never", description="over-optimised: end the run where the win rate has fallen for sure"
    )

    @property
    def acts(self) -> bool:
        """Whether it does more than log."""
        return self.keep != "all" or self.stop != "never"


class Config(Section):
    """Everything one `isdaa train` does."""

    output_dir: Location = Field("runs/isdaa", description="folder of the run; one run, one folder")
    continue_from: Location | None = Field(
        None, description="run or checkpoint whose weights, reference and settings a new run begins with (docs/going_on.md)"
    )
    continue_optimizer: bool = Field(False, description="begin with the state of its optimiser, too")
    stages: list[Stage] = Field(["align"], min_length=1, description="what runs, in this order")
    seed: Seed = Field(1, description="of weights, order of the pairs and samples, where a section has none of its own")
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    reference: ReferenceConfig = Field(default_factory=ReferenceConfig)
    behaviour: BehaviourConfig = Field(default_factory=BehaviourConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    tokenization: TokenizationConfig = Field(default_factory=TokenizationConfig)
    sft: SftConfig = Field(default_factory=SftConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    scorer: ScorerConfig = Field(default_factory=ScorerConfig)
    label: LabelConfig = Field(default_factory=LabelConfig)
    align: AlignConfig = Field(default_factory=AlignConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    @model_validator(mode="after")
    def _stages_make_sense(self) -> Config:
        if len(set(self.stages)) != len(self.stages):
            raise ValueError("stages: each stage at most once")
        if "sft" in self.stages[1:] or "align" in self.stages[:-1]:
            raise ValueError("stages: sft comes first and align last, for each stage starts from what the earlier ones made")
        before_label = self.stages[: self.stages.index("label")] if "label" in self.stages else []
        if "reward" in before_label and self.data.pairs is None:
            raise ValueError("stages: the reward stage has no pairs before label made them; put label first or set data.pairs")
        if self.align.compile_layers and self.align.gradient_checkpointing:
            raise ValueError("align.compile_layers: PyTorch does not compile layers that gradient_checkpointing runs again")
        if self.model.path is None and self.model.random is None:
            raise ValueError("model: give model.path (a folder or Hub name) or model.random (a config)")
        if self.continue_optimizer and self.continue_from is None:
            raise ValueError("continue_optimizer: there is no run whose optimiser could go on; name it with continue_from")
        if self.reference.revision not in (None, self.model.revision) and self.reference.path == self.model.path:
            raise ValueError(
                "reference.revision: one name is read at one revision; leave it out, or give reference.path a folder"
            )
        if self.model.path is not None and self.model.random is not None:
            raise ValueError("model: give model.path or model.random, not both")
        if self.model.quantization is not None and self.model.random is not None:
            raise ValueError("model.quantization: there is nothing to gain by 4-bit weights that are random; give model.path")
        if self.model.quantization is not None and self.lora.rank == 0 and {"sft", "align"} & set(self.stages):
            raise ValueError("model.quantization: weights of 4 bits cannot be trained; set lora.rank")
        if self.model.random is not None and self.model.tokenizer is None:
            raise ValueError("model.tokenizer: a random model has no tokenizer of its own; name one")
        if "sft" in self.stages and self.data.sft is None:
            raise ValueError("data.sft: the sft stage needs examples")
        if "label" in self.stages and (self.data.prompts is None or self.label.scorer is None):
            raise ValueError("label: the label stage needs data.prompts and label.scorer")
        if "label" in self.stages and self.label.scorer == "none":
            raise ValueError(
                "label.scorer: none makes no pairs; name a reward model's folder or Hub name, `reward` (this run's) or `gold`; "
                "by a scorer of your own you write them yourself (docs/how_to.md, Make pairs)"
            )
        needs_pairs = {"align", "reward"} & set(self.stages)
        if needs_pairs and self.data.pairs is None and "label" not in self.stages:
            raise ValueError(f"data.pairs: the {sorted(needs_pairs)[0]} stage needs preference pairs")
        return self

    @model_validator(mode="after")
    def _guard_can_do_its_work(self) -> Config:
        if "align" not in self.stages:
            return self
        if self.guard.acts and self.guard.steps is None:
            raise ValueError("guard.steps: keep: best and stop: over-optimised go by measurements; say every how many steps")
        if self.guard.acts and self.guard_scorer is None:
            raise ValueError(
                "guard.scorer: keep: best and stop: over-optimised go by a win rate, and there is no scorer "
                "(guard.scorer or evaluation.scorer); without one nothing can tell a better checkpoint from a worse one"
            )
        held_out = self.data.evaluation or self.data.eval_pairs or self.data.eval_fraction > 0
        if self.guard.steps is not None and not held_out:
            raise ValueError("guard.steps: nothing is held out to measure on; set data.evaluation or data.eval_fraction")
        return self

    @property
    def guard_scorer(self) -> str | None:
        """What the guard's win rates are scored by; None: there are none. A guard that acts takes the run's own reward model
        where no scorer is named."""
        name = self.guard.scorer or self.evaluation.scorer
        if name is None and self.guard.acts and "reward" in self.stages:
            name = REWARD
        return None if name == "none" else self.scorer_path(name)

    @property
    def evaluation_scorer(self) -> str | None:
        """What `isdaa evaluate` scores the run's models by."""
        return self.scorer_path(self.evaluation.scorer)

    @property
    def label_scorer(self) -> str | None:
        """What scores the responses of the `label` stage."""
        return self.scorer_path(self.label.scorer)

    @property
    def trains_on_labelled(self) -> bool:
        """Whether `align` trains on what this run's `label` stage writes: also where a reward model before it has data.pairs."""
        if "label" not in self.stages or "align" not in self.stages:
            return False
        return self.data.pairs is None or "reward" in self.stages[: self.stages.index("label")]

    def scorer_path(self, name: str | None) -> str | None:
        """`reward` becomes the folder of the reward model that this run makes, or has made; any other name stays.

        Raises UserError where a folder of that name lies here, too.
        """
        own = Path(self.output_dir) / REWARD
        if name != REWARD or not ("reward" in self.stages or own.is_dir()):
            return name
        if Path(REWARD).is_dir() and Path(REWARD).resolve() != own.resolve():
            raise UserError(f"scorer {REWARD}: the reward model of this run, and a folder here; write {own}, or ./{REWARD}")
        return str(own)


def load_config(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a YAML file, lay dotted overrides over it and validate.

    Errors: `UserError` of one line that names the file, the key, the nearest known key, or what was expected.
    """
    data = layers(path, overrides)
    return validate(data, str(located(path)) if path is not None else "command line", overrides or {})


def layers(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A YAML file with dotted overrides over it, as plain data that nobody has validated. Raises UserError as `load_config`."""
    data: dict[str, Any] = {}
    if path is not None:
        path = located(path)
        try:
            loaded = read_settings(path, _kind_of)
        except FileNotFoundError:
            raise UserError(f"{path}: no such config file") from None
        except IsADirectoryError as error:
            raise UserError(f"{path}: not a YAML file ({error})") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise UserError(f"{path}: expected `key: value` lines, found {type(loaded).__name__}")
        if loaded and "grids" in loaded:
            raise UserError(f"{path}: describes a sweep; run it with `isdaa sweep --config {path}`")
        data = loaded or {}
    return laid_over(data, overrides or {})


def _kind_of(path: Sequence[str]) -> Any:
    field = _field(path)
    return None if field is None else field.annotation


def laid_over(data: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data, which is changed, with dotted overrides over it, and without what would undo them.

    A run's own file spells everything out: what another method or pairing had by itself goes with it, and `max_steps` where
    `epochs` are given.
    """
    before: Any = data.get("objective")
    method = before.get("method") if isinstance(before, dict) else None
    if isinstance(method, str) and method in PRESETS and overrides.get("objective.method") not in (None, method):
        own = resolve(method)
        data["objective"] = {key: value for key, value in before.items() if key not in own or value not in (own[key], "preset")}
    label = data.get("label")
    if isinstance(label, dict) and "pairing" in label and overrides.get("label.pairing") not in (None, label["pairing"]):
        label.pop("label", None)
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        if name == "epochs" and value is not None and isinstance(data.get(section), dict):
            data[section].pop("max_steps", None)
    for key, value in overrides.items():
        lay_over(data, key, value)
    return data


def lay_over(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted key of plain data; sections that are not there are made."""
    *sections, last = dotted.split(".")
    for name in sections:
        if not isinstance(data.get(name), dict):
            data[name] = {}
        data = data[name]
    data[last] = value


# Keys of earlier versions -> (default, why it was taken away). At the default they are accepted, with a word, for one release.
TAKEN_AWAY: dict[str, tuple[Any, str]] = {
    "align.fused_head": (False, "the kernel that it asked for is in no release of cut-cross-entropy"),
}


def _of_this_version(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The data without keys of earlier versions. Raises UserError where one has a value that has no effect any more."""
    found = dict(data)
    for dotted, (default, why) in TAKEN_AWAY.items():
        section, _, key = dotted.rpartition(".")
        given = found.get(section)
        if not isinstance(given, Mapping) or key not in given:
            continue
        if given[key] != default:
            raise UserError(f"{where}: {dotted}: taken away, since {why}; leave it out")
        logger.warning("%s: %s is known no longer, and its default is what is done: leave it out", where, dotted)
        found[section] = {name: value for name, value in given.items() if name != key}
    return found


def validate(data: Mapping[str, Any], where: str, overrides: Mapping[str, Any] = {}) -> Config:
    """Validate plain data; the first error becomes a `UserError` of one line."""
    try:
        return Config.model_validate(_of_this_version(data, where))
    except ValidationError as error:
        # Unknown keys come first: they are usually the cause of what else is missing.
        first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        raise UserError(_describe(first, where, overrides)) from None


def _describe(error: Any, where: str, overrides: Mapping[str, Any]) -> str:
    keys: list[str] = []
    section: type[BaseModel] | None = Config
    for part in error["loc"]:
        known = section.model_fields if section is not None else {}
        if section is not None and part not in known and error["type"] != "extra_forbidden":
            break  # a member of a union, not a key
        keys.append(str(part))
        annotation = known[part].annotation if part in known else None
        section = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
        if section is None and error["type"] != "extra_forbidden":
            break
    dotted = ".".join(keys)
    given = sorted(f"--{key}" for key in overrides if dotted and key.startswith(f"{dotted}."))
    if given:  # the section as a whole is wrong: what was said here may be why
        where = f"{where} with {', '.join(given)}"
    place = f"--{dotted}" if dotted in overrides else f"{where}: {dotted}" if dotted else where
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key{hint(dotted, _names())}"
    if error["type"] == "model_type":
        meant = SYNONYMS.get(dotted, "")
        more = f"; for one value, write {meant}" if meant.startswith(f"{dotted}.") else ""
        return f"{place}: a section of keys of its own, got {error['input']!r}{more}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{place}: {message}"
    return f"{place}: {_expected(keys, message)}, got {error['input']!r}"


def _expected(keys: Sequence[str], message: str) -> str:
    field = _field(keys)
    choices = [value for value in _literals(field.annotation) if value != "preset"] if field is not None else []
    if choices and "nput should be" in message:
        return "expected one of " + ", ".join("null" if c is None else str(c) for c in choices)
    return message[0].lower() + message[1:]


def _literals(annotation: Any) -> list[Any]:
    found: list[Any] = []
    for value in get_args(annotation):
        if isinstance(value, str):
            found.append(value)
        elif value is not type(None):
            found += _literals(value)
    return found


SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def allowed(field: Any) -> str:
    """What a key takes, in words: its choices, or its kind and range; empty for text and dictionaries."""
    choices: list[Any] = []
    kinds: set[Any] = set()
    bounds: list[str] = []

    def look(kind: Any, metadata: Sequence[Any]) -> None:
        for rule in metadata:
            bounds.extend(f"{sign} {value}" for name, sign in SIGNS.items() if (value := getattr(rule, name, None)) is not None)
            look(None, getattr(rule, "metadata", ()))  # of a field within an annotation
        if hasattr(kind, "__metadata__"):
            look(kind.__origin__, kind.__metadata__)
        elif get_origin(kind) is Literal:
            choices.extend(value for value in get_args(kind) if value not in choices)
        elif get_args(kind) and get_origin(kind) is not dict:
            kinds.update(["list"] if get_origin(kind) is list else [])
            for part in get_args(kind):
                look(part, ())
        else:
            kinds.add(kind)

    look(field.annotation, field.metadata)
    extra = field.json_schema_extra
    choices += extra.get("choices", []) if isinstance(extra, dict) else []
    null = ["null"] if type(None) in kinds else []
    if bool in kinds:
        return ", ".join(["true", "false", *map(str, choices), *null])
    number = "a whole number" if int in kinds else "a number" if float in kinds else ""
    if number:
        return ", ".join([" ".join([number, " and ".join(bounds)]).strip(), *map(str, choices), *null])
    if choices:
        return f"{'any' if 'list' in kinds else 'one'} of {', '.join([*map(str, choices), *null])}"
    return ""


def preset_value(dotted: str) -> str:
    """What `preset` stands for as the value of a key of the objective; empty for other keys."""
    section, _, name = dotted.rpartition(".")
    if section != "objective" or name not in DEFAULTS:
        return ""
    values = {str(method): resolve(method)[name] for method in PRESETS}
    default = Config.model_fields["objective"].get_default(call_default_factory=True).method
    own = as_written(values[default])
    return own if len({*map(str, values.values())}) == 1 else f"the method's; {own} for {default}"


def as_written(default: Any) -> str:
    """A default as a YAML file would have it."""
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return f"[{', '.join(map(str, default))}]" if isinstance(default, list) else str(default)


def _field(keys: Sequence[str]) -> Any:
    section: Any = Config
    field = None
    for key in keys:
        if not (isinstance(section, type) and issubclass(section, BaseModel)) or key not in section.model_fields:
            return None
        field = section.model_fields[key]
        section = field.annotation
    return field


def _names() -> list[str]:
    """Every key, dotted, and every section."""
    return list(dict.fromkeys([*Config.model_fields, *(dotted for dotted, _, _ in fields())]))


def fields(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every key of the configuration: `(dotted name, pydantic field, default)`."""
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from fields(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field, field.get_default(call_default_factory=True)


def section_from(name: str, overrides: Mapping[str, Any]) -> Any:
    """One validated section: its defaults, with the overrides of a command line, all of this section, on top."""
    section = Config.model_fields[name].annotation
    assert isinstance(section, type) and issubclass(section, BaseModel)
    try:
        return section.model_validate({key.removeprefix(f"{name}."): value for key, value in overrides.items()})
    except ValidationError as error:
        found = error.errors()[0]
        first = {**found, "loc": (name, *found["loc"])}
        raise UserError(_describe(first, "command line", overrides)) from None


def resolved(config: Config) -> dict[str, Any]:
    """The configuration with every preset value spelled out, as plain data for a file."""
    data = config.model_dump(mode="json")
    data["objective"] = {"method": config.objective.method, **config.objective.arguments()}
    if config.objective.allow_stall:
        data["objective"]["allow_stall"] = True
    return data


def departures(objective: Mapping[str, Any]) -> list[str]:
    """What of a resolved objective is not as its method has it, in words. β is no method's own."""
    own = resolve(objective["method"]) if objective["method"] in PRESETS else {}
    return [
        f"{key} {as_written(objective[key])} ({as_written(value)})"
        for key, value in own.items()
        if key != "beta" and key in objective and objective[key] != value
    ]


def methods_table() -> list[tuple[str, str, str]]:
    """`(name, formula, source)` of every preset."""
    return [(name, preset.formula, preset.source) for name, preset in PRESETS.items()]
