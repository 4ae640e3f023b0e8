"""Where a model's words part into what it thought and what it answered: the one place that knows the markers.

Markers count at the beginning alone, white space and the head of a turn (`<|im_start|>assistant`) aside. A closing one
without its opening one ends a thought, too: chat templates open it in the prompt. A thought ends at the closing marker that
belongs to its opening one; those within it nest. What stands in code, or is spoken of within a line (blanks or quotes around
it), is no marker, unless a thought has no other end. Tags of plain words, such as `<reflection>`, may be an answer's own: they
are no marker where nothing would be left as an answer, nor as a closing one alone within other elements.

    <think> … </think>                       DeepSeek R1, Qwen 3, GLM, Nemotron and most others; also thinking, thought,
                                             thoughts, reasoning, reflection, seed:think, mm:think
    <|channel|>analysis<|message|> … <|end|> gpt-oss, the answer in the channel `final`; `analysis…assistantfinal…` where a
                                             server left the special tokens out; Muse: `assistant to=self<|message|>`
    <|channel>thought … <channel|>           Gemma 4; `<unused94>thought … <unused95>` MedGemma
    [THINK] … [/THINK]                       Magistral, Ministral
    ◁think▷ … ◁/think▷, <|open|>think<|sep|> Kimi
    <|START_THINKING|> … <|END_THINKING|>    Cohere
    <|inner_prefix|>, <|begin_of_thought|>   Apertus, OpenThoughts
    words, such as `Here is my thought process:`  Granite 3.2; `[BEGIN FINAL RESPONSE]` Apriel
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PLAIN_TAGS = "thinking|thought|thoughts|reasoning|reflection"
_TAGS = f"think|{_PLAIN_TAGS}|seed:think|mm:think"
_HEADS = re.compile(  # of a turn, that a server left in
    r"\s*(?:<\|im_start\|>assistant|<\|im_assistant\|>assistant<\|im_middle\|>|<\|start_header_id\|>assistant<\|end_header_id\|>|"
    r"<\|start_of_role\|>assistant<\|end_of_role\|>|<[|｜]assistant[|｜]>|\[\|assistant\|\]|<(?:start_of_turn|\|turn)>model)\s*",
    re.IGNORECASE,
)
# (what opens a thought, what closes it).
_PAIRS = [
    (rf"<(?P<tag>{_TAGS})(?:\s[^<>\n]*)?>", r"</{tag}\s*>"),
    (r"\[THINK\]", r"\[/THINK\]"),
    (r"◁think▷", r"◁/think▷"),
    (r"<\|open\|>think<\|sep\|>", r"<\|close\|>think<\|sep\|>"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    (r"<\|channel>(?:thought\n?)?", r"<channel\|>"),
    (r"<unused94>(?:thought\n?)?", r"<unused95>"),
    (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
]
# Those of plain words, which an answer may begin with: they count where both are there, or where the prompt ends with the first.
_WORDS = [
    (r"Here(?:'s| is) my thought process:", r"Here(?:'s| is) my response:"),
    (r"Here are my reasoning steps:", r"\[BEGIN FINAL RESPONSE\]"),
]
# All markers of all kinds, each as a group of its own: `open0`, `close0` and so on.
_KINDS = [(rf"<{tag}(?:\s[^<>\n]*)?>", rf"</{tag}\s*>") for tag in _TAGS.split("|")] + _PAIRS[1:]
_MARKERS = re.compile(
    "|".join(f"(?P<open{n}>{opener})|(?P<close{n}>{closer})" for n, (opener, closer) in enumerate(_KINDS))
    + r"|(?P<close_final>\[BEGIN FINAL RESPONSE\])",
    re.IGNORECASE,
)
_PLAIN_CLOSER, _ELEMENT = re.compile(rf"</(?:{_PLAIN_TAGS})", re.IGNORECASE), re.compile(r"</?[A-Za-z][\w:.-]*(?:\s[^<>\n]*)?/?>")
# What an answer is wrapped in; those from the fourth on count behind a thought alone.
_WRAPPERS = [
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ("<|START_TEXT|>", "<|END_TEXT|>"),
    ("<|open|>response<|sep|>", "<|close|>response<|sep|>"),
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
    ("", "[END FINAL RESPONSE]"),
    ("<answer>", "</answer>"),
    ("<output>", "</output>"),
]
_MESSAGE = re.compile(
    r"\s*(?:<\|start\|>)?(?:assistant)?(?P<to>\s?to=[\w.:-]+)?(?:<\|channel\|>(?P<channel>\w+)[^<\n]*(?:<\|constrain\|>[^<\n]*)?)?"
    r"<\|message\|>"
)
_ENDS = re.compile(r"<\|(?:end|return|call|eom|eot)\|>|(?=<\|start\|>)")
# Without `assistantfinal`, `analysis` must be glued to a sentence: alone on its line it is a heading.
_BARE = re.compile(
    r"\s*(?:assistant)?analysis(?:(?=[A-Z\d\"'“(*\[#]|\s*\n)(?P<thought>.*?)assistantfinal|(?=[\"“]?[A-Z][\w'’]*,?\s(?!=))(?P<cut>.*)\Z)",
    re.DOTALL,
)
_CODE = re.compile(
    r"^[ \t]{0,3}(?P<fence>`{3,}|~{3,})(?:.*?)^[ \t]{0,3}(?P=fence)[`~]*[ \t]*$|(?P<tick>`+)(?!`)[^\n]*?(?<!`)(?P=tick)(?!`)",
    re.MULTILINE | re.DOTALL,
)
_OPENERS = [opener for opener, _ in _PAIRS + _WORDS]
_OPENED = re.compile(rf"(?:{'|'.join(_OPENERS)}|<\|channel\|>analysis<\|message\|>| to=self<\|message\|>)\s*\Z", re.IGNORECASE)
_FIRST = re.compile(
    rf"\s*(?:<(?:{_TAGS})|\[THINK|◁think|<\|(?:open\|?|START_THINKING|channel\|?|inner_prefix|begin_of_thought)|<unused94)",
    re.IGNORECASE,
)
TAIL = 40  # tokens at a prompt's end in which what opens a thought stands


@dataclass(frozen=True)
class Parts:
    """A text in its parts. marked: whether there is a marker, or thinking that came apart; unfinished: the thought has no end."""

    thinking: str
    answer: str
    marked: bool = False
    unfinished: bool = False


def split(text: str, thinking: str = "", opened: str = "") -> Parts:
    """What was thought and what was answered. A text without a marker is the answer, unchanged.

    thinking: what an endpoint gave apart; opened: what opens a thought at the prompt's end (`opened_by`).
    """
    thoughts, rest, unfinished = _parts(opened + text, bool(opened))
    if (
        thoughts
        and not opened
        and not unfinished
        and not rest.strip()
        and re.match(rf"\s*<(?:{_PLAIN_TAGS})\b", text, re.IGNORECASE)
    ):
        thoughts, rest = [], text  # an element of the answer's own
    if not thoughts and not thinking:
        return Parts("", _unwrapped(text, plain=False))
    said = [part.strip() for part in (thinking, *thoughts)]
    answer = _unwrapped(rest.strip(), plain=True) if thoughts else _unwrapped(text, plain=False)
    return Parts("\n\n".join(part for part in said if part), answer, True, unfinished)


def opened_by(prompt: str) -> str:
    """What opens a thought at the end of a rendered prompt, so that the reply begins inside; empty where nothing does."""
    found = _OPENED.search(prompt[-200:])
    return found[0] if found is not None else ""


def parts_of(record: Mapping[str, Any], prompt: Mapping[str, Any]) -> Parts:
    """A sample of an evaluation's records in its parts. prompt: its own record, which knows what the prompt opens."""
    text = record["text"]
    text = text if isinstance(text, str) else str(text[-1]["content"])
    return split(text, opened=prompt.get("opened") or "")


def without_thinking(response: Any) -> Any:
    """A response of a data set, text or messages, as it is answered."""
    if isinstance(response, str):
        return split(response).answer
    return [*response[:-1], {**response[-1], "content": split(str(response[-1]["content"])).answer}]


def begins_thought(token: str) -> bool:
    """Whether a reply's first token opens a thought."""
    return _FIRST.match(token) is not None


def _parts(text: str, opened: bool) -> tuple[list[str], str, bool]:
    """(thoughts, the rest, whether the last thought has no end); no thoughts where there is no marker."""
    if _MESSAGE.match(text) is not None:
        return _channels(text)
    if re.match(r"\s*(?:<\|start\|>assistant)?<\|channel\|>\w*\s*\Z", text):
        return [""], "", True
    bare = _BARE.match(text)
    if bare is not None:
        return [bare["thought"] or bare["cut"] or ""], text[bare.end() :], bare["thought"] is None
    if re.match(r"\s*assistantfinal", text):
        return [""], text.lstrip().removeprefix("assistantfinal"), False
    thoughts: list[str] = []
    head = _HEADS.match(text)
    if head is not None and _opener(text[head.end() :], opened) is not None:
        text = text[head.end() :]
    while (found := _opener(text, opened and not thoughts)) is not None:
        start, opener, closer, firm = found
        end = _closed(text, start, opener, closer)
        if end is None:
            if not firm:
                break
            return [*thoughts, text[start:]], "", True
        thoughts.append(text[start : end.start()])
        text = text[end.end() :]
    if not thoughts:
        lone = _lone(text)
        if lone is not None:
            return [text[: lone.start()]], text[lone.end() :], False
    return thoughts, text, False


def _opener(text: str, opened: bool) -> tuple[int, str, str, bool] | None:
    """(where the thought begins, what opens and what closes it, whether it is one without its end, too)."""
    for number, (opener, closer) in enumerate(_PAIRS + _WORDS):
        found = re.match(rf"\s*{opener}", text, re.IGNORECASE)
        if found is not None:
            tag = found.groupdict().get("tag")
            opener, closer = (rf"<{tag}(?:\s[^<>\n]*)?>", closer.format(tag=tag)) if tag else (opener, closer)
            return found.end(), opener, closer, opened or number < len(_PAIRS)
    return None


def _closed(text: str, start: int, opener: str, closer: str) -> re.Match[str] | None:
    """What closes the thought: not in code, not spoken of, not of a thought within it; where there is no such, the first."""
    found = list(re.compile(f"(?P<open>{opener})|{closer}", re.IGNORECASE).finditer(text, start))
    if all(one["open"] for one in found):
        return None
    code, depth = _code(text, start), 1
    outside = [one for one in found if not _within(one, code)]
    marks = [one for one in outside if not _spoken_of(one)]
    for one in marks:
        depth += 1 if one["open"] else -1
        if not depth:
            return one
    ends = [[one for one in part if not one["open"]] for part in (marks, outside, found)]
    return ends[0][-1] if ends[0] else (ends[1] or ends[2])[0]


def _lone(text: str) -> re.Match[str] | None:
    """A closing marker of a thought that the prompt opened: no opening one before it, not in code, not within a sentence.

    A tag of plain words is none within other elements.
    """
    found = [one for one in _MARKERS.finditer(text) if not _spoken_of(one)]
    if not any(str(one.lastgroup).startswith("close") for one in found):
        return None
    code = _code(text)
    depths: dict[str, int] = {}
    for one in found:
        kind = str(one.lastgroup).removeprefix("open").removeprefix("close")
        if _within(one, code):
            continue
        opens = str(one.lastgroup).startswith("open")
        if opens or depths.get(kind):
            depths[kind] = depths.get(kind, 0) + (1 if opens else -1)
        elif not _PLAIN_CLOSER.match(one[0]) or not _among_elements(text, one, code):
            return one
    return None


def _among_elements(text: str, found: re.Match[str], code: list[tuple[int, int]]) -> bool:
    before = _ELEMENT.finditer(text, 0, found.start())
    return bool(re.compile(r"\s*</").match(text, found.end())) or any(not _within(one, code) for one in before)


def _spoken_of(found: re.Match[str]) -> bool:
    """Whether a sentence goes on around it."""
    text, (start, end) = found.string, found.span()
    before, behind = text[max(start - 1, 0) : start], text[end : end + 1]
    return bool(before and before in " \t\"'“‘(" and behind and behind in " \t\"'”’),.;:!?")


def _code(text: str, start: int = 0) -> list[tuple[int, int]]:
    return [found.span() for found in _CODE.finditer(text, start)]


def _within(found: re.Match[str], spans: list[tuple[int, int]]) -> bool:
    return any(start < found.start() < end for start, end in spans)


def _channels(text: str) -> tuple[list[str], str, bool]:
    """gpt-oss's messages: `final` is the answer; where there are no channels, what is said to the user."""
    thoughts, answer, ended, place = [], "", True, 0
    while (head := _MESSAGE.match(text, place)) is not None:
        end = _ENDS.search(text, head.end())
        body = text[head.end() : end.start() if end is not None else len(text)]
        ended, place = end is not None, end.end() if end is not None else len(text)
        if head["channel"] == "final" or (head["channel"] is None and (head["to"] or "to=user").strip() == "to=user"):
            answer += body
            ended = True
        else:
            thoughts.append(body)
    return thoughts or [""], answer, not ended


def _unwrapped(answer: str, plain: bool) -> str:
    """The answer without what it is wrapped in; plain: ordinary tags count, too."""
    text = answer.strip().removesuffix("<|end|>").rstrip()
    for opener, closer in _WRAPPERS if plain else _WRAPPERS[:3]:
        if text.startswith(opener) and (opener or text.endswith(closer)) and closer not in text[: -len(closer)]:
            return text.removeprefix(opener).removesuffix(closer).strip()
    return answer
