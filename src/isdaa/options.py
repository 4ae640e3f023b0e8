"""The command line's options: one for every key of the configuration, with errors of one line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml

from isdaa.config import fields
from isdaa.errors import UserError, nearest


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line with the nearest option, as `UserError`; dashes and underscores are the same."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # half a key is a mistyped key
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file, flush=True)  # argparse's own swallows a closed pipe and a full disk

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        known, unknown = self.parse_known_args([_underscored(a) for a in args or []], namespace)
        if unknown:
            options = [o for parser in self._with_subparsers(known) for o in parser._option_string_actions]
            raise UserError(f"unknown option {unknown[0]}{nearest(unknown[0].split('=')[0], options)}")
        return known

    def _with_subparsers(self, namespace: argparse.Namespace) -> list[argparse.ArgumentParser]:
        found: list[argparse.ArgumentParser] = [self]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [parser for name, parser in action.choices.items() if name == getattr(namespace, action.dest, None)]
        return found


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def add_options(parser: argparse.ArgumentParser, only: Sequence[str] = ()) -> None:
    """One `--section.key` option for every key of the configuration, or of the sections in `only`."""
    groups: dict[str, Any] = {}
    for dotted, field, default in fields():
        section = dotted.rpartition(".")[0]
        if only and section not in only:
            continue
        if section not in groups:
            groups[section] = parser.add_argument_group(section or "run")
        is_list = "list" in str(field.annotation) and "dict" not in str(field.annotation)
        text = f"{field.description or ''} (default: {'null' if default is None else default})".strip().replace("%", "%%")
        groups[section].add_argument(
            f"--{dotted}", nargs="*" if is_list else None, default=argparse.SUPPRESS, help=text, metavar="VALUE"
        )


def overrides_of(namespace: argparse.Namespace) -> dict[str, Any]:
    """The configuration options of a parsed command line, values read as YAML."""
    names = {dotted for dotted, _, _ in fields()}
    found: dict[str, Any] = {}
    for name, value in vars(namespace).items():
        if name not in names:
            continue
        if isinstance(value, list):
            items = [_scalar(item) for item in value]
            found[name] = items[0] if len(items) == 1 and isinstance(items[0], list) else items
        else:
            found[name] = _scalar(value)
    return found


def _scalar(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
