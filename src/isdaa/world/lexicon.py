"""The words of the embedded world: what can be true of a post, and every way of saying it.

Generator (`grammar.py`) and judge (`reward.py`) read the same tables, so that nothing is written which the judge cannot parse.
A *slot* is one thing that can be true of a post (who, what, for how long …); a *value* is one filling of it; a *wording* is how
a value is put into words, separated by spaces. The first wording of a value is the plain one that summaries use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

SIZES = ("small", "medium")
PROMPT_END = "TL;DR:"
PUNCTUATION = (".", "?", ",")
CONJUNCTIONS = ("and",)


@dataclass(frozen=True)
class Slot:
    """One kind of fact.

    `values` maps a value to its wordings. `post` and `summary` are templates whose `{}` takes a wording. `presence` is the
    probability that a post has this fact, `worth` what the judge pays for it.
    """

    name: str
    values: dict[str, tuple[str, ...]]
    post: tuple[str, ...]
    summary: tuple[str, ...]
    presence: float
    worth: float

    def phrases(self, templates: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        """(value, phrase) for every wording in every template."""
        for value, wordings in self.values.items():
            for wording in wordings:
                for template in templates:
                    yield value, template.format(wording)


@dataclass(frozen=True)
class Lexicon:
    """Everything that posts and summaries of one size are made of."""

    size: str
    slots: dict[str, Slot]
    asides: tuple[str, ...]  # what somebody else says; {} takes a person, {advice} an answer to the post's question
    chatter: tuple[str, ...]  # sentences of a post that are no fact
    vague: str  # stands for a person whom the summary does not name: neither right nor wrong
    hedges: tuple[str, ...]
    closers: tuple[str, ...]

    def vocabulary(self) -> list[str]:
        """Every word and mark that a post or a summary can hold, sorted; without special tokens."""
        phrases = [self.vague, *self.chatter, *self.hedges, *self.closers, *PUNCTUATION, *CONJUNCTIONS]
        for slot in self.slots.values():
            phrases += [phrase for _, phrase in slot.phrases(slot.post + slot.summary)]
        phrases += [aside.format(person="", advice="") for aside in self.asides]
        return sorted({word for phrase in phrases for word in phrase.split()})


def _plain(words: str) -> dict[str, tuple[str, ...]]:
    return {word: (word,) for word in words.split()}


def _worded(table: str) -> dict[str, tuple[str, ...]]:
    """'name: wording / other wording' per line."""
    entries = (line.split(":") for line in table.splitlines() if line.strip())
    return {name.strip(): tuple(part.strip() for part in wordings.split("/")) for name, wordings in entries}


_PEOPLE = "boss roommate sister brother mother father neighbour landlord coworker cousin partner friend"
_MORE_PEOPLE = "uncle aunt teacher manager stepfather grandmother"

_PROBLEMS = """
    messages: reading my messages / going through my phone
    money: borrowing money / asking me for cash
    lies: lying to me / telling me lies
    late: showing up late / making me wait
    food: stealing my food / eating my lunch
    secrets: sharing my secrets / telling people my secrets
    noise: playing loud music / making noise at night
    insults: insulting me / calling me names
    calls: ignoring my calls / leaving me on read
    ideas: copying my work / using my ideas
    jokes: mocking my job / laughing at my job
    visits: visiting unannounced / turning up uninvited
"""
_MORE_PROBLEMS = """
    smoke: smoking indoors / lighting up in the house
    mess: leaving a mess / never cleaning up
    clothes: wearing my clothes / taking my clothes
    texts: texting my ex / writing to my ex
    gossip: spreading rumours / talking behind my back
    car: taking my car / using my car
"""

_QUESTIONS = """
    leave: move out
    confront: confront them
    contact: cut contact
    silence: say nothing
    help: ask for help
    police: call the police
    family: tell my family
    lawyer: find a lawyer
    forgive: forgive them
    wait: wait longer
"""
_MORE_QUESTIONS = """
    letter: write a letter
    apologise: apologise first
    revenge: get even
    report: report it
    therapy: suggest therapy
    holiday: take a holiday
"""

_CAUSES = """
    divorce: the divorce
    wedding: the wedding
    move: the move
    accident: the accident
    funeral: the funeral
    promotion: my promotion
    fight: our fight
    baby: the baby
    party: the party
"""
_MORE_CAUSES = """
    illness: the illness
    exam: my exam
    loan: the loan
    trip: our trip
"""

_TRIED = """
    talking: talking
    therapy: therapy
    shouting: shouting
    patience: patience
    humour: humour
    gifts: gifts
"""
_FEELINGS = """
    trapped: trapped
    anxious: anxious
    angry: angry
    lonely: lonely
    guilty: guilty
    tired: tired
    ashamed: ashamed
    scared: scared
"""
_STAKES = """
    job: my job
    home: my home
    savings: my savings
    marriage: my marriage
    sleep: my sleep
    friends: my friends
"""

_ASIDES = ("my {person} told me to {advice}", "my {person} is on my side")
_CHATTER = (
    "sorry for my english",
    "i work from home",
    "we live in a small town",
    "this is a throwaway account",
    "long story ahead",
    "i love my dog",
    "i am on mobile",
    "it rains a lot here",
)
_MORE_CHATTER = (
    "we both like football",
    "i study in another city",
    "the house is old",
    "dinner was cold again today",
    "i have never asked here before",
    "names are changed of course",
)


_NUMBERS = ("two", "three", "four", "six")
_UNITS = ("days", "weeks", "months", "years")


@cache
def lexicon(size: str) -> Lexicon:
    """The word tables of 'small' or 'medium' (a superset of small); any other size raises ValueError."""
    if size not in SIZES:
        raise ValueError(f"unknown world size {size!r}: known are {', '.join(SIZES)}")
    medium = size == "medium"

    def table(basic: str, more: str) -> dict[str, tuple[str, ...]]:
        return _worded(basic + more) if medium else _worded(basic)

    durations: dict[str, tuple[str, ...]] = {f"{n}-{unit}": (f"{n} {unit}",) for unit in _UNITS for n in _NUMBERS}
    slots = [
        Slot(
            "relation",
            _plain(f"{_PEOPLE} {_MORE_PEOPLE}" if medium else _PEOPLE),
            ("my {}",),
            ("my {}", "it is about my {}"),
            1.0,
            1.0,
        ),
        Slot(
            "problem",
            table(_PROBLEMS, _MORE_PROBLEMS),
            ("keeps {}", "will not stop {}"),
            ("has been {}", "keeps {}"),
            1.0,
            1.0,
        ),
        Slot("duration", durations, ("it has been {}", "this has lasted {} now"), ("for {}",), 0.8, 0.6),
        Slot("cause", table(_CAUSES, _MORE_CAUSES), ("it all started after {}", "i blame {}"), ("since {}",), 0.8, 0.6),
    ]
    if medium:
        slots += [
            Slot("tried", _worded(_TRIED), ("i have tried {} already", "{} did not help"), ("i tried {}",), 0.7, 0.6),
            Slot("feeling", _worded(_FEELINGS), ("it makes me feel {}", "i am so {}"), ("i feel {}",), 0.7, 0.6),
            Slot(
                "stake",
                _worded(_STAKES),
                ("i might lose {} over this", "it could cost me {}"),
                ("i might lose {}",),
                0.6,
                0.6,
            ),
        ]
    slots.append(
        Slot(
            "question",
            table(_QUESTIONS, _MORE_QUESTIONS),
            ("should i {}", "is it wrong to {}"),
            ("should i {}",),
            1.0,
            1.0,
        )
    )
    return Lexicon(
        size=size,
        slots={slot.name: slot for slot in slots},
        asides=_ASIDES,
        chatter=_CHATTER + _MORE_CHATTER if medium else _CHATTER,
        vague="someone",
        hedges=("i think", "maybe", "it seems"),
        closers=("please help", "any advice", "thanks for reading"),
    )
