"""One objective for every direct alignment method: implicit reward → margin → logit → loss → weight, plus an SFT term.

    Δ = log π(y|x) − log π_ref(y|x)      h = r(Δ_w) − r(Δ_l)      u = β·h + α·(|y_w| − |y_l|)
    loss = w·ℓ(u) + β·η·(−log π(y_w|x))

The margin always uses the reference π_ref; the importance weight uses the behaviour policy μ, which is π_ref unless the
pairs carry behaviour logps. The weight is constant under differentiation. The SFT term is not weighted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from functools import reduce

import torch
from torch import Tensor

from isdaa.objectives.formulas import describe
from isdaa.objectives.implicit_reward import IMPLICIT_REWARDS
from isdaa.objectives.losses import LOSSES
from isdaa.objectives.presets import DEFAULTS, Clip, ImplicitReward, Loss, Normalize, Weight, check_settings
from isdaa.objectives.weights import batch_weights, importance_weights, wpo_weights


@dataclass(frozen=True, eq=False)
class PairLogps:
    """What an objective reads of B pairs. Every tensor is (B,); half precision is computed in fp32, float64 stays float64.

    Attributes:
        policy_chosen_logps: log π(y_w|x) in nats, summed over the response's tokens, its EOS included. It carries gradients.
        policy_rejected_logps: log π(y_l|x), as above.
        reference_chosen_logps: log π_ref(y_w|x).
        reference_rejected_logps: log π_ref(y_l|x).
        chosen_lengths: tokens of the chosen response, its EOS included.
        rejected_lengths: tokens of the rejected response, its EOS included.
        behaviour_chosen_logps: log μ(y_w|x); None: μ is π_ref. Both behaviour logps or neither.
        behaviour_rejected_logps: log μ(y_l|x).
        policy_chosen_wpo: mean over the chosen response's tokens of log π(y_t) − log Σ_v π(v)²; for the weight "wpo" alone.
        policy_rejected_wpo: the same of the rejected response. Both or neither.
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    reference_chosen_logps: Tensor
    reference_rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    behaviour_chosen_logps: Tensor | None = None
    behaviour_rejected_logps: Tensor | None = None
    policy_chosen_wpo: Tensor | None = None
    policy_rejected_wpo: Tensor | None = None

    def checked(self) -> PairLogps:
        """The same pairs in one floating type of at least fp32.

        Raises:
            ValueError: a shape or type that cannot be, or one of two values that go together.
        """
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        shape = self.policy_chosen_logps.shape
        if len(shape) != 1 or not shape[0]:
            raise ValueError(f"policy_chosen_logps must have shape (B,) with B ≥ 1; got {tuple(shape)}")
        for name, tensor in given.items():
            if tensor.shape != shape:
                raise ValueError(f"{name} must have the shape {tuple(shape)} of policy_chosen_logps; got {tuple(tensor.shape)}")
            if not name.endswith("_lengths") and not tensor.is_floating_point():
                raise ValueError(f"{name} must be floating point; got {tensor.dtype}")
        for one, other in (
            ("behaviour_chosen_logps", "behaviour_rejected_logps"),
            ("policy_chosen_wpo", "policy_rejected_wpo"),
        ):
            if (one in given) != (other in given):
                raise ValueError(f"{one} and {other} must be given together")
        floats = (tensor.dtype for tensor in given.values() if tensor.is_floating_point())
        dtype = reduce(torch.promote_types, floats, torch.float32)
        return replace(self, **{name: tensor.to(dtype) for name, tensor in given.items()})


@dataclass(frozen=True, eq=False)
class ObjectiveOutput:
    """What an objective gives for B pairs. Every tensor is (B,); losses, unweighted_losses and logits carry gradients.

    Attributes:
        losses: w·ℓ(u) and the SFT term: what to average.
        weights: w, as it multiplied the loss.
        log_weights: log w before the clip; 0 where the weight is "none".
        logits: u = β·h + α·(|y_w| − |y_l|).
        unweighted_losses: ℓ(u).
        chosen_rewards: β·r(Δ) of the chosen response.
        rejected_rewards: β·r(Δ) of the rejected response.
        clipped: bool; whether ε lowered the weight.
    """

    losses: Tensor
    weights: Tensor
    log_weights: Tensor
    logits: Tensor
    unweighted_losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    clipped: Tensor


@dataclass(frozen=True)
class Objective:
    """A direct alignment objective, composed of independent choices (docs/method.md; sources: `isdaa methods`).

    Attributes:
        implicit_reward: r(Δ): "log_ratio" is Δ, "chi_squared" is Δ + exp(clamp(Δ, −88, 20)).
        loss: ℓ(u): "logistic", "squared" or "hinge".
        beta: β > 0, the strength of the pull towards the reference.
        weight: "none", "importance" (Nguyen et al., NeurIPS 2025), "wpo", or a control made of the importance weights:
            "shuffled", "mean".
        clip_eps: ε ≥ 0, the upper clip of the log importance weight; None: no clip, log w capped at 40. Without importance
            weights it changes nothing.
        clip: "joint" clips the sum of both log-ratios at 2ε, "per_response" each of them at ε.
        normalize: "batch" divides the weights by their mean over the global batch.
        length_penalty: α, a token of length difference.
        sft_coefficient: η ≥ 0 of the SFT term β·η·(−log π(y_w|x)), which is never weighted.
        label_smoothing: 0 ≤ s ≤ 0.5, the assumed share of flipped labels; logistic loss only.
        length_normalized: whether Δ is divided by the response's length, in the margin alone.
        max_reward: R_max > 0: clips β·h to ±2·R_max; chi_squared only.

    Raises:
        ValueError: a value out of range, or a combination that means nothing.
    """

    implicit_reward: ImplicitReward = DEFAULTS["implicit_reward"]
    loss: Loss = DEFAULTS["loss"]
    beta: float = DEFAULTS["beta"]
    weight: Weight = DEFAULTS["weight"]
    clip_eps: float | None = DEFAULTS["clip_eps"]
    clip: Clip = DEFAULTS["clip"]
    normalize: Normalize | None = DEFAULTS["normalize"]
    length_penalty: float = DEFAULTS["length_penalty"]
    sft_coefficient: float = DEFAULTS["sft_coefficient"]
    label_smoothing: float = DEFAULTS["label_smoothing"]
    length_normalized: bool = DEFAULTS["length_normalized"]
    max_reward: float | None = DEFAULTS["max_reward"]

    def __post_init__(self) -> None:
        check_settings(**asdict(self))

    @property
    def needs_wpo(self) -> bool:
        """Whether the pairs must carry policy_chosen_wpo and policy_rejected_wpo."""
        return self.weight == "wpo"

    @property
    def needs_batch(self) -> bool:
        """Whether the weights span the global batch: then `weights` must be passed to a call that sees a part of it."""
        return self.weight in ("shuffled", "mean") or self.normalize is not None

    def formula(self) -> str:
        """Exactly what is computed, with its numbers, as a few lines of text."""
        return describe(asdict(self))

    def raw_weights(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """The weight of each pair by itself, without gradients.

        Args:
            pairs: B pairs.

        Returns:
            log_weights (B,) before the clip, and weights (B,) before any step that spans the batch.
        """
        log_weights, weights, _ = self._pair_weights(pairs.checked())
        return log_weights, weights

    def __call__(
        self,
        pairs: PairLogps,
        weights: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        seed: int = 0,
        step: int = 0,
    ) -> ObjectiveOutput:
        """Losses of B pairs.

        Args:
            pairs: B pairs.
            weights: (B,), the final weights, of `batch_weights` over the global batch; used as they are. None: these B pairs
                are the global batch.
            valid: (B,) bool; False: a pair that only fills a rank up, with weight and loss 0.
            seed: with `step`, chooses the permutation of the weight "shuffled".
            step: the optimiser step.

        Returns:
            Losses, weights and logits of the pairs.

        Raises:
            ValueError: shapes that do not fit, or wpo values that are missing.
        """
        pairs = pairs.checked()
        shape = pairs.policy_chosen_logps.shape
        if valid is not None and (valid.shape != shape or valid.dtype != torch.bool):
            raise ValueError(f"valid must be bool of shape {tuple(shape)}; got {valid.dtype} of {tuple(valid.shape)}")
        if weights is not None and weights.shape != shape:
            raise ValueError(f"weights must have the shape {tuple(shape)} of the pairs; got {tuple(weights.shape)}")

        log_weights, raw, clipped = self._pair_weights(pairs)
        if weights is None:
            weights = batch_weights(raw, self.weight, self.normalize, seed, step, valid)
        else:
            weights = weights.detach().to(raw.dtype)

        chosen, rejected = self._rewards(pairs)
        logits = self._logits(chosen - rejected, pairs)
        unweighted = LOSSES[self.loss](logits, self.beta, self.label_smoothing)
        losses = weights * unweighted
        if self.sft_coefficient:
            losses = losses - self.beta * self.sft_coefficient * pairs.policy_chosen_logps
        if valid is not None:
            losses, weights = losses.where(valid, 0.0), weights.where(valid, 0.0)
        return ObjectiveOutput(
            losses=losses,
            weights=weights,
            log_weights=log_weights,
            logits=logits,
            unweighted_losses=unweighted,
            chosen_rewards=self.beta * chosen.detach(),
            rejected_rewards=self.beta * rejected.detach(),
            clipped=clipped,
        )

    def _rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """r(Δ_w) and r(Δ_l), each (B,)."""
        chosen = pairs.policy_chosen_logps - pairs.reference_chosen_logps
        rejected = pairs.policy_rejected_logps - pairs.reference_rejected_logps
        if self.length_normalized:
            # An empty response has Δ = 0; its mean is 0, not 0/0.
            chosen = chosen / pairs.chosen_lengths.clamp(min=1)
            rejected = rejected / pairs.rejected_lengths.clamp(min=1)
        reward = IMPLICIT_REWARDS[self.implicit_reward]
        return reward(chosen), reward(rejected)

    def _logits(self, margins: Tensor, pairs: PairLogps) -> Tensor:
        """u = β·h + α·(|y_w| − |y_l|), (B,); χPO's clip bounds β·h alone."""
        logits = self.beta * margins
        if self.max_reward is not None:
            logits = logits.clamp(-2 * self.max_reward, 2 * self.max_reward)
        if self.length_penalty:
            logits = logits + self.length_penalty * (pairs.chosen_lengths - pairs.rejected_lengths)
        return logits

    @torch.no_grad()
    def _pair_weights(self, pairs: PairLogps) -> tuple[Tensor, Tensor, Tensor]:
        """log_weights, weights and clipped (bool) of each of the checked pairs by itself, each (B,)."""
        none = torch.zeros_like(pairs.policy_chosen_logps)
        if self.weight == "none":
            return none, torch.ones_like(none), none.bool()
        if self.weight == "wpo":
            if pairs.policy_chosen_wpo is None or pairs.policy_rejected_wpo is None:
                raise ValueError('weight="wpo" needs policy_chosen_wpo and policy_rejected_wpo')
            return *wpo_weights(pairs.policy_chosen_wpo, pairs.policy_rejected_wpo), none.bool()
        if pairs.behaviour_chosen_logps is None or pairs.behaviour_rejected_logps is None:
            chosen_behaviour, rejected_behaviour = pairs.reference_chosen_logps, pairs.reference_rejected_logps
        else:
            chosen_behaviour, rejected_behaviour = pairs.behaviour_chosen_logps, pairs.behaviour_rejected_logps
        return importance_weights(
            pairs.policy_chosen_logps - chosen_behaviour,
            pairs.policy_rejected_logps - rejected_behaviour,
            self.clip,
            self.clip_eps,
        )
