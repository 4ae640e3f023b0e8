"""Two processes on the CPU, started by torchrun, do what one does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import CHAIN, config_file, read_lines, train, without_time
from own_records import write_own
from patience import HANGS
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from together import accelerate_environment, benchmark
from training_helpers import largest_difference, shuffled_run, token_rows

from isdaa.cli import main
from isdaa.models.loading import load_model, load_tokenizer
from isdaa.training.trainer.batches import TokenisedPairs
from isdaa.training.trainer.checkpoints import defect
from isdaa.training.trainer.reference_logps import shares_of

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "support" / "together.py"
# One epoch of 43 pairs in global batches of 8: the last one has 3, so that one process gets a fill-in.
ONE: dict[str, Any] = CHAIN | {"objective.normalize": "batch", "align.max_steps": None, "align.epochs": 1}
TWO: dict[str, Any] = ONE | {"sft.batch_size": 8, "align.batch_size": 4}
LORA: dict[str, Any] = {"lora.rank": 4, "align.gradient_checkpointing": True}


# Both of TRL's trainers. Their last batches would repeat rows where these do not divide among the processes: 48 do.
SUPERVISED: dict[str, Any] = {"stages": ["sft", "reward"], "sft.max_steps": None, "sft.epochs": 1, "data.limit": 48} | {
    f"{stage}.{key}": value
    for stage in ("sft", "reward")
    for key, value in {"gradient_accumulation_steps": 2, "learning_rate": 3e-3, "warmup_steps": 1}.items()
}
# One pair, of which there are fewer than processes; and three, in two micro-batches, cut into pieces.
PAIR: dict[str, Any] = {"data.limit": 1, "data.eval_fraction": 0.0, "align.epochs": 3}
FEW: dict[str, Any] = PAIR | {"data.limit": 3, "align.gradient_accumulation_steps": 2, "align.batch_tokens": 60}
# Its weights overflow in the second step.
BROKEN: dict[str, Any] = {
    f"{stage}.{key}": value
    for stage in ("sft", "align")
    for key, value in {"learning_rate": 1e38, "warmup_steps": 0, "lr_scheduler": "constant"}.items()
}


def alone(settings: dict[str, Any], home: Path) -> dict[str, Any]:
    """Alignment only, of what the whole chain made in one process."""
    made = {"model.path": str(home / "one" / "sft"), "data.pairs": str(home / "one" / "pairs" / "train.jsonl")}
    return settings | made | {"stages": ["align"], "model.random": None, "model.tokenizer": None}


def supervised(batch_size: int, home: Path) -> dict[str, Any]:
    """Supervised training and a reward model, of what the chain made; nothing of the pairs is held out."""
    pairs = str(home / "one" / "pairs" / "train.jsonl")
    sizes = {f"{stage}.batch_size": batch_size for stage in ("sft", "reward")}
    return alone(CHAIN, home) | SUPERVISED | sizes | {"data.pairs": pairs, "data.eval_pairs": pairs}


def adapter_of(model: Path, folder: Path) -> str:
    """An adapter alone, as supervised training by another program leaves it."""
    torch.manual_seed(3)
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load_model(model), settings).save_pretrained(folder)  # type: ignore[arg-type]
    load_tokenizer(model).save_pretrained(folder)
    return str(folder)


def torchrun(*program: str | Path, processes: int = 2) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, *map(str, program)]


def cut(path: Path) -> None:
    """As a kill leaves a file that is appended to: its second half is missing, and half a line more."""
    lines = path.read_bytes().splitlines(keepends=True)
    kept = lines[: len(lines) // 2 + 1]
    path.write_bytes(b"".join(kept[:-1]) + kept[-1][:20])


def label_half_done(home: Path) -> None:
    """`resumed`: the run of one process, killed in the middle of its labels, to be finished by two."""
    config_file(home / "resumed.yaml", ONE | {"stages": ["sft", "label"]})
    shutil.copytree(home / "one", home / "resumed")
    for name in ("model", "checkpoints"):
        shutil.rmtree(home / "resumed" / name)
    (home / "resumed" / "pairs" / "train.jsonl").unlink()
    cut(home / "resumed" / "pairs" / "responses.jsonl")
    state = json.loads((home / "resumed" / "run.json").read_text())
    del state["stages"]["align"]
    state["stages"]["label"]["done"] = False
    write_own(home / "resumed" / "run.json", state)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which one process has done everything, and then two have."""
    home = tmp_path_factory.mktemp("home")
    assert train(home / "one", ONE) == 0
    assert train(home / "lora-one", alone(ONE, home) | LORA) == 0
    assert train(home / "supervised-one", supervised(8, home)) == 0
    on_adapter = LORA | {"model.path": adapter_of(home / "one" / "sft", home / "adapter-folder")}
    assert train(home / "adapter-one", alone(ONE, home) | on_adapter) == 0
    for name, more in (("pair", PAIR), ("few", FEW)):
        assert train(home / f"{name}-one", alone(ONE, home) | more) == 0
    assert main(["evaluate", "--model_path", str(home / "one"), "--output", str(home / "evaluation-one")]) == 0
    assert benchmark(home / "one", home / "benchmark-one") == 0
    shuffled_run(home / "trainer-one", batch_size=8)
    config_file(home / "two.yaml", TWO)
    label_half_done(home)
    shutil.copytree(home / "evaluation-one", home / "evaluation-resumed")
    cut(home / "evaluation-resumed" / "samples.jsonl")
    shutil.copytree(home / "benchmark-one", home / "benchmark-resumed")
    cut(home / "benchmark-resumed" / "generations.jsonl")
    in_shards = {"fsdp2": {}, "fsdp2-lora": LORA, "fsdp2-stopped": {}}
    for name, more in {"lora": LORA, "adapter": on_adapter, "pair": PAIR, "few": FEW, **in_shards}.items():
        config_file(home / f"{name}.yaml", alone(TWO, home) | more)
    for name in ("supervised", "fsdp2-supervised"):
        config_file(home / f"{name}.yaml", supervised(4, home))
    for name in ("broken", "fsdp2-broken"):
        config_file(home / f"{name}.yaml", alone(TWO, home) | BROKEN)
    config_file(home / "broken-supervised.yaml", supervised(4, home) | BROKEN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(torchrun(PROGRAM), cwd=home, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr[-6000:]
    (home / "stderr").write_text(done.stderr)
    return home


def both_ranks(home: Path) -> list[dict[str, Any]]:
    """What each process noted."""
    return [json.loads((home / f"rank-{rank}.json").read_text()) for rank in range(2)]


def same_run(one: Path, other: Path) -> None:
    """Losses and figures of every logged step, and the weights at the end."""
    lines, others = (read_lines(run / "metrics.jsonl") for run in (one, other))
    assert len(lines) == len(others) >= 3
    for line, found in zip(lines, others, strict=True):
        assert line.keys() == found.keys()
        for key in line:
            if "time/" not in key and "accuracy" not in key:  # a tie at step 0 may go either way
                assert found[key] == pytest.approx(line[key], rel=2e-4, abs=2e-5), (line["step"], key)
    assert largest_difference(*(load_file(run / "model" / "model.safetensors") for run in (other, one))) < 2e-5


def test_a_run_that_is_not_finite_any_more_ends_on_every_process(home: Path) -> None:
    ranks = [found["not finite"] for found in both_ranks(home)]
    assert ranks[0] == ranks[1]  # the rows of both processes
    for name, said in zip(("broken", "broken-supervised", "fsdp2-broken"), ranks[0], strict=True):
        assert re.match(r"step [123]: (the|weights|held-out).* (is|are) not finite", said), said
        assert "a smaller learning rate (now 1e+38)" in said
        assert not any(stage["done"] for stage in json.loads((home / name / "run.json").read_text())["stages"].values())


def test_the_primitives(home: Path) -> None:
    ranks = [found["primitives"] for found in both_ranks(home)]
    assert ranks[0] == ranks[1] == {
        "dealt": [0, 1, 4, 9, 16, 25, 36],
        "few": [25],
        "once": "by 0, alone among 1",
        "everyones": [0, 1],
        "errors": ["three is not to be had", "the main process has failed"],
        "refused": ["a file: Permission denied", "a file: Permission denied"],
        "after": [0, 1],
    }  # fmt: skip


def test_sft_labels_and_alignment_are_those_of_one_process(home: Path) -> None:
    assert largest_difference(*(load_file(home / run / "sft" / "model.safetensors") for run in ("two", "one"))) < 1e-5
    pairs, others = (read_lines(home / run / "pairs" / "train.jsonl") for run in ("one", "two"))
    same_records(pairs, others)
    same_run(home / "one", home / "two")


def test_a_lora_run_too_with_gradient_checkpointing(home: Path) -> None:
    same_run(home / "lora-one", home / "lora")


def test_an_adapter_on_a_supervised_adapter(home: Path) -> None:
    same_run(home / "adapter-one", home / "adapter")


@pytest.mark.parametrize("name", ["pair", "few"])
def test_fewer_pairs_than_places_for_them(home: Path, name: str) -> None:
    same_run(home / f"{name}-one", home / name)


@pytest.mark.parametrize("name", ["supervised", "fsdp2-supervised"])
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_trls_trainers(home: Path, name: str, stage: str) -> None:
    ours, theirs = (load_file(home / run / stage / "model.safetensors") for run in (name, "supervised-one"))
    start = load_file(home / "one" / "sft" / "model.safetensors")
    assert largest_difference({k: theirs[k] for k in start}, start) > 1e-3
    assert largest_difference(ours, theirs) < 1e-5


def test_in_shards_a_stopped_run_ends_as_one_left_alone(home: Path) -> None:
    for name in ("model", "checkpoints/checkpoint-6"):
        ours, theirs = (load_file(home / run / name / "model.safetensors") for run in ("fsdp2-stopped", "fsdp2"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert without_time(home / "fsdp2-stopped" / "metrics.jsonl") == without_time(home / "fsdp2" / "metrics.jsonl")


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2-lora"])
def test_fsdp2_trains_as_one_process_does_and_leaves_plain_models(home: Path, name: str) -> None:
    same_run(home / ("one" if name == "fsdp2" else "lora-one"), home / name)
    for checkpoint in (home / name / "checkpoints").glob("checkpoint-*"):
        assert defect(checkpoint) is None
        assert (checkpoint / "optimizer.bin").is_file()  # as FSDP writes it: the run was sharded
        assert (checkpoint / ("adapter_model.safetensors" if "lora" in name else "model.safetensors")).is_file()


def test_weights_shuffled_over_the_global_batch(home: Path) -> None:
    one, two = (read_lines(home / f"trainer-{name}" / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for line, other in zip(one, two, strict=True):
        assert line.keys() == other.keys()
        for key in line:
            if "time/" not in key:
                assert other[key] == pytest.approx(line[key], rel=2e-4, abs=1e-5), key
    folders = [home / f"trainer-{name}" / "checkpoints" / "checkpoint-3" for name in ("one", "two")]
    assert all(defect(folder) is None for folder in folders)
    assert (folders[1] / "rng_state_1.pth").is_file()
    assert largest_difference(*(load_file(folder / "model.safetensors") for folder in reversed(folders))) < 5e-6


def same_records(records: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Equal but for the rounding of logps."""
    assert len(records) == len(others) > 0
    for record, other in zip(records, others, strict=True):
        assert record.keys() == other.keys()
        for key in record.keys() - {"seconds"}:
            numbers = key == "kl" or "logps" in key
            assert other[key] == (pytest.approx(record[key], abs=1e-4) if numbers else record[key]), key


def test_labels_that_one_process_began_are_finished_by_two(home: Path) -> None:
    same_records(*(read_lines(home / run / "pairs" / "train.jsonl") for run in ("one", "resumed")))


@pytest.mark.parametrize("which", ["two", "resumed"])
def test_evaluation_is_that_of_one_process(home: Path, which: str) -> None:
    for name in ("samples.jsonl", "scores.jsonl", "pairs.jsonl"):
        same_records(*(sorted_blocks(read_lines(home / f"evaluation-{run}" / name)) for run in ("one", which)))


@pytest.mark.parametrize("which", ["two", "resumed"])
def test_a_benchmark_is_that_of_one_process(home: Path, which: str) -> None:
    one, other = home / "benchmark-one", home / f"benchmark-{which}"
    answers, others = ({line["key"]: line for line in read_lines(run / "generations.jsonl")} for run in (one, other))
    assert len(answers) == 33  # of two checkpoints and of their reference
    assert others == answers
    metrics, found = (json.loads((run / "metrics.json").read_text()) for run in (one, other))
    assert found["models"] == metrics["models"] and found["sentence"] == metrics["sentence"]
    assert (other / "report.html").is_file()


def sorted_blocks(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(lines, key=lambda line: str(line["block"]))  # stable: a block's records stay in their order


def test_the_forward_in_shards_is_the_whole_ones(home: Path) -> None:
    for found in (rank["fully_shard"] for rank in both_ranks(home)):
        assert len(found) == 4
        assert all(difference < 1e-5 for both in found.values() for difference in both), found


def test_one_process_speaks(home: Path) -> None:
    lines = (home / "stderr").read_text().splitlines()
    for said in ("sft: finished, two/sft", "align: finished, two/model", "align: finished, fsdp2/model"):
        assert lines.count(said) == 1


def test_a_resumed_run_has_as_many_processes_as_it_began_with(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = json.loads((home / "two" / "run.json").read_text())
    assert state["stages"]["align"]["processes"] == 2
    stopped = home / "two" / "run.json"
    text = stopped.read_text()
    try:
        state["stages"]["align"]["done"] = False
        write_own(stopped, state)
        assert main(["train", "--config", str(home / "two.yaml"), "--output_dir", str(home / "two")]) == 2
    finally:
        stopped.write_text(text)
    assert "its align stage began with 2 processes, this start has 1" in capsys.readouterr().err


def test_bad_input_is_said_once(home: Path) -> None:
    (first, said), (second, too) = (found["bad input"] for found in both_ranks(home))
    assert first == second == 2
    (line,) = said + too
    assert line.startswith("isdaa: error: ") and "objective.beta = 0.05, this one 3.0" in line


def test_a_fault_of_one_process_is_said_once_with_its_traceback(home: Path) -> None:
    (first, said), (second, too) = (found["fault"] for found in both_ranks(home))
    assert first == second == 1
    (line,) = said + too
    assert r"a fault of isdaa: RuntimeError: process 1: KeyError: '\x1b[31m'" in line
    (file,) = home.glob("isdaa-fault-*")
    assert "in broken" in file.read_text()


def test_processes_get_about_as_many_tokens_and_prompts_stay_whole() -> None:
    rows = token_rows(60)
    for row in rows[50:]:
        row["prompt_ids"] = rows[0]["prompt_ids"]
    pairs = TokenisedPairs(rows)
    prompts = pairs.prompt_groups()
    tokens = [0] * (int(prompts.max()) + 1)  # of all pairs of a prompt, the prompt counted once
    for prompt, row in zip(prompts.tolist(), rows, strict=True):
        tokens[prompt] += len(row["chosen_ids"]) + len(row["rejected_ids"]) + (0 if tokens[prompt] else len(row["prompt_ids"]))
    for world in (2, 3):
        shares = shares_of(pairs, prompts, world)
        assert shares.shape == (len(tokens),) and set(shares) == set(range(world))
        loads = [sum(n for n, share in zip(tokens, shares, strict=True) if share == rank) for rank in range(world)]
        assert max(loads) - min(loads) <= min(tokens)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_takes_the_configurations(path: Path) -> None:
    environment = accelerate_environment(path)
    said = path.read_text()
    assert environment.get("ACCELERATE_USE_FSDP") == ("true" if path.stem == "fsdp2" else None)
    assert environment.get("ACCELERATE_USE_DEEPSPEED") == ("true" if "deepspeed" in path.stem else None)
    if path.stem == "fsdp2":
        assert environment["FSDP_VERSION"] == "2" and environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    if "deepspeed" in path.stem:
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == path.stem[-1]
        assert environment["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"
    assert f"configs/accelerate/{path.name}" in said
    assert path.name in (ROOT / "docs" / "devices.md").read_text()
