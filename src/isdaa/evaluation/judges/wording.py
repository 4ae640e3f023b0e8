"""How endpoints word what is wrong with a request: too long, refused, or a setting that they do not take.

The wordings are those of OpenAI, Azure, vLLM, SGLang, TGI, llama.cpp, Gemini, Anthropic, Mistral and their like.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from isdaa.data.checks import LONGEST
from isdaa.files import clean

QUOTED = 300  # characters of an endpoint's own words in an error
LEAST_ROOM = 16  # tokens; a reply that has fewer left is not worth asking for

ECHOES = ("input", "ctx", "body", "messages", "prompt", "request", "param_value", "value", "url")  # keys of what was sent

# What an endpoint may not take -> what is said of it, with the option that tells isdaa so from the start.
WAYS = {
    "max_completion_tokens": "calls the limit of a reply max_completion_tokens (--judge_max_completion_tokens)",
    "no temperature": "takes no temperature, so it uses its own (--judge_temperature none)",
    "no logprobs": "gives no log-probabilities, so each vote counts 0 or 1 (--judge_no_logprobs)",
    "no system": "takes no system message, so its text is put before the user's (--judge_no_system)",
    "no seed": "takes no seed (leave --judge_seed out)",
    "stream": "answers only as a stream (--judge_stream)",
}

_TOO_LONG = re.compile(
    r"context[ _](?:length|size|window|limit)|(?:maximum|max) (?:context|model) length|max_model_len|exceed_context|"
    r"too many (?:input )?tokens|(?:prompt|input|request|message)s?\b[^.]{0,40} (?:is|are) (?:too )?long|"
    r"too (?:long|large) for|maximum number of tokens|token count[^.]{0,40} exceeds|reduce the length|"
    r"(?:length|tokens|prompt|input)\b[^.]{0,40} exceeds?\b[^.]{0,40}(?:context|maximum|limit)|total tokens[^.]{0,20}>|"
    r"(?:inputs?|max_new_tokens)`? (?:tokens )?(?:must have less|\+ `max_new|must be <=)|request too large|"
    r"string_above_max_length|"
    r"max_(?:completion_)?tokens\W{0,3}[^.]{0,60}(?:too large|less than or equal|at most|at least 1, got -|exceeds)"
)
_REFUSED = re.compile(
    r"content[ _]filter|content[ _]policy|content management policy|responsibleai|moderation|flagged|prohibited_content|"
    r"blocked by|safety (?:filter|system|reasons|settings)"
)
_SPENT = re.compile(
    r"insufficient_quota|insufficient[ _]balance|insufficient[ _]credits?|billing_hard_limit|credit balance is too low"
)
_NO_SYSTEM = re.compile(
    r"\bsystem['\"`]? (?:role|message|prompt|instruction)s?\b|roles?\b[^.;]{0,40}['\"`]system['\"`]|roles? must|"
    r"only user\b[^.;]{0,30}\broles?|messages\[0\]|developer instruction"
)
_STREAM = re.compile(r"\bstream\w*\b[^.]{0,60}(?:must|only|required|true)|(?:must|only|requires?)\b[^.]{0,60}\bstream")
# Of a context of C tokens and a prompt of P, as far as the words give both.
_CONTEXT = re.compile(
    r"(?:(?:context|model) (?:length|size|window|limit)|n_ctx|must be <=|allowed|supports at most|less than or equal to)"
    r"[^0-9]{0,40}?(\d+)"
)
_SUM = re.compile(r"(\d+) \+ \d+ > (\d+)")  # Anthropic's: P + limit > C
_ALONE = re.compile(r"(?:prompt|input)\b[^.0-9]{0,40}(\d+)[^0-9]{0,60}(?:exceeds|longer than|>)[^0-9]{0,60}(\d+)")  # P and C
_PROMPT = re.compile(
    r"(\d+) (?:in the messages|input tokens|of text input|tokens from the input|`inputs` tokens)|"
    r"n_prompt_tokens\D{1,4}(\d+)|request \((\d+) tokens\)|input length[^:]*: (\d+)"
)


def complaint(text: str) -> str:
    """The words of an error body, `key: value` a line, without what it quotes of the request (`input`, …)."""

    def words(value: Any, key: str = "") -> list[str]:
        if isinstance(value, dict):
            return [word for name, inner in value.items() if name not in ECHOES for word in words(inner, str(name))]
        if isinstance(value, list):
            return [word for inner in value for word in words(inner, key)]
        return [f"{key}: {value}"]

    try:
        return valid("\n".join(words(json.loads(text))))
    except (ValueError, RecursionError):
        return text


def is_too_long(text: str) -> bool:
    """Whether the words say that prompt and reply together do not fit the model's context."""
    return _TOO_LONG.search(text.lower()) is not None


def is_refused(text: str) -> bool:
    """Whether the words are those of a content filter."""
    return _REFUSED.search(text.lower()) is not None


def is_spent(text: str) -> bool:
    """Whether the words say that the account's credit is used up: waiting does not help."""
    return _SPENT.search(text.lower()) is not None


def room(text: str, limit: int) -> int | None:
    """A smaller limit of the reply to try after `limit` did not fit; None where the prompt alone is too long.

    It is what the words say is left of the context, or half of `limit` where they do not say.
    """
    low = re.sub(r"\d{19,}", "", text.lower())  # no count of tokens
    contexts, prompts, whole = _CONTEXT.search(low), _PROMPT.search(low), _SUM.search(low)
    alone = _ALONE.search(low)
    if alone is not None and int(alone[1]) > int(alone[2]):
        return None
    if whole is not None:
        left = int(whole[2]) - int(whole[1])
    elif contexts is not None and prompts is not None:
        left = int(contexts[1]) - int(next(filter(None, prompts.groups())))
    elif contexts is not None and "max" in low and int(contexts[1]) < limit:
        left = int(contexts[1])  # a cap on the reply, whatever the prompt
    else:
        left = limit // 2
    left = min(left, limit - 1)
    return left if left >= min(LEAST_ROOM, limit) else None


def way_of(text: str, sent: Mapping[str, Any]) -> str | None:
    """The one of `WAYS` that a complaint about a request asks for; None where it names nothing that was sent."""
    low, param = text.lower(), _param(text)
    if "max_tokens" in sent and ("max_completion_tokens" in low or _unknown(low, param, "max_tokens")):
        return "max_completion_tokens"
    for field, way in (("logprobs", "no logprobs"), ("temperature", "no temperature"), ("seed", "no seed")):
        if field in sent and (field in param or re.search(rf"\b(?:top_)?{field}\b", low)):
            return way
    roles = [message["role"] for message in sent["messages"]]
    if "system" in roles and _NO_SYSTEM.search(low):
        return "no system"
    if "extra_body" not in sent and _STREAM.search(low):
        return "stream"
    return None


def _unknown(low: str, param: str, field: str) -> bool:
    """Whether the complaint is that the endpoint knows no such field."""
    return (field in param or field in low) and re.search(
        r"unsupported|unknown|not (?:supported|permitted|allowed)|extra", low
    ) is not None


def _param(text: str) -> str:
    """The field that an error body names apart from its message."""
    try:
        error = json.loads(text)["error"]
        return str(error["param"] or "").lower()
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def endpoint_words(text: str) -> str:
    """The message inside an error body: `error.message`, `message` or `detail`, else the start of the body."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return quoted(text)
    if isinstance(body, list) and len(body) == 1:  # Gemini's
        body = body[0]
    for name in ("error", "message", "detail"):
        if isinstance(body, dict) and body.get(name):
            body = body[name]
    return quoted(body if isinstance(body, str) else json.dumps(body))


def quoted(text: str) -> str:
    """An endpoint's words on one line, cut short."""
    words = " ".join(valid(text).split())
    return words if len(words) <= QUOTED else words[: QUOTED - 1] + "…"


def valid(text: str) -> str:
    """The text without what files cannot hold, cut to `LONGEST` characters: no verdict is as long."""
    return clean(text, LONGEST)


# Option -> what an endpoint does not take (a key of `WAYS`); its first complaint tells the same.
WAY_OPTIONS = {
    "judge_max_completion_tokens": "max_completion_tokens",
    "judge_no_system": "no system",
    "judge_stream": "stream",
}
