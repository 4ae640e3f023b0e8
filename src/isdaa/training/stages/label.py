"""The `label` stage: responses of the policy to many prompts, scored and paired, in a file that `align` reads.

Works in blocks: each finished block of prompts is appended to `pairs/responses.jsonl`, so that a kill costs one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from isdaa.data.chat import stop_token_ids
from isdaa.data.encoder import token_settings
from isdaa.data.pairs import TEMPLATE_COLUMNS
from isdaa.data.reading.sources import as_dataset, load_prompts
from isdaa.data.tokenize_pairs import tokenize_pairs, tokenize_prompts
from isdaa.distributed import dealt, is_main, once, world_size
from isdaa.errors import UserError
from isdaa.evaluation import fragments
from isdaa.evaluation.scorers import Scorer, about, load_scorer
from isdaa.evaluation.scorers import facts as facts_of
from isdaa.files import append_jsonl, digest, whole_jsonl, write_json, write_jsonl
from isdaa.models.packed.forward import prepare
from isdaa.models.sampling.sampling import SamplingSettings, respond, text_of
from isdaa.models.saving import weights_digest
from isdaa.terminal import progress
from isdaa.training.disk_room import check_labels
from isdaa.training.run_folder import Run
from isdaa.training.stage_inputs import (
    cache_folder,
    check_rows,
    config_digest,
    decided,
    logps_key,
    policy_of,
    starting_path,
    tokenizer_of,
)
from isdaa.training.stages.pairing import label_prompt
from isdaa.training.trainer.reference_logps import reference_logps

BLOCK = 1000  # prompts of one process between two writes

Row = dict[str, Any]


def label(run: Run) -> Path:
    """Sample, score, pair. Returns the file of canonical pairs with token ids, rewards and behaviour logps."""
    config, settings = run.config, run.config.label
    folder = run.folder / "pairs"
    start = starting_path(run)
    tokenizer = tokenizer_of(config, start)
    rows = once(lambda: _prompts(run, tokenizer))
    model = policy_of(run, tokenizer, start)
    longest = max(len(row["prompt_ids"]) for row in rows) + settings.max_new_tokens
    check_rows(model, start, max(max(row["prompt_ids"]) for row in rows), longest)
    check_labels(run, rows)
    stop = {chat: stop_token_ids(tokenizer, chat=chat) for chat in {isinstance(row["prompt"], list) for row in rows}}
    weights = weights_digest(model)
    # A pair's tokens, at most; decided whether or not logps follow, since align goes by it.
    tokens = sum(len(row["prompt_ids"]) for row in rows) / len(rows) + 2 * settings.max_new_tokens
    precision = decided(run, "label", model, tokens).precision
    assert config.label_scorer is not None
    scorer = load_scorer(
        config.label_scorer,
        max_prompt_length=config.tokenization.max_prompt_length,
        position=config.scorer.position,
        label=config.scorer.label,
    )
    run.say("label", [f"scorer {scorer.name}: {line}" for line in about(scorer)])
    responses = _responses(run, rows, model, weights, tokenizer, stop, scorer, folder / "responses.jsonl")
    seed = config.seed if settings.seed is None else settings.seed
    pairs = []
    for row in rows:
        answers = [{**r, "text": _said(text_of(r["ids"], r["finished"], tokenizer), row)} for r in responses[str(row["id"])]]
        pairs += label_prompt(row, answers, settings, seed)
    if _is_plain_sampling(settings):
        pairs = _with_behaviour_logps(run, pairs, model, weights, tokenizer, precision)
    else:
        run.say("label", ["sampling was not at temperature 1 over all tokens: no behaviour logps are written"])
    finished = [answer["finished"] for row in rows for answer in responses[str(row["id"])]]
    cut = finished.count(False) / len(finished)
    different = sum(pair["chosen_reward"] != pair["rejected_reward"] for pair in pairs)
    worse = sum(pair["chosen_reward"] < pair["rejected_reward"] for pair in pairs)
    facts = {
        "prompts": len(rows),
        "pairs": len(pairs),
        "agreement": 1 - worse / max(different, 1),
        "chosen_lower": worse,
        "mean_reward": sum(p["chosen_reward"] + p["rejected_reward"] for p in pairs) / (2 * max(len(pairs), 1)),
        "truncated": sum(not p[f"{s}_finished"] for p in pairs for s in ("chosen", "rejected")) / (2 * max(len(pairs), 1)),
        "responses": len(finished),
        "cut": cut,
        "settings": settings.model_dump(),
        "scorer": facts_of(scorer),
        "model": start,
        "seed": seed,
    }
    once(lambda: write_jsonl(folder / "train.jsonl", pairs))
    once(lambda: write_json(folder / "label.json", facts))
    worth = "".join(f", and the reward model {line}" for line in about(scorer)[1:])
    run.say("label", [f"{len(pairs)} pairs{worth}", _lower(worse, len(pairs) - different, len(pairs), settings)])
    if fragments.many(cut):
        whose = f"its {len(finished)} responses"
        what = "they are scored, paired and trained on without their end"
        run.say("label", [f"warning: {fragments.warning({whose: [cut]}, what, 'label.max_new_tokens', settings.max_new_tokens)}"])
    return folder / "train.jsonl"


def _prompts(run: Run, tokenizer: Any) -> list[Row]:
    """Every prompt with its token ids."""
    config = run.config
    source = config.data.source("prompts")
    assert source is not None
    prompts, counts = load_prompts(
        source, config.data.prompts_split, limit=config.data.limit, repeated=config.data.prompt_repeated
    )
    ids, more = tokenize_prompts(prompts, tokenizer, token_settings(config.tokenization))
    run.say("label", (counts + more).lines())
    rows = [{**row, "prompt_ids": list(prompt)} for row, prompt in zip(prompts, ids, strict=True)]
    _check_ids(rows)
    return rows


def _check_ids(rows: Sequence[Row]) -> None:
    seen: set[str] = set()
    for row in rows:
        if str(row["id"]) in seen:
            raise UserError(f"{row['where']}: id {row['id']!r} occurs twice; responses are kept by id, so make ids unique")
        seen.add(str(row["id"]))


def _responses(
    run: Run,
    rows: Sequence[Row],
    model: Any,
    weights: str,
    tokenizer: Any,
    stop: Mapping[bool, set[int]],
    scorer: Scorer,
    path: Path,
) -> dict[str, list[Row]]:
    """`{prompt id: n responses with ids, finished, reward}`, from the file where they are there already."""
    settings = run.config.label
    seed = run.config.seed if settings.seed is None else settings.seed
    sampling = SamplingSettings(settings.temperature, settings.top_p, settings.top_k, settings.max_new_tokens)
    work = [weights, config_digest(model), asdict(sampling), settings.samples, seed, scorer.digest]
    # A record is used again only where it is what this very work would give.
    keys = {str(row["id"]): digest([*work, row["prompt"], row["tools"], list(row["prompt_ids"])]) for row in rows}
    kept = {str(record["id"]): record for record in _of_whole_blocks(once(lambda: whole_jsonl(path)))}
    found = {name: record["responses"] for name, record in kept.items() if record.get("key") == keys.get(name)}
    missing = [row for row in rows if str(row["id"]) not in found]
    with progress("label: sample and score", len(missing) * settings.samples // world_size()) as bar:

        def answered(block: Sequence[Row]) -> list[Row]:
            """One record a prompt."""
            answers = respond(
                model,
                tokenizer,
                [(row["prompt_ids"], isinstance(row["prompt"], list)) for row in block],
                sampling,
                stop,
                seed,
                [f"label/{row['id']}/{number}" for row in block for number in range(settings.samples)],
                batch_size=settings.batch_size,
                progress=bar,
                n=settings.samples,
            )
            flat = [row for row in block for _ in range(settings.samples)]
            judged = [
                {**row, "response": _said(answer.text, row), "finished": answer.finished}
                for row, answer in zip(flat, answers, strict=True)
            ]
            bar.within = f"scoring {len(judged)} responses"
            rewards = scorer.score(judged)
            bar.within = ""
            records = []
            for number, row in enumerate(block):
                of_row = range(number * settings.samples, (number + 1) * settings.samples)
                responses = [{"ids": list(answers[i].ids), "finished": answers[i].finished, "reward": rewards[i]} for i in of_row]
                records.append({"id": str(row["id"]), "key": keys[str(row["id"])], "responses": responses})
            return records

        for block in _blocks(missing, BLOCK * world_size()):
            records = dealt(block, answered)
            found |= {record["id"]: record["responses"] for record in records}
            if is_main():
                append_jsonl(path, [{**record, "block": str(block[0]["id"]), "of": len(block)} for record in records])
    return found


def _of_whole_blocks(records: Sequence[Row]) -> list[Row]:
    """The records whose block was written to its end: what is still missing then begins where a block began, and its batches
    are, bit for bit, those of a run left alone."""
    there: dict[Any, set[str]] = {}
    for record in records:
        there.setdefault(record.get("block"), set()).add(str(record["id"]))
    return [record for record in records if len(there[record.get("block")]) >= record.get("of", 0)]


def _blocks(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    """At most `size` prompts at a time; chat and plain prompts apart, since different tokens end their responses."""
    for chat in (False, True):
        alike = [row for row in rows if isinstance(row["prompt"], list) == chat]
        for first in range(0, len(alike), size):
            yield alike[first : first + size]


def _said(text: str, row: Row) -> Any:
    """A response as scorers and readers take it: one assistant message where the prompt is a conversation."""
    return [{"role": "assistant", "content": text}] if isinstance(row["prompt"], list) else text


def _is_plain_sampling(settings: Any) -> bool:
    """Whether the sampler drew from the model's own distribution, so that its logps are the behaviour's."""
    return settings.temperature == 1 and settings.top_p == 1 and settings.top_k == 0


def _with_behaviour_logps(run: Run, pairs: list[Row], model: Any, weights: str, tokenizer: Any, precision: str) -> list[Row]:
    """The pairs with μ's logps, by the very forward that training uses. Pairs that would be cut or are equal get none."""
    # A row that is marked as carrying behaviour logps is dropped where it would be cut: they are those of the whole response.
    marked = {"facts": None, "weight": None, "behaviour_chosen_logps": 0.0, "behaviour_rejected_logps": 0.0}
    marked |= dict.fromkeys(TEMPLATE_COLUMNS)
    known = [{k: v for k, v in pair.items() if k != "pairing"} for pair in pairs]
    rows = as_dataset([{**marked, **pair, "where": f"pair {pair['id']}"} for pair in known])
    settings = token_settings(run.config.tokenization)
    tokens, counts = once(lambda: tokenize_pairs(rows, tokenizer, settings))
    if counts.dropped_behaviour_cut:
        run.say("label", [f"{counts.dropped_behaviour_cut} pairs are longer than tokenization.max_length: no behaviour logps"])
    forward = prepare(model, longest_row=run.config.tokenization.max_length, precision=precision)
    chosen, rejected = reference_logps(
        forward,
        tokens,
        key=logps_key(model, forward.mode, tokenizer, settings, weights),
        cache_dir=cache_folder(run),
        precision=precision,
        progress="label: behaviour logps",
    )
    by_id = {name: (float(c), float(r)) for name, c, r in zip(tokens["id"], chosen, rejected, strict=True)}
    result = []
    for pair in pairs:
        logps = by_id.get(pair["id"])
        both = {} if logps is None else {"behaviour_chosen_logps": logps[0], "behaviour_rejected_logps": logps[1]}
        result.append({**pair, **both})
    if not by_id:
        raise UserError("label: no pair is left; the model gives the same response every time")
    return result


def _lower(worse: int, equal: int, pairs: int, settings: Any) -> str:
    """How many chosen responses have the lower score, and why."""
    why = "label.label: argmax"
    if settings.label == "sample":
        why = f"label.label: sample draws the chosen response with probability σ({settings.scale:g} · score difference)"
        if worse:
            why += ", as people's choices vary; argmax always takes the higher score"
    ties = f"; {equal} pairs with equal scores were decided by a fair coin" if equal else ""
    return f"the chosen response has the lower score in {worse} of {pairs} pairs ({why}){ties}"
