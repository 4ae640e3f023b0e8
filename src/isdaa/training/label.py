"""The `label` stage: responses of the policy to many prompts, scored and paired, in a file that `align` reads.

Works in blocks: each finished block of prompts is appended to `pairs/responses.jsonl`, so that a kill costs one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from isdaa.data.chat import stop_token_ids
from isdaa.data.sources import as_dataset, load_prompts
from isdaa.data.tokenization import tokenize_pairs, tokenize_prompts
from isdaa.errors import UserError
from isdaa.evaluation.scorers import load_scorer
from isdaa.files import append_jsonl, whole_jsonl, write_json, write_jsonl
from isdaa.models.forward import prepare
from isdaa.models.sampling import SamplingSettings, sample
from isdaa.terminal import progress
from isdaa.training.labelling import label_prompt
from isdaa.training.reference import reference_logps
from isdaa.training.run import Run
from isdaa.training.start import cache_folder, logps_key, policy_of, starting_path, token_settings, tokenizer_of

BLOCK = 1000  # prompts between two writes

Row = dict[str, Any]


def label(run: Run) -> Path:
    """Sample, score, pair. Returns the file of canonical pairs with token ids, rewards and behaviour logps."""
    config, settings = run.config, run.config.label
    assert config.data.prompts is not None and settings.scorer is not None
    folder = run.folder / "pairs"
    start = starting_path(run)
    tokenizer = tokenizer_of(config, start)
    prompts, counts = load_prompts(config.data.prompts, config.data.prompts_split, limit=config.data.limit)
    ids, more = tokenize_prompts(prompts, tokenizer, token_settings(config))
    run.say("label", (counts + more).lines())
    rows = [{**row, "prompt_ids": list(prompt)} for row, prompt in zip(prompts, ids, strict=True)]
    _check_ids(rows)
    model = policy_of(run, tokenizer, start)
    responses = _responses(run, rows, model, tokenizer, folder / "responses.jsonl")
    seed = config.seed if settings.seed is None else settings.seed
    pairs = [
        pair
        for row in rows
        for pair in label_prompt(row, [_with_text(r, row, tokenizer) for r in responses[str(row["id"])]], settings, seed)
    ]
    if _is_plain_sampling(settings):
        pairs = _with_behaviour_logps(run, pairs, model, tokenizer)
    else:
        run.say("label", ["sampling was not at temperature 1 over all tokens: no behaviour logps are written"])
    facts = {
        "prompts": len(rows),
        "pairs": len(pairs),
        "agreement": _agreement(pairs),
        "mean_reward": sum(p["chosen_reward"] + p["rejected_reward"] for p in pairs) / (2 * max(len(pairs), 1)),
        "truncated": sum(not p[f"{s}_finished"] for p in pairs for s in ("chosen", "rejected")) / (2 * max(len(pairs), 1)),
        "settings": settings.model_dump(),
        "model": start,
        "seed": seed,
    }
    write_jsonl(folder / "train.jsonl", pairs)
    write_json(folder / "label.json", facts)
    run.say("label", [f"{len(pairs)} pairs; the label agrees with the reward in {facts['agreement']:.0%} of them"])
    return folder / "train.jsonl"


def _check_ids(rows: Sequence[Row]) -> None:
    seen: set[str] = set()
    for row in rows:
        if str(row["id"]) in seen:
            raise UserError(f"{row['where']}: id {row['id']!r} occurs twice; responses are kept by id, so make ids unique")
        seen.add(str(row["id"]))


def _responses(run: Run, rows: Sequence[Row], model: Any, tokenizer: Any, path: Path) -> dict[str, list[Row]]:
    """`{prompt id: n responses with ids, finished, reward}`, from the file where they are there already."""
    settings = run.config.label
    assert settings.scorer is not None
    seed = run.config.seed if settings.seed is None else settings.seed
    found = {str(record["id"]): record["responses"] for record in whole_jsonl(path)}
    missing = [row for row in rows if str(row["id"]) not in found]
    scorer = load_scorer(settings.scorer, max_prompt_length=run.config.tokenization.max_prompt_length)
    sampling = SamplingSettings(settings.temperature, settings.top_p, settings.top_k, settings.max_new_tokens)
    with progress("label: sample and score", len(missing) * settings.samples) as bar:
        for block in _blocks(missing):
            answers = sample(
                model,
                [row["prompt_ids"] for row in block],
                sampling,
                stop_token_ids(tokenizer, chat=isinstance(block[0]["prompt"], list)),
                tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                seed,
                [f"label/{row['id']}/{number}" for row in block for number in range(settings.samples)],
                batch_size=settings.batch_size,
                progress=bar,
                n=settings.samples,
            )
            flat = [row for row in block for _ in range(settings.samples)]
            judged = [
                {**row, "response": _text(answer.ids, row, tokenizer), "finished": answer.finished}
                for row, answer in zip(flat, answers, strict=True)
            ]
            rewards = scorer.score(judged)
            records = []
            for number, row in enumerate(block):
                of_row = range(number * settings.samples, (number + 1) * settings.samples)
                responses = [{"ids": list(answers[i].ids), "finished": answers[i].finished, "reward": rewards[i]} for i in of_row]
                records.append({"id": str(row["id"]), "responses": responses})
                found[str(row["id"])] = responses
            append_jsonl(path, records)
    return found


def _blocks(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """At most `BLOCK` prompts at a time; chat and plain prompts apart, since different tokens end their responses."""
    for chat in (False, True):
        alike = [row for row in rows if isinstance(row["prompt"], list) == chat]
        for first in range(0, len(alike), BLOCK):
            yield alike[first : first + BLOCK]


def _text(ids: Sequence[int], prompt: Row, tokenizer: Any) -> Any:
    """A response as text, or as one assistant message where the prompt is a conversation; for reading and for scorers."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if not isinstance(prompt["prompt"], list):
        return text
    return [{"role": "assistant", "content": text}]


def _with_text(response: Row, prompt: Row, tokenizer: Any) -> Row:
    return {**response, "text": _text(response["ids"], prompt, tokenizer)}


def _is_plain_sampling(settings: Any) -> bool:
    """Whether the sampler drew from the model's own distribution, so that its logps are the behaviour's."""
    return settings.temperature == 1 and settings.top_p == 1 and settings.top_k == 0


def _with_behaviour_logps(run: Run, pairs: list[Row], model: Any, tokenizer: Any) -> list[Row]:
    """The pairs with μ's logps, by the very forward that training uses. Pairs that training would drop get none."""
    rows = as_dataset([{**canonical_defaults(), **pair, "where": f"pair {pair['id']}"} for pair in pairs])
    tokens, _ = tokenize_pairs(rows, tokenizer, token_settings(run.config))
    key = logps_key(run.config, model, tokenizer)
    chosen, rejected = reference_logps(
        lambda: prepare(model), tokens, key=key, cache_dir=cache_folder(run), progress="label: behaviour logps"
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


def canonical_defaults() -> Row:
    """Every column of a canonical pair that a sampled pair may lack."""
    return {"facts": None, "behaviour_chosen_logps": None, "behaviour_rejected_logps": None, "weight": None}


def _agreement(pairs: Sequence[Row]) -> float:
    """Share of pairs with different rewards in which the chosen one has the larger."""
    different = [p for p in pairs if p["chosen_reward"] != p["rejected_reward"]]
    return sum(p["chosen_reward"] > p["rejected_reward"] for p in different) / max(len(different), 1)
