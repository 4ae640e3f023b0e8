"""What analysis and report read: per-prompt values of the checkpoints, equal to the evaluation's own means."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from evaluation_helpers import TOKENIZATION, WordCount, moved, save, settings, tiny, world_rows

from isdaa.errors import UserError
from isdaa.evaluation.checkpoints import sample_and_kl
from isdaa.evaluation.checkpoints.trajectory import read_study, trajectories
from isdaa.evaluation.evaluate import evaluate

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    reference = tiny()
    places = {"a": "run/checkpoints/checkpoint-5", "b": "run/model", "c": "alone"}
    found = {"reference": save(reference, folder / "reference")}
    for index, (name, place) in enumerate(places.items()):
        found[name] = save(moved(reference, 0.1 * (index + 1)), folder / place)
    return found


def run(models, folder: Path, names, **changes):
    options = {"scorer": WordCount(), "settings": settings()} | changes
    paths = [models[name] for name in names]
    rows = world_rows()
    return evaluate(paths, reference=models["reference"], prompts=rows, tokenization=TOKENIZATION, output_dir=folder, **options)


@pytest.mark.parametrize("opponent", ["reference", "chosen"])
def test_per_prompt_values_have_the_metrics_means(models, tmp_path: Path, opponent: str) -> None:
    metrics = run(models, tmp_path, "ab", settings=settings(opponent=opponent))
    (one,) = trajectories(tmp_path)
    assert one.name == "run" and list(one.steps) == [1, 2] and one.wins is not None and one.rewards is not None
    for row, entry in enumerate(metrics["models"]):
        assert one.kl[row].mean() == pytest.approx(entry["kl"]["mean"])
        assert one.wins[row].mean() == pytest.approx(entry["win_rate"]["mean"])
        assert one.rewards[row].mean() == pytest.approx(entry["reward"]["mean"])
        assert one.lengths is not None and one.lengths[row].mean() == pytest.approx(entry["length"]["mean"])
    assert one.start == metrics["reference"]["win_rate"]["mean"] == pytest.approx(one.start_wins.mean())
    assert np.allclose(one.root_kl**2, one.kl.mean(axis=1))


def test_models_outside_a_run_are_runs_of_their_own(models, tmp_path: Path) -> None:
    run(models, tmp_path, "cab")
    found = {one.name: one for one in trajectories(tmp_path)}
    assert set(found) == {"run", "alone"}
    assert found["alone"].labels == ["alone"] and found["run"].kl.shape == (2, 8)
    told = trajectories(tmp_path, as_one_run=True)  # no word of the user's joins them
    assert [[Path(path).name for path in one.paths] for one in told] == [["alone"], ["checkpoint-5", "model"]]


def test_without_a_scorer_there_are_no_win_rates(models, tmp_path: Path) -> None:
    run(models, tmp_path, "a", scorer=None)
    study = read_study(tmp_path)
    assert not study.scored and study.runs[0].wins is None and study.runs[0].start is None


def test_shared_records_are_read_and_not_made_again(models, tmp_path: Path, monkeypatch) -> None:
    run(models, tmp_path / "first", "a")
    sampled = []
    draw = sample_and_kl.Collection.draw
    monkeypatch.setattr(
        sample_and_kl.Collection, "draw", lambda self, path, names: sampled.append(path) or draw(self, path, names)
    )
    metrics = run(models, tmp_path / "second", "ab", shared=tmp_path / "first")
    assert sampled == [models["b"]]
    alone = run(models, tmp_path / "third", "ab")
    same = ("kl", "win_rate", "reward", "length")
    assert [[entry[key] for key in same] for entry in metrics["models"]] == [[e[key] for key in same] for e in alone["models"]]
    before = (tmp_path / "first" / "samples.jsonl").read_bytes()
    assert metrics["reference"]["win_rate"] == alone["reference"]["win_rate"]
    assert (tmp_path / "first" / "samples.jsonl").read_bytes() == before
    # The folder as a whole may be moved: the way from one to the other is relative.
    plan = json.loads((tmp_path / "second" / "plan.json").read_text())
    assert plan["shared"] == "../first"


def test_a_folder_without_an_evaluation_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="isdaa evaluate --model_path"):
        read_study(tmp_path)
