"""Logps of a frozen model on the pairs: the reference's and the behaviour policy's, computed once and kept on disk.

The numbers come from the very forward that training uses (docs/method.md), and the file's name from everything they depend
on: the model's weights, the token ids, the numerics. Runs share the files. While they are computed, what there is so far lies
beside the file, so that a kill loses less than a minute of it.
"""

from __future__ import annotations

import fcntl
import heapq
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isdaa.distributed import everyones, is_main, rank, world_size
from isdaa.errors import UserError
from isdaa.files import digest, own_file, write_atomically
from isdaa.models.attention.layout import Layout
from isdaa.models.packed.forward import PairForward, ResponseLogps, pass_tokens
from isdaa.models.packed.patched_forward import SHARED_PREFIX
from isdaa.models.packed.token_batches import by_tokens
from isdaa.terminal import progress as show_progress
from isdaa.training.trainer.batches import TokenisedPairs, tokenised
from isdaa.training.trainer.packing import packed

logger = logging.getLogger(__name__)

FORMAT = 3  # raise it whenever the forward pass changes what it computes: older files are then not read
# Sums over a response: of log π(y), of π(y), and of what π(y) is on average where y is drawn from π, Σ_v π(v)².
NAMES = ("chosen_logps", "rejected_logps", "chosen_probability", "rejected_probability", "chosen_own", "rejected_own")
ROWS = "rows"  # digests of the pairs, by which another set finds those that it shares
PART_SECONDS = 20.0  # between two writes of what there is so far: what a kill can lose, beside the batch in work

Loader = Callable[[], PairForward]


def reference_logps(forward: PairForward | Loader, pairs: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Summed logps of all chosen and all rejected responses, each (N,) float32, in the rows' order. options: of `measure`."""
    chosen, rejected, *_ = measure(forward, pairs, **options)
    return chosen, rejected


def measure(
    forward: PairForward | Loader,
    pairs: Any,
    *,
    key: dict[str, Any],
    cache_dir: str | Path | None,
    batch_tokens: int | None = None,
    precision: str = "float32",
    progress: str = "reference logps",
) -> np.ndarray:
    """(6, N) float32 sums over each response, as `NAMES` has them; the last four are 0 where the head does not give them.

    forward: the prepared model, or a function that loads and prepares it, called only where something is to compute.
    pairs: `TokenisedPairs` or rows for it.
    key: what identifies the model and the text's way to tokens: its weights' digest, dtype, tokenizer, template,
        truncation. Token ids, precision, versions and device are added here.
    cache_dir: None computes without reading or writing. A file that is damaged or another's is recomputed, with a word. One of
        a set that has all these pairs will do: `label` has computed the logps of what `align` trains on.
    batch_tokens: of a forward pass, every prompt counted once; None: `models.packed.forward.pass_tokens`.
    precision: "bfloat16" runs under autocast, as training with `precision: bfloat16` does.
    """
    rows = tokenised(pairs)
    full = cache_key(rows, key, precision)
    path = None if cache_dir is None else Path(cache_dir) / f"logps-{digest(full)}.safetensors"
    if path is not None:
        found = read_cache(path, full, len(rows))
        if found is None and (found := _part_of_another(path, full, rows)) is not None and is_main():
            write_cache(path, full, found, rows)
        # One that computes alone would wait for the others for ever.
        if all(everyones(lambda: found is not None)) and found is not None:
            return found
    with _alone(path) if path is not None and world_size() == 1 else nullcontext() as waited:
        if path is not None and waited:  # for another run, which wanted the same
            found = read_cache(path, full, len(rows))
            if found is not None:
                return found
        prepared = forward if isinstance(forward, PairForward) else forward()
        values = computed_logps(prepared, rows, batch_tokens, precision, progress, path, full)
        if path is not None and is_main():
            write_cache(path, full, values, rows)
            for part in path.parent.glob(f".{path.name}.part-*"):
                part.unlink(missing_ok=True)
    return values


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """While no other process computes what will lie at `path`. Gives whether one did, and was waited for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(own_file(path.parent / f".{path.name}.lock"), "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            waited = False
        except OSError:
            fcntl.flock(lock, fcntl.LOCK_EX)
            waited = True
        yield waited


def cache_key(pairs: TokenisedPairs, key: dict[str, Any], precision: str) -> dict[str, Any]:
    """Everything that the logps depend on, as JSON-able data."""
    import transformers

    return {
        **key,
        "format": FORMAT,
        "pairs": pairs.content_digest(),
        "precision": precision,
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def write_cache(path: Path, key: dict[str, Any], values: np.ndarray, pairs: TokenisedPairs | None = None) -> None:
    """Write (6, N) values, the key and a digest of the content as one file, atomically; with the digests of `pairs`."""
    from safetensors.numpy import save

    values = np.ascontiguousarray(values)  # of a row with strides safetensors writes other numbers
    arrays = dict(zip(NAMES, values, strict=True)) | ({} if pairs is None else {ROWS: pairs.row_digests()})
    metadata = {"key": json.dumps(key, sort_keys=True), "content": _content(arrays)}
    write_atomically(path, save(arrays, metadata=metadata))


def read_cache(path: Path, key: dict[str, Any], rows: int) -> np.ndarray | None:
    """(6, rows) values, or None where there is no such file, or one that cannot be trusted (which is logged)."""
    found = _read(path, key, rows)
    return None if found is None else np.stack([found[name] for name in NAMES])


def _part_of_another(path: Path, key: dict[str, Any], pairs: TokenisedPairs) -> np.ndarray | None:
    """The values out of a file that differs in its pairs alone and has all of these; the same pair has the same numbers there."""
    from safetensors import SafetensorError, safe_open

    wanted = None
    for other in sorted(path.parent.glob("logps-*.safetensors")):
        try:
            with safe_open(other, framework="numpy") as file:
                theirs = json.loads((file.metadata() or {}).get("key", "null"))
                names = file.keys()
                rows = file.get_slice(ROWS).get_shape()[0] if ROWS in names else 0
        except (SafetensorError, OSError, ValueError, TypeError):
            continue
        if not isinstance(theirs, dict) or rows < len(pairs) or {**theirs, "pairs": key["pairs"]} != json.loads(json.dumps(key)):
            continue
        found = _read(other, theirs, rows)
        if found is None:
            continue
        places = {digest.tobytes(): place for place, digest in enumerate(found[ROWS])}
        wanted = [row.tobytes() for row in pairs.row_digests()] if wanted is None else wanted
        if all(digest in places for digest in wanted):
            return np.stack([found[name] for name in NAMES])[:, [places[digest] for digest in wanted]]
    return None


def _read(path: Path, key: dict[str, Any], rows: int) -> dict[str, np.ndarray] | None:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            found = {name: file.get_tensor(name) for name in names}
        wrong = None
        if json.loads(metadata.get("key", "null")) != json.loads(json.dumps(key)):
            wrong = "it belongs to another model, data set or version"
        elif any(found[name].shape != (rows,) or found[name].dtype != np.float32 for name in NAMES):
            wrong = f"its arrays are not of {rows} pairs"
        elif metadata.get("content") != _content(found):
            wrong = "its content is damaged"
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        wrong = f"it cannot be read ({error})"
    if wrong is None:
        return found
    logger.warning("%s: cached logps are not used, since %s; they are computed again", path, wrong)
    return None


def _content(arrays: dict[str, np.ndarray]) -> str:
    return digest(b"".join(np.ascontiguousarray(arrays[name]).tobytes() for name in sorted(arrays)))


@torch.no_grad()
def computed_logps(
    forward: PairForward,
    pairs: TokenisedPairs,
    batch_tokens: int | None,
    precision: str,
    description: str,
    path: Path | None,
    key: dict[str, Any],
) -> np.ndarray:
    """One pass over this process's share of the pairs, then everyone's results together. path, key: of the file to come."""
    lengths = pairs.lengths()
    prompts = pairs.prompt_groups() if forward.mode == SHARED_PREFIX else np.arange(len(pairs))  # two rows share nothing
    # Prompt by prompt, so that its pairs share it; those with the longest pair first, so that what does not fit into
    # memory fails at once and like lengths share a batch.
    longest = np.zeros(len(pairs), dtype=np.int64)
    np.maximum.at(longest, prompts, lengths)
    order = np.lexsort((prompts, -longest[prompts]))
    if world_size() > 1:
        order = order[shares_of(pairs, prompts, world_size())[prompts[order]] == rank()]

    batch_tokens = batch_tokens or pass_tokens(forward.model)
    prompt_tokens = np.diff(pairs.tokens["prompt_ids"][1])
    repeated = np.append(False, np.diff(prompts[order]) == 0)  # behind a pair of the same prompt
    shared = (repeated * prompt_tokens[order]).tolist()
    groups, part = [order[batch] for batch in by_tokens(lengths[order].tolist(), batch_tokens, shared)], None
    if path is not None:
        key = {**key, "order": digest(order.tobytes()), "batch_tokens": batch_tokens}  # of them every batch's numerics
        part = _Part(path.parent / f".{path.name}.part-{digest(key)}", key, len(pairs))

    def share() -> np.ndarray:
        return _share(forward, pairs, groups, lengths, precision, description, part)

    values = np.stack(everyones(share)).sum(axis=0, dtype=np.float32)  # every row is another process's zero
    bad = np.argwhere(~np.isfinite(values[:2]).all(axis=0))[:, 0]
    if len(bad):
        name = pairs.name(int(bad[0]))
        raise UserError(f"{description}: {len(bad)} pairs have logps that are not finite, the first is row {bad[0]} ({name})")
    return values


class _Part:
    """The values that there are so far, (2, N) float32 with NaN for the rest, kept on disk as they grow."""

    def __init__(self, path: Path, key: dict[str, Any], rows: int) -> None:
        self.path, self.key, self.rows = path, key, rows
        self._written, self._every = time.monotonic(), PART_SECONDS

    def read(self) -> np.ndarray:
        """What an earlier process left; NaN throughout where it left nothing, or what is damaged."""
        found = read_cache(self.path, self.key, self.rows)
        return np.full((len(NAMES), self.rows), np.nan, dtype=np.float32) if found is None else found

    def keep(self, values: np.ndarray) -> None:
        """Write them, where the last time is long enough ago: at most about every hundredth second is spent on it."""
        begun = time.monotonic()
        if begun - self._written >= self._every:
            write_cache(self.path, self.key, values)
            self._written = time.monotonic()
            self._every = min(max(PART_SECONDS, 100 * (self._written - begun)), 2 * PART_SECONDS)


def _share(
    forward: PairForward,
    pairs: TokenisedPairs,
    groups: list[np.ndarray],
    lengths: np.ndarray,
    precision: str,
    description: str,
    part: _Part | None,
) -> np.ndarray:
    """(6, N) values of the rows in `groups`, 0 elsewhere."""
    model: nn.Module = forward.model
    device = next(model.parameters()).device
    values = np.full((len(NAMES), len(pairs)), np.nan, dtype=np.float32) if part is None else part.read()
    was_training = model.training
    model.eval()
    try:
        with (
            show_progress(description, total=float(sum(lengths[group].sum() for group in groups))) as bar,
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"),
        ):
            for group in groups:
                if np.isnan(values[:, group]).any():  # batches stay as they are, so that their bits do
                    input_ids, layout = packed(pairs.batch(group))
                    logps = forward(model, input_ids.to(device), None, layout, with_wpo=True)
                    values[:, group] = _sums(logps, layout).float().cpu().numpy()
                    if part is not None:
                        part.keep(values)
                bar.update(float(lengths[group].sum()))
    finally:
        model.train(was_training)
    mine = np.concatenate([*groups, np.zeros(0, dtype=np.int64)])
    shared = np.zeros_like(values)
    shared[:, mine] = values[:, mine]
    return shared


def _sums(logps: ResponseLogps, layout: Layout) -> Tensor:
    """(6, B) sums over the responses of a pass's pairs, as `NAMES` has them."""
    chosen, rejected = (layout.on(logps.logps.device, name) for name in ("chosen", "rejected"))
    found = [logps.chosen_logps, logps.rejected_logps]
    if logps.token_wpo is None:
        return torch.stack([*found, *[torch.zeros_like(found[0])] * 4])
    for tokens in (logps.token_logps, logps.token_logps - logps.token_wpo):
        sums = layout.response_sums(tokens.exp())
        found += [sums[chosen], sums[rejected]]
    return torch.stack(found)


def shares_of(pairs: TokenisedPairs, prompts: np.ndarray, world: int) -> np.ndarray:
    """Which process has the pairs of each prompt: all have about as many tokens to compute. prompts: (N,) of each pair.

    The prompts with most tokens first, each to where the fewest are so far.
    """
    own, first = pairs.lengths(), np.unique(prompts, return_index=True)[1]
    prompt = np.diff(pairs.tokens["prompt_ids"][1])
    tokens = np.bincount(prompts, own - prompt).astype(np.int64) + prompt[first]
    shares, heap = np.zeros(len(tokens), dtype=np.int64), [(0, process) for process in range(world)]
    for group in np.argsort(-tokens, kind="stable").tolist():
        so_far, shares[group] = heapq.heappop(heap)
        heapq.heappush(heap, (so_far + int(tokens[group]), int(shares[group])))
    return shares
