"""Posts with known facts, and the summaries that authors of varying diligence write of them.

A post is a few sentences in shuffled order: who does what (always), for how long and since when (mostly), what the writer asks
(always, usually last), some chatter, sometimes the opinion of somebody else. Every row carries its facts, so that the judge in
`reward.py` knows what a good summary would say. Everything follows from (size, split, seed) alone.

Splits are disjoint by the facts themselves, for every seed: a checksum of a post's facts decides which split it may appear in.
A longer draw begins with the shorter one, and no post repeats within a draw.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import Any

from isdaa.world.lexicon import PROMPT_END, Lexicon, lexicon

Facts = dict[str, Any]
Row = dict[str, Any]

# Share of all combinations of facts, in percent, that belongs to each split.
SPLITS = {"sft": 40, "prompts": 40, "eval": 20}


@dataclass(frozen=True)
class Habits:
    """How posts and reference summaries are written: probabilities, unless said otherwise."""

    chatter: tuple[int, int] = (0, 1)  # sentences of chatter in a post, from and to
    aside: float = 0.3  # somebody else's opinion in the post
    question_last: float = 0.7
    diligence: tuple[float, float] = (2.0, 2.0)  # Beta parameters of an author's diligence
    coverage: tuple[float, float] = (0.45, 0.55)  # a fact is mentioned with p = first + second · diligence
    error: float = 0.12  # a mentioned fact is wrong with p = error · (1 − diligence)
    hedge: float = 0.25  # some clause is hedged
    closer: float = 0.4  # a closing plea
    more_closers: float = 0.3  # and another one after each
    carried_chatter: float = 0.12
    repeats: float = 0.08
    cut_short: float = 0.04


HABITS = {"small": Habits(), "medium": Habits(chatter=(1, 3), aside=0.5)}


def punctuate(words: str) -> str:
    """'stop . why ?' -> 'stop. why?', as the tokenizer decodes it."""
    return words.replace(" .", ".").replace(" ?", "?").replace(" ,", ",")


def make_posts(size: str, n: int, *, split: str = "sft", seed: int = 0) -> list[Row]:
    """Posts with a reference summary each. A longer draw begins with the shorter one; splits share no post.

    Args:
        size: "small" or "medium".
        n: how many.
        split: "sft", "prompts" or "eval".
        seed: of the draw.

    Returns:
        Rows with `id`, `prompt` (it ends with `PROMPT_END`), `summary` and `facts`, as JSON takes them.

    Raises:
        ValueError: an unknown size or split, or a split with too few different posts.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: known are {', '.join(SPLITS)}")
    words, habits = lexicon(size), HABITS[size]
    rng = random.Random(f"isdaa-world/{size}/{split}/{seed}")
    rows: list[Row] = []
    seen: set[str] = set()
    attempts = 0
    while len(rows) < n:
        attempts += 1
        if attempts > 100 * n + 1000:
            raise ValueError(f"the {size} world's split {split!r} cannot give {n} different posts")
        facts = draw_facts(words, rng)
        if split_of(facts) != split:
            continue
        # Each post has a generator of its own: how one is written must not move the facts of all that follow.
        own = random.Random(rng.getrandbits(64))
        prompt = write_post(words, habits, facts, own)
        if prompt in seen:
            continue
        seen.add(prompt)
        identity = f"{size}/{split}/{seed}/{len(rows):06d}"
        rows.append({"id": identity, "prompt": prompt, "summary": write_summary(words, habits, facts, own), "facts": facts})
    return rows


def draw_facts(words: Lexicon, rng: random.Random) -> Facts:
    """{'size', one key per slot}; a fact that the post does not have is None."""
    facts: Facts = {"size": words.size}
    for slot in words.slots.values():
        facts[slot.name] = rng.choice(list(slot.values)) if rng.random() < slot.presence else None
    return facts


def split_of(facts: Facts) -> str:
    """The one split in which these facts may appear."""
    point = zlib.crc32("/".join(f"{key}={value}" for key, value in facts.items()).encode()) % 100
    for name, share in SPLITS.items():
        if point < share:
            return name
        point -= share
    raise AssertionError("the shares of the splits add up to 100")


def write_post(words: Lexicon, habits: Habits, facts: Facts, rng: random.Random) -> str:
    """The post and the mark that asks for its summary."""
    slots = words.slots

    def say(slot: str) -> str:
        return rng.choice(slots[slot].post).format(rng.choice(slots[slot].values[facts[slot]]))

    sentences = [f"{say('relation')} {say('problem')} ."]
    sentences += [f"{say(name)} ." for name in slots if name not in ("relation", "problem", "question") and facts[name]]
    if rng.random() < habits.aside:
        person = rng.choice([p for p in slots["relation"].values if p != facts["relation"]])
        advice = rng.choice(slots["question"].values[rng.choice(list(slots["question"].values))])
        sentences.append(rng.choice(words.asides).format(person=person, advice=advice) + " .")
    sentences += [f"{line} ." for line in rng.sample(words.chatter, rng.randint(*habits.chatter))]
    rng.shuffle(sentences)
    question = f"{say('question')} ?"
    sentences.insert(len(sentences) if rng.random() < habits.question_last else rng.randrange(len(sentences)), question)
    return f"{punctuate(' '.join(sentences))} {PROMPT_END}"


def write_summary(words: Lexicon, habits: Habits, facts: Facts, rng: random.Random) -> str:
    """A reference summary: more or less complete, mostly right, in the habits of one author."""
    diligence = rng.betavariate(*habits.diligence)
    first, second = habits.coverage
    clauses: dict[str, str] = {}
    for slot in words.slots.values():
        truth = facts[slot.name]
        if truth is None or rng.random() >= first + second * diligence:
            continue
        wrong = rng.random() < habits.error * (1 - diligence)
        value = rng.choice([v for v in slot.values if v != truth]) if wrong else truth
        template = slot.summary[0] if slot.name == "relation" else rng.choice(slot.summary)
        clauses[slot.name] = template.format(slot.values[value][0])
    if "problem" in clauses and "relation" not in clauses:
        clauses["relation"] = words.vague
    elif "relation" in clauses and "problem" not in clauses:
        clauses["relation"] = f"it is about {clauses['relation']}"
    statements = [name for name in clauses if name not in ("problem", "question")]
    if statements and rng.random() < habits.hedge:
        hedged = rng.choice(statements)
        clauses[hedged] = f"{rng.choice(words.hedges)} {clauses[hedged]}"

    sentences = _compose(words, clauses)
    if rng.random() < habits.carried_chatter:
        sentences.insert(rng.randint(0, len(sentences)), rng.choice(words.chatter) + " .")
    if sentences and rng.random() < habits.repeats:
        sentences.append(rng.choice(sentences))
    if rng.random() < habits.closer:
        sentences.append(_close(words, rng))
        while rng.random() < habits.more_closers:
            sentences.append(_close(words, rng))
    text = " ".join(sentences or [_close(words, rng)]).split()
    if rng.random() < habits.cut_short:
        text = text[: rng.randint(1, len(text))]
    return punctuate(" ".join(text))


def _compose(words: Lexicon, clauses: dict[str, str]) -> list[str]:
    """Clauses joined to sentences: who does what, for how long, since when; the rest; the question."""
    who = " ".join(clauses[name] for name in ("relation", "problem") if name in clauses)
    since = " , ".join(clauses[name] for name in ("duration", "cause") if name in clauses)
    parts = [f"{who} {since}"] if "problem" in clauses else [who, since]
    sentences = [f"{part.strip()} ." for part in parts if part]
    middle = [clauses[name] for name in ("tried", "feeling", "stake") if name in clauses]
    if middle:
        sentences.append(" and ".join(middle) + " .")
    if "question" in clauses:
        sentences.append(f"{clauses['question']} ?")
    return sentences


def _close(words: Lexicon, rng: random.Random) -> str:
    closer = rng.choice(words.closers)
    return f"{closer} {'?' if closer.startswith('any') else '.'}"
