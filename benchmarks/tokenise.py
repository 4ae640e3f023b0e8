"""How long do 100 000 pairs take from a file to token ids on disk, and how long when they lie there already?

    python benchmarks/tokenise.py --out docs/results/tokenise.json
    python benchmarks/tokenise.py --unique_prompts
    python benchmarks/tokenise.py --shuffled

Makes pairs of TL;DR's shape: prompts of about 330 tokens, responses of about 38, six pairs a post, neighbours or, with
--shuffled, anywhere; with --unique_prompts every prompt is another, the worst case. Their words are invented, with frequencies
that follow Zipf's law as those of a language do, and a BPE tokenizer of 32 000 tokens is trained on them. Then it does what a
run does: `load_pairs`, `tokenize_pairs` into a fresh cache, and once more from the cache. Prints and writes seconds, CPU
seconds of all threads, and the peak of memory. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets  # noqa: F401  (its import takes a second, and is no part of the measurement)
import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from isdaa.data import token_cache
from isdaa.data.reading.sources import load_pairs
from isdaa.data.tokenize_pairs import tokenize_pairs

SPECIAL = ["<|begin|>", "<|end|>"]
VOCABULARY = 32_000
WORDS = 40_000  # different ones
INVENTED = 0.005  # share of words that come once: names, slips of the pen
PROMPT_WORDS, RESPONSE_WORDS = 203, 22  # on average; their tokens are about 330 and 38
PAIRS_A_POST = 6
TRAINING_POSTS = 20_000  # what the tokenizer learns from
SYLLABLES = [a + b + c for a in ["", *"bcdfghjklmnprstvw", "th", "st", "ch"] for b in "aeiou" for c in ["", *"nrlst"]]


class Writer:
    """Text of invented words: the n-th word comes 1/n as often as the first, and rare words are longer."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        words: dict[str, None] = {}
        while len(words) < WORDS:
            words.setdefault(self._word(1 + min(3, len(words) // 200 + int(self.random.integers(2)))))
        self.words = np.array(list(words), dtype=object)
        self.cumulative = np.cumsum(1 / np.arange(1, WORDS + 1))

    def text(self, mean: int) -> str:
        """A few sentences of about `mean` words."""
        count = max(3, int(self.random.gamma(6, mean / 6)))
        drawn = self.random.random(count) * self.cumulative[-1]
        words = self.words[np.searchsorted(self.cumulative, drawn)]
        for place in np.flatnonzero(self.random.random(count) < INVENTED):
            words[place] = self._word(4)
        ends = self.random.random(count)
        words[ends < 0.07] += "."
        words[(ends > 0.07) & (ends < 0.12)] += ","
        words[(ends > 0.12) & (ends < 0.13)] += "'t"
        words[ends > 0.99] = str(count)
        return " ".join(words.tolist()).replace(". ", ".\n\n", 1).capitalize() + "."

    def post(self) -> str:
        """A prompt as TL;DR's."""
        return f"SUBREDDIT: r/relationships\n\nTITLE: {self.text(9)}\n\nPOST: {self.text(PROMPT_WORDS)}\n\nTL;DR:"

    def pairs(self, count: int, pairs_a_post: int) -> Iterator[dict[str, Any]]:
        """`count` pairs; those of a post are neighbours."""
        post = ""
        for i in range(count):
            if i % pairs_a_post == 0:
                post = self.post()
            yield {
                "id": str(i),
                "prompt": post,
                "chosen": f" {self.text(RESPONSE_WORDS)}",
                "rejected": f" {self.text(RESPONSE_WORDS)}",
            }

    def _word(self, syllables: int) -> str:
        return "".join(SYLLABLES[i] for i in self.random.integers(len(SYLLABLES), size=syllables))


def make_tokenizer(kind: str, texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """byte_level: words first, as GPT-2, Pythia, Llama 3; whole: merges over the whole text, as Llama 2."""
    backend = Tokenizer(models.BPE(byte_fallback=kind == "whole"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if kind == "whole":
        alphabet = [f"<0x{i:02X}>" for i in range(256)]
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for the training alone
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = SPECIAL + (alphabet if kind == "whole" else [])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=[] if kind == "whole" else alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if kind == "whole":
        content = json.loads(backend.to_str())
        content["pre_tokenizer"] = None
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]
        backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=SPECIAL[0], eos_token=SPECIAL[1])


class Clock:
    """Seconds and CPU seconds by part."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, float]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), _cpu()
        yield
        self.parts[name] = {"seconds": round(time.perf_counter() - wall, 2), "cpu_seconds": round(_cpu() - cpu, 2)}
        print(f"{name:<28} {self.parts[name]['seconds']:>8.2f} s {self.parts[name]['cpu_seconds']:>8.2f} s CPU", flush=True)

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time kept under `name`."""

        def timed(*arguments: Any) -> Any:
            with self.part(name):
                return function(*arguments)

        return timed


def _cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(
    rows: int, unique_prompts: bool = False, shuffled: bool = False, kind: str = "byte_level", seed: int = 0
) -> dict[str, Any]:
    """The numbers of one data set of `rows` pairs."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        source, cache = Path(folder) / "pairs.jsonl", Path(folder) / "cache"
        writer = Writer(seed)
        tokenizer = make_tokenizer(kind, (writer.post() for _ in range(TRAINING_POSTS)))
        lines = [json.dumps(pair) + "\n" for pair in writer.pairs(rows, 1 if unique_prompts else PAIRS_A_POST)]
        if shuffled:
            writer.random.shuffle(lines)
        source.write_text("".join(lines))
        del writer, lines
        tokenizer("the first call")
        before = _peak()
        with clock.part("read and check"):
            pairs, _ = load_pairs(str(source))
        read = _peak()
        with (
            patch.object(token_cache, "content_digest", clock.wrapped("  digest of the content", token_cache.content_digest)),
            patch.object(token_cache, "write_tokens", clock.wrapped("  write", token_cache.write_tokens)),
            clock.part("tokenise into a fresh cache"),
        ):
            result, counts = tokenize_pairs(pairs, tokenizer, cache_dir=cache)
        peak = _peak()
        with clock.part("tokenise from the cache"):
            again, _ = tokenize_pairs(pairs, tokenizer, cache_dir=cache)
        sample = result.select(range(0, len(result), max(1, len(result) // 500)))
        if sample[:] != again.select(range(0, len(again), max(1, len(again) // 500)))[:]:
            raise SystemExit("the cache gave other rows")
        lengths = {name: round(float(np.mean([len(ids) for ids in sample[name]])), 1) for name in ("prompt_ids", "chosen_ids")}
    fresh = clock.parts["read and check"]["seconds"] + clock.parts["tokenise into a fresh cache"]["seconds"]
    return {
        "rows": counts.rows,
        "kept": counts.kept,
        "boundary_merges": counts.boundary_merges,
        "unique_prompts": unique_prompts,
        "shuffled": shuffled,
        "tokenizer": kind,
        "vocabulary": len(tokenizer),
        "mean_tokens": lengths,
        "parts": clock.parts,
        "seconds": round(fresh, 2),
        "pairs_a_second": round(rows / fresh),
        "cores": len(os.sched_getaffinity(0)),
        "peak_mib": {"before": before, "after reading": read, "after tokenising": peak},
    }


def _peak() -> int:
    """MiB, the most that this process has had so far; making the data counts, too."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000, metavar="N")
    parser.add_argument("--unique_prompts", action="store_true", help="every pair has a prompt of its own")
    parser.add_argument("--shuffled", action="store_true", help="the pairs of a post lie anywhere")
    parser.add_argument("--tokenizer", choices=["byte_level", "whole"], default="byte_level")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    arguments = parser.parse_args(argv)
    result = measure(arguments.rows, arguments.unique_prompts, arguments.shuffled, arguments.tokenizer)
    print(json.dumps(result, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
