"""`isdaa evaluate`."""

from __future__ import annotations

import argparse
import re
import shlex
from functools import partial

from isdaa.cli.options import SAMPLES, add_samples, add_shared, model_paths, samples_of, stop_in_part
from isdaa.cli.parser import OneLineParser, underscored
from isdaa.distributed import is_main, once
from isdaa.errors import UserError, shown
from isdaa.exits import tell

COMMON = "model_path output " + SAMPLES
INSTEAD = {"--judge": "a reward model is named with --scorer"}


def add(parser: argparse.ArgumentParser) -> None:
    parser.usage = "isdaa evaluate --model_path PATH [PATH ...] [options]"
    add_shared(parser, "model_path", "output")
    add_samples(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the table, and say where the records are. Raises DoneInPart where not all is done."""
    paths = model_paths(arguments)
    overrides = samples_of(arguments) | {"output_dir": arguments.output}
    from isdaa.evaluation.checkpoints.what_to_evaluate import requests

    request = once(partial(requests, paths, overrides))  # before what takes seconds to import
    from isdaa.evaluation.evaluate import evaluate_request
    from isdaa.evaluation.left_out import check_done
    from isdaa.evaluation.table import print_table

    metrics = evaluate_request(request)
    if is_main():
        print_table(metrics)
        print(f"records: {shown(request.output_dir)}")
    check_done(metrics)
    stop_in_part(overrides)


def renamed(argv: list[str]) -> list[str]:
    """`evaluate --benchmark NAME …` and `evaluate --tax …`, which work for one release more, as they are typed now."""
    former = OneLineParser(prog="isdaa evaluate", add_help=False)
    former.add_argument("--benchmark")
    former.add_argument("--tax", nargs="*")
    known, rest = former.parse_known_args(argv[1:])
    if known.benchmark is not None and known.tax is not None:
        raise UserError("evaluate: --benchmark and --tax are two evaluations; call one after the other")
    if known.benchmark is not None:
        name, new = "--benchmark", ["benchmark", known.benchmark, *rest]
    elif known.tax is not None:
        name, new = "--tax", ["tax", *known.tax, *(re.sub("^--tax_", "--", underscored(word)) for word in rest)]
    else:
        return argv
    if is_main():
        tell(f"isdaa: `evaluate {name}` is gone in the next release; type: {shown(shlex.join(['isdaa', *new]))}")
    return new
