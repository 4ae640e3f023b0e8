"""Run the tutorial's cells one after the other in an empty folder, and write what they print into it.

python examples/run_notebook.py
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).with_name("first_use.ipynb")


def run_cells(notebook: dict[str, Any], folder: str | Path) -> list[str]:
    """What each code cell prints, where the cells run in `folder` one after the other. Errors of a cell are raised."""
    space: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    with chdir(folder):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                shown = io.StringIO()
                with redirect_stdout(shown), redirect_stderr(io.StringIO()):
                    exec("".join(cell["source"]), space)
                printed.append(shown.getvalue())
    return printed


def main() -> None:
    """Write the notebook with the outputs of this run."""
    os.environ["COLUMNS"] = "100"  # as wide as a page
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        printed = run_cells(notebook, folder)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, text) in enumerate(zip(code, printed, strict=True), 1):
        cell["execution_count"] = number
        lines = text.splitlines(keepends=True)
        cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": lines}] if lines else []
    NOTEBOOK.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
