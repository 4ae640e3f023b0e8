"""One recommendation: README, the study, `isdaa methods` and docs/which_method.md agree; the default says why it differs."""

import re

import pytest
from chains import ROOT

from isdaa.cli import main
from isdaa.config import ObjectiveConfig
from isdaa.objectives.presets import PRESETS, RECOMMENDED

METHOD, BETA = RECOMMENDED


@pytest.mark.parametrize("page", ["README.md", "docs/study.md", "docs/which_method.md", "docs/how_to.md"])
def test_pages_recommend_the_same(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    first = re.search(r"--objective\.method (\w+) --objective\.beta ([\d.]+)", text)
    assert first, page
    assert (first.group(1), float(first.group(2))) == RECOMMENDED


def test_the_default_is_named_where_it_differs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    default = ObjectiveConfig().method
    assert f"{METHOD} at --objective.beta {BETA:g}" in printed
    assert f"{default} at β = {ObjectiveConfig().arguments()['beta']:g} is the default" in printed
    page = (ROOT / "docs" / "which_method.md").read_text(encoding="utf-8")
    assert f"default is `{default}` at β = {ObjectiveConfig().arguments()['beta']:g}" in page
    assert f"`{default}` at" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_counts_the_presets() -> None:
    assert f"{len(PRESETS)} presets" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_figures_that_are_quoted_stand_in_the_study_or_beside_the_real_model() -> None:
    page = (ROOT / "docs" / "which_method.md").read_text(encoding="utf-8")
    sources = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("study.md", "real.md"))
    figures = set(re.findall(r"\b0\.\d{2,3}\b", page)) - {"0.01", "0.05"}
    assert len(figures) > 15
    assert {figure for figure in figures if figure not in sources} == set()
