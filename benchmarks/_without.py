"""isdaa's own step with one thing of what makes it fast left out: arms of the step benchmark that say what each is worth.

`preference_step.py --arms without` runs them beside isdaa as it is. Each arm has a process of its own, so that what is left
out there is there everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from unittest.mock import patch

from isdaa.models.attention import attention_choice
from isdaa.models.packed import last_layer, logprobs, patched_forward

Left = Callable[[], AbstractContextManager[object]]

LEFT: dict[str, Left] = {
    "without_blocks": lambda: patch.object(attention_choice, "FAST", {}),
    "without_last_layer": lambda: patch.object(last_layer, "install", lambda model: False),
    "without_direction": lambda: patch.object(logprobs, "KEPT_BYTES", {}),
    "without_tie": lambda: patch.object(patched_forward, "tie_of", lambda model: None),
    "without_huge_pages": nullcontext,  # of the environment: `_cell.AS_IT_COMES`
}
