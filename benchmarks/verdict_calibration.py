"""How often are the verdict on a run, and the guard that may stop one, wrong? Measured on simulated runs of known truth.

    python benchmarks/verdict_calibration.py --out docs/results/verdict-calibration

writes `<out>.json` (every rate) and `<out>.md` (the same as tables). Fixed seeds; one thread; six to ten minutes.
`--seen docs/report.md` puts what can be seen, with so many checkpoints, looks and prompts, into that page.

A simulated run: a curve of true win rates over checkpoints; the bounce, a Gaussian that moves a checkpoint on all prompts
together; per prompt a score of the policy that changes slowly over checkpoints, against the same four opponents throughout.
Legend: R runs, C checkpoints (or L looks), N prompts.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtri

from isdaa.evaluation.verdict.fall_statistics import MARGIN, NEGLIGIBLE
from isdaa.evaluation.verdict.overoptimization import law_of, verdict_of
from isdaa.evaluation.verdict.power import LOOKS, looks_needed, smallest_fall
from isdaa.evaluation.verdict.sequential import ALPHA, PATIENCE, RECENT, FallTest, stops_at

START = 0.5  # the reference against itself
OPPONENTS = 4
PERSISTENCE, OWN = 0.8, 0.35  # of a prompt's score from checkpoint to checkpoint; standard deviation of its own sample's luck
BOUNCES = (0.0, 0.01, 0.02, 0.03, 0.05)
CHECKPOINTS, PROMPTS = (3, 4, 5, 6, 8, 12, 20), (16, 64, 512)
FALLS = [f"fall {size} {when}" for size in ("0.05", "0.1", "0.2", "0.3") for when in ("early", "gradual")]
SHARP = ["fall 0.1 at once", "fall 0.2 at once", "fall 0.2 halfway"]
# Falls as people have them: few checkpoints, late falls, falls that last.
CURVES = (
    "0.63, 0.80, 0.66, 0.53", "0.63, 0.75, 0.65, 0.55", "0.63, 0.75, 0.60, 0.45", "0.75, 0.65, 0.55",
    "0.63, 0.75, 0.683, 0.617, 0.55", "0.65, 0.75, 0.725, 0.7, 0.675, 0.65", "0.65, 0.75, 0.7, 0.65, 0.6, 0.55",
    "0.60, 0.68, 0.72, 0.75, 0.75, 0.55", "0.75, 0.55, 0.55, 0.55, 0.55, 0.55", "0.60, 0.70, 0.75, 0.71, 0.67, 0.63, 0.59, 0.55",
)  # fmt: skip
# The last is truly 0.03 or 0.05 down: at the margins themselves.
MARGINAL = (
    "0.65, 0.75, 0.75, 0.72",
    "0.65, 0.75, 0.75, 0.70",
    "0.6, 0.7, 0.75, 0.75, 0.75, 0.72",
    "0.6, 0.7, 0.75, 0.75, 0.75, 0.70",
)
FINDINGS = ("over-optimised", "worse", "not detected", "underpowered")
ADVISED = 40  # of a row's runs whose advice is followed
LAW = (0.25, 0.2)


def curve(shape: str, count: int) -> np.ndarray:
    """(C,) true win rates; a list of numbers is itself.

    A fall's peak lies at 15 % of the run (early) or at 45 % (gradual), of height 0.75.
    Two falls are steps from 0.75 that last: after the first checkpoint (at once), after the first half of the run (halfway).
    """
    time = np.linspace(0, 1, count)
    since = time + 1 / count  # the first checkpoint is some way from the reference
    if shape[0].isdigit():
        return np.array([float(value) for value in shape.split(", ")])
    if shape == "law":
        d = np.linspace(0.5, 4, count)
        return START + d * (LAW[0] - LAW[1] * np.log(d))
    if shape == "flat":
        return np.full(count, 0.75)
    if shape == "rising":
        return START + 0.27 * (1 - np.exp(-4 * since))
    if shape == "slow":
        return START + 0.25 * time
    _, size, when = shape.split(maxsplit=2)
    if when in ("at once", "halfway"):
        return 0.75 - float(size) * (np.arange(count) >= (1 if when == "at once" else count // 2))
    peak = {"early": 0.15, "gradual": 0.45}[when]
    up = np.sin(np.pi / 2 * np.clip(since / (peak + 1 / count), 0, 1))
    down = np.sin(np.pi / 2 * np.clip((time - peak) / (1 - peak), 0, 1))
    return START + 0.25 * up - float(size) * down


def simulate(
    shape: str, runs: int, count: int, prompts: int, bounce: float, memory: float = 0.0, opponents: int = OPPONENTS
) -> tuple[np.ndarray, np.ndarray]:
    """(R, C, N) win rates, and the (R, C) true ones of these very models, bounce included. memory: correlation of the bounce from
    checkpoint to checkpoint, which no estimate here knows of."""
    rng = np.random.default_rng(zlib.crc32(repr((shape, runs, count, prompts, bounce, memory, opponents)).encode()))
    noise = rng.standard_normal((runs, count))
    for c in range(1, count):
        noise[:, c] = memory * noise[:, c - 1] + np.sqrt(1 - memory**2) * noise[:, c]
    truths = np.clip(curve(shape, count) + bounce * noise, 0.02, 0.98)
    return judged(truths, prompts, opponents, rng), truths


def judged(truths: np.ndarray, prompts: int, opponents: int, rng: np.random.Generator) -> np.ndarray:
    """(R, C, N) win rates of models whose true ones are (R, C)."""
    runs, count = truths.shape
    strength = np.sqrt(2) * ndtri(truths)
    rivals = rng.standard_normal((runs, prompts, opponents), dtype=np.float32)
    lasting = rng.standard_normal((runs, prompts), dtype=np.float32)
    wins = np.empty((runs, count, prompts), dtype=np.float32)
    for c in range(count):
        if c:
            fresh = rng.standard_normal((runs, prompts), dtype=np.float32)
            lasting = PERSISTENCE * lasting + np.sqrt(1 - PERSISTENCE**2) * fresh
        luck = rng.standard_normal((runs, prompts), dtype=np.float32)
        score = strength[:, c, None] + np.sqrt(1 - OWN**2) * lasting + OWN * luck
        wins[:, c] = (score[..., None] > rivals).mean(axis=-1)
    return wins


def naive(wins: np.ndarray) -> bool:
    """The test that this replaces: the highest checkpoint against the last, paired over prompts, one-sided 95 %."""
    gap = wins[wins.mean(axis=1).argmax()] - wins[-1]
    error = gap.std(ddof=1) / np.sqrt(len(gap))
    return bool(error > 0 and gap.mean() > 1.645 * error)


def verdicts(
    shape: str, runs: int, count: int, prompts: int, bounce: float, memory: float = 0.0, opponents: int = OPPONENTS
) -> dict[str, Any]:
    """Rates of each finding and of the naive test's alarm; how often the lower bound lies above the true fall from the peak that
    was named, and the upper bound above the largest true fall; and what came of advice that was followed, on the same models."""
    wins, truths = simulate(shape, runs, count, prompts, bounce, memory, opponents)
    kl = np.arange(1.0, count + 1)
    found, wrong, bounded, decided = [], 0, 0, []
    rng = np.random.default_rng(runs)
    for run, truth in zip(wins, truths, strict=True):
        verdict = verdict_of(run, kl, START)
        assert verdict is not None
        found.append(verdict)
        falls = np.append(truth[:-1], START) - truth[-1]
        wrong += verdict.lower > MARGIN and verdict.lower > (falls[-1] if verdict.below_start else falls[verdict.peak])
        bounded += verdict.upper >= falls.max()
        if verdict.prompts_needed is not None and len(decided) < ADVISED and verdict.prompts_needed <= 4096:
            again = verdict_of(judged(truth[None], verdict.prompts_needed, opponents, rng)[0], kl, START)
            assert again is not None
            decided.append(again.finding != "underpowered")
    return {
        **_settings(shape, runs, prompts, bounce, memory),
        "checkpoints": count,
        "opponents": opponents,
        **{finding: float(np.mean([verdict.finding == finding for verdict in found])) for finding in FINDINGS},
        "naive": float(np.mean([naive(run) for run in wins])),
        "wrong": wrong / runs,
        "bounded": bounded / runs,
        "advised": len(decided),
        "decided": float(np.mean(decided)) if decided else None,
        "kept_reference": float(np.mean([verdict.keeps_reference for verdict in found])),
    }


def laws(shape: str, runs: int, count: int, prompts: int, bounce: float) -> dict[str, Any]:
    """How often a law's peak is named, and of runs on a law how often its interval holds the true one."""
    wins, _ = simulate(shape, runs, count, prompts, bounce)
    d = np.linspace(0.5, 4, count)
    kl = np.repeat(d[:, None] ** 2, prompts, axis=1)
    fits = [law_of([(run, kl, START)], resamples=300, seed=seed) for seed, run in enumerate(wins)]
    named = [law for law in fits if law is not None and law.peak is not None]
    row = {**_settings(shape, runs, prompts, bounce, 0.0), "checkpoints": count, "named": len(named) / runs, "covered": None}
    if shape == "law" and named:
        peak = np.exp(LAW[0] / LAW[1] - 1)
        row["covered"] = float(np.mean([law.peak_low <= peak <= law.peak_high for law in named]))
    return row


def _settings(shape: str, runs: int, prompts: int, bounce: float, memory: float) -> dict[str, Any]:
    return {"shape": shape, "runs": runs, "prompts": prompts, "bounce": bounce, "memory": memory}


def stops(wins: np.ndarray) -> np.ndarray:
    """(R,) the look at which `FallTest` stops each run of (R, L, N) win rates, L where never."""
    prompts = wins.shape[2]
    means = wins.mean(axis=2, dtype=np.float64)
    centred = wins - means[..., None].astype(np.float32)
    covariance = (centred @ centred.transpose(0, 2, 1)).astype(np.float64) / (prompts - 1) / prompts
    return stops_at(means, covariance, prompts)


def stop_of(wins: np.ndarray) -> int:
    """The look at which the class itself stops one run (L, N)."""
    test = FallTest()
    return next((look for look, row in enumerate(wins) if test.update(row, float(look)).stop), len(wins))


def guards(shape: str, runs: int, looks: int, prompts: int, bounce: float, memory: float = 0.0) -> dict[str, Any]:
    """How often the guard ever stops a run, how many looks after the true peak, and how far the curve has fallen by then."""
    wins, _ = simulate(shape, runs, looks, prompts, bounce, memory)
    stop = stops(wins)
    assert [stop_of(run) for run in wins[:3]] == stop[:3].tolist(), "the class and its vectorised copy disagree"
    stopped, truth = stop[stop < looks], curve(shape, looks)
    row = {**_settings(shape, runs, prompts, bounce, memory), "looks": looks, "stopped": len(stopped) / runs}
    if shape.startswith("fall"):
        # A run stopped before the peak is at most a look early; it counts as no delay.
        delay = np.maximum(stopped - truth.argmax(), 0)
        row |= {
            "delay": float(np.median(delay)) if len(stopped) else None,
            "fallen": float(np.mean(truth.max() - truth[stopped])) if len(stopped) else None,
        }
    return row


def measure(scale: float) -> dict[str, list[dict[str, Any]]]:
    """All tables. scale multiplies the number of runs."""
    some, few = max(int(400 * scale), 4), max(int(200 * scale), 4)
    # The more a healthy run bounces, the nearer its false alarms come to 5 %: flat runs are looked at most closely.
    healthy = [verdicts("flat", some, c, n, b) for c in CHECKPOINTS for n in PROMPTS for b in (0.0, 0.02, 0.05)]
    healthy += [verdicts("flat", some, c, 128, 0.05, opponents=1) for c in CHECKPOINTS]
    mild = (0.0, 0.02, 0.05)
    healthy += [
        verdicts(shape, few, c, n, b) for shape in ("rising", "slow") for c in (4, 6, 12) for n in (128, 512) for b in mild
    ]
    low = [verdicts("0.52, 0.52, 0.52, 0.52", some, 4, n, 0.0) for n in (64, 256)]
    usual = [verdicts(shape, some, len(shape.split(",")), n, 0.02) for shape in CURVES for n in (64, 256)]
    marginal = [verdicts(shape, some, len(shape.split(",")), n, b) for shape in MARGINAL for n in (128, 512) for b in (0.0, 0.02)]
    falls = [verdicts(shape, few, c, n, b) for shape in FALLS[2:] + SHARP for c, n in ((6, 256), (8, 384)) for b in mild]
    wander = [verdicts("flat", some, 8, 384, b, memory) for memory in (0.5, 0.8) for b in (0.02, 0.05)]
    least = []
    for c, n in ((3, 128), (6, 256), (12, 512)):
        fall = smallest_fall(c, n)
        shape = ", ".join(["0.6"] * (c - 2) + ["0.75", f"{0.75 - fall:.2f}"])
        least.append({"fall": fall} | verdicts(shape, some, c, n, 0.0))
    # What the demo and the quick start evaluate.
    usage = [(6, 256), (8, 384)]
    shipped = [verdicts(shape, some, c, n, b) for shape in ("flat", "rising") for c, n in usage for b in (0.0, 0.02)]
    fitted = [laws(shape, few, c, 256, b) for shape in ("law", "flat", "rising") for c in (6, 12) for b in (0.0, 0.03)]
    watched = [(8, 128), (20, 64), (20, 128), (20, 256)]
    guard_healthy = [
        guards(shape, some, looks, n, b) for shape in ("flat", "rising", "slow") for looks, n in watched for b in BOUNCES
    ] + [guards(shape, some, 50, 128, b) for shape in ("flat", "slow") for b in (0.0, 0.02, 0.05)]
    steps = ["fall 0.2 halfway", "fall 0.3 halfway"]
    guard_falls = [
        guards(shape, few, looks, n, b) for shape in FALLS[2:] + steps for looks, n in watched for b in (0.0, 0.02, 0.05)
    ]
    guard_wander = [guards("flat", some, 20, n, b, memory) for memory in (0.5, 0.8) for n in (64, 256) for b in (0.02, 0.05)]
    return {
        "healthy": healthy,
        "usual": usual,
        "marginal": marginal,
        "falls": falls,
        "reference": low,
        "least": least,
        "shipped": shipped,
        "wandering": wander,
        "laws": fitted,
        "guard_healthy": guard_healthy,
        "guard_falls": guard_falls,
        "guard_wandering": guard_wander,
    }


def table(rows: list[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    """A Markdown table."""
    lines = [list(columns), ["---"] * len(columns), *[[cell(row) for cell in columns.values()] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rate(name: str) -> Callable[[dict[str, Any]], str]:
    """A percentage ± its Monte-Carlo standard error; where none or all were seen, the rule of three's bound."""

    def cell(row: dict[str, Any]) -> str:
        share, runs = row[name], row["runs"]
        if share in (0.0, 1.0):
            return f"{100 * share:.0f} ({'<' if share == 0 else '>'} {100 * abs(share - 3 / runs):.1f})"
        return f"{100 * share:.1f} ± {100 * np.sqrt(share * (1 - share) / runs):.1f}"

    return cell


def plain(name: str, form: str = "{}") -> Callable[[dict[str, Any]], str]:
    """A value as it is; a dash where there is none."""
    return lambda row: form.format(row[name]) if row[name] is not None else "–"


def page(found: dict[str, list[dict[str, Any]]], scale: float, out: Path) -> str:
    """The Markdown of all tables."""
    run = {"true curve": plain("shape"), "C": plain("checkpoints"), "N": plain("prompts"), "noise": plain("bounce")}
    watch = {"shape": plain("shape"), "measurements": plain("looks"), "N": plain("prompts"), "noise": plain("bounce")}
    memory, rivals = {"memory": plain("memory")}, {"opponents": plain("opponents")}
    findings = {finding: rate(finding) for finding in FINDINGS}
    bounds = {"lower bound wrong": rate("wrong"), "upper bound holds": rate("bounded")}
    advice = {
        "advised": plain("advised"),
        "decided then, %": lambda row: "–" if row["decided"] is None else f"{100 * row['decided']:.0f}",
    }
    named = {
        "peak named": rate("named"),
        "interval holds it, %": lambda row: "–" if row["covered"] is None else f"{100 * row['covered']:.0f}",
    }
    stopped = {"stopped, ever": rate("stopped")}
    late = {"measurements after the peak": plain("delay", "{:.0f}"), "true fall by then": plain("fallen", "{:.2f}")}
    flat = [row for row in found["healthy"] if row["shape"] == "flat"]
    alarm, naively = max(flat, key=lambda row: row["over-optimised"]), max(flat, key=lambda row: row["naive"])
    everything = [row for name in ("healthy", "usual", "marginal", "falls") for row in found[name]]
    wrong, loose = max(everything, key=lambda row: row["wrong"]), min(everything, key=lambda row: row["bounded"])
    told = [row for row in everything if row["advised"] >= 20]
    poor = min(told, key=lambda row: row["decided"]) if told else None
    missed = max((row for row in found["marginal"] if row["shape"].endswith("0.70")), key=lambda row: row["not detected"])
    stop = max(found["guard_healthy"], key=lambda row: row["stopped"])

    def where(row: dict[str, Any]) -> str:
        size = f"C = {row['checkpoints']}" if "checkpoints" in row else f"{row['looks']} measurements"
        return f"{row['shape']}, {size}, N = {row['prompts']}, noise {row['bounce']}"

    heeded = f"{100 * poor['decided']:.0f} % at worst ({where(poor)}; rows with 20 or more)" if poor else "no row"
    more = "" if scale == 1 else f" --scale {scale:g}"

    return f"""# Calibration of the verdict and of the guard

Written by `python benchmarks/verdict_calibration.py --out {out.as_posix()}{more}`.
How often verdict and guard are right and wrong, on simulated runs: {flat[0]["runs"]} per row, {found["falls"][0]["runs"]} for
rising and falling shapes. C: checkpoints, N: prompts.
Each row's runs are seeded by a checksum of the row's settings; results depend on the machine only by rounding.
Rates are in per cent, ± their Monte-Carlo standard error; "0 (< x)" gives the 95 % bound if nothing was seen.

What is simulated: {OPPONENTS} opponents per prompt, the same at all checkpoints. Neighbouring checkpoints correlate over
prompts by about 0.6, as in measured runs. Step-to-step *noise* moves a checkpoint on all prompts together.

| shape | true curve |
| --- | --- |
| flat | 0.75 throughout |
| rising | from the reference's ½, saturating at 0.77 |
| slow | ½ to 0.75 in a straight line |
| a fall, early or gradual | from 0.75, at 15 % of the run or from 45 % on, ends lower by its size |
| a fall, at once or halfway | a step that lasts, after the first checkpoint or halfway |
| numbers | the curve itself |

- A flat run called over-optimised: at worst {100 * alarm["over-optimised"]:.1f} % ({where(alarm)}).
- The naive test (highest checkpoint against the last, paired over prompts, 95 %): at worst {100 * naively["naive"]:.0f} %
  ({where(naively)}).
- "Worse by at least x" about models that are not: at worst {100 * wrong["wrong"]:.1f} % ({where(wrong)}).
- "Nothing lies more than x above the last" holds in {100 * loose["bounded"]:.1f} % at worst ({where(loose)}).
- A last checkpoint that is 0.05 down before its noise, the edge of what counts as none, is called "not detected" in at
  worst {100 * missed["not detected"]:.1f} % ({where(missed)}).
- Advice that is followed, on the same models, decides in {heeded}.
- A healthy run ever stopped by the guard: at worst {100 * stop["stopped"]:.1f} % ({where(stop)}).
- With noise, "worse" on flat runs is no false alarm: the last checkpoint is then truly below an earlier one, and the
  sentence says that this may be ordinary variation.
- Beyond the assumptions: noise with a memory (a slow wander of the whole run) looks like a trend to every estimate from
  neighbours. Its rates are below; they exceed 5 % if the wander is as large as 0.05.

## Usual falls

{table(found["usual"], run | findings | bounds | advice)}

## At the margins

The last checkpoint is truly 0.03 or 0.05 below the peak, before its noise.

{table(found["marginal"], run | findings | bounds | advice)}

## Healthy runs

{table(found["healthy"], run | rivals | findings | bounds | {"naive alarm": rate("naive")} | advice)}

## Other falls

{table(found["falls"], run | findings | bounds)}

## Falls that are said to be seen

The smallest fall that `isdaa inspect` says will be seen in 80 % of runs (as over-optimised or worse).

{table(found["least"], {"fall": plain("fall")} | run | findings)}

## Healthy runs with the shipped configurations

configs/mini/demo.yaml evaluates 6 checkpoints on 256 prompts, config.yaml 8 on 384.

{table(found["shipped"], run | findings | bounds | advice)}

## A reference that is just beaten

{table(found["reference"], run | {"keep the reference": rate("kept_reference")})}

## The law

{table(found["laws"], run | named)}

## Verdict if the noise has a memory (flat runs)

memory: correlation of the noise between neighbouring checkpoints.

{table(found["wandering"], run | memory | findings | {"naive alarm": rate("naive")})}

## Guard on healthy runs

{PATIENCE} warnings in a row stop a run; "now" is the mean of {RECENT} measurements; the measurements share {100 * ALPHA:.0f} %.

{table(found["guard_healthy"], watch | stopped)}

## Guard on runs that fall

Medians and means are over the runs that were stopped.

{table(found["guard_falls"], watch | stopped | late)}

## Guard if the noise has a memory (flat runs)

{table(found["guard_wandering"], watch | memory | stopped)}
"""


def seen_tables() -> str:
    """What can be seen, for docs/report.md."""
    prompts = (32, 64, 128, 256, 512, 1024)
    rows = [[str(c), *(f"{smallest_fall(c, n):.2f}" for n in prompts)] for c in (3, 4, 6, 8, 12, 20)]
    looks: list[list[str]] = []
    for n in (64, 128, 256):
        needed = looks_needed(n)
        looks.append([str(n), *(str(least) if least else f"> {LOOKS[-1]}" for least in needed.values())])
    head = ["checkpoints \\ prompts", *map(str, prompts)]
    second = ["the guard: prompts \\ fall half-way", *(f"{fall:.2f}" for fall in looks_needed(64))]
    return "\n\n".join(
        "\n".join("| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *body])
        for names, body in ((head, rows), (second, looks))
    )


def fill(path: Path) -> None:
    """Puts the tables of what can be seen between the two marks of a page."""
    before, rest = path.read_text(encoding="utf-8").split("<!-- table: seen -->")
    after = rest.split("<!-- end -->", 1)[1]
    path.write_text(f"{before}<!-- table: seen -->\n{seen_tables()}\n<!-- end -->{after}", encoding="utf-8")


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="path without suffix; .json and .md are written")
    parser.add_argument("--seen", type=Path, metavar="PAGE", help="only put the tables of what can be seen into this page")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of runs of each row")
    arguments = parser.parse_args()
    if arguments.seen is not None:
        fill(arguments.seen)
        return
    if arguments.out is None:
        parser.error("give --out or --seen")
    found = measure(arguments.scale)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"scale": arguments.scale, "alpha": ALPHA, "margin": MARGIN, "negligible": NEGLIGIBLE, "patience": PATIENCE}
    content = {"settings": settings, **found}
    arguments.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    arguments.out.with_suffix(".md").write_text(page(found, arguments.scale, arguments.out), encoding="utf-8")


if __name__ == "__main__":
    main()
