"""What a run's sections must agree on: asked by the commands that train, or plan to; no section needs another to be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from isdaa.config.sections import Config
from isdaa.errors import UserError


def check_run(config: Config, where: str | Path) -> Config:
    """The configuration itself, which has all that its stages need.

    where: file or command line, for errors. Raises UserError, one line, for what is missing or contradicts itself.
    """
    for rule in (_model, _stages, _guard):
        for message in rule(config):
            raise UserError(f"{where}: {message}")
    return config


def _model(config: Config) -> Iterator[str]:
    model, reference = config.model, config.reference
    if model.path is None and model.random is None:
        yield "no model: give model.path (a folder or Hub name) or model.random (a config)"
    if model.quantization is not None and config.lora.rank == 0 and {"sft", "align"} & set(config.stages):
        yield "model.quantization: weights of 4 bits cannot be trained; set lora.rank, for example --lora.rank 16"
    if reference.revision not in (None, model.revision) and reference.path == model.path:
        yield (
            "reference.revision and model.revision differ, and one name is read at one revision; leave reference.revision out, "
            "or download that revision and give its folder as reference.path"
        )
    if config.continue_optimizer and config.continue_from is None:
        yield "continue_optimizer needs continue_from: the run, or its checkpoint, whose optimiser goes on"


def _stages(config: Config) -> Iterator[str]:
    stages, data = config.stages, config.data
    if "sft" in stages and data.sft is None:
        yield "data.sft: the sft stage needs examples: a file, a folder or a data set of the Hub"
    if "label" in stages:
        needed = {"data.prompts": data.prompts, "label.scorer": config.label.scorer}
        if missing := [key for key, value in needed.items() if value is None]:
            yield f"the label stage needs {' and '.join(missing)}"
        if config.label.scorer == "none":
            yield (
                "label.scorer: none makes no pairs; name a reward model's folder or Hub name, `reward` (this run's) or `gold`; "
                "with a scorer of your own, write the pairs yourself (docs/how_to.md, Make pairs)"
            )
    before_label = stages[: stages.index("label")] if "label" in stages else stages
    needing = [stage for stage in ("align", "reward") if stage in before_label]
    if needing and data.pairs is None:
        made = "; or put label first, which makes them" if "label" in stages else ""
        yield f"data.pairs: the {needing[0]} stage needs preference pairs: a file, a folder or a data set of the Hub{made}"


def _guard(config: Config) -> Iterator[str]:
    guard, data = config.guard, config.data
    if "align" not in config.stages:
        return
    if guard.acts and guard.steps is None:
        yield "guard.keep and guard.stop need guard.steps, for example --guard.steps 100"
    if guard.acts and config.guard_scorer is None:
        yield (
            "guard.keep and guard.stop need win rates, and there is no scorer: name one with guard.scorer or evaluation.scorer, "
            "or add the reward stage"
        )
    if guard.steps is not None and not (data.evaluation or data.eval_pairs or data.eval_fraction > 0):
        yield "guard.steps: nothing is held out to measure on; set data.evaluation, data.eval_pairs or data.eval_fraction"
