"""What the step benchmark's cells say: times and ratios with their ranges, and whether the arms did the same work."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _cell import Cell, Recorded
from _memory import BASE, HALF
from rich.table import Table
from safetensors import safe_open
from shapes import BETA, Lengths

WEIGHTED, BARE = "isdaa_is_dpo", "isdaa_bare"
PACKED = ("isdaa_dpo", WEIGHTED, "isdaa_one", BARE, "isdaa_dpo_bf16", "isdaa_is_dpo_bf16")
OTHER_WORK = (WEIGHTED, WEIGHTED + HALF)  # another objective: its loss and weights are not compared
ROUNDING = 2.0**-22  # of a sum of logps: a few units in the last place
UPDATE_TOLERANCE = 1e-2  # of the largest update, and of the update's length

LABELS = {
    "isdaa_dpo": "isdaa dpo",
    "isdaa_is_dpo": "isdaa is_dpo",
    "isdaa_one": "isdaa dpo, one pair at a time",
    "isdaa_bare": "isdaa, bare loop",
    "isdaa_two_rows": "isdaa, separate rows",
    "trl_best": "TRL, best settings",
    "trl_whole": "TRL, best, batch at once",
    "trl_gpu_head": "TRL, best, head as on a GPU",
    "two_rows": "separate rows, full logits",
    "isdaa_dpo_bf16": "isdaa dpo, bf16",
    "isdaa_is_dpo_bf16": "isdaa is_dpo, bf16",
    "trl_best_bf16": "TRL, best settings, bf16",
    "trl_whole_bf16": "TRL, best, batch at once, bf16",
    "trl_gpu_head_bf16": "TRL, best, head as on a GPU, bf16",
    "trl_defaults": "TRL, defaults but for bf16",
    "trl_defaults_bf16": "TRL, defaults",
    "two_rows_bf16": "separate rows in bf16, full logits",
    "without_blocks": "without blocks of queries",
    "without_last_layer": "without the cut last layer",
    "without_direction": "without the kept direction",
    "without_tie": "without one tied gradient",
    "without_huge_pages": "without huge pages",
}

DEFINITIONS = {
    "step": "wall-clock seconds from the end of one optimiser step to the end of the next, waiting left out: logging, fetching "
    "and collation of the batch, forward, backward, clipping, optimiser; the bare loops have no logging and collate beforehand",
    "round": "one step of every arm on the same pairs, one process computing at a time, in an order shuffled by the seed",
    "time_ratio": "an arm's seconds over those of isdaa_dpo in the same round",
    "cpu_seconds": "of all threads of an arm's process during a step; threads that wait for each other count, too",
    "elsewhere": "share of all cores that other programs had during a step: where it differs, ratios do for no other reason",
    "pairs_per_second": "batch size over the median step",
    "peak": "MiB that the arm's process held at most, until the end of its last step (VmHWM); its libraries are in it",
    "peak_before": "the same until the first step: where it equals peak, preparation was what needed most",
    "memory": "MiB that the process held right before the first step; above_start is peak less this",
    "held": "MiB that the process holds while it waits after its last step",
    "memory_ratio": "an arm's peak over that of isdaa_dpo, whole processes",
    "matmul_seconds": "seconds of the matrix products that one step needs, each as one product, measured by themselves in the "
    "same round, in memory that is there: one forward and two backward products of each linear map over every token once (a "
    "prompt once a pair), the head over response tokens alone, attention over visible (query, key) pairs; nothing that an "
    "implementation recomputes",
    "matmul_share": "matmul_seconds over the arm's seconds in the same round; the same products for all arms",
    "matmul_saved": "seconds of those products that isdaa does not do: the last layer's gated unit at the prompts' tokens",
    "matmul_share_done": "matmul_seconds less matmul_saved over the arm's seconds in the same round; isdaa's packed rows alone",
    "loss_difference": "largest |loss − loss of isdaa_dpo| over all steps, warm-up included",
    "loss_moved": "largest |loss − log 2| of isdaa_dpo: what the loss difference is to be compared with",
    "weight_difference": "largest |weight − weight of isdaa_dpo| after the last step",
    "largest_update": "largest |weight − initial weight| of isdaa_dpo after the last step",
    "relative_difference": "Euclidean length of the weights' difference over that of isdaa_dpo's whole update",
    "loss_tolerance": "β times what rounding may do to the logp of the longest response, 2^-22 · its tokens · log V",
    "same_work": f"loss_difference ≤ loss_tolerance, weight_difference ≤ {UPDATE_TOLERANCE:g} · largest_update, "
    f"relative_difference ≤ {UPDATE_TOLERANCE:g}; in bf16: loss_difference and relative_difference no larger than the largest of "
    "TRL's arms in bf16 in the same cell, and null where there is none",
    "fastest": "seconds of TRL's fastest arm over those of isdaa's fastest, dpo alone: in fp32, in bf16, of any precision",
}


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, least and largest of a list, or None where it is empty."""
    return {"median": statistics.median(values), "least": min(values), "largest": max(values)} if values else None


def ratios(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(one, other, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# The same work?


def weights_apart(one: Path, other: Path, initial: Path) -> dict[str, float]:
    """How far two trained models are from each other, and how far the other went from where both began.

    Paths of safetensors files; a name that is missing in the first, or has another shape, is a KeyError or ValueError.
    """
    largest = update = 0.0
    squares, update_squares = 0.0, 0.0
    with safe_open(one, "numpy") as a, safe_open(other, "numpy") as b, safe_open(initial, "numpy") as start:
        if set(a.keys()) != set(b.keys()):
            raise KeyError(f"other weights: {', '.join(sorted(set(a.keys()) ^ set(b.keys())))}")
        for name in b.keys():  # noqa: SIM118  (a file, not a mapping)
            theirs = b.get_tensor(name)
            apart, moved = a.get_tensor(name) - theirs, theirs - start.get_tensor(name)
            largest, update = max(largest, _largest(apart)), max(update, _largest(moved))
            squares += float(np.vdot(apart, apart))
            update_squares += float(np.vdot(moved, moved))
    return {
        "weight_difference": largest,
        "largest_update": update,
        "relative_difference": (squares / update_squares) ** 0.5 if update_squares else float("inf"),
    }


def _largest(values: np.ndarray) -> float:
    """Of the absolute values; NaN counts as infinite."""
    found = float(np.abs(values).max(initial=0.0))
    return found if found == found else float("inf")


def losses_apart(one: Sequence[float], other: Sequence[float]) -> float:
    """Largest difference of two courses of the loss; infinite where they are not comparable."""
    if len(one) != len(other) or not np.isfinite([*one, *other]).all():
        return float("inf")
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def loss_tolerance(lengths: Sequence[Sequence[Lengths]], vocabulary: int) -> float:
    """The most that rounding explains. lengths: of the pairs of each step."""
    longest = max(max(c, r) for step in lengths for _, c, r in step)
    return BETA * ROUNDING * longest * math.log(vocabulary)


def is_same_work(found: Mapping[str, float]) -> bool:
    """Whether the differences are such as rounding makes."""
    return (
        found["loss_difference"] <= found["loss_tolerance"]
        and found["weight_difference"] <= UPDATE_TOLERANCE * found["largest_update"]
        and found["relative_difference"] <= UPDATE_TOLERANCE
    )


def compared(cell: Cell, arm: str) -> dict[str, Any]:
    """Differences of an arm's losses and weights to those of isdaa dpo."""
    files = [cell.folder / name / "weights.safetensors" for name in (arm, BASE)]
    losses = [cell.arms[name].losses for name in (arm, BASE)]
    found = {"loss_difference": losses_apart(losses[0], losses[1])}
    found |= weights_apart(files[0], files[1], cell.folder / "initial" / "model.safetensors")
    found["loss_tolerance"] = loss_tolerance(cell.lengths, cell.plan.size.vocabulary)
    found["loss_moved"] = max(abs(loss - math.log(2)) for loss in losses[1])
    same = is_same_work(found)
    return {name: value if np.isfinite(value) else None for name, value in found.items()} | {"same_work": same}


# ---------------------------------------------------------------------------------------------------------------------
# One cell


def summarise(cell: Cell, batch_size: int) -> dict[str, Any]:
    """Everything about a cell, as JSON-able data."""
    base = cell.arms.get(BASE)
    arms = {name: _arm(cell, name, recorded, base, batch_size) for name, recorded in cell.arms.items()}
    judge_half({name: arm["comparison"] for name, arm in arms.items() if "comparison" in arm})
    pairs = {"weighting": (WEIGHTED, BASE), "trainer": (BASE, BARE)}
    costs = {
        name: spread(ratios(cell.arms[one].seconds, cell.arms[other].seconds)) if {one, other} <= cell.arms.keys() else None
        for name, (one, other) in pairs.items()
    }
    return {
        "name": cell.plan.name,
        "vocabulary": cell.plan.size.vocabulary,
        "parameters": cell.plan.size.parameters,
        "lengths": cell.lengths,
        "padded_tokens": [2 * len(step) * max(p + max(c, r) for p, c, r in step) for step in cell.lengths],
        "packed_tokens": [sum(map(sum, step)) for step in cell.lengths],
        "orders": cell.orders,
        "matmul_seconds": cell.multiplied,
        "matmul_flops": cell.flops,
        "matmul_saved": cell.saved,
        "elsewhere": spread([share for recorded in cell.arms.values() for share in recorded.elsewhere]),
        "matmul_gflops_per_second": spread([f / s / 1e9 for f, s in zip(cell.flops, cell.multiplied, strict=True)]),
        "arms": arms,
        "fastest": fastest({name: arm["seconds"] for name, arm in arms.items() if name not in OTHER_WORK}),
        "cost_of_weighting": costs["weighting"],
        "cost_of_trainer": costs["trainer"],
        "left_out": cell.out,
        "failed": cell.failed,
    }


def _arm(cell: Cell, name: str, recorded: Recorded, base: Recorded | None, batch_size: int) -> dict[str, Any]:
    peak, memory = recorded.peak or 0.0, recorded.memory
    found: dict[str, Any] = {
        "seconds": recorded.seconds,
        "step": spread(recorded.seconds),
        "cpu_seconds": recorded.cpu,
        "elsewhere": recorded.elsewhere,
        "pairs_per_second": batch_size / statistics.median(recorded.seconds),
        "matmul_share": spread(ratios(cell.multiplied, recorded.seconds)),
        "peak": peak,
        "peak_before": recorded.peak_before,
        "memory": memory,
        "held": recorded.held,
        "above_start": None if memory is None else peak - memory,
        "losses": recorded.losses,
    }
    if name in PACKED:
        done = [needed - less for needed, less in zip(cell.multiplied, cell.saved, strict=True)]
        found["matmul_share_done"] = spread(ratios(done, recorded.seconds))
    if base is not None:
        found["time_ratio"] = spread(ratios(recorded.seconds, base.seconds))
        found["memory_ratio"] = peak / base.peak if base.peak else None
        if name != BASE and name not in OTHER_WORK:
            found["comparison"] = compared(cell, name)
    return found


def is_half(name: str) -> bool:
    """Whether an arm's products are in bfloat16."""
    return name.endswith(HALF)


def judge_half(comparisons: Mapping[str, dict[str, Any]]) -> None:
    """Rounding in bf16 moves losses and weights by more than any fixed limit allows: TRL's arms say how far is usual."""
    kinds = ("loss_difference", "relative_difference")

    def far(name: str, kind: str) -> float:
        value = comparisons[name][kind]
        return math.inf if value is None else value

    usual = {
        kind: max((far(name, kind) for name in comparisons if name.startswith("trl") and is_half(name)), default=None)
        for kind in kinds
    }
    for name, found in comparisons.items():
        if is_half(name):
            limits = [(far(name, kind), usual[kind]) for kind in kinds]
            found["same_work"] = (
                None
                if usual[kinds[0]] is None
                else all(value <= limit < math.inf for value, limit in limits if limit is not None)
            )


def fastest(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """TRL's fastest arm over isdaa's fastest, by their medians, in fp32, in bf16, and of any precision; ratios within rounds."""
    found = {}
    for kind, of_kind in {"fp32": (False,), "bf16": (True,), "any": (False, True)}.items():
        ours, theirs = (
            min(
                (name for name in seconds if name.startswith(tool) and is_half(name) in of_kind),
                key=lambda name: statistics.median(seconds[name]),
                default=None,
            )
            for tool in ("isdaa", "trl")
        )
        if ours is not None and theirs is not None:
            rounds = ratios(seconds[theirs], seconds[ours])
            found[kind] = {"isdaa": ours, "trl": theirs, "ratio": spread(rounds), "rounds": rounds}
    return found


def wrong(summary: Mapping[str, Any]) -> list[str]:
    """What forbids to trust a cell's ratios, a line each."""
    lines = [f"{summary['name']}: {arm} failed: {why}" for arm, why in summary["failed"].items()]
    if BASE in summary["left_out"]:
        lines.append(f"{summary['name']}: nothing to compare with: {summary['left_out'][BASE]}")
    for name, arm in summary["arms"].items():
        if arm.get("comparison", {"same_work": True})["same_work"] is False:
            lines.append(f"{summary['name']}: {name} does NOT do the same work as {BASE}")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def table(summary: Mapping[str, Any]) -> Table:
    """A cell for the terminal."""
    speed = summary["matmul_gflops_per_second"]
    shown = Table(
        title=f"{summary['name']}: {summary['parameters'] / 1e6:.0f}M parameters, matrix products at {_number(speed['median'])} "
        f"({_number(speed['least'])} … {_number(speed['largest'])}) GFLOP/s"
    )
    for column in ("arm", "s / step", "pairs/s", "time / isdaa dpo", "peak MiB", "above start", "/ isdaa dpo", "matmul share"):
        shown.add_column(column, justify="left" if column == "arm" else "right")
    shown.add_column("|Δ loss|", justify="right")
    shown.add_column("|Δ weight| / update", justify="right")
    for name, arm in summary["arms"].items():
        above, ratio = arm["above_start"], arm.get("memory_ratio")
        shown.add_row(
            LABELS[name],
            _range(arm["step"]),
            _number(arm["pairs_per_second"]),
            _range(arm.get("time_ratio")),
            f"{arm['peak']:.0f}",
            "–" if above is None else f"{above:.0f}",
            "–" if ratio is None else _number(ratio),
            _range(arm["matmul_share"], percent=True),
            *_differences(name, arm.get("comparison")),
        )
    for name, why in {**summary["left_out"], **summary["failed"]}.items():
        shown.add_row(LABELS[name], why.split(":")[0], *["–"] * 8)
    return shown


def below(summary: Mapping[str, Any]) -> list[str]:
    """What no row of the table shows."""
    lines = []
    if summary["elsewhere"] is not None:
        busy = _range(summary["elsewhere"], percent=True)
        lines.append(f"other programs had {busy} of the cores during the steps")
    if summary["cost_of_weighting"] is not None:
        lines.append(f"importance weighting: is_dpo / dpo {_range(summary['cost_of_weighting'], digits=3)}")
    if summary["cost_of_trainer"] is not None:
        lines.append(f"Trainer, logging and collation: dpo / bare loop {_range(summary['cost_of_trainer'], digits=3)}")
    for kind, found in summary["fastest"].items():
        lines.append(f"{kind}: {LABELS[found['trl']]} over {LABELS[found['isdaa']]} {_range(found['ratio'])}")
    return lines + [f"{LABELS[name]}: {why}" for name, why in {**summary["left_out"], **summary["failed"]}.items()]


def _differences(name: str, found: Mapping[str, Any] | None) -> tuple[str, str]:
    if found is None:
        return ("–", "other objective" if name in OTHER_WORK else "–")
    loss, weight = found["loss_difference"], found["weight_difference"]
    text = "∞" if weight is None else f"{weight:.1e} / {found['largest_update']:.1e}"
    said = {True: text, False: f"{text}  NOT the same work", None: f"{text}, no TRL in bf16 to compare"}
    return "∞" if loss is None else f"{loss:.1e}", said[found["same_work"]]


def _range(found: Mapping[str, float] | None, percent: bool = False, digits: int = 2) -> str:
    if found is None:
        return "–"
    if percent:
        middle, low, high = (f"{100 * found[name]:.0f}" for name in ("median", "least", "largest"))
        return f"{middle} % ({low} … {high})"
    middle, low, high = (_number(found[name], digits) for name in ("median", "least", "largest"))
    return f"{middle} ({low} … {high})"


def _number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.0f}"
