"""Adapters merged into weights: tied weights are parted first, and a probe shows that the merged model is the unmerged one.

peft adds an adapter's change to a weight in place. Where input embedding and head are one matrix, a change that is meant for one
of them reaches the other, too, and the merged model is another than the one that was trained.
"""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from isdaa.errors import UserError
from isdaa.models.packed.patched_forward import evaluating
from isdaa.models.packed.probe import TOLERANCE

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

_LENGTH = 24  # tokens of the probe's row
_TRAINED = 8  # of them, at most so many of those that the adapter has a vector of their own for
# A merged weight is rounded once more than an unmerged one, and that is all that may differ. How much such a rounding changes a
# logp depends on the model (in bfloat16, 30 layers: 0.6 of 35 nats), so it is measured: rounding noise is put on what each
# adapted layer gives. Of that, so many times are tolerated, in the mean square and at the largest; measured: 0.3 to 3.3 times.
_FACTOR = 8
_NUMBERS = 8  # of noise, at least: a reward model gives one a pass, whose noise may happen to be next to nothing
_SURVIVES = 0.9  # least share of an adapter's change that the merged weights must hold, or a warning says so


def merge(model: PeftModel, name: str, instead: str) -> Any:
    """The base model with the active adapters in its weights. `model` itself is used up.

    Compares the logps of a short row of tokens before and after. name: of the adapter, for messages; instead: what to do where
    they differ. Tied weights that the adapter changes differently are parted, and the configuration says so.

    Raises:
        UserError: peft cannot merge the adapter, or the merged model computes something else.
    """
    row = _row(model)
    with torch.no_grad(), evaluating(model):
        before, noise = _with_noise(model, row)
        _warn_of_rounding(model, name, instead)
        groups = _part(model)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
                warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
                merged: Any = model.merge_and_unload(safe_merge=True)
        except (RuntimeError, ValueError, NotImplementedError, AttributeError, TypeError) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(f"{name}: peft cannot merge this adapter into the weights ({why}); {instead}") from error
        for first, *others in groups:
            weight = getattr(*first)
            if all(torch.equal(weight, getattr(*other)) for other in others):
                for owner, key in others:
                    setattr(owner, key, weight)
        settle_ties(merged)
        if before is not None:
            with evaluating(merged):
                _compare(before, _values(merged, row), noise, name, instead)
    return merged


def settle_ties(model: Any) -> None:
    """Make a model's configuration say which of its weights are tied: readers of a saved folder go by it.

    Weights that are tied in a part only are parted: the configuration knows all or none.
    """
    if not hasattr(model, "get_expanded_tied_weights_keys"):
        return
    found = [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "tie_word_embeddings")]
    configs = {id(config): config for config in found}
    flags = {key: config.tie_word_embeddings for key, config in configs.items()}
    try:
        said = set(model.get_expanded_tied_weights_keys(all_submodels=True))
        for config in configs.values():
            config.tie_word_embeddings = True
        declared = model.get_expanded_tied_weights_keys(all_submodels=True)
        pairs = [(name, model.get_parameter(name), model.get_parameter(source)) for name, source in declared.items()]
    except (AttributeError, ValueError):  # quantised, or tied in a way of its own
        return
    finally:
        for key, config in configs.items():
            config.tie_word_embeddings = flags[key]
    tied = [name for name, weight, source in pairs if weight is source]
    sharded = any(hasattr(weight, mark) for _, weight, _ in pairs for mark in ("placements", "ds_id"))  # each process has a part
    if set(tied) == said or sharded:
        return
    for name in tied if len(tied) < len(pairs) else ():
        owner, key = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        setattr(owner, key, _clone(getattr(owner, key)))
    for config in configs.values():
        config.tie_word_embeddings = len(tied) == len(pairs)


def _clone(weight: Any) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


def _part(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Give every module that shares a weight, where an adapter lies on one of them, a copy; returns who shared one."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    adapted = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    inside = {id(part) for module in adapted for part in module.modules()}
    owners = defaultdict(list)
    for module in model.modules():
        for key, weight in module._parameters.items():
            if weight is not None:
                owners[id(weight)].append((module, key))
    shared = [group for group in owners.values() if len(group) > 1 and any(id(owner) in inside for owner, _ in group)]
    for _, *others in shared:
        for owner, key in others:
            setattr(owner, key, _clone(getattr(owner, key)))
    return shared


# ---------------------------------------------------------------------------------------------------------------------
# The probe


def _row(model: Any) -> Tensor:
    """(1, T) token ids: the last of the vocabulary, which may be new, those with vectors of their own, and random ones."""
    base = model.get_base_model()
    words = int(base.get_input_embeddings().weight.shape[0])
    chosen = [words - 1, max(0, words - 2)]
    for config in model.peft_config.values():
        found = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
        for ids in found.values() if isinstance(found, dict) else [found]:
            chosen += list(ids)[:: max(1, len(ids) // _TRAINED)][:_TRAINED]
    most = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    length = min(_LENGTH, most) if isinstance(most, int) and most > 0 else _LENGTH
    drawn = torch.randint(0, words, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    return torch.tensor([[token for token in (*chosen, *drawn) if token < words][:length]])


def _values(base: Any, row: Tensor) -> Tensor:
    """Logps of every token of the vocabulary, (1, T, V), or a classifier's logits, in fp32."""
    row = row.to(base.get_input_embeddings().weight.device)
    logits = base(input_ids=row, attention_mask=torch.ones_like(row)).logits.float()
    return logits.log_softmax(-1) if logits.dim() == 3 else logits


def _with_noise(model: Any, row: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What an unmerged model gives, and its changes by rounding noise; None where it cannot compute here.

    The model inside is called: accelerate casts what goes through the wrapper.
    """
    base = model.get_base_model()
    try:
        values = _values(base, row)
        passes = -(-_NUMBERS // values.numel())
        with _noise(base):
            return values, torch.stack([_values(base, row) - values for _ in range(passes)])
    except Exception as error:  # a foreign model's code, or one for another device
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        logger.warning("whether the merged adapter computes what it did cannot be seen: the model does not run here (%s)", why)
        return None, None


@contextmanager
def _noise(model: nn.Module) -> Iterator[None]:
    """Every adapted layer gives its output with an error of the size of one rounding."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    generator = torch.Generator().manual_seed(0)

    def disturb(module: Any, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        weight = getattr(module.get_base_layer(), "weight", output)
        size = torch.finfo(weight.dtype).eps / 2 if weight.is_floating_point() else 0.0
        exact = output.float()
        noise = torch.randn(output.shape, generator=generator).to(output.device)
        return (exact + noise * (size * exact.square().mean().sqrt())).to(output.dtype)

    hooks = [m.register_forward_hook(disturb) for m in model.modules() if isinstance(m, BaseTunerLayer)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _compare(before: Tensor, after: Tensor, noise: Tensor | None, name: str, instead: str) -> None:
    assert noise is not None
    difference = after.to(before.device) - before
    floor = TOLERANCE[torch.float32] * float(before.abs().max())
    measures: tuple[Callable[[Tensor], Tensor], ...] = (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt())
    for measure in measures:
        found, allowed = float(measure(difference)), floor + _FACTOR * float(measure(noise))
        if not found <= allowed:  # so written that nan is trouble
            raise UserError(
                f"{name}: merged into its base model's weights, the adapter computes something else (logps differ by "
                f"{found:.2g}, by rounding at most {allowed:.2g}); {instead}"
            )


def _warn_of_rounding(model: nn.Module, name: str, instead: str) -> None:
    """A change below the spacing of half-precision numbers is gone once it is added to a weight."""
    from peft.tuners.lora import LoraLayer

    kept = whole = 0.0
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight = getattr(layer.get_base_layer(), "weight", None)
        if not isinstance(weight, Tensor) or weight.dtype not in (torch.bfloat16, torch.float16):
            continue
        for adapter in getattr(layer, "active_adapters", ()):
            if adapter not in (*layer.lora_A, *layer.lora_embedding_A):
                continue
            try:
                change: Tensor = layer.get_delta_weight(adapter).float()  # type: ignore[operator]
                exact = weight.float()
                held = (exact + change).to(weight.dtype).float() - exact
            except (RuntimeError, TypeError):  # a layer of another kind
                continue
            kept, whole = kept + float((held * change).sum()), whole + float(change.square().sum())
    if whole > 0 and kept < _SURVIVES * whole:
        kind = str(next(model.parameters()).dtype).removeprefix("torch.")
        logger.warning(
            "%s: of what the adapter learnt, %s weights hold %.0f %%: the rest is below their spacing and is rounded away; %s",
            name, kind, 100 * kept / whole, instead,
        )  # fmt: skip
