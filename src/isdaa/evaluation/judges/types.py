"""What is asked of a judge model and what it answers: plain frozen values, and the request body that a question becomes."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from isdaa.errors import UserError, nearest
from isdaa.evaluation.judges.wording import WAYS
from isdaa.files import digest

KEY_VARIABLE = "OPENAI_API_KEY"
# Why a question has no verdict. Those in MOMENTARY go away by asking again; `cut` by a higher limit.
Lack = Literal[
    "refused", "too long", "rate-limited", "no answer", "broken off", "cut", "thought only", "unreadable", "no text", "rejected"
]
MOMENTARY: tuple[Lack, ...] = ("rate-limited", "no answer", "broken off")
MOST_LOGPROBS = 20  # more alternatives than this no endpoint gives
# Field of `JudgeSettings` -> the least and the most that makes sense.
LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0, math.inf),
    "max_tokens": (1, math.inf),
    "logprobs": (1, MOST_LOGPROBS),
    "concurrency": (1, math.inf),
    "timeout_s": (0.001, math.inf),
    "retries": (0, math.inf),
    "max_requests": (0, math.inf),
    "price_in": (0, math.inf),
    "price_out": (0, math.inf),
}


@dataclass(frozen=True)
class JudgeSettings:
    """Which judge model, and how it is asked.

    Attributes:
        model: its name at the endpoint.
        base_url: the endpoint's address up to `/v1`; None: `OPENAI_BASE_URL`, else OpenAI's.
        temperature: of its replies; None is not sent (models that reason refuse any but their own).
        max_tokens: of a reply.
        logprobs: how many alternatives of the reply's first token are wanted; None: none.
        seed: None is not sent.
        concurrency: requests in flight at once.
        timeout_s: seconds that a whole request may take.
        retries: of a question, after its first try.
        max_requests: HTTP requests that one `Judge` may send, retries included; None: no limit.
        price_in: of a million tokens that are sent, in any currency; None: no cost is told.
        price_out: of a million tokens that come back.
        key_variable: the environment variable that holds the key; the key itself is in no setting.
        ways: what the endpoint does not take (names of `evaluation.judges.wording.WAYS`), where that is known.
        api_version: of a classic Azure endpoint.

    Raises:
        UserError: a value that makes no sense.
    """

    model: str
    base_url: str | None = None
    temperature: float | None = 0.0
    max_tokens: int = 512
    logprobs: int | None = None
    seed: int | None = None
    concurrency: int = 8
    timeout_s: float = 120.0
    retries: int = 6
    max_requests: int | None = None
    price_in: float | None = None
    price_out: float | None = None
    key_variable: str = KEY_VARIABLE
    ways: tuple[str, ...] = ()
    api_version: str | None = None

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise UserError("judge: the model's name is empty; give the name of a model that the endpoint serves")
        for field in LIMITS:
            check_limit(field, getattr(self, field), f"judge: {field}")
        check_variable(self.key_variable, "judge: key_variable")
        strange = next((way for way in self.ways if way not in WAYS), None)
        if strange is not None:
            raise UserError(f"judge: ways: {strange!r} is unknown{nearest(strange, WAYS)}; known are {', '.join(WAYS)}")
        if (self.price_in is None) != (self.price_out is None):
            raise UserError("judge: price_in and price_out: give both prices, per million tokens, or neither")


def check_limit(field: str, value: float | None, name: str) -> None:
    """Raises UserError where a setting of the judge is out of its limits; `name`: what the user calls it."""
    least, most = LIMITS[field]
    if value is not None and not (math.isfinite(value) and least <= value <= most):
        limit = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
        raise UserError(f"{name} must be {limit}, got {value}")


def check_variable(value: str, name: str) -> None:
    """Raises UserError where the name of the key's variable is none. It does not show it, for it may be the key itself."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        raise UserError(f"{name} must name the environment variable that holds the key (letters, digits, underscores)")


@dataclass(frozen=True)
class Question:
    """One conversation that the judge answers. Equal questions are asked once; for several replies give each its own seed.

    Attributes:
        messages: dictionaries with `role` and `content`.
        temperature: as in `JudgeSettings`, for this question; None: the judge's.
        max_tokens: as above.
        logprobs: as above.
        seed: as above.
        of: what it is about, where several questions are about the same (the two orders of a comparison).
    """

    messages: tuple[dict[str, str], ...]
    temperature: float | None = None
    max_tokens: int | None = None
    logprobs: int | None = None
    seed: int | None = None
    of: str = ""


@dataclass(frozen=True)
class Reply:
    """What the judge said. `text` is empty only where `thinking` is not, or where it was cut before its first word.

    text: as it came, thinking in it included (`replies.split` parts the two); thinking: what the endpoint gave apart.
    first_token_logprobs: natural logarithms by token, of the reply's first position; None where the endpoint gave
    none (or none were wanted). cached: this reply cost no request. finish_reason: `stop`, `length`, or None where the
    endpoint does not say. model: what the endpoint said it is. limit: tokens that it was given, where the judge's context
    had room for fewer than were wanted.
    """

    text: str
    first_token_logprobs: dict[str, float] | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached: bool = False
    finish_reason: str | None = None
    model: str | None = None
    thinking: str = ""
    limit: int | None = None


@dataclass(frozen=True)
class NoReply:
    """Why a question has no reply: every retry failed, the judge refused, or the budget of requests is used up.

    unasked: it was not sent, or not tried to the end, since the asking was stopped. kind: of the reason, for a count.
    Never cached: the next `ask` asks again.
    """

    reason: str
    unasked: bool = False
    kind: Lack = "no answer"


@dataclass(frozen=True)
class Usage:
    """What a judge has cost since it was made.

    requests: HTTP requests, retries included. cached: questions answered without one. failures: questions without a
    reply; unasked: questions that were not asked. Tokens are those of this process's requests; uncounted: requests
    answered without a count of tokens. cost: None without prices.
    """

    requests: int = 0
    cached: int = 0
    retries: int = 0
    failures: int = 0
    unasked: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    cost: float | None = None

    def __str__(self) -> str:
        words = [f"{self.requests:,} requests", f"{self.cached:,} answered from the cache", f"{self.retries:,} retries"]
        words += [f"{self.failures:,} questions without a reply"] if self.failures else []
        words += [f"{self.unasked:,} questions not asked"] if self.unasked else []
        words.append(f"{self.prompt_tokens:,} tokens read, {self.completion_tokens:,} written")
        words += [f"{self.uncounted:,} requests that the endpoint gave no count of"] if self.uncounted else []
        words += [f"cost {self.cost:.2f}"] if self.cost is not None else []
        return ", ".join(words)


def request_body(settings: JudgeSettings, question: Question) -> dict[str, Any]:
    """All that decides the reply, as the endpoint's JSON; `max_tokens` goes by its old name here."""
    temperature = question.temperature if question.temperature is not None else settings.temperature
    logprobs = question.logprobs if question.logprobs is not None else settings.logprobs
    seed = question.seed if question.seed is not None else settings.seed
    body: dict[str, Any] = {"model": settings.model, "messages": [dict(message) for message in question.messages]}
    body["max_tokens"] = question.max_tokens or settings.max_tokens
    if temperature is not None:
        body["temperature"] = float(temperature)
    if logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": logprobs}
    if seed is not None:
        body["seed"] = seed
    return body


def request_key(body: dict[str, Any]) -> str:
    """The cache key: a digest of judge model, messages (the template's words are in them) and settings.

    The endpoint's address is no part of it: the same model under another address or port is the same judge. Nor is
    `max_tokens`: a reply that ended by itself is the same under a higher limit.
    Raises UnicodeEncodeError where a message is no valid Unicode, which no endpoint can be sent.
    """
    told = {name: value for name, value in body.items() if name != "max_tokens"}
    json.dumps(told, ensure_ascii=False).encode()
    return digest(told)


@dataclass(frozen=True)
class Asking:
    """A judge model. own_temperature, own_max_tokens: whether the user chose them; else the benchmark's hold.

    logprobs: whether log-probabilities are asked for where a benchmark wants them.
    """

    settings: JudgeSettings
    own_temperature: bool = False
    own_max_tokens: bool = False
    logprobs: bool = True
