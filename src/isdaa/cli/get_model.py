"""`isdaa get-model`."""

from __future__ import annotations

import argparse
import shlex

from isdaa.errors import shown


def add(parser: argparse.ArgumentParser) -> None:
    parser.usage = "isdaa get-model smollm2-135m [FOLDER]\n       isdaa get-model FILE.gguf [FOLDER] [--tokenizer NAME]"
    parser.add_argument(
        "name",
        metavar="NAME",
        help="smollm2-135m (SmolLM2-135M-Instruct, Apache-2.0, 98 MB), or a .gguf file; needs gguf (in requirements.txt)",
    )
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="where it goes (default: models/NAME)")
    parser.add_argument("--tokenizer", metavar="NAME", help="folder or Hub name of a file's own tokenizer")


def run(arguments: argparse.Namespace) -> None:
    """Make the folder."""
    from isdaa.models.gguf import get_model

    folder = get_model(arguments.name, arguments.folder, arguments.tokenizer)
    print(f"{shown(folder)}\ntry: isdaa train --model.path {shown(shlex.quote(str(folder)))} …")
