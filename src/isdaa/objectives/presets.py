"""Named methods, what they stand for, and the default of every setting. Imports no torch, so that help is instant.

A method is a composition of independent choices (implicit reward, logit, loss, weight, SFT term), never a branch of its
own: `resolve("is_dpo", beta=0.01)` gives the complete arguments of `Objective`, and any of them can be overridden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import Any, Literal, get_args

from isdaa.errors import nearest
from isdaa.objectives.formulas import one_line

ImplicitReward = Literal["log_ratio", "chi_squared"]
Loss = Literal["logistic", "squared", "hinge"]
Weight = Literal["none", "importance", "wpo", "shuffled", "mean"]
Clip = Literal["joint", "per_response"]
Normalize = Literal["batch"]

CHOICES: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "implicit_reward": get_args(ImplicitReward),
        "loss": get_args(Loss),
        "weight": get_args(Weight),
        "clip": get_args(Clip),
        "normalize": (None, "batch"),
    }
)
"""Setting -> its allowed values, of the settings that are chosen from a list."""

FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "implicit_reward": "r(Δ): log_ratio is Δ, chi_squared is Δ + exp(clamp(Δ, −88, 20))",
        "loss": "ℓ(u): logistic, squared or hinge",
        "beta": "β > 0: strength of the pull towards the reference",
        "weight": "w: none, importance, wpo, or a control (shuffled, mean) made of the importance weights",
        "clip_eps": "ε ≥ 0: upper clip of the log importance weight (joint: 2ε); null: no clip, log w capped at 40",
        "clip": "joint clips the sum of both log-ratios at 2ε, per_response each of them at ε",
        "normalize": "batch divides the weights by their mean over the global batch",
        "length_penalty": "α: adds α·(|y_w| − |y_l|) to the logit, lengths in tokens with EOS",
        "sft_coefficient": "η ≥ 0: adds β·η·(−log π(y_w|x)) to the loss, never weighted",
        "label_smoothing": "0 ≤ s ≤ 0.5: assumed share of flipped labels (logistic loss only)",
        "length_normalized": "divides Δ by the response's length in the margin alone",
        "max_reward": "R_max > 0: clips β·h to ±2·R_max (chi_squared only); null: no clip",
    }
)
"""Every setting of an `Objective`, with one line of help."""

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "implicit_reward": "log_ratio",
        "loss": "logistic",
        "beta": 0.1,
        "weight": "none",
        "clip_eps": 1.0,
        "clip": "joint",
        "normalize": None,
        "length_penalty": 0.0,
        "sft_coefficient": 0.0,
        "label_smoothing": 0.0,
        "length_normalized": False,
        "max_reward": None,
    }
)
"""The one place where the defaults of the settings stand."""


@dataclass(frozen=True)
class Preset:
    """A named method.

    Attributes:
        name: as `isdaa methods` lists it.
        settings: those that it fixes; the rest keep their defaults.
        formula: what it computes, in a line.
        source: the paper, with its equation or algorithm where it has one.
    """

    name: str
    settings: Mapping[str, Any]
    formula: str
    source: str


_DPO = "Rafailov et al. 2023, arXiv 2305.18290, eq. 7"
_IPO = "Azar et al. 2023, arXiv 2310.12036, eq. 17; summed logps"
_SLIC = "Zhao et al. 2023, arXiv 2305.10425, with reference as in Tang et al. 2024, arXiv 2402.05749"
_RPO = "Liu et al. 2024, arXiv 2405.16436"
_CHI_PO = "Huang et al. 2024, arXiv 2407.13399, Algorithm 1"
_R_DPO = "Park et al. 2024, arXiv 2403.19159"
_CDPO = "Mitchell 2023, A note on DPO with noisy preferences & relationship to IPO"
_WPO = "Zhou et al. 2024, arXiv 2406.11827"
_IS = "Nguyen et al., NeurIPS 2025, arXiv 2506.08681"

_ETA = {"sft_coefficient": 0.005}
_CHI = {"implicit_reward": "chi_squared"}
_ALPHA = {"length_penalty": 0.01}
_SQUARED = {"loss": "squared"}
_HINGE = {"loss": "hinge"}

_BASES: dict[str, tuple[dict[str, Any], str]] = {
    "dpo": ({"loss": "logistic"}, _DPO),
    "ipo": (_SQUARED, _IPO),
    "slic": (_HINGE, _SLIC),
    "rpo": ({"loss": "logistic"} | _ETA, _RPO),
    "rpo_ipo": (_SQUARED | _ETA, f"SFT term of {_RPO}; loss of {_IPO}"),
    "rpo_slic": (_HINGE | _ETA, f"SFT term of {_RPO}; loss of {_SLIC}"),
    "chi_po": ({"loss": "logistic"} | _CHI, _CHI_PO),
    "chi_ipo": (_SQUARED | _CHI, f"implicit reward of {_CHI_PO}; loss of {_IPO}"),
    "chi_slic": (_HINGE | _CHI, f"implicit reward of {_CHI_PO}; loss of {_SLIC}"),
    "r_dpo": ({"loss": "logistic"} | _ALPHA, _R_DPO),
    "r_ipo": (_SQUARED | _ALPHA, f"length term of {_R_DPO}; loss of {_IPO}"),
    "r_slic": (_HINGE | _ALPHA, f"length term of {_R_DPO}; loss of {_SLIC}"),
    "cdpo": ({"loss": "logistic", "label_smoothing": 0.1}, _CDPO),
}

RECOMMENDED = (
    "chi_po",
    0.05,
)  # method and β for who has no reason for another (docs/which_method.md); the default is the paper's
LARGEST = 1e30  # of any setting, up and down: float32 ends at 3.4e38
_IMPORTANCE = {"weight": "importance", "clip_eps": 1.0, "clip": "joint"}

_TABLE: dict[str, tuple[dict[str, Any], str]] = {
    **_BASES,
    **{f"is_{name}": (settings | _IMPORTANCE, f"{_IS}; {source}") for name, (settings, source) in _BASES.items()},
    "wpo": ({"loss": "logistic", "weight": "wpo"}, _WPO),
}

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        name: Preset(name, MappingProxyType(settings), one_line({**DEFAULTS, **settings}), source)
        for name, (settings, source) in _TABLE.items()
    }
)
"""Every named method: name -> `Preset`."""


def resolve(method: str, **overrides: Any) -> dict[str, Any]:
    """The complete, checked arguments of `Objective` for a named method.

    Args:
        method: a name in `PRESETS`.
        overrides: settings that win over the preset's.

    Returns:
        A value for every name in `FIELDS`.

    Raises:
        ValueError: one line: an unknown method or setting, a value out of range, or a combination that means nothing.
    """
    return check_settings(**{**PRESETS[known_method(method)].settings, **overrides})


def known_method(method: str) -> str:
    """The name of a method as it is. Raises ValueError, in one line, where there is none of this name."""
    if method not in PRESETS:
        raise ValueError(f'unknown method "{method}"{nearest(method, PRESETS)}; known methods: {", ".join(PRESETS)}')
    return method


def check_settings(**settings: Any) -> dict[str, Any]:
    """Check settings of `Objective` without building one.

    Args:
        settings: by name; those that are not given take their defaults.

    Returns:
        A value for every name in `FIELDS`.

    Raises:
        ValueError: one line: an unknown setting, a wrong type, a value out of range, or a combination that means nothing
            (label_smoothing without logistic, max_reward without chi_squared, normalize without a weight).
    """
    for name in settings:
        if name not in DEFAULTS:
            raise ValueError(f'unknown setting "{name}"{nearest(name, DEFAULTS)}; known settings: {", ".join(DEFAULTS)}')
    full = {**DEFAULTS, **settings}
    for name, choices in CHOICES.items():
        _check_choice(name, full[name], choices)
    _check_number("beta", full["beta"], above=0.0)
    _check_number("clip_eps", full["clip_eps"], least=0.0, optional=True)
    _check_number("length_penalty", full["length_penalty"])
    _check_number("sft_coefficient", full["sft_coefficient"], least=0.0)
    _check_number("label_smoothing", full["label_smoothing"], least=0.0, most=0.5)
    _check_number("max_reward", full["max_reward"], above=0.0, optional=True)
    if not isinstance(full["length_normalized"], bool):
        raise ValueError(f"length_normalized must be true or false; got {full['length_normalized']!r}")
    if full["label_smoothing"] and full["loss"] != "logistic":
        raise ValueError(
            f'label_smoothing={full["label_smoothing"]} needs loss="logistic"; with loss="{full["loss"]}" it must be 0'
        )
    if full["max_reward"] is not None and full["implicit_reward"] != "chi_squared":
        raise ValueError(
            f'max_reward={full["max_reward"]} needs implicit_reward="chi_squared"; '
            f'with implicit_reward="{full["implicit_reward"]}" it must be null'
        )
    if full["normalize"] is not None and full["weight"] == "none":
        raise ValueError(f'normalize="{full["normalize"]}" needs a weight; with weight="none" it must be null')
    return full


def _check_choice(name: str, value: object, choices: tuple[Any, ...]) -> None:
    # A list or another unhashable value cannot be a choice; `in` on a tuple compares and never hashes.
    if (value is None or isinstance(value, str)) and value in choices:
        return
    allowed = ", ".join("null" if choice is None else choice for choice in choices)
    raise ValueError(f"{name} must be one of {allowed}; got {value!r}{nearest(value, choices)}")


def _check_number(
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    optional: bool = False,
) -> None:
    if value is None and optional:
        return
    bounds = [f"> {above:g}"] * (above > -math.inf) + [f"≥ {least:g}"] * (least > -math.inf)
    bounds += [f"≤ {most:g}"] * (most < math.inf)
    is_number = isinstance(value, Real) and not isinstance(value, bool) and abs(value) < math.inf  # type: ignore[operator]
    if not is_number or not (value > above and least <= value <= most):  # type: ignore[operator]
        kind = " ".join(["a finite number", " and ".join(bounds)]).strip()
        raise ValueError(f"{name} must be {kind}{' or null' if optional else ''}; got {value!r}")
    if abs(value) > LARGEST:  # type: ignore[arg-type]
        raise ValueError(f"{name} must not be beyond {LARGEST:g}; got {value!r}")


def weighs_by_behaviour(objective: Mapping[str, Any]) -> bool:
    """The same of an objective's arguments: all weights but `none` and `wpo` are importance weights, or made of them."""
    return objective.get("weight", "none") not in ("none", "wpo")
