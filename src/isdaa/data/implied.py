"""Prompts that a file of texts implies: the common start of both responses; of HH's dialogues, all before the last turn."""

from __future__ import annotations

import re
import unicodedata

from isdaa.errors import UserError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
# Scripts that put no space between words: kana, Han, Thai, Lao, Tibetan, Burmese, Khmer. Any character may begin a response.
NO_SPACES = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1b7f\u3040-\u312f\ua000-\ua4cf\ua980-\ua9df\uaa00-\uaadf\uff66-\uff9f\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
VIRAMA = 9  # Unicode's combining class
JOINS = ("'", "’", "ʼ", ".", ",", "-", "‐", "\u00b7")  # inside don't, 3.14, 1,000, well-known


class NoCommonPromptError(UserError):
    """Texts that begin differently, or conversations whose first messages differ: no pair, dropped."""


class NoResponseError(UserError):
    """A row that holds no response where one belongs: dropped and counted (`sources` says up to how many)."""


def is_dialogue(text: object) -> bool:
    """Whether a text is a dialogue as HH writes it, whatever stands before it."""
    return isinstance(text, str) and ASSISTANT in (told := _with_plain_lines(text)) and HUMAN in f"\n\n{told}"


def _with_plain_lines(text: str) -> str:
    return text.replace("\r\n", "\n")


def last_turn(text: str, column: str, where: str) -> tuple[str, str]:
    """(a dialogue through its last 'Assistant:', what the assistant says then). Raises NoResponseError for no such turn."""
    before, marker, response = _with_plain_lines(text).rpartition(ASSISTANT)
    if not marker or HUMAN in response:
        raise NoResponseError(f"{where}: column '{column}' does not end with a turn of the assistant")
    if not response.strip():
        raise NoResponseError(f"{where}: column '{column}' has an empty last turn")
    return before + marker, " " + response.strip()


def implied_prompt(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected): the prompt is what both texts begin with, up to the last word that both have whole.

    As TRL's `extract_prompt`, a space before the first difference goes to the responses; unlike there, no word is cut, and a
    dialogue's prompt goes through its last 'Assistant:'. Raises NoCommonPromptError, NoResponseError.
    """
    if is_dialogue(chosen) and is_dialogue(rejected):
        (prompt, better), (other, worse) = last_turn(chosen, "chosen", where), last_turn(rejected, "rejected", where)
        if prompt != other:
            raise NoCommonPromptError(
                f"{where}: the dialogues differ before the assistant's last turn, so they have no common prompt"
            )
        return prompt, better, worse
    shorter = min(len(chosen), len(rejected))
    end = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    if end == shorter:  # one text is the start of the other: no response may be empty
        end = shorter - 1
    while end > 0 and (_inside(chosen, end) or _inside(rejected, end)):
        end -= 1
    if chosen[end - 1 : end] == " ":
        end -= 1
    if not chosen[:end].strip():
        raise NoCommonPromptError(
            f"{where}: column 'prompt' is missing, and chosen and rejected do not begin with the same words, so they have no "
            "common prompt"
        )
    return chosen[:end], chosen[end:], rejected[end:]


def _inside(text: str, end: int) -> bool:
    """Whether `end` lies inside a word, or inside what is shown as one character."""
    before, after = text[end - 1], text[end : end + 1]
    if not after:
        return False
    if unicodedata.combining(before) == VIRAMA:  # it joins what stands before and behind it
        return True
    if unicodedata.category(after)[0] == "M" or after == "\u200d" or before == "\u200d" or "\U0001f3fb" <= after <= "\U0001f3ff":
        return True
    if "\U0001f1e6" <= after <= "\U0001f1ff" and "\U0001f1e6" <= before <= "\U0001f1ff":  # a flag is two of these
        start = end
        while start and "\U0001f1e6" <= text[start - 1] <= "\U0001f1ff":
            start -= 1
        return (end - start) % 2 == 1
    if NO_SPACES.match(before) or NO_SPACES.match(after):
        return False
    if _in_words(before) and _in_words(after):
        return True
    if before in JOINS:
        return end >= 2 and _in_words(text[end - 2]) and _in_words(after)
    return after in JOINS and _in_words(before) and _in_words(text[end + 1 : end + 2])


def _in_words(character: str) -> bool:
    return character.isalnum() or character == "_" or unicodedata.category(character or " ")[0] == "M"
