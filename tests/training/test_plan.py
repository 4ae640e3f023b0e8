"""The plan of `isdaa inspect`, part by part: a GPU's ways, what lies beside the policy, what is divided among processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from chains import ALIGN, ROOT, chat_model, config_file, jsonl, plain_pairs, refused
from tokenizers_for_tests import byte_level
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, Qwen2Config

from isdaa.config import LoraConfig, load_config
from isdaa.models.device_kind import kind_of, standing_for
from isdaa.models.packed.logprobs import LinearHead
from isdaa.models.packed.patched_forward import head_of
from isdaa.models.packed.tied_embeddings import tie_of
from isdaa.models.sampling.kv_cache import RoomyLayer, room_of
from isdaa.preview import devices
from isdaa.preview.devices import PRESENT, PRESETS, Speed, assumed_speed, device_of, here, preset_of
from isdaa.preview.fake_step import Rows, Setting, Stage, layout_of
from isdaa.preview.inspect import inspect
from isdaa.preview.plan import Plan, plan
from isdaa.preview.plan_batches import batches_of
from isdaa.preview.rows_seen import Examined
from isdaa.training import stage_inputs
from isdaa.training.stages import sft_and_reward

SPEED = Speed(1e11, 1e8, "given", False)
VOCABULARY, HIDDEN = 300, 64


def small(**changes: Any) -> LlamaConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2}
    return LlamaConfig(**(sizes | {"num_attention_heads": 4, "tie_word_embeddings": True} | changes))


def aligned(**changes: Any) -> Any:
    return load_config(ROOT / "config.yaml", {"data.limit": 200, **changes})


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Examined]:
    """Stage -> its rows, of the embedded world."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("rows"))
        return {report.examined.stage: report.examined for report in inspect(aligned(), plans=False).stages}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


PLANS: dict[str, Plan] = {}


def planned(examined: dict[str, Examined], stage: str = "align", device: str = "h100", **changes: Any) -> Plan:
    """Made once of each kind: nothing changes a plan."""
    if (key := repr((stage, device, sorted(changes.items())))) not in PLANS:
        PLANS[key] = newly_planned(examined, stage, device, **changes)
    return PLANS[key]


def newly_planned(examined: dict[str, Examined], stage: str, device: str, **changes: Any) -> Plan:
    options = {key: changes.pop(key) for key in ("processes", "sharding", "others") if key in changes}
    rows = examined["align"] if stage == "reward" else examined[stage]
    return plan(replace(rows, stage=stage), aligned(**changes), small(), device=device, speed=SPEED, **options)


# --- a GPU's ways


def test_the_head_is_the_one_that_trains() -> None:
    """Not the model's own forward: fake tensors are no reason to leave the way that training goes."""
    stage = Stage(Setting("pairs", small()))
    assert isinstance(head_of(stage.model), LinearHead) and tie_of(stage.model) is not None
    layout = layout_of([(30, [(5, 5)])] * 2)
    real = Stage(Setting("pairs", small()), real=True)
    with FlopCounterMode(display=False) as flops:
        real.compute(layout)
    assert stage.operations(layout) == flops.get_total_flops()


def test_a_gpu_has_two_gradients_of_tied_embeddings_and_larger_chunks_of_logits() -> None:
    wide = small(vocab_size=20_000)
    layout = layout_of([(30, [(5, 5)])] * 2)
    cpu, gpu = (Stage(Setting("pairs", wide, on_cpu=on_cpu)) for on_cpu in (True, False))
    matrix = 20_000 * HIDDEN * 4
    assert matrix <= cpu.memory(layout).gradients < 2 * matrix <= gpu.memory(layout).gradients
    many = layout_of([(4, [(40, 40)])] * 12)  # 960 positions: in pieces of 419 on a CPU, at once on a GPU
    assert gpu.memory(many).logits > 1.5 * cpu.memory(many, train=False).logits
    assert kind_of(torch.device("cpu")) == "cpu"
    with standing_for("cuda"):
        assert kind_of(torch.device("cpu")) == "cuda"
    assert kind_of(torch.device("cpu")) == "cpu"


@pytest.mark.parametrize("rank", [0, 4])
def test_on_a_gpu_the_head_of_sft_sees_what_is_learnt_alone(rank: int) -> None:
    lora = LoraConfig(rank=rank)
    cpu, gpu = (Stage(Setting("sft", small(), lora=lora, on_cpu=on_cpu)) for on_cpu in (True, False))
    few, every = Rows(4, 60, 10), Rows(4, 60, 60)
    assert cpu.operations(few) == cpu.operations(every) == gpu.operations(every)
    a_position = 2 * HIDDEN * VOCABULARY  # of one product; backward needs one or two more, and its logits once again
    saved = cpu.operations(few) - gpu.operations(few)
    assert 2 * a_position * 4 * 49 <= saved <= 4 * a_position * 4 * 49
    assert gpu.memory(few).total > 0


def test_an_adapters_matrices_are_no_linear_layers_of_the_model() -> None:
    plain, lora = Stage(Setting("pairs", small())), Stage(Setting("pairs", small(), lora=LoraConfig(rank=8)))
    assert lora.linear == plain.linear and lora.largest_linear == plain.largest_linear
    assert plain.rest_bytes == 4 * (VOCABULARY * HIDDEN + HIDDEN)  # tied embeddings and the last norm


# --- parts of memory


def test_the_optimisers_states_have_the_dtype_of_the_weights(examined: dict[str, Examined]) -> None:
    full = planned(examined, **{"model.dtype": "bfloat16"})
    assert full.phases[-1].parts["optimiser states"] == 2 * 2 * full.trainable
    assert planned(examined).phases[-1].parts["optimiser states"] == 2 * 4 * full.trainable
    eight = planned(examined, **{"align.optimizer": "adamw_8bit"})
    assert eight.phases[-1].parts["optimiser states"] == 2 * full.trainable
    # peft keeps an adapter in fp32 whatever it adapts.
    adapter = planned(examined, **{"model.dtype": "bfloat16", "lora.rank": 4})
    assert adapter.phases[-1].parts["optimiser states"] == 2 * 4 * adapter.trainable


def test_pieces_of_a_batch_find_gradients_of_earlier_ones(examined: dict[str, Examined]) -> None:
    pieces = {"align.batch_tokens": 400}
    assert batches_of(examined["align"], aligned(**pieces), aligned(**pieces).align, 1).pieces
    assert not batches_of(examined["align"], aligned(), aligned().align, 1).pieces
    cut = planned(examined, **pieces)
    assert cut.phases[-1].parts["gradients"] >= 4 * cut.trainable


def test_pieces_are_cut_as_training_cuts_them(examined: dict[str, Examined]) -> None:
    rows = replace(examined["align"], lengths=np.array([[100, 10, 10]] * 6), groups=np.array([0, 0, 0, 1, 1, 1]))
    config = aligned(**{"align.batch_tokens": 170, "align.batch_size": 6, "align.group_by_prompt": True})
    batches = batches_of(rows, config, config.align, 1)
    assert batches.tokens == 2 * 160 and batches.pieces  # a prompt and its three pairs at a time


def test_the_reference_pass_holds_the_copies_that_autocast_makes(examined: dict[str, Examined]) -> None:
    cast = planned(examined, **{"align.precision": "bfloat16"}).phases[0]
    assert cast.name == "reference logps"
    assert (
        cast.parts["weights cast by autocast"] >= Stage(Setting("pairs", small())).linear
    )  # 2 bytes each, the last ones after the peak
    assert "weights cast by autocast" not in planned(examined).phases[0].parts
    on_cpu = planned(examined, device="cpu", **{"align.precision": "bfloat16"})
    kept = max(phase.parts.get("weights cast by autocast", 0) for phase in on_cpu.phases)
    assert kept <= 2 * (VOCABULARY + 2 * 96) * HIDDEN  # on a CPU the head's alone, and those of a layer at work


def test_another_reference_and_a_behaviour_model_lie_beside_the_policy(examined: dict[str, Examined]) -> None:
    large = small(num_hidden_layers=12)
    alone = planned(examined)
    both = planned(examined, others={"reference": large, "behaviour": small()})
    assert [phase.name for phase in both.phases] == ["reference logps", "behaviour logps", "training"]
    parts = both.phases[0].parts
    assert parts["weights of the other model"] > 3 * parts["weights"] == 3 * alone.phases[0].parts["weights"]
    assert both.phases[1].parts["weights of the other model"] == parts["weights"]
    assert both.seconds["reference logps"] > 2 * alone.seconds["reference logps"]
    assert both.seconds["behaviour logps"] == pytest.approx(alone.seconds["reference logps"])
    assert both.phases[2].parts == alone.phases[1].parts


def test_the_guard_is_said_to_be_left_out(examined: dict[str, Examined]) -> None:
    guard = {"guard.steps": 5, "guard.scorer": "gold"}
    assert any("guard" in note and "reference model" in note for note in planned(examined, **guard).notes)
    assert any("guard" in note and "reference model" not in note for note in planned(examined, **guard, **{"lora.rank": 2}).notes)
    assert planned(examined).notes == []


def test_weights_of_4_bits_are_the_policys_alone(examined: dict[str, Examined]) -> None:
    four = aligned(**{"lora.rank": 4})
    four.model.random, four.model.quantization = None, "nf4"
    told = {}
    for stage in ("align", "label", "reward"):
        rows = replace(examined["label" if stage == "label" else "align"], stage=stage)
        told[stage] = plan(rows, four, small(), device="h100", speed=SPEED).phases[-1].parts
    assert told["align"]["weights"] == told["label"]["weights"] < 0.6 * told["reward"]["weights"]
    assert "dequantised weights" in told["align"] and "dequantised weights" not in told["reward"]


@pytest.mark.parametrize("prompt", [3, 40, 100])
def test_keys_and_values_have_the_room_that_the_sampler_takes(prompt: int) -> None:
    layer = RoomyLayer()
    layer.update(torch.zeros(1, 1, prompt, 2), torch.zeros(1, 1, prompt, 2))
    for _ in range(90):
        layer.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    assert layer.key_buffer is not None and layer.key_buffer.shape[2] == room_of(prompt + 1, prompt + 90)


def test_sampling_needs_prompts_first_and_a_scorer_beside_the_policy(examined: dict[str, Examined]) -> None:
    alone = planned(examined, "label")
    reading, writing = alone.phases
    assert (reading.name, writing.name) == ("prompts", "sampling") and reading.parts["activations"] > 0
    longest = int(examined["label"].lengths.max())
    a_token = 2 * 2 * 4 * (HIDDEN // 4) * 4
    assert writing.parts["keys and values"] == a_token * 256 * room_of(longest, longest + 32)
    scored = planned(examined, "label", others={"scorer": small(num_hidden_layers=8)})
    assert scored.phases[1].parts["weights of the scorer"] > 2 * scored.phases[1].parts["weights"]
    assert "scoring" in alone.notes[0]


# --- several processes


def test_what_lies_outside_of_layers_is_gathered_whole(examined: dict[str, Examined]) -> None:
    shards = {"processes": 4, "sharding": "fsdp2"}
    full, lora = planned(examined, **shards), planned(examined, **shards, **{"lora.rank": 2})
    rest = 4 * (VOCABULARY * HIDDEN + HIDDEN)
    layer = Stage(Setting("pairs", small())).largest_layer
    assert full.phases[-1].parts["gathered layers"] == 3 * layer + 2 * rest
    assert lora.phases[-1].parts["gathered layers"] < 3 * (layer + 4096) + 1.5 * rest  # frozen: no gradient of it
    supervised_model = planned(examined, "sft", **shards)
    assert supervised_model.phases[0].name == "loading the model"
    assert supervised_model.phases[0].parts["weights"] == 4 * supervised_model.phases[1].parts["weights"]


def test_processes_on_one_cpu_share_it(examined: dict[str, Examined], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (planned(examined, device="cpu", processes=n) for n in (1, 2))
    assert one.epoch_seconds is not None and two.epoch_seconds is not None
    assert two.epoch_seconds > 0.95 * one.epoch_seconds
    assert two.seconds["reference logps"] == pytest.approx(one.seconds["reference logps"], rel=0.1)
    assert one.available is None or two.available == pytest.approx(one.available / 2, rel=0.1)
    assert any("share this CPU" in note for note in two.notes) and one.notes == []


def test_shards_of_one_process_are_a_mistake(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["inspect", "--config", str(ROOT / "config.yaml"), "--sharding", "fsdp2"], "--sharding fsdp2", "--processes")


# --- devices


@pytest.mark.parametrize(
    ("name", "gigabytes", "preset"),
    [
        ("NVIDIA H100 80GB HBM3", 85.0, "h100"),
        ("NVIDIA H100 PCIe", 85.0, None),
        ("NVIDIA H100 NVL", 100.5, None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 42.0, None),
        ("NVIDIA H200", 150.1, "h200"),
        ("NVIDIA GH200 480GB", 102.0, None),
        ("NVIDIA A100-SXM4-80GB", 85.0, "a100"),
        ("NVIDIA A100-SXM4-40GB", 42.4, "a100-40"),
        ("NVIDIA L40S", 47.7, "l40s"),
        ("NVIDIA L40", 47.7, None),
        ("NVIDIA L4", 23.7, "l4"),
        ("NVIDIA RTX A6000", 51.0, "a6000"),
        ("NVIDIA GeForce RTX 4090", 25.4, "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 17.2, None),
        ("NVIDIA GeForce RTX 3090", 25.4, "rtx3090"),
        ("NVIDIA GeForce RTX 3080", 10.5, None),
    ],
)
def test_a_gpu_is_another_one_than_its_name_begins_like(name: str, gigabytes: float, preset: str | None) -> None:
    assert preset_of(name, gigabytes * 1e9) == preset


def test_a_gpu_that_no_table_has_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert here() == "cpu" or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Something 9")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=64_000_000_000))
    monkeypatch.setattr(devices, "product_on_gpu", lambda dtype: 2e14 if dtype == torch.bfloat16 else 2e13)
    device_of.cache_clear()
    try:
        assert here() == PRESENT
        device = device_of(here())
        assert (device.name, device.memory, device.measured) == ("NVIDIA Something 9", 64e9, True)
        speed = assumed_speed(device, "bfloat16")
        assert 0.3 * 2e14 < speed.operations < 2e14 and "200 TFLOP/s that one product reaches here" in speed.how
    finally:
        device_of.cache_clear()
    assert "40% of the data sheet's 989 TFLOP/s in bfloat16" in assumed_speed(PRESETS["h100"], "bfloat16").how


# --- which model a stage has


def test_a_reward_models_own_base_is_what_is_inspected(place: Path) -> None:
    chat_model(place / "my_model", byte_level(bos=True), max_position_embeddings=1024)
    chat_model(place / "large", byte_level("llama3", bos=True), max_position_embeddings=1024, hidden_size=64)
    jsonl(place / "pairs.jsonl", plain_pairs(10))
    settings = ALIGN | {"stages": ["reward", "align"], "reward.path": "large", "reward.max_steps": 2, "reward.warmup_steps": 0}
    found = inspect(load_config(config_file(place / "run.yaml", settings)), device="h100")
    reward, align = found.stages
    assert reward.plan is not None and align.plan is not None
    assert reward.plan.parameters > 2 * align.plan.parameters and reward.architecture.hidden_size == 64
    assert "model" not in found.facts()


def test_a_reward_model_needs_a_base(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {
        "stages": ["reward"],
        "model.tokenizer": "world:small",
        "model.random": {"model_type": "llama"},
        "data.pairs": "x",
    }
    config_file(place / "run.yaml", settings)
    refused(capsys, ["inspect", "--config", "run.yaml"], "reward.path")


def test_a_reward_model_reads_held_out_pairs_and_has_no_adapter(place: Path) -> None:
    chat_model(place / "my_model", byte_level(bos=True), max_position_embeddings=1024)
    jsonl(place / "pairs.jsonl", plain_pairs(10))
    settings = ALIGN | {"stages": ["reward"], "data.eval_pairs": "held.jsonl", "lora.rank": 4, "reward.max_steps": 2}
    absent = inspect(load_config(config_file(place / "run.yaml", settings)), plans=False)
    assert any("held.jsonl" in line for line in absent.missing)
    jsonl(place / "held.jsonl", plain_pairs(12)[10:])
    found = inspect(load_config(config_file(place / "run.yaml", settings)), plans=False)
    assert found.missing == [] and len(found.stages) == 1 and found.stages[0].examined.held_out == 2
    assert any("lora.rank" in note and "reward" in note for note in found.stages[0].examined.notes)
    assert sft_and_reward.not_for_reward(aligned()) == []


def test_files_of_bfloat16_are_warned_of_too(place: Path) -> None:
    chat_model(place / "my_model", byte_level(bos=True), max_position_embeddings=1024).bfloat16().save_pretrained(
        place / "my_model"
    )
    jsonl(place / "pairs.jsonl", plain_pairs(10))
    for changes, said in ({"model.dtype": "auto"}, True), ({"model.dtype": "auto", "lora.rank": 2}, False), ({}, False):
        found = inspect(load_config(config_file(place / "run.yaml", ALIGN | changes)), plans=False)
        assert any("bfloat16, and all weights" in line for line in found.warnings) == said, changes


def test_the_models_revision_is_not_asked_of_another_repositorys_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []
    monkeypatch.setattr(stage_inputs, "load_tokenizer", lambda name, revision, **given: asked.append((name, revision)))
    config = load_config(None, {"model.path": "me/model", "model.revision": "v2", "data.pairs": "x"})
    stage_inputs.tokenizer_of(config)
    config.model.tokenizer = "you/tokenizer"
    stage_inputs.tokenizer_of(config)
    assert asked == [("me/model", "v2"), ("you/tokenizer", None)]


def test_a_model_that_cannot_be_rehearsed_gets_no_plan_and_a_line(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    experts = {
        "model_type": "mixtral",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_local_experts": 4,
    }
    experts |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    found = inspect(aligned(**{"model.random": experts, "stages": ["sft"], "data.limit": 20}), device="h100")
    (report,) = found.stages
    assert found.missing == [] and report.examined.shown
    assert report.plan is not None or any(line.startswith("sft: no plan") for line in found.warnings)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("kind", "precision", "rank", "checkpointing"),
    [
        ("pairs", "float32", 0, False),
        ("pairs", "bfloat16", 4, True),
        ("sft", "bfloat16", 0, True),
        pytest.param("pairs", "bfloat16", 0, True, marks=pytest.mark.slow),
        pytest.param("pairs", "bfloat16", 4, False, marks=pytest.mark.slow),
        pytest.param("reward", "float32", 0, True, marks=pytest.mark.slow),
    ],
)
def test_three_layers_stand_for_all_of_them_to_the_byte(kind: Any, precision: str, rank: int, checkpointing: bool) -> None:
    lora = LoraConfig(rank=rank) if rank else None
    few, every = (
        Stage(Setting(kind, small(num_hidden_layers=6), precision=precision, lora=lora, checkpointing=checkpointing))
        for _ in range(2)
    )
    every.__dict__["few_layers"] = ()  # all layers are run
    assert few.few_layers
    batch = layout_of([(40, [(20, 30)])] * 3) if kind == "pairs" else Rows(4, 60, 20)
    assert few.operations(batch) == every.operations(batch)
    for options in ({}, {"train": False}, {"accumulating": True})[: None if (kind, precision) == ("pairs", "float32") else 1]:
        assert few.memory(batch, **options) == every.memory(batch, **options), options
    small_batch = layout_of([(3, [(2, 2)])]) if kind == "pairs" else Rows(2, 4, 1)
    assert few.memory(small_batch) == every.memory(small_batch)


def test_layers_that_differ_are_all_run() -> None:
    types = ["sliding_attention", "full_attention"] * 4
    mixed = Qwen2Config(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=8, num_attention_heads=2, num_key_value_heads=1,
        use_sliding_window=True, sliding_window=8, layer_types=types,
    )  # fmt: skip
    assert not Stage(Setting("pairs", mixed)).few_layers and Stage(Setting("pairs", small(num_hidden_layers=8))).few_layers
