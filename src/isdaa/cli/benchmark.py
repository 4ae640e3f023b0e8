"""`isdaa benchmark`."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

from isdaa.cli.options import add_judge, add_keys, add_shared, add_trust, adopted, asking_of, given_of
from isdaa.cli.parser import whole
from isdaa.distributed import once
from isdaa.errors import DoneInPart, shown

if TYPE_CHECKING:
    from isdaa.evaluation.benchmarks.request import BenchmarkRequest

KEYS = (
    "evaluation.seed", "evaluation.bootstrap", "evaluation.confidence", "evaluation.batch_size", "evaluation.keep_thinking",
    "tokenization.max_prompt_length", "tokenization.chat_template_kwargs", "scorer.position", "scorer.label",
)  # fmt: skip
SOURCES = ("questions", "split", "limit", "opponent", "baseline", "references", "gamed", "missing")
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


COMMON = """
    model_path output dtype questions split limit max_new_tokens chat_template answers judgments opponent baseline
    references gamed missing judge_model judge_base_url judge_temperature judge_concurrency max_requests judge
    evaluation.batch_size keep_thinking"""


def add(parser: argparse.ArgumentParser) -> None:
    """The options. Each is None unless it is given; the defaults stand with the benchmarks and in `JudgeSettings`."""
    parser.usage = "isdaa benchmark NAME --model_path PATH [PATH ...] [--judge_model NAME] [options]"
    parser.add_argument("name", metavar="NAME", help="alpaca_eval, mt_bench, arena_hard, hh or tldr")
    add_shared(parser, "model_path", "output", "keep_thinking", "dtype", "adopt")
    add_trust(parser)
    what = parser.add_argument_group("benchmark (docs/benchmarks.md)")
    what.add_argument(
        "--questions", metavar="SOURCE",
        help="file, Hub name, or `project`: a small set that comes with isdaa (default: the benchmark's own, from the Hub)",
    )  # fmt: skip
    what.add_argument("--split", metavar="NAME", help="split of --questions")
    what.add_argument("--limit", type=whole(), metavar="N", help="only the first N questions (≥ 1; default: all)")
    what.add_argument("--max_new_tokens", type=whole(), metavar="N", help="of an answer (≥ 1; default: the benchmark's)")
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
    who = add_judge(parser, "judge (docs/judging.md)")
    who.add_argument("--judge", metavar="NAME", help="instead of a judge model: `gold` or a reward model's path")
    who.add_argument("--judge_no_logprobs", action="store_true", default=None, help="do not ask for log-probabilities")
    add_keys(parser, only=KEYS)


def run(arguments: argparse.Namespace) -> None:
    """Answer, judge, print, and write the report.

    Raises DoneInPart where a budget ended the judging early, or no reply could be read: what is there is printed first.
    """
    if arguments.adopt:
        adopted(arguments.model_path or [])
    request = once(partial(_request_of, arguments))
    from isdaa.evaluation.benchmarks.run import run_benchmark
    from isdaa.evaluation.benchmarks.table import print_outcome
    from isdaa.report.benchmarks import write_benchmark_report

    outcome = run_benchmark(request)

    def show() -> None:
        print_outcome(outcome.metrics)
        if outcome.metrics["judge"] is None:
            print(
                f"answers: {shown(outcome.folder / 'answers')}\nNo judge is named, so nothing is judged: add --judge_model NAME "
                "--judge_base_url URL, or --judge PATH for a reward model; the answers will not be generated again."
            )
        else:
            print(f"records: {shown(outcome.folder)}\nreport: {shown(write_benchmark_report(outcome.folder))}")

    once(show)
    if outcome.stopped is not None:
        raise DoneInPart(outcome.stopped)


def _request_of(arguments: argparse.Namespace) -> BenchmarkRequest:
    from isdaa.evaluation.benchmarks.request import Sources, benchmark_request

    return benchmark_request(
        arguments.name,
        arguments.model_path or (),
        Sources(
            **{name: getattr(arguments, name) for name in SOURCES},
            answers=tuple(arguments.answers or ()),
            judgments=tuple(arguments.judgments or ()),
        ),
        judge=arguments.judge,
        asking=asking_of(arguments),
        max_new_tokens=arguments.max_new_tokens,
        chat_template=arguments.chat_template,
        output_dir=arguments.output,
        overrides=given_of(arguments),
    )
