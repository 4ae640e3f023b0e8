"""The tutorial runs cell by cell."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from chains import ROOT

NOTEBOOK = json.loads((ROOT / "examples" / "first_use.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
STORED = ["".join("".join(output["text"]) for output in cell["outputs"]) for cell in CODE]
# The same commands on fewer rows and prompts.
FEWER = {
    "--data.limit 1000": "--data.limit 200",
    "--sft.epochs 4": "--sft.epochs 1",
    "--align.save_steps 16": "--align.save_steps 4",
    "--evaluation.prompts 128": "--evaluation.prompts 16",
}


def with_less() -> dict[str, Any]:
    """The notebook with `FEWER`, each of which it has once."""
    text = json.dumps(NOTEBOOK["cells"])
    for now, less in FEWER.items():
        assert text.count(now) == 1, now
        text = text.replace(now, less)
    return {**NOTEBOOK, "cells": json.loads(text)}


@pytest.mark.parametrize("size", ["with less", pytest.param("as it stands", marks=pytest.mark.slow)])
def test_cells_run_one_after_the_other(size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    notebook = NOTEBOOK if size == "as it stands" else with_less()
    printed = runpy.run_path(str(ROOT / "examples" / "run_notebook.py"))["run_cells"](notebook, tmp_path)
    # Numbers, samples and verdicts may differ on another machine; the world may not.
    assert [bool(text) for text in printed] == [bool(text) for text in STORED]
    assert printed[1] == STORED[1]
    assert "win rate" in printed[-2] and "KL" in printed[-2]
    assert (tmp_path / "runs/dpo/report/report.html").is_file()


def test_outputs_are_text_and_name_no_folder_of_a_machine() -> None:
    assert all(output["output_type"] == "stream" for cell in CODE for output in cell["outputs"])
    assert not re.search(r"/(?:tmp|home|root|work|Users)/", json.dumps(NOTEBOOK))
    assert all("\x1b" not in text for text in STORED)


def test_links_lead_to_files_of_the_repository() -> None:
    text = "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links and all((ROOT / "examples" / link).is_file() for link in links)
