"""`isdaa train --continue_from`: the old run's weights, its reference and its settings, in a run of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from chains import (
    ALIGN,
    CHAIN,
    chat_model,
    content,
    jsonl,
    plain_pairs,
    read_lines,
    refused,
    same_weights,
    stopped_at,
    train,
    weights,
    without_time,
)
from own_records import write_own
from safetensors.torch import load_file

from isdaa.cli import main
from isdaa.config import Config, resolved
from isdaa.data.reading.sources import opened
from isdaa.errors import UserError
from isdaa.models.loading import load_model, load_tokenizer
from isdaa.models.saving import save_model
from isdaa.record import read_record
from isdaa.training.model_card import model_card
from isdaa.training.preflight import revision_of
from isdaa.training.stages.continued import ancestor_of, config_of, told
from isdaa.training.trainer import reference_logps
from isdaa.training.trainer.preference_trainer import PreferenceTrainer

SETTINGS = ALIGN | {"objective.method": "is_dpo", "align.max_steps": 4, "align.learning_rate": 1e-2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `my_model`, `pairs.jsonl`, and a finished run each with all weights (`old`) and with an adapter (`lora`)."""
    folder = tmp_path_factory.mktemp("made")
    chat_model(folder / "my_model")
    jsonl(folder / "pairs.jsonl", plain_pairs(12))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train("old", SETTINGS) == 0
        assert train("lora", SETTINGS | {"lora.rank": 2}) == 0
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def go_on(name: str, *options: str, output: str = "new") -> int:
    return main(["train", "--continue_from", name, "--output_dir", output, *options])


def state(run: str = "new") -> dict[str, Any]:
    return json.loads(Path(run, "run.json").read_text())["stages"]["align"]


def test_one_more_epoch_begins_with_the_weights_and_keeps_the_reference(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(place / "old")
    assert go_on("old", "--align.epochs", "1", "--align.learning_rate", "0.001") == 0
    said = capsys.readouterr().err
    assert "goes on from old/checkpoints/checkpoint-4 (step 4); π_ref is that run's, my_model" in said
    assert "align.epochs" not in said  # 1.0 as before
    assert "align.max_steps is None; it was 4 in old" in said and "align.learning_rate is 0.001; it was 0.01 in old" in said
    assert "μ is assumed to be π_ref" in said and "already moved away from its reference" in said
    assert content(place / "old") == before
    first = read_lines(place / "new" / "metrics.jsonl")[0]
    assert first["drift/chosen"] != 0 and abs(first["weights/mean"] - 1) > 1e-3  # not its own reference
    record = read_record(place / "new" / "model")
    assert record is not None and record.reference is not None and Path(record.reference).resolve() == place / "my_model"
    assert record.continued is not None
    assert record.continued == state()["continued"] | {"reference": str(place / "my_model")}
    assert record.continued["step"] == record.continued["steps_before"] == 4 and not record.continued["optimizer"]
    assert Path(record.continued["from"]) == place / "old" / "checkpoints" / "checkpoint-4"
    card = (place / "new" / "model" / "README.md").read_text()
    assert "goes on from: `old/checkpoint-4`, optimiser step 4, without the optimiser's state" in card
    assert "reference π_ref: `my_model`" in card


def test_it_is_the_run_that_one_would_configure_by_hand(place: Path) -> None:
    """And its weights before the first step are those of the checkpoint: a learning rate of 0 leaves them."""
    assert go_on("old/checkpoint-2", "--align.max_steps", "2") == 0
    by_hand = {"model.path": "old/checkpoints/checkpoint-2", "reference.path": "my_model", "align.max_steps": 2}
    assert train("hand", SETTINGS | by_hand) == 0
    assert same_weights(place / "new" / "model", place / "hand" / "model")
    assert without_time(place / "new" / "metrics.jsonl") == without_time(place / "hand" / "metrics.jsonl")
    assert go_on("old/checkpoints/checkpoint-2", "--align.learning_rate", "0", output="still") == 0
    assert same_weights(place / "still" / "model", place / "old" / "checkpoints" / "checkpoint-2")


def test_the_optimiser_goes_on_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All pairs a step, at a constant rate: two steps more are then the last two of the run that was not interrupted."""
    constant = {"align.lr_scheduler": "constant", "align.warmup_steps": 0, "align.batch_size": 16, "data.eval_fraction": 0.0}
    assert train("whole", SETTINGS | constant) == 0
    capsys.readouterr()
    assert go_on("whole/checkpoint-2", "--continue_optimizer", "--align.max_steps", "2") == 0
    assert "the optimiser's state is kept, the learning-rate schedule starts again" in capsys.readouterr().err
    assert go_on("whole/checkpoint-2", "--align.max_steps", "2", output="without") == 0
    wanted = weights(place / "whole" / "model")

    def apart(run: str) -> float:
        return max(float((tensor - wanted[name]).abs().max()) for name, tensor in weights(place / run / "model").items())

    assert apart("new") < 1e-5 < 1e-3 < apart("without")
    assert state()["continued"]["optimizer"] is True and "optimiser states" in state()["pinned"]
    again = ["train", "--continue_from", "whole/checkpoint-2", "--output_dir", "new", "--align.max_steps", "2"]
    refused(capsys, again, "continue_optimizer = True, this one False")


@pytest.mark.parametrize(
    ("old", "optimizer"), [("old", []), ("lora", ["--continue_optimizer"])], ids=["weights anew", "adapter and optimizer"]
)
def test_a_kill_costs_nothing(old: str, optimizer: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--align.max_steps", "4", "--align.save_steps", "2", *optimizer]
    assert go_on(old, *options, output="whole") == 0
    step = PreferenceTrainer.training_step
    for stop in (1, 3):  # before the first checkpoint, and behind it

        def stopping(self: Any, *args: Any, stop: int = stop, **kwargs: Any) -> Any:
            if self.state.global_step == stop:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PreferenceTrainer, "training_step", stopping)
            assert go_on(old, *options) == 130
    capsys.readouterr()
    assert go_on(old, *options) == 0
    assert "align: goes on at step 2 of 4 (checkpoint-2)" in capsys.readouterr().err
    assert same_weights(place / "new" / "model", place / "whole" / "model")
    assert without_time(place / "new" / "metrics.jsonl") == without_time(place / "whole" / "metrics.jsonl")
    assert state()["continued"] == state("whole")["continued"]


def test_an_adapter_is_trained_on_and_its_base_stays(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go_on("lora", "--align.learning_rate", "0", "--align.max_steps", "2", output="still") == 0
    assert same_weights(place / "still" / "model", place / "lora" / "model")
    assert go_on("lora", "--align.max_steps", "2") == 0
    assert "π_ref is that run's, my_model" in capsys.readouterr().err
    before, after = (load_file(place / run / "adapter_model.safetensors") for run in LAST_ADAPTERS)
    assert before.keys() == after.keys() and not all(before[name].equal(after[name]) for name in before)
    old, new = (json.loads((place / run / "adapter_config.json").read_text()) for run in LAST_ADAPTERS)
    assert new == old and new["r"] == 2
    assert read_lines(place / "new" / "metrics.jsonl")[0]["drift/chosen"] != 0
    shutil.rmtree(place / "lora" / "checkpoints")
    refused(
        capsys,
        ["train", "--continue_from", "lora", "--output_dir", "other"],
        "its adapter is merged into its weights",
        "--model.path",
    )


LAST_ADAPTERS = ("lora/checkpoints/checkpoint-4", "new/checkpoints/checkpoint-2")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["old"], ["output_dir", "--output_dir"]),
        (["old", "--output_dir", "old"], ["output_dir: old", "name a new folder"]),
        (["old", "--output_dir", "old/again"], ["output_dir: old/again", "or inside it"]),
        (["old/checkpoint-3", "--output_dir", "new"], ["old/checkpoint-3", "checkpoint-2, checkpoint-4"]),
        (["odl", "--output_dir", "new"], ["odl", 'did you mean "old"']),
        (
            ["my_model", "--output_dir", "new", "--data.pairs", "pairs.jsonl"],
            ["my_model", "not a run of isdaa", "--reference.path"],
        ),
        (["elsewhere", "--output_dir", "new"], ["elsewhere", "a trainer's output", "checkpoint-7"]),
        (["lora/checkpoint-2/../adapter", "--output_dir", "new"], ["no such folder"]),
        (["old", "--output_dir", "new", "--model.path", "other"], ["model.path: other", "continue_from: old"]),
        (["old", "--output_dir", "new", "--stages", "sft", "align"], ["stages: sft"]),
        (["old/model", "--output_dir", "new", "--continue_optimizer"], ["continue_optimizer", "optimizer.pt", "checkpoint-N"]),
        (["old", "--output_dir", "new", "--continue_optimizer", "--align.optimizer", "sgd"], ["state of adamw", "sgd"]),
        (["lora", "--output_dir", "new", "--lora.rank", "4"], ["lora.rank", "has 2, not 4", "--model.path"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_what_cannot_be_gone_on_with_is_one_line(
    argv: list[str], words: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "elsewhere" / "checkpoint-7").mkdir(parents=True)
    refused(capsys, ["train", "--continue_from", *argv], *words)
    assert not (place / "new").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("continue_from: 3.5\n", ["3.5"]),
        ("continue_from: [old]\n", ["bad.yaml: continue_from"]),
        ("continue_from: ''\n", ["bad.yaml: continue_from", "expected some text"]),
        ("continue_from: old\nlora: 3\n", ["bad.yaml: lora"]),
        ("continue_from: old\ndata: x\n", ["bad.yaml: data"]),
        ("continue_from: old\nalign: {bta: 1}\n", ["bad.yaml: align.bta: unknown key"]),
        ("continue_from: old\nstages: 7\n", ["bad.yaml: stages"]),
        ("continue_from: old\noutput_dir: [x]\n", ["bad.yaml: output_dir"]),
        ("continue_from: old\ncontinue_optimizer: perhaps\n", ["bad.yaml: continue_optimizer"]),
    ],
    ids=range(9),
)
def test_a_mistake_in_a_file_is_one_line(text: str, words: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text(text)
    options = [] if "output_dir" in text else ["--output_dir", "new"]
    refused(capsys, ["train", "--config", "bad.yaml", *options], *words)


def test_changed_weights_an_unfinished_and_a_strangers_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "--output_dir", "new", "--continue_from"]
    stopped_at(3, SETTINGS, place / "half")
    refused(
        capsys, [*argv, "half"], "has not finished", "isdaa train --config half/config.yaml", "--continue_from half/checkpoint-2"
    )
    assert main([*argv, "half/checkpoint-2", "--align.max_steps", "1"]) == 0
    shutil.rmtree(place / "new")
    file = place / "old" / "checkpoints" / "checkpoint-4" / "model.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    refused(capsys, [*argv, "old"], "checkpoint-4", "have changed since they were written (model.safetensors is damaged)")
    shutil.rmtree(file.parent)
    assert main([*argv, "old", "--align.max_steps", "1"]) == 0
    assert read_record(place / "new" / "model").continued["from"] == str(place / "old" / "model")  # type: ignore[union-attr,index]
    strange = json.loads(Path("lora/run.json").read_text())
    strange["seal"] = "0" * 64
    Path("lora/run.json").write_text(json.dumps(strange))
    refused(capsys, ["train", "--output_dir", "third", "--continue_from", "lora"], "not a run of yours", "--adopt")
    assert main(["train", "--output_dir", "third", "--continue_from", "lora", "--adopt", "--align.max_steps", "1"]) == 0


def test_a_run_that_its_guard_stopped_asks_which_weights(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(Path("old/run.json").read_text())
    record["stages"]["align"]["guard"] = {"best_step": 2, "stopped": {"step": 4, "peak_step": 2}}
    write_own(place / "old" / "run.json", record)
    argv = ["train", "--output_dir", "new", "--continue_from", "old"]
    refused(
        capsys, argv, "stopped it at step 4", "old/checkpoints/checkpoint-2 (step 2, its highest win rate)", "old/model (step 4"
    )
    shutil.copytree("old/model", "old/best")
    refused(capsys, argv, "old/best (step 2, its highest win rate)", "old/model (step 4, after the fall)")
    assert main([*argv[:-1], "old/best", "--align.max_steps", "1"]) == 0
    assert state()["continued"]["from"] == str(place / "old" / "best")


def test_a_moved_run_and_a_chain_of_runs_keep_the_first_reference(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go_on("old", "--align.max_steps", "2", "--continue_optimizer", output="second") == 0
    away = tmp_path / "moved"
    away.mkdir()
    for name in ("old", "second", "my_model"):
        shutil.move(name, away / name)
    shutil.copy("pairs.jsonl", away)
    monkeypatch.chdir(away)
    assert go_on("second", "--align.max_steps", "1", output="third") == 0
    assert "π_ref is that run's, my_model" in capsys.readouterr().err
    record = read_record("third/model")
    assert record is not None and record.continued is not None and record.reference is not None
    assert Path(record.reference).resolve() == away / "my_model"
    assert (record.continued["step"], record.continued["steps_before"]) == (2, 6)
    assert record.continued["optimizer"] is False  # asked for once
    assert "optimiser step 2 (6 with those of the runs before it)" in Path("third/model/README.md").read_text()
    shutil.rmtree("my_model")
    refused(capsys, ["train", "--continue_from", "second", "--output_dir", "x"], "my_model", "is missing")


def test_another_method_and_more_data(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new method has its own settings, and prompts that the old run was trained on are not held out in silence."""
    assert go_on("old", "--objective.method", "dpo", "--data.limit", "11", "--data.pairs", "pairs.jsonl", "--seed", "9") == 0
    said = capsys.readouterr().err
    assert "objective.weight is 'none'; it was 'importance' in old" in said
    held, before = ({row["prompt"] for row in read_lines(Path(run, "eval_pairs.jsonl"))} for run in ("new", "old"))
    assert f"old was trained on {len(held - before)} of the held-out prompts: held-out metrics look too good" in said
    assert "data.eval_pairs old/eval_pairs.jsonl" in said
    assert go_on("old", "--data.pairs", "more.jsonl", output="x") == 2
    jsonl(place / "more.jsonl", plain_pairs(30)[12:])
    assert go_on("old", "--data.pairs", "more.jsonl", "--align.max_steps", "1", output="y") == 0
    assert "was trained on" not in capsys.readouterr().err
    files = ("pairs.jsonl", "more.jsonl", "old/eval_pairs.jsonl", "y/eval_pairs.jsonl")
    every, more, held, held_too = (
        {(row["prompt"], row[side]) for row in read_lines(Path(file)) for side in ("chosen", "rejected")} for file in files
    )
    trained = (every - held) | (more - held_too)  # by both runs, for whoever judges it
    assert state("y")["trained_on"]["responses"] == len(trained)


@pytest.mark.parametrize("own_file", [False, True])
def test_another_method_is_that_method(own_file: bool, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the old run's file and without: β and what else was chosen stay, what the old method brings goes."""
    chosen = {"objective.method": "is_rpo", "objective.beta": 0.07, "objective.sft_coefficient": 0.02, "align.max_steps": 1}
    assert train("chosen", SETTINGS | chosen) == 0
    assert "objective.method is is_rpo with sft_coefficient 0.02 (0.005) (in brackets" in capsys.readouterr().err
    file = ["--config", "chosen/config.yaml"] if own_file else []
    assert go_on("chosen", *file, "--objective.method", "chi_po", "--align.max_steps", "1") == 0
    said = capsys.readouterr().err
    assert "objective.method is chi_po with sft_coefficient 0.02 (0.0) (in brackets: chi_po's own values)" in said
    assert "objective.weight is 'none'; it was 'importance' in chosen" in said and "objective.beta" not in said
    card = (place / "new" / "model" / "README.md").read_text()
    assert "## Method: `chi_po`, changed\n" in card and "in brackets): sft_coefficient 0.02 (0.0)" in card
    plain = ["--objective.method", "chi_po", "--objective.sft_coefficient", "preset", "--align.max_steps", "1"]
    assert go_on("chosen", *file, *plain, output="plain") == 0
    assert "own values" not in capsys.readouterr().err
    assert "## Method: `chi_po`\n" in (place / "plain" / "model" / "README.md").read_text()
    named = {"continue_from": "chosen", "output_dir": "x", "align.epochs": 2}
    assert config_of(file[-1] if own_file else None, named).align.max_steps is None


def test_all_runs_before_are_asked_for_held_out_prompts(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jsonl(place / "more.jsonl", plain_pairs(30)[12:])
    more = ["--data.pairs", "more.jsonl", "--align.max_steps", "1"]
    assert go_on("old", *more, output="second") == 0
    capsys.readouterr()
    again = ["--data.pairs", "pairs.jsonl", "--seed", "9", "--align.max_steps", "1"]
    assert go_on("second", *again, output="third") == 0
    assert "old was trained on" in (said := capsys.readouterr().err) and "second was trained on" not in said
    shutil.rmtree("old")
    assert go_on("second", *again, output="fourth") == 0
    assert "whether the run before second was trained on held-out prompts is not known" in capsys.readouterr().err


def test_pairs_of_its_own_are_labelled_anew(place: Path) -> None:
    given = {"continue_from": "old", "output_dir": "new", "data.prompts": "pairs.jsonl", "label.scorer": "gold"}
    config = config_of(None, given | {"stages": ["label", "align"]})
    assert config.data.pairs is None and config.trains_on_labelled and config.stages == ["label", "align"]
    assert config_of(None, given | {"stages": ["label", "align"], "data.pairs": "other.jsonl"}).data.pairs == "other.jsonl"


def test_a_file_may_say_it_and_the_old_run_s_own_file_may_be_given(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("next.yaml").write_text("continue_from: old\noutput_dir: new\nalign: {max_steps: 1}\n")
    assert main(["train", "--config", "next.yaml"]) == 0
    assert main(["train", "--config", "new/config.yaml"]) == 0
    assert main(["train", "--config", "old.yaml", "--continue_from", "old", "--output_dir", "b", "--align.max_steps", "1"]) == 0
    assert same_weights(place / "b" / "model", place / "new" / "model")
    capsys.readouterr()
    assert main(["inspect", "--continue_from", "old", "--output_dir", "c", "--no_plan"]) == 0
    refused(capsys, ["demo", "--config", "old.yaml", "--continue_from", "old"], "continue_from")
    refused(capsys, ["train", "--model.path", "my_model", "--data.pairs", "pairs.jsonl", "--continue_optimizer"], "continue_from")


def test_another_program_s_weights_with_a_named_reference(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("old/model", "theirs", ignore=shutil.ignore_patterns("isdaa*"))
    options = ["--reference.path", "my_model", "--data.pairs", "pairs.jsonl", "--align.max_steps", "1"]
    assert go_on("theirs", *options) == 0
    assert "goes on from theirs; π_ref is my_model" in capsys.readouterr().err
    assert state()["continued"]["run"] is None


def test_the_dead_end_names_the_way(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "--config", "old.yaml", "--output_dir", "old", "--align.epochs", "61"]
    refused(capsys, argv, "holds a different run", "align.epochs = 1.0", "--continue_from old --output_dir NEW")


def test_a_chain_gives_pairs_reference_and_reward_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train("chain", CHAIN) == 0
    capsys.readouterr()
    assert go_on("chain", "--align.max_steps", "2") == 0
    said = capsys.readouterr().err
    assert "π_ref is that run's, chain/sft" in said and "data.pairs is" not in said
    assert "μ comes from the rows' own behaviour logps" in said
    assert "was trained on" not in said  # the same prompts are held out
    assert Path("new/eval_pairs.jsonl").read_bytes() == Path("chain/eval_pairs.jsonl").read_bytes()
    assert main(["evaluate", "--model_path", "new", "--evaluation.prompts", "4"]) == 0
    found = json.loads(Path("new/evaluation/metrics.json").read_text())
    assert Path(found["reference"]["path"]).resolve() == tmp_path / "chain" / "sft"


def test_a_reference_of_the_hub_keeps_its_revision(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads(Path("old/checkpoints/checkpoint-4/isdaa.json").read_text())
    write_own(place / "old" / "checkpoints" / "checkpoint-4" / "isdaa.json", record | {"reference": "me/base"})
    shutil.rmtree("old/checkpoints/checkpoint-2")
    (place / "old" / "checkpoints" / "checkpoint-4" / "isdaa_manifest.json").unlink()
    run = json.loads(Path("old/run.json").read_text())
    begun = run["stages"]["align"]
    begun["values"] |= {"model.path": "me/base", "model.revision": "v2"}
    begun["inputs"]["model.path"] = {"revision": "a" * 40}
    write_own(place / "old" / "run.json", run)
    named = {"continue_from": "old/checkpoint-4", "output_dir": "new"}
    config = config_of(None, named)
    assert (config.reference.path, config.reference.revision, config.model.revision) == ("me/base", "v2", None)
    assert revision_of(config, "me/base") == "v2" and revision_of(config, str(config.model.path)) is None
    ref = place / "hub" / "models--me--base" / "refs" / "v2"
    ref.parent.mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
    ref.write_text("a" * 40)
    assert config_of(None, named) == config
    ref.write_text("b" * 40)  # the branch has moved on
    with pytest.raises(UserError, match=f"me/base, has changed since .*--reference.revision {'a' * 40}"):
        config_of(None, named)
    assert config_of(None, named | {"reference.revision": "a" * 40}).reference.revision == "a" * 40


# ---------------------------------------------------------------------------------------------------------------------
# What the old run read is no longer what it was, or lies elsewhere


def _adapter_of_this_base() -> None:
    """In the copied folder, `lora` still names the base in the first one."""
    shutil.rmtree("lora")
    assert train("lora", SETTINGS | {"lora.rank": 2}) == 0


@pytest.mark.parametrize("name", ["old", "old/checkpoint-2", "old/model", "old/best", "lora", "lora/checkpoint-2"])
def test_another_model_in_the_reference_s_place_is_refused(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "old/best":
        shutil.copytree("old/model", name)
    if name.startswith("lora"):
        _adapter_of_this_base()
    for file in Path("my_model").iterdir():  # touched alone
        file.touch()
    named = {"continue_from": name, "output_dir": "new"}
    assert config_of(None, named).reference.path == "my_model"
    shutil.copytree("my_model", "kept")
    chat_model(place / "my_model", seed=1)
    argv = ["train", "--continue_from", name, "--output_dir", "new"]
    words = ["reference, my_model, has changed since (model.safetensors)", "--reference.path"]
    refused(capsys, argv, *words)
    refused(capsys, [*argv, "--reference.path", "my_model"], *words)
    assert not (place / "new").exists()
    other = [*argv, "--reference.path", "kept", "--align.max_steps", "1"]
    if name.startswith("lora"):  # the adapter would still sit on another base
        refused(capsys, other, "the base of this adapter", "my_model, has changed since", "--model.path lora/model")
    elif name == "old":
        assert main(other) == 0
        assert "π_ref is that run's, kept" in capsys.readouterr().err


def test_a_base_that_an_adapter_s_second_run_inherited(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second run noted its base beneath the first one's adapter, and another reference."""
    chat_model(place / "other", seed=3)
    _adapter_of_this_base()
    assert (
        go_on("lora", "--reference.path", "other", "--align.max_steps", "1", "--objective.allow_stall", "true", output="second")
        == 0
    )
    named = {"continue_from": "second", "output_dir": "third"}
    assert config_of(None, named).reference.path == "other"
    chat_model(place / "my_model", seed=1)
    refused(
        capsys, ["train", "--continue_from", "second", "--output_dir", "third"], "the base of this adapter", "model.safetensors"
    )


def test_a_reference_and_a_base_that_are_gone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _adapter_of_this_base()
    shutil.move("my_model", "moved")
    argv = ["train", "--continue_from", "old", "--output_dir", "new", "--align.max_steps", "1"]
    refused(capsys, argv, "my_model is missing", "--reference.path")
    assert main([*argv, "--reference.path", "moved"]) == 0
    assert "π_ref is that run's, moved" in capsys.readouterr().err  # the same files
    chat_model(place / "different", seed=1)
    assert main([*argv[:4], "more", *argv[5:], "--reference.path", "different"]) == 0
    assert "π_ref is different, not " in capsys.readouterr().err
    refused(
        capsys, ["train", "--continue_from", "lora", "--output_dir", "x", "--reference.path", "moved"], "the base of this adapter"
    )


def test_data_that_was_changed_in_place_is_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in read_lines(place / "pairs.jsonl")]
    assert go_on("old", "--align.max_steps", "1", output="before") == 0
    assert "is not what it was" not in capsys.readouterr().err
    jsonl(place / "pairs.jsonl", rows)
    assert go_on("old", "--align.max_steps", "1") == 0
    said = capsys.readouterr().err
    assert "data.pairs: pairs.jsonl is not what it was for the old run (changed: pairs.jsonl)" in said
    assert "whether old was trained on held-out prompts is not known" in said and "old/eval_pairs.jsonl holds out" in said
    jsonl(place / "other.jsonl", plain_pairs(12))
    assert go_on("old", "--align.max_steps", "1", "--data.pairs", "other.jsonl", output="elsewhere") == 0
    assert "is not what it was" not in capsys.readouterr().err  # it does not read that file


def test_places_are_the_old_run_s_from_any_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each name that a run takes has its like in the other folder, which the old run did not mean."""
    for name in ("held.jsonl", "author", "rewards", "prompts.jsonl"):
        shutil.copytree("my_model", name) if "." not in name else shutil.copy("pairs.jsonl", name)
    given = {
        "data.eval_pairs": "held.jsonl",
        "behaviour.model_path": "author",
        "evaluation.scorer": "rewards",
        "data.prompts": "prompts.jsonl",
        "model.tokenizer": "my_model",
        "label.scorer": "gold",
    }
    assert train("runs/all", SETTINGS | given | {"align.max_steps": 1}) == 0
    assert go_on("runs/all", "--align.max_steps", "1", output="runs/second") == 0
    away = place / "away"
    shutil.copytree(place, away, ignore=shutil.ignore_patterns("runs", "away"))
    for folder in (place, away, place / "runs", place / "runs" / "all"):
        monkeypatch.chdir(folder)
        for run, own_file in (("all", False), ("all", True), ("second", False)):
            name = str(place / "runs" / run)
            found = config_of(
                f"{name}/config.yaml" if own_file else None, {"continue_from": name, "output_dir": str(place / "x")}
            )
            data, model = found.data, found.model
            places = [data.pairs, data.eval_pairs, data.prompts, found.behaviour.model_path, found.evaluation.scorer]
            wanted = ["pairs.jsonl", "held.jsonl", "prompts.jsonl", "author", "rewards"]
            assert [Path(str(one)).resolve() for one in places] == [place / one for one in wanted]
            assert Path(str(model.tokenizer)).resolve() == place / "my_model" == Path(str(found.reference.path)).resolve()
            assert found.label.scorer == "gold"
            if folder == place:
                assert [*places, model.tokenizer] == [*wanted, "my_model"]  # as they were typed


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def test_an_edited_file_of_the_old_run_does_not_decide(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = yaml.safe_load(Path("old/config.yaml").read_text())
    settings["objective"] |= {"beta": 0.4, "allow_stall": True}
    settings["model"]["trust_remote_code"] = True
    settings["tokenization"] |= {"max_length": 150, "chat_template_kwargs": {"a": 1}}
    Path("old/config.yaml").write_text(yaml.safe_dump(settings))
    found = config_of(None, {"continue_from": "old", "output_dir": "new"})
    assert found.objective.arguments()["beta"] == 0.1 and not found.objective.allow_stall and not found.model.trust_remote_code
    assert (found.tokenization.max_length, found.tokenization.chat_template_kwargs) == (200, {})
    assert go_on("old", "--align.max_steps", "1") == 0
    said = capsys.readouterr().err
    assert "old/config.yaml was changed; the run was trained with objective.beta 0.1 (not 0.4)" in said
    assert "tokenization.max_length 200 (not 150)" in said and "objective.beta is" not in said
    assert "objective.beta 0.1 (not 0.4)" in Path("new/run.json").read_text()
    named = ["--config", "old/config.yaml", "--model.trust_remote_code", "false", "--align.max_steps", "1"]
    assert go_on("old", *named, output="given") == 0
    said = capsys.readouterr().err
    assert "objective.beta is 0.4; it was 0.1 in old" in said
    assert "tokenization.chat_template_kwargs.a is 1; it was None in old" in said


def test_stages_that_are_named_are_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = json.loads(Path("old/run.json").read_text())
    run["stages"] = {"sft": {"done": True}, "label": {"done": True, "values": {"label.scorer": "gold", "label.top_k": 3}}} | run[
        "stages"
    ]
    run["stages"]["align"]["values"]["data.pairs"] = None
    write_own(place / "old" / "run.json", run)
    settings = yaml.safe_load(Path("old/config.yaml").read_text())
    settings |= {"stages": ["sft", "label", "align"]}
    settings["data"] |= {"pairs": None, "prompts": "pairs.jsonl", "sft": "pairs.jsonl"}
    settings["label"] |= {"scorer": "gold", "top_k": 5}
    Path("old/config.yaml").write_text(yaml.safe_dump(settings))
    named: dict[str, Any] = {"continue_from": "old", "output_dir": "new"}
    for path in (None, "old/config.yaml"):
        assert config_of(path, named).stages == ["align"]
        again = config_of(path, named | {"stages": ["label", "align"]})
        assert again.stages == ["label", "align"] and again.trains_on_labelled and again.data.pairs is None
        assert again.label.top_k == (3 if path is None else 5)  # of `run.json`, but where the file is given
        both = config_of(path, named | {"stages": ["reward", "align"]})
        assert both.stages == ["reward", "align"] and both.data.pairs == "old/pairs/train.jsonl"
        with pytest.raises(UserError, match="stages: sft would start"):
            config_of(path, named | {"stages": ["sft", "label", "align"]})
    Path("next.yaml").write_text(yaml.safe_dump(named | {"stages": ["label", "align"]}))
    assert config_of("next.yaml").stages == ["label", "align"]
    settings |= {"stages": ["label", "align"], "output_dir": "old"}  # and a second run of the kind resumes by its own file
    Path("old/config.yaml").write_text(yaml.safe_dump(settings))
    written = resolved(config_of(None, named | {"stages": ["label", "align"]}))
    Path("written.yaml").write_text(yaml.safe_dump(written))
    assert resolved(config_of("written.yaml")) == written


def test_prompts_and_pairs_of_an_old_label_stage_that_changed(place: Path) -> None:
    rows = [row for row, _ in opened("world:small", "train", "prompts", limit=24)[1]]
    jsonl(place / "prompts.jsonl", rows)
    assert train("chain", CHAIN | {"data.prompts": "prompts.jsonl", "data.limit": 24}) == 0
    named = {"continue_from": "chain", "output_dir": "new"}
    again, alone = config_of(None, named | {"stages": ["label", "align"]}), config_of(None, named)

    def changed(config: Config) -> list[str]:
        return [line for line in told(ancestor_of("chain"), config) if "is not what it was" in line]

    assert changed(again) == changed(alone) == []
    assert "stages: align; the old run had sft, label, align" in told(ancestor_of("chain"), alone)
    jsonl(place / "prompts.jsonl", rows[1:])
    assert changed(alone) == [] and [line.split(" is ")[0] for line in changed(again)] == ["data.prompts: prompts.jsonl"]
    file = place / "chain" / "pairs" / "train.jsonl"
    jsonl(file, read_lines(file)[1:])
    assert [line.split(" is ")[0] for line in changed(alone)] == ["pairs/train.jsonl: chain/pairs/train.jsonl"]
    assert len(changed(again)) == 1  # which makes others
    model = load_file("chain/sft/model.safetensors")
    shutil.rmtree("chain/sft")  # its reference; another one in its place, whole
    save_model(load_model("chain/model"), load_tokenizer("chain/model"), place / "chain" / "sft")
    assert not all(tensor.equal(model[key]) for key, tensor in load_file("chain/sft/model.safetensors").items())
    with pytest.raises(UserError, match="its reference, chain/sft, has changed since"):
        config_of(None, named)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.revision", "x"], ["model.revision: x", "training starts from one of them"]),
        (["--model.random", "{model_type: llama}"], ["model.random", "training starts from one of them"]),
        (["--reference.path", "null"], ["reference.path: null would mean the trained weights", "old/checkpoints/checkpoint-4"]),
        (
            ["--guard.steps", "1", "--guard.scorer", "reward"],
            ["guard.scorer: reward: no such folder, and this run has no reward stage", "--stages"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_no_option_is_dropped_in_silence(
    options: list[str], words: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--continue_from", "old", "--output_dir", "new", *options]
    refused(capsys, argv, *words)
    refused(capsys, [*argv, "--config", "old/config.yaml"], *words)


def test_what_is_no_run_is_called_what_it_is(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "--output_dir", "new", "--reference.path", "my_model", "--data.pairs", "pairs.jsonl", "--continue_from"]
    refused(capsys, [*argv, "old/config.yaml"], "a file; name the run's folder: old")
    record = json.loads(Path("old/model/isdaa.json").read_text())
    for kind, words in (("sft", "start from it with --model.path old/sft"), ("reward", "a reward model")):
        shutil.copytree("old/model", f"old/{kind}")
        write_own(place / "old" / kind / "isdaa.json", record | {"kind": kind})
        refused(capsys, [*argv, f"old/{kind}"], words)


def test_the_card_names_what_the_first_run_began_with(place: Path) -> None:
    assert go_on("old", "--align.max_steps", "1", output="second") == 0
    assert go_on("second", "--align.max_steps", "1", output="third") == 0
    for run in ("second", "third"):
        assert "- base model: `my_model`\n" in Path(run, "model", "README.md").read_text()
    record = read_record("third/model")
    assert record is not None and record.continued is not None
    for damaged in ("{", json.dumps(json.loads(Path("old/model/isdaa.json").read_text()) | {"continued": record.continued})):
        Path(record.continued["from"], "isdaa.json").write_text(damaged)  # the second leads back to itself
        assert "- base model: " in model_card(record, "third/model")


@pytest.mark.parametrize("name", ["old", "lora"])
def test_the_references_logps_are_those_that_the_old_run_kept(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logps were computed as the policy's own, now they are another model's: one key for both."""
    computed: list[str] = []
    compute = reference_logps.computed_logps
    monkeypatch.setattr(reference_logps, "computed_logps", lambda *args: computed.append(args[4]) or compute(*args))
    assert go_on(name, "--align.max_steps", "1") == 0
    assert [what for what in computed if "reference" in what] == []
    for note in (place / ".isdaa_cache").glob("model-*.json"):
        note.write_text("{")  # damaged: asked of the model again
    assert go_on(name, "--align.max_steps", "1", output="again") == 0
    assert [what for what in computed if "reference" in what] == []
