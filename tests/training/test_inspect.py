"""`isdaa inspect`: what it says of rows, tokens, steps and memory is what training then does."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from chains import ALIGN, CHAIN, ROOT, chat_model, config_file, content, jsonl, plain_pairs, refused
from paper_rows import chats, dialogues, posts, scorer
from rich.console import Console
from tokenizers_for_tests import CHATML, byte_level
from transformers import LlamaConfig

from isdaa.cli import main
from isdaa.config import LoraConfig, load_config
from isdaa.models.attention import cpu_attention
from isdaa.preview.devices import Speed
from isdaa.preview.fake_step import Rows, Setting, Stage, layout_of
from isdaa.preview.histogram import HEIGHT, heights, print_histogram
from isdaa.preview.inspect import inspect, warn_of_plan
from isdaa.preview.inspect_page import print_to
from isdaa.preview.plan import Phase, Plan, batches_of, plan
from isdaa.preview.rows_seen import PartLengths, writes_date
from isdaa.preview.token_view import lines_of, readable, shown_pair

SPEED = Speed(1e11, 1e8, "given", False)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(place: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], *options: str) -> dict[str, Any]:
    """What `isdaa inspect --json` prints."""
    file = config_file(place / "run.yaml", settings)
    capsys.readouterr()
    assert main(["inspect", "--config", str(file), "--json", "--no_plan", *options]) == 0
    return json.loads(capsys.readouterr().out)


def pairs(**changes: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"Question {i}?", "chosen": f" Answer {i}.", "rejected": f" No {i}."} | changes for i in range(8)]


# --- rows and tokens


def test_rows_are_counted_as_training_counts_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat_model(place / "my_model", byte_level(bos=True), max_position_embeddings=1024)
    rows = pairs()
    rows[1]["rejected"] = rows[1]["chosen"]
    rows[2]["prompt"] = "word " * 200
    rows[3]["chosen"] = "long " * 200
    jsonl(place / "pairs.jsonl", rows)
    found = told(place, capsys, ALIGN | {"data.eval_fraction": 0.0, "output_dir": "runs/new"})
    (stage,) = found["stages"]
    assert stage["rows"]["rows"] == 8 and stage["rows"]["kept"] == 7 and stage["rows"]["dropped_equal"] == 1
    assert stage["rows"]["prompts_cut"] == 1 and stage["rows"]["chosen_cut"] == 1
    assert stage["responses_that_end"] == pytest.approx(13 / 14)
    assert stage["steps"] == 2 and stage["batch"] == 4 and stage["steps_per_epoch"] == 2
    prompt = stage["lengths"][0]
    assert (prompt["part"], prompt["limit"], prompt["cut"]) == ("prompt", 120, 1) and prompt["longest"] > 200
    assert not (place / "runs" / "new").exists()


def test_which_falls_will_be_seen(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat_model(place / "my_model", byte_level(bos=True), max_position_embeddings=1024)
    jsonl(place / "pairs.jsonl", pairs())
    changes = {"data.evaluation": "pairs.jsonl", "evaluation.scorer": "gold", "align.save_steps": 1, "align.max_steps": 6}
    guarded = {"guard.steps": 1, "evaluation.opponent_samples": 4, "guard.stop": "over-optimised", "evaluation.prompts": 256}
    (stage,) = told(place, capsys, ALIGN | changes | guarded)["stages"]
    steps = stage["steps"]
    assert stage["seen"][0] == f"{steps} checkpoints and 256 prompts: falls of 0.10 or more are seen in 8 of 10 runs"
    assert stage["seen"][1].startswith(f"guard: {steps} measurements on 128 prompts")
    (stage,) = told(place, capsys, ALIGN | changes | {"evaluation.prompts": 1})["stages"]
    assert "too few for a verdict" in stage["seen"][0] and len(stage["seen"]) == 1
    (stage,) = told(place, capsys, ALIGN | changes | {"evaluation.scorer": "none"})["stages"]
    assert stage["seen"] == []


def test_the_shown_pair_is_what_the_model_reads(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_level("llama3", bos=True)
    chat_model(place / "my_model", tokenizer, max_position_embeddings=1024)
    ask, good, bad = ({"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Yes."), ("assistant", "No")))
    jsonl(place / "pairs.jsonl", [{"prompt": [ask], "chosen": [good], "rejected": [bad]}] * 3)
    (stage,) = told(place, capsys, ALIGN | {"data.eval_fraction": 0.0}, "--row", "1")["stages"]
    prompt, chosen, rejected = stage["shown"][0]["runs"]
    text = tokenizer.apply_chat_template([ask], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(prompt["ids"]) == text and not any(prompt["scored"])
    assert tokenizer.decode(chosen["ids"]) == "Yes.<|eot_id|>" and all(chosen["scored"]) and chosen["ends"]
    assert tokenizer.decode(rejected["ids"]) == "No<|eot_id|>" and rejected["ends"]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": [{"role": "user", "content": "<|im_start|>user\nHi<|im_end|>"}]}, "special_in_chat"),
        ({"prompt": "<|im_start|>user\nHi<|im_end|>\n"}, "special_in_text"),
        ({"prompt": "Hi <|begin_of_text|> there"}, "bos_inside"),
        ({"chosen": "Yes.<|end_of_text|> More."}, "eos_inside"),
    ],
)
def test_templates_and_special_tokens_in_texts_are_found(
    place: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], name: str
) -> None:
    chat_model(place / "my_model", byte_level("chatml", bos=True), max_position_embeddings=1024)
    rows = pairs()
    assert told_of(place, capsys, rows)[name] == 0
    if isinstance(row.get("prompt"), list):
        row = row | {k: [{"role": "assistant", "content": k}] for k in ("chosen", "rejected")}
    rows[3] |= row
    assert told_of(place, capsys, rows)[name] == 1


def told_of(place: Path, capsys: pytest.CaptureFixture[str], rows: list[dict[str, Any]]) -> dict[str, int]:
    jsonl(place / "pairs.jsonl", rows)
    (stage,) = told(place, capsys, ALIGN | {"data.eval_fraction": 0.0})["stages"]
    return stage["found"]


def test_own_bos_and_boundary_merges_are_counted_with_an_example(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat_model(place / "my_model", byte_level(bos=True), max_position_embeddings=1024)
    jsonl(place / "pairs.jsonl", [*pairs(prompt="<|begin_of_text|>What is the ans", chosen="wer", rejected="wering")[:2]])
    (stage,) = told(place, capsys, ALIGN | {"data.eval_fraction": 0.0})["stages"]
    assert stage["rows"]["own_bos"] == 2 and stage["rows"]["boundary_merges"] >= 1
    assert stage["merge"] == "'s' and 'w', row pairs.jsonl:1"


def test_a_template_that_looks_at_the_clock() -> None:
    tokenizer = byte_level("chatml")
    assert not writes_date(tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    assert writes_date(tokenizer)
    tokenizer.chat_template = "{% if tools %}{{ strftime_now('%d %b %Y') }}{% endif %}" + CHATML
    assert not writes_date(tokenizer)


def test_without_colour_the_mask_is_still_to_be_read() -> None:
    tokenizer = byte_level(bos=True)
    ids = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in (("a", "Hi\n you"), ("b", " yes"))}
    end = tokenizer.eos_token_id
    row = {"index": 0, "id": "x", "prompt_ids": ids["a"], "chosen_ids": [*ids["b"], end], "rejected_ids": ids["b"]}
    prompt, chosen, rejected = shown_pair(row, tokenizer, {end}).spans
    assert "".join(token.text for token in prompt.tokens) == "Hi↵·you"
    assert str(lines_of(chosen, 60, colour=False)[0]).endswith("|[<|end_of_text|>]")
    assert "[" not in str(lines_of(rejected, 60, colour=False)[0])
    styles = {str(span.style) for span in lines_of(chosen, 60, colour=True)[0].spans}
    assert len(styles) >= 2 and any("yellow" in style or "facc15" in style for style in styles)
    long = prompt.__class__("prompt", "given", prompt.tokens * 100)
    assert all(line.cell_len <= 30 for line in lines_of(long, 30, colour=True, whole=True))
    assert "more tokens" in "".join(map(str, lines_of(long, 60, colour=False)))
    assert readable(tokenizer, ids["b"][0]).startswith("·")


def test_histogram_counts_every_row_once() -> None:
    lengths = np.array([0, 1, 1, 5, 9, 9, 9, 200])
    bars, step = heights(lengths, 40, 20)
    assert step == 1 and len(bars) == 21 and bars[9] == 8 * HEIGHT and bars[20] > 0 and bars[2] == 0
    assert heights(lengths, 10, 20)[1] == 3
    stream = io.StringIO()
    part = PartLengths("prompt", lengths, lengths > 10, 10)
    print_histogram(part, Console(file=stream, width=60, color_system=None), 20)
    text = stream.getvalue()
    assert "limit 10: 12.5% cut" in text and "the longest 200" in text and all(len(line) <= 60 for line in text.splitlines()[1:])


# --- a configuration as it stands


@pytest.mark.parametrize("width", [80, 120])
def test_the_shipped_configuration_before_anything_is_trained(place: Path, width: int) -> None:
    found = inspect(load_config(ROOT / "config.yaml", {"data.limit": 300}), plans=False)
    assert [report.examined.stage for report in found.stages] == ["sft", "label", "align"]
    assert found.missing == [] and found.stages[2].examined.assumed.startswith("not written yet")
    assert not (place / "runs" / "mini").exists()
    stream = io.StringIO()
    print_to(found, Console(file=stream, width=width, color_system=None))
    text = stream.getvalue()
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    assert "300 of 300 rows kept" in text and "TL;DR:" in text and "[<eos>]" in text and "\x1b" not in text


def test_what_is_missing_is_named_and_the_rest_is_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat_model(place / "my_model", byte_level(bos=True), max_position_embeddings=1024)
    jsonl(place / "sft.jsonl", [{"prompt": "Hi", "completion": " yes"}] * 4)
    settings = ALIGN | {"stages": ["sft", "align"], "data.sft": "sft.jsonl", "data.pairs": "absent.jsonl", "sft.warmup_steps": 0}
    config_file(place / "run.yaml", settings)
    refused(capsys, ["inspect", "--config", "run.yaml", "--no_plan"], "absent.jsonl", "no such file")
    assert main(["inspect", "--config", "run.yaml", "--no_plan"]) == 2
    shown = capsys.readouterr().out
    assert "4 of 4 rows kept" in shown and "missing" in shown
    refused(capsys, ["inspect", "--config", "run.yaml", "--model.path", "./nothing"], "./nothing", "no such folder")
    refused(capsys, ["inspect", "--config", "run.yaml", "--device", "h1000"], "h1000", 'did you mean "h100"')
    refused(capsys, ["inspect", "--config", "run.yaml", "--processes", "0"], "--processes")


def test_every_paper_config_with_stand_ins(place: Path) -> None:
    """The shipped files, with local models and data; of the models there is only a configuration and a tokenizer."""
    tokenizer = byte_level("chatml", bos=True)
    for name in ("llama", "template"):
        tokenizer.save_pretrained(place / name)
    LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=2048).save_pretrained(place / "llama")  # fmt: skip
    scorer(place / "scorer")
    for name, rows in (("posts", posts(12)), ("chat", chats(12)), ("hh", dialogues(12))):
        (place / name).mkdir()
        for split in ("train", "test", "validation"):
            jsonl(place / name / f"{split}.jsonl", rows)
    local = {"tldr": "tldr:posts", "ultrachat": "ultrachat:chat", "ultrafeedback": "ultrafeedback:chat", "hh_chat": "hh_chat:hh"}
    seen = 0
    for path in sorted((ROOT / "configs").glob("[ti]*/*.yaml")):
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "grids" in data:
            continue
        changes = {"model.path": "llama", "data.limit": 12}
        changes |= {f"data.{k}": local.get(v, "tldr:posts") for k, v in data["data"].items() if k in ("sft", "pairs", "prompts")}
        changes |= {"data.eval_pairs": local[data["data"]["eval_pairs"]]} if "eval_pairs" in data["data"] else {}
        changes |= {"model.tokenizer": "template"} if "tokenizer" in data["model"] else {}
        planned = path.parent.name == "tldr"  # the others have the same stages
        found = inspect(load_config(path, changes), device="h100", plans=planned)
        assert found.missing == [], path
        (report,) = found.stages
        assert report.examined.shown and report.examined.parts
        if planned:
            assert report.plan is not None and report.plan.peak.total > 0 and sum(report.plan.seconds.values()) > 0
        seen += 1
    assert seen == 7


def test_a_sweeps_file_is_inspected_by_its_base(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ROOT / "configs/mini/sweep.yaml"
    assert main(["inspect", "--config", str(sweep), "--data.limit", "60", "--no_plan", "--json", "--out", "told.json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((place / "told.json").read_text())


# --- the plan


def small(**changes: Any) -> LlamaConfig:
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(**(sizes | {"tie_word_embeddings": True} | changes))


def test_operations_are_those_of_the_mathematics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "NARROWEST", 0)
    architecture = small(num_hidden_layers=6)
    stage = Stage(Setting("pairs", architecture))
    layout = layout_of([(150, [(20, 30)]), (140, [(25, 15), (10, 10)])])
    # Of the last layer only what predicts a response has to be computed.
    most, least = (2 * (stage.linear * share * layout.tokens + 64 * 300 * 110) for share in (1, 5 / 6))
    # A product of attention, in blocks of 96 queries: of prompts with their first responses, and of the other responses.
    seen = 96 * 96 + 74 * 170 + 30 * 180 + 96 * 96 + 69 * 165 + 15 * 155 + 2 * 10 * 150
    attention = 2 * 6 * 64 * seen
    assert 3 * least + 7 * attention < stage.operations(layout) < 3 * most + 7 * attention
    assert least + 2 * attention < stage.operations(layout, train=False) < most + 2 * attention
    again = Stage(Setting("pairs", architecture, checkpointing=True)).operations(layout)
    assert again > stage.operations(layout) + 0.75 * (least + 2 * attention)


def test_parts_of_memory_move_as_they_must() -> None:
    layout = layout_of([(150, [(20, 30)])] * 4)
    plain = Stage(Setting("pairs", small()))
    assert plain.parameters == plain.trainable_parameters == sum(p.numel() for p in plain.model.parameters())
    memory = plain.memory(layout)
    checkpointed = Stage(Setting("pairs", small(num_hidden_layers=8), checkpointing=True)).memory(layout)
    eight = Stage(Setting("pairs", small(num_hidden_layers=8)))
    deep = eight.memory(layout)
    assert checkpointed.activations < 0.5 * deep.activations and deep.activations > 3 * memory.activations
    assert eight.memory(layout, train=False).activations < 0.3 * deep.activations
    assert plain.memory(layout, accumulating=True).gradients >= 4 * plain.parameters
    lora = Stage(Setting("pairs", small(), lora=LoraConfig(rank=4)))
    assert lora.parameters == plain.parameters and lora.trainable_parameters * 4 == lora.adapter_bytes
    assert lora.memory(layout, accumulating=True).gradients < plain.memory(layout, accumulating=True).gradients / 2
    assert Stage(Setting("reward", small())).memory(Rows(4, 60, 1)).total > 0
    assert all(not isinstance(t, torch.Tensor) or t.numel() for t in layout.memo.values())


def aligned(**changes: Any) -> Any:
    return load_config(ROOT / "config.yaml", {"data.limit": 200, **changes})


def test_shards_divide_what_they_are_said_to() -> None:
    config = aligned(**{"align.gradient_accumulation_steps": 2})
    examined = inspect(config, plans=False).stages[2].examined
    told = {
        name: plan(examined, config, small(), device="h100", processes=4, sharding=name, speed=SPEED).phases[-1].parts
        for name in ("ddp", "fsdp2", "zero2")
    }
    ddp, fsdp, zero2 = told["ddp"], told["fsdp2"], told["zero2"]
    assert fsdp["weights"] * 4 == ddp["weights"] == zero2["weights"]
    assert fsdp["optimiser states"] * 4 == zero2["optimiser states"] * 4 == ddp["optimiser states"]
    assert "gathered layers" in fsdp and "gathered layers" not in ddp
    one, four = (plan(examined, config, small(), device="h100", processes=n, speed=SPEED) for n in (1, 4))
    assert one.epoch_seconds is not None and four.epoch_seconds is not None
    assert 2.5 < one.epoch_seconds / four.epoch_seconds < 4.5


def test_the_tokens_of_an_epoch_count_each_prompt_of_a_batch_once() -> None:
    config = aligned()
    examined = inspect(config, plans=False).stages[2].examined
    batches = batches_of(examined, config, config.align, 1)
    assert batches.tokens == examined.lengths.sum() and batches.plain == batches.tokens + examined.lengths[:, 0].sum()
    examined.groups = np.zeros(len(examined.lengths), dtype=np.int64)
    examined.lengths[:, 0] = 30
    shared = batches_of(examined, config, config.align, 1)
    assert shared.tokens == examined.lengths[:, 1:].sum() + 30 * shared.steps


def test_bfloat16_weights_are_warned_of(place: Path) -> None:
    warned = inspect(aligned(**{"model.dtype": "bfloat16"}), plans=False).warnings
    assert any("bfloat16" in line and "float32" in line for line in warned)
    assert not any("bfloat16" in line for line in inspect(aligned(), plans=False).warnings)


def test_a_busy_machine_is_said_to_be_one() -> None:
    said: list[str] = []
    for elsewhere in (0.02, 0.4):
        warn_of_plan(Plan("align", "cpu", [Phase("training", {})], replace(SPEED, elsewhere=elsewhere), 1, 1), said.append)
    assert len(said) == 1 and "other programs used 40% of the cores" in said[0]


# Plans, then trains, in one process: the libraries are loaded once. The rehearsal allocates next to nothing.
PLAN_AND_TRAIN = """
import sys
import isdaa.training.stages.align
from isdaa.cli import main
from isdaa.config import load_config
from isdaa.preview.devices import Speed
from isdaa.preview.inspect import architecture_of, inspect
from isdaa.preview.plan import own_memory, plan
from isdaa.training.stage_inputs import tokenizer_of
config = load_config(sys.argv[1])
(report,) = inspect(config, plans=False).stages
architecture, speed = architecture_of(config, None, tokenizer_of(config)), Speed(1e11, 1e8, "given", False)
planned = plan(report.examined, config, architecture, device="cpu", program=own_memory(), speed=speed)
assert main(["train", "--config", sys.argv[1]]) == 0
print(planned.peak.total, dict(line.split(":", 1) for line in open("/proc/self/status"))["VmHWM"].split()[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
def test_the_planned_memory_is_what_training_takes(place: Path) -> None:
    """To 20 %. benchmarks/plan_check.py does so at larger sizes, and with time."""
    rng = np.random.default_rng(0)
    rows = [
        {f"{name}_ids": rng.integers(3, 160, size).tolist() for name, size in (("prompt", 300), ("chosen", 40), ("rejected", 40))}
        for _ in range(20)
    ]
    jsonl(place / "pairs.jsonl", rows)
    random = {"model_type": "llama", "vocab_size": 8000, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4,
              "num_attention_heads": 6, "num_key_value_heads": 6, "tie_word_embeddings": True}  # fmt: skip
    settings = CHAIN | {"stages": ["align"], "model.random": random, "data.pairs": "pairs.jsonl", "output_dir": "run"}
    settings |= {
        "tokenization.max_length": 500,
        "tokenization.max_prompt_length": 400,
        "align.max_steps": 2,
        "align.save_steps": 2,
    }
    file = config_file(place / "run.yaml", settings)
    command = [sys.executable, "-W", "ignore", "-c", PLAN_AND_TRAIN, str(file)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    planned, measured = map(float, out.split()[-2:])
    assert planned == pytest.approx(1024 * measured, rel=0.2)


def test_nothing_is_left_behind(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat_model(place / "my_model", byte_level(bos=True), max_position_embeddings=1024)
    jsonl(place / "pairs.jsonl", plain_pairs(10))
    config_file(place / "run.yaml", ALIGN | {"output_dir": "runs/new"})
    before = content(place)
    assert main(["inspect", "--config", "run.yaml", "--no_plan"]) == 0
    left = set(content(place)) - set(before)
    assert left and all(".isdaa_cache" in str(path) for path in left)  # the tokens, which training will read


# --- importance weights


@pytest.mark.parametrize("gap", [0.0, 1.5, 40.0])
def test_weights_are_those_that_training_says_before_its_first_step(
    place: Path, capsys: pytest.CaptureFixture[str], gap: float
) -> None:
    chat_model(place / "my_model", byte_level(bos=True), max_position_embeddings=1024)
    rows = [row | {"chosen_logps": -60.0 + gap, "rejected_logps": -58.0 + gap} for row in pairs()]
    jsonl(place / "pairs.jsonl", rows)
    settings = ALIGN | {"objective.method": "is_dpo", "data.eval_fraction": 0.0}
    (stage,) = told(place, capsys, settings, "--weights")["stages"]
    (line,) = [note for note in stage["notes"] if "before the first step" in note]
    assert not list(place.rglob("run.json"))
    code = main(["train", "--config", str(place / "run.yaml"), "--output_dir", "run"])
    out = "".join(capsys.readouterr())
    if line.startswith("`isdaa train` will refuse this: "):
        assert code == 2 and line.removeprefix("`isdaa train` will refuse this: ")[:150] in out
    else:
        assert code == 0 and line in out
    assert line.startswith("`isdaa train` will") == (gap == 40.0)


def test_weights_of_an_objective_without_them_are_named_as_missing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat_model(place / "my_model", byte_level(bos=True), max_position_embeddings=1024)
    jsonl(place / "pairs.jsonl", pairs())
    file = config_file(place / "run.yaml", ALIGN | {"objective.method": "dpo"})
    assert main(["inspect", "--config", str(file), "--no_plan", "--weights"]) == 2
    assert "no importance weights" in capsys.readouterr().err


def test_a_guard_that_only_keeps_says_which_falls_it_sees_and_none_without_a_scorer(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat_model(place / "my_model", byte_level(bos=True), max_position_embeddings=1024)
    jsonl(place / "pairs.jsonl", pairs())
    settings = ALIGN | {"guard.steps": 1, "guard.keep": "best", "guard.scorer": "gold", "align.max_steps": 8}
    (stage,) = told(place, capsys, settings)["stages"]
    assert any(line.startswith("guard: 8 measurements and") for line in stage["seen"])
    (stage,) = told(place, capsys, settings | {"guard.keep": "all", "guard.scorer": "none"})["stages"]
    assert not any("guard" in line for line in stage["seen"])
