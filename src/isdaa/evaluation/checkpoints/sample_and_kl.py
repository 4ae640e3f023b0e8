"""Step one of three, all that needs a policy: samples, KL and held-out logps of checkpoints, as records on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isdaa.config import EvaluationConfig
from isdaa.data.encoder import Encoder, TokenizationSettings
from isdaa.distributed import dealt, once, world_size
from isdaa.errors import UserError
from isdaa.evaluation.checkpoint import Checkpoint
from isdaa.evaluation.checkpoints.kl import KL_SETTINGS, divergences
from isdaa.evaluation.judges.replies import TAIL, opened_by, parts_of
from isdaa.evaluation.model_digest import model_digest, stat_of
from isdaa.evaluation.records import Blocks, Record, blocks_of
from isdaa.evaluation.vocabulary import Vocabulary
from isdaa.files import digest, write_json
from isdaa.record import git_revision, relative_to, versions
from isdaa.terminal import Bar, progress, working

if TYPE_CHECKING:
    from isdaa.models.sampling.sampling import SamplingSettings

SAMPLES, PAIRS, PLAN = "samples.jsonl", "pairs.jsonl", "plan.json"
FORWARD = 0.1  # work of one forward pass over a response, in samples
FORMAT = 2  # of the records; raise it when the same work would give other records


@dataclass(frozen=True)
class Prompts:
    """The held-out prompts, tokenised once for every model. N prompts."""

    rows: list[Record]  # prompt_id, prompt, prompt_ids, chosen, facts, chat
    stop: dict[bool, set[int]]  # ids that end a response, in chat and elsewhere
    tokenizer: Any
    shared: Record  # what every header says of prompts and tokenizer

    @cached_property
    def key(self) -> str:
        """Digest of what the models see."""
        return digest([FORMAT, "prompts", [[row["prompt_id"], row["prompt_ids"]] for row in self.rows], self.shared["tokenizer"]])

    @cached_property
    def block(self) -> str:
        """Key of the records, which hold what scorers see, too."""
        return digest([self.key, self.rows])


def tokenize(
    rows: Iterable[Mapping[str, Any]], tokenizer: Any, settings: EvaluationConfig, tokenization: TokenizationSettings
) -> Prompts:
    """The first `settings.prompts` canonical prompt rows, as token ids. Raises UserError where there is none."""
    from isdaa.data.chat import stop_token_ids, template_hash, tokenizer_digest
    from isdaa.data.pairs import TEMPLATE_COLUMNS

    rows = [dict(row) for _, row in zip(range(settings.prompts), rows, strict=False)]
    if not rows:
        raise UserError("no prompt to evaluate on; give held-out prompts with --data")
    encoder = Encoder(tokenizer, tokenization)
    records, seen = [], set()
    for row, prompt in zip(rows, encoder.prompts(rows), strict=True):
        identity = str(row["id"])
        if identity in seen:
            raise UserError(f"{row.get('where', 'prompts')}: id {identity!r} occurs twice; records go by id, so make ids unique")
        seen.add(identity)
        # Rows of token ids alone still have to be read, by people and by reward models.
        text = row["prompt"] or tokenizer.decode(prompt.ids, skip_special_tokens=True)
        opened = opened_by(tokenizer.decode(prompt.ids[-TAIL:], skip_special_tokens=False))
        records.append(
            {
                "prompt_id": identity,
                "prompt": text,
                "prompt_ids": prompt.ids,
                "chosen": row.get("chosen") or None,
                "facts": row.get("facts"),
                "chat": prompt.chat,
                **({"opened": opened} if opened else {}),  # the response begins inside a thought
                **{name: row[name] for name in TEMPLATE_COLUMNS if row.get(name)},
            }
        )
    chats = {record["chat"] for record in records}
    shared = {
        "template": template_hash(tokenizer),
        "tokenizer": tokenizer_digest(tokenizer),
        "tokenization": asdict(tokenization),
        "versions": versions(),
        "git_revision": git_revision(),
    }
    return Prompts(records, {chat: stop_token_ids(tokenizer, chat) for chat in chats}, tokenizer, shared)


class Models:
    """Loads a model when it is first needed; keeps the reference and the one policy in work. One with more rows of embeddings
    than others loses what they lack."""

    def __init__(
        self,
        reference: str,
        dtype: str,
        trust_remote_code: bool,
        revision: str | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.reference_path, self.dtype, self.trust_remote_code = reference, dtype, trust_remote_code
        self.revision = revision  # of the reference, on the Hub
        self.vocabulary = vocabulary or Vocabulary({})
        self.loaded: dict[str, tuple[Any, Any]] = {}

    def get(self, path: str) -> tuple[Any, Any]:
        """(model, its `PairForward`), on the GPU where there is one."""
        import torch

        from isdaa.models.loading import load_model
        from isdaa.models.packed.forward import prepare
        from isdaa.models.vocabulary_rows import cut_vocabulary

        if path not in self.loaded:
            for other in [p for p in self.loaded if p != self.reference_path]:
                del self.loaded[other]
            device = "cuda" if torch.cuda.is_available() else None
            options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code, "dtype": self.dtype, "device": device}
            model = load_model(path, **options, revision=self.revision if path == self.reference_path else None)
            rows = self.vocabulary.cut(path)
            if rows is not None:
                cut_vocabulary(model, rows, path)
            model.requires_grad_(False)
            self.loaded[path] = (model, prepare(model))
        return self.loaded[path]

    @property
    def reference(self) -> tuple[Any, Any]:
        """(π_ref, its `PairForward`)."""
        return self.get(self.reference_path)


@dataclass(frozen=True)
class _Work:
    """One piece of work for one model."""

    path: str
    leader: str  # how the description of its own bar begins
    do: Callable[[], None]
    size: float = 0.0  # in samples


class Collection:
    """The work of step one and where its records go."""

    def __init__(
        self,
        models: Sequence[Checkpoint],
        reference: str,
        prompts: Prompts,
        settings: EvaluationConfig,
        folder: Path,
        *,
        held_out: Sequence[Record] = (),
        scored: bool = True,
        dtype: str = "float32",
        trust_remote_code: bool = False,
        shared: Path | None = None,
        revision: str | None = None,
        more: Mapping[str, Any] | None = None,
        vocabulary: Vocabulary | None = None,
        left_out: Sequence[Record] = (),
    ) -> None:
        self.left_out = list(left_out)  # of the models that were asked for, with why
        self.more = dict(more or {})  # what else the plan says
        self.checkpoints, self.prompts, self.settings, self.folder = models, prompts, settings, folder
        self.shared = relative_to(folder, str(shared)) if shared is not None else None
        self.held_out, self.dtype = held_out, dtype
        self.models = Models(reference, dtype, trust_remote_code, revision, vocabulary)
        self.vocabulary = self.models.vocabulary
        self.reference = reference
        # Without a scorer, one sample a prompt shows the reference's length and repetition; opponents are not needed.
        self.opponents = settings.opponent_samples if scored else 1
        paths = [reference, *(model.path for model in models)]
        with working("digests of the models' files"):
            self.digests = once(
                lambda: {
                    path: model_digest(path, trust_remote_code, revision if path == reference else None)
                    for path in dict.fromkeys(paths)
                }
            )

    @cached_property
    def samples(self) -> Blocks:
        """Samples on disk, read when the work begins."""
        return once(lambda: blocks_of(self.folder, SAMPLES, {"shared": self.shared}))

    @cached_property
    def pairs(self) -> Blocks:
        """Held-out logps on disk, read when the work begins."""
        return once(lambda: blocks_of(self.folder, PAIRS, {"shared": self.shared}))

    @property
    def sampling(self) -> dict[str, Any]:
        """Sampling settings of win rates."""
        chosen = self.settings
        return {
            "temperature": chosen.temperature,
            "top_p": chosen.top_p,
            "top_k": chosen.top_k,
            "max_new_tokens": chosen.max_new_tokens,
        }

    def sample_key(self, path: str, purpose: str) -> str:
        """Key of the samples of one model for one purpose (`opponent/2`, `policy/0`, `kl/0`)."""
        sampling = KL_SETTINGS | {"max_new_tokens": self.settings.max_new_tokens} if purpose.startswith("kl") else self.sampling
        reference = self.digests[self.reference] if purpose.startswith("kl") else None
        what = [FORMAT, self.digests[path], reference, purpose, sampling, self.settings.seed, self.prompts.key, self.dtype]
        return digest(what + self._cut(path, *([self.reference] if purpose.startswith("kl") else [])))

    def pairs_key(self, path: str) -> str | None:
        """Key of one model's logps of the held-out pairs."""
        what = [FORMAT, "pairs", self.digests[path], self.held_out, self.dtype]
        return digest(what + self._cut(path)) if self.held_out else None

    def _cut(self, *paths: str) -> list[Any]:
        """What a key says of models that do not keep all of their rows."""
        return [["rows", self.vocabulary.common]] if any(self.vocabulary.cut(path) is not None for path in paths) else []

    def plan(self) -> Record:
        """Which blocks belong to this evaluation: what steps two and three read."""
        opponents = [self.sample_key(self.reference, f"opponent/{k}") for k in range(self.opponents)]
        models: list[Record] = [
            {
                **model.to_json(),
                "place": relative_to(self.folder, model.path),
                "stat": stat_of(model.path),
                "digest": self.digests[model.path],
                "samples": self.sample_key(model.path, "policy/0"),
                "kl": self.sample_key(model.path, "kl/0"),
                "pairs": self.pairs_key(model.path),
            }
            for model in self.checkpoints
        ]
        return {
            "format": FORMAT,
            "settings": self.settings.model_dump(),
            "prompts": self.prompts.block,
            "reference": {
                "path": self.reference,
                "digest": self.digests[self.reference],
                "opponents": opponents,
                "pairs": self.pairs_key(self.reference),
            },
            "models": models,
            "scorer": None,
            "shared": self.shared,
            **({"left_out": [self._left(left) for left in self.left_out]} if self.left_out else {}),
            **self.prompts.shared,
            **self.more,
        }

    def _left(self, left: Record) -> Record:
        path = left["path"]
        return left | {"place": relative_to(self.folder, path), "stat": stat_of(path), "digest": model_digest(path)}

    def run(self) -> Record:
        """Do what is not on disk yet; returns the plan, which is written last."""
        plan = self.plan()
        if self.prompts.block not in self.samples:
            header = {"prompts": self.prompts.key, **self.prompts.shared}
            self.samples.add("prompts", self.prompts.block, header, self.prompts.rows)
        todo = self._todo(plan)
        if todo:
            with progress("evaluating", sum(work.size for work in todo)) as bar:
                for work in todo:
                    bar.update(0, note=self.label(work.path))
                    with bar.part(work.size, work.leader):
                        work.do()
                    bar.update(0)  # tells the bars around this one
        once(lambda: write_json(self.folder / PLAN, plan))
        return plan

    def _todo(self, plan: Record) -> list[_Work]:
        """What is not on disk yet, model by model, so that each is loaded once."""
        todo: list[_Work] = []
        planned: set[str] = set()  # checkpoints with the same weights share their keys

        def add(keys: Iterable[str], size: float, work: _Work) -> None:
            missing = [key for key in keys if key not in self.samples and key not in self.pairs and key not in planned]
            planned.update(missing)
            if missing:
                todo.append(replace(work, size=size * len(missing)))

        opponents = {f"opponent/{k}": key for k, key in enumerate(plan["reference"]["opponents"])}
        prompts = len(self.prompts.rows)
        draw = partial(self.draw, self.reference, opponents)
        add(opponents.values(), prompts, _Work(self.reference, "  opponent", draw))
        for model in [plan["reference"], *plan["models"]]:
            path, pairs = model["path"], model["pairs"]
            if "kl" in model:
                key, kl = model["samples"], model["kl"]
                add([key], prompts, _Work(path, "  policy", partial(self.draw, path, {"policy/0": key})))
                add([kl], prompts * (1 + 2 * FORWARD), _Work(path, "  kl", partial(self.measure_kl, path, kl)))
            if pairs is not None:
                size = 2 * FORWARD * len(self.held_out)
                add([pairs], size, _Work(path, "  pairs", partial(self.score_pairs, path, pairs)))
        return todo

    def label(self, path: str) -> str:
        """What people call a model here."""
        return next((model.label for model in self.checkpoints if model.path == path), "reference")

    def draw(self, path: str, purposes: Mapping[str, str]) -> None:
        """One sample a prompt for win rates, for each purpose (name -> block key) that lacks it."""
        missing = {purpose: key for purpose, key in purposes.items() if key not in self.samples}
        started = time.monotonic()
        drawn = dealt(self.prompts.rows, lambda rows: self.sample_model(path, rows, self.sampling, list(missing)))
        header = self._header(path, "", self.sampling, started)
        for place, (purpose, key) in enumerate(missing.items()):
            self.samples.add("samples", key, header | {"purpose": purpose}, [records[place] for records in drawn])

    def measure_kl(self, path: str, key: str) -> None:
        """One sample a prompt of the policy itself, with both models' logps and the Rao–Blackwell KL."""
        started = time.monotonic()
        sampling = KL_SETTINGS | {"max_new_tokens": self.settings.max_new_tokens}

        def measured(prompts: Sequence[Record]) -> list[Record]:
            records = [record for (record,) in self.sample_model(path, prompts, sampling, ["kl/0"], with_states=True)]
            states = [record.pop("states") for record in records]  # what the tokens were drawn from: the policy is not run again
            rows = [(prompt["prompt_ids"], record["ids"]) for prompt, record in zip(prompts, records, strict=True)]
            _, policy = self.models.get(path)
            _, reference = self.models.reference
            with progress("  kl passes", len(rows)) as bar:
                found = divergences(policy, reference, rows, states, progress=bar.update)
            for record, values in zip(records, found, strict=True):
                record.update(values)
            return records

        records = dealt(self.prompts.rows, measured)
        header = self._header(path, "kl/0", sampling, started)
        header |= {"reference": self.reference, "reference_digest": self.digests[self.reference]}
        self.samples.add("kl", key, header, records)

    def score_pairs(self, path: str, key: str) -> None:
        """Logps of both responses of every held-out pair."""
        from isdaa.evaluation.checkpoints.held_out import pair_logps

        started = time.monotonic()
        _, forward = self.models.get(path)
        with progress("  pairs held out", len(self.held_out) // world_size()) as bar:
            logps = dealt(self.held_out, lambda pairs: pair_logps(forward, pairs, progress=bar.update))
        records = [
            {"pair_id": pair["id"], "prompt": pair["prompt"], "chosen_logps": chosen, "rejected_logps": rejected}
            for pair, (chosen, rejected) in zip(self.held_out, logps, strict=True)
        ]
        self.pairs.add("pairs", key, self._header(path, "pairs", None, started), records)

    def _header(self, path: str, purpose: str, sampling: Mapping[str, Any] | None, started: float) -> Record:
        head: Record = {"model": path, "model_digest": self.digests[path], "purpose": purpose, "dtype": self.dtype}
        if sampling is not None:
            head |= {"sampling": dict(sampling), "seed": self.settings.seed, "prompts": self.prompts.block}
        if self._cut(path, *([self.reference] if purpose.startswith("kl") else [])):
            head |= {"rows": self.vocabulary.common}
        return head | self.prompts.shared | {"seconds": round(time.monotonic() - started, 3)}

    def sample_model(
        self,
        path: str,
        rows: Sequence[Record],
        sampling: Mapping[str, Any],
        purposes: Sequence[str],
        with_states: bool = False,
    ) -> list[list[Record]]:
        """For each of some prompts, a record for each purpose; with_states: and its `Sample.states`, to be taken out."""
        from isdaa.models.sampling.sampling import SamplingSettings

        model, _ = self.models.get(path)
        seed, size, n = self.settings.seed, self.settings.batch_size, len(purposes)
        with progress(f"  {purposes[0].split('/')[0]} samples", len(rows) * n) as bar:
            found = draw_records(model, self.prompts, rows, SamplingSettings(**sampling), purposes, seed, size, bar, with_states)
        return [found[i : i + n] for i in range(0, len(found), n)]


def draw_records(
    model: Any,
    prompts: Prompts,
    rows: Sequence[Record],
    sampling: SamplingSettings,
    purposes: Sequence[str],
    seed: int,
    batch_size: int,
    bar: Bar,
    with_states: bool = False,
) -> list[Record]:
    """A record for each of `purposes` of each of some prompts, prompt by prompt; with_states: with its `Sample.states`.

    purposes: the part of the random numbers' key before the prompt's id, so that a policy does not share the luck of its
        opponent; each ends with the number of the sample.
    """
    from isdaa.models.sampling.sampling import respond

    keys = [f"{purpose}/{row['prompt_id']}" for row in rows for purpose in purposes]
    asked = [(row["prompt_ids"], row["chat"]) for row in rows]
    options: Any = {"progress": bar, "n": len(purposes), "with_states": with_states}
    records = []
    for place, one in enumerate(
        respond(model, prompts.tokenizer, asked, sampling, prompts.stop, seed, keys, batch_size, **options)
    ):
        row, purpose = rows[place // len(purposes)], purposes[place % len(purposes)]
        record = {
            "prompt_id": row["prompt_id"],
            "sample": int(purpose.rpartition("/")[2]),
            "text": one.text,
            "ids": one.ids,
            "tokens": len(one.ids),
            "finished": bool(one.finished),
        }
        record |= length_of_answer(record, row, prompts.tokenizer)
        records.append(record | ({"states": one.states} if with_states else {}))
    return records


def length_of_answer(record: Record, prompt: Record, tokenizer: Any) -> Record:
    """What a sample's record says of its answer's length, where it thinks first; nothing where it does not."""
    parts = parts_of(record, prompt)
    if not parts.marked:
        return {}
    return {"answer_tokens": len(tokenizer(parts.answer, add_special_tokens=False)["input_ids"])}
