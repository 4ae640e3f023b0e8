"""The command line's options of `isdaa evaluate --benchmark`, and the request that they make."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from isdaa.errors import UserError

if TYPE_CHECKING:
    from isdaa.evaluation.benchmark_request import BenchmarkRequest

# Options that mean something else, or nothing, for a benchmark, and what to say instead.
NOT_HERE = {"reference": "--baseline", "data": "--questions", "scorer": "--judge"}


def add_benchmark_options(parser: argparse.ArgumentParser) -> None:
    """Every option is None unless it is given; the defaults stand with the benchmarks and in `JudgeSettings`."""
    what = parser.add_argument_group("benchmark: instruction following, by a judge (see docs/benchmarks.md)")
    what.add_argument("--benchmark", metavar="NAME", help="alpaca_eval, mt_bench, arena_hard, hh or tldr")
    what.add_argument(
        "--questions", metavar="SOURCE",
        help="file, Hub name, or `project`: a small set that comes with isdaa (default: the benchmark's own, from the Hub)",
    )  # fmt: skip
    what.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    what.add_argument("--max_new_tokens", type=int, metavar="N", help="of an answer (default: the benchmark's)")
    what.add_argument("--chat_template", metavar="FILE", help="Jinja template instead of the tokenizers' own")
    what.add_argument("--answers", nargs="+", metavar="FILE", help="judge these answers, too, in the original tool's format")
    what.add_argument(
        "--judgments", nargs="+", metavar="FILE", help="score these judgments again; no model and no judge is asked"
    )
    what.add_argument(
        "--opponent", metavar="FILE", help="answers to compare with (default: the data's own, else the reference's)"
    )
    what.add_argument("--baseline", metavar="PATH", help="model whose answers are compared with, instead of a file")
    what.add_argument("--references", metavar="FILE", help="mt_bench: right answers to math, reasoning and coding")
    what.add_argument("--difficulty", metavar="FILE", help="alpaca_eval: difficulty of each instruction")
    who = parser.add_argument_group("judge of a benchmark")
    who.add_argument("--judge_model", type=str, metavar="NAME", help="judge model of any OpenAI-compatible endpoint")
    who.add_argument("--judge_base_url", metavar="URL", help="its address, up to /v1 (default: OPENAI_BASE_URL, else OpenAI)")
    who.add_argument("--judge", metavar="NAME", help="instead of a judge model: `gold` or a reward model's path")
    who.add_argument("--judge_temperature", metavar="VALUE", help="a number, or `none` to send none (default: the benchmark's)")
    who.add_argument("--judge_max_tokens", type=int, metavar="N", help="of a reply (default: the benchmark's)")
    who.add_argument("--judge_no_logprobs", action="store_true", default=None, help="do not ask for log-probabilities")
    who.add_argument("--judge_seed", type=int, metavar="N", help="sent with every request (default: none is)")
    who.add_argument("--judge_concurrency", type=int, metavar="N", help="requests in flight at once (default: 8)")
    who.add_argument("--judge_timeout", type=float, metavar="SECONDS", help="of a whole request (default: 120)")
    who.add_argument("--judge_retries", type=int, metavar="N", help="after a question's first try (default: 6)")
    who.add_argument("--max_requests", type=int, metavar="N", help="at most so many HTTP requests in this call")
    who.add_argument("--judge_price_in", type=float, metavar="PRICE", help="of a million tokens read")
    who.add_argument("--judge_price_out", type=float, metavar="PRICE", help="of a million tokens written")
    who.add_argument("--judge_key_variable", metavar="NAME", help="environment variable of the key (default: OPENAI_API_KEY)")


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
}
OPTIONS = (
    "questions", "limit", "max_new_tokens", "chat_template", "answers", "judgments", "opponent", "baseline", "references",
    "difficulty", "judge", "judge_model", "judge_temperature", "judge_no_logprobs", *SETTINGS,
)  # fmt: skip


def check_without_benchmark(arguments: argparse.Namespace) -> None:
    """Raises UserError where an option of benchmarks is given and no benchmark, or no model is."""
    strange = next((name for name in OPTIONS if getattr(arguments, name) is not None), None)
    if strange is not None:
        raise UserError(f"--{strange}: belongs to a benchmark; name one with --benchmark")
    if not arguments.model_path:
        raise UserError("the following arguments are required: --model_path; see `isdaa evaluate --help`")


def request_of(arguments: argparse.Namespace, overrides: dict[str, Any]) -> BenchmarkRequest:
    """The request of a parsed command line. overrides: `dtype`, `trust_remote_code` and dotted keys."""
    from isdaa.evaluation.benchmark_request import Sources, benchmark_request

    for name, instead in NOT_HERE.items():
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name}: has no effect with --benchmark; {instead} does what you may have meant")
    if arguments.tokenizer is not None:
        raise UserError(
            "--tokenizer: has no effect with --benchmark, where each model has its own; copy it into the model's folder"
        )
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens is {arguments.max_new_tokens}; it must be 1 or more")
    sources = Sources(
        questions=arguments.questions,
        split=arguments.split,
        limit=arguments.limit,
        answers=tuple(arguments.answers or ()),
        judgments=tuple(arguments.judgments or ()),
        opponent=arguments.opponent,
        baseline=arguments.baseline,
        references=arguments.references,
        difficulty=arguments.difficulty,
    )
    return benchmark_request(
        arguments.benchmark,
        arguments.model_path or (),
        sources,
        judge=arguments.judge,
        asking=_asking(arguments),
        max_new_tokens=arguments.max_new_tokens,
        chat_template=arguments.chat_template,
        output_dir=arguments.output,
        overrides=overrides,
    )


def _asking(arguments: argparse.Namespace) -> Any:
    """The judge model, or None where none is named."""
    given = {field: value for name, field in SETTINGS.items() if (value := getattr(arguments, name)) is not None}
    temperature, logprobs = arguments.judge_temperature, not arguments.judge_no_logprobs
    if arguments.judge_model is None:
        if given or temperature is not None or not logprobs:
            raise UserError("options of a judge model are given, and no judge model; name it with --judge-model")
        return None
    from isdaa.evaluation.benchmark_request import Asking
    from isdaa.evaluation.judge_types import LIMITS, JudgeSettings, check_limit, check_variable

    if not arguments.judge_model.strip():
        raise UserError("--judge-model is empty; name a model that the endpoint serves")
    if temperature is not None:
        given["temperature"] = _temperature(temperature)
    for option, field in (SETTINGS | {"judge_temperature": "temperature"}).items():
        if field in LIMITS:
            check_limit(field, given.get(field), "--" + option.replace("_", "-"))
    if "key_variable" in given:
        check_variable(given["key_variable"], "--judge-key-variable")
    if ("price_in" in given) != ("price_out" in given):
        raise UserError(
            "--judge-price-in and --judge-price-out: give both prices, of a million tokens read and of a million written, or "
            "neither"
        )
    settings = JudgeSettings(arguments.judge_model, **given)
    return Asking(settings, temperature is not None, "max_tokens" in given, logprobs)


def _temperature(text: str) -> float | None:
    if text.lower() in ("none", "null"):
        return None
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--judge_temperature is {text!r}; give a number from 0, or `none`") from None
