"""What the chart library does to itself, it does to no report: each failure costs one picture and is said in a line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_studies import study, trajectory

from isdaa.report import figures
from isdaa.report.charts import render
from isdaa.report.charts.render import PictureError, painter
from isdaa.report.charts.style import Drawing, configured, frame, layer, save_chart, svg_of
from isdaa.report.page import drawings_of, write_report

NASTY = "a\x00\x01\x1b[31m\x85\u202e\ufffe\uffff\ud800b"
# The real program, but for charts whose texts say what is to happen to it.
STAND_IN = """
import json, os, sys, time
sys.path.insert(0, {folder!r})
import render
original = render.draw
def draw(request):
    text = json.dumps(request)
    if "crash" in text or ("no png" in text and "svg" in request):
        os.abort()
    if "sleep" in text:
        time.sleep(600)
    return original(request)
render.draw = draw
render.main()
"""


def chart(name: str = "bar") -> Drawing:
    encoding = {"x": {"field": "x", "type": "nominal"}, "y": {"field": "y", "type": "quantitative"}}
    return configured([frame([layer([{"x": name, "y": 1}], {"type": "bar"}, **encoding)], 100, 80, name)])


@pytest.fixture
def breakable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    program = tmp_path / "program.py"
    program.write_text(STAND_IN.format(folder=str(Path(render.__file__).parent)))
    painter.close()
    monkeypatch.setattr(render, "PROGRAM", str(program))
    yield
    painter.close()


def figure(name: str, drawing: Any) -> figures.Figure:
    return figures.Figure(name, "win", f"Title of {name}", "Caption.", lambda width: drawing)


def test_the_library_aborts_a_process_on_such_a_name() -> None:
    program = (
        "import json, sys, vl_convert; from isdaa.report.charts.render import draw\n"
        "draw({'specification': json.loads(sys.argv[1]), 'version': '6.1'})"
    )
    spoilt = json.dumps(chart("a\x01").specification)
    assert subprocess.run([sys.executable, "-c", program, spoilt], capture_output=True).returncode < 0


def test_control_characters_in_names_are_drawn_as_escapes(tmp_path: Path) -> None:
    assert r"a\x00\x01\x1b[31m\x85\u202e\ufffe\uffff\ud800b" in svg_of(chart(NASTY).to_dict())
    png, _ = save_chart(chart(NASTY), tmp_path / "nasty")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_whole_report_of_nasty_names_has_all_its_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = study([replace(trajectory(), name=NASTY.replace("\ud800", ""), cell=NASTY.replace("\ud800", ""))])
    assert write_report(found, tmp_path / "report").is_file()
    charts = json.loads((tmp_path / "report/report.json").read_text())["charts"]
    assert charts and all(len(entry["files"]) == 2 for entry in charts)
    assert "not drawn" not in capsys.readouterr().err


def test_each_failure_costs_one_picture_and_is_said(
    breakable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("good", "crash", "sleep", "no png", "bad", "last")
    drawn = [figure(name.replace(" ", "-"), chart(name)) for name in names]
    broken = dict(chart().specification) | {"layer": 3, "mark": {"type": "no such mark"}}
    drawn[4] = figure("bad", Drawing(broken))
    svg_of(chart("warm").to_dict())
    original = render.Painter._ask

    def impatient(self: render.Painter, request: dict[str, Any]) -> str:
        """Little patience with the one that sleeps, which is late however busy the machine is, and much with the others."""
        monkeypatch.setattr(render, "LIMIT", 1.0 if "sleep" in json.dumps(request) else 60.0)
        return original(self, request)

    monkeypatch.setattr(render.Painter, "_ask", impatient)
    (tmp_path / "crash.png").write_bytes(b"of an earlier report")
    found = drawings_of(drawn, tmp_path)
    said = capsys.readouterr().err
    assert list(found) == ["good", "crash", "sleep", "no-png", "bad", "last"]
    for name in ("good", "no-png", "last"):
        assert found[name].count("<svg") == 2
    for name, why in (("crash", "ended with status -6"), ("sleep", "took longer than 1 seconds"), ("bad", "says")):
        assert "<svg" not in found[name] and "could not be drawn: the chart library" in found[name] and why in found[name]
        (line,) = (line for line in said.splitlines() if line.startswith(f"chart {name}: "))
        assert line.startswith(f"chart {name}: not drawn: the chart library") and why in line
    assert "chart no-png: written without no-png.png: the chart library ended with status -6" in said
    files = {path.name for path in tmp_path.glob("*.*g")}
    assert files == {"good.png", "good.svg", "no-png.svg", "last.png", "last.svg"}


def test_a_report_is_written_where_every_picture_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    painter.close()
    monkeypatch.setattr(render, "PROGRAM", str(tmp_path / "absent.py"))
    written = write_report(study([trajectory()]), tmp_path / "report")
    painter.close()
    text = written.read_text(encoding="utf-8")
    assert "This chart could not be drawn: the chart library ended with status 2." in text
    report = json.loads((written.parent / "report.json").read_text())
    assert report["charts"] and all(entry["files"] == [] for entry in report["charts"])
    assert capsys.readouterr().err.count("not drawn:") == len(report["charts"])


def test_one_process_draws_a_whole_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    painter.close()
    started: list[Any] = []
    original = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: started.append(args) or original(*args, **kwargs))
    drawings_of([figure("one", chart("one")), figure("two", chart("two"))], tmp_path)
    assert len(started) == 1
    with pytest.raises(PictureError):
        painter.svg({"$schema": "?"}, "no version")
    assert painter.svg(chart().specification, "6.1").startswith("<svg") and len(started) == 1, "a refusal kills nothing"
