"""`isdaa configs`: the configurations that come with isdaa, also found by the path that they have in a checkout."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from isdaa.errors import UserError, nearest, shown
from isdaa.files import write_atomically

FOLDER = Path(__file__).parents[1] / "configs"


def add(parser: argparse.ArgumentParser) -> None:
    parser.usage = "isdaa configs [copy NAME [FILE]]"
    parser.add_argument(
        "what", nargs="*", metavar="copy NAME [FILE]", help="write one into a file of your own (default: list them)"
    )


def run(arguments: argparse.Namespace) -> None:
    """List them, or write one."""
    if not arguments.what:
        listed = names()
        width = max(map(len, listed))
        for name, words in listed.items():
            print(f"{name:<{width}}  {words}")
    elif arguments.what[0] == "copy" and len(arguments.what) in (2, 3):
        print(shown(f"written: {' and its base '.join(map(str, copy(*arguments.what[1:])))}"))
    else:
        raise UserError("configs: write `isdaa configs`, or `isdaa configs copy NAME [FILE]`")


def names() -> dict[str, str]:
    """`mini/demo` and the like -> the first line of each, which says what it is."""
    files = sorted(FOLDER.rglob("*.yaml"))
    return {
        file.relative_to(FOLDER).with_suffix("").as_posix(): file.read_text(encoding="utf-8")
        .partition("\n")[0]
        .removeprefix("# ")
        for file in files
    }


def found(path: str) -> str:
    """A path as it is typed; where nothing lies there and `configs/…` is meant, the file that comes with isdaa."""
    parts = Path(path).parts
    own = FOLDER.joinpath(*parts[1:]) if parts[:1] == ("configs",) else None
    return str(own) if own is not None and own.is_file() and not Path(path).exists() else path


def copy(name: str, target: str | None = None) -> list[Path]:
    """Write one of them where `target` says, else under its own name here, with the base beside it that a sweep's file names.

    Raises UserError for an unknown name and where a file lies there.
    """
    name = name.removeprefix("configs/").removesuffix(".yaml")
    if name not in names():
        raise UserError(f"configs copy {name}: no such configuration{nearest(name, names())}; `isdaa configs` lists them")
    source, file = FOLDER / f"{name}.yaml", Path(target or ".")
    if file.is_dir():
        file /= source.name
    text = source.read_text(encoding="utf-8")
    base = re.search(r"^base: (\S+)", text, re.MULTILINE)
    copies = {file: text}
    if base is not None:
        copies[file.parent / base[1]] = (source.parent / base[1]).read_text(encoding="utf-8")
    for one, words in copies.items():
        if one.exists() and (one == file or one.read_text(encoding="utf-8") != words):
            raise UserError(f"{one}: there already; name another folder: isdaa configs copy {name} FOLDER/{file.name}")
    for one, words in copies.items():
        one.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(one, words)
    return list(copies)
