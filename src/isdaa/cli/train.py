"""`isdaa train`."""

from __future__ import annotations

import argparse
from pathlib import Path

from isdaa.cli.options import add_deny, add_keys, add_shared, adopted, config_of, overrides_of

COMMON = """
    config output_dir continue_from stages objective.method objective.beta model.path model.dtype reference.path
    behaviour.model_path data.pairs data.sft data.prompts tokenization.max_length
    tokenization.max_prompt_length label.scorer align.epochs align.batch_size
    align.gradient_accumulation_steps align.learning_rate align.warmup_steps align.precision align.save_steps
    lora.rank lora.alpha guard.steps guard.scorer guard.keep guard.stop evaluation.scorer"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "isdaa train [--config FILE] [--section.key VALUE ...]\n"
        "       isdaa train --continue_from RUN[/checkpoint-N] --output_dir NEW [--section.key VALUE ...]"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; every key can be overridden by an option")
    add_shared(parser, "adopt")
    add_deny(parser)
    add_keys(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run the stages."""
    settings = overrides_of(arguments)
    if arguments.adopt and settings.get("continue_from") is not None:
        from isdaa.training.stages.continued import place_of

        adopted([str(place_of(settings["continue_from"]))])
    config = config_of(arguments.config, settings)
    if arguments.adopt and (config.continue_from is None or Path(config.output_dir).exists()):
        adopted([config.output_dir])
    from isdaa.training.run_stages import run as run_stages

    run_stages(config)
