"""Our figures of AlpacaEval 2 beside the leaderboard's, from a clone of the original's repository and its `df_gamed.csv`.

    git clone https://github.com/tatsu-lab/alpaca_eval
    python benchmarks/alpaca_eval_leaderboard.py alpaca_eval df_gamed.csv

df_gamed.csv: of the data set tatsu-lab/alpaca_eval on the Hub; without it the length-controlled win rate is left out. Nothing
of the original is part of isdaa. Annotations that are no JSON (Git LFS pointers) are passed over, and rows that a file lacks
are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from isdaa.data.reading.readers import iterate_rows
from isdaa.errors import UserError
from isdaa.evaluation.benchmarks.sets.alpaca_eval import BASELINE, read_gamed, read_judgments, read_questions, score
from isdaa.evaluation.benchmarks.sets.benchmark import Scoring

JUDGE = "weighted_alpaca_eval_gpt4_turbo"
LEADERBOARD = f"src/alpaca_eval/leaderboards/data_AlpacaEval_2/{JUDGE}_leaderboard.csv"
# Our figure -> the leaderboard's column that it is compared with.
COLUMNS = {
    "win_rate": "win_rate",
    "discrete_win_rate": "discrete_win_rate",
    "length": "avg_length",
    "length_adjusted_win_rate": "length_controlled_winrate",
    "length_controlled_win_rate": "length_controlled_winrate",
}


def main(argv: list[str] | None = None) -> int:
    """Print how far our columns are from the published ones: median, worst, rank correlation."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("clone", type=Path)
    parser.add_argument("gamed", nargs="?", metavar="df_gamed.csv")
    arguments = parser.parse_args(argv)
    questions = read_questions(str(arguments.clone / "results" / BASELINE / "model_outputs.json"))
    published = {row[""]: row for row, _ in iterate_rows(str(arguments.clone / LEADERBOARD))}
    ways = [Scoring(resamples=100)]
    ways += [] if arguments.gamed is None else [Scoring(resamples=100, gamed=read_gamed(arguments.gamed))]
    gaps: dict[str, list[tuple[float, float, str]]] = {name: [] for name in COLUMNS}
    short = 0
    for file in sorted(arguments.clone.glob(f"results/*/{JUDGE}/annotations.json")):
        if not _is_json(file):
            continue
        ((model, judged),) = read_judgments(file, questions).items()
        if model not in published:
            continue
        short += len(judged) < len(questions)
        order = {question.id: place for place, question in enumerate(questions)}
        rows = sorted(judged, key=lambda one: order[one.question.id])
        for found in (score({model: rows}, scoring)[model] for scoring in ways):
            ours = {name: 100 * figure.value for name, figure in found.figures.items()} | {"length": found.details["length"]}
            for name, column in COLUMNS.items():
                theirs = published[model].get(column)
                if name in ours and theirs not in (None, "") and model not in {row[2] for row in gaps[name]}:
                    gaps[name].append((float(ours[name]), float(theirs), model))
    print(f"{len(gaps['win_rate'])} models, of which {short} have fewer than {len(questions)} rows")
    for name, rows in gaps.items():
        if rows:
            print(_line(name, rows))
    return 0


def _is_json(file: Path) -> bool:
    try:
        with open(file, encoding="utf-8") as opened:
            return bool(json.load(opened))
    except ValueError:
        return False


def _line(name: str, rows: list[tuple[float, float, str]]) -> str:
    ours, theirs = (np.array([row[place] for row in rows]) for place in (0, 1))
    away: Any = np.abs(ours - theirs)
    worst = rows[int(away.argmax())][2]
    rank = spearmanr(ours, theirs).statistic
    return f"{name:26} median {np.median(away):.3g}, worst {away.max():.3g} ({worst}), rank correlation {rank:.3f}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
