"""The command line's options of `isdaa evaluate --benchmark`, and the request that they make."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from isdaa.errors import UserError
from isdaa.evaluation.judge_options import add_judge_options, asking_of

if TYPE_CHECKING:
    from isdaa.evaluation.benchmark_request import BenchmarkRequest

# Options that mean something else, or nothing, for a benchmark, and what to say instead.
NOT_HERE = {
    "reference": "--baseline", "data": "--questions", "scorer": "--judge", "scores": "--judgments",
    "judge_template": "another --benchmark (hh, tldr)",
}  # fmt: skip


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
    what.add_argument("--gamed", metavar="FILE", help="alpaca_eval: the official df_gamed.csv (default: from the Hub)")
    what.add_argument("--difficulty", help=argparse.SUPPRESS)
    what.add_argument(
        "--missing", choices=("error", "skip", "loss"),
        help="questions that a file of answers or judgments lacks: an error (default), left out, or lost",
    )  # fmt: skip
    who = add_judge_options(parser, "judge of a benchmark, or of the samples of checkpoints")
    who.add_argument("--judge", metavar="NAME", help="of a benchmark, instead of a judge model: `gold` or a reward model's path")
    who.add_argument("--judge_no_logprobs", action="store_true", default=None, help="do not ask for log-probabilities")


OPTIONS = (
    "questions", "limit", "max_new_tokens", "chat_template", "answers", "judgments", "opponent", "baseline", "references",
    "gamed", "difficulty", "missing", "judge", "judge_no_logprobs",
)  # fmt: skip


def check_without_benchmark(arguments: argparse.Namespace) -> None:
    """Raises UserError where an option of benchmarks is given and no benchmark, or no model is."""
    strange = next((name for name in OPTIONS if getattr(arguments, name) is not None), None)
    if strange is not None:
        hint = "; a reward model is named with --scorer" if strange == "judge" else ""
        raise UserError(f"--{strange}: belongs to a benchmark; name one with --benchmark{hint}")
    if not arguments.model_path:
        raise UserError("the following arguments are required: --model_path; see `isdaa evaluate --help`")


def request_of(arguments: argparse.Namespace, overrides: dict[str, Any]) -> BenchmarkRequest:
    """The request of a parsed command line. overrides: `dtype`, `trust_remote_code` and dotted keys."""
    from isdaa.evaluation.benchmark_request import Sources, benchmark_request

    for name, instead in NOT_HERE.items():
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name}: has no effect with --benchmark; {instead} does what you may have meant")
    if arguments.difficulty is not None:
        raise UserError("--difficulty: is gone; --gamed FILE takes the official df_gamed.csv, which holds the difficulties, too")
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
        gamed=arguments.gamed,
        missing=arguments.missing,
    )
    return benchmark_request(
        arguments.benchmark,
        arguments.model_path or (),
        sources,
        judge=arguments.judge,
        asking=asking_of(arguments),
        max_new_tokens=arguments.max_new_tokens,
        chat_template=arguments.chat_template,
        output_dir=arguments.output,
        overrides=overrides,
    )
