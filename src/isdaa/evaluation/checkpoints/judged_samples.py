"""Step two with a judge model: every checkpoint's samples against the reference's (or the chosen responses), in both orders.

replies.jsonl   what the judge answered (`judge_cache`): nothing is asked twice
judged.jsonl    what each comparison came to, a block a checkpoint (`judged_table`)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from isdaa.data.checks import check_asked
from isdaa.distributed import once
from isdaa.errors import DoneInPart, UserError, nearest
from isdaa.evaluation.answer_notes import awaited
from isdaa.evaluation.benchmarks import HH, TLDR
from isdaa.evaluation.benchmarks.sets.benchmark import Answer, Benchmark, JudgeQuestion, Judgment, Question
from isdaa.evaluation.benchmarks.sets.games import PLACES, inside
from isdaa.evaluation.benchmarks.sets.preference_sets import Wording, judge_questions
from isdaa.evaluation.checkpoints.judged_table import ASKED, JUDGE, JUDGED, LEFT, SAME, JudgedTable, Side, sides_of
from isdaa.evaluation.checkpoints.sample_and_kl import PLAN, SAMPLES
from isdaa.evaluation.checkpoints.scoring import answer
from isdaa.evaluation.judges.types import MOMENTARY, Asking, request_body
from isdaa.evaluation.judges.wording import WAY_OPTIONS
from isdaa.evaluation.judging import REPLIES, Case, ModelJudge
from isdaa.evaluation.records import Blocks, Record, blocks_of, read_plan
from isdaa.files import digest, file_digest, write_json
from isdaa.foreign import check_file, why
from isdaa.record import git_revision, versions
from isdaa.terminal import say

FORMAT = 2  # raise it when a reply comes to be read in another way
QUESTIONS: dict[str, Benchmark] = {"hh": HH, "tldr": TLDR}
CHARACTERS = 4  # of a token, in an estimate


class FileWording(Wording):
    """A question of the user's own: text with `{prompt}`, `{first}` and `{second}`, which are put in all at once."""

    def user(self, prompt: str, first: str, second: str) -> str:
        """The whole question; what is put in cannot end a marker, nor bring in a place of its own."""
        parts = {name: inside(text.strip()) for name, text in zip(PLACES, (prompt, first, second), strict=True)}
        return re.sub(r"\{(prompt|first|second)\}", lambda found: parts[found[1]], self.asked)


def question_of(template: str) -> Benchmark:
    """The judge's question: `hh`, `tldr`, or that of a file. Raises UserError for a file that is no question."""
    if template in QUESTIONS:
        return QUESTIONS[template]
    file = Path(template).expanduser()
    if not file.exists():
        raise UserError(f"--judge_template {template}: no such file{nearest(template, QUESTIONS)}; give hh, tldr or a file")
    check_file(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not valid UTF-8" if isinstance(error, UnicodeDecodeError) else why(error)
        raise UserError(f"{template}: the judge's question cannot be read ({reason})") from None
    missing = [f"{{{name}}}" for name in PLACES if f"{{{name}}}" not in text]
    if missing:
        raise UserError(
            f"{template}: the judge's question lacks {' and '.join(missing)}; it must say with {{prompt}}, {{first}} and "
            "{second} where the prompt and both responses go"
        )
    wording = FileWording(f"{file.name} {file_digest(file)[:8]}", text, "", "")
    if not re.search(r"(?i)\bbetter\b\W*:", text) and not (re.search(r"\bA\b", text) and re.search(r"\bB\b", text)):
        say(
            f"warning: {template} asks neither for a line `Better: A` or `Better: B` nor for one letter, A or B; a reply in "
            "other words may not be read"
        )
    return replace(HH, judge_questions=lambda *asked: judge_questions(wording, *asked))


class SampleJudge:
    """A judge model for the samples of checkpoints. template: `hh`, `tldr` or a file.

    stopped: what the last evaluation left undone, a sentence; None where it is whole.
    Raises UserError for a template or an address that cannot be used.
    """

    def __init__(self, asking: Asking, template: str = "hh") -> None:
        self.asking, self.template = asking, template
        self.bench = question_of(template)
        self.model = ModelJudge(asking, None)
        self.stopped: str | None = None

    @property
    def name(self) -> str:
        """The model's, as the endpoint knows it."""
        return self.model.name

    @property
    def digest(self) -> str:
        """Of all that decides a reply beside prompt and responses: model, settings and the question's every word.

        The limit on its tokens does not: a reply that ended by itself is the same under a higher one.
        """
        return digest([FORMAT, [{key: value for key, value in body.items() if key != "max_tokens"} for body in self._bodies()]])

    @property
    def digests(self) -> tuple[str, ...]:
        """That of this judge, and what an earlier version called it."""
        return self.digest, digest([1, self._bodies()])

    def _bodies(self) -> list[dict[str, Any]]:
        return [request_body(self.asking.settings, self.model.request(question)) for question in self._example()]

    def _example(self) -> list[JudgeQuestion]:
        return self.bench.judge_questions(Question("", "prompt"), Answer("", "", ("ours",)), Answer("", "", ("theirs",)))

    @property
    def limit(self) -> int:
        """Tokens that a reply may have."""
        return self.model.limit(self._example()[0])

    def facts(self, about: Sequence[str] = ()) -> dict[str, Any]:
        """What records say of the judge; options: those that name it to a command line."""
        settings, asking = self.asking.settings, self.asking
        options = ["--judge_model", self.name]
        options += ["--judge_base_url", settings.base_url] if settings.base_url is not None else []
        options += ["--judge_template", self.template] if self.template != "hh" else []
        options += ["--judge_temperature", str(settings.temperature).lower()] if asking.own_temperature else []
        options += ["--judge_max_tokens", str(settings.max_tokens)] if asking.own_max_tokens else []
        options += ["--judge_api_version", settings.api_version] if settings.api_version is not None else []
        options += [f"--{name}" for name, way in WAY_OPTIONS.items() if way in settings.ways]
        options += ["--judge_seed", str(settings.seed)] if settings.seed is not None else []
        return {"name": self.name, "digest": self.digest, "kind": JUDGE, "about": list(about), "options": options}

    def check(self, folder: Path, plan: Record, prompts: Sequence[Record]) -> None:
        """Raises UserError where there is anything left to judge, and the judge cannot be asked it."""
        if self.todo(folder, plan):
            for row in prompts:
                check_asked((row["prompt"], row["chosen"]), f"prompt {row['prompt_id']}")

    def todo(self, folder: Path, plan: Record) -> list[Side]:
        """What of an evaluation is not judged yet. Raises UserError where there is any and the judge cannot be asked."""
        shared = plan["shared"]
        judged = Blocks(folder / JUDGED, folder / shared / JUDGED if shared is not None else None, readonly=True)
        found = [side for side in sides_of(plan, self.digest) if not is_whole(judged, side, self.limit)]
        if found:
            self.model.judge.ready()
        return found

    def announce(self, folder: Path, plan: Record, prompts: Sequence[Record]) -> None:
        """Say how many requests an evaluation may need, and what they may cost, before there is a sample. Raises as `todo`."""
        todo = self.todo(folder, plan)
        if not todo:
            say(f"judge {self.name}: all is judged already, so nothing is asked")
            return
        each = 2 * sum(len(side.pairs) for side in todo)  # requests a prompt
        say(f"judge {self.name}: {self._estimate(prompts, each, todo, plan)}")

    def _estimate(self, prompts: Sequence[Record], each: int, todo: Sequence[Side], plan: Record) -> str:
        settings, empty, read, written = self.asking.settings, Answer("", "", ("",)), 0.0, 0
        for row in prompts:
            asked = self.bench.judge_questions(Question("", row["prompt"]), empty, empty)
            words = sum(len(message["content"]) for question in asked for message in question.messages) / len(asked)
            read += each * (words / CHARACTERS + 2 * plan["settings"]["max_new_tokens"])
            written += each * (settings.max_tokens if self.asking.own_max_tokens else asked[0].max_tokens)
        opponents, count = len(plan["reference"]["opponents"]), f"{len(todo)} model{'s' * (len(todo) != 1)}"
        named = f"{opponents} opponent{'s' * (opponents != 1)} (--evaluation.opponent_samples)"
        against = named if todo[0].theirs else "the chosen response"
        line = (
            f"at most {each * len(prompts):,} requests ({len(prompts)} prompts × {count} × {against} × 2 orders), "
            f"about {read:,.0f} tokens read and {written:,} written at most"
        )
        if settings.price_in is not None and settings.price_out is not None:
            line += f", which cost about {(read * settings.price_in + written * settings.price_out) / 1e6:.2f} at most"
        line += "; equal texts and what was answered before cost nothing"
        if settings.max_requests is not None and settings.max_requests < each * len(prompts):
            enough = settings.max_requests // each
            line += f". --max_requests {settings.max_requests} is enough for about {enough} of the prompts"
        return line

    def judge(self, folder: Path) -> None:
        """Judge what the evaluation in `folder` has samples of; the main process does it.

        Raises DoneInPart where no prompt is judged for every checkpoint, UserError where the judge cannot be asked.
        """
        self.stopped = once(lambda: self._judge(folder))

    def _judge(self, folder: Path) -> str | None:
        plan = read_plan(folder / PLAN)
        samples, judged = (blocks_of(folder, name, plan) for name in (SAMPLES, JUDGED))
        prompts, sides = samples[plan["prompts"]], sides_of(plan, self.digest)
        todo = [side for side in sides if not is_whole(judged, side, self.limit)]
        why, model = "", ModelJudge(self.asking, folder / REPLIES)
        if todo:
            verdicts = self._ask(plan, model, prompts, samples, todo)
            usage, why = model.judge.usage, model.judge.why_left()
            say(f"judge {self.name}: {usage}")
            shared = {"judge": self.name, "judge_digest": self.digest, "template": self.template, "prompts": plan["prompts"]}
            shared |= {"versions": versions(), "git_revision": git_revision()}
            for side in todo:
                rows = [verdicts[side.key, place] for place in range(len(prompts) * len(side.pairs))]
                whole = not usage.failures and all(row["state"] != LEFT for row in rows)
                cut = sum("cut" in row.get("lacks", ()) for row in rows)
                header = {"of": side.label, "whole": whole, "cut": cut, "max_tokens": self.limit, **shared}
                if not is_whole(judged, side, self.limit) or [_bare(row) for row in judged[side.key]] != rows:
                    judged.add("judged", side.key, header, rows)
        return self._written(folder, plan, prompts, sides, judged, why, model.judge.about)

    def _ask(
        self, plan: Record, model: ModelJudge, prompts: Sequence[Record], samples: Blocks, todo: Sequence[Side]
    ) -> dict[tuple[str, int], Record]:
        """What each comparison came to, by its side's block and its place there.

        Prompts come one after the other, each with all checkpoints, so that what a spent budget leaves is paired.
        """
        found: dict[tuple[str, int], Record] = {}
        cases: list[Case] = []
        places: list[tuple[str, int]] = []
        keep = bool(plan["settings"].get("keep_thinking"))
        for (number, prompt), side in product(enumerate(prompts), todo):
            for pair, (ours, theirs) in enumerate(side.pairs):
                place = side.key, number * len(side.pairs) + pair
                other_row = {"text": prompt["chosen"]} if theirs is None else samples[theirs][number]
                own, other = (_words(answer(row, prompt, keep)) for row in (samples[ours][number], other_row))
                name = prompt["prompt_id"]
                found[place] = {"prompt_id": name, "pair": pair, "orders": [0.5, 0.5], "state": SAME}
                if own.strip() != other.strip():
                    answers = Answer(name, side.label, (own,)), Answer(name, "opponent", (other,))
                    cases.append(Case(Question(name, prompt["prompt"], where=name), answers[0], answers[1]))
                    places.append(place)
        for place, said in zip(places, model.verdicts(self.bench, cases), strict=True):
            found[place] |= _came_to(said)
        return found

    def _written(
        self,
        folder: Path,
        plan: Record,
        prompts: Sequence[Record],
        sides: Sequence[Side],
        judged: Blocks,
        why: str,
        told: Sequence[str],
    ) -> str | None:
        """The plan with the judge; returns what is left undone, a sentence. why prompts were left; told: of the judge."""
        rows = [row for side in sides for row in judged[side.key]]
        bad = {row["prompt_id"] for row in rows if None in row["orders"]}
        left = {row["prompt_id"] for row in rows if row["state"] == LEFT}
        lacks = Counter(lack for row in rows for lack in row.get("lacks", ()) if lack)
        missing = awaited({lack: lacks[lack] for lack in MOMENTARY if lacks[lack]})
        if len(bad) == len(prompts):
            if left:
                raise DoneInPart(f"judge {self.name}: no prompt is judged for every checkpoint yet: {why}")
            reasons = "; ".join([", ".join(f"{lack} {count}" for lack, count in lacks.items()), *([missing] if missing else [])])
            raise DoneInPart(
                f"judge {self.name}: no prompt has a reply that could be read for every checkpoint, so no win rate ({reasons})"
            )
        plan = plan | {"scorer": self.facts()}
        table = JudgedTable(plan, prompts, judged, _settings(plan), {})
        count = table.counts()
        about = [f"a judge model, asked the question `{self.template}` in both orders", *told]
        if count["flip_rate"] is not None:
            share = f"{100 * count['flip_rate']:.0f} % of {count['comparisons']} comparisons"
            about.append(f"contradicts itself on {share} when their order is swapped")
        write_json(folder / PLAN, plan | {"scorer": self.facts(about)})
        if not left and not missing:
            return None
        judged_all = f"{len(prompts) - len(bad)} of {len(prompts)} prompts are judged for every checkpoint"
        return f"{judged_all}: {'; '.join(part for part in (why if left else '', missing) if part)}"


def is_whole(judged: Blocks, side: Side, limit: int) -> bool:
    """Whether every comparison of a side was answered, so that no reply is needed again: none was cut at a lower limit."""
    if side.key not in judged:
        return False
    found: Blocks | None = judged if side.key in judged.headers else judged.shared
    header = found.headers[side.key] if found is not None else {}
    return bool(header.get("whole")) and not (header.get("cut") and limit > header.get("max_tokens", limit))


def _settings(plan: Record) -> Any:
    from isdaa.config import EvaluationConfig

    return EvaluationConfig(**plan["settings"])


def _bare(row: Mapping[str, Any]) -> Record:
    return {key: value for key, value in row.items() if key != "block"}


def _came_to(said: tuple[Judgment, ...] | None) -> Record:
    if said is None:
        return {"orders": [None, None], "state": LEFT}
    return {"orders": [verdict.value for verdict in said], "state": ASKED} | (
        {"lacks": [verdict.lack for verdict in said]} if any(verdict.lack for verdict in said) else {}
    )


def _words(response: Any) -> str:
    return response if isinstance(response, str) else str(response[-1]["content"])
