"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) through peft: a new one on a policy, and merged models."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from isdaa.errors import UserError, nearest
from isdaa.models.merging import merge

if TYPE_CHECKING:
    from peft import PeftModel

KEEP = "--lora.merge false (in Python merge=False) saves it beside them; the same command goes on from the last checkpoint"


def add_lora(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    seed: int = 0,
) -> PeftModel:
    """Freeze a model and put a new adapter on it; the new model computes what the old one did until it is trained.

    The reference is the policy as loaded, so an adapter that the model already carries
    (a supervised one) is first merged into its weights. `with model.disable_adapter():` is then exactly the reference.
    `target_modules` are names (or ends of names) of linear layers, or "all-linear": every one but the output head.

    Raises:
        UserError: rank, alpha or dropout out of range; a target module that the model does not have.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise UserError(f"lora: rank {rank}, alpha {alpha}, dropout {dropout}; needs rank ≥ 1, alpha > 0, 0 ≤ dropout < 1")
    if isinstance(model, PeftModel):
        if getattr(model, "is_quantized", False):
            raise UserError(
                "lora: the model has quantised weights and an adapter already, which they cannot take in; give --lora.merge true "
                "where that one is trained, or start from the model that was quantised"
            )
        model = merge(model, "the adapter that the model carries", "merge it where it was made, and give the merged model")
    targets: str | list[str] = target_modules if isinstance(target_modules, str) else list(target_modules)
    if targets != "all-linear":
        targets = [targets] if isinstance(targets, str) else targets
        _check_targets(model, targets)
    classifier = any(name.split(".")[-1] == "score" for name, _ in model.named_modules())
    config = LoraConfig(
        task_type="SEQ_CLS" if classifier else "CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=targets,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft sets it right by itself, and says so
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # `merge` unties them
        torch.manual_seed(seed)
        return get_peft_model(model, config)  # type: ignore[arg-type, return-value, unused-ignore]


def merged_copy(model: nn.Module) -> nn.Module:
    """The plain model that a `PeftModel` computes, as a copy on the CPU; a model without adapter is returned itself.

    A copy, because merging and taking apart again would leave rounding errors in a model that is still being trained.

    Raises:
        UserError: the merged model would compute something else (`merging.merge`).
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return model
    if getattr(model, "is_quantized", False):
        raise UserError(
            "the trained adapter: quantised weights cannot take it in; save it beside them (merge=False), or load what is saved "
            "with dequantize=True"
        )
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("cpu", copy=True), requires_grad=False) for p in model.parameters()}
    try:
        copied = copy.deepcopy(model, memo).to("cpu")  # buffers, too
    except RuntimeError as error:  # tensors that are no parameters
        why = " ".join(str(error).split())[:80]
        raise UserError(f"the trained adapter: the model cannot be copied to merge it ({why}); {KEEP}") from error
    for module in copied.modules():
        module.__dict__.pop("forward", None)  # `prepare` and accelerate put it there; a reader has the class's
    return merge(copied, "the trained adapter", KEEP)


def fit_vocabulary(base: Any, weights: Mapping[str, torch.Tensor], name: str) -> None:
    """Give a model the vocabulary of an adapter that was trained after tokens were added (`vocabulary_brought`). Raises as it."""
    rows = vocabulary_brought(base, weights, name)
    if rows is not None:
        base.resize_token_embeddings(rows, mean_resizing=False)  # all of it is overwritten by the adapter's


def vocabulary_brought(base: Any, weights: Mapping[str, torch.Tensor], name: str) -> int | None:
    """Rows of the embeddings that an adapter brings, where they are not as many as its base model's; None where they are.

    weights: the adapter's file. Raises UserError where it brings embeddings of another size, but not both ends' of the model.
    """
    inside, outside = base.get_input_embeddings(), base.get_output_embeddings()
    ends = [end for end in (inside, outside) if end is not None]
    names = {id(module): f"base_model.model.{key}" for key, module in base.named_modules()}
    keys = [(f"{names.get(id(end), '')}.weight", f"{names.get(id(end), '')}.base_layer.weight") for end in ends]  # itself adapted
    brought = [next((weights[key] for key in both if key in weights), None) for both in keys]
    rows = {len(found) for found in brought if found is not None} - {inside.weight.shape[0]}
    if not rows:
        return None
    tied = outside is not None and outside.weight is inside.weight
    if len(rows) > 1 or (not tied and any(found is None for found in brought)):
        raise UserError(
            f"{name}: the adapter was trained with a vocabulary of {min(rows)} tokens, the base model has "
            f"{inside.weight.shape[0]}, and the embeddings of the others are not beside the adapter; merge it where it was made"
        )
    return rows.pop()


def _check_targets(model: nn.Module, targets: list[str]) -> None:
    # Linear in all but name: GPT-2's Conv1D.
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) or _is_conv1d(module)]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in linear):
            ends = sorted({name.split(".")[-1] for name in linear})
            raise UserError(
                f'lora: target module "{target}" is no linear layer of this model{nearest(target, ends)}; '
                f"it has {', '.join(ends)}"
            )


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"
