"""The command line's options: one for every key of the configuration, with errors of one line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from isdaa.config import TAKEN_AWAY, allowed, as_written, fields, preset_value
from isdaa.errors import UserError
from isdaa.files import at_home
from isdaa.settings_text import item_kind, listed_value, option_value
from isdaa.synonyms import hint


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line with the nearest option, as `UserError`; dashes and underscores are the same.

    An option that is given twice is an error, unless it says the same. `~` in front of any text of no other type is the home.
    `instead`: of options that a user may look for here, what to do instead.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # half a key is a mistyped key
        super().__init__(*args, **kwargs)
        self.register("type", None, at_home)
        for name in (None, "store"):
            self.register("action", name, _Once)
        self.given: dict[str, Any] = {}
        self.instead: Mapping[str, str] = {}

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        self.given = {}
        return super().parse_known_args(args, namespace)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)  # type: ignore[misc]
        except argparse.ArgumentError as error:
            cause = error.__context__
            if action.type is None and isinstance(cause, ValueError):  # from `at_home`, which says what is wrong
                raise UserError(f"{'/'.join(action.option_strings) or action.dest}: {cause}") from None
            raise

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file, flush=True)  # argparse's own swallows a closed pipe and a full disk

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        given = list(args or [])
        end = given.index("--") if "--" in given else len(given)
        known, unknown = self.parse_known_args([*map(underscored, given[:end]), *given[end:]], namespace)
        if unknown:
            self._refuse(unknown[0], known)
        return known

    def _refuse(self, word: str, namespace: argparse.Namespace) -> NoReturn:
        found: list[Any] = [self]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [parser for name, parser in action.choices.items() if name == getattr(namespace, action.dest, None)]
        option, instead = word.split("=")[0], found[-1].instead
        if option in instead:
            raise UserError(f"{option}: has no effect with `{found[-1].prog}`; {instead[option]}")
        if not word.startswith("-"):
            raise UserError(f"{word!r} belongs to no option; see `{found[-1].prog} --help`")
        known = [o.removeprefix("--") for parser in found for o in parser._option_string_actions]
        raise UserError(f"unknown option {word}{hint(option, known, '--') if option.startswith('--') else ''}")


def point_to_each_other(*parsers: OneLineParser) -> None:
    """Let each say, of an option that it lacks, which of the others have it."""
    for parser in parsers:
        found: dict[str, list[str]] = {}
        for other in parsers:
            for option in other._option_string_actions.keys() - parser._option_string_actions.keys():
                found.setdefault(option, []).append(f"`{other.prog}`")
        parser.instead = {option: f"it belongs to {' and '.join(names)}" for option, names in found.items()} | dict(
            parser.instead
        )


class _Once(argparse._StoreAction):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if option_string is not None and parser.given.setdefault(option_string, values) != values:
            raise UserError(f"{option_string} is given twice, {parser.given[option_string]!r} and {values!r}; give it once")
        super().__call__(parser, namespace, values, option_string)


def underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def add_options(parser: argparse.ArgumentParser, only: Sequence[str] = ()) -> None:
    """One `--section.key` option for every key of the configuration, or of the sections and keys in `only`."""
    groups: dict[str, Any] = {}
    for dotted, field, default in fields():
        section = dotted.rpartition(".")[0]
        if only and section not in only and dotted not in only:
            continue
        if section not in groups:
            groups[section] = parser.add_argument_group(section or "run")
        preset = preset_value(dotted)
        value = as_written(default) + (f", which is {preset}" if preset else "")
        facts = "; ".join(filter(None, (allowed(field), f"default: {value}")))
        text = f"{field.description or ''} ({facts})".strip().replace("%", "%%")
        switch = not section and field.annotation is bool
        groups[section].add_argument(
            f"--{dotted}",
            type=str,  # as it is: what its key is for decides
            nargs="*" if item_kind(field.annotation) is not None else "?" if switch else None,
            **({"const": "true"} if switch else {}),
            default=argparse.SUPPRESS,
            help=text,
            metavar="VALUE",
        )

    for dotted in TAKEN_AWAY if not only else ():
        parser.add_argument(f"--{dotted}", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def overrides_of(namespace: argparse.Namespace) -> dict[str, Any]:
    """The configuration options of a parsed command line: text as it is, all else read as YAML."""
    given, found = vars(namespace), {}
    for name, field, _ in fields():
        value, kind, option = given.get(name), field.annotation, f"--{name}"
        if isinstance(value, list):
            listed = len(value) == 1 and value[0].startswith("[") and value[0].endswith("]")
            found[name] = (
                listed_value(value[0], kind, option) if listed else [option_value(v, item_kind(kind), option) for v in value]
            )
        elif value is not None:
            found[name] = option_value(value, kind, option)
    for name, (default, _) in TAKEN_AWAY.items():
        if name in given:
            found[name] = option_value(given[name], type(default), f"--{name}")
    return found
