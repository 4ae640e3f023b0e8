"""One measurement of a policy in training: KL, win rate, length and reward on a few held-out prompts (docs/guard.md).

The opponents are samples of π_ref, drawn and scored before the first step and kept in the run's folder. Each
measurement draws one response a prompt for the win rate, and another one at temperature 1 for the KL.

Legend: N prompts, K opponent responses a prompt.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isdaa.config import Config
from isdaa.data.encoder import token_settings
from isdaa.data.pairs import KEEP
from isdaa.data.reading.sources import load_prompts
from isdaa.errors import UserError
from isdaa.evaluation.checkpoints.kl import KL_SETTINGS, divergences
from isdaa.evaluation.checkpoints.sample_and_kl import Prompts, draw_records, tokenize
from isdaa.evaluation.checkpoints.scoring import scores_key
from isdaa.evaluation.checkpoints.win_rate import own_win_rates, win_rates
from isdaa.evaluation.judges.replies import parts_of
from isdaa.evaluation.records import Blocks, Record
from isdaa.evaluation.scorers import Scorer
from isdaa.evaluation.statistics import mean_interval
from isdaa.files import digest
from isdaa.models.attention.shared_prefix import Layout
from isdaa.models.half_precision import numerics
from isdaa.models.packed.forward import PairForward
from isdaa.models.packed.logprobs import Head, OwnHead
from isdaa.models.sampling.sampling import SamplingSettings
from isdaa.terminal import Bar, progress, working
from isdaa.training.run_folder import Run

SAMPLES, SCORES = "samples.jsonl", "scores.jsonl"
FORMAT = 1  # of the opponents; raise it when the same settings would give other ones
KEPT = 1 << 30  # bytes of a reference that stays in memory between looks; a larger one is loaded for each
FORWARD = 0.1  # work of a forward pass over a response, in samples

Around = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Measurement:
    """What a look found. metrics: `guard/…`; wins: (N,) win rates prompt by prompt, None without a scorer."""

    metrics: dict[str, float]
    kl: float
    wins: np.ndarray | None


@dataclass
class Within:
    """A prepared forward whose computations run inside `around()`: another precision, or an adapter switched off."""

    forward: PairForward
    around: Around

    @property
    def model(self) -> nn.Module:
        """The model that computes."""
        return self.forward.model

    def predicting_states(self, model: nn.Module, input_ids: Tensor, layout: Layout) -> tuple[Tensor, Head]:
        """As `PairForward.predicting_states`."""
        with self.around():
            hidden, head = self.forward.predicting_states(model, input_ids, layout)
        return hidden, OwnHead(self._inside(head.function), head.vocabulary) if isinstance(head, OwnHead) else head

    def _inside(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def inside(hidden: Tensor) -> Tensor:
            with self.around():
                return function(hidden)

        return inside


class Reference:
    """π_ref for as long as a look needs it.

    load: brings it into memory; a small one then stays there. policy: a LoRA policy, which with its adapter switched off
    is the reference, so that nothing is loaded. precision: as in training (`align.precision`).
    """

    def __init__(
        self, load: Callable[[], PairForward] | None, policy: PairForward | None = None, precision: str = "float32"
    ) -> None:
        self.load, self.policy, self.precision = load, policy, precision
        self._kept: PairForward | None = None

    @contextmanager
    def in_memory(self) -> Iterator[Within]:
        """The reference, which may be gone afterwards."""
        if self.policy is not None:
            yield Within(self.policy, self._adapter_off)
            return
        assert self.load is not None
        forward = self._kept or self.load()
        if _bytes(forward.model) <= KEPT:
            self._kept = forward
        try:
            yield Within(forward, self._numerics)
        finally:
            if self._kept is None:
                del forward
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def _numerics(self) -> AbstractContextManager[Any]:
        return numerics(self.precision)

    @contextmanager
    def _adapter_off(self) -> Iterator[None]:
        assert self.policy is not None
        model: Any = self.policy.model
        with self._numerics(), model.disable_adapter():
            yield


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def guard_prompts(run: Run, tokenizer: Any) -> Prompts:
    """The held-out prompts behind those that `isdaa evaluate` takes: a checkpoint that is chosen on the prompts which
    judge it looks better than it is. Where there are too few, the last ones, and a line says how many are shared."""
    config = run.config
    wanted, reserved = config.guard.prompts, config.evaluation.prompts
    held_out = config.data.evaluation is None
    source = config.data.source("evaluation") or str(run.folder / "eval_pairs.jsonl")
    split, repeated = (None, KEEP) if held_out else (config.data.evaluation_split, config.data.prompt_repeated)
    rows, _ = load_prompts(source, split, repeated=repeated)
    if len(rows) < 2:
        raise UserError(f"{source}: one held-out prompt; the guard needs at least two (data.evaluation, data.eval_fraction)")
    start = max(0, min(reserved, len(rows) - wanted))
    chosen = list(rows.select(range(start, min(start + wanted, len(rows)))))
    shared = max(0, min(reserved, len(rows)) - start)
    if shared and config.guard.acts:
        whose = f"all {len(rows)}" if len(rows) <= reserved else f"the first {reserved}"
        told = f"{shared} of its {len(chosen)} prompts are among {whose} held-out ones, which `isdaa evaluate` takes"
        run.say("align", [f"guard: {told}: on these, what the guard chose will look somewhat better than it is"])
    settings = config.evaluation.model_copy(update={"prompts": wanted})
    return tokenize(chosen, tokenizer, settings, token_settings(config.tokenization))


def sampling_of(config: Config) -> SamplingSettings:
    """How responses for win rates are drawn: the guard's settings, else the evaluation's."""
    guard, evaluation = config.guard, config.evaluation

    def of(name: str) -> Any:
        value = getattr(guard, name)
        return getattr(evaluation, name) if value is None else value

    return SamplingSettings(of("temperature"), of("top_p"), evaluation.top_k, of("max_new_tokens"))


def longest_row(config: Config) -> int:
    """Tokens of the longest row that training or the guard will send through the forward."""
    longest = config.tokenization.max_length
    if config.guard.steps is None:
        return longest
    return max(longest, config.tokenization.max_prompt_length + sampling_of(config).max_new_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Looking


class Looks:
    """Everything that stays the same from look to look.

    identity: what tells this reference from any other, as JSON-able data. folder: where the opponents are kept.
    """

    def __init__(
        self,
        config: Config,
        prompts: Prompts,
        reference: Reference,
        scorer: Scorer | None,
        *,
        identity: Mapping[str, Any],
        folder: Path,
    ) -> None:
        self.config, self.prompts, self.reference, self.scorer = config, prompts, reference, scorer
        self.sampling = sampling_of(config)
        self.batch_size = config.guard.batch_size or config.evaluation.batch_size
        self.opponents: np.ndarray | None = None  # (N, K) scores of the reference's samples
        self.opponents_cut: float | None = None  # the share of them that the limit cut
        self.opponents_length: float | None = None  # their mean tokens
        if scorer is not None:
            self.opponents, self.opponents_cut, self.opponents_length = self._opponents(scorer, dict(identity), folder)

    @property
    def reference_wins(self) -> np.ndarray | None:
        """(N,) the reference's own win rate, prompt by prompt; None where it is not known."""
        return None if self.opponents is None else own_win_rates(self.opponents, self.config.evaluation.ties)

    @torch.no_grad()
    def look(self, policy: PairForward, step: int) -> Measurement:
        """Measure the policy as it is after `step` optimiser steps. Raises UserError where its weights are broken."""
        kl_sampling = SamplingSettings(**KL_SETTINGS, max_new_tokens=self.sampling.max_new_tokens)
        rows = self.prompts.rows
        samples = 1 if self.scorer is None else 2
        with progress(f"guard at step {step}", len(rows) * (samples + 2 * FORWARD)) as bar:
            bar.in_parts = True  # not all units of work are prompts
            drawn = self.draw_samples(policy.model, kl_sampling, f"kl/{step}", bar)
            metrics, kl = self._divergence(policy, drawn, bar)
            wins = None
            if self.scorer is not None:
                drawn = self.draw_samples(policy.model, self.sampling, f"policy/{step}", bar)
                bar.within = f"scoring {len(drawn)} responses"
                wins, more = self._win_rate(self.scorer, drawn)
                metrics |= more
        metrics["guard/length"] = self._length(drawn)
        if self.opponents_length is not None:
            metrics["guard/reference_length"] = self.opponents_length
        metrics["guard/truncated"] = float(np.mean([not record["finished"] for record in drawn]))
        return Measurement(metrics, kl, wins)

    def _length(self, drawn: Sequence[Record]) -> float:
        keep = self.config.evaluation.keep_thinking
        return float(np.mean([len(r["ids"]) if keep else r.get("answer_tokens", len(r["ids"])) for r in drawn]))

    def _divergence(self, policy: PairForward, drawn: Sequence[Record], bar: Bar) -> tuple[dict[str, float], float]:
        pairs = [(row["prompt_ids"], record["ids"]) for row, record in zip(self.prompts.rows, drawn, strict=True)]
        ours = Within(policy, lambda: numerics(self.config.align.precision))
        with self.reference.in_memory() as reference:
            rows = divergences(ours, reference, pairs, progress=lambda done: bar.update(2 * FORWARD * done))
            found = [values["kl"] for values in rows]
        interval = mean_interval(found, **self.bootstrap)
        return _named("kl", interval.mean, interval.low, interval.high), interval.mean

    def _win_rate(self, scorer: Scorer, drawn: Sequence[Record]) -> tuple[np.ndarray, dict[str, float]]:
        assert self.opponents is not None
        scores = scorer.score(self.scorer_rows(drawn))
        wins = win_rates(scores, self.opponents, self.config.evaluation.ties)
        interval = mean_interval(wins, **self.bootstrap)
        metrics = _named("win_rate", interval.mean, interval.low, interval.high)
        return wins, metrics | {"guard/reward": float(np.mean(scores))}

    @property
    def bootstrap(self) -> dict[str, Any]:
        """How intervals over the prompts are drawn."""
        settings = self.config.evaluation
        return {"resamples": settings.bootstrap, "confidence": settings.confidence, "seed": self.config.guard.seed}

    def _opponents(self, scorer: Scorer, identity: dict[str, Any], folder: Path) -> tuple[np.ndarray, float, float]:
        """(N, K) scores of the reference's samples, the share that was cut, their mean tokens; from disk where they are there."""
        k, config = self.config.guard.opponent_samples, self.config
        key = digest([FORMAT, identity, config.align.precision, asdict(self.sampling), config.guard.seed, k, self.prompts.key])
        samples, scores = Blocks(folder / SAMPLES), Blocks(folder / SCORES)
        if key not in samples:
            header = {"sampling": asdict(self.sampling), "seed": config.guard.seed, **self.prompts.shared}
            bar_of = progress("guard: opponents", k * len(self.prompts.rows))
            with self.reference.in_memory() as reference, reference.around(), bar_of as bar:
                samples.add("opponents", key, header, self.draw_samples(reference.model, self.sampling, "opponent", bar, k))
        drawn = samples[key]
        rows = self.scorer_rows(drawn)
        thought = any(row["response"] != record["text"] for row, record in zip(rows, drawn, strict=True))
        score_key = scores_key(key, self.prompts.block, digest([scorer.digest, "answers"]) if thought else scorer.digest)
        if score_key not in scores:
            with working("guard: scoring the opponents"):
                values = scorer.score(rows)
            found = [
                {"prompt_id": record["prompt_id"], "sample": record["sample"], "score": value}
                for record, value in zip(drawn, values, strict=True)
            ]
            scores.add("scores", score_key, {"of": key, "scorer": scorer.name, "scorer_digest": scorer.digest}, found)
        points = np.array([record["score"] for record in scores[score_key]]).reshape(-1, k)
        return points, float(np.mean([not record["finished"] for record in drawn])), self._length(drawn)

    def scorer_rows(self, drawn: Sequence[Record]) -> list[Record]:
        prompts = {row["prompt_id"]: row for row in self.prompts.rows}
        keep = self.config.evaluation.keep_thinking
        return [
            {**prompts[r["prompt_id"]], "id": r["prompt_id"], "finished": r["finished"]}
            | {"response": r["text"] if keep else parts_of(r, prompts[r["prompt_id"]]).answer}
            for r in drawn
        ]

    def draw_samples(self, model: nn.Module, sampling: SamplingSettings, purpose: str, bar: Bar, n: int = 1) -> list[Record]:
        """n records a prompt, prompt by prompt. purpose: part of the key of the random numbers, so that a look shares its
        luck neither with another look nor with its opponents."""
        purposes, seed = [f"guard/{purpose}/{k}" for k in range(n)], self.config.guard.seed
        with numerics(self.config.align.precision):
            return draw_records(model, self.prompts, self.prompts.rows, sampling, purposes, seed, self.batch_size, bar)


def _named(name: str, mean: float, low: float | None, high: float | None) -> dict[str, float]:
    found = {f"guard/{name}": mean}
    if low is not None and high is not None:
        found |= {f"guard/{name}_low": low, f"guard/{name}_high": high}
    return found
