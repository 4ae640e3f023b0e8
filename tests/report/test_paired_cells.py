"""Cells are compared with what is the same but for the weights, and with nothing else."""

import json
from pathlib import Path

import pytest
from report_studies import cells, study, trajectory

from isdaa.report.charts.lines import lines_of
from isdaa.report.content import find, report_of
from isdaa.report.pairs import baselines, drawn_groups, weighted_groups

SGD = {"optimizer": "sgd", "learning_rate": 1.0}


def against(made) -> dict[str, str]:
    return {cell: plain.cell for cell, plain in baselines(lines_of(made)).items()}


@pytest.mark.parametrize(
    "more",
    [
        {"optimizer": "sgd"},
        {"learning_rate": 0.1},
        {"implicit_reward": "chi_squared"},
        {"limit": 2000},
        {"epochs": 8},
        {"beta": 0.1},
        {"label_smoothing": 0.1},
    ],
)
def test_another_setting_is_no_baseline(more):
    plain, other = {"method": "dpo"}, {"method": "is_dpo"} | more
    assert against(cells(plain, other)) == {}
    made = cells(plain, {"method": "dpo"} | more, other)
    assert against(made) == {made.runs[-1].cell: made.runs[2].cell}


@pytest.mark.parametrize(
    "more", [{"weight": "shuffled"}, {"weight": "mean"}, {"clip": "per_response"}, {"clip_eps": 0.25}, {"normalize": "batch"}]
)
def test_settings_of_the_weights_are_what_is_compared(more):
    made = cells({"method": "is_dpo"} | more, {"method": "dpo"})
    assert against(made) == {made.runs[0].cell: "methoddpo"}


def test_the_plain_cell_has_no_weights_and_the_same_family():
    weighted = {"method": "dpo", "weight": "importance"}
    assert against(cells(weighted, {"method": "is_dpo"}, {"method": "ipo"}, {"method": "wpo"})) == {}
    made = cells(weighted, {"method": "dpo", "clip_eps": 0.5}, {"method": "dpo"})
    assert against(made) == {"methoddpo-weightimportance": "methoddpo"}  # not the one that sets what it does not use


def test_differences_are_those_from_the_own_baseline():
    made = cells({"method": "dpo"}, {"method": "dpo"} | SGD, {"method": "is_dpo"} | SGD, {"method": "is_dpo", "epochs": 8})
    report = report_of(find(made))
    ends = report["comparison"]["end"]
    assert [(row["cell"], row["baseline"]) for row in ends] == [
        ("methodis_dpo-optimizersgd-learning_rate1.0", "methoddpo-optimizersgd-learning_rate1.0")
    ]
    by_cell = {cell["cell"]: cell["final"]["mean"] for cell in report["cells"]}
    assert ends[0]["final"]["mean"] == pytest.approx(by_cell[ends[0]["cell"]] - by_cell[ends[0]["baseline"]])
    (group,) = report["comparison"]["matched_kl"]
    assert group["baseline"] == ends[0]["baseline"] and list(group["differences"]) == [ends[0]["cell"]]
    assert group["title"] == "dpo, sgd, lr 1, β = 0.01"


def test_every_part_of_a_large_group_has_its_baseline():
    made = cells(*({"method": "is_dpo", "clip_eps": e} for e in range(1, 9)), {"method": "dpo"}, seeds=(1,))
    for groups in (weighted_groups(lines_of(made)), drawn_groups(lines_of(made))):
        assert [(group.baseline.cell, len(group.others)) for group in groups] == [("methoddpo", 5), ("methoddpo", 3)]
    without = cells(*({"method": "is_dpo", "clip_eps": e} for e in range(1, 9)), seeds=(1,))
    report = report_of(find(without))
    assert report["comparison"] == {"end": [], "matched_kl": []} and not find(without).drawn


def test_methods_that_are_trained_alike_are_drawn_together():
    made = cells({"method": "dpo"}, {"method": "is_dpo"}, {"method": "ipo"}, {"method": "chi_po"} | SGD, seeds=(1,))
    (group,) = drawn_groups(lines_of(made))
    assert [line.method for line in (group.baseline, *group.others)] == ["dpo", "is_dpo", "ipo"]


def test_runs_of_no_sweep_go_by_what_they_were_started_with(tmp_path: Path):
    def run(method: str, pairs: str = "a", **values):
        folder = tmp_path / f"{method}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        weight = "importance" if method.startswith("is_") else "none"
        told = {
            "objective.method": method,
            "objective.beta": 0.01,
            "objective.weight": weight,
            "data.pairs": str(folder),
        } | values
        stage = {"values": told, "pinned": {"pairs": pairs}}
        (folder / "run.json").write_text(json.dumps({"stages": {"align": stage}}), encoding="utf-8")
        paths = [str(folder / "checkpoints" / f"checkpoint-{i}") for i in range(8)]
        return trajectory(method, 0.01, 1, name=folder.name, paths=paths)

    assert against(study([run("dpo"), run("is_dpo")])) == {"is_dpo, β = 0.01": "dpo, β = 0.01"}
    assert against(study([run("dpo"), run("is_dpo", **{"align.optimizer": "sgd"})])) == {}
    assert against(study([run("dpo"), run("is_dpo", pairs="b")])) == {}
    assert against(study([trajectory("dpo"), trajectory("is_dpo")])) == {}  # nobody knows how these were trained
    assert len(lines_of(study([run("dpo"), run("dpo", **{"data.limit": 9})]))) == 2
