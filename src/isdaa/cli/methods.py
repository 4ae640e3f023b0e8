"""`isdaa methods`."""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(arguments: argparse.Namespace) -> None:
    """List the presets."""
    from isdaa.config import ObjectiveConfig, methods_table
    from isdaa.objectives.presets import RECOMMENDED

    rows = methods_table()
    if arguments.json:
        import json

        print(json.dumps([{"name": n, "formula": f, "source": s} for n, f, s in rows], indent=2, ensure_ascii=False))
        return
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
        f"Without a reason for another: {method} at --objective.beta {beta:g}, which needs no μ and ended best in docs/study.md; "
        f"{own} is the default, since it is the paper's. Which method for which pairs: docs/which_method.md."
    )
