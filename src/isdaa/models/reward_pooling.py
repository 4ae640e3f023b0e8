"""Reward models read at the last token that the attention mask shows, whatever its value (docs/method.md).

Transformers' decoder classifiers take the last token that is not the padding token. Where padding is EOS, as for every
tokenizer without a padding token of its own, that is the token before the EOS, and the end of a response counts for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

HEADS = ("score", "classifier")  # names that transformers gives the head of a classifier


def pool_by_mask(model: nn.Module) -> None:
    """Let the model's head give every position of a row the output at its last masked-in token, in place.

    Whichever position the model then picks is the right one: its own code, its configuration and what it saves stay as
    they are, and so do calls without an attention mask. Copies and wrappers of the model (PEFT, DDP) do the same.
    """
    current: dict[str, Tensor | None] = {"mask": None}  # in a closure: copies of a module share its hooks

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        current["mask"] = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def pool(_: nn.Module, __: Any, outputs: Any) -> Any:
        mask = current["mask"]
        # An encoder's head sees one vector a row, (B, labels), already pooled.
        if mask is None or not isinstance(outputs, Tensor) or outputs.shape[:-1] != mask.shape:
            return None
        places = torch.arange(mask.shape[1], device=outputs.device)
        last = (places * mask.to(outputs.device, torch.int64).ne(0)).argmax(-1)
        return outputs[torch.arange(len(outputs), device=outputs.device), last].unsqueeze(1).expand_as(outputs)

    model.register_forward_pre_hook(note, with_kwargs=True)
    for name in HEADS:
        head = getattr(model, name, None)
        if isinstance(head, nn.Module):
            head.register_forward_hook(pool)
