"""A YAML file with options over it, merged as plain data and validated once, so that both get the same one-line errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from isdaa.config.keys import as_written, kind_of
from isdaa.config.messages import refusal
from isdaa.config.rules import check_run
from isdaa.config.sections import Config
from isdaa.config.settings_text import read_settings
from isdaa.config.taken_away import of_this_version
from isdaa.errors import UserError
from isdaa.files import located
from isdaa.objectives.presets import PRESETS, resolve

COMMAND_LINE = "command line"


def load_config(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a run: a YAML file with dotted overrides over it.

    Raises UserError, one line that names the file, the key, the nearest known key, or what was expected.
    """
    return validate(layers(path, overrides), COMMAND_LINE if path is None else located(path), overrides or {})


def validate(data: Mapping[str, Any], where: str, overrides: Mapping[str, Any] = {}) -> Config:
    """Plain data as the configuration of a run, which has all that its stages need. Raises UserError as `load_config`."""
    return check_run(parsed(data, where, overrides), where)


def parsed(data: Mapping[str, Any], where: str = COMMAND_LINE, overrides: Mapping[str, Any] = {}) -> Config:
    """The sections of plain data, each by itself: for commands that need a few of them. Raises UserError as `load_config`."""
    try:
        return Config.model_validate(of_this_version(data, where, overrides))
    except ValidationError as error:
        raise refusal(error, where, overrides) from None


def settings_file(path: str | Path, kind: Callable[[Sequence[str]], Any], what: str) -> Any:
    """What a YAML file holds, texts read by the kinds of their keys. Raises UserError where there is no such file (`what`)."""
    try:
        return read_settings(path, kind)
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}") from None
    except IsADirectoryError as error:
        raise UserError(f"{path}: not a YAML file ({error})") from None


def layers(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A YAML file with dotted overrides over it, as plain data that nobody has validated. Raises UserError as `load_config`."""
    data: dict[str, Any] = {}
    if path is not None:
        path = located(path)
        loaded = settings_file(path, kind_of, "config file")
        if loaded is not None and not isinstance(loaded, dict):
            raise UserError(f"{path}: expected `key: value` lines, found {type(loaded).__name__}")
        if loaded and "grids" in loaded:
            raise UserError(f"{path}: describes a sweep; run it with `isdaa sweep --config {path}`")
        data = loaded or {}
    return laid_over(data, overrides or {})


def laid_over(data: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data, which is changed, with dotted overrides over it, and without what would undo them.

    A run's own file spells everything out: what another method or pairing had by itself goes with it, and `max_steps` where
    `epochs` are given.
    """
    before: Any = data.get("objective")
    method = before.get("method") if isinstance(before, dict) else None
    if isinstance(method, str) and method in PRESETS and overrides.get("objective.method") not in (None, method):
        own = resolve(method)
        data["objective"] = {key: value for key, value in before.items() if key not in own or value not in (own[key], "preset")}
    label = data.get("label")
    if isinstance(label, dict) and "pairing" in label and overrides.get("label.pairing") not in (None, label["pairing"]):
        label.pop("label", None)
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        if name == "epochs" and value is not None and isinstance(data.get(section), dict):
            data[section].pop("max_steps", None)
    for key, value in overrides.items():
        lay_over(data, key, value)
    return data


def lay_over(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted key of plain data; sections that are not there are made."""
    *sections, last = dotted.split(".")
    for name in sections:
        if not isinstance(data.get(name), dict):
            data[name] = {}
        data = data[name]
    data[last] = value


def resolved(config: Config) -> dict[str, Any]:
    """The configuration with every preset value spelled out, as plain data for a file."""
    data = config.model_dump(mode="json")
    data["objective"] = {"method": config.objective.method, **config.objective.arguments()}
    if config.objective.allow_stall:
        data["objective"]["allow_stall"] = True
    return data


def departures(objective: Mapping[str, Any]) -> list[str]:
    """What of a resolved objective is not as its method has it, in words. β is no method's own."""
    own = resolve(objective["method"]) if objective["method"] in PRESETS else {}
    return [
        f"{key} {as_written(objective[key])} ({as_written(value)})"
        for key, value in own.items()
        if key != "beta" and key in objective and objective[key] != value
    ]


def methods_table() -> list[tuple[str, str, str]]:
    """`(name, formula, source)` of every preset."""
    return [(name, preset.formula, preset.source) for name, preset in PRESETS.items()]
