"""The model card: what was trained, how, on what, and what the metrics do not mean."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from isdaa.config import departures
from isdaa.errors import UserError, shown
from isdaa.evaluation.reward_reading import worth_in_words
from isdaa.objectives.objective import Objective
from isdaa.record import ModelRecord, git_revision, read_record, versions

PARTS = {"model": "", "best": "best", "sft": "SFT", "reward": "reward model"}  # folders in a run's, and what of it they are
TITLES = {"sft": "Supervised fine-tuning", "reward": "Reward model", "policy": "Preference alignment"}


def model_card(record: ModelRecord, folder: str | Path, adapter: bool = False) -> str:
    """Markdown with the front matter that the Hub reads, for a model in `folder`. adapter: the card is of an adapter alone."""
    config = record.config
    front = {"library_name": "peft" if adapter else "transformers", "tags": ["isdaa", record.kind]}
    if record.base is not None:  # the Hub knows names alone
        front |= {"base_model": record.base, "base_model_relation": "adapter" if adapter else "finetune"}
    if record.kind == "reward":
        front["pipeline_tag"] = "text-classification"
    else:
        front["pipeline_tag"] = "text-generation"
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {_plain(title(Path(folder)))}", ""]
    step = f", optimiser step {record.step}" if record.step is not None else ""
    lines += [f"{TITLES[record.kind]} with isdaa{step}.", "", f"- base model: {_base(record)}", ""]
    if record.kind == "policy":
        arguments = {key: value for key, value in config["objective"].items() if key not in ("method", "allow_stall")}
        others = departures(config["objective"])
        lines += [
            f"## Method: {_code(config['objective']['method'])}{', changed' if others else ''}",
            "",
            "```text",
            Objective(**arguments).formula(),
            "```",
            "",
        ]
        lines += [f"- not as the method has it (in brackets): {_plain(', '.join(others))}"] if others else []
        lines += [f"- reference π_ref: {_code(_local(record.reference))}"]
        lines += [] if record.continued is None else [f"- goes on from: {_gone_on_from(record.continued)}"]
        lines += [f"- behaviour μ: {_author(record)}", ""]
    if record.kind == "reward":
        lines += ["## Scores", "", f"- {_position(record)}"]
        if record.held_out is not None:
            lines.append(f"- {worth_in_words(record.held_out)}, which it did not train on (95 % interval)")
        lines.append("")
    lines += ["## Data", ""]
    lines += [f"- {key}: {_code(_local(value))}" for key, value in config["data"].items() if value is not None]
    section = {"sft": "sft", "reward": "reward", "policy": "align"}[record.kind]
    settings = {"seed": config["seed"], "tokenization": config["tokenization"], section: config[section]}
    if config["lora"]["rank"] and record.kind != "reward":
        settings["lora"] = config["lora"]
    text = yaml.safe_dump(settings, sort_keys=False).strip()
    fence = _longer_than_any(text, 3)  # or a value would end the block
    lines += ["", "## Settings", "", f"{fence}yaml", text, fence, ""]
    if record.metrics:
        at = f", logged at step {record.step}" if record.step is not None else ""
        lines += [f"## Training metrics{at}", "", "| metric | value |", "|---|---|"]
        lines += [f"| {_plain(key)} | {value:.4g} |" for key, value in sorted(record.metrics.items())]
        lines.append("")
    if record.kind == "policy":
        lines += [
            "Accuracy, margins and loss on pairs do not tell whether the model over-optimises: "
            "they go on improving while it gets worse. `isdaa evaluate --model_path .` measures KL and win rate.",
            "",
        ]
    lines += ["## Versions", "", "```json", json.dumps({**versions(), "git": git_revision()}, indent=1), "```", ""]
    return "\n".join(lines)


def title(folder: Path) -> str:
    """The run's name, and what of it the folder is where it is not the final policy: `mini, best`, `mini, checkpoint-120`.

    A sweep's run is called by its cell and its seed, `dpo-beta0.01 seed-1`.
    """
    folder = folder.absolute()
    if folder.parent.name == "checkpoints":
        return f"{_run(folder.parent.parent)}, {folder.name}"
    if folder.name in PARTS and folder.parent.name:
        part = PARTS[folder.name]
        return f"{_run(folder.parent)}, {part}" if part else _run(folder.parent)
    return _run(folder)


def _run(folder: Path) -> str:
    return f"{folder.parent.name} {folder.name}".strip() if re.fullmatch(r"seed-\d+", folder.name) else folder.name


def _author(record: ModelRecord) -> str:
    """What μ was."""
    if record.config["objective"]["weight"] in ("none", "wpo"):
        return "not used: no weight is made of it"
    model = record.config["behaviour"]["model_path"]
    rest = "`π_ref`, which is assumed" if model is None else _code(_local(model))
    own, total = record.own_logps or (0, 0)
    if not own:
        return rest if record.own_logps is not None or model is not None else "the rows’ own logps, else `π_ref`"
    return "the rows’ own logps" + ("" if own == total else f" in {own:,} of {total:,} pairs; in the others {rest}")


def _gone_on_from(before: dict[str, Any]) -> str:
    place = Path(before["from"]).name if before["run"] is None else f"{before['run']}/{Path(before['from']).name}"
    at = "" if before["step"] is None else f", optimiser step {before['step']}"
    total = (
        f" ({before['steps_before']} with those of the runs before it)" if before["steps_before"] != (before["step"] or 0) else ""
    )
    state = "with" if before["optimizer"] else "without"
    return f"{_code(place)}{at}{total}, {state} the optimiser's state; digest of the weights {_code(before['weights'][:16])}"


def _position(record: ModelRecord) -> str:
    if record.position is None:
        return "read at the last token of the response: the end of the turn, or EOS"
    return (
        "read at the end of the chat template's output, and at EOS (before it, where EOS also pads) of a plain text that ended: "
        "`AutoModelForSequenceClassification` on what `apply_chat_template` gives, rows padded together, gives the same score"
    )


def _first(record: ModelRecord) -> ModelRecord:
    """The record of the first run that this one goes on from; as far back as they are there."""
    seen: set[str] = set()
    while record.continued is not None and record.continued["from"] not in seen:
        seen.add(record.continued["from"])
        try:
            record = read_record(record.continued["from"]) or record
        except UserError:
            break
    return record


def _base(record: ModelRecord) -> str:
    """The model that the weights come from in the end, and the one that this run, or the first that it goes on from, began with,
    where that is another."""
    record = _first(record)
    model = record.config["model"]
    start = (record.config["reward"].get("path") if record.kind == "reward" else None) or model["path"]
    if start is None:
        return f"none: new random weights of {_code(model.get('random'))}"
    found = _code(_local(record.base or start))
    revision = model.get("revision") if start == model["path"] else None
    found += f", revision {_code(revision)}" if revision is not None else ""
    return found if record.base in (None, start) else f"{found} (this run began with {_code(_local(start))})"


def _plain(name: object) -> str:
    """A name as Markdown that shows it and does nothing else."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", shown(name))


def _code(value: object) -> str:
    """A value as code, whatever backticks it has."""
    text = shown(value)
    fence = _longer_than_any(text, 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _longer_than_any(text: str, least: int) -> str:
    """Backticks, at least so many, and one more than stand beside each other in the text."""
    return "`" * max(least, *(len(run) + 1 for run in re.findall("`+", text)), 0)


def _local(value: Any) -> Any:
    """A card travels with its model: of a path that holds on one machine alone, the last part is enough."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
