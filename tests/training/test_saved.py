"""What a run leaves is what it trained, and says what it began with."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chains import ALIGN, chat_model, jsonl, plain_pairs, refused, train
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from isdaa import PreferenceConfig, preference_trainer
from isdaa.cli import main
from isdaa.config import load_config
from isdaa.errors import UserError
from isdaa.evaluation.checkpoints.what_to_evaluate import requests
from isdaa.models import merging
from isdaa.models.gguf import SOURCE
from isdaa.models.loading import load_model
from isdaa.record import ModelRecord, base_of, read_record, record_text
from isdaa.training.model_card import model_card
from isdaa.training.preflight import check_inputs
from isdaa.training.stage_inputs import coarse_weights

HEAD = ALIGN | {"lora.rank": 2, "lora.target_modules": ["lm_head"], "align.learning_rate": 0.1}
FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft's own, of tied weights


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    chat_model(tmp_path / "my_model", tie_word_embeddings=True)
    jsonl(tmp_path / "pairs.jsonl", plain_pairs(12))
    return tmp_path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[70, 80, 90, 100, 110]])).logits


def test_an_adapter_on_a_tied_head_is_saved_as_it_was_trained_or_not_at_all(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(merging, "_part", lambda model: [])  # as peft merges tied weights
        assert train("run", HEAD) == 2
    assert "the adapter computes something else" in (error := capsys.readouterr().err) and "--lora.merge false" in error
    assert not (place / "run/model").exists() and (place / "run/checkpoints/checkpoint-2").is_dir()
    # The same command goes on from the last checkpoint, with either way of saving.
    assert train("run", HEAD, lora__merge=False) == 0
    assert (place / "run/model/adapter_config.json").is_file() and not (place / "run/model/config.json").exists()
    capsys.readouterr()
    assert train("run", HEAD, lora__merge=True) == 0
    assert "align: warning: lora.merge true comes too late" in capsys.readouterr().err
    assert train("run", HEAD, lora__merge=False) == 0 and "too late" not in capsys.readouterr().err
    card = (place / "run/model/README.md").read_text()
    assert "library_name: peft" in card and str(place) not in card
    assert train("other", HEAD) == 0
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("my_model"), "other/checkpoints/checkpoint-2").eval()
    assert float((logits(trained) - logits(load_model("my_model"))).abs().max()) > 0.05
    for folder in ("other/model", "other/checkpoints/checkpoint-2", "run/model"):
        assert torch.allclose(logits(load_model(folder)), logits(trained), atol=1e-5), folder
    assert not json.loads((place / "other/model/config.json").read_text())["tie_word_embeddings"]


def test_the_trainer_of_sft_leaves_the_generation_config_alone(place: Path) -> None:
    """Transformers puts the tokenizer's padding and BOS into the model that it trains."""
    own = {"do_sample": True, "temperature": 0.6, "pad_token_id": 7, "bos_token_id": 9}
    (place / "my_model/generation_config.json").write_text(json.dumps(own))
    jsonl(place / "sft.jsonl", [{"prompt": "Hi", "completion": f"{i}"} for i in range(4)])
    settings = {"stages": ["sft"], "model.path": "my_model", "data.sft": "sft.jsonl", "sft.max_steps": 1}
    assert train("run", settings) == 0
    found = json.loads((place / "run/sft/generation_config.json").read_text())
    assert {key: found[key] for key in own} == own


def test_a_model_of_the_hub_keeps_its_revision(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints hold the adapter alone; they, and the reference of an evaluation, were loaded at the Hub's main."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    home = place / "cache/models--owner--name"
    (home / "refs").mkdir(parents=True)
    for seed, (name, commit) in enumerate((("main", "a" * 40), ("v2", "b" * 40))):
        (home / "refs" / name).write_text(commit)
        chat_model(home / "snapshots" / commit, seed=seed)
    assert train("run", ALIGN | {"model.path": "owner/name", "model.revision": "v2", "lora.rank": 2, "align.save_steps": 1}) == 0
    settings = json.loads((place / "run/checkpoints/checkpoint-2/adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("owner/name", "v2")
    trained = logits(load_model("run/model"))
    assert torch.allclose(logits(load_model("run/checkpoints/checkpoint-2")), trained, atol=1e-5)
    assert not torch.allclose(logits(load_model("owner/name")), trained, atol=0.1)
    assert main(["evaluate", "--model_path", "run"]) == 0
    kl = [model["kl"]["mean"] for model in json.loads((place / "run/evaluation/metrics.json").read_text())["models"]]
    assert max(kl) < 1e-3, "two steps at a small rate"
    first = place / "run/checkpoints/checkpoint-1"
    record = read_record(first)
    assert record is not None
    record.config["model"]["revision"] = None
    (first / "isdaa.json").write_text(record_text(record, first))
    with pytest.raises(UserError, match=r"different revisions of the reference owner/name \(main, v2\)"):
        requests(["run"], {"scorer": "none"})
    script = preference_trainer(
        "owner/name",
        args=PreferenceConfig("script", use_cpu=True, model_init_kwargs={"revision": "v2"}),
        train_dataset=plain_pairs(4),
        peft_config=LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]),
    )
    assert script.model.peft_config["default"].revision == "v2"


def test_weights_that_lie_quantised_are_refused_before_any_work(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = place / "my_model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": FOUR}))
    assert train("run", ALIGN) == 2
    message = "my_model: its weights are quantised (bitsandbytes 4 bits) and cannot be trained; give --lora.rank"
    assert message in capsys.readouterr().err and not (place / "run/metrics.jsonl").exists()
    options = ["--model.path", "my_model", "--data.pairs", "pairs.jsonl", "--output_dir", "i", "--no-plan"]
    refused(capsys, ["inspect", *options], "its weights are quantised")
    with pytest.raises(UserError, match=r"cannot be trained; give --lora.rank \(in Python peft_config\)"):
        model = chat_model(place / "object")
        model.config.quantization_config = FOUR
        preference_trainer(model, args=PreferenceConfig("out", use_cpu=True), train_dataset=plain_pairs(4))
    reward = {"stages": ["reward"], "lora.rank": 2}
    assert train("other", ALIGN | reward) == 2
    told = capsys.readouterr().err
    assert "and all weights of a reward model are trained; name the model that was quantised (reward.path)" in told
    assert "give --lora.rank" not in told, "which it has"


def test_quantised_weights_on_the_hub_are_refused_before_label_works_for_hours(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isdaa.training.preflight.model_config", lambda name, **_: SimpleNamespace(quantization_config=FOUR))
    settings = {"stages": ["label", "align"], "model.path": "owner/name", "data.prompts": "world:small", "label.scorer": "gold"}
    with pytest.raises(UserError, match=r"owner/name: its weights are quantised .* cannot be trained"):
        check_inputs(load_config(None, settings), ["label", "align"])


def test_bfloat16_weights_that_a_step_cannot_move_are_warned_of(place: Path) -> None:
    assert train("run", ALIGN, model__dtype="bfloat16", align__learning_rate=1e-6) == 0
    notes = json.loads((place / "run/run.json").read_text())["stages"]["align"]["notes"]
    (note,) = [note for note in notes if "the model is in bfloat16 and all weights are trained" in note]
    assert "% of the weights never move" in note


def test_the_share_of_weights_that_cannot_move_is_measured() -> None:
    model = torch.nn.Linear(64, 64, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    model.weight.data[:16] = 1e-3
    assert coarse_weights(model, 1e-6) == []  # in fp32 they move
    model.to(torch.bfloat16)
    (line,) = coarse_weights(model, 1e-3)
    assert "bfloat16" in line and "(0.001)" in line and "75% of the weights never move" in line
    assert coarse_weights(model, 0.01) == [] and coarse_weights(model.requires_grad_(False), 1e-9) == []


# ---------------------------------------------------------------------------------------------------------------------
# Where the weights come from


def config_of(path: str | None, **lora: Any) -> dict[str, Any]:
    from isdaa.config import resolved, validate

    given = {"output_dir": "run", "model": {"path": path}, "data": {"pairs": "p.jsonl"}, "lora": lora}
    return resolved(validate(given, "here"))


def test_the_base_is_followed_to_the_hub(tmp_path: Path) -> None:
    assert base_of("owner/name") == "owner/name" and base_of("gpt2") == "gpt2" and base_of(None) is None
    cached = tmp_path / "hub/models--owner--my-model/snapshots/0123"
    cached.mkdir(parents=True)
    assert base_of(str(cached)) == "owner/my-model"
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text("{}")
    assert base_of(str(plain)) is None
    (plain / "config.json").write_text('{"_name_or_path": "owner/elsewhere"}')
    assert base_of(str(plain)) == "owner/elsewhere"
    (plain / SOURCE).write_text('{"model": "owner/dequantised"}')
    assert base_of(str(plain)) == "owner/dequantised"
    # SFT of a Hub model, an adapter on that, and a record of the alignment.
    for name in ("sft", "adapter", "aligned", "older"):
        (tmp_path / name).mkdir()
    record = ModelRecord("sft", config_of("owner/name"), base=base_of("owner/name"))
    (tmp_path / "sft/isdaa.json").write_text(record_text(record, tmp_path / "sft"))
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "sft")}))
    assert base_of(str(tmp_path / "adapter")) == "owner/name"
    old = ModelRecord("policy", config_of("sft"), reference=str(tmp_path / "sft"))  # of a revision without `base`
    (tmp_path / "older/isdaa.json").write_text(record_text(old, tmp_path / "older"))
    assert base_of(str(tmp_path / "older")) == "owner/name"
    found = read_record(tmp_path / "sft")
    assert found is not None and found.base == "owner/name"


def test_the_card_says_what_mu_was() -> None:
    for weight, model, own, told in (
        ("none", "writer", [2, 2], "not used: no weight is made of it"),
        ("importance", "/a/writer", [0, 9], "`writer`"),
        ("importance", "writer", [3, 9], "the rows’ own logps in 3 of 9 pairs; in the others `writer`"),
        ("importance", None, [9, 9], "the rows’ own logps"),
        ("importance", None, [0, 9], "`π_ref`, which is assumed"),
        ("mean", None, None, "the rows’ own logps, else `π_ref`"),
    ):
        config = config_of("owner/name")
        config["objective"]["weight"], config["behaviour"]["model_path"] = weight, model
        assert f"\n- behaviour μ: {told}\n" in model_card(ModelRecord("policy", config, own_logps=own), "model")


def test_the_card_names_the_whole_base_and_no_place_on_this_machine(tmp_path: Path) -> None:
    folder = tmp_path / "sft"
    card = model_card(ModelRecord("policy", config_of(str(folder)), base="owner/name"), "model")
    assert "base_model: owner/name\nbase_model_relation: finetune" in card
    assert "- base model: `owner/name` (this run began with `sft`)" in card and str(tmp_path) not in card
    adapter = model_card(ModelRecord("policy", config_of("owner/name", rank=2), base="owner/name"), "model", adapter=True)
    assert (
        "library_name: peft" in adapter
        and "base_model_relation: adapter" in adapter
        and "- base model: `owner/name`\n" in adapter
    )
    unknown = model_card(ModelRecord("sft", config_of(str(folder))), "sft")
    assert "base_model:" not in unknown and "- base model: `sft`" in unknown
    random = config_of("x") | {"model": {"path": None, "random": {"model_type": "llama"}}}
    assert "- base model: none: new random weights" in model_card(ModelRecord("sft", random), "sft")
