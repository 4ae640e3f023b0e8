"""The sections of a configuration: pydantic models with every default in one place, each of which checks itself.

What sections must agree on is checked by the commands that need it (`isdaa.config.rules`).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from isdaa.config.settings_text import DEEPEST
from isdaa.errors import UserError
from isdaa.files import at_home, usable
from isdaa.objectives.presets import PRESETS, Clip, ImplicitReward, Loss, Weight, known_method, resolve

FromPreset = Literal["preset"]
Stage = Literal["sft", "reward", "label", "align"]
Position = Literal["auto", "template_end", "response_end"]  # where a reward model is read
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


AS_NUMBER = BeforeValidator(_yaml_float)
Float = Annotated[float, AS_NUMBER]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
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
    beta: Annotated[Positive | FromPreset, AS_NUMBER] = Field("preset", description="strength of the implicit KL penalty")
    implicit_reward: ImplicitReward | FromPreset = Field("preset", description="r(Δ): Δ, or Δ + e^Δ (χPO)")
    loss: Loss | FromPreset = Field("preset", description="loss on the margin")
    weight: Weight | FromPreset = Field("preset", description="what each pair's loss is multiplied by")
    clip: Clip | FromPreset = Field("preset", description="where the importance weight is clipped")
    clip_eps: Annotated[NotNegative | FromPreset | None, AS_NUMBER] = Field(
        "preset", description="upper clip ε of the log-weight; null: no clip"
    )
    normalize: Literal["batch"] | FromPreset | None = Field("preset", description="divide by the global batch's mean weight")
    length_penalty: Annotated[float | FromPreset, AS_NUMBER] = Field("preset", description="α, per token of length difference")
    sft_coefficient: Annotated[NotNegative | FromPreset, AS_NUMBER] = Field("preset", description="η of the SFT term")
    label_smoothing: Annotated[Annotated[float, Field(ge=0, le=0.5)] | FromPreset, AS_NUMBER] = Field(
        "preset", description="s, assumed share of wrong labels; logistic loss only"
    )
    length_normalized: bool | FromPreset = Field("preset", description="divide the log-ratios by the length in the margin")
    max_reward: Annotated[Positive | FromPreset | None, AS_NUMBER] = Field(
        "preset", description="R_max of χPO: β·h is clipped to ±2·R_max; chi_squared only"
    )
    allow_stall: bool = Field(False, description="train even if almost all importance weights are 0 at the start")

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

    @model_validator(mode="after")
    def _given_or_random(self) -> ModelConfig:
        if self.random is None:
            return self
        if self.path is not None:
            raise ValueError("model.path and model.random: give one of them, not both")
        if self.quantization is not None:
            raise ValueError("model.quantization: random weights gain nothing by 4 bits; leave it out, or give model.path")
        if self.tokenizer is None:
            raise ValueError("model.tokenizer: a random model has none of its own; name one, for example world:small")
        return self


class ReferenceConfig(Section):
    """π_ref, in every margin."""

    path: Location | None = Field(None, description="null: the policy as loaded, with an SFT adapter if there is one")
    revision: str | None = Field(None, description="branch, tag or commit of `reference.path` on the Hub")
    cache_dir: Location | None = Field(
        None, description="folder of cached reference logps; null: `.isdaa_cache` beside the output folder"
    )


class BehaviourConfig(Section):
    """μ, in the denominator of the importance weight."""

    model_path: Location | None = Field(None, description="model that wrote the responses; null: the rows' own logps, else π_ref")


class DataConfig(Section):
    """Preference pairs for `align` and `reward`, SFT examples and prompts for the earlier stages."""

    pairs: Location | None = Field(None, description="file, folder, Hub name, recipe; null: what the `label` stage wrote")
    pairs_split: str = Field("train", description="split of a Hub data set or of a folder with splits")
    eval_pairs: Location | None = Field(None, description="held-out pairs; null: eval_fraction of the prompts")
    eval_split: str = Field("test", description="split of `eval_pairs`")
    eval_fraction: Float = Field(0.05, ge=0, lt=1, description="share of the prompts held out if `eval_pairs` is null")
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
        None, description="what to do with responses that repeat the text prompt; null: an error if most do"
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
            raise ValueError(
                f"data.subset: no source is a data set of the Hub (owner/name) or a folder with a folder {self.subset!r} in it; "
                "leave it out"
            )
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
            raise ValueError(
                f"tokenization.max_prompt_length ({self.max_prompt_length}) must be below tokenization.max_length "
                f"({self.max_length}), for example --tokenization.max_prompt_length {self.max_length * 4 // 5}"
            )
        return self


class OptimisationConfig(Section):
    """Optimiser and schedule of one training stage."""

    epochs: Float = Field(1.0, gt=0, description="passes over the training rows")
    max_steps: Int | None = Field(None, ge=1, description="stop after this many optimiser steps; null: `epochs` decides")
    batch_size: Int = Field(8, ge=1, description="rows (pairs) of one forward pass on one device")
    gradient_accumulation_steps: Int = Field(1, ge=1, description="forward passes of one optimiser step")
    learning_rate: Float = Field(1e-6, ge=0, description="highest learning rate, reached after the warm-up")
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
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="bfloat16: autocast on top of `model.dtype`; auto: the faster one on a CPU, else float32",
    )
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

    learning_rate: Float = Field(1e-5, ge=0, description="highest learning rate, reached after the warm-up")


class RewardConfig(OptimisationConfig):
    """A reward model on preference pairs (TRL's RewardTrainer)."""

    path: Location | None = Field(None, description="base model; null: the model that this run starts from (or trained in `sft`)")
    eval_steps: Int | None = Field(None, ge=1, description="held-out accuracy every n steps; null: ten times a run")


class ScorerConfig(Section):
    """How reward models are read that score: in `label`, by the guard and in evaluations."""

    position: Position = Field(
        "auto",
        description="the token whose output is the score; auto: the position it was trained at, according to its folder "
        "(docs/evaluation.md); template_end: where plain transformers reads it; response_end: the last token of the response",
    )
    label: str | None = Field(
        None, description="for a classifier with two labels, name or number of the good one; null: by the labels' names"
    )


class LabelConfig(Section):
    """Sample n responses a prompt, score them, make pairs."""

    scorer: Location | None = Field(
        None, description="`gold` (embedded world), a sequence-classification model's path, or `reward`: this run's own"
    )
    samples: Int = Field(2, ge=2, description="responses a prompt")
    pairing: Literal["random", "best_worst"] = Field(
        "random", description="best_worst: highest against lowest score; no draw from μ × μ, and marked in each row"
    )
    label: Literal["sample", "argmax"] = Field(
        "sample", description="Bradley–Terry draw, or the larger reward; with best_worst: argmax"
    )
    scale: Float = Field(1.0, gt=0, description="σ(scale · reward difference) is the Bradley–Terry probability")
    max_new_tokens: Int = Field(128, ge=1, description="longest response in tokens; a cut response has no EOS")
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
                "label.label: sample may draw the worse response as chosen, and label.pairing: best_worst means the best; leave "
                "label.label out, or set label.pairing: random"
            )
        return self


class AlignConfig(OptimisationConfig):
    """Preference training."""

    batch_tokens: Int | None = Field(
        None,
        ge=1,
        description="split a forward pass into passes of at most this many tokens; null: a few seconds each on a CPU, else one",
    )
    group_by_prompt: bool = Field(False, description="pairs of one prompt one after the other, sharing its forward pass")
    attention: Literal["auto", "sdpa", "blocks", "flex", "varlen"] = Field(
        "auto", description="auto: the fastest kernel that passes a check on this device"
    )
    compile_layers: bool = Field(False, description="torch.compile of every decoder layer; not with gradient_checkpointing")
    eval_steps: Int | None = Field(None, ge=1, description="held-out loss and accuracy every n steps; null: at each save")
    save_steps: Int | None = Field(None, ge=1, description="a checkpoint every n optimiser steps; null: ten a run")
    save_total_limit: Int | None = Field(None, ge=1, description="keep the newest n checkpoints; null: all of them")
    probe: bool = Field(True, description="compare shared-prefix logps with separate rows before training")

    @model_validator(mode="after")
    def _compiled_once(self) -> AlignConfig:
        if self.compile_layers and self.gradient_checkpointing:
            raise ValueError(
                "align.compile_layers and align.gradient_checkpointing: PyTorch does not compile layers that are computed again; "
                "set one of them to false"
            )
        return self


class LoraConfig(Section):
    """A new low-rank adapter on the policy (peft)."""

    rank: Int = Field(0, ge=0, description="0: full fine-tuning")
    alpha: Float = Field(16.0, gt=0, description="the adapter's output is multiplied by alpha / rank")
    target_modules: str | list[str] = Field("all-linear", description="names, or ends of names, of linear layers")
    merge: bool | None = Field(
        None,
        description="true: save the model with the adapter merged; false: the adapter alone; null: merged, unless the base's "
        "folder has quantised weights (true dequantises them)",
    )

    @field_validator("target_modules")
    @classmethod
    def _some_module(cls, value: str | list[str]) -> str | list[str]:
        if not value or not all(value):
            raise ValueError(f"name at least one module, or write all-linear; got {value!r}")
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
    keep_thinking: bool = Field(False, description="score, judge and measure the model's thinking together with its answer")
    max_new_tokens: Int = Field(128, ge=1, description="longest response in tokens")
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
    prompts: Int = Field(128, ge=2, description="number of held-out prompts, taken after those of `isdaa evaluate`")
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
        "never", description="over-optimised: end the run when the win rate has fallen with 95 % confidence"
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
    stages: list[Stage] = Field(["align"], min_length=1, description="stages to run, in this order")
    seed: Seed = Field(1, description="default seed of weights, pair order and samples; sections may set their own")
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

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: list[Stage]) -> list[Stage]:
        if len(set(stages)) != len(stages):
            raise ValueError("name each stage once")
        if "sft" in stages[1:] or "align" in stages[:-1]:
            raise ValueError("sft comes first and align last: each stage starts from what those before it made")
        return stages

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
            raise UserError(f"scorer {REWARD}: this run's reward model, or a folder here? Write {own}, or ./{REWARD}")
        return str(own)
