"""What a sweep consists of: a YAML file of grids becomes cells, and cells times seeds become runs.

    base: demo.yaml              one run's configuration; a path is relative to this file
    output_dir: runs/sweep
    seeds: [21, 22, 23, 24, 25]
    grids:
      main:                      a grid is the product of its lists; a value that is no list is the same for all its cells
        objective.method: [dpo, is_dpo]
        objective.beta: [0.01, 0.1]
      clip:
        objective.method: is_dpo
        objective.clip_eps: [0.25, null]
        seeds: [21, 22]          seeds of this grid alone

A cell is what its resolved configuration says: one that two grids name is run once, and belongs to both. SFT model, pairs
and reference samples are shared by all runs of a seed, but for cells that change how those are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from isdaa.config import REWARD, Config, Float, Int, Location, Section, Seed, laid_over, load_config, resolved, validate
from isdaa.config.keys import fields, kind_of
from isdaa.config.load import settings_file
from isdaa.config.messages import refusal
from isdaa.config.settings_text import or_list
from isdaa.config.synonyms import hint
from isdaa.config.taken_away import TAKEN_AWAY, say_taken_away
from isdaa.errors import UserError, nearest
from isdaa.files import digest, located

Keep = Literal["all", "models", "best"]
Minutes = Annotated[Float, Field(gt=0)]
# A grid's keys below these change the stages that runs share; all others belong to the alignment alone.
UPSTREAM = ("sft", "reward", "label", "scorer", "model", "lora", "tokenization")
UPSTREAM_KEYS = ("data.sft", "data.sft_split", "data.prompts", "data.prompts_split", "data.subset", "data.prompt_repeated")
SHARED_STAGES = ("sft", "reward", "label")


class SlurmConfig(Section):
    """What `submitit` asks the cluster for, for each run."""

    partition: str | None = None
    minutes: Int = Field(24 * 60, ge=1, description="time limit of one run; a run that exceeds it goes on where it stopped")
    gpus: Int = Field(1, ge=0)
    cpus: Int = Field(8, ge=1)
    memory_gb: Int | None = Field(None, ge=1)
    options: dict[str, Any] = Field(default_factory=dict, description="further parameters of submitit's executor")


class SweepConfig(Section):
    """One sweep. `grids`: name -> {dotted key of the run's configuration: list of values}."""

    title: str | None = None
    base: Location = Field(..., description="the runs' configuration; relative to the sweep's file")
    output_dir: Location = "runs/sweep"
    seeds: list[Seed] = Field(..., min_length=1)
    grids: dict[str, dict[str, Any]] = Field(..., min_length=1)
    jobs: Int = Field(1, ge=1, description="runs at a time")
    threads: Int | None = Field(None, ge=1, description="of each run on this machine; null: the cores divided by `jobs`")
    shared_threads: Int | None = Field(None, ge=1, description="of a shared world on this machine; null: as `threads`")
    expected_minutes: tuple[Minutes, Minutes] | None = Field(
        None, description="that a shared world and a run took before: the first estimate of the time left"
    )
    cluster: Literal["none", "local", "slurm"] = Field("none", description="none: processes here; else through submitit")
    slurm: SlurmConfig = Field(default_factory=SlurmConfig)
    keep: Keep = Field("models", description="of an evaluated run: all, its models alone, or the recommended one and the last")

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) != len(seeds):
            raise ValueError("the same seed twice")
        return seeds


@dataclass(frozen=True)
class Cell:
    """One setting, run with several seeds."""

    name: str
    settings: dict[str, Any]  # dotted keys that its grid sets
    grids: list[str]
    seeds: list[int]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"name": self.name, "settings": self.settings, "grids": self.grids, "seeds": self.seeds}


@dataclass(frozen=True)
class Task:
    """One process's work: a shared world, or one run. `needs` is the name of the task that comes first."""

    name: str
    config: Config
    folder: Path
    needs: str | None = None
    cell: str | None = None
    seed: int | None = None
    shared: Path | None = None  # evaluation whose records a run reads
    key: str = field(default="")  # digest of all that decides what comes out

    @property
    def evaluation(self) -> Path:
        """Folder of the records."""
        return self.folder / "evaluation"

    @property
    def reference(self) -> str | None:
        """Where π_ref of the runs of this shared world lies; None where each run makes its own."""
        config = self.config
        return config.reference.path or (str(self.folder / "sft") if "sft" in config.stages else config.model.path)

    @property
    def evaluates_alone(self) -> bool:
        """Whether there is nothing to train or label: a shared world whose model and pairs are given."""
        return self.cell is None and not set(self.config.stages) & set(SHARED_STAGES)

    @property
    def has_shared(self) -> bool:
        """Whether the reference was evaluated ahead."""
        return self.shared is not None and (self.shared / "plan.json").is_file()


def load_sweep(path: str | Path, overrides: Mapping[str, Any] | None = None) -> tuple[SweepConfig, Config]:
    """A sweep's file and the base configuration that it names.

    overrides: keys of the sweep (`output_dir`, `seeds`, `jobs`, …), where None counts as not given. Raises UserError of one
    line.
    """
    file = Path(located(path))
    data = settings_file(file, _kind_of, "sweep file")
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected `key: value` lines with base, seeds and grids")
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    sweep = sweep_config(data | given, str(path), given)
    return sweep, load_config(file.parent / sweep.base)


def _kind_of(path: Sequence[str]) -> Any:
    """The type of a sweep's key; of a grid's, that of the run's key, or a list of it."""
    if len(path) == 3 and path[0] == "grids":
        kind = kind_of(path[2].split("."))
        return None if kind is None else or_list(kind)
    return kind_of(path, SweepConfig)


def sweep_config(data: Mapping[str, Any], where: str, overrides: Mapping[str, Any] | None = None) -> SweepConfig:
    """Validated plain data; the first error becomes a `UserError` of one line. overrides: what options said of it."""
    try:
        return SweepConfig.model_validate(data)
    except ValidationError as error:
        raise refusal(error, where, overrides or {}, SweepConfig) from None


def cells_of(sweep: SweepConfig, base: Config, where: str = "sweep") -> list[Cell]:
    """Every cell once, in the order of the grids. Raises UserError naming grid and key."""
    known = {dotted for dotted, _, _ in fields()} | {*TAKEN_AWAY}
    cells: dict[str, Cell] = {}
    names: dict[str, str] = {}
    for grid, axes in sweep.grids.items():
        place = f"{where}: grids.{grid}"
        if not isinstance(axes, dict) or not set(axes) - {"seeds"}:
            raise UserError(f"{place}: expected `dotted.key: [values]` lines")
        seeds = axes.get("seeds", sweep.seeds)
        if not isinstance(seeds, list) or not seeds or not all(isinstance(s, int) and not isinstance(s, bool) for s in seeds):
            raise UserError(f"{place}.seeds: expected a list of seeds, got {seeds!r}")
        keys = [key for key in axes if key != "seeds"]
        if len(set(seeds)) != len(seeds):
            raise UserError(f"{place}.seeds: the same seed twice")
        for key in keys:
            if key not in known or key in ("seed", "output_dir", "stages"):
                raise UserError(f"{place}: {key}: not a key that a grid can set{hint(key, known)}")
            if axes[key] == []:
                raise UserError(f"{place}.{key}: an empty list; give at least one value, or remove the key")
            if key == "data.pairs" and "label" in base.stages:
                raise UserError(
                    f"{place}.{key}: the base's label stage makes the pairs; remove label from its stages, or this key"
                )
        values = [axes[key] if isinstance(axes[key], list) else [axes[key]] for key in keys]
        for key, of_key in zip(keys, values, strict=True):
            for value in of_key if key in TAKEN_AWAY else ():
                say_taken_away(key, value, f"{place}: {key}")
        for combination in product(*values):
            named = dict(zip(keys, combination, strict=True))
            settings = {key: value for key, value in named.items() if key not in TAKEN_AWAY}
            identity = _identity(base, settings, place)
            if identity in cells:
                cell = cells[identity]
                cell.grids.extend(g for g in [grid] if g not in cell.grids)
                cell.seeds.extend(s for s in seeds if s not in cell.seeds)
                continue
            name = cell_name(named, base)  # the folder of its runs, as it was
            if names.setdefault(name, identity) != identity:
                raise UserError(
                    f"{place}: two different cells would both be called {name}; write their values so that they differ"
                )
            cells[identity] = Cell(name, settings, [grid], list(seeds))
    return list(cells.values())


def _identity(base: Config, settings: Mapping[str, Any], where: str) -> str:
    return digest(resolved(_laid_over(base, settings, where)))


def _laid_over(base: Config, settings: Mapping[str, Any], where: str, **top: Any) -> Config:
    """`base` with dotted settings over it. Another method brings its own preset's values, not the base method's."""
    return validate(laid_over(base.model_dump(), settings) | top, where)


def cell_name(settings: Mapping[str, Any], base: Config) -> str:
    """`is_dpo-beta0.01-clip_eps0.25`: the method, then what the grid sets, as a folder's name."""
    method = settings.get("objective.method", base.objective.method)
    parts = [str(method)]
    for dotted, value in settings.items():
        if dotted != "objective.method":
            text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
            parts.append(dotted.split(".")[-1] + "".join(c if c.isalnum() or c in "._-" else "-" for c in text))
    return "-".join(parts)


def tasks_of(
    sweep: SweepConfig, base: Config, cells: Sequence[Cell], where: str = "sweep", only: Sequence[str] | None = None
) -> list[Task]:
    """Shared worlds and runs, each world before the runs that need it; grid by grid, and within a grid seed by seed.

    only: names of the grids whose runs are wanted. Raises UserError for one that the sweep does not have.
    """
    for name in only or ():
        if name not in sweep.grids:
            raise UserError(f"--grids: {where} has no grid {name!r}{nearest(name, sweep.grids)}")
    root = Path(sweep.output_dir)
    tasks: dict[str, Task] = {}
    stages = [stage for stage in base.stages if stage in SHARED_STAGES]
    for grid in sweep.grids:
        mine = [cell for cell in cells if cell.grids[0] == grid and (not only or set(cell.grids) & set(only))]
        for seed in dict.fromkeys(seed for cell in mine for seed in cell.seeds):
            for cell in mine:
                if seed not in cell.seeds:
                    continue
                world = None
                if stages or (base.model.path is not None and base.data.evaluation is not None):
                    world = _world(sweep, base, cell, seed, stages, where)
                    tasks.setdefault(world.name, world)
                run = _run(root, base, cell, seed, world, where)
                tasks[run.name] = run
    return list(tasks.values())


def _world(sweep: SweepConfig, base: Config, cell: Cell, seed: int, stages: Sequence[str], where: str) -> Task:
    upstream = {key: value for key, value in cell.settings.items() if _is_upstream(key)}
    # Without a stage of its own it holds the evaluation of the given reference, the same for every seed.
    name = f"shared/seed-{seed}" if stages else "shared/reference"
    name += f"-{digest(upstream)[:6]}" if upstream else ""
    folder = Path(sweep.output_dir) / name
    config = _laid_over(
        base, upstream, where, output_dir=str(folder), stages=stages or ["align"], seed=seed if stages else base.seed
    )
    config.reference.cache_dir = str(Path(sweep.output_dir) / ".isdaa_cache")
    return Task(name, config, folder, seed=seed if stages else None, key=_key(config))


def _run(root: Path, base: Config, cell: Cell, seed: int, world: Task | None, where: str) -> Task:
    folder = root / "runs" / cell.name / f"seed-{seed}"
    own = _laid_over(base, cell.settings, where, seed=seed)
    key = _key(own) + (f"/{world.key}" if world is not None else "")
    data = own.model_dump() | {"stages": ["align"], "output_dir": str(folder)}
    data["reference"]["cache_dir"] = str(root / ".isdaa_cache")
    if world is not None:
        if "sft" in world.config.stages:
            data["model"].update(path=str(world.folder / "sft"), random=None, tokenizer=None)
        if "label" in world.config.stages:
            data["data"].update(pairs=str(world.folder / "pairs" / "train.jsonl"))
        data["data"].update(sft=None, prompts=None)
        if "reward" in world.config.stages:
            for section, names in (("evaluation", (None, REWARD)), ("guard", (REWARD,))):
                if data[section]["scorer"] in names:
                    data[section]["scorer"] = str(world.folder / REWARD)
    config = validate(data, where)
    if config.continue_from is not None:
        raise UserError(f"{where}: continue_from: the runs of a sweep begin anew; go on from one of them by `isdaa train`")
    needs, shared = (world.name, world.evaluation) if world is not None else (None, None)
    return Task(f"{cell.name}/seed-{seed}", config, folder, needs, cell.name, seed, shared, key)


def _is_upstream(key: str) -> bool:
    return key.split(".")[0] in UPSTREAM or key in UPSTREAM_KEYS


def _key(config: Config) -> str:
    """Digest of what decides a task's outcome; where the sweep lies does not."""
    data = resolved(config)
    data["reference"] = {k: v for k, v in data["reference"].items() if k != "cache_dir" and (k, v) != ("revision", None)}
    without = {"output_dir", "continue_from", "continue_optimizer", *(() if config.guard.acts else ("guard",))}
    return digest({k: v for k, v in data.items() if k not in without})
