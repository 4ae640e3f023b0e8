"""`isdaa.evaluate`: models by name, in memory and in a trainer; prompts by name and as rows; the command's numbers and checks."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chains import ALIGN, chat_model, jsonl, plain_pairs, train
from judge_server import replying, serving
from transformers import LlamaConfig, LlamaForSequenceClassification

import isdaa
from isdaa import JudgeSettings
from isdaa.cli import main
from isdaa.errors import UserError
from isdaa.evaluation.python import Evaluation, in_python
from isdaa.evaluation.scorers import OwnScorer

SMALL = {"evaluation.prompts": 6, "evaluation.max_new_tokens": 5, "evaluation.bootstrap": 100}
OPTIONS = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]


class Letters:
    """A scorer of one's own, as docs/python.md has it."""

    name, digest = "letters", "letters-1"

    def score(self, rows: Sequence[Mapping[str, Any]], progress: Any = None) -> list[float]:
        return [float(len(str(row["response"]))) for row in rows]


class Clocked(Letters):
    name, digest = "clocked", 5  # type: ignore[assignment]


class Bare:
    def score(self, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        return [float(len(row["response"])) for row in rows]


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
    assert " ".join(str(found).split()).count(sentence) == 1
    assert str(found).splitlines()[0] in shown and found.folder == Path("python")
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
    # One model alone says so, and nothing speaks of a verdict that does not follow.
    (why,) = found.verdicts.values()
    assert why == "No verdict: 1 checkpoint only; it needs 3 or more of one run." and why in str(found)
    assert "stands in the verdict" not in str(found)
    # What the trainer saved is a run, called by its folder.
    saved = isdaa.evaluate("trained", prompts=plain_pairs(6), scorer="none", settings=SMALL)
    assert saved.verdicts == {"trained": "No verdict: there is no scorer or judge, so no win rate."}
    assert "Name a reward model with scorer=…" in str(saved) and not re.search(r"--\w", str(saved))
    # A model in memory; rows may carry chosen and rejected.
    again = isdaa.evaluate(
        trainer.model, "my_model", plain_pairs(6), Letters(), output_dir="pairs", tokenizer=trainer.tokenizer, settings=SMALL
    )
    assert again.kl == pytest.approx(found.kl, abs=1e-5) and again.metrics["models"][0]["held_out"]["accuracy"] is not None


def test_two_trainers_at_the_same_step_are_two_models(home: Path) -> None:
    trainers = []
    for rate in (1e-3, 1e-2):
        args = isdaa.PreferenceConfig(f"rate-{rate}", max_steps=1, bf16=False, learning_rate=rate, report_to="none")
        trainers.append(isdaa.preference_trainer("my_model", args=args, train_dataset=plain_pairs(12)))
        trainers[-1].train()
    found = isdaa.evaluate(trainers, "my_model", plain_pairs(6), Letters(), output_dir="both", settings=SMALL)
    assert [Path(model["path"]).name for model in found.metrics["models"]] == ["model-0-step-1", "model-1-step-1"]
    assert len({model["kl"]["mean"] for model in found.metrics["models"]}) == 2


def test_anything_that_scores_rows_is_a_scorer(home: Path) -> None:
    def score(scorer: Any) -> Evaluation:
        return isdaa.evaluate("run/model", scorer=scorer, output_dir="any", settings=SMALL)

    seen: list[dict[str, Any]] = []

    def letters(rows: list[dict[str, Any]]) -> Any:
        seen.extend(rows)
        return np.array([len(row["response"]) for row in rows])

    known = isdaa.evaluate("run/model", scorer=Letters(), output_dir="known", settings=SMALL)
    found = score(letters)
    assert found.metrics["models"][0]["reward"] == known.metrics["models"][0]["reward"]
    assert found.metrics["scorer"]["name"] == "letters"
    assert all(isinstance(row["response"], str) and {"prompt", "chosen", "finished", "id"} <= row.keys() for row in seen)
    # Without a digest nothing is reused: the same name may be another function by now.
    before = len(seen)
    score(letters)
    assert len(seen) == 2 * before
    for number, own in enumerate((Bare(), lambda rows: (len(row["response"]) for row in rows), functools.partial(letters))):
        again = isdaa.evaluate("run/model", scorer=own, output_dir=f"any-{number}", settings=SMALL)
        assert again.win_rate == known.win_rate


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda rows: [1.0] * (len(rows) - 1), r"scorer lambda: \d+ scores for \d+ rows; it must give one number a row"),
        (lambda rows: [1.0] * (len(rows) + 1), r"scores for \d+ rows"),
        (lambda rows: [float("nan")] * len(rows), "the score of .* is nan, not a finite number"),
        (lambda rows: ["1.0"] * len(rows), "is '1.0', not a finite number"),
        (lambda rows: [None] * len(rows), "is None, not a finite number"),
        (lambda rows: [[1.0, 2.0]] * len(rows), r"is \[1.0, 2.0\], not a finite number"),
        (lambda rows: None, "gave NoneType; it must give a list with one number a row"),
        (lambda rows: 1.0, "gave float; it must"),
        (lambda rows: dict.fromkeys(range(len(rows)), 1.0), "gave dict; it must"),
    ],
)
def test_what_a_scorer_must_not_give(home: Path, given: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        isdaa.evaluate("run/model", scorer=given, output_dir="wrong", settings=SMALL)


def test_a_reward_model_in_memory_is_no_scorer() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(UserError, match="in memory; save it beside its tokenizer"):
        OwnScorer(LlamaForSequenceClassification(config))


def test_a_response_is_text_for_a_scorer_also_of_a_conversation() -> None:
    row = {"prompt": [], "response": [{"role": "assistant", "content": "abc"}], "finished": True}
    assert OwnScorer(lambda rows: [len(row["response"]) for row in rows]).score([row]) == [3.0]


def test_a_guards_scorer_is_not_the_evaluations_and_that_is_said(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"guard.steps": 2, "guard.prompts": 4, "guard.scorer": "rm/reward", "guard.opponent_samples": 1}
    assert train("guarded", ALIGN | settings) == 0
    capsys.readouterr()
    found = isdaa.evaluate("guarded", settings=SMALL)
    told = capsys.readouterr().err
    assert found.win_rate is None and "no win rate: `guard.scorer`" in told and "is the guard's alone" in told
    isdaa.evaluate("guarded", scorer="rm/reward", settings=SMALL)
    assert "no win rate" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("give it with --data", "give it with prompts=…"),
        ("raise it: --evaluation.max_new_tokens 24.", 'raise it: settings={"evaluation.max_new_tokens": 24}.'),
        ("more room with --judge_max_tokens: these", "more room with JudgeSettings(max_tokens=…): these"),
        ("a budget (--max_requests 6)", "a budget (JudgeSettings(max_requests=6))"),
        ("own with --adopt, or", "own with isdaa.adopt(RUN), or"),
        ("or --keep_thinking", 'or settings={"evaluation.keep_thinking": True}'),
        ("by `isdaa logps --data PAIRS`", "by `isdaa logps --data PAIRS`"),
        ("name one with --tokenizer PATH", "name one with tokenizer=…"),
    ],
)
def test_options_become_arguments(text: str, words: str) -> None:
    assert in_python(text) == words


def test_the_rows_of_a_table_are_prompts_and_not_its_columns(home: Path) -> None:
    table = pytest.importorskip("pandas").DataFrame(plain_pairs(5))
    found = isdaa.evaluate("run/model", prompts=table, scorer="none", output_dir="table", settings=SMALL)
    assert found.metrics["prompts"] == 5 and found.metrics["models"][0]["held_out"]["accuracy"] is not None


def test_a_name_of_the_tokenizer_is_for_all_models(home: Path) -> None:
    found = isdaa.evaluate("run/model", tokenizer="my_model", scorer="none", output_dir="tokens", settings=SMALL)
    assert found.metrics["tokenizer_path"] == "my_model"


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
        ({"model": "my_model", "prompts": "pairs.jsonl"}, "from .reference=…."),
        ({"model": "run/model", "prompts": []}, "no prompt is given"),
        ({"model": "run/model", "prompts": 3}, "prompts: a int; give a file"),
        ({"model": "run/model", "prompts": {"prompt": ["a"]}}, "prompts: a dict; give a file"),
        ({"model": "run/model", "judge": "gpt"}, "give JudgeSettings"),
        ({"model": "run/model", "scorer": "rm/reward", "judge": JudgeSettings("j")}, "both say who judges"),
        (
            {"model": "run/model", "settings": {"evaluation.promts": 3}},
            r'settings\["evaluation.promts"\]: unknown key ',
        ),
        # Nothing would read these.
        (
            {"model": "run/model", "settings": {"evaluation.prompts": 8, "max_new_tokens": 4}},
            "max_new_tokens: unknown key .*evaluation",
        ),
        ({"model": "run/model", "settings": {"bogus": 4}}, "settings: bogus: unknown key"),
        ({"model": "run/model", "settings": {"evaluation": {"prompts": 4}}}, "settings: evaluation: unknown key"),
        ({"model": "run/model", "settings": {"align.learning_rate": 4}}, "settings: align.learning_rate: unknown key"),
        ({"model": "run/model", "settings": {"reference": "my_model"}}, "settings: reference: unknown key"),
        ({"model": "run/model", "settings": {"evaluation.scorer": "gold"}}, "evaluation.scorer: give it as scorer="),
        ({"model": "run/model", "settings": {"evaluation.bootstrap": None}}, "evaluation.bootstrap: is None; leave it out"),
        ({"model": "run/model", "settings": ["evaluation.prompts"]}, "settings: a list; give a dictionary"),
        ({"model": "run/model", "tokenizer": object()}, "tokenizer: an object is for models in memory"),
        # In the words of the arguments.
        ({"model": "trained/checkpoint-2"}, "held-out prompts; give it with prompts=…$"),
        ({"model": "my_model"}, r'isdaa.evaluate\(…, reference="REFERENCE", prompts="DATA"\)$'),
        ({"model": "run/model", "scorer": "./gone"}, "no such model folder; scorer=… names a folder"),
        # Scorers.
        ({"model": "run/model", "scorer": Letters}, r"scorer Letters is a class; give an object of it, Letters\(\)"),
        ({"model": "run/model", "scorer": 3}, "scorer: cannot score with int; give a reward model's folder"),
        (
            {"model": "run/model", "scorer": lambda rows, more: rows},
            r"scorer lambda: takes \(rows, more\); it is called with the rows alone",
        ),
        ({"model": "run/model", "scorer": Clocked()}, "scorer clocked: its digest is int; give a text"),
    ],
)
def test_what_is_wrong_is_one_line(home: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        isdaa.evaluate(**arguments)
    assert "\n" not in str(caught.value).strip()
