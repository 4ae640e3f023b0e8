"""Whose a run is: what isdaa writes carries a digest made with the user's own key, and only what carries it is believed.

The key is 32 random bytes in the user's configuration folder (`$XDG_CONFIG_HOME/isdaa/key`, else `~/.config/isdaa/key`), which
nobody else may read. The digest is HMAC-SHA256 (RFC 2104) over a file's name and its JSON content.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import shlex
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isdaa.errors import UserError

SEAL = "seal"
BYTES = 32

command: Sequence[str] = ()  # the command line that is being run, for messages that complete it


def key_file() -> Path:
    """Where the user's key lies, or will lie. Raises UserError where the system knows no home folder."""
    try:
        return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "isdaa" / "key"
    except RuntimeError:
        raise UserError("no home folder to keep the key in by which isdaa knows your runs; set XDG_CONFIG_HOME") from None


def sealed(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a JSON file of that name, with the digest that makes it this user's. Makes the key where there is none.

    Raises UserError where no key can be kept, or others can read it.
    """
    return {**content, SEAL: _digest(_key() or _new_key(), name, content)}


def is_own(name: str, content: Any) -> bool:
    """Whether the content of a JSON file of that name carries this user's digest, and is as it was when it got it."""
    if not isinstance(content, Mapping) or not isinstance(content.get(SEAL), str):
        return False
    key = _key()
    return key is not None and hmac.compare_digest(_digest(key, name, content).encode(), content[SEAL].encode(errors="replace"))


def completed(default: Sequence[str], options: Mapping[str, str] = {}) -> str:
    """The command line that is being run (of a script: `default`) with further options, as one would type it."""
    return shlex.join([*(command or default), *(word for option in options.items() for word in option)])


def _digest(key: bytes, name: str, content: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps({k: v for k, v in content.items() if k != SEAL}, default=str))  # as it is read from a file
    text = json.dumps(plain, sort_keys=True)
    return hmac.new(key, f"{name}\0{text}".encode(), "sha256").hexdigest()


def _key() -> bytes | None:
    """The user's key; None where there is none. Raises UserError where it is not his alone."""
    path = key_file()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: the key by which isdaa knows your runs cannot be read ({error.strerror})") from None
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            raise UserError(f"{path}: another user's key (sudo? a container?); set XDG_CONFIG_HOME to a folder of your own")
        if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077:
            raise UserError(
                f"{path}: others can read or change this key; remove it, and take your runs over anew with --adopt; on a disk "
                "without permissions, set XDG_CONFIG_HOME to a folder elsewhere"
            )
        key = os.read(descriptor, BYTES + 1)
    finally:
        os.close(descriptor)
    if len(key) != BYTES:
        raise UserError(f"{path}: not a key of isdaa ({len(key)} bytes); remove it, and take your runs over anew with --adopt")
    return key


def _new_key() -> bytes:
    """A key, made and kept; of several processes that make one at once, all get the same."""
    path = key_file()
    aside = path.with_name(f".key-{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(secrets.token_bytes(BYTES))
                file.flush()
                os.fsync(descriptor)
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        finally:
            aside.unlink()
    except OSError as error:
        raise UserError(
            f"{path}: the key by which isdaa knows your runs cannot be kept here ({error.strerror}); "
            "set XDG_CONFIG_HOME to a folder that you alone can write"
        ) from None
    key = _key()
    assert key is not None
    return key
