"""A path alone is enough for a model that isdaa trained; for any other the missing option is named."""

import json
import logging
import shutil
import subprocess
from pathlib import Path

import pytest
from evaluation_helpers import save, tiny

import isdaa.record as record_module
from isdaa import adopt
from isdaa.data.encoder import VERSION
from isdaa.errors import UserError
from isdaa.evaluation.checkpoints.held_out import common_pairs
from isdaa.evaluation.checkpoints.what_to_evaluate import expand, requests
from isdaa.record import NAME, ModelRecord, read_record, record_text, relative_to, resolve_from


def run(folder: Path, method: str = "dpo", scorer: str | None = "gold", reference: Path | None = None) -> Path:
    """A run folder with two checkpoints and a final model of the second one's step; only records and configs, no weights."""
    reference = reference or folder.parent / "sft"
    for place in (reference, folder / "checkpoints/checkpoint-10", folder / "checkpoints/checkpoint-20", folder / "model"):
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text("{}")
    (folder / "checkpoints/checkpoint-30").mkdir()  # half written
    (folder / "eval_pairs.jsonl").write_text("{}\n")
    config = {
        "seed": 3,
        "objective": {"method": method, "beta": 0.01},
        "model": {"dtype": "float32"},
        "evaluation": {"prompts": 32, "max_new_tokens": 24, "gone_since": 1},
        "tokenization": {"max_length": 128, "max_prompt_length": 64},
    }
    for place, step in (("checkpoints/checkpoint-10", 10), ("checkpoints/checkpoint-20", 20), ("model", 20)):
        facts = {"reference": str(reference), "evaluation": "world:small", "evaluation_split": "test", "scorer": scorer}
        record = ModelRecord("policy", config, step=step, tokens=VERSION, **facts)
        (folder / place / NAME).write_text(record_text(record, folder / place))
    lines = [
        {"step": 5, "weights/mean": 0.9, "weights/ess": 0.8},
        {"step": 10, "weights/mean": 0.5, "weights/ess": 0.25},
        {"step": 10, "eval/loss": 1.0},
        {"step": 20, "weights/mean": 0.25, "weights/ess": 0.125},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_folder_alone(tmp_path):
    folder = run(tmp_path / "dpo")
    found = requests([folder])
    assert [model.label for model in found.models] == ["dpo/checkpoint-10", "dpo/model"]
    assert [(m.method, m.beta, m.seed, m.step) for m in found.models] == [("dpo", 0.01, 3, 10), ("dpo", 0.01, 3, 20)]
    assert [(m.weight_mean, m.ess) for m in found.models] == [pytest.approx((0.7, 0.525)), (0.25, 0.125)]
    assert Path(found.reference).resolve() == (tmp_path / "sft").resolve()
    assert (found.data, found.split, found.scorer) == ("world:small", "test", "gold")
    assert (found.settings.prompts, found.settings.max_new_tokens) == (32, 24)
    assert found.tokenization.max_prompt_length == 64
    assert found.output_dir == str(folder / "evaluation")
    assert found.held_out == (str(folder.absolute() / "eval_pairs.jsonl"),)


def test_one_checkpoint_several_runs_and_overrides(tmp_path):
    first, second = run(tmp_path / "dpo"), run(tmp_path / "is_dpo", "is_dpo")
    one = requests([first / "checkpoints/checkpoint-10"])
    assert [model.step for model in one.models] == [10] and one.output_dir == str(first / "evaluation")
    both = requests([first, second], {"evaluation.prompts": 7, "scorer": "none", "data": "my.jsonl", "split": None})
    assert [model.method for model in both.models] == ["dpo", "dpo", "is_dpo", "is_dpo"]
    assert both.output_dir == str(tmp_path / "evaluation")
    assert (both.settings.prompts, both.scorer, both.data, both.split, both.held_out) == (7, None, "my.jsonl", None, ())
    with pytest.raises(UserError, match=r"--evaluation.promts: unknown key .*prompts"):
        requests([first], {"evaluation.promts": 7})


def test_runs_that_disagree_are_asked_about(tmp_path):
    first, second = run(tmp_path / "a"), run(tmp_path / "b", scorer="other", reference=tmp_path / "other_sft")
    with pytest.raises(UserError, match=r"different reference.*--reference"):
        requests([first, second])
    with pytest.raises(UserError, match=r"different scorers.*--scorer"):
        requests([first, second], {"reference": str(tmp_path / "sft")})
    assert requests([first, second], {"reference": str(tmp_path / "sft"), "scorer": "gold"}).scorer == "gold"


def test_a_model_without_a_record_names_what_to_give(tmp_path):
    path = save(tiny(), tmp_path / "model_of_mine")
    with pytest.raises(UserError, match=r"no isdaa.json beside it.*--reference"):
        requests([path])
    with pytest.raises(UserError, match=r"--data"):
        requests([path], {"reference": path})
    found = requests([path], {"reference": path, "data": "prompts.jsonl"})
    assert (found.scorer, found.settings.prompts, found.models[0].label) == (None, 512, "model_of_mine")
    assert found.output_dir == str(Path(path) / "evaluation")


def test_paths_that_are_no_models(tmp_path):
    with pytest.raises(UserError, match="no such model folder"):
        expand(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a model folder"):
        expand(tmp_path / "empty")
    with pytest.raises(UserError, match="--model_path"):
        requests([])
    assert expand("owner/name") == ["owner/name"]


def test_pairs_are_held_out_from_every_run(tmp_path, caplog):
    first, second = run(tmp_path / "dpo"), run(tmp_path / "is_dpo", "is_dpo")
    assert len(requests([first, second]).held_out) == 1  # of one content

    def write(folder: Path, *prompts: str) -> None:
        rows = [{"prompt": prompt, "chosen": "yes", "rejected": "no"} for prompt in prompts]
        (folder / "eval_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(first, "a", "b", "b", "c")
    write(second, "b", "c", "d")
    files = requests([first, second]).held_out
    assert files == (str(first / "eval_pairs.jsonl"), str(second / "eval_pairs.jsonl"))
    pairs = common_pairs(files)
    assert pairs is not None and [pair["prompt"] for pair in pairs] == ["b", "b", "c"]
    write(second, "d")
    with caplog.at_level(logging.INFO, "isdaa"):
        assert common_pairs(requests([first, second]).held_out) is None
        (second / "eval_pairs.jsonl").unlink()
        assert requests([first, second]).held_out == ()
    assert len([record for record in caplog.records if record.name != "isdaa.config.taken_away"]) == 2


def test_a_line_in_writing_is_left_alone(tmp_path):
    folder = run(tmp_path / "dpo")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "weig')
    before = (folder / "metrics.jsonl").read_bytes()
    assert requests([folder]).models[-1].weight_mean == 0.25
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_one_folder_by_two_names(tmp_path):
    first, second = run(tmp_path / "a"), run(tmp_path / "b")
    (tmp_path / "link").symlink_to(tmp_path / "sft")
    for file in second.rglob(NAME):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"reference": str(tmp_path / "link")}))
    adopt(second)
    assert requests([first, second]).reference == str((tmp_path / "sft").resolve())


def test_records_of_a_symlinked_run(tmp_path):
    run(tmp_path / "deep" / "down" / "dpo")
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "down" / "dpo" / "model")
    record = read_record(tmp_path / "link")
    assert record is not None and record.reference == str((tmp_path / "deep" / "down" / "sft").resolve())


def test_what_is_gone_or_mistyped_is_named(tmp_path, monkeypatch):
    folder = run(tmp_path / "demo" / "dpo")
    with pytest.raises(UserError, match=rf"did you mean {folder}\?"):
        requests([tmp_path / "demo"])
    shutil.rmtree(tmp_path / "demo" / "sft")
    with pytest.raises(UserError, match=r"checkpoint-10/isdaa.json.*sft, is not there.*--reference"):
        requests([folder])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"runs/minni: no such folder here.*no record.*--reference"):
        requests(["runs/minni"])
    (tmp_path / "runs" / "demo2").mkdir(parents=True)  # `runs/` before both makes them not alike
    with pytest.raises(UserError, match=r"runs/minni: no such folder here; .*no record.*--reference"):
        requests(["runs/minni"])
    (tmp_path / "runs" / "mini").mkdir(parents=True)
    with pytest.raises(UserError, match=r'^runs/minni: no such model folder \(did you mean "runs/mini"\?\); a path names'):
        requests(["runs/minni"])


def test_gold_is_a_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "gold", tmp_path / "run" / "gold"):
        place.mkdir(parents=True)
    assert relative_to(tmp_path / "run", "gold") == resolve_from(tmp_path / "run", "gold") == "gold"


def test_the_revision_is_that_of_isdaa_alone(tmp_path, monkeypatch):
    place = tmp_path / "vendored" / "src" / "isdaa"
    place.mkdir(parents=True)
    (tmp_path / "vendored" / "pyproject.toml").write_text("")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a", "-C"]
    monkeypatch.setattr(record_module, "__file__", str(place / "record.py"))
    for root, expected in ((tmp_path, False), (tmp_path / "vendored", True)):
        for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
            subprocess.run([*git, str(root), *command], check=True)
        assert (record_module.git_revision.__wrapped__() is not None) == expected
