"""No record makes foreign code run, and in a run that is not the user's it decides nothing outside its folder."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chains import chat_model, jsonl, refused
from evaluation_helpers import reward_model, save, tiny, world_pairs
from patience import HANGS

from isdaa import adopt
from isdaa.cli import main
from isdaa.errors import UserError
from isdaa.evaluation.checkpoints.what_to_evaluate import requests
from isdaa.files import write_json
from isdaa.foreign import read_json
from isdaa.ownership import SEAL
from isdaa.record import ModelRecord, read_record, record_text
from isdaa.training.trainer.checkpoints import MANIFEST, defect, write_manifest

EVIL = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
class Config(LlamaConfig): pass
class Model(LlamaForCausalLM): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""
QUICK = ["--evaluation.prompts", "2", "--evaluation.opponent_samples", "1", "--evaluation.max_new_tokens", "2"]
QUICK += ["--evaluation.bootstrap", "100"]


def stranger(folder: Path) -> None:
    """Make all records below a folder another user's: their digests are of another key."""
    for name in ("run.json", "isdaa.json", MANIFEST):
        for path in folder.rglob(name):
            write_json(path, read_json(path) | {SEAL: "0" * 64})


def recorded(folder: Path, home: Path, **facts: Any) -> Path:
    """`home` as a run with one final model in it, whose record names `facts`."""
    (home / "run.json").write_text('{"stages": {}}')
    config = {"model": {"dtype": "float32", "trust_remote_code": True}}
    (folder / "isdaa.json").write_text(record_text(ModelRecord("policy", config, step=1, tokens=2, **facts), folder))
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`run/model` and `run/sft` by another user, with code in the model's folder; `outside` beside the run."""
    monkeypatch.chdir(tmp_path)
    for name in ("run/model", "run/sft", "outside"):
        save(tiny(), tmp_path / name)
    evil = tmp_path / "run" / "model"
    (evil / "evil.py").write_text(EVIL.format(marker=str(tmp_path / "marker")))
    config = read_json(evil / "config.json")
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    write_json(evil / "config.json", config)
    tokenizer = read_json(evil / "tokenizer_config.json")
    tokenizer["auto_map"] = {"AutoTokenizer": [None, "evil.Tokenizer"]}
    write_json(evil / "tokenizer_config.json", tokenizer)
    recorded(evil, tmp_path / "run", reference=str(tmp_path / "run" / "sft"), evaluation="world:small", scorer="gold")
    stranger(tmp_path / "run")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "--model_path", "run/model"],
        ["evaluate", "--model_path", "run"],
        ["report", "--checkpoints", "run/model"],
        ["report", "run"],
        ["evaluate", "--model_path", "run/model", "--no_trust_remote_code"],
    ],
    ids=shlex.join,
)
def test_code_of_a_folder_runs_for_nobodys_word_but_the_users(place: Path, command: list[str]) -> None:
    assert main([*command, *QUICK]) == 0
    assert not (place / "marker").exists()


def test_code_runs_where_the_user_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model_path", "run/model", "--trust_remote_code", *QUICK]) == 0
    assert (place / "marker").read_text() == "ran"
    both = ["evaluate", "--model_path", "run/model", "--trust_remote_code", "--no_trust_remote_code"]
    refused(capsys, both, "no_trust_remote_code", "not allowed with")


@pytest.mark.parametrize("adopted", [False, True])
def test_not_even_an_own_record_makes_code_run(place: Path, adopted: bool) -> None:
    if adopted:
        adopt("run")
    (place / "run/model/config.json").write_text(
        json.dumps(read_json(place / "run/model/config.json") | {"model_type": "evil"})  # which only its code knows
    )
    found = requests(["run/model"])
    assert found.trust_remote_code is False
    assert main(["evaluate", "--model_path", "run/model", *QUICK]) == 2
    assert not (place / "marker").exists()


def test_a_benchmark_and_a_tax_run_no_code_of_a_folder(place: Path, tmp_path: Path) -> None:
    chat_model(tmp_path / "chat", seed=5)
    for name in ("evil.py", "isdaa.json"):
        shutil.copy(place / "run/model" / name, tmp_path / "chat" / name)
    for name in ("config.json", "tokenizer_config.json"):
        content = read_json(tmp_path / "chat" / name) | {"auto_map": read_json(place / "run/model" / name)["auto_map"]}
        write_json(tmp_path / "chat" / name, content)
    call = ["benchmark", "alpaca_eval", "--model_path", "chat", "--questions", "project", "--limit", "1"]
    assert main([*call, "--max_new_tokens", "2"]) == 0
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (requirements-dev.txt has it)")
    jsonl(tmp_path / "rows.jsonl", [{"question": "a?", "choices": ["a", "b"], "answer": 0}] * 2)
    task = {"task": "rows", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}, "doc_to_text": "{{question}}"}
    task |= {"doc_to_choice": "{{choices}}", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}]}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rows.yaml").write_text(json.dumps(task))
    tax = ["tax", "rows", "--model_path", "chat", "--reference", "outside", "--include_path", "tasks"]
    assert main(tax) == 0
    assert not (place / "marker").exists()


def test_what_a_foreign_record_names_inside_its_run_is_used_and_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = requests(["run"])
    assert Path(found.reference) == place / "run" / "sft" and found.data == "world:small" and found.scorer == "gold"
    assert main(["evaluate", "--model_path", "run", *QUICK]) == 0
    said = capsys.readouterr().err.replace("\n", "")
    assert "sft, data world:small, scorer gold (from the record of a run that is not yours)" in said


@pytest.mark.parametrize(
    ("field", "option", "value"),
    [
        ("reference", "reference", "outside"),
        ("reference", "reference", "owner/hub-model"),
        ("evaluation", "data", "outside/rows.jsonl"),
        ("evaluation", "data", "owner/hub-data"),
        ("evaluation", "data", "hh:outside/rows.jsonl"),
        ("scorer", "scorer", "outside"),
        ("scorer", "scorer", "owner/reward"),
        ("reference", "reference", "run/link"),
        ("reference", "reference", "../.."),
    ],
)
def test_what_a_foreign_record_names_outside_is_asked_for(
    place: Path, capsys: pytest.CaptureFixture[str], field: str, option: str, value: str
) -> None:
    jsonl(place / "outside" / "rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    (place / "run" / "link").symlink_to(place / "outside")
    facts = {"reference": "run/sft", "evaluation": "world:small", "scorer": "gold"} | {field: value}
    recorded(place / "run" / "model", place / "run", **facts)
    stranger(place / "run")
    with pytest.raises(UserError, match=f"not a run of yours.*names {option}") as caught:
        requests(["run/model"])
    assert f"--{option} " in str(caught.value)
    command = ["evaluate", "--model_path", "run/model", "--evaluation.prompts", "2"]
    assert main(command) == 2
    typed = capsys.readouterr().err.partition(", type: ")[2]
    words = shlex.split(typed)
    assert words[:-2] == ["isdaa", *command] and words[-2] == f"--{option}"
    given = {option: words[-1]}
    assert requests(["run/model"], given)  # what the error prints is complete
    adopt("run")
    assert requests(["run/model"])


@pytest.mark.parametrize("value", ["owner/hub-model", "name", "hh:../outside/rows.jsonl"])
def test_a_name_is_not_inside_the_folder_that_one_stands_in(place: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    jsonl(place / "outside" / "rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    monkeypatch.chdir(place / "run")
    recorded(Path("model"), Path(), evaluation="world:small", reference=value)
    stranger(Path())
    with pytest.raises(UserError, match=f"not a run of yours.*names reference {value.partition(':')[0]}"):
        requests(["model"])


def test_a_run_is_adopted_beside_models_that_nobody_can_own(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command that the error asks for: the same with `--adopt`."""
    recorded(place / "run" / "model", place / "run", reference="outside", evaluation="world:small")
    stranger(place / "run")
    (place / "run" / "model" / "config.json").write_text(json.dumps(read_json(place / "outside" / "config.json")))
    command = ["evaluate", "--model_path", "run/model", "outside", *QUICK]
    refused(capsys, command, "with --adopt")
    assert main([*command, "--adopt"]) == 0
    assert "run/model: yours now" in capsys.readouterr().err
    refused(capsys, ["evaluate", "--model_path", "outside", "--adopt"], "no run or model of isdaa")


@pytest.mark.parametrize("link", ["evaluation", "evaluation/mt_bench", "report", "report/charts"])
def test_nothing_is_written_behind_a_link_in_anothers_run(place: Path, capsys: pytest.CaptureFixture[str], link: str) -> None:
    private = place / "private"
    private.mkdir()
    (private / "metrics.json").write_text("mine")
    assert main(["evaluate", "--model_path", "run", *QUICK]) == 0
    shutil.rmtree(place / "run" / link, ignore_errors=True)
    (place / "run" / link).parent.mkdir(exist_ok=True)
    (place / "run" / link).symlink_to(private)
    command = ["report", "run"] if "report" in link else ["evaluate", "--model_path", "run", *QUICK]
    refused(capsys, command, f"run/{link}: a symbolic link", "--output")
    assert [path.name for path in private.iterdir()] == ["metrics.json"] and (private / "metrics.json").read_text() == "mine"
    assert main([*command, "--output", "elsewhere"]) == 0
    adopt("run")
    if "/" not in link:
        (private / "metrics.json").unlink()
        assert main(command) == 0  # one's own run may lie on several disks


def test_a_lone_folder_is_its_own_world(place: Path) -> None:
    """`checkpoints` in a path makes no run of the folder around: one is known by its run.json."""
    lone = place / "downloads" / "checkpoints" / "theirs"
    shutil.copytree(place / "run" / "model", lone)
    save(tiny(1), place / "downloads" / "private")
    (lone / "isdaa.json").write_text(
        record_text(ModelRecord("policy", {}, reference=str(place / "downloads/private"), evaluation="world:small"), lone)
    )
    stranger(lone)
    with pytest.raises(UserError, match="not a run of yours"):
        requests([lone])


def test_a_record_of_ones_own_in_anothers_run_is_not_believed(place: Path) -> None:
    recorded(place / "run" / "model", place / "run", reference="outside", evaluation="world:small")
    record = read_record(place / "run" / "model")
    assert record is not None and record.own
    with pytest.raises(UserError, match="names reference"):
        requests(["run/model"])


def test_the_scorer_of_a_record_is_reached_from_everywhere(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward_model(place / "run" / "reward")
    recorded(place / "run" / "model", place / "run", reference="run/sft", evaluation="world:small", scorer="run/reward")
    write_json(
        place / "run/model/isdaa.json",
        read_json(place / "run/model/isdaa.json") | {"config": {"evaluation": {"scorer": "reward", "prompts": 3}}},
    )
    adopt("run")
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    found = requests(["../run"])
    assert found.scorer == str(place / "run" / "reward") == found.settings.scorer and found.settings.prompts == 3
    assert requests(["../run"], {"evaluation.scorer": "gold"}).scorer == "gold"


def test_adopting_takes_over_all_that_is_below_and_nothing_behind_a_link(place: Path) -> None:
    (place / "outside" / "isdaa.json").write_text("{}")
    (place / "run" / "linked").symlink_to(place / "outside")
    (place / "run" / "sft" / "isdaa.json").symlink_to(place / "outside" / "isdaa.json")
    stranger(place / "run" / "model")
    write_manifest(place / "run" / "model")
    assert adopt("run/model") == 3  # a model stands for its run
    assert defect(place / "run" / "model") is None
    assert (place / "outside" / "isdaa.json").read_text() == "{}"
    record = read_record(place / "run" / "model")
    assert record is not None and record.own
    (place / "empty").mkdir()
    with pytest.raises(UserError, match="no run or model of isdaa"):
        adopt("empty")
    with pytest.raises(UserError, match="no such folder"):
        adopt("gone")


def test_damage_is_not_adopted_away(place: Path) -> None:
    write_manifest(place / "run" / "model")
    (place / "run" / "model" / "evil.py").write_text("changed")
    adopt("run")
    assert "evil.py" in str(defect(place / "run" / "model"))
    (place / "run" / "model" / "isdaa.json").write_text("{}")
    adopt("run")
    assert defect(place / "run" / "model") is not None


def test_a_configuration_asks_for_no_kernel_of_the_hub(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        config = read_json(place / "outside" / "config.json")
        write_json(place / "outside" / "config.json", config | {key: "owner/kernel"})
        command = ["evaluate", "--model_path", "outside", "--reference", "run/sft", "--data", "world:small", *QUICK]
        refused(capsys, command, "outside", "owner/kernel", "which is code", key.strip("_"))
        write_json(place / "outside" / "config.json", config)


def test_a_users_configuration_is_believed_and_can_be_denied(place: Path) -> None:
    jsonl(place / "pairs.jsonl", [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in world_pairs(4)])
    (place / "run.yaml").write_text(
        "model: {path: run/model, trust_remote_code: true}\ndata: {pairs: pairs.jsonl, eval_fraction: 0}\n"
    )
    command = ["inspect", "--config", "run.yaml", "--output_dir", "out", "--no_plan"]
    assert main([*command, "--no_trust_remote_code"]) == 0
    assert main([*command, "--no_trust_remote_code", "--model.trust_remote_code", "true"]) == 0
    assert not (place / "marker").exists()
    assert main(command) == 0
    assert (place / "marker").exists()


@pytest.mark.slow  # two processes that import everything
def test_processes_of_several_machines_have_the_main_ones_key(place: Path) -> None:
    """Homes differ from node to node: what the main process knows as the user's own is everybody's."""
    recorded(place / "run" / "model", place / "run", reference="outside", evaluation="world:small")
    (place / "run" / "model" / "config.json").write_text(json.dumps(read_json(place / "outside" / "config.json")))
    adopt("run")
    program = "import os, sys; from isdaa.cli import main\n"
    program += "if os.environ['RANK'] == '1': os.environ['XDG_CONFIG_HOME'] = '/nowhere'\n"
    program += f"sys.exit(main(['evaluate', '--model_path', 'run/model', *{QUICK}]))\n"
    (place / "program.py").write_text(program)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "program.py"]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (place / "run" / "evaluation" / "metrics.json").is_file()
