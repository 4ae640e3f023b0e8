"""The objective a second time, in plain Python, with derivatives worked by hand: shares no line with isdaa.

Also what several test files need: the space of all compositions for hypothesis, and pairs made of rows.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from isdaa.objectives import PairLogps

Row = dict[str, float]

NAMES = {
    "policy_chosen_logps": "pw",
    "policy_rejected_logps": "pl",
    "reference_chosen_logps": "rw",
    "reference_rejected_logps": "rl",
    "chosen_lengths": "nw",
    "rejected_lengths": "nl",
    "behaviour_chosen_logps": "mw",
    "behaviour_rejected_logps": "ml",
    "policy_chosen_wpo": "aw",
    "policy_rejected_wpo": "al",
}


def pairs_of(rows: Sequence[Row], dtype: torch.dtype = torch.float64, grad: bool = False) -> PairLogps:
    tensors: dict[str, Any] = {}
    for name, key in NAMES.items():
        if key in rows[0]:
            kind = torch.int64 if name.endswith("lengths") else dtype
            tensors[name] = torch.tensor([row[key] for row in rows], dtype=kind)
    if grad:
        tensors["policy_chosen_logps"].requires_grad_()
        tensors["policy_rejected_logps"].requires_grad_()
    return PairLogps(**tensors)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def reward_and_slope(delta: float, kind: str) -> tuple[float, float]:
    if kind == "log_ratio":
        return delta, 1.0
    if delta < -88:
        return delta + math.exp(-88), 1.0
    if delta > 20:
        return delta + math.exp(20), 1.0
    return delta + math.exp(delta), 1.0 + math.exp(delta)


def own_weight(row: Row, s: dict[str, Any]) -> tuple[float, float]:
    """Log-weight before the clip and weight of one pair."""
    if s["weight"] == "none":
        return 0.0, 1.0
    if s["weight"] == "wpo":
        return row["aw"] + row["al"], math.exp(min(row["aw"] + row["al"], 40))
    ratio_w = row["pw"] - row.get("mw", row["rw"])
    ratio_l = row["pl"] - row.get("ml", row["rl"])
    log_w, eps = ratio_w + ratio_l, s["clip_eps"]
    if eps is None:
        return log_w, math.exp(min(log_w, 40))
    if s["clip"] == "joint":
        return log_w, math.exp(min(log_w, 2 * eps, 40))
    return log_w, math.exp(min(min(ratio_w, eps) + min(ratio_l, eps), 40))


def plain(rows: Sequence[Row], s: dict[str, Any], order: Iterable[int] = ()) -> list[Row]:
    """Every output of every pair. `order`: the permutation of weight "shuffled"; pair i gets the weight of order[i]."""
    log_ws, ws = zip(*(own_weight(row, s) for row in rows), strict=True)
    mean = math.fsum(ws) / len(ws)
    if s["weight"] == "shuffled":
        ws = tuple(ws[i] for i in order)
    if s["weight"] == "mean":
        ws = (mean,) * len(ws)
    if s["normalize"] == "batch" and mean > 0:
        ws = tuple(w / mean for w in ws)
    return [one(row, s, log_w, w) for row, log_w, w in zip(rows, log_ws, ws, strict=True)]


def one(row: Row, s: dict[str, Any], log_w: float, w: float) -> Row:
    beta, smooth = s["beta"], s["label_smoothing"]
    scale_w = 1 / row["nw"] if s["length_normalized"] else 1.0
    scale_l = 1 / row["nl"] if s["length_normalized"] else 1.0
    r_w, slope_w = reward_and_slope((row["pw"] - row["rw"]) * scale_w, s["implicit_reward"])
    r_l, slope_l = reward_and_slope((row["pl"] - row["rl"]) * scale_l, s["implicit_reward"])
    u, du_dh = beta * (r_w - r_l), beta
    if s["max_reward"] is not None and abs(u) > 2 * s["max_reward"]:
        u, du_dh = math.copysign(2 * s["max_reward"], u), 0.0
    u += s["length_penalty"] * (row["nw"] - row["nl"])
    if s["loss"] == "logistic":
        loss = -(1 - smooth) * log_sigmoid(u) - smooth * log_sigmoid(-u)
        slope = -(1 - smooth) * sigmoid(-u) + smooth * sigmoid(u)
    elif s["loss"] == "squared":
        loss = (u / beta - 1 / (2 * beta)) ** 2
        slope = 2 * (u / beta - 1 / (2 * beta)) / beta
    else:
        loss, slope = (1 - u, -1.0) if u < 1 else (0.0, 0.0)
    return {
        "logits": u,
        "unweighted_losses": loss,
        "weights": w,
        "log_weights": log_w,
        "losses": w * loss - beta * s["sft_coefficient"] * row["pw"],
        "chosen_rewards": beta * r_w,
        "rejected_rewards": beta * r_l,
        "grad_w": w * slope * du_dh * slope_w * scale_w - beta * s["sft_coefficient"],
        "grad_l": -w * slope * du_dh * slope_l * scale_l,
        "size": 1 + abs(r_w) + abs(r_l),
    }


@st.composite
def compositions(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of any objective that means something."""
    reward = draw(st.sampled_from(["log_ratio", "chi_squared"]))
    loss = draw(st.sampled_from(["logistic", "squared", "hinge"]))
    weight = draw(st.sampled_from(["none", "importance", "wpo", "shuffled", "mean"]))
    return {
        "implicit_reward": reward,
        "loss": loss,
        "beta": draw(st.sampled_from([0.01, 0.05, 0.1, 0.5, 1.0, 3.0])),
        "weight": weight,
        "clip_eps": draw(st.none() | st.floats(0, 3)),
        "clip": draw(st.sampled_from(["joint", "per_response"])),
        "normalize": draw(st.sampled_from([None, "batch"])) if weight != "none" else None,
        "length_penalty": draw(st.sampled_from([0.0, 0.01, -0.1])),
        "sft_coefficient": draw(st.sampled_from([0.0, 0.005, 0.5])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 0.5])) if loss == "logistic" else 0.0,
        "length_normalized": draw(st.booleans()),
        "max_reward": draw(st.sampled_from([None, 0.2, 5.0])) if reward == "chi_squared" else None,
    }


@st.composite
def batches(draw: st.DrawFn, max_size: int = 5) -> list[Row]:
    """Rows of one batch: all with behaviour logps, or none; log-ratios mostly modest, so that no digits are lost."""
    size = draw(st.integers(1, max_size))
    behaviour = draw(st.booleans())
    logp, ratio = st.floats(-300, -1), st.floats(-30, 10) | st.floats(-1, 1)
    rows = []
    for _ in range(size):
        row = {"rw": draw(logp), "rl": draw(logp), "nw": draw(st.integers(1, 90)), "nl": draw(st.integers(1, 90))}
        row |= {"pw": row["rw"] + draw(ratio), "pl": row["rl"] + draw(ratio)}
        row |= {"aw": draw(st.floats(-4, 3)), "al": draw(st.floats(-4, 3))}
        if behaviour:
            row |= {"mw": row["pw"] - draw(ratio), "ml": row["pl"] - draw(ratio)}
        rows.append(row)
    return rows
