"""`isdaa demo`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from isdaa.cli.options import add_keys, add_shared, adopted, overrides_of
from isdaa.config import load_config
from isdaa.errors import UserError
from isdaa.files import located

COMMON = "config methods output_dir seed objective.beta align.epochs align.max_steps"


def add(parser: argparse.ArgumentParser) -> None:
    parser.usage = "isdaa demo [gaussians | finite] [--methods NAME ...] [--section.key VALUE ...]"
    parser.add_argument(
        "what", nargs="?", choices=["world", "gaussians", "finite"], default="world", metavar="WHAT",
        help="gaussians, finite: the theory in seconds (docs/theory.md); default: the experiment",
    )  # fmt: skip
    parser.add_argument(
        "--config", default="configs/mini/demo.yaml", metavar="FILE", help="YAML file (default: configs/mini/demo.yaml)"
    )
    parser.add_argument(
        "--methods", nargs="+", default=["dpo", "is_dpo"], metavar="NAME",
        help="presets to compare (`isdaa methods` lists them; default: dpo is_dpo)",
    )  # fmt: skip
    add_shared(parser, "adopt")
    add_keys(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the experiment, or a script of the theory, whose exit status this is."""
    if arguments.what != "world":
        return _theory(arguments)
    config = load_config(arguments.config, overrides_of(arguments))
    if config.continue_from is not None:
        raise UserError("--continue_from: the demo begins anew; go on from one of its runs by `isdaa train`")
    if arguments.adopt:
        adopted([config.output_dir])
    from isdaa.experiments.demo import run_demo

    run_demo(config, arguments.methods)
    return 0


def _theory(arguments: argparse.Namespace) -> int:
    given = overrides_of(arguments)
    strange = [name for name in given if name not in ("output_dir", "seed")]
    if strange:
        raise UserError(f"demo {arguments.what}: --{strange[0]}: has no effect here; --output_dir and --seed do")
    folder, seed = Path(located(str(given.get("output_dir", f"runs/{arguments.what}")))), given.get("seed", 0)
    script = Path(__file__).parents[3] / "examples" / "theory" / f"{arguments.what}.py"
    if not script.is_file():
        raise UserError(f"demo {arguments.what}: needs a clone of the repository, where examples/theory/{script.name} lies")
    return subprocess.run([sys.executable, str(script), "--output_dir", str(folder), "--seed", str(seed)]).returncode
