"""The command line's options of a judge model, which a benchmark and the samples of checkpoints share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from isdaa.errors import UserError
from isdaa.evaluation.judges.wording import WAY_OPTIONS

if TYPE_CHECKING:
    from isdaa.evaluation.checkpoints.judged_samples import SampleJudge
    from isdaa.evaluation.judges.types import Asking

# Option -> field of `JudgeSettings`.
SETTINGS = {
    "judge_base_url": "base_url",
    "judge_max_tokens": "max_tokens",
    "judge_seed": "seed",
    "judge_concurrency": "concurrency",
    "judge_timeout": "timeout_s",
    "judge_retries": "retries",
    "max_requests": "max_requests",
    "judge_price_in": "price_in",
    "judge_price_out": "price_out",
    "judge_key_variable": "key_variable",
    "judge_api_version": "api_version",
}


def add_judge_options(parser: argparse.ArgumentParser, title: str, template: bool = True) -> Any:
    """Every option is None unless it is given; the defaults stand in `JudgeSettings`. Returns the group of options.

    template: with the one that says what a judge of samples is asked.
    """
    who = parser.add_argument_group(title)
    who.add_argument("--judge_model", type=str, metavar="NAME", help="judge model of any OpenAI-compatible endpoint")
    who.add_argument("--judge_base_url", metavar="URL", help="its address, up to /v1 (default: OPENAI_BASE_URL, else OpenAI)")
    if template:
        who.add_argument(
            "--judge_template", metavar="NAME",
            help="what it is asked of two samples: hh, tldr, or a file with {prompt}, {first} and {second} (default: hh)",
        )  # fmt: skip
    who.add_argument("--judge_temperature", metavar="VALUE", help="a number, or `none` to send none (default: the question's)")
    who.add_argument("--judge_max_tokens", type=int, metavar="N", help="of a reply (default: the question's)")
    who.add_argument("--judge_seed", type=int, metavar="N", help="sent with every request (default: none is)")
    who.add_argument("--judge_concurrency", type=int, metavar="N", help="requests in flight at once (default: 8)")
    who.add_argument("--judge_timeout", type=float, metavar="SECONDS", help="of a whole request (default: 120)")
    who.add_argument("--judge_retries", type=int, metavar="N", help="after a question's first try (default: 6)")
    who.add_argument("--max_requests", type=int, metavar="N", help="at most so many HTTP requests in this call")
    who.add_argument("--judge_price_in", type=float, metavar="PRICE", help="of a million tokens read")
    who.add_argument("--judge_price_out", type=float, metavar="PRICE", help="of a million tokens written")
    who.add_argument("--judge_max_completion_tokens", action="store_true", default=None, help="it knows the limit by this name")
    who.add_argument("--judge_no_system", action="store_true", default=None, help="it takes no system message")
    who.add_argument("--judge_stream", action="store_true", default=None, help="it answers in a stream alone")
    who.add_argument("--judge_api_version", metavar="DATE", help="api-version of a classic Azure endpoint")
    who.add_argument("--judge_key_variable", metavar="NAME", help="environment variable of the key (default: OPENAI_API_KEY)")
    return who


def sample_judge_of(arguments: argparse.Namespace) -> SampleJudge | None:
    """The judge of checkpoints' samples that a parsed command line names. Raises UserError."""
    asking = asking_of(arguments)
    if asking is None:
        if arguments.judge_template is not None:
            raise UserError("--judge_template is given, and no judge model; name it with --judge_model")
        return None
    from isdaa.evaluation.checkpoints.judged_samples import SampleJudge

    return SampleJudge(asking, arguments.judge_template or "hh")


def asking_of(arguments: argparse.Namespace) -> Asking | None:
    """The judge model, or None where none is named."""
    given = {field: value for name, field in SETTINGS.items() if (value := getattr(arguments, name)) is not None}
    ways = tuple(way for name, way in WAY_OPTIONS.items() if getattr(arguments, name))
    temperature, logprobs = arguments.judge_temperature, not getattr(arguments, "judge_no_logprobs", None)
    if arguments.judge_model is None:
        if given or ways or temperature is not None or not logprobs:
            raise UserError("options of a judge model are given, and no judge model; name it with --judge_model")
        return None
    from isdaa.evaluation.judges.types import LIMITS, Asking, JudgeSettings, check_limit, check_variable

    if not arguments.judge_model.strip():
        raise UserError("--judge_model is empty; name a model that the endpoint serves")
    if not arguments.judge_model.isprintable():
        raise UserError("--judge_model holds a character that no name has; name a model that the endpoint serves")
    if temperature is not None:
        given["temperature"] = _temperature(temperature)
    for option, field in (SETTINGS | {"judge_temperature": "temperature"}).items():
        if field in LIMITS:
            check_limit(field, given.get(field), f"--{option}")
    if "key_variable" in given:
        check_variable(given["key_variable"], "--judge_key_variable")
    if ("price_in" in given) != ("price_out" in given):
        raise UserError(
            "--judge_price_in and --judge_price_out: give both prices, of a million tokens read and of a million written, or "
            "neither"
        )
    settings = JudgeSettings(arguments.judge_model, ways=ways, **given)
    return Asking(settings, temperature is not None, "max_tokens" in given, logprobs)


def _temperature(text: str) -> float | None:
    if text.lower() in ("none", "null"):
        return None
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--judge_temperature is {text!r}; give a number from 0, or `none`") from None
