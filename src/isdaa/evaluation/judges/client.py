"""One request to an OpenAI-compatible endpoint, and what came of it: a reply, or a failure that says what to do next."""

from __future__ import annotations

import asyncio
import email.utils
import importlib.util
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from isdaa.errors import UserError, nearest
from isdaa.evaluation.judges.secret import LONG_FRAGMENT, guard_logs, key_from_environment
from isdaa.evaluation.judges.types import JudgeSettings, Lack, Reply
from isdaa.evaluation.judges.wording import (
    WAYS,
    complaint,
    endpoint_words,
    is_refused,
    is_spent,
    is_too_long,
    quoted,
    room,
    valid,
    way_of,
)
from isdaa.terminal import say

OPENAI = "https://api.openai.com/v1"
LONGEST_WAIT = 300.0  # seconds; an endpoint that asks for more is not waited for
LARGEST = 1 << 24  # characters of an answer; one with more is no reply to a question
LISTED = 12  # models named in an error
NO_PROBABILITY = -9999.0  # what endpoints write for the logarithm of nothing
TRANSIENT = (408, 409, 425, 429)
# How endpoints say that the model ended its reply, that the limit did, and that a filter did.
STOPPED = ("stop", "eos", "eos_token", "end_turn", "stop_sequence", "end", "complete", "completed", "finished")
CUT = ("length", "max_tokens", "max_output_tokens", "model_length")
FILTERED = ("content_filter", "safety", "refusal", "recitation", "blocklist", "prohibited_content", "spii", "sensitive")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of a message beside its content
MOST_TOKENS = 10**12  # a count with more is none
LOGPROBS = ["logprobs", "top_logprobs"]
VERSION = "api-version"
CALLED = ("tool_calls", "function_call", "tool_use")


@dataclass(frozen=True)
class Failure:
    """A request without a usable reply.

    kind: `retry`, another try may succeed; `again`, to be sent again at once, in another way or with a smaller `limit`;
    `question`, this question alone has no reply; `odd`, the endpoint rejects this question, perhaps all; `pause`, it asks
    for a longer pause than is waited for; `fatal`, it answers no question until the user mends something. lack: why the
    question has no reply. way: what the endpoint may not take. wait: seconds that it asked to wait. unreached: nothing
    answered at all. complaint: the status that finds fault with the request. tokens: prompt and completion tokens that
    were billed nevertheless.
    """

    kind: Literal["retry", "again", "question", "odd", "pause", "fatal"]
    reason: str
    lack: Lack = "no answer"
    wait: float | None = None
    limit: int | None = None
    way: str | None = None
    unreached: bool = False
    complaint: int | None = None
    tokens: tuple[int | None, int | None] | None = None


class Endpoint:
    """Where the judge is, and the key it is asked with. Raises UserError for an address that cannot be used."""

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self.address, version = address(settings.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI)
        self.api_version = settings.api_version or version
        host = urlsplit(self.address).hostname or ""
        self.azure = host.endswith(".azure.com")
        if self.api_version and self.azure and not urlsplit(self.address).path:
            self.address += "/openai"
        self.hosted = host == urlsplit(OPENAI).hostname
        # What it does not take: OpenAI's newer models refuse the limit's old name, local servers may not know the new one.
        self.ways: set[str] = {*settings.ways, *(["max_completion_tokens"] if self.hosted else [])}
        self.known = set(self.ways)  # those that are sure
        self.here = host in ("localhost", "::1") or host.startswith("127.")
        self.secret = key_from_environment(settings.key_variable)

    def ready(self) -> None:
        """Raises UserError where the `openai` package or a key that OpenAI's own endpoint needs is missing."""
        if importlib.util.find_spec("openai") is None:
            raise UserError("a judge model needs the package `openai`; install it with: pip install 'isdaa[judge]'")
        if self.hosted and not self.secret:
            raise UserError(
                f"{self.address} needs a key: set the environment variable {self.settings.key_variable}, "
                "or name another endpoint with --judge_base_url"
            )

    @property
    def about(self) -> list[str]:
        """What the endpoint does not take, each a line; not what the user said from the start."""
        known = set(self.settings.ways) | {"max_completion_tokens"}
        return [words for way, words in WAYS.items() if way in self.known - known]

    def client(self) -> Any:
        """An `openai.AsyncOpenAI` that neither retries nor follows redirections by itself: every request is counted.

        With an api-version it is the one for Azure.
        """
        self.ready()
        import openai

        kind: Any = openai.AsyncOpenAI
        if self.api_version:
            kind = partial(openai.AsyncAzureOpenAI, api_version=self.api_version)
        client = kind(
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

        sent = self._as_it_takes(body)
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                answer = await client.chat.completions.with_raw_response.create(**sent)
            text, headers = answer.http_response.text, answer.http_response.headers
        except (TimeoutError, openai.APITimeoutError):
            return Failure("retry", f"no answer within {self.settings.timeout_s:g} s")
        except openai.APIStatusError as error:
            return self._status(error.status_code, error.response.headers, _body_text(error.response), sent, body)
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            words = self.secret.scrub(f"{type(cause).__name__}: {cause}".rstrip(": "))
            return Failure("retry", f"the connection failed ({words})", unreached=True)
        except Exception as error:  # whatever it is, its traceback could show the request's headers
            return Failure("fatal", self.secret.scrub(f"{type(error).__name__}: {error}"))
        if len(text) > LARGEST:
            return Failure("question", f"the answer has {len(text):,} characters: too many to read", "unreadable")
        inside = _error_inside(text)
        if inside is not None:  # some servers and proxies say 200, and the status inside
            return self._status(inside, headers, text, sent, body)
        return self._clean(read_answer(text))

    def _as_it_takes(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The request as this endpoint takes it, as far as that is known."""
        sent = dict(body)
        for way, fields in {"no temperature": ["temperature"], "no seed": ["seed"], "no logprobs": LOGPROBS}.items():
            if way in self.ways:
                sent = {name: value for name, value in sent.items() if name not in fields}
        if "max_completion_tokens" in self.ways:
            sent["max_completion_tokens"] = sent.pop("max_tokens")
        if "no system" in self.ways:
            sent["messages"] = without_system(sent["messages"])
        if "stream" in self.ways:
            sent["extra_body"] = {"stream": True, "stream_options": {"include_usage": True}}
        return sent

    def _clean(self, outcome: Reply | Failure) -> Reply | Failure:
        """Without the key, should the endpoint have sent it back."""
        if isinstance(outcome, Failure):
            return replace(outcome, reason=self.secret.scrub(outcome.reason))

        def clean(value: Any) -> Any:
            if isinstance(value, dict):
                return {clean(token): logprob for token, logprob in value.items()}
            return self.secret.scrub(value, LONG_FRAGMENT) if isinstance(value, str) else value

        return replace(outcome, **{name: clean(value) for name, value in vars(outcome).items()})

    def helped(self, ways: Iterable[str], good: bool) -> None:
        """Keep (and say) what a complaint taught, where the request was answered without it; else forget it. good: it was."""
        for way in set(ways) - self.known:
            if good:
                self.known.add(way)
                say(f"the judge at {self.address} {WAYS[way]}")
            else:
                self.ways.discard(way)

    async def models(self, client: Any) -> list[str]:
        """Names of the models that the endpoint says it serves; empty where it does not say."""
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                return [self.secret.scrub(str(model.id)) async for model in client.models.list()]
        except Exception:  # the names only help in another error, which is said without them
            return []

    def _status(
        self, status: int, headers: Mapping[str, str], text: str, sent: Mapping[str, Any], body: Mapping[str, Any]
    ) -> Failure:
        """What to do after an answer with this status. sent: the request as it was sent; body: as it was meant."""
        said, whole, text = f"{self.address} answered {status}", text, complaint(text)
        if status in (401, 403) and not (status == 403 and (is_refused(text) or "logprobs" in text)):
            # Its words may quote the key in any disguise: they are not shown.
            variable = self.settings.key_variable
            does = "does not accept the key in" if self.secret else "asks for a key, and there is none in"
            return Failure("fatal", f"{said}: it {does} the environment variable {variable}; set it")
        words = self.secret.scrub(endpoint_words(whole)) if status != 403 else ""
        said += f": {words}" if words else ""
        if status == 402 or (status in (400, 429) and is_spent(text)):
            return Failure("fatal", f"{said}; the account's credit is spent: add to it and run the same command again")
        if is_too_long(text) and (status in (400, 413, 422) or status >= 500 or "request too large" in text.lower()):
            limit = room(text, body["max_tokens"])
            kind: Literal["again", "question"] = "question" if limit is None else "again"
            return Failure(kind, f"too long for the judge ({said})", "too long", limit=limit)
        if status in TRANSIENT or status >= 500:
            wait = retry_after(headers)
            lack: Lack = "rate-limited" if status == 429 else "no answer"
            if wait is not None and wait > LONGEST_WAIT:
                return Failure("pause", f"{said}; it asks for a pause of {wait:.0f} s", lack)
            return Failure("retry", said, lack, wait=wait)
        if status < 400:
            try:
                target = urlsplit(headers.get("location", ""))
            except ValueError:  # no address at all
                target = urlsplit("")
            host, path = target.netloc.rpartition("@")[2], target.path.removesuffix("/chat/completions")
            place = self.secret.scrub(f"{target.scheme}://{host}{path}") if host else "elsewhere"
            return Failure("fatal", f"{self.address} redirects to {place}; give the judge's own address with --judge_base_url")
        if status == 413:
            return Failure("question", f"too long for the judge ({said})", "too long")
        if status in (400, 403) and is_refused(text):
            return Failure("question", f"refused by the endpoint's content filter ({said})", "refused")
        if status in (400, 403, 422):
            way = way_of(text, sent)
            if way is not None:
                self.ways.add(way)  # to be tried: `helped` says whether it is true
                # A request that was on its way when another one learnt it is sent again, too.
                if self._as_it_takes(body) != sent:
                    return Failure("again", said, way=way)
            return Failure("odd", said, "rejected", complaint=status)
        if self.azure and not self.api_version:
            said += "; Azure's older endpoints need --judge_api_version, such as 2024-10-21"
        return Failure("fatal", said, complaint=status)


def address(base_url: str) -> tuple[str, str | None]:
    """(the endpoint's address as it is used and shown, the api-version in it, which Azure's have).

    Raises UserError for what is no address, and for one that holds a secret.
    """
    try:
        parts = urlsplit(base_url.strip())
        port = f":{parts.port}" if parts.port else ""
        query = parse_qs(parts.query, strict_parsing=True) if parts.query else {}
    except ValueError:
        raise UserError("the judge's base URL cannot be read; write it like http://localhost:8000/v1") from None
    if (
        parts.username is not None
        or parts.password is not None
        or query.keys() - {VERSION}
        or parts.fragment
        or "@" in parts.netloc
    ):
        raise UserError(
            f"the judge's base URL for {parts.hostname} holds a user, password or query; a key is read from the environment "
            "alone: write the address like http://localhost:8000/v1"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"the judge's base URL {base_url!r} is no http(s) address; write it like http://localhost:8000/v1")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return f"{parts.scheme}://{host}{port}{path}", query.get(VERSION, [None])[0]


def without_system(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The conversation, each system message put before the user's next one, for templates without a system role."""
    result: list[dict[str, str]] = []
    held: list[str] = []
    for message in messages:
        if message["role"] == "system":
            held.append(message["content"])
        elif held and message["role"] == "user":
            result.append({**message, "content": "\n\n".join([*held, message["content"]])})
            held = []
        else:
            result.append(dict(message))
    return result + [{"role": "user", "content": text} for text in held]


def read_answer(text: str) -> Reply | Failure:
    """A reply from the body of a chat completion, whole or streamed; any other body is a failure of the kind `retry`."""
    try:
        body = _streamed(text) if _is_stream(text) else json.loads(text.lstrip("\ufeff"))
    except (ValueError, RecursionError):
        return Failure("retry", f"the answer is not JSON: {quoted(text)!r}")
    try:
        choice = body["choices"][0]
        message = choice["message"]
        (content, aside), refusal = _text(message.get("content")), message.get("refusal")
        thinking = aside or next((_text(message[name])[0] for name in THOUGHTS if message.get(name)), "")
        reason = str(choice.get("finish_reason") or "stop").rpartition(".")[2].lower()
        usage = body.get("usage") or {}
        tokens = (_count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))
        model = body.get("model")
    except (KeyError, IndexError, TypeError, AttributeError):
        return Failure("retry", f"the answer is no chat completion: {quoted(text)!r}", "no text")
    if reason in FILTERED or (refusal and not content.strip()):
        return Failure("question", f"the judge refused: {quoted(str(refusal or reason))}", "refused", tokens=tokens)
    if reason in CALLED:
        return Failure("question", "the judge called a tool instead of replying", "no text", tokens=tokens)
    if reason not in STOPPED + CUT:
        return Failure("retry", f"the reply broke off: {quoted(reason)}", "broken off", tokens=tokens)
    if not content.strip() and not thinking.strip() and reason not in CUT:
        return Failure("retry", "the reply is empty", "no text", tokens=tokens)
    return Reply(
        text=valid(content),
        first_token_logprobs=_first_token(choice.get("logprobs")),
        prompt_tokens=tokens[0],
        completion_tokens=tokens[1],
        finish_reason="length" if reason in CUT else "stop",
        model=valid(str(model)) if model is not None else None,
        thinking=valid(thinking),
    )


def _is_stream(text: str) -> bool:
    return text.lstrip().startswith(("data:", "event:", ":"))


def _events(text: str) -> list[str]:
    """The data of a stream's events."""
    data = (line.removeprefix("data:").strip() for line in text.splitlines() if line.startswith("data:"))
    return [one for one in data if one]


def _streamed(text: str) -> dict[str, Any]:
    """The completion that a stream's events add up to; one that stops before its end gets the reason `the stream has no end`."""
    message: dict[str, str] = {"content": ""}
    choice: dict[str, Any] = {"message": message, "finish_reason": None, "logprobs": None}
    body: dict[str, Any] = {"choices": [choice], "usage": None, "model": None}
    done = False
    for data in _events(text):
        if data == "[DONE]":
            done = True
            break
        part = json.loads(data)
        if not isinstance(part, dict) or part.get("error"):
            raise ValueError
        body["usage"], body["model"] = part.get("usage") or body["usage"], part.get("model") or body["model"]
        for found in (part.get("choices") or [])[:1]:
            delta = found.get("delta") or found.get("message") or {}
            for name in ("content", *THOUGHTS, "refusal"):
                if isinstance(delta.get(name), str):
                    message[name] = message.get(name, "") + delta[name]
            choice["finish_reason"] = found.get("finish_reason") or choice["finish_reason"]
            choice["logprobs"] = choice["logprobs"] or found.get("logprobs")
    if choice["finish_reason"] is None and not done:
        choice["finish_reason"] = "the stream has no end"
    return body


def _error_inside(text: str) -> int | None:
    """The status that the body of a 200 names, where it is an error and no completion."""
    if '"error"' not in text:
        return None
    for part in _events(text) if _is_stream(text) else [text]:
        try:
            body = json.loads(part.lstrip("\ufeff"))
        except (ValueError, RecursionError):
            continue
        error = body.get("error") if isinstance(body, dict) and not body.get("choices") else None
        if error:
            code = error.get("code", error.get("status")) if isinstance(error, dict) else None
            return code if isinstance(code, int) and 400 <= code < 600 else 500
    return None


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds that `Retry-After` (a number or a date) or `retry-after-ms` asks for; None without either."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers[name]) / unit
        except (KeyError, ValueError):
            continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    try:
        moment = email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp()
    except (ValueError, OverflowError):
        return None
    return max(moment - (time.time() if now is None else now), 0.0)


def unknown_model(endpoint: str, model: str, served: list[str]) -> str:
    """What to say where `model` is not among those served."""
    names = ", ".join(served[:LISTED]) + (f" and {len(served) - LISTED} more" if len(served) > LISTED else "")
    return f"{endpoint} serves no model {model!r}{nearest(model, served)}; it serves {names}"


def _body_text(response: Any) -> str:
    try:
        return str(response.text)
    except Exception:  # the body was never read, or is in no known encoding
        return ""


def _text(content: Any) -> tuple[str, str]:
    """(answer, thinking) of a message's content: a text, or a list of parts."""
    if content is None:
        return "", ""
    if isinstance(content, list):
        said: list[str] = []
        thought: list[str] = []
        for part in content:
            apart = next((part[name] for name in ("thinking", "reasoning") if part.get(name)), None)
            (said if apart is None else thought).append(part.get("text") or "" if apart is None else "".join(_text(apart)))
        return "".join(said), "".join(thought)
    if not isinstance(content, str):
        raise TypeError
    return content, ""


def _first_token(logprobs: Any) -> dict[str, float] | None:
    """Natural log-probabilities of the first position; two tokens that read the same count together."""
    try:
        first = logprobs["content"][0]
        found: dict[str, float] = {}
        for entry in first["top_logprobs"] or [first]:
            token, value = valid(entry["token"]), max(float(entry["logprob"]), NO_PROBABILITY)
            if not value < math.inf:
                return None
            older = found.get(token)
            found[token] = value if older is None else max(older, value) + math.log1p(math.exp(-abs(older - value)))
        return found
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST_TOKENS else None
