"""`isdaa inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from isdaa.cli.options import add_deny, add_keys, config_of, overrides_of
from isdaa.cli.parser import whole
from isdaa.errors import UserError

COMMON = """
    config row whole device memory sharding weights no_plan processes json out stages objective.method model.path
    model.dtype model.quantization data.pairs data.limit tokenization.max_length tokenization.max_prompt_length
    align.epochs align.batch_size align.gradient_accumulation_steps align.precision align.gradient_checkpointing
    align.batch_tokens lora.rank"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.usage = "isdaa inspect [--config FILE] [--device NAME] [options] [--section.key VALUE ...]"
    parser.add_argument("--config", metavar="FILE", help="YAML file of `isdaa train` or of `isdaa sweep` (then its base run)")
    parser.add_argument(
        "--row", type=whole(0), default=0, metavar="N", help="which row is shown token by token (≥ 0; default: 0)"
    )
    parser.add_argument("--whole", action="store_true", help="show long rows in full")
    parser.add_argument(
        "--device", default="auto", metavar="NAME",
        help="that the plan is for: auto (this one), cpu, h100, h200, b200, a100, a100-40, l40s, l4, a6000, rtx5090, rtx4090, "
        "rtx3090",
    )  # fmt: skip
    parser.add_argument(
        "--memory", metavar="SIZE", help="which settings fit into it, best first: an amount (8GB) or a GPU (rtx4090)"
    )
    parser.add_argument("--sharding", choices=["ddp", "fsdp2", "zero2", "zero3"], default="ddp", help="with several processes")
    parser.add_argument(
        "--weights", action="store_true", help="load the models, and measure the pairs' importance weights before the first step"
    )
    parser.add_argument("--no_plan", action="store_true", help="leave out memory and time")
    parser.add_argument(
        "--processes", type=whole(), default=1, metavar="N", help="processes of the run, one a device (≥ 1; default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--out", metavar="FILE", help="write the JSON to a file, beside what is printed")
    add_deny(parser)
    add_keys(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print, or write, what the run reads and needs."""
    if arguments.sharding != "ddp" and arguments.processes == 1:
        raise UserError(f"--sharding {arguments.sharding}: nothing to divide among one process; say how many by --processes")
    config = _config_of(arguments.config, overrides_of(arguments))
    from isdaa.files import write_json
    from isdaa.preview.fits import memory_of
    from isdaa.preview.inspect import inspect
    from isdaa.preview.inspect_page import print_inspection

    memory, device = None, arguments.device
    if arguments.memory is not None:
        memory, named = memory_of(arguments.memory)
        if arguments.no_plan:
            raise UserError("--memory: needs the plan; leave --no_plan out")
        device = named if named is not None and device == "auto" else device
    given = {name: getattr(arguments, name) for name in ("processes", "sharding", "row", "weights")}
    found = inspect(config, device=device, memory=memory, plans=not arguments.no_plan, **given)
    if arguments.out is not None:
        write_json(arguments.out, found.facts())
    if arguments.json:
        import json

        print(json.dumps(found.facts(), indent=2, default=str).replace("\x7f", "\\u007f"))  # ASCII alone
    else:
        print_inspection(found, whole=arguments.whole)
    if found.missing:
        raise UserError(found.missing[0])


def _config_of(path: str | None, overrides: dict[str, Any]) -> Any:
    """The configuration of a run; of a sweep's file, that of its base run."""
    from isdaa.config.settings_text import read_settings
    from isdaa.files import located

    try:
        content = read_settings(path, lambda _: str) if path is not None else None
    except (OSError, UserError):
        content = None  # load_config says what is wrong
    if path is not None and isinstance(content, dict) and "grids" in content and isinstance(content.get("base"), str):
        path = str(Path(path).parent / located(content["base"]))
    return config_of(path, overrides)
