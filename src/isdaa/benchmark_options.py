"""The command line's options of `isdaa benchmark`, and the request that they make."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from isdaa.errors import UserError
from isdaa.evaluation.judge_options import add_judge_options, asking_of

if TYPE_CHECKING:
    from isdaa.evaluation.benchmarks.request import BenchmarkRequest

KEYS = (
    "evaluation.seed", "evaluation.bootstrap", "evaluation.confidence", "evaluation.batch_size", "evaluation.keep_thinking",
    "tokenization.max_prompt_length", "tokenization.chat_template_kwargs", "scorer.position", "scorer.label",
)  # fmt: skip
# Options that mean something else, or nothing, for a benchmark, and what to do instead.
INSTEAD = {
    "--reference": "--baseline names a model to compare with",
    "--data": "--questions does what you may have meant",
    "--scorer": "--judge does what you may have meant",
    "--scores": "--judgments does what you may have meant",
    "--judge_template": "a benchmark has its own question (try `isdaa benchmark hh` or `tldr`)",
    "--tokenizer": "each model has its own; copy it into the model's folder",
    "--difficulty": "--gamed FILE takes the official df_gamed.csv, which holds the difficulties, too",
    "--evaluation.prompts": "--limit says how many questions",
    "--evaluation.max_new_tokens": "--max_new_tokens does it",
}


def add_benchmark_options(parser: argparse.ArgumentParser) -> None:
    """Every option is None unless it is given; the defaults stand with the benchmarks and in `JudgeSettings`."""
    what = parser.add_argument_group("benchmark (see docs/benchmarks.md)")
    what.add_argument(
        "--questions", metavar="SOURCE",
        help="file, Hub name, or `project`: a small set that comes with isdaa (default: the benchmark's own, from the Hub)",
    )  # fmt: skip
    what.add_argument("--split", metavar="NAME", help="split of --questions")
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
    what.add_argument(
        "--missing", choices=("error", "skip", "loss"),
        help="questions that a file of answers or judgments lacks: an error (default), left out, or lost",
    )  # fmt: skip
    who = add_judge_options(parser, "judge (see docs/judging.md)", template=False)
    who.add_argument("--judge", metavar="NAME", help="instead of a judge model: `gold` or a reward model's path")
    who.add_argument("--judge_no_logprobs", action="store_true", default=None, help="do not ask for log-probabilities")


def request_of(arguments: argparse.Namespace, overrides: dict[str, Any]) -> BenchmarkRequest:
    """The request of a parsed command line. overrides: `dtype`, `trust_remote_code` and dotted keys."""
    from isdaa.evaluation.benchmarks.request import Sources, benchmark_request

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
        arguments.name,
        arguments.model_path or (),
        sources,
        judge=arguments.judge,
        asking=asking_of(arguments),
        max_new_tokens=arguments.max_new_tokens,
        chat_template=arguments.chat_template,
        output_dir=arguments.output,
        overrides=overrides,
    )
