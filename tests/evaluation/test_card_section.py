"""An evaluation stands in the cards of the models that it is of: put in once, replaced by a later one, nobody else's touched."""

from __future__ import annotations

import json
from pathlib import Path

from chains import ALIGN, chat_model, jsonl, plain_pairs, train
from pytest import CaptureFixture, MonkeyPatch

from isdaa.cli import main
from isdaa.evaluation.card_section import BEGIN, with_section
from isdaa.manifest import MANIFEST
from isdaa.training.model_card import title


def test_the_section_is_put_in_and_replaced_wherever_the_card_has_been_edited() -> None:
    card = "# run\n\nMine.\n\n## Versions\n\n```json\n{}\n```\n"
    once = with_section(card, "## Evaluation\n\nfirst")
    assert once.index("Mine.") < once.index("first") < once.index("## Versions") and once.endswith("{}\n```\n")
    twice = with_section(once, "## Evaluation\n\nsecond")
    assert "first" not in twice and twice.count(BEGIN) == 1 and with_section(twice, "## Evaluation\n\nsecond") == twice
    assert with_section("# edited", "words").startswith("# edited\n\n" + BEGIN)


def test_a_sweeps_run_is_called_by_its_cell_and_seed() -> None:
    run = Path("/runs/s/runs/dpo-beta0.01/seed-1")
    assert title(run / "model") == title(run) == "dpo-beta0.01 seed-1"
    assert title(run / "best") == "dpo-beta0.01 seed-1, best" and title(run / "sft") == "dpo-beta0.01 seed-1, SFT"
    assert title(run / "checkpoints" / "checkpoint-20") == "dpo-beta0.01 seed-1, checkpoint-20"
    assert title(Path("/runs/my-seed-1/model")) == "my-seed-1" and title(Path("/seed-1/model")) == "seed-1"


def test_an_evaluated_run_has_its_figures_and_its_verdict_in_its_cards(
    tmp_path: Path, monkeypatch: MonkeyPatch, capsys: CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    chat_model(tmp_path / "my_model")
    jsonl(tmp_path / "pairs.jsonl", plain_pairs(40))
    settings = ALIGN | {"align.max_steps": 4, "align.save_steps": 1, "evaluation.scorer": "rm/reward"}
    reward = {**ALIGN, "stages": ["reward"], "reward.max_steps": 1, "reward.batch_size": 4}
    assert train("rm", reward) == train("mine", settings) == 0
    card = tmp_path / "mine" / "model" / "README.md"
    assert "\n# mine\n" in card.read_text() and "## Evaluation" not in card.read_text()
    assert "\n# rm, reward model\n" in (tmp_path / "rm" / "reward" / "README.md").read_text()
    small = ["--evaluation.prompts", "6", "--evaluation.max_new_tokens", "5", "--evaluation.bootstrap", "100"]
    assert main(["evaluate", "--model_path", "mine", *small]) == 0
    metrics = json.loads((tmp_path / "mine" / "evaluation" / "metrics.json").read_text())
    (verdict,) = metrics["verdicts"].values()
    # The last checkpoint, which is evaluated as model/, and best/ are the same weights twice.
    checkpoints = tmp_path / "mine" / "checkpoints"
    assert "the figures are in the model card: " in (told := capsys.readouterr().err) and "(and 4 more)" in told
    assert (checkpoints / "checkpoint-4" / "README.md").read_text().split("## Evaluation")[1].split("## Versions")[0] == (
        card.read_text().split("## Evaluation")[1].split("## Versions")[0]
    )
    for folder in (card.parent, checkpoints / "checkpoint-2", checkpoints / "checkpoint-4"):
        words = (folder / "README.md").read_text()
        assert words.count("## Evaluation") == 1 and f"**Verdict on its run:** {verdict['sentence']}" in words
        assert "| win rate | 0." in words and "as `reward` scores" in words and (folder / MANIFEST).is_file()
        assert "| reference | `my_model` |" in words and str(tmp_path) not in words
    assert "\n# mine, checkpoint-2\n" in (tmp_path / "mine" / "checkpoints" / "checkpoint-2" / "README.md").read_text()
    before = (tmp_path / "my_model").stat().st_mtime_ns, sorted(path.name for path in (tmp_path / "my_model").iterdir())
    assert (
        main(["evaluate", "--model_path", "mine", *small]) == 0
    )  # it is found again, and the cards' change is no change of weights
    assert card.read_text().count("## Evaluation") == 1
    assert (
        main(["evaluate", "--model_path", "my_model", "--reference", "my_model", "--data", "pairs.jsonl", "--scorer", "none"])
        == 0
    )
    assert sorted(path.name for path in (tmp_path / "my_model").iterdir() if path.name != "evaluation") == before[1]
