"""Where the data comes from decides what a squared loss learns: one Gaussian fitted to a mixture, in three ways.

The idea is that of Figure 1 of Nguyen et al., NeurIPS 2025, arXiv 2506.08681; setting, code and drawing are our own.

The target p* is a mixture of two Gaussians, known up to a constant, as π_ref·exp(r/β) is in alignment. The policy is
one Gaussian π = N(m, s²). Each pair (y, y') has the loss of IPO, with the true difference in the place of ±1/(2β):

    ℓ = (h − h*)²       h = log π(y) − log π(y')       h* = log p*(y) − log p*(y')

The difference removes the constant. Off-policy, over pairs of a broad μ, this is a least-squares fit of log p* by a
parabola. On-policy, with the sampling held fixed under differentiation, E_{y,y'~π}[∇ℓ] = 4·∇KL(π‖p*): the gradient of the
log-variance loss at π is that of the KL (Richter et al. 2020, arXiv 2010.10436). The weight w = π(y)π(y')/(μ(y)μ(y'))
turns the first into the second.

    python examples/theory/gaussians.py --output_dir docs/results      # or: isdaa demo gaussians --output_dir docs/results

Shapes: R independent runs side by side, B pairs, Y points of a grid.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isdaa.cli.parser import OneLineParser
from isdaa.errors import UserError, shown
from isdaa.exits import exit_status
from isdaa.files import write_json

if TYPE_CHECKING:
    import altair as alt
    from rich.table import Table
    from torch import Tensor

MODES, SPREAD, HEAVY = (-2.0, 2.0), 0.7, 0.75  # the target: places, common standard deviation, weight of the first
DATA_SPREAD = 2.5  # μ = N(0, 2.5²), which covers both modes; the policy starts at it, as π_ref = μ in alignment
PAIRS, BATCH, STEPS, LEARNING_RATE = 4096, 64, 1000, 0.02
CLIP_EPS = 1.0  # the project's default, joint clip
REPEATS = 20
STARTS = tuple((mean, spread) for spread in (0.7, 2.5) for mean in (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0))
HEAVIES = (0.5, 0.6, 0.7, 0.8, 0.9)
ON_A_MODE = ("heavier mode", "lighter mode")
EDGE, POINTS = 12.0, 2401  # the grid of every integral: ±12 by 0.01

FITS: Mapping[str, tuple[str, str, float | None]] = {
    "on_policy": ("on-policy", "policy", None),
    "off_policy": ("off-policy", "data", None),
    "weighted": ("importance-weighted", "weighted", CLIP_EPS),
    "weighted_unclipped": ("weighted, no clip", "weighted", None),
}
"""Name: its words, which data it learns from ("policy", "data" or "weighted" data), ε."""


@dataclass(frozen=True, eq=False)
class Runs:
    """R runs: where each starts and the weight of its target's first mode, (R,) each."""

    means: Tensor
    spreads: Tensor
    heavy: Tensor


@dataclass(frozen=True, eq=False)
class Fit:
    """Where R runs ended, (R,) each; ESS/N and the share of clipped pairs over the data of each run, 1 and 0 unweighted."""

    means: Tensor
    spreads: Tensor
    ess: Tensor
    clipped: Tensor


def run_gaussians(output_dir: Path, seed: int = 0) -> Path:
    """Fit, draw, print and write `gaussians.json`, `.png` and `.svg` into `output_dir`; returns the PNG's path.

    Deterministic in `seed`. Raises UserError for a negative seed or a folder that cannot be written.
    """
    output_dir = checked(output_dir, seed)
    runs = planned()
    fits = {name: fit(runs, data, eps, seed) for name, (_, data, eps) in FITS.items()}
    results = summary(fits, seed)
    return kept(output_dir / "gaussians", results, draw(fits), [table(results)], sentences(results))


def kept(place: Path, results: Mapping[str, Any], chart: alt.TopLevelMixin, tables: Sequence[Table], said: Sequence[str]) -> Path:
    """Write numbers and chart beside each other under one name, and print the rest; returns the PNG's path."""
    from isdaa.report.charts.style import save_chart

    numbers = place.with_suffix(".json")
    write_json(numbers, results)
    picture = save_chart(chart, place)[0]
    for one in tables:
        print_plain(one)
    print(*said, sep="\n")
    print(f"\nchart:   {shown(picture)}\nnumbers: {shown(numbers)}")
    return picture


def command(run: Callable[[Path, int], Path], name: str) -> int:
    """`python examples/theory/NAME.py [--output_dir DIR] [--seed N]`; returns the exit status."""
    parser = OneLineParser(prog=f"{name}.py", description="See docs/theory.md.")
    parser.add_argument("--output_dir", default=f"runs/{name}", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N")

    def drawn() -> int:
        given = parser.parse_args(sys.argv[1:])
        run(Path(given.output_dir), given.seed)
        return 0

    return exit_status(drawn)


def checked(output_dir: str | Path, seed: int) -> Path:
    """The folder, which exists afterwards. Raises UserError, in one line, where it cannot be or the seed is no seed."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise UserError(f"--seed: a whole number from 0 on, not {seed!r}")
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir: {folder}: {error.strerror}") from None
    return folder


def planned() -> Runs:
    """The runs of the demo: REPEATS from μ, then one from each of STARTS, then one from μ for each weight in HEAVIES."""
    import torch

    starts = [(0.0, DATA_SPREAD, HEAVY)] * REPEATS + [(*start, HEAVY) for start in STARTS]
    starts += [(0.0, DATA_SPREAD, heavy) for heavy in HEAVIES]
    return Runs(*torch.tensor(starts, dtype=torch.float64).T)


def normal_logp(y: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """log N(y; mean, spread²), of the shape that the three broadcast to."""
    return -0.5 * ((y - mean) / spread) ** 2 - spread.log() - 0.5 * math.log(2 * math.pi)


def target_logp(y: Tensor, heavy: Tensor) -> Tensor:
    """log p*(y) of the mixture whose first mode has the weight `heavy`; shapes broadcast."""
    import torch

    spread = torch.tensor(SPREAD, dtype=y.dtype)
    parts = [normal_logp(y, torch.tensor(mode, dtype=y.dtype), spread) for mode in MODES]
    return torch.logaddexp(heavy.log() + parts[0], (1 - heavy).log() + parts[1])


def pair_weights(policy_logps: Tensor, data_logps: Tensor, clip_eps: float | None) -> tuple[Tensor, Tensor]:
    """The project's importance weights with the joint clip, and whether ε lowered them; (…, 2) → (…) each."""
    from isdaa.objectives.weights import importance_weights

    ratios = (policy_logps - data_logps).reshape(-1, 2)
    _, weights, clipped = importance_weights(ratios[:, 0], ratios[:, 1], "joint", clip_eps)
    shape = policy_logps.shape[:-1]
    return weights.reshape(shape), clipped.reshape(shape)


def gradients(y: Tensor, at: Tensor, target_logps: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over the B pairs of w·∇ℓ with respect to m and log s, (2, R); `at` holds those, `y` and targets are (R, B, 2).

    By hand, for the drawing of y and the weights have no gradient: ∇ℓ = 2(h − h*)·(∇log π(y) − ∇log π(y')).
    """
    import torch

    mean, spread = at[0, :, None, None], at[1, :, None, None].exp()
    gap = normal_logp(y, mean, spread) - target_logps
    z = (y - mean) / spread
    pull = 2 * (gap[..., 0] - gap[..., 1])
    if weights is not None:
        pull = pull * weights
    scores = torch.stack([z / spread, z**2 - 1])  # of log π with respect to m and log s
    return (pull * (scores[..., 0] - scores[..., 1])).mean(-1)


def descend(gradient: Callable[[Tensor], Tensor], start: Tensor, steps: int, rate: float = LEARNING_RATE) -> Tensor:
    """Adam (Kingma & Ba 2015, arXiv 1412.6980) with a rate that falls to 0 along a cosine; returns the parameters.

    Written out: the first torch.optim optimiser of a process loads 3 s of compiler, more than all the fits here take.
    """
    import torch

    at, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        found = gradient(at)
        first, second = 0.9 * first + 0.1 * found, 0.999 * second + 0.001 * found**2
        size = 0.5 * rate * (1 + math.cos(math.pi * (step - 1) / steps))
        at = at - size * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return at


def fit(runs: Runs, data: str, clip_eps: float | None, seed: int) -> Fit:
    """Fit m and log s in STEPS steps of BATCH pairs.

    data "policy": fresh pairs of the policy at each step. "data": batches from a fixed set of PAIRS pairs of μ for each
    run. "weighted": the same batches, each loss times its weight. The same seed gives the last two the same pairs.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    size = len(runs.means)
    data_spread = torch.tensor(DATA_SPREAD, dtype=torch.float64)
    fixed = torch.randn(size, PAIRS, 2, generator=generator, dtype=torch.float64) * data_spread
    data_logps = normal_logp(fixed, torch.zeros((), dtype=torch.float64), data_spread)
    heavy = runs.heavy[:, None, None]
    target_logps = target_logp(fixed, heavy)

    def policy_logp(y: Tensor, at: Tensor) -> Tensor:
        return normal_logp(y, at[0, :, None, None], at[1, :, None, None].exp())

    def on_policy(at: Tensor) -> Tensor:
        noise = torch.randn(size, BATCH, 2, generator=generator, dtype=torch.float64)
        y = at[0, :, None, None] + at[1, :, None, None].exp() * noise
        return gradients(y, at, target_logp(y, heavy))

    def off_policy(at: Tensor) -> Tensor:
        drawn = torch.randint(PAIRS, (BATCH,), generator=generator)
        y = fixed[:, drawn]
        weights = None
        if data == "weighted":
            weights, _ = pair_weights(policy_logp(y, at), data_logps[:, drawn], clip_eps)
        return gradients(y, at, target_logps[:, drawn], weights)

    at = descend(on_policy if data == "policy" else off_policy, torch.stack([runs.means, runs.spreads.log()]), STEPS)
    if data != "weighted":
        return Fit(at[0], at[1].exp(), torch.ones(size), torch.zeros(size))
    weights, clipped = pair_weights(policy_logp(fixed, at), data_logps, clip_eps)
    ess = weights.sum(-1) ** 2 / (PAIRS * (weights**2).sum(-1))
    return Fit(at[0], at[1].exp(), ess, clipped.double().mean(-1))


def grid() -> Tensor:
    """(Y,) points of every integral here."""
    import torch

    return torch.linspace(-EDGE, EDGE, POINTS, dtype=torch.float64)


def kl_to_target(mean: Tensor, spread: Tensor, heavy: Tensor) -> Tensor:
    """KL(N(mean, spread²)‖p*) in nats on the grid, (R,) from (R,) each. With gradients."""
    y = grid()
    logps = normal_logp(y, mean[:, None], spread[:, None])
    return (logps.exp() * (logps - target_logp(y, heavy[:, None]))).sum(-1) * (y[1] - y[0])


def valley(mean: Tensor, spread: Tensor) -> Tensor:
    """Share of N(mean, spread²) within 1 of the middle between the modes, where the target has little; (R,)."""
    import torch

    normal = torch.distributions.Normal(mean, spread)
    return normal.cdf(torch.ones_like(mean)) - normal.cdf(-torch.ones_like(mean))


def exact_off_policy() -> tuple[float, float]:
    """m and s of the off-policy minimum: log p* regressed on 1, y and y² under μ. Convex, so no start matters."""
    import torch

    y = grid()
    density = normal_logp(y, torch.zeros((), dtype=y.dtype), torch.tensor(DATA_SPREAD, dtype=y.dtype)).exp()
    powers = torch.stack([torch.ones_like(y), y, y**2], dim=-1)
    heavy = torch.tensor(HEAVY, dtype=y.dtype)
    slope = torch.linalg.solve(powers.T @ (density[:, None] * powers), powers.T @ (density * target_logp(y, heavy)))
    precision = -2 * slope[2]
    return float(slope[1] / precision), float(precision**-0.5)


def exact_on_policy() -> tuple[float, float]:
    """m and s of the minimum of KL(π‖p*) that descent from μ reaches, every integral on the grid."""
    import torch

    heavy = torch.tensor([HEAVY], dtype=torch.float64)

    def gradient(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        return torch.autograd.grad(kl_to_target(at[0], at[1].exp(), heavy).sum(), at)[0]

    at = descend(gradient, torch.tensor([[0.0], [math.log(DATA_SPREAD)]], dtype=torch.float64), 600)
    return float(at[0]), float(at[1].exp())


def place(mean: float, spread: float) -> str:
    """ "heavier mode", "lighter mode": centred within half a standard deviation of one, and no wider than 1.25 of it.

    "between": centred nearer to the middle than to either mode, and no wider than the gap. Else "both".
    """
    for name, mode in zip(ON_A_MODE, MODES, strict=True):
        if abs(mean - mode) <= 0.5 * SPREAD and spread <= 1.25 * SPREAD:
            return name
    return "between" if abs(mean) < 1 and spread < 1.5 else "both"


def summary(fits: Mapping[str, Fit], seed: int) -> dict[str, Any]:
    """Every number of the demo, ready for JSON."""
    import torch

    exact = {"on_policy": exact_on_policy(), "off_policy": exact_off_policy()}
    exact |= dict.fromkeys(("weighted", "weighted_unclipped"), exact["on_policy"])
    heavy = torch.full((REPEATS,), HEAVY, dtype=torch.float64)
    rows = {}
    for name, found in fits.items():
        ends = list(zip(found.means.tolist(), found.spreads.tolist(), strict=True))
        repeated, started, mixed = ends[:REPEATS], ends[REPEATS : REPEATS + len(STARTS)], ends[REPEATS + len(STARTS) :]
        means, spreads = found.means[:REPEATS], found.spreads[:REPEATS]
        kl, share = kl_to_target(means, spreads, heavy), valley(means, spreads)
        rows[name] = {
            "label": FITS[name][0],
            "clip_eps": FITS[name][2],
            "mean": _spread_of(means),
            "spread": _spread_of(spreads),
            "kl_to_target": _spread_of(kl),
            "in_the_valley": _spread_of(share),
            "ess": _spread_of(found.ess[:REPEATS]),
            "clip_fraction": _spread_of(found.clipped[:REPEATS]),
            "places": counts(place(*end) for end in repeated),
            "exact": {"mean": round(exact[name][0], 4), "spread": round(exact[name][1], 4)},
            "repeats": [[round(v, 4) for v in end] for end in repeated],
            "starts": [
                {"from": list(start), "to": [round(v, 4) for v in end], "place": place(*end)}
                for start, end in zip(STARTS, started, strict=True)
            ],
            "starts_places": counts(place(*end) for end in started),
            "other_targets": [
                {"heavy": share_of_first, "to": [round(v, 4) for v in end], "place": place(*end)}
                for share_of_first, end in zip(HEAVIES, mixed, strict=True)
            ],
        }
    settings = {
        "seed": seed, "repeats": REPEATS, "modes": MODES, "mode_spread": SPREAD, "heavy": HEAVY, "data_spread": DATA_SPREAD,
        "pairs": PAIRS, "batch": BATCH, "steps": STEPS, "learning_rate": LEARNING_RATE, "optimiser": "Adam, cosine to 0",
    }  # fmt: skip
    return {"settings": settings, "loss": "(h − h*)², h = log π(y) − log π(y'), h* = log p*(y) − log p*(y')", "fits": rows}


def _spread_of(values: Tensor) -> dict[str, float]:
    """The first run's value (it is the one drawn), and the least, mean and greatest of all."""
    named = {"first": values[0], "mean": values.mean(), "low": values.min(), "high": values.max()}
    return {name: round(value.item(), 4) for name, value in named.items()}


def counts(words: Any) -> dict[str, int]:
    """How often each word occurs, the commonest first."""
    listed = list(words)
    return {word: listed.count(word) for word in sorted(set(listed), key=lambda w: (-listed.count(w), w))}


def table(results: Mapping[str, Any]) -> Table:
    """One row a fit: where its runs ended."""
    from rich.table import Table

    shown, runs = Table(), results["settings"]["repeats"]
    for header in ("fitted on", "m", "s", "exact m, s", "KL(π‖p*)", "valley", "ESS/N", "on a mode"):
        shown.add_column(header, justify="left" if header == "fitted on" else "right", no_wrap=True)
    for row in results["fits"].values():
        middle = [f"{row[key]['mean']:.2f} ± {(row[key]['high'] - row[key]['low']) / 2:.2f}" for key in ("mean", "spread")]
        exact = f"{row['exact']['mean']:.2f}, {row['exact']['spread']:.2f}"
        shown.add_row(
            row["label"],
            *(text.replace("-", "−") for text in (*middle, exact)),
            f"{row['kl_to_target']['mean']:.2f}",
            f"{100 * row['in_the_valley']['mean']:.0f} %",
            "" if row["ess"]["low"] == 1 else f"{row['ess']['mean']:.2f}",
            f"{sum(row['places'].get(mode, 0) for mode in ON_A_MODE)}/{runs}",
        )
    return shown


def print_plain(shown: Table) -> None:
    """Print a table in the look of `isdaa evaluate`: ASCII rules and no colour where stdout is no terminal."""
    from rich import box

    from isdaa.terminal import terminal_for

    console = terminal_for(None, None)
    shown.box, shown.pad_edge, shown.collapse_padding = box.SIMPLE_HEAD if console.is_terminal else box.ASCII2, False, True
    console.print(shown)


def sentences(results: Mapping[str, Any]) -> list[str]:
    """What the table says, in plain words, from the numbers."""
    rows, runs = results["fits"], results["settings"]["repeats"]
    between = rows["off_policy"]["places"].get("between", 0)
    on = {name: sum(row["places"].get(mode, 0) for mode in ON_A_MODE) for name, row in rows.items()}
    started = {name: sum(row["starts_places"].get(mode, 0) for mode in ON_A_MODE) for name, row in rows.items()}
    return [
        f"Means of {runs} runs, each with its own data; ± is half of their range. Valley: share of the fit within 1 of 0.",
        "",
        f"Off-policy data puts the fit between the modes in {between} of {runs} runs, where the target has little. Fresh samples",
        f"put it on one mode in {on['on_policy']} of {runs}, and so does the clipped weight on the off-policy data: "
        f"{on['weighted']} of {runs}.",
        f"From {len(STARTS)} other starts, on one mode: {started['on_policy']} on-policy, {started['weighted']} weighted, "
        f"{started['weighted_unclipped']} weighted without a clip, {started['off_policy']} off-policy.",
    ]


def draw(fits: Mapping[str, Fit]) -> alt.TopLevelMixin:
    """The target as an area, the data as a dotted line, three fits as lines; other runs of the off-policy fit are faint."""
    import altair as alt
    import torch

    from isdaa.report.charts.style import MUTED, PALETTE

    y = torch.linspace(-6.0, 6.0, 241, dtype=torch.float64)
    colours = {"off_policy": PALETTE[0], "on_policy": PALETTE[4], "weighted": PALETTE[1]}
    axis_x = alt.X("y:Q", scale=alt.Scale(domain=[-6, 6], nice=False), axis=alt.Axis(title="response y", grid=False))
    axis_y = alt.Y("density:Q", scale=alt.Scale(domain=[0, 0.62], nice=False),
                   axis=alt.Axis(title="density", tickCount=6, domain=False, ticks=False, format=".1f"))  # fmt: skip
    layers: list[Any] = []

    def layer(values: Sequence[Mapping[str, Any]], mark: dict[str, Any], **encoding: Any) -> None:
        chart = alt.Chart(alt.Data(values=list(values)), mark=alt.MarkDef(**mark))
        layers.append(chart.encode(x=axis_x, y=axis_y, **encoding))

    def curve(logps: Tensor, run: int = 0) -> list[dict[str, Any]]:
        pairs = zip(y.tolist(), logps.exp().tolist(), strict=True)
        return [{"y": round(at, 3), "density": round(value, 5), "run": run} for at, value in pairs if value > 5e-4]

    def number(value: float) -> str:
        return f"{value:.2f}".replace("-", "−")

    zero, broad = torch.zeros((), dtype=y.dtype), torch.tensor(DATA_SPREAD, dtype=y.dtype)
    layer(curve(target_logp(y, torch.tensor(HEAVY, dtype=y.dtype))), {"type": "area", "color": "#D9D9D9"})
    layer(curve(normal_logp(y, zero, broad)), {"type": "line", "color": "#8A8A8A", "strokeWidth": 1.5, "strokeDash": [2, 3]})
    for name, colour in colours.items():
        found = fits[name]
        lines = [curve(normal_logp(y, found.means[r], found.spreads[r]), r) for r in range(REPEATS)]
        if name == "off_policy":  # the others' runs cannot be told apart by eye
            faint = {"type": "line", "color": colour, "strokeWidth": 1, "opacity": 0.22}
            layer([row for line in lines[1:] for row in line[::2]], faint, detail="run:N")
        # On-policy and weighted lie on each other: a broad band under a dashed line shows both.
        looks: dict[str, dict[str, Any]] = {"on_policy": {"strokeWidth": 7, "opacity": 0.6}, "weighted": {"strokeDash": [7, 4]}}
        layer(lines[0], {"type": "line", "color": colour, "strokeWidth": 2.6} | looks.get(name, {}))
    words = {
        "on_policy": (-1.28, 0.545, "on-policy"),
        "weighted": (-1.28, 0.505, "off-policy, importance-weighted"),
        "off_policy": (0.32, 0.335, "off-policy"),
    }
    darker = {"on_policy": "#2F8FC4"}
    for name, (x, height, text) in words.items():
        found = fits[name]
        text += f"   N({number(found.means[0].item())}, {number(found.spreads[0].item())}²)"
        letters = {"type": "text", "align": "left", "fontSize": 13, "fontWeight": "bold", "baseline": "middle"}
        layer([{"y": x, "density": height, "text": text}], letters | {"color": darker.get(name, colours[name])}, text="text:N")
    note = {"type": "text", "align": "left", "fontSize": 12, "color": MUTED, "baseline": "middle"}
    layer([{"y": 2.75, "density": 0.125, "text": "target p*, a mixture"}], note, text="text:N")
    layer([{"y": -5.85, "density": 0.085, "text": "data μ, where"}], note, text="text:N")
    layer([{"y": -5.85, "density": 0.06, "text": "the policy starts"}], note, text="text:N")
    chart = alt.layer(*layers).properties(width=600, height=340)
    subtitle = [
        "One Gaussian, fitted to the grey mixture by one squared loss on pairs. Off-policy data puts it between the modes;",
        "the same pairs, weighted by the ratio of policy to data, put it where fresh samples do. "
        f"Faint: the other {REPEATS - 1} runs.",
    ]
    return dressed(chart, "The data decides where the fit sits", subtitle)


def dressed(chart: Any, title: str, subtitle: Sequence[str]) -> alt.TopLevelMixin:
    """A chart with the header, fonts and axes of the project's other charts."""
    import altair as alt

    from isdaa.report.charts.style import FONT, GRID, INK, MUTED

    header = alt.TitleParams(
        title, subtitle=list(subtitle), anchor="start", fontSize=18, fontWeight="bold", color=INK, offset=18,
        subtitleFontSize=12, subtitleColor=MUTED, subtitlePadding=6, subtitleLineHeight=16,
    )  # fmt: skip
    return (
        chart.properties(title=header, background="white", padding={"left": 14, "right": 18, "top": 14, "bottom": 12})
        .configure(font=FONT)
        .configure_view(stroke=None)
        .configure_axis(
            grid=True, gridColor=GRID, domainColor="#BBBBBB", tickColor="#BBBBBB", labelColor=MUTED, titleColor=INK,
            labelFontSize=12, titleFontSize=13, titleFontWeight="normal", titlePadding=10,
        )
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(command(run_gaussians, "gaussians"))
