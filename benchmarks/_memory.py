"""Which arms of the step benchmark fit into memory beside each other: rough sums over what each keeps between its steps and
what a step needs on top."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from shapes import Lengths, Size

GIB = 1 << 30
IMPORTS = 0.46 * GIB
SHARE = 0.95  # of the memory that is free
TILE = (4096, 32_768)  # tokens, words: the logits that TRL's head computes at a time
BASE = "isdaa_dpo"  # everything is compared with it
WITHOUT = (  # of isdaa_dpo
    "without_blocks", "without_last_layer", "without_direction", "without_tie", "without_huge_pages",
)  # fmt: skip
PACKED = ("isdaa_dpo", "isdaa_is_dpo", "isdaa_bare", *WITHOUT)
ONE_BY_ONE = ("isdaa_one", "trl_best", "trl_gpu_head")
EVERYWHERE = ("trl_best", "trl_whole", "trl_defaults", "two_rows")  # these score prompts and padding, too
RECOMPUTED, SECOND_MODEL = "trl_defaults", "trl_defaults"
HALF = "_bf16"  # ends the name of an arm whose products are in bfloat16


def of_products(size: Size, lengths: Sequence[Sequence[Lengths]]) -> float:
    """Bytes of the process that times matrix products: the head's are the largest."""
    rows = max(sum(c + r for _, c, r in step) for step in lengths)
    return IMPORTS + 4.0 * (size.vocabulary * (rows + size.hidden) + rows * size.hidden)


class Budget:
    """Of one cell. lengths: of the pairs of each step; free: bytes, or None where they are not known."""

    def __init__(self, size: Size, lengths: Sequence[Sequence[Lengths]], arms: Sequence[str], free: float | None) -> None:
        self.free = None if free is None else SHARE * free
        self.kept = {arm: max(_kept(size, step, arm) for step in lengths) for arm in arms}
        self.on_top = {arm: max(_on_top(size, step, arm) for step in lengths) for arm in arms}

    def needed(self, arms: Sequence[str]) -> float:
        """Bytes of some arms beside each other; one of them computes at a time."""
        return sum(self.kept[arm] for arm in arms) + max(self.on_top[arm] for arm in arms)

    def fits(self, arms: Sequence[str]) -> bool:
        """Whether there is memory for them."""
        return self.free is None or self.needed(arms) <= self.free

    def parts(self) -> tuple[list[list[str]], dict[str, str]]:
        """Arms that run beside each other, as many as fit, the one that all are compared with in every part; and those
        that fit nowhere, with the reason."""
        parts, too_large = [[BASE]], {}
        for arm in (arm for arm in self.kept if arm != BASE):
            if not self.fits([BASE, arm]):
                too_large[arm] = f"out of memory: about {self.needed([BASE, arm]) / GIB:.0f} GiB would be needed"
                continue
            room = next((part for part in parts if self.fits([*part, arm])), None)
            if room is None:
                parts.append([BASE, arm])
            else:
                room.append(arm)
        return parts, too_large

    def limit(self, arm: str, arms: Sequence[str]) -> int | None:
        """Bytes that an arm may allocate beside the others: what they do not keep."""
        if self.free is None:
            return None
        others = sum(self.kept[other] for other in arms if other != arm)
        return int(max(self.free - others, self.kept[arm] + self.on_top[arm]))


def _tokens(lengths: Sequence[Lengths], arm: str) -> int:
    arm = arm.removesuffix(HALF)
    if arm in PACKED:
        return sum(map(sum, lengths))
    if arm in ONE_BY_ONE:
        return max(2 * (p + max(c, r)) for p, c, r in lengths)
    return 2 * len(lengths) * max(p + max(c, r) for p, c, r in lengths)


def _kept(size: Size, lengths: Sequence[Lengths], arm: str) -> float:
    """Weights and two moments; and the activations of a step, which the allocator does not give back."""
    half = 0.5 if arm.endswith(HALF) else 0.0  # the weights' copies
    arm = arm.removesuffix(HALF)
    models = half + (4 if arm == SECOND_MODEL else 3)
    layers = 1.5 if arm == RECOMPUTED else size.layers
    floats = layers * (9 * size.hidden + 4 * size.intermediate) + size.layers * size.hidden
    scattered = 1.35 if arm.endswith("two_rows") else 1.0  # as measured
    return IMPORTS + 4 * models * size.parameters + 4 * floats * scattered * _tokens(lengths, arm)


def _on_top(size: Size, lengths: Sequence[Lengths], arm: str) -> float:
    """The logits that exist at once, several times over; gradients, the embedding's twice."""
    arm = arm.removesuffix(HALF)
    scored = _tokens(lengths, arm) if arm in EVERYWHERE else max(c + r for _, c, r in lengths)
    if arm == "two_rows":
        logits = 4.0 * scored * size.vocabulary
    elif arm.startswith("trl"):
        logits = 9.0 * min(scored, TILE[0]) * min(size.vocabulary, TILE[1])
    else:
        logits = 2.0**26
    return 4 * logits + 4 * size.parameters + 4 * size.vocabulary * size.hidden


def free_memory() -> float | None:
    """Bytes that can be had without anything being killed, or None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024.0
    except OSError:
        pass
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):
        return None
