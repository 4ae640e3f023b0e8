"""The importance weight on problems small enough to enumerate: an exact identity, and what the clip costs and buys.

A problem has 2 prompts with 6 responses each. A policy π with one logit a response, a behaviour policy μ, a reference and a
Bradley–Terry judge are drawn at random. Every pair of responses, in both orders, is a row of the project's own `Objective`;
the mean and the covariance of the gradient of one random pair are sums over the rows.

Shapes: N problems, P prompts, K responses a prompt, M = P·K² rows of a problem, D = P·K logits.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gaussians import checked, command, counts, dressed, kept

if TYPE_CHECKING:
    import altair as alt
    from rich.table import Table
    from torch import Tensor

PROBLEMS, PROMPTS, RESPONSES = 100, 2, 6
BEHAVIOUR_SHIFT, POLICY_SHIFT = 0.3, 2.0  # standard deviation of the logits of μ around the reference's, of π around those of μ
BETA = 0.5
BATCH, BATCHES = 128, 1000  # pairs a batch, as the paper's runs; batches drawn for the self-normalised weight
SMALL_BATCH, LARGE_BATCH = 32, 1024
PRESETS = ("dpo", "ipo", "slic")
EPSILONS: tuple[float | None, ...] = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, None)
CLIPS: Mapping[str, str] = {"joint": "joint clip", "per_response": "per-response clip"}
QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True, eq=False)
class Problem:
    """N problems: log-probabilities of π, μ and the reference, and the judge's utilities, each (N, P, K)."""

    policy: Tensor
    behaviour: Tensor
    reference: Tensor
    utilities: Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """Every pair of every problem: its probability, π's gradient of its (weighted) loss, and its weight.

    probabilities (N, M), gradients (N, M, D), weights (N, M).
    """

    probabilities: Tensor
    gradients: Tensor
    weights: Tensor


def run_finite(output_dir: Path, seed: int = 0) -> Path:
    """Enumerate, draw, print and write `finite.json`, `.png` and `.svg` into `output_dir`; returns the PNG's path.

    Deterministic in `seed`. Raises UserError for a negative seed or a folder that cannot be written.
    """
    output_dir = checked(output_dir, seed)
    results = summary(problems(PROBLEMS, seed), seed)
    tables = [identity_table(results), clip_table(results)]
    return kept(output_dir / "finite", results, draw(results), tables, sentences(results))


def problems(count: int, seed: int, shift: float = POLICY_SHIFT) -> Problem:
    """Random problems in float64, from a generator of their own."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(4, count, PROMPTS, RESPONSES, generator=generator, dtype=torch.float64)
    reference = draws[0].log_softmax(-1)
    behaviour = (reference + BEHAVIOUR_SHIFT * draws[1]).log_softmax(-1)
    return Problem((behaviour + shift * draws[2]).log_softmax(-1), behaviour, reference, draws[3])


def enumerate_pairs(problem: Problem, sampler: Tensor, **settings: Any) -> Rows:
    """Both responses drawn from `sampler` (N, P, K) by themselves, the label by the judge; `settings` are the Objective's.

    A row is (x, y_w, y_l), with the probability 1/P · 2·q(y_w)·q(y_l)·σ(u(y_w) − u(y_l)), where 2 counts both orders of the
    draw (a pair of equals occurs in one order, and its label is a coin). They sum to 1.
    """
    import torch

    from isdaa.objectives import Objective, PairLogps

    count = len(problem.policy)
    prompt, chosen, rejected = torch.cartesian_prod(torch.arange(PROMPTS), torch.arange(RESPONSES), torch.arange(RESPONSES)).T

    def flat(logps: Tensor, response: Tensor) -> Tensor:
        return logps[:, prompt, response].reshape(-1)

    policy = [flat(problem.policy, response).requires_grad_() for response in (chosen, rejected)]
    lengths = torch.ones(count * len(prompt), dtype=torch.long)
    pairs = PairLogps(
        policy_chosen_logps=policy[0],
        policy_rejected_logps=policy[1],
        reference_chosen_logps=flat(problem.reference, chosen),
        reference_rejected_logps=flat(problem.reference, rejected),
        chosen_lengths=lengths,
        rejected_lengths=lengths,
        behaviour_chosen_logps=flat(problem.behaviour, chosen),
        behaviour_rejected_logps=flat(problem.behaviour, rejected),
    )
    output = Objective(**settings)(pairs)
    slopes = torch.autograd.grad(output.losses.sum(), policy)
    jacobian = softmax_jacobian(problem.policy)
    by_chosen, by_rejected = (
        slope.reshape(count, -1, 1) * jacobian[:, prompt, response]
        for slope, response in zip(slopes, (chosen, rejected), strict=True)
    )
    judged = torch.sigmoid(problem.utilities[:, prompt, chosen] - problem.utilities[:, prompt, rejected])
    probabilities = (sampler[:, prompt, chosen] + sampler[:, prompt, rejected]).exp() * judged * 2 / PROMPTS
    return Rows(probabilities, by_chosen + by_rejected, output.weights.reshape(count, -1))


def softmax_jacobian(logps: Tensor) -> Tensor:
    """∂ log π(y|x)/∂θ, (N, P, K, D), of a softmax with its own logit for each response: 1[same] − π(·|x)."""
    import torch

    full = torch.zeros(*logps.shape, PROMPTS, RESPONSES, dtype=logps.dtype)
    for prompt in range(PROMPTS):
        full[:, prompt, :, prompt] = torch.eye(RESPONSES, dtype=logps.dtype) - logps[:, prompt, None].exp()
    return full.flatten(-2)


def distinct(rows: Rows) -> Rows:
    """The same rows where a pair of equal responses is never drawn, as the project drops them from its data."""
    probabilities = rows.probabilities * (1 - equals(rows))
    return Rows(probabilities / probabilities.sum(-1, keepdim=True), rows.gradients, rows.weights)


def mean_gradient(rows: Rows) -> Tensor:
    """E[w ∇ℓ] of one random pair, (N, D), exactly."""
    return (rows.probabilities[..., None] * rows.gradients).sum(1)


def variance(rows: Rows) -> Tensor:
    """Trace of the covariance of w ∇ℓ of one random pair, (N,), exactly."""
    second = (rows.probabilities * rows.gradients.square().sum(-1)).sum(1)
    return second - mean_gradient(rows).square().sum(-1)


def compared(rows: Rows, target: Tensor) -> dict[str, Tensor]:
    """Errors against `target` (N, D), relative to its norm: bias, the bias's part against the target (a shorter
    step; negative: a longer one), noise of one pair, and the cosine with the target; (N,) each.
    """
    found, size = mean_gradient(rows), target.norm(dim=-1)
    return {
        "bias": (found - target).norm(dim=-1) / size,
        "noise": variance(rows).clamp(min=0).sqrt() / size,
        "shortfall": 1 - (found * target).sum(-1) / size**2,
        "cosine": (found * target).sum(-1) / (found.norm(dim=-1) * size),
    }


def rmse(errors: Mapping[str, Tensor], batch: int) -> Tensor:
    """Root mean squared error of the mean over `batch` independent pairs: √(bias² + noise²/batch), (N,)."""
    return (errors["bias"] ** 2 + errors["noise"] ** 2 / batch).sqrt()


def drawn_batches(rows: Rows, batch: int, batches: int, seed: int) -> Tensor:
    """How often each row occurs in each random batch: (N, batches, M) float64."""
    import numpy as np
    import torch

    generator = np.random.default_rng(seed)
    shares = rows.probabilities / rows.probabilities.sum(-1, keepdim=True)
    return torch.stack([torch.from_numpy(generator.multinomial(batch, p.numpy(), size=batches)).double() for p in shares])


def normalised(rows: Rows, occurrences: Tensor, target: Tensor, batch: int) -> dict[str, Tensor]:
    """Errors of `normalize: batch`, whose gradient is Σ w ∇ℓ / Σ w, over drawn batches: a Monte Carlo estimate, (N,) each.

    The square of the bias is corrected for the noise of the mean, which would add to it; `bias_error` is that noise.
    """
    sums = occurrences @ rows.gradients
    estimates = sums / (occurrences @ rows.weights[..., None])
    size, middle = target.norm(dim=-1), estimates.mean(1)
    noise = estimates.var(1).sum(-1) / estimates.shape[1]
    square = ((middle - target).square().sum(-1) - noise).clamp(min=0)
    total = (estimates - target[:, None]).square().sum(-1).mean(1)
    cosine = (middle * target).sum(-1) / (middle.norm(dim=-1) * size)
    return {"bias": square.sqrt() / size, "bias_error": noise.sqrt() / size, "cosine": cosine, "rmse": total.sqrt() / size}


def summary(problem: Problem, seed: int) -> dict[str, Any]:
    """Every number of the demo, ready for JSON."""
    from isdaa.objectives import resolve

    results: dict[str, Any] = {
        "settings": {
            "seed": seed, "problems": len(problem.policy), "prompts": PROMPTS, "responses": RESPONSES, "beta": BETA,
            "behaviour_shift": BEHAVIOUR_SHIFT, "policy_shift": POLICY_SHIFT, "batch": BATCH, "monte_carlo_batches": BATCHES,
        },
        "units": "relative to the norm of the on-policy gradient; medians over the problems, with quartiles [25 %, 75 %]",
        "presets": {},
    }  # fmt: skip
    for preset in PRESETS:
        settings = resolve(preset, beta=BETA)
        results["presets"][preset] = sweep(problem, settings, seed, monte_carlo=preset == PRESETS[0])
    return results


def sweep(problem: Problem, settings: Mapping[str, Any], seed: int, monte_carlo: bool) -> dict[str, Any]:
    """One loss: the identity, the unweighted and the on-policy gradient, and every ε with both clips."""
    base = {key: value for key, value in settings.items() if key not in ("weight", "clip_eps", "clip", "normalize")}
    fresh = enumerate_pairs(problem, problem.policy, **base, weight="none")
    plain = enumerate_pairs(problem, problem.behaviour, **base, weight="none")
    target = mean_gradient(fresh)
    found: dict[str, Any] = {"identity": {}, "weights": {}}
    for name, rows in (("on_policy", fresh), ("unweighted", plain)):
        found[name] = described(compared(rows, target))
    for clip in CLIPS:
        weighting = {"weight": "importance", "clip": clip}
        swept = [enumerate_pairs(problem, problem.behaviour, **base, **weighting, clip_eps=eps) for eps in EPSILONS]
        errors = [compared(rows, target) for rows in swept]
        found["identity"][clip] = (mean_gradient(swept[-1]) - target).abs().max().item()
        found["weights"][clip] = {
            "rows": [
                {"eps": eps, **described(error), "mean_weight": quartiles(average(rows, rows.weights))}
                for eps, rows, error in zip(EPSILONS, swept, errors, strict=True)
            ],
            "bias_falls": monotone([-error["bias"] for error in errors]),
            "noise_rises": monotone([error["noise"] for error in errors]),
            "best_eps": {str(n): best([rmse(error, n) for error in errors]) for n in (SMALL_BATCH, BATCH, LARGE_BATCH)},
        }
        if clip == "joint":
            found["ess"] = quartiles(1 / average(swept[-1], swept[-1].weights.square()))  # the mean weight is 1
            if monte_carlo:
                found["normalised"] = {
                    "equals_kept": normalised_rows(swept, target, seed),
                    "equals_dropped": normalised_rows([distinct(rows) for rows in swept], mean_gradient(distinct(fresh)), seed),
                    "equals_share": {
                        name: quartiles(average(rows, equals(rows))) for name, rows in (("policy", fresh), ("behaviour", plain))
                    },
                }
    return found


def normalised_rows(swept: Sequence[Rows], target: Tensor, seed: int) -> list[dict[str, Any]]:
    """For every ε: the errors of the self-normalised weight by Monte Carlo, and of the plain weight on the same pairs, exact."""
    occurrences = drawn_batches(swept[0], BATCH, BATCHES, seed)
    found = []
    for eps, rows in zip(EPSILONS, swept, strict=True):
        rough, exact = normalised(rows, occurrences, target, BATCH), compared(rows, target)
        row: dict[str, Any] = {key: quartiles(value) for key, value in rough.items() if key != "rmse"}
        row["rmse"] = {str(BATCH): quartiles(rough["rmse"])}
        found.append({"eps": eps, **row, "not_normalised": described(exact)})
    return found


def equals(rows: Rows) -> Tensor:
    """1 where both responses of a row are the same, else 0; (M,)."""
    import torch

    return torch.eye(RESPONSES, dtype=rows.probabilities.dtype).flatten().repeat(PROMPTS)


def average(rows: Rows, values: Tensor) -> Tensor:
    """Expectation of values (N, M) under the rows' probabilities, (N,)."""
    return (rows.probabilities * values).sum(-1)


def described(errors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Quartiles of each error over the problems, with the RMSE of three sizes of batch."""
    sizes = (SMALL_BATCH, BATCH, LARGE_BATCH)
    return {key: quartiles(value) for key, value in errors.items()} | {
        "rmse": {str(size): quartiles(rmse(errors, size)) for size in sizes}
    }


def quartiles(values: Tensor) -> dict[str, float]:
    """Median and quartiles over the problems, six digits."""
    import torch

    low, middle, high = torch.quantile(values, torch.tensor(QUARTILES, dtype=values.dtype)).tolist()
    return {name: float(f"{v:.6g}") for name, v in (("low", low), ("median", middle), ("high", high))}


def monotone(values: Sequence[Tensor], slack: float = 1e-12) -> int:
    """In how many problems no value is below the one before it; each (N,)."""
    import torch

    return int((torch.stack(list(values)).diff(dim=0) >= -slack).all(0).sum())


def best(errors: Sequence[Tensor]) -> dict[str, int]:
    """How many problems have their least error at each ε; of equals, the smallest ε counts."""
    import torch

    return counts(eps_label(EPSILONS[i]) for i in torch.stack(list(errors)).round(decimals=9).numpy().argmin(0).tolist())


def eps_label(eps: float | None) -> str:
    """`0.25`; `none` for no clip."""
    return "none" if eps is None else f"{eps:g}"


def identity_table(results: Mapping[str, Any]) -> Table:
    """Each loss: how far the unweighted and the weighted gradient are from the on-policy one."""
    from rich.table import Table

    shown = Table()
    for header in ("loss", "unweighted: bias", "joint, ε = 1", "weighted, no clip: greatest error"):
        shown.add_column(header, justify="left" if header == "loss" else "right", no_wrap=True)
    for preset, found in results["presets"].items():
        one = next(row for row in found["weights"]["joint"]["rows"] if row["eps"] == 1.0)
        shown.add_row(
            preset,
            f"{found['unweighted']['bias']['median']:.2f}",
            f"{one['bias']['median']:.2f}",
            f"{max(found['identity'].values()):.0e}".replace("-", "−"),
        )
    return shown


def clip_table(results: Mapping[str, Any]) -> Table:
    """The first loss: bias and RMSE against ε, for each weight."""
    from rich.table import Table

    found = results["presets"][PRESETS[0]]
    shown = Table()
    shown.add_column(f"{PRESETS[0]}, ε", justify="left", no_wrap=True)
    for name in ("joint", "per-resp.", "normal."):
        shown.add_column(f"{name} bias", justify="right", no_wrap=True)
        shown.add_column(f"RMSE {BATCH}", justify="right", no_wrap=True)
    for i, eps in enumerate(EPSILONS):
        rows = [found["weights"][clip]["rows"][i] for clip in CLIPS] + [found["normalised"]["equals_dropped"][i]]
        cells = [f"{value['median']:.2f}" for row in rows for value in (row["bias"], row["rmse"][str(BATCH)])]
        shown.add_row(eps_label(eps), *cells)
    shown.add_section()
    for name, label in (("unweighted", "no weight"), ("on_policy", "fresh samples")):
        row = found[name]
        shown.add_row(label, f"{row['bias']['median']:.2f}", f"{row['rmse'][str(BATCH)]['median']:.2f}")
    return shown


def sentences(results: Mapping[str, Any]) -> list[str]:
    """What the tables say, in plain words, from the numbers."""
    settings, presets = results["settings"], results["presets"]
    worst = max(max(found["identity"].values()) for found in presets.values())
    joint, plain = presets[PRESETS[0]]["weights"]["joint"], presets[PRESETS[0]]["unweighted"]
    narrow = joint["rows"][0]
    kept, dropped = (presets[PRESETS[0]]["normalised"][name][-1] for name in ("equals_kept", "equals_dropped"))
    falls = [found["weights"][clip]["bias_falls"] for found in presets.values() for clip in ("joint", "per_response")]
    rises = [found["weights"][clip]["noise_rises"] for found in presets.values() for clip in ("joint", "per_response")]

    def median_eps(size: int) -> str:
        won = joint["best_eps"][str(size)]
        listed = [eps for label in map(eps_label, EPSILONS) for eps in [label] * won.get(label, 0)]
        return listed[len(listed) // 2]

    return [
        f"Medians over {settings['problems']} random problems, in units of the on-policy gradient's norm. RMSE: of the mean over",
        f"{BATCH} pairs. Exact, by enumeration, but for `normal.` ({BATCHES} drawn batches a problem): Σ w∇ℓ / Σ w over",
        "pairs of two different responses, against the on-policy gradient of such pairs.",
        "",
        f"Without a clip the weighted gradient is the on-policy gradient, to {worst:.0e}, for all three losses.".replace(
            "e-", "e−"
        ),
        f"With every step of ε upwards the bias falls or stays in at least {min(falls)} of {settings['problems']} problems,",
        f"and the noise grows or stays in at least {min(rises)}.",
        f"The joint clip's best ε (median problem): {median_eps(SMALL_BATCH)} for {SMALL_BATCH} pairs, {median_eps(BATCH)} for "
        f"{BATCH}, {median_eps(LARGE_BATCH)} for {LARGE_BATCH}.",
        f"At ε = {eps_label(EPSILONS[0])} the bias is {narrow['bias']['median']:.2f}; {narrow['shortfall']['median']:.2f} of it "
        "is a shorter step along the on-policy gradient.",
        f"The cosine of the two is {narrow['cosine']['median']:.2f}; without a weight it is {plain['cosine']['median']:.2f}.",
        "A pair of equals teaches nothing, but counts in Σ w: with such pairs kept, the normalised RMSE without a clip is "
        f"{kept['rmse'][str(BATCH)]['median']:.2f}, not {dropped['rmse'][str(BATCH)]['median']:.2f}.",
    ]


def draw(results: Mapping[str, Any]) -> alt.TopLevelMixin:
    """Two panels against ε: bias, and the RMSE of a batch; bands are quartiles over the problems."""
    import altair as alt

    found = results["presets"][PRESETS[0]]
    size = results["settings"]["batch"]
    drawn = [picked(row, f"rmse {size}")["high"] for row in found["weights"]["joint"]["rows"]]
    high = 1.08 * max(*drawn, picked(found["unweighted"], f"rmse {size}")["median"])  # one scale for both panels
    panels = [
        panel(found, "bias", "Bias of the gradient", high, "relative to the size of the on-policy gradient"),
        panel(found, f"rmse {size}", f"Root mean squared error of a batch of {size} pairs", high),
    ]
    subtitle = [
        f"The gradient of DPO from pairs of μ with clipped weights, against the on-policy gradient. Lines are medians over "
        f"{results['settings']['problems']} random problems,",
        "bands quartiles of the joint clip. Left: a wider clip has less bias, none has none. Right: it also has more noise.",
    ]
    return dressed(alt.hconcat(*panels, spacing=36), "What the clip costs, and what it buys", subtitle)


def picked(row: Mapping[str, Any], key: str) -> Mapping[str, float]:
    """The quartiles of `bias`, or of `rmse 128`."""
    name, _, size = key.partition(" ")
    return row[name][size] if size else row[name]


def panel(found: Mapping[str, Any], key: str, title: str, high: float, axis_title: str | None = None) -> Any:
    """One panel: a line a weight, a band for the joint clip, rules for no weight and, in the error, for fresh samples."""
    import altair as alt

    from isdaa.report.charts.style import INK, MUTED, PALETTE

    labels = [eps_label(eps) for eps in EPSILONS]
    colours = dict(zip(CLIPS, (PALETTE[1], PALETTE[0]), strict=True))
    rows_of = {weight: list(zip(labels, found["weights"][weight]["rows"], strict=True)) for weight in CLIPS}
    lines: dict[str, list[dict[str, Any]]] = {
        weight: [{"eps": label, "value": picked(row, key)["median"]} for label, row in rows] for weight, rows in rows_of.items()
    }
    band: list[dict[str, Any]] = [{"eps": label, **picked(row, key)} for label, row in rows_of["joint"]]
    rules = [("no weight", picked(found["unweighted"], key)["median"])]
    if key != "bias":
        rules.append(("fresh samples of π", picked(found["on_policy"], key)["median"]))
    x = alt.X("eps:N", scale=alt.Scale(domain=labels, type="point", padding=0.5),
              axis=alt.Axis(title="clip ε", grid=False, labelAngle=0))  # fmt: skip
    scale = alt.Scale(domain=[0, round(high, 3)], nice=False)
    y_axis = alt.Axis(title=axis_title, tickCount=6, format=".1f", domain=False, ticks=False)
    y = alt.Y("value:Q", scale=scale, axis=y_axis)
    layers: list[Any] = []

    def layer(values: list[dict[str, Any]], mark: dict[str, Any], **encoding: Any) -> None:
        chart = alt.Chart(alt.Data(values=values), mark=alt.MarkDef(**mark))
        layers.append(chart.encode(**{"x": x, "y": y} | encoding))

    layer(band, {"type": "area", "color": colours["joint"], "opacity": 0.12},
          y=alt.Y("low:Q", scale=scale, axis=y_axis), y2=alt.Y2("high:Q"))  # fmt: skip
    for text, value in rules:
        rule: dict[str, Any] = {"type": "rule", "color": "#9A9A9A", "strokeDash": [4, 4], "strokeWidth": 1}
        layers.append(alt.Chart(alt.Data(values=[{"value": value}]), mark=alt.MarkDef(**rule)).encode(y=y))
        note = {"type": "text", "align": "right", "dy": -7, "dx": 14, "color": MUTED, "fontSize": 11}
        layer([{"eps": labels[-1], "value": value, "text": text}], note, text="text:N")
    for weight, rows in lines.items():
        layer(rows, {"type": "line", "color": colours[weight], "strokeWidth": 2.4, "strokeJoin": "round"})
        layer(rows, {"type": "circle", "color": colours[weight], "size": 46, "opacity": 1})
    for weight, (index, align, dx, dy) in LABELS[key.partition(" ")[0]].items():
        letters = {"type": "text", "fontSize": 13, "fontWeight": "bold", "baseline": "middle", "align": align, "dx": dx, "dy": dy}
        words = [lines[weight][index] | {"text": CLIPS[weight]}]
        layer(words, letters | {"stroke": "white", "strokeWidth": 4, "strokeJoin": "round"}, text="text:N")
        layer(words, letters | {"color": colours[weight]}, text="text:N")
    header = alt.TitleParams(title, anchor="start", fontSize=13, color=INK, offset=8)
    return alt.layer(*layers).properties(width=400, height=320, title=header)


# Where a line's label stands: index of the point, which end of the text is there, pixels right and down of it.
LABELS: Mapping[str, Mapping[str, tuple[int, str, int, int]]] = {
    "bias": {"joint": (3, "right", -12, 14), "per_response": (4, "left", 12, -10)},
    "rmse": {"joint": (0, "left", 0, 17), "per_response": (0, "left", 0, -15)},
}


if __name__ == "__main__":
    sys.exit(command(run_finite, "finite"))
