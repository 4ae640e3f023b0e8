"""What is done to a valid input: to its bytes, to one of its values, to the file itself. All is drawn from a seeded `Random`."""

from __future__ import annotations

import copy
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

DIGITS = "9" * 5000  # Python refuses to convert more than 4300
DEEP = 4000

# Text that stands for a value as it is: what no Python object could be written as, too.
RAW_JSON = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "1e300",
    "-1e300",
    DIGITS,
    "[" * DEEP + "]" * DEEP,
    '{"a":' * DEEP + "1" + "}" * DEEP,
    '"\\ud800"',
    '"a\\udfffb"',
    '"\\u0000"',
    '"a\\u0000b"',
    '"\\u001b[2Jx"',
    "-1",
    "0",
    "9223372036854775808",
    "1e999",
    "tru",
    "",
    '{"a": 1, "a": 2}',
    '{"": null}',
    "1" + "0" * 400,
)
RAW_YAML = (
    "!!float abc",
    "!!int abc",
    "!!bool abc",
    "!!null abc",
    "!!timestamp abc",
    "!!binary '###'",
    "!!python/object/apply:os.getcwd []",
    "2026-02-30",
    "2026-13-45",
    "2026-11-29",
    "2026-01-01 99:99:99",
    ".nan",
    ".inf",
    "-.inf",
    "1e300",
    "190:20:30",
    "0x",
    "0b2",
    DIGITS,
    "[" * DEEP + "]" * DEEP,
    "{a: " * DEEP + "1" + "}" * DEEP,
    "&a [*a]",
    "&a {b: *a}",
    "*nothing",
    "<<",
    "{<<: 3}",
    "{[a]: b}",
    "{{a: b}: c}",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!pairs [a: 1]",
    '"\\ud800"',
    '"\\0"',
    '"a\\0b"',
    '"\\x1b[2J"',
    "|",
    ">",
    "'",
    '"',
    "\t",
    "@",
    "`",
    "%",
    "- a",
    "? a",
    "~",
    "no",
    "0123456",
    "12e4567",
    "=",
)
TEXTS = (
    "",
    " ",
    "\n",
    "\0",
    "a\0b",
    "\ud800",
    "a\udc80",
    "~",
    ".",
    "..",
    "/",
    "/dev/null",
    "/dev/zero",
    "/proc/self/mem",
    "-1",
    "0",
    "1e300",
    "nan",
    "NaN",
    "inf",
    "x" * 300,
    "x" * 70_000,
    "a/" * 2500,
    "../" * 50,
    "=1+1",
    "\x1b[31m",
    "\u202e",
    "{",
    "[",
    "null",
    "true",
    "1",
    DIGITS,
    "!!float abc",
    "!!bool abc",
    "2026-02-30",
    "2026-11-29",
    "[" * DEEP,
    "&a [*a]",
    "{a: 1}",
    "[1, 2]",
    "12:30:45",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ raise",
    "gold",
    "none",
    "world:small",
    "world:small:" + DIGITS,
    "world:small:-1",
    "owner/name",
    "%s",
    "{0.__class__}",
    "\\",
    "run #2",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    0.5,
    1e300,
    1e-300,
    -0.0,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**30,
    [],
    {},
    [None],
    [[]],
    {"a": 1},
    [1, "a"],
    ["a"],
    "NaN",
)


def any_value(random: Random) -> Any:
    """A value that fits nowhere in particular."""
    return random.choice(TEXTS) if random.random() < 0.5 else copy.deepcopy(random.choice(VALUES))


def paths_of(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value inside a JSON value stands."""
    found = [before] if before else []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        found += paths_of(item, (*before, key))
    return found


def mutate_value(value: Any, random: Random, raw: tuple[str, ...]) -> tuple[Any, str, dict[str, str]]:
    """(a changed copy, what was changed, text that is to replace a mark in what the copy is written as)."""
    value, marks = copy.deepcopy(value), {}
    paths = paths_of(value)
    if not paths:
        return any_value(random), "another value", marks
    *before, last = random.choice(paths)
    place = value
    for key in before:
        place = place[key]
    how = random.choice(("value", "value", "value", "raw", "raw", "raw", "raw", "remove", "twice", "wrap", "rename", "twist"))
    if how == "value":
        place[last] = any_value(random)
    elif how == "raw":
        mark = "@@raw@@"
        marks[mark] = random.choice(raw)
        place[last] = mark
    elif how == "remove":
        del place[last]
    elif how == "twice":
        if isinstance(place, list):
            place.insert(last, copy.deepcopy(place[last]))
        else:
            place[f"{last}_"] = place[last]
    elif how == "wrap":
        place[last] = random.choice(([place[last]], {"a": place[last]}, str(place[last])))
    elif how == "rename" and isinstance(place, dict):
        place[random.choice(("", "a", "\0", "\ud800", str(last).upper(), str(last) + "x", "\x1b[2J"))] = place.pop(last)
    elif isinstance(place[last], int | float) and not isinstance(place[last], bool):
        place[last] = random.choice(
            (-place[last], place[last] + 1, place[last] * 3, place[last] * 10**9, place[last] + 0.5, str(place[last]))
        )
    else:
        place[last] = any_value(random)
    now = marks.get("@@raw@@", repr(place[last]) if isinstance(place, dict) and last in place else how)
    return value, f"{'.'.join(map(str, [*before, last]))}: {how} {now[:60]!r}", marks


def mutate_json(text: str, random: Random) -> tuple[bytes, str]:
    """A JSON text with one value changed."""
    value, what, marks = mutate_value(json.loads(text), random, RAW_JSON)
    changed = json.dumps(value, ensure_ascii=random.random() < 0.5, default=str)
    for mark, raw in marks.items():
        changed = changed.replace(json.dumps(mark), raw)
    return changed.encode("utf-8", "surrogatepass"), what


def mutate_jsonl(text: str, random: Random) -> tuple[bytes, str]:
    """JSON Lines with one value of one line changed."""
    lines = [line for line in text.splitlines() if line.strip()]
    number = random.randrange(len(lines))
    changed, what = mutate_json(lines[number], random)
    content = [line.encode() for line in lines]
    content[number] = changed
    return b"\n".join(content) + b"\n", f"line {number + 1}, {what}"


def mutate_bytes(data: bytes, random: Random) -> tuple[bytes, str]:
    """Flips, cuts, repetitions and foreign bytes."""
    how = random.choice(
        ("flip", "flip", "cut", "cut_start", "repeat", "insert", "empty", "head", "zeros", "swap", "bom", "digits", "deep")
    )
    at = random.randrange(len(data) + 1)
    if how == "flip" and data:
        changed = bytearray(data)
        for _ in range(random.choice((1, 1, 3, 20))):
            changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
        return bytes(changed), "bits flipped"
    if how in ("cut", "cut_start"):
        return (data[:at], f"cut at {at}") if how == "cut" else (data[at:], f"without its first {at} bytes")
    if how == "repeat":
        end = min(len(data), at + random.randrange(1, 200))
        return data[:end] + data[at:end] * random.choice((1, 2, 50)) + data[end:], f"bytes {at} to {end} repeated"
    if how == "insert":
        foreign = random.choice(
            (b"\xff", b"\x00", b"\xed\xa0\x80", b"\xc3", b"\n", b"\r", b'"', b"}", b"[", b",", b"\x1b[2J", b"\xef\xbb\xbf")
        )
        return data[:at] + foreign + data[at:], f"{foreign!r} at {at}"
    if how == "head":
        return bytes(random.randrange(256) for _ in range(16)) + data[16:], "another head"
    if how == "zeros":
        return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :], f"zeros at {at}"
    if how == "swap":
        return data[at:] + data[:at], f"turned at {at}"
    if how == "bom":
        return random.choice((b"\xff\xfe", b"\xfe\xff", b"\xff\xfe\0\0", b"\xef\xbb\xbf")) + data, "a byte order mark"
    if how in ("digits", "deep"):
        foreign = (DIGITS if how == "digits" else "[" * DEEP).encode()
        return data[:at] + foreign + data[at:], f"{how} at {at}"
    return b"", "empty"


def mutate_safetensors(data: bytes, random: Random) -> tuple[bytes, str]:
    """Its header's values, its length, or its numbers (NaN, infinity, huge)."""
    size = int.from_bytes(data[:8], "little")
    how = random.choice(("header", "header", "length", "numbers", "bytes"))
    if how == "header":
        header, what = mutate_json(data[8 : 8 + size].decode(), random)
        return len(header).to_bytes(8, "little") + header + data[8 + size :], f"header {what}"
    if how == "length":
        return random.choice((0, 1, size + 1, 2**63, 2**64 - 1, 10**8)).to_bytes(8, "little") + data[8:], "header length"
    if how == "numbers" and len(data) > 8 + size + 4:
        at = 8 + size + 4 * random.randrange((len(data) - 8 - size) // 4)
        word = random.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f"))
        return data[:at] + word + data[at + 4 :], f"number at {at}: {word.hex()}"
    return mutate_bytes(data, random)


def replace_file(path: Path, random: Random) -> str:
    """Something else where the file was: a folder, a pipe, a socket, a link that leads nowhere or to itself, nothing."""
    how = random.choice(("folder", "pipe", "socket", "loop", "dangling", "absent", "device", "unreadable", "null"))
    if how == "unreadable":
        path.chmod(0)
        return "unreadable"
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's address has about a hundred characters
        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        finally:
            os.chdir(here)
    elif how in ("loop", "dangling", "device", "null"):
        path.symlink_to({"loop": path.name, "dangling": "nowhere", "device": "/dev/zero", "null": "/dev/null"}[how])
    return how


BY_SUFFIX: dict[str, Callable[[str, Random], tuple[bytes, str]]] = {".json": mutate_json, ".jsonl": mutate_jsonl}


def mutate_file(path: Path, random: Random) -> str:
    """Change a file in one of the ways that suit it; says what was done."""
    chance = random.random()
    if chance < 0.08:
        return f"{path.name}: {replace_file(path, random)}"
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        changed, what = mutate_safetensors(data, random)
    elif path.suffix in BY_SUFFIX and chance < 0.75:
        changed, what = BY_SUFFIX[path.suffix](data.decode(), random)
    else:
        changed, what = mutate_bytes(data, random)
    path.write_bytes(changed)
    return f"{path.name}: {what}"
