"""argparse with errors of one line, and with help in two lengths."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, NoReturn

from isdaa.config.keys import fields
from isdaa.config.synonyms import hint
from isdaa.errors import UserError
from isdaa.files import at_home

NUMBERS = {"N": "a whole number", "X": "a number"}  # what stands for a value behind an option


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line with the nearest option, as `UserError`; dashes and underscores are the same.

    An option that is given twice is an error, unless it says the same. `~` in front of any text of no other type is the home.
    common: options that `--help` shows, where it leaves the others to `--help-all`. instead: of options that a user may look
    for here, what to do instead. kin: parsers of commands whose options are often mistaken for this one's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # half a key is a mistyped key
        kwargs.setdefault("formatter_class", partial(argparse.HelpFormatter, max_help_position=31))
        super().__init__(*args, **kwargs)
        self.register("type", None, at_home)
        for name in (None, "store"):
            self.register("action", name, _Once)
        self.given: dict[str, Any] = {}
        self.common: Collection[str] = ()
        self.instead: Mapping[str, str] = {}
        self.kin: Callable[[], Iterable[OneLineParser]] = tuple

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.given = {}
        return super().parse_known_args(args, namespace)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            cause = error.__context__
            if action.type is None and isinstance(cause, ValueError):  # from `at_home`, which says what is wrong
                raise UserError(f"{'/'.join(action.option_strings) or action.dest}: {cause}") from None
            raise

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file, flush=True)  # argparse's own swallows a closed pipe and a full disk

    def format_help(self, every: bool = False) -> str:
        """The help: of every option, or of the `common` ones where there is such a list."""
        rare = [action for action in self._actions if self.common and not every and not self._is_common(action)]
        texts = [action.help for action in rare]
        for action in rare:
            action.help = argparse.SUPPRESS
        try:
            shown = super().format_help()
        finally:
            for action, text in zip(rare, texts, strict=True):
                action.help = text
        metavars = {action.metavar for action in self._actions if action not in rare}
        notes = [f"{name}: {what}" for name, what in NUMBERS.items() if name in metavars]
        left = sum(text != argparse.SUPPRESS for text in texts)
        notes += [f"{left} more options: `{self.prog} --help-all`"] if left else []
        return shown + (f"\n{'; '.join(notes)}\n" if notes else "")

    def _is_common(self, action: argparse.Action) -> bool:
        named = any(option.removeprefix("--") in self.common for option in action.option_strings)
        return named or not action.option_strings or isinstance(action, argparse._HelpAction)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = list(args or [])
        end = given.index("--") if "--" in given else len(given)
        known, unknown = self.parse_known_args([*map(underscored, given[:end]), *given[end:]], namespace)
        if unknown:
            self._refuse(unknown[0])
        return known

    def _refuse(self, word: str) -> NoReturn:
        option, options = word.split("=")[0], self._option_string_actions
        if option in self.instead:
            raise UserError(f"{option}: has no effect with `{self.prog}`; {self.instead[option]}")
        if not word.startswith("-"):
            raise UserError(f"{word!r} belongs to no option; see `{self.prog} --help`")
        owners = [f"`{other.prog}`" for other in self.kin() if option in other._option_string_actions]
        if owners:
            raise UserError(f"{option}: has no effect with `{self.prog}`; it belongs to {' and '.join(owners)}")
        if option.removeprefix("--") in {dotted for dotted, _, _ in fields()}:
            raise UserError(f"{option}: has no effect with `{self.prog}`; it is a key of what `isdaa train` runs")
        known = [name.removeprefix("--") for name in options]
        raise UserError(f"unknown option {word}{hint(option, known, '--') if option.startswith('--') else ''}")


class HelpAll(argparse._HelpAction):
    """`--help-all`."""

    def __call__(self, parser: Any, *_: Any) -> None:
        print(parser.format_help(every=True), end="", flush=True)
        parser.exit()


class _Once(argparse._StoreAction):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        name = option_string or self.dest  # of a positional argument, which stands beside others
        if repr(parser.given.setdefault(name, values)) != repr(values):  # NaN is not equal to itself
            raise UserError(f"{name} is given twice, {parser.given[name]!r} and {values!r}; give it once")
        super().__call__(parser, namespace, values, option_string)


def underscored(argument: str) -> str:
    """An option's name with underscores; what is no option stays."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def whole(least: int = 1) -> Callable[[str], int]:
    """The type of an option that takes a whole number from `least` on."""

    def number(text: str) -> int:
        if not text.strip().removeprefix("-").isdecimal() or len(text) > 18 or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number ≥ {least}, got {text!r}")
        return int(text)

    return number
