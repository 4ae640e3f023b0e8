"""`isdaa tax`."""

from __future__ import annotations

import argparse
from pathlib import Path

from isdaa.cli.options import add_keys, add_shared, add_trust, given_of, model_paths
from isdaa.cli.parser import whole
from isdaa.errors import UserError, shown
from isdaa.evaluation.tax.tax import BATCH, TAX, TaxSettings, measure_tax

INSTEAD = dict.fromkeys(
    ("--data", "--split", "--scorer", "--scores", "--judge", "--judge_model", "--questions"),
    "its items come from lm-eval, which scores them, too; leave it out",
)


def add(parser: argparse.ArgumentParser) -> None:
    parser.usage = "isdaa tax [TASK ...] --model_path PATH [PATH ...] [options]"
    parser.add_argument(
        "tasks", nargs="*", metavar="TASK",
        help="lm-eval tasks, groups or tags (default: mmlu gsm8k arc_challenge hellaswag winogrande)",
    )  # fmt: skip
    group = parser.add_argument_group("tasks (docs/evaluation.md; needs lm-eval)")
    group.add_argument(
        "--limit", type=whole(), metavar="N", help="the first N items of each task, of each subject of MMLU (≥ 1; default: all)"
    )
    group.add_argument(
        "--shots", nargs="+", type=_shots, default=[], metavar="TASK=N",
        help="examples in the prompt (default: mmlu 5, gsm8k 5, arc_challenge 25, hellaswag 10, winogrande 5, else the task's)",
    )  # fmt: skip
    group.add_argument("--include_path", metavar="DIR", help="folder of lm-eval task files of your own")
    group.add_argument(
        "--batch_size", type=lambda text: text if text == "auto" else whole()(text), default=BATCH, metavar="N",
        help=f"requests at a time (≥ 1), or `auto` (default: {BATCH})",
    )  # fmt: skip
    group.add_argument("--chat_template", action="store_true", help="ask through the model's chat template (default: plain text)")
    add_shared(parser, "model_path", "output", "reference", "tokenizer", "dtype", "adopt")
    add_trust(parser)
    add_keys(parser, only=("evaluation.bootstrap", "evaluation.confidence", "evaluation.seed"))


def run(arguments: argparse.Namespace) -> None:
    """Measure the alignment tax, print it, and renew the reports that show it."""
    paths = model_paths(arguments)
    overrides = given_of(arguments, "reference", "tokenizer") | {"output_dir": arguments.output}
    from isdaa.evaluation.checkpoints.what_to_evaluate import requests
    from isdaa.evaluation.tax.harness import SHOTS
    from isdaa.evaluation.tax.table import print_tax
    from isdaa.report.benchmarks import renew_benchmark_reports
    from isdaa.terminal import say

    swallowed = next((name for name in paths if name in SHOTS and not Path(name).exists()), None)
    if swallowed is not None:
        raise UserError(
            f"{swallowed}: is a task, and stands among the models; tasks come first: isdaa tax {swallowed} --model_path …"
        )
    shots: dict[str, int] = {}
    for name, number in arguments.shots:
        if shots.setdefault(name, number) != number:
            raise UserError(f"--shots: {name} is given twice, with {shots[name]} and {number}; give it once")
    # Prompts and scorer are what a tax does without; the rest of the request it shares with every evaluation.
    request = requests(paths, {**overrides, "data": "none", "scorer": "none"})
    for line in request.told:
        say(line)
    settings = TaxSettings(
        tuple(arguments.tasks), shots, arguments.limit, arguments.include_path, arguments.batch_size, arguments.chat_template
    )
    print_tax(measure_tax(request, settings))
    print(f"records: {shown(Path(request.output_dir) / TAX)}")
    for page in renew_benchmark_reports(Path(request.output_dir)):
        print(f"report: {shown(page)}")


def _shots(text: str) -> tuple[str, int]:
    name, equals, number = text.partition("=")
    if not (name and equals and number.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected TASK=N (gsm8k=8), got {text!r}")
    return name, int(number)
