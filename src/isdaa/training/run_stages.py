"""One run: its stages in order, each skipped where it is done. The loop of every stage is a library's; the loss is ours."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from isdaa.config import STAGES, Config
from isdaa.distributed import once, world_size
from isdaa.errors import UserError
from isdaa.terminal import say, working
from isdaa.training.preflight import check_inputs
from isdaa.training.run_folder import ONE_PROCESS, Run


def _sft(run: Run) -> Path:
    from isdaa.training.stages.sft_and_reward import sft

    return sft(run)


def _reward(run: Run) -> Path:
    from isdaa.training.stages.sft_and_reward import reward

    return reward(run)


def _label(run: Run) -> Path:
    from isdaa.training.stages.label import label

    return label(run)


def _align(run: Run) -> Path:
    from isdaa.training.stages.align import align

    return align(run)


STAGE_FUNCTIONS: dict[str, Callable[[Run], Path]] = {"sft": _sft, "reward": _reward, "label": _label, "align": _align}
assert set(STAGE_FUNCTIONS) == set(STAGES)


def run(config: Config) -> Path:
    """Run the configured stages, in their order; what is finished is reused. Returns the run's folder.

    Raises UserError for bad input, and where the folder holds a run with other settings.
    """
    if "align" in config.stages and config.guard.steps is not None and world_size() > 1:
        raise UserError(ONE_PROCESS)
    with Run(config).opened() as current:
        missing = [stage for stage in config.stages if not current.is_done(stage)]
        once(lambda: check_inputs(config, missing))
        current.check_unchanged()
        for stage in config.stages:
            if stage in missing:
                current.begin(stage)
                with working(stage), _trackers(current, stage):
                    output = STAGE_FUNCTIONS[stage](current)
                current.finish(stage, output=str(output.relative_to(current.folder)))
                use = current.state["stages"][stage].get("guard", {}).get("use")
                say(
                    f"{stage}: finished: use {use}; {output} has the weights of the stop"
                    if use
                    else f"{stage}: finished, {output}"
                )
            else:
                say(f"{stage}: finished earlier, reused")
                for line in _saved_otherwise(config, stage):
                    say(line)
            # The stage's model is kept; these only served a resume.
            once(partial(shutil.rmtree, current.folder / f"{stage}-checkpoints", ignore_errors=True))
    return Path(config.output_dir)


def _saved_otherwise(config: Config, stage: str) -> list[str]:
    """What is to be said where `lora.merge` asks for another form than a finished stage has saved its model in."""
    folder = Path(config.output_dir) / {"sft": "sft", "align": "model"}.get(stage, "")
    alone = (folder / "adapter_config.json").is_file()
    if stage not in ("sft", "align") or not config.lora.rank or config.lora.merge in (None, not alone):
        return []
    form = "the adapter alone" if alone else "the adapter in its weights"
    told = f"lora.merge {str(config.lora.merge).lower()} comes too late"
    return [
        f"{stage}: warning: {told}: the stage has finished, and {folder} stays as it is, {form}; train into another output_dir"
    ]


@contextmanager
def _trackers(current: Run, stage: str) -> Iterator[None]:
    """Where trackers keep their files, unless the user's environment says so: with the run, and not among checkpoints, which are
    removed. A run and its resumes are one run of W&B's."""
    wanted = {"TENSORBOARD_LOGGING_DIR": str(current.folder / "tensorboard" / stage)}
    if "wandb" in getattr(getattr(current.config, stage), "report_to", ()):
        wanted |= {"WANDB_DIR": str(current.folder.absolute()), "WANDB_RUN_ID": current.tracker_id(), "WANDB_RESUME": "allow"}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
