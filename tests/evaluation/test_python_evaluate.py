"""`isdaa.evaluate`: models by name, in memory and in a trainer; prompts by name and as rows; the command's numbers and checks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from chains import ALIGN, chat_model, jsonl, plain_pairs, train
from judge_server import replying, serving

import isdaa
from isdaa.cli import main
from isdaa.errors import UserError
from isdaa.evaluation.judge_types import JudgeSettings

SMALL = {"evaluation.prompts": 6, "evaluation.max_new_tokens": 5, "evaluation.bootstrap": 100}
OPTIONS = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]


class Letters:
    """A scorer of one's own, as docs/python.md has it."""

    name, digest = "letters", "letters-1"

    def score(self, rows: Sequence[Mapping[str, Any]], progress: Any = None) -> list[float]:
        return [float(len(str(row["response"]))) for row in rows]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        chat_model(folder / "my_model")
        jsonl(folder / "pairs.jsonl", plain_pairs(40))
        reward = {**ALIGN, "stages": ["reward"], "reward.max_steps": 1, "reward.batch_size": 4}
        assert train("rm", reward) == 0
        assert train("run", ALIGN | {"align.max_steps": 4, "align.save_steps": 1, "align.learning_rate": 3e-2}) == 0
        yield folder


def test_a_run_gives_what_the_command_gives_and_a_verdict(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = isdaa.evaluate("run", scorer="rm/reward", output_dir="python", settings=SMALL)
    assert main(["evaluate", "--model_path", "run", "--scorer", "rm/reward", "--output", "command", *OPTIONS]) == 0
    shown = capsys.readouterr().out
    one, other = (json.loads((home / name / "metrics.json").read_text()) for name in ("python", "command"))
    assert [model["kl"] for model in one["models"]] == [model["kl"] for model in other["models"]]
    assert [model["win_rate"] for model in one["models"]] == [model["win_rate"] for model in other["models"]]
    assert found.win_rate == one["models"][-1]["win_rate"]["mean"] and found.kl == one["models"][-1]["kl"]["mean"]
    (sentence,) = found.verdicts.values()
    assert sentence and sentence in str(found) and str(found).splitlines()[0] in shown and found.folder == Path("python")
    assert found.metrics["verdicts"] == one["verdicts"] and found.stopped is None


def test_a_trainer_has_its_win_rate_in_three_lines(home: Path) -> None:
    args = isdaa.PreferenceConfig("trained", max_steps=2, bf16=False, max_length=200, max_prompt_length=120, report_to="none")
    trainer = isdaa.preference_trainer("my_model", args=args, train_dataset=plain_pairs(12))
    trainer.train()

    found = isdaa.evaluate(
        trainer, "my_model", [row["prompt"] for row in plain_pairs(6)], Letters(), output_dir="own", settings=SMALL
    )
    assert found.win_rate is not None and 0 <= found.win_rate <= 1 and found.metrics["prompts"] == 6
    assert (home / "own" / "models" / "step-2" / "model.safetensors").is_file()
    assert found.metrics["scorer"]["name"] == "letters" and "step-2" in str(found)
    # A model in memory; rows may carry chosen and rejected.
    again = isdaa.evaluate(
        trainer.model, "my_model", plain_pairs(6), Letters(), output_dir="pairs", tokenizer=trainer.tokenizer, settings=SMALL
    )
    assert again.kl == pytest.approx(found.kl, abs=1e-5) and again.metrics["models"][0]["held_out"]["accuracy"] is not None


def test_a_judge_judges(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(replying("Better: A")) as server:
        judge = JudgeSettings("judge", base_url=server.url, max_requests=6)
        found = isdaa.evaluate("run/model", judge=judge, output_dir="judged", settings=SMALL)
        assert found.stopped is not None and "6 requests" in found.stopped and found.stopped in str(found)
        assert {body["max_tokens"] for body in server.asked} == {256}
        more = JudgeSettings("judge", base_url=server.url, max_tokens=700)
        assert isdaa.evaluate("run/model", judge=more, output_dir="judged", settings=SMALL).win_rate == 0.5
        assert {body["max_tokens"] for body in server.asked} == {256, 700}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": []}, "no model is given"),
        ({"model": 3, "output_dir": "x"}, "int is no model"),
        ({"model": object()}, "give output_dir"),
        ({"model": "runn"}, r'runn: .*did you mean "run"'),
        ({"model": "my_model", "prompts": "pairs.jsonl"}, "give it with --reference|--reference"),
        ({"model": "run/model", "prompts": []}, "no prompt is given"),
        ({"model": "run/model", "judge": "gpt"}, "give JudgeSettings"),
        ({"model": "run/model", "scorer": "rm/reward", "judge": JudgeSettings("j")}, "both say who judges"),
        ({"model": "run/model", "settings": {"evaluation.promts": 3}}, r"evaluation.promts: unknown key .*evaluation.prompts"),
    ],
)
def test_what_is_wrong_is_one_line(home: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        isdaa.evaluate(**arguments)
    assert "\n" not in str(caught.value).strip()
