"""What can be trained in so much memory: the settings that fit, best first, each by its plan (`isdaa inspect --memory 8GB`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from isdaa.config import Config, lay_over, resolved, validate
from isdaa.errors import UserError, nearest
from isdaa.preview.devices import PRESETS, device_of
from isdaa.preview.plan import Plan

UNITS = {"GB": 1e9, "GIB": 2**30, "G": 1e9, "MB": 1e6, "MIB": 2**20, "TB": 1e12}
ROOM = 0.9  # of the memory that a plan may fill: plans have been up to a fifth too low (docs/inspect.md)
RANK = 16  # of an adapter that is proposed
SHORTER = (1.0, 0.5, 0.25)  # of tokenization.max_length, tried in turn until something fits
TRAINED = ("sft", "reward", "align")

EIGHT_BIT = "all weights, optimiser states in 8 bits"
# What is trained -> the settings that say so, best first: an adapter changes less of the model, 4 bits round its weights.
FORMS: dict[str, dict[str, Any]] = {
    "all weights": {"lora.rank": 0, "model.quantization": None, "model.dtype": "float32"},
    EIGHT_BIT: {"lora.rank": 0, "model.quantization": None, "model.dtype": "float32"},
    "adapter": {"model.quantization": None, "model.dtype": "float32"},
    "adapter on bfloat16 weights": {"model.quantization": None, "model.dtype": "bfloat16"},
    "adapter on 4-bit weights": {"model.quantization": "nf4", "model.dtype": "bfloat16"},
}


@dataclass(frozen=True)
class Fit:
    """Settings to train with. options: what to type beside the configuration; memory: bytes at the worst moment of all stages;
    seconds: of the whole run; fits: into `ROOM` of the memory; cut: the share of pairs that a shorter max_length cuts."""

    form: str
    options: dict[str, Any]
    memory: float
    seconds: float
    fits: bool
    cut: float = 0.0


Planner = Callable[[Config], list[Plan]]  # the plans of a configuration's stages


def memory_of(text: str) -> tuple[float, str | None]:
    """(bytes, the GPU) of `8GB`, `40 GiB` or a GPU's name. Raises UserError."""
    if text.lower() in PRESETS:
        return device_of(text.lower()).memory, text.lower()
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B?)\s*", text, re.IGNORECASE)
    if found is None or found[2].upper() not in UNITS or not float(found[1]):
        raise UserError(
            f"--memory {text}: give an amount such as 8GB, or a GPU: {', '.join(PRESETS)}{nearest(text.lower(), PRESETS)}; "
            "for another GPU, its amount, and a similar GPU as --device"
        )
    return float(found[1]) * UNITS[found[2].upper()], None


def fits(config: Config, memory: float, planner: Planner, *, on_gpu: bool, cuts: Callable[[int], float]) -> list[Fit]:
    """The settings that train a configuration in so much memory: of each form the fastest that fits, best first; what does not
    fit comes last. The global batch stays as it is: a smaller micro-batch divides it, and accumulates more gradients. A tenth of
    the memory is left free.

    planner: gives the plans of a changed configuration. cuts: share of pairs that a `max_length` cuts. Where nothing fits,
    shorter rows are tried.
    """
    for share in SHORTER:
        length = max(16, int(config.tokenization.max_length * share))
        shorter = (
            {}
            if share == 1
            else {
                "tokenization.max_length": length,
                "tokenization.max_prompt_length": min(config.tokenization.max_prompt_length, length - length // 5),
            }
        )
        found = [_best(form, config, {**own, **shorter}, memory, planner, on_gpu) for form, own in _forms(config, on_gpu)]
        if any(one.fits for one in found) or share == SHORTER[-1]:
            cut = cuts(length) if shorter else 0.0
            found = [Fit(**{**vars(one), "cut": cut}) for one in found]
            return sorted(found, key=lambda one: not one.fits)
    return []


def _forms(config: Config, on_gpu: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    for form, settings in FORMS.items():
        if settings.get("model.quantization") and (not on_gpu or config.model.random is not None):
            continue
        if form == EIGHT_BIT and not on_gpu:
            continue
        if config.continue_from is not None and (
            bool(config.lora.rank) == ("lora.rank" in settings) or settings["model.quantization"] != config.model.quantization
        ):
            continue  # a run goes on as what it was
        rank = {} if "lora.rank" in settings else {"lora.rank": config.lora.rank or RANK}
        yield form, settings | rank


def _best(form: str, config: Config, settings: dict[str, Any], memory: float, planner: Planner, on_gpu: bool) -> Fit:
    """The fastest that fits, of every precision, with and without checkpointing, each at its largest micro-batch; else the
    smallest."""
    stages = [stage for stage in TRAINED if stage in config.stages]
    tried: list[Fit] = []
    for checkpointing in (False, True):
        ways: dict[str, Any] = {f"{stage}.gradient_checkpointing": checkpointing for stage in stages}
        ways |= {f"{stage}.precision": "bfloat16" for stage in stages} if on_gpu else {}
        ways |= {f"{stage}.optimizer": "adamw_8bit" for stage in stages} if form == EIGHT_BIT else {}
        sizes = micro_batches(config, stages)
        low, high = 0, len(sizes) - 1  # the largest that fits, by halving; each needs less than the one before
        while low <= high:
            middle = low if low == 0 else (low + high) // 2
            one = _tried(form, config, settings | ways | sizes[middle], memory, planner)
            tried.append(one)
            if one.fits:
                high = middle - 1
            else:
                low = middle + 1
        if any(one.fits for one in tried):
            break  # checkpointing costs time and gives nothing more
    fitting = [one for one in tried if one.fits]
    return min(fitting, key=lambda one: one.seconds) if fitting else min(tried, key=lambda one: one.memory)


def micro_batches(config: Config, stages: Sequence[str]) -> list[dict[str, Any]]:
    """Ever smaller micro-batches, at most half as large each, with as many more of them a step."""
    found: list[dict[str, Any]] = [{}]
    times = 1
    while any(getattr(config, stage).batch_size > times for stage in stages):
        times *= 2
        changes: dict[str, Any] = {}
        for stage in stages:
            settings = getattr(config, stage)
            rows = settings.batch_size * settings.gradient_accumulation_steps
            size = next(n for n in range(max(1, settings.batch_size // times), 0, -1) if rows % n == 0)
            if size != settings.batch_size:
                changes |= {f"{stage}.batch_size": size, f"{stage}.gradient_accumulation_steps": rows // size}
        found.append(changes)
    return found


def _tried(form: str, config: Config, settings: dict[str, Any], memory: float, planner: Planner) -> Fit:
    data = resolved(config)
    options = {key: value for key, value in settings.items() if _value(data, key) != value}
    for key, value in options.items():
        lay_over(data, key, value)
    plans = planner(validate(data, "--memory"))
    peak = max(plan.peak.total for plan in plans)
    return Fit(form, options, peak, sum(sum(plan.seconds.values()) for plan in plans), peak <= ROOM * memory)


def _value(data: dict[str, Any], key: str) -> Any:
    value: Any = data
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
