"""What training and held-out evaluation show of a set of pairs: docs/method.md's drift, weights, rewards and accuracy.

Legend: P pairs of an interval, B pairs of one forward pass, K figures of a pair.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from isdaa.data.collation import PairBatch
from isdaa.evaluation.checkpoints.held_out import STILL
from isdaa.models.packed.forward import ResponseLogps
from isdaa.objectives.objective import Objective, ObjectiveOutput
from isdaa.objectives.weights import effective_sample_size, weight_metrics
from isdaa.training.trainer.callbacks import differs

COLUMNS = (
    *("step", "index", "valid", "log_weight", "raw_weight", "clipped", "unweighted", "weighted", "sft", "pair_weight"),
    *("chosen_reward", "rejected_reward", "chosen_logps", "rejected_logps", "chosen_drift", "rejected_drift"),
    *("chosen_length", "rejected_length", "margin"),
)


@torch.no_grad()
def pair_figures(
    objective: Objective,
    batch: PairBatch,
    logps: ResponseLogps,
    out: ObjectiveOutput,
    raw_weights: Tensor,
    step: int,
) -> Tensor:
    """(B, K) figures of the pairs of one forward pass, on its device: nothing is read back until they are logged.

    raw_weights: (B,) the pairs' own weights, before what spans the batch.
    """
    like = out.weights
    assert batch.reference_chosen_logps is not None and batch.reference_rejected_logps is not None
    chosen_drift = logps.chosen_logps - batch.reference_chosen_logps
    rejected_drift = logps.rejected_logps - batch.reference_rejected_logps
    by_length = objective.length_normalized
    columns = {
        "step": torch.full_like(like, step),
        "index": batch.index,
        "valid": batch.valid,
        "log_weight": out.log_weights,
        "raw_weight": raw_weights,
        "clipped": out.clipped,
        "unweighted": out.unweighted_losses,
        "weighted": out.weights * out.unweighted_losses,
        "sft": -objective.beta * objective.sft_coefficient * logps.chosen_logps,
        "pair_weight": torch.ones_like(like) if batch.weights is None else batch.weights,
        "chosen_reward": objective.beta * (chosen_drift / batch.chosen_scored.clamp(min=1) if by_length else chosen_drift),
        "rejected_reward": objective.beta
        * (rejected_drift / batch.rejected_scored.clamp(min=1) if by_length else rejected_drift),
        "chosen_logps": logps.chosen_logps,
        "rejected_logps": logps.rejected_logps,
        "chosen_drift": chosen_drift,
        "rejected_drift": rejected_drift,
        "chosen_length": batch.chosen_scored,
        "rejected_length": batch.rejected_scored,
        "margin": out.chosen_rewards - out.rejected_rewards,
    }
    return torch.stack([columns[name].to(like.dtype) for name in COLUMNS], dim=1)


class Figures:
    """Figures (P, K) of all valid pairs of an interval, on the CPU in float64, by name of the column.

    They are in the data set's order, so that nothing depends on which rank saw a pair.
    """

    def __init__(self, table: Tensor) -> None:
        table = table.detach().to("cpu", torch.float64)
        table = table[table[:, COLUMNS.index("valid")] > 0]
        self.table = table[table[:, COLUMNS.index("index")].argsort(stable=True)]

    def __len__(self) -> int:
        return self.table.shape[0]

    def __getitem__(self, name: str) -> Tensor:
        return self.table[:, COLUMNS.index(name)]

    def mean(self, name: str) -> float:
        """Mean of one column over the pairs."""
        return self[name].mean().item()

    def steps(self) -> list[tuple[int, float, float, int]]:
        """`(step, ESS/N, mean weight, N)` of each global batch: figures of one batch, never of an interval."""
        found = []
        for step in self["step"].unique().tolist():
            weights = self["raw_weight"][self["step"] == step]
            found.append((int(step), effective_sample_size(weights).item(), weights.mean().item(), len(weights)))
        return found

    def accuracy(self, at_reference: bool = False) -> float:
        """Share of pairs whose chosen response has the larger reward, a tie counting half.

        A pair on whose responses policy and reference differ by rounding alone is a tie: which is larger is chance. So are all
        pairs before the first step of a policy that starts as its reference (at_reference), as rounding in bfloat16 is coarser;
        not where the two differ so much that the run warns of it.
        """
        chosen, rejected = self["chosen_reward"], self["rejected_reward"]
        tie = torch.maximum(self["chosen_drift"].abs(), self["rejected_drift"].abs()) <= STILL
        tie |= chosen == rejected
        if at_reference and (self["step"] == 0).any() and not differs(self.start()):
            tie |= self["step"] == 0
        return torch.where(tie, 0.5, (chosen > rejected).double()).mean().item()

    def metrics(self, weighted: bool = True, chi_squared: bool = False, at_reference: bool = False) -> dict[str, float]:
        """The figures by metric name. `weighted` False (an objective without weights) leaves the `weights/…` out.

        `weights/…` are of the pairs' own weights, before normalisation over the batch would hide that all of them
        shrink; `weights/ess` is the mean over global batches. at_reference: of `accuracy`.

        `rewards/…` are β·Δ, as TRL logs them, whatever the implicit reward is. chi_squared: with it, the median of β·h, what
        the loss sees: the exponential in it makes any mean that of its largest pair.
        """
        chosen, rejected = self["chosen_reward"], self["rejected_reward"]
        found = {
            "loss/unweighted": self.mean("unweighted"),
            "loss/weighted": self.mean("weighted"),
            "loss/sft": self.mean("sft"),
            "rewards/chosen": chosen.mean().item(),
            "rewards/rejected": rejected.mean().item(),
            "rewards/margin": (chosen - rejected).mean().item(),
            "rewards/accuracy": self.accuracy(at_reference),
            "logps/chosen": self.mean("chosen_logps"),
            "logps/rejected": self.mean("rejected_logps"),
            "drift/chosen": self.mean("chosen_drift"),
            "drift/rejected": self.mean("rejected_drift"),
            "drift/chosen_per_token": (self["chosen_drift"].sum() / self["chosen_length"].sum()).item(),
            "drift/rejected_per_token": (self["rejected_drift"].sum() / self["rejected_length"].sum()).item(),
        }
        if chi_squared:
            found["rewards/chi_squared_margin"] = self["margin"].quantile(0.5).item()
        if weighted:
            found |= weight_metrics(self["log_weight"], self["raw_weight"], self["clipped"] > 0)
            steps = self.steps()
            found["weights/ess"] = sum(ess for _, ess, *_ in steps) / len(steps)
        return found

    def start(self) -> dict[str, float]:
        """Difference of policy and reference logps over both responses of the interval's first step, in nats."""
        first = self["step"] == self["step"].min()
        drift = torch.cat([self["chosen_drift"][first], self["rejected_drift"][first]])
        return {
            "start/drift_mean": drift.mean().item(),
            "start/drift_rms": drift.square().mean().sqrt().item(),
            "start/drift_max": drift.abs().max().item(),
        }


def gathered(tables: Iterable[Tensor], gather: object = None) -> Figures:
    """Figures of all forward passes of an interval, of all ranks where `gather` (accelerate's) is given."""
    table = torch.cat(list(tables))
    return Figures(gather(table) if callable(gather) else table)
