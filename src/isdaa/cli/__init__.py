"""The `isdaa` command: `main` in `main.py`, one file a command beside it."""

from isdaa.cli.main import main

__all__ = ["main"]
