"""Transformers and the Hub: without tables and bars, and without waiting for a network that is not there."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from isdaa.foreign import no_panics

_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
_reachable: dict[str, bool] = {}  # by endpoint; asked once a process


@contextmanager
def quiet(downloads: bool = False) -> Iterator[None]:
    """No bars for reading or writing a file, and no reports in tables: what matters of those is checked by the caller.

    With `downloads` the bars stay on a terminal, since one may take minutes. Panics of libraries in Rust are RuntimeErrors.
    """
    from transformers.utils import logging as hf

    verbosity, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity_error()
    if not (downloads and sys.stderr.isatty()):
        hf.disable_progress_bar()
    try:
        with no_panics():
            yield
    finally:
        hf.set_verbosity(verbosity)
        if bars:
            hf.enable_progress_bar()


def offline(folder: Path | None) -> dict[str, bool]:
    """`local_files_only` for a local folder, and where the Hub cannot be reached: its client would try for a minute."""
    from huggingface_hub import constants

    if folder is None and not constants.HF_HUB_OFFLINE and _can_reach(constants.ENDPOINT):
        return {}
    return {"local_files_only": True}


def _can_reach(endpoint: str) -> bool:
    if endpoint not in _reachable:
        url = urlsplit(endpoint)
        address = (url.hostname or "", url.port or (80 if url.scheme == "http" else 443))
        _reachable[endpoint] = any(os.environ.get(name) for name in _PROXIES) or _answers(address)
    return _reachable[endpoint]


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=5).close()
    except OSError:
        return False
    return True
