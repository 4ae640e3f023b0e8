"""`isdaa sweep`."""

from __future__ import annotations

import argparse

from isdaa.cli.options import add_shared, adopted
from isdaa.cli.parser import whole
from isdaa.errors import shown


def add(parser: argparse.ArgumentParser) -> None:
    parser.usage = "isdaa sweep --config FILE [--jobs N] [options]"
    parser.add_argument("--config", required=True, metavar="FILE", help="the sweep's YAML file: base, seeds, grids")
    parser.add_argument("--jobs", type=whole(), metavar="N", help="runs at a time (≥ 1; default: the file's, else 1)")
    parser.add_argument("--threads", type=whole(), metavar="N", help="of each run on this machine (≥ 1; default: cores / jobs)")
    parser.add_argument("--output_dir", metavar="DIR", help="folder of the sweep (default: the file's)")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="seeds of the grids that name none of their own")
    parser.add_argument("--grids", nargs="+", metavar="NAME", help="only these grids of the file")
    parser.add_argument("--cluster", choices=["none", "local", "slurm"], help="submit runs through submitit")
    parser.add_argument("--keep", choices=["all", "models", "best"], help="what is left of an evaluated run's checkpoints")
    parser.add_argument("--dry_run", action="store_true", help="list the runs and stop")
    add_shared(parser, "adopt")


def run(arguments: argparse.Namespace) -> None:
    """Train and evaluate every run, or list them."""
    from isdaa.experiments.grid import cells_of, load_sweep, tasks_of

    names = ("jobs", "threads", "output_dir", "seeds", "cluster", "keep")
    sweep, base = load_sweep(arguments.config, {name: getattr(arguments, name) for name in names})
    if arguments.dry_run:
        tasks = tasks_of(sweep, base, cells_of(sweep, base, arguments.config), arguments.config, arguments.grids)
        for task in tasks:
            print(shown(task.name))
        print(f"{sum(task.cell is not None for task in tasks)} runs, {sum(task.cell is None for task in tasks)} shared worlds")
        return
    if arguments.adopt:
        adopted([sweep.output_dir])
    from isdaa.experiments.sweep import run_sweep

    folder = run_sweep(sweep, base, arguments.config, arguments.grids)
    print(shown(f"{folder}: every run is finished; `isdaa report {folder}` makes the report"))
