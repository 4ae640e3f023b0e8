"""From a loaded policy to the forward that trains it: logps of frozen models, weights before the first step, a new adapter.

The `align` stage and `preference_trainer` both go this way, in this order and with this cache key.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from isdaa.data.tokenize_pairs import TokenizationSettings, tokenizer_digest
from isdaa.distributed import once
from isdaa.errors import UserError
from isdaa.evaluation.vocabulary import check_tokenizers
from isdaa.files import write_json
from isdaa.foreign import read_json
from isdaa.models.loading import load_tokenizer
from isdaa.models.packed.forward import PairForward, prepare
from isdaa.objectives.presets import weighs_by_behaviour
from isdaa.training.stage_inputs import check_rows, coarse_weights, logps_key
from isdaa.training.stages.starting_weights import starting_weights
from isdaa.training.trainer.authors import foreign_text
from isdaa.training.trainer.batches import TokenisedPairs, own_logps
from isdaa.training.trainer.reference_logps import Loader, measure

OF_MODEL = ("weights", "config", "dtype", "mode")  # of `logps_key`, what a model and its way through the forward pass decide

Sets = list[TokenisedPairs]


@dataclass(frozen=True)
class Other:
    """A model that is not the policy. load: brings it into memory; name: for messages, empty for one that was made in memory.

    note: a file beside the logps that says what of their key the model's files decide, so that it need not be loaded for it.
    """

    load: Callable[[], Any]
    name: str
    note: Path | None = None


@dataclass(frozen=True)
class Preparation:
    """How policy, reference and behaviour model are prepared, and where their logps go.

    longest: tokens of the longest row of the forward. objective: arguments of `Objective`. mu: what was named as the model
    that wrote the responses. stage: in front of progress; say: takes lines.
    """

    tokenizer: Any
    tokenization: TokenizationSettings
    probe: bool
    attention: str
    longest: int
    precision: str
    cache_dir: Path
    objective: Mapping[str, Any]
    mu: str | None
    stage: str
    say: Callable[[Sequence[str]], Any]

    def forward(self, model: Any) -> PairForward:
        """The model, prepared for the forward that trains."""
        return prepare(model, probe=self.probe, longest_row=self.longest, attention=self.attention, precision=self.precision)

    def key(self, forward: PairForward, weights: str | None = None) -> dict[str, Any]:
        """`logps_key` of a prepared model. weights: its `weights_digest`, where it is known."""
        return logps_key(forward.model, forward.mode, self.tokenizer, self.tokenization, weights)

    def measure(self, forward: PairForward | Loader, key: dict[str, Any], pairs: TokenisedPairs, what: str) -> np.ndarray:
        """(6, N) sums of `reference_logps.measure`, which keeps them. what: for the progress bar."""
        options: Any = {"key": key, "cache_dir": self.cache_dir, "precision": self.precision}
        return measure(forward, pairs, progress=f"{self.stage}: {what}", **options)

    def with_logps(self, sets: Sets, sources: Mapping[str, Other | None], forward: PairForward, key: dict[str, Any]) -> Sets:
        """The sets with logps of each of `sources` (see `prepared`). forward, key: of the policy as it was loaded."""
        for which, other in sources.items():
            sets = self._filled(sets, which, forward, key) if other is None else self._filled_by(sets, which, other)
        return sets

    def _filled_by(self, sets: Sets, which: str, other: Other) -> Sets:
        """Logps under another model, which is loaded only where they are not in the cache, and let go again."""

        @cache
        def load() -> PairForward:
            model = other.load()
            for pairs in sets:
                check_rows(model, other.name, *pairs.extent())
            return self.forward(model)

        filled = self._filled(sets, which, load, self._key_of(load, other.note))
        del load  # and with it the model
        gc.collect()
        return filled

    def _key_of(self, load: Loader, note: Path | None) -> dict[str, Any]:
        known = None if note is None else once(partial(_noted, note))
        if known is not None:
            return {**known, "tokenizer": tokenizer_digest(self.tokenizer), "tokenization": asdict(self.tokenization)}
        key = self.key(load())
        if note is not None:
            once(partial(write_json, note, {name: key[name] for name in OF_MODEL}))
        return key

    def _filled(self, sets: Sets, which: str, forward: PairForward | Loader, key: dict[str, Any]) -> Sets:
        filled: Sets = []
        for pairs in sets:
            found = self.measure(forward, key, pairs, f"{which} logps")
            filled.append(pairs.with_reference(*found[:2]) if which == "reference" else pairs.with_behaviour(*found[:2]))
            wrote = (self.mu is None) == (which == "reference")
            if len(filled) == 1 and wrote and weighs_by_behaviour(self.objective):
                self.say(foreign_text(found, pairs, self.mu))
        return filled


@dataclass(frozen=True)
class Prepared:
    """What a trainer takes. own: (N,) whether a training pair came with behaviour logps of its own."""

    policy: Any
    forward: PairForward
    sets: Sets
    own: np.ndarray


def prepared(
    how: Preparation,
    policy: Any,
    sets: Sets,
    sources: Mapping[str, Other | None],
    *,
    rate: float,
    adapter: Callable[[Any], Any] | None = None,
    weights: str | None = None,
    allow_stall: bool = False,
    went_on: bool = False,
) -> Prepared:
    """The policy ready to be trained, and the pairs with all logps.

    Args:
        policy: as loaded; the first of `sets` trains it.
        sources: what gives the logps of `reference` and, where one is named, of `behaviour`; None: the policy as loaded.
        rate: the learning rate.
        adapter: puts a new one on the policy, after its logps were taken.
        weights: the policy's `weights_digest`, where it is known.
        allow_stall, went_on: as `starting_weights` has them.

    Raises:
        UserError: a model that does not go with the pairs.
        Stalled: hardly any pair would teach.
    """
    forward = how.forward(policy)
    key, own = how.key(forward, weights), own_logps(sets[0])
    sets = how.with_logps(sets, sources, forward, key)
    ours = None if sources["reference"] is None else partial(how.measure, forward, key, what="the policy's logps at the start")
    how.say(starting_weights(how.objective, sets[0], ours, own, how.mu, allow_stall, went_on))
    if adapter is not None:
        policy = adapter(policy)
        forward = how.forward(policy)  # probed again: what the base's probe found out must hold for the forward that trains
    how.say(coarse_weights(policy, rate))
    return Prepared(policy, forward, sets, own)


def check_vocabulary(path: str, model: Any, tokenizer: Any, which: str) -> None:
    """Raises UserError where the policy's token ids mean something else to the model at `path`, or nothing."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if vocabulary < len(tokenizer):
        raise UserError(
            f"{path}: its vocabulary ({vocabulary}) is smaller than that of the policy's tokenizer ({len(tokenizer)}); "
            "name a model that shares the policy's tokenizer"
        )
    try:
        own = load_tokenizer(path, require_eos=False)
    except UserError:
        return  # a folder of weights alone
    instead = "take a method without μ (docs/which_method.md)" if which == "behaviour" else "name another reference"
    advice = f"the {which} model must share the policy's tokenizer; {instead}"
    check_tokenizers(["the policy", path], [tokenizer, own], advice)


def _noted(note: Path) -> dict[str, str] | None:
    """What a note says; None where there is none that can be read."""
    with suppress(UserError, OSError):
        found = read_json(note)
        if isinstance(found, dict) and found.keys() == set(OF_MODEL) and all(isinstance(value, str) for value in found.values()):
            return found
    return None
