"""A sweep's file: which cells and runs it means, what they share, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from chains import CHAIN, config_file

from isdaa.cli import main
from isdaa.config import load_config, resolved, validate
from isdaa.errors import UserError
from isdaa.experiments.grid import SweepConfig, cells_of, load_sweep, tasks_of

ROOT = Path(__file__).parents[2]
GRIDS: dict[str, Any] = {
    "main": {"objective.method": ["dpo", "is_dpo"], "objective.beta": [0.01, 0.1]},
    "clip": {"objective.method": "is_dpo", "objective.beta": 0.1, "objective.clip_eps": [1.0, None], "seeds": [5]},
}


def sweep_of(folder: Path, grids: Any = GRIDS, **changes: Any) -> tuple[SweepConfig, Any]:
    config_file(folder / "base.yaml", CHAIN)
    data = {"base": "base.yaml", "output_dir": str(folder / "out"), "seeds": [5, 6], "grids": grids} | changes
    (folder / "sweep.yaml").write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return load_sweep(folder / "sweep.yaml")


def test_a_cell_that_two_grids_name_is_one_cell(tmp_path: Path) -> None:
    sweep, base = sweep_of(tmp_path)
    cells = {cell.name: cell for cell in cells_of(sweep, base)}
    # ε = 1 is the preset's value: the cell of the first grid.
    assert list(cells) == [
        *("dpo-beta0.01", "dpo-beta0.1", "is_dpo-beta0.01", "is_dpo-beta0.1", "is_dpo-beta0.1-clip_epsnone"),
    ]
    assert cells["is_dpo-beta0.1"].grids == ["main", "clip"]
    assert cells["is_dpo-beta0.1-clip_epsnone"].seeds == [5]


def test_methods_over_the_file_of_a_run_are_those_methods(tmp_path: Path) -> None:
    """Such a base spells out all settings of one of them."""
    sweep, base = sweep_of(tmp_path, {"a": {"objective.method": ["dpo", "is_dpo", "chi_po"], "align.epochs": [2.0]}})
    plain = tasks_of(sweep, base, cells_of(sweep, base))
    base = validate(resolved(base), "config.yaml")
    tasks = tasks_of(sweep, base, cells_of(sweep, base))
    assert [task.config.objective.arguments() for task in tasks] == [task.config.objective.arguments() for task in plain]
    assert {task.config.align.max_steps for task in tasks if task.cell} == {None}
    assert [task.key for task in tasks] == [task.key for task in plain]


def test_runs_of_a_seed_share_one_world_which_comes_first(tmp_path: Path) -> None:
    sweep, base = sweep_of(tmp_path)
    tasks = tasks_of(sweep, base, cells_of(sweep, base))
    names = [task.name for task in tasks]
    assert names.count("shared/seed-5") == names.count("shared/seed-6") == 1
    assert len([task for task in tasks if task.cell]) == 4 * 2 + 1
    for task in tasks:
        if task.cell is not None:
            assert task.needs == f"shared/seed-{task.seed}" and names.index(task.needs) < names.index(task.name)
            assert task.config.model.path == str(tmp_path / "out" / task.needs / "sft")
            assert task.config.stages == ["align"] and task.config.seed == task.seed
            assert task.config.reference.cache_dir == str(tmp_path / "out" / ".isdaa_cache")
    chosen = {task.name: task.config.objective.arguments() for task in tasks if task.cell}
    assert chosen["dpo-beta0.1/seed-5"]["weight"] == "none" and chosen["dpo-beta0.1/seed-5"]["beta"] == 0.1
    assert chosen["is_dpo-beta0.1-clip_epsnone/seed-5"]["clip_eps"] is None


def test_a_grid_that_changes_the_pairs_has_a_world_of_its_own(tmp_path: Path) -> None:
    grids = {"a": {"objective.method": ["dpo"]}, "b": {"label.scale": [3.0]}, "c": {"data.limit": [10]}}
    sweep, base = sweep_of(tmp_path, grids, seeds=[5])
    tasks = {task.name: task for task in tasks_of(sweep, base, cells_of(sweep, base))}
    worlds = [name for name, task in tasks.items() if task.cell is None]
    assert len(worlds) == 2
    other = next(task for name, task in tasks.items() if name.startswith("is_dpo-scale3"))
    assert other.needs != "shared/seed-5" and tasks[other.needs].config.label.scale == 3.0
    few = next(task for name, task in tasks.items() if name.startswith("is_dpo-limit10"))
    assert few.needs == "shared/seed-5" and few.config.data.limit == 10  # fewer pairs of the same world


def test_only_some_grids(tmp_path: Path) -> None:
    sweep, base = sweep_of(tmp_path)
    cells = cells_of(sweep, base)
    chosen = {task.cell for task in tasks_of(sweep, base, cells, only=["clip"]) if task.cell}
    assert chosen == {"is_dpo-beta0.1", "is_dpo-beta0.1-clip_epsnone"}
    with pytest.raises(UserError, match=r"no grid 'clipp' \(did you mean .clip.\?\)"):
        tasks_of(sweep, base, cells, only=["clipp"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grids": {"m": {"objective.betta": [1]}}}, ("grids.m", "objective.betta", "objective.beta")),
        ({"grids": {"m": {"objective.method": ["dpoo"]}}}, ("grids.m", "dpoo")),
        ({"grids": {"m": {"objective.method": ["dpo"], "seeds": []}}}, ("grids.m.seeds",)),
        ({"grids": {"m": {"seed": [1]}}}, ("grids.m", "seed")),
        ({"grids": {"m": {}}}, ("grids.m",)),
        ({"grids": {"m": {"objective.beta": []}}}, ("grids.m.objective.beta", "empty")),
        ({"grids": {"m": {"objective.beta": ["much"]}}}, ("grids.m: objective.beta", "number", "much")),
        ({"grids": {"m": {"data.pairs": ["a.jsonl", "b.jsonl"]}}}, ("grids.m.data.pairs", "label")),
        ({"grids": {"m": {"objective.beta": [0.1], "seeds": [2, 2]}}}, ("grids.m.seeds", "twice")),
        ({"seeds": [1, 1]}, ("seeds", "twice")),
        ({"sedes": [1]}, ("sedes", "seeds")),
        ({"jobs": 0}, ("jobs: expected a whole number ≥ 1, got 0",)),
        ({"seeds": 3}, ("sweep.yaml: seeds: expected a list, got 3; write [3]",)),
        ({"seeds": None}, ("seeds: expected a list of whole numbers ≥ 0 and ≤ 4294967295, got null",)),
        ({"expected_minutes": [-5, 1]}, ("expected_minutes: expected a list of numbers > 0 or null, got -5",)),
        ({"grids": {"m": 3}}, ("sweep.yaml: grids.m: expected a valid dictionary, got 3",)),
        ({"cluster": "pbs"}, ("cluster: expected one of none, local, slurm, got 'pbs'",)),
        ({"slurm": "gpu"}, ("slurm: expected a section of keys, got 'gpu'",)),
        ({"slurm": {"gpu": 1}}, ('slurm.gpu: unknown key (did you mean "slurm.gpus"?)',)),
        ({"base": "nowhere.yaml"}, ("nowhere.yaml",)),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        sweep, base = sweep_of(tmp_path, **changes)
        cells_of(sweep, base, "sweep.yaml")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


OURS = sorted(p for p in (ROOT / "configs").glob("*/*.yaml") if p.parent.name != "accelerate")


@pytest.mark.parametrize("path", OURS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_config_in_the_repository_loads(path: Path) -> None:
    if "grids" in yaml.safe_load(path.read_text(encoding="utf-8")):
        sweep, base = load_sweep(path)
        assert tasks_of(sweep, base, cells_of(sweep, base, path.name), path.name)
    else:
        load_config(path)


def test_an_option_is_named_as_an_option(tmp_path: Path) -> None:
    sweep_of(tmp_path)
    with pytest.raises(UserError, match=r"^--jobs: "):
        load_sweep(tmp_path / "sweep.yaml", {"jobs": 0})
    with pytest.raises(UserError, match="expected_minutes"):
        load_sweep(tmp_path / "sweep.yaml", {"expected_minutes": [-5, 1]})


def test_finished_runs_are_known_wherever_the_sweep_lies(tmp_path: Path) -> None:
    keys = []
    for place in ("here", "there"):
        sweep, base = sweep_of(tmp_path, output_dir=str(tmp_path / place))
        keys.append([task.key for task in tasks_of(sweep, base, cells_of(sweep, base))])
    assert keys[0] == keys[1] and len(set(keys[0])) == len(keys[0])


def test_a_base_that_only_aligns_has_one_reference_for_all_seeds(tmp_path: Path) -> None:
    sweep, base = sweep_of(tmp_path)
    given = base.model_dump() | {"stages": ["align"], "model": base.model.model_dump() | {"path": "m", "random": None}}
    given["data"] = base.data.model_dump() | {"pairs": "p.jsonl"}
    alone = validate(given, "test")
    tasks = tasks_of(sweep, alone, cells_of(sweep, alone))
    shared = [task for task in tasks if task.cell is None]
    assert [task.name for task in shared] == ["shared/reference"] and shared[0].evaluates_alone and shared[0].reference == "m"
    assert all(task.shared == shared[0].evaluation for task in tasks if task.cell is not None)


def test_dry_run_lists_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep_of(tmp_path)
    assert main(["sweep", "--config", str(tmp_path / "sweep.yaml"), "--dry-run", "--grids", "clip"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "is_dpo-beta0.1-clip_epsnone/seed-5" in lines and lines[-1] == "3 runs, 2 shared worlds"
    assert not (tmp_path / "out").exists()


def test_the_word_reward_is_the_reward_model_of_the_shared_world(tmp_path: Path) -> None:
    own = {"evaluation.scorer": "reward", "guard.scorer": "reward", "guard.steps": 2, "label.scorer": "reward"}
    stages = {"stages": ["sft", "reward", "label", "align"], "data.pairs": "pairs.jsonl"}
    sweep, _ = sweep_of(tmp_path)
    base = load_config(config_file(tmp_path / "own.yaml", CHAIN | own | stages))
    tasks = {task.name: task for task in tasks_of(sweep, base, cells_of(sweep, base))}
    world, run = tasks["shared/seed-5"].config, tasks["dpo-beta0.1/seed-5"].config
    assert world.label_scorer == run.guard_scorer == run.evaluation_scorer == str(tmp_path / "out/shared/seed-5/reward")
    assert run.data.pairs == str(tmp_path / "out/shared/seed-5/pairs/train.jsonl")


def test_a_sweep_begins_anew(tmp_path: Path) -> None:
    sweep, base = sweep_of(tmp_path, grids={"a": {"continue_from": ["old"], "objective.beta": [0.1]}})
    with pytest.raises(UserError, match="continue_from: the runs of a sweep begin anew"):
        tasks_of(sweep, base, cells_of(sweep, base))
