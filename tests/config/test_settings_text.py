"""Values keep their meaning: text keys are text, on the command line, in a run's file and in a sweep's; keys come once."""

from __future__ import annotations

import json
import os
import subprocess
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from isdaa.cli.main import main, parse, parser_of
from isdaa.cli.options import overrides_of
from isdaa.config import Config, fields, lay_over, load_config, resolved
from isdaa.config.settings_text import dump_settings
from isdaa.errors import UserError
from isdaa.experiments.grid import cells_of, load_sweep

BASE = {"model": {"path": "m"}, "data": {"pairs": "p.jsonl"}}
# YAML's own grammar takes these for something else, so that a file has to quote them; Null could mean none.
QUOTED_IN_FILES = [
    "run #2", "[a]", "{a: b}", "key: value", "- item", "a: [", "'quoted'", '"', "*x", "&x", "!tag", "!!float 1", "%d", "@x",
    "`x`", "|", ">", "? x", "a # b", " leading", "trailing ", "a\tb", "Null",
]  # fmt: skip
HOSTILE = [
    "2026-11-29", "0123456", "12e4567", "1_000", "0x10", "0o17", "1e5", "12:30:00", ".inf", "-.5", "+7", "1.", "\u0661\u0662",
    "yes", "no", "on", "off", "true", "False", "y", "=", "<<", "none", "$HOME", *QUOTED_IN_FILES,
]  # fmt: skip
FREE = (
    "output_dir", "scorer.label", "model.path", "model.tokenizer", "model.revision", "continue_from", "reference.path",
    "reference.revision", "reference.cache_dir", "behaviour.model_path", "data.pairs", "data.pairs_split", "data.eval_pairs",
    "data.eval_split", "data.sft", "data.sft_split", "data.prompts", "data.prompts_split", "data.evaluation",
    "data.evaluation_split", "reward.path", "label.scorer", "evaluation.scorer", "guard.scorer",
)  # fmt: skip
PATHS = tuple(key for key in FREE if not key.endswith(("split", "revision", "label")))


def is_free_text(annotation: Any) -> bool:
    members = [m for m in typing.get_args(annotation) if m is not type(None)] or [annotation]
    return all(m is str or (typing.get_origin(m) is typing.Annotated and typing.get_args(m)[0] is str) for m in members)


def nested(key: str, value: str) -> dict[str, Any]:
    """The base's data with one key set."""
    data: dict[str, Any] = json.loads(json.dumps(BASE))
    section, _, name = key.rpartition(".")
    (data.setdefault(section, {}) if section else data)[name] = value
    return data


def value_of(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


PARSER = parser_of("train")


def given(*argv: str) -> dict[str, Any]:
    return overrides_of(PARSER.parse_args(argv))


def test_the_keys_below_are_all_whose_text_is_free() -> None:
    others = {"data.subset", "objective.method"}  # text, too, that has to name something; below
    assert {key for key, field, _ in fields() if is_free_text(field.annotation)} == {*FREE, *others}


def texts_of(config: Any) -> set[str]:
    """What the free keys hold; one text where all of them hold the same."""
    return {value_of(config, key) for key in FREE}


@pytest.mark.parametrize("text", HOSTILE)
def test_an_options_text_arrives_as_it_is(text: str, tmp_path: Path) -> None:
    (file := tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE))
    assert texts_of(load_config(file, given(*(f"--{key}={text}" for key in FREE)))) == {text}
    if not text.startswith("-"):  # which argparse takes for an option, and says so
        assert texts_of(load_config(file, given(*(word for key in FREE for word in (f"--{key}", text))))) == {text}


@pytest.mark.parametrize("text", HOSTILE)
def test_a_files_text_arrives_as_it_is_written(text: str, tmp_path: Path) -> None:
    file, again, mark = tmp_path / "run.yaml", tmp_path / "config.yaml", "M4RK"
    data: dict[str, Any] = {}
    for key in FREE:
        lay_over(data, key, mark)
    for form in {json.dumps(text), *([] if text in QUOTED_IN_FILES else [text])}:
        file.write_text(yaml.safe_dump(data).replace(mark, form))
        config = load_config(file)
        assert texts_of(config) == {text}, form
    # What a run writes down is read as the same again, here and by a reader of YAML 1.1.
    again.write_text(dump_settings(resolved(config)))
    assert texts_of(load_config(again)) == {text}
    assert yaml.safe_load(again.read_text()) == resolved(config)


def test_texts_that_have_to_name_something_are_named_as_written(tmp_path: Path) -> None:
    (file := tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE))
    for key in (
        "data.subset",
        "objective.method",
        "model.dtype",
        "objective.loss",
        "guard.stop",
        "lora.target_modules",
        "stages",
    ):
        for text in ("2026-11-29", "0123456", "12e4567", "yes #2", "12:30:00"):
            if key == "lora.target_modules":
                assert load_config(file, given(f"--{key}", text, "1e5")).lora.target_modules == [text, "1e5"]
                (tmp_path / "own.yaml").write_text(yaml.safe_dump(BASE) + f"lora: {{target_modules: [1e5, '{text}']}}\n")
                assert load_config(tmp_path / "own.yaml").lora.target_modules == ["1e5", text]
                continue
            with pytest.raises(UserError) as caught:
                load_config(file, given(f"--{key}", text))
            assert key.split(".")[0] in str(caught.value)
            assert text in str(caught.value) or "expected one of" in str(caught.value), caught.value
    (tmp_path / "0123456").mkdir()
    assert load_config(file, given("--data.pairs", str(tmp_path), "--data.subset", "0123456")).data.subset == "0123456"
    assert given("--stages", "[sft, align]") == given("--stages", "sft", "align") == {"stages": ["sft", "align"]}


def test_null_alone_is_none(tmp_path: Path) -> None:
    (file := tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE))
    assert load_config(file, given("--reference.path", "null")).reference.path is None
    for text in ("path: null", "path:"):
        (file2 := tmp_path / "two.yaml").write_text(f"{yaml.safe_dump(BASE)}reference: {{{text}}}\n")
        assert load_config(file2).reference.path is None
    for text in ("~", "Null", "NULL"):  # YAML's other nulls: a name to some, none to others
        file2.write_text(f"{yaml.safe_dump(BASE)}reference:\n  path: {text}\n")
        with pytest.raises(UserError, match=r"two.yaml:\d: .* can mean none or a text; write null"):
            load_config(file2)
    for argv in (["--output_dir", "null"], ["--reference.path", ""], ["--align.max_steps", " "], ["--output_dir", "\0"]):
        with pytest.raises(UserError, match=argv[0]):
            load_config(file, given(*argv))
    file2.write_text(f"{yaml.safe_dump(BASE)}output_dir: ''\n")
    with pytest.raises(UserError, match=r"two\.yaml: output_dir: expected some text"):
        load_config(file2)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("1e-6", 1e-6),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("0123", 123),
        ("0x10", 16),
        ("0o17", 15),
        ("-7", -7),
        ("true", True),
        ("False", False),
        ("null", None),
        ("yes", "yes"),
        ("on", "on"),
        ("12:30:00", "12:30:00"),
        ("2026-11-29", "2026-11-29"),
        ("1_000", "1_000"),
        ("12e4567", "12e4567"),
        ("= 1", "= 1"),
        ("[1, yes]", [1, "yes"]),
        ("{1: 2026-11-29}", {"1": "2026-11-29"}),
    ],
)
def test_dictionaries_hold_yaml_1_2(written: str, read: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"{yaml.safe_dump(BASE)}tokenization:\n  chat_template_kwargs:\n    it: {written}\n")
    config = load_config(file)
    assert config.tokenization.chat_template_kwargs == {"it": read}
    option = given("--tokenization.chat_template_kwargs", f"{{it: {written}}}")
    assert load_config(file, option).tokenization.chat_template_kwargs == {"it": read}
    (again := tmp_path / "config.yaml").write_text(dump_settings(resolved(config)))
    assert load_config(again).tokenization.chat_template_kwargs == {"it": read}


@pytest.mark.parametrize(
    "text", ["1e5", "0o17", "yes", "1_0", "12:30", "0123", "2026-11-29", "null", "~", "12e4567", ".inf", "<<", "=", ""]
)
def test_texts_in_dictionaries_survive_being_written_down(text: str, tmp_path: Path) -> None:
    config = Config.model_validate({**BASE, "tokenization": {"chat_template_kwargs": {"it": text}}})
    (file := tmp_path / "config.yaml").write_text(dump_settings(resolved(config)))
    assert load_config(file).tokenization.chat_template_kwargs == {"it": text}


def test_numbers_and_booleans_are_numbers_and_booleans(tmp_path: Path) -> None:
    (file := tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE))
    for key, text, value in [
        ("align.learning_rate", "1e-6", 1e-6),
        ("objective.beta", "1e-2", 0.01),
        ("objective.clip_eps", "null", None),
        ("seed", "7", 7),
        ("align.probe", "no", False),
        ("align.probe", "false", False),
        ("objective.length_normalized", "on", True),
    ]:
        assert value_of(load_config(file, given(f"--{key}", text)), key) == value
        section, _, name = key.rpartition(".")
        (own := tmp_path / "own.yaml").write_text(
            yaml.safe_dump(BASE) + (f"{section}: {{{name}: {text}}}" if section else f"{name}: {text}")
        )
        assert value_of(load_config(own), key) == value
    for key, text in [
        ("seed", "5 # x"),
        ("seed", "12:30"),
        ("seed", "&x 5"),
        ("align.learning_rate", "12e4567"),
        ("seed", "9" * 5000),
        ("seed", "0x" + "f" * 5000),
        ("align.learning_rate", "1" * 5000),
        ("align.probe", "9" * 5000),
        ("seed", "'5'"),
    ]:
        with pytest.raises(UserError, match=f"--{key}"):
            load_config(file, given(f"--{key}", text))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("align: {}\nalign: {seed: 1}", "align"),
        ("align:\n  seed: 1\n  'seed': 2", "seed"),
        ('output_dir: a\n"output_dir": a', "output_dir"),
        ("tokenization: {chat_template_kwargs: {a: {b: 1, b: 2}}}", "b"),
        ("tokenization: {chat_template_kwargs: {1: 1, '1': 2}}", "1"),
        ("x: &x {seed: 1, seed: 2}\nalign: *x", "seed"),
    ],
)
def test_a_key_given_twice_is_an_error_in_every_file(
    text: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run := tmp_path / "run.yaml").write_text(f"{yaml.safe_dump(BASE)}{text}\n")
    (sweep := tmp_path / "sweep.yaml").write_text(f"base: run.yaml\nseeds: [1]\ngrids: {{g: {{objective.beta: [1]}}}}\n{text}\n")
    for command in (
        ["train", "--config", str(run)],
        ["inspect", "--config", str(run)],
        ["sweep", "--config", str(sweep), "--dry_run"],
    ):
        assert main(command) == 2
        assert f"key '{key}' is given twice" in capsys.readouterr().err
    assert main(["inspect", "--config", str(sweep)]) == 2
    assert f"key '{key}' is given twice" in capsys.readouterr().err or "unknown key" in capsys.readouterr().err


def test_a_dotted_key_beside_its_section_is_no_second_way_to_say_it(tmp_path: Path) -> None:
    (file := tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE) + "model.path: other\n")
    with pytest.raises(UserError, match=r"run.yaml: model.path: unknown key"):
        load_config(file)


def test_an_option_given_twice_is_an_error_unless_it_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (
        ["train", "--seed", "1", "--seed", "2"],
        ["train", "--model.path", "a", "--model.path=b"],
        ["train", "--stages", "sft", "--stages", "align"],
        ["evaluate", "--model_path", "a", "--model-path", "b"],
        ["evaluate", "--model_path", "a", "--output", "b", "--output", "c"],
        ["sweep", "--config", "a", "--config", "b"],
        ["benchmark", "hh", "--limit", "1", "--limit", "2"],
    ):
        assert main(argv) == 2
        assert "is given twice" in capsys.readouterr().err
    assert given("--seed", "1", "--seed", "1") == {"seed": 1}


def test_a_sweeps_values_are_read_as_their_keys_are(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE))
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "title: 2026-11-29\nbase: run.yaml\noutput_dir: 0123456\nseeds: [1]\nslurm: {partition: 12e4567, options: {mem: 1e5}}\n"
        "grids:\n  2026:\n    data.pairs_split: [2026-11-29, yes, 12e4567]\n    align.learning_rate: [1e-6, 1e-5]\n"
        "  0x10:\n    lora.target_modules: [[1e5, 0123], [q_proj]]\n    reference.path: null\n"
    )
    sweep, base = load_sweep(file)
    assert (sweep.title, sweep.output_dir, sweep.slurm.partition) == ("2026-11-29", "0123456", "12e4567")
    assert sweep.slurm.options == {"mem": 1e5} and list(sweep.grids) == ["2026", "0x10"]
    assert sweep.grids["2026"] == {"data.pairs_split": ["2026-11-29", "yes", "12e4567"], "align.learning_rate": [1e-6, 1e-5]}
    assert sweep.grids["0x10"] == {"lora.target_modules": [["1e5", "0123"], ["q_proj"]], "reference.path": None}
    assert len(cells_of(sweep, base)) == 8
    with pytest.raises(UserError, match="given twice"):
        load_sweep(file, {}) if file.write_text(file.read_text() + "  2026: {objective.beta: 1}\n") else None


def test_home_is_expanded_everywhere_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    home = str(tmp_path / "home")
    (file := tmp_path / "home" / "run.yaml").write_text(yaml.safe_dump(BASE))
    for key in PATHS:
        assert value_of(load_config("~/run.yaml", given(f"--{key}", "~/x #1")), key) == f"{home}/x #1"
        (own := tmp_path / "own.yaml").write_text(yaml.safe_dump(nested(key, "~")))
        assert value_of(load_config(own), key) == home
        with pytest.raises(UserError, match=rf"--{key}: ~nobody-here/x: no such user"):
            load_config(file, given(f"--{key}", "~nobody-here/x"))
    for argv, name in (
        (["evaluate", "--model_path", "~/x"], "model_path"),
        *((["evaluate", "--model_path", "a", f"--{n}", "~/x"], n) for n in ("output", "reference", "data", "scorer", "scores")),
        *((["benchmark", "hh", f"--{n}", "~/x"], n) for n in ("answers", "judgments", "opponent", "baseline", "judge")),
        *((["benchmark", "hh", f"--{n}", "~/x"], n) for n in ("references", "gamed", "chat_template", "questions")),
        (["tax", "--model_path", "a", "--include_path", "~/x"], "include_path"),
        (["report", "~/x"], "path"),
        (["report", "--checkpoints", "~/x"], "checkpoints"),
        (["report", "a", "--output", "~/x"], "output"),
        (["logps", "--model_path", "~/x", "--data", "a", "--output", "b"], "model_path"),
        (["logps", "--model_path", "a", "--data", "~/x", "--output", "b"], "data"),
        (["logps", "--model_path", "a", "--data", "b", "--output", "~/x"], "output"),
        (["sweep", "--config", "~/x"], "config"),
        (["sweep", "--config", "a", "--output_dir", "~/x"], "output_dir"),
        (["inspect", "--config", "a", "--out", "~/x"], "out"),
        (["demo", "--config", "~/x"], "config"),
    ):
        value = getattr(parse(argv), name)
        assert value in (f"{home}/x", [f"{home}/x"]), argv
    (tmp_path / "sweep.yaml").write_text(
        'base: ~/run.yaml\noutput_dir: "~/s"\nseeds: [1]\ngrids: {g: {reference.path: [~/a, "~"], objective.beta: 1}}\n'
    )
    sweep, base = load_sweep(tmp_path / "sweep.yaml")
    assert sweep.output_dir == f"{home}/s" and base.data.pairs == "p.jsonl"
    assert len(cells_of(sweep, base)) == 2
    assert sorted(os.listdir(tmp_path)) == ["home", "own.yaml", "sweep.yaml"] and os.listdir(home) == ["run.yaml"]


def test_home_is_expanded_for_callers_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from isdaa.evaluation.checkpoints.what_to_evaluate import requests

    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("m", "r", "s"):
        (tmp_path / name).mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    request = requests(["~/m"], {"reference": "~/r", "data": "~/d.jsonl", "scorer": "~/s", "output_dir": "~/o"})
    assert [model.path for model in request.models] == [f"{tmp_path}/m"]
    assert (request.reference, request.data, request.scorer, request.output_dir) == tuple(
        f"{tmp_path}/{name}" for name in ("r", "d.jsonl", "s", "o")
    )


@pytest.mark.parametrize(
    "argv", [["--output", ""], ["--output", "a\0b"], ["--output", "a\udcff"], ["--model_path", "~nobody-here"]]
)
def test_an_unusable_path_is_one_line_that_names_the_option(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    rest = [] if "--model_path" in argv else ["--model_path", "m"]
    assert main(["evaluate", *argv, *rest]) == 2
    assert capsys.readouterr().err.startswith(f"isdaa: error: {argv[0]}: ")


@pytest.mark.parametrize(
    "text",
    [
        "a: !!float abc",
        "a: !!python/object:x {}",
        "a: !!timestamp 2026-13-45",
        "a: !!bool maybe",
        "a: !x 1",
        "? [a]\n: 1",
        "a: " + "[" * 3000,
        "a: " + "9" * 5000,
        "a: &a [*a]",
        "<<: &a {<<: *a}",
        "<<: 3",
        "a: \0",
        "a: 1\n---\nb: 2",
        "data: &d {pairs: *d}",
    ],
)
def test_a_file_that_is_no_plain_data_is_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in (("run.yaml", ["train"]), ("sweep.yaml", ["sweep", "--dry_run"])):
        (tmp_path / name).write_text(text)
        assert main([*command, "--config", str(tmp_path / name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert name in line and len(line) < 540


def test_a_key_given_twice_is_an_error_in_every_json_file(tmp_path: Path) -> None:
    from isdaa.foreign import read_json, readable_jsonl

    (file := tmp_path / "x.json").write_text('{"a": {"b": 1, "b": 2}}\n')
    for read in (read_json, readable_jsonl):
        with pytest.raises(UserError, match=r"x\.json.*key 'b' is given twice in one object"):
            read(file)


@pytest.mark.parametrize(
    "argv", [["demo", "gaussians", "--output_dir", "~/run #2"], ["logps", "--model_path", "m", "--data", "d", "--output", "~/o"]]
)
def test_nothing_is_ever_made_in_a_folder_called_tilde(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Path] = []
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "subprocess.run", lambda command: [seen.append(Path(command[3])), subprocess.CompletedProcess(command, 0)][1]
    )
    monkeypatch.setattr("isdaa.training.stages.behaviour_logps.write_behaviour_logps", lambda *given: seen.append(given[3]))
    assert main(argv) == 0
    assert seen == [tmp_path / "home" / argv[-1][2:]] and not (tmp_path / "~").exists()
