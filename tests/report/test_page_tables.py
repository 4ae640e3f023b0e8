"""No columns of dashes, no rows of dashes: on any page, since all go through the same door."""

from report_studies import study, trajectory

from isdaa.report import page
from isdaa.report.tables import pruned


def table(*rows: str) -> str:
    return "<p>– –</p><table id='t'><thead>" + rows[0] + "</thead><tbody>\n" + "\n".join(rows[1:]) + "\n</tbody></table>"


def test_columns_and_rows_without_a_value_go():
    head = '<tr><th>Name</th><th class="n">A</th><th class="n">B</th><th>C</th></tr>'
    found = pruned(
        table(
            head,
            '<tr class="kept"><td>one</td><td class="n">1</td><td class="n">–</td><td> </td></tr>',
            '<tr><td>two</td><td class="n"> – </td><td class="n">–</td><td><span class="swatch"></span></td></tr>',
            '<tr><td>three</td><td class="n">3 <span class="range">[–, 4]</span></td><td class="n">–</td><td></td></tr>',
        )
    )
    assert '<tr><th>Name</th><th class="n">A</th></tr>' in found and found.startswith("<p>– –</p>")
    assert '<tr class="kept"><td>one</td><td class="n">1</td></tr>' in found
    assert "two" not in found and "three" in found and "<td></td>" not in found


def test_a_cell_over_several_columns_shrinks_with_them():
    rows = ("<tr><td>a</td><td>1</td><td>–</td><td>2</td></tr>", '<tr><td colspan="4">left out: b</td></tr>')
    found = pruned(table("<tr><th>N</th><th>A</th><th>B</th><th>C</th></tr>", *rows))
    assert '<td colspan="3">left out: b</td>' in found and "<th>B</th>" not in found


def test_a_name_that_looks_like_a_dash_stays_and_so_does_an_empty_table():
    found = pruned(table("<tr><th>N</th><th>A</th></tr>", "<tr><td>–</td><td>1</td></tr>"))
    assert "<td>–</td><td>1</td>" in found
    empty = table("<tr><th>N</th><th>A</th></tr>", "<tr><td>x</td><td>–</td></tr>")
    assert pruned(empty) == empty


def test_models_that_nobody_knows_have_no_columns_of_seeds_and_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "drawings_of", lambda figures, folder: {figure.name: "" for figure in figures})
    made = study([trajectory(None, None, None, name="checkpoints", held_out=False)])
    html = page.write_report(made, tmp_path).read_text(encoding="utf-8")
    head = html[html.index('<table class="checkpoints">') :].partition("</thead>")[0]
    assert "Win rate" in head and "Length" in head
    for name in ("Seed", "Step", "Accuracy", "drift", "Mean weight", "ESS"):
        assert name not in head
