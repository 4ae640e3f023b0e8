"""Step three of three: from records to `metrics.json`. Reads files alone: no model, no scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isdaa.config import EvaluationConfig
from isdaa.errors import UserError
from isdaa.evaluation.answer_notes import thinking_of
from isdaa.evaluation.checkpoints.held_out import held_out_summary
from isdaa.evaluation.checkpoints.judged_table import JUDGE, JUDGED, JudgedTable
from isdaa.evaluation.checkpoints.kl import kl_summary
from isdaa.evaluation.checkpoints.sample_and_kl import PAIRS, PLAN, SAMPLES
from isdaa.evaluation.checkpoints.scoring import SCORES, chosen_key, scores_key
from isdaa.evaluation.checkpoints.win_rate import own_win_rates, tie_rate, win_rates
from isdaa.evaluation.fragments import percent
from isdaa.evaluation.judges.replies import parts_of
from isdaa.evaluation.records import METRICS, Blocks, Record, blocks_of, fitting, read_plan
from isdaa.evaluation.statistics import Interval, mean_interval
from isdaa.files import write_json
from isdaa.record import versions

NO_SCORER = "No scorer was given, so there is no win rate and no verdict: {no_measure}"
N_GRAM = 4


def no_measure(held_out: bool) -> str:
    """What the numbers that need no scorer do not say, and what would. held_out: whether pairs were measured."""
    what = "KL, drift and held-out accuracy do not tell" if held_out else "KL does not tell"
    return (
        f"{what} better from worse. Name a reward model with --scorer, a judge with --judge_model … --judge_base_url …, or your "
        "own scores with --scores FILE."
    )


def analyse(folder: str | Path, settings: EvaluationConfig | None = None) -> dict[str, Any]:
    """Metrics of the evaluation whose records lie in `folder`, also written to `metrics.json` there.

    settings: other `opponent`, `ties`, `bootstrap`, `confidence` than the records were made with.
    Raises UserError where records are missing.
    """
    folder = Path(folder)
    with fitting(folder):
        metrics = _metrics(folder, settings)
    write_json(folder / METRICS, metrics)
    return metrics


def _metrics(folder: Path, settings: EvaluationConfig | None) -> dict[str, Any]:
    plan = read_plan(folder / PLAN)
    settings = settings or EvaluationConfig(**plan["settings"])
    bootstrap = bootstrap_settings(settings)
    samples, pairs = (blocks_of(folder, name, plan) for name in (SAMPLES, PAIRS))
    prompts, reference = samples[plan["prompts"]], plan["reference"]
    judged = win_table(folder, plan, prompts, settings)

    def kept(block: str) -> list[Record]:
        """The records of the prompts that count."""
        records = samples[block]
        return [records[place] for place in judged.kept]

    origin = {
        "path": reference["path"],
        "digest": reference["digest"],
        "kl": Interval(0.0, 0.0, 0.0, len(judged.kept)).to_json(),
    }
    rows = {row["prompt_id"]: row for row in prompts}
    keep = bool(plan["settings"].get("keep_thinking"))
    drawn = [r for key in reference["opponents"] for r in kept(key)]
    origin |= judged.reference() | text_summary(drawn, bootstrap, rows, keep)
    models = []
    for model in plan["models"]:
        entry = {key: value for key, value in model.items() if key not in ("samples", "kl", "pairs", "stat")}
        entry["kl"] = kl_summary(kept(model["kl"]), **bootstrap)
        entry |= judged.policy(model["samples"]) | text_summary(kept(model["samples"]), bootstrap, rows, keep)
        if model["pairs"] is not None:
            entry["held_out"] = held_out_summary(pairs[model["pairs"]], pairs[reference["pairs"]], **bootstrap)
        models.append(entry)
    note = NO_SCORER.format(no_measure=no_measure(any("held_out" in entry for entry in models)))
    told: dict[str, Any] = {}
    if isinstance(judged, JudgedTable):
        lengths = [
            [answer_tokens(samples[model["samples"]][place], prompts[place], keep) for model in plan["models"]]
            for place in range(len(prompts))
        ]
        told["judged"] = judged.counts(lengths) | {"notes": judged.notes(lengths)}
    thinking = thinking_notes({"the reference": origin} | {entry["label"]: entry for entry in models}, keep)
    told |= {"thinking": {"kept": keep, "notes": thinking}} if thinking else {}
    return {
        "format": plan["format"],
        "scorer": plan["scorer"],
        "note": note if plan["scorer"] is None else "",
        "opponent": settings.opponent,
        "prompts": len(judged.kept),
        **told,
        "settings": settings.model_dump() | {"scorer": plan["scorer"]["name"] if plan["scorer"] is not None else None},
        "reference": origin,
        "models": models,
        **{key: plan[key] for key in ("tokenization", "template", "tokenizer", "git_revision")},
        **{key: plan[key] for key in ("one_run", "doubts", "left_out") if plan.get(key)},
        "versions": versions(),
    }


def bootstrap_settings(settings: EvaluationConfig) -> dict[str, Any]:
    """Keyword arguments of `statistics.mean_interval`."""
    return {"resamples": settings.bootstrap, "confidence": settings.confidence, "seed": settings.seed}


def win_table(folder: Path, plan: Record, prompts: Sequence[Record], settings: EvaluationConfig) -> WinTable | JudgedTable:
    """Win rates of the evaluation in `folder`, from the scores of its scorer or from what its judge said."""
    if (plan["scorer"] or {}).get("kind") == JUDGE:
        return JudgedTable(plan, prompts, blocks_of(folder, JUDGED, plan), settings, bootstrap_settings(settings))
    return WinTable(plan, prompts, blocks_of(folder, SCORES, plan), settings)


class WinTable:
    """Win rates and rewards, from the scores of one scorer; everything null without one. kept: the places of the prompts."""

    def __init__(self, plan: Record, prompts: Sequence[Record], scores: Blocks, settings: EvaluationConfig) -> None:
        self.plan, self.prompts, self.scores, self.settings = plan, prompts, scores, settings
        self.bootstrap = bootstrap_settings(settings)
        self.kept = range(len(prompts))
        self.opponents: np.ndarray | None = None
        self.chosen: np.ndarray | None = None
        self.with_chosen = [i for i, prompt in enumerate(prompts) if prompt["chosen"] is not None]
        check_opponent(prompts, settings)
        if plan["scorer"] is not None:
            self.opponents = np.stack([self._of(key) for key in plan["reference"]["opponents"]], axis=1)
            key = chosen_key(plan["prompts"], plan["scorer"]["digest"])
            if self.with_chosen and (settings.opponent == "chosen" or key in scores):  # a file of scores need not hold them
                self.chosen = np.array([record["score"] for record in scores[key]])

    def _of(self, samples: str) -> np.ndarray:
        """(N,) scores of a block of samples."""
        return np.array(
            [r["score"] for r in self.scores[scores_key(samples, self.plan["prompts"], self.plan["scorer"]["digest"])]]
        )

    def policy_rows(self, samples: str) -> tuple[np.ndarray, np.ndarray]:
        """Per prompt, win rate against the chosen opponent and points of one checkpoint, each (N,). Needs a scorer."""
        assert self.opponents is not None
        ours = self._of(samples)
        if self.settings.opponent == "chosen":
            assert self.chosen is not None  # check_opponent: every prompt has a chosen response
            return win_rates(ours, self.chosen, self.settings.ties), ours
        return win_rates(ours, self.opponents, self.settings.ties), ours

    def reference_rows(self) -> np.ndarray | None:
        """(N,) the reference's own win rate, prompt by prompt; None where it is not known. Needs a scorer."""
        assert self.opponents is not None
        if self.settings.opponent == "chosen":
            assert self.chosen is not None
            return win_rates(self.opponents, self.chosen, self.settings.ties)
        return own_win_rates(self.opponents, self.settings.ties)

    def policy(self, samples: str) -> dict[str, Any]:
        """Of one checkpoint."""
        return self._summary(self._of(samples) if self.opponents is not None else None, of_reference=False)

    def reference(self) -> dict[str, Any]:
        """Of the reference: its samples against each other, which is where every run starts."""
        return self._summary(self.opponents, of_reference=True)

    def _summary(self, ours: np.ndarray | None, of_reference: bool) -> dict[str, Any]:
        found: dict[str, Any] = dict.fromkeys(("win_rate", "win_rate_reference", "win_rate_chosen", "tie_rate", "reward"))
        if ours is None or self.opponents is None:
            return found
        ties = self.settings.ties
        against: dict[str, np.ndarray | None] = {
            "win_rate_reference": own_win_rates(ours, ties) if of_reference else win_rates(ours, self.opponents, ties)
        }
        found["tie_rate"] = None if of_reference else tie_rate(ours, self.opponents)
        if self.chosen is not None:
            against["win_rate_chosen"] = win_rates(ours[self.with_chosen], self.chosen, ties)
            if self.settings.opponent == "chosen":
                found["tie_rate"] = tie_rate(ours[self.with_chosen], self.chosen)
        for name, values in against.items():
            found[name] = None if values is None else mean_interval(values, **self.bootstrap).to_json()
        found["win_rate"] = found[f"win_rate_{self.settings.opponent}"]
        per_prompt = ours if ours.ndim == 1 else ours.mean(axis=1)
        found["reward"] = mean_interval(per_prompt, **self.bootstrap).to_json()
        return found


def check_opponent(prompts: Sequence[Record], settings: EvaluationConfig) -> None:
    """Raises UserError where the data's chosen responses are to be the opponent and a prompt has none."""
    missing = sum(prompt["chosen"] is None for prompt in prompts)
    if settings.opponent == "chosen" and missing:
        raise UserError(
            f"evaluation.opponent is `chosen`, but {missing} of {len(prompts)} prompts have no chosen response; "
            "use `reference`, or data with a chosen response for every prompt"
        )


def text_summary(
    records: Sequence[Record], bootstrap: Mapping[str, Any], rows: Mapping[str, Record], keep: bool = False
) -> dict[str, Any]:
    """Length of the answers in tokens (with interval), share of samples that the limit cut, mean share of repeated 4-grams.

    rows: the prompts by id. keep: thinking counts as answer. Repetition is of all that was written. thinking: how much of
    it that is (`benchmark_notes.thinking_of`); left out where there is none.
    """
    prompts: dict[str, list[float]] = {}
    for record in records:
        tokens = answer_tokens(record, rows[record["prompt_id"]], keep)
        prompts.setdefault(record["prompt_id"], []).append(tokens)
    thinking = thinking_of([parts_of(record, rows[record["prompt_id"]]) for record in records])
    lengths = [float(np.mean(tokens)) for tokens in prompts.values()]
    return {
        "length": mean_interval(lengths, **bootstrap).to_json(),
        "truncated": sum(not record["finished"] for record in records) / len(records),
        "repetition": float(np.mean([repetition(record["ids"]) for record in records])),
        **({"thinking": thinking} if thinking is not None else {}),
    }


def answer_tokens(record: Record, prompt: Record, keep: bool) -> float:
    """Tokens of a sample without its thinking; of records that do not tell them, by its share of the characters."""
    parts = parts_of(record, prompt)
    if keep or not parts.marked:
        return float(record["tokens"])
    written = len(parts.thinking) + len(parts.answer)
    return float(record.get("answer_tokens", record["tokens"] * len(parts.answer) / max(written, 1)))


def thinking_notes(entries: Mapping[str, Mapping[str, Any]], keep: bool) -> list[str]:
    """What a reader must know of models that think aloud, a sentence each. entries: by label."""
    found = {label: entry["thinking"] for label, entry in entries.items() if entry.get("thinking")}
    if not found:
        return []
    shares = [told["share"] for told in found.values()]
    low, high = percent(min(shares)), percent(max(shares))
    share = high if low == high else f"{low.removesuffix(' %')} to {high}"
    does = "is scored and counted with the answers" if keep else "is neither scored nor counted as length"
    lines = [f"Thinking is {share} of the characters that the models wrote; it {does}. KL is of all tokens."]
    only = [f"{label} {told['only']}" for label, told in found.items() if told["only"]]
    cut = sum(told["unfinished"] for told in found.values())
    if only:
        way = "raise --evaluation.max_new_tokens, or --keep_thinking where these are the answers"
        way = f"; {cut} of them never end it: {way}" if cut else ""
        lines.append(f"Samples that are thinking alone, without an answer: {', '.join(only)}{way}.")
    return lines


def repetition(ids: Sequence[int], n: int = N_GRAM) -> float:
    """Share of a response's n-grams that stood in it before; 0 where it has none."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
