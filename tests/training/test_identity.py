"""A run is what it started from and what it read: nothing computed for another model or other data is ever used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from chains import ALIGN, CHAIN, chat_model, jsonl, plain_pairs, read_lines, refused, stopped_at, train
from own_records import write_own
from transformers import AutoTokenizer, GPTNeoConfig, GPTNeoForCausalLM

from isdaa.models.packed.forward import TWO_ROWS
from isdaa.models.sampling import sampling
from isdaa.training.trainer import preference_trainer, reference_logps


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    chat_model(tmp_path / "my_model")
    jsonl(tmp_path / "pairs.jsonl", plain_pairs(12))
    return tmp_path


def test_a_changed_architecture_is_another_reference(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train("one", ALIGN) == 0
    computed = []
    original = reference_logps.computed_logps
    monkeypatch.setattr(reference_logps, "computed_logps", lambda *a, **k: computed.append(1) or original(*a, **k))
    assert train("two", ALIGN) == 0
    assert not computed, "the same model and data need no second pass"
    config = json.loads(Path("my_model/config.json").read_text())
    Path("my_model/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert train("three", ALIGN) == 0
    assert computed, "rms_norm_eps is no weight, but it changes every logp"
    first = read_lines(Path("three/metrics.jsonl"))[0]
    assert abs(first["start/drift_rms"]) < 1e-3


def test_a_model_that_falls_back_falls_back_under_lora_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained("my_model")
    config = GPTNeoConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        window_size=4, max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    GPTNeoForCausalLM(config).save_pretrained("neo")
    tokenizer.save_pretrained("neo")
    modes = []
    original = preference_trainer.PreferenceTrainer.__init__
    monkeypatch.setattr(
        preference_trainer.PreferenceTrainer,
        "__init__",
        lambda self, *a, **k: (modes.append(k["forward"].mode), original(self, *a, **k))[1],
    )
    settings = ALIGN | {"model.path": "neo", "align.probe": True, "lora.rank": 2, "lora.target_modules": ["q_proj", "v_proj"]}
    assert train("run", settings) == 0
    assert modes == [TWO_ROWS]
    assert abs(read_lines(Path("run/metrics.jsonl"))[0]["start/drift_rms"]) < 1e-3


def test_other_pairs_under_the_same_name_do_not_resume(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped_at(2, ALIGN | {"align.save_steps": 1, "align.max_steps": 4})
    rows = plain_pairs(12)
    rows[0]["chosen"] += " and more"
    jsonl(place / "pairs.jsonl", rows)
    capsys.readouterr()
    assert train("run", ALIGN, align__save_steps=1, align__max_steps=4) == 2
    assert "other pairs" in capsys.readouterr().err
    jsonl(place / "pairs.jsonl", plain_pairs(12))
    assert train("run", ALIGN, align__save_steps=1, align__max_steps=4) == 0


def test_another_model_under_the_same_name_does_not_resume(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped_at(2, ALIGN | {"align.save_steps": 1, "align.max_steps": 4})
    shutil.rmtree("my_model")
    chat_model(place / "my_model", seed=5)
    capsys.readouterr()
    assert train("run", ALIGN, align__save_steps=1, align__max_steps=4) == 2
    assert "other weights" in capsys.readouterr().err


def test_an_sft_stage_cannot_slip_under_a_begun_alignment(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("run", ALIGN) == 0
    jsonl(place / "sft.jsonl", [{"prompt": "q", "completion": "a"}])
    capsys.readouterr()
    assert train("run", ALIGN | {"stages": ["sft", "align"], "data.sft": "sft.jsonl"}) == 2
    assert "began without a finished sft stage" in capsys.readouterr().err


def test_responses_of_another_model_or_prompt_are_not_taken_for_this_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(tmp_path / "run", CHAIN, stages=["sft", "label"]) == 0
    whole = read_lines(tmp_path / "run/pairs/train.jsonl")
    responses = tmp_path / "run/pairs/responses.jsonl"
    records = read_lines(responses)
    sampled = []
    original = sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda *a, **k: sampled.append(len(a[1])) or original(*a, **k))
    state = json.loads((tmp_path / "run/run.json").read_text())
    state["stages"]["label"]["done"] = False
    write_own(tmp_path / "run/run.json", state)
    records[0]["key"] = "of another model"
    jsonl(responses, records)
    assert train(tmp_path / "run", CHAIN, stages=["sft", "label"]) == 0
    assert sampled == [1], "the one foreign record is sampled again, the others are not"
    assert read_lines(tmp_path / "run/pairs/train.jsonl") == whole


def test_cut_responses_carry_no_behaviour_logps(tmp_path: Path) -> None:
    rows_of = {}
    for name, length in (("short", 40), ("long", 200)):
        settings = CHAIN | {"tokenization.max_length": length, "tokenization.max_prompt_length": 39, "label.max_new_tokens": 12}
        assert train(tmp_path / name / "run", settings, stages=["sft", "label"]) == 0
        rows_of[name] = read_lines(tmp_path / name / "run/pairs/train.jsonl")
    longest = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows_of["short"]]
    assert max(longest) > 40
    for row, tokens in zip(rows_of["short"], longest, strict=True):
        if tokens > 40:
            assert "behaviour_chosen_logps" not in row
    assert any("behaviour_chosen_logps" in row for row in rows_of["long"])


def test_no_held_out_pairs_of_an_earlier_try_are_left(place: Path) -> None:
    assert train("run", ALIGN | {"reference.path": "absent_model_folder_x/y"}) == 2
    assert train("run", ALIGN | {"data.eval_fraction": 0}) == 0
    assert not Path("run/eval_pairs.jsonl").exists()
    assert json.loads(Path("run/model/isdaa.json").read_text())["evaluation"] is None


def test_rows_beyond_the_model_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat_model(place / "narrow", max_position_embeddings=16)
    assert train("run", ALIGN | {"model.path": "narrow"}) == 2
    assert "positions" in capsys.readouterr().err


def test_what_works_in_one_process_refuses_several(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train("run", ALIGN, guard__steps=1) == 2
    assert "guard.steps: the guard works in one process" in capsys.readouterr().err
    refused(capsys, ["report", "run"], "report", "one process")
    refused(capsys, ["sweep", "--config", "sweep.yaml"], "sweep", "one process")
    assert not (place / "run").exists()
