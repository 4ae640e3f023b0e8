"""`isdaa report`."""

from __future__ import annotations

import argparse

from isdaa.cli.options import SAMPLES, add_samples, adopted, samples_of, stop_in_part
from isdaa.errors import UserError, shown

COMMON = "checkpoints one_run output " + SAMPLES


def add(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "isdaa report RUN_OR_SWEEP [options]\n       isdaa report --checkpoints A B C --reference D [--one_run] [options]"
    )
    parser.add_argument("path", nargs="?", metavar="RUN_OR_SWEEP", help="folder of a run (any trainer's) or of a sweep")
    parser.add_argument(
        "--checkpoints", nargs="+", metavar="PATH", help="models, whatever trained them: sorted by their steps, a curve a run"
    )
    parser.add_argument("--one_run", action="store_true", help="they are one run, in the order given, wherever they lie")
    parser.add_argument(
        "--output", metavar="DIR", help="where the report goes (default: `report` in the run's or sweep's folder)"
    )
    add_samples(parser)


def run(arguments: argparse.Namespace) -> None:
    """Write the page, and print what it says in short. Raises DoneInPart where not all is done."""
    if (arguments.path is None) == (arguments.checkpoints is None):
        raise UserError("report: name a run's or sweep's folder, or models with --checkpoints; see `isdaa report --help`")
    overrides, paths = samples_of(arguments), arguments.checkpoints or [arguments.path]
    if arguments.adopt:
        adopted(paths)
    from isdaa.evaluation.left_out import check_done
    from isdaa.report.make import report_on, written
    from isdaa.report.words import keep_lines

    several = arguments.checkpoints is not None
    page, sentences = report_on(paths, overrides, arguments.output, as_one_run=several, one_run=arguments.one_run)
    report = written(page)
    for line in [*sentences, *keep_lines(report), f"report: {page}"]:
        print(shown(line))
    check_done(report)
    stop_in_part(overrides)
