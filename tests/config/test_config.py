"""The configuration: every file loads, every mistake is one line that names file, key and mend."""

from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from isdaa.cli.main import parse
from isdaa.cli.options import overrides_of
from isdaa.config import ObjectiveConfig, allowed, departures, fields, load_config, preset_value, resolved
from isdaa.config.settings_text import dump_settings
from isdaa.config.synonyms import SYNONYMS, WITHOUT_KEY, hint
from isdaa.errors import UserError
from isdaa.objectives.presets import resolve

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
# tests/experiments/test_grid.py loads the sweeps.
RUNS = (
    p
    for p in (ROOT / "configs").rglob("*.yaml")
    if p.parent.name != "accelerate" and "\ngrids:" not in p.read_text(encoding="utf-8")
)
CONFIGS = sorted([ROOT / "config.yaml", *RUNS])
BASE = {"model": {"path": "m"}, "data": {"pairs": "p.jsonl"}}


def write(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**BASE, **changes}))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_file_loads_and_resolves_to_itself(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    again = tmp_path / "resolved.yaml"
    again.write_text(yaml.safe_dump(resolved(config)))
    assert resolved(load_config(again)) == resolved(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objektive": {}}, ["run.yaml", "objektive", 'did you mean "objective"']),
        ({"objective": {"betta": 1}}, ["run.yaml", "objective.betta", 'did you mean "objective.beta"']),
        ({"align": {"bta": 1}}, ["align.bta"]),
        ({"learning_rate": 1}, ["learning_rate", "align.learning_rate"]),
        ({"objective": {"beta": "much"}}, ["run.yaml", "objective.beta", "number", "much"]),
        ({"objective": {"beta": -1}}, ["objective", "beta", "-1"]),
        ({"objective": {"method": "dop"}}, ["objective", "dop", "dpo"]),
        ({"objective": {"loss": "log"}}, ["objective.loss: expected one of logistic, squared, hinge, preset, got 'log'"]),
        ({"objective": {"method": "slic", "label_smoothing": 0.1}}, ["objective", "label_smoothing", "logistic"]),
        ({"objective": {"method": "dpo", "max_reward": 1.0}}, ["objective", "max_reward", "chi_squared"]),
        ({"objective": {"method": "dpo", "normalize": "batch"}}, ["objective", "normalize", "weight"]),
        ({"align": {"learning_rate": -1}}, ["align.learning_rate: expected a number ≥ 0, got -1"]),
        ({"align": {"learning_rate": float("inf")}}, ["align.learning_rate: expected a finite number ≥ 0, got inf"]),
        ({"align": {"batch_size": 0}}, ["align.batch_size: expected a whole number ≥ 1, got 0"]),
        ({"align": {"batch_size": 2.5}}, ["align.batch_size: expected a whole number ≥ 1, got 2.5"]),
        ({"align": {"batch_size": True}}, ["run.yaml: align.batch_size", "number, got True"]),
        ({"align": {"max_steps": True}}, ["run.yaml: align.max_steps", "number, got True"]),
        ({"align": {"learning_rate": True}}, ["run.yaml: align.learning_rate", "number, got True"]),
        ({"objective": {"beta": True}}, ["run.yaml: objective.beta", "number, got True"]),
        ({"objective": {"clip_eps": False}}, ["run.yaml: objective.clip_eps", "number, got False"]),
        ({"seed": -1}, ["run.yaml: seed: expected a whole number ≥ 0 and ≤ 4294967295, got -1"]),
        ({"seed": 2**32}, ["run.yaml: seed", "≤ 4294967295, got 4294967296"]),
        ({"sft": {"seed": -1}}, ["sft.seed: expected a whole number ≥ 0 and ≤ 4294967295 or null, got -1"]),
        ({"label": {"seed": 2**32}}, ["label.seed", "≤ 4294967295 or null"]),
        ({"evaluation": {"seed": True}}, ["evaluation.seed", "number, got True"]),
        ({"lora": {"target_modules": []}}, ["run.yaml: lora.target_modules", "at least one module"]),
        ({"lora": {"target_modules": ""}}, ["run.yaml: lora.target_modules", "expected some text"]),
        ({"lora": {"target_modules": [""]}}, ["run.yaml: lora.target_modules", "at least one module"]),
        ({"align": {"logp_chunk": 1}}, ["align.logp_chunk: unknown key"]),
        ({"model": {"path": "m", "dtype": "float16"}}, ["model.dtype", "float32, bfloat16, auto"]),
        ({"model": {"path": {"a": 1}}}, ["run.yaml: model.path: expected text, got {'a': 1}"]),
        ({"model": {"random": "llama"}}, ["run.yaml: model.random: expected a dictionary, got 'llama'"]),
        ({"model": ["m"]}, ["run.yaml: model: expected a section of keys, got ['m']"]),
        ({"data": "pairs.jsonl"}, ["run.yaml: data: expected a section of keys, got 'pairs.jsonl'"]),
        ({"align": {"probe": "perhaps"}}, ["run.yaml: align.probe: expected true or false, got 'perhaps'"]),
        ({"stages": "align"}, ["run.yaml: stages: expected a list, got 'align'; write [align]"]),
        ({"model": None}, ["run.yaml: model: expected a section of keys, got null"]),
        ({"stages": []}, ["run.yaml: stages: expected any of sft, reward, label, align, got []"]),
        ({"lora": {"target_modules": {"a": 1}}}, ["run.yaml: lora.target_modules: expected text or list, got {'a': 1}"]),
        ({"stages": ["sft", "sft"]}, ["stages", "once"]),
        ({"stages": ["train"]}, ["stages", "sft", "align"]),
        ({"stages": ["label"]}, ["label", "data.prompts"]),
        (
            {"stages": ["label"], "data": {"prompts": "p.jsonl"}, "label": {"scorer": "none"}},
            ["run.yaml: label.scorer: none makes no pairs", "`reward`", "docs/how_to.md"],
        ),
        ({"data": {}}, ["data.pairs"]),
        ({"model": {}}, ["model.path", "model.random"]),
        ({"model": {"path": "m", "random": {"model_type": "llama"}}}, ["not both"]),
        (
            {"tokenization": {"max_length": 10, "max_prompt_length": 10}},
            ["max_prompt_length", "must be below tokenization.max_length (10)"],
        ),
        ({"model": "m"}, ["run.yaml: model: expected a section of keys, got 'm'; write model: {path: m}"]),
        ({"lora": 8}, ["run.yaml: lora: expected a section of keys, got 8; write lora: {rank: 8}"]),
        ({"align": {"lr": 1}}, ["run.yaml: align.lr: unknown key", '(did you mean "align.learning_rate"?)']),
        ({"sft": {"num_train_epochs": 1}}, ['(did you mean "sft.epochs"?)']),
        ({"label": {"batch": 1}}, ['(did you mean "label.batch_size"?)']),
        ({"epochs": 3}, ['epochs: unknown key (did you mean "align.epochs"?)']),
        ({"objective": {"learning_rate": 1}}, ['(did you mean "align.learning_rate"?)']),
        ({"per_device_train_batch_size": 4}, ['(did you mean "align.batch_size"?)']),
        ({"align": {"max_length": 4}}, ['(did you mean "tokenization.max_length"?)']),
        ({"lora": {"r": 4}}, ['(did you mean "lora.rank"?)']),
        ({"lora": {"dropout": 0.1}}, ["lora.dropout: unknown key (dropout is always off)"]),
        ({"align": {"warmup_ratio": 0.1}}, ["give align.warmup_steps"]),
        ({"temperature": 1}, ["it belongs to label.temperature or guard.temperature or evaluation.temperature"]),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, changes: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, **changes))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("given", "trackers"),
    [("none", []), (["none"], []), (None, []), ("wandb", ["wandb"]), (["wandb", "trackio"], ["wandb", "trackio"])],
)
def test_trackers_are_named_as_other_programs_name_them(tmp_path: Path, given: Any, trackers: list[str]) -> None:
    for stage in ("sft", "reward", "align"):
        assert getattr(load_config(write(tmp_path, **{stage: {"report_to": given}})), stage).report_to == trackers
    words = given if isinstance(given, list) else ["null" if given is None else given]
    command = ["train", "--config", str(write(tmp_path)), "--align.report_to", *words]
    assert load_config(write(tmp_path), overrides_of(parse(command))).align.report_to == trackers
    with pytest.raises(UserError, match="report_to"):
        load_config(write(tmp_path, align={"report_to": ["none", "wandb"]}))


def test_the_label_that_a_pairing_implies_is_its_default(tmp_path: Path) -> None:
    config = load_config(None, {"label.pairing": "best_worst", "model.path": "m", "data.pairs": "p"})
    assert config.label.label == "argmax"
    assert load_config(None, {"model.path": "m", "data.pairs": "p"}).label.label == "sample"
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(again, {}).label.label == "argmax"
    for given in ({}, {"label.label": "sample"}):
        (tmp_path / "file.yaml").write_text("label: {label: sample}\n" if not given else "")
        with pytest.raises(UserError, match=r"best_worst means the best; leave label\.label out"):
            load_config(tmp_path / "file.yaml", {"label.pairing": "best_worst", "model.path": "m", "data.pairs": "p", **given})


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "\x00"])
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_config(path)
    with pytest.raises(UserError, match="no such config file"):
        load_config(tmp_path / "absent.yaml")


def test_options_override_the_file_and_are_named_as_options(tmp_path: Path) -> None:
    path = write(tmp_path, objective={"method": "is_dpo", "beta": 0.1})
    assert load_config(path, {"objective.beta": 0.05}).objective.arguments()["beta"] == 0.05
    with pytest.raises(UserError, match=r"--objective\.beta"):
        load_config(path, {"objective.beta": "x"})


METHODS = ("dpo", "is_dpo", "chi_po", "is_chi_po", "rpo", "cdpo", "ipo", "r_slic", "wpo")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("before", METHODS)
def test_a_method_over_a_run_s_own_file_is_that_method(before: str, method: str, tmp_path: Path) -> None:
    """The file spells out all of the method before; what was chosen there, and is no method's, stays."""
    chosen = {"beta": 0.07, "length_normalized": True}
    path = write(tmp_path, objective={"method": before, **chosen}, align={"max_steps": 4, "epochs": 3.0})
    (tmp_path / "config.yaml").write_text(dump_settings(resolved(load_config(path))))
    found = load_config(tmp_path / "config.yaml", {"objective.method": method})
    assert found.objective.arguments() == resolve(method, **chosen)
    assert departures(resolved(found)["objective"]) == ["length_normalized true (false)"]
    assert found.align.max_steps == 4


def test_what_an_option_replaces_takes_with_it_what_it_implied(tmp_path: Path) -> None:
    objective = {"method": "rpo", "sft_coefficient": 0.02, "clip_eps": "preset"}
    path = write(tmp_path, objective=objective, align={"max_steps": 4}, label={"pairing": "best_worst", "label": "argmax"})
    found = load_config(path, {"objective.method": "dpo", "label.pairing": "random"})
    assert departures(resolved(found)["objective"]) == ["sft_coefficient 0.02 (0.0)"]  # which the run says
    assert found.label.label == "sample" and found.align.max_steps == 4
    assert load_config(path, {"objective.method": "dpo", "objective.sft_coefficient": "preset"}).objective.arguments() == resolve(
        "dpo"
    )
    assert load_config(path, {"objective.method": "rpo"}).objective.arguments()["sft_coefficient"] == 0.02
    assert load_config(path, {"align.epochs": 2}).align.max_steps is None
    assert load_config(path, {"sft.epochs": 2}).align.max_steps == 4
    both = load_config(path, {"align.epochs": 2, "align.max_steps": 3}).align
    assert (both.epochs, both.max_steps) == (2, 3)
    for wrong in ([1], {"a": 1}, 3, "none of them"):
        with pytest.raises(UserError, match="objective"):
            load_config(write(tmp_path, objective={"method": wrong}), {"objective.method": "dop"})


def test_a_section_that_an_option_made_wrong_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.yaml with --objective\.method: objective: label_smoothing=0\.1 needs"):
        load_config(write(tmp_path, objective={"label_smoothing": 0.1}), {"objective.method": "slic", "align.batch_size": 2})
    with pytest.raises(UserError, match=r'^--objective\.method: unknown method "dop" \(did you mean "dpo"\?\)'):
        load_config(write(tmp_path, objective={"beta": 0.2}), {"objective.method": "dop"})


def test_numbers_with_exponents_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: m}\ndata: {pairs: p}\nalign: {learning_rate: 1e-6}\nobjective: {beta: 5e-2}\n")
    config = load_config(path)
    assert config.align.learning_rate == 1e-6
    assert config.objective.arguments()["beta"] == 0.05


def test_null_is_a_value_and_preset_is_the_absence_of_one() -> None:
    assert ObjectiveConfig(method="is_dpo").arguments()["clip_eps"] == 1.0
    assert ObjectiveConfig(method="is_dpo", clip_eps=None).arguments()["clip_eps"] is None
    assert ObjectiveConfig(method="is_dpo", clip_eps=0.25).arguments()["clip_eps"] == 0.25


def test_the_configuration_names_every_argument_of_the_objective() -> None:
    from dataclasses import fields as dataclass_fields

    from isdaa import Objective

    assert {f.name for f in dataclass_fields(Objective)} == set(ObjectiveConfig.model_fields) - {"method", "allow_stall"}


def test_every_key_has_one_option_and_a_default() -> None:
    names = [dotted for dotted, _, _ in fields()]
    assert len(names) == len(set(names))
    assert "objective.beta" in names
    assert "align.learning_rate" in names


def test_a_sweep_s_file_names_the_command_that_runs_it() -> None:
    with pytest.raises(UserError, match="isdaa sweep --config"):
        load_config(ROOT / "configs" / "mini" / "sweep.yaml")


def test_help_tells_what_every_key_takes() -> None:
    told = {name: allowed(field) for name, field, _ in fields()}
    assert told["stages"] == "any of sft, reward, label, align"
    assert told["objective.weight"] == "one of none, importance, wpo, shuffled, mean, preset"
    assert told["objective.normalize"] == "one of batch, preset, null"
    assert told["objective.clip_eps"] == "a number ≥ 0, preset, null"
    assert told["objective.beta"] == "a number > 0, preset"
    assert told["objective.label_smoothing"] == "a number ≥ 0 and ≤ 0.5, preset"
    assert told["objective.method"].startswith("one of dpo, ipo, slic,")
    assert told["align.attention"] == "one of auto, sdpa, blocks, flex, varlen"
    assert told["align.batch_tokens"] == "a whole number ≥ 1, null"
    assert told["evaluation.confidence"] == "a number > 0.5 and < 1"
    assert told["evaluation.top_p"] == "a number > 0 and ≤ 1"
    assert told["label.seed"] == "a whole number ≥ 0 and ≤ 4294967295, null"
    assert told["model.trust_remote_code"] == "true, false"
    assert told["data.pairs"] == told["model.random"] == ""


def test_help_tells_what_every_key_is_and_what_preset_stands_for() -> None:
    assert [name for name, field, _ in fields() if not field.description] == []
    assert preset_value("objective.beta") == "0.1"
    assert preset_value("objective.weight") == "the method's; importance for is_dpo"
    assert preset_value("objective.allow_stall") == preset_value("align.epochs") == ""


@pytest.mark.parametrize("key", ["beta", "clip_eps", "sft_coefficient", "label_smoothing", "max_reward"])
def test_bounds_of_the_help_are_those_of_the_objective(key: str) -> None:
    """A number that the configuration refuses by itself is one that `Objective` refuses, and the bounds are as far out."""
    method = "chi_po" if key == "max_reward" else "is_dpo"
    for value in (-1.0, -1e-9, 0.0, 1e-9, 0.5, 0.5 + 1e-9, 2.0):
        try:
            resolve(method, **{key: value})
        except ValueError:
            with pytest.raises(ValidationError) as refused:
                ObjectiveConfig(**{"method": method, key: value})
            assert refused.value.errors()[0]["loc"][0] == key
        else:
            ObjectiveConfig(**{"method": method, key: value})


def test_every_synonym_leads_to_a_key_that_there_is() -> None:
    known = {name for name, _, _ in fields()}
    assert {name: key for name, key in SYNONYMS.items() if key not in known} == {}
    assert set(SYNONYMS) & set(WITHOUT_KEY) == set()
    for word in (*SYNONYMS, *WITHOUT_KEY):
        assert word == word.lower().replace("-", "_")
    # A key of ours in the table means itself, where its name stands once.
    last = [name.rpartition(".")[2] for name in known]
    for name in known:
        key = name.rpartition(".")[2]
        if last.count(key) == 1 and key in SYNONYMS and name not in ("behaviour.model_path", "guard.steps"):  # of training, alone
            assert SYNONYMS[key] == name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lr", 'did you mean "--align.learning_rate"'),
        ("reward.LR", 'did you mean "--reward.learning_rate"'),
        ("beta", 'did you mean "--objective.beta"'),
        ("objective.lr", 'did you mean "--align.learning_rate"'),
        ("model", 'did you mean "--model.path"'),
        ("model_name_or_path", 'did you mean "--model.path"'),
        ("num-train-epochs", 'did you mean "--align.epochs"'),
        ("reward.base_model", 'did you mean "--reward.path"'),
        ("evaluation.max_tokens", 'did you mean "--evaluation.max_new_tokens"'),
        ("resume_from_checkpoint", "the same command goes on by itself"),
        ("zzzz", ""),
    ],
)
def test_the_field_s_usual_name_is_answered_first(name: str, words: str) -> None:
    found = hint(name, [key for key, _, _ in fields()], "--")
    assert words in found if words else not found


@pytest.mark.parametrize("name", [name for name, field, _ in fields() if " of " in allowed(field)])
def test_what_help_offers_is_taken_and_nothing_else(name: str) -> None:
    field = next(field for key, field, _ in fields() if key == name)
    check = TypeAdapter(Annotated[field.annotation, field])
    many, _, choices = allowed(field).partition(" of ")
    for choice in choices.split(", "):
        value = None if choice == "null" else choice
        check.validate_python([value] if many == "any" else value)
    with pytest.raises(ValidationError):
        check.validate_python(["other"] if many == "any" else "other")
