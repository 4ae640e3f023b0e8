"""How often are the verdict on a run, and the guard that may stop one, wrong? Measured on simulated runs of known truth.

    python benchmarks/verdict_calibration.py --out docs/results/verdict-calibration

writes `<out>.json` (every rate) and `<out>.md` (the same as tables). Fixed seeds; one thread; about two minutes.

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

from isdaa.evaluation.overoptimization import MARGIN, NEGLIGIBLE, verdict_of
from isdaa.evaluation.sequential import ALPHA, FIRST, RECENT, FallTest, evidence

START = 0.5  # the reference against itself
OPPONENTS = 4
PERSISTENCE, OWN = 0.8, 0.35  # of a prompt's score from checkpoint to checkpoint; standard deviation of its own sample's luck
BOUNCES = (0.0, 0.01, 0.02, 0.03, 0.05)
CHECKPOINTS, PROMPTS = (3, 4, 6, 8, 12), (128, 512)
FALLS = [f"fall {size} {when}" for size in ("0.05", "0.1", "0.2", "0.3") for when in ("early", "gradual")]
SHARP = ["fall 0.1 at once", "fall 0.2 at once", "fall 0.3 at once", "fall 0.2 halfway"]
FINDINGS = ("over-optimised", "not detected", "underpowered")
PATIENCE = 2


def curve(shape: str, count: int) -> np.ndarray:
    """(C,) true win rates. A fall's peak lies at 15 % of the run (early) or at 45 % (gradual), of height 0.75.

    Two falls are steps from 0.75 that last: after the first checkpoint (at once), after the first half of the run (halfway).
    """
    time = np.linspace(0, 1, count)
    since = time + 1 / count  # the first checkpoint is some way from the reference
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


def simulate(shape: str, runs: int, count: int, prompts: int, bounce: float, memory: float = 0.0) -> np.ndarray:
    """(R, C, N) win rates. memory: correlation of the bounce from checkpoint to checkpoint, which no estimate here knows of."""
    rng = np.random.default_rng(zlib.crc32(repr((shape, runs, count, prompts, bounce, memory)).encode()))
    noise = rng.standard_normal((runs, count))
    for c in range(1, count):
        noise[:, c] = memory * noise[:, c - 1] + np.sqrt(1 - memory**2) * noise[:, c]
    strength = np.sqrt(2) * ndtri(np.clip(curve(shape, count) + bounce * noise, 0.02, 0.98))
    opponents = rng.standard_normal((runs, prompts, OPPONENTS), dtype=np.float32)
    lasting = rng.standard_normal((runs, prompts), dtype=np.float32)
    wins = np.empty((runs, count, prompts), dtype=np.float32)
    for c in range(count):
        if c:
            fresh = rng.standard_normal((runs, prompts), dtype=np.float32)
            lasting = PERSISTENCE * lasting + np.sqrt(1 - PERSISTENCE**2) * fresh
        luck = rng.standard_normal((runs, prompts), dtype=np.float32)
        score = strength[:, c, None] + np.sqrt(1 - OWN**2) * lasting + OWN * luck
        wins[:, c] = (score[..., None] > opponents).mean(axis=-1)
    return wins


def naive(wins: np.ndarray) -> bool:
    """The test that this replaces: the highest checkpoint against the last, paired over prompts, one-sided 95 %."""
    gap = wins[wins.mean(axis=1).argmax()] - wins[-1]
    error = gap.std(ddof=1) / np.sqrt(len(gap))
    return bool(error > 0 and gap.mean() > 1.645 * error)


def verdicts(shape: str, runs: int, count: int, prompts: int, bounce: float, memory: float = 0.0) -> dict[str, Any]:
    """Rates of each finding, and of the naive test's alarm, with how the numbers behind them came out on average."""
    wins = simulate(shape, runs, count, prompts, bounce, memory)
    judged = (verdict_of(run, np.arange(1.0, count + 1), START) for run in wins)
    found = [verdict for verdict in judged if verdict is not None]
    return {
        **_settings(shape, runs, prompts, bounce, memory),
        "checkpoints": count,
        **{finding: float(np.mean([verdict.finding == finding for verdict in found])) for finding in FINDINGS},
        "naive": float(np.mean([naive(run) for run in wins])),
        "fall": float(np.mean([verdict.fall for verdict in found])),
        "estimated_bounce": float(np.sqrt(np.mean([verdict.bounce**2 for verdict in found]))),
    }


def _settings(shape: str, runs: int, prompts: int, bounce: float, memory: float) -> dict[str, Any]:
    return {"shape": shape, "runs": runs, "prompts": prompts, "bounce": bounce, "memory": memory}


def stops(wins: np.ndarray) -> np.ndarray:
    """(R,) the look at which `FallTest` stops each run, L where never: the same as the class, all runs at once."""
    runs, looks, prompts = wins.shape
    means = wins.mean(axis=2, dtype=np.float64)
    centred = wins - means[..., None].astype(np.float32)
    covariance = (centred @ centred.transpose(0, 2, 1)).astype(np.float64) / (prompts - 1) / prompts
    warnings, stop = np.zeros(runs, dtype=int), np.full(runs, looks)
    for seen in range(FIRST, looks + 1):
        found = evidence(means[:, :seen], covariance[:, :seen, :seen], prompts, ALPHA)
        # KL grows from look to look here, so the recent looks lie beyond any peak before them.
        warnings = np.where(found.lower > MARGIN, warnings + 1, 0)
        stop = np.where((warnings >= PATIENCE) & (stop == looks), seen - 1, stop)
    return stop


def stop_of(wins: np.ndarray) -> int:
    """The look at which the class itself stops one run (L, N)."""
    test = FallTest(patience=PATIENCE)
    return next((look for look, row in enumerate(wins) if test.update(row, float(look)).stop), len(wins))


def guards(shape: str, runs: int, looks: int, prompts: int, bounce: float, memory: float = 0.0) -> dict[str, Any]:
    """How often the guard ever stops a run, how many looks after the true peak, and how far the curve has fallen by then."""
    wins = simulate(shape, runs, looks, prompts, bounce, memory)
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
    healthy = [verdicts("flat", some, c, n, b) for c in CHECKPOINTS for n in PROMPTS for b in (0.0, 0.02, 0.03, 0.05)]
    healthy += [verdicts("flat", 2 * some, c, 256, 0.05) for c in CHECKPOINTS]
    mild = (0.0, 0.02, 0.05)
    healthy += [verdicts(shape, few, c, n, b) for shape in ("rising", "slow") for c in (6, 12) for n in PROMPTS for b in mild]
    three = [verdicts(shape, few, 3, 384, b) for shape in ("rising", "fall 0.2 early", "fall 0.2 at once") for b in mild]
    falls = [verdicts(shape, few, c, n, b) for shape in FALLS + SHARP for c, n in ((6, 256), (8, 384)) for b in mild]
    wander = [verdicts("flat", some, 8, 384, b, memory) for memory in (0.5, 0.8) for b in (0.02, 0.05)]
    watched = [(20, 64), (20, 128), (20, 256)]
    guard_healthy = [
        guards(shape, some, looks, n, b) for shape in ("flat", "rising", "slow") for looks, n in watched for b in BOUNCES
    ] + [guards(shape, some, 50, 128, b) for shape in ("flat", "slow") for b in (0.0, 0.02, 0.05)]
    guard_falls = [guards(shape, few, looks, n, b) for shape in FALLS[2:] for looks, n in watched for b in (0.0, 0.02, 0.05)]
    guard_wander = [guards("flat", some, 20, n, b, memory) for memory in (0.5, 0.8) for n in (64, 256) for b in (0.02, 0.05)]
    return {
        "healthy": healthy,
        "three_checkpoints": three,
        "falls": falls,
        "wandering": wander,
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
    run = {"shape": plain("shape"), "C": plain("checkpoints"), "N": plain("prompts"), "bounce": plain("bounce")}
    watch = {"shape": plain("shape"), "looks": plain("looks"), "N": plain("prompts"), "bounce": plain("bounce")}
    memory = {"memory": plain("memory")}
    findings = {finding: rate(finding) for finding in FINDINGS}
    rates = {**run, **findings, "naive alarm": rate("naive")}
    numbers = {"mean fall": plain("fall", "{:.3f}"), "estimated bounce": plain("estimated_bounce", "{:.3f}")}
    stopped = {"stopped, ever": rate("stopped")}
    late = {"looks after the peak": plain("delay", "{:.0f}"), "true fall by then": plain("fallen", "{:.2f}")}
    worst = max(found["healthy"], key=lambda row: row["over-optimised"])
    naively = max(found["healthy"], key=lambda row: row["naive"])
    flat = [row["naive"] for row in found["healthy"] if row["shape"] == "flat" and row["bounce"] == 0.02]
    widest = [row["over-optimised"] for row in found["healthy"] if row["shape"] == "flat" and row["bounce"] == 0.05]
    alarm = max(found["guard_healthy"], key=lambda row: row["stopped"])
    missed = max((row for row in found["falls"] if row["shape"].startswith("fall 0.05")), key=lambda row: row["not detected"])

    more = "" if scale == 1 else f" --scale {scale:g}"

    def where(row: dict[str, Any]) -> str:
        size = f"C = {row['checkpoints']}" if "checkpoints" in row else f"{row['looks']} looks"
        return f"{row['shape']}, {size}, N = {row['prompts']}, bounce {row['bounce']}"

    def shortened(count: int) -> str:
        falls = [r["fall"] for r in found["falls"] if r["shape"] == "fall 0.2 gradual" and r["checkpoints"] == count]
        return f"{np.mean(falls):.2f}"

    return f"""# Calibration of the verdict and of the guard

Written by `python benchmarks/verdict_calibration.py --out {out.as_posix()}{more}`.
Each row's runs are seeded by a checksum of the row's own settings; results do not depend on the machine beyond rounding. Rates
are in per cent, ± their Monte-Carlo standard error; "0 (< x)" gives the 95 % bound where nothing was seen.
{found["healthy"][0]["runs"]} runs a row on flat shapes (twice as many at N = 256), {found["falls"][0]["runs"]} on the others.

What is simulated: {OPPONENTS} opponents a prompt, the same at all checkpoints; neighbouring checkpoints correlate over prompts by
about 0.6, as in measured runs; the *bounce* moves a checkpoint on all prompts together. flat: 0.75 throughout. rising: from the
reference's ½, saturating at 0.77. slow: ½ to 0.75 in a straight line. A fall starts from 0.75, *early* (at 15 % of the run) or
*gradual* (from 45 % on), and ends lower by its size. Other falls are steps that last: *at once* (after the first checkpoint), or
*halfway*.

- A healthy run called over-optimised: at worst {100 * worst["over-optimised"]:.1f} % ({where(worst)});
  flat runs that bounce by 0.05: {100 * np.mean(widest):.1f} % on average.
- The naive test (highest checkpoint against the last, paired over prompts, 95 %): at worst {100 * naively["naive"]:.0f} %
  ({where(naively)}); at bounce 0.02 {100 * min(flat):.0f} to {100 * max(flat):.0f} % of flat runs.
- A healthy run ever stopped by the guard: at worst {100 * alarm["stopped"]:.1f} % ({where(alarm)}).
- A true fall of 0.05, the edge of what counts as none, called "not detected": at worst {100 * missed["not detected"]:.1f} %
  ({where(missed)}). Smoothing shortens a gradual fall, more so with few checkpoints: a true one
  of 0.2 measures {shortened(6)} with 6 checkpoints and {shortened(8)} with 8, on average. A step keeps its size.
- A flat run is mostly "underpowered" where the bounce is 0.02 or more, and more prompts do not help against it.
- Beyond the assumptions: a bounce with a memory (a slow wander of the whole run) looks like a trend to every estimate from
  neighbours. Below are the rates, above 5 % where the wander is as large as 0.05.

## Verdict on healthy runs

{table(found["healthy"], rates | numbers)}

## Verdict on runs that fall

"over-optimised" is the power here. A fall of 0.05 is larger than {MARGIN} and as large as {NEGLIGIBLE}, so neither finding can be
had of it often: "underpowered" is the right answer, and "not detected" should be rare. What limits the power on a fall at once is
how well few checkpoints tell the bounce: with 6 of them it is found mostly where it is six times the bounce.

{table(found["falls"], rates | numbers)}

## Verdict from three checkpoints

{table(found["three_checkpoints"], rates | numbers)}

## Verdict where the bounce has a memory (flat runs)

memory: correlation of the bounce between neighbouring checkpoints.

{table(found["wandering"], run | memory | findings | {"naive alarm": rate("naive")})}

## Guard on healthy runs

{PATIENCE} warnings in a row stop a run; "now" is the mean of {RECENT} looks; the looks share {100 * ALPHA:.0f} %.

{table(found["guard_healthy"], watch | stopped)}

## Guard on runs that fall

Medians and means are over the runs that were stopped.

{table(found["guard_falls"], watch | stopped | late)}

## Guard where the bounce has a memory (flat runs)

{table(found["guard_wandering"], watch | memory | stopped)}
"""


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="path without suffix; .json and .md are written")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of runs of each row")
    arguments = parser.parse_args()
    found = measure(arguments.scale)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"scale": arguments.scale, "alpha": ALPHA, "margin": MARGIN, "negligible": NEGLIGIBLE, "patience": PATIENCE}
    content = {"settings": settings, **found}
    arguments.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    arguments.out.with_suffix(".md").write_text(page(found, arguments.scale, arguments.out), encoding="utf-8")


if __name__ == "__main__":
    main()
