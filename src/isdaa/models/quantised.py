"""Models whose weights lie quantised: in their folder already, or as an object that a script made.

What can be trained on them is an adapter. Which methods take one is what transformers' own quantisers say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from isdaa.errors import UserError
from isdaa.models.places import short


def quantisation(config: Any) -> str | None:
    """How the weights of a folder with this transformers configuration lie there, in words; None: as plain numbers."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    values = found if isinstance(found, dict) else found.to_dict()
    bits = "4 bits" if values.get("load_in_4bit") else "8 bits" if values.get("load_in_8bit") else ""
    return " ".join(filter(None, (str(values.get("quant_method", "an unnamed method")), bits)))


def check_trainable(name: str, config: Any, *, adapter: bool) -> None:
    """Raises UserError where a model with this configuration cannot be trained: with an adapter, or without."""
    what = quantisation(config)
    if what is None:
        return
    if not adapter:
        raise UserError(
            f"{name}: its weights are quantised ({what}) and cannot be trained; give --lora.rank (in Python peft_config) for an "
            "adapter beside them, or name the model that was quantised"
        )
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        quantiser: Any = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
        trainable = bool(quantiser.is_trainable)
        quantiser.validate_environment(device_map=None, weights_only=True)
    except Exception as error:  # a method that is not known here, a package that is missing, a device that is
        why = " ".join(str(error).split())[:160]
        raise UserError(f"{name}: its weights are quantised ({what}), and cannot be read here ({why})") from error
    if not trainable:
        raise UserError(
            f"{name}: its weights are quantised ({what}), and transformers cannot train even an adapter on such; name the model "
            "that was quantised"
        )


def keep_gradients(model: nn.Module) -> None:
    """Switch off bitsandbytes' fast way for 4 bits on a CPU, which has no backward pass: gradients would be wrong without a word.

    Weights that a pass in evaluation mode has packed for it already are unpacked.
    """
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        weight: Any = module.weight
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
            module.quant_state = weight.quant_state


def four_bits(compute: torch.dtype, device: str | torch.device | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` that put linear layers, but for the head, into nf4, computing in `compute`."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=compute,  # FSDP shards tensors of one dtype
    )
    return {"quantization_config": config, "device_map": {"": device or "cpu"}}


def dequantised(name: str, model: Any, dtype: Any) -> Any:
    """A quantised model with plain weights."""
    try:
        plain = model.dequantize()
        plain._weight_conversions = [
            step for step in getattr(plain, "_weight_conversions", None) or () if _reverses(step)
        ] or None
        return (plain if dtype == "auto" else plain.to(dtype)).requires_grad_(True)
    except NotImplementedError as error:
        raise UserError(f"{name}: transformers cannot turn its weights into plain ones ({short(error)})") from error


def _reverses(step: Any) -> bool:
    """Whether transformers can undo, when it saves, what it did to a file's tensors; of quantisation it cannot."""
    try:
        step.reverse_transform()
    except (NotImplementedError, ValueError):
        return False
    return True
