"""Which of two responses a judge's words prefer, or that they are equal; what may mean something else is not read.

A label (`Better: B`) counts at the start of a line or sentence, the last one alone, where nothing behind it says otherwise.
Of two on one line that differ, the last must say that it is the conclusion (`Overall, better: B`); one of a part (`For tone,
better: B`) takes back none before it. Without a label a sentence does that is nothing but a choice (`Response B is better.`,
`B`, `Both are equally good`), where it ends the answer, or begins it and nothing behind it says otherwise.
"""

from __future__ import annotations

import re
from itertools import pairwise
from unicodedata import category, normalize

# Legend: ① and ② stand for the names of the two responses, all other words are in lower case.
_NOUN = "(?:response|summary|reply|answer|assistant|model|option|output|text|candidate|version|continuation)"
_NOUNS = "(?:responses|summaries|replies|answers|assistants|models|options|outputs|texts|candidates|versions|ones|of them)"
_NAME = rf"(?:the )?(?:{_NOUN} )?(?P<name>[①②])(?:'s {_NOUN})?"
_OTHER = rf"(?:the other(?: one| {_NOUN})?|(?:the )?(?:{_NOUN} )?[①②])"
_MUCH = "(?:(?:clearly|slightly|much|somewhat|far|marginally|significantly|overall|definitely|the|a bit|a little|by far|still) )*"
_BETTER = rf"{_MUCH}(?:better|best|preferable|superior|stronger|preferred|winner)"
_EQUAL = (
    r"(?:(?:about |roughly |equally |just as |nearly )?(?:equal(?:ly)?|the same|tied|a tie|equivalent|on par|comparable|as good)"
    r"(?: (?:good|bad|well|poor|strong|helpful|harmless|in quality|overall|quality))?|equally \w+)"
)
_BOTH = (
    rf"(?:{_NOUN} [①②] and (?:{_NOUN} )?[①②]|(?:both )?(?:{_NOUNS} )?[①②] and [①②]|both(?: {_NOUNS})?|they|the two(?: {_NOUNS})?)"
)
_VERDICT = "(?:answer|verdict|choice|winner|decision|judge?ment|conclusion|preference|result|pick)"
_LEAD = (  # no two ways to read the same words: many of them must take no time
    "(?:(?:therefore|so|thus|hence|in conclusion|in summary|in short|to conclude|in the end|all in all|"
    "i (?:think|believe|conclude|choose|pick|select|prefer|say|go with)(?: that)?|i(?:'d| would) (?:say|choose|prefer|go with)|"
    rf"in my (?:opinion|view|judgment)|(?:the |my )?(?:overall|final(?:ly)?|{_VERDICT}(?: is)?)) ?(?:[,:—–-] ?)?){{0,6}}"
)
_LABEL = re.compile(rf"(?:^|(?<=[.!?:;,/—–-]) ?)(?P<lead>{_LEAD})(?:the )?better(?: {_NOUN})?(?: is)? ?[:：=] ?")
_ALONE = re.compile(
    rf"{_LEAD}(?:{_NAME}(?: (?:is|was|seems|appears|remains|would be) {_BETTER}(?: one| {_NOUN}| choice)?(?: overall)?| wins)?"
    rf"(?: (?:than|over) {_OTHER})?|{_BETTER}(?: {_NOUN}| one)? ?(?:is|was|:) ?{_NAME.replace('name', 'named')})[ .!]*"
)
_TIE = re.compile(
    rf"{_LEAD}(?:(?:(?:it|this|that|the result)(?: is|'s) |i (?:call|declare) (?:it|this) )?(?:[a①] )?(?:tie|draw|toss-?up|tied)|"
    rf"neither(?: {_NOUN}| of them| one| of the two)?(?: (?:is|was) {_BETTER}(?: than {_OTHER})?)?|"
    rf"neither {_OTHER} nor {_OTHER} (?:is|was) {_BETTER}|{_BOTH} (?:are|were|is|seem) {_EQUAL}|(?:both )?{_EQUAL}|"
    r"[①②] ?=+ ?[①②]|(?:there is )?no (?:clear |real |meaningful )?(?:winner|difference|preference))[ .!]*"
)
_BEHIND = re.compile(  # what may stand behind a label's name
    rf"[.!,;:—–-]|(?:because|since|as|due to|for|given|with|which|it|this|overall)\b|(?:is|was) {_MUCH}(?:{_BETTER}|more)\b|\Z"
)
_UNSETTLED = re.compile(r"[,;:/—–-]* ?(?:(?:or|and|no|not|nor|vs\.?|neither|than)\b|[/①②])")
# What takes a choice back.
_DOUBT = re.compile(
    r"(?:^|[.!?,;:—–-] ?)(?:(?:no|not)\b[,.!]|no [①②]|wait\b|actually\b|hmm|correction\b|sorry\b|scratch that|"
    r"(?:on (?:second thought|reflection)|in (?:hindsight|retrospect))|"
    r"i (?:have )?changed? my mind|i take (?:that|it) back|or (?:maybe|perhaps|rather)\b)"
)
_WORSE = re.compile(r"\b(?:worse|worst|weaker|not|inferior|loser|loses)\b.*[:?]$")
_CONCLUDES = (  # what stands before a name at the end
    r"(?:^|[.:;=,/>→—–-] ?|\b(?:is|be|meant|choose|pick|prefer|select|take|say|with|but|"
    r"(?:changed?|switch(?:ed)?|lean) to|settle on) )"
)
_DENIED = re.compile(r"\b(?:worse|worst|weaker|inferior|loser|loses|not|never|rather than|instead of)\b|n't\b")
_ORNAMENTS = re.compile(
    r"[*_`\"“”„«»\[\]{}#$|]|<(?![=-])|(?<![=-])>(?!=)|\\(?:boxed|text|mathbf)|(?<![a-z])['‘’]|['‘’](?![a-z])", re.IGNORECASE
)


def choice(answer: str, first: str, second: str) -> float | None:
    """1 for the second, 0 for the first, 0.5 where they are equal; None where the answer does not say it plainly."""
    lines = [line for line in (_plain(line, first, second) for line in answer.splitlines()) if line]
    labels = [(number, found) for number, line in enumerate(lines) for found in _LABEL.finditer(line)]
    if labels:
        return _last_label(lines, labels)
    said = [
        (part, _stated(part, part == line))
        for line in lines
        for part in ([line] if _stated(line) is not None else _sentences(line))
    ]
    if not said:
        return None
    (_, start), (_, last) = said[0], said[-1]
    if last is not None:
        return None if len(said) > 1 and _WORSE.search(said[-2][0]) else last
    again = any(value not in (None, start) for _, value in said)
    return None if start is None or again or _taken_back(start, [part for part, _ in said[1:]]) else start


def _plain(line: str, first: str, second: str) -> str:
    """A line without ornaments, the names as ① and ②."""
    line = "".join(c for c in normalize("NFKC", line).replace("’", "'") if category(c) not in ("So", "Sk", "Cf"))
    line = re.sub(r"\(\s*(\w)\s*\)", r" \1 ", _ORNAMENTS.sub("", line))
    line = re.sub(r"\s+", " ", re.sub(r"[()]", ", ", line)).strip()
    line = re.sub(r"^(?:(?:[-•–>+]+|\d+[.)]) )+", "", line)
    for name, mark in ((first, "①"), (second, "②")):
        line = re.sub(rf"(?<![\w'-]){name}(?![\w])(?!'(?!s\b))", mark, line)
    line = line.lower()
    if (first, second) == ("A", "B"):  # in lower case one of them is a word
        for name, mark in (("a", "①"), ("b", "②")):
            line = re.sub(rf"(?:^|(?<=[.:;=,] )){name}(?=[.!]?$)|(?<=response ){name}\b|(?<=summary ){name}\b", mark, line)
    return line


def _sentences(line: str) -> list[str]:
    return re.split(r"(?<=[.!?;]) +", line)


def _last_label(lines: list[str], labels: list[tuple[int, re.Match[str]]]) -> float | None:
    number, last = labels[-1]
    said, *rest = [lines[number][last.end() :], *lines[number + 1 :]]
    if not said and rest:  # the choice stands on the next line
        said, *rest = rest
    value = _labelled(said)
    if value is None or _taken_back(value, [part for line in rest for part in _sentences(line)]):
        return None
    begins = re.search(r"(?:^|[.!?]) ?$", lines[number][: last.start()])
    for (line, found), (following, ending) in pairwise(labels):
        end = ending.start() if following == line else len(lines[line])
        earlier = _labelled(lines[line][found.end() : end].strip())
        unsettled = earlier != value and not begins if line == number else earlier not in (None, value) and not begins
        if unsettled or (line == number and earlier not in (None, value) and not last["lead"]):
            return None
    return value


def _labelled(said: str) -> float | None:
    """What stands behind `Better:`."""
    if _TIE.fullmatch(said) or re.fullmatch(rf"both(?: {_NOUNS})?[ .!]*", said):
        return 0.5
    found = re.match(_NAME, said)
    if found is None:
        return None
    value, behind = _value(found["name"]), said[found.end() :].strip()
    if "?" in behind or _UNSETTLED.match(behind) or not _BEHIND.match(behind) or _taken_back(value, _sentences(behind)):
        return None
    return value


def _stated(sentence: str, whole: bool = True) -> float | None:
    """What a sentence says that is nothing but a choice, with a reason perhaps. whole: it fills its line, as a name must."""
    if _TIE.fullmatch(sentence):
        return 0.5
    if not whole and re.fullmatch(rf"{_NAME}[ .!]*", sentence):
        return None
    found = _ALONE.fullmatch(re.split(r",? (?:because|since|due to)\b", sentence, maxsplit=1)[0])
    if found is None or "?" in sentence or _DOUBT.search(sentence):
        return None
    return _value(found["name"] or found["named"])


def _taken_back(value: float, rest: list[str]) -> bool:
    """Whether what follows a choice, sentence by sentence, doubts it, or says another."""
    named, would = f"(?:the )?(?:{_NOUN} )?", "(?:would|should|must)"
    own, other = [named + mark for mark in {0.0: "①②", 1.0: "②①"}.get(value, ("(?!)", "[①②]"))]
    contrary = re.compile(
        rf"{other} (?:(?:is|was|seems|looks|appears|remains|{would} be) (?:{_BETTER}|(?:the |my )?(?:one|{_VERDICT})\b)|"
        rf"(?:{would} )?(?:wins?|deserves?|beats?|comes out)\b)|"
        rf"\b{_BETTER}(?: {_NOUN}| one)? ?(?:is|was|{would} be|[:=]) ?{other}|{_CONCLUDES}{other}[ .!,]*$"
    )
    denied = re.compile(rf"\bnot {own}|{own} (?:is|was|does|did)(?: not|n't) (?:{_BETTER}|win|deserve)")
    for text in rest:
        found = contrary.search(text)
        if _DOUBT.search(text) or denied.search(text) or (found is not None and not _DENIED.search(text[: found.end()])):
            return True
        *clauses, last = re.split(r" ?[,:;/—–] ?|\.(?=\w)|(?:^| )- ", text)
        stated = (_stated(text), _stated(last), *(_stated(clause, whole=False) for clause in clauses))
        if not set(stated) <= {None, value} and not _DENIED.search(text):
            return True
    return False


def _value(name: str) -> float:
    return float(name == "②")
