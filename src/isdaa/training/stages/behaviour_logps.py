"""`isdaa logps`: behaviour logps under the model that wrote the responses, added to a file of pairs."""

from __future__ import annotations

from pathlib import Path

from isdaa.config import TokenizationConfig
from isdaa.data.encoder import pair_digest, token_settings
from isdaa.data.pairs import Repeated
from isdaa.data.reading.sources import as_dataset, load_pairs
from isdaa.data.tokenize_pairs import tokenize_pairs
from isdaa.distributed import once
from isdaa.errors import UserError
from isdaa.files import located, write_jsonl
from isdaa.models.loading import load_model, load_tokenizer
from isdaa.models.packed.forward import prepare
from isdaa.terminal import say
from isdaa.training.stage_inputs import check_rows, device, logps_key
from isdaa.training.trainer.authors import foreign_text
from isdaa.training.trainer.batches import TOKEN_COLUMNS, TokenisedPairs
from isdaa.training.trainer.reference_logps import measure


def write_behaviour_logps(
    model_path: str, source: str, split: str, output: Path, tokenization: TokenizationConfig, repeated: Repeated = None
) -> None:
    """Write every usable pair of `source` with `behaviour_chosen_logps` and `behaviour_rejected_logps` (nats, summed).

    Pairs that would be cut are left out and counted: their logps would not be those of the whole response (docs/method.md).
    Raises UserError for bad input, and where `output` exists already.
    """
    output = Path(located(output))
    if output.exists():
        raise UserError(f"{output}: exists already; choose another --output")
    tokenizer = load_tokenizer(model_path)
    pairs, counts = once(lambda: load_pairs(source, split, repeated=repeated))
    rows = list(pairs)
    # Marking every row as one with behaviour logps makes the tokeniser drop it where it would be cut.
    marked = [
        {**row, "behaviour_tokens": None, "id": str(i), "behaviour_chosen_logps": 0.0, "behaviour_rejected_logps": 0.0}
        for i, row in enumerate(rows)
    ]
    settings = token_settings(tokenization)
    tokens, more = once(lambda: tokenize_pairs(as_dataset(marked), tokenizer, settings))
    model = load_model(model_path, device=device())
    check_rows(model, model_path, *TokenisedPairs(tokens).extent())
    forward = prepare(model)
    key = logps_key(model, forward.mode, tokenizer, settings)
    found = measure(forward, tokens, key=key, cache_dir=output.resolve().parent / ".isdaa_cache", progress="behaviour logps")
    with_logps = []
    for pair, c, r in zip(tokens, *found[:2], strict=True):
        kept = {name: value for name, value in rows[int(pair["id"])].items() if value is not None and name != "where"}
        logps = {"behaviour_chosen_logps": float(c), "behaviour_rejected_logps": float(r)}
        of = pair_digest(pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"])
        with_logps.append({**kept, **logps, "behaviour_tokens": of})
    once(lambda: write_jsonl(output, with_logps))
    unmarked = TokenisedPairs(tokens.select_columns(list(TOKEN_COLUMNS)))
    for line in (counts + more).lines() + foreign_text(found, unmarked, model_path):
        say(line)
    replaced = sum(row["behaviour_chosen_logps"] is not None for row in rows)
    if replaced:
        say(f"{replaced} rows had behaviour logps of their own, which are replaced")
    say(f"{len(tokens)} pairs with behaviour logps: {output}")
