"""What an objective computes, as text: a symbolic line for the list of methods, full text with numbers for model cards.

Written from the settings, so that a formula cannot disagree with what runs. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What both functions have a text for. Anything else is an error: it must not get the formula of another.
TOLD = {
    "implicit_reward": ("log_ratio", "chi_squared"),
    "loss": ("logistic", "squared", "hinge"),
    "weight": ("none", "importance", "wpo", "shuffled", "mean"),
}


def one_line(settings: Mapping[str, Any]) -> str:
    """The loss of one pair of a preset in symbols, from its complete settings. KeyError for a choice without a text."""
    _check_told(settings)
    margin = "Δ_w − Δ_l"
    if settings["implicit_reward"] == "chi_squared":
        margin = "Δ_w + e^Δ_w − Δ_l − e^Δ_l"
    logit, fit = f"β·({margin})", margin
    where: list[str] = []
    if settings["length_penalty"]:
        logit += " + α·(|y_w| − |y_l|)"
        fit += " + (α/β)·(|y_w| − |y_l|)"
        where.append(f"α = {number(settings['length_penalty'])}")
    if settings["loss"] == "squared":
        loss = f"({fit} − 1/(2β))²"
    elif settings["loss"] == "hinge":
        loss = f"max(0, 1 − {logit})" if not settings["length_penalty"] else f"max(0, 1 − [{logit}])"
    elif settings["label_smoothing"]:
        loss = "[−(1−s)·log σ(u) − s·log σ(−u)]"
        where += [f"u = {logit}", f"s = {number(settings['label_smoothing'])}"]
    else:
        loss = f"[−log σ({logit})]"
    if settings["weight"] == "none":
        loss = loss.removeprefix("[").removesuffix("]")
    else:
        loss = f"w·{loss}"
        where += (
            ["w = Π_{y=y_w,y_l} exp(mean_t[log π(y_t) − log Σ_v π(v)²])"]
            if settings["weight"] == "wpo"
            else ["w = min(π(y_w)π(y_l)/(μ(y_w)μ(y_l)), e^{2ε})", f"ε = {number(settings['clip_eps'])}"]
        )
    if settings["sft_coefficient"]:
        loss += " − β·η·log π(y_w)"
        where.append(f"η = {number(settings['sft_coefficient'])}")
    return ", ".join([loss, *where])


def describe(settings: Mapping[str, Any]) -> str:
    """Exactly what an objective computes, with its numbers: several lines of text, from its complete settings.

    Raises:
        KeyError: a choice without a text.
    """
    _check_told(settings)
    beta = number(settings["beta"])
    weighted = settings["weight"] != "none"
    loss = "w·ℓ" if weighted else "ℓ"
    if settings["sft_coefficient"]:
        loss += f" + {beta}·{number(settings['sft_coefficient'])}·(−log π(y_w|x))"
    lines = [f"loss = {loss}, averaged over the pairs of the global batch", f"ℓ = {_pair_loss(settings)}"]
    logit = f"{beta}·h"
    if settings["max_reward"] is not None:
        bound = number(2 * settings["max_reward"])
        logit = f"clamp({logit}, −{bound}, {bound})"
    if settings["length_penalty"]:
        logit += f" + {number(settings['length_penalty'])}·(|y_w| − |y_l|)"
    reward = "Δ" if settings["implicit_reward"] == "log_ratio" else "Δ + exp(clamp(Δ, −88, 20))"
    divided = ", divided by |y|" if settings["length_normalized"] else ""
    lines += [
        f"u = {logit}",
        f"h = r(Δ_w) − r(Δ_l), r(Δ) = {reward}",
        f"Δ = log π(y|x) − log π_ref(y|x), summed over the tokens of the response (EOS included){divided}",
    ]
    if weighted:
        lines += _weight_lines(settings)
    return "\n".join(lines)


def _pair_loss(settings: Mapping[str, Any]) -> str:
    if settings["loss"] == "hinge":
        return "max(0, 1 − u)"
    if settings["loss"] == "squared":
        beta = number(settings["beta"])
        return f"(u/{beta} − 1/(2·{beta}))²"
    smoothing = settings["label_smoothing"]
    if not smoothing:
        return "−log σ(u)"
    return f"−{number(1 - smoothing)}·log σ(u) − {number(smoothing)}·log σ(−u)"


def _check_told(settings: Mapping[str, Any]) -> None:
    for name, told in TOLD.items():
        if settings[name] not in told:
            raise KeyError(f"{name} {settings[name]!r} has no formula; add its text to one_line and describe")


def _weight_lines(settings: Mapping[str, Any]) -> list[str]:
    if settings["weight"] == "wpo":
        formula = "w = exp(min(a_w + a_l, 40)), a = mean over t of [log π(y_t) − log Σ_v π(v)²]"
    elif settings["clip_eps"] is None:
        formula = "w = exp(min(ρ_w + ρ_l, 40)), ρ = log π(y|x) − log μ(y|x); no clip but the cap at 40"
    elif settings["clip"] == "per_response":
        eps = number(settings["clip_eps"])
        formula = f"w = exp(min(ρ_w, {eps}) + min(ρ_l, {eps})), ρ = log π(y|x) − log μ(y|x)"
    else:
        formula = f"w = exp(min(ρ_w + ρ_l, {number(2 * settings['clip_eps'])})), ρ = log π(y|x) − log μ(y|x)"
    lines = [formula]
    if settings["weight"] != "wpo":
        lines.append("μ = the pairs' behaviour policy where they carry its logps, else π_ref")
    if settings["weight"] == "shuffled":
        lines.append("control: these w are permuted among the pairs of the global batch, seeded by (seed, step)")
    if settings["weight"] == "mean":
        lines.append("control: every pair has the mean of these w over the global batch")
    if settings["normalize"] == "batch":
        lines.append("w is divided by its mean over the global batch")
    lines.append("w is constant under differentiation")
    return lines


def number(value: float) -> str:
    """A setting as text: no trailing zeros, a true minus sign, every digit that a person would have typed."""
    return format(float(value), ".12g").replace("-", "−")
