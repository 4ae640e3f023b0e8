"""The command line: every mistake is one line that says what, where and how to mend it; nothing made earlier is touched."""

from __future__ import annotations

import fcntl
import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chains import ALIGN, chat_model, config_file, content, jsonl, plain_pairs, read_lines, refused, train
from tokenizers_for_tests import byte_level

from isdaa import __version__
from isdaa.cli import main

PAIRS = plain_pairs(10)


@pytest.fixture
def place(my_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, pairs, a configuration and the outputs of something earlier."""
    (tmp_path / "my_model").symlink_to(my_model)
    jsonl(tmp_path / "pairs.jsonl", PAIRS)
    config_file(tmp_path / "run.yaml", ALIGN | {"output_dir": "runs/new"})
    (tmp_path / "runs" / "earlier").mkdir(parents=True)
    (tmp_path / "runs" / "earlier" / "result.txt").write_text("worth keeping")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(my_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, with its pairs and model beside it."""
    home = tmp_path_factory.mktemp("finished")
    (home / "my_model").symlink_to(my_model)
    jsonl(home / "pairs.jsonl", PAIRS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert train("run", ALIGN) == 0
    gc.freeze()  # what the stages have imported
    return home


@pytest.fixture
def in_finished(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(finished)
    before = content(finished / "run")
    yield finished
    after = content(finished / "run")
    cards = {name for name in before if name.endswith("README.md")}  # an evaluation is put into them
    assert {name: after.get(name) for name in after.keys() - cards} == {name: before[name] for name in before.keys() - cards}


# --- the configuration


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objektive.beta": 1}, ["run.yaml", "objektive", 'did you mean "objective"']),
        ({"align.learning_rat": 1}, ["run.yaml", "align.learning_rat", 'did you mean "align.learning_rate"']),
        ({"align.beta": 1}, ["run.yaml", "align.beta", "objective.beta"]),
        ({"objective.beta": "much"}, ["run.yaml", "objective.beta", "number", "'much'"]),
        ({"objective.beta": -1}, ["run.yaml", "beta", "-1"]),
        ({"align.batch_size": 0}, ["run.yaml", "align.batch_size", "a whole number ≥ 1"]),
        ({"align.save_steps": 2.5}, ["run.yaml", "align.save_steps", "a whole number", "2.5"]),
        ({"align.precision": "fp8"}, ["run.yaml", "align.precision", "float32, bfloat16"]),
        ({"align.report_to": ["tensorbord"]}, ["run.yaml", "align.report_to", "tensorboard"]),
        ({"objective.method": "is_dop"}, ["run.yaml", "is_dop", "is_dpo"]),
        ({"objective.method": "ipo", "objective.label_smoothing": 0.1}, ["run.yaml", "label_smoothing", "logistic"]),
        ({"objective.method": "dpo", "objective.max_reward": 1.0}, ["run.yaml", "max_reward", "chi_squared"]),
        ({"objective.method": "dpo", "objective.normalize": "batch"}, ["run.yaml", "normalize", "weight"]),
        ({"stages": ["align", "sft"], "data.sft": "world:small"}, ["run.yaml", "stages", "sft comes first"]),
        ({"data.pairs": None}, ["run.yaml", "data.pairs"]),
        ({"model.path": None}, ["run.yaml", "model.path", "model.random"]),
        ({"tokenization.max_length": 100, "tokenization.max_prompt_length": 100}, ["run.yaml", "max_prompt_length"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_in_the_file(
    place: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: list[str]
) -> None:
    config_file(place / "run.yaml", ALIGN | {"output_dir": "runs/new"} | changes)
    before = content(place)
    refused(capsys, ["train", "--config", "run.yaml"], *words)
    assert content(place) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--objective.betta", "1"], ["--objective.betta", "--objective.beta"]),
        (["--objective.bet", "1"], ["--objective.bet", "--objective.beta"]),
        (["--objektive.beta=1"], ["--objektive.beta", "--objective.beta"]),
        (["--objective.beta", "much"], ["--objective.beta", "number", "'much'"]),
        (["--objective.beta", "nan"], ["--objective.beta"]),
        (["--objective.beta"], ["--objective.beta", "expected one argument"]),
        (["--align.batch_size", "0"], ["--align.batch_size", "a whole number ≥ 1"]),
        (["--objective.loss", "log"], ["--objective.loss", "logistic, squared, hinge"]),
        (["--stages", "align", "evaluate"], ["--stages", "sft, reward, label, align"]),
        (["--objective.method", "dop"], ["dop", "dpo"]),
        (["--objective.method", "dpo", "--objective.max_reward", "2"], ["max_reward", "chi_squared"]),
        (["--config", "rum.yaml"], ["rum.yaml", "no such config file"]),
        (["--config", "pairs.jsonl"], ["pairs.jsonl", "YAML"]),
        (["--config", "runs"], ["runs"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_a_mistake_on_the_command_line(
    place: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    before = content(place)
    config = [] if "--config" in options else ["--config", "run.yaml"]
    refused(capsys, ["train", *config, *options], *words)
    assert content(place) == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["COMMAND"]),
        (["trian"], ["unknown command 'trian' (did you mean \"train\"?)"]),
        (["get_model", "x"], ['(did you mean "get-model"?)']),
        (["zzz", "--help"], ["unknown command 'zzz'; `isdaa --help`"]),
        (["--config", "run.yaml", "train"], ["--config", "the command comes first: isdaa COMMAND --config"]),
        (["inspect", "--processes", "0"], ["--processes", "whole number ≥ 1", "'0'"]),
        (["sweep", "--config", "run.yaml", "--jobs", "1.5"], ["--jobs", "whole number ≥ 1", "'1.5'"]),
        (["train"], ["model.path", "model.random"]),
        (["evaluate"], ["--model_path"]),
        (["evaluate", "--model_path", "./absent"], ["./absent", "no such model folder"]),
        (["evaluate", "--model_path", "my_model"], ["my_model", "reference", "--reference"]),
        (["evaluate", "--model_path", "my_model", "--reference", "my_model"], ["my_model", "prompts", "--data"]),
        (["evaluate", "--model_path", "my_model", "--evaluation.promts", "3"], ["--evaluation.promts", "prompts"]),
        (["logps", "--model_path", "my_model", "--data", "pairs.jsonl", "--output", "pairs.jsonl"], ["pairs.jsonl", "exists"]),
        (["logps", "--model_path", "my_model", "--data", "pears.jsonl", "--output", "o"], ["pears.jsonl", "pairs.jsonl"]),
        (["demo", "--config", "absent.yaml"], ["absent.yaml"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_a_mistake_in_another_command(place: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: list[str]) -> None:
    before = content(place)
    refused(capsys, argv, *words)
    assert content(place) == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--align.lr", "1"], 'unknown option --align.lr (did you mean "--align.learning_rate"?)'),
        (["train", "--sft.lr=1"], '(did you mean "--sft.learning_rate"?)'),
        (["inspect", "--num-train-epochs", "1"], '(did you mean "--align.epochs"?)'),
        (["train", "--model", "m"], '(did you mean "--model.path"?)'),
        (["evaluate", "--model_path", "m", "--reward_model", "r"], '(did you mean "--evaluation.scorer"?)'),
        (["train", "--warmup_ratio", "0.1"], "(give align.warmup_steps;"),
        (["demo", "--beta=0.1"], '(did you mean "--objective.beta"?)'),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_an_option_of_other_tools_is_answered_with_ours(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    refused(capsys, argv, words)


# --- models and data


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.path", "./absent"], ["./absent", "no such folder"]),
        (["--model.path", "runs"], ["runs"]),
        (["--model.tokenizer", "world:tiny"], ["world", "tiny", "small"]),
        (["--data.pairs", "pears.jsonl"], ["data.pairs", "pears.jsonl", "no such file", 'did you mean "pairs.jsonl"']),
        (["--data.eval_pairs", "held_out.csv"], ["data.eval_pairs", "held_out.csv", "no such file"]),
        (["--data.evaluation", "absent.jsonl"], ["data.evaluation", "absent.jsonl", "no such file"]),
        (["--data.pairs", "run.yaml"], ["run.yaml", ".jsonl"]),
        (["--reference.path", "./absent"], ["reference.path", "./absent", "no such folder"]),
        (["--behaviour.model_path", "./absent"], ["behaviour.model_path", "./absent", "no such folder"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)
def test_something_is_missing(place: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]) -> None:
    before = content(place / "runs" / "earlier")
    refused(capsys, ["train", "--config", "run.yaml", *options], *words)
    assert content(place / "runs" / "earlier") == before


def test_a_missing_scorer_is_named_before_the_first_stage_has_worked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--stages", "sft", "label", "align", "--data.sft", "pairs.jsonl", "--data.prompts", "pairs.jsonl"]
    refused(capsys, ["train", "--config", "run.yaml", *options, "--label.scorer", "./absent"], "label.scorer", "./absent")
    assert not (place / "runs" / "new" / "sft").exists()


def changed(row: int, **values: Any) -> list[Any]:
    return [{**pair, **values} if i == row else pair for i, pair in enumerate(PAIRS)]


def dropped(column: str, row: int) -> list[Any]:
    return [{k: v for k, v in pair.items() if not (k == column and i == row)} for i, pair in enumerate(PAIRS)]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*PAIRS[:2], '{"prompt": "half'], ["pairs.jsonl:3", "JSON"]),
        ([*PAIRS[:2], "[1, 2]"], ["pairs.jsonl:3", "object"]),
        (dropped("rejected", 4), ["pairs.jsonl:5", "'rejected'"]),
        ([{"prompt": "a", "choosen": "b", "rejected": "c"}], ["pairs.jsonl:1", "'chosen'", "choosen"]),
        (changed(1, chosen=""), ["pairs.jsonl:2", "'chosen'", "empty"]),
        (changed(1, rejected=None), ["pairs.jsonl:2", "'rejected'"]),
        (changed(1, prompt=None), ["pairs.jsonl:2", "'prompt'", "null"]),
        (changed(1, chosen=7), ["pairs.jsonl:2", "'chosen'"]),
        (changed(2, chosen_logps=-3.0), ["pairs.jsonl:3", "'rejected_logps'", "'chosen_logps'"]),
        (changed(2, behaviour_chosen_logps=float("nan"), behaviour_rejected_logps=-1.0), ["pairs.jsonl:3", "finite"]),
        (changed(2, behaviour_chosen_logps=-1.0, behaviour_rejected_logps=float("-inf")), ["pairs.jsonl:3", "finite"]),
        (changed(2, behaviour_chosen_logps=-1.0, behaviour_rejected_logps=7.0), ["pairs.jsonl:3", "logps"]),
        (changed(2, weight=-1.0), ["pairs.jsonl:3", "'weight'"]),
        ([], ["pairs.jsonl", "no pair"]),
        ([{**pair, "rejected": pair["chosen"]} for pair in PAIRS], ["pairs.jsonl", "no pair is left", "equals"]),
        ([{"prompt": "the only prompt", "chosen": "a", "rejected": "b"}], ["one prompt", "data.eval_fraction"]),
    ],
    ids=range(16),
)
def test_rows_that_cannot_be_meant(place: Path, capsys: pytest.CaptureFixture[str], rows: list[Any], words: list[str]) -> None:
    jsonl(place / "pairs.jsonl", rows)
    refused(capsys, ["train", "--config", "run.yaml"], *words)
    refused(capsys, ["train", "--config", "run.yaml"], *words)  # again the same, whatever the first call left
    jsonl(place / "pairs.jsonl", PAIRS)
    assert not (place / "runs" / "new" / "model").exists()


def test_mended_input_needs_no_other_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = jsonl(place / "broken.jsonl", changed(1, chosen=""))
    refused(capsys, ["train", "--config", "run.yaml", "--data.pairs", str(broken)], "broken.jsonl:2")
    assert main(["train", "--config", "run.yaml", "--align.max_steps", "1"]) == 0


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        ({"template": "chatml", "eos": False}, ["my_model", "EOS", "eos_token"]),
        ({"template": None}, ["chat template", "tokenizer_config.json"]),
    ],
    ids=["no EOS", "no template"],
)
def test_tokenizers_that_cannot_be_used(
    place: Path, capsys: pytest.CaptureFixture[str], tokenizer: dict[str, Any], words: list[str]
) -> None:
    (place / "my_model").unlink()
    shared = byte_level("chatml")
    chat_model(place / "my_model", shared)
    byte_level(**tokenizer).save_pretrained(place / "my_model")
    if tokenizer.get("template") is None:
        (place / "my_model" / "chat_template.jinja").unlink(missing_ok=True)
    chat = [{**pair, "prompt": [{"role": "user", "content": pair["prompt"]}]} for pair in PAIRS]
    jsonl(place / "pairs.jsonl", chat)
    refused(capsys, ["train", "--config", "run.yaml"], *words)


# --- folders


def test_a_folder_of_another_run(in_finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "different run", "objective.beta", "0.1", "0.2", "--output_dir"]
    refused(capsys, ["train", "--config", "run.yaml", "--output_dir", "run", "--objective.beta", "0.2"], *words)
    words = ["run", "different run", "align.learning_rate"]
    refused(capsys, ["train", "--config", "run.yaml", "--output_dir", "run", "--align.learning_rate", "1"], *words)


def test_settings_of_a_stage_that_has_not_run_bind_nobody(in_finished: Path) -> None:
    options = ["--sft.learning_rate", "1", "--align.logging_steps", "7", "--evaluation.prompts", "5"]
    before = (in_finished / "run" / "config.yaml").read_bytes()
    assert main(["train", "--config", "run.yaml", "--output_dir", "run", *options]) == 0
    (in_finished / "run" / "config.yaml").write_bytes(before)


def test_another_model_under_a_finished_sft_stage_is_another_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--stages", "sft", "--data.sft", "pairs.jsonl", "--sft.max_steps", "1", "--output_dir", "runs/sft"]
    assert main(["train", "--config", "run.yaml", *options]) == 0
    shutil.copytree("my_model", "other_model")
    options = ["--model.path", "other_model", "--output_dir", "runs/sft"]
    refused(capsys, ["train", "--config", "run.yaml", *options], "different run", "model.path", "other_model")


def test_a_folder_that_is_no_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(place / "runs")
    words = ["runs/earlier", "not a run", "result.txt", "--output_dir"]
    refused(capsys, ["train", "--config", "run.yaml", "--output_dir", "runs/earlier"], *words)
    (place / "runs" / "earlier" / "run.json").write_text('{"epochs": 3}')
    refused(capsys, ["train", "--config", "run.yaml", "--output_dir", "runs/earlier"], "run.json", "not a record")
    (place / "runs" / "earlier" / "run.json").unlink()
    refused(capsys, ["train", "--config", "run.yaml", "--output_dir", "pairs.jsonl"], "pairs.jsonl", "file", "--output_dir")
    refused(capsys, ["train", "--config", "run.yaml", "--output_dir", "pairs.jsonl/run"], "pairs.jsonl")
    assert content(place / "runs") == before


def test_a_folder_in_which_another_process_works(in_finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(in_finished / "run" / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(capsys, ["train", "--config", "run.yaml", "--output_dir", "run"], "run", "another isdaa process", "wait")


def test_what_a_kill_left_of_a_starting_run_is_no_obstacle(place: Path) -> None:
    new = place / "runs" / "new"
    new.mkdir()
    (new / ".lock").touch()
    (new / ".run.json.abc.tmp").write_text("{")
    assert main(["train", "--config", "run.yaml", "--align.max_steps", "1"]) == 0
    assert not list(new.glob(".*.tmp"))


# --- normal data is no error


def test_long_equal_and_repeated_rows_are_counted_and_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = {"prompt": "word " * 300, "chosen": "yes " * 300, "rejected": "no"}
    equal = {"prompt": "the same?", "chosen": "yes", "rejected": "yes"}
    jsonl(place / "pairs.jsonl", [*PAIRS, long, equal])
    assert main(["train", "--config", "run.yaml", "--align.max_steps", "1", "--data.eval_fraction", "0"]) == 0
    shown = capsys.readouterr().err
    assert "11 of 12 rows kept" in shown
    for line in ("1 dropped: chosen equals rejected", "1 prompts cut", "1 chosen responses cut", "no held-out pairs"):
        assert line in shown, shown
    notes = json.loads((place / "runs" / "new" / "run.json").read_text())["stages"]["align"]["notes"]
    assert any("11 of 12" in note for note in notes)


def test_pad_may_be_eos(place: Path) -> None:
    (place / "my_model").unlink()
    chat_model(place / "my_model", byte_level("chatml", pad="<|end_of_text|>"))
    assert main(["train", "--config", "run.yaml"]) == 0
    assert read_lines(place / "runs" / "new" / "metrics.jsonl")[0]["weights/ess"] == pytest.approx(1, abs=1e-6)


# --- what is shown


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    from isdaa import PRESETS

    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in PRESETS)
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(PRESETS)
    assert all(row["formula"] and row["source"] for row in rows)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"isdaa {__version__}\n"


def test_dashes_and_underscores_are_the_same(in_finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = in_finished / "records"
    for option in ("--model-path", "--model_path"):
        assert main(["evaluate", option, "run/model", "--output", str(output)]) == 0
        assert "run/model" in capsys.readouterr().out
    refused(capsys, ["train", "--config", "run.yaml", "--align.learning-rate", "x"], "--align.learning_rate")


def test_an_interruption_says_that_the_same_command_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(run: Any) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setitem(__import__("isdaa.training.run_stages", fromlist=["_"]).STAGE_FUNCTIONS, "align", interrupted)
    assert main(["train", "--config", "run.yaml"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "isdaa: interrupted; the same command goes on from here"


def test_an_error_without_a_file_has_no_empty_field(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("isdaa.cli.methods.run", fail)
    refused(capsys, ["methods"], "isdaa: error: the disk: No space left on device")


def test_a_process_that_was_left_alone_says_no_more_than_that(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(arguments: Any) -> int:
        raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:23466. This is typically caused by …")

    monkeypatch.setattr("isdaa.cli.methods.run", lost)
    assert main(["methods"]) == 1
    assert capsys.readouterr().err.startswith("isdaa: a fault of isdaa: RuntimeError: [pair.cc:553] Connection closed")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["methods"]) == 1
    assert capsys.readouterr().err == "isdaa: process 1 ends, since another one has ended\n"


def test_evaluate_in_another_dtype(in_finished: Path) -> None:
    options = ["--dtype", "bfloat16", "--trust-remote-code", "--output", "records_bf16"]
    assert main(["evaluate", "--model_path", "run/model", *options]) == 0
    assert '"dtype": "bfloat16"' in (in_finished / "records_bf16" / "samples.jsonl").read_text()


def test_a_card_shows_no_path_of_this_machine(in_finished: Path) -> None:
    from isdaa.record import read_record
    from isdaa.training.model_card import model_card

    record = read_record(in_finished / "run" / "model")
    assert record is not None
    record.config["data"]["pairs"] = str(in_finished / "pairs.jsonl")
    record.config["model"]["path"] = "/gone/elsewhere"
    card = model_card(record, "model")
    assert str(in_finished) not in card and "/gone" not in card and "`pairs.jsonl`" in card and "pypi.org" not in card
