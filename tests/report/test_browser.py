"""The page in a real browser: nothing on the console, nothing runs, nothing sticks out on a telephone."""

import re
from pathlib import Path

import pytest
from browser import BROWSER, PROBE, dump
from report_studies import write_evaluation

from isdaa.evaluation.checkpoints.trajectory import read_study
from isdaa.report.page import write_report

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    script = '<script>document.title = "ran"; alert(1)</script><img src=x onerror="document.title=1">'
    return write_report(read_study(write_evaluation(folder, text=script)), folder / "report")


def test_nothing_on_the_console_and_no_response_runs(report, tmp_path):
    dom, console = dump(report, tmp_path / "profile")
    assert console == ""
    assert re.search(r"<title>[^<]*over-optimisation report</title>", dom)
    assert "&lt;script&gt;document.title" in dom


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_sticks_out(report, tmp_path, width):
    probe = report.parent / f"probe-{width}.html"
    probe.write_text(PROBE.format(width=width, page=report.as_uri()), encoding="utf-8")
    dom, console = dump(probe, tmp_path / "profile")
    found = re.search(r'data-found="([^"]*)"', dom)
    assert found is not None, dom[-500:]
    scroll, client, title, drawings = found.group(1).split("|")
    assert int(scroll) <= int(client) <= width
    assert "over-optimisation report" in title and int(drawings) > 3 and console == ""
