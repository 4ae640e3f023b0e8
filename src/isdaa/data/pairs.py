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
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from isdaa.data.checks import Message, Text, check_messages, check_text, facts, flag, number, token_ids
from isdaa.errors import UserError, nearest

Row = dict[str, Any]

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
KNOWN_COLUMNS = frozenset(
    {
        "id",
        "rejected",
        "messages",
        "text",
        "weight",
        "chosen_reward",
        "rejected_reward",
        "chosen_finished",
        "rejected_finished",
    }
    | {"facts", "completion_ids"}
    | {*PROMPT_NAMES, *RESPONSE_NAMES, *PAIR_IDS}
    | {name for names in BEHAVIOUR_NAMES for name in names}
)


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
    prompts_cut: int = 0
    chosen_cut: int = 0
    rejected_cut: int = 0
    completions_cut: int = 0
    own_bos: int = 0
    boundary_merges: int = 0

    def drop(self, error: Exception) -> None:
        """Count a row for which `canonical_*` or a recipe raised one of the errors that mean 'dropped'."""
        if isinstance(error, NoResponseError):
            self.dropped_no_response += 1
        else:
            self.dropped_no_common_prompt += 1

    def __add__(self, other: Counts) -> Counts:
        """Counts of two steps over the same rows: `rows` is the first step's, `kept` the last one's, events add up."""
        total = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Counts(**{**total, "rows": self.rows, "kept": other.kept})

    def lines(self) -> list[str]:
        """One line for every count that is not zero; the first says how many rows are left."""
        result = [f"{self.kept} of {self.rows} rows kept"]
        return result + [f"{n} {_COUNT_LINES[name]}" for name, n in asdict(self).items() if name in _COUNT_LINES and n]


_COUNT_LINES = {
    "dropped_equal": "dropped: chosen equals rejected",
    "dropped_no_common_prompt": "dropped: chosen and rejected have no common prompt",
    "dropped_no_response": "dropped: a response is empty, or the dialogue does not end with one",
    "dropped_behaviour_cut": "dropped: would be cut, but carry behaviour logps of the whole response",
    "dropped_nothing_left": "dropped: nothing to learn is left within max_length",
    "repeated_prompts": "prompts repeated, used once",
    "prompts_cut": "prompts cut to max_prompt_length",
    "chosen_cut": "chosen responses cut to max_length (no EOS scored)",
    "rejected_cut": "rejected responses cut to max_length (no EOS scored)",
    "completions_cut": "examples cut to max_length",
    "own_bos": "prompts bring their own BOS token (no second one added)",
    "boundary_merges": "responses whose first token would merge with the prompt if both were tokenised together",
}


class NoCommonPromptError(UserError):
    """Texts that begin differently, or conversations that differ before their last assistant turn: no pair, dropped."""


class NoResponseError(UserError):
    """A row of a published data set that holds no response where one belongs: dropped. In one's own file it is an error."""


def canonical_pair(row: Mapping[str, Any], where: str, source: str = "") -> Row:
    """A canonical pair from any format that is read: standard, conversational (prompt given or implied), token ids.

    Raises UserError naming row and column for what is missing, empty or out of range; NoCommonPromptError (see there).
    """
    ids = {name: token_ids(row, name, where) for name in PAIR_IDS}
    given = [name for name, value in ids.items() if value is not None]
    if given and len(given) < len(PAIR_IDS):
        missing = next(name for name in PAIR_IDS if name not in given)
        raise UserError(f"{where}: column '{given[0]}' is given but '{missing}' is not; give all three token id columns or none")
    if given:
        prompt, chosen, rejected = (_optional_text(row, names) for names in (PROMPT_NAMES, ("chosen",), ("rejected",)))
    else:
        prompt, chosen, rejected = _texts(row, where)
    behaviour_chosen, behaviour_rejected = _behaviour_logps(row, where)
    return {
        "id": row_id(row, where, source),
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "behaviour_chosen_logps": behaviour_chosen,
        "behaviour_rejected_logps": behaviour_rejected,
        "weight": number(row, "weight", where, minimum=0.0),
        "chosen_reward": number(row, "chosen_reward", where),
        "rejected_reward": number(row, "rejected_reward", where),
        **ids,
        "chosen_finished": flag(row, "chosen_finished", where),
        "rejected_finished": flag(row, "rejected_finished", where),
        "facts": facts(row, where),
        "where": where,
    }


def canonical_prompt(row: Mapping[str, Any], where: str, source: str = "") -> Row:
    """{id, prompt, prompt_ids, chosen (a response to compare with, or None), facts, where} from any kind of row."""
    if row.get("chosen") is not None and row.get("rejected") is not None:
        pair = canonical_pair(row, where, source)
        return {name: pair[name] for name in ("id", "prompt", "prompt_ids", "chosen", "facts", "where")}
    ids = token_ids(row, "prompt_ids", where)
    chosen: Text | None = None
    prompt: Text
    if row.get("messages") is not None and _first_name(row, PROMPT_NAMES) is None:
        turns = check_messages(row["messages"], "messages", where)
        answered = turns[-1]["role"] == "assistant"
        prompt, chosen = (turns[:-1], turns[-1:]) if answered else (turns, None)
        if not prompt:
            raise UserError(f"{where}: column 'messages' has no turn before the assistant's; a prompt needs one")
    else:
        name = _first_name(row, PROMPT_NAMES) or "prompt"
        prompt = _optional_text(row, (name,)) if ids is not None else check_text(row, name, where)
        answer = _first_name(row, RESPONSE_NAMES)
        if answer is not None and (isinstance(row[answer], list) or str(row[answer]).strip()):
            chosen = check_text(row, answer, where)
    return {
        "id": row_id(row, where, source),
        "prompt": prompt,
        "prompt_ids": ids,
        "chosen": chosen,
        "facts": facts(row, where),
        "where": where,
    }


def canonical_sft(row: Mapping[str, Any], where: str, source: str = "") -> Row:
    """{id, prompt, completion, where}; every assistant turn of `completion` is learnt, or all of a plain text.

    `messages` with one answer become prompt and completion; longer ones, and `text`, a completion without prompt.
    """
    prompt: Text | None = None
    completion: Text
    if row.get("messages") is not None:
        turns = check_messages(row["messages"], "messages", where)
        answers = [i for i, message in enumerate(turns) if message["role"] == "assistant"]
        single = answers == [len(turns) - 1] and len(turns) > 1
        prompt, completion = (turns[:-1], turns[-1:]) if single else (None, turns)
    elif _first_name(row, PROMPT_NAMES) is None and "text" in row:
        completion = check_text(row, "text", where)
    else:
        prompt = check_text(row, _first_name(row, PROMPT_NAMES) or "prompt", where)
        completion = check_text(row, _first_name(row, RESPONSE_NAMES) or "completion", where)
        if isinstance(prompt, list) or isinstance(completion, list):
            prompt, completion = _as_messages(prompt, "user"), _as_messages(completion, "assistant")
            if completion[: len(prompt)] == prompt:
                completion = completion[len(prompt) :]
    if isinstance(completion, list):
        roles = [message["role"] for message in [*(prompt or []), *completion]]
        if "assistant" not in roles[max(1, len(roles) - len(completion)) :]:
            raise UserError(f"{where}: no message with role 'assistant' answers another, so there is nothing to learn")
    return {"id": row_id(row, where, source), "prompt": prompt, "completion": completion, "where": where}


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
    return pair[names[0]] == pair[names[1]] and pair["chosen_finished"] == pair["rejected_finished"]


# --- text and conversations


def _texts(row: Mapping[str, Any], where: str) -> tuple[Text, Text, Text]:
    """Prompt, chosen and rejected of a row without token ids."""
    chosen, rejected = check_text(row, "chosen", where), check_text(row, "rejected", where)
    name = _first_name(row, PROMPT_NAMES)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if name is None and not any(nearest("prompt", [column]) or column in PROMPT_LIKE for column in row):
            return _without_common_start(chosen, rejected, where)
        prompt = check_text(row, name or "prompt", where)
        if isinstance(prompt, str):
            return prompt, chosen, rejected
    else:
        prompt = check_text(row, name, where) if name is not None and row[name] is not None else []
    conversations = [_conversation(prompt, response, where) for response in (chosen, rejected)]
    for column, whole in zip(("chosen", "rejected"), conversations, strict=True):
        if whole[-1]["role"] != "assistant":
            raise UserError(f"{where}: column '{column}' must end with an assistant message, not with role '{whole[-1]['role']}'")
        if len(whole) < 2:
            raise UserError(
                f"{where}: column '{column}' has no message before the assistant's; add a prompt, there or in 'prompt'"
            )
        if not whole[-1]["content"].strip():
            raise UserError(f"{where}: column '{column}' has an empty last message; write a response or remove the row")
    first, second = conversations
    if first[:-1] != second[:-1]:
        raise NoCommonPromptError(
            f"{where}: chosen and rejected differ before their last assistant turn, so they have no common prompt"
        )
    return first[:-1], first[-1:], second[-1:]


def _without_common_start(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """An implied prompt: what both texts begin with, as TRL's `extract_prompt` divides them.

    A space before the first difference goes to the responses; where one text begins with all of the other, the last
    character of that does, so that no response is empty.
    """
    shorter = min(len(chosen), len(rejected))
    end = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if end is None:
        end = shorter - 1
    elif chosen[end - 1 : end] == " ":
        end -= 1
    if not chosen[:end].strip():
        raise NoCommonPromptError(
            f"{where}: column 'prompt' is missing, and chosen and rejected do not begin with the same words, so they have no "
            "common prompt"
        )
    return chosen[:end], chosen[end:], rejected[end:]


def _conversation(prompt: Text, response: Text, where: str) -> list[Message]:
    """The whole conversation, whether `response` repeats the prompt's messages or not. An empty `prompt` is implied."""
    turns = _as_messages(response, "assistant")
    if isinstance(prompt, list):
        return turns if turns[: len(prompt)] == prompt else prompt + turns
    if turns[0]["role"] == "assistant":
        return [{"role": "user", "content": prompt}, *turns]
    # UltraFeedback's form: the prompt as text beside whole conversations that start with it.
    if not any(message["content"].strip() == prompt.strip() for message in turns[:-1]):
        raise UserError(f"{where}: column 'prompt' is none of the messages of the conversation; remove it or give it as messages")
    return turns


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
