"""A judge model behind any OpenAI-compatible endpoint: many questions in, their replies out in the same order.

What was answered once is not asked again (`cache.py`), no more requests are in flight or sent than allowed, a request that
fails for a passing reason is tried again, and one that only the user can mend ends the call with one line.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from isdaa.errors import UserError
from isdaa.evaluation.judges.cache import ReplyCache
from isdaa.evaluation.judges.client import Endpoint, Failure, unknown_model
from isdaa.evaluation.judges.replies import split
from isdaa.evaluation.judges.types import (
    MOMENTARY,
    JudgeSettings,
    Lack,
    NoReply,
    Question,
    Reply,
    Usage,
    request_body,
    request_key,
)
from isdaa.evaluation.judges.wording import WAYS
from isdaa.terminal import Bar, say

__all__ = ["Judge", "JudgeSettings", "NoReply", "Question", "Reply", "Usage"]

FIRST_PAUSE = 1.0  # seconds after the first failure; twice as long after each further one
LONGEST_PAUSE = 60.0
PATIENCE = 3  # questions that fail before any went well, or for each of `concurrency` later, until the judge is given up
LONGEST_TOKEN = 12  # characters a token, of a long question, beyond which a judge can have read only a part of it
LONG_QUESTION = 2000  # characters
ODD = 3  # different questions that are complained of before any went well, or in a row for each of `concurrency` later


class Judge:
    """Asks one judge model. Making it sends nothing and needs neither key nor package: a cached run needs none.

    Args:
        settings: which judge, and how it is asked.
        cache: the JSONL file of its replies; None: in memory alone.
        sleep: for tests.

    Raises:
        UserError: settings or a cache file that cannot be used.
    """

    def __init__(
        self,
        settings: JudgeSettings,
        cache: str | Path | None = None,
        *,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self.settings = settings
        self.cache = ReplyCache(cache)
        self._endpoint = Endpoint(settings)
        known = WAYS.keys() & self.cache.learnt.get(self._endpoint.address, [])
        self._endpoint.ways |= known
        self._endpoint.known |= known
        self._sleep = sleep
        self._random = random.Random(settings.seed or 0)
        self._quiet_until = 0.0  # an endpoint's Retry-After holds for every request
        self._answered = False
        self._answered_once = False  # in an earlier call: what fails now is for the next one
        self._failed_in_a_row = self._wordless = 0
        self._odd: set[str] = set()  # questions that were complained of since the last reply
        self._worded = self._odd_told = False
        self._shortened = 0  # questions that the endpoint counted far fewer tokens of than they can have
        self.stopped = ""  # why the rest is left unasked, where something beside the budget ended the asking
        self._count = dict.fromkeys(
            ("requests", "cached", "retries", "failures", "unasked", "prompt_tokens", "completion_tokens", "uncounted"), 0
        )

    @property
    def name(self) -> str:
        """The judge model's name."""
        return self.settings.model

    @property
    def about(self) -> list[str]:
        """What the endpoint does not take, and whether it may have read only a part of some questions; a line each."""
        if not self._shortened:
            return self._endpoint.about
        questions = f"{self._shortened} question{'s' * (self._shortened > 1)}"
        short = (
            f"counted far fewer tokens of {questions} than they can have: it may have read only a part; give it a longer context"
        )
        return [*self._endpoint.about, short]

    @property
    def usage(self) -> Usage:
        """Requests, tokens and cost since this judge was made."""
        price_in, price_out, cost = self.settings.price_in, self.settings.price_out, None
        if price_in is not None and price_out is not None:
            cost = (self._count["prompt_tokens"] * price_in + self._count["completion_tokens"] * price_out) / 1e6
        return Usage(**self._count, cost=cost)

    def ready(self) -> None:
        """Check for package and key before long work whose result is to be judged.

        Raises:
            UserError: one of them is missing.
        """
        self._endpoint.ready()

    def ask(self, questions: Sequence[Question], progress: Bar | None = None) -> list[Reply | NoReply]:
        """Ask every question; equal questions are asked once.

        Args:
            questions: what to ask.
            progress: a bar that counts the replies.

        Returns:
            A `Reply` for each question, in their order. A question that has no reply after all retries has a `NoReply`; so
            have those that are left when the budget of requests is spent or the endpoint stops answering (one line says
            how many, and why).

        Raises:
            UserError: the endpoint refuses key, model, address or settings, or never answers; what was answered is in the
                cache.
        """
        results: dict[str, Reply | NoReply] = {}
        keys: list[str] = []
        waiting: dict[str, Question] = {}
        for number, question in enumerate(questions):
            body = request_body(self.settings, question)
            try:
                key = request_key(body)
            except UnicodeEncodeError:
                key = f"question {number}"
                results[key] = self._without("the question is no valid Unicode text", "unreadable")
            keys.append(key)
            if key in results or key in waiting:
                continue
            reply = self.cache.get(key, body["max_tokens"])
            if reply is not None:
                results[key] = self._roomy(reply)
                self._answered_once = True
            else:
                waiting[key] = question
        times = Counter(keys)
        if progress is not None and results:
            progress.update(sum(times[key] for key in results))
        if waiting:
            _run(self._ask_all(waiting, results, times, progress))
        self._tally(times, results)
        return [results[key] for key in keys]

    def _tally(self, times: Counter[str], results: dict[str, Reply | NoReply]) -> None:
        left = 0
        for key, result in results.items():
            if isinstance(result, Reply):
                self._count["cached"] += times[key] - (not result.cached)
            else:
                left += result.unasked
        self._count["unasked"] += left
        if left:
            say(f"{left} of {len(results)} questions to the judge were not asked: {self.why_left()}; the replies so far are kept")

    def why_left(self) -> str:
        """Why questions were left unasked, and what goes on with them."""
        budget = self.settings.max_requests
        if self.stopped:
            return f"{self.stopped}; the same command goes on with them"
        if not budget:
            return "--max_requests 0 allows no request; a higher number goes on with them"
        return f"the {budget} requests of --max_requests are used up; the same command goes on with them"

    async def _ask_all(
        self, waiting: dict[str, Question], results: dict[str, Reply | NoReply], times: Counter[str], bar: Bar | None
    ) -> None:
        """Fill `results`: one question at a time until the judge has answered one, then `concurrency` at once."""
        queue = deque(waiting.items())
        client = self._endpoint.client()

        async def work(until_answered: bool) -> None:
            while queue:
                key, question = queue.popleft()
                results[key] = await self._request(client, request_body(self.settings, question), question.of or key)
                if bar is not None:
                    bar.update(times[key], note=self._note())
                if until_answered and self._answered:
                    return

        tasks: list[asyncio.Task[None]] = []
        try:
            await work(until_answered=True)
            tasks += [asyncio.create_task(work(until_answered=False)) for _ in range(self.settings.concurrency)]
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await client.close()

    async def _request(self, client: Any, body: dict[str, Any], of: str) -> Reply | NoReply:
        attempt, limit, taught = 0, body["max_tokens"], set[str]()
        while True:
            if not self._spent():
                await self._pause(self._back_off(attempt) if attempt else 0)
                await self._pause(self._quiet_until - time.monotonic())
            if self._spent():
                return NoReply(self.why_left(), unasked=True)
            self._count["retries"] += attempt > 0
            self._count["requests"] += 1
            outcome = await self._endpoint.ask(client, {**body, "max_tokens": limit})
            if isinstance(outcome, Reply):
                self._bill((outcome.prompt_tokens, outcome.completion_tokens))
                reply = replace(outcome, limit=limit if limit < body["max_tokens"] else None)
                self._endpoint.helped(taught, good=True)
                self.cache.add(body, reply, self._endpoint.address, self._endpoint.known)
                self._answered, self._failed_in_a_row = True, 0
                self._odd.clear()
                self._check_words(reply, limit)
                self._check_length(body, reply)
                return self._roomy(reply)
            if outcome.tokens is not None:
                self._bill(outcome.tokens)
            if outcome.wait is not None:
                self._quiet_until = max(self._quiet_until, time.monotonic() + outcome.wait)
            if outcome.kind == "again":
                limit = outcome.limit or limit
                taught |= {outcome.way} if outcome.way is not None else set()
                continue
            if outcome.kind == "odd":
                self._endpoint.helped(taught, good=False)
                self._odd.add(of)
                if not self._odd_told:
                    self._odd_told = True
                    say(f"a question to the judge has no reply: {outcome.reason}")
            # Where others are answered it may yet be the questions' own fault.
            if outcome.kind == "fatal" or (len(self._odd) >= ODD and not self._answered and not self._answered_once):
                raise UserError(await self._explained(client, outcome))
            if len(self._odd) >= ODD * max(self.settings.concurrency, ODD):
                self._stop(f"the judge rejects one question after the other ({outcome.reason})")
            if outcome.kind == "pause":
                self._stop(outcome.reason)
            if outcome.kind != "retry" or attempt == self.settings.retries:
                return self._gave_up(outcome)
            attempt += 1

    def _gave_up(self, outcome: Failure) -> NoReply:
        """A question without a reply. After too many in a row the rest is not asked; UserError if none was ever answered."""
        if outcome.kind == "retry":
            self._failed_in_a_row += 1
            place = self._endpoint.address
            if not self._answered and (outcome.unreached or self._failed_in_a_row >= PATIENCE):
                told = f"no reply from the judge at {place}: {outcome.reason}; is {self.name} served there?"
                if not self._answered_once and (outcome.unreached or outcome.lack not in MOMENTARY):
                    raise UserError(told)
                self._stop(told)
            if self._failed_in_a_row >= PATIENCE * max(self.settings.concurrency, PATIENCE):
                self._stop(
                    f"the judge at {place} left {self._failed_in_a_row} questions in a row without a reply "
                    f"(the last reason: {outcome.reason})"
                )
        return self._without(outcome.reason, outcome.lack)

    def _stop(self, reason: str) -> None:
        """Ask nothing more in this call; what is left is for the next."""
        self.stopped = self.stopped or reason

    def _check_words(self, reply: Reply, limit: int) -> None:
        """Raises UserError where the first replies were all cut before a word of an answer, as further ones would be."""
        self._worded |= reply.finish_reason != "length" or bool(split(reply.text, reply.thinking).answer.strip())
        self._wordless += 1
        if not self._worded and self._wordless == PATIENCE:
            raise UserError(
                f"the first {PATIENCE} replies of {self.name} were cut at {limit} tokens, before a word of an answer; raise "
                "--judge_max_tokens: only these questions are asked again"
            )

    def _check_length(self, body: dict[str, Any], reply: Reply) -> None:
        """Says so where a server seems to have shortened a long prompt silently, as some do beyond their context."""
        characters = sum(len(message["content"]) for message in body["messages"])
        if reply.prompt_tokens and characters > max(LONG_QUESTION, LONGEST_TOKEN * reply.prompt_tokens):
            self._shortened += 1
            if self._shortened == 1:
                say(
                    f"the judge at {self._endpoint.address} counted {reply.prompt_tokens} tokens in a question of {characters:,} "
                    "characters: it may have read only a part of it; start it with a longer context (Ollama: num_ctx)"
                )

    @staticmethod
    def _roomy(reply: Reply) -> Reply | NoReply:
        """The reply; none where it was cut because the question left it too little of the judge's context."""
        if reply.limit is None or reply.finish_reason != "length":
            return reply
        return NoReply(f"too long for the judge: {reply.limit} tokens were left for its reply, which was cut", kind="too long")

    def _without(self, reason: str, lack: Lack) -> NoReply:
        self._count["failures"] += 1
        return NoReply(reason, kind=lack)

    async def _explained(self, client: Any, outcome: Failure) -> str:
        """The failure's reason; where the model's name may be wrong, with the names that the endpoint serves."""
        if outcome.complaint and not self._spent():
            self._count["requests"] += 1
            served = await self._endpoint.models(client)
            if served and self.name not in served:
                return f"{unknown_model(self._endpoint.address, self.name, served)} ({outcome.reason})"
            if not served or (outcome.complaint == 404 and not self._endpoint.address.endswith("/v1")):
                return f"{outcome.reason}; check the judge's address (it ends in /v1 for most servers), model and settings"
        return f"{outcome.reason}; check the judge's model and settings" if outcome.complaint else outcome.reason

    def _spent(self) -> bool:
        budget = self.settings.max_requests
        return bool(self.stopped) or (budget is not None and self._count["requests"] >= budget)

    def _bill(self, tokens: tuple[int | None, int | None]) -> None:
        self._count["prompt_tokens"] += tokens[0] or 0
        self._count["completion_tokens"] += tokens[1] or 0
        self._count["uncounted"] += None in tokens

    def _back_off(self, attempt: int) -> float:
        """Seconds before the attempt: doubled each time, less up to half at random, so that requests do not come at once."""
        return min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE) * (0.5 + 0.5 * self._random.random())

    async def _pause(self, seconds: float) -> None:
        if seconds > 0:
            await self._sleep(seconds)

    def _note(self) -> str:
        usage = self.usage
        words = [f"{usage.failures} without a reply"] if usage.failures else []
        words += [f"{usage.retries} retries"] if usage.retries else []
        words += [f"cost {usage.cost:.2f}"] if usage.cost is not None else []
        return ", ".join(words)


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end; in a thread of its own where a notebook's event loop is running already."""
    if not _in_event_loop():
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work).result()


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
