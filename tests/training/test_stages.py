"""The main job from nothing to an evaluated model, every way into it, and what a stop in the middle may cost: nothing."""

from __future__ import annotations

import csv
import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import (
    ALIGN,
    CHAIN,
    EXAMPLES,
    chat_model,
    config_file,
    content,
    jsonl,
    plain_pairs,
    read_lines,
    same_weights,
    train,
    weights,
    without_time,
)
from own_records import write_own
from safetensors import safe_open

from isdaa import PreferenceConfig, PreferenceTrainer, preference_trainer
from isdaa.cli import main
from isdaa.data.reading.sources import prompt_key
from isdaa.models.loading import add_lora, load_model, load_tokenizer, save_model
from isdaa.models.packed import forward
from isdaa.models.sampling import sampling
from isdaa.models.sampling.sampling import sample
from isdaa.training import preflight, run_stages
from isdaa.training.stages import align as align_stage
from isdaa.training.stages import label as label_stage
from isdaa.training.stages import sft_and_reward
from isdaa.training.trainer import authors, reference_logps
from isdaa.world.tokenizer import build_tokenizer

LOGGED = {
    *("loss", "loss/unweighted", "rewards/chosen", "rewards/margin", "rewards/accuracy", "drift/chosen", "drift/rejected"),
    *("weights/log_weight_mean", "weights/log_weight_p05", "weights/log_weight_p50", "weights/log_weight_p95"),
    *("weights/clip_fraction", "weights/mean", "weights/ess", "logps/chosen", "time/pairs_per_second"),
}


class Home:
    """A folder with one finished chain in `study/run`, whose parts the tests read and whose stages they repeat."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "study" / "run"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    found = Home(tmp_path_factory.mktemp("chain"))
    assert train(found.run, CHAIN) == 0
    gc.freeze()  # what the stages have imported
    return found


@pytest.fixture
def place(my_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `my_model` and `pairs.jsonl`, to work in."""
    shutil.copytree(my_model, tmp_path / "my_model")
    jsonl(tmp_path / "pairs.jsonl", plain_pairs(12))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def forbid(patch: pytest.MonkeyPatch, *targets: tuple[Any, str]) -> None:
    """Make functions raise: they must not be called."""

    def called(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("called, though everything is finished")

    for owner, name in targets:
        patch.setattr(owner, name, called)


def evaluated(*paths: Path | str, output: Path, options: tuple[str, ...] = ()) -> dict[str, Any]:
    """`isdaa evaluate` into its own folder, and what it wrote."""
    assert main(["evaluate", "--model_path", *map(str, paths), "--output", str(output), *options]) == 0
    return json.loads((output / "metrics.json").read_text())


# --- the whole chain


def test_the_chain_leaves_everything_that_was_promised(home: Home) -> None:
    run = home.run
    assert {p.name for p in run.iterdir()} == {
        *("run.json", "config.yaml", "metrics.jsonl", "eval_pairs.jsonl", ".lock"),
        *("sft", "pairs", "checkpoints", "model"),
    }
    state = json.loads((run / "run.json").read_text())
    assert all(state["stages"][stage]["done"] for stage in ("sft", "label", "align"))
    assert state["versions"]["torch"] == torch.__version__
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert same_weights(run / "model", run / "checkpoints" / "checkpoint-6")
    assert not same_weights(run / "model", run / "sft")
    lines = read_lines(run / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    assert training[0].keys() >= LOGGED
    held_out = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in held_out] == [2, 4, 6]
    assert {"eval/rewards/accuracy", "eval/weights/ess", "eval/drift/chosen"} <= held_out[0].keys()


def test_labelled_pairs_carry_ids_rewards_and_behaviour_logps(home: Home) -> None:
    pairs = read_lines(home.run / "pairs" / "train.jsonl")
    assert len(pairs) == 48
    for pair in pairs:
        assert {"prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids", "facts"} <= pair.keys()
        assert isinstance(pair["chosen_finished"], bool)
        assert isinstance(pair["chosen_reward"], float)
        if pair["chosen_ids"] != pair["rejected_ids"]:
            assert pair["behaviour_chosen_logps"] < 0 > pair["behaviour_rejected_logps"]
    facts = json.loads((home.run / "pairs" / "label.json").read_text())
    assert facts["settings"]["label"] == "sample"
    responses = [answer for row in read_lines(home.run / "pairs" / "responses.jsonl") for answer in row["responses"]]
    assert facts["responses"] == len(responses)
    assert facts["cut"] == sum(not answer["finished"] for answer in responses) / len(responses) > 0.1
    notes = json.loads((home.run / "run.json").read_text())["stages"]["label"]["notes"]
    (warned,) = [note for note in notes if note.startswith("warning: label.max_new_tokens (10) cut ")]
    assert f"of its {len(responses)} responses" in warned and "--label.max_new_tokens 20" in warned
    learnt = json.loads((home.run / "run.json").read_text())["stages"]["align"]["notes"]
    lower = sum(pair["chosen_reward"] < pair["rejected_reward"] for pair in pairs)
    assert 0 < lower == facts["chosen_lower"]
    assert any(f"lower score in {lower} of 48 pairs (label.label: sample draws the chosen response" in note for note in notes)
    assert any("of the training pairs' responses were cut: the model learns no end from them" in note for note in learnt)
    assert facts["settings"]["temperature"] == 1
    assert facts["pairs"] == 48


def test_policy_and_reference_and_behaviour_agree_before_the_first_step(home: Home) -> None:
    first = read_lines(home.run / "metrics.jsonl")[0]
    assert first["start/drift_max"] <= 1e-3
    assert abs(first["weights/log_weight_p05"]) <= 1e-3
    assert abs(first["weights/log_weight_p95"]) <= 1e-3
    assert first["weights/mean"] == pytest.approx(1, abs=1e-3)


def test_a_path_alone_is_enough_to_evaluate(home: Home) -> None:
    assert main(["evaluate", "--model_path", str(home.run / "model")]) == 0
    metrics = json.loads((home.run / "evaluation" / "metrics.json").read_text())
    assert metrics["scorer"]["name"] == "gold"
    assert Path(metrics["reference"]["path"]).resolve() == (home.run / "sft").resolve()
    (model,) = metrics["models"]
    assert (model["method"], model["beta"], model["step"]) == ("is_dpo", 0.05, 6)
    assert model["kl"]["mean"] >= 0
    assert 0 <= model["win_rate"]["low"] <= model["win_rate"]["mean"] <= model["win_rate"]["high"] <= 1
    logged = {line["step"]: line["weights/ess"] for line in read_lines(home.run / "metrics.jsonl") if "weights/ess" in line}
    assert model["ess"] == pytest.approx((logged[5] + logged[6]) / 2)  # the steps since the checkpoint before
    posts = read_lines(home.run / "evaluation" / "samples.jsonl")[0]
    assert "prompts" in json.dumps(posts)


def test_every_checkpoint_of_a_run_in_one_call_and_without_a_scorer(home: Home, tmp_path: Path) -> None:
    metrics = evaluated(home.run, output=tmp_path / "all", options=("--scorer", "none"))
    assert [model["step"] for model in metrics["models"]] == [2, 4, 6]
    assert metrics["scorer"] is None
    assert set(metrics["verdicts"].values()) == {None}
    assert "no verdict" in metrics["note"]
    assert all(model["win_rate"] is None and model["kl"]["mean"] >= 0 for model in metrics["models"])
    assert all("held_out" in model for model in metrics["models"])


def test_a_second_call_reuses_all_and_runs_no_model(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(home.run)
    forbid(monkeypatch, (torch.nn.Linear, "forward"), (torch.nn.Embedding, "forward"))
    assert train(home.run, CHAIN) == 0
    assert capsys.readouterr().err.count("finished earlier, reused") == 3
    after = content(home.run)
    assert {name for name in after if before.get(name) != after[name]} <= {"run.json", "config.yaml"}


def test_another_objective_reads_the_reference_logps_from_disk(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home.folder)
    forbid(monkeypatch, (reference_logps, "computed_logps"))
    settings = {k: v for k, v in CHAIN.items() if not k.startswith(("model.", "data.sft", "data.prompts"))}
    changes = {"model.path": "study/run/sft", "data.pairs": "study/run/pairs/train.jsonl", "stages": ["align"]}
    assert train("study/other", settings | changes, objective__method="ipo", align__max_steps=1) == 0
    facts = json.loads(Path("study/other/model/isdaa.json").read_text())
    assert facts["reference"] == "../../run/sft"
    assert facts["config"]["objective"]["loss"] == "squared"


def test_a_damaged_cache_is_noticed(home: Home, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    study = tmp_path / "study"
    shutil.copytree(home.folder / "study", study)
    for file in (study / ".isdaa_cache").glob("logps-*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(bytes(data))
    shutil.rmtree(study / "run" / "checkpoints")
    shutil.rmtree(study / "run" / "model")
    state = json.loads((study / "run" / "run.json").read_text())
    del state["stages"]["align"]
    write_own(study / "run" / "run.json", state)
    assert train(study / "run", CHAIN) == 0
    assert "damaged" in caplog.text
    assert same_weights(study / "run" / "model", home.run / "model")


# --- what is saved


def test_a_saved_model_is_a_plain_hugging_face_folder(home: Home) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    folder = home.run / "model"
    names = {p.name for p in folder.iterdir()}
    assert {"README.md", "isdaa.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.endswith(".bin") for name in names)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generate: Any = pipeline("text-generation", model=str(folder))
    (answer,) = generate(tokenizer.decode(tokenizer("my boss").input_ids, skip_special_tokens=True), max_new_tokens=3)
    assert isinstance(answer["generated_text"], str)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert "temperature" not in generation  # a new model's is greedy
    assert generation["eos_token_id"] == tokenizer.eos_token_id


def test_the_card_and_the_record_say_what_was_done(home: Home) -> None:
    card = (home.run / "model" / "README.md").read_text()
    for words in ("is_dpo", "log σ", "learning_rate: 0.003", "world:small", "rewards/accuracy", "torch", "isdaa evaluate", "sft"):
        assert words in card, words
    assert card.startswith("---\nlibrary_name: transformers")
    record = json.loads((home.run / "model" / "isdaa.json").read_text())
    assert record["reference"] == "../sft"
    assert (record["evaluation"], record["scorer"], record["step"]) == ("world:small", "gold", 6)
    assert record["config"]["objective"]["clip_eps"] == 1.0
    assert json.loads((home.run / "checkpoints" / "checkpoint-4" / "isdaa.json").read_text())["reference"] == "../../sft"
    assert json.loads((home.run / "sft" / "isdaa.json").read_text())["kind"] == "sft"


def test_a_run_can_be_moved(home: Home, tmp_path: Path) -> None:
    before = evaluated(home.run / "model", output=tmp_path / "before")
    moved = tmp_path / "elsewhere"
    shutil.copytree(home.folder / "study", moved)
    home.folder.joinpath("study").rename(home.folder / "gone")
    try:
        after = evaluated(moved / "run" / "model", output=tmp_path / "after")
    finally:
        home.folder.joinpath("gone").rename(home.folder / "study")
    assert [m["kl"] for m in after["models"]] == [m["kl"] for m in before["models"]]
    assert str(moved) in after["reference"]["path"]


# --- a learned reward


def test_a_reward_model_is_learned_and_evaluates(home: Home, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(home.run / "sft", tmp_path / "sft")
    shutil.copytree(home.run / "pairs", tmp_path / "pairs")
    changes = {
        "stages": ["reward", "align"],
        "model.path": str(tmp_path / "sft"),
        "model.random": None,
        "data.pairs": str(tmp_path / "pairs" / "train.jsonl"),
        "reward.max_steps": 3,
        "reward.batch_size": 8,
        "reward.learning_rate": 1e-2,
        "reward.warmup_steps": 0,
        "align.max_steps": 2,
        "evaluation.scorer": str(run / "reward"),
    }
    assert train(run, CHAIN | changes) == 0
    assert not (run / "reward-checkpoints").exists()
    from transformers import AutoModelForSequenceClassification

    head = AutoModelForSequenceClassification.from_pretrained(run / "reward")
    assert head.config.num_labels == 1
    assert float(head.score.weight.detach().abs().sum()) > 0
    assert head.config.pad_token_id == build_tokenizer("small").pad_token_id
    worth = json.loads((run / "run.json").read_text())["stages"]["reward"]["held_out"]
    agrees = f"agrees with {worth['accuracy']:.2f} ({worth['low']:.2f}–{worth['high']:.2f}) of {worth['pairs']} held-out pairs"
    record = json.loads((run / "model" / "isdaa.json").read_text())
    assert record["scorer"] == "../reward"
    assert main(["evaluate", "--model_path", str(run / "model")]) == 0
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert Path(metrics["scorer"]["name"]).resolve() == (run / "reward").resolve()
    assert metrics["models"][0]["win_rate"] is not None
    assert metrics["scorer"]["about"][1] == agrees and "'<eos>'" in metrics["scorer"]["about"][0]
    assert main(["report", str(run)]) == 0
    assert f"({agrees})" in (run / "report" / "report.html").read_text()
    # It labels, too.
    label = {"stages": ["label"], "label.scorer": str(run / "reward"), "data.prompts": "world:small", "data.limit": 6}
    assert train(tmp_path / "relabelled", CHAIN | changes | label, label__samples=4, label__pairing="best_worst") == 0
    pairs = read_lines(tmp_path / "relabelled" / "pairs" / "train.jsonl")
    notes = json.loads((tmp_path / "relabelled" / "run.json").read_text())["stages"]["label"]["notes"]
    assert any(": read at" in note for note in notes) and any(f"the reward model {agrees}" in note for note in notes)
    assert len(pairs) == 6 and all(pair["chosen_reward"] >= pair["rejected_reward"] for pair in pairs)
    assert any("the chosen response has the lower score in 0 of 6 pairs (label.label: argmax)" in note for note in notes)
    assert all(pair["chosen_reward"] != pair["rejected_reward"] or pair["chosen"] == pair["rejected"] for pair in pairs)


# --- `align` alone, from every kind of file


def standard(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return rows


def conversational(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def turns(row: dict[str, Any]) -> list[dict[str, str]]:
        opening = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello!"}]
        return [{"role": "system", "content": "Be short."}, *opening, {"role": "user", "content": row["prompt"]}]

    return [
        {
            "prompt": turns(row),
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in rows
    ]


def implicit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in conversational(rows)]


def of_the_authors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "chosen_logps": -300.0 - i, "rejected_logps": -300.0} for i, row in enumerate(rows)]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("form", "name", "write"),
    [
        (standard, "pairs.jsonl", jsonl),
        (standard, "pairs.csv", write_csv),
        (standard, "pairs.parquet", write_parquet),
        (conversational, "pairs.jsonl", jsonl),
        (conversational, "pairs.parquet", write_parquet),
        (implicit, "pairs.jsonl", jsonl),
        (of_the_authors, "pairs.jsonl", jsonl),
        (of_the_authors, "pairs.csv", write_csv),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_align_reads_every_format(place: Path, form: Callable, name: str, write: Callable) -> None:
    write(place / name, form(plain_pairs(12)))
    assert train("run", ALIGN, data__pairs=name) == 0
    first = read_lines(place / "run" / "metrics.jsonl")[0]
    assert first["start/drift_max"] <= 1e-3
    own = form is of_the_authors
    assert (abs(first["weights/log_weight_mean"]) <= 1e-3) is not own
    held = {prompt_key(row) for row in read_lines(place / "run" / "eval_pairs.jsonl")}
    assert len(held) == 3  # a fifth of twelve prompts, rounded up
    assert not same_weights(place / "run" / "model", place / "my_model")
    record = json.loads((place / "run" / "model" / "isdaa.json").read_text())
    assert record["reference"] == "../../my_model"
    assert record["evaluation"] == "../eval_pairs.jsonl"


def test_held_out_prompts_never_train(place: Path) -> None:
    pairs = plain_pairs(6)
    again = [{**pair, "rejected": "Something else."} for pair in pairs]
    jsonl(place / "pairs.jsonl", pairs + again)
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        original = PreferenceTrainer.__init__

        def watch(self: Any, *args: Any, train_dataset: Any, eval_dataset: Any, **kwargs: Any) -> None:
            seen.extend({tuple(rows[i]["prompt_ids"]) for i in range(len(rows))} for rows in (train_dataset, eval_dataset))
            original(self, *args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)

        patch.setattr(PreferenceTrainer, "__init__", watch)
        assert train("run", ALIGN, data__eval_fraction=0.3) == 0
    trained, held = seen
    assert len(trained) == 4
    assert len(held) == 2
    assert not trained & held
    assert len(read_lines(place / "run" / "eval_pairs.jsonl")) == 4


def test_held_out_pairs_of_their_own_file(place: Path) -> None:
    jsonl(place / "held_out.jsonl", plain_pairs(15)[12:])
    assert train("run", ALIGN, data__eval_pairs="held_out.jsonl") == 0
    assert [row["prompt"] for row in read_lines(place / "run" / "eval_pairs.jsonl")] == [
        p["prompt"] for p in plain_pairs(15)[12:]
    ]
    metrics = evaluated("run/model", output=place / "records")
    assert metrics["scorer"] is None
    assert metrics["prompts"] == 3
    assert metrics["models"][0]["held_out"]["accuracy"]["mean"] is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"objective__weight": "shuffled"},
        {"objective__weight": "mean", "align__gradient_accumulation_steps": 2, "align__batch_size": 2},
        {"objective__weight": "wpo"},
        {"objective__normalize": "batch", "objective__clip": "per_response", "objective__clip_eps": None},
        {"objective__method": "is_chi_po", "objective__max_reward": 1.0},
        {"objective__method": "rpo", "objective__length_penalty": 0.01, "objective__length_normalized": True},
        {"align__precision": "bfloat16"},
        {"model__dtype": "bfloat16", "align__gradient_checkpointing": True},
        {"align__batch_tokens": 60, "align__optimizer": "sgd"},
        {"align__group_by_prompt": True, "align__gradient_accumulation_steps": 2},
    ],
    ids=lambda changes: " ".join(f"{k.split('__')[1]}={v}" for k, v in changes.items()),
)
def test_free_combinations_train(place: Path, changes: dict[str, Any]) -> None:
    assert train("run", ALIGN, **changes) == 0
    lines = [line for line in read_lines(place / "run" / "metrics.jsonl") if "loss" in line]
    assert all(line["loss"] is not None and line["grad_norm"] is not None for line in lines)
    assert all(torch.isfinite(tensor).all() for tensor in weights(place / "run" / "model").values())


def test_the_config_chooses_the_kernels(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(align_stage, "compile_layers", compiled.append)
    asked: list[str] = []
    choose = forward.choose_attention
    monkeypatch.setattr(forward, "choose_attention", lambda model, name: asked.append(name) or choose(model, name))
    changes = {"align__attention": "flex", "align__compile_layers": True, "align__max_steps": 1}
    assert train("run", ALIGN, **changes) == 0
    assert asked[0] == "flex" and len(compiled) == 1
    assert train("other", ALIGN, align__compile_layers=True, align__gradient_checkpointing=True) == 2
    assert "align.compile_layers" in capsys.readouterr().err
    assert train("other", ALIGN, align__attention="flash") == 2
    assert "expected one of auto, sdpa, blocks, flex, varlen" in capsys.readouterr().err


def test_lora_starts_at_the_policy_as_loaded_and_its_checkpoints_can_be_evaluated(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("run", ALIGN, lora__rank=4, align__learning_rate=0.05, align__max_steps=4) == 0
    first = read_lines(place / "run" / "metrics.jsonl")[0]
    assert first["start/drift_max"] <= 1e-3
    assert (place / "run" / "model" / "model.safetensors").exists()
    assert not (place / "run" / "model" / "adapter_config.json").exists()
    assert not same_weights(place / "run" / "model", place / "my_model")
    assert (place / "run" / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors").exists()
    metrics = evaluated("run/checkpoints/checkpoint-4", "run/model", output=place / "records")
    adapter, merged = metrics["models"]
    assert adapter["kl"]["mean"] == pytest.approx(merged["kl"]["mean"], rel=1e-3)
    assert merged["kl"]["mean"] > 0
    assert "rank: 4" in (place / "run" / "model" / "README.md").read_text()
    monkeypatch.chdir(place / "run")  # an adapter finds its base from anywhere
    assert load_model("checkpoints/checkpoint-2").num_parameters() > 0


def test_lora_on_an_sft_adapter_has_the_adapted_model_as_reference(place: Path) -> None:
    tokenizer = load_tokenizer("my_model")
    adapted = add_lora(load_model("my_model"), rank=2, seed=3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    save_model(adapted, tokenizer, "sft_adapter", merge=False)
    json_edit(place / "sft_adapter" / "adapter_config.json", base_model_name_or_path=str(place / "my_model"))
    changes = {"lora__rank": 4, "align__learning_rate": 0.05, "align__max_steps": 4}
    assert train("run", ALIGN, model__path="sft_adapter", **changes) == 0
    assert train("plain", ALIGN, **changes) == 0
    first, plain = (read_lines(place / run / "metrics.jsonl")[0] for run in ("run", "plain"))
    assert first["start/drift_max"] <= 1e-3
    assert abs(first["logps/chosen"] - plain["logps/chosen"]) > 0.1  # the adapter has an effect
    # Checkpoints stand on the merged start; the exported model is the last adapter on it.
    assert differences("run/base", "sft_adapter") < 1e-6 < differences("run/base", "my_model")
    assert differences("run/model", "run/checkpoints/checkpoint-4") < 1e-6 < differences("run/model", "run/base")


def json_edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def differences(one: str, other: str) -> float:
    """The largest difference of any weight of two models."""
    a, b = (load_model(path).state_dict() for path in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_weights_of_four_bits_train_an_adapter_as_their_rounded_values_do(place: Path) -> None:
    pytest.importorskip("bitsandbytes")
    rounded = load_model("my_model", quantization="nf4").dequantize()
    save_model(rounded, load_tokenizer("my_model"), "rounded")
    changes = {"lora__rank": 4, "align__learning_rate": 0.05, "align__max_steps": 4, "objective__weight": "importance"}
    assert train("four_bits", ALIGN, model__quantization="nf4", **changes) == 0
    assert train("plain", ALIGN, model__path="rounded", **changes) == 0
    lines, plain = (read_lines(place / run / "metrics.jsonl") for run in ("four_bits", "plain"))
    assert lines[0]["start/drift_max"] <= 1e-3  # policy and reference alike have 4 bits
    for line, other in zip(lines, plain, strict=True):
        for key in ("loss", "logps/chosen", "grad_norm", "eval/loss"):
            assert (key in line) == (key in other)
            if key in line:
                assert line[key] == pytest.approx(other[key], rel=1e-3), key
    assert abs(lines[-1]["eval/drift/chosen"]) > 0.01
    # What is exported is the adapter in the base's own weights, not in the rounded ones.
    assert "quantization_config" not in json.loads((place / "four_bits" / "model" / "config.json").read_text())
    assert differences("four_bits/model", "four_bits/checkpoints/checkpoint-4") < 1e-6
    assert differences("rounded", "my_model") > 1e-6
    found, base = (load_model(path).state_dict() for path in ("four_bits/model", "my_model"))
    assert torch.equal(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert not torch.equal(found["model.layers.0.self_attn.q_proj.weight"], base["model.layers.0.self_attn.q_proj.weight"])


def test_what_four_bits_cannot_do_is_said(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("run", ALIGN, model__quantization="nf4") == 2
    assert "model.quantization: weights of 4 bits cannot be trained; set lora.rank" in capsys.readouterr().err
    monkeypatch.setattr("isdaa.training.preflight.find_spec", lambda name: None)
    assert train("run", ALIGN, model__quantization="nf4", lora__rank=4) == 2
    assert "model.quantization: bitsandbytes is not installed" in capsys.readouterr().err


def test_another_model_is_the_reference(place: Path) -> None:
    chat_model(place / "other", seed=5)
    assert train("run", ALIGN, reference__path="other") == 0
    first = read_lines(place / "run" / "metrics.jsonl")[0]
    assert "start/drift_max" not in first
    assert abs(first["drift/chosen"]) > 1e-3
    assert json.loads((place / "run" / "model" / "isdaa.json").read_text())["reference"] == "../../other"


def test_behaviour_logps_by_a_model_and_by_a_file_are_the_same(place: Path) -> None:
    chat_model(place / "writer", seed=5)
    assert train("run", ALIGN, behaviour__model_path="writer") == 0
    options = ["--tokenization.max_length", "200", "--tokenization.max_prompt_length", "120"]
    assert main(["logps", "--model_path", "writer", "--data", "pairs.jsonl", "--output", "with_logps.jsonl", *options]) == 0
    rows = read_lines(place / "with_logps.jsonl")
    assert len(rows) == 12
    assert all(row["behaviour_chosen_logps"] < 0 > row["behaviour_rejected_logps"] for row in rows)
    assert train("again", ALIGN, data__pairs="with_logps.jsonl") == 0
    one, other = (without_time(place / name / "metrics.jsonl") for name in ("run", "again"))
    assert abs(one[0]["weights/log_weight_mean"]) > 1e-3
    for a, b in zip(one, other, strict=True):
        assert a == {key: pytest.approx(value, rel=1e-4, abs=1e-5) for key, value in b.items()}


def test_weights_that_let_nobody_teach_stop_before_the_first_step(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row | {"behaviour_chosen_logps": -0.5, "behaviour_rejected_logps": -0.5} for row in plain_pairs(12)]
    jsonl(place / "distant.jsonl", rows)
    assert train("run", ALIGN, data__pairs="distant.jsonl") == 2
    said = capsys.readouterr().err
    assert "μ comes from the rows' own behaviour logps" in said and "almost nothing would be learnt" in said
    assert not (place / "run" / "model").exists()
    assert train("run", ALIGN, data__pairs="distant.jsonl", objective__method="dpo") == 0
    assert train("nevertheless", ALIGN, data__pairs="distant.jsonl", objective__allow_stall=True) == 0
    notes = json.loads((place / "nevertheless" / "run.json").read_text())["stages"]["align"]["notes"]
    assert any(note.startswith("warning: μ comes from") for note in notes)
    chat_model(place / "other", seed=5)  # the policy is no longer its reference: it is measured
    assert train("beside", ALIGN, reference__path="other") == 0
    notes = json.loads((place / "beside" / "run.json").read_text())["stages"]["align"]["notes"]
    (line,) = [note for note in notes if note.startswith("μ is assumed to be π_ref")]
    assert "a mean weight of 1 and" not in line


@pytest.mark.parametrize(("which", "instead"), [("behaviour.model_path", "without μ"), ("reference.path", "another reference")])
def test_a_model_of_other_tokens_is_refused_by_what_it_was_named_as(
    which: str, instead: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat_model(place / "other", seed=1)
    tokenizer = place / "other" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    tokenizer.write_text(json.dumps(content))
    assert train("run", ALIGN, **{which.replace(".", "__"): "other"}, objective__method="is_dpo") == 2
    said = capsys.readouterr().err
    assert f"the {which.partition('.')[0]} model must share the policy's tokenizer" in said and instead in said


def test_a_model_of_another_vocabulary_cannot_be_the_reference(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat_model(place / "small", vocab_size=100)
    assert train("run", ALIGN, reference__path="small") == 2
    assert "small: its vocabulary (100) is smaller" in capsys.readouterr().err
    chat_model(place / "other", vocab_size=500)
    build_tokenizer("small").save_pretrained(place / "other")
    assert train("run", ALIGN, reference__path="other") == 2
    assert "other: its tokenizer gives" in capsys.readouterr().err


def test_chat_and_plain_prompts_are_labelled_in_one_file(place: Path) -> None:
    shutil.copy(EXAMPLES / "prompts.jsonl", place / "prompts.jsonl")
    chat_model(place / "judge", seed=3)
    from transformers import AutoModelForSequenceClassification

    judge = AutoModelForSequenceClassification.from_pretrained("judge", num_labels=1)
    judge.config.pad_token_id = 2
    judge.save_pretrained("judge")
    settings = ALIGN | {"stages": ["label", "align"], "data.pairs": None, "data.prompts": "prompts.jsonl"}
    label = {"label.scorer": "judge", "label.max_new_tokens": 6, "label.samples": 3}
    assert train("run", settings | label) == 0
    pairs = read_lines(place / "run" / "pairs" / "train.jsonl")
    assert {type(pair["prompt"]) for pair in pairs} == {str, list}
    assert all(type(pair["chosen"]) is type(pair["prompt"]) for pair in pairs)


def test_wandb_keeps_its_files_in_the_run_and_goes_on_with_its_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("WANDB_DIR", "WANDB_RUN_ID", "WANDB_RESUME")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(preflight, "installed_version", lambda *_: None)
    seen: list[Any] = []

    def noted(run: Any) -> Path:
        seen.append(tuple(os.environ.get(name) for name in names))
        raise KeyboardInterrupt

    monkeypatch.setitem(run_stages.STAGE_FUNCTIONS, "align", noted)
    for folder, changes in (("run", {}), ("run", {}), ("other", {}), ("without", {"align.report_to": []})):
        assert train(folder, {**ALIGN, "align.report_to": ["wandb"], **changes}) == 130
    assert seen[0] == seen[1] == (str(place / "run"), seen[0][1], "allow") and len(seen[0][1]) == 8
    assert seen[2][0] == str(place / "other") and seen[2][1] not in (None, seen[0][1]) and seen[3] == (None, None, None)
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    train("run", {**ALIGN, "align.report_to": ["wandb"]})
    assert seen[4][1] == os.environ["WANDB_RUN_ID"] == "mine" and "WANDB_DIR" not in os.environ


def test_tensorboard_gets_the_metrics(place: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train("run", ALIGN, align__report_to=["tensorboard"]) == 0
    events = EventAccumulator(str(place / "run" / "tensorboard" / "align"))
    events.Reload()
    names = events.Tags()["scalars"]
    assert any(name.endswith("weights/ess") for name in names), names
    assert any("eval" in name and name.endswith("rewards/accuracy") for name in names), names


# --- a stop in the middle


class Stop:
    """Raises KeyboardInterrupt at the n-th call of a method."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str, calls: int) -> None:
        original = getattr(owner, name)
        self.left = calls

        def stopping(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        patch.setattr(owner, name, stopping)


def interrupted_run(folder: Path, settings: dict[str, Any], owner: Any, name: str, calls: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, owner, name, calls)
        assert train(folder, settings) == 130
    assert train(folder, settings) == 0


@pytest.mark.parametrize("calls", [0, 3, 5], ids=lambda n: f"step {n + 1}")
def test_align_resumes_bit_for_bit(home: Home, tmp_path: Path, calls: int) -> None:
    study = tmp_path / "study"
    shutil.copytree(home.folder / "study", study, ignore=shutil.ignore_patterns("model", "checkpoints", "metrics.jsonl"))
    state = json.loads((study / "run" / "run.json").read_text())
    del state["stages"]["align"]
    write_own(study / "run" / "run.json", state)
    interrupted_run(study / "run", CHAIN, PreferenceTrainer, "training_step", calls)
    assert same_weights(study / "run" / "model", home.run / "model")
    assert without_time(study / "run" / "metrics.jsonl") == without_time(home.run / "metrics.jsonl")


def test_align_stopped_after_its_last_step_only_saves(home: Home, tmp_path: Path) -> None:
    from isdaa.training.stages import align

    study = tmp_path / "study"
    shutil.copytree(home.folder / "study", study, ignore=shutil.ignore_patterns("model", "checkpoints", "metrics.jsonl"))
    state = json.loads((study / "run" / "run.json").read_text())
    del state["stages"]["align"]
    write_own(study / "run" / "run.json", state)
    interrupted_run(study / "run", CHAIN, align, "keep_model", 0)
    assert same_weights(study / "run" / "model", home.run / "model")
    assert without_time(study / "run" / "metrics.jsonl") == without_time(home.run / "metrics.jsonl")


@pytest.mark.parametrize(("owner", "name", "calls"), [("SFTTrainer", "training_step", 4), (None, "keep_model", 0)])
def test_sft_resumes_bit_for_bit(home: Home, tmp_path: Path, owner: str | None, name: str, calls: int) -> None:
    import trl

    where = getattr(trl, owner) if owner else sft_and_reward
    interrupted_run(tmp_path / "run", CHAIN | {"stages": ["sft"]}, where, name, calls)
    assert same_weights(tmp_path / "run" / "sft", home.run / "sft")
    assert not (tmp_path / "run" / "sft-checkpoints").exists()


def test_label_goes_on_from_its_responses(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(home.run / "sft", tmp_path / "sft")
    monkeypatch.setattr(label_stage, "BLOCK", 16)
    sampled: list[str] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        sampled.extend(args[6])
        return sample(*args, **kwargs)

    monkeypatch.setattr(sampling, "sample", counted)
    changes = {"stages": ["label"], "model.path": str(tmp_path / "sft"), "model.random": None, "data.sft": None}
    interrupted_run(tmp_path / "run", CHAIN | changes, sampling, "sample", 2)
    assert len(sampled) == len(set(sampled)) == 2 * 48
    assert (tmp_path / "run" / "pairs" / "train.jsonl").read_bytes() == (home.run / "pairs" / "train.jsonl").read_bytes()


def test_a_lora_run_resumes_bit_for_bit(place: Path) -> None:
    settings = ALIGN | {"lora.rank": 2, "align.max_steps": 4}
    assert train("whole", settings) == 0
    interrupted_run(place / "run", settings, PreferenceTrainer, "training_step", 3)
    assert same_weights(place / "run" / "model", place / "whole" / "model")
    assert without_time(place / "run" / "metrics.jsonl") == without_time(place / "whole" / "metrics.jsonl")


def test_a_checkpoint_that_a_kill_left_half_is_passed_over(home: Home, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    study = tmp_path / "study"
    shutil.copytree(home.folder / "study", study, ignore=shutil.ignore_patterns("model", "metrics.jsonl"))
    state = json.loads((study / "run" / "run.json").read_text())
    state["stages"]["align"]["done"] = False
    write_own(study / "run" / "run.json", state)
    (study / "run" / "checkpoints" / "checkpoint-6" / "optimizer.pt").unlink()
    assert train(study / "run", CHAIN) == 0
    assert "optimizer.pt is missing" in caplog.text
    assert same_weights(study / "run" / "model", home.run / "model")
    assert without_time(study / "run" / "metrics.jsonl") == without_time(home.run / "metrics.jsonl")


def test_a_run_of_an_earlier_version_goes_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys that it did not know have their defaults; another value of a new key that decides is another run."""
    assert train("run", ALIGN) == 0
    record = json.loads((place / "run" / "run.json").read_text())
    values = record["stages"]["align"]["values"]
    assert values.pop("align.group_by_prompt") is False and "align.attention" not in values
    write_own(place / "run" / "run.json", record)
    assert train("run", ALIGN, align__attention="sdpa") == 0
    assert train("run", ALIGN, align__group_by_prompt=True) == 2
    assert "align.group_by_prompt = False" in capsys.readouterr().err


# --- no number is computed twice


def test_what_label_has_measured_align_does_not_measure_again(home: Home) -> None:
    """Its reference logps are, bit for bit, the behaviour logps of the same pairs: three files, one computation."""
    keys: list[dict[str, Any]] = []
    for path in (home.run.parent / ".isdaa_cache").glob("logps-*.safetensors"):
        with safe_open(path, "numpy") as file:
            keys.append(json.loads(file.metadata()["key"]))
    assert len(keys) == 3 and len({key.pop("pairs") for key in keys}) == 3
    assert keys[0] == keys[1] == keys[2]


@pytest.mark.parametrize("which", ["reference.path", "behaviour.model_path"])
def test_the_model_that_training_starts_from_is_not_loaded_twice(
    which: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("my_model", "copy")
    forbid(monkeypatch, (align_stage, "other_model"))
    computed: list[int] = []
    compute = reference_logps.computed_logps
    monkeypatch.setattr(reference_logps, "computed_logps", lambda *given: computed.append(1) or compute(*given))
    assert train(place / "run", {**ALIGN, "objective.method": "is_dpo", which: "copy"}) == 0
    assert len(computed) == 2  # training and held-out pairs
    (first, *_) = read_lines(place / "run" / "metrics.jsonl")
    assert first["weights/log_weight_mean"] == pytest.approx(0, abs=1e-4)
    # Another model is another model.
    json_edit(place / "copy" / "config.json", rms_norm_eps=1e-3)
    assert train(place / "other", {**ALIGN, "objective.method": "is_dpo", which: "copy"}) == 1


# --- whose text it is


def test_a_run_says_that_it_takes_the_reference_for_the_author(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for limit in ("GAP", "SURE"):  # a random model gives every token about the same
        monkeypatch.setattr(authors, limit, 0.0)
    jsonl(place / "named.jsonl", [row | {"chosen_model": "gpt-4"} for row in plain_pairs(16)])
    said = "the responses are not samples of the reference"
    for method, data, expected in (("is_dpo", "named.jsonl", [True, True]), ("dpo", "named.jsonl", [False, False])):
        assert train(place / method, {**ALIGN, "objective.method": method, "data.pairs": data}) == 0
        text = capsys.readouterr().err
        assert [said in text, "'chosen_model'" in text.replace("not read: chosen_model", "")] == expected
        assert text.count(said) <= 1
        config = config_file(place / f"{method}.yaml", {**ALIGN, "objective.method": method, "data.pairs": data})
        assert main(["inspect", "--config", str(config), "--no_plan", "--json"]) == 0
        (stage,) = json.loads(capsys.readouterr().out)["stages"]
        assert any("the rows name the models" in note for note in stage["notes"]) is expected[1]


def test_a_behaviour_model_that_did_not_write_the_pairs_is_told_wherever_it_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for limit in ("GAP", "SURE"):  # a random model gives every token about the same
        monkeypatch.setattr(authors, limit, 0.0)
    jsonl(place / "pairs.jsonl", plain_pairs(24))
    chat_model(place / "writer", seed=5)
    said = "the responses are not samples of writer"
    weighted = {**ALIGN, "objective.method": "is_dpo", "behaviour.model_path": "writer"}
    for folder, settings, told in (("is", weighted, 1), ("dpo", weighted | {"objective.method": "dpo"}, 0)):
        assert train(folder, settings) == 0
        text = capsys.readouterr().err
        assert text.count(said) == told and "samples of the reference" not in text
    options = ["--model_path", "writer", "--tokenization.max_length", "200", "--tokenization.max_prompt_length", "120"]
    assert main(["logps", "--data", "pairs.jsonl", "--output", "own.jsonl", *options]) == 0
    assert capsys.readouterr().err.count(said) == 1
    # Rows with logps of their own are not asked; those without, in the same file, are.
    own = read_lines(place / "own.jsonl")
    jsonl(place / "half.jsonl", own[:12] + plain_pairs(36)[24:])
    for data, told in (("own.jsonl", 0), ("half.jsonl", 1)):
        assert train(f"run-{data}", {**weighted, "behaviour.model_path": None, "data.pairs": data}) == 0
        assert capsys.readouterr().err.count("the responses are not samples of the reference") == told
        card = (place / f"run-{data}" / "model" / "README.md").read_text()
        assert "- behaviour μ: the rows’ own logps" in card and ("pairs; in the others `π_ref`" in card) == bool(told)
    args = PreferenceConfig("out", max_length=200, method="is_dpo", bf16=False, use_cpu=True, report_to="none")
    preference_trainer("my_model", args=args, train_dataset=plain_pairs(24), behaviour_model="writer")
    assert capsys.readouterr().err.count(said) == 1


def test_a_resume_does_not_repeat_long_warnings_whole(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for limit in ("GAP", "SURE"):  # a random model gives every token about the same
        monkeypatch.setattr(authors, limit, 0.0)
    jsonl(place / "pairs.jsonl", plain_pairs(24))
    settings = {**ALIGN, "objective.method": "is_dpo", "align.max_steps": 2, "align.save_steps": 1}
    original = PreferenceTrainer.training_step

    def once_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    said = []
    for step in (once_only, original):
        monkeypatch.setattr(PreferenceTrainer, "training_step", step)
        train("run", settings)
        (line,) = (line for line in capsys.readouterr().err.splitlines() if "not samples of the reference" in line)
        said.append(line)
    assert said[0].startswith("align: warning: the responses are not samples") and said[0].endswith("(docs/method.md)")
    assert said[1].endswith("… (said before, whole in run/run.json)") and len(said[1]) < 160
    notes = json.loads((place / "run" / "run.json").read_text())["stages"]["align"]["notes"]
    assert said[0].removeprefix("align: ") in notes
