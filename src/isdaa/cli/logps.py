"""`isdaa logps`."""

from __future__ import annotations

import argparse
from pathlib import Path

from isdaa.cli.options import add_keys, overrides_of
from isdaa.config import layers, parsed


def add(parser: argparse.ArgumentParser) -> None:
    parser.usage = "isdaa logps --model_path PATH --data SOURCE --output FILE [options]"
    parser.add_argument("--model_path", required=True, metavar="PATH", help="the model that wrote the responses")
    parser.add_argument("--data", required=True, metavar="SOURCE", help="preference pairs")
    parser.add_argument("--split", default="train", metavar="NAME", help="split of --data (default: train)")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSONL file to write")
    parser.add_argument(
        "--prompt_repeated", choices=["strip", "keep"], help="as --data.prompt_repeated of the run that will read it"
    )
    add_keys(parser, only=("tokenization",))


def run(arguments: argparse.Namespace) -> None:
    """Write the file."""
    given = overrides_of(arguments)
    tokenization = parsed(layers(None, given), overrides=given).tokenization
    from isdaa.training.stages.behaviour_logps import write_behaviour_logps

    write_behaviour_logps(
        arguments.model_path, arguments.data, arguments.split, Path(arguments.output), tokenization, arguments.prompt_repeated
    )
