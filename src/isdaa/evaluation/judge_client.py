"""One request to an OpenAI-compatible endpoint, and what came of it: a reply, or a failure that says what to do next."""

from __future__ import annotations

import asyncio
import email.utils
import importlib.util
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal
from urllib.parse import urlsplit

from isdaa.errors import UserError, nearest
from isdaa.evaluation.judge_secret import LONG_FRAGMENT, guard_logs, key_from_environment
from isdaa.evaluation.judge_types import JudgeSettings, Reply

OPENAI = "https://api.openai.com/v1"
LONGEST_WAIT = 300.0  # seconds; an endpoint that asks for more is not waited for
QUOTED = 300  # characters of an endpoint's own words in an error
LISTED = 12  # models named in an error
NO_PROBABILITY = -9999.0  # what endpoints write for the logarithm of nothing
TRANSIENT = (408, 409, 425, 429)
# How endpoints word a 400 that is about one question and not about the settings.
TOO_LONG = ("context_length", "context length", "context size", "maximum context", "too many tokens", "prompt is too long")
REFUSED = ("content_filter", "content_policy", "content management policy")
SPENT = ("insufficient_quota", "insufficient balance", "billing_hard_limit")


@dataclass(frozen=True)
class Failure:
    """A request without a usable reply.

    kind: `retry`, may go better next time; `cut`, no retry helps this question and other questions may fare alike;
    `question`, only this question is affected; `fatal`, no question can be answered until the user mends something.
    wait: seconds that the endpoint asked to be left alone. unreached: nothing answered at all. complaint: the status that
    finds fault with the request. tokens: prompt and completion tokens that were billed nevertheless.
    """

    kind: Literal["retry", "cut", "question", "fatal"]
    reason: str
    wait: float | None = None
    unreached: bool = False
    complaint: int | None = None
    tokens: tuple[int | None, int | None] | None = None


class Endpoint:
    """Where the judge is, and the key it is asked with. Raises UserError for an address that cannot be used."""

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self.address = address(settings.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI)
        host = urlsplit(self.address).hostname or ""
        self.hosted = host == urlsplit(OPENAI).hostname
        self.here = host in ("localhost", "::1") or host.startswith("127.")
        self.secret = key_from_environment(settings.key_variable)

    def ready(self) -> None:
        """Raises UserError where the `openai` package or a key that OpenAI's own endpoint needs is missing."""
        if importlib.util.find_spec("openai") is None:
            raise UserError("a judge model needs the package `openai`; install it with: pip install 'isdaa[judge]'")
        if self.hosted and not self.secret:
            raise UserError(
                f"{self.address} needs a key: set the environment variable {self.settings.key_variable}, "
                "or name another endpoint with --judge-base-url"
            )

    def client(self) -> Any:
        """An `openai.AsyncOpenAI` that neither retries nor follows redirections by itself: every request is counted."""
        self.ready()
        import openai

        client = openai.AsyncOpenAI(
            api_key=self.secret.reveal() or "none",
            base_url=self.address,
            max_retries=0,
            timeout=self.settings.timeout_s,
            # A proxy named in the environment is for other machines than this one.
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False, trust_env=not self.here),
        )
        guard_logs(self.secret)
        return client

    async def ask(self, client: Any, body: Mapping[str, Any]) -> Reply | Failure:
        """Send one request. The key is in nothing that comes back; no exception of the client's leaves this function."""
        import openai

        sent = dict(body)
        if self.hosted:  # its newer models refuse the old name, local servers may not know the new one
            sent["max_completion_tokens"] = sent.pop("max_tokens")
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                answer = await client.chat.completions.with_raw_response.create(**sent)
            text = answer.http_response.text
        except (TimeoutError, openai.APITimeoutError):
            return Failure("retry", f"no answer within {self.settings.timeout_s:g} s")
        except openai.APIStatusError as error:
            return self._status(error.status_code, error.response.headers, _body_text(error.response))
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            words = self.secret.scrub(f"{type(cause).__name__}: {cause}".rstrip(": "))
            return Failure("retry", f"the connection failed ({words})", unreached=True)
        except Exception as error:  # whatever it is, its traceback could show the request's headers
            return Failure("fatal", self.secret.scrub(f"{type(error).__name__}: {error}"))
        return self._clean(read_answer(text))

    def _clean(self, outcome: Reply | Failure) -> Reply | Failure:
        """Without the key, should the endpoint have sent it back."""
        if isinstance(outcome, Failure):
            return replace(outcome, reason=self.secret.scrub(outcome.reason))
        scrub = partial(self.secret.scrub, fragment=LONG_FRAGMENT)
        tokens = outcome.first_token_logprobs
        return replace(
            outcome,
            text=scrub(outcome.text),
            first_token_logprobs={scrub(token): value for token, value in tokens.items()} if tokens is not None else None,
            finish_reason=scrub(outcome.finish_reason) if outcome.finish_reason is not None else None,
            model=scrub(outcome.model) if outcome.model is not None else None,
        )

    async def models(self, client: Any) -> list[str]:
        """Names of the models that the endpoint says it serves; empty where it does not say."""
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                answer = await client.models.with_raw_response.list()
            listed = json.loads(self.secret.scrub(answer.http_response.text))["data"]
            return [str(model["id"]) for model in listed]
        except Exception:  # a help in another error: without the names that one is said alone
            return []

    def _status(self, status: int, headers: Mapping[str, str], text: str) -> Failure:
        words = self.secret.scrub(endpoint_words(text))
        said = f"{self.address} answered {status}" + (f": {words}" if words else "")
        low = text.lower()
        if status in (401, 403):  # its words may quote the key in any disguise: they are not shown
            variable = self.settings.key_variable
            does = "does not accept the key in" if self.secret else "asks for a key, and there is none in"
            return Failure("fatal", f"{self.address} answered {status}: it {does} the environment variable {variable}; set it")
        if status == 402 or (status == 429 and any(mark in low for mark in SPENT)):
            return Failure("fatal", f"{said}; the account's credit is spent: add to it and run the same command again")
        if status in TRANSIENT or status >= 500:
            wait = retry_after(headers)
            if wait is not None and wait > LONGEST_WAIT:
                return Failure("fatal", f"{said}; it asks to be left alone for {wait:.0f} s: run the same command again then")
            return Failure("retry", said, wait=wait)
        if status < 400:
            target = urlsplit(headers.get("location", ""))
            host, path = target.netloc.rpartition("@")[2], target.path.removesuffix("/chat/completions")
            place = self.secret.scrub(f"{target.scheme}://{host}{path}") if host else "elsewhere"
            return Failure("fatal", f"{self.address} sends on to {place}; give the judge's own address with --judge-base-url")
        if status == 413 or (status in (400, 422) and any(mark in low for mark in TOO_LONG)):
            return Failure("question", f"too long for the judge ({said})")
        if status == 400 and any(mark in low for mark in REFUSED):
            return Failure("question", f"refused by the endpoint's content filter ({said})")
        return Failure("fatal", said, complaint=status)


def address(base_url: str) -> str:
    """The endpoint's address as it is used and shown. Raises UserError where it is none, or carries a secret."""
    try:
        parts = urlsplit(base_url.strip())
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        raise UserError("the judge's base URL cannot be read; write it like http://localhost:8000/v1") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment or "@" in parts.netloc:
        raise UserError(
            f"the judge's base URL carries a user, password or query beside the address of {parts.hostname}; "
            "a key comes from the environment alone: write the address like http://localhost:8000/v1"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"the judge's base URL {base_url!r} is no http(s) address; write it like http://localhost:8000/v1")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"


def read_answer(text: str) -> Reply | Failure:
    """A reply from the body of a chat completion; a body that is none is worth another try."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return Failure("retry", f"the answer is not JSON: {_quoted(text)!r}")
    if isinstance(body, dict) and not body.get("choices") and body.get("error"):
        return Failure("retry", f"the answer is an error: {_quoted(endpoint_words(text))}")  # some proxies say 200
    try:
        choice = body["choices"][0]
        message = choice["message"]
        content = _text(message.get("content"))
        refusal, reason = message.get("refusal"), choice.get("finish_reason")
        usage = body.get("usage") or {}
        tokens = (_count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))
        model = body.get("model")
    except (KeyError, IndexError, TypeError, AttributeError):
        return Failure("retry", f"the answer is no chat completion: {_quoted(text)!r}")
    if reason == "content_filter" or (refusal and not content.strip()):
        return Failure("question", f"the judge refused: {_quoted(str(refusal or reason))}", tokens=tokens)
    if not content.strip() and reason == "length":
        way = "raise the judge's max_tokens (--judge-max-tokens)"
        return Failure("cut", f"the reply was cut before its first word; {way}", tokens=tokens)
    if not content.strip():
        return Failure("retry", "the reply is empty", tokens=tokens)
    return Reply(
        text=_valid(content),
        first_token_logprobs=_first_token(choice.get("logprobs")),
        prompt_tokens=tokens[0],
        completion_tokens=tokens[1],
        finish_reason=_valid(str(reason)) if reason is not None else None,
        model=_valid(str(model)) if model is not None else None,
    )


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds that `Retry-After` (a number or a date) or `retry-after-ms` asks for; None without either."""
    try:
        milliseconds = float(headers["retry-after-ms"]) / 1000
        if math.isfinite(milliseconds):
            return max(milliseconds, 0.0)
    except (KeyError, ValueError):
        pass
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - (time.time() if now is None else now)
        except ValueError:
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def endpoint_words(text: str) -> str:
    """The message inside an error body: `error.message`, `message` or `detail`, else the start of the body."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return _quoted(text)
    for name in ("error", "message", "detail"):
        if isinstance(body, dict) and body.get(name):
            body = body[name]
    return _quoted(body if isinstance(body, str) else json.dumps(body))


def unknown_model(endpoint: str, model: str, served: list[str]) -> str:
    """What to say where `model` is not among those served."""
    names = ", ".join(served[:LISTED]) + (f" and {len(served) - LISTED} more" if len(served) > LISTED else "")
    return f"{endpoint} serves no model {model!r}{nearest(model, served)}; it serves {names}"


def _body_text(response: Any) -> str:
    try:
        return str(response.text)
    except Exception:  # the body was never read, or is in no known encoding
        return ""


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    if not isinstance(content, str):
        raise TypeError
    return content


def _first_token(logprobs: Any) -> dict[str, float] | None:
    """Natural log-probabilities of the first position; two tokens that read the same count together."""
    try:
        first = logprobs["content"][0]
        found: dict[str, float] = {}
        for entry in first["top_logprobs"] or [first]:
            token, value = _valid(entry["token"]), max(float(entry["logprob"]), NO_PROBABILITY)
            if math.isnan(value):
                return None
            older = found.get(token)
            found[token] = value if older is None else max(older, value) + math.log1p(math.exp(-abs(older - value)))
        return found
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _valid(text: str) -> str:
    """Half a surrogate pair, which JSON can carry, can be written to no file."""
    return text.encode("utf-8", "replace").decode()


def _quoted(text: str) -> str:
    words = " ".join(_valid(text).split())
    return words if len(words) <= QUOTED else words[: QUOTED - 1] + "…"
