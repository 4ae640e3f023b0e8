"""The preference pair: one canonical row whatever the file calls its columns, and every check of what a row says.

Canonical pair, by column:
  id, where ('file:row')                            str
  prompt, chosen, rejected                          str, or a list of chat messages: the prompt is all before the last
                                                    assistant turn, a response that turn, as a list of one
  prompt_ids, chosen_ids, rejected_ids              list of ints or None; they win over the text
  chosen_finished, rejected_finished                bool; False: the response was cut, so no EOS is scored
  behaviour_chosen_logps, behaviour_rejected_logps  float or None: log μ, sums over the response, both or neither
  weight, chosen_reward, rejected_reward            float or None
  facts                                             dict or None: what the embedded world's judge knows
A file's `pairing` is counted, and no column of a canonical pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from isdaa.data import formats
from isdaa.data.checks import THINKING, Message, Text, check_messages, check_text, facts, flag, kind, number, token_ids
from isdaa.data.implied import NoCommonPromptError, NoResponseError, implied_prompt, is_dialogue, last_turn
from isdaa.errors import UserError, nearest

Row = dict[str, Any]
Repeated = Literal["strip", "keep"] | None  # what becomes of a prompt that responses repeat; None: counted, as they stand

TOLD = 20  # names of columns that are told; of more, how many
LARGEST_WEIGHT = 1e6
KEEP: Repeated = "keep"  # of files that a run wrote: what was to be taken off has been

PROMPT_NAMES = ("prompt", "query")
RESPONSE_NAMES = ("completion", "response", "summary", "reference_response", "chosen")
# Beside texts, a column of such a name means that the prompt is there under a name we do not read, not that it is implied.
PROMPT_LIKE = frozenset({"question", "instruction", "input", "context", "post", "problem", "prompts"})
PAIR_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
# The authors' files call the behaviour policy's logps plainly `chosen_logps` and `rejected_logps`.
BEHAVIOUR_NAMES = (
    ("behaviour_chosen_logps", "behaviour_rejected_logps"),
    ("behavior_chosen_logps", "behavior_rejected_logps"),
    ("chosen_logps", "rejected_logps"),
)
SFT_COLUMNS = frozenset({"id", "messages", "text", *PROMPT_NAMES, *RESPONSE_NAMES, *formats.COLUMNS})
PAIR_COLUMNS = frozenset(
    {
        *("id", "chosen", "rejected", "messages", "weight", "chosen_reward", "rejected_reward", "chosen_finished"),
        *("rejected_finished", "facts", "behaviour_tokens", "pairing", *PROMPT_NAMES, *PAIR_IDS, *formats.COLUMNS),
        *(name for names in BEHAVIOUR_NAMES for name in names),
    }
)
TEMPLATE_COLUMNS = formats.JSON_COLUMNS  # what a chat template gets beside the messages
KNOWN_COLUMNS = SFT_COLUMNS | PAIR_COLUMNS | {"completion_ids", *formats.ALPACA}


@dataclass
class Counts:
    """What became of the rows: normal events, counted and shown rather than refused. Add two with `+`."""

    rows: int = 0
    kept: int = 0
    dropped_equal: int = 0
    dropped_no_common_prompt: int = 0
    dropped_no_response: int = 0
    dropped_behaviour_cut: int = 0
    dropped_nothing_left: int = 0
    repeated_prompts: int = 0
    prompt_repeated: int = 0
    prefilled: int = 0
    answered: int = 0
    spoken: int = 0
    trailing: int = 0
    empty_prompts: int = 0
    other_speakers: int = 0
    prompts_cut: int = 0
    chosen_cut: int = 0
    rejected_cut: int = 0
    completions_cut: int = 0
    own_bos: int = 0
    boundary_merges: int = 0
    opening_cut: int = 0
    thinking_left_out: int = 0
    turns_apart: int = 0
    not_learnt: int = 0
    no_template: int = 0
    best_worst: int = 0  # rows that the label stage marked
    unread: tuple[str, ...] = ()

    def drop(self, error: Exception) -> None:
        """Count a row for which `canonical_*` or a recipe raised one of the errors that mean 'dropped'."""
        if isinstance(error, NoResponseError):
            self.dropped_no_response += 1
        else:
            self.dropped_no_common_prompt += 1

    def __add__(self, other: Counts) -> Counts:
        """Counts of two steps over the same rows: `rows` is the first step's, `kept` the last one's, events add up."""
        total = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "unread"}
        unread = tuple(dict.fromkeys((*self.unread, *other.unread)))
        return Counts(**{**total, "rows": self.rows, "kept": other.kept, "unread": unread})

    def lines(self) -> list[str]:
        """One line for every count that is not zero; the first says how many rows are left."""
        result = [f"{self.kept - self.turns_apart} of {self.rows} rows kept"]
        result += [f"{n} {_COUNT_LINES[name]}" for name, n in asdict(self).items() if name in _COUNT_LINES and n]
        names = [name if name.isprintable() and name else repr(name) for name in self.unread]
        names = [f"{name[:60]}…" if len(name) > 60 else name for name in names]
        more = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
        return [*result, f"not read: {', '.join(names[:TOLD])}{more}"] if names else result


_COUNT_LINES = {
    "dropped_equal": "dropped: chosen equals rejected",
    "dropped_no_common_prompt": "dropped: chosen and rejected have no common prompt",
    "dropped_no_response": "dropped: a response is empty, or the dialogue does not end with one",
    "dropped_behaviour_cut": "dropped: too long, and their behaviour logps are of the uncut response",
    "dropped_nothing_left": "dropped: nothing to learn is left within max_length",
    "repeated_prompts": "prompts repeated, used once",
    "prompt_repeated": "rows have the prompt in column 'prompt' and again at the start of the responses",
    "prefilled": "prompts end with an assistant message: the responses continue it",
    "answered": "prompts are whole conversations: the model answers again, and their last answer is for comparison",
    "spoken": "rows of plain text are read as conversations, because these or other rows have 'system' or 'history'",
    "trailing": "rows end with a tool or user message that has no answer: this message is dropped",
    "empty_prompts": "prompts are empty: the responses follow BOS alone",
    "other_speakers": "rows have responses of several messages: those of tools and users are read, not scored",
    "prompts_cut": "prompts cut to max_prompt_length",
    "chosen_cut": "chosen responses cut to max_length (no EOS scored)",
    "rejected_cut": "rejected responses cut to max_length (no EOS scored)",
    "completions_cut": "examples cut to max_length",
    "own_bos": "prompts bring their own BOS token (no second one added)",
    "boundary_merges": "rows have a token that would span prompt and response in one string: split at the boundary",
    "opening_cut": "rows lack the thinking that the generation prompt opens: prompts end where the template starts the answer",
    "thinking_left_out": "rows have thinking in earlier turns, which the chat template drops",
    "turns_apart": "additional rows: earlier turns are examples of their own where the chat template changes them later",
    "not_learnt": "conversations have an answer before any question, or a question after the last answer: these are not learnt",
    "no_template": "rows are plain text, so the model's chat template is not applied; to apply it, give messages",
}


def canonical_pair(
    row: Mapping[str, Any], where: str, source: str = "", repeated: Repeated = None, counts: Counts | None = None
) -> Row:
    """A canonical pair from any format that is read: standard, conversational (prompt given or implied), token ids, other tools'.

    repeated: what becomes of a text prompt that both responses begin with. counts: gets what was noticed.
    Raises UserError naming row and column for what is missing or out of range; NoCommonPromptError, NoResponseError: dropped.
    """
    row, counts = formats.standard(row, where), counts if counts is not None else Counts()
    ids = {name: token_ids(row, name, where) for name in PAIR_IDS}
    given = [name for name, value in ids.items() if value is not None]
    if given and len(given) < len(PAIR_IDS):
        missing = next(name for name in PAIR_IDS if name not in given)
        raise UserError(f"{where}: column '{given[0]}' is given but '{missing}' is not; give all three token id columns or none")
    if given:
        prompt, chosen, rejected = (_optional_text(row, names) for names in (PROMPT_NAMES, ("chosen",), ("rejected",)))
    else:
        found = _texts(row, where, counts)
        prompt, chosen, rejected = _once(*found, repeated=repeated, counts=counts, where=where)
        if chosen != found[1] and _behaviour_logps(row, where)[0] is not None and row.get("behaviour_tokens") is None:
            raise UserError(
                f"{where}: its behaviour logps are of a response that begins with the prompt, which prompt_repeated: strip takes "
                "off; leave the logps out, or compute them again with `isdaa logps --prompt_repeated strip`"
            )
        if isinstance(prompt, str):
            _for_messages_alone(row, where)
        counts.spoken += bool(row.get(formats.SPOKEN))
        counts.empty_prompts += not prompt
        counts.other_speakers += any(len(side) > 1 for side in (chosen, rejected) if isinstance(side, list))
    behaviour_chosen, behaviour_rejected = _behaviour_logps(row, where)
    counts.best_worst += row.get("pairing") == "best_worst"
    return {
        "id": row_id(row, where, source),
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "tools": row.get("tools"),
        "chat_template_kwargs": row.get("chat_template_kwargs"),
        "behaviour_chosen_logps": behaviour_chosen,
        "behaviour_rejected_logps": behaviour_rejected,
        "behaviour_tokens": row.get("behaviour_tokens") if behaviour_chosen is not None else None,
        "weight": _weight(row, where),
        "chosen_reward": number(row, "chosen_reward", where),
        "rejected_reward": number(row, "rejected_reward", where),
        **ids,
        "chosen_finished": flag(row, "chosen_finished", where),
        "rejected_finished": flag(row, "rejected_finished", where),
        "facts": facts(row, where),
        "where": where,
    }


def canonical_prompt(
    row: Mapping[str, Any], where: str, source: str = "", repeated: Repeated = None, counts: Counts | None = None
) -> Row:
    """{id, prompt, prompt_ids, chosen (a response to compare with, or None), tools, …, facts, where} from any kind of row."""
    counts = counts if counts is not None else Counts()
    names = ("id", "prompt", "prompt_ids", "chosen", *TEMPLATE_COLUMNS, "facts", "where")
    plain = formats.standard(row, where)
    if plain.get("chosen") is not None and plain.get("rejected") is not None:
        pair = canonical_pair(row, where, source, repeated, counts)
        if pair["prompt_ids"] is None and isinstance(pair["prompt"], list):
            _check_asked(pair["prompt"], "chosen" if _first_name(row, PROMPT_NAMES) is None else "prompt", where)
        return {name: pair[name] for name in names}
    row = plain
    ids = token_ids(row, "prompt_ids", where)
    chosen: Text | None = None
    prompt: Text
    name = _first_name(row, PROMPT_NAMES) or "prompt"
    if row.get("messages") is not None and _first_name(row, PROMPT_NAMES) is None:
        name = "messages"
        prompt, chosen = _asked(check_messages(row["messages"], "messages", where), name, where, counts)
    else:
        prompt = _optional_text(row, (name,)) if ids is not None else check_text(row, name, where, blank=True)
        answer = _first_name(row, RESPONSE_NAMES)
        if answer is not None and not formats.empty(row[answer]):
            chosen = check_text(row, answer, where)
        if ids is None and chosen is None and isinstance(prompt, list):
            prompt, chosen = _asked(prompt, name, where, counts)
            counts.answered += chosen is not None
        elif ids is None and chosen is None and isinstance(prompt, str) and is_dialogue(prompt):
            with suppress(NoResponseError):  # it ends where an answer belongs
                prompt, chosen = last_turn(prompt, name, where)
                counts.answered += 1
        elif ids is None and chosen is not None and (isinstance(prompt, list) or isinstance(chosen, list)):
            chosen = _through_last_answer(chosen, counts)
            if isinstance(prompt, list) and len(prompt) > 1 and _same(prompt[-1], _as_messages(chosen, "assistant")[-1]):
                prompt, chosen = prompt[:-1], prompt[-1:]  # the whole conversation, and its answer once more
                counts.answered += 1
            else:
                whole, end = _joined(prompt, chosen, where)
                if whole[end:] and whole[-1]["role"] == "assistant":
                    prompt, chosen = _divided(whole, end, True, counts)
                else:
                    raise UserError(
                        f"{where}: column '{answer}' holds no answer of the assistant behind the prompt; add one, or remove it"
                    )
        if ids is None and chosen is not None:
            prompt, chosen = _once(prompt, chosen, repeated=repeated, counts=counts, where=where)
    if ids is None and isinstance(prompt, list):
        _check_asked(prompt, name, where)
        _check_turns(prompt, where)
        counts.spoken += bool(row.get(formats.SPOKEN))
    if isinstance(prompt, str) and ids is None:
        _for_messages_alone(row, where)
        counts.empty_prompts += not prompt
    return {
        "id": row_id(row, where, source),
        "prompt": prompt,
        "prompt_ids": ids,
        "chosen": chosen,
        "tools": row.get("tools"),
        "chat_template_kwargs": row.get("chat_template_kwargs"),
        "facts": facts(row, where),
        "where": where,
    }


def canonical_sft(
    row: Mapping[str, Any], where: str, source: str = "", repeated: Repeated = None, counts: Counts | None = None
) -> Row:
    """{id, prompt, completion, tools, …, where}; every assistant turn of `completion` is learnt, or all of a plain text.

    `messages` with one answer become prompt and completion; longer ones, and `text`, a completion without prompt.
    """
    row, counts = formats.standard(row, where), counts if counts is not None else Counts()
    prompt: Text | None = None
    completion: Text
    if row.get("messages") is not None:
        turns = check_messages(row["messages"], "messages", where)
        answers = [i for i, message in enumerate(turns) if message["role"] == "assistant"]
        single = answers == [len(turns) - 1] and len(turns) > 1
        prompt, completion = (turns[:-1], turns[-1:]) if single else (None, turns)
    elif _first_name(row, PROMPT_NAMES) is None and "text" in row:
        completion = check_text(row, "text", where)
    elif _first_name(row, PROMPT_NAMES) is None and is_dialogue(row.get("chosen")):
        prompt, completion = last_turn(row["chosen"], "chosen", where)
    else:
        prompt = check_text(row, _first_name(row, PROMPT_NAMES) or "prompt", where, blank=True)
        completion = _response(row, _first_name(row, RESPONSE_NAMES) or "completion", where)
        if isinstance(prompt, list) or isinstance(completion, list):
            whole, end = _joined(prompt, completion, where)
            prompt, completion = _divided(whole, end, True, counts)
        if completion:
            prompt, completion = _once(prompt, completion, repeated=repeated, counts=counts, where=where)
        counts.empty_prompts += not prompt
    if isinstance(completion, list):
        turns = [*(prompt or []), *completion]
        learnt = [turn for turn in turns[max(1, len(turns) - len(completion)) :] if turn["role"] == "assistant"]
        if not learnt:
            raise UserError(f"{where}: no message with role 'assistant' answers another, so there is nothing to learn")
        if any(formats.empty([turn]) for turn in learnt):
            raise NoResponseError(f"{where}: an answer of the assistant is empty; write one or remove the row")
        _check_turns(turns, where)
        counts.spoken += bool(row.get(formats.SPOKEN))
    else:
        _for_messages_alone(row, where)
    found = {name: row.get(name) for name in TEMPLATE_COLUMNS}
    return {"id": row_id(row, where, source), "prompt": prompt, "completion": completion, **found, "where": where}


def row_id(row: Mapping[str, Any], where: str, source: str = "") -> str:
    """The row's own `id`, or 'file:row', the file as seen from the folder `source`: wherever that lies, the id is the same."""
    own = row.get("id")
    if own is not None and str(own):
        return str(own)
    place, folder = Path(where), Path(source).expanduser()
    return place.relative_to(folder).as_posix() if source and place.is_relative_to(folder) else place.name


def same_response(pair: Row) -> bool:
    """Chosen equals rejected, in token ids where the row has them; one that was cut differs from one that ended."""
    names = ("chosen", "rejected") if pair["chosen_ids"] is None else ("chosen_ids", "rejected_ids")
    same: bool = pair[names[0]] == pair[names[1]] and pair["chosen_finished"] == pair["rejected_finished"]
    return same


def competing(row: Mapping[str, Any], sft: bool) -> list[str]:
    """Columns that hold something and are not read, since another column of the row is read in their place."""
    told = [name for name in (*PROMPT_NAMES, *RESPONSE_NAMES, "messages", "conversations", "text") if not _nothing(row.get(name))]
    prompts, turns = [n for n in told if n in PROMPT_NAMES], [n for n in told if n in ("messages", "conversations")]
    answers = [n for n in told if n in RESPONSE_NAMES]
    if not sft:
        return [*prompts[1:], *(turns if prompts else turns[1:])]
    if turns:
        return [*turns[1:], *prompts, *answers, *(n for n in told if n == "text")]
    return [*prompts[1:], *answers[1:], *(n for n in told if n == "text")] if prompts else answers if "text" in told else []


def _nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str | list) and len(value) == 0)


# --- text and conversations


def _texts(row: Mapping[str, Any], where: str, counts: Counts) -> tuple[Text, Text, Text]:
    """Prompt, chosen and rejected of a row without token ids."""
    chosen, rejected = _response(row, "chosen", where), _response(row, "rejected", where)
    name = _first_name(row, PROMPT_NAMES)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if name is None and not any(nearest("prompt", [column]) or column in PROMPT_LIKE for column in row):
            return implied_prompt(chosen, rejected, where)
        prompt = check_text(row, name or "prompt", where, blank=True)
        if isinstance(prompt, str):
            return prompt, chosen, rejected
    else:
        prompt = check_text(row, name, where) if name is not None and row[name] is not None else []
    chosen, rejected = (_through_last_answer(side, counts) for side in (chosen, rejected))
    (first, given), (second, other) = (_joined(prompt, response, where) for response in (chosen, rejected))
    for column, whole in (("chosen", first), ("rejected", second)):
        if whole[-1]["role"] != "assistant":
            raise UserError(f"{where}: column '{column}' must end with an assistant message, not with role '{whole[-1]['role']}'")
        if len(whole) < 2:
            raise UserError(
                f"{where}: column '{column}' has no message before the assistant's; add a prompt, there or in 'prompt'"
            )
    # The prompt is all that both say before an answer, the response what follows: in most data the last assistant turn.
    end = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if not _same(a, b)), min(len(first), len(second)))
    end = min(end, len(first) - 1, len(second) - 1)
    while end > 0 and not first[end]["role"] == second[end]["role"] == "assistant":
        end -= 1
    if end == 0 or (isinstance(prompt, list) and prompt and end < min(given, other)):
        raise NoCommonPromptError(
            f"{where}: chosen and rejected do not begin with the same messages, so they have no common prompt"
        )
    for whole in (first, second):
        _check_turns(whole, where)
    asked, answer = _divided(first, end, end == given == other and bool(prompt), counts)
    begun = asked[-1]["content"].strip() if asked[-1].get("prefix") else ""
    if begun and begun in (answer[-1]["content"].strip(), second[-1]["content"].strip()):
        raise UserError(f"{where}: column 'prompt' ends with one of the responses; leave the answer out of the prompt")
    return asked, answer, second[end:]


def _through_last_answer(response: Text, counts: Counts) -> Text:
    """A response without what others say behind its last answer: nothing of that is scored."""
    if isinstance(response, str) or all(message["role"] != "assistant" for message in response):
        return response
    last = max(i for i, message in enumerate(response) if message["role"] == "assistant")
    counts.trailing += last < len(response) - 1
    return response[: last + 1]


def _asked(turns: list[Message], column: str, where: str, counts: Counts) -> tuple[list[Message], list[Message] | None]:
    """(prompt, its answer) of a conversation that stands alone: its last answer is not for the model to go on from, unless the
    message says so by `prefix`."""
    if turns[-1]["role"] != "assistant" or "prefix" in turns[-1]:
        return _prefilled(turns, counts), None
    if len(turns) < 2:
        raise UserError(f"{where}: column '{column}' has no turn before the assistant's; a prompt needs one")
    if turns[-2]["role"] == "assistant":
        raise UserError(f"{where}: column '{column}' ends with two turns of the assistant in a row; remove one of them")
    return turns[:-1], turns[-1:]


def _check_asked(prompt: list[Message], column: str, where: str) -> None:
    """Raises UserError for a prompt that asks the model nothing: it ends with a system message, or nobody but it speaks."""
    if prompt[-1]["role"] in ("system", "developer"):
        raise UserError(
            f"{where}: column '{column}' ends with a message of role '{prompt[-1]['role']}', which no answer follows; "
            "end it with what the user asks"
        )
    if all(message["role"] != "user" for message in prompt):
        raise UserError(f"{where}: column '{column}' has no message of role 'user', so nothing is asked; add one")


def _check_turns(messages: list[Message], where: str) -> None:
    """Raises UserError where a user message stands twice in a row."""
    for first, second in pairwise(messages):
        if first["role"] == second["role"] == "user" and _same(first, second):
            raise UserError(f"{where}: a user message stands twice ({kind(second['content'])}); remove one")


def _response(row: Mapping[str, Any], column: str, where: str) -> Text:
    """A response that says something. Raises NoResponseError for one that does not, UserError where there is no such column."""
    if column in row and formats.empty(row[column]):
        value = row[column]
        what = "is null" if value is None else "has an empty last message" if isinstance(value, list) and value else "is empty"
        raise NoResponseError(f"{where}: column '{column}' {what}; write a response or remove the row")
    return check_text(row, column, where)


def _once(prompt: Text, *responses: Text, repeated: Repeated, counts: Counts, where: str) -> tuple[Text, ...]:
    """The prompt and its responses: where each response begins with the text of the prompt (of a conversation, of its last user
    message), the row is counted, and with `strip` the response is what follows."""
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"] if prompt[-1]["role"] == "user" else ""
    answers = [response if isinstance(response, str) else response[0]["content"] for response in responses]
    words = asked.strip()
    if not words or not all(_begins(answer.lstrip(), words) for answer in answers):
        return prompt, *responses
    counts.prompt_repeated += 1
    if repeated != "strip":
        return prompt, *responses
    exact = all(answer.startswith(asked) for answer in answers)
    cut = [answer.removeprefix(asked) if exact else answer.lstrip().removeprefix(words) for answer in answers]
    if not all(answer.strip() for answer in cut):
        raise NoResponseError(f"{where}: a response is the prompt and nothing more")
    if isinstance(prompt, str):
        return prompt, *cut
    return prompt, *([{**r[0], "content": words.lstrip()}, *r[1:]] for r, words in zip(responses, cut, strict=True))  # type: ignore[dict-item]


def _begins(text: str, words: str) -> bool:
    """Whether a text begins with these words, and not with longer ones."""
    return text.startswith(words) and not (words[-1].isalnum() and text[len(words) :][:1].isalnum())


def _for_messages_alone(row: Mapping[str, Any], where: str) -> None:
    """Raises UserError where a text brings what only a chat template could use."""
    for name in formats.JSON_COLUMNS:
        if row.get(name):
            raise UserError(
                f"{where}: column '{name}' is for a chat template, but prompt and response are plain text, to which none is "
                "applied; give them as messages, or remove the column"
            )


def _joined(prompt: Text, response: Text, where: str) -> tuple[list[Message], int]:
    """(the whole conversation, where its response begins), whether `response` repeats the prompt's messages or not.

    An empty `prompt` is implied: then the response is the last message.

    Messages are the same where role and words are, white space around them aside; a system message may be in one of them alone.
    """
    turns = _as_messages(response, "assistant")
    if turns[0]["role"] == "assistant":
        before = _as_messages(prompt, "user")
        return [*before, *turns], len(before) or len(turns) - 1
    if isinstance(prompt, str):
        # UltraFeedback's form: the prompt as text beside whole conversations that start with it.
        if not any(message["content"].strip() == prompt.strip() for message in turns[:-1]):
            raise UserError(
                f"{where}: column 'prompt' is none of the messages of the conversation; remove it or give it as messages"
            )
        return turns, len(turns) - 1
    begin, rest = _without_system(prompt), _without_system(turns)
    if len(rest) >= len(begin) and all(_same(a, b) for a, b in zip(begin, rest, strict=False)):
        system, own = prompt[: len(prompt) - len(begin)], turns[: len(turns) - len(rest)]
        if system and own and not _same(system[0], own[0]):
            raise UserError(f"{where}: column 'prompt' and a response begin with different system messages; leave one out")
        whole = [*(system or own), *rest]
        return whole, len(whole) - len(rest) + len(begin) if begin else len(whole) - 1
    last = next((message for message in reversed(begin) if message["role"] == "user"), None)
    if any(last is not None and _same(last, message) for message in rest):
        if all(any(_same(message, other) for other in rest) for message in begin):
            return turns, len(turns) - 1  # the last question alone, beside the whole conversation
        raise UserError(
            f"{where}: the last user message of 'prompt' stands once more in a response, which does not begin with the prompt; "
            "leave the prompt out of the responses, or let them begin with all of it"
        )
    if begin and begin[-1]["role"] == rest[0]["role"] == "user":
        raise UserError(
            f"{where}: 'prompt' ends with a user message and a response begins with another one; one of them is too much"
        )
    whole = prompt + turns
    return whole, next((i for i in range(len(prompt), len(whole)) if whole[i]["role"] == "assistant"), len(whole) - 1)


def _without_system(messages: list[Message]) -> list[Message]:
    return messages[1:] if messages and messages[0]["role"] == "system" else messages


def _same(first: Message, second: Message) -> bool:
    """Whether two messages say the same, tool calls and thinking included."""
    more = ("tool_calls", *THINKING)
    words = [(m["role"], m["content"].strip(), [m.get(name) or None for name in more]) for m in (first, second)]
    return words[0] == words[1]


def _divided(whole: list[Message], end: int, prefilled: bool, counts: Counts) -> tuple[list[Message], list[Message]]:
    """(prompt, response). A prompt that ends with words of the assistant (a prefill) is continued by the response."""
    prompt, response = whole[:end], whole[end:]
    if prompt[-1]["role"] != "assistant" or not response or response[0]["role"] != "assistant":
        return prompt, response
    if prefilled:
        return _prefilled(prompt, counts), response
    return [*prompt[:-1], {**prompt[-1], "prefix": False}], response  # two answers: they stay two where the row is read again


def _prefilled(prompt: list[Message], counts: Counts) -> list[Message]:
    """The prompt, its last message marked where it is the beginning of an answer (`chat.ChatFormat` reads the mark)."""
    if prompt[-1]["role"] != "assistant" or prompt[-1].get("tool_calls") or prompt[-1].get("prefix") is False:
        return prompt
    counts.prefilled += 1
    return [*prompt[:-1], {**prompt[-1], "prefix": True}]


def _as_messages(text: Text, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _optional_text(row: Mapping[str, Any], names: Sequence[str]) -> Text:
    """Text beside token ids: for people and scorers only, so it may be absent."""
    name = _first_name(row, names)
    value = row[name] if name is not None else ""
    return value if isinstance(value, str | list) else ""


def _first_name(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of the names that the row has a value for; else the first that it has at all."""
    present = [name for name in names if name in row]
    return next((name for name in present if row[name] is not None), present[0] if present else None)


def _weight(row: Mapping[str, Any], where: str) -> float | None:
    value = number(row, "weight", where, minimum=0.0)
    if value is not None and value > LARGEST_WEIGHT:
        raise UserError(f"{where}: column 'weight' is {value:g}; it must not be above {LARGEST_WEIGHT:g}")
    return value


def _behaviour_logps(row: Mapping[str, Any], where: str) -> tuple[float | None, float | None]:
    for names in BEHAVIOUR_NAMES:
        values = [number(row, name, where, maximum=1e-2) for name in names]
        if values[0] is None and values[1] is None:
            continue
        if values[0] is None or values[1] is None:
            absent, given = names if values[0] is None else names[::-1]
            raise UserError(
                f"{where}: column '{absent}' has no value but '{given}' has one; give both behaviour logps or neither"
            )
        return values[0], values[1]
    return None, None
